"""Many runs for a scaling law: lay out a grid, train it, collect its points.

    GRID="--base=configurator/sweep_cpu.py --models=2x64,2x96,2x128 --flops=1e12,2e12"
    python scaling.py sweep $GRID --dry_run            the runs that there would be
    python scaling.py sweep $GRID                      train them; the same command again goes on
    python scaling.py sweep --base=my.py --models=106M,173M --unique_tokens=1e8,3e8 --epochs=1,4,16,64
    python scaling.py sweep --base=my.py --models=65M,106M,173M --flops=3e18,1e19 --share=False --launch=slurm

An IsoFLOP grid is models × flops, a data-constrained one models × unique_tokens × epochs, each for every
objective and seed. A run is an override file <out>/configs/<name>.py, a folder <out>/runs/<name>, and a log.
Instead of training here, --launch writes a job array (slurm) or prints commands (torchrun). What was trained
is fitted and drawn; `python -m laws.sweep` does all but that, for a grid that takes several commands.

With `share`, the longest run of each (objective, model, unique tokens, seed) gives all shorter ones: its
learning rate is constant until its own decay, and data order and noise are functions of (seed, sample), so a
shorter run is what the longest was where the shorter one's decay begins, and that decay: exactly, on a CPU
with compile=no. Longer budgets may be added to a finished grid: name the old ones, too, and they go on from
where the longest began to decay.
"""

import itertools
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import configurator
import terminal
import train
from configurator import setting, split, split_paths
from configurator.ladder import ladder
from corpus import tokenfiles
from corpus.files import all_or_none
from laws import predictions, runner
from laws.collect import CURVE_COLUMNS, POINT_COLUMNS, count_params, read_curves, read_points
from laws.runs import write_csv
from model import ModelConfig
from training.checkpoint import checkpoints, newest_record, step_folder, step_of
from training.log import read_metrics, trim_metrics
from training.update import decay_steps

OBJECTIVES = ("masked", "ar", "uniform")
SHAPE = ("model", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff")
# an AR run has no noise and no choice of loss
AR_DEFAULTS = {name: getattr(train.Config(), name) for name in
               ("diffusion_block", "schedule", "time", "time_sigma", "time_correction", "loss", "estimator")}


@dataclass
class Config:
    base: str = setting(
        "configurator/docs_cpu.py", "override files that every run starts from, with commas between")
    out: str = setting("runs/sweep", "folder of the sweep")
    # the grid: lists with commas
    models: str = setting(
        "1x64,2x64,2x128", "sizes, three or more for a fit: names of the ladder such as 106M, "
        "or LAYERSxWIDTH with heads as wide as the base's")
    objectives: str = setting("masked,ar", "of masked, ar and uniform")
    flops: str = setting("", "IsoFLOP grid: budgets 6·N·D (block diffusion computes almost twice that)")
    unique_tokens: str = setting("", "data-constrained grid: unique tokens (with epochs)")
    epochs: str = setting("", "passes over them")
    seeds: str = setting("1337", "of weights, data order and noise")
    lr_power: float = setting(
        0.0, "learning rate at width d: the base's lr · (128/d)^lr_power", low=-2, high=2)
    decay: float = setting(
        0.2, "share of the steps in which the learning rate decays (wsd); 0: the base's own lr_schedule",
        low=0, high=0.99)
    share: bool = setting(True, "shorter runs branch off the longest where their decay begins")
    evals: int = setting(
        0, "validations along the longest run of each size (0: the base's eval_every)", low=0)
    known: str = setting(
        "", "of an IsoFLOP grid: CSVs or folders of runs that exist, from which each run's loss is predicted "
        "before it is trained, into OUT/predictions.csv")
    # how they run
    launch: Literal["run", "torchrun", "slurm"] = setting(
        "run", "run: here; torchrun: print a command per run; slurm: write a job array")
    processes: int = setting(1, "of torchrun and slurm: processes per run", low=1)
    jobs: int = setting(1, "runs side by side (also of a SLURM array)", low=1)
    dry_run: bool = setting(False, "print the table of runs, and stop")
    flops_per_s: float = setting(
        5e10, "of one run (6·N tokens), for the estimate of hours: a small model on a CPU core reaches 5e10, "
        "a large one on an H100 4e14", above=0)

    def problems(self):
        """Settings that do not go together, one line each."""
        problems = []
        for name in ("base", "models", "objectives", "seeds"):
            if not split(getattr(self, name)):
                problems.append(f"{name} is empty")
        for name in ("flops", "unique_tokens", "epochs", "seeds"):
            problems += self.number_problems(name)
        for name in ("models", "objectives"):
            parts = split(getattr(self, name))
            if len(set(parts)) < len(parts):
                problems.append(f"{name}={getattr(self, name)}: each once")

        if bool(self.flops) == bool(self.unique_tokens) or bool(self.unique_tokens) != bool(self.epochs):
            problems.append("which grid? give either flops, or unique_tokens and epochs")
        for objective in split(self.objectives):
            if objective not in OBJECTIVES:
                problems.append(f"objectives: '{objective}' is none of {', '.join(OBJECTIVES)}")
        if not self.out.isprintable():  # it stands in a SLURM script
            problems.append(f"out={self.out!r}: a folder without control characters, please")
        if self.known and not self.flops:
            problems.append("known needs flops: what is predicted are runs that see every token once")
        if self.share and not self.decay:
            problems.append("share=True needs decay: runs branch off where it begins")
        if self.share and self.launch != "run":
            problems.append(f"launch={self.launch} needs share=False: its runs know nothing of each other")
        return problems

    def number_problems(self, name):
        """What is wrong with a list of numbers: a line, or nothing."""
        text = getattr(self, name)
        kind, word = (int, "whole") if name == "seeds" else (float, "positive")
        try:
            numbers = parse_numbers(text, kind)
            in_range = kind is int or min(numbers, default=1.0) > 0
            is_valid = in_range and len(set(numbers)) == len(numbers)
        except (ValueError, OverflowError):
            is_valid = False
        return [] if is_valid else [f"{name}={text}: write {word} numbers, each once, with commas between"]


def parse_numbers(text, kind=float):
    """'1e8,250M' as numbers; raises ValueError."""
    return [configurator.convert(part, kind) for part in split(text)]


class Run(NamedTuple):
    """One run of the grid."""

    name: str
    group: tuple  # the same for runs that differ in their length alone
    settings: train.Config
    params: int
    tokens: int
    epochs: float

    @property
    def steps(self):
        return self.settings.steps

    @property
    def fork(self):
        """With `share`: the step after which its learning rate decays, and where it leaves a longer run."""
        return self.steps - int(self.settings.decay)

    @property
    def folder(self):
        return Path(self.settings.run_dir)

    @property
    def flops(self):
        return 6 * self.params * self.tokens

    @property
    def saved_step(self):
        """The step of its newest checkpoint, or 0."""
        return max((step_of(folder) for folder in checkpoints(self.folder)), default=0)

    @property
    def is_finished(self):
        return step_folder(self.folder, self.steps).is_dir()


# ----------------------------------------------------------------------------------------------------- layout


class Length(NamedTuple):
    """How long a run of the grid is trained, and on what."""

    label: str
    tokens: float
    unique: int  # unique tokens; 0: the whole corpus


def layout(cfg):
    """Every run of the grid; exits with one line per problem."""
    base, meta, available, problems = read_base(cfg)
    shapes = {}
    for model in split(cfg.models):
        try:
            shapes[model] = shape_settings(model, base)
        except ValueError as problem:
            problems.append(f"models={cfg.models}: {problem}")

    runs = []
    for model, objective in itertools.product(shapes, split(cfg.objectives)):
        settings, params = size_settings(cfg, base, meta, shapes[model], objective)
        for seed, length in itertools.product(parse_numbers(cfg.seeds, int), lengths(cfg, params)):
            run = make_run(cfg, settings, model, params, seed, length, available)
            problems += length_problems(cfg, run, available)
            runs.append(run)

    if not problems:
        for run in runs:
            place_evaluations(cfg, run, runs)
            unmet = configurator.unmet_needs(run.settings, train.Config.NEEDS)
            problems += [f"{run.name}: {problem}" for problem in [*unmet, *run.settings.problems()]]
            problems += record_problems(cfg, run)
    if problems:
        configurator.fail(*problems)
    return runs


def read_base(cfg):
    """The base's settings, its corpora's meta data and tokens, and problems; exits without a corpus."""
    base = configurator.load(train.Config, [*split_paths(cfg.base), "--steps=1", "--tokens=0", "--epochs=0"])
    problems = []
    if cfg.share and base.time == "moving_gaussian":
        problems.append("time=moving_gaussian goes by the share of all steps: "
                        "no run is the beginning of a longer one; use --share=False")
    try:
        paths = [path for path, *_ in tokenfiles.parse_corpora(base.corpus)]
        foreign = base.tokenizer, base.val_share, base.eos, base.eos_opens
        corpora = [tokenfiles.load_corpus(path, *foreign) for path in paths]
    except (ValueError, OSError) as problem:
        configurator.fail(*problems, problem)
    return base, corpora[0].meta, sum(len(corpus.train) for corpus in corpora), problems


def shape_settings(model, base):
    """The shape settings of '106M' (the ladder) or '3x64' (layers × width); raises ValueError."""
    shape = {name: getattr(train.Config(), name) for name in SHAPE}
    layers, x, width = model.partition("x")
    if not x:
        ladder(model)  # is there such a model?
        return shape | dict(model=model)

    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
        raise ValueError(f"'{model}' is neither a name of the ladder nor LAYERSxWIDTH")
    head_dim = base.shape()["head_dim"]
    if int(width) % head_dim:
        raise ValueError(f"the width of {model} is no multiple of the base's heads of {head_dim}")
    return shape | dict(n_layer=int(layers), d_model=int(width), n_head=int(width) // head_dim)


def size_settings(cfg, base, meta, shape, objective):
    """The settings that all runs of a size and objective share, and their number of parameters."""
    settings = asdict(base) | shape | dict(objective=objective, resume="auto")
    if objective == "ar":
        settings |= AR_DEFAULTS
    dimensions = train.Config(**settings).shape()
    params = count_params(ModelConfig(
        **dimensions, n_vocab=meta["n_vocab"], mask_id=meta["mask_id"], seq_len=base.seq_len,
        causal=objective == "ar", tied=base.tied, timed=objective == "uniform"))
    lr = base.lr * (128 / dimensions["d_model"]) ** cfg.lr_power
    return settings | dict(lr=float(f"{lr:.4g}")), params


def lengths(cfg, params):
    """The lengths of the grid's runs of this size."""
    isoflop = [Length(f"{flops:g}", flops / (6 * params), 0) for flops in parse_numbers(cfg.flops)]
    repeated = []
    for unique, epochs in itertools.product(parse_numbers(cfg.unique_tokens), parse_numbers(cfg.epochs)):
        repeated.append(Length(f"{int(unique)}u_{epochs:g}e", epochs * int(unique), int(unique)))
    return isoflop + repeated


def make_run(cfg, settings, model, params, seed, length, available):
    """The Run of a size, seed and length."""
    objective = settings["objective"]
    name = f"{objective}_{model}_{length.label}_s{seed}".replace("+", "")
    step_tokens = settings["batch_size"] * settings["seq_len"]
    steps = max(1, round(length.tokens / step_tokens))
    tokens = steps * step_tokens

    run_dir = str(Path(cfg.out) / "runs" / name)
    settings = settings | dict(run_dir=run_dir, seed=seed, steps=steps, unique_tokens=length.unique)
    if cfg.decay:
        settings |= dict(lr_schedule="wsd", decay=float(decay_steps(cfg.decay, steps)))
    group = objective, model, length.unique, seed
    return Run(name, group, train.Config(**settings), params, tokens, tokens / (length.unique or available))


def length_problems(cfg, run, available):
    """Why a run is too short or too long for its text, one line each."""
    problems, warmup, unique = [], run.settings.warmup, run.settings.unique_tokens
    decay = int(run.settings.decay) if cfg.decay else 0
    if warmup + decay > run.steps:
        problems.append(f"{run.name}: {run.steps} steps are too few for warmup={warmup} and {decay} steps of "
                        "decay; add a file with a smaller warmup to --base")
    if unique > available:
        problems.append(f"{run.name}: the corpus has only {available:,} training tokens")
    return problems


def place_evaluations(cfg, run, runs):
    """Set when a run validates, and at which steps a shorter one will branch off it."""
    if cfg.evals:
        run.settings.eval_every = max(1, trunk_of(run, runs).steps // cfg.evals)
    if cfg.share:  # at its own fork, too: a longer run may go on there, should the grid grow
        forks = {other.fork for other in runs if other.group == run.group and 0 < other.fork <= run.fork}
        run.settings.save_at = ",".join(map(str, sorted(forks)))


def record_problems(cfg, run):
    """A line if the run was begun with other settings."""
    record = newest_record(run.folder)
    if record is None:
        return []
    has_length = not cfg.share or run.saved_step > run.fork  # before its decay a run may still become longer
    ignored = () if has_length else ("steps", "decay")
    changes = runner.changed_settings(record["settings"], run.settings, ignored)
    if not changes:
        return []
    return [f"{run.folder} was made with other settings ({', '.join(changes)}); "
            "remove it or choose another --out"]


def write_config(run, cfg):
    """Write <out>/configs/<name>.py: all that differs from train.py's defaults; it needs no other file."""
    path = Path(cfg.out) / "configs" / f"{run.name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    comment = f"{run.params:,} parameters, {run.flops:.4g} FLOPs; made by scaling.py sweep from {cfg.base}"
    text = configurator.override_text(configurator.changed(run.settings), [comment])
    path.write_text(text, encoding="utf-8")
    return path


# -------------------------------------------------------------------------------------------- shared prefixes


def trunk_of(run, runs):
    """The longest run of its group, off which the others branch."""
    return max((other for other in runs if other.group == run.group), key=lambda other: other.steps)


def branch_point(run, runs):
    """(step, folder) of the newest checkpoint of another run that lies on this one's way, or (0, None).

    Both have a constant learning rate there.
    """
    points = []
    for other in runs:
        if other.group == run.group and other is not run:
            saved = [(step_of(folder), folder) for folder in checkpoints(other.folder)]
            points += [point for point in saved if point[0] <= min(run.fork, other.fork)]
    return max(points, default=(0, None))


def branch_off(run, step, folder):
    """Let `run` begin with the checkpoint `folder` of another run and with its metrics up to there."""
    building = run.folder / f".branch_{step}"  # it gets its name when it is complete
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shutil.copyfile(folder.parent / "metrics.jsonl", run.folder / "metrics.jsonl")
    trim_metrics(run.folder / "metrics.jsonl", step, events=False)
    shutil.copytree(folder, building, copy_function=link_or_copy, dirs_exist_ok=True)
    building.rename(run.folder / folder.name)


def link_or_copy(file, name):
    try:
        os.link(file, name)  # nothing ever writes into a finished checkpoint
    except OSError:  # a file system without hard links
        shutil.copyfile(file, name)


def remaining_flops(runs, cfg):
    """The FLOPs still to do; shared prefixes count once."""
    flops = 0.0
    for run in runs:
        if run.is_finished:
            continue
        begin = run.saved_step
        if cfg.share:
            trunk = trunk_of(run, runs)
            awaited = run.fork if run is not trunk and not trunk.is_finished else 0  # a checkpoint to come
            begin = max(begin, branch_point(run, runs)[0], awaited)
        flops += run.flops * (1 - begin / run.steps)
    return flops


# ---------------------------------------------------------------------------------------------------- running


def train_all(runs, cfg):
    """Train what is not finished, `jobs` at a time. Returns {name: problem}.

    If a signal comes, it exits with 128 + the first one.
    """
    waiting, failed = [run for run in runs if not run.is_finished], {}
    n_finished = len(runs) - len(waiting)
    total, began = remaining_flops(runs, cfg), time.monotonic()

    with runner.Runner(cfg.jobs) as training:
        while training.children or waiting and not training.signum:
            # what has ended
            for child in training.ended():
                run = child.key
                if run.is_finished and not child.returncode:
                    n_finished += 1
                    share = max(1 - remaining_flops(runs, cfg) / total, 1e-6)
                    minutes = (time.monotonic() - began) * (1 / share - 1) / 60
                    print(f"{run.name}: {n_finished} of {len(runs)}, {last_validation(run)}; "
                          f"{share:.1%} of the FLOPs, about {minutes:.0f} min left", flush=True)
                elif not training.signum:
                    failed[run.name] = f"exit code {child.returncode}, see {log_of(run, cfg)}"
                    print(f"{run.name}: failed, {failed[run.name]}", flush=True)

            # what cannot begin
            for run in waiting[:]:
                trunk = trunk_of(run, runs)
                if trunk.name in failed and not is_ready(run, runs, cfg):
                    waiting.remove(run)
                    failed[run.name] = f"needs {trunk.name}"

            # what begins
            while (slot := training.free_slot()) is not None:
                ready = [run for run in waiting if is_ready(run, runs, cfg)]
                if not ready:
                    break
                run = min(ready, key=lambda run: run is trunk_of(run, runs))  # branches first: they are short
                waiting.remove(run)
                try:
                    start(run, runs, cfg, training, slot)
                except BlockingIOError:
                    failed[run.name] = "another process is training it"
            time.sleep(0.1)

    if training.signum:
        print(f"stopped by a signal; {n_finished} of {len(runs)} runs are finished, the same command goes on",
              flush=True)
        raise SystemExit(128 + training.signum)
    return failed


def is_ready(run, runs, cfg):
    """True unless a branch still needs the trunk's checkpoint.

    If that is gone and the trunk finished, the branch goes all the way itself.
    """
    if not cfg.share or run.saved_step:
        return True
    trunk = trunk_of(run, runs)
    return trunk is run or trunk.is_finished or branch_point(run, runs)[0] == run.fork


def start(run, runs, cfg, training, slot):
    """Train `run` in a process of its own; raises BlockingIOError if another one is at it."""
    step, folder = branch_point(run, runs) if cfg.share else (0, None)
    if step > run.saved_step:
        branch_off(run, step, folder)
    command = runner.train_command([write_config(run, cfg)])
    training.start(run, command, slot, log_of(run, cfg), runner.environment_of(slot, cfg.jobs))


def last_validation(run):
    last = [m for m in read_metrics(run.folder) if "val_loss" in m][-1]
    return f"loss {last['val_loss']:.4f} ({last['val_bpb']:.4f} bits/byte)"


def log_of(run, cfg):
    return Path(cfg.out) / "logs" / f"{run.name}.log"


# ------------------------------------------------------------------------------------------------------- main


def print_runs(runs, cfg, predicted=()):
    """Print the table of runs, with what is predicted of them {name: row}, and how much they take."""
    width = max(len(run.name) for run in runs)
    print(f"{'run':<{width}}  {'parameters':>13} {'steps':>9} {'tokens':>15} {'FLOPs':>9} {'epochs':>8} "
          f"{'lr':>8}")
    for run in runs:
        state = f"  at step {run.saved_step:,}" if run.saved_step else ""
        if run.is_finished:
            state = "  finished"
        if run.name in predicted:
            state += f"  predicted {predictions.describe(predicted[run.name])}"
        print(f"{run.name:<{width}}  {run.params:>13,} {run.steps:>9,} {run.tokens:>15,} {run.flops:>9.3g} "
              f"{run.epochs:>8.3g} {run.settings.lr:>8.2g}{state}")

    objective = runs[0].settings.objective
    sizes = len({run.params for run in runs if run.settings.objective == objective})
    budgets = len(split(cfg.flops))
    if cfg.flops and (sizes < 3 or budgets < 2):
        print(f"note: {sizes} sizes at {budgets} budgets carry no law; "
              "an IsoFLOP fit takes three sizes and two budgets at least, intervals four sizes")

    left = remaining_flops(runs, cfg)
    alone = sum(run.flops for run in runs if not run.is_finished)
    saving = f" instead of {alone:.4g}: sharing saves {1 - left / alone:.0%}" if cfg.share and alone else ""
    hours = left / cfg.flops_per_s / cfg.jobs / 3600
    print(f"{len(runs)} runs, {left:.4g} FLOPs to do{saving}; "
          f"about {hours:.2g} h at {cfg.jobs} × {cfg.flops_per_s:.3g} FLOPs/s")


def launch(runs, cfg):
    """Print a command for each run that is not finished, or write them as a SLURM job array.

    The same again resumes what was cut off.
    """
    launcher = ["torchrun", f"--nproc_per_node={cfg.processes}", str(runner.TRAIN)]
    commands = [shlex.join([*launcher, str(write_config(run, cfg))]) for run in runs if not run.is_finished]
    if cfg.launch == "torchrun" or not commands:
        print("\n".join(commands) or "every run is finished")
        return
    path = Path(cfg.out) / "sweep.sbatch"
    lines = [
        "#!/bin/bash",
        f"#SBATCH --array=0-{len(commands) - 1}%{cfg.jobs}",
        f"#SBATCH --gpus-per-node={cfg.processes}",
        f"#SBATCH --output={cfg.out}/%a.log",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        "commands=(",
        *(f"  {shlex.quote(command)}" for command in commands),
        ")",
        'eval "exec ${commands[$SLURM_ARRAY_TASK_ID]}"',
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(commands)} runs: sbatch {path}")


def predict_grid(cfg, runs):
    """{run's name: its row} of predictions: those that OUT has, and new ones of runs that have not begun."""
    try:
        predicted = predictions.read_predictions(cfg.out)
        for objective in split(cfg.objectives) if cfg.known else ():
            planned = [(run.name, objective, run.params, run.tokens) for run in runs
                       if run.settings.objective == objective and not run.saved_step
                       and run.name not in predicted and run.epochs <= 1.01]
            if planned:
                known = predictions.known_runs(cfg.known, objective)
                predicted |= {row["name"]: row for row in predictions.predict_runs(known, planned)}
    except (ValueError, OSError) as problem:
        configurator.fail(f"known={cfg.known}: {problem}")
    return predicted


def run_sweep(cfg):
    """Train the grid and return the path of its points.csv.

    Exits with code 1 if a run failed, after writing the others' points.
    """
    runs, points = layout(cfg), Path(cfg.out) / "points.csv"
    predicted = predict_grid(cfg, runs)
    if predicted:
        predictions.write_predictions(cfg.out, predicted)  # before anything is trained
    print_runs(runs, cfg, predicted)
    failed = train_all(runs, cfg)

    rows = read_points(cfg.out)
    predicted = predictions.compare_seen(predicted, rows)
    with all_or_none(points.parent) as building:
        write_csv(rows, building / points.name, POINT_COLUMNS)
        if predicted:
            write_csv(predicted.values(), building / predictions.FILE, predictions.COLUMNS)
        if curves := read_curves(cfg.out):
            write_csv(curves, building / "curves.csv", CURVE_COLUMNS)
    print(f"{sum(run.is_finished for run in runs)} of {len(runs)} runs are finished: {points}")
    for row in predicted.values():
        if "seen" in row:
            print(f"  {row['name']}: predicted {predictions.describe(row)}")
    if line := predictions.summary(predicted):
        print(line)
    if failed:
        lines = [f"{name}: {problem}" for name, problem in failed.items()]
        print("failed:", *lines, sep="\n  ", file=sys.stderr)
        raise SystemExit(1)
    return points


def main(argv=None):
    """Return the path of points.csv, or None where nothing was to be trained here."""
    cfg = configurator.load(Config, argv, about=__doc__)
    if cfg.dry_run:
        runs = layout(cfg)
        print_runs(runs, cfg, predict_grid(cfg, runs))
    elif cfg.launch != "run":
        launch(layout(cfg), cfg)
    else:
        terminal.keep_going()
        return run_sweep(cfg)


if __name__ == "__main__":
    main()
