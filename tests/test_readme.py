"""The README's commands run as printed, but for a few steps and in folders of the test."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
SHORT = ["--steps=3", "--eval_rows=4", "--compile=no", "--device=cpu"]


def run(command, *more):
    words = shlex.split(command)
    python = [sys.executable, "-m", "torch.distributed.run"] if words[0] == "torchrun" else [sys.executable]
    done = subprocess.run([*python, *words[1:], *more], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_is_known_to_this_file():
    assert {c.split()[0] for c in COMMANDS if c} == {"make", "python", "torchrun"}
    assert sum("train.py" in c for c in COMMANDS) == 6


def test_data_commands(tmp_path):
    """Prepare, inspect, export, one after the other in a folder of their own."""
    commands = [c for c in COMMANDS if "data.py" in c]
    outputs = []
    for command in commands:
        done = subprocess.run([sys.executable, ROOT / "data.py", *shlex.split(command)[2:]], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert [c.split()[2] for c in commands] == ["docs", "inspect", "export"]
    assert "corpora/docs/train.bin: " in outputs[0] and "all SHA-256 sums agree" in outputs[1] and (tmp_path / "megatron/docs_train.idx").is_file()


def test_dry_run_command(corpus, tmp_path):  # noqa: F811
    command = next(c for c in COMMANDS if "--dry_run" in c)
    output = run(command, "--model=25M", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}")  # a smaller model: tracing takes its time
    assert "peak memory" in output and "as on a GPU" in output and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c and "--dry_run" not in c])
def test_training_commands(command, corpus, tmp_path):  # noqa: F811
    output = run(command, *SHORT, f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}")
    assert "step      3/3" in output and (tmp_path / "run" / "loss.png").is_file()


@pytest.mark.parametrize("ranks, command", [(8, 0), (16, 1)])
def test_cluster_commands(ranks, command, monkeypatch):
    """What they ask train.py for goes together on that many ranks; torchrun's own flags exist."""
    import configurator
    import train

    blocks = re.findall(r"```bash\n(.*?)```", README, re.S) + [(ROOT / "docs/train.sbatch").read_text()]
    for block in (blocks[command], blocks[2])[: ranks // 8]:
        words = shlex.split(re.search(r"torchrun --.*", block.replace("\\\n", " "))[0].split("#")[0])
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        cfg = configurator.load(train.Config, words[words.index("train.py") + 1 :])
        assert cfg.shard in ("optim", "hybrid") and cfg.compile == "blocks"
        flags = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True).stdout.replace("-", "_")
        assert all(word.split("=")[0].replace("-", "_") in flags for word in words[1 : words.index("train.py")])


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):  # noqa: F811
    """The README's quickstart and quickstart_ar, but for a few steps."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("quickstart", "quickstart_ar"):
        run(f"python train.py configurator/{name}.py", *SHORT, f"--corpus={corpus}", f"--run_dir={folder / name}")
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if "sample.py" in c])
def test_sampling_commands(command, trained):
    few = ["--steps=4", "--samples=4", "--corpus=none", "--orders=ancestral,threshold"] if "--frontier" in command else []
    assert run(command.replace("runs/", f"{trained}/"), *few).strip()
    for file in re.findall(r"--(?:gif|html)=runs/(\S+)", command) + ["quickstart/frontier.json", "quickstart/frontier.png"] * ("--frontier" in command):
        assert (trained / file).stat().st_size > 1000


@pytest.mark.parametrize("command", [c for c in COMMANDS if " eval.py" in c])
def test_evaluation_commands(command, trained):
    words = [] if "compare" in command else ["--device=cpu", "--rows=8", *(["--samples=4"] if "--samples" in command else []), *(["--ordered_rows=2"] if "--ordered" in command else [])]
    assert run(command.replace("runs/", f"{trained}/"), *words).strip()
    assert (trained / "quickstart" / ("compare.md" if "compare" in command else "eval_00000003/eval.json")).stat().st_size > 100


def test_conversion_commands(trained):
    """One after the other: what is written is read again."""
    for command in [c for c in COMMANDS if "convert.py" in c]:
        command = re.sub(r"=(exported|mega)\b", rf"={trained}/\1", command.replace("runs/", f"{trained}/"))
        assert run(command).strip()
    assert (trained / "exported/modeling_nanoquokka.py").is_file() and (trained / "back/latest").is_file()


SCALING = [c for c in COMMANDS if "scaling.py" in c]


@pytest.mark.parametrize("command", [c for c in SCALING if c.split()[2] in ("plan", "tables")])
def test_planning_commands(command, tmp_path):
    done = subprocess.run([sys.executable, ROOT / "scaling.py", *shlex.split(command)[2:]], cwd=elsewhere(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("\n") > 10, done.stderr
    assert (tmp_path / "configurator/my_plan.py").is_file() == ("--write" in command)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in SCALING if c.split()[2] not in ("plan", "tables")])
def test_scaling_commands(command, tmp_path):
    """The long ones, whole: fit, sweep, plot and study, on the documentation of this Python."""
    subprocess.run([sys.executable, ROOT / "data.py", "docs"], cwd=elsewhere(tmp_path), check=True, capture_output=True)
    done = subprocess.run([sys.executable, ROOT / "scaling.py", *shlex.split(command)[2:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def elsewhere(folder):
    """A folder of the test's with what the commands name of the clone."""
    for name in ("results/quokka", "configurator"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.mark.parametrize("path", sorted((ROOT / "configurator").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_override_file_is_documented_and_valid(path):
    import configurator
    import train

    head = path.read_text().split("\n\n")[0]
    assert all(word in head for word in ("Hardware", "Expect")), "say what it trains, on what hardware, for how long, what to expect"
    cfg = configurator.load(train.Config, [str(path)])
    assert cfg.run_dir == f"runs/{path.stem}"


def test_what_can_be_installed():
    """The extras that are named are those of pyproject.toml, and of the clone: the project is in no index."""
    project, files = (ROOT / "pyproject.toml").read_text(), [*ROOT.glob("*.py"), ROOT / "README.md"]
    texts = "\n".join(path.read_text() for path in files)
    assert "nanoquokka[" not in texts
    named = set(re.findall(r"'\.\[(\w+)\]'", texts))
    assert named >= {"data", "hf", "logs"} and all(re.search(rf"^{name} = \[", project, re.M) for name in named)
    modules = re.search(r"^py-modules = \[(.*?)\]", project, re.M | re.S)[1]
    assert sorted(re.findall(r'"(\w+)"', modules)) == sorted(path.stem for path in ROOT.glob("*.py"))
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
    assert "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt" in README


def test_nobody_imports_what_the_readme_says_they_do_not():
    import ast

    library = {"engine", "memory", "model", "diffusion", "kernels", "data", "sources", "configurator", "parallel", "checkpoint", "metrics", "cost", "decode", "film", "likelihood", "texts", "inputs"}
    allowed = {"train": library | {"harness", "sample"}, "eval": library | {"train", "frontier", "sample", "harness", "compare"}, "compare": library, "harness": {"decode", "diffusion", "engine", "likelihood", "parallel", "sample"},
               "likelihood": {"data", "diffusion", "engine", "kernels", "parallel"}, "texts": set(), "sample": library | {"frontier"}, "frontier": library | {"sample"}, "bench": library, "bench_sampling": library, "prepare": {"data", "sources", "configurator"}, "sources": set(), "memory": {"engine", "model", "diffusion", "kernels"},
               "cost": {"memory", "engine", "model", "diffusion", "parallel", "checkpoint"}, "checkpoint": {"model", "parallel"}, "inputs": {"checkpoint", "configurator", "data", "harness", "likelihood", "model", "parallel"},
               "convert": {"checkpoint", "configurator", "data", "download", "huggingface", "megatron", "model", "tensors", "train"}, "download": {"checkpoint", "configurator"},
               "tensors": set(), "megatron": {"tensors"}, "huggingface": {"tensors"}, "modeling_nanoquokka": set(), "parallel": set(), "metrics": set(), "film": set(), "decode": {"model", "diffusion", "kernels", "engine"},
               "engine": {"diffusion", "kernels", "parallel"}, "model": {"kernels"}, "diffusion": {"kernels"}, "kernels": set(),
               "data": {"prepare"},  # run as a script it prepares
               "configurator/__init__": set()}
    ours = library | {"train", "sample", "bench", "prepare", "frontier", "eval", "harness", "compare", "convert", "download", "tensors", "megatron", "huggingface", "modeling_nanoquokka"}
    for name, may in allowed.items():
        nodes = list(ast.walk(ast.parse((ROOT / f"{name}.py").read_text())))
        found = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
        assert found & ours <= may, name
