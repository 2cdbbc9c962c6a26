"""What a corpus holds."""

import hashlib

import numpy as np

from corpus.tokenfiles import document_lengths, load_corpus
from corpus.tokenizers import load_tokenizer


def inspect(folder, tokenizer_name="", val_share=0.0, seed=None, show=print):
    """Print what a corpus holds: counts, document lengths, tokenizer, a random sample; then check it. Raises ValueError where it is broken."""
    corpus = load_corpus(folder, tokenizer_name, val_share)
    meta = corpus.meta
    tokens = load_tokenizer(tokenizer_name or meta["tokenizer"], (corpus.folder,))
    own = "files" in meta["train"]
    show(f"{folder}: {'prepared by prepare.py' if own else meta['format'] + ' token files'}" + (f" from {', '.join(meta['sources'])}" if own else ""))
    show(f"tokenizer {meta['tokenizer']}: {meta['n_vocab']:,} tokens, mask {meta['mask_id']}, eos {meta['eos_id']}, {corpus.train.dtype}")
    random = np.random.default_rng(seed)
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        buckets, count, longest, total, least, largest = np.zeros(64, np.int64), 0, 0, 0, 0, 0
        for lengths in document_lengths(stream, meta["eos_id"]):
            if len(lengths):
                buckets += np.bincount(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), minlength=64)
                count, longest, total = count + len(lengths), max(longest, int(lengths.max())), total + int(lengths.sum())
        for chunk in stream.chunks():
            least, largest = min(least, int(chunk.min())), max(largest, int(chunk.max()))
        n_files = len(stream.arrays) - stream.lead
        show(f"\n{split}: {len(stream) - stream.lead:,} tokens in {n_files} file{'s' * (n_files > 1)}, {count:,} documents, "
             f"{total / max(1, count):,.0f} tokens each on average, {longest:,} at most" + (f"; {meta[split]['bytes']:,} bytes" if own else ""))
        if count:
            shown = np.flatnonzero(buckets)
            for power in range(shown[0], shown[-1] + 1):
                bar = "█" * int(np.ceil(40 * buckets[power] / buckets.max()))
                show(f"  ≤ {2**power:>13,} tokens  {buckets[power]:>12,}  {bar}")
        if least < 0 or largest >= meta["n_vocab"]:
            raise ValueError(f"{folder}: the {split} split holds token {least if least < 0 else largest}, beyond the vocabulary of {meta['n_vocab']}")
        start = int(random.integers(0, max(1, len(stream) - 64)))
        show(f"  sample from token {start:,}: {tokens.decode(stream.read(start, start + 64).tolist())!r}")
    if not own:
        return show("\nno checksums in this layout; sizes and vocabulary agree")
    for split in ("train", "val"):
        for file in meta[split]["files"]:
            if hashlib.sha256(np.memmap(corpus.folder / file["name"], np.uint8, mode="r")).hexdigest() != file["sha256"]:
                raise ValueError(f"{corpus.folder / file['name']}: its SHA-256 is not the one in meta.json; prepare the corpus again")
    show("\nall SHA-256 sums agree")
