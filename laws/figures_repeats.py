"""Figures of repeated tokens: curves over epochs, best choices, and masked diffusion beside AR."""

import functools
from typing import NamedTuple

import numpy as np

from configurator.format import human_count
from laws.drawing import (
    COMPUTE,
    GREY,
    LOSS,
    N_AXIS,
    ORANGE,
    STYLES,
    YELLOW,
    curves_of,
    drawable,
    finish,
    law_style,
    loss_ceiling,
    panels,
    scientific,
    shades,
)
from laws.fitting import predict
from laws.forms import HALF_LIFE, MUENNIGHOFF, find_optimum

# -------------------------------------------------------------------------------------------- repeated tokens


def draw_epochs(groups):
    """Draw each curve, and the law's (dashed) over the same epochs."""
    for group in drawable(groups, True):
        for name in group.laws or [""]:
            yield f"epochs{'_' * bool(name)}{name}{group.suffix}", draw_curves(group, name)


def draw_curves(group, name):
    """Draw a group's curves, with those of the law `name` ("": none): a figure."""
    colour, budgets = shades(group.runs.N), np.unique(group.runs.U)
    figure, axes = panels(len(budgets))
    for U, ax in zip(budgets, axes.flat):
        runs = group.runs.select(group.runs.U == U)
        for curve in curves_of(runs):
            N, e = curve.N[0], np.geomspace(curve.e[0], curve.e[-1], 200)
            marker = "o" if len(curve.e) < 20 else None
            ax.plot(curve.e, curve.loss, color=colour(N), lw=1.6, label=human_count(N), marker=marker, ms=3)
            if name:
                loss = predict(group.laws[name], N, U, e)
                ax.plot(e, loss, color=colour(N), lw=1.1, ls=(0, (4, 2)), gid="law")
        low, high = runs.loss.min(), loss_ceiling(runs)
        ax.set(title=f"{human_count(U)} unique tokens", ylim=(low - 0.12 * (high - low), high))
        finish(ax, legend=dict(title="parameters", ncols=2, loc="lower left"))

    figure.supxlabel("epochs e", fontsize=10)
    figure.supylabel(f"validation {LOSS}", fontsize=10)
    law = f"; dashed: {law_style(name)['label']}" if name else ""
    figure.suptitle(f"{group.title}: training on few tokens{law}", fontsize=11)
    return figure


def draw_contours(groups):
    """Draw the loss over parameters and epochs, from each panel's lowest on: panels can be compared."""
    for group in drawable(groups, True, with_optima=True):
        for name, fit in group.laws.items():
            yield f"contours_{name}{group.suffix}", draw_law_contours(group, name, fit)


def draw_law_contours(group, name, fit):
    """Draw one law's contours, a panel per amount of unique tokens: a figure."""
    runs, budgets = group.runs, np.unique(group.runs.U)
    budgets = budgets[np.unique(np.linspace(0, len(budgets) - 1, 6).round().astype(int))]
    levels = [0, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2]
    figure, axes = panels(len(budgets))
    for U, ax in zip(budgets, axes.flat):
        filled = draw_contour_panel(ax, runs, fit, U, levels)

    figure.colorbar(filled, ax=axes, shrink=0.8, ticks=levels, format=lambda x, _: f"{x:g}",
                    label="nats above the panel's lowest loss")
    figure.supxlabel(N_AXIS, fontsize=10)
    figure.supylabel("epochs e", fontsize=10)
    figure.suptitle(f"{group.title}: loss by {law_style(name)['label']}. Dashed: best epochs of each size; "
                    "white: sizes that were trained, and how long", fontsize=10)
    return figure


def draw_contour_panel(ax, runs, fit, U, levels):
    """Draw a law's loss for U unique tokens, each size's best epochs, the optimum; returns the contours."""
    from matplotlib.colors import BoundaryNorm

    # the law
    N = np.geomspace(runs.N.min() / 3, runs.N.max() * 5, 120)
    e = np.geomspace(1, max(100, runs.e.max() * 3), 120)
    search = functools.partial(find_optimum, fit.law, fit.coefficients, U, e=(1.0, e[-1]))
    optimum = search(N=(N[0], N[-1]))
    best = [search(N=float(size), points=60) for size in N[::3]]
    above = predict(fit, N, U, e[:, None]) - optimum.loss

    # contours, path, optimum
    norm = BoundaryNorm(levels, 256, extend="max")
    filled = ax.contourf(N, e, np.maximum(above, 1e-6), levels, cmap="viridis_r", norm=norm, extend="max")
    path = [np.nan if choice.on_border else choice.e for choice in best]
    ax.plot(N[::3], path, gid="path", color="white", lw=2)
    ax.plot(N[::3], path, gid="path", color="black", lw=1.2, ls="--")
    face, edge = ("white", ORANGE) if optimum.on_border else (ORANGE, "white")
    ax.plot(optimum.N, optimum.e, "*", ms=13, color=face, mec=edge, mew=0.8, gid="optimum", zorder=5,
            clip_on=False)

    # the runs
    ax.axhline(runs.e.max(), color="white", lw=0.8, ls=":")
    ax.vlines(np.unique(runs.N[runs.U == U]), 1, e[-1] ** 0.03, color="white", lw=1.5)

    place = f"{optimum.loss:.3f} at {human_count(optimum.N)}, {human_count(optimum.e)} epochs"
    place = f"no optimum here: {place}" if optimum.on_border else f"★ {place}"
    ax.set_title(f"{human_count(U)} unique tokens\n{place}", fontsize=9, pad=9)
    finish(ax, log_y=True)
    ax.grid(False)
    return filled


class BestLine(NamedTuple):
    """The best choices by a law against unique tokens, and how they are drawn."""

    name: str
    style: dict
    best: list  # an Optimum for each amount of unique tokens
    is_ar: bool
    is_monotone: bool  # more epochs never harm, so none is best

    @property
    def loss(self):
        return np.array([choice.loss for choice in self.best])


def draw_unique(groups):
    """Draw the best that U unique tokens allow by each law, at any compute.

    A law without an optimum has no epochs and parameters to advise; a fitted one is searched within the N and
    e of its data, the paper's printed ones anywhere.
    """
    groups = drawable(groups, True, with_optima=True)
    data_U = np.concatenate([group.runs.U for group in groups])
    U = np.geomspace(data_U.min(), data_U.max() * 1e3, 22)
    lines = [best_line(groups, group, name, fit, U) for group in groups for name, fit in group.laws.items()]
    if groups[0].objective == "quokka":
        lines.append(muennighoff_line(U))

    figure, axes = panels(3, width=4.4, height=4.2)
    for line in lines:
        draw_best_line(axes[0], U, line)
    ar = next((line for line in reversed(lines) if line.is_ar and line.is_monotone), None)
    if ar:
        for line in lines:
            draw_crossings(axes[0, 0], U, line, ar)

    labels = ("lowest loss (nats per token)", "epochs of the optimum", "parameters of the optimum")
    for ax, label in zip(axes[0], labels):
        ax.axvspan(data_U.min(), data_U.max(), color=GREY, alpha=0.12, lw=0,
                   label="unique tokens of the data")
        is_first = ax is axes[0, 0]
        finish(ax, "unique tokens U", label, log_y=not is_first, legend={} if is_first else None)
    crossings = "; circles: equal to AR" if ar else ""
    figure.suptitle("The best that U unique tokens allow, at any compute. Dotted: no optimum "
                    f"within 100K epochs, or (fitted laws) within their data{crossings}", fontsize=10)
    yield "unique", figure


def best_line(groups, group, name, fit, U):
    """Find a law's best choices: a fitted one's where its data are (as in plan), a printed one's anywhere."""
    style, bounds = law_style(name), {}
    if not name.endswith("_printed"):
        bounds = dict(N=(group.runs.N.min(), group.runs.N.max()), e=(1.0, max(1.0, group.runs.e.max())))
    if len(groups) > 1:
        name += group.suffix
        style |= dict(label=f"{group.title}, {style['label']}", ls="-." if group.objective == "ar" else "-")
    best = [find_optimum(fit.law, fit.coefficients, u, points=60, **bounds) for u in U]
    return BestLine(name, style, best, group.objective == "ar", fit.law is HALF_LIFE)


def muennighoff_line(U):
    best = [find_optimum(HALF_LIFE, MUENNIGHOFF, u, points=60) for u in U]
    style = dict(color=ORANGE, label="AR: half-life law, Muennighoff")
    return BestLine("muennighoff", style, best, is_ar=True, is_monotone=True)


def draw_best_line(axes, U, line):
    """Draw the loss, epochs and N of the best choices; dotted where there is no optimum."""
    inside = np.array([line.is_monotone or not choice.on_border for choice in line.best])
    near_border = np.convolve(inside, [1, 1, 1], "same") < 3
    axes[0].plot(U, np.where(near_border, line.loss, np.nan), lw=1.2, color=line.style["color"], ls=":")
    for ax, key in zip(axes, ("loss",) if line.is_monotone else ("loss", "e", "N")):
        values = [getattr(choice, key) for choice in line.best]
        ax.plot(U, np.where(inside, values, np.nan), gid=line.name, **line.style)


def draw_crossings(ax, U, line, ar):
    """Draw a circle where the law's best loss crosses AR's, between two amounts of unique tokens."""
    above = ar.loss - line.loss
    for i in np.flatnonzero(above[:-1] * above[1:] < 0):
        at = U[i] * (U[i + 1] / U[i]) ** (above[i] / (above[i] - above[i + 1]))
        loss = np.interp(np.log(at), np.log(U), ar.loss)
        ax.plot(at, loss, "o", color=line.style["color"], mfc="white", ms=6, zorder=5,
                gid=f"{line.name} crosses")


# ------------------------------------------------------------------------------------------- masked beside AR


def draw_crossover(groups):
    """Draw where masked diffusion falls below the lowest loss that AR ever has, in two figures.

    A panel per size and amount of unique tokens; and against epochs and compute each size (thin) and the best
    so far over sizes (thick), where each may choose its size.
    """
    by_objective = {group.objective: group.runs for group in groups if group.repeats}
    masked, ar = by_objective.get("masked"), by_objective.get("ar")
    budgets = np.intersect1d(masked.U, ar.U) if masked and ar else ()
    if not len(budgets):
        raise ValueError("the data hold no runs over several epochs of masked and ar "
                         "on the same unique tokens")
    # a masked model has the mask's embedding, too
    sizes = [N for N in np.unique(ar.N) if np.isclose(masked.N, N, rtol=0.03).any()]
    if sizes:
        yield "crossover_sizes", draw_sizes(masked, ar, sizes, budgets)
    yield "crossover", draw_best_so_far(masked, ar, budgets)


def draw_sizes(masked, ar, sizes, budgets):
    """Draw masked diffusion beside AR, a panel per size and amount of unique tokens: a figure."""
    n, columns = len(sizes) * len(budgets), len(budgets)
    figure, axes = panels(n, columns, width=3.6, height=2.6, sharex="col")
    for N, row in zip(sizes, axes):
        for U, ax in zip(budgets, row):
            here = {}
            for objective, runs in (("ar", ar), ("masked", masked)):
                here[objective] = runs.select((runs.U == U) & np.isclose(runs.N, N, rtol=0.03))
            if not all(len(runs.e) for runs in here.values()):
                ax.set_axis_off()
                continue
            here = {objective: runs.select(np.argsort(runs.e)) for objective, runs in here.items()}
            mark_crossover(ax, {objective: (runs.e, runs.loss) for objective, runs in here.items()}, "e")

            low = min(runs.loss.min() for runs in here.values())
            high = min(loss_ceiling(here["ar"]), here["ar"].loss.min() + 1.5)
            ax.set(title=f"{human_count(N)} parameters, {human_count(U)} unique tokens",
                   ylim=(low - 0.05 * (high - low), high + 0.45 * (high - low)))
            ax.title.set_fontsize(9)
            ax.xaxis.set_tick_params(labelbottom=True)  # the lowest of a column may be off
            finish(ax, "epochs e" if N == sizes[-1] else "", legend=dict(loc="upper left", fontsize=7))
    figure.supylabel(f"validation {LOSS}", fontsize=10)
    figure.suptitle("At a fixed size. Masked diffusion's loss is an upper bound", fontsize=10)
    return figure


def draw_best_so_far(masked, ar, budgets):
    """Draw each size and the best so far over sizes, against epochs (above) and compute (below)."""
    figure, axes = panels(2 * len(budgets), columns=len(budgets), width=4.2, sharey="col")
    for against, row in zip(("e", "flops"), axes):
        for U, ax in zip(budgets, row):
            here = {"ar": ar.select(ar.U == U), "masked": masked.select(masked.U == U)}
            for objective, runs in here.items():
                colour = STYLES[objective][1]
                for curve in curves_of(runs):
                    ax.plot(getattr(curve, against), curve.loss, color=colour, lw=0.8, alpha=0.5)
            reached = {objective: best_so_far(runs, against) for objective, runs in here.items()}
            mark_crossover(ax, reached, against, ", best so far")

            low = min(reached["masked"][1][-1], here["ar"].loss.min())
            high = max(map(loss_ceiling, here.values()))
            title = f"{human_count(U)} unique tokens" if against == "e" else ""
            ax.set(title=title, ylim=(low - 0.04 * (high - low), high + 0.3 * (high - low)))
            label, format_x = ("epochs e", human_count) if against == "e" else (COMPUTE, scientific)
            finish(ax, label, "", format_x, legend=dict(loc="upper right"))
    figure.supylabel(f"validation {LOSS}", fontsize=10)
    figure.suptitle("Thin: each size. Masked diffusion's loss is an upper bound", fontsize=10)
    return figure


def best_so_far(runs, against):
    """The epochs or FLOPs at which the lowest loss of all runs so far falls, and that loss."""
    values = getattr(runs, against)
    order = np.lexsort((runs.loss, values))
    x, best = values[order], np.minimum.accumulate(runs.loss[order])
    falls = np.diff(best, prepend=np.inf) < 0
    falls[-1] = True  # how long it was trained
    return x[falls], best[falls]


def mark_crossover(ax, lines, against, suffix=""):
    """Draw both lines {objective: (x, loss)}, and a star where masked falls below AR's lowest loss."""
    for objective, (x, loss) in lines.items():
        title, colour = STYLES[objective]
        ax.plot(x, loss, color=colour, lw=2.4 if suffix else 1.8, label=title + suffix, gid=objective)
    (_, ar), (x, masked) = lines["ar"], lines["masked"]
    lowest = ar.min()
    ax.axhline(lowest, color=ORANGE, lw=1, ls=":", label=f"AR's lowest, {lowest:.3f}")

    ahead = masked < lowest
    if not ahead.any():
        ax.plot([], [], " ", label=f"masked stays {masked.min() - lowest:.3f} above")
        return
    at = float(x[ahead.argmax()])
    place = f"{human_count(at)} epochs" if against == "e" else f"{scientific(at)} FLOPs"
    label = f"ahead from {place} on,\nby up to {lowest - masked.min():.3f}"
    ax.plot(at, lowest, "*", ms=13, color=YELLOW, mec="black", mew=0.7, zorder=5, gid="crossover",
            label=label)
