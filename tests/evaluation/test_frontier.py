"""eval.py frontier: what it measures, against closed forms, and what it writes."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from evaluation import frontier, likelihood, texts
from evaluation.frontier import Config, decode_configs


@pytest.fixture
def run_frontier(monkeypatch, capsys):
    """Call eval.main() with the word frontier; returns its stdout."""

    def call(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["eval.py", "frontier", "--device=cpu", *map(str, flags)])
        evaluation.main()
        return capsys.readouterr().out

    return call


class Bigram:
    """A network whose hidden states are the log-probabilities of the next token, after one of 5."""

    def __init__(self):
        self.table = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    def __call__(self, ids):
        return self.table[ids]

    def logits(self, hidden):
        return hidden


ROWS = [[0, 3, 1, 1], [2, 2, 0, 3], [1, 0, 0, 0]]
JUDGE = SimpleNamespace(device="cpu", tokenizer=SimpleNamespace(eos_id=4), model=Bigram())


def test_the_judge_is_the_chain_rule():
    """The sum of its log-probabilities, from the separator on; the prompt isn't judged."""
    table = JUDGE.model.table
    for skip in (0, 2):
        expected = [-np.mean([float(table[a, b]) for a, b in zip([4, *row], row)][skip:]) for row in ROWS]
        assert texts.judge_nll(JUDGE, ROWS, skip, micro_batch=2) == pytest.approx(expected, rel=1e-6)


def test_figures_of_a_decoding():
    nll = texts.judge_nll(JUDGE, ROWS, 0)
    line = frontier.measure_decoding(JUDGE, frontier.Decoding(ROWS, seconds=2.0, passes=2, cache_gap=None), 0)
    assert line["nll"] == pytest.approx(nll.mean())
    assert line["perplexity"] == pytest.approx(math.exp(nll.mean()))
    student = likelihood.student_factor(2)  # three texts
    assert line["nll_error"] == pytest.approx(student * np.std(nll, ddof=1) / math.sqrt(3))
    assert line["tokens_per_s"] == 6 and line["tokens_per_pass"] == 2


def test_every_way_of_decoding_that_is_asked_for():
    cfg = Config(judge="x", orders="ancestral,threshold,ancestral:capped", steps="2,4", thresholds="0.5,0.7",
                 temperatures="1,0.5", caches="no,dual", block=4)
    configs = decode_configs(cfg, "masked", 16)
    assert len(configs) == (2 + 2 + 2) * 2 * 2
    config = configs["threshold, above 0.7, dual cache, T=0.5"]
    assert (config.order, config.threshold) == ("threshold", 0.7)
    assert (config.cache, config.temperature) == ("dual", 0.5)
    config = configs["ancestral:capped, 4 steps, T=1"]
    assert (config.order, config.remask, config.steps, config.block) == ("ancestral", "capped", 4, 4)
    assert (config.temperature, config.cache) == (1.0, "no")


def test_ways_of_decoding_without_settings():
    masked = decode_configs(Config(judge="x"), "masked", 64)
    assert {"ancestral, 4 steps", "first_hitting", "margin, 64 steps", "threshold, above 0.9",
            "ancestral:rescaled, 128 steps"} <= set(masked)
    uniform = decode_configs(Config(judge="x"), "uniform", 16)
    assert list(uniform) == [f"ancestral, {n} steps" for n in (1, 2, 4, 8, 16)]
    ar = decode_configs(Config(judge="x", temperatures="0.5,1"), "ar", 16)
    assert list(ar) == ["left to right, T=0.5", "left to right, T=1"]


N_WAYS = dict(masked=24, uniform=10, ar=2)


@pytest.mark.parametrize("objective", N_WAYS)
def test_a_frontier_end_to_end(run_main, run_frontier, tmp_path, objective):
    writer = run_main("--steps=3", f"--objective={objective}")
    judge = run_main("--steps=3", "--objective=ar", run="judge")
    flags = ["--samples=5", "--length=16", "--prompt=4", "--temperatures=0.7,1", f"--out={tmp_path}"]
    if objective == "masked":
        flags += ["--orders=ancestral,threshold", "--caches=no,dual", "--block=8", "--steps=4,8"]
    text = run_frontier(f"--run_dir={writer}", f"--judge={judge}", *flags)
    report = json.loads((tmp_path / "frontier.json").read_text(encoding="utf-8"))
    ways, references = report["ways"], report["beside"]
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG" and len(ways) == N_WAYS[objective]
    for line in ways + references:
        assert line["name"] in text and line["samples"] == 5 and line["length"] == 16
        assert 0 < line["entropy"] <= math.log(16) + 1e-9 and line["nll"] > 0 and line["nll_error"] > 0
    assert all(line["tokens_per_pass"] >= 1 and line["tokens_per_s"] > 0 for line in ways)
    assert [line["name"] for line in references] == ["held-out text", "the judge's own samples"]
    for line in ways:
        if "threshold" in line["name"]:
            assert ("cache_kl" in line) == ("dual" in line["name"])
    header = next(line for line in text.splitlines() if "NLL, nats/token" in line)
    assert "entropy" in header  # perplexity is never without


def test_the_held_out_text_of_a_mixture(run_main, run_frontier, corpus, tmp_path):
    """A run trained on a mixture has the validation splits of all its sources."""
    (tmp_path / "copy").symlink_to(corpus)
    writer = run_main("--steps=3", f"--corpus={corpus}:0.7,{tmp_path / 'copy'}:0.3")
    judge = run_main("--steps=3", "--objective=ar", run="judge")
    flags = [f"--run_dir={writer}", f"--judge={judge}", "--orders=random", "--steps=4", "--samples=5"]
    text = run_frontier(*flags, "--length=16")
    assert "held-out text" in text


@pytest.mark.parametrize("flags, message", (
    ([], "judge: name an autoregressive run"),
    (["--judge=x", "--orders=ancestrel"], "orders: there is no 'ancestrel'"),
    (["--judge=x", "--steps=0"], "steps=0: expected whole numbers"),
    (["--judge=x", "--thresholds=2"], "thresholds=2: expected numbers in (0, 1]"),
    (["--judge=x", "--temperatures=a"], "temperatures=a: expected numbers"),
    (["--judge=x", "--temperatures="], "temperatures=: expected numbers"),
    (["--judge=x", "--caches=dual"], "caches=dual needs block"),
    (["--judge=x", "--caches=big", "--block=3"], "caches: there is no 'big'"),
    (["--judge=nowhere"], "no usable checkpoint"),
    (["--judge=WRITER"], "is a masked model; its NLL would not be exact"),
    (["--judge=JUDGE", "--length=40"],
     "prompt and length are 40 tokens together, and the smaller context is 32"),
    (["--judge=JUDGE", "--corpus=nowhere"], "or say --corpus=none"),
    (["--judge=JUDGE", "--corpus=none", "--prompt=3"], "prompts are held-out text"),
    (["--judge=JUDGE", "--run_dir=JUDGE", "--steps=3"], "has no orders, steps or blocks"),
))
def test_bad_input(run_main, run_frontier, capsys, flags, message):
    writer, judge = run_main("--steps=3"), run_main("--steps=3", "--objective=ar", run="judge")
    flags = [flag.replace("WRITER", str(writer)).replace("JUDGE", str(judge)) for flag in flags]
    if "--run_dir" not in str(flags):
        flags.append(f"--run_dir={writer}")
    with pytest.raises(SystemExit) as exit_:
        run_frontier(*flags)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not (writer / "frontier.json").exists()


def test_the_picture_shows_every_way(tmp_path):
    line = dict(nll=1.0, nll_error=0.1, entropy=2.0)
    lines = [line | dict(order=f"o{i}", tokens_per_s=10.0 * (i + 1), nll=1.0 + i) for i in range(11)]
    frontier.draw(lines, [line | dict(name="held-out text")], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 10_000
