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
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from golden_settings import EVAL, RANKS, RUN_OF, SAMPLE, SCALING, TRAIN, WRITE
from golden_texts import write_texts

HERE = Path(__file__).resolve().parent
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
NEW_NAMES = {"seq_len": "block_len"}  # of what the commands write: what the name was at 48006ab

# ------------------------------------------------------------------------------------------- running commands


def command(checkout, words):
    """A command line's words with the checkout's paths: of the script, and of override files."""
    script, *rest = words
    return [
        str(checkout / script),
        *(override(checkout, word) if re.fullmatch(r"\w+\.py", word) else word for word in rest),
    ]


def override(checkout, name):
    """The path of an override file, whatever folder it is in now."""
    found = [
        path for path in checkout.rglob(name) if path.parent.name != "golden" and ".venv" not in path.parts
    ]
    if len(found) != 1:
        raise FileNotFoundError(f"{name}: {len(found)} files of that name in {checkout}")
    return str(found[0])


def run(box, words, expected=(0,)):
    """Run a command in the work folder, where logs/ keeps what it prints; returns its stdout."""
    argv = command(box["checkout"], words)
    out, err = (box["work"] / f"logs/{box['case']}.{kind}" for kind in ("out", "err"))
    start = out.stat().st_size if out.exists() else 0
    with open(out, "ab") as stdout, open(err, "ab") as stderr:
        if box["fresh"]:
            code = subprocess.run(
                [sys.executable, *argv], cwd=box["work"], stdout=stdout, stderr=stderr
            ).returncode
        else:
            code = forked(argv, box["work"], stdout, stderr)
    if code not in expected:
        last = (err.read_text(errors="replace").strip() or "nothing").splitlines()[-1]
        raise RuntimeError(f"{shlex.join(words)}: exit code {code}, {last}")
    return out.read_bytes()[start:].decode("utf-8")


def forked(argv, work, stdout, stderr):
    """Run a Python script in a fork of this process, as its main program; returns the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        os.chdir(work)
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
        for name in [name for name in sys.modules if name.startswith(("record", "golden_"))]:
            del sys.modules[name]  # the checkout may have modules of these names
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(work / "pycache")
        runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as problem:
        if isinstance(problem.code, str):
            print(problem.code, file=sys.stderr)
        else:
            code = problem.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_ranks(box, words):
    """Run a command as two ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(box["work"] / f"logs/{box['case']}.err", "wb") as log:
        code = subprocess.run(
            [*launcher, *command(box["checkout"], words)], cwd=box["work"], stdout=log, stderr=log
        ).returncode
    if code:
        raise RuntimeError(f"2 × {shlex.join(words)}: exit code {code}")


def run_until(box, words, run_dir, lines):
    """Start training and stop it (SIGTERM) once metrics.jsonl has so many lines; it must exit with 75."""
    metrics = box["work"] / run_dir / "metrics.jsonl"
    with open(box["work"] / f"logs/{box['case']}.err", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command(box["checkout"], words)], cwd=box["work"], stdout=log, stderr=log
        )
        while process.poll() is None and not (
            metrics.exists() and metrics.read_bytes().count(b"\n") >= lines
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code != 75:
        raise RuntimeError(f"{shlex.join(words)}: exit code {code} after SIGTERM, not 75")


# -------------------------------------------------------------------------------------------- reading figures


def old_names(thing):
    """The same with the names of 48006ab."""
    if isinstance(thing, dict):
        return {NEW_NAMES.get(key, key): old_names(value) for key, value in thing.items()}
    return [old_names(value) for value in thing] if isinstance(thing, list) else thing


def without(thing, *names):
    """A dict without these keys, at any depth."""
    if isinstance(thing, dict):
        return {key: without(value, *names) for key, value in thing.items() if key not in names}
    return [without(value, *names) for value in thing] if isinstance(thing, list) else thing


def training_figures(folder):
    """What metrics.jsonl says but for times, a list for each name; and which checkpoints there are."""
    figures = dict(step=[], val_step=[], task_step=[], events=[])
    for line in map(old_names, map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())):
        if "event" in line:
            if line["event"] not in ("ranks", "stopped"):
                figures["events"].append({key: value for key, value in line.items() if key != "tokens"})
            continue
        figures["step" if "loss" in line else "val_step" if "val_loss" in line else "task_step"].append(
            line["step"]
        )
        for key, value in line.items():
            if key not in ("step", "tokens", "tokens_per_s", "mfu", "objective"):
                figures.setdefault(key, []).append(value)
        figures["tokens"] = line["tokens"]
    figures["checkpoints"] = sorted(path.name for path in folder.glob("step_*"))
    return figures


def sample_figures(path):
    """The tokens and texts of `sample.py --out`."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return dict(tokens=[line["new_ids"] for line in lines], texts=[line["text"] for line in lines])


def eval_figures(path):
    """What eval.json says, without paths, versions and settings."""
    report = old_names(json.loads(path.read_text()))
    return without(report, "checkpoint", "device", "torch", "settings", "judge", "seconds")


def steady(text):
    """Text without what depends on time, on the machine's folders or on the console."""
    text = re.sub(r"\S*/tmp\S*/", "", text)
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(
        line for line in lines if line and not re.match(r"wrote |written to |\[.*tokens/s", line)
    )


def digest(path):
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------ cases


def do_corpora(box):
    """data.py: text, JSONL, Megatron's format, and what is in them."""
    work = box["work"]
    run(box, ["data.py", "words.txt", r"--separator=\n===\n"])
    run(box, ["data.py", "sums.jsonl", "--val=0.2", "--shard_tokens=3000"])
    figures = {}
    (work / "corpora/megatron").mkdir()
    run(box, ["data.py", "export", "corpora/words", "corpora/megatron/words"])
    for name in ("words", "sums"):
        meta = old_names(json.loads((work / f"corpora/{name}/meta.json").read_text()))
        figures[name] = {
            key: meta[key]
            for key in ("tokenizer", "n_vocab", "eos_id", "mask_id", "left_out", "train", "val")
        }
    figures["files"] = {
        str(path.relative_to(work)): digest(path)
        for name in ("words", "sums", "megatron")
        for path in sorted((work / "corpora" / name).iterdir())
        if path.suffix in (".bin", ".idx")
    }
    return figures


def do_pieces(box):
    """data.py with a tokenizer.json."""
    run(box, ["data.py", "words.txt", r"--separator=\n===\n", "--name=pieces", "--tokenizer=tokenizer.json"])
    return {path.name: digest(path) for path in sorted((box["work"] / "corpora/pieces").glob("*.bin"))}


def do_train(box, name, flags, ranks=1):
    """One run of train.py."""
    words = ["train.py", *shlex.split(flags), f"--run_dir=runs/{name}"]
    if "--corpus=" not in flags:
        words.append("--corpus=corpora/words")
    run(box, words) if ranks == 1 else run_ranks(box, words)
    return training_figures(box["work"] / "runs" / name)


def do_tasks(box):
    """Benchmarks along a run: by train.py itself at 48006ab, now by eval.py beside it."""
    flags = shlex.split(TRAIN["tasks"])
    if not (box["checkout"] / "evaluation/watch.py").is_file():
        return do_train(box, "tasks", TRAIN["tasks"])
    ours = [flag for flag in flags if "eval_tasks" not in flag and "task_path" not in flag]
    do_train(box, "tasks", shlex.join([*ours, "--save_every=10"]))
    scoring = "--bound=False --tasks=cats --limit=4 --masks=8 --task_path=tasks --device=cpu"
    run(box, ["eval.py", "--watch=runs/tasks", *scoring.split()])
    shutil.rmtree(box["work"] / "runs/tasks/step_00000010")  # which 48006ab did not save
    return training_figures(box["work"] / "runs/tasks")


def do_stopped(box):
    """The run "masked", stopped by SIGTERM and resumed: must give the same figures."""
    words = ["train.py", *shlex.split(TRAIN["masked"]), "--corpus=corpora/words", "--run_dir=runs/stopped"]
    run_until(box, words, "runs/stopped", 6)
    run(box, [*words, "--resume=yes"])
    return without(training_figures(box["work"] / "runs/stopped"), "checkpoints")


def do_resumed(box, name, flags=""):
    """The run "masked" without its last checkpoint, resumed from step 20."""
    folder = box["work"] / "runs" / name
    shutil.copytree(box["work"] / "runs/masked", folder)
    shutil.rmtree(folder / "step_00000040")
    words = [
        "train.py",
        *shlex.split(TRAIN["masked"]),
        *shlex.split(flags),
        "--corpus=corpora/words",
        f"--run_dir=runs/{name}",
    ]
    run(box, [*words, "--resume=auto"])
    return training_figures(folder)


def do_sample(box, model, name):
    """One call of sample.py: tokens, texts, and what --show and --html draw."""
    flags, out = SAMPLE[model][name], f"{model}_{name}.jsonl"
    words = [
        "sample.py",
        f"--run_dir=runs/{RUN_OF[model]}",
        *shlex.split(WRITE),
        *shlex.split(flags),
        f"--out={out}",
    ]
    shown = run(box, words)
    figures = sample_figures(box["work"] / out)
    if "--show" in flags:
        page = (box["work"] / "film.html").read_text(encoding="utf-8")
        frames = re.search(r"const frames = (.*), colours = ", page)[1]
        figures |= dict(shown=steady(shown), frames=json.loads(frames))
    passes = re.findall(r"(\d+) forward passes", (box["work"] / f"logs/{box['case']}.err").read_text())
    return figures | dict(passes=int(passes[-1]))


def do_frontier(box):
    """eval.py frontier, once sample.py --frontier: every order judged by the AR run."""
    moved = (box["checkout"] / "evaluation/frontier.py").is_file()
    run(
        box,
        [
            *(["eval.py", "frontier"] if moved else ["sample.py", "--frontier"]),
            "--run_dir=runs/writer_masked",
            "--judge=runs/writer_ar",
            "--device=cpu",
            "--samples=4",
            "--steps=8",
            "--length=24",
            "--prompt=8",
            "--caches=no,dual",
            "--block=8",
            "--orders=ancestral,first_hitting,margin,ancestral:capped",
            "--out=frontier",
        ],
    )
    found = json.loads((box["work"] / "frontier/frontier.json").read_text())
    return without(
        found,
        "tokens_per_s",
        "seconds",
        "how",
        "settings",
        "run_dir",
        "judge",
        "writer",
        "torch",
        "device",
        "checkpoint",
    )


def do_eval(box, name, ranks=1):
    """One call of eval.py."""
    run_name, _, flags = EVAL[name]
    out = f"eval_{name}" + f"_{ranks}" * (ranks > 1)
    words = [
        "eval.py",
        f"--run_dir=runs/{run_name}",
        "--device=cpu",
        "--seed=5",
        *shlex.split(flags),
        f"--out={out}",
    ]
    run(box, words) if ranks == 1 else run_ranks(box, words)
    figures = eval_figures(box["work"] / out / "eval.json")
    curve = box["work"] / out / "noise.csv"
    return figures | (dict(noise_csv=curve.read_text().splitlines()[1:]) if curve.exists() else {})


def do_compare(box):
    """eval.py compare: four runs side by side, without the column of times."""
    runs = ["runs/masked", "runs/poly2", "runs/ar", "runs/uniform"]
    text = steady(run(box, ["eval.py", "compare", *runs, "--out=compare"]))
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    times = [i for i, word in enumerate(rows[0]) if word.strip() == "time"]
    return dict(table=["|".join(cell for i, cell in enumerate(row) if i not in times) for row in rows])


def do_scaling(box, name):
    """One command of scaling.py: what it prints, and the laws that a fit writes."""
    words = shlex.split(SCALING[name])
    figures = dict(printed=steady(run(box, ["scaling.py", *words])).splitlines())
    for word in words:
        if word.startswith("--out="):
            folder = box["work"] / word[6:]
            figures |= {
                path.name: old_names(json.loads(path.read_text()))
                for path in sorted(folder.glob("fits*.json"))
            }
    return figures


def do_sweep(box):
    """scaling.py sweep: two tiny runs, one a branch of the other; the fit that follows wants more."""
    base = override(box["checkout"], "sweep_cpu.py")
    run(
        box,
        [
            "scaling.py",
            "sweep",
            f"--base={base},tiny.py",
            "--models=1x16",
            "--objectives=masked",
            "--flops=3e8,6e8",
            "--out=runs/sweep",
        ],
        expected=(0, 2),
    )
    return dict(points=(box["work"] / "runs/sweep/points.csv").read_text().splitlines())


def do_old_run(box):
    """The run that 48006ab left after 20 of 40 steps (fixture.py): sampled, evaluated and resumed."""
    commands = {
        name: shlex.split(line)
        for name, line in json.loads((HERE / "expected.json").read_text())["commands"].items()
    }
    folder = box["work"] / "old"
    for name in ("corpus_48006ab", "run_48006ab"):
        shutil.copytree(HERE / name, folder / name)
    (folder / "logs").mkdir()
    box = dict(box, work=folder)
    for name in ("sample", "infill", "eval", "resume"):
        run(box, commands[name])
    figures = training_figures(folder / "run_48006ab")
    after = {
        key: value[20:] if isinstance(value, list) and len(value) == 40 else value
        for key, value in figures.items()
    }
    found = {name: sample_figures(folder / f"{name}.jsonl") for name in ("sample", "infill")}
    return dict(resumed=after, eval=eval_figures(folder / "eval/eval.json"), **found)


def all_cases():
    """{name: (names of the cases it needs, function of the box)}, in an order in which they can run."""
    cases = {"corpora": ((), do_corpora), "pieces": ((), do_pieces)}
    for name, flags in TRAIN.items():
        needs = (
            "pieces" if "corpora/pieces" in flags else "corpora",
            *re.findall(r"--init_from=runs/(\w+)", flags),
        )
        cases[name] = needs, lambda box, name=name: do_train(box, name, TRAIN[name])
    cases["tasks"] = cases["tasks"][0], do_tasks
    for name in RANKS:
        cases[name] = ("corpora",), lambda box, name=name: do_train(box, name, RANKS[name], ranks=2)
    cases["stopped"] = ("corpora",), do_stopped
    cases["resumed"] = ("masked",), lambda box: do_resumed(box, "resumed")
    cases["resumed_micro_batch"] = (
        ("masked",),
        lambda box: do_resumed(box, "resumed_micro_batch", "--micro_batch=4 --lr=5e-3"),
    )
    for model, asked in SAMPLE.items():
        for name in asked:
            cases[f"sample_{model}_{name}"] = (
                (RUN_OF[model],),
                lambda box, model=model, name=name: do_sample(box, model, name),
            )
    cases["frontier"] = ("writer_masked", "writer_ar"), do_frontier
    for name, (run_name, more, _) in EVAL.items():
        cases[f"eval_{name}"] = (run_name, *more), lambda box, name=name: do_eval(box, name)
    cases["eval_two_ranks"] = ("writer_masked",), lambda box: do_eval(box, "masked", ranks=2)
    cases["old_run"] = (), do_old_run
    cases["compare"] = ("masked", "poly2", "ar", "uniform"), do_compare
    cases["sweep"] = ("corpora",), do_sweep
    for name in SCALING:
        cases[f"scaling_{name}"] = (), lambda box, name=name: do_scaling(box, name)
    return cases


def missing_package(name):
    """The package that a case needs and that is not installed, or ''."""
    wanted = {
        "tokenizers": ("pieces", "*tokenizer_json"),
        "lm_eval": ("tasks", "eval_*tasks"),
        "scipy": ("scaling_*",),
    }
    for package, patterns in wanted.items():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns) and not importlib.util.find_spec(
            package
        ):
            return package
    return ""


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
    path.write_text(json.dumps(dict(figures=figures, seconds=time.time() - start)))
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
        result = json.loads((box["work"] / f"figures/{name}.json").read_text())
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
            re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text().split("\n\n")[0], re.M)
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
