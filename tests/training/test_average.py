"""The moving average of the weights: its closed form, what it skips, resumes, saves, and who takes it."""

import shutil

import pytest
import torch
from conftest import call_main
from runs import TINY, equal_runs, equal_tensors, figures, weights
from safetensors.torch import load_file

import convert
import sample
from model import ModelConfig, Transformer
from sampling.generator import Generator
from training import update
from training.average import WeightAverage
from training.checkpoint import checkpoints, load_newest
from training.objective import Objective
from training.record import read_record

FLAGS = ["--ema=0.9", "--steps=12", "--log_every=1", "--eval_every=6", "--save_every=6", "--keep=9"]


def network():
    config = ModelConfig(1, 2, 2, 16, 32, 64, 60, 60, 24, causal=False)
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_its_closed_form_and_skipped_steps(optimizer):
    """The sum of all weights so far times the products of β in fp64; a refused update counts for nothing."""
    net, decay = network(), 0.5
    average = WeightAverage(Objective(net, False), decay)
    average.start()
    optimizer = update.make_optimizer(net, 1e-2, (0.9, 0.95), 0.1, optimizer)
    expected, n = {name: p.detach().double().clone() for name, p in net.named_parameters()}, 0
    for is_bad in (0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0):
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
        optimizer.found_inf = torch.tensor(float(is_bad))
        optimizer.step()
        before = {name: value.clone() for name, value in average.weights.items()}
        average.add(optimizer)
        if is_bad:
            assert equal_tensors(before, average.weights)
            continue
        n += 1
        beta = min(decay, (1 + n) / (10 + n))
        for name, p in net.named_parameters():
            expected[name] = beta * expected[name] + (1 - beta) * p.detach().double()
    assert n == 9 and (1 + n) / (10 + n) > decay > 2 / 11  # both branches of the minimum
    for name, value in average.weights.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_it_can_stand_in_for_the_weights():
    net = network()
    average = WeightAverage(Objective(net, False), 0.9)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with average.in_use():
        assert not any(p.any() for p in net.parameters())  # nothing has been averaged yet
    assert equal_tensors(dict(net.named_parameters()), before)
    assert not any(value.any() for value in average.weights.values())


def test_a_run_keeps_it_and_resumes(run_main, capsys):
    """Bit for bit; validations report it, training does not feel it, and it can begin in the middle."""
    whole = run_main(*FLAGS, run="whole")
    folder = checkpoints(whole)[0]
    averages = load_file(folder / "ema/model.safetensors")
    assert averages.keys() == weights(whole).keys() and not equal_tensors(averages, weights(whole))
    assert "ema/model.safetensors" in read_record(folder)["sha256"]
    validations = [m for m in figures(whole) if "val_loss" in m]
    assert len(validations) == 3 and all(m["val_ema"] != m["val_loss"] for m in validations[1:])
    assert validations[0]["val_ema"] == validations[0]["val_loss"]

    plain = run_main(*FLAGS[1:], run="plain")
    assert equal_tensors(weights(plain), weights(whole))

    resumed = run_main(*FLAGS, run="resumed")
    shutil.rmtree(resumed / "step_00000012")
    assert equal_runs(run_main(*FLAGS, "--resume=yes", run="resumed"), whole)
    assert equal_tensors(load_file(checkpoints(resumed)[0] / "ema/model.safetensors"), averages)

    shutil.rmtree(plain / "step_00000012")
    later = run_main(*FLAGS, "--resume=yes", run="plain")
    assert equal_tensors(weights(later), weights(whole))
    assert not equal_tensors(load_file(checkpoints(later)[0] / "ema/model.safetensors"), averages)

    capsys.readouterr()
    ended = run_main(*FLAGS[1:], "--steps=13", "--resume=yes", run="whole")
    assert "resumed without --ema=0.9: the moving average in" in capsys.readouterr().err
    assert not (ended / "step_00000013/ema").exists()


def test_a_damaged_average_is_no_checkpoint(run_main, capsys):
    run = run_main(*FLAGS)
    path = run / "step_00000012/ema/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert load_newest(run, print)[0].name == "step_00000006"
    assert f"{path} is missing or damaged" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- who takes it


@pytest.fixture
def run(run_main):
    return run_main(*FLAGS)


def test_commands_take_what_they_are_told(run, run_eval, corpus, monkeypatch, tmp_path):
    """auto is the average; eval.py measures what train.py logged of either; convert.py writes either."""
    own, averages = weights(run), load_file(checkpoints(run)[0] / "ema/model.safetensors")
    for which, expected in dict(auto=averages, ema=averages, raw=own).items():
        network = Generator.from_checkpoint(run, "cpu", weights=which).load_weights().model
        assert equal_tensors(dict(network.named_parameters()), expected), which
    last = [m for m in figures(run) if "val_loss" in m][-1]
    for flags, key in (([], "val_ema"), (["--weights=raw"], "val_loss")):
        text, report = run_eval(run, *flags)
        assert report["bound"]["nats_per_token"] == pytest.approx(last[key], rel=1e-6)
        assert f"train.py logged {last[key]:.4f}" in text
    assert {path.name for path in run.glob("eval_*")} == {"eval_00000012", "eval_00000012_raw"}

    for which, expected in dict(ema=averages, raw=own).items():
        out = tmp_path / which
        monkeypatch.setattr("sys.argv", ["convert.py", f"--source={run}", f"--out={out}", "--verify",
                                         f"--weights={which}"])
        convert.main()
        written = load_file(out / "model.safetensors")
        [key] = [key for key in written if key.endswith("layers.0.mlp.down_proj.weight")]
        assert torch.equal(written[key], expected["blocks.0.mlp.down_proj.weight"])
    for which, expected in dict(auto=averages, raw=own).items():
        begun = tmp_path / f"from_{which}"
        flags = [f"--init_from={run}", f"--init_weights={which}", "--steps=1", "--lr=1e-12",
                 f"--run_dir={begun}", f"--corpus={corpus}"]
        call_main(monkeypatch, *[flag for flag in TINY if not flag.startswith(("--n_", "--d_"))], *flags)
        for name, value in weights(begun).items():
            rows = slice(257)  # of the embedding: text and separator
            torch.testing.assert_close(value[rows], expected[name][rows], rtol=0, atol=1e-6)


def test_averages_that_are_not_there(run_main, corpus, monkeypatch, capsys):
    """A line, before anything is written."""
    run = run_main("--steps=2")
    following = run.with_name("next")
    shapeless = [flag for flag in TINY if not flag.startswith(("--n_", "--d_"))]
    flags = [*shapeless, f"--init_from={run}", "--init_weights=ema", "--steps=2", f"--corpus={corpus}"]
    monkeypatch.setattr("sys.argv", ["sample.py", f"--run_dir={run}", "--weights=ema"])
    calls = dict(
        weights=sample.main, init_weights=lambda: call_main(monkeypatch, *flags, f"--run_dir={following}"))
    for setting, call in calls.items():
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call()
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1
        assert f": {setting}=ema: " in error and "keeps no averaged weights" in error
    assert not following.exists()
