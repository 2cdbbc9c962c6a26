"""Figures of scaling laws: the paper's, from its numbers, or those of your own sweep.

    python scaling.py plot                                     the paper's, into figures/
    python scaling.py plot --data=runs/sweep                   a sweep's, with the laws in runs/sweep/fit
    python scaling.py plot --which=contours --format=pdf       one of them

valleys     loss against parameters at equal compute: a parabola per budget, its minimum marked (approach 1)
frontier    compute-optimal parameters and tokens against compute, beside Chinchilla and open models
parametric  the same runs, with the curves of the parametric law (approach 2)
epochs      validation loss against epochs, a panel per amount of unique tokens, with a law's curves (a file per law)
contours    a law's loss over parameters and epochs, its optimum, the best epochs of every size (a file per law)
unique      the best loss, and the epochs and parameters that reach it, against unique tokens, by every law
residuals   by how much every law misses, against epochs and parameters
crossover   masked diffusion beside AR on the same unique tokens, and where it gets ahead: at every size, and over all sizes
"""

import functools
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import configurator
import scaling
from configurator import setting, split
from laws import laws
from laws.laws import HALF_LIFE, PARAMETRIC, Fit, Runs
from scaling import QUOKKA, human

# Colours that colour-blind readers tell apart (Okabe and Ito). Lines are dashed for what the paper prints, solid for what is fitted.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555"
NAMES = dict(quokka=("Quokka (masked)", BLUE), masked=("masked diffusion", BLUE), ar=("autoregressive", ORANGE), uniform=("uniform diffusion", GREEN),
             parametric=("approach 2", SKY), eq15=("eq. 15", YELLOW), eq21=("eq. 21", GREEN), eq23=("eq. 23", PINK), ours=("our law", BLUE),
             half_life=("half-life law", ORANGE))
# Parameters and training tokens as their reports and model cards state them. Dream 7B is left out: it starts from Qwen2.5 7B, so that
# only a small part of its tokens trained a diffusion model.
MODELS = {"LLaDA (masked)": ("*", [(8.0e9, 2.3e12)]), "Llama 2": ("o", [(6.7e9, 2e12), (69e9, 2e12)]), "Llama 3": ("s", [(8.0e9, 15e12), (70.6e9, 15e12)]),
          "Llama 3.1": ("D", [(405e9, 15.6e12)]), "Qwen2.5": ("^", [(7.6e9, 18e12), (72.7e9, 18e12)]), "Qwen3": ("v", [(8.2e9, 36e12)])}
LOSS, N_AXIS, COMPUTE = "loss (nats per token)", "parameters N", "training compute (FLOPs)"


@dataclass
class Config:
    out: str = setting("figures", "folder to write into")
    data: str = setting("", "a sweep's folder with points.csv or curves.csv, or such a CSV (empty: the paper's numbers, results/quokka)")
    fits: str = setting("", "folders or fits.json files that `fit` wrote, with commas (empty: those beside the data, if there are any)")
    which: str = setting("", "with commas, which of the figures above (empty: all that the data allow)")
    laws: str = setting("", "with commas, the laws to draw, such as ours or eq15_printed (empty: all)")
    format: Literal["png", "pdf"] = setting("png", "of the files")

    def problems(self):
        return [f"which: '{name}' is not one of {', '.join(FIGURES)}" for name in split(self.which) if name not in FIGURES]


class Group(NamedTuple):
    """The runs of one objective (or of the paper, 'quokka'), and the laws to draw over them: {name: Fit}; names that end in _printed are the paper's."""

    objective: str
    runs: Runs
    laws: dict

    repeats = property(lambda self: bool(self.runs.e.max() > 1.01))
    title = property(lambda self: NAMES.get(self.objective, (self.objective or "runs",))[0])
    suffix = property(lambda self: f"_{self.objective}" if self.objective not in ("", "quokka") else "")


def read(cfg):
    """The groups that `cfg` names. Raises ValueError."""
    if cfg.data:
        path = scaling.read_any(cfg.data, Path(cfg.out))
        groups = [Group(objective, scaling.read_csv(path, objective), {}) for objective in scaling.objectives_in(path)]
        files = scaling.fit_files(cfg.fits) or sorted(map(str, Path(cfg.data).glob("fit/fits*.json")))
    else:
        groups = [Group("quokka", scaling.read_csv(QUOKKA / name), {}) for name in ("isoflop_points.csv", "epoch_curves.csv")]
        files = scaling.fit_files(cfg.fits) or [str(p) for p in (QUOKKA / "isoflop/fits.json", QUOKKA / "epochs/fits.json") if p.is_file()]
    own, known = laws.published(), {}
    for file in files:  # fits_ar.json holds AR's
        known.setdefault(Path(file).stem.partition("_")[2], {}).update({k: f for k, (f, _) in scaling.known_laws(file)[0].items()})
    for group in groups:
        if group.objective == "quokka":
            group.laws.update({f"{k}_printed": Fit(laws.LAWS[k], own[k], math.nan) for k in ("parametric", "eq15", "eq21", "eq23")})
        group.laws.update(known.get(group.objective, known.get("", {})))
        for name in [k for k, f in group.laws.items() if (f.law is PARAMETRIC) == group.repeats]:  # it is not for these data
            del group.laws[name]
    wanted, there = split(cfg.laws), {k for group in groups for k in group.laws}
    if unknown := [k for k in wanted if k not in there]:
        raise ValueError(f"laws: there is no {', '.join(unknown)} for these data; choose from {', '.join(sorted(there)) or 'none: fit them first'}")
    return [group._replace(laws={k: f for k, f in group.laws.items() if k in wanted or not wanted}) for group in groups]


def pick(groups, repeats, with_laws=False):
    """Those groups that a figure can show; raises ValueError if there are none."""
    found = [g for g in groups if g.repeats == repeats and (g.laws or not with_laws)]
    if not found:
        what = "runs over several epochs" if repeats else "IsoFLOP runs (every token seen once)"
        raise ValueError(f"the data hold no {what}" + " with a fitted law (python scaling.py fit, then --fits=its folder)" * with_laws)
    return found


# ------------------------------------------------------------------------------------------------------ drawing


def panels(n, columns=None, width=4.0, height=3.3, **options):
    """A figure with n panels, as an array of rows."""
    from matplotlib.figure import Figure

    columns = columns or (n if n < 4 else math.ceil(n / 2) if n < 9 else 4)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat[n:]:
        ax.set_axis_off()
    return figure, axes


def finish(ax, x="", y="", text=human, log_y=False, legend=None):
    """Labels, logarithmic axes with ticks as people write them, and the legend, when all is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set(xlabel=x, ylabel=y, xscale="log", **({"yscale": "log"} if log_y else {}))
    for axis, write in ((ax.xaxis, text), (ax.yaxis, human))[: 1 + log_y]:
        low, high = sorted(axis.get_view_interval())
        axis.set_major_locator(LogLocator(subs=(1,) if high / low > 3e3 else (1, 3) if high / low > 20 else (1, 2, 5), numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _, write=write: write(value)))
    ax.grid(alpha=0.25, lw=0.5)
    ax.tick_params(labelsize=8)
    if legend is not None:
        ax.legend(**dict(fontsize=7.5, title_fontsize=7.5, framealpha=0.8, borderpad=0.3, labelspacing=0.25, handlelength=1.8) | legend)


def scientific(x):
    factor, power = f"{x:.2e}".split("e")
    return (f"${float(factor):g}\\cdot" if float(factor) != 1 else "$") + f"10^{{{int(power)}}}$"


def shades(values):
    """value -> colour: viridis by logarithm, without its palest end."""
    import matplotlib

    low, high = np.log(min(values)), np.log(max(values))
    return lambda value: matplotlib.colormaps["viridis"](0.9 * (np.log(value) - low) / (high - low) if high > low else 0.4)


def style(name):
    """How a law is drawn and what it is called."""
    law, printed, _ = name.partition("_printed")
    title, colour = NAMES.get(law, (law, GREY))
    return dict(color=colour, ls="--" if printed else "-", label=title + (", printed" if printed else "" if law == "ours" else ", fitted"))


def save(figure, path):
    """A PDF, or a PNG of 256 colours, which is a third as large."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pdf":
        figure.savefig(path)
    else:
        figure.savefig(drawn := io.BytesIO(), dpi=125)
        Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)
    return path


def curves(runs):
    """Every curve by itself, by size, its points in the order of their epochs."""
    each = [runs.select(runs.curve == k) for k in np.unique(runs.curve)]
    return sorted((curve.select(np.argsort(curve.e)) for curve in each), key=lambda curve: curve.N[0])


def height(runs):
    """Where a loss axis may end: above every curve's minimum and most of the overfitting, below the first steps."""
    return max(np.quantile(runs.loss, 0.97), *(curve.loss.min() for curve in curves(runs))) * 1.02


# ---------------------------------------------------------------------------------------- every token seen once


def valleys(groups, by_law=False):
    """Loss against N, a colour per budget, with each budget's parabola, or with the parametric laws."""
    groups = pick(groups, False, by_law)
    figure, axes = panels(len(groups), width=5.5, height=4.5, sharey=True)
    for group, ax in zip(groups, axes.flat):
        budget, colour = laws.budget_of(group.runs), shades(group.runs.flops)
        for k in range(budget.max() + 1):
            runs = group.runs.select(budget == k)
            flops, N = laws.geometric_mean(runs.flops), np.geomspace(runs.N.min(), runs.N.max(), 100)
            ax.plot(runs.N, runs.loss, "o", ms=3.5, color=colour(flops), label=scientific(flops))
            for name, fitted in group.laws.items() if by_law else ():
                ax.plot(N, laws.predict(fitted, N, flops / (6 * N)), color=colour(flops), lw=1, ls=style(name)["ls"], gid=name)
            try:
                valley = None if by_law else laws.valleys(runs)
            except ValueError:  # too few sizes, or no minimum: the points say so
                continue
            if valley:
                ax.plot(N, np.polyval(valley.parabola[0], np.log10(N)), color=colour(flops), lw=1)
                ax.plot(valley.N, valley.loss, "*", ms=10, color=colour(flops), mec="black", mew=0.6, gid="minimum", zorder=5)
        finish(ax, N_AXIS, LOSS, legend=dict(title="FLOPs" if by_law else "FLOPs; ★ minimum", ncols=2))
        lines = "; ".join(f"{'dashed' if 'printed' in k else 'solid'}: {style(k)['label']}" for k in group.laws)
        ax.set_title(f"{group.title}: loss at equal compute" + f"\n{lines}" * by_law, fontsize=10)
    yield ("parametric" if by_law else "valleys") + (groups[0].suffix if len(groups) == 1 else ""), figure


def frontier(groups):
    groups = pick(groups, False)
    figure, axes = panels(2, width=5.2, height=4.8)
    flops = np.concatenate([g.runs.flops for g in groups])
    large = flops.max() > 1e17  # smaller runs tell nothing about other people's models
    C = np.geomspace(flops.min() / 2, 1e26 if large else flops.max() * 30, 100)
    for ax, k, power, label in zip(axes[0], ("k_N", "k_D"), ("a", "b"), ("parameters N", "training tokens D")):
        lines = []
        for group in groups:
            found, colour = laws.valleys(group.runs), NAMES.get(group.objective, ("", BLUE))[1]
            band = [draw[k] * C ** draw[power] for draw in laws.bootstrap_valleys(group.runs, 200)]
            ax.fill_between(C, *np.quantile(band, (0.025, 0.975), axis=0), color=colour, alpha=0.2, lw=0)
            ax.plot(found.flops, found.N if k == "k_N" else found.flops / (6 * found.N), "o", ms=4, color=colour, gid="minima", zorder=4)
            lines.append((found.power_laws(), dict(color=colour, lw=2, label=f"{group.title}, approach 1, 95 %")))
            lines += [(laws.allocation(f.coefficients), style(name) | dict(color=YELLOW if colour == ORANGE else SKY, label=f"{group.title}, {style(name)['label']}"))
                      for name, f in group.laws.items()]
        for i, law in ((1, laws.CHINCHILLA[1]), (3, laws.allocation(laws.CHINCHILLA_3))) if large else ():
            lines.append((law, dict(color=ORANGE, ls="-" if i == 1 else ":", label=f"Chinchilla (AR), approach {i}")))
        for law, options in lines:
            ax.plot(C, law[k] * C ** law[power], gid="law", **options)
        for name, (marker, sizes) in MODELS.items() if large else ():
            ax.plot([6 * N * D for N, D in sizes], [N if k == "k_N" else D for N, D in sizes], marker, color=PINK if "masked" in name else GREY,
                    mec="black", mew=0.5, ms=12 if marker == "*" else 6, label=name, zorder=5)
        finish(ax, COMPUTE, f"compute-optimal {label}", scientific, log_y=True, legend={} if k == "k_N" else None)
    yield "frontier" + (groups[0].suffix if len(groups) == 1 else ""), figure


# ------------------------------------------------------------------------------------------------ repeated tokens


def epochs(groups):
    """Each curve, and the law's (dashed) over the same epochs."""
    for group, name in [(g, name) for g in pick(groups, True) for name in g.laws or [""]]:
        runs, colour, budgets = group.runs, shades(group.runs.N), np.unique(group.runs.U)
        figure, axes = panels(len(budgets))
        for U, ax in zip(budgets, axes.flat):
            here = runs.select(runs.U == U)
            for curve in curves(here):
                N, e = curve.N[0], np.geomspace(curve.e[0], curve.e[-1], 200)
                ax.plot(curve.e, curve.loss, color=colour(N), lw=1.6, label=human(N), marker="o" if len(curve.e) < 20 else None, ms=3)
                if name:
                    ax.plot(e, laws.predict(group.laws[name], N, U, e), color=colour(N), lw=1.1, ls=(0, (4, 2)), gid="law")
            low, high = here.loss.min(), height(here)
            ax.set(title=f"{human(U)} unique tokens", ylim=(low - 0.12 * (high - low), high))
            finish(ax, legend=dict(title="parameters", ncols=2, loc="lower left"))
        figure.supxlabel("epochs e", fontsize=10)
        figure.supylabel(f"validation {LOSS}", fontsize=10)
        figure.suptitle(f"{group.title}: training on few tokens" + (f"; dashed: {style(name)['label']}" if name else ""), fontsize=11)
        yield f"epochs{'_' * bool(name)}{name}{group.suffix}", figure


def contours(groups):
    """The loss over parameters and epochs; each panel's levels are counted from its lowest loss, so that they can be compared."""
    from matplotlib.colors import BoundaryNorm

    levels = [0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    for group, name, fitted in [(g, *law) for g in pick(groups, True, True) for law in g.laws.items()]:
        runs, budgets = group.runs, np.unique(group.runs.U)
        budgets = budgets[np.unique(np.linspace(0, len(budgets) - 1, 6).round().astype(int))]
        N, e = np.geomspace(runs.N.min() / 3, runs.N.max() * 5, 120), np.geomspace(1, max(100, runs.e.max() * 3), 120)
        figure, axes = panels(len(budgets))
        for U, ax in zip(budgets, axes.flat):
            best = functools.partial(laws.best, fitted.law, fitted.coefficients, U, e=(1.0, e[-1]))
            found, each = best(N=(N[0], N[-1])), [best(N=float(n), points=60) for n in N[::3]]
            above = laws.predict(fitted, N, U, e[:, None]) - found.loss
            filled = ax.contourf(N, e, np.maximum(above, 1e-6), levels, cmap="viridis_r", norm=BoundaryNorm(levels, 256, extend="max"), extend="max")
            for options in (dict(color="white", lw=2), dict(color="black", lw=1.2, ls="--")):
                ax.plot(N[::3], [np.nan if choice.edge else choice.e for choice in each], gid="path", **options)
            ax.plot(found.N, found.e, "*", ms=13, color="white" if found.edge else ORANGE, mec=ORANGE if found.edge else "white", mew=0.8, gid="optimum", zorder=5, clip_on=False)
            ax.axhline(runs.e.max(), color="white", lw=0.8, ls=":")
            ax.vlines(np.unique(runs.N[runs.U == U]), 1, e[-1] ** 0.03, color="white", lw=1.5)
            where = f"{found.loss:.3f} at {human(found.N)}, {human(found.e)} epochs"
            ax.set_title(f"{human(U)} unique tokens\n" + (f"no optimum here: {where}" if found.edge else f"★ {where}"), fontsize=9, pad=9)
            finish(ax, log_y=True)
            ax.grid(False)
        figure.colorbar(filled, ax=axes, shrink=0.8, ticks=levels, format=lambda x, _: f"{x:g}", label="nats above the panel's lowest loss")
        figure.supxlabel(N_AXIS, fontsize=10)
        figure.supylabel("epochs e", fontsize=10)
        figure.suptitle(f"{group.title}: loss by {style(name)['label']}. Dashed: best epochs of each size; white: sizes that were trained, and how long", fontsize=10)
        yield f"contours_{name}{group.suffix}", figure


def unique(groups):
    """The best that U unique tokens allow by each law, at any compute. A law without an optimum has no epochs and parameters to advise; a fitted
    one is searched within the N and e of its data, the paper's printed ones anywhere."""
    groups = pick(groups, True, True)
    sources = [(group, name, fitted, style(name)) for group in groups for name, fitted in group.laws.items()]
    if len(groups) > 1:
        sources = [(g, name + g.suffix, f, options | dict(label=f"{g.title}, {options['label']}", ls="-." if g.objective == "ar" else "-")) for g, name, f, options in sources]
    if groups[0].objective == "quokka":
        sources.append((Group("ar", *groups[0][1:]), "muennighoff", Fit(HALF_LIFE, laws.MUENNIGHOFF, math.nan), dict(color=ORANGE, label="AR: half-life law, Muennighoff")))
    seen, ar, losses = np.concatenate([g.runs.U for g in groups]), None, {}
    U = np.geomspace(seen.min(), seen.max() * 1e3, 22)

    def within(group, name):  # as in plan: a law that was fitted here is asked where its data are
        fitted_here = not name.endswith("_printed") and name != "muennighoff"
        return dict(N=(group.runs.N.min(), group.runs.N.max()), e=(1.0, max(1.0, group.runs.e.max()))) if fitted_here else {}

    figure, axes = panels(3, width=4.4, height=4.2)
    for group, name, fitted, options in sources:
        found = [laws.best(fitted.law, fitted.coefficients, u, points=60, **within(group, name)) for u in U]
        losses[name], ever = np.array([choice.loss for choice in found]), fitted.law is HALF_LIFE  # more epochs never harm, none is best
        ar = losses[name] if ever and group.objective == "ar" else ar
        inside = np.array([ever or not choice.edge for choice in found])
        axes[0, 0].plot(U, np.where(np.convolve(inside, [1, 1, 1], "same") < 3, losses[name], np.nan), lw=1.2, color=options["color"], ls=":")
        for ax, key in zip(axes[0], ("loss",) if ever else ("loss", "e", "N")):
            ax.plot(U, np.where(inside, [getattr(choice, key) for choice in found], np.nan), gid=name, **options)
    for _, name, _, options in sources:
        above = losses[name] * 0 if ar is None else ar - losses[name]
        for i in np.flatnonzero(above[:-1] * above[1:] < 0):  # where its sign changes, between two points
            at = U[i] * (U[i + 1] / U[i]) ** (above[i] / (above[i] - above[i + 1]))
            axes[0, 0].plot(at, np.interp(np.log(at), np.log(U), ar), "o", color=options["color"], mfc="white", ms=6, zorder=5, gid=f"{name} crosses")
    for ax, label in zip(axes[0], ("lowest loss (nats per token)", "epochs of the optimum", "parameters of the optimum")):
        ax.axvspan(seen.min(), seen.max(), color=GREY, alpha=0.12, lw=0, label="unique tokens of the data")
        finish(ax, "unique tokens U", label, log_y=ax is not axes[0, 0], legend={} if ax is axes[0, 0] else None)
    figure.suptitle("The best that U unique tokens allow, at any compute. Dotted: no optimum within 100K epochs, or (fitted laws) within their data" + "; circles: equal to AR" * (ar is not None), fontsize=10)
    yield "unique", figure


def residuals(groups):
    """A row per law. Left: along each curve, or of each run. Right: a curve's mean, with a bar from its 10 % to its 90 % quantile."""
    shown = [group for group in groups if group.laws]
    if not shown:
        raise ValueError("the data have no fitted law")
    for group in shown:
        runs, size, amount = group.runs, shades(group.runs.N), shades(group.runs.U)
        figure, axes = panels(2 * len(group.laws), columns=2, width=4.5, height=1.9 if len(group.laws) > 2 else 3, sharey=True, sharex="col")
        for (name, fitted), (left, right) in zip(group.laws.items(), axes):
            missed = np.log(laws.predict(fitted, runs.N, runs.U, runs.e) / runs.loss)
            for curve in curves(runs._replace(loss=missed)):
                left.plot(curve.e if group.repeats else curve.U, curve.loss, "-" if group.repeats else "o", lw=0.9, ms=3, color=size(curve.N[0]))
                right.vlines(curve.N[0], *np.quantile(curve.loss, (0.1, 0.9)), color=amount(curve.U[0]), lw=1)
                right.plot(curve.N[0], curve.loss.mean(), "o", ms=3, color=amount(curve.U[0]))
            for ax in (left, right):
                ax.axhline(0, color="black", lw=0.7)
                finish(ax, y="ln(law / loss)" * (ax is left))
            left.text(0.02, 0.97, f"{style(name)['label']}: mean |residual| {np.abs(missed).mean():.4f}", transform=left.transAxes, va="top", fontsize=8.5,
                      bbox=dict(facecolor="white", alpha=0.8, lw=0, pad=1.5))
        left.set_xlabel("epochs e" if group.repeats else "training tokens D")
        right.set_xlabel(N_AXIS)
        figure.suptitle(f"{group.title}: residuals; colour, dark to light: parameters (left), {'unique ' * group.repeats}tokens (right)", fontsize=10)
        yield f"residuals_{'epochs' if group.repeats else 'isoflop'}{group.suffix}", figure


# ---------------------------------------------------------------------------------------------- masked beside AR


def crossover(groups):
    """Two figures: a panel per size and amount of unique tokens, where masked diffusion may fall below the lowest loss that AR ever has at this
    size; and against epochs and compute each size (thin) and the best so far over sizes (thick), where each may choose its size."""
    by = {g.objective: g.runs for g in groups if g.repeats}
    budgets = np.intersect1d(by["masked"].U, by["ar"].U) if {"masked", "ar"} <= by.keys() else ()
    if not len(budgets):
        raise ValueError("the data hold no runs over several epochs of masked and ar on the same unique tokens")
    sizes = [N for N in np.unique(by["ar"].N) if np.isclose(by["masked"].N, N, rtol=0.03).any()]  # a masked one has the mask's embedding, too
    if sizes:
        figure, axes = panels(len(sizes) * len(budgets), columns=len(budgets), width=3.6, height=2.6, sharex="col")
        for ax, (N, U) in zip(axes.flat, ((N, U) for N in sizes for U in budgets)):
            here = {o: by[o].select((by[o].U == U) & np.isclose(by[o].N, N, rtol=0.03)) for o in ("ar", "masked")}
            if not all(len(runs.e) for runs in here.values()):
                ax.set_axis_off()
                continue
            mark_crossover(ax, {o: (runs.e[order := np.argsort(runs.e)], runs.loss[order]) for o, runs in here.items()}, "e")
            low, high = min(runs.loss.min() for runs in here.values()), min(height(here["ar"]), here["ar"].loss.min() + 1.5)
            ax.set(title=f"{human(N)} parameters, {human(U)} unique tokens", ylim=(low - 0.05 * (high - low), high + 0.45 * (high - low)))
            ax.title.set_fontsize(9)
            ax.xaxis.set_tick_params(labelbottom=True)  # the lowest of a column may be off
            finish(ax, "epochs e" if N == sizes[-1] else "", legend=dict(loc="upper left", fontsize=7))
        figure.supylabel(f"validation {LOSS}", fontsize=10)
        figure.suptitle("At a fixed size. Masked diffusion's loss is an upper bound", fontsize=10)
        yield "crossover_sizes", figure
    figure, axes = panels(2 * len(budgets), columns=len(budgets), width=4.2, sharey="col")
    for ax, U, against in zip(axes.flat, [*budgets] * 2, ["e"] * len(budgets) + ["flops"] * len(budgets)):
        here = {objective: by[objective].select(by[objective].U == U) for objective in ("ar", "masked")}
        reached = {}
        for objective, runs in here.items():
            colour = NAMES[objective][1]
            for curve in curves(runs):
                ax.plot(getattr(curve, against), curve.loss, color=colour, lw=0.8, alpha=0.5)
            order = np.lexsort((runs.loss, getattr(runs, against)))
            x, best = getattr(runs, against)[order], np.minimum.accumulate(runs.loss[order])
            better = np.diff(best, prepend=np.inf) < 0
            better[-1] = True  # how long it was trained
            x, best = x[better], best[better]
            reached[objective] = x, best
        mark_crossover(ax, reached, against, ", best so far")
        lowest, best = here["ar"].loss.min(), reached["masked"][1]
        low, high = min(best[-1], lowest), max(map(height, here.values()))
        ax.set(title=f"{human(U)} unique tokens" * (against == "e"), ylim=(low - 0.04 * (high - low), high + 0.3 * (high - low)))
        finish(ax, *(("epochs e", "", human) if against == "e" else (COMPUTE, "", scientific)), legend=dict(loc="upper right"))
    figure.supylabel(f"validation {LOSS}", fontsize=10)
    figure.suptitle("Thin: each size. Masked diffusion's loss is an upper bound", fontsize=10)
    yield "crossover", figure


def mark_crossover(ax, lines, against, what=""):
    """Both lines {objective: (x, loss)}, and a star where masked diffusion falls below the lowest loss of AR's."""
    for objective, (x, loss) in lines.items():
        title, colour = NAMES[objective]
        ax.plot(x, loss, color=colour, lw=2.4 if what else 1.8, label=title + what, gid=objective)
    (_, ar), (x, masked) = lines["ar"], lines["masked"]
    lowest = ar.min()
    ax.axhline(lowest, color=ORANGE, lw=1, ls=":", label=f"AR's lowest, {lowest:.3f}")
    if (ahead := masked < lowest).any():
        at = float(x[ahead.argmax()])
        label = f"ahead from {human(at) + ' epochs' if against == 'e' else scientific(at) + ' FLOPs'} on,\nby up to {lowest - masked.min():.3f}"
        ax.plot(at, lowest, "*", ms=13, color=YELLOW, mec="black", mew=0.7, zorder=5, gid="crossover", label=label)
    else:
        ax.plot([], [], " ", label=f"masked stays {masked.min() - lowest:.3f} above")


# --------------------------------------------------------------------------------------------------------- main

FIGURES = dict(valleys=valleys, frontier=frontier, parametric=functools.partial(valleys, by_law=True), epochs=epochs, contours=contours, unique=unique,
               residuals=residuals, crossover=crossover)


def of_fit(runs, fits, out, objective=""):
    """After a fit: its valleys, or the curves with each law over them, and the residuals, as PNG in `out`."""
    groups = [Group(objective, runs, fits)]
    for draw in (epochs if groups[0].repeats else valleys, *([residuals] if fits else [])):
        for name, figure in draw(groups):
            save(figure, Path(out) / f"{name}.png")


def main(argv=None):
    cfg = configurator.load(Config, argv, __doc__)
    try:
        groups = read(cfg)
        for name in split(cfg.which) or FIGURES:
            try:
                for file, figure in FIGURES[name](groups):
                    print(f"wrote {save(figure, Path(cfg.out) / f'{file}.{cfg.format}')}", flush=True)
            except ValueError as problem:
                if cfg.which:
                    raise ValueError(f"{name}: {problem}") from None
                print(f"no {name}: {problem}")
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
