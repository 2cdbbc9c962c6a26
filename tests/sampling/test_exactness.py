"""With a Bayes-optimal network samples have the data's distribution, down to rare tokens."""

import numpy as np
import pytest
import torch
from networks import LINEAR
from small_world import Denoiser, L, M, P, V, chi_square

import diffusion
from sampling import decode
from sampling.decode import DecodeConfig


def name(settings):
    return "-".join(map(str, settings.values()))


def samples(cfg, kind="masked", n=6000, schedule="linear", posterior=False):
    """n samples of L tokens from the Bayes-optimal network of test_diffusion.py, (n, L)."""
    model = Denoiser(kind, schedule)
    rows = decode.generate(model, [[M] * L] * n, cfg, -1, diffusion.schedule(schedule), posterior).rows
    return torch.tensor(rows)


EXACT = [
    dict(order="first_hitting"),
    dict(order="random"),
    dict(order="entropy"),
    dict(order="margin"),
    dict(order="threshold", threshold=1.0),
    dict(order="threshold", threshold=1.0, fallback="surest"),
    dict(steps=400),
    dict(steps=400, block=2),
    dict(order="random", block=1),
    dict(steps=400, remask="rescaled", eta=0.02),
    dict(steps=400, remask="capped", eta=0.02),
]


@pytest.mark.parametrize("seeds", ((0, 1), pytest.param((2, 3, 4), marks=pytest.mark.slow)))
@pytest.mark.parametrize("settings", EXACT, ids=name)
def test_samplers_reproduce_the_distribution(settings, seeds):
    """Five seeds each: chi-square below its 99.9 % bound."""
    for seed in seeds:
        statistic, bound = chi_square(samples(DecodeConfig(seed=seed, **settings)))
        assert statistic < bound, (settings, seed)


@pytest.mark.parametrize("schedule", ("linear", "cosine", "poly2"))
def test_the_ancestral_sampler_is_exact_under_every_schedule(schedule):
    statistic, bound = chi_square(samples(DecodeConfig(steps=500), schedule=schedule))
    assert statistic < bound


NOT_EXACT = [
    dict(steps=1),  # all at once
    dict(order="random", steps=2),  # two at once
    dict(order="low_confidence"),  # an order that depends on the drawn tokens
    dict(temperature=0.9, order="random"),
]


@pytest.mark.parametrize("settings", NOT_EXACT, ids=name)
def test_what_is_not_exact_fails_the_same_test(settings):
    statistic, bound = chi_square(samples(DecodeConfig(**settings)))
    assert statistic > bound


def test_parallel_steps_converge_as_they_grow():
    """The sampled distribution comes nearer with the number of steps, down to the noise of sampling."""

    def distance(steps, n=20_000):
        state = (samples(DecodeConfig(steps=steps), n=n).numpy() * V ** np.arange(L)[::-1]).sum(1)
        return np.abs(np.bincount(state, minlength=len(P)) / n - P).sum() / 2

    distances = [distance(steps) for steps in (1, 2, 4, 16, 256)]
    noise = np.sqrt(P * (1 - P) / 20_000).sum() / 2 * np.sqrt(2 / np.pi)  # of an exact sampler, expected
    assert all(a > b for a, b in zip(distances, distances[1:])), distances
    assert distances[0] > 10 * noise and distances[-1] < 2 * noise, distances


@pytest.mark.parametrize("seeds", ((0,), pytest.param((1, 2, 3, 4), marks=pytest.mark.slow)))
@pytest.mark.parametrize("posterior", (False, True))
def test_the_uniform_sampler_reproduces_the_distribution(posterior, seeds):
    kind = "posterior" if posterior else "loo"
    for seed in seeds:
        cfg = DecodeConfig(steps=150, seed=seed)
        statistic, bound = chi_square(samples(cfg, kind, n=2000, posterior=posterior))
        assert statistic < bound, seed


def test_the_uniform_sampler_needs_the_leave_one_out_posterior():
    statistic, bound = chi_square(samples(DecodeConfig(steps=150), "posterior", n=2000))
    assert statistic > 3 * bound


# rare tokens ------------------------------------------------------------------------------------------------


class Zipf(Denoiser):
    """Every position is an independent draw from Zipf's law over GPT-2's vocabulary."""

    V = 50_257

    def __init__(self):
        super().__init__("masked")
        self.config.n_vocab, self.config.mask_id = self.V, self.V
        self.row = -torch.log(torch.arange(1, self.V + 1, dtype=torch.float32))

    def logits(self, hidden):
        return self.row.expand(len(hidden), -1)

    def forward(self, z, t=None, documents=None, index=None, positions=None):
        return torch.zeros(len(index), 1)


BANDS = {10_000: (9_000, 11_000), 50_000: (45_000, 50_257)}  # ranks


def band_probabilities():
    p = 1 / np.arange(1, Zipf.V + 1)
    p /= p.sum()
    return {rank: p[low:high].sum() for rank, (low, high) in BANDS.items()}


def test_rare_tokens_keep_their_frequency():
    """1000 steps, fp32, 15 000 tokens: ranks around 10k and 50k within Monte-Carlo error."""
    n = 15_000
    result = decode.generate(Zipf(), [[Zipf.V] * 600] * (n // 600), DecodeConfig(steps=1000), -1, LINEAR)
    ids = np.array(result.rows)
    for rank, probability in band_probabilities().items():
        low, high = BANDS[rank]
        count, expected = ((ids >= low) & (ids < high)).sum(), n * probability
        assert abs(count - expected) < 3.5 * np.sqrt(expected), (rank, count, expected)


def test_one_shot_gumbel_in_fp32_loses_them():
    """The usual way: one draw per step over {p·Δ of every token, 1 − Δ of staying masked}, in fp32.

    It is a race of −log(u). Of K equally rare tokens only the smallest matters, and u from torch.rand is
    k·2⁻²⁴: that of K is drawn directly, so that 10⁷ positions can be simulated. Tokens at rank 50k come out
    more than 100 times too seldom; in float64 right.
    """
    u = torch.rand(2**22, generator=torch.Generator().manual_seed(0))
    assert torch.equal(u * 2**24, (u * 2**24).round())  # the grid
    rng, n, delta = np.random.default_rng(0), 10**7, 1e-3
    for rank, probability in band_probabilities().items():
        low, high = BANDS[rank]
        weight = delta * probability / (high - low)  # of one token
        stays = -np.log(rng.random(n)) / (1 - delta)  # the mask's race, not rounded: it wins nearly always
        largest = rng.random(n) ** (1 / (high - low))  # the largest of K uniform numbers
        exact = -np.log(largest)
        on_grid = -np.log(np.minimum(np.floor(largest * 2**24) / 2**24, 1 - 2**-24)) + 1e-10
        expected = n * delta * probability
        assert abs((exact / weight < stays).sum() - expected) < 4 * np.sqrt(expected)
        wins = (on_grid / weight < stays).sum()
        assert wins < expected / (100 if rank == 50_000 else 1.5), (rank, wins, expected)
