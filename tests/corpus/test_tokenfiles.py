"""Token files of every layout, ours and others', and their splits."""

import hashlib
import json
import os
import re
import resource
import shutil

import numpy as np
import pytest
from corpus_examples import (
    ABC,
    EOS,
    TOKENS,
    TYPE_CODES,
    all_tokens,
    change_bytes,
    change_meta,
    document_numbers,
    empty,
    expected_lengths,
    flatten,
    flip_bit,
    length_without_eos,
    lengths_of,
    one_line,
    pairs,
    quick,
    split_at,
    with_leading_eos,
    write_nanogpt,
    write_pair,
    write_shard,
    write_shard_uint32,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus.tokenfiles import load_corpus, parse_corpora

# ------------------------------------------------------------------------------------- prepared corpora


def say_uint32(folder):
    """Say uint32 and half the tokens in meta.json: sizes and checksums still agree."""

    def change(meta):
        meta["dtype"] = "uint32"
        for split in ("train", "val"):
            path = folder / f"{split}.bin"
            raw = path.read_bytes()
            raw += b"\0\1" * (len(raw) % 4 // 2)
            path.write_bytes(raw)
            digest = hashlib.sha256(raw).hexdigest()
            meta[split]["files"] = [dict(name=path.name, tokens=len(raw) // 4, sha256=digest)]

    change_meta(change)(folder)


def update(**changes):
    return change_meta(lambda meta: meta.update(changes))


def change_first_file(change):
    """Change the entry of a token file in meta.json."""
    return change_meta(lambda meta: change(meta["train"]["files"][0]))


DAMAGES = {
    "cut": (change_bytes("train.bin", lambda raw: raw[:-2]), r"train.bin: \d+ bytes, but meta.json says"),
    "odd": (change_bytes("val.bin", lambda raw: raw[:-1]), r"val.bin: \d+ bytes, but meta.json says"),
    "empty": (change_bytes("val.bin", lambda raw: b""), "val.bin: 0 bytes, but meta.json says"),
    "no-bin": (lambda folder: (folder / "train.bin").unlink(), "train.bin: 0 bytes, but meta.json says"),
    "flip": (change_bytes("train.bin", flip_bit(9)), "train.bin: its SHA-256"),
    "flip-val": (change_bytes("val.bin", flip_bit(-3)), "val.bin: its SHA-256"),
    "dtype": (update(dtype="uint32"), "another dtype"),
    "bad-dtype": (update(dtype="int16"), "meta.json is damaged"),
    "no-train": (change_meta(lambda meta: meta.pop("train")), "meta.json is damaged"),
    "no-files": (change_meta(lambda meta: meta["train"].pop("files")), "meta.json is damaged"),
    "no-sha": (change_first_file(lambda file: file.pop("sha256")), "meta.json is damaged"),
    "text-tokens": (change_first_file(lambda file: file.update(tokens="7")), "meta.json is damaged"),
    "no-eos": (change_meta(lambda meta: meta.pop("eos_id")), "meta.json is damaged"),
    "no-bytes": (change_meta(lambda meta: meta["val"].pop("bytes")), "meta.json is damaged"),
    "mask": (update(mask_id=256), "meta.json is damaged"),
    "wide": (update(n_vocab=65537, mask_id=65537), "a vocabulary of 65537 is above what uint16 holds"),
    "vocab": (update(n_vocab=100, eos_id=99), "n_vocab|vocabulary"),
    "pairs": (say_uint32, "n_vocab|vocabulary"),
    "half": (change_bytes("meta.json", lambda raw: raw[: len(raw) // 2]), "meta.json is damaged"),
    "list": (change_bytes("meta.json", lambda raw: b"[]"), "meta.json is damaged"),
    "not-utf8": (change_bytes("meta.json", lambda raw: b"\xff" + raw), "meta.json is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_refuses(tmp_path, small_corpus, name):
    folder, (damage, message) = tmp_path / "out", DAMAGES[name]
    shutil.copytree(small_corpus, folder)
    load_corpus(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(folder)
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("name, command", [
    ("absent", "; prepare one with: python data.py FILE --name=absent"),
    ("docs", "; prepare one with: python data.py docs"),
    ("", ""),  # a folder, but nothing in it
])
def test_load_refuses_a_missing_folder(tmp_path, name, command):
    with pytest.raises(FileNotFoundError, match=f"no corpus in '.*{name}'{command}"):
        load_corpus(tmp_path / name)


@pytest.mark.parametrize("tokenizer", ["", "bytes"])
def test_a_corpus_without_its_meta_json_is_no_nanogpt_folder(small_corpus, tmp_path, tokenizer):
    """The lengths of the tokens would become training data."""
    shutil.copytree(small_corpus, tmp_path / "out")
    (tmp_path / "out" / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="out/meta.json"):
        load_corpus(tmp_path / "out", tokenizer)


def test_load_of_several_shards(sharded_corpus, tmp_path):
    meta = json.loads((sharded_corpus / "meta.json").read_text(encoding="utf-8"))
    names = [file["name"] for file in meta["train"]["files"]]
    corpus = load_corpus(sharded_corpus)
    assert len(names) > 3 and len(corpus.val.arrays) > 1
    shards = [np.fromfile(sharded_corpus / name, np.uint16) for name in names]
    assert all_tokens(corpus.train) == np.concatenate(shards).tolist()
    assert len(lengths_of(corpus.train)) + len(lengths_of(corpus.val)) == 120

    third = names[2]
    damages = [
        (lambda folder: (folder / third).unlink(), "0 bytes, but meta.json says"),
        (change_bytes(third, flip_bit(8)), "its SHA-256"),
        (change_bytes(third, lambda raw: raw[:-2]), "truncated"),
    ]
    for i, (damage, problem) in enumerate(damages):
        folder = tmp_path / str(i)
        shutil.copytree(sharded_corpus, folder)
        damage(folder)
        with pytest.raises(ValueError, match=f"{third}: .*{problem}") as caught:
            load_corpus(folder)
        one_line(caught)


def test_prepared_corpus_and_another_tokenizer(small_corpus, bpe_file):
    assert load_corpus(small_corpus, "bytes").meta["tokenizer"] == "bytes"
    message = "small was prepared with tokenizer 'bytes', not 'tokenizer.json [0-9a-f]{16} "
    with pytest.raises(ValueError, match=message):
        load_corpus(small_corpus, str(bpe_file))


# ----------------------------------------------------------------------------------- others' token files


@quick
@given(TOKENS, TOKENS)
def test_nanogpt(scratch, first, second):
    folder = empty(scratch / "nano")
    write_nanogpt(folder / "train.bin", first)
    write_nanogpt(folder / "val.bin", second)
    corpus = load_corpus(folder, "bytes")
    meta = corpus.meta
    assert (meta["format"], meta["tokenizer"], corpus.tokenizer_file) == ("nanoGPT", "bytes", None)
    assert (meta["n_vocab"], meta["mask_id"], meta["eos_id"]) == (257, 257, 256)
    for stream, tokens in ((corpus.train, first), (corpus.val, second)):
        assert all_tokens(stream) == with_leading_eos(tokens) and stream.dtype == np.uint16
        assert lengths_of(stream) == expected_lengths(tokens)
    assert corpus.token_bytes.tolist() == [1] * 256 + [0]


@quick
@given(st.data(), st.sampled_from([(write_shard, np.uint16), (write_shard_uint32, np.uint32)]))
def test_llm_c_shards(scratch, draw, layout):
    """Documents cross from shard to shard; the order is that of the names."""
    folder, tokens = empty(scratch / "llmc"), {}
    write, dtype = layout
    for split in ("train", "val"):
        tokens[split] = draw.draw(TOKENS)
        n = len(tokens[split])
        cuts = draw.draw(st.lists(st.integers(1, max(1, n - 1)), max_size=4, unique=True).map(sorted))
        shards = split_at(tokens[split], cuts) if n > 1 else [tokens[split]]
        for number in reversed(range(len(shards))):
            write(folder / f"fineweb_{split}_{number:06d}.bin", shards[number])
    corpus = load_corpus(folder, "bytes")
    assert corpus.meta["format"] == "llm.c"
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        assert all_tokens(stream) == with_leading_eos(tokens[split]) and stream.dtype == dtype
        assert lengths_of(stream) == expected_lengths(tokens[split])


def test_more_shards_than_files_may_be_open(tmp_path):
    """A hundred billion tokens of FineWeb are 1030 shards, and 1024 the usual limit."""
    for number in range(40):
        split = "val" if number == 39 else "train"
        write_shard(tmp_path / f"fineweb_{split}_{number:06}.bin", [number, EOS])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 20, limits[1]))
        assert all_tokens(load_corpus(tmp_path, "bytes").train)[1::2] == list(range(39))
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
    corpus = load_corpus(folder, "bytes")
    assert corpus.meta["format"] == "Megatron" and corpus.train.dtype == np.dtype(TYPE_CODES[code])
    for stream, documents in ((corpus.train, sum(contents, [])), (corpus.val, contents[0])):
        tokens = flatten(documents)
        n_prepended = int(tokens[0] != EOS)
        assert all_tokens(stream) == with_leading_eos(tokens)
        assert lengths_of(stream) == [length_without_eos(document) for document in documents]
        numbers = stream.document_numbers(np.arange(len(stream))).tolist()
        assert numbers == [0] * n_prepended + document_numbers(documents)


@pytest.mark.parametrize("name", ["web_text_document", "web_text_document.bin", ""])
def test_megatron_by_prefix(tmp_path, name):
    """A prefix or a file is that pair alone; a folder is all of its pairs."""
    write_pair(tmp_path / "web_text_document", [[[1, 2, EOS]], [[3, 4, 5, EOS]], [[6, EOS]]])
    if name:
        write_pair(tmp_path / "another", [[[9]]])
    corpus = load_corpus(tmp_path / name, "bytes", val_share=0.3)
    assert all_tokens(corpus.train) == [EOS, 1, 2, EOS, 3, 4, 5, EOS]
    assert all_tokens(corpus.val)[-2:] == [6, EOS]


@pytest.mark.parametrize("prefix", ["web", "a.b", "val", "test_web"])
def test_a_prefix_of_two_pairs(tmp_path, prefix):
    """As `export` writes them: each is of the split that its ending says, whatever the prefix is called."""
    for split, token in (("train", 1), ("val", 2), ("other", 3)):
        write_pair(tmp_path / f"{prefix}_{split}", [[[token, EOS]]])
    corpus = load_corpus(tmp_path / prefix, "bytes")
    assert all_tokens(corpus.train) == [EOS, 1, EOS] and all_tokens(corpus.val) == [EOS, 2, EOS]
    (tmp_path / f"{prefix}_val.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        load_corpus(tmp_path / prefix, "bytes")


def test_the_working_folder_holds_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "train.bin", [1, 2, 3])
    write_nanogpt(tmp_path / "val.bin", [1, 2, 4])
    assert all_tokens(load_corpus(".", "bytes").val) == [EOS, 1, 2, 4]


# ------------------------------------------------------------------------------------------------ splits


@pytest.mark.parametrize("names, train_names, val_names", [
    ("train val", "train", "val"),
    ("a b val", "a b", "val"),
    ("train valid_0 validation.1", "train", "valid_0 validation.1"),
    ("train test val", "train", "val"),
    ("web_train_02 web_train_01 web_val_00", "web_train_01 web_train_02", "web_val_00"),
    ("wiki.train wiki.VALID wiki-test", "wiki.train", "wiki.VALID"),
    ("greatest invaluable eval-val", "greatest invaluable", "eval-val"),
])
def test_splits_by_name(tmp_path, names, train_names, val_names):
    order = sorted(names.split())
    for number, name in enumerate(order):
        write_nanogpt(tmp_path / f"{name}.bin", [EOS, number])
    corpus = load_corpus(tmp_path, "bytes", val_share=0.5)  # not needed: there are files for validation
    assert all_tokens(corpus.train)[1::2] == [order.index(name) for name in train_names.split()]
    assert all_tokens(corpus.val)[1::2] == [order.index(name) for name in val_names.split()]


@pytest.mark.parametrize("name", ["tokens", "train", "val", "test"])
def test_a_single_file_is_for_training(tmp_path, name):
    write_nanogpt(tmp_path / f"{name}.bin", [1, EOS, 2, EOS, 3, EOS, 4, EOS])
    corpus = load_corpus(tmp_path, "bytes", val_share=0.25)
    assert all_tokens(corpus.train) == [EOS, 1, EOS, 2, EOS, 3, EOS] and 4 in all_tokens(corpus.val)


def check_halves(corpus, tokens, starts, val_share):
    """The splits are all tokens, and validation begins with the first document that starts in its share."""
    val = all_tokens(corpus.val)
    if len(corpus.train) + len(val) > len(tokens):  # an eos of its own before the validation's first document
        assert val[0] == EOS
        val = val[1:]
    assert all_tokens(corpus.train) + val == tokens
    position = int(len(tokens) * (1 - val_share))
    assert len(corpus.train) == min([s for s in starts if s >= position], default=len(tokens))


@quick
@given(TOKENS.filter(lambda tokens: len(tokens) > 3), st.floats(0.01, 0.5))
def test_the_share_of_eos_separated_files(scratch, tokens, val_share):
    folder = empty(scratch / "share")
    write_nanogpt(folder / "a.bin", tokens[:2])
    write_nanogpt(folder / "b.bin", tokens[2:])
    tokens = with_leading_eos(tokens)
    starts = [i + 1 for i, token in enumerate(tokens) if token == EOS]
    corpus = load_corpus(folder, "bytes", val_share)
    check_halves(corpus, tokens, starts, val_share)
    meta, other_meta = corpus.meta, load_corpus(folder, "bytes", val_share / 2).meta
    assert meta["train"]["sha256"] == meta["val"]["sha256"] != other_meta["train"]["sha256"]


@settings(max_examples=80, deadline=None)
@given(pairs(), st.floats(0.01, 0.5))
@example([[[[1, 2]], [[3]], [[4, 5]], [[6]], [[7]], [[8]]], [[[9]], [[10]]]], 0.5)  # within the first pair
def test_the_share_of_megatron_files(scratch, contents, val_share):
    folder = empty(scratch / "share_of_pairs")
    for number, documents in enumerate(contents):
        write_pair(folder / f"web_{number}", documents)
    documents = sum(contents, [])
    tokens = with_leading_eos(flatten(documents))
    n_prepended = len(tokens) - len(flatten(documents))
    starts = [n_prepended + len(flatten(documents[:i])) for i in range(len(documents))]
    corpus = load_corpus(folder, "bytes", val_share)
    check_halves(corpus, tokens, starts, val_share)

    train, val = corpus.train, corpus.val
    numbers = [0] * n_prepended + document_numbers(documents)
    assert train.document_numbers(np.arange(len(train))).tolist() == numbers[: len(train)]
    own_eos = len(train) + len(val) - len(tokens)
    val_numbers = val.document_numbers(np.arange(len(val)))[own_eos:]
    assert np.diff(val_numbers).tolist() == np.diff(numbers[len(train) :]).tolist()


@pytest.mark.parametrize("n_pairs", [1, 2])
def test_the_halves_of_megatron_files_have_their_own_documents(tmp_path, n_pairs):
    """Each document is counted in one half, wherever in the files the border is."""
    first = [[[i] * n + [EOS]] for i, n in enumerate((5, 6, 7, 8, 9, 10))]
    contents = [first, [[[50, 51, EOS]], [[52, EOS]]]][:n_pairs]
    for number, documents in enumerate(contents):
        write_pair(tmp_path / f"web_{number}", documents)
    corpus = load_corpus(tmp_path, "bytes", 0.3)
    expected = [length_without_eos(document) for document in sum(contents, [])]
    train_lengths = lengths_of(corpus.train)
    assert train_lengths + lengths_of(corpus.val) == expected
    assert train_lengths == expected[: len(train_lengths)] != expected


def test_validation_that_is_split_off_begins_with_an_eos(tmp_path):
    """Else nobody predicts the first token of its first document: a row begins with the token before it."""
    write_nanogpt(tmp_path / "tokens.bin", [1, 2, 3, EOS, 4, 5, 6, EOS])
    write_pair(tmp_path / "prefix", [[[1, 2, 3]], [[4, 5, 6]]])
    for name, end in (("tokens.bin", [EOS]), ("prefix", [])):
        assert all_tokens(load_corpus(tmp_path / name, "bytes", 0.5).val) == [EOS, 4, 5, 6, *end]


@pytest.mark.parametrize("offset", range(-3, 3))
def test_a_document_longer_than_what_is_searched_at_once(tmp_path, offset):
    """Its end is found wherever it lies, around the border of two searches as well."""
    end = 1_200_000 + (1 << 20) + offset
    tokens = np.ones(2_400_000, np.uint16)
    tokens[0] = tokens[end] = EOS
    tokens.tofile(tmp_path / "tokens.bin")
    assert len(load_corpus(tmp_path, "bytes", 0.5).train) == end + 1


# ------------------------------------------------------------------------------------ the setting `corpus`


@pytest.mark.parametrize("text, corpora", [
    ("a", [("a", None, 0)]),
    ("a/b.c", [("a/b.c", None, 0)]),
    ("a,b", [("a", None, 0), ("b", None, 0)]),
    (" a , b ,", [("a", None, 0), ("b", None, 0)]),
    ("a:3,b:0.5", [("a", 3, 0), ("b", 0.5, 0)]),
    ("a:3:1e6,b:1:", [("a", 3, 1_000_000), ("b", 1, 0)]),
    ("a::100,b", [("a", None, 100), ("b", None, 0)]),
])
def test_parse_corpora(text, corpora):
    assert parse_corpora(text) == corpora


def test_a_path_that_is_there_wins_over_its_parts(tmp_path, monkeypatch):
    """48006ab cut its own `corpora/my, file: 1` at the comma."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b: 1", "a", "c:2", "d,e.bin", "f,g_train.bin"):
        os.makedirs(name)
    for text, corpora in (
            ("a,b: 1", [("a,b: 1", None, 0)]), ("a,b: 1:3,a:1", [("a,b: 1", 3, 0), ("a", 1, 0)]),
            ("a:1,a,b: 1:2:1K", [("a", 1, 0), ("a,b: 1", 2, 1000)]), ("c:2", [("c:2", None, 0)]),
            ("c:2:3", [("c:2", 3, 0)]), ("a:2", [("a", 2, 0)]), ("a,b", [("a", None, 0), ("b", None, 0)]),
            ("d,e", [("d,e", None, 0)]), ("f,g:1,a:2", [("f,g", 1, 0), ("a", 2, 0)])):
        assert parse_corpora(text) == corpora


BAD_ITEMS = ["a:b", "a:1:b", "a:1:2:3", ":1", ":", "a:0", "a:-1", "a:nan", "a:inf", "a:1e9", "a:1:0",
             "a:1:-5", "a:1:nan", "a:1:inf", "a:1:1e18", "a::x", "a:1:0.5"]


@pytest.mark.parametrize("text, problem", [
    ("", "name at least one folder"),
    (" , ", "name at least one folder"),
    ("a:1,b", "corpus=a:1,b: give every source a weight, or none"),
    ("a::10,b:1", "give every source a weight, or none"),
    *((f"ok,{item}", f"corpus={re.escape(item)}: write path, path:weight or path:weight:unique_tokens")
      for item in BAD_ITEMS),
])
def test_parse_corpora_refuses(text, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        parse_corpora(text)
    one_line(caught)


# ------------------------------------------------------------------------------- what a run is resumed on


@pytest.mark.parametrize("change", [
    lambda folder: write_shard(folder / "b_0.bin", [9, 8, 7]),
    lambda folder: write_shard(folder / "b_2.bin", [7]),
    lambda folder: (folder / "b_1.bin").unlink(),
], ids=["changed", "added", "removed"])
def test_changed_files_have_another_fingerprint(tmp_path, change):
    """So that a run is not resumed on other tokens."""
    for name in ("b_0", "b_1", "val"):
        write_shard(tmp_path / f"{name}.bin", ABC)
    before = load_corpus(tmp_path, "bytes").meta
    assert load_corpus(tmp_path, "bytes").meta == before
    change(tmp_path)
    after = load_corpus(tmp_path, "bytes").meta
    assert after["train"]["sha256"] != before["train"]["sha256"] and after["val"] == before["val"]
