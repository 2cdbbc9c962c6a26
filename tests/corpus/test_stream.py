"""The stream over several files, and the documents in it."""

import numpy as np
from corpus_examples import (
    EOS,
    TOKENS,
    all_tokens,
    expected_lengths,
    lengths_of,
    quick,
    small_chunks,
    split_at,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus.stream import Stream


@st.composite
def streams(draw):
    """(Stream, its tokens) over files of 1 to 9 tokens."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    dtype = draw(st.sampled_from([np.uint16, np.uint32, np.int32]))
    tokens = np.arange(sum(sizes), dtype=dtype) * 7 + 1
    return Stream(np.split(tokens, np.cumsum(sizes)[:-1])), tokens


@settings(max_examples=100, deadline=None)
@given(streams(), st.data())
def test_a_stream_reads_as_one_array(example, draw):
    stream, tokens = example
    assert len(stream) == len(tokens)
    start, stop = sorted(draw.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens) + 3))))
    part = stream.read(start, stop)
    assert part.tolist() == tokens[start:stop].tolist() and part.dtype == tokens.dtype

    for _ in range(2):  # windows of one length, and of another
        n = draw.draw(st.integers(1, len(tokens)))
        starts = np.array(draw.draw(st.lists(st.integers(0, len(tokens) - n), max_size=9)), np.int64)
        rows = stream.windows(starts, n)
        assert rows.dtype == tokens.dtype and rows.shape == (len(starts), n)
        assert rows.tolist() == [tokens[s : s + n].tolist() for s in starts]
        rows += 1  # a copy
    assert all_tokens(stream) == tokens.tolist()

    size = draw.draw(st.integers(1, 12))
    chunks = list(stream.chunks(size))
    assert np.concatenate(chunks).tolist() == tokens.tolist()
    assert all(len(chunk) == size for chunk in chunks[:-1])


@quick
@given(streams(), st.data())
def test_a_stream_split_in_two(example, draw):
    stream, tokens = example
    position = draw.draw(st.integers(0, len(tokens)))
    first, second = stream.split_at(position)
    assert all_tokens(first) == tokens[:position].tolist()
    assert all_tokens(second) == tokens[position:].tolist()
    if position < len(tokens):
        n = len(second) // 2 + 1
        starts = np.arange(len(second) - n + 1)
        expected = [tokens[position + s : position + s + n].tolist() for s in starts]
        assert second.windows(starts, n).tolist() == expected


def test_empty_files_are_left_out():
    none = np.array([], np.uint16)
    stream = Stream([none, np.array([1, 2], np.uint16), none, np.array([3], np.uint16)])
    assert len(stream.arrays) == 2
    assert stream.windows(np.array([1, 0]), 2).tolist() == [[2, 3], [1, 2]]
    empty = Stream([])
    assert len(empty) == 0 and all_tokens(empty) == [] and list(empty.chunks()) == []


@settings(max_examples=80, deadline=None)
@given(TOKENS, st.lists(st.integers(1, 39), max_size=3, unique=True).map(sorted), st.integers(1, 9))
@example([EOS], [], 1)
@example([EOS, EOS, 1], [], 1)
def test_lengths_of_eos_separated_documents(tokens, cuts, size):
    stream = Stream([np.array(part, np.uint16) for part in split_at(tokens, cuts)])
    with small_chunks(size):
        assert lengths_of(stream) == expected_lengths(tokens)
