"""`scaling.py plan`: what every law advises, what is printed of it, and the override file that trains it."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from known import KNOWN, PUBLISHED, run, script

import configurator
import train
from configurator import ladder
from laws import plan as planning
from laws.advise import REFITTED, compute_plans, crossover, data_plans, known_laws
from laws.fitting import Fit, predict
from laws.forms import EQ21, HALF_LIFE, MUENNIGHOFF, PARAMETRIC, QUOKKA, evaluate, find_optimum


@pytest.fixture(scope="module")
def few_draws(tmp_path_factory):
    """The refitted laws with ten of their draws and no axes, each of which costs a search: for --fits."""
    folder = tmp_path_factory.mktemp("fits")
    for name in ("isoflop", "epochs"):
        entries = json.loads((QUOKKA / name / "fits.json").read_text(encoding="utf-8"))
        for entry in entries.values():
            if "draws" in entry:
                entry["draws"] = entry["draws"][:10]
                entry.pop("axes", None)
        (folder / f"fits_{name}.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def laws(few_draws):
    """The laws to plan by without fits of one's own: (fresh, repeated)."""
    return known_laws(str(few_draws))[:2]


def plans_for(laws, fresh_fit=None, **budget):
    """{law: plan} for a budget."""
    cfg, (fresh, repeated) = planning.Config(**budget), laws
    if cfg.unique_tokens:
        plans = data_plans(cfg, cfg.budget(), repeated, fresh_fit)
    else:
        plans = compute_plans(cfg, cfg.budget(), fresh)
    return {plan.law: plan for plan in plans}


# ---- what laws advise


def test_plans_agree_whichever_side_they_start_from(laws):
    """From C to N and D, and from that N or that D back to C."""
    forward = plans_for(laws, flops=1e21)
    names = "approach 1, approach 1 refitted, approach 2, approach 2 refitted"
    others = "GIDD IsoFLOP", "GIDD surface", "Chinchilla 1", "Chinchilla 2", "Chinchilla 3"
    assert forward.keys() == {*names.split(", "), *others}
    for name, plan in forward.items():
        assert math.isclose(plan.flops, 1e21, rel_tol=1e-9)
        # by one law both ways, though printed k_N and k_D are rounded apart
        assert math.isclose(plans_for(laws, params=plan.N)[name].flops, 1e21, rel_tol=1e-9)
        assert math.isclose(plans_for(laws, tokens=plan.tokens)[name].flops, 1e21, rel_tol=1e-9)
    one, two = forward["approach 1"], forward["approach 2 refitted"]
    assert math.isclose(one.N, 0.0216 * 1e21**0.514) and one.N_interval == ()
    assert two.N_interval[0] < two.N < two.N_interval[1]
    assert two.loss_interval[0] < two.loss < two.loss_interval[1] and not two.notes
    assert forward["Chinchilla 1"].N > 2 * one.N  # a diffusion model wants more tokens
    assert "extrapolates" in plans_for(laws, flops=1e24)["approach 1"].notes[0]


def test_the_papers_epochs(laws):
    """Table 3's cells from the command's own rows, with its note where one epoch is better."""
    plan = plans_for(laws, unique_tokens=1e9, params=4e8)["eq. 15"]
    assert round(plan.e) == 430 and plan.N == pytest.approx(4e8)
    plan = plans_for(laws, unique_tokens=1e8, params=6.7e10)["eq. 15"]
    assert plan.e == 1
    assert plan.notes[:2] == ("prefers a single epoch", "its local optimum at 9 epochs is worse")
    assert plan.notes[2] == "extrapolates: parameters 24 × its largest"
    assert plan.notes[3].startswith("0.0 decades in unique tokens and 1.4 in parameters away from its data")


def test_what_the_user_fixes_is_kept(laws):
    U = 5e7
    assert all(plan.e == pytest.approx(40) for plan in plans_for(laws, unique_tokens=U, epochs=40).values())
    for plan in plans_for(laws, unique_tokens=U, flops=1e18).values():
        assert plan.flops <= 1e18 * (1 + 1e-6)
    for plan in plans_for(laws, unique_tokens=U, params=1e8, flops=1e18).values():
        assert (plan.N, plan.flops) == (1e8, pytest.approx(1e18))
    for plan in plans_for(laws, params=1e9, tokens=1e10).values():
        assert (plan.N, plan.tokens) == (1e9, 1e10)

    free = plans_for(laws, unique_tokens=U)["eq. 21"]
    near = np.array([0.97, 1, 1.03])
    around = evaluate(EQ21, PUBLISHED["eq21"], free.N * near[:, None], U, free.e * near)
    assert np.unravel_index(around.argmin(), (3, 3)) == (1, 1)


def test_tokens_of_unique_tokens_are_epochs(laws):
    plans = plans_for(laws, unique_tokens=1e8, tokens=1e9)
    assert all(plan.e == pytest.approx(10) for plan in plans.values())
    assert plans["ours"].N == pytest.approx(plans_for(laws, unique_tokens=1e8, epochs=10)["ours"].N)


def test_ours_is_planned_with_intervals_and_warnings(laws):
    inside = plans_for(laws, unique_tokens=5e7, params=4e8)["ours"]
    assert inside.loss_interval[0] < inside.loss < inside.loss_interval[1] and not inside.notes
    beyond = plans_for(laws, unique_tokens=1e10, params=4e8)["ours"]
    assert any("extrapolates: unique tokens 71.9 × its largest" in note for note in beyond.notes)


def test_ours_is_planned_without_the_step_between_batch_sizes(laws):
    [ours] = [law.fit for law in laws[1] if law.name == "ours"]
    assert abs(predict(ours, 2.4999e9, 1e8, 3.0) - predict(ours, 2.5001e9, 1e8, 3.0)) < 1e-3
    stepped = ours._replace(coefficients=KNOWN["ours"])
    assert abs(predict(stepped, 2.4999e9, 1e8, 3.0) - predict(stepped, 2.5001e9, 1e8, 3.0)) > 1e-3


def test_every_law_says_where_it_extrapolates(laws):
    large = plans_for(laws, flops=1e27) | plans_for(laws, unique_tokens=1e12, params=1e12)
    for plan in large.values():
        assert any(note.startswith("extrapolates: ") for note in plan.notes), plan.law


def plans_on_text(laws, objective, U, **budget):
    """{law: plan} on U unique tokens as the command makes them, and the one that it suggests."""
    cfg = planning.Config(unique_tokens=U, objective=objective, **budget)
    without_draws = [[law._replace(fit=law.fit._replace(draws=[])) for law in kind] for kind in laws]
    plans = planning.make_plans(cfg, cfg.budget(), *without_draws)
    of_objective = {plan.law: plan for plan in plans if plan.objective == objective}
    return of_objective | dict(suggested=planning.suggest(cfg, plans))


@pytest.mark.parametrize("objective, flops", [("masked", 1e21), ("masked", 1e16), ("ar", 1e21)])
def test_plans_have_no_jump_where_text_falls_short(laws, objective, flops):
    """From twice the text that the budget wants down to a tenth of it, no law moves N by 5 % at once."""
    wanted = plans_on_text(laws, objective, 1e20, flops=flops)["suggested"].tokens
    shares = [2, 1.01, 0.99, 0.5, 0.26, 0.15, 0.101]
    series = [plans_on_text(laws, objective, wanted * share, flops=flops) for share in shares]
    for more, less in itertools.pairwise(series):
        assert more.keys() == less.keys() and len(less) > (6 if objective == "masked" else 4)
        for name, plan in less.items():
            assert plan.N == pytest.approx(more[name].N, rel=0.05), name
            assert plan.flops <= flops * (1 + 1e-6)


def test_less_text_moves_the_plan_gradually(laws):
    """From 8 to 80 passes: from what is compute-optimal for new text towards what laws for repeats want."""
    wanted = plans_on_text(laws, "masked", 1e20, flops=2e19)["suggested"].tokens
    sizes = [plans_on_text(laws, "masked", wanted / 8 / 1.33**i, flops=2e19)["suggested"].N for i in range(9)]
    assert all(0.9 < less / more < 1.1 for more, less in itertools.pairwise(sizes))
    assert sizes[0] > 1.1 * sizes[-1]


def test_text_that_just_falls_short_is_read_once_and_a_little(laws):
    """At 1e21 FLOPs: 130B tokens suffice, 120B are read 1.05 times by as large a model."""
    plenty, short = (plans_on_text(laws, "masked", U, flops=1e21) for U in (1.3e11, 1.2e11))
    assert plenty["suggested"].e == 1 and short["suggested"].N == plenty["suggested"].N
    assert short["suggested"].law == "approach 1" and 1 < short["suggested"].e < 1.1
    ours = short["ours"]
    assert ours.N == pytest.approx(plenty["approach 1"].N) and not ours.credible
    far = "2.9 decades in unique tokens and 0.0 in parameters away from its data: not credible"
    assert far in ours.notes and any("unique tokens 863 × its largest" in note for note in ours.notes)
    assert any(note == "as many parameters as for new text by approach 1" for note in ours.notes)


def test_a_law_without_a_minimum_says_so(capsys, laws, few_draws):
    """Muennighoff's never stops falling: by less than a float holds, not to an optimum at 547 epochs."""
    plan = plans_for(laws, unique_tokens=1e9)["Muennighoff"]
    assert plan.N == pytest.approx(1.6e9, rel=0.1) and plan.e == pytest.approx(87, rel=0.1)
    everything = evaluate(HALF_LIFE, MUENNIGHOFF, 1e16, 1e9, 1e6).item()
    assert 0 < plan.loss - everything < 1.1e-3
    assert plan.flops < 8.6e20
    with_compute = plans_for(laws, unique_tokens=1e9, flops=1e24)["Muennighoff"]
    assert (with_compute.N, with_compute.e) == (plan.N, plan.e)

    code, out, _ = run(capsys, "plan", "--unique_tokens=1B", f"--fits={few_draws}")
    note = (r"\* Muennighoff: no minimum \(falls for ever\); within 0.001 nats of its lowest "
            r"at 1.\d+B × 8\d.* epochs, 8.\de\+20 FLOPs")
    assert code == 0 and re.search(note, out)
    for name in ("eq. 15", "eq. 21", "eq. 23"):
        assert f"* {name}: no minimum" not in out


def test_crossover():
    """Against a law that is worse by a constant at first and better later: at the crossing both are equal."""
    masked = Fit(PARAMETRIC, dict(E=1.0, A=400.0, a=0.3, B=1000.0, b=0.3))
    ar = Fit(PARAMETRIC, dict(E=1.5, A=200.0, a=0.3, B=500.0, b=0.3))
    C = crossover(1e8, masked, ar)
    reached = [find_optimum(fit.law, fit.coefficients, 1e8, flops=C).loss for fit in (masked, ar)]
    assert abs(reached[0] - reached[1]) < 1e-3
    assert crossover(1e8, masked, masked._replace(coefficients=dict(masked.coefficients, E=2.0))) == 0
    assert crossover(1e8, masked, masked._replace(coefficients=dict(masked.coefficients, E=0.5))) is None


def test_repeats_worth_more_than_new_text_are_not_believed(laws):
    """Far beyond their data the paper's laws promise more of repeats than its law of as much new text."""
    fresh_fit = next(law.fit for law in laws[0] if law.name == REFITTED)
    plans = plans_for(laws, fresh_fit=fresh_fit, unique_tokens=1e9)
    for name in ("eq. 15", "eq. 21"):
        gap = predict(fresh_fit, plans[name].N, plans[name].tokens) - plans[name].loss
        assert gap > 0.5 and not plans[name].credible
        note = f"{gap:.2f} nats below what as many new tokens give by approach 2 refitted: not credible"
        assert plans[name].notes[-1] == note
    assert plans["ours"].credible and not any("credible" in note for note in plans["ours"].notes)

    plans = list(plans.values())
    assert planning.suggest(planning.Config(unique_tokens=1e9), plans).law == "ours"
    assert planning.suggest(planning.Config(unique_tokens=1e9, law="eq. 15"), plans).law == "eq. 15"
    with pytest.raises(ValueError, match="is of --objective=ar"):
        planning.suggest(planning.Config(unique_tokens=1e9, law="Muennighoff"), plans)


def test_the_gaps_in_the_docs(laws):
    """docs/scaling-laws.md: by how much each law's best loss lies below that of as many new tokens."""
    fresh_fit = next(law.fit for law in laws[0] if law.name == REFITTED)
    numbers = r"(-?[\d.]+ \| -?[\d.]+ \| -?[\d.]+ \| -?[\d.]+)"
    text = (ROOT / "docs/scaling-laws.md").read_text(encoding="utf-8")
    shown = dict(re.findall(rf"\| (ours|eq\. \d+)(?: \(within its data\))? \| {numbers} \|", text))
    assert shown.keys() == {"ours", "eq. 15", "eq. 21", "eq. 23"}
    without_draws = [law._replace(fit=law.fit._replace(draws=[])) for law in laws[1] if law.name in shown]
    for column, U in enumerate((1e7, 5e7, 1.39e8, 1e9)):
        for plan in data_plans(planning.Config(unique_tokens=U), 0.0, without_draws):
            gap = float(predict(fresh_fit, plan.N, plan.tokens)) - plan.loss
            cell = float(shown[plan.law].split(" | ")[column])
            assert cell == pytest.approx(gap, abs=0.0051), (plan.law, U)


# ---- the command


def test_the_printed_plan(capsys):
    code, out, err = run(capsys, "plan", "--gpus=8", "--days=3", "--mfu=0.5", "--price=2")
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("  approach")]
    flops = f"{8 * 3 * 86400 * 989e12 * 0.5:.3g}"
    assert len(lines) == 4 and all(flops in line and "3.0 days" in line and "1,152" in line for line in lines)
    code, out, err = run(capsys, "plan", "--unique_tokens=100M", "--flops=1e20")
    assert code == 0 and "masked diffusion" in out and "autoregressive" in out and "Muennighoff" in out
    assert re.search(r"by eq\. 15: from [\d.]+e\+1[78] FLOPs on; yes, at 1e\+20", out)


def test_enough_text_to_see_it_once(capsys, few_draws):
    code, out, _ = run(capsys, "plan", "--unique_tokens=200B", "--flops=1e21", f"--fits={few_draws}")
    assert code == 0 and "  approach 1 " in out and "enough to see every token once" in out
    assert "suggested for masked: approach 1 " in out
    code, out, _ = run(capsys, "plan", "--unique_tokens=50M", "--flops=1e20", f"--fits={few_draws}")
    assert code == 0 and "  approach 1 " not in out and "suggested for masked: ours " in out


def test_text_enough_for_less_than_an_epoch(capsys, few_draws):
    """Where compute binds, the laws of repeats may leave text unread."""
    code, out, _ = run(capsys, "plan", "--unique_tokens=1T", "--flops=1e20", f"--fits={few_draws}")
    ours = next(line for line in out.splitlines() if line.startswith("  ours "))
    epochs = float(re.search(r"[MB]\]? +([\d.]+)[MBT] +([\d.e-]+) ", ours)[2])
    assert code == 0 and epochs < 0.5 and "suggested for masked: approach 1 " in out


def test_plans_of_own_fits(capsys):
    """The committed sweep's laws: named after its folder, each under its objective, and suggested first."""
    code, out, _ = run(capsys, "plan", "--params=300K", f"--fits={ROOT / 'results/sweep_cpu/fit'}")
    masked, ar = out.split("autoregressive\n")
    assert code == 0
    for part in (masked, ar):
        assert "approach 1 of sweep_cpu" in part and "approach 2 of sweep_cpu" in part
    assert "refitted" not in masked and "suggested for masked: approach 1 of sweep_cpu" in out
    assert "holds no fits.json" in run(capsys, "plan", "--params=300K", f"--fits={ROOT / 'tests'}")[2]


def test_the_crossover_of_own_fits(capsys, tmp_path):
    """Two objectives fitted on one text are compared with each other, one alone with nothing of another."""
    data_range = dict(N=[1e6, 1e10], D=[1e6, 1e12], U=[1e6, 1e9], e=[1, 1e3], flops=[1e12, 1e22])
    own = (("half_life", "ar", dict(MUENNIGHOFF, E=3.0)), ("eq21", "masked", PUBLISHED["eq21"]))
    for name, objective, c in own:
        entry = dict(coefficients=c, objective=0.0, draws=[], units=0, range=data_range)
        about = dict(objective=objective, data="mine")
        (tmp_path / f"fits_{objective}.json").write_text(
            json.dumps({"about": about, name: entry}), encoding="utf-8"
        )
    code, out, _ = run(capsys, "plan", "--unique_tokens=100M", f"--fits={tmp_path}")
    assert code == 0 and "against half-life law of mine," in out and "  by eq. 21 of mine: from " in out
    assert "by eq. 15:" not in out
    code, out, _ = run(capsys, "plan", "--unique_tokens=100M", f"--fits={tmp_path / 'fits_masked.json'}")
    assert code == 0 and "against Muennighoff," in out and "by eq. 15:" in out
    assert "by eq. 21 of mine:" not in out


@pytest.mark.parametrize("argv, message", [
    ([], "plan for what?"),
    (["--epochs=3"], "plan for what?"),
    (["--flops=1e20", "--epochs=3"], "epochs=3.0 needs unique_tokens"),
    (["--flops=1e20", "--params=1B", "--tokens=1B"], "leave one of them out"),
    (["--unique_tokens=1B", "--tokens=2B", "--epochs=2"], "leave tokens or epochs out"),
    (["--flop=1e20"], "did you mean 'flops'"),
    (["--params=10X"], "expected a number"),
    (["--flops=1e20", "--fits=nowhere.json"], "nowhere.json: No such file"),
    (["--flops=1e20", "--law=mine", "--write=x.py"], "choose from approach 1 | approach 2 | "),
    (["--flops=1e20", "--write=no/where/x.py"], "must be a .py file in a folder that exists"),
    (["--params=1e300"], "must be at most"),
    (["--tokens=1e300"], "must be at most"),
    (["--flops=1e300"], "must be at most"),
    (["--unique_tokens=1e300"], "must be at most"),
])  # fmt: skip
def test_bad_plans(capsys, argv, message):
    code, out, err = run(capsys, "plan", *argv)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err and not Path("x.py").exists()


def test_sizes_may_have_units():
    cfg = configurator.load(planning.Config, ["--unique_tokens=1.5B", "--params=250M", "--gpus=1"])
    assert (cfg.unique_tokens, cfg.params) == (1.5e9, 2.5e8)
    assert configurator.load(train.Config, ["--unique_tokens=10M", "--steps=2K"]).unique_tokens == 10_000_000


def test_the_nearest_size():
    largest = max(ladder.ladder_params(*row) for _, *row in ladder.LADDER)
    assert planning.nearest_size(1.0e9) == "971M"
    assert planning.nearest_size(1e12) == f"{round(largest / 1e6)}M"


# ---- the override file


@pytest.mark.parametrize("budget", [
    ("--flops=1e21",),
    ("--unique_tokens=1B", "--flops=3e21"),
    ("--params=10B", "--objective=ar"),
    ("--unique_tokens=20M", "--law=ours"),
])
def test_the_written_file_trains_the_plan(capsys, tmp_path, few_draws, budget):
    path = tmp_path / "mine.py"
    code, out, _ = run(capsys, "plan", *budget, f"--write={path}", f"--fits={few_draws}")
    assert code == 0 and f"wrote {path}" in out
    cfg = configurator.load(train.Config, [str(path)])
    assert cfg.objective == ("ar" if "--objective=ar" in budget else "masked")
    assert cfg.shape() and cfg.tokens > 0
    assert (cfg.unique_tokens > 0) == any("unique" in flag for flag in budget)
    assert cfg.batch_size % (8 * cfg.micro_batch) == 0
    assert cfg.warmup + cfg.decay <= cfg.tokens / cfg.batch_size / cfg.seq_len
    code, _, err = run(capsys, "plan", *budget, f"--write={path}")
    assert code == 2 and err == f"{script()}: {path} exists; choose another name\n"


@pytest.mark.parametrize("corpus", (
    "a'b", 'a"b', "a\nb", "\\new\\text", '"; import os; os.mkdir("bang") #', "é\u2028", "a\0b", "x\udcff"))
def test_any_corpus_reads_back_equal(capsys, tmp_path, monkeypatch, few_draws, corpus):
    """48006ab: a quote ended the text, and what followed ran when train.py read the file."""
    monkeypatch.chdir(tmp_path)
    name = "it's \"mine\"\\.py"
    flags = "--flops=1e21", f"--write={name}", f"--corpus={corpus}", f"--fits={few_draws}"
    code, _, err = run(capsys, "plan", *flags)
    assert code == 0, err
    cfg = configurator.load(train.Config, [name])
    assert cfg.corpus == corpus and cfg.run_dir == "runs/it's \"mine\"\\" and not Path("bang").exists()


def test_a_batch_fits_any_number_of_gpus(capsys, tmp_path):
    code, *_ = run(capsys, "plan", "--gpus=3", "--days=3", f"--write={tmp_path / 'x.py'}")
    cfg = configurator.load(train.Config, [str(tmp_path / "x.py")])
    assert code == 0 and cfg.batch_size % (3 * cfg.micro_batch) == 0 and 256 <= cfg.batch_size < 320


def test_models_too_large_for_their_gpu(capsys, tmp_path):
    code, out, _ = run(capsys, "plan", "--params=10B", f"--write={tmp_path / 'large.py'}")
    text = (tmp_path / "large.py").read_text(encoding="utf-8")
    assert code == 0 and "an H100 has 80" in out and "# Warning: 10.7B parameters: 171 GB" in text
    assert "extrapolates: tokens 3.16 × its largest" in text and "--tokenizer=gpt2" in text
    assert "has 80" not in run(capsys, "plan", "--params=1B")[1]
    code, out, _ = run(capsys, "plan", "--flops=1e15", f"--write={tmp_path / 'small.py'}")
    small = r"warning: the plan wants 1.11M parameters; 7M, the ladder's nearest, takes 6.\d* × its FLOPs"
    assert code == 0 and re.search(small, out)
