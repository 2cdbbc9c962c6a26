"""The study of optimizers: its search, what it reads off the runs, its table, and real runs of it."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, call_main

import configurator
import train
from laws import optimizers, study
from laws.optimizers import SEARCHED, SHARES, Config, Study, Trial
from training.log import read_metrics

SHORT = ["--steps=8", "--warmup=4", "--n_layer=1", "--n_head=2", "--d_model=32", "--compile=no",
         "--eval_rows=8", "--device=cpu", "--log_every=2"]  # fmt: skip
BEST = {"adamw": 1e-3, "muon": 1.6e-2}  # of the runs made up here


def made_up_loss(trial):
    """A loss with a minimum at BEST, that falls with the steps: Muon needs 0.35 of AdamW's."""
    speed = 1 if trial.optimizer == "adamw" else 1 / 0.35
    away = math.log2(trial.lr / BEST[trial.optimizer])
    return 3 + 0.1 * away**2 - 0.2 * math.log(trial.share * speed) + trial.seed / 500


@pytest.fixture
def made_up(monkeypatch):
    """Runs that are finished as soon as they have been asked for: {folder's name: trial}, in their order."""
    trained, trials = {}, {}
    make_run = optimizers.make_run

    def remember(trial, cfg, flags):
        run = make_run(trial, cfg, flags)
        trials[run.folder.name] = trial
        return run

    def outcome(run):
        if run.folder.name not in trained:
            return None
        trial = trials[run.folder.name]
        loss = made_up_loss(trial)
        minutes = trial.share * (1.0 if trial.optimizer == "adamw" else 1.5)
        values = dict(val_loss=loss, val_ema=loss - 0.01, minutes=minutes)
        return dict(steps=run.settings.steps, tokens=1000, **values)

    monkeypatch.setattr(optimizers, "make_run", remember)
    monkeypatch.setattr(optimizers, "outcome", outcome)
    monkeypatch.setattr(study, "check_machine", lambda runs, cfg: None)
    monkeypatch.setattr(study, "train_all", lambda runs, cfg: trained.update(
        (run.folder.name, trials[run.folder.name]) for run in runs))
    return trained


def test_the_search_goes_on_until_the_best_is_inside(made_up, tmp_path, capsys):
    """Only then come all seeds, and Muon's shorter runs. The table and runs.csv hold what came out."""
    optimizers.main(["--models=AR", "--seeds=3,4", f"--runs={tmp_path}"], [])
    trials = list(made_up.values())
    searched = [(t.optimizer, t.lr) for t in trials if t.share == SEARCHED and t.seed == 3]
    assert sorted(lr for name, lr in searched if name == "adamw") == [5e-4, 1e-3, 2e-3, 4e-3]
    assert sorted(lr for name, lr in searched if name == "muon") == [1e-3 * 2**k for k in range(6)]
    full = {(t.optimizer, t.lr, t.seed) for t in trials if t.share == 1}
    assert full == {(name, BEST[name], seed) for name in BEST for seed in (3, 4)}
    assert {(t.optimizer, t.lr, t.seed) for t in trials if t.share == SHARES[0]} == {
        ("muon", 1.6e-2, 3), ("muon", 1.6e-2, 4)}

    out = tmp_path / "cpu/study_optimizer"
    text = (out / "table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| AR | adamw | 0.001 | 3.007 ± 0.001 | 2.997 ± 0.001 | 1.0 |" in text
    assert "| AR | muon | 0.016 | 2.797 ± 0.001 | 2.787 ± 0.001 | 1.5 |" in text  # 0.2 · log(1 / 0.35) less
    assert "| AR | 0.35 ± 0.00 | 0.52 ± 0.00 |" in text
    assert "`python scaling.py study optimizer --models=AR --seeds=3,4`" in text
    rows = list(csv.DictReader((out / "runs.csv").open(encoding="utf-8")))
    assert len(rows) == len(trials) and rows[0].keys() == set(optimizers.COLUMNS)


def test_a_diverged_run_is_never_the_best(made_up, tmp_path, monkeypatch):
    monkeypatch.setitem(BEST, "adamw", 3e-3)
    loss = made_up_loss
    monkeypatch.setattr(sys.modules[__name__], "made_up_loss",
                        lambda trial: math.inf if trial.lr > 3e-3 else loss(trial))
    found = Study(Config(models="AR", seeds="1", runs=str(tmp_path)), [])
    while unfinished := optimizers.read_trials(found, "AR", "adamw"):
        optimizers.run_trials(found, list(unfinished))
    assert found.best_lr("AR", "adamw") == 2e-3
    assert found.search_losses("AR", "adamw")[4e-3] == math.inf


def test_a_search_of_what_always_diverges_ends(made_up, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "made_up_loss", lambda trial: math.inf)
    optimizers.main(["--models=AR", "--seeds=1", f"--runs={tmp_path}"], [])
    assert sum(trial.optimizer == "adamw" for trial in made_up.values()) == optimizers.MOST_RATES + 1


def test_drawn_in_the_middle(made_up, tmp_path, capsys):
    """A model that is complete is drawn as it will be in the end, whatever the others lack."""
    flags = ["--seeds=3,4", f"--runs={tmp_path}"]
    optimizers.main(["--models=AR", *flags], [])
    row = "| AR | muon | 0.016 | 2.797 ± 0.001 | 2.787 ± 0.001 | 1.5 |"
    assert row in capsys.readouterr().out
    with pytest.raises(SystemExit):
        optimizers.main(["--models=masked,AR", "--draw", *flags], [])
    drawn = capsys.readouterr()
    assert row in drawn.out and "| masked | muon | — | — | — | — |" in drawn.out
    assert "not everything has been trained" in drawn.err
    with pytest.raises(SystemExit):
        optimizers.main(["--models=AR", "--seeds=3,4,5", "--draw", f"--runs={tmp_path}"], [])
    assert "| 2.797 ± 0.001 (2 of 3 seeds) |" in capsys.readouterr().out


def test_a_run_that_diverges_ends_with_its_loss(corpus, tmp_path, monkeypatch):
    """Its steps are refused, and it goes on: a study needs no loss below it."""
    cfg = Config(runs=str(tmp_path), lrs="1e-3")
    flags = [*SHORT, f"--corpus={corpus}", "--skip_norm=1e-9", "--max_skips=1"]
    run = optimizers.make_run(Trial("AR", "adamw", 1e-3, 1), cfg, flags)
    assert run.settings.max_skips == 1  # a flag of the user's
    run = optimizers.make_run(Trial("AR", "adamw", 1e-3, 1), cfg, flags[:-1])
    call_main(monkeypatch, *run.arguments)
    assert optimizers.outcome(run)["val_loss"] > 5
    with open(run.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "tokens": 9, "objective": "ar", "val_loss": NaN, "val_ema": NaN}\n')
    assert optimizers.outcome(run)["val_loss"] == math.inf


def test_what_a_run_is(tmp_path):
    """nanoGPT's settings; a share of the steps has the same share of warm-up, and its own whole schedule."""
    cfg = Config(runs=str(tmp_path))
    whole = optimizers.make_run(Trial("blocks of 4", "muon", 2e-3, 7), cfg, []).settings
    assert (whole.objective, whole.diffusion_block, whole.optimizer) == ("masked", 4, "muon")
    shape = whole.n_layer, whole.n_head, whole.d_model, whole.seq_len, whole.batch_size
    assert shape == (4, 4, 128, 64, 12)
    assert (whole.steps, whole.warmup, whole.lr, whole.seed, whole.eval_rows) == (2000, 100, 2e-3, 7, 0)
    short = optimizers.make_run(Trial("blocks of 4", "muon", 2e-3, 7, 0.25), cfg, []).settings
    assert (short.steps, short.warmup) == (500, 25) and short.run_dir != whole.run_dir
    gpu = optimizers.make_run(Trial("AR", "adamw", 1e-3, 1), Config(scale="gpu"), []).settings
    assert (gpu.n_layer, gpu.d_model, gpu.seq_len, gpu.steps, gpu.local_init) == (6, 384, 256, 5000, True)
    names = {optimizers.make_run(Trial(model, optimizer, lr, seed, share), cfg, []).folder
             for model in optimizers.MODELS for optimizer in optimizers.OPTIMIZERS for lr in (1e-3, 2e-3)
             for seed in (1, 2) for share in (*SHARES, 1.0)}
    assert len(names) == 5 * 2 * 2 * 2 * 3


@pytest.mark.parametrize("goal, share", [
    (2.6, 0.25), (2.5, 0.25), (2.25, math.sqrt(0.125)), (2.0, 0.5), (1.75, math.sqrt(0.5)), (1.5, 1.0),
    (1.4, math.inf)])
def test_which_share_reaches_a_loss(goal, share):
    """Between runs of 1/4, 1/2 and all steps that end at 2.5, 2.0 and 1.5."""
    assert optimizers.share_needed(goal, (0.25, 0.5, 1.0), (2.5, 2.0, 1.5)) == pytest.approx(share)


def test_means_over_seeds():
    format_mean = optimizers.format_mean
    assert format_mean(np.array([1.0, 2.0, 3.0])) == f"2.000 ± {1 / math.sqrt(3):.3f}"
    assert (format_mean(np.array([1.5])), format_mean(np.array([]))) == ("1.500", "—")
    assert format_mean(np.array([math.inf, math.inf])) == "not reached"
    assert format_mean(np.array([1.0, math.inf])) == "not by every seed"


@pytest.mark.parametrize("flag, message", [
    ("--models=AR,mask", "models: there is no 'mask'; choose from AR, masked, uniform, blocks of 4"),
    ("--seeds=1,1", "seeds=1,1: expected different numbers"),
    ("--seeds=x", "seeds=x: expected different numbers"),
    ("--seeds=", "seeds=: expected different numbers"),
    ("--lrs=0.1,high", "lrs=0.1,high: expected different numbers"),
    ("--lrs=0", "lrs=0: expected different numbers"),
    ("--lrs=nan", "lrs=nan: expected different numbers"),
    ("--models=AR,AR", "models=AR,AR: one of them comes twice"),
])  # fmt: skip
def test_what_it_refuses(capsys, flag, message):
    with pytest.raises(SystemExit):
        optimizers.main([flag], [])
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("flag, message", [
    ("--lr=3e-3", "--lr after --: that is what the study varies"),
    ("--seed=5", "--seed after --"),
    ("--objective=uniform", "--objective after --"),
    ("--ema=0", "--ema after --"),
    ("--steps=0 --tokens=5e4", "tokens and epochs after --: the study needs steps"),
])  # fmt: skip
def test_flags_for_every_run_that_it_refuses(capsys, flag, message):
    with pytest.raises(SystemExit):
        optimizers.main(["--models=AR", "--launch"], flag.split())
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_steps_of_a_schedule_are_shares_too(tmp_path):
    flags = ["--lr_schedule=wsd", "--decay=600"]
    short = optimizers.make_run(Trial("AR", "muon", 2e-3, 7, 0.5), Config(runs=str(tmp_path)), flags).settings
    assert (short.steps, short.warmup, short.decay) == (1000, 50, 300)


def run_study(*argv):
    command = [sys.executable, ROOT / "scaling.py", "study", "optimizer", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_launch_prints_the_search(corpus, tmp_path):
    done = run_study(f"--runs={tmp_path}", "--models=uniform", "--launch", "--", *SHORT, f"--corpus={corpus}")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 6 and not list(tmp_path.iterdir())
    for line in lines:
        words = line.split()
        assert words[:2] == ["python", "train.py"]
        settings = configurator.load(train.Config, words[2:])
        assert (settings.objective, settings.steps, settings.warmup) == ("uniform", 4, 2)


def test_a_run_that_fails_ends_the_study(corpus, tmp_path):
    """Once the run beside it has ended; its log says why."""
    done = run_study(f"--runs={tmp_path}", "--models=AR", "--jobs=2", "--", *SHORT, f"--corpus={corpus}",
                     "--unique_tokens=1000000000")
    assert done.returncode == 2 and done.stdout.count("train.py") == 2 and done.stderr.count("\n") == 1
    assert "exit code 2 from: python train.py" in done.stderr and "; see " in done.stderr
    log = tmp_path / "cpu/AR_adamw_lr0.001_share0.5_seed1.log"
    assert "unique_tokens" in log.read_text(encoding="utf-8")


@pytest.mark.slow  # the search over made-up runs, a real run's outcome and --launch are not
def test_end_to_end(corpus, tmp_path):
    """Real runs; again with nothing to do; drawn alone; half of it drawn."""
    tail = ("--", *SHORT, f"--corpus={corpus}", "--decay=0.5")
    first = run_study(f"--runs={tmp_path}", "--models=masked", "--seeds=1,2", "--jobs=2", *tail)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr
    table = tmp_path / "cpu/study_optimizer/table.md"
    text = table.read_text(encoding="utf-8")
    assert text in first.stdout and "—" not in text
    again = run_study(f"--runs={tmp_path}", "--models=masked", "--seeds=1,2", *tail)
    assert again.returncode == 0 and "train.py" not in again.stdout
    assert table.read_text(encoding="utf-8") == text
    more = run_study(f"--runs={tmp_path}", "--models=masked", "--seeds=1,2,3", "--draw", *tail)
    assert more.returncode == 2 and "not everything has been trained yet" in more.stderr
    assert "(2 of 3 seeds)" in table.read_text(encoding="utf-8")


def test_a_run_s_outcome(run_main):
    """Of a finished run the last validation, its average's, and the minutes of its steps."""
    folder = run_main("--steps=6", "--log_every=1", "--ema=0.9")
    metrics = read_metrics(folder)
    settings = train.Config(**json.loads((folder / "settings.json").read_text(encoding="utf-8")))
    done = optimizers.outcome(study.Run(folder, [], settings))
    last = [m for m in metrics if "val_loss" in m][-1]
    assert (done["val_loss"], done["val_ema"]) == (last["val_loss"], last["val_ema"])
    speed = np.median([m["tokens_per_s"] for m in metrics if "tokens_per_s" in m])
    assert done["minutes"] == pytest.approx(last["tokens"] / speed / 60)
