"""What every law advises: parameters, tokens and epochs for a budget of compute or text (docs/math.md §9).

    fresh, repeated = known_laws("fits/mine")
    compute_plans(cfg, 1e21, fresh)             text is seen once
    data_plans(cfg, 0.0, repeated)              text is seen again and again

`cfg` is plan.Config: params, tokens, unique_tokens and epochs where the user has fixed them, else 0.
"""

import math
from typing import NamedTuple

import numpy as np

from configurator.format import human_count
from laws import peers
from laws.fitting import Fit, find_fits, predict, read_fits
from laws.forms import (
    CHINCHILLA,
    CHINCHILLA_3,
    EQ15,
    EQ21,
    EQ23,
    HALF_LIFE,
    MUENNIGHOFF,
    OURS,
    PARAMETRIC,
    QUOKKA,
    SAME_LOSS,
    Optimum,
    allocation,
    eq15_best_epochs,
    evaluate,
    find_optimum,
    published_coefficients,
)
from laws.identifiability import interval, undetermined_coefficients, why_undetermined
from laws.runs import data_range, read_csv

# The range of their authors' runs, by their abstracts; 0 where those do not say.
CHINCHILLA_RANGE = dict(N=(7e7, 1.6e10), D=(5e9, 5e11))
MUENNIGHOFF_RANGE = dict(N=(0, 9e9), D=(0, 9e11))
# where a printed law's best choice is searched: anywhere, as its authors use it
WIDE = dict(N=(1e5, 1e13), e=(1.0, 1e5))
# Up to FEW_EPOCHS repeated tokens are taken for nearly as good as new ones, and N for that of new text; the
# curves behind the laws for repeats are still in their warm-up there. From MANY_EPOCHS on these laws alone
# decide. FAR from its data, in decades, nothing that a law says is credible.
FEW_EPOCHS, MANY_EPOCHS, FAR = 10.0, 100.0, 1.0
TITLES = dict(approach1="approach 1", parametric="approach 2", eq15="eq. 15", eq21="eq. 21", eq23="eq. 23",
              half_life="half-life law", ours="ours")
REFITTED = "approach 2 refitted"


class PlanningLaw(NamedTuple):
    """A law to plan by."""

    name: str
    objective: str
    fit: Fit  # its law is None where only the power laws of compute-optimal N and D are known
    search: dict | None = None  # {N, e: (low, high)}: where a law for repeated text has its best choice
    own_data: bool = False  # fitted to the user's own runs, not to the paper's
    gidd: str = ""  # of GIDD's laws: surface or frontier

    @property
    def searched_within_data(self):
        return self.search["N"] == self.fit.data_range.get("N")

    def power(self, coefficients):
        """The power laws of compute-optimal N and D."""
        return allocation(coefficients) if self.fit.law else coefficients

    def best_sizes(self, cfg, flops, coefficients):
        """N and D: what the user has fixed, the rest as the law has it."""
        if self.gidd:
            return gidd_sizes(cfg, flops, self.objective, self.gidd)
        return optimal_sizes(cfg, flops, self.power(coefficients))


class Plan(NamedTuple):
    """What one law advises. Intervals are 95 % ones, empty where there are no draws."""

    law: str
    objective: str
    N: float
    U: float
    e: float
    loss: float = math.nan  # nan: the law says nothing of the loss
    N_interval: tuple = ()
    loss_interval: tuple = ()
    D_interval: tuple = ()  # where N was fixed and D follows
    notes: tuple = ()
    credible: bool = True
    own_data: bool = False

    @property
    def tokens(self):
        return self.U * self.e

    @property
    def flops(self):
        return 6 * self.N * self.tokens


# --------------------------------------------------------------------------------------------- the known laws


def known_laws(fits):
    """The laws for text seen once, those for repeated text, and a line for each that is refused.

    Lists of PlanningLaw, and of text. fits: a comma list as in plan.Config. The first credible plan is
    suggested, so the user's own fits come first, then ours, whose error on curves left out is the smallest.
    Raises ValueError where a file has no law to plan by.
    """
    published = published_coefficients()
    isoflop = data_range(read_csv(QUOKKA / "isoflop_points.csv"))
    curves = data_range(read_csv(QUOKKA / "epoch_curves.csv"))

    # the paper's approaches, and the user's fits
    approach1 = Fit(None, published["approach1"], data_range=isoflop)
    approach2 = Fit(PARAMETRIC, published["parametric"], data_range=isoflop)
    fresh = [PlanningLaw("approach 1", "masked", approach1), PlanningLaw("approach 2", "masked", approach2)]
    repeated, refused = [], []
    for path in find_fits(fits):
        fresh_in_file, repeated_in_file, refused_in_file = laws_in_file(path)
        if refused_in_file and not fresh_in_file + repeated_in_file:
            raise ValueError(f"{path}: {'; '.join(refused_in_file)}")
        fresh += fresh_in_file
        repeated += repeated_in_file
        refused += refused_in_file
    fresh.sort(key=lambda law: not law.own_data)
    repeated.sort(key=lambda law: (not law.own_data, law.fit.law is not OURS))

    # the printed laws for repeated text
    paper_range = dict(N=curves["N"], U=curves["U"], e=(1.0, curves["e"][1]))
    for law in (EQ15, EQ21, EQ23):
        fit = Fit(law, published[law.name], data_range=paper_range)
        repeated.append(PlanningLaw(TITLES[law.name], "masked", fit, WIDE))
    fit = Fit(HALF_LIFE, MUENNIGHOFF, data_range=MUENNIGHOFF_RANGE)
    repeated.append(PlanningLaw("Muennighoff", "ar", fit, WIDE))

    # GIDD's, of masked and of uniform diffusion
    reach = dict(N=tuple(map(float, peers.with_embeddings(peers.RANGE["P"]))), flops=peers.RANGE["C"])
    slowest, fastest = peers.flops_per_token(reach["N"])[::-1]
    reach["D"] = float(reach["flops"][0] / slowest), float(reach["flops"][1] / fastest)
    for noise in ("masked", "uniform"):
        surface = Fit(peers.GIDD, peers.SURFACES[noise], data_range=reach)
        frontier = Fit(None, {}, data_range=reach)
        fresh.append(PlanningLaw("GIDD IsoFLOP", noise, frontier, gidd="frontier"))
        fresh.append(PlanningLaw("GIDD surface", noise, surface, gidd="surface"))

    # Chinchilla's
    for approach, power in CHINCHILLA.items():
        fit = Fit(None, power, data_range=CHINCHILLA_RANGE)
        fresh.append(PlanningLaw(f"Chinchilla {approach}", "ar", fit))
    fit = Fit(PARAMETRIC, CHINCHILLA_3, data_range=CHINCHILLA_RANGE)
    fresh.append(PlanningLaw("Chinchilla 3", "ar", fit))
    return fresh, repeated, refused


def laws_in_file(path):
    """The laws of a fits.json, as known_laws returns them."""
    file = read_fits(path)
    own_data = file.data != "Quokka"
    objective = file.objective or "masked"

    def title(law):
        if own_data:
            return f"{TITLES[law]} of {file.data}"
        return TITLES[law] if law == "ours" else f"{TITLES[law]} refitted"

    fresh, repeated, refused = [], [], []
    if file.approach1:
        fresh.append(PlanningLaw(title("approach1"), objective, file.approach1, own_data=own_data))
    for name, fit in file.fits.items():
        if names := undetermined_coefficients(fit):
            refused.append(f"no plan by {title(name)}: its data do not determine {', '.join(names)} "
                           f"({why_undetermined(fit)})")
            continue
        if fit.law is PARAMETRIC:
            fresh.append(PlanningLaw(title(name), objective, fit, own_data=own_data))
            continue
        if fit.law is OURS:
            fit = with_one_batch_size(fit)
        range_e = (1.0, max(1.0, fit.data_range["e"][1]))  # at one epoch all of them are laws of new tokens
        fit = fit._replace(data_range=dict(N=fit.data_range["N"], U=fit.data_range["U"], e=range_e))
        search = dict(N=fit.data_range["N"], e=range_e)
        repeated.append(PlanningLaw(title(name), objective, fit, search, own_data))
    return fresh, repeated, refused


def with_one_batch_size(fit):
    """Our law without the step at the size from which on the paper's curves had another batch size."""
    draws = [draw | dict(w=0.0) for draw in fit.draws]
    column = list(fit.law.starts(1, 1, 1)).index("w")
    axes = [[*axis[:column], 0.0, *axis[column + 1 :]] for axis in fit.axes]
    return fit._replace(coefficients=fit.coefficients | dict(w=0.0), draws=draws, axes=axes)


# ------------------------------------------------------------------------------------------ text is seen once


def compute_plans(cfg, flops, laws):
    """The plan of every law where every token is new."""
    return [compute_plan(cfg, flops, law) for law in laws]


def compute_plan(cfg, flops, law):
    fit = law.fit
    N, D = law.best_sizes(cfg, flops, fit.coefficients)

    def interval_of(index):
        return tuple(interval(fit, lambda c: law.best_sizes(cfg, flops, c)[index]))

    loss, loss_interval, N_interval, D_interval = math.nan, (), (), ()
    if fit.law:
        loss = float(predict(fit, N, D))
    if fit.law and fit.draws:
        loss_interval = tuple(interval(fit, lambda c: float(evaluate(fit.law, c, N, D))))
    if fit.draws and not cfg.params and not (cfg.tokens and flops):
        N_interval = interval_of(0)
    if fit.draws and cfg.params and not cfg.tokens and not flops:
        D_interval = interval_of(1)

    notes = extrapolation(fit.data_range, N=N, D=D, flops=6 * N * D)
    if law.gidd:
        P, M = float(peers.without_embeddings(N)), float(peers.flops_per_token(N))
        notes += (f"converted: {human_count(P)} parameters without embeddings, {M:.3g} FLOPs per token where "
                  f"6·N is {6 * N:.3g}; another tokenizer and corpus",)
        follows = [cfg.params, cfg.tokens, flops].count(0) == 2  # N and D are the law's own choice
        if law.gidd == "frontier" and follows:
            loss = peers.frontier_optimum(law.objective, M * D)[2]
    credible = max(distance(fit.data_range, N=N, D=D).values()) < FAR
    return Plan(law.name, law.objective, N, D, 1.0, loss, N_interval, loss_interval, D_interval, notes,
                credible, law.own_data)


def optimal_sizes(cfg, flops, power):
    """N and D: what the user has fixed, the rest by the power laws."""
    if cfg.params and (flops or cfg.tokens):
        return cfg.params, cfg.tokens or flops / (6 * cfg.params)
    if cfg.tokens and flops:
        return flops / (6 * cfg.tokens), cfg.tokens

    # by N = k_N·C^a alone, as D = C/(6N): printed k_D and b are rounded for themselves
    if flops:
        compute = flops
    elif cfg.params:
        compute = (cfg.params / power["k_N"]) ** (1 / power["a"])
    else:
        compute = (6 * power["k_N"] * cfg.tokens) ** (1 / (1 - power["a"]))
    N = cfg.params or power["k_N"] * compute ** power["a"]
    return N, cfg.tokens or compute / (6 * N)


def gidd_sizes(cfg, flops, noise, kind):
    """As `optimal_sizes`, by one of GIDD's laws, whose N is no power of compute in our units."""
    N, D = cfg.params, cfg.tokens
    if N and not D:
        D = flops / (6 * N) if flops else peers.best_tokens(noise, kind, N)
    elif D and not N:
        N = flops / (6 * D) if flops else peers.best_size(noise, kind, D)
    elif not N:
        N = peers.best_N(noise, kind, flops)
        D = flops / (6 * N)
    return N, D


def extrapolation(data_range, **values):
    """A note on the values that the law's data do not reach, in a tuple; empty where there are none."""
    names = dict(N="parameters", D="tokens", U="unique tokens", e="epochs", flops="compute")
    beyond = []
    for quantity, value in values.items():
        low, high = data_range.get(quantity, (0, math.inf))
        if value > high * 1.2:
            beyond.append(f"{names[quantity]} {value / high:.3g} × its largest")
        elif value < low / 1.2:
            beyond.append(f"{names[quantity]} {low / value:.3g} × below its smallest")
    return ("extrapolates: " + ", ".join(beyond),) if beyond else ()


# ----------------------------------------------------------------------------------------- text is seen again


def plans_on_text(plans, U):
    """Plans for new text on U unique tokens: as they are where these suffice, else with passes over them.

    Left out where they want too many passes; beyond a few, as the first plan counts them, not credible.
    """
    first, kept = first_plans(plans), []
    for plan in plans:
        e = plan.tokens / U
        few = first[plan.objective].tokens <= FEW_EPOCHS * U
        if e > 1:
            note = f"counts {e:.3g} passes over the text as new text"
            plan = plan._replace(U=U, e=e, notes=(*plan.notes, note), credible=plan.credible and few)
        if e <= MANY_EPOCHS:
            kept.append(plan)
    return kept


def first_plans(plans):
    """{objective: its first plan}."""
    return {plan.objective: plan for plan in reversed(plans)}


def data_plans(cfg, flops, laws, fresh_fit=None, fresh_plans=()):
    """The plan of every law for cfg.unique_tokens, with the epochs that it advises or the user has fixed.

    fresh_fit: the parametric Fit that a masked plan's loss is held against: repeated tokens cannot be worth
    more than new ones. fresh_plans: what to do with the compute if text were plenty; they are followed where
    it falls short by a few epochs, or far from a law's data.
    """
    first = first_plans(fresh_plans)
    return [data_plan(cfg, flops, law, fresh_fit, first.get(law.objective)) for law in laws]


def data_plan(cfg, flops, law, fresh_fit=None, fresh_plan=None):
    fit, U = law.fit, cfg.unique_tokens
    epochs = cfg.epochs or cfg.tokens / U
    choice, trust = best_choice(cfg, flops, law, fit.coefficients, fresh_plan)

    # notes
    notes = ()
    if fresh_plan and fresh_plan.tokens > U and trust < 1:
        share = "" if not trust else f", by {trust:.0%} moved towards its own"
        notes += (f"as many parameters as for new text by {fresh_plan.law}{share}",)
    if choice.on_border:
        notes += (no_minimum(law, choice, U),)
    elif choice.e < 1.001 and not epochs and not fresh_plan:
        notes += ("prefers a single epoch",)
    if fit.law is EQ15 and cfg.params and not epochs and not flops:
        local = eq15_best_epochs(fit.coefficients, choice.N, U)
        if choice.e < 1.001 and local > 1.001:  # Table 3 prints this one
            notes += (f"its local optimum at {local:,.0f} epochs is worse",)
    notes += extrapolation(fit.data_range, N=choice.N, U=U * min(choice.e, 1), e=choice.e, D=U * choice.e)
    far = distance(fit.data_range, N=choice.N, U=U * min(choice.e, 1))
    credible = max(far.values()) < FAR
    if not credible:
        notes += (f"{far['U']:.1f} decades in unique tokens and {far['N']:.1f} in parameters away from its "
                  "data: not credible",)

    # is so much of repeated tokens credible?
    if fresh_fit and law.objective == "masked" and not law.own_data:
        gap = float(predict(fresh_fit, choice.N, U * choice.e)) - choice.loss
        if gap > 0.1:
            credible = False
            notes += (f"{gap:.2f} nats below what as many new tokens give by {REFITTED}: not credible",)

    # intervals
    loss_interval, N_interval = (), ()
    if fit.draws:
        loss_interval = tuple(interval(fit, lambda c: float(evaluate(fit.law, c, choice.N, U, choice.e))))
    if fit.draws and trust and not cfg.params and not (flops and epochs):
        few = fit._replace(draws=fit.draws[:60])  # each is a search
        N_interval = interval(few, lambda c: best_choice(cfg, flops, law, c, fresh_plan)[0].N)
    if fresh_plan and fresh_plan.N_interval and trust < 1:
        spread = (np.array(fresh_plan.N_interval) / fresh_plan.N) ** (1 - trust)
        N_interval = (np.array(N_interval) if trust else choice.N) * spread
    return Plan(law.name, law.objective, choice.N, U, choice.e, choice.loss, tuple(N_interval), loss_interval,
                notes=notes, credible=credible, own_data=law.own_data)


def format_epochs(e):
    return f"{e:.3g}" if e < 100 else f"{e:,.0f}"


def no_minimum(law, choice, U):
    """The note on a choice where the law has no minimum."""
    where = "within its data" if law.searched_within_data else "falls for ever"
    return (f"no minimum ({where}); within {SAME_LOSS:g} nats of its lowest at {human_count(choice.N)} × "
            f"{format_epochs(choice.e)} epochs, {6 * choice.N * U * choice.e:.2g} FLOPs")


def best_choice(cfg, flops, law, c, fresh_plan=None):
    """The Optimum by these coefficients of the law, and how far its own choice of N was followed, 0 to 1.

    What the user has fixed stays, the rest is searched. Where compute binds, a few epochs keep the N that is
    compute-optimal for new text, since their tokens are nearly as good; the more epochs, and the nearer to
    its data, the more the law for repeats decides. So N has no jump where text just falls short.
    """
    U, form = cfg.unique_tokens, law.fit.law
    epochs = cfg.epochs or cfg.tokens / U
    if flops and (cfg.params or epochs):  # nothing is free
        N = cfg.params or flops / (6 * U * epochs)
        e = flops / (6 * cfg.params * U) if cfg.params else epochs
        return Optimum(N, e, float(evaluate(form, c, N, U, e)), False), 1.0

    search_N, search_e = law.search["N"], law.search["e"]
    if not fresh_plan:
        N, e = cfg.params or search_N, epochs or search_e
        return find_optimum(form, c, U, N, e, flops or math.inf, points=120), 1.0

    # N for new text, or the law's own, or between
    N, passes, trust = fresh_plan.N, fresh_plan.tokens / U, 0.0
    if passes > FEW_EPOCHS:
        many = FEW_EPOCHS, max(FEW_EPOCHS, search_e[1])
        own = find_optimum(form, c, U, (min(N, search_N[0]), search_N[1]), many, flops, points=120)
        far = max(distance(law.fit.data_range, N=own.N, U=U).values())
        trust = min(1.0, math.log(passes / FEW_EPOCHS) / math.log(MANY_EPOCHS / FEW_EPOCHS))
        trust *= max(0.0, 1 - far / FAR)
        if trust == 1:
            return own, trust
        N = math.exp((1 - trust) * math.log(N) + trust * math.log(own.N))

    # as many epochs as are best at this N, or as compute allows
    e = min(1.0, flops / (6 * N * U)), max(search_e[1], passes)
    return find_optimum(form, c, U, N, e, flops, points=120), trust


def distance(data_range, **values):
    """How many decades each quantity lies outside of the data's range: {quantity: 0 or more}."""
    far = {}
    for quantity, value in values.items():
        low, high = data_range.get(quantity, (0, math.inf))
        below = math.log10(low / value) if low else 0.0
        above = math.log10(value / high) if high < math.inf else 0.0
        far[quantity] = max(below, above, 0.0)
    return far


def crossover(U, masked, ar, N=(1e5, 1e13), e=(1.0, 1e5)):
    """The compute from which on masked diffusion beats AR on U unique tokens, by two Fits.

    None if never, 0 if always. The best masked model within these N and e is compared with the best AR model
    of any.
    """
    budgets = 6 * N[0] * U * np.logspace(0, 12, 49)

    def masked_is_ahead(flops):
        masked_loss = find_optimum(masked.law, masked.coefficients, U, N=N, e=e, flops=flops, points=60).loss
        return masked_loss < find_optimum(ar.law, ar.coefficients, U, flops=flops, points=60).loss

    behind = np.array([not masked_is_ahead(flops) for flops in budgets])
    if not behind.any():
        return 0.0
    if behind[-1]:
        return None

    last = int(np.flatnonzero(behind)[-1])
    low, high = budgets[last], budgets[last + 1]
    for _ in range(12):
        middle = math.sqrt(low * high)
        if masked_is_ahead(middle):
            high = middle
        else:
            low = middle
    return float(high)
