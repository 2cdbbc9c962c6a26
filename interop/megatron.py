"""Megatron's checkpoints, as the reference backend writes them (SPEC §11): read with torch alone, and written.

    run/latest_checkpointed_iteration.txt
    run/iter_0000100/mp_rank_00[_000]/model_optim_rng.pt    `torch`: one file per tensor- and pipeline-parallel rank
    run/iter_0000100/{.metadata,common.pt,__0_0.distcp,…}   `torch_dist`: chunks of whole tensors, layers stacked

Both become {name: Lazy} of whole tensors under the names of the `torch` format, layers numbered over the whole network.
"""

import argparse
import functools
import re
from pathlib import Path

import torch

from interop import tensors
from interop.tensors import Lazy

# The dimension that tensor-parallel ranks divide; what is not named here is the same on all of them.
DIVIDED = {"word_embeddings.weight": 0, "output_layer.weight": 0, "linear_qkv.weight": 0, "linear_qkv.bias": 0, "linear_fc1.weight": 0,
           "linear_proj.weight": 1, "linear_fc2.weight": 1}
IGNORED = ("_extra_state", "inv_freq")  # TransformerEngine's, and a table that follows from the settings
NO_MODEL = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")  # first parts of torch_dist's other names


def divided_dim(name):
    return next((dim for end, dim in DIVIDED.items() if name.endswith(end)), None)


# ------------------------------------------------------------------------------------------------------- reading


def find(path):
    """The folder of one iteration: `path` itself, or the latest of a run; raises ValueError or OSError."""
    path = Path(path)
    pointer = path / "latest_checkpointed_iteration.txt"
    if not pointer.is_file():
        return path
    latest = pointer.read_text(errors="replace").strip()
    if latest != "release" and not re.fullmatch("[0-9]{1,12}", latest):
        raise ValueError(f"{pointer} holds no iteration but {latest[:20]!r}")
    folder = path / (latest if latest == "release" else f"iter_{int(latest):07d}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}, which {pointer} names, is not there")
    return folder


def is_one(path):
    """Whether a folder looks like one of these."""
    path = Path(path)
    return (path / "latest_checkpointed_iteration.txt").is_file() or (path / ".metadata").is_file() or any(path.glob("mp_rank_*"))


def read(path):
    """(arguments, iteration, {name: Lazy}) of a checkpoint; raises ValueError or OSError."""
    folder = find(path)
    return read_distributed(folder) if (folder / ".metadata").is_file() else read_ranks(folder)


def arguments(checkpoint, path):
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"{path} holds no arguments (args): the architecture is not known")
    iteration = checkpoint.get("iteration", 0)
    return vars(args), iteration if isinstance(iteration, int) else 0


def read_ranks(folder):
    """The `torch` format: the shards of all ranks are put together."""
    ranks = {}
    for path in folder.glob("mp_rank_*/model_optim_rng.pt"):
        if found := re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name):
            ranks[int(found[2] or 0), int(found[1])] = path  # pipeline, tensor
    if not ranks:
        raise FileNotFoundError(f"{folder}: no Megatron checkpoint (neither mp_rank_*/model_optim_rng.pt nor .metadata)")
    first = tensors.load(ranks[min(ranks)], mmap=True)
    args, iteration = arguments(first, ranks[min(ranks)])
    n_pipeline, n_tensor = (max(of) + 1 for of in zip(*ranks))
    try:
        n_pipeline, n_tensor = (max(n, int(args.get(f"{kind}_model_parallel_size") or 1)) for n, kind in ((n_pipeline, "pipeline"), (n_tensor, "tensor")))
    except (TypeError, ValueError):
        raise ValueError(f"{folder}: the arguments do not say how many ranks wrote it") from None
    for pipeline in range(n_pipeline):
        for tensor in range(n_tensor):
            if (pipeline, tensor) not in ranks:
                raise FileNotFoundError(f"{folder}: the shard of tensor rank {tensor}, pipeline rank {pipeline} is not there")
    n_chunks = sum(isinstance(key, str) and bool(re.fullmatch(r"model\d+", key)) for key in first)  # of interleaved pipelines
    out, layers = {}, 0
    for chunk in range(n_chunks or 1):
        key = f"model{chunk}" if n_chunks else "model"
        for pipeline in range(n_pipeline):
            files = [ranks[pipeline, tensor] for tensor in range(n_tensor)]
            parts = [state_dict(file, key) for file in files]
            numbers = set()
            for name in dict.fromkeys(name for part in parts for name in part):
                if lacking := [str(file) for file, part in zip(files, parts) if name not in part]:
                    raise ValueError(f"{lacking[0]} has no {name}, which other ranks have")
                whole = renumbered(name, layers, numbers)
                merged = merge(whole, [Lazy(tuple(part[name].shape), part[name].dtype, functools.partial(reread, file, key, name)) for file, part in zip(files, parts)])
                if whole in out:
                    raise ValueError(f"{folder}: {whole} occurs on more than one pipeline rank")
                out[whole] = merged
            layers += len(numbers)
    return args, iteration, out


def state_dict(file, key):
    """{name: tensor} of the network in a rank's file, mapped, not read."""
    loaded = tensors.load(file, mmap=True)
    loaded = loaded.get(key) if isinstance(loaded, dict) else None
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds no {key}")
    if "language_model" in loaded:
        raise ValueError(f"{file} is of the old Megatron without core (its tensors are under language_model): not supported")
    return {strip(name): value for name, value in tensors.plain(loaded, file, but=IGNORED).items()}


def strip(name):
    """A tensor's name as TransformerEngine's layers have it; Megatron's own (transformer_impl=local) keep their norms apart."""
    while name.startswith(("module.", "model.")):
        name = name.partition(".")[2]
    for own, fused in ((".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"), (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight")):
        name = name.removesuffix(own) + fused if name.endswith(own) else name
    return name


def reread(file, key, name):
    return state_dict(file, key)[name]


def renumbered(name, before, numbers):
    """A layer's name with its number in the whole network; `numbers` collects those within the stage."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if not found:
        return name
    numbers.add(found[1])
    return f"decoder.layers.{before + int(found[1])}.{found[2]}"


def merge(name, parts):
    """One Lazy from those of all tensor-parallel ranks."""
    first = parts[0]
    if len({(part.shape, part.dtype) for part in parts}) > 1:
        raise ValueError(f"{name} has other shapes on other tensor-parallel ranks: " + ", ".join(str(part.shape) for part in parts))
    if len(parts) == 1:
        return first
    dim = divided_dim(name)

    def read_same():
        values = first.read()
        if not all(torch.equal(values, part.read()) for part in parts[1:]):
            raise ValueError(f"{name} differs between tensor-parallel ranks")
        return values

    def read_divided():
        gated = name.endswith("linear_fc1.weight")  # a rank holds its share of the gate, then of up
        out = torch.empty(shape, dtype=first.dtype)
        for rank, part in enumerate(parts):
            for half, values in enumerate(part.read().chunk(1 + gated, dim=dim)):
                at = (half * len(parts) + rank) * values.shape[dim]
                out.narrow(dim, at, values.shape[dim]).copy_(values)
        return out

    if dim is None:
        return Lazy(first.shape, first.dtype, read_same)
    if dim >= len(first.shape):
        raise ValueError(f"{name} is {first.shape} on each tensor-parallel rank: it can't be a part of a whole")
    shape = tuple(size * len(parts) if i == dim else size for i, size in enumerate(first.shape))
    if dim == 0 and not name.endswith("linear_fc1.weight"):
        return tensors.joined(shape, first.dtype, lambda: (part.read() for part in parts))
    return Lazy(shape, first.dtype, read_divided)


def read_distributed(folder):
    """The `torch_dist` format: layers are stacked under one name, or numbered."""
    args, iteration = arguments(tensors.load(folder / "common.pt"), folder / "common.pt")
    out = {}
    for key, whole in tensors.of_distributed(folder).items():
        name = strip(key)
        if name.startswith(NO_MODEL) or name.split("/")[0].endswith(IGNORED):
            continue
        stacked = re.fullmatch(r"decoder\.layers\.([a-z].*)", name)
        if not stacked or not whole.shape:
            out[name] = Lazy(whole.shape, whole.dtype, whole.read, whole.parts if whole.shape else None)
            continue
        for layer in range(whole.shape[0]):
            out[f"decoder.layers.{layer}.{stacked[1]}"] = Lazy(whole.shape[1:], whole.dtype, functools.partial(one_layer, whole, layer))
    return args, iteration, out


def one_layer(stack, layer):
    return stack.read((layer, *(0 for _ in stack.shape[1:])), (layer + 1, *stack.shape[1:]))[0]


# --------------------------------------------------------------------------------------------------- architecture


def shape_of(args):
    """The settings of ModelConfig that the arguments say, without the vocabulary; raises ValueError where our network can't be it."""
    defaults = dict(swiglu=False, normalization="LayerNorm", add_bias_linear=True, position_embedding_type="learned_absolute", rotary_percent=1.0, rotary_interleaved=False,
                    num_experts=None, multi_latent_attention=False, qk_layernorm=False, qk_l2_norm=False, add_qkv_bias=False, group_query_attention=False, softmax_scale=None,
                    apply_layernorm_1p=False, apply_residual_connection_post_layernorm=False, untie_embeddings_and_output_weights=False, rotary_base=10000,
                    rotary_seq_len_interpolation_factor=None, use_rope_scaling=False, no_rope_freq=None, window_size=None,
                    softmax_type="vanilla", activation_func_clamp_value=None, glu_linear_offset=0.0)
    needed = dict(swiglu=True, normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope", rotary_interleaved=False, num_experts=None, multi_latent_attention=False,
                  qk_l2_norm=False, softmax_scale=None, apply_layernorm_1p=False, apply_residual_connection_post_layernorm=False, use_rope_scaling=False, no_rope_freq=None, window_size=None,
                  softmax_type="vanilla", activation_func_clamp_value=None, glu_linear_offset=0.0)
    a = defaults | {name: value for name, value in args.items() if value is not None}
    if a["window_size"] is not None and all(size == -1 for size in a["window_size"]):
        a["window_size"] = None  # a window without end on both sides
    for name, value in needed.items():
        if a[name] != value and (a[name] or value):
            raise ValueError(f"this architecture is not ours: its arguments say {name}={a[name]}, and only {name}={value} is supported")
    if a["rotary_percent"] != 1 or (a["rotary_seq_len_interpolation_factor"] or 1) != 1:
        raise ValueError("this architecture is not ours: its rotary positions are partial or interpolated")
    try:
        n_layer, d_model, n_head, d_ff = (int(a[name]) for name in ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size"))
        head_dim = int(a.get("kv_channels") or d_model // n_head)
        n_kv_head = int(a["num_query_groups"]) if a["group_query_attention"] else n_head
        length = int(a.get("max_position_embeddings") or a["seq_length"])
    except KeyError as problem:
        raise ValueError(f"the checkpoint's arguments do not say {problem}") from None
    eps = a.get("norm_epsilon", a.get("layernorm_epsilon", 1e-5))
    return dict(n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, d_model=d_model, d_ff=d_ff, seq_len=length,
                tied=not a["untie_embeddings_and_output_weights"], rope_base=float(a["rotary_base"]), norm_eps=float(eps),
                qk_norm=bool(a["qk_layernorm"]), qkv_bias=bool(a["add_qkv_bias"]))


def objective_of(args):
    """ar or masked, as the arguments say; None where they do not. The reference backend's default for attention is causal, its diffusion
    models have no_mask."""
    mode, attention = args.get("model_running_mode"), args.get("attention_mask_type")
    if mode == "difflm-noshift" and attention in (None, "no_mask"):
        return "masked"
    if mode == "vanilla" or mode is None and attention in (None, "causal", "causal_bottom_right"):
        return "ar"
    return "masked" if mode is None and attention == "no_mask" else None


def names(config):
    """{Megatron's name: shape} of the whole tensors that a network of this configuration has, but for the vocabulary's rows (None)."""
    c = config
    inner, group = c.n_head * c.head_dim, (c.n_head + 2 * c.n_kv_head) * c.head_dim
    out = {"embedding.word_embeddings.weight": (None, c.d_model)}
    for i in range(c.n_layer):
        p = f"decoder.layers.{i}."
        out |= {p + "self_attention.linear_qkv.layer_norm_weight": (c.d_model,), p + "self_attention.linear_qkv.weight": (group, c.d_model)}
        out |= {p + "self_attention.linear_qkv.bias": (group,)} if c.qkv_bias else {}
        out |= {p + f"self_attention.{x}_layernorm.weight": (c.head_dim,) for x in "qk"} if c.qk_norm else {}
        out |= {p + "self_attention.linear_proj.weight": (c.d_model, inner), p + "mlp.linear_fc1.layer_norm_weight": (c.d_model,),
                p + "mlp.linear_fc1.weight": (2 * c.d_ff, c.d_model), p + "mlp.linear_fc2.weight": (c.d_model, c.d_ff)}
    out["decoder.final_layernorm.weight"] = (c.d_model,)
    return out if c.tied else out | {"output_layer.weight": (None, c.d_model)}


def to_ours(config, found):
    """{our name: Lazy} from Megatron's whole tensors, which have been checked against `names`."""
    c, out = config, {}

    @functools.lru_cache(maxsize=1)
    def whole(name):  # q, k and v come out of one tensor: it is read once
        return found[name].read()

    def piece(name, cut, shape):
        return Lazy(shape, found[name].dtype, lambda: cut(whole(name)).reshape(shape))

    def heads(first, last):
        """Rows of every KV group: its query heads, its key, its value."""
        return lambda fused: fused.view(c.n_kv_head, c.n_head // c.n_kv_head + 2, c.head_dim, *fused.shape[1:])[:, first:last]

    queries = c.n_head // c.n_kv_head
    out["embed.weight"] = found["embedding.word_embeddings.weight"]
    for i in range(c.n_layer):
        p, b = f"decoder.layers.{i}.", f"blocks.{i}."
        out[b + "attn_norm.weight"] = found[p + "self_attention.linear_qkv.layer_norm_weight"]
        for kind, first, last, n in (("q", 0, queries, c.n_head), ("k", queries, queries + 1, c.n_kv_head), ("v", queries + 1, queries + 2, c.n_kv_head)):
            out[f"{b}attn.{kind}_proj.weight"] = piece(p + "self_attention.linear_qkv.weight", heads(first, last), (n * c.head_dim, c.d_model))
            if c.qkv_bias:
                out[f"{b}attn.{kind}_proj.bias"] = piece(p + "self_attention.linear_qkv.bias", heads(first, last), (n * c.head_dim,))
        out[b + "attn.o_proj.weight"] = found[p + "self_attention.linear_proj.weight"]
        for x in "qk" if c.qk_norm else "":
            out[f"{b}attn.{x}_norm.weight"] = found[f"{p}self_attention.{x}_layernorm.weight"]
        out[b + "mlp_norm.weight"] = found[p + "mlp.linear_fc1.layer_norm_weight"]
        out[b + "mlp.gate_proj.weight"] = piece(p + "mlp.linear_fc1.weight", lambda fused: fused[: c.d_ff], (c.d_ff, c.d_model))
        out[b + "mlp.up_proj.weight"] = piece(p + "mlp.linear_fc1.weight", lambda fused: fused[c.d_ff :], (c.d_ff, c.d_model))
        out[b + "mlp.down_proj.weight"] = found[p + "mlp.linear_fc2.weight"]
    out["norm.weight"] = found["decoder.final_layernorm.weight"]
    return out if c.tied else out | {"lm_head.weight": found["output_layer.weight"]}


def from_ours(config, ours):
    """{Megatron's name: Lazy} of whole tensors from ours."""
    c, out = config, {}

    def together(shape, parts, join):
        return Lazy(shape, parts[0].dtype, lambda: join([part.read() for part in parts]))

    def groups(parts):
        split = [part.view(c.n_kv_head, -1, c.head_dim, *part.shape[1:]) for part in parts]
        return torch.cat(split, dim=1).flatten(0, 2)

    ours_of = {"self_attention.linear_qkv.layer_norm_weight": "attn_norm.weight", "self_attention.linear_proj.weight": "attn.o_proj.weight",
               "self_attention.q_layernorm.weight": "attn.q_norm.weight", "self_attention.k_layernorm.weight": "attn.k_norm.weight",
               "mlp.linear_fc1.layer_norm_weight": "mlp_norm.weight", "mlp.linear_fc2.weight": "mlp.down_proj.weight"}
    ends = {"embedding.word_embeddings.weight": "embed.weight", "decoder.final_layernorm.weight": "norm.weight", "output_layer.weight": "lm_head.weight"}
    for name, shape in names(config).items():
        if name in ends:
            out[name] = ours[ends[name]]
            continue
        _, _, i, rest = name.split(".", 3)
        if rest in ours_of:
            out[name] = ours[f"blocks.{i}.{ours_of[rest]}"]
        elif "linear_qkv" in rest:
            out[name] = together(shape, [ours[f"blocks.{i}.attn.{x}_proj.{rest.rpartition('.')[2]}"] for x in "qkv"], groups)
        else:
            out[name] = together(shape, [ours[f"blocks.{i}.mlp.{x}_proj.weight"] for x in ("gate", "up")], torch.cat)
    return out


# ------------------------------------------------------------------------------------------------------- writing


def write(folder, config, objective, ours, tokenizer, iteration, n_tensor, n_pipeline, alive=lambda n: None):
    """Our weights as a `torch` checkpoint, a file per rank, of which one at a time is in memory; raises ValueError or OSError.

    Each rank reads the tensors of its stage anew, of which it keeps its share: n_tensor times the reading, for 1/n_tensor of the memory.
    """
    c = config
    for what, n, by in (("tensor ranks divide the key and value heads", c.n_kv_head, n_tensor), ("tensor ranks divide d_ff", c.d_ff, n_tensor),
                        ("pipeline ranks divide the layers", c.n_layer, n_pipeline)):
        if n % by:
            raise ValueError(f"{what}: {n} is no multiple of {by}")
    if c.timed or c.rope_stretch or c.shift:
        raise ValueError("Megatron has no " + ("time embedding" if c.timed else "such rotary positions" if c.rope_stretch else "shifted diffusion"))
    rows = -(-c.padded_vocab // (128 * n_tensor)) * 128 * n_tensor  # Megatron pads so that every rank has a multiple of 128
    whole = from_ours(config, ours)
    dtype = whole["embedding.word_embeddings.weight"].dtype
    args = argparse.Namespace(
        num_layers=c.n_layer, hidden_size=c.d_model, num_attention_heads=c.n_head, kv_channels=c.head_dim, ffn_hidden_size=c.d_ff,
        group_query_attention=c.n_kv_head != c.n_head, num_query_groups=c.n_kv_head, seq_length=c.seq_len, max_position_embeddings=c.seq_len,
        normalization="RMSNorm", norm_epsilon=c.norm_eps, rotary_base=int(c.rope_base) if c.rope_base == int(c.rope_base) else c.rope_base,
        rotary_percent=1.0, rotary_interleaved=False, position_embedding_type="rope", swiglu=True, add_bias_linear=False, add_qkv_bias=c.qkv_bias,
        qk_layernorm=c.qk_norm, untie_embeddings_and_output_weights=not c.tied, attention_dropout=0.0, hidden_dropout=0.0, init_method_std=c.init_std,
        vocab_size=c.n_vocab if objective == "ar" else c.mask_id + 1, padded_vocab_size=rows, make_vocab_size_divisible_by=128, mask_token=c.mask_id,
        model_running_mode="vanilla" if objective == "ar" else "difflm-noshift", attention_mask_type="causal" if objective == "ar" else "no_mask",
        tensor_model_parallel_size=n_tensor, pipeline_model_parallel_size=n_pipeline, params_dtype=dtype, bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16, tokenizer_type="GPT2BPETokenizer" if tokenizer == "gpt2" else "HuggingFaceTokenizer", iteration=iteration, consumed_train_samples=0, consumed_valid_samples=0)
    per_stage = c.n_layer // n_pipeline
    for pipeline in range(n_pipeline):
        for tensor in range(n_tensor):
            mine = {}
            for name, value in whole.items():
                stage, local = 0 if name.startswith("embedding") else n_pipeline - 1, name
                if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name):
                    stage, layer = divmod(int(found[1]), per_stage)
                    local = f"decoder.layers.{layer}.{found[2]}"
                if stage == pipeline:
                    mine[local] = share(name, value.read(), rows, tensor, n_tensor)
                    alive(value.nbytes // n_tensor)
            if c.tied and pipeline == n_pipeline - 1 > 0:  # the last stage keeps a copy of the embedding, as its head
                name = "embedding.word_embeddings.weight"
                mine["output_layer.weight"] = share(name, whole[name].read(), rows, tensor, n_tensor)
            place = Path(folder) / f"iter_{iteration:07d}" / (f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if n_pipeline > 1 else ""))
            place.mkdir(parents=True)
            torch.save(dict(args=args, checkpoint_version=3.0, iteration=iteration, model=mine), place / "model_optim_rng.pt")
    (Path(folder) / "latest_checkpointed_iteration.txt").write_text(str(iteration))


def share(name, values, rows, rank, world):
    """A tensor-parallel rank's own part of a whole tensor, in memory of its own."""
    dim = divided_dim(name)
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        out = values.new_zeros(rows // world, values.shape[1])
        mine = values[rank * len(out) : (rank + 1) * len(out)]
        out[: len(mine)] = mine
        return out
    if dim is None:
        return values.clone()
    halves = values.chunk(2) if name.endswith("linear_fc1.weight") else [values]
    return torch.cat([half.chunk(world, dim)[rank] for half in halves], dim)


# ------------------------------------------------------------------------------------------------- what it computes


@torch.no_grad()
def logits(config, found, ids):
    """Logits of ids (B, L), straight from Megatron's whole tensors in their own layout, layer by layer: what a conversion is checked
    against. (B, L, rows of the vocabulary) fp32."""
    c, groups = config, config.n_kv_head
    L = ids.shape[1]

    def get(name):
        return found[name].read().float()

    def norm(x, weight):
        return x * (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight

    angle = torch.outer(torch.arange(L, dtype=torch.float64), c.rope_base ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim))
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)[:, None]  # (L, 1, head_dim/2)

    def rotated(x):  # (B, L, heads, head_dim): the halves are real and imaginary parts
        z = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    x = get("embedding.word_embeddings.weight")[ids]
    ahead = torch.ones(L, L, dtype=torch.bool).triu(1) & c.causal
    for i in range(c.n_layer):
        p = f"decoder.layers.{i}."
        y = norm(x, get(p + "self_attention.linear_qkv.layer_norm_weight")) @ get(p + "self_attention.linear_qkv.weight").T
        if c.qkv_bias:
            y = y + get(p + "self_attention.linear_qkv.bias")
        y = y.view(*ids.shape, groups, -1, c.head_dim)  # of a group: its queries, then its key and value
        q, k, v = y[..., :-2, :].flatten(2, 3), y[..., -2, :], y[..., -1, :]
        if c.qk_norm:
            q, k = norm(q, get(p + "self_attention.q_layernorm.weight")), norm(k, get(p + "self_attention.k_layernorm.weight"))
        k, v = (t.repeat_interleave(c.n_head // groups, dim=2) for t in (rotated(k), v))
        scores = torch.einsum("bqhd,bkhd->bhqk", rotated(q), k) / c.head_dim**0.5
        y = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(ahead, float("-inf")).softmax(-1), v)
        x = x + y.flatten(2) @ get(p + "self_attention.linear_proj.weight").T
        gate, up = (norm(x, get(p + "mlp.linear_fc1.layer_norm_weight")) @ get(p + "mlp.linear_fc1.weight").T).chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ get(p + "mlp.linear_fc2.weight").T
    head = "embedding.word_embeddings.weight" if c.tied else "output_layer.weight"
    return norm(x, get("decoder.final_layernorm.weight")) @ get(head).T
