"""The order of sequences: every permutation is equally likely, and a run in progress keeps its own."""

import math

import numpy as np
import pytest
from steps import build_run

import data
from training import checks


def orders(n, epochs, seed=7, **flags):
    """The permutations of so many epochs: (epochs, n)."""
    index, epoch = np.tile(np.arange(n), epochs), np.repeat(np.arange(epochs), n)
    return data.permute(index, n, seed, epoch, **flags).reshape(epochs, n)


def excess(statistic, df):
    """How many standard deviations a chi-square statistic lies above its mean (Wilson and Hilferty)."""
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def excess_of_permutations(permutations):
    """Of the counts of all n! permutations."""
    n = permutations.shape[1]
    _, count = np.unique(permutations @ n ** np.arange(n), return_counts=True)
    cells = math.factorial(n)
    expected = len(permutations) / cells
    missing = (cells - len(count)) * expected
    return excess(((count - expected) ** 2).sum() / expected + missing, cells - 1)


def excess_of_places(permutations):
    """Of the table of places against elements, in at most 16 bins each."""
    epochs, n = permutations.shape
    bins = min(n, 16)
    bin_of = np.arange(n) * bins // n
    table = np.zeros((bins, bins))
    np.add.at(table, (np.tile(bin_of, epochs), bin_of[permutations.ravel()]), 1)
    size = np.bincount(bin_of)
    expected = epochs * np.outer(size, size) / n
    statistic = ((table - expected) ** 2 / expected).sum() * (n - 1) / n  # drawn without replacement
    return excess(statistic, (bins - 1) ** 2)


@pytest.mark.parametrize("n", range(2, 7))
def test_every_order_of_a_few_elements_is_equally_likely(n):
    repeats = 300 if n < 6 else 60
    for seed in (0, 1337):
        assert excess_of_permutations(orders(n, repeats * math.factorial(n), seed)) < 4
    by_seed = np.concatenate([orders(n, 1, seed) for seed in range(20 * math.factorial(n))])
    assert excess_of_permutations(by_seed) < 4


def test_feistel_rounds_alone_are_uneven():
    """What these tests are for: the order of runs that began before."""
    assert excess_of_permutations(orders(5, 300 * 120, 1337, exact_up_to=0)) > 8


@pytest.mark.parametrize("n", (7, 8, 11, 16, 64, 100, 1000, 4096, 4097))
def test_every_element_is_equally_likely_at_every_place(n):
    permutations = orders(n, 400 if n < 1000 else 40)
    assert (np.sort(permutations, axis=1) == np.arange(n)).all()
    assert abs(excess_of_places(permutations)) < 4


def test_a_run_in_progress_keeps_its_order(corpus):
    """Its checkpoints lack what today's record: Feistel's rounds for small corpora, too."""
    run = build_run(f"--corpus={corpus}", "--seq_len=32", "--batch_size=8", "--steps=4")
    sequences, sample = run.sequences, np.arange(40)
    assert sequences.n <= data.EXACT_UP_TO == sequences.exact_up_to
    old = checks.keep_data_order(run, dict(exact_up_to=0)).sequences.ids(sample)
    epoch, place = np.divmod(sample, sequences.n)
    assert np.array_equal(old, data.permute(place, sequences.n, run.cfg.seed, epoch, exact_up_to=0))
    assert not np.array_equal(old, sequences.ids(sample))
    same = checks.keep_data_order(run, dict(exact_up_to=data.EXACT_UP_TO)).sequences.ids(sample)
    assert np.array_equal(same, sequences.ids(sample))
