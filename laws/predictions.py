"""Runs predicted before they are trained, and how much they surprised; which run to train next.

    python scaling.py sweep --known=runs/first …            OUT/predictions.csv, before anything is trained
    python scaling.py plan --from=runs/first --flops=1e21   the next run that would narrow N_opt most per FLOP

Runs that see every token once, by the parametric law (approach 2) fitted to those that exist.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import split_paths
from configurator.format import human_count
from corpus.files import all_or_none
from laws.collect import find_csv
from laws.fitting import REPEATABLE, Regression, bootstrap, fit_law, predict
from laws.forms import PARAMETRIC, allocation
from laws.identifiability import interval_of_loss, scatter_of, undetermined_coefficients
from laws.runs import Runs, data_range, read_csv, read_rows, write_csv

COLUMNS = "name objective params tokens fitted loss low high seen surprise".split()
FILE = "predictions.csv"
RESAMPLES = 40
OPEN_LOSS = 1.5  # a loss that is not known to this factor is not predicted


# ------------------------------------------------------------------------------------------------ predictions


def known_runs(paths, objective):
    """The Runs of an objective in CSVs and folders of runs that saw every token once. Raises ValueError."""
    parts = []
    for path in split_paths(paths):
        runs = read_csv(find_csv(path, Path(path)), objective)
        parts.append(runs.select(runs.e <= 1.01))
    if not any(len(part.N) for part in parts):
        raise ValueError(f"{paths} has no run that saw every token once, as the parametric law is of")
    columns = [np.concatenate([part[i] for part in parts]) for i in range(len(Runs._fields) - 1)]
    return Runs(*columns, np.arange(len(columns[0])))


def predict_runs(known, planned, seed=0):
    """Rows for runs [(name, objective, params, tokens)], of COLUMNS without those of what is seen later.

    Raises ValueError where the known runs are too few, or leave a loss open.
    """
    fit = fit_law(PARAMETRIC, known)
    fit = bootstrap(fit, known, RESAMPLES, seed)._replace(data_range=data_range(known))
    scatter, rows = scatter_of(fit, known), []
    for name, objective, params, tokens in planned:
        low, high = interval_of_loss(fit, params, tokens, 1.0, scatter)
        loss = float(predict(fit, params, tokens))
        if not low > loss / OPEN_LOSS or not high < loss * OPEN_LOSS:
            raise ValueError(f"{len(known.N)} runs leave the loss of {name} open, from {low:.3g} to "
                             f"{high:.3g} nats per token: train more of them first")
        rows.append(dict(name=name, objective=objective, params=params, tokens=tokens, fitted=len(known.N),
                         loss=loss, low=low, high=high))
    return rows


def surprise(row, seen):
    """How far a loss lies from its prediction, in halves of the 95 % interval: within it, from −1 to 1."""
    bound = row["high"] if seen > row["loss"] else row["low"]
    return math.copysign(math.log(seen / row["loss"]) / math.log(bound / row["loss"]), seen - row["loss"])


def read_predictions(folder):
    """{run's name: its row} of a sweep's predictions; numbers as numbers. Raises ValueError or OSError."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    rows = {}
    for _, row in read_rows(path):
        numbers = {name: float(row[name]) for name in COLUMNS[2:] if row.get(name)}
        rows[row["name"]] = dict(name=row["name"], objective=row["objective"]) | numbers
    return rows


def write_predictions(folder, rows):
    """Write {run's name: its row} into a sweep's folder."""
    with all_or_none(Path(folder)) as building:
        write_csv(rows.values(), building / FILE, COLUMNS)


def compare_seen(rows, points):
    """Add to predictions {name: row} what came out, from the rows of a sweep's points.csv."""
    seen = {point["name"]: float(point["val_loss"]) for point in points}
    return {name: row | dict(seen=seen[name], surprise=surprise(row, seen[name])) if name in seen else row
            for name, row in rows.items()}


def describe(row):
    """A prediction, and what came out, in one cell of a table."""
    text = f"{row['loss']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    return text if "seen" not in row else f"{text}, seen {row['seen']:.3f} ({row['surprise']:+.2f})"


def summary(rows):
    """How many runs came out within their intervals, in one line; None before any has."""
    surprises = [row["surprise"] for row in rows.values() if "surprise" in row]
    if not surprises:
        return None
    inside = sum(abs(value) <= 1 for value in surprises)
    return (f"{inside} of {len(surprises)} runs are within the 95 % intervals that were predicted; mean "
            f"surprise {np.mean(surprises):+.2f} halves of an interval")


# ----------------------------------------------------------------------------------------------- the next run


class NextRun(NamedTuple):
    """A run that could be trained, and what it would do for ln N_opt at the budget in question."""

    params: float
    tokens: float
    width: float  # of the 95 % interval of ln N_opt, with this run

    @property
    def flops(self):
        return 6 * self.params * self.tokens


def next_runs(known, flops, most=4.0):
    """(width of the 95 % interval of ln N_opt at a budget, the NextRuns, best per FLOP first).

    By Gauss-Newton: a run adds its row of the Jacobian to the information, whatever its loss will be. most:
    times the largest run's compute, the largest that is considered. Raises ValueError.
    """
    from scipy.stats import t

    fit = fit_law(PARAMETRIC, known)
    regression = Regression(PARAMETRIC, known)
    theta = torch.tensor(regression.theta(fit.coefficients))
    J = regression.slopes(theta.numpy())
    sigma = max(scatter_of(fit, known), REPEATABLE)
    information = J.T @ J / sigma**2
    slope = torch.func.grad(lambda theta: log_optimum(regression, theta, flops))(theta).numpy()
    if undetermined_coefficients(fit._replace(data_range=data_range(known))):
        information += np.eye(len(theta)) * 1e-4  # what is open is open by a factor of e^±200, not for ever
    quantile = 2 * t.ppf(0.975, max(1, len(J) - len(theta)))

    candidates = grid(known, most)
    rows = Regression(PARAMETRIC, candidates, regression.constants).slopes(theta.numpy()) / sigma
    covariance = np.linalg.inv(information)
    now = float(slope @ covariance @ slope)
    reach = rows @ covariance  # (candidates, coefficients); a rank-one update of the inverse
    gain = (reach @ slope) ** 2 / (1 + np.einsum("ij,ij->i", reach, rows))
    widths = quantile * np.sqrt(now - gain)
    found = [NextRun(N, U, width) for N, U, width in zip(candidates.N, candidates.U, widths)]
    width = quantile * math.sqrt(now)
    return width, sorted(found, key=lambda run: (run.width - width) / run.flops)


def log_optimum(regression, theta, flops):
    """ln N_opt at a budget by the parametric law, with a gradient."""
    c = dict(zip(regression.names, regression.values(theta).unbind()))
    log_balance = torch.log(c["a"] * c["A"] / (c["b"] * c["B"]))
    return (log_balance + c["b"] * math.log(flops / 6)) / (c["a"] + c["b"])


def grid(known, most):
    """Runs that could come next: sizes and tokens per parameter around the known ones, up to some compute."""
    sizes = np.geomspace(known.N.min() / 2, known.N.max() * 4, 15)
    ratios = known.U * known.e / known.N
    N, ratio = (x.ravel() for x in np.meshgrid(sizes, np.geomspace(ratios.min() / 2, ratios.max() * 2, 15)))
    runs = Runs(N, N * ratio, np.ones_like(N), np.ones_like(N), np.arange(len(N)))
    low, high = known.flops.min() / 2, known.flops.max() * most
    return runs.select((runs.flops >= low) & (runs.flops <= high))


def print_next_runs(paths, objective, flops):
    """Print what is known of N_opt at a budget, and the five runs that would narrow it most per FLOP."""
    known = known_runs(paths, objective)
    width, runs = next_runs(known, flops)
    optimum = allocation(fit_law(PARAMETRIC, known).coefficients)
    N = optimum["k_N"] * flops ** optimum["a"]
    print(f"\n{len(known.N)} runs of {paths}: at {flops:.3g} FLOPs N_opt is {human_count(N)}, known to a "
          f"factor of {math.exp(0.5 * width):.3g} either way.")
    print("Which next run would narrow that most per FLOP, if the law holds there:\n")
    print(f"{'params':>8} {'tokens':>8} {'FLOPs':>9}  {'then a factor of':>16}")
    for run in runs[:5]:
        print(f"{human_count(run.params):>8} {human_count(run.tokens):>8} {run.flops:>9.3g}  "
              f"{math.exp(0.5 * run.width):>16.3g}")
