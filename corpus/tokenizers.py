"""Tokenizers: bytes, tiktoken's encodings, and tokenizer.json files.

Each of the three classes has

    name          what meta.json and load_tokenizer call it
    n_vocab       the ids that can occur in text are below it (eos included, the mask not)
    eos_id        the token that ends a document
    mask_id       the id of the mask, n_vocab or above
    specials      {text: id} of the special tokens
    allows_cuts   True if the pieces of a long text (corpus/cutting.py) have the same tokens as the whole text

    encode(text) → array of ids        encode_batch(texts) → list of such arrays        decode(ids) → text
    token_bytes() → (n_vocab,) uint16, the length of each token in UTF-8 bytes: 0 for eos and other specials

What looks like a special token in a text is text, too.
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np


class ByteTokenizer:
    """UTF-8 bytes: 0..255 are text, 256 ends a document, 257 is the mask."""

    name = "bytes"
    n_vocab = 257
    eos_id = 256
    mask_id = 257
    specials = {"<eos>": 256}
    allows_cuts = True

    def encode(self, text):
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self):
        return np.array([1] * 256 + [0], np.uint16)


class TiktokenTokenizer:
    """A tiktoken encoding by its name. The mask is the first id above its text and its end-of-text token."""

    allows_cuts = True

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

    def encode(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
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

    EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<|eos|>", "<eos>", "</s>", "<|im_end|>", "[SEP]")
    MASK_NAMES = ("<|mdm_mask|>", "<|mask|>", "<mask>", "[MASK]")

    def __init__(self, path, eos="", masks=()):
        self.path = Path(path)
        raw = self.path.read_bytes()
        self.inner, layout = parse_tokenizer_json(raw, path)
        vocab = self.inner.get_vocab(with_added_tokens=True)
        added_tokens = layout.get("added_tokens", ())
        self.specials = {token["content"]: token["id"] for token in added_tokens if token["special"]}

        eos = eos or next((name for name in self.EOS_NAMES if name in self.specials), "")
        if eos not in vocab:
            problem = f"has no token {eos!r}" if eos else "which token ends a document?"
            hint = f" (its specials: {', '.join(self.specials)})" if self.specials else ""
            raise ValueError(f"{path}: {problem}; give it with --eos={hint}")
        self.eos, self.eos_id = eos, vocab[eos]
        default = self.find_mask(vocab)
        self.added_ids = {token["content"]: token["id"] for token in added_tokens}
        self.mask_id = next(self.fitting_masks(masks, vocab), default)
        self.n_vocab = self.mask_id
        self.has_named_mask = self.mask_id != default
        named = f"mask={self.mask_id} " if self.has_named_mask else ""
        self.name = f"tokenizer.json {hashlib.sha256(raw).hexdigest()[:16]} {named}{eos}"
        if any(token["id"] > self.mask_id and not token["special"] for token in added_tokens):
            layout["added_tokens"] = [token for token in added_tokens if token["id"] <= self.mask_id]
            self.inner, _ = parse_tokenizer_json(json.dumps(layout).encode(), path)
        self.allows_cuts = allows_cuts(layout)
        self.lengths = self.measure_tokens(vocab, layout)

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
        last_text_id = max(i for i in vocab.values() if i not in self.specials.values())
        for name in self.MASK_NAMES:
            if self.specials.get(name, -1) > max(last_text_id, self.eos_id):
                return self.specials[name]
        return max(vocab.values()) + 1

    def measure_tokens(self, vocab, layout):
        """Each token's length in UTF-8 bytes, for the two kinds of BPE that lose no text."""
        parts = components(layout.get("pre_tokenizer")) + components(layout.get("decoder"))
        kinds = {part["type"] for part in parts}
        if not kinds & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise ValueError(f"{self.path}: neither byte-level nor with byte fallback: "
                             "its tokens do not spell the text they stand for")
        added_ids = {token["id"] for token in layout.get("added_tokens", ())}
        lengths = np.zeros(self.n_vocab, np.uint16)
        for token, i in vocab.items():
            if i >= self.n_vocab:
                continue
            if i in added_ids:
                lengths[i] = 0 if token in self.specials else len(token.encode("utf-8"))
            elif "ByteLevel" in kinds:
                lengths[i] = len(token)  # one character stands for one byte
            elif len(token) == 6 and token.startswith("<0x"):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("▁", " ").encode("utf-8"))
        return lengths

    def copy_to(self, folder):
        """Copy the tokenizer.json, and write down beside it which token is the mask if that was named."""
        shutil.copyfile(self.path, Path(folder) / "tokenizer.json")
        if self.has_named_mask:
            mask = next(text for text, i in self.added_ids.items() if i == self.mask_id)
            settings = json.dumps(dict(mask_token=mask)) + "\n"
            (Path(folder) / "tokenizer_config.json").write_text(settings, encoding="utf-8")

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        encodings = self.inner.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids):
        text_ids = [int(i) for i in ids if i < self.n_vocab and i != self.eos_id]
        return self.inner.decode(text_ids, skip_special_tokens=False)

    def token_bytes(self):
        return self.lengths


def parse_tokenizer_json(raw, path):
    """(tokenizers.Tokenizer, its layout as a dict) of a tokenizer.json's bytes. Raises ValueError."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("a tokenizer.json needs the tokenizers package: pip install '.[data]'") from None
    try:
        inner = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
        layout = json.loads(raw)
    except Exception as problem:  # the package raises plain Exceptions
        raise ValueError(f"{path}: no tokenizer.json: {str(problem).splitlines()[0]}") from None
    inner.encode_special_tokens = True  # as text
    inner.no_padding()
    inner.no_truncation()
    return inner, layout


def components(part):
    """A pre-tokenizer or decoder of a tokenizer.json as a list: those of a sequence, or itself."""
    if not part:
        return []
    return part.get("pretokenizers") or part.get("decoders") or [part]


def split_pattern(digits):
    """A pre-tokenizer that splits text as Qwen's and Llama 3's do, with so many digits in a token."""
    regex = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits
             + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    return dict(type="Split", behavior="Isolated", invert=False, pattern={"Regex": regex})


KNOWN_SPLITS = [split_pattern(""), split_pattern("{1,3}")]  # Qwen's, Llama 3's


def allows_cuts(layout):
    """Whether this tokenizer.json joins nothing across the places where corpus/cutting.py cuts."""
    normalizer = layout.get("normalizer") or {"type": "NFC"}
    if normalizer["type"] != "NFC":  # NFC composes nothing with a newline or a space
        return False
    *splits, last = components(layout.get("pre_tokenizer")) or [{}]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
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

    path = Path(name) / "tokenizer.json"
    if not path.is_file():
        path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ValueError(f"{path}: no such tokenizer file")
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
