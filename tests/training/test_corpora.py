"""Training on corpora of every layout, and on mixtures of them; what is refused of their files."""

import json
import math
import re
import shutil
import sys

import pytest
from conftest import prepared
from corpus_examples import (
    EOS,
    byte_documents,
    needs_gpt2,
    stories,
    write_jsonl,
    write_nanogpt,
    write_pair,
)
from source_examples import write_llama

from corpus import tokenfiles
from training.log import read_metrics


def last_validation(run):
    """The loss of a run's last validation."""
    return [m["val_loss"] for m in read_metrics(run) if "val_loss" in m][-1]


@needs_gpt2
def test_training_on_a_nanogpt_folder(run_main, gpt2, tmp_path):
    folder = tmp_path / "owt"
    folder.mkdir()
    for name, texts in (("train", stories(60)), ("val", stories(30, 60))):
        tokens = []
        for text in texts:
            tokens += [*gpt2.encode(text).tolist(), gpt2.eos_id]
        write_nanogpt(folder / f"{name}.bin", tokens)
    run = run_main(f"--corpus={folder}", "--tokenizer=gpt2", "--steps=3", "--seq_len=16", "--eval_rows=8")
    assert 5 < last_validation(run) < 14
    record = json.loads((run / "step_00000003/checkpoint.json").read_text(encoding="utf-8"))
    assert record["corpus"]["tokenizer"] == "gpt2" and record["model"]["n_vocab"] == 50257


def test_training_on_a_megatron_prefix(run_main, refused, tmp_path):
    prefix = tmp_path / "web_text_document"
    documents = [[tokens + [EOS]] for tokens in byte_documents(80)]
    write_pair(prefix, documents, 4)
    files = (f"--corpus={prefix}", "--tokenizer=bytes", "--val_share=0.2", "--eval_rows=8")
    losses = []
    separate = ["--document_attention"]
    for number, flags in enumerate(([], separate, [*separate, "--reset_positions"])):
        run = run_main(*files, "--steps=3", "--lr=0.01", *flags, run=f"run{number}")
        losses.append(last_validation(run))
    assert losses[1] == pytest.approx(losses[2], abs=1e-4) and abs(losses[0] - losses[1]) > 1e-3
    run_main(*files, "--steps=5", "--resume=yes", run="run0")
    write_pair(prefix, documents[::-1], 4)
    assert "another corpus: train_sha256" in refused(*files, "--steps=7", "--resume=yes", run="run0")


def test_training_on_a_mixture_with_budgets(run_main, small_corpus, sharded_corpus, capsys):
    mixed = f"--corpus={sharded_corpus}:3:640,{small_corpus}:1:160"
    run = run_main(mixed, "--epochs=1", "--document_attention", "--reset_positions")
    # 25 sequences in batches of 8
    assert "4 steps of 256 tokens: 1,024 tokens, 1.28 epochs of 800" in capsys.readouterr().out
    record = json.loads((run / "step_00000004/checkpoint.json").read_text(encoding="utf-8"))
    metas = [
        json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        for folder in (sharded_corpus, small_corpus)
    ]
    assert record["corpus"]["train_sha256"] == " ".join(meta["train"]["sha256"] for meta in metas)
    run_main(f"--corpus={sharded_corpus}:1:640,{small_corpus}:1:160", "--steps=5", "--resume=yes")
    assert "resumed with another mixture: the data order changes here" in capsys.readouterr().err


def test_training_with_a_tokenizer_file(run_main, bpe_file, tmp_path, monkeypatch, capsys):
    """Sampling needs the run's folder only: the corpus and the tokenizer's file may be gone."""
    import sample

    tokenizer = tmp_path / "own/tokenizer.json"
    tokenizer.parent.mkdir()
    shutil.copy(bpe_file, tokenizer)
    texts = write_jsonl(tmp_path / "x.jsonl", stories(80))
    prepared(tmp_path / "corpus", texts, tokenizer=str(tokenizer), val=0.3)
    run = run_main(f"--corpus={tmp_path / 'corpus'}", "--steps=3", "--eval_rows=8")
    tokens = tokenfiles.load_corpus(tmp_path / "corpus").train.read(0, 3000).tolist()
    write_nanogpt(tmp_path / "tokens.bin", tokens)
    flags = (f"--corpus={tmp_path / 'tokens.bin'}", f"--tokenizer={tokenizer}", "--val_share=0.3")
    other = run_main(*flags, "--steps=3", "--eval_rows=8", run="other")

    shutil.rmtree(tmp_path / "corpus")
    shutil.rmtree(tokenizer.parent)
    for folder in (run, other):
        capsys.readouterr()
        argv = ["sample.py", f"--run_dir={folder}", "--device=cpu", "--prompt=Document 7", "--length=9"]
        monkeypatch.setattr(sys, "argv", argv)
        sample.main()
        assert capsys.readouterr().out.startswith("Document 7")


def test_training_refuses(refused, small_corpus, sharded_corpus, bpe_file, tmp_path):
    texts = write_jsonl(tmp_path / "x.jsonl", stories(80))
    prepared(tmp_path / "bpe", texts, tokenizer=str(bpe_file), val=0.3)
    write_nanogpt(tmp_path / "tokens.bin", [1, 2, 3, EOS] * 99)

    def problem(*flags):
        line = refused("--steps=3", *flags)
        assert line.count("\n") == 1 and not (tmp_path / "run").exists()
        return line

    small, sharded, tokens = small_corpus, sharded_corpus, tmp_path / "tokens.bin"
    different = problem(f"--corpus={small},{tmp_path / 'bpe'}")
    assert re.search("small and .*bpe don't go together: tokenizer bytes and tokenizer.json", different)
    single = "unique_tokens is for a single corpus"
    assert single in problem(f"--corpus={small},{sharded}", "--unique_tokens=320")
    assert single in problem(f"--corpus={small}:1:320", "--unique_tokens=320")
    assert "corpus=b:x: write path, path:weight" in problem(f"--corpus={small}:1,b:x")
    other = problem(f"--corpus={small}", f"--tokenizer={bpe_file}")
    assert "was prepared with tokenizer 'bytes', not 'tokenizer.json" in other
    assert "add --tokenizer=gpt2" in problem(f"--corpus={tokens}")
    assert "--val_share=0.01" in problem(f"--corpus={tokens}", "--tokenizer=bytes")
    budget = f"unique_tokens=999,999 must lie between one sequence (32) and the training ({small}) split"
    assert budget in problem(f"--corpus={small}:1:999999,{sharded}:1")
    long = problem(f"--corpus={small}", "--seq_len=4096")
    expected = "tokens, fewer than one sequence of 4,096; lower --seq_len, or prepare more text"
    assert re.search(rf"the training split has [\d,]+ {expected}$", long)
    named = problem(f"--corpus={sharded},{small}", "--seq_len=1024")
    assert re.search(rf"the training \({small}\) split has [\d,]+ tokens", named)
    assert "no corpus in 'absent'" in problem(f"--corpus={small},absent")


def test_training_meets_a_wrong_token(refused, tmp_path):
    """Large corpora are not read before training."""
    folder = tmp_path / "nano"
    folder.mkdir()
    text = []
    for tokens in byte_documents(40):
        text += [*tokens, EOS]
    write_nanogpt(folder / "train.bin", text + [60_000] + text)
    write_nanogpt(folder / "val.bin", text)
    flags = (f"--corpus={folder}", "--tokenizer=bytes", "--epochs=1")
    wrong = "split holds token 60000, beyond its vocabulary of 257; "
    assert re.fullmatch(rf"train.py: step \d+: the training {wrong}.*\n", refused(*flags))
    write_nanogpt(folder / "val.bin", text[:40] + [60_000] + text)
    error = refused(*flags, "--eval_rows=0", run="other")
    assert re.fullmatch(rf"train.py: the validation {wrong}.*\n", error)


def test_bits_per_byte_where_the_tokenizer_changes_the_text(run_main, tmp_path):
    """48006ab counted the space that Llama 2's tokenizer writes before each document as text."""
    file = write_llama(tmp_path / "tokenizer.json")
    texts = write_jsonl(tmp_path / "x.jsonl", [f"{i} ok" for i in range(300)])
    meta = prepared(tmp_path / "short", texts, tokenizer=str(file), val=0.5)["val"]
    run = run_main(f"--corpus={tmp_path / 'short'}", "--steps=2", "--seq_len=8", "--eval_rows=0")
    line = [m for m in read_metrics(run) if "val_loss" in m][-1]
    bytes_per_token = line["val_loss"] / math.log(2) / line["val_bpb"]
    assert bytes_per_token == pytest.approx(meta["bytes"] / (meta["tokens"] - 1), rel=0.01)
