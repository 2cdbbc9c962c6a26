"""Others' token files that are damaged, of unknown versions, or do not go together."""

import struct
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from corpus_examples import (
    ABC,
    EOS,
    all_tokens,
    one_line,
    write_nanogpt,
    write_pair,
    write_shard,
    write_shard_uint32,
)

from corpus import tokenizers
from corpus.tokenfiles import load_corpus


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_corpus(folder, "bytes", 0.3)
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("write, options, message", [
    (write_shard, dict(count=7), r"1036 bytes, but its header says 7 tokens of uint16 \(1038 bytes\)"),
    (write_shard, dict(count=5), "1036 bytes, but its header says 5 tokens"),
    (write_shard, dict(count=-6), "1036 bytes, but its header says -6 tokens"),
    (write_shard, dict(tokens=[], count=0), "1024 bytes, but its header says 0 tokens"),
    (write_shard, dict(version=2), "a shard of version 2; version 1 is known"),
    (write_shard_uint32, dict(version=1), "a shard of version 1; version 7 is known"),
    (write_shard_uint32, dict(kind="H"), "1036 bytes, but its header says 6 tokens of uint32"),
])
def test_shards_refused(tmp_path, write, options, message):
    write(tmp_path / "a.bin", **(dict(tokens=ABC) | options))
    refused(tmp_path, f"a.bin: {message}")


@pytest.mark.parametrize("raw, message", [
    (b"", r"0 bytes are no uint16 tokens \(empty"),
    (b"abc", r"3 bytes are no uint16 tokens \(empty or truncated"),
])
def test_raw_files_refused(tmp_path, raw, message):
    (tmp_path / "a.bin").write_bytes(raw)
    refused(tmp_path, f"a.bin: {message}")


def write_int32_pair(prefix, tokens):
    write_pair(prefix, [[tokens]], 4)


def write_uint16_pair(prefix, tokens):
    write_pair(prefix, [[tokens]], 8)


@pytest.mark.parametrize("first, second, kind", [
    (write_nanogpt, write_shard, "nanoGPT"),
    (write_shard, write_shard_uint32, "llm.c"),
    (write_nanogpt, write_uint16_pair, "Megatron"),
    (write_uint16_pair, write_int32_pair, "int32"),
])
def test_files_of_several_kinds_refused(tmp_path, first, second, kind):
    for name, write in (("a", first), ("b", second)):
        is_pair = write in (write_uint16_pair, write_int32_pair)
        write(tmp_path / (name if is_pair else f"{name}.bin"), ABC)
    refused(tmp_path, f"files of different layouts or types .*{kind}.*keep one kind")


@pytest.mark.parametrize("code, dtype", [(1, "uint8"), (2, "int8")])
def test_types_too_small_for_the_vocabulary_refused(tmp_path, code, dtype):
    write_pair(tmp_path / "a", [[[1, 2]]], code)
    refused(tmp_path, f"a.bin: tokens of {dtype}, which can't hold tokenizer 'bytes' of 257 tokens")


def test_a_full_type_holds_its_vocabulary(tmp_path):
    """65,536 tokens are what uint16 holds; the mask, which is one more, is in no file."""
    tokenizer = SimpleNamespace(name="full", n_vocab=65536, eos_id=0, mask_id=65536, prefix_bytes=0,
                                token_bytes=lambda: np.ones(65536, np.uint16))
    write_nanogpt(tmp_path / "tokens.bin", [1, 65535, 0, 3, 0])
    with mock.patch.object(tokenizers, "load_tokenizer", lambda *_, **__: tokenizer):
        assert all_tokens(load_corpus(tmp_path, "full", 0.3).train) == [0, 1, 65535, 0]
        tokenizer.n_vocab = tokenizer.mask_id = 65537
        refused(tmp_path, "tokens of uint16, which can't hold tokenizer 'full' of 65537 tokens")


UNRELATED = "its sequences do not follow each other in web.bin"
UNCOVERED = "its documents do not cover its sequences"


@pytest.mark.parametrize("offset, kind, value, message", [  # of one field of the index
    (0, "<B", 65, "web.idx: no index of a Megatron dataset"),
    (9, "<Q", 2, "web.idx: version 2, type 8; "),
    (17, "<B", 6, "web.idx: version 1, type 6; version 1 and integer types"),
    (17, "<B", 7, "web.idx: version 1, type 7; "),
    (17, "<B", 0, "web.idx: version 1, type 0; "),
    (17, "<B", 4, f"web.idx: {UNRELATED}"),
    (18, "<Q", 2, "web.idx: "),  # sequences
    (18, "<Q", 4, "web.idx: "),
    (18, "<Q", 0, "web.(idx|bin): "),
    (18, "<Q", 2**63, r"web.idx: \d+ bytes, cut short of \d+"),
    (26, "<Q", 5, r"web.idx: \d+ bytes, cut short of \d+"),  # documents
    (26, "<Q", 3, f"web.idx: {UNCOVERED}"),
    (26, "<Q", 0, f"web.idx: {UNCOVERED}"),
    (34, "<i", 2, f"web.idx: {UNRELATED}"),  # the lengths
    (34, "<i", -3, f"web.idx: {UNRELATED}"),
    (42, "<i", 5, "web.bin: 18 bytes, but web.idx says 10 tokens"),
    (42, "<i", 3, "web.bin: 18 bytes, but web.idx says 8 tokens"),
    (42, "<i", -4, f"web.idx: {UNRELATED}"),
    (54, "<q", 8, f"web.idx: {UNRELATED}"),  # the offsets
    (46, "<q", 2, f"web.idx: {UNRELATED}"),
    (70, "<q", 1, f"web.idx: {UNCOVERED}"),  # the documents' first sequences
    (94, "<q", 2, f"web.idx: {UNCOVERED}"),
    (94, "<q", 4, f"web.idx: {UNCOVERED}"),
    (78, "<q", 4, f"web.idx: {UNCOVERED}"),
    (78, "<q", -1, f"web.idx: {UNCOVERED}"),
])
def test_pairs_refused(tmp_path, offset, kind, value, message):
    write_pair(tmp_path / "web", [[[1, 2, EOS]], [[3, EOS]], [[4, 5, 6, EOS]]])
    raw = bytearray((tmp_path / "web.idx").read_bytes())
    struct.pack_into(kind, raw, offset, value)
    (tmp_path / "web.idx").write_bytes(raw)
    refused(tmp_path, message)


@pytest.mark.parametrize("write", [write_shard, write_shard_uint32])
def test_a_shard_cut_anywhere(tmp_path, write):
    path = tmp_path / "tokens.bin"
    write(path, ABC)
    raw = path.read_bytes()
    for size in range(4, len(raw)):  # of less than its first number nothing shows what it was
        path.write_bytes(raw[:size])
        refused(tmp_path, f"{path}: {size} bytes")


@pytest.mark.parametrize("documents", [
    [[[1, 2, EOS]], [[3, EOS]]],
    [[[1], [2, EOS]], [[]], [[3, 4], [], [5]]],
], ids=["single", "several"])
@pytest.mark.parametrize("name", ["web.idx", "web.bin"])
def test_a_pair_cut_anywhere(tmp_path, documents, name):
    write_pair(tmp_path / "web", documents)
    load_corpus(tmp_path, "bytes", 0.3)
    raw = (tmp_path / name).read_bytes()
    for size in range(len(raw)):
        (tmp_path / name).write_bytes(raw[:size])
        refused(tmp_path, name)


@pytest.mark.parametrize("tokenizer, problem", [
    ("", "token files do not say which tokenizer made them; add --tokenizer=gpt2"),
    ("bytes", "no validation tokens; add a file .*--val_share"),
])
def test_no_tokenizer_or_no_validation(tmp_path, tokenizer, problem):
    write_nanogpt(tmp_path / "train.bin", ABC)
    with pytest.raises(ValueError, match=problem) as caught:
        load_corpus(tmp_path, tokenizer)
    assert str(tmp_path) in one_line(caught)


def test_only_files_for_validation(tmp_path):
    for name in ("val_0", "val_1"):
        write_nanogpt(tmp_path / f"{name}.bin", ABC)
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        load_corpus(tmp_path, "bytes")
