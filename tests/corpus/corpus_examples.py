"""Example corpora: texts, tokens, and token files of every layout, written from their published formats."""

import functools
import json
import os
import shutil
import struct
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from corpus.stream import Stream, document_lengths
from corpus.tokenizers import ByteTokenizer

EOS = ByteTokenizer.eos_id
quick = settings(max_examples=50, deadline=None)
needs_gpt2 = pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ,
                                reason="no tiktoken files beside the repository")


# ------------------------------------------------------------------------------------------------- texts


def stories(n, first=0):
    numbers = range(first, first + n)
    return [f"Document {i} is about {i * i}.\nIt ends — hier: {'é' * (i % 5)}🙂" for i in numbers]


def byte_documents(n, first=0):
    """The bytes of stories, as lists of tokens."""
    return [list(text.encode()) for text in stories(n, first)]


def write_jsonl(path, texts, ascii_only=True):
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------ tokens

ABC = [1, 2, EOS, 3, 4, EOS]
TOKENS = st.lists(st.sampled_from([0, 1, 2, 255, EOS]), min_size=1, max_size=40)


def split_at(tokens, cuts):
    return [part.tolist() for part in np.split(np.array(tokens), cuts)]


def with_leading_eos(tokens):
    """As a Stream has them: an eos goes before what does not begin with one."""
    return tokens if tokens[0] == EOS else [EOS, *tokens]


def split_documents(tokens):
    """The documents of tokens, each with the eos that ends it, if any. An eos in front is of none of them."""
    documents = [[]]
    for token in tokens[1:] if tokens[0] == EOS else tokens:
        documents[-1].append(token)
        if token == EOS:
            documents.append([])
    return documents[:-1] if not documents[-1] else documents


def expected_lengths(tokens):
    """The lengths of the documents of tokens, without their eos."""
    return [len(document) - (document[-1] == EOS) for document in split_documents(tokens)]


# A .bin/.idx pair of Megatron's holds documents, a document one or several sequences of tokens.

SEQUENCES = st.lists(st.lists(st.integers(0, 99), max_size=5), min_size=1, max_size=3)


@st.composite
def pairs(draw):
    """The documents of several pairs. Some end with an eos, some are empty."""
    one_sequence = draw(st.booleans())
    ending = draw(st.sampled_from(["eos", "none", "some"]))
    contents = []
    for _ in range(draw(st.integers(1, 3))):
        documents = draw(st.lists(SEQUENCES, min_size=1, max_size=6))
        if one_sequence:
            documents = [[sum(document, [])] for document in documents]
        for document in documents:
            if ending == "eos" or ending == "some" and draw(st.booleans()):
                document[-1].append(EOS)
        if not flatten(documents):
            documents[0][0].append(7)  # a pair without a token is refused
        contents.append(documents)
    return contents


def flatten(documents):
    return [token for document in documents for sequence in document for token in sequence]


def document_numbers(documents):
    """The number of the document that each token is in, from 1 on."""
    return [number for number, document in enumerate(documents, 1) for _ in flatten([document])]


def length_without_eos(document):
    tokens = flatten([document])
    return len(tokens) - (tokens[-1:] == [EOS])


# ------------------------------------------------------------------------------------ others' token files


def write_nanogpt(path, tokens):
    """Raw uint16."""
    path.write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))


def write_shard(path, tokens, magic=20240520, version=1, kind="H", count=None):
    """llm.c and modded-nanogpt: 256 int32 of header, then the tokens."""
    header = struct.pack("<256i", magic, version, len(tokens) if count is None else count, *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(tokens)}{kind}", *tokens))


def write_shard_uint32(path, tokens, **changes):
    """llm.c's shards for large vocabularies."""
    write_shard(path, tokens, **(dict(magic=20240801, version=7, kind="I") | changes))


TYPE_CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}  # Megatron's, and what struct calls them


def write_pair(prefix, documents, code=8):
    """Megatron's MMapIndexedDataset."""
    kind = TYPE_CODES[code]
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    offsets = [struct.calcsize(kind) * sum(lengths[:i]) for i in range(len(lengths))]
    firsts = [0]
    for document in documents:
        firsts.append(firsts[-1] + len(document))
    tokens = flatten(documents)
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(tokens)}{kind}", *tokens))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(firsts))
    lists = struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(firsts)}q", *lengths, *offsets, *firsts)
    Path(f"{prefix}.idx").write_bytes(header + lists)


# ----------------------------------------------------------------------------------------- to look at them


def all_tokens(stream):
    return stream.read(0, len(stream)).tolist()


def lengths_of(stream, eos=EOS):
    """The lengths of a stream's documents."""
    return [n for lengths in document_lengths(stream, eos) for n in lengths.tolist()]


def small_chunks(size):
    """Let streams hand out their tokens in chunks of this size."""
    return mock.patch.object(Stream, "chunks", functools.partialmethod(Stream.chunks, size))


def one_line(caught):
    """The message of a caught exception, which must be one line."""
    assert "\n" not in str(caught.value)
    return str(caught.value)


def empty(folder):
    """The folder, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


# ------------------------------------------------------------------ what damages a folder: functions of it


def change_meta(change):
    def damage(folder):
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    return damage


def change_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def flip_bit(at):
    return lambda raw: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
