"""The mean of the weights of several checkpoints of one shape, as a run of ours.

    python convert.py average --checkpoints=runs/a/step_00000900,runs/a/step_00001000 --out=runs/mean
"""

import shlex
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress

import configurator
import terminal
from configurator import setting, split
from corpus.tokenizers import load_tokenizer
from interop import native, tensors
from interop.source import new_folder
from interop.tensors import LazyTensor
from model import ModelConfig
from training import checkpoint
from training.weights import check_weights


@dataclass
class Config:
    checkpoints: str = setting("", "runs (their newest checkpoints) or checkpoints of ours, commas between")
    weights: Literal["auto", "ema", "raw"] = setting(
        "auto", "of each: its averaged weights, those of training, or the first that it has")
    out: str = setting("", "folder to write, which must not exist")

    def problems(self):
        """Other settings that can't be, one line each."""
        wrong = [f"give --{name}" for name in ("checkpoints", "out") if not getattr(self, name)]
        if self.checkpoints and len(split(self.checkpoints)) < 2:
            wrong.append("checkpoints: the mean is of two or more")
        if self.out and Path(self.out).exists():
            wrong.append(f"out={self.out} exists; nothing is overwritten")
        return wrong


def main(argv):
    cfg = configurator.load(Config, argv, __doc__)
    terminal.keep_going()
    try:
        opened = [checkpoint.open_checkpoint(path) for path in split(cfg.checkpoints)]
        folders = [folder.resolve() for folder, _ in opened]
        if len(set(folders)) < len(folders):
            raise ValueError(f"checkpoints: {max(folders, key=folders.count)} stands there twice")
        places = [checkpoint.weights_folder(*folder_and_record, cfg.weights) for folder_and_record in opened]
        weights = mean_weights(opened, places)
        with new_folder(Path(cfg.out)) as folder:
            write(folder, cfg.out, *opened[-1], places, weights)
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    except KeyboardInterrupt:
        print("convert.py: interrupted; nothing is written", file=sys.stderr)
        raise SystemExit(130) from None
    for (folder, _), place in zip(opened, places):
        print(f"{place}: {'averaged weights' if place != folder else 'weights of training'}")
    print(f"{cfg.out}: their mean    try: python sample.py --run_dir={shlex.quote(cfg.out)}")


def mean_weights(opened, places):
    """{name: LazyTensor} of the mean, in fp32, of checkpoints, [(folder, record)]; raises ValueError.

    places: the folders of their weights.
    """
    first, record = opened[0]
    parts = []
    for (folder, other), place in zip(opened, places):
        for name in ("model", "corpus"):
            check_alike(name, first, record, folder, other)
        files = checkpoint.weight_files(place)
        check_weights(place, ModelConfig(**other["model"]), files)
        parts.append({})
        for file in files:
            parts[-1] |= tensors.open_safetensors(file)

    def mean(name):
        total = sum(part[name].read().double() for part in parts)
        return (total / len(parts)).float()

    return {name: LazyTensor(tensor.shape, torch.float32, partial(mean, name))
            for name, tensor in parts[0].items()}


def check_alike(name, first, record, folder, other):
    """Raise ValueError unless two records have the same architecture (model) or vocabulary (corpus)."""
    parts = [r[name] for r in (record, other)]
    if name == "model":  # with what older records do not mention
        parts = [asdict(ModelConfig(**part)) for part in parts]
    # how weights began and what was read does not matter
    others = {"dropout", "init_std", "scaled_init", "local_init", "train_sha256", "val_sha256"}
    one, two = ({key: value for key, value in part.items() if key not in others} for part in parts)
    if one != two:
        differing = ", ".join(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))
        raise ValueError(f"{folder} is of another {name} than {first}: {differing}")


def write(folder, run_dir, place, record, places, weights):
    """Write the run into `folder`, which will be called `run_dir`, with the settings in a record.

    place: the folder of the record; places: those of the weights that are averaged.
    """
    tokenizer = record["corpus"]["tokenizer"]
    tokenizer = load_tokenizer(tokenizer, (place.parent, place)) if tokenizer else None
    if hasattr(tokenizer, "path"):
        tokenizer.copy_to(folder)
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    own = dict(
        settings=record["settings"] | dict(run_dir=run_dir), model=record["model"], corpus=record["corpus"],
        step=record["step"], converted_from="the mean of " + ", ".join(map(str, places)))
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        on_progress = partial(bar.advance, bar.add_task(f"{n_bytes / 1e9:.2f} GB", total=n_bytes))
        native.write_run(folder, own, weights, on_progress)
