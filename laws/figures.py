"""Figures of scaling laws: the paper's, from its numbers, or those of your own sweep.

    python scaling.py plot                                     the paper's, into figures/
    python scaling.py plot --data=runs/sweep                   a sweep's, with the laws in runs/sweep/fit
    python scaling.py plot --which=contours --format=pdf       one of them

valleys     loss against parameters at equal compute: a parabola per budget, its minimum marked (approach 1)
frontier    compute-optimal parameters and tokens against compute, beside Chinchilla and open models
parametric  the same runs, with the curves of the parametric law (approach 2)
epochs      validation loss against epochs, a panel per amount of unique tokens, with a law's curves
            (a file per law)
contours    a law's loss over parameters and epochs, its optimum, the best epochs of every size
            (a file per law)
unique      the best loss, and the epochs and parameters that reach it, against unique tokens, by every law
residuals   by how much every law misses, against epochs and parameters
crossover   masked diffusion beside AR on the same unique tokens, and where it gets ahead: at every size,
            and over all sizes
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import configurator
import terminal
from configurator import setting, split
from corpus.files import list_folder
from laws.collect import find_csv
from laws.drawing import (
    BLUE,
    COMPUTE,
    GREY,
    LOSS,
    N_AXIS,
    ORANGE,
    PINK,
    SKY,
    STYLES,
    YELLOW,
    Group,
    curves_of,
    drawable,
    finish,
    law_style,
    panels,
    save,
    scientific,
    shades,
)
from laws.figures_repeats import draw_contours, draw_crossover, draw_epochs, draw_unique
from laws.fitting import Fit, find_fits, predict, read_fits
from laws.forms import CHINCHILLA, CHINCHILLA_3, LAWS, PARAMETRIC, QUOKKA, allocation, published_coefficients
from laws.isoflop import bootstrap_valleys, budget_of, fit_valleys
from laws.runs import geometric_mean, objectives_in, read_csv

# {name: (marker, [(parameters, training tokens), …])} as reports and model cards state them. Dream 7B is left
# out: it starts from Qwen2.5 7B, so that only a small part of its tokens trained a diffusion model.
MODELS = {
    "LLaDA (masked)": ("*", [(8.0e9, 2.3e12)]),
    "Llama 2": ("o", [(6.7e9, 2e12), (69e9, 2e12)]),
    "Llama 3": ("s", [(8.0e9, 15e12), (70.6e9, 15e12)]),
    "Llama 3.1": ("D", [(405e9, 15.6e12)]),
    "Qwen2.5": ("^", [(7.6e9, 18e12), (72.7e9, 18e12)]),
    "Qwen3": ("v", [(8.2e9, 36e12)]),
}


@dataclass
class Config:
    out: str = setting("figures", "folder to write into")
    data: str = setting(
        "", "a sweep's folder with points.csv or curves.csv, or such a CSV "
        "(empty: the paper's numbers, results/quokka)")
    fits: str = setting(
        "", "folders or fits.json files that `fit` wrote, with commas "
        "(empty: those beside the data, if there are any)")
    which: str = setting("", "with commas, which of the figures above (empty: all that the data allow)")
    laws: str = setting("", "with commas, the laws to draw, such as ours or eq15_printed (empty: all)")
    format: Literal["png", "pdf"] = setting("png", "of the files")

    def problems(self):
        unknown = [name for name in split(self.which) if name not in FIGURES]
        return [f"which: '{name}' is not one of {', '.join(FIGURES)}" for name in unknown]


def read_groups(cfg):
    """The groups that `cfg` names. Raises ValueError."""
    # runs
    if cfg.data:
        path = find_csv(cfg.data, Path(cfg.out))
        groups = [Group(objective, read_csv(path, objective), {}) for objective in objectives_in(path)]
        files = find_fits(cfg.fits) or list(map(str, list_folder(cfg.data, "fit/fits*.json")))
    else:
        csvs = (QUOKKA / "isoflop_points.csv", QUOKKA / "epoch_curves.csv")
        groups = [Group("quokka", read_csv(path), {}) for path in csvs]
        own = (QUOKKA / "isoflop/fits.json", QUOKKA / "epochs/fits.json")
        files = find_fits(cfg.fits) or [str(path) for path in own if path.is_file()]

    # laws
    published, fits = published_coefficients(), {}
    printed = {f"{k}_printed": Fit(LAWS[k], published[k]) for k in ("parametric", "eq15", "eq21", "eq23")}
    for file in files:  # fits_ar.json holds AR's
        objective = Path(file).stem.partition("_")[2]
        fits.setdefault(objective, {}).update(read_fits(file).fits)
    for group in groups:
        known = fits.get(group.objective, fits.get("", {}))
        if group.objective == "quokka":
            known = printed | known
        for name, fit in known.items():
            if (fit.law is PARAMETRIC) != group.repeats:  # else it is not for these data
                group.laws[name] = fit
    return select_laws(groups, split(cfg.laws))


def select_laws(groups, names):
    """The groups with these laws only (none named: with all). Raises ValueError for unknown names."""
    known = {name for group in groups for name in group.laws}
    unknown = [name for name in names if name not in known]
    if unknown:
        choices = ", ".join(sorted(known)) or "none: fit them first"
        raise ValueError(f"laws: there is no {', '.join(unknown)} for these data; choose from {choices}")
    if not names:
        return groups
    selected = []
    for group in groups:
        laws = {name: fit for name, fit in group.laws.items() if name in names}
        selected.append(group._replace(laws=laws))
    return selected


# -------------------------------------------------------------------------------------- every token seen once


def draw_valleys(groups, by_law=False):
    """Draw loss against N, a colour per budget, with each budget's parabola or the parametric laws."""
    groups = drawable(groups, False, by_law)
    figure, axes = panels(len(groups), width=5.5, height=4.5, sharey=True)
    for group, ax in zip(groups, axes.flat):
        budget, colour = budget_of(group.runs), shades(group.runs.flops)
        for k in range(budget.max() + 1):
            runs = group.runs.select(budget == k)
            shade = colour(geometric_mean(runs.flops))
            ax.plot(runs.N, runs.loss, "o", ms=3.5, color=shade, label=scientific(geometric_mean(runs.flops)))
            if by_law:
                draw_laws(ax, runs, group.laws, shade)
            else:
                draw_parabola(ax, runs, shade)

        title = f"{group.title}: loss at equal compute"
        if by_law:
            title += "\n" + "; ".join(f"{line_word(name)}: {law_style(name)['label']}" for name in group.laws)
        finish(ax, N_AXIS, LOSS, legend=dict(title="FLOPs" if by_law else "FLOPs; ★ minimum", ncols=2))
        ax.set_title(title, fontsize=10)
    suffix = groups[0].suffix if len(groups) == 1 else ""
    yield ("parametric" if by_law else "valleys") + suffix, figure


def line_word(name):
    return "dashed" if "printed" in name else "solid"


def draw_laws(ax, runs, laws, shade):
    """Draw each law over the sizes of one budget's runs."""
    N, flops = np.geomspace(runs.N.min(), runs.N.max(), 100), geometric_mean(runs.flops)
    for name, fit in laws.items():
        ax.plot(N, predict(fit, N, flops / (6 * N)), color=shade, lw=1, ls=law_style(name)["ls"], gid=name)


def draw_parabola(ax, runs, shade):
    """Draw one budget's parabola with its minimum, if it has one: else the points say so."""
    try:
        valley = fit_valleys(runs)
    except ValueError:  # too few sizes, or no minimum
        return
    N = np.geomspace(runs.N.min(), runs.N.max(), 100)
    ax.plot(N, np.polyval(valley.parabola[0], np.log10(N)), color=shade, lw=1)
    ax.plot(valley.N, valley.loss, "*", ms=10, color=shade, mec="black", mew=0.6, gid="minimum", zorder=5)


def draw_frontier(groups):
    """Draw compute-optimal N and D against compute, with open models where runs are large."""
    groups = drawable(groups, False)
    figure, axes = panels(2, width=5.2, height=4.8)
    flops = np.concatenate([group.runs.flops for group in groups])
    large = flops.max() > 1e17  # smaller runs tell nothing about other people's models
    C = np.geomspace(flops.min() / 2, 1e26 if large else flops.max() * 30, 100)
    labels = ("parameters N", "training tokens D")
    for ax, k, power, label in zip(axes[0], ("k_N", "k_D"), ("a", "b"), labels):
        lines = [line for group in groups for line in draw_group_frontier(ax, group, C, k, power)]
        if large:
            style = dict(color=ORANGE, ls="-", label="Chinchilla (AR), approach 1")
            lines.append((CHINCHILLA[1], style))
            style = dict(color=ORANGE, ls=":", label="Chinchilla (AR), approach 3")
            lines.append((allocation(CHINCHILLA_3), style))
        for law, style in lines:
            ax.plot(C, law[k] * C ** law[power], gid="law", **style)
        if large:
            draw_models(ax, k)
        legend = {} if k == "k_N" else None
        finish(ax, COMPUTE, f"compute-optimal {label}", scientific, log_y=True, legend=legend)
    yield "frontier" + (groups[0].suffix if len(groups) == 1 else ""), figure


def draw_group_frontier(ax, group, C, k, power):
    """Draw a group's minima with their 95 % band over the compute C; returns its power laws, with styles."""
    valleys, colour = fit_valleys(group.runs), STYLES.get(group.objective, ("", BLUE))[1]
    band = [draw[k] * C ** draw[power] for draw in bootstrap_valleys(group.runs, 200)]
    ax.fill_between(C, *np.quantile(band, (0.025, 0.975), axis=0), color=colour, alpha=0.2, lw=0)
    minima = valleys.N if k == "k_N" else valleys.flops / (6 * valleys.N)
    ax.plot(valleys.flops, minima, "o", ms=4, color=colour, gid="minima", zorder=4)

    lines = [(valleys.power_laws(), dict(color=colour, lw=2, label=f"{group.title}, approach 1, 95 %"))]
    law_colour = YELLOW if colour == ORANGE else SKY
    for name, fit in group.determined.items():
        style = law_style(name)
        style |= dict(color=law_colour, label=f"{group.title}, {style['label']}")
        lines.append((allocation(fit.coefficients), style))
    return lines


def draw_models(ax, k):
    """Draw open models: their parameters or tokens against their compute."""
    for name, (marker, sizes) in MODELS.items():
        compute = [6 * N * D for N, D in sizes]
        values = [N if k == "k_N" else D for N, D in sizes]
        ax.plot(compute, values, marker, color=PINK if "masked" in name else GREY, mec="black", mew=0.5,
                ms=12 if marker == "*" else 6, label=name, zorder=5)


def draw_residuals(groups):
    """Draw by how much each law misses, a row per law.

    Left: along each curve, or of each run. Right: a curve's mean and 10 to 90 % bar.
    """
    shown = [group for group in groups if group.laws]
    if not shown:
        raise ValueError("the data have no fitted law")
    for group in shown:
        n = len(group.laws)
        height = 1.9 if n > 2 else 3
        figure, axes = panels(2 * n, columns=2, width=4.5, height=height, sharey=True, sharex="col")
        for (name, fit), (left, right) in zip(group.laws.items(), axes):
            draw_law_residuals(left, right, group, name, fit)
        left.set_xlabel("epochs e" if group.repeats else "training tokens D")
        right.set_xlabel(N_AXIS)
        tokens = "unique tokens" if group.repeats else "tokens"
        figure.suptitle(f"{group.title}: residuals; "
                        f"colour, dark to light: parameters (left), {tokens} (right)", fontsize=10)
        yield f"residuals_{'epochs' if group.repeats else 'isoflop'}{group.suffix}", figure


def draw_law_residuals(left, right, group, name, fit):
    """Draw by how much one law misses."""
    runs, size, amount = group.runs, shades(group.runs.N), shades(group.runs.U)
    residuals = np.log(predict(fit, runs.N, runs.U, runs.e) / runs.loss)
    for curve in curves_of(runs._replace(loss=residuals)):
        x = curve.e if group.repeats else curve.U
        left.plot(x, curve.loss, "-" if group.repeats else "o", lw=0.9, ms=3, color=size(curve.N[0]))
        bar = np.quantile(curve.loss, (0.1, 0.9))
        right.vlines(curve.N[0], *bar, color=amount(curve.U[0]), lw=1)
        right.plot(curve.N[0], curve.loss.mean(), "o", ms=3, color=amount(curve.U[0]))
    for ax, label in ((left, "ln(law / loss)"), (right, "")):
        ax.axhline(0, color="black", lw=0.7)
        finish(ax, y=label)
    text = f"{law_style(name)['label']}: mean |residual| {np.abs(residuals).mean():.4f}"
    left.text(0.02, 0.97, text, transform=left.transAxes, va="top", fontsize=8.5,
              bbox=dict(facecolor="white", alpha=0.8, lw=0, pad=1.5))


# ------------------------------------------------------------------------------------------------------- main

FIGURES = dict(
    valleys=draw_valleys,
    frontier=draw_frontier,
    parametric=functools.partial(draw_valleys, by_law=True),
    epochs=draw_epochs,
    contours=draw_contours,
    unique=draw_unique,
    residuals=draw_residuals,
    crossover=draw_crossover,
)


def draw_fits(runs, fits, out, objective=""):
    """Draw a fit's valleys, or its curves with each law over them, and the residuals, as PNG in `out`."""
    groups = [Group(objective, runs, fits)]
    drawers = [draw_epochs if groups[0].repeats else draw_valleys]
    if fits:
        drawers.append(draw_residuals)
    for draw in drawers:
        for name, figure in draw(groups):
            save(figure, Path(out) / f"{name}.png")


def main(argv=None):
    cfg = configurator.load(Config, argv, __doc__)
    terminal.keep_going()
    try:
        groups = read_groups(cfg)
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
