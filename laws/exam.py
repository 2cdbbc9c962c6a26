"""How far laws carry: fitted to a part of the runs, judged on the rest. `python scaling.py fit --exam`

    python scaling.py fit --exam                             the paper's runs and curves, and our own sweeps
    python scaling.py fit --exam --data=my.csv --bootstrap=40

Four questions, each an extrapolation: from small models to large ones, from little text to more, from the
first epochs to later ones, from cheap runs to all. A judged run's error is |log L̂ − log L|; its 95 %
interval is the one that `plan` prints, and the same widened by the scatter of the runs that were fitted.
"""

import math
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np

import configurator
import terminal
from configurator import split
from configurator.format import human_count
from corpus.files import all_or_none
from laws.collect import find_csv
from laws.fitting import bootstrap, fit_law, mean_errors, predict
from laws.forms import LAWS, QUOKKA
from laws.identifiability import interval_of_loss, scatter_of, undetermined_coefficients
from laws.runs import Runs, data_range, objectives_in, read_csv, thin_curves, write_csv

RESULTS = QUOKKA.parent
COMMITTED = (QUOKKA / "isoflop_points.csv", QUOKKA / "epoch_curves.csv", RESULTS / "sweep_cpu/points.csv",
             RESULTS / "sweep_epochs_cpu/curves.csv")
SIZE, UNIQUE, EPOCHS = 200e6, 50e6, 30.0  # where the first part ends, if runs lie on both sides
SHARES = (0.25, 0.5)  # of the runs, the cheapest
JUDGED_POINTS = 4  # of a curve, for the intervals: at most twice so many
COLUMNS = ("data objective split fitted judged law coefficients error_points error_curves bias covered "
           "covered_with_scatter determined").split()

LEGEND = (
    "Error: mean |log L̂ − log L| over the judged points / over curves, of each curve's mean; bias: mean",
    "log L̂ − log L. In: the share of judged points in the 95 % intervals that `plan` prints / in these",
    "widened by the scatter of the fitted ones. *: `plan` would refuse this fit, as its data leave",
    "coefficients open. —: fewer runs than coefficients.")


class Split(NamedTuple):
    """A part of the runs to fit, and the rest to judge."""

    name: str
    fitted: Runs
    judged: Runs


# -------------------------------------------------------------------------------------------------- the parts


def splits_of(runs):
    """The Splits of runs: those of them that leave something on either side."""
    repeats = runs.e.max() > 1.01
    parts = []
    size = edge(runs.N, SIZE)
    parts.append((f"below {human_count(size)} parameters → above", runs.N < size))
    if repeats:
        unique = edge(runs.U, UNIQUE)
        parts.append((f"below {human_count(unique)} unique tokens → above", runs.U < unique))
        parts.append((f"the first {EPOCHS:g} epochs → the rest", runs.e <= EPOCHS))
    for share in SHARES:
        parts.append((f"the cheapest {share:.0%} → the rest", cheapest(runs, share)))
    return [Split(name, runs.select(first), runs.select(~first)) for name, first in parts
            if first.any() and not first.all()]


def edge(values, usual):
    """Where the first part ends: at `usual`, or at the middle value where that leaves less than two."""
    distinct = np.unique(values)
    below = (distinct < usual).sum()
    return usual if 2 <= below <= len(distinct) - 2 else float(distinct[len(distinct) // 2])


def cheapest(runs, share):
    """Which points are of the cheapest share of the curves; those of one budget stay together. (n,) bool."""
    curves = np.unique(runs.curve)
    flops = np.array([runs.flops[runs.curve == k].max() for k in curves])
    limit = np.sort(flops)[max(0, math.ceil(share * len(curves)) - 1)] * 1.05
    return np.isin(runs.curve, curves[flops <= limit])


# --------------------------------------------------------------------------------------------------- the exam


def examine(law, part, n_draws, seed=0, points=40, jobs=None):
    """A law's row of the table for a Split: some of COLUMNS; None if the part has too few runs for it."""
    fitted, judged = part.fitted, part.judged
    if len(np.unique(fitted.curve)) < len(fitted.N):
        fitted = thin_curves(fitted, points)
    if len(fitted.N) < len(law.starts(1, 1, 1)):
        return None
    fit = fit_law(law, fitted, jobs=jobs)
    fit = bootstrap(fit, fitted, n_draws, seed, jobs)._replace(data_range=data_range(fitted))
    scatter = scatter_of(fit, fitted)
    on_points, on_curves = mean_errors(fit, judged)
    bias = np.log(predict(fit, judged.N, judged.U, judged.e) / judged.loss).mean()
    with np.errstate(over="ignore"):  # where coefficients are left open
        covered, widened = coverage(fit, judged, scatter)
    return dict(law=law.name, coefficients=len(fit.law.starts(1, 1, 1)), error_points=on_points,
                error_curves=on_curves, bias=bias, covered=covered, covered_with_scatter=widened,
                determined=not undetermined_coefficients(fit))


def coverage(fit, judged, scatter):
    """The shares of judged runs in their 95 % intervals, and in these widened by a scatter of log L."""
    if len(np.unique(judged.curve)) < len(judged.N):
        judged = thin_curves(judged, JUDGED_POINTS)
    inside, widened = [], []
    for N, U, e, loss in zip(judged.N, judged.U, judged.e, judged.loss):
        for share, spread in ((inside, 0.0), (widened, scatter)):
            low, high = interval_of_loss(fit, N, U, e, spread)
            share.append(low <= loss <= high)
    return np.mean(inside), np.mean(widened)


def laws_for(runs, names):
    """The laws to examine: the named ones, or all that runs of this kind can have."""
    if names:
        return [LAWS[name] for name in names]
    once = [LAWS["parametric"]]
    return once if runs.e.max() <= 1.01 else [law for law in LAWS.values() if law.name != "parametric"]


def data_name(path):
    """The name of a data set: its folder's and file's."""
    return f"{path.parent.name}/{path.stem}"


def examine_all(cfg, paths, on_progress=lambda text: None):
    """The rows of the table, of every data set, objective, split and law. Raises ValueError."""
    rows = []
    for source in paths:
        path = find_csv(source, Path(cfg.out))
        for objective in [cfg.objective] if cfg.objective else objectives_in(path):
            runs = read_csv(path, objective)
            for part in splits_of(runs):
                n_fitted, n_judged = (len(np.unique(half.curve)) for half in (part.fitted, part.judged))
                about = dict(data=data_name(path), objective=objective, split=part.name, fitted=n_fitted,
                             judged=n_judged)
                for law in laws_for(runs, split(cfg.laws)):
                    on_progress(f"{data_name(path)} {objective}, {part.name}: {law.name}")
                    found = examine(law, part, cfg.bootstrap, cfg.seed, cfg.points, cfg.jobs or None)
                    rows.append(about | (found or dict(law=law.name)))
    if not rows:
        raise ValueError(f"{', '.join(map(str, paths))}: too few runs to fit a part and judge the rest")
    return rows


# ------------------------------------------------------------------------------------------------- the report


def report(rows, command):
    """The tables in Markdown, one for each data set and objective."""
    head = "# How far laws carry: fitted to a part, judged on the rest"
    lines = [head, "", f"`{command}`", "", *LEGEND, ""]
    for data, objective in dict.fromkeys((row["data"], row["objective"]) for row in rows):
        own = [row for row in rows if (row["data"], row["objective"]) == (data, objective)]
        lines += [f"## {data} {objective}".rstrip(), "",
                  "| from → to | fitted → judged | law | coefficients | error | bias | in |",
                  "|---" * 7 + "|"]
        lines += [table_line(row, own) for row in own]
        lines.append("")
    return "\n".join(lines)


def table_line(row, rows):
    """A row of the table; the law with the smallest error on curves of its split in bold."""
    alike = [other["error_curves"] for other in rows
             if other["split"] == row["split"] and "error_curves" in other]
    head = f"| {row['split']} | {row['fitted']} → {row['judged']} |"
    if "error_curves" not in row:
        return f"{head} {row['law']} | | — | | |"
    name = row["law"] if row["determined"] else f"{row['law']}*"
    error = f"{row['error_points']:.4f} / {row['error_curves']:.4f}"
    if row["error_curves"] == min(alike) and len(alike) > 1:
        error = f"**{error}**"
    inside = f"{row['covered']:.0%} / {row['covered_with_scatter']:.0%}"
    return f"{head} {name} | {row['coefficients']} | {error} | {row['bias']:+.4f} | {inside} |"


def draw_exam(rows, path):
    """Draw the errors on curves: a panel for each data set, a group of bars for each split."""
    from laws.drawing import law_style, panels, save

    keys = list(dict.fromkeys((row["data"], row["objective"]) for row in rows))
    figure, axes = panels(len(keys), width=5.0, height=3.4)
    for ax, key in zip(axes.flat, keys):
        own = [row for row in rows if (row["data"], row["objective"]) == key and "error_curves" in row]
        names = list(dict.fromkeys(row["law"] for row in own))
        parts = list(dict.fromkeys(row["split"] for row in own))
        width = 0.8 / max(1, len(names))
        for i, name in enumerate(names):
            style = law_style(name)
            bars = {row["split"]: row["error_curves"] for row in own if row["law"] == name}
            places = [parts.index(part) + (i - (len(names) - 1) / 2) * width for part in bars]
            ax.bar(places, list(bars.values()), 0.9 * width, color=style["color"], label=style["label"])
        ax.set_xticks(range(len(parts)), [textwrap.fill(part, 14) for part in parts], fontsize=6.5)
        ax.set_title(" ".join(key), fontsize=9)
        ax.set_ylabel("mean |log L̂ − log L|")
        ax.tick_params(axis="y", labelsize=8)
        ax.grid(axis="y", alpha=0.25, lw=0.5)
        ax.legend(fontsize=6.5, framealpha=0.8)
    save(figure, path)


def run(cfg, on_progress):
    """Examine cfg.data, or if none is given all that is committed; write the report and return it."""
    changed = configurator.changed(cfg)
    rows = examine_all(cfg, [Path(cfg.data)] if "data" in changed else COMMITTED, on_progress)
    flags = [f"--{name}={value}" for name, value in changed.items() if name not in ("exam", "out", "jobs")]
    text = report(rows, shlex.join(["python", "scaling.py", "fit", "--exam", *flags]))
    with all_or_none(Path(cfg.out)) as building:
        (building / "exam.md").write_text(text, encoding="utf-8")
        write_csv(rows, building / "exam.csv", COLUMNS)
        if cfg.figures:
            with terminal.optional(f"{cfg.out}/exam.png can't be drawn"):
                draw_exam(rows, building / "exam.png")
    return text
