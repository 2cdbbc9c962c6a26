"""The command scaling.py: its first words, and that it runs as a program."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, prepared

import scaling


def command(*argv, **environment):
    done = subprocess.run([sys.executable, "scaling.py", *argv], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)
    return done.returncode, done.stdout, done.stderr


def test_a_plan():
    code, out, err = command("plan", "--flops=1e21")
    assert (code, err) == (0, "") and "suggested for masked: approach 1" in out


def test_a_fit_where_the_locale_knows_ascii_alone(tmp_path):
    flags = ("--laws=approach1", "--bootstrap=0", "--figures=False", "--leave_out=False", f"--out={tmp_path}")
    code, out, err = command("fit", *flags, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert (code, err) == (0, "") and "| a | 0.5138 | " in out
    assert "| a | 0.5138 | – |" in (tmp_path / "fits.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fits.json", "fits.md"]


def main(monkeypatch, capsys, *argv):
    """The command in this process: its exit code, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["scaling.py", *argv])
    code = 0
    try:
        scaling.main()
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def test_first_words(monkeypatch, capsys):
    for argv in ((), ("--help",), ("-h",)):
        assert main(monkeypatch, capsys, *argv) == (0, scaling.__doc__.strip() + "\n", "")
    assert main(monkeypatch, capsys, "plane") == (
        2, "", "scaling.py: 'plane' is no command; choose from plan, fit, sweep, plot, study, tables\n")


@pytest.mark.parametrize("word", scaling.COMMANDS)
def test_every_command_has_its_help(word, monkeypatch, capsys):
    code, out, _ = main(monkeypatch, capsys, word, "--help")
    assert code == 0 and (word == "tables" or f"scaling.py {word}" in out)


def test_without_scipy(monkeypatch, capsys):
    monkeypatch.setattr(scaling.importlib.util, "find_spec", lambda name: None)
    for word in ("tables", "sweep"):
        assert main(monkeypatch, capsys, word) == (
            2, "", "scaling.py: scaling laws need scipy: pip install -e '.[scaling]'\n")
    assert main(monkeypatch, capsys, "study")[2].startswith("scaling.py: which study?")


@pytest.mark.slow
def test_a_sweep_from_its_runs_to_its_law(tmp_path):
    """`scaling.py sweep` trains a small grid, fits it and draws it; the second time nothing is trained."""
    words = "".join(f"{i} squared is {i * i}, and its double is {2 * i}.\n" for i in range(9000))
    (tmp_path / "words.txt").write_text(words, encoding="utf-8")
    prepared(tmp_path / "words", tmp_path / "words.txt")
    base, out = tmp_path / "base.py", tmp_path / "out"
    base.write_text(
        f"corpus = {str(tmp_path / 'words')!r}\n"
        "n_layer, n_head, d_model, seq_len, batch_size, warmup = 1, 2, 32, 32, 8, 2\n"
        "lr, compile, device, eval_rows, eval_every, save_every = 4e-3, 'no', 'cpu', 64, 0, 0\n",
        encoding="utf-8",
    )
    flags = (f"--base={base}", "--models=1x16,1x32,1x48", "--flops=1e9,3e9", f"--out={out}")
    for _ in range(2):
        code, text, err = command("sweep", *flags)
        assert code == 0, err  # so little training may leave no valley: then it says so
        assert (out / "fit/fits_masked.json").is_file() and (out / "fit/valleys_ar.png").is_file()
        assert len((out / "points.csv").read_text(encoding="utf-8").splitlines()) == 1 + 12
        assert len(list((out / "runs").glob("*/metrics.jsonl"))) == 12
    assert "12 of 12 runs are finished" in text
