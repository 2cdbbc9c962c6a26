"""sample.py end to end, on checkpoints that the trainer wrote."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import run_main  # noqa: F401  (fixtures)

import data
import sample


@pytest.fixture
def write(monkeypatch, capsys):
    """Call sample.main(); returns (stdout, stderr)."""

    def call(run, *flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", "--device=cpu", *flags])
        sample.main()
        return capsys.readouterr()

    return call


@pytest.mark.parametrize("flags", (["--objective=ar"], ["--objective=masked"], ["--objective=uniform"], ["--objective=uniform", "--loss=paper"]))
def test_prompts_are_kept_and_seeds_decide(run_main, write, flags):  # noqa: F811
    run = run_main("--steps=3", *flags)
    first = write(run, "--prompt=12 squared", "--length=9", "--batch=3")
    texts = first.out.split("--- sample ")[1:]
    assert len(texts) == 3 and all("\n12 squared" in t for t in texts)
    assert "9 forward passes" in first.err
    assert write(run, "--prompt=12 squared", "--length=9", "--batch=3").out == first.out
    assert write(run, "--prompt=12 squared", "--length=9", "--batch=3", "--seed=1").out != first.out
    assert "12 squared" in write(run, "--prompt=12 squared", "--length=5", "--top_k=3", "--top_p=0.9", "--temperature=0.7", "--show").out


@pytest.mark.parametrize("sampler", ("ancestral", "low_confidence"))
@pytest.mark.parametrize("steps", (1, 3, 50))
def test_holes_are_filled_anywhere_and_nothing_else_changes(run_main, write, sampler, steps):  # noqa: F811
    run = run_main("--steps=3")
    text = "ab[MASK:4]cd[MASK]ef"
    out = write(run, f"--text={text}", f"--sampler={sampler}", f"--steps={steps}", "--temperature=0" if steps == 3 else "--temperature=1")
    assert f"{steps} forward passes" in out.err and "░" not in out.out
    model_ids = sample.template(sample.Config(text=text), data.Bytes(), 32, causal=False)
    assert (model_ids == data.Bytes.mask_id).sum() == 5 and len(model_ids) == 11


def test_given_tokens_stay_and_no_mask_is_left(run_main):  # noqa: F811
    from checkpoint import load_model, load_newest

    folder, record = load_newest(run_main("--steps=3"), print)
    model = load_model(folder, record).eval()
    z = torch.randint(0, 256, (5, 32))
    z[torch.rand(5, 32) < 0.5] = 257  # rows with different numbers of holes
    for sampler in ("ancestral", "low_confidence"):
        cfg = sample.Config(sampler=sampler)
        out = sample.sample_masked(model, z, cfg, 7, sample.diffusion.schedule("linear"), torch.Generator().manual_seed(0), lambda z: None)
        assert torch.equal(out[z != 257], z[z != 257]) and (out < 257).all()


@pytest.mark.parametrize("flags, message", (
    (["--prompt=" + "x" * 32], "the prompt has 32 tokens, and the model's context is 32"),
    (["--prompt=abc", "--length=30"], "more than the model's context of 32"),
    (["--text=abc"], "the text has no [MASK]"),
    (["--text=a[MASK:x]b[MASK]"], "[MASK:x]: 'x' is not a number; write [MASK] or [MASK:12]"),
    (["--text=a[MASK:-1]"], "[MASK:-1]: '-1' is not a number"),
    (["--prompt=a", "--text=b[MASK]"], "give one of prompt, prompt_file and text"),
    (["--prompt_file=nowhere.txt"], "nowhere.txt"),
    (["--top_p=0"], "must be above 0"),
    (["--temperatur=1"], "did you mean 'temperature'?"),
))
def test_bad_input(run_main, write, capsys, flags, message):  # noqa: F811
    run = run_main("--steps=3")
    with pytest.raises(SystemExit) as exit_:
        write(run, *flags)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_ar_cannot_fill_in_the_middle(run_main, write, capsys):  # noqa: F811
    run = run_main("--steps=3", "--objective=ar")
    with pytest.raises(SystemExit):
        write(run, "--text=a[MASK]b")
    assert "can't fill holes before given text" in capsys.readouterr().err


@pytest.mark.parametrize("objective, flag, message", (("ar", "--steps=3", "steps=3 has no meaning for objective=ar"),
                                                      ("uniform", "--sampler=low_confidence", "sampler=low_confidence has no meaning")))
def test_settings_without_meaning_are_refused(run_main, write, capsys, objective, flag, message):  # noqa: F811
    run = run_main("--steps=3", f"--objective={objective}")
    with pytest.raises(SystemExit):
        write(run, flag)
    assert message in capsys.readouterr().err


def test_no_run_no_traceback():
    done = subprocess.run([sys.executable, "sample.py", "--run_dir=nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "sample.py: no usable checkpoint in 'nowhere'"


def test_a_trained_model_writes_what_it_read(run_main, write, corpus):  # noqa: F811
    """One block by heart: the AR model at temperature 0 continues it exactly."""
    run = run_main("--objective=ar", "--unique_tokens=32", "--epochs=3000", "--lr=5e-3", "--weight_decay=0")
    block = data.Blocks(data.load_corpus(corpus).train, 32, 1337, 32).rows(np.zeros(1, np.int64))[0, :-1]  # from the first token on, as it was trained
    text = data.Bytes().decode(block.tolist())
    assert write(run, f"--prompt={text[:20]}", "--length=12", "--temperature=0").out == text + "\n"
