"""Hugging Face's folders: there and back, logits against independent references, and folders that lie."""

import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    assert_same_weights,
    convert_ok,
    edit_json,
    edit_weights,
    make_run,
    refusal,
    write_specials,
    write_tokenizer_file,
)

from corpus import tokenizers
from interop import tokenizer_files
from model import ModelConfig
from training import checkpoint

STRETCH = (4.0, 1.0, 4.0, 16.0)
SHAPES = dict(
    plain=("masked", {}), untied=("masked", dict(tied=False, n_kv_head=2)),
    shifted=("masked", dict(shift=True, qk_norm=False, qkv_bias=True)),
    stretched=("masked", dict(rope_stretch=STRETCH)),
    norm_and_bias=("masked", dict(qkv_bias=True)),  # no stock class has both: --verify goes by Qwen3's
    ar=("ar", {}), ar_untied=("ar", dict(tied=False, n_kv_head=1)),
    ar_biased=("ar", dict(qk_norm=False, qkv_bias=True)),
    ar_stretched=("ar", dict(qk_norm=False, rope_stretch=STRETCH)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A masked-diffusion model's folder, to copy, of the network that make_run makes by default."""
    folder = tmp_path_factory.mktemp("exported")
    make_run(folder / "ours")
    convert_ok(folder / "ours", folder / "hf")
    return folder / "hf"


def load_run(run):
    """(record, network) of the one checkpoint of a run."""
    record = checkpoint.read_checkpoint(run / "step_00000000")
    return record, checkpoint.load_model(run / "step_00000000", record).eval()


def assert_close(a, b):
    assert (a - b).abs().max() < 1e-4 * a.abs().max()


# ------------------------------------------------------------------------------------------------ round trips


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_bit_for_bit(tmp_path, shape):
    objective, settings = SHAPES[shape]
    config = make_run(tmp_path / "ours", objective, dtype=torch.bfloat16, **settings).config
    for source, out in (("ours", "hf"), ("hf", "back")):
        assert "logits differ by at most" in convert_ok(tmp_path / source, tmp_path / out, verify=True)
    n_text = None if objective == "masked" else config.n_vocab
    assert_same_weights(tmp_path / "back", tmp_path / "ours", n_text)
    record = checkpoint.read_checkpoint(tmp_path / "back/step_00000000")
    assert ModelConfig(**record["model"]) == config and record["corpus"]["tokenizer"] == "bytes"


@pytest.mark.parametrize("kind", ("Qwen3", "Qwen2", "Llama"))
@pytest.mark.parametrize("tied", (True, False))
def test_imported_logits_equal_transformers(tmp_path, kind, tied):
    positions = {}
    if kind == "Llama":
        positions["rope_parameters"] = dict(
            rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied,
        rms_norm_eps=1e-5, attn_implementation="eager", **positions)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    theirs.save_pretrained(tmp_path / "hf")
    convert_ok(tmp_path / "hf", tmp_path / "ours", tokenizer="none", verify=True)
    _, ours = load_run(tmp_path / "ours")
    ids = torch.randint(300, (2, 40))
    with torch.no_grad():
        assert_close(theirs(ids).logits, ours.logits(ours(ids)))
    assert ours.config.n_vocab == 300 and ours.config.rope_base == (5000.0 if kind == "Llama" else 10000.0)


def test_sharded_pickles_of_old(tmp_path, exported):
    """As MegaDLMs' converter writes: pytorch_model-0000x.bin, an index, the tied head, tables of angles."""
    folder = tmp_path / "hf"
    shutil.copytree(exported, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"pytorch_model-{i % 3 + 1}-of-3.bin" for i, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        torch.save({name: weights[name] for name in weight_map if weight_map[name] == file}, folder / file)
    index = json.dumps(dict(metadata={}, weight_map=weight_map))
    (folder / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    convert_ok(folder, tmp_path / "back")
    make_run(tmp_path / "ours")
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


def test_weights_in_several_files(tmp_path, monkeypatch):
    """Beyond 5 GB (here 20 kB) with an index, both ways."""
    make_run(tmp_path / "ours", n_layer=3)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 20_000)
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    convert_ok(tmp_path / "hf", tmp_path / "back", verify=True)
    for folder in (tmp_path / "hf", tmp_path / "back/step_00000000"):
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = {path.name for path in folder.glob("model-*.safetensors")}
        assert len(files) > 2 and files == set(index["weight_map"].values())
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


# -------------------------------------------------------------------------------------------- LLaDA and Dream


def llada_logits(w, ids, n_layers, n_heads, theta, eps):
    """LLaDA's network, written for this test from its published description.

    Its names, gated MLP, full attention, half rotation. ids (B, L) → (B, L, V).
    """
    def rms_norm(x, weight):
        return x * weight / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    x = w["model.transformer.wte.weight"][ids]
    B, L, D = x.shape
    d = D // n_heads
    angles = torch.arange(L)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    cos, sin = (f(torch.cat((angles, angles), -1))[:, None] for f in (torch.cos, torch.sin))
    for i in range(n_layers):
        block = f"model.transformer.blocks.{i}."
        h = rms_norm(x, w[block + "attn_norm.weight"])
        q, k, v = ((h @ w[f"{block}{name}_proj.weight"].T).view(B, L, n_heads, d) for name in "qkv")
        q, k = (t * cos + torch.cat((-t[..., d // 2 :], t[..., : d // 2]), -1) * sin for t in (q, k))
        attention = (torch.einsum("bqhd,bkhd->bhqk", q, k) / d**0.5).softmax(-1)
        y = torch.einsum("bhqk,bkhd->bqhd", attention, v).reshape(B, L, D)
        x = x + y @ w[block + "attn_out.weight"].T
        h = rms_norm(x, w[block + "ff_norm.weight"])
        gate, up = h @ w[block + "ff_proj.weight"].T, h @ w[block + "up_proj.weight"].T
        x = x + (torch.nn.functional.silu(gate) * up) @ w[block + "ff_out.weight"].T
    return rms_norm(x, w["model.transformer.ln_f.weight"]) @ w["model.transformer.ff_out.weight"].T


def test_llada(tmp_path):
    folder, generator = tmp_path / "llada", torch.Generator().manual_seed(0)
    folder.mkdir()
    write_tokenizer_file(folder / "tokenizer.json", "<|mdm_mask|>", ["<|eot_id|>"])
    config = dict(
        architectures=["LLaDAModelLM"], model_type="llada", d_model=32, n_layers=2, n_heads=4, n_kv_heads=4,
        mlp_hidden_size=48, embedding_size=320, vocab_size=320, max_sequence_length=64, rope_theta=500000.0,
        rms_norm_eps=1e-5, weight_tying=False, mask_token_id=257, block_type="llama", layer_norm_type="rms",
        activation_type="silu", include_bias=False, include_qkv_bias=False, attention_layer_norm=False,
        alibi=False, rope=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    in_block = dict(
        attn_norm=(32,), ff_norm=(32,), q_proj=(32, 32), k_proj=(32, 32), v_proj=(32, 32), attn_out=(32, 32),
        ff_proj=(48, 32), up_proj=(48, 32), ff_out=(32, 48))
    shapes = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in in_block.items()}
    shapes |= dict(wte=(320, 32), ln_f=(32,), ff_out=(320, 32))
    weights = {f"model.transformer.{name}.weight": 0.3 * torch.randn(shape, generator=generator)
               for name, shape in shapes.items()}
    for w in weights.values():
        if w.dim() == 1:
            w += 1
    save_file(weights, folder / "model.safetensors")
    convert_ok(folder, tmp_path / "ours", verify=True)
    record, ours = load_run(tmp_path / "ours")
    assert (ours.config.n_vocab, ours.config.mask_id, record["settings"]["objective"]) == (257, 257, "masked")
    ids = torch.randint(258, (2, 40), generator=generator)
    with torch.no_grad():
        assert_close(llada_logits(weights, ids, 2, 4, 500000.0, 1e-5)[..., :257], ours.logits(ours(ids)))
    tokens = tokenizers.load_tokenizer(str(folder / "tokenizer.json"))
    assert (tokens.n_vocab, tokens.mask_id, len(tokens.token_bytes())) == (257, 257, 257)
    assert tokens.decode(tokens.encode("Ab ü")) == "Ab ü"
    for change in (dict(alibi=True), dict(rope=False), dict(block_type="sequential")):
        (folder / "config.json").write_text(json.dumps(config | change), encoding="utf-8")
        (name, value), = change.items()
        assert f"{name}={value}" in refusal(tmp_path, source=folder, out=tmp_path / "x")


def test_dream_is_shifted(tmp_path):
    """Qwen2.5's network, bidirectional, each position predicted from the one before.

    Its tokenizer is in files of old, of which transformers makes a tokenizer.json.
    """
    folder, ours_folder = tmp_path / "dream", tmp_path / "ours"
    config = transformers.Qwen2Config(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        attn_implementation="eager")
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    theirs.save_pretrained(folder)
    edit_json(folder / "config.json", architectures=["DreamModel"], model_type="Dream", mask_token_id=257)
    layout, _ = tokenizer_files.tokenizer_json(tokenizers.load_tokenizer("bytes"))
    (folder / "vocab.json").write_text(json.dumps(layout["model"]["vocab"]), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    specials = {"256": tokenizer_files.special_token("<|endoftext|>"),
                "257": tokenizer_files.special_token("<|mask|>")}
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        added_tokens_decoder=specials, eos_token="<|endoftext|>", mask_token="<|mask|>",
        tokenizer_class="DreamTokenizer")), encoding="utf-8")
    assert "of its vocab.json: docs/checkpoints.md" in refusal(tmp_path, source=folder, out=ours_folder)
    transformers.Qwen2TokenizerFast.from_pretrained(folder).save_pretrained(folder)  # as the docs say
    convert_ok(folder, ours_folder, verify=True)
    record, ours = load_run(ours_folder)
    ids = torch.randint(257, (2, 20))
    with torch.no_grad():
        a = theirs(ids, attention_mask=torch.zeros(2, 1, 20, 20)).logits[..., :257]
        assert_close(a[:, :-1], ours.logits(ours(ids))[:, 1:])
    assert record["model"]["shift"] and record["settings"]["shift"] == "yes"


# ------------------------------------------------------------------------------------------------- tokenizers


def test_another_name_for_a_tokenizer_that_cant_be_read(tmp_path):
    """A folder's own file may not tell which token ends a document: --tokenizer and --eos do."""
    folder, path = tmp_path / "hf", write_specials(tmp_path / "t.json", ["<over>"])
    make_run(tmp_path / "ours", "ar")
    convert_ok(tmp_path / "ours", folder)
    edit_json(folder / "config.json", tokenizer_name=...)
    shutil.copyfile(path, folder / "tokenizer.json")
    assert "which token ends a document?" in refusal(tmp_path, source=folder, out=tmp_path / "back")
    convert_ok(folder, tmp_path / "back", tokenizer=path, eos="<over>")
    edit_json(folder / "config.json", tokenizer_name=5)
    convert_ok(folder, tmp_path / "again", tokenizer="bytes")


# --------------------------------------------------------------------------------------------- files that lie


def edit_config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def set_weights(**tensors):
    """A change of a folder's tensors; `__` stands for a dot in their names."""
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda folder: edit_weights(folder, lambda weights: weights.update(named))


def write_index(weight_map):
    def change(folder):
        (folder / "model.safetensors").unlink()
        index = json.dumps(dict(weight_map=weight_map))
        (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")

    return change


def set_rows(n_rows):
    def change(folder):
        edit_json(folder / "config.json", vocab_size=n_rows)
        set_weights(model__embed_tokens__weight=torch.ones(n_rows, 32))(folder)

    return change


def replace_weights(**tensors):
    """A pytorch_model.bin in the place of model.safetensors, with these tensors changed."""
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        weights |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        torch.save(weights if tensors else {0: torch.ones(3)}, folder / "pytorch_model.bin")

    return change


def drop_tokenizer(**changes):
    def change(folder):
        edit_json(folder / "config.json", **changes)
        (folder / "tokenizer.json").unlink()

    return change


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def change_head(folder):
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))


def drop_tensor(folder):
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))


def point_at(name):
    """Put Git LFS's pointer in the place of a file; nothing else says what the tokenizer is."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"7" * 64 + b"\nsize 135000\n"

    def change(folder):
        edit_json(folder / "config.json", tokenizer_name=...)
        (folder / name).write_bytes(pointer)

    return change


def make_pipe(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


LIES = {  # {name: (a change of the folder, what is said)}
    "a pointer to weights": (point_at("model.safetensors"), "model.safetensors is a Git LFS pointer"),
    "a pointer to a tokenizer": (point_at("tokenizer.json"), "tokenizer.json is a Git LFS pointer"),
    "a pipe": (make_pipe, "model.safetensors: a pipe, which can be read only once"),
    "another architecture": (
        edit_config(architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHeadModel is not supported"),
    "another activation": (edit_config(hidden_act="gelu"), "hidden_act=gelu"),
    "other positions": (
        edit_config(rope_scaling=dict(rope_type="yarn", factor=2.0)), "rotary positions of type yarn"),
    "a setting is missing": (edit_config(hidden_size=...), "does not say 'hidden_size'"),
    "partly rotary": (edit_config(partial_rotary_factor=0.5), "partly rotary positions"),
    "a setting is null": (edit_config(num_attention_heads=None), "can't be understood"),
    "half a setting": (edit_config(rope_scaling=dict(rope_type="llama3", factor=8.0)), "can't be understood"),
    "no json": (lambda d: (d / "config.json").write_bytes(b"{"), "config.json can't be read"),
    "a tensor is missing": (drop_tensor, "has no model.layers.1.mlp.up_proj.weight"),
    "a tensor is too much": (
        set_weights(model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        "has a model.layers.0.self_attn.q_proj.bias"),
    "another shape": (
        set_weights(model__norm__weight=torch.ones(31)), "model.norm.weight is (31,), and should be (32,)"),
    "integers": (
        set_weights(model__norm__weight=torch.ones(32, dtype=torch.int8)), "model.norm.weight is torch.int8"),
    "cut short": (cut_short, "model.safetensors can't be read"),
    "the head differs": (change_head, "lm_head.weight differs from model.embed_tokens.weight"),
    "another mask": (
        edit_config(mask_token_id=256), "its mask has the id 256, tokenizer 'bytes' puts it at 257"),
    "fewer rows than tokens": (set_rows(200), "its embedding has 200 rows"),
    "a mask of text": (edit_config(mask_token_id="<|mask|>"), "mask can't be '<|mask|>'"),
    "a mask below all": (edit_config(mask_token_id=-1), "mask can't be -1"),
    "a mask that is true": (edit_config(mask_token_id=True), "mask can't be True"),
    "uneven heads": (edit_config(num_key_value_heads=3), "contradict each other"),
    "odd heads": (edit_config(head_dim=7), "contradict each other"),
    "a vocabulary of text": (edit_config(vocab_size="384"), "vocab_size=384"),
    "a base of text": (edit_config(rope_theta="abc"), "config.json"),
    "no name of a tokenizer": (
        drop_tokenizer(tokenizer_name=5), "hf: its settings can't be understood: tokenizer_name=5"),
    "far too deep": (lambda d: (d / "config.json").write_bytes(b"[" * 100000), "config.json can't be read"),
    "far more rows than tokens": (set_rows(5000), "not the tokenizer it was trained with"),
    "numbers for names": (replace_weights(), "can't be in 0 tensors"),
    "a sparse tensor": (
        replace_weights(model__norm__weight=torch.ones(32).to_sparse()), "is no array of weights"),
    "far too many layers": (edit_config(num_hidden_layers=10**12), "layers and 32 positions can't be in"),
    "far too many positions": (
        edit_config(max_position_embeddings=10**12), "1,000,000,000,000 positions can't be in"),
    "no epsilon": (edit_config(rms_norm_eps=float("nan")), "norm_eps=nan can't be"),
    "no base": (edit_config(rope_theta=-5.0), "rope_base=-5 can't be"),
    "true as text": (
        edit_config(tie_word_embeddings="false"), "tie_word_embeddings='false' is neither true nor false"),
    "a list": (lambda d: (d / "config.json").write_bytes(b"[1]"), "does not say which architecture"),
    "an architecture as text": (edit_config(architectures="DiffLM"), "does not say which architecture"),
    "no weights": (
        lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors and no pytorch_model.bin"),
    "an index that is a list": (write_index(["a"]), "index.json: weight_map is ['a']"),
    "no tokenizer": (drop_tokenizer(tokenizer_name=...), "has no tokenizer.json"),
    "a file elsewhere": (write_index({"a": "../x.safetensors"}), "which is not in its folder"),
}


def test_a_folder_with_byte_order_marks(exported, tmp_path):
    """As editors of Windows write them."""
    shutil.copytree(exported, tmp_path / "hf")
    for name in ("config.json", "tokenizer.json"):
        path = tmp_path / "hf" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    convert_ok(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize("lie", LIES)
def test_folders_that_lie(exported, tmp_path, lie):
    change, message = LIES[lie]
    shutil.copytree(exported, tmp_path / "hf")
    change(tmp_path / "hf")
    error = refusal(tmp_path, source=tmp_path / "hf", out=tmp_path / "out")
    assert message in error, error


# ------------------------------------------------------------------------------------------- transformers 4.x


def test_what_transformers_4_leaves_out(exported, tmp_path):
    """It writes no setting that is its class's default: ours is tied by default, stock ones are not."""
    shutil.copytree(exported, tmp_path / "hf")
    for missing in (..., None):
        edit_json(tmp_path / "hf/config.json", tie_word_embeddings=missing)
        convert_ok(tmp_path / "hf", tmp_path / f"from_{missing}")
        settings = (tmp_path / f"from_{missing}/settings.json").read_text(encoding="utf-8")
        assert json.loads(settings)["tied"] is True
    edit_json(tmp_path / "hf/config.json", model_type="qwen3", architectures=["Qwen3ForCausalLM"])
    error = refusal(tmp_path, source=tmp_path / "hf", out=tmp_path / "c")
    assert "has no lm_head.weight" in error


def test_its_tokenizers_give_what_models_take(exported):
    """By default version 4 adds token_type_ids, which stock models refuse in generate(**tokenizer(…))."""
    settings = json.loads((exported / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


def test_verify_says_which_version_it_needs(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.49.0"))
    error = refusal(tmp_path, source=exported, out=tmp_path / "ours", verify=True)
    assert "Qwen3ForCausalLM, which transformers 4.49.0 lacks: pip install 'transformers>=4.51'" in error
