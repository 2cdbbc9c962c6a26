"""Record what the real commands compute: losses, samples, measurements, plans.

    python tests/golden/record.py                              # of this checkout, to tests/golden/new.json
    python tests/golden/record.py /tmp/base --out=base.json    # of another one
    python tests/golden/record.py --only='masked*,sample_*'    # some cases, and what they need
    python tests/golden/record.py --list

Each case calls data.py, train.py, sample.py, eval.py or scaling.py in a process of its own, with one thread,
in a temporary folder (--work=FOLDER: in that one, which stays). Importing torch takes longer than such tiny
runs, so a command is forked from a process that has imported it (--fresh: each starts a new Python). --jobs=2
does two cases at a time.
"""

import argparse
import fnmatch
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from golden_cases import HERE, all_cases, missing_package
from golden_texts import write_texts

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
FIXED = dict(
    {name: "1" for name in THREADS},
    CUDA_VISIBLE_DEVICES="",
    PYTHONHASHSEED="0",
    PYTHONDONTWRITEBYTECODE="1",
    PYTHONUTF8="1",
    COLUMNS="100",
    MPLBACKEND="Agg",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
)
WARM = (
    "numpy",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.staging",
    "torch.distributed.fsdp",
    "safetensors.torch",
    "matplotlib.pyplot",
    "rich.console",
    "rich.progress",
    "scipy.optimize",
    "triton",
)

# ------------------------------------------------------------------------------------------------- the record


def chosen(cases, only):
    """The cases whose name fits one of the patterns (with commas between), and all that they need."""
    wanted = [name for name in cases if any(fnmatch.fnmatch(name, pattern) for pattern in only.split(","))]
    found, todo = set(), list(wanted)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += cases[name][0]
    return wanted, [name for name in cases if name in found]


def work_at(box, name, work):
    """Do one case in a fork of this process, which writes its figures to a file; returns the process's id."""
    pid = os.fork()
    if pid:
        return pid
    start = time.time()
    try:
        package = missing_package(name)
        figures = dict(not_run=f"{package} is not installed") if package else work(dict(box, case=name))
    except Exception as problem:
        figures = dict(failed=f"{type(problem).__name__}: {problem}")
    path = box["work"] / f"figures/{name}.json"
    path.write_text(json.dumps(dict(figures=figures, seconds=time.time() - start)), encoding="utf-8")
    os._exit(0)


def do_all(box, cases, names, jobs, say):
    """Do the named cases, at most `jobs` at a time, each after those that it needs: {name: figures}."""
    waiting, running, done = list(names), {}, {}
    while waiting or running:
        ready = [name for name in waiting if all(need in done for need in cases[name][0])]
        for name in ready[: jobs - len(running)]:
            waiting.remove(name)
            failed = [need for need in cases[name][0] if {"failed", "not_run"} & set(done[need])]
            work = (lambda _, failed=failed: dict(not_run=f"needs {failed[0]}")) if failed else cases[name][1]
            running[work_at(box, name, work)] = name
        name = running.pop(os.wait()[0])
        result = json.loads((box["work"] / f"figures/{name}.json").read_text(encoding="utf-8"))
        done[name] = result["figures"]
        say(name, result["figures"], result["seconds"])
    return {name: done[name] for name in names}


def set_up():
    """Fix what figures could depend on, and import what all commands import, but nothing of ours."""
    os.environ.update(FIXED)
    os.environ.pop("TRITON_INTERPRET", None)
    sys.stdout.reconfigure(encoding="utf-8")
    for name in WARM:
        try:
            importlib.import_module(name)
        except ImportError:
            pass


def machine():
    """What the last bits of the figures depend on."""
    import numpy
    import torch

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        known = dict(
            re.findall(
                r"^([\w ]+?)\s*: (.*)$",
                Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0],
                re.M,
            )
        )
        cpu = f"{known.get('model name', cpu)}, family {known.get('cpu family')}, model {known.get('model')}"
    return dict(
        torch=torch.__version__,
        cpu=f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        threads=1,
        numpy=numpy.__version__,
        python=platform.python_version(),
    )


def commit_of(checkout):
    """The checkout's commit, with a + where files have changed."""
    git = ["git", "-C", str(checkout)]
    short = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
    ).stdout.strip()
    return short + "+" * bool(changed)


def record(checkout, only="*", jobs=1, fresh=False, work=None, say=lambda *_: None):
    """Do the cases that fit `only` in a checkout: {about, cases: {name: figures}}."""
    set_up()
    start, keep = time.time(), work is not None
    folder = Path(work or tempfile.mkdtemp(prefix="golden_")).resolve()
    if keep and folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} is not empty")
    os.environ["HF_HOME"] = str(folder / "hf")
    try:
        for name in ("logs", "figures"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        write_texts(folder)
        cases = all_cases()
        wanted, names = chosen(cases, only)
        box = dict(checkout=Path(checkout).resolve(), work=folder, fresh=fresh)
        found = do_all(box, cases, names, jobs, say)
        about = dict(commit=commit_of(checkout), **machine(), seconds=round(time.time() - start))
        return dict(about=about, cases={name: found[name] for name in names if name in wanted})
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def write(path, recorded):
    """Write a record as JSON with a line per figure."""
    lines = ["{", f'"about": {json.dumps(recorded["about"], ensure_ascii=False)},', '"cases": {']
    for name, figures in recorded["cases"].items():
        inner = [
            f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in figures.items()
        ]
        lines += [f"{json.dumps(name)}: {{", ",\n".join(inner), "},"]
    lines[-1] = lines[-1].rstrip(",")
    Path(path).write_text("\n".join([*lines, "}}"]) + "\n", encoding="utf-8")


def show(name, figures, seconds):
    """One line about a case that is done."""
    trouble = figures.get("failed") or figures.get("not_run")
    print(
        f"{name:28} {seconds:5.1f} s"
        + (f"   {'failed' if 'failed' in figures else 'not run'}: {trouble}" if trouble else ""),
        flush=True,
    )


def flags(about):
    """The flags that record.py and check.py share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkout", nargs="?", default=str(HERE.parent.parent), help="folder of the checkout (this one)"
    )
    parser.add_argument("--only", default="*", help="patterns of names of cases, with commas")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--fresh", action="store_true", help="start a new Python for each command")
    parser.add_argument("--work", help="folder to work in, which stays")
    return parser


def main():
    parser = flags(__doc__)
    parser.add_argument("--out", default=str(HERE / "new.json"), help="the file to write")
    parser.add_argument("--list", action="store_true", help="print the cases' names, and stop")
    asked = parser.parse_args()
    if asked.list:
        return print("\n".join(all_cases()))
    recorded = record(asked.checkout, asked.only, asked.jobs, asked.fresh, asked.work, show)
    write(asked.out, recorded)
    print(f"{len(recorded['cases'])} cases in {recorded['about']['seconds']} s, written to {asked.out}")
    sys.exit(any({"failed", "not_run"} & set(figures) for figures in recorded["cases"].values()))


if __name__ == "__main__":
    main()
