"""Collect runs into a CSV: from folders of train.py's runs, or from the reference backend's TensorBoard logs.

A sweep's folder holds points.csv, a row per finished run, and curves.csv, validation along its longest runs.
"""

import contextlib
import functools
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from corpus import tokenfiles
from corpus.files import check_file, list_folder
from corpus.records import check
from laws.runs import smooth_losses, write_csv
from model import ModelConfig, Transformer
from training.checkpoint import newest_record
from training.log import read_metrics, validations
from training.record import RECORD, RESUMABLE, SETTINGS, required
from training.update import decay_steps

POINT_COLUMNS = ("name objective n_layer d_model params tokens flops unique_tokens epochs seed "
                 "val_loss val_bpb train_loss batch lr").split()
CURVE_COLUMNS = "unique_tokens params objective epochs val_loss".split()

TRAINED = required(RECORD, *RESUMABLE) | {"settings": required(
    SETTINGS, "tokenizer", "val_share", "unique_tokens", "seed", "batch_size", "lr", "lr_schedule", "decay")}


def find_csv(path, out):
    """The CSV of the runs at `path`: a CSV, a sweep's folder, or one of TensorBoard logs (written to `out`).

    Raises ValueError.
    """
    path = Path(path)
    if not path.is_dir():
        if path.exists():  # it is read more than once
            check_file(path)
        return path
    if list_folder(path, "**/events.out.tfevents*"):
        from laws import events

        out.mkdir(parents=True, exist_ok=True)
        return events.write_points(path, out / "points.csv")

    for name in ("curves.csv", "points.csv"):  # what a finished sweep left
        if (path / name).is_file():
            return path / name
    rows = read_points(path)
    if not rows:
        raise ValueError(f"{path} holds no finished runs, points.csv or TensorBoard logs")
    out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, out / "points.csv", POINT_COLUMNS)
    return out / "points.csv"


def read_points(folder):
    """A row with POINT_COLUMNS for every finished run of train.py under `folder`."""
    rows = []
    for name, record, metrics in read_records(folder):
        if record["step"] < record["steps"]:
            continue
        settings, config = record["settings"], ModelConfig(**record["model"])
        params, tokens = count_params(config), record["next_sample"] * settings["seq_len"]
        unique = settings["unique_tokens"]
        foreign = settings["tokenizer"], settings["val_share"], settings.get("eos", "")
        available = unique or corpus_size(settings["corpus"], *foreign)
        if not unique and tokens > available:
            unique = available

        train_losses = smooth_losses(np.array([m["loss"] for m in metrics if "loss" in m]))
        measured = validations(metrics)
        if not measured:
            raise ValueError(f"{folder}: the metrics.jsonl of {name} has no validation")
        last = measured[-1]
        rows.append(dict(
            name=name,
            objective=settings["objective"],
            n_layer=config.n_layer,
            d_model=config.d_model,
            params=params,
            tokens=tokens,
            flops=6 * params * tokens,
            unique_tokens=unique,
            epochs=tokens / available if available else "",
            seed=settings["seed"],
            val_loss=last["val_loss"],
            val_bpb=last["val_bpb"],
            train_loss=float(train_losses[-1]) if len(train_losses) else "",
            batch=settings["batch_size"] * settings["seq_len"],
            lr=settings["lr"],
        ))
    order = ("objective", "unique_tokens", "params", "tokens", "seed")
    return sorted(rows, key=lambda row: [row[name] for name in order])


def read_curves(folder):
    """Validation along the longest run of each (unique tokens, size, objective), as in the paper's Figure 4.

    The mean over seeds, as long as the learning rate has not begun to decay (wsd): what comes then belongs
    to that run's length alone.
    """
    longest = {}
    for _, record, metrics in read_records(folder):
        settings = record["settings"]
        if not settings["unique_tokens"]:
            continue
        params = count_params(ModelConfig(**record["model"]))
        key = settings["unique_tokens"], params, settings["objective"], settings["seed"]
        steps = longest[key][0]["step"] if key in longest else 0
        if record["step"] > steps:
            longest[key] = record, metrics

    losses = defaultdict(list)
    for key in sorted(longest):
        unique, params, objective, _ = key
        record, metrics = longest[key]
        for m in validations(metrics):
            if 0 < m["step"] <= decay_start(record):
                losses[unique, params, objective, m["tokens"] / unique].append(m["val_loss"])
    return [dict(zip(CURVE_COLUMNS, (*key, sum(values) / len(values)))) for key, values in losses.items()]


def decay_start(record):
    """The step after which the learning rate of a run decays (wsd), or the last one."""
    settings, steps = record["settings"], record["steps"]
    if settings["lr_schedule"] != "wsd":
        return steps
    return steps - decay_steps(settings["decay"], steps, settings["warmup"])


def read_records(folder):
    """(name, newest checkpoint's record, metrics) of every run under `folder`, finished or not."""
    for path in list_folder(folder, "**/settings.json"):
        record = newest_record(path.parent)
        if record and "converted_from" not in record:
            check(record, TRAINED, path.parent)
            yield path.parent.name, record, read_metrics(path.parent)


@functools.cache
def count_params(config):
    """All parameters of a ModelConfig. If tied, the paper's N and the norms (less than 1 %)."""
    with torch.device("meta"):
        return Transformer(config).n_params()


@functools.cache
def corpus_size(corpus, tokenizer, val_share, eos):
    """Training tokens of a corpus; 0 if it is no longer there."""
    with contextlib.suppress(ValueError, OSError):
        corpora = tokenfiles.parse_corpora(corpus)
        return sum(len(tokenfiles.load_corpus(path, tokenizer, val_share, eos).train) for path, *_ in corpora)
    return 0
