"""Preparing a corpus: sources of every format, the tokens of each document, interruption, bad input, the command line."""

import bz2
import contextlib
import errno
import glob
import gzip
import hashlib
import http.server
import itertools
import json
import lzma
import os
import random
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT, prepared
from corpus_examples import needs_gpt2, stories, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
from corpus import prepare, sources, tokenfiles, tokenizers

quick = settings(max_examples=50, deadline=None)

# Everything that pre-tokenizers treat in a way of its own, and characters of one to four bytes.
ALPHABET = "aZſİ1٣é世🙂\u0301\u200b\u200d\ufeff\ufffd\0 .'!/_\t\r\x0b\x1c\x85\u00a0\u2028\u3000\n\n\n"
WORDS = ["to be", " or", "\n", "\n\n", " \n", "\r\n", "n't", "'S", "'ſ", "!", "/", "123", "<|endoftext|>", "a\nb"]
TEXT = st.text(st.sampled_from(ALPHABET), max_size=60) | st.lists(st.sampled_from(WORDS)).map("".join) | st.text()


def write_txt(path, text):
    path.write_bytes(text.encode("utf-8"))
    return path


def write_folder(path, texts):
    path.mkdir()
    for i, text in enumerate(texts):
        write_txt(path / f"{i:03}.txt", text)
    return path


def split(text, val):
    return sources.split_of(hashlib.sha256(text.encode("utf-8")).digest(), val)


def by_split(texts, val):
    """The documents of each split as they must come out: in order, each once, none that is empty."""
    unique = dict.fromkeys(text for text in texts if text)
    return {which: [text for text in unique if split(text, val) == which] for which in ("train", "val")}


BOTH = [next(text for text in stories(99) if split(text, 0.5) == which) for which in ("train", "val")]  # at val=0.5 one for each


def texts_in(folder):
    """The documents of each split, decoded."""
    corpus = tokenfiles.load_corpus(folder)
    tokens = tokenizers.load_tokenizer(corpus.meta["tokenizer"], (folder,))
    found = {}
    for which in ("train", "val"):
        ids = getattr(corpus, which).read(0, 1 << 40)
        ends = np.flatnonzero(ids == tokens.eos_id)
        assert ends[0] == 0 and ends[-1] == len(ids) - 1
        found[which] = [tokens.decode(ids[a + 1 : b].tolist()) for a, b in zip(ends, ends[1:])]
    return found


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@contextlib.contextmanager
def task_size(size):
    """Tasks of `size` bytes; one process, which knows of this, unless a test asks for more."""
    with mock.patch.object(sources, "SIZE", size), mock.patch.object(prepare, "SIZE", size), mock.patch.object(os, "cpu_count", lambda: 1):
        yield


@pytest.fixture
def refused(run_data):
    """Run what must fail: one line on stderr, which says `message`, exit code 2, and nothing that was not there before."""

    def refused(*argv, message, **more):
        before, hidden = contents("corpora"), list(Path("corpora").glob(".*"))
        code, _, err = run_data(*argv, **more)
        assert code == 2 and re.fullmatch(r"data\.py: [^\n]+\n", err), err
        assert message in err
        assert contents("corpora") == before and list(Path("corpora").glob(".*")) == hidden

    return refused


# ------------------------------------------------------------------------------------------ long texts in pieces


def text_pieces(scratch, text, size, start=0, stop=None):
    with task_size(size):
        found = list(sources.text_pieces(sources.Source("txt", str(write_txt(scratch / "text.txt", text))), start, stop, "stop"))
    assert [byte for _, byte, _ in found] == np.cumsum([start] + [len(t.encode()) for t, *_ in found]).tolist()[1:]
    return [text for text, *_ in found]


@quick
@given(TEXT, st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_pieces_join_to_the_text(scratch, text, size, a, b):
    assert "".join(text_pieces(scratch, text, size)) == text
    first, second = text[: min(a, b)], text[min(a, b) : max(a, b)]
    assert "".join(text_pieces(scratch, text, size, len(first.encode()), len((first + second).encode()))) == second
    with task_size(size):
        assert "".join(sources.cut_up(text)) == text


def made_up(name):
    """A tiktoken encoding with its own pattern and special tokens, but made-up merges, across everything a pattern may join."""
    import tiktoken
    from tiktoken_ext import openai_public

    ranks = {bytes([i]): i for i in range(256)}
    for pair in itertools.product("aZ1 .'!/\t\r\n", repeat=2):
        ranks["".join(pair).encode()] = len(ranks)
    for token in ("!\n/", "a b", "a\nb", "\n\n\n", "'S"):
        ranks.setdefault(token.encode(), len(ranks))
    with mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks):
        return tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())


@pytest.fixture(scope="module", params=["cl100k_base", "o200k_base", pytest.param("gpt2", marks=needs_gpt2)])
def encoding(request):
    """A tiktoken encoding, which `tokenizers.load_tokenizer` finds by its name."""
    import tiktoken

    found = tiktoken.get_encoding("gpt2") if request.param == "gpt2" else made_up(request.param)
    with mock.patch.object(tiktoken, "get_encoding", lambda _: found):
        yield found


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(1, 9))
@example("a\nb\nc\n\nd\n e \nf!\n\ng", 1)
@example("one!\ntwo\nthree!\n/four\n", 1)  # newer patterns join newlines, and o200k_base slashes after them, to the punctuation before
def test_pieces_tokenize_as_the_whole(scratch, encoding, text, size):
    whole = encoding.encode_ordinary(text)
    assert [i for part in text_pieces(scratch, text, size) for i in encoding.encode_ordinary(part)] == whole
    with task_size(size):
        assert [i for part in sources.cut_up(text) for i in encoding.encode_ordinary(part)] == whole


@pytest.mark.parametrize("text", ["word\n" * 100, "some words " * 50])
def test_pieces_are_cut_at_all(scratch, text):
    assert len(text_pieces(scratch, text, 20)) > 10


# --------------------------------------------------------------------------------- tokens, document by document


@settings(max_examples=30, deadline=None)
@given(st.lists(TEXT, max_size=8), st.sampled_from(["jsonl", "separated", "folder"]), st.sampled_from([1, 7, 50, 1 << 20]), st.booleans())
@example(["<|endoftext|>", "a\nb<|endoftext|>"], "jsonl", 1, True)  # in a document this is text, and no separator
def test_tokens_are_tiktokens_own(scratch, encoding, texts, layout, size, ascii_only):
    """What is written is `encode_ordinary` of each document, in their order, also where they are cut into pieces."""
    texts = texts + BOTH
    with tempfile.TemporaryDirectory(dir=scratch) as folder, task_size(size):
        folder, separator = Path(folder), ""
        if layout == "jsonl":
            source = write_jsonl(folder / "x.jsonl", texts, ascii_only)
        elif layout == "separated":
            separator = "%\0%"
            source = write_txt(folder / "x.txt", separator.join(texts))
        else:
            source = write_folder(folder / "texts", texts)
        prepared(folder / "out", source, tokenizer=encoding.name, val=0.5, separator=separator)
        corpus = tokenfiles.load_corpus(folder / "out")
        for which, expected in by_split(texts, 0.5).items():
            ids = [i for text in expected for i in (*encoding.encode_ordinary(text), encoding.eot_token)]
            assert getattr(corpus, which).read(0, 1 << 40).tolist() == [encoding.eot_token, *ids]


@settings(max_examples=25, deadline=None)
@given(TEXT.filter(lambda text: len(text) > 2), st.sampled_from([1, 7, 1 << 20]))
def test_tokens_of_a_single_text(scratch, encoding, text, size):
    with tempfile.TemporaryDirectory(dir=scratch) as folder, task_size(size):
        text = "ab" + text + "cd"
        prepared(Path(folder) / "out", write_txt(Path(folder) / "x.txt", text), tokenizer=encoding.name, val=0.5)
        train, val = (s.read(0, 1 << 40).tolist() for s in tokenfiles.load_corpus(Path(folder) / "out")[2:4])
        half = next(i for i in range(len(text)) if len(text[:i].encode()) >= len(text.encode()) // 2)
        eos = [encoding.eot_token]
        assert train == eos + encoding.encode_ordinary(text[:half]) + eos and val == eos + encoding.encode_ordinary(text[half:]) + eos


@quick
@given(st.text(st.sampled_from("aé世🙂\n"), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(1, 30))
@example("a" * 20 + "🙂", 0.1, 30)
def test_single_text_is_split_by_position(scratch, text, val, size):
    path, raw = write_txt(scratch / "whole.txt", text), text.encode()
    cfg = prepare.Config(val=val)
    with task_size(size):
        parts = [task.content for task, _, _ in sources.tasks(sources.find_sources([str(path)], cfg), sources.Place(), cfg)]
    halves = {which: "".join(p.text for p in parts if p.split == which) for which in ("train", "val")}
    borders = [len(text[:i].encode()) for i in range(len(text) + 1)]
    assert halves["train"] + halves["val"] == text
    assert len(halves["train"].encode()) == min(b for b in borders if b >= int(len(raw) * (1 - val)))
    for which, half in halves.items():
        assert [p.ends for p in parts if p.split == which][-1:] == [True] * bool(half)
        assert sum(p.ends for p in parts if p.split == which) == bool(half)


def test_text_like_special_tokens_stays_text(tmp_path, encoding):
    texts = ["<|endoftext|>", "a<|fim_prefix|>b<|endofprompt|>", *BOTH]
    prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", texts), tokenizer=encoding.name, val=0.5)
    assert texts_in(tmp_path / "out") == by_split(texts, 0.5)


# ----------------------------------------------------------------------------------------------------- formats

TEXTS = [*stories(12), "", "\n", " a\r\nb\r\n", "\ufeffx\0y", "2 \u2028 lines", "café — 世界 🙂", stories(3)[1]]


def compressed(ending, raw):
    if ending == ".zst":
        compressor = pytest.importorskip("zstandard").ZstdCompressor()
        return compressor.compress(raw[: len(raw) // 2]) + compressor.compress(raw[len(raw) // 2 :])  # two frames, as pzstd writes
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending]
    return pack(raw) if not ending else pack(raw[: len(raw) // 3]) + pack(raw[len(raw) // 3 :])


def jsonl(texts, field="text", **more):
    return "".join(json.dumps({"id": i, field: text, "after": [1]}, **more) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path, texts, field="text", **options):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"id": range(len(texts)), field: texts}), path, row_group_size=5, **options)
    return path


def as_separated(folder, ending, texts):
    (folder / f"x.txt{ending}").write_bytes(compressed(ending, "\n%%\t\n".join(texts).encode()))
    return [folder / f"x.txt{ending}"], dict(separator=r"\n%%\t\n")


def as_texts(folder, ending, texts):
    (folder / "texts").mkdir()
    for i, text in enumerate(texts):
        (folder / "texts" / f"{i:03}.txt{ending}").write_bytes(compressed(ending, text.encode()))
    return [folder / "texts"], {}


def as_jsonl(folder, ending, texts):
    (folder / f"x{ending}").write_bytes(compressed(Path(ending).suffix if ending.count(".") > 1 else "", jsonl(texts)))
    return [folder / f"x{ending}"], {}


def as_parquet(folder, compression, texts):
    return [write_parquet(folder / "x.parquet", texts, compression=compression)], {}


def as_other_field(folder, ending, texts):
    (folder / "x.jsonl").write_bytes(jsonl(texts[:9], "body", ensure_ascii=False).replace(b"\n", b"\r\n\n"))  # and lines of other kinds
    return [folder / "x.jsonl", write_parquet(folder / "y.parquet", texts[9:], "body")], dict(field="body")


def as_mixture(folder, ending, texts):
    """A folder of all formats, with folders in it, files that are none of ours, and hidden ones."""
    (folder / "all" / "deep").mkdir(parents=True)
    (folder / "all" / "a.jsonl").write_bytes(jsonl(texts[:5]))
    (folder / "all" / "b.ndjson.gz").write_bytes(gzip.compress(jsonl(texts[5:9])))
    write_txt(folder / "all" / "c.txt", texts[9])
    (folder / "all" / "deep" / "a.txt.xz").write_bytes(lzma.compress(texts[10].encode()))
    write_parquet(folder / "all" / "deep" / "b.parquet", texts[11:])
    for name in ("readme.md", ".hidden.txt", "deep/a.png"):
        (folder / "all" / name).write_bytes(b"not this\xff")
    return [folder / "all"], {}


def as_pattern(folder, ending, texts):
    (folder / "some").mkdir()
    for i, text in enumerate(texts):
        (folder / "some" / f"{i:03}.txt").write_bytes(text.encode())
    write_txt(folder / "some" / "other.txt", "not this")
    return [folder / "some" / "0?[0-4].txt", folder / "some" / "0[0-9]*.txt"], {}  # files that both name are taken once, where the first does


def as_any_files(folder, ending, texts):
    (folder / "odd").mkdir()
    for i, text in enumerate(texts):
        (folder / "odd" / f"{i:03}{['', '.md', '.jsonl', '.py'][i % 4]}").write_bytes(text.encode())
    return [folder / "odd"], dict(format="txt")


def as_dataset(folder, ending, texts):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_dict({"id": list(range(len(texts))), "text": texts})
    if ending == "of a dict":
        saved = datasets.DatasetDict(test=saved.select([0]), train=saved)
    saved.save_to_disk(folder / "saved")
    return [folder / "saved" if ending != "hf:" else f"hf:{folder / 'saved'}"], {}


def as_dataset_files(folder, ending, texts):
    pytest.importorskip("datasets")
    (folder / "files").mkdir()
    (folder / "files" / "train.jsonl").write_bytes(jsonl(texts))
    return [f"hf:{folder / 'files'}"], {}


FORMATS = [(as_separated, ending) for ending in ("", ".gz", ".zst", ".bz2", ".xz")] \
    + [(as_texts, ending) for ending in ("", ".gz", ".zst", ".bz2", ".xz")] \
    + [(as_jsonl, kind + ending) for kind in (".jsonl", ".ndjson") for ending in ("", ".gz", ".zst", ".bz2", ".xz")] \
    + [(as_parquet, compression) for compression in ("none", "snappy", "zstd")] \
    + [(as_other_field, ""), (as_mixture, ""), (as_pattern, ""), (as_any_files, "")] \
    + [(as_dataset, "by its folder"), (as_dataset, "hf:"), (as_dataset, "of a dict"), (as_dataset_files, "")]


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """`datasets` without a network, its cache in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "datasets" in sys.modules:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("write, ending", FORMATS, ids=[f"{write.__name__[3:]} {ending}".strip() for write, ending in FORMATS])
def test_every_format_gives_the_same_documents(tmp_path, offline, write, ending):
    names, settings = write(tmp_path, ending, TEXTS)
    meta = prepared(tmp_path / "out", *names, val=0.3, workers=1, **settings)
    expected = by_split(TEXTS, 0.3)
    if write is as_pattern:  # the first pattern's files come first
        expected = by_split([t for i, t in enumerate(TEXTS) if i % 10 < 5] + TEXTS, 0.3)
    assert texts_in(tmp_path / "out") == expected
    assert meta["left_out"] == dict(duplicates=1, empty=1, undecodable=0, malformed=0) and meta["replaced"] == 0


@pytest.mark.parametrize("argv, raw", [
    (["--format=jsonl"], jsonl(TEXTS)),
    ([r"--separator=\n%%\n"], "\n%%\n".join(TEXTS).encode()),
    (["--format=txt", r"--separator=\n%%\n"], "\n%%\n".join(TEXTS).encode()),
])
def test_standard_input(tmp_path, argv, raw):
    done = subprocess.run([sys.executable, ROOT / "data.py", "-", "--val=0.3", *argv], cwd=tmp_path, input=raw, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert texts_in(tmp_path / "corpora/stdin") == by_split(TEXTS, 0.3)
    assert [p.name for p in tmp_path.glob("corpora/*")] == ["stdin"] and not list(tmp_path.glob("corpora/.*"))
    assert "left out: 1 duplicates, 1 empty" in done.stdout.decode()


def test_standard_input_beside_files(run_data, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", TEXTS[:5])
    code, _, err = run_data("-", "x.jsonl", "--format=jsonl", "--val=0.3", "--name=both", stdin=jsonl(TEXTS[5:]))
    assert code == 0, err
    assert texts_in("corpora/both") == by_split(TEXTS, 0.3)


def test_docs_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    """As in the repository itself; the folder is ./docs."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("docs"), stories(2))
    kinds = [[s.kind for s in sources.find_sources([name], prepare.Config())] for name in ("docs", "./docs", "docs/")]
    assert kinds == [["docs"], ["txt", "txt"], ["txt", "txt"]]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    folder = write_folder(tmp_path / ".data", stories(20))
    for name in (".git/config", "sub/.cache/x.txt", ".x.txt", "sub/.y"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_txt(folder / name, "not this")
    for kind in ("auto", "txt"):
        prepared(tmp_path / kind, folder, val=0.3, format=kind)
        assert texts_in(tmp_path / kind) == by_split(stories(20), 0.3)


def test_zstandard_of_a_large_window(tmp_path):
    """As `zstd --long=31` writes them; so are the best known dumps of web forums."""
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packing = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "x.jsonl.zst").write_bytes(packing.compress(jsonl(TEXTS)) + packing.flush())
    prepared(tmp_path / "out", tmp_path / "x.jsonl.zst", val=0.3)
    assert texts_in(tmp_path / "out") == by_split(TEXTS, 0.3)


@pytest.mark.parametrize("rows", [1 << 20, 500])
def test_parquet_takes_little_memory(tmp_path, rows):
    """Whatever the size of the file and of its row groups."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [np.random.default_rng(i).bytes(2000).hex() for i in range(5000)]  # 20 MB that do not shrink
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet", row_group_size=rows, use_dictionary=False)
    cfg, before, most, found = prepare.Config(), pyarrow.total_allocated_bytes(), 0, []
    for task, _, _ in sources.tasks(sources.find_sources([str(tmp_path / "x.parquet")], cfg), sources.Place(), cfg):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        found += task.content
    assert [text.decode() for text in found] == texts and most < 8e6


@quick
@given(st.lists(st.text(st.sampled_from("ab\n"), max_size=6), min_size=1, max_size=9), st.sampled_from(["\n\n", "\n", "aba", "b"]), st.integers(1, 9))
@example(["a", "\nb", "", "\nc"], "\n\n", 4)
def test_separators_are_found_from_left_to_right(scratch, texts, separator, size):
    """Also those that can overlap, wherever the file happens to be cut into tasks; one at the end opens no document."""
    text = separator.join(texts)
    path = write_txt(scratch / "separated.txt", text)
    cfg = prepare.Config(separator=separator, dedup=False)
    with task_size(size):
        found = list(prepare.results(sources.tasks(sources.find_sources([str(path)], cfg), sources.Place(), cfg), ("bytes", "", cfg), 0))
    documents = [bytes(np.frombuffer(d.tokens, np.uint16)[:-1].astype(np.uint8)).decode() for result, _, _ in found for d in result.documents]
    expected = text.split(separator)
    expected = expected[:-1] if not expected[-1] else expected
    assert documents == [t for t in expected if t]
    assert sum(result.left_out.get("empty", 0) for result, _, _ in found) == expected.count("")


# ---------------------------------------------------------------------------------- splits, duplicates and files


@quick
@given(st.lists(TEXT, unique=True), st.lists(TEXT), st.randoms())
def test_added_documents_move_none(scratch, texts, added, order):
    more = texts + BOTH + added + texts
    order.shuffle(more)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        prepared(folder / "before", write_jsonl(folder / "a.jsonl", texts + BOTH), val=0.5)
        prepared(folder / "after", write_jsonl(folder / "b.jsonl", more), write_folder(folder / "added", [*added, ""]), val=0.5)
        before, after = texts_in(folder / "before"), texts_in(folder / "after")
    assert sorted(after["train"] + after["val"]) == sorted(set(more) - {""})  # each once, so in one split only
    assert set(before["train"]) <= set(after["train"]) and set(before["val"]) <= set(after["val"])


def test_share_of_validation():
    n, val = 10_000, 0.1
    held = sum(split(text, val) == "val" for text in stories(n))
    assert abs(held - n * val) < 5 * (n * val * (1 - val)) ** 0.5  # five standard deviations
    assert [i for i, text in enumerate(stories(60)) if split(text, val) == "val"] == [1, 11, 14, 17, 28, 31, 39, 42, 47, 48, 56]  # whatever the version
    assert all(split(text, 0.2) == "val" for text in stories(1000) if split(text, 0.1) == "val")  # a larger share keeps the smaller


def test_duplicates(tmp_path):
    """Equal documents in different files and formats: the first stays, or with dedup=False all do, in one split."""
    names = [write_jsonl(tmp_path / "x.jsonl", stories(20) + stories(5)), write_folder(tmp_path / "texts", stories(12)),
             write_parquet(tmp_path / "x.parquet", stories(22))]
    meta = prepared(tmp_path / "once", *names, val=0.3)
    assert texts_in(tmp_path / "once") == by_split(stories(22), 0.3) and meta["left_out"] == dict(duplicates=37, empty=0, undecodable=0, malformed=0)
    meta = prepared(tmp_path / "all", *names, val=0.3, dedup=False)
    every = stories(20) + stories(5) + stories(12) + stories(22)
    assert texts_in(tmp_path / "all") == {which: [t for t in every if split(t, 0.3) == which] for which in ("train", "val")}
    assert meta["left_out"] == dict(duplicates=0, empty=0, undecodable=0, malformed=0)


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_several_files_are_one_stream(tmp_path, limit):
    source = write_jsonl(tmp_path / "x.jsonl", stories(60))
    one = prepared(tmp_path / "one", source, val=0.3)
    meta = prepared(tmp_path / "many", source, val=0.3, shard_tokens=limit)
    corpora = [tokenfiles.load_corpus(tmp_path / name) for name in ("one", "many")]
    for which in ("train", "val"):
        files = meta[which]["files"]
        raw = [(tmp_path / "many" / file["name"]).read_bytes() for file in files]
        assert len(raw) > 1 and b"".join(raw) == (tmp_path / "one" / f"{which}.bin").read_bytes()
        assert [file["sha256"] for file in files] == [hashlib.sha256(r).hexdigest() for r in raw]
        assert all(limit <= file["tokens"] < limit + 100 for file in files[:-1]) and sum(file["tokens"] for file in files) == meta[which]["tokens"]
        assert {k: meta[which][k] for k in ("tokens", "bytes", "documents")} == {k: one[which][k] for k in ("tokens", "bytes", "documents")}
        streams = [getattr(corpus, which) for corpus in corpora]
        assert len(streams[1].arrays) == len(files) and np.array_equal(*(s.read(0, len(s)) for s in streams))
        assert np.array_equal(*(data.Sequences(s, 50).read(np.arange(5)) for s in streams))


# ------------------------------------------------------------------------------------------------- prepare


def check_files(folder, tokens):
    """What meta.json says against the bytes on disk and an independent decoding of them. Returns the texts."""
    meta, texts = json.loads((folder / "meta.json").read_text()), texts_in(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "token_bytes.bin", "train.bin", "val.bin"]
    assert [meta[k] for k in ("tokenizer", "n_vocab", "eos_id", "mask_id")] == [tokens.name, tokens.n_vocab, tokens.eos_id, tokens.mask_id]
    for which in ("train", "val"):
        raw = (folder / f"{which}.bin").read_bytes()
        n, digest = len(raw) // np.dtype(meta["dtype"]).itemsize, hashlib.sha256(raw).hexdigest()
        assert meta[which] == dict(tokens=n, bytes=sum(len(t.encode()) for t in texts[which]), documents=len(texts[which]), sha256=digest,
                                   files=[dict(name=f"{which}.bin", tokens=n, sha256=digest)])
    return texts


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_prepare_jsonl(tmp_path, name):
    source, seen = write_jsonl(tmp_path / "x.jsonl", stories(60) + stories(30)), []
    cfg = prepare.Config(tokenizer=name, val=0.3)
    meta = prepare.prepare(sources.find_sources([str(source)], cfg), tmp_path / "out", cfg, progress=lambda *counts: seen.append(counts))
    assert check_files(tmp_path / "out", tokenizers.load_tokenizer(name)) == by_split(stories(60), 0.3)
    assert meta["dtype"] == "uint16" and meta["sources"] == ["x.jsonl"]
    assert tokenfiles.load_corpus(tmp_path / "out").meta == meta
    assert seen[-1] == (source.stat().st_size, 60, sum(meta[which]["tokens"] for which in ("train", "val")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_prepare_text(tmp_path):
    text = "".join(stories(40))
    with task_size(50):
        prepared(tmp_path / "out", write_txt(tmp_path / "x.txt", text), val=0.1)
    texts = check_files(tmp_path / "out", tokenizers.Bytes())
    assert texts["train"][0] + texts["val"][0] == text and len(texts["train"]) == len(texts["val"]) == 1


def test_large_vocabulary_takes_four_bytes(tmp_path):
    wide = SimpleNamespace(name="wide", n_vocab=300_000, eos_id=299_999, mask_id=300_000, cuts=True, token_bytes=lambda: np.ones(300_000, np.uint16),
                           encode_batch=lambda texts: [np.array([65536 + ord(c) for c in text], np.uint32) for text in texts])
    with mock.patch.object(tokenizers, "load_tokenizer", lambda *_, **__: wide):
        prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", stories(20)), val=0.5)
    corpus = tokenfiles.load_corpus(tmp_path / "out")
    assert corpus.train.dtype == np.uint32
    for which, expected in by_split(stories(20), 0.5).items():
        ids = [i for text in expected for i in (*(65536 + ord(c) for c in text), wide.eos_id)]
        assert getattr(corpus, which).read(0, 1 << 40).tolist() == [wide.eos_id, *ids]


def test_token_bytes_add_up_to_the_text(tmp_path, encoding):
    """Bits per byte of any block rests on this: the lengths of the tokens of a split sum to its bytes."""
    source = write_txt(tmp_path / "t.txt", "Straße, naïve; 数 and 🙂.\n" * 50)
    for name in ("bytes", encoding.name):
        meta = prepared(tmp_path / name, source, tokenizer=name)
        corpus = tokenfiles.load_corpus(tmp_path / name)
        for which in ("train", "val"):
            stream = getattr(corpus, which)
            assert corpus.token_bytes[stream.read(0, len(stream))].sum() == meta[which]["bytes"]


def test_prepare_overwrites_nothing(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", stories(40))
    prepared(tmp_path / "out", source)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="out exists; remove it or choose another --name"):
        prepared(tmp_path / "out", source, val=0.5)
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------- any number of processes, any size

LONG = "\n".join(stories(9))  # with small tasks a document of many pieces


def inputs(kind, folder):
    """(names, settings) of sources of one kind: long and short documents, some of them twice, also the long ones."""
    folder.mkdir(exist_ok=True)
    texts = [*stories(5), LONG, "", *stories(8)[3:], LONG, LONG.upper(), "\n\n", LONG.upper(), *stories(11)[7:]]
    if kind == "mixed":
        parts = [inputs(k, folder / k)[0] for k in ("gz", "texts", "jsonl", "parquet", "texts.xz")]
        return [*itertools.chain(*parts), "docs"], {}
    if kind == "alone":
        return [write_txt(folder / "x.txt", "\n".join(texts))], {}
    if kind == "alone.gz":
        (folder / "x.txt.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
        return [folder / "x.txt.gz"], {}
    write, ending = dict(jsonl=(as_jsonl, ".jsonl"), gz=(as_jsonl, ".jsonl.gz"), texts=(as_texts, ""), separated=(as_separated, ".zst"),
                         parquet=(as_parquet, "snappy"), dataset=(as_dataset, ""), **{"texts.xz": (as_texts, ".xz")}).get(kind, (None, ""))
    return write(folder, ending, texts) if write else (["docs"], {})


KINDS = ["jsonl", "gz", "texts", "texts.xz", "alone", "alone.gz", "separated", "parquet", "dataset", "docs", "mixed"]


@pytest.fixture
def few_docs(monkeypatch):
    """The source docs is what this Python documents; here some texts, as the whole would take long."""
    texts = [*stories(4), LONG, LONG, *(text.upper() for text in stories(25))]
    monkeypatch.setattr(sources, "python_docs", lambda: iter(texts))


@pytest.mark.parametrize("kind", KINDS)
def test_any_size_of_tasks_gives_the_same_files(fast_path, few_docs, kind):
    names, settings = inputs(kind, fast_path / "in")
    prepared(fast_path / "out", *names, val=0.3, **settings)
    for size in (1, 17, 100, 1000):
        with task_size(size):
            prepared(fast_path / f"out{size}", *names, val=0.3, **settings)
        assert contents(fast_path / f"out{size}") == contents(fast_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_progress_counts_the_bytes_of_the_sources(fast_path, few_docs, kind):
    """As they are in the files: text that is compressed would pass the end."""
    names, settings = inputs(kind, fast_path / "in")
    cfg, seen = prepare.Config(val=0.3, **settings), []
    found = sources.find_sources([str(name) for name in names], cfg)
    with task_size(100):
        prepare.prepare(found, fast_path / "out", cfg, progress=lambda done, *_: seen.append(done))
    assert seen == sorted(seen) and seen[-1] == sum(s.size for s in found)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_files(tmp_path, workers):
    names, settings = inputs("mixed", tmp_path / "in")
    names.remove("docs")
    prepared(tmp_path / "out", *names, val=0.3, workers=1)
    with task_size(60):
        prepared(tmp_path / "more", *names, val=0.3, workers=workers)
    assert contents(tmp_path / "more") == contents(tmp_path / "out")


# --------------------------------------------------------------------------------------------- interruption


@contextlib.contextmanager
def stopped_after_commit(number):
    """Ends the preparation behind its commit of this number, as a signal might; there is one behind each task."""
    commit, count = prepare.Ledger.commit, itertools.count()

    def stopping(self, **notes):
        commit(self, **notes)
        if next(count) == number:
            raise KeyboardInterrupt

    with mock.patch.object(prepare.Ledger, "commit", stopping), \
            mock.patch.object(prepare.prepare, "__defaults__", (prepare.prepare.__defaults__[0], 0)):
        yield


@pytest.mark.parametrize("limit", [1 << 30, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_every_step(fast_path, few_docs, kind, limit):
    """Before or behind each commit, once, and at all steps in a row: what comes out at last is the same, byte for byte."""
    names, settings = inputs(kind, fast_path / "in")
    cfg = prepare.Config(val=0.3, shard_tokens=limit, **settings)
    found = sources.find_sources([str(name) for name in names], cfg)
    steps = itertools.count()
    with task_size(200):
        prepare.prepare(found, fast_path / "whole", cfg, progress=lambda *_: next(steps))
        whole, n = contents(fast_path / "whole"), next(steps)
        assert n > 5

        def go_on(out, stop=None, behind=None):
            count = itertools.count()

            def progress(*_):
                if next(count) == stop:
                    raise KeyboardInterrupt

            with stopped_after_commit(behind):
                prepare.prepare(found, out, cfg, progress)

        out = fast_path / "out"
        for step in range(0, n, 1 + n // 8):
            for where in (dict(stop=step), dict(behind=step + 2)):  # two commits come before the first step
                with pytest.raises(KeyboardInterrupt):
                    go_on(out, **where)
                assert not out.exists()
                go_on(out)
                assert contents(out) == whole
                shutil.rmtree(out)
        for behind in itertools.count():
            try:
                go_on(out, behind=behind % 3)
                break
            except KeyboardInterrupt:
                assert behind < 3 * n + 9
        assert contents(out) == whole and sorted(p.name for p in fast_path.iterdir()) == ["in", "out", "whole"]


def test_what_a_commit_says_is_in_the_files(tmp_path):
    """And not in this process's memory, which kill -9 empties."""
    cfg, commit, seen = prepare.Config(val=0.3, shard_tokens=700), prepare.Ledger.commit, []
    found = sources.find_sources([str(write_jsonl(tmp_path / "x.jsonl", stories(40)))], cfg)

    def checked(self, **notes):
        for name, tokens in itertools.chain(*notes["state"]["files"].values()) if "state" in notes else ():
            assert (tmp_path / ".out.building/corpus" / name).stat().st_size == 2 * tokens
            seen.append(name)
        commit(self, **notes)

    with task_size(100), mock.patch.object(prepare.Ledger, "commit", checked):
        prepare.prepare(found, tmp_path / "out", cfg, commit_every=0)
    assert len(set(seen)) > 3 and len(seen) > 30


def test_interrupted_preparation_goes_on_where_it_stopped(tmp_path):
    """And does not begin anew: only the tasks that are left are tokenized."""
    cfg, made = prepare.Config(val=0.3), []
    found = sources.find_sources([str(write_jsonl(tmp_path / "x.jsonl", stories(40)))], cfg)
    tokenize = prepare.Tokenize.__call__
    with task_size(100), mock.patch.object(prepare.Tokenize, "__call__", lambda self, task: made.append(task.first) or tokenize(self, task)):
        with stopped_after_commit(9), pytest.raises(KeyboardInterrupt):
            prepare.prepare(found, tmp_path / "out", cfg)
        assert len(made) == 8
        prepare.prepare(found, tmp_path / "out", cfg)
    assert made == sorted(set(made)) and len(made) > 15


def test_an_interruption_costs_only_what_is_under_way(fast_path):
    """What is tokenized is committed before it leaves; wherever that is not whole, it is done again."""
    cfg, out = prepare.Config(val=0.3, shard_tokens=700), fast_path / "out"
    found = sources.find_sources([str(write_jsonl(fast_path / "x.jsonl", stories(60)))], cfg)
    with task_size(100):
        prepare.prepare(found, fast_path / "whole", cfg)
    for owner, name in ((prepare.Tokenize, "__call__"), (prepare.Files, "write"), (prepare.Ledger, "is_new"), (tokenfiles, "flush"), (prepare.Ledger, "commit")):
        real, made, done = getattr(owner, name), [], []

        def stop(*arguments, real=real, made=made, **notes):
            made.append(getattr(arguments[-1], "first", None))
            if len(made) in (5, 14):
                raise KeyboardInterrupt
            return real(*arguments, **notes)

        with task_size(100), mock.patch.object(owner, name, stop):
            while not out.exists():
                with contextlib.suppress(KeyboardInterrupt):
                    prepare.prepare(found, out, cfg, commit_every=1e9 if owner is not tokenfiles and name != "commit" else 0)
                done.append(len(made))
        assert len(done) > 1 and contents(out) == contents(fast_path / "whole"), name
        if name == "__call__":
            assert made[4] == made[5] and made[13] == made[14] and len(made) == len(set(made)) + 2
        shutil.rmtree(out)


def test_a_disk_that_is_full_at_an_interruption_costs_nothing(tmp_path):
    """That is the last commit's to say, and the one before still counts."""
    cfg = prepare.Config(val=0.3)
    found = sources.find_sources([str(write_jsonl(tmp_path / "x.jsonl", stories(60)))], cfg)
    tokenize, commit, made = prepare.Tokenize.__call__, prepare.Ledger.commit, []

    def until_the_ninth(self, task):
        made.append(task.first)
        if len(made) == 9:
            raise KeyboardInterrupt
        return tokenize(self, task)

    def until_then(self, **notes):
        if len(made) == 9:
            raise OSError("No space left on device")
        commit(self, **notes)

    with task_size(100):
        with mock.patch.object(prepare.Tokenize, "__call__", until_the_ninth), mock.patch.object(prepare.Ledger, "commit", until_then), \
                pytest.raises(KeyboardInterrupt):
            prepare.prepare(found, tmp_path / "out", cfg, commit_every=0)
        with mock.patch.object(prepare.Tokenize, "__call__", lambda self, task: made.append(task.first) or tokenize(self, task)):
            prepare.prepare(found, tmp_path / "out", cfg)
    assert made[8] == made[9] and len(made) == len(set(made)) + 1
    assert texts_in(tmp_path / "out") == by_split(stories(60), 0.3)


@pytest.mark.parametrize("write, ending, at", [(as_jsonl, ".jsonl", ":40:"), (as_jsonl, ".jsonl.xz", ":40:"), (as_parquet, "none", ", record 40:"),
                                               (as_separated, "", "at byte"), (as_separated, ".gz", "at byte")])
def test_places_are_right_after_an_interruption(tmp_path, write, ending, at):
    """What is wrong with a source is reported with the same place, whether the preparation was interrupted before or not."""
    texts = stories(39) + [None if at.startswith(",") else "\ud800" if write is as_jsonl else "wrong"]
    names, settings = write(tmp_path, ending, texts)
    if write is as_separated:
        raw = b"\n%%\t\n".join(text.encode() for text in texts).replace(b"wrong", b"\xff")
        names[0].write_bytes(compressed(ending, raw))
        at += f" {len(raw) - 1};"
    with task_size(100):
        with stopped_after_commit(7), pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "out", *names, **settings)
        with pytest.raises(ValueError, match=f"^{names[0]}.*{at}"):
            prepared(tmp_path / "out", *names, **settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.building").exists()


@pytest.mark.parametrize("limit", [1 << 30, 100])
@pytest.mark.parametrize("moment", ["train.bin has its name", "val.bin too", "meta.json is half written", "all is written"])
def test_killed_between_the_last_steps(tmp_path, moment, limit):
    source, out = write_jsonl(tmp_path / "x.jsonl", stories(30)), tmp_path / "out"
    whole = prepared(tmp_path / "whole", source, val=0.3, shard_tokens=limit)

    def until(*arguments):
        inside = arguments[1]
        prepare_finish(*arguments)
        if moment != "all is written":
            (inside / "token_bytes.bin").unlink()
            (inside / "meta.json").write_text("{") if moment == "meta.json is half written" else (inside / "meta.json").unlink()
            if moment == "train.bin has its name" and limit > 100:
                (inside / "val.bin").rename(inside / "val_00000.bin")
        raise KeyboardInterrupt

    prepare_finish = prepare.finish
    with mock.patch.object(prepare, "finish", until), pytest.raises(KeyboardInterrupt):
        prepared(out, source, val=0.3, shard_tokens=limit)
    assert prepared(out, source, val=0.3, shard_tokens=limit) == whole and contents(out) == contents(tmp_path / "whole")


def test_killed_before_the_last_act(run_data, tmp_path):
    """The corpus is there, what was used to build it, too: it is thrown away."""
    write_jsonl(tmp_path / "x.jsonl", stories(30))
    assert run_data("x.jsonl")[0] == 0
    whole = contents("corpora/x")
    Path("corpora/.x.building").mkdir()
    write_txt(Path("corpora/.x.building/ledger.sqlite"), "")
    code, _, err = run_data("x.jsonl")
    assert (code, err) == (2, "data.py: corpora/x exists; remove it or choose another --name\n")
    assert contents("corpora") == {f"x/{name}": raw for name, raw in whole.items()} and not list(Path("corpora").glob(".*"))


# The command line in a process of its own, with small tasks and a commit whenever 20 ms have passed; and at a pace that lets a test meet it at work.
COMMITS = "import sys, time; from corpus import sources, prepare as p; sys.argv[0] = 'data.py'; sources.SIZE = {}; " \
    "p.prepare.__defaults__ = (p.prepare.__defaults__[0], 0.02); old = p.Files.write; {}; p.main()"
QUICK, SLOW = COMMITS.format(1 << 16, "pass"), COMMITS.format(1000, "p.Files.write = lambda *a: (time.sleep(0.01), old(*a))")


def start(code, *argv, **more):
    return subprocess.Popen([sys.executable, *(["-c", code] if code else ["data.py"]), *map(str, argv)], cwd=ROOT, text=True,
                            **dict(dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE), **more))


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


def descendants(pid):
    """Its processes, and theirs: {pid: when it started}."""
    parents, started = {}, {}
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(stat).read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(stat.split("/")[2])], started[int(stat.split("/")[2])] = int(fields[1]), fields[19]
    found, before = {pid}, set()
    while found != before:
        before, found = found, found | {child for child, parent in parents.items() if parent in found}
    return {child: started[child] for child in found - {pid}}


def alive(pid, since):
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0] != "Z" and fields[19] == since
    return False


def at_work(out):
    return sum(path.stat().st_size for path in out.glob(".*.building/corpus/*.bin")) > 2000


@pytest.fixture
def many(tmp_path):
    return write_jsonl(tmp_path / "many.jsonl", stories(600))


@pytest.mark.parametrize("send, workers", [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_signals_end_it_in_one_line(tmp_path, many, send, workers):
    process = start(SLOW, many, f"--out={tmp_path / 'out'}", f"--workers={workers}")
    until(lambda: at_work(tmp_path / "out"))
    children = descendants(process.pid)
    assert len(children) >= workers * (workers > 1)
    process.send_signal(send)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "data.py: interrupted; the same command goes on from here\n")
    until(lambda: not any(alive(*child) for child in children.items()))
    assert not (tmp_path / "out/many").exists() and (tmp_path / "out/.many.building").is_dir()
    assert subprocess.run([sys.executable, "data.py", many, f"--out={tmp_path / 'out'}"], cwd=ROOT, capture_output=True).returncode == 0
    prepared(tmp_path / "whole", many)
    assert contents(tmp_path / "out") == {f"many/{k}": v for k, v in contents(tmp_path / "whole").items()}


def test_interrupt_key_while_processes_start(tmp_path, many):
    """A terminal sends the signal to all of them; those that are still importing say nothing either."""
    process = start(None, many, f"--out={tmp_path / 'out'}", "--workers=2", start_new_session=True)
    workers = until(lambda: [pid for pid in descendants(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()])
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert workers and (process.returncode, err) == (130, "data.py: interrupted; the same command goes on from here\n")


def test_sigterm_where_sigint_is_ignored(tmp_path, many):
    """As in a job that a script starts in the background."""
    process = start(SLOW, many, f"--out={tmp_path / 'out'}", "--workers=1", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    until(lambda: at_work(tmp_path / "out"))
    process.terminate()
    try:
        assert process.wait(timeout=5) == 130
    finally:
        process.kill()
        process.communicate()


def test_no_process_outlives_a_killed_parent(tmp_path, many):
    process = start(SLOW, many, f"--out={tmp_path / 'out'}", "--workers=2")
    until(lambda: at_work(tmp_path / "out"))
    children = descendants(process.pid)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    until(lambda: not any(alive(*child) for child in children.items()), seconds=10)


def test_killed_worker(tmp_path, many):
    process = start(SLOW, many, f"--out={tmp_path / 'out'}", "--workers=2")
    until(lambda: at_work(tmp_path / "out"))
    prepared(tmp_path / "whole", many)
    worker = next(pid for pid in descendants(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and re.fullmatch("data.py: a tokenizing process was ended from outside .*\n", err)
    assert subprocess.run([sys.executable, "data.py", many, f"--out={tmp_path / 'out'}"], cwd=ROOT, capture_output=True).returncode == 0
    assert contents(tmp_path / "out/many") == contents(tmp_path / "whole")


@needs_gpt2
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """kill -9, and the same command again, until it ends: byte for byte what an uninterrupted one gives."""
    order = random.Random(kills)
    words = ["".join(order.choices("abcdefghijklmnopqrstuvwxyzéß世", k=order.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(order.choices(words, k=order.choice([30, 300, 3000]))).replace(" b", "\nb") for _ in range(600)]
    names = [write_jsonl(tmp_path / "a.jsonl", texts[:400] + texts[:30]), tmp_path / "b.txt.gz", write_txt(tmp_path / "c.txt", "\n".join(texts[:200]))]
    names[1].write_bytes(gzip.compress("\n".join(texts[400:]).encode(), 1))
    argv = [*names, "--tokenizer=gpt2", "--workers=2", "--name=x", "--val=0.3"]
    began = time.monotonic()
    done = start(QUICK, *argv, f"--out={tmp_path / 'whole'}")
    assert done.communicate() and done.returncode == 0
    takes, whole = time.monotonic() - began, contents(tmp_path / "whole/x")
    out, killed, resumed = tmp_path / "out", 0, 0
    while (wanted := killed < kills or not resumed) or not (out / "x").exists():
        if (out / "x").exists():  # complete before we had killed it often enough; beside it may lie what a kill just then has left
            assert contents(out / "x") == whole
            shutil.rmtree(out)
        resumed += at_work(out)
        process = start(QUICK, *argv, f"--out={out}")
        if killed % 2 == 0 and wanted:  # every other time at a moment when there is something to lose
            until(lambda process=process: at_work(out) or process.poll() is not None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(order.uniform(0, 1) ** 2 * takes if wanted else None)
        process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        killed += process.returncode != 0
    assert contents(out / "x") == whole


# ------------------------------------------------------------------------------------- after an interruption


@pytest.fixture
def interrupted(run_data, tmp_path, monkeypatch):
    """A preparation of x.jsonl and y.jsonl that was interrupted."""
    write_jsonl(tmp_path / "x.jsonl", stories(30))
    write_jsonl(tmp_path / "y.jsonl", stories(60)[30:])
    with task_size(100), stopped_after_commit(5):
        code, _, err = run_data("x.jsonl", "y.jsonl", "--name=z", "--val=0.3")
    assert (code, err) == (130, "data.py: interrupted; the same command goes on from here\n")


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def rewrite(path):
    """Another content of the same size."""
    path.write_bytes(path.read_bytes().replace(b"Document", b"document"))


@pytest.mark.parametrize("names, flags, change, message", [
    (["x.jsonl", "y.jsonl"], [], lambda: grow(Path("y.jsonl")), "y.jsonl changed since the preparation in corpora/.z.building began"),
    (["x.jsonl", "y.jsonl"], [], lambda: touch(Path("x.jsonl")), "x.jsonl changed since"),
    (["x.jsonl", "y.jsonl"], [], lambda: rewrite(Path("x.jsonl")), "x.jsonl changed since"),
    (["x.jsonl"], [], None, "y.jsonl changed since"),
    (["x.jsonl", "y.jsonl", "new.jsonl"], [], lambda: write_jsonl(Path("new.jsonl"), stories(1)), "new.jsonl changed since"),
    (["y.jsonl", "x.jsonl"], [], None, "order changed since"),
    (["x.jsonl", "y.jsonl"], ["--dedup=False"], None, "other settings (dedup True → False)"),
    (["x.jsonl", "y.jsonl"], ["--shard_tokens=1000"], None, "other settings (shard_tokens 1073741824 → 1000)"),
    (["x.jsonl", "y.jsonl"], ["--tokenizer=other.json"], None, "other settings (tokenizer 'bytes' → 'tokenizer.json "),
], ids=["grown", "touched", "rewritten", "fewer", "more", "order", "dedup", "shards", "tokenizer"])
def test_what_changed_is_named(run_data, interrupted, names, flags, change, message):
    byte_level(Path("other.json"))
    if change:
        change()
    before = contents("corpora")
    code, _, err = run_data(*names, "--name=z", "--val=0.3", *flags)
    assert code == 2 and err.startswith("data.py: ") and err.count("\n") == 1 and message in err and "--restart" in err
    assert contents("corpora") == before  # it can still go on as it was
    assert run_data(*names, "--name=fresh", "--val=0.3", *flags)[0] == 0
    code, _, err = run_data(*names, "--name=z", "--val=0.3", *flags, "--restart")
    assert code == 0 and contents("corpora/z") == contents("corpora/fresh") and not list(Path("corpora").glob(".*")), err


def test_dataset_that_changed(run_data, tmp_path, offline):
    as_dataset(tmp_path, "", stories(30))
    with task_size(100), stopped_after_commit(5):
        assert run_data("saved", "--name=z")[0] == 130
    shutil.rmtree("saved")
    as_dataset(tmp_path, "", [text.upper() for text in stories(30)])
    code, _, err = run_data("saved", "--name=z", "--workers=1")
    assert code == 2 and err.endswith("saved changed since the preparation in corpora/.z.building began; start again with --restart\n")


def test_other_processes_and_names_of_settings_may_go_on(run_data, interrupted):
    """The number of processes is no setting of the result."""
    assert run_data("x.jsonl", "y.jsonl", "--name=z", "--val=0.3", "--workers=1", "--val_share=0.2")[0] == 0
    assert texts_in("corpora/z") == by_split(stories(60), 0.3)


@pytest.mark.parametrize("change", [grow, touch, rewrite, Path.unlink], ids=["grown", "touched", "rewritten", "gone"])
def test_source_that_changes_while_it_is_read(run_data, refused, tmp_path, change):
    write_jsonl(tmp_path / "x.jsonl", stories(30))
    finish = prepare.check_unchanged

    def check(source):
        change(Path("x.jsonl"))
        finish(source)

    with mock.patch.object(prepare, "check_unchanged", check):
        refused("x.jsonl", message="x.jsonl: No such file" if change is Path.unlink else "x.jsonl changed while it was read; start again")


def test_damaged_ledger(run_data, interrupted):
    Path("corpora/.z.building/ledger.sqlite").write_bytes(b"no database" * 1000)
    code, _, err = run_data("x.jsonl", "y.jsonl", "--name=z", "--val=0.3")
    assert code == 2 and err.startswith("data.py: ") and err.count("\n") == 1 and "--restart" in err
    assert run_data("x.jsonl", "y.jsonl", "--name=z", "--val=0.3", "--restart")[0] == 0
    assert texts_in("corpora/z") == by_split(stories(60), 0.3)


@pytest.mark.parametrize("again", [jsonl(stories(40)), jsonl(stories(41))], ids=["same", "other"])
def test_standard_input_after_an_interruption(run_data, again):
    with task_size(100), stopped_after_commit(5):
        assert run_data("-", "--format=jsonl", stdin=jsonl(stories(40)))[0] == 130
    code, _, err = run_data("-", "--format=jsonl", stdin=again)
    if again == jsonl(stories(40)):
        assert code == 0 and texts_in("corpora/stdin") == by_split(stories(40), 0.1), err
    else:
        assert code == 2 and err.count("\n") == 1 and "stdin.jsonl" in err and "--restart" in err
        assert run_data("-", "--format=jsonl", "--restart", stdin=again)[0] == 0 and texts_in("corpora/stdin") == by_split(stories(41), 0.1)


def test_other_standard_input_does_not_cost_what_was_done(run_data):
    with task_size(100), stopped_after_commit(5):
        assert run_data("-", "--format=jsonl", stdin=jsonl(stories(40)))[0] == 130
    assert run_data("-", "--format=jsonl", stdin=jsonl(stories(41)))[0] == 2
    code, _, err = run_data("-", "--format=jsonl", stdin=jsonl(stories(40)))
    assert code == 0, err


def test_two_preparations_of_one_name(tmp_path):
    source, refusals = write_jsonl(tmp_path / "x.jsonl", stories(30)), []
    cfg = prepare.Config()
    found = sources.find_sources([str(source)], cfg)

    def second(*_):
        with pytest.raises(ValueError, match="another process is preparing .*/.out.building"):
            prepare.prepare(found, tmp_path / "out", cfg)
        refusals.append(1)

    prepare.prepare(found, tmp_path / "out", cfg, second)
    assert refusals and texts_in(tmp_path / "out") == by_split(stories(30), 0.1)


@pytest.mark.parametrize("name, flag", [("many.jsonl", ""), ("many.jsonl", "--restart"), ("-", "")])
def test_second_process_of_one_name_is_refused(tmp_path, many, name, flag):
    """And harms the first in no way, with another standard input or --restart either."""
    argv = [name if name == "-" else many, f"--out={tmp_path / 'out'}", "--name=x", "--format=jsonl", "--workers=1"]
    with open(many) as stdin:
        first = start(SLOW, *argv, stdin=stdin)
        until(lambda: at_work(tmp_path / "out"))
        first.send_signal(signal.SIGSTOP)
    try:
        second = subprocess.run([sys.executable, "data.py", *argv, *filter(None, [flag])], cwd=ROOT, capture_output=True, text=True, input='{"text": "a"}\n')
    finally:
        first.send_signal(signal.SIGCONT)
        first.terminate()  # the rest would only take time
        _, err = first.communicate(timeout=60)
    assert second.returncode == 2 and re.fullmatch(r"data\.py: another process is preparing [^\n]*\n", second.stderr), second.stderr
    assert (first.returncode, err) == (130, "data.py: interrupted; the same command goes on from here\n")
    with open(many) as stdin:
        third = subprocess.run([sys.executable, "data.py", *argv], cwd=ROOT, capture_output=True, text=True, stdin=stdin)
    assert third.returncode == 0, third.stderr
    assert texts_in(tmp_path / "out/x") == by_split(stories(600), 0.1)


# ------------------------------------------------------------------------------------------------- bad input


@quick
@given(st.text(st.sampled_from("aé世🙂\n"), max_size=30), st.sampled_from([b"\xff", b"\xc3", b"\xe4\xb8", b"\x80", b"\xed\xa0\x80", b"\xf0\x9f\x99"]),
       st.text(st.sampled_from("a\n"), max_size=9), st.integers(1, 9))
def test_non_utf8_names_the_offset(scratch, before, wrong, after, size):
    path = scratch / "wrong.txt"
    path.write_bytes(before.encode() + wrong + after.encode())
    with task_size(size), pytest.raises(ValueError) as caught:
        list(sources.text_pieces(sources.Source("txt", str(path)), 0, None, "stop"))
    assert str(caught.value) == f"{path}: not UTF-8 at byte {len(before.encode())}; see --bad_bytes"
    with task_size(size):
        texts, _, places = zip(*sources.text_pieces(sources.Source("txt", str(path)), 0, None, "replace"))
    assert "".join(texts) == path.read_bytes().decode("utf-8", "replace")
    assert sum(places) == "".join(texts).count("\ufffd")


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("layout", ["alone", "folder", "separated"])
def test_non_utf8_text_names_file_and_byte(refused, tmp_path, ending, layout):
    (tmp_path / "in").mkdir()
    if layout == "folder":
        write_txt(tmp_path / "in" / "good.txt", "good")
    for at in (5, 1_300_000):  # and beyond the first MiB
        raw = bytearray(b"some words\n" * 130_000)
        raw[at] = 0xFF
        (tmp_path / "in" / f"bad.txt{ending}").write_bytes(gzip.compress(raw, 1) if ending == ".gz" else compressed(ending, bytes(raw)))
        argv = ["in"] if layout == "folder" else [f"in/bad.txt{ending}", *(["--separator=s\\n"] if layout == "separated" else [])]
        refused(*argv, "--workers=1", message=f"in/bad.txt{ending}: not UTF-8 at byte {at}; see --bad_bytes")


def test_non_utf8_record_names_file_and_line(refused, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(stories(30_000)) + b'{"text": "\xe9"}\n')
    refused("x.jsonl", message="x.jsonl:30001: not UTF-8 at byte 10 of the line; see --bad_bytes")


def test_non_utf8_in_parquet_names_file_and_record(run_data, refused, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([text.encode() for text in stories(9)] + [b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    refused("x.parquet", message="x.parquet, record 10: not UTF-8 at byte 3; see --bad_bytes")
    for choice, more in (("skip", []), ("replace", ["caf\ufffd"])):
        code, _, err = run_data("x.parquet", f"--bad_bytes={choice}", f"--name={choice}", "--val=0.3")
        assert code == 0 and texts_in(f"corpora/{choice}") == by_split(stories(9) + more, 0.3), err


def bad_input(folder, layout):
    """A source with stories(20), of which number 3 has a wrong byte and number 5 a cut character at its end."""
    raw = [text.encode() for text in stories(20)]
    raw[3], raw[5] = raw[3].replace(b"about", b"ab\xffut"), raw[5] + "🙂".encode()[:3]
    if layout == "folder":
        (folder / "in").mkdir()
        for i, text in enumerate(raw):
            (folder / "in" / f"{i:03}.txt").write_bytes(text)
        return raw, ["in"]
    if layout == "separated":
        (folder / "x.txt").write_bytes(b"%%".join(raw))
        return raw, ["x.txt", "--separator=%%"]
    (folder / "x.jsonl").write_bytes(b"".join(b'{"text": "' + text.replace(b"\n", b"\\n") + b'"}\n' for text in raw))
    return raw, ["x.jsonl"]


@pytest.mark.parametrize("size", [20, 1 << 20])
@pytest.mark.parametrize("layout", ["folder", "separated", "jsonl"])
def test_bad_bytes_are_skipped_or_replaced(run_data, tmp_path, layout, size):
    raw, argv = bad_input(tmp_path, layout)
    with task_size(size):
        code, printed, err = run_data(*argv, "--val=0.3", "--bad_bytes=skip", "--name=skip")
        assert code == 0 and printed.endswith("left out: 2 undecodable\n") and "replaced" not in printed, err
        assert texts_in("corpora/skip") == by_split([text for i, text in enumerate(stories(20)) if i not in (3, 5)], 0.3)
        code, printed, err = run_data(*argv, "--val=0.3", "--bad_bytes=replace", "--name=replace")
    assert code == 0 and "left out" not in printed and printed.endswith("replaced: bytes that are no UTF-8, in 2 places\n"), err
    assert json.loads(Path("corpora/replace/meta.json").read_text())["replaced"] == 2
    assert texts_in("corpora/replace") == by_split([text.decode("utf-8", "replace") for text in raw], 0.3)


@pytest.mark.parametrize("layout", ["alone", "folder"])
def test_replaced_bytes_of_a_large_text_are_counted(fast_path, layout):
    """Once each, in pieces of any size and after an interruption; what was U+FFFD before is not among them."""
    text = "\n".join(stories(30)).encode()
    source = fast_path / "in"
    source.mkdir()
    (source / "x.txt").write_bytes(text + b"\n\xef\xbf\xbd and \xff\xff, \xe4\xb8\n" + text + b"\x80")
    for i, other in enumerate(BOTH):
        write_txt(source / f"{i}.txt", other)
    source = source / "x.txt" if layout == "alone" else source
    for size in (20, 200, 1 << 20):
        out = fast_path / str(size)
        with task_size(size):
            if size < 1000:
                with stopped_after_commit(6), pytest.raises(KeyboardInterrupt):
                    prepared(out, source, val=0.5, bad_bytes="replace")
            assert prepared(out, source, val=0.5, bad_bytes="replace")["replaced"] == 4
        assert contents(out) == contents(fast_path / "20")


@pytest.mark.parametrize("layout, flags, lost", [("folder", "--bad_bytes=skip", 2), ("jsonl", "--bad_records=skip", 0)])
def test_skipping_one_kind_does_not_skip_the_other(run_data, refused, tmp_path, layout, flags, lost):
    _, argv = bad_input(tmp_path, layout)
    if lost:
        assert json.loads(Path("corpora/ok/meta.json").read_text() if run_data(*argv, flags, "--name=ok")[0] == 0 else "{}")["left_out"]["undecodable"] == lost
    else:
        refused(*argv, flags, message="x.jsonl:4: not UTF-8")
    write_jsonl(tmp_path / "y.jsonl", stories(9)).open("a").write("{\n")
    refused("y.jsonl", "--bad_bytes=skip", message="y.jsonl:10: not JSON")


def test_skip_leaves_nothing_of_a_single_text(refused, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\xff" * 9)
    refused("x.txt", "--bad_bytes=skip", message="x.txt: not UTF-8 at byte 3; a single text cannot be skipped: --bad_bytes=replace, or cut it into documents with --separator=")
    refused("x.txt", message="x.txt: not UTF-8 at byte 3; see --bad_bytes")


BAD_RECORDS = [
    (b'{"text": ', "not JSON"),
    (b'{"txt": "a", "id": 1}', "no field 'text'; there are txt, id; name the text's with --field"),
    (b"{}", "no field 'text'; there are none; name the text's with --field"),
    (rb'{"a\nb": 1, "\ud800": 2}', r"no field 'text'; there are 'a\nb', '\ud800'; name"),
    (json.dumps(dict.fromkeys(map(str, range(99)))).encode(), "no field 'text'; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …; name"),
    (b'["text"]', "no field 'text'"),
    (b'"text"', "no field 'text'"),
    (b"7", "no field 'text'"),
    (b"null", "no field 'text'"),
    (b'{"text": 7}', "field 'text' is not text"),
    (b'{"text": null}', "field 'text' is not text"),
    (rb'{"text": "\ud800"}', "field 'text' holds half a character"),  # JSON allows it, UTF-8 doesn't
    (rb'{"text": "a\udc00\ud83db"}', "field 'text' holds half a character"),
    (b'{"id": ' + b"9" * 5000 + b', "text": "a"}', "not JSON"),  # Python refuses such integers
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON"),
    (b'{"text": "a\tb"}\0', "not JSON"),
]
BAD_IDS = ["cut", "field", "fields", "odd", "many", "list", "string", "number", "null", "type", "none", "surrogate", "surrogates", "integer", "deep", "two", "control"]


@pytest.mark.parametrize("line, message", BAD_RECORDS, ids=BAD_IDS)
def test_bad_records_name_file_and_line_or_are_counted(run_data, refused, tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line + b"\n" + jsonl(stories(20)))
    with task_size(20):
        refused("x.jsonl", message="x.jsonl:4: " + message)
        code, printed, err = run_data("x.jsonl", "--val=0.3", "--bad_records=skip")
    assert code == 0 and printed.endswith("left out: 1 malformed\n"), err
    assert texts_in("corpora/x") == by_split(["one", "two", *stories(20)], 0.3)


def test_bad_records_in_another_process(tmp_path):
    """What a process that tokenizes finds is told by the first one, in one line."""
    source = write_jsonl(tmp_path / "x.jsonl", stories(9))
    source.open("a").write("{\n")
    done = subprocess.run([sys.executable, ROOT / "data.py", source, "--workers=2"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(rf"data\.py: {source}:10: not JSON: [^\n]*\n", done.stderr), done.stderr
    assert not contents(tmp_path / "corpora") and not list((tmp_path / "corpora").iterdir())


def test_parquet_records_that_are_no_text(run_data, refused, tmp_path):
    write_parquet(tmp_path / "x.parquet", [*stories(20), None])
    refused("x.parquet", message="x.parquet, record 21: its text is not text; --bad_records=skip leaves such records out")
    code, printed, _ = run_data("x.parquet", "--bad_records=skip", "--val=0.3")
    assert code == 0 and printed.endswith("left out: 1 malformed\n") and texts_in("corpora/x") == by_split(stories(20), 0.3)


def test_parquet_files_that_are_none(refused, tmp_path):
    whole = write_parquet(tmp_path / "x.parquet", stories(200)).read_bytes()
    refused("x.parquet", "--field=body", message="x.parquet: no column 'body'; there are id, text; name the text's with --field")
    for i, raw in enumerate([b"", b"no parquet file", whole[:-20], whole[:100], whole[:4] + bytes(300) + whole[304:]]):
        (tmp_path / f"bad{i}.parquet").write_bytes(raw)
        refused(f"bad{i}.parquet", message=f"bad{i}.parquet: not a whole parquet file: ")


def test_datasets_that_are_none(refused, tmp_path, offline):
    as_dataset(tmp_path, "of a dict", stories(9))
    refused("saved", "--field=body", message="hf:saved: no column 'body'; there are id, text; name the text's with --field")
    refused("saved", "--hf_split=dev", message="hf:saved: no split 'dev'; there are test, train; name one with --hf_split")
    refused("hf:nobody/nothing", message="hf:nobody/nothing: ")


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("layout", ["x.jsonl", "x.txt", "folder", "separated"])
def test_damaged_compressed_files(refused, tmp_path, ending, layout):
    name, argv = ("x.txt" if layout in ("folder", "separated") else layout) + ending, []
    raw = jsonl([np.random.default_rng(i).bytes(100).hex() for i in range(200)])  # 40 kB that hardly shrink
    packed = compressed(ending, raw)
    if layout == "folder":
        write_txt(tmp_path / "other.txt", "some text")
        argv = ["other.txt"]
    if layout == "separated":
        argv = ["--separator=id"]
    rubbish = [packed + b"rubbish" * 9] if ending in (".gz", ".zst") else []  # bzip2 and xz pass over what follows
    for damaged in (packed[: len(packed) // 2], packed[:-1], *rubbish, raw, packed[:3], b"\0" * 9 + packed[9:]):
        (tmp_path / name).write_bytes(damaged)
        with task_size(2000):
            refused(name, *argv, message=f"{name}: its compressed data are damaged or cut short (")


@pytest.mark.parametrize("name, raw, message", [
    ("x.txt", b"", "x.txt: no text for the train split; use more text or another --val"),
    ("x.txt.gz", gzip.compress(b"", mtime=0), "x.txt.gz: no text for the train split"),
    ("x.jsonl", b"", "x.jsonl: no text for the train split"),
    ("x.jsonl", b"\n \n\n", "x.jsonl: no text for the train split"),
    ("x.jsonl", jsonl(["", "", ""]), "x.jsonl: no text for the train split (left out: 3 empty); use more text or another --val"),
    ("x.jsonl", jsonl(["only one"]), "x.jsonl: no text for the val split"),
    ("x.jsonl", jsonl(["only one"] * 4), "no text for the val split (left out: 3 duplicates)"),
    ("-", b"", "stdin.txt: no text for the train split"),
])
def test_too_little_text(refused, tmp_path, name, raw, message):
    if name != "-":
        (tmp_path / name).write_bytes(raw)
    refused(name, message=message, stdin=raw)


def test_empty_files_and_tables(run_data, refused, tmp_path):
    write_parquet(tmp_path / "x.parquet", ["a"][:0])
    write_folder(tmp_path / "in", ["", ""])
    refused("x.parquet", message="x.parquet: no text for the train split")
    refused("in", message="000.txt, 001.txt: no text for the train split (left out: 2 empty)")
    write_jsonl(tmp_path / "x.jsonl", ["", *stories(20), ""])
    code, printed, _ = run_data("in", "x.parquet", "x.jsonl", "--val=0.3")
    assert code == 0 and printed.endswith("left out: 4 empty\n") and texts_in("corpora/in") == by_split(stories(20), 0.3)


@pytest.mark.parametrize("kind", ["jsonl", "separated", "text"])
def test_documents_beyond_the_longest(refused, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sources, "LONGEST", 1 << 21)
    write_txt(tmp_path / "x.txt", "a%%" + "b" * (1 << 22))
    (tmp_path / "x.jsonl").write_bytes(jsonl(["a", "b" * (1 << 22)]))
    if kind == "jsonl":
        refused("x.jsonl", message="x.jsonl: from line 1 on: a line of more than 2 MiB")
    elif kind == "separated":
        refused("x.txt", "--separator=%%", message="x.txt: no separator '%%' within 2 MiB from byte 3 on")
    else:
        refused("x.txt", message="x.txt: no place to cut the text within 2 MiB from byte 0 on")


@pytest.mark.parametrize("argv, message", [
    (["absent.txt"], "absent.txt: no such file"),
    (["absent/*.txt", "--name=x"], "absent/*.txt: no file matches"),
    (["absent/*.txt"], "absent/*.txt: no file matches"),
    (["here.txt", "absent/*.txt"], "absent/*.txt: no file matches"),
    (["here.txt", "absent.txt"], "absent.txt: no such file"),
    (["picture.png"], "picture.png: expected docs, shakespeare, hf:NAME, -, or a .txt, .jsonl, .ndjson, .parquet file"),
    (["pictures"], "pictures: no .txt, .jsonl, .ndjson, .parquet files in it"),
    (["h*.txt"], "h*.txt: give the corpus a name with --name="),
    (["here.txt", "--val=0"], "--val=0: must be above 0"),
    (["here.txt", "--val=1.5"], "--val=1.5: must be at most 0.999"),
    (["here.txt", "--format=csv"], "choose from auto, txt, jsonl, parquet"),
    (["here.txt", "--tokenizer=gtp2"], "unknown tokenizer 'gtp2'; choose bytes, one of gpt2"),
    (["here.txt", "--tokenizer=absent.json"], "absent.json: no such tokenizer file"),
    (["here.txt", "--tokenizer=here.json"], "here.json: no tokenizer.json"),
    (["here.txt", "--eos=</s>"], "eos=</s>: only a tokenizer.json leaves that open"),
    (["here.txt", "--name=taken"], "taken exists; remove it or choose another --name"),
    (["here.txt", "--name=../esc"], "--name=../esc: a folder's name holds no '/'; --out says where it is"),
    (["here.txt", "--name=/tmp/esc"], "--name=/tmp/esc: a folder's name holds no '/'"),
    (["here.txt", "--seperator=a"], "--seperator=a: unknown setting 'seperator'; did you mean 'separator'?"),
    (["inspect"], "inspect what? python data.py inspect FOLDER"),
    (["export", "here"], "export what to where?"),
    (["inspect", "nowhere"], "no corpus in 'nowhere'"),
])
def test_command_line_refuses(refused, tmp_path, argv, message):
    write_txt(tmp_path / "here.txt", "some text")
    write_txt(tmp_path / "here.json", "{}")
    (tmp_path / "pictures").mkdir()
    for name in ("picture.png", "pictures/a.png", "pictures/.hidden.txt"):
        (tmp_path / name).write_bytes(b"\x89PNG")
    Path("corpora/taken").mkdir(parents=True)
    refused(*argv, message=message)
    assert [p.name for p in Path("corpora").iterdir()] == ["taken"]


@pytest.mark.parametrize("name", [".", ".."])
def test_folders_without_a_name(run_data, tmp_path, monkeypatch, name):
    """`data.py .` makes a corpus inside corpora/, or asks for its name."""
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    for folder in (tmp_path / "a", tmp_path / "a/b"):
        write_jsonl(folder / "x.jsonl", stories(30))
    code, _, err = run_data(name)
    assert code == 2 and "--name" in err or code == 0
    assert not Path("corpora/meta.json").exists() and not list(Path("corpora").glob(".*")) and len(list(Path(".").glob("corpora/*"))) == (code == 0)


# --------------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("name, limit", [("x.jsonl", 0), ("x.jsonl", 1000), ("x.jsonl", 20_000), ("x.jsonl", 100_000), ("-", 1000)])
def test_full_disk(tmp_path, name, limit):
    """No file may grow beyond `limit`: whatever is written first fails, in one line, and nothing stays."""
    source = write_jsonl(tmp_path / "x.jsonl", stories(4000))
    with open(source) as stdin:
        done = subprocess.run([sys.executable, ROOT / "data.py", name, "--workers=1", "--format=jsonl"], cwd=tmp_path, capture_output=True, text=True,
                              stdin=stdin, env=os.environ | dict(PYTHONDONTWRITEBYTECODE="1"),
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and re.fullmatch(r"data\.py: [^\n]+\n", done.stderr), done.stderr
    assert not (tmp_path / "corpora").exists() or not list((tmp_path / "corpora").iterdir())


@pytest.mark.parametrize("owner, name", [(tokenfiles, "flush"), (prepare.Files, "write"), (prepare.Ledger, "commit"), (prepare.Ledger, "is_new"),
                                         (prepare.shutil, "copyfileobj"), (np.ndarray, None)])
@pytest.mark.parametrize("after", [0, 1, 3, 10])
def test_full_disk_at_any_write(run_data, refused, tmp_path, owner, name, after):
    write_jsonl(tmp_path / "x.jsonl", stories(40))
    count = itertools.count()
    if name is None:  # the last file that is written
        owner, name = tokenizers.Bytes, "token_bytes"
    original, full = getattr(owner, name), OSError(errno.ENOSPC, "No space left on device")
    if owner is prepare.Ledger:
        full = sqlite3.OperationalError("database or disk is full")

    def failing(*arguments, **more):
        if next(count) == after:
            raise full
        return original(*arguments, **more)

    with task_size(100), mock.patch.object(owner, name, failing):
        if name == "copyfileobj" and not after:
            refused("-", "--format=jsonl", stdin=jsonl(stories(40)), message="No space left on device")
        elif name in ("write", "is_new") or after <= dict(flush=3, commit=1, token_bytes=0).get(name, -1):
            refused("x.jsonl", message="disk is full" if owner is prepare.Ledger else "No space left on device")
    assert run_data("x.jsonl")[0] == 0  # and the name is free again


# ------------------------------------------------------------------------------------------- a tokenizer.json


def byte_level(path, eos="<|endoftext|>", **options):
    """A small byte-level BPE, trained here."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(**dict(dict(add_prefix_space=False), **options))
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=[eos], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             show_progress=False)
    inner.train_from_iterator(stories(100), trainer)
    inner.save(str(path))
    return inner


def byte_fallback(path):
    """A small BPE of SentencePiece's kind: spaces as ▁, and bytes for what it has no token for."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Documentisabuz.0123456789",
                                                 "▁D", "is", "▁is"])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "D"), ("i", "s"), ("▁", "is")], byte_fallback=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    inner.add_special_tokens(["<s>", "</s>"])
    inner.save(str(path))
    return inner


@pytest.mark.parametrize("make, eos", [(byte_level, "<|endoftext|>"), (byte_fallback, "</s>")])
def test_tokenizer_file(tmp_path, make, eos):
    """Its own encoding of each document; a copy travels with the corpus, and is found by the name in meta.json."""
    inner = make(tmp_path / "tokenizer.json")
    texts = [*stories(30), eos, f"a{eos}b <s>", "日本\n\n  Documents"]
    meta = prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", texts), tokenizer=str(tmp_path / "tokenizer.json"), val=0.3)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()
    assert texts_in(tmp_path / "out") == by_split(texts, 0.3)
    corpus, inner.encode_special_tokens = tokenfiles.load_corpus(tmp_path / "out"), True
    for which, expected in by_split(texts, 0.3).items():
        stream, end = getattr(corpus, which), inner.token_to_id(eos)
        ids = [i for text in expected for i in (*inner.encode(text, add_special_tokens=False).ids, end)]
        assert stream.read(0, 1 << 40).tolist() == [end, *ids]
        assert corpus.token_bytes[stream.read(0, 1 << 40)].sum() == meta[which]["bytes"]
    assert corpus.meta["eos_id"] == inner.token_to_id(eos) and meta["tokenizer"].startswith("tokenizer.json ") and corpus.tokenizer_file


def test_tokenizer_file_in_processes(run_data, tmp_path):
    byte_level(tmp_path / "tokenizer.json")
    write_jsonl(tmp_path / "x.jsonl", stories(60))
    for workers in (1, 2):
        with task_size(300):
            code, _, err = run_data("x.jsonl", "--tokenizer=tokenizer.json", f"--workers={workers}", f"--name=w{workers}")
        assert code == 0, err
    assert contents("corpora/w1") == contents("corpora/w2")


def test_tokenizer_file_without_an_end(run_data, refused, tmp_path):
    byte_level(tmp_path / "tokenizer.json", eos="<end>")
    write_jsonl(tmp_path / "x.jsonl", stories(30))
    refused("x.jsonl", "--tokenizer=tokenizer.json", message="tokenizer.json: which token ends a document?; give it with --eos= (its specials: <end>)")
    refused("x.jsonl", "--tokenizer=tokenizer.json", "--eos=<eos>", message="tokenizer.json: has no token '<eos>'; give it with --eos=")
    assert run_data("x.jsonl", "--tokenizer=tokenizer.json", "--eos=<end>")[0] == 0
    assert texts_in("corpora/x") == by_split(stories(30), 0.1)


LLAMA = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NFC, OWN = {"type": "NFC"}, {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def splitting(regex, **changes):
    """A pre-tokenizer of a pattern of its own, as newer models have them."""
    return {"type": "Sequence", "pretokenizers": [dict(dict(type="Split", pattern={"Regex": regex}, behavior="Isolated", invert=False), **changes),
                                                  OWN | dict(use_regex=False)]}


def with_layout(folder, normalizer, splits):
    """A tokenizer.json with merges across everything that a pattern may join; tokenizers.load_tokenizer's."""
    hf = pytest.importorskip("tokenizers")
    spelled = dict(zip("\n\t\r ", "ĊĉčĠ"))
    pairs = [tuple(spelled.get(c, c) for c in pair) for pair in itertools.product("aZ1.'!/\t\r\n ", repeat=2)]
    vocab = {token: i for i, token in enumerate([*sorted(hf.pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs), "<eos>"])}
    inner = hf.Tokenizer(hf.models.BPE(vocab, pairs))
    inner.decoder = hf.decoders.ByteLevel()
    inner.add_special_tokens(["<eos>"])
    write_txt(folder / "tokenizer.json", json.dumps(json.loads(inner.to_str()) | dict(normalizer=normalizer, pre_tokenizer=splits)))
    return tokenizers.load_tokenizer(str(folder))


@pytest.fixture(scope="module", params=["GPT-NeoX", "Llama 3", "Qwen"])
def cuttable(request, scratch):
    return with_layout(scratch, *{"GPT-NeoX": (NFC, OWN), "Llama 3": (None, splitting(LLAMA)), "Qwen": (NFC, splitting(LLAMA.replace("{1,3}", "")))}[request.param])


@settings(max_examples=150, deadline=None)
@given(TEXT, st.integers(1, 9))
@example("cafe\u0301\n\u0301a\u030a b\u0301 c\n\u0301", 1)  # composed by NFC, but not with a newline or a space
@example("one!\ntwo\n!three!\n!four\n", 1)
def test_large_texts_are_cut_for_tokenizer_files(scratch, cuttable, text, size):
    """Else they would be read and encoded whole, which takes a hundred times their size."""
    assert cuttable.cuts
    with task_size(size):
        pieces = list(sources.cut_up(text))
    for some in pieces, text_pieces(scratch, text, size):
        assert [i for ids in cuttable.encode_batch(some) for i in ids.tolist()] == cuttable.encode(text).tolist()


@pytest.mark.parametrize("normalizer, splits", [
    ({"type": "NFKC"}, OWN), ({"type": "Sequence", "normalizers": [NFC]}, OWN), (None, OWN | dict(add_prefix_space=True)), (None, OWN | dict(use_regex=False)),
    (None, splitting(r"\n\p{L}+")), (None, splitting(LLAMA, behavior="MergedWithNext")), (None, splitting(LLAMA, invert=True))])
def test_other_tokenizer_files_get_texts_whole(tmp_path, normalizer, splits):
    assert not with_layout(tmp_path, normalizer, splits).cuts


@pytest.mark.parametrize("options", [dict(), dict(use_regex=False), dict(add_prefix_space=True)], ids=["plain", "no regex", "prefix"])
def test_long_documents_of_a_tokenizer_file(tmp_path, options):
    """Documents longer than a task: cut only where that changes no token."""
    tokenizers = pytest.importorskip("tokenizers")
    inner = byte_level(tmp_path / "tokenizer.json", **options)
    if options.get("use_regex") is False:  # a merge across lines
        layout = json.loads(inner.to_str())
        layout["model"]["vocab"]["ĊI"], layout["model"]["merges"] = len(layout["model"]["vocab"]), [["Ċ", "I"], *layout["model"]["merges"]]
        write_txt(tmp_path / "tokenizer.json", json.dumps(layout))
        inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts, val = [LONG, LONG.upper(), *BOTH], 0.5
    names = [write_jsonl(tmp_path / "x.jsonl", texts), *([] if options else [write_folder(tmp_path / "texts", texts)])]
    for name in names:  # large .txt files are cut without regard to the tokenizer
        out = tmp_path / f"{name.name}.out"
        with task_size(50):
            prepared(out, name, tokenizer=str(tmp_path / "tokenizer.json"), val=val)
        corpus = tokenfiles.load_corpus(out)
        for which, expected in by_split(texts, val).items():
            ids = [i for text in expected for i in (*inner.encode(text).ids, corpus.meta["eos_id"])]
            assert getattr(corpus, which).read(1, 1 << 40).tolist() == ids


# ---------------------------------------------------------------------------------------- command line, download


@pytest.mark.parametrize("source, name", [("hf:org/tales-v1.5", "tales-v1.5"), ("a/b.txt", "b"), ("a/b.v2.jsonl.zst", "b.v2"), ("-", "stdin")])
def test_default_names(source, name):
    assert prepare.default_name([source, "another.txt"]) == name


def test_command_line_prints_what_came_out(run_data, tmp_path):
    write_jsonl(tmp_path / "my.v2.jsonl.gz", [])
    (tmp_path / "my.v2.jsonl.gz").write_bytes(gzip.compress(jsonl(["", *stories(2000), *stories(3)])))
    code, printed, err = run_data("my.v2.jsonl.gz", "--shard_tokens=20000")
    meta = json.loads(Path("corpora/my.v2/meta.json").read_text())
    assert code == 0 and not err
    for which in ("train", "val"):
        s, files = meta[which], len(meta[which]["files"])
        first = f"corpora/my.v2/{which}_00000.bin and {files - 1} more" if files > 1 else f"corpora/my.v2/{which}.bin"
        assert f"{first}: {s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes\n" in printed
    assert len(meta["train"]["files"]) > 1 and printed.endswith("left out: 3 duplicates, 1 empty\n")


def test_the_bar_fits_into_a_usual_line(run_data, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_jsonl(tmp_path / "web.jsonl", stories(12_000))
    code, printed, _ = run_data("web.jsonl", "--name=web[b]")  # which is no markup
    line = printed.splitlines()[0]
    assert code == 0 and re.search(r"^web\[b\] ━+ 12,000 documents, [\d,]+ tokens [\d.]+ [kM]B/s left 0:00:00$", line), line


@contextlib.contextmanager
def server(body, length):
    """The address of a local web server that promises `length` bytes and sends `body`."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/input.txt"
        listening.shutdown()
        thread.join()


def test_download_once(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with server(b"to be", 5) as url:
        path = prepare.download(url, tmp_path / "new" / "x.txt")
    assert path.read_bytes() == b"to be" and list(path.parent.iterdir()) == [path]
    assert prepare.download(url, path) == path  # the server is gone: nothing is fetched again
    with pytest.raises(OSError, match=f"cannot download {url}: .*save it as a .txt file"):
        prepare.download(url, tmp_path / "y.txt")


def test_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with server(b"to be", 500) as url, pytest.raises(OSError, match="cannot download"):
        prepare.download(url, tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_shakespeare(run_data, refused, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    text = "To be, or not to be.\n" * 20
    with server(text.encode(), len(text)) as url:
        monkeypatch.setattr(prepare, "SHAKESPEARE", url)
        assert run_data("shakespeare")[0] == 0
    found = texts_in("corpora/shakespeare")
    assert found["train"][0] + found["val"][0] == text
    shutil.rmtree("corpora/shakespeare")
    assert run_data("shakespeare")[0] == 0  # without its server
    shutil.rmtree("corpora")
    refused("shakespeare", message="cannot download http://127.0.0.1")


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    done = subprocess.run([sys.executable, "data.py", "docs", f"--out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out, done.stdout


def test_docs_from_the_command_line(docs):
    out, printed = docs
    assert [p.name for p in out.iterdir()] == ["docs"]
    meta, documents = tokenfiles.load_corpus(out / "docs").meta, texts_in(out / "docs")
    assert meta["tokenizer"] == "bytes" and meta["sources"] == ["docs"]
    for which in ("train", "val"):
        s = meta[which]
        assert s["tokens"] == s["bytes"] + s["documents"] + 1 and s["documents"] == len(documents[which])
        assert f"{s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes" in printed
        assert all(documents[which]) and len(set(documents[which])) == len(documents[which])
    assert not set(documents["train"]) & set(documents["val"])
    assert 0.02 < len(documents["val"]) / len(documents["train"]) < 0.25
    assert meta["train"]["bytes"] > 1e6
    text = "".join(documents["train"] + documents["val"])
    assert 'The "assert" statement' in text and "Compile a regular expression pattern" in text
