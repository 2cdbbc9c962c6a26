"""Tokenizers: round trips, lengths in bytes, tokenizer.json files, and what is refused."""

import functools
import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import pytest
from conftest import prepared
from corpus_examples import all_tokens, needs_gpt2, one_line, quick, stories
from hypothesis import example, given
from hypothesis import strategies as st

from corpus import tokenfiles, tokenizers

# Everything that pre-tokenizers treat in a way of its own, and characters of one to four bytes.
TEXT = st.text(st.sampled_from("aZ1é世🙂 .'!/\t\r\x0b\x1c\x85\u00a0\u2028\n\n\n"), max_size=60)


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
def test_tokenizer_file_round_trip(bpe_file, text):
    tokens = file_tokenizer(bpe_file)
    ids = tokens.encode(text)
    assert not (ids == tokens.eos_id).any() and ids.max(initial=0) < tokens.n_vocab <= tokens.mask_id
    assert [a.tolist() for a in tokens.encode_batch([text, ""])] == [ids.tolist(), []]
    assert tokens.decode([tokens.eos_id, *ids.tolist(), tokens.mask_id]) == text
    assert tokens.token_bytes()[ids].sum() == len(text.encode()) and len(tokens.token_bytes()) == tokens.n_vocab


@functools.cache
def file_tokenizer(path):
    return tokenizers.load_tokenizer(str(path))


def test_tokenizer_file_is_known_by_its_digest(bpe_file, tmp_path):
    tokens = file_tokenizer(bpe_file)
    assert tokens.name == f"tokenizer.json {hashlib.sha256(bpe_file.read_bytes()).hexdigest()[:16]} <|endoftext|>"
    assert tokens.specials == {"<|endoftext|>": tokens.eos_id} and tokens.token_bytes()[tokens.eos_id] == 0 and tokens.cuts
    assert len(tokens.encode(stories(1)[0])) < 0.7 * len(stories(1)[0])  # merges at all
    assert tokenizers.load_tokenizer(str(bpe_file.parent)).name == tokens.name  # a folder that holds it
    assert tokenizers.load_tokenizer(tokens.name, (tmp_path, bpe_file.parent)).path == bpe_file
    (tmp_path / "tokenizer.json").write_bytes(bpe_file.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"no tokenizer.json of digest {tokens.name.split()[1]} in {tmp_path}") as caught:
        tokenizers.load_tokenizer(tokens.name, (tmp_path,))
    one_line(caught)


def changed_bpe(bpe_file, path, **changes):
    path.write_text(json.dumps(json.loads(bpe_file.read_text()) | changes))
    return path


def test_tokenizer_file_refuses(bpe_file, tmp_path):
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
    none = changed_bpe(bpe_file, tmp_path / "none.json", added_tokens=[])
    with pytest.raises(ValueError, match="none.json: which token ends a document"):
        tokenizers.load_tokenizer(str(none))
    assert tokenizers.load_tokenizer(str(none), eos="a").eos_id == json.loads(bpe_file.read_text())["model"]["vocab"]["a"]
    with pytest.raises(ValueError, match=r"has no token '<s>'; give it with --eos= \(its specials: <\|endoftext\|>\)"):
        tokenizers.load_tokenizer(str(bpe_file), eos="<s>")
    plain = changed_bpe(bpe_file, tmp_path / "plain.json", pre_tokenizer={"type": "Whitespace"}, decoder=None)
    with pytest.raises(ValueError, match="do not spell the text"):
        tokenizers.load_tokenizer(str(plain))
    with pytest.raises(ValueError, match="eos=a: only a tokenizer.json leaves that open"):
        tokenizers.load_tokenizer("bytes", eos="a")


def test_tokenizer_file_with_byte_fallback(tmp_path):
    """As Llama 2's and Gemma's: spaces are ▁, and what is not in the vocabulary is spelled in bytes."""
    hf = pytest.importorskip("tokenizers")
    vocab = {t: i for i, t in enumerate(("</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a", "é"))}
    made = hf.Tokenizer(hf.models.BPE(vocab, [("a", "b"), ("▁", "a")], byte_fallback=True))
    made.normalizer = hf.normalizers.Replace(" ", "▁")
    made.decoder = hf.decoders.Sequence([
        hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()])
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


def test_token_bytes_add_up_to_the_text(tmp_path, bpe_file):
    """Bits per byte of any block rests on this: the lengths of the tokens of a split sum to its bytes."""
    (tmp_path / "t.txt").write_text("Straße, naïve; 数 and 🙂.\n" * 50)
    for i, name in enumerate(["bytes", str(bpe_file)] + ["gpt2"] * ("TIKTOKEN_CACHE_DIR" in os.environ)):
        meta = prepared(tmp_path / str(i), tmp_path / "t.txt", tokenizer=name)
        read = tokenfiles.load_corpus(tmp_path / str(i))
        assert read.tokenizer_file == (tmp_path / str(i) / "tokenizer.json" if name == str(bpe_file) else None)
        for split in ("train", "val"):
            assert read.token_bytes[all_tokens(getattr(read, split))].sum() == meta[split]["bytes"] > 100
    (tmp_path / "0" / "token_bytes.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="token_bytes.bin: missing"):
        tokenfiles.load_corpus(tmp_path / "0")
