"""FLOPs: what a GPU can do at most, and which share of the positions gets a head."""

import numpy as np
import torch

import data
import diffusion

# Dense bf16 peak in FLOP/s, for MFU: the first name that occurs in the device's.
PEAK = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "GH200": 989e12, "H200": 989e12,
        "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(device):
    """The datasheet's dense bf16 FLOP/s of a GPU, None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAK.items() if known in name), None)


def noisy_share(process, first_sample=0, n_rows=0, progress=0.5, n_eligible=None):
    """The share of positions that get a head in these rows: of a masked process the masked ones, else all.

    n_rows: 0 for as many as tell it well. n_eligible as in diffusion.noise_levels.
    """
    if process.objective != "masked":
        return 1.0
    if n_eligible is not None:
        n_rows = len(n_eligible)
    n_rows = n_rows or max(64, 4096 // process.n_blocks)
    levels = diffusion.noise_levels(process, first_sample, n_rows, progress, n_eligible)
    return float(levels.count.sum(1).mean()) / process.seq_len


def expected_share(run):
    """The `noisy_share` of a run, halfway through."""
    return noisy_share(run.process, n_eligible=counts_of(run, np.arange(1024)))


def counts_of(run, sample):
    """How many positions count in each block of the samples' rows: (N, M), None for all."""
    eligible = data.eligible_positions(run.cfg, run.sequences, run.sequences.ids(sample), sample)
    return data.count_by_block(run.process, eligible)
