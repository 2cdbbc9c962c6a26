"""Tensors on disk, one in memory at a time: .safetensors read and written, torch.save's files read."""

import json
import math
import zipfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from corpus.files import check_file
from interop import pickles
from interop.pickles import one_line
from training.weights import SAFETENSORS_DTYPES

BLOCK_BYTES = 64 << 20  # memory for a block of rows, where a file lets them be read alone


class LazyTensor(NamedTuple):
    """A tensor that is read when its values are needed."""

    shape: tuple
    dtype: torch.dtype
    read: Callable  # () → the tensor
    read_blocks: Callable | None = None  # () → its rows in consecutive blocks, where they can be read alone

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self):
        """Its rows in consecutive blocks, as small as its file allows."""
        return self.read_blocks() if self.read_blocks else iter((self.read(),))

    def cast(self, dtype, name):
        """The tensor in another dtype; reading raises ValueError, naming it, where a value is too large."""
        if dtype == self.dtype:
            return self
        return LazyTensor(self.shape, dtype, lambda: cast_values(self.read(), dtype, name),
                          lambda: (cast_values(block, dtype, name) for block in self.blocks()))

    def with_rows(self, n_rows):
        """The tensor cut after `n_rows` rows, or filled up with rows of zeros."""
        if n_rows == self.shape[0]:
            return self

        def read_blocks():
            missing = n_rows
            for block in self.blocks():
                yield block[:missing]
                missing -= min(missing, len(block))
            if missing:
                yield torch.zeros(missing, *self.shape[1:], dtype=self.dtype)

        return from_blocks((n_rows, *self.shape[1:]), self.dtype, read_blocks)


def cast_values(values, dtype, name):
    """`values` in another dtype; raises ValueError where one becomes infinite."""
    rounded = values.to(dtype)
    if not torch.equal(rounded.isfinite(), values.isfinite()):
        largest = values[values.isfinite()].abs().max()
        dtype_name = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name}: {dtype_name} can't hold values as large as {largest:.3g}")
    return rounded


def from_blocks(shape, dtype, read_blocks):
    """The LazyTensor whose rows `read_blocks()` yields in consecutive blocks."""

    def read():
        values = torch.empty(shape, dtype=dtype)
        row = 0
        for block in read_blocks():
            values[row : row + len(block)] = block
            row += len(block)
        return values

    return LazyTensor(tuple(shape), dtype, read, read_blocks)


def row_ranges(shape, dtype):
    """[(first, end)] of the rows that are read together."""
    step = max(1, BLOCK_BYTES // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return [(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


# ----------------------------------------------------------------------------------------- torch.save's files


def open_torch(path):
    """{name: LazyTensor} of a state dict that torch.save wrote; raises ValueError or OSError."""
    tensors = select_tensors(pickles.load(path, mmap=True), path)
    is_mapped = zipfile.is_zipfile(path)  # torch before 1.6 wrote no archives: such a file is read whole
    read = partial(reread, path) if is_mapped else tensors.__getitem__
    return {name: LazyTensor(tuple(t.shape), t.dtype, partial(read, name)) for name, t in tensors.items()}


def reread(path, name):
    """A tensor of a file that is mapped anew, so that the pages of the tensor before it can be freed."""
    return pickles.load(path, mmap=True)[name]


def select_tensors(values, path, skip=()):
    """{name: tensor} of a dictionary's tensors, without names that end in one of `skip`.

    Raises ValueError where one can't be a weight.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no dictionary of tensors")
    tensors = {name: value for name, value in values.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor) and not name.endswith(skip)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.dim():
            raise ValueError(f"{path}: {name!r} is no array of weights")
    return tensors


# ------------------------------------------------------------------------------------------------ safetensors


def open_safetensors(path):
    """{name: LazyTensor} of a .safetensors file; raises ValueError."""
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: lazy_safetensor(path, name, tensor) for name, tensor in slices.items()}
    except (SafetensorError, KeyError) as problem:
        raise ValueError(f"{path} can't be read: {one_line(problem)}") from None


def lazy_safetensor(path, name, tensor):
    """The LazyTensor of a slice that `safe_open` has given."""
    shape, dtype = tuple(tensor.get_shape()), SAFETENSORS_DTYPES[tensor.get_dtype()]
    has_rows = len(shape) > 0 and math.prod(shape) > 0
    read_blocks = partial(safetensor_blocks, path, name, shape, dtype) if has_rows else None
    return LazyTensor(shape, dtype, partial(read_safetensor, path, name), read_blocks)


def read_safetensor(path, name):
    with safe_open(path, "pt") as file:  # mapped anew, so that the pages of the tensor before it can be freed
        return file.get_tensor(name)


def safetensor_blocks(path, name, shape, dtype):
    for first, end in row_ranges(shape, dtype):
        with safe_open(path, "pt") as file:
            block = file.get_slice(name)[first:end]
        yield block


def write_safetensors(path, tensors, on_progress=lambda n_bytes: None):
    """Write {name: LazyTensor} as a .safetensors file, tensor by tensor.

    `on_progress` is called with the bytes of each block that has been written. Raises ValueError or OSError.
    """
    dtype_names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype, shape = dtype_names[tensor.dtype], list(tensor.shape)
        header[name] = dict(dtype=dtype, shape=shape, data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            n_written = 0
            for block in tensor.blocks():
                if tuple(block.shape[1:]) != tensor.shape[1:] or block.dtype != tensor.dtype:
                    raise ValueError(f"{name} is {tuple(block.shape)} {block.dtype}, and should be "
                                     f"{tensor.shape} {tensor.dtype}")
                n_written += file.write(memoryview(block.contiguous().reshape(-1).view(torch.uint8).numpy()))
                on_progress(block.nbytes)
            if n_written != tensor.nbytes:
                raise ValueError(f"{name} has {n_written} bytes, and should have {tensor.nbytes}")
