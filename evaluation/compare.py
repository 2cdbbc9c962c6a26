"""Runs side by side: one table with differences and whether they exceed their error, and the loss curves.

    python eval.py compare runs/a runs/b runs/c --out=runs/compared

Losses are what eval.py measured, if it did so for all alike and of their last step, else the last validations. On the same text, differences are
taken row by row: the same blocks under the same noise, so that they are far better known than either loss.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import configurator
import diffusion
from configurator import setting
from evaluation import likelihood
from model import ModelConfig, Transformer
from training import dryrun
from training.log import read_metrics, read_rows


@dataclass
class Config:
    out: str = setting("", "folder for compare.md and compare.png (empty: the first run's)")
    sigmas: float = setting(2.0, "a difference counts from this many standard errors on", above=0)


SAME = ("text", "seq_len", "passes")  # of what rows have in common if their differences mean anything


class Run:
    """What a run folder says of itself. Raises ValueError."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.metrics = [{k: number(v) if k in ("loss", "val_loss", "val_error", "val_bpb") else v for k, v in m.items()} for m in read_metrics(folder) if "event" not in m]
        validations = [m for m in self.metrics if "val_loss" in m]
        if not validations or not (self.folder / "settings.json").is_file():
            raise ValueError(f"{folder} has no validation: is it a run folder, and has the run got that far?")
        self.settings, self.last = json.loads((self.folder / "settings.json").read_text()), validations[-1]
        places = {"evaluation.npz": self.folder / f"eval_{self.last['step']:08d}", "validation.npz": self.folder}
        self.measured = {name: rows for name, place in places.items() if (rows := read_rows(place, name)) and rows[0]["step"] == self.last["step"]}
        self.model, self.flops_per_token = self.shape(), math.nan
        if self.model:
            c, s = self.model.config, self.settings
            process = diffusion.Process(s["objective"], c.n_vocab, c.mask_id, c.seq_len, s["seed"], s["loss"], s["estimator"], s["schedule"], s["time"], s["time_sigma"])
            self.flops_per_token = self.model.flops_per_token(dryrun.noisy_share(process))
        spent, before, self.seconds = 0.0, 0, {}
        for m in self.metrics:
            if "tokens_per_s" in m:  # of training alone: validations and checkpoints are not counted
                spent, before = spent + (m["tokens"] - before) / m["tokens_per_s"], m["tokens"]
                self.seconds[m["tokens"]] = spent

    def shape(self):
        """The network, without values; None if there is no checkpoint to tell its vocabulary."""
        for record in sorted(self.folder.glob("step_*/checkpoint.json"))[-1:]:
            with torch.device("meta"):
                return Transformer(ModelConfig(**json.loads(record.read_text())["model"]))

    def loss(self, source):
        """(nats per token, standard error, bits per byte) as eval.py or the last validation has it."""
        if source == "evaluation.npz":
            about, _, values = self.measured[source]
            return float(values.mean()), about["error"], float(values.mean()) / math.log(2) / about["bytes_per_token"]
        return self.last["val_loss"], self.last.get("val_error", math.nan), self.last["val_bpb"]

    def spent(self, tokens):
        """Seconds of training up to that many tokens, between two lines of progress in proportion; nan after the last."""
        known = [0, *self.seconds]
        return float(np.interp(tokens, known, [0.0, *self.seconds.values()])) if tokens <= known[-1] else math.nan

    def at(self, tokens, axis):
        return {"tokens": tokens, "FLOPs": tokens * self.flops_per_token, "training time, s": self.spent(tokens)}[axis]


def number(value):
    """A figure of metrics.jsonl, where what isn't finite is text."""
    return float(value) if isinstance(value, str) else value


def source_of(runs):
    """What the table is about: eval.py's measurements if all runs have them, of their last step, of the same text; else the validations of training."""
    return "evaluation.npz" if all("evaluation.npz" in run.measured for run in runs) and len({alike(run, "evaluation.npz") for run in runs}) == 1 else "validation.npz"


def alike(run, source):
    """What must be equal for rows to be the same text under the same noise: which text, cut how, how many rows, how often."""
    about, blocks, _ = run.measured[source]
    return *(about[name] for name in SAME), len(blocks)


def compared(first, other, source):
    """(difference in nats per token, its standard error) row by row, of the same blocks under the same noise; None where there is no such thing."""
    if source in first.measured and source in other.measured and alike(first, source) == alike(other, source):
        return likelihood.difference(other.measured[source][1:], first.measured[source][1:])
    return None


def table(runs, sigmas):
    """The table as markdown, and a line on what it is about and on each thing that keeps runs from being compared."""
    source = source_of(runs)
    head = ["run", "objective", "parameters (in blocks)", "tokens", "training FLOPs", "time", "nats/token", "bits/byte", f"against {runs[0].name}", f"beyond {sigmas:g} errors"]
    lines, notes = [], ["Losses: " + ("what eval.py measured" if source == "evaluation.npz" else "the last validations of training") + ", ± one standard error."]
    for run in runs:
        m, (nats, error, bits) = run.last, run.loss(source)
        n = f"{run.model.n_params() / 1e6:.2f}M ({run.model.n_params(False) / 1e6:.2f}M)" if run.model else "?"
        spent = run.spent(max(run.seconds, default=0)) if run.seconds else math.nan
        difference = verdict = ""
        if run is not runs[0]:
            if found := compared(runs[0], run, source):
                d, error_of_it = found
                difference = f"{d:+.4f} ± {error_of_it:.4f} nats/token"
                verdict = "?" if math.isnan(d) else ("yes, " + ("worse" if d > 0 else "better")) if abs(d) > sigmas * error_of_it else "no"
            else:
                difference, verdict = f"{bits - runs[0].loss(source)[2]:+.4f} bits/byte", "?"
                notes.append(f"{run.name} and {runs[0].name} have no rows of their last step in common (other text, other blocks, too few, or a run of an older version): bits/byte, without an error. "
                             "eval.py on both, with one --corpus, makes them comparable.")
        loss = "diverged" if math.isnan(nats) else f"{nats:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")
        lines.append([run.name, m["objective"] + ("" if m["objective"] == "ar" else " (bound)"), n, f"{m['tokens']:,}", f"{m['tokens'] * run.flops_per_token:.3g}", clock(spent), loss,
                      f"{bits:.4f}", difference, verdict])
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
            val = [(x, y, e if isinstance(e, float) and math.isfinite(e) else 0.0) for x, y, e in val if not math.isnan(x)]
            if train:
                axes.plot(*zip(*train), color=f"C{k}", alpha=0.3, lw=1)
            if val:
                x, y, e = zip(*val)
                axes.errorbar(x, y, e, color=f"C{k}", marker="o", ms=3, capsize=2, label=run.name)
        axes.set(xlabel=axis)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
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
