"""What a run writes down about itself, and how it is read and drawn."""

import contextlib
import json
import math
import os
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np


def open_tracker(cfg, run):
    """A Weights & Biases run, continued under the id that the run folder keeps; raises ValueError."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb") from None
    known = run / "wandb_id.txt"
    try:
        tracker = wandb.init(project=cfg.wandb, name=run.name, config=asdict(cfg), resume="allow",
                             id=known.read_text() if known.is_file() else None)
        tracker.define_metric("*", step_metric="step")  # its own counter would drop what comes again after the run went back
        return tracker
    except wandb.Error as problem:
        reason = str(problem).partition("\n")[0] or type(problem).__name__
        raise ValueError(f"wandb: {reason}; log in with 'wandb login' or set WANDB_MODE=offline") from None


class Journal:
    """metrics.jsonl and Weights & Biases. A full disk costs lines that can't be written, not the run."""

    def __init__(self, run, tracker):
        self.path, self.tracker, self.complained, self.torn = Path(run) / "metrics.jsonl", tracker, False, False
        self.file = open(self.path, "ab", buffering=0)

    def back_to(self, step):
        """Forget the lines of later steps: they are about to come again."""
        try:
            trim_metrics(self.path, step)
            self.file.close()
            self.file = open(self.path, "ab", buffering=0)
        except OSError as problem:
            self.complain(problem)

    def complain(self, problem):
        if not self.complained:
            print(f"warning: {self.path} can't be written ({problem.strerror}); training goes on", file=sys.stderr, flush=True)
        self.complained = True

    def write(self, **values):
        """One line; figures that JSON does not know (not finite) become text."""
        values = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        line = ("\n" * self.torn + json.dumps(values) + "\n").encode()
        try:
            self.torn = self.file.write(line) < len(line)
        except OSError as problem:
            self.complain(problem)
        if self.tracker:
            self.tracker.log(values)


    def write_rows(self, measured, **about):
        try:
            write_rows(self.path.with_name("validation.npz"), measured, **about)
        except OSError as problem:
            self.complain(problem)


def write_rows(path, measured, **about):
    """Write what was measured row by row (likelihood.Measured): `eval.py compare` takes differences of it. about: step, text (its digest), seq_len,
    passes, error, bytes_per_token. Raises OSError."""
    blocks, values = measured.rows
    path = Path(path)
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez(file, blocks=blocks, values=values, about=np.array(json.dumps(about)))
    path.with_suffix(".tmp").replace(path)


def read_rows(run, name="validation.npz"):
    """(about, blocks, values) as `keep_rows` wrote them, None where there is no such file or it is damaged."""
    try:
        with np.load(Path(run) / name, allow_pickle=False) as file:
            return json.loads(str(file["about"])), file["blocks"], file["values"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def read_metrics(run):
    """The records of a run's metrics.jsonl; a line that a crash cut is left out."""
    path, records = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def trim_metrics(path, step, events=True):
    """Drop what an interrupted run logged after its last checkpoint: those steps are about to be repeated.

    What was decided about them (lines with an `event`, but for the comparison of ranks) stays, if `events`: it happened.
    """
    if path.is_file():
        temporary = path.with_suffix(".tmp")
        kept = [m for m in read_metrics(path.parent) if m["step"] <= step or events and m.get("event", "ranks") != "ranks"]
        with open(temporary, "w") as file:
            file.write("".join(json.dumps(m) + "\n" for m in kept))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def draw_losses(runs, path):
    """The loss curves of one or two runs as a PNG: training loss faint, validation marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for color, run in zip(("tab:blue", "tab:orange"), runs):
        metrics = read_metrics(run)
        train = [(m["tokens"], m["loss"]) for m in metrics if "loss" in m]
        val = [(m["tokens"], m["val_loss"]) for m in metrics if "val_loss" in m]
        if train:
            axes.plot(*zip(*train), color=color, alpha=0.35, lw=1, label=f"{Path(run).name}, training")
        if val:
            axes.plot(*zip(*val), color=color, marker="o", ms=3, label=f"{Path(run).name}, validation")
    axes.set(xlabel="training tokens", ylabel="nats per token", title="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summary_line(run):
    """One line on a finished run's last validation, or None."""
    last = [m for m in read_metrics(run) if "val_loss" in m]
    if not last:
        return None
    m, kind = last[-1], "exact NLL" if last[-1]["objective"] == "ar" else "NELBO, an upper bound"
    return f"{Path(run).name:>20}: {m['val_bpb']:.3f} bits/byte, {m['val_loss']:.4f} nats/token ({m['objective']}, {kind}; {m['tokens']:,} tokens)"
