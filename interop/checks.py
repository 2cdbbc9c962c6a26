"""Checks that a checkpoint of another program has to pass: settings, vocabulary, tensors.

`cfg` is convert.Config. All raise ValueError with one line that names the file.
"""

import contextlib
import math
import sys

import torch

from corpus.tokenizers import load_tokenizer
from interop.pickles import one_line
from training.record import MAX_SIZE

WRONG_TOKENIZER = "not the tokenizer it was trained with"
MAX_SPARE_ROWS = 4096  # embeddings are padded, but not by as much

# --------------------------------------------------------------------------------------------------- settings


@contextlib.contextmanager
def explain_bad_settings(path):
    """Turn errors that settings of strange types or values cause into a ValueError that names the file."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError, RuntimeError) as problem:
        raise ValueError(f"the settings of {path} can't be understood ({one_line(problem)})") from None
    except ValueError as problem:
        if str(path) in str(problem):
            raise
        raise ValueError(f"{path}: {problem}") from None


def check_shape(path, shape, n_tensors):
    """Raise ValueError for a shape (settings of ModelConfig) that no network of so many tensors can have."""
    if shape["n_layer"] > n_tensors or shape["seq_len"] > MAX_SIZE:
        raise ValueError(f"{path}: {shape['n_layer']:,} layers and {shape['seq_len']:,} positions can't be "
                         f"in {n_tensors} tensors")
    for name, end in (("norm_eps", 1), ("rope_base", math.inf)):
        if not 0 < shape[name] < end:
            raise ValueError(f"{path}: {name}={shape[name]:g} can't be")
    for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "seq_len"):
        if not 1 <= shape[name] <= MAX_SIZE:
            raise ValueError(f"{path}: {name}={shape[name]} can't be")
    if shape["n_head"] * shape["head_dim"] > MAX_SIZE:
        raise ValueError(f"{path}: there can't be {shape['n_head']:,} heads of {shape['head_dim']:,}")
    if shape["n_head"] % shape["n_kv_head"] or shape["head_dim"] % 2:
        raise ValueError(f"{path}: its settings contradict each other: {shape['n_head']} heads of "
                         f"{shape['head_dim']}, {shape['n_kv_head']} for keys and values")


def choose_objective(cfg, recorded, path):
    """The objective that a checkpoint records, or else --objective."""
    if recorded is None:
        return cfg.objective
    if cfg.objective not in ("auto", recorded):
        raise ValueError(f"{path} was trained with objective={recorded}, not {cfg.objective}")
    return recorded


# ------------------------------------------------------------------------------------------------- vocabulary


def open_tokenizer(cfg, folder, mask, recorded_name=""):
    """The tokenizer that --tokenizer names, or else the folder's own; None if there is none.

    mask: id or text of its training's, None if its settings don't tell; recorded_name: the tokenizer that the
    checkpoint's settings name.
    """
    if cfg.tokenizer == "none":
        return None
    named = load_tokenizer(cfg.tokenizer, (), cfg.eos, mask) if cfg.tokenizer else None
    try:
        own = own_tokenizer(folder, cfg.eos, mask, recorded_name)
    except ValueError:
        if named:  # that the folder's can't be read may be why another is named
            return named
        raise
    if named and own and named.n_vocab != own.n_vocab:
        raise ValueError(f"{folder} has a tokenizer of {own.n_vocab:,} tokens, '{named.name}' has "
                         f"{named.n_vocab:,}: {WRONG_TOKENIZER}")
    return named or own


def own_tokenizer(folder, eos, mask, recorded_name):
    if not isinstance(recorded_name, str):
        raise ValueError(f"{folder}: its settings can't be understood: tokenizer_name={recorded_name!r}")
    if recorded_name:
        with explain_bad_settings(folder):
            return load_tokenizer(recorded_name, (), eos, mask)
    path = folder / "tokenizer.json"
    return load_tokenizer(str(path), (), eos, mask) if path.exists() else None


def template_or_warning(read, *args):
    """The ChatTemplate that read(*args) gives, or None, and a warning, where it can't be used."""
    try:
        return read(*args)
    except ValueError as problem:
        print(f"convert.py: {problem}; what is written has no chat template", file=sys.stderr)
        return None


def choose_vocabulary(path, tokenizer, objective, n_rows, n_text, mask_id):
    """(n_vocab, mask_id) of a network whose embedding has `n_rows` rows.

    tokenizer: None if there is none; n_text: how many ids are text, as far as its settings tell;
    mask_id: the mask of its training, None if its settings don't tell.
    """
    for what, value in (("mask", mask_id), ("vocabulary", n_text)):
        if value is not None and (type(value) is not int or not 0 <= value <= n_rows):
            raise ValueError(f"{path}: its {what} can't be {value!r}, as its embedding has {n_rows:,} rows")
    if objective == "ar":
        return ar_vocabulary(path, tokenizer, n_rows, n_text)
    if mask_id is None and tokenizer is None:
        raise ValueError(f"{path}: which id is the mask's? give --mask_id")
    if mask_id is None:
        mask_id = tokenizer.mask_id
    if tokenizer and mask_id != tokenizer.mask_id:
        raise ValueError(f"{path}: its mask has the id {mask_id}, tokenizer '{tokenizer.name}' puts it at "
                         f"{tokenizer.mask_id}: {WRONG_TOKENIZER}")
    n_vocab = tokenizer.n_vocab if tokenizer else mask_id
    if n_rows < n_vocab or n_rows <= mask_id:
        name = tokenizer.name if tokenizer else "none"
        raise ValueError(f"{path}: {n_rows:,} rows of embeddings, and tokenizer '{name}' has {n_vocab:,} "
                         f"tokens and a mask: {WRONG_TOKENIZER}")
    check_spare_rows(path, tokenizer, n_rows)
    return n_vocab, mask_id


def ar_vocabulary(path, tokenizer, n_rows, n_text):
    """(n_vocab, mask_id) of an AR model, which has never seen a mask."""
    if tokenizer is None:
        return n_text, n_text
    if tokenizer.n_vocab > n_text:
        raise ValueError(f"{path}: its vocabulary has {n_text:,} tokens, tokenizer '{tokenizer.name}' "
                         f"{tokenizer.n_vocab:,}: {WRONG_TOKENIZER}")
    check_spare_rows(path, tokenizer, n_rows)
    return tokenizer.n_vocab, tokenizer.mask_id


def check_spare_rows(path, tokenizer, n_rows):
    if tokenizer and n_rows - tokenizer.n_vocab >= MAX_SPARE_ROWS:
        raise ValueError(f"{path}: {n_rows:,} rows of embeddings, and tokenizer '{tokenizer.name}' has only "
                         f"{tokenizer.n_vocab:,} tokens: {WRONG_TOKENIZER}")


# ---------------------------------------------------------------------------------------------------- tensors


def drop_tied_head(path, config, tensors, head, embedding):
    """Delete a tied network's `head` from `tensors`, if it is a copy of `embedding`."""
    if not config.tied or head not in tensors or embedding not in tensors:
        return
    a, b = tensors[head], tensors[embedding]
    if a.shape != b.shape or not all(map(torch.equal, a.blocks(), b.blocks())):
        raise ValueError(f"{path}: {head} differs from {embedding}, though its settings tie them")
    del tensors[head]
