"""decode.py: exactness with Bayes-optimal denoisers, rare tokens, and what must hold for every setting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_diffusion import Denoiser, L, M, P, V, chi_square

import diffusion as d
from benchmarks.sampling import sample_as_published
from model import ModelConfig, Transformer
from sampling import decode
from sampling.decode import CONFIDENT, PLANNED, DecodeConfig

EOS, MASK, CONTEXT = 40, 41, 48
LINEAR = d.schedule("linear")


def network(causal=False, timed=False, seed=0, **more):
    """Random weights; heads that look at neighbours, and clear preferences: little is nearly tied."""
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=16, d_model=48, d_ff=64, tied=False, init_std=0.1, local_init=True) | more
    config = ModelConfig(n_vocab=41, mask_id=MASK, seq_len=CONTEXT, causal=causal, timed=timed, **shape)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(seed)).eval().requires_grad_(False)
    model.lm_head.weight *= 3
    return model


MASKED, UNIFORM, AR = network(), network(timed=True), network(causal=True)


def samples(how, kind="masked", n=6000, schedule="linear", posterior=False, first=0):
    return torch.tensor(decode.generate(Denoiser(kind, schedule), [[M] * L] * n, how, -1, d.schedule(schedule), posterior, first).rows)


# exactness ----------------------------------------------------------------------------------------------------------------------

EXACT = [dict(order="first_hitting"), dict(order="random"), dict(order="entropy"), dict(order="margin"), dict(order="threshold", threshold=1.0),
         dict(order="threshold", threshold=1.0, beside="surest"), dict(steps=400), dict(steps=400, block=2), dict(order="random", block=1),
         dict(steps=400, remask="rescaled", eta=0.02), dict(steps=400, remask="capped", eta=0.02)]


@pytest.mark.parametrize("settings", EXACT, ids=lambda s: "-".join(map(str, s.values())))
def test_samplers_reproduce_the_distribution(settings):
    """Five seeds each: chi-square below its 99.9 % bound."""
    for seed in range(5):
        statistic, bound = chi_square(samples(DecodeConfig(seed=seed, **settings)))
        assert statistic < bound, (settings, seed)


@pytest.mark.parametrize("schedule", ("linear", "cosine", "poly2"))
def test_the_ancestral_sampler_is_exact_under_every_schedule(schedule):
    statistic, bound = chi_square(samples(DecodeConfig(steps=500), schedule=schedule))
    assert statistic < bound


@pytest.mark.parametrize("settings", (dict(steps=1), dict(order="random", steps=2), dict(order="low_confidence"),
                                      dict(temperature=0.9, order="random")), ids=lambda s: "-".join(map(str, s.values())))
def test_what_is_not_exact_fails_the_same_test(settings):
    """All at once, two at once, an order that depends on what was drawn, another temperature."""
    statistic, bound = chi_square(samples(DecodeConfig(**settings)))
    assert statistic > bound


def test_parallel_steps_converge_as_they_grow():
    """The distance of the sampled distribution falls with the number of steps, down to the noise of sampling."""
    def distance(steps, n=20_000):
        index = (samples(DecodeConfig(steps=steps), n=n).numpy() * V ** np.arange(L)[::-1]).sum(1)
        return np.abs(np.bincount(index, minlength=len(P)) / n - P).sum() / 2

    distances = [distance(steps) for steps in (1, 2, 4, 16, 256)]
    noise = np.sqrt(P * (1 - P) / 20_000).sum() / 2 * np.sqrt(2 / np.pi)  # of an exact sampler, expected
    assert all(a > b for a, b in zip(distances, distances[1:])) and distances[0] > 10 * noise and distances[-1] < 2 * noise, distances


@pytest.mark.parametrize("posterior", (False, True))
def test_the_uniform_sampler_reproduces_the_distribution(posterior):
    for seed in range(5):
        out = samples(DecodeConfig(steps=150, seed=seed), "posterior" if posterior else "loo", n=2000, posterior=posterior)
        statistic, bound = chi_square(out)
        assert statistic < bound, seed


def test_the_uniform_sampler_needs_the_leave_one_out_posterior():
    statistic, bound = chi_square(samples(DecodeConfig(steps=150), "posterior", n=2000))
    assert statistic > 3 * bound


# rare tokens --------------------------------------------------------------------------------------------------------------------


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


def shares_of_bands():
    p = 1 / np.arange(1, Zipf.V + 1)
    p /= p.sum()
    return {rank: p[low:high].sum() for rank, (low, high) in BANDS.items()}


def test_rare_tokens_keep_their_frequency():
    """1000 steps, fp32, 24 000 tokens: ranks around 10k and 50k within Monte-Carlo error."""
    n = 24_000
    out = decode.generate(Zipf(), [[Zipf.V] * 600] * (n // 600), DecodeConfig(steps=1000), -1, LINEAR)
    ids = np.array(out.rows)
    for rank, share in shares_of_bands().items():
        low, high = BANDS[rank]
        count = ((ids >= low) & (ids < high)).sum()
        assert abs(count - n * share) < 3.5 * np.sqrt(n * share), (rank, count, n * share)


def test_one_shot_gumbel_in_fp32_loses_them():
    """What others do: one draw per step over {p·Δ of every token, 1 − Δ of staying masked} by −log(u), u from torch.rand in fp32.

    Of K equally rare tokens only the smallest −log(u) matters, and u is k·2⁻²⁴: that of K is drawn directly, so that
    10⁷ positions can be simulated. Tokens at rank 50k come out more than 100 times too seldom; in float64 right.
    """
    u = torch.rand(2**22, generator=torch.Generator().manual_seed(0))
    assert torch.equal(u * 2**24, (u * 2**24).round())  # the grid, as said
    rng, n, delta = np.random.default_rng(0), 10**7, 1e-3
    for rank, share in shares_of_bands().items():
        low, high = BANDS[rank]
        weight = delta * share / (high - low)  # of one token
        stays = -np.log(rng.random(n)) / (1 - delta)  # the race of the mask, not rounded: it is what wins nearly always
        largest = rng.random(n) ** (1 / (high - low))  # the largest of K uniform numbers
        exact, on_grid = -np.log(largest), -np.log(np.minimum(np.floor(largest * 2**24) / 2**24, 1 - 2**-24)) + 1e-10
        expected = n * delta * share
        assert abs((exact / weight < stays).sum() - expected) < 4 * np.sqrt(expected)
        wins = (on_grid / weight < stays).sum()
        assert wins < expected / (100 if rank == 50_000 else 1.5), (rank, wins, expected)


# what must hold for every setting ------------------------------------------------------------------------------------------------


@st.composite
def everything(draw):
    """Rows of unequal length with holes anywhere, and a way to decode them."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        row = [MASK if draw(st.booleans()) else draw(st.integers(0, 40)) for _ in range(draw(st.integers(1, 20)))]
        rows.append(row + [MASK] * draw(st.integers(0 if MASK in row else 1, 20)))
    order = draw(st.sampled_from(PLANNED + CONFIDENT))
    block = draw(st.sampled_from((0, 1, 3, 8, 100)))
    how = DecodeConfig(order=order, steps=draw(st.sampled_from((0, 1, 2, 5, 17, 90))), threshold=draw(st.sampled_from((0.05, 0.5, 1.0))), beside=draw(st.sampled_from(("random", "surest"))),
              temperature=draw(st.sampled_from((0, 0.5, 1.0))), top_k=draw(st.sampled_from((0, 3))), top_p=draw(st.sampled_from((1.0, 0.8))),
              block=block, remask=draw(st.sampled_from(("no", "capped", "rescaled", "confidence"))) if order == "ancestral" else "no",
              eta=draw(st.sampled_from((0.05, 0.9))), guidance=draw(st.sampled_from((0, 1.5))), cache=draw(st.sampled_from(("no", "prefix", "dual"))) if block else "no",
              refresh=draw(st.sampled_from((0, 1, 3))), end=draw(st.booleans()), min_length=draw(st.sampled_from((0, 4))),
              banned=draw(st.sampled_from(((), (0, 7)))), seed=draw(st.integers(0, 9)))
    return rows, how


def check(model, rows, how):
    out, new = decode.generate(model, rows, how, EOS, LINEAR, posterior=True), sum(row.count(MASK) for row in rows)
    for given_row, row in zip(rows, out.rows, strict=True):
        assert len(row) == len(given_row)
        for was, i in zip(given_row, row):
            assert i == was if was != MASK else 0 <= i < 41  # given tokens stay; no mask, no padded id
            assert was != MASK or i not in how.banned
        if how.end:
            tail = next(place for place in range(len(row), -1, -1) if place == 0 or given_row[place - 1] != MASK)
            inner = [i for was, i in zip(given_row[:tail], row[:tail]) if was == MASK]
            assert EOS not in inner
            if EOS in row[tail:]:  # after the end there is nothing else
                first = tail + row[tail:].index(EOS)
                new -= len(row) - first - 1
                assert set(row[first:]) == {EOS} and given_row[:first].count(MASK) >= how.min_length
    assert out.new == new  # what was dropped after an end is not counted
    return out


@settings(max_examples=120, deadline=None)
@given(everything())
def test_nothing_stranded_nothing_forbidden_nothing_changed_and_any_split_the_same(case):
    rows, how = case
    out = check(MASKED, rows, how)
    for split in {1, 2} - {len(rows)}:
        parts = [decode.generate(MASKED, rows[i : i + split], how, EOS, LINEAR, first=i).rows for i in range(0, len(rows), split)]
        assert sum(parts, []) == out.rows


@settings(max_examples=20, deadline=None)
@given(everything())
def test_the_same_for_uniform_models(case):
    rows, how = case
    how = how._replace(order="ancestral", remask="no", cache="no", block=0, guidance=0)
    out = check(UNIFORM, rows, how)
    assert sum((decode.generate(UNIFORM, [row], how, EOS, LINEAR, True, first=i).rows for i, row in enumerate(rows)), []) == out.rows


@settings(max_examples=20, deadline=None)
@given(everything())
def test_the_same_for_ar_models_and_keeping_keys_changes_nothing(case):
    rows, how = case
    rows = [[i for i in row if i != MASK] + [MASK] * row.count(MASK) for row in rows]
    outs = [check(AR, rows, how._replace(cache=cache)) for cache in ("no", "prefix")]
    assert outs[0].rows == outs[1].rows
    assert sum((decode.generate(AR, [row], how._replace(cache="prefix"), EOS, first=i).rows for i, row in enumerate(rows)), []) == outs[0].rows


def test_seeds_and_rows_differ():
    rows = [[MASK] * 20] * 3
    for model, how in ((MASKED, DecodeConfig()), (MASKED, DecodeConfig(order="threshold", threshold=0.3)), (UNIFORM, DecodeConfig(steps=9)), (AR, DecodeConfig())):
        outs = [decode.generate(model, rows, how._replace(seed=seed), EOS, LINEAR).rows for seed in (0, 1)]
        assert len({tuple(row) for out in outs for row in out}) == 6


# steps, orders, blocks ----------------------------------------------------------------------------------------------------------


def opened(rows, how, model=MASKED):
    """How many positions of each row open at each pass, and the passes' frames."""
    frames = [torch.tensor(rows)]
    decode.generate(model, rows, how, EOS, LINEAR, watch=lambda z: frames.append(z.clone()))
    return [((a == MASK) & (b != MASK)).sum(1).tolist() for a, b in zip(frames, frames[1:])], frames


@pytest.mark.parametrize("order", ("random", "low_confidence", "entropy", "margin"))
def test_steps_are_spread_evenly_and_over_blocks(order):
    rows = [[MASK] * 20]
    assert opened(rows, DecodeConfig(order=order, steps=8))[0] == [[3]] * 4 + [[2]] * 4
    assert opened(rows, DecodeConfig(order=order, steps=4, block=8))[0] == [[4], [4], [8], [4]]  # of the last, shorter block one
    assert opened(rows, DecodeConfig(order=order, steps=99))[0] == [[1]] * 20  # more steps than tokens
    _, frames = opened(rows, DecodeConfig(order=order, block=8))
    for frame in frames:
        masked = (frame[0] == MASK).tolist()
        assert all(all(masked[end:]) for end in (8, 16) if any(masked[end - 8 : end]))


def test_steps_at_which_nothing_opens_cost_no_pass():
    counts, _ = opened([[MASK] * 20], DecodeConfig(steps=1000))
    assert all(count[0] for count in counts) and len(counts) <= 20


def test_orders_open_what_they_say():
    """One pass over 30 masked positions, two of them to be opened: those that the logits say."""
    row = [3, 9, 20, 5] + [MASK] * 30 + [8, 1]
    p = MASKED.logits(MASKED(torch.tensor([row])))[0, 4:34].double().softmax(-1)
    top = p.topk(2).values
    keys = dict(low_confidence=p.amax(-1), entropy=(p * p.log()).sum(-1), margin=top[:, 0] - top[:, 1])

    def first_opened(how):
        frame = opened([row], how)[1][1][0, 4:34]
        places = set(torch.nonzero(frame != MASK)[:, 0].tolist())
        assert how.temperature or all(frame[i] == p[i].argmax() for i in places)
        return places

    assert len({tuple(key.topk(3).indices.tolist()) for key in keys.values()}) > 1
    for order, key in keys.items():
        assert first_opened(DecodeConfig(order=order, steps=10, temperature=0)) == set(key.topk(3).indices.tolist())
    threshold = float(p.amax(-1).sort().values[-6:-4].mean())  # between the sixth and the fifth
    sure = set(p.amax(-1).topk(5).indices.tolist())
    for temperature in (0, 1.0):
        how = DecodeConfig(order="threshold", threshold=threshold, temperature=temperature)
        assert first_opened(how._replace(beside="surest")) == sure
        assert all(sure <= first_opened(how._replace(seed=seed)) and len(first_opened(how._replace(seed=seed))) <= 6 for seed in range(4))
        assert len(set.union(*(first_opened(how._replace(seed=seed)) for seed in range(4)))) > 6
        assert first_opened(how._replace(threshold=1.0, beside="surest")) == set(p.amax(-1).topk(1).indices.tolist())
    assert opened([row], DecodeConfig(order="threshold", threshold=1.0))[0] == [[1]] * 30


def test_ties_are_broken_by_chance_alone():
    """On masks alone every position is equally sure: the first to open is any of them, the same in any batch."""
    first = {}
    for seed in range(60):
        frame = opened([[MASK] * 10] * 2, DecodeConfig(order="entropy", seed=seed))[1][1]
        assert frame[1].tolist() == opened([[MASK] * 10] * 2, DecodeConfig(order="entropy", seed=seed))[1][1][1].tolist()
        first.setdefault(int((frame[0] != MASK).nonzero()[0, 0]), seed)
    assert len(first) > 6
    sure = torch.tensor([[0.5, 0.500001, 0.9, -torch.inf, 0.500002, -torch.inf]])
    assert decode.in_order(sure, torch.tensor([[0.2, 0.1, 0.9, 0.8, 0.3, 0.7]])).tolist() == [[2, 1, 0, 4, 5, 3]]


@pytest.mark.parametrize("kind", ("capped", "rescaled", "confidence"))
def test_remasking_masks_again_and_ends_with_nothing_masked(kind):
    counts, frames = opened([[MASK] * 20] * 4, DecodeConfig(remask=kind, steps=200, eta=0.2))
    again = sum(int(((a != MASK) & (b == MASK)).sum()) for a, b in zip(frames, frames[1:]))
    changed = sum(int(((a != MASK) & (b != MASK) & (a != b)).sum()) for a, b in zip(frames, frames[1:]))  # masked and written between two frames
    assert again + changed > 20 and len(counts) > 40 and (frames[-1] != MASK).all()


class TwoKinds(Denoiser):
    """Even positions are anybody's guess, odd ones certain, whatever the others are."""

    def __init__(self):
        super().__init__("masked")
        self.config.n_vocab, self.config.mask_id = 40, 41

    def logits(self, hidden):
        return torch.where(hidden > 0, 50.0, 0.0) * (torch.arange(40) == 7)

    def forward(self, z, t=None, documents=None, index=None, positions=None):
        return (index % 2)[:, None].float()


def test_confidence_remasks_what_was_written_with_least():
    """The chance is σ_max·softmax(−ψ) over what is written, ψ its confidence: 1/40 at even places, 1 at odd ones."""
    S, frames, weight = 100, [torch.full((400, 12), MASK)], np.exp(-np.array([1 / 40, 1.0] * 6))
    decode.generate(TwoKinds(), frames[0].tolist(), DecodeConfig(remask="confidence", steps=S), EOS, LINEAR, watch=frames.append)
    expected, blind, seen = np.zeros(2), np.zeros(2), np.zeros(2)
    for i, (a, b) in enumerate(zip(frames, frames[1:])):
        written, again = (a != MASK).numpy(), ((a != MASK) & (b == MASK)).numpy()
        most = min(1, (1 - (i + 1) / S) / max(i / S, 1e-9))  # (1 − α_s)/α_t
        chance = most * written * weight / np.maximum((written * weight).sum(1, keepdims=True), 1e-9)
        for kind in (0, 1):
            expected[kind] += chance[:, kind::2].sum()
            blind[kind] += (most * written / np.maximum(written.sum(1, keepdims=True), 1))[:, kind::2].sum()
            seen[kind] += again[:, kind::2].sum()
    assert len(frames) == S + 1 and (np.abs(seen - expected) < 4 * np.sqrt(expected)).all(), (seen, expected)
    assert (np.abs(seen - blind) > 5 * np.sqrt(expected)).all(), (seen, blind)  # equal chances would be seen


# the published algorithm ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, block, cfg", ((24, 24, 0.0), (8, 24, 0.0), (12, 8, 0.0), (6, 12, 0.7), (24, 4, 2.0)))
def test_at_temperature_0_the_published_algorithm_writes_the_same(steps, block, cfg):
    prompt = torch.randint(0, 40, (3, 10), generator=torch.Generator().manual_seed(0))
    published = sample_as_published(MASKED, prompt, steps, 24, block, guidance=cfg)
    how = DecodeConfig(order="low_confidence", steps=steps, block=0 if block == 24 else block, temperature=0, guidance=cfg)
    assert decode.generate(MASKED, [row + [MASK] * 24 for row in prompt.tolist()], how, EOS, LINEAR).rows == published.tolist()


def test_guidance_is_the_formula():
    """Logits un + (w + 1)(cond − un), un with the given tokens masked."""
    row, w = [3, 9, MASK, MASK, 5, MASK], 1.3
    z = torch.tensor([row])
    cond, un = (MASKED.logits(MASKED(x)) for x in (z, torch.full_like(z, MASK)))
    expected = (un + (w + 1) * (cond - un)).argmax(-1)[0]
    out = decode.generate(MASKED, [row], DecodeConfig(order="random", steps=1, temperature=0, guidance=w), EOS, LINEAR)
    assert out.rows[0] == torch.where(z[0] == MASK, expected, z[0]).tolist() and out.passes == 2
    assert expected.tolist() != cond.argmax(-1)[0].tolist()


# caches -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ("prefix", "dual"))
@pytest.mark.parametrize("order", ("ancestral", "low_confidence", "threshold"))
def test_a_cache_that_is_always_renewed_changes_nothing(cache, order):
    rows = [[1, 2, 3] + [MASK] * 30, [MASK] * 20]
    how = DecodeConfig(order=order, block=7, steps=0, threshold=0.3)
    exact = decode.generate(MASKED, rows, how, EOS, LINEAR)
    renewed = decode.generate(MASKED, rows, how._replace(cache=cache, refresh=1), EOS, LINEAR)
    assert renewed.rows == exact.rows and renewed.gap() is None
    stale = decode.generate(MASKED, rows, how._replace(cache=cache), EOS, LINEAR)
    assert stale.gap()[0] > 0 and stale.gap()[2] > 0
    fresher = decode.generate(MASKED, rows, how._replace(cache=cache, refresh=2), EOS, LINEAR)
    assert fresher.gap()[0] < stale.gap()[0] or order != "low_confidence"  # the others look at few positions, and of their own


@pytest.mark.parametrize("causal", (False, True))
def test_reading_a_window_is_the_whole_pass_where_nothing_else_changed(causal):
    """Keys and values of a full pass, then a window of the same tokens: the same hidden states; of changed tokens, for causal
    networks still, as long as everything after the change is read."""
    model, g = (AR if causal else MASKED), torch.Generator().manual_seed(0)
    z = torch.randint(0, 40, (3, 20), generator=g)
    real = torch.ones(3, 20, dtype=torch.bool)
    real[1, :6] = False
    positions = (real.long().cumsum(1) - 1).clamp_min(0)
    documents = torch.where(real, 0, -1).int()
    memory, every = decode.Memory(model.config, 3, 20, "cpu"), torch.arange(20).expand(3, -1)
    whole = model(z, documents=documents, positions=positions)
    read = model.read(z, memory, every, positions=positions, real=real)
    torch.testing.assert_close(read[real], whole[real], atol=1e-5, rtol=1e-4)
    columns = torch.arange(8, 15).expand(3, -1)
    window = model.read(z.gather(1, columns), memory, columns, None, None, positions.gather(1, columns), real)
    torch.testing.assert_close(window, whole[:, 8:15], atol=1e-5, rtol=1e-4)
    z[:, 12] = 17
    changed = model(z, documents=documents, positions=positions)
    columns = torch.arange(12, 20).expand(3, -1)
    window = model.read(z.gather(1, columns), memory, columns, None, None, positions.gather(1, columns), real)
    close = torch.allclose(window, changed[:, 12:], atol=1e-5, rtol=1e-4)
    assert close == causal  # a bidirectional network's earlier positions would have changed, too


# compiled -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_passes_write_the_same():
    """And each way compiles two graphs at most (a prompt or a whole canvas, then what follows): none after the first passes."""
    rows = [[1, 2, 3] + [MASK] * 24, [MASK] * 27]
    counter = torch._dynamo.utils.counters
    for model, how in ((MASKED, DecodeConfig()), (MASKED, DecodeConfig(order="low_confidence", block=9, cache="dual")), (MASKED, DecodeConfig(order="threshold", threshold=0.3)),
                       (MASKED, DecodeConfig(block=4, cache="prefix", order="low_confidence")), (MASKED, DecodeConfig(block=8, cache="dual")), (UNIFORM, DecodeConfig(steps=6)), (AR, DecodeConfig(cache="prefix"))):
        torch._dynamo.reset()
        counter.clear()
        a, b = (decode.generate(model, rows, how._replace(compile=compile), EOS, LINEAR).rows for compile in (False, True))
        assert a == b and not counter["graph_break"] and 1 <= counter["stats"]["unique_graphs"] <= 2, (how, dict(counter["stats"]))
