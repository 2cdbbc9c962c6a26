"""Where every claim about speed comes from.

    python bench.py                 # what a CPU can show, about ten minutes on two cores
    python bench.py --suite=gpu     # kernels, attention, whole training steps, their time: about 40 minutes
    python bench.py sampling        # sample.py and eval.py; settings of its own: bench.py sampling --help

Rivals take turns in rounds on the same data, so that a machine that slows down slows all of them; a ratio is
the median of the rounds' own ratios. Writes results/<suite>.md with what is needed to repeat it.
"""

import terminal  # isort: skip  # first: Ctrl-C during the imports

import datetime
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import configurator
import kernels
from benchmarks import cpu, gpu, sampling
from benchmarks.common import failure, free_memory, machine
from configurator import setting
from training import compiler

PARTS = dict(cpu=cpu.PARTS, gpu=gpu.PARTS)


@dataclass
class Config:
    suite: Literal["cpu", "gpu"] = setting("cpu", "what to measure")
    only: str = setting("", "parts to run, separated by commas (empty: all; a wrong name lists them)")
    rows: str = setting("", "rows of the steps table (and models of the profile) to run, separated by "
                        "commas: what their label contains, as in 1.7B,ar (empty: all)")
    predict: bool = setting(True, "predict each row's memory, too, up to half a minute of the host")
    rounds: int = setting(20, "rounds in which rivals take turns", low=2)
    warmup: int = setting(20, "untimed steps before a whole training step is timed on a GPU", low=3)
    steps: int = setting(50, "timed steps of a whole training step on a GPU", low=3)
    out: str = setting("results", "folder for the tables (empty: only print them)")
    smoke: bool = setting(False, "tiny sizes, on any machine: whether it works, not how fast")

    def problems(self):
        parts, problems = PARTS[self.suite], []
        for name in self.only.split(","):
            if name and name not in parts:
                problems.append(f"only={name}: no such part; there are {', '.join(parts)}")
        if self.suite == "gpu" and not torch.cuda.is_available() and not self.smoke:
            problems.append("suite=gpu needs a GPU")
        return problems


def main():
    if sys.argv[1:2] == ["sampling"]:
        return sampling.main(sys.argv[2:])
    cfg = configurator.load(Config, about=__doc__)
    if cfg.out:
        terminal.keep_going()
    compiler.remove_unfinished_builds()
    device = torch.device("cuda" if cfg.suite == "gpu" and torch.cuda.is_available() else "cpu")
    if cfg.suite == "gpu":
        torch.set_float32_matmul_precision("high")

    hardware, versions, commit = machine(cfg.suite)
    report = [
        f"# Measured by `python {' '.join(['bench.py', *sys.argv[1:]])}`\n",
        f"{datetime.date.today()}, commit {commit}; {hardware}; {versions}. "
        "Median [range]; ratios are medians of ratios within a round.\n",
    ]
    failures = []
    for name, part in PARTS[cfg.suite].items():
        if cfg.only and name not in cfg.only.split(","):
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        free_memory(device)
        try:
            with kernels.prefer_cudnn_attention(device):
                results = part.measure(cfg, device)
        except Exception as problem:  # the other parts are worth having
            traceback.print_exc()
            results = failure(problem) + "\n"
            failures.append(f"{name} {results}")
        report.append(f"## {name}\n\n{part.text}\n\n{results}")
        if cfg.out and not cfg.smoke:  # after each part: a run that is cut short leaves what it has
            write(report, cfg)
        print(report[-1], flush=True)
    if failures:
        configurator.fail(*failures)


def write(report, cfg):
    """Write <suite>.md, or <suite>_<what was chosen>.md if only some parts or rows were run."""
    chosen = re.findall(r"[\w.]+", f"{cfg.only} {cfg.rows}")
    name = "_".join([cfg.suite, *chosen])
    folder = Path(cfg.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(report), encoding="utf-8")


if __name__ == "__main__":
    terminal.run(main)
