"""sample.py --frontier: what it measures, against closed forms, and what it writes."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import run_main  # noqa: F401  (fixtures)

import sample
from evaluation import frontier
from evaluation.frontier import Config


@pytest.fixture
def compare(monkeypatch, capsys):
    """Call sample.main() with --frontier; returns (stdout, stderr)."""

    def call(*flags):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample.py", "--frontier", "--device=cpu", *map(str, flags)])
        sample.main()
        return capsys.readouterr()

    return call


def test_the_judge_is_the_chain_rule():
    """NLL under a bigram model written as a network: the sum of its log-probabilities, from the separator on; the prompt isn't judged."""
    table = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)  # after the separator, 4, or a token

    class Bigram:
        def __call__(self, ids):
            return table[ids]

        def logits(self, hidden):
            return hidden

    judge = SimpleNamespace(device="cpu", tokens=SimpleNamespace(eos_id=4), model=Bigram())
    rows = [[0, 3, 1, 1], [2, 2, 0, 3], [1, 0, 0, 0]]
    for skip in (0, 2):
        expected = [-np.mean([float(table[a, b]) for a, b in zip([4, *row], row)][skip:]) for row in rows]
        assert frontier.judged(judge, rows, skip, micro_batch=2) == pytest.approx(expected, rel=1e-6)
    said = frontier.measured(judge, rows, 0, seconds=2.0, passes=2)
    nll = frontier.judged(judge, rows, 0)
    assert said["nll"] == pytest.approx(nll.mean()) and said["nll_error"] == pytest.approx(np.std(nll, ddof=1) / math.sqrt(3))
    assert said["tokens_per_s"] == 6 and said["tokens_per_pass"] == 2 and said["perplexity"] == pytest.approx(math.exp(nll.mean()))


def test_entropy_of_a_sample():
    assert frontier.entropy([3, 3, 3]) == 0 and frontier.entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    assert frontier.entropy([1, 1, 2, 3]) == pytest.approx(1.5 * math.log(2))


def test_every_way_that_is_asked_for():
    ways = frontier.ways(Config(judge="x", orders="ancestral,threshold,ancestral:capped", steps="2,4", thresholds="0.5,0.7", temperatures="1,0.5", caches="no,dual", block=4), "masked", 16)
    assert len(ways) == (2 + 2 + 2) * 2 * 2
    assert ways["threshold, above 0.7, dual cache, T=0.5"]._asdict() | dict(seed=0) == ways["threshold, above 0.7, dual cache, T=0.5"]._asdict()
    how = ways["ancestral:capped, 4 steps, T=1"]
    assert (how.order, how.remask, how.steps, how.temperature, how.cache, how.block) == ("ancestral", "capped", 4, 1.0, "no", 4)
    every = frontier.ways(Config(judge="x"), "masked", 64)
    assert {"ancestral, 4 steps", "first_hitting", "margin, 64 steps", "threshold, above 0.9", "ancestral:rescaled, 128 steps"} <= set(every)
    assert list(frontier.ways(Config(judge="x"), "uniform", 16)) == [f"ancestral, {n} steps" for n in (1, 2, 4, 8, 16)]
    assert list(frontier.ways(Config(judge="x", temperatures="0.5,1"), "ar", 16)) == ["left to right, T=0.5", "left to right, T=1"]


@pytest.mark.parametrize("objective", ("masked", "uniform", "ar"))
def test_a_frontier_end_to_end(run_main, compare, tmp_path, objective):  # noqa: F811
    writer, judge = run_main("--steps=3", f"--objective={objective}"), run_main("--steps=3", "--objective=ar", run="judge")
    flags = ["--orders=ancestral,threshold", "--caches=no,dual", "--block=8", "--steps=4,8"] if objective == "masked" else []
    out = compare(f"--run_dir={writer}", f"--judge={judge}", "--samples=5", "--length=16", "--prompt=4", "--temperatures=0.7,1", f"--out={tmp_path}", *flags).out
    report = json.loads((tmp_path / "frontier.json").read_text())
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG" and len(report["ways"]) == dict(masked=24, uniform=10, ar=2)[objective]
    for line in report["ways"] + report["beside"]:
        assert line["name"] in out and 0 < line["entropy"] <= math.log(16) + 1e-9 and line["nll"] > 0 and line["nll_error"] > 0 and line["samples"] == 5 and line["length"] == 16
    assert all(line["tokens_per_pass"] >= 1 and line["tokens_per_s"] > 0 for line in report["ways"])
    assert [line["name"] for line in report["beside"]] == ["held-out text", "the judge's own samples"]
    assert all(("cache_kl" in line) == ("dual" in line["name"]) for line in report["ways"] if "threshold" in line["name"])
    header = next(line for line in out.splitlines() if "NLL, nats/token" in line)
    assert "entropy" in header  # perplexity is never without


@pytest.mark.parametrize("flags, message", (
    ([], "judge: name an autoregressive run"),
    (["--judge=x", "--orders=ancestrel"], "orders: there is no 'ancestrel'"),
    (["--judge=x", "--steps=0"], "steps=0: expected whole numbers"),
    (["--judge=x", "--thresholds=2"], "thresholds=2: expected numbers in (0, 1]"),
    (["--judge=x", "--temperatures=a"], "temperatures=a: expected numbers"),
    (["--judge=x", "--caches=dual"], "caches need block"),
    (["--judge=x", "--caches=big", "--block=3"], "caches: there is no 'big'"),
    (["--judge=nowhere"], "no usable checkpoint"),
    (["--judge=WRITER"], "is a masked model; its NLL would not be exact"),
    (["--judge=JUDGE", "--length=40"], "prompt and length are 40 tokens together, and the smaller context is 32"),
    (["--judge=JUDGE", "--corpus=nowhere"], "or say --corpus=none"),
    (["--judge=JUDGE", "--corpus=none", "--prompt=3"], "prompts are held-out text"),
    (["--judge=JUDGE", "--run_dir=JUDGE", "--steps=3"], "has no orders, steps or blocks"),
))
def test_bad_input(run_main, compare, capsys, flags, message):  # noqa: F811
    writer, judge = run_main("--steps=3"), run_main("--steps=3", "--objective=ar", run="judge")
    flags = [flag.replace("WRITER", str(writer)).replace("JUDGE", str(judge)) for flag in flags]
    with pytest.raises(SystemExit) as exit_:
        compare(*([f"--run_dir={writer}"] if "--run_dir" not in str(flags) else []), *flags)
    assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not (writer / "frontier.json").exists()


def test_the_picture_shows_every_way(tmp_path):
    line = dict(nll=1.0, nll_error=0.1, entropy=2.0)
    found = [line | dict(order=f"o{i}", tokens_per_s=10.0 * (i + 1), nll=1.0 + i) for i in range(11)]
    frontier.draw(found, [line | dict(name="held-out text")], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 10_000
