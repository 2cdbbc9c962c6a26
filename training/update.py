"""One optimizer step: batches to the device, loss and gradients, the update, the figures back to the host.

The device never waits for the host here, nor the host for the device: shapes are static, batches arrive on a
stream of their own, and losses are read when they have arrived.
"""

import contextlib
import inspect
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import diffusion
import kernels
from training.distributed import SINGLE, full_tensor, is_sharded, microbatch, shard
from training.transfer import timestamp

# The rotary tables never change: no need to broadcast them. Newer torch calls that setting by another name.
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"


# ------------------------------------------------------------------------------------------ what is optimized


class Objective(nn.Module):
    """The network with its loss, as one module for DDP, FSDP and torch.compile. Batch → loss (), its parts (P,)."""

    laps = None  # `timed_forward` sets it

    def __init__(self, network, posterior):
        super().__init__()
        self.network, self.posterior = network, posterior
        self.loss_of = diffusion.loss_and_parts  # a name of its own: `blocks` compiles it by itself

    def forward(self, batch):
        hidden = self.network(batch.tokens, batch.time, batch.documents, batch.index, batch.positions, batch.visible)
        return self.loss_of(hidden, self.network.head, batch, self.network.config.n_vocab, self.posterior)

    def look(self, batch, likeliest=False):
        """The nats at each position of the batch, (C,) fp32, whatever its weights; if asked also each one's likeliest token and its
        probability. Never differentiated."""
        hidden = self.network(batch.tokens, batch.time, batch.documents, batch.index, batch.positions).flatten(0, -2)
        head, n_vocab = self.network.head, self.network.config.n_vocab
        nats = diffusion.loss_and_nats(hidden, head, batch, hidden.new_ones(len(hidden), dtype=torch.float32), n_vocab, self.posterior)[1]
        if not likeliest:
            return nats
        with torch.autocast(hidden.device.type, enabled=False):  # 8 bits of bf16 leave ties among the likeliest
            return nats, *kernels.linear_greedy(hidden.float(), head.float(), n_vocab)


def compile_and_wrap(objective, how, ranks=SINGLE, layout="no", size=0, dtype=torch.float32, device=None, cuda_graphs=False):
    """`objective` ready to be called and differentiated, over `ranks`; how: whole, blocks or no; layout as in distributed.shard.

    whole: one graph, fused across layers. Under DDP the compiler is put around it: DDP's buckets then split
    the backward graph, so that their communication overlaps with it. blocks: each block by itself (all but
    the last share one compilation: minutes saved at 28 layers) and the loss; the hooks of DDP and FSDP work between them.

    A divided network is on the meta device when it comes, and afterwards has memory for its shards, without values.
    """
    network = objective.network
    if how == "blocks":
        for module in (*network.blocks, network.norm):
            module.forward = torch.compile(module.forward, dynamic=False, fullgraph=True)  # not the module: FSDP's hooks stay outside
        objective.loss_of = torch.compile(diffusion.loss_and_parts, dynamic=False, fullgraph=True)
    if layout != "no":
        shard(objective, layout, ranks, device, size, dtype).to_empty(device=device)
        network.tables()

        def begin(*_):
            if objective.laps is not None:
                objective.laps.append((timestamp(device), None))

        def end(*_):
            if objective.laps is not None:
                objective.laps.append((objective.laps.pop()[0], timestamp(device)))

        for block in network.blocks:  # after FSDP's own hook, which waits for the others
            block.register_forward_pre_hook(begin)
            block.register_forward_hook(end)
    elif ranks.world > 1:
        device = network.embed.weight.device
        objective = DistributedDataParallel(objective, device_ids=[device] if device.type == "cuda" else None,
                                            gradient_as_bucket_view=True, init_sync=False, **{BUFFERS: False})  # all begin alike
    if cuda_graphs:  # gradients of our own: those that a graph returns lie in its memory, which the next replay overwrites
        for p in objective.parameters():
            p.grad = torch.zeros_like(p)
    if how == "whole":
        objective = torch.compile(objective, dynamic=False, fullgraph=ranks.world == 1,
                                  options={"triton.cudagraphs": True} if cuda_graphs else None)
    return objective


def make_optimizer(network, lr, betas, weight_decay):
    """AdamW in one kernel per group; weight decay on matrices and embeddings only."""
    groups = [
        dict(params=[p for p in network.parameters() if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in network.parameters() if p.dim() < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def fix_bucket_order(objective, batch, autocast):
    """A pass for nothing: DDP orders its buckets by what its first backward pass meets.

    With that behind it, every step sums the gradients of all ranks in the same order, be it the run's first, or the first after
    it was resumed: four ranks add up to the same bits then.
    """
    with autocast():
        loss, _ = objective(batch)
    (0 * loss).backward()
    objective.zero_grad(set_to_none=True)


def optimizer_step(objective, optimizer, batches, accumulation, record, clip, autocast, world=1, cuda_graphs=False, skip_norm=0.0, laps=None):
    """One step on `accumulation` micro-batches; adds the loss's parts and the gradient norm to `record` (P + 1,), on the device.

    Where the norm is not finite, or above a `skip_norm` that is not 0, neither weights nor moments change; `is_bad` tells the
    host later. With `cuda_graphs` the gradients keep their memory, too. `laps` receives (start, end) of what this rank does
    without others: waiting for data, and the forward passes (of divided blocks without the gathering of their parameters).
    """
    for part in range(accumulation):
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with timed(laps):
            batch = next(batches)
        with microbatch(objective, part == accumulation - 1):
            with autocast(), timed_forward(objective, laps):
                loss, parts = objective(batch)
            (loss * world).backward()  # DDP and FSDP average over ranks; the weights already do
        record[:-1] += parts
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters]))
    nn.utils.clip_grads_with_norm_(parameters, clip or float("inf"), norm)
    record[-1] += norm
    optimizer.found_inf = (~(norm <= (skip_norm or torch.finfo(norm.dtype).max))).to(torch.float32)  # AdamW's kernel reads it: no sync
    optimizer.step()
    optimizer.zero_grad(set_to_none=not cuda_graphs)


@contextlib.contextmanager
def timed(laps):
    """Append (start, end) of what the host does meanwhile."""
    start = time.perf_counter()
    yield
    if laps is not None:
        laps.append((start, time.perf_counter()))


@contextlib.contextmanager
def timed_forward(objective, laps):
    """Append (start, end), as the device sees them, of the forward pass, or of its divided blocks."""
    if is_sharded(objective):
        objective.laps = laps
        yield
        objective.laps = None
    else:
        device = next(objective.parameters()).device
        start = timestamp(device) if laps is not None else None
        yield
        if laps is not None:
            laps.append((start, timestamp(device)))


def is_bad(norm, skip_norm):
    """Whether a step with this gradient norm was skipped."""
    return not norm <= (skip_norm or torch.finfo(torch.float32).max)


# --------------------------------------------------------------------------------------- batches to the device


# ----------------------------------------------------------------------------------------- figures to the host


