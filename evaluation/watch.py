"""Scores of a run's checkpoints in its metrics.jsonl, written by a process beside the trainer.

The file itself tells which checkpoints have scores: those of its lines {"step": …, "tokens": …,
"eval/<task>/<metric>": …}. The trainer appends to the file, too, and trims it when the run goes back to an
earlier checkpoint.
"""

import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from training.checkpoint import checkpoints, step_of
from training.log import Tracker, read_metrics
from training.record import read_record


class Unscored(NamedTuple):
    """A checkpoint without scores, as it was when its turn came."""

    folder: Path
    identity: tuple  # of the folder
    times_back: int  # of the run, to before this checkpoint


class ScoreLog:
    """The checkpoints of a run that still lack scores, and where their scores go: metrics.jsonl and wandb."""

    def __init__(self, run_dir):
        self.run_dir, self.tracker = Path(run_dir), None
        self.passed_over = set()  # identities of checkpoints that could not be scored

    def next_checkpoint(self):
        """The oldest checkpoint without scores, for `append` or `pass_over`, or None."""
        scored = set()
        for metrics in read_metrics(self.run_dir):
            if any(name.startswith("eval/") for name in metrics):
                scored.add(metrics["step"])
        for folder in reversed(checkpoints(self.run_dir)):
            step, which = step_of(folder), identity(folder)
            if step not in scored and which not in self.passed_over:
                return Unscored(folder, which, times_back(self.run_dir, step))
        return None

    def is_finished(self):
        """Whether the checkpoint of the run's last step is there."""
        folders = checkpoints(self.run_dir)
        for folder in folders:
            with contextlib.suppress(OSError, ValueError):
                return step_of(folders[0]) >= read_record(folder).get("steps", 0)
        return False

    def pass_over(self, checkpoint, problem):
        """Give up an Unscored checkpoint."""
        self.passed_over.add(checkpoint.identity)
        warn(f"{checkpoint.folder} is passed over: {problem}")

    def append(self, checkpoint, record, figures):
        """Log the figures of an Unscored checkpoint with this record; raises OSError.

        Nothing is logged if the run has gone back past its step meanwhile: it is of a course that was given
        up. The trainer first logs that it goes back, then trims, into a new file. So the file is opened here
        before that log is read: a line that comes too late goes into the old file.
        """
        path = self.run_dir / "metrics.jsonl"
        samples = record.get("next_sample", 0) - record.get("passed_samples", 0)  # of a converted one: none
        tokens = samples * record["model"]["seq_len"]
        line = dict(step=record["step"], tokens=tokens)
        line |= {name: value if math.isfinite(value) else str(value) for name, value in figures.items()}
        with open(path, "ab", buffering=0) as file:
            if times_back(self.run_dir, record["step"]) != checkpoint.times_back:
                return
            text = json.dumps(line) + "\n"
            if is_torn(path):
                text = "\n" + text
            written = file.write(text.encode())  # one write in append mode: the trainer's lines stay whole
            if written < len(text.encode()):
                raise OSError(f"{path}: no space left for the scores of step {record['step']}")
        self.tracker = self.tracker or open_tracker(self.run_dir, record["settings"])
        if self.tracker:
            self.tracker.log(line)

    def close(self):
        if self.tracker:
            self.tracker.finish()


def identity(folder):
    """(name, time) of a checkpoint folder: another one of the same step, written later, differs."""
    with contextlib.suppress(OSError):
        return folder.name, (folder / "checkpoint.json").stat().st_mtime_ns
    return folder.name, None


def times_back(run_dir, step):
    """How often a run has logged that it went back to a checkpoint before `step`."""
    return sum(m.get("event") == "back" and m["step"] < step for m in read_metrics(run_dir))


def is_torn(path):
    """Whether a file's last line has no end, as after a crash or on a full disk."""
    with open(path, "rb") as file:
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def open_tracker(run_dir, settings):
    """The Tracker of the Weights & Biases run that a run folder's trainer logs to, or None if it uses none.

    One that can't be opened costs its curves, not the scores: a warning says so.
    """
    id_file = run_dir / "wandb_id.txt"
    if not settings.get("wandb") or not id_file.is_file():
        return None
    try:
        import wandb
    except ImportError:
        return warn("the run uses wandb, which is not installed here: scores go to metrics.jsonl alone")
    try:
        shared = {}
        if "WANDB_MODE" not in os.environ:  # two processes write to one run
            about = wandb.Settings(x_primary=False, x_update_finish_state=False)
            shared = dict(mode="shared", settings=about)
        run_id = id_file.read_text(encoding="utf-8").strip()
        wandb_run = wandb.init(project=settings["wandb"], id=run_id, resume="allow", **shared)
        wandb_run.define_metric("*", step_metric="step")  # as the trainer's
        return Tracker(wandb_run)
    except Exception as problem:  # also of older versions, which lack the mode
        reason = str(problem).partition("\n")[0]
        return warn(f"wandb: {reason}; scores go to metrics.jsonl alone")


def warn(message):
    print(f"warning: {message}", file=sys.stderr, flush=True)
