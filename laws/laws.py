"""Scaling laws (SPEC §9): a language model's loss as a function of its parameters N, its unique tokens U and its epochs e.

A law is a plain function of named coefficients and of N, U, e (float64 tensors) that returns nats per token. All of them take
the same three, the compute-constrained ones through D = U·e, so that one `fit`, one `bootstrap` and one `leave_out` serve them
all. Gradients are exact (autograd), positive coefficients are fitted as logarithms, the loss is Huber's on log L.

    best = fit(PARAMETRIC, runs)
    predict(best, N=1e9, U=1e11)
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import softplus


class Runs(NamedTuple):
    """Finished runs, or points on curves: equal-length arrays. Points of one `curve` are resampled and left out together."""

    N: np.ndarray  # parameters
    U: np.ndarray  # unique tokens
    e: np.ndarray  # epochs: 1 where no token was seen twice
    loss: np.ndarray  # nats per token
    curve: np.ndarray  # which curve; of single runs: their number

    def select(self, which):
        return Runs(*(column[which] for column in self))

    @property
    def flops(self):
        return 6 * self.N * self.U * self.e


class Law(NamedTuple):
    name: str
    loss: Callable  # loss(c, N, U, e) -> nats per token, for c a dictionary of coefficients
    starts: Callable  # starts(N, D, U) -> the grid of starts, coefficient -> values, for data of that typical size
    signed: tuple = ()  # coefficients that may be negative; the others are fitted as logarithms
    delta: float = 1e-3  # where Huber's loss on log L turns from square to linear
    constants: Callable = lambda N, D, U: {}  # coefficients that are units, not fitted
    polish: bool = True  # after L-BFGS go on with Gauss-Newton, which flat valleys need


class Fit(NamedTuple):
    law: Law
    coefficients: dict
    objective: float  # Σ Huber(log L̂ − log L), as the paper counts it
    draws: tuple | list = ()  # coefficients of bootstrap resamples
    units: int = 0  # how many curves or runs were resampled


# ------------------------------------------------------------------------------------------------------ the laws


def parametric(c, N, U, e):
    """Chinchilla's approach 3, the paper's approach 2 (eq. 13): every token counts as new, D = U·e."""
    return c["E"] + c["A"] * N ** -c["a"] + c["B"] * (U * e) ** -c["b"]


def eq15(c, N, U, e):
    """The paper's law for repeated data (eq. 14, 15): epochs add tokens by a power of their own, until they are forgotten."""
    e_p = c["c"] * U ** c["m"] * N ** -c["k"]
    repeats = torch.clamp(e - 1, min=1e-12)
    worth = torch.where(e > 1, c["p"] * torch.log(e) - (repeats / e_p) ** c["g"], torch.log(e))  # ln(D′/U)
    return c["E"] + c["A"] * N ** -c["a"] + c["B"] * torch.exp(-c["b"] * (torch.log(U) + worth))


def eq21(c, N, U, e):
    """The paper's first alternative (eq. 21): all tokens count, and overfitting is a term of its own."""
    repeats = torch.clamp(torch.log(e), min=1e-12)
    return c["A"] * N ** -c["a"] + c["B"] * (U * e) ** -c["b"] + c["mu"] * (N / U) ** c["d"] * repeats ** c["g"]


def eq23(c, N, U, e):
    """The paper's second alternative (eq. 23): repeated tokens lose their worth as in Muennighoff's law, then overfitting sets in."""
    D = repeated(U, e, c["R"])
    excess = torch.clamp(softplus((e - c["kappa"] * (U / N) ** c["eta"]) / c["tau"]), min=1e-300)  # 0^γ has no gradient
    return c["E"] + c["A"] * N ** -c["a"] + c["B"] * D ** -c["b"] + c["mu"] * (N / D) ** c["d"] * excess ** c["g"]


def half_life(c, N, U, e):
    """Muennighoff's law for autoregressive models (their eq. 7, 8): repeated tokens, and parameters beyond those that U tokens deserve, lose worth."""
    ratio = balance(c)
    seen = U * torch.clamp(e, max=1)
    deserved = torch.minimum(N, ratio * (ratio * seen) ** (c["b"] / c["a"]))  # compute-optimal for so many tokens
    parameters = deserved * (1 - c["R_N"] * torch.expm1((1 - N / deserved) / c["R_N"]))
    return c["E"] + c["A"] * parameters ** -c["a"] + c["B"] * repeated(U, e, c["R_D"]) ** -c["b"]


def ours(c, N, U, e):
    """Our law for repeated data; docs/scaling-laws.md derives it.

    ln D′ is piecewise linear in ln e with rounded corners: slope p while the learning rate warms up, p + r after the corner e₁, p + r − s
    beyond the corner e₂, where most of what U tokens hold has been learned. Overfitting adds C·(1 − exp(−x/C)) nats: x is a power
    of e before the corner e₃ and grows by g·μ per unit of ln e after it; C is where the loss stays when all is memorised.
    """
    n, u = torch.log(N / c["N0"]), torch.log(U / c["U0"])
    ln_e = torch.clamp(torch.log(e), min=0)  # up to e = 1 all is new: D′ = U·e, no overfitting
    pace = torch.clamp(ln_e - c["w"] * (N > c["N_big"]), min=0)  # batches twice as large: fewer steps have been taken

    def ramp(x, corner):  # 0 at x = 0, slope 0 before the corner, 1 after it
        return (softplus(c["q"] * (x - corner)) - softplus(-c["q"] * corner)) / c["q"]

    first = torch.log(c["e1"])
    second = first + c["e2"] * torch.exp(c["k2"] * n - c["m2"] * u)  # never before the first
    ln_D = u + torch.clamp(torch.log(e), max=0) + c["p"] * pace + c["r"] * ramp(pace, first) - c["s"] * ramp(pace, second)
    third = torch.log(c["e3"]) + c["m3"] * u - c["k3"] * n
    x = c["mu"] * torch.exp(c["d"] * n - c["f"] * u) * (softplus(c["g"] * (ln_e - third)) - softplus(-c["g"] * third))
    return c["E"] + c["A"] * torch.exp(-c["a"] * n) + c["B"] * torch.exp(-c["b"] * ln_D) - c["C"] * torch.expm1(-x / c["C"])


def repeated(U, e, R):
    """D′ = U·(1 + R(1 − exp(−(e − 1)/R))): the worth of a repetition falls by 1/e every R epochs [Muennighoff]."""
    return U * torch.where(e > 1, 1 - R * torch.expm1((1 - e) / R), e)


def balance(c):
    """G = (aA/(bB))^(1/(a+b)), which says how a parametric law splits compute between N and D."""
    return (c["a"] * c["A"] / (c["b"] * c["B"])) ** (1 / (c["a"] + c["b"]))


def terms(N, D, first=(0.3, 1.0), second=(0.5, 2.0), a=(0.25, 0.45), b=(0.25, 0.45)):
    """Starts for A/N^a + B/D^b, from what the two terms may be in nats at a typical N and D."""
    return dict(A=[x * N**y for x in first for y in a[:1]], a=a, B=[x * D**y for x in second for y in b[:1]], b=b)


PARAMETRIC = Law("parametric", parametric, lambda N, D, U: dict(E=(1.0, 2.5), **terms(N, D)), polish=False)
HALF_LIFE = Law("half_life", half_life, lambda N, D, U: dict(E=(1.0, 2.0), **terms(N, D), R_D=(5.0, 15.0), R_N=(5.0,)), polish=False)
EQ15 = Law("eq15", eq15, lambda N, D, U: dict(
    E=(0.1, 1.0), **terms(N, U, (0.3,), (5.0,), b=(0.13, 0.25)), c=(5 * N**0.55 / U**0.39, 20 * N**0.55 / U**0.39), m=(0.39,), k=(0.55,),
    p=(1.5, 1.0), g=(0.4, 0.6)), delta=0.01)
EQ21 = Law("eq21", eq21, lambda N, D, U: dict(
    **terms(N, U, (0.1, 0.3), (6.0,), b=(0.13, 0.2)), mu=(1.6e-4, 1e-2), d=(0.43,), g=(4.5, 3.0)), delta=0.01)
EQ23 = Law("eq23", eq23, lambda N, D, U: dict(
    E=(0.01, 1.0), **terms(N, U, (0.1,), (6.0,), a=(1.0, 0.3), b=(0.13, 0.25)), mu=(0.16, 0.02), d=(0.3,), kappa=(100 * (N / U) ** 1.5,), eta=(1.5,),
    tau=(27.0,), g=(0.8,), R=(34.0, 10.0)), signed=("eta",), delta=0.01)
OURS = Law("ours", ours, lambda N, D, U: dict(
    E=(1.1, 0.5), A=(0.2,), a=(0.5,), B=(4.6,), b=(0.25,), p=(0.2,), r=(1.0,), s=(1.07,), q=(2.2, 1.5), e1=(9.6,), e2=(1.5, 2.0), m2=(0.3, 0.0), k2=(0.0,),
    mu=(0.33,), d=(1.6,), f=(2.6,), e3=(240.0, 120.0), m3=(-1.0, 0.3), k3=(-0.3, 0.3), g=(2.0,), C=(3.4,), w=(0.25,)),
    signed=("m2", "k2", "d", "f", "m3", "k3", "w"), delta=0.01, constants=lambda N, D, U: dict(N0=N, U0=U, N_big=2.5e9))
LAWS = {law.name: law for law in (PARAMETRIC, HALF_LIFE, EQ15, EQ21, EQ23, OURS)}


# ---------------------------------------------------------------------------------------------------- fitting


def predict(fitted, N, U, e=1.0):
    """The loss by a Fit, in nats per token, for N parameters, U unique tokens and e epochs (numbers or arrays): float64."""
    return evaluate(fitted.law, fitted.coefficients, N, U, e)


def evaluate(law, coefficients, N, U, e=1.0):
    N, U, e = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (N, U, e)))
    return law.loss(tensors(coefficients), *(torch.from_numpy(x.copy()) for x in (N, U, e))).numpy()


def tensors(coefficients):
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in coefficients.items()}


def geometric_mean(x):
    return float(np.exp(np.log(x).mean()))


class Problem:
    """A law on given runs as a function of θ, the coefficients' logarithms (or themselves, for signed ones)."""

    def __init__(self, law, runs, weights=None, constants=None):
        self.law, sizes = law, (geometric_mean(runs.N), geometric_mean(runs.U * runs.e), geometric_mean(runs.U))
        self.grid = {k: tuple(v) for k, v in law.starts(*sizes).items()}
        self.constants = law.constants(*sizes) if constants is None else constants
        self.names, self.signed = list(self.grid), torch.tensor([k in law.signed for k in self.grid])
        self.N, self.U, self.e = (torch.tensor(x, dtype=torch.float64) for x in (runs.N, runs.U, runs.e))
        self.log_loss = torch.log(torch.tensor(runs.loss, dtype=torch.float64))
        self.weights = torch.ones_like(self.N) if weights is None else torch.tensor(weights, dtype=torch.float64)
        self.units = {k: torch.tensor(v, dtype=torch.float64) for k, v in self.constants.items()}

    def theta(self, coefficients):
        return np.array([coefficients[k] if k in self.law.signed else math.log(max(coefficients[k], 1e-300)) for k in self.names])

    def coefficients(self, theta):
        return {k: float(v) for k, v in zip(self.names, self.natural(torch.tensor(theta)))} | self.constants

    def natural(self, theta):
        return torch.where(self.signed, theta, torch.exp(torch.where(self.signed, 0.0, theta)))

    def residuals(self, theta):
        c = dict(zip(self.names, self.natural(theta).unbind())) | self.units
        return torch.log(self.law.loss(c, self.N, self.U, self.e)) - self.log_loss

    def objective(self, theta):
        """Σ weight · Huber, and its gradient: what L-BFGS wants."""
        theta = torch.tensor(theta, requires_grad=True)
        r = self.residuals(theta).abs()
        value = (self.weights * torch.where(r < self.law.delta, r.square() / 2, self.law.delta * (r - self.law.delta / 2))).sum()
        value.backward()
        gradient = theta.grad.numpy()
        return (value.item(), gradient) if math.isfinite(value.item()) and np.isfinite(gradient).all() else (1e9, np.zeros_like(gradient))

    def gauss_newton(self, theta, steps):
        """Closer to the minimum than L-BFGS comes along a flat valley: scipy's trust region on the residuals, Huber's loss again."""
        from scipy.optimize import least_squares

        root = self.weights.sqrt()
        jacobian = torch.func.jacfwd(lambda t: root * self.residuals(t))

        def clean(x):
            return np.nan_to_num(x.detach().numpy(), nan=1e3, posinf=1e3, neginf=-1e3)

        done = least_squares(lambda t: clean(root * self.residuals(torch.tensor(t))), theta, lambda t: clean(jacobian(torch.tensor(t))),
                             loss="huber", f_scale=self.law.delta, x_scale="jac", max_nfev=steps)
        return done.x

    def descend(self, theta, steps, polish):
        """θ and objective after L-BFGS, then after Gauss-Newton steps where they still gain."""
        from scipy.optimize import minimize

        done = minimize(self.objective, theta, jac=True, method="L-BFGS-B", options=dict(maxiter=steps, maxfun=2 * steps, maxcor=20, ftol=1e-13, gtol=1e-11))
        best = done.fun, done.x
        if polish and self.law.polish:
            closer = self.gauss_newton(done.x, polish)
            best = min(best, (self.objective(closer)[0], closer), key=lambda pair: pair[0])
        return best


def fit(law, runs, start=None, jobs=None):
    """The coefficients that minimise Σ Huber(log L̂ − log L) over `runs`.

    From every point of the law's grid of starts a short descent, from the best four a long one. `start`: coefficients to start
    from instead. Raises ValueError if there are fewer runs than coefficients.
    """
    problem = Problem(law, runs)
    if len(runs.N) < len(problem.names):
        raise ValueError(f"{law.name} has {len(problem.names)} coefficients, there are only {len(runs.N)} runs")

    def descend(thetas, steps, polish):
        small = len(thetas) * len(runs.N) < 20_000  # not worth the start of processes
        return sorted(in_parallel(solve, [(law.name, runs, None, problem.constants, t, steps, polish) for t in thetas], 1 if small else jobs), key=lambda pair: pair[0])

    if start:
        thetas = [problem.theta(start)]
    else:
        grid = [problem.theta(dict(zip(problem.names, values))) for values in itertools.product(*problem.grid.values())]
        thetas = [theta for _, theta in descend(grid, 40, 0)[:4]]
    objective, theta = descend(thetas, 400, 100)[0]
    return Fit(law, problem.coefficients(theta), objective)


def solve(task):
    """Objective and θ from one start; `task` is (law's name, runs, weights, constants, θ, steps, polish), so that it can travel to another process."""
    name, runs, weights, constants, theta, steps, polish = task
    torch.set_num_threads(1)  # small arrays: threads would wait for each other
    return Problem(LAWS[name], runs, weights, constants).descend(theta, steps, polish)


def refit(fitted, runs, weights, steps, polish, jobs):
    """The coefficients for each of several weightings of the runs, from those of `fitted` on."""
    problem = Problem(fitted.law, runs, constants={k: fitted.coefficients[k] for k in fitted.law.constants(1, 1, 1)})
    tasks = [(fitted.law.name, runs, w, problem.constants, problem.theta(fitted.coefficients), steps, polish) for w in weights]
    return [problem.coefficients(theta) for _, theta in in_parallel(solve, tasks, jobs)]


@functools.cache
def workers(jobs):
    return ProcessPoolExecutor(jobs, get_context("spawn"))


def in_parallel(function, tasks, jobs=None):
    """map() over processes that stay for the next call."""
    jobs = jobs or os.cpu_count() or 1
    if min(jobs, len(tasks)) < 2:
        return list(map(function, tasks))
    return list(workers(jobs).map(function, tasks, chunksize=max(1, len(tasks) // (4 * jobs))))


def bootstrap(fitted, runs, n, seed=0, jobs=None):
    """`fitted` with n draws of its coefficients: whole curves are drawn with replacement, each draw is fitted from the optimum on."""
    curves, of = np.unique(runs.curve, return_inverse=True)
    rng = np.random.default_rng(seed)
    weights = [np.bincount(rng.integers(len(curves), size=len(curves)), minlength=len(curves))[of].astype(float) for _ in range(n)]
    return fitted._replace(draws=refit(fitted, runs, weights, 150, 0, jobs), units=len(curves))


def interval(fitted, quantity, level=0.95):
    """The expanded percentile interval of quantity(coefficients) over a Fit's draws.

    A percentile interval is too narrow by √((n − 1)/n) and by the normal's tails instead of Student's, for n resampled units; so the
    percentiles are taken further out [Hesterberg 2015, "What teachers should know about the bootstrap"].
    """
    from scipy.stats import norm, t

    n, tail = fitted.units, (1 - level) / 2
    if n > 1:
        tail = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(tail, n - 1))
    values = [quantity(c) for c in fitted.draws]
    return np.nanquantile(values, [tail, 1 - tail], axis=0)


def undetermined(fitted, runs):
    """Names of the coefficients that the runs say nothing about: e-fold changes move no predicted log loss by 1e-6."""
    problem = Problem(fitted.law, runs, constants={k: fitted.coefficients[k] for k in fitted.law.constants(1, 1, 1)})
    slopes = torch.func.jacfwd(problem.residuals)(torch.tensor(problem.theta(fitted.coefficients)))
    return [name for name, slope in zip(problem.names, slopes.abs().amax(0)) if not slope > 1e-6]


def leave_out(fitted, runs, every=None, jobs=None):
    """How well the law predicts whole curves that it has not seen: {curve: mean |log L̂ − log L|}.

    For each curve the law is fitted to all others of `runs` and judged on the curve's points in `every` (default: `runs`).
    """
    every = every or runs
    curves = np.unique(runs.curve)
    found = refit(fitted, runs, [(runs.curve != k).astype(float) for k in curves], 500, 100, jobs)
    errors = {}
    for k, c in zip(curves, found):
        seen = every.select(every.curve == k)
        errors[int(k)] = float(np.abs(np.log(evaluate(fitted.law, c, seen.N, seen.U, seen.e) / seen.loss)).mean())
    return errors


def thin(runs, points):
    """At most 2·points points of every curve: equally spaced in e and in log e. Neighbours on a curve say the same."""
    keep = []
    for k in np.unique(runs.curve):
        which = np.flatnonzero(runs.curve == k)
        which = which[np.argsort(runs.e[which], kind="stable")]
        e = np.log(runs.e[which])
        by_log = np.searchsorted(e, np.linspace(e[0], e[-1], points)).clip(0, len(e) - 1)
        keep.append(which[np.unique(np.concatenate((by_log, np.linspace(0, len(e) - 1, points).round().astype(int))))])
    return runs.select(np.concatenate(keep))


def smooth(y, window=301):
    """A training loss smoothed as in the paper: a Gaussian mean, 3σ to either side, over `window` points or a tenth of a short curve."""
    half = min(window, len(y) // 10) // 2
    weights = np.exp(-0.5 * (3 * np.arange(-half, half + 1) / max(half, 1)) ** 2)
    return np.convolve(y, weights, "same") / np.convolve(np.ones(len(y)), weights, "same") if half else np.asarray(y, float)


# --------------------------------------------------------------------------------- approach 1: IsoFLOP valleys


class Valleys(NamedTuple):
    """One entry per budget: the parabola of the loss in log10 N and its minimum."""

    flops: np.ndarray
    N: np.ndarray  # at the minimum
    loss: np.ndarray
    parabola: np.ndarray  # (budgets, 3): numpy.polyfit's, in log10 N

    def power_laws(self):
        """N = k_N·C^a and D = k_D·C^b through the minima; D = C/(6N), so b = 1 − a. Raises ValueError for a single budget."""
        if len(self.flops) < 2:
            raise ValueError("one budget of compute gives no power law; an IsoFLOP fit needs two or more")
        a, k = np.polyfit(np.log(self.flops), np.log(self.N), 1)
        return dict(k_N=math.exp(k), a=a, k_D=math.exp(-k) / 6, b=1 - a)


def budget_of(runs, tolerance=0.1):
    """Which budget each run belongs to, by its FLOPs: runs within `tolerance` of their neighbour share one."""
    order = np.argsort(runs.flops)
    steps = np.diff(np.log(runs.flops[order]), prepend=-np.inf) > tolerance
    budget = np.empty(len(order), int)
    budget[order] = np.cumsum(steps) - 1
    return budget


def valleys(runs, loss=None):
    """Fit every budget's parabola; raises ValueError where there is no valley (fewer than three sizes, or no minimum)."""
    loss, budget = runs.loss if loss is None else loss, budget_of(runs)
    found = []
    for k in range(budget.max() + 1):
        which = budget == k
        flops = geometric_mean(runs.flops[which])
        if len(np.unique(runs.N[which])) < 3:
            raise ValueError(f"the budget of {flops:.3g} FLOPs has fewer than three sizes; an IsoFLOP fit needs three")
        parabola = np.polyfit(np.log10(runs.N[which]), loss[which], 2)
        if parabola[0] <= 0:
            raise ValueError(f"the budget of {flops:.3g} FLOPs has no minimum: its parabola opens downwards")
        x = -parabola[1] / (2 * parabola[0])
        found.append((flops, 10**x, np.polyval(parabola, x), parabola))
    return Valleys(*(np.array(column) for column in zip(*found)))


def bootstrap_valleys(runs, n, seed=0):
    """n draws of the power laws: residuals of all budgets, drawn anew around the parabolas; none if each budget has three sizes only.

    A parabola takes three degrees of freedom, so that residuals are widened by √(runs/df); and since σ is itself only known from df of
    them, each draw has a σ of its own, by its χ² distribution: the intervals are Student's, not the normal's.
    """
    rng, fitted, budget = np.random.default_rng(seed), valleys(runs), budget_of(runs)
    smooth = np.array([np.polyval(fitted.parabola[k], x) for k, x in zip(budget, np.log10(runs.N))])
    df = len(budget) - 3 * len(fitted.flops)
    if df < 1:
        return []
    residuals, draws = (runs.loss - smooth) * math.sqrt(len(budget) / df), []
    for _ in range(20 * n):  # a draw may have no valley
        if len(draws) == n:
            break
        try:
            draws.append(valleys(runs, smooth + rng.choice(residuals, len(budget)) * math.sqrt(df / rng.chisquare(df))).power_laws())
        except ValueError:
            continue
    return draws


# ------------------------------------------------------------------------------------------------ best choices


def allocation(c):
    """The power laws of compute-optimal N and D by a parametric law: k_N, a, k_D, b."""
    ratio, share = balance(tensors(c)).item(), c["b"] / (c["a"] + c["b"])
    return dict(k_N=ratio * 6**-share, a=share, k_D=6 ** (share - 1) / ratio, b=1 - share)


def eq15_best_epochs(c, N, U):
    """The epochs at which eq. 15's loss has its minimum, or 1 where it has none.

    dD′/de = 0 is γ·e·(e − 1)^(γ−1) = p·e_p^γ; the left side falls until e = 1/γ, so the minimum of the loss is the root beyond.
    """
    from scipy.optimize import brentq

    e_p = c["c"] * U ** c["m"] / N ** c["k"]

    def gap(ln_e):
        return math.log(c["g"]) + ln_e + (c["g"] - 1) * math.log(math.expm1(ln_e)) - math.log(c["p"]) - c["g"] * math.log(e_p)

    low = -math.log(c["g"])
    return math.exp(brentq(gap, low, 100, xtol=1e-14)) if gap(low) < 0 else 1.0


class Choice(NamedTuple):
    N: float
    e: float
    loss: float
    edge: bool  # the best lies on the border of what was searched: there is no minimum inside


def best(law, c, U, N=(1e5, 1e13), e=(1.0, 1e5), flops=math.inf, points=200):
    """The N and e within these bounds, at 6·N·U·e ≤ flops, with the lowest loss for U unique tokens; a number fixes one.

    A grid, then finer ones around its best cell: a law may have several minima. Where the best costs too much, the same along the
    line 6·N·U·e = flops. Raises ValueError where the bounds leave nothing within the budget.
    """
    bounds = [np.log((x, x) if np.isscalar(x) else x) for x in (N, e)]
    ln_N, ln_e, loss, edge = zoom(lambda n, x: evaluate(law, c, np.exp(n), U, np.exp(x)), bounds, points)
    if 6 * U * math.exp(ln_N + ln_e) > flops * (1 + 1e-9):
        total = math.log(flops / 6 / U)
        line = max(bounds[1][0], total - bounds[0][1]), min(bounds[1][1], total - bounds[0][0])
        if line[0] > line[1] + 1e-9:
            raise ValueError(f"{flops:.3g} FLOPs are not enough for {U:.3g} unique tokens within N from {math.exp(bounds[0][0]):.3g} and e from {math.exp(bounds[1][0]):.3g} on")
        _, ln_e, loss, _ = zoom(lambda n, x: evaluate(law, c, np.exp(total - x), U, np.exp(x)), [np.zeros(2), np.array(line)], points)
        ln_N, edge = total - ln_e, False
    return Choice(math.exp(ln_N), math.exp(ln_e), loss, edge)


def zoom(loss, outer, points):
    """Where loss(ln N, ln e) is lowest within the bounds: ln N, ln e, the loss, and whether that is on the border.

    A single epoch is a choice like any other, so the lower border of e does not count.
    """
    bounds = outer
    for _ in range(4):
        ln_N, ln_e = (np.linspace(*b, points if np.ptp(b) > 0 else 1) for b in bounds)
        values = loss(ln_N[:, None], ln_e[None])
        i, j = np.unravel_index(np.nanargmin(values), values.shape)
        found = ln_N[i], ln_e[j]
        bounds = [np.clip(x + np.array([-2, 2]) * np.ptp(b) / points, *o) for x, b, o in zip(found, bounds, outer)]
    free_N, free_e = (np.ptp(b) > 0 for b in outer)
    edge = free_N and min(abs(found[0] - outer[0])) < 1e-6 or free_e and abs(found[1] - outer[1][1]) < 1e-6
    return float(found[0]), float(found[1]), float(values[i, j]), bool(edge)


# ------------------------------------------------------------------------------------------ the published ones

# Muennighoff et al. 2023, appendix A: C4, GPT-2's tokenizer, autoregressive; A, B and E from their logarithms.
MUENNIGHOFF = dict(E=math.exp(0.6254804), A=math.exp(6.255414), a=0.3526596, B=math.exp(7.3049974), b=0.3526596, R_D=15.387756, R_N=5.309743)
# Hoffmann et al. 2022 on MassiveText: approaches 1 and 2 as power laws of compute, approach 3 with its loss.
CHINCHILLA = {1: dict(k_N=0.09, a=0.50, k_D=1.88, b=0.50), 2: dict(k_N=0.15, a=0.49, k_D=1.15, b=0.51)}
CHINCHILLA_3 = dict(E=1.69, A=406.4, a=0.34, B=410.7, b=0.28)


def published(path=Path(__file__).parent.parent / "results/quokka/coefficients.json"):
    """The paper's own coefficients: {law's name: coefficients}, unrounded where its figures give them; and approach 1's power laws."""
    read = json.loads(path.read_text())
    rename = dict(alpha="a", beta="b", c_p="c", m_p="m", k_p="k", p_e="p", gamma="g", delta="d", R_D_star="R")

    def pick(name, which):
        return {rename.get(k, k): v for k, v in read[name][which].items() if not k.startswith("max")}

    return dict(
        approach1=read["eq_approach1_power_laws"]["printed"], parametric=pick("eq13", "printed"),
        eq15=pick("eq15", "unrounded_recovered_from_fig17_red_curves"), eq21=pick("eq21", "unrounded_recovered_from_fig19_red_curves"),
        eq23=pick("eq23", "printed"))
