"""What to train: parameters, tokens, epochs, compute, time and expected loss, by every law (SPEC §9).

    python scaling.py plan --flops=1e21                         so much compute
    python scaling.py plan --gpus=8 --days=3 --price=2          … on these GPUs, at so much per GPU-hour
    python scaling.py plan --unique_tokens=1B                   so much text: how large, for how many epochs
    python scaling.py plan --params=1B --write=configurator/my_plan.py     … and the override file that trains it

approach 1, approach 2     the Quokka paper's laws for text that is seen once, with its printed coefficients (masked diffusion)
eq. 15, eq. 21, eq. 23     its laws for text that is seen again and again
… refitted                 the same, fitted to the paper's runs here (results/quokka): with intervals
ours                       our law for repeated text, fitted to the paper's curves (docs/scaling-laws.md)
Chinchilla 1 to 3          Hoffmann et al.'s three approaches (autoregressive); Muennighoff: theirs for repeated text
… of FOLDER                what `fit` made of your own runs, named with --fits
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import configurator
from configurator import setting
from configurator.ladder import LADDER, ladder_params
from laws import laws
from laws.laws import EQ15, EQ21, EQ23, HALF_LIFE, OURS, PARAMETRIC, Fit
from scaling import QUOKKA, fit_files, human, known_laws, reach_of, read_csv
from training.dryrun import PEAK

MEMORY = {"H100": 80e9, "H200": 141e9, "A100": 80e9}  # bytes
STATE = 16  # bytes per parameter in fp32: weights, gradients and AdamW's two moments
# What their authors' runs reached, by their abstracts; 0 where those do not say.
CHINCHILLA_REACH = dict(N=(7e7, 1.6e10), D=(5e9, 5e11))
MUENNIGHOFF_REACH = dict(N=(0, 9e9), D=(0, 9e11))


@dataclass
class Plan:
    """What there is. Give what you know; the rest follows."""

    flops: float = setting(0.0, "training compute, 6·N·D", low=0, high=1e40)
    params: float = setting(0.0, "parameters N (embeddings included)", low=0, high=1e20)
    tokens: float = setting(0.0, "training tokens D, repeats included", low=0, high=1e20)
    unique_tokens: float = setting(0.0, "tokens of text that there are: with repeats as the laws advise", low=0, high=1e20)
    epochs: float = setting(0.0, "passes over them", low=0, high=1e12)
    gpus: int = setting(8, "GPUs, for --days, and for the time that the plan takes", low=1)
    days: float = setting(0.0, "on these GPUs: compute = GPUs · days · peak · MFU", low=0)
    gpu: Literal["H100", "H200", "A100"] = setting("H100", "kind of GPU, for its peak in bf16 and its memory")
    mfu: float = setting(0.5, "share of the peak that training reaches", above=0, high=1)
    price: float = setting(0.0, "of a GPU-hour, for the cost", low=0)
    fits: str = setting(f"{QUOKKA}/isoflop,{QUOKKA}/epochs", "folders (or fits.json files) that `fit` wrote, with commas between: the refitted rows")
    write: str = setting("", "write the override file for this plan")
    objective: Literal["masked", "ar"] = setting("masked", "of the plan to write")
    law: str = setting("", "whose plan to write, as the table's first column names it (empty: the first that is credible)")
    corpus: str = setting("corpora/mine", "of the plan to write")

    def problems(self):
        wrong, given = [], {k for k in ("flops", "params", "tokens", "unique_tokens", "epochs", "days") if getattr(self, k)}
        if not given - {"epochs"}:
            wrong.append("plan for what? give flops, params, tokens, unique_tokens, or gpus and days")
        if "epochs" in given and "unique_tokens" not in given:
            wrong.append("epochs needs unique_tokens")
        if {"flops", "days"} <= given:
            wrong.append("give flops or days, not both")
        if {"unique_tokens", "tokens", "epochs"} <= given:
            wrong.append("tokens = unique_tokens · epochs; leave tokens or epochs out")
        compute, length = given & {"flops", "days"}, given & {"epochs", "tokens"}
        if compute and "params" in given and length:
            wrong.append("flops = 6 · params · tokens; leave one of them out")
        if self.write and (not self.write.endswith(".py") or not Path(self.write).parent.is_dir()):
            wrong.append(f"write={self.write} must be a .py file in a folder that exists")
        elif self.write and Path(self.write).exists():
            wrong.append(f"{self.write} exists; choose another name")
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
    D_range: tuple = ()  # where N was given and D follows

    @property
    def tokens(self):
        return self.U * self.e

    @property
    def flops(self):
        return 6 * self.N * self.tokens


class Source(NamedTuple):
    """A law that a row comes from."""

    name: str
    objective: str
    reach: dict  # of its data: {N, D, U, e or flops: (smallest, largest)}
    fitted: Fit | None  # None: a power law alone
    power: dict | None = None  # of compute-optimal N and D, for text that is seen once
    draws: tuple | list = ()  # of `power`, where there is no Fit
    searched: dict | None = None  # N and e, for repeated text: where its best choice is looked for

    limited = property(lambda self: self.searched["N"] == self.reach.get("N"))  # … no further than its data


# ---------------------------------------------------------------------------------------------------- the laws

INCREDIBLE = "not credible"
TITLES = dict(approach1="approach 1", parametric="approach 2", eq15="eq. 15", eq21="eq. 21", eq23="eq. 23", half_life="half-life law", ours="ours")


def sources_of(fits):
    """The laws for text seen once, and those for repeated text: (sources, sources). `fits` as in Plan. Raises ValueError."""
    own, once, again = laws.published(), [], []
    iso, curves = (reach_of(read_csv(QUOKKA / name)) for name in ("isoflop_points.csv", "epoch_curves.csv"))
    printed = Fit(PARAMETRIC, own["parametric"], math.nan)
    once += [Source("approach 1", "masked", iso, None, own["approach1"]), Source("approach 2", "masked", iso, printed, laws.allocation(own["parametric"]))]
    for path in fit_files(fits):
        fitted, approach1, about = known_laws(path)
        paper = about["data"] == "Quokka"
        objective = about["objective"] or "masked"

        def named(law, paper=paper, about=about):
            return TITLES[law] + (" refitted" * (law != "ours") if paper else f" of {about['data']}")

        if approach1:
            once.append(Source(named("approach1"), objective, approach1["range"], None, approach1["coefficients"], approach1["draws"]))
        for law, (f, reach) in fitted.items():
            if f.law is PARAMETRIC:
                once.append(Source(named(law), objective, reach, f, laws.allocation(f.coefficients)))
            else:
                if f.law is OURS:  # one batch size: no step at the size from which on the paper's curves had another
                    f = f._replace(coefficients=f.coefficients | dict(w=0.0), draws=[draw | dict(w=0.0) for draw in f.draws])
                reach = {k: reach[k] for k in "NU"} | dict(e=(1.0, max(1.0, reach["e"][1])))  # at one epoch all of them are laws of new tokens
                again.append(Source(named(law), objective, reach, f, searched={k: reach[k] for k in "Ne"}))
    # The first credible one is suggested: your own fits, then ours, whose error on curves left out is the smallest.
    once.sort(key=lambda source: " of " not in source.name)
    again.sort(key=lambda source: (" of " not in source.name, source.fitted.law is not OURS))
    wide = dict(N=(1e5, 1e13), e=(1.0, 1e5))  # a printed law is asked wherever its authors use it
    again += [Source(TITLES[law.name], "masked", {k: curves[k] for k in "NU"} | dict(e=(1.0, curves["e"][1])), Fit(law, own[law.name], math.nan), searched=wide) for law in (EQ15, EQ21, EQ23)]
    again.append(Source("Muennighoff", "ar", MUENNIGHOFF_REACH, Fit(HALF_LIFE, laws.MUENNIGHOFF, math.nan), searched=wide))
    once += [Source("Chinchilla 1", "ar", CHINCHILLA_REACH, None, laws.CHINCHILLA[1]), Source("Chinchilla 2", "ar", CHINCHILLA_REACH, None, laws.CHINCHILLA[2]),
             Source("Chinchilla 3", "ar", CHINCHILLA_REACH, Fit(PARAMETRIC, laws.CHINCHILLA_3, math.nan), laws.allocation(laws.CHINCHILLA_3))]
    return once, again


def outside(reach, **values):
    """Which of these values the law's data do not reach, as text."""
    beyond = []
    for what, value in values.items():
        low, high = reach.get(what, (0, math.inf))
        if not low / 1.2 <= value <= high * 1.2:
            name = dict(N="parameters", D="tokens", U="unique tokens", e="epochs", flops="compute")[what]
            beyond.append(f"{name} {value / high:.3g} × its largest" if value > high else f"{name} {low / value:.3g} × below its smallest")
    return ("extrapolates: " + ", ".join(beyond),) if beyond else ()


def compute_plans(plan, flops, once):
    """Compute-constrained rows: every token is new."""

    def choose(power):
        if plan.params and (flops or plan.tokens):
            return plan.params, plan.tokens or flops / (6 * plan.params)
        if plan.tokens and flops:
            return flops / (6 * plan.tokens), plan.tokens
        compute = flops or ((plan.params / power["k_N"]) ** (1 / power["a"]) if plan.params else (plan.tokens / power["k_D"]) ** (1 / power["b"]))
        N = plan.params or power["k_N"] * compute ** power["a"]
        return N, plan.tokens or compute / (6 * N)

    rows = []
    for name, objective, reach, fitted, power, draws, _ in once:
        N, D = choose(power)
        spread = fitted or Fit(None, {}, math.nan, draws)  # approach 1's draws are power laws themselves
        power_of = laws.allocation if fitted else dict

        def span(i, spread=spread, power_of=power_of):
            return tuple(laws.interval(spread, lambda c: choose(power_of(c))[i]))

        rows.append(Row(
            name, objective, N, D, 1.0,
            float(laws.predict(fitted, N, D)) if fitted else math.nan,
            span(0) if spread.draws and not plan.params and not (plan.tokens and flops) else (),
            tuple(laws.interval(fitted, lambda c, f=fitted, N=N, D=D: float(laws.evaluate(f.law, c, N, D)))) if fitted and fitted.draws else (),
            outside(reach, N=N, D=D, flops=6 * N * D), span(1) if spread.draws and plan.params and not plan.tokens and not flops else ()))
    return rows


def data_plans(plan, flops, again, fresh=None, least=1.0):
    """Data-constrained rows: U unique tokens, as many epochs as each law advises (or as asked for).

    `fresh`: the parametric Fit that a masked row's loss is held against: repeated tokens cannot be worth more than new ones.
    `least`: epochs from which on the best are searched; below 1 where there is text enough.
    """
    U, rows = plan.unique_tokens, []
    epochs = plan.epochs or plan.tokens / U
    for source in again:
        name, objective, reach, fitted, _, _, searched = source
        law = fitted.law

        def choose(c, law=law, searched=searched):
            if flops and (plan.params or epochs):
                N, e = (plan.params, flops / (6 * plan.params * U)) if plan.params else (flops / (6 * U * epochs), epochs)
                return laws.Choice(N, e, float(laws.evaluate(law, c, N, U, e)), False)
            return laws.best(law, c, U, N=plan.params or searched["N"], e=epochs or (least, searched["e"][1]), flops=flops or math.inf, points=120)

        found, notes = choose(fitted.coefficients), ()
        if found.edge:
            notes += ("the loss still falls at the border of " + ("its data" if source.limited else "the search"),)
        elif found.e < 1.001 and not epochs and least == 1:
            notes += ("prefers a single epoch",)
        if law is EQ15 and plan.params and not epochs and not flops:
            local = laws.eq15_best_epochs(fitted.coefficients, found.N, U)
            if found.e < 1.001 and local > 1.001:  # Table 3 prints this one
                notes += (f"its local optimum at {local:,.0f} epochs is worse",)
        notes += outside(reach, N=found.N, U=U, e=found.e, D=U * found.e)
        if fresh and objective == "masked" and " of " not in name:
            gap = float(laws.predict(fresh, found.N, U * found.e)) - found.loss
            if gap > 0.1:
                notes += (f"{gap:.2f} nats below what as many new tokens give by approach 2 refitted: {INCREDIBLE}",)
        here = lambda c, law=law, x=found: float(laws.evaluate(law, c, x.N, U, x.e))  # noqa: E731
        few = fitted._replace(draws=fitted.draws[:60])  # each is a search
        sizes = tuple(laws.interval(few, lambda c: choose(c).N)) if few.draws and not plan.params and not (flops and epochs) else ()
        rows.append(Row(name, objective, found.N, U, found.e, found.loss, sizes,
                        tuple(laws.interval(fitted, here)) if fitted.draws else (), notes))
    return rows


def crossover(U, masked, ar, N=(1e5, 1e13), e=(1.0, 1e5)):
    """The compute from which on the best masked model, within these N and e, beats the best AR model on U unique tokens, by two fits;
    None if never, 0 if always."""
    budgets = 6 * N[0] * U * np.logspace(0, 12, 49)

    def ahead(flops):
        reached = laws.best(masked.law, masked.coefficients, U, N=N, e=e, flops=flops, points=60).loss
        return reached < laws.best(ar.law, ar.coefficients, U, flops=flops, points=60).loss

    behind = np.array([not ahead(C) for C in budgets])
    if not behind.any() or behind[-1]:
        return 0.0 if not behind.any() else None
    last = int(np.flatnonzero(behind)[-1])
    low, high = budgets[last], budgets[last + 1]
    for _ in range(12):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if ahead(middle) else (middle, high)
    return float(high)


# --------------------------------------------------------------------------------------------------- what is said


def nearest(N):
    """The name of the ladder's model whose N is nearest in ratio."""
    sizes = np.array([ladder_params(*row) for _, *row in LADDER])
    return f"{round(sizes[np.abs(np.log(sizes / N)).argmin()] / 1e6)}M"


def duration(hours):
    if hours < 1 / 3600:
        return "< 1 s"
    for unit, size, limit in (("s", 1 / 3600, 90), ("min", 1 / 60, 90), ("h", 1, 48), ("days", 24, 730), ("years", 8766, 1e4)):
        if hours < size * limit:
            return f"{hours / size:.1f} {unit}"
    return f"{hours / 8766:.1e} years"


def count(e):
    return f"{e:.3g}" if e < 100 else f"{e:,.0f}"


def too_large(plan, N):
    """Why N parameters do not fit this GPU, or None."""
    if N * STATE > MEMORY[plan.gpu]:
        return (f"{human(N)} parameters: {N * STATE / 1e9:,.0f} GB of fp32 weights, gradients and AdamW's moments, on every GPU of a data-parallel run; "
                f"{'an' if plan.gpu[0] in 'AH' else 'a'} {plan.gpu} has {MEMORY[plan.gpu] / 1e9:.0f}")
    return None


def suggested(plan, rows):
    """The row to write: the first of the objective that is credible, or the named one. Raises ValueError."""
    of = [row for row in rows if row.objective == plan.objective]
    if not plan.law:
        return next((row for row in of if not any(note.endswith(INCREDIBLE) for note in row.notes)), of[0])
    for row in of:
        if row.law == plan.law:
            return row
    if other := [row.objective for row in rows if row.law == plan.law]:
        raise ValueError(f"law={plan.law} is of --objective={other[0]}")
    raise ValueError(f"law={plan.law}: choose from {' | '.join(row.law for row in of)}")


def print_plan(plan, rows, flops):
    speed = plan.gpus * PEAK[plan.gpu] * plan.mfu
    given = [f"{flops:.3g} FLOPs"] * bool(flops) + [f"{human(v)} {k.replace('_', ' ')}" for k, v in (
        ("params", plan.params), ("tokens", plan.tokens), ("unique_tokens", plan.unique_tokens), ("epochs", plan.epochs)) if v]
    print(f"given {', '.join(given)}; time on {plan.gpus} × {plan.gpu} at {plan.mfu:.0%} of {PEAK[plan.gpu] / 1e12:.0f} TFLOP/s\n")
    table = [["law", "params", "tokens", "epochs", "FLOPs", "loss", "time", *(["cost"] if plan.price else []), "ladder"]]
    for objective, title in (("masked", "masked diffusion"), ("ar", "autoregressive"), ("uniform", "uniform diffusion")):
        of = [row for row in rows if row.objective == objective]
        table += [[title]] * bool(of)
        for row in of:
            hours = row.flops / speed / 3600
            span, tokens = (f" [{human(r[0])}, {human(r[1])}]" if len(r) and r[0] < r[1] * 0.999 else "" for r in (row.N_range, row.D_range))
            band = f" [{row.loss_range[0]:.3f}, {row.loss_range[1]:.3f}]" if len(row.loss_range) else ""
            table.append(["  " + row.law, human(row.N) + span, human(row.tokens) + tokens, count(row.e), f"{row.flops:.3g}",
                          "not said" if math.isnan(row.loss) else f"{row.loss:.3f}{band}", duration(hours),
                          *([f"{hours * plan.gpus * plan.price:,.0f}"] if plan.price else []), nearest(row.N)])
    widths = [max(len(line[i]) for line in table if i < len(line) > 1) for i in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip())
    print("\n[…] are 95 % intervals. Loss: nats per token, on the text and by the tokenizer of each law's data (the paper's and Muennighoff's: C4, GPT-2's;\n"
          "Chinchilla's are others: not comparable); masked diffusion's is an upper bound. --help says which law is which.")
    names = [row.law for row in rows]
    for row in rows:
        for note in row.notes:
            print(f"* {row.law}{f' ({row.objective})' * (names.count(row.law) > 1)}: {note}")


def print_crossover(plan, again, flops, incredible):
    own = [source for source in again if " of " in source.name]  # on the user's own text: compared with each other, not with laws of other texts
    ar = next(source for source in [*own, *again] if source.objective == "ar")
    masked = [source for source in own if source.objective == "masked"] if " of " in ar.name else []
    if not masked:
        ar, masked = again[-1], [source for source in again if source.name in ("ours", "eq. 15")]
    print(f"\nDoes diffusion beat AR on {human(plan.unique_tokens)} unique tokens? (against {ar.name}, by which AR models never overfit)")
    for source in masked:
        within = source.searched
        C = crossover(plan.unique_tokens, source.fitted, ar.fitted, **within)
        where = f", within its data: up to {human(within['N'][1])} parameters and {count(within['e'][1])} epochs" if source.limited else ""
        print(f"  by {source.name}: " + (f"not at any compute{where}" if C is None else f"at every compute{where}" if C == 0 else
                                         f"from {C:.2g} FLOPs on" + (f"; {'yes' if flops >= C else 'no'}, at {flops:.2g}" if flops else ""))
              + "; its losses here are not credible" * (source.name in incredible))


def override_file(plan, row):
    """The text of an override file that trains `row` by the paper's recipe (SPEC §10), and its own warnings."""
    name = nearest(row.N)
    N = float(name[:-1]) * 1e6
    batch, micro = 256 if N < 1.5e9 else 512 if N < 5e9 else 1024, 8 if N < 3e9 else 4
    batch = math.ceil(batch / (plan.gpus * micro)) * plan.gpus * micro  # whole micro-batches on every GPU
    repeated = bool(plan.unique_tokens) and row.e > 1
    steps = math.ceil(row.tokens / (batch * 2048))
    hours = 6 * N * row.tokens / (plan.gpus * PEAK[plan.gpu] * plan.mfu) / 3600
    warnings = list(row.notes)
    if not 0.8 < N / row.N < 1.25:
        warnings.append(f"the plan wants {human(row.N)} parameters; {name}, the ladder's nearest, takes {N / row.N:.2g} × its FLOPs")
    warnings += filter(None, [too_large(plan, N)])
    kind, passes = "Masked diffusion" if row.objective == "masked" else "Autoregressive", f", {count(row.e)} epochs of {human(row.U)}" if row.e > 1 else ""
    expect = f"by this law a loss of {row.loss:.2f} nats per token, at {human(row.N)} parameters" if not math.isnan(row.loss) else "what only training will tell: this law says nothing of the loss"
    own = " of " in row.law
    text = f"""# {kind}: {name} parameters, {human(row.tokens)} tokens{passes}.
# Planned by scaling.py from {row.law} for N = {human(row.N)}; {name} is the ladder's nearest model.
# Hardware: {plan.gpus} {plan.gpu}; {6 * N * row.tokens:.2g} FLOPs, {duration(hours)} at {plan.mfu:.0%} of their peak.
# Expect {expect}.
# Corpus: {'prepare it as for the runs of that law' if own else f'python data.py FILES --name={Path(plan.corpus).name} --tokenizer=gpt2 (the law counts GPT-2 tokens)'}; at least {human(row.U)} training tokens.
""" + "".join(f"# Warning: {warning}.\n" for warning in warnings) + f"""run_dir = "runs/{Path(plan.write).stem}"
corpus = "{plan.corpus}"
objective = "{row.objective}"
model = "{name}"
seq_len = 2048
short_rows = {0.01 if row.objective == 'masked' else 0.0}
tokens = {row.tokens:.6g}
{f'unique_tokens = {int(row.U)}' if repeated else '# every token is new'}
batch_size = {batch}
micro_batch = {micro}
lr = {2e-4 if N < 8e9 else 1.25e-4}
lr_schedule = "{'wsd' if repeated else 'cosine'}"
decay = {min(1000, max(1, steps // 10))}{'  # the last steps, as many as in the paper; a longer decay often ends lower' if repeated else ''}
warmup = {min(2000, max(1, steps // 10))}
"""
    return text, warnings


def main(argv=None):
    plan = configurator.load(Plan, argv, __doc__)
    flops = plan.flops or plan.gpus * plan.days * 86400 * PEAK[plan.gpu] * plan.mfu
    try:
        once, again = sources_of(plan.fits)
        rows = []
        if plan.unique_tokens:
            if flops and not (plan.params or plan.epochs or plan.tokens):  # is there enough text to see it once?
                rows = [row for row in compute_plans(plan, flops, once) if row.tokens <= plan.unique_tokens]
            seen_once = len(rows)
            fresh = next((source.fitted for source in once if source.name == "approach 2 refitted"), None)
            rows += data_plans(plan, flops, again, fresh, least=1e-6 if rows else 1.0)
        else:
            rows = compute_plans(plan, flops, once)
        chosen = suggested(plan, rows)
    except ValueError as problem:
        configurator.fail(str(problem))
    print_plan(plan, rows, flops)
    if plan.unique_tokens and seen_once:
        print(f"* there is text enough to see every token once, as the laws that give 1 epoch want it: {rows[0].law} uses {human(rows[0].tokens)} of it")
    if problem := too_large(plan, chosen.N):
        print(f"* {problem}")
    print(f"\nsuggested for {plan.objective}: {chosen.law}" + ("" if plan.law else " (the first that is credible; --law chooses)"))
    if plan.unique_tokens:
        print_crossover(plan, again, flops, {row.law for row in rows if any(note.endswith(INCREDIBLE) for note in row.notes)})
    if plan.write:
        text, warnings = override_file(plan, chosen)
        Path(plan.write).write_text(text)
        print(f"\nwrote {plan.write} ({chosen.law}): torchrun --nproc_per_node={plan.gpus} train.py {plan.write}" + "".join(f"\n  warning: {w}" for w in warnings))
