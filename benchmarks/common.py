"""Tools of every benchmark: rivals that take turns, medians with their range, tables, the machine in words.

Rivals take turns in rounds on the same data, so that a machine that slows down slows all of them; a ratio is
the median of the rounds' own ratios.
"""

import contextlib
import gc
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import kernels
from training import transfer

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------------------- measuring


def time_calls(function, device, repeats=1):
    """Milliseconds of a call, as the mean over `repeats` calls in a row, and what the last one returned."""
    start = transfer.timestamp(device)
    for _ in range(repeats):
        output = function()
    end = transfer.timestamp(device)
    synchronize(device)
    return transfer.seconds_between(start, end) * 1e3 / repeats, output


def take_turns(rivals, device, rounds, repeats=1, warmup=3, outputs=None):
    """Time functions that take turns, {name: function}, after `warmup` calls of each.

    Returns {name: (rounds,) milliseconds}. outputs: a dict that receives what each function returned last.
    """
    for function in rivals.values():
        for _ in range(warmup):
            function()
    synchronize(device)

    names, times = list(rivals), {name: [] for name in rivals}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            t, output = time_calls(rivals[name], device, repeats)
            times[name].append(t)
            if outputs is not None:
                outputs[name] = output
    return {name: np.array(values) for name, values in times.items()}


def synchronize(device):
    """Wait until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def free_memory(device):
    """Give back what compiled functions that are no longer referenced still hold."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------- reports


class Part(NamedTuple):
    """A part of a suite."""

    measure: Callable  # of bench.py's settings and the device: returns results in Markdown
    text: str  # what is measured, for the report


def spread(values, digits=2):
    """Format the median and range of `values`."""
    return f"{np.median(values):.{digits}f} [{np.min(values):.{digits}f}, {np.max(values):.{digits}f}]"


def speedup(slow, fast):
    """Format how many times faster `fast` is than `slow`, both (rounds,) times."""
    return f"{spread(slow / fast)} ×"


def table(header, rows):
    """Format a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


def failure(problem):
    """Format an exception as a cell of a table."""
    first_line = str(problem).partition("\n")[0]
    return f"failed: {type(problem).__name__}: {first_line[:100]}".replace("|", "/")


def machine(suite):
    """Describe the hardware, the versions and the commit: three texts."""
    features = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "bf16": kernels.has_bf16(CPU),
    }
    present = ", ".join(name for name, is_present in features.items() if is_present)
    hardware = f"{processor()}, {torch.get_num_threads()} threads, {present}"
    if suite == "gpu" and torch.cuda.is_available():
        libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        hardware = f"{torch.cuda.get_device_name()}, {libraries}; host: {hardware}"

    triton = getattr(kernels.triton, "__version__", "none")
    python = f"Python {platform.python_version()}"
    versions = f"{python}, torch {torch.__version__}, triton {triton}, numpy {np.__version__}"
    return hardware, versions, commit()


def processor():
    """The CPU's name, as Linux knows it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def commit():
    """The commit that is checked out, and whether Python files differ from it."""
    with contextlib.suppress(OSError):
        short_hash = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return (short_hash or "no git") + (" with changes" if changes else "")
    return "no git"


def git(*arguments):
    return subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", cwd=ROOT).stdout.strip()
