"""Golden tests of the mathematics: every kernel × schedule × estimator against closed forms and enumeration."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import diffusion as d
import kernels
from model import ModelConfig, Transformer

SCHEDULES = ("linear", "cosine", "poly2", "poly3")

# A small world: V tokens, L positions, a known and strongly dependent joint distribution.
V, L, M = 3, 3, 3
STATES = np.array(list(itertools.product(range(V), repeat=L)))  # (27, L)
P = np.random.default_rng(0).gamma(0.4, size=len(STATES)) + 0.01
P /= P.sum()
H = float(-(P * np.log(P)).sum()) / L  # nats per token


class Denoiser(torch.nn.Module):
    """Stands in for the network: hidden states are the optimal log-probabilities, the head is the identity."""

    def __init__(self, kind, schedule="linear", mistake=0.0):
        super().__init__()
        self.kind, self.schedule, self.mistake = kind, d.schedule(schedule), mistake
        self.config = SimpleNamespace(n_vocab=V, mask_id=M, causal=False, timed=kind != "masked")
        self.embed = torch.nn.Embedding(1, 1)
        self.head = torch.eye(V, dtype=torch.float64)

    def logits(self, hidden):
        return hidden

    def forward(self, z, t=None, documents=None, index=None, positions=None, visible=None):
        """log p(x_i = v | what is known), (B, L, V) or (C, V): enumeration over all states."""
        states, prior = torch.tensor(STATES), torch.tensor(P)
        hit = z[:, None, :] == states[None]  # (B, 27, L)
        if self.kind == "masked":
            likelihood = torch.where(z[:, None, :] == M, 1.0, hit.double())
        else:
            ratio = torch.tensor(self.schedule.r(t.double().numpy()))[:, None, None]
            likelihood = (1 - ratio) * hit + ratio / V
        out = torch.zeros(len(z), L, V, dtype=torch.float64)
        for i in range(L):
            others = likelihood.clone()
            if self.kind != "posterior":  # leave one out; for masked positions it makes no difference
                others[:, :, i] = 1.0
            weight = others.prod(-1) * prior  # (B, 27)
            for v in range(V):
                out[:, i, v] = weight[:, states[:, i] == v].sum(1)
        logits = torch.log(out / out.sum(-1, keepdim=True) + 1e-300)
        if self.mistake:  # a network that is wrong in a fixed way
            logits = logits.clamp_min(-4) * (1 - self.mistake) + self.mistake * torch.arange(V) * (1 + z.sum(1) % 3)[:, None, None]
        return logits if index is None else logits.flatten(0, 1)[index]


def loss_of(network, batch, posterior=False):
    hidden = network(batch.tokens, batch.time, batch.documents, batch.index)
    return d.loss_and_parts(hidden, network.head, batch, network.config.n_vocab, posterior)[0]


def estimate(p, denoiser, posterior=False, groups=40, n_rows=1500, progress=0.5):
    """Mean and standard error of the loss over independent steps whose rows are drawn from P."""
    values, rng = [], np.random.default_rng(1)
    for group in range(groups):
        x = STATES[rng.choice(len(P), n_rows, p=P)]
        rows = d.noise_levels(p, group * n_rows, n_rows, progress)
        batch = d.make_batch(p, np.concatenate((x[:, :1], x), 1), rows, rows.microbatch_rows(0, 1))
        batch = batch._replace(weights=batch.weights.astype(np.float64))
        batch = d.Batch(*(None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in batch))
        # relative to this group's own log-likelihood: takes the noise of drawing x out
        surprise = -np.log([P[int(i)] for i in (x * V ** np.arange(L)[::-1]).sum(1)]).mean() / L
        values.append(loss_of(denoiser, batch, posterior).item() - surprise + H)
    return np.mean(values), np.std(values, ddof=1) / math.sqrt(groups)


def curve(denoiser):
    """C_k, the mean cross-entropy of a masked token when k are masked, by enumeration. (L,)"""
    result = []
    for k in range(1, L + 1):
        total = 0.0
        masks = list(itertools.combinations(range(L), k))
        for mask in masks:
            z = torch.tensor(STATES).clone()
            z[:, list(mask)] = M
            nats = -denoiser(z).log_softmax(-1).gather(-1, torch.tensor(STATES)[..., None])[..., 0]
            total += (torch.tensor(P) * nats[:, list(mask)].mean(1)).sum().item() / len(masks)
        result.append(total)
    return np.array(result)


def process(objective="masked", **more):
    return d.Process(objective, V, M, L, **more)


# (a) the optimal denoiser's bound is the entropy ------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("estimator", ("count", "ratio", "time"))
def test_masked_bound_of_the_optimal_denoiser_is_the_entropy(schedule, estimator):
    mean, error = estimate(process(schedule=schedule, estimator=estimator), Denoiser("masked"))
    truth = H
    if estimator == "ratio":  # forcing a mask where none fell: (L·H + C₁)/(L + 1) instead of H
        truth = (L * H + curve(Denoiser("masked"))[0]) / (L + 1)
    assert error < 0.02 * H
    assert abs(mean - truth) < 4 * error


@pytest.mark.parametrize("more", (dict(time="iid"), dict(time="moving_gaussian", time_correction=True),
                                  dict(time="moving_gaussian", time_correction=True, estimator="time")))
def test_time_samplers_keep_the_bound_when_corrected(more):
    mean, error = estimate(process(time_sigma=0.5, **more), Denoiser("masked"))
    assert error < 0.03 * H and abs(mean - H) < 4 * error


def test_moving_gaussian_without_correction_is_another_loss():
    mean, error = estimate(process(time="moving_gaussian", time_sigma=0.1), Denoiser("masked"), progress=1.0)
    assert mean > H + 20 * error  # mostly noisy rows, as in the paper's late training loss


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_bound_of_the_leave_one_out_denoiser_is_the_entropy(schedule):
    mean, error = estimate(process("uniform", schedule=schedule), Denoiser("loo", schedule))
    assert error < 0.02 * H and abs(mean - H) < 4 * error
    mean, error = estimate(process("uniform", schedule=schedule), Denoiser("posterior", schedule), posterior=True)
    assert abs(mean - H) < 4 * error  # the shift undone


def test_full_posterior_misses_the_uniform_bound():
    mean, error = estimate(process("uniform"), Denoiser("posterior"))
    assert mean > H + 10 * error


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(SCHEDULES))
def test_one_token_uniform_bound_is_the_entropy_exactly(seed, name):
    """V = 7, L = 1: integrate over t by quadrature instead of sampling (SPEC §6)."""
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
        total += (jacobian * chance * kernels.uniform_bound(probs.expand(400, 7), zs, xs, beta) / (7 * (1 - r))).sum()
    assert abs(total.item() - -(probs * probs.log()).sum().item()) < 2e-4
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
        got = kernels.uniform_bound(probs, z, x, beta)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-15)
        single = kernels.uniform_bound(probs.float(), z, x, beta.float()).double()
        torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-15)


def test_uniform_bound_is_finite_at_the_ends_of_time():
    """poly8 at t → 0 has r ~ 1e-40, and every schedule has α = 0 at t = 1: loss and gradient stay finite in fp32."""
    p = d.Process("uniform", 9, 9, 16, schedule="poly8")
    rows = d.NoiseLevels(np.arange(4), np.array([1e-5, 1e-3, 0.5, 1.0]), np.full(4, 16), np.full(4, 1), 0.0)
    batch = d.make_batch(p, np.zeros((4, 17), int), rows, rows.microbatch_rows(0, 1))
    logits = torch.randn(64, 9, requires_grad=True)
    nats = kernels.uniform_bound(logits.softmax(-1), *(torch.from_numpy(a) for a in (batch.noisy, batch.targets, batch.beta)))
    (nats * torch.from_numpy(batch.weights[:, 0])).sum().backward()
    assert torch.isfinite(nats).all() and torch.isfinite(logits.grad).all()


# (b) three estimators, one bound ----------------------------------------------------------------------------


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
    """Over a fine lattice Σ weight·k·C_k is (1/ℓ)Σ C_k × ℓ, exactly, for any length and curve: no ε anywhere."""
    for length in (1, 2, 7):
        p = d.Process("masked", V, M, length, schedule=schedule)
        n = 200_000
        rows = d.noise_levels(p, 0, n)
        noisy, weight = d.masked_weights(p, rows, np.arange(n), d.random_bits(0, 0, rows.sample, length), np.ones((n, length), bool))
        assert (noisy.sum(1) == rows.count).all()
        C = np.cos(np.arange(length)) + 2
        assert np.mean(weight * rows.count * C[rows.count - 1]) == pytest.approx(C.sum(), rel=1e-4)


# (c) schedules ----------------------------------------------------------------------------------------------


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


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="linear, cosine or poly"):
        d.schedule("sigmoid")


# (d) one token ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_token_masked_elbo_is_cross_entropy(schedule):
    p = d.Process("masked", V, M, 1, schedule=schedule)
    rows = d.noise_levels(p, 0, 64)
    batch = d.make_batch(p, np.arange(128).reshape(64, 2) % V, rows, rows.microbatch_rows(0, 1))
    assert (batch.tokens == M).all()
    np.testing.assert_allclose(batch.weights.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(batch.weights[batch.weights > 0], 1 / 64, rtol=1e-6)


# (e) one loss, however the batch is split -------------------------------------------------------------------


@pytest.mark.parametrize("more", (dict(), dict(loss="maskgit"), dict(estimator="time"), dict(short_rows=0.5),
                                  dict(objective="uniform"), dict(objective="uniform", loss="paper", short_rows=0.5),
                                  dict(objective="ar", short_rows=0.5)))
def test_noise_and_weights_do_not_depend_on_the_split(more):
    """Every row's noise, and its weights up to nothing at all, for 1×16, 2×8 and 16×1 micro-batches."""
    p = d.Process(**{"objective": "masked", "n_vocab": 50, "mask_id": 50, "seq_len": 33, **more})
    x = np.random.default_rng(0).integers(0, 50, (16, 34))
    rows = d.noise_levels(p, 4800, 16, 0.3)

    def per_row(parts):
        tokens, weights = np.zeros((16, 33), int), np.zeros((16, 33))
        for part in range(parts):
            which = rows.microbatch_rows(part, parts)
            b = d.make_batch(p, x[which], rows, which)
            index = np.arange(b.targets.size) if b.index is None else b.index
            flat = np.zeros(which.size * 33)
            np.add.at(flat, index, b.weights.sum(1))
            tokens[which], weights[which] = b.tokens, flat.reshape(-1, 33)
        return tokens, weights

    whole = per_row(1)
    for parts in (2, 16):
        for a, b in zip(whole, per_row(parts)):
            np.testing.assert_array_equal(a, b)


def test_noise_is_a_function_of_the_sample_and_streams_are_independent():
    a = d.random_bits(1, d.MASK, np.arange(100), 64)
    np.testing.assert_array_equal(a[40:50], d.random_bits(1, d.MASK, np.arange(40, 50), 64))
    for other in (d.random_bits(2, d.MASK, np.arange(100), 64), d.random_bits(1, d.REPLACE, np.arange(100), 64)):
        assert not (a == other).any()
        assert abs(np.corrcoef(d.unit(a).ravel(), d.unit(other).ravel())[0, 1]) < 4 / math.sqrt(a.size)
    u = np.sort(d.unit(a).ravel())
    assert np.abs(u - np.arange(1, u.size + 1) / u.size).max() < 1.95 / math.sqrt(u.size)  # Kolmogorov-Smirnov, 0.1 %


# masks and static shapes ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32), st.data())
def test_exactly_k_positions_inside_the_row(length, B, seed, data):
    count = np.array(data.draw(st.lists(st.integers(1, length), min_size=B, max_size=B)))
    ends = np.array([data.draw(st.integers(int(k), length)) for k in count])
    inside = np.arange(length) < ends[:, None]
    noisy = d.exactly(d.random_bits(seed, d.MASK, np.arange(B), length), count, inside)
    assert (noisy.sum(1) == count).all() and not (noisy & ~inside).any()


def test_every_position_is_masked_equally_often():
    bits = d.random_bits(5, d.MASK, np.arange(20_000), 10)
    rate = d.exactly(bits, np.full(20_000, 3), np.ones((20_000, 10), bool)).mean(0)
    assert np.abs(rate - 0.3).max() < 4 * math.sqrt(0.3 * 0.7 / 20_000)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SCHEDULES), st.sampled_from(("count", "ratio", "time")), st.sampled_from(("uniform", "iid", "moving_gaussian")),
       st.integers(1, 12), st.integers(2, 80), st.sampled_from((0.0, 0.5)), st.integers(0, 2**40), st.floats(0, 1))
def test_masked_positions_always_fit_the_capacity(schedule, estimator, time, B, length, short, first, progress):
    p = d.Process("masked", 9, 9, length, schedule=schedule, estimator=estimator, time=time, short_rows=short)
    rows = d.noise_levels(p, first, 3 * B, progress)
    x = np.zeros((B, length + 1), int)
    for part in range(3):
        which = rows.microbatch_rows(part, 3)
        batch = d.make_batch(p, x, rows, which)  # raises if it does not fit
        assert batch.index.shape == (d.capacity(p, B),)
        assert (batch.weights[:, 0] > 0).sum() == (batch.tokens == 9).sum()


def test_capacity_is_what_the_spec_promises():
    p = d.Process("masked", 9, 9, 2048)
    assert d.capacity(p, 32) <= -(-(33 / 2 * 2048 + 32) // 64) * 64
    assert d.capacity(p, 32) / (32 * 2048) < 0.526


def test_short_rows_have_random_lengths_and_are_weighed_by_their_tokens():
    p = d.Process("masked", 9, 9, 50, short_rows=0.3)
    rows = d.noise_levels(p, 0, 20_000)
    short = rows.length < 50
    assert abs(short.mean() - 0.3 * 48 / 49) < 4 * math.sqrt(0.21 / 20_000)
    assert rows.length.min() == 2 and abs(rows.length[short].mean() - 25.5) < 1
    batch = d.make_batch(p, np.zeros((20_000, 51), int), rows, rows.microbatch_rows(0, 1))
    assert batch.weights.sum() == pytest.approx(1, abs=0.02)  # a constant loss of 1 nat is 1 nat per token
    assert ((batch.documents == 0).sum(1) == rows.length).all() and set(batch.documents[:, 0]) == {0}


def test_maskgit_is_the_mean_over_all_masked_tokens_of_the_step():
    p = d.Process("masked", 9, 9, 32, loss="maskgit")
    rows = d.noise_levels(p, 0, 8)
    batches = [d.make_batch(p, np.zeros((2, 33), int), rows, rows.microbatch_rows(i, 4)) for i in range(4)]
    weights = np.concatenate([b.weights[b.weights > 0] for b in batches])
    np.testing.assert_allclose(weights, 1 / rows.count.sum(), rtol=1e-6)


def test_paper_loss_is_half_noisy_half_clean():
    p = d.Process("uniform", 9, 9, 32, loss="paper")
    rows = d.noise_levels(p, 0, 512)
    x = np.random.default_rng(0).integers(0, 9, (512, 33))
    batch = d.make_batch(p, x, rows, rows.microbatch_rows(0, 1))
    np.testing.assert_allclose(batch.weights.sum(0), [0.5, 0.5], rtol=1e-3)  # either part of a constant 1 nat
    assert ((batch.weights > 0).sum(1) == 1).all()
    changed = (batch.tokens.reshape(-1) != batch.targets)
    assert not (changed & (batch.weights[:, 1] > 0)).any()  # clean positions are untouched
    assert changed.sum() / rows.count.sum() == pytest.approx(8 / 9, abs=0.01)


# (i) low discrepancy ----------------------------------------------------------------------------------------


def test_lattice_marginals_are_uniform():
    p = process()
    t = np.stack([d.noise_levels(p, 8 * i, 8).t for i in range(4000)])
    for j in range(8):  # every row of the step is uniform in its eighth, and the step covers all of them
        u = np.sort(t[:, j] * 8 - j)
        assert np.abs(u - np.arange(1, 4001) / 4000).max() < 1.95 / math.sqrt(4000)


def test_lattice_cuts_the_variance_of_the_loss_as_predicted():
    """For a mean cross-entropy of a·k/L a row's loss is a·k/L: standard deviation a/√(12 N) for
    independent t, and a/(N √12) for the lattice with exact k (SPEC §3: .208 and .025 at N = 64, L = 1024)."""
    a, N = 5.77, 64
    std = {}
    for time in ("iid", "uniform"):
        p = d.Process("masked", V, M, 1024, time=time)
        std[time] = np.std([a * d.noise_levels(p, i * N, N).count.mean() / 1024 for i in range(2000)])
    assert std["iid"] == pytest.approx(a / math.sqrt(12 * N), rel=0.08)  # .208
    assert std["uniform"] == pytest.approx(a / (N * math.sqrt(12)), rel=0.08)  # .026


def test_micro_batches_and_ranks_get_lattices_of_their_own():
    rows = d.noise_levels(process(), 0, 32)
    for part in range(4):
        np.testing.assert_allclose(np.diff(rows.t[rows.microbatch_rows(part, 4)]), 1 / 8)


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1), st.floats(0.05, 2))
def test_moving_gaussian_quantile_inverts_its_distribution(mean, sigma):
    p = process(time="moving_gaussian", time_sigma=sigma, time_correction=True)
    u = np.linspace(0.001, 1, 200)
    t = d.time_quantile(p, u, mean)
    assert (t > 0).all() and (t <= 1).all() and (np.diff(t) > 0).all()
    np.testing.assert_allclose(d.time_cdf(p, t, mean), u, atol=1e-6)
    h = 1e-5
    inner = t[5:-5]
    np.testing.assert_allclose(d.time_density(p, inner, mean),
                               (d.time_cdf(p, inner + h, mean) - d.time_cdf(p, inner - h, mean)) / (2 * h), rtol=1e-4)


# (j) the gathered head --------------------------------------------------------------------------------------


def test_gathered_head_equals_the_full_head():
    """Loss and gradients of the gathered rows against softmax over every position, in fp64."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 16, 8, dtype=torch.float64, requires_grad=True)
    head = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
    p = d.Process("masked", 50, 50, 16)
    rows = d.noise_levels(p, 0, 4)
    x = np.random.default_rng(0).integers(0, 50, (4, 17))
    batch = d.make_batch(p, x, rows, rows.microbatch_rows(0, 1))
    model = SimpleNamespace(config=SimpleNamespace(n_vocab=50), head=head)

    class Network:
        config, head = model.config, model.head

        def __call__(self, tokens, time, documents, index):
            return hidden.flatten(0, 1)[index]

    tensors = d.Batch(*(None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in batch))
    loss = loss_of(Network(), tensors)
    got = torch.autograd.grad(loss, (hidden, head))
    logits = (hidden @ head[:50].T).log_softmax(-1)  # excluded columns left out instead of masked
    nats = -logits.gather(-1, torch.tensor(x[:, 1:, None]))[..., 0]
    weight = torch.tensor(np.where(batch.tokens == 50, 1 / rows.count[:, None] / 4, 0.0))  # linear: mean over masked, mean over rows
    full = (nats * weight).sum()
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    for a, b in zip(got, torch.autograd.grad(full, (hidden, head))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert (got[1][50:] == 0).all()


def test_gathered_network_equals_the_full_one():
    """Loss and every gradient of the gathered rows against a network and softmax over all positions."""
    torch.manual_seed(0)
    network = Transformer(ModelConfig(2, 2, 2, 8, 16, 64, 50, 50, 16, causal=False, init_std=0.3)).init_weights()
    p = d.Process("masked", 50, 50, 16)
    rows = d.noise_levels(p, 0, 16)
    x = np.random.default_rng(0).integers(0, 50, (16, 17))
    batch = d.make_batch(p, x, rows, rows.microbatch_rows(0, 1))
    assert len(batch.index) < 16 * 16  # some positions are left out, some of those kept only fill up
    tensors = d.Batch(*(None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in batch))
    loss = loss_of(network, tensors)
    got = torch.autograd.grad(loss, list(network.parameters()))
    logits = (network(tensors.tokens) @ network.head[:50].T).log_softmax(-1)  # excluded columns left out instead of masked
    nats = -logits.gather(-1, torch.tensor(x[:, 1:, None]))[..., 0]
    weight = torch.tensor(np.where(batch.tokens == 50, 1 / rows.count[:, None] / 16, 0.0))  # linear: mean over masked, mean over rows
    full = (nats * weight).sum()
    assert loss.item() == pytest.approx(full.item(), rel=1e-6)
    for a, b in zip(got, torch.autograd.grad(full, list(network.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (got[0][51:] == 0).all()  # the embedding's padding, which is the head's too


# (h) the samplers reproduce the distribution ----------------------------------------------------------------


def chi_square(samples):
    """Pearson's statistic of samples (n, L) against P, and its 99.9 % bound (Wilson-Hilferty)."""
    index = (samples.numpy() * V ** np.arange(L)[::-1]).sum(1)
    expected = P * len(index)
    k = len(P) - 1
    bound = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3
    return ((np.bincount(index, minlength=len(P)) - expected) ** 2 / expected).sum(), bound


# reverse steps ----------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 12))
def test_shares_open_everything_as_evenly_as_can_be(counts, steps):
    counts = np.array(counts)
    shares = d.shares(counts, np.full(len(counts), steps))
    assert shares.shape == (len(counts), steps) and (shares.sum(1) == counts).all()
    assert (np.diff(shares, axis=1) <= 0).all() and (shares.max(1) - shares.min(1) <= 1).all()


def test_ranks_are_those_of_a_sort_among_the_chosen():
    rng = np.random.default_rng(0)
    keys, among = rng.random((20, 30)), rng.random((20, 30)) < 0.5
    rank = d.rank_within(keys, among)
    for b in range(20):
        assert (np.sort(rank[b][among[b]]) == np.arange(among[b].sum())).all() and (rank[b][~among[b]] == 30).all()
        assert (np.argsort(keys[b][among[b]]) == np.argsort(rank[b][among[b]])).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_positions_open_with_the_probability_of_the_reverse_process(name):
    s, S = d.schedule(name), 10
    u = (np.arange(100_000)[None] + 0.5) / 100_000
    when = d.opening_steps(u, np.ones_like(u, bool), np.array([S]), s)[0]
    left = 1.0
    for i in range(S):
        ratio, then = float(s.r(1 - i / S)), float(s.r(1 - (i + 1) / S))
        opened = (when == i).mean()
        assert abs(opened - left * d.opening_chance(ratio, then)) < 3e-5
        left -= opened
    assert abs(left) < 1e-9 and (d.opening_steps(u, np.zeros_like(u, bool), np.array([S]), s) == -1).all()


@pytest.mark.parametrize("kind", ("capped", "rescaled"))
def test_remasking_keeps_the_marginals(kind):
    """After every step a position is masked with probability r(t), whatever σ: ReMDM's condition."""
    s, S, eta = d.schedule("cosine"), 20, 0.3
    masked = 1.0
    for i in range(S):
        ratio, then = float(s.r(1 - i / S)), float(s.r(1 - (i + 1) / S))
        sigma = d.remasking_chance(kind, eta, ratio, then)
        masked = masked * (1 - d.opening_chance(ratio, then, sigma)) + (1 - masked) * sigma
        assert masked == pytest.approx(then, abs=1e-12) and 0 <= sigma <= 1
    assert all(d.opening_chance(ratio, 0.0) == 1 for ratio in (1.0, 1e-3, 1e-12, 1e-30)) and d.opening_chance(0.0, 0.0) == 0
    assert d.remasking_chance("rescaled", 1.0, 0.5, 0.4) == pytest.approx(0.8)  # (1 − α_s)/α_t
    assert d.remasking_chance("capped", 0.1, 0.5, 0.4) == 0.1 and d.remasking_chance("capped", 0.9, 0.5, 0.4) == pytest.approx(0.8)


def test_top_p_keeps_the_token_that_crosses_and_top_k_keeps_k():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert (d.filter_logits(logits, top_p=0.6) > -math.inf).tolist() == [True, True, False, False]
    assert (d.filter_logits(logits, top_p=0.5) > -math.inf).tolist() == [True, False, False, False]
    assert (d.filter_logits(logits, top_k=3) > -math.inf).tolist() == [True, True, True, False]


def uniforms(n, seed=0):
    return torch.from_numpy(d.draws(seed, d.TOKEN, 0, 0, n)[0])


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
    logits = torch.from_numpy(np.where(rng.random(n_vocab) < 0.2, rng.normal(size=n_vocab) * 4, -np.inf).astype(np.float32))
    logits[rng.integers(n_vocab)] = 0.0
    u = torch.cat((uniforms(500, seed), torch.tensor([[1.0, 1.0], [2**-32, 2**-32], [1.0, 2**-32], [2**-32, 1.0], [1 - 2**-24, 1 - 2**-24]])))
    token = d.draw_tokens(logits.expand(len(u), -1), u)
    assert (logits[token] > -math.inf).all() and (token < n_vocab).all()


def test_running_sums_that_shrink_draw_nothing_forbidden(monkeypatch):
    """A GPU's cumsum may end a little above or below itself; and 1e-7 at the end of the vocabulary keeps its share."""
    real = torch.Tensor.cumsum
    weights, u = torch.zeros(1, 256), torch.ones(1)
    weights[0, :200] = 1.0
    for push in (1e-9, -1e-9):
        monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim, push=push: real(self, dim) * torch.cat((torch.ones(255), torch.tensor([1 + push]))))
        assert d.first_above(weights, u).item() == 199
    monkeypatch.undo()
    logits = torch.full((50_257,), -torch.inf)
    logits[0], logits[-1] = 0.0, math.log(1e-7)
    share = 1e-7 / (1 + 1e-7)
    for u, token in ((1 - share / 2, 50_256), (1 - 2 * share, 0)):
        assert d.draw_tokens(logits[None], torch.tensor([[u, 0.5]], dtype=torch.float64)).item() == token


def test_random_numbers_belong_to_row_step_and_position():
    many = d.draws(3, d.TOKEN, np.arange(5), 7, 9)
    assert many.shape == (5, 9, 2) and many.dtype == np.float64 and many.min() > 0 and many.max() <= 1
    assert np.array_equal(d.draws(3, d.TOKEN, np.array([4]), 7, 20)[0, :9], many[4])
    assert len({d.draws(*key, 1).tobytes() for key in ((3, d.TOKEN, 4, 7), (4, d.TOKEN, 4, 7), (3, d.ORDER, 4, 7), (3, d.TOKEN, 5, 7), (3, d.TOKEN, 4, 8))}) == 5


def test_uniform_step_follows_its_formula():
    """Frequencies of one step against q(z_s | z_t) written out in fp64."""
    n, n_vocab, ratio, then, z = 400_000, 5, 0.7, 0.4, 2
    logits = torch.tensor([0.5, -1.0, 0.2, 0.0, 1.0])
    u = torch.from_numpy(np.concatenate([d.draws(0, stream, 0, 0, n)[0] for stream in (d.TOKEN, d.CHANGE, d.START)], axis=1))
    out = d.uniform_step(logits.expand(n, -1), torch.full((n,), z), torch.full((n,), ratio), torch.full((n,), then), u)
    x, a = logits.double().softmax(0).numpy(), (1 - ratio) / (1 - then)
    q = (a * (np.arange(n_vocab) == z) + (1 - a) / n_vocab) * ((1 - then) * x + then / n_vocab)
    q /= q.sum()
    assert (np.abs(np.bincount(out, minlength=n_vocab) / n - q) < 4.5 * np.sqrt(q * (1 - q) / n)).all()
