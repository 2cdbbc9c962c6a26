"""What a run will cost before it runs: memory of a rank, communication, time, disk. `train.py --dry_run` prints it.

    python -m training.dryrun        the tables of docs/scaling-out.md
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

import diffusion
from configurator.ladder import ladder, swiglu_width
from model import ModelConfig, Transformer
from training import checkpoint, distributed

# Dense bf16 peak in FLOP/s, for MFU: the first name that occurs in the device's.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12, "H200": 989e12, "B200": 2250e12,
        "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
EFFICIENCY = 0.45  # of the bf16 peak that computing alone is assumed to reach, between the 41 % to 50 % published for H100s at 1B to 8B
WITHIN, BETWEEN = 300e9, 40e9  # bytes/s that a GPU sends in a collective: NVLink within a node, and its 400 Gb/s share of the network between nodes
HIDDEN = 0.9  # share of the communication that can overlap with computing (all but the first gather and the last reduction)
H100 = 80e9  # bytes of memory


def peak_flops(device):
    """The datasheet's dense bf16 FLOP/s of a GPU, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK.items() if known in name), None)


def noisy_share(process):
    """The expected share of positions that a masked process masks, halfway through training; 1 for the others: all get a head."""
    if process.objective != "masked":
        return 1.0
    return float(diffusion.noise_levels(process, 0, 4096, 0.5).count.mean()) / process.seq_len


def predict_memory(cfg, process, model_config, dtype, on_gpu):
    """What one rank of a run will need at its peak, as memory.MemoryNeed; cfg is train.Config."""
    from training import memory

    world = cfg.world()
    micro = cfg.micro_batch or cfg.batch_size // world
    rows = diffusion.noise_levels(process, 0, cfg.batch_size)
    parts = cfg.batch_size // micro
    documents = np.zeros((micro, cfg.seq_len), np.int32) if cfg.document_attention else None
    batch = diffusion.make_batch(process, np.zeros((micro, cfg.seq_len + 1), np.int32), rows, rows.deal(0, parts), documents=documents)
    batch = batch._replace(positions=documents if cfg.reset_positions else None)
    return memory.predict(model_config, batch, cfg.loss == "paper", dtype, on_gpu, cfg.compile, cfg.recompute, cfg.fp8,
                          lasting_gradients=parts > world or world > 1 or cfg.cuda_graphs, layout=cfg.layout(),
                          shards=distributed.shard_ranks(cfg.layout(), world, cfg.node(), cfg.shard_size), accumulating=parts > world)


# ------------------------------------------------------------------------------------------------------ communication


class Traffic(NamedTuple):
    """Bytes that one rank sends in a step, and the seconds that takes at WITHIN and BETWEEN."""

    within: float
    between: float

    @property
    def seconds(self):
        return self.within / WITHIN + self.between / BETWEEN


def ring(n_bytes, ranks, per_node):
    """Traffic of gathering (or scattering sums of) `n_bytes` over `ranks`: each sends (ranks − 1)/ranks of them.

    Hierarchical rings, as NCCL's: over nodes each GPU carries its share of the node's traffic, so that all network cards work.
    """
    if ranks == 1:
        return Traffic(0, 0)
    nodes = -(-ranks // per_node)
    local = min(ranks, per_node)
    return Traffic(n_bytes * (local - 1) / local, n_bytes / local * (nodes - 1) / nodes)


def traffic(n_params, layout, world, per_node, shards, micro_batches, dtype_bytes):
    """What one rank sends in a step of `micro_batches`: parameters in `dtype_bytes` each, gradients in fp32.

    no: sums all-reduced once (2 rings). optim: sums scattered, parameters gathered, once. full: parameters gathered twice and
    gradients scattered in every micro-batch. hybrid: the same among `shards` ranks; then the shards' sums all-reduced over the copies.
    """
    gradients, parameters = 4 * n_params, dtype_bytes * n_params
    across = (world // shards, max(1, per_node // shards))  # copies, and how many of them share a node
    pieces = {
        "no": [(2 * gradients, world, per_node)],
        "optim": [(gradients + parameters, world, per_node)],
        "full": [(micro_batches * (gradients + 2 * parameters), world, per_node)],
        "hybrid": [(micro_batches * (gradients + 2 * parameters), shards, per_node), (2 * gradients / shards, *across)],
    }[layout]
    rings = [ring(*piece) for piece in pieces]
    return Traffic(sum(r.within for r in rings), sum(r.between for r in rings))


def step_seconds(flops, moved, gpus, peak=PEAK["H100"]):
    """(seconds of a step, seconds of computing, seconds of communication that nothing hides)."""
    computing = flops / (gpus * EFFICIENCY * peak)
    exposed = max((1 - HIDDEN) * moved.seconds, moved.seconds - HIDDEN * computing)
    return computing + exposed, computing, exposed


# ------------------------------------------------------------------------------------------------------------ dry run


def units(n_bytes):
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def duration(seconds):
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.3g} s"


def report(cfg, process, model_config, steps, n_blocks, dtype, on_gpu):
    """The lines of `train.py --dry_run`."""
    world, layout = cfg.world(), cfg.layout()
    with torch.device("meta"):
        network = Transformer(model_config)
    need = predict_memory(cfg, process, model_config, dtype, on_gpu)
    n_params, share = network.n_params(), noisy_share(process)
    tokens, flops = cfg.batch_size * cfg.seq_len, network.flops_per_token(share)
    micro = cfg.micro_batch or cfg.batch_size // world
    shards = distributed.shard_ranks(layout, world, cfg.node(), cfg.shard_size)
    lines = [
        f"{n_params:,} parameters on {world} rank{'s' * (world > 1)}, shard={layout}" + (f" over {shards}" if shards > 1 else "")
        + f", micro-batches of {micro} × {cfg.seq_len} tokens, {str(dtype)[6:]}, compile={cfg.compile}, recompute={cfg.recompute}, {'as on a GPU' if on_gpu else 'on a CPU'}",
        f"peak memory of a rank {units(need.peak)}: " + ", ".join(f"{what} {units(getattr(need, what))}" for what in need._fields[:-1]),
        f"{steps:,} steps of {tokens:,} tokens: {steps * tokens:,} tokens, {steps * cfg.batch_size / n_blocks:.2f} epochs",
        f"a step of {tokens:,} tokens takes {flops * tokens:.3g} FLOP, forward and backward ({flops / 1e6:.1f} MFLOP per token; {share:.1%} of the positions get a head); with recomputation {1 + AGAIN[cfg.recompute]:.2f} × that",
    ]
    size, more = checkpoint.checkpoint_bytes(n_params, layout != "no")
    kept = cfg.keep + len(cfg.kept_steps()) + (steps // cfg.keep_every if cfg.keep_every else 0)
    lines.append(f"a checkpoint has {units(size)}; {kept} kept and one in the making {units((kept + 1) * size + more)}")
    if on_gpu:
        moved = traffic(n_params, layout, world, cfg.node(), shards, cfg.batch_size // (micro * world), 2 if dtype == torch.bfloat16 else 4)
        total, _, exposed = step_seconds(flops * tokens * (1 + AGAIN[cfg.recompute]), moved, world)
        if world > 1:
            lines.append(f"a rank sends {units(moved.within)} within its node and {units(moved.between)} between nodes per step: {moved.seconds:.3g} s, of which {exposed:.3g} s not hidden")
        lines.append(f"on {world} H100{'s' * (world > 1)} at {EFFICIENCY:.0%} of their bf16 peak: {total:.3g} s per step, {tokens / total:,.0f} tokens/s, {duration(steps * total)} in all")
    else:
        lines.append("a CPU's speed is not known: a few steps tell how long it takes")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- tables

AGAIN = {"no": 0.0, "elementwise": 0.02, "selective": 0.12, "full": 0.33}  # computing added by recomputation: elementwise work; gate and up, too; the forward pass
HEADROOM = 0.9  # of the memory: what the allocator can't use


class Choice(NamedTuple):
    """One way to train a model on some GPUs."""

    layout: str
    shards: int
    micro: int
    recompute: str
    need: object  # memory.MemoryNeed
    moved: Traffic
    seconds: float
    exposed: float


def masked_model(name, seq_len=2048):
    """The ladder's model of that name for masked diffusion with GPT-2's vocabulary."""
    shape = ladder(name)
    return ModelConfig(**shape, n_kv_head=shape["n_head"], d_ff=swiglu_width(shape["d_model"]), n_vocab=50257, mask_id=50257, seq_len=seq_len, causal=False)


def activations(config, recompute):
    """A function micro-batch → bytes beside the states at the moment of most, for bf16 on a GPU, block by block.

    Linear in blocks and rows: from two networks of few blocks, each at two micro-batches (dry runs trace the whole network).
    """
    from training import memory

    def peak(n_layer, micro):
        process = diffusion.Process("masked", config.n_vocab, config.mask_id, config.seq_len)
        rows = diffusion.noise_levels(process, 0, 64)
        batch = diffusion.make_batch(process, np.zeros((micro, config.seq_len + 1), np.int32), rows, rows.deal(0, 64 // micro))
        moments = memory.trace(dataclasses.replace(config, n_layer=n_layer), batch, False, torch.bfloat16, True, "blocks", recompute, divided=True)
        return max(exists - arrived for exists, arrived in moments)

    (a, b), (c, d) = ((peak(layers, 1), peak(layers, 2)) for layers in (3, 5))

    def estimate(micro):
        few, more = a + (b - a) * (micro - 1), c + (d - c) * (micro - 1)
        return int(few + (more - few) * (config.n_layer - 3) / 2)

    return estimate


def choices(config, gpus, per_node, batch_rows, estimates):
    """Every `Choice` whose memory fits, fastest first; `estimates` {recompute: activations(config, recompute)}."""
    from training import memory

    with torch.device("meta"):
        network = Transformer(config)
    flops = network.flops_per_token(0.5) * batch_rows * config.seq_len
    found = []
    for layout in ("no", "optim", "hybrid", "full"):
        if layout == "hybrid" and gpus <= per_node:
            continue
        shards = distributed.shard_ranks(layout, gpus, min(gpus, per_node))
        micro = batch_rows // gpus
        while micro >= 1:
            if batch_rows % (gpus * micro) == 0:
                parts = batch_rows // (gpus * micro)
                for recompute, estimate in estimates.items():
                    every = 2 * network.n_params()  # bytes of all gradients, in bf16
                    moments = [(estimate(micro), 0), (estimate(micro) + 1, 1), (every, every)]  # before, at the begin and at the end of the backward pass
                    need = memory.weigh(moments, config, torch.bfloat16, True, True, layout, shards, parts > 1)
                    if need.peak < HEADROOM * H100:
                        moved = traffic(network.n_params(), layout, gpus, per_node, shards, parts, 2)
                        total, _, exposed = step_seconds(flops * (1 + AGAIN[recompute]), moved, gpus)
                        found.append(Choice(layout, shards, micro, recompute, need, moved, total, exposed))
                        break  # more recomputation would only be slower
            micro //= 2
    return sorted(found, key=lambda choice: (choice.seconds, list(AGAIN).index(choice.recompute)))


def main():
    """Print the tables of docs/scaling-out.md."""
    print("| model | GPUs | rows per step | layout | micro-batch | recompute | GiB per GPU: states, gathered, activations | sent per step within / between nodes | s per step | not hidden | tokens/s | MFU |")
    print("|" + "---|" * 12)
    for name in ("1086M", "2045M", "4077M", "8456M", "14785M"):
        config = masked_model(name)
        with torch.device("meta"):
            network = Transformer(config)
        estimates = {recompute: activations(config, recompute) for recompute in AGAIN}
        rows = 256 if network.n_params() < 1.5e9 else 512 if network.n_params() < 5e9 else 1024  # the paper's
        for gpus in (8, 16, 64, 256, 1024):
            head = f"| {name} | {gpus} | {rows} "
            if rows < gpus:
                print(head + "| less than a row per GPU: needs a larger batch, or to split rows | | | | | | | | |")
                continue
            found = choices(config, gpus, 8, rows, estimates)
            if not found:
                print(head + "| does not fit | | | | | | | | |")
                continue
            c = found[0]
            mfu = network.flops_per_token(0.5) * rows * config.seq_len / c.seconds / gpus / PEAK["H100"]
            states = c.need.parameters + c.need.optimizer + c.need.gradients
            sent = " / ".join(f"{x / 2**30:.1f} GiB" for x in c.moved)
            print(head + f"| {c.layout}{f' over {c.shards}' if c.layout == 'hybrid' else ''} | {c.micro} | {c.recompute} "
                  f"| {c.need.peak / 2**30:.0f}: {states / 2**30:.1f}, {c.need.gathered / 2**30:.1f}, {c.need.activations / 2**30:.1f} | {sent} "
                  f"| {c.seconds:.3g} | {c.exposed / c.seconds:.0%} | {rows * config.seq_len / c.seconds:,.0f} | {mfu:.0%} |", flush=True)


if __name__ == "__main__":
    main()
