"""Run one ablation of the Quokka paper (its §5), draw its panels, and put the paper's final values beside ours.

    python study.py kernel                              # scale tiny: two CPU cores, minutes (first: python data.py docs)
    python study.py lr --scale=gpu                      # one GPU, an hour or two per run
    python study.py batch --scale=paper --launch        # print the commands, to be run elsewhere
    python study.py kernel --draw                       # only the table and the panels, of whatever has run by now
    python study.py kernel --runs=runs/short -- --tokens=5e4 --compile=no    # what follows -- goes to every run

The studies: kernel, schedule, time, loss, batch, lr, weight_decay. Every run is train.py with files of configurator/quokka/ (shown); studies
share runs. Finished ones are skipped, interrupted ones go on: after Ctrl-C, too, with the same command.
"""

import csv
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

import configurator
import train
from configurator import setting
from corpus import tokenfiles
from laws.laws import smooth
from training.checkpoint import load_newest
from training.log import read_metrics

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    scale: Literal["tiny", "gpu", "paper"] = setting("tiny", "two CPU cores and minutes, one GPU and hours, or eight GPUs and days per run")
    runs: str = setting("runs/quokka", "folder of the runs: each is RUNS/SCALE/RUN")
    out: str = setting("", "folder for table.md, panels.png and panels.pdf (empty: RUNS/SCALE/study_NAME)")
    launch: bool = setting(False, "print the commands that are still to run, and stop")
    draw: bool = setting(False, "run nothing: table and panels of what is there")
    gpus: int = setting(0, "processes per run, by torchrun (0: 8 for the paper's scale, else 1)", low=0)
    noise: float = setting(0.02, "smaller differences of our losses are not called a direction: seeds make as much (results/quickstart.md)", low=0)


class Row(NamedTuple):
    """Runs that the paper compares in one row of panels; the differences are to the first."""

    title: str
    figure: int  # the paper's
    kind: str  # of model, as in ablation_final_values.csv
    runs: dict  # name of the paper's curve → what files_of makes of it


def both(figures, runs, title=""):
    """Two rows: what the paper did for autoregressive models and for diffusion models alike."""
    return [Row("autoregressive" + title, figures[0], "AR", {curve: f"{words} ar".strip() for curve, words in runs.items()}),
            Row("diffusion" + title, figures[1], "DLM", runs)]


STUDIES = {
    "kernel": [Row("diffusion", 6, "DLM", dict(masked="", uniform="uniform"))],
    "schedule": [Row("diffusion", 7, "DLM", dict(linear="", cosine="cosine", poly2="poly2"))],
    "time": [Row("diffusion", 8, "DLM", dict(default="", moving_gaussian="moving_gaussian"))],
    "loss": [Row("diffusion, 300/96 of the tokens", 9, "DLM", dict(diffusion="@long", maskgit="@long maskgit"))],
    "batch": both((10, 10), dict(bs256="", bs1024="@batch_4x", bs4096="@batch_16x")),
    "lr": both((11, 11), {"lr2e-4": "", "lr1e-4": "@lr_half", "lr4e-4": "@lr_double"}),
    "weight_decay": both((12, 13), dict(wd="", no_wd="no_decay"), ", 1 epoch")
    + both((14, 15), dict(wd="@96_epochs", no_wd="@96_epochs no_decay"), ", 96 epochs"),
}


def files_of(words, scale):
    """A run's override files: the scale's baseline, or its own variant of it (@), then those that are the same at any scale."""
    words = words.split() if "@" in words else ["", *words.split()]
    names = [words[0].replace("@", f"{scale}_") or scale, *words[1:]]
    return [os.path.relpath(ROOT / "configurator" / "quokka" / f"{name}.py") for name in names]


# -------------------------------------------------------------------------------------------------- the runs


class Run(NamedTuple):
    folder: Path
    arguments: list  # of train.py
    settings: dict  # what it trains with


def plan(words, cfg, flags):
    """The run that `words` describe; ends with code 2 if a flag or a setting is wrong."""
    folder = Path(cfg.runs) / cfg.scale / ("_".join(words.replace("@", "").split()) or "masked")
    arguments = [*files_of(words, cfg.scale), *flags, f"--run_dir={folder}"]
    return Run(folder, arguments, asdict(configurator.load(train.Config, arguments)))


NEUTRAL = configurator.neutral_settings(train.Config)  # two parts of one run may differ in these


def is_finished(run):
    """Whether a run is complete. What was trained with other settings is no part of this study: it is refused."""
    try:
        _, record = load_newest(run.folder, lambda warning: print(f"warning: {warning}", file=sys.stderr))
    except FileNotFoundError:
        return False
    differ = [f"{k} {record['settings'][k]!r}, not {v!r}" for k, v in run.settings.items()
              if k in record["settings"] and k not in NEUTRAL and record["settings"][k] != v]
    if differ:
        configurator.fail(f"{run.folder} was trained with other settings ({', '.join(differ)}); remove it or choose another --runs")
    return record["step"] >= record["steps"]


def command(run, cfg, shown):
    """train.py's command line, as it is `shown` to people or as it runs here."""
    python, gpus = "python" if shown else sys.executable, cfg.gpus or (8 if cfg.scale == "paper" else 1)
    launcher = [python] if gpus == 1 else [*(["torchrun"] if shown else [python, "-m", "torch.distributed.run"]), f"--nproc_per_node={gpus}"]
    return [*launcher, os.path.relpath(ROOT / "train.py"), *run.arguments, "--resume=auto"]


def check_machine(runs, cfg):
    """End with code 2 where the runs would: without their GPUs, or without their corpus."""
    needed = 0 if cfg.scale == "tiny" else cfg.gpus or dict(gpu=1, paper=8)[cfg.scale]
    there = torch.cuda.device_count()
    if there < needed and any(run.settings["device"] != "cpu" for run in runs):
        configurator.fail(f"--scale={cfg.scale} needs {needed} GPU{'s' * (needed > 1)} per run, this machine has {there}; --launch prints the commands to run elsewhere")
    try:
        for corpora, tokenizer, val_share in {tuple(run.settings[k] for k in ("corpus", "tokenizer", "val_share")) for run in runs}:
            for path, *_ in tokenfiles.parse_corpora(corpora):
                tokenfiles.load_corpus(path, tokenizer, val_share)
    except (ValueError, OSError) as problem:
        configurator.fail(problem)


def execute(arguments):
    """Run a command; returns its exit code and whether we were interrupted: then it was, too, and has saved its state."""
    child, asked = subprocess.Popen(arguments, start_new_session=True), False  # else a terminal's Ctrl-C would reach it twice
    while True:
        try:
            return child.wait(), asked
        except KeyboardInterrupt:
            asked = True
            child.send_signal(signal.SIGINT)  # train.py saves at the first one, ends at the second


def train_all(runs, finished, cfg):
    """Run what is not finished, one after the other; with `launch` only say how."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    for i, (words, run) in enumerate(runs.items(), 1):
        place, shown = f"[{i}/{len(runs)}] ", shlex.join(command(run, cfg, True))
        if finished[words] or cfg.launch:
            print(f"{'# ' if cfg.launch else place}{run.folder} is finished" if finished[words] else shown, flush=True)
            continue
        print(place + shown, flush=True)
        code, asked = execute(command(run, cfg, False))
        if asked:
            print("stopped; the same command goes on")
            raise SystemExit(130)
        if code:
            configurator.fail(f"exit code {code} from: {shown}")


# --------------------------------------------------------------------------------------- what came out of them


def curve(metrics, key):
    """The tokens and the values of one key, as two arrays."""
    return np.array([(m["tokens"], m[key]) for m in metrics if key in m], float).reshape(-1, 2).T


def final_values(metrics):
    """Where our curves end, by the paper's names of them, as far as they are there."""
    val = "val_paper" if any("val_paper" in m for m in metrics) else "val_loss"  # of its own uniform loss, as its figures show it
    keys = dict(train_loss="loss", val_loss_c4=val, bound="val_loss", val_loss_noisy="val_noisy", val_loss_clean="val_clean", params_norm="param_norm")
    for key in sorted({key for m in metrics for key in m if key.startswith("eval/")}, key=len, reverse=True):
        keys |= {name: key for name, part in (("hellaswag", "hellaswag"), ("mmlu_val", "mmlu")) if part in key}
    ends = {name: curve(metrics, key) for name, key in keys.items()}
    values = {name: y[-1] * (100 if keys[name].startswith("eval/") and y.max() <= 1 else 1) for name, (_, y) in ends.items() if len(y)}
    if "train_loss" in values:  # the mean over the last billion tokens, as the paper's values, or over a twentieth of a short run
        tokens, loss = ends["train_loss"]
        values["train_loss"] = loss[tokens > tokens[-1] - min(1e9, tokens[-1] / 20)].mean()
    return values | (dict(best=ends["val_loss_c4"][1].min()) if "val_loss_c4" in values else {})


def paper_values():
    """{(figure, kind, curve): {metric: value}}: where the paper's curves end (results/quokka/README.md)."""
    values = {}
    for line in csv.DictReader((ROOT / "results" / "quokka" / "ablation_final_values.csv").read_text().splitlines()):
        run = values.setdefault((int(line["figure"]), line["model_type"], line["series"]), {})
        run[line["metric"]] = float(line["mean_last_1B"] or line["last"])
        if line["metric"] == "val_loss_c4":
            run["best"] = float(line["best"])
    return values


def direction(ours, theirs, noise):
    """Whether our difference points where the paper's does, in words."""
    if abs(theirs) < 0.005:  # the paper's are single runs, too
        return "none in either" if abs(ours) < noise else "none in the paper"
    return "ours within noise" if abs(ours) < noise else "same" if (ours > 0) == (theirs > 0) else "**opposite**"


def what_differs(row, runs):
    """What distinguishes the runs of a row, {words: 'lr=0.002'}."""
    settings = {words: runs[words].settings for words in row.runs.values()}
    first, *others = settings.values()
    keys = [k for k in first if k not in NEUTRAL and any(s[k] != first[k] for s in others)]
    return {words: ", ".join(f"{k}={s[k]:g}" if isinstance(s[k], float) else f"{k}={s[k]}" for k in keys) for words, s in settings.items()}


def pair(ours, theirs, name, form=".3f"):
    """'ours / theirs' of one value; with the best on the way where validation ended well above it."""
    cells = [format(values[name], form) if name in values else "—" for values in (ours, theirs)]
    turned = [name == "val_loss_c4" and name in values and values[name] > values["best"] + 0.01 for values in (ours, theirs)]
    return " / ".join(cell + (f" (best {v['best']:{form}})" if up else "") for cell, v, up in zip(cells, (ours, theirs), turned))


def table(study, cfg, runs, how):
    """Where our curves end beside where the paper's do, in Markdown."""
    paper, notes = paper_values(), []
    lines = [f"# {study}, scale {cfg.scale}", "", f"`{how}`, {date.today()}. Each cell: ours / the paper's (1086M parameters, C4). Losses are nats per",
             "token of the own tokenizer and corpus: compare differences, not values. They are to the first run, of validation losses (of training",
             "losses where the paper shows no validation: MaskGIT's is another quantity). Training losses are means over the last billion tokens, or",
             f"the last twentieth of a short run. Differences below {cfg.noise:g} (the paper's: 0.005) are not called a direction."]
    for row in STUDIES[study]:
        lines += ["", f"## {row.title} (the paper's Figure {row.figure})", "",
                  "| the paper's curve | ours | training loss | validation loss | difference | direction | parameter norm | HellaSwag | MMLU |",
                  "|---|---|---|---|---|---|---|---|---|"]
        ours_first, shown = None, what_differs(row, runs)
        for series, words in row.runs.items():
            ours, theirs = final_values(read_metrics(runs[words].folder)), paper[row.figure, row.kind, series]
            if ours_first is None:
                ours_first, theirs_first, judged = ours, theirs, "val_loss_c4" if "val_loss_c4" in theirs else "train_loss"
            cells = ["", ""]
            if ours is not ours_first and judged in ours and judged in ours_first:
                change, their_change = ours[judged] - ours_first[judged], theirs[judged] - theirs_first[judged]
                cells = [f"{change:+.3f} / {their_change:+.3f}", direction(change, their_change, cfg.noise)]
            lines.append(f"| {series} | {shown[words]} | " + " | ".join(
                [pair(ours, theirs, "train_loss"), pair(ours, theirs, "val_loss_c4"), *cells,
                 *(pair(ours, theirs, name, ".1f") for name in ("params_norm", "hellaswag", "mmlu_val"))]) + " |")
            if "val_loss_noisy" in ours:
                notes = ["", f"The validation loss of {series} is the paper's, ½(noisy + clean): {pair(ours, theirs, 'val_loss_noisy')} and "
                         f"{pair(ours, theirs, 'val_loss_clean')}. That is no bound; our bound is {ours['bound']:.3f}, {ours['bound'] - ours_first.get('bound', np.nan):+.3f} to the first run's."]
    return "\n".join(lines + notes) + "\n"


def draw(study, runs, out):
    """The paper's panels: training loss, validation loss, parameter norm and whatever was evaluated, against tokens; PNG and PDF."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 7})
    metrics = {words: read_metrics(run.folder) for words, run in runs.items()}
    columns = dict(loss="training loss", val_loss="validation loss", param_norm="parameter norm")
    columns |= {key: key[5:] for key in sorted({key for records in metrics.values() for m in records for key in m}) if key.startswith("eval/")}
    figure, axes = plt.subplots(len(STUDIES[study]), len(columns), figsize=(3.6 * len(columns), 3 * len(STUDIES[study])), squeeze=False)
    for row, line in zip(STUDIES[study], axes):
        shown = what_differs(row, runs)
        for ax, (key, title) in zip(line, columns.items()):
            late = []
            for i, words in enumerate(row.runs.values()):
                paper_loss = key == "val_loss" and len(curve(metrics[words], "val_paper")[1])
                for k, style, kind in [("val_paper", "-", ""), (key, "--", " (bound)")] if paper_loss else [(key, "-", "")]:
                    x, y = curve(metrics[words], k)
                    y = smooth(y) if key == "loss" else y
                    ax.plot(x, y, style, color=f"C{i}", lw=1.2, label=shown[words] + kind)
                    late += list(y[x > x.max(initial=0) / 10])
            if "loss" in key and late:  # the first tenth falls too far to show the rest
                margin = 0.05 * (max(late) - min(late)) or 1
                ax.set_ylim(min(late) - margin, max(late) + margin)
            ax.set(title=f"{row.title}: {title}" if len(STUDIES[study]) > 1 else title, xlabel="tokens", ylabel="nats per token" if "loss" in key else "")
            ax.grid(alpha=0.3)
            ax.legend()
    figure.tight_layout()
    for name in ("panels.png", "panels.pdf"):
        figure.savefig(out / name, dpi=80)
    plt.close(figure)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    argv, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    study = next((word for word in argv if not word.startswith("-")), "")
    if study not in STUDIES and not {"-h", "--help"} & set(argv):
        configurator.fail((f"there is no study '{study}'" if study else "which study?") + f"; choose from {', '.join(STUDIES)}")
    cfg = configurator.load(Config, [word for word in argv if word != study], about=__doc__)
    runs = {words: plan(words, cfg, flags) for row in STUDIES[study] for words in row.runs.values()}
    finished = {words: is_finished(run) for words, run in runs.items()}  # before anything starts: it may refuse
    if not (cfg.launch or cfg.draw):
        check_machine([run for words, run in runs.items() if not finished[words]], cfg)
    if cfg.launch or not cfg.draw:
        train_all(runs, finished, cfg)
    how = shlex.join(["python", "study.py", study, f"--scale={cfg.scale}", *(["--", *flags] if flags else [])])
    if cfg.launch:
        return print(f"# then, with the runs in {cfg.runs}: {how.replace(' --', ' --draw --', 1)}")
    out, text = Path(cfg.out or Path(cfg.runs) / cfg.scale / f"study_{study}"), table(study, cfg, runs, how)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    draw(study, runs, out)
    print(f"{text}\n{out}: table.md, panels.png, panels.pdf")
    if cfg.draw and not all(finished.values()):
        print(f"not finished: {', '.join(str(runs[words].folder) for words in runs if not finished[words])}", file=sys.stderr)


if __name__ == "__main__":
    main()
