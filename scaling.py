"""Scaling laws: from a budget to a plan, from runs to a law.

    python scaling.py plan --flops=1e21                  what to train with so much compute
    python scaling.py plan --unique_tokens=1B            … with so much text: how large, for how many epochs
    python scaling.py plan --gpus=8 --days=3             … on these GPUs
    python scaling.py fit --data=runs/sweep              laws of your own runs, with intervals
    python scaling.py sweep --base=my.py --flops=1e18,3e18 …   train a grid of runs, then fit and draw it
    python scaling.py plot --out=figures                 the paper's figures, from its numbers or yours
    python scaling.py study kernel --scale=tiny          an ablation of the paper, beside its values
    python scaling.py tables                             the paper's Tables 2 to 5, from its laws

Each command has its own --help. Masked diffusion's losses are bounds in nats per GPT-2 token.
"""

import os

# Before numpy is imported: L-BFGS works on tiny vectors, for which OpenBLAS's threads only wait for each other (8 times slower).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import csv  # noqa: E402
import importlib.util  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

import configurator  # noqa: E402
from configurator import setting, split  # noqa: E402
from laws import laws  # noqa: E402
from laws.laws import EQ15, LAWS, Fit, Runs  # noqa: E402

QUOKKA = Path(__file__).resolve().parent / "results/quokka"


def human(x):
    """1.23B and the like; powers of ten from a thousand trillions on."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if 0.9995 * size <= x < 1e15:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


# --------------------------------------------------------------------------------------------------------- fit


FIT_HELP = """Laws of finished runs, with intervals, judged on curves they were not fitted to.

    python scaling.py fit --data=my.csv --out=fits/mine
    python scaling.py plan --flops=1e21 --fits=fits/mine

A CSV has a header and a row per run, with at least

    params,tokens,loss            every token seen once; numbers may be written 250M or 1.5T
    params,unique_tokens,epochs,loss                    points on curves over repeated text

The loss, in nats per token (of one tokenizer), may be called val_loss; a column objective (masked, ar, …) fits each by itself. Rows with
the same params, unique_tokens, seed and curve (the last two where there are such columns) are one curve: they are resampled and left out together."""


@dataclass
class FitConfig:
    """Which runs, and how they are fitted."""

    data: str = setting(str(QUOKKA / "isoflop_points.csv"), "a CSV of runs or curves, a sweep's folder, or a folder of TensorBoard logs of the reference backend")
    out: str = setting("runs/fit", "folder for fits.json, fits.md and the figures")
    objective: str = setting("", "only runs of this objective (empty: each by itself); of a CSV without such a column: what its runs are")
    laws: str = setting("", f"with commas, of approach1, {', '.join(LAWS)} (empty: those that suit the data)")
    bootstrap: int = setting(100, "resamples for the intervals, 20 or more; 0: none", low=0)
    leave_out: bool = setting(True, "judge each law on every curve after fitting it to all others")
    held_out: str = setting("", "a further CSV that the laws are judged on and not fitted to")
    points: int = setting(40, "of a curve, use at most twice so many", low=2)
    seed: int = setting(0, "of the resamples", low=0)
    jobs: int = setting(0, "processes (0: one per core)", low=0)
    figures: bool = setting(True, "draw valleys, curves and residuals")

    def problems(self):
        known = ("approach1", *LAWS)
        wrong = [f"laws: '{name}' is not one of {', '.join(known)}" for name in split(self.laws) if name not in known]
        return wrong + [f"bootstrap={self.bootstrap}: an interval needs 20 resamples or more (0: none)"] * (0 < self.bootstrap < 20)

    @property
    def name(self):
        """What the data are called where their laws are listed."""
        path = Path(self.data).resolve()
        return "Quokka" if path.parent == QUOKKA else path.parent.name if path.stem in ("points", "curves") else path.stem


def read_csv(path, objective=None):
    """Runs of a CSV with the columns params, loss (or val_loss), and tokens or unique_tokens and epochs. Raises ValueError with the line.

    `objective` selects rows (None: all; "": those that name none). A row with unique_tokens 0 or empty saw every token once; without
    epochs it has tokens/unique_tokens of them. Rows of one (params, unique_tokens, objective, curve) with several epochs are
    a curve; an `objective` column selects.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # with or without a byte order mark
            rows = list(csv.DictReader(file))
    except OSError as problem:
        raise ValueError(f"{path}: {problem.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise ValueError(f"{path} is not a CSV: {problem}") from None
    if not rows:
        raise ValueError(f"{path} holds no runs")
    columns = [name for name in rows[0] if name]
    loss = "val_loss" if "val_loss" in columns else "loss"
    missing = ["params"] * ("params" not in columns) + ["loss"] * (loss not in columns)
    missing += ["tokens (or unique_tokens and epochs)"] * ("tokens" not in columns and not {"unique_tokens", "epochs"} <= set(columns))
    if missing:
        separator = "; separate columns by commas" if len(columns) == 1 and any(c in columns[0] for c in ";\t") else ""
        raise ValueError(f"{path} has no column {' and no column '.join(missing)}; it has {', '.join(columns)}{separator or ': rename yours'}")

    def number(row, name, default=None):
        text = (row.get(name) or "").strip()
        try:
            value = configurator.convert(text, float) if text or default is None else default
        except ValueError as problem:
            raise ValueError(f"{name}={text}: {problem}") from None
        if not value > 0 and name != "unique_tokens":
            raise ValueError(f"{name}={text}: must be positive")
        return value

    values, curve, curves = [], [], {}
    for line, row in enumerate(rows, 2):
        if objective is not None and (row.get("objective", objective) or "") != objective:
            continue
        if None in row:
            raise ValueError(f"{path}:{line}: more cells than the header has")
        try:
            unique = number(row, "unique_tokens", 0.0)
            U, e = (number(row, "tokens"), 1.0) if unique == 0 else (unique, number(row, "epochs", number(row, "tokens", unique) / unique))
            if unique > 0 and row.get("tokens") and abs(math.log(number(row, "tokens") / (U * e))) > 0.01:
                raise ValueError(f"tokens={row['tokens']}: not unique_tokens · epochs = {U * e:.6g}")
            values.append((number(row, "params"), U, e, number(row, loss)))
        except ValueError as problem:
            raise ValueError(f"{path}:{line}: {problem}") from None
        key = (values[-1][0], U, row.get("seed"), row.get("curve")) if unique > 0 else line
        curve.append(curves.setdefault(key, len(curves)))
    if not values:
        raise ValueError(f"{path} has no runs of objective {objective}")
    return Runs(*np.array(values).T, np.array(curve))


def objectives_in(path):
    """The objectives of a CSV's runs, [""] where it names none (or cannot be read: read_csv says why)."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return sorted({row.get("objective") or "" for row in csv.DictReader(file)}) or [""]
    except (OSError, UnicodeDecodeError, csv.Error):
        return [""]


def read_any(path, out):
    """The CSV with the runs of `path`, which may also be a folder: a sweep's, or TensorBoard logs (written to `out`). Raises ValueError."""
    path = Path(path)
    if not path.is_dir():
        return path
    if any(path.rglob("events.out.tfevents*")):
        from laws import events

        out.mkdir(parents=True, exist_ok=True)
        return events.write_csv(path, out / "points.csv")
    for name in ("curves.csv", "points.csv"):  # what a finished sweep left; else read its runs
        if (path / name).is_file():
            return path / name
    from laws import sweep

    rows = sweep.read_runs(path)
    if not rows:
        raise ValueError(f"{path} holds no finished runs, points.csv or TensorBoard logs")
    out.mkdir(parents=True, exist_ok=True)
    sweep.write_points(rows, out / "points.csv")
    return out / "points.csv"


def reach_of(runs):
    """What the data of a fit reach, for warnings: {quantity: (smallest, largest)}."""
    return {k: (float(v.min()), float(v.max())) for k, v in dict(N=runs.N, D=runs.U * runs.e, U=runs.U, e=runs.e, flops=runs.flops).items()}


def suiting(runs, objective):
    """The laws for these runs: with repeats in the data the data-constrained ones."""
    if runs.e.max() <= 1.01:
        return ["approach1", "parametric"]
    return ["half_life"] if objective == "ar" else ["eq15", "eq21", "eq23", "ours"]


def judge(fitted, runs):
    """Mean |log L̂ − log L| over all points, and its mean over curves."""
    errors = np.abs(np.log(laws.predict(fitted, runs.N, runs.U, runs.e) / runs.loss))
    return errors.mean(), np.mean([errors[runs.curve == k].mean() for k in np.unique(runs.curve)])


def fit_all(cfg, runs, objective, held_out):
    """Every law on these runs: ({name: what fits.json keeps}, {name: Fit}, lines of the report)."""
    names = split(cfg.laws) or suiting(runs, objective)
    fitted_on = laws.thin(runs, cfg.points) if len(runs.N) > len(np.unique(runs.curve)) else runs
    jobs, kept, fits, lines = cfg.jobs or None, dict(about=dict(objective=objective or cfg.objective, data=cfg.name)), {}, []
    lines.append(f"{len(runs.N):,} points of {len(np.unique(runs.curve))} {'curves' if fitted_on is not runs else 'runs'}"
                 + (f", fitted to {len(fitted_on.N):,} of them" if fitted_on is not runs else "") + f"; {cfg.bootstrap} bootstrap resamples\n")
    if "approach1" in names:
        try:
            found = laws.valleys(runs)
            power, draws = found.power_laws(), laws.bootstrap_valleys(runs, cfg.bootstrap, cfg.seed)
        except ValueError as problem:
            if len(names) == 1:
                raise
            lines += [f"No approach 1: {problem}.\n"]
        else:
            kept["approach1"] = dict(coefficients=power, draws=draws, range=reach_of(runs))
            spans = {k: np.quantile([d[k] for d in draws], (0.025, 0.975)) for k in power} if draws else {}
            budget = laws.budget_of(runs)
            beyond = [f"{C:.3g}" for k, (C, N) in enumerate(zip(found.flops, found.N)) if not runs.N[budget == k].min() <= N <= runs.N[budget == k].max()]
            if beyond:
                lines += [f"The minimum lies outside the sizes that were trained at {', '.join(beyond)} FLOPs: an extrapolation. Add sizes on its side.\n"]
            if cfg.bootstrap and not draws:
                lines += ["Three sizes per budget determine their parabola and nothing more: no intervals for approach 1. Add sizes.\n"]
            lines += ["| IsoFLOP (approach 1) | value | 95 % interval |", "| --- | --- | --- |",
                      *(f"| {k} | {v:.4g} | {span(spans.get(k))} |" for k, v in power.items()), ""]
    table = ["| law | coefficients | Σ Huber | residual, points / curves | left out, points / curves |" + (" held out, points / curves |" if held_out else ""),
             "| --- | --- | --- | --- | --- |" + (" --- |" if held_out else "")]
    for name in (n for n in names if n != "approach1"):
        progress(f"{objective + ' ' * bool(objective)}{name}: fit, {cfg.bootstrap} resamples" + ", every curve left out" * cfg.leave_out)
        try:
            best = laws.fit(LAWS[name], fitted_on, jobs=jobs)
        except ValueError as problem:  # fewer runs than coefficients
            if not cfg.laws and (fits or "approach1" in kept):
                lines += [f"No {name}: {problem}.\n"]
                continue
            raise
        if cfg.bootstrap:
            best = laws.bootstrap(best, fitted_on, cfg.bootstrap, cfg.seed, jobs)
        fits[name] = best
        kept[name] = dict(coefficients=best.coefficients, objective=best.objective, range=reach_of(runs),
                          units=best.units, draws=[[float(f"{v:.7g}") for v in draw.values()] for draw in best.draws])
        left = "–"
        if cfg.leave_out:
            errors = laws.leave_out(best, fitted_on, runs, jobs)
            counts = np.array([(runs.curve == k).sum() for k in errors])
            per_curve = np.array(list(errors.values()))
            left = f"{(per_curve * counts).sum() / counts.sum():.4f} / {per_curve.mean():.4f}"
            kept[name]["left_out"] = dict(points=float((per_curve * counts).sum() / counts.sum()), curves=float(per_curve.mean()))
        points, curves = judge(best, runs)
        table.append(f"| {name} | {len(laws.Problem(LAWS[name], fitted_on).names)} | {best.objective:.4g} | {points:.4f} / {curves:.4f} | {left} |"
                     + (" {:.4f} / {:.4f} |".format(*judge(best, held_out)) if held_out else ""))
    if len(table) > 2:
        lines += [*table, ""]
    for name, best in fits.items():
        shown = dict(best.coefficients)
        quantities = {k: (lambda c, k=k: c[k]) for k in shown if k not in best.law.constants(1, 1, 1)}
        if name == "parametric":
            quantities |= {f"{k} of the optimum": (lambda c, k=k: laws.allocation(c)[k]) for k in ("k_N", "a", "k_D", "b")}
        loose = laws.undetermined(best, fitted_on)
        lines += [f"| {name} | value | 95 % interval |", "| --- | --- | --- |",
                  *(f"| {k} | {'0' if shown[k] < 1e-6 and k not in best.law.signed else 'not determined by these data'} | – |" if k in loose else
                    f"| {k} | {f(best.coefficients):.4g} | {span(laws.interval(best, f) if best.draws else None)} |" for k, f in quantities.items()), ""]
    if "approach1" in kept and "parametric" in fits and kept["approach1"]["draws"]:
        two = laws.interval(fits["parametric"], lambda c: laws.allocation(c)["a"])
        if spans["a"][1] < two[0] or two[1] < spans["a"][0]:
            lines += ["The two approaches disagree on the exponent of N: their intervals do not meet. Look at the valleys and the residuals before using either.\n"]
    return kept, fits, lines


def progress(text):
    """A line that the next one overwrites, for whoever watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if not text else "", file=sys.stderr, flush=True)


def known_laws(path):
    """What `fit` wrote to one fits.json: ({law: (Fit, what its data reach)}, approach 1 with its draws, or None, what it says about its data).

    Raises ValueError.
    """
    fits, approach1, about = {}, None, {}
    try:
        for name, entry in json.loads(Path(path).read_text()).items():
            if name == "about":
                about = entry
            elif name == "approach1":
                approach1 = entry
                if not all({"k_N", "a", "k_D", "b"} <= power.keys() for power in (entry["coefficients"], *entry["draws"])) or not entry["range"]:
                    raise ValueError("approach1 has other coefficients than in laws.py")
            else:
                if entry["coefficients"].keys() != {*LAWS[name].starts(1, 1, 1), *LAWS[name].constants(1, 1, 1)}:
                    raise ValueError(f"{name} has other coefficients than in laws.py")
                draws = [dict(zip(entry["coefficients"], draw)) for draw in entry["draws"]]
                fits[name] = Fit(LAWS[name], entry["coefficients"], entry["objective"], draws, entry.get("units", 0)), entry["range"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        problem = problem.strerror if isinstance(problem, OSError) else problem
        raise ValueError(f"{path}: {problem}; make it with python scaling.py fit") from None
    return fits, approach1, dict(objective="", data=Path(path).resolve().parent.name) | about


def fit_files(paths):
    """The fits.json files (fits_ar.json, …) of a comma list of files and folders. Raises ValueError."""
    found = []
    for path in split(paths):
        inside = sorted(map(str, Path(path).glob("fits*.json"))) if Path(path).is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no fits.json; make it with python scaling.py fit")
        found += inside
    return found


def span(interval):
    return "–" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def data_ratio(kept):
    """Masked over AR: compute-optimal tokens at equal compute, at both ends of the budgets, with intervals from approach 1's draws."""
    masked, ar = kept["masked"]["approach1"], kept["ar"]["approach1"]
    lines = ["| FLOPs | masked ÷ AR, compute-optimal tokens | 95 % interval |", "| --- | --- | --- |"]
    for C in masked["range"]["flops"]:
        ratio = lambda a, b, C=C: a["k_D"] * C ** a["b"] / (b["k_D"] * C ** b["b"])  # noqa: E731
        draws = [ratio(a, b) for a, b in zip(masked["draws"], ar["draws"])]
        lines.append(f"| {C:.2g} | {ratio(masked['coefficients'], ar['coefficients']):.2f} | {span(np.quantile(draws, (0.025, 0.975)) if draws else None)} |")
    return lines


def fit_main(argv):
    cfg = configurator.load(FitConfig, argv, FIT_HELP)
    out = Path(cfg.out)
    try:
        if out.exists() and not out.is_dir():
            raise ValueError(f"out={out} is not a folder")
        source = read_any(cfg.data, out)
        held_out = read_csv(cfg.held_out) if cfg.held_out else None
        groups = {objective: read_csv(source, objective) for objective in ([cfg.objective] if cfg.objective else objectives_in(source))}
        kept, reports = {}, []
        fitted = {}
        for objective, runs in groups.items():
            kept[objective], fitted[objective], lines = fit_all(cfg, runs, objective, held_out)
            reports += [f"## {objective}\n"] * bool(objective) + lines
        out.mkdir(parents=True, exist_ok=True)  # only now: nothing is overwritten by half of a result
        for objective, runs in groups.items():
            (out / f"fits{'_' * bool(objective)}{objective}.json").write_text(json.dumps(kept[objective], indent=1) + "\n")
            if cfg.figures:
                from laws import figures

                figures.of_fit(runs, fitted[objective], out, objective)
        if {"masked", "ar"} <= kept.keys() and all("approach1" in kept[k] for k in ("masked", "ar")):
            reports += ["## Masked against AR at equal compute\n", *data_ratio(kept), ""]
        (out / "fits.md").write_text("\n".join(reports) + "\n")
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    progress("")
    print("\n".join(reports) + f"\nwrote {out}/; python scaling.py plan --fits={out} … plans by these laws")


# ------------------------------------------------------------------------------------------------------ tables


def tables():
    """The paper's Tables 2 to 5 from its laws, as {number: rows}: numbers, before any rounding."""
    own, sizes = laws.published(), [4e8, 1e9, 1e10, 6.7e10, 1.75e11, 2.8e11, 5.2e11, 1e12, 1e13]
    unique = 10.0 ** np.arange(7, 16)

    def optimal(power):
        flops = (np.array(sizes) / power["k_N"]) ** (1 / power["a"])
        return flops, power["k_D"] * flops ** power["b"]

    one, two = optimal(own["approach1"]), optimal(dict(k_N=0.0406, a=0.499, k_D=4.102, b=0.501))  # as printed under Table 5
    grid = np.logspace(7, 13, 50), np.logspace(0, 5, 50)
    best = []
    for U in unique:
        loss = laws.evaluate(EQ15, own["eq15"], grid[0][:, None], U, grid[1])
        i, j = np.unravel_index(loss.argmin(), loss.shape)
        best.append((U, grid[0][i], grid[1][j], 6 * grid[0][i] * U * grid[1][j]))
    return {
        2: [(N, *values) for N, *values in zip(sizes, *one)],
        3: [(N, *(laws.eq15_best_epochs(own["eq15"], N, U) for U in unique)) for N in sizes],
        4: best,
        5: [(N, *values) for N, *values in zip(sizes, *one, *two)],
    }


def tables_main(argv):
    """The paper's Tables 2 to 5, from its laws."""
    if {"-h", "--help"} & set(argv):
        return print(tables_main.__doc__)
    if argv:
        configurator.fail(f"tables takes no settings, not {argv[0]}")
    heads = {2: ["parameters", "FLOPs", "tokens"], 3: ["N \\ U", *(human(10.0**k) for k in range(7, 16))],
             4: ["unique tokens", "parameters", "epochs", "FLOPs"], 5: ["parameters", "FLOPs (1)", "tokens (1)", "FLOPs (2)", "tokens (2)"]}
    for number, rows in tables().items():
        print(f"Table {number}\n\n| {' | '.join(heads[number])} |\n|{' --- |' * len(heads[number])}")
        for row in rows:
            print("| " + " | ".join(f"{x:,.0f}" if number == 3 and i else human(x) if x < 1e16 else f"{x:.2e}" for i, x in enumerate(row)) + " |")
        print()


# -------------------------------------------------------------------------------------------------------- main


def plan_main(argv):
    from laws import plan

    plan.main(argv)


def sweep_main(argv):
    """Train a grid, then fit and draw what came out."""
    from laws import sweep

    points = sweep.main(argv)
    if points:
        fit_main([f"--data={points.parent}", f"--out={points.parent / 'fit'}"])


def plot_main(argv):
    from laws import figures

    figures.main(argv)


def study_main(argv):
    from laws import study

    study.main(argv)


COMMANDS = dict(plan=plan_main, fit=fit_main, sweep=sweep_main, plot=plot_main, study=study_main, tables=tables_main)


def main():
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
    elif command in COMMANDS:
        if command != "study" and importlib.util.find_spec("scipy") is None:  # a sweep ends with a fit
            configurator.fail("scaling laws need scipy: pip install -e '.[scaling]'")
        try:
            COMMANDS[command](argv)
        except BrokenPipeError:  # of plan or tables into head
            os._exit(1)
    else:
        configurator.fail(f"'{command}' is no command; choose from {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
