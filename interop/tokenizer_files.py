"""Write a tokenizer as tokenizer.json, so that transformers' AutoTokenizer gives the ids of our training."""

import json
import shutil

from interop.source import write_json

MASK = "<|mask|>"


def write_tokenizer(folder, tokenizer, mask_id, max_length):
    """Write tokenizer.json and tokenizer_config.json; mask_id: None for an AR model. Raises ValueError."""
    if hasattr(tokenizer, "path"):  # a tokenizer.json, known by its digest: it stays as it is, byte for byte
        shutil.copyfile(tokenizer.path, folder / "tokenizer.json")
        eos = tokenizer.eos
    else:
        layout, eos = tokenizer_json(tokenizer)
        write_json(folder / "tokenizer.json", layout)
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token=eos, pad_token=eos, padding_side="left",
        model_max_length=max_length, clean_up_tokenization_spaces=False,
        # transformers 4 would add token_type_ids, which no model of ours takes
        model_input_names=["input_ids", "attention_mask"])
    if mask_id is not None:
        mask = mask_text(tokenizer, mask_id)
        settings |= dict(mask_token=mask, added_tokens_decoder={str(mask_id): special_token(mask)})
    write_json(folder / "tokenizer_config.json", settings)


def mask_text(tokenizer, mask_id):
    """The text of the mask's token, or one that no other token has."""
    text = next((name for name, i in tokenizer.specials.items() if i == mask_id), MASK)
    while tokenizer.specials.get(text, mask_id) != mask_id:
        text = f"<{text}>"
    return text


def special_token(text):
    """A special token, as tokenizer.json and tokenizer_config.json describe it."""
    return dict(content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)


def tokenizer_json(tokenizer):
    """(contents of tokenizer.json, text of the token that ends a document) of bytes or a tiktoken encoding.

    Raises ValueError.
    """
    try:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise ValueError("writing a tokenizer.json needs: pip install '.[hf]'") from None
    if tokenizer.name.startswith("characters "):
        raise ValueError("characters with an alphabet of their own have no tokenizer.json: use sample.py")
    letters = byte_letters()
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if hasattr(tokenizer, "encoding"):
        ranks = tokenizer.encoding._mergeable_ranks
        spellings = {token: "".join(map(letters.get, token)) for token in ranks}
        vocabulary = {spellings[token]: rank for token, rank in ranks.items()}
        model = models.BPE(vocabulary, merges(ranks, spellings), fuse_unk=False)
        pattern = pre_tokenizers.Split(Regex(tokenizer.encoding._pat_str), behavior="isolated", invert=False)
        splitter = pre_tokenizers.Sequence([pattern, splitter])
    else:
        model = models.BPE({letters[byte]: byte for byte in range(256)}, [])
    inner = Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = splitter, decoders.ByteLevel()
    layout = json.loads(inner.to_str())
    specials = {text: i for text, i in tokenizer.specials.items() if i < tokenizer.n_vocab}
    in_order = sorted(specials.items(), key=lambda item: item[1])
    layout["added_tokens"] = [dict(id=i) | special_token(text) for text, i in in_order]
    eos = next(text for text, i in specials.items() if i == tokenizer.eos_id)
    return layout, eos


def byte_letters():
    """{byte: the letter with which GPT-2 spells it in byte-level vocabularies}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merges(ranks, spellings):
    """The pairs that byte-pair encoding joins, in order: for each token the last two parts it is made of.

    ranks: {bytes: id}, ids in the order of the merges; spellings: {bytes: text in tokenizer.json}.
    The parts are found by joining the token's bytes with the merges that come before its own.
    """
    pairs = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            candidates = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            best = min(candidates)
            if best >= rank:
                break
            i = candidates.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            pairs.append((spellings[parts[0]], spellings[parts[1]]))
    return pairs
