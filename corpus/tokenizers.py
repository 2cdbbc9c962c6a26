"""Tokenizers: bytes, tiktoken's encodings, and tokenizer.json files."""

import hashlib
import json
from pathlib import Path

import numpy as np

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


def load_tokenizer(name, folders=(), eos=""):
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
