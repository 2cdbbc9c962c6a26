"""The laws as formulas: limits, shapes, published coefficients, and choices that are optimal."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known import KNOWN, PUBLISHED

from laws.forms import (
    CHINCHILLA_3,
    EQ15,
    EQ23,
    HALF_LIFE,
    LAWS,
    MUENNIGHOFF,
    OURS,
    PARAMETRIC,
    allocation,
    balance,
    eq15_best_epochs,
    evaluate,
    find_optimum,
    to_tensors,
)


def test_chinchilla_and_muennighoff():
    """The published coefficients give the published power laws and the published worth of repeated data."""
    three = allocation(CHINCHILLA_3)
    # Table 1 prints .46 and .54
    assert [f"{three[k]:.2f}" for k in ("k_N", "a", "k_D", "b")] == ["0.60", "0.45", "0.28", "0.55"]

    # repeated tokens are worth U·(1 + R_D) at most, and four epochs nearly as much as new data
    c = MUENNIGHOFF
    worth = evaluate(PARAMETRIC, c, 1e6, 1e9 * (1 + c["R_D"]))
    assert np.isclose(evaluate(HALF_LIFE, c, 1e6, 1e9, 1e6), worth, rtol=1e-6)
    assert evaluate(HALF_LIFE, c, 1e9, 2e10, 4.0) - evaluate(PARAMETRIC, c, 1e9, 8e10) < 0.02

    # a model much larger than U tokens deserve is worth at most (1 + R_N) times the deserved one
    deserved = (balance(to_tensors(c)).item() ** 2) * 1e9  # a = b: N/D = G²
    worth = evaluate(PARAMETRIC, c, deserved * (1 + c["R_N"]), 1e9)
    assert np.isclose(evaluate(HALF_LIFE, c, 1e15, 1e9, 1.0), worth, rtol=1e-6)


# ---- shapes


@pytest.mark.parametrize("name", ["eq15", "eq21", "eq23", "half_life", "ours"])
@given(N=st.floats(1e6, 3e9), U=st.floats(1e6, 1e9), e=st.floats(0.01, 1.0))
@settings(max_examples=25, deadline=None)
def test_up_to_one_epoch_all_tokens_are_new(name, N, U, e):
    """At e ≤ 1 the loss depends on U·e alone: data-constrained laws continue compute-constrained ones."""
    c = KNOWN[name]
    if name == "eq23":  # its overfitting never quite vanishes: softplus at −κ(U/N)^η/τ
        c = c | dict(mu=0.0)
    assert np.isclose(evaluate(LAWS[name], c, N, U, e), evaluate(LAWS[name], c, N, U * e, 1.0), rtol=1e-9)


def test_ours_at_one_epoch_is_a_parametric_law():
    c = KNOWN["ours"]
    A, B = c["A"] * c["N0"] ** c["a"], c["B"] * c["U0"] ** c["b"]
    as_parametric = dict(E=c["E"], A=A, a=c["a"], B=B, b=c["b"])
    N, U = np.meshgrid(np.logspace(6, 10, 9), np.logspace(6, 10, 9))
    assert np.allclose(evaluate(OURS, c, N, U, 1.0), evaluate(PARAMETRIC, as_parametric, N, U), rtol=1e-12)


def test_ours_has_the_shape_of_the_data():
    """More unique tokens never hurt; over epochs the loss falls, then rises, earlier for larger models."""
    c, e = KNOWN["ours"], np.logspace(0, 3, 301)
    for N in np.logspace(7, 9.4, 7):
        U = np.logspace(6.8, 8.5, 60)[:, None]
        loss = evaluate(OURS, c, N, U, e)
        assert (np.diff(loss, axis=0) < 1e-9).all()
        for row in evaluate(OURS, c, N, np.array([[1e7], [3e7], [1e8]]), e):
            # with doubled batches epochs 1 to e^w add no step, but a trace of overfitting
            lowest = int(row.argmin())
            assert (np.diff(row[: lowest + 1]) <= 1e-4).all()
            # one valley; after the peak all is memorised and the end of training only helps
            rising = np.diff(row[lowest:])
            highest = int(row[lowest:].argmax())
            assert (rising[:highest] >= 0).all()
    best = [e[evaluate(OURS, c, N, 2.9e7, e).argmin()] for N in (6.5e7, 2.17e8, 8.56e8, 1.52e9)]
    assert best == sorted(best, reverse=True)


def test_torch_and_numpy_agree_on_precision():
    assert evaluate(PARAMETRIC, KNOWN["parametric"], np.float32(1e8), 10, 1).dtype == np.float64
    assert to_tensors(KNOWN["parametric"])["A"].dtype == torch.float64
    assert isinstance(EQ23.starts(1e8, 1e9, 1e7)["R"], tuple)


# ---- best choices


@given(N=st.floats(1e7, 1e12), U=st.floats(1e7, 1e14))
@settings(max_examples=40, deadline=None)
def test_eq15_best_epochs_is_a_minimum(N, U):
    c = PUBLISHED["eq15"]
    e = eq15_best_epochs(c, N, U)
    if e > 1.01:
        below, here, above = evaluate(EQ15, c, N, U, e * np.array([0.999, 1.0, 1.001]))
        assert here <= below and here <= above
    else:  # no minimum beyond: the loss only rises from somewhere near e = 1 on
        assert (np.diff(evaluate(EQ15, c, N, U, np.logspace(0.5, 4, 200))) > 0).all()


@pytest.mark.parametrize("name", ["eq15", "eq21", "ours"])
@pytest.mark.parametrize("budget", [math.inf, 3e17])
def test_the_optimum_is_what_a_fine_grid_finds(name, budget):
    law, c, U = LAWS[name], KNOWN[name], 2e7
    found = find_optimum(law, c, U, N=(1e6, 1e10), e=(1.0, 1e3), flops=budget)
    N, e = np.logspace(6, 10, 700)[:, None], np.logspace(0, 3, 700)
    loss = np.where(6 * N * U * e <= budget, evaluate(law, c, N, U, e), np.inf)
    assert found.loss <= loss.min() + 1e-6 and found.loss > loss.min() - 5e-3
    assert 6 * found.N * U * found.e <= budget * (1 + 1e-6)
    with pytest.raises(ValueError, match="not enough"):
        find_optimum(law, c, U, flops=6 * 1e5 * U / 2)


def test_where_there_is_no_optimum_it_lies_on_the_border():
    growing = dict(E=1.0, A=100.0, a=0.3, B=100.0, b=0.3)
    assert find_optimum(PARAMETRIC, growing, 1e9).on_border
    assert not find_optimum(EQ15, PUBLISHED["eq15"], 1e9).on_border
