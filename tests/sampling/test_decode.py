"""Decoding: what holds for every setting, and what orders, steps, blocks, remasking and guidance do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import AR, EOS, LINEAR, MASK, MASKED, UNIFORM, passes, unmasked, written
from small_world import Denoiser

import diffusion as d
from benchmarks.sampling import sample_as_published
from sampling import decode
from sampling.canvas import make_canvas, split_into_blocks
from sampling.decode import CONFIDENCE_ORDERS, PLANNED_ORDERS, DecodeConfig

# what must hold for every setting ---------------------------------------------------------------------------


@st.composite
def cases(draw):
    """Rows of unequal length with new positions anywhere, and a way to decode them."""
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        n = draw(st.integers(1, 20))
        row = [MASK if draw(st.booleans()) else draw(st.integers(0, 40)) for _ in range(n)]
        rows.append(row + [MASK] * draw(st.integers(0 if MASK in row else 1, 20)))

    def one_of(*values):
        return draw(st.sampled_from(values))

    order, block = one_of(*PLANNED_ORDERS, *CONFIDENCE_ORDERS), one_of(0, 1, 3, 8, 100)
    cfg = DecodeConfig(
        order=order,
        steps=one_of(0, 1, 2, 5, 17, 90),
        threshold=one_of(0.05, 0.5, 1.0),
        fallback=one_of("random", "surest"),
        temperature=one_of(0, 0.5, 1.0),
        top_k=one_of(0, 3),
        top_p=one_of(1.0, 0.8),
        block=block,
        remask=one_of("no", "capped", "rescaled", "confidence") if order == "ancestral" else "no",
        eta=one_of(0.05, 0.9),
        guidance=one_of(0, 1.5),
        cache=one_of("no", "prefix", "dual") if block else "no",
        refresh=one_of(0, 1, 3),
        stop=draw(st.booleans()),
        stop_ids=one_of((), (3, 11)),
        min_length=one_of(0, 4),
        suppress_tokens=one_of((), (0, 7)),
        seed=draw(st.integers(0, 9)),
    )
    return rows, cfg


def check(model, rows, cfg):
    """Decode, assert what holds for every setting, and return the Result."""
    result = decode.generate(model, rows, cfg, EOS, LINEAR, posterior=True)
    n_new = sum(row.count(MASK) for row in rows)
    for prompt, row in zip(rows, result.rows, strict=True):
        assert len(row) == len(prompt)
        for before, token in zip(prompt, row):
            if before != MASK:
                assert token == before  # prompt tokens stay
            else:
                assert 0 <= token < 41 and token not in cfg.suppress_tokens  # no mask, no padded id
        if cfg.stop:
            tail = max((i + 1 for i, token in enumerate(prompt) if token != MASK), default=0)
            ends = {EOS, *cfg.stop_ids}
            assert not ends & {token for before, token in zip(prompt[:tail], row) if before == MASK}
            if ends & set(row[tail:]):  # after the end there is nothing but separators
                first = next(i for i in range(tail, len(row)) if row[i] in ends)
                n_new -= len(row) - first - 1
                assert set(row[first + 1 :]) <= {EOS} and prompt[:first].count(MASK) >= cfg.min_length
    assert result.n_new == n_new  # tokens after an end do not count
    return result


def in_parts(model, rows, cfg, size):
    """The rows that are written `size` at a time."""
    samples = []
    for i in range(0, len(rows), size):
        samples += written(model, rows[i : i + size], cfg, posterior=True, first_row=i)
    return samples


@settings(max_examples=40, deadline=None)
@given(cases())
def test_nothing_stranded_nothing_forbidden_nothing_changed_and_any_split_the_same(case):
    rows, cfg = case
    result = check(MASKED, rows, cfg)
    for size in {1, 2} - {len(rows)}:
        assert in_parts(MASKED, rows, cfg, size) == result.rows


@settings(max_examples=20, deadline=None)
@given(cases())
def test_the_same_for_uniform_models(case):
    rows, cfg = case
    cfg = cfg._replace(order="ancestral", remask="no", cache="no", block=0, guidance=0)
    assert in_parts(UNIFORM, rows, cfg, 1) == check(UNIFORM, rows, cfg).rows


@settings(max_examples=20, deadline=None)
@given(cases())
def test_the_same_for_ar_models_and_a_cache_changes_nothing(case):
    rows, cfg = case
    rows = [[i for i in row if i != MASK] + [MASK] * row.count(MASK) for row in rows]
    uncached, cached = (check(AR, rows, cfg._replace(cache=cache)).rows for cache in ("no", "prefix"))
    assert uncached == cached == in_parts(AR, rows, cfg._replace(cache="prefix"), 1)


def test_random_numbers_of_some_columns_are_those_of_all():
    canvas = make_canvas([[1, 2, MASK, MASK, 3, MASK], [MASK] * 4], MASK, torch.device("cpu"), first_row=5)
    whole = canvas.uniforms(7, d.TOKEN, 3)
    assert whole.shape == (2, 6, 2) and 0 < whole.min() and len(np.unique(whole)) == whole.size
    for start, stop in ((0, 6), (2, 6), (1, 4), (5, 6)):
        some = canvas.uniforms(7, d.TOKEN, 3, slice(start, stop))
        assert np.array_equal(some[:, start:stop], whole[:, start:stop])
        assert (np.delete(some, np.s_[start:stop], axis=1) == 1).all()
    block = split_into_blocks(canvas, DecodeConfig(block=2))[0]
    assert block.columns == slice(2, 4) and block.is_new[:, 2:4].any() and block.is_new.sum() == 4


SEEDED = (
    (MASKED, DecodeConfig()),
    (MASKED, DecodeConfig(order="threshold", threshold=0.3)),
    (UNIFORM, DecodeConfig(steps=9)),
    (AR, DecodeConfig()),
)


def test_seeds_and_rows_differ():
    for model, cfg in SEEDED:
        samples = [written(model, [[MASK] * 20] * 3, cfg._replace(seed=seed)) for seed in (0, 1)]
        assert len(set(map(tuple, sum(samples, [])))) == 6


# steps, orders, blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ("random", "low_confidence", "entropy", "margin"))
def test_steps_are_spread_evenly_and_over_blocks(order):
    rows = [[MASK] * 20]

    def counts(**settings):
        return unmasked(passes(rows, DecodeConfig(order=order, **settings)))

    assert counts(steps=8) == [[3]] * 4 + [[2]] * 4
    assert counts(steps=4, block=8) == [[4], [4], [8], [4]]  # one for the last, shorter block
    assert counts(steps=99) == [[1]] * 20  # more steps than tokens
    for frame in passes(rows, DecodeConfig(order=order, block=8)):
        is_masked = (frame[0] == MASK).tolist()
        for end in (8, 16):
            assert all(is_masked[end:]) or not any(is_masked[end - 8 : end])


def test_steps_that_unmask_nothing_cost_no_pass():
    counts = unmasked(passes([[MASK] * 20], DecodeConfig(steps=1000)))
    assert all(count[0] for count in counts) and len(counts) <= 20


# one pass over 30 masked positions, and what the network says of them
PROMPTED = [3, 9, 20, 5] + [MASK] * 30 + [8, 1]
PROBABILITIES = MASKED.logits(MASKED(torch.tensor([PROMPTED])))[0, 4:34].double().softmax(-1)
LIKELIEST = PROBABILITIES.amax(-1)


def first_unmasked(cfg):
    """The places that the first pass unmasks."""
    frame = passes([PROMPTED], cfg)[1][0, 4:34]
    places = set(torch.nonzero(frame != MASK)[:, 0].tolist())
    assert cfg.temperature or all(frame[i] == PROBABILITIES[i].argmax() for i in places)
    return places


def test_orders_unmask_what_they_are_named_for():
    p, top = PROBABILITIES, PROBABILITIES.topk(2).values
    confidence = dict(low_confidence=LIKELIEST, entropy=(p * p.log()).sum(-1), margin=top[:, 0] - top[:, 1])
    surest = {order: set(value.topk(3).indices.tolist()) for order, value in confidence.items()}
    assert len(set(map(frozenset, surest.values()))) > 1
    for order, places in surest.items():
        assert first_unmasked(DecodeConfig(order=order, steps=10, temperature=0)) == places


@pytest.mark.parametrize("temperature", (0, 1.0))
def test_the_threshold_and_its_fallback(temperature):
    threshold = float(LIKELIEST.sort().values[-6:-4].mean())  # between the sixth and the fifth
    sure = set(LIKELIEST.topk(5).indices.tolist())
    cfg = DecodeConfig(order="threshold", threshold=threshold, temperature=temperature)
    assert first_unmasked(cfg._replace(fallback="surest")) == sure
    choices = [first_unmasked(cfg._replace(seed=seed)) for seed in range(4)]
    assert all(sure <= places and len(places) <= 6 for places in choices) and len(set.union(*choices)) > 6
    surest = {int(LIKELIEST.argmax())}
    assert first_unmasked(cfg._replace(threshold=1.0, fallback="surest")) == surest


def test_a_threshold_of_one_takes_one_position_per_pass():
    assert unmasked(passes([PROMPTED], DecodeConfig(order="threshold", threshold=1.0))) == [[1]] * 30


def test_ties_are_broken_by_chance_alone():
    """On masks alone every position is equally sure: the first one is any of them, the same in any batch."""
    first = set()
    for seed in range(60):
        cfg = DecodeConfig(order="entropy", seed=seed)
        frame, again = (passes([[MASK] * 10] * 2, cfg)[1] for _ in range(2))
        assert frame.tolist() == again.tolist()
        first.add(int((frame[0] != MASK).nonzero()[0, 0]))
    assert len(first) > 6


def test_confidence_is_ranked_with_ties_in_a_tolerance():
    confidence = torch.tensor([[0.5, 0.500001, 0.9, -torch.inf, 0.500002, -torch.inf]])
    tie = torch.tensor([[0.2, 0.1, 0.9, 0.8, 0.3, 0.7]])
    assert decode.rank_by_confidence(confidence, tie).tolist() == [[2, 1, 0, 4, 5, 3]]


# remasking --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("capped", "rescaled", "confidence"))
def test_remasking_masks_again_and_ends_with_nothing_masked(kind):
    frames = passes([[MASK] * 20] * 4, DecodeConfig(remask=kind, steps=200, eta=0.2))
    again = rewritten = 0
    for a, b in zip(frames, frames[1:]):
        again += int(((a != MASK) & (b == MASK)).sum())
        rewritten += int(((a != MASK) & (b != MASK) & (a != b)).sum())  # masked and written within one pass
    assert again + rewritten > 20 and len(frames) > 41 and (frames[-1] != MASK).all()


class TwoKinds(Denoiser):
    """Even positions are anybody's guess, odd ones certain, whatever the others are."""

    def __init__(self):
        super().__init__("masked")
        self.config.n_vocab, self.config.mask_id = 40, MASK

    def logits(self, hidden):
        return torch.where(hidden > 0, 50.0, 0.0) * (torch.arange(40) == 7)

    def forward(self, z, t=None, documents=None, index=None, positions=None):
        return (index % 2)[:, None].float()


def test_confidence_remasks_tokens_that_were_written_with_least():
    """With probability σ_max·softmax(−ψ) over written positions, ψ their confidence: 1/40 or 1."""
    S, weight = 100, np.exp(-np.array([1 / 40, 1.0] * 6))
    frames = passes([[MASK] * 12] * 400, DecodeConfig(remask="confidence", steps=S), TwoKinds())
    expected, blind, seen = np.zeros(2), np.zeros(2), np.zeros(2)
    for i, (a, b) in enumerate(zip(frames, frames[1:])):
        is_written, is_remasked = (a != MASK).numpy(), ((a != MASK) & (b == MASK)).numpy()
        sigma_max = min(1, (1 - (i + 1) / S) / max(i / S, 1e-9))  # (1 − α_s)/α_t
        share = is_written * weight / np.maximum((is_written * weight).sum(1, keepdims=True), 1e-9)
        equal_share = is_written / np.maximum(is_written.sum(1, keepdims=True), 1)
        for kind in (0, 1):
            expected[kind] += sigma_max * share[:, kind::2].sum()
            blind[kind] += sigma_max * equal_share[:, kind::2].sum()
            seen[kind] += is_remasked[:, kind::2].sum()
    assert len(frames) == S + 1 and (np.abs(seen - expected) < 4 * np.sqrt(expected)).all(), (seen, expected)
    assert (np.abs(seen - blind) > 5 * np.sqrt(expected)).all(), (seen, blind)  # equal chances would be seen


# published algorithms ---------------------------------------------------------------------------------------

PUBLISHED = ((24, 24, 0.0), (8, 24, 0.0), (12, 8, 0.0), (6, 12, 0.7), (24, 4, 2.0))


@pytest.mark.parametrize("steps, block, guidance", PUBLISHED)
def test_at_temperature_0_the_published_algorithm_writes_the_same(steps, block, guidance):
    prompt = torch.randint(0, 40, (3, 10), generator=torch.Generator().manual_seed(0))
    published = sample_as_published(MASKED, prompt, steps, 24, block, guidance=guidance)
    rows = [row + [MASK] * 24 for row in prompt.tolist()]
    cfg = DecodeConfig(order="low_confidence", steps=steps, block=block, temperature=0, guidance=guidance)
    assert written(MASKED, rows, cfg) == published.tolist()


def test_guidance_is_the_formula():
    """Logits un + (w + 1)(cond − un), un with the prompt masked."""
    row, w = [3, 9, MASK, MASK, 5, MASK], 1.3
    z = torch.tensor([row])
    cond, un = (MASKED.logits(MASKED(x)) for x in (z, torch.full_like(z, MASK)))
    expected = (un + (w + 1) * (cond - un)).argmax(-1)[0]
    cfg = DecodeConfig(order="random", steps=1, temperature=0, guidance=w)
    result = decode.generate(MASKED, [row], cfg, EOS, LINEAR)
    assert result.rows[0] == torch.where(z[0] == MASK, expected, z[0]).tolist() and result.n_passes == 2
    assert expected.tolist() != cond.argmax(-1)[0].tolist()


# compiled ---------------------------------------------------------------------------------------------------

COMPILED = (
    (MASKED, DecodeConfig()),
    (MASKED, DecodeConfig(order="low_confidence", block=9, cache="dual")),
    (MASKED, DecodeConfig(order="threshold", threshold=0.3)),
    (MASKED, DecodeConfig(order="low_confidence", block=4, cache="prefix")),
    (MASKED, DecodeConfig(block=8, cache="dual")),
    (UNIFORM, DecodeConfig(steps=6)),
    (AR, DecodeConfig(cache="prefix")),
)


@pytest.mark.slow
@pytest.mark.parametrize("model, cfg", COMPILED)
def test_compiled_passes_write_the_same(model, cfg):
    """And each way compiles two graphs at most (a prompt or a whole canvas, then what follows)."""
    rows = [[1, 2, 3] + [MASK] * 24, [MASK] * 27]
    counter = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counter.clear()
    assert written(model, rows, cfg) == written(model, rows, cfg._replace(compile=True))
    assert not counter["graph_break"] and 1 <= counter["stats"]["unique_graphs"] <= 2, dict(counter["stats"])
