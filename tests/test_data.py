"""Rows of tokens: epochs, mixtures, documents, and training on corpora of every layout."""

import functools
import json
import re
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import prepared
from corpus_examples import (
    EOS,
    TOKENS,
    byte_documents,
    document_numbers,
    empty,
    flatten,
    needs_gpt2,
    one_line,
    pairs,
    quick,
    stories,
    write_jsonl,
    write_nanogpt,
    write_pair,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import diffusion
import train
from corpus import tokenfiles, tokenizers
from model import ModelConfig, Transformer
from training import transfer
from training.log import read_metrics


@pytest.mark.parametrize("code, wrong", [(8, 257), (4, 70000), (5, 2**40), (4, -1), (3, -300), (5, -(2**40))])
def test_tokens_beyond_the_vocabulary(tmp_path, code, wrong):
    write_pair(tmp_path / "web", [[[1, 2, wrong, EOS]], [[3, 4, EOS]]], code)
    read = tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
    blocks = data.Sequences(read.train, 2, n_vocab=257)
    assert blocks.read(np.array([0])).tolist() == [[EOS, 1, 2]]
    with pytest.raises(ValueError, match=rf"the training split holds token (?:{wrong}|\d+), beyond its vocabulary of 257") as caught:
        blocks.read(np.array([0, 1]))
    if wrong > 0:
        assert f"token {wrong}," in one_line(caught)


# ------------------------------------------------------------------------------------------------- permute


def permuted(n, seed=0, epoch=0, index=None):
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
    every = permuted(n, seed, 3, index)
    assert len(set(every.tolist())) == len(index) and every.min() >= 0 and every.max() < n
    assert [int(permuted(n, seed, 3, [i])[0]) for i in index] == every.tolist()  # no index sees its neighbours


def chi_square_bound(df, z=5.0):
    """The chi-square quantile at `z` standard deviations (Wilson and Hilferty): p = 3e-7 for z = 5."""
    return df * (1 - 2 / (9 * df) + z * (2 / (9 * df)) ** 0.5) ** 3


def chi_square(values, n):
    expected = len(values) / n
    return float(((np.bincount(values, minlength=n) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16, 17, 37, 100])
@pytest.mark.parametrize("vary", ["seed", "epoch"])
def test_permute_is_uniform_over_keys(n, vary):
    """Over many keys, the first element is equally often each; of 17 or more, so is the pair of the first two."""
    epochs = np.arange(40_000 if vary == "epoch" else 1000)
    seeds = [11] if vary == "epoch" else range(40)
    first, second = (np.concatenate([data.permute(np.full_like(epochs, i), n, s, epochs) for s in seeds])
                     for i in (0, 1))
    assert chi_square(first, n) < chi_square_bound(n - 1)
    if n >= 17:
        pair = first * (n - 1) + second - (second > first)
        assert chi_square(pair, n * (n - 1)) < chi_square_bound(n * (n - 1) - 1)


# -------------------------------------------------------------------------------------------------- blocks


@st.composite
def corpora(draw):
    """(tokens, length, seed): at least one block, any remainder."""
    length = draw(st.integers(1, 8))
    n_tokens = 1 + length * draw(st.integers(1, 40)) + draw(st.integers(0, length - 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    return rng.integers(0, 60_000, n_tokens).astype(dtype), length, draw(st.integers(0, 2**40))


def in_files(tokens, seed=0, most=6):
    """The tokens as a Stream over files of random sizes."""
    random = np.random.default_rng(seed)
    cuts = np.sort(random.choice(np.arange(1, len(tokens)), min(len(tokens) - 1, int(random.integers(0, most))), replace=False))
    return tokenfiles.Stream(np.split(tokens, cuts))


@quick
@given(corpora(), st.data())
def test_each_epoch_visits_each_block_once(made, draw):
    tokens, length, seed = made
    available = (len(tokens) - 1) // length
    unique = draw.draw(st.just(0) | st.integers(length, available * length))
    blocks = data.Sequences(tokens, length, seed, unique)
    assert blocks.n == (unique // length or available)
    epochs = blocks.ids(np.arange(4 * blocks.n)).reshape(4, blocks.n)
    assert all(sorted(set(epoch)) == sorted(epochs[0]) for epoch in epochs.tolist())
    assert len(set(epochs[0].tolist())) == blocks.n and epochs.min() >= 0 and epochs.max() < available


@quick
@given(corpora(), st.data())
def test_blocks_are_stateless(made, draw):
    """Any batch split, any order, any files and a fresh object give the same rows."""
    tokens, length, seed = made
    blocks = data.Sequences(tokens, length, seed)
    sample = np.arange(3 * blocks.n)
    every = blocks.rows(sample)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(sample)), max_size=4)))
    assert np.array_equal(np.concatenate([blocks.rows(part) for part in np.split(sample, cuts)]), every)
    some = np.array(draw.draw(st.lists(st.integers(0, len(sample) - 1), min_size=1)))
    assert np.array_equal(data.Sequences(in_files(tokens, seed), length, seed).rows(some), every[some])


@quick
@given(corpora())
def test_rows_are_slices_with_the_token_before(made):
    tokens, length, seed = made
    blocks = data.Sequences(in_files(tokens, seed), length, seed)
    sample = np.arange(2 * blocks.n)
    rows = blocks.rows(sample)
    assert rows.dtype == np.int32 and rows.shape == (len(sample), length + 1)
    for row, b in zip(rows, blocks.ids(sample)):
        assert row.tolist() == tokens[b * length : (b + 1) * length + 1].tolist()
    every = blocks.read(np.arange(blocks.available))
    assert every[0, 0] == tokens[0]
    assert every[:, 1:].ravel().tolist() == tokens[1 : 1 + blocks.available * length].tolist()


def test_order_differs_by_epoch_and_seed():
    tokens = np.arange(1001, dtype=np.uint16)
    orders = [data.Sequences(tokens, 5, seed).ids(np.arange(600)).reshape(3, 200).tolist() for seed in (0, 1)]
    assert len({tuple(epoch) for order in orders for epoch in order}) == 6
    for epoch in orders[0]:  # not merely shifted: neighbours in the file are rarely neighbours in the stream
        assert np.mean(np.abs(np.diff(epoch)) == 1) < 0.1


@quick
@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(1, 50))
def test_unique_tokens_nest(seed, a, b):
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    few, many = (data.Sequences(tokens, 4, seed, 4 * n) for n in sorted((a, b)))
    chosen = [set(blocks.ids(np.arange(blocks.n)).tolist()) for blocks in (few, many)]
    assert chosen[0] <= chosen[1] and [len(c) for c in chosen] == sorted((a, b))


def test_unique_subset_is_random():
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    subsets = [frozenset(data.Sequences(tokens, 4, seed, 40).ids(np.arange(10)).tolist()) for seed in range(200)]
    assert len(set(subsets)) == 200 and set.union(*map(set, subsets)) == set(range(50))  # (4/5)**200 misses one


def test_blocks_refuse():
    tokens = np.zeros(9, np.uint16)
    assert data.Sequences(tokens, 8).n == 1
    with pytest.raises(ValueError, match="the training split has 8 tokens, fewer than one block of 9"):
        data.Sequences(tokens, 9)
    with pytest.raises(ValueError, match="fewer than one block"):
        data.Sequences(tokens[:0], 1)
    with pytest.raises(ValueError, match="the validation split has 8 tokens, fewer than one block of 9; lower --seq_len, or prepare more text or a larger share for validation"):
        data.Sequences(tokens, 9, what="validation")
    with pytest.raises(ValueError, match=r"unique_tokens=2,000 must lie between one block \(1,024\) and the training split \(1,024 tokens"):
        data.Sequences(np.zeros(2000, np.uint16), 1024, 0, 2000)
    for unique in (3, 9):
        with pytest.raises(ValueError, match=f"unique_tokens={unique} must lie between one block"):
            data.Sequences(tokens, 4, 0, unique)


# --------------------------------------------------------------------------------- epochs, ranks and resuming


LENGTH = 4
FAR = 10_000  # tokens of different sources differ by this


def source(number, n_blocks, unique=0, seed=3):
    """Blocks whose tokens are all different, from those of other sources too."""
    tokens = np.arange(n_blocks * LENGTH + 1 + number % LENGTH, dtype=np.int32) + number * FAR
    return data.Sequences(in_files(tokens, n_blocks + seed), LENGTH, seed + number, unique * LENGTH)


def training_samples(blocks, steps, first_step=0, first_sample=0, world=1, batch_size=8, micro=0, objective="ar"):
    """The first token of each row that training sees, in the order of the samples, from all ranks' batches."""
    cfg = train.Config(batch_size=batch_size, micro_batch=micro, seq_len=LENGTH, objective=objective)
    process = diffusion.Process(objective, 2**20, 2**20, LENGTH)
    seen = np.full((steps - first_step, batch_size), -1)
    parts = batch_size // (micro or batch_size // world)
    for rank in range(world):
        batches = train.training_batches(process, blocks, -1, first_sample, first_step, steps, cfg, rank, world, False)
        for step in range(steps - first_step):
            for part in range(rank, parts, world):
                rows = seen[step, part::parts]  # a row's place in the step says which noise it gets
                assert (rows == -1).all()
                rows[:] = next(batches).tokens[:, 0]
        assert next(batches, None) is None
    return seen.ravel()


def every_block(blocks):
    """The first token of each of the blocks that an epoch is to have, by reading them in their order."""
    sources = blocks.sources if isinstance(blocks, data.Mixture) else [blocks]
    return sorted(token for s in sources for token in s.read(s.chosen(np.arange(s.n)))[:, 0].tolist())


MIXED = [(7, 0), (13, 5), (1, 0)]  # blocks and unique blocks of three sources


@pytest.mark.parametrize("make", [
    *(functools.partial(source, 0, n) for n in (1, 2, 7, 8, 31)), functools.partial(source, 0, 31, 11), functools.partial(source, 0, 97, 5),
    lambda: data.Mixture([source(k, n, unique) for k, (n, unique) in enumerate(MIXED)], seed=5),
], ids=["1", "2", "7", "8", "31", "11-of-31", "5-of-97", "mixture"])
def test_three_epochs_on_any_ranks(make):
    """Each block once per epoch, in one sequence whatever the ranks and the accumulation."""
    blocks = make()
    expected = every_block(blocks)
    assert len(expected) == len(set(expected)) == blocks.n
    steps = -(-3 * blocks.n // 8)
    one = training_samples(blocks, steps)
    for epoch in one[: 3 * blocks.n].reshape(3, blocks.n).tolist():
        assert sorted(epoch) == expected
    for world, micro in ((1, 4), (1, 1), (2, 0), (2, 2), (4, 0), (4, 1)):
        assert np.array_equal(training_samples(make(), steps, world=world, micro=micro), one)


def test_epochs_across_the_ids_computed_ahead():
    """Block ids are computed for 64 steps at once."""
    blocks = source(0, 401)
    one = training_samples(blocks, 151)
    assert all(sorted(epoch) == every_block(blocks) for epoch in one[: 3 * 401].reshape(3, 401).tolist())
    assert np.array_equal(training_samples(blocks, 151, 70, 560), one[560:])


WEIGHTED = [3, 1, 1.5]


@pytest.mark.parametrize("weights", [None, WEIGHTED])
def test_resuming_anywhere_continues_the_sequence(weights):
    def make():
        return data.Mixture([source(k, n, unique) for k, (n, unique) in enumerate(MIXED)], weights, seed=5)

    one = training_samples(make(), 12)
    for step in range(12):
        assert np.array_equal(training_samples(make(), 12, step, 8 * step, world=2), one[8 * step :])
        smaller = training_samples(make(), step + 4, step, 8 * step, batch_size=2)
        assert np.array_equal(smaller, one[8 * step : 8 * step + 8])


def test_all_objectives_see_the_same_blocks():
    """What a diffusion model is to restore are the tokens that an autoregressive one predicts."""
    blocks = source(0, 31)
    cfg = train.Config(batch_size=8, seq_len=LENGTH)
    ar, masked = (next(train.training_batches(diffusion.Process(objective, 2**20, 2**20, LENGTH), blocks, -1, 40, 5, 6, cfg, 0, 1, False))
                  for objective in ("ar", "masked"))
    read = masked.tokens.flatten().tolist()
    for place, target in zip(masked.index[masked.weights[:, 0] > 0].tolist(), masked.targets[masked.weights[:, 0] > 0].tolist()):
        assert read[place] == 2**20
        read[place] = target
    assert read == ar.targets.tolist()


# ------------------------------------------------------------------------------------------------- mixtures


PERIOD = data.Mixture.PERIOD


def of_source(blocks, ids):
    """The source of each block of a Mixture, and its number there."""
    which = np.searchsorted(blocks.first, ids, side="right") - 1
    return which, ids - blocks.first[which]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(0, 2**62), st.integers(0, 1000))
@example([1, 1, 1], 0, 0)
@example([2, 1], 0, 7)
def test_shares_are_exact_in_every_period(weights, seed, period):
    blocks = data.Mixture([source(k, 3 + k) for k in range(len(weights))], weights, seed)
    which, _ = of_source(blocks, blocks.ids(np.arange(period * PERIOD, (period + 2) * PERIOD)))
    for half in which[:PERIOD], which[PERIOD:]:
        counts = np.bincount(half, minlength=len(weights))
        assert (np.abs(counts - PERIOD * np.array(weights) / sum(weights)) < 1).all()
    assert not np.array_equal(which[:PERIOD], which[PERIOD:])


@pytest.mark.parametrize("weights", [[3, 1, 1.5], [1, 1, 1000]])
def test_each_source_keeps_its_own_order(weights):
    """So the epochs of each source are exact, and its subset is the one it has alone."""
    sources = [source(k, n, unique) for k, (n, unique) in enumerate([(301, 0), (1300, 500), (7, 0)])]
    blocks = data.Mixture(sources, weights, seed=9)
    assert blocks.n == 301 + 500 + 7 and blocks.available == 301 + 1300 + 7
    which, number = of_source(blocks, blocks.ids(np.arange(5000, 3 * PERIOD)))
    earlier = np.bincount(of_source(blocks, blocks.ids(np.arange(5000)))[0], minlength=3)
    for k, s in enumerate(sources):
        mine = number[which == k]
        assert np.array_equal(mine, s.ids(earlier[k] + np.arange(len(mine)))) and len(mine) > 10
    rows = blocks.rows(np.arange(400))
    which, number = of_source(blocks, blocks.ids(np.arange(400)))
    assert rows.dtype == np.int32 and rows.tolist() == [sources[k].read(np.array([i]))[0].tolist() for k, i in zip(which, number)]


@pytest.mark.parametrize("weights", [None, WEIGHTED])
def test_mixtures_are_stateless(weights):
    def make():
        return data.Mixture([source(k, n, unique) for k, (n, unique) in enumerate(MIXED)], weights, seed=2**61)

    sample = np.arange(PERIOD - 300, PERIOD + 300)
    every = make().rows(sample)
    some = np.random.default_rng(0).integers(0, 600, 200)
    assert np.array_equal(make().rows(sample[some]), every[some])
    used = make()
    assert np.array_equal(np.concatenate([used.rows(part) for part in np.array_split(sample, 37)[::-1]][::-1]), every)
    assert not np.array_equal(data.Mixture([source(k, n) for k, n in enumerate((7, 13, 1))], weights, seed=1).rows(sample), every)


def test_a_rare_source_takes_all_places_of_a_batch():
    blocks = data.Mixture([source(0, 97), source(1, 5)], [63, 1])
    rare = np.flatnonzero(of_source(blocks, blocks.ids(np.arange(8 * PERIOD)))[0] == 1)
    assert len(rare) == 8 * PERIOD // 64
    assert chi_square(rare % 64, 64) < chi_square_bound(63)
    assert np.bincount(rare // 64, minlength=8 * PERIOD // 64).max() > 1  # not one in each batch


@pytest.mark.parametrize("weights", [None, [2, 5]])
def test_budgets_nest_within_their_source(weights):
    def chosen(*unique):
        blocks = data.Mixture([source(k, 40, n) for k, n in enumerate(unique)], weights)
        return [set(number[which == k].tolist()) for which, number in [of_source(blocks, blocks.ids(np.arange(500)))] for k in (0, 1)]

    few, more, uneven = chosen(5, 8), chosen(15, 31), chosen(5, 31)
    assert [len(c) for c in (*few, *more)] == [5, 8, 15, 31]
    assert few[0] < more[0] and few[1] < more[1] and uneven == [few[0], more[1]]  # of no consequence to the other source


def test_mixture_refuses_a_weight_of_no_sample():
    with pytest.raises(ValueError, match=f"a weight below 1/{PERIOD} of their sum is too small"):
        data.Mixture([source(0, 3), source(1, 3)], [1e-6, 1])


# ------------------------------------------------------------------------------------------------ documents


def document_ids(tokens, owner, first, length, causal):
    """Of what a network reads of one block, slowly. owner: each token's document where files list them, else None."""
    if owner is None:
        owner = [tokens[:i].count(EOS) for i in range(len(tokens))]  # an eos is in the document that it ends
    places = range(first, first + length) if causal else range(first + 1, first + 1 + length)
    ids = [owner[p + 1] if causal and tokens[p] == EOS else owner[p] for p in places]
    return [sorted(set(ids)).index(i) for i in ids]


def check_documents(blocks, tokens, owner, length):
    index = np.arange(blocks.available)[::-1]
    for causal in (False, True):
        found = blocks.documents(index, blocks.read(index), EOS, causal)
        assert found.dtype == np.int32 and found.shape == (len(index), length) and (np.diff(found) >= 0).all()
        for b, row in zip(index, found.tolist()):
            assert [sorted(set(row)).index(i) for i in row] == document_ids(tokens, owner, b * length, length, causal), (b, causal)


@settings(max_examples=80, deadline=None)
@given(TOKENS.filter(lambda tokens: len(tokens) > 1), st.data())
def test_documents_that_eos_ends(tokens, draw):
    length = draw.draw(st.integers(1, len(tokens) - 1))
    check_documents(data.Sequences(in_files(np.array(tokens, np.uint16), len(tokens)), length), tokens, None, length)


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
    if len(tokens) > 1:
        length = draw.draw(st.integers(1, len(tokens) - 1))
        stream = tokenfiles.load_corpus(folder, "bytes").train
        check_documents(data.Sequences(stream, length), tokens, owner, length)
        at = int(len(tokens) * (1 - share))
        if len(tokens) - at > length:  # what was cut off counts from another place
            check_documents(data.Sequences(stream.cut(at)[1], length), tokens[at:], owner[at:], length)


def test_documents_of_a_mixture_are_those_of_its_sources(tmp_path):
    """One lists its documents, the other has eos tokens."""
    write_pair(tmp_path / "web", [[[1, 2, 3]], [[4, 5]], [[6, 7, 8, 9, EOS]], [[10, 11]]], 4)
    _, listed, _ = tokenfiles.open_foreign([tmp_path / "web.bin"], tokenizers.Bytes())
    sources = [data.Sequences(listed, 4), data.Sequences(np.array([EOS, 1, EOS, 2, 3, EOS, EOS, 4, 5], np.uint16), 4)]
    blocks = data.Mixture(sources)
    index = np.array([4, 0, 3, 2, 1, 0])
    for causal in (False, True):
        found = blocks.documents(index, blocks.read(index), EOS, causal)
        for row, i in zip(found, index):
            s, number = (sources[0], i) if i < sources[0].available else (sources[1], i - sources[0].available)
            number = np.array([number])
            assert row.tolist() == s.documents(number, s.read(number), EOS, causal)[0].tolist()
    assert len({len(set(row)) for row in found.tolist()}) > 1


@quick
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_positions_within(steps):
    documents = np.cumsum(np.array(steps) // 2, axis=1, dtype=np.int32) + 5
    found = data.positions_within(documents)
    assert found.dtype == np.int32
    for row, ids in zip(found.tolist(), documents.tolist()):
        assert row == [i - ids.index(d) for i, d in enumerate(ids)]


PACKED = [[EOS, 1, 2, 3, EOS, 4, 5, 6, 7, 8, 9, EOS, 10, EOS, 11, 12, 13], [EOS] + [14] * 9 + [EOS, 15, 16, 17, EOS, EOS, 18]]


@pytest.mark.parametrize("objective", ["ar", "masked", "uniform"])
@pytest.mark.parametrize("short", [0.0, 1.0])
def test_a_packed_document_is_read_as_if_alone(objective, short):
    """With document_attention the hidden states of each document are those it has alone; positions are relative."""
    torch.manual_seed(0)
    shape = ModelConfig(2, 2, 1, 16, 32, 64, 257, 257, 16, objective == "ar", timed=objective == "uniform")
    model = Transformer(shape).init_weights().double().eval()
    angle = torch.arange(16.0).double()[:, None] * 10_000 ** (-torch.arange(0, 16, 2).double() / 16)
    torch.testing.assert_close(model.cos, angle.cos(), rtol=0, atol=1e-6)
    model.cos, model.sin = angle.cos(), angle.sin()
    for p in model.parameters():
        p.data = p.data * 5  # so that attention is not nearly uniform
    process = diffusion.Process(objective, 257, 257, 16, short_rows=short)
    blocks, rows = data.Sequences(np.array(sum(PACKED, []), np.uint16), 16), diffusion.noise_levels(process, 0, 2)

    def batch(**flags):
        cfg = train.Config(objective=objective, seq_len=16, **flags)
        return transfer.to_tensors(data.read_batch(cfg, process, blocks, EOS, np.array([0, 1]), rows, np.arange(2)), False)

    plain, packed, reset = batch(), batch(document_attention=True), batch(document_attention=True, reset_positions=True)
    time = None if packed.time is None else packed.time.double()
    assert torch.equal(packed.tokens, reset.tokens) and torch.equal(packed.documents, reset.documents) and packed.positions is None
    with torch.no_grad(), mock.patch.object(torch.Tensor, "float", lambda x: x):  # float64 throughout
        hidden = model(packed.tokens, time, packed.documents)
        torch.testing.assert_close(model(reset.tokens, time, reset.documents, None, reset.positions), hidden, rtol=0, atol=1e-10)
        assert (model(plain.tokens, time, plain.documents) - hidden).abs().max() > 1e-2
        n_documents = 0
        for row in range(2):
            ids = packed.documents[row]
            for d in ids.unique():
                inside = ids == d
                alone = model(packed.tokens[row, inside][None], None if time is None else time[row, None])
                torch.testing.assert_close(hidden[row, inside], alone[0], rtol=0, atol=1e-10)
                if d >= 0:  # a short row's end is a document of its own
                    assert reset.positions[row, inside].tolist() == list(range(int(inside.sum())))
                n_documents += 1
        assert n_documents >= (7 if short == 0 else 4) and (reset.positions != torch.arange(16)).any()


# -------------------------------------------------------------------------------------------- train.py, end to end


def last_loss(run):
    return [m["val_loss"] for m in read_metrics(run) if "val_loss" in m][-1]


@needs_gpt2
def test_training_on_a_nanogpt_folder(run_main, gpt2, tmp_path):  # noqa: F811
    (tmp_path / "owt").mkdir()
    for name, part in (("train", stories(60)), ("val", stories(30, 60))):
        write_nanogpt(tmp_path / "owt" / f"{name}.bin", [token for text in part for token in [*gpt2.encode(text).tolist(), gpt2.eos_id]])
    run = run_main(f"--corpus={tmp_path / 'owt'}", "--tokenizer=gpt2", "--steps=3", "--seq_len=16", "--eval_rows=8")
    assert 5 < last_loss(run) < 14
    record = json.loads((run / "step_00000003" / "checkpoint.json").read_text())
    assert record["corpus"]["tokenizer"] == "gpt2" and record["model"]["n_vocab"] == 50257


def test_training_on_a_megatron_prefix(run_main, tmp_path):  # noqa: F811
    write_pair(tmp_path / "web_text_document", [[d + [EOS]] for d in byte_documents(80)], 4)
    files = (f"--corpus={tmp_path / 'web_text_document'}", "--tokenizer=bytes", "--val_share=0.2", "--eval_rows=8")
    flags = (*files, "--steps=3", "--lr=0.01")
    results = [last_loss(run_main(*flags, *more, run=f"run{i}")) for i, more in enumerate(
        ([], ["--document_attention"], ["--document_attention", "--reset_positions"]))]
    assert results[1] == pytest.approx(results[2], abs=1e-4) and abs(results[0] - results[1]) > 1e-3
    run_main(*files, "--steps=5", "--resume=yes", run="run0")
    write_pair(tmp_path / "web_text_document", [[d + [EOS]] for d in byte_documents(80)[::-1]], 4)
    with pytest.raises(SystemExit):  # other tokens
        run_main(*files, "--steps=7", "--resume=yes", run="run0")


def test_training_on_a_mixture_with_budgets(run_main, small_corpus, sharded_corpus, capsys):  # noqa: F811
    mixed = f"--corpus={sharded_corpus}:3:640,{small_corpus}:1:160"
    run = run_main(mixed, "--epochs=1", "--document_attention", "--reset_positions")
    assert "4 steps of 256 tokens: 1,024 tokens, 1.28 epochs of 800" in capsys.readouterr().out  # 25 blocks in batches of 8
    record = json.loads((run / "step_00000004" / "checkpoint.json").read_text())
    expected = " ".join(json.loads((folder / "meta.json").read_text())["train"]["sha256"] for folder in (sharded_corpus, small_corpus))
    assert record["corpus"]["train_sha256"] == expected
    run_main(f"--corpus={sharded_corpus}:1:640,{small_corpus}:1:160", "--steps=5", "--resume=yes")
    assert "resumed with another mixture: the data order changes here" in capsys.readouterr().err


def test_training_with_a_tokenizer_file(run_main, bpe_file, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Sampling needs the run's folder only: the corpus and the tokenizer's file may be gone."""
    import sample

    mine = tmp_path / "mine" / "tokenizer.json"
    mine.parent.mkdir()
    shutil.copy(bpe_file, mine)
    prepared(tmp_path / "corpus", write_jsonl(tmp_path / "x.jsonl", stories(80)), tokenizer=str(mine), val=0.3)
    run = run_main(f"--corpus={tmp_path / 'corpus'}", "--steps=3", "--eval_rows=8")
    write_nanogpt(tmp_path / "tokens.bin", tokenfiles.load_corpus(tmp_path / "corpus").train.read(0, 3000).tolist())
    flags = (f"--corpus={tmp_path / 'tokens.bin'}", f"--tokenizer={mine}", "--val_share=0.3")
    other = run_main(*flags, "--steps=3", "--eval_rows=8", run="other")
    shutil.rmtree(tmp_path / "corpus")
    shutil.rmtree(mine.parent)
    for folder in (run, other):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={folder}", "--device=cpu", "--prompt=Document 7", "--length=9"])
        sample.main()
        assert capsys.readouterr().out.startswith("Document 7")


def refused(call, capsys):
    """The one line with which it stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


def test_training_refuses(run_main, small_corpus, sharded_corpus, bpe_file, tmp_path, capsys):  # noqa: F811
    prepared(tmp_path / "bpe", write_jsonl(tmp_path / "x.jsonl", stories(80)), tokenizer=str(bpe_file), val=0.3)
    write_nanogpt(tmp_path / "tokens.bin", [1, 2, 3, EOS] * 99)

    def problem(*flags):
        text = refused(lambda: run_main("--steps=3", *flags), capsys)
        assert not (tmp_path / "run").exists()
        return text

    text = problem(f"--corpus={small_corpus},{tmp_path / 'bpe'}")
    assert re.search("small and .*bpe don't go together: tokenizer bytes and tokenizer.json", text)
    assert "unique_tokens is for a single corpus" in problem(f"--corpus={small_corpus},{sharded_corpus}", "--unique_tokens=320")
    assert "unique_tokens is for a single corpus" in problem(f"--corpus={small_corpus}:1:320", "--unique_tokens=320")
    assert "corpus=b:x: write path, path:weight" in problem(f"--corpus={small_corpus}:1,b:x")
    assert "was prepared with tokenizer 'bytes', not 'tokenizer.json" in problem(f"--corpus={small_corpus}", f"--tokenizer={bpe_file}")
    assert "add --tokenizer=gpt2" in problem(f"--corpus={tmp_path / 'tokens.bin'}")
    assert "--val_share=0.01" in problem(f"--corpus={tmp_path / 'tokens.bin'}", "--tokenizer=bytes")
    assert f"unique_tokens=999,999 must lie between one block (32) and the training ({small_corpus}) split" in problem(f"--corpus={small_corpus}:1:999999,{sharded_corpus}:1")
    assert re.search(r"the training split has [\d,]+ tokens, fewer than one block of 4,096; lower --seq_len, or prepare more text$", problem(f"--corpus={small_corpus}", "--seq_len=4096"))
    assert re.search(rf"the training \({small_corpus}\) split has [\d,]+ tokens", problem(f"--corpus={sharded_corpus},{small_corpus}", "--seq_len=1024"))
    assert "no corpus in 'absent'" in problem(f"--corpus={small_corpus},absent")


def test_training_meets_a_wrong_token(run_main, tmp_path, capsys):  # noqa: F811
    """Large corpora are not read before training."""
    (tmp_path / "nano").mkdir()
    documents = [token for d in byte_documents(40) for token in [*d, EOS]]
    write_nanogpt(tmp_path / "nano" / "train.bin", documents + [60_000] + documents)
    write_nanogpt(tmp_path / "nano" / "val.bin", documents)
    flags = (f"--corpus={tmp_path / 'nano'}", "--tokenizer=bytes", "--epochs=1")
    err = refused(lambda: run_main(*flags), capsys)
    assert re.fullmatch(r"train.py: step \d+: the training split holds token 60000, beyond its vocabulary of 257; .*\n", err)
    write_nanogpt(tmp_path / "nano" / "val.bin", documents[:40] + [60_000] + documents)
    err = refused(lambda: run_main(*flags, "--eval_rows=0", run="other"), capsys)
    assert re.fullmatch(r"train.py: the validation split holds token 60000, beyond its vocabulary of 257; .*\n", err)
