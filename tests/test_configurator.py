"""Settings: override files and flags, left to right; all that is wrong is said at once, before the start."""

import contextlib
import dataclasses
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import configurator
import sample
import train
from configurator import setting
from configurator.renamed import GONE, SETTINGS
from evaluation import frontier

ROOT = Path(__file__).resolve().parents[1]
quick = hypothesis_settings(max_examples=60, deadline=None)


@dataclass
class Settings:
    steps: int = setting(10, "how many steps", low=1, high=10_000_000)
    count: int = setting(0, "any whole number")
    lr: float = setting(1e-3, "how fast it learns", above=0)
    share: float = setting(0.5, "of something whole", low=0, high=1)
    any_number: float = setting(0.0, "without bounds")
    name: str = setting("a name", "what it is called")
    order: Literal["linear", "cosine"] = setting("linear", "which of the two")
    show: bool = setting(False, "whether it is seen", changes_result=False)
    compile: bool = setting(True, "whether it is fast")

    def problems(self):
        wrong = (self.share, self.count) == (0.7, 7)
        return ["share=0.7 contradicts count=7", "a second line"] if wrong else []


def load(*argv):
    return configurator.load(Settings, list(map(str, argv)), "What it does.")


def refused(*argv):
    """The lines on stderr of a refusal, which ends with code 2 and has nothing on stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
        load(*argv)
    assert stop.value.code == 2 and not out.getvalue()
    return err.getvalue().splitlines()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- precedence


def test_defaults():
    assert load() == Settings()


@quick
@given(st.lists(
    st.tuples(st.booleans(), st.sampled_from(["steps", "count"]), st.integers(1, 999)), max_size=6))
def test_files_and_flags_apply_from_left_to_right(scratch, assignments):
    argv, expected = [], dataclasses.asdict(Settings())
    for i, (in_file, name, value) in enumerate(assignments):
        argv.append(write(scratch / f"f{i}.py", f"{name} = {value}\n") if in_file else f"--{name}={value}")
        expected[name] = value
    assert dataclasses.asdict(load(*argv)) == expected


def test_a_file_builds_on_another(tmp_path, monkeypatch):
    """By import, from a neighbour or from the configurator package, wherever the script was started."""
    write(tmp_path / "ground.py", "steps = 3\ncount = 4\nlr = 0.5\n")
    top = write(tmp_path / "top.py", "from ground import *\ncount = count * 10\n")
    monkeypatch.chdir("/")
    path = list(sys.path)
    assert load(top, "--lr=0.25") == Settings(steps=3, count=40, lr=0.25)
    assert sys.path == path
    (tmp_path / "package").mkdir()
    write(tmp_path / "package" / "ours.py", "steps = 8\n")
    monkeypatch.setattr(configurator, "__path__", [str(tmp_path / "package")])
    other = write(tmp_path / "other.py", "from configurator.ours import *\nlr = steps / 4\n")
    assert load(other) == Settings(steps=8, lr=2.0)


def test_neighbours_of_one_name_in_two_folders(tmp_path):
    for folder, steps in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "shared_ground.py", f"steps = {steps}\n")
        write(tmp_path / folder / "top.py", "from shared_ground import *\n")
    assert load(tmp_path / "one" / "top.py").steps == 1
    assert load(tmp_path / "two" / "top.py").steps == 2


def test_each_file_has_its_own_namespace(tmp_path):
    one = write(tmp_path / "one.py", "steps = 5\n_factor = 3\n")
    two = write(tmp_path / "two.py", "lr = steps * 2.0\n")
    (line,) = refused(one, two)
    assert f"{two}: NameError: name 'steps' is not defined" in line
    two.write_text("lr = 1.0 if '_factor' in globals() else 2.0\n", encoding="utf-8")
    assert load(one, two) == Settings(steps=5, lr=2.0)


def test_a_name_that_has_changed_is_told_to_whoever_imports_it(tmp_path):
    write(tmp_path / "ground.py", "seq_len = 64\n")
    (line,) = refused(write(tmp_path / "top.py", "from ground import block_len\n"))
    assert "cannot import name 'block_len'" in line and line.endswith("'block_len' is called 'seq_len' now")


def test_only_assignments_count(tmp_path):
    path = write(tmp_path / "rich.py", """
import math
import os.path as somewhere
from math import sqrt
from pathlib import Path

_base = 4
def double(x): return 2 * x
triple = lambda x: 3 * x
class Thing: pass
steps = double(_base)
count = triple(int(sqrt(_base)))
name = Path("a") / "b"
""")
    assert load(path) == Settings(steps=8, count=6, name="a/b")
    assert load(write(tmp_path / "shadow.py", "def steps(): pass\n")) == Settings()


# ------------------------------------------------------------------------------------------------------ types


@quick
@given(st.integers(1 - 2**63, 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.text(),
       st.booleans())
def test_values_round_trip(scratch, count, number, name, flag):
    expected = Settings(count=count, any_number=number, name=name, show=flag)
    assert load(f"--count={count}", f"--any_number={number}", f"--name={name}", f"--show={flag}") == expected
    text = f"count = {count}\nany_number = {number}\nname = {ascii(name)}\nshow = {flag}\n"
    assert load(write(scratch / "values.py", text)) == expected
    assert json.loads(configurator.dump(expected)) == dataclasses.asdict(expected)


@pytest.mark.parametrize("flag, name, value", [
    ("--steps=1e6", "steps", 1_000_000),
    ("--steps=1_000", "steps", 1000),
    ("--steps=7.0", "steps", 7),
    ("--count=-3", "count", -3),
    ("--count=9007199254740993", "count", 2**53 + 1),  # more digits than a float holds
    ("--steps=8.2M", "steps", 8_200_000),  # 8.2·1e6 as floats is less
    ("--steps=1.001K", "steps", 1001),
    ("--count=0.07T", "count", 70_000_000_000),
    ("--lr=1.1K", "lr", 1100.0),
    ("--lr=3e-4", "lr", 3e-4),
    ("--lr=2", "lr", 2.0),
    ("--any-number=5", "any_number", 5.0),
    ("--name=a=b --c", "name", "a=b --c"),
    ("--name=", "name", ""),
    ("--order=cosine", "order", "cosine"),
    ("--show", "show", True),
    ("--show=yes", "show", True),
    ("--show=1", "show", True),
    ("--compile=False", "compile", False),
    ("--compile=no", "compile", False),
    ("--compile=0", "compile", False),
])
def test_flags(flag, name, value):
    found = getattr(load(flag), name)
    assert found == value and type(found) is type(value)
    assert load(flag) == dataclasses.replace(Settings(), **{name: value})


@pytest.mark.parametrize("unit", "KMBT")
def test_units_are_exact(unit):
    """48006ab refused 359 of these as no whole numbers."""
    for n in range(1, 2000):
        text = f"{n // 100}.{n % 100:02}{unit}"
        assert configurator.convert(text, int) == n * configurator.UNITS[unit] // 100
        assert configurator.convert(text, float) == n * configurator.UNITS[unit] / 100


@pytest.mark.parametrize("text", ["1e999999999", "1e308K", "nan", "inf", "1e-5K", "9" * 5000, "1.0005K"])
def test_numbers_that_are_no_whole_ones(text):
    with pytest.raises(ValueError, match="expected a whole number"):
        configurator.convert(text, int)


def test_paths_with_commas_in_them(tmp_path, monkeypatch):
    """An existing path wins over its parts."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "a,b", "c, d"):
        Path(name).touch()
    for text, paths in (("a,b", ["a,b"]), ("a,b,a", ["a,b", "a"]), (" a , b", ["a", "b"]),
                        ("b,a", ["b", "a"]), ("x,c, d,y,", ["x", "c, d", "y"]), ("", [])):
        assert configurator.split_paths(text) == paths


@pytest.mark.parametrize("line, name, value", [
    ("steps = 1e6", "steps", 1_000_000),
    ("lr = 1", "lr", 1.0),
    ("lr = 2 ** -3", "lr", 0.125),
    ("order = 'cosine'", "order", "cosine"),
    ("show = True", "show", True),
])
def test_lines_of_a_file(tmp_path, line, name, value):
    found = load(write(tmp_path / "x.py", line))
    assert getattr(found, name) == value and type(getattr(found, name)) is type(value)


@pytest.mark.parametrize("flag, reason", [
    ("--steps=ten", "expected a number"),
    ("--steps=", "expected a number"),
    ("--steps=2.5", "expected a whole number"),
    ("--steps=inf", "expected a whole number"),
    ("--steps=nan", "expected a whole number"),
    ("--lr=fast", "expected a number"),
    ("--lr=nan", ""),
    ("--lr=inf", ""),  # json can't hold it, and no setting means anything there
    ("--any_number=nan", ""),
    ("--any_number=-inf", ""),
    ("--show=maybe", "expected True or False"),
    ("--show=", "expected True or False"),
    ("--order=cosin", "choose from linear, cosine; did you mean 'cosine'?"),
    ("--order=", "choose from linear, cosine"),
    ("--steps=0", "must be at least 1"),
    ("--steps=10_000_001", "must be at most 10000000"),
    ("--lr=0", "must be above 0"),
    ("--share=-0.01", "must be at least 0"),
    ("--share=1.01", "must be at most 1"),
    ("--step=5", "unknown setting 'step'; did you mean 'steps'?"),
    ("--xyzzy=5", "unknown setting 'xyzzy'; see --help for all settings"),
    ("--xyzzy", "unknown setting 'xyzzy'; see --help for all settings"),
    ("--problems=5", "unknown setting 'problems'"),  # an attribute, but no setting
    ("--steps", "write --steps=VALUE"),
    ("--name", "write --name=VALUE"),
    ("-steps=5", "no such override file (flags are written --key=value)"),
    ("absent.py", "no such override file (flags are written --key=value)"),
    ("/", "no such override file"),
    pytest.param("a prompt without its flag " * 100, "no such override file", id="longer than a file's name"),
])
def test_refused_flags(flag, reason):
    (line,) = refused(flag)
    assert line.startswith(f"{Path(sys.argv[0]).name}: {flag}: ") and reason in line


@pytest.mark.parametrize("text, reason", [
    ("steps = None", "steps=None: expected a number"),
    ("steps = True", "steps=True: expected a number"),
    ("steps = [1]", "steps=[1]: expected a number"),
    ("steps = 1.5", "steps=1.5: expected a whole number"),
    ("lr = True", "lr=True: expected a number"),
    ("lr = 10 ** 400", "lr=1"),  # too large for a float
    ("share = 2", "share=2: must be at most 1"),
    ("name = 5", "name=5: expected text"),
    ("show = 'maybe'", "show='maybe': expected True or False"),
    ("order = 3", "order=3: choose from linear, cosine"),
    ("order = ['cosine']", "order=['cosine']: choose from linear, cosine"),
    ("stepz = 5", "unknown setting 'stepz'; did you mean 'steps'?"),
    ("steps = = 5", "SyntaxError"),
    ("steps = 1 / 0", "ZeroDivisionError"),
    ("from no_such_neighbour import *", "ModuleNotFoundError"),
])
def test_refused_lines_of_a_file(tmp_path, text, reason):
    path = write(tmp_path / "x.py", text + "\n")
    (line,) = refused(path)
    assert line.startswith(f"{Path(sys.argv[0]).name}: {path}: ") and reason in line


@quick
@given(st.floats(allow_nan=False, allow_infinity=False))
@example(0.0)
@example(1.0)
@example(1.0000000000000002)
@example(5e-324)
def test_bounds(number):
    for flag, good in ((f"--share={number}", 0 <= number <= 1), (f"--lr={number}", number > 0)):
        if good:
            load(flag)
        else:
            refused(flag)


# ------------------------------------------------------------------------------------------------ all at once


def test_everything_wrong_is_said_at_once(tmp_path):
    path = write(tmp_path / "x.py", "stpes = 5\nshare = 3\nlr = 0.5\n")
    lines = refused("--steps=ten", path, "--lr=-1", "absent.py", "--compil=False", "--name")
    wanted = ["--steps=ten: expected a number", f"{path}: unknown setting 'stpes'; did you mean 'steps'?",
              f"{path}: share=3: must be at most 1", "--lr=-1: must be above 0",
              "absent.py: no such override file (flags are written --key=value)",
              "--compil=False: unknown setting 'compil'; did you mean 'compile'?",
              "--name: write --name=VALUE"]
    assert lines == [f"{Path(sys.argv[0]).name}: {line}" for line in wanted]


def test_incompatible_settings():
    assert [line.partition(": ")[2] for line in refused("--share=0.7", "--count=7")] \
        == ["share=0.7 contradicts count=7", "a second line"]


def test_incompatible_settings_are_said_with_the_rest():
    lines = "\n".join(refused("--share=0.7", "--count=7", "--xyzzy=1"))
    for message in ("unknown setting 'xyzzy'", "share=0.7 contradicts count=7", "a second line"):
        assert message in lines


HOSTILE_VALUE = "class C:\n    def __repr__(self):\n        raise KeyError('x')\n"


@pytest.mark.parametrize("text, reason", [
    ("import sys; sys.exit()", "SystemExit: "),
    ("raise SystemExit('done')", "SystemExit: done"),
    ("import sys; sys.exit(0)", "SystemExit: 0"),
    ("raise GeneratorExit", "GeneratorExit: "),
    ("class Stop(BaseException):\n    pass\nraise Stop('now')", "Stop: now"),
    ("def f():\n    f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    ("steps = 10 ** 5000", "steps=int without text (ValueError): must be below 2^63"),
    (f"{HOSTILE_VALUE}name = C()", "name=C without text (KeyError): expected text"),
    ("name = [1] * 1000", "…: expected text"),
])
def test_a_file_that_would_end_the_process_is_refused_in_a_line(tmp_path, text, reason):
    """48006ab ended with code 0 and nothing done."""
    path = tmp_path / "x.py"
    path.write_text(text + "\n", encoding="utf-8")
    (line,) = refused(path)
    assert line.startswith(f"{Path(sys.argv[0]).name}: {path}: ") and reason in line and len(line) < 500


def test_an_interrupted_file_is_interrupted(tmp_path):
    (tmp_path / "x.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        load(tmp_path / "x.py")


def test_a_command_whose_override_file_exits(tmp_path):
    (tmp_path / "x.py").write_text("import sys\nsys.exit()\n", encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "data.py", tmp_path / "x.py", f"--out={tmp_path}"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


@quick
@given(st.text(), st.text(), st.floats(allow_nan=False, allow_infinity=False), st.text())
@example('"; import os; os.mkdir("x") #', "\\", 1e-300, "a\nsteps = 3\r\0\u2028")
@example("'\"\n\"", "C:\\new\\table\udcff", 0.1, "\n\n")
def test_what_is_written_as_an_override_file_reads_back_equal(scratch, name, other, number, comment):
    """Comments are a line each, whatever is in them."""
    path = scratch / "written.py"
    text = configurator.override_text(dict(name=name, any_number=number, other=other), [comment, other])
    path.write_text(text, encoding="utf-8")
    assert configurator.read_file(path) == dict(name=name, any_number=number, other=other)


def test_problems_with_a_name_that_no_file_can_have(capsys):
    with pytest.raises(SystemExit):
        configurator.load(sample.Config, [f"--html={'y' * 300}.html"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "File name too long" in error


@pytest.mark.parametrize("text", [None, "1 / 0\n"])
def test_a_file_that_cannot_be_read_is_all_that_is_said_of_combinations(tmp_path, text):
    """What it would have set is not known: the rest may go together with it."""
    path = write(tmp_path / "x.py", text) if text else tmp_path / "absent.py"
    lines = refused(path, "--share=0.7", "--count=7", "--xyzzy=1")
    assert len(lines) == 2 and str(path) in lines[0] and "xyzzy" in lines[1]


def test_a_wrong_value_is_refused_even_when_a_later_one_is_right():
    (line,) = refused("--lr=-1", "--lr=1")
    assert "--lr=-1: must be above 0" in line


@pytest.mark.parametrize("rank, lines", [("0", 2), ("1", 0)])
def test_only_rank_0_speaks(monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    assert len(refused("--xyzzy=1", "--lr=-1")) == lines


# ------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_help_lists_every_setting(monkeypatch, capsys, flag, rank):
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        load("--steps=ten", flag)  # whatever else there is
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and not err
    if rank == "1":
        assert not out
        return
    assert out.startswith("What it does.\n")
    kinds = dict(steps="int", count="int", lr="float", share="float", any_number="float", name="str",
                 order="linear|cosine", show="bool", compile="bool")
    for f in dataclasses.fields(Settings):
        assert f"  --{f.name}={f.default!r}  ({kinds[f.name]})\n      {f.metadata['doc']}\n" in out


# ---------------------------------------------------------------------------------------------------- scripts


def start(script, *argv, cwd, **variables):
    """Start one of our commands in another folder."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    clean = {name: value for name, value in os.environ.items() if name not in ranks}
    command = [sys.executable, ROOT / script, *argv]
    return subprocess.Popen(
        command, cwd=cwd, env=clean | variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_train_refuses_before_anything_starts(tmp_path):
    """Of two ranks, as torchrun would start them, the first says what is wrong; both end with code 2."""
    path = write(tmp_path / "x.py", "import math\nn_layers = 3\nbatch_size = int(math.sqrt(16))\n")
    flags = ["--stepz=1", path, "--lr=-1", "--lr=fast", "--n_layer=0", "--compile=maybe", "--objectiv=ar"]
    ranks = [start("train.py", *flags, cwd=tmp_path, RANK=rank, WORLD_SIZE="2") for rank in "01"]
    (out, err), silent = (process.communicate(timeout=120) for process in ranks)
    assert [process.returncode for process in ranks] == [2, 2] and silent == ("", "") and not out
    lines = err.splitlines()
    expected = ["train.py: --stepz=1: unknown setting 'stepz'; did you mean 'steps'?",
                f"train.py: {path}: unknown setting 'n_layers'; did you mean 'n_layer'?",
                "train.py: --lr=-1: must be above 0",
                "train.py: --lr=fast: expected a number",
                "train.py: --n_layer=0: must be at least 1",
                "train.py: --compile=maybe: choose from whole, blocks, no",
                "train.py: --objectiv=ar: unknown setting 'objectiv'; did you mean 'objective'?"]
    assert lines[:7] == expected and all(line.startswith("train.py: ") for line in lines)
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["x.py"]  # no run folder


def test_sample_refuses(tmp_path):
    process = start("sample.py", "--prompt=a", "--text=[MASK]", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == "sample.py: give one of prompt, prompt_file, prompts and text\n"


# ----------------------------------------------------------------------------------- needs of one for another


@dataclass
class Recipe:
    loss: Literal["elbo", "maskgit", "paper"] = setting("elbo", "what is minimized")
    objective: Literal["masked", "uniform", "ar"] = setting("masked", "what is learned")
    anneal: int = setting(0, "steps of annealing")
    fp8: bool = setting(False, "8-bit products")
    sigma: float = setting(0.2, "a width")
    name: str = setting("", "what it is called")

    NEEDS = {
        "loss=paper": "objective=uniform",  # a value needs a value
        "anneal": "objective=masked|uniform",  # a setting, one of several values
        "fp8": "anneal, name",  # several, and a setting by itself
        "sigma": "objective=uniform or loss=maskgit",  # either of two
    }


@pytest.mark.parametrize("flags, lines", (
    ([], []),
    (["--loss=maskgit"], []),
    (["--loss=paper"], ["loss=paper needs objective=uniform (or loss='elbo')"]),
    (["--loss=paper", "--objective=uniform"], []),
    (["--anneal=5"], []),
    (["--anneal=5", "--objective=ar"], ["anneal=5 needs objective=masked or uniform (or anneal=0)"]),
    (["--fp8"], ["fp8 needs anneal (or fp8=False)", "fp8 needs name (or fp8=False)"]),
    (["--fp8", "--anneal=1"], ["fp8 needs name (or fp8=False)"]),
    (["--fp8", "--anneal=1", "--name=x"], []),
    (["--sigma=0.1"], ["sigma=0.1 needs objective=uniform or loss=maskgit (or sigma=0.2)"]),
    (["--sigma=0.1", "--loss=maskgit"], []),
    (["--sigma=0.1", "--objective=uniform"], []),
    (["--sigma=0.2"], []),  # the default, though said
), ids=" ".join)
def test_needs_that_are_not_met(flags, lines, capsys):
    if not lines:
        settings = configurator.load(Recipe, flags)
        assert configurator.unmet_needs(settings, Recipe.NEEDS) == []
        return
    with pytest.raises(SystemExit):
        configurator.load(Recipe, flags)
    found = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in found] == lines


# -------------------------------------------------------------------------------------- other and older names


ALIASES = dict(rate="lr", quick="fast")


@dataclass
class Renamed:
    lr: float = setting(1.0, "the rate")
    fast: bool = setting(False, "hurry")
    seq_len: int = setting(8, "tokens per row")


def load_renamed(*argv):
    return configurator.load(Renamed, list(map(str, argv)), aliases=ALIASES)


def test_other_names_reach_a_setting(tmp_path):
    assert load_renamed("--rate=2").lr == 2 and load_renamed("--quick").fast
    assert load_renamed("--lr=3", "--lr=4").lr == 4
    assert load_renamed(write(tmp_path / "x.py", "rate = 5")).lr == 5


@pytest.mark.parametrize("flags, message", (
    (["--rate=2", "--lr=3"], "'lr' and 'rate' are one setting"),
    (["--seq_len=2", "--block_len=3"], "'block_len' and 'seq_len' are one setting"),
    (["--rate"], "write --rate=VALUE"),
    (["--rate=x"], "expected a number"),
    (["--block_len=x"], "--block_len=x: expected a number"),
))
def test_other_names_are_refused_like_the_setting(flags, message, capsys):
    with pytest.raises(SystemExit):
        load_renamed(*flags)
    assert message in capsys.readouterr().err


def test_other_names_are_in_the_help(capsys):
    with pytest.raises(SystemExit):
        load_renamed("--help")
    text = capsys.readouterr().out
    assert "also --rate)" in text and "block_len" not in text  # an old name is read, not advertised


def test_older_names_hold_in_flags_and_files_of_every_command(tmp_path):
    commands = [set(config.__dataclass_fields__) for config in (train.Config, sample.Config, frontier.Config)]
    for old, new in SETTINGS.items():
        assert any(new in names for names in commands) and not any(old in names for names in commands)
    assert load_renamed("--block_len=16") == load_renamed("--seq_len=16")
    assert load_renamed("--block-len=16") == Renamed(seq_len=16)
    assert load_renamed(write(tmp_path / "old.py", "block_len = 32\nlr = 2")) == Renamed(2.0, seq_len=32)
    cfg = configurator.load(train.Config, ["--steps=1", "--block_len=64"])
    assert cfg.seq_len == 64


def test_an_older_name_is_free_for_a_setting_of_that_name():
    """As where one command still has it and another's has another meaning."""

    @dataclass
    class Other:
        block_len: int = setting(4, "of decoding")

    assert configurator.load(Other, ["--block_len=9"]).block_len == 9


@pytest.mark.parametrize("name", GONE)
def test_settings_that_are_gone_say_what_does_their_work(name, tmp_path, capsys):
    for argv in (f"--{name}=1", str(write(tmp_path / "old.py", f"{name} = 1"))):
        with pytest.raises(SystemExit):
            load_renamed(argv)
        (line,) = capsys.readouterr().err.splitlines()
        assert f"there is no setting '{name}' any more; {GONE[name]}" in line


def test_settings_that_change_no_result():
    assert configurator.neutral_settings(Settings) == {"show"}
