"""How figures of scaling laws are drawn: groups of runs with their laws; panels, axes, colours, files."""

import io
import math
from typing import NamedTuple

import numpy as np

from configurator.format import human_count, plot_text
from laws.identifiability import undetermined_coefficients
from laws.runs import Runs

# Colours that colour-blind readers tell apart (Okabe and Ito).
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW, GREY = "#56B4E9", "#E69F00", "#555555"
# Lines are dashed for what the paper prints, solid for what is fitted.
STYLES = dict(
    quokka=("Quokka (masked)", BLUE),
    masked=("masked diffusion", BLUE),
    ar=("autoregressive", ORANGE),
    uniform=("uniform diffusion", GREEN),
    parametric=("approach 2", SKY),
    eq15=("eq. 15", YELLOW),
    eq21=("eq. 21", GREEN),
    eq23=("eq. 23", PINK),
    ours=("our law", BLUE),
    half_life=("half-life law", ORANGE),
)
LOSS, N_AXIS, COMPUTE = "loss (nats per token)", "parameters N", "training compute (FLOPs)"


def panels(n, columns=None, width=4.0, height=3.3, **options):
    """A figure with n panels of this size in inches, as an array of rows; options: of Figure.subplots."""
    from matplotlib.figure import Figure

    if not columns:
        columns = n if n < 4 else min(4, math.ceil(n / 2))
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat[n:]:
        ax.set_axis_off()
    return figure, axes


def finish(ax, x="", y="", format_x=human_count, log_y=False, legend=None):
    """Set labels, logarithmic axes with ticks as people write them, and the legend, when all is drawn."""
    ax.set(xlabel=x, ylabel=y, xscale="log")
    set_log_ticks(ax.xaxis, format_x)
    if log_y:
        ax.set(yscale="log")
        set_log_ticks(ax.yaxis, human_count)
    ax.grid(alpha=0.25, lw=0.5)
    ax.tick_params(labelsize=8)
    if legend is not None:
        spacing = dict(framealpha=0.8, borderpad=0.3, labelspacing=0.25, handlelength=1.8)
        ax.legend(**dict(fontsize=7.5, title_fontsize=7.5) | spacing | legend)


def set_log_ticks(axis, format_value):
    """Set the ticks of a logarithmic axis: the fewer, the more decades it shows."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = sorted(axis.get_view_interval())
    digits = (1, 2, 5)
    if high / low > 20:
        digits = (1, 3)
    if high / low > 3e3:
        digits = (1,)
    axis.set_major_locator(LogLocator(subs=digits, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))


def scientific(x):
    """A power of ten as TeX: 3·10^19."""
    factor, power = f"{x:.2e}".split("e")
    factor = "" if float(factor) == 1 else f"{float(factor):g}\\cdot"
    return f"${factor}10^{{{int(power)}}}$"


def shades(values):
    """A function value → colour: viridis by logarithm, without its palest end."""
    import matplotlib

    low, high = np.log(min(values)), np.log(max(values))

    def shade(value):
        place = 0.9 * (np.log(value) - low) / (high - low) if high > low else 0.4
        return matplotlib.colormaps["viridis"](place)

    return shade


def save(figure, path):
    """Write a PDF, or a PNG of 256 colours, which is a third as large; returns the path."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pdf":
        figure.savefig(path)
        return path
    image = io.BytesIO()
    figure.savefig(image, dpi=125)
    Image.open(image).convert("RGB").quantize(256).save(path, optimize=True)
    return path


# ---------------------------------------------------------------------------------------------- runs and laws


class Group(NamedTuple):
    """The runs of one objective (or of the paper, 'quokka'), and the laws to draw over them."""

    objective: str
    runs: Runs
    laws: dict  # {name: Fit}; names that end in _printed are the paper's

    @property
    def repeats(self):
        return bool(self.runs.e.max() > 1.01)

    @property
    def determined(self):
        """The laws whose coefficients the data determine: only these have an optimum to show."""
        return {name: fit for name, fit in self.laws.items() if not undetermined_coefficients(fit)}

    @property
    def title(self):
        if self.objective in STYLES:
            return STYLES[self.objective][0]
        return plot_text(self.objective) or "runs"

    @property
    def suffix(self):
        """Of file names and keys."""
        return "" if self.objective in ("", "quokka") else f"_{self.objective}"


def drawable(groups, repeats, with_laws=False, with_optima=False):
    """The groups that a figure can show; raises ValueError if there are none.

    with_optima: with laws alone that have an optimum, as the data determine them.
    """
    shown = [group for group in groups if group.repeats == repeats and (group.laws or not with_laws)]
    if with_optima:
        shown = [group._replace(laws=group.determined) for group in shown if group.determined]
    if not shown:
        runs = "runs over several epochs" if repeats else "IsoFLOP runs (every token seen once)"
        law = ""
        if with_laws or with_optima:
            law = " with a fitted law (python scaling.py fit, then --fits=its folder)"
        if with_optima:
            law = law.replace("law (", "law that they determine (")
        raise ValueError(f"the data hold no {runs}{law}")
    return shown


def law_style(name):
    """The line of a law, as arguments of plot, and its label."""
    law, printed, _ = name.partition("_printed")
    title, colour = STYLES.get(law, (plot_text(law), GREY))
    if printed:
        title += ", printed"
    elif law != "ours":
        title += ", fitted"
    return dict(color=colour, ls="--" if printed else "-", label=title)


def curves_of(runs):
    """Every curve by itself, by size, its points in the order of their epochs."""
    curves = [runs.select(runs.curve == k) for k in np.unique(runs.curve)]
    curves = [curve.select(np.argsort(curve.e)) for curve in curves]
    return sorted(curves, key=lambda curve: curve.N[0])


def loss_ceiling(runs):
    """Where a loss axis may end: above each curve's minimum and most overfitting, below the first steps."""
    return max(np.quantile(runs.loss, 0.97), *(curve.loss.min() for curve in curves_of(runs))) * 1.02
