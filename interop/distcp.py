"""Read folders of torch.distributed.checkpoint: any region of a tensor, with nothing else in memory.

Such a folder has .metadata, which tells where the chunks of each tensor lie, and .distcp files, in which
each chunk is a torch.save file of its own.
"""

import math
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from corpus.files import open_regular
from interop import pickles
from interop.pickles import MetadataUnpickler, RefusedPickle, one_line
from interop.tensors import row_ranges


class Chunk(NamedTuple):
    """A region of a tensor, and the bytes of a file that hold it, as torch.save wrote it."""

    offsets: tuple
    sizes: tuple
    file: str
    position: int
    length: int


class Place(NamedTuple):
    """The bytes of a file that hold an object, as torch.save wrote it."""

    file: str
    position: int
    length: int


def open_folder(folder):
    """({name: ShardedTensor}, {name: Place} of other objects) of a folder; raises ValueError or OSError."""
    tensors, objects = read_metadata(Path(folder) / ".metadata")
    return {name: ShardedTensor(Path(folder), name, *about) for name, about in tensors.items()}, objects


def read_object(folder, place):
    """What torch.save wrote at a Place, of harmless classes only; raises ValueError or OSError."""
    return pickles.load(Path(folder) / place.file, (place.position, place.length))


def read_metadata(path):
    """({name: (shape, dtype, [Chunk])} of tensors, {name: Place} of other objects) by a .metadata file.

    Raises ValueError or OSError.
    """
    try:
        with open_regular(path) as file:
            metadata = MetadataUnpickler(file, path).load()
        locations = {(index.fqn, tuple(index.offset)): location
                     for index, location in metadata.storage_data.items()
                     if getattr(index, "offset", None) is not None}
        objects = {index.fqn: Place(*find_place(index.fqn, location))
                   for index, location in metadata.storage_data.items()
                   if getattr(index, "offset", None) is None}
        tensors = {}
        for name, about in metadata.state_dict_metadata.items():
            if type(about).__name__ != "TensorStorageMetadata":
                continue
            shape, dtype = torch.Size(about.size), about.properties.state[0]
            if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
                raise TypeError(f"{name!r} is no tensor")
            chunks = [locate_chunk(name, shape, chunk, locations) for chunk in about.chunks]
            tensors[name] = tuple(shape), dtype, chunks
        return tensors, objects
    except (RefusedPickle, OSError):
        raise
    except Exception as problem:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path} can't be read: {one_line(problem)}") from None


def locate_chunk(name, shape, described, locations):
    """The Chunk that .metadata describes, with its location; raises ValueError where the two can't be."""
    offsets, sizes = torch.Size(described.offsets), torch.Size(described.sizes)
    place = find_place(f"the chunk of {name} at {tuple(offsets)}", locations.get((name, tuple(offsets))))
    if not len(shape) == len(offsets) == len(sizes):
        raise ValueError(f"the description of {name} contradicts itself")
    return Chunk(tuple(offsets), tuple(sizes), *place)


def find_place(what, location):
    """(file, position, length) of a location that .metadata gives; raises ValueError where it is none."""
    if location is None or Path(location.relative_path).name != location.relative_path:
        raise ValueError(f"no place is given for {what}")
    position, length = int(location.offset), int(location.length)
    if min(position, length) < 0:
        raise ValueError(f"the place of {what} contradicts itself")
    return location.relative_path, position, length


def find_values(path, position, length):
    """(dtype, shape, byte at which the values begin) of a contiguous tensor.

    torch.save wrote it at `position` of the file, `length` bytes long. Raises ValueError.
    """
    tensor = pickles.load(path, (position, length), map_location="meta")
    problem = ValueError(f"{Path(path).name} at {position}: no plain tensor")
    if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
        raise problem
    # of a view, torch saves all that it is a part of
    skipped = tensor.storage_offset() * tensor.element_size()
    with pickles.FileSection(path, position, length) as section, zipfile.ZipFile(section) as archive:
        entry = next((info for info in archive.infolist() if info.filename.endswith("/data/0")), None)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise problem
        if entry.file_size < skipped + tensor.numel() * tensor.element_size():
            raise problem
        section.seek(entry.header_offset + 26)  # its header ends with the sizes of a name and an extra field
        name_size, extra_size = (int.from_bytes(section.read(2), "little") for _ in range(2))
    start = position + entry.header_offset + 30 + name_size + extra_size
    return tensor.dtype, tensor.shape, start + skipped


class ShardedTensor:
    """A tensor in chunks, of which any region can be read."""

    def __init__(self, folder, name, shape, dtype, chunks):
        self.folder = folder
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.chunks = chunks
        self.value_positions = {}  # {Chunk: byte of its file at which its values begin}

    def read(self, start=None, stop=None):
        """The values from `start` to `stop`, an index for each dimension; raises ValueError or OSError."""
        start = start or (0,) * len(self.shape)
        stop = stop or self.shape
        region = torch.empty([end - first for first, end in zip(start, stop)], dtype=self.dtype)
        n_read = 0
        for chunk in self.chunks:
            low = [max(first, offset) for first, offset in zip(start, chunk.offsets)]
            high = [min(end, offset + size) for end, offset, size in zip(stop, chunk.offsets, chunk.sizes)]
            if not all(a < b for a, b in zip(low, high)):
                continue
            rows = self.read_rows(chunk, low[0] - chunk.offsets[0], high[0] - chunk.offsets[0])
            columns = tuple(slice(a - offset, b - offset)
                            for a, b, offset in zip(low[1:], high[1:], chunk.offsets[1:]))
            place = tuple(slice(a - first, b - first) for a, b, first in zip(low, high, start))
            region[place] = rows[(slice(None), *columns)]
            n_read += math.prod(b - a for a, b in zip(low, high))
        if n_read != region.numel():
            raise ValueError(f"{self.folder}: only {n_read:,} of {region.numel():,} values of {self.name} "
                             "are there")
        return region

    def blocks(self):
        """Yield its rows in consecutive blocks."""
        for first, end in row_ranges(self.shape, self.dtype):
            yield self.read((first, *(0 for _ in self.shape[1:])), (end, *self.shape[1:]))

    def read_rows(self, chunk, first, end):
        """Rows first … end − 1 of a chunk; raises ValueError or OSError."""
        path = self.folder / chunk.file
        if chunk not in self.value_positions:
            dtype, shape, position = find_values(path, chunk.position, chunk.length)
            if (dtype, tuple(shape)) != (self.dtype, chunk.sizes):
                raise ValueError(f"{path}: a chunk of {self.name} is {tuple(shape)} {dtype}, and should be "
                                 f"{chunk.sizes} {self.dtype}")
            self.value_positions[chunk] = position
        rows = torch.empty((end - first, *chunk.sizes[1:]), dtype=self.dtype)
        row_bytes = math.prod(chunk.sizes[1:]) * self.dtype.itemsize
        with open_regular(path) as file:
            file.seek(self.value_positions[chunk] + first * row_bytes)
            n_read = file.readinto(memoryview(rows.view(-1).view(torch.uint8).numpy()))
        if n_read != (end - first) * row_bytes:
            raise ValueError(f"{path} is cut short")
        return rows
