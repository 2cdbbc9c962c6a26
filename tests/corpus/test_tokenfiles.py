"""Token files of every layout, ours and others', and what is wrong with them."""

import hashlib
import json
import os
import re
import resource
import shutil
import struct
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from conftest import prepared
from corpus_examples import (
    ABC,
    EOS,
    TOKENS,
    TYPE_CODES,
    all_tokens,
    change_bytes,
    change_meta,
    document_lengths,
    document_numbers,
    empty,
    flatten,
    flip_bit,
    length_without_eos,
    lengths_of,
    one_line,
    pairs,
    quick,
    split_at,
    stories,
    with_leading_eos,
    write_jsonl,
    write_nanogpt,
    write_pair,
    write_shard,
    write_shard_uint32,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus import tokenfiles, tokenizers

# ------------------------------------------------------------------------------------------- prepared corpora

def pair_up(folder):
    """Say uint32 and half the tokens in meta.json: sizes and checksums still agree."""
    def change(meta):
        meta["dtype"] = "uint32"
        for split in ("train", "val"):
            raw = (folder / f"{split}.bin").read_bytes()
            raw += b"\0\1" * (len(raw) % 4 // 2)
            (folder / f"{split}.bin").write_bytes(raw)
            meta[split]["files"] = [dict(name=f"{split}.bin", tokens=len(raw) // 4, sha256=hashlib.sha256(raw).hexdigest())]
    change_meta(change)(folder)


@pytest.mark.parametrize("damage, message", [
    (change_bytes("train.bin", lambda raw: raw[:-2]), r"train.bin: \d+ bytes, but meta.json says"),
    (change_bytes("val.bin", lambda raw: raw[:-1]), r"val.bin: \d+ bytes, but meta.json says"),
    (change_bytes("val.bin", lambda raw: b""), "val.bin: 0 bytes, but meta.json says"),
    (lambda folder: (folder / "train.bin").unlink(), "train.bin: 0 bytes, but meta.json says"),
    (change_bytes("train.bin", flip_bit(9)), "train.bin: its SHA-256"),
    (change_bytes("val.bin", flip_bit(-3)), "val.bin: its SHA-256"),
    (change_meta(lambda meta: meta.update(dtype="uint32")), "another dtype"),
    (change_meta(lambda meta: meta.update(dtype="int16")), "meta.json is damaged"),
    (change_meta(lambda meta: meta.pop("train")), "meta.json is damaged"),
    (change_meta(lambda meta: meta["train"].pop("files")), "meta.json is damaged"),
    (change_meta(lambda meta: meta["train"]["files"][0].pop("sha256")), "meta.json is damaged"),
    (change_meta(lambda meta: meta["train"]["files"][0].update(tokens="7")), "meta.json is damaged"),
    (change_meta(lambda meta: meta.pop("eos_id")), "meta.json is damaged"),
    (change_meta(lambda meta: meta["val"].pop("bytes")), "meta.json is damaged"),
    (change_meta(lambda meta: meta.update(mask_id=256)), "meta.json is damaged"),
    (change_meta(lambda meta: meta.update(n_vocab=65537, mask_id=65537)), "a vocabulary of 65537 is above what uint16 holds"),
    (change_meta(lambda meta: meta.update(n_vocab=100, eos_id=99)), "n_vocab|vocabulary"),
    (pair_up, "n_vocab|vocabulary"),
    (change_bytes("meta.json", lambda raw: raw[: len(raw) // 2]), "meta.json is damaged"),
    (change_bytes("meta.json", lambda raw: b"[]"), "meta.json is damaged"),
    (change_bytes("meta.json", lambda raw: b"\xff" + raw), "meta.json is damaged"),
], ids=["cut", "odd", "empty", "no-bin", "flip", "flip-val", "dtype", "bad-dtype", "no-train", "no-files", "no-sha", "text-tokens",
        "no-eos", "no-bytes", "mask", "wide", "vocab", "pairs", "half", "list", "not-utf8"])
def test_load_refuses(tmp_path, small_corpus, damage, message):
    folder = tmp_path / "out"
    shutil.copytree(small_corpus, folder)
    tokenfiles.load_corpus(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        tokenfiles.load_corpus(folder)
    assert str(folder) in one_line(caught)


def test_load_refuses_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus in .*absent'; prepare one with: python data.py FILE --name=absent"):
        tokenfiles.load_corpus(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no corpus in .*docs'; prepare one with: python data.py docs"):
        tokenfiles.load_corpus(tmp_path / "docs")
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path)  # a folder, but nothing in it


@pytest.mark.parametrize("tokenizer", ["", "bytes"])
def test_a_corpus_without_its_meta_json_is_no_nanogpt_folder(small_corpus, tmp_path, tokenizer):
    """The lengths of the tokens would become training data."""
    shutil.copytree(small_corpus, tmp_path / "out")
    (tmp_path / "out" / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="out/meta.json"):
        tokenfiles.load_corpus(tmp_path / "out", tokenizer)


def test_load_of_several_shards(sharded_corpus, tmp_path):
    files = json.loads((sharded_corpus / "meta.json").read_text())["train"]["files"]
    read = tokenfiles.load_corpus(sharded_corpus)
    assert len(files) > 3 and len(read.val.arrays) > 1
    assert all_tokens(read.train) == np.concatenate([np.fromfile(sharded_corpus / f["name"], np.uint16) for f in files]).tolist()
    assert len(lengths_of(read.train)) + len(lengths_of(read.val)) == 120
    third = files[2]["name"]
    for number, (damage, problem) in enumerate((
            (lambda folder: (folder / third).unlink(), "0 bytes, but meta.json says"),
            (change_bytes(third, flip_bit(8)), "its SHA-256"), (change_bytes(third, lambda raw: raw[:-2]), "truncated"))):
        folder = tmp_path / str(number)
        shutil.copytree(sharded_corpus, folder)
        damage(folder)
        with pytest.raises(ValueError, match=f"{third}: .*{problem}") as caught:
            tokenfiles.load_corpus(folder)
        one_line(caught)


def test_prepared_corpus_and_another_tokenizer(small_corpus, bpe_file):
    assert tokenfiles.load_corpus(small_corpus, "bytes").meta["tokenizer"] == "bytes"
    with pytest.raises(ValueError, match="small was prepared with tokenizer 'bytes', not 'tokenizer.json [0-9a-f]{16} "):
        tokenfiles.load_corpus(small_corpus, str(bpe_file))


def test_large_vocabulary_takes_four_bytes(tmp_path):
    """Prepared as if with a vocabulary above 65,536."""
    tokens = SimpleNamespace(name="wide", n_vocab=300_000, eos_id=299_999, mask_id=300_000, specials={}, cuts=False,
                             token_bytes=lambda: np.ones(300_000, np.uint16),
                             encode_batch=lambda texts: [np.array([65536 + ord(c) for c in text], np.uint32) for text in texts])
    with mock.patch.object(tokenizers, "load_tokenizer", lambda *_, **__: tokens):
        prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", stories(20)), val=0.5)
    read, found = tokenfiles.load_corpus(tmp_path / "out"), []
    for stream in (read.train, read.val):
        assert stream.dtype == np.uint32
        for ids in np.split(stream.read(0, len(stream)), np.flatnonzero(stream.read(0, len(stream)) == tokens.eos_id) + 1)[1:-1]:
            found.append("".join(chr(i - 65536) for i in ids[:-1]))
    assert sorted(found) == sorted(stories(20))


# ----------------------------------------------------------------------------------------- others' token files


@quick
@given(TOKENS, TOKENS)
def test_nanogpt(scratch, first, second):
    folder = empty(scratch / "nano")
    write_nanogpt(folder / "train.bin", first)
    write_nanogpt(folder / "val.bin", second)
    read = tokenfiles.load_corpus(folder, "bytes")
    assert (read.meta["format"], read.meta["tokenizer"], read.tokenizer_file) == ("nanoGPT", "bytes", None)
    assert (read.meta["n_vocab"], read.meta["mask_id"], read.meta["eos_id"]) == (257, 257, 256)
    for stream, tokens in ((read.train, first), (read.val, second)):
        assert all_tokens(stream) == with_leading_eos(tokens) and stream.dtype == np.uint16
        assert lengths_of(stream) == document_lengths(tokens)
    assert read.token_bytes.tolist() == [1] * 256 + [0]


@quick
@given(st.data(), st.sampled_from([write_shard, write_shard_uint32]))
def test_llm_c_shards(scratch, draw, write):
    """Documents cross from shard to shard; the order is that of the names."""
    folder, tokens_of = empty(scratch / "llmc"), {}
    for split in ("train", "val"):
        tokens = tokens_of[split] = draw.draw(TOKENS)
        cuts = draw.draw(st.lists(st.integers(1, max(1, len(tokens) - 1)), max_size=4, unique=True).map(sorted)) if len(tokens) > 1 else []
        for number, part in reversed(list(enumerate(split_at(tokens, cuts)))):
            write(folder / f"fineweb_{split}_{number:06d}.bin", part)
    read = tokenfiles.load_corpus(folder, "bytes")
    assert read.meta["format"] == "llm.c"
    for split, stream in (("train", read.train), ("val", read.val)):
        assert all_tokens(stream) == with_leading_eos(tokens_of[split]) and stream.dtype == (np.uint16 if write is write_shard else np.uint32)
        assert lengths_of(stream) == document_lengths(tokens_of[split])


def test_more_shards_than_files_may_be_open(tmp_path):
    """A hundred billion tokens of FineWeb are 1030 shards, and 1024 the usual limit."""
    for number in range(40):
        write_shard(tmp_path / f"fineweb_{'val' if number == 39 else 'train'}_{number:06}.bin", [number, EOS])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
        assert all_tokens(tokenfiles.load_corpus(tmp_path, "bytes").train)[1::2] == list(range(39))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@settings(max_examples=80, deadline=None)
@given(pairs(), st.sampled_from([3, 4, 5, 8]))
@example([[[[]], [[1, 2]], [[]]]], 8)
@example([[[[1]]], [[[EOS]], [[]], [[], [2]]]], 4)
def test_megatron_documents(scratch, contents, code):
    folder = empty(scratch / "mega")
    for number, documents in enumerate(contents):
        write_pair(folder / f"web_{number}_text_document", documents, code)
    write_pair(folder / "web_valid_text_document", contents[0], code)
    read, documents = tokenfiles.load_corpus(folder, "bytes"), sum(contents, [])
    tokens = flatten(documents)
    lead = tokens[0] != EOS
    assert all_tokens(read.train) == with_leading_eos(tokens) and read.train.dtype == np.dtype(TYPE_CODES[code]) and read.meta["format"] == "Megatron"
    assert lengths_of(read.train) == [length_without_eos(d) for d in documents]
    assert read.train.document(np.arange(len(read.train))).tolist() == [0] * lead + document_numbers(documents)
    assert all_tokens(read.val) == with_leading_eos(flatten(contents[0])) and lengths_of(read.val) == [length_without_eos(d) for d in contents[0]]


@pytest.mark.parametrize("given", ["web_text_document", "web_text_document.bin", ""])
def test_megatron_by_prefix(tmp_path, given):
    """A prefix or a file is that pair alone; a folder is all of its pairs."""
    write_pair(tmp_path / "web_text_document", [[[1, 2, EOS]], [[3, 4, 5, EOS]], [[6, EOS]]])
    if given:
        write_pair(tmp_path / "another", [[[9]]])
    read = tokenfiles.load_corpus(tmp_path / given, "bytes", val_share=0.3)
    assert all_tokens(read.train) == [EOS, 1, 2, EOS, 3, 4, 5, EOS] and all_tokens(read.val)[-2:] == [6, EOS]


@pytest.mark.parametrize("prefix", ["web", "a.b", "val", "test_web"])
def test_a_prefix_of_two_pairs(tmp_path, prefix):
    """As `export` writes them: each is of the split that its ending says, whatever the prefix is called."""
    for split, token in (("train", 1), ("val", 2), ("other", 3)):
        write_pair(tmp_path / f"{prefix}_{split}", [[[token, EOS]]])
    read = tokenfiles.load_corpus(tmp_path / prefix, "bytes")
    assert all_tokens(read.train) == [EOS, 1, EOS] and all_tokens(read.val) == [EOS, 2, EOS]
    (tmp_path / f"{prefix}_val.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path / prefix, "bytes")


@pytest.mark.parametrize("given", ["", "train.bin"])
@pytest.mark.parametrize("tokenizer", ["", "bytes"])
def test_characters_with_an_alphabet_of_their_own(tmp_path, given, tokenizer):
    """nanoGPT's meta.pkl says which characters the tokens are. Reading a pickle would run what is in it."""
    for name in ("train", "val"):
        write_nanogpt(tmp_path / f"{name}.bin", ABC)
    (tmp_path / "meta.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="meta.pkl: .*alphabet of their own.*prepare the text itself with data.py") as caught:
        tokenfiles.load_corpus(tmp_path / given, tokenizer)
    one_line(caught)


def test_the_working_folder_holds_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "train.bin", [1, 2, 3])
    write_nanogpt(tmp_path / "val.bin", [1, 2, 4])
    assert all_tokens(tokenfiles.load_corpus(".", "bytes").val) == [EOS, 1, 2, 4]


@pytest.mark.parametrize("names, train_names, val_names", [
    ("train val", "train", "val"),
    ("a b val", "a b", "val"),
    ("train valid_0 validation.1", "train", "valid_0 validation.1"),
    ("train test val", "train", "val"),
    ("fineweb_train_000002 fineweb_train_000001 fineweb_val_000000", "fineweb_train_000001 fineweb_train_000002", "fineweb_val_000000"),
    ("wiki.train wiki.VALID wiki-test", "wiki.train", "wiki.VALID"),
    ("greatest invaluable eval-val", "greatest invaluable", "eval-val"),
])
def test_splits_by_name(tmp_path, names, train_names, val_names):
    for number, name in enumerate(sorted(names.split())):
        write_nanogpt(tmp_path / f"{name}.bin", [EOS, number])
    order = sorted(names.split())
    read = tokenfiles.load_corpus(tmp_path, "bytes", val_share=0.5)  # it is not needed: there are files for validation
    assert all_tokens(read.train)[1::2] == [order.index(n) for n in train_names.split()]
    assert all_tokens(read.val)[1::2] == [order.index(n) for n in val_names.split()]


@pytest.mark.parametrize("name", ["tokens", "train", "val", "test"])
def test_a_single_file_is_for_training(tmp_path, name):
    write_nanogpt(tmp_path / f"{name}.bin", [1, EOS, 2, EOS, 3, EOS, 4, EOS])
    read = tokenfiles.load_corpus(tmp_path, "bytes", val_share=0.25)
    assert all_tokens(read.train) == [EOS, 1, EOS, 2, EOS, 3, EOS] and 4 in all_tokens(read.val)


def check_cut(read, tokens, starts, share):
    """Training and validation are all tokens, and the cut is at the first document's start after the share."""
    val = all_tokens(read.val)
    if len(read.train) + len(val) > len(tokens):  # an eos of its own before the validation's first document
        assert val[0] == EOS
        val = val[1:]
    assert all_tokens(read.train) + val == tokens
    place = int(len(tokens) * (1 - share))
    assert len(read.train) == min([s for s in starts if s >= place], default=len(tokens))


@quick
@given(TOKENS.filter(lambda tokens: len(tokens) > 3), st.floats(0.01, 0.5))
def test_the_cut_of_eos_separated_files(scratch, tokens, share):
    folder = empty(scratch / "cut")
    write_nanogpt(folder / "a.bin", tokens[:2])
    write_nanogpt(folder / "b.bin", tokens[2:])
    tokens = with_leading_eos(tokens)
    read = tokenfiles.load_corpus(folder, "bytes", share)
    check_cut(read, tokens, [i + 1 for i, token in enumerate(tokens) if token == EOS], share)
    other = tokenfiles.load_corpus(folder, "bytes", share / 2)
    assert read.meta["train"]["sha256"] == read.meta["val"]["sha256"] != other.meta["train"]["sha256"]


@settings(max_examples=80, deadline=None)
@given(pairs(), st.floats(0.01, 0.5))
@example([[[[1, 2]], [[3]], [[4, 5]], [[6]], [[7]], [[8]]], [[[9]], [[10]]]], 0.5)  # within the first of two pairs
def test_the_cut_of_megatron_files(scratch, contents, share):
    folder = empty(scratch / "cutm")
    for number, documents in enumerate(contents):
        write_pair(folder / f"web_{number}", documents)
    documents = sum(contents, [])
    tokens = with_leading_eos(flatten(documents))
    lead = len(tokens) - len(flatten(documents))
    starts = [lead + sum(len(flatten([d])) for d in documents[:i]) for i in range(len(documents))]
    read = tokenfiles.load_corpus(folder, "bytes", share)
    check_cut(read, tokens, starts, share)
    numbers = [0] * lead + document_numbers(documents)
    found = read.train.document(np.arange(len(read.train))).tolist()
    assert found == numbers[: len(found)]
    others = read.val.document(np.arange(len(read.val)))[len(read.val) - len(tokens) + len(found) :]
    assert np.diff(others).tolist() == np.diff(numbers[len(found) :]).tolist()


@pytest.mark.parametrize("tail", [None, 1])
def test_the_halves_of_megatron_files_have_their_own_documents(tmp_path, tail):
    """Each document is counted in one half, wherever in the files the cut is."""
    first = [[[i] * n + [EOS]] for i, n in enumerate((5, 6, 7, 8, 9, 10))]
    contents = [first, [[[50, 51, EOS]], [[52, EOS]]]][: 1 + (tail or 0)]
    for number, documents in enumerate(contents):
        write_pair(tmp_path / f"web_{number}", documents)
    read = tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
    expected = [length_without_eos(d) for d in sum(contents, [])]
    assert lengths_of(read.train) + lengths_of(read.val) == expected
    assert lengths_of(read.train) == expected[: len(lengths_of(read.train))] != expected


def test_validation_that_is_cut_off_begins_with_an_eos(tmp_path):
    """Else the first token of its first document is read by nobody: a block's first token is the one before it."""
    write_nanogpt(tmp_path / "tokens.bin", [1, 2, 3, EOS, 4, 5, 6, EOS])
    write_pair(tmp_path / "prefix", [[[1, 2, 3]], [[4, 5, 6]]])
    for name, end in (("tokens.bin", [EOS]), ("prefix", [])):
        assert all_tokens(tokenfiles.load_corpus(tmp_path / name, "bytes", 0.5).val) == [EOS, 4, 5, 6, *end]


def test_a_document_longer_than_what_is_searched_at_once(tmp_path):
    """Its end is found wherever it lies, around the border of two searches as well."""
    for end in (1_200_000 + (1 << 20) + i for i in range(-3, 3)):
        tokens = np.ones(2_400_000, np.uint16)
        tokens[0] = tokens[end] = EOS
        tokens.tofile(tmp_path / "tokens.bin")
        assert len(tokenfiles.load_corpus(tmp_path, "bytes", 0.5).train) == end + 1


# ------------------------------------------------------------------------------------------ others' bad files


def pair_with(**changes):
    """A .bin/.idx pair with one field of its index overwritten: name=(byte offset, struct format, value)."""
    def make(folder):
        write_pair(folder / "web", [[[1, 2, EOS]], [[3, EOS]], [[4, 5, 6, EOS]]])
        raw = bytearray((folder / "web.idx").read_bytes())
        for at, kind, value in changes.values():
            struct.pack_into(kind, raw, at, value)
        (folder / "web.idx").write_bytes(raw)
    return make


def two(first, second):
    def make(folder):
        first(folder)
        second(folder)
    return make


def file(name, write, *args, **kwargs):
    return lambda folder: write(folder / name, *args, **kwargs)


@pytest.mark.parametrize("make, message", [
    (file("a.bin", write_shard, ABC, count=7), r"a.bin: 1036 bytes, but its header says 7 tokens of uint16 \(1038 bytes\)"),
    (file("a.bin", write_shard, ABC, count=5), "a.bin: 1036 bytes, but its header says 5 tokens"),
    (file("a.bin", write_shard, ABC, count=-6), "a.bin: 1036 bytes, but its header says -6 tokens"),
    (file("a.bin", write_shard, [], count=0), "a.bin: 1024 bytes, but its header says 0 tokens"),
    (file("a.bin", write_shard, ABC, version=2), "a.bin: a shard of version 2; version 1 is known"),
    (file("a.bin", write_shard_uint32, ABC, version=1), "a.bin: a shard of version 1; version 7 is known"),
    (file("a.bin", write_shard_uint32, ABC, kind="H"), "a.bin: 1036 bytes, but its header says 6 tokens of uint32"),
    (lambda folder: (folder / "a.bin").write_bytes(b""), r"a.bin: 0 bytes are no uint16 tokens \(empty"),
    (lambda folder: (folder / "a.bin").write_bytes(b"abc"), r"a.bin: 3 bytes are no uint16 tokens \(empty or truncated"),
    (two(file("a.bin", write_nanogpt, ABC), file("b.bin", write_shard, ABC)), "files of different layouts or types .*nanoGPT.*keep one kind"),
    (two(file("a.bin", write_shard, ABC), file("b.bin", write_shard_uint32, ABC)), "files of different layouts or types .*llm.c.*keep one kind"),
    (two(file("a.bin", write_nanogpt, ABC), file("b", write_pair, [[ABC]])), "files of different layouts or types .*Megatron.*keep one kind"),
    (two(file("a", write_pair, [[ABC]], 8), file("b", write_pair, [[ABC]], 4)), "files of different layouts or types .*int32.*keep one kind"),
    (file("a", write_pair, [[[1, 2]]], 1), "a.bin: tokens of uint8, which can't hold tokenizer 'bytes' of 257 tokens"),
    (file("a", write_pair, [[[1, 2]]], 2), "a.bin: tokens of int8, which can't hold tokenizer 'bytes' of 257 tokens"),
    (pair_with(code=(17, "<B", 6)), "web.idx: version 1, type 6; version 1 and integer types"),
    (pair_with(code=(17, "<B", 7)), "web.idx: version 1, type 7; "),
    (pair_with(code=(17, "<B", 0)), "web.idx: version 1, type 0; "),
    (pair_with(version=(9, "<Q", 2)), "web.idx: version 2, type 8; "),
    (pair_with(magic=(0, "<B", 65)), "web.idx: no index of a Megatron dataset"),
    (pair_with(code=(17, "<B", 4)), "web.idx: its sequences do not follow each other in web.bin"),
    (pair_with(sequences=(18, "<Q", 2)), "web.idx: "),
    (pair_with(sequences=(18, "<Q", 4)), "web.idx: "),
    (pair_with(sequences=(18, "<Q", 0)), "web.(idx|bin): "),
    (pair_with(sequences=(18, "<Q", 2**63)), r"web.idx: \d+ bytes, cut short of \d+"),
    (pair_with(documents=(26, "<Q", 5)), r"web.idx: \d+ bytes, cut short of \d+"),
    (pair_with(documents=(26, "<Q", 3)), "web.idx: its documents do not cover its sequences"),
    (pair_with(documents=(26, "<Q", 0)), "web.idx: its documents do not cover its sequences"),
    (pair_with(length=(34, "<i", 2)), "web.idx: its sequences do not follow each other in web.bin"),
    (pair_with(length=(34, "<i", -3)), "web.idx: its sequences do not follow each other in web.bin"),
    (pair_with(length=(42, "<i", 5)), "web.bin: 18 bytes, but web.idx says 10 tokens"),
    (pair_with(length=(42, "<i", 3)), "web.bin: 18 bytes, but web.idx says 8 tokens"),
    (pair_with(length=(42, "<i", -4)), "web.idx: its sequences do not follow each other in web.bin"),
    (pair_with(pointer=(54, "<q", 8)), "web.idx: its sequences do not follow each other in web.bin"),
    (pair_with(pointer=(46, "<q", 2)), "web.idx: its sequences do not follow each other in web.bin"),
    (pair_with(first=(70, "<q", 1)), "web.idx: its documents do not cover its sequences"),
    (pair_with(last=(94, "<q", 2)), "web.idx: its documents do not cover its sequences"),
    (pair_with(last=(94, "<q", 4)), "web.idx: its documents do not cover its sequences"),
    (pair_with(inner=(78, "<q", 4)), "web.idx: its documents do not cover its sequences"),
    (pair_with(inner=(78, "<q", -1)), "web.idx: its documents do not cover its sequences"),
])
def test_foreign_files_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
    assert str(tmp_path) in one_line(caught)


def test_no_tokenizer_or_no_validation(tmp_path):
    write_nanogpt(tmp_path / "train.bin", ABC)
    for name, problem in (("", "token files do not say which tokenizer made them; add --tokenizer=gpt2"),
                          ("bytes", "no validation tokens; add a file .*--val_share")):
        with pytest.raises(ValueError, match=problem) as caught:
            tokenfiles.load_corpus(tmp_path, name)
        assert str(tmp_path) in one_line(caught)


def test_only_files_for_validation(tmp_path):
    for name in ("val_0", "val_1"):
        write_nanogpt(tmp_path / f"{name}.bin", ABC)
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path, "bytes")


@pytest.mark.parametrize("write", [write_shard, write_shard_uint32])
def test_a_shard_cut_anywhere(tmp_path, write):
    path = tmp_path / "tokens.bin"
    write(path, ABC)
    raw = path.read_bytes()
    for end in range(4, len(raw)):  # of less than its first number nothing shows what it was
        path.write_bytes(raw[:end])
        with pytest.raises(ValueError) as caught:
            tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
        assert f"{path}: {end} bytes" in one_line(caught), end


@pytest.mark.parametrize("documents", [[[[1, 2, EOS]], [[3, EOS]]], [[[1], [2, EOS]], [[]], [[3, 4], [], [5]]]], ids=["single", "several"])
def test_a_pair_cut_anywhere(tmp_path, documents):
    write_pair(tmp_path / "web", documents)
    for end, other in ((".idx", "web.idx"), (".bin", "web.bin")):
        path = tmp_path / f"web{end}"
        raw = path.read_bytes()
        tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
        for size in range(len(raw)):
            path.write_bytes(raw[:size])
            with pytest.raises(ValueError) as caught:
                tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
            assert other in one_line(caught), size
        path.write_bytes(raw)


def test_a_full_type_holds_its_vocabulary(tmp_path):
    """65,536 tokens are what uint16 holds; the mask, which is one more, is in no file."""
    tokens = SimpleNamespace(name="full", n_vocab=65536, eos_id=0, mask_id=65536, token_bytes=lambda: np.ones(65536, np.uint16))
    write_nanogpt(tmp_path / "tokens.bin", [1, 65535, 0, 3, 0])
    with mock.patch.object(tokenfiles, "load_tokenizer", lambda *_, **__: tokens):
        assert all_tokens(tokenfiles.load_corpus(tmp_path, "full", 0.3).train) == [0, 1, 65535, 0]
        tokens.n_vocab, tokens.mask_id = 65537, 65537
        with pytest.raises(ValueError, match="tokens of uint16, which can't hold tokenizer 'full' of 65537 tokens"):
            tokenfiles.load_corpus(tmp_path, "full", 0.3)


@pytest.mark.parametrize("change", [
    file("b_0.bin", write_shard, [9, 8, 7]), file("b_2.bin", write_shard, [7]), lambda folder: (folder / "b_1.bin").unlink(),
], ids=["changed", "added", "removed"])
def test_changed_files_have_another_fingerprint(tmp_path, change):
    """So that a run is not resumed on other tokens."""
    for name in ("b_0", "b_1", "val"):
        write_shard(tmp_path / f"{name}.bin", [1, 2, 3])
    before = tokenfiles.load_corpus(tmp_path, "bytes").meta
    assert tokenfiles.load_corpus(tmp_path, "bytes").meta == before
    change(tmp_path)
    after = tokenfiles.load_corpus(tmp_path, "bytes").meta
    assert after["train"]["sha256"] != before["train"]["sha256"] and after["val"] == before["val"]


@pytest.mark.parametrize("text, found", [
    ("a", [("a", None, 0)]),
    ("a/b.c", [("a/b.c", None, 0)]),
    ("a,b", [("a", None, 0), ("b", None, 0)]),
    (" a , b ,", [("a", None, 0), ("b", None, 0)]),
    ("a:3,b:0.5", [("a", 3, 0), ("b", 0.5, 0)]),
    ("a:3:1e6,b:1:", [("a", 3, 1_000_000), ("b", 1, 0)]),
    ("a::100,b", [("a", None, 100), ("b", None, 0)]),
])
def test_parse_corpora(text, found):
    assert tokenfiles.parse_corpora(text) == found


@pytest.mark.parametrize("text, problem", [
    ("", "name at least one folder"), (" , ", "name at least one folder"),
    *((f"ok,{wrong}", f"corpus={re.escape(wrong)}: write path, path:weight or path:weight:unique_tokens") for wrong in [
        "a:b", "a:1:b", "a:1:2:3", ":1", ":", "a:0", "a:-1", "a:nan", "a:inf", "a:1e9", "a:1:0", "a:1:-5", "a:1:nan", "a:1:inf", "a:1:1e18",
        "a::x", "a:1:0.5"]),
    ("a:1,b", "corpus=a:1,b: give every source a weight, or none"), ("a::10,b:1", "give every source a weight, or none"),
])
def test_parse_corpora_refuses(text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        tokenfiles.parse_corpora(text)
    one_line(caught)
