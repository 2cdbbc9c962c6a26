"""What a run writes down: the figures of steps, fed by hand, and the file of metrics."""

import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from runs import TINY
from steps import build_run

from model import Transformer
from training import log
from training.distributed import SINGLE, Ranks
from training.guard import Guard
from training.log import Journal, StepLog, read_metrics, read_rows, trim_metrics
from training.state import RunState


@pytest.fixture
def clock(monkeypatch):
    """A device's clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(log, "timestamp", lambda device: now[0])
    monkeypatch.setattr("training.transfer.timestamp", lambda device: now[0])
    return now


@pytest.fixture
def step_log(corpus, tmp_path, clock):
    """A StepLog of a run of 100 steps that nobody trains; a line every 4, bad above a norm of 5."""

    def make(*flags, ranks=SINGLE):
        (tmp_path / "run").mkdir(exist_ok=True)
        run = build_run(*TINY, "--steps=100", "--log_every=4", "--skip_norm=5", "--resume=auto",
                        f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", *flags, ranks=ranks)
        state, network = RunState(), Transformer(run.model_config).init_weights()
        return StepLog(run, state, Guard(run, state, network, None), network)

    return make


def take_step(steps, loss, norm=1.0, seconds=0.0, clock=None, **figures):
    """A step with these figures, which takes so long."""
    if clock:
        clock[0] += seconds
    steps.state.advance(steps.run.cfg.batch_size)
    values = dict(loss=loss, **figures, grad_norm=norm)
    steps.add({name: torch.tensor(value) for name, value in values.items()})


def lines(steps):
    return read_metrics(steps.run.folder)


# ------------------------------------------------------------------------------------------ lines of progress


def test_a_line_has_the_means_of_its_steps(step_log, clock, capsys):
    steps = step_log()
    for loss, norm in ((4.0, 1.0), (3.0, 2.0), (2.0, 3.0), (1.0, 4.0)):
        take_step(steps, loss, norm, 0.5, clock)
    steps.queue(lr=0.25)
    assert lines(steps) == []  # until the figures are asked for
    steps.poll()
    (line,) = lines(steps)
    norm = math.sqrt(sum(p.detach().square().sum().item() for p in steps.network.parameters()))
    assert line == dict(step=4, tokens=4 * 256, loss=2.5, grad_norm=2.5, lr=0.25, tokens_per_s=4 * 256 / 2.0,
                        param_norm=pytest.approx(norm, rel=1e-6))
    printed = capsys.readouterr().out
    assert printed == "step      4/100  loss 2.5000  norm 2.50  lr 2.50e-01  0.5K tok/s  eta 0:48\n"


def test_every_part_of_the_loss_has_its_mean(step_log, clock):
    steps = step_log("--objective=uniform", "--loss=paper")
    for noisy, clean in ((6.0, 2.0), (4.0, 1.0)):
        take_step(steps, (noisy + clean) / 2, noisy=noisy, clean=clean, seconds=1, clock=clock)
    steps.queue(lr=1.0)
    steps.poll()
    (line,) = lines(steps)
    assert [line[name] for name in ("loss", "noisy", "clean", "grad_norm")] == [3.25, 5.0, 1.5, 1.0]


def test_speed_leaves_out_what_is_not_training(step_log, clock):
    """The first step compiles, and validation and saving come between: they don't count in tokens_per_s."""
    steps = step_log()
    take_step(steps, 4.0, seconds=60, clock=clock)
    steps.restart_clock()
    steps.queue(lr=1.0)
    steps.poll()
    assert "tokens_per_s" not in lines(steps)[0]  # it has but that step
    take_step(steps, 3.0, seconds=1, clock=clock)
    clock[0] += 30  # a validation
    steps.restart_clock()
    take_step(steps, 3.0, seconds=1, clock=clock)
    take_step(steps, 3.0, seconds=1, clock=clock)
    steps.queue(lr=1.0)
    steps.poll()
    assert lines(steps)[1]["tokens_per_s"] == 256.0  # two steps in two seconds
    assert lines(steps)[1]["loss"] == 3.0


def test_figures_that_travel_without_a_line_wait_for_the_next(step_log, clock):
    """As before a validation; and they are in what a checkpoint keeps."""
    steps = step_log()
    take_step(steps, 4.0)
    take_step(steps, 2.0)
    steps.queue()
    steps.poll(wait=True)
    assert lines(steps) == [] and [row["loss"] for row in steps.state.pending] == [4.0, 2.0]
    record = json.loads(json.dumps(steps.state.record()))

    # another process goes on with that record: the line is the one that would have come
    steps.state.restore(record, ["loss", "grad_norm"])
    take_step(steps, 0.0, seconds=1, clock=clock)
    steps.queue(lr=1.0)
    steps.poll()
    (line,) = lines(steps)
    assert (line["step"], line["loss"]) == (3, 2.0) and steps.state.pending == []


# -------------------------------------------------------------------------------------------------- bad steps


def test_a_bad_step_is_in_no_mean_but_has_an_entry_of_its_own(step_log, clock, capsys):
    steps = step_log()
    for loss, norm in ((4.0, 1.0), (50.0, 6.0), (60.0, float("inf")), (2.0, 1.0)):
        take_step(steps, loss, norm, 1, clock)
    steps.queue(lr=1.0)
    steps.poll()
    first, second, line = lines(steps)
    about = dict(loss_then=50.0, norm=6.0, in_a_row=1, first_sample=8)
    assert first == dict(step=2, tokens=512, event="skipped", **about)
    assert second == dict(step=3, tokens=768, event="skipped", loss_then=60.0, norm=math.inf, in_a_row=2,
                          first_sample=16)
    assert (line["step"], line["loss"], line["grad_norm"]) == (4, 3.0, 1.0)
    warning = "warning: step 2: skipped, its gradient's norm is 6 (loss 50; 1 in a row)"
    assert warning in capsys.readouterr().err
    assert steps.state.bad_in_a_row == 0 and steps.guard.worst == 2


def test_bad_steps_alone_make_no_line(step_log, clock):
    steps = step_log()
    take_step(steps, 9.0, norm=7.0, seconds=1, clock=clock)
    steps.queue(lr=1.0)
    steps.poll()
    assert [m.get("event") for m in lines(steps)] == ["skipped"]


def test_all_ranks_judge_the_norm_of_rank_0(step_log, monkeypatch):
    """What ranks find differs in its last bits: else one might skip a step that another takes."""
    together, sent = threading.Barrier(2, timeout=60), []

    def all_reduce(values):
        sent.append(values.clone())
        together.wait()
        values.copy_(sum(sent))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    logs = [step_log(ranks=Ranks(rank, 2)) for rank in range(2)]
    norms = (4.0, 4.0), (4.0, 6.0), (6.0, 4.0), (2.0, float("nan"))
    for pair in norms:
        for steps, norm in zip(logs, pair):
            take_step(steps, loss=1.5, norm=norm)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda steps: steps.queue(), logs))
    for steps in logs:
        steps.poll(wait=True)
        good = [dict(loss=3.0, grad_norm=norm) for norm in (4.0, 4.0, 2.0)]  # losses add up
        assert steps.state.pending == good and steps.guard.worst == 1
    assert [(m["event"], m["step"], m["norm"]) for m in lines(logs[0])] == [("skipped", 3, 6.0)]


def test_tokens_are_those_that_were_learned_from(step_log, clock):
    """After the run went back past some, its count of tokens goes on from where it went back to."""
    steps = step_log()
    steps.state.step, steps.state.next_sample, steps.state.passed_samples = 20, 8 * 28, 8 * 8
    steps.event("back", "it went back")
    take_step(steps, 1.0, seconds=1, clock=clock)
    steps.flush()
    steps.write(21, event="other")
    assert [m["tokens"] for m in lines(steps)] == [20 * 256, 21 * 256]


class OneFailure:
    """A saver that failed once."""

    def __init__(self):
        self.failure = dict(of=40, why="OSError: [Errno 28] No space left on device")

    def take_failure(self):
        failure, self.failure = self.failure, None
        return failure


def test_a_failed_save_is_said_once(step_log, capsys):
    steps, saver = step_log(), OneFailure()
    for _ in range(3):
        steps.report_failed_save(saver)
    (event,) = lines(steps)
    assert (event["event"], event["of"]) == ("not saved", 40) and "No space left" in event["why"]
    assert capsys.readouterr().err.count("no checkpoint of step 40") == 1


# ---------------------------------------------------------------------------------------------- metrics.jsonl


def write_lines(folder, *records):
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )


def test_metrics_are_cut_back_to_a_step(tmp_path):
    loss, skip = dict(step=10, loss=1.0), dict(step=15, event="skipped")
    ranks, later = dict(step=15, event="ranks"), dict(step=20, loss=1.0)
    write_lines(tmp_path, loss, skip, ranks, later)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 2')  # and the crash cut a line
    assert read_metrics(tmp_path) == [loss, skip, ranks, later]
    trim_metrics(tmp_path / "metrics.jsonl", 10)
    assert read_metrics(tmp_path) == [loss, skip]  # what was decided stays: it happened
    trim_metrics(tmp_path / "metrics.jsonl", 10, events=False)
    assert read_metrics(tmp_path) == [loss]


def test_what_a_power_loss_leaves_is_no_line(tmp_path, capsys):
    """48006ab: two bad bytes, and the run could not be resumed any more."""
    good, later = dict(step=10, tokens=5, loss=1.0), dict(step=20, tokens=10, val_loss=math.inf)
    junk = [b'\0\0\0\0\xff\xfe{"step": 2', b"", b"7", b"[]", b"null", b"{}", b'{"step": "10"}',
            b'{"step": -1}', b'{"step": true}', b'{"step": 1, "loss": [1]}', b'{"step": 1, "event": 3}',
            b"[" * 5000, b'{"step": 1' + b"0" * 5000 + b"}", "\u2028".encode(), b"\xed\xa0\x80"]
    lines = [json.dumps(good).encode(), *junk, b'{"step": 20, "tokens": 10, "val_loss": "inf"}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n\xff")
    assert read_metrics(tmp_path) == [good, later]
    journal = Journal(tmp_path, None)
    journal.back_to(15)
    journal.write(step=16, loss=2.0)
    assert read_metrics(tmp_path) == [good, dict(step=16, loss=2.0)] and not capsys.readouterr().err


def test_what_is_kept_stays_as_it_was_written(tmp_path):
    journal = Journal(tmp_path, None)
    journal.write(step=1, loss=float("inf"), tokens=3)
    written = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    journal.write(step=2, loss=1.0)
    journal.back_to(1)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == written


def test_a_full_disk_costs_lines_and_one_warning(tmp_path, capsys):
    journal = Journal(tmp_path, None)

    class Full:
        def write(self, line):
            raise OSError(28, "No space left on device")

    journal.write(step=1, loss=1.0)
    journal.file, working = Full(), journal.file
    journal.write(step=2, loss=1.0)
    journal.write(step=3, loss=1.0)
    journal.file = working
    journal.write(step=4, loss=float("nan"))
    *_, last = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert last == '{"step": 4, "loss": "nan"}'  # any JSON reader's
    first, second = read_metrics(tmp_path)
    assert first == dict(step=1, loss=1.0) and second["step"] == 4 and math.isnan(second["loss"])
    assert capsys.readouterr().err.count("can't be written (No space left on device); training goes on") == 1


def test_a_tracker_that_fails_is_given_up_with_one_warning(tmp_path, capsys):
    class Dying:
        id, logged = "x1", []

        def log(self, values):
            self.logged.append(values)
            if len(self.logged) > 1:
                raise BrokenPipeError(32, "Broken pipe")  # as where wandb's service has died

        def finish(self):
            raise AssertionError("it is given up")

    journal = Journal(tmp_path, log.Tracker(Dying()))
    for step in range(4):
        journal.write(step=step)
    journal.tracker.finish()
    assert len(Dying.logged) == 2 and [m["step"] for m in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert capsys.readouterr().err == ("warning: wandb has failed, and gets no more of this run "
                                       "(BrokenPipeError: [Errno 32] Broken pipe)\n")


def test_a_validation_is_kept_row_by_row(run_main):
    run = run_main("--steps=1", "--eval_rows=13")
    about, sequences, values = read_rows(run)
    validation = [m for m in read_metrics(run) if "val_loss" in m][-1]
    assert about["step"] == 1 and about["seq_len"] == 32 and about["error"] == validation["val_error"]
    assert len(set(sequences.tolist())) == 13 and np.mean(values) == pytest.approx(validation["val_loss"])
    good = (run / "validation.npz").read_bytes()
    for damaged in (b"damaged", good[: len(good) // 2], b"", good[:-100] + bytes(100)):
        (run / "validation.npz").write_bytes(damaged)
        assert read_rows(run) is None
    for forged in (dict(about, step="1"), dict(about, bytes_per_token=[]), [], "[" * 10_000):
        text = forged if isinstance(forged, str) else json.dumps(forged)
        np.savez(run / "validation.npz", blocks=sequences, values=values, about=np.array(text))
        assert read_rows(run) is None
    text = np.array(json.dumps(about))
    for forged in (dict(blocks=sequences.astype(str)), dict(values=values[:-1]), dict(values=values > 0)):
        np.savez(run / "validation.npz", **dict(blocks=sequences, values=values, about=text) | forged)
        assert read_rows(run) is None
    (run / "validation.npz").unlink()
    os.mkfifo(run / "validation.npz")
    assert read_rows(run) is None


# ------------------------------------------------------------------------------------------------ the picture


def test_names_of_runs_are_drawn_letter_by_letter(tmp_path, monkeypatch):
    names, labels = ("a$x_{b$", "_draft", "λ-测试"), []
    draw = Figure.savefig

    def keep_labels(figure, *arguments, **settings):
        draw(figure, *arguments, **settings)
        for text in figure.axes[0].get_legend().get_texts():
            labels.append(text.get_text())

    monkeypatch.setattr(Figure, "savefig", keep_labels)
    for name in names:
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name, dict(step=1, tokens=1, loss=math.inf), dict(step=2, tokens=2, loss=1.0))
    log.draw_losses([tmp_path / name for name in names[:2]], tmp_path / "a.png")
    log.draw_losses([tmp_path / names[2]], tmp_path / "b.png")
    assert [label.lstrip("\u200b") for label in labels] == [
        r"a\$x_{b\$, training", "_draft, training", "λ-测试, training"]
