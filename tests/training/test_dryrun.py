"""What a run will cost: the arithmetic against counts by hand, the shortcuts against whole traces."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_memory import case

import diffusion
import train
from configurator.ladder import swiglu_width
from model import ModelConfig, Transformer
from training import distributed, dryrun, memory


def test_traffic_is_what_rings_send():
    """By hand, for N = 1000 parameters in bf16."""
    def sent(*arguments):
        return tuple(dryrun.traffic(1000, *arguments))

    assert sent("no", 1, 8, 1, 1, 2) == (0, 0)
    assert sent("no", 8, 8, 1, 1, 2) == pytest.approx((2 * 4000 * 7 / 8, 0))  # an all-reduce scatters and gathers
    assert sent("no", 16, 8, 1, 4, 2) == pytest.approx((8000 * 7 / 8, 8000 / 8 * 1 / 2))  # whatever the micro-batches
    assert sent("optim", 8, 8, 8, 4, 2) == pytest.approx((6000 * 7 / 8, 0))
    assert sent("full", 8, 8, 8, 4, 2) == pytest.approx((4 * 8000 * 7 / 8, 0))
    assert sent("hybrid", 32, 8, 8, 4, 2) == pytest.approx((4 * 8000 * 7 / 8, 2 * 4000 / 8 * 3 / 4))
    assert sent("hybrid", 8, 8, 4, 1, 2) == pytest.approx((8000 * 3 / 4 + 2 * 4000 / 4 / 2, 0))  # two copies in one node


def test_a_step_is_never_faster_than_its_parts():
    for within in (0, 1e9, 1e12):
        moved = dryrun.Traffic(within, within / 10)
        total, computing, exposed = dryrun.step_seconds(1e15, moved, 8)
        assert total == computing + exposed and exposed >= 0.0999 * moved.seconds and total >= max(computing, 0.1 * moved.seconds)


@pytest.mark.slow
def test_activations_are_linear_in_blocks_and_rows():
    """The estimate from 3 and 5 blocks at one and two rows is the trace of all, to 3 %."""
    config = ModelConfig(9, 4, 4, 32, 128, 320, 2000, 2000, 128, causal=False)
    for recompute in ("no", "full"):
        estimate = dryrun.activations(config, recompute)
        process = diffusion.Process("masked", 2000, 2000, 128)
        rows = diffusion.noise_levels(process, 0, 64)
        batch = diffusion.make_batch(process, np.zeros((8, 129), np.int32), rows, rows.microbatch_rows(0, 8))
        moments = memory.trace(config, batch, False, torch.bfloat16, True, "blocks", recompute, divided=True)
        assert estimate(8) == pytest.approx(max(exists - arrived for exists, arrived in moments), rel=0.03)


def test_more_ranks_need_less_memory_each():
    config, batch = case("masked")
    peaks = {shards: memory.predict(config, batch, False, torch.float32, True, layout="full", shards=shards) for shards in (2, 4, 64)}
    plain = memory.predict(config, batch, False, torch.float32, True, lasting_gradients=True)
    assert plain.peak > peaks[2].peak > peaks[4].peak > peaks[64].peak
    for shards, need in peaks.items():
        assert sum(need[:-1]) == need.peak and need.optimizer == 2 * need.parameters
        assert need.parameters == pytest.approx(plain.parameters / shards, rel=0.2 if shards == 64 else 0.01)


def test_shard_ranks():
    assert [distributed.ranks_per_copy(kind, 32, 8) for kind in ("no", "full", "optim", "hybrid")] == [1, 32, 32, 8] and distributed.ranks_per_copy("hybrid", 32, 8, 4) == 4


def test_choices_fit_and_are_sorted():
    config = dataclasses.replace(dryrun.masked_model("1086M"), seq_len=2048)
    found = dryrun.choices(config, 64, 8, 256, {"no": lambda micro: 4 << 30, "full": lambda micro: 1 << 30})
    assert {c.layout for c in found} == {"no", "optim", "hybrid", "full"} and all(c.need.peak < 0.9 * dryrun.H100 for c in found)
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    assert not dryrun.choices(config, 8, 8, 256, {"no": lambda micro: 80 << 30})


@pytest.mark.parametrize("n_layer, d_model, says", ((48, 7168, "8 GiB at 30B"), (80, 8192, "11 GiB at 65B")))
def test_what_larger_models_gather(n_layer, d_model, says):
    """As docs/scaling-out.md has it, whatever the number of ranks."""
    config = dataclasses.replace(dryrun.masked_model("14785M"), n_layer=n_layer, n_head=d_model // 128, n_kv_head=d_model // 128, d_model=d_model, d_ff=swiglu_width(d_model))
    with torch.device("meta"):
        billions = Transformer(config).n_params() / 1e9
    gathered = memory.weigh([(1, 1)], config, torch.bfloat16, True, True, "full", 256, True).gathered / 2**30
    assert f"{gathered:.0f} GiB at {billions:.0f}B" == says and says in (ROOT / "docs/scaling-out.md").read_text()


def test_a_dry_run_counts_recomputation(monkeypatch, corpus):
    """Its time is that of the docs' table, where computing takes most of it."""
    monkeypatch.setattr(dryrun, "predict_memory", lambda *_: memory.MemoryNeed(0, 0, 0, 0, 0, 0))
    process, seconds = diffusion.Process("masked", 50257, 50257, 2048), {}
    for recompute in dryrun.AGAIN:
        cfg = train.Config(dry_run=True, device="cuda", gpus=64, shard="full", compile="blocks", batch_size=1024, micro_batch=4, seq_len=2048, recompute=recompute, steps=1)
        said = dryrun.report(cfg, process, dryrun.masked_model("14785M"), 1, 10**6, torch.bfloat16, True)
        seconds[recompute] = float(re.search(r"peak: ([\d.]+) s per step", said)[1])
    for recompute, more in dryrun.AGAIN.items():
        assert seconds[recompute] / seconds["no"] == pytest.approx(1 + more, rel=0.02)  # the communication that shows is the same; printed to three digits


@pytest.mark.slow
def test_a_dry_run_of_the_largest_model_on_64_gpus(tmp_path, corpus):
    """Here, without a GPU, in a few GiB: its states are those of 14.8B parameters over 64 ranks."""
    import resource

    done = subprocess.run([sys.executable, "train.py", "--dry_run", "--gpus=64", "--device=cuda", "--model=14785M", "--seq_len=2048", "--batch_size=1024", "--micro_batch=2",
                           "--shard=full", "--compile=blocks", "--recompute=full", "--steps=1000", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}"],
                          cwd=ROOT, capture_output=True, text=True)
    with torch.device("meta"):
        n_params = Transformer(dataclasses.replace(dryrun.masked_model("14785M"), n_vocab=257, mask_id=257)).n_params()  # in bytes
    assert n_params == 14_771_657_472 and done.returncode == 0 and f"{n_params:,} parameters" in done.stdout and "on 64 H100s" in done.stdout, done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 8 * 2**20 and not (tmp_path / "run").exists()
