"""Predictions of runs, surprises, and which run to train next: against simulated studies and brute force."""

import csv
import math

import numpy as np
import pytest
from conftest import ROOT
from known import run
from test_exam import simulated

from laws import predictions
from laws.fitting import Regression, fit_law
from laws.forms import CHINCHILLA_3, PARAMETRIC, allocation
from laws.runs import Runs, write_csv


def write_known(path, runs, objective="masked"):
    write_csv([dict(params=N, tokens=D, loss=loss, objective=objective)
               for N, D, loss in zip(runs.N, runs.U, runs.loss)], path)
    return path


def test_predictions_hold_of_runs_like_the_known_ones():
    """Nineteen of twenty new runs of simulated studies lie within their intervals, or nearly so many."""
    inside = []
    for seed in range(4):
        known, new = simulated(seed=seed), simulated(seed=100 + seed, sizes=5, budgets=4)
        planned = [(f"run {i}", "masked", N, D) for i, (N, D) in enumerate(zip(new.N, new.U))]
        rows = predictions.predict_runs(known, planned)
        inside += [abs(predictions.surprise(row, loss)) <= 1 for row, loss in zip(rows, new.loss)]
        assert all(row["low"] < row["loss"] < row["high"] and row["fitted"] == 40 for row in rows)
    assert np.mean(inside) > 0.9


def test_surprise_is_in_halves_of_the_interval():
    row = dict(loss=2.0, low=1.9, high=2.2)
    assert predictions.surprise(row, 2.0) == 0
    assert predictions.surprise(row, 2.2) == pytest.approx(1) and predictions.surprise(row, 1.9) == -1
    assert predictions.surprise(row, 2.42) == pytest.approx(2)
    rows = predictions.compare_seen({"a": row | dict(name="a"), "b": row | dict(name="b")},
                                    [dict(name="a", val_loss="2.42"), dict(name="c", val_loss="1")])
    assert rows["a"]["seen"] == 2.42 and "seen" not in rows["b"]
    assert predictions.describe(rows["a"]) == "2.000 [1.900, 2.200], seen 2.420 (+2.00)"
    assert predictions.summary(rows).startswith("0 of 1 runs are within")
    assert predictions.summary({"b": rows["b"]}) is None


def test_they_are_read_as_they_are_written(tmp_path):
    rows = predictions.predict_runs(simulated(), [("x", "masked", 1e8, 1e10), ("y", "ar", 1e9, 1e10)])
    rows = predictions.compare_seen({row["name"]: row for row in rows}, [dict(name="y", val_loss=2.5)])
    predictions.write_predictions(tmp_path / "sweep", rows)
    back = predictions.read_predictions(tmp_path / "sweep")
    assert back.keys() == rows.keys() and "seen" not in back["x"]
    for name, row in rows.items():
        assert back[name].keys() == row.keys() and back[name]["objective"] == row["objective"]
        numbers = [key for key, value in row.items() if not isinstance(value, str)]
        assert [back[name][key] for key in numbers] == pytest.approx([row[key] for key in numbers], rel=1e-6)
    assert predictions.read_predictions(tmp_path / "nowhere") == {}


def test_the_next_run_narrows_as_much_as_a_fit_with_it_would():
    """The rank-one update is the covariance of all runs together; the optimum's slope is a difference."""
    known, flops = simulated(), 1e23
    width, runs = predictions.next_runs(known, flops)
    fit = fit_law(PARAMETRIC, known)
    regression = Regression(PARAMETRIC, known)
    theta = regression.theta(fit.coefficients)

    def ln_optimum(theta):
        power = allocation(regression.coefficients(theta))
        return math.log(power["k_N"] * flops ** power["a"])

    steps = 1e-5 * np.eye(len(theta))
    slope = np.array([(ln_optimum(theta + h) - ln_optimum(theta - h)) / 2e-5 for h in steps])
    J = regression.slopes(theta)

    def spread(rows):
        return math.sqrt(slope @ np.linalg.inv(rows.T @ rows) @ slope)

    for best in (runs[0], runs[len(runs) // 2], runs[-1]):
        one = [np.array([x]) for x in (best.params, best.tokens, 1.0, 1.0, 0.0)]
        added = Regression(PARAMETRIC, Runs(*one), regression.constants).slopes(theta)
        expected = spread(np.vstack((J, added))) / spread(J)
        assert best.width / width == pytest.approx(expected, rel=1e-4)
        assert best.width < width
    gains = [(width - run.width) / run.flops for run in runs]
    assert gains == sorted(gains, reverse=True)
    assert max(run.flops for run in runs) <= 4 * known.flops.max() * (1 + 1e-9)


def test_plan_says_which_run_is_next(capsys, tmp_path):
    path = write_known(tmp_path / "runs.csv", simulated())
    code, output, error = run(capsys, "plan", f"--from={path}", "--flops=1e23")
    assert code == 0, error
    optimum = allocation(CHINCHILLA_3)
    N = optimum["k_N"] * 1e23 ** optimum["a"]
    found = output.split("N_opt is ")[1].split(",")[0]
    assert float(found.removesuffix("B")) * 1e9 == pytest.approx(N, rel=0.2)
    table = output.split("then a factor of\n")[1].splitlines()
    assert len(table) == 5 and all(len(line.split()) == 4 for line in table)
    for flags, problem in (([f"--from={path}", "--params=1B"], "from needs flops or days"),
                           ([f"--from={path}", "--flops=1e23", "--objective=ar"], "no runs of objective ar"),
                           (["--from=nowhere", "--flops=1e23"], "nowhere")):
        code, _, error = run(capsys, "plan", *flags)
        assert code == 2 and problem in error and error.count("\n") == 1, error


def test_few_runs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="runs"):
        predictions.predict_runs(simulated(sizes=2, budgets=1), [("x", "masked", 1e8, 1e10)])


def test_the_committed_predictions_are_of_the_committed_runs():
    """Twelve runs, each with its prediction, and what the README says of them."""
    folder = ROOT / "results/predictions_cpu"
    rows = predictions.read_predictions(folder)
    with open(folder / "points.csv", encoding="utf-8", newline="") as file:
        seen = {row["name"]: float(row["val_loss"]) for row in csv.DictReader(file)}
    assert len(rows) == 12 and rows.keys() == seen.keys()
    for name, row in rows.items():
        assert row["seen"] == pytest.approx(seen[name])
        assert row["surprise"] == pytest.approx(predictions.surprise(row, seen[name]), rel=1e-3)
    inside = sum(abs(row["surprise"]) <= 1 for row in rows.values())
    assert f"**{inside} of 12**" in (folder / "README.md").read_text(encoding="utf-8")
