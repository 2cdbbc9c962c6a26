"""Tokenizers learned in a preparation: of training text alone, the same whatever happens on the way."""

import io
import json
import random
import sys

import pytest
from conftest import prepared
from corpus_examples import stories, write_jsonl
from preparations import by_split, contents, stop_after_commit, task_size, texts_in
from source_examples import write_txt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from corpus import bpe, prepare, sources
from corpus.tokenfiles import load_corpus
from corpus.tokenizers import load_tokenizer

VAL = 0.3


def words(seed, n=400):
    """A text of words that repeat, so that there is something to learn."""
    draw = random.Random(seed)
    vocabulary = "their", "there", "then", "naïve", "1234", "\n\nwhile", "🙂"
    return " ".join(draw.choice(vocabulary) for _ in range(n))


TEXTS = [words(seed) for seed in range(12)] + [words(0), ""]  # a duplicate, and nothing


def learned_elsewhere(texts, size):
    """The vocabulary and merges that the tokenizers package learns from these texts as one would call it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(bpe_pattern(), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|endoftext|>"], show_progress=False,
        max_token_length=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return json.loads(tokenizer.to_str())["model"]


def bpe_pattern():
    """Qwen2's, as its tokenizer.json has it."""
    from tokenizers import Regex

    return Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                 r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def model_of(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]


def test_it_learns_from_the_training_documents_alone(tmp_path):
    """Each once; what it writes spells the documents, and counts their bytes."""
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    folder = tmp_path / "corpus"
    meta = prepared(folder, tmp_path / "in.jsonl", tokenizer="bpe:275", val=VAL)
    expected = by_split(TEXTS, VAL)
    assert texts_in(folder) == expected and all(expected.values())
    assert model_of(folder) == learned_elsewhere(expected["train"], 275)
    assert (meta["n_vocab"], meta["eos_id"], meta["mask_id"], meta["dtype"]) == (275, 0, 275, "uint16")
    for split, texts in expected.items():
        n_bytes = sum(len(text.encode()) for text in texts)
        assert meta[split]["bytes"] == meta[split]["token_bytes"] == n_bytes > 2 * meta[split]["tokens"]
    tokenizer = load_tokenizer(load_corpus(folder).meta["tokenizer"], (folder,))
    for text in ("their there 1234", "<|endoftext|>", "never seen: 世界\x00"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos_id not in ids


def test_of_a_single_text_it_learns_from_the_beginning(tmp_path):
    """Its end is the validation split. Pieces give what the whole gives."""
    text = words(1, 3000) + "zqxj zqxj " * 600
    folders = [tmp_path / "whole", tmp_path / "pieces"]
    for folder, size in zip(folders, (1 << 20, 1000)):
        with task_size(size):
            prepared(folder, write_txt(tmp_path / "in.txt", text), tokenizer="bpe:280", val=0.3)
    assert contents(folders[0]) == contents(folders[1])
    assert not any("zq" in token for token in model_of(folders[0])["vocab"])


def test_interrupted_it_is_the_same(tmp_path, monkeypatch):
    """A preparation that goes on keeps the tokenizer that it has learned."""
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    found = sources.find_sources([str(tmp_path / "in.jsonl")], prepare.Config())
    cfg = prepare.Config(tokenizer="bpe:275", val=VAL)
    with task_size(2000):
        prepare.prepare(found, tmp_path / "whole", cfg)
        with stop_after_commit(3), pytest.raises(KeyboardInterrupt):
            prepare.prepare(found, tmp_path / "out", cfg)
        monkeypatch.setattr(bpe, "learn", None)  # not again
        prepare.prepare(found, tmp_path / "out", cfg)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        monkeypatch.undo()


def test_interrupted_it_keeps_its_size(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", TEXTS)
    found = sources.find_sources([str(tmp_path / "in.jsonl")], prepare.Config())
    cfg, other = (prepare.Config(tokenizer=f"bpe:{size}", val=VAL) for size in (275, 270))
    with task_size(2000):
        with stop_after_commit(3), pytest.raises(KeyboardInterrupt):
            prepare.prepare(found, tmp_path / "out", cfg)
        with pytest.raises(ValueError, match="an interrupted preparation with other settings"):
            prepare.prepare(found, tmp_path / "out", other)
        prepare.prepare(found, tmp_path / "out", cfg)
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out"}


def test_restart_learns_again(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    cfg = prepare.Config(tokenizer="bpe:275", val=VAL)
    with task_size(2000), stop_after_commit(3), pytest.raises(KeyboardInterrupt):
        prepare.prepare(sources.find_sources([str(path)], cfg), tmp_path / "out", cfg)
    texts = [*TEXTS, *stories(20)]
    write_jsonl(path, texts)
    prepared(tmp_path / "out", path, tokenizer="bpe:275", val=VAL, restart=True)
    assert model_of(tmp_path / "out") == learned_elsewhere(by_split(texts, VAL)["train"], 275)


def test_from_standard_input_and_several_processes(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    cfg = prepare.Config(tokenizer="bpe:275", val=VAL, format="jsonl")
    prepare.prepare([], tmp_path / "stdin", cfg, stdin=io.BytesIO(lines))
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    prepared(tmp_path / "two", path, tokenizer="bpe:275", val=VAL, workers=2)
    assert texts_in(tmp_path / "stdin") == texts_in(tmp_path / "two")
    assert model_of(tmp_path / "stdin") == model_of(tmp_path / "two")


def test_a_text_with_few_pairs_gives_fewer_tokens(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    flags = [f"--out={tmp_path}", "--val=0.3", "--tokenizer=bpe:4000"]
    monkeypatch.setattr(sys, "argv", ["data.py", str(path), *flags])
    prepare.main()
    meta = load_corpus(tmp_path / "in").meta
    assert 275 < meta["n_vocab"] < 300 and meta["mask_id"] == meta["n_vocab"]
    assert f"pairs for {meta['n_vocab']} tokens, not for 4,000" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--tokenizer=bpe:256"], "tokenizer=bpe:256: expected bpe:N with N from 257 to 1,048,576 tokens"),
    (["--tokenizer=bpe:"], "tokenizer=bpe:: expected bpe:N"),
    (["--tokenizer=bpe:1e3"], "tokenizer=bpe:1e3: expected bpe:N"),
    (["--tokenizer=bpe:٣٠٠"], "expected bpe:N"),
    (["--tokenizer=bpe:275", "--eos=x"], "eos=x: a tokenizer that is learned ends documents with <|endofte"),
])  # fmt: skip
def test_what_it_refuses(tmp_path, monkeypatch, capsys, flags, message):
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    monkeypatch.setattr(sys, "argv", ["data.py", str(path), f"--out={tmp_path / 'out'}", *flags])
    with pytest.raises(SystemExit) as stop:
        prepare.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_text_is_named_as_in_any_preparation(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match="in.jsonl:2: not JSON"):
        prepared(tmp_path / "out", path, tokenizer="bpe:275")
    assert not list(tmp_path.glob("*out*"))


def test_only_so_much_text_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(bpe, "LEARNED_BYTES", 4000)
    path = write_jsonl(tmp_path / "in.jsonl", TEXTS)
    cfg = prepare.Config(val=VAL)
    texts = list(bpe.training_texts(sources.find_sources([str(path)], cfg), cfg))
    expected = by_split(TEXTS, VAL)["train"]
    assert texts == expected[: len(texts)] and len(texts) < len(expected)
    sizes = [len(text.encode()) for text in texts]
    assert sum(sizes[:-1]) < 4000 <= sum(sizes)


def test_a_line_of_dashes_is_no_token(tmp_path):
    texts = ["-" * 140_000 + str(i) for i in range(8)]
    folder = tmp_path / "out"
    prepared(folder, write_jsonl(tmp_path / "in.jsonl", texts), tokenizer="bpe:275", val=VAL)
    assert texts_in(folder) == by_split(texts, VAL)
    assert 128 < max(map(len, model_of(folder)["vocab"])) <= bpe.LONGEST


@pytest.mark.parametrize("change", ("text", "settings"))
def test_killed_before_its_first_commit(tmp_path, monkeypatch, change):
    """What was learned goes on with the same text and settings, and with no other."""
    path, settings = write_jsonl(tmp_path / "in.jsonl", TEXTS), dict(tokenizer="bpe:275", val=VAL)
    load, learned, learn = prepare.load_tokenizer, [], bpe.learn

    def killed(cfg):
        raise KeyboardInterrupt

    monkeypatch.setattr(bpe, "learn", lambda *arguments: learned.append(learn(*arguments)))
    monkeypatch.setattr(prepare, "load_tokenizer", killed)
    monkeypatch.setattr(prepare.shutil, "rmtree", lambda *_, **__: None)  # as after kill -9
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path / "out", path, **settings)
    monkeypatch.undo()
    monkeypatch.setattr(bpe, "learn", lambda *arguments: learned.append(learn(*arguments)))
    assert prepare.load_tokenizer is load and len(learned) == 1
    texts = TEXTS
    if change == "text":
        texts = [*TEXTS, *stories(20)]
        write_jsonl(path, texts)
    else:
        settings["val"] = 0.5
    prepared(tmp_path / "out", path, **settings)
    assert len(learned) == 2
    assert model_of(tmp_path / "out") == learned_elsewhere(by_split(texts, settings["val"])["train"], 275)
