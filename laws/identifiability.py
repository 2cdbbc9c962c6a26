"""What the data of a fit determine, and how well: one judge for every table, figure and plan.

Gauss-Newton's covariance has principal axes: orthogonal directions in θ, the coefficients' logarithms, each
as long as half the 95 % interval along it (`Fit.axes`). Along an axis that is very long, the coefficients may
move and no run's loss does. Runs that all have 20 tokens per parameter, for instance, can't tell A/Nᵃ from
B/Dᵇ: they leave all of the parametric law's coefficients open, though the loss at that ratio is well known.

    undetermined_coefficients(fit)                          ["E", "A", "a", "B", "b"]
    why_undetermined(fit)                                   "every run has 20 tokens per parameter"
    is_determined(fit, lambda c: allocation(c)["a"])        False
    interval(fit, lambda c: c["E"])                         of resamples, but not narrower than Gauss-Newton's
"""

import math

import numpy as np

from configurator.format import human_count
from laws.fitting import OPEN, predict
from laws.forms import evaluate

MOVED = 0.2  # how far open axes may move a quantity (as a share of it) before it counts as unknown
LEVEL = 0.95
# what runs may have in common, and how that is said
ALIKE = dict(ratio="{} tokens per parameter", N="{} parameters", D="{} tokens", U="{} unique tokens",
             flops="{} FLOPs")


def coefficient_axes(fit):
    """The axes as rows over the coefficients that were fitted, and the names of these."""
    if not len(fit.axes):
        return np.zeros((0, 0)), []
    names = [name for name in fit.coefficients if name in fit.law.starts(1, 1, 1)]
    return np.array(fit.axes), names


def open_axes(fit):
    """The axes along which the data say nothing; none where a fit of an older version keeps no axes."""
    axes, _ = coefficient_axes(fit)
    return axes[np.linalg.norm(axes, axis=1) > OPEN]


def undetermined_coefficients(fit):
    """The names of the coefficients that the data leave open."""
    _, names = coefficient_axes(fit)
    reach = np.linalg.norm(open_axes(fit), axis=0)
    return [name for name, far in zip(names, reach) if far > MOVED]


def vanished_coefficients(fit):
    """The names of the coefficients that the fit has sent to 0."""
    axes, names = coefficient_axes(fit)
    return [name for name, column in zip(names, axes.T) if not column.any()]


def why_undetermined(fit):
    """What all runs of a fit have in common, as a remark on what they leave open."""
    if fit.law.name != "parametric" and fit.data_range["e"][1] <= 1.01:
        return "no token was seen twice"
    for quantity, text in ALIKE.items():
        low, high = fit.data_range.get(quantity, (0, math.inf))
        if high <= 1.2 * low:
            return f"every run has {text.format(human_count(math.sqrt(low * high)))}"
    return "too few runs, or too alike"


def is_determined(fit, quantity):
    """Whether the data determine quantity(coefficients)."""
    return half_width(fit, quantity, open_axes(fit)) <= MOVED * abs(quantity(fit.coefficients))


def half_width(fit, quantity, axes):
    """Half the 95 % interval that these axes give quantity(coefficients), by its slopes along them."""
    moved = []
    for axis in axes:
        step = min(1.0, 1e-3 / np.linalg.norm(axis))
        ahead, behind = (quantity(displaced(fit, sign * step * axis)) for sign in (1, -1))
        moved.append((ahead - behind) / (2 * step))
    return float(np.linalg.norm(moved))


def interval(fit, quantity):
    """The 95 % interval of quantity(coefficients), over a Fit's draws but not narrower than Gauss-Newton's.

    A percentile interval is too narrow by √((n − 1)/n) and by the normal's tails instead of Student's, for
    n resampled units; so the percentiles are taken further out [Hesterberg 2015, "What teachers should know
    about the bootstrap"]. Resamples of a few runs may still agree by chance: hence the other bound.
    """
    from scipy.stats import norm, t

    n, tail = fit.n_resampled, (1 - LEVEL) / 2
    if n > 1:
        tail = norm.cdf(math.sqrt(n / (n - 1)) * t.ppf(tail, n - 1))
    low, high = np.nanquantile([quantity(c) for c in fit.draws], [tail, 1 - tail])

    value = quantity(fit.coefficients)
    half = half_width(fit, quantity, coefficient_axes(fit)[0])
    if not 0 < low <= high:
        return (low, high) if high - low >= 2 * half else (value - half, value + half)
    relative = half / value
    if math.log(high / low) >= 2 * relative:
        return low, high
    factor = math.exp(min(relative, 700))  # of what the data leave open: as good as infinite
    return value / factor, value * factor


def scatter_of(fit, runs):
    """The standard deviation of log L of fitted runs around their law."""
    residuals = np.log(predict(fit, runs.N, runs.U, runs.e) / runs.loss)
    freedom = max(1, len(residuals) - len(fit.law.starts(1, 1, 1)))
    return math.sqrt((residuals**2).sum() / freedom)


def interval_of_loss(fit, N, U, e=1.0, scatter=0.0):
    """The 95 % interval of the loss by a Fit; with a `scatter` of log L: of a run's loss."""
    from scipy.stats import norm

    def loss(c):
        return float(evaluate(fit.law, c, N, U, e))

    low, high = interval(fit, loss)
    if not scatter:
        return low, high
    value, more = loss(fit.coefficients), norm.ppf((1 + LEVEL) / 2) * scatter
    below, above = max(0.0, math.log(value / max(low, 1e-9))), max(0.0, math.log(high / value))
    return (min(low, value * math.exp(-math.hypot(below, more))),
            max(high, value * math.exp(math.hypot(above, more))))


def displaced(fit, shift):
    """A fit's coefficients, moved by a vector in θ."""
    _, names = coefficient_axes(fit)
    moved = dict(fit.coefficients)
    for name, delta in zip(names, shift):
        moved[name] = moved[name] + delta if name in fit.law.signed else moved[name] * math.exp(delta)
    return moved
