"""Scaling laws: the paper's tables cell by cell, fits that find what was put in, intervals that cover it, choices that are optimal."""

import csv
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import scaling
from laws import laws
from laws.laws import EQ15, EQ21, EQ23, HALF_LIFE, LAWS, OURS, PARAMETRIC, Runs

QUOKKA = Path(__file__).parent.parent.parent / "results/quokka"
OWN = laws.published()
OURS_FITTED = scaling.known_laws(QUOKKA / "epochs/fits.json")[0]["ours"][0]
# Coefficients of every law, such that all of their terms count on the grid below.
KNOWN = {
    "parametric": dict(E=2.0, A=600.0, a=0.38, B=3000.0, b=0.37), "half_life": dict(laws.MUENNIGHOFF, R_D=6.0),
    "eq15": OWN["eq15"] | dict(E=0.5), "eq21": OWN["eq21"], "eq23": OWN["eq23"] | dict(E=0.7), "ours": OURS_FITTED.coefficients,
}  # fmt: skip


def read(name):
    with open(QUOKKA / name, newline="") as file:
        return list(csv.DictReader(file))


def printed(text):
    """'39.3 B' as a number and the size of its last digit."""
    digits, unit = re.fullmatch(r"([\d.]+(?:e[+-]\d+)?) ?([MBT]?)", text).groups()
    scale = dict(M=1e6, B=1e9, T=1e12).get(unit, 1)
    mantissa, _, power = digits.partition("e")
    return float(digits) * scale, 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2])) * scale


def agrees(value, text):
    """Whether a value rounds to what is printed."""
    number, step = printed(text)
    return abs(value - number) <= step / 2 * (1 + 1e-9)


# ------------------------------------------------------------------------------------------------- the paper's tables


def test_table_2():
    cells = [(value, row[column]) for row, (_, *values) in zip(read("table2.csv"), scaling.tables()[2])
             for value, column in zip(values, ("Quokka FLOPs", "Quokka Tokens"))]
    assert len(cells) == 18 and all(agrees(*cell) for cell in cells)


def test_table_3():
    cells = [(value, text) for row, (_, *values) in zip(read("table3.csv"), scaling.tables()[3]) for value, text in zip(values, list(row.values())[1:])]
    assert len(cells) == 81 and all(round(value) == int(text) for value, text in cells)


def test_table_4():
    """The printed 10M row is not on the 50 × 50 grid on which the others are; every other cell agrees."""
    rows = [all(agrees(value, row[column]) for value, column in zip(values, ("Parameters", "Epochs", "FLOPs")))
            for row, (_, *values) in zip(read("table4.csv"), scaling.tables()[4])]
    assert rows == [False] + [True] * 8
    grid = np.logspace(0, 5, 50)
    assert not any(round(e) == 247 for e in grid)


def test_table_5():
    columns = ("Approach 1 FLOPs", "Approach 1 Tokens", "Approach 2 FLOPs", "Approach 2 Tokens")
    cells = [(value, row[column]) for row, (_, *values) in zip(read("table5.csv"), scaling.tables()[5]) for value, column in zip(values, columns)]
    assert len(cells) == 36 and all(agrees(*cell) for cell in cells)


def test_rounded_coefficients_would_not_do():
    """The tables need eq. 15's unrounded coefficients: the test above can fail."""
    rounded = laws.json.loads((QUOKKA / "coefficients.json").read_text())["eq15"]["printed"]
    c = dict(A=rounded["A"], a=rounded["alpha"], B=rounded["B"], b=rounded["beta"], c=rounded["c_p"], m=rounded["m_p"], k=rounded["k_p"],
             p=rounded["p_e"], g=rounded["gamma"], E=0.0)
    assert round(laws.eq15_best_epochs(c, 4e8, 1e7)) != 70
    assert abs(laws.evaluate(EQ15, c, 1e9, 1e9, 10.0) - laws.evaluate(EQ15, OWN["eq15"], 1e9, 1e9, 10.0)) > 0.1


# ------------------------------------------------------------------------------------------------- the paper's fits


@pytest.fixture(scope="module")
def isoflop():
    return scaling.read_csv(QUOKKA / "isoflop_points.csv")


def test_approach_1(isoflop):
    found = laws.valleys(isoflop)
    power = found.power_laws()
    assert len(isoflop.N) == 87
    assert (f"{power['k_N']:.4f}", f"{power['a']:.3f}", f"{power['k_D']:.1f}", f"{power['b']:.3f}") == ("0.0216", "0.514", "7.7", "0.486")
    optima = read("isoflop_optima.csv")
    assert np.allclose(found.N, [float(row["params_opt"]) for row in optima], rtol=2e-3)
    draws = laws.bootstrap_valleys(isoflop, 200)
    low, high = np.quantile([d["a"] for d in draws], (0.025, 0.975))
    assert 0.46 < low < 0.514 < high < 0.56


def test_approach_2(isoflop):
    best = laws.fit(PARAMETRIC, isoflop)
    problem = laws.Problem(PARAMETRIC, isoflop)
    assert best.objective <= 8.2e-4
    assert math.isclose(problem.objective(problem.theta(OWN["parametric"]))[0], 9.988e-4, rel_tol=1e-3)  # the paper's own
    c = best.coefficients
    assert np.allclose([c["E"], c["A"], c["a"], c["B"], c["b"]], [2.4991, 2362.7, 0.4494, 4128.5, 0.3704], rtol=1e-3)
    assert abs(laws.allocation(c)["a"] - 0.4519) < 1e-3


def test_chinchilla_and_muennighoff():
    """The published coefficients give the published power laws and the published worth of repeated data."""
    three = laws.allocation(laws.CHINCHILLA_3)
    assert [f"{three[k]:.2f}" for k in ("k_N", "a", "k_D", "b")] == ["0.60", "0.45", "0.28", "0.55"]  # Table 1 prints .46 and .54
    c = laws.MUENNIGHOFF
    # Repeated tokens are worth U·(1 + R_D) at most, and four epochs nearly as much as new data (their main finding).
    assert np.isclose(laws.evaluate(HALF_LIFE, c, 1e6, 1e9, 1e6), laws.evaluate(PARAMETRIC, c, 1e6, 1e9 * (1 + c["R_D"])), rtol=1e-6)
    assert laws.evaluate(HALF_LIFE, c, 1e9, 2e10, 4.0) - laws.evaluate(PARAMETRIC, c, 1e9, 8e10) < 0.02
    # A model much larger than U tokens deserve is worth at most (1 + R_N) times the deserved one.
    deserved = (laws.balance(laws.tensors(c)).item() ** 2) * 1e9  # a = b: N/D = G²
    assert np.isclose(laws.evaluate(HALF_LIFE, c, 1e15, 1e9, 1.0), laws.evaluate(PARAMETRIC, c, deserved * (1 + c["R_N"]), 1e9), rtol=1e-6)


# ------------------------------------------------------------------------------------------------------ the laws


@pytest.mark.parametrize("name", ["eq15", "eq21", "eq23", "half_life", "ours"])
@given(N=st.floats(1e6, 3e9), U=st.floats(1e6, 1e9), e=st.floats(0.01, 1.0))
@settings(max_examples=25, deadline=None)
def test_up_to_one_epoch_all_tokens_are_new(name, N, U, e):
    """At e ≤ 1 the loss depends on U·e alone, as for fresh data: data-constrained laws continue compute-constrained ones."""
    c = KNOWN[name]
    if name == "eq23":  # its overfitting never quite vanishes: softplus at −κ(U/N)^η/τ
        c = c | dict(mu=0.0)
    assert np.isclose(laws.evaluate(LAWS[name], c, N, U, e), laws.evaluate(LAWS[name], c, N, U * e, 1.0), rtol=1e-9)


def test_ours_at_one_epoch_is_a_parametric_law():
    c = KNOWN["ours"]
    as_parametric = dict(E=c["E"], A=c["A"] * c["N0"] ** c["a"], a=c["a"], B=c["B"] * c["U0"] ** c["b"], b=c["b"])
    N, U = np.meshgrid(np.logspace(6, 10, 9), np.logspace(6, 10, 9))
    assert np.allclose(laws.evaluate(OURS, c, N, U, 1.0), laws.evaluate(PARAMETRIC, as_parametric, N, U), rtol=1e-12)


def test_ours_has_the_shape_of_the_data():
    """More unique tokens never hurt; over epochs the loss falls, then rises where the data's does, and rises earlier for larger models."""
    c, e = KNOWN["ours"], np.logspace(0, 3, 301)
    for N in np.logspace(7, 9.4, 7):
        U = np.logspace(6.8, 8.5, 60)[:, None]
        loss = laws.evaluate(OURS, c, N, U, e)
        assert (np.diff(loss, axis=0) < 1e-9).all()
        for row in laws.evaluate(OURS, c, N, np.array([[1e7], [3e7], [1e8]]), e):
            lowest = int(row.argmin())
            assert (np.diff(row[: lowest + 1]) <= 1e-4).all()  # with doubled batches epochs 1 to e^w add no step, but a trace of overfitting
            rising = np.diff(row[lowest:])
            highest = int(row[lowest:].argmax())
            assert (rising[:highest] >= 0).all()  # one valley; after the peak all is memorised and the end of training only helps
    best = [e[laws.evaluate(OURS, c, N, 2.9e7, e).argmin()] for N in (6.5e7, 2.17e8, 8.56e8, 1.52e9)]
    assert best == sorted(best, reverse=True)


@pytest.mark.parametrize("name", LAWS)
def test_gradients(name):
    rng = np.random.default_rng(0)
    N, U, e = rng.choice([1e7, 1e8, 1e9, 3e9], 40), 10 ** rng.uniform(7, 8.2, 40), 10 ** rng.uniform(-0.5, 3, 40)
    law = LAWS[name]
    c = KNOWN[name]
    runs = Runs(N, U, e, laws.evaluate(law, c, N, U, e) * np.exp(rng.normal(0, 0.05, 40)), np.arange(40))
    problem = laws.Problem(law, runs, rng.uniform(0, 2, 40), {k: c[k] for k in law.constants(1, 1, 1)})
    theta = problem.theta(c)
    value, gradient = problem.objective(theta)
    for i in range(len(theta)):
        step = np.zeros_like(theta)
        step[i] = 1e-5
        difference = (problem.objective(theta + step)[0] - problem.objective(theta - step)[0]) / 2e-5
        assert math.isclose(gradient[i], difference, rel_tol=2e-4, abs_tol=2e-6 * value + 1e-9), problem.names[i]


# -------------------------------------------------------------------------------------------------- simulated runs


def simulated(name, noise, seed=0):
    """Runs of a law with known coefficients: an IsoFLOP grid, or curves of 6 budgets × 6 sizes; noise σ per run and σ/3 per point."""
    rng, law, c = np.random.default_rng(seed), LAWS[name], KNOWN[name]
    if name == "parametric":
        C = np.repeat(np.array([3e18, 6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21]), 10)
        N = 0.0216 * C**0.514 * np.tile(10 ** np.linspace(-0.7, 0.7, 10), 9)
        U, e, curve = C / 6 / N, np.ones(90), np.arange(90)
    else:
        sizes, budgets = np.logspace(7.15, 9.4, 6), np.logspace(7, 8.15, 6)
        e = np.logspace(0.3, 3, 30) if name != "half_life" else np.logspace(0, 2, 20)
        N, U, e = (x.ravel() for x in np.meshgrid(sizes, budgets, e, indexing="ij"))
        curve = np.arange(len(N)) // (30 if name != "half_life" else 20)
    error = rng.normal(0, noise, curve.max() + 1)[curve] + (rng.normal(0, noise / 3, len(N)) if name != "parametric" else 0)
    return Runs(N, U, e, laws.evaluate(law, c, N, U, e) * np.exp(error), curve)


@pytest.mark.parametrize("name", ["parametric", "half_life", "eq15", "eq21", "eq23", "ours"])
def test_fits_find_what_was_put_in(name):
    """Without noise the losses come back to 1e-4, and the coefficients that the data determine."""
    runs = simulated(name, 0.0)
    found = laws.fit(LAWS[name], runs)
    assert np.abs(np.log(laws.predict(found, runs.N, runs.U, runs.e) / runs.loss)).max() < (1e-4 if name != "ours" else 3e-3)
    if name in ("parametric", "eq21", "half_life"):
        for k, v in KNOWN[name].items():
            assert math.isclose(found.coefficients[k], v, rel_tol=0.02), k


def test_leave_out_judges_unseen_curves():
    """On curves of the law itself the error is the noise's; a wrong law's is larger; a curve's own points do not help it."""
    runs = simulated("eq21", 0.01, seed=3)
    right, wrong = (laws.leave_out(laws.fit(law, runs), runs, jobs=1) for law in (EQ21, EQ15))
    assert len(right) == 36 and 0.006 < np.mean(list(right.values())) < 0.013 < np.mean(list(wrong.values()))
    odd = runs._replace(loss=np.where(runs.curve == 7, runs.loss * 1.3, runs.loss))
    assert laws.leave_out(laws.fit(EQ21, odd), odd, jobs=1)[7] > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("what, expected", [("U", (0.074, 0.066, 0.049, 0.013)), ("N", (0.098, 0.070, 0.087, 0.020))])
def test_curves_left_out_together(what, expected):
    """All curves of one amount of unique tokens, or of one band of sizes: the table in docs/scaling-laws.md."""
    runs, fits = scaling.read_csv(QUOKKA / "epoch_curves.csv"), scaling.known_laws(QUOKKA / "epochs/fits.json")[0]
    few, found = laws.thin(runs, 40), []
    of, few_of = (np.unique(r.U, return_inverse=True)[1] if what == "U" else np.digitize(r.N, [4e7, 1.2e8, 3.5e8, 1e9]) for r in (runs, few))
    for name in ("eq15", "eq21", "eq23", "ours"):
        errors = laws.leave_out(fits[name][0], few._replace(curve=few_of), runs._replace(curve=of))
        found.append(np.average(list(errors.values()), weights=[(of == k).sum() for k in errors]))
    assert found == pytest.approx(expected, abs=0.0015) and found[3] < 0.75 * min(found[:3])


def test_valleys_find_exact_parabolas():
    C = np.repeat([1e18, 1e19, 1e20], 5)
    best = 0.03 * C**0.5
    N = best * np.tile([0.3, 0.6, 1.0, 2.0, 4.0], 3)
    runs = Runs(N, C / 6 / N, np.ones(15), 3 + np.log10(N / best) ** 2, np.arange(15))
    power = laws.valleys(runs).power_laws()
    assert np.allclose([power["k_N"], power["a"]], [0.03, 0.5], rtol=1e-6) and np.allclose(power["k_D"] * 1e20 ** power["b"], 1e20 / 6 / (0.03 * 1e10))
    with pytest.raises(ValueError, match="fewer than three sizes"):
        laws.valleys(runs.select([0, 1, 5, 6, 7]))
    with pytest.raises(ValueError, match="no minimum"):
        laws.valleys(runs._replace(loss=-runs.loss))


def valleys_coverage(sizes, n_studies, n_draws, noise):
    """The same for approach 1's exponent: on the paper's grid, or so many of its sizes per budget, with minima on a power law and noise in nats.

    Also how many studies had a valley at every budget, which are those that count."""
    points = scaling.read_csv(QUOKKA / "isoflop_points.csv")
    budget = laws.budget_of(points)
    each = [np.flatnonzero(budget == k) for k in range(9)]
    runs = points.select(np.concatenate([which[np.unique(np.linspace(0, len(which) - 1, min(sizes, len(which))).round().astype(int))] for which in each]))
    found, budget = laws.valleys(points), laws.budget_of(runs)
    power = found.power_laws()
    best = np.log10(power["k_N"] * found.flops ** power["a"])
    truth = found.loss[budget] + found.parabola[budget, 0] * (np.log10(runs.N) - best[budget]) ** 2
    hits = count = 0
    for seed in range(n_studies):
        seen = runs._replace(loss=truth + np.random.default_rng(seed).normal(0, noise, len(truth)))
        try:
            low, high = np.quantile([draw["a"] for draw in laws.bootstrap_valleys(seen, n_draws, seed)], (0.025, 0.975))
        except ValueError:
            continue
        count += 1
        hits += low <= power["a"] <= high
    return {"a": float(hits / count)}, count


def test_intervals_of_approach_1_cover():
    """Four sizes per budget leave nine degrees of freedom; three leave none, and then there is no interval."""
    share, count = valleys_coverage(4, 100, 100, 0.008)
    assert 0.87 <= share["a"] <= 0.99 and count > 90  # 0.92 ± 2 standard errors
    points = scaling.read_csv(QUOKKA / "isoflop_points.csv")
    three = np.concatenate([np.flatnonzero(laws.budget_of(points) == k)[[0, 4, -1]] for k in range(9)])
    assert laws.bootstrap_valleys(points.select(three), 10) == []


def test_budgets_are_told_apart_by_their_flops(isoflop):
    rows = read("isoflop_points.csv")
    flops = np.array([float(row["flops"]) for row in rows])
    assert len(np.unique(laws.budget_of(isoflop))) == 9
    assert all(len(np.unique(flops[laws.budget_of(isoflop) == k])) == 1 for k in range(9))


COVERED = {  # what each law's interval is for: a coefficient, or what the law says of something
    "parametric": {"a of N_opt": lambda c: laws.allocation(c)["a"], "E": lambda c: c["E"], "loss at 1e22": lambda c: laws.evaluate(PARAMETRIC, c, 5e9, 3.3e11).item()},
    "half_life": {"R_D": lambda c: c["R_D"], "R_N": lambda c: c["R_N"]},
    "eq15": {"p": lambda c: c["p"], "b": lambda c: c["b"], "loss": lambda c: laws.evaluate(EQ15, c, 2e8, 3e7, 100.0).item()},
    "eq21": {"b": lambda c: c["b"], "d": lambda c: c["d"], "g": lambda c: c["g"]},
    "eq23": {"b": lambda c: c["b"], "R": lambda c: c["R"], "g": lambda c: c["g"]},
    "ours": {"b": lambda c: c["b"], "C": lambda c: c["C"], "loss": lambda c: laws.evaluate(OURS, c, 2e8, 3e7, 100.0).item()},
}  # fmt: skip


def coverage(name, n_studies, n_draws, noise):
    """In how many of n_studies simulated studies the 95 % interval holds the truth: {quantity: share}."""
    hits = {k: 0 for k in COVERED[name]}
    for seed in range(n_studies):
        runs = simulated(name, noise, seed)
        start = {k: v for k, v in KNOWN[name].items() if k in laws.Problem(LAWS[name], runs).names} | LAWS[name].constants(1, 1, 1)
        start |= {k: KNOWN[name][k] for k in LAWS[name].constants(1, 1, 1)}
        fitted = laws.bootstrap(laws.fit(LAWS[name], runs, start=start), runs, n_draws, seed)
        for k, quantity in COVERED[name].items():
            low, high = laws.interval(fitted, quantity)
            hits[k] += low <= quantity(KNOWN[name]) <= high
    return {k: float(v) / n_studies for k, v in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", COVERED)
def test_intervals_cover(name):
    """Nominal 95 %; results/laws_coverage.md has the counts of a longer study."""
    for quantity, share in coverage(name, 40, 60, 0.004 if name == "parametric" else 0.01).items():
        assert share >= 0.85, quantity


# ---------------------------------------------------------------------------------------------------- best choices


@given(N=st.floats(1e7, 1e12), U=st.floats(1e7, 1e14))
@settings(max_examples=40, deadline=None)
def test_eq15_best_epochs_is_a_minimum(N, U):
    c = OWN["eq15"]
    e = laws.eq15_best_epochs(c, N, U)
    around = laws.evaluate(EQ15, c, N, U, e * np.array([0.999, 1.0, 1.001])) if e > 1 else None
    if e > 1.01:
        assert around[1] <= around[0] and around[1] <= around[2]
    else:  # no minimum beyond: the loss only rises from somewhere near e = 1 on
        assert (np.diff(laws.evaluate(EQ15, c, N, U, np.logspace(0.5, 4, 200))) > 0).all()


@pytest.mark.parametrize("name", ["eq15", "eq21", "ours"])
@pytest.mark.parametrize("budget", [math.inf, 3e17])
def test_best_is_what_a_fine_grid_finds(name, budget):
    U = 2e7
    found = laws.best(LAWS[name], KNOWN[name], U, N=(1e6, 1e10), e=(1.0, 1e3), flops=budget)
    N, e = np.logspace(6, 10, 700)[:, None], np.logspace(0, 3, 700)
    loss = np.where(6 * N * U * e <= budget, laws.evaluate(LAWS[name], KNOWN[name], N, U, e), np.inf)
    assert found.loss <= loss.min() + 1e-6 and found.loss > loss.min() - 5e-3
    assert 6 * found.N * U * found.e <= budget * (1 + 1e-6)
    with pytest.raises(ValueError, match="not enough"):
        laws.best(LAWS[name], KNOWN[name], U, flops=6 * 1e5 * U / 2)


def test_best_says_where_there_is_no_optimum():
    growing = dict(E=1.0, A=100.0, a=0.3, B=100.0, b=0.3)
    assert laws.best(PARAMETRIC, growing, 1e9).edge
    assert not laws.best(EQ15, OWN["eq15"], 1e9).edge


def test_thin_keeps_the_ends():
    e = np.linspace(1, 1000, 500)
    runs = Runs(np.ones(500), np.ones(500), e, 1 + 1 / e, np.zeros(500, int))
    few = laws.thin(runs, 20)
    assert len(few.N) <= 40 and {few.e.min(), few.e.max()} == {1, 1000} and (few.e < 30).sum() > 5


def test_smooth():
    flat = np.full(1000, 3.0)
    assert np.allclose(laws.smooth(flat), flat)
    noisy = 3 + np.random.default_rng(0).normal(0, 1, 20_000)
    assert laws.smooth(noisy).std() < 0.12 and abs(laws.smooth(noisy).mean() - 3) < 0.02
    assert list(laws.smooth(np.array([1.0, 2.0]))) == [1, 2]


def test_torch_and_numpy_agree_on_precision():
    assert laws.evaluate(PARAMETRIC, KNOWN["parametric"], np.float32(1e8), 10, 1).dtype == np.float64
    assert laws.tensors(KNOWN["parametric"])["A"].dtype == torch.float64
    assert isinstance(EQ23.starts(1e8, 1e9, 1e7)["R"], tuple)


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_laws.py ours 100 100 0.01, or approach1:4 300 100 0.008 for four sizes per budget
    name, studies, draws, noise = sys.argv[1:]
    name, _, sizes = name.partition(":")
    how_long = int(studies), int(draws), float(noise)
    print(*sys.argv[1:], *(valleys_coverage(int(sizes), *how_long) if sizes else [coverage(name, *how_long)]))
