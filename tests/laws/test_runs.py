"""Runs from CSV files, and what is done to them before a fit."""

import numpy as np
import pytest

from laws.runs import Runs, objectives_in, read_csv, smooth_losses, thin_curves, write_csv


def test_numbers_may_have_units(tmp_path):
    (tmp_path / "x.csv").write_text("params,unique_tokens,epochs,loss\n1.5M,1B,,3\n", encoding="utf-8")
    runs = read_csv(tmp_path / "x.csv")
    assert (runs.N[0], runs.U[0], runs.e[0]) == (1.5e6, 1e9, 1)


def test_epochs_follow_from_tokens(tmp_path):
    text = "\ufeffparams,tokens,unique_tokens,objective,loss\n1e6,4e7,1e7,ar,3\n1e6,4e7,,,2\n"
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")  # as Excel writes it
    runs = read_csv(tmp_path / "x.csv")
    assert list(runs.U) == [1e7, 4e7] and list(runs.e) == [4, 1]
    assert objectives_in(tmp_path / "x.csv") == ["", "ar"]
    assert [list(read_csv(tmp_path / "x.csv", objective).loss) for objective in ("", "ar")] == [[2], [3]]


def test_a_curve_is_a_size_on_some_tokens(tmp_path):
    """Rows of one params, unique_tokens, seed and curve belong together; one without repeats stands alone."""
    rows = [(1, 10, 2, 1), (1, 10, 3, 1), (1, 10, 3, 2), (1, 20, 3, 1), (2, 10, 3, 1)]
    rows = [dict(params=N, unique_tokens=U, epochs=e, seed=seed, loss=3.0) for N, U, e, seed in rows]
    write_csv(rows, tmp_path / "x.csv")
    assert list(read_csv(tmp_path / "x.csv").curve) == [0, 0, 1, 2, 3]
    write_csv([dict(params=1, tokens=10, seed=1, loss=3.0)] * 2, tmp_path / "x.csv")
    assert list(read_csv(tmp_path / "x.csv").curve) == [0, 1]


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="none.csv: No such file"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="is not a CSV"):
        read_csv(tmp_path / "x.csv")
    assert objectives_in(tmp_path / "x.csv") == objectives_in(tmp_path / "none.csv") == [""]


@pytest.mark.parametrize("text, message", [
    ("params,loss\n1e6,3\n", "has no column tokens (or unique_tokens and epochs)"),
    ("N,L\n1,2\n", "has no column params and no column loss and no column tokens"),
    ("params;tokens;loss\n1;2;3\n", "separate columns by commas"),
    ("params,tokens,loss\n", "holds no runs"),
    ("", "holds no runs"),
    ("params,tokens,loss\n1e6,1e7,3\n1e6,x,3\n", ":3: tokens=x: expected a number"),
    ("params,tokens,loss\n1e6,1e7,-3\n", ":2: loss=-3: must be positive"),
    ("params,tokens,loss\n1e6,1e7\n", ":2: loss=: expected a number"),
    ("params,tokens,loss\n1e6,nan,3\n", ":2: tokens=nan: "),
    ("params,tokens,loss\n1e6,1e7,3,4\n", ":2: more cells than the header has"),
    ("params,tokens,unique_tokens,epochs,loss\n1e6,1e8,1e7,3,2\n",
     ":2: tokens=1e8: not unique_tokens · epochs = 3e+07"),
])  # fmt: skip
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as problem:
        read_csv(tmp_path / "x.csv")
    assert message in str(problem.value) and "\n" not in str(problem.value)


def test_rows_and_columns_of_empty_cells_are_no_runs(tmp_path):
    """As spreadsheets export them, before the header and below the runs; short rows are as good."""
    text = ",,,\nparams, tokens ,loss,\n1e6,1e7,3,\n , ,,\n\n2e6,1e7,2\n,,,\n,,,\n"
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    runs = read_csv(tmp_path / "x.csv")
    assert runs.N.tolist() == [1e6, 2e6] and runs.loss.tolist() == [3, 2]
    (tmp_path / "x.csv").write_text("params,tokens,loss\n,,\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no runs"):
        read_csv(tmp_path / "x.csv")


@pytest.mark.parametrize("text", [
    "params,tokens,loss\n\n\n1e6,1e7,3\n,,\n1e6,oops,3\n",
    'params,tokens,loss,note\n1e6,1e7,3,"two\nlines"\n\n\n1e6,oops,3,\n',
    'params,tokens,loss,note\n\n\n1e6,1e7,3,\n\n1e6,oops,3,"a\nb\nc"\n',
])  # fmt: skip
def test_a_wrong_cell_is_named_by_its_line_in_the_file(tmp_path, text):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="x.csv:6: tokens=oops"):
        read_csv(tmp_path / "x.csv")


@pytest.mark.parametrize("objective", ["../../ar", "a/b", "a\\b", "a\nb", "x" * 60])
def test_objectives_are_names_and_not_paths(tmp_path, objective):
    write_csv([dict(params=1e6, tokens=1e7, loss=3.0, objective=objective)], tmp_path / "x.csv")
    with pytest.raises(ValueError, match="x.csv:2: objective=.*becomes part of files' names"):
        read_csv(tmp_path / "x.csv")


def test_runs_that_diverged_are_left_out(tmp_path):
    rows = [dict(params=1e6, tokens=1e7, loss=loss) for loss in (3.0, float("nan"), 2.0, float("inf"))]
    write_csv(rows, tmp_path / "x.csv")
    assert read_csv(tmp_path / "x.csv").loss.tolist() == [3, 2]
    write_csv(rows[1:2], tmp_path / "x.csv")
    with pytest.raises(ValueError, match="has no runs that did not diverge"):
        read_csv(tmp_path / "x.csv")


def test_thin_curves_keep_their_ends():
    e = np.linspace(1, 1000, 500)
    runs = Runs(np.ones(500), np.ones(500), e, 1 + 1 / e, np.zeros(500, int))
    few = thin_curves(runs, 20)
    assert len(few.N) <= 40 and {few.e.min(), few.e.max()} == {1, 1000} and (few.e < 30).sum() > 5


def test_smoothed_losses():
    assert smooth_losses(np.full(1000, 3.0)) == pytest.approx(3.0) and len(smooth_losses(np.zeros(5))) == 5
    assert list(smooth_losses(np.array([1.0, 2.0]))) == [1, 2]
    line = np.linspace(0, 1, 10_000)
    assert smooth_losses(line)[2000:-2000] == pytest.approx(line[2000:-2000])

    one = smooth_losses(np.eye(1, 10_000, 5000)[0])
    assert np.count_nonzero(one) == 301 and one.sum() == pytest.approx(1)  # the paper's window
    assert np.count_nonzero(smooth_losses(np.eye(1, 200, 100)[0])) == 21

    noisy = smooth_losses(3 + np.random.default_rng(0).normal(0, 1, 20_000))
    assert noisy.std() < 0.12 and abs(noisy.mean() - 3) < 0.02
