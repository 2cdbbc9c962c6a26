"""Repetition and copies, against plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.tokenfiles import Stream
from evaluation import texts


def test_distinct_and_repeated_ngrams():
    rows = [[1, 2, 1, 2, 1], [3, 3, 3, 3]]
    assert texts.distinct(rows, 1) == 3 / 9 and texts.distinct(rows, 2) == 3 / 7
    assert texts.repetition(rows[0], 2) == 0.5 and texts.repetition(rows[1], 1) == 0.75 and texts.repetition([1, 2, 3], 2) == 0
    assert math.isnan(texts.repetition([1], 2)) and math.isnan(texts.distinct([[1]], 2))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=80), st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 30), st.integers(1, 4))
def test_every_window_is_found_where_it_stands(text, rows, n, size, files):
    """In small chunks and several files: what plain Python finds; and the longest passage of all."""
    stream = Stream([np.array(part, np.uint16) for part in np.array_split(text, files)])
    found = texts.search(stream, rows, n, size=size)
    at = {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    assert [part.tolist() for part in found.inside] == [[tuple(row[i : i + n]) in at for i in range(len(row) - n + 1)] for row in rows]
    assert set(found.places) == {(r, i, j) for r, row in enumerate(rows) for i in range(len(row) - n + 1) for j in range(len(text) - n + 1) if row[i : i + n] == text[j : j + n]}
    lengths = [m for row in rows for i in range(len(row)) for j in range(len(text)) for m in range(n, len(row) - i + 1) if row[i : i + m] == text[j : j + m]]
    longest, r, column, place = texts.longest_copy(stream, rows, found, n)
    assert longest == max(lengths, default=0)
    assert rows[r][column : column + longest] == text[place : place + longest]


def test_windows_whose_hashes_agree_are_compared():
    """Thue and Morse's sequence and its opposite agree in polynomial hashes modulo 2⁶⁴, whatever the base is: found is only what is there."""
    thue = [bin(i).count("1") % 2 for i in range(2048)]
    other = [1 - bit for bit in thue]
    tables = texts.powers(texts.BASE, 2048), texts.powers(texts.INVERSE, 2048)
    assert texts.hashes(np.array(thue), *tables, 2048) == texts.hashes(np.array(other), *tables, 2048)  # the trap is one
    assert not texts.search(Stream([np.array(other, np.uint16)]), [thue], 2048).inside[0].any()
    assert texts.search(Stream([np.array(thue, np.uint16)]), [thue], 2048).inside[0].all()


def test_large_texts_are_searched_quickly():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50_000, 3_000_000).astype(np.uint16)
    rows = [rng.integers(0, 50_000, 256).tolist() for _ in range(60)]
    rows[7][100:180] = text[2_097_100:2_097_180].tolist()  # across two chunks
    found = texts.search(Stream([text]), rows, 32)
    assert sum(part.sum() for part in found.inside) == found.inside[7].sum() == 80 - 32 + 1
    assert texts.longest_copy(Stream([text]), rows, found, 32) == (80, 7, 100, 2_097_100)


def test_nothing_to_look_for():
    stream = Stream([np.arange(10, dtype=np.uint16)])
    assert texts.search(stream, [[1, 2]], 5).inside[0].tolist() == []
    assert texts.search(stream, [list(range(12))], 11).inside[0].tolist() == [False, False]  # the text is shorter than the window
    with pytest.raises(IndexError):
        texts.powers(3, 0)
