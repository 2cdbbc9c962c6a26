"""Runs side by side: one table with differences and whether they exceed their error, and the loss curves.

    python eval.py compare runs/a runs/b runs/c --out=runs/compared

Losses are the last validations (or what eval.py measured, if it did so for all alike). On the same text, differences are taken row by row: the
same blocks under the same noise, so that they are far better known than either loss.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import configurator
import likelihood
from configurator import setting
from metrics import read_metrics, read_rows
from model import ModelConfig, Transformer


@dataclass
class Config:
    out: str = setting("", "folder for compare.md and compare.png (empty: the first run's)")
    sigmas: float = setting(2.0, "a difference counts from this many standard errors on", above=0)


class Run:
    """What a run folder says of itself. Raises ValueError."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.metrics = [m for m in read_metrics(folder) if "event" not in m]
        validations = [m for m in self.metrics if "val_loss" in m]
        if not validations or not (self.folder / "settings.json").is_file():
            raise ValueError(f"{folder} has no validation: is it a run folder, and has the run got that far?")
        self.settings, self.last = json.loads((self.folder / "settings.json").read_text()), validations[-1]
        self.rows, self.evaluated = read_rows(self.folder), read_rows(self.folder, "evaluation.npz")
        self.model = self.shape()
        train, self.seconds = [m for m in self.metrics if "tokens_per_s" in m], {}
        spent, before = 0.0, 0
        for m in train:  # of training alone: validations and checkpoints are not counted
            spent += (m["tokens"] - before) / m["tokens_per_s"]
            before = m["tokens"]
            self.seconds[m["tokens"]] = spent
        self.flops_per_token = self.model.flops_per_token(0.5 if self.last["objective"] == "masked" else 1.0) if self.model else math.nan

    def shape(self):
        """The network, without values; None if there is no checkpoint to tell its vocabulary."""
        for record in sorted(self.folder.glob("step_*/checkpoint.json"))[-1:]:
            with torch.device("meta"):
                return Transformer(ModelConfig(**json.loads(record.read_text())["model"]))

    def spent(self, tokens):
        """Seconds of training up to that many tokens, nan where that isn't logged."""
        return self.seconds.get(tokens, 0.0 if not tokens else math.nan)

    def at(self, tokens, axis):
        return {"tokens": tokens, "FLOPs": tokens * self.flops_per_token, "training time, s": self.spent(tokens)}[axis]


def compared(first, other):
    """(difference in nats per token, its standard error, how): row by row if both measured the same blocks under the same noise."""
    for one, two in ((first.evaluated, other.evaluated), (first.rows, other.rows)):
        if one and two and {k: v for k, v in one[0].items() if k != "step"} == {k: v for k, v in two[0].items() if k != "step"}:
            if found := likelihood.difference(two[1:], one[1:]):
                return *found, "row by row"
    errors = [run.last.get("val_error") for run in (first, other)]
    error = math.hypot(*errors) if all(isinstance(e, float) for e in errors) else math.nan
    return other.last["val_loss"] - first.last["val_loss"], error, "of the two errors"


def same_text(first, other):
    return first.rows and other.rows and all(first.rows[0][k] == other.rows[0][k] for k in ("text", "block_len"))


def table(runs, sigmas):
    """The table as markdown, and a line on each thing that keeps runs from being compared."""
    head = ["run", "objective", "parameters (in blocks)", "tokens", "training FLOPs", "time", "nats/token", "bits/byte", f"against {runs[0].name}", f"beyond {sigmas:g} errors"]
    lines, notes = [], []
    for run in runs:
        m = run.last
        n = f"{run.model.n_params() / 1e6:.2f}M ({run.model.n_params(False) / 1e6:.2f}M)" if run.model else "?"
        spent = run.spent(max(run.seconds, default=0)) if run.seconds else math.nan
        loss = f"{m['val_loss']:.4f}" + (f" ± {m['val_error']:.4f}" if isinstance(m.get("val_error"), float) else "")
        difference = verdict = ""
        if run is not runs[0]:
            if same_text(runs[0], run):
                d, error, how = compared(runs[0], run)
                difference = f"{d:+.4f} ± {error:.4f} ({how})"
                verdict = "?" if math.isnan(error) else ("yes, " + ("worse" if d > 0 else "better")) if abs(d) > sigmas * error else "no"
            else:
                difference, verdict = f"{m['val_bpb'] - runs[0].last['val_bpb']:+.4f} bits/byte", "other text"
                notes.append(f"{run.name} was validated on other text or blocks than {runs[0].name} (or by an older version): bits/byte only, and without an error")
        lines.append([run.name, m["objective"] + ("" if m["objective"] == "ar" else " (bound)"), n, f"{m['tokens']:,}", f"{m['tokens'] * run.flops_per_token:.3g}", clock(spent), loss,
                      f"{m['val_bpb']:.4f}", difference, verdict])
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines)), notes


def clock(seconds):
    if math.isnan(seconds):
        return "?"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def draw(runs, path):
    """Training loss faint, validation with error bars, against tokens, FLOPs and time; PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), sharey=True)
    for axes, axis in zip(panels, ("tokens", "FLOPs", "training time, s")):
        for k, run in enumerate(runs):
            train = [(run.at(m["tokens"], axis), m["loss"]) for m in run.metrics if "loss" in m]
            val = [(run.at(m["tokens"], axis), m["val_loss"], m.get("val_error")) for m in run.metrics if "val_loss" in m]
            val = [(x, y, e if isinstance(e, float) else 0.0) for x, y, e in val if not math.isnan(x)]
            if train:
                axes.plot(*zip(*train), color=f"C{k}", alpha=0.3, lw=1)
            if val:
                x, y, e = zip(*val)
                axes.errorbar(x, y, e, color=f"C{k}", marker="o", ms=3, capsize=2, label=run.name)
        axes.set(xlabel=axis)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="validation loss, nats per token (training: faint)")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv):
    folders = [arg for arg in argv if not arg.startswith("-")]
    cfg = configurator.load(Config, [arg for arg in argv if arg.startswith("-")], about=__doc__)
    if len(folders) < 2:
        configurator.fail("compare needs at least two run folders")
    if len({Path(folder).name for folder in folders}) < len(folders):
        configurator.fail("two of the runs have the same name: " + ", ".join(folders))
    try:
        runs = [Run(folder) for folder in folders]
        text, notes = table(runs, cfg.sigmas)
        out = Path(cfg.out or folders[0])
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text("\n\n".join([text, *notes]) + "\n")
        draw(runs, out / "compare.png")
    except (ValueError, OSError, KeyError) as problem:
        configurator.fail(str(problem))
    print(text)
    for note in notes:
        print(note)
    print(f"written to {out / 'compare.md'} and {out / 'compare.png'}")
