"""Batches to the device, figures back to the host, and the clock of the device: neither side waits for the other."""

import contextlib
import queue
import threading
import time
from collections import deque

import numpy as np
import torch

import diffusion


def to_tensors(batch, pin):
    tensors = (None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in batch)
    return diffusion.Batch(*(t.pin_memory() if pin and t is not None else t for t in tensors))


def to_device(batch, device):
    return diffusion.Batch(*(None if t is None else t.to(device, non_blocking=True) for t in batch))


def prefetch(batches, depth=4):
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


def upload(batches, device):
    """Iterate over pinned batches as batches on `device`, each copied while the one before it is computed."""
    stream, ahead = torch.cuda.Stream(device), deque()
    with contextlib.closing(batches):
        for batch in batches:
            with torch.cuda.stream(stream):
                ahead.append((to_device(batch, device), stream.record_event()))
            if len(ahead) == 2:
                yield use_on_current_stream(*ahead.popleft())
    while ahead:
        yield use_on_current_stream(*ahead.popleft())


def use_on_current_stream(batch, arrived):
    """A batch for the current stream, which waits for its copy; the allocator learns who uses it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(arrived)
    for tensor in batch:
        if tensor is not None:
            tensor.record_stream(stream)
    return batch


class AsyncCopy:
    """Values on their way to the host, and the moment when the device had finished them."""

    def __init__(self, values):
        self.moment, self.copied = timestamp(values.device), None
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


def timestamp(device):
    """Now, as the device sees it: after all the work that it has been given."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    """Time between two moments; waits until the second has passed."""
    if isinstance(end, torch.cuda.Event):
        end.synchronize()
    return start.elapsed_time(end) / 1e3 if isinstance(start, torch.cuda.Event) else end - start
