"""Compare AdamW and Muon on every kind of model, at the best learning rate of each, over several seeds.

    python scaling.py study optimizer                   nanoGPT's CPU settings on tiny Shakespeare, some hours
    python scaling.py study optimizer --scale=gpu       nanoGPT's GPU settings
    python scaling.py study optimizer --models=AR,masked --seeds=1,2
    python scaling.py study optimizer --launch          the commands that can run now
    python scaling.py study optimizer --draw            only the table, of what is there
    python scaling.py study optimizer -- --steps=500    flags after -- go to every run

First the search: half the steps, the first seed, learning rates a factor of two apart, further ones while
the best is at an end. Then every seed at the best one, with all steps; and Muon with a quarter and a half of
them, each with a whole schedule: so many tokens does it need to end where AdamW ends. Every run keeps a
moving average, too. First: python data.py shakespeare. Finished runs are skipped, interrupted ones go on with
the same command.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import configurator
import terminal
from configurator import setting
from corpus.files import all_or_none
from laws import study
from laws.runs import write_csv
from training.log import read_metrics

OPTIMIZERS = "adamw", "muon"
MODELS = {
    "AR": ["--objective=ar"],
    "masked": ["--objective=masked"],
    "uniform": ["--objective=uniform"],
    "blocks of 4": ["--objective=masked", "--diffusion_block=4"],
    "blocks of 16": ["--objective=masked", "--diffusion_block=16"],
}
BASES = {"cpu": "shakespeare_ar_cpu.py", "gpu": "shakespeare.py"}
SHARES = 0.25, 0.5  # of the steps, of Muon's shorter runs
SEARCHED = 0.5  # of the steps, of the runs of the search
COLUMNS = "model optimizer lr seed share steps tokens val_loss val_ema minutes".split()


@dataclass
class Config:
    scale: Literal["cpu", "gpu"] = setting("cpu", "nanoGPT's settings for a CPU, or for one GPU")
    models: str = setting("", f"some of {', '.join(MODELS)}, with commas (empty: all)")
    seeds: str = setting("1,2,3", "of weights, data and noise, with commas; the search is of the first")
    lrs: str = setting("1e-3,2e-3,4e-3", "learning rates to begin the search with, a factor of two apart")
    ema: float = setting(0.99, "decay of the moving average", above=0, high=0.999999)
    runs: str = setting("runs/optimizers", "folder of the runs: each is RUNS/SCALE/RUN")
    out: str = setting("", "folder for table.md and runs.csv (empty: RUNS/SCALE/study_optimizer)")
    jobs: int = setting(1, "runs side by side", low=1)
    launch: bool = setting(False, "print the commands that can run now, and stop")
    draw: bool = setting(False, "run nothing: the table of what is there")

    def problems(self):
        lines = []
        for name, kind in (("seeds", int), ("lrs", float)):
            try:
                values = parse_list(getattr(self, name), kind)
            except ValueError:
                values = []
            if not values or min(values) < 0 or len(set(values)) < len(values):
                lines.append(f"{name}={getattr(self, name)}: expected different numbers with commas")
        unknown = [name for name in self.kinds() if name not in MODELS]
        if unknown:
            lines.append(f"models: there is no '{unknown[0]}'; choose from {', '.join(MODELS)}")
        return lines

    def kinds(self):
        """The models to compare."""
        return parse_list(self.models, str) or list(MODELS)

    def processes(self):
        """Processes per run."""
        return 1

    def needs_gpu(self):
        return self.scale == "gpu"


def parse_list(text, kind):
    """'1, 2' → [1, 2]; raises ValueError."""
    return [kind(word.strip()) for word in text.split(",") if word.strip()]


class Trial(NamedTuple):
    """What distinguishes a run from the others of the study."""

    model: str
    optimizer: str
    lr: float
    seed: int
    share: float = 1.0  # of the steps

    def name(self):
        model = self.model.replace(" of ", "_")
        share = "" if self.share == 1 else f"_share{self.share:g}"
        return f"{model}_{self.optimizer}_lr{self.lr:g}{share}_seed{self.seed}"


def make_run(trial, cfg, flags):
    """The run of a trial; exits with code 2 if a flag or a setting is wrong."""
    folder = Path(cfg.runs) / cfg.scale / trial.name()
    arguments = [
        study.override_file(BASES[cfg.scale]), *MODELS[trial.model], "--local_init", "--dtype=auto",
        f"--optimizer={trial.optimizer}", f"--lr={trial.lr:g}", f"--seed={trial.seed}", f"--ema={cfg.ema:g}",
        "--eval_every=0", *flags]
    settings = configurator.load(study.train.Config, [*arguments, f"--run_dir={folder}"])
    if trial.share < 1:  # warm-up is a share, too
        steps, warmup = (round(trial.share * n) for n in (settings.steps, settings.warmup))
        arguments += [f"--steps={steps}", f"--warmup={warmup}"]
    arguments.append(f"--run_dir={folder}")
    return study.Run(folder, arguments, configurator.load(study.train.Config, arguments))


# ---------------------------------------------------------------------------------------------- what came out


def outcome(run):
    """What a finished run ended with: a dict of some of COLUMNS; None if it has not finished."""
    if not study.is_finished(run):
        return None
    metrics = read_metrics(run.folder)
    last = [m for m in metrics if "val_loss" in m][-1]
    speeds = [m["tokens_per_s"] for m in metrics if "tokens_per_s" in m]
    minutes = last["tokens"] / np.median(speeds) / 60 if speeds else math.nan
    return dict(steps=run.settings.steps, tokens=last["tokens"], val_loss=last["val_loss"],
                val_ema=last["val_ema"], minutes=minutes)


class Study:
    """The trials that have been asked for, and what came out of those that have finished."""

    def __init__(self, cfg, flags):
        self.cfg, self.flags = cfg, flags
        self.seeds = parse_list(cfg.seeds, int)
        self.runs, self.outcomes = {}, {}

    def missing(self, trials):
        """{trial: run} of those that have not finished."""
        for trial in trials:
            if self.outcomes.get(trial) is None:
                self.runs[trial] = make_run(trial, self.cfg, self.flags)
                self.outcomes[trial] = outcome(self.runs[trial])
        return {trial: self.runs[trial] for trial in trials if self.outcomes[trial] is None}

    def loss(self, trial):
        """The final loss of a trial; infinite if it diverged, None if it has not finished."""
        done = self.outcomes.get(trial)
        if done is None:
            return None
        return done["val_loss"] if math.isfinite(done["val_loss"]) else math.inf

    def searched(self, model, optimizer):
        """{lr: loss} of the trials of the search that have finished."""
        losses = {}
        for trial in self.outcomes:
            is_of_it = (trial.model, trial.optimizer, trial.seed) == (model, optimizer, self.seeds[0])
            if is_of_it and trial.share == SEARCHED and self.loss(trial) is not None:
                losses[trial.lr] = self.loss(trial)
        return dict(sorted(losses.items()))

    def best_lr(self, model, optimizer):
        """The learning rate with the lowest loss so far; None if no trial has finished."""
        losses = self.searched(model, optimizer)
        return min(losses, key=losses.get) if losses else None

    def search_trials(self, pairs):
        """The next trials of the search, of each (model, optimizer): the first ones, or one beyond an end."""
        trials = []
        for model, optimizer in pairs:
            losses = self.searched(model, optimizer)
            lrs = parse_list(self.cfg.lrs, float)
            if set(lrs) <= losses.keys():
                best, ends = self.best_lr(model, optimizer), (min(losses), max(losses))
                lrs = [2 * best] * (best == ends[1]) + [best / 2] * (best == ends[0])
            trials += [Trial(model, optimizer, lr, self.seeds[0], SEARCHED) for lr in lrs]
        return trials

    def final_trials(self, pairs):
        """Every seed at the best learning rate, and Muon's shorter runs."""
        trials = []
        for model, optimizer in pairs:
            lr = self.best_lr(model, optimizer)
            shares = (*SHARES, 1.0) if optimizer == "muon" else (1.0,)
            for share, seed in itertools.product(shares, self.seeds):
                if lr is not None:
                    trials.append(Trial(model, optimizer, lr, seed, share))
        return trials

    def at_best(self, model, optimizer, key, share=1.0):
        """`key` of the outcomes at the best learning rate, one for each seed that has finished."""
        lr = self.best_lr(model, optimizer)
        trials = [Trial(model, optimizer, lr, seed, share) for seed in self.seeds]
        return np.array([self.outcomes[t][key] for t in trials if self.outcomes.get(t)])


def share_needed(goal, shares, losses):
    """At which share of the steps a loss reaches `goal`: on straight lines in the shares' logarithms.

    inf: not even at the largest one. If already at the smallest, that one.
    """
    if goal >= losses[0]:
        return shares[0]
    for (s, loss), (next_s, next_loss) in itertools.pairwise(zip(shares, losses)):
        if next_loss <= goal:
            way = (loss - goal) / (loss - next_loss)
            return s * (next_s / s) ** way
    return math.inf


# -------------------------------------------------------------------------------------------------- the table


def write_table(found, how):
    """The study's tables in Markdown. how: the command that made it."""
    cfg = found.cfg
    pairs = list(itertools.product(cfg.kinds(), OPTIMIZERS))
    lines = [
        f"# AdamW and Muon, scale {cfg.scale}",
        "",
        f"`{how}`",
        "",
        "Validation at the end of training, nats per token: AR's is its likelihood, the others' are bounds.",
        f"Means over seeds ({cfg.seeds}) ± their standard errors; averaged: of the same run's moving average",
        f"(ema={cfg.ema:g}). Minutes are those of the training steps.",
        "",
        "| model | optimizer | lr | nats | averaged | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for model, optimizer in pairs:
        cells = [format_mean(found.at_best(model, optimizer, key)) for key in ("val_loss", "val_ema")]
        minutes = found.at_best(model, optimizer, "minutes")
        cells.append(f"{np.median(minutes):.1f}" if len(minutes) else "—")
        lr = found.best_lr(model, optimizer)
        lines.append(f"| {model} | {optimizer} | {'—' if lr is None else f'{lr:g}'} | {' | '.join(cells)} |")

    lines += [
        "", "## What Muon needs to end where AdamW ends", "",
        f"Read off its runs of {', '.join(f'{share:g}' for share in (*SHARES, 1.0))} of the steps, seed by",
        f"seed; {SHARES[0]:g} is an upper bound. Its time is that many steps at the ratio of the minutes.",
        "",
        "| model | of AdamW's tokens | of its time |", "|---|---|---|",
    ]
    for model in cfg.kinds():
        tokens, time = needed(found, model)
        lines.append(f"| {model} | {format_mean(tokens, 2)} | {format_mean(time, 2)} |")

    lines += [
        "", f"## The search: {SEARCHED:g} of the steps, seed {found.seeds[0]}", "",
        "| model | optimizer | lr: nats |", "|---|---|---|",
    ]
    for model, optimizer in pairs:
        losses = found.searched(model, optimizer)
        text = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items())
        lines.append(f"| {model} | {optimizer} | {text or '—'} |")
    return "\n".join(lines) + "\n"


def needed(found, model):
    """The shares of AdamW's tokens, and of its time, after which Muon ends where AdamW does, by seed."""
    goals = found.at_best(model, "adamw", "val_loss")
    shares = (*SHARES, 1.0)
    curves = [found.at_best(model, "muon", "val_loss", share) for share in shares]
    if not all(len(values) == len(found.seeds) for values in (goals, *curves)):
        return np.array([]), np.array([])
    tokens = np.array([share_needed(goal, shares, losses) for goal, losses in zip(goals, zip(*curves))])
    slower = np.median(found.at_best(model, "muon", "minutes")) / np.median(
        found.at_best(model, "adamw", "minutes"))
    return tokens, tokens * slower


def format_mean(values, digits=3):
    """'1.639 ± 0.004': a mean and its standard error over seeds; — if there are no values."""
    if not len(values):
        return "—"
    if not np.isfinite(values).all():
        return "not reached" if np.isinf(values).all() else "not by every seed"
    text = f"{values.mean():.{digits}f}"
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return text if error is None else f"{text} ± {error:.{digits}f}"


# ------------------------------------------------------------------------------------------------------- main


def run_trials(found, trials):
    """Train what is missing of some trials; False if the study only shows or draws, and something is."""
    missing = found.missing(trials)
    if missing and not (found.cfg.draw or found.cfg.launch):
        study.check_machine(list(missing.values()), found.cfg)
        study.train_all(list(missing.values()), found.cfg)
        missing = found.missing(trials)
    if found.cfg.launch:
        for run in missing.values():
            print(study.shown_command(run, found.cfg))
    return not missing


def main(argv, flags):
    cfg = configurator.load(Config, argv, about=__doc__)
    found, pairs = Study(cfg, flags), list(itertools.product(cfg.kinds(), OPTIMIZERS))
    terminal.keep_going()

    # the search, until no best learning rate is at an end; then all seeds at the best ones
    is_complete = True
    while is_complete and (trials := found.search_trials(pairs)):
        is_complete = run_trials(found, trials)
    if is_complete or cfg.draw:
        is_complete = run_trials(found, found.final_trials(pairs)) and is_complete
    if cfg.launch:
        return

    how = study.shown_study(["python", "scaling.py", "study", "optimizer", f"--scale={cfg.scale}"], flags)
    out = Path(cfg.out or Path(cfg.runs) / cfg.scale / "study_optimizer")
    text = write_table(found, how)
    rows = [trial._asdict() | done for trial, done in found.outcomes.items() if done]
    with all_or_none(out) as building:
        (building / "table.md").write_text(text, encoding="utf-8")
        write_csv(rows, building / "runs.csv", COLUMNS)
    print(f"{text}\n{out}: table.md, runs.csv")
    if not is_complete:
        configurator.fail("not everything has been trained yet: the same command without --draw goes on")
