"""What can be said of samples without a judge: do they repeat themselves, each other, or the training text? Rows are lists of token ids."""

from typing import NamedTuple

import numpy as np


def ngrams(row, n):
    return list(zip(*(row[i:] for i in range(n))))


def distinct(rows, n):
    """distinct-n: different n-grams of all samples together over all their n-grams. nan without any."""
    found = [gram for row in rows for gram in ngrams(row, n)]
    return len(set(found)) / len(found) if found else float("nan")


def repetition(row, n):
    """The share of a sample's n-grams that stood in it before. nan if it is shorter than n."""
    found = ngrams(row, n)
    return 1 - len(set(found)) / len(found) if found else float("nan")


class Found(NamedTuple):
    """Which windows of the samples stand in the training text, and where."""

    inside: list  # for each row a bool for each of its windows
    places: list  # (row, column, position in the text), of the windows that were found; cut off at some number


BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2⁶⁴
INVERSE = pow(BASE, -1, 1 << 64)


def powers(base, count):
    """base⁰, base¹, … modulo 2⁶⁴."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def hashes(ids, up, down, n):
    """Σ_j (ids[i + j] + 1)·BASE^j modulo 2⁶⁴ for every window of n tokens, from one running sum, whatever n is. up, down: powers of BASE and INVERSE."""
    sums = np.zeros(len(ids) + 1, np.uint64)
    np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * up[: len(ids)], out=sums[1:])
    return (sums[n:] - sums[:-n]) * down[: len(ids) - n + 1]


def search(stream, rows, n, size=1 << 21, most=10_000):
    """Every window of n tokens of the samples, looked up in the whole `stream` (tokenfiles.Stream): exactly, hashes only say where to compare."""
    count = max([size + n, *map(len, rows)])
    tables = powers(BASE, count), powers(INVERSE, count)
    rows = [np.asarray(row, np.int64) for row in rows]
    own = [hashes(row, *tables, n) if len(row) >= n else np.empty(0, np.uint64) for row in rows]
    keys, first, inverse = np.unique(np.concatenate(own), return_index=True, return_inverse=True)
    owner, column = np.repeat(np.arange(len(rows)), [len(h) for h in own]), np.concatenate([np.arange(len(h)) for h in own])
    if not len(keys):
        return Found([np.zeros(0, bool)] * len(rows), [])
    window = np.stack([rows[owner[i]][column[i] : column[i] + n] for i in first])  # what each key stands for
    seen, places = np.zeros(len(keys), bool), []
    for start in range(0, len(stream) - n + 1, size):
        ids = stream.read(start, min(start + size + n - 1, len(stream)))
        h = hashes(ids, *tables, n)
        key = np.minimum(np.searchsorted(keys, h), len(keys) - 1)
        at = np.flatnonzero(keys[key] == h)
        at = at[(np.lib.stride_tricks.sliding_window_view(ids, n)[at] == window[key[at]]).all(1)]
        seen[key[at]] = True
        places += zip(key[at][: most - len(places)].tolist(), (start + at[: most - len(places)]).tolist())
    inside, of = seen[inverse], {}
    for number, k in enumerate(inverse):
        if seen[k]:
            of.setdefault(k, []).append(number)
    where = [(int(owner[number]), int(column[number]), place) for k, place in places for number in of.get(k, [])][:most]
    return Found(np.split(inside, np.cumsum([len(h) for h in own])[:-1]), where)


def longest_copy(stream, rows, found, n):
    """(tokens, row, column, position) of the longest passage of a sample that stands in the training text, from where windows of n were found."""
    best = (0, 0, 0, 0)
    for r, column, place in found.places:
        row = np.asarray(rows[r])
        before = min(column, place)
        after = min(len(row) - column, len(stream) - place)
        same = stream.read(place - before, place + after).astype(np.int64) == row[column - before : column + after]
        left = before - (np.flatnonzero(~same[:before]).max(initial=-1) + 1)
        wrong = np.flatnonzero(~same[before:])
        right = wrong[0] if len(wrong) else after
        best = max(best, (int(left + right), r, int(column - left), int(place - left)))
    return best if best[0] >= n else (0, 0, 0, 0)
