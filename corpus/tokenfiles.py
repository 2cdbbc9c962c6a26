"""Token files of every usual layout, read as they are: our own, nanoGPT's, llm.c's and Megatron's.

A corpus is two long streams of tokens, for training and for validation. It is a folder that corpus/prepare.py
wrote (meta.json, *.bin, token_bytes.bin), or token files as others write them: nanoGPT's raw uint16, llm.c's
and modded-nanogpt's shards, Megatron's .bin/.idx pairs.
"""

import contextlib
import hashlib
import os
import re
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configurator import parse_number, split_paths
from corpus import tokenizers
from corpus.characters import read_alphabet
from corpus.files import check_file, list_folder, map_tokens
from corpus.megatron_dataset import open_megatron
from corpus.pairs import PairIndex, index_pairs
from corpus.records import DIGEST, read_record, real, whole
from corpus.stream import DocumentStarts, Stream, document_lengths, next_document_start

MAX_HASHED_BYTES = 1 << 30  # larger prepared corpora are not hashed again at every start, only measured


class Corpus(NamedTuple):
    """Tokens for training and validation, what is known of them, and every token's length in bytes."""

    folder: Path
    meta: dict  # format, tokenizer, n_vocab, eos_id, mask_id; for each split tokens, sha256, …
    train: Stream
    val: Stream
    token_bytes: np.ndarray
    tokenizer_file: Path | None = None  # if its tokenizer is a tokenizer.json
    byte_ratio: float = 1.0  # bytes of the validation text over those that its tokens spell
    train_pairs: PairIndex | None = None  # where it consists of question-answer pairs
    val_pairs: PairIndex | None = None


def load_corpus(folder, tokenizer_name="", val_share=0.0, eos="", eos_opens=False):
    """Open a prepared corpus, after checking sizes, dtype and checksums, or token files in another layout.

    Others' files do not say which tokenizer made them, so `tokenizer_name` has to; eos: the token that ends a
    document in them, or begins it (eos_opens), if it is not the tokenizer's own. If none of them is for
    validation, the last `val_share` of their tokens is, from a document's start on. Raises ValueError or
    FileNotFoundError.
    """
    folder = Path(folder)
    allow_many_open_files()

    # Without its meta.json a prepared folder is damaged: token_bytes.bin tells it from a nanoGPT folder.
    if not any((folder / name).is_file() for name in ("meta.json", "token_bytes.bin")):
        return load_foreign(folder, tokenizer_name, val_share, eos, eos_opens)

    if eos_opens:
        raise ValueError(f"{folder}: eos_opens is for others' token files; in those of data.py an eos ends "
                         "each document")
    corpus = load_prepared(folder)
    if tokenizer_name:
        name = tokenizers.load_tokenizer(tokenizer_name, (folder,), eos).name
        if name != corpus.meta["tokenizer"]:
            raise ValueError(f"{folder} was prepared with tokenizer '{corpus.meta['tokenizer']}', "
                             f"not '{name}'")
    return corpus


def allow_many_open_files():
    """Raise the limit on open files: each mapped file counts as open, and the usual limit is 1024."""
    with contextlib.suppress(ValueError, OSError):
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))


def parse_corpora(text):
    """Parse `path`, `path:weight` or `path:weight:unique_tokens`, several with commas between.

    Returns [(path, weight or None, unique tokens or 0)]. A weight may be left empty; a path that is there may
    hold commas and colons. Raises ValueError.
    """
    corpora = [parse_corpus(item) for item in split_paths(text, is_item)]
    if not corpora:
        raise ValueError("corpus: name at least one folder")
    if len({weight is None for _, weight, _ in corpora}) > 1:
        raise ValueError(f"corpus={text}: give every source a weight, or none")
    return corpora


def is_item(text):
    """Whether a text, which may have commas in it, is one item of a corpus setting."""
    path, numbers = split_item(text)
    return is_there(path) and "," not in "".join(numbers)


def split_item(item):
    """(path, the numbers behind it) of an item of a corpus setting: the longest path that is there."""
    fields = item.split(":")
    n = next((n for n in range(len(fields), 1, -1) if is_there(":".join(fields[:n]))), 1)
    return ":".join(fields[:n]), fields[n:]


def is_there(path):
    """Whether there is a folder or file of this path, or a Megatron dataset of this prefix."""
    return any(os.path.exists(path + end) for end in ("", ".bin", "_train.bin"))


def parse_corpus(item):
    """(path, weight or None, unique tokens or 0) of one item of a corpus setting. Raises ValueError."""
    path, numbers = split_item(item)
    problem = f"corpus={item}: write path, path:weight or path:weight:unique_tokens"
    try:
        weight, unique_tokens = (float(parse_number(n)) if n else None for n in (numbers + ["", ""])[:2])
    except ValueError:
        raise ValueError(problem) from None
    if len(numbers) > 2 or not path:
        raise ValueError(problem)
    if weight is not None and not 0 < weight < 1e9:
        raise ValueError(problem)
    if unique_tokens is not None and not 1 <= unique_tokens < 1e18:
        raise ValueError(problem)
    return path, weight, int(unique_tokens or 0)


# ---------------------------------------------------------------------------------------- our own layout

FILE = {"name": re.compile(r"[^/\0]+"), "tokens": whole(), "sha256": DIGEST}
SPLIT = {
    "tokens": whole(),
    "bytes": whole(),
    "token_bytes?": whole(),
    "sha256": str,
    "files": [FILE],
    "answer_tokens?": whole(),
    "answer_files?": [FILE],  # of question-answer pairs: a byte beside each token (corpus/pairs.py)
}
META = {  # meta.json
    "format": real(),
    "sources": [str],
    "tokenizer": str,
    "n_vocab": whole(1, 1 << 32),
    "eos_id": whole(),
    "mask_id": whole(),
    "dtype": ("uint16", "uint32"),
    "train": SPLIT,
    "val": SPLIT,
}


def load_prepared(folder):
    """Open a folder that corpus/prepare.py wrote. Raises ValueError where a file is not as meta.json says."""
    meta, dtype, files = read_meta(folder)
    is_small = sum(file["tokens"] for _, file in files) * dtype.itemsize <= MAX_HASHED_BYTES
    arrays = {"train": [], "val": []}
    for split, file in files:
        path = folder / file["name"]
        array = map_tokens(path, dtype, file["tokens"], "meta.json")
        if is_small:
            check_tokens(path, array, file["sha256"], meta["n_vocab"])
        arrays[split].append(array)

    lengths = folder / "token_bytes.bin"
    if not lengths.is_file() or lengths.stat().st_size != 2 * meta["n_vocab"]:
        raise ValueError(f"{lengths}: missing, or not of the vocabulary in meta.json; "
                         "prepare the corpus again")
    token_bytes = np.fromfile(lengths, np.uint16)
    tokenizer_file = folder / "tokenizer.json"
    if not tokenizer_file.is_file():
        tokenizer_file = None
    train, val = Stream(arrays["train"]), Stream(arrays["val"])
    train_pairs, val_pairs = (load_pairs(folder, split, meta, len(stream), is_small)
                              for split, stream in (("train", train), ("val", val)))
    ratio = 1.0
    if meta["tokenizer"].startswith("tokenizer.json "):  # which may change the text before it becomes tokens
        ratio = meta["val"]["bytes"] / (meta["val"].get("token_bytes") or count_bytes(val, token_bytes))
    return Corpus(folder, meta, train, val, token_bytes, tokenizer_file, ratio, train_pairs, val_pairs)


def load_pairs(folder, split, meta, n_tokens, is_small):
    """The PairIndex of a split, None for text. Raises ValueError where a file is not as meta.json says."""
    if "answer_files" not in meta[split]:
        return None
    arrays = []
    for file in meta[split]["answer_files"]:
        path = folder / file["name"]
        array = map_tokens(path, np.dtype(np.uint8), file["tokens"], "meta.json")
        if is_small:
            check_tokens(path, array, file["sha256"], 256)
        arrays.append(array)
    marks = np.concatenate([np.empty(0, np.uint8), *arrays])
    try:
        if len(marks) != n_tokens:
            raise ValueError(f"{len(marks)} marks for {n_tokens} tokens")
        return index_pairs(marks)
    except ValueError as problem:
        raise ValueError(f"{folder}: the files answers_{split} are damaged ({problem}); "
                         "prepare the corpus again") from None


def count_bytes(stream, token_bytes):
    """How many bytes a stream's tokens spell: older corpora do not say it in meta.json."""
    return sum(int(token_bytes[chunk].sum()) for chunk in stream.chunks()) or 1


def read_meta(folder):
    """(meta.json, dtype, [(split, entry of a token file)]) of a corpus. Raises ValueError or OSError."""
    try:
        meta = read_record(folder / "meta.json", META)
        dtype = np.dtype(meta["dtype"])
        if not meta["eos_id"] < meta["n_vocab"] <= meta["mask_id"]:
            raise ValueError("eos_id < n_vocab ≤ mask_id is needed")
        if not (meta["val"]["bytes"] > 0 and meta["tokenizer"]):
            raise ValueError("text in val and a tokenizer are needed")
        if not meta["val"].get("token_bytes", 1) > 0:
            raise ValueError("tokens in val that spell text are needed")
        if meta["n_vocab"] - 1 > np.iinfo(dtype).max:
            raise ValueError(f"a vocabulary of {meta['n_vocab']} is above what {dtype.name} holds")
    except ValueError as problem:
        raise ValueError(f"{folder}/meta.json is damaged ({problem}); prepare it again") from None
    files = [(split, file) for split in ("train", "val") for file in meta[split]["files"]]
    return meta, dtype, files


def check_tokens(path, array, digest, n_vocab):
    """Raise ValueError unless a file's tokens have this SHA-256 and lie within the vocabulary."""
    if hashlib.sha256(array).hexdigest() != digest:
        raise ValueError(f"{path}: its SHA-256 is not the one in meta.json; prepare the corpus again")
    largest = int(array.max())
    if largest >= n_vocab:
        raise ValueError(f"{path}: token {largest}, but meta.json says the vocabulary is {n_vocab}; "
                         "prepare it again")


# --------------------------------------------------------------------------------------- others' layouts


class TokenFiles(NamedTuple):
    """Token files of one layout, opened."""

    layout: str  # nanoGPT, llm.c or Megatron
    stream: Stream
    fingerprint: str  # a SHA-256 of their names, lengths and samples of their tokens


def load_foreign(folder, tokenizer_name, val_share, eos, eos_opens):
    """Open others' token files: a folder, one .bin file, or a Megatron prefix.

    Raises ValueError or FileNotFoundError.
    """
    paths = find_token_files(folder)
    if not paths["train"]:
        is_built_in = folder.name in ("docs", "shakespeare")
        names = folder.name if is_built_in else f"FILE --name={folder.name}"
        raise FileNotFoundError(f"no corpus in '{folder}'; prepare one with: python data.py {names}")
    tokenizer = foreign_tokenizer(paths["train"][0], tokenizer_name, eos)
    train = open_token_files(paths["train"], tokenizer, eos_opens)
    layout = train.layout
    if paths["val"]:
        val = open_token_files(paths["val"], tokenizer, eos_opens)
    elif val_share:
        train, val = split_by_share(train, val_share, tokenizer.eos_id)
    else:
        raise ValueError(f"{folder}: no validation tokens; add a file with 'val' in its name, "
                         "or --val_share=0.01 to keep the last 1 %")

    meta = dict(format=layout, tokenizer=tokenizer.name, n_vocab=tokenizer.n_vocab,
                eos_id=tokenizer.eos_id, mask_id=tokenizer.mask_id)
    for split, files in (("train", train), ("val", val)):
        n_tokens = len(files.stream) - files.stream.n_prepended
        meta[split] = dict(tokens=n_tokens, sha256=files.fingerprint)
    tokenizer_file = getattr(tokenizer, "path", None)
    ratio = ratio_without_prefixes(val.stream, tokenizer) if tokenizer.prefix_bytes else 1.0
    return Corpus(folder, meta, train.stream, val.stream, tokenizer.token_bytes(), tokenizer_file, ratio)


def foreign_tokenizer(path, name, eos):
    """The tokenizer of others' token files, of which `path` is one. Raises ValueError."""
    alphabet = path.with_name("meta.pkl")
    if not os.path.lexists(alphabet):
        if not name:
            raise ValueError(f"{path.parent}: token files do not say which tokenizer made them; "
                             "add --tokenizer=gpt2 (or another)")
        return tokenizers.load_tokenizer(name, eos=eos)
    tokenizer = read_alphabet(alphabet)
    if name not in ("", tokenizer.name) or eos:
        given = f"tokenizer={name}" if name else f"eos={eos}"
        raise ValueError(f"{alphabet} says which character each token is: {given} can't be right; "
                         "leave it out")
    return tokenizer


def ratio_without_prefixes(stream, tokenizer):
    """The byte_ratio of tokens whose text is not there: each document begins with the tokenizer's prefix."""
    n_documents = sum(np.count_nonzero(lengths) for lengths in document_lengths(stream, tokenizer.eos_id))
    return 1 - tokenizer.prefix_bytes * n_documents / count_bytes(stream, tokenizer.token_bytes())


def split_by_share(files, val_share, eos_id):
    """[TokenFiles for training, for validation]: the latter the last share, from a document's start on."""
    stream = files.stream
    position = next_document_start(stream, int(len(stream) * (1 - val_share)), eos_id)
    fingerprint = f"{files.fingerprint} {val_share}"
    halves = [half.with_leading_eos(eos_id) for half in stream.split_at(position)]
    return [TokenFiles(files.layout, half, fingerprint) for half in halves]


def find_token_files(folder):
    """{split: its .bin files} at `folder`: a folder, one file, or a Megatron prefix.

    A file's name tells its split; test files are in neither. A prefix may stand for two pairs, PREFIX_train
    and PREFIX_val, as `data.py export` writes them.
    """
    one_file = folder if folder.suffix == ".bin" else folder.parent / f"{folder.name}.bin"
    two_files = {split: [folder.parent / f"{folder.name}_{split}.bin"] for split in ("train", "val")}
    if folder.is_dir():
        found = list_folder(folder, "*.bin")
    elif one_file.is_file():
        found = [one_file]
    elif all(path.is_file() for path, in two_files.values()):
        return two_files
    else:
        found = []

    paths = {"train": [], "val": []}
    for path in found:
        split = split_by_name(path) if len(found) > 1 else "train"
        if split in paths:
            paths[split].append(path)
    return paths


def split_by_name(path):
    """train, val or test: what the words of a file's name say."""
    words = set(path.stem.lower().replace("-", "_").replace(".", "_").split("_"))
    if "test" in words:
        return "test"
    return "val" if words & {"val", "valid", "validation"} else "train"


def open_token_files(paths, tokenizer, eos_opens=False):
    """Open files of one layout as TokenFiles. Raises ValueError."""
    opened = [open_token_file(path) for path in paths]
    layouts = {layout for layout, _, _ in opened}
    dtypes = {tokens.dtype for _, tokens, _ in opened}
    if len(layouts) > 1 or len(dtypes) > 1:
        kinds = ", ".join(map(str, (*layouts, *dtypes)))
        raise ValueError(f"{paths[0].parent}: files of different layouts or types ({kinds}); "
                         "keep one kind in a folder")
    dtype = dtypes.pop()
    if tokenizer.n_vocab - 1 > np.iinfo(dtype).max:
        raise ValueError(f"{paths[0]}: tokens of {dtype.name}, which can't hold tokenizer '{tokenizer.name}' "
                         f"of {tokenizer.n_vocab} tokens")

    document_starts, position = [], 0
    for _, tokens, offsets in opened:
        if offsets is not None and len(offsets):
            document_starts.append(DocumentStarts(position, offsets, dtype.itemsize))
        position += len(tokens)
    arrays = [tokens for _, tokens, _ in opened]
    stream = Stream(arrays, document_starts, opens=eos_opens).with_leading_eos(tokenizer.eos_id)
    return TokenFiles(layouts.pop(), stream, fingerprint_of(paths, arrays))


def fingerprint_of(paths, arrays):
    """A SHA-256 of files' names, lengths and 64 samples of each one's tokens: a corpus may be terabytes."""
    digest = hashlib.sha256()
    for path, array in zip(paths, arrays):
        digest.update(f"{path.name} {len(array)}".encode())
        for start in np.linspace(0, max(0, len(array) - 4096), 64).astype(np.int64):
            digest.update(array[start : start + 4096].tobytes())
    return digest.hexdigest()


LLM_C_VERSIONS = {  # {the header's magic number: (version, dtype)}
    20240520: (1, np.dtype(np.uint16)),
    20240801: (7, np.dtype(np.uint32)),
}


def open_token_file(path):
    """(layout, tokens, byte offset of each document or None) of one .bin file. Raises ValueError."""
    check_file(path)
    if path.with_suffix(".idx").is_file():
        return "Megatron", *open_megatron(path)

    size = path.stat().st_size
    header = np.fromfile(path, np.int32, 256)
    magic = int(header[0]) if len(header) else 0
    if magic in LLM_C_VERSIONS:
        if len(header) < 256:
            raise ValueError(f"{path}: {size} bytes are less than the header of such a shard: truncated")
        version, dtype = LLM_C_VERSIONS[magic]
        if header[1] != version:
            raise ValueError(f"{path}: a shard of version {header[1]}; version {version} is known")
        return "llm.c", map_tokens(path, dtype, int(header[2]), "its header", header.nbytes), None

    if size == 0 or size % 2:
        raise ValueError(f"{path}: {size} bytes are no uint16 tokens (empty or truncated), "
                         "and it has no header of another layout")
    return "nanoGPT", np.memmap(path, np.uint16, mode="r"), None
