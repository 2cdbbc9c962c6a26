"""Compare AdamW and Muon on every kind of model, at the best learning rate of each, over several seeds.

    python scaling.py study optimizer                   nanoGPT's CPU settings on tiny Shakespeare, some hours
    python scaling.py study optimizer --scale=gpu       nanoGPT's GPU settings
    python scaling.py study optimizer --models=AR,masked --seeds=1,2
    python scaling.py study optimizer --launch          the commands that can run now
    python scaling.py study optimizer --draw            only the table, of what is there (code 2: not all)
    python scaling.py study optimizer -- --steps=500    flags after -- go to every run

First the search: half the steps, the first seed, learning rates a factor of two apart, further ones while
the best is at an end. Then every seed at the best one, with all steps; and Muon with a quarter and a half of
them, each with a whole schedule: so many tokens does it need to end where AdamW ends. Every run keeps a
moving average, too. Products are in bf16 where the hardware has it. First: python data.py shakespeare.
Finished runs are skipped, interrupted ones go on with the same command.
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import configurator
import terminal
import train
from configurator import setting
from corpus.files import all_or_none
from laws import study as study_runs
from laws.runs import write_csv
from training.log import read_metrics

OPTIMIZERS = "adamw", "muon"
VARIED = "objective", "diffusion_block", "optimizer", "lr", "seed", "ema", "eval_every"  # by the study itself
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
MOST_RATES = 12  # of a search
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
        for name, kind, lowest in (("seeds", int, 0), ("lrs", float, 1e-12)):
            try:
                values = parse_list(getattr(self, name), kind)
            except ValueError:
                values = []
            is_right = all(lowest <= value < math.inf for value in values)
            if not values or not is_right or len(set(values)) < len(values):
                yield f"{name}={getattr(self, name)}: expected different numbers with commas"
        names = self.model_names()
        unknown = [name for name in names if name not in MODELS]
        if unknown:
            yield f"models: there is no '{unknown[0]}'; choose from {', '.join(MODELS)}"
        elif len(set(names)) < len(names):
            yield f"models={self.models}: one of them comes twice"

    def model_names(self):
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
    own = [study_runs.override_file(BASES[cfg.scale]), "--local_init", "--dtype=auto", *MODELS[trial.model],
           f"--optimizer={trial.optimizer}", f"--lr={trial.lr:g}", f"--seed={trial.seed}",
           f"--ema={cfg.ema:g}", "--eval_every=0",
           "--max_skips=1000000000"]  # one that diverges goes on to its bad end
    settings, wanted = (configurator.load(train.Config, words) for words in ([*own, *flags], own))
    for name in VARIED:
        if getattr(settings, name) != getattr(wanted, name):
            configurator.fail(f"--{name} after --: that is what the study varies")
    if not settings.steps:
        configurator.fail("tokens and epochs after --: the study needs steps, of which it takes shares")

    arguments = [*own, *flags]
    if trial.share < 1:  # warm-up and the like are shares, too
        counts = [name for name in ("steps", "warmup", "anneal") if getattr(settings, name)]
        counts += ["decay"] * (settings.lr_schedule == "wsd" and settings.decay >= 1)
        arguments += [f"--{name}={max(1, round(trial.share * getattr(settings, name)))}" for name in counts]
    folder = Path(cfg.runs) / cfg.scale / trial.name()
    arguments.append(f"--run_dir={folder}")
    return study_runs.Run(folder, arguments, configurator.load(train.Config, arguments))


# ---------------------------------------------------------------------------------------------- what came out


def outcome(run):
    """What a finished run ended with: some of COLUMNS, with infinite losses if it diverged; else None."""
    if not study_runs.is_finished(run, ignored=["max_skips"]):
        return None
    metrics = read_metrics(run.folder)
    last = [m for m in metrics if "val_loss" in m][-1]
    speeds = [m["tokens_per_s"] for m in metrics if "tokens_per_s" in m]
    minutes = last["tokens"] / np.median(speeds) / 60 if speeds else math.nan
    losses = [last[name] if math.isfinite(last[name]) else math.inf for name in ("val_loss", "val_ema")]
    return dict(steps=run.settings.steps, tokens=last["tokens"], val_loss=losses[0], val_ema=losses[1],
                minutes=minutes)


class Study:
    """The trials that have been asked for, and what came out of those that have finished."""

    def __init__(self, cfg, flags):
        self.cfg, self.flags = cfg, flags
        self.seeds = parse_list(cfg.seeds, int)
        self.runs, self.outcomes = {}, {}

    def unfinished(self, trials):
        """{trial: run} of those that have not finished."""
        for trial in trials:
            if self.outcomes.get(trial) is None:
                self.runs[trial] = make_run(trial, self.cfg, self.flags)
                self.outcomes[trial] = outcome(self.runs[trial])
        return {trial: self.runs[trial] for trial in trials if self.outcomes[trial] is None}

    def search_losses(self, model, optimizer):
        """{lr: loss} of the trials of the search that have finished."""
        losses = {}
        for trial, done in self.outcomes.items():
            is_of_it = (trial.model, trial.optimizer, trial.seed) == (model, optimizer, self.seeds[0])
            if is_of_it and trial.share == SEARCHED and done:
                losses[trial.lr] = done["val_loss"]
        return dict(sorted(losses.items()))

    def best_lr(self, model, optimizer):
        """The learning rate with the lowest loss so far; None if no trial has finished."""
        losses = self.search_losses(model, optimizer)
        return min(losses, key=losses.get) if losses else None

    def next_trials(self, model, optimizer):
        """What is to be known next of an optimizer: more of the search, or all that is at its best rate."""
        losses, lrs = self.search_losses(model, optimizer), parse_list(self.cfg.lrs, float)
        best = self.best_lr(model, optimizer)
        if set(lrs) <= losses.keys() and len(losses) < MOST_RATES:
            lrs = [2 * best] * (best == max(losses)) + [best / 2] * (best == min(losses))
        if not set(lrs) <= losses.keys():
            return [Trial(model, optimizer, lr, self.seeds[0], SEARCHED) for lr in lrs]
        shares = (*SHARES, 1.0) if optimizer == "muon" else (1.0,)
        return [Trial(model, optimizer, best, seed, share) for share in shares for seed in self.seeds]

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
    for (share, loss), (next_share, next_loss) in itertools.pairwise(zip(shares, losses)):
        if next_loss <= goal:
            way = (loss - goal) / (loss - next_loss)
            return share * (next_share / share) ** way
    return math.inf


# -------------------------------------------------------------------------------------------------- the table


def write_table(study, command):
    """The study's tables in Markdown. command: the one that made it."""
    cfg = study.cfg
    pairs = list(itertools.product(cfg.model_names(), OPTIMIZERS))
    lines = [
        f"# AdamW and Muon, scale {cfg.scale}",
        "",
        f"`{command}`",
        "",
        "Validation at the end of training, nats per token: AR's is its likelihood, the others' are bounds.",
        f"Means over seeds ({cfg.seeds}) ± their standard errors; averaged: of the same run's moving average",
        f"(ema={cfg.ema:g}), at the same learning rate. Minutes are those of the training steps.",
        "",
        "| model | optimizer | lr | nats | averaged | minutes |",
        "|---|---|---|---|---|---|",
    ]
    for model, optimizer in pairs:
        cells = [format_mean(study.at_best(model, optimizer, key), len(study.seeds))
                 for key in ("val_loss", "val_ema")]
        minutes = study.at_best(model, optimizer, "minutes")
        cells.append(f"{np.median(minutes):.1f}" if len(minutes) else "—")
        lr = study.best_lr(model, optimizer)
        lines.append(f"| {model} | {optimizer} | {'—' if lr is None else f'{lr:g}'} | {' | '.join(cells)} |")

    lines += [
        "", "## What Muon needs to end where AdamW ends", "",
        f"Read off its runs of {', '.join(f'{share:g}' for share in (*SHARES, 1.0))} of the steps, seed by",
        f"seed; {SHARES[0]:g} is an upper bound. Its time is that many steps at the ratio of the minutes,",
        "which are those of an undisturbed machine only if the runs had one to themselves.",
        "",
        "| model | of AdamW's tokens | of its time |", "|---|---|---|",
    ]
    for model in cfg.model_names():
        tokens, time = shares_needed(study, model)
        lines.append(f"| {model} | {format_mean(tokens, digits=2)} | {format_mean(time, digits=2)} |")

    lines += [
        "", f"## The search: {SEARCHED:g} of the steps, seed {study.seeds[0]}", "",
        "| model | optimizer | lr: nats |", "|---|---|---|",
    ]
    for model, optimizer in pairs:
        losses = study.search_losses(model, optimizer)
        text = ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items())
        lines.append(f"| {model} | {optimizer} | {text or '—'} |")
    return "\n".join(lines) + "\n"


def shares_needed(study, model):
    """The shares of AdamW's tokens, and of its time, after which Muon ends where AdamW does, by seed."""
    goals = study.at_best(model, "adamw", "val_loss")
    shares = (*SHARES, 1.0)
    curves = [study.at_best(model, "muon", "val_loss", share) for share in shares]
    if not all(len(values) == len(study.seeds) for values in (goals, *curves)):
        return np.array([]), np.array([])
    tokens = np.array([share_needed(goal, shares, losses) for goal, losses in zip(goals, zip(*curves))])
    muon, adamw = (np.median(study.at_best(model, optimizer, "minutes")) for optimizer in ("muon", "adamw"))
    return tokens, tokens * muon / adamw


def format_mean(values, wanted=0, digits=3):
    """'1.639 ± 0.004': a mean and its standard error over seeds; — if there are no values.

    It says of how many seeds it is if that is not how many are wanted.
    """
    if not len(values):
        return "—"
    if not np.isfinite(values).all():
        return "not reached" if np.isinf(values).all() else "not by every seed"
    text = f"{values.mean():.{digits}f}"
    if len(values) > 1:
        text += f" ± {values.std(ddof=1) / math.sqrt(len(values)):.{digits}f}"
    return text if len(values) >= wanted else f"{text} ({len(values)} of {wanted} seeds)"


# ------------------------------------------------------------------------------------------------------- main


def run_trials(study, trials):
    """Train what is unfinished of some trials; exits where a run fails."""
    unfinished = list(study.unfinished(trials).values())
    if unfinished:
        study_runs.check_machine(unfinished, study.cfg)
        study_runs.train_all(unfinished, study.cfg)
    if failed := study.unfinished(trials):
        configurator.fail(f"{next(iter(failed.values())).folder} has ended, but not finished")


def read_trials(study, model, optimizer):
    """Read whatever has finished of an optimizer, and return the runs of the next trials that have not."""
    while True:
        trials = study.next_trials(model, optimizer)
        known = [trial for trial in trials if study.outcomes.get(trial)]
        unfinished = study.unfinished(trials)
        if unfinished or len(known) == len(trials):
            return unfinished


def main(argv, flags):
    cfg = configurator.load(Config, argv, about=__doc__)
    study, pairs = Study(cfg, flags), list(itertools.product(cfg.model_names(), OPTIMIZERS))
    terminal.keep_going()

    # the next trials of all pairs together, until nothing is left
    while True:
        unfinished = {}
        for pair in pairs:
            unfinished |= read_trials(study, *pair)
        if not unfinished or cfg.draw or cfg.launch:
            break
        run_trials(study, list(unfinished))
    if cfg.launch:
        for run in unfinished.values():
            print(study_runs.shown_command(run, cfg))
        return

    command = study_runs.command_of("optimizer", cfg, flags)
    out = Path(cfg.out or Path(cfg.runs) / cfg.scale / "study_optimizer")
    text = write_table(study, command)
    rows = [trial._asdict() | done for trial, done in study.outcomes.items() if done]
    with all_or_none(out) as building:
        (building / "table.md").write_text(text, encoding="utf-8")
        write_csv(rows, building / "runs.csv", COLUMNS)
    print(f"{text}\n{out}: table.md, runs.csv")
    if unfinished:
        configurator.fail("not everything has been trained yet: the same command without --draw goes on")
