"""Scaling laws as formulas (docs/math.md §9): a model's loss as a function of N, U and e.

N is the number of parameters, U the number of unique tokens, e the number of epochs over them, D = U·e the
number of tokens seen. A law is a plain function of named coefficients and of N, U, e (float64 tensors) that
returns nats per token; the compute-constrained ones use U and e through D alone. Beside them: the published
coefficients, and the N and e that a law advises.

    evaluate(PARAMETRIC, published_coefficients()["parametric"], N=1e9, U=1e11)
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import softplus

QUOKKA = Path(__file__).resolve().parent.parent / "results/quokka"  # the paper's numbers


class Law(NamedTuple):
    """A formula and what a fit of it needs to know."""

    name: str
    loss: Callable  # loss(c, N, U, e) → nats per token; c: {coefficient: value}
    starts: Callable  # starts(N, D, U) → {coefficient: values}: the grid of starts for data of that size
    signed: tuple = ()  # coefficients that may be negative; the others are fitted as logarithms
    delta: float = 1e-3  # where Huber's loss on log L turns from square to linear
    constants: Callable = lambda N, D, U: {}  # coefficients that are units, not fitted


# ----------------------------------------------------------------------------------------------- the formulas


def parametric(c, N, U, e):
    """Chinchilla's approach 3, the paper's approach 2 (eq. 13): every token counts as new, D = U·e."""
    return c["E"] + c["A"] * N ** -c["a"] + c["B"] * (U * e) ** -c["b"]


def eq15(c, N, U, e):
    """The paper's law for repeated data (eq. 14, 15): epochs add tokens by a power, then are forgotten."""
    e_p = c["c"] * U ** c["m"] * N ** -c["k"]
    repeats = torch.clamp(e - 1, min=1e-12)
    repeated_worth = c["p"] * torch.log(e) - (repeats / e_p) ** c["g"]
    worth = torch.where(e > 1, repeated_worth, torch.log(e))  # ln(D′/U)

    return c["E"] + c["A"] * N ** -c["a"] + c["B"] * torch.exp(-c["b"] * (torch.log(U) + worth))


def eq21(c, N, U, e):
    """The paper's first alternative (eq. 21): all tokens count, and overfitting is a term of its own."""
    ln_e = torch.clamp(torch.log(e), min=1e-12)
    overfitting = c["mu"] * (N / U) ** c["d"] * ln_e ** c["g"]
    return c["A"] * N ** -c["a"] + c["B"] * (U * e) ** -c["b"] + overfitting


def eq23(c, N, U, e):
    """The paper's second alternative (eq. 23): repeats lose worth by half-lives, then overfitting sets in."""
    D = effective_tokens(U, e, c["R"])
    excess = softplus((e - c["kappa"] * (U / N) ** c["eta"]) / c["tau"])
    excess = torch.clamp(excess, min=1e-300)  # 0^γ has no gradient
    overfitting = c["mu"] * (N / D) ** c["d"] * excess ** c["g"]
    return c["E"] + c["A"] * N ** -c["a"] + c["B"] * D ** -c["b"] + overfitting


def half_life(c, N, U, e):
    """Muennighoff's law for autoregressive models (arXiv 2305.16264, eq. 7 and 8).

    Repeated tokens lose worth, and so do parameters beyond those that are compute-optimal for U tokens.
    """
    ratio = balance(c)
    tokens = U * torch.clamp(e, max=1)
    optimal_N = torch.minimum(N, ratio * (ratio * tokens) ** (c["b"] / c["a"]))
    effective_N = optimal_N * (1 - c["R_N"] * torch.expm1((1 - N / optimal_N) / c["R_N"]))
    return c["E"] + c["A"] * effective_N ** -c["a"] + c["B"] * effective_tokens(U, e, c["R_D"]) ** -c["b"]


def ours(c, N, U, e):
    """Our law for repeated data; docs/scaling-laws.md derives it.

    ln D′ is piecewise linear in ln e with rounded corners: slope p while the learning rate warms up, p + r
    after the corner e₁, p + r − s beyond the corner e₂, where most of what U tokens hold has been learned.
    Overfitting adds C·(1 − exp(−z/C)) nats: z is a power of e before the corner e₃ and grows by g·μ per
    unit of ln e after it; C is where the loss stays when all is memorised.

    It does not say what text that is seen once gives: its e = 1 lies inside that warm-up.
    """
    n, u = torch.log(N / c["N0"]), torch.log(U / c["U0"])
    ln_e = torch.clamp(torch.log(e), min=0)  # up to e = 1 all is new: D′ = U·e, no overfitting
    doubled_batch = N > c["N_big"]  # fewer steps have been taken by the same epoch
    pace = torch.clamp(ln_e - c["w"] * doubled_batch, min=0)

    def ramp(x, corner):  # 0 at x = 0, slope 0 before the corner, 1 after it
        return (softplus(c["q"] * (x - corner)) - softplus(-c["q"] * corner)) / c["q"]

    first = torch.log(c["e1"])
    second = first + c["e2"] * torch.exp(c["k2"] * n - c["m2"] * u)  # never before the first
    ln_D = u + torch.clamp(torch.log(e), max=0) + c["p"] * pace
    ln_D = ln_D + c["r"] * ramp(pace, first) - c["s"] * ramp(pace, second)

    third = torch.log(c["e3"]) + c["m3"] * u - c["k3"] * n
    growth = softplus(c["g"] * (ln_e - third)) - softplus(-c["g"] * third)
    z = c["mu"] * torch.exp(c["d"] * n - c["f"] * u) * growth
    fresh = c["E"] + c["A"] * torch.exp(-c["a"] * n) + c["B"] * torch.exp(-c["b"] * ln_D)
    return fresh - c["C"] * torch.expm1(-z / c["C"])


def effective_tokens(U, e, R):
    """D′ = U·(1 + R(1 − exp(−(e − 1)/R))): a repetition's worth falls by 1/e every R epochs [Muennighoff]."""
    return U * torch.where(e > 1, 1 - R * torch.expm1((1 - e) / R), e)


def balance(c):
    """G = (aA/(bB))^(1/(a+b)), which says how a parametric law splits compute between N and D."""
    return (c["a"] * c["A"] / (c["b"] * c["B"])) ** (1 / (c["a"] + c["b"]))


# ------------------------------------------------------------------------ the laws with their grids of starts


def power_terms(N, D, N_nats=(0.3, 1.0), D_nats=(0.5, 2.0), a=(0.25, 0.45), b=(0.25, 0.45)):
    """Starts for A/N^a + B/D^b, from what the two terms may be in nats at a typical N and D."""
    return dict(A=[nats * N ** a[0] for nats in N_nats], a=a, B=[nats * D ** b[0] for nats in D_nats], b=b)


def parametric_starts(N, D, U):
    return dict(E=(1.0, 2.5), **power_terms(N, D))


def half_life_starts(N, D, U):
    return dict(E=(1.0, 2.0), **power_terms(N, D), R_D=(5.0, 15.0), R_N=(5.0,))


def eq15_starts(N, D, U):
    c = N**0.55 / U**0.39
    terms = power_terms(N, U, (0.3,), (5.0,), b=(0.13, 0.25))
    return dict(E=(0.1, 1.0), **terms, c=(5 * c, 20 * c), m=(0.39,), k=(0.55,), p=(1.5, 1.0), g=(0.4, 0.6))


def eq21_starts(N, D, U):
    terms = power_terms(N, U, (0.1, 0.3), (6.0,), b=(0.13, 0.2))
    return dict(**terms, mu=(1.6e-4, 1e-2), d=(0.43,), g=(4.5, 3.0))


def eq23_starts(N, D, U):
    terms = power_terms(N, U, (0.1,), (6.0,), a=(1.0, 0.3), b=(0.13, 0.25))
    onset = dict(kappa=(100 * (N / U) ** 1.5,), eta=(1.5,), tau=(27.0,))
    return dict(E=(0.01, 1.0), **terms, mu=(0.16, 0.02), d=(0.3,), **onset, g=(0.8,), R=(34.0, 10.0))


def ours_starts(N, D, U):
    terms = dict(E=(1.1, 0.5), A=(0.2,), a=(0.5,), B=(4.6,), b=(0.25,))
    ramps = dict(p=(0.2,), r=(1.0,), s=(1.07,), q=(2.2, 1.5))
    corners = dict(e1=(9.6,), e2=(1.5, 2.0), m2=(0.3, 0.0), k2=(0.0,))
    overfitting = dict(mu=(0.33,), d=(1.6,), f=(2.6,))
    onset = dict(e3=(240.0, 120.0), m3=(-1.0, 0.3), k3=(-0.3, 0.3), g=(2.0,))
    return dict(**terms, **ramps, **corners, **overfitting, **onset, C=(3.4,), w=(0.25,))


def ours_constants(N, D, U):
    return dict(N0=N, U0=U, N_big=2.5e9)


OURS_SIGNED = ("m2", "k2", "d", "f", "m3", "k3", "w")

PARAMETRIC = Law("parametric", parametric, parametric_starts)
HALF_LIFE = Law("half_life", half_life, half_life_starts)
EQ15 = Law("eq15", eq15, eq15_starts, delta=0.01)
EQ21 = Law("eq21", eq21, eq21_starts, delta=0.01)
EQ23 = Law("eq23", eq23, eq23_starts, signed=("eta",), delta=0.01)
OURS = Law("ours", ours, ours_starts, signed=OURS_SIGNED, delta=0.01, constants=ours_constants)
LAWS = {law.name: law for law in (PARAMETRIC, HALF_LIFE, EQ15, EQ21, EQ23, OURS)}


def coefficient_names(law):
    """The names of all coefficients of a law, its constants included."""
    return {*law.starts(1, 1, 1), *law.constants(1, 1, 1)}


def evaluate(law, coefficients, N, U, e=1.0):
    """The loss by a law, in nats per token, for numbers or arrays that broadcast: float64."""
    arrays = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (N, U, e)))
    N, U, e = (torch.from_numpy(x.copy()) for x in arrays)
    return law.loss(to_tensors(coefficients), N, U, e).numpy()


def to_tensors(coefficients):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in coefficients.items()}


# ------------------------------------------------------------------------------------- published coefficients

# Muennighoff et al. 2023, appendix A: C4, GPT-2's tokenizer, autoregressive; E, A, B from their logarithms.
MUENNIGHOFF = dict(E=math.exp(0.6254804), A=math.exp(6.255414), a=0.3526596, B=math.exp(7.3049974),
                   b=0.3526596, R_D=15.387756, R_N=5.309743)
# Hoffmann et al. 2022 on MassiveText: approaches 1 and 2 as power laws of compute, approach 3 with its loss.
CHINCHILLA = {1: dict(k_N=0.09, a=0.50, k_D=1.88, b=0.50), 2: dict(k_N=0.15, a=0.49, k_D=1.15, b=0.51)}
CHINCHILLA_3 = dict(E=1.69, A=406.4, a=0.34, B=410.7, b=0.28)

# names in coefficients.json → ours
PAPER_NAMES = dict(alpha="a", beta="b", c_p="c", m_p="m", k_p="k", p_e="p", gamma="g", delta="d",
                   R_D_star="R")


def published_coefficients(path=QUOKKA / "coefficients.json"):
    """The paper's {law: coefficients}, unrounded where its figures give them; and approach 1's power laws."""
    printed = json.loads(path.read_text(encoding="utf-8"))

    def pick(equation, column):
        values = printed[equation][column]
        return {PAPER_NAMES.get(k, k): value for k, value in values.items() if not k.startswith("max")}

    return dict(
        approach1=printed["eq_approach1_power_laws"]["printed"],
        parametric=pick("eq13", "printed"),
        eq15=pick("eq15", "unrounded_recovered_from_fig17_red_curves"),
        eq21=pick("eq21", "unrounded_recovered_from_fig19_red_curves"),
        eq23=pick("eq23", "printed"),
    )


# ----------------------------------------------------------------------------------------------- best choices


def allocation(c):
    """The power laws of compute-optimal N = k_N·C^a and D = k_D·C^b by a parametric law."""
    ratio = balance(to_tensors(c)).item()
    share = c["b"] / (c["a"] + c["b"])
    return dict(k_N=ratio * 6**-share, a=share, k_D=6 ** (share - 1) / ratio, b=1 - share)


def eq15_best_epochs(c, N, U):
    """The epochs at which eq. 15's loss has its minimum, or 1 where it has none.

    dD′/de = 0 is γ·e·(e − 1)^(γ−1) = p·e_p^γ; the left side falls until e = 1/γ, so the minimum of the loss
    is the root beyond.
    """
    from scipy.optimize import brentq

    e_p = c["c"] * U ** c["m"] / N ** c["k"]

    def difference(ln_e):
        left = math.log(c["g"]) + ln_e + (c["g"] - 1) * math.log(math.expm1(ln_e))
        return left - math.log(c["p"]) - c["g"] * math.log(e_p)

    low = -math.log(c["g"])
    return math.exp(brentq(difference, low, 100, xtol=1e-14)) if difference(low) < 0 else 1.0


SAME_LOSS = 1e-3  # nats that nobody would notice


class Optimum(NamedTuple):
    """The choice of the lowest loss; without a minimum the cheapest one within SAME_LOSS of the lowest."""

    N: float
    e: float
    loss: float
    on_border: bool  # no minimum lies inside of what was searched: the loss falls up to its border


def find_optimum(law, c, U, N=(1e5, 1e13), e=(1.0, 1e5), flops=math.inf, points=200):
    """The N and e within these bounds, at 6·N·U·e ≤ flops, with the lowest loss for U unique tokens.

    A number instead of a pair fixes N or e. Searched on a grid, then on finer ones around its best cell,
    since a law may have several minima. Where the best costs too much: the same along the line 6·N·U·e =
    flops. Raises ValueError where the bounds leave nothing within the budget.
    """
    bounds = [np.log((x, x) if np.isscalar(x) else x) for x in (N, e)]

    def anywhere(ln_N, ln_e):
        return evaluate(law, c, np.exp(ln_N), U, np.exp(ln_e))

    ln_N, ln_e, loss = minimize_on_grid(anywhere, bounds, points)
    on_border = falls_to_border(anywhere, bounds, ln_N, ln_e)
    if on_border:

        def cost(ln_N, ln_e):
            excess = anywhere(ln_N, ln_e) - loss - SAME_LOSS
            return ln_N + ln_e + 1e6 * np.maximum(excess, 0)

        ln_N, ln_e, _ = minimize_on_grid(cost, bounds, points)
        loss = float(anywhere(ln_N, ln_e))
    if 6 * U * math.exp(ln_N + ln_e) <= flops * (1 + 1e-9):
        return Optimum(math.exp(ln_N), math.exp(ln_e), loss, on_border)

    ln_Ne = math.log(flops / 6 / U)
    low = max(bounds[1][0], ln_Ne - bounds[0][1])
    high = min(bounds[1][1], ln_Ne - bounds[0][0])
    if low > high + 1e-9:
        least_N, least_e = (math.exp(pair[0]) for pair in bounds)
        raise ValueError(f"{flops:.3g} FLOPs are not enough for {U:.3g} unique tokens "
                         f"within N from {least_N:.3g} and e from {least_e:.3g} on")

    def on_budget(_, ln_e):
        return evaluate(law, c, np.exp(ln_Ne - ln_e), U, np.exp(ln_e))

    _, ln_e, loss = minimize_on_grid(on_budget, [np.zeros(2), np.array((low, high))], points)
    return Optimum(math.exp(ln_Ne - ln_e), math.exp(ln_e), loss, False)


def minimize_on_grid(loss, bounds, points):
    """Minimise loss(ln N, ln e) within the bounds: ln N, ln e and the loss."""
    cell = bounds
    for _ in range(4):
        ln_N, ln_e = (np.linspace(*pair, points if np.ptp(pair) > 0 else 1) for pair in cell)
        values = loss(ln_N[:, None], ln_e[None])
        i, j = np.unravel_index(np.nanargmin(values), values.shape)
        best = ln_N[i], ln_e[j]
        cell = [np.clip(x + np.array([-2, 2]) * np.ptp(pair) / points, *limits)
                for x, pair, limits in zip(best, cell, bounds)]
    return float(best[0]), float(best[1]), float(values[i, j])


def falls_to_border(loss, bounds, ln_N, ln_e):
    """True if from its lowest point on the loss is no higher at a border of N, or at the most epochs.

    A law that saturates falls for ever, by less than a float can hold. A single epoch is a choice like any
    other, so the lower border of e does not count.
    """
    (least_N, most_N), (least_e, most_e) = bounds
    ends = [(ln_N, most_e)] if most_e > least_e else []
    if most_N > least_N:
        ends += [(least_N, ln_e), (most_N, ln_e)]
    lowest = loss(ln_N, ln_e)
    return any(float(loss(*end)) <= lowest + 1e-9 for end in ends)
