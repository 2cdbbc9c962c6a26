"""Ways to train a model on some GPUs: each layout, micro-batch and recomputation that fits, fastest first.

    python -m training.layouts        prints the table of docs/scaling-out.md
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch

import diffusion
from configurator.ladder import ladder, swiglu_width
from model import ModelConfig, Transformer
from training import distributed, memory
from training.dryrun import H100, RECOMPUTED, Traffic, step_seconds, traffic
from training.flops import PEAK

HEADROOM = 0.9  # of the memory: what the allocator can't use


class Choice(NamedTuple):
    """One way to train a model on some GPUs."""

    layout: str
    shards: int
    micro_batch: int
    recompute: str
    need: memory.MemoryNeed
    moved: Traffic
    seconds: float  # of a step
    exposed: float  # of them, communication that nothing hides


def masked_model(name, seq_len=2048):
    """The ladder's model of that name for masked diffusion with GPT-2's vocabulary."""
    shape = ladder(name)
    return ModelConfig(**shape, n_kv_head=shape["n_head"], d_ff=swiglu_width(shape["d_model"]), n_vocab=50257,
                       mask_id=50257, seq_len=seq_len, causal=False)


class Activations:
    """Bytes beside the states at the peak, by micro-batch, for bf16 on a GPU, compiled block by block.

    Linear in blocks and rows: from two networks of few blocks, each at two micro-batches.
    """

    def __init__(self, config, recompute):
        self.n_layer = config.n_layer
        self.peaks = {(n_layer, micro_batch): self.peak(config, recompute, n_layer, micro_batch)
                      for n_layer in (3, 5) for micro_batch in (1, 2)}

    def peak(self, config, recompute, n_layer, micro_batch):
        process = diffusion.Process(
            "masked", config.n_vocab, config.mask_id, config.seq_len, block=config.diffusion_block)
        levels = diffusion.noise_levels(process, 0, 64)
        rows = levels.microbatch_rows(0, 64 // micro_batch)
        tokens = np.zeros((micro_batch, config.seq_len + 1), np.int32)
        batch = diffusion.make_batch(process, tokens, levels, rows)
        few_blocks = dataclasses.replace(config, n_layer=n_layer)
        timeline = memory.trace(
            few_blocks, batch, posterior=False, dtype=torch.bfloat16, on_gpu=True, compile="blocks",
            recompute=recompute, sharded=True)
        return max(exists - gradients for exists, gradients in timeline)

    def __call__(self, micro_batch):
        by_layers = {}
        for n_layer in (3, 5):
            one, two = self.peaks[n_layer, 1], self.peaks[n_layer, 2]
            by_layers[n_layer] = one + (two - one) * (micro_batch - 1)
        return int(by_layers[3] + (by_layers[5] - by_layers[3]) * (self.n_layer - 3) / 2)


def choices(config, gpus, per_node, batch_rows, activations):
    """Every `Choice` that fits, fastest first; activations {recompute: Activations(config, recompute)}."""
    found = []
    for layout in ("no", "optim", "hybrid", "full"):
        if layout == "hybrid" and gpus <= per_node:
            continue
        micro_batch = batch_rows // gpus
        while micro_batch >= 1:
            if batch_rows % (gpus * micro_batch) == 0:
                choice = first_that_fits(config, gpus, per_node, batch_rows, layout, micro_batch, activations)
                found += [choice] if choice else []
            micro_batch //= 2
    return sorted(found, key=lambda choice: (choice.seconds, list(RECOMPUTED).index(choice.recompute)))


def first_that_fits(config, gpus, per_node, batch_rows, layout, micro_batch, activations):
    """The `Choice` with the least recomputation that fits, or None: with more it would only be slower."""
    with torch.device("meta"):
        network = Transformer(config)
    n_params, parts = network.n_params(), batch_rows // (gpus * micro_batch)
    flops = network.flops_per_token(0.5) * batch_rows * config.seq_len
    shards = distributed.ranks_per_copy(layout, gpus, min(gpus, per_node))
    moved = traffic(n_params, layout, gpus, per_node, shards, parts, 2)
    gradients = 2 * n_params  # bytes of all of them, in bf16
    for recompute, estimate in activations.items():
        # before, at the begin and at the end of the backward pass
        peak = estimate(micro_batch)
        timeline = [(peak, 0), (peak + 1, 1), (gradients, gradients)]
        need = memory.weigh(
            timeline, config, torch.bfloat16, on_gpu=True, lasting_gradients=True, layout=layout,
            shards=shards, accumulating=parts > 1)
        if need.peak < HEADROOM * H100:
            total, _, exposed = step_seconds(flops * (1 + RECOMPUTED[recompute]), moved, gpus)
            return Choice(layout, shards, micro_batch, recompute, need, moved, total, exposed)
    return None


COLUMNS = ("model", "GPUs", "rows per step", "layout", "micro-batch", "recompute",
           "GiB per GPU: states, gathered, activations", "sent per step within / between nodes", "s per step",
           "not hidden", "tokens/s", "MFU")


def main():
    print(f"| {' | '.join(COLUMNS)} |")
    print("|" + "---|" * len(COLUMNS))
    for name in ("1086M", "2045M", "4077M", "8456M", "14785M"):
        config = masked_model(name)
        with torch.device("meta"):
            network = Transformer(config)
        activations = {recompute: Activations(config, recompute) for recompute in RECOMPUTED}
        batch_rows = 1024  # the paper's batches
        if network.n_params() < 5e9:
            batch_rows = 256 if network.n_params() < 1.5e9 else 512
        for gpus in (8, 16, 64, 256, 1024):
            cells = [name, gpus, batch_rows]
            if batch_rows < gpus:
                cells.append("less than a row per GPU: needs a larger batch, or to split rows")
            elif not (found := choices(config, gpus, 8, batch_rows, activations)):
                cells.append("does not fit")
            else:
                cells += cells_of(found[0], network, gpus, batch_rows)
            cells += [""] * (len(COLUMNS) - len(cells))
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def cells_of(choice, network, gpus, batch_rows):
    """A choice as cells of the table, from the layout on."""
    tokens = batch_rows * network.config.seq_len
    need, gib = choice.need, 2**30
    states = need.parameters + need.optimizer + need.gradients
    layout = f"hybrid over {choice.shards}" if choice.layout == "hybrid" else choice.layout
    parts = f"{states / gib:.1f}, {need.gathered / gib:.1f}, {need.activations / gib:.1f}"
    sent = " / ".join(f"{n_bytes / gib:.1f} GiB" for n_bytes in choice.moved)
    mfu = network.flops_per_token(0.5) * tokens / choice.seconds / gpus / PEAK["H100"]
    exposed, speed = choice.exposed / choice.seconds, tokens / choice.seconds
    return [layout, choice.micro_batch, choice.recompute, f"{need.peak / gib:.0f}: {parts}", sent,
            f"{choice.seconds:.3g}", f"{exposed:.0%}", f"{speed:,.0f}", f"{mfu:.0%}"]


if __name__ == "__main__":
    main()
