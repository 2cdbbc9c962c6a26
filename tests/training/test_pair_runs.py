"""Runs on question-answer pairs: as every run they resume, accumulate, compile, are evaluated; a chat."""

import hashlib
import io
import json
import math
import shutil
import sys

import numpy as np
import pytest
from conftest import prepared
from runs import assert_close_figures, equal_runs, figures

import data
import sample
from corpus import chat
from corpus.tokenfiles import load_corpus
from evaluation import likelihood
from evaluation.answers import Question, Scorer, score
from sampling.generator import Generator
from training.log import read_metrics
from training.objective import Objective

KINDS = {
    "ar": ["--objective=ar"],
    "masked": ["--eos_padding=row"],
    "packed": [],
    "uniform": ["--objective=uniform"],
    "block": ["--diffusion_block=4", "--eos_padding=block"],
}


@pytest.fixture(scope="session")
def pairs_corpus(tmp_path_factory):
    """Additions below 24 in bytes; a few pairs are longer than a row."""
    folder = tmp_path_factory.mktemp("pairs")
    records = [dict(prompt=f"{a}+{b}=", answer=str(a + b)) for a in range(24) for b in range(24)]
    records += [dict(prompt=f"Tell me of {i}.", answer=f"{i} " * 40) for i in range(9)]
    records += [dict(prompt=f"{i} is so much more than enough for a row", answer="yes") for i in range(9)]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    prepared(folder / "pairs", path, sft=True, val=0.2)
    return folder / "pairs"


@pytest.fixture
def run_pairs(run_main, pairs_corpus):
    def call(kind, *flags, run="run", **others):
        return run_main(f"--corpus={pairs_corpus}", *KINDS[kind], *flags, run=run, **others)

    return call


def test_what_is_packed_cut_and_left_out_is_said(run_pairs, capsys):
    run_pairs("packed", "--steps=1")
    output = capsys.readouterr().out
    assert "training: " in output and "question-answer pairs in " in output and " rows, " in output
    assert "of them cut; " in output and "are left out, as their answers don't fit" in output
    run_pairs("packed", "--steps=1", "--long_pairs=skip", run="skip")
    output = capsys.readouterr().out
    assert "of them cut" not in output and "are left out" in output


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_and_resumed_it_is_the_same_run(run_pairs, kind):
    """Micro-batches add up to the step, to rounding; a resumed run is the uninterrupted one bit for bit."""
    flags = ["--log_every=1", "--steps=8"]
    whole = run_pairs(kind, *flags, run="whole")
    parts = run_pairs(kind, *flags, "--micro_batch=2", run="parts")
    assert_close_figures(whole, parts, 2e-4)
    kept = run_pairs(kind, *flags, "--save_every=4", run="resumed")
    shutil.rmtree(kept / "step_00000008")
    assert equal_runs(run_pairs(kind, *flags, "--resume=auto", run="resumed"), whole)
    assert (whole / chat.FILE).read_text(encoding="utf-8") == chat.PLAIN


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_change_nothing(train_on, pairs_corpus, tmp_path, kind):
    flags = [f"--corpus={pairs_corpus}", *KINDS[kind], "--log_every=1", "--steps=6"]
    train_on(1, *flags, f"--run_dir={tmp_path / 'one'}")
    train_on(2, *flags, f"--run_dir={tmp_path / 'two'}", "--micro_batch=2")
    assert_close_figures(tmp_path / "one", tmp_path / "two", 2e-4)


@pytest.mark.parametrize("kind", ("ar", "packed", "block"))
def test_compiled_it_is_the_eager_run(run_pairs, without_codegen, kind):
    counters = without_codegen()
    eager = run_pairs(kind, "--steps=8", "--eval_every=5", run="eager")
    run = run_pairs(kind, "--steps=8", "--eval_every=5", "--compile=whole", run="compiled")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert_close_figures(eager, run, 1e-3)


def test_epochs_read_every_row_once(run_pairs, pairs_corpus, monkeypatch):
    """Two epochs of the packed rows, in two orders."""
    read, epochs = [], []
    plain = data.PairRows.read

    def recorded(self, ids):
        if self.split == "training":
            read.extend(ids.tolist())
            epochs.append(self.n)
        return plain(self, ids)

    monkeypatch.setattr(data.PairRows, "read", recorded)
    run_pairs("packed", "--epochs=2", "--batch_size=1", "--log_every=1000")
    n = epochs[0]
    assert sorted(read[:n]) == sorted(read[n : 2 * n]) == list(range(n)) and read[:n] != read[n : 2 * n]


# ------------------------------------------------------------------------------------------------- evaluation


def validation_pairs(corpus, length=32):
    """[(prompt, answer)] of those validation pairs that fit into a row, in ids."""
    loaded = load_corpus(corpus)
    pairs = []
    for start, n_prompt, n_answer in zip(*(part.tolist() for part in loaded.val_pairs)):
        ids = loaded.val.read(start, start + n_prompt + n_answer).tolist()
        if len(ids) <= length:
            pairs.append((ids[:n_prompt], ids[n_prompt:]))
    return pairs


@pytest.mark.parametrize("kind", ("ar", "packed", "block"))
def test_the_validation_is_the_conditional_bound(run_pairs, run_eval, pairs_corpus, kind):
    """Per answer token, against answers.py; eval.py repeats it, and says nats per answer, bits per byte."""
    run = run_pairs(kind, "--steps=30", "--lr=1e-2", "--eval_rows=0", "--long_pairs=skip",
                    *(["--eos_padding=none"] if kind == "block" else []))
    pairs = validation_pairs(pairs_corpus)
    generator = Generator.from_checkpoint(run, "cpu", "float32").load_weights()
    context = [generator.tokenizer.eos_id] if kind == "ar" else []
    scorer = Scorer(Objective(generator.model, False), generator.process, generator.device)
    questions = [Question(context + prompt, answer, str(i)) for i, (prompt, answer) in enumerate(pairs)]
    bound = -score(scorer, questions, generator.tokenizer.eos_id, greedy=False)[0].sum()
    n_tokens = sum(len(answer) for _, answer in pairs)
    n_bytes = n_tokens - len(pairs)

    output, report = run_eval(run, *([] if kind == "ar" else ["--passes=60"]))
    measured = report["bound"]
    tolerance = 1e-5 if kind == "ar" else 4 * measured["noise_error"] / measured["nats_per_token"] + 1e-3
    assert tolerance < 0.05
    assert measured["nats_per_token"] == pytest.approx(bound / n_tokens, rel=tolerance)
    assert measured["nats_per_answer"] == pytest.approx(bound / len(pairs), rel=tolerance)
    assert measured["answers"] == len(pairs) and "curve" not in measured
    assert measured["bits_per_byte"] == pytest.approx(bound / n_bytes / math.log(2), rel=tolerance)
    assert "of answers given their prompts" in output
    if kind == "ar":
        last = [m for m in read_metrics(run) if "val_loss" in m][-1]
        assert measured["nats_per_token"] == pytest.approx(last["val_loss"], rel=1e-6)
        assert measured["bits_per_byte"] == pytest.approx(last["val_bpb"], rel=1e-6)


def test_the_error_is_of_a_ratio():
    """Rows with few and with many answer tokens: 95 % intervals hold the mean over all tokens."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        n = rng.integers(1, 40, 64)
        nats = np.array([rng.normal(2.0, 1.0, k).sum() for k in n])
        weights = n / n.mean()
        losses = likelihood.RowLosses((nats / n.mean())[None, :, None, None], np.arange(64)[None], [],
                                      weights[None])
        error, _ = likelihood.standard_error(losses, exact=True)
        inside.append(abs(nats.sum() / n.sum() - 2.0) < 1.96 * error)
    assert 0.92 < np.mean(inside) < 0.98
    plain = likelihood.RowLosses((nats / n.mean())[None, :, None, None], np.arange(64)[None], [])
    assert likelihood.standard_error(plain, exact=True)[0] > 3 * error


# -------------------------------------------------------------------------------------------- answers, a chat


@pytest.fixture(scope="module")
def knowing(tmp_path_factory, train_on):
    """A model of each kind that knows the answers to five questions by heart: {kind: run}."""
    folder = tmp_path_factory.mktemp("knowing")
    records = [dict(prompt=question, answer=answer) for question, answer in KNOWN.items()]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in 30 * records), encoding="utf-8")
    prepared(folder / "pairs", path, sft=True, val=0.5, dedup=False)
    runs = {}
    for kind in ("ar", "masked", "block"):
        runs[kind] = folder / kind
        # what is for training and for validation is by chance: both are learned
        corpus = f"--corpus={folder / 'both'}"
        if not (folder / "both").exists():
            merge_splits(folder / "pairs", folder / "both")
        train_on(1, corpus, *KINDS[kind], "--steps=250", "--lr=1e-2", "--local_init", "--optimizer=muon",
                 f"--run_dir={folder / kind}")
    return runs


KNOWN = {"What is the sky?": "blue", "Who is there?": "nobody", "2+2": "4", "Why?": "because", "Hello": "hi"}


def merge_splits(folder, out):
    """A corpus whose training split has the validation split's pairs, too."""
    shutil.copytree(folder, out)
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    for kind, dtype, key in (("", np.uint16, "files"), ("answers_", np.uint8, "answer_files")):
        parts = [np.fromfile(out / f"{kind}{split}.bin", dtype) for split in ("train", "val")]
        whole = np.concatenate((parts[0], parts[1][1:]))
        whole.tofile(out / f"{kind}train.bin")
        digest = hashlib.sha256(whole.tobytes()).hexdigest()
        meta["train"][key] = [dict(name=f"{kind}train.bin", tokens=len(whole), sha256=digest)]
    (out / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def chat_with(monkeypatch, capsys, run, lines, *flags):
    """sample.py --chat in this process, on these lines of standard input; returns (stdout, stderr)."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", "--chat", "--device=cpu", *flags])
    capsys.readouterr()
    sample.main()
    return capsys.readouterr()


@pytest.mark.parametrize("kind", ("ar", "masked", "block"))
def test_it_answers_and_eval_counts_it(knowing, kind, run_eval, monkeypatch, capsys):
    """A single question, a chat line by line, and eval.py --answers."""
    run = knowing[kind]
    for question, answer in KNOWN.items():
        output, _ = chat_with(monkeypatch, capsys, run, [], f"--prompt={question}", "--temperature=0")
        assert output == f"{answer}\n"
    length = [] if kind == "masked" else ["--length=9"]
    output, _ = chat_with(monkeypatch, capsys, run, ["Why?", "", "2+2"], "--temperature=0", *length)
    assert output.splitlines()[0] == "because" and len(output.splitlines()) == 3
    output, report = run_eval(run, "--answers=40", "--bound=False")
    assert report["answers"]["exact_match"] == 1.0 and "answers written: 100.0%" in output
    assert report["answers"]["answers"] <= 40


def test_a_chat_forgets_its_first_turns(knowing, monkeypatch, capsys):
    """When there is no room any more; a question without any is said, and the chat goes on."""
    lines = ["Hello", "x" * 40, *["Hello"] * 6]
    output, error = chat_with(monkeypatch, capsys, knowing["ar"], lines, "--temperature=0", "--length=4")
    assert len(output.splitlines()) == 8 and output.startswith("hi\n")
    assert error.count("no room for an answer of 4") == 1


def test_chat_needs_no_settings_of_texts(knowing, monkeypatch, capsys):
    for flag in ("--show", "--batch=2", "--text=[MASK]", "--suffix=x"):
        with pytest.raises(SystemExit):
            chat_with(monkeypatch, capsys, knowing["ar"], [], flag)
        assert "chat answers questions one by one: leave" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={knowing['ar']}", "--system=x"])
    with pytest.raises(SystemExit):
        sample.main()
    assert "system=x needs chat" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, problem", [
    (["--short_rows=0.5"], "short_rows=0.5 has no meaning"),
    (["--document_attention"], "document_attention=True has no meaning"),
    (["--unique_tokens=64"], "unique_tokens=64 has no meaning"),
    (["--objective=ar", "--ar_input_mask=0.2"], "ar_input_mask=0.2 has no meaning"),
    (["--eos_padding=block"], "eos_padding=block needs diffusion_block"),
    (["--seq_len=2"], "no question-answer pair that has a place"),
    (["--seq_len=8", "--long_pairs=skip"], ""),
])
def test_settings_that_pairs_have_no_use_for(refused, run_pairs, pairs_corpus, flags, problem):
    if not problem:
        run_pairs("packed", "--steps=1", *flags)
        return
    assert problem in refused(f"--corpus={pairs_corpus}", "--steps=1", *flags)


def test_text_and_pairs_do_not_mix(refused, corpus, pairs_corpus):
    assert "pairs and text don't mix" in refused(f"--corpus={corpus},{pairs_corpus}", "--steps=1")
    assert "which is text" in refused("--steps=1", "--eos_padding=row")
    assert "unique tokens are of text" in refused(f"--corpus={pairs_corpus}:1:64", "--steps=1")


def test_two_corpora_of_pairs(run_main, pairs_corpus, tmp_path):
    records = [dict(prompt=f"is {i} odd?", answer="no" if i % 2 == 0 else "yes") for i in range(200)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    prepared(tmp_path / "odd", path, sft=True)
    odd = tmp_path / "odd"
    for number, corpora in enumerate((f"{pairs_corpus},{odd}", f"{pairs_corpus}:1,{odd}:3")):
        run = run_main(f"--corpus={corpora}", "--steps=4", run=f"run{number}")
        assert len(figures(run)) > 1


def test_eval_of_the_other_kind(run_main, run_pairs, run_eval, corpus, pairs_corpus, capsys):
    """Of text by a model of pairs, and the other way: settings of the one do not stand in the way."""
    answering = run_pairs("masked", "--steps=2", run="answering")
    output, report = run_eval(answering, f"--corpus={corpus}", "--rows=16")
    assert "answers" not in report["bound"] and "another text than in training" in output
    reading = run_main("--steps=2", "--document_attention", run="reading")
    _, report = run_eval(reading, f"--corpus={pairs_corpus}", "--rows=16")
    assert report["bound"]["answers"] > 0
    for flags, problem in (([f"--corpus={pairs_corpus}", "--ordered=random"], "of question-answer pairs"),
                           (["--answers=3"], "is text, not")):
        with pytest.raises(SystemExit):
            run_eval(reading, *flags)
        assert problem in capsys.readouterr().err


