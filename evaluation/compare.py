"""Compare runs: one table with differences and whether they exceed their error, and the loss curves.

    python eval.py compare runs/a runs/b runs/c --out=runs/compared

Losses are what eval.py measured, if it did so for all alike and of their last step, else the last
validations. On the same text, differences are taken row by row: the same rows under the same noise, so that
they are far better known than either loss.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import configurator
import diffusion
import terminal
from configurator import renamed, setting
from configurator.format import human_seconds, plot_text, with_error
from corpus.records import check, read_json
from evaluation import likelihood
from model import ModelConfig, Transformer
from training import flops
from training.checkpoint import newest_record
from training.log import read_metrics, read_rows, validations
from training.record import SETTINGS, required


@dataclass
class Config:
    out: str = setting("", "folder for compare.md and compare.png (empty: the first run's)")
    sigmas: float = setting(2.0, "a difference counts from this many standard errors on", above=0)


# --------------------------------------------------------------------------------------------------- the runs

EVALUATION, VALIDATION = "evaluation.npz", "validation.npz"  # of eval.py, and of training
SAME = ("text", "seq_len", "passes")  # what rows have in common if their differences mean anything


# of settings.json: what tells how much of its tokens a run's LM head reads, too
SCHEMA = required(SETTINGS, "seed", "estimator", "time", "time_sigma")


class Run:
    """A run folder's settings, metrics and losses row by row. Raises ValueError."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.metrics = [m for m in read_metrics(folder) if "event" not in m and "tokens" in m]
        measured = validations(self.metrics)
        if not measured or not (self.folder / "settings.json").is_file():
            raise ValueError(f"{folder} has no validation: is it a run folder, and has the run got that far?")
        self.settings = renamed.renamed(read_json(self.folder / "settings.json"), renamed.SETTINGS)
        check(self.settings, SCHEMA, self.folder / "settings.json")
        self.last = measured[-1]
        self.rows = {}  # file → (about, ids, losses), of the last step
        evaluation = self.folder / f"eval_{self.last['step']:08d}"
        for name, place in ((EVALUATION, evaluation), (VALIDATION, self.folder)):
            rows = read_rows(place, name)
            if rows and rows[0]["step"] == self.last["step"]:
                self.rows[name] = rows
        self.model = read_shape(self.folder)
        self.flops_per_token = self.model.flops_per_token(self.noisy_share()) if self.model else math.nan
        self.seconds = training_seconds(self.metrics)

    def noisy_share(self):
        """The share of its tokens that the LM head reads."""
        shape, s = self.model.config, self.settings
        return flops.noisy_share(diffusion.Process(
            s["objective"], shape.n_vocab, shape.mask_id, shape.seq_len, s["seed"], s["loss"], s["estimator"],
            s["schedule"], s["time"], s["time_sigma"], block=shape.diffusion_block))

    def loss(self, source):
        """(nats per token, standard error, bits per byte) as eval.py or the last validation has it."""
        if source == EVALUATION:
            about, _, losses = self.rows[source]
            nats = float(losses.mean())
            return nats, about["error"], nats / math.log(2) / about["bytes_per_token"]
        return self.last["val_loss"], self.last.get("val_error", math.nan), self.last["val_bpb"]

    def seconds_until(self, tokens):
        """Seconds of training up to so many tokens, in proportion between two lines; nan after the last."""
        known = [0, *self.seconds]
        if tokens > known[-1]:
            return math.nan
        return float(np.interp(tokens, known, [0.0, *self.seconds.values()]))

    def position(self, tokens, axis):
        """Where on an axis of the curves the run is after so many tokens."""
        if axis == "tokens":
            return tokens
        return tokens * self.flops_per_token if axis == "FLOPs" else self.seconds_until(tokens)


def read_shape(folder):
    """The network of a run's newest checkpoint without values, None if there is none."""
    record = newest_record(folder)
    if not record:
        return None
    with torch.device("meta"):
        return Transformer(ModelConfig(**record["model"]))


def training_seconds(metrics):
    """{tokens: seconds of training until then} at each line of progress; validations don't count."""
    seconds, total, before = {}, 0.0, 0
    for m in metrics:
        if "tokens_per_s" in m:
            total += (m["tokens"] - before) / m["tokens_per_s"]
            before = m["tokens"]
            seconds[before] = total
    return seconds


# -------------------------------------------------------------------------------------------------- the table


def source_of(runs):
    """The file whose losses the table is about.

    eval.py's measurements if all runs have them of their last step and alike, else the validations of
    training.
    """
    if not all(EVALUATION in run.rows for run in runs):
        return VALIDATION
    return EVALUATION if len({conditions(run, EVALUATION) for run in runs}) == 1 else VALIDATION


def conditions(run, source):
    """What must be equal for rows to be the same text under the same noise, of the same kind of weights."""
    about, ids, _ = run.rows[source]
    return *(about[name] for name in SAME), about.get("averaged", False), len(ids)


def difference_of(first, other, source):
    """(other's loss − first's in nats per token, its standard error), from rows that both have, else None."""
    if source not in first.rows or source not in other.rows:
        return None
    if conditions(first, source) != conditions(other, source):
        return None
    return likelihood.paired_difference(other.rows[source][1:], first.rows[source][1:])


def table(runs, sigmas):
    """(the table as markdown, notes on it): on the losses, and on runs that can't be compared row by row."""
    source, first = source_of(runs), runs[0]
    head = ["run", "objective", "parameters (in blocks)", "tokens", "training FLOPs", "time", "nats/token",
            "bits/byte", f"against {first.name}", f"beyond {sigmas:g} errors"]
    losses = "the last validations of training"
    if source == EVALUATION:
        averaged = runs[0].rows[source][0].get("averaged")
        losses = "what eval.py measured" + (" of averaged weights" if averaged else "")
    notes = [f"Losses: {losses}, ± one standard error, widened for few rows."]
    lines = []
    for run in runs:
        difference = verdict = ""
        if run is not first:
            difference, verdict, note = versus(first, run, source, sigmas)
            notes += [note] if note else []
        lines.append([*describe(run, source), difference, verdict])
    rows = [head, ["---"] * len(head), *lines]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in rows]  # as in names
    return "\n".join("| " + " | ".join(row) + " |" for row in rows), notes


def describe(run, source):
    """The table's columns on a run by itself."""
    nats, error, bits = run.loss(source)
    tokens = run.last["tokens"]
    is_exact = run.last.get("exact", run.last["objective"] == "ar")
    bound = "" if is_exact else " (bound)"
    parameters = "?"
    if run.model:
        parameters = f"{run.model.n_params() / 1e6:.2f}M ({run.model.n_params(False) / 1e6:.2f}M)"
    seconds = max(run.seconds.values(), default=math.nan)
    return [run.name, run.last["objective"] + bound, parameters, f"{tokens:,}",
            f"{tokens * run.flops_per_token:.3g}", human_seconds(seconds),
            "diverged" if math.isnan(nats) else with_error(nats, error), f"{bits:.4f}"]


def versus(first, run, source, sigmas):
    """(difference, whether it exceeds its error, a note or None) of a run against the first one."""
    paired = difference_of(first, run, source)
    if paired is None:
        bits = run.loss(source)[2] - first.loss(source)[2]
        note = (f"{run.name} and {first.name} have no rows of their last step in common (other text, other "
                "rows, too few, or a run of an older version): bits/byte, without an error. eval.py on both, "
                "with one --corpus, makes them comparable.")
        return f"{bits:+.4f} bits/byte", "?", note
    difference, error = paired
    verdict = "no"
    if math.isnan(difference):
        verdict = "?"
    elif abs(difference) > sigmas * error:
        verdict = "yes, worse" if difference > 0 else "yes, better"
    return f"{difference:+.4f} ± {error:.4f} nats/token", verdict, None


# ------------------------------------------------------------------------------------------------- the curves


def draw(runs, path):
    """Draw training loss faint, validation with error bars, against tokens, FLOPs and time, as .png."""
    from matplotlib.figure import Figure  # it takes half a second

    figure = Figure(figsize=(15, 4.6), layout="tight")
    panels = figure.subplots(1, 3, sharey=True)
    for axes, axis in zip(panels, ("tokens", "FLOPs", "training time, s")):
        for k, run in enumerate(runs):
            draw_run(axes, run, axis, f"C{k}")
        axes.set(xlabel=axis)
        axes.ticklabel_format(axis="x", scilimits=(-3, 4))
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="validation loss, nats per token (training: faint)")
    panels[0].legend()
    figure.savefig(path, dpi=120)


def draw_run(axes, run, axis, color):
    """Draw one run's curves."""
    train = [(run.position(m["tokens"], axis), m["loss"]) for m in run.metrics if "loss" in m]
    if train:
        axes.plot(*zip(*train), color=color, alpha=0.3, lw=1)
    validation = []
    for m in run.metrics:
        if "val_loss" not in m:
            continue
        x, error = run.position(m["tokens"], axis), m.get("val_error", math.nan)
        if not math.isnan(x):
            validation.append((x, m["val_loss"], error if math.isfinite(error) else 0.0))
    if validation:
        x, y, error = zip(*validation)
        axes.errorbar(x, y, error, color=color, marker="o", ms=3, capsize=2, label=plot_text(run.name))


def main(argv):
    folders = [arg for arg in argv if not arg.startswith("-")]
    cfg = configurator.load(Config, [arg for arg in argv if arg.startswith("-")], about=__doc__)
    if len(folders) < 2:
        configurator.fail("compare needs at least two run folders")
    if len({Path(folder).name for folder in folders}) < len(folders):
        configurator.fail(f"two of the runs have the same name: {', '.join(folders)}")
    try:
        runs = [Run(folder) for folder in folders]
        text, notes = table(runs, cfg.sigmas)
        out = Path(cfg.out or folders[0])
        out.mkdir(parents=True, exist_ok=True)
        (out / "compare.md").write_text("\n\n".join([text, *notes]) + "\n", encoding="utf-8")
        with terminal.optional(f"{out / 'compare.png'} can't be drawn"):
            draw(runs, out / "compare.png")
    except (ValueError, OSError, KeyError) as problem:
        configurator.fail(str(problem))
    print(text)
    for note in notes:
        print(note)
    print(f"written to {out / 'compare.md'} and {out / 'compare.png'}")
