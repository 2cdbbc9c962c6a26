"""Approach 1: parabolas that are found, the paper's power laws, and intervals that cover."""

import numpy as np
import pytest
from known import read

from laws.forms import QUOKKA
from laws.isoflop import bootstrap_valleys, budget_of, fit_valleys
from laws.runs import Runs, read_csv


@pytest.fixture(scope="module")
def isoflop():
    return read_csv(QUOKKA / "isoflop_points.csv")


def test_the_papers_power_laws(isoflop):
    found = fit_valleys(isoflop)
    power = found.power_laws()
    assert len(isoflop.N) == 87
    assert (f"{power['k_N']:.4f}", f"{power['a']:.3f}") == ("0.0216", "0.514")
    assert (f"{power['k_D']:.1f}", f"{power['b']:.3f}") == ("7.7", "0.486")
    assert np.allclose(found.N, [float(row["params_opt"]) for row in read("isoflop_optima.csv")], rtol=2e-3)

    draws = bootstrap_valleys(isoflop, 200)
    low, high = np.quantile([draw["a"] for draw in draws], (0.025, 0.975))
    assert 0.46 < low < 0.514 < high < 0.56


def test_exact_parabolas_are_found():
    C = np.repeat([1e18, 1e19, 1e20], 5)
    best = 0.03 * C**0.5
    N = best * np.tile([0.3, 0.6, 1.0, 2.0, 4.0], 3)
    runs = Runs(N, C / 6 / N, np.ones(15), 3 + np.log10(N / best) ** 2, np.arange(15))
    power = fit_valleys(runs).power_laws()
    assert np.allclose([power["k_N"], power["a"]], [0.03, 0.5], rtol=1e-6)
    assert np.allclose(power["k_D"] * 1e20 ** power["b"], 1e20 / 6 / (0.03 * 1e10))
    with pytest.raises(ValueError, match="fewer than three sizes"):
        fit_valleys(runs.select([0, 1, 5, 6, 7]))
    with pytest.raises(ValueError, match="no minimum"):
        fit_valleys(runs._replace(loss=-runs.loss))


def test_budgets_are_told_apart_by_their_flops(isoflop):
    flops, budget = np.array([float(row["flops"]) for row in read("isoflop_points.csv")]), budget_of(isoflop)
    assert len(np.unique(budget)) == 9
    assert all(len(np.unique(flops[budget == k])) == 1 for k in range(9))


def coverage(sizes, n_studies, n_draws, noise):
    """In how many simulated studies the 95 % interval holds the true exponent, and how many had all valleys.

    On the paper's grid, or so many of its sizes per budget, with minima on a power law and noise in nats.
    Studies without a valley at every budget do not count.
    """
    points = read_csv(QUOKKA / "isoflop_points.csv")
    chosen = []
    for k in range(9):
        index = np.flatnonzero(budget_of(points) == k)
        even = np.linspace(0, len(index) - 1, min(sizes, len(index))).round().astype(int)
        chosen.append(index[np.unique(even)])
    runs, found = points.select(np.concatenate(chosen)), fit_valleys(points)
    budget, power = budget_of(runs), found.power_laws()
    best = np.log10(power["k_N"] * found.flops ** power["a"])
    truth = found.loss[budget] + found.parabola[budget, 0] * (np.log10(runs.N) - best[budget]) ** 2

    hits = count = 0
    for seed in range(n_studies):
        noisy = runs._replace(loss=truth + np.random.default_rng(seed).normal(0, noise, len(truth)))
        try:
            draws = bootstrap_valleys(noisy, n_draws, seed)
        except ValueError:
            continue
        low, high = np.quantile([draw["a"] for draw in draws], (0.025, 0.975))
        count += 1
        hits += low <= power["a"] <= high
    return float(hits / count), count


def test_intervals_cover(isoflop):
    """Four sizes per budget leave nine degrees of freedom; three leave none: then there is no interval."""
    share, count = coverage(4, 60, 60, 0.008)
    assert 0.85 <= share <= 0.99 and count > 50  # 0.92 ± 2 standard errors
    three = np.concatenate([np.flatnonzero(budget_of(isoflop) == k)[[0, 4, -1]] for k in range(9)])
    assert bootstrap_valleys(isoflop.select(three), 10) == []


if __name__ == "__main__":  # PYTHONPATH=. python tests/laws/test_isoflop.py 4 300 100 0.008
    import sys

    sizes, studies, draws, noise = sys.argv[1:]
    print(*sys.argv[1:], *coverage(int(sizes), int(studies), int(draws), float(noise)))
