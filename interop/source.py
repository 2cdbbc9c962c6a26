"""A checkpoint that is being converted, in our words whatever its format."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch

import terminal
from corpus.chat import ChatTemplate
from corpus.files import no_empty_parents
from interop.tensors import LazyTensor
from model import ModelConfig, Transformer

VOCABULARY_TENSORS = ("embed.weight", "lm_head.weight")  # a row for each id


class Source(NamedTuple):
    """A checkpoint; its tensors stay on disk until they are read."""

    format: str  # ours, hf, megatron, gguf; or cut, some layers of one
    folder: Path  # of gguf: the file
    config: ModelConfig
    objective: str  # masked, uniform or ar
    weights: dict[str, LazyTensor]  # under our names
    original: dict[str, LazyTensor]  # under the names, and in the layout, of its own format
    tokenizer: Any  # as corpus.tokenizers makes them; None without
    step: int
    template: ChatTemplate | None = None  # for questions, where there is one


def weight_shapes(config):
    """{our name: shape} of a network's weights."""
    network = meta_network(dataclasses.replace(config, seq_len=1))  # without long tables of angles
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def meta_network(config):
    """The network without memory for its weights."""
    with torch.device("meta"):
        return Transformer(config)


def cast_weights(weights, dtype):
    """{name: LazyTensor} in the dtype of that name, or as they are for "source"."""
    if dtype == "source":
        return weights
    return {name: tensor.cast(getattr(torch, dtype), name) for name, tensor in weights.items()}


def fit_vocabulary(weights, config):
    """The weights with as many rows of the vocabulary as our network: spare go, missing are zeros."""
    return {name: tensor.with_rows(config.padded_vocab) if name in VOCABULARY_TENSORS else tensor
            for name, tensor in weights.items()}


def keep_layers(source, layers):
    """The Source with these of its layers alone, in this order. Raises ValueError if there is no such one."""
    c = source.config
    missing = [number for number in layers if number >= c.n_layer]
    if missing:
        last = c.n_layer - 1
        raise ValueError(f"{source.folder} has no layer {missing[0]}: there are 0 to {last}")
    weights = {name: tensor for name, tensor in source.weights.items() if not name.startswith("blocks.")}
    for place, number in enumerate(layers):
        prefix = f"blocks.{number}."
        weights |= {f"blocks.{place}.{name.removeprefix(prefix)}": tensor
                    for name, tensor in source.weights.items() if name.startswith(prefix)}
    config = dataclasses.replace(c, n_layer=len(layers))
    return source._replace(format="cut", config=config, weights=weights, original=weights)


def write_json(path, values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def new_folder(out):
    """Make a hidden folder that becomes `out` at the end; an error or a signal leaves nothing of it."""
    building = out.with_name(f".{out.name}.{os.getpid()}")
    handlers = {signum: signal.signal(signum, signal.default_int_handler)  # as Ctrl-C: KeyboardInterrupt
                for signum in terminal.stop_signals()}
    with no_empty_parents(out):
        try:
            building.mkdir(parents=True)
            yield building
            building.rename(out)
        finally:
            shutil.rmtree(building, ignore_errors=True)
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
