"""`scaling.py fit`: what it writes, what it says of data that carry no law, and bad input."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from known import PUBLISHED, run, write

from laws.fitting import read_fits
from laws.forms import EQ15, EQ21, evaluate

QUICK = ("--figures=False", "--bootstrap=20", "--jobs=1")
COEFFICIENTS = ("--figures=False", "--bootstrap=0", "--leave_out=False", "--jobs=1")


@pytest.fixture(scope="module")
def grid():
    """An IsoFLOP grid of two objectives whose optima are known: AR's N = 0.05·C^0.5, masked a third of it."""
    rows = []
    for objective, k in (("ar", 0.05), ("masked", 0.05 / 3)):
        for C in (1e18, 1e19, 1e20):
            for ratio in (0.25, 0.5, 1, 2, 4):
                N = k * C**0.5 * ratio
                loss = 3 - 0.2 * math.log10(C / 1e18) + 0.3 * math.log10(ratio) ** 2
                rows.append(dict(objective=objective, params=N, tokens=C / 6 / N, val_loss=loss))
    return rows


def isoflop(budgets, ratios):
    """Rows of an IsoFLOP grid with the optimum N = 1e7·(C/1e18)^0.5 and sizes at these ratios to it."""
    rows = []
    for C in budgets:
        for ratio in ratios:
            N = 1e7 * (C / 1e18) ** 0.5 * ratio
            loss = 3 + math.log10(ratio) ** 2 - math.log10(C) / 50
            rows.append(dict(params=N, tokens=C / 6 / N, loss=loss))
    return rows


def test_both_objectives_of_a_grid(capsys, grid, tmp_path):
    path, out = write(tmp_path / "points.csv", grid), tmp_path / "fit"
    code, text, err = run(capsys, "fit", f"--data={path}", f"--out={out}", "--laws=approach1", *QUICK)
    assert (code, err) == (0, "") and (out / "fits.md").read_text(encoding="utf-8").strip() in text
    for objective, k in (("ar", 0.05), ("masked", 0.05 / 3)):
        entry = json.loads((out / f"fits_{objective}.json").read_text(encoding="utf-8"))["approach1"]
        assert entry["coefficients"]["a"] == pytest.approx(0.5, abs=1e-6)
        assert entry["coefficients"]["k_N"] == pytest.approx(k, rel=1e-4)
        assert len(entry["draws"]) == 20 and entry["range"]["flops"] == pytest.approx([1e18, 1e20])
    ratios = re.findall(r"^\| 1e\+\d+ \| ([\d.]+) \|", text, re.M)
    assert ratios == ["3.00", "3.00"]  # masked wants three times the tokens


def test_curves_and_curves_held_out(capsys, tmp_path):
    c, fitted, held_out = PUBLISHED["eq21"], [], []
    for N in (2e7, 1e8, 5e8):
        for U in (1e7, 3e7, 1e8):
            rows = held_out if (N, U) == (1e8, 3e7) else fitted
            for e in np.logspace(0.1, 2.5, 20):
                loss = evaluate(EQ21, c, N, U, e).item()
                rows.append(dict(params=N, unique_tokens=U, epochs=e, val_loss=loss))
    data, other = write(tmp_path / "a.csv", fitted), write(tmp_path / "b.csv", held_out)
    code, text, err = run(capsys, "fit", f"--data={data}", f"--held_out={other}", f"--out={tmp_path / 'fit'}",
                          "--laws=eq21", *QUICK)
    assert (code, err) == (0, "") and "160 points of 8 curves" in text
    row = next(line for line in text.splitlines() if line.startswith("| eq21 | 7"))
    errors = [[float(x) for x in cell.split("/")] for cell in row.strip(" |").split(" | ")[3:]]
    seen, left_out, unseen = map(max, errors)
    assert seen < 1e-3 and left_out < 5e-3 and unseen < 2e-3

    fits, approach1, objective, name = read_fits(tmp_path / "fit/fits.json")
    assert (approach1, objective, name) == (None, "", "a")
    assert fits["eq21"].coefficients["b"] == pytest.approx(c["b"], rel=0.01)
    assert len(fits["eq21"].draws) == 20 and fits["eq21"].n_resampled == 8


def test_a_grid_without_a_valley_still_has_a_parametric_law(capsys, tmp_path):
    rows = []
    for C in (1e16, 3e16, 1e17):
        for N in (1e6, 2e6, 4e6):
            loss = 2 + 100 * N**-0.3 + 100 * (C / 6 / N) ** -0.3 - 0.2 * math.log(N / 1e6) ** 2
            rows.append(dict(params=N, tokens=C / 6 / N, loss=loss))
    data = write(tmp_path / "a.csv", rows)
    code, text, err = run(capsys, "fit", f"--data={data}", f"--out={tmp_path / 'o'}", *COEFFICIENTS)
    assert (code, err) == (0, "")
    assert "No approach 1: the budget of 1e+16 FLOPs has no minimum" in text and "| parametric | 5 |" in text


def test_what_the_data_do_not_determine_is_said(capsys, tmp_path):
    c, rng, rows = PUBLISHED["eq15"], np.random.default_rng(0), []
    for N in (1e7, 3e7, 1e8):
        for U in (1e7, 3e7, 1e8, 3e8):
            loss = evaluate(EQ15, c, N, U).item() * math.exp(rng.normal(0, 0.01))
            rows.append(dict(params=N, unique_tokens=U, epochs=1, loss=loss))
    data = write(tmp_path / "a.csv", rows)
    flags = (f"--data={data}", f"--out={tmp_path / 'o'}", "--laws=eq15")
    code, text, _ = run(capsys, "fit", *flags, *COEFFICIENTS)
    assert code == 0
    open_ones = re.findall(r"\| (\w) \| not determined by these data \(no token was seen twice\) \|", text)
    assert {"c", "g", "k", "m", "p"} <= set(open_ones)


def test_what_an_isoflop_grid_does_not_say(capsys, tmp_path):
    """One budget, a minimum outside the sizes, three sizes per budget."""
    data = tmp_path / "a.csv"
    fit = ("fit", f"--data={data}", f"--out={tmp_path / 'o'}")
    write(data, isoflop([1e18], (0.2, 0.5, 1, 2, 4)))
    text = run(capsys, *fit, *COEFFICIENTS)[1]
    assert "No approach 1: one budget of compute gives no power law" in text
    fit = (*fit, *QUICK, "--laws=approach1")
    write(data, isoflop([1e18, 1e19], (2, 4, 8, 16)))
    text = run(capsys, *fit)[1]
    assert "The minimum lies outside the sizes that were trained at 1e+18, 1e+19 FLOPs" in text
    write(data, isoflop([1e18, 1e19], (0.5, 1, 2)))
    text = run(capsys, *fit)[1]
    assert "no intervals for approach 1" in text and re.search(r"\| a \| 0\.5 \| – \|", text)


def test_half_a_result_overwrites_nothing(capsys, tmp_path):
    rows = [row | dict(objective="ar") for row in isoflop([1e15, 1e16], (0.3, 1, 3, 10))]
    data = write(tmp_path / "a.csv", [*rows, dict(objective="masked", params=1, tokens=1, loss=1)])
    out = tmp_path / "o"
    out.mkdir()
    (out / "fits_ar.json").write_text("mine", encoding="utf-8")
    code, _, err = run(capsys, "fit", f"--data={data}", f"--out={out}", "--laws=approach1", *COEFFICIENTS)
    assert (
        code == 2
        and "fewer than three sizes" in err
        and (out / "fits_ar.json").read_text(encoding="utf-8") == "mine"
    )
    assert "is not a folder" in run(capsys, "fit", f"--out={data}")[2]


def test_all_files_are_written_or_none(capsys, monkeypatch, tmp_path):
    data, out = write(tmp_path / "a.csv", isoflop([1e18, 1e19], (0.3, 0.6, 1, 2))), tmp_path / "new/o"
    fit = ("fit", f"--data={data}", f"--out={out}", "--laws=approach1", "--bootstrap=0")
    write_text = Path.write_text

    def fill_up(path, *args, **kwargs):
        if path.name == "fits.md":  # the last one
            raise OSError(28, "No space left on device")
        return write_text(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fill_up)
        code, _, err = run(capsys, *fit)
    assert code == 2 and "No space left" in err and not (tmp_path / "new").exists()
    assert run(capsys, *fit)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["fits.json", "fits.md", "valleys.png"]


def test_bad_input_is_one_line_and_writes_nothing(capsys, tmp_path):
    (tmp_path / "bad.csv").write_text("params,tokens,loss\n1e6,1e7,3\n1e6,x,3\n", encoding="utf-8")
    one = write(tmp_path / "one.csv", [dict(objective="ar", params=1, tokens=1, loss=1)])
    few = write(tmp_path / "few.csv", [dict(params=N, tokens=1e9, loss=3) for N in (1e6, 2e6, 4e6)])
    for flags, message in [
        (["--bootstrap=3"], "bootstrap=3: an interval needs 20 resamples or more"),
        (["--laws=eq99"], "'eq99' is not one of"),
        (["--objective=../.."], "objective='../..': a name becomes part of files' names"),
        ([f"--data={tmp_path / 'none.csv'}"], "No such file"),
        ([f"--data={tmp_path / 'bad.csv'}"], ":3: tokens=x: expected a number"),
        ([f"--data={tmp_path}"], "holds no finished runs"),
        ([f"--data={one}", "--objective=masked"], "no runs of objective"),
        ([f"--data={few}", "--laws=parametric"], "5 coefficients, there are only 3 runs"),
        ([f"--data={few}"], "5 coefficients, there are only 3 runs"),
    ]:
        code, _, err = run(capsys, "fit", *flags, f"--out={tmp_path / 'o'}", "--figures=False")
        assert code == 2 and message in err and len(err.splitlines()) == 1 and not (tmp_path / "o").exists()
