"""Ranks leave together, and without torch's destructors: train.main ends by distributed.shut_down."""

import contextlib
import sys
from types import SimpleNamespace

import pytest

import train


@pytest.mark.parametrize("code", (0, 75))
def test_several_ranks_end_by_shut_down(code, monkeypatch, corpus, tmp_path):
    calls = []
    watch = SimpleNamespace(ranks=SimpleNamespace(world=2), close=lambda: calls.append("close"))
    monkeypatch.setattr(train.watchdog, "started", lambda *_, **__: contextlib.nullcontext(watch))
    monkeypatch.setattr(train, "train", lambda *_: code)
    monkeypatch.setattr(train, "shut_down", lambda ranks, code: calls.append((ranks.world, code)))
    flags = ["--steps=1", "--device=cpu", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) if code else contextlib.nullcontext():
        train.main()
    assert calls == ["close", (2, code)]
