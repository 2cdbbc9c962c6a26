"""Token files of every usual layout, read as they are: our own, nanoGPT's, llm.c's and Megatron's.

A corpus is two long rows of tokens, for training and for validation. It is a folder that prepare.py wrote
(meta.json, *.bin, token_bytes.bin), or token files as others write them: nanoGPT's raw uint16, llm.c's and
modded-nanogpt's shards, Megatron's .bin/.idx pairs.
"""

import contextlib
import hashlib
import json
import os
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

from corpus.tokenizers import load_tokenizer

CHECKED = 1 << 30  # bytes; larger token files are not hashed again at every start, only sized


class Stream:
    """A long row of tokens over one or several memory-mapped arrays of one type, read as if they were one.

    borders: (first position, documents' starts in bytes, bytes per token) for each file that lists them; else a document ends with its eos.
    """

    def __init__(self, arrays, borders=(), lead=0):
        self.arrays, self.lead = [array for array in arrays if len(array)], lead  # lead: tokens in front that are in no file
        self.offsets = np.cumsum([0, *map(len, self.arrays)], dtype=np.int64)
        self.dtype, self.borders, self.views = self.arrays[0].dtype if self.arrays else np.dtype(np.uint16), borders, {}

    def __len__(self):
        return int(self.offsets[-1])

    def read(self, start, stop):
        """Tokens [start, stop) as one array."""
        parts = [array[max(0, start - first) : max(0, stop - first)] for array, first in zip(self.arrays, self.offsets)]
        parts = [part for part in parts if len(part)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def chunks(self, size=1 << 24):
        """All tokens, in arrays of at most `size`."""
        return (self.read(start, start + size) for start in range(0, len(self), size))

    def windows(self, start, n):
        """n tokens from each of the positions start (B,) → (B, n), a copy. One gather per file, however many rows."""
        if n not in self.views:  # overlapping windows at every position, without a copy
            self.views[n] = [None if len(a) < n else np.lib.stride_tricks.as_strided(a, (len(a) - n + 1, n), a.strides * 2, writeable=False)
                             for a in self.arrays]
        views, which = self.views[n], np.searchsorted(self.offsets, start, side="right") - 1
        k = which[0] if len(which) else 0
        if (which == k).all() and start.max(initial=0) + n <= self.offsets[k + 1] and views[k] is not None:
            return views[k][start - self.offsets[k]]
        rows, inside = np.empty((len(start), n), self.dtype), start + n <= self.offsets[which + 1]
        for k in np.unique(which[inside]):
            chosen = inside & (which == k)
            rows[chosen] = views[k][start[chosen] - self.offsets[k]]
        for i in np.flatnonzero(~inside):  # across two files' border: one block per file
            rows[i] = self.read(int(start[i]), int(start[i]) + n)
        return rows

    def document(self, position):
        """The number of the document at each position, where files list their documents; they grow with the position."""
        number, before = np.zeros(position.shape, np.int64), 0
        if self.borders and not all(starts.flags.aligned for _, starts, _ in self.borders):  # as in an .idx: searching would copy them each time
            self.borders = [(first, starts.copy(), width) for first, starts, width in self.borders]
        for first, starts, width in self.borders:
            here = position >= first
            number[here] = before + np.searchsorted(starts, (position[here] - first) * width, side="right")
            before += len(starts)
        return number

    def cut(self, position):
        """Two streams: what comes before a position where a document starts, and the rest."""
        before, after = [], []
        for first, starts, width in self.borders:
            index = int(np.searchsorted(starts, (position - first) * width))
            before += [(first, starts[:index], width)] if index else []
            after += [(first - position, starts[index:], width)] if index < len(starts) else []
        return (Stream([a[: max(0, position - o)] for a, o in zip(self.arrays, self.offsets)], before, self.lead),
                Stream([a[max(0, position - o) :] for a, o in zip(self.arrays, self.offsets)], after))

    def led_by(self, eos_id):
        """The stream with a lone eos in front, unless it begins with one: so the first token, too, has one before it."""
        if not len(self) or int(self.read(0, 1)[0]) == eos_id:
            return self
        return Stream([np.array([eos_id], self.dtype), *self.arrays], [(first + 1, starts, width) for first, starts, width in self.borders], 1)


def document_sizes(stream, eos_id):
    """Yield arrays of the documents' sizes in tokens, their eos included. The eos that the stream begins with is no document's."""
    if stream.borders:
        for number, (first, starts, width) in enumerate(stream.borders):
            end = stream.borders[number + 1] if number + 1 < len(stream.borders) else None
            end = end[0] + int(end[1][0]) // width if end else len(stream)
            yield np.diff(first + starts // width, append=end)
        return
    position, before = 0, 0
    for chunk in stream.chunks():
        ends = position + np.flatnonzero(chunk == eos_id) + 1
        if position == 0 and len(ends) and ends[0] == 1:
            ends, before = ends[1:], 1
        if len(ends):
            yield np.diff(ends, prepend=before)
            before = int(ends[-1])
        position += len(chunk)
    if before < position:  # the last document has no end
        yield np.array([position - before])


def document_lengths(stream, eos_id):
    """Yield arrays of the documents' lengths in tokens, without their eos."""
    place = stream.borders[0][0] + int(stream.borders[0][1][0]) // stream.borders[0][2] if stream.borders else int(len(stream) and stream.read(0, 1)[0] == eos_id)
    for sizes in document_sizes(stream, eos_id):
        last = place + np.cumsum(sizes) - 1
        ended = stream.windows(np.clip(last, 0, None), 1)[:, 0] == eos_id
        yield sizes - ((sizes > 0) & ended)
        place += int(sizes.sum())


class Corpus(NamedTuple):
    """Tokens for training and validation, what is known of them, and every token's length in bytes."""

    folder: Path
    meta: dict  # format, tokenizer, n_vocab, eos_id, mask_id; per split: tokens, sha256, and of our own: bytes, documents
    train: Stream
    val: Stream
    token_bytes: np.ndarray
    tokenizer_file: Path | None = None  # where its tokenizer is a tokenizer.json


def load_corpus(folder, tokenizer_name="", val_share=0.0):
    """Open a prepared corpus after checking sizes, dtype and checksums, or token files in another layout.

    The latter name no tokenizer: `tokenizer_name` does. Where they have no validation file, `val_share` of the tokens,
    the last ones from a document's start on, are for validation. Raises ValueError or FileNotFoundError.
    """
    folder = Path(folder)
    with contextlib.suppress(ValueError, OSError):  # each file counts as open while it is mapped, and usually 1024 may be
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    if any((folder / name).is_file() for name in ("meta.json", "token_bytes.bin")):  # without the former it is no nanoGPT folder, but damaged
        corpus = load_prepared(folder)
        if tokenizer_name and (name := load_tokenizer(tokenizer_name, (folder,)).name) != corpus.meta["tokenizer"]:
            raise ValueError(f"{folder} was prepared with tokenizer '{corpus.meta['tokenizer']}', not '{name}'")
        return corpus
    files = foreign_files(folder)
    if not files["train"]:
        raise FileNotFoundError(f"no corpus in '{folder}'; prepare one with: python data.py "
                                + (folder.name if folder.name in ("docs", "shakespeare") else f"FILE --name={folder.name}"))
    alphabet = files["train"][0].with_name("meta.pkl")
    if alphabet.is_file():  # never unpickled: that would run what is in it
        raise ValueError(f"{alphabet}: nanoGPT's characters, with an alphabet of their own, which no tokenizer here has; prepare the text itself with data.py")
    if not tokenizer_name:
        raise ValueError(f"{folder}: token files do not say which tokenizer made them; add --tokenizer=gpt2 (or another)")
    tokens = load_tokenizer(tokenizer_name)
    streams = {split: open_foreign(paths, tokens) for split, paths in files.items() if paths}
    meta = dict(format=streams["train"][0], tokenizer=tokens.name, n_vocab=tokens.n_vocab, eos_id=tokens.eos_id, mask_id=tokens.mask_id)
    if "val" not in streams:
        if not val_share:
            raise ValueError(f"{folder}: no validation tokens; add a file with 'val' in its name, or --val_share=0.01 to keep the last 1 %")
        kind, whole, digest = streams["train"]
        halves = whole.cut(document_start(whole, int(len(whole) * (1 - val_share)), tokens.eos_id))
        streams = {split: (kind, half.led_by(tokens.eos_id), f"{digest} {val_share}") for split, half in zip(("train", "val"), halves)}
    meta |= {split: dict(tokens=len(stream) - stream.lead, sha256=digest) for split, (_, stream, digest) in streams.items()}
    return Corpus(folder, meta, streams["train"][1], streams["val"][1], tokens.token_bytes(), getattr(tokens, "path", None))


def parse_corpora(text):
    """[(path, weight or None, unique tokens or 0)] of `path`, `path:weight` or `path:weight:unique_tokens`, separated by
    commas (a weight may be left empty). Raises ValueError."""
    found = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        path, *numbers = item.split(":")
        try:
            weight, unique = ((float(n) if n else None) for n in (numbers + ["", ""])[:2])
        except ValueError:
            raise ValueError(f"corpus={item}: write path, path:weight or path:weight:unique_tokens") from None
        if len(numbers) > 2 or not path or weight is not None and not 0 < weight < 1e9 or unique is not None and not 1 <= unique < 1e18:
            raise ValueError(f"corpus={item}: write path, path:weight or path:weight:unique_tokens")
        found.append((path, weight, int(unique or 0)))
    if not found:
        raise ValueError("corpus: name at least one folder")
    if len({weight is None for _, weight, _ in found}) > 1:
        raise ValueError(f"corpus={text}: give every source a weight, or none")
    return found


def document_start(stream, position, eos_id):
    """The first position from `position` on where a document starts; the end of the stream if there is none."""
    if stream.borders:
        for first, starts, width in stream.borders:
            index = int(np.searchsorted(starts, (position - first) * width))
            if index < len(starts):
                return first + int(starts[index]) // width
        return len(stream)
    while position < len(stream):
        ends = np.flatnonzero(stream.read(position - 1, position + (1 << 20)) == eos_id)
        if len(ends):
            return position + int(ends[0])
        position += 1 << 20
    return len(stream)


def load_prepared(folder):
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype = {"uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32)}[meta["dtype"]]
        files = [(split, str(file["name"]), 0 + file["tokens"], file["sha256"]) for split in ("train", "val") for file in meta[split]["files"]]
        if not (meta["eos_id"] < meta["n_vocab"] <= meta["mask_id"] and meta["val"]["bytes"] > 0 and meta["tokenizer"]):
            raise ValueError("eos_id < n_vocab ≤ mask_id, text in val and a tokenizer are needed")
        if meta["n_vocab"] - 1 > np.iinfo(dtype).max:
            raise ValueError(f"a vocabulary of {meta['n_vocab']} is above what {dtype.name} holds")
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{folder}/meta.json is damaged ({type(problem).__name__}: {problem}); prepare it again") from None
    arrays, small = {"train": [], "val": []}, sum(count for _, _, count, _ in files) * dtype.itemsize <= CHECKED
    for split, name, count, digest in files:
        path = folder / name
        array = map_tokens(path, dtype, count, "meta.json")
        if small and hashlib.sha256(array).hexdigest() != digest:
            raise ValueError(f"{path}: its SHA-256 is not the one in meta.json; prepare the corpus again")
        if small and (largest := int(array.max())) >= meta["n_vocab"]:
            raise ValueError(f"{path}: token {largest}, but meta.json says the vocabulary is {meta['n_vocab']}; prepare it again")
        arrays[split].append(array)
    lengths = folder / "token_bytes.bin"
    if not lengths.is_file() or lengths.stat().st_size != 2 * meta["n_vocab"]:
        raise ValueError(f"{lengths}: missing, or not of the vocabulary in meta.json; prepare the corpus again")
    copy = folder / "tokenizer.json"
    return Corpus(folder, meta, Stream(arrays["train"]), Stream(arrays["val"]), np.fromfile(lengths, np.uint16), copy if copy.is_file() else None)


def map_tokens(path, dtype, count, source, offset=0):
    """`count` tokens of a file from byte `offset` on, memory-mapped; raises ValueError if it does not hold exactly these."""
    size = path.stat().st_size if path.is_file() else 0
    if size != offset + count * dtype.itemsize or not count:
        raise ValueError(f"{path}: {size} bytes, but {source} says {count} tokens of {dtype.name} ({offset + count * dtype.itemsize} bytes): "
                         "truncated, or another dtype; prepare it again")
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


SHARDS = {20240520: (1, np.dtype(np.uint16)), 20240801: (7, np.dtype(np.uint32))}  # llm.c's magic numbers: version and type


MEGATRON = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # codes of integer types; 6, 7 are floats


def foreign_files(folder):
    """The .bin files at `folder` (a folder, one file, or a Megatron prefix, also of two pairs) by split, as their names tell; test files in neither."""
    files, single = {"train": [], "val": []}, folder if folder.suffix == ".bin" else folder.parent / f"{folder.name}.bin"
    two = {split: [folder.parent / f"{folder.name}_{split}.bin"] for split in files}
    if not folder.is_dir() and not single.is_file() and all(path.is_file() for path, in two.values()):
        return two
    found = sorted(folder.glob("*.bin")) if folder.is_dir() else [single] if single.is_file() else []
    for path in found:
        words = set(path.stem.lower().replace("-", "_").replace(".", "_").split("_"))
        if not words & {"test"} or len(found) == 1:
            files["val" if words & {"val", "valid", "validation"} and len(found) > 1 else "train"].append(path)
    return files


def open_foreign(paths, tokens):
    """(layout, Stream, fingerprint) of files in one layout."""
    opened = [open_file(path) for path in paths]
    kinds, types = ({item[i] if i == 0 else item[1].dtype for item in opened} for i in (0, 1))
    if len(kinds) > 1 or len(types) > 1:
        raise ValueError(f"{paths[0].parent}: files of different layouts or types ({', '.join(map(str, (*kinds, *types)))}); keep one kind in a folder")
    dtype = types.pop()
    if tokens.n_vocab - 1 > np.iinfo(dtype).max:
        raise ValueError(f"{paths[0]}: tokens of {dtype.name}, which can't hold tokenizer '{tokens.name}' of {tokens.n_vocab} tokens")
    borders, position = [], 0
    for _, array, starts in opened:
        if starts is not None and len(starts):
            borders.append((position, starts, dtype.itemsize))
        position += len(array)
    digest = hashlib.sha256()
    for path, (_, array, _) in zip(paths, opened):
        digest.update(f"{path.name} {len(array)}".encode())
        for start in np.linspace(0, max(0, len(array) - 4096), 64).astype(np.int64):  # samples: a corpus may be terabytes
            digest.update(array[start : start + 4096].tobytes())
    return kinds.pop(), Stream([array for _, array, _ in opened], borders).led_by(tokens.eos_id), digest.hexdigest()


def open_file(path):
    """(layout, tokens, starts of documents in bytes or None) of one .bin file."""
    if path.with_suffix(".idx").is_file():
        return "Megatron", *open_megatron(path)
    size = path.stat().st_size
    header = np.fromfile(path, np.int32, 256)
    if len(header) and int(header[0]) in SHARDS:
        if len(header) < 256:
            raise ValueError(f"{path}: {size} bytes are less than the header of such a shard: truncated")
        version, dtype = SHARDS[int(header[0])]
        if header[1] != version:
            raise ValueError(f"{path}: a shard of version {header[1]}; version {version} is known")
        return "llm.c", map_tokens(path, dtype, int(header[2]), "its header", 1024), None
    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size} bytes are no uint16 tokens (empty or truncated), and it has no header of another layout")
    return "nanoGPT", np.memmap(path, np.uint16, mode="r"), None


def open_megatron(path):
    """(tokens, documents' starts in bytes) of a MMapIndexedDataset: path .bin beside its .idx."""
    index = path.with_suffix(".idx")
    raw = np.memmap(index, np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)

    def part(offset, dtype, count):
        end = offset + np.dtype(dtype).itemsize * count
        if count < 0 or end > len(raw):
            raise ValueError(f"{index}: {len(raw)} bytes, cut short of {end}")
        return raw[offset:end].view(dtype), end

    if bytes(part(0, np.uint8, 9)[0]) != b"MMIDIDX\0\0":
        raise ValueError(f"{index}: no index of a Megatron dataset")
    (version,), _ = part(9, np.uint64, 1)
    (code,), _ = part(17, np.uint8, 1)
    (sequences, documents), end = part(18, np.uint64, 2)
    if version != 1 or int(code) not in MEGATRON:
        raise ValueError(f"{index}: version {version}, type {code}; version 1 and integer types ({', '.join(map(str, MEGATRON))}) are known")
    lengths, end = part(end, np.int32, int(sequences))
    pointers, end = part(end, np.int64, int(sequences))
    firsts, end = part(end, np.int64, int(documents))
    dtype = np.dtype(MEGATRON[int(code)])
    position = 0
    for start in range(0, len(lengths), 1 << 20):  # in pieces: an index can be large
        sizes = lengths[start : start + (1 << 20)].astype(np.int64) * dtype.itemsize
        if sizes.min() < 0 or not np.array_equal(pointers[start : start + len(sizes)], position + np.cumsum(sizes) - sizes):
            raise ValueError(f"{index}: its sequences do not follow each other in {path.name}")
        position += int(sizes.sum())
    tokens = map_tokens(path, dtype, position // dtype.itemsize, index.name)
    if documents < 1 or firsts[0] != 0 or firsts[-1] != sequences or any((np.diff(piece) < 0).any() for piece in pieces(firsts)):
        raise ValueError(f"{index}: its documents do not cover its sequences")
    if documents == sequences + 1 and all((np.diff(piece) == 1).all() for piece in pieces(firsts)):
        return tokens, pointers  # the usual case, one sequence per document: nothing is copied
    return tokens, np.append(pointers, position)[firsts[:-1]]


def pieces(array, size=1 << 20):
    """An array in copies of `size` + 1 elements, of which neighbours share one."""
    return (np.array(array[start : start + size + 1]) for start in range(0, len(array), size))


def write_megatron(stream, eos_id, prefix):
    """Write a stream as prefix.bin and prefix.idx, one sequence per document, eos included; the pair appears when complete."""
    prefix = Path(prefix)
    dtype = np.dtype(np.uint16) if stream.dtype == np.uint16 else np.dtype(np.int32)
    code = next(code for code, kind in MEGATRON.items() if kind == dtype)
    building = {end: prefix.with_name(f".{prefix.name}{end}.{os.getpid()}") for end in (".bin", ".idx")}
    for end in building:
        if prefix.with_name(prefix.name + end).exists():
            raise FileExistsError(f"{prefix}{end} exists; remove it or choose another prefix")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    try:
        lengths = np.concatenate([np.empty(0, np.int64), *document_sizes(stream, eos_id)])
        if (longest := int(lengths.max(initial=0))) > np.iinfo(np.int32).max:
            raise ValueError(f"{prefix}: a document of {longest} tokens is longer than an .idx can say")
        with open(building[".bin"], "wb") as file:
            skip = len(stream) - int(lengths.sum())  # the lone eos in front belongs to no document
            for chunk in stream.chunks():
                chunk[skip:].astype(dtype).tofile(file)
                skip = 0
            flush(file)
        with open(building[".idx"], "wb") as file:
            file.write(b"MMIDIDX\0\0" + np.uint64(1).tobytes() + np.uint8(code).tobytes())
            file.write(np.array([len(lengths), len(lengths) + 1], np.uint64).tobytes())
            lengths.astype(np.int32).tofile(file)
            ((np.cumsum(lengths) - lengths) * dtype.itemsize).astype(np.int64).tofile(file)
            np.arange(len(lengths) + 1, dtype=np.int64).tofile(file)
            flush(file)
        for end in (".idx", ".bin"):  # a .bin alone could be taken for nanoGPT's
            building[end].rename(prefix.with_name(prefix.name + end))
    finally:
        for path in building.values():
            path.unlink(missing_ok=True)


def flush(file):
    """Make sure that what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())
