"""What tests do with preparations: small tasks, interruptions, and what must come out."""

import contextlib
import hashlib
import itertools
import os
from pathlib import Path
from unittest import mock

import numpy as np
from corpus_examples import stories

from corpus import cutting, prepare, tasks, tokenfiles, tokenizers, writer

SPLITS = ("train", "val")


@contextlib.contextmanager
def task_size(size):
    """Tasks of `size` bytes; one process, which knows of this, unless a test asks for more."""
    with mock.patch.object(cutting, "TASK_BYTES", size), mock.patch.object(os, "cpu_count", lambda: 1):
        yield


@contextlib.contextmanager
def stop_after_commit(number):
    """Interrupt a preparation after its commit of this number, as a signal might; each task is committed."""
    commit, count = writer.Ledger.commit, itertools.count()

    def stopping_commit(self, **notes):
        commit(self, **notes)
        if next(count) == number:
            raise KeyboardInterrupt

    with commit_always(), mock.patch.object(writer.Ledger, "commit", stopping_commit):
        yield


def commit_always():
    """Commit after each task."""
    return mock.patch.object(prepare, "COMMIT_SECONDS", 0)


def commit_never():
    """Commit at the beginning, and when the preparation is interrupted."""
    return mock.patch.object(prepare, "COMMIT_SECONDS", 1e9)


def split_of(text, val):
    """The split that a document belongs to."""
    return tasks.choose_split(hashlib.sha256(text.encode("utf-8")).digest(), val)


def by_split(texts, val):
    """The documents of each split as they must come out: in order, each once, none that is empty."""
    unique = dict.fromkeys(text for text in texts if text)
    return {split: [text for text in unique if split_of(text, val) == split] for split in SPLITS}


def first_of(split):
    return next(text for text in stories(99) if split_of(text, 0.5) == split)


ONE_OF_EACH = [first_of("train"), first_of("val")]  # documents, at val=0.5


def texts_in(folder):
    """The documents of each split of a corpus, decoded."""
    corpus = tokenfiles.load_corpus(folder)
    tokenizer = tokenizers.load_tokenizer(corpus.meta["tokenizer"], (folder,))
    texts = {}
    for split in SPLITS:
        ids = getattr(corpus, split).read(0, 1 << 40)
        ends = np.flatnonzero(ids == tokenizer.eos_id)
        assert ends[0] == 0 and ends[-1] == len(ids) - 1
        texts[split] = [tokenizer.decode(ids[a + 1 : b].tolist()) for a, b in zip(ends, ends[1:])]
    return texts


def contents(folder):
    """{name: bytes} of all files in a folder."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
