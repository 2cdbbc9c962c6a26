"""One optimizer step: batches to the device, loss and gradients, the update, the figures back to the host.

The device never waits for the host here, nor the host for the device: shapes are static, batches arrive on a
stream of their own, and losses are read when they have arrived.
"""

import contextlib
import inspect
import platform
import queue
import threading
import time
from collections import deque

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import diffusion

# Dense bf16 peak in FLOP/s, for MFU: the first name that occurs in the device's.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12, "H200": 989e12, "B200": 2250e12,
        "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}

# The rotary tables never change: no need to broadcast them. Newer torch calls that setting by another name.
BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters else "broadcast_buffers"


def peak_flops(device):
    """The datasheet's dense bf16 FLOP/s of a GPU, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK.items() if known in name), None)


def has_bf16(device):
    """Whether the hardware multiplies bfloat16 matrices itself; oneDNN also emulates it, slowly, on AVX-512."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ------------------------------------------------------------------------------------------ what is optimized


class Objective(nn.Module):
    """The network with its loss, as one module for DDP and torch.compile. Batch → loss (), its parts (P,)."""

    def __init__(self, network, posterior):
        super().__init__()
        self.network, self.posterior = network, posterior
        self.loss_of = diffusion.loss_and_parts  # a name of its own: `blocks` compiles it by itself

    def forward(self, batch):
        hidden = self.network(batch.tokens, batch.time, batch.documents, batch.index, batch.positions)
        return self.loss_of(hidden, self.network.head, batch, self.network.config.n_vocab, self.posterior)


def compiled(objective, how, world, cuda_graphs=False):
    """`objective` ready to be called and differentiated, over `world` ranks; how: whole, blocks or no.

    whole: one graph, fused across layers. Under DDP the compiler is put around it: DDP's buckets then split
    the backward graph, so that their communication overlaps with it. blocks: each block by itself (all but
    the last share one compilation: minutes saved at 28 layers) and the loss; DDP's hooks fire between them.
    """
    if how == "blocks":
        for module in (*objective.network.blocks, objective.network.norm):
            module.compile(dynamic=False, fullgraph=True)
        objective.loss_of = torch.compile(diffusion.loss_and_parts, dynamic=False, fullgraph=True)
    if world > 1:
        device = objective.network.embed.weight.device
        objective = DistributedDataParallel(objective, device_ids=[device] if device.type == "cuda" else None,
                                            gradient_as_bucket_view=True, **{BUFFERS: False})
    if cuda_graphs:  # gradients of our own: those that a graph returns lie in its memory, which the next replay overwrites
        for p in objective.parameters():
            p.grad = torch.zeros_like(p)
    if how == "whole":
        objective = torch.compile(objective, dynamic=False, fullgraph=world == 1,
                                  options={"triton.cudagraphs": True} if cuda_graphs else None)
    return objective


def make_optimizer(network, lr, betas, weight_decay):
    """AdamW in one kernel per group; weight decay on matrices and embeddings only."""
    groups = [
        dict(params=[p for p in network.parameters() if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in network.parameters() if p.dim() < 2], weight_decay=0.0),
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def optimizer_step(objective, optimizer, batches, accumulation, record, clip, autocast, world=1, cuda_graphs=False):
    """One step on `accumulation` micro-batches; adds the loss's parts and the gradient norm to `record` (P + 1,), on the device.

    With `cuda_graphs` the gradients keep their memory, too.
    """
    for part, batch in zip(range(accumulation), batches):
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with contextlib.nullcontext() if world == 1 or part == accumulation - 1 else objective.no_sync():
            with autocast():
                loss, parts = objective(batch)
            (loss * world).backward()  # DDP averages over ranks; the weights already do
        record[:-1] += parts
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    record[-1] += nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=not cuda_graphs)


# --------------------------------------------------------------------------------------- batches to the device


def to_tensors(batch, pin):
    tensors = (None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in batch)
    return diffusion.Batch(*(t.pin_memory() if pin and t is not None else t for t in tensors))


def to_device(batch, device):
    return diffusion.Batch(*(None if t is None else t.to(device, non_blocking=True) for t in batch))


def prefetched(batches, depth=4):
    """Iterate over a generator that runs in a thread, `depth` items ahead; its exceptions arrive here."""
    ready, done = queue.Queue(depth), threading.Event()

    def offer(item):  # never blocks for good: the consumer may have left
        while not done.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def produce():
        try:
            for item in batches:
                offer(item)
                if done.is_set():
                    return
            offer(StopIteration())
        except BaseException as problem:
            offer(problem)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, StopIteration):
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        done.set()
        thread.join()


def uploaded(batches, device):
    """Iterate over pinned batches as batches on `device`, each copied while the one before it is computed."""
    stream, ahead = torch.cuda.Stream(device), deque()
    with contextlib.closing(batches):
        for batch in batches:
            with torch.cuda.stream(stream):
                ahead.append((to_device(batch, device), stream.record_event()))
            if len(ahead) == 2:
                yield handed_over(*ahead.popleft())
    while ahead:
        yield handed_over(*ahead.popleft())


def handed_over(batch, arrived):
    """A batch for the current stream, which waits for its copy; the allocator learns who uses it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(arrived)
    for tensor in batch:
        if tensor is not None:
            tensor.record_stream(stream)
    return batch


# ----------------------------------------------------------------------------------------- figures to the host


class Arriving:
    """Values on their way to the host, and the moment when the device had finished them."""

    def __init__(self, values):
        self.moment, self.copied = moment(values.device), None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()
        else:
            self.values = values.clone()

    def here(self, wait=False):
        """Whether `values` can be read; with `wait` they can."""
        if self.copied and wait:
            self.copied.synchronize()
        return not self.copied or self.copied.query()


def moment(device):
    """Now, as the device sees it: after all the work that it has been given."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds(start, end):
    """Time between two moments that have passed."""
    return start.elapsed_time(end) / 1e3 if isinstance(start, torch.cuda.Event) else end - start

