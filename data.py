"""Tokens: tokenizers, token files of every usual layout, and the stateless stream of blocks that training reads.

    python data.py docs                                  # prepares a corpus: prepare.py
    python data.py inspect corpora/docs                  # what is in it, and is it whole?

A corpus is two long rows of tokens, for training and for validation. It is a folder that prepare.py wrote
(meta.json, *.bin, token_bytes.bin), or token files as others write them, read as they are: nanoGPT's raw
uint16, llm.c's and modded-nanogpt's shards, Megatron's .bin/.idx pairs.
"""

import contextlib
import functools
import hashlib
import json
import os
import resource
from pathlib import Path
from typing import NamedTuple

import numpy as np

CHECKED = 1 << 30  # bytes; larger token files are not hashed again at every start, only sized


# ---------------------------------------------------------------------------------------------- tokenizers
# Each has: name; n_vocab, the ids that can occur in text (eos included, mask not); eos_id, which ends a document;
# mask_id ≥ n_vocab; specials {text: id}; encode_batch(texts) → arrays of ids; encode(text); decode(ids) → text;
# token_bytes() (n_vocab,) uint16, the length of each token in UTF-8 bytes (eos and other specials have none);
# cuts, whether pieces that sources.last_cut separates are tokenized as the whole text would be.


class Bytes:
    """UTF-8 bytes: 0..255 are text, 256 ends a document, 257 is the mask."""

    name, n_vocab, eos_id, mask_id, specials, cuts = "bytes", 257, 256, 257, {"<eos>": 256}, True

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self):
        return np.array([1] * 256 + [0], np.uint16)


class Tiktoken:
    """A tiktoken encoding by name; the mask is the first id after its end-of-text token."""

    cuts = True

    def __init__(self, name):
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"unknown tokenizer '{name}'; choose bytes, one of {', '.join(tiktoken.list_encoding_names())}, "
                             "or give the path of a tokenizer.json")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as problem:  # requests' exceptions are OSErrors
            raise ValueError(f"cannot download tokenizer '{name}' ({type(problem).__name__}); "
                             "set TIKTOKEN_CACHE_DIR to a folder that holds its files") from None
        self.name, self.eos_id, self.specials = name, self.encoding.eot_token, dict(self.encoding._special_tokens)
        text = self.encoding._mergeable_ranks.values()  # p50k_base has text above its eos; other specials are no text
        self.n_vocab = self.mask_id = max(self.eos_id, *text) + 1

    def encode(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())  # what looks like a special token is text, too

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return self.encoding.decode([int(i) for i in ids if i != self.eos_id and i < self.mask_id])

    def token_bytes(self):
        lengths = np.zeros(self.n_vocab, np.uint16)
        for token, i in self.encoding._mergeable_ranks.items():
            lengths[i] = len(token)
        return lengths


class TokenizerFile:
    """A tokenizer.json (Hugging Face's `tokenizers`). Known by its digest: a copy travels with the corpus and the run."""

    ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "<|im_end|>", "[SEP]")
    MASKS = ("<|mdm_mask|>", "<|mask|>", "<mask>", "[MASK]")
    SPLITS = [dict(type="Split", behavior="Isolated", invert=False, pattern={  # Qwen's and Llama 3's
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"})
        for digits in ("", "{1,3}")]

    def __init__(self, path, eos=""):
        try:
            import tokenizers
        except ImportError:
            raise ValueError("a tokenizer.json needs the tokenizers package: pip install '.[data]'") from None
        self.path = Path(path)
        raw = self.path.read_bytes()
        try:
            self.inner, layout = tokenizers.Tokenizer.from_str(raw.decode("utf-8")), json.loads(raw)
        except Exception as problem:  # the package raises plain Exceptions
            raise ValueError(f"{path}: no tokenizer.json: {str(problem).splitlines()[0]}") from None
        self.inner.encode_special_tokens = True  # what looks like a special token is text, too
        self.inner.no_padding()
        self.inner.no_truncation()
        vocab = self.inner.get_vocab(with_added_tokens=True)
        self.specials = {t["content"]: t["id"] for t in layout.get("added_tokens", ()) if t["special"]}
        eos = eos or next((end for end in self.ENDS if end in self.specials), "")
        if eos not in vocab:
            raise ValueError(f"{path}: " + (f"has no token {eos!r}" if eos else "which token ends a document?") + "; give it with --eos="
                             + (f" (its specials: {', '.join(self.specials)})" if self.specials else ""))
        self.eos, self.eos_id = eos, vocab[eos]
        text = max(i for i in vocab.values() if i not in self.specials.values())
        own = next((self.specials[mask] for mask in self.MASKS if self.specials.get(mask, -1) > max(text, self.eos_id)), None)
        self.n_vocab = self.mask_id = max(vocab.values()) + 1 if own is None else own  # one that comes after the text ends it: LLaDA's, Dream's
        self.name = f"tokenizer.json {hashlib.sha256(raw).hexdigest()[:16]} {eos}"
        *splits, last = components(layout.get("pre_tokenizer")) or [{}]
        plain = (layout.get("normalizer") or {"type": "NFC"})["type"] == "NFC"  # which composes nothing with a newline or a space
        self.cuts = plain and last.get("type") == "ByteLevel" and not last["add_prefix_space"] and (
            all(part in self.SPLITS for part in splits) if splits else last.get("use_regex", True))
        self.lengths = self.measure(vocab, layout)

    def measure(self, vocab, layout):
        """Bytes of text behind each token, for the two kinds of BPE that lose none."""
        kinds = {part["type"] for key in ("pre_tokenizer", "decoder") for part in components(layout.get(key))}
        added = {t["id"] for t in layout.get("added_tokens", ())}
        lengths = np.zeros(self.n_vocab, np.uint16)
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"{self.path}: neither byte-level nor with byte fallback: its tokens do not spell the text they stand for")
        for token, i in vocab.items():
            if i >= self.n_vocab:
                continue
            if i in added:
                lengths[i] = 0 if token in self.specials else len(token.encode("utf-8"))
            elif "ByteLevel" in kinds:
                lengths[i] = len(token)  # one character stands for one byte
            else:
                byte = len(token) == 6 and token.startswith("<0x")
                lengths[i] = 1 if byte else len(token.replace("▁", " ").encode("utf-8"))
        return lengths

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        return [np.array(e.ids, np.uint32) for e in self.inner.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.inner.decode([int(i) for i in ids if i < self.n_vocab and i != self.eos_id], skip_special_tokens=False)

    def token_bytes(self):
        return self.lengths


def components(part):
    """A pre-tokenizer or decoder of a tokenizer.json as a list: those of a sequence, or itself."""
    return [] if not part else part.get("pretokenizers") or part.get("decoders") or [part]


def tokenizer(name, folders=(), eos=""):
    """The tokenizer called `name`: bytes, a tiktoken encoding, or the path of a tokenizer.json (or of a folder with one).

    The name that such a file's tokenizer has afterwards is looked for in `folders`, by digest. Raises ValueError.
    """
    if name.startswith("tokenizer.json "):
        _, digest, eos = name.split(" ", 2)
        for path in (Path(folder) / "tokenizer.json" for folder in folders):
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
                return TokenizerFile(path, eos)
        raise ValueError(f"no tokenizer.json of digest {digest} in {' or '.join(map(str, folders))}; put the one that prepared the corpus there")
    path = Path(name) / "tokenizer.json"
    path = path if path.is_file() else Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"{path}: no such tokenizer file")
        return TokenizerFile(path, eos)
    if eos:
        raise ValueError(f"eos={eos}: only a tokenizer.json leaves that open")
    return Bytes() if name == "bytes" else Tiktoken(name)


# -------------------------------------------------------------------------------------- tokens in their files


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
        if tokenizer_name and (name := tokenizer(tokenizer_name, (folder,)).name) != corpus.meta["tokenizer"]:
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
    tokens = tokenizer(tokenizer_name)
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


# ---------------------------------------------------------------------------------------------- our own files


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


# --------------------------------------------------------------------------------------------- others' files

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


# -------------------------------------------------------------------------------------------------- blocks


def permute(index, n, seed, epoch):
    """A keyed bijection of [0, n), applied to `index`: nothing of size n is stored.

    Twelve Feistel rounds over the next power of four (six leave a bias below n = 16), and cycle walking back into the range.
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
    """A stream as blocks of `length` tokens, each with the token before it, in a new order every epoch.

    Block b covers tokens 1 + b·length … (b + 1)·length; the token before it is what an AR model reads first, so AR and diffusion predict
    the same tokens. With unique_tokens, only a fixed random subset of blocks is used, and a smaller subset is contained in a larger one.
    """

    def __init__(self, stream, length, seed=0, unique_tokens=0, n_vocab=2**31, what="training"):
        stream = stream if isinstance(stream, Stream) else Stream([stream])
        available = (len(stream) - 1) // length
        if available < 1:
            raise ValueError(f"the {what} split has {max(0, len(stream) - 1):,} tokens, fewer than one block of {length:,}; lower --block_len, or prepare more text"
                             + " or a larger share for validation" * what.startswith("validation"))
        if unique_tokens and not length <= unique_tokens <= available * length:
            raise ValueError(f"unique_tokens={unique_tokens:,} must lie between one block ({length:,}) "
                             f"and the {what} split ({available * length:,} tokens in whole blocks)")
        self.stream, self.length, self.what, self.n_vocab, self.seed = stream, length, what, n_vocab, seed
        self.available, self.n = available, (unique_tokens or available * length) // length

    def ids(self, sample):
        """The block of each sample: a pure function of the seed and the sample's index (int64 array)."""
        epoch, place = np.divmod(sample, self.n)
        return self.chosen(permute(place, self.n, self.seed, epoch))

    def chosen(self, number):
        """The blocks numbered 0 … n − 1 of the subset: the first n of one fixed order of them all."""
        return permute(number, self.available, self.seed, np.full_like(number, -1)) if self.n < self.available else number

    def rows(self, sample):
        """Tokens of the samples, (len(sample), length + 1) int32: the token before the block, then the block."""
        return self.read(self.ids(sample))

    def read(self, index):
        """The blocks numbered `index` as they stand in the files, int32. Raises ValueError for ids that are no text."""
        rows = self.stream.windows(index * self.length, self.length + 1)
        largest = int(rows.max(initial=0))
        if rows.dtype.kind == "i" and (least := int(rows.min(initial=0))) < 0:
            largest = least
        if not 0 <= largest < self.n_vocab:
            raise ValueError(f"the {self.what} split holds token {largest}, beyond its vocabulary of {self.n_vocab}; "
                             "another tokenizer's, or damaged: prepare it again")
        return rows.astype(np.int32)

    def documents(self, index, rows, eos_id, causal):
        """Ids (B, length) int32, equal within a document and growing along a row, for what a network reads of `rows` = read(index).

        Causal: the tokens before those predicted, and an eos opens the document that follows; else the block's own, and
        an eos closes its document.
        """
        read = rows[:, :-1] if causal else rows[:, 1:]
        ends = read == eos_id
        if self.stream.borders:
            position = index[:, None] * self.length + np.arange(self.length) + (0 if causal else 1)
            number = self.stream.document(position + (ends if causal else 0))
            return (number - number[:, :1]).astype(np.int32)
        return np.cumsum(ends, axis=1, dtype=np.int32) - (0 if causal else ends)


class Mixture:
    """Blocks of several sources as one. Without weights, every epoch visits every block of each source once; with weights, a
    source gives its share of the samples and has epochs of its own."""

    PERIOD = 1 << 14  # samples in which each source gives a fixed number, in random order

    def __init__(self, sources, weights=None, seed=0):
        self.sources, self.seed = sources, seed
        self.length, self.n, self.available = sources[0].length, sum(s.n for s in sources), sum(s.available for s in sources)
        self.first = np.cumsum([0] + [s.available for s in sources])  # the number of each source's first block
        self.first_chosen = np.cumsum([0] + [s.n for s in sources])
        self.share = None
        if weights:
            exact = np.array(weights) / sum(weights) * self.PERIOD
            self.share = np.floor(exact).astype(np.int64)
            self.share[np.argsort(self.share - exact, kind="stable")[: self.PERIOD - self.share.sum()]] += 1  # largest remainders
            if not self.share.all():
                raise ValueError(f"a weight below 1/{self.PERIOD} of their sum is too small")
        self.order = functools.lru_cache(4)(self.order)

    def order(self, period):
        """The source of each of a period's samples, and how many of its samples in this period came before."""
        place = np.arange(self.PERIOD)
        source = np.repeat(np.arange(len(self.share)), self.share)[permute(place, self.PERIOD, self.seed, np.full_like(place, period))]
        before = np.empty_like(place)
        for k, share in enumerate(self.share):
            before[source == k] = np.arange(share)
        return source, before

    def ids(self, sample):
        """The block of each sample, numbered over all the sources: a pure function of the seed and the sample's index."""
        block = np.empty_like(sample)
        if self.share is None:
            epoch, place = np.divmod(sample, self.n)
            place = permute(place, self.n, self.seed, epoch)
            source = np.searchsorted(self.first_chosen, place, side="right") - 1
            number = place - self.first_chosen[source]
        else:
            period, place = np.divmod(sample, self.PERIOD)
            source, number = np.empty_like(sample), np.empty_like(sample)
            for p in np.unique(period):
                here = period == p
                source[here], number[here] = (part[place[here]] for part in self.order(int(p)))
            number += period * self.share[source]
        for k in np.unique(source):
            here, s = source == k, self.sources[k]
            block[here] = self.first[k] + (s.chosen(number[here]) if self.share is None else s.ids(number[here]))
        return block

    def by_source(self, index):
        """(rows of a batch, their source, their numbers in it) for each source that occurs among the blocks `index`."""
        source = np.searchsorted(self.first, index, side="right") - 1
        for k in np.unique(source):
            here = source == k
            yield here, self.sources[k], index[here] - self.first[k]

    def rows(self, sample):
        return self.read(self.ids(sample))

    def read(self, index):
        """As `Blocks.read`."""
        rows = np.empty((len(index), self.length + 1), np.int32)
        for here, source, number in self.by_source(index):
            rows[here] = source.read(number)
        return rows

    def documents(self, index, rows, eos_id, causal):
        """As `Blocks.documents`."""
        ids = np.empty((len(index), self.length), np.int32)
        for here, source, number in self.by_source(index):
            ids[here] = source.documents(number, rows[here], eos_id, causal)
        return ids


def positions_within(documents):
    """Each token's place in its document, as far as the row shows it. Ids (B, L) as of `Blocks.documents` → (B, L) int32."""
    place = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int32), documents.shape)
    starts = np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
    return place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)


# ------------------------------------------------------------------------------------------------- inspect


def inspect(folder, tokenizer_name="", val_share=0.0, seed=None, show=print):
    """Print what a corpus holds: counts, document lengths, tokenizer, a random sample; then check it. Raises ValueError where it is broken."""
    corpus = load_corpus(folder, tokenizer_name, val_share)
    meta = corpus.meta
    tokens = tokenizer(tokenizer_name or meta["tokenizer"], (corpus.folder,))
    own = "files" in meta["train"]
    show(f"{folder}: {'prepared by prepare.py' if own else meta['format'] + ' token files'}" + (f" from {', '.join(meta['sources'])}" if own else ""))
    show(f"tokenizer {meta['tokenizer']}: {meta['n_vocab']:,} tokens, mask {meta['mask_id']}, eos {meta['eos_id']}, {corpus.train.dtype}")
    random = np.random.default_rng(seed)
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        buckets, count, longest, total, least, largest = np.zeros(64, np.int64), 0, 0, 0, 0, 0
        for lengths in document_lengths(stream, meta["eos_id"]):
            if len(lengths):
                buckets += np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), minlength=64)
                count, longest, total = count + len(lengths), max(longest, int(lengths.max())), total + int(lengths.sum())
        for chunk in stream.chunks():
            least, largest = min(least, int(chunk.min())), max(largest, int(chunk.max()))
        n_files = len(stream.arrays) - stream.lead
        show(f"\n{split}: {len(stream) - stream.lead:,} tokens in {n_files} file{'s' * (n_files > 1)}, {count:,} documents, "
             f"{total / max(1, count):,.0f} tokens each on average, {longest:,} at most" + (f"; {meta[split]['bytes']:,} bytes" if own else ""))
        if count:
            shown = np.flatnonzero(buckets)
            for power in range(shown[0], shown[-1] + 1):
                bar = "█" * int(np.ceil(40 * buckets[power] / buckets.max()))
                show(f"  ≤ {2**power:>13,} tokens  {buckets[power]:>12,}  {bar}")
        if least < 0 or largest >= meta["n_vocab"]:
            raise ValueError(f"{folder}: the {split} split holds token {least if least < 0 else largest}, beyond the vocabulary of {meta['n_vocab']}")
        start = int(random.integers(0, max(1, len(stream) - 64)))
        show(f"  sample from token {start:,}: {tokens.decode(stream.read(start, start + 64).tolist())!r}")
    if not own:
        return show("\nno checksums in this layout; sizes and vocabulary agree")
    for split in ("train", "val"):
        for file in meta[split]["files"]:
            if hashlib.sha256(np.memmap(corpus.folder / file["name"], np.uint8, mode="r")).hexdigest() != file["sha256"]:
                raise ValueError(f"{corpus.folder / file['name']}: its SHA-256 is not the one in meta.json; prepare the corpus again")
    show("\nall SHA-256 sums agree")


if __name__ == "__main__":
    import prepare

    prepare.main()
