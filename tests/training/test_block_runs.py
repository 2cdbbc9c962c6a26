"""Runs with --diffusion_block: as every run they resume, accumulate, compile, shard, go on, are evaluated."""

import shutil
import sys

import pytest
import torch
from conftest import call_main
from runs import TINY, assert_close_figures, figures, largest_difference, weights
from test_memory import beyond_weights, measured

import diffusion
import sample
from model import ModelConfig
from training import memory
from training.checkpoint import checkpoints
from training.log import read_metrics
from training.record import read_record

BLOCK = "--diffusion_block=8"
TINY_WITHOUT_SHAPE = [flag for flag in TINY if not flag.startswith(("--n_", "--d_"))]


def validations(run):
    return [m["val_loss"] for m in read_metrics(run) if "val_loss" in m]


def test_a_block_of_the_whole_row_is_no_block(run_main):
    """Bit for bit the run without; half a row is another."""
    plain = figures(run_main("--steps=6", "--log_every=1", run="plain"))
    assert figures(run_main("--steps=6", "--log_every=1", "--diffusion_block=32", run="whole")) == plain
    assert figures(run_main("--steps=6", "--log_every=1", "--diffusion_block=16", run="half")) != plain


@pytest.mark.parametrize("flags", ([], ["--objective=uniform"], ["--short_rows=0.5", "--document_attention"]),
                         ids=" ".join)
def test_accumulated_and_resumed_it_is_the_same_run(run_main, flags):
    """Micro-batches add up to the step, to rounding; a resumed run is the uninterrupted one bit for bit."""
    flags = [BLOCK, "--log_every=1", "--steps=8", *flags]
    whole = run_main(*flags, run="whole")
    parts = run_main(*flags, "--micro_batch=2", run="parts")
    assert_close_figures(whole, parts, 1e-4)
    kept = run_main(*flags, "--save_every=4", run="resumed")
    shutil.rmtree(kept / "step_00000008")
    resumed = run_main(*flags, "--resume=auto", run="resumed")
    assert figures(resumed) == figures(whole)
    assert all(torch.equal(w, weights(whole)[name]) for name, w in weights(resumed).items())


@pytest.mark.parametrize("compile", ("whole", "blocks"))
def test_compiled_it_is_the_eager_run(run_main, without_codegen, compile):
    counters = without_codegen()
    eager = run_main("--steps=8", "--eval_every=5", BLOCK, run="eager")
    run = run_main("--steps=8", "--eval_every=5", BLOCK, f"--compile={compile}", run="compiled")
    assert counters["stats"]["unique_graphs"] == (1 if compile == "whole" else 7)
    assert not counters["graph_break"]
    assert_close_figures(eager, run, 1e-3)


def test_ranks_change_nothing(train_on, corpus, tmp_path):
    flags = [f"--corpus={corpus}", BLOCK, "--steps=8", "--log_every=1", "--recompute=selective"]
    for name, (world, *more) in dict(one=(1,), ddp=(2,), full=(2, "--shard=full")).items():
        train_on(world, *flags, f"--run_dir={tmp_path / name}", *more)
    for name in ("ddp", "full"):
        assert largest_difference(tmp_path / "one", tmp_path / name) < 1e-5


def test_a_curriculum_is_a_sequence_of_runs(run_main, corpus, monkeypatch):
    """AR, then blocks of 1, of 4 and of the row, each from the weights of the one before."""
    run = run_main("--steps=80", "--lr=1e-2", "--objective=ar", run="ar")
    assert validations(run)[-1] < 3
    flags = [*TINY_WITHOUT_SHAPE, "--steps=30", "--lr=5e-3", f"--corpus={corpus}"]
    for block in ("1", "4", "0"):
        following = run.parent / f"block{block}"
        own = [f"--init_from={run}", f"--run_dir={following}", f"--diffusion_block={block}"]
        call_main(monkeypatch, *flags, *own)
        model = read_record(checkpoints(following)[0])["model"]
        assert (model["diffusion_block"], model["shift"], model["causal"]) == (int(block), False, False)
        first, last = validations(following)[0], validations(following)[-1]
        assert last < first - 0.05, (block, first, last)
        run = following


@pytest.mark.parametrize("objective", ("masked", "uniform"))
def test_memory_is_what_was_predicted(objective):
    config = ModelConfig(3, 2, 2, 32, 64, 192, 1000, 1000, 64, causal=False, timed=objective == "uniform",
                         diffusion_block=16)
    p = diffusion.Process(objective, 1000, 1000, 64, block=16)
    levels = diffusion.noise_levels(p, 0, 8)
    x = torch.randint(1000, (8, 65)).numpy()
    batch = diffusion.make_batch(p, x, levels, levels.microbatch_rows(0, 1))
    need = memory.predict(config, batch, False, torch.float32, False, "no", "no")
    ratio = beyond_weights(need) / measured(config, batch, "no", "no")
    assert 0.98 < ratio < 1.12  # above: it expects scores that attention with a mask does not keep


@pytest.mark.parametrize("flags, message", (
    (["--diffusion_block=33"], "diffusion_block=33 is more than a row of seq_len=32"),
    (["--diffusion_block=8", "--objective=ar"], "diffusion_block=8 needs objective=masked or uniform"),
    (["--diffusion_block=8", "--shift=yes"], "shift=yes is not for diffusion_block"),
    (["--diffusion_block=8", "--anneal=5"], "anneal=5 is not for diffusion_block"),
    (["--diffusion_block=-1"], "diffusion_block=-1"),
))
def test_what_does_not_go_together_is_one_line(refused, flags, message):
    error = refused("--steps=8", *flags)
    assert message in error and error.count("\n") == 1


def test_eval_takes_it(run_main, run_eval, tmp_path):
    """Bound, orders and texts."""
    run = run_main("--steps=60", "--lr=1e-2", BLOCK)
    flags = ["--rows=16", "--passes=2", "--ordered=left_to_right,random", "--ordered_rows=8", "--samples=2"]
    _, report = run_eval(run, *flags, "--length=20", out=tmp_path / "eval")
    assert report["bound"]["nats_per_token"] < 4 and len(report["bound"]["curve"]) > 3
    assert report["ordered"]["random"]["nats_per_token"] > 0


def test_sample_takes_it(run_main, monkeypatch, capsys):
    """It writes, and says in one line what means nothing here."""
    run = run_main("--steps=20", BLOCK)

    def write(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", "--device=cpu", *flags])
        sample.main()

    write("--prompt=7 squared", "--length=12", "--stop=False")
    assert capsys.readouterr().out.startswith("7 squared")
    for flags, message in (
            (["--block=4"], "block=4 has no meaning for a model of block diffusion"),
            (["--text=[MASK:3] squared is"], "sees nothing after a block: text after token 8"),
            (["--cache=dual"], "cache=dual has no meaning for a model of block diffusion")):
        with pytest.raises(SystemExit) as stop:
            write(*flags)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
