"""The study of AR and masked diffusion on little text: its search, its table, and what it refuses."""

import csv
import math

import numpy as np
import pytest
from conftest import ROOT

from laws import data_constrained, study
from laws.data_constrained import Config, Study, Trial

BEST = {  # of the runs made up here
    "ar": dict(size="2x80", dropout=0.1, weight_decay=2.0, input_mask=0.2),
    "masked": dict(size="2x48", dropout=0.3, weight_decay=0.5, input_mask=0.0),
}


def made_up_loss(trial):
    """Every setting that is the best takes 0.1 off; diffusion is behind by 0.05, a seed by a hundredth."""
    right = sum(getattr(trial, name) == best for name, best in BEST[trial.objective].items())
    return 3 - 0.1 * right + 0.05 * (trial.objective == "masked") + trial.seed / 100


@pytest.fixture
def made_up(monkeypatch):
    """Runs that are finished as soon as they are asked for: {folder's name: trial}, in their order."""
    trained, trials = {}, {}
    make_run = data_constrained.make_run

    def remember(trial, cfg, flags):
        run = make_run(trial, cfg, flags)
        trials[run.folder.name] = trial
        return run

    def outcome(run):
        if run.folder.name not in trained:
            return None
        loss = made_up_loss(trained[run.folder.name])
        return dict(tokens=1000, best=loss, epochs=7.0, of="raw", last=loss + 1)

    def curve(run):
        return np.array([0.0, 7.0, 9.0]), np.array([5.0, 3.0, 4.0]), np.array([5.0, 3.1, 3.9])

    monkeypatch.setattr(data_constrained, "make_run", remember)
    monkeypatch.setattr(data_constrained, "outcome", outcome)
    monkeypatch.setattr(data_constrained, "curve_of", curve)
    monkeypatch.setattr(study, "check_machine", lambda runs, cfg: None)
    monkeypatch.setattr(study, "train_all", lambda runs, cfg: trained.update(
        (run.folder.name, trials[run.folder.name]) for run in runs))
    return trained


def test_one_setting_after_the_other_and_then_all_seeds(made_up, tmp_path, capsys):
    data_constrained.main(["--budgets=3e3", "--seeds=4,5", f"--runs={tmp_path}"], [])
    trials = list(made_up.values())
    for objective, best in BEST.items():
        own = [trial for trial in trials if trial.objective == objective]
        n_searched = 4 + 2 + 2 + (2 if objective == "ar" else 0)
        assert len(own) == n_searched + 1  # the best once more, with the second seed
        assert {trial.seed for trial in own[:n_searched]} == {4}
        assert own[-1] == Trial(3000, objective, **best, seed=5)

    text = (tmp_path / "tiny/study/table.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| 3,000 | ar | 2x80 | 0.1 | 2 | 0.2 | 2.645 ± 0.005 | 7 |  |" in text
    # that diffusion has no masked inputs counts as one right setting of four
    assert "| 3,000 | masked | 2x48 | 0.3 | 0.5 |  | 2.695 ± 0.005 | 7 | +0.050 ± 0.007 |" in text
    assert "| 3,000 | ar | dropout | 0.0: 2.940, 0.1: 2.840, 0.3: 2.940 |" in text
    with open(tmp_path / "tiny/study/runs.csv", encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(trials)
    assert (tmp_path / "tiny/study/curves.png").is_file()


def test_the_verdict():
    def found(ar, masked):
        return dict(ar=(None, np.array(ar)), masked=(None, np.array(masked)))

    assert data_constrained.verdict_of(found([2.0, 2.2], [2.5, 2.5])) == "+0.400 ± 0.100"
    assert data_constrained.verdict_of(found([2.0], [1.5, 1.7])) == "-0.400"
    assert data_constrained.verdict_of(found([], [1.5])) == "—"


def test_a_run_counts_with_its_lowest_validation_of_weights_or_averages(tmp_path, monkeypatch):
    lines = [dict(step=1, tokens=3000, val_loss=9.0, val_ema=9.1),
             dict(step=2, tokens=6000, val_loss=2.5),
             dict(step=3, tokens=9000, val_loss=2.6, val_ema=2.4),
             dict(step=4, tokens=12000, val_loss=math.nan)]
    lines = [line | dict(objective="masked", val_bpb=1.0) for line in lines]
    run = data_constrained.make_run(Trial(3000, "masked", "2x48", 0.0, 0.05, 0.0, 1), Config(), [])
    monkeypatch.setattr(study, "is_finished", lambda run, ignored: True)
    monkeypatch.setattr(data_constrained, "read_metrics", lambda folder: lines)
    done = data_constrained.outcome(run)
    assert done == dict(tokens=12000, best=2.4, epochs=3.0, of="averaged", last=math.inf)


def test_what_a_run_is():
    """A run differs from the others in what the trial says; only AR has masked inputs."""
    cfg = Config()
    trials = (Trial(10000, objective, "3x160", 0.1, 0.5, 0.2, 7) for objective in ("ar", "masked"))
    ar, masked = (data_constrained.make_run(trial, cfg, []).settings for trial in trials)
    assert (ar.ar_input_mask, masked.ar_input_mask) == (0.2, 0.0)
    for run in (ar, masked):
        assert (run.n_layer, run.d_model, run.dropout, run.weight_decay, run.seed) == (3, 160, 0.1, 0.5, 7)
        assert run.unique_tokens == 10000 and run.steps * run.batch_size * run.seq_len == 2_048_000
        assert run.lr == pytest.approx(2e-3 * math.sqrt(128 / 160), rel=1e-3)
    trials, _ = Study(Config(budgets="1e4", input_masks="0.2,0.5"), []).next_trials(10000, "masked")
    assert {trial.input_mask for trial in trials} == {0.0}
    assert Study(Config(budgets="1e4"), []).pairs == [(10000, "ar"), (10000, "masked")]
    trial, cfg = Trial(50_000_000, "ar", "85M", 0.1, 0.5, 0.2, 7), Config(scale="gpu")
    assert data_constrained.make_run(trial, cfg, []).settings.model == "85M"


@pytest.mark.parametrize("argv, flags, message", [
    (["--budgets=0"], [], "budgets=0: expected different numbers"),
    (["--dropouts=0,1"], [], "dropouts=0,1: expected different numbers"),
    (["--seeds=1,1"], [], "seeds=1,1: expected different numbers"),
    (["--sizes=2x48,2x48"], [], "one of them comes twice"),
    (["--sizes=2x50", "--launch"], [], "'2x50' is neither a name of the ladder nor LAYERSxWIDTH"),
    (["--launch"], ["--dropout=0.5"], "--dropout after --: that is what the study varies"),
])  # fmt: skip
def test_what_it_refuses(capsys, argv, flags, message):
    with pytest.raises(SystemExit):
        data_constrained.main(argv, flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_committed_table_is_of_the_committed_runs():
    """Its bests, and what the README says of them."""
    folder = ROOT / "results/data_constrained_cpu"
    with open(folder / "runs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    text = (folder / "table.md").read_text(encoding="utf-8")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    names = "size", "dropout", "weight_decay", "input_mask"
    for budget in ("3000", "10000"):
        means = {}
        for objective in ("ar", "masked"):
            own = [row for row in rows if (row["budget"], row["objective"]) == (budget, objective)]
            best = min((row for row in own if row["seed"] == "1"), key=lambda row: float(row["best"]))
            alike = [float(row["best"]) for row in own if all(row[name] == best[name] for name in names)]
            assert len(alike) == 2
            means[objective] = np.mean(alike)
            error = np.std(alike, ddof=1) / math.sqrt(2)
            assert f"{means[objective]:.3f} ± {error:.3f}" in text and f"{means[objective]:.3f}" in readme
        assert f"{means['masked'] - means['ar']:+.3f} ±" in text
