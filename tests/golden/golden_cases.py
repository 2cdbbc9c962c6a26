"""The cases of the record: what each runs, and which of the figures that come out are kept.

A case is a function of a box: the checkout whose commands it runs, the folder to work in, whether each
command starts a new Python, and the case's name.
"""

import fnmatch
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import as_before
from golden_settings import EVAL, RANKS, RUN_OF, SAMPLE, SCALING, TRAIN, WRITE

HERE = Path(__file__).resolve().parent
AS_BEFORE = str(HERE / "as_before.py")
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
                [sys.executable, AS_BEFORE, *argv], cwd=box["work"], stdout=stdout, stderr=stderr
            ).returncode
        else:
            code = forked(argv, box["work"], stdout, stderr)
    if code not in expected:
        last = (err.read_text(errors="replace", encoding="utf-8").strip() or "nothing").splitlines()[-1]
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
        as_before.take_back()
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
            [*launcher, AS_BEFORE, *command(box["checkout"], words)], cwd=box["work"], stdout=log, stderr=log
        ).returncode
    if code:
        raise RuntimeError(f"2 × {shlex.join(words)}: exit code {code}")


def run_until(box, words, run_dir, lines):
    """Start training and stop it (SIGTERM) once metrics.jsonl has so many lines; it must exit with 75."""
    metrics = box["work"] / run_dir / "metrics.jsonl"
    with open(box["work"] / f"logs/{box['case']}.err", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, AS_BEFORE, *command(box["checkout"], words)],
            cwd=box["work"], stdout=log, stderr=log,
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
    for line in map(
        old_names, map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    ):
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
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return dict(tokens=[line["new_ids"] for line in lines], texts=[line["text"] for line in lines])


def eval_figures(path):
    """What eval.json says, without paths, versions and settings."""
    report = old_names(json.loads(path.read_text(encoding="utf-8")))
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
        meta = old_names(json.loads((work / f"corpora/{name}/meta.json").read_text(encoding="utf-8")))
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
    passes = re.findall(
        r"(\d+) forward passes", (box["work"] / f"logs/{box['case']}.err").read_text(encoding="utf-8")
    )
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
    found = json.loads((box["work"] / "frontier/frontier.json").read_text(encoding="utf-8"))
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
    return figures | (
        dict(noise_csv=curve.read_text(encoding="utf-8").splitlines()[1:]) if curve.exists() else {}
    )


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
                path.name: old_names(json.loads(path.read_text(encoding="utf-8")))
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
    return dict(points=(box["work"] / "runs/sweep/points.csv").read_text(encoding="utf-8").splitlines())


def do_old_run(box):
    """The run that 48006ab left after 20 of 40 steps (fixture.py): sampled, evaluated and resumed."""
    commands = {
        name: shlex.split(line)
        for name, line in json.loads((HERE / "expected.json").read_text(encoding="utf-8"))["commands"].items()
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
