"""Other groups' laws for diffusion language models, in our units (docs/scaling-laws.md).

GIDD's (von Rütte et al., arXiv 2512.10858): masked and uniform diffusion and three mixtures of both, 25M to
567M parameters without embeddings, 5e17 to 2e20 FLOPs. Their M is FLOPs per token without embeddings and
head, and their compute is M·D; here it is 6·N·D with N the whole model. `flops_per_token` goes from the one
to the other, on the ladder of the Quokka paper.
"""

import functools
import math

import numpy as np
import torch

from configurator.ladder import LADDER, ladder_params, swiglu_width
from laws.forms import Law

SEQ_LEN = 2048  # of GIDD's runs and of the Quokka paper's

# L = a·M^−α + b·D^−β + E, as printed by notebooks/scaling_laws_run_bootstrap.ipynb of dvruette/gidd-easydel,
# which fits it to FLOPs per token and tokens.
SURFACES = {
    "masked": dict(a=222.0, alpha=0.292, b=1920.0, beta=0.367, E=2.17),
    "low-uniform": dict(a=477.0, alpha=0.335, b=1880.0, beta=0.365, E=2.25),
    "balanced": dict(a=626.0, alpha=0.35, b=1520.0, beta=0.353, E=2.27),
    "high-uniform": dict(a=303.0, alpha=0.307, b=1500.0, beta=0.352, E=2.21),
    "uniform": dict(a=294.0, alpha=0.305, b=1340.0, beta=0.346, E=2.19),
}
# Its IsoFLOP minima (method 1, squared fit) as A·C^exponent: FLOPs per token, tokens, loss.
FRONTIERS = {
    "masked": dict(M=(0.01761, 0.56629), D=(56.78711, 0.43371), L=(27.21883, -0.04961)),
    "low-uniform": dict(M=(0.06529, 0.53541), D=(15.31607, 0.46459), L=(29.12047, -0.05088)),
    "balanced": dict(M=(0.06918, 0.53358), D=(14.45680, 0.46642), L=(29.84096, -0.05124)),
    "high-uniform": dict(M=(0.01222, 0.57298), D=(81.86373, 0.42701), L=(30.19375, -0.05141)),
    "uniform": dict(M=(0.00618, 0.58879), D=(161.92545, 0.41121), L=(31.26171, -0.05219)),
}
RANGE = dict(P=(25e6, 567e6), C=(5e17, 2e20))  # of their runs
BATCH = 3.614098626e-3, 0.8179  # best tokens per step: A·D^exponent

# Prabhudesai et al., arXiv 2507.15857: the compute from which on masked diffusion is ahead of AR on U unique
# tokens (recalled from the paper, not checked against its text here).
CRITICAL_COMPUTE = 2.12 * 10**1.956, 2.174
PRABHUDESAI_RANGE = dict(U=(25e6, 100e6))

# Sahoo et al., arXiv 2602.15014: a low-variance form of the loss saves this share of the FLOPs to a given
# loss; estimator=count is of that kind.
LOW_VARIANCE_SAVING = 0.12


# ---------------------------------------------------------------------------------------------- their units


def gidd_flops_per_token(n_layer, d_model, seq_len=SEQ_LEN):
    """M of GIDD's networks: 6 per weight of blocks of 12·d², and attention's two L×L products."""
    return 72 * n_layer * d_model**2 + 12 * n_layer * d_model * seq_len


@functools.cache
def ladder_sizes():
    """(N with embeddings, P without, M FLOPs per token without) of the ladder's models, three arrays.

    Smallest first, without those that have more parameters than another but take fewer FLOPs.
    """
    sizes = []
    for _, d_model, head_dim, n_head, n_layer in LADDER:
        width = head_dim * n_head
        without = n_layer * (4 * d_model * width + 3 * d_model * swiglu_width(d_model))
        attention = 12 * n_layer * width * SEQ_LEN
        sizes.append((ladder_params(d_model, head_dim, n_head, n_layer), without, 6 * without + attention))
    sizes = np.array(sorted(sizes))
    return sizes[(sizes == np.maximum.accumulate(sizes)).all(1)].T


def convert(values, source, target):
    """Sizes of one kind as those of another; source, target: those of the ladder's models.

    By powers between the models; below them with the slope over the smallest eight, above them in proportion.
    """
    x, y, values = np.log(source), np.log(target), np.log(np.asarray(values, np.float64))
    order = np.argsort(x)
    x, y = x[order], y[order]
    converted = np.interp(values, x, y)
    low = (y[7] - y[0]) / (x[7] - x[0])
    converted = np.where(values < x[0], y[0] + low * (values - x[0]), converted)
    return np.exp(np.where(values > x[-1], y[-1] + values - x[-1], converted))


def without_embeddings(N):
    """P, the parameters without embeddings, of a model with N parameters."""
    sizes, without, _ = ladder_sizes()
    return convert(N, sizes, without)


def with_embeddings(P):
    """N of a model with P parameters without embeddings."""
    sizes, without, _ = ladder_sizes()
    return convert(P, without, sizes)


def flops_per_token(N):
    """M, GIDD's FLOPs per token, of a model with N parameters."""
    sizes, _, flops = ladder_sizes()
    return convert(N, sizes, flops)


def of_flops_per_token(M):
    """N of a model that takes M FLOPs per token."""
    sizes, _, flops = ladder_sizes()
    return convert(M, flops, sizes)


# ------------------------------------------------------------------------------------------------- the laws


def surface(c, N, U, e):
    """GIDD's law of the loss, as a Law of N, U and e; every token counts as new."""
    M = torch.from_numpy(np.asarray(flops_per_token(N.numpy())))
    return c["a"] * M ** -c["alpha"] + c["b"] * (U * e) ** -c["beta"] + c["E"]


def no_starts(N, D, U):
    raise ValueError("GIDD's laws are as printed, and not fitted here")


GIDD = Law("gidd", surface, no_starts)


def surface_optimum(noise, C):
    """(M, D, loss) of the lowest loss by a surface at compute C = M·D, in GIDD's own units."""
    c = SURFACES[noise]
    A, exponent = optimal_power(noise, "surface")
    M = A * C**exponent
    return M, C / M, c["a"] * M ** -c["alpha"] + c["b"] * (C / M) ** -c["beta"] + c["E"]


def frontier_optimum(noise, C):
    """(M, D, loss) of the IsoFLOP minimum at compute C = M·D."""
    return tuple(A * C**exponent for A, exponent in FRONTIERS[noise].values())


def optimal_power(noise, kind):
    """(A, exponent) of the best M = A·C^exponent at compute C = M·D, by a noise's surface or frontier."""
    if kind == "frontier":
        return FRONTIERS[noise]["M"]
    c = SURFACES[noise]
    A = (c["alpha"] * c["a"] / (c["beta"] * c["b"])) ** (1 / (c["alpha"] + c["beta"]))
    return A, c["beta"] / (c["alpha"] + c["beta"])


def best_tokens(noise, kind, N):
    """D for which N parameters are best, at the compute M(N)·D that they really take."""
    (A, exponent), M = optimal_power(noise, kind), float(flops_per_token(N))
    return (M / A) ** (1 / exponent) / M


def best_size(noise, kind, D):
    """N that is best for D tokens."""
    A, exponent = optimal_power(noise, kind)
    C = (A * D) ** (1 / (1 - exponent))
    return float(of_flops_per_token(A * C**exponent))


def best_N(noise, kind, flops):
    """N that is best where 6·N·D = flops: their optimum, in our units.

    Where embeddings are most of a model, the least loss at 6·N·D is at another N, by 0.01 nats at 1e18 FLOPs.
    """
    from scipy.optimize import brentq

    def excess(ln_N):
        N = math.exp(ln_N)
        return math.log(6 * N * best_tokens(noise, kind, N) / flops)

    return math.exp(brentq(excess, -50, 100, xtol=1e-12))


def local_exponent(noise, kind, flops):
    """The exponent of N in compute around a budget, in our units."""
    low, high = (best_N(noise, kind, flops * factor) for factor in (0.5, 2.0))
    return math.log(high / low) / math.log(4.0)


def best_batch(D):
    """GIDD's best tokens per step for D tokens."""
    A, exponent = BATCH
    return A * D**exponent


def critical_compute(U):
    """Prabhudesai et al.'s FLOPs from which on masked diffusion is ahead of AR on U unique tokens."""
    A, exponent = CRITICAL_COMPUTE
    return A * U**exponent
