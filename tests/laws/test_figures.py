"""The figures of scaling laws: each shows the data and the laws that it says it shows."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from known import PUBLISHED, run
from PIL import Image

from configurator.format import human_count
from laws import drawing, figures, figures_repeats
from laws.fitting import Fit, predict
from laws.forms import (
    CHINCHILLA,
    EQ15,
    EQ23,
    HALF_LIFE,
    MUENNIGHOFF,
    PARAMETRIC,
    allocation,
    eq15_best_epochs,
    evaluate,
    find_optimum,
)
from laws.isoflop import fit_valleys
from laws.runs import read_csv

MASKED = dict(E=1.2, A=60.0, a=0.35, B=300.0, b=0.35)
AR = dict(E=1.0, A=60.0, a=0.35, B=150.0, b=0.35)
AR_REPEATED = dict(E=1.0, A=60.0, a=0.35, B=100.0, b=0.35, R_D=15.0, R_N=5.0)


def write_csv(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns.split(), *rows])
    return path


def write_fits(path, name, coefficients):
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = dict(coefficients=coefficients, objective=0.1, range={}, draws=[])
    path.write_text(json.dumps({name: entry}), encoding="utf-8")


@pytest.fixture(scope="module")
def isoflop(tmp_path_factory):
    """The folder of a sweep of both objectives at equal compute, fitted."""
    folder, rows = tmp_path_factory.mktemp("isoflop"), []
    for objective, c in dict(masked=MASKED, ar=AR).items():
        power = allocation(c)
        for C in (3e11, 6e11, 1.2e12, 2.4e12):
            for factor in (0.2, 0.4, 0.8, 1.6, 3.2, 6):
                N = power["k_N"] * C ** power["a"] * factor
                rows.append((objective, N, C / 6 / N, 0, "", float(evaluate(PARAMETRIC, c, N, C / 6 / N))))
        write_fits(folder / f"fit/fits_{objective}.json", "parametric", c)
    write_csv(folder / "points.csv", "objective params tokens unique_tokens epochs val_loss", rows)
    return folder


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """The folder of a sweep on few tokens, fitted: on 100K masked gets ahead of AR, on 100M it does not."""
    folder, rows = tmp_path_factory.mktemp("repeated"), []
    for U in (1e5, 1e8):
        for N in (5e4, 2e5, 8e5):
            for e in np.geomspace(1, 200, 25):
                overfitting = 0.02 * (N / U) ** 0.6 * max(0, math.log(e / 6)) ** 2
                ar = float(evaluate(HALF_LIFE, AR_REPEATED, N, U, e)) + overfitting
                masked = 1.1 + 60 / N**0.35 + 100 / (U * e**0.9) ** 0.35 + 1 / e
                rows += [(U, N, "ar", e, ar), (U, N, "masked", e, masked)]
    write_csv(folder / "curves.csv", "unique_tokens params objective epochs val_loss", rows)
    write_fits(folder / "fit/fits_ar.json", "half_life", AR_REPEATED)
    write_fits(folder / "fit/fits_masked.json", "eq15", dict(PUBLISHED["eq15"], A=50.0))
    return folder


@pytest.fixture(scope="module")
def paper():
    return figures.read_groups(figures.Config())


def groups_of(folder):
    """The groups of a sweep, by its files: to read a folder takes more imports."""
    fits = ",".join(map(str, folder.glob("fit/*.json")))
    return figures.read_groups(figures.Config(data=str(next(folder.glob("*.csv"))), fits=fits))


def panels_of(figure):
    """The panels of a figure, without the colour bar."""
    return [ax for ax in figure.axes if ax.axison and ax.get_label() != "<colorbar>"]


def drawn(name, groups):
    """{file name: its panels} of a figure."""
    return {file: panels_of(figure) for file, figure in figures.FIGURES[name](groups)}


def lines(ax, gid=None):
    return [np.array(line.get_data(), float) for line in ax.lines if line.get_gid() == gid]


# ---- the command


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def test_the_papers_figures(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "plot", "--laws=parametric_printed,eq15_printed", "--out=new/figures")
    assert (code, err) == (0, "")
    names = {"valleys", "frontier", "parametric", "epochs_eq15_printed", "contours_eq15_printed", "unique",
             "residuals_isoflop", "residuals_epochs"}  # fmt: skip
    files = {path.stem: path for path in (tmp_path / "new/figures").iterdir()}
    assert files.keys() == names
    assert all(f"wrote new/figures/{name}.png" in out for name in names) and "no crossover: " in out
    for path in files.values():
        assert path.stat().st_size <= 150_000
        with Image.open(path) as image:
            assert min(image.size) > 350 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_a_sweep_at_equal_compute(capsys, isoflop, tmp_path):
    code, out, err = run(capsys, "plot", f"--data={isoflop}", f"--out={tmp_path}")
    assert (code, err) == (0, "")
    names = ("valleys", "frontier", "parametric", "residuals_isoflop_masked", "residuals_isoflop_ar")
    assert names_in(tmp_path) == {f"{name}.png" for name in names}
    assert "no epochs: the data hold no runs over several epochs" in out


def test_a_sweep_on_few_tokens_as_pdf(repeated, tmp_path):
    """The command as a program, in another folder than the project's."""
    fits = ",".join(map(str, repeated.glob("fit/*.json")))
    flags = (f"--data={repeated / 'curves.csv'}", f"--fits={fits}", "--out=new", "--format=pdf",
             "--which=crossover,epochs", "--laws=eq15")  # fmt: skip
    command = [sys.executable, ROOT / "scaling.py", "plot", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    names = {"crossover.pdf", "crossover_sizes.pdf", "epochs_ar.pdf", "epochs_eq15_masked.pdf"}
    assert names_in(tmp_path / "new") == names
    for path in (tmp_path / "new").iterdir():
        content = path.read_bytes()
        assert content.startswith(b"%PDF") and b"/Type /Font" in content  # text, not an image


@pytest.mark.parametrize("argv, message", [
    (["--which=valeys"], "which: 'valeys' is not one of valleys, frontier, parametric, epochs, contours, "
                         "unique, residuals, crossover\n"),
    (["--data=nowhere.csv"], "nowhere.csv: No such file"),
    (["--data={tmp}/text.csv"], "has no column params"),
    (["--data={tmp}/word.csv"], "word.csv:3: tokens=many: expected a number"),
    (["--data={tmp}/one.csv", "--which=frontier"],
     "frontier: the budget of 6e+15 FLOPs has fewer than three sizes"),
    (["--which=crossover"], "crossover: the data hold no runs over several epochs of masked and ar"),
    (["--data={tmp}/one.csv", "--which=parametric"],
     "parametric: the data hold no IsoFLOP runs (every token seen once) with a fitted law"),
    (["--fits={tmp}/none.json"], "none.json: No such file"),
    (["--fits={tmp}/text.csv"], "make it with python scaling.py fit"),
    (["--laws=theirs"], "laws: there is no theirs for these data; choose from eq15"),
    (["--format=gif"], "choose from png, pdf"),
    (["--which=valleys", "--out={tmp}/text.csv"], "text.csv"),
])  # fmt: skip
def test_bad_input(argv, message, tmp_path, capsys):
    (tmp_path / "text.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (tmp_path / "word.csv").write_text("params,tokens,loss\n1e6,1e9,3\n1e6,many,3\n", encoding="utf-8")
    (tmp_path / "one.csv").write_text("params,tokens,loss\n1e6,1e9,3\n", encoding="utf-8")
    flags = [f"--out={tmp_path / 'new'}", *(arg.format(tmp=tmp_path) for arg in argv)]
    code, _, err = run(capsys, "plot", *flags)
    assert code == 2 and err.count("\n") == 1 and message in err and not (tmp_path / "new").exists()


# ---- every token seen once


def test_valleys_show_the_runs_and_their_minima(paper):
    [ax] = drawn("valleys", paper)["valleys"]
    runs, expected = paper[0].runs, fit_valleys(paper[0].runs)
    minima = np.concatenate(lines(ax, "minimum"), axis=1)
    np.testing.assert_allclose(minima, [expected.N, expected.loss])
    curves = [line for line in lines(ax) if len(line[0]) == 100]
    for curve, parabola in zip(curves, expected.parabola):
        np.testing.assert_allclose(curve[1], np.polyval(parabola, np.log10(curve[0])))
    assert len(curves) == 9
    points = np.concatenate([line for line in lines(ax) if len(line[0]) < 100], axis=1)
    assert sorted(points.T.tolist()) == sorted(np.array([runs.N, runs.loss]).T.tolist())

    assert ax.get_xscale() == "log" and ax.get_xlabel() == "parameters N" and "nats" in ax.get_ylabel()
    assert ax.xaxis.get_major_formatter()(1e8, 0) == "100M"
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[:3] == [r"$3\cdot10^{18}$", r"$6\cdot10^{18}$", "$10^{19}$"]


def test_valleys_of_a_sweep_lie_beside_each_other(isoflop):
    groups = groups_of(isoflop)
    panels = drawn("valleys", groups)["valleys"]
    assert [ax.get_title().split(":")[0] for ax in panels] == ["autoregressive", "masked diffusion"]
    for group, ax in zip(groups, panels):
        minima = np.concatenate(lines(ax, "minimum"), axis=1)
        np.testing.assert_allclose(minima, fit_valleys(group.runs)[1:3])
    assert panels[0].get_ylim() == panels[1].get_ylim()


def test_a_budget_without_a_valley_shows_its_points(isoflop):
    [group, _] = groups_of(isoflop)
    runs = group.runs.select(np.arange(8))  # six runs of the first budget, two of the second
    [ax] = drawn("valleys", [group._replace(runs=runs)])["valleys_ar"]
    assert len(lines(ax, "minimum")) == 1 and len(lines(ax)) == 3


def test_frontier(paper):
    left, right = drawn("frontier", paper)["frontier"]
    expected = fit_valleys(paper[0].runs)
    one = expected.power_laws()
    np.testing.assert_allclose(lines(left, "minima")[0], [expected.flops, expected.N])
    tokens = expected.flops / (6 * expected.N)
    np.testing.assert_allclose(lines(right, "minima")[0], [expected.flops, tokens])

    by_label = {line.get_label(): line for line in left.lines}
    powers = {
        "Quokka (masked), approach 1, 95 %": one,
        "Quokka (masked), approach 2, printed": allocation(PUBLISHED["parametric"]),
        "Chinchilla (AR), approach 1": CHINCHILLA[1],
    }
    for label, power in powers.items():
        C, N = by_label[label].get_data()
        np.testing.assert_allclose(N, power["k_N"] * C ** power["a"])
    one_right = next(line for line in right.lines if line.get_label() == "Quokka (masked), approach 1, 95 %")
    C, D = one_right.get_data()
    np.testing.assert_allclose(D, one["k_D"] * C ** one["b"])
    assert np.array(by_label["LLaDA (masked)"].get_data()).T.tolist() == [[6 * 8e9 * 2.3e12, 8e9]]

    [band] = left.collections
    edges = band.get_paths()[0].vertices
    at = edges[np.isclose(edges[:, 0], C[-1]), 1]
    assert at.min() < one["k_N"] * C[-1] ** one["a"] < at.max() < 3 * at.min()


def test_small_runs_are_not_compared_with_large_models(isoflop):
    left, _ = drawn("frontier", groups_of(isoflop))["frontier"]
    labels = [line.get_label() for line in left.lines]
    assert not any("Llama" in label or "Chinchilla" in label for label in labels)
    assert "autoregressive, approach 1, 95 %" in labels and "masked diffusion, approach 2, fitted" in labels
    assert [len(line[0]) for line in lines(left, "minima")] == [4, 4]


def test_parametric_curves(paper):
    [ax] = drawn("parametric", paper)["parametric"]
    flops = np.unique(np.round(paper[0].runs.flops, -16))
    curves = lines(ax, "parametric_printed")
    assert len(curves) == len(flops) == 9 and len(lines(ax, "parametric")) == 9
    for (N, loss), C in zip(curves, flops):
        expected = evaluate(PARAMETRIC, PUBLISHED["parametric"], N, C / (6 * N))
        np.testing.assert_allclose(loss, expected, rtol=1e-3)
    printed = [line for line in ax.lines if line.get_gid() == "parametric_printed"]
    assert {line.get_linestyle() for line in printed} == {"--"}


# ---- repeated tokens


def test_epochs_show_every_curve_and_the_law(paper):
    names = ("eq15_printed", "eq21_printed", "eq23_printed")
    group = paper[1]._replace(laws={name: paper[1].laws[name] for name in names})
    figure = drawn("epochs", [group])
    assert figure.keys() == {f"epochs_{name}" for name in names}
    panels, runs = figure["epochs_eq15_printed"], group.runs
    assert len(panels) == 6 and sum(len(lines(ax)) for ax in panels) == 36
    for U, ax in zip(np.unique(runs.U), panels):
        curves = drawing.curves_of(runs.select(runs.U == U))
        assert ax.get_title() == f"{human_count(U)} unique tokens"
        texts = [text.get_text() for text in ax.get_legend().get_texts()]
        assert texts == [human_count(curve.N[0]) for curve in curves]
        for curve, shown, (e, loss) in zip(curves, lines(ax), lines(ax, "law")):
            np.testing.assert_array_equal(shown, [curve.e, curve.loss])
            np.testing.assert_allclose(loss, evaluate(EQ15, PUBLISHED["eq15"], curve.N[0], U, e))
            assert np.allclose(e[[0, -1]], curve.e[[0, -1]])
            low, high = ax.get_ylim()
            assert low < curve.loss.min() < high
        assert len({line.get_color() for line in ax.lines}) == len(curves)


def test_contours_mark_the_optimum_and_the_best_epochs(paper):
    group = paper[1]._replace(laws={"eq15_printed": paper[1].laws["eq15_printed"]})
    [panels] = drawn("contours", [group]).values()
    c, runs = PUBLISHED["eq15"], group.runs
    for U, ax in zip(np.unique(runs.U), panels):
        expected = find_optimum(EQ15, c, U, N=(runs.N.min() / 3, runs.N.max() * 5), e=(1.0, runs.e.max() * 3))
        assert not expected.on_border
        np.testing.assert_allclose(lines(ax, "optimum")[0].ravel(), [expected.N, expected.e])
        assert f"★ {expected.loss:.3f}" in ax.get_title()
        N, e = lines(ax, "path")[0]
        np.testing.assert_allclose(e, [eq15_best_epochs(c, n, U) for n in N], rtol=0.01)
        lowest_level = next(path for path in ax.collections[0].get_paths() if len(path.vertices))
        assert lowest_level.contains_point((expected.N, expected.e))
        assert ax.get_xscale() == ax.get_yscale() == "log"


def test_contours_say_where_there_is_no_optimum(paper):
    everything_falls = Fit(PARAMETRIC, PUBLISHED["parametric"])
    [panels] = drawn("contours", [paper[1]._replace(laws=dict(mine=everything_falls))]).values()
    for ax in panels:
        assert "no optimum here" in ax.get_title() and np.isnan(lines(ax, "path")[0][1]).all()


def test_unique_follows_the_best_of_each_law(paper):
    loss, epochs, parameters = drawn("unique", paper)["unique"]
    U, best = lines(loss, "eq15_printed")[0]
    for i in (0, 11, 21):
        expected = find_optimum(EQ15, PUBLISHED["eq15"], U[i])
        assert best[i] == pytest.approx(expected.loss, abs=1e-4)
        assert lines(epochs, "eq15_printed")[0][1, i] == pytest.approx(expected.e, rel=0.03)
        assert lines(parameters, "eq15_printed")[0][1, i] == pytest.approx(expected.N, rel=0.03)
    assert not lines(epochs, "muennighoff")  # more never harm

    [[at], [crossed]] = lines(loss, "eq23_printed crosses")[0]
    masked = find_optimum(EQ23, PUBLISHED["eq23"], at).loss
    ar = find_optimum(HALF_LIFE, MUENNIGHOFF, at).loss
    assert masked == pytest.approx(ar, abs=0.003) and crossed == pytest.approx(ar, abs=0.02)
    assert not lines(loss, "eq15_printed crosses")


def test_unique_of_a_sweep_compares_its_own_laws(repeated):
    loss, *_ = drawn("unique", groups_of(repeated))["unique"]
    labels = [line.get_label() for line in loss.lines if not line.get_label().startswith("_")]
    assert labels == ["autoregressive, half-life law, fitted", "masked diffusion, eq. 15, fitted"]
    U, best = lines(loss, "half_life_ar")[0]
    assert best[0] == pytest.approx(find_optimum(HALF_LIFE, AR_REPEATED, U[0]).loss, abs=1e-3)


def test_residuals(paper):
    figure = drawn("residuals", paper)
    runs, fit = paper[1].runs, paper[1].laws["eq15_printed"]
    left, right = figure["residuals_epochs"][:2]
    residuals = np.log(predict(fit, runs.N, runs.U, runs.e) / runs.loss)
    shown = np.concatenate([line for line in lines(left) if len(line[0]) > 2], axis=1)
    np.testing.assert_allclose(sorted(shown.T.tolist()), sorted(np.array([runs.e, residuals]).T.tolist()))
    text = left.texts[0].get_text()
    assert f"{np.abs(residuals).mean():.4f}" in text and "eq. 15, printed" in text

    means = set()
    for k in np.unique(runs.curve):
        means.add((runs.N[runs.curve == k][0], round(residuals[runs.curve == k].mean(), 9)))
    points = [line.ravel() for line in lines(right) if len(line[0]) == 1]
    assert means == {(N, round(mean, 9)) for N, mean in points}

    points = [line for line in lines(figure["residuals_isoflop"][0]) if len(line[0]) == 1]
    assert sorted(np.concatenate(points, axis=1)[0]) == sorted(paper[0].runs.U)
    assert figure["residuals_epochs"][-2].get_xlabel() == "epochs e"
    assert figure["residuals_isoflop"][-2].get_xlabel() == "training tokens D"


# ---- masked beside AR


def test_crossover_is_where_masked_falls_below_all_of_ar(repeated):
    groups = groups_of(repeated)
    few = {group.objective: group.runs.select(group.runs.U == 1e5) for group in groups}
    masked, ar = few["masked"], few["ar"]
    figure = drawn("crossover", groups)

    # the best so far over all sizes
    panels, ahead = figure["crossover"], masked.loss < ar.loss.min()
    for ax, x in ((panels[0], masked.e), (panels[2], masked.flops)):
        [[at], [level]] = lines(ax, "crossover")[0]
        assert at == pytest.approx(x[ahead].min()) and level == ar.loss.min()
    assert not lines(panels[1], "crossover") and not lines(panels[3], "crossover")
    assert any("masked stays" in text.get_text() for text in panels[1].get_legend().get_texts())
    e, best = lines(panels[0], "ar")[0]
    assert best[-1] == ar.loss.min() and e[-1] == pytest.approx(200)  # the best of all so far, to the end
    assert best[0] == min(ar.loss[ar.e == 1])
    assert len(lines(panels[0])) == 2 * 3 + 1  # each size, and AR's lowest

    # each size
    sizes = figure["crossover_sizes"]
    assert len(sizes) == 6 and [bool(lines(ax, "crossover")) for ax in sizes] == [True, False] * 3
    for ax, N in zip(sizes[::2], (5e4, 2e5, 8e5)):
        masked, ar = (few[objective].select(few[objective].N == N) for objective in ("masked", "ar"))
        [[at], [level]] = lines(ax, "crossover")[0]
        assert level == ar.loss.min() and at == pytest.approx(masked.e[masked.loss < level].min())


def test_crossover_needs_unique_tokens_in_common(repeated):
    ar, masked = groups_of(repeated)
    other = masked._replace(runs=masked.runs._replace(U=masked.runs.U * 2))
    with pytest.raises(ValueError, match="on the same unique tokens"):
        list(figures_repeats.draw_crossover([ar, other]))


def test_figures_of_a_sweep_are_named_by_law_and_objective(repeated):
    groups = groups_of(repeated)
    for name in ("epochs", "contours"):
        assert drawn(name, groups).keys() == {f"{name}_half_life_ar", f"{name}_eq15_masked"}
    assert drawn("residuals", groups).keys() == {"residuals_epochs_ar", "residuals_epochs_masked"}


def test_every_axis_is_labelled(paper, repeated):
    few = [group._replace(laws=dict(list(group.laws.items())[:1])) for group in paper]
    names = [(few, name) for name in figures.FIGURES if name != "crossover"]
    for groups, name in [*names, (groups_of(repeated), "crossover")]:
        for _, figure in figures.FIGURES[name](groups):
            panels = panels_of(figure)
            assert figure.get_supxlabel() or all(ax.get_xlabel() for ax in panels[-2:]), name
            assert figure.get_supylabel() or panels[0].get_ylabel(), name


def test_after_a_fit(isoflop, repeated, tmp_path):
    runs = read_csv(isoflop / "points.csv", "ar")
    figures.draw_fits(runs, dict(parametric=Fit(PARAMETRIC, AR)), tmp_path / "a", "ar")
    assert names_in(tmp_path / "a") == {"valleys_ar.png", "residuals_isoflop_ar.png"}
    runs = read_csv(repeated / "curves.csv", "ar")
    figures.draw_fits(runs, dict(half_life=Fit(HALF_LIFE, AR_REPEATED)), tmp_path / "b", "")
    assert names_in(tmp_path / "b") == {"epochs_half_life.png", "residuals_epochs.png"}
    runs = read_csv(isoflop / "points.csv", "masked")
    figures.draw_fits(runs, {}, tmp_path / "c")  # approach 1 alone has no residuals
    assert names_in(tmp_path / "c") == {"valleys.png"}


def test_ticks_as_people_write_them():
    values = [drawing.scientific(x) for x in (1e18, 2.9999e19, 9.999e19, 1.5e20)]
    assert values == ["$10^{18}$", r"$3\cdot10^{19}$", "$10^{20}$", r"$1.5\cdot10^{20}$"]
