"""Rows of tokens for training and validation: in which order, for how many epochs, from which mixture.

    python data.py docs                                  # prepares a corpus: corpus/prepare.py
    python data.py inspect corpora/docs                  # what is in it, and is it whole?

A corpus is two long rows of tokens, for training and for validation (corpus/tokenfiles.py).
"""

import functools

import numpy as np

import diffusion
from corpus.tokenfiles import Stream


def permute(index, n, seed, epoch):
    """A keyed bijection of [0, n), applied to `index`: nothing of size n is stored.

    Twelve Feistel rounds over the next power of four (six leave a bias below n = 16), and cycle walking back into the range.
    index, epoch: int64 arrays of one shape. Returns int64.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = finalize(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) ^ finalize(epoch.astype(np.uint64)))
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


def finalize(x):
    """MurmurHash3's 64-bit finalizer, elementwise (wraps modulo 2**64)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
        return x ^ x >> np.uint64(33)


class Sequences:
    """A stream as blocks of `length` tokens, each with the token before it, in a new order every epoch.

    Block b covers tokens 1 + b·length … (b + 1)·length; the token before it is what an AR model reads first, so AR and diffusion predict
    the same tokens. With unique_tokens, only a fixed random subset of blocks is used, and a smaller subset is contained in a larger one.
    """

    def __init__(self, stream, length, seed=0, unique_tokens=0, n_vocab=2**31, what="training"):
        stream = stream if isinstance(stream, Stream) else Stream([stream])
        available = (len(stream) - 1) // length
        if available < 1:
            raise ValueError(f"the {what} split has {max(0, len(stream) - 1):,} tokens, fewer than one block of {length:,}; lower --seq_len, or prepare more text"
                             + " or a larger share for validation" * what.startswith("validation"))
        if unique_tokens and not length <= unique_tokens <= available * length:
            raise ValueError(f"unique_tokens={unique_tokens:,} must lie between one block ({length:,}) "
                             f"and the {what} split ({available * length:,} tokens in whole blocks)")
        self.stream, self.length, self.what, self.n_vocab, self.seed = stream, length, what, n_vocab, seed
        self.available, self.n = available, (unique_tokens or available * length) // length

    def ids(self, sample):
        """The block of each sample: a pure function of the seed and the sample's index (int64 array)."""
        epoch, place = np.divmod(sample, self.n)
        return self.chosen(permute(place, self.n, self.seed, epoch))

    def chosen(self, number):
        """The blocks numbered 0 … n − 1 of the subset: the first n of one fixed order of them all."""
        return permute(number, self.available, self.seed, np.full_like(number, -1)) if self.n < self.available else number

    def rows(self, sample):
        """Tokens of the samples, (len(sample), length + 1) int32: the token before the block, then the block."""
        return self.read(self.ids(sample))

    def read(self, index):
        """The blocks numbered `index` as they stand in the files, int32. Raises ValueError for ids that are no text."""
        rows = self.stream.windows(index * self.length, self.length + 1)
        largest = int(rows.max(initial=0))
        if rows.dtype.kind == "i" and (least := int(rows.min(initial=0))) < 0:
            largest = least
        if not 0 <= largest < self.n_vocab:
            raise ValueError(f"the {self.what} split holds token {largest}, beyond its vocabulary of {self.n_vocab}; "
                             "another tokenizer's, or damaged: prepare it again")
        return rows.astype(np.int32)

    def documents(self, index, rows, eos_id, causal):
        """Ids (B, length) int32, equal within a document and growing along a row, for what a network reads of `rows` = read(index).

        Causal: the tokens before those predicted, and an eos opens the document that follows; else the block's own, and
        an eos closes its document.
        """
        read = rows[:, :-1] if causal else rows[:, 1:]
        ends = read == eos_id
        if self.stream.borders:
            position = index[:, None] * self.length + np.arange(self.length) + (0 if causal else 1)
            number = self.stream.document(position + (ends if causal else 0))
            return (number - number[:, :1]).astype(np.int32)
        return np.cumsum(ends, axis=1, dtype=np.int32) - (0 if causal else ends)


class Mixture:
    """Blocks of several sources as one. Without weights, every epoch visits every block of each source once; with weights, a
    source gives its share of the samples and has epochs of its own."""

    PERIOD = 1 << 14  # samples in which each source gives a fixed number, in random order

    def __init__(self, sources, weights=None, seed=0):
        self.sources, self.seed = sources, seed
        self.length, self.n, self.available = sources[0].length, sum(s.n for s in sources), sum(s.available for s in sources)
        self.first = np.cumsum([0] + [s.available for s in sources])  # the number of each source's first block
        self.first_chosen = np.cumsum([0] + [s.n for s in sources])
        self.share = None
        if weights:
            exact = np.array(weights) / sum(weights) * self.PERIOD
            self.share = np.floor(exact).astype(np.int64)
            self.share[np.argsort(self.share - exact, kind="stable")[: self.PERIOD - self.share.sum()]] += 1  # largest remainders
            if not self.share.all():
                raise ValueError(f"a weight below 1/{self.PERIOD} of their sum is too small")
        self.order = functools.lru_cache(4)(self.order)

    def order(self, period):
        """The source of each of a period's samples, and how many of its samples in this period came before."""
        place = np.arange(self.PERIOD)
        source = np.repeat(np.arange(len(self.share)), self.share)[permute(place, self.PERIOD, self.seed, np.full_like(place, period))]
        before = np.empty_like(place)
        for k, share in enumerate(self.share):
            before[source == k] = np.arange(share)
        return source, before

    def ids(self, sample):
        """The block of each sample, numbered over all the sources: a pure function of the seed and the sample's index."""
        block = np.empty_like(sample)
        if self.share is None:
            epoch, place = np.divmod(sample, self.n)
            place = permute(place, self.n, self.seed, epoch)
            source = np.searchsorted(self.first_chosen, place, side="right") - 1
            number = place - self.first_chosen[source]
        else:
            period, place = np.divmod(sample, self.PERIOD)
            source, number = np.empty_like(sample), np.empty_like(sample)
            for p in np.unique(period):
                here = period == p
                source[here], number[here] = (part[place[here]] for part in self.order(int(p)))
            number += period * self.share[source]
        for k in np.unique(source):
            here, s = source == k, self.sources[k]
            block[here] = self.first[k] + (s.chosen(number[here]) if self.share is None else s.ids(number[here]))
        return block

    def by_source(self, index):
        """(rows of a batch, their source, their numbers in it) for each source that occurs among the blocks `index`."""
        source = np.searchsorted(self.first, index, side="right") - 1
        for k in np.unique(source):
            here = source == k
            yield here, self.sources[k], index[here] - self.first[k]

    def rows(self, sample):
        return self.read(self.ids(sample))

    def read(self, index):
        """As `Blocks.read`."""
        rows = np.empty((len(index), self.length + 1), np.int32)
        for here, source, number in self.by_source(index):
            rows[here] = source.read(number)
        return rows

    def documents(self, index, rows, eos_id, causal):
        """As `Blocks.documents`."""
        ids = np.empty((len(index), self.length), np.int32)
        for here, source, number in self.by_source(index):
            ids[here] = source.documents(number, rows[here], eos_id, causal)
        return ids


def positions_within(documents):
    """Each token's place in its document, as far as the row shows it. Ids (B, L) as of `Blocks.documents` → (B, L) int32."""
    place = np.broadcast_to(np.arange(documents.shape[1], dtype=np.int32), documents.shape)
    starts = np.diff(documents, axis=1, prepend=documents[:, :1]) != 0
    return place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)


VALIDATION_SEED = 2**63  # beyond every training seed: all runs are validated with the same noise


def validation_ids(n_rows, available, run=0):
    """n_rows evenly spaced blocks of `available`, shuffled, in another order each `run`: a row's place sets its noise level, its document must not."""
    return permute(np.arange(n_rows), n_rows, VALIDATION_SEED, np.full(n_rows, run, np.int64)) * available // n_rows


def read_batch(cfg, process, blocks, eos_id, ids, rows, which, valid=None, spacing=None):
    """The blocks `ids` as a batch of the step's rows `which`: diffusion.make_batch with what cfg says of documents."""
    x = blocks.read(ids)
    if not cfg.document_attention:
        return diffusion.make_batch(process, x, rows, which, valid, spacing)
    documents = blocks.documents(ids, x, eos_id, process.objective == "ar")
    batch = diffusion.make_batch(process, x, rows, which, valid, spacing, documents)
    return batch._replace(positions=positions_within(documents)) if cfg.reset_positions else batch


if __name__ == "__main__":
    from corpus import prepare

    prepare.main()
