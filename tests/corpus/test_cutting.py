"""Long texts in pieces: they join to the text, and have its tokens, whatever the tokenizer."""

import itertools
import json

import numpy as np
import pytest
from conftest import prepared
from corpus_examples import quick, write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from preparations import ONE_OF_EACH, SPLITS, by_split, task_size
from source_examples import LONG_TEXT, NO_MARK, jsonl, write_bpe, write_folder, write_txt

from corpus import cutting, prepare, sources, tokenfiles, tokenizers


def pieces_of_file(scratch, text, size, start=0, stop=None):
    """The pieces in which a file of this text is read."""
    source = sources.Source("txt", str(write_txt(scratch / "text.txt", text)))
    with task_size(size):
        pieces = list(cutting.read_pieces(source, start, stop, prepare.Config()))
    texts = [text for text, _, _ in pieces]
    ends = start + np.cumsum([len(text.encode()) for text in texts])
    assert [end for _, end, _ in pieces] == ends.tolist()
    return texts


def pieces_of_text(text, size):
    with task_size(size):
        return list(cutting.cut_text(text))


@quick
@given(NO_MARK, st.integers(1, 9), st.integers(0, 60), st.integers(0, 60))
def test_pieces_join_to_the_text(scratch, text, size, a, b):
    assert "".join(pieces_of_file(scratch, text, size)) == text
    assert "".join(pieces_of_text(text, size)) == text
    start, stop = sorted((a, b))
    first_byte, last_byte = len(text[:start].encode()), len(text[:stop].encode())
    assert "".join(pieces_of_file(scratch, text, size, first_byte, last_byte)) == text[start:stop]


@pytest.mark.parametrize("text", ["word\n" * 100, "some words " * 50])
def test_texts_are_cut_at_all(scratch, text):
    assert len(pieces_of_file(scratch, text, 20)) > 10


@settings(max_examples=150, deadline=None)
@given(NO_MARK, st.integers(1, 9))
@example("a\nb\nc\n\nd\n e \nf!\n\ng", 1)
@example("one!\ntwo\nthree!\n/four\n", 1)  # newer patterns join newlines, and slashes, to "!"
def test_pieces_have_the_tokens_of_the_whole(scratch, encoding, text, size):
    whole = encoding.encode_ordinary(text)
    for pieces in pieces_of_file(scratch, text, size), pieces_of_text(text, size):
        assert list(itertools.chain(*map(encoding.encode_ordinary, pieces))) == whole


@quick
@given(st.text(st.sampled_from("aé世🙂\n"), max_size=30),
       st.sampled_from([b"\xff", b"\xc3", b"\xe4\xb8", b"\x80", b"\xed\xa0\x80", b"\xf0\x9f\x99"]),
       st.text(st.sampled_from("a\n"), max_size=9), st.integers(1, 9))
def test_what_is_not_utf8_is_named_or_replaced(scratch, before, wrong, after, size):
    path = scratch / "wrong.txt"
    path.write_bytes(before.encode() + wrong + after.encode())
    source = sources.Source("txt", str(path))
    with task_size(size), pytest.raises(ValueError) as caught:
        list(cutting.read_pieces(source, 0, None, prepare.Config()))
    assert str(caught.value) == f"{path}: not UTF-8 at byte {len(before.encode())}; see --bad_bytes"
    with task_size(size):
        cfg = prepare.Config(bad_bytes="replace")
        texts, _, places = zip(*cutting.read_pieces(source, 0, None, cfg))
    assert "".join(texts) == path.read_bytes().decode("utf-8", "replace")
    assert sum(places) == "".join(texts).count("\ufffd")


@pytest.mark.parametrize("argv, message", [
    (["x.jsonl"], "x.jsonl:2: a line of more than 2,000,000 bytes"),
    (["x.txt", "--separator=%%"], "x.txt: no separator '%%' within 2,000,000 bytes from byte 3 on"),
    (["x.txt"], "x.txt: no place to cut the text within 2,000,000 bytes from byte 0 on"),
], ids=["jsonl", "separated", "text"])
def test_what_is_too_long_to_hold(data_refuses, tmp_path, argv, message):
    write_txt(tmp_path / "x.txt", "a%%" + "b" * (1 << 22))
    (tmp_path / "x.jsonl").write_bytes(jsonl(["a", "b" * (1 << 22)]))
    data_refuses(*argv, "--max_document=2M", message=message)


# --------------------------------------------------------------------------------------- tokenizer.json

LLAMA = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN = LLAMA.replace("{1,3}", "")
NFC = {"type": "NFC"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split_by(regex, **changes):
    """A pre-tokenizer with a pattern of its own, as newer models have it."""
    split = dict(type="Split", pattern={"Regex": regex}, behavior="Isolated", invert=False) | changes
    return {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | dict(use_regex=False)]}


def tokenizer_with(folder, normalizer, pre_tokenizer):
    """A tokenizer.json with merges across everything that a pattern may join."""
    hf = pytest.importorskip("tokenizers")
    spelling = dict(zip("\n\t\r ", "ĊĉčĠ"))
    characters = [spelling.get(c, c) for c in "aZ1.'!/\t\r\n "]
    pairs = list(itertools.product(characters, repeat=2))
    tokens = [*sorted(hf.pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs), "<eos>"]
    inner = hf.Tokenizer(hf.models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    inner.decoder = hf.decoders.ByteLevel()
    inner.add_special_tokens(["<eos>"])
    layout = json.loads(inner.to_str()) | dict(normalizer=normalizer, pre_tokenizer=pre_tokenizer)
    write_txt(folder / "tokenizer.json", json.dumps(layout))
    return tokenizers.load_tokenizer(str(folder))


KNOWN = {"GPT-NeoX": (NFC, BYTE_LEVEL), "Llama 3": (None, split_by(LLAMA)), "Qwen": (NFC, split_by(QWEN))}


@pytest.fixture(scope="module", params=KNOWN)
def known_tokenizer(request, scratch):
    return tokenizer_with(scratch, *KNOWN[request.param])


@settings(max_examples=150, deadline=None)
@given(NO_MARK, st.integers(1, 9))
@example("cafe\u0301\n\u0301a\u030a b\u0301 c\n\u0301", 1)  # NFC composes nothing with a newline or a space
@example("one!\ntwo\n!three!\n!four\n", 1)
def test_texts_are_cut_for_known_tokenizer_files(scratch, known_tokenizer, text, size):
    """Else they would be read and encoded whole, which takes a hundred times their size."""
    assert known_tokenizer.allows_cuts
    for pieces in pieces_of_text(text, size), pieces_of_file(scratch, text, size):
        ids = [i for ids in known_tokenizer.encode_batch(pieces) for i in ids.tolist()]
        assert ids == known_tokenizer.encode(text).tolist()


@pytest.mark.parametrize("normalizer, pre_tokenizer", [
    ({"type": "NFKC"}, BYTE_LEVEL),
    ({"type": "Sequence", "normalizers": [NFC]}, BYTE_LEVEL),
    (None, BYTE_LEVEL | dict(add_prefix_space=True)),
    (None, BYTE_LEVEL | dict(use_regex=False)),
    (None, split_by(r"\n\p{L}+")),
    (None, split_by(LLAMA, behavior="MergedWithNext")),
    (None, split_by(LLAMA, invert=True)),
])
def test_other_tokenizer_files_get_texts_whole(tmp_path, normalizer, pre_tokenizer):
    assert not tokenizer_with(tmp_path, normalizer, pre_tokenizer).allows_cuts


def merge_across_lines(path):
    """Add a merge of a newline and a letter to a tokenizer.json. Returns its tokenizers.Tokenizer."""
    layout = json.loads(path.read_text(encoding="utf-8"))
    model = layout["model"]
    model["vocab"]["ĊI"] = len(model["vocab"])
    model["merges"] = [["Ċ", "I"], *model["merges"]]
    write_txt(path, json.dumps(layout))
    return pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))


@pytest.mark.parametrize("options", [dict(), dict(use_regex=False), dict(add_prefix_space=True)],
                         ids=["plain", "no regex", "prefix"])
def test_long_documents_of_a_tokenizer_file(tmp_path, options):
    """Documents longer than a task: cut only where that changes no token."""
    file = tmp_path / "tokenizer.json"
    inner = write_bpe(file, **options)
    if options.get("use_regex") is False:
        inner = merge_across_lines(file)
    texts, val = [LONG_TEXT, LONG_TEXT.upper(), *ONE_OF_EACH], 0.5
    names = [write_jsonl(tmp_path / "x.jsonl", texts)]
    if not options:
        names.append(write_folder(tmp_path / "texts", texts))
    for name in names:
        out = tmp_path / f"{name.name}.out"
        with task_size(50):
            prepared(out, name, tokenizer=str(file), val=val)
        corpus = tokenfiles.load_corpus(out)
        for split in SPLITS:
            ids = []
            for text in by_split(texts, val)[split]:
                ids += [*inner.encode(text).ids, corpus.meta["eos_id"]]
            assert getattr(corpus, split).read(1, 1 << 40).tolist() == ids
