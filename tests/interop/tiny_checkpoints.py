"""Tiny checkpoints of every format, written without the converter; and the converter, in this process."""

import argparse
import contextlib
import io
import json
import multiprocessing
import pickle
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import save_torch_dist
import torch
from safetensors.torch import load_file, save_file
from test_model import build

import convert
from corpus import tokenizers
from corpus.files import sha256_of
from interop import tokenizer_files
from training import checkpoint

# a network of Megatron's shapes: {name: settings of ModelConfig}
SHAPES = dict(
    tied_mha={}, untied_gqa=dict(tied=False, n_kv_head=4, n_head=8, head_dim=4),
    biased=dict(qk_norm=False, qkv_bias=True), wide=dict(head_dim=16, rope_base=5000.0))


# ------------------------------------------------------------------------------------------------ the command


def run_convert(**flags):
    """convert.main() in this process: (exit code, stdout, stderr)."""
    argv = ["convert.py", *(f"--{name}={value}" for name, value in flags.items())]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with mock.patch.object(sys, "argv", argv):
                convert.main()
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def convert_ok(source, out, **flags):
    """A conversion that succeeds; returns stdout."""
    code, text, err = run_convert(source=source, out=out, **flags)
    assert code == 0, err
    return text


def refusal(folder, **flags):
    """The one line with which a conversion is refused; it leaves nothing behind in `folder`."""
    before = set(folder.iterdir())
    code, _, err = run_convert(**flags)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert set(folder.iterdir()) == before
    return err


# ------------------------------------------------------------------------------------------------------- ours


def make_run(folder, objective="masked", tokenizer="bytes", dtype=torch.float32, **shape):
    """Write a run of ours with random weights; returns its network."""
    tokens = tokenizers.load_tokenizer(str(tokenizer))
    network = build(n_vocab=tokens.n_vocab, mask_id=tokens.mask_id, causal=objective == "ar",
                    timed=objective == "uniform", **dict(seq_len=32) | shape)
    place = Path(folder) / "step_00000007"
    place.mkdir(parents=True)
    if hasattr(tokens, "path"):
        (Path(folder) / "tokenizer.json").write_bytes(tokens.path.read_bytes())
    weights = {name: value.to(dtype).contiguous() for name, value in network.state_dict().items()}
    save_file(weights, place / "model.safetensors")
    settings = dict(run_dir=str(folder), objective=objective, seq_len=network.config.seq_len, loss="elbo",
                    schedule="linear", corpus="")
    corpus = dict(tokenizer=tokens.name, n_vocab=tokens.n_vocab, mask_id=tokens.mask_id, eos_id=tokens.eos_id,
                  train_sha256="a", val_sha256="b")
    write_record(place, dict(settings=settings, model=asdict(network.config), corpus=corpus, step=7))
    return network


def write_record(place, record):
    """checkpoint.json of a folder, with the digests of the weights that lie there and its own."""
    digests = {file.name: sha256_of(file) for file in place.glob("*.safetensors")}
    record = json.loads(json.dumps(record | dict(sha256=digests)))
    record["record_sha256"] = checkpoint.record_digest(record)
    (place / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")


def edit_record(place, change):
    """Change a checkpoint's record (and renew its digests)."""
    record = json.loads((place / "checkpoint.json").read_text(encoding="utf-8"))
    del record["record_sha256"]
    change(record)
    write_record(place, record)


def weights_of(run):
    """{name: tensor} of a run's checkpoint."""
    files = sorted(Path(run).glob("step_*/model*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_same_weights(a, b, n_text=None):
    """Two runs have the same weights bit for bit; of the vocabulary's only the first `n_text` rows count."""
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    for name in a:
        rows = slice(n_text) if n_text and name in ("embed.weight", "lm_head.weight") else slice(None)
        assert a[name].dtype == b[name].dtype and torch.equal(a[name][rows], b[name][rows]), name


def write_tokenizer_file(path, mask, above=()):
    """A byte-level tokenizer.json: 256 letters, a separator, the mask, special tokens with higher ids."""
    return write_specials(path, ["<|endoftext|>", mask, *above])


def write_specials(path, specials):
    """A byte-level tokenizer.json with special tokens from id 256 on."""
    layout, _ = tokenizer_files.tokenizer_json(tokenizers.load_tokenizer("bytes"))
    layout["added_tokens"] = [dict(id=256 + i) | tokenizer_files.special_token(text)
                              for i, text in enumerate(specials)]
    path.write_text(json.dumps(layout), encoding="utf-8")
    return path


# --------------------------------------------------------------------------------------------------- Megatron


def megatron_args(c, objective, tp=1, pp=1, **others):
    """The arguments as Megatron's own parser would leave them, with some that nobody needs."""
    is_grouped = c.n_kv_head < c.n_head
    return argparse.Namespace(**dict(
        num_layers=c.n_layer, hidden_size=c.d_model, num_attention_heads=c.n_head, kv_channels=c.head_dim,
        ffn_hidden_size=c.d_ff, swiglu=True, group_query_attention=is_grouped,
        num_query_groups=c.n_kv_head if is_grouped else 1, seq_length=c.seq_len,
        max_position_embeddings=c.seq_len, normalization="RMSNorm", norm_epsilon=c.norm_eps,
        rotary_base=int(c.rope_base), rotary_percent=1.0, position_embedding_type="rope",
        add_bias_linear=False, add_qkv_bias=c.qkv_bias, qk_layernorm=c.qk_norm,
        untie_embeddings_and_output_weights=not c.tied, padded_vocab_size=512, vocab_size=c.mask_id + 12,
        mask_token=c.mask_id, model_running_mode="vanilla" if objective == "ar" else "difflm-noshift",
        attention_mask_type="causal_bottom_right" if objective == "ar" else "no_mask",
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, params_dtype=torch.bfloat16,
        num_experts=None, lr=2e-4) | others)


def megatron_tensors(network, n_rows=512):
    """Whole tensors in Megatron's layout, written row by row from its published description."""
    c, ours, tensors = network.config, network.state_dict(), {}

    def pad(w):
        return torch.cat([w, torch.full((n_rows - len(w), w.shape[1]), 0.5)])

    tensors["embedding.word_embeddings.weight"] = pad(ours["embed.weight"])
    for i in range(c.n_layer):
        block, layer = f"blocks.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias") if c.qkv_bias else ("weight",):
            parts = [ours[f"{block}attn.{x}_proj.{kind}"] for x in "qkv"]
            tensors[layer + f"self_attention.linear_qkv.{kind}"] = fuse_heads(c, *parts)
        tensors[layer + "self_attention.linear_qkv.layer_norm_weight"] = ours[block + "attn_norm.weight"]
        if c.qk_norm:
            tensors[layer + "self_attention.q_layernorm.weight"] = ours[block + "attn.q_norm.weight"]
            tensors[layer + "self_attention.k_layernorm.weight"] = ours[block + "attn.k_norm.weight"]
        tensors[layer + "self_attention.linear_proj.weight"] = ours[block + "attn.o_proj.weight"]
        tensors[layer + "mlp.linear_fc1.layer_norm_weight"] = ours[block + "mlp_norm.weight"]
        gate, up = ours[block + "mlp.gate_proj.weight"], ours[block + "mlp.up_proj.weight"]
        tensors[layer + "mlp.linear_fc1.weight"] = torch.cat([gate, up])
        tensors[layer + "mlp.linear_fc2.weight"] = ours[block + "mlp.down_proj.weight"]
    tensors["decoder.final_layernorm.weight"] = ours["norm.weight"]
    if not c.tied:
        tensors["output_layer.weight"] = pad(ours["lm_head.weight"])
    return tensors


def fuse_heads(c, q, k, v):
    """The rows of each group of heads: those of its queries, of its key, of its value."""
    per_group, d, rows = c.n_head // c.n_kv_head, c.head_dim, []
    for group in range(c.n_kv_head):
        for head in range(per_group):
            rows += [q[(group * per_group + head) * d + r] for r in range(d)]
        rows += [k[group * d + r] for r in range(d)]
        rows += [v[group * d + r] for r in range(d)]
    return torch.stack(rows)


def tp_shard(name, w, rank, tp, c):
    """The part of a whole tensor that tensor-parallel rank `rank` holds."""
    by_rows = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
    if name.endswith(by_rows):
        n = len(w) // tp
        return w[rank * n : (rank + 1) * n].clone()
    if name.endswith("linear_fc1.weight"):
        n = c.d_ff // tp
        return torch.cat([w[rank * n : (rank + 1) * n], w[c.d_ff + rank * n : c.d_ff + (rank + 1) * n]])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        n = w.shape[1] // tp
        return w[:, rank * n : (rank + 1) * n].clone()
    return w.clone()


def write_megatron(folder, network, objective, tp=1, pp=1, extra=None, n_rows=512, **args):
    """A run in `torch` format, with optimizer state and the rest of what lies in such files."""
    c, whole = network.config, megatron_tensors(network, n_rows)
    layers_per_stage = c.n_layer // pp
    for p in range(pp):
        for t in range(tp):
            model = {}
            for name, w in whole.items():
                stage, local_name = (0 if name.startswith("embedding") else pp - 1), name
                if name.startswith("decoder.layers."):
                    layer = int(name.split(".")[2])
                    stage = layer // layers_per_stage
                    local_name = name.replace(f"layers.{layer}.", f"layers.{layer % layers_per_stage}.", 1)
                if stage == p:
                    model[local_name] = tp_shard(name, w, t, tp, c)
            if c.tied and pp > 1 and p == pp - 1:
                name = "embedding.word_embeddings.weight"
                model["output_layer.weight"] = tp_shard(name, whole[name], t, tp, c)
            model["decoder.layers.0.mlp.linear_fc1._extra_state"] = None
            rank = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pp > 1 else "")
            place = Path(folder) / "iter_0000042" / rank
            place.mkdir(parents=True)
            optimizer = dict(state={0: dict(exp_avg=torch.ones(1000))}, param_groups=[dict(lr=0.1)])
            contents = dict(args=megatron_args(c, objective, tp, pp, **args), checkpoint_version=3.0,
                            iteration=42, model=model, optimizer=optimizer)
            torch.save(contents | (extra or {}), place / "model_optim_rng.pt")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("42", encoding="utf-8")


def write_distributed(folder, network, objective, ranks=2, stacked=True, core="0.8", n_rows=512, **args):
    """A run in `torch_dist` format, its tensors divided among the files of so many ranks.

    core: the version of Megatron's whose layout it is. Since 0.11 .metadata holds what each rank was to
    write; since 0.19 the common state is an object among the chunks, a list of one.
    """
    c, whole, place = network.config, megatron_tensors(network, n_rows), Path(folder) / "iter_0000042"
    place.mkdir(parents=True)
    if stacked:
        layers = {name.split(".", 3)[3] for name in whole if name.startswith("decoder.layers.")}
        stacks = {f"decoder.layers.{name}": torch.stack(
            [whole[f"decoder.layers.{i}.{name}"] for i in range(c.n_layer)]) for name in sorted(layers)}
        whole = {name: w for name, w in whole.items() if not name.startswith("decoder.layers.")} | stacks
    moments = {f"optimizer.state.exp_avg.{name}": torch.ones_like(w) for name, w in whole.items()}
    others = ("chained_0.optimizer.state.exp_avg", "rerun_state_machine_state", "opt_param_scheduler")
    states = {f"{other}.{name}": torch.ones(4) for other in others for name in ("decoder.x", "y")}
    states["rng_state/shard_0"] = torch.ones(8, dtype=torch.uint8)
    # processes that are forked from a server: torch is imported once for all of them
    multiprocessing.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.tensor"])
    contents = dict(args=megatron_args(c, objective, **args), iteration=42, checkpoint_version=3.0)
    objects = {"common_state/shard_0_1": [contents]} if core == "0.19" else {}
    args_of_rank = ranks, str(place), whole | moments | states, objects, core != "0.8", place.parent / "store"
    torch.multiprocessing.start_processes(
        save_torch_dist.save_rank, args_of_rank, nprocs=ranks, start_method="forkserver")
    if not objects:
        torch.save(contents, place / "common.pt")
    backend = dict(sharded_backend="torch_dist", sharded_backend_version=1)
    (place / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text("42", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- changes


def replace_chunk(iteration, name, content):
    """Put what torch.save makes of `content` in the place of a tensor's first chunk (`torch_dist`)."""
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    place = next(place for index, place in metadata.storage_data.items() if index.fqn == name)
    path = iteration / place.relative_path
    torch.save(content, iteration / "chunk")
    before, chunk = path.read_bytes(), (iteration / "chunk").read_bytes()
    (iteration / "chunk").unlink()
    path.write_bytes(before + chunk)
    place.offset, place.length = len(before), len(chunk)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


def edit_json(path, **changes):
    """Change values of a JSON file; `...` removes one."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(
        json.dumps({name: value for name, value in values.items() if value is not ...}), encoding="utf-8"
    )


def edit_pickle(path, change):
    """Change the contents of a file of torch's in place."""
    values = torch.load(path, weights_only=False)
    change(values)
    torch.save(values, path)


def edit_weights(folder, change):
    """Change the tensors of a Hugging Face folder in place."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
