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
from typing import Literal, NamedTuple  # noqa: E402

import numpy as np  # noqa: E402

import configurator  # noqa: E402
import laws  # noqa: E402
from configurator import setting  # noqa: E402
from engine import PEAK  # noqa: E402
from laws import EQ15, EQ21, EQ23, HALF_LIFE, LAWS, PARAMETRIC, Fit, Runs  # noqa: E402
from model import LADDER, ladder_params  # noqa: E402

QUOKKA = Path(__file__).resolve().parent / "results/quokka"


# -------------------------------------------------------------------------------------------------------- plan


@dataclass
class Plan:
    """What there is. Give what you know; the rest follows."""

    flops: float = setting(0.0, "training compute, 6·N·D", low=0)
    params: float = setting(0.0, "parameters N (embeddings included)", low=0)
    tokens: float = setting(0.0, "training tokens D, repeats included", low=0)
    unique_tokens: float = setting(0.0, "tokens of text that there are: with repeats as the laws advise", low=0)
    epochs: float = setting(0.0, "passes over them", low=0)
    gpus: int = setting(0, "GPUs, for --days, or for the time that the plan takes", low=0)
    days: float = setting(0.0, "on these GPUs: compute = GPUs · days · peak · MFU", low=0)
    gpu: Literal["H100", "H200", "A100"] = setting("H100", "kind of GPU, for its peak in bf16")
    mfu: float = setting(0.5, "share of the peak that training reaches", above=0, high=1)
    price: float = setting(0.0, "of a GPU-hour, for the cost", low=0)
    fits: str = setting(f"{QUOKKA}/isoflop/fits.json,{QUOKKA}/epochs/fits.json", "laws that `fit` found, with commas between")
    write: str = setting("", "write the override file for this plan")
    objective: Literal["masked", "ar"] = setting("masked", "of the plan to write")
    law: str = setting("", "whose plan to write, as the table's first column names it (empty: the first of the objective that is within its data)")
    corpus: str = setting("corpora/mine", "of the plan to write")

    def problems(self):
        wrong, given = [], {k for k in ("flops", "params", "tokens", "unique_tokens", "epochs", "days") if getattr(self, k)}
        if not given - {"epochs"}:
            wrong.append("plan for what? give flops, params, tokens, unique_tokens, or gpus and days")
        if self.days and not self.gpus:
            wrong.append("days needs gpus")
        if "epochs" in given and "unique_tokens" not in given:
            wrong.append("epochs needs unique_tokens")
        if {"flops", "days"} <= given:
            wrong.append("give flops or days, not both")
        compute = given & {"flops", "days"}
        if "unique_tokens" in given:
            if "tokens" in given:
                wrong.append("tokens = unique_tokens · epochs; leave tokens out")
            if compute and {"params", "epochs"} <= given:
                wrong.append("flops = 6 · params · unique_tokens · epochs; leave one of them out")
        elif compute and {"params", "tokens"} <= given:
            wrong.append("flops = 6 · params · tokens; leave one of them out")
        if self.gpu not in PEAK:
            wrong.append(f"gpu={self.gpu} is not known; choose from {', '.join(PEAK)}")
        return wrong


class Row(NamedTuple):
    """One law's plan."""

    law: str
    objective: str
    N: float
    U: float
    e: float
    loss: float = math.nan  # nan: the law says nothing of the loss
    N_range: tuple = ()  # 95 % intervals, where there are draws
    loss_range: tuple = ()
    notes: tuple = ()

    @property
    def tokens(self):
        return self.U * self.e

    @property
    def flops(self):
        return 6 * self.N * self.tokens


def known_laws(paths):
    """What `fit` wrote: ({law: (Fit, what its data reach)}, approach 1 with its draws, or None). Raises ValueError."""
    fits, approach1 = {}, None
    for path in paths.split(","):
        try:
            for name, entry in json.loads(Path(path).read_text()).items():
                if name == "approach1":
                    approach1 = entry
                else:
                    if entry["coefficients"].keys() != {*LAWS[name].starts(1, 1, 1), *LAWS[name].constants(1, 1, 1)}:
                        raise ValueError(f"{name} has other coefficients than in laws.py")
                    draws = [dict(zip(entry["coefficients"], draw)) for draw in entry["draws"]]
                    fits[name] = Fit(LAWS[name], entry["coefficients"], entry["objective"], draws), entry["range"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ValueError(f"fits={path}: {problem}; make it with python scaling.py fit") from None
    return fits, approach1


def outside(where, **values):
    """Which of these values the law's data do not reach, as text."""
    beyond = []
    for what, value in values.items():
        low, high = where[what]
        if not low / 1.2 <= value <= high * 1.2:
            beyond.append(f"{dict(N='parameters', D='tokens', U='unique tokens', e='epochs', flops='FLOPs')[what]} "
                          f"{value / high:.3g} × its largest" if value > high else f"{what} {low / value:.3g} × below its smallest")
    return ("extrapolates: " + ", ".join(beyond),) if beyond else ()


def compute_plans(plan, flops, fits, approach1, where):
    """Compute-constrained rows: every token is new."""
    own = laws.published()
    sources = [("Quokka 1, printed", "masked", own["approach1"], None, [], where)]
    if approach1:
        sources.append(("Quokka 1, refitted", "masked", approach1["coefficients"], None, approach1["draws"], where))
    sources.append(("Quokka 2, printed", "masked", laws.allocation(own["parametric"]), Fit(PARAMETRIC, own["parametric"], math.nan), [], where))
    if "parametric" in fits:
        fitted, reach = fits["parametric"]
        sources.append(("Quokka 2, refitted", "masked", laws.allocation(fitted.coefficients), fitted, list(map(laws.allocation, fitted.draws)), reach))
    sources += [("Chinchilla 1", "ar", laws.CHINCHILLA[1], None, [], None), ("Chinchilla 2", "ar", laws.CHINCHILLA[2], None, [], None),
                ("Chinchilla 3", "ar", laws.allocation(laws.CHINCHILLA_3), Fit(PARAMETRIC, laws.CHINCHILLA_3, math.nan), [], None)]

    def choose(power):
        if plan.params and (flops or plan.tokens):
            return plan.params, plan.tokens or flops / (6 * plan.params)
        if plan.tokens and flops:
            return flops / (6 * plan.tokens), plan.tokens
        compute = flops or ((plan.params / power["k_N"]) ** (1 / power["a"]) if plan.params else (plan.tokens / power["k_D"]) ** (1 / power["b"]))
        N = plan.params or power["k_N"] * compute ** power["a"]
        return N, plan.tokens or compute / (6 * N)

    rows = []
    for name, objective, power, fitted, draws, reach in sources:
        N, D = choose(power)
        rows.append(Row(
            name, objective, N, D, 1.0,
            float(laws.predict(fitted, N, D)) if fitted else math.nan,
            tuple(np.quantile([choose(draw)[0] for draw in draws], (0.025, 0.975))) if draws else (),
            tuple(laws.interval(fitted, lambda c, f=fitted, N=N, D=D: float(laws.evaluate(f.law, c, N, D)))) if fitted and fitted.draws else (),
            outside(reach, N=N, D=D) if reach else ()))
    return rows


def data_plans(plan, flops, fits):
    """Data-constrained rows: U unique tokens, as many epochs as each law advises (or as asked for)."""
    own, U = laws.published(), plan.unique_tokens
    sources = [(label, "masked", *fits[name]) for label, name in (("ours", "ours"), ("eq. 15, refitted", "eq15")) if name in fits]
    sources += [(f"eq. {law.name[2:]}, printed", "masked", Fit(law, own[law.name], math.nan), None) for law in (EQ15, EQ21, EQ23)]
    sources.append(("Muennighoff", "ar", Fit(HALF_LIFE, laws.MUENNIGHOFF, math.nan), None))
    rows = []
    for name, objective, fitted, reach in sources:
        c = fitted.coefficients
        # A law of ours is searched where it was fitted; the printed ones wherever their authors use them.
        sizes, passes = (reach["N"], (1.0, reach["e"][1])) if reach else ((1e5, 1e13), (1.0, 1e5))

        def choose(c, law=fitted.law, sizes=sizes, passes=passes):
            if plan.params and flops:
                e = flops / (6 * plan.params * U)
                return laws.Choice(plan.params, e, float(laws.evaluate(law, c, plan.params, U, e)), False)
            if plan.epochs and flops:
                N = flops / (6 * U * plan.epochs)
                return laws.Choice(N, plan.epochs, float(laws.evaluate(law, c, N, U, plan.epochs)), False)
            return laws.best(law, c, U, N=plan.params or sizes, e=plan.epochs or passes, flops=flops or math.inf, points=120)

        found, notes = choose(c), ()
        if found.edge:
            notes += ("the loss still falls at the border of " + ("its data" if reach else "the search"),)
        elif found.e < 1.001 and not plan.epochs:
            notes += ("prefers a single epoch",)
        if fitted.law is EQ15 and plan.params and not plan.epochs and not flops:
            local = laws.eq15_best_epochs(c, found.N, U)
            if found.e < 1.001 and local > 1.001:  # Table 3 prints this one
                notes += (f"its local optimum at {local:,.0f} epochs is worse",)
        if reach:
            notes += outside(reach, N=found.N, U=U, e=found.e)
        here = lambda c, f=fitted, x=found: float(laws.evaluate(f.law, c, x.N, U, x.e))  # noqa: E731
        drawn = [choose(c).N for c in fitted.draws[:100]] if fitted.draws and not plan.params else []
        rows.append(Row(name, objective, found.N, U, found.e, found.loss, tuple(np.quantile(drawn, (0.025, 0.975))) if drawn else (),
                        tuple(laws.interval(fitted, here)) if fitted.draws else (), notes))
    return rows


def crossover(U, masked, ar):
    """The compute from which on the best masked model beats the best AR model on U unique tokens, by two fits; None if never, 0 if always."""
    budgets = 6 * 1e5 * U * np.logspace(0, 12, 49)

    def ahead(flops):
        reached = [laws.best(f.law, f.coefficients, U, flops=flops, points=60).loss for f in (masked, ar)]
        return reached[0] < reached[1]

    behind = np.array([not ahead(C) for C in budgets])
    if not behind.any() or behind[-1]:
        return 0.0 if not behind.any() else None
    last = int(np.flatnonzero(behind)[-1])
    low, high = budgets[last], budgets[last + 1]
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if ahead(middle) else (middle, high)
    return float(high)


def human(x):
    """1.23B and the like; powers of ten from a thousand trillions on."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if size <= x < 1e15:
            return f"{x / size:.3g}{unit}" if x / size < 999.5 else f"{x / size:.0f}{unit}"
    return f"{x:.3g}"


def nearest(N):
    """The name of the ladder's model whose N is nearest in ratio."""
    sizes = np.array([ladder_params(*row) for _, *row in LADDER])
    return f"{round(sizes[np.abs(np.log(sizes / N)).argmin()] / 1e6)}M"


def duration(hours):
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days" if hours < 24 * 730 else f"{hours / 8766:.1f} years"


def plan_main(argv):
    plan = configurator.load(Plan, argv, __doc__)
    try:
        fits, approach1 = known_laws(plan.fits)
        flops = plan.flops or plan.gpus * plan.days * 86400 * PEAK[plan.gpu] * plan.mfu
        where = reach_of(read_csv(QUOKKA / "isoflop_points.csv"))  # what the printed laws were fitted to
        rows = data_plans(plan, flops, fits) if plan.unique_tokens else compute_plans(plan, flops, fits, approach1, where)
        chosen = pick(plan, rows) if plan.write else None
    except ValueError as problem:
        configurator.fail(str(problem))
    print_plan(plan, rows, flops)
    if plan.unique_tokens:
        print_crossover(plan, fits, flops)
    if chosen:
        Path(plan.write).write_text(override_file(plan, chosen))
        print(f"\nwrote {plan.write} ({chosen.law}): torchrun --nproc_per_node={plan.gpus or 8} train.py {plan.write}")


def print_plan(plan, rows, flops):
    speed = (plan.gpus or 1) * PEAK[plan.gpu] * plan.mfu
    given = ", ".join(f"{k.replace('_', ' ')} {human(v) if not isinstance(v, int) else v}" for k, v in (
        ("flops", flops), ("params", plan.params), ("tokens", plan.tokens), ("unique_tokens", plan.unique_tokens), ("epochs", plan.epochs)) if v)
    print(f"given {given}; time on {plan.gpus or 1} × {plan.gpu} at {plan.mfu:.0%} of {PEAK[plan.gpu] / 1e12:.0f} TFLOP/s\n")
    table = [["law", "params", "tokens", "epochs", "FLOPs", "loss", "time", *(["cost"] if plan.price else []), "ladder"]]
    for objective, title in (("masked", "masked diffusion"), ("ar", "autoregressive")):
        table.append([title])
        for row in (r for r in rows if r.objective == objective):
            hours = row.flops / speed / 3600
            span = f" [{human(row.N_range[0])}, {human(row.N_range[1])}]" if len(row.N_range) else ""
            band = f" [{row.loss_range[0]:.3f}, {row.loss_range[1]:.3f}]" if len(row.loss_range) else ""
            table.append(["  " + row.law, human(row.N) + span, human(row.tokens), f"{row.e:,.3g}" if row.e < 1000 else f"{row.e:,.0f}", f"{row.flops:.3g}",
                          "–" if math.isnan(row.loss) else f"{row.loss:.3f}{band}", duration(hours),
                          *([f"{hours * (plan.gpus or 1) * plan.price:,.0f}"] if plan.price else []), nearest(row.N)])
    widths = [max(len(line[i]) for line in table if i < len(line) > 1) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())
    notes = [f"{row.law}: {note}" for row in rows for note in row.notes]
    print("\n[…] are 95 % intervals. Loss: nats per token; masked diffusion's is an upper bound. Quokka and Muennighoff: C4, GPT-2's tokenizer;\n"
          "Chinchilla: other text, another tokenizer, so that its losses are not comparable." + "".join(f"\n* {note}" for note in notes))


def print_crossover(plan, fits, flops):
    ar = Fit(HALF_LIFE, laws.MUENNIGHOFF, math.nan)
    candidates = [("ours", fits["ours"][0])] if "ours" in fits else []
    candidates.append(("eq. 15", Fit(EQ15, laws.published()["eq15"], math.nan)))
    print(f"\nDoes diffusion beat AR on {human(plan.unique_tokens)} unique tokens? (against Muennighoff's law, whose models never overfit)")
    for name, fitted in candidates:
        C = crossover(plan.unique_tokens, fitted, ar)
        print(f"  by {name}: " + ("not at any compute" if C is None else "at every compute" if C == 0 else
                                  f"from {C:.2g} FLOPs on" + (f"; {'yes' if flops >= C else 'no'}, at {flops:.2g}" if flops else "")))


def pick(plan, rows):
    """The row to write; raises ValueError."""
    if Path(plan.write).exists():
        raise ValueError(f"{plan.write} exists; choose another name")
    if not plan.write.endswith(".py") or not Path(plan.write).parent.is_dir():
        raise ValueError(f"write={plan.write} must be a .py file in a folder that exists")
    of = [row for row in rows if row.objective == plan.objective]
    if plan.law:
        of = [row for row in of if row.law == plan.law]
        if not of:
            raise ValueError(f"law={plan.law}: choose from {', '.join(row.law for row in rows if row.objective == plan.objective)}")
    return min(of, key=lambda row: len(row.notes))


def override_file(plan, row):
    """The text of an override file that trains `row` by the paper's recipe (SPEC §10)."""
    name = nearest(row.N)
    N = float(name[:-1]) * 1e6
    batch = 256 if N < 1.5e9 else 512 if N < 5e9 else 1024
    constrained = bool(plan.unique_tokens) and row.e > 1
    steps = math.ceil(row.tokens / (batch * 2048))
    hours = 6 * N * row.tokens / ((plan.gpus or 8) * PEAK[plan.gpu] * plan.mfu) / 3600
    return f"""# {'Masked diffusion' if row.objective == 'masked' else 'Autoregressive'}: {name} parameters, {human(row.tokens)} tokens{f', {row.e:,.3g} epochs of {human(row.U)}' if row.e > 1 else ''}.
# Planned by scaling.py from {row.law} for N = {human(row.N)}; {name} is the ladder's nearest model.
# Hardware: {plan.gpus or 8} {plan.gpu}; {6 * N * row.tokens:.2g} FLOPs, {duration(hours)} at {plan.mfu:.0%} of their peak.
# Expect {'by this law a loss of ' + format(row.loss, '.2f') + ' nats per token' if not math.isnan(row.loss) else 'what only training will tell: this law says nothing of the loss'}.
run_dir = "runs/{Path(plan.write).stem}"
corpus = "{plan.corpus}"
objective = "{row.objective}"
model = "{name}"
block_len = 2048
short_rows = {0.01 if row.objective == 'masked' else 0.0}
tokens = {row.tokens:.6g}
{f'unique_tokens = {int(row.U)}' if constrained else '# every token is new'}
batch_size = {batch}
micro_batch = {8 if N < 3e9 else 4}
lr = {2e-4 if N < 8e9 else 1.25e-4}
lr_schedule = "{'wsd' if constrained else 'cosine'}"
decay = {min(1000, max(1, steps // 10))}
warmup = {min(2000, max(1, steps // 10))}
"""


# --------------------------------------------------------------------------------------------------------- fit


@dataclass
class FitConfig:
    """Which runs, and how they are fitted."""

    data: str = setting(str(QUOKKA / "isoflop_points.csv"), "a CSV of runs or curves, a sweep's folder, or a folder of TensorBoard logs of the reference backend")
    out: str = setting("runs/fit", "folder for fits.json, fits.md and the figures")
    objective: str = setting("", "only runs of this objective (empty: each by itself)")
    laws: str = setting("", f"with commas, of approach1, {', '.join(LAWS)} (empty: those that suit the data)")
    bootstrap: int = setting(100, "resamples for the intervals; 0: none", low=0)
    leave_out: bool = setting(True, "judge each law on every curve after fitting it to all others")
    held_out: str = setting("", "a further CSV that the laws are judged on and not fitted to")
    points: int = setting(40, "of a curve, use at most twice so many", low=2)
    seed: int = setting(0, "of the resamples", low=0)
    jobs: int = setting(0, "processes (0: one per core)", low=0)
    figures: bool = setting(True, "draw valleys, curves and residuals")

    def problems(self):
        known = ("approach1", *LAWS)
        return [f"laws: '{name}' is not one of {', '.join(known)}" for name in filter(None, self.laws.split(",")) if name not in known]


def read_csv(path, objective=""):
    """Runs of a CSV with the columns params, loss (or val_loss), and tokens or unique_tokens and epochs. Raises ValueError with the line.

    A row with unique_tokens 0 or empty saw every token once. Rows of one (params, unique_tokens, objective, curve) with several epochs are
    a curve; an `objective` column selects.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as problem:
        raise ValueError(f"{path}: {problem.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise ValueError(f"{path} is not a CSV: {problem}") from None
    if not rows:
        raise ValueError(f"{path} holds no runs")
    columns = rows[0].keys()
    loss = "loss" if "loss" in columns else "val_loss"
    if missing := [name for name in ("params", loss) if name not in columns] + (
            [] if "tokens" in columns or {"unique_tokens", "epochs"} <= set(columns) else ["tokens (or unique_tokens and epochs)"]):
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(columns)}")
    values, curve, curves = [], [], {}
    for number, row in enumerate(rows, 2):
        if objective and row.get("objective", objective) != objective:
            continue
        try:
            unique, epochs = float(row.get("unique_tokens") or 0), float(row.get("epochs") or 1)
            U, e = (unique, epochs) if unique else (float(row["tokens"]), 1.0)
            values.append((float(row["params"]), U, e, float(row[loss])))
            if not all(math.isfinite(x) and x > 0 for x in values[-1]):
                raise ValueError("must be positive")
        except (ValueError, TypeError, KeyError) as problem:
            raise ValueError(f"{path}:{number}: {problem}") from None
        key = (row["params"], U, row.get("seed"), row.get("curve")) if unique else number
        curve.append(curves.setdefault(key, len(curves)))
    if not values:
        raise ValueError(f"{path} has no runs of objective {objective}")
    return Runs(*np.array(values).T, np.array(curve))


def objectives_in(path):
    """The objectives of a CSV's runs, [""] where it names none (or cannot be read: read_csv says why)."""
    try:
        with open(path, newline="") as file:
            return sorted({row.get("objective") or "" for row in csv.DictReader(file)}) or [""]
    except (OSError, UnicodeDecodeError, csv.Error):
        return [""]


def read_any(path, out):
    """The CSV with the runs of `path`, which may also be a folder: a sweep's, or TensorBoard logs (written to `out`). Raises ValueError."""
    path = Path(path)
    if not path.is_dir():
        return path
    if any(path.rglob("events.out.tfevents*")):
        import events

        out.mkdir(parents=True, exist_ok=True)
        return events.write_csv(path, out / "points.csv")
    for name in ("curves.csv", "points.csv"):  # what a finished sweep left; else read its runs
        if (path / name).is_file():
            return path / name
    import sweep

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
    names = cfg.laws.split(",") if cfg.laws else suiting(runs, objective)
    fitted_on = laws.thin(runs, cfg.points) if len(runs.N) > len(np.unique(runs.curve)) else runs
    jobs, kept, fits, lines = cfg.jobs or None, {}, {}, []
    lines.append(f"{len(runs.N):,} points of {len(np.unique(runs.curve))} {'curves' if fitted_on is not runs else 'runs'}"
                 + (f", fitted to {len(fitted_on.N):,} of them" if fitted_on is not runs else "") + f"; {cfg.bootstrap} bootstrap resamples\n")
    if "approach1" in names:
        power, draws = laws.valleys(runs).power_laws(), laws.bootstrap_valleys(runs, cfg.bootstrap, cfg.seed)
        kept["approach1"] = dict(coefficients=power, draws=draws, range=reach_of(runs))
        spans = {k: np.quantile([d[k] for d in draws], (0.025, 0.975)) for k in power} if draws else {}
        lines += ["| IsoFLOP (approach 1) | value | 95 % interval |", "| --- | --- | --- |",
                  *(f"| {k} | {v:.4g} | {span(spans.get(k))} |" for k, v in power.items()), ""]
    table = ["| law | coefficients | Σ Huber | residual, points / curves | left out, points / curves |" + (" held out, points / curves |" if held_out else ""),
             "| --- | --- | --- | --- | --- |" + (" --- |" if held_out else "")]
    for name in (n for n in names if n != "approach1"):
        best = laws.fit(LAWS[name], fitted_on, jobs=jobs)
        if cfg.bootstrap:
            best = laws.bootstrap(best, fitted_on, cfg.bootstrap, cfg.seed, jobs)
        fits[name] = best
        kept[name] = dict(coefficients=best.coefficients, objective=best.objective, range=reach_of(runs),
                          draws=[[float(f"{v:.7g}") for v in draw.values()] for draw in best.draws])
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
        lines += [f"| {name} | value | 95 % interval |", "| --- | --- | --- |",
                  *(f"| {k} | {f(best.coefficients):.4g} | {span(laws.interval(best, f) if best.draws else None)} |" for k, f in quantities.items()), ""]
    return kept, fits, lines


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
    cfg = configurator.load(FitConfig, argv, __doc__)
    out = Path(cfg.out)
    try:
        source = read_any(cfg.data, out)
        held_out = read_csv(cfg.held_out) if cfg.held_out else None
        groups = {objective: read_csv(source, objective) for objective in ([cfg.objective] if cfg.objective else objectives_in(source))}
        kept, reports = {}, []
        for objective, runs in groups.items():
            kept[objective], fits, lines = fit_all(cfg, runs, objective, held_out)
            reports += [f"## {objective}\n"] * bool(objective) + lines
            out.mkdir(parents=True, exist_ok=True)
            (out / f"fits{'_' * bool(objective)}{objective}.json").write_text(json.dumps(kept[objective], indent=1) + "\n")
            if cfg.figures:
                import figures

                figures.of_fit(runs, fits, out, objective)
        if {"masked", "ar"} <= kept.keys() and all("approach1" in kept[k] for k in ("masked", "ar")):
            reports += ["## Masked against AR at equal compute\n", *data_ratio(kept), ""]
    except ValueError as problem:
        configurator.fail(str(problem))
    (out / "fits.md").write_text("\n".join(reports) + "\n")
    print("\n".join(reports) + f"\nwrote {out}/")


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


def sweep_main(argv):
    """Train a grid, then fit and draw what came out."""
    import sweep

    points = sweep.main(argv)
    if points:
        fit_main([f"--data={points.parent}", f"--out={points.parent / 'fit'}"])


def plot_main(argv):
    import figures

    figures.main(argv)


def study_main(argv):
    import study

    study.main(argv)


COMMANDS = dict(plan=plan_main, fit=fit_main, sweep=sweep_main, plot=plot_main, study=study_main, tables=tables_main)


def main():
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
    elif command in COMMANDS:
        if command != "study" and importlib.util.find_spec("scipy") is None:  # a sweep ends with a fit
            configurator.fail("scaling laws need scipy: pip install '.[scaling]'")
        try:
            COMMANDS[command](argv)
        except BrokenPipeError:  # of plan or tables into head
            os._exit(1)
    else:
        configurator.fail(f"'{command}' is no command; choose from {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
