"""eval.py as its users run it: the figures of training again, on any ranks and batches; files; bad input."""

import csv
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, prepared
from evaluation_fixtures import last_validation, newest_report, write_lines

import data
import eval as evaluation
from evaluation import compare, likelihood, report
from training.log import read_rows


def square(i):
    """A sentence of the corpus."""
    return f"{i} squared is {i * i}, and its double is {2 * i}.\n"


# likelihoods ------------------------------------------------------------------------------------------------

OBJECTIVES = (
    ["--objective=masked"],
    ["--objective=masked", "--loss=maskgit", "--schedule=cosine"],
    ["--objective=ar"],
    ["--objective=ar", "--ar_input_mask=0.5"],
    ["--objective=uniform", "--schedule=cosine"],
    ["--objective=uniform", "--loss=paper"],
    ["--objective=masked", "--document_attention", "--reset_positions"],
)


@pytest.mark.parametrize("flags", OBJECTIVES, ids=lambda flags: "-".join(flags).replace("--", ""))
def test_the_figures_of_training_again(run_main, run_eval, tmp_path, flags):
    """Whatever the batch, each row's value too; a fresh pass is another estimate of the same."""
    run = run_main("--steps=5", "--eval_rows=13", *flags)
    logged, (about, ids, values) = last_validation(run), read_rows(run)
    for micro in (1, 32):
        out = tmp_path / f"e{micro}"
        text, report = run_eval(run, f"--micro_batch={micro}", out=out)
        bound = report["bound"]
        assert bound["nats_per_token"] == pytest.approx(logged["val_loss"], rel=1e-6)
        assert bound["bits_per_byte"] == pytest.approx(logged["val_bpb"], rel=1e-6)
        assert bound["error"] == pytest.approx(logged["val_error"], rel=1e-5)
        assert bound["perplexity"] == pytest.approx(math.exp(bound["nats_per_token"]))
        again = read_rows(out, "evaluation.npz")
        assert {k: again[0][k] for k in compare.SAME} == {k: about[k] for k in compare.SAME}
        assert again[0]["error"] == pytest.approx(about["error"], rel=1e-5)
        assert again[1].tolist() == ids.tolist() and again[2] == pytest.approx(values, rel=1e-5)
        assert f"train.py logged {logged['val_loss']:.4f}" in text
    bound = run_eval(run, "--passes=3", "--rows=-1", out=tmp_path / "fresh")[1]["bound"]
    assert bound["rows"] > 100 and bound["passes"] == (1 if "--objective=ar" in flags else 3)
    assert abs(bound["nats_per_token"] - logged["val_loss"]) < 5 * (bound["error"] + logged["val_error"])


SHARED = ["--rows=40", "--passes=2", "--bins=0", "--device=cpu"]
ORDERED = ["--ordered=left_to_right,confidence,random", "--ordered_rows=5"]


def assert_equal_figures(report, other):
    """The bounds and the likelihoods in an order of two eval.json are equal to rounding."""
    for key in ("nats_per_token", "error", "bits_per_byte"):
        assert report["bound"][key] == pytest.approx(other["bound"][key], abs=1e-6), key
    assert report.get("ordered", {}).keys() == other.get("ordered", {}).keys()
    for order, line in report.get("ordered", {}).items():
        expected = other["ordered"][order]["nats_per_token"]
        assert line["nats_per_token"] == pytest.approx(expected, abs=2e-6), order


@pytest.mark.parametrize("objective", ["masked", "uniform", "ar"])
def test_batches_and_the_compiler_change_nothing(run_main, run_eval, without_codegen, tmp_path, objective):
    run = run_main("--steps=5", f"--objective={objective}")
    shared = SHARED + (ORDERED if objective == "masked" else [])
    _, report = run_eval(run, *shared, out=tmp_path / "plain")
    _, of_single_rows = run_eval(run, *shared, "--micro_batch=1", out=tmp_path / "rows")
    assert_equal_figures(of_single_rows, report)
    graphs = without_codegen()
    _, compiled = run_eval(run, *shared, "--compile", out=tmp_path / "compiled")
    assert_equal_figures(compiled, report)
    assert graphs["stats"]["unique_graphs"] > 0


TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.mark.parametrize("objective", [
    "masked", pytest.param("uniform", marks=pytest.mark.slow), pytest.param("ar", marks=pytest.mark.slow)])
def test_ranks_change_nothing(run_main, run_eval, tmp_path, objective):
    run = run_main("--steps=5", f"--objective={objective}")
    shared = SHARED + (ORDERED if objective == "masked" else [])
    _, report = run_eval(run, *shared, out=tmp_path / "one")
    flags = [*shared, f"--run_dir={run}", "--micro_batch=5", f"--out={tmp_path / 'two'}"]
    done = subprocess.run([*TWO_RANKS, "eval.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_equal_figures(json.loads((tmp_path / "two/eval.json").read_text(encoding="utf-8")), report)


@pytest.mark.slow
def test_the_compiler_s_own_code_changes_nothing(run_main, run_eval, tmp_path):
    run = run_main("--steps=5")
    _, report = run_eval(run, *SHARED, out=tmp_path / "plain")
    _, compiled = run_eval(run, *SHARED, "--compile", out=tmp_path / "compiled")
    assert_equal_figures(compiled, report)


def test_the_curve_of_a_uniform_model(run_main, run_eval):
    run = run_main("--steps=60", "--lr=1e-2", "--objective=uniform", "--loss=paper")
    _, report = run_eval(run, "--rows=300", "--bins=4", "--passes=3")
    bound, curve = report["bound"], report["bound"]["curve"]
    integral = sum(line["nats"] for line in curve) / 4
    assert integral == pytest.approx(bound["nats_per_token"], abs=4 * bound["error"])
    assert curve[0]["clean_ce"] < curve[-1]["clean_ce"] and all(line["noisy_ce"] > 1 for line in curve)
    noisy = np.mean([line["noisy_ce"] for line in curve])
    assert noisy == pytest.approx(last_validation(run)["val_noisy"], rel=0.1)  # which is under uniform t


def test_ordered_likelihoods_and_the_bound(run_main, run_eval):
    """On the same rows: a random order's mean is the bound; the surest position first is no worse."""
    run = run_main("--steps=150", "--lr=1e-2")
    orders = ("left_to_right", "confidence", "random")
    flags = ["--bound=False", "--passes=24", f"--ordered={','.join(orders)}", "--ordered_rows=32"]
    text, report = run_eval(run, *flags)
    bound, left, confidence, random = (report["ordered"][name] for name in ("bound", *orders))
    assert abs(random["below_bound"]) < 4 * random["below_bound_error"]
    difference = bound["nats_per_token"] - random["nats_per_token"]
    assert random["below_bound"] == pytest.approx(difference, abs=1e-9)
    assert confidence["below_bound"] > -4 * confidence["below_bound_error"]
    assert len(left["values"]) == 32 and 0 < left["below_bound_error"] < left["error"] + bound["error"]
    for order, line in zip(orders, (left, confidence, random)):
        side = "below" if line["below_bound"] >= 0 else "above"
        error = line["below_bound_error"]
        difference = rf"{abs(line['below_bound']):.4f} ± {error:.4f} {side} their bound"
        assert re.search(rf"^exact, {order} .* {difference}$", text, re.M)


def test_dropout_and_documents_are_as_they_were_trained(run_main, run_eval, monkeypatch):
    """No dropout in any measurement, whatever came before; attention within documents in all of them."""
    run = run_main("--steps=40", "--lr=1e-2", "--dropout=0.5", "--document_attention", "--reset_positions")
    chain_rule, calls = likelihood.chain_rule, []

    def recorded(objective, x, order, mask_id, autocast, seed, row_numbers, documents, positions, *rest):
        calls.append((x, documents, positions))
        return chain_rule(
            objective, x, order, mask_id, autocast, seed, row_numbers, documents, positions, *rest)

    monkeypatch.setattr(likelihood, "chain_rule", recorded)
    flags = ["--ordered=left_to_right", "--ordered_rows=6", "--samples=3", "--match="]
    _, alone = run_eval(run, "--bound=False", *flags)
    _, after_the_bound = run_eval(run, "--rows=16", *flags)
    assert alone["ordered"] == after_the_bound["ordered"] and alone["texts"] == after_the_bound["texts"]
    _, report = run_eval(run, "--bound=False", "--passes=24", "--ordered=random", "--ordered_rows=32")
    random = report["ordered"]["random"]
    assert abs(random["below_bound"]) < 4 * random["below_bound_error"]
    assert calls
    for x, documents, positions in calls:  # a document begins after its separator, and is counted from there
        ends = x[:, :-1] == 256
        assert (documents[:, 1:] != documents[:, :-1]).sum() == ends.sum()
        assert (positions[:, 1:][ends] == 0).all()


# files ------------------------------------------------------------------------------------------------------


def test_the_curve_is_written_and_drawn(run_main, run_eval):
    run = run_main("--steps=6")
    text, report = run_eval(run, "--rows=100", "--bins=5", "--passes=2")
    bound, lines = (
        report["bound"],
        list(csv.DictReader((newest_report(run) / "noise.csv").open(encoding="utf-8"))),
    )
    assert len(lines) == 5 and list(lines[0]) == ["noise_ratio", "nats", "error", "rows"]
    assert sum(int(line["rows"]) for line in lines) == 200
    integral = np.mean([float(line["nats"]) for line in lines])
    assert integral == pytest.approx(bound["nats_per_token"], rel=0.05)
    assert (newest_report(run) / "noise.png").read_bytes()[:4] == b"\x89PNG"
    assert "noise alone ±" in text and 0 < bound["noise_error"] < bound["error"]


def test_other_measurements_of_a_checkpoint_stay(run_main, run_eval):
    """And a bound from more rows is not replaced by one from fewer."""
    run = run_main("--steps=3")
    _, first = run_eval(run, "--rows=100", "--passes=2", "--bins=0")
    flags = ["--bound=False", "--ordered=left_to_right,confidence", "--ordered_rows=6"]
    text, second = run_eval(run, *flags)
    assert second["bound"] == first["bound"] and text.count("nats/token") == 3
    assert list(second["ordered"]) == ["bound", "left_to_right", "confidence"]
    assert second["settings"]["bound"]["rows"] == 100 and second["settings"]["ordered"]["ordered_rows"] == 6
    text, third = run_eval(run, "--rows=20")
    assert third["bound"] == first["bound"] and "kept in" in text
    assert len(read_rows(newest_report(run), "evaluation.npz")[2]) == 100
    _, fourth = run_eval(run, "--rows=100", "--passes=3")
    assert fourth["bound"]["passes"] == 3 and fourth["ordered"] == second["ordered"]


def test_each_checkpoint_has_a_report_of_its_own(run_main, run_eval, monkeypatch):
    run = run_main("--steps=6", "--save_every=3")
    run_eval(run, "--rows=8", "--bins=0")
    early, newest = run / "eval_00000003", run / "eval_00000006"
    flags = ["--bound=False", "--ordered=random", "--ordered_rows=3"]
    _, report = run_eval(run / "step_00000003", *flags, out=early)
    assert "bound" not in report and list(report["ordered"]) == ["bound", "random"] and report["step"] == 3
    flags = ["--device=cpu", "--rows=8", "--bins=0"]
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--run_dir={run / 'step_00000003'}", *flags])
    evaluation.main()
    assert json.loads((early / "eval.json").read_text(encoding="utf-8"))["bound"]["rows"] == 8
    assert json.loads((newest / "eval.json").read_text(encoding="utf-8"))["step"] == 6


@pytest.mark.parametrize("text", ("[1]", "", '{"checkpoint": "x", "bound": {"rows": "8"}}'))
def test_a_report_that_is_none_is_not_replaced(run_main, run_eval, capsys, text):
    run = run_main("--steps=3")
    path = run / "eval_00000003/eval.json"
    path.parent.mkdir()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        run_eval(run, "--rows=8", "--bins=0", out=path.parent)
    assert stop.value.code == 2 and path.read_text(encoding="utf-8") == text
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"eval.py: {path}") and line.endswith("; move it away, or give --out")


def test_the_path_of_a_run_makes_no_difference_to_its_report(run_main, run_eval):
    run = run_main("--steps=3")
    run_eval(run, "--rows=8", "--bins=0")
    (run.parent / "elsewhere").mkdir()
    _, report = run_eval(run.parent / "elsewhere" / ".." / run.name, "--rows=8", "--bins=0")
    assert list(report)[:2] == ["checkpoint", "step"]
    text = (newest_report(run) / "eval.json").read_text(encoding="utf-8")
    assert "NaN" not in text and '"noise_error": null' in text  # with one pass


def test_another_text_is_named_as_such(run_main, run_eval, tmp_path):
    """The same corpus elsewhere is the run's own. Another one is not, and is not compared with training's."""
    run = run_main("--steps=3")
    own = json.loads((run / "settings.json").read_text(encoding="utf-8"))["corpus"]
    shutil.copytree(own, tmp_path / "moved")
    (tmp_path / "cubes.txt").write_text(
        "".join(f"{i} cubed is {i**3}.\n" for i in range(1500)), encoding="utf-8"
    )
    prepared(tmp_path / "other", tmp_path / "cubes.txt")
    for name, is_own in (("moved", True), ("other", False)):
        flags = [f"--corpus={tmp_path / name}", "--samples=2", "--match=8"]
        text, report = run_eval(run, *flags, out=tmp_path / f"out_{name}")
        assert report["bound"]["own_text"] == report["texts"]["own_text"] == is_own
        assert ("train.py logged" in text) == ("copied from the training text" in text) == is_own
        assert ("another text than in training" in text) != is_own


# texts ------------------------------------------------------------------------------------------------------


def test_texts_that_it_writes(run_main, run_eval):
    run, judge = run_main("--steps=3"), run_main("--steps=3", "--objective=ar", run="judge")
    flags = ["--bound=False", "--samples=6", f"--judge={judge}", "--match=4,8", "--length=20"]
    text, report = run_eval(run, *flags)
    texts = report["texts"]
    assert texts["texts"] == 6 and texts["tokens"] == 120 and len(texts["pairs"]) == 6
    assert texts["entropy"]["mean"] == pytest.approx(np.mean([entropy for entropy, _ in texts["pairs"]]))
    assert texts["nll"]["mean"] == pytest.approx(np.mean([nll for _, nll in texts["pairs"]]))
    assert texts["nll"]["error"] > 0
    assert list(texts["distinct"]) == ["1", "2", "3", "4"] and 0 < texts["distinct"]["1"] <= 1
    own, held_out = (texts["copies"][name]["lengths"] for name in ("texts", "held_out"))
    assert list(held_out) == ["4", "8"]
    assert held_out["4"]["windows"] > 0.9 > own["8"]["windows"]  # regular sentences; noise
    assert "entropy" in text and "NLL under" in text and "distinct-n" in text
    _, report = run_eval(judge, "--bound=False", "--samples=4", "--length=9", "--match=", f"--judge={judge}")
    assert report["texts"]["tokens"] == 36


def test_texts_of_a_file(run_main, run_eval, tmp_path):
    """The training text itself, as if somebody had written it: copied from end to end."""
    run, judge = run_main("--steps=3"), run_main("--steps=3", "--objective=ar", run="judge")
    lines = [dict(text=square(i), new=square(i).removeprefix(str(i))) for i in (100, 101, 700)]
    write_lines(tmp_path / "texts.jsonl", lines)
    flags = [f"--texts={tmp_path / 'texts.jsonl'}", f"--judge={judge}", "--match=8,16"]
    texts = run_eval(run, "--bound=False", *flags, out=tmp_path)[1]["texts"]
    copies = texts["copies"]["texts"]
    assert copies["lengths"]["16"]["rows"] >= 2 / 3 and copies["longest"] >= 30
    assert texts["tokens"] == sum(len(line["new"]) for line in lines)
    (tmp_path / "plain.jsonl").write_text('{"text": "one and one"}\n{"text": "two"}\n', encoding="utf-8")
    flags = [f"--texts={tmp_path / 'plain.jsonl'}", "--match="]
    assert run_eval(run, "--bound=False", *flags, out=tmp_path / "plain")[1]["texts"]["tokens"] == 14


def test_texts_that_sample_py_wrote(run_main, run_eval, monkeypatch, tmp_path):
    import sample

    run, file = run_main("--steps=3"), tmp_path / "own.jsonl"
    flags = ["--prompt=7 squared", "--length=12", "--batch=3", "--device=cpu", f"--out={file}"]
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", *flags])
    sample.main()
    texts = run_eval(run, "--bound=False", f"--texts={file}", "--match=", out=tmp_path / "own")[1]["texts"]
    assert texts["texts"] == 3 and not {"nll", "copies"} & set(texts)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    assert texts["tokens"] == sum(len(line["new_ids"]) for line in lines) == 36
    assert all(line["ids"][-12:] == line["new_ids"] for line in lines)


def test_copies_are_of_the_text_that_the_run_has_read(run_main, run_eval, tmp_path):
    """A run on few unique tokens is not charged with copying the rest of the corpus."""
    write_lines(tmp_path / "t.jsonl", [dict(text=square(i), new=square(i)) for i in range(100, 140)])
    shares = {}
    for name, flags in (("few", ["--unique_tokens=320"]), ("all", [])):
        run = run_main("--steps=3", *flags, run=name)
        _, report = run_eval(run, "--bound=False", f"--texts={tmp_path / 't.jsonl'}", "--match=20")
        shares[name] = report["texts"]["copies"]["texts"]["lengths"]["20"]["windows"]
    assert shares["few"] < 0.5 < shares["all"]


# bad input, and what ends a process -------------------------------------------------------------------------


def assert_refused(run_eval, capsys, message, run, *flags):
    """It ends with one line, and nothing is written."""
    with pytest.raises(SystemExit) as exit_:
        run_eval(run, *flags)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and message in err and "Traceback" not in err
    assert not list(run.glob("eval_*/eval.json"))


@pytest.mark.parametrize("flags, message", [
    (["--ordered=leftt"], "ordered: there is no 'leftt'"),
    (["--match=4,x"], "match: 'x' is no length"),
    (["--samples=2", "--texts=x"], "give samples"),
    (["--judge=x"], "judge=x needs samples or texts"),
    (["--bound=False"], "nothing to do"),
    (["--texts=nowhere.jsonl"], "no such file"),
    (["--task_data=nowhere", "--tasks=x"], "task_data=nowhere: no such folder"),
    (["--corpus=nowhere"], "no corpus in 'nowhere'"),
    (["--samples=3", "--judge=RUN"], "is a masked model; its NLL would not be exact"),
    (["--samples=1"], "one text has no error"),
    (["--samples=3", "--judge=SHORT", "--length=20"], "more than the judge's context of 16"),
    (["--samples=3", "--length=99"], "more than the model's context of 32"),
    (["--samples=3", "--length=99", "--tasks=downloaded"], "more than the model's context of 32"),
    (["--samples=2", "--order=first_hitting", "--steps=4"], "leave steps out"),
    (["--rows=-2"], "must be at least -1"),
    (["--passes=0"], "must be at least 1"),
    (["--run_dir=nowhere"], "no usable checkpoint"),
    (["--watch=RUN"], "give run_dir or watch"),
])
def test_bad_input_ends_in_one_line(run_main, run_eval, capsys, flags, message):
    run = run_main("--steps=3")
    if "--judge=SHORT" in flags:
        short = run_main("--steps=3", "--objective=ar", "--seq_len=16", run="short")
        flags = [flag.replace("SHORT", str(short)) for flag in flags]
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    assert_refused(run_eval, capsys, message, run, *flags)


@pytest.mark.parametrize("objective, flags, message", [
    ("uniform", ["--ordered=left_to_right"], "no chain rule"),
    ("ar", ["--ordered=confidence"], "has one order"),
    ("ar", ["--samples=2", "--steps=3"], "steps=3 has no meaning for objective=ar"),
    ("ar", ["--samples=2", "--order=margin"], "order=margin has no meaning for objective=ar"),
    ("uniform", ["--samples=2", "--block=4"], "block=4 has no meaning for objective=uniform"),
])
def test_settings_that_mean_nothing_for_an_objective(run_main, run_eval, capsys, objective, flags, message):
    assert_refused(run_eval, capsys, message, run_main("--steps=3", f"--objective={objective}"), *flags)


def test_texts_that_are_no_texts(run_main, run_eval, capsys, tmp_path):
    run, file = run_main("--steps=3"), tmp_path / "t.jsonl"
    for text, message in (
        ("{}\n", "line 1: expected what sample.py --out writes"),
        ("[1]\n", "line 1"), ("not json\n", "line 1"), ("", "fewer than two texts"),
        ('{"text": "a", "ids": [999]}\n', "ids of another tokenizer"),
        ('{"text": 3}\n', "line 1"),
    ):
        file.write_text(text, encoding="utf-8")
        assert_refused(run_eval, capsys, message, run, "--bound=False", f"--texts={file}")


def test_help_names_the_other_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--help"])
    with pytest.raises(SystemExit):
        evaluation.main()
    text = capsys.readouterr().out
    assert "eval.py compare" in text and "eval.py frontier" in text and "--watch" in text


def test_figures_are_kept_before_they_are_printed(run_main, run_eval, monkeypatch, tmp_path, capsys):
    """And a picture that can't be drawn costs no more than itself."""
    def fail(*_):
        raise OSError(28, "No space left on device")

    def nobody_reads(*_):
        raise SystemExit(141)

    run, out = run_main("--steps=3"), tmp_path / "out"
    monkeypatch.setattr(report, "draw_curve", fail)
    text, _ = run_eval(run, "--rows=8", "--bins=2", out=out)
    assert text.endswith(f"written to {out}: eval.json, evaluation.npz, noise.csv\n")
    monkeypatch.setattr(report, "print_report", nobody_reads)
    with pytest.raises(SystemExit):
        run_eval(run, "--rows=8", "--bins=2", out=tmp_path / "again")
    warning = "again/noise.png can't be drawn (OSError: [Errno 28] No space left on device)"
    assert warning in capsys.readouterr().err
    assert json.loads((tmp_path / "again/eval.json").read_text(encoding="utf-8"))["bound"]["rows"] == 8


def test_an_exception_on_a_rank_is_said(run_main):
    """An unexpected one on two ranks: its text, and an exit code."""
    run = run_main("--steps=3")
    code = (f"import eval, sys; from evaluation import measure; measure.measure_bound = lambda *a: 1 / 0; "
            f"sys.argv = ['eval.py', '--run_dir={run}', '--device=cpu']; eval.main()")
    command = [*TWO_RANKS, "--no-python", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr


def test_ctrl_c_is_one_line(run_main, tmp_path):
    run, out = run_main("--steps=3"), tmp_path / "out"
    flags = ["--device=cpu", "--passes=100000", f"--out={out}"]
    command = [sys.executable, "eval.py", f"--run_dir={run}", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "masked" in process.stdout.readline()  # the header: it has begun
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "eval.py: interrupted; nothing was written\n"
    assert not list(out.glob("*"))


def test_noise_is_never_that_of_training():
    assert data.VALIDATION_SEED > 2**62  # the largest seed that settings allow
