"""The exam of extrapolation: its parts, what it finds of laws whose truth is known, its files."""

import csv
import math

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from known import run

from laws import exam
from laws.forms import CHINCHILLA_3, EQ15, OURS, PARAMETRIC, QUOKKA, evaluate, published_coefficients
from laws.runs import Runs, read_csv


def simulated(noise=0.002, seed=0, sizes=8, budgets=5, law=PARAMETRIC, c=CHINCHILLA_3):
    """Runs of one epoch, some sizes at some budgets, of a law with scatter."""
    N = np.tile(np.geomspace(1e7, 2e9, sizes), budgets)
    flops = np.repeat(np.geomspace(1e18, 1e21, budgets), sizes)
    D = flops / (6 * N)
    loss = evaluate(law, c, N, D) * np.exp(np.random.default_rng(seed).normal(0, noise, len(N)))
    return Runs(N, D, np.ones_like(N), loss, np.arange(len(N)))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.floats(0.5, 90)), min_size=4, max_size=60))
def test_every_point_is_fitted_or_judged_and_the_rest_lies_beyond(points):
    N, U, e = (np.array(column, float) for column in zip(*points))
    curve = np.unique(np.stack((N, U)), axis=1, return_inverse=True)[1].ravel()
    runs = Runs(N * 1e7, U * 1e7, e, np.ones(len(N)), curve)
    for name, fitted, judged in exam.splits_of(runs):
        assert len(fitted.N) + len(judged.N) == len(N) and len(fitted.N) and len(judged.N)
        if "parameters" in name:
            assert fitted.N.max() < judged.N.min()
        elif "unique" in name:
            assert fitted.U.max() < judged.U.min()
        elif "epochs" in name:
            assert fitted.e.max() <= 30 < judged.e.min()
        else:
            assert not set(fitted.curve) & set(judged.curve)
            dearest = max(fitted.flops[fitted.curve == k].max() for k in set(fitted.curve))
            assert dearest < min(judged.flops[judged.curve == k].max() for k in set(judged.curve))


def test_where_the_papers_data_are_split():
    curves = exam.splits_of(read_csv(QUOKKA / "epoch_curves.csv"))
    assert [part.name for part in curves] == [
        "below 200M parameters → above", "below 50M unique tokens → above", "the first 30 epochs → the rest",
        "the cheapest 25% → the rest", "the cheapest 50% → the rest"]
    once = exam.splits_of(read_csv(QUOKKA / "isoflop_points.csv"))
    assert [part.name for part in once] == [
        "below 200M parameters → above", "the cheapest 25% → the rest", "the cheapest 50% → the rest"]
    assert once[0].fitted.N.max() < 2e8 <= once[0].judged.N.min()


def test_the_right_law_carries_and_its_intervals_hold():
    """Over three simulated studies; the runs of one fit stand or fall together."""
    found = [exam.examine(PARAMETRIC, part, 30, jobs=1)
             for seed in (1, 2, 3) for part in exam.splits_of(simulated(seed=seed))]
    assert all(row["determined"] and row["error_points"] < 0.01 for row in found)
    assert all(row["covered"] <= row["covered_with_scatter"] for row in found)
    assert np.mean([row["covered_with_scatter"] for row in found]) > 0.9


def test_a_wrong_law_is_found_out():
    """Runs whose loss jumps by a tenth above 200M parameters: the law is biased, and its intervals miss."""
    runs = simulated()
    runs = runs._replace(loss=np.where(runs.N < 2e8, runs.loss, 1.1 * runs.loss))
    found = exam.examine(PARAMETRIC, exam.splits_of(runs)[0], 30, jobs=1)
    assert found["bias"] == pytest.approx(-math.log(1.1), abs=0.02)
    assert found["error_points"] == pytest.approx(math.log(1.1), abs=0.02) and found["covered"] < 0.2


def test_a_part_with_fewer_runs_than_coefficients():
    runs = simulated(sizes=3, budgets=1)
    part = exam.Split("x → y", runs, runs)
    assert exam.examine(OURS, part, 20, jobs=1) is None
    line = exam.table_line(dict(split="x → y", fitted=3, judged=3, law="ours"), [])
    assert line == "| x → y | 3 → 3 | ours | | — | | |"


def test_the_command(capsys, tmp_path):
    """Table, CSV and figure of a file of one's own; a law that is left open is marked."""
    runs = simulated(sizes=5, budgets=4)
    lines = [f"{N:.0f},{D:.0f},{loss:.6f}" for N, D, loss in zip(runs.N, runs.U, runs.loss)]
    (tmp_path / "mine.csv").write_text("params,tokens,loss\n" + "\n".join(lines) + "\n", encoding="utf-8")
    code, output, error = run(capsys, "fit", "--exam", f"--data={tmp_path / 'mine.csv'}", "--bootstrap=20",
                              "--jobs=1", f"--out={tmp_path / 'exam'}")
    assert code == 0, error
    text = (tmp_path / "exam/exam.md").read_text(encoding="utf-8")
    assert text in output and "| the cheapest 50% → the rest | 10 → 10 | parametric | 5 | " in text
    with open(tmp_path / "exam/exam.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["split"] for row in rows] == [
        "below 200M parameters → above", "the cheapest 25% → the rest", "the cheapest 50% → the rest"]
    marked = ["parametric*" in line for line in text.splitlines() if "| parametric" in line]
    assert marked == [row["determined"] == "False" for row in rows] and any(marked)
    assert (tmp_path / "exam/exam.png").is_file()
    one = tmp_path / "one.csv"
    one.write_text("params,tokens,loss\n1e8,1e9,3\n", encoding="utf-8")
    code, _, error = run(capsys, "fit", "--exam", f"--data={one}", f"--out={tmp_path / 'no'}")
    assert code == 2 and "too few runs" in error and not (tmp_path / "no").exists()
    refused = {"--bootstrap=0": "exam needs bootstrap", "--laws=approach1": "approach1 is none",
               "--held_out=x.csv": "held_out is not for exam", "--objective=ar": "objective:"}
    for flag, problem in refused.items():
        code, _, error = run(capsys, "fit", "--exam", flag)
        assert code == 2 and problem in error and error.count("\n") == 1


def test_laws_of_repeated_text_are_examined_on_curves():
    """Curves that follow eq. 15 are found by eq. 15, fitted to their first half of sizes."""
    c = published_coefficients()["eq15"]
    N, U = (x.ravel() for x in np.meshgrid(np.geomspace(3e7, 1e9, 6), np.geomspace(1e7, 1e8, 3)))
    e = np.geomspace(1, 300, 12)
    N, U, e, curve = (np.repeat(N, 12), np.repeat(U, 12), np.tile(e, 18), np.repeat(np.arange(18), 12))
    runs = Runs(N, U, e, evaluate(EQ15, c, N, U, e), curve)
    part = exam.splits_of(runs)[0]
    assert exam.examine(EQ15, part, 20, jobs=1)["error_curves"] < 0.01


def test_the_committed_table_is_of_the_committed_rows():
    folder = ROOT / "results/laws_exam"
    text = (folder / "exam.md").read_text(encoding="utf-8")
    with open(folder / "exam.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["data"] for row in rows} == {exam.data_name(path) for path in exam.COMMITTED}
    for row in rows:
        if row["error_curves"]:
            assert f"{float(row['error_points']):.4f} / {float(row['error_curves']):.4f}" in text
    assert {row["law"] for row in rows} >= {"parametric", "eq15", "eq21", "eq23", "half_life", "ours"}
