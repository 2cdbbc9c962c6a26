"""Does diffusion still win on little text where AR is tuned, too? At equal tokens.

    python scaling.py study data_constrained --jobs=2          tiny models, 40 minutes on two CPU cores
    python scaling.py study data_constrained --scale=gpu --launch       the commands that can run now
    python scaling.py study data_constrained --budgets=1e4 --seeds=1,2,3
    python scaling.py study data_constrained --draw            table and figure of what is there

The control that "Diffusion Language Models are Super Data Learners" (arXiv 2511.03276) asks for: AR with its
best size, dropout, weight decay and share of masked inputs, against masked diffusion with its best size,
dropout and weight decay, on the same unique tokens, for the same tokens in all. For each budget of unique
tokens and each objective one setting is searched after the other, with the first seed; the best of all is
trained with every seed. A run counts with its lowest validation, of its weights or of their moving average:
so both may stop when they like. Finished runs are skipped, interrupted ones go on with the same command.
First: python data.py debian:bible-kjv-text --name=kjv.
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
from configurator.format import human_count
from corpus.files import all_or_none
from laws import study as study_runs
from laws.optimizers import format_mean, parse_list
from laws.runs import write_csv
from training.log import read_metrics, validations

OBJECTIVES = ("ar", "masked")
SEARCHED = ("size", "dropout", "weight_decay", "input_mask")  # in this order; the last is AR's alone
VARIED = ("objective", "unique_tokens", "n_layer", "d_model", "n_head", "model", "lr", "dropout",
          "weight_decay", "ar_input_mask", "seed")  # by the study itself
SCALES = {
    "tiny": dict(base="data_constrained_cpu.py", budgets="3e3,1e4", sizes="2x48,2x80,2x128,3x160"),
    "gpu": dict(base="data_constrained.py", budgets="5e7,1e8,2e8", sizes="36M,85M,127M,252M"),
}
REFERENCE_WIDTH, REFERENCE_LR = 128, 2e-3  # at the tiny scale lr goes with the width's inverse root
HEAD_DIM = 16
COLUMNS = "budget objective size dropout weight_decay input_mask seed tokens best epochs of last".split()


@dataclass
class Config:
    scale: Literal["tiny", "gpu"] = setting("tiny", "two CPU cores and minutes, or one GPU and hours a run")
    budgets: str = setting("", "unique tokens, with commas (empty: those of the scale)")
    sizes: str = setting("", "LAYERSxWIDTH or names of the ladder, smallest first (empty: the scale's)")
    dropouts: str = setting("0,0.1,0.3", "dropout rates to try; the first is where the search begins")
    weight_decays: str = setting("0.05,0.5,2", "weight decays to try; the first is where the search begins")
    input_masks: str = setting("0,0.2,0.5", "of AR: shares of masked inputs to try; likewise")
    seeds: str = setting("1,2", "of weights, data and noise; the search is of the first")
    runs: str = setting("runs/data_constrained", "folder of the runs: each is RUNS/SCALE/RUN")
    out: str = setting("", "folder for table.md, runs.csv and curves.png (empty: RUNS/SCALE/study)")
    jobs: int = setting(1, "runs side by side", low=1)
    launch: bool = setting(False, "print the commands that can run now, and stop")
    draw: bool = setting(False, "run nothing: table and figure of what is there")

    def problems(self):
        for name, kind, low, high in (("budgets", float, 1, 1e15), ("dropouts", float, 0, 0.99),
                                      ("weight_decays", float, 0, 1e3), ("input_masks", float, 0, 0.99),
                                      ("seeds", int, 0, 2**62)):
            try:
                values = self.values(name, kind)
            except ValueError:
                values = []
            is_right = all(low <= value <= high for value in values)
            if not values or not is_right or len(set(values)) < len(values):
                yield f"{name}={getattr(self, name)}: expected different numbers with commas"
        sizes = self.values("sizes", str)
        if len(set(sizes)) < len(sizes):
            yield f"sizes={self.sizes}: one of them comes twice"

    def values(self, name, kind):
        """A setting that is a list, or the scale's own one; raises ValueError."""
        return parse_list(getattr(self, name) or SCALES[self.scale][name], kind)

    def processes(self):
        return 1

    def needs_gpu(self):
        return self.scale == "gpu"


class Trial(NamedTuple):
    """What distinguishes a run from the others of the study."""

    budget: int  # unique tokens
    objective: str
    size: str
    dropout: float
    weight_decay: float
    input_mask: float
    seed: int

    def name(self):
        return (f"{self.budget}_{self.objective}_{self.size}_drop{self.dropout:g}_wd{self.weight_decay:g}"
                f"_mask{self.input_mask:g}_seed{self.seed}")


def shape_flags(size):
    """(flags for the shape of '3x160' or of a name of the ladder, the learning rate's factor). ValueError."""
    layers, x, width = size.partition("x")
    if not x:
        return [f"--model={size}"], 1.0
    are_whole = layers.isdecimal() and width.isdecimal() and int(layers) > 0 and int(width) > 0
    if not are_whole or int(width) % HEAD_DIM:
        raise ValueError(f"sizes: '{size}' is neither a name of the ladder nor LAYERSxWIDTH, the width a "
                         f"multiple of heads of {HEAD_DIM}")
    flags = [f"--n_layer={layers}", f"--d_model={width}", f"--n_head={int(width) // HEAD_DIM}"]
    return flags, math.sqrt(REFERENCE_WIDTH / int(width))


def make_run(trial, cfg, flags):
    """The run of a trial; exits with code 2 if a flag or a setting is wrong."""
    base = study_runs.override_file(SCALES[cfg.scale]["base"])
    try:
        shape, factor = shape_flags(trial.size)
    except ValueError as problem:
        configurator.fail(problem)
    lr = REFERENCE_LR * factor if cfg.scale == "tiny" else configurator.load(train.Config, [base]).lr
    own = [base, *shape, f"--objective={trial.objective}", f"--unique_tokens={trial.budget}",
           f"--lr={lr:.4g}", f"--dropout={trial.dropout:g}", f"--weight_decay={trial.weight_decay:g}",
           f"--seed={trial.seed}", "--max_skips=1000000000"]
    if trial.objective == "ar":
        own += ["--schedule=linear", f"--ar_input_mask={trial.input_mask:g}"]
    settings, wanted = (configurator.load(train.Config, words) for words in ([*own, *flags], own))
    for name in VARIED:
        if getattr(settings, name) != getattr(wanted, name):
            configurator.fail(f"--{name} after --: that is what the study varies")
    folder = Path(cfg.runs) / cfg.scale / trial.name()
    arguments = [*own, *flags, f"--run_dir={folder}"]
    return study_runs.Run(folder, arguments, configurator.load(train.Config, arguments))


# ---------------------------------------------------------------------------------------------- what came out


def curve_of(run):
    """(epochs, validation, that of the averaged weights) along a run, three arrays."""
    lines = validations(read_metrics(run.folder))
    epochs = [m["tokens"] / run.settings.unique_tokens for m in lines]
    losses = [[m.get(name, math.inf) for m in lines] for name in ("val_loss", "val_ema")]
    return np.array(epochs), *map(np.array, losses)


def outcome(run):
    """What a finished run reached: some of COLUMNS, with an infinite loss if it diverged; else None."""
    if not study_runs.is_finished(run, ignored=["max_skips"]):
        return None
    epochs, loss, average = curve_of(run)
    both = np.where(np.isfinite([loss, average]), [loss, average], np.inf)
    kind, step = np.unravel_index(both.argmin(), both.shape)
    tokens = read_metrics(run.folder)[-1]["tokens"]
    return dict(tokens=tokens, best=float(both.min()), epochs=float(epochs[step]),
                of=("raw", "averaged")[kind], last=float(both[:, -1].min()))


class Study:
    """The trials that have been asked for, and what came out of those that have finished."""

    def __init__(self, cfg, flags):
        self.cfg, self.flags = cfg, flags
        self.seeds = cfg.values("seeds", int)
        self.grids = dict(size=cfg.values("sizes", str), dropout=cfg.values("dropouts", float),
                          weight_decay=cfg.values("weight_decays", float),
                          input_mask=cfg.values("input_masks", float))
        self.pairs = list(itertools.product(map(int, cfg.values("budgets", float)), OBJECTIVES))
        self.runs, self.outcomes = {}, {}

    def look_up(self, trials):
        """Read what has finished of some trials."""
        for trial in trials:
            if self.outcomes.get(trial) is None:
                self.runs[trial] = make_run(trial, self.cfg, self.flags)
                self.outcomes[trial] = outcome(self.runs[trial])

    def next_trials(self, budget, objective):
        """The trials of a budget and objective that can run now and have not finished, and the best trial.

        The search goes from setting to setting, each at the best value of those before it; then every seed.
        The best trial is None until the search is over.
        """
        names = SEARCHED if objective == "ar" else SEARCHED[:-1]
        first = {name: grid[0] for name, grid in self.grids.items()}
        if objective == "masked":
            first["input_mask"] = 0.0
        first["size"] = self.grids["size"][(len(self.grids["size"]) - 1) // 2]
        best = Trial(budget, objective, **first, seed=self.seeds[0])
        for name in names:
            trials = [best._replace(**{name: value}) for value in self.grids[name]]
            self.look_up(trials)
            if missing := [trial for trial in trials if not self.outcomes[trial]]:
                return missing, None
            best = min(trials, key=lambda trial: self.outcomes[trial]["best"])
        trials = [best._replace(seed=seed) for seed in self.seeds]
        self.look_up(trials)
        return [trial for trial in trials if not self.outcomes[trial]], best

    def at_best(self, budget, objective):
        """(the best trial or None, its seeds' best losses that are known)."""
        _, best = self.next_trials(budget, objective)
        if not best:
            return None, np.array([])
        trials = [best._replace(seed=seed) for seed in self.seeds]
        return best, np.array([self.outcomes[t]["best"] for t in trials if self.outcomes[t]])


# ------------------------------------------------------------------------------------------------- the report


def write_table(study, command):
    """The study's tables in Markdown. command: the one that made it."""
    cfg = study.cfg
    lines = [
        f"# Little text, read again and again: AR and masked diffusion, each tuned (scale {cfg.scale})", "",
        f"`{command}`", "",
        "Lowest validation along a run, nats per token (AR's likelihood, masked diffusion's bound): mean",
        f"over seeds ({cfg.seeds}) ± standard error. The search is of the first seed.", "",
        "| unique tokens | objective | size | dropout | weight decay | masked inputs | nats | epochs "
        "| masked − ar |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for budget in dict.fromkeys(budget for budget, _ in study.pairs):
        found = {objective: study.at_best(budget, objective) for objective in OBJECTIVES}
        for objective, (best, losses) in found.items():
            if best is None:
                lines.append(f"| {budget:,} | {objective} | — | — | — | — | — | — | |")
                continue
            verdict = verdict_of(found) if objective == "masked" else ""
            mask = f"{best.input_mask:g}" if objective == "ar" else ""
            cells = (f"{budget:,}", objective, best.size, f"{best.dropout:g}", f"{best.weight_decay:g}", mask,
                     format_mean(losses), f"{study.outcomes[best]['epochs']:.0f}", verdict)
            lines.append(f"| {' | '.join(cells)} |")

    lines += ["", "## What each setting is worth: first seed, lowest validation", "",
              "| unique tokens | objective | setting | value: nats |", "|---|---|---|---|"]
    for budget, objective in study.pairs:
        for name, values in searches(study, budget, objective).items():
            text = ", ".join(f"{value}: {loss:.3f}" for value, loss in values.items())
            lines.append(f"| {budget:,} | {objective} | {name.replace('_', ' ')} | {text} |")
    return "\n".join(lines) + "\n"


def searches(study, budget, objective):
    """{setting: {value: best loss}} of a search, as far as it has come; the values around the best so far."""
    names = SEARCHED if objective == "ar" else SEARCHED[:-1]
    known = {trial: done["best"] for trial, done in study.outcomes.items()
             if done and (trial.budget, trial.objective, trial.seed) == (budget, objective, study.seeds[0])}
    if not known:
        return {}
    best, found = min(known, key=known.get), {}
    for number, name in enumerate(names):
        # where the search stood when it came to this setting: later ones as they were at first
        place = best._replace(**{later: study.grids[later][0] for later in names[number + 1 :]})
        trials = {value: place._replace(**{name: value}) for value in study.grids[name]}
        found[name] = {value: known[trial] for value, trial in trials.items() if trial in known}
    return {name: values for name, values in found.items() if len(values) > 1}


def verdict_of(found):
    """masked − ar with its error over seeds, from {objective: (best trial, losses)}."""
    (_, ar), (_, masked) = (found[objective] for objective in OBJECTIVES)
    if not len(ar) or not len(masked):
        return "—"
    difference = masked.mean() - ar.mean()
    if min(len(ar), len(masked)) < 2:
        return f"{difference:+.3f}"
    error = math.hypot(*(losses.std(ddof=1) / math.sqrt(len(losses)) for losses in (ar, masked)))
    return f"{difference:+.3f} ± {error:.3f}"


def draw_curves(study, path):
    """Draw the best runs' validations along their epochs, every seed, a panel for each budget."""
    from laws.drawing import BLUE, ORANGE, finish, panels

    budgets = list(dict.fromkeys(budget for budget, _ in study.pairs))
    figure, axes = panels(len(budgets))
    for ax, budget in zip(axes.flat, budgets):
        for objective, color in zip(OBJECTIVES, (ORANGE, BLUE)):
            _, best = study.next_trials(budget, objective)
            seeds = [best._replace(seed=seed) for seed in study.seeds] if best else []
            for number, trial in enumerate(trial for trial in seeds if study.outcomes[trial]):
                epochs, loss, average = curve_of(study.runs[trial])
                lowest = np.minimum(loss, average)
                after = epochs > 0
                label = f"{objective}, {trial.size}" if number == 0 else None
                ax.plot(epochs[after], lowest[after], color=color, lw=1.2, alpha=0.8, label=label)
        ax.set_title(f"{human_count(budget)} unique tokens", fontsize=9)
        finish(ax, "epochs", "nats per token", legend={})
        low, high = ax.get_ylim()
        ax.set_ylim(low, min(high, low + 1.5))
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------------------------------------- main


def main(argv, flags):
    cfg = configurator.load(Config, argv, about=__doc__)
    study = Study(cfg, flags)
    terminal.keep_going()

    # the next trials of all pairs together, until nothing is left
    while True:
        unfinished = [trial for pair in study.pairs for trial in study.next_trials(*pair)[0]]
        runs = [study.runs[trial] for trial in unfinished]
        if not runs or cfg.draw or cfg.launch:
            break
        study_runs.check_machine(runs, cfg)
        study_runs.train_all(runs, cfg)
        study.look_up(unfinished)
        if failed := [study.runs[trial] for trial in unfinished if not study.outcomes[trial]]:
            configurator.fail(f"{failed[0].folder} has ended, but not finished")
    if cfg.launch:
        for run in runs:
            print(study_runs.shown_command(run, cfg))
        return

    command = study_runs.command_of("data_constrained", cfg, flags)
    out = Path(cfg.out or Path(cfg.runs) / cfg.scale / "study")
    text = write_table(study, command)
    rows = [trial._asdict() | done for trial, done in study.outcomes.items() if done]
    with all_or_none(out) as building:
        (building / "table.md").write_text(text, encoding="utf-8")
        write_csv(rows, building / "runs.csv", COLUMNS)
        with terminal.optional(f"{out / 'curves.png'} can't be drawn"):
            draw_curves(study, building / "curves.png")
    print(f"{text}\n{out}: table.md, runs.csv, curves.png")
    if unfinished:
        configurator.fail("not everything has been trained yet: the same command without --draw goes on")
