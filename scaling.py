"""Scaling laws: from a budget to a plan, from runs to a law.

    python scaling.py plan --flops=1e21                  what to train with so much compute
    python scaling.py plan --unique_tokens=1B            … with so much text: how large, for how many epochs
    python scaling.py plan --gpus=8 --days=3             … on these GPUs
    python scaling.py fit --data=runs/sweep              laws of your own runs, with intervals
    python scaling.py sweep --base=my.py --flops=1e18,3e18 …   train a grid of runs, then fit and draw it
    python scaling.py plot --out=figures                 the paper's figures, from its numbers or yours
    python scaling.py study kernel --scale=tiny          an ablation of the paper, beside its values
    python scaling.py study optimizer                    AdamW and Muon, each tuned, over seeds
    python scaling.py tables                             the paper's Tables 2 to 5, from its laws

Each command has its own --help. Masked diffusion's losses are bounds in nats per GPT-2 token.
"""

import terminal  # isort: skip  # first: Ctrl-C during the imports

import os

# Before numpy is imported: L-BFGS works on tiny vectors, where OpenBLAS's threads only wait for each other
# (8 times slower).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import importlib  # noqa: E402
import importlib.util  # noqa: E402
import sys  # noqa: E402

import configurator  # noqa: E402

COMMANDS = dict(plan="laws.plan", fit="laws.fit", sweep="laws.sweep", plot="laws.figures", study="laws.study",
                tables="laws.tables")


def run(command, argv):
    """Run one command; what a sweep has trained is fitted and drawn, too."""
    points = importlib.import_module(COMMANDS[command]).main(argv)
    if command == "sweep" and points:
        run("fit", [f"--data={points.parent}", f"--out={points.parent / 'fit'}"])


def main():
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return
    if command not in COMMANDS:
        configurator.fail(f"'{command}' is no command; choose from {', '.join(COMMANDS)}")
    if command != "study" and importlib.util.find_spec("scipy") is None:  # a sweep ends with a fit
        configurator.fail("scaling laws need scipy: pip install -e '.[scaling]'")
    run(command, argv)


if __name__ == "__main__":
    terminal.run(main)
