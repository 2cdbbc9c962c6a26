"""The corpora of a run: opened, mixed as its settings say, and what a checkpoint keeps of them."""

import numpy as np

from corpus.tokenfiles import Stream, load_corpus, parse_corpora
from data import EXACT_UP_TO, Mixture, PairLayout, PairRows, Sequences

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
        if (first.train_pairs is None) != (corpus.train_pairs is None):
            raise ValueError(f"corpus={cfg.corpus}: question-answer pairs and text don't mix; train on one "
                             "after the other, by --init_from")
    return corpora


# settings of a run that are for text, and for question-answer pairs, with what leaves them alone
OF_TEXT = dict(unique_tokens=0, short_rows=0.0, document_attention=False, reset_positions=False,
               ar_input_mask=0.0)
OF_PAIRS = dict(packing=True, long_pairs="cut", eos_padding="none")


def check_meaning(cfg, corpora):
    """Raise ValueError for settings of a run that its corpora have no use for."""
    has_pairs = corpora[0].train_pairs is not None
    unused, kind = (OF_TEXT, "question-answer pairs") if has_pairs else (OF_PAIRS, "text")
    for name, default in unused.items():
        value = getattr(cfg, name)
        if value != default:
            raise ValueError(f"{name}={value} has no meaning for corpus={cfg.corpus}, which is {kind}")
    if has_pairs and any(unique for _, _, unique in parse_corpora(cfg.corpus)):
        raise ValueError(f"corpus={cfg.corpus}: unique tokens are of text, not of question-answer pairs")


def pair_layout(cfg, block):
    """How a run's question-answer pairs stand in rows; block: its diffusion_block."""
    whole_row = cfg.eos_padding == "block" and not block  # diffusion_block=seq_len: the row is the block
    return PairLayout(cfg.packing, cfg.long_pairs, "row" if whole_row else cfg.eos_padding, block or 1)


def split_name(split, corpus, corpora):
    """What a split is called in errors: with its folder where there are several."""
    return f"{split} ({corpus.folder})" if len(corpora) > 1 else split


def training_sequences(cfg, corpora, block=0, exact_up_to=EXACT_UP_TO):
    """Sequences of the corpora's training splits, or rows of their pairs, mixed as cfg says.

    block: the run's diffusion_block; exact_up_to: see data.permute.
    """
    parsed = parse_corpora(cfg.corpus)
    sequences = []
    for i, (corpus, (_, _, unique)) in enumerate(zip(corpora, parsed)):
        name, seed = split_name("training", corpus, corpora), cfg.seed + i
        n_vocab, eos_id = corpus.meta["n_vocab"], corpus.meta["eos_id"]
        if corpus.train_pairs is not None:
            source = PairRows(corpus.train, corpus.train_pairs, cfg.seq_len, eos_id, pair_layout(cfg, block),
                              seed, n_vocab, name, exact_up_to)
        else:
            unique = unique or cfg.unique_tokens
            source = Sequences(corpus.train, cfg.seq_len, seed, unique, n_vocab, name, exact_up_to)
        sequences.append(source)
    if len(sequences) == 1:
        return sequences[0]
    weights = [weight for _, weight, _ in parsed]
    return Mixture(sequences, weights if weights[0] else None, cfg.seed)


def validation_sequences(cfg, corpora, block=0):
    """Sequences of all the corpora's validation splits, or rows of their pairs; block: diffusion_block."""
    sequences = []
    for corpus in corpora:
        name, n_vocab = split_name("validation", corpus, corpora), corpus.meta["n_vocab"]
        if corpus.val_pairs is not None:
            source = PairRows(corpus.val, corpus.val_pairs, cfg.seq_len, corpus.meta["eos_id"],
                              pair_layout(cfg, block), n_vocab=n_vocab, split=name)
        else:
            source = Sequences(corpus.val, cfg.seq_len, n_vocab=n_vocab, split=name)
        sequences.append(source)
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
    """Bytes of text per token of exactly these sequences (N,) of the validation splits (pairs: answers)."""
    n_bytes = n_tokens = 0.0
    for _, source, numbers in sequences.by_source(ids):
        corpus = next(corpus for corpus in corpora if corpus.val is source.stream)
        lengths = corpus.token_bytes[source.read(numbers)[:, 1:]]
        counted = source.eligible(numbers) if source.has_pairs else np.ones(lengths.shape, bool)
        n_bytes += corpus.byte_ratio * float(lengths[counted].sum())
        n_tokens += counted.sum()
    return n_bytes / n_tokens


def text_digest(corpora, split):
    """The SHA-256 sums of a split of all corpora: the same text has the same."""
    return " ".join(corpus.meta[split]["sha256"] for corpus in corpora)
