"""The stream over several files, and the documents in it."""

import numpy as np
from corpus_examples import (
    EOS,
    TOKENS,
    all_tokens,
    document_lengths,
    lengths_of,
    quick,
    small_chunks,
    split_at,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus import tokenfiles

# -------------------------------------------------------------------------------------------------- streams


@st.composite
def streams(draw):
    """(Stream, its tokens) over files of 1 to 9 tokens."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    tokens = np.arange(sum(sizes), dtype=draw(st.sampled_from([np.uint16, np.uint32, np.int32]))) * 7 + 1
    return tokenfiles.Stream(np.split(tokens, np.cumsum(sizes)[:-1])), tokens


@settings(max_examples=100, deadline=None)
@given(streams(), st.data())
def test_a_stream_reads_as_one_array(made, draw):
    stream, tokens = made
    assert len(stream) == len(tokens)
    a, b = sorted(draw.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens) + 3))))
    assert stream.read(a, b).tolist() == tokens[a:b].tolist() and stream.read(a, b).dtype == tokens.dtype
    for _ in range(2):  # of another length, and again
        n = draw.draw(st.integers(1, len(tokens)))
        start = np.array(draw.draw(st.lists(st.integers(0, len(tokens) - n), max_size=9)), np.int64)
        rows = stream.windows(start, n)
        assert rows.dtype == tokens.dtype and rows.shape == (len(start), n)
        assert rows.tolist() == [tokens[s : s + n].tolist() for s in start]
        rows += 1  # a copy
    assert all_tokens(stream) == tokens.tolist()
    size = draw.draw(st.integers(1, 12))
    parts = list(stream.chunks(size))
    assert np.concatenate(parts).tolist() == tokens.tolist() and [len(p) for p in parts[:-1]] == [size] * (len(parts) - 1)


@quick
@given(streams(), st.data())
def test_a_stream_cut_in_two(made, draw):
    stream, tokens = made
    at = draw.draw(st.integers(0, len(tokens)))
    first, second = stream.cut(at)
    assert (all_tokens(first), all_tokens(second)) == (tokens[:at].tolist(), tokens[at:].tolist())
    if at < len(tokens):
        n = len(second) // 2 + 1
        start = np.arange(len(second) - n + 1)
        assert second.windows(start, n).tolist() == [tokens[at + s : at + s + n].tolist() for s in start]


def test_empty_files_are_left_out():
    stream = tokenfiles.Stream([np.array([], np.uint16), np.array([1, 2], np.uint16), np.array([], np.uint16), np.array([3], np.uint16)])
    assert len(stream.arrays) == 2 and stream.windows(np.array([1, 0]), 2).tolist() == [[2, 3], [1, 2]]
    assert len(tokenfiles.Stream([])) == 0 and all_tokens(tokenfiles.Stream([])) == [] and list(tokenfiles.Stream([]).chunks()) == []


@settings(max_examples=80, deadline=None)
@given(TOKENS, st.lists(st.integers(1, 39), max_size=3, unique=True).map(sorted), st.integers(1, 9))
@example([EOS], [], 1)
@example([EOS, EOS, 1], [], 1)
def test_lengths_of_eos_separated_documents(tokens, cuts, size):
    with small_chunks(size):
        assert lengths_of(tokenfiles.Stream([np.array(part, np.uint16) for part in split_at(tokens, cuts)])) == document_lengths(tokens)
