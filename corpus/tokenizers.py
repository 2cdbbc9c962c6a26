"""Tokenizers: bytes, tiktoken's encodings, and tokenizer.json files; corpus/characters.py has one more.

Each of the classes has

    name          what meta.json and load_tokenizer call it
    n_vocab       the ids that can occur in text are below it (eos included, the mask not)
    eos_id        the token that ends a document
    mask_id       the id of the mask, n_vocab or above
    specials      {text: id} of the special tokens
    allows_cuts   True if the pieces of a long text (corpus/cutting.py) have the same tokens as the whole text
    prefix_bytes  how many bytes it writes in front of a text, which are no part of it

    encode(text) → array of ids        encode_batch(texts) → list of such arrays        decode(ids) → text
    token_bytes() → (n_vocab,) uint16, the length of each token in UTF-8 bytes: 0 for eos and other specials

encode and decode take continues=True for what follows other text: nothing is written in front of it, and
nothing of it dropped. What looks like a special token in a text is text, too.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from corpus import characters
from corpus.files import check_file, not_a_file

MAX_VOCAB = 1 << 24  # the largest that are in use have 2**18 tokens


class ByteTokenizer:
    """UTF-8 bytes: 0..255 are text, 256 ends a document, 257 is the mask."""

    name = "bytes"
    n_vocab = 257
    eos_id = 256
    mask_id = 257
    specials = {"<eos>": 256}
    allows_cuts = True
    prefix_bytes = 0

    def encode(self, text, continues=False):
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids, continues=False):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self):
        return np.array([1] * 256 + [0], np.uint16)


class TiktokenTokenizer:
    """A tiktoken encoding by its name. The mask is the first id above its text and its end-of-text token."""

    allows_cuts = True
    prefix_bytes = 0

    def __init__(self, name):
        import tiktoken

        if name not in tiktoken.list_encoding_names():
            names = ", ".join(tiktoken.list_encoding_names())
            raise ValueError(f"unknown tokenizer '{name}'; choose bytes, one of {names}, "
                             "or give the path of a tokenizer.json")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as problem:  # requests' exceptions are OSErrors
            raise ValueError(f"cannot download tokenizer '{name}' ({type(problem).__name__}); "
                             "set TIKTOKEN_CACHE_DIR to a folder that holds its files") from None
        self.name = name
        self.eos_id = self.encoding.eot_token
        self.specials = dict(self.encoding._special_tokens)
        text_ids = self.encoding._mergeable_ranks.values()  # in p50k_base some are above the eos
        self.n_vocab = self.mask_id = max(self.eos_id, *text_ids) + 1

    def encode(self, text, continues=False):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids, continues=False):
        return self.encoding.decode([int(i) for i in ids if i != self.eos_id and i < self.mask_id])

    def token_bytes(self):
        lengths = np.zeros(self.n_vocab, np.uint16)
        for token, i in self.encoding._mergeable_ranks.items():
            lengths[i] = len(token)
        return lengths


class HuggingFaceTokenizer:
    """A tokenizer.json, the format of Hugging Face's `tokenizers`.

    Its name holds the digest of the file, of which a copy travels with the corpus and the run. `eos` names
    the token that ends a document; empty: the first of EOS_NAMES that is a special token. Raises ValueError
    if the file is no tokenizer.json, has no such token, or has tokens that do not spell text.

    masks: tokens that a model's settings call the mask, by id or text. The first of them that lies above the
    vocabulary proper is it, and text ends there: added tokens above it, as MegaDLMs' tokenizers have them,
    occur in no text. Its id is then part of the name. Without such a token: a special one of MASK_NAMES above
    all others, or a new id.
    """

    PROBE = "The quick  brown fox,\n\tnaïve: 世界 🙂 1 + 2 = 3.\r\n"
    EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "<|im_end|>", "[SEP]")
    MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "<mask>", "[MASK]")

    def __init__(self, path, eos="", masks=()):
        self.path = Path(path)
        check_file(path)
        raw = self.path.read_bytes()
        self.inner, layout = parse_tokenizer_json(raw, path)
        vocab = self.inner.get_vocab(with_added_tokens=True)
        if max(vocab.values(), default=0) >= MAX_VOCAB:
            raise ValueError(f"{path}: a token has the id {max(vocab.values())}: no vocabulary is that large")
        added_tokens = [token for token in layout.get("added_tokens") or () if token["content"] in vocab]
        self.added_ids = {token["content"]: vocab[token["content"]] for token in added_tokens}
        specials = [token["content"] for token in added_tokens if token["special"]]
        self.specials = {text: vocab[text] for text in specials}

        # The end of a document. What reads like it in a text is text.
        eos = eos or next((name for name in self.EOS_NAMES if name in self.specials), "")
        if eos not in vocab:
            problem = f"has no token {eos!r}" if eos else "which token ends a document?"
            hint = f" (its specials: {', '.join(self.specials)})" if self.specials else ""
            raise ValueError(f"{path}: {problem}; give it with --eos={hint}")
        self.eos, self.eos_id = eos, vocab[eos]
        if eos in self.added_ids:
            self.specials[eos] = self.eos_id

        # The mask, where text ends.
        default = self.find_mask(vocab)
        self.mask_id = next(self.fitting_masks(masks, vocab), default)
        self.n_vocab = self.mask_id
        self.has_named_mask = self.mask_id != default
        named = f"mask={self.mask_id} " if self.has_named_mask else ""
        self.name = f"tokenizer.json {hashlib.sha256(raw).hexdigest()[:16]} {named}{eos}"

        usable_tokens = self.usable_tokens(added_tokens)
        if usable_tokens != added_tokens:
            layout["added_tokens"] = usable_tokens
            self.inner = build_tokenizer(json.dumps(layout), path)
        self.continuing, continuing_layout = self.inner, without_prefix(layout)
        if continuing_layout != layout:
            self.continuing = build_tokenizer(json.dumps(continuing_layout), path)
        self.allows_cuts = allows_cuts(layout)
        self.lengths = self.measure_tokens(vocab, layout)
        self.prefix_bytes = max(0, int(self.lengths[self.encode("a")].sum()) - 1)

    def usable_tokens(self, added_tokens):
        """The added tokens that text may be encoded with: those below the mask, the eos as a special one."""
        tokens = [token | dict(special=token["content"] in self.specials) for token in added_tokens]
        if any(self.added_ids[token["content"]] > self.mask_id and not token["special"] for token in tokens):
            tokens = [token for token in tokens if self.added_ids[token["content"]] <= self.mask_id]
        return tokens

    def check_text(self):
        """Raise ValueError if a text could end a document, or would not come back from its tokens."""
        with explain_failure(f"{self.path} can't decode {self.eos!r}"):
            eos_text = self.inner.decode([self.eos_id], skip_special_tokens=False)
        for text in (self.eos, eos_text):
            if self.eos_id in self.encode(text, continues=True):
                raise ValueError(f"{self.path}: a text that contains {text!r} would end there: {self.eos!r} "
                                 "is a token of text; name another one with --eos=")
        spelled = self.decode(self.encode(self.PROBE))
        if spelled not in (self.PROBE, f" {self.PROBE}"):  # a space in front does no harm
            raise ValueError(f"{self.path}: {self.PROBE!r} comes back from its tokens as {spelled[:99]!r}: "
                             "they do not spell the text they stand for; a byte-level tokenizer needs all "
                             "256 bytes (initial_alphabet, where it is trained)")

    def fitting_masks(self, masks, vocab):
        """The ids of those `masks` that are added tokens above the vocabulary proper and the eos."""
        added = set(self.added_ids.values())
        last = max({self.eos_id, *vocab.values()} - (added - {self.eos_id}))
        for mask in masks:
            mask_id = self.added_ids.get(mask) if isinstance(mask, str) else mask
            if type(mask_id) is int and mask_id in added and mask_id > last:  # settings may hold anything
                yield mask_id

    def find_mask(self, vocab):
        """The id of the mask: its own, if it lies above all text (as LLaDA's and Dream's), else a new id."""
        last_text_id = max(set(vocab.values()) - set(self.specials.values()), default=-1)
        for name in self.MASK_NAMES:
            if self.specials.get(name, -1) > max(last_text_id, self.eos_id):
                return self.specials[name]
        return max(vocab.values()) + 1

    def measure_tokens(self, vocab, layout):
        """Each token's length in UTF-8 bytes, for the two kinds of BPE that lose no text.

        They are those of the text where nothing changes it on its way to tokens; else see Corpus.byte_ratio.
        """
        parts = components(layout.get("pre_tokenizer")) + components(layout.get("decoder"))
        kinds = {part.get("type") for part in parts}
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"{self.path}: neither byte-level nor with byte fallback: "
                             "its tokens do not spell the text they stand for")
        added_ids = set(self.added_ids.values())
        lengths = np.zeros(self.n_vocab, np.uint16)
        for token, i in vocab.items():
            if i >= self.n_vocab or i == self.eos_id or token in self.specials:
                continue
            if i in added_ids:
                length = len(token.encode("utf-8"))
            elif "ByteLevel" in kinds:
                length = len(token)  # one character stands for one byte
            elif len(token) == 6 and token.startswith("<0x"):
                length = 1
            else:
                length = len(token.replace("▁", " ").encode("utf-8"))
            if length > np.iinfo(lengths.dtype).max:
                raise ValueError(f"{self.path}: token {i} has {length} bytes, more than any text needs")
            lengths[i] = length
        return lengths

    def copy_to(self, folder):
        """Copy the tokenizer.json, and write down beside it which token is the mask if that was named."""
        shutil.copyfile(self.path, Path(folder) / "tokenizer.json")
        if self.has_named_mask:
            mask = next(text for text, i in self.added_ids.items() if i == self.mask_id)
            settings = json.dumps(dict(mask_token=mask)) + "\n"
            (Path(folder) / "tokenizer_config.json").write_text(settings, encoding="utf-8")

    def encode(self, text, continues=False):
        return self.encode_batch([text], continues)[0]

    def encode_batch(self, texts, continues=False):
        inner = self.continuing if continues else self.inner
        with explain_failure(f"{self.path} can't encode a text"):
            encodings = inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids, continues=False):
        text_ids = [int(i) for i in ids if i < self.n_vocab and i != self.eos_id]
        inner = self.continuing if continues else self.inner
        with explain_failure(f"{self.path} can't decode tokens"):
            return inner.decode(text_ids, skip_special_tokens=False)

    def token_bytes(self):
        return self.lengths


def parse_tokenizer_json(raw, path):
    """(tokenizers.Tokenizer, its layout as a dict) of a tokenizer.json's bytes. Raises ValueError."""
    with explain_failure(f"{path}: no tokenizer.json"):
        text = raw.decode("utf-8-sig")
        layout = json.loads(text)
    return build_tokenizer(text, path), layout


def build_tokenizer(text, path):
    """The tokenizers.Tokenizer of the text of a tokenizer.json. Raises ValueError, naming the path."""
    import tokenizers

    with explain_failure(f"{path}: no tokenizer.json"):
        inner = tokenizers.Tokenizer.from_str(text)
    inner.encode_special_tokens = True  # as text
    inner.no_padding()
    inner.no_truncation()
    return inner


@contextlib.contextmanager
def explain_failure(what):
    """Turn what the tokenizers package raises into a ValueError of one line that begins with `what`.

    It raises plain Exceptions, and where its own code gives up (a pattern that backtracks without end) a
    PanicException, which is none.
    """
    try:
        yield
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != "PanicException":
            raise
        reason = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise ValueError(f"{what}: {reason}") from None


SEQUENCES = dict(normalizer="normalizers", pre_tokenizer="pretokenizers", decoder="decoders")


def components(part):
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json as the list of its parts."""
    if not part:
        return []
    if part.get("type") != "Sequence":
        return [part]
    parts = next(part[name] for name in SEQUENCES.values() if name in part)
    return [inner for outer in parts for inner in components(outer)]


def without_prefix(layout):
    """The layout of a tokenizer.json without the parts that write a space in front of a text, or drop it."""
    changed = dict(layout)
    for section, name in SEQUENCES.items():
        parts = components(layout.get(section))
        kept = [part_without_prefix(section, part) for part in parts]
        kept = [part for part in kept if part]
        if kept != parts:
            changed[section] = {"type": "Sequence", name: kept} if kept else None
    return changed


def part_without_prefix(section, part):
    """A part that neither writes nor drops a space at the beginning; None if it does nothing else."""
    kind = part.get("type")
    if kind == "Prepend" or section == "decoder" and kind == "Strip":
        return None
    if kind == "Metaspace":
        legacy = dict(add_prefix_space=False) if "add_prefix_space" in part else {}
        return part | legacy | dict(prepend_scheme="never")
    if section == "pre_tokenizer" and kind == "ByteLevel":
        return part | dict(add_prefix_space=False)
    return part




def split_pattern(digits):
    """A pre-tokenizer that splits text as Qwen's and Llama 3's do, with so many digits in a token."""
    regex = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
             + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return dict(type="Split", behavior="Isolated", invert=False, pattern={"Regex": regex})


KNOWN_SPLITS = [split_pattern(""), split_pattern("{1,3}")]  # Qwen's, Llama 3's


def allows_cuts(layout):
    """Whether this tokenizer.json joins nothing across the places where corpus/cutting.py cuts."""
    normalizer = layout.get("normalizer") or {"type": "NFC"}
    if normalizer.get("type") != "NFC":  # NFC composes nothing with a newline or a space
        return False
    *splits, last = components(layout.get("pre_tokenizer")) or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return False
    if splits:
        return all(split in KNOWN_SPLITS for split in splits)
    return last.get("use_regex", True)


# {file of a model's folder: what it calls the mask there}
MASK_SETTINGS = {
    "config.json": "mask_token_id",
    "tokenizer_config.json": "mask_token",
    "special_tokens_map.json": "mask_token",
}


def load_tokenizer(name, folders=(), eos="", mask=None):
    """Load a tokenizer: bytes, a tiktoken encoding, or the path of a tokenizer.json or of a folder with one.

    The name that a tokenizer.json's tokenizer has itself ("tokenizer.json DIGEST EOS") is looked for in
    `folders`. eos: see HuggingFaceTokenizer. mask: id or text of the mask of a model that was trained with
    it; None: as the files beside a tokenizer.json say. Raises ValueError.
    """
    if name.startswith("tokenizer.json "):
        return find_tokenizer_json(name, folders)
    if name.startswith("characters "):
        return characters.named_tokenizer(name)

    path = Path(name) / "tokenizer.json"
    if not os.path.isfile(path):  # it bears any name that a record gives
        path = Path(name)
    if path.suffix.lower() == ".json":
        if what := not_a_file(path):
            raise ValueError(f"{path}: {what.replace('no such file', 'no such tokenizer file')}")
        masks = named_masks(path) if mask is None else [mask]
        return HuggingFaceTokenizer(path, eos, masks)

    if eos:
        raise ValueError(f"eos={eos}: only a tokenizer.json leaves that open")
    return ByteTokenizer() if name == "bytes" else TiktokenTokenizer(name)


def find_tokenizer_json(name, folders):
    """The tokenizer "tokenizer.json DIGEST [mask=ID] EOS", from one of `folders`. Raises ValueError."""
    _, digest, eos = name.split(" ", 2)
    named_mask = re.match(r"mask=(\d+) ", eos)
    masks = [int(named_mask[1])] if named_mask else []
    eos = eos[named_mask.end() :] if named_mask else eos
    for folder in folders:
        path = Path(folder) / "tokenizer.json"
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest().startswith(digest):
            return HuggingFaceTokenizer(path, eos, masks)
    raise ValueError(f"no tokenizer.json of digest {digest} in {' or '.join(map(str, folders))}; "
                     "put the one that prepared the corpus there")


def named_masks(path):
    """The tokens that the files beside a tokenizer.json call the mask, by id or text, and MegaDLMs' one."""
    masks = [read_json(path.with_name(name)).get(key) for name, key in MASK_SETTINGS.items()]
    return [mask.get("content") if isinstance(mask, dict) else mask for mask in masks] + ["<|mask_token|>"]


def read_json(path):
    """The object that a JSON file holds, empty where there is no such file or no object in it."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
