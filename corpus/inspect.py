"""Show what a corpus holds, and check it: python data.py inspect FOLDER."""

from typing import NamedTuple

import numpy as np

from corpus import tokenizers
from corpus.files import sha256_of
from corpus.stream import document_lengths
from corpus.tokenfiles import load_corpus


def inspect_corpus(folder, seed=None, show=print, **foreign):
    """Print a corpus's tokenizer, its counts, document lengths and a random sample; then check its files.

    seed: of the sample; show: is called with each text to print; foreign: of others' token files, as
    `load_corpus` takes it. Raises ValueError for a broken corpus.
    """
    corpus = load_corpus(folder, **foreign)
    meta = corpus.meta
    name, eos = meta["tokenizer"], ""
    if foreign.get("tokenizer_name"):
        name, eos = foreign["tokenizer_name"], foreign.get("eos", "")
    tokenizer = tokenizers.load_tokenizer(name, (corpus.folder,), eos)
    is_prepared = "files" in meta["train"]
    random = np.random.default_rng(seed)

    # What it is.
    origin = f"{meta['format']} token files"
    if is_prepared:
        origin = f"prepared by data.py from {', '.join(meta['sources'])}"
    show(f"{folder}: {origin}")
    show(f"tokenizer {meta['tokenizer']}: {meta['n_vocab']:,} tokens, mask {meta['mask_id']}, "
         f"eos {meta['eos_id']}, {corpus.train.dtype}")

    # What is in each split.
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        contents = survey(stream, meta["eos_id"])
        n_bytes = f"; {meta[split]['bytes']:,} bytes" if is_prepared else ""
        show(f"\n{split}: {describe(stream, contents)}{n_bytes}")
        pairs = corpus.train_pairs if split == "train" else corpus.val_pairs
        if pairs is not None:
            n_pairs, n_answers = len(pairs.start), int(pairs.n_answer.sum())
            show(f"  {n_pairs:,} question-answer pairs, {n_answers:,} tokens of answers")
            show_pair(stream, pairs, int(random.integers(0, n_pairs)), tokenizer, show)
        show_histogram(contents.buckets, show)
        wrong = contents.smallest_id if contents.smallest_id < 0 else contents.largest_id
        if not 0 <= wrong < meta["n_vocab"]:
            raise ValueError(f"{folder}: the {split} split holds token {wrong}, "
                             f"beyond the vocabulary of {meta['n_vocab']}")
        start = int(random.integers(0, max(1, len(stream) - 64)))
        sample = stream.read(start, start + 64).tolist()
        show(f"  sample from token {start:,}: {tokenizer.decode(sample, continues=True)!r}")

    # Whether its files are as they were written.
    if not is_prepared:
        show("\nno checksums in this layout; sizes and vocabulary agree")
        return
    check_digests(corpus)
    show("\nall SHA-256 sums agree")


class Contents(NamedTuple):
    """What a split holds."""

    buckets: np.ndarray  # (64,) documents of more than 2**(i − 1) and at most 2**i tokens, eos not counted
    n_documents: int
    n_tokens: int  # in all documents, eos not counted
    longest: int
    smallest_id: int
    largest_id: int


def survey(stream, eos_id):
    """Count the Contents of a stream, reading it twice."""
    buckets = np.zeros(64, np.int64)
    n_documents, n_tokens, longest = 0, 0, 0
    for lengths in document_lengths(stream, eos_id):
        if len(lengths):
            powers = np.ceil(np.log2(np.maximum(lengths, 1))).astype(int)
            buckets += np.bincount(powers, minlength=64)
            n_documents += len(lengths)
            n_tokens += int(lengths.sum())
            longest = max(longest, int(lengths.max()))

    smallest_id, largest_id = 0, 0
    for chunk in stream.chunks():
        smallest_id = min(smallest_id, int(chunk.min()))
        largest_id = max(largest_id, int(chunk.max()))
    return Contents(buckets, n_documents, n_tokens, longest, smallest_id, largest_id)


def describe(stream, contents):
    """One line on the size of a split."""
    n_files = len(stream.arrays) - stream.n_prepended
    files = f"{n_files} file" if n_files == 1 else f"{n_files} files"
    average = contents.n_tokens / max(1, contents.n_documents)
    return (f"{len(stream) - stream.n_prepended:,} tokens in {files}, {contents.n_documents:,} documents, "
            f"{average:,.0f} tokens each on average, {contents.longest:,} at most")


def show_histogram(buckets, show):
    """Show how many documents are how long, a line per power of two."""
    powers = np.flatnonzero(buckets)
    if not len(powers):
        return
    for power in range(powers[0], powers[-1] + 1):
        bar = "█" * int(np.ceil(40 * buckets[power] / buckets.max()))
        show(f"  ≤ {2**power:>13,} tokens  {buckets[power]:>12,}  {bar}")


def show_pair(stream, pairs, number, tokenizer, show):
    """Show the first tokens of a pair's prompt and answer."""
    start, n_prompt, n_answer = (int(part[number]) for part in pairs)
    border = start + n_prompt
    parts = stream.read(start, start + min(n_prompt, 256)), stream.read(border, border + min(n_answer, 256))
    prompt, answer = (tokenizer.decode(part.tolist(), continues=True) for part in parts)
    show(f"  pair {number:,}: {prompt!r} → {answer!r}")


def check_digests(corpus):
    """Raise ValueError unless each token file of a prepared corpus has the SHA-256 in its meta.json."""
    for split in ("train", "val"):
        for file in (*corpus.meta[split]["files"], *corpus.meta[split].get("answer_files", ())):
            path = corpus.folder / file["name"]
            if sha256_of(path) != file["sha256"]:
                raise ValueError(f"{path}: its SHA-256 is not the one in meta.json; prepare the corpus again")
