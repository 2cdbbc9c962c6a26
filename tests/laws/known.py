"""Known coefficients and runs simulated by them, for the tests of laws."""

import csv
import sys
from pathlib import Path

import numpy as np

import scaling
from laws.fitting import read_fits
from laws.forms import LAWS, MUENNIGHOFF, QUOKKA, evaluate, published_coefficients
from laws.runs import Runs

PUBLISHED = published_coefficients()
# Coefficients of every law, such that all of their terms count on the grid of `simulated`.
KNOWN = dict(
    parametric=dict(E=2.0, A=600.0, a=0.38, B=3000.0, b=0.37),
    half_life=dict(MUENNIGHOFF, R_D=6.0),
    eq15=PUBLISHED["eq15"] | dict(E=0.5),
    eq21=PUBLISHED["eq21"],
    eq23=PUBLISHED["eq23"] | dict(E=0.7),
    ours=read_fits(QUOKKA / "epochs/fits.json").fits["ours"].coefficients,
)


def simulated(name, noise, seed=0, points=None):
    """Runs of a law with known coefficients; noise of σ per run and σ/3 per point of a curve.

    Of the parametric law an IsoFLOP grid, of the others curves of 6 budgets × 6 sizes with so many points.
    """
    rng = np.random.default_rng(seed)
    if name == "parametric":
        C = np.repeat(np.array([3e18, 6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21]), 10)
        N = 0.0216 * C**0.514 * np.tile(10 ** np.linspace(-0.7, 0.7, 10), 9)
        U, e, curve = C / 6 / N, np.ones(90), np.arange(90)
    else:
        sizes, budgets = np.logspace(7.15, 9.4, 6), np.logspace(7, 8.15, 6)
        points = points or (20 if name == "half_life" else 30)
        e = np.logspace(0, 2, points) if name == "half_life" else np.logspace(0.3, 3, points)
        N, U, e = (x.ravel() for x in np.meshgrid(sizes, budgets, e, indexing="ij"))
        curve = np.arange(len(N)) // points
    error = rng.normal(0, noise, curve.max() + 1)[curve]
    if name != "parametric":
        error += rng.normal(0, noise / 3, len(N))
    return Runs(N, U, e, evaluate(LAWS[name], KNOWN[name], N, U, e) * np.exp(error), curve)


def read(name):
    """The rows of a CSV of the paper's numbers."""
    return read_rows(QUOKKA / name)


def read_rows(path):
    """The rows of a CSV."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    """Write dictionaries as a CSV."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(capsys, command, *argv):
    """`scaling.py COMMAND ARGV` in this process: its exit code, standard output and error."""
    code = 0
    try:
        scaling.run(command, list(map(str, argv)))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def script():
    """The name that messages begin with."""
    return Path(sys.argv[0]).name
