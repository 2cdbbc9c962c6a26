"""A run that 48006ab began is resumed, sampled and evaluated: old names of settings and records are read."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator.renamed import renamed_record
from training.checkpoint import read_checkpoint
from training.log import read_metrics

GOLDEN = ROOT / "tests/golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))


def run(folder, name):
    """Run one of the recorded commands in a folder with the old run and its corpus, both copies."""
    for part in ("run_48006ab", "corpus_48006ab"):
        shutil.copytree(GOLDEN / part, folder / part, dirs_exist_ok=True)
    script, *words = shlex.split(EXPECTED["commands"][name])
    done = subprocess.run([sys.executable, ROOT / script, *words], cwd=folder, capture_output=True, text=True,
                          env=os.environ | EXPECTED["environment"])
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_is_resumed(tmp_path):
    """Steps 21 … 40 as 48006ab would have gone on; another CPU or torch may round otherwise."""
    run(tmp_path, "resume")
    lines = read_metrics(tmp_path / "run_48006ab")
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line and line["step"] > 20}
    expected = dict(zip(EXPECTED["resumed"]["step"], map(number, EXPECTED["resumed"]["loss"])))
    assert losses == pytest.approx(expected, rel=1e-3) and len(losses) == 20
    newest = read_checkpoint(tmp_path / "run_48006ab/step_00000040")
    assert newest["next_sample"] == 320 and newest["settings"]["seq_len"] == 32 == newest["model"]["seq_len"]


def test_it_is_sampled(tmp_path):
    run(tmp_path, "sample")
    rows = [json.loads(line) for line in (tmp_path / "sample.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["new_ids"] for row in rows] == EXPECTED["sample"]["tokens"]


def test_it_is_evaluated(tmp_path):
    run(tmp_path, "eval")
    result = json.loads(next((tmp_path / "eval").glob("eval.json")).read_text(encoding="utf-8"))
    expected = number(EXPECTED["eval"]["bound"]["nats_per_token"])
    assert result["bound"]["nats_per_token"] == pytest.approx(expected, rel=1e-4)


def number(value):
    """A recorded figure, which may be the hexadecimal text of a float."""
    return float.fromhex(value) if isinstance(value, str) else value


def test_an_old_record_has_todays_names():
    old = dict(samples=80, passed=16, streak=2, settings=dict(block_len=8, lr=1), model=dict(block_len=8),
               pending=[[2.5, 1.0], [1.25, 0.5, 3.0]])
    new = renamed_record(old)
    assert (new["next_sample"], new["passed_samples"], new["bad_in_a_row"]) == (80, 16, 2)
    assert new["settings"] == dict(seq_len=8, lr=1) and new["model"] == dict(seq_len=8)
    halves = dict(loss=1.75, noisy=2.5, clean=1.0, grad_norm=3.0)
    assert new["pending"] == [dict(loss=2.5, grad_norm=1.0), halves]
    assert renamed_record(new) == new and not {"samples", "passed", "streak"} & set(new)
