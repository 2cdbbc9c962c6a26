"""Settings and files that a run refuses: one line each, before anything is written."""

import shutil

import pytest
import torch

import configurator
import train
from corpus import tokenfiles
from training import checks


@pytest.mark.parametrize("flags, message", (
    # names, types, bounds
    (["--steps=1", "--bath_size=1"], "unknown setting 'bath_size'; did you mean 'batch_size'?"),
    (["--steps=1", "--lr=fast"], "expected a number"),
    (["--steps=1", "--lr=-1"], "must be above 0"),
    (["--steps=1", "--objective=mask"], "did you mean 'masked'?"),
    (["--steps=1", "--compile=True"], "choose from whole, blocks, no"),
    (["--tokens=1e300"], "must be at most 1000000000000000.0"),
    (["nowhere.py", "--steps=1"], "no such override file"),
    # how long, how fast
    (["--steps=1", "--epochs=1"], "exactly one of steps, tokens and epochs"),
    (["--steps=10", "--lr_schedule=wsd", "--decay=8"], "don't fit into 10 steps"),
    (["--epochs=1", "--lr_schedule=wsd", "--decay=8000"], "decay=8000 don't fit into"),
    (["--steps=1", "--min_lr=-0.5"], "min_lr=-0.5 must be -1 or lie between"),
    (["--steps=1", "--lr_schedule=wsd", "--decay=0.5", "--min_lr=0"], "never reaches min_lr=0"),
    (["--steps=9", "--lr_schedule=wsd", "--decay=2.5"], "decay=2.5: whole steps from 1 on, or a share"),
    (["--steps=5", "--anneal=9"], "anneal=9 doesn't fit into 5 steps"),
    (["--steps=5", "--save_at=3,x"], "save_at=3,x: 'x' is no step"),
    (["--steps=1", "--micro_batch=3"], "batch_size=8 must be a multiple of 1 ranks × micro_batch=3"),
    # what is learned
    (["--steps=1", "--schedule=sigmoid"], "unknown schedule 'sigmoid'"),
    (["--steps=1", "--loss=maskgit", "--time=moving_gaussian", "--time_correction"],
     "time_correction needs loss=elbo (or time_correction=False)"),
    (["--steps=1", "--time_correction"], "time_correction needs time=moving_gaussian"),
    (["--steps=1", "--loss=paper"], "loss=paper needs objective=uniform (or loss='elbo')"),
    (["--steps=1", "--loss=maskgit", "--objective=ar"], "loss=maskgit needs objective=masked"),
    (["--steps=1", "--objective=ar", "--schedule=poly2"],
     "schedule=poly2 needs objective=masked or uniform (or schedule='linear')"),
    (["--steps=1", "--objective=ar", "--anneal=1"], "anneal=1 needs objective=masked or uniform"),
    (["--steps=1", "--reset_positions"], "reset_positions needs document_attention"),
    # the network
    (["--steps=1", "--n_head=5"], "d_model=32 is no multiple of n_head=5"),
    (["--steps=1", "--n_kv_head=3"], "must be a multiple of n_kv_head=3"),
    (["--steps=1", "--head_dim=3"], "head_dim=3 must be even"),
    (["--steps=1", "--model=124M"], "contradicts model=124M"),
    # the text
    (["--steps=1", "--seq_len=100000"],
     "fewer than one sequence of 100,000; lower --seq_len, or prepare more text"),
    (["--steps=1", "--unique_tokens=10"],
     "unique_tokens=10 must lie between one sequence (32) and the training split"),
    (["--steps=1", "--corpus=nowhere"], "no corpus in 'nowhere'"),
    # other runs
    (["--steps=1", "--resume=yes"], "no usable checkpoint"),
    (["--steps=1", "--compare=nowhere"], "no such run"),
    # the machine
    (["--steps=1", "--fp8"], "fp8 needs dtype=auto or bfloat16"),
    (["--steps=1", "--fp8", "--dtype=auto", "--d_model=40"], "multiples of 16, not d_model=40"),
    (["--steps=1", "--fp8", "--dtype=auto", "--seq_len=33", "--batch_size=1"], "a multiple of 16 tokens"),
    (["--steps=1", "--cuda_graphs"], "cuda_graphs needs compile=whole"),
    (["--steps=1", "--cuda_graphs", "--compile=whole"], "cuda_graphs needs one process on a GPU"),
    (["--steps=1", "--gpus=8"], "gpus is for a dry run: add --dry_run, or start that many processes"),
))
def test_bad_settings_are_refused_before_anything_is_written(refused, tmp_path, flags, message):
    assert message in refused(*flags)
    assert not (tmp_path / "run").exists()


def test_the_defaults_need_nothing():
    """Every need is met where nothing is set, and speaks of settings that exist."""
    cfg = train.Config(steps=1)
    assert configurator.unmet_needs(cfg, train.Config.NEEDS) == checks.setting_problems(cfg) == []
    for key, needs in train.Config.NEEDS.items():
        for condition in [key, *needs.replace(" or ", ", ").split(", ")]:
            assert hasattr(cfg, condition.partition("=")[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(refused):
    assert "no usable GPU" in refused("--steps=1", "--device=cuda")


def test_world_size_must_divide_the_batch(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "multiple of 3 ranks" in refused("--steps=1")


def test_settings_of_several_ranks_that_do_not_go_together(refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    lines = refused("--steps=1", "--shard=full", "--compile=whole", "--shard_size=3", "--gpus=8").splitlines()
    assert len(lines) == 3
    for message in ("add --compile=blocks", "shard_size=3 needs shard=hybrid", "gpus is for a dry run"):
        assert any(message in line for line in lines)


@pytest.mark.parametrize("split, name", (("train", "training"), ("val", "validation")))
def test_a_token_beyond_the_vocabulary_in_a_corpus_too_large_to_check(
        refused, corpus, tmp_path, monkeypatch, split, name):
    shutil.copytree(corpus, tmp_path / "large")
    with open(tmp_path / f"large/{split}.bin", "r+b") as file:
        file.write(b"\xff\xff" * 3000)
    monkeypatch.setattr(tokenfiles, "MAX_HASHED_BYTES", 0)
    error = refused("--steps=100", f"--corpus={tmp_path / 'large'}")
    assert f"the {name} split holds token 65535" in error
    assert split == "train" or not (tmp_path / "run").exists()


def test_a_run_folder_that_cannot_be_is_one_line(refused, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    error = refused("--steps=9", run="file/run")
    assert error.count("\n") == 1 and "Not a directory" in error
