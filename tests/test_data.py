"""Reading: tokenizers, token files of every layout, the stream over them, epochs, mixtures, documents, inspect and export."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, prepared
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_train import run_main  # noqa: F401  (fixtures)

import data
import diffusion
import train
from corpus import inspect, prepare, tokenfiles, tokenizers
from model import ModelConfig, Transformer
from training.log import read_metrics

CACHE = ROOT.parent / "shared" / "tiktoken"  # the GPT-2 files, where there is no network
needs_gpt2 = pytest.mark.skipif(not CACHE.is_dir(), reason="no tiktoken files beside the repository")
quick = settings(max_examples=40, deadline=None)
EOS = tokenizers.Bytes.eos_id

# Everything that pre-tokenizers treat in a way of its own, and characters of one to four bytes.
TEXT = st.text(st.sampled_from("aZ1é世🙂 .'!/\t\r\x0b\x1c\x85\u00a0\u2028\n\n\n"), max_size=60)


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        yield tokenizers.load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def stories(n, first=0):
    return [f"Document {i} is about {i * i}.\nIt ends — hier: {'é' * (i % 5)}🙂" for i in range(first, first + n)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A prepared corpus in one file per split. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("small")
    prepared(folder / "small", write_jsonl(folder / "x.jsonl", stories(30)), val=0.3)
    return folder / "small"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A prepared corpus of several shards per split. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("sharded")
    prepared(folder / "sharded", write_jsonl(folder / "x.jsonl", stories(120)), val=0.3, shard_tokens=700)
    return folder / "sharded"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The path of a byte-level BPE, as a tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = byte_level, tokenizers.decoders.ByteLevel()
    made.train_from_iterator(stories(50), tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=byte_level.alphabet(), show_progress=False))
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made.save(str(path))
    return path


def one_line(caught):
    """The message of a caught exception, which must be one line."""
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------- others' files, written here from their published layouts


def raw16(path, tokens):
    path.write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))


def shard(path, tokens, magic=20240520, version=1, kind="H", count=None):
    """llm.c and modded-nanogpt: 256 int32 of header, then the tokens."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{kind}", *tokens))


def shard3(path, tokens, **changes):
    shard(path, tokens, **(dict(magic=20240801, version=7, kind="I") | changes))


KINDS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}  # Megatron's type codes, as struct calls them


def megatron(prefix, documents, code=8):
    """MMapIndexedDataset; documents: per document a list of sequences."""
    sequences, kind = [s for document in documents for s in document], KINDS[code]
    width, lengths, firsts = struct.calcsize(kind), [len(s) for s in sequences], [0]
    for document in documents:
        firsts.append(firsts[-1] + len(document))
    pointers = [width * sum(lengths[:i]) for i in range(len(lengths))]
    Path(f"{prefix}.bin").write_bytes(b"".join(struct.pack(f"<{len(s)}{kind}", *s) for s in sequences))
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
        + struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(firsts)}q", *lengths, *pointers, *firsts))


def whole(stream):
    return stream.read(0, len(stream)).tolist()


def lengths_of(stream, eos=EOS):
    return [n for lengths in tokenfiles.document_lengths(stream, eos) for n in lengths.tolist()]


def small_chunks(size):
    """Streams hand out their tokens in small pieces."""
    return mock.patch.object(tokenfiles.Stream, "chunks", functools.partialmethod(tokenfiles.Stream.chunks, size))


def fresh(folder):
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# ---------------------------------------------------------------------------------------------- tokenizers


@quick
@given(st.text())
def test_bytes_round_trip(text):
    tokens = tokenizers.load_tokenizer("bytes")
    ids = tokens.encode(text)
    assert ids.tolist() == list(text.encode()) == tokens.encode_batch(["", text])[1].tolist()
    assert tokens.decode([tokens.eos_id, *ids.tolist(), tokens.mask_id, tokens.eos_id]) == text
    assert (tokens.n_vocab, tokens.eos_id, tokens.mask_id) == (257, 256, 257)


@needs_gpt2
@quick
@given(st.text() | TEXT)
@example("<|endoftext|>")  # in a document this is text, and no separator
def test_gpt2_round_trip(gpt2, text):
    ids = gpt2.encode(text)
    assert not (ids >= gpt2.eos_id).any()
    assert [a.tolist() for a in gpt2.encode_batch([text, "", text])] == [ids.tolist(), [], ids.tolist()]
    assert gpt2.decode([gpt2.eos_id, *ids.tolist(), gpt2.mask_id]) == text
    assert gpt2.token_bytes()[ids].sum() == len(text.encode())
    assert (gpt2.n_vocab, gpt2.eos_id, gpt2.mask_id, gpt2.specials) == (50257, 50256, 50257, {"<|endoftext|>": 50256})


def real_pattern(name, ranks):
    """A tiktoken encoding with its own pattern and special tokens, but made-up merges: needs no download."""
    import tiktoken
    from tiktoken_ext import openai_public

    with mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks):
        encoding = tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())
    with mock.patch.object(tiktoken, "get_encoding", lambda _: encoding):
        return tokenizers.load_tokenizer(name)


def test_text_tokens_above_the_separator():
    """p50k_base has <|endoftext|> at 50256 and runs of spaces from 50257 on: none of them is the mask."""
    ranks = {bytes([i]): i for i in range(256)} | {f"<{i}>".encode(): i for i in range(256, 50281) if i != 50256}
    del ranks[b"<50257>"]
    tokens = real_pattern("p50k_base", ranks | {b"  ": 50257})
    ids = tokens.encode("a   b")
    assert 50257 in ids
    assert tokens.mask_id not in ids and ids.max() < tokens.n_vocab <= tokens.mask_id
    assert tokens.decode(ids) == "a   b"


@quick
@given(st.text() | TEXT)
@example("<|endoftext|>")
@example("Document 7 is about 49.<|endoftext|>\nIt")
def test_tokenizer_file_round_trip(bpe, text):
    tokens = file_tokenizer(bpe)
    ids = tokens.encode(text)
    assert not (ids == tokens.eos_id).any() and ids.max(initial=0) < tokens.n_vocab <= tokens.mask_id
    assert [a.tolist() for a in tokens.encode_batch([text, ""])] == [ids.tolist(), []]
    assert tokens.decode([tokens.eos_id, *ids.tolist(), tokens.mask_id]) == text
    assert tokens.token_bytes()[ids].sum() == len(text.encode()) and len(tokens.token_bytes()) == tokens.n_vocab


@functools.cache
def file_tokenizer(path):
    return tokenizers.load_tokenizer(str(path))


def test_tokenizer_file_is_known_by_its_digest(bpe, tmp_path):
    tokens = file_tokenizer(bpe)
    assert tokens.name == f"tokenizer.json {hashlib.sha256(bpe.read_bytes()).hexdigest()[:16]} <|endoftext|>"
    assert tokens.specials == {"<|endoftext|>": tokens.eos_id} and tokens.token_bytes()[tokens.eos_id] == 0 and tokens.cuts
    assert len(tokens.encode(stories(1)[0])) < 0.7 * len(stories(1)[0])  # merges at all
    assert tokenizers.load_tokenizer(str(bpe.parent)).name == tokens.name  # a folder that holds it
    assert tokenizers.load_tokenizer(tokens.name, (tmp_path, bpe.parent)).path == bpe
    (tmp_path / "tokenizer.json").write_bytes(bpe.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"no tokenizer.json of digest {tokens.name.split()[1]} in {tmp_path}") as caught:
        tokenizers.load_tokenizer(tokens.name, (tmp_path,))
    one_line(caught)


def changed_bpe(bpe, path, **changes):
    path.write_text(json.dumps(json.loads(bpe.read_text()) | changes))
    return path


def test_tokenizer_file_refuses(bpe, tmp_path):
    for text in ("", "{", "[]", "{}", '{"model": 7}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="x.json: no tokenizer.json: ") as caught:
            tokenizers.load_tokenizer(str(tmp_path / "x.json"))
        one_line(caught)
    (tmp_path / "x.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="x.json: no tokenizer.json: "):
        tokenizers.load_tokenizer(str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="absent.json: no such tokenizer file"):
        tokenizers.load_tokenizer(str(tmp_path / "absent.json"))
    none = changed_bpe(bpe, tmp_path / "none.json", added_tokens=[])
    with pytest.raises(ValueError, match="none.json: which token ends a document"):
        tokenizers.load_tokenizer(str(none))
    assert tokenizers.load_tokenizer(str(none), eos="a").eos_id == json.loads(bpe.read_text())["model"]["vocab"]["a"]
    with pytest.raises(ValueError, match=r"has no token '<s>'; give it with --eos= \(its specials: <\|endoftext\|>\)"):
        tokenizers.load_tokenizer(str(bpe), eos="<s>")
    plain = changed_bpe(bpe, tmp_path / "plain.json", pre_tokenizer={"type": "Whitespace"}, decoder=None)
    with pytest.raises(ValueError, match="do not spell the text"):
        tokenizers.load_tokenizer(str(plain))
    with pytest.raises(ValueError, match="eos=a: only a tokenizer.json leaves that open"):
        tokenizers.load_tokenizer("bytes", eos="a")


def test_tokenizer_file_with_byte_fallback(tmp_path):
    """As Llama 2's and Gemma's: spaces are ▁, and what is not in the vocabulary is spelled in bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {t: i for i, t in enumerate(("</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a", "é"))}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b"), ("▁", "a")], byte_fallback=True))
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokens = tokenizers.load_tokenizer(str(tmp_path))
    text = "ab  a é世🙂 b"
    ids = tokens.encode(text)
    assert tokens.decode(ids) == text and tokens.token_bytes()[ids].sum() == len(text.encode())
    assert tokens.eos_id == 0 and not tokens.cuts


def test_unknown_tokenizer_names_the_known():
    with pytest.raises(ValueError, match="unknown tokenizer 'gtp2'.*bytes.*gpt2"):
        tokenizers.load_tokenizer("gtp2")


def test_a_folder_of_a_tokenizers_name_is_no_tokenizer(tmp_path, monkeypatch):
    """Corpora are often called as their tokenizer is."""
    monkeypatch.chdir(tmp_path)
    Path("bytes").mkdir()
    assert tokenizers.load_tokenizer("bytes").name == "bytes"


def test_token_bytes_add_up_to_the_text(tmp_path, bpe):
    """Bits per byte of any block rests on this: the lengths of the tokens of a split sum to its bytes."""
    (tmp_path / "t.txt").write_text("Straße, naïve; 数 and 🙂.\n" * 50)
    for i, name in enumerate(["bytes", str(bpe)] + ["gpt2"] * CACHE.is_dir()):
        meta = prepared(tmp_path / str(i), tmp_path / "t.txt", tokenizer=name)
        read = tokenfiles.load_corpus(tmp_path / str(i))
        assert read.tokenizer_file == (tmp_path / str(i) / "tokenizer.json" if name == str(bpe) else None)
        for split in ("train", "val"):
            assert read.token_bytes[whole(getattr(read, split))].sum() == meta[split]["bytes"] > 100
    (tmp_path / "0" / "token_bytes.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="token_bytes.bin: missing"):
        tokenfiles.load_corpus(tmp_path / "0")


# ------------------------------------------------------------------------------------------- prepared corpora


def edit_json(change):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))
    return edit


def edit_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def flip(at):
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


def pair_up(folder):
    """Say uint32 and half the tokens in meta.json: sizes and checksums still agree."""
    def change(meta):
        meta["dtype"] = "uint32"
        for split in ("train", "val"):
            raw = (folder / f"{split}.bin").read_bytes()
            raw += b"\0\1" * (len(raw) % 4 // 2)
            (folder / f"{split}.bin").write_bytes(raw)
            meta[split]["files"] = [dict(name=f"{split}.bin", tokens=len(raw) // 4, sha256=hashlib.sha256(raw).hexdigest())]
    edit_json(change)(folder)


@pytest.mark.parametrize("damage, message", [
    (edit_bytes("train.bin", lambda raw: raw[:-2]), r"train.bin: \d+ bytes, but meta.json says"),
    (edit_bytes("val.bin", lambda raw: raw[:-1]), r"val.bin: \d+ bytes, but meta.json says"),
    (edit_bytes("val.bin", lambda raw: b""), "val.bin: 0 bytes, but meta.json says"),
    (lambda folder: (folder / "train.bin").unlink(), "train.bin: 0 bytes, but meta.json says"),
    (edit_bytes("train.bin", flip(9)), "train.bin: its SHA-256"),
    (edit_bytes("val.bin", flip(-3)), "val.bin: its SHA-256"),
    (edit_json(lambda meta: meta.update(dtype="uint32")), "another dtype"),
    (edit_json(lambda meta: meta.update(dtype="int16")), "meta.json is damaged"),
    (edit_json(lambda meta: meta.pop("train")), "meta.json is damaged"),
    (edit_json(lambda meta: meta["train"].pop("files")), "meta.json is damaged"),
    (edit_json(lambda meta: meta["train"]["files"][0].pop("sha256")), "meta.json is damaged"),
    (edit_json(lambda meta: meta["train"]["files"][0].update(tokens="7")), "meta.json is damaged"),
    (edit_json(lambda meta: meta.pop("eos_id")), "meta.json is damaged"),
    (edit_json(lambda meta: meta["val"].pop("bytes")), "meta.json is damaged"),
    (edit_json(lambda meta: meta.update(mask_id=256)), "meta.json is damaged"),
    (edit_json(lambda meta: meta.update(n_vocab=65537, mask_id=65537)), "a vocabulary of 65537 is above what uint16 holds"),
    (edit_json(lambda meta: meta.update(n_vocab=100, eos_id=99)), "n_vocab|vocabulary"),
    (pair_up, "n_vocab|vocabulary"),
    (edit_bytes("meta.json", lambda raw: raw[: len(raw) // 2]), "meta.json is damaged"),
    (edit_bytes("meta.json", lambda raw: b"[]"), "meta.json is damaged"),
    (edit_bytes("meta.json", lambda raw: b"\xff" + raw), "meta.json is damaged"),
], ids=["cut", "odd", "empty", "no-bin", "flip", "flip-val", "dtype", "bad-dtype", "no-train", "no-files", "no-sha", "text-tokens",
        "no-eos", "no-bytes", "mask", "wide", "vocab", "pairs", "half", "list", "not-utf8"])
def test_load_refuses(tmp_path, small, damage, message):
    folder = tmp_path / "out"
    shutil.copytree(small, folder)
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
def test_a_corpus_without_its_meta_json_is_no_nanogpt_folder(small, tmp_path, tokenizer):
    """The lengths of the tokens would become training data."""
    shutil.copytree(small, tmp_path / "out")
    (tmp_path / "out" / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="out/meta.json"):
        tokenfiles.load_corpus(tmp_path / "out", tokenizer)


def test_load_of_several_shards(sharded, tmp_path):
    files = json.loads((sharded / "meta.json").read_text())["train"]["files"]
    read = tokenfiles.load_corpus(sharded)
    assert len(files) > 3 and len(read.val.arrays) > 1
    assert whole(read.train) == np.concatenate([np.fromfile(sharded / f["name"], np.uint16) for f in files]).tolist()
    assert len(lengths_of(read.train)) + len(lengths_of(read.val)) == 120
    third = files[2]["name"]
    for number, (damage, problem) in enumerate((
            (lambda folder: (folder / third).unlink(), "0 bytes, but meta.json says"),
            (edit_bytes(third, flip(8)), "its SHA-256"), (edit_bytes(third, lambda raw: raw[:-2]), "truncated"))):
        folder = tmp_path / str(number)
        shutil.copytree(sharded, folder)
        damage(folder)
        with pytest.raises(ValueError, match=f"{third}: .*{problem}") as caught:
            tokenfiles.load_corpus(folder)
        one_line(caught)


def test_prepared_corpus_and_another_tokenizer(small, bpe):
    assert tokenfiles.load_corpus(small, "bytes").meta["tokenizer"] == "bytes"
    with pytest.raises(ValueError, match="small was prepared with tokenizer 'bytes', not 'tokenizer.json [0-9a-f]{16} "):
        tokenfiles.load_corpus(small, str(bpe))


def test_large_vocabulary_takes_four_bytes(tmp_path):
    """Prepared as if with a vocabulary above 65,536."""
    tokens = SimpleNamespace(name="wide", n_vocab=300_000, eos_id=299_999, mask_id=300_000, specials={}, cuts=False,
                             token_bytes=lambda: np.ones(300_000, np.uint16),
                             encode_batch=lambda texts: [np.array([65536 + ord(c) for c in text], np.uint32) for text in texts])
    with mock.patch.object(data, "tokenizer", lambda *_, **__: tokens):
        prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", stories(20)), val=0.5)
    read, found = tokenfiles.load_corpus(tmp_path / "out"), []
    for stream in (read.train, read.val):
        assert stream.dtype == np.uint32
        for ids in np.split(stream.read(0, len(stream)), np.flatnonzero(stream.read(0, len(stream)) == tokens.eos_id) + 1)[1:-1]:
            found.append("".join(chr(i - 65536) for i in ids[:-1]))
    assert sorted(found) == sorted(stories(20))


# ----------------------------------------------------------------------------------------- others' token files


TOKENS = st.lists(st.sampled_from([0, 1, 2, 255, EOS]), min_size=1, max_size=40)


def split_at(tokens, cuts):
    return [part.tolist() for part in np.split(np.array(tokens), cuts)]


def eos_lengths(tokens):
    """The lengths of the documents that eos tokens end, the last one's end being the file's; an eos in front is a lead."""
    tokens = tokens[1:] if tokens[:1] == [EOS] else tokens
    found, count = [], 0
    for token in tokens:
        count += 1
        if token == EOS:
            found.append(count - 1)
            count = 0
    return found + [count] * (count > 0)


def with_lead(tokens):
    """As a Stream has them: a lone eos goes before what does not begin with one."""
    return tokens if tokens[0] == EOS else [EOS, *tokens]


@quick
@given(TOKENS, TOKENS)
def test_nanogpt(scratch, first, second):
    folder = fresh(scratch / "nano")
    raw16(folder / "train.bin", first)
    raw16(folder / "val.bin", second)
    read = tokenfiles.load_corpus(folder, "bytes")
    assert (read.meta["format"], read.meta["tokenizer"], read.tokenizer_file) == ("nanoGPT", "bytes", None)
    assert (read.meta["n_vocab"], read.meta["mask_id"], read.meta["eos_id"]) == (257, 257, 256)
    for stream, tokens in ((read.train, first), (read.val, second)):
        assert whole(stream) == with_lead(tokens) and stream.dtype == np.uint16
        assert lengths_of(stream) == eos_lengths(tokens)
    assert read.token_bytes.tolist() == [1] * 256 + [0]


@quick
@given(st.data(), st.sampled_from([shard, shard3]))
def test_llm_c_shards(scratch, draw, write):
    """Documents cross from shard to shard; the order is that of the names."""
    folder, all_tokens = fresh(scratch / "llmc"), {}
    for split in ("train", "val"):
        tokens = all_tokens[split] = draw.draw(TOKENS)
        cuts = draw.draw(st.lists(st.integers(1, max(1, len(tokens) - 1)), max_size=4, unique=True).map(sorted)) if len(tokens) > 1 else []
        for number, part in reversed(list(enumerate(split_at(tokens, cuts)))):
            write(folder / f"fineweb_{split}_{number:06d}.bin", part)
    read = tokenfiles.load_corpus(folder, "bytes")
    assert read.meta["format"] == "llm.c"
    for split, stream in (("train", read.train), ("val", read.val)):
        assert whole(stream) == with_lead(all_tokens[split]) and stream.dtype == (np.uint16 if write is shard else np.uint32)
        assert lengths_of(stream) == eos_lengths(all_tokens[split])


def test_more_shards_than_files_may_be_open(tmp_path):
    """A hundred billion tokens of FineWeb are 1030 shards, and 1024 the usual limit."""
    for number in range(40):
        shard(tmp_path / f"fineweb_{'val' if number == 39 else 'train'}_{number:06}.bin", [number, EOS])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, limits[1]))
        assert whole(tokenfiles.load_corpus(tmp_path, "bytes").train)[1::2] == list(range(39))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


SEQUENCES = st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=3)


@st.composite
def pairs(draw):
    """What is in several .bin/.idx pairs: each a list of documents, each a list of sequences. Some end with eos, some are empty."""
    single, ends = draw(st.booleans()), draw(st.sampled_from(["eos", "none", "some"]))
    found = []
    for _ in range(draw(st.integers(1, 3))):
        documents = draw(st.lists(SEQUENCES, min_size=1, max_size=6))
        documents = [[sum(d, [])] for d in documents] if single else documents
        for document in documents:
            if ends == "eos" or ends == "some" and draw(st.booleans()):
                document[-1].append(EOS)
        if not any(map(any, (map(len, d) for d in documents))):
            documents[0][0].append(7)  # a pair without a token is refused
        found.append(documents)
    return found


def flat(documents):
    return [token for document in documents for sequence in document for token in sequence]


def owners(documents):
    """The number of the document that each token is in, from 1 on."""
    return [number for number, document in enumerate(documents, 1) for sequence in document for _ in sequence]


def ended(document):
    """A document's length without its eos."""
    tokens = flat([document])
    return len(tokens) - (tokens[-1:] == [EOS])


@settings(max_examples=80, deadline=None)
@given(pairs(), st.sampled_from([3, 4, 5, 8]))
@example([[[[]], [[1, 2]], [[]]]], 8)
@example([[[[1]]], [[[EOS]], [[]], [[], [2]]]], 4)
def test_megatron_documents(scratch, contents, code):
    folder = fresh(scratch / "mega")
    for number, documents in enumerate(contents):
        megatron(folder / f"web_{number}_text_document", documents, code)
    megatron(folder / "web_valid_text_document", contents[0], code)
    read, documents = tokenfiles.load_corpus(folder, "bytes"), sum(contents, [])
    tokens = flat(documents)
    lead = tokens[0] != EOS
    assert whole(read.train) == with_lead(tokens) and read.train.dtype == np.dtype(KINDS[code]) and read.meta["format"] == "Megatron"
    assert lengths_of(read.train) == [ended(d) for d in documents]
    assert read.train.document(np.arange(len(read.train))).tolist() == [0] * lead + owners(documents)
    assert whole(read.val) == with_lead(flat(contents[0])) and lengths_of(read.val) == [ended(d) for d in contents[0]]


@pytest.mark.parametrize("given", ["web_text_document", "web_text_document.bin", ""])
def test_megatron_by_prefix(tmp_path, given):
    """A prefix or a file is that pair alone; a folder is all of its pairs."""
    megatron(tmp_path / "web_text_document", [[[1, 2, EOS]], [[3, 4, 5, EOS]], [[6, EOS]]])
    if given:
        megatron(tmp_path / "another", [[[9]]])
    read = tokenfiles.load_corpus(tmp_path / given, "bytes", val_share=0.3)
    assert whole(read.train) == [EOS, 1, 2, EOS, 3, 4, 5, EOS] and whole(read.val)[-2:] == [6, EOS]


@pytest.mark.parametrize("prefix", ["web", "a.b", "val", "test_web"])
def test_a_prefix_of_two_pairs(tmp_path, prefix):
    """As `export` writes them: each is of the split that its ending says, whatever the prefix is called."""
    for split, token in (("train", 1), ("val", 2), ("other", 3)):
        megatron(tmp_path / f"{prefix}_{split}", [[[token, EOS]]])
    read = tokenfiles.load_corpus(tmp_path / prefix, "bytes")
    assert whole(read.train) == [EOS, 1, EOS] and whole(read.val) == [EOS, 2, EOS]
    (tmp_path / f"{prefix}_val.bin").unlink()
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path / prefix, "bytes")


@pytest.mark.parametrize("given", ["", "train.bin"])
@pytest.mark.parametrize("tokenizer", ["", "bytes"])
def test_characters_with_an_alphabet_of_their_own(tmp_path, given, tokenizer):
    """nanoGPT's meta.pkl says which characters the tokens are. Reading a pickle would run what is in it."""
    for name in ("train", "val"):
        raw16(tmp_path / f"{name}.bin", ABC)
    (tmp_path / "meta.pkl").write_bytes(b"no pickle")
    with pytest.raises(ValueError, match="meta.pkl: .*alphabet of their own.*prepare the text itself with data.py") as caught:
        tokenfiles.load_corpus(tmp_path / given, tokenizer)
    one_line(caught)


def test_the_working_folder_holds_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    raw16(tmp_path / "train.bin", [1, 2, 3])
    raw16(tmp_path / "val.bin", [1, 2, 4])
    assert whole(tokenfiles.load_corpus(".", "bytes").val) == [EOS, 1, 2, 4]


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
        raw16(tmp_path / f"{name}.bin", [EOS, number])
    order = sorted(names.split())
    read = tokenfiles.load_corpus(tmp_path, "bytes", val_share=0.5)  # it is not needed: there are files for validation
    assert whole(read.train)[1::2] == [order.index(n) for n in train_names.split()]
    assert whole(read.val)[1::2] == [order.index(n) for n in val_names.split()]


@pytest.mark.parametrize("name", ["tokens", "train", "val", "test"])
def test_a_single_file_is_for_training(tmp_path, name):
    raw16(tmp_path / f"{name}.bin", [1, EOS, 2, EOS, 3, EOS, 4, EOS])
    read = tokenfiles.load_corpus(tmp_path, "bytes", val_share=0.25)
    assert whole(read.train) == [EOS, 1, EOS, 2, EOS, 3, EOS] and 4 in whole(read.val)


def check_cut(read, tokens, starts, share):
    """Training and validation are the whole, and the cut is at the first document's start after the share."""
    val = whole(read.val)
    if len(read.train) + len(val) > len(tokens):  # an eos of its own before the validation's first document
        assert val[0] == EOS
        val = val[1:]
    assert whole(read.train) + val == tokens
    place = int(len(tokens) * (1 - share))
    assert len(read.train) == min([s for s in starts if s >= place], default=len(tokens))


@quick
@given(TOKENS.filter(lambda tokens: len(tokens) > 3), st.floats(0.01, 0.5))
def test_the_cut_of_eos_separated_files(scratch, tokens, share):
    folder = fresh(scratch / "cut")
    raw16(folder / "a.bin", tokens[:2])
    raw16(folder / "b.bin", tokens[2:])
    tokens = with_lead(tokens)
    read = tokenfiles.load_corpus(folder, "bytes", share)
    check_cut(read, tokens, [i + 1 for i, token in enumerate(tokens) if token == EOS], share)
    other = tokenfiles.load_corpus(folder, "bytes", share / 2)
    assert read.meta["train"]["sha256"] == read.meta["val"]["sha256"] != other.meta["train"]["sha256"]


@settings(max_examples=80, deadline=None)
@given(pairs(), st.floats(0.01, 0.5))
@example([[[[1, 2]], [[3]], [[4, 5]], [[6]], [[7]], [[8]]], [[[9]], [[10]]]], 0.5)  # within the first of two pairs
def test_the_cut_of_megatron_files(scratch, contents, share):
    folder = fresh(scratch / "cutm")
    for number, documents in enumerate(contents):
        megatron(folder / f"web_{number}", documents)
    documents = sum(contents, [])
    tokens = with_lead(flat(documents))
    lead = len(tokens) - len(flat(documents))
    starts = [lead + sum(len(flat([d])) for d in documents[:i]) for i in range(len(documents))]
    read = tokenfiles.load_corpus(folder, "bytes", share)
    check_cut(read, tokens, starts, share)
    numbers = [0] * lead + owners(documents)
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
        megatron(tmp_path / f"web_{number}", documents)
    read = tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
    expected = [ended(d) for d in sum(contents, [])]
    assert lengths_of(read.train) + lengths_of(read.val) == expected
    assert lengths_of(read.train) == expected[: len(lengths_of(read.train))] != expected


def test_validation_that_is_cut_off_begins_with_an_eos(tmp_path):
    """Else the first token of its first document is read by nobody: a block's first token is the one before it."""
    raw16(tmp_path / "tokens.bin", [1, 2, 3, EOS, 4, 5, 6, EOS])
    megatron(tmp_path / "prefix", [[[1, 2, 3]], [[4, 5, 6]]])
    for name, end in (("tokens.bin", [EOS]), ("prefix", [])):
        assert whole(tokenfiles.load_corpus(tmp_path / name, "bytes", 0.5).val) == [EOS, 4, 5, 6, *end]


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
        megatron(folder / "web", [[[1, 2, EOS]], [[3, EOS]], [[4, 5, 6, EOS]]])
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


ABC = [1, 2, EOS, 3, 4, EOS]


@pytest.mark.parametrize("make, message", [
    (file("a.bin", shard, ABC, count=7), r"a.bin: 1036 bytes, but its header says 7 tokens of uint16 \(1038 bytes\)"),
    (file("a.bin", shard, ABC, count=5), "a.bin: 1036 bytes, but its header says 5 tokens"),
    (file("a.bin", shard, ABC, count=-6), "a.bin: 1036 bytes, but its header says -6 tokens"),
    (file("a.bin", shard, [], count=0), "a.bin: 1024 bytes, but its header says 0 tokens"),
    (file("a.bin", shard, ABC, version=2), "a.bin: a shard of version 2; version 1 is known"),
    (file("a.bin", shard3, ABC, version=1), "a.bin: a shard of version 1; version 7 is known"),
    (file("a.bin", shard3, ABC, kind="H"), "a.bin: 1036 bytes, but its header says 6 tokens of uint32"),
    (lambda folder: (folder / "a.bin").write_bytes(b""), r"a.bin: 0 bytes are no uint16 tokens \(empty"),
    (lambda folder: (folder / "a.bin").write_bytes(b"abc"), r"a.bin: 3 bytes are no uint16 tokens \(empty or truncated"),
    (two(file("a.bin", raw16, ABC), file("b.bin", shard, ABC)), "files of different layouts or types .*nanoGPT.*keep one kind"),
    (two(file("a.bin", shard, ABC), file("b.bin", shard3, ABC)), "files of different layouts or types .*llm.c.*keep one kind"),
    (two(file("a.bin", raw16, ABC), file("b", megatron, [[ABC]])), "files of different layouts or types .*Megatron.*keep one kind"),
    (two(file("a", megatron, [[ABC]], 8), file("b", megatron, [[ABC]], 4)), "files of different layouts or types .*int32.*keep one kind"),
    (file("a", megatron, [[[1, 2]]], 1), "a.bin: tokens of uint8, which can't hold tokenizer 'bytes' of 257 tokens"),
    (file("a", megatron, [[[1, 2]]], 2), "a.bin: tokens of int8, which can't hold tokenizer 'bytes' of 257 tokens"),
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
    raw16(tmp_path / "train.bin", ABC)
    for name, problem in (("", "token files do not say which tokenizer made them; add --tokenizer=gpt2"),
                          ("bytes", "no validation tokens; add a file .*--val_share")):
        with pytest.raises(ValueError, match=problem) as caught:
            tokenfiles.load_corpus(tmp_path, name)
        assert str(tmp_path) in one_line(caught)


def test_only_files_for_validation(tmp_path):
    for name in ("val_0", "val_1"):
        raw16(tmp_path / f"{name}.bin", ABC)
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path, "bytes")


@pytest.mark.parametrize("write", [shard, shard3])
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
    megatron(tmp_path / "web", documents)
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
    raw16(tmp_path / "tokens.bin", [1, 65535, 0, 3, 0])
    with mock.patch.object(data, "tokenizer", lambda *_, **__: tokens):
        assert whole(tokenfiles.load_corpus(tmp_path, "full", 0.3).train) == [0, 1, 65535, 0]
        tokens.n_vocab, tokens.mask_id = 65537, 65537
        with pytest.raises(ValueError, match="tokens of uint16, which can't hold tokenizer 'full' of 65537 tokens"):
            tokenfiles.load_corpus(tmp_path, "full", 0.3)


@pytest.mark.parametrize("code, wrong", [(8, 257), (4, 70000), (5, 2**40), (4, -1), (3, -300), (5, -(2**40))])
def test_tokens_beyond_the_vocabulary(tmp_path, code, wrong):
    megatron(tmp_path / "web", [[[1, 2, wrong, EOS]], [[3, 4, EOS]]], code)
    read = tokenfiles.load_corpus(tmp_path, "bytes", 0.3)
    blocks = data.Sequences(read.train, 2, n_vocab=257)
    assert blocks.read(np.array([0])).tolist() == [[EOS, 1, 2]]
    with pytest.raises(ValueError, match=rf"the training split holds token (?:{wrong}|\d+), beyond its vocabulary of 257") as caught:
        blocks.read(np.array([0, 1]))
    if wrong > 0:
        assert f"token {wrong}," in one_line(caught)


@pytest.mark.parametrize("change", [
    file("b_0.bin", shard, [9, 8, 7]), file("b_2.bin", shard, [7]), lambda folder: (folder / "b_1.bin").unlink(),
], ids=["changed", "added", "removed"])
def test_changed_files_have_another_fingerprint(tmp_path, change):
    """So that a run is not resumed on other tokens."""
    for name in ("b_0", "b_1", "val"):
        shard(tmp_path / f"{name}.bin", [1, 2, 3])
    before = tokenfiles.load_corpus(tmp_path, "bytes").meta
    assert tokenfiles.load_corpus(tmp_path, "bytes").meta == before
    change(tmp_path)
    after = tokenfiles.load_corpus(tmp_path, "bytes").meta
    assert after["train"]["sha256"] != before["train"]["sha256"] and after["val"] == before["val"]


# ---------------------------------------------------------------------------------------------- write_megatron


def documents_of(tokens):
    """As our own layout has them: eos in front, and one after every document; the last may have none."""
    found = [[]]
    for token in tokens[1:] if tokens[0] == EOS else tokens:
        found[-1].append(token)
        if token == EOS:
            found.append([])
    return found[:-1] if not found[-1] else found


@settings(max_examples=60, deadline=None)
@given(TOKENS.filter(lambda tokens: tokens != [EOS]), st.lists(st.integers(1, 39), max_size=3, unique=True).map(sorted),
       st.sampled_from([np.uint16, np.uint32]), st.integers(1, 9))
@example([EOS, 1, 2, EOS, EOS, 3, EOS], [], np.uint16, 1)
@example([EOS, 1, 2], [1], np.uint32, 1)
def test_megatron_written(scratch, tokens, cuts, dtype, size):
    """Byte for byte what the layout says, and the same again when read."""
    folder = fresh(scratch / "out")
    stream = tokenfiles.Stream([np.array(part, dtype) for part in split_at(tokens, cuts)])
    with small_chunks(size):
        tokenfiles.write_megatron(stream, EOS, folder / "sub" / "web")
    megatron(folder / "expected", [[d] for d in documents_of(tokens)], 8 if dtype is np.uint16 else 4)
    assert sorted(p.name for p in (folder / "sub").iterdir()) == ["web.bin", "web.idx"]
    for end in (".bin", ".idx"):
        assert (folder / "sub" / f"web{end}").read_bytes() == (folder / f"expected{end}").read_bytes()
    _, again, _ = tokenfiles.open_foreign([folder / "sub" / "web.bin"], tokenizers.Bytes())
    assert whole(again) == with_lead([t for d in documents_of(tokens) for t in d])
    assert lengths_of(again) == lengths_of(stream)


@quick
@given(pairs())
def test_megatron_written_from_megatron(scratch, contents):
    """Documents keep their borders, with or without eos."""
    folder = fresh(scratch / "again")
    for number, documents in enumerate(contents):
        megatron(folder / f"web_{number}", documents)
    files = sorted(folder.glob("*.bin"))
    _, stream, _ = tokenfiles.open_foreign(files, tokenizers.Bytes())
    tokenfiles.write_megatron(stream, EOS, folder / "sub" / "web")
    _, again, _ = tokenfiles.open_foreign([folder / "sub" / "web.bin"], tokenizers.Bytes())
    assert whole(again) == whole(stream) and lengths_of(again) == lengths_of(stream)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_write_megatron_overwrites_nothing(tmp_path, end):
    (tmp_path / f"web{end}").write_text("mine")
    with pytest.raises(FileExistsError, match=f"web{end} exists; remove it or choose another prefix") as caught:
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    one_line(caught)
    assert [p.name for p in tmp_path.iterdir()] == [f"web{end}"] and (tmp_path / f"web{end}").read_text() == "mine"


def test_documents_that_an_index_cannot_measure(tmp_path):
    """Its lengths are int32; a single text may be longer."""
    with mock.patch.object(data, "document_sizes", lambda *_: [np.array([3, 2**31])]), pytest.raises(ValueError, match="web: a document of 2147483648 tokens"):
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", [1, 2])
def test_write_megatron_leaves_nothing_behind(tmp_path, stop, where):
    """Stopped while it writes the tokens, and while it writes the index."""
    with mock.patch.object(data, "flush", mock.Mock(side_effect=[None] * (where - 1) + [stop])), pytest.raises(stop):
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    assert not list(tmp_path.iterdir())


def test_half_a_pair_is_no_corpus(tmp_path):
    """Killed between its last two acts: a .bin alone would be read as nanoGPT's."""
    rename, done = Path.rename, []

    def once(path, target):
        if done:
            raise KeyboardInterrupt
        done.append(rename(path, target))

    with mock.patch.object(Path, "rename", once), pytest.raises(KeyboardInterrupt):
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path, "bytes", 0.3)


def test_export_from_the_command_line(sharded, tmp_path):
    prefix = tmp_path / "mega" / "web"
    done = subprocess.run([sys.executable, "data.py", "export", sharded, prefix], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    read = tokenfiles.load_corpus(sharded)
    for split, stream in (("train", read.train), ("val", read.val)):
        megatron(tmp_path / split, [[d] for d in documents_of(whole(stream))])
        for end in (".bin", ".idx"):
            assert (tmp_path / f"{split}{end}").read_bytes() == Path(f"{prefix}_{split}{end}").read_bytes()
        assert f"{prefix}_{split}.bin and .idx: {len(stream):,} tokens" in done.stdout
    for path in (prefix.parent, prefix):
        again = tokenfiles.load_corpus(path, "bytes")
        assert (whole(again.train), whole(again.val)) == (whole(read.train), whole(read.val))
    assert "Megatron token files" in run_inspect(prefix, "--tokenizer=bytes")


@pytest.fixture
def command(monkeypatch, capsys):
    """Call data.py's main() in this process; returns (exit code, stdout, stderr)."""

    def call(*argv):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
        handler, code = signal.getsignal(signal.SIGTERM), 0
        try:
            prepare.main()
        except SystemExit as stop:
            code = stop.code
        finally:
            signal.signal(signal.SIGTERM, handler)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("taken", ["web_train.bin", "web_train.idx", "web_val.bin", "web_val.idx"])
def test_export_writes_both_splits_or_none(small, tmp_path, command, taken):
    (tmp_path / taken).write_text("mine")
    code, out, err = command("export", small, tmp_path / "web")
    assert code == 2 and not out and err == f"data.py: {tmp_path / taken} exists; remove it or choose another prefix\n"
    assert [p.name for p in tmp_path.iterdir()] == [taken]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_export_that_stops_leaves_nothing_behind(small, tmp_path, command, stop):
    """Stopped while it writes the second split: the first goes, too."""
    with mock.patch.object(data, "flush", mock.Mock(side_effect=[None, None, stop])):
        code, out, err = command("export", small, tmp_path / "web")
    assert code in (2, 130) and not out and err.count("\n") == 1 and not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- streams


@st.composite
def streams(draw):
    """(Stream, its tokens) over files of 1 to 9 tokens."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    tokens = np.arange(sum(sizes), dtype=draw(st.sampled_from([np.uint16, np.uint32, np.int32]))) * 7 + 1
    return tokenfiles.Stream(np.split(tokens, np.cumsum(sizes)[:-1])), tokens


@settings(max_examples=100, deadline=None)
@given(streams(), st.data())
def test_a_stream_reads_as_one_array(made, draw):
    stream, tokens = made
    assert len(stream) == len(tokens)
    a, b = sorted(draw.draw(st.tuples(st.integers(0, len(tokens)), st.integers(0, len(tokens) + 3))))
    assert stream.read(a, b).tolist() == tokens[a:b].tolist() and stream.read(a, b).dtype == tokens.dtype
    for _ in range(2):  # of another length, and again
        n = draw.draw(st.integers(1, len(tokens)))
        start = np.array(draw.draw(st.lists(st.integers(0, len(tokens) - n), max_size=9)), np.int64)
        rows = stream.windows(start, n)
        assert rows.dtype == tokens.dtype and rows.shape == (len(start), n)
        assert rows.tolist() == [tokens[s : s + n].tolist() for s in start]
        rows += 1  # a copy
    assert whole(stream) == tokens.tolist()
    size = draw.draw(st.integers(1, 12))
    parts = list(stream.chunks(size))
    assert np.concatenate(parts).tolist() == tokens.tolist() and [len(p) for p in parts[:-1]] == [size] * (len(parts) - 1)


@quick
@given(streams(), st.data())
def test_a_stream_cut_in_two(made, draw):
    stream, tokens = made
    at = draw.draw(st.integers(0, len(tokens)))
    first, second = stream.cut(at)
    assert (whole(first), whole(second)) == (tokens[:at].tolist(), tokens[at:].tolist())
    if at < len(tokens):
        n = len(second) // 2 + 1
        start = np.arange(len(second) - n + 1)
        assert second.windows(start, n).tolist() == [tokens[at + s : at + s + n].tolist() for s in start]


def test_empty_files_are_left_out():
    stream = tokenfiles.Stream([np.array([], np.uint16), np.array([1, 2], np.uint16), np.array([], np.uint16), np.array([3], np.uint16)])
    assert len(stream.arrays) == 2 and stream.windows(np.array([1, 0]), 2).tolist() == [[2, 3], [1, 2]]
    assert len(tokenfiles.Stream([])) == 0 and whole(tokenfiles.Stream([])) == [] and list(tokenfiles.Stream([]).chunks()) == []


@settings(max_examples=80, deadline=None)
@given(TOKENS, st.lists(st.integers(1, 39), max_size=3, unique=True).map(sorted), st.integers(1, 9))
@example([EOS], [], 1)
@example([EOS, EOS, 1], [], 1)
def test_lengths_of_eos_separated_documents(tokens, cuts, size):
    with small_chunks(size):
        assert lengths_of(tokenfiles.Stream([np.array(part, np.uint16) for part in split_at(tokens, cuts)])) == eos_lengths(tokens)


# ------------------------------------------------------------------------------------------------- permute


def permuted(n, seed=0, epoch=0, index=None):
    index = np.arange(n) if index is None else np.asarray(index)
    return data.permute(index, n, seed, np.full(len(index), epoch, np.int64))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3000) | st.integers(1, 40), st.integers(0, 2**70), st.integers(-1, 2**40))
@example(1, 0, 0)
@example(2, 0, 0)
@example(3, 1, 0)
@example(4, 2, 5)
@example(5, 3, 1)
@example(16, 0, 0)
@example(17, 0, 0)
@example(65, 0, 0)
@example(1025, 0, 0)
@example(4096, 7, 1)
@example(65537, 7, 1)
def test_permute_is_a_bijection(n, seed, epoch):
    assert sorted(permuted(n, seed, epoch).tolist()) == list(range(n))


@quick
@given(st.integers(10**6, 2**50), st.integers(0, 2**64), st.data())
def test_permute_of_a_large_range(n, seed, draw):
    index = np.array(draw.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50, unique=True)))
    every = permuted(n, seed, 3, index)
    assert len(set(every.tolist())) == len(index) and every.min() >= 0 and every.max() < n
    assert [int(permuted(n, seed, 3, [i])[0]) for i in index] == every.tolist()  # no index sees its neighbours


def chi_square_bound(df, z=5.0):
    """The chi-square quantile at `z` standard deviations (Wilson and Hilferty): p = 3e-7 for z = 5."""
    return df * (1 - 2 / (9 * df) + z * (2 / (9 * df)) ** 0.5) ** 3


def chi_square(values, n):
    expected = len(values) / n
    return float(((np.bincount(values, minlength=n) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [2, 3, 4, 5, 16, 17, 37, 100])
@pytest.mark.parametrize("vary", ["seed", "epoch"])
def test_permute_is_uniform_over_keys(n, vary):
    """Over many keys, the first element is equally often each; of 17 or more, so is the pair of the first two."""
    epochs = np.arange(40_000 if vary == "epoch" else 1000)
    seeds = [11] if vary == "epoch" else range(40)
    first, second = (np.concatenate([data.permute(np.full_like(epochs, i), n, s, epochs) for s in seeds])
                     for i in (0, 1))
    assert chi_square(first, n) < chi_square_bound(n - 1)
    if n >= 17:
        pair = first * (n - 1) + second - (second > first)
        assert chi_square(pair, n * (n - 1)) < chi_square_bound(n * (n - 1) - 1)


# -------------------------------------------------------------------------------------------------- blocks


@st.composite
def corpora(draw):
    """(tokens, length, seed): at least one block, any remainder."""
    length = draw(st.integers(1, 8))
    n_tokens = 1 + length * draw(st.integers(1, 40)) + draw(st.integers(0, length - 1))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    return rng.integers(0, 60_000, n_tokens).astype(dtype), length, draw(st.integers(0, 2**40))


def in_files(tokens, seed=0, most=6):
    """The tokens as a Stream over files of random sizes."""
    random = np.random.default_rng(seed)
    cuts = np.sort(random.choice(np.arange(1, len(tokens)), min(len(tokens) - 1, int(random.integers(0, most))), replace=False))
    return tokenfiles.Stream(np.split(tokens, cuts))


@quick
@given(corpora(), st.data())
def test_each_epoch_visits_each_block_once(made, draw):
    tokens, length, seed = made
    available = (len(tokens) - 1) // length
    unique = draw.draw(st.just(0) | st.integers(length, available * length))
    blocks = data.Sequences(tokens, length, seed, unique)
    assert blocks.n == (unique // length or available)
    epochs = blocks.ids(np.arange(4 * blocks.n)).reshape(4, blocks.n)
    assert all(sorted(set(epoch)) == sorted(epochs[0]) for epoch in epochs.tolist())
    assert len(set(epochs[0].tolist())) == blocks.n and epochs.min() >= 0 and epochs.max() < available


@quick
@given(corpora(), st.data())
def test_blocks_are_stateless(made, draw):
    """Any batch split, any order, any files and a fresh object give the same rows."""
    tokens, length, seed = made
    blocks = data.Sequences(tokens, length, seed)
    sample = np.arange(3 * blocks.n)
    every = blocks.rows(sample)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(sample)), max_size=4)))
    assert np.array_equal(np.concatenate([blocks.rows(part) for part in np.split(sample, cuts)]), every)
    some = np.array(draw.draw(st.lists(st.integers(0, len(sample) - 1), min_size=1)))
    assert np.array_equal(data.Sequences(in_files(tokens, seed), length, seed).rows(some), every[some])


@quick
@given(corpora())
def test_rows_are_slices_with_the_token_before(made):
    tokens, length, seed = made
    blocks = data.Sequences(in_files(tokens, seed), length, seed)
    sample = np.arange(2 * blocks.n)
    rows = blocks.rows(sample)
    assert rows.dtype == np.int32 and rows.shape == (len(sample), length + 1)
    for row, b in zip(rows, blocks.ids(sample)):
        assert row.tolist() == tokens[b * length : (b + 1) * length + 1].tolist()
    every = blocks.read(np.arange(blocks.available))
    assert every[0, 0] == tokens[0]
    assert every[:, 1:].ravel().tolist() == tokens[1 : 1 + blocks.available * length].tolist()


def test_order_differs_by_epoch_and_seed():
    tokens = np.arange(1001, dtype=np.uint16)
    orders = [data.Sequences(tokens, 5, seed).ids(np.arange(600)).reshape(3, 200).tolist() for seed in (0, 1)]
    assert len({tuple(epoch) for order in orders for epoch in order}) == 6
    for epoch in orders[0]:  # not merely shifted: neighbours in the file are rarely neighbours in the stream
        assert np.mean(np.abs(np.diff(epoch)) == 1) < 0.1


@quick
@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(1, 50))
def test_unique_tokens_nest(seed, a, b):
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    few, many = (data.Sequences(tokens, 4, seed, 4 * n) for n in sorted((a, b)))
    chosen = [set(blocks.ids(np.arange(blocks.n)).tolist()) for blocks in (few, many)]
    assert chosen[0] <= chosen[1] and [len(c) for c in chosen] == sorted((a, b))


def test_unique_subset_is_random():
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    subsets = [frozenset(data.Sequences(tokens, 4, seed, 40).ids(np.arange(10)).tolist()) for seed in range(200)]
    assert len(set(subsets)) == 200 and set.union(*map(set, subsets)) == set(range(50))  # (4/5)**200 misses one


def test_blocks_refuse():
    tokens = np.zeros(9, np.uint16)
    assert data.Sequences(tokens, 8).n == 1
    with pytest.raises(ValueError, match="the training split has 8 tokens, fewer than one block of 9"):
        data.Sequences(tokens, 9)
    with pytest.raises(ValueError, match="fewer than one block"):
        data.Sequences(tokens[:0], 1)
    with pytest.raises(ValueError, match="the validation split has 8 tokens, fewer than one block of 9; lower --seq_len, or prepare more text or a larger share for validation"):
        data.Sequences(tokens, 9, what="validation")
    with pytest.raises(ValueError, match=r"unique_tokens=2,000 must lie between one block \(1,024\) and the training split \(1,024 tokens"):
        data.Sequences(np.zeros(2000, np.uint16), 1024, 0, 2000)
    for unique in (3, 9):
        with pytest.raises(ValueError, match=f"unique_tokens={unique} must lie between one block"):
            data.Sequences(tokens, 4, 0, unique)


# --------------------------------------------------------------------------------- epochs, ranks and resuming


LENGTH = 4
FAR = 10_000  # tokens of different sources differ by this


def source(number, n_blocks, unique=0, seed=3):
    """Blocks whose tokens are all different, from those of other sources too."""
    tokens = np.arange(n_blocks * LENGTH + 1 + number % LENGTH, dtype=np.int32) + number * FAR
    return data.Sequences(in_files(tokens, n_blocks + seed), LENGTH, seed + number, unique * LENGTH)


def training_samples(blocks, steps, first_step=0, first_sample=0, world=1, batch_size=8, micro=0, objective="ar"):
    """The first token of each row that training sees, in the order of the samples, from all ranks' batches."""
    cfg = train.Config(batch_size=batch_size, micro_batch=micro, seq_len=LENGTH, objective=objective)
    process = diffusion.Process(objective, 2**20, 2**20, LENGTH)
    seen = np.full((steps - first_step, batch_size), -1)
    parts = batch_size // (micro or batch_size // world)
    for rank in range(world):
        batches = train.training_batches(process, blocks, -1, first_sample, first_step, steps, cfg, rank, world, False)
        for step in range(steps - first_step):
            for part in range(rank, parts, world):
                rows = seen[step, part::parts]  # a row's place in the step says which noise it gets
                assert (rows == -1).all()
                rows[:] = next(batches).tokens[:, 0]
        assert next(batches, None) is None
    return seen.ravel()


def every_block(blocks):
    """The first token of each of the blocks that an epoch is to have, by reading them in their order."""
    sources = blocks.sources if isinstance(blocks, data.Mixture) else [blocks]
    return sorted(token for s in sources for token in s.read(s.chosen(np.arange(s.n)))[:, 0].tolist())


MIXED = [(7, 0), (13, 5), (1, 0)]  # blocks and unique blocks of three sources


@pytest.mark.parametrize("make", [
    *(functools.partial(source, 0, n) for n in (1, 2, 7, 8, 31)), functools.partial(source, 0, 31, 11), functools.partial(source, 0, 97, 5),
    lambda: data.Mixture([source(k, n, unique) for k, (n, unique) in enumerate(MIXED)], seed=5),
], ids=["1", "2", "7", "8", "31", "11-of-31", "5-of-97", "mixture"])
def test_three_epochs_on_any_ranks(make):
    """Each block once per epoch, in one sequence whatever the ranks and the accumulation."""
    blocks = make()
    expected = every_block(blocks)
    assert len(expected) == len(set(expected)) == blocks.n
    steps = -(-3 * blocks.n // 8)
    one = training_samples(blocks, steps)
    for epoch in one[: 3 * blocks.n].reshape(3, blocks.n).tolist():
        assert sorted(epoch) == expected
    for world, micro in ((1, 4), (1, 1), (2, 0), (2, 2), (4, 0), (4, 1)):
        assert np.array_equal(training_samples(make(), steps, world=world, micro=micro), one)


def test_epochs_across_the_ids_computed_ahead():
    """Block ids are computed for 64 steps at once."""
    blocks = source(0, 401)
    one = training_samples(blocks, 151)
    assert all(sorted(epoch) == every_block(blocks) for epoch in one[: 3 * 401].reshape(3, 401).tolist())
    assert np.array_equal(training_samples(blocks, 151, 70, 560), one[560:])


WEIGHTED = [3, 1, 1.5]


@pytest.mark.parametrize("weights", [None, WEIGHTED])
def test_resuming_anywhere_continues_the_sequence(weights):
    def make():
        return data.Mixture([source(k, n, unique) for k, (n, unique) in enumerate(MIXED)], weights, seed=5)

    one = training_samples(make(), 12)
    for step in range(12):
        assert np.array_equal(training_samples(make(), 12, step, 8 * step, world=2), one[8 * step :])
        smaller = training_samples(make(), step + 4, step, 8 * step, batch_size=2)
        assert np.array_equal(smaller, one[8 * step : 8 * step + 8])


def test_all_objectives_see_the_same_blocks():
    """What a diffusion model is to restore are the tokens that an autoregressive one predicts."""
    blocks = source(0, 31)
    cfg = train.Config(batch_size=8, seq_len=LENGTH)
    ar, masked = (next(train.training_batches(diffusion.Process(objective, 2**20, 2**20, LENGTH), blocks, -1, 40, 5, 6, cfg, 0, 1, False))
                  for objective in ("ar", "masked"))
    read = masked.tokens.flatten().tolist()
    for place, target in zip(masked.index[masked.weights[:, 0] > 0].tolist(), masked.targets[masked.weights[:, 0] > 0].tolist()):
        assert read[place] == 2**20
        read[place] = target
    assert read == ar.targets.tolist()


# ------------------------------------------------------------------------------------------------- mixtures


PERIOD = data.Mixture.PERIOD


def of_source(blocks, ids):
    """The source of each block of a Mixture, and its number there."""
    which = np.searchsorted(blocks.first, ids, side="right") - 1
    return which, ids - blocks.first[which]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=2, max_size=5), st.integers(0, 2**62), st.integers(0, 1000))
@example([1, 1, 1], 0, 0)
@example([2, 1], 0, 7)
def test_shares_are_exact_in_every_period(weights, seed, period):
    blocks = data.Mixture([source(k, 3 + k) for k in range(len(weights))], weights, seed)
    which, _ = of_source(blocks, blocks.ids(np.arange(period * PERIOD, (period + 2) * PERIOD)))
    for half in which[:PERIOD], which[PERIOD:]:
        counts = np.bincount(half, minlength=len(weights))
        assert (np.abs(counts - PERIOD * np.array(weights) / sum(weights)) < 1).all()
    assert not np.array_equal(which[:PERIOD], which[PERIOD:])


@pytest.mark.parametrize("weights", [[3, 1, 1.5], [1, 1, 1000]])
def test_each_source_keeps_its_own_order(weights):
    """So the epochs of each source are exact, and its subset is the one it has alone."""
    sources = [source(k, n, unique) for k, (n, unique) in enumerate([(301, 0), (1300, 500), (7, 0)])]
    blocks = data.Mixture(sources, weights, seed=9)
    assert blocks.n == 301 + 500 + 7 and blocks.available == 301 + 1300 + 7
    which, number = of_source(blocks, blocks.ids(np.arange(5000, 3 * PERIOD)))
    earlier = np.bincount(of_source(blocks, blocks.ids(np.arange(5000)))[0], minlength=3)
    for k, s in enumerate(sources):
        mine = number[which == k]
        assert np.array_equal(mine, s.ids(earlier[k] + np.arange(len(mine)))) and len(mine) > 10
    rows = blocks.rows(np.arange(400))
    which, number = of_source(blocks, blocks.ids(np.arange(400)))
    assert rows.dtype == np.int32 and rows.tolist() == [sources[k].read(np.array([i]))[0].tolist() for k, i in zip(which, number)]


@pytest.mark.parametrize("weights", [None, WEIGHTED])
def test_mixtures_are_stateless(weights):
    def make():
        return data.Mixture([source(k, n, unique) for k, (n, unique) in enumerate(MIXED)], weights, seed=2**61)

    sample = np.arange(PERIOD - 300, PERIOD + 300)
    every = make().rows(sample)
    some = np.random.default_rng(0).integers(0, 600, 200)
    assert np.array_equal(make().rows(sample[some]), every[some])
    used = make()
    assert np.array_equal(np.concatenate([used.rows(part) for part in np.array_split(sample, 37)[::-1]][::-1]), every)
    assert not np.array_equal(data.Mixture([source(k, n) for k, n in enumerate((7, 13, 1))], weights, seed=1).rows(sample), every)


def test_a_rare_source_takes_all_places_of_a_batch():
    blocks = data.Mixture([source(0, 97), source(1, 5)], [63, 1])
    rare = np.flatnonzero(of_source(blocks, blocks.ids(np.arange(8 * PERIOD)))[0] == 1)
    assert len(rare) == 8 * PERIOD // 64
    assert chi_square(rare % 64, 64) < chi_square_bound(63)
    assert np.bincount(rare // 64, minlength=8 * PERIOD // 64).max() > 1  # not one in each batch


@pytest.mark.parametrize("weights", [None, [2, 5]])
def test_budgets_nest_within_their_source(weights):
    def chosen(*unique):
        blocks = data.Mixture([source(k, 40, n) for k, n in enumerate(unique)], weights)
        return [set(number[which == k].tolist()) for which, number in [of_source(blocks, blocks.ids(np.arange(500)))] for k in (0, 1)]

    few, more, uneven = chosen(5, 8), chosen(15, 31), chosen(5, 31)
    assert [len(c) for c in (*few, *more)] == [5, 8, 15, 31]
    assert few[0] < more[0] and few[1] < more[1] and uneven == [few[0], more[1]]  # of no consequence to the other source


def test_mixture_refuses_a_weight_of_no_sample():
    with pytest.raises(ValueError, match=f"a weight below 1/{PERIOD} of their sum is too small"):
        data.Mixture([source(0, 3), source(1, 3)], [1e-6, 1])


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


# ------------------------------------------------------------------------------------------------ documents


def document_ids(tokens, owner, first, length, causal):
    """Of what a network reads of one block, slowly. owner: each token's document where files list them, else None."""
    if owner is None:
        owner = [tokens[:i].count(EOS) for i in range(len(tokens))]  # an eos is in the document that it ends
    places = range(first, first + length) if causal else range(first + 1, first + 1 + length)
    ids = [owner[p + 1] if causal and tokens[p] == EOS else owner[p] for p in places]
    return [sorted(set(ids)).index(i) for i in ids]


def check_documents(blocks, tokens, owner, length):
    index = np.arange(blocks.available)[::-1]
    for causal in (False, True):
        found = blocks.documents(index, blocks.read(index), EOS, causal)
        assert found.dtype == np.int32 and found.shape == (len(index), length) and (np.diff(found) >= 0).all()
        for b, row in zip(index, found.tolist()):
            assert [sorted(set(row)).index(i) for i in row] == document_ids(tokens, owner, b * length, length, causal), (b, causal)


@settings(max_examples=80, deadline=None)
@given(TOKENS.filter(lambda tokens: len(tokens) > 1), st.data())
def test_documents_that_eos_ends(tokens, draw):
    length = draw.draw(st.integers(1, len(tokens) - 1))
    check_documents(data.Sequences(in_files(np.array(tokens, np.uint16), len(tokens)), length), tokens, None, length)


@settings(max_examples=80, deadline=None)
@given(pairs(), st.data(), st.floats(0.01, 0.5))
def test_documents_that_files_list(scratch, contents, draw, share):
    folder = fresh(scratch / "listed")
    for number, documents in enumerate(contents):
        megatron(folder / f"web_{number}", documents, 4)
    megatron(folder / "val", [[[1]]], 4)
    tokens, owner = flat(sum(contents, [])), owners(sum(contents, []))
    if tokens[0] != EOS:
        tokens, owner = [EOS, *tokens], [0, *owner]
    if len(tokens) > 1:
        length = draw.draw(st.integers(1, len(tokens) - 1))
        stream = tokenfiles.load_corpus(folder, "bytes").train
        check_documents(data.Sequences(stream, length), tokens, owner, length)
        at = int(len(tokens) * (1 - share))
        if len(tokens) - at > length:  # what was cut off counts from another place
            check_documents(data.Sequences(stream.cut(at)[1], length), tokens[at:], owner[at:], length)


def test_documents_of_a_mixture_are_those_of_its_sources(tmp_path):
    """One lists its documents, the other has eos tokens."""
    megatron(tmp_path / "web", [[[1, 2, 3]], [[4, 5]], [[6, 7, 8, 9, EOS]], [[10, 11]]], 4)
    _, listed, _ = tokenfiles.open_foreign([tmp_path / "web.bin"], tokenizers.Bytes())
    sources = [data.Sequences(listed, 4), data.Sequences(np.array([EOS, 1, EOS, 2, 3, EOS, EOS, 4, 5], np.uint16), 4)]
    blocks = data.Mixture(sources)
    index = np.array([4, 0, 3, 2, 1, 0])
    for causal in (False, True):
        found = blocks.documents(index, blocks.read(index), EOS, causal)
        for row, i in zip(found, index):
            s, number = (sources[0], i) if i < sources[0].available else (sources[1], i - sources[0].available)
            number = np.array([number])
            assert row.tolist() == s.documents(number, s.read(number), EOS, causal)[0].tolist()
    assert len({len(set(row)) for row in found.tolist()}) > 1


@quick
@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_positions_within(steps):
    documents = np.cumsum(np.array(steps) // 2, axis=1, dtype=np.int32) + 5
    found = data.positions_within(documents)
    assert found.dtype == np.int32
    for row, ids in zip(found.tolist(), documents.tolist()):
        assert row == [i - ids.index(d) for i, d in enumerate(ids)]


PACKED = [[EOS, 1, 2, 3, EOS, 4, 5, 6, 7, 8, 9, EOS, 10, EOS, 11, 12, 13], [EOS] + [14] * 9 + [EOS, 15, 16, 17, EOS, EOS, 18]]


@pytest.mark.parametrize("objective", ["ar", "masked", "uniform"])
@pytest.mark.parametrize("short", [0.0, 1.0])
def test_a_packed_document_is_read_as_if_alone(objective, short):
    """With document_attention the hidden states of each document are those it has alone; positions are relative."""
    torch.manual_seed(0)
    shape = ModelConfig(2, 2, 1, 16, 32, 64, 257, 257, 16, objective == "ar", timed=objective == "uniform")
    model = Transformer(shape).init_weights().double().eval()
    angle = torch.arange(16.0).double()[:, None] * 10_000 ** (-torch.arange(0, 16, 2).double() / 16)
    torch.testing.assert_close(model.cos, angle.cos(), rtol=0, atol=1e-6)
    model.cos, model.sin = angle.cos(), angle.sin()
    for p in model.parameters():
        p.data = p.data * 5  # so that attention is not nearly uniform
    process = diffusion.Process(objective, 257, 257, 16, short_rows=short)
    blocks, rows = data.Sequences(np.array(sum(PACKED, []), np.uint16), 16), diffusion.noise_levels(process, 0, 2)

    def batch(**flags):
        cfg = train.Config(objective=objective, seq_len=16, **flags)
        return train.engine.to_tensors(data.read_batch(cfg, process, blocks, EOS, np.array([0, 1]), rows, np.arange(2)), False)

    plain, packed, reset = batch(), batch(document_attention=True), batch(document_attention=True, reset_positions=True)
    time = None if packed.time is None else packed.time.double()
    assert torch.equal(packed.tokens, reset.tokens) and torch.equal(packed.documents, reset.documents) and packed.positions is None
    with torch.no_grad(), mock.patch.object(torch.Tensor, "float", lambda x: x):  # float64 throughout
        hidden = model(packed.tokens, time, packed.documents)
        torch.testing.assert_close(model(reset.tokens, time, reset.documents, None, reset.positions), hidden, rtol=0, atol=1e-10)
        assert (model(plain.tokens, time, plain.documents) - hidden).abs().max() > 1e-2
        n_documents = 0
        for row in range(2):
            ids = packed.documents[row]
            for d in ids.unique():
                inside = ids == d
                alone = model(packed.tokens[row, inside][None], None if time is None else time[row, None])
                torch.testing.assert_close(hidden[row, inside], alone[0], rtol=0, atol=1e-10)
                if d >= 0:  # a short row's end is a document of its own
                    assert reset.positions[row, inside].tolist() == list(range(int(inside.sum())))
                n_documents += 1
        assert n_documents >= (7 if short == 0 else 4) and (reset.positions != torch.arange(16)).any()


# -------------------------------------------------------------------------------------------- train.py, end to end


def last_loss(run):
    return [m["val_loss"] for m in read_metrics(run) if "val_loss" in m][-1]


def byte_documents(n, first=0):
    return [list(text.encode()) for text in stories(n, first)]


@needs_gpt2
def test_training_on_a_nanogpt_folder(run_main, gpt2, tmp_path):  # noqa: F811
    (tmp_path / "owt").mkdir()
    for name, part in (("train", stories(60)), ("val", stories(30, 60))):
        raw16(tmp_path / "owt" / f"{name}.bin", [token for text in part for token in [*gpt2.encode(text).tolist(), gpt2.eos_id]])
    run = run_main(f"--corpus={tmp_path / 'owt'}", "--tokenizer=gpt2", "--steps=3", "--seq_len=16", "--eval_rows=8")
    assert 5 < last_loss(run) < 14
    record = json.loads((run / "step_00000003" / "checkpoint.json").read_text())
    assert record["corpus"]["tokenizer"] == "gpt2" and record["model"]["n_vocab"] == 50257


def test_training_on_a_megatron_prefix(run_main, tmp_path):  # noqa: F811
    megatron(tmp_path / "web_text_document", [[d + [EOS]] for d in byte_documents(80)], 4)
    files = (f"--corpus={tmp_path / 'web_text_document'}", "--tokenizer=bytes", "--val_share=0.2", "--eval_rows=8")
    flags = (*files, "--steps=3", "--lr=0.01")
    results = [last_loss(run_main(*flags, *more, run=f"run{i}")) for i, more in enumerate(
        ([], ["--document_attention"], ["--document_attention", "--reset_positions"]))]
    assert results[1] == pytest.approx(results[2], abs=1e-4) and abs(results[0] - results[1]) > 1e-3
    run_main(*files, "--steps=5", "--resume=yes", run="run0")
    megatron(tmp_path / "web_text_document", [[d + [EOS]] for d in byte_documents(80)[::-1]], 4)
    with pytest.raises(SystemExit):  # other tokens
        run_main(*files, "--steps=7", "--resume=yes", run="run0")


def test_training_on_a_mixture_with_budgets(run_main, small, sharded, capsys):  # noqa: F811
    mixed = f"--corpus={sharded}:3:640,{small}:1:160"
    run = run_main(mixed, "--epochs=1", "--document_attention", "--reset_positions")
    assert "4 steps of 256 tokens: 1,024 tokens, 1.28 epochs of 800" in capsys.readouterr().out  # 25 blocks in batches of 8
    record = json.loads((run / "step_00000004" / "checkpoint.json").read_text())
    expected = " ".join(json.loads((folder / "meta.json").read_text())["train"]["sha256"] for folder in (sharded, small))
    assert record["corpus"]["train_sha256"] == expected
    run_main(f"--corpus={sharded}:1:640,{small}:1:160", "--steps=5", "--resume=yes")
    assert "resumed with another mixture: the data order changes here" in capsys.readouterr().err


def test_training_with_a_tokenizer_file(run_main, bpe, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Sampling needs the run's folder only: the corpus and the tokenizer's file may be gone."""
    import sample

    mine = tmp_path / "mine" / "tokenizer.json"
    mine.parent.mkdir()
    shutil.copy(bpe, mine)
    prepared(tmp_path / "corpus", write_jsonl(tmp_path / "x.jsonl", stories(80)), tokenizer=str(mine), val=0.3)
    run = run_main(f"--corpus={tmp_path / 'corpus'}", "--steps=3", "--eval_rows=8")
    raw16(tmp_path / "tokens.bin", tokenfiles.load_corpus(tmp_path / "corpus").train.read(0, 3000).tolist())
    flags = (f"--corpus={tmp_path / 'tokens.bin'}", f"--tokenizer={mine}", "--val_share=0.3")
    other = run_main(*flags, "--steps=3", "--eval_rows=8", run="other")
    shutil.rmtree(tmp_path / "corpus")
    shutil.rmtree(mine.parent)
    for folder in (run, other):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={folder}", "--device=cpu", "--prompt=Document 7", "--length=9"])
        sample.main()
        assert capsys.readouterr().out.startswith("Document 7")


def refused(call, capsys):
    """The one line with which it stops."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1, err
    return err


def test_training_refuses(run_main, small, sharded, bpe, tmp_path, capsys):  # noqa: F811
    prepared(tmp_path / "bpe", write_jsonl(tmp_path / "x.jsonl", stories(80)), tokenizer=str(bpe), val=0.3)
    raw16(tmp_path / "tokens.bin", [1, 2, 3, EOS] * 99)

    def problem(*flags):
        text = refused(lambda: run_main("--steps=3", *flags), capsys)
        assert not (tmp_path / "run").exists()
        return text

    text = problem(f"--corpus={small},{tmp_path / 'bpe'}")
    assert re.search("small and .*bpe don't go together: tokenizer bytes and tokenizer.json", text)
    assert "unique_tokens is for a single corpus" in problem(f"--corpus={small},{sharded}", "--unique_tokens=320")
    assert "unique_tokens is for a single corpus" in problem(f"--corpus={small}:1:320", "--unique_tokens=320")
    assert "corpus=b:x: write path, path:weight" in problem(f"--corpus={small}:1,b:x")
    assert "was prepared with tokenizer 'bytes', not 'tokenizer.json" in problem(f"--corpus={small}", f"--tokenizer={bpe}")
    assert "add --tokenizer=gpt2" in problem(f"--corpus={tmp_path / 'tokens.bin'}")
    assert "--val_share=0.01" in problem(f"--corpus={tmp_path / 'tokens.bin'}", "--tokenizer=bytes")
    assert f"unique_tokens=999,999 must lie between one block (32) and the training ({small}) split" in problem(f"--corpus={small}:1:999999,{sharded}:1")
    assert re.search(r"the training split has [\d,]+ tokens, fewer than one block of 4,096; lower --seq_len, or prepare more text$", problem(f"--corpus={small}", "--seq_len=4096"))
    assert re.search(rf"the training \({small}\) split has [\d,]+ tokens", problem(f"--corpus={sharded},{small}", "--seq_len=1024"))
    assert "no corpus in 'absent'" in problem(f"--corpus={small},absent")


def test_training_meets_a_wrong_token(run_main, tmp_path, capsys):  # noqa: F811
    """Large corpora are not read before training."""
    (tmp_path / "nano").mkdir()
    documents = [token for d in byte_documents(40) for token in [*d, EOS]]
    raw16(tmp_path / "nano" / "train.bin", documents + [60_000] + documents)
    raw16(tmp_path / "nano" / "val.bin", documents)
    flags = (f"--corpus={tmp_path / 'nano'}", "--tokenizer=bytes", "--epochs=1")
    err = refused(lambda: run_main(*flags), capsys)
    assert re.fullmatch(r"train.py: step \d+: the training split holds token 60000, beyond its vocabulary of 257; .*\n", err)
    raw16(tmp_path / "nano" / "val.bin", documents[:40] + [60_000] + documents)
    err = refused(lambda: run_main(*flags, "--eval_rows=0", run="other"), capsys)
    assert re.fullmatch(r"train.py: the validation split holds token 60000, beyond its vocabulary of 257; .*\n", err)


# ------------------------------------------------------------------------------------------------- inspect


def inspected(out):
    """{split: (tokens, files, documents, longest, sum of the histogram)} of what inspect prints."""
    found = {}
    for split, rest in re.findall(r"^(train|val): (.*(?:\n  .*)*)", out, re.M):
        line = r"(#) tokens in (#) files?, (#) documents, # tokens each on average, (#) at most".replace("#", r"[\d,]+")
        counts = re.match(line, rest).groups()
        tokens, files, documents, longest = (int(n.replace(",", "")) for n in counts)
        bars = re.findall(r"^  ≤ +[\d,]+ tokens +([\d,]+)  (█*)$", rest, re.M)
        assert all((bar == "") == (n == "0") for n, bar in bars) and rest.count("sample from token") == 1
        found[split] = (tokens, files, documents, longest, sum(int(n.replace(",", "")) for n, _ in bars))
    return found


def expected_of(streams, n_files):
    return {split: (len(stream), files, len(lengths_of(stream)), max(lengths_of(stream)), len(lengths_of(stream)))
            for (split, stream), files in zip(streams.items(), n_files)}


def run_inspect(*argv):
    done = subprocess.run([sys.executable, "data.py", "inspect", *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_inspect_prepared(small, sharded):
    for folder in (small, sharded):
        out, read = run_inspect(folder), tokenfiles.load_corpus(folder)
        meta = read.meta
        streams_ = dict(train=read.train, val=read.val)
        assert inspected(out) == expected_of(streams_, [len(meta[split]["files"]) for split in streams_])
        assert [inspected(out)[split][2] for split in streams_] == [meta[split]["documents"] for split in streams_]
        assert f"{folder}: prepared by prepare.py from x.jsonl\ntokenizer bytes: 257 tokens, mask 257, eos 256, uint16\n" in out
        assert f"{meta['train']['bytes']:,} bytes" in out and out.endswith("\nall SHA-256 sums agree\n")
        for split, start, text in re.findall(r"(train|val): .*(?:\n  ≤.*)*\n  sample from token ([\d,]+): '(.*)'$", out, re.M):
            start = int(start.replace(",", ""))
            assert tokenizers.Bytes().decode(whole(streams_[split])[start : start + 64]) == text.replace("\\n", "\n")


@pytest.mark.parametrize("layout", ["Megatron", "nanoGPT", "cut"])
def test_inspect_foreign(tmp_path, layout):
    """The eos that the reader puts in front is in no file: it counts as no token, and as no file."""
    documents = byte_documents(40)
    flags = ["--tokenizer=bytes"]
    for name, part in (("train", documents[:30]), ("val", documents[30:])):
        if layout == "Megatron":
            for number, piece in enumerate((part[:4], part[4:])):
                megatron(tmp_path / f"web_{name}_{number}", [[d[:9], d[9:]] for d in piece], 5)
        elif layout == "nanoGPT":
            raw16(tmp_path / f"{name}.bin", [token for d in part for token in [*d, EOS]])
    if layout == "cut":
        megatron(tmp_path / "web", [[d] for d in documents])
        flags.append("--val_share=0.25")
    out = run_inspect(tmp_path, *flags)
    read = tokenfiles.load_corpus(tmp_path, "bytes", 0.25 if layout == "cut" else 0)
    found, n_files = inspected(out), 2 if layout == "Megatron" else 1
    assert f"{tmp_path}: {read.meta['format']} token files\ntokenizer bytes: 257 tokens" in out
    assert found["train"][2] + found["val"][2] == 40 and [f[4] for f in found.values()] == [f[2] for f in found.values()]
    assert [f[3] for f in found.values()] == [max(lengths_of(read.train)), max(lengths_of(read.val))]
    assert sum(f[0] for f in found.values()) == sum(map(len, documents)) + 40 * (layout == "nanoGPT")
    assert [f[1] for f in found.values()] == [n_files, n_files]
    assert "no checksums in this layout" in out


def test_inspect_with_a_tokenizer_file(bpe, tmp_path):
    """It is in the corpus's folder."""
    prepared(tmp_path / "bpe", write_jsonl(tmp_path / "x.jsonl", stories(80)), tokenizer=str(bpe), val=0.3)
    lines = []
    inspect.inspect(tmp_path / "bpe", seed=0, show=lines.append)
    tokens = file_tokenizer(bpe)
    assert lines[1] == f"tokenizer {tokens.name}: {tokens.n_vocab:,} tokens, mask {tokens.mask_id}, eos {tokens.eos_id}, uint16"
    assert "Document" in "".join(lines)
    (tmp_path / "bpe" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json of digest"):
        inspect.inspect(tmp_path / "bpe")


def test_inspect_into_a_pipe_that_is_closed(small):
    """As of `| head`: it ends and says nothing."""
    process = subprocess.Popen([sys.executable, "data.py", "inspect", small], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b"" and process.wait() == 141  # as a shell says it of those that SIGPIPE ends


@pytest.mark.parametrize("size", [1, 7, 64])
def test_inspect_in_small_pieces(sharded, size):
    """Nothing depends on how much is read at once."""
    texts = []
    for pieces in (contextlib.nullcontext(), small_chunks(size)):
        with pieces, io.StringIO() as out:
            inspect.inspect(sharded, seed=5, show=functools.partial(print, file=out))
            texts.append(out.getvalue())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("which", ["train.bin", "val.bin"])
def test_inspect_finds_a_flipped_byte(small, tmp_path, command, monkeypatch, which):
    """In files too large to be hashed at every start, too."""
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    assert command("inspect", folder)[0] == 0
    edit_bytes(which, flip(6))(folder)
    for checked in (tokenfiles.CHECKED, 1):
        monkeypatch.setattr(data, "CHECKED", checked)
        code, out, err = command("inspect", folder)
        assert code == 2 and err == f"data.py: {folder / which}: its SHA-256 is not the one in meta.json; prepare the corpus again\n"
        assert ("val: " in out) == (checked == 1)
    edit_bytes(which, lambda raw: raw[:20] + b"\xff\xff" + raw[22:])(folder)
    code, _, err = command("inspect", folder)
    assert code == 2 and re.fullmatch(rf"data.py: {folder}: the {which[:-4]} split holds token 65535, beyond the vocabulary of 257\n", err)


@pytest.mark.parametrize("token", [-300, 300])
def test_inspect_names_the_token_beyond_the_vocabulary(tmp_path, command, token):
    megatron(tmp_path / "web_train", [[[1, 2, token, EOS]], *[[[3, 4, EOS]]] * 99], 4)
    megatron(tmp_path / "web_val", [[[1, EOS]]], 4)
    code, _, err = command("inspect", tmp_path, "--tokenizer=bytes")
    assert (code, err) == (2, f"data.py: {tmp_path}: the train split holds token {token}, beyond the vocabulary of 257\n")


@pytest.mark.parametrize("argv, message", [
    ([], "inspect what? python data.py inspect FOLDER"), (["a", "b"], "inspect what?"), (["absent"], "no corpus in 'absent'"),
    (["."], "add --tokenizer=gpt2"), ([".", "--tokenizer=gtp2"], "unknown tokenizer 'gtp2'"),
    ([".", "--tokenizer=bytes"], "no validation tokens"),
])
def test_inspect_refuses(tmp_path, command, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    raw16(tmp_path / "tokens.bin", ABC)
    code, out, err = command("inspect", *argv)
    assert code == 2 and not out and message in err and err.count("\n") == 1
