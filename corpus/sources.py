"""Sources of text: what names on the command line stand for, and the bytes of their files, decompressed."""

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from corpus.files import SYSTEM_NAMES, check_file, list_folder, not_a_file, stamp

SUFFIXES = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
OF_PAIRS = {".json": "json"} | {suffix: kind for suffix, kind in SUFFIXES.items() if kind != "txt"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
DAMAGED = "its compressed data are damaged or cut short"
BUFFER_BYTES = 1 << 20


class Source(NamedTuple):
    """Something with documents in it: a file, a dataset, or Python's documentation."""

    kind: str  # docs, txt, jsonl, json (a list of records), parquet, deb or hf
    path: str
    size: int = 0  # in bytes
    changed: int = 0  # when: an interrupted preparation must find the same size and time again


def find_sources(names, cfg, say=lambda line: None):
    """The sources that names on the command line stand for, each once. Raises ValueError or OSError.

    say(line) is called with what is left out.
    """
    sources = []
    for name in names:
        sources += sources_of(name, cfg, say)
    if cfg.sft:
        for source in sources:
            if source.kind in ("docs", "txt"):
                raise ValueError(f"{source.path}: text has no question-answer pairs; --sft takes "
                                 f"{', '.join(OF_PAIRS)} files and data sets")
    return list(dict.fromkeys(sources))


def sources_of(name, cfg, say):
    """The sources that one name stands for."""
    path = Path(name)
    if name == "docs":  # a folder of that name is ./docs
        return [Source("docs", "docs")]
    if name.startswith("hf:") or is_dataset(path):
        path = Path(name.removeprefix("hf:"))
        return [Source("hf", str(path), *(stamp(path) if path.exists() else ()))]
    if path.is_dir():
        return [file_source(file, cfg) for file in files_in(path, cfg, say)]
    if not glob.has_magic(name) or os.path.lexists(name):
        return [file_source(path, cfg)]
    files = files_matching(name, say)
    if not files:
        raise FileNotFoundError(f"{name}: no file matches")
    return [file_source(file, cfg) for file in files]


def files_matching(pattern, say):
    """The files that match a pattern, hidden ones only if it asks for them. Raises OSError."""
    for parent in Path(pattern).parents:  # glob passes over what it can't read
        for folder in glob.glob(str(parent), recursive=True):
            if os.path.isdir(folder):
                os.scandir(folder).close()
                os.stat(os.path.join(folder, "."))
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    matches = [path for path in matches if path.name.lower() not in SYSTEM_NAMES]
    n_folders = sum(path.is_dir() for path in matches)
    if n_folders and "**" not in pattern:
        folders = "1 folder matches" if n_folders == 1 else f"{n_folders} folders match"
        say(f"{pattern}: {folders}, whose files are left out; give folders by their names")
    return readable_files(matches, say)


def readable_files(paths, say):
    """Those of `paths` that are files or links to files. What is neither one nor a folder is named."""
    files = []
    for path in paths:
        what = not_a_file(path)
        if not what:
            files.append(path)
        elif not path.is_dir():
            say(f"{path} is left out: {what}")
    return files


def is_dataset(path):
    """Whether this is a folder that Hugging Face's save_to_disk wrote."""
    return any((path / mark).is_file() for mark in ("dataset_info.json", "dataset_dict.json"))


def files_in(folder, cfg, say):
    """The files of a folder and of those in it that are sources: no hidden ones, none of an unknown kind."""
    paths = readable_files(list_folder(folder, "**/*"), say)
    files = [path for path in paths if cfg.format != "auto" or kind_of(path, cfg)]
    if not files:
        remedy = "" if cfg.sft else "; --format=txt takes every file as text"
        raise ValueError(f"{folder}: no {', '.join(suffixes(cfg))} files in it "
                         f"(or these with {', '.join(COMPRESSED)}){remedy}")
    if len(files) < len(paths):
        endings = sorted({path.suffix or path.name for path in set(paths) - set(files)})
        shown = ", ".join(endings[:5]) + (", …" if len(endings) > 5 else "")
        n = len(paths) - len(files)
        say(f"{folder}: {n:,} of {len(paths):,} files are left out, of other kinds ({shown})")
    return files


def packing(path):
    """How a file is compressed: .gz, .zst, .bz2 or .xz by its name, "" if it is not."""
    ending = Path(path).suffix.lower()
    return ending if ending in COMPRESSED else ""


def suffixes(cfg):
    """{ending of a file's name: the kind of source that it is}."""
    return OF_PAIRS if cfg.sft else SUFFIXES


def kind_of(path, cfg):
    """txt, jsonl, parquet or, of pairs, json by the name of a file; None if it says none of them."""
    path = Path(path).with_suffix("") if packing(path) else Path(path)
    return suffixes(cfg).get(path.suffix.lower())


def file_source(path, cfg):
    """The source that a file is, of the kind that its name or --format says."""
    if path.is_fifo():
        raise ValueError(f"{path}: {not_a_file(path)}; give it as standard input: … | python data.py -")
    check_file(path)
    if path.suffix.lower() == ".deb":  # whatever --format says of the rest
        return Source("deb", str(path), *stamp(path))
    kind = kind_of(path, cfg) if cfg.format == "auto" else cfg.format
    if not kind and cfg.sft:
        raise ValueError(f"{path}: expected {', '.join(OF_PAIRS)} (or one of these with "
                         f"{', '.join(COMPRESSED)}), hf:NAME or -; --format= says what it is otherwise")
    if not kind:
        raise ValueError(f"{path}: expected docs, shakespeare, debian:PACKAGE, hf:NAME, -, a .deb, "
                         f"or a {', '.join(SUFFIXES)} file (or one of these with {', '.join(COMPRESSED)}); "
                         "--format= says what it is otherwise")
    return Source(kind, str(path), *stamp(path))


def check_unchanged(source):
    """Raise ValueError if a source's files are not those that were there when the preparation began."""
    if source.changed and stamp(Path(source.path)) != (source.size, source.changed):
        raise ValueError(f"{source.path} changed while it was read; start again")


@contextlib.contextmanager
def open_source(source, start=0):
    """Open a source's file, decompressed, at byte `start` of its content.

    Gives (file, a function that says how many bytes of the packed file were read). Raises ValueError, also
    within the block, where compressed data are damaged or cut short.
    """
    path = Path(source.path)
    with open(path, "rb") as raw, decompressed(raw, path) as file:
        try:
            if file is raw:
                raw.seek(start)
            else:
                skip_bytes(file, start)
            yield file, raw.tell
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as problem:
            raise ValueError(f"{path}: {DAMAGED} ({problem})") from None
        except OSError as problem:
            if packing(path) == ".bz2" and not problem.errno:  # that is how bz2 says it
                raise ValueError(f"{path}: {DAMAGED} ({problem})") from None
            raise


def decompressed(raw, path):
    """An open file's content as a file, by the ending of its name."""
    if packing(path) == ".zst":
        return io.BufferedReader(ZstandardReader(raw, path), BUFFER_BYTES)
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[packing(path)](raw) if packing(path) else raw


def skip_bytes(file, n):
    """Read the next `n` bytes of a file and forget them: there is no other way into a compressed file."""
    while n > 0:
        block = file.read(min(n, BUFFER_BYTES))
        if not block:
            return
        n -= len(block)


class ZstandardReader(io.RawIOBase):
    """The content of a .zst file of any number of frames.

    Unlike zstandard's own reader it notices that a frame is cut short. Raises EOFError for damaged data, and
    ValueError without the zstandard package.
    """

    def __init__(self, raw, path):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: .zst needs the zstandard package: pip install '.[data]'") from None
        self.raw = raw
        self.error = zstandard.ZstdError
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as of `zstd --long=31`
        self.frame = None  # what decompresses the current frame
        self.packed = b""  # bytes behind the last frame's end
        self.text = b""  # decompressed, and not yet read

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.text:
            packed = self.packed or self.raw.read(1 << 16)
            if not packed:
                if self.frame:
                    raise EOFError("the file ends inside a frame")
                return 0
            self.decompress(packed)
        n = min(len(buffer), len(self.text))
        buffer[:n], self.text = self.text[:n], self.text[n:]
        return n

    def decompress(self, packed):
        """Decompress the next bytes of the file into self.text."""
        self.frame = self.frame or self.decompressor.decompressobj()
        try:
            self.text = memoryview(self.frame.decompress(packed))
        except self.error as problem:
            raise EOFError(problem) from None
        self.packed = b""
        if self.frame.eof:
            self.packed, self.frame = self.frame.unused_data, None
