"""Read prompts: rows of token ids with the mask's id wherever something is to be written."""

import re
import sys
from pathlib import Path
from typing import NamedTuple

from corpus.records import parse_json

MOST_NEW = 10**6  # tokens of one hole
HOLE = re.compile(r"(\[MASK(?::\d+)?\])")


class Prompt(NamedTuple):
    """Text with an open end, or up to a suffix; or else a text with holes."""

    prompt: str = ""
    suffix: str = ""
    length: int = 0  # new tokens; 0: as many as fit
    text: str = ""  # with [MASK] or [MASK:12] for one or twelve new tokens


def read_rows(cfg, tokenizer, seq_len, block):
    """One row of ids for each prompt that sample.py's settings name. Raises ValueError or OSError.

    block: tokens that the model writes at once and before those after them; 1 if autoregressive, 0: all.
    """
    if not cfg.prompts:
        prompt = cfg.prompt
        if cfg.prompt_file:
            prompt = Path(cfg.prompt_file).read_text(encoding="utf-8-sig")
        prompt = Prompt(prompt, cfg.suffix, cfg.length, cfg.text)
        row = encode_prompt(prompt, tokenizer, seq_len, cfg.max_length, block)
        warn_of_change(prompt, row, tokenizer)
        return [row]
    rows, was_changed = [], False
    with open(cfg.prompts, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                prompt = parse_line(line, cfg)
                rows.append(encode_prompt(prompt, tokenizer, seq_len, cfg.max_length, block))
                was_changed = was_changed or warn_of_change(prompt, rows[-1], tokenizer)
            except ValueError as problem:
                raise ValueError(f"{cfg.prompts}, line {number}: {problem}") from None
    if not rows:
        raise ValueError(f"{cfg.prompts} holds no prompt")
    return rows


def warn_of_change(prompt, row, tokenizer):
    """Say if a tokenizer's normalizer changes the text that is given. Returns whether it does."""
    given = HOLE.sub("", prompt.text) or prompt.prompt + prompt.suffix
    read = tokenizer.decode(row, continues=row[0] == tokenizer.mask_id)
    if read != given:
        print(f"warning: the tokenizer changes what is given: {given[:60]!r} is read as {read[:60]!r}",
              file=sys.stderr)
    return read != given


def parse_line(line, cfg):
    """The Prompt in one line of a file, plain text or .jsonl; raises ValueError."""
    default = Prompt(suffix=cfg.suffix, length=cfg.length)
    if not cfg.prompts.lower().endswith(".jsonl"):
        return default._replace(prompt=line.rstrip("\r\n"))
    values = parse_json(line, "it")
    names = set(values) if isinstance(values, dict) else set()
    if not names & {"prompt", "text"} or names - set(Prompt._fields):
        raise ValueError('expected {"prompt": "…"}, also with "suffix" and "length", '
                         'or {"text": "… [MASK:12] …"}')
    length = values.get("length", 0)
    are_texts = all(isinstance(value, str) for name, value in values.items() if name != "length")
    if not are_texts or type(length) is not int or length < 0:
        raise ValueError("prompt, suffix and text are text, length is a whole number of at least 0")
    if "text" not in values:
        return default._replace(**values)
    if len(values) > 1 or not values["text"]:
        raise ValueError("text stands alone, and has a [MASK]: its holes say how much is new")
    return Prompt(text=values["text"])


def encode_prompt(prompt, tokenizer, seq_len, max_length, block):
    """The row of ids of a Prompt; raises ValueError if it has none, or is too long.

    max_length: tokens of the whole row (0: seq_len).
    """
    mask_id = tokenizer.mask_id
    if prompt.text:
        ids = encode_holes(prompt.text, tokenizer)
        if len(ids) > seq_len:
            raise ValueError(f"the text has {len(ids)} tokens with its holes, "
                             f"more than the model's context of {seq_len}")
    else:
        ids = encode_between(prompt, tokenizer, seq_len, max_length)
    next_block = (ids.index(mask_id) // block + 1) * block if block else len(ids)
    if any(token != mask_id for token in ids[next_block:]):
        if block == 1:
            raise ValueError("a model that writes token by token can't fill holes before other text; "
                             "put [MASK] at the end")
        raise ValueError(f"the model writes in blocks of {block} tokens and sees nothing after a block: text "
                         f"after token {next_block} would not count for the hole before it; let new tokens "
                         "be the last")
    return ids


def encode_between(prompt, tokenizer, seq_len, max_length):
    """The ids of a prompt, its new tokens and its suffix; raises ValueError if they are too many."""
    if max_length > seq_len:
        raise ValueError(f"max_length={max_length} is more than the model's context of {seq_len}")
    most, limit = max_length or seq_len, "max_length" if max_length else "the model's context"
    before = tokenizer.encode(prompt.prompt).tolist()
    after = tokenizer.encode(prompt.suffix, continues=True).tolist()
    n_prompt = len(before) + len(after)
    if n_prompt >= most:
        raise ValueError(f"the prompt has {n_prompt} tokens, and {limit} is {most}: no room for a new one")
    n_new = prompt.length or most - n_prompt
    if n_prompt + n_new > most:
        raise ValueError(f"prompt and new tokens are {n_prompt + n_new} together, and {limit} is {most}")
    return before + [tokenizer.mask_id] * n_new + after


def encode_holes(text, tokenizer):
    """The ids of a text in which [MASK] is one new token and [MASK:12] twelve; raises ValueError."""
    ids = []
    for part in HOLE.split(text):
        hole = re.fullmatch(r"\[MASK(?::(\d+))?\]", part)
        if hole:
            n_new = int(hole[1] or 1)
            if not 1 <= n_new <= MOST_NEW:
                raise ValueError(f"{part}: a hole has between 1 and a million tokens")
            ids += [tokenizer.mask_id] * n_new
            continue
        malformed = re.search(r"\[MASK:([^\]]*)\]", part)
        if malformed:
            raise ValueError(f"{malformed[0]}: '{malformed[1]}' is not a number; write [MASK] or [MASK:12]")
        ids += tokenizer.encode(part, continues=bool(ids)).tolist()
    if tokenizer.mask_id not in ids:
        raise ValueError("nothing to write: the text has no [MASK]")
    return ids
