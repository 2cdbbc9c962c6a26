"""The sweep's layout, its runs (a stand-in for train.py where only the order of things matters), and once the real thing."""

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_main
from safetensors.torch import load_file

import configurator
import train
from configurator.ladder import ladder
from laws import sweep
from training.checkpoint import checkpoints
from training.log import read_metrics

BASE = """
corpus = {corpus!r}
n_layer, n_head, d_model = 1, 2, 32
seq_len, batch_size, warmup = 16, 4, 2
schedule, lr = "poly2", 2e-3
compile, dtype, device = "no", "float32", "cpu"
eval_rows, eval_every, log_every, save_every, keep = 8, 4, 3, 0, 1
"""

# What sweep.py knows of train.py: a config file in, checkpoints and metrics out, a save at SIGTERM. Without torch it starts at once.
STAND_IN = """
import json, os, runpy, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
s = {**json.loads((here / "defaults.json").read_text()), **{k: v for k, v in runpy.run_path(sys.argv[1]).items() if k[0] != "_"}}
run, stop = Path(s["run_dir"]), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
run.mkdir(parents=True, exist_ok=True)
first = max((int(p.name[5:]) for p in run.glob("step_*")), default=0)
with open(here / "calls.txt", "a") as file:
    file.write(f"{run.name} {first} {os.environ['OMP_NUM_THREADS']}\\n")
(run / "settings.json").write_text(json.dumps(s))
def save(step):
    (run / f"step_{step:08d}").mkdir(exist_ok=True)
    record = dict(step=step, steps=s["steps"], samples=step * s["batch_size"], settings=s, model=json.loads((here / "model.json").read_text()))
    (run / f"step_{step:08d}" / "checkpoint.json").write_text(json.dumps(record))
rules = json.loads((here / "rules.json").read_text()) if (here / "rules.json").exists() else {}
with open(run / "metrics.jsonl", "a", buffering=1) as metrics:
    for step in range(first + 1, s["steps"] + 1):
        time.sleep(rules.get("sleep", 0))
        metrics.write(json.dumps(dict(step=step, tokens=step * s["batch_size"] * s["seq_len"], loss=1 / step, val_loss=1 / step, val_bpb=2.0)) + "\\n")
        if step == rules.get(run.name):
            sys.exit("out of luck")
        if stop or step == s["steps"] or str(step) in s["save_at"].split(","):
            save(step)
        if stop:
            break
"""


@pytest.fixture
def config(corpus, tmp_path):
    """A sweep.Config on the tiny base, by default four budgets of one size."""
    base = tmp_path / "base.py"
    base.write_text(BASE.format(corpus=str(corpus)))

    def make(**settings):
        grid = {} if {"flops", "unique_tokens"} & set(settings) else dict(flops="4e8,8e8,1.6e9")
        return sweep.Config(**{**dict(base=str(base), out=str(tmp_path / "sweep"), models="1x32", objectives="masked"), **grid, **settings})

    return make


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Let the sweep run STAND_IN instead of train.py; returns a function of the rules that tells [(run, first step), …] so far."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN)
    (folder / "defaults.json").write_text(json.dumps(asdict(train.Config())))
    shape = dict(n_layer=1, n_head=2, n_kv_head=2, head_dim=16, d_model=32, d_ff=64, n_vocab=257, mask_id=257, seq_len=16, causal=False)
    (folder / "model.json").write_text(json.dumps(shape))
    monkeypatch.setattr(sweep, "TRAIN", folder / "train.py")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def calls(**rules):
        (folder / "rules.json").write_text(json.dumps(rules))
        return [line.split() for line in (folder / "calls.txt").read_text().splitlines()] if (folder / "calls.txt").exists() else []

    return calls


def started(calls):
    return [(name, int(step)) for name, step, _ in calls]


def command(cfg, **changes):
    settings = {k: v for k, v in asdict(cfg).items() if v != getattr(sweep.Config(), k)} | changes
    return [f"--{k}={v}" for k, v in settings.items()]


# ----------------------------------------------------------------------------------------------------- layout


def test_isoflop_grid_meets_its_budgets(config):
    runs = sweep.layout(config(models="1x32,2x64", objectives="masked,ar", seeds="1,2", lr_power=0.5))
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2 * 3
    assert runs[0].name == "masked_1x32_4e08_s1"
    for run in runs:
        budget = float(run.name.split("_")[2])
        assert abs(run.flops - budget) <= 6 * run.params * 64 / 2  # half a step of 4 × 16 tokens
        assert run.tokens == run.steps * 64 and run.settings.unique_tokens == 0
        layers, d = run.settings.n_layer, run.settings.d_model
        norms = (2 * layers + 1) * d + 2 * layers * 16
        assert run.params == 320 * d + layers * (4 * d * d + 3 * d * (64 if d == 32 else 128)) + norms  # the paper's N, and the norms
        assert run.settings.schedule == ("linear" if run.settings.objective == "ar" else "poly2")
        assert run.settings.lr == pytest.approx(2e-3 * (128 / run.settings.d_model) ** 0.5, rel=1e-3)
        assert run.settings.n_head == run.settings.d_model // 16 and run.settings.resume == "auto"
        assert run.steps - run.fork == max(1, round(0.2 * run.steps)) == run.settings.decay
        assert run.settings.problems() == []


def test_sharing_saves_what_it_says(config, capsys):
    cfg = config(flops="4e8,8e8,1.6e9")
    short, middle, long = runs = sweep.layout(cfg)
    assert [run.settings.save_at for run in runs] == [f"{short.fork}", f"{short.fork},{middle.fork}", f"{short.fork},{middle.fork},{long.fork}"]
    step = 6 * short.params * 64
    assert sweep.remaining(runs, cfg) == pytest.approx(step * (long.steps + short.steps - short.fork + middle.steps - middle.fork))
    alone = config(share=False)
    assert sweep.remaining(sweep.layout(alone), alone) == pytest.approx(step * (long.steps + short.steps + middle.steps))
    sweep.show(runs, cfg)
    saved = 1 - sweep.remaining(runs, cfg) / sum(run.flops for run in runs)
    assert f"sharing saves {saved:.0%}" in capsys.readouterr().out


def test_data_constrained_grid(config):
    runs = sweep.layout(config(unique_tokens="1e3,3000", epochs="4,8.5,64", evals=10))
    assert [run.name for run in runs] == [f"masked_1x32_{u}u_{e}e_s1337" for u in (1000, 3000) for e in ("4", "8.5", "64")]
    for run in runs:
        unique, epochs = (float(part[:-1]) for part in run.name.split("_")[2:4])
        assert run.settings.unique_tokens == unique and abs(run.tokens - unique * epochs) <= 32
        assert run.epochs == pytest.approx(run.tokens / unique)
        assert run.settings.eval_every == round(64 * unique / 64) // 10  # the same in all runs of a group


def test_sizes_of_the_ladder(config):
    run, *_ = sweep.layout(config(models="106M", flops="1e15", share=False))
    assert run.settings.model == "106M" and run.settings.shape()["n_layer"] == ladder("106M")["n_layer"]


def test_a_config_file_is_the_whole_run(config):
    cfg = config(objectives="ar", seeds="5")
    for run in sweep.layout(cfg):
        assert configurator.load(train.Config, [str(sweep.write_config(run, cfg))]) == run.settings


@pytest.mark.parametrize("settings, expected", [
    (dict(flops=""), "which grid? give either flops, or unique_tokens and epochs"),
    (dict(flops="1e9", unique_tokens="1e3"), "which grid?"),
    (dict(unique_tokens="1e3"), "which grid?"),
    (dict(flops="1e9,many"), "flops=1e9,many: write positive numbers"),
    (dict(flops="1e9,-1"), "flops=1e9,-1: write positive numbers"),
    (dict(flops="1e9,1000000000"), "each once"),
    (dict(flops="inf"), "flops=inf: write positive numbers"),
    (dict(seeds="1.5"), "seeds=1.5: write whole numbers"),
    (dict(objectives="masked,rnn"), "objectives: 'rnn' is none of masked, ar, uniform"),
    (dict(models=""), "models is empty"),
    (dict(models="1x32,1x32"), "models=1x32,1x32: each once"),
    (dict(decay="0"), "share=True needs decay"),
    (dict(launch="slurm"), "launch=slurm needs share=False"),
    (dict(jobs="0"), "must be at least 1"),
    (dict(base="none.py"), "none.py: no such override file"),
    (dict(models="3by64"), "models=3by64: no single model of the ladder is called '3by64'"),
    (dict(models="3x"), "'3x' is neither a name of the ladder nor LAYERSxWIDTH"),
    (dict(models="3x40"), "the width of 3x40 is no multiple of the base's heads of 16"),
    (dict(flops="1e6"), "steps are too few for warmup=2"),
    (dict(unique_tokens="1e9", epochs="1"), "the corpus has only"),
])
def test_bad_settings_are_one_line_each(config, capsys, settings, expected):
    grid = {} if {"flops", "unique_tokens"} & set(settings) else dict(flops="4e8")
    flags = dict(base=config().base, out=config().out, models="1x32", objectives="masked", **grid) | settings
    flags = {k: v for k, v in flags.items() if v or k in settings}
    with pytest.raises(SystemExit) as exit:
        sweep.layout(configurator.load(sweep.Config, [f"--{k}={v}" for k, v in flags.items()]))
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and expected in lines[0]


@pytest.mark.parametrize("line, expected", [
    ('time = "moving_gaussian"', "time=moving_gaussian goes by the share of all steps"),
    ('corpus = "nowhere"', "nowhere"),
    ("min_lr = 0", "lr_schedule=wsd decays exponentially"),
    ("lr = -1", "lr=-1: must be above 0"),
])
def test_bad_bases_are_one_line_each(config, capsys, line, expected):
    cfg = config(flops="4e8")
    with open(cfg.base, "a") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit) as exit:
        sweep.layout(cfg)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and expected in lines[0]


def test_moving_gaussian_without_sharing(config):
    cfg = config(share=False)
    with open(cfg.base, "a") as file:
        file.write('time = "moving_gaussian"\n')
    assert all(run.settings.save_at == "" for run in sweep.layout(cfg))


# ------------------------------------------------------------------------------------------ the order of things


def test_branches_go_on_from_the_longest_run(config, stand_in, capsys):
    cfg = config(objectives="masked,ar", jobs=2)
    points = sweep.run(cfg)
    runs = sweep.layout(cfg)
    short, middle, long, *_ = runs
    calls = stand_in()
    assert sorted(started(calls)) == sorted((run.name, 0 if run.steps == long.steps else run.fork) for run in runs)
    assert {threads for *_, threads in calls} == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert [m["step"] for m in read_metrics(short.folder)] == list(range(1, short.steps + 1))
    trunk = long.folder / f"step_{short.fork:08d}" / "checkpoint.json"
    assert trunk.samefile(short.folder / f"step_{short.fork:08d}" / "checkpoint.json")  # linked, not copied
    out = capsys.readouterr().out
    assert "1 of 6, loss" in out and "6 of 6, loss" in out and "100.0% of the FLOPs, about 0 min left" in out
    with open(points) as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == sweep.POINT and len(rows) == 6
    for row in rows:
        assert int(row["flops"]) == 6 * int(row["params"]) * int(row["tokens"]) and float(row["val_loss"]) == pytest.approx(64 / int(row["tokens"]), rel=1e-6)
        assert row["unique_tokens"] == "0" and float(row["epochs"]) < 1 and row["batch"] == "64"


def test_finished_runs_are_skipped_and_broken_ones_resumed(config, stand_in):
    cfg = config()
    sweep.run(cfg)
    first = started(stand_in())
    sweep.run(cfg)
    assert started(stand_in()) == first  # nothing to do
    short, middle, long = sweep.layout(cfg)
    shutil.rmtree(middle.folder / f"step_{middle.steps:08d}")  # it broke in its decay
    shutil.rmtree(short.folder)  # and this one is gone altogether
    sweep.run(cfg)
    assert sorted(started(stand_in())[len(first):]) == sorted([(middle.name, middle.fork), (short.name, short.fork)])


def test_a_branch_whose_checkpoint_is_gone_goes_all_the_way(config, stand_in):
    cfg = config()
    sweep.run(cfg)
    short, middle, long = sweep.layout(cfg)
    shutil.rmtree(short.folder)
    for folder in (middle.folder, long.folder):
        shutil.rmtree(folder / f"step_{short.fork:08d}", ignore_errors=True)
    assert sweep.remaining([short, middle, long], cfg) == short.flops
    sweep.run(cfg)
    assert started(stand_in())[-1] == (short.name, 0)


def test_branches_come_before_the_next_trunk(config, stand_in):
    sweep.run(config(objectives="masked,ar"))
    assert [name.split("_")[0] for name, _ in started(stand_in())] == ["masked"] * 3 + ["ar"] * 3


def test_without_sharing_each_starts_from_nothing(config, stand_in):
    cfg = config(share=False)
    sweep.run(cfg)
    assert started(stand_in()) == [(run.name, 0) for run in sweep.layout(cfg)]


def test_a_grid_grows_from_where_its_longest_run_began_to_decay(config, stand_in):
    sweep.run(config(flops="4e8,8e8"))
    first = started(stand_in())
    cfg = config(flops="4e8,8e8,1.6e9")
    *_, middle, long = sweep.layout(cfg)
    sweep.run(cfg)
    assert started(stand_in())[len(first):] == [(long.name, middle.fork)]


def test_the_others_go_on_when_one_fails(config, stand_in, capsys):
    cfg = config(objectives="masked,ar")
    short, middle, long, *others = sweep.layout(cfg)
    stand_in(**{long.name: short.fork + 1})
    with pytest.raises(SystemExit) as exit:
        sweep.run(cfg)
    assert exit.value.code == 1 and long.finished is False
    assert short.finished and not middle.finished and all(run.finished for run in others)  # short's checkpoint was there
    err = capsys.readouterr().err
    assert f"{middle.name}: needs {long.name}" in err and f"{long.name}: exit code 1, see {cfg.out}/logs/{long.name}.log" in err
    assert "out of luck" in Path(f"{cfg.out}/logs/{long.name}.log").read_text()
    assert len(list(csv.DictReader(open(f"{cfg.out}/points.csv")))) == 4
    stand_in()
    sweep.run(cfg)  # mended
    assert all(run.finished for run in sweep.layout(cfg)) and started(stand_in())[-2:] == [(long.name, short.fork), (middle.name, middle.fork)]


def test_other_settings_are_refused(config, stand_in, capsys):
    sweep.run(config(flops="4e8"))
    cfg = config(flops="4e8", lr_power=1)
    with pytest.raises(SystemExit) as exit:
        sweep.layout(cfg)
    assert exit.value.code == 2 and "was made with other settings (lr 0.002 → 0.008)" in capsys.readouterr().err


def test_a_run_that_another_process_trains_is_left_alone(config, stand_in, capsys):
    cfg = config(flops="4e8")
    run, = sweep.layout(cfg)
    stand_in(sleep=0.1)
    child = sweep.start(run, cfg, 0)
    with pytest.raises(SystemExit):
        sweep.run(cfg)
    assert "another process is training it" in capsys.readouterr().err
    child.process.terminate()
    child.process.wait()
    stand_in()
    sweep.run(cfg)


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_stops_children_and_the_same_command_goes_on(config, stand_in, signum):
    cfg = config(objectives="masked,ar", jobs=2)
    stand_in(sleep=0.2)
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sweep; sweep.TRAIN = {str(sweep.TRAIN)!r}; sweep.main()", *command(cfg)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    trunks = [run for run in sweep.layout(cfg) if run.name.endswith("1.6e09_s1337")]
    end = time.monotonic() + 60
    while not all(len(read_metrics(run.folder)) > 1 for run in trunks) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(process.pid, signum)  # as a terminal does: to the whole group
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and "stopped by a signal; 0 of 6 runs are finished, the same command goes on" in out
    assert "failed" not in out
    for run in trunks:
        steps = [m["step"] for m in read_metrics(run.folder)]
        assert run.done == steps[-1] < run.steps  # they saved where they were
    stand_in()
    done = {run.name: run.done for run in trunks}
    sweep.run(cfg)
    for name, step in done.items():
        assert (name, step) in started(stand_in())
    assert all(run.finished for run in sweep.layout(cfg))


# ------------------------------------------------------------------------------------------------- launching


def test_torchrun_lines(config, capsys):
    cfg = config(share=False, launch="torchrun", processes=4)
    sweep.launch(sweep.layout(cfg), cfg)
    lines = capsys.readouterr().out.splitlines()
    for line, run in zip(lines, sweep.layout(cfg), strict=True):
        program, processes, script, path = shlex.split(line)
        assert (program, processes, script) == ("torchrun", "--nproc_per_node=4", str(ROOT / "train.py"))
        assert configurator.load(train.Config, [path]) == run.settings


def test_slurm_array(config, tmp_path):
    cfg = config(share=False, launch="slurm", processes=2, jobs=3, out=str(tmp_path / "it's a sweep"))
    sweep.launch(sweep.layout(cfg), cfg)
    script = tmp_path / "it's a sweep" / "sweep.sbatch"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "#SBATCH --array=0-2%3" in script.read_text()
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    for i, run in enumerate(sweep.layout(cfg)):
        env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(i), PATH=f"{tmp_path}:{os.environ['PATH']}")
        words = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True).stdout.splitlines()
        assert words[0] == "--nproc_per_node=2" and configurator.load(train.Config, [words[2]]) == run.settings


# ------------------------------------------------------------------------------------------------ the real thing


def figures(run):
    return [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in read_metrics(run) if "event" not in m]


def train_here(monkeypatch, *argv):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call_main(monkeypatch, *argv)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("objective", ("masked", pytest.param("ar", marks=pytest.mark.slow)))
def test_branches_are_to_the_bit_what_runs_from_scratch_are(config, monkeypatch, tmp_path, objective):
    """A trunk and a branch; the masked trunk interrupted by a real SIGINT to the real sweep."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as it will be in this process, for the same sums
    cfg = config(unique_tokens="1000", epochs="3,20", objectives=objective, evals=8)
    runs = sweep.layout(cfg)
    if objective == "masked":
        process = subprocess.Popen([sys.executable, "sweep.py", *command(cfg)], cwd=ROOT, start_new_session=True)
        end = time.monotonic() + 120
        while len(read_metrics(runs[1].folder)) < 30 and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130 and 0 < runs[1].done < runs[1].steps
    sweep.run(cfg)
    for run in runs:
        train_here(monkeypatch, sweep.write_config(run, cfg), f"--run_dir={tmp_path / 'scratch' / run.name}", "--save_at=")
        assert figures(run.folder) == figures(tmp_path / "scratch" / run.name)
        a, b = (load_file(checkpoints(folder)[0] / "model.safetensors") for folder in (run.folder, tmp_path / "scratch" / run.name))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        a, b = (load_file(checkpoints(folder)[0] / "optimizer/shard-00001-model-00001-of-00001.safetensors") for folder in (run.folder, tmp_path / "scratch" / run.name))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    rows, curves = (list(csv.DictReader(open(f"{cfg.out}/{name}.csv"))) for name in ("points", "curves"))
    assert [row["name"] for row in rows] == [run.name for run in runs]
    for row, run in zip(rows, runs):
        last = figures(run.folder)[-1]
        assert float(row["val_loss"]) == pytest.approx(last["val_loss"], rel=1e-6) and float(row["val_bpb"]) == pytest.approx(last["val_bpb"], rel=1e-6)
        assert float(row["epochs"]) == pytest.approx(run.epochs, rel=1e-6) and row["unique_tokens"] == "1000" and int(row["params"]) == run.params
    # the curve is the longest run's, without its decay
    along = [m for m in figures(runs[1].folder) if "val_loss" in m and 0 < m["step"] <= runs[1].fork]
    assert list(curves[0]) == sweep.CURVE and len(along) == len(curves) == 6
    assert [float(c["val_loss"]) for c in curves] == pytest.approx([m["val_loss"] for m in along], rel=1e-6)
    assert [float(c["epochs"]) for c in curves] == pytest.approx([m["tokens"] / 1000 for m in along], rel=1e-6)
    assert {(c["unique_tokens"], c["params"], c["objective"]) for c in curves} == {("1000", str(runs[0].params), objective)}


def test_save_at_keeps_its_checkpoints(config, monkeypatch, tmp_path, capsys):
    common = [config().base, "--steps=10", f"--run_dir={tmp_path / 'run'}"]
    train_here(monkeypatch, *common, "--save_at=3, 5", "--save_every=4", "--keep=1")
    assert [p.name[-2:] for p in checkpoints(tmp_path / "run")] == ["10", "05", "03"]
    for wrong in ("3,x", "0", "2.5", "3,,4", "-1"):
        with pytest.raises(SystemExit):
            train_here(monkeypatch, *common, f"--save_at={wrong}")
        line, = capsys.readouterr().err.splitlines()
        assert f"save_at={wrong}: '" in line and "is no step; write whole numbers from 1 on" in line


def test_the_grids_of_the_paper(corpus, tmp_path):
    """docs/checkpoints.md's commands lay out the paper's sizes at its budgets (the first of each loop)."""
    loops = re.findall(r"^for \w+ in .*?^done$", (ROOT / "docs/checkpoints.md").read_text(), re.S | re.M)
    own = tmp_path / "own.py"
    own.write_text(f"corpus = {str(corpus)!r}\n")
    for loop, name, where in zip(loops, ("isoflop_points.csv", "epoch_curves.csv"), ("flops", "unique_tokens"), strict=True):
        rows = list(csv.DictReader(open(ROOT / "results/quokka" / name)))
        header, first = re.match(r"for \w+ in ((\S+).*); do", loop).groups()
        assert set(header.split()) == {row[where] for row in rows}
        command = loop.replace(header, first).replace(".py --obj", f".py,{own} --obj").replace("python ", f"{sys.executable} ").replace(" --launch=", " --dry_run --launch=")
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        wanted = {f"{int(row['params']) // 10**6}M" for row in rows if row[where] == first}
        assert set(re.findall(r"masked_(\d+M)_", done.stdout + done.stderr)) == wanted and len(wanted) > 5  # of the small corpus there are fewer unique tokens: it says of which runs
        assert "Traceback" not in done.stderr
        if where == "flops":
            assert done.returncode == 0 and done.stdout.count(" 3e+18 ") == len(wanted), done.stdout
