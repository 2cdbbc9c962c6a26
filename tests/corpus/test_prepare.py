"""Prepared corpora: tokens of each document, splits, duplicates, several files, any tasks and processes."""

import hashlib
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import prepared
from corpus_examples import all_tokens, needs_gpt2, quick, stories, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preparations import ONE_OF_EACH, SPLITS, by_split, contents, split_of, task_size, texts_in
from source_examples import (
    KINDS,
    NO_MARK,
    TEXT,
    write_bpe,
    write_folder,
    write_kind,
    write_parquet,
    write_txt,
)

import data
from corpus import prepare, sources, tasks, tokenizers
from corpus.tokenfiles import load_corpus


def tokens_of(folder):
    """{split: all its tokens} of a corpus."""
    corpus = load_corpus(folder)
    return {"train": all_tokens(corpus.train), "val": all_tokens(corpus.val)}


def expected_tokens(texts, val, encode, eos_id):
    """{split: tokens}: an eos, and then those of each document with an eos."""
    tokens = {}
    for split, documents in by_split(texts, val).items():
        tokens[split] = [eos_id]
        for text in documents:
            tokens[split] += [*encode(text), eos_id]
    return tokens


# --------------------------------------------------------------------------- tokens, document by document


@settings(max_examples=30, deadline=None)
@given(st.lists(NO_MARK, max_size=8), st.sampled_from(["jsonl", "separated", "folder"]),
       st.sampled_from([1, 7, 50, 1 << 20]), st.booleans())
@example(["<|endoftext|>", "a\nb<|endoftext|>"], "jsonl", 1, True)  # in a document this is text
def test_tokens_are_tiktokens_own(scratch, encoding, texts, layout, size, ascii_only):
    """What is written is `encode_ordinary` of each document, in their order, also where they are cut."""
    texts = texts + ONE_OF_EACH
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
        expected = expected_tokens(texts, 0.5, encoding.encode_ordinary, encoding.eot_token)
        assert tokens_of(folder / "out") == expected


@settings(max_examples=25, deadline=None)
@given(TEXT.filter(lambda text: len(text) > 2), st.sampled_from([1, 7, 1 << 20]))
def test_tokens_of_a_single_text(scratch, encoding, text, size):
    with tempfile.TemporaryDirectory(dir=scratch) as folder, task_size(size):
        text = "ab" + text + "cd"
        source = write_txt(Path(folder) / "x.txt", text)
        prepared(Path(folder) / "out", source, tokenizer=encoding.name, val=0.5)
        half = next(i for i in range(len(text)) if len(text[:i].encode()) >= len(text.encode()) // 2)
        eos, encode = [encoding.eot_token], encoding.encode_ordinary
        expected = {"train": eos + encode(text[:half]) + eos, "val": eos + encode(text[half:]) + eos}
        assert tokens_of(Path(folder) / "out") == expected


@quick
@given(st.text(st.sampled_from("aé世🙂\n"), min_size=1, max_size=60),
       st.floats(0.01, 0.99), st.integers(1, 30))
@example("a" * 20 + "🙂", 0.1, 30)
def test_single_text_is_split_by_position(scratch, text, val, size):
    cfg = prepare.Config(val=val)
    found = sources.find_sources([str(write_txt(scratch / "whole.txt", text))], cfg)
    with task_size(size):
        pieces = [task.content for task, _, _ in tasks.make_tasks(found, tasks.Place(), cfg)]
    halves = {split: [piece for piece in pieces if piece.split == split] for split in SPLITS}
    texts = {split: "".join(piece.text for piece in half) for split, half in halves.items()}
    characters = [len(text[:i].encode()) for i in range(len(text) + 1)]  # where they begin
    border = int(len(text.encode()) * (1 - val))
    assert texts["train"] + texts["val"] == text
    assert len(texts["train"].encode()) == min(byte for byte in characters if byte >= border)
    for half in halves.values():
        assert [piece.is_last for piece in half] == [False] * (len(half) - 1) + [True] * bool(half)


def test_text_like_special_tokens_stays_text(tmp_path, encoding):
    texts = ["<|endoftext|>", "a<|fim_prefix|>b<|endofprompt|>", *ONE_OF_EACH]
    prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", texts), tokenizer=encoding.name, val=0.5)
    assert texts_in(tmp_path / "out") == by_split(texts, 0.5)


def check_files(folder, tokenizer):
    """Compare meta.json with the bytes on disk and an independent decoding of them. Returns the texts."""
    meta, texts = json.loads((folder / "meta.json").read_text(encoding="utf-8")), texts_in(folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["meta.json", "token_bytes.bin", "train.bin", "val.bin"]
    for key, value in (("tokenizer", tokenizer.name), ("n_vocab", tokenizer.n_vocab),
                       ("eos_id", tokenizer.eos_id), ("mask_id", tokenizer.mask_id)):
        assert meta[key] == value
    for split in SPLITS:
        raw = (folder / f"{split}.bin").read_bytes()
        n_tokens, digest = len(raw) // np.dtype(meta["dtype"]).itemsize, hashlib.sha256(raw).hexdigest()
        n_bytes = sum(len(text.encode()) for text in texts[split])
        files = [dict(name=f"{split}.bin", tokens=n_tokens, sha256=digest)]
        assert meta[split] == dict(tokens=n_tokens, bytes=n_bytes, token_bytes=n_bytes,
                                   documents=len(texts[split]), sha256=digest, files=files)
    return texts


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_prepare_jsonl(tmp_path, name):
    source, seen = write_jsonl(tmp_path / "x.jsonl", stories(60) + stories(30)), []
    cfg = prepare.Config(tokenizer=name, val=0.3)
    found = sources.find_sources([str(source)], cfg)
    meta = prepare.prepare(found, tmp_path / "out", cfg, progress=lambda *counts: seen.append(counts))
    assert check_files(tmp_path / "out", tokenizers.load_tokenizer(name)) == by_split(stories(60), 0.3)
    assert meta["dtype"] == "uint16" and meta["sources"] == ["x.jsonl"]
    assert load_corpus(tmp_path / "out").meta == meta
    assert seen[-1] == (source.stat().st_size, 60, meta["train"]["tokens"] + meta["val"]["tokens"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_prepare_text(tmp_path):
    text = "".join(stories(40))
    with task_size(50):
        prepared(tmp_path / "out", write_txt(tmp_path / "x.txt", text), val=0.1)
    texts = check_files(tmp_path / "out", tokenizers.ByteTokenizer())
    assert texts["train"][0] + texts["val"][0] == text and len(texts["train"]) == len(texts["val"]) == 1


def test_large_vocabulary_takes_four_bytes(tmp_path):
    wide = SimpleNamespace(name="wide", n_vocab=300_000, eos_id=299_999, mask_id=300_000, allows_cuts=True)
    wide.token_bytes = lambda: np.ones(300_000, np.uint16)
    wide.encode = lambda text: [65536 + ord(c) for c in text]
    wide.encode_batch = lambda texts: [np.array(wide.encode(text), np.uint32) for text in texts]
    with mock.patch.object(tokenizers, "load_tokenizer", lambda *_, **__: wide):
        prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", stories(20)), val=0.5)
    corpus = load_corpus(tmp_path / "out")
    assert corpus.train.dtype == corpus.val.dtype == np.uint32
    assert tokens_of(tmp_path / "out") == expected_tokens(stories(20), 0.5, wide.encode, wide.eos_id)


def test_prepare_overwrites_nothing(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", stories(40))
    prepared(tmp_path / "out", source)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="out exists; remove it or choose another --name"):
        prepared(tmp_path / "out", source, val=0.5)
    assert contents(tmp_path) == before


# --------------------------------------------------------------------------- splits, duplicates and files


@quick
@given(st.lists(NO_MARK, unique=True), st.lists(NO_MARK), st.randoms())
def test_added_documents_move_none(scratch, texts, added, order):
    more = texts + ONE_OF_EACH + added + texts
    order.shuffle(more)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        folder = Path(folder)
        few = write_jsonl(folder / "a.jsonl", texts + ONE_OF_EACH)
        many = [write_jsonl(folder / "b.jsonl", more), write_folder(folder / "added", [*added, ""])]
        prepared(folder / "before", few, val=0.5)
        prepared(folder / "after", *many, val=0.5)
        before, after = texts_in(folder / "before"), texts_in(folder / "after")
    assert sorted(after["train"] + after["val"]) == sorted(set(more) - {""})  # each once, in one split
    assert set(before["train"]) <= set(after["train"]) and set(before["val"]) <= set(after["val"])


def test_share_of_validation():
    def in_val(n, val):
        return [i for i, text in enumerate(stories(n)) if split_of(text, val) == "val"]

    n, val = 10_000, 0.1
    assert abs(len(in_val(n, val)) - n * val) < 5 * (n * val * (1 - val)) ** 0.5  # five standard deviations
    assert in_val(60, val) == [1, 11, 14, 17, 28, 31, 39, 42, 47, 48, 56]  # whatever the version
    assert set(in_val(1000, 0.1)) <= set(in_val(1000, 0.2))  # a larger share keeps the smaller


def test_duplicates(tmp_path):
    """Equal documents in different files and formats: the first stays; with dedup=False, all in one split."""
    names = [write_jsonl(tmp_path / "x.jsonl", stories(20) + stories(5)),
             write_folder(tmp_path / "texts", stories(12)),
             write_parquet(tmp_path / "x.parquet", stories(22))]
    meta = prepared(tmp_path / "once", *names, val=0.3)
    assert texts_in(tmp_path / "once") == by_split(stories(22), 0.3)
    assert meta["left_out"] == dict(duplicates=37, empty=0, undecodable=0, malformed=0)

    meta = prepared(tmp_path / "all", *names, val=0.3, dedup=False)
    texts = stories(20) + stories(5) + stories(12) + stories(22)
    expected = {split: [text for text in texts if split_of(text, 0.3) == split] for split in SPLITS}
    assert texts_in(tmp_path / "all") == expected
    assert meta["left_out"] == dict(duplicates=0, empty=0, undecodable=0, malformed=0)


@pytest.mark.parametrize("limit", [1, 100, 1000])
def test_several_files_are_one_stream(fast_path, limit):
    source = write_jsonl(fast_path / "x.jsonl", stories(60))
    one_meta = prepared(fast_path / "one", source, val=0.3)
    meta = prepared(fast_path / "many", source, val=0.3, shard_tokens=limit)
    one, many = load_corpus(fast_path / "one"), load_corpus(fast_path / "many")
    for split in SPLITS:
        files, counts = meta[split]["files"], [file["tokens"] for file in meta[split]["files"]]
        raw = [(fast_path / "many" / file["name"]).read_bytes() for file in files]
        assert len(raw) > 1 and b"".join(raw) == (fast_path / "one" / f"{split}.bin").read_bytes()
        assert [file["sha256"] for file in files] == [hashlib.sha256(part).hexdigest() for part in raw]
        assert all(count == limit for count in counts[:-1]) and counts[-1] <= limit
        assert sum(counts) == meta[split]["tokens"]
        for key in ("tokens", "bytes", "documents"):
            assert meta[split][key] == one_meta[split][key]

        stream, expected = getattr(many, split), getattr(one, split)
        assert len(stream.arrays) == len(files) and all_tokens(stream) == all_tokens(expected)
        rows, expected_rows = (data.Sequences(s, 20).rows(np.arange(9)) for s in (stream, expected))
        assert np.array_equal(rows, expected_rows)


# ------------------------------------------------------------- any number of processes, tasks of any size


@pytest.mark.parametrize("kind", KINDS)
def test_any_size_of_tasks_gives_the_same_files(fast_path, few_docs, kind):
    names, settings = write_kind(kind, fast_path / "in")
    prepared(fast_path / "out", *names, val=0.3, **settings)
    for size in (1, 17, 100, 1000):
        with task_size(size):
            prepared(fast_path / f"out{size}", *names, val=0.3, **settings)
        assert contents(fast_path / f"out{size}") == contents(fast_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_progress_counts_the_bytes_of_the_sources(fast_path, few_docs, kind):
    """As they are in the files: text that is compressed would pass the end."""
    names, settings = write_kind(kind, fast_path / "in")
    cfg, seen = prepare.Config(val=0.3, **settings), []
    found = sources.find_sources([str(name) for name in names], cfg)
    with task_size(100):
        prepare.prepare(found, fast_path / "out", cfg, progress=lambda n_bytes, *_: seen.append(n_bytes))
    assert seen == sorted(seen) and seen[-1] == sum(source.size for source in found)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_gives_the_same_files(tmp_path, workers):
    names, settings = write_kind("mixed", tmp_path / "in")
    names.remove("docs")
    prepared(tmp_path / "out", *names, val=0.3, workers=1)
    with task_size(60):
        prepared(tmp_path / "more", *names, val=0.3, workers=workers)
    assert contents(tmp_path / "more") == contents(tmp_path / "out")


# --------------------------------------------------------------------------------------- tokenizer.json


def byte_fallback(path):
    """A small BPE of SentencePiece's kind: spaces as ▁, and bytes for what it has no token for."""
    hf = pytest.importorskip("tokenizers")
    tokens = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"Documentisabuz.0123456789",
              "▁D", "is", "▁is"]
    merges = [("▁", "D"), ("i", "s"), ("▁", "is")]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = hf.Tokenizer(hf.models.BPE(vocab, merges, byte_fallback=True))
    inner.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="never")
    inner.decoder = hf.decoders.Sequence([
        hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()])
    inner.add_special_tokens(["<s>", "</s>"])
    inner.save(str(path))
    return inner


@pytest.mark.parametrize("write, eos", [(write_bpe, "<|endoftext|>"), (byte_fallback, "</s>")])
def test_tokenizer_file(tmp_path, write, eos):
    """Its own encoding of each document. A copy is in the corpus, and is found by the name in meta.json."""
    file, out = tmp_path / "tokenizer.json", tmp_path / "out"
    inner = write(file)
    texts = [*stories(30), eos, f"a{eos}b <s>", "日本\n\n  Documents"]
    meta = prepared(out, write_jsonl(tmp_path / "x.jsonl", texts), tokenizer=str(file), val=0.3)
    assert (out / "tokenizer.json").read_bytes() == file.read_bytes()
    file.unlink()
    assert texts_in(out) == by_split(texts, 0.3)

    corpus, tokens = load_corpus(out), tokens_of(out)
    inner.encode_special_tokens = True
    eos_id = inner.token_to_id(eos)
    assert corpus.meta["eos_id"] == eos_id and corpus.tokenizer_file
    assert meta["tokenizer"].startswith("tokenizer.json ")
    assert tokens == expected_tokens(
        texts, 0.3, lambda text: inner.encode(text, add_special_tokens=False).ids, eos_id)
    for split in SPLITS:
        assert corpus.token_bytes[tokens[split]].sum() == meta[split]["bytes"]


def test_tokenizer_file_in_processes(run_data, tmp_path):
    write_bpe(tmp_path / "tokenizer.json")
    write_jsonl(tmp_path / "x.jsonl", stories(60))
    for workers in (1, 2):
        argv = ["--tokenizer=tokenizer.json", f"--workers={workers}", f"--name=w{workers}"]
        with task_size(300):
            code, _, err = run_data("x.jsonl", *argv)
        assert code == 0, err
    assert contents("corpora/w1") == contents("corpora/w2")


def test_tokenizer_file_without_an_end(run_data, data_refuses, tmp_path):
    write_bpe(tmp_path / "tokenizer.json", eos="<end>")
    write_jsonl(tmp_path / "x.jsonl", stories(30))
    argv = ["x.jsonl", "--tokenizer=tokenizer.json"]
    data_refuses(*argv, message="tokenizer.json: which token ends a document?; "
                                "give it with --eos= (its specials: <end>)")
    data_refuses(*argv, "--eos=<eos>", message="tokenizer.json: has no token '<eos>'; give it with --eos=")
    assert run_data(*argv, "--eos=<end>")[0] == 0
    assert texts_in("corpora/x") == by_split(stories(30), 0.1)
