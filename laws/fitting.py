"""Fit a law to runs, with intervals, and judge it on curves that it has not seen.

One `fit_law`, one `bootstrap` and one `leave_out` serve all laws, as all of them take N, U and e. Gradients
are exact (autograd), positive coefficients are fitted as logarithms, the loss is Huber's on log L.

    fitted = fit_law(PARAMETRIC, read_csv("runs.csv"))
    predict(fitted, N=1e9, U=1e11)
"""

import functools
import itertools
import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import split_paths
from corpus.files import list_folder
from corpus.records import check, read_record, real, whole
from laws.forms import LAWS, Law, coefficient_names, evaluate, to_tensors
from laws.runs import geometric_mean

FARTHEST = 100.0  # θ's bounds: what the data leave open would go on for ever
OPEN = 6.0  # half the 95 % interval in θ, a factor of 400 to either side, from which on nothing is known
REPEATABLE = 1e-3  # no run repeats its log loss, and no law gives it, to better than this


class Fit(NamedTuple):
    """A law with its coefficients."""

    law: Law
    coefficients: dict
    huber_sum: float = math.nan  # Σ Huber(log L̂ − log L), as the paper counts it
    draws: tuple | list = ()  # coefficients of bootstrap resamples
    n_resampled: int = 0  # how many curves or runs were resampled
    data_range: dict | None = None  # {N, D, U, e, flops, ratio: (smallest, largest)}; None: unknown
    axes: tuple | list = ()  # principal axes of the coefficients' uncertainty, see laws/identifiability.py


def predict(fit, N, U, e=1.0):
    """The loss by a Fit, in nats per token, for numbers or arrays of parameters, unique tokens and epochs."""
    return evaluate(fit.law, fit.coefficients, N, U, e)


# ---------------------------------------------------------------------------------------------------- fitting


class Regression:
    """A law on given runs as a function of θ, the coefficients' logarithms (of signed ones: themselves)."""

    def __init__(self, law, runs, constants=None):
        sizes = geometric_mean(runs.N), geometric_mean(runs.U * runs.e), geometric_mean(runs.U)
        self.law = law
        self.starts = {name: tuple(values) for name, values in law.starts(*sizes).items()}
        self.constants = law.constants(*sizes) if constants is None else constants
        self.names = list(self.starts)
        self.signed = torch.tensor([name in law.signed for name in self.names])

        self.N, self.U, self.e = (torch.tensor(x, dtype=torch.float64) for x in (runs.N, runs.U, runs.e))
        self.log_loss = torch.log(torch.tensor(runs.loss, dtype=torch.float64))
        self.constant_tensors = to_tensors(self.constants)

    def theta(self, coefficients):
        """θ of these coefficients."""
        theta = []
        for name in self.names:
            value = coefficients[name]
            theta.append(value if name in self.law.signed else math.log(max(value, 1e-300)))
        return np.array(theta)

    def coefficients(self, theta):
        """The coefficients, constants included, at θ."""
        values = self.values(torch.tensor(theta))
        return {name: float(value) for name, value in zip(self.names, values)} | self.constants

    def values(self, theta):
        return torch.where(self.signed, theta, torch.exp(torch.where(self.signed, 0.0, theta)))

    def residuals(self, theta):
        """log L̂ − log L of every run."""
        c = dict(zip(self.names, self.values(theta).unbind())) | self.constant_tensors
        return torch.log(self.law.loss(c, self.N, self.U, self.e)) - self.log_loss

    def huber_sum(self, theta):
        """Σ Huber and its gradient: what is minimised."""
        theta, delta = torch.tensor(theta, requires_grad=True), self.law.delta
        r = self.residuals(theta).abs()
        value = torch.where(r < delta, r.square() / 2, delta * (r - delta / 2)).sum()
        value.backward()

        gradient = theta.grad.numpy()
        if not (math.isfinite(value.item()) and np.isfinite(gradient).all()):
            return 1e9, np.zeros_like(gradient)
        return value.item(), gradient

    def descend(self, theta, steps):
        """(Σ Huber, θ) after so many steps of L-BFGS."""
        from scipy.optimize import minimize

        limits = dict(maxiter=steps, maxfun=2 * steps, maxcor=20, ftol=1e-13, gtol=1e-11)
        bounds = [(-FARTHEST, FARTHEST)] * len(theta)
        result = minimize(self.huber_sum, theta, jac=True, method="L-BFGS-B", bounds=bounds, options=limits)
        return result.fun, result.x

    def converge(self, theta, rounds=6):
        """(Σ Huber, θ) at the minimum near θ: L-BFGS and Gauss-Newton in turn, until neither gains anything.

        L-BFGS stops in flat valleys, Gauss-Newton where Huber's loss is linear.
        """
        value = self.huber_sum(theta)[0]
        for _ in range(rounds):
            before, polished = value, np.clip(self.gauss_newton(theta), -FARTHEST, FARTHEST)
            if self.huber_sum(polished)[0] < value:
                theta = polished
            value, theta = self.descend(theta, 100)
            if before - value < 1e-7 * (value + len(self.N) * REPEATABLE**2 / 2):
                break
        return value, theta

    def gauss_newton(self, theta, steps=30):
        """θ after so many steps of scipy's trust region on the residuals."""
        from scipy.optimize import least_squares

        jacobian = torch.func.jacfwd(self.residuals)

        def finite(x):
            return np.nan_to_num(x.detach().numpy(), nan=1e3, posinf=1e3, neginf=-1e3)

        with np.errstate(over="ignore"):  # far from the runs
            result = least_squares(
                lambda t: finite(self.residuals(torch.tensor(t))), theta,
                lambda t: finite(jacobian(torch.tensor(t))),
                loss="huber", f_scale=self.law.delta, x_scale="jac", max_nfev=steps)
        return result.x

    def principal_axes(self, theta):
        """The axes of Gauss-Newton's covariance at θ as rows, each as long as half its 95 % interval.

        Where a term is absent, its coefficients have no slope. If the data can't tell it from others, these
        are open, too: that shows with the term as large as at the start. Else it is known to be absent.
        """
        slopes = self.slopes(theta)
        absent = np.abs(slopes).max(0) < 1e-6
        present = self.theta({name: values[-1] for name, values in self.starts.items()})
        present = np.where(absent, present, theta)
        ratio = torch.exp(self.residuals(torch.tensor(present)) - self.residuals(torch.tensor(theta))).numpy()
        axes = self.axes_of(np.where(absent, self.slopes(present) * ratio[:, None], slopes), theta)
        if np.linalg.norm(axes, axis=1).max() > OPEN:
            return axes.tolist()
        slopes[:, absent & ~self.signed.numpy() & (theta < math.log(1e-6))] = math.nan
        return self.axes_of(slopes, theta).tolist()

    def slopes(self, theta):
        """The Jacobian of log L̂ by θ: (runs, coefficients)."""
        return torch.func.jacfwd(self.residuals)(torch.tensor(theta)).numpy()

    def axes_of(self, slopes, theta):
        """The principal axes from the slopes; a column of nan is no direction."""
        from scipy.stats import t

        free = np.isfinite(slopes).all(0)
        _, singular, directions = np.linalg.svd(slopes[:, free], full_matrices=False)
        freedom = max(1, len(slopes) - len(singular))
        sigma = math.sqrt(self.residuals(torch.tensor(theta)).square().sum().item() / freedom)
        half = t.ppf(0.975, freedom) * max(sigma, REPEATABLE) / np.maximum(singular, 1e-6 * singular[0])
        axes = np.zeros((len(singular), len(theta)))
        axes[:, free] = half[:, None] * directions
        return axes


def fit_law(law, runs, start=None, jobs=None):
    """Find the coefficients that minimise Σ Huber(log L̂ − log L) over `runs`.

    From every point of the law's grid of starts a short descent, from the best four to convergence. `start`:
    coefficients to start from instead. Raises ValueError if there are fewer runs than coefficients.
    """
    regression = Regression(law, runs)
    n_coefficients = len(regression.names)
    if len(runs.N) < n_coefficients:
        raise ValueError(f"{law.name} has {n_coefficients} coefficients, there are only {len(runs.N)} runs")

    def descend_from(thetas, steps):
        task = Descent(law.name, runs, regression.constants, None, steps)
        tasks = [task._replace(theta=theta) for theta in thetas]
        small = len(thetas) * len(runs.N) < 20_000  # not worth the start of processes
        return sorted(parallel_map(descend, tasks, 1 if small else jobs), key=lambda pair: pair[0])

    if start:
        thetas = [regression.theta(start)]
    else:
        grid = itertools.product(*regression.starts.values())
        thetas = [regression.theta(dict(zip(regression.names, values))) for values in grid]
        thetas = [theta for _, theta in descend_from(thetas, 40)[:4]]
    value, theta = descend_from(thetas, 0)[0]
    return Fit(law, regression.coefficients(theta), value, axes=regression.principal_axes(theta))


class Descent(NamedTuple):
    """A descent from one start, as it can travel to another process."""

    law: str
    runs: tuple
    constants: dict
    theta: np.ndarray | None
    steps: int  # of L-BFGS; 0: to convergence


def descend(task):
    """(Σ Huber, θ) at the end of a Descent."""
    torch.set_num_threads(1)  # small arrays: threads would wait for each other
    regression = Regression(LAWS[task.law], task.runs, task.constants)
    return regression.descend(task.theta, task.steps) if task.steps else regression.converge(task.theta)


def refit(fit, samples, jobs):
    """The coefficients for each of several samples of runs, from those of `fit` on to convergence."""
    regression = regression_of(fit, samples[0])
    theta = regression.theta(fit.coefficients)
    tasks = [Descent(fit.law.name, runs, regression.constants, theta, 0) for runs in samples]
    return [regression.coefficients(theta) for _, theta in parallel_map(descend, tasks, jobs)]


def regression_of(fit, runs):
    """The Regression of a fitted law on (other) runs, with the constants of its fit."""
    constants = {name: fit.coefficients[name] for name in fit.law.constants(1, 1, 1)}
    return Regression(fit.law, runs, constants=constants)


@functools.cache
def worker_pool(jobs):
    return ProcessPoolExecutor(jobs, get_context("spawn"))


def parallel_map(function, tasks, jobs=None):
    """map() as a list, over processes that stay for the next call."""
    jobs = jobs or os.cpu_count() or 1
    if min(jobs, len(tasks)) < 2:
        return list(map(function, tasks))
    return list(worker_pool(jobs).map(function, tasks, chunksize=max(1, len(tasks) // (4 * jobs))))


# ------------------------------------------------------------------------------------- how far to trust a fit


def bootstrap(fit, runs, n, seed=0, jobs=None):
    """Give `fit` n draws: whole curves are drawn with replacement, and refitted from the optimum on."""
    curves, curve_index = np.unique(runs.curve, return_inverse=True)
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        drawn = rng.integers(len(curves), size=len(curves))
        counts = np.bincount(drawn, minlength=len(curves))
        samples.append(runs.select(np.repeat(np.arange(len(curve_index)), counts[curve_index])))
    return fit._replace(draws=refit(fit, samples, jobs), n_resampled=len(curves))


def mean_errors(fit, runs):
    """Mean |log L̂ − log L| over all points, and over curves of each curve's mean."""
    errors = np.abs(np.log(predict(fit, runs.N, runs.U, runs.e) / runs.loss))
    return errors.mean(), np.mean([errors[runs.curve == k].mean() for k in np.unique(runs.curve)])


def leave_out(fit, runs, judged=None, jobs=None):
    """Predict every curve by the law fitted to all others: {curve: mean |log L̂ − log L|}.

    judged: the points that the law is judged on, of the same curves as `runs` (default: `runs`).
    """
    judged = judged or runs
    curves = np.unique(runs.curve)
    without = [runs.select(runs.curve != k) for k in curves]
    errors = {}
    for k, c in zip(curves, refit(fit, without, jobs)):
        unseen = judged.select(judged.curve == k)
        predicted = evaluate(fit.law, c, unseen.N, unseen.U, unseen.e)
        errors[int(k)] = float(np.abs(np.log(predicted / unseen.loss)).mean())
    return errors


# -------------------------------------------------------------------------------------------------- fits.json


class FitFile(NamedTuple):
    """What a fits.json holds: the laws of the runs of one objective."""

    fits: dict  # {law: Fit}
    approach1: Fit | None  # of no law: its coefficients and draws are power laws of compute
    objective: str  # masked, ar, …; "" where the data did not say
    data: str  # the name of the data


# the entries of a fits.json
ABOUT = {"data?": str, "objective?": str}
APPROACH1 = {"coefficients": {str: real()}, "draws": [{str: real()}], "range": {str: [float]}}
FIT = {"coefficients": {str: real()}, "draws": [[real()]], "range": {str: [float]}, "objective": float,
       "units?": whole(), "axes?": [[float]]}


def read_fits(path):
    """Read a fits.json; raises ValueError."""
    fits, approach1, about = {}, None, {}
    try:
        for name, entry in read_record(path, {str: {}}).items():
            if name == "about":
                about = entry
                check(about, ABOUT, name)
            elif name == "approach1":
                check(entry, APPROACH1, name)
                approach1 = read_approach1(entry)
            else:
                check(entry, FIT, name)
                fits[name] = read_fit(name, entry)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        problem = problem.strerror if isinstance(problem, OSError) else problem
        raise ValueError(f"{path}: {problem}; make it with python scaling.py fit") from None
    data = about.get("data", Path(path).resolve().parent.name)
    return FitFile(fits, approach1, about.get("objective", ""), data)


def read_fit(name, entry):
    """A Fit from its entry in fits.json; draws are lists, in the order of the coefficients."""
    coefficients = entry["coefficients"]
    if coefficients.keys() != coefficient_names(LAWS[name]):
        raise ValueError(f"{name} has other coefficients than in laws/forms.py")
    draws = [dict(zip(coefficients, draw)) for draw in entry["draws"]]
    axes, n_fitted = entry.get("axes", ()), len(LAWS[name].starts(1, 1, 1))
    if any(len(axis) != n_fitted for axis in axes):
        raise ValueError(f"{name}: axes of other coefficients than in laws/forms.py")
    return Fit(LAWS[name], coefficients, entry["objective"], draws, entry.get("units", 0), entry["range"],
               axes)


def read_approach1(entry):
    for power in (entry["coefficients"], *entry["draws"]):
        if not {"k_N", "a", "k_D", "b"} <= power.keys():
            raise ValueError("approach1 has other coefficients than in laws/isoflop.py")
    if not entry["range"]:
        raise ValueError("approach1 has no range of its data")
    return Fit(None, entry["coefficients"], draws=entry["draws"], data_range=entry["range"])


def fit_entry(fit):
    """What fits.json keeps of a Fit: seven digits of each draw."""
    draws = []
    for draw in fit.draws:
        draws.append([float(f"{value:.7g}") for value in draw.values()])
    axes = [[float(f"{value:.4g}") for value in axis] for axis in fit.axes]
    return dict(coefficients=fit.coefficients, objective=fit.huber_sum, range=fit.data_range,
                units=fit.n_resampled, axes=axes, draws=draws)


def find_fits(paths):
    """The fits.json files (fits_ar.json, …) of a comma list of files and folders; raises ValueError."""
    files = []
    for path in split_paths(paths):
        inside = list(map(str, list_folder(path, "fits*.json"))) if Path(path).is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no fits.json; make it with python scaling.py fit")
        files += inside
    return files
