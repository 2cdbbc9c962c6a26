"""Prepare a corpus: any text to token files.

    python data.py docs                                  # Python's own documentation; a folder: ./docs
    python data.py shakespeare                           # downloads 1.1 MB
    python data.py my.jsonl.gz --field=text --tokenizer=gpt2
    python data.py 'crawl/*.parquet' folder/ --name=web --tokenizer=gpt2 --val=0.01
    python data.py docs --tokenizer=bpe:4096             # learned from the training documents
    zcat dump.gz | python data.py - --format=jsonl --name=dump
    python data.py debian:dict-gcide debian:anarchism --name=english   # the text in Debian's packages
    python data.py hf:HuggingFaceFW/fineweb-edu --hf_config=sample-10BT --name=edu --tokenizer=gpt2
    python data.py chat.jsonl --sft --tokenizer=smollm/  # question-answer pairs, with its chat template
    python data.py debian:dict-gcide --sft               # questions about words, of a dictionary's entries
    python data.py inspect corpora/web                   # what is in it, and is it whole?
    python data.py export corpora/web megatron/web       # as Megatron's .bin and .idx

Writes corpora/<name>/: token files of uint16 or uint32, meta.json, and token_bytes.bin (uint16: every
token's length in UTF-8 bytes, for bits per byte). Each split starts with the end-of-document token, and every
document ends with one. The folder appears when it is complete; interrupted, the same command goes on where
it stopped.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import configurator
import terminal
from configurator import neutral, setting
from corpus import bpe, chat, cutting, debian, fetch, tokenizers
from corpus.files import no_empty_parents, sha256_of, sync_path
from corpus.inspect import inspect_corpus
from corpus.megatron_dataset import write_megatron
from corpus.sources import check_unchanged, find_sources, packing
from corpus.tasks import make_tasks
from corpus.tokenfiles import load_corpus
from corpus.workers import token_dtype, tokenize_tasks
from corpus.writer import CorpusWriter, Ledger, State

COMMIT_SECONDS = 5.0  # between commits: what is lost at most when the process is killed
VERSION = 2  # of what comes out of the same text and settings: no preparation goes on with another one

# ---------------------------------------------------------------------------------------------- settings


@dataclass
class Config:
    """What a preparation does. `neutral` settings do not change the corpus."""

    name: str = neutral("", "folder under out (empty: the first source's name)")
    out: str = neutral("corpora", "where corpora are kept")
    tokenizer: str = setting(
        "", "bytes (the default), a tiktoken encoding such as gpt2, the path of a tokenizer.json, "
        "or bpe:N: one of N tokens that is learned from the training documents first")
    eos: str = setting("", "the token that ends a document, where a tokenizer.json leaves it open")
    field: str = setting("text", "the text's field in .jsonl and .parquet files and datasets")
    format: Literal["auto", "txt", "jsonl", "json", "parquet"] = setting(
        "auto", "of all sources (auto: by their names; standard input is txt, of pairs jsonl); "
        "names every file of a folder a source; json: a list of pairs")
    separator: str = setting(
        "", r"what stands between documents in .txt files, \n for a line's end (also \r\n's), \t, \r "
        "(empty: a file is one document)")
    max_document: int = neutral(
        100_000_000, "bytes of the longest line, record or document between separators: it is held in memory "
        "about seven times", low=1)
    val: float = setting(
        0.1, "share of the text kept for validation, which no corpus goes without: documents, chosen by "
        "their hash; of a single document its end", above=0, high=0.999)
    dedup: bool = setting(True, "leave out documents that came before, letter for letter")
    bad_bytes: Literal["stop", "skip", "replace"] = setting(
        "stop", "what to do with text that is not UTF-8: skip the document, or replace the bytes by U+FFFD")
    bad_records: Literal["stop", "skip"] = setting(
        "stop", "what to do with records that are no JSON or have no text")
    workers: int = neutral(
        0, "processes that tokenize (0: one per core, none for small inputs)", low=0, high=1024)
    shard_tokens: int = setting(1 << 30, "tokens per file", low=1)
    sft: bool = setting(
        False, "the sources are question-answer pairs: prompt and answer, or messages with roles")
    template: str = setting(
        "auto", "of pairs: the chat template, a Jinja file; plain: every message on lines of its own; "
        "auto: that of the tokenizer's folder, plain if it has none")
    hf_config: str = setting("", "configuration of a Hugging Face dataset")
    hf_split: str = setting("train", "split of a Hugging Face dataset")
    restart: bool = neutral(False, "throw away what an interrupted preparation left")
    val_share: float = neutral(
        0.0, "inspect and export: share of others' token files that is for validation, where none of them is",
        low=0, high=0.5)
    eos_opens: bool = neutral(
        False, "inspect and export: the eos of others' token files begins each document instead of ending it")

    NEEDS = {"template": "sft=True", "format=json": "sft=True"}

    def problems(self):
        if self.sft:
            for name in ("field", "separator"):
                if getattr(self, name) != getattr(Config, name):
                    yield f"{name} is of texts; pairs have fields of their own (docs/data.md)"
        if self.sft and self.format == "txt":
            yield "format=txt: text has no pairs"
        if "/" in self.name:
            yield f"--name={self.name}: a folder's name holds no '/'; --out says where it is"
        try:
            is_learned = bpe.vocabulary_size(self.tokenizer) is not None
        except ValueError as problem:
            yield str(problem)
        else:
            if is_learned and self.eos:
                yield f"eos={self.eos}: a tokenizer that is learned ends documents with {bpe.EOS}"

    def foreign(self):
        """What others' token files do not say themselves, as `load_corpus` takes it."""
        return dict(tokenizer_name=self.tokenizer, val_share=self.val_share, eos=self.eos,
                    eos_opens=self.eos_opens)

    def tokenizer_name(self):
        return self.tokenizer or "bytes"


# -------------------------------------------------------------------------------------------- the command


def main():
    """`python data.py …`"""
    names = [a for a in sys.argv[1:] if a == "-" or not a.startswith("-")]
    flags = [a for a in sys.argv[1:] if a != "-" and a.startswith("-")]
    cfg = configurator.load(Config, flags, about=__doc__)
    for signum in terminal.stop_signals():
        signal.signal(signum, interrupt)
    try:
        run(names, cfg)
    except KeyboardInterrupt:
        print("data.py: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except BrokenProcessPool:
        configurator.fail("a tokenizing process was ended from outside (out of memory?); "
                          "the same command goes on from here, fewer --workers need less")
    except OSError as problem:
        if problem.filename and problem.strerror:
            configurator.fail(f"{problem.filename}: {problem.strerror}")
        configurator.fail(problem.strerror or problem)
    except ValueError as problem:
        configurator.fail(problem)


def interrupt(*_):
    """The stop signals' handler, also where SIGINT is ignored."""
    raise KeyboardInterrupt


def run(names, cfg):
    """Do what the names on the command line ask for: inspect, export, or prepare."""
    if names[:1] == ["inspect"]:
        if len(names) != 2:
            raise ValueError("inspect what? python data.py inspect FOLDER")
        return inspect_corpus(names[1], **cfg.foreign())
    terminal.keep_going()
    if names[:1] == ["export"]:
        if len(names) != 3:
            raise ValueError("export what to where? python data.py export FOLDER PREFIX")
        export(names[1], names[2], cfg)
    else:
        names = names or ["docs"]
        folder = Path(cfg.out) / (cfg.name or default_name(names))
        meta = prepare_by_name(names, folder, cfg)
        report(folder, meta)
        wanted = bpe.vocabulary_size(cfg.tokenizer) or 0
        if meta["n_vocab"] < wanted:
            print(f"the training text has pairs for {meta['n_vocab']:,} tokens, not for {wanted:,}")


def export(folder, prefix, cfg):
    """Write a corpus as Megatron's PREFIX_train.bin, .idx and PREFIX_val.bin, .idx: both splits, or none."""
    corpus = load_corpus(folder, **cfg.foreign())
    if corpus.train_pairs:
        raise ValueError(f"{folder} holds question-answer pairs: Megatron's files can't say which tokens are "
                         "answers")
    streams = {f"{prefix}_train": corpus.train, f"{prefix}_val": corpus.val}
    for path in files_of(streams):
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it or choose another prefix")
    written = []
    try:
        for split_prefix, stream in streams.items():
            write_megatron(stream, corpus.meta["eos_id"], split_prefix)
            written.append(split_prefix)
    except BaseException:
        for path in files_of(written):
            path.unlink(missing_ok=True)
        raise
    for split_prefix, stream in streams.items():
        print(f"{split_prefix}.bin and .idx: {len(stream):,} tokens")


def files_of(prefixes):
    """The files of Megatron's datasets of these prefixes."""
    return [Path(f"{prefix}{end}") for prefix in prefixes for end in (".bin", ".idx")]


def report(folder, meta):
    """Print what a preparation made."""
    for split in ("train", "val"):
        counts, files = meta[split], meta[split]["files"]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        what, answers = "documents", ""
        if "answer_files" in counts:
            what, answers = "pairs", f" ({counts['answer_tokens']:,} of answers)"
        print(f"{folder}/{files[0]['name']}{more}: {counts['documents']:,} {what}, "
              f"{counts['tokens']:,} tokens{answers}, {counts['bytes']:,} bytes")
    left_out = [f"{n:,} {reason}" for reason, n in meta["left_out"].items() if n]
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    n_bytes, n_token_bytes = (meta["train"][what] + meta["val"][what] for what in ("bytes", "token_bytes"))
    if n_bytes != n_token_bytes:
        print(f"the tokenizer changes text: its tokens spell {n_token_bytes:,} bytes, not {n_bytes:,}; "
              "bits/byte count those of the text")
    if meta["without_separator"]:
        files = meta["without_separator"]
        more = ", …" if len(files) > 3 else ""
        print(f"the separator occurs nowhere in {', '.join(files[:3])}{more}: each is one document")
    if meta["replaced"]:
        places = "place" if meta["replaced"] == 1 else "places"
        print(f"replaced: bytes that are no UTF-8, in {meta['replaced']:,} {places}")


def default_name(names):
    """The name of a corpus: its first source's."""
    if package := debian.package_of(names[0]):
        return package
    name = names[0].removeprefix("hf:")
    if name == "-":
        return "stdin"
    if glob.has_magic(name) and not os.path.lexists(name):
        if not glob.glob(name, recursive=True):
            raise FileNotFoundError(f"{name}: no file matches")
        raise ValueError(f"{name}: give the corpus a name with --name=")
    path = Path(name)
    if path.is_dir():
        return path.resolve().name
    if names[0].startswith("hf:"):
        return path.name
    return Path(path.stem).stem if packing(path) else path.stem


def prepare_by_name(names, folder, cfg):
    """Prepare a corpus of the sources with these names, with a progress bar. Returns its meta.json."""
    # What is wrong with folder or tokenizer, before anything is downloaded.
    work_folder_of(folder)
    size = bpe.vocabulary_size(cfg.tokenizer)
    if size is None:
        tokenizer = load_tokenizer(cfg)
        if cfg.sft:
            warn_of_missing_tokens(chat.template_of(cfg, tokenizer))
    else:
        print(f"learns {size:,} tokens from the training documents first", flush=True)

    files = []
    for name in names:
        if name == "shakespeare" and not Path(name).exists():
            name = str(fetch.download(fetch.SHAKESPEARE, Path(cfg.out) / ".shakespeare.txt"))
        if package := debian.package_of(name):
            name = str(debian.download(package, Path(cfg.out) / ".debian"))
            print(f"{package}: {debian.licences(name)}", flush=True)
        if name != "-":
            files.append(name)
    sources = find_sources(files, cfg, warn)
    if "-" in names:
        stdin, total = sys.stdin.buffer, None
    else:
        stdin, total = None, sum(source.size for source in sources) or None

    with progress_bar(is_timed=total is not None) as bar:
        task = bar.add_task(folder.name, total=total, counts="")

        def show(n_bytes, n_documents, n_tokens):
            bar.update(task, completed=n_bytes, counts=f"{n_documents:,} documents, {n_tokens:,} tokens")

        meta = prepare(sources, folder, cfg, show, stdin)
        bar.update(task, completed=total)
    return meta


def warn_of_missing_tokens(template):
    """Say which of a chat template's special tokens the tokenizer has not."""
    if missing := template.missing_tokens:
        warn(f"the chat template's {', '.join(missing[:5])} are no special tokens of tokenizer "
             f"'{template.tokenizer.name}': they become text")


def warn(line):
    """Say what is left out, beside what is printed of the result."""
    print(f"data.py: {line}", file=sys.stderr)


def progress_bar(is_timed):
    """A progress bar that fits into 80 characters; is_timed: it knows when it will end."""
    from rich import progress

    columns = [progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
               progress.TextColumn("{task.fields[counts]}")]
    if is_timed:
        columns += [progress.TransferSpeedColumn()]
        columns += [progress.TextColumn("left"), progress.TimeRemainingColumn()]
    else:
        columns += [progress.TimeElapsedColumn()]
    return progress.Progress(*columns)


# -------------------------------------------------------------------------------------------- preparation


def prepare(sources, folder, cfg, progress=None, stdin=None):
    """Tokenize sources into `folder`, which appears when it is complete. Returns its meta.json.

    progress(bytes, documents, tokens) is called after each task; stdin: a binary stream, one more source.
    What was interrupted goes on where it stopped, from the work folder beside `folder`. Raises ValueError,
    OSError or FileExistsError for what is wrong with the input or the disk, and leaves nothing behind then.
    """
    folder = Path(folder)
    work_folder = work_folder_of(folder)
    if bpe.vocabulary_size(cfg.tokenizer) is None:
        load_tokenizer(cfg)  # or nothing is begun
    with no_empty_parents(work_folder):
        return prepare_in(work_folder, sources, folder, cfg, progress, stdin)


def prepare_in(work_folder, sources, folder, cfg, progress, stdin):
    """As `prepare`, with its work folder."""
    ledger = open_ledger(work_folder, cfg)
    corpus_folder = work_folder / "corpus"
    keep = False  # the work folder, for another try
    try:
        if cfg.restart:
            ledger.clear()
            for path in (*work_folder.glob("stdin.*"), *work_folder.glob("bpe_*.json")):
                path.unlink()
        state = ledger.read_state()
        keep = state is not None  # a wrong command costs nothing that is done

        if stdin:
            sources = [*sources, fetch.save_standard_input(stdin, work_folder, cfg)]
        is_learned = bpe.vocabulary_size(cfg.tokenizer) is not None
        cfg = learn_tokenizer(sources, cfg, work_folder)
        tokenizer = load_tokenizer(cfg)
        template = chat.template_of(cfg, tokenizer) if cfg.sft else None
        if template and is_learned:
            warn_of_missing_tokens(template)
        plan = make_plan(sources, cfg, tokenizer.name, template)
        if state:
            check_plan(ledger.read("plan"), plan, work_folder)
        else:
            state = State()
            ledger.commit(plan=plan)
        keep = False

        tokenize(sources, corpus_folder, cfg, tokenizer, state, ledger, progress)
        for source in sources:
            check_unchanged(source)
        meta = finish(sources, corpus_folder, cfg, tokenizer, state, template)
        corpus_folder.rename(folder)
    except (KeyboardInterrupt, BrokenProcessPool):
        keep = True
        raise
    except sqlite3.Error as problem:
        raise OSError(f"{work_folder}: {problem}") from None
    finally:
        ledger.close()
        if not keep:
            shutil.rmtree(work_folder, ignore_errors=True)
    return meta


def learn_tokenizer(sources, cfg, work_folder):
    """Learn a tokenizer into the work folder, if the settings ask for one; settings that name its file.

    One that is there goes on, if it was learned from the same sources by the same settings.
    """
    size = bpe.vocabulary_size(cfg.tokenizer)
    if size is None:
        return cfg
    learned_from = json.dumps(make_plan(sources, cfg, cfg.tokenizer)).encode("utf-8")
    path = work_folder / f"bpe_{hashlib.sha256(learned_from).hexdigest()[:16]}.json"
    if not path.exists():
        bpe.learn(size, sources, cfg, path)
    return replace(cfg, tokenizer=str(path), eos=bpe.EOS)


def load_tokenizer(cfg):
    """The tokenizer of a preparation. Raises ValueError for one that loses text."""
    tokenizer = tokenizers.load_tokenizer(cfg.tokenizer_name(), eos=cfg.eos)
    if isinstance(tokenizer, tokenizers.HuggingFaceTokenizer):
        tokenizer.check_text()
    return tokenizer


def work_folder_of(folder):
    """The folder .NAME.building in which a corpus is made. Raises FileExistsError if the corpus is there."""
    work_folder = folder.with_name(f".{folder.name}.building")
    if folder.name in ("", ".", ".."):
        raise ValueError(f"--name={folder.name}: no name for a folder")
    if set(folder.name) & set(",:") or folder.name != folder.name.strip():
        raise ValueError(f"{folder}: train.py could not read that name, as ',' separates corpora and ':' "
                         "stands before their weights; choose another one with --name=")
    if folder.exists():
        if not (work_folder / "corpus").exists():  # killed between the last two acts of `prepare`
            shutil.rmtree(work_folder, ignore_errors=True)
        raise FileExistsError(f"{folder} exists; remove it or choose another --name")
    return work_folder


def open_ledger(work_folder, cfg):
    """The ledger of an interrupted preparation, or a new one. Raises ValueError or OSError."""
    is_new = not work_folder.exists()
    (work_folder / "corpus").mkdir(parents=True, exist_ok=True)
    try:
        return Ledger(work_folder / "ledger.sqlite", anew=cfg.restart)
    except OSError:
        if is_new:
            shutil.rmtree(work_folder, ignore_errors=True)
        raise


def make_plan(sources, cfg, tokenizer_name, template=None):
    """What a preparation that goes on must have in common with the one that was interrupted."""
    neutral_settings = configurator.neutral_settings(Config)
    options = {name: value for name, value in asdict(cfg).items() if name not in neutral_settings}
    uses_docs = any(source.kind == "docs" for source in sources)
    options |= dict(tokenizer=tokenizer_name, python=sys.version if uses_docs else "", version=VERSION)
    if template:
        options["template"] = hashlib.sha256(template.source.encode("utf-8")).hexdigest()[:16]
    return dict(options=options, sources=[list(source) for source in sources])


def check_plan(old, new, work_folder):
    """Raise ValueError if an interrupted preparation had other settings or sources."""
    old_options = old["options"]
    changes = [f"{name} {old_options.get(name)!r} → {value!r}" for name, value in new["options"].items()
               if old_options.get(name) != value]
    if changes:
        raise ValueError(f"{work_folder} holds an interrupted preparation with other settings "
                         f"({', '.join(changes)}); finish that one, or add --restart")
    if old["sources"] != new["sources"]:
        before = {source[1]: source for source in old["sources"]}  # by their paths
        now = {source[1]: source for source in new["sources"]}
        paths = sorted(path for path in before | now if before.get(path) != now.get(path))
        what = paths[0] if paths else "the sources' order"
        raise ValueError(f"{what} changed since the preparation in {work_folder} began; "
                         "start again with --restart")


def tokenize(sources, folder, cfg, tokenizer, state, ledger, progress):
    """Write the token files in `folder`, from where `state` says on; `state` then says what is in them."""
    bytes_before = [0, *itertools.accumulate(source.size for source in sources)]  # each source
    writer = CorpusWriter(folder, cfg, tokenizer, state, ledger)
    tasks = make_tasks(sources, state.place, cfg, tokenizer.allows_cuts)
    is_consistent = False  # whether state, files and ledger are those after a whole task
    try:
        writer.commit()
        last_commit = time.monotonic()
        with contextlib.closing(tokenize_tasks(tasks, cfg, count_processes(sources, cfg))) as results:
            is_consistent = True
            for result, next_place, bytes_read in results:
                is_consistent = False
                writer.add(result, next_place)
                if progress:
                    n_bytes = bytes_before[next_place.source] + bytes_read
                    progress(n_bytes, state.total("documents"), state.total("tokens"))
                if time.monotonic() - last_commit >= COMMIT_SECONDS:
                    writer.commit()
                    last_commit = time.monotonic()
                is_consistent = True
        is_consistent = False
        writer.close()
    except (KeyboardInterrupt, BrokenProcessPool):
        if is_consistent:  # else what came after the last commit is done again
            with contextlib.suppress(OSError, sqlite3.Error):
                writer.commit()
        raise
    finally:
        writer.abandon()


def count_processes(sources, cfg):
    """How many processes tokenize; 0: this one does, as processes take a second to start."""
    is_large = sum(source.size for source in sources) > 16 * cutting.TASK_BYTES
    is_large = is_large or any(source.kind == "hf" for source in sources)  # of unknown size
    n = cfg.workers or (os.cpu_count() if is_large else 1)
    return n if n > 1 else 0


def finish(sources, folder, cfg, tokenizer, state, template=None):
    """Check what came out, and complete the corpus with its meta.json, which is returned."""
    names = list(dict.fromkeys(Path(source.path).name for source in sources))
    check_text(names, cfg, state)
    meta = dict(format=2, sources=names[:100], tokenizer=tokenizer.name, n_vocab=tokenizer.n_vocab,
                eos_id=tokenizer.eos_id, mask_id=tokenizer.mask_id, dtype=token_dtype(tokenizer).name,
                left_out=state.left_out, replaced=state.replaced,
                without_separator=state.without_separator[:100])
    for split, counts in state.counts.items():
        files = describe_files(folder, split, state.files[split])
        answer_files = []
        if cfg.sft:
            answer_files = describe_files(folder, f"answers_{split}", state.answer_files[split])
        digests = [file["sha256"] for file in (*files, *answer_files)]
        digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        meta[split] = dict(counts, sha256=digest, files=files)
        if cfg.sft:
            meta[split]["answer_files"] = answer_files

    if isinstance(tokenizer, tokenizers.HuggingFaceTokenizer):
        tokenizer.copy_to(folder)
    if template:
        chat.save_template(template, folder)
    tokenizer.token_bytes().tofile(folder / "token_bytes.bin")
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync_path(path)
    return meta


def check_text(names, cfg, state):
    """Raise ValueError if a split has no text; names: of the sources."""
    files = state.without_separator
    missing = f"; {cfg.separator!r} occurs nowhere in {', '.join(files[:3])}" if files else ""
    for split, counts in state.counts.items():
        if not counts["bytes"]:
            reasons = ", ".join(f"{n} {reason}" for reason, n in state.left_out.items() if n)
            reasons = f" (left out: {reasons})" if reasons else ""
            raise ValueError(f"{', '.join(names[:3])}: no text for the {split} split{reasons}; "
                             f"use more text or another --val{missing}")


def describe_files(folder, split, shards):
    """[dict(name, tokens, sha256)] of a split's token files. An only one is renamed to SPLIT.bin first."""
    if len(shards) == 1:
        (name, n_tokens), final = shards[0], f"{split}.bin"
        if (folder / name).exists():  # else it was renamed before an interruption
            (folder / name).rename(folder / final)
        shards = [(final, n_tokens)]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda shard: sha256_of(folder / shard[0]), shards))
    return [dict(name=name, tokens=n_tokens, sha256=digest)
            for (name, n_tokens), digest in zip(shards, digests)]


if __name__ == "__main__":
    main()
