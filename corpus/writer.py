"""What a preparation writes: the token files of both splits, and a ledger of how far it came.

Files and ledger agree whenever the ledger commits: what the files hold beyond that is done again.
"""

import contextlib
import json
import os
import sqlite3
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from corpus.files import sync_to_disk
from corpus.pairs import mark_tokens
from corpus.tasks import Place, choose_split
from corpus.workers import token_dtype

SPLITS = ("train", "val")
COUNTS = ("tokens", "bytes", "token_bytes", "documents")  # token_bytes: the bytes that the tokens spell


@dataclass
class State:
    """How far a preparation came. The ledger keeps it, under these names."""

    place: Place = Place()
    left_out: dict = field(default_factory=lambda: dict(duplicates=0, empty=0, undecodable=0, malformed=0))
    replaced: int = 0  # places where bytes became U+FFFD
    without_separator: list = field(default_factory=list)  # files in which the separator does not occur
    dropping: bool = False  # whether the last document, of which more pieces may come, is a duplicate
    counts: dict = field(default_factory=lambda: {split: dict.fromkeys(COUNTS, 0) for split in SPLITS})
    files: dict = field(default_factory=lambda: {s: [] for s in SPLITS})  # [name, tokens] of each token file
    answer_files: dict = field(default_factory=lambda: {s: [] for s in SPLITS})  # of pairs: the marks' files

    def total(self, what):
        """The tokens, bytes or documents of both splits together."""
        return sum(counts[what] for counts in self.counts.values())


class CorpusWriter:
    """Writes the documents of Results to their splits, and keeps files, state and ledger together."""

    def __init__(self, folder, cfg, tokenizer, state, ledger):
        self.cfg, self.state, self.ledger = cfg, state, ledger
        self.dtype = token_dtype(tokenizer)
        self.shards = {split: ShardWriter(folder, split, cfg.shard_tokens, self.dtype, state.files[split])
                       for split in SPLITS}
        self.marks = {}
        if cfg.sft:
            self.marks = {split: ShardWriter(folder, f"answers_{split}", cfg.shard_tokens, np.dtype(np.uint8),
                                             state.answer_files[split]) for split in SPLITS}
        for split in SPLITS:
            if not state.counts[split]["tokens"]:  # each split begins with an eos
                self.shards[split].write(np.array([tokenizer.eos_id], self.dtype).tobytes())
                state.counts[split]["tokens"] = 1
                if cfg.sft:
                    self.marks[split].write(bytes(1))
                    state.counts[split]["answer_tokens"] = 0

    def add(self, result, next_place):
        """Write a task's Result, but no document that came before. next_place: where the next task starts."""
        state = self.state
        for document in result.documents:
            if document.is_first:
                may_repeat = self.cfg.dedup and document.digest != b""
                state.dropping = may_repeat and not self.ledger.add(document.digest)
                state.left_out["duplicates"] += state.dropping
            if state.dropping:
                continue
            split = document.split or choose_split(document.digest, self.cfg.val)
            self.shards[split].write(document.tokens)
            counts, n_tokens = state.counts[split], len(document.tokens) // self.dtype.itemsize
            if self.cfg.sft:
                self.marks[split].write(mark_tokens(n_tokens, document.n_answer))
                counts["answer_tokens"] += document.n_answer
            counts["tokens"] += n_tokens
            counts["bytes"] += document.n_bytes
            counts["token_bytes"] += document.n_token_bytes
            counts["documents"] += document.is_last
        for reason, n in result.left_out.items():
            state.left_out[reason] += n
        state.replaced += result.n_replaced
        state.without_separator += result.without_separator
        state.place = next_place

    def commit(self):
        """Make the files last, then the state that describes them."""
        for shards in self.all_shards():
            shards.sync()
        self.ledger.commit(state=asdict(self.state))

    def close(self):
        """Close the files; what was written is on the disk then."""
        for shards in self.all_shards():
            shards.close()

    def abandon(self):
        """Close the files, whether they can be written or not."""
        for shards in self.all_shards():
            shards.abandon()

    def all_shards(self):
        return [*self.shards.values(), *self.marks.values()]


class ShardWriter:
    """Writes the token files of one split, each of `limit` tokens but the last.

    shards: [name, tokens] of each file, kept up to date; at first those that an interrupted preparation left.
    """

    def __init__(self, folder, split, limit, dtype, shards):
        self.folder, self.split, self.limit, self.itemsize = folder, split, limit, dtype.itemsize
        self.shards = shards
        final = folder / f"{split}.bin"
        if shards and final.exists():  # interrupted when its only file had been given this name
            final.rename(folder / shards[0][0])
        for name, n_tokens in shards:
            os.truncate(folder / name, n_tokens * self.itemsize)  # what came after the commit is done again
        for path in folder.glob(f"{split}_*.bin"):
            if path.name not in [name for name, _ in shards]:
                path.unlink()
        self.file = open(folder / shards[-1][0], "ab") if shards else None

    def write(self, raw):
        """Write the bytes of tokens. Where a file ends does not depend on the portions in which they come."""
        while raw:
            if not self.file or self.shards[-1][1] >= self.limit:
                self.close()
                name = f"{self.split}_{len(self.shards):05d}.bin"
                self.shards.append([name, 0])
                self.file = open(self.folder / name, "wb")
            room = (self.limit - self.shards[-1][1]) * self.itemsize
            part, raw = raw[:room], raw[room:]
            self.file.write(part)
            self.shards[-1][1] += len(part) // self.itemsize

    def sync(self):
        if self.file:
            sync_to_disk(self.file)

    def close(self):
        if self.file:
            self.sync()
            self.file.close()
            self.file = None

    def abandon(self):
        """Close the file; on a full disk that fails as writing did."""
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()


class Ledger:
    """What a preparation has done so far, in one SQLite file.

    It holds what is prepared (the plan), the State, and the digests of the documents that came. They change
    together or not at all, and the digests need no memory. Raises ValueError if another process holds it, and
    OSError if it is damaged; `anew` replaces a damaged one.
    """

    def __init__(self, path, anew=False):
        try:
            self.open(path)
        except OSError:
            if not anew or not path.exists():
                raise
            path.unlink()
            self.open(path)

    def open(self, path):
        self.db = sqlite3.connect(path, isolation_level=None, timeout=0.1)
        try:
            self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.db.execute("PRAGMA cache_size = -65536")
            self.db.execute("BEGIN EXCLUSIVE")
            self.db.execute("CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT)")
            self.db.execute("CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY) WITHOUT ROWID")
        except sqlite3.Error as problem:
            self.db.close()
            if "locked" in str(problem):
                raise ValueError(f"another process is preparing {Path(path).parent}") from None
            raise OSError(f"{path}: {problem}; if it is damaged, start again with --restart") from None

    def read(self, name):
        """What was committed under this name, or None."""
        row = self.db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def read_state(self):
        """The State that was committed last, or None."""
        state = self.read("state")
        return State(**(state | dict(place=Place(*state["place"])))) if state else None

    def commit(self, **notes):
        """Make these values, and the digests that were added, last."""
        rows = [(name, json.dumps(value)) for name, value in notes.items()]
        self.db.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", rows)
        self.db.execute("COMMIT")
        self.db.execute("BEGIN EXCLUSIVE")

    def clear(self):
        self.db.execute("DELETE FROM notes")
        self.db.execute("DELETE FROM seen")

    def add(self, digest):
        """Note a document's digest. Returns whether it is new."""
        return self.db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],)).rowcount == 1

    def close(self):
        self.db.close()
