"""The trainer as its users run it: real files, real processes, real signals."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main, prepared
from safetensors.torch import load_file

import data
import diffusion
import kernels
import train
from corpus import tokenfiles
from evaluation import likelihood
from model import ModelConfig
from training import checkpoint, distributed, transfer, update
from training.checkpoint import checkpoints, load_model, load_newest
from training.log import read_metrics
from training.objective import Objective

TINY = ["--n_layer=2", "--n_head=2", "--d_model=32", "--seq_len=32", "--batch_size=8", "--compile=no", "--warmup=5",
        "--eval_rows=16", "--log_every=5", "--eval_every=0", "--save_every=0", "--dtype=float32", "--device=cpu"]


@pytest.fixture
def run_main(monkeypatch, corpus, tmp_path):
    """Call train.main() in this process with the tiny settings; returns the run folder."""

    def call(*flags, run="run"):
        call_main(monkeypatch, *TINY, f"--corpus={corpus}", f"--run_dir={tmp_path / run}", *flags)
        return tmp_path / run

    return call


def start(corpus, run, *flags, launcher=(sys.executable,)):
    return subprocess.Popen([*launcher, "train.py", *TINY, f"--corpus={corpus}", f"--run_dir={run}", *flags], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def losses(run):
    """Every logged figure that does not depend on the clock."""
    return [{k: v for k, v in m.items() if k != "tokens_per_s"} for m in read_metrics(run) if "event" not in m]


def events(run):
    """The decisions that a run logged, by name."""
    return [m["event"] for m in read_metrics(run) if "event" in m]


def assert_close(one, other, rel):
    """The same records, figures to a relative tolerance."""
    for a, b in zip(losses(one), losses(other), strict=True):
        assert a.keys() == b.keys()
        for k in a:
            assert b[k] == (a[k] if isinstance(a[k], str) else pytest.approx(a[k], rel=rel)), (a["step"], k)


def weights(run):
    return load_file(checkpoints(run)[0] / "model.safetensors")


def wait_for_step(run, step):
    for _ in range(2400):
        done = [int(line.split('"step": ')[1].split(",")[0]) for line in
                ((run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").is_file() else []) if line.endswith("}")]
        if done and done[-1] >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


# objectives -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", (["--objective=ar"], ["--objective=masked"], ["--loss=maskgit", "--schedule=cosine"],
                                   ["--objective=uniform", "--schedule=poly2"], ["--objective=uniform", "--loss=paper"],
                                   ["--estimator=ratio", "--time=iid", "--short_rows=0.2"],
                                   ["--estimator=time", "--time=moving_gaussian", "--time_correction"],
                                   ["--objective=ar", "--n_kv_head=1", "--tied=False", "--short_rows=0.2", "--dropout=0.1"]))
def test_every_objective_learns(run_main, flags):
    run = run_main("--steps=60", "--lr=1e-2", "--lr_schedule=wsd", "--decay=20", *flags)
    val = [m["val_loss"] for m in read_metrics(run) if "val_loss" in m]
    assert len(val) == 2 and val[-1] < val[0] - 1.5  # nats per token: at the start log 257 or more
    for name in ("settings.json", "loss.png", "step_00000060/model.safetensors"):
        assert (run / name).is_file()
    if "--loss=paper" in flags:
        m = [m for m in read_metrics(run) if "loss" in m][-1]
        assert m["loss"] == pytest.approx((m["noisy"] + m["clean"]) / 2)


def test_one_block_repeated_is_learned_by_heart(run_main):
    """Not to 0: positions are relative, so where all is masked a bidirectional model knows only frequencies."""
    run = run_main("--unique_tokens=32", "--epochs=3000", "--lr=5e-3", "--weight_decay=0")
    assert [m["loss"] for m in read_metrics(run) if "loss" in m][-1] < 0.8
    ar = run_main("--unique_tokens=32", "--epochs=3000", "--lr=5e-3", "--weight_decay=0", "--objective=ar", run="ar")
    assert [m["loss"] for m in read_metrics(ar) if "loss" in m][-1] < 0.02


# (e) one loss, whatever the layout --------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ([], ["--objective=uniform", "--loss=paper"], ["--loss=maskgit"], ["--objective=ar"]))
def test_accumulation_changes_nothing_but_rounding(run_main, flags):
    runs = [run_main("--steps=10", "--log_every=1", *flags, *more, run=f"run{i}")
            for i, more in enumerate(([], ["--micro_batch=4"], ["--micro_batch=1"]))]
    for run in runs[1:]:
        assert_close(runs[0], run, 1e-4)
        for name, w in weights(runs[0]).items():
            torch.testing.assert_close(weights(run)[name], w, rtol=1e-3, atol=1e-4)


# (f) crash and resume ---------------------------------------------------------------------------------------


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(corpus, tmp_path, run_main):
    flags = ["--steps=400", "--save_every=30", "--eval_every=50", "--time=iid", "--dropout=0.1"]
    whole = run_main(*flags, run="whole")
    process = start(corpus, tmp_path / "killed", *flags)
    wait_for_step(tmp_path / "killed", 100)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoints(tmp_path / "killed")
    (tmp_path / "killed" / "metrics.jsonl").open("a").write('{"step": 3')  # and the crash cut a line
    run_main(*flags, "--resume=auto", run="killed")
    assert losses(tmp_path / "killed") == losses(whole)
    for name, w in weights(whole).items():
        assert torch.equal(w, weights(tmp_path / "killed")[name])


def test_stop_signal_saves_and_says_so_by_its_exit_code(corpus, tmp_path, run_main):
    flags = ["--steps=600", "--log_every=7"]
    process = start(corpus, tmp_path / "stopped", *flags)
    wait_for_step(tmp_path / "stopped", 35)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == distributed.STOPPED == 75 and "stopped by a signal" in output and "Traceback" not in output
    assert events(tmp_path / "stopped") == ["stopped"]
    step = int(checkpoints(tmp_path / "stopped")[0].name[5:])
    assert 35 <= step < 600
    run_main(*flags, "--resume=yes", run="stopped")  # the line in progress at the stop is completed
    assert losses(tmp_path / "stopped") == losses(run_main(*flags, run="whole"))


def test_a_signal_while_starting_up_is_heard(corpus, tmp_path):
    process = start(corpus, tmp_path / "run", "--steps=100000")
    while not (tmp_path / "run" / "settings.json").is_file():  # the handlers stand before anything is written
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == distributed.STOPPED and "stopped by a signal" in output and "Traceback" not in output
    assert checkpoints(tmp_path / "run")


@pytest.mark.parametrize("name, after, damage", (("optimizer/shard-00001-model-00001-of-00001.safetensors", b"", "is missing or damaged"),
                                                 ("checkpoint.json", b'"samples": 32', "is damaged")))
def test_damaged_checkpoint_falls_back_to_the_one_before(run_main, capsys, name, after, damage):
    run = run_main("--steps=40", "--save_every=20")
    whole = losses(run)
    path = checkpoints(run)[0] / name
    content = bytearray(path.read_bytes())
    content[content.rindex(after) + len(after) - 1] ^= 1  # one bit: the last byte, or 320 samples made 330
    path.write_bytes(content)
    run_main("--steps=40", "--save_every=20", "--resume=auto")
    captured = capsys.readouterr()
    assert f"step_00000040/{name} {damage}" in captured.err
    assert "resumed from" in captured.out and "step_00000020" in captured.out
    assert losses(run) == whole


def test_every_nth_checkpoint_stays(run_main):
    run = run_main("--steps=60", "--save_every=5", "--keep=2", "--keep_every=20", "--save_at=7")
    assert [int(p.name[5:]) for p in checkpoints(run)] == [60, 55, 50, 40, 20, 7]


def test_whoever_can_read_the_folder_can_read_the_weights(run_main):
    files = [p for p in checkpoints(run_main("--steps=3"))[0].rglob("*") if p.is_file()]
    assert len(files) == 3 and all(p.stat().st_mode & 0o044 == 0o044 for p in files)


def test_ranks_that_all_hold_all_copy_only_what_they_write(tmp_path, monkeypatch):
    """DDP: the weights on rank 0, every moment on one rank."""
    network = train.Transformer(ModelConfig(1, 2, 2, 8, 16, 64, 50, 50, 8, causal=False)).init_weights()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()
    copies = []
    monkeypatch.setattr(checkpoint.Saver, "work", lambda self, step, staged, record: copies.append(staged))
    for rank in range(3):
        saver = checkpoint.Saver(tmp_path, network, optimizer, distributed.Ranks(rank, 3), 2)
        saver.save(1, {})
        saver.wait()
    names = [name for name, _ in network.named_parameters()]
    assert [list(copy["weights"]) for copy in copies] == [names, [], []]
    assert sorted(key for copy in copies for key in copy["moments"]) == sorted(f"{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq"))


def test_a_checkpoint_of_an_older_format_is_refused_in_one_line(run_main, capsys):
    run = run_main("--steps=5")
    path = checkpoints(run)[0] / "checkpoint.json"
    record = json.loads(path.read_text())
    for key in ("record_sha256", "updates", "streak", "passed"):
        del record[key]
    path.write_text(json.dumps(record | {"record_sha256": checkpoint.record_digest(record)}))
    assert "an older format" in refused(run_main, capsys, "--steps=9", "--resume=auto")


def test_a_slow_write_is_no_standstill(tmp_path):
    """Whoever waits for a checkpoint hears that it grows, and nothing once it does not."""
    network = train.Transformer(ModelConfig(1, 2, 2, 8, 16, 64, 50, 50, 8, causal=False)).init_weights()
    heard = []
    saver = checkpoint.Saver(tmp_path, network, None, distributed.SINGLE, 2, alive=lambda: heard.append(time.monotonic()))

    def write():
        (tmp_path / ".step_00000001").mkdir()
        for i in range(3):
            (tmp_path / f".step_00000001/{i}").write_bytes(b"x")
            time.sleep(1.5)  # longer than what lies between two looks
        time.sleep(3)

    saver.thread = threading.Thread(target=write)
    begin = time.monotonic()
    saver.thread.start()
    saver.wait()
    assert 3 <= len(heard) <= 5 and heard[-1] - begin < 4.5


def test_unfinished_checkpoint_is_no_checkpoint(run_main):
    run = run_main("--steps=10")
    shutil.copytree(checkpoints(run)[0], run / ".step_00000020")  # what a crash while writing leaves
    assert [p.name for p in checkpoints(run)] == ["step_00000010"]
    run_main("--steps=20", "--resume=auto")
    assert sorted(p.name for p in run.glob("*step_*")) == ["step_00000010", "step_00000020"]
    assert (run / "latest").read_text() == "step_00000020\n"


@pytest.mark.parametrize("owner, name", ((checkpoint, "file_digest"), (checkpoint, "flush_to_disk"), (Path, "rename")))
def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_itself(run_main, monkeypatch, capsys, owner, name):
    flags = ["--steps=40", "--save_every=10", "--keep=1"]
    whole = losses(run_main(*flags, run="whole"))
    working = getattr(owner, name)

    def fails(path, *arguments):
        if f"step_000000{broken}" in str(path):
            raise OSError(28, "No space left on device")
        return working(path, *arguments)

    for broken in (30, 40):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            if broken == 30:  # training goes on
                run = run_main(*flags, run="30")
            else:
                assert "the last checkpoint could not be written" in refused(run_main, capsys, *flags, run="40")
                run = run.with_name("40")
        assert events(run) == ["not saved"] and losses(run) == whole
        assert [p.name for p in run.glob("*step_*")] == [f"step_000000{70 - broken}"]
    assert "No space left on device" in next(m["why"] for m in read_metrics(run) if "event" in m)
    assert losses(run_main(*flags, "--resume=auto", run="40")) == whole


def test_killed_before_its_first_checkpoint_starts_over(run_main, tmp_path):
    whole = run_main("--steps=20", run="whole")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text())  # all that was left
    assert losses(run_main("--steps=20", "--resume=auto")) == losses(whole)


def test_a_damaged_later_checkpoint_never_costs_a_good_one(run_main):
    run = run_main("--steps=40", "--save_every=20")
    (checkpoints(run)[0] / "model.safetensors").write_bytes(b"")
    run_main("--steps=30", "--resume=auto", "--keep=1")
    assert [p.name for p in checkpoints(run)] == ["step_00000030"]


def test_prefetching_ends_when_its_reader_leaves():
    """Also where the queue is full and only the end is left to deliver; and errors arrive."""
    def numbers(fail=False):
        yield from range(5)
        if fail:
            raise ValueError("broken")

    for fail in (False, True):
        stream = transfer.prefetch(numbers(fail), depth=4)
        assert next(stream) == 0
        time.sleep(0.3)
        stream.close()  # must not hang
    assert list(transfer.prefetch(numbers())) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="broken"):
        list(transfer.prefetch(numbers(True)))


def test_validation_does_not_depend_on_the_batch(run_main):
    first = losses(run_main("--steps=1", "--eval_rows=13", "--lr=1e-9", run="a"))[-1]
    other = losses(run_main("--steps=1", "--eval_rows=13", "--lr=1e-9", "--batch_size=6", run="b"))[-1]
    assert other["val_loss"] == pytest.approx(first["val_loss"], rel=1e-5)
    assert (data.validation_ids(13, 100) < 100).all() and len(set(data.validation_ids(13, 100))) == 13 and sorted(data.validation_ids(13, 100))[-1] > 90
    assert abs(np.corrcoef(np.arange(1024), data.validation_ids(1024, 4400))[0, 1]) < 0.1  # noise level and document are unrelated


def test_validation_is_the_same_on_any_number_of_ranks(run_main, corpus, monkeypatch):
    """13 rows dealt to ranks, some of which fill up with rows that don't count, or get none at all."""
    folder, record = load_newest(run_main("--steps=3"), print)
    objective = Objective(load_model(folder, record), False)
    blocks = data.Sequences(tokenfiles.load_corpus(corpus).val, 32)
    process = diffusion.Process("masked", 257, 257, 32, data.VALIDATION_SEED)
    monkeypatch.setattr(likelihood.dist, "all_reduce", lambda total, group=None: None)

    def read(process, blocks, *rest):
        return data.read_batch(train.Config(), process, blocks, 256, *rest)

    def validate(micro, world):
        return sum(sum(likelihood.evaluate(objective, process, blocks, 13, micro, distributed.Ranks(rank, world), torch.device("cpu"), contextlib.nullcontext, read).parts)
                   for rank in range(world))

    whole = validate(13, 1)
    for micro, world in ((4, 1), (3, 2), (1, 4), (5, 3), (64, 2)):
        assert validate(micro, world) == pytest.approx(whole, rel=1e-5)


def test_batches_are_the_blocks_of_their_samples(corpus):
    """Block ids are computed 64 steps ahead: no batch may notice, nor a run that resumes around a border."""
    blocks = data.Sequences(tokenfiles.load_corpus(corpus).train, 32, 1, 32 * 50)
    process = diffusion.Process("ar", 257, 257, 32, 1)
    cfg = train.Config(batch_size=6, micro_batch=1)
    whole = [[b.targets.numpy() for b in train.training_batches(process, blocks, 256, 0, 0, 140, cfg, rank, 2, False)] for rank in range(2)]
    for step in range(140):
        rows = np.empty((6, 32), np.int64)
        for part in range(6):  # parts go to the ranks in turn
            rows[part] = whole[part % 2][step * 3 + part // 2]
        assert np.array_equal(rows, blocks.rows(6 * step + np.arange(6))[:, 1:])
    for first in (1, 63, 64, 65):
        again = [b.targets.numpy() for b in train.training_batches(process, blocks, 256, 6 * first, first, 140, cfg, 0, 2, False)]
        assert all(map(np.array_equal, again, whole[0][3 * first :]))


# compilation ------------------------------------------------------------------------------------------------


def test_compiled_equals_eager_and_never_recompiles(run_main):
    eager = run_main("--steps=12", "--eval_every=5", run="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run_main("--steps=12", "--eval_every=5", "--compile=whole", run="compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # of the training step
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_close(eager, compiled, 1e-3)


@pytest.mark.slow
def test_compiled_and_two_rank_runs_resume_as_if_uninterrupted(corpus, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    for name, launcher, more in (("compiled", (sys.executable,), ["--compile=whole"]), ("two", torchrun, ["--micro_batch=2"])):
        flags = ["--save_every=10", "--lr_schedule=constant", *more]
        for run, sequence in ((f"{name}_whole", (["--steps=20"],)), (f"{name}_broken", (["--steps=10"], ["--steps=20", "--resume=yes"]))):
            for steps in sequence:
                process = start(corpus, tmp_path / run, *flags, *steps, launcher=launcher)
                output = process.communicate(timeout=300)[0]
                assert process.returncode == 0, output
        one, other = ([m for m in losses(tmp_path / f"{name}_{run}") if "loss" in m] for run in ("whole", "broken"))
        for a, b in zip(one, other, strict=True):  # threads and gloo add in no fixed order, resumed or not
            assert a == pytest.approx(b, rel=1e-5), (name, a["step"])


@pytest.mark.slow
def test_compiled_ranks_with_accumulation_equal_one_eager_rank(corpus, tmp_path, run_main):
    one = run_main("--steps=6", "--log_every=1")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = start(corpus, tmp_path / "two", "--steps=6", "--log_every=1", "--micro_batch=2", "--compile=whole", launcher=torchrun)
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    assert_close(one, tmp_path / "two", 1e-3)


# estimates --------------------------------------------------------------------------------------------------


def test_dry_run_prints_and_writes_nothing(run_main, capsys):
    run = run_main("--dry_run", "--steps=10")
    small = capsys.readouterr().out
    assert not run.exists() and "peak memory" in small and "on a CPU" in small and "float32" in small
    run = run_main("--dry_run", "--steps=10", "--device=cuda", "--dtype=auto", "--compile=whole", "--n_layer=12", "--n_head=12", "--d_model=768")  # no GPU needed
    large = capsys.readouterr().out
    assert not run.exists() and "GiB: parameters 0.39" not in small and "as on a GPU" in large and "bfloat16" in large
    flops = float(large.split("tokens takes ")[1].split(" FLOP")[0])
    network = train.Transformer(ModelConfig(12, 12, 12, 64, 768, 2048, 257, 257, 32, causal=False))
    assert flops == pytest.approx(8 * 32 * network.flops_per_token(33 / 64), rel=0.02)


@pytest.mark.parametrize("has", [True, False])
def test_dry_run_on_a_cpu_has_the_type_of_training(run_main, capsys, monkeypatch, has):
    monkeypatch.setattr(kernels, "has_bf16", lambda device: has)
    run_main("--dry_run", "--steps=10", "--dtype=auto")
    assert ("bfloat16" in capsys.readouterr().out) == has


def test_dry_run_of_a_run_that_exists(run_main, capsys):
    run = run_main("--steps=5")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    run_main("--dry_run", "--steps=5")
    assert "peak memory" in capsys.readouterr().out and {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_fp8_on_a_cpu_is_said_to_be_emulated(run_main, capsys):
    run_main("--steps=2", "--fp8", "--dtype=auto")
    assert capsys.readouterr().err == "warning: fp8 is emulated on a CPU and slower than bfloat16; a GPU of compute capability 8.9 has it\n"


@pytest.mark.parametrize("how, more", (
    ("blocks", ("--short_rows=0.5",)), *(pytest.param(how, more, marks=pytest.mark.slow) for how, more in (
        ("blocks", ("--recompute=elementwise",)), ("blocks", ("--fp8=True", "--dtype=auto")), ("whole", ("--fp8=True", "--dtype=auto"))))), ids=str)
def test_ways_to_train_agree(run_main, how, more):
    torch._dynamo.reset()
    plain = [m for m in losses(run_main("--steps=10", *[m for m in more if "short" in m], run="plain")) if "loss" in m]
    other = [m for m in losses(run_main("--steps=10", f"--compile={how}", *more, run="other")) if "loss" in m]
    for a, b in zip(plain, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02 if "--fp8=True" in more else 1e-4)


# bad input --------------------------------------------------------------------------------------------------


def refused(run_main, capsys, *flags, run="run"):
    with pytest.raises(SystemExit) as exit_:
        run_main(*flags, run=run)
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("flags, message", (
    (["--steps=1", "--bath_size=1"], "unknown setting 'bath_size'; did you mean 'batch_size'?"),
    (["--steps=1", "--lr=fast"], "expected a number"),
    (["--steps=1", "--lr=-1"], "must be above 0"),
    (["--steps=1", "--objective=mask"], "did you mean 'masked'?"),
    (["--steps=1", "--schedule=sigmoid"], "unknown schedule 'sigmoid'"),
    (["--steps=1", "--loss=maskgit", "--time=moving_gaussian", "--time_correction"], "time_correction needs"),
    (["--steps=10", "--lr_schedule=wsd", "--decay=8"], "don't fit into 10 steps"),
    (["--epochs=1", "--lr_schedule=wsd", "--decay=8000"], "decay=8000 don't fit into"),
    (["--steps=1", "--min_lr=-0.5"], "min_lr=-0.5 must be -1 or lie between"),
    (["--steps=1", "--loss=paper"], "loss=paper needs objective=uniform"),
    (["--steps=1", "--loss=maskgit", "--objective=ar"], "loss=maskgit needs objective=masked"),
    (["--steps=1", "--epochs=1"], "exactly one of steps, tokens and epochs"),
    (["--steps=1", "--n_head=5"], "d_model=32 is no multiple of n_head=5"),
    (["--steps=1", "--n_kv_head=3"], "must be a multiple of n_kv_head=3"),
    (["--steps=1", "--model=124M"], "contradicts model=124M"),
    (["--steps=1", "--micro_batch=3"], "batch_size=8 must be a multiple of 1 ranks × micro_batch=3"),
    (["--steps=1", "--seq_len=100000"], "fewer than one block of 100,000; lower --seq_len, or prepare more text"),
    (["--steps=1", "--unique_tokens=10"], "unique_tokens=10 must lie between one block (32) and the training split"),
    (["--steps=1", "--objective=ar", "--schedule=poly2"], "schedule=poly2 has no meaning for objective=ar; add --schedule=linear"),
    (["--steps=1", "--corpus=nowhere"], "no corpus in 'nowhere'"),
    (["--steps=1", "--resume=yes"], "no usable checkpoint"),
    (["--steps=1", "--compare=nowhere"], "no such run"),
    (["nowhere.py", "--steps=1"], "no such override file"),
    (["--steps=1", "--fp8=True"], "fp8 goes with dtype=bfloat16 or auto"),
    (["--steps=1", "--fp8=True", "--dtype=auto", "--d_model=40"], "multiples of 16, not d_model=40"),
    (["--steps=1", "--fp8=True", "--dtype=auto", "--seq_len=33", "--batch_size=1"], "a multiple of 16 tokens"),
    (["--steps=1", "--cuda_graphs=True"], "cuda_graphs needs compile=whole and one process on a GPU"),
    (["--steps=1", "--compile=True"], "choose from whole, blocks, no"),
    (["--tokens=1e300"], "must be at most 1000000000000000.0"),
))
def test_bad_settings_are_refused_before_anything_is_written(run_main, capsys, tmp_path, flags, message):
    assert message in refused(run_main, capsys, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(run_main, capsys):
    assert "no usable GPU" in refused(run_main, capsys, "--steps=1", "--device=cuda")


def test_world_size_must_divide_the_batch(run_main, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "multiple of 3 ranks" in refused(run_main, capsys, "--steps=1")


def test_run_folder_in_use(run_main, capsys):
    run = run_main("--steps=5")
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert "is not empty; continue it with --resume=auto" in refused(run_main, capsys, "--steps=5")
    assert "another architecture: head_dim 16 → 32, d_model 32 → 64" in refused(run_main, capsys, "--steps=5", "--resume=auto", "--d_model=64")
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_resuming_on_another_corpus(run_main, capsys, corpus, tmp_path):
    run_main("--steps=5")
    (tmp_path / "other.txt").write_text("something else entirely " * 100)
    prepared(tmp_path / "other", tmp_path / "other.txt")
    assert "another corpus: train_sha256" in refused(run_main, capsys, "--steps=9", "--resume=auto", f"--corpus={tmp_path / 'other'}")


def test_resuming_with_another_seed_is_said_aloud(run_main, capsys):
    run_main("--steps=5")
    run_main("--steps=6", "--resume=auto", "--seed=7")
    assert "another seed: the data order changes here" in capsys.readouterr().err


@pytest.mark.parametrize("split, name", (("train", "training"), ("val", "validation")))
def test_a_token_beyond_the_vocabulary_in_a_corpus_too_large_to_check(run_main, capsys, corpus, tmp_path, monkeypatch, split, name):
    shutil.copytree(corpus, tmp_path / "large")
    with open(tmp_path / "large" / f"{split}.bin", "r+b") as file:
        file.write(b"\xff\xff" * 3000)
    monkeypatch.setattr(tokenfiles, "CHECKED", 0)
    assert f"the {name} split holds token 65535" in refused(run_main, capsys, "--steps=100", f"--corpus={tmp_path / 'large'}")
    assert split == "train" or not (tmp_path / "run").exists()


def test_nothing_to_do_changes_nothing(run_main, capsys):
    run = run_main("--steps=5")
    before = {p.name: p.read_text() for p in run.iterdir() if p.suffix in (".json", ".jsonl")}
    run_main("--steps=4", "--resume=auto")
    assert "nothing to do" in capsys.readouterr().out
    assert {p.name: p.read_text() for p in run.iterdir() if p.suffix in (".json", ".jsonl")} == before




def test_all_problems_are_reported_at_once_without_a_traceback(corpus, tmp_path):
    process = start(corpus, tmp_path / "run", "--stepz=1", "--lr=fast", "--n_layer=0")
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 2 and "Traceback" not in output
    assert all(word in output for word in ("stepz", "did you mean 'steps'", "--lr=fast: expected a number", "must be at least 1"))
    assert all(line.startswith("train.py: ") for line in output.strip().splitlines())


# learning rates ---------------------------------------------------------------------------------------------


def test_learning_rates():
    cfg = train.Config(lr=1.0, warmup=10, decay=20, steps=100)
    cosine = [train.learning_rate(cfg, s, 100) for s in range(100)]
    assert cosine[9] == pytest.approx(10 / 11) and cosine[10] == 1 and cosine[55] == pytest.approx(0.55)
    assert 0.1 < cosine[99] < 0.102 and all(a >= b for a, b in zip(cosine[10:], cosine[11:]))
    cfg.lr_schedule = "wsd"
    wsd = [train.learning_rate(cfg, s, 100) for s in range(100)]
    assert wsd[79] == 1 and wsd[99] == pytest.approx(0.1) and wsd[89] == pytest.approx(0.1**0.5)  # exponential
    cfg.decay = 0.2  # the same as a share
    assert wsd == [train.learning_rate(cfg, s, 100) for s in range(100)]
    short = [train.learning_rate(cfg, s, 12) for s in range(12)]  # the share gives way to the warm-up
    assert short[:10] == wsd[:10] and short[-1] == pytest.approx(0.1) and train.learning_rate(cfg, 2, 3) > 0
    cfg.lr_schedule = "constant"
    assert train.learning_rate(cfg, 99, 100) == 1


def test_two_runs_beside_each_other(run_main, capsys, tmp_path):
    ar = run_main("--steps=10", "--objective=ar", run="ar")
    capsys.readouterr()
    run = run_main("--steps=10", f"--compare={ar}", run="masked")
    lines = [line for line in capsys.readouterr().out.splitlines() if "bits/byte," in line]
    assert len(lines) == 2 and "NELBO, an upper bound" in lines[0] and "exact NLL" in lines[1]
    assert (run / "loss.png").stat().st_size > 1.2 * (ar / "loss.png").stat().st_size  # two runs' curves, not one


def test_wandb_run_is_continued_under_its_id(run_main, monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = run_main("--steps=5", "--wandb=test")
    first = (run / "wandb_id.txt").read_text()
    run_main("--steps=10", "--wandb=test", "--resume=auto")
    assert (run / "wandb_id.txt").read_text() == first
    folders = [p.name for p in (tmp_path / "wandb").glob("offline-run-*")]
    assert folders and all(name.endswith(first) for name in folders)


def test_wandb_that_cannot_log_in_is_one_line(run_main, capsys, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert "wandb: No API key configured.; log in with" in refused(run_main, capsys, "--steps=1", "--wandb=test")


def test_settings_are_saved_and_complete(run_main):
    run = run_main("--steps=5", "--lr=3e-4")
    saved = json.loads((run / "settings.json").read_text())
    assert saved["lr"] == 3e-4 and saved.keys() == train.Config.__dataclass_fields__.keys()
    assert json.loads((checkpoints(run)[0] / "checkpoint.json").read_text())["settings"] == saved


def test_only_matrices_decay():
    network = train.Transformer(ModelConfig(1, 2, 2, 8, 16, 64, 50, 50, 8, causal=False))
    optimizer = update.make_optimizer(network, 1e-3, (0.9, 0.95), 0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: decay[id(p)] for name, p in network.named_parameters()} == {
        name: 0.0 if "norm" in name else 0.1 for name, p in network.named_parameters()}


assert os.environ.get("WORLD_SIZE") is None, "these tests start their own ranks"
