"""Tiny runs of train.py as users start them, what they leave behind, and comparisons of two."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from training.checkpoint import checkpoints, load_newest
from training.log import read_metrics

TINY = [
    "--n_layer=2", "--n_head=2", "--d_model=32", "--seq_len=32", "--batch_size=8", "--warmup=5",
    "--log_every=5", "--eval_every=0", "--eval_rows=16", "--save_every=0",
    "--dtype=float32", "--device=cpu", "--compile=no",
]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

# --------------------------------------------------------------------------------------------- real processes


def environment(**variables):
    """The environment of a process that a test starts."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def start(*flags, ranks=1, restarts=0, nodes=(), log=subprocess.DEVNULL):
    """Start train.py with the tiny settings, in a process group of its own; several ranks by torchrun.

    nodes: arguments of torchrun that say how it meets others.
    """
    launcher, variables = [sys.executable], {}
    if ranks > 1 or nodes:
        where = nodes or ["--standalone"]
        launcher = [*TORCHRUN, *where, f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
    if nodes:
        variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return subprocess.Popen(
        [*launcher, "train.py", *TINY, *map(str, flags)], cwd=ROOT, env=environment(**variables), stdout=log,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)


def until(condition, seconds=120):
    """Wait until `condition()` is true; returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return value


def workers(launcher):
    """The processes that a torchrun of this id has started, in order of rank."""
    ranks = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{launcher}\n" not in path.read_text(encoding="utf-8"):
                continue
            variables = (path.parent / "environ").read_text(encoding="utf-8").split("\0")
            values = dict(pair.split("=", 1) for pair in variables if "=" in pair)
            ranks[int(values["RANK"])] = int(path.parent.name)
        except (OSError, KeyError):  # it has gone, or is no rank
            pass
    return [ranks[rank] for rank in sorted(ranks)]


def stopped(call, signum, patch, owner, name, number=1):
    """`call()` when a signal comes with a function's call of this number → its exit code."""
    function, calls = getattr(owner, name), itertools.count(1)

    def with_signal(*arguments):
        if next(calls) == number:
            signal.raise_signal(signum)
        return function(*arguments)

    with patch.context() as inside, pytest.raises(SystemExit) as stop:
        inside.setattr(owner, name, with_signal)
        call()
    return stop.value.code


class Group:
    """Ranks that do one job after the other (tests/processes/train_jobs.py), as long as they are needed."""

    def __init__(self, folder, world):
        self.folder, self.number = folder, 0
        program = ROOT / "tests/processes/train_jobs.py"
        command = [sys.executable, str(program), str(folder), str(world)]
        with open(folder / "log", "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT)

    def do(self, **job):
        """Do a job → what rank 0 printed, warnings and all."""
        path = self.folder / f"{self.number}.json"
        self.number += 1
        path.with_suffix(".new").write_text(json.dumps(job), encoding="utf-8")
        path.with_suffix(".new").rename(path)
        done = path.with_suffix(".done")
        until(lambda: done.exists() or self.process.poll() is not None, 300)
        output = path.with_suffix(".out").read_text(encoding="utf-8")
        assert done.exists(), (job, output[-5000:], (self.folder / "log").read_text(encoding="utf-8")[-5000:])
        return output

    def stop(self):
        """End the ranks."""
        (self.folder / "stop").touch()
        self.process.wait(timeout=60)


# ----------------------------------------------------------------------------------- what a run leaves behind


def figures(run, after=-1):
    """The lines of metrics.jsonl after a step, without events and without what depends on the clock."""
    lines = [m for m in read_metrics(run) if "event" not in m and m["step"] > after]
    return [{name: value for name, value in m.items() if name != "tokens_per_s"} for m in lines]


def events(run):
    """The lines of metrics.jsonl that say what the run decided by itself."""
    return [m for m in read_metrics(run) if "event" in m]


def event_names(run):
    """The names of a run's events, in order."""
    return [m["event"] for m in events(run)]


def last_step(run):
    """The last step that metrics.jsonl mentions (0: none)."""
    return max((m["step"] for m in read_metrics(run)), default=0)


def newest_step(run):
    """The step of the newest checkpoint, which must be whole (0: there is none yet)."""
    if not checkpoints(run):
        return 0
    _, record = load_newest(run, pytest.fail)  # a damaged one would be a failure
    return record["step"]


def steps_saved(run):
    """The steps of a run's checkpoints, newest first."""
    return [int(folder.name[5:]) for folder in checkpoints(run)]


def weights(run):
    """{name: tensor} of the newest checkpoint."""
    return load_file(checkpoints(run)[0] / "model.safetensors")


# ------------------------------------------------------------------------------------------------ comparisons


def equal_tensors(one, other):
    """Whether two {name: tensor} are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def equal_runs(one, other):
    """Whether two runs logged the same figures and ended with the same weights, bit for bit."""
    return figures(one) == figures(other) and equal_tensors(weights(one), weights(other))


def assert_close_figures(one, other, rel):
    """Assert that two runs logged the same lines, with figures equal to a relative tolerance."""
    for a, b in zip(figures(one), figures(other), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            expected = value if isinstance(value, str) else pytest.approx(value, rel=rel)
            assert b[name] == expected, (a["step"], name)


def largest_difference(one, other, after=0, names=("loss", "val_loss")):
    """The largest relative difference between the figures of two runs."""
    a, b = ([m[name] for m in figures(run, after) for name in names if name in m] for run in (one, other))
    assert len(a) == len(b) > 6
    return max(abs(x / y - 1) for x, y in zip(a, b))
