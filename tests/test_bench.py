"""bench.py runs every part of both suites at tiny sizes, on any machine; its figures are checked where they can be."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import bench
import engine
from model import Transformer


def start(*flags, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, ROOT / "bench.py", "--smoke", "--rounds=2", *flags], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("suite, part", [("cpu", "host"), ("gpu", "steps"), *(
    pytest.param(suite, part, marks=pytest.mark.slow) for suite, part in [("cpu", "shakespeare"), ("cpu", "gathered"), ("cpu", "bf16"), ("cpu", "choices"),
                                                                          ("gpu", "head"), ("gpu", "attention"), ("gpu", "profile")])])
def test_every_part_runs(suite, part, tmp_path):
    done = start(f"--suite={suite}", f"--only={part}", "--warmup=3", "--steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"## {part}" in done.stdout and "| --- |" in done.stdout and not list(tmp_path.iterdir())
    if part == "steps":
        assert re.search(r"tiny \| masked .*\| 1\.0000 \|", done.stdout)  # the formula for FLOPs is what torch counts


def test_a_wrong_part_is_one_line(tmp_path):
    done = start("--only=shakespear", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == ("bench.py: only=shakespear: no such part; there are shakespeare, gathered, bf16, choices, host")


def test_full_head_computes_the_same_loss():
    """What the gathered head is measured against is the same step: equal losses and gradients."""
    config = bench.shape_of(2, 2, 32, 60, 32, False)
    steps = [bench.Step(config, "masked", 4, bench.CPU, torch.float32, how="no", full_head=full) for full in (False, True)]
    assert steps[0].example.index is not None and steps[1].example.index is None
    losses = []
    for run in steps:
        values = []
        for _ in range(6):
            run()
            values.append(run.record.tolist())
        losses.append(values)
    assert np.allclose(*losses, rtol=2e-4)


def test_plain_step_is_a_language_model_of_like_size():
    shape = dict(n_layer=4, n_head=4)
    plain = bench.PlainGPT(d=128, n_vocab=65, block_len=64, **shape)
    ours = Transformer(bench.shape_of(**shape, d_model=128, n_vocab=65, block_len=64, causal=True))
    inside = sum(p.numel() for p in plain.blocks.parameters() if p.dim() == 2)
    assert inside == 4 * 12 * 128**2 and abs(ours.n_params(False) / inside - 1) < 0.05
    x = torch.randint(65, (2, 64))
    assert abs(plain(x, x).item() - np.log(65)) < 60  # N(0, 1) embeddings: finite, no more is asked
    before = plain(x, x)
    plain(x, x).backward()
    assert torch.isfinite(before) and all(p.grad is not None for p in plain.parameters())


def test_real_tokens_are_text_with_a_natural_distribution():
    tokens = bench.real_tokens(50_257)
    counts = np.sort(np.bincount(tokens))[::-1]
    assert len(tokens) > 2 * 10**5 and len(np.unique(tokens)) > 3000 and tokens.max() < 50_257
    assert counts[0] > 50 * counts[200]


def test_times_are_times():
    assert 1 <= engine.seconds(0.0, 1.0) and 10 <= bench.milliseconds(lambda: __import__("time").sleep(0.01), bench.CPU) < 40
    times = bench.take_turns({"a": lambda: __import__("time").sleep(0.004), "b": lambda: __import__("time").sleep(0.001)}, bench.CPU, 4, 2)
    assert 2 < np.median(times["a"] / times["b"]) < 5
