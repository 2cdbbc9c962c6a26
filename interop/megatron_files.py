"""Megatron's files: what the ranks of a run wrote becomes whole tensors again.

    run/latest_checkpointed_iteration.txt
    run/iter_0000100/mp_rank_00[_000]/model_optim_rng.pt   `torch`: a file per tensor (and pipeline) rank
    run/iter_0000100/{.metadata,common.pt,__0_0.distcp}    `torch_dist`: chunks of tensors, layers stacked;
                                                           since core 0.19 common.pt is one of the chunks

Both become {name: LazyTensor} under the names of the `torch` format, layers numbered over the whole network.
"""

import argparse
import re
from functools import partial

import torch

from corpus.files import list_folder
from interop import distcp, pickles, tensors
from interop.tensors import LazyTensor

# The dimension along which tensor-parallel ranks divide a tensor; all others are the same on every rank.
SHARD_DIMS = {
    "word_embeddings.weight": 0, "output_layer.weight": 0, "linear_qkv.weight": 0, "linear_qkv.bias": 0,
    "linear_fc1.weight": 0, "linear_proj.weight": 1, "linear_fc2.weight": 1}
GATED = "linear_fc1.weight"  # each rank holds its share of the gate, then of up
IGNORED = ("_extra_state", "inv_freq")  # TransformerEngine's, and a table that follows from the settings
# what else the names in a torch_dist folder begin with
NOT_WEIGHTS = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")
# {the norms of Megatron's own layers (transformer_impl=local): where TransformerEngine's layers have them}
FUSED_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight"}


def find_iteration(path):
    """The folder of one iteration: `path` itself, or the latest of a run; raises ValueError or OSError."""
    pointer = path / "latest_checkpointed_iteration.txt"
    if not pointer.is_file():
        return path
    latest = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if latest != "release" and not re.fullmatch("[0-9]{1,12}", latest):
        raise ValueError(f"{pointer} holds no iteration but {latest[:20]!r}")
    folder = path / (latest if latest == "release" else f"iter_{int(latest):07d}")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}, which {pointer} names, is not there")
    return folder


def read(folder):
    """(arguments, iteration, {name: LazyTensor}) of an iteration's folder; raises ValueError or OSError."""
    return read_distributed(folder) if (folder / ".metadata").is_file() else read_ranks(folder)


def read_arguments(values, path):
    """(arguments, iteration) of a file's contents; raises ValueError."""
    args = values.get("args") if isinstance(values, dict) else None
    if not isinstance(args, argparse.Namespace):
        raise ValueError(f"{path} holds no arguments (args): the architecture is not known")
    iteration = values.get("iteration", 0)
    return vars(args), iteration if type(iteration) is int and 0 <= iteration < 1 << 53 else 0


def canonical_name(name):
    """A tensor's name without wrappers, and as TransformerEngine's layers have it."""
    while name.startswith(("module.", "model.")):
        name = name.partition(".")[2]
    for own, fused in FUSED_NORMS.items():
        if name.endswith(own):
            name = name.removesuffix(own) + fused
    return name


# ----------------------------------------------------------------------------------------- the `torch` format


def read_ranks(folder):
    """As `read`, from a file for each rank."""
    paths = find_ranks(folder)
    first_path = paths[min(paths)]
    first = pickles.load(first_path, mmap=True)
    args, iteration = read_arguments(first, first_path)
    n_pipeline, n_tensor = count_ranks(folder, paths, args)
    # the stages of the network in order: with interleaved pipelines, a rank holds several (model0, model1, …)
    n_chunks = sum(isinstance(key, str) and bool(re.fullmatch(r"model\d+", key)) for key in first)
    keys = [f"model{chunk}" for chunk in range(n_chunks)] or ["model"]
    stages = [(key, pipeline) for key in keys for pipeline in range(n_pipeline)]

    weights, n_layers = {}, 0
    for key, pipeline in stages:
        files = [paths[pipeline, tensor] for tensor in range(n_tensor)]
        state_dicts = [read_state_dict(file, key) for file in files]
        names = dict.fromkeys(name for state_dict in state_dicts for name in state_dict)
        for name in names:
            global_name = renumber_layer(name, n_layers)
            if global_name in weights:
                raise ValueError(f"{folder}: {global_name} occurs on more than one pipeline rank")
            shards = lazy_shards(files, state_dicts, key, name)
            weights[global_name] = merge_shards(global_name, shards)
        n_layers += len({layer_number(name) for name in names} - {None})
    return args, iteration, weights


def find_ranks(folder):
    """{(pipeline rank, tensor rank): file} of an iteration; raises FileNotFoundError where there is none."""
    paths = {}
    for path in list_folder(folder, "mp_rank_*/model_optim_rng.pt"):
        match = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.parent.name)
        if match and path.is_file():
            paths[int(match[2] or 0), int(match[1])] = path
    if not paths:
        raise FileNotFoundError(f"{folder}: no Megatron checkpoint (neither mp_rank_*/model_optim_rng.pt nor "
                                ".metadata)")
    return paths


def count_ranks(folder, paths, args):
    """(number of pipeline ranks, of tensor ranks) that wrote an iteration.

    Raises ValueError, or FileNotFoundError where one's file is missing.
    """
    try:
        n_pipeline = int(args.get("pipeline_model_parallel_size") or 1)
        n_tensor = int(args.get("tensor_model_parallel_size") or 1)
    except (TypeError, ValueError):
        raise ValueError(f"{folder}: the arguments do not say how many ranks wrote it") from None
    n_pipeline = max(n_pipeline, *(pipeline + 1 for pipeline, _ in paths))
    n_tensor = max(n_tensor, *(tensor + 1 for _, tensor in paths))
    for pipeline in range(n_pipeline):
        for tensor in range(n_tensor):
            if (pipeline, tensor) not in paths:
                raise FileNotFoundError(f"{folder}: the shard of tensor rank {tensor}, pipeline rank "
                                        f"{pipeline} is not there")
    return n_pipeline, n_tensor


def lazy_shards(files, state_dicts, key, name):
    """The LazyTensor called `name` of each tensor-parallel rank; raises ValueError where one has none."""
    shards = []
    for file, state_dict in zip(files, state_dicts):
        if name not in state_dict:
            raise ValueError(f"{file} has no {name}, which other ranks have")
        tensor = state_dict[name]
        shards.append(LazyTensor(tuple(tensor.shape), tensor.dtype, partial(read_shard, file, key, name)))
    return shards


def read_state_dict(path, key):
    """{name: tensor} of the weights under a key of a rank's file, mapped and not read.

    Raises ValueError or OSError.
    """
    values = pickles.load(path, mmap=True)
    values = values.get(key) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no {key}")
    if "language_model" in values:
        raise ValueError(f"{path} is of Megatron before its core (its tensors are under language_model): not "
                         "supported")
    weights = tensors.select_tensors(values, path, skip=IGNORED)
    return {canonical_name(name): tensor for name, tensor in weights.items()}


def read_shard(path, key, name):
    """One tensor of a rank's file, mapped anew, so that the pages of the tensor before it can be freed."""
    return read_state_dict(path, key)[name]


def layer_number(name):
    """The number of a tensor's layer within its stage; None outside the layers."""
    match = re.match(r"decoder\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def renumber_layer(name, first_layer):
    """A tensor's name with its layer's number in the whole network; first_layer: that of the stage."""
    number = layer_number(name)
    if number is None:
        return name
    return name.replace(f"decoder.layers.{number}.", f"decoder.layers.{first_layer + number}.", 1)


def shard_dim(name):
    """The dimension along which tensor-parallel ranks divide a tensor; None if all ranks have the whole."""
    return next((dim for ending, dim in SHARD_DIMS.items() if name.endswith(ending)), None)


def merge_shards(name, shards):
    """The whole LazyTensor from those of all tensor-parallel ranks; raises ValueError for unfit shapes."""
    first, n_ranks = shards[0], len(shards)
    if len({(shard.shape, shard.dtype) for shard in shards}) > 1:
        shapes = ", ".join(str(shard.shape) for shard in shards)
        raise ValueError(f"{name} has other shapes on other tensor-parallel ranks: {shapes}")
    if n_ranks == 1:
        return first
    dim = shard_dim(name)
    if dim is None:
        return LazyTensor(first.shape, first.dtype, partial(read_replicated, name, shards))
    if dim >= len(first.shape):
        raise ValueError(f"{name} is {first.shape} on each tensor-parallel rank: it can't be part of a whole")
    shape = tuple(size * n_ranks if i == dim else size for i, size in enumerate(first.shape))
    if dim == 0 and not name.endswith(GATED):
        return tensors.from_blocks(shape, first.dtype, lambda: (shard.read() for shard in shards))
    return LazyTensor(shape, first.dtype, partial(read_sharded, name, shards, shape, dim))


def read_replicated(name, shards):
    """The tensor that all ranks have; raises ValueError where they differ."""
    values = shards[0].read()
    if not all(torch.equal(values, shard.read()) for shard in shards[1:]):
        raise ValueError(f"{name} differs between tensor-parallel ranks")
    return values


def read_sharded(name, shards, shape, dim):
    """The tensor of which every rank has a part along `dim`, or a part of each half (GATED)."""
    n_halves = 2 if name.endswith(GATED) else 1
    whole = torch.empty(shape, dtype=shards[0].dtype)
    for rank, shard in enumerate(shards):
        for half, values in enumerate(shard.read().chunk(n_halves, dim=dim)):
            start = (half * len(shards) + rank) * values.shape[dim]
            whole.narrow(dim, start, values.shape[dim]).copy_(values)
    return whole


def take_shard(name, values, n_rows, rank, n_ranks):
    """A copy of a tensor-parallel rank's part of a whole tensor; n_rows: of the padded vocabulary."""
    dim = shard_dim(name)
    if name.endswith(("word_embeddings.weight", "output_layer.weight")):
        shard = values.new_zeros(n_rows // n_ranks, values.shape[1])
        rows = values[rank * len(shard) : (rank + 1) * len(shard)]
        shard[: len(rows)] = rows
        return shard
    if dim is None:
        return values.clone()
    halves = values.chunk(2) if name.endswith(GATED) else [values]
    return torch.cat([half.chunk(n_ranks, dim)[rank] for half in halves], dim)


# ------------------------------------------------------------------------------------ the `torch_dist` format


def read_distributed(folder):
    """As `read`, from torch.distributed.checkpoint's files: layers are stacked, or numbered."""
    sharded, objects = distcp.open_folder(folder)
    args, iteration = read_common_state(folder, objects)
    weights = {}
    for key, tensor in sharded.items():
        name = canonical_name(key)
        if name.startswith(NOT_WEIGHTS) or name.split("/")[0].endswith(IGNORED):
            continue
        stacked = re.fullmatch(r"decoder\.layers\.([a-z].*)", name)
        if not stacked or not tensor.shape:
            read_blocks = tensor.blocks if tensor.shape else None
            weights[name] = LazyTensor(tensor.shape, tensor.dtype, tensor.read, read_blocks)
            continue
        for layer in range(tensor.shape[0]):
            read = partial(read_layer, tensor, layer)
            weights[f"decoder.layers.{layer}.{stacked[1]}"] = LazyTensor(tensor.shape[1:], tensor.dtype, read)
    return args, iteration, weights


def read_common_state(folder, objects):
    """(arguments, iteration) of common.pt, or, since core 0.19, of an object among the chunks.

    Raises ValueError or OSError.
    """
    path = folder / "common.pt"
    names = [name for name in objects if name.split("/")[0] == "common_state"]
    if path.is_file() or not names:
        return read_arguments(pickles.load(path), path)
    values = distcp.read_object(folder, objects[names[0]])
    if isinstance(values, list) and values:  # of the ranks that have it, which is one
        values = values[0]
    return read_arguments(values, f"{folder}: {names[0]}")


def read_layer(stack, layer):
    """One layer of a tensor in which the layers are stacked along the first dimension."""
    return stack.read((layer, *(0 for _ in stack.shape[1:])), (layer + 1, *stack.shape[1:]))[0]
