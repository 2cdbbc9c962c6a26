"""Single training steps of train.py on batches of a test's own."""

import contextlib
from types import SimpleNamespace

import torch

import train
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
