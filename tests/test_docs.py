"""The commands of the README and of docs/ run as printed, but for a few steps and in folders of the test."""

import contextlib
import io
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import configurator
import convert
import eval
import sample
import scaling
import train
from corpus import prepare

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
SHORT = ["--steps=3", "--eval_rows=4", "--compile=no", "--device=cpu"]


def commands_in(text):
    """The lines of all ```sh blocks, without their comments."""
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).splitlines()
    commands = (line.split("#")[0].strip() for line in lines)
    return [command for command in commands if command]


COMMANDS = list(dict.fromkeys(commands_in("\n".join([README, *PAGES.values()]))))


def those_of(script):
    """The commands that run a script, in the order of the pages."""
    return [command for command in COMMANDS if f" {script}" in command]


MAINS = {"data.py": prepare.main, "train.py": train.main, "sample.py": sample.main, "eval.py": eval.main,
         "convert.py": convert.main, "scaling.py": scaling.main}


def run(command, *more, folder=ROOT):
    """Run a command of the docs in a folder; its output.

    In this process, where torch need not be imported again, but for torchrun's.
    """
    words = [*shlex.split(command), *map(str, more)]
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    printed, handlers = io.StringIO(), {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", words[1:])
        MAINS[words[1]]()
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    return printed.getvalue()


def test_every_command_is_known_to_this_file():
    scripts = "data.py", "train.py", "sample.py", "eval.py", "convert.py", "scaling.py"
    tested = [command for script in scripts for command in those_of(script)]
    assert sorted([*tested, "make quickstart"]) == sorted(COMMANDS)
    assert len(commands_in(README)) >= 12 and len(COMMANDS) >= 25


def test_data_commands(tmp_path):
    """Prepare, inspect, export, one after the other in a folder of their own."""
    outputs = {}
    for command in those_of("data.py"):
        name = "bpe" if "bpe:" in command else command.split()[2]
        outputs[name] = run(command, folder=tmp_path)
    assert sorted(outputs) == ["bpe", "docs", "export", "inspect"]
    assert "corpora/docs/train.bin: " in outputs["docs"] and "all SHA-256 sums agree" in outputs["inspect"]
    assert "corpora/docs_bpe/train.bin: " in outputs["bpe"]
    assert (tmp_path / "megatron/docs_train.idx").is_file()


def test_dry_run_command(corpus, tmp_path):
    command = next(command for command in COMMANDS if "--dry_run" in command)
    smaller = "--model=", "--n_layer=2", "--n_head=2", "--d_model=64"  # tracing takes its time
    output = run(command, *smaller, f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}")
    assert "peak memory" in output and "as on a GPU" in output and not (tmp_path / "run").exists()


TRAINING = [command for command in those_of("train.py") if "--dry_run" not in command]


@pytest.mark.parametrize("command", [
    pytest.param(command, marks=[pytest.mark.slow] if command.startswith("torchrun") else [])
    for command in TRAINING])  # tests/training/test_faults.py starts runs by torchrun, too
def test_training_commands(command, corpus, tmp_path):
    output = run(command, *SHORT, f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}")
    assert "step      3/3" in output and (tmp_path / "run" / "loss.png").is_file()


@pytest.mark.parametrize("ranks, place", [(8, "one machine"), (16, "two machines"), (16, "slurm")])
def test_cluster_commands(ranks, place, monkeypatch):
    """What they ask train.py for goes together on that many ranks; torchrun's own flags exist."""
    from torch.distributed.run import get_args_parser

    one, two = re.findall(r"```bash\n(.*?)```", PAGES["training"], re.S)
    text = {
        "one machine": one,
        "two machines": two,
        "slurm": (ROOT / "docs/train.sbatch").read_text(encoding="utf-8"),
    }[place]
    launch = re.search(r"torchrun --.*", text.replace("\\\n", " "))[0]
    words = shlex.split(launch.split("#")[0])
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cfg = configurator.load(train.Config, words[words.index("train.py") + 1 :])
    assert cfg.shard in ("optim", "hybrid") and cfg.compile == "blocks"
    strings = sum((action.option_strings for action in get_args_parser()._actions), [])
    known = {flag.replace("-", "_") for flag in strings}
    flags = words[1 : words.index("train.py")]
    assert flags and all(flag.split("=")[0].replace("-", "_") in known for flag in flags)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """The README's quickstart and quickstart_ar, but for a few steps."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("quickstart", "quickstart_ar"):
        command = f"python train.py configurator/{name}.py"
        run(command, *SHORT, f"--corpus={corpus}", f"--run_dir={folder / name}")
    return folder


@pytest.mark.parametrize("command", those_of("sample.py"))
def test_sampling_commands(command, trained):
    assert run(command.replace("runs/", f"{trained}/")).strip()
    for file in re.findall(r"--(?:gif|html)=runs/(\S+)", command):
        assert (trained / file).stat().st_size > 1000


@pytest.mark.parametrize("command", those_of("eval.py"))
def test_evaluation_commands(command, trained):
    size = 100
    few = ["--device=cpu", "--rows=8", *(["--samples=4"] * ("--samples" in command)),
           *(["--ordered_rows=2"] * ("--ordered" in command))]
    written = ["eval_00000003/eval.json"]
    if "compare" in command:
        few, written = [], ["compare.md"]
    if "frontier" in command:
        size = 1000
        few = ["--steps=4", "--samples=4", "--corpus=none", "--orders=ancestral,threshold"]
        written = ["frontier.json", "frontier.png"]
    assert run(command.replace("runs/", f"{trained}/"), *few).strip()
    assert all((trained / "quickstart" / file).stat().st_size > size for file in written)


def test_conversion_commands(trained):
    """One after the other: what is written is read again."""
    for command in those_of("convert.py"):
        command = command.replace("runs/", f"{trained}/")
        assert run(re.sub(r"=(exported|mega)\b", rf"={trained}/\1", command)).strip()
    assert (trained / "exported/modeling_nanoquokka.py").is_file() and (trained / "back/latest").is_file()


def is_quick(command):
    return command.split()[2] in ("plan", "tables")


@pytest.mark.parametrize("command", [command for command in those_of("scaling.py") if is_quick(command)])
def test_planning_commands(command, tmp_path):
    assert run(command, folder=elsewhere(tmp_path)).count("\n") > 10
    assert (tmp_path / "configurator/my_plan.py").is_file() == ("--write" in command)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in those_of("scaling.py") if not is_quick(command)])
def test_scaling_commands(command, tmp_path):
    """The long ones, whole: fit, sweep, plot and study, on the documentation of this Python."""
    folder = elsewhere(tmp_path)
    run("python data.py docs", folder=folder)
    tiny = ["--n_layer=1", "--d_model=32", "--steps=8", "--warmup=2", "--corpus=corpora/docs", "--compile=no"]
    few = ["--models=AR", "--seeds=1", "--lrs=0.1", "--", *tiny] if "study optimizer" in command else []
    run(command, *few, folder=folder)


def elsewhere(folder):
    """A folder of the test's with what the commands name of the clone."""
    for name in ("results/quokka", "configurator"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


OVERRIDES = [path for path in sorted((ROOT / "configurator").glob("[a-z]*.py"))
             if path.stem not in ("ladder", "renamed", "format")]


@pytest.mark.parametrize("path", OVERRIDES, ids=lambda path: path.stem)
def test_every_override_file_is_documented_and_valid(path):
    """Each says what it trains, on what hardware, for how long, and what to expect."""
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert all(word in head for word in ("Hardware", "Expect"))
    cfg = configurator.load(train.Config, [str(path)])
    assert cfg.run_dir == f"runs/{path.stem}"


def test_what_can_be_installed():
    """The extras that are named are those of pyproject.toml; pip installs no module of ours."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    code = [text for path, text in sources() if path.relative_to(ROOT).parts[0] != "tests"]
    texts = "\n".join([README, *PAGES.values(), *code])
    assert "nanoquokka[" not in texts
    named = set(re.findall(r"'\.\[(\w+)\]'", texts))
    assert named >= {"data", "hf", "logs"}
    assert all(re.search(rf"^{name} = \[", project, re.M) for name in named)
    assert "py-modules = []" in project and "packages" not in re.sub(r"site-packages", "", project)
    assert "build/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt" in README


# ------------------------------------------------------------------------------------------------ the pages


def test_the_readme_is_short():
    assert len(README.encode()) < 9500 and README.count("![") == 1
    prose = re.sub(r"```.*?```|^\|.*$", "", README, flags=re.S | re.M)
    sentences = re.split(r"(?<=[.!?:;])\s+|\n\n", prose)
    assert max(len(sentence.split()) for sentence in sentences) <= 25


@pytest.mark.parametrize("name", ["README", *PAGES])
def test_links_lead_somewhere(name):
    folder, text = (ROOT, README) if name == "README" else (ROOT / "docs", PAGES[name])
    for link in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", text, flags=re.S)):
        assert link.startswith("http") or (folder / link).exists(), link


def sources():
    """(path, text) of every Python file of the project."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/**/*.py")]:
        if path.relative_to(ROOT).parts[0] not in ("build", "runs", "corpora", "downloads"):
            yield path, path.read_text(encoding="utf-8")


def test_the_mathematics_names_what_there_is():
    """Every function, class, setting and test that docs/math.md names exists in the code."""
    code = "\n".join(text for path, text in sources() if path.name != "test_docs.py")
    words = set(re.findall(r"\w+", code))
    words.add("ffw_size")  # a column of the paper's
    page = PAGES["math"][: PAGES["math"].index("## 11.")]  # which names the tensors of others
    named = "\n".join(re.findall(r"`([A-Za-z_][\w.]*)`", page))
    functions = {word for word in re.findall(r"\w+", named) if "_" in word or word[0].isupper()}
    assert len(functions) > 60
    assert functions - words == set()


def test_the_code_cites_sections_that_exist():
    sections = set(re.findall(r"^## (\d+)\.", PAGES["math"], re.M))
    cited, uncited = set(), []
    for path, text in sources():
        cited |= {(path.name, section) for section in re.findall(r"math\.md §(\d+)", text)}
        if "SPEC " + "§" in text:
            uncited.append(path)
    assert len(cited) > 8 and {section for _, section in cited} <= sections and not uncited
