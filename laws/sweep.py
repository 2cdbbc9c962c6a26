"""Many runs for a scaling law: lay out a grid, train it, collect its points.

    python sweep.py --base=configurator/sweep_cpu.py --models=2x64,2x96,2x128 --flops=1e12,2e12 --dry_run     # what would run
    python sweep.py --base=configurator/sweep_cpu.py --models=2x64,2x96,2x128 --flops=1e12,2e12               # runs it; the same goes on
    python sweep.py --base=my.py --models=106M,173M --unique_tokens=1e8,3e8 --epochs=1,4,16,64 --out=runs/epochs
    python sweep.py --base=my.py --models=65M,106M,173M,276M --flops=3e18,1e19 --share=False --launch=slurm       # writes a job array (torchrun: prints commands)

An IsoFLOP grid is models × flops, a data-constrained one models × unique_tokens × epochs, each for every objective and
seed. A run is an override file <out>/configs/<name>.py, a folder <out>/runs/<name>, and a log.

With `share`, the longest run of each (objective, model, unique tokens, seed) gives all shorter ones: its learning rate
is constant until its own decay, and data order and noise are functions of (seed, sample), so a shorter run is what the
longest was where the shorter one's decay begins, and that decay: exactly, on a CPU with compile=no. Longer budgets may
be added to a finished grid: name the old ones, too, and they go on from where the longest began to decay.
"""

import contextlib
import csv
import fcntl
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import configurator
import train
from configurator import setting, split
from configurator.ladder import ladder
from corpus import tokenfiles
from laws.laws import smooth
from model import ModelConfig, Transformer
from training.checkpoint import checkpoints
from training.log import read_metrics, trim_metrics

TRAIN = Path(train.__file__).resolve()
NEUTRAL = configurator.neutral_settings(train.Config)  # a run that was begun may differ in these from what the grid asks now
POINT = ("name objective n_layer d_model params tokens flops unique_tokens epochs seed val_loss val_bpb train_loss batch lr").split()
CURVE = ("unique_tokens params objective epochs val_loss").split()


@dataclass
class Config:
    base: str = setting("configurator/quickstart.py", "override files that every run starts from, with commas between")
    out: str = setting("runs/sweep", "folder of the sweep")
    # the grid: lists with commas
    models: str = setting("1x64,2x64,2x128", "sizes, three or more for a fit: names of the ladder such as 106M, or LAYERSxWIDTH with heads as wide as the base's")
    objectives: str = setting("masked,ar", "of masked, ar and uniform")
    flops: str = setting("", "IsoFLOP grid: budgets 6·N·D")
    unique_tokens: str = setting("", "data-constrained grid: unique tokens (with epochs)")
    epochs: str = setting("", "passes over them")
    seeds: str = setting("1337", "of weights, data order and noise")
    lr_power: float = setting(0.0, "learning rate at width d: the base's lr · (128/d)^lr_power", low=-2, high=2)
    decay: float = setting(0.2, "share of the steps in which the learning rate decays (wsd); 0: the base's own lr_schedule", low=0, high=0.99)
    share: bool = setting(True, "shorter runs branch off the longest where their decay begins")
    evals: int = setting(0, "validations along the longest run of each size (0: the base's eval_every)", low=0)
    # how they run
    launch: Literal["run", "torchrun", "slurm"] = setting("run", "run: here; torchrun: print a command per run; slurm: write a job array")
    processes: int = setting(1, "of torchrun and slurm: processes per run", low=1)
    jobs: int = setting(1, "runs side by side (also of a SLURM array)", low=1)
    dry_run: bool = setting(False, "print the table of runs, and stop")
    flops_per_s: float = setting(5e10, "of one run (6·N tokens), for the estimate of hours: a small model on a CPU core reaches 5e10, a large one on an H100 4e14", above=0)

    def problems(self):
        """Settings that do not go together, one line each."""
        wrong = [f"{name} is empty" for name in ("base", "models", "objectives", "seeds") if not split(getattr(self, name))]
        for name, kind in dict(flops=float, unique_tokens=float, epochs=float, seeds=int).items():
            try:
                given = numbers(getattr(self, name), kind)
                if not all(x > 0 or kind is int for x in given) or len(set(given)) < len(given):
                    raise ValueError
            except (ValueError, OverflowError):
                wrong.append(f"{name}={getattr(self, name)}: write {'whole' if kind is int else 'positive'} numbers, each once, with commas between")
        wrong += [f"{name}={given}: each once" for name in ("models", "objectives") if len(set(parts := split(given := getattr(self, name)))) < len(parts)]
        if bool(self.flops) == bool(self.unique_tokens) or bool(self.unique_tokens) != bool(self.epochs):
            wrong.append("which grid? give either flops, or unique_tokens and epochs")
        wrong += [f"objectives: '{o}' is none of masked, ar, uniform" for o in split(self.objectives) if o not in ("masked", "ar", "uniform")]
        if self.share and not self.decay:
            wrong.append("share=True needs decay: runs branch off where it begins")
        if self.share and self.launch != "run":
            wrong.append(f"launch={self.launch} needs share=False: its runs know nothing of each other")
        return wrong


def numbers(text, kind=float):
    """'1e8,250M' as numbers; raises ValueError."""
    return [configurator.convert(part, kind) for part in split(text)]


class Run(NamedTuple):
    name: str
    group: tuple  # the same for runs that differ in their length alone
    settings: train.Config
    params: int
    tokens: int
    epochs: float

    steps = property(lambda self: self.settings.steps)
    fork = property(lambda self: self.steps - int(self.settings.decay))  # with `share`: the step after which its learning rate decays
    folder = property(lambda self: Path(self.settings.run_dir))
    flops = property(lambda self: 6 * self.params * self.tokens)
    done = property(lambda self: max((int(p.name[5:]) for p in checkpoints(self.folder)), default=0))  # steps
    finished = property(lambda self: (self.folder / f"step_{self.steps:08d}").is_dir())


# ----------------------------------------------------------------------------------------------------- layout


def layout(cfg):
    """Every run of the grid; exits with one line per problem."""
    base, runs, wrong = configurator.load(train.Config, [*split(cfg.base), "--steps=1", "--tokens=0", "--epochs=0"]), [], []
    if cfg.share and base.time == "moving_gaussian":
        wrong.append("time=moving_gaussian goes by the share of all steps: no run is the beginning of a longer one; use --share=False")
    try:
        corpora = [tokenfiles.load_corpus(path, base.tokenizer, base.val_share) for path, *_ in tokenfiles.parse_corpora(base.corpus)]
    except (ValueError, OSError) as problem:
        configurator.fail(*wrong, problem)
    meta, available, per_step = corpora[0].meta, sum(len(corpus.train) for corpus in corpora), base.batch_size * base.seq_len
    for model in split(cfg.models):
        try:
            size = shape_of(model, base)
        except ValueError as problem:
            wrong.append(f"models={cfg.models}: {problem}")
            continue
        for objective in split(cfg.objectives):
            settings = asdict(base) | size | dict(objective=objective, resume="auto")
            if objective == "ar":  # it has no noise and no choice of loss: back to the defaults
                settings |= dict(schedule="linear", time="uniform", time_sigma=0.2, time_correction=False, loss="elbo", estimator="count")
            shape = train.Config(**settings).shape()
            params = count_params(ModelConfig(**shape, n_vocab=meta["n_vocab"], mask_id=meta["mask_id"], seq_len=base.seq_len,
                                              causal=objective == "ar", tied=base.tied, timed=objective == "uniform"))
            settings["lr"] = float(f"{base.lr * (128 / shape['d_model']) ** cfg.lr_power:.4g}")
            lengths = [(f"{budget:g}", budget / (6 * params), 0) for budget in numbers(cfg.flops)]
            lengths += [(f"{unique}u_{epochs:g}e", epochs * unique, unique) for unique in map(int, numbers(cfg.unique_tokens)) for epochs in numbers(cfg.epochs)]
            for seed in numbers(cfg.seeds, int):
                for length, tokens, unique in lengths:
                    name, steps = f"{objective}_{model}_{length}_s{seed}".replace("+", ""), max(1, round(tokens / per_step))
                    decay = max(1, round(cfg.decay * steps)) if cfg.decay else 0
                    if settings["warmup"] + decay > steps:
                        wrong.append(f"{name}: {steps} steps are too few for warmup={settings['warmup']} and {decay} steps of decay; add a file with a smaller warmup to --base")
                    if unique > available:
                        wrong.append(f"{name}: the corpus has only {available:,} training tokens")
                    this = dict(settings, run_dir=str(Path(cfg.out) / "runs" / name), seed=seed, steps=steps, unique_tokens=unique)
                    this |= dict(lr_schedule="wsd", decay=float(decay)) if decay else {}
                    runs.append(Run(name, (objective, model, unique, seed), train.Config(**this), params, steps * per_step, steps * per_step / (unique or available)))
    for run in [] if wrong else runs:
        if cfg.evals:
            run.settings.eval_every = max(1, longest(run, runs).steps // cfg.evals)
        if cfg.share:  # at its own fork, too: a longer run may go on there, should the grid grow
            run.settings.save_at = ",".join(map(str, sorted({r.fork for r in runs if r.group == run.group and 0 < r.fork <= run.fork})))
        wrong += [f"{run.name}: {problem}" for problem in run.settings.problems()]
        for folder in checkpoints(run.folder)[:1]:
            made = json.loads((folder / "checkpoint.json").read_text())["settings"]
            if differ := [f"{k} {made[k]!r} → {v!r}" for k, v in asdict(run.settings).items() if made.get(k, v) != v and k not in NEUTRAL
                          and not (cfg.share and k in ("steps", "decay") and run.done <= run.fork)]:
                wrong.append(f"{run.folder} was made with other settings ({', '.join(differ)}); remove it or choose another --out")
    if wrong:
        configurator.fail(*wrong)
    return runs


def shape_of(model, base):
    """The shape settings of '106M' (the ladder) or '3x64' (layers × width); raises ValueError."""
    free = {k: getattr(train.Config(), k) for k in ("model", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff")}
    layers, x, width = model.partition("x")
    if not x:
        return dict(free, model=model) if ladder(model) else free
    if not (layers.isdecimal() and width.isdecimal() and int(layers) and int(width)):
        raise ValueError(f"'{model}' is neither a name of the ladder nor LAYERSxWIDTH")
    head_dim = base.shape()["head_dim"]
    if int(width) % head_dim:
        raise ValueError(f"the width of {model} is no multiple of the base's heads of {head_dim}")
    return dict(free, n_layer=int(layers), d_model=int(width), n_head=int(width) // head_dim)


@functools.cache
def count_params(config):
    """All parameters. With a tied embedding that is the paper's N, norms included (which it leaves out: less than 1 %)."""
    with torch.device("meta"):
        return Transformer(config).n_params()


def write_config(run, cfg):
    """<out>/configs/<name>.py: all that differs from train.py's defaults, so that it needs no other file."""
    path = Path(cfg.out) / "configs" / f"{run.name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{f.name} = {getattr(run.settings, f.name)!r}" for f in fields(run.settings) if getattr(run.settings, f.name) != f.default]
    path.write_text("\n".join([f"# {run.params:,} parameters, {run.flops:.4g} FLOPs; made by sweep.py from {cfg.base}", *lines]) + "\n")
    return path


# ------------------------------------------------------------------------------------------------ shared prefixes


def longest(run, runs):
    return max((other for other in runs if other.group == run.group), key=lambda other: other.steps)


def source(run, runs):
    """(step, folder) of the newest checkpoint of another run that lies on this one's way: both have a constant learning rate there."""
    found = [(int(p.name[5:]), p, min(run.fork, other.fork)) for other in runs if other.group == run.group and other is not run for p in checkpoints(other.folder)]
    return max(((step, p) for step, p, limit in found if step <= limit), default=(0, None))


def branch(run, step, folder):
    """Let `run` begin with the checkpoint `folder` of another run, and with that one's metrics up to there."""
    building = run.folder / f".branch_{step}"  # it gets its name when it is complete
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    shutil.copyfile(folder.parent / "metrics.jsonl", run.folder / "metrics.jsonl")
    trim_metrics(run.folder / "metrics.jsonl", step, events=False)

    def link(file, name):
        try:
            os.link(file, name)  # nothing ever writes into a finished checkpoint
        except OSError:  # a file system without hard links
            shutil.copyfile(file, name)

    shutil.copytree(folder, building, copy_function=link, dirs_exist_ok=True)
    building.rename(run.folder / folder.name)


def remaining(runs, cfg):
    """The FLOPs still to do; shared prefixes count once."""
    def begin(run):
        trunk = longest(run, runs)
        coming = run is not trunk and not trunk.finished  # the checkpoint that this one will branch off
        return max(run.done, source(run, runs)[0], run.fork * coming) if cfg.share else run.done

    return sum(run.flops * (1 - begin(run) / run.steps) for run in runs if not run.finished)


# ------------------------------------------------------------------------------------------------------- running


class Child(NamedTuple):
    run: Run
    process: subprocess.Popen
    first_step: int
    slot: int


def start(run, cfg, slot):
    """Train `run` in a process of its own; raises BlockingIOError if another one is at it."""
    log = Path(cfg.out) / "logs" / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // cfg.jobs))}
    if torch.cuda.device_count() > 1:
        env["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
    with open(log, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it lasts as long as the child, even if this process does not
        command = [sys.executable, str(TRAIN), str(write_config(run, cfg))]
        # in a session of its own: Ctrl-C reaches this process alone, which tells its children once
        return Child(run, subprocess.Popen(command, stdout=file, stderr=file, env={**env, **os.environ}, start_new_session=True), run.done, slot)


def train_all(runs, cfg):
    """Train what is not finished, `jobs` at a time. Returns {name: what went wrong}; exits if a signal says so."""
    waiting, running, failed, stopping = [run for run in runs if not run.finished], [], {}, []
    total, done, began, count = remaining(runs, cfg), 0.0, time.monotonic(), len(runs) - len(waiting)
    trunk = {run.group: longest(run, runs) for run in runs}

    def stop(signum, _):
        stopping.append(signum)
        for child in running:
            child.process.terminate()  # train.py saves and exits; a second signal ends it at once

    def ready(run):  # a branch needs the trunk's checkpoint; if that is gone and the trunk finished, it goes all the way itself
        return not cfg.share or trunk[run.group] in (run, *(r for r in runs if r.finished)) or run.done or source(run, runs)[0] == run.fork

    def finish(child):
        nonlocal done, count
        run = child.run
        if run.finished and not child.process.returncode:
            count += 1
            done += run.flops * (1 - child.first_step / run.steps)
            last = [m for m in read_metrics(run.folder) if "val_loss" in m][-1]
            minutes = (time.monotonic() - began) * (total / done - 1) / 60
            print(f"{run.name}: {count} of {len(runs)}, loss {last['val_loss']:.4f} ({last['val_bpb']:.4f} bits/byte); "
                  f"{done / total:.1%} of the FLOPs, about {minutes:.0f} min left", flush=True)
        elif not stopping:
            failed[run.name] = f"exit code {child.process.returncode}, see {Path(cfg.out) / 'logs' / run.name}.log"
            print(f"{run.name}: failed, {failed[run.name]}", flush=True)

    before = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    while running or waiting and not stopping:
        for child in [child for child in running if child.process.poll() is not None]:
            running.remove(child)
            finish(child)
        for run in [run for run in waiting if trunk[run.group].name in failed and not ready(run)]:
            waiting.remove(run)
            failed[run.name] = f"needs {trunk[run.group].name}"
        while not stopping and len(running) < cfg.jobs and (able := [run for run in waiting if ready(run)]):
            run = min(able, key=lambda r: r is trunk[r.group])  # branches first: they are short
            waiting.remove(run)
            step, folder = source(run, runs) if cfg.share else (0, None)
            if step > run.done:
                branch(run, step, folder)
            try:
                running.append(start(run, cfg, min(set(range(cfg.jobs)) - {child.slot for child in running})))
                if stopping:  # the handler could not know this one yet
                    running[-1].process.terminate()
            except BlockingIOError:
                failed[run.name] = "another process is training it"
        time.sleep(0.1)
    for signum, handler in before.items():
        signal.signal(signum, handler)
    if stopping:
        print(f"stopped by a signal; {count} of {len(runs)} runs are finished, the same command goes on", flush=True)
        raise SystemExit(128 + stopping[0])
    return failed


# ------------------------------------------------------------------------------------------------- what comes out


def records(folder):
    """(name, newest checkpoint's record, metrics) of every run under `folder`, finished or not."""
    for path in sorted(Path(folder).rglob("settings.json")):
        for newest in checkpoints(path.parent)[:1]:
            yield path.parent.name, json.loads((newest / "checkpoint.json").read_text()), read_metrics(path.parent)


def read_runs(folder):
    """One row (a dict with POINT's columns) per finished run under `folder`: a sweep's, or any of train.py."""
    rows = []
    for name, record, metrics in records(folder):
        if record["step"] < record["steps"]:
            continue
        s, config = record["settings"], ModelConfig(**record["model"])
        tokens, params, unique = record["samples"] * s["seq_len"], count_params(config), s["unique_tokens"]
        whole = unique or corpus_size(s["corpus"], s["tokenizer"], s["val_share"])
        losses = smooth(np.array([m["loss"] for m in metrics if "loss" in m]))  # the training loss is the end of this
        last = [m for m in metrics if "val_loss" in m][-1]
        rows.append(dict(
            name=name, objective=s["objective"], n_layer=config.n_layer, d_model=config.d_model, params=params, tokens=tokens,
            flops=6 * params * tokens, unique_tokens=unique or (whole if tokens > whole else 0), epochs=tokens / whole if whole else "",
            seed=s["seed"], val_loss=last["val_loss"], val_bpb=last["val_bpb"], train_loss=float(losses[-1]) if len(losses) else "",
            batch=s["batch_size"] * s["seq_len"], lr=s["lr"]))
    return sorted(rows, key=lambda row: [row[k] for k in ("objective", "unique_tokens", "params", "tokens", "seed")])


@functools.cache
def corpus_size(corpus, tokenizer, val_share):
    """Training tokens of a corpus; 0 if it is no longer there."""
    with contextlib.suppress(ValueError, OSError):
        return sum(len(tokenfiles.load_corpus(path, tokenizer, val_share).train) for path, *_ in tokenfiles.parse_corpora(corpus))
    return 0


def read_curves(folder):
    """Validation along the longest run of each (unique tokens, size, objective), as in the paper's Figure 4, the mean over seeds; as long
    as the learning rate has not begun to decay (wsd), for what comes then belongs to that run's length alone."""
    best, curves = {}, defaultdict(list)
    for _, record, metrics in records(folder):
        s = record["settings"]
        key = s["unique_tokens"], count_params(ModelConfig(**record["model"])), s["objective"]
        if s["unique_tokens"] and record["step"] > best.get((key, s["seed"]), [{"step": 0}])[0]["step"]:
            best[key, s["seed"]] = record, metrics
    for (key, _), (record, metrics) in sorted(best.items()):
        s, steps = record["settings"], record["steps"]
        decay = 0 if s["lr_schedule"] != "wsd" else s["decay"] if s["decay"] >= 1 else s["decay"] * steps
        for m in metrics:
            if "val_loss" in m and 0 < m["step"] <= steps - decay:
                curves[(*key, m["tokens"] / key[0])].append(m["val_loss"])
    return [dict(zip(CURVE, (*key, sum(losses) / len(losses)))) for key, losses in curves.items()]


def write_points(rows, path, columns=POINT):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


# ------------------------------------------------------------------------------------------------------------ main


def show(runs, cfg):
    """The table of runs, and how much they take."""
    wide = max(len(run.name) for run in runs)
    print(f"{'run':<{wide}}  {'parameters':>13} {'steps':>9} {'tokens':>15} {'FLOPs':>9} {'epochs':>8} {'lr':>8}")
    for run in runs:
        print(f"{run.name:<{wide}}  {run.params:>13,} {run.steps:>9,} {run.tokens:>15,} {run.flops:>9.3g} {run.epochs:>8.3g} {run.settings.lr:>8.2g}"
              + ("  finished" if run.finished else f"  at step {run.done:,}" if run.done else ""))
    sizes, budgets = len({run.params for run in runs if run.group[0] == runs[0].group[0]}), len(split(cfg.flops))
    if cfg.flops and (sizes < 3 or budgets < 2):
        print(f"note: {sizes} sizes at {budgets} budgets carry no law; an IsoFLOP fit takes three sizes and two budgets at least, intervals four sizes")
    alone, left = sum(run.flops for run in runs if not run.finished), remaining(runs, cfg)
    print(f"{len(runs)} runs, {left:.4g} FLOPs to do" + (f" instead of {alone:.4g}: sharing saves {1 - left / alone:.0%}" if cfg.share and alone else "")
          + f"; about {left / cfg.flops_per_s / cfg.jobs / 3600:.2g} h at {cfg.jobs} × {cfg.flops_per_s:.3g} FLOPs/s")


def launch(runs, cfg):
    """Print a command for each run that is not finished, or write them as a SLURM job array; the same again resumes what was cut off."""
    commands = [shlex.join(["torchrun", f"--nproc_per_node={cfg.processes}", str(TRAIN), str(write_config(run, cfg))]) for run in runs if not run.finished]
    if cfg.launch == "torchrun" or not commands:
        return print("\n".join(commands) or "every run is finished")
    path = Path(cfg.out) / "sweep.sbatch"
    path.write_text("\n".join([
        "#!/bin/bash", f"#SBATCH --array=0-{len(commands) - 1}%{cfg.jobs}", f"#SBATCH --gpus-per-node={cfg.processes}", f"#SBATCH --output={cfg.out}/%a.log",
        f"cd {shlex.quote(os.getcwd())} || exit 1", "commands=(", *(f"  {shlex.quote(c)}" for c in commands), ")",
        'eval "exec ${commands[$SLURM_ARRAY_TASK_ID]}"']) + "\n")
    print(f"{len(commands)} runs: sbatch {path}")


def run(cfg):
    """Train the grid and return the path of its points.csv; exits with code 1 if a run failed, after writing the others' points."""
    runs, points = layout(cfg), Path(cfg.out) / "points.csv"
    show(runs, cfg)
    failed = train_all(runs, cfg)
    write_points(read_runs(cfg.out), points)
    if curves := read_curves(cfg.out):
        write_points(curves, points.with_name("curves.csv"), CURVE)
    print(f"{sum(run.finished for run in runs)} of {len(runs)} runs are finished: {points}")
    if failed:
        print("failed:", *(f"{name}: {why}" for name, why in failed.items()), sep="\n  ", file=sys.stderr)
        raise SystemExit(1)
    return points


def main(argv=None):
    """Returns the path of points.csv, or None where nothing was to be trained here."""
    cfg = configurator.load(Config, argv, about=__doc__)
    if cfg.dry_run:
        return show(layout(cfg), cfg)
    if cfg.launch != "run":
        return launch(layout(cfg), cfg)
    return run(cfg)


if __name__ == "__main__":
    main()
