"""The paper's ablations: files as the specification says, studies that run, and the paper's values."""

import json
import math
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from conftest import ROOT
from known import read_rows
from safetensors.torch import load_file

import configurator
import train
from evaluation.likelihood import ORDERS
from evaluation.report import figures
from laws import study, study_report
from sampling.decode import DecodeConfig
from training.checkpoint import checkpoints
from training.log import read_metrics

FILES = sorted((ROOT / "configurator" / "quokka").glob("*.py"))
ORIGINALS = ROOT / "../shared/paper"
SCALES = ("tiny", "gpu", "paper")
WORDS = sorted({words for name in study.STUDIES for words in study.words_of(name)})
ALL_RUNS = 2 + 3 + 2 + 2 + 6 + 6 + 8 + 6  # of all studies, those that they share counted again
NEUTRAL = configurator.neutral_settings(train.Config)
SHORT = ["--tokens=4096", "--n_layer=1", "--n_head=2", "--d_model=32", "--compile=no", "--eval_rows=8",
         "--device=cpu"]  # fmt: skip


def settings(words, scale):
    return asdict(configurator.load(train.Config, study.override_files(words, scale)))


def runs_of(name, cfg):
    return {words: study.make_run(words, cfg, []) for words in study.words_of(name)}


def start_study(*argv):
    command = [sys.executable, ROOT / "scaling.py", "study", *map(str, argv)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_study(*argv):
    command = [sys.executable, ROOT / "scaling.py", "study", *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


# ---- the files


def test_the_papers_baseline_is_the_specifications():
    found = settings("", "paper")
    expected = dict(
        objective="masked", loss="elbo", schedule="linear", time="uniform",
        estimator="count", time_correction=False,
        model="1086M", tokens=96e9, seq_len=2048, batch_size=256, unique_tokens=0, short_rows=0.01,
        lr=2e-4, min_lr=-1, lr_schedule="cosine", warmup=2000,
        beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0,
        tied=True, rope_base=10_000.0, dropout=0.0, init_std=0.02, scaled_init=True)  # fmt: skip
    assert {k: found[k] for k in expected} == expected and not found["steps"] and not found["epochs"]
    shape = dict(n_layer=26, n_head=14, n_kv_head=14, head_dim=128, d_model=1792, d_ff=4736)
    assert train.Config(**found).shape() == shape


# What each run changes, from docs/math.md §5 and §10: literal values at the paper's scale, the same ratios at
# the others.
CHANGES = {
    "uniform": dict(objective="uniform", loss="paper"),
    "cosine": dict(schedule="cosine"),
    "poly2": dict(schedule="poly2"),
    "moving_gaussian": dict(time="moving_gaussian"),
    "@long": dict(tokens=300e9),
    "@long maskgit": dict(tokens=300e9, loss="maskgit"),
    "@batch_4x": dict(batch_size=1024),
    "@batch_16x": dict(batch_size=4096),
    "@lr_half": dict(lr=1e-4),
    "@lr_double": dict(lr=4e-4),
    "no_decay": dict(weight_decay=0.0),
    "@96_epochs": dict(unique_tokens=10**9, lr_schedule="wsd", decay=1000.0),
    "@96_epochs no_decay": dict(unique_tokens=10**9, lr_schedule="wsd", weight_decay=0.0, decay=1000.0),
    "block_1": dict(diffusion_block=1),
    "block_4": dict(diffusion_block=4),
    "block_16": dict(diffusion_block=16),
    "block_64": dict(diffusion_block=64),
    "": {},
}
AR_TOO = ("", "@batch_4x", "@batch_16x", "@lr_half", "@lr_double", "no_decay", "@96_epochs",
          "@96_epochs no_decay")  # fmt: skip
for words in AR_TOO:
    CHANGES[f"{words} ar".strip()] = dict(objective="ar", **CHANGES[words])


@pytest.mark.parametrize("words", WORDS)
def test_every_run_changes_what_the_specification_says(words):
    base, found = settings("", "paper"), settings(words, "paper")
    changes = {k: v for k, v in found.items() if v != base[k] and k not in NEUTRAL}
    assert changes == {k: v for k, v in CHANGES[words].items() if v != base[k]}
    for scale in ("tiny", "gpu"):
        small_base, small = settings("", scale), settings(words, scale)
        for key, value in CHANGES[words].items():
            if key in ("tokens", "batch_size", "lr"):
                assert small[key] == pytest.approx(small_base[key] * value / base[key])
            elif key == "unique_tokens":
                assert small[key] * 96 == small_base["tokens"] and small[key] % small["seq_len"] == 0
            elif key != "decay":
                assert small[key] == value
        differ = {k for k, v in small.items() if v != small_base[k]} - NEUTRAL
        assert differ <= CHANGES[words].keys()

    # validations are as dense in tokens
    evaluations = [s["tokens"] / s["batch_size"] / s["seq_len"] / s["eval_every"] for s in (base, found)]
    assert evaluations[1] / evaluations[0] == pytest.approx(found["tokens"] / base["tokens"])


def test_the_studies_are_all_of_the_papers():
    assert set(WORDS) == set(CHANGES)
    rows = [row for rows in study.STUDIES.values() for row in rows]
    assert sum(len(row.runs) for row in rows) == ALL_RUNS
    curves = {(row.figure, row.kind, curve) for row in rows if row.figure for curve in row.runs}
    assert curves == study_report.paper_values().keys()  # every curve of the paper, and only those


@pytest.mark.parametrize("scale, steps_lr", [("tiny", 3.1), ("gpu", 35), ("paper", 37)])
def test_the_scales_keep_the_papers_shares(scale, steps_lr):
    for words in WORDS:
        s = settings(words, scale)
        steps = math.ceil(s["tokens"] / s["batch_size"] / s["seq_len"])
        assert s["warmup"] < steps / 3
        assert all(s[name] >= 1 for name in ("log_every", "eval_every", "save_every"))
        assert s["lr_schedule"] != "wsd" or s["decay"] < 1 or s["warmup"] + s["decay"] < steps
        if words == "":
            assert s["warmup"] / steps == pytest.approx(2000 / 183105, rel=0.06)
            assert s["lr"] * steps == pytest.approx(steps_lr, rel=0.02)


def test_gpu_header_arithmetic():
    text, s = (ROOT / "configurator" / "quokka" / "gpu.py").read_text(encoding="utf-8"), settings("", "gpu")
    shape = train.Config(**s).shape()
    inner = shape["n_head"] * shape["head_dim"]
    layer = 4 * shape["d_model"] * inner + 3 * shape["d_model"] * shape["d_ff"]
    n = 50304 * shape["d_model"] + shape["n_layer"] * layer
    tokens = s["tokens"]
    assert round(n / 1e6, 1) == 50.7 and round(tokens / 1e9, 2) == 4.53 and round(tokens / n) == 89
    assert "6 · 50.7e6 · 4.53e9 = 1.4e18" in text and 6 * n * tokens == pytest.approx(1.4e18, rel=0.02)
    assert 320e6 * tokens == pytest.approx(1.45e18, rel=0.01)
    assert 1.45e18 / (0.4 * 989e12) == pytest.approx(3600, rel=0.02)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_is_documented_and_used(path):
    head = "".join(
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if line.startswith("#")
    )
    for word in ("Hardware", "Expect"):
        assert word in head, "say what it trains, on what hardware, for how long, what to expect"

    runs = [(scale, words, study.override_files(words, scale)) for scale in SCALES for words in WORDS]
    using = [run for run in runs if path.name in [file.split("/")[-1] for file in run[2]]]
    assert using
    if path.stem.startswith(SCALES):  # complete: it runs alone, into the folder where the study would have it
        cfg = configurator.load(train.Config, [str(path)])
        alone = [(scale, words) for scale, words, files in using if len(files) == 1]
        folders = [study.make_run(words, study.Config(scale=scale), []).folder for scale, words in alone]
        assert [str(folder) for folder in folders] == [cfg.run_dir]


def test_runs_have_folders_of_their_own():
    configs = [study.Config(scale=scale) for scale in SCALES]
    folders = {study.make_run(words, cfg, []).folder for cfg in configs for words in WORDS}
    assert len(folders) == 3 * len(WORDS)


# ---- the table


def write_metrics(folder, n=60, loss=2.0, val=2.5, **last):
    """A run as train.py would log it: n lines, then an evaluation that also holds `last`."""
    folder.mkdir(parents=True)
    lines = [dict(step=0, tokens=0, val_loss=5.5, objective="x")]
    for i in range(1, n + 1):
        lines.append(dict(step=i, tokens=1000 * i, loss=loss + 1 / i, grad_norm=1.0, param_norm=50.0 + i))
    lines.append(dict(step=n, tokens=1000 * n, val_loss=val, objective="x", **last))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )


def cells(text):
    """The rows of all tables in Markdown, in order of appearance: [(figure, kind, [cells])]."""
    rows, figure = [], None
    for line in text.splitlines():
        if found := re.match(r"## (autoregressive|diffusion).*Figure (\d+)", line):
            figure = int(found[2]), "AR" if found[1] == "autoregressive" else "DLM"
        elif line.startswith("| ") and not line.startswith("| the paper's"):
            rows.append((*figure, [cell.strip() for cell in line.strip("|").split("|")]))
    return rows


def test_a_study_that_the_paper_has_not_compares_ours_alone(tmp_path):
    cfg = study.Config(runs=str(tmp_path))
    runs = runs_of("block", cfg)
    for i, run in enumerate(runs.values()):
        write_metrics(run.folder, val=2.5 + i / 10)
    text = study_report.write_table("block", study.STUDIES["block"], cfg, runs, "command")
    assert "## tokens of a block, from AR to full diffusion (not in the paper)" in text
    row = next(line for line in text.splitlines() if line.startswith("| 4 |"))
    assert "diffusion_block=4" in row and "| 2.700 / — | +0.200 |" in row
    assert text.count("| curve | ours |") == 1 and row.endswith("| — |")  # no checkpoint writes


def test_tokens_per_pass(run_main, monkeypatch):
    """Of an AR model one; of a masked one that is sure of everything, the whole row at once."""
    assert study_report.tokens_per_pass(run_main("--objective=ar", "--steps=2", run="ar")) == "1.00"
    run = run_main("--steps=2", run="masked")
    assert 1 <= float(study_report.tokens_per_pass(run)) < 4
    monkeypatch.setattr(study_report, "DecodeConfig", lambda order, cache: DecodeConfig(order, threshold=0.0))
    assert study_report.tokens_per_pass(run) == "32.00"


@pytest.mark.parametrize("name", [name for name in study.STUDIES if name != "block"])
def test_the_table_holds_the_papers_values(tmp_path, name):
    cfg = study.Config(runs=str(tmp_path))
    runs = runs_of(name, cfg)
    for i, run in enumerate(runs.values()):
        last = {"val_paper": 2.8, "val_noisy": 5.0, "val_clean": 0.6} if name == "kernel" and i else {}
        write_metrics(run.folder, val=2.5 + i / 10, **last)
    text = study_report.write_table(name, study.STUDIES[name], cfg, runs, "command")
    folder = ORIGINALS if ORIGINALS.is_dir() else ROOT / "results/quokka"
    originals = read_rows(folder / "ablation_final_values.csv")

    def paper(key, column):
        for row in originals:
            if (int(row["figure"]), row["model_type"], row["series"], row["metric"]) == key:
                return float(row[column])

    rows, first = cells(text), {}
    assert len(rows) == sum(len(row.runs) for row in study.STUDIES[name])
    for figure, kind, (curve, _, loss, val, difference, _, norm, hellaswag, mmlu) in rows:
        key = figure, kind, curve
        last_train = paper((*key, "train_loss"), "mean_last_1B")
        last_val, best = paper((*key, "val_loss_c4"), "last"), paper((*key, "val_loss_c4"), "best")
        expected = [(loss, last_train, 3), (val, last_val, 3)]
        for cell, metric in ((norm, "params_norm"), (hellaswag, "hellaswag"), (mmlu, "mmlu_val")):
            expected.append((cell, paper((*key, metric), "last"), 1))
        for cell, value, digits in expected:
            theirs = cell.split(" / ")[1].split(" (best")[0]
            assert theirs == ("—" if value is None else f"{value:.{digits}f}")

        # the best on the way, where validation ended well above it
        their_val = val.split(" / ")[1]
        assert ("best" in their_val) == (best is not None and last_val > best + 0.01)
        assert "best" not in their_val or their_val.endswith(f"(best {best:.3f})")

        judged = last_val if last_val is not None else last_train
        first.setdefault((figure, kind), judged)
        if difference:
            assert difference.split(" / ")[1] == f"{judged - first[figure, kind]:+.3f}"
    if name == "kernel":
        assert "5.000 / 7.260 and 0.600 / 0.138" in text and "+0.300 / +0.444 | same" in text
        assert "our bound is 2.600, +0.100 to the first run's" in text


def test_our_values(tmp_path):
    last = {"eval/hellaswag": 0.31, "eval/hellaswag_stderr": 0.01, "eval/mmlu": 27.5,
            "eval/bound/error": 9.0}
    write_metrics(tmp_path / "run", n=100, val=2.5, **last)
    values = study_report.final_values(read_metrics(tmp_path / "run"))
    last_twentieth = np.mean([2 + 1 / i for i in range(96, 101)])
    assert values["train_loss"] == pytest.approx(last_twentieth)
    assert (values["val_loss_c4"], values["best"], values["params_norm"]) == (2.5, 2.5, 150)
    assert values["hellaswag"] == pytest.approx(31) and values["mmlu_val"] == 27.5
    assert study_report.final_values([]) == {}


@pytest.mark.parametrize("ours, theirs, words", [
    (0.1, 0.2, "same"),
    (-0.1, -0.01, "same"),
    (0.1, -0.2, "**opposite**"),
    (0.01, 0.2, "ours within noise"),
    (0.1, 0.001, "none in the paper"),
    (0.01, -0.001, "none in either"),
])
def test_directions(ours, theirs, words):
    assert study_report.describe_direction(ours, theirs, 0.02) == words


def test_benchmarks_are_what_eval_measures_of_tasks():
    """`eval.py --watch` logs bounds, exact likelihoods and texts beside the benchmarks."""
    report = dict(
        bound=dict(nats_per_token=2.5, error=0.1, bits_per_byte=3.0),
        ordered={order: dict(nats_per_token=2.4, error=0.1) for order in ORDERS},
        tasks=dict(hellaswag=dict(acc_norm=0.31, acc_norm_stderr=0.01)),
        texts=dict(entropy=dict(mean=3.0), nll=dict(mean=2.0)),
    )
    line = figures(report)
    assert len(line) == 13
    assert study_report.task_keys([line]) == ["eval/hellaswag/acc_norm", "eval/hellaswag/acc_norm_stderr"]


def test_a_run_that_diverged(tmp_path):
    """Its cells and curves say so, and the others' are still to be seen."""
    cfg = study.Config(runs=str(tmp_path))
    runs = runs_of("lr", cfg)
    for run, val in zip(runs.values(), (2.5, float("nan"))):
        write_metrics(run.folder, n=20, val=val)
    rows = study.STUDIES["lr"]
    assert "| ours diverged |" in study_report.write_table("lr", rows, cfg, runs, "how")
    study_report.draw_panels(rows, runs, tmp_path)
    assert (tmp_path / "panels.png").exists()


def test_panels_take_whatever_was_evaluated(tmp_path):
    cfg = study.Config(runs=str(tmp_path))
    for name in ("lr", "kernel"):
        runs = runs_of(name, cfg)
        write_metrics(next(iter(runs.values())).folder, **{"eval/mmlu": 0.25})
        study_report.draw_panels(study.STUDIES[name], runs, tmp_path)  # most runs have nothing yet
        assert (tmp_path / "panels.png").stat().st_size > 5000
        assert (tmp_path / "panels.pdf").read_bytes().startswith(b"%PDF")
        (tmp_path / "panels.png").unlink()


# ---- the runs


@pytest.fixture
def here(monkeypatch, capsys):
    """Call study.main() in this process, where nothing is to be trained: its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    monkeypatch.chdir(ROOT)

    def call(*argv):
        code = 0
        try:
            study.main(list(map(str, argv)))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return call


def studied(name, corpus, runs, *flags):
    """Run a study as a program; returns what it printed, after a look at its files."""
    done = run_study(name, f"--runs={runs}", *flags, "--", *SHORT, f"--corpus={corpus}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    out = runs / "tiny" / f"study_{name}"
    assert {p.name for p in out.iterdir()} == {"table.md", "panels.png", "panels.pdf"}
    table = (out / "table.md").read_text(encoding="utf-8")
    assert table in done.stdout
    for _, _, (_, _, loss, val, *_, norm, _, _) in cells(table):
        assert all(float(cell.split()[0]) > 0 for cell in (loss, val, norm))
    return done.stdout


def test_a_study_end_to_end(corpus, tmp_path, here):
    """Run it, run it again (nothing to do), draw it, ask for other settings, share its runs."""
    output = studied("kernel", corpus, tmp_path)
    shown = [line for line in output.splitlines() if line.startswith("[")]
    files = "configurator/quokka/tiny.py configurator/quokka/uniform.py"
    assert len(shown) == 2 and shown[1].startswith(f"[2/2] python train.py {files} --tokens=4096 ")
    for run in ("masked", "uniform"):  # the logged norm is that of the weights that were saved
        folder = tmp_path / "tiny" / run
        weights = load_file(checkpoints(folder)[0] / "model.safetensors")
        norm = math.sqrt(sum(w.double().square().sum().item() for w in weights.values()))
        logged = [m["param_norm"] for m in read_metrics(folder) if "param_norm" in m]
        assert logged[-1] == pytest.approx(norm, rel=1e-5)

    # again
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny").glob("*/metrics.jsonl")}
    tail = ("--", *SHORT, f"--corpus={corpus}")
    code, out, _ = here("kernel", f"--runs={tmp_path}", *tail)
    assert code == 0 and out.count(" is finished") == 2
    assert {p: p.stat().st_mtime_ns for p in before} == before

    # drawn
    table = (tmp_path / "tiny" / "study_kernel" / "table.md").read_text(encoding="utf-8")
    code, out, err = here("kernel", f"--runs={tmp_path}", "--draw", f"--out={tmp_path / 'drawn'}", *tail)
    assert (code, err) == (0, "") and "train.py" not in out
    assert (tmp_path / "drawn" / "table.md").read_text(encoding="utf-8") == table

    # with other settings
    code, out, err = here("kernel", f"--runs={tmp_path}", *tail, "--lr=1e-3")
    assert (code, out) == (2, "")
    folder = tmp_path / "tiny" / "masked"
    assert err == (f"scaling.py: {folder} was made with other settings (lr 0.002 → 0.001); "
                   "remove it or choose another --runs\n")

    # a study that shares a run
    _, out, _ = here("schedule", f"--runs={tmp_path}", "--launch", *tail)
    first, *commands, then = out.splitlines()
    assert first == f"# {tmp_path / 'tiny' / 'masked'} is finished" and len(commands) == 2
    assert then.startswith("# then")
    for command in commands:
        assert command.startswith("python train.py configurator/quokka/tiny.py ")
        assert command.endswith(" --resume=auto")
    code, out, err = here("schedule", f"--runs={tmp_path}", "--draw", *tail)
    row = "| cosine | schedule=cosine | — / 2.818 | — / 3.235 |  |  | — / — |"
    assert code == 0 and row in out and err.startswith("not finished: ")


def test_interrupted(corpus, tmp_path):
    """A signal to the study alone reaches the run, which saves."""
    process = start_study("time", f"--runs={tmp_path}", "--", *SHORT, f"--corpus={corpus}", "--tokens=2e6",
                          "--log_every=8")
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step     16/"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, output
    assert "stopped by a signal after step" in output and "the same command goes on" in output
    assert "[2/2]" not in output
    (stopped,) = checkpoints(tmp_path / "tiny" / "masked")
    record = json.loads((stopped / "checkpoint.json").read_text(encoding="utf-8"))
    assert record["step"] < record["steps"]


@pytest.mark.slow
def test_interrupted_goes_on_to_the_end(corpus, tmp_path):
    argv = ("time", f"--runs={tmp_path}", "--", *SHORT, f"--corpus={corpus}", "--tokens=4e5")
    process = start_study(*argv)
    for line in process.stdout:
        if line.startswith("step     16/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    done = run_study(*argv)
    assert done.returncode == 0 and "resumed from" in done.stdout
    steps = [m["step"] for m in read_metrics(tmp_path / "tiny" / "masked") if "loss" in m]
    assert steps == sorted(set(steps)) and steps[-1] == 391


@pytest.mark.slow
def test_several_processes_log_the_same_norm(corpus, tmp_path):
    """--gpus=2 goes by torchrun; the norm of the weights is that of one process."""
    norms = []
    for gpus in (1, 2):
        flags = (f"--runs={tmp_path / str(gpus)}", f"--gpus={gpus}", "--", *SHORT, f"--corpus={corpus}")
        done = run_study("kernel", *flags, "--dtype=float32", "--log_every=1", "--time=iid")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        metrics = read_metrics(tmp_path / str(gpus) / "tiny" / "masked")
        norms.append([m["param_norm"] for m in metrics if "param_norm" in m])
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.slow
def test_all_tiny_studies_end_to_end(corpus, tmp_path):
    """22 runs: each study's, but for those that an earlier study has made."""
    output = "".join(studied(name, corpus, tmp_path) for name in study.STUDIES)
    started = [line for line in output.splitlines() if re.match(r"\[\d+/\d+\] python", line)]
    assert len(started) == len(WORDS) == 22 and output.count(" is finished") == ALL_RUNS - 22


@pytest.mark.parametrize("name", study.STUDIES)
def test_launch_prints_what_runs(name, tmp_path, monkeypatch, here):
    _, out, _ = here(name, "--scale=paper", f"--runs={tmp_path}", "--launch")
    *commands, last = out.splitlines()
    assert len(commands) == len(study.words_of(name))
    monkeypatch.setenv("WORLD_SIZE", "8")
    for command in commands:
        launcher, processes, script, *arguments = shlex.split(command)
        assert (launcher, processes, script) == ("torchrun", "--nproc_per_node=8", "train.py")
        assert arguments[-1] == "--resume=auto"
        configurator.load(train.Config, arguments)  # complete and without contradictions on eight ranks
    then = f"# then, with the runs in {tmp_path}: python scaling.py study {name} --draw --scale=paper"
    assert last == then and not list(tmp_path.iterdir())


CHOICES = ("choose from kernel, schedule, time, loss, batch, lr, weight_decay, block, optimizer, "
           "data_constrained")


@pytest.mark.parametrize("argv, line", [
    (["kernl"], f"there is no study 'kernl'; {CHOICES}"),
    ([], f"which study?; {CHOICES}"),
    (["lr", "--scale=big"], "--scale=big: choose from tiny, gpu, paper"),
    (["lr", "--", "--lrr=3"], "--lrr=3: unknown setting 'lrr'; did you mean 'lr'?"),
])
def test_what_is_wrong_is_said_in_one_line(argv, line, here):
    assert here(*argv) == (2, "", f"scaling.py: {line}\n")


def test_a_run_that_fails_ends_the_study(tmp_path, corpus):
    flags = ("--", f"--corpus={corpus}", "--device=cpu", "--unique_tokens=1B")
    done = run_study("kernel", f"--runs={tmp_path}", *flags)
    assert done.returncode == 2 and "unique_tokens" in done.stderr and "[2/2]" not in done.stdout
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("scaling.py: exit code 2 from: python train.py ")


def test_help_names_every_study(here):
    code, text, _ = here("--help")
    assert code == 0 and all(name in text for name in study.STUDIES) and "--scale=" in text


def test_without_its_gpus_or_its_corpus_a_study_ends_at_once(tmp_path, here, monkeypatch):
    """One line before anything is started, not a traceback of torchrun's."""
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 1)
    code, out, err = here("kernel", "--scale=paper", f"--runs={tmp_path / 'r'}")
    assert (code, out) == (2, "")
    assert err == ("scaling.py: --scale=paper needs 8 GPUs per run, this machine has 1; "
                   "--launch prints the commands to run elsewhere\n")
    code, out, err = here("kernel", f"--runs={tmp_path / 'r'}", "--", "--corpus=nowhere")
    assert (code, out) == (2, "") and "nowhere" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_tiny_studies_may_take_several_processes_without_a_gpu(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(study.torch.cuda, "device_count", lambda: 0)
    run = study.Run(tmp_path, [], train.Config(corpus=str(corpus), val_share=0.1))
    study.check_machine([run], study.Config(scale="tiny", gpus=2))
    with pytest.raises(SystemExit):
        study.check_machine([run], study.Config(scale="gpu"))


# ---- the paper's numbers


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="the originals are not at hand")
def test_shipped_numbers_are_the_originals():
    for path in ORIGINALS.iterdir():
        assert (ROOT / "results" / "quokka" / path.name).read_bytes() == path.read_bytes()
