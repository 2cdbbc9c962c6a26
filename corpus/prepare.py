"""Prepare a corpus: any text to token files.

    python data.py docs                                  # pydoc's topics and the standard library's docstrings; a folder of yours: ./docs
    python data.py shakespeare                           # downloads 1.1 MB
    python data.py my.jsonl.gz --field=text --tokenizer=gpt2
    python data.py 'crawl/*.parquet' folder/ --name=web --tokenizer=gpt2 --val=0.01
    zcat dump.gz | python data.py - --format=jsonl --name=dump
    python data.py hf:HuggingFaceFW/fineweb-edu --hf_config=sample-10BT --name=edu --tokenizer=gpt2
    python data.py inspect corpora/web                   # what is in it, and is it whole?
    python data.py export corpora/web megatron/web       # as Megatron's .bin and .idx

Writes corpora/<name>/: token files of uint16 or uint32, meta.json, and token_bytes.bin (uint16: every token's
length in UTF-8 bytes, for bits per byte). Each split starts with the end-of-document token, and every document
ends with one. The folder appears when it is complete; interrupted, the same command goes on where it stopped.
"""

import collections
import contextlib
import glob
import hashlib
import http.client
import json
import multiprocessing.connection
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import configurator
from configurator import setting
from corpus import inspect, tokenfiles, tokenizers
from corpus.sources import (
    BAD,
    COMPRESSED,
    SIZE,
    Place,
    cut_up,
    file_source,
    find_sources,
    replaced,
    separator_bytes,
    split_of,
    stamp,
    tasks,
)

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass
class Config:
    name: str = setting("", "folder under out (empty: the first source's name)")
    out: str = setting("corpora", "where corpora are kept")
    tokenizer: str = setting("", "bytes (the default), a tiktoken encoding such as gpt2, or the path of a tokenizer.json")
    eos: str = setting("", "the token that ends a document, where a tokenizer.json leaves it open")
    field: str = setting("text", "the text's field in .jsonl and .parquet files and datasets")
    format: Literal["auto", "txt", "jsonl", "parquet"] = setting("auto", "of all sources (auto: by their names; standard input is txt); names every file of a folder a source")
    separator: str = setting("", r"what stands between documents in .txt files, \n for a line's end (empty: a file is one document)")
    val: float = setting(0.1, "share of the text kept for validation, which no corpus goes without: documents, chosen by their hash; of a single document its end", above=0, high=0.999)
    dedup: bool = setting(True, "leave out documents that came before, letter for letter")
    bad_bytes: Literal["stop", "skip", "replace"] = setting("stop", "what to do with text that is not UTF-8: skip the document, or replace the bytes by U+FFFD")
    bad_records: Literal["stop", "skip"] = setting("stop", "what to do with records that are no JSON or have no text")
    workers: int = setting(0, "processes that tokenize (0: one per core, none for small inputs)", low=0)
    shard_tokens: int = setting(1 << 30, "tokens per file", low=1)
    hf_config: str = setting("", "configuration of a Hugging Face dataset")
    hf_split: str = setting("train", "split of a Hugging Face dataset")
    restart: bool = setting(False, "throw away what an interrupted preparation left")
    val_share: float = setting(0.0, "inspect and export: share of others' token files that is for validation, where none of them is", low=0, high=0.5)

    def problems(self):
        return [f"--name={self.name}: a folder's name holds no '/'; --out says where it is"] if "/" in self.name else []


# ----------------------------------------------------------------------------------- workers: from text to tokens


class Document(NamedTuple):
    digest: bytes  # of its text, SHA-256; b"" for a document that has no other beside it
    n_bytes: int
    tokens: bytes  # in the files' type, with eos at the end of the document
    starts: bool = True
    ends: bool = True
    split: str = ""  # where it is decided already


class Result(NamedTuple):
    documents: list
    left_out: dict  # why: how many documents and records
    replaced: int = 0  # places where bytes became U+FFFD


class Tokenize:
    """From a task to its tokens; made once per process."""

    def __init__(self, tokenizer, eos, cfg):
        self.tokens, self.cfg = tokenizers.load_tokenizer(tokenizer, eos=eos), cfg
        self.dtype = token_type(self.tokens)
        self.eos = np.array([self.tokens.eos_id], self.dtype)

    def __call__(self, task):
        if task.kind == "part":
            p = task.content
            ids = self.encode([p.text])[0]
            raw = (np.append(ids, self.eos) if p.ends else ids).tobytes()
            return Result([Document(p.digest, len(p.text.encode("utf-8")), raw, p.starts, p.ends, p.split)], {}, p.replaced)
        if task.kind == "skipped":
            return Result([], dict(undecodable=1))
        self.left_out, self.replaced = collections.Counter(), 0
        found = list(getattr(self, task.kind)(task))
        texts = [text for text in found if text]
        raw = [np.append(ids, self.eos).tobytes() for ids in self.encode(texts)]
        encoded = [text.encode("utf-8") for text in texts]
        return Result([Document(hashlib.sha256(e).digest(), len(e), r) for e, r in zip(encoded, raw)],
                      dict(self.left_out, empty=found.count("")), self.replaced)

    def encode(self, texts):
        """Ids of each text, in the files' type. Long ones go through the tokenizer in pieces, whose tokens are those of the whole."""
        short = [text if len(text) <= SIZE or not self.tokens.cuts else "" for text in texts]
        ids = [array.astype(self.dtype) for array in self.tokens.encode_batch(short)]
        for i, text in enumerate(texts):
            if text and not short[i]:
                ids[i] = np.concatenate([self.tokens.encode(piece).astype(self.dtype) for piece in cut_up(text)])
        return ids

    # Each yields a text, "" for an empty one, None for a record that is left out.

    def lines(self, task):
        for number, line in enumerate(task.content.split(b"\n"), task.first):
            if line.strip():
                yield self.record(line, f"{task.where}:{number}")

    def record(self, line, where):
        field, line = self.cfg.field, self.decoded(line, where, of=" of the line")
        if line is None:
            return None
        try:
            record = json.loads(line)
            problem = (f"no field '{field}'; there are {names_in(record)}; name the text's with --field" if not isinstance(record, dict) or field not in record
                       else unreadable(record[field], f"field '{field}'"))
            text = record[field] if not problem else None
        except (ValueError, RecursionError) as error:  # also integers too long for Python, and deep nesting
            problem = f"not JSON: {error}"
        return self.refused(where, problem) if problem else text

    def refused(self, where, problem):
        if self.cfg.bad_records == "skip":
            self.left_out["malformed"] += 1
            return None
        raise ValueError(f"{where}: {problem}; --bad_records=skip leaves such records out")

    def records(self, task):
        for number, text in enumerate(task.content, task.first):
            where = f"{task.where}, record {number}"
            if isinstance(text, bytes):
                yield self.decoded(text, where)
                continue
            problem = unreadable(text, "its text")
            yield self.refused(where, problem) if problem else text

    def separated(self, task):
        separator, byte = separator_bytes(self.cfg), task.first
        for raw in task.content.removesuffix(separator).split(separator):
            yield self.decoded(raw, task.where, byte)
            byte += len(raw) + len(separator)

    def files(self, task):
        for path, raw in task.content:
            yield self.decoded(raw, path)

    def decoded(self, raw, where, byte=0, of=""):
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            if self.cfg.bad_bytes == "stop":
                raise ValueError(f"{where}: not UTF-8 at byte {byte + problem.start}{of}; see --bad_bytes") from None
        if self.cfg.bad_bytes == "skip":
            self.left_out["undecodable"] += 1
            return None
        text, places = replaced(raw)
        self.replaced += places
        return text


def names_in(record):
    """The names of a record's fields, the first ten; of what is no record, none."""
    names = list(record)[:11] if isinstance(record, dict) else []
    return ", ".join([name if name.isprintable() else repr(name) for name in names[:10]] + ["…"] * (len(names) > 10)) or "none"


def unreadable(text, what):
    """What is wrong with a record's text, '' if nothing."""
    if not isinstance(text, str):
        return f"{what} is not text"
    return f"{what} holds half a character (a lone surrogate)" if BAD.search(text) else ""  # JSON's escapes can say what UTF-8 can't


def token_type(tokens):
    return np.dtype(np.uint16 if tokens.mask_id < 2**16 else np.uint32)


worker = None


def start_worker(*arguments):
    """Runs first in each process."""
    global worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process().sentinel

    def follow():  # a parent that was killed can't end its children
        multiprocessing.connection.wait([parent])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    worker = Tokenize(*arguments)


def work(task):
    return worker(task)


@contextlib.contextmanager
def without_interrupts():
    """Ctrl-C waits until this is over. Processes that start in here never hear of it: their parent tells them to stop."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def results(pending, arguments, workers):
    """Yield (result, place, bytes) for each of `tasks`, in their order; `workers` processes, or this one if there are none."""
    if not workers:
        here = Tokenize(*arguments)
        yield from ((here(task), place, behind) for task, place, behind in pending)
        return
    running = collections.deque()
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, arguments)
    try:
        for task, place, behind in pending:
            with without_interrupts():
                running.append((pool.submit(work, task), place, behind))
            if len(running) > 3 * workers:  # bounds the memory
                future, place, behind = running.popleft()
                yield future.result(), place, behind
        while running:
            future, place, behind = running.popleft()
            yield future.result(), place, behind
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# ------------------------------------------------------------------------------------------------- prepare


class Files:
    """The token files of one split, of at most `limit` tokens each."""

    def __init__(self, folder, split, limit, dtype, written):
        self.folder, self.split, self.limit, self.width = folder, split, limit, dtype.itemsize
        self.written = written  # [name, tokens] of each file
        if written and (folder / f"{split}.bin").exists():  # interrupted when `finish` had given it its last name
            (folder / f"{split}.bin").rename(folder / written[0][0])
        for name, tokens in written:
            os.truncate(folder / name, tokens * self.width)  # what came after the last commit is done again
        for path in folder.glob(f"{split}_*.bin"):
            if path.name not in (name for name, _ in written):
                path.unlink()
        self.file = open(folder / written[-1][0], "ab") if written else None

    def write(self, raw):
        while raw:  # each file but the last has exactly `limit` tokens, however the tokens arrive
            if not self.file or self.written[-1][1] >= self.limit:
                self.close()
                self.written.append([f"{self.split}_{len(self.written):05d}.bin", 0])
                self.file = open(self.folder / self.written[-1][0], "wb")
            some = raw[: (self.limit - self.written[-1][1]) * self.width]
            self.file.write(some)
            self.written[-1][1] += len(some) // self.width
            raw = raw[len(some) :]

    def flush(self):
        if self.file:
            tokenfiles.flush(self.file)

    def close(self):
        if self.file:
            self.flush()
            self.file.close()
            self.file = None

    def abandon(self):
        """Close what could not be written: on a full disk closing fails as writing did."""
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()


class Ledger:
    """What a preparation has done so far, in one SQLite file: what it prepares (its `plan`), its state, and the hashes of
    the documents it has seen. State and hashes change together or not at all, and the hashes need no memory."""

    def __init__(self, path, anew=False):
        try:
            self.open(path)
        except OSError:
            if not anew or not path.exists():
                raise
            path.unlink()  # damaged, but nothing in it is wanted
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
        found = self.db.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found else None

    def commit(self, **notes):
        self.db.executemany("INSERT OR REPLACE INTO notes VALUES (?, ?)", [(name, json.dumps(value)) for name, value in notes.items()])
        self.db.execute("COMMIT")
        self.db.execute("BEGIN EXCLUSIVE")

    def clear(self):
        self.db.execute("DELETE FROM notes")
        self.db.execute("DELETE FROM seen")

    def is_new(self, digest):
        return self.db.execute("INSERT OR IGNORE INTO seen VALUES (?)", (digest[:16],)).rowcount == 1

    def close(self):
        self.db.close()


def prepare(sources, folder, cfg, progress=lambda done, documents, tokens: None, commit_every=5.0):
    """Tokenize `sources` (or what they return for the folder of what is done so far) into `folder`, which appears only when complete.

    Returns the metadata. What was interrupted goes on where it stopped, from what lies beside `folder`. Raises ValueError, OSError or
    FileExistsError for what is wrong with the input or the disk, and leaves nothing behind then.
    """
    folder = Path(folder)
    building = begin(folder)
    tokens = tokenizers.load_tokenizer(cfg.tokenizer or "bytes", eos=cfg.eos)
    inside, fresh = building / "corpus", not building.exists()
    inside.mkdir(parents=True, exist_ok=True)
    try:
        ledger = Ledger(building / "ledger.sqlite", cfg.restart)
    except OSError:
        if fresh:
            shutil.rmtree(building, ignore_errors=True)
        raise
    keep = False
    try:
        if cfg.restart:
            ledger.clear()
            for path in building.glob("stdin.*"):
                path.unlink()
        state = ledger.read("state")
        keep = bool(state)  # a wrong command costs nothing that is done
        sources = sources(building) if callable(sources) else sources
        options = {k: v for k, v in asdict(cfg).items() if k not in ("name", "out", "workers", "restart", "val_share")}
        options |= dict(tokenizer=tokens.name, python=sys.version if any(s.kind == "docs" for s in sources) else "")
        plan = dict(options=options, sources=[list(s) for s in sources])
        if state:
            check_same(ledger.read("plan"), plan, building)
        else:
            state = dict(place=Place(), left_out=dict(duplicates=0, empty=0, undecodable=0, malformed=0), replaced=0, dropping=False,
                         counts={split: dict(tokens=0, bytes=0, documents=0) for split in ("train", "val")}, files=dict(train=[], val=[]))
            ledger.commit(plan=plan)
        keep = False
        tokenize(sources, inside, cfg, tokens, state, ledger, progress, commit_every)
        for source in sources:
            check_unchanged(source)
        meta = finish(sources, inside, tokens, state)
        inside.rename(folder)
    except (KeyboardInterrupt, BrokenProcessPool):
        keep = True
        raise
    except sqlite3.Error as problem:
        raise OSError(f"{building}: {problem}") from None
    finally:
        ledger.close()
        if not keep:
            shutil.rmtree(building, ignore_errors=True)
    return meta


def begin(folder):
    """The folder beside `folder` in which it is built; raises FileExistsError if `folder` is there already."""
    building = folder.with_name(f".{folder.name}.building")
    if folder.name in ("", ".", ".."):
        raise ValueError(f"--name={folder.name}: no name for a folder")
    if folder.exists():
        if not (building / "corpus").exists():  # killed between its last two acts
            shutil.rmtree(building, ignore_errors=True)
        raise FileExistsError(f"{folder} exists; remove it or choose another --name")
    return building


def check_same(old, new, building):
    """Raises ValueError if the plan of an interrupted preparation was another one."""
    if differ := [f"{k} {old['options'].get(k)!r} → {value!r}" for k, value in new["options"].items() if old["options"].get(k) != value]:
        raise ValueError(f"{building} holds an interrupted preparation with other settings ({', '.join(differ)}); finish that one, or add --restart")
    if old["sources"] != new["sources"]:
        before, now = ({s[1]: s for s in plan["sources"]} for plan in (old, new))
        changed = sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path)) or ["the sources' order"]
        raise ValueError(f"{changed[0]} changed since the preparation in {building} began; start again with --restart")


def check_unchanged(source):
    if source.changed and stamp(Path(source.path)) != (source.size, source.changed):
        raise ValueError(f"{source.path} changed while it was read; start again")


def tokenize(sources, inside, cfg, tokens, state, ledger, progress, commit_every):
    """Write the token files, from where `state` says on; `state` is then what came out."""
    dtype = token_type(tokens)
    files = {split: Files(inside, split, cfg.shard_tokens, dtype, state["files"][split]) for split in ("train", "val")}
    for split, counts in state["counts"].items():
        if not counts["tokens"]:
            files[split].write(np.array([tokens.eos_id], dtype).tobytes())
            counts["tokens"] = 1
    place = Place(*state["place"])
    sizes = np.cumsum([0] + [source.size for source in sources]).tolist()
    workers = cfg.workers or (os.cpu_count() if sizes[-1] > 16 * SIZE or any(source.kind == "hf" for source in sources) else 1)
    arguments = (cfg.tokenizer or "bytes", cfg.eos, cfg)
    last, left_out = time.monotonic(), state["left_out"]
    whole = False  # whether the state is that of the files and the ledger

    def commit():
        for split_files in files.values():
            split_files.flush()
        ledger.commit(state=state)

    try:
        commit()
        with contextlib.closing(results(tasks(sources, place, cfg, tokens.cuts), arguments, workers if workers > 1 else 0)) as arriving:
            whole = True
            for result, after, behind in arriving:
                whole = False
                for d in result.documents:
                    if d.starts:
                        state["dropping"] = cfg.dedup and d.digest != b"" and not ledger.is_new(d.digest)
                        left_out["duplicates"] += state["dropping"]
                    if state["dropping"]:
                        continue
                    split = d.split or split_of(d.digest, cfg.val)
                    files[split].write(d.tokens)
                    counts = state["counts"][split]
                    counts["tokens"] += len(d.tokens) // dtype.itemsize
                    counts["bytes"] += d.n_bytes
                    counts["documents"] += d.ends
                for why, n in result.left_out.items():
                    left_out[why] += n
                state["replaced"] += result.replaced
                state["place"] = after
                progress(sizes[after.source] + behind, *(sum(c[k] for c in state["counts"].values()) for k in ("documents", "tokens")))
                if time.monotonic() - last >= commit_every:
                    commit()
                    last = time.monotonic()
                whole = True
        whole = False
        for split_files in files.values():
            split_files.close()
    except (KeyboardInterrupt, BrokenProcessPool):
        if whole:  # else what came after the last commit is done again
            with contextlib.suppress(OSError, sqlite3.Error):
                commit()
        raise
    finally:
        for split_files in files.values():
            split_files.abandon()


def finish(sources, inside, tokens, state):
    """Check what came out and describe it in meta.json. Returns the metadata."""
    names = list(dict.fromkeys(Path(s.path).name for s in sources))
    for split, counts in state["counts"].items():
        if not counts["bytes"]:
            reasons = ", ".join(f"{n} {what}" for what, n in state["left_out"].items() if n)
            raise ValueError(f"{', '.join(names[:3])}: no text for the {split} split" + (f" (left out: {reasons})" if reasons else "")
                             + "; use more text or another --val")
    meta = dict(format=2, sources=names[:100], tokenizer=tokens.name, n_vocab=tokens.n_vocab, eos_id=tokens.eos_id, mask_id=tokens.mask_id,
                dtype=token_type(tokens).name, left_out=state["left_out"], replaced=state["replaced"])
    for split, counts in state["counts"].items():
        written = state["files"][split]
        if len(written) == 1 and (inside / written[0][0]).exists():
            (inside / written[0][0]).rename(inside / f"{split}.bin")
        if len(written) == 1:
            written = [[f"{split}.bin", written[0][1]]]
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(lambda item: hashlib.sha256(np.memmap(inside / item[0], np.uint8, mode="r")).hexdigest(), written))
        whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        meta[split] = dict(counts, sha256=whole, files=[dict(name=name, tokens=n, sha256=digest) for (name, n), digest in zip(written, digests)])
    if isinstance(tokens, tokenizers.TokenizerFile):
        shutil.copyfile(tokens.path, inside / "tokenizer.json")
    tokens.token_bytes().tofile(inside / "token_bytes.bin")
    (inside / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    for path in (*inside.iterdir(), inside):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return meta


# ---------------------------------------------------------------------------------------------------- main


def main():
    names = [a for a in sys.argv[1:] if a == "-" or not a.startswith("-")]
    cfg = configurator.load(Config, [a for a in sys.argv[1:] if a != "-" and a.startswith("-")], about=__doc__)
    signal.signal(signal.SIGTERM, stop)
    try:
        if names[:1] == ["inspect"]:
            if len(names) != 2:
                raise ValueError("inspect what? python data.py inspect FOLDER")
            try:
                inspect.inspect(names[1], cfg.tokenizer, cfg.val_share)
                return sys.stdout.flush()
            except BrokenPipeError:  # as of `| head`
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries again at its end, and says so
                sys.exit(128 + signal.SIGPIPE)
        if names[:1] == ["export"]:
            if len(names) != 3:
                raise ValueError("export what to where? python data.py export FOLDER PREFIX")
            return export(*names[1:], cfg)
        folder = Path(cfg.out) / (cfg.name or default_name(names or ["docs"]))
        meta = prepare_with_bar(names or ["docs"], folder, cfg)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenProcessPool:
        configurator.fail("a tokenizing process was ended from outside (out of memory?); the same command goes on from here, fewer --workers need less")
    except OSError as problem:
        configurator.fail(f"{problem.filename}: {problem.strerror}" if problem.filename and problem.strerror else str(problem.strerror or problem))
    except ValueError as problem:
        configurator.fail(str(problem))
    for split in ("train", "val"):
        s = meta[split]
        more = f" and {len(s['files']) - 1} more" if len(s["files"]) > 1 else ""
        print(f"{folder}/{s['files'][0]['name']}{more}: {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes")
    if any(meta["left_out"].values()):
        print("left out: " + ", ".join(f"{n:,} {what}" for what, n in meta["left_out"].items() if n))
    if meta["replaced"]:
        print(f"replaced: bytes that are no UTF-8, in {meta['replaced']:,} place{'s' * (meta['replaced'] > 1)}")


def stop(*_):
    raise KeyboardInterrupt


def default_name(names):
    """A corpus's name from its first source's."""
    name = names[0].removeprefix("hf:")
    if name == "-":
        return "stdin"
    if glob.has_magic(name):
        if not Path(name).exists() and not glob.glob(name, recursive=True):
            raise FileNotFoundError(f"{name}: no file matches")
        raise ValueError(f"{name}: give the corpus a name with --name=")
    path = Path(name)
    path = path.resolve() if path.is_dir() else path
    return path.name if path.is_dir() or names[0].startswith("hf:") else Path(path.stem).stem if path.suffix in COMPRESSED else path.stem


def export(folder, prefix, cfg):
    """Write a corpus's splits as Megatron's prefix_train.bin, .idx and prefix_val.bin, .idx."""
    corpus = tokenfiles.load_corpus(folder, cfg.tokenizer, cfg.val_share)
    for path in (f"{prefix}_{split}{end}" for split in ("train", "val") for end in (".bin", ".idx")):
        if Path(path).exists():
            raise FileExistsError(f"{path} exists; remove it or choose another prefix")
    written = []
    try:
        for split, stream in (("train", corpus.train), ("val", corpus.val)):
            tokenfiles.write_megatron(stream, corpus.meta["eos_id"], f"{prefix}_{split}")
            written += [Path(f"{prefix}_{split}{end}") for end in (".bin", ".idx")]
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        print(f"{prefix}_{split}.bin and .idx: {len(stream):,} tokens")


def prepare_with_bar(names, folder, cfg):
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    begin(folder)
    tokenizers.load_tokenizer(cfg.tokenizer or "bytes", eos=cfg.eos)  # if there is none, say so before anything is downloaded
    names = [str(download(SHAKESPEARE, Path(cfg.out) / ".shakespeare.txt")) if name == "shakespeare" and not Path(name).exists() else name for name in names]
    sources = find_sources([name for name in names if name != "-"], cfg)
    total = sum(s.size for s in sources) if "-" not in names else 0
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[counts]}"),  # short: 80 characters are to hold it
               *([TransferSpeedColumn(), TextColumn("left"), TimeRemainingColumn()] if total else [TimeElapsedColumn()]))
    with Progress(*columns) as bar:
        task = bar.add_task(folder.name, total=total or None, counts="")

        def progress(done, n_documents, n_tokens):
            bar.update(task, completed=done, counts=f"{n_documents:,} documents, {n_tokens:,} tokens")

        def with_input(building):
            return sources + [spooled(sys.stdin.buffer, building, cfg)]

        meta = prepare(with_input if "-" in names else sources, folder, cfg, progress)
        bar.update(task, completed=total or None)
    return meta


def spooled(stream, building, cfg):
    """Standard input as a file: it is read more than once, and again after an interruption. Raises ValueError if it is another one then."""
    final = building / f"stdin.{'txt' if cfg.format == 'auto' else cfg.format}"
    arriving = building / "stdin.part"
    try:
        with open(arriving, "wb") as file:
            shutil.copyfileobj(stream, file, SIZE)
        if final.is_file() and data_digest(final) != data_digest(arriving):
            raise ValueError(f"{final}: standard input changed since the preparation in {building} began; start again with --restart")
        if not final.is_file():
            arriving.rename(final)
    finally:
        arriving.unlink(missing_ok=True)
    return file_source(final, cfg)


def data_digest(path):
    return hashlib.sha256(np.memmap(path, np.uint8, mode="r") if path.stat().st_size else b"").hexdigest()


def download(url, path):
    """Fetch `url` to `path` once; an interrupted download leaves nothing behind."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(".part")
        try:
            with urllib.request.urlopen(url, timeout=60) as response, open(partial_path, "wb") as file:
                shutil.copyfileobj(response, file)
                if file.tell() != int(response.headers.get("Content-Length", file.tell())):
                    raise OSError(f"the connection closed after {file.tell()} bytes")
        except (OSError, http.client.HTTPException) as problem:
            partial_path.unlink(missing_ok=True)
            raise OSError(f"cannot download {url}: {problem}; save it as a .txt file and give its path instead") from None
        partial_path.rename(path)
    return path


if __name__ == "__main__":
    main()
