"""nanoGPT's character tokens, whose alphabet is a pickle; tokens that open documents, not end them."""

import json
import os
import pickle
import sys

import numpy as np
import pytest
from conftest import prepared
from corpus_examples import (
    EOS,
    all_tokens,
    lengths_of,
    one_line,
    quick,
    small_chunks,
    stories,
    write_jsonl,
    write_nanogpt,
    write_pair,
    write_shard_uint32,
)
from hypothesis import given
from hypothesis import strategies as st
from source_examples import write_bpe

import data
from corpus import tokenizers
from corpus.stream import Stream, next_document_start
from corpus.tokenfiles import load_corpus

TEXT = "To be, or not to be: é\n" * 40


def write_characters(folder, **changes):
    """nanoGPT's data/shakespeare_char: train.bin, val.bin and meta.pkl, as its prepare.py writes them."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(set(TEXT))
    ids = {character: i for i, character in enumerate(alphabet)}
    write_nanogpt(folder / "train.bin", [ids[c] for c in TEXT[:800]])
    write_nanogpt(folder / "val.bin", [ids[c] for c in TEXT[800:]])
    meta = dict(vocab_size=len(alphabet), itos=dict(enumerate(alphabet)), stoi=ids) | changes
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return alphabet


def test_nanogpts_characters_are_read_as_they_are(tmp_path):
    """Its first example; 48006ab refused it."""
    alphabet = write_characters(tmp_path / "char")
    corpus = load_corpus(tmp_path / "char")
    n = len(alphabet)
    assert (corpus.meta["n_vocab"], corpus.meta["eos_id"], corpus.meta["mask_id"]) == (n + 1, n, n + 1)
    tokenizer = tokenizers.load_tokenizer(corpus.meta["tokenizer"])  # by its name alone
    assert tokenizer.decode(all_tokens(corpus.train)) == TEXT[:800]
    assert tokenizer.encode(TEXT[800:]).tolist() == all_tokens(corpus.val)[1:]
    assert corpus.token_bytes[all_tokens(corpus.val)].sum() == len(TEXT[800:].encode())
    assert tokenizers.load_tokenizer(tokenizer.name).name == tokenizer.name
    with pytest.raises(ValueError, match="'%' is not among the") as caught:
        tokenizer.encode("not %")
    one_line(caught)


def test_training_on_characters(run_main, tmp_path, monkeypatch, capsys):
    """Sampling needs the run's folder only; a tokenizer.json can't be made of them."""
    import convert
    import sample

    write_characters(tmp_path / "char")
    run = run_main(f"--corpus={tmp_path / 'char'}", "--steps=3", "--eval_rows=4")
    (tmp_path / "char/meta.pkl").unlink()
    argv = ["sample.py", f"--run_dir={run}", "--device=cpu", "--prompt=To be", "--length=9"]
    monkeypatch.setattr(sys, "argv", argv)
    capsys.readouterr()
    sample.main()
    assert capsys.readouterr().out.startswith("To be")
    monkeypatch.setattr(sys, "argv", ["convert.py", f"--source={run}", f"--out={tmp_path / 'hf'}"])
    with pytest.raises(SystemExit):
        convert.main()
    assert "have no tokenizer.json" in capsys.readouterr().err and not (tmp_path / "hf").exists()


class Harmful:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "harm"),)


@pytest.mark.parametrize("changes, message", [
    (None, r"no nanoGPT alphabet \(UnpicklingError"),
    ("harm", r"no nanoGPT alphabet \(UnpicklingError: it refers to posix.mkdir, which may run code"),
    (dict(itos=None), "does not say which character each token is"),
    (dict(itos={0: "a", 2: "b"}), "does not say which character each token is"),
    (dict(itos={0: "a", 1: "a"}), "its tokens are not different characters"),
    (dict(itos={0: "a", 1: "bc"}), "its tokens are not different characters"),
    (dict(itos={0: "a", 1: 7}), "its tokens are not different characters"),
    (dict(itos={0: "a", 1: "\ud800"}), "its tokens are not different characters"),
    (dict(itos={}), "its tokens are not different characters"),
])
def test_other_pickles_are_refused(tmp_path, changes, message):
    """Nothing in a pickle is run."""
    write_characters(tmp_path, **(changes if isinstance(changes, dict) else {}))
    if not isinstance(changes, dict):
        raw = pickle.dumps(Harmful(tmp_path)) if changes else b"no pickle"
        (tmp_path / "meta.pkl").write_bytes(raw)
    with pytest.raises(ValueError, match=f"meta.pkl.*{message}") as caught:
        load_corpus(tmp_path)
    one_line(caught)
    assert not (tmp_path / "harm").exists()


def test_characters_are_no_other_tokenizers(tmp_path):
    write_characters(tmp_path)
    with pytest.raises(ValueError, match="tokenizer=bytes can't be right; leave it out"):
        load_corpus(tmp_path, "bytes")
    for name in ("characters", "characters 7", 'characters ["ab"]', "characters {"):
        with pytest.raises(ValueError):
            tokenizers.load_tokenizer(name)


# ------------------------------------------------------------------------------- tokens that open documents

OPEN = 9
OPENED = st.lists(st.lists(st.integers(0, 8), max_size=6), min_size=1, max_size=9)


@quick
@given(OPENED, st.booleans(), st.integers(1, 7))
def test_documents_that_a_token_opens(documents, has_first, size):
    tokens = [token for document in documents for token in [OPEN, *document]]
    tokens = tokens if has_first or not documents[0] else tokens[1:]
    stream = Stream([np.array(tokens, np.uint16)], opens=True).with_leading_eos(OPEN)
    with small_chunks(size):
        assert lengths_of(stream, OPEN) == [len(document) for document in documents]
        starts = np.cumsum([0] + [len(document) + 1 for document in documents])
        for position in range(1, len(stream)):
            expected = min(start for start in starts if start >= position)
            assert next_document_start(stream, position, OPEN) == expected


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_documents_that_a_token_opens(causal):
    """The token belongs to the document that it opens, also where it is the last one of a row."""
    stream = Stream([np.array([OPEN, 1, 2, OPEN, 3, OPEN, OPEN, 4, 5], np.uint16)], opens=True)
    sequences = data.Sequences(stream, 8)
    rows = sequences.read(np.array([0]))
    documents = sequences.documents(np.array([0]), rows, OPEN, causal)
    expected = [1, 1, 1, 2, 2, 3, 4, 4] if causal else [0, 0, 1, 1, 2, 3, 3, 3]
    assert documents[0].tolist() == expected


@pytest.mark.parametrize("causal", [False, True])
def test_rows_of_a_pair_whose_documents_a_token_opens(tmp_path, causal):
    """The index says where documents start; the token in front of each changes nothing about that."""
    write_pair(tmp_path / "web", [[[EOS, 1, 2]], [[EOS]], [[EOS, 3, 4, 5]]])
    stream = load_corpus(tmp_path / "web", "bytes", 0.5, eos_opens=True).train
    assert lengths_of(stream) == [2, 0] and not stream.n_prepended
    sequences = data.Sequences(stream, 3)
    rows = sequences.read(np.array([0]))
    documents = sequences.documents(np.array([0]), rows, EOS, causal)[0].tolist()
    assert documents == ([0, 0, 0] if causal else [0, 0, 1])


def test_llm_cs_shards_of_llama_3(tmp_path, run_data):
    """48006ab took 200 documents for one."""
    inner = write_bpe(tmp_path / "t.json", eos="<|end_of_text|>")
    inner.add_special_tokens(["<|begin_of_text|>"])
    inner.save(str(tmp_path / "t.json"))
    begin = inner.token_to_id("<|begin_of_text|>")
    for name, first, n in (("fineweb_train_000001", 0, 50), ("fineweb_val_000000", 50, 20)):
        tokens = [token for text in stories(n, first) for token in [begin, *inner.encode(text).ids]]
        write_shard_uint32(tmp_path / f"{name}.bin", tokens)
    options = dict(tokenizer_name=str(tmp_path / "t.json"), eos="<|begin_of_text|>", eos_opens=True)
    corpus = load_corpus(tmp_path, **options)
    assert corpus.meta["eos_id"] == begin and corpus.train.n_prepended == 0
    assert lengths_of(corpus.train, begin) == [len(inner.encode(text).ids) for text in stories(50)]
    code, printed, _ = run_data("inspect", tmp_path, "--tokenizer=t.json", "--eos=<|begin_of_text|>",
                                "--eos_opens")
    assert code == 0 and ", 50 documents," in printed and ", 20 documents," in printed


def test_training_on_documents_that_a_token_opens(run_main, tmp_path):
    write_bpe(tmp_path / "t.json", eos="<s>")
    tokenizer = tokenizers.load_tokenizer(str(tmp_path / "t.json"), eos="<s>")
    tokens = [i for text in stories(80) for i in [tokenizer.eos_id, *tokenizer.encode(text).tolist()]]
    write_nanogpt(tmp_path / "tokens.bin", tokens)
    run = run_main(f"--corpus={tmp_path / 'tokens.bin'}", f"--tokenizer={tmp_path / 't.json'}", "--eos=<s>",
                   "--eos_opens", "--val_share=0.3", "--steps=2", "--eval_rows=8", "--document_attention")
    record = json.loads((run / "step_00000002/checkpoint.json").read_text(encoding="utf-8"))
    assert record["corpus"]["eos_id"] == tokenizer.eos_id and record["settings"]["eos_opens"]


def test_prepared_corpora_end_their_documents(small_corpus, tmp_path):
    with pytest.raises(ValueError, match="eos_opens is for others' token files"):
        load_corpus(small_corpus, eos_opens=True)
    prepared(tmp_path / "out", write_jsonl(tmp_path / "x.jsonl", stories(20)), val=0.3)
    with pytest.raises(ValueError, match="eos=</s>: only a tokenizer.json leaves that open"):
        load_corpus(tmp_path / "out", "bytes", eos="</s>")
