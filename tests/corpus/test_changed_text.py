"""Tokenizers that change the text: its bytes, what comes back from tokens, what ends a document in it."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import prepared
from corpus_examples import all_tokens, change_meta, one_line, stories, write_jsonl, write_nanogpt
from preparations import by_split, texts_in
from source_examples import write_bpe, write_llama, write_txt

from corpus import tokenfiles, tokenizers
from sampling.prompts import Prompt, encode_holes, encode_prompt, warn_of_change
from training.corpora import mean_token_bytes, validation_sequences

SHORT = [f"{i} ok" for i in range(300)]


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "tokenizer.json")


@pytest.fixture(scope="module")
def llama(llama_file):
    return tokenizers.load_tokenizer(str(llama_file))


def change_layout(path, out, **changes):
    """Write a copy of a tokenizer.json with some parts changed."""
    return write_txt(out, json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes))


# ------------------------------------------------------------------------------------- bytes of the text


def bytes_per_token(*folders):
    """Of the whole validation splits of corpora."""
    corpora = [tokenfiles.load_corpus(folder) for folder in folders]
    sequences = validation_sequences(SimpleNamespace(seq_len=1), corpora)
    return mean_token_bytes(corpora, sequences, np.arange(sequences.available))


def test_bits_per_byte_are_per_byte_of_the_text(llama_file, tmp_path, run_data):
    """48006ab counted the space before each document: 13.6 % too few bits/byte for documents this short."""
    source = write_jsonl(tmp_path / "x.jsonl", SHORT)
    code, printed, _ = run_data(source, f"--tokenizer={llama_file}", "--val=0.3", "--name=changed")
    assert code == 0 and "the tokenizer changes text: its tokens spell" in printed
    changed, exact = tmp_path / "corpora/changed", tmp_path / "exact"
    prepared(exact, source, val=0.3)
    assert texts_in(changed) == by_split(SHORT, 0.3)
    meta = json.loads((changed / "meta.json").read_text(encoding="utf-8"))["val"]
    assert meta["token_bytes"] == meta["bytes"] + meta["documents"]
    n_tokens = meta["tokens"] - 1
    assert bytes_per_token(changed) == pytest.approx(meta["bytes"] / n_tokens)
    assert tokenfiles.load_corpus(exact).byte_ratio == 1

    # of a mixture, each by its own
    other = write_jsonl(tmp_path / "y.jsonl", [" ".join(SHORT[i : i + 90]) for i in range(200)])
    prepared(tmp_path / "long", other, tokenizer=str(llama_file), val=0.3)
    long = json.loads((tmp_path / "long/meta.json").read_text(encoding="utf-8"))["val"]
    expected = (meta["bytes"] + long["bytes"]) / (n_tokens + long["tokens"] - 1)
    assert bytes_per_token(changed, tmp_path / "long") == pytest.approx(expected)

    # older corpora do not say how many bytes their tokens spell
    before = tokenfiles.load_corpus(changed).byte_ratio
    change_meta(lambda meta: meta["val"].pop("token_bytes"))(changed)
    assert tokenfiles.load_corpus(changed).byte_ratio == before < 0.9


def test_the_prefix_counts_in_no_layout(llama, llama_file, tmp_path):
    """Of others' token files the text is not known: the documents are counted."""
    for name, texts in (("train", SHORT[:200]), ("val", SHORT[200:])):
        tokens = [i for text in texts for i in [*llama.encode(text).tolist(), llama.eos_id]]
        write_nanogpt(tmp_path / f"{name}.bin", tokens)
    corpus = tokenfiles.load_corpus(tmp_path, str(llama_file))
    n_bytes = corpus.byte_ratio * corpus.token_bytes[all_tokens(corpus.val)].sum()
    assert n_bytes == pytest.approx(sum(map(len, SHORT[200:])))


def test_composed_characters_are_counted_as_they_were(tmp_path):
    """NFC, as GPT-NeoX's and Qwen's tokenizers have it, makes fewer bytes of them."""
    write_bpe(tmp_path / "plain.json")
    file = change_layout(tmp_path / "plain.json", tmp_path / "nfc.json", normalizer={"type": "NFC"})
    texts = [f"cafe\u0301 {i}" for i in range(200)]
    meta = prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", texts), tokenizer=str(file), val=0.3)
    for split in ("train", "val"):
        counts = meta[split]
        assert counts["token_bytes"] == counts["bytes"] - counts["documents"] > 0


@pytest.mark.parametrize("changes", [
    dict(normalizer={"type": "Lowercase"}),
    dict(normalizer={"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
    dict(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
    dict(normalizer={"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}),
    dict(model=dict(type="WordLevel", vocab={"a": 0, "<|endoftext|>": 1, "?": 2}, unk_token="?")),
    dict(model=dict(type="BPE", vocab={"a": 0, "<|endoftext|>": 1}, merges=[])),
], ids=["case", "spaces", "ends", "accents", "words", "letters"])
def test_tokenizers_that_lose_text_prepare_none(data_refuses, tmp_path, changes):
    write_bpe(tmp_path / "plain.json")
    change_layout(tmp_path / "plain.json", tmp_path / "lossy.json", **changes)
    write_jsonl(tmp_path / "x.jsonl", stories(20))
    data_refuses("x.jsonl", "--tokenizer=lossy.json", message="do not spell the text they stand for")


# ------------------------------------------------------------------------------ text that follows other text


@pytest.mark.parametrize("text", ["1[MASK] squared", "is[MASK]double", "[MASK] squared", " a [MASK:1]b",
                                  "a\n[MASK]\nb"])
def test_text_around_holes_stays_as_it_is(llama, text):
    """48006ab wrote a space behind each hole: `1[MASK] squared` became `19  squared`."""
    nine = llama.encode("9").tolist()[-1]
    ids = [nine if i == llama.mask_id else i for i in encode_holes(text, llama)]
    assert llama.decode(ids) == text.replace("[MASK:1]", "9").replace("[MASK]", "9")


def test_what_the_tokenizer_changes_is_said(tmp_path, capsys):
    """NFC composes an accent; all else comes back as it was given, also where a hole comes first."""
    write_bpe(tmp_path / "plain.json")
    file = change_layout(tmp_path / "plain.json", tmp_path / "nfc.json", normalizer={"type": "NFC"})
    composing = tokenizers.load_tokenizer(str(file))
    for prompt, said in ((Prompt("cafe\u0301"), 1), (Prompt(text="e\u0301[MASK:3]"), 1), (Prompt(), 0),
                         (Prompt("café", " x", 3), 0), (Prompt(text="e[MASK]\u0301"), 0)):
        row = encode_prompt(prompt, composing, 40, 0, False)
        assert warn_of_change(prompt, row, composing) == bool(said)
        assert capsys.readouterr().err.count("is read as") == said


def test_a_prefix_changes_nothing_that_is_given(llama):
    for prompt in (Prompt("1 squared"), Prompt(" a", " b", 3), Prompt(text="[MASK] squared[MASK]")):
        assert not warn_of_change(prompt, encode_prompt(prompt, llama, 40, 0, False), llama)


def llama_with(path, out, scheme):
    """Llama 2's as newer versions write it: the pre-tokenizer writes the space, the decoder drops it."""
    space = dict(type="Metaspace", replacement="▁", prepend_scheme=scheme, split=False)
    fallback = dict(type="Sequence", decoders=[space, {"type": "ByteFallback"}, {"type": "Fuse"}])
    return change_layout(path, out, normalizer=None, pre_tokenizer=space, decoder=fallback)


@pytest.mark.parametrize("scheme", ["", "first", "always"])
def test_continuations(llama_file, tmp_path, scheme):
    path = llama_with(llama_file, tmp_path / "t.json", scheme) if scheme else llama_file
    tokenizer = tokenizers.load_tokenizer(str(path))
    assert tokenizer.prefix_bytes == 1
    for text in ("squared", " squared", "  two", "\nline", ""):
        ids = tokenizer.encode(text, continues=True)
        assert tokenizer.decode(ids, continues=True) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text)
        assert tokenizer.decode([*tokenizer.encode("a"), *ids]) == "a" + text


def test_nothing_changes_for_tokenizers_without_a_prefix(bpe_file):
    bpe = tokenizers.load_tokenizer(str(bpe_file))
    assert bpe.continuing is bpe.inner and bpe.prefix_bytes == 0
    for tokenizer in (bpe, tokenizers.load_tokenizer("bytes")):
        ids = tokenizer.encode(" a b")
        assert ids.tolist() == tokenizer.encode(" a b", continues=True).tolist()
        assert tokenizer.decode(ids) == tokenizer.decode(ids, continues=True) == " a b"


# --------------------------------------------------------------------------------- the end of a document


def write_with_end(path):
    """Write a tokenizer.json with an added token <END>, which is not special."""
    inner = write_bpe(path)
    inner.add_tokens(["<END>"])
    inner.save(str(path))


def test_the_end_as_text_ends_nothing(tmp_path):
    """48006ab made 622 documents of 311."""
    write_with_end(tmp_path / "t.json")
    texts = [f"{i} squared.<END>And {i} more." for i in range(60)]
    prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", texts), tokenizer=str(tmp_path / "t.json"),
             eos="<END>", val=0.3)
    assert texts_in(tmp_path / "out") == by_split(texts, 0.3)
    corpus = tokenfiles.load_corpus(tmp_path / "out")
    assert corpus.token_bytes[corpus.meta["eos_id"]] == 0 and corpus.byte_ratio == 1


@pytest.mark.parametrize("eos, text", [("e", "e"), ("Ċ", "\n")])
def test_a_token_of_text_ends_no_document(data_refuses, tmp_path, eos, text):
    """A letter, and a newline as byte-level vocabularies spell it."""
    write_bpe(tmp_path / "t.json")
    write_jsonl(tmp_path / "x.jsonl", stories(20))
    message = f"a text that contains {text!r} would end there: {eos!r} is a token of text"
    data_refuses("x.jsonl", "--tokenizer=t.json", f"--eos={eos}", message=message)


# ------------------------------------------------------------------------------------- hostile and damaged


def hostile(layout, name):
    """A tokenizer.json's layout with something in it that is there to do harm."""
    model = layout["model"]
    splits = dict(type="Split", pattern={"Regex": "(a+)+$"}, behavior="Isolated", invert=False)
    parts = {
        "pattern": dict(pre_tokenizer=dict(type="Sequence", pretokenizers=[splits, layout["pre_tokenizer"]])),
        "words": dict(model=dict(type="WordLevel", vocab=model["vocab"], unk_token="<unk>")),
        "nothing": dict(model=model | dict(vocab={}, merges=[])),
        "no tokens": dict(model=model | dict(vocab={}, merges=[]), added_tokens=[]),
        "unknown": dict(model=dict(type="Unigram", unk_id=None, vocab=[])),
        "empty": dict(added_tokens=[token | dict(content="") for token in layout["added_tokens"]]),
        "long": dict(model=model | dict(vocab=model["vocab"] | {"a" * 70_000: 500})),
    }
    if name in parts:
        return layout | parts[name]
    return layout | dict(model=model | dict(vocab=model["vocab"] | {"Ġ": int(name)}, merges=[]))


@pytest.mark.parametrize("name", ["pattern", "words", "nothing", "no tokens", "unknown", "empty", "long",
                                  str(2**31), str(10**8), str(2**32 - 1), str(2**32), "-1"])
def test_hostile_tokenizer_files(bpe_file, tmp_path, name):
    """A panic of the package's own code is no Exception; vocabularies of 2³² would take all memory."""
    layout = hostile(json.loads(bpe_file.read_text(encoding="utf-8")), name)
    path = write_txt(tmp_path / "hostile.json", json.dumps(layout))
    with pytest.raises(ValueError, match="hostile.json") as caught:
        tokenizer = tokenizers.load_tokenizer(str(path))
        tokenizer.check_text()
        tokenizer.encode("a" * 40 + "b")
    one_line(caught)


def test_ids_are_those_of_the_package(bpe_file, tmp_path):
    """It numbers added tokens itself if the file's numbers can't be: they must not decide an array's size."""
    layout = json.loads(bpe_file.read_text(encoding="utf-8"))
    layout["added_tokens"][0]["id"] = 10**8
    path = write_txt(tmp_path / "t.json", json.dumps(layout))
    tokenizer = tokenizers.load_tokenizer(str(path))
    assert tokenizer.n_vocab <= 301 and tokenizer.specials["<|endoftext|>"] == tokenizer.eos_id < 301


def test_many_special_tokens_load_quickly(bpe_file, tmp_path):
    """48006ab looked for each id in the list of all specials: a minute for 262,144 of them."""
    layout = json.loads(bpe_file.read_text(encoding="utf-8"))
    first = len(layout["model"]["vocab"])
    special = layout["added_tokens"][0]
    layout["added_tokens"] += [special | dict(id=first + i, content=f"<|{i}|>") for i in range(3000)]

    class Counted(dict):
        n_values = 0

        def values(self):
            Counted.n_values += 1
            return super().values()

    tokenizer = tokenizers.load_tokenizer(str(write_txt(tmp_path / "t.json", json.dumps(layout))))
    tokenizer.specials = Counted(tokenizer.specials)
    tokenizer.find_mask(tokenizer.inner.get_vocab(with_added_tokens=True))
    assert len(tokenizer.specials) == 3001 and Counted.n_values == 1


def test_a_tokenizer_file_with_a_byte_order_mark(bpe_file, tmp_path):
    (tmp_path / "t.json").write_bytes(b"\xef\xbb\xbf" + bpe_file.read_bytes())
    tokenizer = tokenizers.load_tokenizer(str(tmp_path / "t.json"))
    assert tokenizer.decode(tokenizer.encode("some text")) == "some text"
