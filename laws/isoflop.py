"""Approach 1: a parabola of the loss per compute budget, power laws through the minima (docs/math.md §9)."""

import math
from typing import NamedTuple

import numpy as np

from laws.runs import geometric_mean


class Valleys(NamedTuple):
    """One entry per budget: the parabola of the loss in log10 N, and its minimum."""

    flops: np.ndarray
    N: np.ndarray  # at the minimum
    loss: np.ndarray  # at the minimum
    parabola: np.ndarray  # (budgets, 3): numpy.polyfit's, in log10 N

    def power_laws(self):
        """N = k_N·C^a and D = k_D·C^b through the minima; D = C/(6N), so b = 1 − a.

        Raises ValueError for a single budget.
        """
        if len(self.flops) < 2:
            raise ValueError("one budget of compute gives no power law; an IsoFLOP fit needs two or more")
        a, ln_k = np.polyfit(np.log(self.flops), np.log(self.N), 1)
        return dict(k_N=math.exp(ln_k), a=a, k_D=math.exp(-ln_k) / 6, b=1 - a)


def budget_of(runs, tolerance=0.1):
    """The number of each run's budget, by its FLOPs: runs within `tolerance` of a neighbour share one."""
    order = np.argsort(runs.flops)
    is_first = np.diff(np.log(runs.flops[order]), prepend=-np.inf) > tolerance  # of a budget
    budget = np.empty(len(order), int)
    budget[order] = np.cumsum(is_first) - 1
    return budget


def fit_valleys(runs, loss=None):
    """Fit every budget's parabola, to `loss` instead of the runs' own where it is given.

    Raises ValueError where there is no valley: fewer than three sizes, or no minimum.
    """
    loss = runs.loss if loss is None else loss
    budget = budget_of(runs)
    valleys = []
    for k in range(budget.max() + 1):
        mask = budget == k
        flops = geometric_mean(runs.flops[mask])
        if len(np.unique(runs.N[mask])) < 3:
            raise ValueError(f"the budget of {flops:.3g} FLOPs has fewer than three sizes; "
                             "an IsoFLOP fit needs three")

        parabola = np.polyfit(np.log10(runs.N[mask]), loss[mask], 2)
        if parabola[0] <= 0:
            raise ValueError(f"the budget of {flops:.3g} FLOPs has no minimum: its parabola opens downwards")
        log_N = -parabola[1] / (2 * parabola[0])
        valleys.append((flops, 10**log_N, np.polyval(parabola, log_N), parabola))
    return Valleys(*(np.array(column) for column in zip(*valleys)))


def bootstrap_valleys(runs, n, seed=0):
    """Draw n sets of power laws by resampling residuals; none if each budget has three sizes only.

    The residuals of all budgets are drawn anew around the parabolas. A parabola takes three degrees of
    freedom, so they are widened by √(runs/df); and since σ is itself only known from df of them, each draw
    has a σ of its own, by its χ² distribution: the intervals are Student's, not the normal's.
    """
    rng = np.random.default_rng(seed)
    valleys, budget = fit_valleys(runs), budget_of(runs)
    fitted = np.array([np.polyval(valleys.parabola[k], x) for k, x in zip(budget, np.log10(runs.N))])
    df = len(budget) - 3 * len(valleys.flops)
    if df < 1:
        return []

    residuals = (runs.loss - fitted) * math.sqrt(len(budget) / df)
    draws = []
    for _ in range(20 * n):  # a draw may have no valley
        if len(draws) == n:
            break
        noise = rng.choice(residuals, len(budget)) * math.sqrt(df / rng.chisquare(df))
        try:
            draws.append(fit_valleys(runs, fitted + noise).power_laws())
        except ValueError:
            continue
    return draws


def untrained_minima(valleys, runs):
    """The budgets (in FLOPs) whose minimum lies outside the sizes that were trained at them."""
    budget = budget_of(runs)
    outside = []
    for k, (flops, N) in enumerate(zip(valleys.flops, valleys.N)):
        trained = runs.N[budget == k]
        if not trained.min() <= N <= trained.max():
            outside.append(flops)
    return outside
