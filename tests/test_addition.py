"""Sums that are known: how many of those kept back are right after fine-tuning on the others."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import environment

KINDS = {"ar": ["--objective=ar", "--eos_padding=none"], "masked": [],
         "block": ["--diffusion_block=4", "--eos_padding=block"]}


def command(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True,
                          env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_digit_additions(kind, tmp_path):
    """As results/sft_addition.md has it: at least 95 % of 995 held-out sums, by 0.8M parameters."""
    (tmp_path / "addition.jsonl").write_text(command("results/additions.py"), encoding="utf-8")
    command("data.py", tmp_path / "addition.jsonl", "--sft", f"--out={tmp_path}")
    run = tmp_path / "run"
    command("train.py", "configurator/sft_addition.py", *KINDS[kind], f"--corpus={tmp_path / 'addition'}",
            f"--run_dir={run}")
    command("eval.py", f"--run_dir={run}", "--bound=False", "--answers=995", "--micro_batch=200",
            f"--out={tmp_path / 'eval'}")
    report = json.loads((tmp_path / "eval/eval.json").read_text(encoding="utf-8"))
    assert report["parameters"] < 2e6 and report["answers"]["answers"] == 995
    assert report["answers"]["exact_match"] >= 0.95
