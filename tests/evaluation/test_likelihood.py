"""likelihood.py against enumeration: bounds and their errors, curves over the noise ratio, chain rules."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from small_world import STATES, Denoiser, L, M, P, V

import diffusion as d
from evaluation import likelihood
from evaluation.likelihood import RowScorer
from training.distributed import SINGLE
from training.objective import Objective

CPU = torch.device("cpu")
H = -(P * np.log(P)).sum()  # nats per row
NUMBER = {tuple(state): i for i, state in enumerate(STATES.tolist())}


class Text:
    """Sequences drawn from P."""

    def __init__(self, seed, n=4096):
        self.available, self.states = n, STATES[np.random.default_rng(seed).choice(len(P), n, p=P)]

    def read(self, ids):
        return np.concatenate((np.zeros((len(ids), 1), np.int32), self.states[ids]), axis=1)


def read(process, sequences, ids, levels, rows, valid=None, spacing=None):
    return d.make_batch(process, sequences.read(ids), levels, rows, valid=valid, spacing=spacing)


def row_scorer(denoiser, text, micro=64, posterior=False):
    return RowScorer(Objective(denoiser, posterior), text, read, micro, SINGLE, CPU)


def measure(denoiser, kind, seed=0, n=256, passes=1, micro=64, posterior=False, schedule="linear"):
    process = d.Process("masked" if kind == "masked" else "uniform", V, M, L)
    process = likelihood.validation_process(process, schedule)._replace(seed=seed)
    return likelihood.evaluate(row_scorer(denoiser, Text(seed, n), micro, posterior), process, n, passes)


def conditionals(denoiser, order, state):
    """log p of each token of `state`, masked positions opened in `order`, from the network directly."""
    z, total = torch.full((1, L), M), []
    for i in order:
        total.append(float(denoiser(z)[0, i].log_softmax(-1)[state[i]]))
        z[0, i] = state[i]
    return total


ORDERS = list(itertools.permutations(range(L)))
WRONG = Denoiser("masked", mistake=0.5)
COSTS = np.array([[-sum(conditionals(WRONG, order, state)) for order in ORDERS] for state in STATES.tolist()])
BOUND = COSTS.mean(1)  # of each state: the mean over orders
EXACT = -np.log(np.exp(-COSTS).mean(1))


# the bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, posterior, schedule", [
    ("masked", False, "linear"), ("loo", False, "linear"), ("loo", False, "cosine"),
    ("posterior", True, "linear")])
def test_the_optimal_denoiser_scores_the_entropy(kind, posterior, schedule):
    losses = measure(Denoiser(kind, schedule), kind, n=4096, passes=2, micro=512, posterior=posterior,
                     schedule=schedule)
    error, noise = likelihood.standard_error(losses)
    assert 0 < noise < error < 0.02
    assert abs(sum(losses.parts) - H / L) < 3.5 * error


def test_bound_exact_likelihood_and_entropy_are_in_order():
    """For a network that is wrong: bound ≥ exact NLL of its sampler ≥ entropy; the bound is measured."""
    assert (P * BOUND).sum() > (P * EXACT).sum() + 0.01 > H + 0.02
    losses = measure(WRONG, "masked", n=4096, micro=512)
    assert abs(sum(losses.parts) - (P * BOUND).sum() / L) < 3.5 * likelihood.standard_error(losses)[0]


@pytest.mark.parametrize("kind, passes, n", [
    ("masked", 1, 64), ("masked", 4, 64), ("wrong", 1, 48), ("wrong", 2, 64), ("loo", 1, 256),
    pytest.param("loo", 3, 256, marks=pytest.mark.slow), ("posterior", 1, 256), ("ar", 1, 64)])
def test_error_bars_cover_the_truth_at_their_rate(kind, passes, n):
    """200 repeats with other text and other noise: 95 % intervals hold the truth 95 % of the time.

    91 to 98.5 % pass: four of five binomial errors.
    """
    truth = (P * BOUND).sum() / L if kind == "wrong" else H / L
    denoiser = WRONG if kind == "wrong" else Denoiser(kind)
    hits = []
    for seed in range(200):
        if kind == "ar":  # no noise: each row's own exact NLL
            values = -np.log(P)[[NUMBER[tuple(s)] for s in Text(seed, n).states.tolist()]] / L
            losses = likelihood.RowLosses(values[None, :, None, None], np.arange(n)[None], [])
        else:
            losses = measure(denoiser, "masked" if kind == "wrong" else kind, seed, n, passes,
                             posterior=kind == "posterior")
        error = likelihood.standard_error(losses, exact=kind == "ar")[0]
        hits.append(abs(sum(losses.parts) - truth) < 1.96 * error)
    assert 0.91 <= np.mean(hits) <= 0.985, np.mean(hits)


def simulated_losses(seed, N, passes, noise):
    """RowLosses of N rows whose text varies by 1 and whose noise by `noise`, about a trend over the levels.

    The mean over all text and noise is 1.
    """
    rng = np.random.default_rng(seed)
    text, ids = rng.standard_normal(N), rng.permuted(np.tile(np.arange(N), (passes, 1)), axis=1)
    level = (np.arange(N) + rng.random((passes, 1))) / N
    values = text[ids] + 2 * level + noise * rng.standard_normal((passes, N))
    return likelihood.RowLosses(values[:, :, None, None], ids, [])


@pytest.mark.parametrize("noise", (0.3, 3.0))
@pytest.mark.parametrize("N, passes", [(8, 1), (8, 4), (8, 200), (16, 1), (16, 4), (64, 1), (64, 200)])
def test_few_rows_and_many_passes_have_error_bars_that_cover(N, passes, noise):
    """An error is stated every time, and 95 % intervals hold the truth 92 to 98 % of 600 times."""
    losses = [simulated_losses(seed, N, passes, noise) for seed in range(600)]
    errors = np.array([likelihood.standard_error(one) for one in losses])
    assert np.isfinite(errors[:, 0]).all() and np.isfinite(errors[:, 1]).all() == (passes > 1)
    misses = np.array([abs(sum(one.parts) - 1) for one in losses])
    assert 0.92 <= np.mean(misses < 1.96 * errors[:, 0]) <= 0.98


def test_passes_tell_text_from_noise():
    """Without a bias, however few the rows: what they keep from pass to pass varies by 1."""
    for N, passes in ((8, 2), (8, 8), (32, 3)):
        losses = [simulated_losses(seed, N, passes, 0.5) for seed in range(1500)]
        variances = [likelihood.text_variance(one.values.sum(2), one.ids) for one in losses]
        assert np.mean(variances) == pytest.approx(1, abs=4 * np.std(variances) / math.sqrt(1500))


def test_errors_of_few_values_are_students():
    exact = {3: 3.182446, 4: 2.776445, 5: 2.570582, 7: 2.364624, 15: 2.131450, 63: 1.998341}
    for df, quantile in exact.items():
        assert likelihood.student_factor(df) * 1.959964 == pytest.approx(quantile, rel=2e-3)
    values = np.random.default_rng(0).standard_normal((2000, 5))
    hits = [abs(row.mean()) < 1.96 * likelihood.error_of_mean(row) for row in values]
    assert 0.94 < np.mean(hits) < 0.96
    assert math.isnan(likelihood.error_of_mean([1.0])) and math.isnan(likelihood.error_of_mean([math.nan, 2]))
    assert likelihood.error_of_mean([1, 2, 3, math.inf]) == likelihood.error_of_mean([1, 2, 3])


def test_the_noise_alone_has_its_own_error():
    """The same text with other noise, 60 times: the estimates vary as much as `noise` says, and no more."""
    process, means, noise = d.Process("masked", V, M, L), [], []
    scorer = row_scorer(WRONG, Text(0, 64))
    for seed in range(60):
        losses = likelihood.evaluate(scorer, process._replace(seed=seed), 64, 3)
        means.append(sum(losses.parts))
        noise.append(likelihood.standard_error(losses)[1])
    assert np.std(means) == pytest.approx(np.mean(noise), rel=0.25)


class Steep(Denoiser):
    """Hard where much is masked, easy elsewhere, hardly any chance in it."""

    def forward(self, z, t=None, documents=None, index=None, positions=None, visible=None, clean=None):
        logits = torch.zeros(*z.shape, V, dtype=torch.float64)
        logits[..., 0] = 3.0 * (3 - (z == M).sum(1))[:, None]
        return logits if index is None else logits.flatten(0, 1)[index]


def test_plain_variance_would_be_too_large():
    """Under a lattice the levels themselves have no error; the estimator leaves their trend out."""
    losses = likelihood.evaluate(row_scorer(Steep("masked"), Text(0, 300)), d.Process("masked", V, M, L), 300)
    plain = losses.values.std(ddof=1) / math.sqrt(300)
    assert likelihood.standard_error(losses)[0] < 0.9 * plain


def test_differences_of_models_are_better_known_than_the_models():
    one = measure(WRONG, "masked", n=512)
    other = measure(Denoiser("masked", mistake=0.4), "masked", n=512)
    ids, values = other.by_sequence
    mean, error = likelihood.paired_difference(one.by_sequence, (ids, values))
    assert mean == pytest.approx(sum(one.parts) - sum(other.parts), rel=1e-9)
    assert error < 0.5 * math.hypot(likelihood.standard_error(one)[0], likelihood.standard_error(other)[0])
    half, _ = likelihood.paired_difference(one.by_sequence, (ids[::2], values[::2]))
    assert half == pytest.approx(np.mean(one.by_sequence[1][::2] - values[::2]), rel=1e-9)
    assert likelihood.paired_difference(one.by_sequence, (ids[:5], values[:5])) is None


def test_losses_by_sequence_are_means_over_passes():
    losses = measure(WRONG, "masked", n=512, passes=3)
    ids, values = losses.by_sequence
    assert sorted(ids) == list(range(512))
    assert values.mean() == pytest.approx(sum(losses.parts))
    of_one = [losses.values[p, losses.ids[p].tolist().index(ids[7]), 0] for p in range(3)]
    assert values[7] == pytest.approx(np.mean(of_one))


def test_the_curve_integrates_to_the_bound():
    losses = measure(WRONG, "masked", n=3000, micro=1000)
    curve = list(likelihood.noise_curve(losses, d.Process("masked", V, M, L), 3).values())
    assert [round(point.noise_ratio * L) for point in curve] == [1, 2, 3]
    assert sum(point.rows for point in curve) == 3000
    assert sum(point.nats * point.rows for point in curve) / 3000 == pytest.approx(sum(losses.parts))
    for k, point in enumerate(curve, 1):  # C_k by enumeration
        costs = [[-conditionals(WRONG, order, state)[L - k] for order in ORDERS] for state in STATES.tolist()]
        assert abs(point.nats - np.mean(costs, axis=1) @ P) < 4 * point.error


# chain rules ------------------------------------------------------------------------------------------------


def chain_rule(denoiser, order, seed=0):
    x = torch.from_numpy(STATES)
    return likelihood.chain_rule(Objective(denoiser, False), x, order, M, contextlib.nullcontext, seed)


@pytest.mark.parametrize("order", ["left_to_right", "confidence", "random"])
def test_every_order_of_the_optimal_denoiser_is_the_distribution(order):
    assert chain_rule(Denoiser("masked"), order).sum(1) == pytest.approx(-np.log(P), rel=1e-5)


def test_chain_rules_equal_enumeration():
    in_order = chain_rule(WRONG, "left_to_right")
    for state, nats in zip(STATES.tolist(), in_order):
        assert -nats == pytest.approx(conditionals(WRONG, range(L), state), rel=1e-5)
    surest_first = chain_rule(WRONG, "confidence")
    for state, nats in zip(STATES.tolist(), surest_first):
        z, total = torch.full((1, L), M), np.zeros(L)
        for _ in range(L):
            probs = WRONG(z)[0].softmax(-1).float().max(-1).values
            i = int(torch.where(z[0] == M, (probs * 4096).round(), -1).argmax())
            total[i] = float(WRONG(z)[0, i].log_softmax(-1)[state[i]])
            z[0, i] = state[i]
        assert -nats == pytest.approx(total, rel=1e-4)
    for nats in (in_order, surest_first):  # distributions over all states: no better than the entropy
        assert np.exp(-nats.sum(1)).sum() == pytest.approx(1, rel=1e-5)
        assert (P * nats.sum(1)).sum() >= H
    random = np.mean([chain_rule(WRONG, "random", seed).sum(1) for seed in range(300)], axis=0)
    assert random == pytest.approx(BOUND, rel=0.05)
