"""What `data.py inspect` prints, and what it finds."""

import contextlib
import functools
import io
import re
import shutil
import subprocess
import sys

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


def printed(run_data, *argv):
    """What `data.py inspect` prints."""
    code, out, err = run_data("inspect", *argv)
    assert code == 0 and not err, err
    return out


def test_inspect_prepared(run_data, small_corpus, sharded_corpus):
    for folder in (small_corpus, sharded_corpus):
        out, read = printed(run_data, folder), tokenfiles.load_corpus(folder)
        meta = read.meta
        streams_ = dict(train=read.train, val=read.val)
        assert inspected(out) == expected_of(streams_, [len(meta[split]["files"]) for split in streams_])
        assert [inspected(out)[split][2] for split in streams_] == [meta[split]["documents"] for split in streams_]
        assert f"{folder}: prepared by prepare.py from x.jsonl\ntokenizer bytes: 257 tokens, mask 257, eos 256, uint16\n" in out
        assert f"{meta['train']['bytes']:,} bytes" in out and out.endswith("\nall SHA-256 sums agree\n")
        for split, start, text in re.findall(r"(train|val): .*(?:\n  ≤.*)*\n  sample from token ([\d,]+): '(.*)'$", out, re.M):
            start = int(start.replace(",", ""))
            assert tokenizers.Bytes().decode(all_tokens(streams_[split])[start : start + 64]) == text.replace("\\n", "\n")


@pytest.mark.parametrize("layout", ["Megatron", "nanoGPT", "cut"])
def test_inspect_foreign(run_data, tmp_path, layout):
    """The eos that the reader puts in front is in no file: it counts as no token, and as no file."""
    documents = byte_documents(40)
    flags = ["--tokenizer=bytes"]
    for name, part in (("train", documents[:30]), ("val", documents[30:])):
        if layout == "Megatron":
            for number, piece in enumerate((part[:4], part[4:])):
                write_pair(tmp_path / f"web_{name}_{number}", [[d[:9], d[9:]] for d in piece], 5)
        elif layout == "nanoGPT":
            write_nanogpt(tmp_path / f"{name}.bin", [token for d in part for token in [*d, EOS]])
    if layout == "cut":
        write_pair(tmp_path / "web", [[d] for d in documents])
        flags.append("--val_share=0.25")
    out = printed(run_data, tmp_path, *flags)
    read = tokenfiles.load_corpus(tmp_path, "bytes", 0.25 if layout == "cut" else 0)
    found, n_files = inspected(out), 2 if layout == "Megatron" else 1
    assert f"{tmp_path}: {read.meta['format']} token files\ntokenizer bytes: 257 tokens" in out
    assert found["train"][2] + found["val"][2] == 40 and [f[4] for f in found.values()] == [f[2] for f in found.values()]
    assert [f[3] for f in found.values()] == [max(lengths_of(read.train)), max(lengths_of(read.val))]
    assert sum(f[0] for f in found.values()) == sum(map(len, documents)) + 40 * (layout == "nanoGPT")
    assert [f[1] for f in found.values()] == [n_files, n_files]
    assert "no checksums in this layout" in out


def test_inspect_with_a_tokenizer_file(bpe_file, tmp_path):
    """It is in the corpus's folder."""
    prepared(tmp_path / "bpe", write_jsonl(tmp_path / "x.jsonl", stories(80)), tokenizer=str(bpe_file), val=0.3)
    lines = []
    inspect.inspect(tmp_path / "bpe", seed=0, show=lines.append)
    tokens = tokenizers.load_tokenizer(str(bpe_file))
    assert lines[1] == f"tokenizer {tokens.name}: {tokens.n_vocab:,} tokens, mask {tokens.mask_id}, eos {tokens.eos_id}, uint16"
    assert "Document" in "".join(lines)
    (tmp_path / "bpe" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer.json of digest"):
        inspect.inspect(tmp_path / "bpe")


def test_inspect_into_a_pipe_that_is_closed(small_corpus):
    """As of `| head`: it ends and says nothing."""
    process = subprocess.Popen([sys.executable, "data.py", "inspect", small_corpus], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b"" and process.wait() == 141  # as a shell says it of those that SIGPIPE ends


@pytest.mark.parametrize("size", [1, 7, 64])
def test_inspect_in_small_pieces(sharded_corpus, size):
    """Nothing depends on how much is read at once."""
    texts = []
    for pieces in (contextlib.nullcontext(), small_chunks(size)):
        with pieces, io.StringIO() as out:
            inspect.inspect(sharded_corpus, seed=5, show=functools.partial(print, file=out))
            texts.append(out.getvalue())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("which", ["train.bin", "val.bin"])
def test_inspect_finds_a_flipped_byte(small_corpus, tmp_path, run_data, monkeypatch, which):
    """In files too large to be hashed at every start, too."""
    folder = tmp_path / "small"
    shutil.copytree(small_corpus, folder)
    assert run_data("inspect", folder)[0] == 0
    change_bytes(which, flip_bit(6))(folder)
    for checked in (tokenfiles.CHECKED, 1):
        monkeypatch.setattr(tokenfiles, "CHECKED", checked)
        code, out, err = run_data("inspect", folder)
        assert code == 2 and err == f"data.py: {folder / which}: its SHA-256 is not the one in meta.json; prepare the corpus again\n"
        assert ("val: " in out) == (checked == 1)
    change_bytes(which, lambda raw: raw[:20] + b"\xff\xff" + raw[22:])(folder)
    code, _, err = run_data("inspect", folder)
    assert code == 2 and re.fullmatch(rf"data.py: {folder}: the {which[:-4]} split holds token 65535, beyond the vocabulary of 257\n", err)


@pytest.mark.parametrize("token", [-300, 300])
def test_inspect_names_the_token_beyond_the_vocabulary(tmp_path, run_data, token):
    write_pair(tmp_path / "web_train", [[[1, 2, token, EOS]], *[[[3, 4, EOS]]] * 99], 4)
    write_pair(tmp_path / "web_val", [[[1, EOS]]], 4)
    code, _, err = run_data("inspect", tmp_path, "--tokenizer=bytes")
    assert (code, err) == (2, f"data.py: {tmp_path}: the train split holds token {token}, beyond the vocabulary of 257\n")


@pytest.mark.parametrize("argv, message", [
    ([], "inspect what? python data.py inspect FOLDER"), (["a", "b"], "inspect what?"), (["absent"], "no corpus in 'absent'"),
    (["."], "add --tokenizer=gpt2"), ([".", "--tokenizer=gtp2"], "unknown tokenizer 'gtp2'"),
    ([".", "--tokenizer=bytes"], "no validation tokens"),
])
def test_inspect_refuses(tmp_path, run_data, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    write_nanogpt(tmp_path / "tokens.bin", ABC)
    code, out, err = run_data("inspect", *argv)
    assert code == 2 and not out and message in err and err.count("\n") == 1
