"""eval.py --watch: checkpoints of a run are scored into its metrics.jsonl, beside the trainer or later."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from runs import TINY

import eval as evaluation
from evaluation import watch
from training.checkpoint import checkpoints
from training.log import read_metrics, trim_metrics


@pytest.fixture
def run_watch(monkeypatch, capsys):
    """Call eval.main() with --watch in this process, without the bound; returns (stdout, stderr)."""

    def call(run, *flags):
        capsys.readouterr()
        argv = ["eval.py", f"--watch={run}", "--device=cpu", "--watch_every=0.05", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            evaluation.main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        return capsys.readouterr()

    return call


def scores(run):
    """{step: the scores of its checkpoint} in metrics.jsonl."""
    lines = {}
    for m in read_metrics(run):
        found = {name: value for name, value in m.items() if name.startswith("eval/")}
        if found:
            assert m["step"] not in lines
            lines[m["step"]] = found
    return lines


QUICK = ["--rows=8", "--bins=0"]  # of the bound


# a run that is finished -------------------------------------------------------------------------------------


def test_all_checkpoints_of_a_finished_run(run_main, run_watch, capsys):
    """In order of their steps, once each; the figures are those of eval.py, in eval_<step>, too."""
    run = run_main("--steps=6", "--save_every=2", "--keep=9")
    before = read_metrics(run)
    run_watch(run, *QUICK)
    lines = read_metrics(run)
    assert lines[: len(before)] == before
    assert [m["step"] for m in lines[len(before) :]] == [2, 4, 6] == list(scores(run))
    tokens = {m["step"]: m["tokens"] for m in before}
    assert lines[-1]["tokens"] == tokens[6]
    for step, line in scores(run).items():
        bound = json.loads((run / f"eval_{step:08d}/eval.json").read_text(encoding="utf-8"))["bound"]
        names = ("nats_per_token", "error", "bits_per_byte")
        assert line == {f"eval/bound/{name}": bound[name] for name in names}
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    out, _ = run_watch(run, *QUICK)
    assert (run / "metrics.jsonl").read_text(encoding="utf-8") == text and "nats/token" not in out


def test_tasks_are_scored_as_eval_py_does(run_main, run_watch, published):
    pytest.importorskip("lm_eval")
    from evaluation import harness, tasks

    run = run_main("--steps=6", "--save_every=3")
    names = ["hellaswag", "mmlu_anatomy"]
    flags = [f"--tasks={','.join(names)}", "--limit=4", "--masks=8", f"--task_data={published}"]
    run_watch(run, "--bound=False", *flags)
    lines = scores(run)
    assert list(lines) == [3, 6]
    assert {"eval/hellaswag/acc", "eval/hellaswag/acc_norm", "eval/hellaswag/acc_stderr"} <= set(lines[3])
    model = harness.NanoQuokka(run_dir=str(run), device="cpu", masks=8)
    reference = tasks.run_tasks(model, tasks.open_tasks(names, task_data=published), limit=4)
    expected = {}
    for task, metrics in reference.items():
        floats = {name: value for name, value in metrics.items() if isinstance(value, float)}
        expected |= {f"eval/{task}/{name}": value for name, value in floats.items()}
    assert lines[6] == expected


def test_orders_and_texts_are_logged_too(run_main, run_watch):
    run, judge = run_main("--steps=2"), run_main("--steps=2", "--objective=ar", run="judge")
    flags = ["--ordered=left_to_right", "--ordered_rows=3", "--samples=2", "--match=", "--length=8"]
    run_watch(run, "--bound=False", f"--judge={judge}", *flags)
    assert set(scores(run)[2]) == {"eval/left_to_right/nats_per_token", "eval/left_to_right/error",
                                   "eval/texts/entropy", "eval/texts/nll"}


def test_a_task_that_fails_costs_its_scores(run_main, run_watch, own_task):
    pytest.importorskip("lm_eval")
    folder = own_task("process_results: !function own.score\n")
    code = "def score(doc, results):\n    raise RuntimeError('the scorer is broken')\n"
    (folder / "own.py").write_text(code, encoding="utf-8")
    run = run_main("--steps=4", "--save_every=2")
    _, err = run_watch(run, "--bound=False", "--tasks=squares", f"--task_path={folder}")
    assert err.count("is passed over: RuntimeError: the scorer is broken") == 2 and not scores(run)


@pytest.mark.parametrize("damage", ["weights", "record", "nothing left"])
def test_damaged_checkpoints_are_passed_over(run_main, run_watch, damage):
    run = run_main("--steps=4", "--save_every=2")
    folder = run / "step_00000002"
    if damage == "weights":
        (folder / "model.safetensors").write_bytes(b"broken")
    elif damage == "record":
        (folder / "checkpoint.json").write_text("{", encoding="utf-8")
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    _, err = run_watch(run, *QUICK)
    assert err.count("warning:") == 1 and "step_00000002 is passed over" in err and list(scores(run)) == [4]


@pytest.mark.parametrize("flags, message", [
    (["--watch=x", "--out=y"], "with watch each checkpoint has a folder of its own"),
    (["--watch=x", "--texts=y"], "with watch, give samples"),
    (["--watch=x", "--run_dir=y"], "give run_dir or watch, not both"),
    (["--watch=RUN", "--samples=2", "--judge=RUN"], "is a masked model"),
    (["--watch=RUN", "--watch_every=0"], "must be above 0"),
])
def test_bad_input(run_main, monkeypatch, capsys, flags, message):
    run = run_main("--steps=2")
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    monkeypatch.setattr(sys, "argv", ["eval.py", "--device=cpu", *flags])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        evaluation.main()
    signal.signal(signal.SIGTERM, handler)
    assert exit_.value.code == 2 and message in capsys.readouterr().err and not scores(run)


# beside a trainer -------------------------------------------------------------------------------------------


def test_checkpoints_are_scored_as_they_appear(run_main, run_watch, monkeypatch, tmp_path):
    """A run that has not begun, then has its first checkpoint, then its last."""
    done, run = run_main("--steps=6", "--save_every=2", "--keep=9", run="done"), tmp_path / "run"
    reports = []

    def sleep(seconds):  # the trainer's work while the watcher waits
        reports.append(list(scores(run)) if run.is_dir() else None)
        if not run.is_dir():
            run.mkdir()
            shutil.copy(done / "metrics.jsonl", run)
        elif not checkpoints(run):
            shutil.copytree(done / "step_00000002", run / "step_00000002")
        else:
            shutil.copytree(done / "step_00000006", run / "step_00000006")

    monkeypatch.setattr(evaluation.time, "sleep", sleep)
    out, _ = run_watch(run, *QUICK)
    assert reports == [None, [], [2]] and list(scores(run)) == [2, 6]
    assert out.count("waiting for the next checkpoint") == 2  # not at each look


def test_the_last_checkpoint_appears_just_after_a_look(run_main, run_watch, monkeypatch, tmp_path):
    """Then the run is at its last step, but that checkpoint is still to be scored."""
    done, run = run_main("--steps=4", "--save_every=2", run="done"), tmp_path / "run"
    shutil.copytree(done, run)
    shutil.rmtree(run / "step_00000004")
    next_checkpoint = watch.ScoreLog.next_checkpoint

    def look(log):
        checkpoint = next_checkpoint(log)
        if not checkpoint and not (run / "step_00000004").is_dir():
            shutil.copytree(done / "step_00000004", run / "step_00000004")
        return checkpoint

    monkeypatch.setattr(watch.ScoreLog, "next_checkpoint", look)
    run_watch(run, *QUICK)
    assert list(scores(run)) == [2, 4]


def test_next_checkpoint_is_the_oldest_without_scores(tmp_path):
    for step in (3, 6, 9):
        (tmp_path / f"step_{step:08d}").mkdir()
    log = watch.ScoreLog(tmp_path)
    lines = [dict(step=3, tokens=9, val_loss=1.0), dict(step=6, tokens=18, **{"eval/x/acc": 0.5})]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    first = log.next_checkpoint()
    assert first.folder.name == "step_00000003"
    log.pass_over(first, "it is damaged")
    assert log.next_checkpoint().folder.name == "step_00000009"
    (tmp_path / "step_00000003/checkpoint.json").write_text("{}", encoding="utf-8")
    assert log.next_checkpoint().folder.name == "step_00000003"


RECORD = dict(step=6, next_sample=60, passed_samples=10, model=dict(seq_len=4), settings={})


def log_at_step_6(folder):
    """(ScoreLog, step 6 that it is scoring) of a run whose trainer has its metrics open."""
    (folder / "step_00000006").mkdir()
    line = json.dumps(dict(step=6, tokens=200, loss=1.0)) + "\n"
    (folder / "metrics.jsonl").write_text(line, encoding="utf-8")
    log = watch.ScoreLog(folder)
    return log, log.next_checkpoint()


def test_a_line_of_scores(tmp_path):
    log, checkpoint = log_at_step_6(tmp_path)
    log.append(checkpoint, RECORD, {"eval/x/acc": 0.5, "eval/x/nll": float("nan")})
    last = read_metrics(tmp_path)[-1]
    assert math.isnan(last.pop("eval/x/nll")) and last == {"step": 6, "tokens": 200, "eval/x/acc": 0.5}
    assert log.next_checkpoint() is None


def test_a_torn_line_does_not_swallow_the_scores(tmp_path):
    log, checkpoint = log_at_step_6(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 7, "lo')
    log.append(checkpoint, RECORD, {"eval/x/acc": 0.5})
    assert read_metrics(tmp_path)[-1]["eval/x/acc"] == 0.5


@pytest.mark.parametrize("back_to, is_logged", [(4, False), (6, True)])
def test_scores_of_a_course_that_was_given_up(tmp_path, back_to, is_logged):
    """The run goes back past the step while it is scored: then another checkpoint of this step is to come."""
    log, checkpoint = log_at_step_6(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(step=back_to, tokens=160, event="back", from_step=9)) + "\n")
    trim_metrics(tmp_path / "metrics.jsonl", back_to)
    log.append(checkpoint, RECORD, {"eval/x/acc": 0.5})
    assert bool(scores(tmp_path)) == is_logged


def test_a_line_that_comes_too_late_is_not_in_the_trimmed_file(tmp_path, monkeypatch):
    """The trainer goes back just after the watcher has looked."""
    log, checkpoint = log_at_step_6(tmp_path)
    looks = []

    def times_back(run, step):
        looks.append(step)
        with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(step=4, tokens=160, event="back")) + "\n")
        trim_metrics(tmp_path / "metrics.jsonl", 4)
        return 0

    monkeypatch.setattr(watch, "times_back", times_back)
    log.append(checkpoint, RECORD, {"eval/x/acc": 0.5})
    assert looks == [6] and not scores(tmp_path)


def test_the_trainer_s_wandb_run_gets_the_scores(run_main, run_watch, wandb_folder):
    run = run_main("--steps=4", "--wandb=test")
    time.sleep(1)  # wandb names an offline run's folder by the second
    run_watch(run, *QUICK)
    folders = [path.name for path in wandb_folder.glob("offline-run-*")]
    assert len(folders) == 2 and all(
        name.endswith((run / "wandb_id.txt").read_text(encoding="utf-8")) for name in folders
    )


def start(run, *flags):
    flags = [f"--watch={run}", "--device=cpu", "--watch_every=0.1", *QUICK, *flags]
    command = [sys.executable, "eval.py", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_signal_ends_it_with_one_line(tmp_path):
    process = start(tmp_path / "run")
    assert "waiting for the next checkpoint" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)  # test_eval.py sends SIGINT
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == f"eval.py: interrupted; what was scored is in {tmp_path / 'run'}/metrics.jsonl\n"


@pytest.mark.slow
def test_beside_a_trainer_that_removes_old_checkpoints(corpus, tmp_path):
    """Both write into one file: every line stays whole, the last checkpoint is scored, the watcher ends."""
    run = tmp_path / "run"
    watcher = start(run)
    flags = ["--steps=300", "--save_every=10", "--keep=1", "--log_every=1"]
    command = [sys.executable, "train.py", *TINY, f"--corpus={corpus}", f"--run_dir={run}", *flags]
    trainer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert trainer.returncode == 0, trainer.stderr
    _, err = watcher.communicate(timeout=120)
    assert watcher.returncode == 0, err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [m["step"] for m in lines if "loss" in m] == list(range(1, 301))
    assert list(scores(run))[-1] == 300 and len(scores(run)) > 1


@pytest.mark.slow
def test_on_two_ranks(run_main, run_watch, tmp_path):
    run = run_main("--steps=4", "--save_every=2")
    shutil.copytree(run, tmp_path / "copy")
    run_watch(run, *QUICK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    flags = [f"--watch={tmp_path / 'copy'}", "--device=cpu", "--watch_every=0.1", *QUICK]
    command = [*launcher, "eval.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = scores(run), scores(tmp_path / "copy")
    assert list(one) == list(two) == [2, 4]
    for step, line in one.items():
        assert two[step] == pytest.approx(line, abs=1e-6)
