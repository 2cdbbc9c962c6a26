"""Parts of train.py for tests of them: a Run, and single training steps on batches of a test's own."""

import contextlib
from types import SimpleNamespace

import torch

import configurator
import train
from training import checks
from training.distributed import SINGLE
from training.objective import RankClock


def bare_run(accumulation=1, clip=1.0, autocast=contextlib.nullcontext, ranks=SINGLE, cuda_graphs=False):
    """As much of a Run as train.training_step reads."""
    cfg = SimpleNamespace(clip=clip, skip_norm=0.0, cuda_graphs=cuda_graphs)
    return SimpleNamespace(cfg=cfg, ranks=ranks, accumulation=accumulation, autocast=autocast)


def step(objective, optimizer, batches, run=None, device="cpu"):
    """One optimizer step on the next batches → its figures, {name: ()}."""
    clock = RankClock(torch.device(device))
    return train.training_step(run or bare_run(), objective, optimizer, batches, clock)


def build_run(*flags, ranks=SINGLE):
    """The Run that train.py makes of these flags, seen by one rank; it writes nothing."""
    cfg = configurator.load(train.Config, list(map(str, flags)))
    return checks.build_run(cfg, ranks, torch.device("cpu"))
