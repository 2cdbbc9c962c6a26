"""Batches to the device, figures back to the host, and the device's clock: neither side waits for the other.

Batches arrive on a stream of their own, and figures are read when they have arrived.
"""

import contextlib
import queue
import threading
import time
from collections import deque

import numpy as np
import torch

import diffusion

# ------------------------------------------------------------------------------------- batches to the device


def feed(batches, device):
    """Iterate over a generator of batches of arrays as batches on `device`.

    On a GPU they are made in a thread, some ahead, and copied while the one before is computed; on a CPU a
    thread would only take time from the step's own.
    """
    if device.type != "cuda":
        return (to_tensors(batch) for batch in batches)
    return upload(prefetch(to_tensors(batch, pin=True) for batch in batches), device)


def to_tensors(batch, pin=False):
    """A batch of arrays as tensors on the host; `pin` puts them where a GPU can fetch them by itself."""
    tensors = (None if array is None else torch.from_numpy(np.ascontiguousarray(array)) for array in batch)
    if pin:
        tensors = (None if tensor is None else tensor.pin_memory() for tensor in tensors)
    return diffusion.Batch(*tensors)


def to_device(batch, device):
    """A batch of tensors on `device`; from pinned memory the copy goes on in the background."""
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


def use_on_current_stream(batch, copied):
    """Let the current stream wait for the copy of a batch, and tell the allocator who uses it."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)
    for tensor in batch:
        if tensor is not None:
            tensor.record_stream(stream)
    return batch


# --------------------------------------------------------------------------------------- figures to the host


class AsyncCopy:
    """Values on their way to the host, and the time at which the device had finished them."""

    def __init__(self, values):
        self.timestamp, self.copied = timestamp(values.device), None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()
        else:
            self.values = values.clone()

    def ready(self, wait=False):
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
    """Time between two timestamps; waits until the second has passed."""
    if isinstance(end, torch.cuda.Event):
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    return end - start
