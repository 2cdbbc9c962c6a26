"""Gradients that go bad: which steps are skipped, when a run goes back, and where it goes on."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import equal_runs, equal_tensors, events, figures, steps_saved, weights
from safetensors.torch import load_file

import train
from training import checkpoint
from training.checkpoint import checkpoints, read_checkpoint, record_digest
from training.distributed import SINGLE
from training.guard import Guard
from training.state import RunState

# ----------------------------------------------------------------------------------------- the state, by hand


def record(**values):
    """A checkpoint's record of where a run stood."""
    return RunState(**values).record()


def test_the_state_counts_samples():
    state = RunState(step=10, next_sample=80)
    state.advance(8)
    assert (state.step, state.next_sample) == (11, 88)
    assert [state.samples_at(step, 8) for step in (11, 10, 0)] == [88, 80, 0]
    state.next_sample += 40  # it went back past five steps' samples
    assert state.samples_at(11, 8) == 128 and state.samples_at(12, 8) == 136


def test_the_state_comes_back_from_its_record():
    figures = [dict(loss=1.0, grad_norm=2.0), dict(loss=3.0, grad_norm=4.0)]
    saved = record(step=5, next_sample=48, passed_samples=8, bad_in_a_row=1, pending=figures)
    state = RunState()
    state.restore(json.loads(json.dumps(saved)), ["loss", "grad_norm"])
    assert state == RunState(5, 48, 8, 1, figures)
    assert state.pending is not figures


def test_pending_figures_of_another_loss_are_dropped():
    state = RunState()
    pending = [dict(loss=1.0, noisy=1.0, clean=1.0, grad_norm=2.0), dict(loss=3.0, grad_norm=4.0)]
    state.restore(record(pending=pending), ["loss", "grad_norm"])
    assert state.pending == [dict(loss=3.0, grad_norm=4.0)]


# ----------------------------------------------------------------------------------------- the guard, by hand


def bare_guard(tmp_path=Path(), max_skips=3, skip_norm=0.0, **state):
    cfg = SimpleNamespace(skip_norm=skip_norm, max_skips=max_skips)
    process = SimpleNamespace(loss="elbo")
    run = SimpleNamespace(cfg=cfg, ranks=SINGLE, folder=tmp_path, process=process)
    return Guard(run, RunState(**state), network=None, optimizer=None)


def test_bad_steps_in_a_row_are_counted():
    guard = bare_guard(max_skips=3, skip_norm=5.0)
    norms = [1.0, 6.0, float("nan"), 5.0, float("inf")]
    assert [guard.count(norm) for norm in norms] == [True, False, False, True, False]
    assert guard.state.bad_in_a_row == 1 and guard.worst == 2 and not guard.must_go_back()
    assert not guard.count(6.0) and not guard.must_go_back()
    assert not guard.count(6.0) and guard.must_go_back()
    assert guard.count(1.0) and guard.state.bad_in_a_row == 0
    assert guard.must_go_back()  # good steps afterwards don't undo it: their figures came in late


class Ledger:
    """Stands in for saver and log: what the guard asks of them."""

    journal = None

    def __init__(self):
        self.calls = []

    def wait(self):
        self.calls.append("wait")

    def forget_after(self, folder):
        self.calls.append(f"forget after {folder.name}")

    def event(self, name, text, **values):
        self.calls.append((name, values))


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """Checkpoints that exist as records only, newest first: {step: record}."""
    records = {}
    monkeypatch.setattr(checkpoint, "restore", lambda *arguments: None)

    def load_newest(run_dir, warn, ranks, fit):
        for step, values in records.items():
            if fit(values):
                return run_dir / f"step_{step:08d}", values
        raise FileNotFoundError

    monkeypatch.setattr(checkpoint, "load_newest", load_newest)
    return records


def test_going_back_is_to_the_last_good_checkpoint_and_past_the_data(saved, tmp_path):
    saved[30] = record(step=30, next_sample=240, bad_in_a_row=2)  # saved amid the trouble
    pending = [dict(loss=2.0, grad_norm=1.0)]
    saved[20] = record(step=20, next_sample=160, pending=pending)
    guard, ledger = bare_guard(tmp_path, step=33, next_sample=264), Ledger()
    for _ in range(3):
        guard.count(float("nan"))
    assert guard.must_go_back()
    guard.go_back(ledger, ledger)
    assert guard.state == RunState(20, 264, passed_samples=104, pending=pending)
    assert not guard.must_go_back()
    went_back = dict(from_step=33, first_sample=160, last_sample=263)
    assert ledger.calls == ["wait", "forget after step_00000020", ("back", went_back)]

    # once more, to a checkpoint of the new course: what was skipped adds up
    saved.clear()
    saved[24] = guard.state.record() | dict(step=24, next_sample=296)
    guard.state.step, guard.state.next_sample = 26, 312
    guard.go_back(ledger, ledger)
    assert guard.state == RunState(24, 312, passed_samples=104 + 16, pending=pending)


def test_going_back_in_vain_ends_with_a_reason(saved, tmp_path, monkeypatch, capsys):
    guard, ledger = bare_guard(tmp_path, step=33, next_sample=264), Ledger()
    with pytest.raises(SystemExit):
        guard.go_back(ledger, ledger)
    assert "there is no checkpoint from before; lower --lr" in capsys.readouterr().err

    def unreadable(*arguments, **settings):
        raise OSError("step_00000020 can't be read: [Errno 116] Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(checkpoint, "load_newest", unreadable)
        guard.go_back(ledger, ledger)
    assert "step_00000020 can't be read" in capsys.readouterr().err

    saved[20] = record(step=20, next_sample=160)
    for _ in range(3):
        guard.go_back(ledger, ledger)
    with pytest.raises(SystemExit):
        guard.go_back(ledger, ledger)
    assert "three times" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def poisoned(monkeypatch):
    """Make the weights of batches NaN: those of these steps, as they are numbered in an undisturbed run."""
    batches = train.batches

    def poison(steps):
        def with_poison(run, first_step, first_sample):
            for number, batch in enumerate(batches(run, first_step, first_sample)):
                if first_sample // run.cfg.batch_size + number + 1 in steps:
                    batch = batch._replace(weights=batch.weights * float("nan"))
                yield batch

        monkeypatch.setattr(train, "batches", with_poison)

    return poison


def decisions(run):
    """[(event, step)] of a run."""
    return [(m["event"], m["step"]) for m in events(run)]


def skipped(steps):
    return [("skipped", step) for step in steps]


def logged_steps(run):
    """The steps that have a line of progress."""
    return [m["step"] for m in figures(run) if "loss" in m]


def test_a_step_that_is_not_finite_is_skipped_and_counted(run_main, poisoned):
    poisoned({11, 21})
    run = run_main("--steps=40", "--save_every=10", "--keep=9", "--log_every=1")
    keys = ("event", "step", "first_sample", "in_a_row")
    assert [tuple(m[key] for key in keys) for m in events(run)] == [
        ("skipped", 11, 80, 1), ("skipped", 21, 160, 1)]
    assert all(math.isnan(m["norm"]) for m in events(run))
    assert read_checkpoint(run / "step_00000040")["updates"] == 38
    assert all(torch.isfinite(w).all() for w in weights(run).values()) and 11 not in logged_steps(run)


def test_a_skipped_step_changes_neither_weights_nor_moments(run_main, poisoned):
    poisoned({11})
    run = run_main("--steps=11", "--save_every=10", "--keep=9", "--lr_schedule=constant")
    before, after = run / "step_00000010", run / "step_00000011"
    for file in before.rglob("*.safetensors"):
        assert equal_tensors(load_file(file), load_file(after / file.relative_to(before)))


@pytest.mark.parametrize("more", ([], ["--ema=0.9", "--optimizer=muon"]), ids=" ".join)
def test_after_several_in_a_row_the_run_goes_back_and_past_the_data(run_main, poisoned, more):
    poisoned(range(24, 31))
    flags = ("--steps=60", "--save_every=10", "--keep=9", "--log_every=1", "--max_skips=4", *more)
    run = run_main(*flags)
    # Four in a row, a fifth while the ranks agree to go back; two more bad steps are met behind.
    assert decisions(run) == [*skipped(range(24, 29)), ("back", 20), *skipped((21, 22))]
    back = events(run)[5]
    assert (back["from_step"], back["first_sample"], back["last_sample"]) == (28, 160, 8 * 28 - 1)
    assert logged_steps(run) == [step for step in range(1, 61) if step not in (21, 22)]
    last = read_checkpoint(run / "step_00000060")
    assert last["next_sample"] - last["passed_samples"] == 60 * 8 and last["passed_samples"] == 64

    # Exactly what a run does that is told at step 20 to begin behind that range.
    again = run.with_name("again")
    shutil.copytree(run / "step_00000020", again / "step_00000020")
    shutil.copyfile(run / "metrics.jsonl", again / "metrics.jsonl")
    path = again / "step_00000020/checkpoint.json"
    told = json.loads(path.read_text(encoding="utf-8")) | dict(next_sample=8 * 28, passed_samples=64)
    del told["record_sha256"]
    path.write_text(json.dumps(told | dict(record_sha256=record_digest(told))), encoding="utf-8")
    run_main(*flags, "--resume=yes", run="again")
    assert equal_runs(again, run)
    if more:
        assert equal_tensors(*(load_file(r / "step_00000060/ema/model.safetensors") for r in (run, again)))


def test_bad_steps_between_two_lines_are_seen(run_main, poisoned):
    """The figures of ten steps arrive at once, good ones last: still the run goes back, and logs them."""
    poisoned(range(23, 28))  # the line is due at 30
    run = run_main("--steps=60", "--save_every=20", "--keep=9", "--log_every=10", "--max_skips=5")
    assert decisions(run) == [*skipped(range(23, 28)), ("back", 20)]
    back = events(run)[-1]
    assert (back["from_step"], back["first_sample"], back["last_sample"]) == (31, 160, 8 * 31 - 1)
    assert logged_steps(run) == [10, 20, 30, 40, 50, 60]
    assert read_checkpoint(run / "step_00000060")["passed_samples"] == 88


def test_skipped_steps_cost_no_good_checkpoint(run_main, poisoned, capsys):
    """With a checkpoint every step and one to keep, the one from before the skipped steps stays."""
    poisoned(range(23, 28))
    run = run_main("--steps=40", "--save_every=1", "--keep=1", "--log_every=1", "--max_skips=5")
    assert decisions(run) == [*skipped(range(23, 28)), ("back", 22)]
    assert "warning: step 23: no checkpoint amid skipped updates" in capsys.readouterr().err
    assert (run / "latest").read_text(encoding="utf-8") == "step_00000040\n" and steps_saved(run) == [40]


def test_a_step_to_be_kept_waits_for_a_run_that_goes_back(run_main, poisoned):
    """Its checkpoint would hide the trouble before it: it is written when the run comes there again."""
    poisoned(range(23, 28))
    flags = ("--steps=40", "--save_every=20", "--save_at=29", "--log_every=40", "--max_skips=5")
    run = run_main(*flags)
    assert decisions(run) == [*skipped(range(23, 28)), ("back", 20)]
    assert read_checkpoint(run / "step_00000029")["passed_samples"] == 8 * (29 - 20 + 1)


def test_no_good_step_at_the_end_goes_back_too(run_main, poisoned):
    """The last figures come in after the last step: they are looked at before the run is called complete."""
    poisoned(range(37, 41))
    run = run_main("--steps=40", "--save_every=10", "--keep=9", "--log_every=10", "--max_skips=4")
    assert decisions(run) == [*skipped(range(37, 41)), ("back", 30)]
    assert steps_saved(run)[0] == 40 and read_checkpoint(checkpoints(run)[0])["bad_in_a_row"] == 0


def test_a_run_that_goes_back_in_vain_ends(refused, poisoned):
    poisoned(range(24, 1000))
    flags = ("--steps=60", "--log_every=1", "--max_skips=2")
    assert "three times" in refused(*flags, "--save_every=10").splitlines()[-1]
    without = refused(*flags, "--save_every=0", run="other")
    assert "there is no checkpoint from before" in without.splitlines()[-1]
