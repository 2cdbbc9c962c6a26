"""The network with its loss as one module, and how it is compiled and wrapped for one rank or many."""

import contextlib
import inspect
import time

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import diffusion
import kernels
from training.distributed import SINGLE, is_sharded, shard
from training.transfer import seconds_between, timestamp

# The rotary tables never change: no need to broadcast them. Newer torch calls that setting by another name.
DDP_SETTINGS = inspect.signature(DistributedDataParallel).parameters
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_SETTINGS else "broadcast_buffers"


class Objective(nn.Module):
    """The network with its loss, as one module for DDP, FSDP and torch.compile: Batch → {"loss": (), …}.

    posterior: the network was trained with the `paper` loss, so its logits are the full posterior's.
    """

    def __init__(self, network, posterior):
        super().__init__()
        self.network, self.posterior = network, posterior
        self.loss_figures = diffusion.loss_figures  # an attribute: compile=blocks compiles it by itself

    def hidden(self, batch):
        """The network's hidden states for a batch."""
        return self.network(batch.tokens, batch.time, batch.documents, batch.index, batch.positions,
                            batch.visible, batch.clean)

    def forward(self, batch):
        n_vocab = self.network.config.n_vocab
        return self.loss_figures(self.hidden(batch), self.network.head, batch, n_vocab, self.posterior)

    def nats_at_positions(self, batch, likeliest=False):
        """The nats at each position of the batch, (C,) fp32; the caller weighs them. Never differentiated.

        With `likeliest` also each position's likeliest token, (C,), and its probability, (C,).
        """
        hidden = self.hidden(batch).flatten(0, -2)
        head, n_vocab = self.network.head, self.network.config.n_vocab
        weights = hidden.new_ones(len(hidden), dtype=torch.float32)
        _, nats = diffusion.loss_and_nats(hidden, head, batch, weights, n_vocab, self.posterior)
        if not likeliest:
            return nats
        with torch.autocast(hidden.device.type, enabled=False):  # in bf16 there are ties among the likeliest
            return nats, *kernels.linear_greedy(hidden.float(), head.float(), n_vocab)


class RankClock:
    """The seconds in which this rank computes without the others, in steps that are timed.

    A straggler shows there. Waiting for data counts, and the forward passes; of a sharded network only its
    blocks, without the gathering of their parameters.
    """

    def __init__(self, device):
        self.device, self.running, self.in_forward_pass = device, False, False
        self.spans, self.block_start = [], None

    @contextlib.contextmanager
    def data(self):
        """Time the host's work inside."""
        start = time.perf_counter()
        yield
        if self.running:
            self.spans.append((start, time.perf_counter()))

    @contextlib.contextmanager
    def forward_pass(self, objective):
        """Time the forward pass inside, as the device sees it."""
        if not self.running:
            yield
        elif is_sharded(objective):
            self.in_forward_pass = True
            yield
            self.in_forward_pass = False
        else:
            start = timestamp(self.device)
            yield
            self.spans.append((start, timestamp(self.device)))

    def begin_block(self, *_):
        """A block's forward hook: its parameters are there."""
        if self.in_forward_pass:
            self.block_start = timestamp(self.device)

    def end_block(self, *_):
        if self.in_forward_pass:
            self.spans.append((self.block_start, timestamp(self.device)))

    def reset(self):
        """Forget what was timed; returns its seconds."""
        spans, self.spans = self.spans, []
        return sum(seconds_between(*span) for span in spans)


def compile_and_wrap(objective, compile, ranks=SINGLE, layout="no", shard_size=0, dtype=torch.float32,
                     device=None, cuda_graphs=False, clock=None):
    """`objective` ready to be called and differentiated over `ranks`; layout as in distributed.shard.

    compile=whole: one graph, fused across layers. Under DDP the compiler is put around it: DDP's buckets then
    split the backward graph, so that their communication overlaps with it. compile=blocks: each block by
    itself (all but the last share one compilation: minutes saved at 28 layers) and the loss; the hooks of DDP
    and FSDP work between them.

    A sharded network is on the meta device when it comes, and afterwards has memory for its shards, without
    values; `clock` (RankClock) then times its blocks.
    """
    network = objective.network
    if compile == "blocks":
        for module in (*network.blocks, network.norm):  # their forward, so that FSDP's hooks stay outside
            module.forward = torch.compile(module.forward, dynamic=False, fullgraph=True)
        objective.loss_figures = torch.compile(objective.loss_figures, dynamic=False, fullgraph=True)
    if layout != "no":
        shard(objective, layout, ranks, device, shard_size, dtype).to_empty(device=device)
        network.init_tables()
        for block in network.blocks if clock else ():  # after FSDP's own hook, which waits for the others
            block.register_forward_pre_hook(clock.begin_block)
            block.register_forward_hook(clock.end_block)
    elif ranks.world > 1:
        device = network.embed.weight.device
        objective = DistributedDataParallel(
            objective, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True,
            init_sync=False, **{BUFFERS: False})  # all ranks begin alike
    if cuda_graphs:  # gradients of our own: a graph's lie in its memory, which the next replay overwrites
        for p in objective.parameters():
            p.grad = torch.zeros_like(p)
    if compile == "whole":
        options = {"triton.cudagraphs": True} if cuda_graphs else None
        objective = torch.compile(objective, dynamic=False, fullgraph=ranks.world == 1, options=options)
    return objective


def fix_bucket_order(objective, batch, autocast):
    """Run and discard one forward/backward pass, so that DDP fixes its bucket order before the first step.

    Then every step sums the gradients of all ranks in the same order, be it the run's first or the first
    after it was resumed: four ranks add up to the same bits.
    """
    with autocast():
        loss = objective(batch)["loss"]
    (0 * loss).backward()
    objective.zero_grad(set_to_none=True)
