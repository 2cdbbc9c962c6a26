"""Laws of finished runs, with intervals, judged on curves they were not fitted to.

    python scaling.py fit --data=my.csv --out=fits/mine
    python scaling.py plan --flops=1e21 --fits=fits/mine
    python scaling.py fit --exam --out=runs/exam            which law carries how far: laws/exam.py

A CSV has a header and a row per run, with at least

    params,tokens,loss            every token seen once; numbers may be written 250M or 1.5T
    params,unique_tokens,epochs,loss                    points on curves over repeated text

The loss, in nats per token (of one tokenizer), may be called val_loss; a column objective (masked, ar, …)
fits each by itself. A row whose loss is nan or inf (a run that diverged) is left out. Rows with the same
params, unique_tokens, seed and curve (the last two where there are such columns) are one curve: they are
resampled and left out together.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import configurator
import terminal
from configurator import setting, split
from corpus.files import all_or_none
from laws import exam
from laws.collect import find_csv
from laws.fitting import Regression, bootstrap, fit_entry, fit_law, leave_out, mean_errors
from laws.forms import LAWS, QUOKKA, allocation
from laws.identifiability import (
    interval,
    is_determined,
    undetermined_coefficients,
    vanished_coefficients,
    why_undetermined,
)
from laws.isoflop import bootstrap_valleys, fit_valleys, untrained_minima
from laws.runs import NAME_RULE, data_range, is_name, objectives_in, read_csv, thin_curves

LAW_NAMES = ("approach1", *LAWS)


@dataclass
class Config:
    """Which runs, and how they are fitted."""

    data: str = setting(
        str(QUOKKA / "isoflop_points.csv"),
        "a CSV of runs or curves, a sweep's folder, or a folder of TensorBoard logs of the reference backend")
    out: str = setting("runs/fit", "folder for fits.json, fits.md and the figures")
    objective: str = setting(
        "", "only runs of this objective (empty: each by itself); "
        "of a CSV without such a column: what its runs are")
    laws: str = setting("", f"with commas, of {', '.join(LAW_NAMES)} (empty: those that suit the data)")
    bootstrap: int = setting(100, "resamples for the intervals, 20 or more; 0: none", low=0)
    leave_out: bool = setting(True, "judge each law on every curve after fitting it to all others")
    held_out: str = setting("", "a further CSV that the laws are judged on and not fitted to")
    points: int = setting(40, "of a curve, use at most twice so many", low=2)
    seed: int = setting(0, "of the resamples", low=0)
    jobs: int = setting(0, "processes (0: one per core)", low=0)
    figures: bool = setting(True, "draw valleys, curves and residuals")
    exam: bool = setting(False, "fit the laws to a part and judge them on the rest: how far do they carry? "
                         "(without data: all that are in results/)")

    def problems(self):
        problems = []
        for name in split(self.laws):
            if name not in LAW_NAMES:
                problems.append(f"laws: '{name}' is not one of {', '.join(LAW_NAMES)}")
        if not is_name(self.objective):
            problems.append(f"objective={self.objective!r}: {NAME_RULE}")
        if 0 < self.bootstrap < 20:
            problems.append(f"bootstrap={self.bootstrap}: an interval needs 20 resamples or more (0: none)")
        if self.exam:
            problems += self.problems_of_exam()
        return problems

    def problems_of_exam(self):
        """What does not go with exam, a line each."""
        changed = configurator.changed(self)
        if not self.bootstrap:
            yield "exam needs bootstrap: it judges intervals, too"
        if "approach1" in split(self.laws):
            yield "exam is of laws of the loss, and approach1 is none"
        for name in ("held_out", "leave_out"):
            if name in changed:
                yield f"{name} is not for exam, which leaves out a part itself"
        if self.objective and "data" not in changed:
            yield "objective: of exam without data every objective is examined"

    @property
    def name(self):
        """The data's name, under which their laws are listed."""
        path = Path(self.data).resolve()
        if path.parent == QUOKKA:
            return "Quokka"
        return path.parent.name if path.stem in ("points", "curves") else path.stem


# --------------------------------------------------------------------------------------- one objective's laws


def fit_objective(cfg, runs, objective, held_out):
    """Fit every law to these runs: (entries of fits.json, {law: Fit}, lines of the report)."""
    names = split(cfg.laws) or suitable_laws(runs, objective)
    thinned, lines = thin_if_curves(cfg, runs)
    entries = dict(about=dict(objective=objective or cfg.objective, data=cfg.name))

    # approach 1
    if "approach1" in names:
        try:
            entries["approach1"], approach1_lines = fit_approach1(cfg, runs)
            lines += approach1_lines
        except ValueError as problem:
            if len(names) == 1:
                raise
            lines.append(f"No approach 1: {problem}.\n")

    # the laws of the loss
    fits, table = {}, []
    for name in names:
        if name == "approach1":
            continue
        title = f"{objective} {name}".strip()
        show_progress(f"{title}: fit, {cfg.bootstrap} resamples" + ", every curve left out" * cfg.leave_out)
        try:
            fit = fit_law(LAWS[name], thinned, jobs=cfg.jobs or None)
        except ValueError as problem:  # fewer runs than coefficients
            if not cfg.laws and (fits or "approach1" in entries):
                lines.append(f"No {name}: {problem}.\n")
                continue
            raise
        if cfg.bootstrap:
            fit = bootstrap(fit, thinned, cfg.bootstrap, cfg.seed, cfg.jobs or None)
        fits[name] = fit._replace(data_range=data_range(runs))
        entries[name] = fit_entry(fits[name])
        table.append(judge(cfg, fits[name], entries[name], runs, thinned, held_out))

    # the report
    if table:
        lines += [*judgement_head(held_out), *table, ""]
    for name, fit in fits.items():
        lines += coefficient_table(name, fit)
    lines += compare_approaches(entries, fits)
    return entries, fits, lines


def suitable_laws(runs, objective):
    """The names of the laws for these runs: the data-constrained ones where tokens repeat."""
    if runs.e.max() <= 1.01:
        return ["approach1", "parametric"]
    return ["half_life"] if objective == "ar" else ["eq15", "eq21", "eq23", "ours"]


def thin_if_curves(cfg, runs):
    """The runs to fit, curves thinned out, and the report's first line."""
    points, curves = len(runs.N), len(np.unique(runs.curve))
    resamples = f"; {cfg.bootstrap} bootstrap resamples\n"
    if points == curves:
        return runs, [f"{points:,} points of {curves} runs{resamples}"]
    thinned = thin_curves(runs, cfg.points)
    return thinned, [f"{points:,} points of {curves} curves, fitted to {len(thinned.N):,} of them{resamples}"]


def fit_approach1(cfg, runs):
    """Approach 1's entry of fits.json and its part of the report. Raises ValueError without a valley."""
    valleys = fit_valleys(runs)
    power, draws = valleys.power_laws(), bootstrap_valleys(runs, cfg.bootstrap, cfg.seed)
    entry = dict(coefficients=power, draws=draws, range=data_range(runs))

    lines = []
    if beyond := untrained_minima(valleys, runs):
        budgets = ", ".join(f"{flops:.3g}" for flops in beyond)
        lines.append(f"The minimum lies outside the sizes that were trained at {budgets} FLOPs: "
                     "an extrapolation. Add sizes on its side.\n")
    if cfg.bootstrap and not draws:
        lines.append("Three sizes per budget determine their parabola and nothing more: "
                     "no intervals for approach 1. Add sizes.\n")
    lines += ["| IsoFLOP (approach 1) | value | 95 % interval |", "| --- | --- | --- |"]
    for name, value in power.items():
        lines.append(f"| {name} | {value:.4g} | {format_interval(percentiles(draws, name))} |")
    return entry, [*lines, ""]


def percentiles(draws, name):
    """The 95 % interval of one of approach 1's coefficients, or None without draws."""
    return np.quantile([draw[name] for draw in draws], (0.025, 0.975)) if draws else None


def judge(cfg, fit, entry, runs, thinned, held_out):
    """A law's row in the table of judgements; the errors on curves left out go into its entry, too."""
    left_out = "–"
    if cfg.leave_out:
        errors = leave_out(fit, thinned, runs, cfg.jobs or None)
        sizes = np.array([(runs.curve == k).sum() for k in errors])
        per_curve = np.array(list(errors.values()))
        points, curves = (per_curve * sizes).sum() / sizes.sum(), per_curve.mean()
        entry["left_out"] = dict(points=float(points), curves=float(curves))
        left_out = f"{points:.4f} / {curves:.4f}"

    n_coefficients = len(Regression(fit.law, thinned).names)
    cells = [fit.law.name, n_coefficients, f"{fit.huber_sum:.4g}", format_errors(fit, runs), left_out]
    if held_out:
        cells.append(format_errors(fit, held_out))
    return f"| {' | '.join(map(str, cells))} |"


def format_errors(fit, runs):
    return "{:.4f} / {:.4f}".format(*mean_errors(fit, runs))


# ------------------------------------------------------------------------------------------------- the report


def judgement_head(held_out):
    names = ["law", "coefficients", "Σ Huber", "residual, points / curves", "left out, points / curves"]
    if held_out:
        names.append("held out, points / curves")
    return [f"| {' | '.join(names)} |", "| --- " * len(names) + "|"]


def coefficient_table(name, fit):
    """The coefficients of a law with their intervals, in Markdown."""
    undetermined, vanished = undetermined_coefficients(fit), vanished_coefficients(fit)

    lines = [f"| {name} | value | 95 % interval |", "| --- | --- | --- |"]
    for k in fit.coefficients:
        if k in vanished:
            lines.append(f"| {k} | 0 | – |")
        elif k not in fit.law.constants(1, 1, 1):
            lines.append(quantity_row(k, fit, lambda c, k=k: c[k], k not in undetermined))
    if name == "parametric":
        for k in ("k_N", "a", "k_D", "b"):
            def quantity(c, k=k):
                return allocation(c)[k]

            lines.append(quantity_row(f"{k} of the optimum", fit, quantity, is_determined(fit, quantity)))
    return [*lines, ""]


def quantity_row(name, fit, quantity, determined):
    """The row of a quantity in a table of coefficients."""
    if not determined:
        return f"| {name} | not determined by these data ({why_undetermined(fit)}) | – |"
    spread = interval(fit, quantity) if fit.draws else None
    return f"| {name} | {quantity(fit.coefficients):.4g} | {format_interval(spread)} |"


def compare_approaches(entries, fits):
    """A warning where both approaches' intervals of the exponent of N do not meet."""
    if "parametric" not in fits or "approach1" not in entries or not entries["approach1"]["draws"]:
        return []

    def exponent(c):
        return allocation(c)["a"]

    if not is_determined(fits["parametric"], exponent):
        return []
    one = percentiles(entries["approach1"]["draws"], "a")
    two = interval(fits["parametric"], exponent)
    if one[1] >= two[0] and two[1] >= one[0]:
        return []
    return ["The two approaches disagree on the exponent of N: their intervals do not meet. "
            "Look at the valleys and the residuals before using either.\n"]


def compare_objectives(masked, ar):
    """Masked over AR: compute-optimal tokens at equal compute, at both ends of the budgets, by approach 1."""
    lines = ["## Masked against AR at equal compute\n",
             "| FLOPs | masked ÷ AR, compute-optimal tokens | 95 % interval |", "| --- | --- | --- |"]
    for flops in masked["range"]["flops"]:
        ratio = token_ratio(masked["coefficients"], ar["coefficients"], flops)
        draws = [token_ratio(*pair, flops) for pair in zip(masked["draws"], ar["draws"])]
        spread = np.quantile(draws, (0.025, 0.975)) if draws else None
        lines.append(f"| {flops:.2g} | {ratio:.2f} | {format_interval(spread)} |")
    return [*lines, ""]


def token_ratio(first, second, flops):
    """Compute-optimal tokens by one power law over those by another."""
    return first["k_D"] * flops ** first["b"] / (second["k_D"] * flops ** second["b"])


def format_interval(interval):
    return "–" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def show_progress(text):
    """On a terminal: print a line that the next one overwrites."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if not text else "", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------- main


def main(argv):
    cfg = configurator.load(Config, argv, __doc__)
    if cfg.exam:
        return run_exam(cfg)
    try:
        report = fit_and_write(cfg, Path(cfg.out))
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    show_progress("")
    print(report + f"\nwrote {cfg.out}/; python scaling.py plan --fits={cfg.out} … plans by these laws")


def run_exam(cfg):
    """Examine the laws and print the tables; exit with a line where that can't be."""
    try:
        text = exam.run(cfg, show_progress)
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    show_progress("")
    print(f"{text}\nwrote {cfg.out}/")


def fit_and_write(cfg, out):
    """Fit what cfg.data holds and write all of the result into `out`, or nothing; return the report."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is not a folder")
    with all_or_none(out) as building:
        return fit_into(cfg, building)


def fit_into(cfg, out):
    """Fit the runs of each objective, write fits.json, fits.md and the figures into an empty folder."""
    path = find_csv(cfg.data, out)
    held_out = read_csv(cfg.held_out) if cfg.held_out else None
    objectives = [cfg.objective] if cfg.objective else objectives_in(path)
    groups = {objective: read_csv(path, objective) for objective in objectives}

    entries, fits, report = {}, {}, []
    for objective, runs in groups.items():
        entries[objective], fits[objective], lines = fit_objective(cfg, runs, objective, held_out)
        report += [f"## {objective}\n", *lines] if objective else lines

    for objective, runs in groups.items():
        name = f"fits_{objective}.json" if objective else "fits.json"
        (out / name).write_text(json.dumps(entries[objective], indent=1) + "\n", encoding="utf-8")
        if cfg.figures:
            from laws import figures

            with terminal.optional(f"the figures in {cfg.out} can't be drawn"):
                figures.draw_fits(runs, fits[objective], out, objective)
    masked, ar = (entries.get(objective, {}).get("approach1") for objective in ("masked", "ar"))
    if masked and ar:
        report += compare_objectives(masked, ar)
    (out / "fits.md").write_text("\n".join(report) + "\n", encoding="utf-8")
    return "\n".join(report)
