"""The mathematics against closed forms and enumeration: bounds, schedules, losses, reverse steps."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import (
    SCHEDULES,
    Denoiser,
    H,
    L,
    M,
    V,
    conditional_entropy,
    curve,
    estimate,
    loss_of,
    process,
    to_tensors,
)

import diffusion as d
import kernels
from model import ModelConfig, Transformer
from training import transfer

# ---------------------------------------------------------------- the optimal denoiser's bound is the entropy


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("estimator", ("count", "ratio", "time"))
def test_masked_bound_of_the_optimal_denoiser_is_the_entropy(schedule, estimator):
    mean, error = estimate(process(schedule=schedule, estimator=estimator), Denoiser("masked"))
    truth = H
    if estimator == "ratio":  # forcing a mask where none fell: (L·H + C₁)/(L + 1) instead of H
        truth = (L * H + curve(Denoiser("masked"))[0]) / (L + 1)
    assert error < 0.02 * H
    assert abs(mean - truth) < 4 * error


@pytest.mark.parametrize("sampler", (
    dict(time="iid"), dict(time="moving_gaussian", time_correction=True),
    dict(time="moving_gaussian", time_correction=True, estimator="time")), ids=str)
def test_time_samplers_keep_the_bound_when_corrected(sampler):
    mean, error = estimate(process(time_sigma=0.5, **sampler), Denoiser("masked"))
    assert error < 0.03 * H and abs(mean - H) < 4 * error


def test_moving_gaussian_without_correction_is_another_loss():
    p = process(time="moving_gaussian", time_sigma=0.1)
    mean, error = estimate(p, Denoiser("masked"), progress=1.0)
    assert mean > H + 20 * error  # mostly noisy rows, as in the paper's late training loss


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ("loo", "posterior"))
def test_uniform_bound_of_the_leave_one_out_denoiser_is_the_entropy(schedule, kind):
    """Or of one that sees the position's own token, with that undone."""
    p = process("uniform", schedule=schedule)
    mean, error = estimate(p, Denoiser(kind, schedule), posterior=kind == "posterior")
    assert error < 0.02 * H and abs(mean - H) < 4 * error


def test_full_posterior_misses_the_uniform_bound():
    mean, error = estimate(process("uniform"), Denoiser("posterior"))
    assert mean > H + 10 * error


# ----------------------------------------------------------------------------- the bound on what counts alone

# Rows that differ in what counts, none of it a prefix: the rest is context, as a question is to its answer.
PATTERNS = np.array([[1, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 1, 1]], bool)


def expected_loss(estimator, patterns):
    """The optimal denoiser's loss on rows of these patterns, equally many of each, by enumeration."""
    nats = 0.0
    for pattern in patterns:
        n, entropy = pattern.sum(), conditional_entropy(pattern[None])
        if estimator == "ratio":  # forcing a mask where none fell
            singles = np.eye(L, dtype=bool)[pattern]
            entropy = (n * entropy + np.mean([conditional_entropy(one[None]) for one in singles])) / (n + 1)
        nats += n * entropy
    return nats / patterns.sum()


@pytest.mark.parametrize("estimator", ("count", "ratio", "time"))
def test_masked_bound_of_what_counts_is_its_entropy_given_the_rest(estimator):
    eligible = PATTERNS[np.arange(1500) % len(PATTERNS)]
    mean, error = estimate(process(estimator=estimator), Denoiser("masked"), eligible=eligible)
    assert error < 0.03 * H and abs(mean - expected_loss(estimator, PATTERNS)) < 4 * error


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_uniform_bound_of_what_counts_is_its_entropy_given_the_rest(schedule):
    eligible = PATTERNS[np.arange(1500) % len(PATTERNS)]
    denoiser = Denoiser("loo", schedule, clean=~eligible)
    mean, error = estimate(process("uniform", schedule=schedule), denoiser, eligible=eligible)
    assert error < 0.03 * H and abs(mean - expected_loss("count", PATTERNS)) < 4 * error


# ------------------------------------------------------------------------------------------ the uniform bound


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SCHEDULES))
def test_one_token_uniform_bound_is_the_entropy_exactly(seed, name):
    """V = 7, L = 1: integrate over t by quadrature instead of sampling (docs/math.md §6)."""
    probs = torch.tensor(np.random.default_rng(seed).dirichlet(np.ones(7)))
    s = d.schedule(name)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    r = torch.tensor((nodes + 1) / 2) ** 3  # in the variable r: w dt cancels r′; crowded where it is steep
    jacobian = torch.tensor(weights / 2 * 3 * ((nodes + 1) / 2) ** 2)
    beta = 7 * (1 - r) / r
    total = 0.0
    for x, z in itertools.product(range(7), repeat=2):
        chance = probs[x] * ((1 - r) * (x == z) + r / 7)
        xs, zs = torch.full((400,), x), torch.full((400,), z)
        bound = kernels.uniform_bound(probs.expand(400, 7), zs, xs, beta)
        total += (jacobian * chance * bound / (7 * (1 - r))).sum()
    entropy = -(probs * probs.log()).sum().item()
    assert abs(total.item() - entropy) < 2e-4
    assert s.r(1.0) == pytest.approx(1)


def test_uniform_bound_equals_its_definition_in_fp64():
    """Σ_j r_j log(r_j/ρ_j) − r_j + ρ_j written out, against the closed form, for α from 1e-5 to 1 − 1e-5."""
    rng = np.random.default_rng(2)
    for alpha in (1e-5, 0.01, 0.5, 0.99, 1 - 1e-5):
        probs = torch.tensor(rng.dirichlet(np.ones(11), size=50))
        z, x = torch.tensor(rng.integers(0, 11, (2, 50)))
        u = 11 * alpha * probs + 1 - alpha
        truth = 11 * alpha * torch.eye(11, dtype=torch.float64)[x] + 1 - alpha
        r, rho = truth / truth.gather(1, z[:, None]), u / u.gather(1, z[:, None])
        expected = (r * (r / rho).log() - r + rho).sum(1)
        beta = torch.full((50,), 11 * alpha / (1 - alpha), dtype=torch.float64)
        bound = kernels.uniform_bound(probs, z, x, beta)
        torch.testing.assert_close(bound, expected, rtol=1e-6, atol=1e-15)
        single = kernels.uniform_bound(probs.float(), z, x, beta.float()).double()
        torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-15)


def test_uniform_bound_is_finite_at_the_ends_of_time():
    """poly8 at t → 0 has r ~ 1e-40, and α = 0 at t = 1: loss and gradient stay finite in fp32."""
    p = d.Process("uniform", 9, 9, 16, schedule="poly8")
    t = np.array([1e-5, 1e-3, 0.5, 1.0])
    levels = d.NoiseLevels(np.arange(4), t[:, None], np.full((4, 1), 16), np.full((4, 1), 1), 0.0)
    batch = d.make_batch(p, np.zeros((4, 17), int), levels, levels.microbatch_rows(0, 1))
    logits = torch.randn(64, 9, requires_grad=True)
    z, x, beta = (torch.from_numpy(array) for array in (batch.noisy, batch.targets, batch.beta))
    nats = kernels.uniform_bound(logits.softmax(-1), z, x, beta)
    (nats * torch.from_numpy(batch.weights[:, 0])).sum().backward()
    assert torch.isfinite(nats).all() and torch.isfinite(logits.grad).all()


# ------------------------------------------------------------------------------ three estimators of one bound


def test_estimators_agree_for_an_imperfect_denoiser():
    wrong = Denoiser("masked", mistake=0.3)
    C = curve(wrong)
    assert C.mean() > H * 1.05  # a bound, and not a tight one
    for estimator, schedule in itertools.product(("count", "ratio", "time"), ("linear", "cosine", "poly2")):
        mean, error = estimate(process(estimator=estimator, schedule=schedule), wrong)
        truth = (C.sum() + C[0]) / (L + 1) if estimator == "ratio" else C.mean()
        assert error < 0.02 * H and abs(mean - truth) < 4 * error, (estimator, schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_count_weights_undo_the_probability_of_k(schedule):
    """Over a fine lattice Σ weight·k·C_k is (1/n)Σ C_k × n, exactly, for any n and curve: no ε anywhere."""
    rows, length = np.arange(200_000), 7
    p = d.Process("masked", V, M, length, schedule=schedule)
    for n in (1, 2, 7):
        eligible = np.broadcast_to(np.arange(length) >= length - n, (len(rows), length))  # the last n, say
        levels = d.noise_levels(p, 0, len(rows), n_eligible=np.full(len(rows), n))
        bits = d.random_bits(0, 0, levels.sample, length)
        noisy, weight = d.masked_weights(p, levels, rows, bits, eligible)
        count, weight = levels.count[:, 0], weight[:, 0]
        assert (noisy.sum(1) == count).all() and not noisy[:, : length - n].any()
        C = np.cos(np.arange(n)) + 2
        assert np.mean(weight * count * C[count - 1]) == pytest.approx(C.sum(), rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_token_masked_elbo_is_cross_entropy(schedule):
    p = d.Process("masked", V, M, 1, schedule=schedule)
    levels = d.noise_levels(p, 0, 64)
    batch = d.make_batch(p, np.arange(128).reshape(64, 2) % V, levels, levels.microbatch_rows(0, 1))
    assert (batch.tokens == M).all()
    np.testing.assert_allclose(batch.weights.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(batch.weights[batch.weights > 0], 1 / 64, rtol=1e-6)


# -------------------------------------------------------------------------------------------------- schedules


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(SCHEDULES), st.floats(0.01, 0.99))
def test_schedule_derivative_and_inverse(name, t):
    s, h = d.schedule(name), 1e-6
    assert s.dr(t) == pytest.approx((s.r(t + h) - s.r(t - h)) / (2 * h), rel=1e-6)
    assert s.inverse(s.r(t)) == pytest.approx(t, rel=1e-9)
    assert 0 <= s.r(0.0) < 1e-12 and s.r(1.0) == pytest.approx(1)


def test_the_cosine_schedule_is_the_right_one():
    t = np.linspace(0.01, 1, 50)
    s = d.schedule("cosine")
    np.testing.assert_allclose(1 - s.r(t), 1 - np.cos(math.pi / 2 * (1 - t)))  # α of MD4
    np.testing.assert_allclose(s.dr(t) / s.r(t), math.pi / 2 / np.tan(math.pi * t / 2), atol=1e-12)


@pytest.mark.parametrize("name", ("sigmoid", "poly", "poly0", "poly-1", "poly1.5", ""))
def test_unknown_schedule_is_refused(name):
    with pytest.raises(ValueError, match="linear, cosine or poly"):
        d.schedule(name)


def test_loglinear_is_linear_with_an_epsilon():
    with pytest.raises(ValueError, match="is linear without its ε: choose linear"):
        d.schedule("loglinear")


@pytest.mark.parametrize("r, inverse, message", (
    (lambda t: 0.999 * t, lambda u: u / 0.999, r"not r\(1\) = 0.999"),
    (lambda t: t + 1e-3 * (1 - t), lambda u: u, r"not r\(0\) = 0.001"),
    (lambda t: t, lambda u: u * u / 2, "the inverse of r maps 1 to 1, not to 0.5")))
def test_a_schedule_with_an_epsilon_is_refused(r, inverse, message):
    """It would drop a part of the bound without a word."""
    with pytest.raises(ValueError, match=message):
        d.Schedule(r, lambda t: 1.0, inverse)


# ------------------------------------------------------------------------------------------ the gathered head


def gathered_batch(n_rows):
    """x (n_rows, 17), the levels, and the batch of arrays of a masked step over 50 tokens."""
    p = d.Process("masked", 50, 50, 16)
    levels = d.noise_levels(p, 0, n_rows)
    x = np.random.default_rng(0).integers(0, 50, (n_rows, 17))
    return x, levels, d.make_batch(p, x, levels, levels.microbatch_rows(0, 1))


def full_loss(hidden, head, x, levels, tokens):
    """The loss with a softmax over every position: the mean over a row's masked ones, then over rows."""
    logits = (hidden @ head[:50].T).log_softmax(-1)  # excluded columns left out instead of masked
    nats = -logits.gather(-1, torch.tensor(x[:, 1:, None]))[..., 0]
    weight = np.where(tokens == 50, 1 / levels.count / len(x), 0.0)
    return (nats * torch.tensor(weight)).sum()


def test_gathered_head_equals_the_full_head():
    """Loss and gradients of the gathered positions alone, in fp64."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 16, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    x, levels, batch = gathered_batch(4)
    picked = hidden.flatten(0, 1)[torch.from_numpy(batch.index)]
    loss = d.loss_figures(picked, head, to_tensors(batch), 50)["loss"]
    full = full_loss(hidden, head, x, levels, batch.tokens)
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, (hidden, head))
    for a, b in zip(gradients, torch.autograd.grad(full, (hidden, head))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert (gradients[1][50:] == 0).all()


def test_gathered_network_equals_the_full_one():
    """Loss and every gradient of a network that computes its last block at the gathered positions only."""
    torch.manual_seed(0)
    config = ModelConfig(2, 2, 2, 8, 16, 64, 50, 50, 16, causal=False, init_std=0.3)
    network = Transformer(config).init_weights()
    parameters = list(network.parameters())
    x, levels, batch = gathered_batch(16)
    assert len(batch.index) < 16 * 16  # some positions are left out, some of those kept only fill up
    tensors = transfer.to_tensors(batch)
    loss = loss_of(network, tensors)
    full = full_loss(network(tensors.tokens), network.head, x, levels, batch.tokens)
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    gradients = torch.autograd.grad(loss, parameters)
    for a, b in zip(gradients, torch.autograd.grad(full, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (gradients[0][51:] == 0).all()  # the embedding's padding, which is the head's too


@pytest.mark.parametrize("objective, loss", (("ar", "elbo"), ("masked", "elbo"), ("uniform", "paper")))
def test_figures_are_named_and_the_loss_is_made_of_them(objective, loss):
    """The paper's uniform loss is ½(noisy + clean), each the mean over its positions."""
    p = d.Process(objective, 50, 50, 16, loss=loss)
    levels = d.noise_levels(p, 0, 16)
    x = np.random.default_rng(0).integers(0, 50, (16, 17))
    batch = to_tensors(d.make_batch(p, x, levels, levels.microbatch_rows(0, 1)))
    hidden = torch.randn(len(batch.targets), 8, dtype=torch.float64)
    head = torch.randn(64, 8, dtype=torch.float64)
    figures = d.loss_figures(hidden, head, batch, 50)
    assert list(figures) == d.figure_names(p)
    nats = torch.nn.functional.cross_entropy((hidden @ head[:50].T), batch.targets, reduction="none")
    torch.testing.assert_close(figures["loss"], (nats[:, None] * batch.weights).sum(), check_dtype=False)
    if loss == "paper":
        for name, weight in zip(("noisy", "clean"), batch.weights.T):
            torch.testing.assert_close(figures[name], 2 * (nats * weight).sum(), check_dtype=False)


# ---------------------------------------------------------------------------------------------- reverse steps


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 12))
def test_shares_open_everything_as_evenly_as_can_be(counts, steps):
    counts = np.array(counts)
    shares = d.tokens_per_step(counts, np.full(len(counts), steps))
    assert shares.shape == (len(counts), steps) and (shares.sum(1) == counts).all()
    assert (np.diff(shares, axis=1) <= 0).all() and (shares.max(1) - shares.min(1) <= 1).all()


def test_ranks_are_those_of_a_sort_among_the_chosen():
    rng = np.random.default_rng(0)
    keys, among = rng.random((20, 30)), rng.random((20, 30)) < 0.5
    rank = d.rank_within(keys, among)
    for b in range(20):
        assert (np.sort(rank[b][among[b]]) == np.arange(among[b].sum())).all()
        assert (rank[b][~among[b]] == 30).all()
        assert (np.argsort(keys[b][among[b]]) == np.argsort(rank[b][among[b]])).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_positions_open_with_the_probability_of_the_reverse_process(name):
    s, S = d.schedule(name), 10
    u = (np.arange(100_000)[None] + 0.5) / 100_000
    when = d.unmasking_steps(u, np.ones_like(u, bool), np.array([S]), s)[0]
    left = 1.0
    for i in range(S):
        ratio, then = float(s.r(1 - i / S)), float(s.r(1 - (i + 1) / S))
        opened = (when == i).mean()
        assert abs(opened - left * d.unmasking_probability(ratio, then)) < 3e-5
        left -= opened
    assert abs(left) < 1e-9 and (d.unmasking_steps(u, np.zeros_like(u, bool), np.array([S]), s) == -1).all()


@pytest.mark.parametrize("kind", ("capped", "rescaled"))
def test_remasking_keeps_the_marginals(kind):
    """After every step a position is masked with probability r(t), whatever σ: ReMDM's condition."""
    s, S, eta = d.schedule("cosine"), 20, 0.3
    masked = 1.0
    for i in range(S):
        ratio, then = float(s.r(1 - i / S)), float(s.r(1 - (i + 1) / S))
        sigma = d.remasking_probability(kind, eta, ratio, then)
        masked = masked * (1 - d.unmasking_probability(ratio, then, sigma)) + (1 - masked) * sigma
        assert masked == pytest.approx(then, abs=1e-12) and 0 <= sigma <= 1
    assert all(d.unmasking_probability(ratio, 0.0) == 1 for ratio in (1.0, 1e-3, 1e-12, 1e-30))
    assert d.unmasking_probability(0.0, 0.0) == 0
    assert d.remasking_probability("rescaled", 1.0, 0.5, 0.4) == pytest.approx(0.8)  # (1 − α_s)/α_t
    assert d.remasking_probability("capped", 0.1, 0.5, 0.4) == 0.1
    assert d.remasking_probability("capped", 0.9, 0.5, 0.4) == pytest.approx(0.8)


def test_top_p_keeps_the_token_that_crosses_and_top_k_keeps_k():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert (d.filter_logits(logits, top_p=0.6) > -math.inf).tolist() == [True, True, False, False]
    assert (d.filter_logits(logits, top_p=0.5) > -math.inf).tolist() == [True, False, False, False]
    assert (d.filter_logits(logits, top_k=3) > -math.inf).tolist() == [True, True, True, False]


def uniforms(n, seed=0):
    return torch.from_numpy(d.draw_uniforms(seed, d.TOKEN, 0, 0, n)[0])


def test_draws_follow_the_probabilities():
    probs = torch.tensor([0.6, 0.3, 0.0999, 0.0001])
    token = d.draw_tokens(probs.log().expand(200_000, 4), uniforms(200_000))
    rate = torch.bincount(token, minlength=4) / 200_000
    assert ((rate - probs).abs() < 4 * (probs * (1 - probs) / 200_000).sqrt()).all()
    assert d.draw_tokens(probs.log()[None], None, 0) == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1500), st.integers(0, 2**31))
def test_what_has_no_probability_is_never_drawn(n_vocab, seed):
    """Not even by the extreme uniform numbers; and each token that has some can be drawn."""
    rng = np.random.default_rng(seed)
    values = np.where(rng.random(n_vocab) < 0.2, rng.normal(size=n_vocab) * 4, -np.inf)
    logits = torch.from_numpy(values.astype(np.float32))
    logits[rng.integers(n_vocab)] = 0.0
    least, below = 2**-32, 1 - 2**-24
    corners = torch.tensor([[1.0, 1.0], [least, least], [1.0, least], [least, 1.0], [below, below]])
    u = torch.cat((uniforms(500, seed), corners))
    token = d.draw_tokens(logits.expand(len(u), -1), u)
    assert (logits[token] > -math.inf).all() and (token < n_vocab).all()


def test_running_sums_that_shrink_draw_nothing_forbidden(monkeypatch):
    """A GPU's cumsum may end a little above or below itself; 1e-7 at the vocabulary's end keeps its share."""
    real = torch.Tensor.cumsum
    weights, u = torch.zeros(1, 256), torch.ones(1)
    weights[0, :200] = 1.0
    for push in (1e-9, -1e-9):
        factors = torch.cat((torch.ones(255), torch.tensor([1 + push])))
        monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim, f=factors: real(self, dim) * f)
        assert d.inverse_cdf(weights, u).item() == 199
    monkeypatch.undo()
    logits = torch.full((50_257,), -torch.inf)
    logits[0], logits[-1] = 0.0, math.log(1e-7)
    share = 1e-7 / (1 + 1e-7)
    for u, token in ((1 - share / 2, 50_256), (1 - 2 * share, 0)):
        assert d.draw_tokens(logits[None], torch.tensor([[u, 0.5]], dtype=torch.float64)).item() == token


def test_random_numbers_belong_to_row_step_and_position():
    many = d.draw_uniforms(3, d.TOKEN, np.arange(5), 7, 9)
    assert many.shape == (5, 9, 2) and many.dtype == np.float64 and many.min() > 0 and many.max() <= 1
    assert np.array_equal(d.draw_uniforms(3, d.TOKEN, np.array([4]), 7, 20)[0, :9], many[4])
    keys = (3, d.TOKEN, 4, 7), (4, d.TOKEN, 4, 7), (3, d.ORDER, 4, 7), (3, d.TOKEN, 5, 7), (3, d.TOKEN, 4, 8)
    assert len({d.draw_uniforms(*key, 1).tobytes() for key in keys}) == 5


def test_uniform_step_follows_its_formula():
    """Frequencies of one step against q(z_s | z_t) written out in fp64."""
    n, n_vocab, ratio, then, z = 400_000, 5, 0.7, 0.4, 2
    logits = torch.tensor([0.5, -1.0, 0.2, 0.0, 1.0])
    streams = d.TOKEN, d.CHANGE, d.START
    u = np.concatenate([d.draw_uniforms(0, stream, 0, 0, n)[0] for stream in streams], axis=1)
    at = [torch.full((n,), value) for value in (z, ratio, then)]
    out = d.uniform_step(logits.expand(n, -1), *at, torch.from_numpy(u))
    x, a = logits.double().softmax(0).numpy(), (1 - ratio) / (1 - then)
    q = (a * (np.arange(n_vocab) == z) + (1 - a) / n_vocab) * ((1 - then) * x + then / n_vocab)
    q /= q.sum()
    assert (np.abs(np.bincount(out, minlength=n_vocab) / n - q) < 4.5 * np.sqrt(q * (1 - q) / n)).all()
