"""Finished runs as arrays, and the CSV files they are read from.

A CSV has a header and a row per run (or per point of a curve), with the columns params, loss (or val_loss),
and tokens or unique_tokens and epochs; `python scaling.py fit --help` describes it for users.
"""

import csv
import math
import re
from typing import NamedTuple

import numpy as np

import configurator


class Runs(NamedTuple):
    """Finished runs, or points on curves: arrays of equal length.

    Points of one `curve` are resampled and left out together: they share its luck.
    """

    N: np.ndarray  # parameters
    U: np.ndarray  # unique tokens
    e: np.ndarray  # epochs: 1 where no token was seen twice
    loss: np.ndarray  # nats per token
    curve: np.ndarray  # which curve; of single runs: their number

    def select(self, index):
        """The runs at these indices, or where this mask is True."""
        return Runs(*(column[index] for column in self))

    @property
    def flops(self):
        return 6 * self.N * self.U * self.e


def data_range(runs):
    """{quantity: (smallest, largest)} of the runs, beyond which a law extrapolates."""
    D = runs.U * runs.e
    quantities = dict(N=runs.N, D=D, U=runs.U, e=runs.e, flops=runs.flops, ratio=D / runs.N)
    return {name: (float(values.min()), float(values.max())) for name, values in quantities.items()}


def geometric_mean(x):
    return float(np.exp(np.log(x).mean()))


def thin_curves(runs, points):
    """Keep at most 2·points points of every curve, equally spaced in e and in log e; neighbours agree."""
    kept = []
    for k in np.unique(runs.curve):
        index = np.flatnonzero(runs.curve == k)
        index = index[np.argsort(runs.e[index], kind="stable")]

        ln_e = np.log(runs.e[index])
        by_log = np.searchsorted(ln_e, np.linspace(ln_e[0], ln_e[-1], points)).clip(0, len(ln_e) - 1)
        evenly = np.linspace(0, len(ln_e) - 1, points).round().astype(int)
        kept.append(index[np.unique(np.concatenate((by_log, evenly)))])
    return runs.select(np.concatenate(kept))


def smooth_losses(y, window=301):
    """Smooth a training loss as the paper does: a Gaussian mean over `window` points, 3σ to either side.

    Of a curve of fewer than 10·window points the window is a tenth.
    """
    half = min(window, len(y) // 10) // 2
    if not half:
        return np.asarray(y, float)
    weights = np.exp(-0.5 * (3 * np.arange(-half, half + 1) / half) ** 2)
    return np.convolve(y, weights, "same") / np.convolve(np.ones(len(y)), weights, "same")


# -------------------------------------------------------------------------------------------------- CSV files


def read_csv(path, objective=None):
    """Read the runs of a CSV, all or those of one `objective` ("": of the rows that name none).

    A row with unique_tokens 0 or empty saw every token once; without epochs it has tokens/unique_tokens of
    them. Rows of the same params, unique_tokens, seed and curve are one curve. Rows whose loss is nan or inf
    are left out: these runs diverged. Raises ValueError with the line.
    """
    rows = read_rows(path)
    loss_column = check_columns(rows[0][1], path)

    points, curve, curves = [], [], {}
    for line, row in rows:
        if objective is not None and row.get("objective", objective) != objective:
            continue
        if row[loss_column] in ("nan", "inf"):
            continue
        try:
            N, U, e, loss = parse_point(row, loss_column)
            repeated = parse_number(row, "unique_tokens", 0.0) > 0
        except ValueError as problem:
            raise ValueError(f"{path}:{line}: {problem}") from None
        key = (N, U, row.get("seed"), row.get("curve")) if repeated else line
        curve.append(curves.setdefault(key, len(curves)))
        points.append((N, U, e, loss))

    if not points:
        which = f"of objective {objective}" if objective else "that did not diverge"
        raise ValueError(f"{path} has no runs {which}")
    return Runs(*np.array(points).T, np.array(curve))


def read_rows(path):
    """Read a CSV: (its line in the file, {column: text}) of every row that is not empty; raises ValueError.

    Spreadsheets write rows and columns of empty cells around a table, and a cell may hold line ends.
    """
    rows, end = [], 0
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # with or without a byte order mark
            reader = csv.reader(file)
            for cells in reader:
                line, end = end + 1, reader.line_num
                if any(cell.strip() for cell in cells):
                    rows.append((line, cells))
    except OSError as problem:
        raise ValueError(f"{path}: {problem.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as problem:
        raise ValueError(f"{path} is not a CSV: {problem}") from None
    if len(rows) < 2:
        raise ValueError(f"{path} holds no runs")

    (_, header), *rows = rows
    columns = [name.strip() for name in header]
    table = []
    for line, cells in rows:
        if any(cell.strip() for cell in cells[len(columns):]):
            raise ValueError(f"{path}:{line}: more cells than the header has")
        row = dict.fromkeys(columns, "") | dict(zip(columns, cells))
        if "objective" in row:
            row["objective"] = row["objective"].strip()
            if not is_name(row["objective"]):
                raise ValueError(f"{path}:{line}: objective={row['objective']!r}: {NAME_RULE}")
        table.append((line, row))
    return table


NAME_RULE = "a name becomes part of files' names: letters, digits, spaces and . _ - + only"


def is_name(text):
    """True for what may be part of a file's name, as an objective is; so may nothing at all."""
    return re.fullmatch(r"[\w +.-]{0,50}", text) is not None


def check_columns(row, path):
    """The name of the column with the loss; raises ValueError where a column is missing."""
    columns = [name for name in row if name]
    loss_column = "val_loss" if "val_loss" in columns else "loss"

    missing = [name for name in ("params", loss_column) if name not in columns]
    if "tokens" not in columns and not {"unique_tokens", "epochs"} <= set(columns):
        missing.append("tokens (or unique_tokens and epochs)")
    if missing:
        other_separator = len(columns) == 1 and any(character in columns[0] for character in ";\t")
        hint = "; separate columns by commas" if other_separator else ": rename yours"
        raise ValueError(f"{path} has no column {' and no column '.join(missing)}; "
                         f"it has {', '.join(columns)}{hint}")
    return loss_column


def parse_point(row, loss_column):
    """N, U, e and the loss of a row; raises ValueError."""
    U = parse_number(row, "unique_tokens", 0.0)
    if U == 0:
        return parse_number(row, "params"), parse_number(row, "tokens"), 1.0, parse_number(row, loss_column)

    e = parse_number(row, "epochs", parse_number(row, "tokens", U) / U)
    if U > 0 and row.get("tokens") and abs(math.log(parse_number(row, "tokens") / (U * e))) > 0.01:
        raise ValueError(f"tokens={row['tokens']}: not unique_tokens · epochs = {U * e:.6g}")
    return parse_number(row, "params"), U, e, parse_number(row, loss_column)


def parse_number(row, name, default=None):
    """The positive number in a row's cell, written 250M or 2.5e8; the default where the cell is empty."""
    text = (row.get(name) or "").strip()
    if not text and default is not None:
        value = default
    else:
        try:
            value = configurator.convert(text, float)
        except ValueError as problem:
            raise ValueError(f"{name}={text}: {problem}") from None
    if not value > 0 and name != "unique_tokens":
        raise ValueError(f"{name}={text}: must be positive")
    return value


def objectives_in(path):
    """The objectives of a CSV's runs; [""] where it names none, or can't be read (then read_csv says why)."""
    try:
        rows = read_rows(path)
    except ValueError:
        return [""]
    return sorted({row.get("objective", "") for _, row in rows})


def write_csv(rows, path, columns=None):
    """Write dictionaries of one kind as a CSV; floats with seven digits."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: format_cell(value) for name, value in row.items()})


def format_cell(value):
    return f"{value:.7g}" if isinstance(value, float) else value
