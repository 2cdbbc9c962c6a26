"""Text: the documents in files, folders, standard input and datasets, cut into tasks for the processes that tokenize.

A task is about 1 MiB. Which tasks there are and what is in them depends on the sources alone, and each comes with the
`Place` behind it: a preparation that was interrupted goes on from there as if nothing had happened.
"""

import ast
import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import lzma
import re
import sysconfig
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

SIZE = 1 << 20  # bytes of text that make a task
LONGEST = 1 << 30  # bytes of one line, between two separators, or of text that can't be cut


class Source(NamedTuple):
    """Something with documents in it."""

    kind: str  # docs, txt, jsonl, parquet or hf
    path: str
    size: int = 0  # bytes, and time of change: what an interrupted preparation must find again
    changed: int = 0


SUFFIXES = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def find_sources(names, cfg):
    """The sources that names on the command line stand for, in a fixed order; raises ValueError or OSError."""
    found = []
    for name in names:
        path = Path(name)
        if name == "docs":  # a folder of that name is ./docs
            found.append(Source("docs", "docs", 0, 0))
        elif name.startswith("hf:") or path.is_dir() and any((path / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json")):
            path = Path(name.removeprefix("hf:"))
            found.append(Source("hf", str(path), *(stamp(path) if path.exists() else ())))
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.is_file() and (cfg.format != "auto" or kind_of(p))
                           and not any(part.startswith(".") for part in p.relative_to(path).parts))
            if not files:
                raise ValueError(f"{path}: no {', '.join(SUFFIXES)} files in it (or these with {', '.join(COMPRESSED)}); --format=txt takes every file as text")
            found += [file_source(p, cfg) for p in files]
        elif path.is_file():
            found.append(file_source(path, cfg))
        elif matches := sorted(p for p in glob.glob(name, recursive=True) if Path(p).is_file()):
            found += [file_source(Path(p), cfg) for p in matches]
        else:
            raise FileNotFoundError(f"{name}: no file matches" if glob.has_magic(name) else f"{name}: no such file")
    return list(dict.fromkeys(found))


def kind_of(path):
    """txt, jsonl or parquet by the name of a file, None if it says neither."""
    return SUFFIXES.get(path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix)


def file_source(path, cfg):
    kind = kind_of(path) if cfg.format == "auto" else cfg.format
    if not kind:
        raise ValueError(f"{path}: expected docs, shakespeare, hf:NAME, -, or a {', '.join(SUFFIXES)} file (or one of these with {', '.join(COMPRESSED)}); "
                         "--format= says what it is otherwise")
    return Source(kind, str(path), *stamp(path))


def stamp(path):
    """Size and time of the last change of a file, or of the files in a folder."""
    stats = [p.stat() for p in (path.rglob("*") if path.is_dir() else [path])]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


@contextlib.contextmanager
def reading(source, start=0):
    """The bytes of a file from `start` on, decompressed, and a function that says how many bytes of the file are behind it."""
    path = Path(source.path)
    with open(path, "rb") as raw, contextlib.ExitStack() as stack:
        try:
            if path.suffix == ".zst":
                try:
                    import zstandard
                except ImportError:
                    raise ValueError(f"{path}: .zst needs the zstandard package: pip install '.[data]'") from None
                damaged = (zstandard.ZstdError, EOFError)
                file = io.BufferedReader(Zstandard(raw, zstandard.ZstdDecompressor(max_window_size=1 << 31)), SIZE)
            else:
                damaged = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
                file = stack.enter_context({".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[path.suffix](raw)) if path.suffix in COMPRESSED else raw
            if file is raw:
                file.seek(start)
            while file is not raw and start > 0 and (skipped := len(file.read(min(start, SIZE)))):
                start -= skipped
            yield file, raw.tell
        except damaged as problem:
            raise ValueError(f"{path}: its compressed data are damaged or cut short ({problem})") from None
        except OSError as problem:
            if path.suffix == ".bz2" and not problem.errno:  # that is how bz2 says it
                raise ValueError(f"{path}: its compressed data are damaged or cut short ({problem})") from None
            raise


class Zstandard(io.RawIOBase):
    """The text of a .zst file of any number of frames; unlike zstandard's own reader it notices that one is cut short."""

    def __init__(self, raw, decompressor):
        self.raw, self.decompressor, self.frame, self.packed, self.text = raw, decompressor, None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.text:
            packed = self.packed or self.raw.read(1 << 16)
            if not packed:
                if self.frame:
                    raise EOFError("the file ends inside a frame")
                return 0
            self.frame = self.frame or self.decompressor.decompressobj()
            self.text, self.packed = memoryview(self.frame.decompress(packed)), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        n = min(len(buffer), len(self.text))
        buffer[:n], self.text = self.text[:n], self.text[n:]
        return n


# ---------------------------------------------------------------------------------- tasks: from sources to workers


class Task(NamedTuple):
    """A piece of work for one process; `first`: number of its first line or record, or place of its first byte."""

    kind: str  # lines, separated, files, records, part
    where: str
    content: Any
    first: int = 0


class Place(NamedTuple):
    """Where a task ends: what comes next. Of the source: bytes read, lines or records passed, part of a document."""

    source: int = 0
    byte: int = 0
    count: int = 0


class Part(NamedTuple):
    """A piece of a document too large for one task."""

    split: str
    text: str
    digest: bytes
    starts: bool
    ends: bool
    replaced: int = 0  # places


def tasks(sources, place, cfg, cuts=True):
    """Yield (task, the Place behind it, bytes of the source behind it) from `place` on.

    What the tasks hold together is the same however often it was interrupted. cuts: long documents may be cut (data.py).
    """
    alone = len(sources) == 1 and sources[0].kind == "txt" and not cfg.separator
    number = place.source
    while number < len(sources):
        source, here = sources[number], place if number == place.source else Place(number)
        if source.kind == "txt" and not cfg.separator:
            produce = alone_text(source, here, cfg, cuts) if alone else None
            if not alone:
                number, produced = small_texts(sources, number) if here.byte == 0 else (number, None)
                if produced:
                    yield produced, Place(number), 0
                    continue
                produce = whole_text(source, here, cfg, cuts)
        else:
            produce = {"docs": python_tasks, "txt": separated_tasks, "jsonl": line_tasks, "parquet": parquet_tasks, "hf": hf_tasks}[source.kind](source, here, cfg)
        yield from produce
        number += 1


def small_texts(sources, number):
    """A task of the .txt files from `number` on that fit into one, and the number of the first that does not."""
    files, total = [], 0
    while number < len(sources) and sources[number].kind == "txt" and total < SIZE:
        with reading(sources[number]) as (file, _):
            content = file.read(SIZE + 1)
        if len(content) > SIZE:
            break
        files.append((sources[number].path, content))
        total, number = total + len(content) + 100, number + 1
    return number, Task("files", "", files) if files else None


def line_tasks(source, place, cfg):
    with reading(source, place.byte) as (file, behind):
        byte, line = place.byte, place.count
        while block := file.read(SIZE):
            if not block.endswith(b"\n"):
                block += file.readline(LONGEST)
            if len(block) > LONGEST:
                raise ValueError(f"{source.path}: from line {line + 1} on: a line of more than {LONGEST >> 20} MiB")
            task = Task("lines", source.path, block, line + 1)
            byte, line = byte + len(block), line + block.count(b"\n")
            yield task, Place(place.source, byte, line), behind()


def separated_tasks(source, place, cfg):
    separator = separator_bytes(cfg)
    with reading(source, place.byte) as (file, behind):
        byte, held = place.byte, b""
        while True:
            read = file.read(max(SIZE, len(held)))
            held += read
            end = len(held) - len(held.split(separator)[-1]) if read else len(held)  # they may overlap: the leftmost counts
            if read and not end:  # none yet
                if len(held) > LONGEST:
                    raise ValueError(f"{source.path}: no separator {cfg.separator!r} within {LONGEST >> 20} MiB from byte {byte} on")
                continue
            if end:
                yield Task("separated", source.path, held[:end], byte), Place(place.source, byte + end), behind()
            byte, held = byte + end, held[end:]
            if not read:
                return


def separator_bytes(cfg):
    return cfg.separator.replace("\\n", "\n").replace("\\t", "\t").encode("utf-8")


BAD = re.compile("[\ud800-\udfff]")
BETWEEN_WORDS = re.compile("[A-Za-z] [A-Za-z]")


def last_cut(text):
    """Where to end a piece of `text` so that the pieces tokenize as the whole does; 0 if nowhere.

    Behind a single newline between two non-blank characters, of which the second is no slash: no pre-tokenizer joins
    across it (o200k_base keeps slashes with the punctuation before the newline). Text without lines: between two words.
    """
    at = len(text) - 1
    while (at := text.rfind("\n", 1, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace() and text[at + 1] != "/":
            return at + 1
    tail = max(0, len(text) - 4096)
    found = [m.start() + 1 for m in BETWEEN_WORDS.finditer(text, tail)]
    return found[-1] if found else 0


def cut_up(text):
    """Pieces of a long text that tokenize as the whole does."""
    start = 0
    while start < len(text):
        size = SIZE
        while not (cut := last_cut(text[start : start + size])) and start + size < len(text):
            size *= 2
        stop = start + cut if start + size < len(text) and cut else len(text)
        yield text[start:stop]
        start = stop


def text_pieces(source, start, stop, bad_bytes, cuts=True):
    """Yield (text, byte behind it, places replaced) for bytes [start, stop) of a file (None: to its end); raises ValueError where
    they are no UTF-8. With bad_bytes=replace they become U+FFFD; skip is the caller's, if it can.
    """
    with reading(source, start) as (file, _):
        byte, held = start, b""
        while True:
            room = SIZE if len(held) < SIZE else len(held)  # no cut for long: read more each time
            read = file.read(room if stop is None else min(room, stop - byte - len(held)))
            held += read
            whole = len(held) - (partial(held) if read else 0)
            text = held[:whole].decode("utf-8", "surrogateescape")  # keeps what is wrong, byte for byte
            if (bad := BAD.search(text)) and bad_bytes != "replace":
                place = byte + len(text[: bad.start()].encode("utf-8"))
                raise ValueError(f"{source.path}: not UTF-8 at byte {place}; " + (
                    "a single text cannot be skipped: --bad_bytes=replace, or cut it into documents with --separator=" if bad_bytes == "skip" else "see --bad_bytes"))
            cut = len(text) if not read else last_cut(text) if cuts else 0
            if cut:
                raw = text[:cut].encode("utf-8", "surrogateescape")
                byte, held = byte + len(raw), held[len(raw) :]
                text, n = replaced(raw) if bad else (text[:cut], 0)
                yield text, byte, n
            elif len(held) > LONGEST:
                raise ValueError(f"{source.path}: no place to cut the text within {LONGEST >> 20} MiB from byte {byte} on; --separator= makes documents of it")
            if not read:
                return


def replaced(raw):
    """Bytes as text, U+FFFD for what is no UTF-8, and in how many places; the same for the pieces of a text as for the whole."""
    text = raw.decode("utf-8", "replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def partial(raw):
    """How many bytes at the end of `raw` begin a UTF-8 character that is not complete."""
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte & 0xC0 != 0x80:  # not a continuation: the last character starts here
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if width > back else 0
    return 0


def whole_text(source, place, cfg, cuts):
    """A large .txt file as one document: read twice, as its split is decided by its hash."""
    digest, last = hashlib.sha256(), 0
    try:
        for text, last, _ in text_pieces(source, 0, None, cfg.bad_bytes):  # noqa: B007
            digest.update(text.encode("utf-8"))
    except ValueError:
        if cfg.bad_bytes != "skip":
            raise
        yield Task("skipped", source.path, None), Place(place.source + 1), source.size
        return
    digest = digest.digest()
    yield from parts_of(source, place, [(split_of(digest, cfg.val), 0, last)], digest, cfg, cuts)


def split_of(digest, val):
    """A document's split, by its hash: adding files never moves it, and equal documents never part."""
    return "val" if int.from_bytes(digest[:8], "big") < val * 2**64 else "train"


def alone_text(source, place, cfg, cuts):
    """A .txt file that is the only source, as one document: its end is for validation."""
    with reading(source) as (file, _):
        size = source.size if Path(source.path).suffix not in COMPRESSED else sum(map(len, iter(lambda: file.read(SIZE), b"")))
    cut = int(size * (1 - cfg.val))
    with reading(source, cut) as (file, _):  # never inside a character
        tail = file.read(4)
        cut += next((i for i, byte in enumerate(tail) if byte & 0xC0 != 0x80), len(tail))
    yield from parts_of(source, place, [("train", 0, cut), ("val", cut, size)], b"", cfg, cuts)


def parts_of(source, place, ranges, digest, cfg, cuts):
    for split, start, stop in ranges:
        if place.byte >= stop:
            continue
        byte, starts = max(place.byte, start), place.byte <= start
        pieces = text_pieces(source, byte, stop, cfg.bad_bytes, cuts)
        for text, byte, n in pieces:
            part = Part(split, text, digest, starts, byte == stop, n)
            yield Task("part", source.path, part), Place(place.source, byte), source.size * byte // ranges[-1][2]  # it may be compressed
            starts = False


def parquet_tasks(source, place, cfg):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{source.path}: .parquet needs the pyarrow package: pip install '.[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:  # else it reads the whole column first
            if cfg.field not in file.schema_arrow.names:
                raise ValueError(f"{source.path}: no column '{cfg.field}'; there are {', '.join(file.schema_arrow.names)}; name the text's with --field")
            rows = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)])
            group = int(np.searchsorted(rows, place.count, side="right")) - 1
            batches = file.iter_batches(batch_size=256, row_groups=list(range(group, file.num_row_groups)), columns=[cfg.field])
            records = (text for batch in batches for text in raw_text(batch.column(0)).to_pylist())
            for _ in range(place.count - int(rows[group])):
                next(records)
            for texts, row in gathered(records, place.count):
                task = Task("records", source.path, texts, row - len(texts) + 1)
                yield task, Place(place.source, 0, row), source.size * row // max(1, int(rows[-1]))
    except (pyarrow.ArrowException, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno:
            raise
        raise ValueError(f"{source.path}: not a whole parquet file: {str(problem).splitlines()[0]}") from None


def raw_text(column):
    """A column of an Arrow table, text as bytes: whether they are UTF-8 is asked later."""
    import pyarrow.types as types

    column = column.dictionary_decode() if types.is_dictionary(column.type) else column
    return column.cast("large_binary") if types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type) else column


def hf_tasks(source, place, cfg):
    """A dataset of the hub by its name, a folder of its files, or one that was saved by save_to_disk."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source.path}: Hugging Face datasets need a package: pip install '.[hf]'") from None
    path = Path(source.path)
    try:
        if any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            table = datasets.load_from_disk(source.path)
        else:
            table = datasets.load_dataset(source.path, cfg.hf_config or None, split=cfg.hf_split)
    except Exception as problem:  # a hub, a network and a package of many kinds of exceptions
        raise ValueError(f"hf:{source.path}: {type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}") from None
    if isinstance(table, datasets.DatasetDict):
        if cfg.hf_split not in table:
            raise ValueError(f"hf:{source.path}: no split '{cfg.hf_split}'; there are {', '.join(table)}; name one with --hf_split")
        table = table[cfg.hf_split]
    if cfg.field not in table.column_names:
        raise ValueError(f"hf:{source.path}: no column '{cfg.field}'; there are {', '.join(table.column_names)}; name the text's with --field")
    table = table.select_columns([cfg.field])
    records = (text for start in range(place.count, len(table), 256) for text in table[start : start + 256][cfg.field])
    for texts, row in gathered(records, place.count):
        yield Task("records", source.path, texts, row - len(texts) + 1), Place(place.source, 0, row), source.size * row // len(table)


def python_tasks(source, place, cfg):
    records = python_docs()
    for _ in range(place.count):
        next(records)
    for texts, row in gathered(records, place.count):
        yield Task("records", "docs", texts, row - len(texts) + 1), Place(place.source, 0, row), 0


def gathered(records, row):
    """Yield (records that make a task together, number of the last)."""
    texts, size = [], 0
    for row, text in enumerate(records, row + 1):  # noqa: B020
        texts.append(text)
        size += len(text) if isinstance(text, (str, bytes)) else 0
        if size >= SIZE or len(texts) >= 1 << 14:
            yield texts, row
            texts, size = [], 0
    if texts:
        yield texts, row


def python_docs():
    """Yield the documentation inside this CPython: pydoc's topics, then one text per standard-library module."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "__pycache__"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 ships files that are wrong on purpose
            continue
        parts = [ast.get_docstring(tree) or ""]
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
                parts.append(f"{node.name}{arguments}\n{ast.get_docstring(node)}")
        text = "\n\n".join(part for part in parts if part)
        if text:
            yield text
