"""What a run will need: the arithmetic against counts by hand, the shortcuts against whole traces."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from steps import build_run
from test_memory import case

import diffusion
import kernels
from configurator.ladder import swiglu_width
from model import ModelConfig, Transformer
from training import distributed, dryrun, layouts, memory

# ---------------------------------------------------------------------------------------- communication, time


def test_traffic_is_what_rings_send():
    """By hand, for N = 1000 parameters in bf16."""

    def sent(layout, world, per_node, shards, micro_batches):
        return tuple(dryrun.traffic(1000, layout, world, per_node, shards, micro_batches, 2))

    assert sent("no", 1, 8, 1, 1) == (0, 0)
    # an all-reduce scatters and gathers, whatever the micro-batches
    assert sent("no", 8, 8, 1, 1) == pytest.approx((2 * 4000 * 7 / 8, 0))
    assert sent("no", 16, 8, 1, 4) == pytest.approx((8000 * 7 / 8, 8000 / 8 * 1 / 2))
    assert sent("optim", 8, 8, 8, 4) == pytest.approx((6000 * 7 / 8, 0))
    assert sent("full", 8, 8, 8, 4) == pytest.approx((4 * 8000 * 7 / 8, 0))
    assert sent("hybrid", 32, 8, 8, 4) == pytest.approx((4 * 8000 * 7 / 8, 2 * 4000 / 8 * 3 / 4))
    # two copies in a node
    assert sent("hybrid", 8, 8, 4, 1) == pytest.approx((8000 * 3 / 4 + 2 * 4000 / 4 / 2, 0))


def test_a_step_is_never_faster_than_its_parts():
    for within in (0, 1e9, 1e12):
        moved = dryrun.Traffic(within, within / 10)
        total, computing, exposed = dryrun.step_seconds(1e15, moved, 8)
        assert total == computing + exposed and exposed >= 0.0999 * moved.seconds
        assert total >= max(computing, 0.1 * moved.seconds)


def test_ranks_that_hold_one_copy():
    kinds = ("no", "full", "optim", "hybrid")
    assert [distributed.ranks_per_copy(kind, 32, 8) for kind in kinds] == [1, 32, 32, 8]
    assert distributed.ranks_per_copy("hybrid", 32, 8, 4) == 4


# ----------------------------------------------------------------------------------- layouts and their memory


def test_more_ranks_need_less_memory_each():
    config, batch = case("masked")
    moments = memory.trace(config, batch, False, torch.float32, True, sharded=True)
    peaks = {shards: memory.weigh(moments, config, torch.float32, True, layout="full", shards=shards)
             for shards in (2, 4, 64)}
    plain = memory.predict(config, batch, False, torch.float32, True, lasting_gradients=True)
    assert plain.peak > peaks[2].peak > peaks[4].peak > peaks[64].peak
    for shards, need in peaks.items():
        assert sum(need[:-1]) == need.peak and need.optimizer == 2 * need.parameters
        tolerance = 0.2 if shards == 64 else 0.01
        assert need.parameters == pytest.approx(plain.parameters / shards, rel=tolerance)


@pytest.mark.slow
def test_activations_are_linear_in_blocks_and_rows():
    """The estimate from 3 and 5 blocks at one and two rows is the trace of all, to 3 %."""
    config = ModelConfig(9, 4, 4, 32, 128, 320, 2000, 2000, 128, causal=False)
    process = diffusion.Process("masked", 2000, 2000, 128)
    levels = diffusion.noise_levels(process, 0, 64)
    tokens = np.zeros((8, 129), np.int32)
    batch = diffusion.make_batch(process, tokens, levels, levels.microbatch_rows(0, 8))
    for recompute in ("no", "full"):
        estimate = layouts.Activations(config, recompute)(8)
        moments = memory.trace(config, batch, False, torch.bfloat16, True, "blocks", recompute, sharded=True)
        peak = max(exists - gradients for exists, gradients in moments)
        assert estimate == pytest.approx(peak, rel=0.03)


def test_choices_fit_and_are_sorted():
    config = layouts.masked_model("1086M")
    activations = {"no": lambda micro_batch: 4 << 30, "full": lambda micro_batch: 1 << 30}
    choices = layouts.choices(config, 64, 8, 256, activations)
    assert {choice.layout for choice in choices} == {"no", "optim", "hybrid", "full"}
    assert all(choice.need.peak < 0.9 * dryrun.H100 for choice in choices)
    seconds = [choice.seconds for choice in choices]
    assert seconds == sorted(seconds)
    assert not layouts.choices(config, 8, 8, 256, {"no": lambda micro_batch: 80 << 30})


@pytest.mark.parametrize("n_layer, d_model, claim", ((48, 7168, "8 GiB at 30B"), (80, 8192, "11 GiB at 65B")))
def test_what_larger_models_gather(n_layer, d_model, claim):
    """As docs/scaling-out.md has it, whatever the number of ranks."""
    n_head = d_model // 128
    config = dataclasses.replace(
        layouts.masked_model("14785M"), n_layer=n_layer, n_head=n_head, n_kv_head=n_head, d_model=d_model,
        d_ff=swiglu_width(d_model))
    with torch.device("meta"):
        billions = Transformer(config).n_params() / 1e9
    gathered = memory.weigh([(1, 1)], config, torch.bfloat16, True, True, "full", 256, True).gathered / 2**30
    assert f"{gathered:.0f} GiB at {billions:.0f}B" == claim
    assert claim in (ROOT / "docs/scaling-out.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_prints_and_writes_nothing(run_main, capsys):
    run = run_main("--dry_run", "--steps=10")
    small = capsys.readouterr().out
    assert not run.exists()
    assert all(text in small for text in ("peak memory", "on a CPU", "float32"))
    shape = ("--n_head=12", "--d_model=768")
    run = run_main("--dry_run", "--steps=10", "--device=cuda", "--dtype=auto", "--compile=whole", *shape)
    large = capsys.readouterr().out
    assert not run.exists()  # no GPU needed
    assert "GiB: parameters 0.39" not in small
    assert all(text in large for text in ("as on a GPU", "bfloat16", "8 × 32 tokens"))
    flops = float(large.split("tokens takes ")[1].split(" FLOP")[0])
    with torch.device("meta"):
        network = Transformer(ModelConfig(2, 12, 12, 64, 768, 2048, 257, 257, 32, causal=False))
    assert flops == pytest.approx(8 * 32 * network.flops_per_token(33 / 64), rel=0.02)


@pytest.mark.parametrize("has_bf16", (True, False))
def test_a_dry_run_on_a_cpu_has_the_type_of_training(run_main, capsys, monkeypatch, has_bf16):
    monkeypatch.setattr(kernels, "has_bf16", lambda device: has_bf16)
    run_main("--dry_run", "--steps=10", "--dtype=auto")
    assert ("bfloat16" in capsys.readouterr().out) == has_bf16


def test_a_dry_run_of_a_run_that_exists(run_main, capsys):
    run = run_main("--steps=5")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    run_main("--dry_run", "--steps=5")
    assert "peak memory" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


LARGE = ("--dry_run", "--device=cuda", "--gpus=64", "--shard=full", "--compile=blocks", "--model=14785M",
         "--seq_len=2048", "--batch_size=1024", "--steps=1000")


def test_a_dry_run_counts_recomputation(monkeypatch, corpus, tmp_path):
    """Its time is that of the docs' table, where computing takes most of it."""
    nothing = memory.MemoryNeed(0, 0, 0, 0, 0, 0)
    monkeypatch.setattr(dryrun, "predict_memory", lambda run: nothing)
    seconds = {}
    for recompute in dryrun.RECOMPUTED:
        run = build_run(*LARGE, "--micro_batch=4", f"--recompute={recompute}", f"--corpus={corpus}",
                        f"--run_dir={tmp_path / 'run'}")
        seconds[recompute] = float(re.search(r"peak: ([\d.]+) s per step", dryrun.report(run))[1])
    for recompute, share in dryrun.RECOMPUTED.items():
        # the communication that shows is the same; seconds are printed to three digits
        assert seconds[recompute] / seconds["no"] == pytest.approx(1 + share, rel=0.02)


@pytest.mark.slow
def test_a_dry_run_of_the_largest_model_on_64_gpus(tmp_path, corpus):
    """Here, without a GPU, in a few GiB: its states are those of 14.8B parameters over 64 ranks."""
    import resource

    flags = ["--micro_batch=2", "--recompute=full", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "train.py", *LARGE, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    with torch.device("meta"):
        config = dataclasses.replace(layouts.masked_model("14785M"), n_vocab=257, mask_id=257)  # in bytes
        n_params = Transformer(config).n_params()
    assert n_params == 14_771_657_472 and done.returncode == 0, done.stdout + done.stderr
    assert f"{n_params:,} parameters" in done.stdout and "on 64 H100s" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 8 * 2**20  # kilobytes
    assert not (tmp_path / "run").exists()
