"""Checkpoints of other programs: round trips, logits against independent references, and files that lie."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import divided
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import build

import convert
import sample
import train
from corpus import tokenizers
from interop import huggingface
from model import ModelConfig
from training import checkpoint

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_run(folder, objective="masked", tokenizer="bytes", dtype=torch.float32, **more):
    """A run of ours with random weights, written without convert.py. Returns its network."""
    tokens = tokenizers.load_tokenizer(str(tokenizer))
    network = build(n_vocab=tokens.n_vocab, mask_id=tokens.mask_id, causal=objective == "ar", timed=objective == "uniform", **dict(seq_len=32) | more)
    place = Path(folder) / "step_00000007"
    place.mkdir(parents=True)
    if hasattr(tokens, "path"):
        (Path(folder) / "tokenizer.json").write_bytes(tokens.path.read_bytes())
    save_file({name: value.to(dtype).contiguous() for name, value in network.state_dict().items()}, place / "model.safetensors")
    settings = train.Config(run_dir=str(folder), objective=objective, seq_len=network.config.seq_len)
    corpus = dict(tokenizer=tokens.name, n_vocab=tokens.n_vocab, mask_id=tokens.mask_id, eos_id=tokens.eos_id, train_sha256="a", val_sha256="b")
    record = json.loads(json.dumps(dict(settings=asdict(settings), model=asdict(network.config), corpus=corpus, samples=0, passed=0, steps=7, streak=0, pending=[], step=7, updates=7)))
    record["sha256"] = {"model.safetensors": checkpoint.file_digest(place / "model.safetensors")}
    (place / "checkpoint.json").write_text(json.dumps(dict(record, record_sha256=checkpoint.record_digest(record))))
    return network


@pytest.fixture
def run(monkeypatch, capsys):
    """convert.main() with flags: (exit code, stdout, stderr)."""

    def call(**flags):
        monkeypatch.setattr(sys, "argv", ["convert.py", *(f"--{name}={value}" for name, value in flags.items())])
        try:
            convert.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def refused(run, tmp_path, **flags):
    """The one line with which a conversion is refused; nothing is left behind."""
    before = set(tmp_path.iterdir())
    code, _, err = run(**flags)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert set(tmp_path.iterdir()) == before
    return err


def weights_of(run_folder):
    return {name: value for file in sorted(Path(run_folder).glob("step_*/model*.safetensors")) for name, value in load_file(file).items()}


def same(a, b, text=None):
    """Bit for bit, or only the `text` rows of the vocabulary."""
    assert a.keys() == b.keys()
    for name in a:
        rows = slice(text) if text and name in ("embed.weight", "lm_head.weight") else slice(None)
        assert a[name].dtype == b[name].dtype and torch.equal(a[name][rows], b[name][rows]), name


# ------------------------------------------------------------------------------------------ Megatron's torch format


def megatron_args(c, objective, tp=1, pp=1, **more):
    """The arguments as Megatron's own parser would leave them, with what nobody needs among them."""
    return argparse.Namespace(**dict(
        num_layers=c.n_layer, hidden_size=c.d_model, num_attention_heads=c.n_head, kv_channels=c.head_dim, ffn_hidden_size=c.d_ff, swiglu=True,
        group_query_attention=c.n_kv_head < c.n_head, num_query_groups=c.n_kv_head if c.n_kv_head < c.n_head else 1, seq_length=c.seq_len,
        max_position_embeddings=c.seq_len, normalization="RMSNorm", norm_epsilon=c.norm_eps, rotary_base=int(c.rope_base), rotary_percent=1.0,
        position_embedding_type="rope", add_bias_linear=False, add_qkv_bias=c.qkv_bias, qk_layernorm=c.qk_norm, untie_embeddings_and_output_weights=not c.tied,
        padded_vocab_size=512, vocab_size=c.mask_id + 12, mask_token=c.mask_id, model_running_mode="vanilla" if objective == "ar" else "difflm-noshift", attention_mask_type="causal_bottom_right" if objective == "ar" else "no_mask",
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, params_dtype=torch.bfloat16, num_experts=None, lr=2e-4) | more)


def megatron_tensors(network, rows=512):
    """Whole tensors in Megatron's layout: written from the published description, row by row, not from the converter."""
    c, ours, out = network.config, network.state_dict(), {}
    def padded(w):
        return torch.cat([w, torch.full((rows - len(w), w.shape[1]), 0.5)])
    out["embedding.word_embeddings.weight"] = padded(ours["embed.weight"])
    per_group, d = c.n_head // c.n_kv_head, c.head_dim
    for i in range(c.n_layer):
        b, p = f"blocks.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
            q, k, v = (ours[f"{b}attn.{x}_proj.{kind}"] for x in "qkv")
            fused = []
            for g in range(c.n_kv_head):
                for h in range(per_group):
                    fused += [q[(g * per_group + h) * d + r] for r in range(d)]
                fused += [k[g * d + r] for r in range(d)] + [v[g * d + r] for r in range(d)]
            out[p + f"self_attention.linear_qkv.{kind}"] = torch.stack(fused)
        out[p + "self_attention.linear_qkv.layer_norm_weight"] = ours[b + "attn_norm.weight"]
        if c.qk_norm:
            out[p + "self_attention.q_layernorm.weight"] = ours[b + "attn.q_norm.weight"]
            out[p + "self_attention.k_layernorm.weight"] = ours[b + "attn.k_norm.weight"]
        out[p + "self_attention.linear_proj.weight"] = ours[b + "attn.o_proj.weight"]
        out[p + "mlp.linear_fc1.layer_norm_weight"] = ours[b + "mlp_norm.weight"]
        out[p + "mlp.linear_fc1.weight"] = torch.cat([ours[b + "mlp.gate_proj.weight"], ours[b + "mlp.up_proj.weight"]])
        out[p + "mlp.linear_fc2.weight"] = ours[b + "mlp.down_proj.weight"]
    out["decoder.final_layernorm.weight"] = ours["norm.weight"]
    if not c.tied:
        out["output_layer.weight"] = padded(ours["lm_head.weight"])
    return out


def tp_shard(name, w, rank, tp, c):
    """What tensor-parallel rank `rank` holds of a whole tensor."""
    if name.endswith(("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")):
        n = len(w) // tp
        return w[rank * n : (rank + 1) * n].clone()
    if name.endswith("linear_fc1.weight"):
        n = c.d_ff // tp
        return torch.cat([w[rank * n : (rank + 1) * n], w[c.d_ff + rank * n : c.d_ff + (rank + 1) * n]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        n = w.shape[1] // tp
        return w[:, rank * n : (rank + 1) * n].clone()
    return w.clone()


def write_megatron(folder, network, objective, tp=1, pp=1, extra=None, **args):
    """A run in `torch` format, with optimizer state and the rest of what lies in such files."""
    c, whole = network.config, megatron_tensors(network)
    per = c.n_layer // pp
    for p in range(pp):
        for t in range(tp):
            model = {}
            for name, w in whole.items():
                stage, local = (0 if name.startswith("embedding") else pp - 1), name
                if name.startswith("decoder.layers."):
                    layer = int(name.split(".")[2])
                    stage, local = layer // per, name.replace(f"layers.{layer}.", f"layers.{layer % per}.", 1)
                if stage == p:
                    model[local] = tp_shard(name, w, t, tp, c)
            if c.tied and pp > 1 and p == pp - 1:
                model["output_layer.weight"] = tp_shard("embedding.word_embeddings.weight", whole["embedding.word_embeddings.weight"], t, tp, c)
            model["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
            place = Path(folder) / "iter_0000042" / name
            place.mkdir(parents=True)
            optimizer = dict(state={0: dict(exp_avg=torch.ones(1000))}, param_groups=[dict(lr=0.1)])
            torch.save(dict(args=megatron_args(c, objective, tp, pp, **args), checkpoint_version=3.0, iteration=42, model=model, optimizer=optimizer) | (extra or {}),
                       place / "model_optim_rng.pt")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("42")


SHAPES = dict(tied_mha={}, untied_gqa=dict(tied=False, n_kv_head=4, n_head=8, head_dim=4), biased=dict(qk_norm=False, qkv_bias=True), wide=dict(head_dim=16, rope_base=5000.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", ("masked", "ar"))
@pytest.mark.parametrize("tp, pp", ((1, 1), (2, 1), (4, 1), (1, 2), (4, 2)))
def test_megatron_shards_become_the_whole_bit_for_bit(run, tmp_path, shape, objective, tp, pp):
    """From fixtures that follow the published layout; what our own writer makes of that is those files again."""
    more = SHAPES[shape]
    network = make_run(tmp_path / "ours", objective, n_layer=2 * pp, **more)
    write_megatron(tmp_path / "mega", network, objective, tp, pp)
    code, out, err = run(source=tmp_path / "mega", out=tmp_path / "back", tokenizer="bytes", verify=True)
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))
    record = checkpoint.read_checkpoint(tmp_path / "back/step_00000042")
    assert record["settings"]["objective"] == objective and record["settings"]["run_dir"] == str(tmp_path / "back")
    assert ModelConfig(**record["model"]) == dataclasses.replace(network.config, init_std=0.02)
    code, out, err = run(source=tmp_path / "ours", to="megatron", out=tmp_path / "again", tensor_parallel=tp, pipeline_parallel=pp, verify=True)
    assert code == 0, err
    for file in tmp_path.glob("mega/iter_*/*/model_optim_rng.pt"):
        written = torch.load(tmp_path / "again/iter_0000007" / file.parent.name / file.name, weights_only=False)
        theirs, mine = torch.load(file, weights_only=False), written["model"]
        theirs["model"].pop("decoder.layers.0.mlp.linear_fc1._extra_state")
        assert theirs["model"].keys() == mine.keys()
        text = network.config.mask_id + 1
        for name, w in theirs["model"].items():
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):  # what fills up the rows is nobody's concern
                rows = max(0, min(len(w), text - int(file.parent.name[8:10]) * len(w)))
                w, mine[name] = w[:rows], mine[name][:rows]
            assert torch.equal(mine[name], w), name
        for key in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size", "padded_vocab_size", "norm_epsilon", "model_running_mode", "add_qkv_bias", "qk_layernorm"):
            assert getattr(written["args"], key) == getattr(theirs["args"], key) or key == "padded_vocab_size" and tp < 4, key


def test_arguments_that_are_not_set(run, tmp_path):
    """None is Megatron's way to say: as usual. A mask may be named by its text, and a window without end is none."""
    network = make_run(tmp_path / "base", norm_eps=1e-5, rope_base=10000.0)
    write_megatron(tmp_path / "mega", network, "masked", norm_epsilon=None, rotary_base=None, rotary_percent=None, kv_channels=None, max_position_embeddings=None,
                   window_size=(-1, -1), mask_token="<|mask|>", tensor_model_parallel_size="1", use_rope_scaling=None, vocab_size=None)
    code, _, err = run(source=tmp_path / "mega", out=tmp_path / "back", tokenizer="bytes", verify=True)
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "base"))
    record = checkpoint.read_checkpoint(tmp_path / "back/step_00000042")
    assert ModelConfig(**record["model"]) == dataclasses.replace(network.config, init_std=0.02)


def test_layers_without_transformer_engine(run, tmp_path):
    """transformer_impl=local keeps the norms in modules of their own."""
    write_megatron(tmp_path / "mega", make_run(tmp_path / "ours"), "masked", 2)
    own = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight", "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}
    for file in tmp_path.glob("mega/*/*/model_optim_rng.pt"):
        def rename(values):
            for name in list(values["model"]):
                for fused, alone in own.items():
                    if name.endswith(fused):
                        values["model"][name.replace(fused, alone)] = values["model"].pop(name)
        edit_pickle(file, rename)
    code, _, err = run(source=tmp_path / "mega", out=tmp_path / "back", tokenizer="bytes", verify=True)
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))


def test_interleaved_pipelines(run, tmp_path):
    """With virtual stages a rank holds model0, model1, …: every second group of layers."""
    network = make_run(tmp_path / "ours", n_layer=4)
    write_megatron(tmp_path / "mega", network, "masked", 1, 4)
    ranks = {p: torch.load(tmp_path / f"mega/iter_0000042/mp_rank_00_{p:03d}/model_optim_rng.pt", weights_only=False) for p in range(4)}
    for p in range(4):
        (tmp_path / f"mega/iter_0000042/mp_rank_00_{p:03d}/model_optim_rng.pt").unlink()
        (tmp_path / f"mega/iter_0000042/mp_rank_00_{p:03d}").rmdir()
    for p in range(2):  # two ranks, two chunks: layers 0 and 2, 1 and 3
        place = tmp_path / f"mega/iter_0000042/mp_rank_00_{p:03d}"
        place.mkdir()
        args = megatron_args(network.config, "masked", 1, 2)
        torch.save(dict(args=args, iteration=42, model0=ranks[p]["model"], model1=ranks[p + 2]["model"]), place / "model_optim_rng.pt")
    code, _, err = run(source=tmp_path / "mega", out=tmp_path / "back", tokenizer="bytes", verify=True)
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))


# ------------------------------------------------------------------------------------------------------ torch_dist


def write_distributed(folder, network, objective, ranks=2, stacked=True, **args):
    """A `torch_dist` checkpoint as torch.distributed.checkpoint leaves it, its chunks divided among `ranks` files."""
    c, whole, place = network.config, megatron_tensors(network), Path(folder) / "iter_0000042"
    place.mkdir(parents=True)
    if stacked:
        names = {name.split(".", 3)[3] for name in whole if name.startswith("decoder.layers.")}
        whole = {name: w for name, w in whole.items() if not name.startswith("decoder.layers.")} | {
            f"decoder.layers.{name}": torch.stack([whole[f"decoder.layers.{i}.{name}"] for i in range(c.n_layer)]) for name in names}
    whole |= {f"optimizer.state.exp_avg.{name}": torch.ones_like(w) for name, w in whole.items()} | {
        f"{other}.{name}": torch.ones(4) for other in ("chained_0.optimizer.state.exp_avg", "rerun_state_machine_state", "opt_param_scheduler") for name in ("decoder.x", "y")}
    whole["rng_state/shard_0"] = torch.ones(8, dtype=torch.uint8)
    torch.multiprocessing.spawn(divided.save, (ranks, str(place), whole, place.parent / "store"), nprocs=ranks)
    torch.save(dict(args=megatron_args(c, objective, **args), iteration=42, checkpoint_version=3.0), place / "common.pt")
    (place / "metadata.json").write_text(json.dumps(dict(sharded_backend="torch_dist", sharded_backend_version=1)))
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("42")


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """The folder of one, to copy, of the network that make_run makes by default."""
    folder = tmp_path_factory.mktemp("distributed")
    write_distributed(folder / "mega", make_run(folder / "ours"), "masked")
    return folder / "mega"


@pytest.mark.parametrize("ranks, stacked", ((2, True), (4, True), (2, False)))
def test_torch_dist_converts(run, tmp_path, ranks, stacked):
    network = make_run(tmp_path / "ours", n_kv_head=2, tied=False, n_layer=4)
    write_distributed(tmp_path / "mega", network, "masked", ranks, stacked)
    code, _, err = run(source=tmp_path / "mega", out=tmp_path / "back", tokenizer="bytes", verify=True)
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))


# ----------------------------------------------------------------------------------------------------- Hugging Face


@pytest.mark.parametrize("objective, more", (("masked", {}), ("masked", dict(tied=False, n_kv_head=2)), ("masked", dict(shift=True, qk_norm=False, qkv_bias=True)), ("masked", dict(rope_stretch=(4.0, 1.0, 4.0, 16.0))),
                                             ("ar", {}),
                                             ("ar", dict(tied=False, n_kv_head=1)), ("ar", dict(qk_norm=False, qkv_bias=True)), ("ar", dict(qk_norm=False, rope_stretch=(8.0, 1.0, 4.0, 16.0)))))
def test_there_and_back_bit_for_bit(run, tmp_path, objective, more):
    network = make_run(tmp_path / "ours", objective, dtype=torch.bfloat16, **more)
    for source, out in (("ours", "hf"), ("hf", "back")):
        code, text, err = run(source=tmp_path / source, out=tmp_path / out, verify=True)
        assert code == 0 and "logits differ by at most" in text, err
    c = network.config
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"), None if objective == "masked" else c.n_vocab)
    record = checkpoint.read_checkpoint(tmp_path / "back/step_00000000")
    assert ModelConfig(**record["model"]) == c and record["corpus"]["tokenizer"] == "bytes"


@pytest.mark.parametrize("kind", ("Qwen3", "Qwen2", "Llama"))
@pytest.mark.parametrize("tied", (True, False))
def test_imported_logits_equal_transformers(run, tmp_path, kind, tied):
    stretch = dict(rope_parameters=dict(rope_type="llama3", rope_theta=5000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)) if kind == "Llama" else {}
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                                                    head_dim=8, max_position_embeddings=64, tie_word_embeddings=tied, rms_norm_eps=1e-5, attn_implementation="eager", **stretch)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    theirs.save_pretrained(tmp_path / "hf")
    code, _, err = run(source=tmp_path / "hf", out=tmp_path / "ours", tokenizer="none", verify=True)
    assert code == 0, err
    ours = checkpoint.load_model(tmp_path / "ours/step_00000000", checkpoint.read_checkpoint(tmp_path / "ours/step_00000000")).eval()
    ids = torch.randint(300, (2, 40))
    with torch.no_grad():
        a, b = theirs(ids).logits, ours.logits(ours(ids))
    assert ours.config.n_vocab == 300 and (a - b).abs().max() < 1e-4 * a.abs().max()
    assert ours.config.rope_base == (5000.0 if kind == "Llama" else 10000.0)


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_another_dtype_is_verified_as_sharply(run, tmp_path, dtype):
    make_run(tmp_path / "ours")
    code, out, err = run(source=tmp_path / "ours", out=tmp_path / "hf", dtype=dtype, verify=True)
    assert code == 0 and "limit 0.0001" in out, err
    weights = load_file(tmp_path / "hf/model.safetensors")
    assert all(value.dtype == getattr(torch, dtype) for value in weights.values())
    assert torch.equal(weights["model.norm.weight"], weights_of(tmp_path / "ours")["norm.weight"].to(getattr(torch, dtype)))


def test_sharded_pickles_of_old(run, tmp_path):
    """pytorch_model-0000x.bin with an index, as the seeds' converter writes them: with the tied head, and tables of angles."""
    make_run(tmp_path / "ours", n_layer=3)
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    weights = load_file(tmp_path / "hf/model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    (tmp_path / "hf/model.safetensors").unlink()
    names = sorted(weights)
    where = {name: f"pytorch_model-{i % 3 + 1}-of-3.bin" for i, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: weights[name] for name in names if where[name] == file}, tmp_path / "hf" / file)
    (tmp_path / "hf/pytorch_model.bin.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    code, _, err = run(source=tmp_path / "hf", out=tmp_path / "back")
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))


@pytest.fixture(scope="module")
def remote_code(tmp_path_factory):
    """transformers copies a folder's code there, not into the user's home."""
    before = transformers.dynamic_module_utils.HF_MODULES_CACHE
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    yield
    transformers.dynamic_module_utils.HF_MODULES_CACHE = before


@pytest.mark.parametrize("more", ({}, dict(tied=False, n_kv_head=2), dict(shift=True, qk_norm=False, qkv_bias=True), dict(rope_stretch=(4.0, 1.0, 4.0, 16.0))), ids=("plain", "untied", "shifted", "stretched"))
@pytest.mark.parametrize("guidance", (0.0, 1.5))
def test_the_exported_folder_generates_what_sample_does(run, remote_code, monkeypatch, tmp_path, more, guidance):
    """AutoModelForCausalLM(...).generate with the seeds' arguments against sample.py at temperature 0, in blocks, two tokens a step."""
    make_run(tmp_path / "ours", **more)
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    inputs = tokenizer(["Ab, "], return_tensors="pt", padding_side="left", padding=True)
    theirs = model.generate(**inputs, temperature=0.0, cfg=guidance, remasking="low_confidence", inference_block_size=8, sample_steps=8, max_new_tokens=16, verbose=True)
    flags = dict(run_dir=tmp_path / "ours", prompt="Ab, ", length=16, temperature=0, guidance=guidance, order="low_confidence", block=8, steps=8, stop=False, out=tmp_path / "out.jsonl")
    monkeypatch.setattr(sys, "argv", ["sample.py", *(f"--{name}={value}" for name, value in flags.items())])
    sample.main()
    assert theirs[0].tolist() == json.loads((tmp_path / "out.jsonl").read_text())["ids"]
    assert tokenizer.mask_token_id == 257 and tokenizer.decode(inputs["input_ids"][0]) == "Ab, "


def test_the_example_of_the_docs(run, tmp_path):
    """As it stands in docs/checkpoints.md, for a model whose context is the quickstart's; nothing is asked."""
    make_run(tmp_path / "ours", seq_len=64)
    assert run(source=tmp_path / "ours", out=tmp_path / "exported")[0] == 0
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs/checkpoints.md").read_text(), re.S)[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=dict(os.environ, HF_HOME=str(tmp_path / "home")), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("['Return the ") and "[y/N]" not in done.stdout and "Warning" not in done.stderr, done.stderr


def test_the_exported_ar_folder_is_stock(run, tmp_path):
    """Qwen3ForCausalLM, with no code of ours in the folder."""
    network = make_run(tmp_path / "ours", "ar", tied=False)
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(257, (2, 32))
    with torch.no_grad():
        a, b = model(ids).logits, network.logits(network(ids))
    assert type(model).__name__ == "Qwen3ForCausalLM" and a.shape[-1] == 257 and (a - b).abs().max() < 1e-4 * b.abs().max()
    assert not list((tmp_path / "hf").glob("*.py"))


def test_the_exported_ar_folder_in_the_harness(run, tmp_path):
    """lm-evaluation-harness's own `hf` model loads the folder, tokenizer and all, and scores as ours does."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from evaluation import harness

    make_run(tmp_path / "ours", "ar")
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    ours, theirs = harness.NanoQuokka(run_dir=str(tmp_path / "ours"), device="cpu"), HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2)
    asked = [Instance("loglikelihood", {}, pair, i, metadata=("t", i, 1)) for i, pair in enumerate((("3 squared", " is 9"), ("é ", "→ü"), ("1", "2"), ("a" * 20, "b" * 20)))]
    for (a, greedy), (b, theirs_greedy) in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True), strict=True):
        assert a == pytest.approx(b, rel=1e-5) and greedy == theirs_greedy


# ---------------------------------------------------------------------------------------------------- files that lie


class Evil:
    def __init__(self, path, by):
        self.path, self.by = path, by

    def __reduce__(self):
        return {"posix.system": (os.system, (f"touch {self.path}",)), "builtins.exec": (exec, (f"open({str(self.path)!r}, 'w')",)),
                "subprocess.call": (subprocess.call, (["touch", str(self.path)],))}[self.by]


@pytest.mark.parametrize("by", ("posix.system", "builtins.exec", "subprocess.call"))
def test_poisoned_pickles_are_refused(run, distributed, tmp_path, by):
    """In every place where a checkpoint has one; nothing in them runs."""
    network, evil = make_run(tmp_path / "ours"), tmp_path / "evil"
    write_megatron(tmp_path / "a", network, "masked", extra=dict(rng_state=Evil(evil, by)))
    for name in "bcd":
        shutil.copytree(distributed, tmp_path / name)
    write_megatron(tmp_path / "f", network, "masked", 2)
    edit_pickle(tmp_path / "f/iter_0000042/mp_rank_01/model_optim_rng.pt", lambda values: values.update(rng_state=Evil(evil, by)))
    common = tmp_path / "b/iter_0000042/common.pt"
    torch.save(torch.load(common, weights_only=False) | dict(rerun=Evil(evil, by)), common)
    metadata = tmp_path / "c/iter_0000042/.metadata"
    described = pickle.loads(metadata.read_bytes())
    described.planner_data = Evil(evil, by)
    metadata.write_bytes(pickle.dumps(described))
    described = pickle.loads((tmp_path / "d/iter_0000042/.metadata").read_bytes())
    index, info = next((index, info) for index, info in described.storage_data.items() if index.fqn == "decoder.final_layernorm.weight")
    chunk = tmp_path / "d/iter_0000042" / info.relative_path
    torch.save(Evil(evil, by), tmp_path / "chunk")
    whole, small = chunk.read_bytes(), (tmp_path / "chunk").read_bytes()
    chunk.write_bytes(whole + small)
    info.offset, info.length = len(whole), len(small)
    (tmp_path / "d/iter_0000042/.metadata").write_bytes(pickle.dumps(described))
    (tmp_path / "chunk").unlink()
    assert run(source=tmp_path / "ours", out=tmp_path / "e")[0] == 0
    (tmp_path / "e/model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil(evil, by)}, tmp_path / "e/pytorch_model.bin")
    torch.save({"model.norm.weight": Evil(evil, by)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    for name in "abcdef":
        said = refused(run, tmp_path, source=tmp_path / name, out=tmp_path / "out", tokenizer="bytes")
        assert f"{by.rpartition('.')[2]}', which no checkpoint needs" in said, said
    (tmp_path / "old").replace(tmp_path / "e/pytorch_model.bin")
    said = refused(run, tmp_path, source=tmp_path / "e", out=tmp_path / "out", tokenizer="bytes")
    assert f"{by.rpartition('.')[2]}', which no checkpoint needs" in said, said
    assert not evil.exists()
    pickle.loads(pickle.dumps(Evil(evil, by)))
    assert evil.exists()  # it would have


def test_classes_in_use_are_out_of_a_pickles_reach(tmp_path):
    """A pickle's BUILD sets attributes, also of a class: of none that anybody but this pickle has."""
    from torch.distributed.checkpoint import metadata

    from interop import tensors

    for module, name in (("torch.distributed.checkpoint.metadata", "Metadata"), ("torch.serialization", "_get_layout"), ("torch", "device"), ("megatron.core.enums", "X")):
        poison = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}X\x06\x00\x00\x00gainedX\x01\x00\x00\x00xs\x86b."  # (class, (None, {"gained": "x"})) BUILD
        (tmp_path / ".metadata").write_bytes(poison)
        with pytest.raises(ValueError, match="can't be read"):
            tensors.load_metadata(tmp_path / ".metadata")
    assert not any(hasattr(thing, "gained") for thing in (metadata.Metadata, torch.serialization._get_layout, torch.device, tensors.StandIn))


def test_what_honest_checkpoints_hold_beside_tensors(run, monkeypatch, tmp_path):
    """Random states, paths, dates and activation functions are names that nobody looks up."""
    import datetime
    import enum
    import types

    import numpy as np

    module = types.ModuleType("megatron.core.enums")
    module.Backend = enum.Enum("Backend", ["flash", "auto"], module="megatron.core.enums", qualname="Backend")
    monkeypatch.setitem(sys.modules, "megatron.core.enums", module)
    network = make_run(tmp_path / "ours")
    others = dict(rng_state=[dict(np_rng_state=np.random.get_state(), scalar=np.float64(1.5))], when=datetime.datetime(2026, 1, 1), where=Path("a"), part=slice(1, 2),
                  space=types.SimpleNamespace(a=1), act=torch.nn.functional.silu)
    write_megatron(tmp_path / "mega", network, "masked", extra=others, activation_func=torch.nn.functional.gelu, started=datetime.datetime(2026, 1, 1), attention_backend=module.Backend.auto)
    monkeypatch.delitem(sys.modules, "megatron.core.enums")
    code, _, err = run(source=tmp_path / "mega", out=tmp_path / "back", tokenizer="bytes")
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))


def test_old_pickles_cut_anywhere(run, tmp_path):
    """Before torch 1.6 files were no archives: wherever one ends too early, that is one line."""
    make_run(tmp_path / "ours", n_layer=1)
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    weights = load_file(tmp_path / "hf/model.safetensors")
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(weights, tmp_path / "hf/pytorch_model.bin", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "hf/pytorch_model.bin").read_bytes()
    for share in range(8):
        (tmp_path / "hf/pytorch_model.bin").write_bytes(whole[: len(whole) * share // 8])
        assert "pytorch_model.bin can't be read" in refused(run, tmp_path, source=tmp_path / "hf", out=tmp_path / "out")
    (tmp_path / "hf/pytorch_model.bin").write_bytes(whole)
    code, _, err = run(source=tmp_path / "hf", out=tmp_path / "back")
    assert code == 0, err
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))


def edit_json(path, **changes):
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}))


def edit_pickle(path, change):
    values = torch.load(path, weights_only=False)
    change(values)
    torch.save(values, path)


HF_LIES = {
    "another architecture": (lambda d: edit_json(d / "config.json", architectures=["GPT2LMHeadModel"]), "architecture GPT2LMHeadModel is not supported"),
    "another activation": (lambda d: edit_json(d / "config.json", hidden_act="gelu"), "hidden_act=gelu"),
    "other positions": (lambda d: edit_json(d / "config.json", rope_scaling=dict(rope_type="yarn", factor=2.0)), "rotary positions of type yarn"),
    "a setting is missing": (lambda d: edit_json(d / "config.json", hidden_size=...), "does not say 'hidden_size'"),
    "partly rotary": (lambda d: edit_json(d / "config.json", partial_rotary_factor=0.5), "partly rotary positions"),
    "a setting is null": (lambda d: edit_json(d / "config.json", num_attention_heads=None), "can't be understood"),
    "half a setting": (lambda d: edit_json(d / "config.json", rope_scaling=dict(rope_type="llama3", factor=8.0)), "can't be understood"),
    "no json": (lambda d: (d / "config.json").write_text("{"), "config.json can't be read"),
    "a tensor is missing": (lambda d: edit_weights(d, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")), "has no model.layers.1.mlp.up_proj.weight"),
    "a tensor is too much": (lambda d: edit_weights(d, lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})), "has a model.layers.0.self_attn.q_proj.bias"),
    "another shape": (lambda d: edit_weights(d, lambda w: w.update({"model.norm.weight": torch.ones(31)})), "model.norm.weight is (31,), and should be (32,)"),
    "integers": (lambda d: edit_weights(d, lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})), "model.norm.weight is torch.int8"),
    "cut short": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), "model.safetensors can't be read"),
    "the head differs": (lambda d: edit_weights(d, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1})), "lm_head.weight differs from model.embed_tokens.weight"),
    "another mask": (lambda d: edit_json(d / "config.json", mask_token_id=256), "its mask has the id 256, tokenizer 'bytes' puts it at 257"),
    "fewer rows than tokens": (lambda d: (edit_json(d / "config.json", vocab_size=200), edit_weights(d, lambda w: w.update({"model.embed_tokens.weight": torch.ones(200, 32)}))), "its embedding has 200 rows"),
    "a mask of text": (lambda d: edit_json(d / "config.json", mask_token_id="<|mask|>"), "mask is said to be '<|mask|>'"),
    "a mask below all": (lambda d: edit_json(d / "config.json", mask_token_id=-1), "mask is said to be -1"),
    "a mask that is true": (lambda d: edit_json(d / "config.json", mask_token_id=True), "mask is said to be True"),
    "uneven heads": (lambda d: edit_json(d / "config.json", num_key_value_heads=3), "contradict each other"),
    "odd heads": (lambda d: edit_json(d / "config.json", head_dim=7), "contradict each other"),
    "a vocabulary of text": (lambda d: edit_json(d / "config.json", vocab_size="384"), "vocab_size=384"),
    "a base of text": (lambda d: edit_json(d / "config.json", rope_theta="abc"), "config.json"),
    "no name of a tokenizer": (lambda d: edit_json(d / "config.json", tokenizer_name=5) or (d / "tokenizer.json").unlink(), "config.json can't be understood"),
    "far too deep": (lambda d: (d / "config.json").write_text("[" * 100000), "config.json can't be read"),
    "far more rows than tokens": (lambda d: (edit_json(d / "config.json", vocab_size=5000), edit_weights(d, lambda w: w.update({"model.embed_tokens.weight": torch.ones(5000, 32)}))), "not the tokenizer it was trained with"),
    "numbers for names": (lambda d: (torch.save({0: torch.ones(3)}, d / "pytorch_model.bin"), (d / "model.safetensors").unlink()), "said to be there, in 0 tensors"),
    "a sparse tensor": (lambda d: (torch.save(load_file(d / "model.safetensors") | {"model.norm.weight": torch.ones(32).to_sparse()}, d / "pytorch_model.bin"), (d / "model.safetensors").unlink()), "is no array of weights"),
    "far too many layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=10**12), "layers and 32 positions are said to be there"),
    "far too many positions": (lambda d: edit_json(d / "config.json", max_position_embeddings=10**12), "1,000,000,000,000 positions are said to be there"),
    "no epsilon": (lambda d: edit_json(d / "config.json", rms_norm_eps=float("nan")), "norm_eps=nan can't be"),
    "no base": (lambda d: edit_json(d / "config.json", rope_theta=-5.0), "rope_base=-5 can't be"),
    "true as text": (lambda d: edit_json(d / "config.json", tie_word_embeddings="false"), "tie_word_embeddings='false' is neither true nor false"),
    "a list": (lambda d: (d / "config.json").write_text("[1]"), "does not say which architecture"),
    "an architecture as text": (lambda d: edit_json(d / "config.json", architectures="DiffLM"), "does not say which architecture"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "has no model.safetensors and no pytorch_model.bin"),
    "an index that lists": (lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=["a"])))), "index.json can't be read"),
    "no tokenizer": (lambda d: edit_json(d / "config.json", tokenizer_name=...) or (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "a file elsewhere": (lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={"a": "../x.safetensors"})))), "which is not in its folder"),
}


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize("lie", HF_LIES)
def test_hugging_face_folders_that_lie(run, tmp_path, lie):
    make_run(tmp_path / "ours")
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    change, said = HF_LIES[lie]
    change(tmp_path / "hf")
    err = refused(run, tmp_path, source=tmp_path / "hf", out=tmp_path / "out")
    assert said in err, err


RANK = "iter_0000042/mp_rank_00/model_optim_rng.pt"
MEGATRON_LIES = {
    "LayerNorm": (dict(normalization="LayerNorm"), None, "normalization=LayerNorm"),
    "experts": (dict(num_experts=8), None, "num_experts=8"),
    "learned positions": (dict(position_embedding_type="learned_absolute"), None, "position_embedding_type=learned_absolute"),
    "partial rotary": (dict(rotary_percent=0.5), None, "rotary positions are partial"),
    "another aim": (dict(model_running_mode="test-forward"), None, "give --objective"),
    "another norm of queries": (dict(qk_l2_norm=True), None, "qk_l2_norm=True"),
    "uneven heads": (dict(group_query_attention=True, num_query_groups=3), None, "contradict each other"),
    "another softmax": (dict(softmax_type="off-by-one"), None, "softmax_type=off-by-one"),
    "a clamped activation": (dict(activation_func_clamp_value=7.0), None, "activation_func_clamp_value=7.0"),
    "another rank's file": ({}, lambda d: torch.save([1], d / "iter_0000042/mp_rank_01/model_optim_rng.pt"), "holds no model"),
    "numbers for names": ({}, lambda d: edit_pickle(d / RANK, lambda v: v.update({0: 1}) or v["model"].update({1: torch.ones(2)}) or v["model"].pop("decoder.final_layernorm.weight")), "has no decoder.final_layernorm.weight, which other ranks have"),
    "an embedding without rows": ({}, lambda d: [edit_pickle(f, lambda v: v["model"].update({"embedding.word_embeddings.weight": torch.tensor(1.0)})) for f in d.glob("*/*/*.pt")], "is no array of weights"),
    "an embedding of one dimension": ({}, lambda d: [edit_pickle(f, lambda v: v["model"].update({"decoder.layers.0.mlp.linear_fc2.weight": torch.ones(8)})) for f in d.glob("*/*/*.pt")], "it can't be a part of a whole"),
    "an iteration beyond numbers": ({}, lambda d: (d / "latest_checkpointed_iteration.txt").write_text("9" * 5000), "holds no iteration"),
    "windows": (dict(window_size=(128, 0)), None, "window_size=(128, 0)"),
    "no number of ranks": (dict(tensor_model_parallel_size="two"), None, "how many ranks"),
    "no heads": (dict(num_attention_heads=0, kv_channels=None), None, "can't be understood"),
    "block-causal attention": (dict(attention_mask_type="block_causal"), None, "give --objective"),
    "no arguments": ({}, lambda d: edit_pickle(d / RANK, lambda v: v.pop("args")), "holds no arguments"),
    "a tensor is missing": ({}, lambda d: edit_pickle(d / RANK, lambda v: v["model"].pop("decoder.layers.1.mlp.linear_fc2.weight")), "has no decoder.layers.1.mlp.linear_fc2.weight, which other ranks have"),
    "a tensor is too much": ({}, lambda d: [edit_pickle(f, lambda v: v["model"].update({"decoder.layers.0.mlp.linear_fc1.bias": torch.ones(64)})) for f in d.glob("*/*/*.pt")], "decoder.layers.0.mlp.linear_fc1.bias"),
    "another shape": ({}, lambda d: [edit_pickle(f, lambda v: v["model"].update({"decoder.final_layernorm.weight": torch.ones(31)})) for f in d.glob("*/*/*.pt")], "decoder.final_layernorm.weight is (31,), and should be (32,)"),
    "norms differ": ({}, lambda d: edit_pickle(d / RANK, lambda v: v["model"]["decoder.final_layernorm.weight"].add_(1)), "decoder.final_layernorm.weight differs between tensor-parallel ranks"),
    "cut short": ({}, lambda d: (d / RANK).write_bytes((d / RANK).read_bytes()[:5000]), "can't be read"),
    "a shard is missing": ({}, lambda d: (d / RANK).unlink(), "the shard of tensor rank 0, pipeline rank 0 is not there"),
    "another mask": (dict(mask_token=300), None, "its mask has the id 300"),
    "the iteration is missing": ({}, lambda d: (d / "latest_checkpointed_iteration.txt").write_text("43"), "iter_0000043"),
}


@pytest.mark.parametrize("lie", MEGATRON_LIES)
def test_megatron_folders_that_lie(run, tmp_path, lie):
    args, change, said = MEGATRON_LIES[lie]
    write_megatron(tmp_path / "mega", make_run(tmp_path / "ours"), "masked", 2, 1, **args)
    if change:
        change(tmp_path / "mega")
    err = refused(run, tmp_path, source=tmp_path / "mega", out=tmp_path / "out", tokenizer="bytes")
    assert said in err, err


def test_distributed_folders_that_lie(run, distributed, tmp_path):
    shutil.copytree(distributed, tmp_path / "mega")
    folder, flags = tmp_path / "mega/iter_0000042", dict(source=tmp_path / "mega", out=tmp_path / "out", tokenizer="bytes")
    whole = {p: p.read_bytes() for p in folder.iterdir()}
    described = pickle.loads(whole[folder / ".metadata"])
    lost = dict(described.storage_data)
    del lost[next(index for index in lost if index.fqn == "embedding.word_embeddings.weight")]
    described.storage_data = lost
    parts = pickle.loads(whole[folder / ".metadata"])
    parts.state_dict_metadata["embedding.word_embeddings.weight"].chunks.pop()
    for name, content, said in (("__1_0.distcp", whole[folder / "__1_0.distcp"][:3000], "can't be read"), (".metadata", whole[folder / ".metadata"][:2000], ".metadata can't be read"),
                                (".metadata", pickle.dumps(described), "embedding.word_embeddings.weight"), (".metadata", pickle.dumps(parts), "values of embedding.word_embeddings.weight are there"), ("common.pt", b"", "common.pt can't be read")):
        (folder / name).write_bytes(content)
        assert said in refused(run, tmp_path, **flags), name
        (folder / name).write_bytes(whole[folder / name])
    (folder / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in refused(run, tmp_path, **flags)


def test_what_else_is_refused(run, tmp_path):
    network = make_run(tmp_path / "ours")
    make_run(tmp_path / "uniform", "uniform")
    (tmp_path / "empty").mkdir()
    write_megatron(tmp_path / "mega", network, "masked")
    write_megatron(tmp_path / "ar", make_run(tmp_path / "ours_ar", "ar"), "ar", vocab_size=257)
    larger = tokenizer_file(tmp_path / "t.json", "<|other|>")
    make_run(tmp_path / "larger", "ar", tokenizer=larger)
    assert run(source=tmp_path / "larger", out=tmp_path / "hf")[0] == 0
    make_run(tmp_path / "unclear")
    record = json.loads((tmp_path / "unclear/step_00000007/checkpoint.json").read_text())
    del record["settings"]["objective"], record["record_sha256"]
    (tmp_path / "unclear/step_00000007/checkpoint.json").write_text(json.dumps(dict(record, record_sha256=checkpoint.record_digest(record))))
    for flags, said in ((dict(source=tmp_path / "ours", out=tmp_path / "mega"), "exists; nothing is overwritten"), (dict(source=tmp_path / "nowhere", out=tmp_path / "x"), "no such folder"),
                        (dict(source=tmp_path / "empty", out=tmp_path / "x"), "no checkpoint that is known"), (dict(source=tmp_path / "mega", out=tmp_path / "x"), "give --tokenizer=gpt2"),
                        (dict(source=tmp_path / "ours", out=tmp_path / "x", to="ours"), "is ours already"), (dict(source=tmp_path / "uniform", out=tmp_path / "x"), "use sample.py"),
                        (dict(source=tmp_path / "ours", out=tmp_path / "x", to="megatron", tensor_parallel=3), "4 is no multiple of 3"), (dict(source=tmp_path / "ours"), "give --out"),
                        (dict(source=tmp_path / "ours", out=tmp_path / "x", tokenizer="gpt2", objective="ar"), "--tokenizer, --objective is for others'"),
                        (dict(source=tmp_path / "unclear", out=tmp_path / "x"), "can't be understood"),
                        (dict(source=tmp_path / "ours", out=tmp_path / "x", tensor_parallel=2), "are for --to=megatron"), (dict(source=tmp_path / "ours", out=tmp_path / "ours/x"), "lies within the source"),
                        (dict(source=tmp_path / "ours/step_00000007/model.safetensors", out=tmp_path / "x"), "a file; name its folder"),
                        (dict(source=tmp_path / "ar", out=tmp_path / "x", tokenizer="bytes", mask_id=5), "has no meaning for an AR model"),
                        (dict(source=tmp_path / "ar", out=tmp_path / "x", tokenizer=larger), "its vocabulary has 257 tokens"),
                        (dict(source=tmp_path / "hf", out=tmp_path / "x", tokenizer="bytes"), "has a tokenizer of 258 tokens")):
        assert said in refused(run, tmp_path, **flags), flags


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_ended_early_it_leaves_nothing(tmp_path, signum):
    """Neither what is half written, nor folders that were made for it."""
    make_run(tmp_path / "ours", n_layer=8, d_model=512, d_ff=2048, n_head=4, head_dim=128)
    code = "import sys, time; sys.argv[0] = 'convert.py'; import tensors; old = tensors.Lazy.nbytes.fget; tensors.Lazy.nbytes = property(lambda t: time.sleep(0.05) or old(t)); import convert; convert.main()"
    process = subprocess.Popen([sys.executable, "-c", code, f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'new/folders/hf'}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("new/folders/.hf.*")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(30) == 130
    assert "nothing is written" in (err := process.stderr.read()) and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_verify_refuses_what_differs(run, monkeypatch, tmp_path):
    """A conversion that mixes up gate and up would be found out, and leaves nothing."""
    write_megatron(tmp_path / "mega", make_run(tmp_path / "ours"), "masked")
    honest = convert.megatron.to_ours

    def swapped(config, found):
        out = honest(config, found)
        out["blocks.1.mlp.gate_proj.weight"], out["blocks.1.mlp.up_proj.weight"] = out["blocks.1.mlp.up_proj.weight"], out["blocks.1.mlp.gate_proj.weight"]
        return out

    monkeypatch.setattr(convert.megatron, "to_ours", swapped)
    before = set(tmp_path.iterdir())
    code, out, err = run(source=tmp_path / "mega", out=tmp_path / "out", tokenizer="bytes", verify=True)
    assert code == 2 and "does not compute what the source computes" in err and set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtype", ("source", "bfloat16"))
@pytest.mark.parametrize("factor", (1.01, float("nan")))
def test_verify_looks_at_what_was_written(run, monkeypatch, tmp_path, dtype, factor):
    """A file that holds something else is found out, too."""
    make_run(tmp_path / "ours")
    honest, before = convert.tensors.write_safetensors, set(tmp_path.iterdir())
    monkeypatch.setattr(convert.tensors, "write_safetensors", lambda file, weights, alive: honest(
        file, {name: value._replace(read=lambda value=value: value.read() * factor, pieces=None) if name == "model.norm.weight" else value for name, value in weights.items()}, alive))
    code, out, err = run(source=tmp_path / "ours", out=tmp_path / "out", verify=True, dtype=dtype)
    assert code == 2 and "does not compute what the source computes" in err and set(tmp_path.iterdir()) == before


def test_values_that_a_dtype_cant_hold(run, tmp_path):
    network = make_run(tmp_path / "ours")
    file = tmp_path / "ours/step_00000007/model.safetensors"
    save_file(network.state_dict() | {"norm.weight": torch.full((32,), 1e7)}, file)
    record = json.loads((file.parent / "checkpoint.json").read_text())
    del record["record_sha256"]
    record["sha256"] = {file.name: checkpoint.file_digest(file)}
    (file.parent / "checkpoint.json").write_text(json.dumps(dict(record, record_sha256=checkpoint.record_digest(record))))
    said = refused(run, tmp_path, source=tmp_path / "ours", out=tmp_path / "x", dtype="float16")
    assert "norm.weight: float16 can't hold values as large as 1e+07" in said
    assert run(source=tmp_path / "ours", out=tmp_path / "x", dtype="bfloat16", verify=True)[0] == 0
    save_file(load_file(tmp_path / "x/model.safetensors") | {"model.norm.weight": torch.full((32,), float("nan"))}, tmp_path / "x/model.safetensors")
    assert "does not compute" in run(source=tmp_path / "x", out=tmp_path / "y", verify=True)[2]


def test_weights_of_several_dtypes(run, tmp_path):
    """Matrices in bfloat16, norms in float32: as they are, or made one dtype, which --verify knows apart from an error."""
    network = make_run(tmp_path / "ours")
    write_megatron(tmp_path / "mega", network, "masked")
    edit_pickle(tmp_path / "mega" / RANK, lambda v: v.update(model={name: w.bfloat16() if isinstance(w, torch.Tensor) and w.dim() > 1 else w for name, w in v["model"].items()}))
    for dtype in ("source", "bfloat16", "float32"):
        code, _, err = run(source=tmp_path / "mega", out=tmp_path / dtype, tokenizer="bytes", dtype=dtype, verify=True)
        assert code == 0, err
    assert {w.dtype for w in weights_of(tmp_path / "source").values()} == {torch.bfloat16, torch.float32}
    assert {w.dtype for w in weights_of(tmp_path / "bfloat16").values()} == {torch.bfloat16}


def test_qk_norm_and_biases_together(run, tmp_path):
    """No stock architecture has both, a diffusion folder of ours may; its check goes by Qwen3's own."""
    make_run(tmp_path / "ours", qk_norm=True, qkv_bias=True)
    code, out, err = run(source=tmp_path / "ours", out=tmp_path / "hf", verify=True)
    assert code == 0 and "logits differ by at most" in out, err
    assert run(source=tmp_path / "hf", out=tmp_path / "back", verify=True)[0] == 0
    same(weights_of(tmp_path / "back"), weights_of(tmp_path / "ours"))


def test_a_converted_run_is_not_resumed(run, tmp_path, monkeypatch, capsys, corpus):
    from conftest import call_main

    network = make_run(tmp_path / "ours")
    write_megatron(tmp_path / "mega", network, "masked")
    assert run(source=tmp_path / "mega", out=tmp_path / "back", tokenizer="bytes")[0] == 0
    c = network.config
    with pytest.raises(SystemExit):
        call_main(monkeypatch, f"--run_dir={tmp_path / 'back'}", f"--corpus={corpus}", "--resume=yes", "--steps=50", f"--n_layer={c.n_layer}", f"--n_head={c.n_head}", f"--d_model={c.d_model}",
                  f"--d_ff={c.d_ff}", f"--seq_len={c.seq_len}", "--batch_size=4", "--device=cpu")
    assert "no optimizer state; begin another run with --init_from" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- LLaDA and Dream


def llada_logits(w, ids, n_layers, n_heads, theta, eps):
    """LLaDA's network, written for this test from its published description: names, gated MLP, full attention, half rotation."""
    def rms(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    x = w["model.transformer.wte.weight"][ids]
    B, L, D = x.shape
    d = D // n_heads
    angle = torch.arange(L)[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    cos, sin = (f(torch.cat((angle, angle), -1))[:, None] for f in (torch.cos, torch.sin))
    for i in range(n_layers):
        get = lambda name: w[f"model.transformer.blocks.{i}.{name}.weight"]  # noqa: B023, E731
        h = rms(x, get("attn_norm"))
        q, k, v = ((h @ get(f"{name}_proj").T).view(B, L, n_heads, d) for name in "qkv")
        q, k = (t * cos + torch.cat((-t[..., d // 2 :], t[..., : d // 2]), -1) * sin for t in (q, k))
        attention = (torch.einsum("bqhd,bkhd->bhqk", q, k) / d**0.5).softmax(-1)
        x = x + torch.einsum("bhqk,bkhd->bqhd", attention, v).reshape(B, L, D) @ get("attn_out").T
        h = rms(x, get("ff_norm"))
        x = x + (torch.nn.functional.silu(h @ get("ff_proj").T) * (h @ get("up_proj").T)) @ get("ff_out").T
    return rms(x, w["model.transformer.ln_f.weight"]) @ w["model.transformer.ff_out.weight"].T


def tokenizer_file(path, mask, above=()):
    """A byte-level tokenizer.json: 256 letters, a separator, then the mask, then special tokens with higher ids."""
    layout, _ = huggingface.layout_of(tokenizers.load_tokenizer("bytes"))
    specials = ["<|endoftext|>", mask, *above]
    layout["added_tokens"] = [dict(id=256 + i) | huggingface.special(name) for i, name in enumerate(specials)]
    path.write_text(json.dumps(layout))
    return path


def test_another_name_for_a_tokenizer_that_cant_be_read(run, tmp_path):
    """Which token ends a document is not to be seen in the folder's own file: with --tokenizer and --eos it is said."""
    layout, _ = huggingface.layout_of(tokenizers.load_tokenizer("bytes"))
    layout["added_tokens"] = [dict(id=256) | huggingface.special("<over>")]
    (tmp_path / "t.json").write_text(json.dumps(layout))
    make_run(tmp_path / "ours", "ar")
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    edit_json(tmp_path / "hf/config.json", tokenizer_name=...)
    shutil.copyfile(tmp_path / "t.json", tmp_path / "hf/tokenizer.json")
    assert "which token ends a document?" in refused(run, tmp_path, source=tmp_path / "hf", out=tmp_path / "back")
    code, _, err = run(source=tmp_path / "hf", out=tmp_path / "back", tokenizer=tmp_path / "t.json", eos="<over>")
    assert code == 0, err
    edit_json(tmp_path / "hf/config.json", tokenizer_name=5)
    assert run(source=tmp_path / "hf", out=tmp_path / "again", tokenizer="bytes")[0] == 0


def test_a_mask_among_the_tokens(run, remote_code, tmp_path):
    """A special token that is called like a mask, but comes before the end of the text, is none; ours gets a name that is free."""
    layout, _ = huggingface.layout_of(tokenizers.load_tokenizer("bytes"))
    layout["added_tokens"] = [dict(id=256) | huggingface.special("<|mask|>"), dict(id=257) | huggingface.special("<|endoftext|>")]
    (tmp_path / "t.json").write_text(json.dumps(layout))
    make_run(tmp_path / "ours", tokenizer=tmp_path / "t.json")
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.mask_token_id == json.loads((tmp_path / "hf/config.json").read_text())["mask_token_id"] == 258
    file = tokenizer_file(tmp_path / "u.json", "<|mask|>", ["<tool>"])
    layout = json.loads(file.read_text())
    layout["added_tokens"][-1]["special"] = False  # it is text, after the mask
    file.write_text(json.dumps(layout))
    tokens = tokenizers.load_tokenizer(str(file))
    assert tokens.n_vocab == tokens.mask_id == 259 and max(tokens.encode("a<tool>b")) < tokens.n_vocab


def test_llada(run, tmp_path):
    folder, generator = tmp_path / "llada", torch.Generator().manual_seed(0)
    folder.mkdir()
    tokenizer_file(folder / "tokenizer.json", "<|mdm_mask|>", ["<|eot_id|>"])
    config = dict(architectures=["LLaDAModelLM"], model_type="llada", d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, mlp_hidden_size=48, embedding_size=320, vocab_size=320,
                  max_sequence_length=64, rope_theta=500000.0, rms_norm_eps=1e-5, weight_tying=False, mask_token_id=257, block_type="llama", layer_norm_type="rms",
                  activation_type="silu", include_bias=False, include_qkv_bias=False, attention_layer_norm=False, alibi=False, rope=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"attn_norm": (32,), "ff_norm": (32,), "q_proj": (32, 32), "k_proj": (32, 32), "v_proj": (32, 32), "attn_out": (32, 32), "ff_proj": (48, 32), "up_proj": (48, 32), "ff_out": (32, 48)}
    weights = {f"model.transformer.blocks.{i}.{name}.weight": torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1) for i in range(2) for name, shape in shapes.items()}
    weights |= {f"model.transformer.{name}.weight": torch.randn(shape, generator=generator) * 0.3 for name, shape in dict(wte=(320, 32), ln_f=(32,), ff_out=(320, 32)).items()}
    save_file(weights, folder / "model.safetensors")
    code, _, err = run(source=folder, out=tmp_path / "ours", verify=True)
    assert code == 0, err
    record = checkpoint.read_checkpoint(tmp_path / "ours/step_00000000")
    assert (record["model"]["n_vocab"], record["model"]["mask_id"], record["settings"]["objective"]) == (257, 257, "masked")
    ours, ids = checkpoint.load_model(tmp_path / "ours/step_00000000", record).eval(), torch.randint(258, (2, 40), generator=generator)
    with torch.no_grad():
        a, b = llada_logits(weights, ids, 2, 4, 500000.0, 1e-5)[..., :257], ours.logits(ours(ids))
    assert (a - b).abs().max() < 1e-4 * a.abs().max()
    tokens = tokenizers.load_tokenizer(str(folder / "tokenizer.json"))
    assert (tokens.n_vocab, tokens.mask_id, len(tokens.token_bytes())) == (257, 257, 257) and tokens.decode(tokens.encode("Ab ü")) == "Ab ü"
    (folder / "config.json").write_text(json.dumps(config | dict(alibi=True)))
    assert "alibi=True" in refused(run, tmp_path, source=folder, out=tmp_path / "x")


def test_dream_is_shifted(run, tmp_path):
    """Qwen2.5's network, bidirectional, each position predicted from the one before. Its tokenizer is in files of old, of which transformers makes ours."""
    config = transformers.Qwen2Config(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                      tie_word_embeddings=False, attn_implementation="eager")
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "dream")
    about = json.loads((tmp_path / "dream/config.json").read_text())
    (tmp_path / "dream/config.json").write_text(json.dumps(about | dict(architectures=["DreamModel"], model_type="Dream", mask_token_id=257)))
    layout, _ = huggingface.layout_of(tokenizers.load_tokenizer("bytes"))
    (tmp_path / "dream/vocab.json").write_text(json.dumps(layout["model"]["vocab"]))
    (tmp_path / "dream/merges.txt").write_text("#version: 0.2\n")
    specials = {"256": huggingface.special("<|endoftext|>"), "257": huggingface.special("<|mask|>")}
    (tmp_path / "dream/tokenizer_config.json").write_text(json.dumps(dict(added_tokens_decoder=specials, eos_token="<|endoftext|>", mask_token="<|mask|>", tokenizer_class="DreamTokenizer")))
    code, _, err = run(source=tmp_path / "dream", out=tmp_path / "ours")
    assert code == 2 and "of its vocab.json: docs/checkpoints.md" in err
    transformers.Qwen2TokenizerFast.from_pretrained(tmp_path / "dream").save_pretrained(tmp_path / "dream")  # as the docs say
    code, _, err = run(source=tmp_path / "dream", out=tmp_path / "ours", verify=True)
    assert code == 0, err
    record = checkpoint.read_checkpoint(tmp_path / "ours/step_00000000")
    ours, ids = checkpoint.load_model(tmp_path / "ours/step_00000000", record).eval(), torch.randint(257, (2, 20))
    with torch.no_grad():
        full = torch.zeros(2, 1, 20, 20)
        a, b = theirs(ids, attention_mask=full).logits[..., :257], ours.logits(ours(ids))
    assert record["model"]["shift"] and (a[:, :-1] - b[:, 1:]).abs().max() < 1e-4 * a.abs().max()


# ------------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", ("bytes", "gpt2", "file"))
def test_the_exported_tokenizer_gives_the_same_ids(run, remote_code, tmp_path, name):
    if name == "gpt2":
        try:
            tokenizers.load_tokenizer("gpt2")
        except ValueError:
            pytest.skip("GPT-2's files are not here")
    which = tokenizer_file(tmp_path / "t.json", "<|other|>") if name == "file" else name
    make_run(tmp_path / "ours", tokenizer=which)
    assert run(source=tmp_path / "ours", out=tmp_path / "hf")[0] == 0
    ours, theirs = tokenizers.load_tokenizer(str(which)), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("def f(x):\n    return x ** 2  # it's 1234 — ü\t\n\n", "I'll  go   there's\r\n", "日本語 🦘", " ", "a<|endoftext|b"):
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids and theirs.decode(ids) == text
    assert theirs.mask_token_id == ours.mask_id and theirs.eos_token_id == ours.eos_id and len(theirs) == ours.mask_id + 1
    assert run(source=tmp_path / "hf", out=tmp_path / "back")[0] == 0
    assert checkpoint.read_checkpoint(tmp_path / "back/step_00000000")["corpus"]["tokenizer"] == ours.name


def measured(folder, source, out, room, *flags):
    """Seconds of a conversion, whose peak of memory must be below a GiB and `room`."""
    code = "import sys; sys.argv[0] = 'convert.py'; import convert; convert.main(); print([l.split()[1] for l in open('/proc/self/status') if 'VmHWM' in l][0])"  # kB
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, f"--source={folder / source}", f"--out={folder / out}", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, peak = time.perf_counter() - start, 1024 * int(done.stdout.split()[-1])
    print(f"{source} → {out}: {seconds:.0f} s, {peak / 2**30:.2f} GiB")
    assert peak < room + 2**30
    return seconds


@pytest.mark.slow
def test_one_large_tensor(distributed, tmp_path):
    """An embedding of a GiB, by every way: no more than it and another GiB in memory. Writing Megatron's format, a rank's file besides."""
    import torch.distributed.checkpoint as dcp

    d, rows = 2048, 2**18 + 64  # not a multiple of what we pad to
    network = make_run(tmp_path / "small", n_layer=1, d_model=d, n_head=4, head_dim=128, d_ff=64)
    c = dataclasses.replace(network.config, n_vocab=rows - 1, mask_id=rows - 1)
    embedding = torch.empty(rows, d, dtype=torch.bfloat16).normal_(generator=torch.Generator().manual_seed(0))
    whole = {name: w.bfloat16() for name, w in megatron_tensors(network).items()} | {"embedding.word_embeddings.weight": embedding}
    args = megatron_args(c, "masked", padded_vocab_size=rows, vocab_size=rows)
    (tmp_path / "mega/iter_0000042").mkdir(parents=True)
    dcp.save(whole, checkpoint_id=tmp_path / "mega/iter_0000042", no_dist=True)
    torch.save(dict(args=args, iteration=42), tmp_path / "mega/iter_0000042/common.pt")
    for rank in range(2):
        place = tmp_path / f"torch/iter_0000042/mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        args.tensor_model_parallel_size = 2
        torch.save(dict(args=args, iteration=42, model={name: tp_shard(name, w, rank, 2, c) for name, w in whole.items()}), place / "model_optim_rng.pt")
    for folder in ("mega", "torch"):
        (tmp_path / folder / "latest_checkpointed_iteration.txt").write_text("42")
    largest = embedding.nbytes
    del whole
    for source, out, room in (("mega", "a", largest), ("torch", "b", largest), ("a", "hf", largest), ("hf", "c", largest)):
        measured(tmp_path, source, out, room, *([] if source == "a" else ["--tokenizer=none"]))
    for out in "abc":
        assert torch.equal(load_file(next(tmp_path.glob(f"{out}/*/model.safetensors")))["embed.weight"][:rows], embedding)
    measured(tmp_path, "a", "again", 2 * largest, "--to=megatron")
    assert torch.equal(torch.load(tmp_path / "again" / RANK, mmap=True, weights_only=False)["model"]["embedding.word_embeddings.weight"][:rows], embedding)


@pytest.mark.slow
def test_a_network_of_1_7b_in_minutes_and_little_memory(tmp_path):
    """torch_dist, bfloat16, random weights → ours within 3 minutes; from there to every format and back. One tensor at a time."""
    import torch.distributed.checkpoint as dcp

    from interop import megatron

    c, place = ModelConfig(28, 16, 16, 128, 2048, 6144, 50277, 50277, 2048, False, tied=False), tmp_path / "mega/iter_0000042"
    place.mkdir(parents=True)
    generator, whole, stacked = torch.Generator().manual_seed(0), {}, {}

    def values(*shape):
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)

    for name, shape in megatron.names(c).items():
        if name.startswith("decoder.layers."):
            stacked[name.split(".", 3)[3]] = shape
        else:
            whole[name] = values(*(50304 if n is None else n for n in shape))
    largest = max(w.numel() * 2 for w in whole.values())
    layers = {f"decoder.layers.{name}": values(28, *shape) for name, shape in stacked.items()}
    dcp.save(whole | layers, checkpoint_id=place, no_dist=True)
    torch.save(dict(args=megatron_args(c, "masked", padded_vocab_size=50304), iteration=42), place / "common.pt")
    (tmp_path / "mega/latest_checkpointed_iteration.txt").write_text("42")
    last = layers["decoder.layers.mlp.linear_fc2.weight"][27].clone(), whole["output_layer.weight"][:50278].clone()
    del whole, layers

    assert measured(tmp_path, "mega", "ours", largest, "--tokenizer=none") < 180
    ours = {name: file for file in (tmp_path / "ours").glob("step_*/*.safetensors") for name in load_file(file)}
    assert torch.equal(load_file(ours["blocks.27.mlp.down_proj.weight"])["blocks.27.mlp.down_proj.weight"], last[0])
    assert torch.equal(load_file(ours["lm_head.weight"])["lm_head.weight"][:50278], last[1])
    measured(tmp_path, "ours", "hf", largest)
    measured(tmp_path, "hf", "again", largest, "--tokenizer=none")
    same(weights_of(tmp_path / "again"), weights_of(tmp_path / "ours"))
    measured(tmp_path, "ours", "shards", largest + 3.5e9 / 4, "--to=megatron", "--tensor_parallel=4")  # a rank's share is held, too
