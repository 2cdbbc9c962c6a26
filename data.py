"""Rows of tokens for training and validation: in which order, for how many epochs, from which mixture.

    python data.py docs                                  # prepares a corpus: corpus/prepare.py
    python data.py inspect corpora/docs                  # what is in it, and is it whole?

A corpus is two long streams of tokens, for training and for validation (corpus/tokenfiles.py). Here they
become rows of seq_len tokens, each a pure function of the seed and its number, with the positions of it that
count. Question-answer pairs (data.py --sft) do not run on from row to row: they are packed into rows whole.
"""

import terminal  # isort: skip  # first: Ctrl-C during the imports

import functools
from typing import NamedTuple

import numpy as np

from corpus.stream import Stream

VALIDATION_SEED = 2**63  # beyond every training seed: all runs are validated with the same noise

# --------------------------------------------------------------------------------------------------- order


EXACT_UP_TO = 4096  # elements that are shuffled exactly


def permute(index, n, seed, epoch, exact_up_to=EXACT_UP_TO):
    """A keyed permutation of [0, n), applied to `index`.

    Up to `exact_up_to` elements every order is equally likely (`shuffle`). Beyond, nothing of size n is
    stored: twelve Feistel rounds over the next power of four, and cycle walking back into the range, which
    is measurably uneven below n = 16. index, epoch: int64 arrays of one shape. Returns int64.
    """
    key = finalize(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) ^ finalize(epoch.astype(np.uint64)))
    if n <= exact_up_to:
        keys, order = np.unique(key, return_inverse=True)
        return shuffle(keys, n)[order, index]
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [finalize(key + np.uint64(round_ + 1)) for round_ in range(12)]
    result = index.astype(np.uint64)
    outside = np.ones(len(result), bool)
    while outside.any():
        left, right = result >> half, result & mask
        for round_key in keys:
            left, right = right, left ^ (finalize(right ^ round_key) & mask)
        result = np.where(outside, left << half | right, result)
        outside = result >= np.uint64(n)
    return result.astype(np.int64)


def shuffle(keys, n):
    """A uniformly random order of n elements for each of the keys (K,): (K, n) int64.

    It is that of n 64-bit random numbers, a function of key and place: a Fisher-Yates shuffle would be as
    even, but one step after the other.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        bits = finalize(keys[:, None] + np.arange(1, n + 1, dtype=np.uint64) * golden)
    return np.argsort(bits, axis=1, kind="stable")


def finalize(x):
    """MurmurHash3's 64-bit finalizer, elementwise (wraps modulo 2**64)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
        return x ^ x >> np.uint64(33)


def validation_ids(n_rows, available, order=0):
    """n_rows evenly spaced sequences of `available`, shuffled, differently for each `order`: int64 (n_rows,).

    A row's place sets its noise level; its document must not. Feistel's rounds do for that, at any size: what
    is uneven below n = 16 are whole permutations, not which rows come to which places, by twos or threes. So
    all runs are validated alike, those too that began before orders were exact.
    """
    pass_number = np.full(n_rows, order, np.int64)
    place = permute(np.arange(n_rows), n_rows, VALIDATION_SEED, pass_number, exact_up_to=0)
    return place * available // n_rows


# -------------------------------------------------------------------------------------------------- sequences


class Sequences:
    """A stream as sequences of `length` tokens, each with the token before it, in a new order every epoch.

    Sequence s covers tokens 1 + s·length … (s + 1)·length; the token before it is what an AR model reads
    first, so AR and diffusion predict the same tokens. With unique_tokens, only a fixed random subset of
    sequences is used, and a smaller subset is contained in a larger one. `split` is its name in errors.

    available: sequences of the stream; n: those in use; exact_up_to: see `permute`. Raises ValueError where
    there is not one.
    """

    has_pairs = False

    def __init__(self, stream, length, seed=0, unique_tokens=0, n_vocab=2**31, split="training",
                 exact_up_to=EXACT_UP_TO):
        self.stream = stream if isinstance(stream, Stream) else Stream([stream])
        self.length, self.seed, self.n_vocab, self.split = length, seed, n_vocab, split
        self.exact_up_to = exact_up_to
        self.available = (len(self.stream) - 1) // length
        if self.available < 1:
            remedy = "lower --seq_len, or prepare more text"
            if split.startswith("validation"):
                remedy += " or a larger share for validation"
            raise ValueError(f"the {split} split has {max(0, len(self.stream) - 1):,} tokens, "
                             f"fewer than one sequence of {length:,}; {remedy}")
        tokens = self.available * length
        if unique_tokens and not length <= unique_tokens <= tokens:
            raise ValueError(f"unique_tokens={unique_tokens:,} must lie between one sequence ({length:,}) "
                             f"and the {split} split ({tokens:,} tokens in whole sequences)")
        self.n = (unique_tokens or tokens) // length

    def ids(self, sample):
        """The number of each sample's sequence: a pure function of the seed and the sample (int64 array)."""
        epoch, place = np.divmod(sample, self.n)
        return self.subset(permute(place, self.n, self.seed, epoch, self.exact_up_to))

    def subset(self, number):
        """The sequences numbered 0 … n − 1 of the subset: the first n of one fixed order of them all."""
        if self.n == self.available:
            return number
        return permute(number, self.available, self.seed, np.full_like(number, -1), self.exact_up_to)

    def by_source(self, ids):
        """As `Mixture.by_source`: there is one."""
        yield np.ones(len(ids), bool), self, ids

    def rows(self, sample):
        """Tokens of the samples (B,), with the token before each sequence: (B, length + 1) int32."""
        return self.read(self.ids(sample))

    def read(self, ids):
        """The sequences numbered `ids` (B,) as they stand in the files, with the token before each.

        Returns (B, length + 1) int32. Raises ValueError for tokens outside the vocabulary.
        """
        rows = self.stream.windows(ids * self.length, self.length + 1)
        check_vocabulary(rows, self.n_vocab, self.split)
        return rows.astype(np.int32)

    def documents(self, ids, rows, eos_id, causal):
        """Numbers (B, length) int32, equal within a document and growing along a row, of rows = read(ids).

        They are of the tokens that the network reads. Causal: the tokens before those predicted, and an eos
        opens the document that follows; else the sequence's own, and an eos closes its document, unless it
        opens one in this stream.
        """
        tokens = rows[:, :-1] if causal else rows[:, 1:]
        is_eos, opens = tokens == eos_id, self.stream.opens
        if self.stream.document_starts:
            position = ids[:, None] * self.length + np.arange(self.length) + (0 if causal else 1)
            number = self.stream.document_numbers(position + (is_eos if causal and not opens else 0))
            return (number - number[:, :1]).astype(np.int32)
        return np.cumsum(is_eos, axis=1, dtype=np.int32) - (0 if causal or opens else is_eos)


def check_vocabulary(tokens, n_vocab, split):
    """Raise ValueError if there are tokens outside the vocabulary."""
    largest = int(tokens.max(initial=0))
    least = int(tokens.min(initial=0)) if tokens.dtype.kind == "i" else 0
    if least < 0 or largest >= n_vocab:
        token = least if least < 0 else largest
        raise ValueError(f"the {split} split holds token {token}, beyond its vocabulary of "
                         f"{n_vocab}; another tokenizer's, or damaged: prepare it again")


class PairLayout(NamedTuple):
    """How question-answer pairs stand in rows."""

    packing: bool = True  # several in a row, as many as fit
    long_pairs: str = "cut"  # those that are longer than a row: cut, or skip
    eos_padding: str = "none"  # separators after the answer that count as its own: none, block or row
    block: int = 1  # positions of a row at whose multiples pairs begin: block diffusion's


class PairRows:
    """Question-answer pairs as rows of `length` tokens, with the methods of Sequences.

    A row holds whole pairs, each a document of its own, and padding behind them; every row begins behind a
    separator. Of each pair the answer counts, the separator that closes it included. A pair that is cut has
    none; where nothing of its answer would be left it is skipped.

    pairs: the stream's PairIndex. available and n: rows. n_cut and n_skipped: pairs. Raises ValueError where
    there is not one row.
    """

    has_pairs = True

    def __init__(self, stream, pairs, length, eos_id, layout, seed=0, n_vocab=2**31, split="training",
                 exact_up_to=EXACT_UP_TO):
        self.stream, self.length, self.eos_id, self.seed = stream, length, eos_id, seed
        self.n_vocab, self.split, self.exact_up_to = n_vocab, split, exact_up_to
        alone = layout.eos_padding == "row" or not layout.packing

        is_long = pairs.size > length
        kept = ~is_long if layout.long_pairs == "skip" else pairs.n_prompt < length
        self.n_cut, self.n_skipped = int((is_long & kept).sum()), int((~kept).sum())
        self.longest = int(pairs.size.max())
        if not kept.any():
            raise ValueError(f"the {split} split has no question-answer pair that has a place in a row of "
                             f"{length:,} tokens; raise --seq_len")
        start, n_prompt, size, is_long = (
            part[kept] for part in (pairs.start, pairs.n_prompt, np.minimum(pairs.size, length), is_long))
        room = np.minimum(-(-size // layout.block) * layout.block, length)

        rows = np.arange(len(size)) if alone else pack_rows(room, length, seed)
        order = np.argsort(rows, kind="stable")
        self.n = self.available = int(rows.max()) + 1
        self.first = np.searchsorted(rows[order], np.arange(self.n + 1))  # each row's first pair
        self.start, self.n_prompt, self.size = start[order], n_prompt[order], size[order]
        taken = np.cumsum(room[order]) - room[order]
        self.column = taken - taken[self.first[rows[order]]]  # where each pair begins in its row
        end = dict(none=self.size, block=room[order], row=np.full(len(size), length))[layout.eos_padding]
        self.stop = self.column + np.where(is_long[order], self.size, end)  # behind its last answer token

    def ids(self, sample):
        """As `Sequences.ids`."""
        epoch, place = np.divmod(sample, self.n)
        return permute(place, self.n, self.seed, epoch, self.exact_up_to)

    def subset(self, number):
        """As `Sequences.subset`: all rows are in use."""
        return number

    def by_source(self, ids):
        """As `Mixture.by_source`: there is one."""
        yield np.ones(len(ids), bool), self, ids

    def pairs_in(self, ids):
        """(which of a batch's rows, which pair) for each pair in the rows `ids`, (K,) both."""
        counts = self.first[ids + 1] - self.first[ids]
        return np.repeat(np.arange(len(ids)), counts), spans(self.first[ids], counts)

    def rows(self, sample):
        """As `Sequences.rows`."""
        return self.read(self.ids(sample))

    def read(self, ids):
        """As `Sequences.read`: a separator, then the pairs; separators where there is none."""
        rows = np.full((len(ids), self.length + 1), self.eos_id, np.int32)
        row, pair = self.pairs_in(ids)
        size = self.size[pair]
        tokens = self.stream.take(spans(self.start[pair], size))
        check_vocabulary(tokens, self.n_vocab, self.split)
        rows[np.repeat(row, size), 1 + spans(self.column[pair], size)] = tokens
        return rows

    def documents(self, ids, rows, eos_id, causal):
        """As `Sequences.documents`: a pair is one, with the separator before it if causal; padding is −1."""
        numbers = np.full((len(ids), self.length), -1, np.int32)
        row, pair = self.pairs_in(ids)
        size = self.stop[pair] - self.column[pair]
        number = np.repeat(pair - self.first[ids][row], size)
        numbers[np.repeat(row, size), spans(self.column[pair], size)] = number
        return numbers

    def eligible(self, ids):
        """The positions of answers in the rows `ids`, (B, length) bool."""
        is_answer = np.zeros((len(ids), self.length), bool)
        row, pair = self.pairs_in(ids)
        first = self.column[pair] + self.n_prompt[pair]
        size = self.stop[pair] - first
        is_answer[np.repeat(row, size), spans(first, size)] = True
        return is_answer

    def n_pairs(self, ids):
        """How many pairs there are in the rows `ids`."""
        return int((self.first[ids + 1] - self.first[ids]).sum())


def spans(starts, sizes):
    """The numbers starts[i] … starts[i] + sizes[i] − 1 of all spans, one after the other."""
    before = np.cumsum(sizes) - sizes
    return np.repeat(starts - before, sizes) + np.arange(int(sizes.sum()))


def pack_rows(sizes, length, seed):
    """The row of `length` tokens into which each of sizes (N,) goes: (N,) int64.

    In a random order, each into the row with the least room that is enough (best fit): few gaps, and no row
    tells its pairs' lengths. `has_room` is a set of numbers as bits: those at which there are rows.
    """
    order = permute(np.arange(len(sizes)), len(sizes), seed, np.full(len(sizes), -2))
    rows, n_rows = np.empty(len(sizes), np.int64), 0
    open_rows, has_room = [[] for _ in range(length + 1)], 0  # by their room
    for number in order.tolist():
        size = int(sizes[number])
        fitting = has_room >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                has_room ^= 1 << room
        else:
            row, room, n_rows = n_rows, length, n_rows + 1
        rows[number] = row
        open_rows[room - size].append(row)
        if room > size:
            has_room |= 1 << room - size
    return rows


class Mixture:
    """Sequences of several sources as one, with the same methods.

    Without weights, every epoch visits every sequence of each source once; with weights, a source gives its
    share of the samples and has epochs of its own.
    """

    PERIOD = 1 << 14  # samples in which each source gives a fixed number, in random order

    def __init__(self, sources, weights=None, seed=0):
        self.sources, self.seed, self.length = sources, seed, sources[0].length
        self.exact_up_to = sources[0].exact_up_to
        self.n, self.available = sum(s.n for s in sources), sum(s.available for s in sources)
        self.has_pairs = sources[0].has_pairs
        # the numbers of each source's first sequence, and of its first in use
        self.first = np.cumsum([0] + [s.available for s in sources])
        self.first_in_use = np.cumsum([0] + [s.n for s in sources])
        self.share = self.shares(weights) if weights else None
        self.order = functools.lru_cache(4)(self.order)

    def shares(self, weights):
        """Samples that each source gives in a period, by largest remainders.

        Raises ValueError if a source would give none.
        """
        exact = np.array(weights) / sum(weights) * self.PERIOD
        share = np.floor(exact).astype(np.int64)
        largest_remainders = np.argsort(share - exact, kind="stable")[: self.PERIOD - share.sum()]
        share[largest_remainders] += 1
        if not share.all():
            raise ValueError(f"a weight below 1/{self.PERIOD} of their sum is too small")
        return share

    def order(self, period):
        """The source of each of a period's samples, and how many of its own came before in this period."""
        place = np.arange(self.PERIOD)
        shuffled = permute(place, self.PERIOD, self.seed, np.full_like(place, period), self.exact_up_to)
        source = np.repeat(np.arange(len(self.share)), self.share)[shuffled]
        before = np.empty_like(place)
        for k, share in enumerate(self.share):
            before[source == k] = np.arange(share)
        return source, before

    def ids(self, sample):
        """As `Sequences.ids`, numbered over all sources."""
        if self.share is None:
            epoch, place = np.divmod(sample, self.n)
            place = permute(place, self.n, self.seed, epoch, self.exact_up_to)
            source = np.searchsorted(self.first_in_use, place, side="right") - 1
            number = place - self.first_in_use[source]
        else:
            period, place = np.divmod(sample, self.PERIOD)
            source, number = np.empty_like(sample), np.empty_like(sample)
            for p in np.unique(period):
                here = period == p
                period_source, before = self.order(int(p))
                source[here], number[here] = period_source[place[here]], before[place[here]]
            number += period * self.share[source]
        ids = np.empty_like(sample)
        for k in np.unique(source):
            here, sequences = source == k, self.sources[k]
            own = sequences.subset(number[here]) if self.share is None else sequences.ids(number[here])
            ids[here] = self.first[k] + own
        return ids

    def by_source(self, ids):
        """Yield (which of a batch's rows, their source, their numbers in it) for each source in `ids`."""
        source = np.searchsorted(self.first, ids, side="right") - 1
        for k in np.unique(source):
            here = source == k
            yield here, self.sources[k], ids[here] - self.first[k]

    def rows(self, sample):
        """As `Sequences.rows`."""
        return self.read(self.ids(sample))

    def read(self, ids):
        """As `Sequences.read`."""
        rows = np.empty((len(ids), self.length + 1), np.int32)
        for here, source, number in self.by_source(ids):
            rows[here] = source.read(number)
        return rows

    def documents(self, ids, rows, eos_id, causal):
        """As `Sequences.documents`."""
        numbers = np.empty((len(ids), self.length), np.int32)
        for here, source, number in self.by_source(ids):
            numbers[here] = source.documents(number, rows[here], eos_id, causal)
        return numbers

    def eligible(self, ids):
        """As `PairRows.eligible`."""
        is_answer = np.empty((len(ids), self.length), bool)
        for here, source, number in self.by_source(ids):
            is_answer[here] = source.eligible(number)
        return is_answer

    def n_pairs(self, ids):
        """As `PairRows.n_pairs`."""
        return sum(source.n_pairs(number) for _, source, number in self.by_source(ids))


def positions_within(documents):
    """Each token's place in its document, as far as the row shows it.

    (B, L) of `documents` → (B, L) int32.
    """
    place = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int32), documents.shape)
    starts = np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
    return place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)


# --------------------------------------------------------------------------------------- rows for the network


def short_row_lengths(seed, sample, seq_len, share):
    """How many positions of each row count, (N,): all, or for a `share` of them the first 2 … seq_len.

    Known from the sample's number alone, before its tokens are read: the mean over the global batch needs it.
    """
    import diffusion  # and with it torch: `python data.py` and its processes do not wait for that

    u = diffusion.unit(diffusion.random_bits(seed, diffusion.LENGTH, sample, 2))
    length = np.clip(1 + np.ceil(u[:, 1] * (seq_len - 1)), 2, seq_len)
    return np.where(u[:, 0] <= share, length, seq_len).astype(np.int64)


def eligible_positions(cfg, sequences, ids, sample=None):
    """Which positions count in each row of a run with these settings, (N, L) bool; None: all of them.

    ids: of the rows' sequences; sample: their numbers in the run, None for validation, where no row is short.
    """
    if sequences.has_pairs:
        return sequences.eligible(ids)
    if sample is None or not cfg.short_rows:
        return None
    counts = short_row_lengths(cfg.seed, sample, cfg.seq_len, cfg.short_rows)
    return np.arange(cfg.seq_len) < counts[:, None]


def count_by_block(process, eligible):
    """How many positions count in each block of rows: (N, L) bool → (N, M); None, for all, stays None."""
    import diffusion  # as above

    if eligible is None:
        return None
    return diffusion.by_block(process, eligible).sum(1).reshape(len(eligible), -1)


def read_batch(cfg, eos_id, process, sequences, ids, levels, rows, eligible=None, valid=None, spacing=None):
    """The sequences `ids` (B,) as a diffusion.Batch of the step's `rows`, with documents as cfg has them.

    eligible (B, L) bool: the positions that count, None for all. In text the rest is padding, a document of
    its own (−1) that no other attends to (a causal network never sees it). Question-answer pairs are
    documents in any case, and positions begin anew in each. valid and spacing as in diffusion.make_batch.
    """
    import diffusion  # as above

    tokens = sequences.read(ids)
    causal = process.objective == "ar"
    documents = positions = None
    if cfg.document_attention or sequences.has_pairs:
        documents = sequences.documents(ids, tokens, eos_id, causal)
        if cfg.reset_positions or sequences.has_pairs:
            positions = positions_within(documents)
    if eligible is not None and not causal and not sequences.has_pairs:
        documents = np.where(eligible, 0 if documents is None else documents, -1).astype(np.int32)
    batch = diffusion.make_batch(process, tokens, levels, rows, eligible, valid, spacing, documents)
    return batch._replace(positions=positions)


if __name__ == "__main__":
    from corpus import prepare

    terminal.run(prepare.main)
