"""Tokenizers: round trips, lengths in bytes, tokenizer.json files, and what is refused."""

import hashlib
import json
from pathlib import Path
from unittest import mock

import pytest
from conftest import prepared
from corpus_examples import all_tokens, needs_gpt2, one_line, quick, stories
from hypothesis import example, given
from hypothesis import strategies as st
from source_examples import TEXT, write_txt

from corpus import tokenfiles, tokenizers


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
@given(TEXT)
@example("<|endoftext|>")  # in a document this is text, and no separator
def test_gpt2_round_trip(gpt2, text):
    ids = gpt2.encode(text)
    assert not (ids >= gpt2.eos_id).any()
    batch = [array.tolist() for array in gpt2.encode_batch([text, "", text])]
    assert batch == [ids.tolist(), [], ids.tolist()]
    assert gpt2.decode([gpt2.eos_id, *ids.tolist(), gpt2.mask_id]) == text
    assert gpt2.token_bytes()[ids].sum() == len(text.encode())
    assert (gpt2.n_vocab, gpt2.eos_id, gpt2.mask_id) == (50257, 50256, 50257)
    assert gpt2.specials == {"<|endoftext|>": 50256}


def with_merges(name, ranks):
    """A tiktoken tokenizer with its own pattern and special tokens, but made-up merges: needs no download."""
    import tiktoken
    from tiktoken_ext import openai_public

    with mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks):
        encoding = tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())
    with mock.patch.object(tiktoken, "get_encoding", lambda _: encoding):
        return tokenizers.load_tokenizer(name)


def test_text_tokens_above_the_separator():
    """p50k_base has <|endoftext|> at 50256 and runs of spaces from 50257 on: none of them is the mask."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {f"<{i}>".encode(): i for i in range(256, 50281) if i not in (50256, 50257)}
    tokens = with_merges("p50k_base", ranks | {b"  ": 50257})
    ids = tokens.encode("a   b")
    assert 50257 in ids
    assert tokens.mask_id not in ids and ids.max() < tokens.n_vocab <= tokens.mask_id
    assert tokens.decode(ids) == "a   b"


def test_unknown_tokenizer_names_the_known():
    with pytest.raises(ValueError, match="unknown tokenizer 'gtp2'.*bytes.*gpt2"):
        tokenizers.load_tokenizer("gtp2")


def test_a_folder_of_a_tokenizers_name_is_no_tokenizer(tmp_path, monkeypatch):
    """Corpora are often called as their tokenizer is."""
    monkeypatch.chdir(tmp_path)
    Path("bytes").mkdir()
    assert tokenizers.load_tokenizer("bytes").name == "bytes"


def test_token_bytes_add_up_to_the_text(tmp_path, bpe_file, encoding):
    """Bits per byte of any row rests on this: the lengths of the tokens of a split sum to its bytes."""
    source = write_txt(tmp_path / "t.txt", "Straße, naïve; 数 and 🙂.\n" * 50)
    for i, name in enumerate(("bytes", str(bpe_file), encoding.name)):
        folder = tmp_path / str(i)
        meta = prepared(folder, source, tokenizer=name)
        corpus = tokenfiles.load_corpus(folder)
        assert corpus.tokenizer_file == (folder / "tokenizer.json" if name == str(bpe_file) else None)
        for split in ("train", "val"):
            ids = all_tokens(getattr(corpus, split))
            assert corpus.token_bytes[ids].sum() == meta[split]["bytes"] > 100
    (tmp_path / "0" / "token_bytes.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="token_bytes.bin: missing"):
        tokenfiles.load_corpus(tmp_path / "0")


# --------------------------------------------------------------------------------------- tokenizer.json


@pytest.fixture(scope="module")
def bpe(bpe_file):
    return tokenizers.load_tokenizer(str(bpe_file))


@quick
@given(TEXT)
@example("<|endoftext|>")
@example("Document 7 is about 49.<|endoftext|>\nIt")
def test_tokenizer_file_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert not (ids == bpe.eos_id).any() and ids.max(initial=0) < bpe.n_vocab <= bpe.mask_id
    assert [array.tolist() for array in bpe.encode_batch([text, ""])] == [ids.tolist(), []]
    assert bpe.decode([bpe.eos_id, *ids.tolist(), bpe.mask_id]) == text
    assert bpe.token_bytes()[ids].sum() == len(text.encode())
    assert len(bpe.token_bytes()) == bpe.n_vocab


def test_tokenizer_file_is_known_by_its_digest(bpe, bpe_file, tmp_path):
    digest = hashlib.sha256(bpe_file.read_bytes()).hexdigest()[:16]
    assert bpe.name == f"tokenizer.json {digest} <|endoftext|>"
    assert bpe.specials == {"<|endoftext|>": bpe.eos_id} and bpe.token_bytes()[bpe.eos_id] == 0
    assert bpe.allows_cuts
    text = stories(1)[0]
    assert len(bpe.encode(text)) < 0.7 * len(text)  # merges at all

    assert tokenizers.load_tokenizer(str(bpe_file.parent)).name == bpe.name  # a folder that holds it
    assert tokenizers.load_tokenizer(bpe.name, (tmp_path, bpe_file.parent)).path == bpe_file
    (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"no tokenizer.json of digest {digest} in {tmp_path}") as caught:
        tokenizers.load_tokenizer(bpe.name, (tmp_path,))
    one_line(caught)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"model": 7}', b"\xff"])
def test_files_that_are_no_tokenizer(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    with pytest.raises(ValueError, match="x.json: no tokenizer.json: ") as caught:
        tokenizers.load_tokenizer(str(tmp_path / "x.json"))
    one_line(caught)


def test_tokenizer_file_refuses(bpe_file, tmp_path):
    layout = json.loads(bpe_file.read_text(encoding="utf-8"))

    def refused(message, path, eos="", **changes):
        if changes:
            write_txt(path, json.dumps(layout | changes))
        with pytest.raises(ValueError, match=message):
            tokenizers.load_tokenizer(str(path), eos=eos)

    refused("absent.json: no such tokenizer file", tmp_path / "absent.json")
    refused("none.json: which token ends a document", tmp_path / "none.json", added_tokens=[])
    letter = layout["model"]["vocab"]["a"]
    assert tokenizers.load_tokenizer(str(tmp_path / "none.json"), eos="a").eos_id == letter
    refused(r"has no token '<s>'; give it with --eos= \(its specials: <\|endoftext\|>\)", bpe_file, eos="<s>")
    plain = dict(pre_tokenizer={"type": "Whitespace"}, decoder=None)
    refused("do not spell the text", tmp_path / "plain.json", **plain)
    refused("eos=a: only a tokenizer.json leaves that open", "bytes", eos="a")


def test_tokenizer_file_with_byte_fallback(tmp_path):
    """As Llama 2's and Gemma's: spaces are ▁, and what is not in the vocabulary is spelled in bytes."""
    hf = pytest.importorskip("tokenizers")
    tokens = ["</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a", "é"]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = hf.Tokenizer(hf.models.BPE(vocab, [("a", "b"), ("▁", "a")], byte_fallback=True))
    inner.normalizer = hf.normalizers.Replace(" ", "▁")
    inner.decoder = hf.decoders.Sequence([
        hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()])
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizers.load_tokenizer(str(tmp_path))
    text = "ab  a é世🙂 b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.eos_id == 0 and not tokenizer.allows_cuts
