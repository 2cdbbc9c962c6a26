"""Megatron's MMapIndexedDataset: tokens in PREFIX.bin, and where sequences and documents start in PREFIX.idx.

The index holds, one after the other:

    b"MMIDIDX\\0\\0"   uint64 version = 1   uint8 code of the tokens' type
    uint64 number of sequences S           uint64 number of documents + 1 = D
    int32 (S,) tokens of each sequence     int64 (S,) byte offset of each sequence in the .bin
    int64 (D,) each document's first sequence, and at the end S
"""

import os
from pathlib import Path

import numpy as np

from corpus.files import map_tokens, sync_to_disk
from corpus.stream import document_sizes

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floats
CHUNK = 1 << 20  # sequences that are checked at once: an index can be large


def open_megatron(path):
    """Map a .bin file with its .idx → (tokens, byte offset of each document). Raises ValueError."""
    index_path = path.with_suffix(".idx")
    index = np.empty(0, np.uint8)
    if index_path.stat().st_size:
        index = np.memmap(index_path, np.uint8, mode="r")

    def read(offset, dtype, count):
        """(`count` values from byte `offset` of the index on, the byte behind them)."""
        end = offset + np.dtype(dtype).itemsize * count
        if count < 0 or end > len(index):
            raise ValueError(f"{index_path}: {len(index)} bytes, cut short of {end}")
        return index[offset:end].view(dtype), end

    # The header.
    magic, end = read(0, np.uint8, len(MAGIC))
    if bytes(magic) != MAGIC:
        raise ValueError(f"{index_path}: no index of a Megatron dataset")
    (version,), end = read(end, np.uint64, 1)
    (code,), end = read(end, np.uint8, 1)
    (n_sequences, n_documents), end = read(end, np.uint64, 2)
    if version != VERSION or int(code) not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ValueError(f"{index_path}: version {version}, type {code}; "
                         f"version {VERSION} and integer types ({known}) are known")

    # The lists.
    lengths, end = read(end, np.int32, int(n_sequences))
    offsets, end = read(end, np.int64, int(n_sequences))
    first_sequences, end = read(end, np.int64, int(n_documents))

    dtype = np.dtype(DTYPES[int(code)])
    n_bytes = check_sequences(lengths, offsets, dtype, path, index_path)
    tokens = map_tokens(path, dtype, n_bytes // dtype.itemsize, index_path.name)
    check_documents(first_sequences, n_sequences, index_path)
    if all((np.diff(part) == 1).all() for part in neighbours(first_sequences)):
        return tokens, offsets  # the usual case, one sequence per document: nothing is copied
    return tokens, np.append(offsets, n_bytes)[first_sequences[:-1]]


def check_sequences(lengths, offsets, dtype, path, index_path):
    """Raise ValueError unless each sequence starts where the one before it ends. Returns their bytes."""
    position = 0
    for start in range(0, len(lengths), CHUNK):
        sizes = lengths[start : start + CHUNK].astype(np.int64) * dtype.itemsize
        expected = position + np.cumsum(sizes) - sizes
        if sizes.min() < 0 or not np.array_equal(offsets[start : start + CHUNK], expected):
            raise ValueError(f"{index_path}: its sequences do not follow each other in {path.name}")
        position += int(sizes.sum())
    return position


def check_documents(first_sequences, n_sequences, index_path):
    """Raise ValueError unless the documents' first sequences grow from 0 to the number of sequences."""
    covers = len(first_sequences) and first_sequences[0] == 0 and first_sequences[-1] == n_sequences
    if not covers or any((np.diff(part) < 0).any() for part in neighbours(first_sequences)):
        raise ValueError(f"{index_path}: its documents do not cover its sequences")


def neighbours(array):
    """Yield copies of an array's parts, each with the first element of the next one."""
    for start in range(0, len(array), CHUNK):
        yield np.array(array[start : start + CHUNK + 1])


def write_megatron(stream, eos_id, prefix):
    """Write a stream as PREFIX.bin and PREFIX.idx, one sequence per document, its eos included.

    They appear when they are complete. Raises FileExistsError, or ValueError for a document of 2**31 tokens.
    """
    prefix = Path(prefix)
    dtype = np.dtype(np.uint16 if stream.dtype == np.uint16 else np.int32)
    final = {end: prefix.with_name(prefix.name + end) for end in (".bin", ".idx")}
    partial = {end: prefix.with_name(f".{prefix.name}{end}.{os.getpid()}") for end in (".bin", ".idx")}
    for path in final.values():
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it or choose another prefix")
    prefix.parent.mkdir(parents=True, exist_ok=True)

    try:
        lengths = np.concatenate([np.empty(0, np.int64), *document_sizes(stream, eos_id)])
        longest = int(lengths.max(initial=0))
        if longest > np.iinfo(np.int32).max:
            raise ValueError(f"{prefix}: a document of {longest} tokens is longer than an .idx can say")
        write_tokens(stream, len(stream) - int(lengths.sum()), dtype, partial[".bin"])
        write_index(lengths, dtype, partial[".idx"])
        for end in (".idx", ".bin"):  # a .bin alone could be taken for nanoGPT's
            partial[end].rename(final[end])
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def write_tokens(stream, n_skipped, dtype, path):
    """Write a stream's tokens but the first `n_skipped`: an eos in front belongs to no document."""
    with open(path, "wb") as file:
        for chunk in stream.chunks():
            chunk[n_skipped:].astype(dtype).tofile(file)
            n_skipped = 0
        sync_to_disk(file)


def write_index(lengths, dtype, path):
    """Write the index of documents of these lengths in tokens, one sequence each."""
    code = next(code for code, kind in DTYPES.items() if kind == dtype)
    n_documents = len(lengths)
    with open(path, "wb") as file:
        file.write(MAGIC + np.uint64(VERSION).tobytes() + np.uint8(code).tobytes())
        file.write(np.array([n_documents, n_documents + 1], np.uint64).tobytes())
        lengths.astype(np.int32).tofile(file)
        ((np.cumsum(lengths) - lengths) * dtype.itemsize).astype(np.int64).tofile(file)
        np.arange(n_documents + 1, dtype=np.int64).tofile(file)
        sync_to_disk(file)
