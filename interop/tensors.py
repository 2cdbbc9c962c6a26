"""Tensors on disk, one at a time: what other programs wrote is read without running anything in it, and never more than the
tensor that is asked for is in memory.

safetensors are plain data. torch's files are pickles: torch's own weights-only unpickler reads them, and the few classes that
honest checkpoints hold beside tensors (arguments, enums of the framework, random states) become inert stand-ins; a file that
names anything else is refused. torch.distributed.checkpoint's folders have such a file around every chunk of a tensor.
"""

import argparse
import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

BLOCK = 64 << 20  # bytes of a tensor that are in memory at a time where its rows can be read by themselves


class Lazy(NamedTuple):
    """A tensor that is read when it is wanted."""

    shape: tuple
    dtype: torch.dtype
    read: Callable  # () → the tensor
    pieces: Callable | None = None  # () → its rows in several parts, one after the other

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def parts(self):
        """Its rows, in as many parts as its file allows."""
        return self.pieces() if self.pieces else iter((self.read(),))

    def to(self, dtype, name=""):
        """In another dtype; reading raises ValueError where values get lost that this can't hold."""
        if dtype == self.dtype:
            return self

        def rounded(values):
            out = values.to(dtype)
            if not torch.equal(out.isfinite(), values.isfinite()):
                raise ValueError(f"{name}: {str(dtype).removeprefix('torch.')} can't hold values as large as {values[values.isfinite()].abs().max():.3g}")
            return out

        return Lazy(self.shape, dtype, lambda: rounded(self.read()), lambda: map(rounded, self.parts()))

    def with_rows(self, rows):
        """Its first rows, or filled up with rows of zeros."""
        if rows == self.shape[0]:
            return self

        def pieces():
            left = rows
            for part in self.parts():
                yield part[:left]
                left -= min(left, len(part))
            if left:
                yield torch.zeros(left, *self.shape[1:], dtype=self.dtype)

        return joined((rows, *self.shape[1:]), self.dtype, pieces)


def joined(shape, dtype, pieces):
    """A Lazy of parts that follow one another."""

    def read():
        out, at = torch.empty(shape, dtype=dtype), 0
        for part in pieces():
            out[at : at + len(part)] = part
            at += len(part)
        return out

    return Lazy(tuple(shape), dtype, read, pieces)


def blocks(shape, dtype):
    """(first, last + 1) of the rows that are read together."""
    rows = max(1, BLOCK // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return [(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows)]


def plain(values, file, but=()):
    """{name: tensor} of what is a tensor in a dictionary somebody wrote, without names that end in one of `but`; raises ValueError for tensors that are no weights."""
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no dictionary of tensors")
    out = {name: value for name, value in values.items() if isinstance(name, str) and isinstance(value, torch.Tensor) and not name.endswith(but)}
    for name, value in out.items():
        if value.layout != torch.strided or value.device.type != "cpu" or not value.dim():
            raise ValueError(f"{file}: {name!r} is no array of weights")
    return out


# ------------------------------------------------------------------------------------------------------- pickles

FRAMEWORKS = ("megatron.", "transformer_engine.", "apex.")
HARMLESS = {"numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.ndarray", "numpy.dtype",
            "_codecs.encode", "_io.BytesIO", "io.BytesIO", "signal.Signals", "pathlib.PosixPath", "pathlib._local.PosixPath", "datetime.timedelta", "datetime.datetime", "builtins.slice",
            "types.SimpleNamespace", "torch.nn.functional.silu", "torch._C._nn.gelu"}  # as they are found beside the weights, each only a name here


class StandIn:
    """In the place of an object that nobody needs: it keeps what it is given, and calls nothing."""

    def __init__(self, *values):
        self.values = values

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class Refused(ValueError):
    """What a file refers to may run code."""


def refuse(path, name):
    raise Refused(f"{path} refers to {name!r}, which no checkpoint needs: it may run code, so the file is refused, and nothing in it was run")


def load(path, at=None, **how):
    """torch.load of a file, or of the part of it that `at` = (offset, length) says, on the CPU; raises ValueError or OSError.

    how: mmap=True maps a file of today's format instead of reading it; map_location.
    """
    try:
        with Window(path, *at) if at else open(path, "rb") as file:
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else [*HARMLESS]  # an old file names them as it is read
            for name in names:
                if name != "argparse.Namespace" and name not in HARMLESS and not name.startswith(FRAMEWORKS):
                    refuse(path, name)
            file.seek(0)
            known = [argparse.Namespace, *((StandIn, name) for name in names if name != "argparse.Namespace")]
            how = dict(map_location="cpu") | how
            with torch.serialization.safe_globals(known):
                if is_zip and how.get("mmap"):
                    return torch.load(path, weights_only=True, **how)  # it maps files by their names only
                return torch.load(file, weights_only=True, map_location=how["map_location"])
    except Refused:
        raise
    except pickle.UnpicklingError as problem:
        if "GLOBAL " in str(problem):
            refuse(path, str(problem).partition("GLOBAL ")[2].split()[0])
        raise ValueError(f"{path} can't be read: it is no file of torch's, or holds more than tensors") from None
    except OSError as problem:
        if problem.filename is not None:  # it can't be opened
            raise
        raise ValueError(f"{path} can't be read: it is cut short or damaged ({problem})") from None  # torch seeks before its beginning
    except Exception as problem:  # a damaged file can raise almost anything
        raise ValueError(f"{path} can't be read: {first_line(problem)}") from None


def first_line(problem):
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0].partition('. ')[0]}" if lines else f"{type(problem).__name__}: it is cut short or damaged"


class Window(io.RawIOBase):
    """Bytes offset … offset + length of a file, as a file."""

    def __init__(self, path, offset, length):
        self.file, self.offset, self.length = open(path, "rb"), offset, length
        self.seek(0)

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.file.tell() - self.offset

    def seek(self, to, whence=io.SEEK_SET):
        self.file.seek(self.offset + to + {io.SEEK_SET: 0, io.SEEK_CUR: self.tell() if whence == io.SEEK_CUR else 0, io.SEEK_END: self.length}[whence])
        return self.tell()

    def readinto(self, buffer):
        room = max(0, self.length - self.tell())
        return self.file.readinto(memoryview(buffer)[:room])

    def close(self):
        self.file.close()
        super().close()


class MetadataUnpickler(pickle.Unpickler):
    """For torch.distributed.checkpoint's .metadata, a plain pickle: of its classes only the values are kept, and nothing else is let in.

    What a pickle gets hold of it may also change (BUILD sets attributes): so it never meets a class that somebody uses.
    """

    ITS_OWN = ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")
    OTHERS = {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
    OLD = ("torch.distributed._shard.sharded_tensor.metadata",)  # where torch 2.2 and before had the properties
    DTYPES = {str(dtype).partition(".")[2]: dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

    def __init__(self, file, path):
        super().__init__(file)
        self.path, self.kinds = path, {}

    def find_class(self, module, name):
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        if module == "torch.distributed.checkpoint.metadata" and name in self.ITS_OWN or (module, name) in self.OTHERS or module in self.OLD or module.startswith(FRAMEWORKS):
            return self.kinds.setdefault(name, type(name, (StandIn,), {}))
        return refuse(self.path, f"{module}.{name}")


class Chunk(NamedTuple):
    """A part of a tensor, and where its bytes are: a file's name, and in it a file of torch's from `at`, `length` bytes long."""

    offsets: tuple
    sizes: tuple
    file: str
    at: int
    length: int


def load_metadata(path):
    """{name: (shape, dtype, [Chunk])} of the tensors that a torch.distributed.checkpoint folder's .metadata describes; raises ValueError."""
    out = {}
    try:
        with open(path, "rb") as file:
            found = MetadataUnpickler(file, path).load()
        where = {(index.fqn, tuple(index.offset)): info for index, info in found.storage_data.items() if getattr(index, "offset", None) is not None}
        for name, about in found.state_dict_metadata.items():
            if type(about).__name__ != "TensorStorageMetadata":
                continue
            shape, dtype, chunks = torch.Size(about.size), about.properties.state[0], []
            if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
                raise TypeError(f"{name!r} is no tensor")
            for chunk in about.chunks:
                offsets, sizes = torch.Size(chunk.offsets), torch.Size(chunk.sizes)
                info = where.get((name, tuple(offsets)))
                if info is None or Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"where the chunk of {name} at {tuple(offsets)} is, it doesn't say")
                if not len(shape) == len(offsets) == len(sizes) or min(info.offset, info.length) < 0:
                    raise ValueError(f"what it says of {name} contradicts itself")
                chunks.append(Chunk(tuple(offsets), tuple(sizes), info.relative_path, int(info.offset), int(info.length)))
            out[name] = tuple(shape), dtype, chunks
    except (Refused, OSError):
        raise
    except Exception as problem:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path} can't be read: {first_line(problem)}") from None
    return out


def raw_tensor(path, offset, length):
    """(dtype, shape, offset of its bytes in the file) of a contiguous tensor that torch.save wrote at `offset`; raises ValueError."""
    tensor = load(path, (offset, length), map_location="meta")
    if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous() or tensor.storage_offset():
        raise ValueError(f"{Path(path).name} at {offset}: no plain tensor")
    with Window(path, offset, length) as window, zipfile.ZipFile(window) as archive:
        record = next((info for info in archive.infolist() if info.filename.rpartition("/data/")[1] and info.filename.endswith("/0")), None)
        if record is None or record.compress_type != zipfile.ZIP_STORED or record.file_size < tensor.numel() * tensor.element_size():
            raise ValueError(f"{Path(path).name} at {offset}: no plain tensor")
        window.seek(record.header_offset + 26)  # the local header's own name and extra field come before the data
        name, extra = (int.from_bytes(window.read(2), "little") for _ in range(2))
        return tensor.dtype, tensor.shape, offset + record.header_offset + 30 + name + extra


# --------------------------------------------------------------------------------------------- files of tensors


def of_torch(file):
    """{name: Lazy} of a state dict that torch.save wrote; raises ValueError."""
    values = plain(load(file, mmap=True), file)
    mapped = zipfile.is_zipfile(file)

    def reading(name):
        # what is mapped is mapped anew, so that what was read before can go; a file of before torch 1.6 can only be read whole
        return lambda: load(file, mmap=True)[name] if mapped else values[name]

    return {name: Lazy(tuple(t.shape), t.dtype, reading(name)) for name, t in values.items()}


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def of_safetensors(file):
    """{name: Lazy} of a .safetensors file; raises ValueError."""

    def lazy(name, shape, dtype):
        def read():
            with safe_open(file, "pt") as tensors:  # mapped anew, so that what was read before can go
                return tensors.get_tensor(name)

        def pieces():
            for first, end in blocks(shape, dtype):
                with safe_open(file, "pt") as tensors:
                    part = tensors.get_slice(name)[first:end]
                yield part

        return Lazy(shape, dtype, read, pieces if len(shape) and math.prod(shape) else None)

    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}
            return {name: lazy(name, tuple(part.get_shape()), DTYPES[part.get_dtype()]) for name, part in parts.items()}
    except (SafetensorError, KeyError) as problem:
        raise ValueError(f"{file} can't be read: {first_line(problem)}") from None


def write_safetensors(file, tensors, alive=lambda n: None):
    """Write {name: Lazy} as a .safetensors file, tensor by tensor; `alive` is told of the bytes of each. Raises ValueError, OSError."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[end, end + tensor.nbytes])
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            written = 0
            for values in tensor.parts():
                if tuple(values.shape[1:]) != tensor.shape[1:] or values.dtype != tensor.dtype:
                    raise ValueError(f"{name} is {tuple(values.shape)} {values.dtype}, and was said to be {tensor.shape} {tensor.dtype}")
                written += out.write(memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy()))
                alive(values.nbytes)
            if written != tensor.nbytes:
                raise ValueError(f"{name} has {written} bytes, and was said to have {tensor.nbytes}")


class Divided:
    """A tensor of a torch.distributed.checkpoint folder, in chunks, of which any region can be read."""

    def __init__(self, folder, name, shape, dtype, chunks):
        self.folder, self.name, self.shape, self.dtype, self.chunks, self.places = folder, name, shape, dtype, chunks, {}

    def read(self, start=None, stop=None):
        """The values from `start` to `stop` (a number for each dimension); raises ValueError where some are not there."""
        start, stop = start or (0,) * len(self.shape), stop or self.shape
        out, found = torch.empty([b - a for a, b in zip(start, stop)], dtype=self.dtype), 0
        for chunk in self.chunks:
            low = [max(a, o) for a, o in zip(start, chunk.offsets)]
            high = [min(b, o + s) for b, o, s in zip(stop, chunk.offsets, chunk.sizes)]
            if all(a < b for a, b in zip(low, high)):
                rows = self.rows(chunk, low[0] - chunk.offsets[0], high[0] - chunk.offsets[0])
                inside = tuple(slice(a - o, b - o) for a, b, o in zip(low[1:], high[1:], chunk.offsets[1:]))
                out[tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))] = rows[(slice(None), *inside)]
                found += math.prod(b - a for a, b in zip(low, high))
        if found != out.numel():
            raise ValueError(f"{self.folder}: {found:,} of {out.numel():,} values of {self.name} are there")
        return out

    def parts(self):
        for first, end in blocks(self.shape, self.dtype):
            yield self.read((first, *(0 for _ in self.shape[1:])), (end, *self.shape[1:]))

    def rows(self, chunk, first, last):
        """Rows first … last − 1 of a chunk."""
        file = self.folder / chunk.file
        if chunk not in self.places:
            dtype, shape, at = raw_tensor(file, chunk.at, chunk.length)
            if (dtype, tuple(shape)) != (self.dtype, chunk.sizes):
                raise ValueError(f"{file}: a chunk of {self.name} is {tuple(shape)} {dtype}, and should be {chunk.sizes} {self.dtype}")
            self.places[chunk] = at
        out = torch.empty((last - first, *chunk.sizes[1:]), dtype=self.dtype)
        row = math.prod(chunk.sizes[1:]) * self.dtype.itemsize
        with open(file, "rb") as data:
            data.seek(self.places[chunk] + first * row)
            if data.readinto(memoryview(out.view(-1).view(torch.uint8).numpy())) != (last - first) * row:
                raise ValueError(f"{file} is cut short")
        return out


def of_distributed(folder):
    """{name: Divided} of a folder that torch.distributed.checkpoint wrote; raises ValueError or OSError."""
    return {name: Divided(Path(folder), name, *about) for name, about in load_metadata(Path(folder) / ".metadata").items()}
