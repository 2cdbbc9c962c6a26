"""eval.py compare: the table, the differences and the curves of runs side by side."""

import json
import math
import shutil
import sys

import pytest
from evaluation_fixtures import last_validation

import eval as evaluation
from evaluation import compare
from training.log import read_rows


@pytest.fixture
def run_compare(monkeypatch, capsys):
    """Call eval.main() with the word compare; returns its stdout."""

    def call(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["eval.py", "compare", *map(str, words)])
        evaluation.main()
        return capsys.readouterr().out

    return call


def cells(text):
    """The rows of a table in markdown, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def value_and_error(cell):
    return [float(part) for part in cell.removesuffix(" nats/token").split(" ± ")]


def test_runs_side_by_side(run_main, run_compare, tmp_path):
    runs = []
    for name, *flags in (("a", "--seed=1"), ("b", "--seed=2"), ("c", "--seed=1", "--lr=1e-3"),
                         ("d", "--seed=1", "--objective=ar")):
        flags = ["--steps=40", "--lr=1e-2", "--eval_every=20", "--eval_rows=64", *flags]
        runs.append(run_main(*flags, run=name))
    table = cells(run_compare(*runs, f"--out={tmp_path / 'out'}"))
    assert (tmp_path / "out/compare.md").read_text(encoding="utf-8").startswith("| run |")
    assert (tmp_path / "out/compare.png").read_bytes()[:4] == b"\x89PNG"
    assert [row[0] for row in table] == ["a", "b", "c", "d"] and table[0][8:] == ["", ""]
    validations = [last_validation(run) for run in runs]
    for m, row in zip(validations, table):
        assert row[6] == f"{m['val_loss']:.4f} ± {m['val_error']:.4f}" and row[3] == f"{m['tokens']:,}"
    assert table[2][9] == "yes, worse" and table[3][9] == "yes, better"  # less learned; AR
    difference, error = value_and_error(table[1][8])
    assert difference == pytest.approx(validations[1]["val_loss"] - validations[0]["val_loss"], abs=1e-4)
    assert error < 0.6 * math.hypot(validations[0]["val_error"], validations[1]["val_error"])
    loose = run_compare(runs[0], runs[2], "--sigmas=1000")
    assert "| no |" in loose and (runs[0] / "compare.png").is_file()


def test_axes_of_the_curves(run_main):
    run = compare.Run(run_main("--steps=20", "--log_every=5"))
    seconds = [run.seconds_until(steps * 256) for steps in (0, 5, 7, 20)]
    assert seconds[0] == 0 and seconds == sorted(set(seconds)) and math.isnan(run.seconds_until(21 * 256))
    flops = run.position(5120, "FLOPs")
    assert flops == 5120 * run.flops_per_token > 5120 * 6 * run.model.n_params(False) * 0.5


def test_other_text_is_compared_in_bits_per_byte_only(run_main, run_compare, tmp_path):
    one, two = run_main("--steps=3", run="one"), run_main("--steps=3", "--seq_len=16", run="two")
    text = run_compare(one, two)
    assert "other text" in text and "bits/byte, without an error" in text
    old = tmp_path / "old"
    shutil.copytree(one, old)
    (old / "validation.npz").unlink()  # of a run before there were any
    assert "other text" in run_compare(one, old)
    (old / "validation.npz").write_bytes(b"broken")
    assert "other text" in run_compare(one, old)


def test_differences_of_the_same_run_are_none(run_main, run_compare, tmp_path):
    one = run_main("--steps=3", run="one")
    shutil.copytree(one, tmp_path / "copy")
    assert "+0.0000 ± 0.0000 nats/token | no |" in run_compare(one, tmp_path / "copy")


def test_only_the_last_step_and_one_text_are_compared(run_main, run_compare, run_eval):
    one, two = (run_main("--steps=10", "--lr=1e-2", "--save_every=5", f"--seed={seed}", run=f"r{seed}")
                for seed in (1, 2))
    folders = [run / "eval_00000010" for run in (one, two)]
    plain = run_compare(one, two)
    run_eval(one / "step_00000005", out=folders[0])  # of an earlier step: it is passed over
    run_eval(two, "--rows=100")
    assert run_compare(one, two) == plain and "the last validations" in plain
    run_eval(one, "--rows=120")  # other rows have other noise: that, too, is passed over
    assert run_compare(one, two) == plain
    run_eval(two, "--rows=120")
    text = run_compare(one, two)
    assert "what eval.py measured" in text
    losses = [read_rows(folder, "evaluation.npz")[2].mean() for folder in folders]
    row = cells(text)[1]
    assert value_and_error(row[6])[0] == pytest.approx(losses[1], abs=1e-4)
    assert value_and_error(row[8])[0] == pytest.approx(losses[1] - losses[0], abs=2e-4)


def test_a_diverged_run_has_its_line(run_main, run_compare, tmp_path):
    one = run_main("--steps=3", run="one")
    shutil.copytree(one, tmp_path / "bad")
    *lines, last = (one / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.dumps(json.loads(last) | dict(val_loss="nan", val_bpb="nan", val_error="nan"))
    (tmp_path / "bad/metrics.jsonl").write_text("\n".join([*lines, last]) + "\n", encoding="utf-8")
    assert "| diverged |" in run_compare(one, tmp_path / "bad")


def test_bad_comparisons(run_compare, run_main, capsys, tmp_path):
    run, empty = run_main("--steps=3"), tmp_path / "empty"
    empty.mkdir()
    for words, message in (
        ([run], "at least two"), ([run, run], "same name"), ([run, empty], "has no validation"),
        ([run, empty, "--sigma=2"], "did you mean 'sigmas'"),
    ):
        with pytest.raises(SystemExit) as exit_:
            run_compare(*words)
        assert exit_.value.code == 2 and message in capsys.readouterr().err
