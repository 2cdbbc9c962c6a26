"""convert.py average: the mean of checkpoints, and what it refuses."""

import json
import sys

import pytest
import torch
from conftest import call_main
from runs import TINY
from safetensors.torch import load_file

import convert
from sampling.generator import Generator
from training.record import read_record, record_digest


@pytest.fixture
def average(monkeypatch, capsys):
    """Call convert.py average; returns (exit code, stderr)."""

    def call(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["convert.py", "average", *map(str, flags)])
        code = 0
        try:
            convert.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return call


FLAGS = ["--steps=6", "--save_every=2", "--keep=9"]


def test_average_is_the_mean(run_main, average, tmp_path, monkeypatch, corpus):
    """Of three checkpoints of one run; it writes, is trained on from, and is resumed by nobody."""
    run, out = run_main(*FLAGS, "--loss=paper", "--objective=uniform"), tmp_path / "mean"
    steps = [run / f"step_0000000{step}" for step in (2, 4, 6)]
    code, error = average(f"--checkpoints={','.join(map(str, steps))}", f"--out={out}")
    assert code == 0, error
    parts = [load_file(step / "model.safetensors") for step in steps]
    mean = load_file(out / "step_00000006/model.safetensors")
    assert mean.keys() == parts[0].keys()
    for name, value in mean.items():
        expected = torch.stack([part[name].double() for part in parts]).mean(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-9)
    generator = Generator.from_checkpoint(out, "cpu").load_weights()
    assert generator.posterior and generator.objective == "uniform"  # as the run's own settings say
    flags = [f"--corpus={corpus}", "--objective=uniform", "--steps=9"]
    with pytest.raises(SystemExit):
        call_main(monkeypatch, *TINY, *flags, f"--run_dir={out}", "--resume=yes")
    begun = tmp_path / "begun"
    shape = ("--n_", "--d_")
    call_main(monkeypatch, *[flag for flag in TINY if not flag.startswith(shape)], *flags,
              f"--init_from={out}", f"--run_dir={begun}")
    assert (begun / "step_00000009").is_dir()


def test_a_record_of_an_older_version_is_alike(run_main, average, tmp_path):
    """It does not mention what there was not, and weights may have begun otherwise."""
    run = run_main(*FLAGS)
    record = read_record(run / "step_00000002")
    del record["model"]["diffusion_block"], record["model"]["shift"]
    record["model"] |= dict(init_std=0.5, local_init=True)
    record = dict(record, record_sha256=record_digest(record))
    (run / "step_00000002/checkpoint.json").write_text(json.dumps(record), encoding="utf-8")
    steps = f"{run / 'step_00000002'},{run / 'step_00000004'}"
    code, error = average(f"--checkpoints={steps}", f"--out={tmp_path / 'mean'}")
    assert code == 0, error


def test_what_has_no_mean_is_one_line(run_main, average, tmp_path):
    run, out = run_main(*FLAGS), tmp_path / "mean"
    other = run_main(*FLAGS, "--n_layer=1", run="other")
    for flags, message in (
            ([f"--checkpoints={run}"], "the mean is of two or more"),
            ([f"--checkpoints={run},{other}"], "is of another model than"),
            ([f"--checkpoints={run},{run}/step_00000006"], "step_00000006 stands there twice"),
            ([f"--checkpoints={run},{tmp_path / 'none'}"], "no usable checkpoint"),
            ([f"--checkpoints={run},{run}/step_00000002", "--weights=ema"], "keeps no averaged weights"),
            ([], "give --checkpoints")):
        code, error = average(*flags, f"--out={out}")
        assert code == 2 and message in error and error.count("\n") == 1, error
        assert not out.exists() and not list(tmp_path.glob(".mean*"))
    out.mkdir()
    code, error = average(f"--checkpoints={run},{run}", f"--out={out}")
    assert code == 2 and "exists; nothing is overwritten" in error
