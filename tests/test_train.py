"""train.py in this process, on real files: what it learns, reads, validates, prints and writes."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import TINY, assert_close_figures, weights
from steps import build_run

import data
import train
from training import update
from training.checkpoint import checkpoints, load_model, load_newest
from training.distributed import SINGLE, Ranks
from training.log import read_metrics
from training.objective import Objective

assert os.environ.get("WORLD_SIZE") is None, "these tests start their own ranks"


def validations(run):
    """The losses of a run's validations, in order."""
    return [m["val_loss"] for m in read_metrics(run) if "val_loss" in m]


def training_losses(run):
    """The losses in a run's lines of progress, in order."""
    return [m["loss"] for m in read_metrics(run) if "loss" in m]


# --------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("flags", (
    ["--objective=ar"],
    ["--objective=masked"],
    ["--loss=maskgit", "--schedule=cosine"],
    ["--objective=uniform", "--schedule=poly2"],
    ["--objective=uniform", "--loss=paper"],
    ["--estimator=ratio", "--time=iid", "--short_rows=0.2"],
    ["--estimator=time", "--time=moving_gaussian", "--time_correction"],
    ["--objective=ar", "--n_kv_head=1", "--tied=False", "--short_rows=0.2", "--dropout=0.1"],
), ids=" ".join)
def test_every_objective_learns(run_main, flags):
    paper = "--loss=paper" in flags
    run = run_main("--steps=60", "--lr=1e-2", "--lr_schedule=wsd", "--decay=20", *flags, draw=paper)
    first, last = validations(run)
    assert last < first - 1.5  # nats per token: at the start log 257 or more
    for name in ("settings.json", "validation.npz", "step_00000060/model.safetensors"):
        assert (run / name).is_file()
    if paper:
        assert (run / "loss.png").is_file()
        line = [m for m in read_metrics(run) if "loss" in m][-1]
        assert line["loss"] == pytest.approx((line["noisy"] + line["clean"]) / 2)


@pytest.mark.parametrize("objective, bound", (("masked", 0.8), ("ar", 0.02)))
def test_one_sequence_repeated_is_learned_by_heart(run_main, objective, bound):
    """Not to 0: positions are relative, so where all is masked a two-way model knows only frequencies."""
    flags = ("--unique_tokens=32", "--epochs=3000", "--lr=5e-3", "--weight_decay=0")
    assert training_losses(run_main(*flags, f"--objective={objective}"))[-1] < bound


@pytest.mark.parametrize("flags", ([], ["--objective=uniform", "--loss=paper"], ["--loss=maskgit"],
                                   ["--objective=ar"]), ids=" ".join)
def test_accumulation_changes_nothing_but_rounding(run_main, flags):
    flags = ["--steps=10", "--log_every=1", *flags]
    whole = run_main(*flags)
    for micro_batch in (4, 1):
        run = run_main(*flags, f"--micro_batch={micro_batch}", run=f"by{micro_batch}")
        assert_close_figures(whole, run, 1e-4)
        for name, w in weights(whole).items():
            torch.testing.assert_close(weights(run)[name], w, rtol=1e-3, atol=1e-4)


def test_learning_rates():
    cfg = train.Config(lr=1.0, warmup=10, decay=20, steps=100)

    def rates(steps=100):
        return [train.learning_rate(cfg, step, steps) for step in range(steps)]

    cosine = rates()
    assert cosine[9] == pytest.approx(10 / 11) and cosine[10] == 1 and cosine[55] == pytest.approx(0.55)
    assert 0.1 < cosine[99] < 0.102 and all(a >= b for a, b in zip(cosine[10:], cosine[11:]))

    cfg.lr_schedule = "wsd"
    wsd = rates()
    exponential = [1, 0.1**0.5, 0.1]
    assert [wsd[79], wsd[89], wsd[99]] == pytest.approx(exponential)
    cfg.decay = 0.2  # the same as a share
    assert wsd == rates()
    cfg.decay = 0.25
    for steps, decay in ((110, 28), (106, 26), (100, 25)):  # 27.5 and 26.5: a half goes to the even number
        of_share = rates(steps)
        assert of_share[steps - decay - 1] == 1 > of_share[steps - decay]
        assert of_share[-1] == pytest.approx(0.1) and update.decay_steps(0.25, steps, 10) == decay
    cfg.decay = 1e-4  # at least one step
    assert rates()[-2] == 1 and rates()[-1] == pytest.approx(0.1)
    cfg.decay = 0.9999  # and all that the warm-up leaves
    assert rates()[9] < 1 and rates()[10] == pytest.approx(0.1 ** (1 / 90))
    cfg.decay = 0.2
    short = rates(12)  # the share gives way to the warm-up
    assert short[:10] == wsd[:10] and short[-1] == pytest.approx(0.1) and rates(3)[2] > 0

    cfg.lr_schedule = "constant"
    assert rates()[99] == 1


# ---------------------------------------------------------------------------------------------------- batches


def test_batches_are_the_sequences_of_their_samples(corpus):
    """Sequences are looked up 64 steps ahead: no batch may notice, nor a run that resumes around a border."""
    flags = (*TINY, f"--corpus={corpus}", "--objective=ar", "--batch_size=6", "--micro_batch=1",
             "--unique_tokens=1600", "--steps=140")
    runs = [build_run(*flags, ranks=Ranks(rank, 2)) for rank in range(2)]
    sequences = runs[0].sequences
    whole = [[batch.targets for batch in train.batches(run, 0, 0)] for run in runs]
    assert len(whole[0]) == len(whole[1]) == 3 * 140
    for step in range(140):
        rows = np.empty((6, 32), np.int64)
        for part in range(6):  # parts go to the ranks in turn
            rows[part] = whole[part % 2][step * 3 + part // 2]
        assert np.array_equal(rows, sequences.rows(6 * step + np.arange(6))[:, 1:])
    for first in (1, 63, 64, 65):
        again = [batch.targets for batch in train.batches(runs[0], first, 6 * first)]
        assert len(again) == 3 * (140 - first) and all(map(np.array_equal, again, whole[0][3 * first :]))


def test_short_rows_are_padded_and_the_mean_is_over_what_counts(corpus):
    """Half of the rows are short: their ends count nowhere, and a step's weights on all ranks add up to 1."""
    flags = (*TINY, f"--corpus={corpus}", "--steps=3", "--batch_size=64",
             "--micro_batch=8", "--short_rows=0.5")
    shares = []
    for step in range(3):
        total = 0.0
        for rank in range(2):
            run = build_run(*flags, ranks=Ranks(rank, 2))
            feed = train.batches(run, step, 64 * step)
            for _ in range(4):
                batch = next(feed)
                padding = batch.documents == -1
                shares.append(padding.any(axis=1).mean())
                assert not (batch.tokens[padding] == run.process.mask_id).any()
                total += batch.weights.sum()
        assert total == pytest.approx(1, abs=0.1)  # but for the lattice: rows differ in length
    assert 0.3 < np.mean(shares) < 0.7


# ------------------------------------------------------------------------------------------------- validation


def test_validation_does_not_depend_on_the_batch(run_main):
    flags = ("--steps=1", "--eval_rows=13", "--lr=1e-9")
    one = validations(run_main(*flags, run="a"))
    other = validations(run_main(*flags, "--batch_size=6", run="b"))
    assert other == pytest.approx(one, rel=1e-5)


def test_validation_ids_are_spread_and_shuffled():
    ids = data.validation_ids(13, 100)
    assert len(set(ids)) == 13 and ids.min() >= 0 and 90 < ids.max() < 100
    correlation = np.corrcoef(np.arange(1024), data.validation_ids(1024, 4400))[0, 1]
    assert abs(correlation) < 0.1  # noise level and document are unrelated


def test_validation_is_the_same_on_any_number_of_ranks(run_main, corpus, tmp_path, monkeypatch):
    """13 rows dealt to ranks, some of which fill up with rows that don't count, or get none at all."""
    folder, record = load_newest(run_main("--steps=3"), print)
    objective = Objective(load_model(folder, record), False)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, group=None: None)

    def validate(micro_batch, world):
        flags = (*TINY, f"--corpus={corpus}", f"--run_dir={tmp_path / 'unused'}", "--steps=1",
                 "--eval_rows=13", f"--batch_size={micro_batch}", f"--micro_batch={micro_batch}")
        losses = []
        for rank in range(world):
            ranks = Ranks(rank, world) if world > 1 else SINGLE
            measured, *_ = train.validate(build_run(*flags, ranks=ranks), objective, lambda *_: None)
            losses.append(sum(measured.parts))
        return sum(losses)

    whole = validate(13, 1)
    for micro_batch, world in ((4, 1), (3, 2), (1, 4), (5, 3), (64, 2)):
        assert validate(micro_batch, world) == pytest.approx(whole, rel=1e-5)


# -------------------------------------------------------------------------------- what is printed and written


def test_settings_are_saved_and_complete(run_main, capsys):
    """Folder and checkpoint hold all of them; the terminal shows those that differ from their defaults."""
    run = run_main("--steps=5", "--lr=3e-4")
    saved = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    assert saved["lr"] == 3e-4 and saved.keys() == train.Config.__dataclass_fields__.keys()
    assert (
        json.loads((checkpoints(run)[0] / "checkpoint.json").read_text(encoding="utf-8"))["settings"]
        == saved
    )
    line = capsys.readouterr().out.splitlines()[0]
    defaults = train.Config()
    changed = [f"{name}={value}" for name, value in saved.items() if value != getattr(defaults, name)]
    assert line == f"settings: {', '.join(changed)}" and "lr=0.0003" in line and "beta1" not in line


def test_two_runs_beside_each_other(run_main, capsys):
    ar = run_main("--steps=10", "--objective=ar", run="ar", draw=True)
    capsys.readouterr()
    run = run_main("--steps=10", f"--compare={ar}", run="masked", draw=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "bits/byte," in line]
    assert len(lines) == 2 and "NELBO, an upper bound" in lines[0] and "exact NLL" in lines[1]
    sizes = [(folder / "loss.png").stat().st_size for folder in (ar, run)]
    assert sizes[1] > 1.2 * sizes[0]  # two runs' curves, not one


def test_a_run_that_is_complete_ends_well(run_main, monkeypatch, capsys):
    """Though its last validation is not finite, and its picture can't be drawn."""
    def fail(*_):
        raise OSError(28, "No space left on device")

    diverged = run_main("--steps=2", "--lr=1e18", draw=True)
    assert not np.isfinite(validations(diverged)[-1]) and (diverged / "loss.png").is_file()
    assert "bits/byte, " in capsys.readouterr().out
    monkeypatch.setattr(train, "draw_losses", fail)
    run = run_main("--steps=2", run="full", draw=True)
    assert checkpoints(run)[0].name == "step_00000002"
    warning = f"warning: {run / 'loss.png'} can't be drawn (OSError: [Errno 28] No space left on device)\n"
    assert warning in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ("cosine", "constant", "wsd"))
def test_a_warm_up_longer_than_the_run_is_said(corpus, capsys, schedule):
    flags = ("--steps=40", f"--corpus={corpus}", f"--lr_schedule={schedule}", "--decay=0.2")
    build_run(*TINY, *flags, "--warmup=40")
    assert capsys.readouterr().err == ("warning: warmup=40 is not over within 40 steps: the learning rate "
                                       "never reaches lr=0.001; lower --warmup\n")
    build_run(*TINY, *flags, "--warmup=39")
    assert not capsys.readouterr().err


def test_fp8_on_a_cpu_is_said_to_be_emulated(run_main, capsys):
    run_main("--steps=2", "--fp8", "--dtype=auto", "--warmup=0")
    assert capsys.readouterr().err == ("warning: fp8 is emulated on a CPU, slower than bfloat16; a GPU of "
                                       "compute capability 8.9 has it\n")


def test_benchmarks_during_training_are_another_process(refused):
    assert "there is no setting 'eval_tasks' any more" in refused("--steps=1", "--eval_tasks=arc_easy")
    assert "python eval.py --watch=" in refused("--steps=1", "--eval_tasks_every=10")


# ------------------------------------------------------------------------------------------- Weights & Biases


def test_wandb_run_is_continued_under_its_id(run_main, wandb_folder):
    run = run_main("--steps=5", "--wandb=test")
    first = (run / "wandb_id.txt").read_text(encoding="utf-8")
    run_main("--steps=10", "--wandb=test", "--resume=auto")
    assert (run / "wandb_id.txt").read_text(encoding="utf-8") == first
    folders = [path.name for path in wandb_folder.glob("offline-run-*")]
    assert folders and all(first in name for name in folders)  # two of one second: …-1


def test_wandb_that_cannot_log_in_is_one_line(refused, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert "wandb: No API key configured.; log in with" in refused("--steps=1", "--wandb=test")


def test_a_run_goes_on_without_a_wandb_that_is_not_there(run_main, refused, monkeypatch, capsys):
    """One that begins is refused, as its user is there; a job that is started again is not."""
    def refuse(**_):
        raise OSError("the service does not start")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse))
    assert "wandb: the service does not start; log in with" in refused("--steps=1", "--wandb=test")
    run = run_main("--steps=1")
    (run / "wandb_id.txt").write_text("x1", encoding="utf-8")
    run_main("--steps=2", "--wandb=test", "--resume=auto")
    assert checkpoints(run)[0].name == "step_00000002"
    assert "warning: wandb: the service does not start; the run goes on without it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ compilation


@pytest.mark.parametrize("compile, graphs", (("whole", 1), ("blocks", 7)))
@pytest.mark.parametrize("flags", ([], ["--short_rows=0.5"]), ids=("whole-rows", "short-rows"))
def test_a_compiled_run_equals_an_eager_one_and_never_recompiles(
        run_main, without_codegen, compile, graphs, flags):
    """Validations come in between.

    blocks: the first block, the last (which gathers), norm and loss, and without gradients all but the loss.
    """
    counters = without_codegen()
    eager = run_main("--steps=12", "--eval_every=5", *flags, run="eager")
    run = run_main("--steps=12", "--eval_every=5", f"--compile={compile}", *flags, run="compiled")
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert training_losses(run) == pytest.approx(training_losses(eager), rel=1e-4)
    assert_close_figures(eager, run, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("compile, flags", (
    ("blocks", ["--short_rows=0.5"]), ("whole", []), ("blocks", ["--recompute=elementwise"]),
    ("blocks", ["--fp8", "--dtype=auto"]), ("whole", ["--fp8", "--dtype=auto"])), ids=str)
def test_ways_to_train_agree(run_main, compile, flags):
    """With the compiler's own kernels; training/test_update.py does it with fewer, and the quickstart."""
    torch._dynamo.reset()
    eager = run_main("--steps=10", *[flag for flag in flags if "short" in flag], run="eager")
    compiled = run_main("--steps=10", f"--compile={compile}", *flags, run="compiled")
    tolerance = 0.02 if "--fp8" in flags else 1e-4
    assert training_losses(compiled) == pytest.approx(training_losses(eager), rel=tolerance)
