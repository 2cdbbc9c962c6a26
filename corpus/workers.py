"""From tasks to tokens, in this process or in several.

A TaskTokenizer takes a Task (corpus/tasks.py) and gives a Result: the tokens of each of its documents, or of
a piece of a long one. tokenize_tasks does so for many tasks, and gives the results in the tasks' order.
"""

import collections
import contextlib
import hashlib
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from corpus import chat, cutting, tokenizers
from corpus.cutting import cut_text
from corpus.tasks import choose_split
from corpus.texts import TaskReader


class Document(NamedTuple):
    """The tokens of a document, or of a piece of it."""

    digest: bytes  # SHA-256 of the whole document's text; b"" if there is no other document
    n_bytes: int  # of text
    n_token_bytes: int  # that its tokens spell: others where a tokenizer changes the text
    tokens: bytes  # in the files' dtype; behind the document's last token its eos
    is_first: bool = True
    is_last: bool = True
    split: str = ""  # if the digest does not decide it
    n_answer: int = 0  # of a pair: tokens of its answer, the eos included


class Result(NamedTuple):
    """What a task gave."""

    documents: list
    left_out: dict  # {reason: documents and records that were left out}
    n_replaced: int = 0  # places where bytes became U+FFFD
    without_separator: tuple = ()  # files in which the separator does not occur


class TaskTokenizer:
    """Tokenizes tasks, in the way that the settings say. Made once per process."""

    def __init__(self, cfg):
        self.tokenizer = tokenizers.load_tokenizer(cfg.tokenizer_name(), eos=cfg.eos)
        self.cfg = cfg
        self.dtype = token_dtype(self.tokenizer)
        self.eos = np.array([self.tokenizer.eos_id], self.dtype)
        self.token_bytes = self.tokenizer.token_bytes()
        self.template = chat.template_of(cfg, self.tokenizer) if cfg.sft else None

    def __call__(self, task):
        """The Result of a task. Raises ValueError for bad input that the settings do not let it leave out."""
        if task.kind == "piece":
            return self.tokenize_piece(task.content)
        if task.kind == "undecodable":
            return Result([], dict(undecodable=1))

        reader = TaskReader(self.cfg)
        if self.cfg.sft:
            documents = list(self.tokenize_pairs(reader, task))
        else:
            documents = self.tokenize_texts(reader.texts(task))
        return Result(documents, dict(reader.left_out), reader.n_replaced, tuple(reader.without_separator))

    def tokenize_texts(self, texts):
        """The Documents of whole texts."""
        documents = []
        for text, ids in zip(texts, self.encode(texts)):
            raw = text.encode("utf-8")
            tokens = np.append(ids, self.eos).tobytes()
            documents.append(Document(hashlib.sha256(raw).digest(), len(raw), self.count_bytes(ids), tokens))
        return documents

    def tokenize_pairs(self, reader, task):
        """Yield the Documents of a task's question-answer pairs; those of a conversation are of one split."""
        for pair, conversation, where in reader.pairs(task):
            try:
                encoded = self.template.encode_pair(pair)
            except ValueError as problem:
                reader.reject(where, problem)
                continue
            ids = np.concatenate((encoded.prompt, encoded.answer)).astype(self.dtype)
            yield Document(
                pair.digest(), encoded.n_bytes, self.count_bytes(ids), ids.tobytes(),
                split=choose_split(conversation, self.cfg.val), n_answer=len(encoded.answer))

    def tokenize_piece(self, piece):
        """The Result of a piece of a long document."""
        (ids,) = self.encode([piece.text])
        n_bytes, n_token_bytes = len(piece.text.encode("utf-8")), self.count_bytes(ids)
        if piece.is_last:
            ids = np.append(ids, self.eos)
        document = Document(piece.digest, n_bytes, n_token_bytes, ids.tobytes(), piece.is_first,
                            piece.is_last, piece.split)
        return Result([document], {}, piece.n_replaced)

    def count_bytes(self, ids):
        """How many bytes of text these tokens spell."""
        return int(self.token_bytes[ids].sum())

    def encode(self, texts):
        """The ids of each text, in the files' dtype. Long texts are cut where the tokenizer allows it."""
        max_length = cutting.TASK_BYTES if self.tokenizer.allows_cuts else float("inf")
        short_texts = [text if len(text) <= max_length else "" for text in texts]
        ids = [array.astype(self.dtype) for array in self.tokenizer.encode_batch(short_texts)]
        for i, text in enumerate(texts):
            if len(text) > max_length:
                pieces = [self.tokenizer.encode(piece).astype(self.dtype) for piece in cut_text(text)]
                ids[i] = np.concatenate(pieces)
        return ids


def token_dtype(tokenizer):
    """The dtype of token files: the smaller one if it can hold the mask as well."""
    return np.dtype(np.uint16 if tokenizer.mask_id < 2**16 else np.uint32)


# --------------------------------------------------------------------------------------------- processes


def tokenize_tasks(tasks, cfg, n_processes):
    """Yield (Result, next place, bytes read) for each of make_tasks' tasks, in their order.

    n_processes: 0 does the work in this process.
    """
    if n_processes:
        yield from tokenize_in_processes(tasks, cfg, n_processes)
        return
    tokenize = TaskTokenizer(cfg)
    for task, place, bytes_read in tasks:
        yield tokenize(task), place, bytes_read


def tokenize_in_processes(tasks, cfg, n_processes):
    """As tokenize_tasks, in a pool of processes."""
    running = collections.deque()
    pool = ProcessPoolExecutor(n_processes, multiprocessing.get_context("spawn"), start_process, (cfg,))
    try:
        for task, place, bytes_read in tasks:
            with interrupts_deferred():
                running.append((pool.submit(run_task, task), place, bytes_read))
            if len(running) > 3 * n_processes:  # which bounds the memory
                future, place, bytes_read = running.popleft()
                yield future.result(), place, bytes_read
        while running:
            future, place, bytes_read = running.popleft()
            yield future.result(), place, bytes_read
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


task_tokenizer = None  # of this process, if it is one of a pool's


def start_process(cfg):
    """Prepare a process of the pool: make its TaskTokenizer, and end it when its parent ends."""
    global task_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    task_tokenizer = TaskTokenizer(cfg)


def end_with(parent):
    """Wait for the parent's end, then end this process: a parent that was killed can't end its children."""
    multiprocessing.connection.wait([parent])
    os._exit(1)


def run_task(task):
    """The Result of a task, in a process of the pool."""
    return task_tokenizer(task)


@contextlib.contextmanager
def interrupts_deferred():
    """Let Ctrl-C wait for the end of the block.

    Processes that start in it never receive one: their parent tells them to stop.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
