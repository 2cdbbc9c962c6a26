"""Start train.py as processes of their own, one or several at a time, and pass signals on to them.

    with Runner(jobs=2) as runner:
        runner.start("a", train_command(["a.py"]), log=Path("a.log"))
        for child in runner.wait():
            …child.key, child.returncode

Signals to stop (SIGINT, SIGTERM, SIGHUP) are passed on: train.py saves its state at the first one and ends,
so that the same command resumes it; at a second one it ends at once.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

import configurator
import terminal

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


def train_command(arguments, processes=1):
    """The command line that trains with these arguments in so many processes on this machine."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    return [*launcher, str(TRAIN), *map(str, arguments)]


def changed_settings(recorded, settings, ignored=()):
    """What differs from the settings a run was begun with and changes its result: ['lr 0.002 → 0.001', …].

    recorded: of a checkpoint; settings: a train.Config. Of those that an older checkpoint lacks it had the
    default.
    """
    neutral = configurator.neutral_settings(settings) | set(ignored)
    recorded = asdict(type(settings)()) | recorded
    return [f"{name} {recorded[name]!r} → {value!r}" for name, value in asdict(settings).items()
            if name not in neutral and recorded[name] != value]


def environment_of(slot, jobs):
    """The environment of a child beside others: one of our GPUs; its share of the cores, unless ours says."""
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}
    n_gpus = torch.cuda.device_count()
    if n_gpus > 1:
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = names.split(",")[slot % n_gpus]
    return environment


class Child(NamedTuple):
    """A process that was started."""

    key: object  # the caller's name for it
    process: subprocess.Popen
    slot: int  # from 0 up to `jobs`, each taken by one child at a time

    @property
    def returncode(self):
        return self.process.returncode


class Runner:
    """Up to `jobs` processes at once. As a context it passes signals on; `signum` is the first received."""

    def __init__(self, jobs=1):
        self.jobs, self.children, self.signum = jobs, [], None

    def __enter__(self):
        signums = (signal.SIGINT, *terminal.stop_signals())
        self.handlers = {signum: signal.signal(signum, self.pass_on) for signum in signums}
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def pass_on(self, signum, _):
        self.signum = self.signum or signum
        for child in self.children:
            child.process.terminate()

    def free_slot(self):
        """The lowest slot that no child takes, or None if there is none or a signal has come."""
        taken = {child.slot for child in self.children}
        free = [slot for slot in range(self.jobs) if slot not in taken]
        return free[0] if free and not self.signum else None

    def start(self, key, command, slot=0, log=None, environment=None):
        """Start a command; its output is appended to the file `log`, or goes where ours goes.

        The log is locked as long as the child lives, even if this process does not: raises BlockingIOError if
        another process holds it. environment: the child's (None: ours).
        """
        with contextlib.ExitStack() as stack:
            output = None
            if log:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(open(log, "a", encoding="utf-8"))
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # in a session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True)
        self.children.append(Child(key, process, slot))
        if self.signum:  # the handler could not know this one yet
            process.terminate()

    def ended(self):
        """The children that have ended since the last call; they are no longer ours."""
        ended = [child for child in self.children if child.process.poll() is not None]
        self.children = [child for child in self.children if child not in ended]
        return ended

    def wait(self):
        """Wait until a child has ended; return all that have."""
        while self.children:
            if ended := self.ended():
                return ended
            time.sleep(0.05)
        return []
