"""What a run writes down about itself, and how it is read and drawn.

    run/metrics.jsonl      a line per entry of the log: losses, validations, events
    run/validation.npz     the last validation, row by row
"""

import contextlib
import json
import math
import os
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import configurator
import diffusion
import kernels
import terminal
from configurator.format import plot_text
from configurator.renamed import SETTINGS, renamed
from corpus.files import open_regular
from corpus.records import check, parse_json, real, whole
from training import distributed
from training.flops import counts_of, expected_share, noisy_share, peak_flops
from training.transfer import AsyncCopy, seconds_between, timestamp

# ---------------------------------------------------------------------------------------------- for people


def say(ranks, text):
    """Print a line on rank 0."""
    if ranks.rank == 0:
        print(text, flush=True)


def warn(ranks, text):
    """Print a warning on rank 0, to stderr."""
    if ranks.rank == 0:
        print(f"warning: {text}", file=sys.stderr, flush=True)


def print_opening(run, network, resumed, to_do):
    """Print the settings that differ from their defaults, the network, the hardware and the data."""
    cfg, ranks = run.cfg, run.ranks
    changed = [f"{name}={value}" for name, value in configurator.changed(cfg).items()]
    say(ranks, f"settings: {', '.join(changed)}")
    flops = network.flops_per_token(expected_share(run))
    shard = f", shard: {cfg.shard}" if cfg.layout() != "no" else ""
    place = f"{str(run.dtype)[6:]} on {ranks.world} × {run.device.type}"
    say(ranks, f"{network.n_params():,} parameters ({network.n_params(False):,} without embeddings), "
               f"{flops / 1e6:.1f} MFLOP per token, {place}, attention: {attention_backend(run)}{shard}")
    if run.sequences.has_pairs:
        print_pairs(run)
    tokens, n = run.steps * run.tokens_per_step, run.sequences.n
    say(ranks, f"{run.steps:,} steps of {run.tokens_per_step:,} tokens: {tokens:,} tokens, "
               f"{run.steps * cfg.batch_size / n:.2f} epochs of {n * cfg.seq_len:,}")
    if resumed:
        folder, record = resumed
        changed = [f"{name} {value!r} → {getattr(cfg, name)!r}" for name, value in record["settings"].items()
                   if name != "resume" and getattr(cfg, name, value) != value]
        changes = f"; changed settings: {', '.join(changed)}" if changed else ""
        say(ranks, f"resumed from {folder}{changes}")
    elif run.init_checkpoint:
        say(ranks, f"begins with the weights of {run.init_checkpoint[0]}")
    if cfg.compile != "no" and to_do:
        say(ranks, "the first step compiles the model, which takes up to a minute on a CPU")


def print_pairs(run):
    """Say how many question-answer pairs are in how many rows, and which are cut or left out."""
    for name, sequences in (("training", run.sequences), ("validation", run.val_sequences)):
        sources = getattr(sequences, "sources", [sequences])
        n_pairs, n_cut, n_skipped = (sum(counts) for counts in zip(
            *((len(source.start), source.n_cut, source.n_skipped) for source in sources)))
        left = f", {n_cut:,} of them cut" if n_cut else ""
        left += f"; {n_skipped:,} are left out, as their answers don't fit" if n_skipped else ""
        say(run.ranks, f"{name}: {n_pairs:,} question-answer pairs in {sequences.n:,} rows{left}")
        if n_cut + n_skipped > (n_pairs + n_skipped) / 2:
            longest = max(source.longest for source in sources)
            warn(run.ranks, f"most pairs are longer than a row of {run.cfg.seq_len}: raise --seq_len (the "
                            f"longest has {longest:,} tokens)")
    if run.cfg.objective != "ar" and run.cfg.eos_padding == "none" and not run.model_config.diffusion_block:
        warn(run.ranks, "without eos_padding=row the model never learns where an answer ends: it fills the "
                        "room that it is given")


def attention_backend(run):
    """The name of the attention's implementation; warns where a faster one should have been found."""
    cfg, causal = run.cfg, run.model_config.causal
    has_mask = run.has_documents or run.model_config.diffusion_block > 0
    query = torch.empty(1, 1, cfg.seq_len, run.model_config.head_dim, dtype=run.dtype, device=run.device)
    backend = kernels.attention_backend(query, causal, has_mask)
    on_hopper = run.device.type == "cuda" and torch.cuda.get_device_capability(run.device) >= (9, 0)
    if backend == "flash_attention" and on_hopper:
        warn(run.ranks, "attention falls back to FlashAttention-2; cuDNN's is faster here, "
                        "but this torch does not find it fit")
    return backend


# ------------------------------------------------------------------------------------------- metrics.jsonl


class Tracker:
    """A Weights & Biases run, which may fail: then there is a warning, and no more goes to it."""

    def __init__(self, wandb_run):
        self.wandb_run, self.id = wandb_run, wandb_run.id

    def log(self, values):
        self.attempt("log", values)

    def finish(self):
        self.attempt("finish")

    def attempt(self, method, *arguments):
        """Call a method of the wandb run, unless one has failed before."""
        wandb_run, self.wandb_run = self.wandb_run, None
        if wandb_run:
            with terminal.optional("wandb has failed, and gets no more of this run"):
                getattr(wandb_run, method)(*arguments)
                self.wandb_run = wandb_run


class Journal:
    """metrics.jsonl and Weights & Biases. A full disk costs lines that can't be written, not the run."""

    def __init__(self, run_dir, tracker):
        self.path, self.tracker = Path(run_dir) / "metrics.jsonl", tracker
        self.complained = False  # a full disk is said once
        self.torn = False  # the last line was written in part
        if self.path.exists() and not self.path.is_file():  # opening a pipe waits for its reader
            raise ValueError(f"{self.path} is no regular file")
        self.file = open(self.path, "ab", buffering=0)

    def back_to(self, step):
        """Forget the lines of later steps: they are about to come again."""
        try:
            trim_metrics(self.path, step)
            self.file.close()
            self.file = open(self.path, "ab", buffering=0)
        except OSError as problem:
            self.complain(problem)

    def complain(self, problem):
        if not self.complained:
            warning = f"{self.path} can't be written ({problem.strerror}); training goes on"
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        self.complained = True

    def write(self, **values):
        """Write one line; figures that JSON does not know (not finite) become text."""
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = str(value)
        line = ("\n" * self.torn + json.dumps(values) + "\n").encode()
        try:
            self.torn = self.file.write(line) < len(line)
        except OSError as problem:
            self.complain(problem)
        if self.tracker:
            self.tracker.log(values)

    def write_rows(self, measured, **about):
        """Keep the last validation row by row, as `write_rows` does."""
        try:
            write_rows(self.path.with_name("validation.npz"), measured, **about)
        except OSError as problem:
            self.complain(problem)


def open_tracker(run):
    """A Tracker, on rank 0, of a Weights & Biases run, continued under the id that the run folder keeps.

    None without the setting `wandb`. Raises ValueError if a run can't begin with it; one that goes on does so
    without, after a warning.
    """
    cfg, folder = run.cfg, run.folder
    if not cfg.wandb or run.ranks.rank:
        return None
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb") from None
    known = folder / "wandb_id.txt"
    try:
        wandb_run = wandb.init(project=cfg.wandb, name=folder.name, config=asdict(cfg), resume="allow",
                               id=known.read_text(encoding="utf-8") if known.is_file() else None)
        # its own counter would drop what comes again after the run went back
        wandb_run.define_metric("*", step_metric="step")
        return Tracker(wandb_run)
    except Exception as problem:  # wandb's own, and what its service, the network or the disk raise
        reason = str(problem).partition("\n")[0] or type(problem).__name__
        if not known.is_file():
            raise ValueError(
                f"wandb: {reason}; log in with 'wandb login' or set WANDB_MODE=offline") from None
        warn(run.ranks, f"wandb: {reason}; the run goes on without it")
        return None


def write_rows(path, measured, **about):
    """Write what was measured row by row (likelihood.RowLosses): `eval.py compare` takes differences of it.

    about: step, text (its digest), seq_len, passes, error, bytes_per_token. Raises OSError.
    """
    sequences, values = measured.by_sequence
    path = Path(path)
    with open(path.with_suffix(".tmp"), "wb") as file:
        np.savez(file, blocks=sequences, values=values, about=np.array(json.dumps(about)))
    path.with_suffix(".tmp").replace(path)


def read_rows(run_dir, name="validation.npz"):
    """(about, sequences, values) as `write_rows` wrote them; None without such a file, or if damaged."""
    try:
        with open_regular(Path(run_dir) / name) as raw, np.load(raw, allow_pickle=False) as file:
            about = renamed(parse_json(str(file["about"]), name), SETTINGS)
            check(about, ROWS, name)
            sequences, values = file["blocks"], file["values"]
    except Exception:  # a damaged archive can raise almost anything
        return None
    is_fit = sequences.ndim == 1 and sequences.dtype.kind == "i" and values.shape == sequences.shape
    return (about, sequences, values) if is_fit and values.dtype.kind == "f" else None


# a line of metrics.jsonl, as far as anybody reads it
LINE = {
    "step": whole(),
    "tokens?": whole(),
    **dict.fromkeys(("loss?", "val_loss?", "val_error?", "val_bpb?", "val_ema?"), float),
    **dict.fromkeys(("grad_norm?", "tokens_per_s?"), float),
    "objective?": str,
    "event?": str,
}
# what validation.npz says of its rows
ROWS = {
    "step": whole(),
    "text": str,
    "seq_len": whole(1),
    "passes": whole(1),
    "error": float,
    "bytes_per_token": real(0),
    "averaged?": bool,  # whether they are of the weights' moving average
}
# JSON has no numbers for them, so `Journal.write` writes their names.
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_metrics(run_dir):
    """The records of a run's metrics.jsonl, figures as floats; a line that a crash cut is left out."""
    path = Path(run_dir) / "metrics.jsonl"
    return [record for record, _ in read_lines(path)] if path.is_file() else []


def read_lines(path):
    """(record, line) for each line of a metrics.jsonl that is a whole one; what a power loss left is none."""
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            record = parse_json(line, path)
            for name, value in record.items() if isinstance(record, dict) else ():
                record[name] = NOT_FINITE.get(value, value) if isinstance(value, str) else value
            check(record, LINE, path)
            yield record, line


def validations(metrics):
    """Those of a run's metrics that are validations."""
    return [m for m in metrics if {"tokens", "objective", "val_loss", "val_bpb"} <= m.keys()]


def trim_metrics(path, step, events=True):
    """Drop what an interrupted run logged after its last checkpoint: those steps are about to be repeated.

    What was decided about them (lines with an `event`, but for the comparison of ranks) stays, if `events`:
    it happened.
    """
    if not path.is_file():
        return
    kept = []
    for record, line in read_lines(path):
        decided = events and record.get("event", "ranks") != "ranks"
        if record["step"] <= step or decided:
            kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


# -------------------------------------------------------------------------------------- the figures of steps


class Line(NamedTuple):
    """A line of progress that is due: what is known when its steps are sent."""

    start: Any  # timestamp at which its clock began
    tokens: int  # since then
    lr: float


class Arriving(NamedTuple):
    """Figures of the steps first … last on their way to the host, and the line that is due with them."""

    first: int
    last: int
    copy: AsyncCopy
    line: Line | None


class StepLog:
    """The figures of steps, from the device to metrics.jsonl and the terminal.

    Losses and norms stay on the device until a line is due; then they travel while training goes on. Every
    rank has a StepLog, since parts of the loss add up over ranks; only rank 0 writes and prints.
    """

    def __init__(self, run, state, guard, network, tracker=None):
        self.run, self.state, self.guard, self.network = run, state, guard, network
        self.journal = Journal(run.folder, tracker) if run.ranks.rank == 0 else None
        self.names = diffusion.figure_names(run.process) + ["grad_norm"]
        self.figures = torch.zeros(run.cfg.log_every, len(self.names), device=run.device)
        self.unsent = 0  # steps in `figures`
        self.arriving, self.speeds = deque(), deque(maxlen=20)
        self.peak = peak_flops(run.device) if run.dtype == torch.bfloat16 else None
        self.restart_clock()

    def restart_clock(self):
        """Begin to measure speed here: what went before (compiling, validating, saving) is not training."""
        self.clock, self.clock_tokens = timestamp(self.run.device), 0

    def add(self, figures):
        """Keep a step's figures, named device scalars."""
        self.figures[self.unsent] = torch.stack([figures[name] for name in self.names])
        self.unsent += 1
        self.clock_tokens += self.run.tokens_per_step

    def queue(self, lr=None):
        """Let the figures since the last time travel to the host; with `lr` a line of progress is due."""
        last, ranks = self.state.step, self.run.ranks
        values = self.figures[: self.unsent]
        if lr is not None:  # one more row holds the norm of all weights: it travels like the gradient's
            norm = distributed.full_tensor(nn.utils.get_total_norm(list(self.network.parameters())))
            row = nn.functional.pad(norm[None, None], (len(self.names) - 1, 0))
            values = torch.cat((values, row))
        if ranks.world > 1:  # the parts of the loss add up over ranks; of the norms all take rank 0's
            if ranks.rank:
                values[:, -1] = 0
            dist.all_reduce(values)
        copy, line = AsyncCopy(values), None
        if lr is not None:
            line = Line(self.clock, self.clock_tokens, lr)
            self.clock, self.clock_tokens = copy.timestamp, 0
        self.arriving.append(Arriving(last - self.unsent + 1, last, copy, line))
        self.unsent = 0

    def poll(self, wait=False):
        """Log the figures that have arrived; with `wait` all that were sent."""
        while self.arriving and self.arriving[0].copy.ready(wait):
            first, last, copy, line = self.arriving.popleft()
            rows = copy.values.tolist()
            param_norm = rows.pop()[-1] if line else None
            for step, row in enumerate(rows, first):
                self.judge(step, dict(zip(self.names, row)))
            if line and self.state.pending:
                self.print_line(last, seconds_between(line.start, copy.timestamp), line, param_norm)

    def flush(self):
        """Log all figures up to this step, waiting for the device."""
        if self.unsent:
            self.queue()
        self.poll(wait=True)

    def judge(self, step, figures):
        """Keep a good step's figures for the next line; log that a bad one was skipped."""
        if self.guard.count(figures["grad_norm"]):
            self.state.pending.append(figures)
            return
        loss, norm = diffusion.total_loss(figures), figures["grad_norm"]
        in_a_row = self.state.bad_in_a_row
        warn(self.run.ranks, f"step {step}: skipped, its gradient's norm is {norm:.4g} (loss {loss:.4g}; "
                             f"{in_a_row} in a row)")
        first_sample = self.state.samples_at(step - 1, self.run.cfg.batch_size)
        self.write(
            step, event="skipped", loss_then=loss, norm=norm, in_a_row=in_a_row, first_sample=first_sample)

    def print_line(self, step, seconds, line, param_norm):
        """Log and print one line of progress, from the means of what is pending."""
        rows = [list(figures.values()) for figures in self.state.pending]
        figures = dict(zip(self.state.pending[0], np.mean(rows, axis=0).tolist()))
        figures["loss"] = diffusion.total_loss(figures)
        self.state.pending.clear()
        text = f"step {step:>6}/{self.run.steps}  loss {figures['loss']:.4f}  norm {figures['grad_norm']:.2f}"
        text += f"  lr {line.lr:.2e}"
        speed = {}
        if line.tokens:  # else it has but the step that compiled
            tokens_per_s = line.tokens / seconds
            self.speeds.append(tokens_per_s)
            speed = dict(tokens_per_s=tokens_per_s, **self.mfu(step, tokens_per_s))
            left = (self.run.steps - step) * self.run.tokens_per_step / float(np.median(self.speeds))
            text += f"  {tokens_per_s / 1e3:.1f}K tok/s"
            text += f"  mfu {speed['mfu']:.1%}" if "mfu" in speed else ""
            text += f"  eta {int(left // 60)}:{int(left % 60):02d}"
        self.write(step, **figures, param_norm=param_norm, lr=line.lr, **speed)
        say(self.run.ranks, text)

    def mfu(self, step, tokens_per_s):
        """{"mfu": …}, the share of the hardware's peak that the step's FLOPs take; {} if it is not known."""
        if not self.peak:
            return {}
        run = self.run
        first, n_rows = self.state.samples_at(step - 1, run.cfg.batch_size), run.cfg.batch_size
        counts = counts_of(run, first + np.arange(n_rows))
        share = noisy_share(run.process, first, n_rows, (step - 1) / run.steps, counts)
        flops = tokens_per_s * self.network.flops_per_token(share)
        return dict(mfu=flops / (self.peak * run.ranks.world))

    # ------------------------------------------------------------------------------ what else is logged

    def write(self, step, **values):
        """Write one line into metrics.jsonl, with the tokens read by then, but those given up."""
        if self.journal:
            samples = self.state.samples_at(step, self.run.cfg.batch_size) - self.state.passed_samples
            self.journal.write(step=step, tokens=samples * self.run.cfg.seq_len, **values)

    def event(self, name, text, **values):
        """Say and log what the run does by itself."""
        warn(self.run.ranks, text)
        self.write(self.state.step, event=name, **values)

    def validation(self, measured, error, figures):
        """Log a validation: likelihood.RowLosses, its standard error, further figures, in nats per token."""
        run, step = self.run, self.state.step
        loss = sum(measured.parts)
        bits = loss / math.log(2) / run.bytes_per_token
        if run.process.block and not run.process._replace(estimator="count").has_noise:
            figures = figures | dict(exact=True)
        self.write(step, objective=run.cfg.objective, val_loss=loss, val_error=error, val_bpb=bits, **figures)
        if self.journal:
            self.journal.write_rows(measured, step=step, text=run.corpus_record["val_sha256"], passes=1,
                                    seq_len=run.cfg.seq_len, error=error, bytes_per_token=run.bytes_per_token)
        text = f"step {step:>6}  validation {loss:.4f}"
        text += f" ± {error:.4f}" if math.isfinite(error) else ""
        text += f" nats/token  {bits:.4f} bits/byte"
        text += "".join(f"  {name[4:]} {value:.4f}" for name, value in figures.items() if name != "exact")
        say(run.ranks, text)

    def compare_ranks(self, clock):
        """Log which rank computes fastest and slowest, by RankClock: a straggler holds up all others."""
        seconds = distributed.all_gather(self.run.ranks, clock.reset())
        fast, slow = min(seconds), max(seconds)
        fastest, slowest = seconds.index(fast), seconds.index(slow)
        step = self.state.step
        self.write(step, event="ranks", fastest=fastest, fastest_s=fast, slowest=slowest, slowest_s=slow)
        if slow > 1.5 * fast and slow - fast > 0.02:
            times = f"{slow:.3f} s of computing, rank {fastest} {fast:.3f} s"
            say(self.run.ranks, f"step {step:>6}  rank {slowest} is slow: {times}")

    def report_failed_save(self, saver):
        """Say and log that a checkpoint could not be written, once."""
        if failure := saver.take_failure():
            self.event("not saved", f"no checkpoint of step {failure['of']}: {failure['why']}", **failure)


# --------------------------------------------------------------------------------------------- at the end


def draw_losses(run_dirs, path):
    """Draw the loss curves of one or two runs as a PNG: training loss faint, validation marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    for color, run_dir in zip(("tab:blue", "tab:orange"), run_dirs):
        metrics, name = read_metrics(run_dir), plot_text(Path(run_dir).name)
        train = [(m["tokens"], m["loss"]) for m in metrics if {"tokens", "loss"} <= m.keys()]
        val = [(m["tokens"], m["val_loss"]) for m in validations(metrics)]
        if train:
            axes.plot(*zip(*train), color=color, alpha=0.35, lw=1, label=f"{name}, training")
        if val:
            axes.plot(*zip(*val), color=color, marker="o", ms=3, label=f"{name}, validation")
    axes.set(xlabel="training tokens", ylabel="nats per token", title="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def summary_line(run_dir):
    """One line on a finished run's last validation, or None."""
    last = validations(read_metrics(run_dir))[-1:]
    if not last:
        return None
    m = last[0]
    kind = "exact NLL" if m.get("exact", m["objective"] == "ar") else "NELBO, an upper bound"
    average = ""
    if m.get("val_ema") and m["val_loss"]:
        bits = m["val_bpb"] * m["val_ema"] / m["val_loss"]
        average = f"; averaged weights {bits:.3f} bits/byte, {m['val_ema']:.4f}"
    return (f"{Path(run_dir).name:>20}: {m['val_bpb']:.3f} bits/byte, {m['val_loss']:.4f} nats/token "
            f"({m['objective']}, {kind}; {m['tokens']:,} tokens{average})")
