"""Other groups' laws: GIDD's stored outputs, conversions of units both ways, and what `plan` says of them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known import run

from configurator.ladder import LADDER, ladder_params
from laws import peers
from laws import plan as planning
from laws.advise import compute_plans, known_laws
from laws.forms import QUOKKA, evaluate

# What the cells of notebooks/scaling_laws_run_bootstrap.ipynb print (dvruette/gidd-easydel, 4802468).
EXPONENTS = {  # of FLOPs per token, tokens and loss
    "masked": (0.566, 0.434, -0.0496), "low-uniform": (0.535, 0.465, -0.0509),
    "balanced": (0.534, 0.466, -0.0512), "high-uniform": (0.573, 0.427, -0.0514),
    "uniform": (0.589, 0.411, -0.0522),
}  # fmt: skip
CHECKS = [  # layers, width, compute: FLOPs per token, tokens, tokens per step
    (26, 3072, 2e21, 1.963e10, 101.89e9, 3.6e6), (28, 3072, 2e21, 2.114e10, 94.61e9, 3.4e6),
    (30, 4608, 1e22, 4.926e10, 203.00e9, 6.4e6), (34, 4608, 1e22, 5.583e10, 179.11e9, 5.8e6),
    (18, 3072, 1e21, 1.359e10, 73.59e9, 2.8e6),
]
BUDGETS = [1e18, 1e19, 1e20]  # of their runs; beyond, surface and frontier part


@pytest.mark.parametrize("noise", peers.SURFACES)
def test_the_five_laws_have_their_stored_exponents_and_agree_on_their_optima(noise):
    """FLOPs per token and tokens multiply to the compute; the surface's optima are the IsoFLOP minima.

    The losses at both optima agree to 2 % and their M and D to 21 % with M for the surface's first variable.
    Read as parameters without embeddings, with C = 6·P·D, it puts the losses 9 to 15 % above the minima.
    """
    frontier = peers.FRONTIERS[noise]
    for name, expected in zip("MDL", EXPONENTS[noise]):
        assert frontier[name][1] == pytest.approx(expected, abs=6e-4)
    c = peers.SURFACES[noise]
    for C in BUDGETS:
        M, D, loss = peers.frontier_optimum(noise, C)
        assert M * D == pytest.approx(C, rel=1e-3)
        assert peers.surface_optimum(noise, C) == pytest.approx((M, D, loss), rel=0.21)
        assert peers.surface_optimum(noise, C)[2] == pytest.approx(loss, rel=0.018)
        P, D, _ = peers.surface_optimum(noise, C / 6)
        assert c["a"] * P ** -c["alpha"] + c["b"] * D ** -c["beta"] + c["E"] > 1.08 * loss


@pytest.mark.parametrize("noise", peers.SURFACES)
@pytest.mark.parametrize("C", [*BUDGETS, 1e21])
def test_the_closed_form_is_the_minimum(noise, C):
    c = peers.SURFACES[noise]
    M = np.logspace(6, 13, 200_001)
    loss = c["a"] * M ** -c["alpha"] + c["b"] * (C / M) ** -c["beta"] + c["E"]
    best_M, best_D, best = peers.surface_optimum(noise, C)
    assert (best_M, best) == (pytest.approx(M[loss.argmin()], rel=1e-4), pytest.approx(loss.min(), rel=1e-9))
    assert best_M * best_D == pytest.approx(C)


@pytest.mark.parametrize("n_layer, d_model, C, M, D, batch", CHECKS)
def test_the_checks_at_3b_and_10b(n_layer, d_model, C, M, D, batch):
    found = peers.gidd_flops_per_token(n_layer, d_model)
    assert (found, C / found) == (pytest.approx(M, rel=3e-4), pytest.approx(D, rel=3e-4))
    assert peers.best_batch(C / found) == pytest.approx(batch, rel=0.02)


def test_units_of_the_ladder():
    """N, P and M of a model, counted apart: embeddings of 50 304 rows, attention over 2048 tokens."""
    for _, d_model, head_dim, n_head, n_layer in LADDER:
        N = ladder_params(d_model, head_dim, n_head, n_layer)
        P = N - 50_304 * d_model
        is_monotone = round(N / 1e6) not in (1523, 2165)  # deeper than the next larger ones, and slower
        assert peers.without_embeddings(N) == pytest.approx(P, rel=1e-9 if is_monotone else 0.01)
        M = 6 * P + 12 * n_layer * head_dim * n_head * 2048
        assert peers.flops_per_token(N) == pytest.approx(M, rel=1e-9 if is_monotone else 0.02)
    assert peers.flops_per_token(1e9) < 6.6e9  # attention costs what embeddings do not


@given(st.floats(1e5, 1e13))
def test_conversions_go_both_ways(N):
    P = float(peers.without_embeddings(N))
    assert peers.with_embeddings(P) == pytest.approx(N, rel=1e-9)
    assert 0 < P < N
    assert float(peers.of_flops_per_token(peers.flops_per_token(N))) == pytest.approx(N, rel=1e-9)
    assert float(peers.without_embeddings(1.01 * N)) > P


@pytest.mark.parametrize("kind", ("surface", "frontier"))
@pytest.mark.parametrize("flops", (1e18, 1e20, 1e22))
def test_the_best_n_in_our_units_is_theirs(kind, flops):
    """At the compute M(N)·D that a run really takes, M is the law's best; close to that of least loss."""
    N = peers.best_N("masked", kind, flops)
    D, M = flops / (6 * N), float(peers.flops_per_token(N))
    best = (peers.surface_optimum("masked", M * D) if kind == "surface"
            else peers.frontier_optimum("masked", M * D))
    assert best[0] == pytest.approx(M, rel=1e-6)
    if kind == "surface":
        sizes = np.geomspace(N / 3, 3 * N, 61)
        loss = evaluate(peers.GIDD, peers.SURFACES["masked"], sizes, flops / (6 * sizes))
        assert loss[30] - loss.min() < (0.011 if flops == 1e18 else 0.003)


def test_critical_compute():
    """Grows faster than the square of the text; more than 1e19 FLOPs at 100M unique tokens."""
    assert 1e19 < peers.critical_compute(1e8) < 1e20
    assert math.log10(peers.critical_compute(1e9) / peers.critical_compute(1e8)) == pytest.approx(2.174)


# ------------------------------------------------------------------------------------------------------- plan


def test_plan_shows_the_laws_side_by_side(capsys):
    """With ranges, the exponents that disagree, and what is converted or extrapolated."""
    _, output, _ = run(capsys, "plan", "--flops=1e20")
    table = output.split("\n\n")[1]
    assert table.count("  GIDD IsoFLOP ") == table.count("  GIDD surface ") == 2
    assert "uniform diffusion" in table and "5e+17 to 2e+20 FLOPs" in output
    assert "the runs behind the masked laws: approach 1, approach 2" in output
    assert "0.51 and 0.50 by the Quokka paper, 0.57 and 0.56 by GIDD" in output
    assert "412M against 603M parameters, 1.46 ×; at a tenth" in output
    assert "of the compute 1.28 ×, at ten times 1.64 ×" in output
    assert "parameters without embeddings" in output and "FLOPs per token where 6·N is" in output
    assert "GIDD IsoFLOP (masked): extrapolates" not in output
    _, output, _ = run(capsys, "plan", "--flops=1e21")
    assert "GIDD IsoFLOP (masked): extrapolates: parameters 3" in output
    assert "approach 1           1.34B" in output and "GIDD IsoFLOP         2.21B" in output
    _, output, _ = run(capsys, "plan", "--params=10M", "--flops=1e21")  # where no law has data
    assert "(none is credible" in output
    rows = [row for row in output.splitlines() if row.startswith("  GIDD IsoFLOP")]
    assert len(rows) == 2 and all("not said" in row for row in rows)


@settings(deadline=None, max_examples=10)
@given(st.floats(15, 24))
def test_plan_by_gidd_agrees_whichever_side_it_starts_from(exponent):
    flops = 10**exponent
    fresh = [law for law in known_laws(str(QUOKKA / "isoflop"))[0] if law.gidd]
    assert len(fresh) == 4
    forward = compute_plans(planning.Config(flops=flops), flops, fresh)
    for law, plan in zip(fresh, forward):
        assert plan.flops == pytest.approx(flops)
        for fixed in (dict(params=plan.N), dict(tokens=plan.tokens)):
            back = compute_plans(planning.Config(**fixed), 0.0, [law])[0]
            assert (back.N, back.tokens) == pytest.approx((plan.N, plan.tokens), rel=1e-6)


def test_the_override_file_suggests_a_batch(capsys, tmp_path):
    code, _, error = run(capsys, "plan", "--flops=1e21", f"--write={tmp_path / 'mine.py'}")
    assert code == 0, error
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    assert "GIDD's rule for so many tokens says" in text and "12% of the FLOPs" in text
    _, output, _ = run(capsys, "plan", "--unique_tokens=1B", "--flops=1e21")
    assert "by Prabhudesai et al.: from" in output and "extrapolates: its runs had 25M to 100M" in output
