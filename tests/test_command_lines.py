"""Random command lines over all commands: there is a result, or a line that says why not, and no traceback.

    python tests/test_command_lines.py 0 2000       those of these numbers, with what each of them says
"""

import contextlib
import io
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import typing
from pathlib import Path

import matplotlib.figure  # noqa: F401  (an import that is given up halfway stays half done)
import pytest
import torch.distributed.checkpoint.staging  # noqa: F401
from conftest import prepare_words
from runs import TINY

import bench
import convert
import eval as evaluation
import sample
import scaling
import train
from benchmarks import sampling as benchmarks_of_sampling
from corpus import prepare
from evaluation import compare, frontier
from laws import figures, fit, plan, study, sweep

SECONDS = 2.0  # what takes longer may: it is asked for much, and has begun
NUMBERS = [
    "-1", "0", "1", "2", "3", "7", "0.5", "1e-308", "1e9", "1e18", "1e40", "1e308", "-1e308", "inf", "nan",
    "1e400", "9" * 400, "2**3", "1K", "1T", "٣", "²", "0x10", "1_0", "",
]
TEXTS = [
    "", "x", ",", "1,2", "a,b", ":", "x:1:1", "x" * 300, "../" * 2000, "words.txt", "corpora/words",
    "runs/base", "runs/ar", ".", "/dev/null/x", "a b", "é", "\n", "\\", "'", '"', "$x", "-", "--", "[1]", "*",
    "hf:", "\udcff", "no/where", "points.csv", "1e308", "poly1", "poly" + "9" * 400, "True",
]
# of others, slow, or the start of processes
LEFT_OUT = {
    "wandb", "tasks", "watch", "watch_every", "compile", "timeout", "dry_run", "launch", "workers", "jobs",
}
WORLD = {"words.txt", "corpora", "runs", "points.csv", "base.py", "exported"}
TRAIN = [*TINY, "--warmup=0", "--steps=1", "--corpus=corpora/words"]

# {command: (its main, prefix of its arguments, its settings, flags that keep it small)}
COMMANDS = {
    "data.py": (prepare.main, ["words.txt"], prepare.Config, ["--name=new"]),
    "data.py inspect": (prepare.main, ["inspect", "corpora/words"], prepare.Config, []),
    "data.py export": (prepare.main, ["export", "corpora/words", "new"], prepare.Config, []),
    "train.py": (train.main, [], train.Config, [*TRAIN, "--run_dir=new"]),
    "train.py dry": (train.main, [], train.Config, [*TRAIN, "--dry_run"]),
    "train.py again": (train.main, [], train.Config, [
        *TRAIN, "--run_dir=runs/base", "--resume=yes"]),
    "sample.py": (sample.main, [], sample.Config, ["--run_dir=runs/base", "--device=cpu", "--length=3"]),
    "sample.py ar": (sample.main, [], sample.Config, ["--run_dir=runs/ar", "--device=cpu", "--length=3"]),
    "eval.py": (evaluation.main, [], evaluation.Config, [
        "--run_dir=runs/base", "--device=cpu", "--rows=4", "--out=new"]),
    "eval.py texts": (evaluation.main, [], evaluation.Config, [
        "--run_dir=runs/ar", "--device=cpu", "--bound=False", "--samples=2", "--length=4", "--out=new"]),
    "eval.py compare": (evaluation.main, ["compare", "runs/base", "runs/ar"], compare.Config, ["--out=new"]),
    "eval.py frontier": (evaluation.main, ["frontier"], frontier.Config, [
        "--run_dir=runs/base", "--judge=runs/ar", "--samples=2", "--length=4", "--steps=2", "--orders=random",
        "--device=cpu", "--out=new"]),
    "convert.py": (convert.main, [], convert.Config, ["--source=runs/base", "--out=new"]),
    "convert.py back": (convert.main, [], convert.Config, ["--source=exported", "--out=new"]),
    "scaling.py fit": (scaling.main, ["fit"], fit.Config, [
        "--data=points.csv", "--bootstrap=0", "--leave_out=False", "--figures=False", "--out=new",
        "--jobs=1"]),
    "scaling.py plan": (scaling.main, ["plan"], plan.Config, ["--flops=1e18", "--fits="]),
    "scaling.py plot": (scaling.main, ["plot"], figures.Config, ["--data=points.csv", "--out=new"]),
    "scaling.py sweep": (scaling.main, ["sweep"], sweep.Config, [
        "--base=base.py", "--models=1x32", "--flops=1e9", "--out=new", "--dry_run"]),
    "scaling.py study": (scaling.main, ["study", "loss"], study.Config, ["--launch", "--runs=new"]),
    "bench.py": (bench.main, [], bench.Config, ["--only=nothing", "--smoke", "--out="]),
    "bench.py sampling": (bench.main, ["sampling"], benchmarks_of_sampling.Config, [
        "--parts=nothing", "--out=", "--n_layer=1", "--d_model=32", "--vocab=10", "--batch=1"]),
}


@contextlib.contextmanager
def world():
    """A folder to stand in, with a text, a corpus, two runs, an exported model and a table of runs."""
    before, folder = os.getcwd(), Path(tempfile.mkdtemp())
    os.chdir(folder)
    try:
        (folder / "corpora").mkdir()
        prepare_words(folder / "corpora")
        shutil.copyfile("corpora/words.txt", "words.txt")
        rows = [f"{N}M,{D}M,{3 + 1 / N + 1 / D}" for N in (1, 2, 4, 8) for D in (10, 20, 40, 80)]
        Path("points.csv").write_text("\n".join(["params,tokens,loss", *rows]) + "\n", encoding="utf-8")
        small = {flag[2:].split("=")[0]: flag.split("=")[1] for flag in TINY}
        Path("base.py").write_text("".join(f"{name} = {value!r}\n" for name, value in small.items())
                                   + "corpus = 'corpora/words'\n", encoding="utf-8")
        for name, objective in (("base", "masked"), ("ar", "ar")):
            flags = [*TINY, "--corpus=corpora/words", f"--run_dir=runs/{name}", f"--objective={objective}"]
            assert call(train.main, ["train.py", *flags, "--steps=2"], seconds=60)[0] == 0
        assert call(convert.main, ["convert.py", "--source=runs/ar", "--out=exported"], seconds=60)[0] == 0
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


class Enough(BaseException):
    """A command has had its time."""


def call(main, argv, seconds=SECONDS):
    """(exit code, stdout, stderr) of a command in this process; 0 for one that has had its time."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}

    def give_up(*_):
        raise Enough

    before, sys.argv = sys.argv, argv
    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except Enough:
        pass
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        code, _ = 1, err.write(traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def random_flag(draw, settings):
    """--name=value for one of a command's settings, of its type more often than not."""
    types = typing.get_type_hints(settings)
    name = draw.choice([name for name in settings.__dataclass_fields__ if name not in LEFT_OUT])
    values = NUMBERS if types[name] in (int, float) else TEXTS
    if typing.get_origin(types[name]) is typing.Literal:
        values = typing.get_args(types[name])
    if draw.random() < 0.1:
        values = NUMBERS + TEXTS
    return f"--{name}={draw.choice(values)}"


def command_line(number):
    """(main, argv) of the command line of this number."""
    draw = random.Random(number)
    name = draw.choice(list(COMMANDS))
    main, prefix, settings, flags = COMMANDS[name]
    wild = [random_flag(draw, settings) for _ in range(draw.randint(1, 3))]
    replaced = {flag.split("=")[0] for flag in wild}
    kept = [flag for flag in flags if flag.split("=")[0] not in replaced]
    return main, [name.split()[0], *prefix, *kept, *dict.fromkeys(wild)]


def check(number):
    """Call a command line; returns its exit code. Nothing of it is left."""
    main, argv = command_line(number)
    code, out, err = call(main, argv)
    shown = f"{number}: {shlex.join(argv)}\n{err}"[:3000]
    assert "Traceback" not in err, shown
    assert code in (0, 2, 75), shown
    assert code != 2 or err.strip(), shown
    clean()
    return code


def clean():
    """Remove from the folder what a command has left."""
    for name in set(os.listdir()) - WORLD:
        shutil.rmtree(name) if os.path.isdir(name) else os.remove(name)


@pytest.fixture(scope="module")
def standing_in_a_world():
    with world():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.startswith("bench.py")])
def test_without_anything_random_they_work(standing_in_a_world, name):
    main, prefix, _, flags = COMMANDS[name]
    code, _, err = call(main, [name.split()[0], *prefix, *flags], seconds=60)
    assert code == 0, err
    clean()


LONG = "x" * 300  # a file's name has 255 bytes


@pytest.mark.parametrize("name, flag, message", (
    ("sample.py", f"--html={LONG}", "File name too long"),
    ("sample.py", "--batch=1e18", "must be at most 1000000"),
    ("convert.py", f"--source={LONG}", "File name too long"),
    ("convert.py", f"--out={LONG}", "File name too long"),
    ("convert.py", "--seq_len=1e9", "must be at most"),
    ("eval.py", f"--task_data={LONG}", "File name too long"),
    ("eval.py", f"--texts={LONG}", "File name too long"),
    ("eval.py", f"--out={LONG}", "File name too long"),
    ("eval.py", "--match=" + "9" * 5000, "is no length"),
    ("scaling.py plan", f"--write={LONG}.py", "File name too long"),
    ("data.py", "--workers=1e18", "must be at most 1024"),
    ("train.py", f"--run_dir={LONG}", "File name too long"),
    ("train.py", "--batch_size=1e308", "must be below 2^63"),
    ("train.py", "--batch_size=1e9", "the numbers of their rows alone need 7"),
    ("train.py", "--batch_size=1e7", "a step needs"),
    ("train.py", "--d_ff=1e308", "must be below 2^63"),
    ("train.py", "--d_ff=1e7", "GiB"),
    ("train.py", "--init_std=1e308", "must be at most 100"),
    ("train.py", "--log_every=1e18", "must be at most 1000000"),
    ("train.py", "--schedule=poly" + "9" * 400, "unknown schedule"),
    ("bench.py sampling", "--device=cuda", "this machine has no usable GPU"),
))
def test_absurd_values_are_refused_in_a_line(standing_in_a_world, name, flag, message):
    main, prefix, _, flags = COMMANDS[name]
    kept = [other for other in flags if other.split("=")[0] not in (flag.split("=")[0], "--parts")]
    code, _, err = call(main, [name.split()[0], *prefix, *kept, flag])
    assert code == 2 and err.count("\n") == 1 and message in err, err
    clean()


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_random_command_lines(standing_in_a_world, first):
    codes = [check(number) for number in range(first, first + 20)]
    assert 2 in codes and 0 in codes


@pytest.mark.slow
def test_two_thousand_command_lines(standing_in_a_world):
    for number in range(2000):
        check(number)


def main():
    first, end = map(int, sys.argv[1:3])
    with world():
        for name, (command, prefix, _, flags) in COMMANDS.items() if not first else ():
            code, _, err = call(command, [name.split()[0], *prefix, *flags], seconds=60)
            print(name, code, err[-500:], flush=True)
            clean()
        for number in range(first, end):
            try:
                print(number, check(number), shlex.join(command_line(number)[1])[:200], flush=True)
            except AssertionError as problem:
                print("FAILED", problem, flush=True)


if __name__ == "__main__":
    main()
