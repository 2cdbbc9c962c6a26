"""Which positions are noised and what they weigh: noise levels, random bits, masks, what counts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import SCHEDULES

import diffusion as d
from data import short_row_lengths

V = 9  # text tokens; the mask's id, too


def process(objective="masked", seq_len=32, **settings):
    return d.Process(objective, V, V, seq_len, **settings)


def tokens(n_rows, seq_len, seed=0):
    """Random rows with the token before each: (n_rows, seq_len + 1)."""
    return np.random.default_rng(seed).integers(0, V, (n_rows, seq_len + 1))


def weight_at(batch, n_rows, seq_len):
    """The weight of each position, all parts together: (n_rows, seq_len)."""
    weight = np.zeros(n_rows * seq_len)
    index = np.arange(len(batch.targets)) if batch.index is None else batch.index
    np.add.at(weight, index, batch.weights.sum(1))
    return weight.reshape(n_rows, seq_len)


# ------------------------------------------------------------------------------------------------ random bits


def test_noise_is_a_function_of_the_sample_and_streams_are_independent():
    a = d.random_bits(1, d.MASK, np.arange(100), 64)
    np.testing.assert_array_equal(a[40:50], d.random_bits(1, d.MASK, np.arange(40, 50), 64))
    for seed, stream in ((2, d.MASK), (1, d.REPLACE)):
        other = d.random_bits(seed, stream, np.arange(100), 64)
        assert not (a == other).any()
        correlation = np.corrcoef(d.unit(a).ravel(), d.unit(other).ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(a.size)
    u = np.sort(d.unit(a).ravel())
    # Kolmogorov-Smirnov, 0.1 %
    assert np.abs(u - np.arange(1, u.size + 1) / u.size).max() < 1.95 / math.sqrt(u.size)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32), st.data())
def test_exactly_k_of_the_eligible_positions(length, n_rows, seed, data):
    """Of any set that has as many."""
    count = np.array(data.draw(st.lists(st.integers(1, length), min_size=n_rows, max_size=n_rows)))
    spare = np.array([data.draw(st.integers(0, length - int(k))) for k in count])
    order = np.random.default_rng(seed).random((n_rows, length)).argsort(1)
    eligible = order < (count + spare)[:, None]
    noisy = d.exactly(d.random_bits(seed, d.MASK, np.arange(n_rows), length), count, eligible)
    assert (noisy.sum(1) == count).all() and not (noisy & ~eligible).any()


@pytest.mark.parametrize("eligible", ([1] * 10, [0, 1, 1, 0, 0, 1, 1, 1, 0, 1]))
def test_every_eligible_position_is_masked_equally_often(eligible):
    eligible = np.array(eligible, bool)
    n = 20_000
    bits = d.random_bits(5, d.MASK, np.arange(n), 10)
    rate = d.exactly(bits, np.full(n, 3), np.tile(eligible, (n, 1))).mean(0)
    expected = 3 / eligible.sum()
    deviation = 4 * math.sqrt(expected * (1 - expected) / n)
    assert np.abs(rate[eligible] - expected).max() < deviation and not rate[~eligible].any()


# ------------------------------------------------------------------------------------------------ what counts


PROCESSES = [
    dict(objective="ar"), dict(), dict(estimator="ratio"), dict(estimator="time"), dict(loss="maskgit"),
    dict(objective="uniform"), dict(objective="uniform", loss="paper")]


@pytest.mark.parametrize("fields", PROCESSES, ids=str)
def test_only_eligible_positions_are_noised_or_weighted(fields):
    """Sets that are no prefixes: holes, ends, single positions; one row without any is not possible."""
    p = process(**fields, seq_len=16)
    n_rows = 64
    rng = np.random.default_rng(0)
    eligible = rng.random((n_rows, 16)) < rng.random((n_rows, 1))
    eligible[np.arange(n_rows), rng.integers(0, 16, n_rows)] = True
    x = tokens(n_rows, 16)
    levels = d.noise_levels(p, 0, n_rows, n_eligible=eligible.sum(1))
    batch = d.make_batch(p, x, levels, levels.microbatch_rows(0, 1), eligible)
    weight = weight_at(batch, n_rows, 16)
    assert not weight[~eligible].any()
    assert (1 <= levels.count).all() and (levels.count[:, 0] <= eligible.sum(1)).all()

    if p.objective == "ar":
        np.testing.assert_allclose(weight[eligible], 1 / eligible.sum(), rtol=1e-6)
        np.testing.assert_array_equal(batch.tokens, x[:, :-1])
        return
    assert (batch.tokens == x[:, 1:])[~eligible].all()
    noisy = batch.tokens == V
    if p.objective == "masked" and (p.estimator == "count" or p.loss == "maskgit"):
        np.testing.assert_array_equal(noisy.sum(1), levels.count[:, 0])
        assert ((weight > 0) == noisy).all()
    elif p.objective == "uniform":
        assert (weight > 0)[eligible].all()


@pytest.mark.parametrize("estimator", ("count", "ratio", "time"))
def test_a_constant_loss_is_itself_whatever_counts(estimator):
    """The weights of many rows with any eligible sets add up to 1: one nat per token is one nat per token.

    In the ratio form, too: where a mask is forced there is one, and its weight is r′·n.
    """
    p, n_rows = process(seq_len=10, estimator=estimator), 20_000
    eligible = d.unit(d.random_bits(3, 0, np.arange(n_rows), 10)) < 0.5
    eligible[:, 7] = True
    levels = d.noise_levels(p, 0, n_rows, n_eligible=eligible.sum(1))
    batch = d.make_batch(p, tokens(n_rows, 10), levels, levels.microbatch_rows(0, 1), eligible)
    assert batch.weights.sum() == pytest.approx(1, abs=0.02)


def test_rows_that_only_fill_up_a_batch_weigh_nothing():
    p = process()
    levels = d.noise_levels(p, 0, 4)
    rows, valid = np.array([1, 3, 3]), np.array([True, True, False])
    x = tokens(4, 32)[rows]
    batch = d.make_batch(p, x, levels, rows, valid=valid, spacing=1 / 2)
    weight = weight_at(batch, 3, 32)
    assert weight[:2].any(axis=1).all() and not weight[2].any()


def test_short_rows_have_random_lengths_known_from_the_sample():
    lengths = short_row_lengths(0, np.arange(20_000), 50, 0.3)
    short = lengths < 50
    assert abs(short.mean() - 0.3 * 48 / 49) < 4 * math.sqrt(0.21 / 20_000)
    assert lengths.min() == 2 and lengths.max() == 50 and abs(lengths[short].mean() - 25.5) < 1
    np.testing.assert_array_equal(lengths[700:720], short_row_lengths(0, np.arange(700, 720), 50, 0.3))
    assert (short_row_lengths(1, np.arange(20_000), 50, 0.3) != lengths).any()
    assert (short_row_lengths(0, np.arange(100), 50, 0.0) == 50).all()

    eligible = np.arange(50) < lengths[:, None]
    p = process(seq_len=50)
    levels = d.noise_levels(p, 0, 20_000, n_eligible=lengths)
    x, rows = np.zeros((20_000, 51), int), levels.microbatch_rows(0, 1)
    batch = d.make_batch(p, x, levels, rows, eligible)
    assert batch.weights.sum() == pytest.approx(1, abs=0.02)  # a constant loss of 1 nat is 1 nat per token
    assert not ((batch.tokens == V) & ~eligible).any()


def test_maskgit_is_the_mean_over_all_masked_tokens_of_the_step():
    p = process(loss="maskgit")
    levels = d.noise_levels(p, 0, 8)
    x = np.zeros((2, 33), int)
    batches = [d.make_batch(p, x, levels, levels.microbatch_rows(i, 4)) for i in range(4)]
    weights = np.concatenate([batch.weights[batch.weights > 0] for batch in batches])
    np.testing.assert_allclose(weights, 1 / levels.count.sum(), rtol=1e-6)


def test_paper_loss_is_half_noisy_half_clean():
    p = process("uniform", loss="paper")
    levels = d.noise_levels(p, 0, 512)
    batch = d.make_batch(p, tokens(512, 32), levels, levels.microbatch_rows(0, 1))
    np.testing.assert_allclose(batch.weights.sum(0), [0.5, 0.5], rtol=1e-3)  # either part of a constant 1 nat
    assert ((batch.weights > 0).sum(1) == 1).all()
    changed = batch.tokens.reshape(-1) != batch.targets
    assert not (changed & (batch.weights[:, 1] > 0)).any()  # clean positions are untouched
    assert changed.sum() / levels.count.sum() == pytest.approx(8 / 9, abs=0.01)


# ----------------------------------------------------------------------- one loss, however the batch is split


@pytest.mark.parametrize("short_rows", (0.0, 0.5))
@pytest.mark.parametrize("fields", PROCESSES, ids=str)
def test_noise_and_weights_do_not_depend_on_the_split(fields, short_rows):
    """Every row's noise and weights, bit for bit, for 1×16, 2×8 and 16×1 micro-batches."""
    p, x = process(**fields, seq_len=33), tokens(16, 33)
    lengths = short_row_lengths(0, 4800 + np.arange(16), 33, short_rows)
    eligible = np.arange(33) < lengths[:, None]
    levels = d.noise_levels(p, 4800, 16, 0.3, lengths)

    def by_row(parts):
        read, weights = np.zeros((16, 33), int), np.zeros((16, 33))
        for part in range(parts):
            rows = levels.microbatch_rows(part, parts)
            batch = d.make_batch(p, x[rows], levels, rows, eligible[rows])
            read[rows], weights[rows] = batch.tokens, weight_at(batch, len(rows), 33)
        return read, weights

    whole = by_row(1)
    for parts in (2, 16):
        for a, b in zip(whole, by_row(parts)):
            np.testing.assert_array_equal(a, b)


# ---------------------------------------------------------------------------------------------- static shapes


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.sampled_from(("count", "ratio", "time")),
       st.sampled_from(("uniform", "iid", "moving_gaussian")), st.integers(1, 12), st.integers(2, 80),
       st.sampled_from((0.0, 0.5)), st.integers(0, 2**40), st.floats(0, 1))
def test_masked_positions_always_fit_the_capacity(
        schedule, estimator, time, n_rows, length, short_rows, first, progress):
    p = process(seq_len=length, schedule=schedule, estimator=estimator, time=time)
    lengths = short_row_lengths(0, first + np.arange(3 * n_rows), length, short_rows)
    levels = d.noise_levels(p, first, 3 * n_rows, progress, lengths)
    x = np.zeros((n_rows, length + 1), int)
    for part in range(3):
        rows = levels.microbatch_rows(part, 3)
        eligible = np.arange(length) < lengths[rows][:, None]
        batch = d.make_batch(p, x, levels, rows, eligible)  # raises if it does not fit
        assert batch.index.shape == (d.capacity(p, n_rows),)
        assert (batch.weights[:, 0] > 0).sum() == (batch.tokens == V).sum()


def test_capacity_is_little_more_than_half_of_the_positions():
    """docs/math.md §3."""
    p = process(seq_len=2048)
    assert d.capacity(p, 32) <= -(-(33 / 2 * 2048 + 32) // 64) * 64
    assert d.capacity(p, 32) / (32 * 2048) < 0.526


# -------------------------------------------------------------------------------------- the lattice of levels


def test_lattice_marginals_are_uniform():
    p = process(seq_len=3)
    t = np.stack([d.noise_levels(p, 8 * i, 8).t[:, 0] for i in range(4000)])
    for j in range(8):  # every row of the step is uniform in its eighth, and the step covers all of them
        u = np.sort(t[:, j] * 8 - j)
        assert np.abs(u - np.arange(1, 4001) / 4000).max() < 1.95 / math.sqrt(4000)


def test_lattice_cuts_the_variance_of_the_loss_as_predicted():
    """For a mean cross-entropy of a·k/L a row's loss is a·k/L (docs/math.md §3).

    Its standard deviation is a/√(12 N) for independent t, and a/(N √12) for the lattice with exact k:
    .208 and .026 at N = 64, L = 1024.
    """
    a, N = 5.77, 64
    std = {}
    for time in ("iid", "uniform"):
        p = process(seq_len=1024, time=time)
        std[time] = np.std([a * d.noise_levels(p, i * N, N).count.mean() / 1024 for i in range(2000)])
    assert std["iid"] == pytest.approx(a / math.sqrt(12 * N), rel=0.08)
    assert std["uniform"] == pytest.approx(a / (N * math.sqrt(12)), rel=0.08)


def test_micro_batches_and_ranks_get_lattices_of_their_own():
    levels = d.noise_levels(process(seq_len=3), 0, 32)
    for part in range(4):
        np.testing.assert_allclose(np.diff(levels.t[levels.microbatch_rows(part, 4), 0]), 1 / 8)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0.05, 2))
def test_moving_gaussian_quantile_inverts_its_distribution(mean, sigma):
    p = process(time="moving_gaussian", time_sigma=sigma, time_correction=True)
    u = np.linspace(0.001, 1, 200)
    t = d.time_quantile(p, u, mean)
    assert (t > 0).all() and (t <= 1).all() and (np.diff(t) > 0).all()
    np.testing.assert_allclose(d.time_cdf(p, t, mean), u, atol=1e-6)
    inner, h = t[5:-5], 1e-5
    slope = (d.time_cdf(p, inner + h, mean) - d.time_cdf(p, inner - h, mean)) / (2 * h)
    np.testing.assert_allclose(d.time_density(p, inner, mean), slope, rtol=1e-4)


# ------------------------------------------------------------------------------------------ masked inputs, AR


def test_a_share_of_what_ar_reads_is_masked():
    """Targets and weights are those of AR; every position is masked with the same probability, anew."""
    L, n = 64, 400
    x, rows = tokens(n, L), np.arange(n)
    plain, masked = (process("ar", L, seed=3, input_mask=share) for share in (0.0, 0.3))
    levels = d.noise_levels(masked, 0, n)
    before, after = (d.make_batch(p, x, levels, rows) for p in (plain, masked))
    hidden = after.tokens == V
    np.testing.assert_array_equal(before.tokens, x[:, :-1])
    np.testing.assert_array_equal(after.tokens, np.where(hidden, V, x[:, :-1]))
    np.testing.assert_array_equal(after.targets, before.targets)
    np.testing.assert_array_equal(after.weights, before.weights)
    error = math.sqrt(0.3 * 0.7 / hidden.size)
    assert hidden.mean() == pytest.approx(0.3, abs=4 * error)
    for axis, count in ((0, n), (1, L)):  # as independent draws are spread over columns, and over rows
        assert hidden.mean(axis).std() == pytest.approx(math.sqrt(0.3 * 0.7 / count), rel=0.4)
    part = d.make_batch(masked, x[7:9], levels, rows[7:9])
    np.testing.assert_array_equal(part.tokens, after.tokens[7:9])  # whatever the micro-batch
    other = d.make_batch(masked, x, d.noise_levels(masked, n, n), rows)
    assert (other.tokens == V)[hidden].mean() < 0.4  # another epoch's are others
