"""Run one ablation of the Quokka paper (its §5), draw its panels, and compare its final values with ours.

    python scaling.py study kernel                      scale tiny: two CPU cores (first: python data.py docs)
    python scaling.py study lr --scale=gpu              one GPU, an hour or two per run
    python scaling.py study batch --scale=paper --launch     print the commands, to be run elsewhere
    python scaling.py study kernel --draw               only the table and the panels, of what is there
    python scaling.py study kernel --runs=runs/short -- --tokens=5e4      flags after -- go to every run

The studies: kernel, schedule, time, loss, batch, lr, weight_decay; and three that are not the paper's: block;
optimizer and data_constrained, which have settings of their own (--help after the name). Every run is
train.py with files of configurator/quokka/ (shown); studies share runs. Finished ones are skipped,
interrupted ones go on with the same command.
"""

import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import configurator
import terminal
import train
from configurator import setting
from corpus import tokenfiles
from corpus.files import all_or_none
from laws import runner
from training.checkpoint import open_checkpoint

ROOT = runner.TRAIN.parent


@dataclass
class Config:
    scale: Literal["tiny", "gpu", "paper"] = setting(
        "tiny", "two CPU cores and minutes, one GPU and hours, or eight GPUs and days per run")
    runs: str = setting("runs/quokka", "folder of the runs: each is RUNS/SCALE/RUN")
    out: str = setting(
        "", "folder for table.md, panels.png and panels.pdf (empty: RUNS/SCALE/study_NAME)")
    launch: bool = setting(False, "print the commands that are still to run, and stop")
    draw: bool = setting(False, "run nothing: table and panels of what is there")
    gpus: int = setting(0, "processes per run, by torchrun (0: 8 for the paper's scale, else 1)", low=0)
    jobs: int = setting(1, "runs side by side", low=1)
    noise: float = setting(
        0.02, "smaller differences of our losses are not called a direction: seeds make as much "
        "(results/quickstart.md)", low=0)

    def problems(self):
        if self.jobs > 1 and self.processes() > 1:
            yield f"jobs={self.jobs}: runs of {self.processes()} processes go one after the other"

    def processes(self):
        """Processes per run."""
        return self.gpus or (8 if self.scale == "paper" else 1)

    def needs_gpu(self):
        return self.scale != "tiny"


class Row(NamedTuple):
    """Runs that the paper compares in one row of panels; the differences are to the first."""

    title: str
    figure: int  # the paper's; 0: it has none
    kind: str  # of model, as in ablation_final_values.csv
    runs: dict  # {name of the paper's curve: words that override_files understands}


def both_kinds(figures, runs, title=""):
    """Two rows: what the paper did for autoregressive models and for diffusion models alike."""
    ar_runs = {curve: f"{words} ar".strip() for curve, words in runs.items()}
    return [Row("autoregressive" + title, figures[0], "AR", ar_runs),
            Row("diffusion" + title, figures[1], "DLM", runs)]


STUDIES = {
    "kernel": [Row("diffusion", 6, "DLM", dict(masked="", uniform="uniform"))],
    "schedule": [Row("diffusion", 7, "DLM", dict(linear="", cosine="cosine", poly2="poly2"))],
    "time": [Row("diffusion", 8, "DLM", dict(default="", moving_gaussian="moving_gaussian"))],
    "loss": [
        Row("diffusion, 300/96 of the tokens", 9, "DLM", dict(diffusion="@long", maskgit="@long maskgit")),
    ],
    "batch": both_kinds((10, 10), dict(bs256="", bs1024="@batch_4x", bs4096="@batch_16x")),
    "lr": both_kinds((11, 11), {"lr2e-4": "", "lr1e-4": "@lr_half", "lr4e-4": "@lr_double"}),
    "weight_decay": [
        *both_kinds((12, 13), dict(wd="", no_wd="no_decay"), ", 1 epoch"),
        *both_kinds((14, 15), dict(wd="@96_epochs", no_wd="@96_epochs no_decay"), ", 96 epochs"),
    ],
    "block": [Row("tokens of a block, from AR to full diffusion", 0, "DLM", {
        "AR": "ar", "1": "block_1", "4": "block_4", "16": "block_16", "64": "block_64", "row": ""})],
}


def words_of(study):
    """The words of every run of a study, each once."""
    return list(dict.fromkeys(words for row in STUDIES[study] for words in row.runs.values()))


def override_files(words, scale):
    """A run's override files: the scale's baseline, or its own variant of it (@), then those of any scale."""
    baseline, *others = words.split() if "@" in words else ["", *words.split()]
    names = [baseline.replace("@", f"{scale}_") or scale, *others]
    return [override_file("quokka", f"{name}.py") for name in names]


def override_file(*names):
    """The path of a file under configurator/, as people would write it here."""
    return os.path.relpath(ROOT.joinpath("configurator", *names))


# --------------------------------------------------------------------------------------------------- the runs


class Run(NamedTuple):
    """A run of a study."""

    folder: Path
    arguments: list  # of train.py
    settings: train.Config


def make_run(words, cfg, flags):
    """The run that `words` describe; exits with code 2 if a flag or a setting is wrong."""
    name = "_".join(words.replace("@", "").split()) or "masked"
    folder = Path(cfg.runs) / cfg.scale / name
    arguments = [*override_files(words, cfg.scale), *flags, f"--run_dir={folder}"]
    return Run(folder, arguments, configurator.load(train.Config, arguments))


def is_finished(run, ignored=()):
    """True if a run is complete; exits with code 2 if it was trained with other settings than `ignored`."""
    try:
        _, record = open_checkpoint(run.folder)
    except FileNotFoundError:
        return False
    except (ValueError, OSError) as problem:
        configurator.fail(problem)
    changes = runner.changed_settings(record["settings"], run.settings, ignored)
    if changes:
        configurator.fail(f"{run.folder} was made with other settings ({', '.join(changes)}); "
                          "remove it or choose another --runs")
    return record["step"] >= record.get("steps", run.settings.steps or 1)


def shown_command(run, cfg):
    """train.py's command line as people write it."""
    launcher = ["python"] if cfg.processes() == 1 else ["torchrun", f"--nproc_per_node={cfg.processes()}"]
    return shlex.join([*launcher, os.path.relpath(runner.TRAIN), *run.arguments, "--resume=auto"])


def shown_study(command, flags):
    """A study's command line as people write it, with the flags for every run."""
    return shlex.join([*command, *(["--", *flags] if flags else [])])


def command_of(name, cfg, flags):
    """The command line of a study with these settings, without those that say how and where it runs."""
    own = [f"--{key}={value}" for key, value in configurator.changed(cfg).items()
           if key not in ("draw", "jobs", "runs", "out")]
    return shown_study(["python", "scaling.py", "study", name, *own], flags)


def check_machine(runs, cfg):
    """Exit with code 2 where the runs would: without their GPUs, or without their corpus."""
    needed, available = cfg.processes(), torch.cuda.device_count()
    wants_gpu = cfg.needs_gpu() and any(run.settings.device != "cpu" for run in runs)
    if wants_gpu and available < needed:
        gpus = f"{needed} GPUs" if needed > 1 else "1 GPU"
        configurator.fail(f"--scale={cfg.scale} needs {gpus} per run, this machine has {available}; "
                          "--launch prints the commands to run elsewhere")
    names = ("corpus", "tokenizer", "val_share", "eos", "eos_opens")
    texts = {tuple(getattr(run.settings, name) for name in names) for run in runs}
    try:
        for corpora, *foreign in texts:
            for path, *_ in tokenfiles.parse_corpora(corpora):
                tokenfiles.load_corpus(path, *foreign)
    except (ValueError, OSError) as problem:
        configurator.fail(problem)


def train_all(runs, cfg):
    """Train these runs, `cfg.jobs` at a time: one alone says what it does, several write logs.

    It exits with code 2 if one fails, once the others have ended; with 128 + the first signal if one comes.
    """
    waiting, failed = dict(enumerate(runs, 1)), []
    with runner.Runner(cfg.jobs) as training:
        while training.children or waiting and not failed and not training.signum:
            for child in training.ended():
                if child.returncode and not training.signum:
                    command = shown_command(child.key, cfg)
                    where = f"; see {log_of(child.key)}" if cfg.jobs > 1 else ""
                    failed.append(f"exit code {child.returncode} from: {command}{where}")
            slot = training.free_slot()
            if waiting and not failed and slot is not None:
                number = min(waiting)
                run = waiting.pop(number)
                print(f"[{number}/{len(runs)}] {shown_command(run, cfg)}", flush=True)
                failed += start(run, cfg, training, slot)
            time.sleep(0.05)
    if training.signum:
        print("stopped; the same command goes on")
        raise SystemExit(128 + training.signum)
    if failed:
        configurator.fail("; ".join(failed))


def log_of(run):
    """The file of what a run says that trains beside others."""
    return run.folder.with_name(f"{run.folder.name}.log")


def start(run, cfg, training, slot):
    """Train a run in processes of its own; returns why it can't be, in a list, or an empty one."""
    log, environment = None, None
    if cfg.jobs > 1:
        log, environment = log_of(run), runner.environment_of(slot, cfg.jobs)
    command = runner.train_command([*run.arguments, "--resume=auto"], cfg.processes())
    try:
        training.start(run, command, slot, log, environment)
    except BlockingIOError:
        return [f"{run.folder}: another process is training it"]
    except OSError as problem:
        return [f"{log}: {problem.strerror}"]
    return []


def print_commands(runs, finished, cfg):
    """Print the commands that are still to run."""
    for words, run in runs.items():
        print(f"# {run.folder} is finished" if finished[words] else shown_command(run, cfg))


# ------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    # arguments: the study and our settings, then, after --, flags for every run
    argv = sys.argv[1:] if argv is None else list(argv)
    split = argv.index("--") if "--" in argv else len(argv)
    argv, flags = argv[:split], argv[split + 1 :]
    study = next((word for word in argv if not word.startswith("-")), "")
    if study in ("optimizer", "data_constrained"):
        from laws import data_constrained, optimizers

        module = optimizers if study == "optimizer" else data_constrained
        return module.main([word for word in argv if word != study], flags)
    if study not in STUDIES and not {"-h", "--help"} & set(argv):
        problem = f"there is no study '{study}'" if study else "which study?"
        configurator.fail(f"{problem}; choose from {', '.join(STUDIES)}, optimizer, data_constrained")
    cfg = configurator.load(Config, [word for word in argv if word != study], about=__doc__)
    command = ["python", "scaling.py", "study", study]

    # runs
    runs = {words: make_run(words, cfg, flags) for words in words_of(study)}
    finished = {words: is_finished(run) for words, run in runs.items()}
    if cfg.launch:
        print_commands(runs, finished, cfg)
        draw = shown_study([*command, "--draw", f"--scale={cfg.scale}"], flags)
        print(f"# then, with the runs in {cfg.runs}: {draw}")
        return
    terminal.keep_going()
    if not cfg.draw:
        to_train = [run for words, run in runs.items() if not finished[words]]
        check_machine(to_train, cfg)
        for words, run in runs.items():
            if finished[words]:
                print(f"{run.folder} is finished", flush=True)
        train_all(to_train, cfg)

    # results
    from laws import study_report

    out = Path(cfg.out or Path(cfg.runs) / cfg.scale / f"study_{study}")
    how = shown_study([*command, f"--scale={cfg.scale}"], flags)
    text = study_report.write_table(study, STUDIES[study], cfg, runs, how)
    with all_or_none(out) as building:
        (building / "table.md").write_text(text, encoding="utf-8")
        with terminal.optional(f"{out / 'panels.png'} can't be drawn"):
            study_report.draw_panels(STUDIES[study], runs, building)
    print(f"{text}\n{out}: table.md, panels.png, panels.pdf")
    if cfg.draw and not all(finished.values()):
        missing = ", ".join(str(run.folder) for words, run in runs.items() if not finished[words])
        print(f"not finished: {missing}", file=sys.stderr)
