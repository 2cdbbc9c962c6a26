"""What a run will need: memory of a rank, communication, time, disk. `train.py --dry_run` prints it.

training/layouts.py compares the ways to train a model on some GPUs by it.
"""

import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import diffusion
from configurator.format import human_bytes, human_seconds
from model import Transformer
from training import checkpoint, checks, distributed, muon
from training.flops import PEAK, expected_share
from training.log import warn
from training.update import is_muons, state_numbers

# The share of the bf16 peak that computing alone is assumed to reach: 41 % to 50 % are published for H100s,
# 1B to 8B.
EFFICIENCY = 0.45
# Bytes/s that a GPU sends in a collective: NVLink within a node, and its 400 Gb/s share of the network
# between nodes.
WITHIN, BETWEEN = 300e9, 40e9
HIDDEN = 0.9  # share of communication that computing can hide: all but the first gather and last reduction
H100 = 80e9  # bytes of memory
MARGIN = 1.25  # a step that is predicted to need so much more than there is is refused
# Computing added by recomputation: elementwise work; gate and up, too; the forward pass.
RECOMPUTED = {"no": 0.0, "elementwise": 0.02, "selective": 0.12, "full": 0.33}


def predict_memory(run):
    """What one rank of a run will need at its peak, as memory.MemoryNeed."""
    from training import memory  # it needs the compiler, which takes seconds to import

    cfg, world, micro_batch = run.cfg, run.cfg.world(), run.micro_batch
    levels = diffusion.noise_levels(run.process, 0, cfg.batch_size)
    rows = levels.microbatch_rows(0, cfg.batch_size // micro_batch)
    tokens = np.zeros((micro_batch, cfg.seq_len + 1), np.int32)
    documents = np.zeros((micro_batch, cfg.seq_len), np.int32) if run.has_documents else None
    batch = diffusion.make_batch(run.process, tokens, levels, rows, documents=documents)
    has_positions = cfg.reset_positions or run.sequences.has_pairs
    batch = batch._replace(positions=documents if has_positions else None)
    shards = distributed.ranks_per_copy(cfg.layout(), world, cfg.ranks_per_node(), cfg.shard_size)
    accumulating = run.accumulation > 1
    return memory.predict(
        run.model_config, batch, cfg.loss == "paper", run.dtype, run.on_gpu, cfg.compile, cfg.recompute,
        cfg.fp8, lasting_gradients=accumulating or world > 1 or cfg.cuda_graphs, layout=cfg.layout(),
        shards=shards, accumulating=accumulating, optimizer=cfg.optimizer, ema=cfg.ema)


def row_bytes(run):
    """Bytes, at least, of the numbers of a step's rows: those that train.batches looks up, and a batch's."""
    return 8 * (64 * run.cfg.batch_size + run.micro_batch * run.cfg.seq_len)


def check_rows(run):
    """Raise ValueError where not even the numbers of a step's rows fit into this machine's memory."""
    memory = host_memory()
    if row_bytes(run) > memory:
        raise ValueError(f"batch_size={run.cfg.batch_size}, micro_batch={run.micro_batch}: the numbers of "
                         f"their rows alone need {human_bytes(row_bytes(run))} of memory, this machine has "
                         f"{human_bytes(memory)}")


def check_memory(run):
    """Bytes of memory that a step takes at its peak, None on ranks and machines where that need not be known.

    Raises ValueError where it is more than there is. The prediction takes seconds: on a CPU it is asked only
    where a lower bound (weights, gradients, moments, and what goes from block to block) is 5 % of the memory.
    """
    check_rows(run)
    cfg, shape = run.cfg, run.model_config
    with torch.device("meta"):
        network = Transformer(replace(shape, seq_len=1))
    memory = host_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if run.device.type == "cuda":
        memory = torch.cuda.get_device_properties(run.device).total_memory
    between_blocks = 2 * run.micro_batch * cfg.seq_len * shape.d_model * shape.n_layer
    peak = 4 * (2 * network.n_params() + state_numbers(network, cfg.optimizer, cfg.ema)) / run.ranks.world
    peak += between_blocks
    predicted = None
    if peak < memory and run.ranks.rank == 0 and (run.on_gpu or peak > memory / 20):
        predicted = predict_peak(run)
        peak = (predicted or 0) / MARGIN
    if peak > memory:
        raise ValueError(f"a step needs {human_bytes(predicted or peak)} of memory, and there are "
                         f"{human_bytes(memory)} (--dry_run says for what): lower micro_batch or the "
                         "network's size, or use --recompute or --shard")
    return predicted


def host_memory():
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def predict_peak(run):
    """Bytes that `predict_memory` says, or None, with a warning, where it fails: the run goes on without."""
    try:
        return predict_memory(run).peak
    except Exception as problem:
        reason = f"{type(problem).__name__}: {problem}"
        return warn(run.ranks, f"no prediction of memory ({reason})")


# ---------------------------------------------------------------------------------------------- communication


class Traffic(NamedTuple):
    """Bytes that one rank sends in a step, and the seconds that takes at WITHIN and BETWEEN."""

    within: float
    between: float

    @property
    def seconds(self):
        return self.within / WITHIN + self.between / BETWEEN


def ring(n_bytes, ranks, per_node):
    """Traffic of gathering (or reducing) `n_bytes` over `ranks`: each sends (ranks − 1)/ranks of them.

    Hierarchical rings, as NCCL's: over nodes each GPU carries its share of the node's traffic, so that all
    network cards work.
    """
    if ranks == 1:
        return Traffic(0, 0)
    nodes = -(-ranks // per_node)
    local = min(ranks, per_node)
    return Traffic(n_bytes * (local - 1) / local, n_bytes / local * (nodes - 1) / nodes)


def traffic(n_params, layout, world, per_node, shards, micro_batches, dtype_bytes):
    """What one rank sends in a step of `micro_batches`: parameters in `dtype_bytes` each, gradients in fp32.

    no: sums all-reduced once (2 rings). optim: sums scattered, parameters gathered, once. full: parameters
    gathered twice and gradients scattered in every micro-batch. hybrid: the same among `shards` ranks; then
    the shards' sums all-reduced over the copies.
    """
    gradients, parameters = 4 * n_params, dtype_bytes * n_params
    copies = (world // shards, max(1, per_node // shards))  # how many, and how many of them share a node
    pieces = {
        "no": [(2 * gradients, world, per_node)],
        "optim": [(gradients + parameters, world, per_node)],
        "full": [(micro_batches * (gradients + 2 * parameters), world, per_node)],
        "hybrid": [(micro_batches * (gradients + 2 * parameters), shards, per_node),
                   (2 * gradients / shards, *copies)],
    }[layout]
    rings = [ring(*piece) for piece in pieces]
    return Traffic(sum(r.within for r in rings), sum(r.between for r in rings))


def step_seconds(flops, moved, gpus, peak=PEAK["H100"]):
    """(seconds of a step, seconds of computing, seconds of communication that nothing hides)."""
    computing = flops / (gpus * EFFICIENCY * peak)
    exposed = max((1 - HIDDEN) * moved.seconds, moved.seconds - HIDDEN * computing)
    return computing + exposed, computing, exposed


# ---------------------------------------------------------------------------------------------------- dry run


def report(run):
    """The lines of `train.py --dry_run`; raises ValueError."""
    check_rows(run)
    cfg, world, layout = run.cfg, run.cfg.world(), run.cfg.layout()
    with torch.device("meta"):
        network = Transformer(run.model_config)
    n_params, share, tokens = network.n_params(), expected_share(run), run.tokens_per_step
    flops = network.flops_per_token(share)
    shards = distributed.ranks_per_copy(layout, world, cfg.ranks_per_node(), cfg.shard_size)
    lines = []

    # how it runs, and what that needs of memory
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    over = f" over {shards}" if shards > 1 else ""
    place = "as on a GPU" if run.on_gpu else "on a CPU"
    lines.append(f"{n_params:,} parameters on {ranks}, shard={layout}{over}, micro-batches of "
                 f"{run.micro_batch} × {cfg.seq_len} tokens, {str(run.dtype)[6:]}, compile={cfg.compile}, "
                 f"recompute={cfg.recompute}, {place}")
    need = predict_memory(run)
    parts = [f"{name} {human_bytes(getattr(need, name))}" for name in need._fields[:-1]]
    lines.append(f"peak memory of a rank {human_bytes(need.peak)}: {', '.join(parts)}")

    # how long it is
    epochs = run.steps * cfg.batch_size / run.sequences.n
    total = run.steps * tokens
    lines.append(f"{run.steps:,} steps of {tokens:,} tokens: {total:,} tokens, {epochs:.2f} epochs")
    repeated = 1 + RECOMPUTED[cfg.recompute]
    lines.append(f"a step of {tokens:,} tokens takes {flops * tokens:.3g} FLOP, forward and backward "
                 f"({flops / 1e6:.1f} MFLOP per token; {share:.1%} of the positions get a head); "
                 f"with recomputation {repeated:.2f} × that")
    own = 0  # FLOP of Muon on a rank
    if cfg.optimizer == "muon":
        matrices = [p for name, p in network.named_parameters() if is_muons(name, p)]
        sharing = shards if layout != "no" else world  # ranks that divide the matrices
        own = muon.flops(matrices, sharing, shards)
        sent = "; what it sends is not in the time below" * (world > 1)
        lines.append(f"Muon takes {own:.3g} FLOP more on the busiest rank{sent}")

    # disk
    size, temporary = checkpoint.checkpoint_bytes(network, cfg.optimizer, cfg.ema, layout != "no")
    kept = checks.checkpoints_kept(run)
    all_of_them = human_bytes((kept + 1) * size + temporary)
    lines.append(f"a checkpoint has {human_bytes(size)}; {kept} kept and one in the making {all_of_them}")

    # communication and time
    if not run.on_gpu:
        lines.append("a CPU's speed is not known: a few steps tell how long it takes")
        return "\n".join(lines)
    dtype_bytes = 2 if run.dtype == torch.bfloat16 else 4
    moved = traffic(n_params, layout, world, cfg.ranks_per_node(), shards, run.accumulation, dtype_bytes)
    total, _, exposed = step_seconds(flops * tokens * repeated + own * world, moved, world)
    if world > 1:
        within, between = human_bytes(moved.within), human_bytes(moved.between)
        lines.append(f"a rank sends {within} within its node and {between} between nodes per step: "
                     f"{moved.seconds:.3g} s, of which {exposed:.3g} s not hidden")
    gpus = "1 H100" if world == 1 else f"{world} H100s"
    lines.append(f"on {gpus} at {EFFICIENCY:.0%} of their bf16 peak: {total:.3g} s per step, "
                 f"{tokens / total:,.0f} tokens/s, {human_seconds(run.steps * total)} in all")
    return "\n".join(lines)
