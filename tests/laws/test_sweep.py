"""The sweep's layout, the order of its runs (with a stand-in for train.py), and once the real thing."""

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
from known import read_rows
from safetensors.torch import load_file

import configurator
import train
from configurator.ladder import ladder
from laws import collect, runner, sweep
from laws.runs import read_csv
from training.checkpoint import checkpoints
from training.log import read_metrics
from training.record import record_digest

BASE = """
corpus = {corpus!r}
n_layer, n_head, d_model = 1, 2, 32
seq_len, batch_size, warmup = 16, 4, 2
schedule, lr = "poly2", 2e-3
compile, dtype, device = "no", "float32", "cpu"
eval_rows, eval_every, log_every, save_every, keep = 8, 4, 3, 0, 1
"""

# What a sweep needs of train.py, without torch, so that it starts at once: a config file in, checkpoints and
# metrics out, a save at SIGTERM.
STAND_IN = """
import hashlib, json, os, runpy, signal, sys, time
from pathlib import Path
here = Path(__file__).parent
overrides = {k: v for k, v in runpy.run_path(sys.argv[1]).items() if k[0] != "_"}
s = {**json.loads((here / "defaults.json").read_text()), **overrides}
run, stop = Path(s["run_dir"]), []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
run.mkdir(parents=True, exist_ok=True)
first = max((int(p.name[5:]) for p in run.glob("step_*")), default=0)
with open(here / "calls.txt", "a") as file:
    file.write(f"{run.name} {first} {os.environ['OMP_NUM_THREADS']}\\n")
(run / "settings.json").write_text(json.dumps(s))
def save(step):
    folder = run / f"step_{step:08d}"
    folder.mkdir(exist_ok=True)
    record = dict(step=step, steps=s["steps"], next_sample=step * s["batch_size"], settings=s)
    record |= dict(updates=step, passed_samples=0, bad_in_a_row=0, pending=[], sha256={})
    record["corpus"] = dict(tokenizer="bytes", n_vocab=257, mask_id=257, eos_id=256)
    record["model"] = json.loads((here / "model.json").read_text()) | dict(causal=s["objective"] == "ar")
    text = json.dumps(record, sort_keys=True)
    record["record_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(record))
rules = json.loads((here / "rules.json").read_text()) if (here / "rules.json").exists() else {}
with open(run / "metrics.jsonl", "a", buffering=1) as metrics:
    for step in range(first + 1, s["steps"] + 1):
        time.sleep(rules.get("sleep", 0))
        tokens = step * s["batch_size"] * s["seq_len"]
        loss = "nan" if run.name == rules.get("diverges") and step > 4 else 1 / step
        line = dict(step=step, tokens=tokens, loss=loss, val_loss=loss, val_bpb=2.0,
                    objective=s["objective"])
        metrics.write(json.dumps(line) + "\\n")
        if step == rules.get(run.name):
            sys.exit("out of luck")
        if stop or step == s["steps"] or str(step) in s["save_at"].split(","):
            save(step)
        if stop:
            break
"""
SHAPE = dict(n_layer=1, n_head=2, n_kv_head=2, head_dim=16, d_model=32, d_ff=64)
MODEL = SHAPE | dict(n_vocab=257, mask_id=257, seq_len=16, causal=False)


@pytest.fixture
def config(corpus, tmp_path):
    """Make a sweep.Config on the tiny base, by default of three budgets of one size."""
    base = tmp_path / "base.py"
    base.write_text(BASE.format(corpus=str(corpus)), encoding="utf-8")
    defaults = dict(base=str(base), out=str(tmp_path / "sweep"), models="1x32", objectives="masked")

    def make(**settings):
        grid = {} if {"flops", "unique_tokens"} & set(settings) else dict(flops="4e8,8e8,1.6e9")
        return sweep.Config(**{**defaults, **grid, **settings})

    return make


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Let sweeps run STAND_IN instead of train.py.

    Returns a function of the rules that tells [(run, first step, threads), …] so far.
    """
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "train.py").write_text(STAND_IN, encoding="utf-8")
    (folder / "defaults.json").write_text(json.dumps(asdict(train.Config())), encoding="utf-8")
    (folder / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    monkeypatch.setattr(runner, "TRAIN", folder / "train.py")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def calls(**rules):
        (folder / "rules.json").write_text(json.dumps(rules), encoding="utf-8")
        path = folder / "calls.txt"
        return (
            [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
            if path.exists()
            else []
        )

    return calls


def started(calls):
    return [(name, int(step)) for name, step, _ in calls]


def flags_of(cfg, **changes):
    settings = {k: v for k, v in asdict(cfg).items() if v != getattr(sweep.Config(), k)} | changes
    return [f"--{k}={v}" for k, v in settings.items()]


def await_metrics(runs, lines, seconds=60):
    """Wait until each run has logged so many lines."""
    end = time.monotonic() + seconds
    while not all(len(read_metrics(run.folder)) > lines for run in runs) and time.monotonic() < end:
        time.sleep(0.05)


# ---- layout


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
        matrices = layers * (4 * d * d + 3 * d * (64 if d == 32 else 128))
        assert run.params == 320 * d + matrices + norms  # the paper's N, and the norms
        assert run.settings.schedule == ("linear" if run.settings.objective == "ar" else "poly2")
        assert run.settings.lr == pytest.approx(2e-3 * (128 / run.settings.d_model) ** 0.5, rel=1e-3)
        assert run.settings.n_head == run.settings.d_model // 16 and run.settings.resume == "auto"
        assert run.steps - run.fork == max(1, round(0.2 * run.steps)) == run.settings.decay
        assert configurator.unmet_needs(run.settings, train.Config.NEEDS) == run.settings.problems() == []


def test_sharing_saves_what_it_says(config, capsys):
    cfg = config(flops="4e8,8e8,1.6e9")
    short, middle, long = runs = sweep.layout(cfg)
    forks = [str(run.fork) for run in runs]
    assert [run.settings.save_at for run in runs] == [",".join(forks[:n]) for n in (1, 2, 3)]

    step = 6 * short.params * 64
    steps = long.steps + short.steps - short.fork + middle.steps - middle.fork
    assert sweep.remaining_flops(runs, cfg) == pytest.approx(step * steps)
    alone = config(share=False)
    steps = long.steps + short.steps + middle.steps
    assert sweep.remaining_flops(sweep.layout(alone), alone) == pytest.approx(step * steps)

    sweep.print_runs(runs, cfg)
    saved = 1 - sweep.remaining_flops(runs, cfg) / sum(run.flops for run in runs)
    assert f"sharing saves {saved:.0%}" in capsys.readouterr().out


def test_data_constrained_grid(config):
    runs = sweep.layout(config(unique_tokens="1e3,3000", epochs="4,8.5,64", evals=10))
    lengths = [f"{unique}u_{epochs}e" for unique in (1000, 3000) for epochs in ("4", "8.5", "64")]
    assert [run.name for run in runs] == [f"masked_1x32_{length}_s1337" for length in lengths]
    for run in runs:
        unique, epochs = (float(part[:-1]) for part in run.name.split("_")[2:4])
        assert run.settings.unique_tokens == unique and abs(run.tokens - unique * epochs) <= 32
        assert run.epochs == pytest.approx(run.tokens / unique)
        assert run.settings.eval_every == round(64 * unique / 64) // 10  # the same in all runs of a group


def test_sizes_of_the_ladder(config):
    run, *_ = sweep.layout(config(models="106M", flops="1e15", share=False))
    assert run.settings.model == "106M" and run.settings.shape()["n_layer"] == ladder("106M")["n_layer"]


def test_ar_runs_of_a_base_in_blocks_have_none(config, tmp_path):
    base = tmp_path / "blocks.py"
    plain = Path(config().base).read_text(encoding="utf-8")
    base.write_text(f"{plain}\ndiffusion_block = 4\n", encoding="utf-8")
    for run in sweep.layout(config(base=str(base), objectives="masked,ar")):
        assert run.settings.diffusion_block == (4 if run.settings.objective == "masked" else 0)
        assert not run.settings.problems()


@pytest.mark.parametrize("folder", ("plain", "a'b \"c\"\\d", "a\u2028b"))
def test_a_config_file_is_the_whole_run(config, tmp_path, folder):
    base = tmp_path / "the\nbase.py"
    base.write_bytes(Path(config().base).read_bytes())
    cfg = config(objectives="ar", seeds="5", base=str(base), out=str(tmp_path / folder))
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
])  # fmt: skip
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
    ('loss = "paper"', "loss=paper needs objective=uniform"),
])  # fmt: skip
def test_bad_bases_are_one_line_each(config, capsys, line, expected):
    cfg = config(flops="4e8")
    with open(cfg.base, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(SystemExit) as exit:
        sweep.layout(cfg)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and len(lines) == 1 and expected in lines[0]


def test_moving_gaussian_without_sharing(config):
    cfg = config(share=False)
    with open(cfg.base, "a", encoding="utf-8") as file:
        file.write('time = "moving_gaussian"\n')
    assert all(run.settings.save_at == "" for run in sweep.layout(cfg))


# ---- the order of things


def test_branches_go_on_from_the_longest_run(config, stand_in, capsys):
    cfg = config(objectives="masked,ar", jobs=2)
    points = sweep.run_sweep(cfg)
    runs = sweep.layout(cfg)
    short, middle, long, *_ = runs
    calls = stand_in()
    expected = [(run.name, 0 if run.steps == long.steps else run.fork) for run in runs]
    assert sorted(started(calls)) == sorted(expected)
    assert {threads for *_, threads in calls} == {str(max(1, (os.cpu_count() or 1) // 2))}
    assert [m["step"] for m in read_metrics(short.folder)] == list(range(1, short.steps + 1))
    record = f"step_{short.fork:08d}/checkpoint.json"
    assert (long.folder / record).samefile(short.folder / record)  # linked, not copied

    out = capsys.readouterr().out
    assert "1 of 6, loss" in out and "6 of 6, loss" in out and "100.0% of the FLOPs, about 0 min left" in out
    rows = read_rows(points)
    assert list(rows[0]) == collect.POINT_COLUMNS and len(rows) == 6
    for row in rows:
        tokens = int(row["tokens"])
        assert int(row["flops"]) == 6 * int(row["params"]) * tokens
        assert float(row["val_loss"]) == pytest.approx(64 / tokens, rel=1e-6)
        assert row["unique_tokens"] == "0" and float(row["epochs"]) < 1 and row["batch"] == "64"


def test_finished_runs_are_skipped_and_broken_ones_resumed(config, stand_in):
    cfg = config()
    sweep.run_sweep(cfg)
    first = started(stand_in())
    sweep.run_sweep(cfg)
    assert started(stand_in()) == first  # nothing to do
    short, middle, long = sweep.layout(cfg)
    shutil.rmtree(middle.folder / f"step_{middle.steps:08d}")  # it broke in its decay
    shutil.rmtree(short.folder)  # and this one is gone altogether
    sweep.run_sweep(cfg)
    resumed = started(stand_in())[len(first) :]
    assert sorted(resumed) == sorted([(middle.name, middle.fork), (short.name, short.fork)])


def test_a_branch_whose_checkpoint_is_gone_goes_all_the_way(config, stand_in):
    cfg = config()
    sweep.run_sweep(cfg)
    short, middle, long = sweep.layout(cfg)
    shutil.rmtree(short.folder)
    for folder in (middle.folder, long.folder):
        shutil.rmtree(folder / f"step_{short.fork:08d}", ignore_errors=True)
    assert sweep.remaining_flops([short, middle, long], cfg) == short.flops
    sweep.run_sweep(cfg)
    assert started(stand_in())[-1] == (short.name, 0)


def test_branches_come_before_the_next_trunk(config, stand_in):
    sweep.run_sweep(config(objectives="masked,ar"))
    assert [name.split("_")[0] for name, _ in started(stand_in())] == ["masked"] * 3 + ["ar"] * 3


def test_without_sharing_each_starts_from_nothing(config, stand_in):
    cfg = config(share=False)
    sweep.run_sweep(cfg)
    assert started(stand_in()) == [(run.name, 0) for run in sweep.layout(cfg)]


def test_a_grid_grows_from_where_its_longest_run_began_to_decay(config, stand_in):
    sweep.run_sweep(config(flops="4e8,8e8"))
    first = started(stand_in())
    cfg = config(flops="4e8,8e8,1.6e9")
    *_, middle, long = sweep.layout(cfg)
    sweep.run_sweep(cfg)
    assert started(stand_in())[len(first) :] == [(long.name, middle.fork)]


def test_the_others_go_on_when_one_fails(config, stand_in, capsys):
    cfg = config(objectives="masked,ar")
    short, middle, long, *others = sweep.layout(cfg)
    stand_in(**{long.name: short.fork + 1})
    with pytest.raises(SystemExit) as exit:
        sweep.run_sweep(cfg)
    assert exit.value.code == 1 and not long.is_finished
    assert short.is_finished and not middle.is_finished  # short's checkpoint was there
    assert all(run.is_finished for run in others)

    err, log = capsys.readouterr().err, Path(cfg.out) / "logs" / f"{long.name}.log"
    assert f"{middle.name}: needs {long.name}" in err and f"{long.name}: exit code 1, see {log}" in err
    assert "out of luck" in log.read_text(encoding="utf-8")
    assert len(read_rows(f"{cfg.out}/points.csv")) == 4
    stand_in()
    sweep.run_sweep(cfg)  # mended
    assert all(run.is_finished for run in sweep.layout(cfg))
    assert started(stand_in())[-2:] == [(long.name, short.fork), (middle.name, middle.fork)]


def test_a_run_that_diverges_is_a_point_without_a_loss(config, stand_in, capsys):
    cfg = config(share=False)
    *_, long = sweep.layout(cfg)
    stand_in(diverges=long.name)
    points = sweep.run_sweep(cfg)
    assert "loss nan (2.0000 bits/byte)" in capsys.readouterr().out
    assert [row["val_loss"] == "nan" for row in read_rows(points)] == [False, False, True]
    assert len(read_csv(points).loss) == 2

    repeated = config(unique_tokens="256", epochs="1,4", share=False, out=f"{cfg.out}_repeated")
    stand_in(diverges=sweep.layout(repeated)[-1].name)
    points = sweep.run_sweep(repeated)
    losses = [row["val_loss"] for row in read_rows(points.with_name("curves.csv"))]
    assert losses[:4] == ["1", "0.5", "0.3333333", "0.25"] and set(losses[4:]) == {"nan"}


def test_other_settings_are_refused(config, stand_in, capsys):
    sweep.run_sweep(config(flops="4e8"))
    with pytest.raises(SystemExit) as exit:
        sweep.layout(config(flops="4e8", lr_power=1))
    assert exit.value.code == 2
    assert "was made with other settings (lr 0.002 → 0.008); remove it" in capsys.readouterr().err


def test_settings_that_change_no_result_are_not_refused(config, stand_in):
    cfg = config(flops="4e8")
    sweep.run_sweep(cfg)
    with open(cfg.base, "a", encoding="utf-8") as file:
        file.write("log_every, micro_batch, device, keep = 2, 2, 'auto', 7\n")
    [run] = sweep.layout(cfg)
    assert run.is_finished and run.settings.micro_batch == 2


def test_the_folder_of_an_older_sweep_is_finished(config, stand_in):
    """Configs, settings and records with block_len, samples and settings that are gone."""
    cfg = config()
    points = sweep.run_sweep(cfg).read_text(encoding="utf-8")
    first = started(stand_in())
    for path in [*Path(cfg.out).rglob("*.json"), *Path(cfg.out).glob("configs/*.py")]:
        text = (
            path.read_text(encoding="utf-8")
            .replace("seq_len", "block_len")
            .replace("next_sample", "samples")
        )
        text = text.replace('"settings": {', '"settings": {"eval_tasks": "mmlu", ')
        if path.name == "checkpoint.json":
            record = json.loads(text)
            del record["record_sha256"]
            text = json.dumps(record | dict(record_sha256=record_digest(record)))
        path.unlink()  # branches share the trunk's files
        path.write_text(text, encoding="utf-8")
    assert configurator.load(train.Config, [str(path)]).seq_len == 16
    assert sweep.run_sweep(cfg).read_text(encoding="utf-8") == points and started(stand_in()) == first


def test_a_run_that_another_process_trains_is_left_alone(config, stand_in, capsys):
    cfg = config(flops="4e8")
    runs = sweep.layout(cfg)
    stand_in(sleep=0.1)
    with runner.Runner() as other:
        sweep.start(runs[0], runs, cfg, other, 0)
        with pytest.raises(SystemExit):
            sweep.run_sweep(cfg)
        assert "another process is training it" in capsys.readouterr().err
        other.children[0].process.terminate()
        other.wait()
    stand_in()
    sweep.run_sweep(cfg)


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_a_signal_stops_children_and_the_same_command_goes_on(config, stand_in, signum):
    cfg = config(objectives="masked,ar", jobs=2)
    stand_in(sleep=0.2)
    program = f"from laws import runner, sweep; runner.TRAIN = {str(runner.TRAIN)!r}; sweep.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *flags_of(cfg)], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)
    trunks = [run for run in sweep.layout(cfg) if run.name.endswith("1.6e09_s1337")]
    await_metrics(trunks, 1)
    os.killpg(process.pid, signum)  # as a terminal does: to the whole group
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and "failed" not in out
    assert "stopped by a signal; 0 of 6 runs are finished, the same command goes on" in out
    for run in trunks:
        steps = [m["step"] for m in read_metrics(run.folder)]
        assert run.saved_step == steps[-1] < run.steps  # they saved where they were

    stand_in()
    saved = {run.name: run.saved_step for run in trunks}
    sweep.run_sweep(cfg)
    for name, step in saved.items():
        assert (name, step) in started(stand_in())
    assert all(run.is_finished for run in sweep.layout(cfg))


# ---- launching


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
    assert "#SBATCH --array=0-2%3" in script.read_text(encoding="utf-8")
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (tmp_path / "torchrun").chmod(0o755)
    for i, run in enumerate(sweep.layout(cfg)):
        env = dict(os.environ, SLURM_ARRAY_TASK_ID=str(i), PATH=f"{tmp_path}:{os.environ['PATH']}")
        done = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True)
        words = done.stdout.splitlines()
        assert words[0] == "--nproc_per_node=2"
        assert configurator.load(train.Config, [words[2]]) == run.settings


# ---- the real thing


def figures(run):
    """A run's metrics without events and speed."""
    metrics = [m for m in read_metrics(run) if "event" not in m]
    return [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in metrics]


def tensors_of(folder):
    """The weights and moments of a run's newest checkpoint."""
    newest = checkpoints(folder)[0]
    moments = "optimizer/shard-00001-model-00001-of-00001.safetensors"
    return load_file(newest / "model.safetensors") | load_file(newest / moments)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def train_here(monkeypatch, *argv):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call_main(monkeypatch, *argv)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("objective, interrupted", [
    ("masked", False), slow("masked", True), slow("ar", False)])
def test_branches_are_to_the_bit_what_runs_from_scratch_are(
        config, monkeypatch, tmp_path, objective, interrupted):
    """A trunk and a branch; interrupted: the trunk, by a real SIGINT to the real sweep."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as it will be in this process, for the same sums
    cfg = config(unique_tokens="1000", epochs="3,20", objectives=objective, evals=8)
    runs = short, long = sweep.layout(cfg)
    if interrupted:
        command = [sys.executable, "scaling.py", "sweep", *flags_of(cfg)]
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        await_metrics([long], 29, seconds=120)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130 and 0 < long.saved_step < long.steps
    sweep.run_sweep(cfg)

    for run in runs:
        scratch = tmp_path / "scratch" / run.name
        train_here(monkeypatch, sweep.write_config(run, cfg), f"--run_dir={scratch}", "--save_at=")
        assert figures(run.folder) == figures(scratch)
        a, b = tensors_of(run.folder), tensors_of(scratch)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    points, curves = (read_rows(f"{cfg.out}/{name}.csv") for name in ("points", "curves"))
    assert [row["name"] for row in points] == [run.name for run in runs]
    for row, run in zip(points, runs):
        last = figures(run.folder)[-1]
        for key in ("val_loss", "val_bpb"):
            assert float(row[key]) == pytest.approx(last[key], rel=1e-6)
        assert float(row["epochs"]) == pytest.approx(run.epochs, rel=1e-6)
        assert row["unique_tokens"] == "1000" and int(row["params"]) == run.params

    # the curve is the longest run's, without its decay
    along = [m for m in figures(long.folder) if "val_loss" in m and 0 < m["step"] <= long.fork]
    assert list(curves[0]) == collect.CURVE_COLUMNS and len(along) == len(curves) == 6
    for row, m in zip(curves, along):
        assert float(row["val_loss"]) == pytest.approx(m["val_loss"], rel=1e-6)
        assert float(row["epochs"]) == pytest.approx(m["tokens"] / 1000, rel=1e-6)
    keys = {(c["unique_tokens"], c["params"], c["objective"]) for c in curves}
    assert keys == {("1000", str(short.params), objective)}


def test_save_at_keeps_its_checkpoints(config, monkeypatch, tmp_path, capsys):
    common = [config().base, "--steps=10", f"--run_dir={tmp_path / 'run'}"]
    train_here(monkeypatch, *common, "--save_at=3, 5", "--save_every=4", "--keep=1")
    assert [p.name[-2:] for p in checkpoints(tmp_path / "run")] == ["10", "05", "03"]
    for wrong in ("3,x", "0", "2.5", "3,,4", "-1"):
        with pytest.raises(SystemExit):
            train_here(monkeypatch, *common, f"--save_at={wrong}")
        [line] = capsys.readouterr().err.splitlines()
        assert f"save_at={wrong}: '" in line and "is no step; write whole numbers from 1 on" in line


def test_the_grids_of_the_paper(corpus, tmp_path):
    """docs/checkpoints.md's commands lay out the paper's sizes at its budgets (the first of each loop)."""
    loops = re.findall(
        r"^for \w+ in .*?^done$", (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8"), re.S | re.M
    )
    own = tmp_path / "own.py"
    own.write_text(f"corpus = {str(corpus)!r}\n", encoding="utf-8")
    names = ("isoflop_points.csv", "epoch_curves.csv")
    for loop, name, column in zip(loops, names, ("flops", "unique_tokens"), strict=True):
        rows = read_rows(ROOT / "results/quokka" / name)
        values, first = re.match(r"for \w+ in ((\S+).*); do", loop).groups()
        assert set(values.split()) == {row[column] for row in rows}

        command = loop.replace(values, first).replace("python ", f"{sys.executable} ")
        command = command.replace(".py --obj", f".py,{own} --obj")
        command = command.replace(" --launch=", " --dry_run --launch=")
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        sizes = {f"{int(row['params']) // 10**6}M" for row in rows if row[column] == first}
        # of the small corpus there are fewer unique tokens: it says of which runs
        assert set(re.findall(r"masked_(\d+M)_", done.stdout + done.stderr)) == sizes and len(sizes) > 5
        assert "Traceback" not in done.stderr
        if column == "flops":
            assert done.returncode == 0 and done.stdout.count(" 3e+18 ") == len(sizes), done.stdout
