"""How good a trained model is: likelihoods with error bars, the standard benchmarks, and what it writes.

    python eval.py --run_dir=runs/quickstart           # the bound (AR: the exact NLL) on the validation split
    python eval.py --run_dir=runs/quickstart --passes=4 --ordered=left_to_right,confidence
    python eval.py --run_dir=runs/quickstart --tasks=hellaswag,mmlu --limit=100    # lm-evaluation-harness's
    python eval.py --run_dir=runs/quickstart --samples=64 --judge=runs/quickstart_ar
    python eval.py --watch=runs/quickstart --tasks=hellaswag --limit=100         # beside a trainer

    python eval.py compare runs/quickstart runs/quickstart_ar                    # runs side by side
    python eval.py frontier --run_dir=runs/quickstart --judge=runs/quickstart_ar # sampling: speed, quality

`python eval.py compare --help` and `frontier --help` have their settings.

Writes eval.json (everything measured so far of this checkpoint), evaluation.npz (row by row, for compare),
noise.csv and noise.png (the loss against the noise ratio) into eval_<step> in the run folder. By torchrun on
several ranks: the same figures, sooner.
"""

import terminal  # isort: skip  # first: Ctrl-C during the imports

import contextlib
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

import configurator
import kernels
from configurator import setting, split
from corpus.files import check_no_pipes
from evaluation import compare, exact_match, frontier, measure, report, texts
from evaluation.likelihood import ORDERS
from evaluation.watch import ScoreLog
from sampling.generator import Generator
from training import compiler, distributed
from training.objective import Objective


@dataclass
class Config:
    run_dir: str = setting(
        "runs/quickstart", "a run folder (its newest checkpoint is used) or one checkpoint folder")
    corpus: str = setting("", "whose validation split is scored (empty: the run's own)")
    # the bound
    bound: bool = setting(True, "score the validation split")
    rows: int = setting(0, "rows of the validation split (0: as many as in training, -1: all)", low=-1)
    passes: int = setting(
        1, "times that each is scored, with fresh noise; the first is the validation of training",
        low=1, high=10**6)
    bins: int = setting(20, "noise ratios of the curve (0: no curve)", low=0, high=10**4)
    # the exact likelihood of a masked model's samplers
    ordered: str = setting(
        "", "orders, with commas: left_to_right, confidence, random; each takes a pass per token of a row")
    ordered_rows: int = setting(64, "of the validation rows, for these", low=1)
    # question-answer pairs
    answers: int = setting(
        0, "of a validation split of pairs: answers to write greedily and to compare token for token", low=0)
    # benchmarks
    tasks: str = setting(
        "", "of lm-evaluation-harness, with commas; paper: HellaSwag and MMLU as in Quokka's figures")
    limit: int = setting(0, "examples of each task (0: all)", low=0)
    fewshot: int = setting(-1, "worked examples before each question (-1: as the task says)", low=-1)
    masks: int = setting(
        128, "noisy copies of each answer (one of few tokens needs fewer, and is exact)", low=1, high=10**6)
    task_path: str = setting("", "folder with tasks of your own, as .yaml")
    task_data: str = setting(
        "", "folder with data sets called as on the hub (hellaswag, mmlu): nothing is downloaded for these")
    # texts that it writes
    samples: int = setting(0, "texts to write and to measure", low=0, high=10**6)
    texts: str = setting("", "measure these instead: what sample.py --out wrote")
    judge: str = setting("", "an autoregressive run of the same tokenizer, for their NLL")
    length: int = setting(0, "tokens of a text (0: the model's context)", low=0)
    order: Literal[
        "auto", "ancestral", "first_hitting", "random", "low_confidence", "entropy", "margin"] = setting(
        "auto", "in which masked models write: auto is ancestral, and low_confidence in tasks")
    steps: int = setting(0, "denoising steps (0: one per token)", low=0)
    block: int = setting(
        0, "of masked models: tokens that are finished before the next ones begin (0: all at once)", low=0)
    temperature: float = setting(1.0, "of the softmax; tasks have their own", low=0)
    match: str = setting(
        "8,16,32,64,128", "lengths of passages to look for in the training text, with commas (empty: none)")
    # beside a trainer
    watch: str = setting("", "a run whose new checkpoints are scored as they appear, into its metrics.jsonl")
    watch_every: float = setting(30.0, "of watch: seconds between two looks for a new checkpoint", above=0)
    # the machine
    micro_batch: int = setting(
        32, "rows per rank and forward pass; makes no difference but to memory and speed", low=1)
    pass_tokens: int = setting(
        0, "tokens per forward pass of tasks (0: 16384 on a CPU, 131072 on a GPU)", low=0)
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "of the matrix products; bfloat16 is faster on a GPU and rounds in the third decimal")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    weights: Literal["auto", "ema", "raw"] = setting(
        "auto", "the averaged ones of a run with ema, those of training, or the first that it has")
    compile: bool = setting(False, "torch.compile the scoring of rows")
    seed: int = setting(
        0, "of texts and of the noise on answers; the bound has noise of its own", low=0, high=2**62)
    timeout: float = setting(
        3600.0, "of several ranks: seconds that one waits for another", above=0, high=1e6)
    out: str = setting(
        "", "folder for what is written (empty: eval_<step> in the run's, with another corpus's name)")

    NEEDS = {
        "judge": "samples or texts",
    }

    def problems(self):
        """Other settings that do not go together, one line each."""
        problems = []
        for order in split(self.ordered):
            if order not in ORDERS:
                problems.append(f"ordered: there is no '{order}'; choose from {', '.join(ORDERS)}")
        for n in split(self.match):
            if not (n.isascii() and n.isdecimal() and len(n) < 10 and int(n)):
                problems.append(f"match: '{n}' is no length; write whole numbers from 1 on, with commas")
        for name in ("task_path", "task_data"):
            if getattr(self, name) and not Path(getattr(self, name)).is_dir():
                problems.append(f"{name}={getattr(self, name)}: no such folder")
        has_texts = self.samples or self.texts
        for is_wrong, problem in (
            (self.samples and self.texts, "give samples (to be written) or texts (that are there)"),
            (not (self.bound or self.ordered or self.answers or self.tasks or has_texts),
             "nothing to do: bound=False, and neither ordered, answers, tasks, samples nor texts"),
            (self.texts and not Path(self.texts).is_file(), f"texts={self.texts}: no such file"),
            (self.samples == 1, "samples=1: one text has no error; write at least two"),
            (self.steps and self.order == "first_hitting",
             "order=first_hitting takes as many steps as it needs; leave steps out"),
            (self.device == "cuda" and not torch.cuda.is_available(),
             "device=cuda, but this machine has no usable GPU; use --device=cpu"),
            (self.watch and self.run_dir != Config.run_dir, "give run_dir or watch, not both"),
            (self.watch and self.out, "out: with watch each checkpoint has a folder of its own, eval_<step>"),
            (self.watch and self.texts, "texts are of one checkpoint; with watch, give samples"),
        ):
            if is_wrong:
                problems.append(problem)
        return problems


def main():
    if sys.argv[1:2] == ["compare"]:
        return compare.main(sys.argv[2:])
    if sys.argv[1:2] == ["frontier"]:
        return frontier.main(sys.argv[2:])
    cfg = configurator.load(Config, about=__doc__)
    terminal.keep_going()
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    ranks = distributed.init_distributed(device, cfg.timeout)
    with ending_all_ranks(ranks, cfg), kernels.prefer_cudnn_attention(device):
        try:
            if cfg.watch:
                evaluate_new_checkpoints(cfg, ranks)
            else:
                evaluate(cfg, ranks)
        except (ValueError, OSError) as problem:
            configurator.fail(str(problem), everywhere=ranks.rank > 0)


@contextlib.contextmanager
def ending_all_ranks(ranks, cfg):
    """Turn what ends this process into an exit code; one of several ends without torch's destructors."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as problem:
        code = problem.code
        raise
    except KeyboardInterrupt:
        kept = f"what was scored is in {cfg.watch}/metrics.jsonl" if cfg.watch else "nothing was written"
        print(f"eval.py: interrupted; {kept}", file=sys.stderr)
        code = 130
    except Exception:
        if ranks.world == 1:
            raise
        traceback.print_exc()
    finally:
        if ranks.world > 1:
            distributed.shut_down(ranks, code or 0)
    if code:
        raise SystemExit(code)


# --------------------------------------------------------------------------------------------- one checkpoint


def evaluate(cfg, ranks):
    """Measure a checkpoint, print its figures and keep them; raises ValueError or OSError."""
    generator = Generator.from_checkpoint(cfg.run_dir, cfg.device, cfg.dtype, cfg.weights)
    inputs = open_inputs(cfg, generator, ranks)
    generator.load_weights()
    measured, losses = measure_checkpoint(cfg, generator, inputs, ranks)
    if ranks.rank == 0:
        written = report.write_report(inputs.out, measured, losses, generator, vars(cfg))
        report.print_report(measured, generator)
        print(written)


class Inputs(NamedTuple):
    """What is needed beside the checkpoint itself, and the folder for what is measured."""

    validation: measure.Validation | None
    judge: Generator | None
    tasks: list | None
    out: Path


def open_tasks(cfg, ranks):
    """The tasks that the settings name, None for none; raises ValueError."""
    if not cfg.tasks:
        return None
    try:
        from evaluation import tasks
    except ImportError as problem:
        raise ValueError(f"tasks need lm-evaluation-harness ({problem}): pip install '.[eval]'") from None
    warn = partial(print, file=sys.stderr) if ranks.rank == 0 else lambda line: None
    return tasks.open_tasks(split(cfg.tasks), cfg.task_path, cfg.task_data, warn)


def open_inputs(cfg, generator, ranks, tasks=None):
    """Open what the settings ask for, and make the folder; `tasks` may be open already.

    Raises OSError, and ValueError, also if the settings don't suit the checkpoint.
    """
    check_objective(cfg, generator)
    needs_validation = cfg.bound or cfg.ordered or cfg.answers or (cfg.samples or cfg.texts) and cfg.match
    validation = measure.open_validation(generator, cfg.corpus) if needs_validation else None
    if cfg.ordered and validation.sequences.has_pairs:
        raise ValueError("ordered is of whole rows of text; of question-answer pairs there is the bound")
    if cfg.answers and not validation.sequences.has_pairs:
        raise ValueError(f"answers={cfg.answers}: the validation split is text, not question-answer pairs")
    judge = texts.open_judge(cfg.judge, cfg.device, generator) if cfg.judge else None
    if cfg.length > generator.seq_len:
        raise ValueError(f"length={cfg.length} is more than the model's context of {generator.seq_len}")
    if judge and cfg.length > judge.seq_len:
        raise ValueError(f"length={cfg.length} is more than the judge's context of {judge.seq_len}")

    tasks = tasks or open_tasks(cfg, ranks)  # may download: last of what can be wrong

    if cfg.compile:
        compiler.check(generator.device)

    folder = f"eval_{generator.record['step']:08d}" 
    if cfg.weights == "raw" and "ema" in (path.name for path in generator.folder.iterdir()):
        folder += "_raw"
    if validation and not validation.is_own:
        folder += "_" + "_".join(corpus.folder.name for corpus in validation.corpora)
    out = Path(cfg.out or generator.folder.parent / folder)
    if ranks.rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        check_no_pipes(out)
        report.read_report(out / "eval.json", generator)  # what can't be added to is found now
    return Inputs(validation, judge.load_weights() if judge else None, tasks, out)


# settings without meaning for an objective
MEANINGLESS = {
    "ar": {"order", "block", "steps"},
    "uniform": {"order", "block"},
    "masked": set(),
}


def check_objective(cfg, generator):
    """Raise ValueError for settings that mean nothing for the model."""
    objective = generator.objective
    if cfg.block and generator.process.block:
        raise ValueError(f"block={cfg.block} has no meaning for a model of block diffusion: it writes in "
                         f"blocks of its own, {generator.process.block} tokens each")
    if cfg.ordered and objective == "uniform":
        raise ValueError("ordered: a uniform model has no chain rule: "
                         "every position stays uncertain to the end")
    if cfg.ordered and objective == "ar":
        raise ValueError("ordered: an autoregressive model has one order, "
                         "and its exact NLL is measured anyway")
    configurator.check_meaning(cfg, MEANINGLESS[objective], objective)


def measure_checkpoint(cfg, generator, inputs, ranks):
    """(what was measured, by the parts of eval.json; likelihood.RowLosses of the bound or None)."""
    objective = Objective(generator.model, generator.posterior).eval()
    subject = measure.Subject(generator, objective, inputs.validation, ranks)
    if ranks.rank == 0:
        place = f"{cfg.dtype} on {ranks.world} × {generator.device.type}"
        n_params = generator.model.n_params()
        print(f"{generator.weights_folder}: {generator.objective}, {n_params:,} parameters, "
              f"step {generator.record['step']}, {place}", flush=True)
    measured, losses = {}, None
    with torch.no_grad():
        if cfg.bound:
            measured["bound"], losses = measure.measure_bound(cfg, subject)
        if cfg.ordered:
            measured["ordered"] = measure.measure_ordered(cfg, subject)
        if cfg.answers and ranks.rank == 0:
            measured["answers"] = exact_match.measure_answers(
                cfg, generator, inputs.validation.sequences, inputs.validation.layout)
        if cfg.tasks:
            measured["tasks"] = measure.measure_tasks(cfg, subject, inputs.tasks)
        if (cfg.samples or cfg.texts) and ranks.rank == 0:
            measured["texts"] = measure.measure_texts(cfg, subject, inputs.judge)
    return measured, losses


# ---------------------------------------------------------------------------------------- each new checkpoint


def evaluate_new_checkpoints(cfg, ranks):
    """Evaluate each checkpoint of a run that has no scores yet, until that of its last step has.

    One that can't be read (damaged, or removed as `keep` says) is passed over with a warning; on a single
    rank also one that can't be measured.
    Raises ValueError or OSError if the settings don't suit the run.
    """
    for signum in terminal.stop_signals():
        signal.signal(signum, signal.default_int_handler)  # as Ctrl-C
    tasks = open_tasks(cfg, ranks)
    check_no_pipes(cfg.watch)
    log = ScoreLog(cfg.watch)
    is_waiting = False
    with contextlib.closing(log):
        while True:
            looks = log.is_finished(), log.next_checkpoint()  # the last one may appear between the two
            # the first rank decides for all
            is_finished, checkpoint = distributed.all_gather(ranks, looks)[0]
            if checkpoint:
                evaluate_into(log, cfg, checkpoint, tasks, ranks)
                is_waiting = False
            elif is_finished:
                break
            else:
                if ranks.rank == 0 and not is_waiting:
                    print(f"waiting for the next checkpoint of {cfg.watch}", flush=True)
                is_waiting = True
                time.sleep(cfg.watch_every)
    if ranks.rank == 0:
        print(f"{cfg.watch} is at its last step, and its checkpoints are scored")


def evaluate_into(log, cfg, checkpoint, tasks, ranks):
    """Evaluate one checkpoint of a run (watch.Unscored), log its figures; raises ValueError or OSError."""
    generator, problem = attempt(open_generator, cfg, checkpoint.folder)
    problem = next(filter(None, distributed.all_gather(ranks, problem)), None)
    if not problem:
        inputs = open_inputs(cfg, generator, ranks, tasks)
        if ranks.world == 1:
            result, problem = attempt(measure_checkpoint, cfg, generator, inputs, ranks)
        else:  # the others may be waiting for this rank within it: a failure ends all
            result = measure_checkpoint(cfg, generator, inputs, ranks)
    if ranks.rank:
        return
    if problem:
        log.pass_over(checkpoint, problem)
        return
    measured, losses = result
    written = report.write_report(inputs.out, measured, losses, generator, vars(cfg))
    averaged = {"averaged": True} if generator.is_averaged else {}
    log.append(checkpoint, generator.record, report.figures(measured) | averaged)
    report.print_report(measured, generator)
    print(written)


def attempt(function, *arguments):
    """(what a function returns, None), or (None, what was wrong) if it failed."""
    try:
        return function(*arguments), None
    except Exception as error:  # of a task's own code, of the device's memory, …
        problem = str(error).partition("\n")[0] or type(error).__name__
        if not isinstance(error, ValueError | OSError):
            problem = f"{type(error).__name__}: {problem}"
        return None, problem


def open_generator(cfg, folder):
    """The Generator of a checkpoint folder with its weights; raises ValueError or OSError."""
    return Generator.from_checkpoint(folder, cfg.device, cfg.dtype, cfg.weights).load_weights()


if __name__ == "__main__":
    terminal.run(main)
