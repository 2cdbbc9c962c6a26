"""What `data.py inspect` prints, and what it finds."""

import contextlib
import functools
import io
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
from conftest import ROOT, prepared
from corpus_examples import (
    ABC,
    EOS,
    all_tokens,
    byte_documents,
    change_bytes,
    flip_bit,
    lengths_of,
    small_chunks,
    stories,
    write_jsonl,
    write_nanogpt,
    write_pair,
)

from corpus import inspect, tokenfiles, tokenizers


class Printed(NamedTuple):
    """What inspect prints of a split."""

    n_tokens: int
    n_files: int
    n_documents: int
    longest: int
    in_histogram: int  # documents in all bars together


def number(text):
    return int(text.replace(",", ""))


def read_print(out):
    """{split: Printed} of the text that inspect prints."""
    line = (r"(#) tokens in (#) files?, (#) documents, # tokens each on average, (#) at most"
            .replace("#", r"[\d,]+"))
    splits = {}
    for split, text in re.findall(r"^(train|val): (.*(?:\n  .*)*)", out, re.M):
        counts = map(number, re.match(line, text).groups())
        bars = re.findall(r"^  ≤ +[\d,]+ tokens +([\d,]+)  (█*)$", text, re.M)
        assert all((bar == "") == (n == "0") for n, bar in bars) and text.count("sample from token") == 1
        splits[split] = Printed(*counts, sum(number(n) for n, _ in bars))
    return splits


def expected_print(stream, n_files):
    lengths = lengths_of(stream)
    n_tokens = len(stream) - stream.n_prepended
    return Printed(n_tokens, n_files, len(lengths), max(lengths), len(lengths))


def inspect_print(run_data, *argv):
    """The text that `data.py inspect` prints."""
    code, out, err = run_data("inspect", *argv)
    assert code == 0 and not err, err
    return out


@pytest.mark.parametrize("layout", ["small", "sharded"])
def test_inspect_prepared(run_data, small_corpus, sharded_corpus, layout):
    folder = small_corpus if layout == "small" else sharded_corpus
    out, corpus = inspect_print(run_data, folder), tokenfiles.load_corpus(folder)
    opening = (f"{folder}: prepared by data.py from x.jsonl\n"
               "tokenizer bytes: 257 tokens, mask 257, eos 256, uint16\n")
    assert out.startswith(opening)
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        meta = corpus.meta[split]
        assert read_print(out)[split] == expected_print(stream, len(meta["files"]))
        assert read_print(out)[split].n_documents == meta["documents"]
        assert f"{meta['bytes']:,} bytes\n" in out
    assert out.endswith("\nall SHA-256 sums agree\n")

    samples = r"(train|val): .*(?:\n  ≤.*)*\n  sample from token ([\d,]+): '(.*)'$"
    for split, start, text in re.findall(samples, out, re.M):
        ids = all_tokens(getattr(corpus, split))[number(start) : number(start) + 64]
        assert tokenizers.ByteTokenizer().decode(ids) == text.replace("\\n", "\n")


@pytest.mark.parametrize("layout", ["Megatron", "nanoGPT", "val_share"])
def test_inspect_foreign(run_data, tmp_path, layout):
    """The eos that the reader puts in front is in no file: it counts as no token, and as no file."""
    documents, val_share, n_files = byte_documents(40), 0, 1
    if layout == "val_share":
        val_share = 0.25
        write_pair(tmp_path / "web", [[document] for document in documents])
    for split, part in (("train", documents[:30]), ("val", documents[30:])):
        if layout == "Megatron":
            n_files = 2
            for i, piece in enumerate((part[:4], part[4:])):
                write_pair(tmp_path / f"web_{split}_{i}", [[d[:9], d[9:]] for d in piece], 5)
        elif layout == "nanoGPT":
            write_nanogpt(tmp_path / f"{split}.bin", sum([[*document, EOS] for document in part], []))

    out = inspect_print(run_data, tmp_path, "--tokenizer=bytes", f"--val_share={val_share}")
    corpus = tokenfiles.load_corpus(tmp_path, "bytes", val_share)
    train, val = read_print(out).values()
    assert f"{tmp_path}: {corpus.meta['format']} token files\ntokenizer bytes: 257 tokens" in out
    assert train.n_documents + val.n_documents == 40
    assert train.n_tokens + val.n_tokens == sum(map(len, documents)) + 40 * (layout == "nanoGPT")
    for stream, found in ((corpus.train, train), (corpus.val, val)):
        assert found.in_histogram == found.n_documents
        assert found.longest == max(lengths_of(stream)) and found.n_files == n_files
    assert "no checksums in this layout" in out


def test_inspect_with_a_tokenizer_file(bpe_file, tmp_path):
    """It is in the corpus's folder."""
    source = write_jsonl(tmp_path / "x.jsonl", stories(80))
    prepared(tmp_path / "bpe", source, tokenizer=str(bpe_file), val=0.3)
    lines = []
    inspect.inspect_corpus(tmp_path / "bpe", seed=0, show=lines.append)
    tokenizer = tokenizers.load_tokenizer(str(bpe_file))
    assert lines[1] == (f"tokenizer {tokenizer.name}: {tokenizer.n_vocab:,} tokens, "
                        f"mask {tokenizer.mask_id}, eos {tokenizer.eos_id}, uint16")
    assert "Document" in "".join(lines)
    (tmp_path / "bpe" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json of digest"):
        inspect.inspect_corpus(tmp_path / "bpe")


def test_inspect_into_a_pipe_that_is_closed(small_corpus):
    """As of `| head`: it ends and says nothing."""
    process = subprocess.Popen([sys.executable, "data.py", "inspect", small_corpus], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
        assert process.wait() == 141  # as a shell says it of those that SIGPIPE ends


@pytest.mark.parametrize("size", [1, 7, 64])
def test_inspect_in_small_chunks(sharded_corpus, size):
    """Nothing depends on how much is read at once."""
    texts = []
    for chunks in (contextlib.nullcontext(), small_chunks(size)):
        with chunks, io.StringIO() as out:
            inspect.inspect_corpus(sharded_corpus, seed=5, show=functools.partial(print, file=out))
            texts.append(out.getvalue())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_inspect_finds_a_flipped_bit(small_corpus, tmp_path, run_data, monkeypatch, split):
    """In files too large to be hashed at every start, too."""
    folder, name = tmp_path / "small", f"{split}.bin"
    shutil.copytree(small_corpus, folder)
    assert run_data("inspect", folder)[0] == 0
    change_bytes(name, flip_bit(6))(folder)
    message = f"data.py: {folder / name}: its SHA-256 is not the one in meta.json; prepare the corpus again\n"
    for is_large in (False, True):
        if is_large:
            monkeypatch.setattr(tokenfiles, "MAX_HASHED_BYTES", 1)
        code, out, err = run_data("inspect", folder)
        assert code == 2 and err == message
        assert ("val: " in out) == is_large
    change_bytes(name, lambda raw: raw[:20] + b"\xff\xff" + raw[22:])(folder)
    code, _, err = run_data("inspect", folder)
    message = f"data.py: {folder}: the {split} split holds token 65535, beyond the vocabulary of 257\n"
    assert code == 2 and err == message


@pytest.mark.parametrize("token", [-300, 300])
def test_inspect_names_the_token_beyond_the_vocabulary(tmp_path, run_data, token):
    write_pair(tmp_path / "web_train", [[[1, 2, token, EOS]], *[[[3, 4, EOS]]] * 99], 4)
    write_pair(tmp_path / "web_val", [[[1, EOS]]], 4)
    code, _, err = run_data("inspect", tmp_path, "--tokenizer=bytes")
    message = f"data.py: {tmp_path}: the train split holds token {token}, beyond the vocabulary of 257\n"
    assert (code, err) == (2, message)


@pytest.mark.parametrize("argv, message", [
    ([], "inspect what? python data.py inspect FOLDER"),
    (["a", "b"], "inspect what?"),
    (["absent"], "no corpus in 'absent'"),
    (["."], "add --tokenizer=gpt2"),
    ([".", "--tokenizer=gtp2"], "unknown tokenizer 'gtp2'"),
    ([".", "--tokenizer=bytes"], "no validation tokens"),
])
def test_inspect_refuses(tmp_path, run_data, argv, message):
    write_nanogpt(tmp_path / "tokens.bin", ABC)
    code, out, err = run_data("inspect", *argv)
    assert code == 2 and not out and message in err and err.count("\n") == 1
