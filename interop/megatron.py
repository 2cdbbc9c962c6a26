"""Megatron's checkpoints, as MegaDLMs writes them (docs/math.md §11): read with torch alone, and written.

Its layers fuse tensors that ours keep apart: query, key and value of each group of heads; gate and up of the
MLP. megatron_files.py puts the ranks' files together.
"""

import argparse
import os
import re
from functools import lru_cache, partial

import torch

from corpus.files import list_folder
from interop import checks, megatron_files
from interop.source import Source, fit_vocabulary, weight_shapes
from interop.tensors import LazyTensor
from model import ModelConfig
from training.weights import check_tensors

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
# {our name: Megatron's} of the tensors that both have alike, outside the layers and in each
SAME_OUTSIDE = {
    "embed.weight": EMBEDDING, "norm.weight": "decoder.final_layernorm.weight", "lm_head.weight": HEAD}
SAME_IN_LAYER = {
    "attn_norm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "attn.o_proj.weight": "self_attention.linear_proj.weight",
    "mlp_norm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight"}

# {argument: the value that our network needs}
NEEDED_ARGUMENTS = dict(
    swiglu=True, normalization="RMSNorm", add_bias_linear=False, position_embedding_type="rope",
    rotary_interleaved=False, num_experts=None, multi_latent_attention=False, qk_l2_norm=False,
    softmax_scale=None, apply_layernorm_1p=False, apply_residual_connection_post_layernorm=False,
    use_rope_scaling=False, no_rope_freq=None, window_size=None, softmax_type="vanilla",
    activation_func_clamp_value=None, glu_linear_offset=0.0)
# Megatron's defaults for arguments that are not recorded, or None, where they are not what our network needs
DEFAULT_ARGUMENTS = dict(
    swiglu=False, normalization="LayerNorm", add_bias_linear=True, position_embedding_type="learned_absolute",
    rotary_percent=1.0, rotary_base=10_000, rotary_seq_len_interpolation_factor=None, qk_layernorm=False,
    add_qkv_bias=False, group_query_attention=False, untie_embeddings_and_output_weights=False)

# GPT-2's tokenizer: how many ids, and the last part of the names under which transformers finds it
GPT2_TOKENS = 50_257
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2", "gpt2_tokenizer")


def is_checkpoint(path):
    """True if a folder looks like one of Megatron's."""
    has_pointer = (path / "latest_checkpointed_iteration.txt").is_file()
    return has_pointer or (path / ".metadata").is_file() or bool(list_folder(path, "mp_rank_*"))


# ---------------------------------------------------------------------------------------------------- reading


def open_source(cfg, path):
    """The Source in an iteration, or in the latest one of a run; cfg is convert.Config.

    Raises ValueError or OSError.
    """
    folder = megatron_files.find_iteration(path)
    args, iteration, original = megatron_files.read(folder)
    with checks.explain_bad_settings(path):
        shape = network_settings(args)
        recorded = recorded_objective(args)
    checks.check_shape(path, shape, len(original))
    if recorded is None and cfg.objective == "auto":
        raise ValueError("the arguments do not say what was learned "
                         f"(model_running_mode={args.get('model_running_mode')}, "
                         f"attention_mask_type={args.get('attention_mask_type')}); give --objective")
    objective = checks.choose_objective(cfg, recorded, path)

    if EMBEDDING not in original:
        raise ValueError(f"{path} has no {EMBEDDING}")
    n_rows = original[EMBEDDING].shape[0] if original[EMBEDDING].shape else 0
    mask_id = args.get("mask_token") if cfg.mask_id < 0 else cfg.mask_id
    is_given = cfg.tokenizer or (path / "tokenizer.json").is_file()
    recorded_name = "" if is_given else recorded_tokenizer(args)
    tokenizer = checks.open_tokenizer(cfg, path, None if objective == "ar" else mask_id, recorded_name)
    if type(mask_id) is not int or not 0 <= mask_id < n_rows:
        mask_id = None  # some name it by its text
    if tokenizer is None and cfg.tokenizer != "none":
        whose = args.get("tokenizer_model") or args.get("tokenizer_type") or "none"
        raise ValueError(f"Megatron's checkpoints bring no tokenizer, and the arguments name {whose}: give "
                         "--tokenizer=gpt2, a tokenizer.json or its folder, or none (nothing can be sampled "
                         "or evaluated then)")
    n_text = args.get("vocab_size") or n_rows
    n_vocab, mask_id = checks.choose_vocabulary(path, tokenizer, objective, n_rows, n_text, mask_id)
    shape["seq_len"] = cfg.seq_len or shape["seq_len"]
    config = ModelConfig(**shape, n_vocab=n_vocab, mask_id=mask_id, causal=objective == "ar")

    checks.drop_tied_head(path, config, original, HEAD, EMBEDDING)
    check_tensors(path, tensor_shapes(config, n_rows), original)
    weights = fit_vocabulary(to_ours(config, original), config)
    return Source("megatron", folder, config, objective, weights, original, tokenizer, iteration)


def network_settings(args):
    """The settings of ModelConfig that the arguments give: all but `causal` and the vocabulary's.

    Raises ValueError where our network can't be it, and whatever arguments of strange types cause.
    """
    recorded = {name: value for name, value in args.items() if value is not None}
    args = NEEDED_ARGUMENTS | DEFAULT_ARGUMENTS | recorded
    if args["window_size"] is not None and all(size == -1 for size in args["window_size"]):
        args["window_size"] = None  # a window without end on both sides
    for name, needed in NEEDED_ARGUMENTS.items():
        is_equal = args[name] == needed or not args[name] and not needed
        if not is_equal:
            raise ValueError(f"this architecture is not ours: its arguments say {name}={args[name]}, and "
                             f"only {name}={needed} is supported")
    if args["rotary_percent"] != 1 or (args["rotary_seq_len_interpolation_factor"] or 1) != 1:
        raise ValueError("this architecture is not ours: its rotary positions are partial or interpolated")
    try:
        n_head, d_model = int(args["num_attention_heads"]), int(args["hidden_size"])
        return dict(
            n_layer=int(args["num_layers"]), n_head=n_head, d_model=d_model,
            d_ff=int(args["ffn_hidden_size"]), head_dim=int(args.get("kv_channels") or d_model // n_head),
            n_kv_head=int(args["num_query_groups"]) if args["group_query_attention"] else n_head,
            seq_len=int(args.get("max_position_embeddings") or args["seq_length"]),
            tied=not args["untie_embeddings_and_output_weights"], rope_base=float(args["rotary_base"]),
            norm_eps=float(args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5))),
            qk_norm=bool(args["qk_layernorm"]), qkv_bias=bool(args["add_qkv_bias"]))
    except KeyError as name:
        raise ValueError(f"the checkpoint's arguments do not say {name}") from None


def recorded_objective(args):
    """ar or masked, as the arguments say; None where they do not.

    MegaDLMs' attention is causal by default, and its diffusion models have no_mask.
    """
    mode, attention = args.get("model_running_mode"), args.get("attention_mask_type")
    if mode == "difflm-noshift" and attention in (None, "no_mask"):
        return "masked"
    if mode == "vanilla" or mode is None and attention in (None, "causal", "causal_bottom_right"):
        return "ar"
    return "masked" if mode is None and attention == "no_mask" else None


def recorded_tokenizer(args):
    """The tokenizer that the arguments name: the path of a tokenizer.json that is here, or gpt2; else "".

    GPT-2's comes with tiktoken. It is known by the names under which transformers has it, and where the
    arguments name a file that is elsewhere, by its size.
    """
    model, file = (args.get(name) or "" for name in ("tokenizer_model", "vocab_file"))
    if not isinstance(model, str) or not isinstance(file, str):
        return ""
    for path in (os.path.join(model, "tokenizer.json"), model) if model else ():
        if path.endswith(".json") and os.path.isfile(path):
            return path
    if args.get("tokenizer_type") != "GPT2BPETokenizer":
        is_gpt2 = os.path.basename(model.rstrip("/")) in GPT2_NAMES
    else:
        sizes = args.get("vocab_size"), args.get("mask_token")
        is_gpt2 = not file or "gpt2" in os.path.basename(file) or GPT2_TOKENS in sizes
    return "gpt2" if is_gpt2 else ""


def tensor_shapes(config, n_rows):
    """{Megatron's name: shape} of a network's whole tensors; n_rows: of the vocabulary's."""
    c = config
    q_width, kv_width = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (c.d_model,),
        "self_attention.linear_qkv.weight": (q_width + 2 * kv_width, c.d_model)}
    if c.qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (q_width + 2 * kv_width,)
    if c.qk_norm:
        layer |= {f"self_attention.{x}_layernorm.weight": (c.head_dim,) for x in "qk"}
    layer |= {
        "self_attention.linear_proj.weight": (c.d_model, q_width),
        "mlp.linear_fc1.layer_norm_weight": (c.d_model,),
        "mlp.linear_fc1.weight": (2 * c.d_ff, c.d_model),
        "mlp.linear_fc2.weight": (c.d_model, c.d_ff)}
    shapes = {EMBEDDING: (n_rows, c.d_model)}
    for i in range(c.n_layer):
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["decoder.final_layernorm.weight"] = (c.d_model,)
    return shapes if c.tied else shapes | {HEAD: (n_rows, c.d_model)}


# ------------------------------------------------------------------------------------------------ the layouts


def to_ours(config, original):
    """{our name: LazyTensor} from Megatron's whole tensors, those of `tensor_shapes`."""

    @lru_cache(maxsize=1)
    def read_fused(name):  # several of our tensors are cut out of one: it is read once
        return original[name].read()

    weights = {}
    for name, shape in weight_shapes(config).items():
        fused_name = megatron_name(name)
        tensor = original[fused_name]
        if name in SAME_OUTSIDE or name.split(".", 2)[2] in SAME_IN_LAYER:
            weights[name] = tensor
        else:
            read = partial(cut_out, config, name, shape, read_fused, fused_name)
            weights[name] = LazyTensor(shape, tensor.dtype, read)
    return weights


def megatron_name(name):
    """The name of Megatron's tensor that has one of ours in it."""
    if name in SAME_OUTSIDE:
        return SAME_OUTSIDE[name]
    _, i, rest = name.split(".", 2)
    if rest in SAME_IN_LAYER:
        return f"decoder.layers.{i}.{SAME_IN_LAYER[rest]}"
    if rest.startswith("mlp."):
        return f"decoder.layers.{i}.mlp.linear_fc1.weight"
    kind = rest.rpartition(".")[2]  # weight or bias
    return f"decoder.layers.{i}.self_attention.linear_qkv.{kind}"


def cut_out(config, name, shape, read_fused, fused_name):
    """Our tensor of this name, out of a fused one: gate above up, or q, k and v in each group of heads."""
    c, fused = config, read_fused(fused_name)
    module = name.split(".")[-2]
    if module in ("gate_proj", "up_proj"):
        gate, up = fused.chunk(2)
        return gate if module == "gate_proj" else up
    n_queries = c.n_head // c.n_kv_head  # of a group, which has one key and one value
    groups = fused.view(c.n_kv_head, n_queries + 2, c.head_dim, *fused.shape[1:])
    q, k, v = groups.split((n_queries, 1, 1), dim=1)
    return dict(q_proj=q, k_proj=k, v_proj=v)[module].reshape(shape)


def from_ours(config, weights):
    """{Megatron's name: LazyTensor} of whole tensors from ours."""
    parts = {}  # {Megatron's name: our tensors in it}
    for name in weight_shapes(config):
        parts.setdefault(megatron_name(name), []).append(weights[name])
    original = {}
    for name, shape in tensor_shapes(config, config.padded_vocab).items():
        first = parts[name][0]
        if len(parts[name]) == 1:
            original[name] = first
        elif "linear_qkv" in name:
            original[name] = LazyTensor(shape, first.dtype, partial(read_qkv, config, parts[name]))
        else:
            original[name] = LazyTensor(shape, first.dtype, partial(read_gate_up, parts[name]))
    return original


def read_qkv(config, parts):
    """Query, key and value side by side in each group of heads."""
    c = config
    groups = [part.read().view(c.n_kv_head, -1, c.head_dim, *part.shape[1:]) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)


def read_gate_up(parts):
    return torch.cat([part.read() for part in parts])


# ---------------------------------------------------------------------------------------------------- writing


def write(folder, source, weights, n_tensor, n_pipeline, on_progress):
    """Write a `torch` checkpoint for so many ranks, one rank's file in memory at a time.

    weights: {our name: LazyTensor}, the source's, maybe in another dtype. Each tensor-parallel rank reads the
    tensors of its stage anew and keeps its share: n_tensor times the reading, for 1/n_tensor of the memory.
    Raises ValueError or OSError.
    """
    c = source.config
    check_writable(c, n_tensor, n_pipeline)
    multiple = 128 * n_tensor  # Megatron pads the vocabulary so that each rank has a multiple of 128
    n_rows = -(-c.padded_vocab // multiple) * multiple
    whole = from_ours(c, weights)
    args = arguments(source, whole[EMBEDDING].dtype, n_rows, n_tensor, n_pipeline)
    for pipeline in range(n_pipeline):
        names = {name: stage_name(c, name, pipeline, n_pipeline) for name in whole}
        names = {name: local_name for name, local_name in names.items() if local_name}
        for tensor in range(n_tensor):
            take_shard = partial(megatron_files.take_shard, n_rows=n_rows, rank=tensor, n_ranks=n_tensor)
            shards = {}
            for name, local_name in names.items():
                shards[local_name] = take_shard(name, whole[name].read())
                on_progress(whole[name].nbytes // n_tensor)
            if c.tied and pipeline == n_pipeline - 1 > 0:  # the last stage's head is a copy of the embedding
                shards[HEAD] = take_shard(EMBEDDING, whole[EMBEDDING].read())
            rank = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if n_pipeline > 1 else "")
            path = folder / f"iter_{source.step:07d}" / rank / "model_optim_rng.pt"
            path.parent.mkdir(parents=True)
            torch.save(dict(args=args, checkpoint_version=3.0, iteration=source.step, model=shards), path)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(source.step), encoding="utf-8")


def check_writable(config, n_tensor, n_pipeline):
    """Raise ValueError for a network that Megatron has not, or that so many ranks can't share."""
    c = config
    for rule, n, n_ranks in (("tensor ranks divide the key and value heads", c.n_kv_head, n_tensor),
                             ("tensor ranks divide d_ff", c.d_ff, n_tensor),
                             ("pipeline ranks divide the layers", c.n_layer, n_pipeline)):
        if n % n_ranks:
            raise ValueError(f"{rule}: {n} is no multiple of {n_ranks}")
    unsupported = {
        "time embedding": c.timed, "such rotary positions": c.rope_stretch, "shifted diffusion": c.shift,
        "block diffusion": c.diffusion_block}
    for feature, is_there in unsupported.items():
        if is_there:
            raise ValueError(f"Megatron has no {feature}")


def stage_name(config, name, pipeline, n_pipeline):
    """A tensor's name on a pipeline rank; None if it is on another."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match:
        stage, layer = divmod(int(match[1]), config.n_layer // n_pipeline)
        return f"decoder.layers.{layer}.{match[2]}" if stage == pipeline else None
    stage = 0 if name.startswith("embedding") else n_pipeline - 1
    return name if stage == pipeline else None


def arguments(source, dtype, n_rows, n_tensor, n_pipeline):
    """Megatron's arguments, as its parser would leave them; n_rows: of the padded vocabulary."""
    c, is_ar = source.config, source.objective == "ar"
    is_gpt2 = source.tokenizer is not None and source.tokenizer.name == "gpt2"
    rotary_base = int(c.rope_base) if c.rope_base == int(c.rope_base) else c.rope_base  # Megatron's is an int
    return argparse.Namespace(
        num_layers=c.n_layer, hidden_size=c.d_model, num_attention_heads=c.n_head, kv_channels=c.head_dim,
        ffn_hidden_size=c.d_ff, group_query_attention=c.n_kv_head != c.n_head, num_query_groups=c.n_kv_head,
        seq_length=c.seq_len, max_position_embeddings=c.seq_len, normalization="RMSNorm",
        norm_epsilon=c.norm_eps, rotary_base=rotary_base, rotary_percent=1.0, rotary_interleaved=False,
        position_embedding_type="rope", swiglu=True, add_bias_linear=False,
        add_qkv_bias=c.qkv_bias, qk_layernorm=c.qk_norm, untie_embeddings_and_output_weights=not c.tied,
        attention_dropout=0.0, hidden_dropout=0.0, init_method_std=c.init_std,
        vocab_size=c.n_vocab if is_ar else c.mask_id + 1, padded_vocab_size=n_rows,
        make_vocab_size_divisible_by=128, mask_token=c.mask_id,
        model_running_mode="vanilla" if is_ar else "difflm-noshift",
        attention_mask_type="causal" if is_ar else "no_mask", tensor_model_parallel_size=n_tensor,
        pipeline_model_parallel_size=n_pipeline, params_dtype=dtype, bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16, tokenizer_type="GPT2BPETokenizer" if is_gpt2 else "HuggingFaceTokenizer",
        iteration=source.step, consumed_train_samples=0, consumed_valid_samples=0)
