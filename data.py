"""Corpora: prepare token files, and read them back as a stateless stream of blocks.

    python data.py docs                                  # pydoc's topics and the standard library's docstrings
    python data.py shakespeare                           # downloads 1.1 MB
    python data.py my.jsonl --field=text --tokenizer=gpt2

Writes corpora/<name>/: train.bin and val.bin (raw uint16 or uint32 tokens), meta.json, and token_bytes.bin
(uint16: every token's length in UTF-8 bytes, for bits per byte).
Both token files start with the end-of-document token and every document ends with one.
"""

import argparse
import ast
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
BETWEEN_LINES = re.compile(r"\S\n(?=[^\s/])")
CHUNK = 1 << 20  # characters tokenized at a time
CHECKED = 1 << 30  # bytes; larger token files are not hashed again at every start, only sized


# ---------------------------------------------------------------------------------------------- tokenizers


class Bytes:
    """UTF-8 bytes: 0..255 are text, 256 ends a document, 257 is the mask."""

    name, n_vocab, eos_id, mask_id = "bytes", 257, 256, 257

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self):
        return np.array([1] * 256 + [0], np.uint16)


class Tiktoken:
    """A tiktoken encoding by name; the mask is the first id after its end-of-text token."""

    def __init__(self, name):
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"unknown tokenizer '{name}'; choose 'bytes' or one of {tiktoken.list_encoding_names()}")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as problem:  # requests' exceptions are OSErrors
            raise ValueError(f"cannot download tokenizer '{name}' ({type(problem).__name__}); "
                             "set TIKTOKEN_CACHE_DIR to a folder that holds its files") from None
        self.name, self.eos_id = name, self.encoding.eot_token
        text = self.encoding._mergeable_ranks.values()  # p50k_base has text above its eos; other specials are no text
        self.n_vocab = self.mask_id = max(self.eos_id, *text) + 1

    def encode(self, text):
        return np.asarray(self.encoding.encode_ordinary(text), np.uint32)

    def token_bytes(self):
        lengths = np.zeros(self.n_vocab, np.uint16)
        for token, i in self.encoding._mergeable_ranks.items():
            lengths[i] = len(token)
        return lengths

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids if i != self.eos_id and i < self.mask_id])


def tokenizer(name):
    """The tokenizer called `name`. n_vocab counts the ids that can occur in text, eos included, mask not;
    token_bytes() is the length of each in UTF-8 bytes, of which eos has none."""
    return Bytes() if name == "bytes" else Tiktoken(name)


# ------------------------------------------------------------------------------------------------- prepare


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


def text_chunks(path, start=0, stop=None):
    """Yield the UTF-8 text in bytes [start, stop) of `path` in pieces that tokenize as the whole would.

    A piece ends at a single newline between two non-blank characters, of which the second is no
    slash: no pre-tokenizer joins across it (o200k_base keeps slashes with punctuation before the newline).
    """
    held, scanned, position = "", 0, start
    with open(path, "rb") as file:
        file.seek(start)
        rest = b""
        while True:
            read = file.read(CHUNK if stop is None else min(CHUNK, stop - position))
            position += len(read)
            try:
                # errors in the last 3 bytes may be a character cut in two: keep it for the next read
                cut = len(rest + read) - (0 if not read else partial(rest + read))
                held += (rest + read)[:cut].decode("utf-8")
            except UnicodeDecodeError as problem:
                raise ValueError(f"{path}: not UTF-8 near byte {position - len(read) - len(rest) + problem.start}") from None
            rest = (rest + read)[cut:]
            if not read:
                break
            cuts = [m.start() + 2 for m in BETWEEN_LINES.finditer(held, scanned)]
            scanned = max(0, len(held) - 2)
            if cuts:
                yield held[: cuts[-1]]
                held, scanned = held[cuts[-1] :], 0
    if held:
        yield held


def partial(data):
    """How many bytes at the end of `data` begin a UTF-8 character that is not complete."""
    for back in range(1, min(4, len(data) + 1)):
        byte = data[-back]
        if byte & 0xC0 != 0x80:  # not a continuation: the last character starts here
            width = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if width > back else 0
    return 0


def json_texts(path, field):
    """Yield record[field] for every line of a .jsonl file; raises ValueError with the line's number."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8"))[field]
            except UnicodeDecodeError as problem:
                raise ValueError(f"{path}:{number}: not UTF-8 near byte {problem.start} of the line") from None
            except (ValueError, RecursionError) as problem:  # also integers too long for Python, and deep nesting
                raise ValueError(f"{path}:{number}: not JSON: {problem}") from None
            except (KeyError, TypeError):
                raise ValueError(f"{path}:{number}: no field '{field}'; name the text's field with --field") from None
            if not isinstance(text, str):
                raise ValueError(f"{path}:{number}: field '{field}' is not text")
            if re.search("[\ud800-\udfff]", text):  # JSON's escapes can say what UTF-8 can't
                raise ValueError(f"{path}:{number}: field '{field}' holds half a character (a lone surrogate)")
            yield text


def goes_to_validation(text, fraction):
    """Whether a document belongs to the validation split: by its hash, so adding files never moves it."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < fraction * 2**64


def documents(source, field, fraction):
    """Yield (split, text, document ends here) of a named corpus, a .txt (one document) or a .jsonl file.

    One document is cut by position, its tail is for validation; several are split by hash, and exact
    duplicates of a document are dropped so that none can be in both splits.
    """
    if source.suffix == ".txt":
        size = source.stat().st_size
        cut = int(size * (1 - fraction))
        with open(source, "rb") as file:  # never inside a character
            file.seek(cut)
            while cut < size and file.read(1)[0] & 0xC0 == 0x80:
                cut += 1
        for split, start, stop in (("train", 0, cut), ("val", cut, size)):
            yield from ((split, text, False) for text in text_chunks(source, start, stop))
            yield split, "", True
        return
    seen = set()
    for text in python_docs() if str(source) == "docs" else json_texts(source, field):
        digest = hashlib.sha256(text.encode("utf-8")).digest()[:16]
        if text and digest not in seen:
            seen.add(digest)
            yield ("val" if goes_to_validation(text, fraction) else "train"), text, True


def prepare(source, folder, tokens, field="text", fraction=0.1, progress=lambda n_documents, n_tokens, n_bytes: None):
    """Tokenize `source` into `folder`, which appears only when complete. Returns the metadata.

    Raises ValueError for an empty or broken corpus and FileExistsError if `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it or choose another --name")
    dtype = np.dtype(np.uint16 if tokens.mask_id < 2**16 else np.uint32)
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    building.mkdir(parents=True)
    try:
        splits = {}
        for split in ("train", "val"):
            eos = np.array([tokens.eos_id], dtype).tobytes()
            file = open(building / f"{split}.bin", "wb")
            file.write(eos)
            splits[split] = dict(tokens=1, bytes=0, documents=0, file=file, hash=hashlib.sha256(eos))
        for split, text, ends in documents(Path(source), field, fraction):
            s = splits[split]
            ids = tokens.encode(text).astype(dtype)
            raw = (np.append(ids, dtype.type(tokens.eos_id)) if ends else ids).tobytes()
            s["file"].write(raw)
            s["hash"].update(raw)
            s["tokens"] += len(raw) // dtype.itemsize
            s["bytes"] += len(text.encode("utf-8"))
            s["documents"] += ends
            progress(*(sum(s[key] for s in splits.values()) for key in ("documents", "tokens", "bytes")))
        for split, s in splits.items():
            if not s["bytes"]:
                raise ValueError(f"{source}: no text for the {split} split; use more text or another --val")
            s["file"].flush()
            os.fsync(s["file"].fileno())
            s.pop("file").close()
            s["sha256"] = s.pop("hash").hexdigest()
        meta = dict(format=1, source=Path(source).name, tokenizer=tokens.name, n_vocab=tokens.n_vocab,
                    eos_id=tokens.eos_id, mask_id=tokens.mask_id, dtype=dtype.name, **splits)
        tokens.token_bytes().tofile(building / "token_bytes.bin")
        (building / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return meta


# ---------------------------------------------------------------------------------------------------- read


class Corpus(NamedTuple):
    """A prepared folder: its metadata, both token files, memory-mapped, and every token's length in bytes."""

    folder: Path
    meta: dict
    train: np.ndarray
    val: np.ndarray
    token_bytes: np.ndarray


def load_corpus(folder):
    """Open a prepared corpus after checking size, dtype and checksum; raises ValueError or FileNotFoundError."""
    folder = Path(folder)
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"no corpus in '{folder}'; prepare one with: python data.py "
                                + (folder.name if folder.name in ("docs", "shakespeare") else f"FILE --name={folder.name}"))
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype = {"uint16": np.dtype(np.uint16), "uint32": np.dtype(np.uint32)}[meta["dtype"]]
        expected = {split: (meta[split]["tokens"], meta[split]["sha256"]) for split in ("train", "val")}
        if not (meta["eos_id"] < meta["n_vocab"] <= meta["mask_id"] and meta["val"]["bytes"] > 0 and meta["tokenizer"]):
            raise ValueError("eos_id < n_vocab ≤ mask_id, text in val and a tokenizer are needed")
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{folder}/meta.json is damaged ({type(problem).__name__}: {problem}); prepare it again") from None
    arrays = {}
    for split, (count, digest) in expected.items():
        path = folder / f"{split}.bin"
        size = path.stat().st_size if path.is_file() else 0
        if size != count * dtype.itemsize:
            raise ValueError(f"{path}: {size} bytes, but meta.json says {count} tokens of {dtype.name} "
                             f"({count * dtype.itemsize} bytes): truncated or another dtype; prepare it again")
        arrays[split] = np.memmap(path, dtype, mode="r")
        if size <= CHECKED and hashlib.sha256(arrays[split]).hexdigest() != digest:
            raise ValueError(f"{path}: its SHA-256 is not the one in meta.json; prepare the corpus again")
        if size <= CHECKED and (largest := int(arrays[split].max())) >= meta["n_vocab"]:
            raise ValueError(f"{path}: token {largest}, but meta.json says the vocabulary is {meta['n_vocab']}; prepare it again")
    lengths = folder / "token_bytes.bin"
    if not lengths.is_file() or lengths.stat().st_size != 2 * meta["n_vocab"]:
        raise ValueError(f"{lengths}: missing, or not of the vocabulary in meta.json; prepare the corpus again")
    return Corpus(folder, meta, **arrays, token_bytes=np.fromfile(lengths, np.uint16))


# -------------------------------------------------------------------------------------------------- blocks


def permute(index, n, seed, epoch):
    """A keyed bijection of [0, n), applied to `index`: nothing of size n is stored.

    Twelve Feistel rounds over the next power of four (six leave a bias below n = 16), and cycle walking
    back into the range.
    index, epoch: int64 arrays of one shape. Returns int64.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = finalize(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) ^ finalize(epoch.astype(np.uint64)))
    keys = [finalize(key + np.uint64(round_ + 1)) for round_ in range(12)]
    result = index.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result >> half, result & mask
        for round_key in keys:
            left, right = right, left ^ (finalize(right ^ round_key) & mask)
        result = np.where(outside, left << half | right, result)
        outside = result >= np.uint64(n)
    return result.astype(np.int64)


def finalize(x):
    """MurmurHash3's 64-bit finalizer, elementwise (wraps modulo 2**64)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
        return x ^ x >> np.uint64(33)


class Blocks:
    """A token array as blocks of `length` tokens, each with the token before it, in a new order every epoch.

    Block b covers tokens 1 + b·length … (b + 1)·length; the token before it is what an AR model reads
    first, so AR and diffusion predict the same tokens. With unique_tokens, only a fixed random subset of
    blocks is used, and a smaller subset is contained in a larger one.
    """

    def __init__(self, tokens, length, seed=0, unique_tokens=0, n_vocab=2**32, what="training"):
        available = (len(tokens) - 1) // length
        if available < 1:
            raise ValueError(f"the {what} split has {len(tokens) - 1} tokens, fewer than one block of {length}")
        if unique_tokens and not length <= unique_tokens <= available * length:
            raise ValueError(f"unique_tokens={unique_tokens} must lie between one block ({length}) "
                             f"and the corpus ({available * length} tokens in whole blocks)")
        self.what, self.n_vocab, self.seed = what, n_vocab, seed
        self.available, self.n = available, (unique_tokens or available * length) // length
        step = tokens.strides[0]
        self.table = np.lib.stride_tricks.as_strided(tokens, (available, length + 1), (length * step, step), writeable=False)

    def ids(self, sample):
        """The block of each sample: a pure function of the seed and the sample's index (int64 array)."""
        epoch, place = sample // self.n, sample % self.n
        block = permute(place, self.n, self.seed, epoch)
        if self.n < self.available:  # the subset: the first n of one fixed order of all the blocks
            block = permute(block, self.available, self.seed, np.full_like(block, -1))
        return block

    def rows(self, sample):
        """Tokens of the samples, (len(sample), length + 1) int64: the token before the block, then the block."""
        return self.read(self.ids(sample))

    def read(self, index):
        """The blocks numbered `index` as they stand in the file. Raises ValueError for ids that are no text."""
        rows = self.table[index].astype(np.int64)
        if (largest := rows.max(initial=0)) >= self.n_vocab:
            raise ValueError(f"the {self.what} split holds token {largest}, beyond its vocabulary of {self.n_vocab}; prepare it again")
        return rows


# ---------------------------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="docs", help="docs (the default), shakespeare, or a .txt or .jsonl file")
    parser.add_argument("--name", help="folder under --out (default: the source's name)")
    parser.add_argument("--out", default="corpora", help="where corpora are kept (default: corpora)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a tiktoken encoding such as gpt2 (default: bytes)")
    parser.add_argument("--field", default="text", help="the text's field in a .jsonl file (default: text)")
    parser.add_argument("--val", type=float, default=0.1, help="share of the text kept for validation (default: 0.1)")
    args = parser.parse_args()
    source = Path(args.source)
    try:
        if not 0 < args.val < 1:
            raise ValueError(f"--val={args.val}: must lie between 0 and 1")
        folder = Path(args.out) / (args.name or source.stem)
        if folder.exists():
            raise FileExistsError(f"{folder} exists; remove it or choose another --name")
        if args.source == "shakespeare":
            source = download(SHAKESPEARE, Path(args.out) / ".shakespeare.txt")
        elif args.source != "docs" and source.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"{source}: expected docs, shakespeare, or a .txt or .jsonl file")
        elif args.source != "docs" and not source.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        tokens = tokenizer(args.tokenizer)
        meta = prepare_with_bar(source, folder, tokens, args.field, args.val)
    except (ValueError, OSError) as problem:
        sys.exit(f"data.py: {problem}")
    for split in ("train", "val"):
        s = meta[split]
        print(f"{folder}/{split}.bin: {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes")


def prepare_with_bar(source, folder, tokens, field, fraction):
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    total = source.stat().st_size if source.is_file() else None
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeElapsedColumn()
    with Progress(*columns) as bar:
        task = bar.add_task(f"preparing {folder}", total=total, counts="")

        def progress(n_documents, n_tokens, n_bytes):
            bar.update(task, completed=n_bytes, counts=f"{n_documents:,} documents, {n_tokens:,} tokens")

        return prepare(source, folder, tokens, field, fraction, progress)


def download(url, path):
    """Fetch `url` to `path` once; an interrupted download leaves nothing behind."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(partial_path, "wb") as file:
                shutil.copyfileobj(response, file)
                if file.tell() != int(response.headers.get("Content-Length", file.tell())):
                    raise OSError(f"the connection closed after {file.tell()} bytes")
        except (OSError, http.client.HTTPException) as problem:
            partial_path.unlink(missing_ok=True)
            raise OSError(f"cannot download {url}: {problem}; save it as a .txt file and give its path instead") from None
        partial_path.rename(path)
    return path


if __name__ == "__main__":
    main()
