"""What data determine of a law, and intervals that are not narrower than the data allow."""

import json
import math

import numpy as np
import pytest
from known import KNOWN, run, simulated, write

from laws.drawing import Group, drawable
from laws.fitting import Fit, bootstrap, fit_law, read_fits
from laws.forms import EQ15, LAWS, PARAMETRIC, QUOKKA, allocation, evaluate
from laws.identifiability import (
    interval,
    is_determined,
    undetermined_coefficients,
    vanished_coefficients,
    why_undetermined,
)
from laws.runs import Runs, data_range

TRUTH = dict(E=1.8, A=400.0, a=0.34, B=410.0, b=0.28)


def runs_of(N, D, noise=0.0, seed=0):
    """Runs of the parametric law, every token seen once."""
    N, D = np.broadcast_arrays(np.asarray(N, float), np.asarray(D, float))
    error = np.random.default_rng(seed).normal(0, noise, N.size)
    loss = evaluate(PARAMETRIC, TRUTH, N, D) * np.exp(error)
    return Runs(N.copy(), D.copy(), np.ones(N.size), loss, np.arange(N.size))


def fitted(runs, law=PARAMETRIC, start=TRUTH):
    return fit_law(law, runs, start=start, jobs=1)._replace(data_range=data_range(runs))


def exponent(c):
    """Of the compute-optimal N."""
    return allocation(c)["a"]


SIZES = np.geomspace(1e5, 1e8, 8)
RATIO = "every run has 20 tokens per parameter"
TOO_FEW = "too few runs, or too alike"
ALIKE = {
    "one ratio": (runs_of(SIZES, 20 * SIZES), "EAaBb", RATIO),
    "one ratio, noise": (runs_of(SIZES, 20 * SIZES, 0.002), "EAaBb", RATIO),
    "nearly one ratio": (runs_of(SIZES, SIZES * np.linspace(19, 21, 8)[::-1]), None, RATIO),
    "one size": (runs_of(1e7, 20 * SIZES), "EAa", "every run has 10M parameters"),
    "two sizes": (runs_of(np.repeat([1e7, 3e7], 8), np.tile(20 * SIZES, 2)), "EAa", TOO_FEW),
    "one amount of tokens": (runs_of(SIZES, 1e9), "EBb", "every run has 1B tokens"),
    "five runs": (runs_of(SIZES[[0, 1, 3, 5, 7]], [1e8, 1e9, 1e8, 1e9, 3e8], 0.001), None, TOO_FEW),
}


@pytest.mark.parametrize("name", ALIKE)
def test_coefficients_that_the_data_cannot_tell_apart(name):
    runs, names, reason = ALIKE[name]
    fit = fitted(runs)
    found = undetermined_coefficients(fit)
    assert found and (names is None or found == list(names))
    assert why_undetermined(fit) == reason
    assert not is_determined(fit, exponent)
    # the loss where the runs are is known all the same
    assert is_determined(fit, lambda c: evaluate(PARAMETRIC, c, runs.N[3], runs.U[3]).item())


def test_a_term_that_the_fit_has_dropped_may_be_open():
    """With one amount of tokens the fit may as well put B/D^b into E: then E is as open as B."""
    runs = runs_of(SIZES, 1e9)
    dropped = dict(TRUTH, E=TRUTH["E"] + TRUTH["B"] * 1e9 ** -TRUTH["b"], B=1e-40)
    fit = fitted(runs, start=dropped)
    assert fit.coefficients["B"] < 1e-30 and undetermined_coefficients(fit) == ["E", "B", "b"]
    runs = runs_of(1e7, 20 * SIZES)
    fit = fitted(runs, start=dict(TRUTH, E=1e-40, A=(TRUTH["E"] + TRUTH["A"] * 1e7**-0.34) * 1e7**0.34))
    assert fit.coefficients["E"] < 1e-30 and undetermined_coefficients(fit) == ["E", "A", "a"]


@pytest.mark.parametrize("name", LAWS)
def test_curves_and_isoflop_grids_determine_their_laws(name):
    runs = simulated(name, 0.004 if name == "parametric" else 0.01)
    fit = fitted(runs, LAWS[name], KNOWN[name])
    # the simulated curves' A/N^a is a billionth of a nat by eq. 23
    assert undetermined_coefficients(fit) == (["A", "a"] if name == "eq23" else [])


def test_the_committed_fits_are_determined():
    """Eq. 15 has sent its E to 0, and says so; that leaves nothing open."""
    fits = read_fits(QUOKKA / "isoflop/fits.json").fits | read_fits(QUOKKA / "epochs/fits.json").fits
    for fit in fits.values():
        assert len(fit.axes) and undetermined_coefficients(fit) == []
        assert vanished_coefficients(fit) == (["E"] if fit.law is EQ15 else [])


def test_no_interval_is_narrower_than_gauss_newtons():
    """Not where resamples agree by chance; wide resamples stay as they are."""
    runs = runs_of(np.repeat(SIZES, 4), np.tile(20 * SIZES[::2], 8), noise=0.002)
    fit = fitted(runs)
    narrow = fit._replace(draws=[fit.coefficients] * 50, n_resampled=32)
    for name, value in fit.coefficients.items():
        low, high = interval(narrow, lambda c, name=name: c[name])
        half = np.linalg.norm([axis[list(TRUTH).index(name)] for axis in fit.axes])
        assert math.log(high / value) == pytest.approx(half, rel=1e-3)
        assert math.log(value / low) == pytest.approx(half, rel=1e-3)
    low, high = interval(narrow, lambda c: -exponent(c))  # not in logarithms
    assert high - low == pytest.approx(np.diff(interval(narrow, exponent))[0], rel=0.1)

    draws = [fit.coefficients | dict(a=a) for a in np.linspace(0.1, 0.9, 50)]
    low, high = interval(fit._replace(draws=draws, n_resampled=32), lambda c: c["a"])
    assert low < 0.12 and high > 0.88


def test_resamples_are_refitted_to_convergence():
    """From the optimum on as well as from the truth: the same minimum."""
    runs = simulated("parametric", 0.004, seed=1)
    fit = fit_law(PARAMETRIC, runs, jobs=1)
    near, far = (bootstrap(fit._replace(coefficients=c), runs, 5, jobs=1).draws
                 for c in (fit.coefficients, dict(E=1.5, A=100.0, a=0.25, B=1e4, b=0.45)))
    for one, other in zip(near, far):
        assert exponent(one) == pytest.approx(exponent(other), abs=1e-3)


@pytest.fixture(scope="module")
def ratio_csv(tmp_path_factory):
    runs = runs_of(SIZES, 20 * SIZES)
    rows = [dict(params=f"{N:.4g}", tokens=f"{D:.4g}", loss=f"{loss:.4f}")
            for N, D, loss in zip(runs.N, runs.U, runs.loss)]
    return write(tmp_path_factory.mktemp("ratio") / "ratio.csv", rows)


def test_fit_says_what_is_open_and_plan_refuses(capsys, ratio_csv, tmp_path):
    flags = (f"--data={ratio_csv}", f"--out={tmp_path}", "--jobs=1", "--figures=False", "--leave_out=False")
    code, text, err = run(capsys, "fit", *flags, "--bootstrap=0")
    assert (code, err) == (0, "")
    names = [*TRUTH, *(f"{name} of the optimum" for name in ("k_N", "a", "k_D", "b"))]
    for name in names:
        assert f"| {name} | not determined by these data ({RATIO}) | – |" in text

    code, out, err = run(capsys, "plan", "--params=1M", f"--fits={tmp_path}")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "no plan by approach 2 of ratio: its data do not determine E, A, a, B, b (every run has 20" in err


def test_plan_goes_by_what_is_determined(capsys, ratio_csv, tmp_path):
    """A law that is not leaves the others of its file alone."""
    fit = fitted(runs_of(SIZES, 20 * SIZES))
    entry = dict(coefficients=fit.coefficients, objective=0.0, draws=[], units=0, range=fit.data_range)
    approach1 = dict(coefficients=dict(k_N=0.02, a=0.5, k_D=8.3, b=0.5), draws=[], range=fit.data_range)
    about = dict(objective="masked", data="mine")
    entries = dict(about=about, approach1=approach1, parametric=entry | dict(axes=fit.axes))
    (tmp_path / "fits.json").write_text(json.dumps(entries), encoding="utf-8")
    code, out, _ = run(capsys, "plan", "--params=1M", f"--fits={tmp_path}")
    assert code == 0 and "suggested for masked: approach 1 of mine" in out
    assert "* no plan by approach 2 of mine: its data do not determine" in out
    assert "  approach 2 of mine" not in out

    entries["parametric"] = entry  # of a version that kept no axes
    (tmp_path / "fits.json").write_text(json.dumps(entries), encoding="utf-8")
    assert "  approach 2 of mine" in run(capsys, "plan", "--params=1M", f"--fits={tmp_path}")[1]


def test_figures_of_optima_leave_out_what_is_open():
    runs = runs_of(SIZES, 20 * SIZES)
    group = Group("masked", runs, dict(parametric=fitted(runs)))
    assert drawable([group], False, with_laws=True) == [group]  # its losses are known
    with pytest.raises(ValueError, match="with a fitted law that they determine"):
        drawable([group], False, with_optima=True)


def held(seed, spread, noise):
    """Whether a study of eight runs near one ratio has an interval that holds the exponent, or gives none."""
    factor = np.exp(np.random.default_rng(seed).normal(0, spread, 8))
    runs = runs_of(SIZES, 20 * SIZES * factor, noise, seed)
    fit = bootstrap(fit_law(PARAMETRIC, runs, start=TRUTH, jobs=1), runs, 20, seed, 1)
    if not is_determined(fit, exponent):
        return None
    low, high = interval(fit, exponent)
    return low <= exponent(TRUTH) <= high


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_intervals_hold_the_truth_near_one_ratio(spread):
    answers = [held(seed, spread, 0.002) for seed in range(20)]
    given = [answer for answer in answers if answer is not None]
    assert np.mean(given or [1.0]) >= 0.8 and (spread or not given)


def test_a_fit_without_draws_has_no_axes_to_judge_by():
    approach1 = Fit(None, dict(k_N=0.02, a=0.5), draws=[dict(k_N=0.02, a=0.5)] * 20)
    assert undetermined_coefficients(approach1) == [] and is_determined(approach1, lambda c: c["a"])
    assert tuple(interval(approach1, lambda c: c["a"])) == (0.5, 0.5)
