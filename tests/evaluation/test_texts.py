"""Entropy, repetition and copies, against plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.stream import Stream
from evaluation import texts


def test_entropy_of_a_row():
    assert texts.entropy([3, 3, 3]) == 0 and texts.entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert texts.entropy([1, 1, 2, 3]) == pytest.approx(1.5 * math.log(2))


def test_distinct_and_repeated_ngrams():
    rows = [[1, 2, 1, 2, 1], [3, 3, 3, 3]]
    assert texts.distinct(rows, 1) == 3 / 9 and texts.distinct(rows, 2) == 3 / 7
    assert texts.repetition(rows[0], 2) == 0.5 and texts.repetition(rows[1], 1) == 0.75
    assert texts.repetition([1, 2, 3], 2) == 0
    assert math.isnan(texts.repetition([1], 2)) and math.isnan(texts.distinct([[1]], 2))


def windows(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


TOKENS = st.integers(0, 2)


@settings(max_examples=150, deadline=None)
@given(st.lists(TOKENS, min_size=1, max_size=80),
       st.lists(st.lists(TOKENS, max_size=20), min_size=1, max_size=4),
       st.integers(1, 6), st.integers(1, 30), st.integers(1, 4))
def test_every_window_is_found_where_it_stands(text, rows, n, chunk, files):
    """In small chunks and several files: what plain Python finds; and the longest passage of all."""
    stream = Stream([np.array(part, np.uint16) for part in np.array_split(text, files)])
    matches = texts.search(stream, rows, n, chunk=chunk)
    in_text = windows(text, n)
    for row, in_stream in zip(rows, matches.in_stream):
        assert in_stream.tolist() == [window in in_text for window in windows(row, n)]
    places = set()
    for r, row in enumerate(rows):
        for i, window in enumerate(windows(row, n)):
            places |= {(r, i, j) for j, other in enumerate(in_text) if other == window}
    assert set(matches.places) == places

    lengths = []
    for row in rows:
        lengths += [m for m in range(n, len(row) + 1) if set(windows(row, m)) & set(windows(text, m))]
    longest, r, column, place = texts.longest_copy(stream, rows, matches)
    assert longest == max(lengths, default=0)
    assert rows[r][column : column + longest] == text[place : place + longest]


def test_windows_whose_hashes_agree_are_compared():
    """Thue and Morse's sequence and its opposite have equal polynomial hashes modulo 2⁶⁴, for any base."""
    thue = [bin(i).count("1") % 2 for i in range(2048)]
    other = [1 - bit for bit in thue]
    tables = texts.powers(texts.BASE, 2048), texts.powers(texts.INVERSE, 2048)
    hashes = [texts.hashes(np.array(bits), *tables, 2048) for bits in (thue, other)]
    assert hashes[0] == hashes[1]  # the trap is one
    assert not texts.search(Stream([np.array(other, np.uint16)]), [thue], 2048).in_stream[0].any()
    assert texts.search(Stream([np.array(thue, np.uint16)]), [thue], 2048).in_stream[0].all()


def test_large_texts_are_searched_quickly():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 50_000, 3_000_000).astype(np.uint16)
    rows = [rng.integers(0, 50_000, 256).tolist() for _ in range(60)]
    rows[7][100:180] = text[2_097_100:2_097_180].tolist()  # across two chunks
    matches = texts.search(Stream([text]), rows, 32)
    assert sum(part.sum() for part in matches.in_stream) == matches.in_stream[7].sum() == 80 - 32 + 1
    assert texts.longest_copy(Stream([text]), rows, matches) == (80, 7, 100, 2_097_100)


def test_nothing_to_look_for():
    stream = Stream([np.arange(10, dtype=np.uint16)])
    assert texts.search(stream, [[1, 2]], 5).in_stream[0].tolist() == []
    matches = texts.search(stream, [list(range(12))], 11)  # the text is shorter than the window
    assert matches.in_stream[0].tolist() == [False, False]
    with pytest.raises(IndexError):
        texts.powers(3, 0)
