"""A long row of tokens in one or several files, and the documents in it.

Most token files mark the end of each document with a token, the eos. Megatron's need none: an index beside
them lists where the documents start. A Stream reads both kinds; what follows it finds the documents.
"""

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


class DocumentStarts(NamedTuple):
    """Where the documents of one file start."""

    position: int  # of the file's first token in the stream
    offsets: np.ndarray  # (documents,) bytes of the file before each document, as an .idx lists them
    itemsize: int  # bytes per token

    def start(self, number):
        """The position in the stream where the file's document `number` starts."""
        return self.position + int(self.offsets[number]) // self.itemsize

    def starts(self):
        """(documents,) the positions in the stream where the file's documents start."""
        return self.position + self.offsets // self.itemsize

    def count_before(self, position):
        """How many of the file's documents start before a position in the stream."""
        return int(np.searchsorted(self.offsets, (position - self.position) * self.itemsize))


class Stream:
    """A long row of tokens over one or several memory-mapped arrays of one type, read as if they were one.

    A model predicts each token from those before it, so the first token of a corpus needs one before it, too:
    `with_leading_eos` puts an eos there, which is in no file (n_prepended counts it).

    document_starts: a DocumentStarts for each file with an index; without them, documents end with an eos,
    or, if `opens`, begin with one.
    """

    def __init__(self, arrays, document_starts=(), n_prepended=0, opens=False):
        self.arrays = [array for array in arrays if len(array)]
        self.document_starts = document_starts
        self.n_prepended, self.opens = n_prepended, opens
        self.offsets = np.cumsum([0, *map(len, self.arrays)], dtype=np.int64)  # of each array, and the length
        self.dtype = self.arrays[0].dtype if self.arrays else np.dtype(np.uint16)
        self.views = {}  # {n: all windows of n tokens of each array, not copied; None where it is shorter}

    def __len__(self):
        return int(self.offsets[-1])

    def read(self, start, stop):
        """Tokens [start, stop) as one array."""
        parts = []
        for array, offset in zip(self.arrays, self.offsets):
            part = array[max(0, start - offset) : max(0, stop - offset)]
            if len(part):
                parts.append(part)
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty(0, self.dtype), *parts])

    def chunks(self, size=1 << 24):
        """All tokens, in arrays of at most `size`."""
        return (self.read(start, start + size) for start in range(0, len(self), size))

    def windows(self, start, n):
        """Copy n tokens from each position of start (B,) on → (B, n). One gather per array, whatever B."""
        if n not in self.views:
            self.views[n] = [sliding_window_view(a, n) if len(a) >= n else None for a in self.arrays]
        views = self.views[n]
        which = np.searchsorted(self.offsets, start, side="right") - 1  # the array of each first token

        # The usual case: all windows lie in one array.
        k = which[0] if len(which) else 0
        in_one_array = (which == k).all() and start.max(initial=0) + n <= self.offsets[k + 1]
        if in_one_array and views[k] is not None:
            return views[k][start - self.offsets[k]]

        rows = np.empty((len(start), n), self.dtype)
        inside = start + n <= self.offsets[which + 1]
        for k in np.unique(which[inside]):
            here = inside & (which == k)
            rows[here] = views[k][start[here] - self.offsets[k]]
        for i in np.flatnonzero(~inside):  # windows that reach into the next array, one by one
            rows[i] = self.read(int(start[i]), int(start[i]) + n)
        return rows

    def take(self, positions):
        """The tokens at any positions (n,), in their order. → (n,)"""
        which = np.searchsorted(self.offsets, positions, side="right") - 1
        tokens = np.empty(len(positions), self.dtype)
        for k in np.unique(which):
            here = which == k
            tokens[here] = self.arrays[k][positions[here] - self.offsets[k]]
        return tokens

    def document_numbers(self, positions):
        """The number of the document at each position, growing along the stream, for files with an index."""
        self.align_document_starts()
        numbers = np.zeros(positions.shape, np.int64)
        n_before = 0
        for file in self.document_starts:
            here = positions >= file.position
            offsets = (positions[here] - file.position) * file.itemsize
            numbers[here] = n_before + np.searchsorted(file.offsets, offsets, side="right")
            n_before += len(file.offsets)
        return numbers

    def align_document_starts(self):
        """Copy the offsets once if they are unaligned, as in an .idx: each search would copy them again."""
        files = self.document_starts
        if not all(file.offsets.flags.aligned for file in files):
            self.document_starts = [file._replace(offsets=file.offsets.copy()) for file in files]

    def split_at(self, position):
        """Two streams: the tokens before `position`, where a document starts, and the rest."""
        before, after = [], []
        for file in self.document_starts:
            n = file.count_before(position)
            if n > 0:
                before.append(file._replace(offsets=file.offsets[:n]))
            if n < len(file.offsets):
                after.append(file._replace(position=file.position - position, offsets=file.offsets[n:]))
        heads = [array[: max(0, position - offset)] for array, offset in zip(self.arrays, self.offsets)]
        tails = [array[max(0, position - offset) :] for array, offset in zip(self.arrays, self.offsets)]
        return Stream(heads, before, self.n_prepended, self.opens), Stream(tails, after, 0, self.opens)

    def with_leading_eos(self, eos_id):
        """The stream with an eos in front, unless it begins with one."""
        if not len(self) or int(self.read(0, 1)[0]) == eos_id:
            return self
        eos = np.array([eos_id], self.dtype)
        shifted = [file._replace(position=file.position + 1) for file in self.document_starts]
        return Stream([eos, *self.arrays], shifted, 1, self.opens)


def document_sizes(stream, eos_id):
    """Yield arrays with the number of tokens of each document, its eos included.

    An eos that the stream begins with belongs to no document, unless it opens one.
    """
    if stream.document_starts:
        ends = [file.start(0) for file in stream.document_starts[1:]] + [len(stream)]
        for file, end in zip(stream.document_starts, ends):
            yield np.diff(file.starts(), append=end)
        return

    position, start = 0, 0  # of the chunk, of the current document
    behind = 0 if stream.opens else 1  # a document ends behind an eos, or before one
    for chunk in stream.chunks():
        ends = position + np.flatnonzero(chunk == eos_id) + behind
        if position == 0 and len(ends) and ends[0] == behind:
            ends, start = ends[1:], behind
        if len(ends):
            yield np.diff(ends, prepend=start)
            start = int(ends[-1])
        position += len(chunk)
    if start < position:  # the last document has no eos
        yield np.array([position - start])


def document_lengths(stream, eos_id):
    """Yield arrays with the number of tokens of each document, without its eos."""
    if stream.document_starts:
        start = stream.document_starts[0].start(0)
    else:
        start = int(len(stream) > 0 and stream.read(0, 1)[0] == eos_id and not stream.opens)
    for sizes in document_sizes(stream, eos_id):
        ends = start + np.cumsum(sizes)
        place = ends - sizes if stream.opens else ends - 1
        has_eos = stream.windows(np.clip(place, 0, None), 1)[:, 0] == eos_id
        yield sizes - ((sizes > 0) & has_eos)
        start += int(sizes.sum())


def next_document_start(stream, position, eos_id):
    """The first position from `position` on where a document starts; the stream's end if there is none."""
    if stream.document_starts:
        for file in stream.document_starts:
            n = file.count_before(position)
            if n < len(file.offsets):
                return file.start(n)
        return len(stream)

    size, behind = 1 << 20, 0 if stream.opens else 1
    while position < len(stream):
        ends = np.flatnonzero(stream.read(position - behind, position + size) == eos_id)
        if len(ends):
            return position + int(ends[0])
        position += size
    return len(stream)
