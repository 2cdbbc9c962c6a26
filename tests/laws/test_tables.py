"""The paper's Tables 2 to 5, cell by cell, and the command that prints them."""

import json
import re

import numpy as np
import pytest
from known import PUBLISHED, read, run

from laws.forms import EQ15, QUOKKA, eq15_best_epochs, evaluate
from laws.tables import compute_tables


@pytest.fixture(scope="module")
def tables():
    return compute_tables()


def printed(text):
    """'39.3 B' as a number and the size of its last digit."""
    digits, unit = re.fullmatch(r"([\d.]+(?:e[+-]\d+)?) ?([MBT]?)", text).groups()
    scale = dict(M=1e6, B=1e9, T=1e12).get(unit, 1)
    mantissa, _, power = digits.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(digits) * scale, 10.0 ** (int(power or 0) - decimals) * scale


def agrees(value, text):
    """Whether a value rounds to what is printed."""
    number, step = printed(text)
    return abs(value - number) <= step / 2 * (1 + 1e-9)


def cells(name, rows, columns):
    """[(our value, the printed text), …] of a table without its first column."""
    pairs = []
    for row, (_, *values) in zip(read(name), rows):
        pairs += [(value, row[column]) for value, column in zip(values, columns)]
    return pairs


def test_table_2(tables):
    pairs = cells("table2.csv", tables[2], ("Quokka FLOPs", "Quokka Tokens"))
    assert len(pairs) == 18 and all(agrees(*pair) for pair in pairs)


def test_table_3(tables):
    columns = list(read("table3.csv")[0])[1:]
    pairs = cells("table3.csv", tables[3], columns)
    assert len(pairs) == 81 and all(round(value) == int(text) for value, text in pairs)


def test_table_4(tables):
    """The printed 10M row is not on the 50 × 50 grid on which the others are; every other cell agrees."""
    pairs = cells("table4.csv", tables[4], ("Parameters", "Epochs", "FLOPs"))
    rows = [all(agrees(*pair) for pair in pairs[i : i + 3]) for i in range(0, len(pairs), 3)]
    assert rows == [False] + [True] * 8
    assert not any(round(e) == 247 for e in np.logspace(0, 5, 50))


def test_table_5(tables):
    columns = ("Approach 1 FLOPs", "Approach 1 Tokens", "Approach 2 FLOPs", "Approach 2 Tokens")
    pairs = cells("table5.csv", tables[5], columns)
    assert len(pairs) == 36 and all(agrees(*pair) for pair in pairs)


def test_rounded_coefficients_would_not_do():
    """The tables need eq. 15's unrounded coefficients: the test above can fail."""
    rounded = json.loads((QUOKKA / "coefficients.json").read_text(encoding="utf-8"))["eq15"]["printed"]
    names = dict(A="A", a="alpha", B="B", b="beta", c="c_p", m="m_p", k="k_p", p="p_e", g="gamma")
    c = {name: rounded[theirs] for name, theirs in names.items()} | dict(E=0.0)
    assert round(eq15_best_epochs(c, 4e8, 1e7)) != 70
    assert abs(evaluate(EQ15, c, 1e9, 1e9, 10.0) - evaluate(EQ15, PUBLISHED["eq15"], 1e9, 1e9, 10.0)) > 0.1


def test_tables_are_printed(capsys):
    code, out, _ = run(capsys, "tables")
    assert code == 0
    for row in ("| 400M | 9.46e+19 | 39.3B |", "| 400M | 70 | 175 | 430 |", "| 1B | 222M | 569 | 7.59e+20 |"):
        assert row in out
    assert "takes no settings" in run(capsys, "tables", "--x=1")[2]
    assert "Tables 2 to 5" in run(capsys, "tables", "--help")[1]
