"""nanoGPT's character tokens: meta.pkl, beside its token files, says which character each id stands for."""

import json
import pickle

import numpy as np

from corpus.files import check_file

MAX_BYTES = 1 << 24  # of a meta.pkl: all of Unicode's characters take less


class CharacterTokenizer:
    """The characters of an alphabet, numbered in its order; behind them the end of a document and the mask.

    Its name holds the alphabet, so that no file has to travel with a run.
    """

    allows_cuts = True
    prefix_bytes = 0

    def __init__(self, alphabet):
        self.alphabet = list(alphabet)
        self.ids = {character: i for i, character in enumerate(self.alphabet)}
        self.name = f"characters {json.dumps(alphabet, ensure_ascii=False)}"
        self.eos_id = len(self.alphabet)
        self.n_vocab = self.mask_id = self.eos_id + 1
        self.specials = {"<eos>": self.eos_id}

    def encode(self, text, continues=False):
        unknown = next((character for character in text if character not in self.ids), None)
        if unknown is not None:
            raise ValueError(f"{unknown!r} is not among the {len(self.ids)} characters that this model knows")
        return np.array([self.ids[character] for character in text], np.uint32)

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids, continues=False):
        return "".join(self.alphabet[i] for i in ids if i < self.eos_id)

    def token_bytes(self):
        return np.array([len(character.encode("utf-8")) for character in self.alphabet] + [0], np.uint16)


def named_tokenizer(name):
    """The CharacterTokenizer of this name. Raises ValueError."""
    try:
        alphabet = json.loads(name.removeprefix("characters "))
    except ValueError as problem:
        raise ValueError(f"tokenizer {name[:40]!r}: no alphabet ({problem})") from None
    return CharacterTokenizer(check_alphabet(alphabet, name[:40]))


def read_alphabet(path):
    """The CharacterTokenizer of a nanoGPT folder's meta.pkl, of which nothing is run. Raises ValueError."""
    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: more than {MAX_BYTES >> 20} MiB are no alphabet")
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
    except Exception as problem:  # a damaged pickle can raise almost anything
        raise ValueError(f"{path}: no nanoGPT alphabet ({type(problem).__name__}: {problem})") from None
    characters = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(characters, dict) or set(characters) != set(range(len(characters))):
        raise ValueError(f"{path} does not say which character each token is ('itos')")
    return CharacterTokenizer(check_alphabet([characters[i] for i in range(len(characters))], path))


def check_alphabet(alphabet, name):
    """The alphabet as one text. Raises ValueError unless it consists of different characters."""
    is_alphabet = isinstance(alphabet, list | str) and all(map(is_character, alphabet))
    if not is_alphabet or not 0 < len(set(alphabet)) == len(alphabet):
        raise ValueError(f"{name}: its tokens are not different characters")
    return "".join(alphabet)


def is_character(value):
    """Whether a value is one character that UTF-8 can say."""
    return isinstance(value, str) and len(value) == 1 and not "\ud800" <= value <= "\udfff"


class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, numbers and text. Whatever else a pickle may make or call has a name: none is let in."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which may run code: nothing was run")
