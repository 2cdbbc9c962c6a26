"""Corpora: tokenizers, prepare, load_corpus, the stateless permutation and Blocks."""

import contextlib
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT.parent / "shared" / "tiktoken"  # the GPT-2 files, where there is no network
needs_gpt2 = pytest.mark.skipif(not CACHE.is_dir(), reason="no tiktoken files beside the repository")
quick = settings(max_examples=50, deadline=None)

# Everything that pre-tokenizers treat in a way of its own, and characters of one to four bytes.
TEXT = st.text(st.sampled_from("aZ1é世🙂 .'!/\t\r\x0b\x1c\x85\u00a0\u2028\n\n\n"), max_size=60)


@pytest.fixture(scope="module")
def gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(CACHE))
        yield data.tokenizer("gpt2")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def stories(n):
    return [f"Document {i} is about {i * i}.\nIt ends — hier: {'é' * (i % 5)}🙂" for i in range(n)]


def pieces(array, eos):
    """The documents of a token file, as the raw bytes of their tokens."""
    ends = np.flatnonzero(array == eos)
    assert ends[0] == 0 and ends[-1] == len(array) - 1
    return [array[a + 1 : b].tobytes() for a, b in zip(ends, ends[1:])]


# ---------------------------------------------------------------------------------------------- tokenizers


@quick
@given(st.text())
def test_bytes_round_trip(text):
    tokens = data.tokenizer("bytes")
    ids = tokens.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokens.decode([tokens.eos_id, *ids.tolist(), tokens.mask_id, tokens.eos_id]) == text
    assert (tokens.n_vocab, tokens.eos_id, tokens.mask_id) == (257, 256, 257)


@needs_gpt2
@quick
@given(st.text() | TEXT)
@example("<|endoftext|>")  # in a document this is text, and no separator
def test_gpt2_round_trip(gpt2, text):
    ids = gpt2.encode(text)
    assert not (ids >= gpt2.eos_id).any()
    assert gpt2.decode([gpt2.eos_id, *ids.tolist(), gpt2.mask_id]) == text
    assert (gpt2.n_vocab, gpt2.eos_id, gpt2.mask_id) == (50257, 50256, 50257)


def real_pattern(name, ranks):
    """A tiktoken encoding with its own pattern and special tokens, but made-up merges: needs no download."""
    import tiktoken
    from tiktoken_ext import openai_public

    with mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks):
        encoding = tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())
    with mock.patch.object(tiktoken, "get_encoding", lambda _: encoding):
        return data.tokenizer(name)


def test_text_tokens_above_the_separator():
    """p50k_base has <|endoftext|> at 50256 and runs of spaces from 50257 on: none of them is the mask."""
    ranks = {bytes([i]): i for i in range(256)} | {f"<{i}>".encode(): i for i in range(256, 50281) if i != 50256}
    del ranks[b"<50257>"]
    tokens = real_pattern("p50k_base", ranks | {b"  ": 50257})
    ids = tokens.encode("a   b")
    assert 50257 in ids
    assert tokens.mask_id not in ids and ids.max() < tokens.n_vocab <= tokens.mask_id
    assert tokens.decode(ids) == "a   b"


def test_unknown_tokenizer_names_the_known():
    with pytest.raises(ValueError, match="unknown tokenizer 'gtp2'.*bytes.*gpt2"):
        data.tokenizer("gtp2")


# ---------------------------------------------------------------------------------------------------- text


def chunks(scratch, text, size, start=0, stop=None):
    path = scratch / "text.txt"
    path.write_bytes(text.encode())
    with mock.patch.object(data, "CHUNK", size):
        return list(data.text_chunks(path, start, stop))


@quick
@given(TEXT, st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_chunks_join_to_the_text(scratch, text, size, a, b):
    assert "".join(chunks(scratch, text, size)) == text
    first, second = text[: min(a, b)], text[min(a, b) : max(a, b)]
    span = chunks(scratch, text, size, len(first.encode()), len((first + second).encode()))
    assert "".join(span) == second


@needs_gpt2
@settings(max_examples=150, deadline=None)
@given(TEXT | st.lists(st.sampled_from(["to be", " or", "\n", "\n\n", " \n", "\r\n", "n't", "!"])).map("".join),
       st.integers(1, 9))
@example("a\nb\nc\n\nd\n e \nf!\n\ng", 1)
def test_chunks_tokenize_as_the_whole(scratch, gpt2, text, size):
    parts = chunks(scratch, text, size)
    assert np.concatenate([np.empty(0, np.uint32), *map(gpt2.encode, parts)]).tolist() == gpt2.encode(text).tolist()


def test_chunks_are_cut_at_all(scratch):
    assert len(chunks(scratch, "word\n" * 100, 20)) > 10


@pytest.mark.parametrize("name", ["cl100k_base", "o200k_base"])
def test_chunks_tokenize_as_the_whole_with_newer_patterns(scratch, name):
    """Newer patterns join newlines, and o200k_base slashes after them, to the punctuation before."""
    tokens = real_pattern(name, {bytes([i]): i for i in range(256)} | {b"!\n": 256, b"\n/": 257, b"!\n/": 258})
    text = "one!\ntwo\nthree!\n/four\n"
    parts = chunks(scratch, text, 1)
    assert np.concatenate([*map(tokens.encode, parts)]).tolist() == tokens.encode(text).tolist()


@quick
@given(st.text(st.sampled_from("aé世🙂\n"), max_size=30), st.sampled_from([b"\xff", b"\xc3", b"\xe4\xb8", b"\x80"]),
       st.text(st.sampled_from("a\n"), max_size=9), st.integers(1, 9))
def test_non_utf8_names_the_offset(scratch, before, wrong, after, size):
    path = scratch / "wrong.txt"
    path.write_bytes(before.encode() + wrong + after.encode())
    with mock.patch.object(data, "CHUNK", size), pytest.raises(ValueError) as caught:
        list(data.text_chunks(path))
    assert str(caught.value) == f"{path}: not UTF-8 near byte {len(before.encode())}"


@quick
@given(st.text(st.sampled_from("aé世🙂\n"), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_single_text_is_split_by_position(scratch, text, fraction):
    path = scratch / "whole.txt"
    path.write_bytes(text.encode())
    found = list(data.documents(path, "text", fraction))
    train, val = ("".join(t for split, t, _ in found if split == which) for which in ("train", "val"))
    assert train + val == text
    cut = int(len(text.encode()) * (1 - fraction))
    boundaries = [len(text[:i].encode()) for i in range(len(text) + 1)]
    assert len(train.encode()) == min(b for b in boundaries if b >= cut)
    assert [(split, t) for split, t, ends in found if ends] == [("train", ""), ("val", "")]


# --------------------------------------------------------------------------------------------------- jsonl


@pytest.mark.parametrize("line, message", [
    (b'{"text": ', "not JSON"),
    (b'{"txt": "a"}', "no field 'text'; name the text's field with --field"),
    (b'["text"]', "no field 'text'"),
    (b"7", "no field 'text'"),
    (b'{"text": 7}', "field 'text' is not text"),
    (b'{"text": "\xff"}', "UTF-8"),
    (rb'{"text": "\ud800"}', ""),  # half a character: JSON allows it, UTF-8 doesn't
    (b'{"id": ' + b"9" * 5000 + b', "text": "a"}', ""),  # Python refuses such integers
    (b"[" * 100_000, ""),
], ids=["cut", "field", "list", "number", "type", "bytes", "surrogate", "integer", "deep"])
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(ValueError) as caught:
        data.prepare(path, tmp_path / "out", data.Bytes())
    assert str(caught.value).startswith(f"{path}:4: ") and message in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


@quick
@given(st.lists(TEXT, unique=True), st.lists(TEXT), st.floats(0.05, 0.95), st.randoms())
def test_added_documents_move_none(scratch, texts, added, fraction, random):
    before = {t: split for split, t, _ in data.documents(write_jsonl(scratch / "a.jsonl", texts), "text", fraction)}
    more = texts + added + texts
    random.shuffle(more)
    found = [(t, split) for split, t, ends in data.documents(write_jsonl(scratch / "b.jsonl", more), "text", fraction)]
    assert before.items() <= dict(found).items()
    assert sorted(t for t, _ in found) == sorted(set(more) - {""})  # each once, so in one split only


def test_share_of_validation():
    n, fraction = 10_000, 0.1
    held = sum(data.goes_to_validation(text, fraction) for text in stories(n))
    assert abs(held - n * fraction) < 5 * (n * fraction * (1 - fraction)) ** 0.5  # five standard deviations


# ------------------------------------------------------------------------------------------------- prepare


def check_files(folder, tokens):
    """What meta.json says against the bytes on disk and an independent decoding of them. Returns the texts."""
    meta, texts = json.loads((folder / "meta.json").read_text()), {}
    dtype = np.dtype(meta["dtype"])
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "token_bytes.bin", "train.bin", "val.bin"]
    assert [meta[k] for k in ("tokenizer", "n_vocab", "eos_id", "mask_id")] \
        == [tokens.name, tokens.n_vocab, tokens.eos_id, tokens.mask_id]
    for split in ("train", "val"):
        raw = (folder / f"{split}.bin").read_bytes()
        found = [np.frombuffer(p, dtype).tolist() for p in pieces(np.frombuffer(raw, dtype), tokens.eos_id)]
        texts[split] = [tokens.decode(ids) for ids in found]
        assert meta[split] == dict(
            tokens=len(raw) // dtype.itemsize, bytes=sum(len(t.encode()) for t in texts[split]),
            documents=len(found), sha256=hashlib.sha256(raw).hexdigest())
    return texts


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_prepare_jsonl(tmp_path, name, request):
    tokens = request.getfixturevalue("gpt2") if name == "gpt2" else data.tokenizer(name)
    source, seen = write_jsonl(tmp_path / "x.jsonl", stories(60) + stories(30)), []
    meta = data.prepare(source, tmp_path / "out", tokens, fraction=0.3, progress=lambda *counts: seen.append(counts))
    texts = check_files(tmp_path / "out", tokens)
    assert sorted(texts["train"] + texts["val"]) == sorted(stories(60)) and texts["train"] and texts["val"]
    assert meta["dtype"] == "uint16" and meta["source"] == "x.jsonl"
    corpus = data.load_corpus(tmp_path / "out")
    assert corpus.meta == meta
    assert corpus.token_bytes[corpus.val].sum() == sum(len(t.encode()) for t in texts["val"])
    assert seen[-1][0] == 60 and seen[-1][2] == sum(len(t.encode()) for t in stories(60))


def test_prepare_text(tmp_path):
    text = "".join(stories(40))
    (tmp_path / "x.txt").write_text(text, encoding="utf-8")
    with mock.patch.object(data, "CHUNK", 50):
        data.prepare(tmp_path / "x.txt", tmp_path / "out", data.Bytes())
    texts = check_files(tmp_path / "out", data.Bytes())
    assert texts["train"][0] + texts["val"][0] == text and len(texts["train"]) == len(texts["val"]) == 1


def test_large_vocabulary_takes_four_bytes(tmp_path):
    tokens = SimpleNamespace(name="wide", n_vocab=300_000, eos_id=299_999, mask_id=300_000, token_bytes=lambda: np.ones(300_000, np.uint16),
                             encode=lambda text: np.array([65536 + ord(c) for c in text], np.uint32))
    data.prepare(write_jsonl(tmp_path / "x.jsonl", stories(20)), tmp_path / "out", tokens, fraction=0.5)
    corpus = data.load_corpus(tmp_path / "out")
    assert corpus.train.dtype == np.uint32
    found = [np.frombuffer(p, np.uint32) for s in (corpus.train, corpus.val) for p in pieces(s, tokens.eos_id)]
    assert sorted("".join(chr(i - 65536) for i in ids) for ids in found) == sorted(stories(20))


def test_prepare_overwrites_nothing(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", stories(40))
    data.prepare(source, tmp_path / "out", data.Bytes())
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="out exists; remove it or choose another --name"):
        data.prepare(source, tmp_path / "out", data.Bytes(), fraction=0.5)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_prepare_leaves_nothing_behind(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", stories(40))

    def interrupt(n_documents, n_tokens, n_bytes):
        if n_documents == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.prepare(source, tmp_path / "out", data.Bytes(), progress=interrupt)
    assert list(tmp_path.iterdir()) == [source]
    data.prepare(source, tmp_path / "out", data.Bytes())  # and the name is free again


@pytest.mark.parametrize("name, text", [("x.txt", ""), ("x.jsonl", ""), ("x.jsonl", '{"text": "only one"}\n')])
def test_prepare_refuses_too_little_text(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: no text for the (train|val) split; use more text"):
        data.prepare(tmp_path / name, tmp_path / "out", data.Bytes())
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("argv, message", [
    (["absent.txt"], "absent.txt: no such file"),
    (["picture.png"], "picture.png: expected docs, shakespeare, or a .txt or .jsonl file"),
    (["here.txt", "--val=0"], "--val=0.0: must lie between 0 and 1"),
    (["here.txt", "--val=1.5"], "--val=1.5: must lie between 0 and 1"),
    (["here.txt", "--tokenizer=gtp2"], "unknown tokenizer 'gtp2'"),
    (["here.txt", "--name=taken"], "taken exists; remove it or choose another --name"),
])
def test_command_line_refuses(tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("some text")
    Path("corpora/taken").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["data.py", *argv])
    with pytest.raises(SystemExit) as stop:
        data.main()
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("data.py: ") and message in stop.value.code
    assert not list(Path("corpora/taken").iterdir()) and len(list(Path("corpora").iterdir())) == 1


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
        path = data.download(url, tmp_path / "new" / "x.txt")
    assert path.read_bytes() == b"to be" and list(path.parent.iterdir()) == [path]
    assert data.download(url, path) == path  # the server is gone: nothing is fetched again
    with pytest.raises(OSError, match=f"cannot download {url}: .*save it as a .txt file"):
        data.download(url, tmp_path / "y.txt")


def test_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with server(b"to be", 500) as url, pytest.raises(OSError, match="cannot download"):
        data.download(url, tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    out = tmp_path_factory.mktemp("docs")
    done = subprocess.run([sys.executable, "data.py", "docs", f"--out={out}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return out, done.stdout


def test_docs_from_the_command_line(docs):
    out, printed = docs
    assert [p.name for p in out.iterdir()] == ["docs"]
    corpus = data.load_corpus(out / "docs")
    assert corpus.meta["tokenizer"] == "bytes" and corpus.meta["source"] == "docs"
    documents = {}
    for split, array in (("train", corpus.train), ("val", corpus.val)):
        documents[split] = pieces(np.asarray(array), 256)
        s = corpus.meta[split]
        assert s["tokens"] == s["bytes"] + s["documents"] + 1 and s["documents"] == len(documents[split])
        assert f"{s['documents']:,} documents, {s['tokens']:,} tokens, {s['bytes']:,} bytes" in printed
        assert all(documents[split]) and len(set(documents[split])) == len(documents[split])
    assert not set(documents["train"]) & set(documents["val"])
    assert 0.02 < len(documents["val"]) / len(documents["train"]) < 0.25
    assert corpus.meta["train"]["bytes"] > 1e6
    text = b"".join(documents["train"] + documents["val"])[::2].decode()  # UTF-8 tokens are 16 bits, high byte 0
    assert 'The "assert" statement' in text and "Compile a regular expression pattern" in text


# ---------------------------------------------------------------------------------------------------- read


def edit_json(change):
    def edit(folder):
        meta = json.loads((folder / "meta.json").read_text())
        change(meta)
        (folder / "meta.json").write_text(json.dumps(meta))
    return edit


def edit_bytes(name, change):
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def pair_up(folder):
    """Say uint32 and half the tokens in meta.json: sizes and checksums still agree."""
    def change(meta):
        meta["dtype"] = "uint32"
        for split in ("train", "val"):
            raw = (folder / f"{split}.bin").read_bytes()
            raw += b"\0\1" * (len(raw) % 4 // 2)
            (folder / f"{split}.bin").write_bytes(raw)
            meta[split] |= dict(tokens=len(raw) // 4, sha256=hashlib.sha256(raw).hexdigest())
    edit_json(change)(folder)


@pytest.mark.parametrize("damage, message", [
    (edit_bytes("train.bin", lambda raw: raw[:-2]), r"train.bin: \d+ bytes, but meta.json says"),
    (edit_bytes("val.bin", lambda raw: raw[:-1]), r"val.bin: \d+ bytes, but meta.json says"),
    (edit_bytes("val.bin", lambda raw: b""), "val.bin: 0 bytes, but meta.json says"),
    (lambda folder: (folder / "train.bin").unlink(), "train.bin: 0 bytes, but meta.json says"),
    (edit_bytes("train.bin", lambda raw: raw[:9] + bytes([raw[9] ^ 1]) + raw[10:]), "train.bin: its SHA-256"),
    (edit_bytes("val.bin", lambda raw: raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]), "val.bin: its SHA-256"),
    (edit_json(lambda meta: meta.update(dtype="uint32")), "another dtype"),
    (edit_json(lambda meta: meta.update(dtype="int16")), "meta.json is damaged"),
    (edit_json(lambda meta: meta.pop("train")), "meta.json is damaged"),
    (edit_json(lambda meta: meta.pop("eos_id")), "meta.json is damaged"),
    (edit_json(lambda meta: meta["val"].pop("bytes")), "meta.json is damaged"),
    (edit_json(lambda meta: meta.update(mask_id=256)), "meta.json is damaged"),
    (edit_json(lambda meta: meta.update(n_vocab=100, eos_id=99)), "n_vocab|vocabulary"),
    (pair_up, "n_vocab|vocabulary"),
    (edit_bytes("meta.json", lambda raw: raw[: len(raw) // 2]), "meta.json is damaged"),
    (edit_bytes("meta.json", lambda raw: b"[]"), "meta.json is damaged"),
    (edit_bytes("meta.json", lambda raw: b"\xff" + raw), "meta.json is damaged"),
], ids=["cut", "odd", "empty", "no-bin", "flip", "flip-val", "dtype", "bad-dtype", "no-train", "no-eos", "no-bytes",
        "mask", "vocab", "pairs", "half", "list", "not-utf8"])
def test_load_refuses(tmp_path, damage, message):
    folder = tmp_path / "out"
    data.prepare(write_jsonl(tmp_path / "x.jsonl", stories(30)), folder, data.Bytes(), fraction=0.3)
    data.load_corpus(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        data.load_corpus(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_load_refuses_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus in .*absent'; prepare one with: python data.py FILE --name=absent"):
        data.load_corpus(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        data.load_corpus(tmp_path)  # a folder, but nothing in it


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
    whole = permuted(n, seed, 3, index)
    assert len(set(whole.tolist())) == len(index) and whole.min() >= 0 and whole.max() < n
    assert [int(permuted(n, seed, 3, [i])[0]) for i in index] == whole.tolist()  # no index sees its neighbours


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


@quick
@given(corpora(), st.data())
def test_each_epoch_visits_each_block_once(corpus, draw):
    tokens, length, seed = corpus
    available = (len(tokens) - 1) // length
    unique = draw.draw(st.just(0) | st.integers(length, available * length))
    blocks = data.Blocks(tokens, length, seed, unique)
    assert blocks.n == (unique // length or available)
    epochs = blocks.ids(np.arange(4 * blocks.n)).reshape(4, blocks.n)
    assert all(sorted(set(epoch)) == sorted(epochs[0]) for epoch in epochs.tolist())
    assert len(set(epochs[0].tolist())) == blocks.n and epochs.min() >= 0 and epochs.max() < available


@quick
@given(corpora(), st.data())
def test_blocks_are_stateless(corpus, draw):
    """Any batch split, any order and a fresh object give the same rows."""
    tokens, length, seed = corpus
    blocks = data.Blocks(tokens, length, seed)
    sample = np.arange(3 * blocks.n)
    whole = blocks.rows(sample)
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(sample)), max_size=4)))
    assert np.array_equal(np.concatenate([blocks.rows(part) for part in np.split(sample, cuts)]), whole)
    some = np.array(draw.draw(st.lists(st.integers(0, len(sample) - 1), min_size=1)))
    assert np.array_equal(data.Blocks(tokens, length, seed).rows(some), whole[some])


@quick
@given(corpora())
def test_rows_are_slices_with_the_token_before(corpus):
    tokens, length, seed = corpus
    blocks = data.Blocks(tokens, length, seed)
    sample = np.arange(2 * blocks.n)
    rows = blocks.rows(sample)
    assert rows.dtype == np.int64 and rows.shape == (len(sample), length + 1)
    for row, b in zip(rows, blocks.ids(sample)):
        assert row.tolist() == tokens[b * length : (b + 1) * length + 1].tolist()
    every = blocks.read(np.arange(blocks.available))
    assert every[0, 0] == tokens[0]
    assert every[:, 1:].ravel().tolist() == tokens[1 : 1 + blocks.available * length].tolist()


def test_order_differs_by_epoch_and_seed():
    tokens = np.arange(1001, dtype=np.uint16)
    orders = [data.Blocks(tokens, 5, seed).ids(np.arange(600)).reshape(3, 200).tolist() for seed in (0, 1)]
    assert len({tuple(epoch) for order in orders for epoch in order}) == 6
    for epoch in orders[0]:  # not merely shifted: neighbours in the file are rarely neighbours in the stream
        assert np.mean(np.abs(np.diff(epoch)) == 1) < 0.1


@quick
@given(st.integers(0, 2**40), st.integers(1, 50), st.integers(1, 50))
def test_unique_tokens_nest(seed, a, b):
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    small, large = (data.Blocks(tokens, 4, seed, 4 * n) for n in sorted((a, b)))
    chosen = [set(blocks.ids(np.arange(blocks.n)).tolist()) for blocks in (small, large)]
    assert chosen[0] <= chosen[1] and [len(c) for c in chosen] == sorted((a, b))


def test_unique_subset_is_random():
    tokens = np.arange(50 * 4 + 1, dtype=np.uint16)
    subsets = [frozenset(data.Blocks(tokens, 4, seed, 40).ids(np.arange(10)).tolist()) for seed in range(200)]
    assert len(set(subsets)) == 200 and set.union(*map(set, subsets)) == set(range(50))  # (4/5)**200 misses one


def test_blocks_refuse():
    tokens = np.zeros(9, np.uint16)
    assert data.Blocks(tokens, 8).n == 1
    with pytest.raises(ValueError, match="the training split has 8 tokens, fewer than one block of 9"):
        data.Blocks(tokens, 9)
    with pytest.raises(ValueError, match="fewer than one block"):
        data.Blocks(tokens[:0], 1)
    for unique in (3, 9):
        with pytest.raises(ValueError, match=f"unique_tokens={unique} must lie between one block"):
            data.Blocks(tokens, 4, 0, unique)


def test_token_bytes_add_up_to_the_text(tmp_path):
    """Bits per byte of any block rests on this: the lengths of the tokens of a split sum to its bytes."""
    (tmp_path / "t.txt").write_text("Straße, naïve; 数 and 🙂.\n" * 50)
    for name in ["bytes"] + (["gpt2"] if "TIKTOKEN_CACHE_DIR" in os.environ else []):
        meta = data.prepare(tmp_path / "t.txt", tmp_path / name, data.tokenizer(name))
        corpus = data.load_corpus(tmp_path / name)
        for split in ("train", "val"):
            assert corpus.token_bytes[getattr(corpus, split)].sum() == meta[split]["bytes"]
    (tmp_path / "bytes" / "token_bytes.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="token_bytes.bin: missing"):
        data.load_corpus(tmp_path / "bytes")
