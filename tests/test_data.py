"""Rows of tokens: their order in epochs, on ranks and after resuming; mixtures; documents; what counts."""

import functools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from corpus_examples import (
    EOS,
    TOKENS,
    document_numbers,
    empty,
    flatten,
    one_line,
    pairs,
    quick,
    write_pair,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import diffusion
import train
from corpus import tokenfiles, tokenizers
from model import ModelConfig, Transformer
from training.distributed import SINGLE, Ranks
from training.transfer import to_tensors

# ---------------------------------------------------------------------------------------------------- permute


def permuted(n, seed=0, epoch=0, index=None):
    """`data.permute` of all of [0, n), or of an index, in one epoch."""
    index = np.arange(n) if index is None else np.asarray(index)
    return data.permute(index, n, seed, np.full(len(index), epoch, np.int64))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000) | st.integers(1, 40), st.integers(0, 2**70), st.integers(-1, 2**40))
@example(1, 0, 0)
@example(2, 0, 0)
@example(3, 1, 0)
@example(4, 2, 5)
@example(5, 3, 1)
@example(16, 0, 0)
@example(17, 0, 0)
@example(65, 0, 0)
@example(1025, 0, 0)
@example(4096, 7, 1)
@example(65537, 7, 1)
def test_permute_is_a_bijection(n, seed, epoch):
    assert sorted(permuted(n, seed, epoch).tolist()) == list(range(n))


@quick
@given(st.integers(10**6, 2**50), st.integers(0, 2**64), st.data())
def test_permute_of_a_large_range(n, seed, draw):
    index = np.array(draw.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    places = permuted(n, seed, 3, index)
    assert len(set(places.tolist())) == len(index) and places.min() >= 0 and places.max() < n
    one_by_one = [int(permuted(n, seed, 3, [i])[0]) for i in index]
    assert one_by_one == places.tolist()  # no index sees its neighbours


def chi_square_bound(df, z=5.0):
    """The chi-square quantile at `z` standard deviations (Wilson and Hilferty): p = 3e-7 for z = 5."""
    return df * (1 - 2 / (9 * df) + z * (2 / (9 * df)) ** 0.5) ** 3


def chi_square(values, n):
    """Pearson's statistic of values against the uniform distribution over [0, n)."""
    expected = len(values) / n
    return float(((np.bincount(values, minlength=n) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16, 17, 37, 100])
@pytest.mark.parametrize("key", ["seed", "epoch"])
def test_permute_is_uniform_over_keys(n, key):
    """Over many keys the first element is equally often each; of 17 or more, so are the first two."""
    epochs = np.arange(40_000 if key == "epoch" else 1000)
    seeds = [11] if key == "epoch" else range(40)

    def places(index):
        return np.concatenate([data.permute(np.full_like(epochs, index), n, seed, epochs) for seed in seeds])

    first, second = places(0), places(1)
    assert chi_square(first, n) < chi_square_bound(n - 1)
    if n >= 17:
        pair = first * (n - 1) + second - (second > first)
        assert chi_square(pair, n * (n - 1)) < chi_square_bound(n * (n - 1) - 1)


# -------------------------------------------------------------------------------------------------- sequences


@st.composite
def corpora(draw):
    """(tokens, length, seed): at least one sequence, any remainder."""
    length = draw(st.integers(1, 8))
    n_tokens = 1 + length * draw(st.integers(1, 40)) + draw(st.integers(0, length - 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    return rng.integers(0, 60_000, n_tokens).astype(dtype), length, draw(st.integers(0, 2**40))


def in_files(tokens, seed=0, most=6):
    """The tokens as a Stream over files of random sizes."""
    rng = np.random.default_rng(seed)
    n_cuts = min(len(tokens) - 1, int(rng.integers(0, most)))
    cuts = np.sort(rng.choice(np.arange(1, len(tokens)), n_cuts, replace=False))
    return tokenfiles.Stream(np.split(tokens, cuts))


@quick
@given(corpora(), st.data())
def test_each_epoch_visits_each_sequence_once(corpus, draw):
    tokens, length, seed = corpus
    available = (len(tokens) - 1) // length
    unique = draw.draw(st.just(0) | st.integers(length, available * length))
    sequences = data.Sequences(tokens, length, seed, unique)
    assert sequences.n == (unique // length or available)
    epochs = sequences.ids(np.arange(4 * sequences.n)).reshape(4, sequences.n)
    assert all(sorted(set(epoch)) == sorted(epochs[0]) for epoch in epochs.tolist())
    assert len(set(epochs[0].tolist())) == sequences.n and epochs.min() >= 0 and epochs.max() < available


@quick
@given(corpora(), st.data())
def test_sequences_are_stateless(corpus, draw):
    """Any batch split, any order, any files and a fresh object give the same rows."""
    tokens, length, seed = corpus
    sequences = data.Sequences(tokens, length, seed)
    sample = np.arange(3 * sequences.n)
    rows = sequences.rows(sample)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(sample)), max_size=4)))
    parts = [sequences.rows(part) for part in np.split(sample, cuts)]
    assert np.array_equal(np.concatenate(parts), rows)
    picked = np.array(draw.draw(st.lists(st.integers(0, len(sample) - 1), min_size=1)))
    again = data.Sequences(in_files(tokens, seed), length, seed)
    assert np.array_equal(again.rows(picked), rows[picked])


@quick
@given(corpora())
def test_rows_are_slices_with_the_token_before(corpus):
    tokens, length, seed = corpus
    sequences = data.Sequences(in_files(tokens, seed), length, seed)
    sample = np.arange(2 * sequences.n)
    rows = sequences.rows(sample)
    assert rows.dtype == np.int32 and rows.shape == (len(sample), length + 1)
    for row, i in zip(rows, sequences.ids(sample)):
        assert row.tolist() == tokens[i * length : (i + 1) * length + 1].tolist()
    in_order = sequences.read(np.arange(sequences.available))
    assert in_order[0, 0] == tokens[0]
    assert in_order[:, 1:].ravel().tolist() == tokens[1 : 1 + sequences.available * length].tolist()


def test_order_differs_by_epoch_and_seed():
    tokens = np.arange(1001, dtype=np.uint16)
    orders = [data.Sequences(tokens, 5, seed).ids(np.arange(600)).reshape(3, 200).tolist() for seed in (0, 1)]
    assert len({tuple(epoch) for order in orders for epoch in order}) == 6
    for epoch in orders[0]:  # not merely shifted: neighbours in the file are rarely neighbours in the order
        assert np.mean(np.abs(np.diff(epoch)) == 1) < 0.1


@quick
@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(1, 50))
def test_unique_tokens_nest(seed, a, b):
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    subsets = []
    for n in sorted((a, b)):
        sequences = data.Sequences(tokens, 4, seed, 4 * n)
        subsets.append(set(sequences.ids(np.arange(n)).tolist()))
    assert subsets[0] <= subsets[1] and [len(subset) for subset in subsets] == sorted((a, b))


def test_unique_subset_is_random():
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    samples = np.arange(10)
    subsets = [frozenset(data.Sequences(tokens, 4, seed, 40).ids(samples).tolist()) for seed in range(200)]
    assert len(set(subsets)) == 200
    assert set.union(*map(set, subsets)) == set(range(50))  # (4/5)**200 misses one


@pytest.mark.parametrize("n_tokens, arguments, message", (
    (9, dict(length=9), r"the training split has 8 tokens, fewer than one sequence of 9; .*more text$"),
    (0, dict(length=1), "the training split has 0 tokens, fewer than one sequence of 1"),
    (9, dict(length=9, split="validation"),
     "the validation split has 8 tokens, fewer than one sequence of 9; lower --seq_len, or prepare more text "
     "or a larger share for validation"),
    (2000, dict(length=1024, unique_tokens=2000),
     r"unique_tokens=2,000 must lie between one sequence \(1,024\) and the training split \(1,024 tokens"),
    (9, dict(length=4, unique_tokens=3), "unique_tokens=3 must lie between one sequence"),
    (9, dict(length=4, unique_tokens=9), "unique_tokens=9 must lie between one sequence"),
))
def test_sequences_refuse(n_tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        data.Sequences(np.zeros(n_tokens, np.uint16), **arguments)
    assert data.Sequences(np.zeros(9, np.uint16), 8).n == 1


@pytest.mark.parametrize("code, wrong", [(8, 257), (4, 70000), (5, 2**40), (4, -1), (3, -300), (5, -(2**40))])
def test_tokens_beyond_the_vocabulary(tmp_path, code, wrong):
    write_pair(tmp_path / "web", [[[1, 2, wrong, EOS]], [[3, 4, EOS]]], code)
    stream = tokenfiles.load_corpus(tmp_path, "bytes", 0.3).train
    sequences = data.Sequences(stream, 2, n_vocab=257)
    assert sequences.read(np.array([0])).tolist() == [[EOS, 1, 2]]
    message = rf"the training split holds token (?:{wrong}|\d+), beyond its vocabulary of 257"
    with pytest.raises(ValueError, match=message) as caught:
        sequences.read(np.array([0, 1]))
    if wrong > 0:
        assert f"token {wrong}," in one_line(caught)


# --------------------------------------------------------------------------------- epochs, ranks and resuming


LENGTH = 4
FAR = 10_000  # tokens of different sources differ by this


def source(number, n, unique=0, seed=3):
    """n sequences whose tokens are all different, also from other sources'; `unique` of them are in use."""
    tokens = np.arange(n * LENGTH + 1 + number % LENGTH, dtype=np.int32) + number * FAR
    return data.Sequences(in_files(tokens, n + seed), LENGTH, seed + number, unique * LENGTH)


MIXED = [(7, 0), (13, 5), (1, 0)]  # sequences and unique ones of three sources
WEIGHTED = [3, 1, 1.5]


def mixture(weights=None, seed=5, shapes=MIXED):
    return data.Mixture([source(k, *shape) for k, shape in enumerate(shapes)], weights, seed)


def batches(sequences, steps, first_step=0, first_sample=0, ranks=SINGLE, micro_batch=0, batch_size=8,
            objective="ar"):
    """train.batches of a run with these settings."""
    cfg = train.Config(batch_size=batch_size, seq_len=LENGTH, objective=objective)
    process = diffusion.Process(objective, 2**20, 2**20, LENGTH)
    micro_batch = micro_batch or batch_size // ranks.world
    run = SimpleNamespace(cfg=cfg, ranks=ranks, micro_batch=micro_batch, steps=steps, sequences=sequences,
                          process=process, eos_id=-1)
    return train.batches(run, first_step, first_sample)


def training_samples(sequences, steps, first_step=0, first_sample=0, world=1, batch_size=8, micro_batch=0):
    """The first token of each row that training sees on all ranks, in the order of the samples."""
    tokens = np.full((steps - first_step, batch_size), -1)
    parts = batch_size // (micro_batch or batch_size // world)
    for rank in range(world):
        ranks = Ranks(rank, world)
        feed = batches(sequences, steps, first_step, first_sample, ranks, micro_batch, batch_size)
        for step in range(steps - first_step):
            for part in range(rank, parts, world):
                rows = tokens[step, part::parts]  # a row's place in the step says which noise it gets
                assert (rows == -1).all()
                rows[:] = next(feed).tokens[:, 0]
        assert next(feed, None) is None
    return tokens.ravel()


def tokens_of_an_epoch(sequences):
    """The first token of each sequence that an epoch is to have, by reading them in their order."""
    sources = sequences.sources if isinstance(sequences, data.Mixture) else [sequences]
    rows = np.concatenate([source.read(source.subset(np.arange(source.n))) for source in sources])
    return sorted(rows[:, 0].tolist())


@pytest.mark.parametrize("make", [
    *(functools.partial(source, 0, n) for n in (1, 2, 7, 8, 31)),
    functools.partial(source, 0, 31, 11), functools.partial(source, 0, 97, 5), mixture,
], ids=["1", "2", "7", "8", "31", "11-of-31", "5-of-97", "mixture"])
def test_three_epochs_on_any_ranks(make):
    """Each sequence once per epoch, in one order whatever the ranks and the accumulation."""
    sequences = make()
    expected = tokens_of_an_epoch(sequences)
    assert len(expected) == len(set(expected)) == sequences.n
    steps = -(-3 * sequences.n // 8)
    one = training_samples(sequences, steps)
    for epoch in one[: 3 * sequences.n].reshape(3, sequences.n).tolist():
        assert sorted(epoch) == expected
    for world, micro_batch in ((1, 4), (1, 1), (2, 0), (2, 2), (4, 0), (4, 1)):
        assert np.array_equal(training_samples(make(), steps, world=world, micro_batch=micro_batch), one)


def test_epochs_across_the_ids_computed_ahead():
    """Sequences are looked up for 64 steps at once."""
    sequences = source(0, 401)
    one = training_samples(sequences, 151)
    expected = tokens_of_an_epoch(sequences)
    assert all(sorted(epoch) == expected for epoch in one[: 3 * 401].reshape(3, 401).tolist())
    assert np.array_equal(training_samples(sequences, 151, 70, 560), one[560:])


@pytest.mark.parametrize("weights", [None, WEIGHTED])
def test_resuming_anywhere_continues_the_order(weights):
    one = training_samples(mixture(weights), 12)
    for step in range(12):
        rest = training_samples(mixture(weights), 12, step, 8 * step, world=2)
        assert np.array_equal(rest, one[8 * step :])
        smaller = training_samples(mixture(weights), step + 4, step, 8 * step, batch_size=2)
        assert np.array_equal(smaller, one[8 * step : 8 * step + 8])


def test_all_objectives_see_the_same_sequences():
    """What a diffusion model is to restore are the tokens that an autoregressive one predicts."""
    ar, masked = (next(batches(source(0, 31), 6, 5, 40, objective=name)) for name in ("ar", "masked"))
    tokens = masked.tokens.flatten()
    counts = masked.weights[:, 0] > 0
    places, targets = masked.index[counts], masked.targets[counts]
    assert (tokens[places] == 2**20).all()
    tokens[places] = targets
    assert tokens.tolist() == ar.targets.tolist()


# --------------------------------------------------------------------------------------------------- mixtures


PERIOD = data.Mixture.PERIOD


def by_source(sequences, sample):
    """The source of each sample of a Mixture, and its number there."""
    ids = sequences.ids(sample)
    sources = np.searchsorted(sequences.first, ids, side="right") - 1
    return sources, ids - sequences.first[sources]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(0, 2**62), st.integers(0, 1000))
@example([1, 1, 1], 0, 0)
@example([2, 1], 0, 7)
def test_shares_are_exact_in_every_period(weights, seed, period):
    sequences = data.Mixture([source(k, 3 + k) for k in range(len(weights))], weights, seed)
    sources, _ = by_source(sequences, np.arange(period * PERIOD, (period + 2) * PERIOD))
    for half in sources[:PERIOD], sources[PERIOD:]:
        counts = np.bincount(half, minlength=len(weights))
        assert (np.abs(counts - PERIOD * np.array(weights) / sum(weights)) < 1).all()
    assert not np.array_equal(sources[:PERIOD], sources[PERIOD:])


@pytest.mark.parametrize("weights", [[3, 1, 1.5], [1, 1, 1000]])
def test_each_source_keeps_its_own_order(weights):
    """So the epochs of each source are exact, and its subset is the one it has alone."""
    sequences = mixture(weights, seed=9, shapes=[(301, 0), (1300, 500), (7, 0)])
    assert sequences.n == 301 + 500 + 7 and sequences.available == 301 + 1300 + 7
    sources, number = by_source(sequences, np.arange(5000, 3 * PERIOD))
    earlier = np.bincount(by_source(sequences, np.arange(5000))[0], minlength=3)
    for k, alone in enumerate(sequences.sources):
        own = number[sources == k]
        assert np.array_equal(own, alone.ids(earlier[k] + np.arange(len(own)))) and len(own) > 10

    rows = sequences.rows(np.arange(400))
    places = zip(*by_source(sequences, np.arange(400)))
    expected = [sequences.sources[k].read(np.array([i]))[0] for k, i in places]
    assert rows.dtype == np.int32 and np.array_equal(rows, expected)


@pytest.mark.parametrize("weights", [None, WEIGHTED])
def test_mixtures_are_stateless(weights):
    sample = np.arange(PERIOD - 300, PERIOD + 300)
    rows = mixture(weights, 2**61).rows(sample)
    picked = np.random.default_rng(0).integers(0, 600, 200)
    assert np.array_equal(mixture(weights, 2**61).rows(sample[picked]), rows[picked])
    used, parts = mixture(weights, 2**61), []
    for part in np.array_split(sample, 37)[::-1]:
        parts.insert(0, used.rows(part))
    assert np.array_equal(np.concatenate(parts), rows)
    assert not np.array_equal(mixture(weights, 1).rows(sample), rows)


def test_a_rare_source_takes_all_places_of_a_batch():
    sequences = data.Mixture([source(0, 97), source(1, 5)], [63, 1])
    rare = np.flatnonzero(by_source(sequences, np.arange(8 * PERIOD))[0] == 1)
    assert len(rare) == 8 * PERIOD // 64
    assert chi_square(rare % 64, 64) < chi_square_bound(63)
    assert np.bincount(rare // 64, minlength=8 * PERIOD // 64).max() > 1  # not one in each batch


@pytest.mark.parametrize("weights", [None, [2, 5]])
def test_budgets_nest_within_their_source(weights):
    """And are of no consequence to the other source."""

    def subsets(*unique):
        sequences = data.Mixture([source(k, 40, n) for k, n in enumerate(unique)], weights)
        sources, number = by_source(sequences, np.arange(500))
        return [set(number[sources == k].tolist()) for k in (0, 1)]

    few, more, uneven = subsets(5, 8), subsets(15, 31), subsets(5, 31)
    assert [len(subset) for subset in (*few, *more)] == [5, 8, 15, 31]
    assert few[0] < more[0] and few[1] < more[1] and uneven == [few[0], more[1]]


def test_mixture_refuses_a_weight_of_no_sample():
    with pytest.raises(ValueError, match=f"a weight below 1/{PERIOD} of their sum is too small"):
        data.Mixture([source(0, 3), source(1, 3)], [1e-6, 1])


# -------------------------------------------------------------------------------------------------- documents


def renumbered(numbers):
    """Numbers replaced by their ranks: which tokens are in one document, and no more."""
    ranks = {number: rank for rank, number in enumerate(sorted(set(numbers)))}
    return [ranks[number] for number in numbers]


def slow_documents(tokens, owner, first, length, causal):
    """Documents of what a network reads of the sequence after token `first`; owner: each token's, or None."""
    if owner is None:
        owner = [tokens[:i].count(EOS) for i in range(len(tokens))]  # an eos is in the document that it ends
    if not causal:
        return owner[first + 1 : first + 1 + length]
    places = range(first, first + length)
    return [owner[place + 1] if tokens[place] == EOS else owner[place] for place in places]


def check_documents(sequences, tokens, owner):
    ids, length = np.arange(sequences.available)[::-1], sequences.length
    for causal in (False, True):
        documents = sequences.documents(ids, sequences.read(ids), EOS, causal)
        assert documents.dtype == np.int32 and documents.shape == (len(ids), length)
        assert (np.diff(documents) >= 0).all()
        for i, row in zip(ids.tolist(), documents.tolist()):
            expected = slow_documents(tokens, owner, i * length, length, causal)
            assert renumbered(row) == renumbered(expected), (i, causal)


@settings(max_examples=80, deadline=None)
@given(TOKENS.filter(lambda tokens: len(tokens) > 1), st.data())
def test_documents_that_eos_ends(tokens, draw):
    length = draw.draw(st.integers(1, len(tokens) - 1))
    stream = in_files(np.array(tokens, np.uint16), len(tokens))
    check_documents(data.Sequences(stream, length), tokens, None)


@settings(max_examples=80, deadline=None)
@given(pairs(), st.data(), st.floats(0.01, 0.5))
def test_documents_that_files_list(scratch, contents, draw, share):
    folder = empty(scratch / "listed")
    for number, documents in enumerate(contents):
        write_pair(folder / f"web_{number}", documents, 4)
    write_pair(folder / "val", [[[1]]], 4)
    tokens, owner = flatten(sum(contents, [])), document_numbers(sum(contents, []))
    if tokens[0] != EOS:
        tokens, owner = [EOS, *tokens], [0, *owner]
    if len(tokens) < 2:
        return
    length = draw.draw(st.integers(1, len(tokens) - 1))
    stream = tokenfiles.load_corpus(folder, "bytes").train
    check_documents(data.Sequences(stream, length), tokens, owner)
    cut = int(len(tokens) * (1 - share))
    if len(tokens) - cut > length:  # what was cut off counts from another place
        check_documents(data.Sequences(stream.split_at(cut)[1], length), tokens[cut:], owner[cut:])


def test_documents_of_a_mixture_are_those_of_its_sources(tmp_path):
    """One lists its documents, the other has eos tokens."""
    write_pair(tmp_path / "web", [[[1, 2, 3]], [[4, 5]], [[6, 7, 8, 9, EOS]], [[10, 11]]], 4)
    listed = tokenfiles.open_token_files([tmp_path / "web.bin"], tokenizers.ByteTokenizer()).stream
    ended = np.array([EOS, 1, EOS, 2, 3, EOS, EOS, 4, 5], np.uint16)
    sources = [data.Sequences(listed, 4), data.Sequences(ended, 4)]
    sequences, ids = data.Mixture(sources), np.array([4, 0, 3, 2, 1, 0])
    for causal in (False, True):
        documents = sequences.documents(ids, sequences.read(ids), EOS, causal)
        for row, i in zip(documents, ids):
            k = int(i >= sources[0].available)
            own = np.array([i - k * sources[0].available])
            expected = sources[k].documents(own, sources[k].read(own), EOS, causal)
            assert row.tolist() == expected[0].tolist()
    assert len({len(set(row)) for row in documents.tolist()}) > 1


@quick
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_positions_within(steps):
    documents = np.cumsum(np.array(steps) // 2, axis=1, dtype=np.int32) + 5
    positions = data.positions_within(documents)
    assert positions.dtype == np.int32
    for row, numbers in zip(positions.tolist(), documents.tolist()):
        assert row == [place - numbers.index(number) for place, number in enumerate(numbers)]


# --------------------------------------------------------------------------------------- rows for the network


# two sequences of 16 tokens, and what stands before and between them
PACKED = [[EOS, 1, 2, 3, EOS, 4, 5, 6, 7, 8, 9, EOS, 10, EOS, 11, 12, 13],
          [EOS] + [14] * 9 + [EOS, 15, 16, 17, EOS, EOS, 18]]


def packed_batch(objective, eligible=None, **settings):
    """The two packed rows as a batch of arrays, as train.py reads them."""
    counts = None if eligible is None else eligible.sum(1)
    process = diffusion.Process(objective, 257, 257, 16)
    sequences = data.Sequences(np.array(sum(PACKED, []), np.uint16), 16)
    levels = diffusion.noise_levels(process, 0, 2, n_eligible=counts)
    cfg = train.Config(objective=objective, seq_len=16, **settings)
    rows = np.arange(2)
    return data.read_batch(cfg, EOS, process, sequences, rows, levels, rows, eligible)


KINDS = ("whole rows", "short rows", "rows with holes")
ELIGIBLE = [None, np.arange(16) < np.array([[9], [2]]), np.arange(16) % 5 != np.array([[1], [3]])]


@pytest.mark.parametrize("objective", ["ar", "masked", "uniform"])
@pytest.mark.parametrize("eligible, n_documents", ((ELIGIBLE[0], 7), (ELIGIBLE[1], 4)), ids=KINDS[:2])
def test_a_packed_document_is_read_as_if_alone(objective, eligible, n_documents):
    """With document_attention a document has the hidden states that it has alone: positions are relative."""
    model = exact_network(objective)

    def batch(**settings):
        return to_tensors(packed_batch(objective, eligible, **settings))

    plain, packed = batch(), batch(document_attention=True)
    reset = batch(document_attention=True, reset_positions=True)
    assert torch.equal(packed.tokens, reset.tokens) and torch.equal(packed.documents, reset.documents)
    assert packed.positions is None and (reset.positions != torch.arange(16)).any()

    time = None if packed.time is None else packed.time.double()
    with torch.no_grad(), mock.patch.object(torch.Tensor, "float", lambda x: x):  # float64 throughout
        hidden = model(packed.tokens, time, packed.documents)
        from_start = model(reset.tokens, time, reset.documents, None, reset.positions)
        counts = packed.documents >= 0  # nobody reads what comes of padding
        torch.testing.assert_close(from_start[counts], hidden[counts], rtol=0, atol=1e-10)
        assert (model(plain.tokens, time, plain.documents) - hidden).abs().max() > 1e-2
        documents = [(row, number) for row in range(2) for number in packed.documents[row].unique().tolist()]
        for row, number in documents:
            inside = packed.documents[row] == number
            alone = model(packed.tokens[row, inside][None], None if time is None else time[row, None])
            torch.testing.assert_close(hidden[row, inside], alone[0], rtol=0, atol=1e-10)
            if number >= 0:  # a short row's end is a document of its own
                assert reset.positions[row, inside].tolist() == list(range(int(inside.sum())))
    assert len(documents) >= n_documents


def exact_network(objective):
    """A network in float64 whose attention is far from uniform."""
    torch.manual_seed(0)
    config = ModelConfig(2, 2, 1, 16, 32, 64, 257, 257, 16, objective == "ar", timed=objective == "uniform")
    model = Transformer(config).init_weights().double().eval()
    angle = torch.arange(16.0).double()[:, None] * 10_000 ** (-torch.arange(0, 16, 2).double() / 16)
    torch.testing.assert_close(model.cos, angle.cos(), rtol=0, atol=1e-6)
    model.cos, model.sin = angle.cos(), angle.sin()
    for p in model.parameters():
        p.data = p.data * 5
    return model


@pytest.mark.parametrize("document_attention", (False, True))
@pytest.mark.parametrize("eligible", ELIGIBLE, ids=KINDS)
def test_what_does_not_count_is_padding(eligible, document_attention):
    """A document of its own, −1, which no other attends to; a causal network gets none: it never sees it."""
    settings = dict(document_attention=document_attention)
    plain = packed_batch("masked", **settings).documents
    batch = packed_batch("masked", eligible, **settings)
    if eligible is None:
        assert (plain is None) == (not document_attention)
        return
    assert (batch.documents == -1).tolist() == (~eligible).tolist()
    expected = plain if document_attention else np.zeros((2, 16))
    assert (batch.documents == expected)[eligible].all()
    causal = packed_batch("ar", eligible, **settings)
    assert (causal.documents is None) == (not document_attention)
    assert (causal.weights.reshape(2, 16) > 0).tolist() == eligible.tolist()
