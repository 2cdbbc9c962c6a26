"""The corpora of a run: opened, mixed as its settings say, and what a checkpoint keeps of them."""

import numpy as np

from corpus.tokenfiles import Stream, load_corpus, parse_corpora
from data import EXACT_UP_TO, Mixture, Sequences

# What a corpus and a checkpoint must agree on.
VOCABULARY = ("tokenizer", "n_vocab", "mask_id", "eos_id")


def open_corpora(cfg):
    """The corpora that cfg names, of one vocabulary."""
    foreign = cfg.tokenizer, cfg.val_share, cfg.eos, cfg.eos_opens
    corpora = [load_corpus(path, *foreign) for path, *_ in parse_corpora(cfg.corpus)]
    first = corpora[0]
    for corpus in corpora[1:]:
        pairs = {name: (first.meta[name], corpus.meta[name]) for name in VOCABULARY}
        differences = [f"{name} {a} and {b}" for name, (a, b) in pairs.items() if a != b]
        if differences:
            folders = f"{first.folder} and {corpus.folder}"
            raise ValueError(f"{folders} don't go together: {', '.join(differences)}")
    return corpora


def split_name(split, corpus, corpora):
    """What a split is called in errors: with its folder where there are several."""
    return f"{split} ({corpus.folder})" if len(corpora) > 1 else split


def training_sequences(cfg, corpora, exact_up_to=EXACT_UP_TO):
    """Sequences of the corpora's training splits, mixed as cfg says; exact_up_to: see data.permute."""
    parsed = parse_corpora(cfg.corpus)
    sequences = []
    for i, (corpus, (_, _, unique)) in enumerate(zip(corpora, parsed)):
        name = split_name("training", corpus, corpora)
        unique = unique or cfg.unique_tokens
        n_vocab = corpus.meta["n_vocab"]
        sequences.append(
            Sequences(corpus.train, cfg.seq_len, cfg.seed + i, unique, n_vocab, name, exact_up_to))
    if len(sequences) == 1:
        return sequences[0]
    weights = [weight for _, weight, _ in parsed]
    return Mixture(sequences, weights if weights[0] else None, cfg.seed)


def validation_sequences(corpora, seq_len):
    """Sequences of all the corpora's validation splits."""
    sequences = []
    for corpus in corpora:
        name = split_name("validation", corpus, corpora)
        sequences.append(Sequences(corpus.val, seq_len, n_vocab=corpus.meta["n_vocab"], split=name))
    return sequences[0] if len(sequences) == 1 else Mixture(sequences)


def training_text(cfg, corpora, exact_up_to):
    """The text that a run reads of each corpus, as Streams: its training split, or its unique tokens.

    exact_up_to: as the run's checkpoint records it.
    """
    streams = []
    for i, (corpus, (_, _, unique)) in enumerate(zip(corpora, parse_corpora(cfg.corpus))):
        unique = unique or cfg.unique_tokens
        if not unique:
            streams.append(corpus.train)
            continue
        sequences = Sequences(corpus.train, cfg.seq_len, cfg.seed + i, unique, corpus.meta["n_vocab"],
                              exact_up_to=exact_up_to)
        ids = np.sort(sequences.subset(np.arange(sequences.n)))
        neighbours = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)  # they stay together
        border = np.array([corpus.meta["mask_id"]], corpus.train.dtype)  # stands in no text
        arrays = []
        for group in neighbours:
            start, stop = 1 + int(group[0]) * cfg.seq_len, 1 + (int(group[-1]) + 1) * cfg.seq_len
            arrays += [corpus.train.read(start, stop), border]
        streams.append(Stream(arrays))
    return streams


def mean_token_bytes(corpora, sequences, ids):
    """Bytes of text per token of exactly these sequences (N,) of the corpora's validation splits."""
    n_bytes = 0.0
    for _, source, numbers in sequences.by_source(ids):
        corpus = next(corpus for corpus in corpora if corpus.val is source.stream)
        n_bytes += corpus.byte_ratio * float(corpus.token_bytes[source.read(numbers)[:, 1:]].sum())
    return n_bytes / (len(ids) * sequences.length)


def text_digest(corpora, split):
    """The SHA-256 sums of a split of all corpora: the same text has the same."""
    return " ".join(corpus.meta[split]["sha256"] for corpus in corpora)
