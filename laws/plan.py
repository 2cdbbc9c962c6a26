"""What to train: parameters, tokens, epochs, compute, time and expected loss, by every law (docs/math.md §9).

    python scaling.py plan --flops=1e21                         so much compute
    python scaling.py plan --gpus=8 --days=3 --price=2          … on these GPUs, at so much per GPU-hour
    python scaling.py plan --unique_tokens=1B                   so much text: how large, for how many epochs
    python scaling.py plan --params=1B --write=configurator/my_plan.py     … and the override file for it

approach 1, approach 2     the Quokka paper's printed laws for text that is seen once (masked diffusion)
eq. 15, eq. 21, eq. 23     its laws for text that is seen again and again
… refitted                 the same, fitted to the paper's runs here (results/quokka): with intervals
ours                       our law for repeated text, fitted to the paper's curves (docs/scaling-laws.md)
GIDD IsoFLOP, surface      von Rütte et al.'s two laws for masked and for uniform diffusion, text seen once
Chinchilla 1 to 3          Hoffmann et al.'s three approaches (autoregressive), for text that is seen once
Muennighoff                Muennighoff et al.'s law for repeated text (autoregressive)
… of FOLDER                what `fit` made of your own runs, named with --fits
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import configurator
import terminal
from configurator import setting
from configurator.format import human_count, human_seconds
from configurator.ladder import LADDER, ladder_params
from laws import peers
from laws.advise import (
    REFITTED,
    compute_plans,
    crossover,
    data_plans,
    format_epochs,
    known_laws,
    plans_on_text,
)
from laws.forms import QUOKKA, allocation, published_coefficients
from laws.peers import SEQ_LEN
from laws.predictions import print_next_runs
from training.flops import PEAK

MEMORY = {"H100": 80e9, "H200": 141e9, "A100": 80e9}  # bytes
STATE = 16  # bytes per parameter in fp32: weights, gradients and AdamW's two moments
TITLES = dict(masked="masked diffusion", ar="autoregressive", uniform="uniform diffusion")


@dataclass
class Config:
    """What there is. Give what you know; the rest follows."""

    flops: float = setting(0.0, "training compute, 6·N·D", low=0, high=1e40)
    params: float = setting(0.0, "parameters N (embeddings included)", low=0, high=1e20)
    tokens: float = setting(0.0, "training tokens D, repeats included", low=0, high=1e20)
    unique_tokens: float = setting(
        0.0, "tokens of text that there are: with repeats as the laws advise", low=0, high=1e20)
    epochs: float = setting(0.0, "passes over them", low=0, high=1e12)
    gpus: int = setting(8, "GPUs, for --days, and for the time that the plan takes", low=1)
    days: float = setting(0.0, "on these GPUs: compute = GPUs · days · peak · MFU", low=0)
    gpu: Literal["H100", "H200", "A100"] = setting("H100", "kind of GPU, for its peak in bf16 and its memory")
    mfu: float = setting(0.5, "share of the peak that training reaches", above=0, high=1)
    price: float = setting(0.0, "of a GPU-hour, for the cost", low=0)
    fits: str = setting(
        f"{QUOKKA}/isoflop,{QUOKKA}/epochs",
        "folders (or fits.json files) that `fit` wrote, with commas between: the refitted rows")
    from_runs: str = setting(
        "", "(--from=) CSVs or folders of your own runs that saw every token once: which next run would tell "
        "most, per FLOP, of N at this compute?")
    write: str = setting("", "write the override file for this plan")
    objective: Literal["masked", "ar"] = setting("masked", "of the plan to write")
    law: str = setting(
        "", "whose plan to write, as the table's first column names it (empty: the first that is credible)")
    corpus: str = setting("corpora/mine", "of the plan to write")

    NEEDS = {"epochs": "unique_tokens"}

    def problems(self):
        names = ("flops", "params", "tokens", "unique_tokens", "epochs", "days")
        given, problems = {name for name in names if getattr(self, name)}, []
        if not given - {"epochs"}:
            problems.append("plan for what? give flops, params, tokens, unique_tokens, or gpus and days")
        if {"flops", "days"} <= given:
            problems.append("give flops or days, not both")
        if {"unique_tokens", "tokens", "epochs"} <= given:
            problems.append("tokens = unique_tokens · epochs; leave tokens or epochs out")
        if given & {"flops", "days"} and "params" in given and given & {"epochs", "tokens"}:
            problems.append("flops = 6 · params · tokens; leave one of them out")

        if self.from_runs and not given & {"flops", "days"}:
            problems.append("from needs flops or days: the compute that N is asked for")
        path = Path(self.write)
        if self.write and (path.suffix != ".py" or not path.parent.is_dir()):
            problems.append(f"write={self.write} must be a .py file in a folder that exists")
        elif self.write and path.exists():
            problems.append(f"{self.write} exists; choose another name")
        return problems

    def flops_per_second(self):
        return self.gpus * PEAK[self.gpu] * self.mfu

    def budget(self):
        """The compute to train with, in FLOPs; 0 where the user has not fixed it."""
        return self.flops or self.days * 86400 * self.flops_per_second()


def make_plans(cfg, flops, fresh, repeated):
    """The plans of all laws, the user's own first. Raises ValueError."""
    if not cfg.unique_tokens:
        return compute_plans(cfg, flops, fresh)
    fresh_plans = []
    if flops and not (cfg.params or cfg.epochs or cfg.tokens):
        fresh_plans = compute_plans(cfg, flops, fresh)
    fresh_fit = next((law.fit for law in fresh if law.name == REFITTED), None)
    plans = plans_on_text(fresh_plans, cfg.unique_tokens)
    plans += data_plans(cfg, flops, repeated, fresh_fit, fresh_plans)
    return sorted(plans, key=lambda plan: not plan.own_data)


def suggest(cfg, plans):
    """The plan to write: the named law's, or the objective's first credible one. Raises ValueError."""
    candidates = [plan for plan in plans if plan.objective == cfg.objective]
    if not cfg.law:
        return next((plan for plan in candidates if plan.credible), candidates[0])
    for plan in candidates:
        if plan.law == cfg.law:
            return plan
    for plan in plans:
        if plan.law == cfg.law:
            raise ValueError(f"law={cfg.law} is of --objective={plan.objective}")
    raise ValueError(f"law={cfg.law}: choose from {' | '.join(plan.law for plan in candidates)}")


# -------------------------------------------------------------------------------------------- what is printed


def nearest_size(N):
    """The name of the ladder's model whose N is nearest in ratio."""
    sizes = np.array([ladder_params(*row) for _, *row in LADDER])
    return f"{round(sizes[np.abs(np.log(sizes / N)).argmin()] / 1e6)}M"


def memory_problem(cfg, N):
    """Why N parameters do not fit this GPU, or None."""
    if N * STATE <= MEMORY[cfg.gpu]:
        return None
    article = "an" if cfg.gpu[0] in "AH" else "a"
    state, memory = f"{N * STATE / 1e9:,.0f} GB", f"{MEMORY[cfg.gpu] / 1e9:.0f}"
    return (f"{human_count(N)} parameters: {state} of fp32 weights, gradients and AdamW's moments, "
            f"on every GPU of a data-parallel run; {article} {cfg.gpu} has {memory}")


def print_plans(cfg, plans, flops):
    """Print the budget, the table of plans and the notes on them."""
    # the budget
    given = [f"{flops:.3g} FLOPs"] if flops else []
    for name in ("params", "tokens", "unique_tokens", "epochs"):
        if value := getattr(cfg, name):
            given.append(f"{human_count(value)} {name.replace('_', ' ')}")
    peak = f"{cfg.mfu:.0%} of {PEAK[cfg.gpu] / 1e12:.0f} TFLOP/s"
    print(f"given {', '.join(given)}; time on {cfg.gpus} × {cfg.gpu} at {peak}\n")

    # the table
    head = ["law", "params", "tokens", "epochs", "FLOPs", "loss", "time", "cost", "ladder"]
    if not cfg.price:
        head.remove("cost")
    table = [head]
    for objective, title in TITLES.items():
        rows = [table_row(cfg, plan) for plan in plans if plan.objective == objective]
        if rows:
            table += [[title], *rows]
    columns = zip(*(row for row in table if len(row) > 1))
    widths = [max(map(len, column)) for column in columns]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())

    # the notes
    print("\n[…] are 95 % intervals. "
          "Loss: nats per token, on the text and by the tokenizer of each law's data "
          "(the paper's and Muennighoff's: C4, GPT-2's;\nChinchilla's and GIDD's: others, not comparable); "
          "masked diffusion's is an upper bound. --help says which law is which.")
    names = [plan.law for plan in plans]
    for plan in plans:
        name = f"{plan.law} ({plan.objective})" if names.count(plan.law) > 1 else plan.law
        for note in plan.notes:
            print(f"* {name}: {note}")


def print_disagreement(cfg, laws, flops):
    """Print the masked laws' ranges, and where they disagree on how N grows with compute."""
    ranges = {}
    for law in laws:
        if law.objective == "masked" and not law.own_data:
            ranges.setdefault(range_text(law.fit.data_range), []).append(law.name)
    texts = [f"{', '.join(names)}: {text}" for text, names in ranges.items()]
    print(f"* the runs behind the masked laws: {'; '.join(texts)}")

    if not flops or cfg.params or cfg.tokens:
        return
    quokka = published_coefficients()
    approach1 = quokka["approach1"]
    printed = approach1["a"], allocation(quokka["parametric"])["a"]
    theirs = [peers.local_exponent("masked", kind, flops) for kind in ("frontier", "surface")]
    budgets = flops / 10, flops, 10 * flops
    quokka_N = [approach1["k_N"] * C ** approach1["a"] for C in budgets]
    gidd_N = [peers.best_N("masked", "frontier", C) for C in budgets]
    less, here, more = (theirs_N / N for theirs_N, N in zip(gidd_N, quokka_N))
    print(f"* they disagree on the exponent of N in compute: {printed[0]:.2f} and {printed[1]:.2f} by the "
          f"Quokka paper, {theirs[0]:.2f} and {theirs[1]:.2f} by GIDD.\n"
          f"  Here that is {human_count(quokka_N[1])} against {human_count(gidd_N[1])} parameters, "
          f"{here:.2f} ×; at a tenth of the compute {less:.2f} ×, at ten times {more:.2f} ×.\n"
          "  Two sizes at a tenth of the budget would tell")


def range_text(data_range):
    """The parameters and FLOPs of a law's runs, as far as they are known."""
    parts = []
    if "N" in data_range:
        parts.append("{} to {} parameters".format(*map(human_count, data_range["N"])))
    if "flops" in data_range:
        parts.append("{:.2g} to {:.2g} FLOPs".format(*data_range["flops"]))
    return ", ".join(parts)


def table_row(cfg, plan):
    """The cells of a plan, as in print_plans' head."""
    seconds = plan.flops / cfg.flops_per_second()
    loss = "not said"
    if not math.isnan(plan.loss):
        loss = f"{plan.loss:.3f}"
        if len(plan.loss_interval):
            loss += " [{:.3f}, {:.3f}]".format(*plan.loss_interval)
    cells = [
        "  " + plan.law,
        human_count(plan.N) + format_range(plan.N_interval),
        human_count(plan.tokens) + format_range(plan.D_interval),
        format_epochs(plan.e),
        f"{plan.flops:.3g}",
        loss,
        human_seconds(seconds),
    ]
    if cfg.price:
        cells.append(f"{seconds / 3600 * cfg.gpus * cfg.price:,.0f}")
    return [*cells, nearest_size(plan.N)]


def format_range(interval):
    if not len(interval) or interval[0] >= interval[1] * 0.999:
        return ""
    return f" [{human_count(interval[0])}, {human_count(interval[1])}]"


def print_crossover(cfg, laws, flops, incredible):
    """Print from which compute on diffusion beats AR on the unique tokens.

    Laws of the user's own text are compared with each other, not with laws of other texts. incredible: the
    names of the laws whose plans are not credible.
    """
    own = [law for law in laws if law.own_data]
    ar = next(law for law in [*own, *laws] if law.objective == "ar")
    masked = [law for law in own if law.objective == "masked"] if ar.own_data else []
    if not masked:
        ar = laws[-1]
        masked = [law for law in laws if law.name in ("ours", "eq. 15")]

    print(f"\nDoes diffusion beat AR on {human_count(cfg.unique_tokens)} unique tokens? "
          f"(against {ar.name}, by which AR models never overfit)")
    for law in masked:
        start = crossover(cfg.unique_tokens, law.fit, ar.fit, **law.search)
        place = ""
        if law.searched_within_data:
            sizes, epochs = human_count(law.search["N"][1]), format_epochs(law.search["e"][1])
            place = f", within its data: up to {sizes} parameters and {epochs} epochs"

        if start is None:
            answer = f"not at any compute{place}"
        elif start == 0:
            answer = f"at every compute{place}"
        else:
            answer = f"from {start:.2g} FLOPs on"
        if start and flops:
            answer += f"; {'yes' if flops >= start else 'no'}, at {flops:.2g}"
        if law.name in incredible:
            answer += "; its losses here are not credible"
        print(f"  by {law.name}: {answer}")
    if not own:
        start = peers.critical_compute(cfg.unique_tokens)
        low, high = peers.PRABHUDESAI_RANGE["U"]
        beyond = ""
        if not low <= cfg.unique_tokens <= high:
            beyond = f"; extrapolates: its runs had {human_count(low)} to {human_count(high)} unique tokens"
        at_budget = f"; {'yes' if flops >= start else 'no'}, at {flops:.2g}" if flops else ""
        print(f"  by Prabhudesai et al.: from {start:.2g} FLOPs on{at_budget}{beyond}")


# ------------------------------------------------------------------------------------------ the override file


def override_file(cfg, plan):
    """An override file that trains `plan` by the paper's recipe (docs/math.md §10): text and warnings."""
    # the recipe
    name = nearest_size(plan.N)
    N = float(name[:-1]) * 1e6
    batch = 256 if N < 1.5e9 else 512
    batch = batch if N < 5e9 else 1024
    micro = 8 if N < 3e9 else 4
    batch = math.ceil(batch / (cfg.gpus * micro)) * cfg.gpus * micro  # whole micro-batches on every GPU
    steps = math.ceil(plan.tokens / (batch * SEQ_LEN))
    repeated = bool(cfg.unique_tokens) and plan.e > 1
    flops = 6 * N * plan.tokens

    best = peers.best_batch(plan.tokens) / SEQ_LEN  # rows

    # what may go wrong
    warnings = list(plan.notes)
    if not 0.8 < N / plan.N < 1.25:
        warnings.append(f"the plan wants {human_count(plan.N)} parameters; {name}, the ladder's nearest, "
                        f"takes {N / plan.N:.2g} × its FLOPs")
    if problem := memory_problem(cfg, N):
        warnings.append(problem)

    # the text
    kind = "Masked diffusion" if plan.objective == "masked" else "Autoregressive"
    passes = f", {format_epochs(plan.e)} epochs of {human_count(plan.U)}" if plan.e > 1 else ""
    N_planned = human_count(plan.N)
    expected = "what only training will tell: this law says nothing of the loss"
    if not math.isnan(plan.loss):
        expected = f"by this law a loss of {plan.loss:.2f} nats per token, at {N_planned} parameters"
    corpus_name = Path(cfg.corpus).name
    corpus = f"python data.py FILES --name={corpus_name} --tokenizer=gpt2"
    if not plan.law.startswith(("GIDD", "Chinchilla")):
        corpus += " (the law counts GPT-2 tokens)"
    if plan.own_data:
        corpus = "prepare it as for the runs of that law"
    time = human_seconds(flops / cfg.flops_per_second())
    comments = [
        f"{kind}: {name} parameters, {human_count(plan.tokens)} tokens{passes}.",
        f"Planned by scaling.py from {plan.law} for N = {N_planned}; {name} is the ladder's nearest model.",
        f"Hardware: {cfg.gpus} {cfg.gpu}; {flops:.2g} FLOPs, {time} at {cfg.mfu:.0%} of their peak.",
        f"Expect {expected}.",
        f"Corpus: {corpus}; at least {human_count(plan.U)} training tokens.",
        *(f"Warning: {warning}." for warning in warnings),
    ]
    if plan.objective == "masked" and not repeated:
        comments.append(f"Batch: {batch} rows are the Quokka paper's. GIDD's rule for so many tokens says "
                        f"{best:,.0f} ({human_count(best * SEQ_LEN)} tokens), with another learning rate.")
    if plan.objective == "masked":
        comments.append("estimator=count, the default, is the low-variance loss that saves some "
                        f"{peers.LOW_VARIANCE_SAVING:.0%} of the FLOPs to a given loss (Sahoo et al.).")
    if repeated:
        comments.append("Decay: the last steps, as many as in the paper; a longer decay often ends lower.")
    values = dict(
        run_dir=f"runs/{Path(cfg.write).stem}",
        corpus=cfg.corpus,
        objective=plan.objective,
        model=name,
        seq_len=SEQ_LEN,
        short_rows=0.01 if plan.objective == "masked" else 0.0,
        tokens=float(f"{plan.tokens:.6g}"),
        unique_tokens=int(plan.U) if repeated else 0,  # 0: every token is new
        batch_size=batch,
        micro_batch=micro,
        lr=2e-4 if N < 8e9 else 1.25e-4,
        lr_schedule="wsd" if repeated else "cosine",
        decay=min(1000, max(1, steps // 10)),
        warmup=min(2000, max(1, steps // 10)),
    )
    return configurator.override_text(values, comments), warnings


# ------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    cfg = configurator.load(Config, argv, __doc__, aliases={"from": "from_runs"})
    if cfg.write:
        terminal.keep_going()
    flops = cfg.budget()

    # the plans
    try:
        fresh, repeated, refused = known_laws(cfg.fits)
        plans = make_plans(cfg, flops, fresh, repeated)
        suggested = suggest(cfg, plans)
    except ValueError as problem:
        configurator.fail(str(problem))

    # what they say
    print_plans(cfg, plans, flops)
    if not cfg.unique_tokens:
        print_disagreement(cfg, fresh, flops)
    for line in refused:
        print(f"* {line}")
    once = [plan for plan in plans if plan.e == 1 and plan.tokens < cfg.unique_tokens]
    if once:
        print("* there is text enough to see every token once, as the laws that give 1 epoch want it: "
              f"{once[0].law} uses {human_count(once[0].tokens)} of it")
    if problem := memory_problem(cfg, suggested.N):
        print(f"* {problem}")
    hint = ""
    if not cfg.law:
        hint = f" ({'the first that' if suggested.credible else 'none'} is credible; --law chooses)"
    print(f"\nsuggested for {cfg.objective}: {suggested.law}{hint}")
    if cfg.unique_tokens:
        print_crossover(cfg, repeated, flops, {plan.law for plan in plans if not plan.credible})

    if cfg.from_runs:
        try:
            print_next_runs(cfg.from_runs, cfg.objective, flops)
        except (ValueError, OSError) as problem:
            configurator.fail(f"from={cfg.from_runs}: {problem}")
    if cfg.write:
        text, warnings = override_file(cfg, suggested)
        Path(cfg.write).write_text(text, encoding="utf-8")
        command = f"torchrun --nproc_per_node={cfg.gpus} train.py {cfg.write}"
        print(f"\nwrote {cfg.write} ({suggested.law}): {command}")
        for warning in warnings:
            print(f"  warning: {warning}")
