"""The paper's Tables 2 to 5, from its laws."""

import numpy as np

import configurator
from configurator.format import human_count
from laws.forms import EQ15, eq15_best_epochs, evaluate, published_coefficients

SIZES = [4e8, 1e9, 1e10, 6.7e10, 1.75e11, 2.8e11, 5.2e11, 1e12, 1e13]
UNIQUE_TOKENS = 10.0 ** np.arange(7, 16)
APPROACH_2 = dict(k_N=0.0406, a=0.499, k_D=4.102, b=0.501)  # as printed under Table 5

HEADS = {
    2: ["parameters", "FLOPs", "tokens"],
    3: ["N \\ U", *map(human_count, UNIQUE_TOKENS)],
    4: ["unique tokens", "parameters", "epochs", "FLOPs"],
    5: ["parameters", "FLOPs (1)", "tokens (1)", "FLOPs (2)", "tokens (2)"],
}


def compute_tables():
    """{number: rows} of numbers, before any rounding."""
    published = published_coefficients()
    flops_1, tokens_1 = optimal_budgets(published["approach1"])
    flops_2, tokens_2 = optimal_budgets(APPROACH_2)
    best_epochs = []
    for N in SIZES:
        best_epochs.append((N, *(eq15_best_epochs(published["eq15"], N, U) for U in UNIQUE_TOKENS)))
    return {
        2: list(zip(SIZES, flops_1, tokens_1)),
        3: best_epochs,
        4: [best_on_grid(published["eq15"], U) for U in UNIQUE_TOKENS],
        5: list(zip(SIZES, flops_1, tokens_1, flops_2, tokens_2)),
    }


def optimal_budgets(power):
    """The compute and the tokens for which SIZES are optimal, by the power laws of an approach."""
    flops = (np.array(SIZES) / power["k_N"]) ** (1 / power["a"])
    return flops, power["k_D"] * flops ** power["b"]


def best_on_grid(c, U):
    """U, and the N, epochs and FLOPs of eq. 15's lowest loss on the paper's grid of 50 × 50."""
    sizes, epochs = np.logspace(7, 13, 50), np.logspace(0, 5, 50)
    loss = evaluate(EQ15, c, sizes[:, None], U, epochs)
    i, j = np.unravel_index(loss.argmin(), loss.shape)
    return U, sizes[i], epochs[j], 6 * sizes[i] * U * epochs[j]


def format_cell(number, column, value):
    if number == 3 and column > 0:  # epochs
        return f"{value:,.0f}"
    return human_count(value) if value < 1e16 else f"{value:.2e}"


def main(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return
    if argv:
        configurator.fail(f"tables takes no settings, not {argv[0]}")
    for number, rows in compute_tables().items():
        print(f"Table {number}\n\n| {' | '.join(HEADS[number])} |\n|{' --- |' * len(HEADS[number])}")
        for row in rows:
            cells = [format_cell(number, column, value) for column, value in enumerate(row)]
            print(f"| {' | '.join(cells)} |")
        print()
