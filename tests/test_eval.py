"""eval.py as its users run it: the figures of training again, on any ranks and batches; files; comparisons; bad input."""

import csv
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, prepared
from test_train import run_main  # noqa: F401  (fixtures)

import data
import eval as evaluation
from evaluation import compare, likelihood
from training.log import read_metrics, read_rows


@pytest.fixture
def measure(monkeypatch, capsys):
    """Call eval.main() in this process; returns (stdout, eval.json)."""

    def call(run, *flags, out=None):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["eval.py", f"--run_dir={run}", "--device=cpu", *map(str, flags), *([f"--out={out}"] if out else [])])
        evaluation.main()
        return capsys.readouterr().out, json.loads(((out or folder(run)) / "eval.json").read_text())

    return call


def folder(run):
    """Where eval.py writes what it measured of the run's newest checkpoint."""
    return sorted(run.glob("eval_*"))[-1]


def last(run):
    return [m for m in read_metrics(run) if "val_loss" in m][-1]


OBJECTIVES = (["--objective=masked"], ["--objective=masked", "--loss=maskgit", "--schedule=cosine"], ["--objective=ar"], ["--objective=uniform", "--schedule=cosine"],
              ["--objective=uniform", "--loss=paper"], ["--objective=masked", "--document_attention", "--reset_positions"])


@pytest.mark.parametrize("flags", OBJECTIVES, ids=lambda f: "-".join(f).replace("--", ""))
def test_the_figures_of_training_again(run_main, measure, tmp_path, flags):  # noqa: F811
    """Whatever the batch, each row's value too; a fresh pass is another estimate of the same."""
    run = run_main("--steps=5", "--eval_rows=13", *flags)
    logged, rows = last(run), read_rows(run)
    for micro in (1, 32):
        out, found = measure(run, f"--micro_batch={micro}", out=tmp_path / f"e{micro}")
        b = found["bound"]
        assert b["nats_per_token"] == pytest.approx(logged["val_loss"], rel=1e-6) and b["bits_per_byte"] == pytest.approx(logged["val_bpb"], rel=1e-6)
        assert b["error"] == pytest.approx(logged["val_error"], rel=1e-5) and b["perplexity"] == pytest.approx(math.exp(b["nats_per_token"]))
        about, blocks, values = read_rows(tmp_path / f"e{micro}", "evaluation.npz")
        assert {k: about[k] for k in compare.SAME} == {k: rows[0][k] for k in compare.SAME} and about["error"] == pytest.approx(rows[0]["error"], rel=1e-5)
        assert blocks.tolist() == rows[1].tolist() and values == pytest.approx(rows[2], rel=1e-5)
        assert f"train.py logged {logged['val_loss']:.4f}" in out
    more = measure(run, "--passes=3", "--rows=-1", out=tmp_path / "more")[1]["bound"]
    assert more["rows"] > 100 and more["passes"] == (1 if "--objective=ar" in flags else 3)
    assert abs(more["nats_per_token"] - logged["val_loss"]) < 5 * (more["error"] + logged["val_error"])


@pytest.mark.parametrize("objective", ["masked", pytest.param("uniform", marks=pytest.mark.slow), pytest.param("ar", marks=pytest.mark.slow)])
def test_ranks_batches_and_the_compiler_change_nothing(run_main, tmp_path, objective):  # noqa: F811
    """1 and 2 ranks, batch 1 and 32, compiled and not: the same to 1e-6. Ordered likelihoods, too."""
    run = run_main("--steps=5", f"--objective={objective}")
    found, processes = {}, []
    for name, launcher, flags in (("plain", [sys.executable], []), ("one row", [sys.executable], ["--micro_batch=1"]), ("compiled", [sys.executable], ["--compile"]),
                                  ("two ranks", [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"], ["--micro_batch=5"])):
        more = ["--ordered=left_to_right,confidence,random", "--ordered_rows=5"] if objective == "masked" else []
        command = [*launcher, "eval.py", f"--run_dir={run}", "--device=cpu", "--rows=40", "--passes=2", f"--out={tmp_path / name}", *flags, *more]
        processes.append((name, subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)))
    for name, process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
        found[name] = json.loads((tmp_path / name / "eval.json").read_text())
    for name, report in found.items():
        for key in ("nats_per_token", "error", "bits_per_byte"):
            assert report["bound"][key] == pytest.approx(found["plain"]["bound"][key], abs=1e-6), (name, key)
        for order, line in report.get("ordered", {}).items():
            assert line["nats_per_token"] == pytest.approx(found["plain"]["ordered"][order]["nats_per_token"], abs=2e-6), (name, order)


def test_what_is_written(run_main, measure, monkeypatch):  # noqa: F811
    """The curve as CSV and PNG; other measurements of the same checkpoint stay in eval.json, those of another go."""
    run = run_main("--steps=6", "--save_every=3")
    out, first = measure(run, "--rows=100", "--bins=5", "--passes=2")
    lines = list(csv.DictReader((folder(run) / "noise.csv").open()))
    assert len(lines) == 5 and list(lines[0]) == ["noise_ratio", "nats", "error", "rows"] and sum(int(line["rows"]) for line in lines) == 200
    assert np.mean([float(line["nats"]) for line in lines]) == pytest.approx(first["bound"]["nats_per_token"], rel=0.05)  # its integral is the bound
    assert (folder(run) / "noise.png").read_bytes()[:4] == b"\x89PNG" and "noise alone ±" in out and 0 < first["bound"]["noise_error"] < first["bound"]["error"]
    out, second = measure(run, "--bound=False", "--ordered=left_to_right,confidence", "--ordered_rows=6")
    assert second["bound"] == first["bound"] and list(second["ordered"]) == ["bound", "left_to_right", "confidence"] and out.count("nats/token") == 3
    assert second["settings"]["bound"]["rows"] == 100 and second["settings"]["ordered"]["ordered_rows"] == 6
    out, third = measure(run, "--rows=20")  # a passing look
    assert third["bound"] == first["bound"] and "kept in" in out and len(read_rows(folder(run), "evaluation.npz")[2]) == 100
    _, fourth = measure(run, "--rows=100", "--passes=3")
    assert fourth["bound"]["passes"] == 3 and fourth["ordered"] == second["ordered"]
    _, early = measure(run / "step_00000003", "--bound=False", "--ordered=random", "--ordered_rows=3", out=run / "eval_00000003")
    assert "bound" not in early and list(early["ordered"]) == ["bound", "random"] and early["step"] == 3
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--run_dir={run / 'step_00000003'}", "--device=cpu", "--rows=8", "--bins=0"])
    evaluation.main()  # of a checkpoint: in a folder of its own
    assert json.loads((run / "eval_00000003/eval.json").read_text())["bound"]["rows"] == 8 and json.loads((folder(run) / "eval.json").read_text())["step"] == 6
    (folder(run) / "eval.json").write_text("[1]")
    (run.parent / "elsewhere").mkdir()
    assert list(measure(run.parent / "elsewhere" / ".." / run.name, "--rows=8", "--bins=0")[1])[:2] == ["checkpoint", "step"]
    text = (folder(run) / "eval.json").read_text()
    assert "NaN" not in text and '"noise_error": null' in text  # with one pass


def test_the_curve_of_a_uniform_model(run_main, measure):  # noqa: F811
    run = run_main("--steps=60", "--lr=1e-2", "--objective=uniform", "--loss=paper")
    _, found = measure(run, "--rows=300", "--bins=4", "--passes=3")
    curve = found["bound"]["curve"]
    assert sum(line["nats"] for line in curve) / 4 == pytest.approx(found["bound"]["nats_per_token"], abs=4 * found["bound"]["error"])
    assert curve[0]["clean_ce"] < curve[-1]["clean_ce"] and all(line["noisy_ce"] > 1 for line in curve)
    m = last(run)  # under uniform t they average to what train.py logs
    assert np.mean([line["noisy_ce"] for line in curve]) == pytest.approx(m["val_noisy"], rel=0.1)


def test_ordered_likelihoods_and_the_bound(run_main, measure):  # noqa: F811
    """On the same blocks: a random order's mean is the bound; the order in which a model is surest is no worse."""
    run = run_main("--steps=150", "--lr=1e-2")
    out, found = measure(run, "--bound=False", "--passes=24", "--ordered=left_to_right,confidence,random", "--ordered_rows=32")
    bound, left, confidence, random = (found["ordered"][o] for o in ("bound", "left_to_right", "confidence", "random"))
    assert abs(random["below_bound"]) < 4 * random["below_bound_error"] and random["below_bound"] == pytest.approx(bound["nats_per_token"] - random["nats_per_token"], abs=1e-9)
    assert confidence["below_bound"] > -4 * confidence["below_bound_error"] and len(left["values"]) == 32 and 0 < left["below_bound_error"] < left["error"] + bound["error"]
    assert "below their bound" in out


def test_dropout_and_documents_are_as_they_were_trained(run_main, measure, monkeypatch):  # noqa: F811
    """No dropout in any measurement, whatever came before; attention within documents in all of them."""
    run = run_main("--steps=40", "--lr=1e-2", "--dropout=0.5", "--document_attention", "--reset_positions")
    chain, seen = likelihood.chain, []

    def noting(objective, rows, order, mask_id, device, autocast, seed, some, documents, positions, show):
        seen.append((rows, documents, positions))
        return chain(objective, rows, order, mask_id, device, autocast, seed, some, documents, positions, show)

    monkeypatch.setattr(likelihood, "chain", noting)
    _, alone = measure(run, "--bound=False", "--ordered=left_to_right", "--ordered_rows=6", "--samples=3", "--match=")
    _, after = measure(run, "--rows=16", "--ordered=left_to_right", "--ordered_rows=6", "--samples=3", "--match=")
    assert alone["ordered"] == after["ordered"] and alone["texts"] == after["texts"]
    _, random = measure(run, "--bound=False", "--passes=24", "--ordered=random", "--ordered_rows=32")
    assert abs(random["ordered"]["random"]["below_bound"]) < 4 * random["ordered"]["random"]["below_bound_error"]
    assert seen
    for rows, documents, positions in seen:  # a document begins after its separator, and is counted from there
        assert (documents[:, 1:] != documents[:, :-1]).sum() == (rows[:, :-1] == 256).sum() and (positions[:, 1:][rows[:, :-1] == 256] == 0).all()


# texts --------------------------------------------------------------------------------------------------------------------------


def test_texts_that_it_writes_and_texts_of_a_file(run_main, measure, monkeypatch, tmp_path):  # noqa: F811
    import sample

    run, judge = run_main("--steps=3"), run_main("--steps=3", "--objective=ar", run="judge")
    out, found = measure(run, "--bound=False", "--samples=6", f"--judge={judge}", "--match=4,8", "--length=20")
    t = found["texts"]
    assert t["texts"] == 6 and t["tokens"] == 120 and len(t["pairs"]) == 6 and t["entropy"]["mean"] == pytest.approx(np.mean([e for e, _ in t["pairs"]]))
    assert t["nll"]["mean"] == pytest.approx(np.mean([nll for _, nll in t["pairs"]])) and t["nll"]["error"] > 0
    assert list(t["distinct"]) == ["1", "2", "3", "4"] and 0 < t["distinct"]["1"] <= 1 and list(t["copies"]["held_out"]["lengths"]) == ["4", "8"]
    assert t["copies"]["held_out"]["lengths"]["4"]["windows"] > 0.9 > t["copies"]["texts"]["lengths"]["8"]["windows"]  # regular sentences; noise
    assert "entropy" in out and "NLL under" in out and "distinct-n" in out
    # the training text itself, as if somebody had written it: copied from end to end
    lines = [dict(text=f"{i} squared is {i * i}, and its double is {2 * i}.\n", new=f" squared is {i * i}, and its double is {2 * i}.\n") for i in (100, 101, 700)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, found = measure(run, "--bound=False", f"--texts={tmp_path / 'texts.jsonl'}", f"--judge={judge}", "--match=8,16", out=tmp_path)
    t = found["texts"]
    assert t["copies"]["texts"]["lengths"]["16"]["rows"] >= 2 / 3 and t["copies"]["texts"]["longest"] >= 30 and t["tokens"] == sum(len(line["new"]) for line in lines)
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", "--prompt=7 squared", "--length=12", "--batch=3", "--device=cpu", f"--out={tmp_path / 'own.jsonl'}"])
    sample.main()
    _, found = measure(run, "--bound=False", f"--texts={tmp_path / 'own.jsonl'}", "--match=", out=tmp_path / "own")
    assert found["texts"]["texts"] == 3 and not {"nll", "copies"} & set(found["texts"])
    own = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().split("\n") if line]
    assert found["texts"]["tokens"] == sum(len(line["new_ids"]) for line in own) == 36 and all(line["ids"][-12:] == line["new_ids"] for line in own)
    (tmp_path / "plain.jsonl").write_text('{"text": "one and one"}\n{"text": "two"}\n')
    assert measure(run, "--bound=False", f"--texts={tmp_path / 'plain.jsonl'}", "--match=", out=tmp_path / "plain")[1]["texts"]["tokens"] == 14
    _, found = measure(judge, "--bound=False", "--samples=4", "--length=9", "--match=", f"--judge={judge}")
    assert found["texts"]["tokens"] == 36


# compare ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch, capsys):
    def call(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["eval.py", "compare", *map(str, words)])
        evaluation.main()
        return capsys.readouterr().out

    return call


def test_runs_side_by_side(run_main, compared, tmp_path):  # noqa: F811
    runs = [run_main("--steps=40", "--lr=1e-2", f"--seed={seed}", "--eval_every=20", "--eval_rows=64", *flags, run=name)
            for seed, name, flags in ((1, "a", []), (2, "b", []), (1, "c", ["--lr=1e-3"]), (1, "d", ["--objective=ar"]))]
    out = compared(*runs, f"--out={tmp_path / 'out'}")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert (tmp_path / "out/compare.md").read_text().startswith("| run |") and (tmp_path / "out/compare.png").read_bytes()[:4] == b"\x89PNG"
    assert [row[0] for row in table[2:]] == ["a", "b", "c", "d"] and table[2][8:] == ["", ""]
    for run, row in zip(runs, table[2:]):
        assert row[6] == f"{last(run)['val_loss']:.4f} ± {last(run)['val_error']:.4f}" and row[3] == f"{last(run)['tokens']:,}"
    assert table[4][9] == "yes, worse" and table[5][9] == "yes, better" and "nats/token" in table[3][8]  # less learned; AR
    difference, error = (float(x) for x in table[3][8].removesuffix(" nats/token").split(" ± "))
    assert difference == pytest.approx(last(runs[1])["val_loss"] - last(runs[0])["val_loss"], abs=1e-4)
    assert error < 0.6 * math.hypot(last(runs[0])["val_error"], last(runs[1])["val_error"])
    loose = compared(runs[0], runs[2], "--sigmas=1000")
    assert "| no |" in loose and (runs[0] / "compare.png").is_file()


def test_axes_of_the_curves(run_main):  # noqa: F811
    run = compare.Run(run_main("--steps=20", "--log_every=5"))
    assert run.spent(0) == 0 and run.spent(20 * 256) > run.spent(7 * 256) > run.spent(5 * 256) > 0 and math.isnan(run.spent(21 * 256))
    assert run.at(5120, "FLOPs") == 5120 * run.flops_per_token > 5120 * 6 * run.model.n_params(False) * 0.5


def test_other_text_is_compared_in_bits_per_byte_only(run_main, compared, tmp_path):  # noqa: F811
    one, two = run_main("--steps=3", run="one"), run_main("--steps=3", "--seq_len=16", run="two")
    out = compared(one, two)
    assert "other text" in out and "bits/byte, without an error" in out
    old = tmp_path / "old"
    shutil.copytree(one, old)
    (old / "validation.npz").unlink()  # of a run before there were any
    assert "other text" in compared(one, old)
    (old / "validation.npz").write_bytes(b"broken")
    assert "other text" in compared(one, old)


def test_differences_of_the_same_run_are_none(run_main, compared, tmp_path):  # noqa: F811
    one = run_main("--steps=3", run="one")
    shutil.copytree(one, tmp_path / "copy")
    assert "+0.0000 ± 0.0000 nats/token | no |" in compared(one, tmp_path / "copy")


def folder_of(run, step):
    return run / f"eval_{step:08d}"


def test_only_what_is_of_the_last_step_and_of_one_text_is_compared(run_main, compared, measure, corpus, tmp_path):  # noqa: F811
    one, two = (run_main("--steps=10", "--lr=1e-2", "--save_every=5", f"--seed={seed}", run=f"r{seed}") for seed in (1, 2))
    plain = compared(one, two)
    measure(one / "step_00000005", out=folder_of(one, 10))  # of an earlier step: it is passed over
    measure(two, "--rows=100")
    assert compared(one, two) == plain and "the last validations" in plain
    measure(one, "--rows=120")  # other rows have other noise: that, too, is passed over
    assert compared(one, two) == plain
    measure(two, "--rows=120")
    row = compared(one, two).splitlines()[3].split("|")
    assert "what eval.py measured" in compared(one, two) and float(row[7].split("±")[0]) == pytest.approx(read_rows(folder(two), "evaluation.npz")[2].mean(), abs=1e-4)
    assert float(row[9].split("±")[0]) == pytest.approx(read_rows(folder(two), "evaluation.npz")[2].mean() - read_rows(folder(one), "evaluation.npz")[2].mean(), abs=2e-4)


def test_a_diverged_run_has_its_line(run_main, compared, tmp_path):  # noqa: F811
    one = run_main("--steps=3", run="one")
    shutil.copytree(one, tmp_path / "bad")
    text = (one / "metrics.jsonl").read_text().splitlines()
    last_line = json.loads(text[-1]) | dict(val_loss="nan", val_bpb="nan", val_error="nan")
    (tmp_path / "bad/metrics.jsonl").write_text("\n".join([*text[:-1], json.dumps(last_line)]) + "\n")
    assert "| diverged |" in compared(one, tmp_path / "bad")


# bad input ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    (["--ordered=leftt"], "ordered: there is no 'leftt'"), (["--match=4,x"], "match: 'x' is no length"), (["--samples=2", "--texts=x"], "give samples"),
    (["--judge=x"], "judge needs samples or texts"), (["--bound=False"], "nothing to do"), (["--texts=nowhere.jsonl"], "no such file"),
    (["--task_data=nowhere", "--tasks=x"], "task_data=nowhere: no such folder"), (["--corpus=nowhere"], "no corpus in 'nowhere'"),
    (["--samples=3", "--judge=RUN"], "must be an autoregressive run"), (["--samples=1"], "one text has no error"), (["--samples=3", "--judge=SHORT", "--length=20"], "or the judge's of 16"), (["--samples=3", "--length=99"], "more than the model's context of 32"),
    (["--samples=2", "--order=first_hitting", "--steps=4"], "leave steps out"), (["--rows=-2"], "must be at least -1"), (["--passes=0"], "must be at least 1"), (["--run_dir=nowhere"], "no usable checkpoint"),
])
def test_bad_input_ends_in_one_line(run_main, measure, capsys, flags, message):  # noqa: F811
    run = run_main("--steps=3")
    if "--judge=SHORT" in flags:
        short = run_main("--steps=3", "--objective=ar", "--seq_len=16", run="short")
        flags = [flag.replace("SHORT", str(short)) for flag in flags]
    flags = [flag.replace("RUN", str(run)) for flag in flags]
    with pytest.raises(SystemExit) as exit_:
        measure(run, *flags)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and message in err and "Traceback" not in err and not list(run.glob("eval_*/eval.json"))


def test_a_uniform_model_has_no_chain_rule(run_main, measure, capsys):  # noqa: F811
    run = run_main("--steps=3", "--objective=uniform")
    with pytest.raises(SystemExit):
        measure(run, "--ordered=left_to_right")
    assert "no chain rule" in capsys.readouterr().err


def test_settings_that_mean_nothing(run_main, measure, capsys):  # noqa: F811
    for objective, flag in (("ar", "--steps=3"), ("uniform", "--block=4"), ("ar", "--order=margin")):
        run = run_main("--steps=3", f"--objective={objective}", run=f"{objective}{flag[2]}")
        with pytest.raises(SystemExit):
            measure(run, "--samples=2", flag)
        assert f"has no meaning for objective={objective}" in capsys.readouterr().err


def test_what_a_rank_meets_is_said(run_main):  # noqa: F811
    """An unexpected exception on two ranks: its text, and an exit code."""
    run = run_main("--steps=3")
    code = f"import eval, sys; sys.argv = ['eval.py', '--run_dir={run}', '--device=cpu']; eval.bound = lambda *a: 1 / 0; eval.main()"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--no-python", sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr


def test_ctrl_c_is_one_line(run_main, tmp_path):  # noqa: F811
    import signal
    import time

    run = run_main("--steps=3")
    process = subprocess.Popen([sys.executable, "eval.py", f"--run_dir={run}", "--device=cpu", "--passes=100000", f"--out={tmp_path / 'out'}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "masked" in process.stdout.readline()  # the header: it has begun
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "eval.py: interrupted; nothing was written\n" and not list((tmp_path / "out").glob("*"))


def test_copies_are_of_what_the_run_has_read(run_main, measure, tmp_path):  # noqa: F811
    """A run on few unique tokens is not charged with copying the rest of the corpus."""
    lines = [dict(text=f"{i} squared is {i * i}, and its double is {2 * i}.\n", new=f"{i} squared is {i * i}, and its double is {2 * i}.\n") for i in range(100, 140)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    few, all_ = (measure(run_main("--steps=3", *flags, run=name), "--bound=False", f"--texts={tmp_path / 't.jsonl'}", "--match=20")[1]["texts"]["copies"]["texts"]["lengths"]["20"]["windows"]
                 for name, flags in (("few", ["--unique_tokens=320"]), ("all", [])))
    assert few < 0.5 < all_


def test_another_text_is_named_as_such(run_main, measure, tmp_path):  # noqa: F811
    """The same corpus elsewhere is the run's own; another one is not, and the figure of training doesn't stand beside it."""
    run = run_main("--steps=3")
    own = json.loads((run / "settings.json").read_text())["corpus"]
    shutil.copytree(own, tmp_path / "moved")
    (tmp_path / "o.txt").write_text("".join(f"{i} cubed is {i**3}.\n" for i in range(1500)))
    prepared(tmp_path / "other", tmp_path / "o.txt")
    for corpus, is_own in ((tmp_path / "moved", True), (tmp_path / "other", False)):
        out, found = measure(run, f"--corpus={corpus}", "--samples=2", "--match=8", out=tmp_path / f"out{is_own}")
        assert found["bound"]["own_text"] == found["texts"]["own_text"] == is_own
        assert ("train.py logged" in out) == ("copied from the training text" in out) == is_own and ("another text than in training" in out) != is_own


def test_an_autoregressive_model_has_one_order(run_main, measure, capsys):  # noqa: F811
    run = run_main("--steps=3", "--objective=ar")
    with pytest.raises(SystemExit):
        measure(run, "--ordered=confidence")
    assert "has one order" in capsys.readouterr().err


def test_bad_comparisons(compared, run_main, capsys, tmp_path):  # noqa: F811
    run = run_main("--steps=3")
    (tmp_path / "empty").mkdir()
    for words, message in (([run], "at least two"), ([run, run], "same name"), ([run, tmp_path / "empty"], "has no validation"), ([run, tmp_path / "empty", "--sigma=2"], "did you mean 'sigmas'")):
        with pytest.raises(SystemExit) as exit_:
            compared(*words)
        assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_texts_that_are_no_texts(run_main, measure, capsys, tmp_path):  # noqa: F811
    run = run_main("--steps=3")
    for text, message in (("{}\n", "line 1: expected what sample.py --out writes"), ("[1]\n", "line 1"), ("not json\n", "line 1"), ("", "fewer than two texts"),
                          ('{"text": "a", "ids": [999]}\n', "ids of another tokenizer"), ('{"text": 3}\n', "line 1")):
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(SystemExit):
            measure(run, "--bound=False", f"--texts={tmp_path / 't.jsonl'}")
        assert message in capsys.readouterr().err


def test_noise_is_never_that_of_training():
    assert data.VALIDATION_SEED > 2**62  # the largest seed that settings allow
