"""A run that begins with another's weights: an AR model continued as masked diffusion, shifted, annealed."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main
from runs import TINY
from safetensors.torch import load_file
from test_model import build, tokens

import data
import diffusion
import sample
import train
from corpus import tokenfiles
from model import ModelConfig, Transformer
from training import transfer
from training.checkpoint import checkpoints, init_weights_from, read_checkpoint
from training.log import read_metrics
from training.objective import Objective

SHAPE = ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "model", "tied")
TINY_WITHOUT_SHAPE = [flag for flag in TINY if flag.lstrip("-").partition("=")[0] not in SHAPE]


@pytest.fixture
def run_main(monkeypatch, corpus, tmp_path):
    """Call train.main() in this process with the tiny settings; returns the run folder."""

    def call(*flags, run="run"):
        has_shape = any("init_from" in flag for flag in flags)
        tiny = TINY_WITHOUT_SHAPE if has_shape else TINY
        call_main(monkeypatch, *tiny, f"--corpus={corpus}", f"--run_dir={tmp_path / run}", *flags)
        return tmp_path / run

    return call


@pytest.fixture(scope="module")
def trained_ar(corpus, tmp_path_factory):
    """An AR run of two steps. Nothing in it is changed."""
    run = tmp_path_factory.mktemp("ar") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        flags = [f"--corpus={corpus}", f"--run_dir={run}", "--steps=2", "--objective=ar"]
        call_main(monkeypatch, *TINY, *flags)
    return run


def last_validation(run):
    return [m["val_loss"] for m in read_metrics(run) if "val_loss" in m][-1]


def weights(run):
    return load_file(checkpoints(run)[0] / "model.safetensors")


# ---------------------------------------------------------------------------------------- shifted predictions


def test_a_shifted_network_is_another_one_position_on():
    shifted, plain = build(shift=True), build()
    plain.load_state_dict(shifted.state_dict())
    x = tokens(3, 16)
    a, b = shifted(x), plain(x)
    assert torch.equal(a[:, 1:], b[:, :-1]) and torch.equal(a[:, 0], b[:, 0])
    index = torch.tensor([0, 5, 15, 16, 17, 47])  # over the rows' borders
    torch.testing.assert_close(shifted(x, index=index), a.flatten(0, 1)[index])
    documents = torch.tensor([[0] * 8 + [1] * 8, [0] * 16, [0] * 3 + [1] * 13])
    a, b = shifted(x, documents=documents), plain(x, documents=documents)
    is_first = torch.zeros(3, 16, dtype=torch.bool)
    is_first[:, 0] = is_first[0, 8] = is_first[2, 3] = True
    assert torch.equal(a[is_first], b[is_first])
    is_later = ~is_first[:, 1:]
    assert torch.equal(a[:, 1:][is_later], b[:, :-1][is_later])


def test_a_shifted_causal_model_predicts_what_the_ar_model_does():
    """On text without masks, position i from i − 1 with causal attention."""
    ar, shifted = build(causal=True), build(shift=True)
    shifted.load_state_dict(ar.state_dict())
    x = tokens(2, 16)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    logits = shifted.logits(shifted(x, visible=causal))
    torch.testing.assert_close(logits[:, 1:], ar.logits(ar(x))[:, :-1])


# ----------------------------------------------------------------------------------------- annealed attention


def test_annealed_mask():
    """The past is always visible, of the future a random share, another at each step."""
    first, second, again = (diffusion.annealed_mask(3, step, 64, 0.3) for step in (0, 1, 1))
    assert (second == again).all() and (first != second).any()
    is_future = ~np.tri(64, dtype=bool)
    assert first[~is_future].all() and abs(first[is_future].mean() - 0.3) < 0.05
    assert diffusion.annealed_mask(0, 5, 64, 1.0).all()
    assert not diffusion.annealed_mask(0, 5, 64, 0.0)[is_future].any()


def test_a_mask_replaces_the_direction_of_attention():
    model, causal = build(), build(causal=True)
    causal.load_state_dict(model.state_dict())
    x, documents = tokens(2, 16), torch.tensor([[0] * 6 + [1] * 10, [0] * 16])
    everything = torch.ones(16, 16, dtype=torch.bool)
    for kwargs in ({}, dict(documents=documents)):
        torch.testing.assert_close(model(x, visible=everything.tril(), **kwargs), causal(x, **kwargs))
        torch.testing.assert_close(model(x, visible=everything, **kwargs), model(x, **kwargs))


def test_training_sees_the_annealed_pairs_and_then_all(corpus):
    cfg = train.Config(steps=6, batch_size=4, micro_batch=2, seq_len=32, anneal=4, corpus=str(corpus))

    def batches(rank, world):
        run = SimpleNamespace(
            cfg=cfg, ranks=SimpleNamespace(rank=rank, world=world), micro_batch=2, steps=6, eos_id=256,
            sequences=data.Sequences(tokenfiles.load_corpus(corpus).train, 32),
            process=diffusion.Process("masked", 257, 257, 32))
        return list(train.batches(run, 0, 0))

    alone = batches(0, 1)
    for i, batch in enumerate(alone):
        step = i // 2
        if step < 4:
            expected = diffusion.annealed_mask(cfg.seed, step, 32, (step + 1) / 4)
            assert (batch.visible == expected).all()
        else:
            assert batch.visible is None
    assert (batches(1, 2)[0].visible == alone[0].visible).all()  # the same on the second of two ranks

    objective = Objective(build(n_vocab=257, mask_id=257, seq_len=32), False)
    batch = transfer.to_tensors(alone[0])
    everything = torch.ones(32, 32, dtype=torch.bool)
    annealed, visible, unmasked = (objective(batch._replace(visible=mask))["loss"].item()
                                   for mask in (batch.visible, everything, None))
    assert visible == pytest.approx(unmasked, rel=1e-6) and abs(annealed - visible) > 1e-4


# ------------------------------------------------------------------------------------------ another's weights


def test_weights_are_copied_and_the_mask_gets_a_row(run_main, trained_ar):
    """Text keeps its rows; the mask's is the old mask's, or the text's mean where it was never seen."""
    run = run_main("--steps=3", f"--init_from={trained_ar}")
    record = read_checkpoint(checkpoints(run)[0])
    assert record["model"]["shift"] and not record["model"]["causal"]
    assert record["settings"]["init_from"] == str(trained_ar)
    old = weights(trained_ar)
    for causal in (True, False):
        source = dict(record, model=dict(record["model"], causal=causal))
        config = ModelConfig(**dict(record["model"], n_vocab=200, mask_id=230))
        network = Transformer(config).init_weights()
        before = network.embed.weight[250].clone()
        init_weights_from(checkpoints(trained_ar)[0], source, network)
        rows, old_rows = network.embed.weight, old["embed.weight"]
        assert torch.equal(rows[:200], old_rows[:200])
        assert (rows[200:230] == 0).all() and not torch.equal(rows[250], before)
        torch.testing.assert_close(rows[230], old_rows[:200].mean(0) if causal else old_rows[257])
        for name, p in network.named_parameters():
            assert name in ("embed.weight", "lm_head.weight") or torch.equal(p, old[name]), name


def test_the_adapted_start_is_ahead(run_main):
    """At equal tokens: an AR model continued as masked diffusion against random weights, in three ways."""
    ar = run_main("--steps=250", "--lr=1e-2", "--objective=ar", run="ar")
    assert json.loads((ar / "settings.json").read_text(encoding="utf-8"))["objective"] == "ar"
    flags = ["--steps=60", "--lr=5e-3", "--eval_every=0"]
    random = last_validation(run_main(*flags, run="random"))
    for name, more in dict(shifted=[], annealed=["--anneal=30"], unshifted=["--shift=no"]).items():
        adapted = last_validation(run_main(*flags, f"--init_from={ar}", *more, run=name))
        assert adapted < random - 0.1, name


def test_resumed_without_its_source(run_main, trained_ar, tmp_path):
    source = tmp_path / "ar"
    shutil.copytree(trained_ar, source)
    flags = ["--steps=8", f"--init_from={source}", "--anneal=6"]
    whole = run_main(*flags, run="whole")
    half = run_main(*flags, "--save_every=4", run="half")
    shutil.rmtree(checkpoints(half)[0])
    shutil.rmtree(source)
    run_main(*flags, "--resume=auto", run="half")
    a, b = weights(whole), weights(half)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("source, flags, message", (
    ("nowhere", [], "no such folder"),
    ("foreign", [], "convert it first"),
    ("ar", ["--n_layer=9"], "contradicts"),
    ("ar", ["--model=1086M"], "model=1086M contradicts init_from={folder}"),
    ("ar", ["--objective=uniform", "--shift=yes"], "needs objective=masked"),
    ("", ["--objective=ar", "--anneal=5"], "anneal=5 needs objective=masked or uniform"),
    ("", ["--anneal=5"], "anneal=5 doesn't fit into 2 steps")))
def test_refused(run_main, trained_ar, capsys, tmp_path, source, flags, message):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text("{}", encoding="utf-8")
    folder = trained_ar if source == "ar" else tmp_path / source
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main("--steps=2", *([f"--init_from={folder}"] if source else []), *flags)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and message.format(folder=folder) in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_shifted_model_is_sampled(run_main, trained_ar, monkeypatch, capsys):
    run = run_main("--steps=2", f"--init_from={trained_ar}")
    command = ["sample.py", f"--run_dir={run}", "--length=8", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", command)
    sample.main()
    monkeypatch.setattr(sys, "argv", [*command, "--block=4", "--cache=dual"])
    with pytest.raises(SystemExit):
        sample.main()
    assert "not for a shifted model" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_and_sharded_networks_begin_alike(trained_ar, corpus, tmp_path):
    losses = {}
    for name, ranks, flags in (("one", 1, []), ("ddp", 2, []), ("full", 2, ["--shard=full"])):
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        flags = [f"--run_dir={tmp_path / name}", f"--corpus={corpus}", f"--init_from={trained_ar}",
                 "--steps=4", "--anneal=2", *flags]
        command = [*launcher, "train.py", *TINY_WITHOUT_SHAPE, *flags]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        metrics = read_metrics(tmp_path / name)
        losses[name] = [m.get("loss", m.get("val_loss")) for m in metrics if "loss" in m or "val_loss" in m]
    assert losses["ddp"] == pytest.approx(losses["one"], rel=1e-5)
    assert losses["full"] == pytest.approx(losses["one"], rel=1e-5)
