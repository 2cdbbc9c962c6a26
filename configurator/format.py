"""Numbers, bytes, times and names as people read them."""

import math
import warnings

# of names in writings that matplotlib's font lacks; it draws a box with a hint in their place
warnings.filterwarnings("ignore", "Glyph .* missing from ", UserWarning)

SECONDS = (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48), ("days", 86_400, 730), ("years", 31_557_600, 1e4))


def human_count(x):
    """1.23B and the like; powers of ten from a thousand trillions on."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if 0.9995 * size <= x < 1e15:
            return f"{x / size:.3g}{unit}"
    return f"{x:.3g}"


def human_bytes(n_bytes):
    """MiB or GiB, with two decimals."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.2f} MiB"


def human_seconds(seconds):
    """12.3 s, 4.5 min, 6.7 h, 8.9 days, 10.1 years; ? where it is not known."""
    if math.isnan(seconds):
        return "?"
    if seconds < 1:
        return "< 1 s"
    for unit, size, limit in SECONDS:
        if seconds < size * limit:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / SECONDS[-1][1]:.1e} years"


def with_error(value, error, digits=4):
    """1.2345 ± 0.0123; without the error where it is not known."""
    text = f"{value:.{digits}f}"
    return f"{text} ± {error:.{digits}f}" if math.isfinite(error) else text


def plot_text(name):
    """A user's name for matplotlib, letter by letter: no `$` begins a formula, no `_` hides its label."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name).replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text  # that is a space of no width
