"""Beginning with another run's weights: an AR model continued as masked diffusion, shifted, its attention annealed."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, call_main
from safetensors.torch import load_file
from test_model import build, tokens
from test_train import TINY

import data
import diffusion
import sample
import train
from corpus import tokenfiles
from model import ModelConfig, Transformer
from training.checkpoint import checkpoints, init_weights_from, read_checkpoint
from training.log import read_metrics
from training.objective import Objective

SHAPE = ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "model", "tied")
OTHERS = [flag for flag in TINY if flag.lstrip("-").partition("=")[0] not in SHAPE]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_main(monkeypatch, corpus, tmp_path):
    def call(*flags, run="run"):
        shape = OTHERS if any("init_from" in flag for flag in flags) else TINY
        call_main(monkeypatch, *shape, f"--corpus={corpus}", f"--run_dir={tmp_path / run}", *flags)
        return tmp_path / run

    return call


def validations(run):
    return [m["val_loss"] for m in read_metrics(run) if "val_loss" in m]


# ----------------------------------------------------------------------------------------- shifted predictions


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
    first = torch.zeros(3, 16, dtype=torch.bool)
    first[:, 0] = first[0, 8] = first[2, 3] = True
    assert torch.equal(a[first], b[first]) and torch.equal(a[:, 1:][~first[:, 1:]], b[:, :-1][~first[:, 1:]])


def test_a_shifted_causal_model_says_what_the_ar_model_said():
    """On text without masks: the prediction of position i from i − 1 with causal attention is the AR model's."""
    ar, shifted = build(causal=True), build(shift=True)
    shifted.load_state_dict(ar.state_dict())
    x = tokens(2, 16)
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    torch.testing.assert_close(shifted.logits(shifted(x, visible=causal))[:, 1:], ar.logits(ar(x))[:, :-1])


def test_annealed_attention():
    """From causal to bidirectional: the past is always seen, of the future a random share, another at each step."""
    share = [diffusion.annealed_mask(3, step, 64, 0.3) for step in (0, 1, 1)]
    assert (share[1] == share[2]).all() and (share[0] != share[1]).any()
    ahead = ~np.tri(64, dtype=bool)
    assert share[0][~ahead].all() and abs(share[0][ahead].mean() - 0.3) < 0.05
    assert diffusion.annealed_mask(0, 5, 32, 1.0).all() and diffusion.annealed_mask(0, 5, 32, 0.0)[~np.tri(32, dtype=bool)].sum() == 0
    model, causal = build(), build(causal=True)
    causal.load_state_dict(model.state_dict())
    x, documents = tokens(2, 16), torch.tensor([[0] * 6 + [1] * 10, [0] * 16])
    for more in ({}, dict(documents=documents)):
        torch.testing.assert_close(model(x, visible=torch.ones(16, 16, dtype=torch.bool).tril(), **more), causal(x, **more))
        torch.testing.assert_close(model(x, visible=torch.ones(16, 16, dtype=torch.bool), **more), model(x, **more))


def test_training_sees_the_annealed_pairs_and_then_all(corpus):
    cfg = train.Config(steps=6, batch_size=4, micro_batch=2, seq_len=32, anneal=4, corpus=str(corpus))
    blocks = data.Sequences(tokenfiles.load_corpus(corpus).train, 32)
    process = diffusion.Process("masked", 257, 257, 32)
    batches = list(train.training_batches(process, blocks, 256, 0, 0, 6, cfg, 0, 1, False))
    for i, batch in enumerate(batches):
        step = i // 2
        if step < 4:
            assert (batch.visible.numpy() == diffusion.annealed_mask(cfg.seed, step, 32, (step + 1) / 4)).all()
        else:
            assert batch.visible is None
    objective = Objective(build(n_vocab=257, mask_id=257, seq_len=32), False)
    losses = [objective(batches[0]._replace(visible=visible))[0].item() for visible in (batches[0].visible, torch.ones(32, 32, dtype=torch.bool), None)]
    assert losses[1] == pytest.approx(losses[2], rel=1e-6) and abs(losses[0] - losses[1]) > 1e-4  # and the network goes by them
    other = list(train.training_batches(process, blocks, 256, 0, 0, 6, cfg, 1, 2, False))  # the second of two ranks
    assert torch.equal(other[0].visible, batches[0].visible)


# ------------------------------------------------------------------------------------------- another's weights


def test_weights_are_taken_over_and_the_mask_gets_a_row(run_main, tmp_path):
    """The rows of text are the old ones; the mask's the mean of them where it was never seen, else the old mask's."""
    ar = run_main("--steps=3", "--objective=ar", run="ar")
    masked = run_main("--steps=3", f"--init_from={ar}", run="masked")
    record = read_checkpoint(checkpoints(masked)[0])
    assert record["model"]["shift"] and not record["model"]["causal"] and record["settings"]["init_from"] == str(ar)
    old = load_file(checkpoints(ar)[0] / "model.safetensors")
    for causal in (True, False):
        source = dict(record, model=dict(record["model"], causal=causal))
        network = Transformer(ModelConfig(**dict(record["model"], n_vocab=200, mask_id=230))).init_weights()
        before = network.embed.weight[250].clone()
        init_weights_from(checkpoints(ar)[0], source, network)
        assert torch.equal(network.embed.weight[:200], old["embed.weight"][:200]) and (network.embed.weight[200:230] == 0).all() and not torch.equal(network.embed.weight[250], before)
        torch.testing.assert_close(network.embed.weight[230], old["embed.weight"][:200].mean(0) if causal else old["embed.weight"][257])
        assert all(torch.equal(p, old[name]) for name, p in network.named_parameters() if name not in ("embed.weight", "lm_head.weight"))


def test_the_adapted_start_is_ahead(run_main):
    """At equal tokens: an AR model continued as masked diffusion against random weights, with annealing and without, shifted or not."""
    ar = run_main("--steps=250", "--lr=1e-2", "--objective=ar", run="ar")
    how = ["--steps=60", "--lr=5e-3", "--eval_every=0"]
    shape = json.loads((ar / "settings.json").read_text())
    random = validations(run_main(*how, run="random"))[-1]
    adapted = {name: validations(run_main(*how, f"--init_from={ar}", *more, run=name))[-1] for name, more in
               dict(shifted=[], annealed=["--anneal=30"], unshifted=["--shift=no"]).items()}
    assert shape["objective"] == "ar" and all(loss < random - 0.1 for loss in adapted.values()), (random, adapted)


def test_resumed_without_what_it_began_with(run_main, tmp_path):
    ar = run_main("--steps=3", "--objective=ar", run="ar")
    whole = run_main("--steps=8", f"--init_from={ar}", "--anneal=6", run="whole")
    run_main("--steps=8", f"--init_from={ar}", "--anneal=6", "--save_every=4", run="half")
    for folder in checkpoints(tmp_path / "half")[:1]:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        folder.rmdir()
    ar.rename(tmp_path / "gone")
    half = run_main("--steps=8", f"--init_from={ar}", "--anneal=6", "--resume=auto", run="half")
    a, b = (load_file(checkpoints(run)[0] / "model.safetensors") for run in (whole, half))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_refused(run_main, capsys, tmp_path, corpus):
    ar = run_main("--steps=2", "--objective=ar", run="ar")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/config.json").write_text("{}")
    for flags, said in ((["--init_from=nowhere"], "no such folder"), ([f"--init_from={tmp_path / 'foreign'}"], "convert it first"), ([f"--init_from={ar}", "--n_layer=9"], "contradicts"),
                        ([f"--init_from={ar}", "--objective=uniform", "--shift=yes"], "needs objective=masked"), (["--objective=ar", "--anneal=5"], "stays causal"), (["--anneal=5"], "anneal=5 doesn't fit into 2 steps"),
                        ([f"--init_from={ar}", "--model=1086M"], f"model=1086M contradicts init_from={ar}")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main("--steps=2", *flags, run="other")
        err = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and len(err) == 1 and said in err[0], err
        assert not (tmp_path / "other").exists()


def test_a_shifted_model_is_sampled_and_evaluated(run_main, monkeypatch, capsys, tmp_path):
    ar = run_main("--steps=2", "--objective=ar", run="ar")
    masked = run_main("--steps=2", f"--init_from={ar}", run="masked")
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={masked}", "--length=8", "--device=cpu"])
    sample.main()
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={masked}", "--length=8", "--block=4", "--cache=dual", "--device=cpu"])
    with pytest.raises(SystemExit):
        sample.main()
    assert "not for a shifted model" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_and_divided_networks_begin_alike(run_main, corpus, tmp_path):
    ar = run_main("--steps=3", "--objective=ar", run="ar")
    runs = {}
    for name, ranks, flags in (("one", 1, []), ("ddp", 2, []), ("full", 2, ["--shard=full"])):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]
        subprocess.run([*launcher, "train.py", *OTHERS, f"--corpus={corpus}", f"--run_dir={tmp_path / name}", "--steps=4", f"--init_from={ar}", "--anneal=2", *flags],
                       cwd=ROOT, check=True, capture_output=True)
        runs[name] = [m.get("loss", m.get("val_loss")) for m in read_metrics(tmp_path / name) if "loss" in m or "val_loss" in m]
    assert runs["ddp"] == pytest.approx(runs["one"], rel=1e-5) and runs["full"] == pytest.approx(runs["one"], rel=1e-5)
