"""The paper's ablations: their files say what the specification says, their studies run, and the table holds the paper's values."""

import csv
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
from safetensors.torch import load_file

import configurator
import train
from laws import study
from training.checkpoint import checkpoints
from training.log import read_metrics

FILES = sorted((ROOT / "configurator" / "quokka").glob("*.py"))
SCALES = ("tiny", "gpu", "paper")
WORDS = sorted({words for rows in study.STUDIES.values() for row in rows for words in row.runs.values()})
SHORT = ["--tokens=4096", "--n_layer=1", "--n_head=2", "--d_model=32", "--compile=no", "--eval_rows=8", "--device=cpu"]


def settings(words, scale):
    return asdict(configurator.load(train.Config, study.files_of(words, scale)))


def run_study(*argv, cwd=ROOT):
    return subprocess.run([sys.executable, ROOT / "study.py", *map(str, argv)], cwd=cwd, capture_output=True, text=True)


# ------------------------------------------------------------------------------------------------- the files


def test_the_papers_baseline_is_the_specifications():
    got = settings("", "paper")
    wanted = dict(objective="masked", loss="elbo", schedule="linear", time="uniform", model="1086M", tokens=96e9, seq_len=2048, batch_size=256,
                  lr=2e-4, min_lr=-1, lr_schedule="cosine", warmup=2000, beta1=0.9, beta2=0.95, weight_decay=0.1, clip=1.0, short_rows=0.01, tied=True,
                  rope_base=10_000.0, dropout=0.0, init_std=0.02, scaled_init=True, unique_tokens=0, estimator="count", time_correction=False)
    assert {k: got[k] for k in wanted} == wanted and not got["steps"] and not got["epochs"]
    assert train.Config(**got).shape() == dict(n_layer=26, n_head=14, n_kv_head=14, head_dim=128, d_model=1792, d_ff=4736)


# What each run changes, from SPEC §5 and §10: literal values at the paper's scale, the same ratios at the others'.
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
    "": {},
}
CHANGES |= {f"{words} ar".strip(): dict(objective="ar", **CHANGES[words])
            for words in ("", "@batch_4x", "@batch_16x", "@lr_half", "@lr_double", "no_decay", "@96_epochs", "@96_epochs no_decay")}


@pytest.mark.parametrize("words", WORDS)
def test_every_run_changes_what_the_specification_says(words):
    base, got = settings("", "paper"), settings(words, "paper")
    assert {k: v for k, v in got.items() if v != base[k] and k not in study.NEUTRAL} \
        == {k: v for k, v in CHANGES[words].items() if v != base[k]}
    for scale in ("tiny", "gpu"):
        small_base, small = settings("", scale), settings(words, scale)
        for key, value in CHANGES[words].items():
            if key in ("tokens", "batch_size", "lr"):
                assert small[key] == pytest.approx(small_base[key] * value / base[key])
            elif key == "unique_tokens":
                assert small[key] * 96 == small_base["tokens"] and small[key] % small["seq_len"] == 0
            elif key != "decay":
                assert small[key] == value
        differ = {k for k, v in small.items() if v != small_base[k]} - study.NEUTRAL
        assert differ <= CHANGES[words].keys()
    evaluations = [s["tokens"] / s["batch_size"] / s["seq_len"] / s["eval_every"] for s in (base, got)]
    assert evaluations[1] / evaluations[0] == pytest.approx(got["tokens"] / base["tokens"])  # equally dense in tokens


def test_the_studies_are_all_of_the_papers():
    assert set(WORDS) == set(CHANGES)
    assert sum(len(row.runs) for rows in study.STUDIES.values() for row in rows) == 2 + 3 + 2 + 2 + 6 + 6 + 8
    rows = {(row.figure, row.kind, curve) for rows in study.STUDIES.values() for row in rows for curve in row.runs}
    assert rows == study.paper_values().keys()  # every curve of the paper has its run, and only those


@pytest.mark.parametrize("scale, steps_lr", [("tiny", 3.1), ("gpu", 35), ("paper", 37)])
def test_the_scales_keep_the_papers_shares(scale, steps_lr):
    for words in WORDS:
        s = settings(words, scale)
        steps = math.ceil(s["tokens"] / s["batch_size"] / s["seq_len"])
        assert s["warmup"] < steps / 3 and s["log_every"] >= 1 and s["eval_every"] >= 1 and s["save_every"] >= 1
        assert s["lr_schedule"] != "wsd" or s["decay"] < 1 or s["warmup"] + s["decay"] < steps
        if words == "":
            assert s["warmup"] / steps == pytest.approx(2000 / 183105, rel=0.06) and s["lr"] * steps == pytest.approx(steps_lr, rel=0.02)


def test_gpu_header_arithmetic():
    text, s = (ROOT / "configurator" / "quokka" / "gpu.py").read_text(), settings("", "gpu")
    shape = train.Config(**s).shape()
    n = 50304 * shape["d_model"] + shape["n_layer"] * (4 * shape["d_model"] * shape["n_head"] * shape["head_dim"] + 3 * shape["d_model"] * shape["d_ff"])
    assert round(n / 1e6, 1) == 50.7 and round(s["tokens"] / 1e9, 2) == 4.53 and round(s["tokens"] / n) == 89
    assert "6 · 50.7e6 · 4.53e9 = 1.4e18" in text and 6 * n * s["tokens"] == pytest.approx(1.4e18, rel=0.02)
    assert 320e6 * s["tokens"] == pytest.approx(1.45e18, rel=0.01) and 1.45e18 / (0.4 * 989e12) == pytest.approx(3600, rel=0.02)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_file_is_documented_and_used(path):
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert all(word in head for word in ("Hardware", "Expect")), "say what it trains, on what hardware, for how long, what to expect"
    using = {(scale, words) for scale in SCALES for words in WORDS if path.stem in [f.split("/")[-1][:-3] for f in study.files_of(words, scale)]}
    assert using
    if path.stem.startswith(SCALES):  # complete: it runs alone, into the folder where the study would have it
        cfg = configurator.load(train.Config, [str(path)])
        alone = [study.plan(words, study.Config(scale=scale), []) for scale, words in using if len(study.files_of(words, scale)) == 1]
        assert [str(run.folder) for run in alone] == [cfg.run_dir]


def test_runs_have_folders_of_their_own():
    folders = {study.plan(words, study.Config(scale=scale), []).folder for scale in SCALES for words in WORDS}
    assert len(folders) == 3 * len(WORDS)


# ------------------------------------------------------------------------------------------------- the table


def write_metrics(folder, n=60, loss=2.0, val=2.5, **last):
    """A run as train.py would log it: n lines, then an evaluation that also holds `last`."""
    folder.mkdir(parents=True)
    lines = [dict(step=i, tokens=1000 * i, loss=loss + 1 / i, grad_norm=1.0, param_norm=50.0 + i) for i in range(1, n + 1)]
    lines += [dict(step=0, tokens=0, val_loss=5.5, objective="x"), dict(step=n, tokens=1000 * n, val_loss=val, objective="x", **last)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"])))


def cells(text):
    """The rows of all tables in Markdown, by (figure, first cell) in order of appearance: [(figure, kind, [cells])]."""
    rows, figure = [], None
    for line in text.splitlines():
        if found := re.match(r"## (autoregressive|diffusion).*Figure (\d+)", line):
            figure = int(found[2]), "AR" if found[1] == "autoregressive" else "DLM"
        elif line.startswith("| ") and not line.startswith("| the paper's"):
            rows.append((*figure, [cell.strip() for cell in line.strip("|").split("|")]))
    return rows


@pytest.mark.parametrize("name", study.STUDIES)
def test_the_table_holds_the_papers_values(tmp_path, name):
    cfg = study.Config(runs=str(tmp_path))
    runs = {words: study.plan(words, cfg, []) for row in study.STUDIES[name] for words in row.runs.values()}
    for i, run in enumerate(runs.values()):
        write_metrics(run.folder, val=2.5 + i / 10, **({"val_paper": 2.8, "val_noisy": 5.0, "val_clean": 0.6} if name == "kernel" and i else {}))
    text = study.table(name, cfg, runs, "command")
    csv_rows = list(csv.DictReader((ROOT / "../shared/paper/ablation_final_values.csv" if (ROOT / "../shared/paper").is_dir() else
                                    ROOT / "results/quokka/ablation_final_values.csv").read_text().splitlines()))

    def paper(figure, kind, series, metric, column):
        found = [float(r[column]) for r in csv_rows if (int(r["figure"]), r["model_type"], r["series"], r["metric"]) == (figure, kind, series, metric)]
        return found[0] if found else None

    rows = cells(text)
    assert len(rows) == sum(len(row.runs) for row in study.STUDIES[name])
    firsts = {}
    for figure, kind, (series, _, loss, val, difference, _, norm, hellaswag, mmlu) in rows:
        theirs = [cell.split(" / ")[1] for cell in (loss, val, norm, hellaswag, mmlu)]
        wanted = [(paper(figure, kind, series, "train_loss", "mean_last_1B"), 3), (paper(figure, kind, series, "val_loss_c4", "last"), 3),
                  (paper(figure, kind, series, "params_norm", "last"), 1), (paper(figure, kind, series, "hellaswag", "last"), 1),
                  (paper(figure, kind, series, "mmlu_val", "last"), 1)]
        best = paper(figure, kind, series, "val_loss_c4", "best")
        for cell, (value, digits) in zip(theirs, wanted):
            assert cell.split(" (best")[0] == ("—" if value is None else f"{value:.{digits}f}")
        assert ("best" in theirs[1]) == (best is not None and wanted[1][0] > best + 0.01)
        if "best" in theirs[1]:
            assert theirs[1].endswith(f"(best {best:.3f})")
        judged = wanted[1][0] if wanted[1][0] is not None else wanted[0][0]
        first = firsts.setdefault((figure, kind), judged)
        if (figure, kind) in firsts and difference:
            assert difference.split(" / ")[1] == f"{judged - first:+.3f}"
    if name == "kernel":
        assert "5.000 / 7.260 and 0.600 / 0.138" in text and "our bound is 2.600, +0.100 to the first run's" in text and "+0.300 / +0.444 | same" in text


def test_our_values(tmp_path):
    write_metrics(tmp_path / "run", n=100, val=2.5, **{"eval/hellaswag": 0.31, "eval/hellaswag_stderr": 0.01, "eval/mmlu": 27.5})
    values = study.final_values(read_metrics(tmp_path / "run"))
    assert values["train_loss"] == pytest.approx(np.mean([2 + 1 / i for i in range(96, 101)]))  # the last twentieth
    assert (values["val_loss_c4"], values["best"], values["params_norm"]) == (2.5, 2.5, 150)
    assert values["hellaswag"] == pytest.approx(31) and values["mmlu_val"] == 27.5
    assert study.final_values([]) == {}


@pytest.mark.parametrize("ours, theirs, words", [(0.1, 0.2, "same"), (-0.1, -0.01, "same"), (0.1, -0.2, "**opposite**"), (0.01, 0.2, "ours within noise"),
                                                 (0.1, 0.001, "none in the paper"), (0.01, -0.001, "none in either")])
def test_directions(ours, theirs, words):
    assert study.direction(ours, theirs, 0.02) == words


def test_smoothing():
    assert study.smooth(np.full(1000, 3.0)) == pytest.approx(3.0) and len(study.smooth(np.zeros(5))) == 5
    line = np.linspace(0, 1, 10_000)
    assert study.smooth(line)[2000:-2000] == pytest.approx(line[2000:-2000])
    one = study.smooth(np.eye(1, 10_000, 5000)[0])
    assert np.count_nonzero(one) == 301 and one.sum() == pytest.approx(1)  # the paper's window
    assert np.count_nonzero(study.smooth(np.eye(1, 200, 100)[0])) == 21
    noise = np.random.default_rng(0).normal(size=10_000)
    assert study.smooth(noise).std() < 0.12


def test_panels_take_whatever_was_evaluated(tmp_path):
    cfg = study.Config(runs=str(tmp_path))
    for name in ("lr", "kernel"):
        runs = {words: study.plan(words, cfg, []) for row in study.STUDIES[name] for words in row.runs.values()}
        write_metrics(next(iter(runs.values())).folder, **{"eval/mmlu": 0.25})
        study.draw(name, runs, tmp_path)  # most runs have nothing yet
        assert (tmp_path / "panels.png").stat().st_size > 5000 and (tmp_path / "panels.pdf").read_bytes().startswith(b"%PDF")
        (tmp_path / "panels.png").unlink()


# -------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def here(monkeypatch, capsys):
    """Call study.main() in this process, where nothing is to be trained; returns its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["study.py"])
    monkeypatch.chdir(ROOT)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def call(*argv):
        code = 0
        try:
            study.main(list(map(str, argv)))
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield call
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def studied(name, corpus, runs, *flags):  # noqa: F811
    done = run_study(name, f"--runs={runs}", *flags, "--", *SHORT, f"--corpus={corpus}")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    out = runs / "tiny" / f"study_{name}"
    assert {p.name for p in out.iterdir()} == {"table.md", "panels.png", "panels.pdf"} and (out / "table.md").read_text() in done.stdout
    for _, _, (_, _, loss, val, *_, norm, _, _) in cells((out / "table.md").read_text()):
        assert all(float(cell.split()[0]) > 0 for cell in (loss, val, norm))
    return done.stdout


def test_a_study_end_to_end(corpus, tmp_path, here):  # noqa: F811
    """Run it, run it again (nothing to do), draw it, ask for other settings, share its runs."""
    output = studied("kernel", corpus, tmp_path)
    shown = [line for line in output.splitlines() if line.startswith("[")]
    assert len(shown) == 2 and shown[1].startswith("[2/2] python train.py configurator/quokka/tiny.py configurator/quokka/uniform.py --tokens=4096 ")
    for run in ("masked", "uniform"):  # the logged norm is that of the weights that were saved
        weights = load_file(checkpoints(tmp_path / "tiny" / run)[0] / "model.safetensors")
        norm = math.sqrt(sum(w.double().square().sum().item() for w in weights.values()))
        assert [m for m in read_metrics(tmp_path / "tiny" / run) if "param_norm" in m][-1]["param_norm"] == pytest.approx(norm, rel=1e-5)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "tiny").glob("*/metrics.jsonl")}
    tail = ("--", *SHORT, f"--corpus={corpus}")
    code, out, _ = here("kernel", f"--runs={tmp_path}", *tail)
    assert code == 0 and out.count(" is finished") == 2 and {p: p.stat().st_mtime_ns for p in before} == before
    table = (tmp_path / "tiny" / "study_kernel" / "table.md").read_text()
    code, out, err = here("kernel", f"--runs={tmp_path}", "--draw", f"--out={tmp_path / 'drawn'}", *tail)
    assert (code, err) == (0, "") and (tmp_path / "drawn" / "table.md").read_text() == table and "train.py" not in out
    assert here("kernel", f"--runs={tmp_path}", *tail, "--lr=1e-3") == (
        2, "", f"study.py: {tmp_path / 'tiny' / 'masked'} was trained with other settings (lr 0.002, not 0.001); remove it or choose another --runs\n")
    _, out, _ = here("schedule", f"--runs={tmp_path}", "--launch", *tail)
    first, *commands, then = out.splitlines()
    assert first == f"# {tmp_path / 'tiny' / 'masked'} is finished" and len(commands) == 2 and then.startswith("# then")
    assert all(c.startswith("python train.py configurator/quokka/tiny.py ") and c.endswith(" --resume=auto") for c in commands)
    code, out, err = here("schedule", f"--runs={tmp_path}", "--draw", *tail)
    assert code == 0 and "| cosine | schedule=cosine | — / 2.818 | — / 3.235 |  |  | — / — |" in out and err.startswith("not finished: ")


def test_interrupted(corpus, tmp_path):  # noqa: F811
    """A signal to the study alone reaches the run, which saves."""
    argv = [sys.executable, ROOT / "study.py", "time", f"--runs={tmp_path}", "--", *SHORT, f"--corpus={corpus}", "--tokens=2e6", "--log_every=8"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("step     16/"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, output
    assert "stopped by a signal after step" in output and "the same command goes on" in output and "[2/2]" not in output
    (stopped,) = checkpoints(tmp_path / "tiny" / "masked")
    record = json.loads((stopped / "checkpoint.json").read_text())
    assert record["step"] < record["steps"]


@pytest.mark.slow
def test_interrupted_goes_on_to_the_end(corpus, tmp_path):  # noqa: F811
    argv = [sys.executable, ROOT / "study.py", "time", f"--runs={tmp_path}", "--", *SHORT, f"--corpus={corpus}", "--tokens=4e5"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step     16/"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "resumed from" in done.stdout
    steps = [m["step"] for m in read_metrics(tmp_path / "tiny" / "masked") if "loss" in m]
    assert steps == sorted(set(steps)) and steps[-1] == 391


@pytest.mark.slow
def test_several_processes_log_the_same_norm(corpus, tmp_path):  # noqa: F811
    """--gpus=2 goes by torchrun; the norm of the weights is that of one process."""
    norms = []
    for gpus in (1, 2):
        done = run_study("kernel", f"--runs={tmp_path / str(gpus)}", f"--gpus={gpus}", "--", *SHORT, f"--corpus={corpus}", "--dtype=float32", "--log_every=1",
                         "--time=iid")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        norms.append([m["param_norm"] for m in read_metrics(tmp_path / str(gpus) / "tiny" / "masked") if "param_norm" in m])
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=1e-6)


@pytest.mark.slow
def test_all_tiny_studies_end_to_end(corpus, tmp_path):  # noqa: F811
    """22 runs: each study's, but for those that an earlier study has made."""
    output = "".join(studied(name, corpus, tmp_path) for name in study.STUDIES)
    started = [line for line in output.splitlines() if re.match(r"\[\d+/\d+\] python", line)]
    assert len(started) == len(WORDS) == 22 and output.count(" is finished") == 2 + 3 + 2 + 2 + 6 + 6 + 8 - 22


@pytest.mark.parametrize("name", study.STUDIES)
def test_launch_prints_what_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    study.main([name, "--scale=paper", f"--runs={tmp_path}", "--launch"])
    *commands, last = capsys.readouterr().out.splitlines()
    assert len(commands) == len({words for row in study.STUDIES[name] for words in row.runs.values()})
    for command in commands:
        launcher, processes, script, *arguments = shlex.split(command)
        assert (launcher, processes, script, arguments[-1]) == ("torchrun", "--nproc_per_node=8", "train.py", "--resume=auto")
        monkeypatch.setenv("WORLD_SIZE", "8")
        configurator.load(train.Config, arguments)  # complete and without contradictions on eight ranks
        monkeypatch.delenv("WORLD_SIZE")
    assert last == f"# then, with the runs in {tmp_path}: python study.py {name} --draw --scale=paper" and not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv, line", [
    (["kernl"], "there is no study 'kernl'; choose from kernel, schedule, time, loss, batch, lr, weight_decay"),
    ([], "which study?; choose from kernel, schedule, time, loss, batch, lr, weight_decay"),
    (["lr", "--scale=big"], "--scale=big: choose from tiny, gpu, paper"),
    (["lr", "--", "--lrr=3"], "--lrr=3: unknown setting 'lrr'; did you mean 'lr'?"),
])
def test_what_is_wrong_is_said_in_one_line(argv, line, here):
    assert here(*argv) == (2, "", f"study.py: {line}\n")


def test_a_run_that_fails_ends_the_study(tmp_path, corpus):
    done = run_study("kernel", f"--runs={tmp_path}", "--", f"--corpus={corpus}", "--device=cpu", "--unique_tokens=1B")
    assert done.returncode == 2 and "unique_tokens" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("study.py: exit code 2 from: python train.py ") and "[2/2]" not in done.stdout


def test_help_names_every_study(capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in study.STUDIES) and "--scale=" in text


# ------------------------------------------------------------------------------------------ the paper's files


@pytest.mark.skipif(not (ROOT / "../shared/paper").is_dir(), reason="the originals are not at hand")
def test_shipped_numbers_are_the_originals():
    for path in (ROOT / "../shared/paper").iterdir():
        assert (ROOT / "results" / "quokka" / path.name).read_bytes() == path.read_bytes()


def test_without_its_gpus_a_study_ends_at_once(tmp_path):
    """One line before anything is started, not a traceback of torchrun's."""
    if study.torch.cuda.device_count() >= 8:
        pytest.skip("this machine has the GPUs")
    done = subprocess.run([sys.executable, "study.py", "kernel", "--scale=paper", f"--runs={tmp_path / 'r'}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"study.py: --scale=paper needs 8 GPUs per run, this machine has {study.torch.cuda.device_count()}; --launch prints the commands to run elsewhere\n"
    done = subprocess.run([sys.executable, "study.py", "kernel", f"--runs={tmp_path / 'r'}", "--", "--corpus=nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr and len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert not (tmp_path / "r").exists()


def test_tiny_studies_may_take_several_processes_without_a_gpu(tmp_path, corpus):
    run = study.Run(tmp_path, [], dict(device="auto", corpus=str(corpus), tokenizer="", val_share=0.1))
    study.check_machine([run], study.Config(scale="tiny", gpus=2))
    if not study.torch.cuda.device_count():
        with pytest.raises(SystemExit):
            study.check_machine([run], study.Config(scale="gpu"))
