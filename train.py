"""Train an autoregressive, masked-diffusion or uniform-diffusion language model.

    python train.py configurator/quickstart.py --lr=1e-3
    torchrun --nproc_per_node=2 train.py configurator/quickstart.py
"""

import contextlib
import gc
import math
import os
import shutil
import sys
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import configurator
import data
import diffusion
import kernels
from configurator import setting
from configurator.ladder import ladder, swiglu_width
from corpus import tokenfiles, tokenizers
from evaluation import likelihood
from model import Transformer
from training import checkpoint, checks, distributed, dryrun, transfer, update, watchdog
from training.checkpoint import load_newest
from training.log import Journal, draw_losses, open_tracker, summary_line


@dataclass
class Config:
    # where
    run_dir: str = setting("runs/default", "folder of the run: settings, metrics, checkpoints, loss curve", changes_result=False)
    corpus: str = setting("corpora/docs", "folder that data.py prepared, or token files of nanoGPT, llm.c or Megatron; several: path:weight:unique_tokens, with commas between")
    tokenizer: str = setting("", "of token files that do not say: a tiktoken encoding such as gpt2, or a tokenizer.json")
    val_share: float = setting(0.0, "share of such token files kept for validation, where none of them is", low=0, high=0.5)
    resume: Literal["no", "auto", "yes"] = setting("no", "continue from the newest checkpoint: auto if there is one, yes must have one", changes_result=False)
    seed: int = setting(1337, "of the weights, the data order and the noise", low=0, high=2**62)
    init_from: str = setting("", "begin with the weights of this run or checkpoint, and its shape: another run's, or what convert.py made of a Megatron's or Hugging Face's")
    # what is learned
    objective: Literal["masked", "uniform", "ar"] = setting("masked", "masked diffusion, uniform diffusion, or autoregressive")
    loss: Literal["elbo", "maskgit", "paper"] = setting("elbo", "elbo: the bound; maskgit: unweighted, masked only; paper: Quokka's, uniform only")
    estimator: Literal["count", "ratio", "time"] = setting("count", "of the masked bound: exactly k masks, realized ratio, or weight w(t)")
    schedule: str = setting("linear", "noise schedule: linear, cosine or poly<n>")
    time: Literal["uniform", "iid", "moving_gaussian"] = setting("uniform", "how t is drawn: one lattice per step, independently, or around a moving mean")
    time_sigma: float = setting(0.2, "standard deviation of moving_gaussian", above=0)
    time_correction: bool = setting(False, "weigh moving_gaussian's rows by the inverse density of t")
    shift: Literal["auto", "no", "yes"] = setting("auto", "masked diffusion: position i is predicted from i − 1, as in an AR model (auto: if init_from is one, or shifted)")
    anneal: int = setting(0, "steps in which attention turns from causal to bidirectional: of what is ahead, a growing random share is seen", low=0)
    document_attention: bool = setting(False, "attention stays within a document")
    reset_positions: bool = setting(False, "positions start again in each document (needs document_attention)")
    short_rows: float = setting(0.0, "share of rows cut to a random length (the paper's recipe: 0.01)", low=0, high=1)
    # the network
    model: str = setting("", "a size of the Quokka ladder such as 124M or 1086M; replaces the six shape settings below")
    n_layer: int = setting(6, "blocks", low=1)
    n_head: int = setting(6, "attention heads", low=1)
    n_kv_head: int = setting(0, "key and value heads (0: n_head)", low=0)
    head_dim: int = setting(0, "width of a head, even (0: d_model / n_head)", low=0)
    d_model: int = setting(384, "width of the residual stream", low=1)
    d_ff: int = setting(0, "width of the SwiGLU (0: 8/3 of d_model, in 64s)", low=0)
    seq_len: int = setting(256, "tokens per row", low=2)
    tied: bool = setting(True, "the LM head is the embedding")
    rope_base: float = setting(10_000.0, "base of the rotary wavelengths", above=1)
    dropout: float = setting(0.0, "dropout rate", low=0, high=0.99)
    init_std: float = setting(0.02, "standard deviation of the initial weights", above=0)
    scaled_init: bool = setting(True, "divide that of residual outputs by √(2·n_layer)")
    local_init: bool = setting(False, "heads start out looking at neighbouring positions: small diffusion models learn sooner")
    # how long, on what
    steps: int = setting(0, "optimizer steps; give exactly one of steps, tokens and epochs", low=0)
    tokens: float = setting(0.0, "training tokens in all, repeats included", low=0, high=1e15)
    epochs: float = setting(0.0, "passes over the (unique) training tokens", low=0, high=1e9)
    unique_tokens: int = setting(0, "train on a fixed random subset of this many tokens (0: all)", low=0)
    batch_size: int = setting(64, "rows per optimizer step, over all ranks", low=1)
    micro_batch: int = setting(0, "rows per rank and forward pass (0: no gradient accumulation)", low=0, changes_result=False)
    # the optimizer
    lr: float = setting(1e-3, "peak learning rate", above=0)
    min_lr: float = setting(-1.0, "final learning rate (-1: a tenth of lr)", low=-1)
    lr_schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", "cosine, warmup-stable-decay (exponential decay) or constant")
    warmup: int = setting(100, "steps of linear warm-up", low=0)
    decay: float = setting(1000.0, "of wsd: steps of decay at the end (below 1: their share of all steps)", above=0)
    beta1: float = setting(0.9, "AdamW's β₁", low=0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's β₂", low=0, high=0.99999)
    weight_decay: float = setting(0.1, "of matrices and embeddings; norms never decay", low=0)
    clip: float = setting(1.0, "largest gradient norm (0: unlimited)", low=0)
    # along the way
    log_every: int = setting(10, "steps between lines of progress", low=1, changes_result=False)
    eval_every: int = setting(250, "steps between validations (0: only first and last)", low=0, changes_result=False)
    eval_rows: int = setting(256, "validation blocks (0: all)", low=0)
    eval_tasks: str = setting("", "tasks of lm-evaluation-harness, with commas, as in eval.py; needs the extra eval")
    eval_tasks_every: int = setting(0, "steps between their evaluations (0: only after the last)", low=0)
    eval_tasks_limit: int = setting(0, "examples of each (0: all)", low=0)
    eval_tasks_masks: int = setting(32, "noisy copies of each answer (eval.py takes 128)", low=1)
    task_path: str = setting("", "folder with tasks of your own, as .yaml")
    task_data: str = setting("", "folder with data sets called as on the hub (hellaswag, mmlu): nothing is downloaded for these")
    save_every: int = setting(1000, "steps between checkpoints (0: only the last)", low=0, changes_result=False)
    save_at: str = setting("", "further steps to save at, with commas; these checkpoints stay whatever keep says", changes_result=False)
    keep: int = setting(2, "newest checkpoints to keep", low=1, changes_result=False)
    keep_every: int = setting(0, "keep those of every multiple of this many steps, too (0: none)", low=0, changes_result=False)
    compare: str = setting("", "another run, to be shown beside this one at the end", changes_result=False)
    wandb: str = setting("", "Weights & Biases project (empty: off)", changes_result=False)
    # the machine
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one", changes_result=False)
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of the matrix products; weights stay float32 (auto: bfloat16 where the hardware has it)")
    compile: Literal["whole", "blocks", "no"] = setting("whole", "torch.compile the model with its loss, or block by block: compiles sooner", changes_result=False)
    recompute: Literal["no", "elementwise", "selective", "full"] = setting("no", "what is computed again to save memory: all but matrix products and attention; the SwiGLU's gate and up, too; whole blocks", changes_result=False)
    fp8: bool = setting(False, "8-bit products in the blocks (Hopper and later; pays from d_model near 1500 on)")
    cuda_graphs: bool = setting(False, "replay the step as a CUDA graph (small models, one GPU, compile=whole)", changes_result=False)
    # several ranks, and what can happen to them
    shard: Literal["no", "full", "optim", "hybrid"] = setting("no", "what ranks divide: nothing (DDP); all state (FSDP); optimizer state and master weights; all, among shard_size ranks", changes_result=False)
    shard_size: int = setting(0, "of hybrid: ranks that share one copy of the state (0: those of a node)", low=0, changes_result=False)
    timeout: float = setting(600.0, "seconds without progress after which a rank is given up and the job ends; above the time to compile", above=0, high=1e6, changes_result=False)
    skip_norm: float = setting(0.0, "skip updates whose gradient norm is above this, as those whose norm is not finite (0: only these)", low=0)
    max_skips: int = setting(5, "skipped updates in a row after which the run goes back to its last good checkpoint, and past those data; looked at with each line of progress", low=1)
    dry_run: bool = setting(False, "print what the run will need: memory, time, communication, disk; and stop. --device=cuda needs no GPU then", changes_result=False)
    gpus: int = setting(0, "of a dry run: ranks to plan for (0: as many as started)", low=0, changes_result=False)
    gpus_per_node: int = setting(8, "of a dry run: how many of them share a node", low=1, changes_result=False)

    def problems(self):
        """Settings that do not go together, one line each."""
        world, wrong = self.world(), []
        defaults = Config()
        say = wrong.append
        if sum(bool(x) for x in (self.steps, self.tokens, self.epochs)) != 1:
            say("how long? give exactly one of steps, tokens and epochs")
        if self.batch_size % (world * (self.micro_batch or 1)):
            say(f"batch_size={self.batch_size} must be a multiple of {world} ranks × micro_batch={self.micro_batch or 1}")
        if self.objective != "masked" and self.loss == "maskgit":
            say("loss=maskgit needs objective=masked")
        if self.objective != "uniform" and self.loss == "paper":
            say("loss=paper needs objective=uniform")
        if self.estimator != "count" and (self.objective, self.loss) != ("masked", "elbo"):
            say(f"estimator={self.estimator} needs objective=masked and loss=elbo")
        if self.objective == "ar":
            for name in ("schedule", "time", "time_sigma"):
                if getattr(self, name) != getattr(defaults, name):
                    say(f"{name}={getattr(self, name)} has no meaning for objective=ar; add --{name}={getattr(defaults, name)}")
        if self.shift == "yes" and self.objective != "masked":
            say(f"shift=yes needs objective=masked, not {self.objective}")
        if self.anneal and self.objective == "ar":
            say("anneal has no meaning for objective=ar, whose attention stays causal")
        if self.time_correction and (self.time != "moving_gaussian" or self.loss != "elbo"):
            say("time_correction needs time=moving_gaussian and loss=elbo")
        if self.reset_positions and not self.document_attention:
            say("reset_positions needs document_attention")
        try:
            given = tokenfiles.parse_corpora(self.corpus)
            if self.unique_tokens and (len(given) > 1 or given[0][2]):
                say("unique_tokens is for a single corpus; give each its own as path:weight:unique_tokens")
        except ValueError as problem:
            say(str(problem))
        try:
            diffusion.schedule(self.schedule)
        except ValueError as problem:
            say(str(problem))
        try:
            shape = self.shape()
            if shape["head_dim"] % 2:
                say(f"head_dim={shape['head_dim']} must be even")
            if shape["n_head"] % shape["n_kv_head"]:
                say(f"n_head={shape['n_head']} must be a multiple of n_kv_head={shape['n_kv_head']}")
            for what in ("d_model", "d_ff", "n_kv_head") if self.fp8 else ():
                width = shape[what] * (shape["head_dim"] if what == "n_kv_head" else 1)
                if width % 16:
                    say(f"fp8 needs widths that are multiples of 16, not {what}{' × head_dim' if 'head' in what else ''}={width}")
        except ValueError as problem:
            say(str(problem))
        shape_of = f"model={self.model}" if self.model else f"init_from={self.init_from}"
        for name in (("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff") if self.model or self.init_from else ()) \
                + (("model", "tied", "rope_base", "local_init") if self.init_from else ()):
            if getattr(self, name) != getattr(defaults, name):
                say(f"{name}={getattr(self, name)} contradicts {f'init_from={self.init_from}' if name == 'model' else shape_of}; give one of the two")
        if self.min_lr > self.lr or -1 < self.min_lr < 0:
            say(f"min_lr={self.min_lr} must be -1 or lie between 0 and lr={self.lr}")
        for name in ("task_path", "task_data"):
            if getattr(self, name) and not Path(getattr(self, name)).is_dir():
                say(f"{name}={getattr(self, name)}: no such folder")
        try:
            self.kept_steps()
        except ValueError as problem:
            say(str(problem))
        if self.lr_schedule == "wsd" and self.min_lr == 0:
            say("lr_schedule=wsd decays exponentially and never reaches min_lr=0; give a positive one")
        if self.fp8 and (self.micro_batch or self.batch_size // world) * self.seq_len % 16:
            say("fp8 needs micro-batches of a multiple of 16 tokens")
        if self.fp8 and self.dtype == "float32":
            say("fp8 goes with dtype=bfloat16 or auto")
        if self.fp8 and self.device != "cpu" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            say("fp8 needs a GPU of compute capability 8.9 or later")
        gpu = self.device != "cpu" and torch.cuda.is_available() or self.device == "cuda" and self.dry_run
        if self.shard != "no" and self.compile == "whole" and world > 1:
            say(f"shard={self.shard} works between blocks, which compile=whole joins; add --compile=blocks")
        if self.shard == "hybrid" and world > 1 and world % (self.shard_size or self.node()):
            say(f"shard=hybrid needs copies of one size: {self.shard_size or self.node()} does not divide the {world} ranks; give a --shard_size that does")
        if self.shard_size and self.shard != "hybrid":
            say(f"shard_size={self.shard_size} is for shard=hybrid")
        if self.gpus and not self.dry_run:
            say("gpus is for a dry run: add --dry_run, or start that many processes with torchrun")
        if self.cuda_graphs and (self.compile != "whole" or world > 1 or not gpu):
            say("cuda_graphs needs compile=whole and one process on a GPU")
        if world > 1 and self.compile == "whole" and self.recompute in ("elementwise", "selective") and torch.__version__ < "2.13":
            say(f"recompute={self.recompute} with compile=whole on several ranks needs torch 2.13 (before, DDP's compiler computes all again); use compile=blocks")
        if self.device == "cuda" and not torch.cuda.is_available() and not self.dry_run:
            say("device=cuda, but this machine has no usable GPU; use --device=cpu")
        if not self.dry_run and self.device != "cpu" and 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            say(f"{os.environ['LOCAL_WORLD_SIZE']} ranks on this machine, but {torch.cuda.device_count()} GPUs; start one rank per GPU")
        return wrong

    def world(self):
        """Ranks that train, or that a dry run is for."""
        return self.dry_run and self.gpus or int(os.environ.get("WORLD_SIZE", 1))

    def node(self):
        """Ranks on this node, or on one of a dry run."""
        return min(self.world(), self.gpus_per_node) if self.dry_run else int(os.environ.get("LOCAL_WORLD_SIZE", self.world()))

    def layout(self):
        """`shard`, where there are several ranks to share."""
        return self.shard if self.world() > 1 else "no"

    def kept_steps(self):
        """save_at as a set of steps; raises ValueError."""
        given = [text.strip() for text in self.save_at.split(",")] if self.save_at else []
        if wrong := [text for text in given if not (text.isascii() and text.isdecimal() and int(text))]:
            raise ValueError(f"save_at={self.save_at}: '{wrong[0]}' is no step; write whole numbers from 1 on, with commas between")
        return {int(text) for text in given}

    def shape(self):
        """The network's shape as keyword arguments; raises ValueError if there is none."""
        if self.model:
            shape = dict(ladder(self.model), n_kv_head=0, d_ff=0)
        else:
            if not self.head_dim and self.d_model % self.n_head:
                raise ValueError(f"d_model={self.d_model} is no multiple of n_head={self.n_head}; set head_dim")
            shape = {k: getattr(self, k) for k in ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff")}
            shape["head_dim"] = self.head_dim or self.d_model // self.n_head
        shape["n_kv_head"] = shape["n_kv_head"] or shape["n_head"]
        shape["d_ff"] = shape["d_ff"] or max(64, swiglu_width(shape["d_model"]))
        return shape


# --------------------------------------------------------------------------------------------------- pieces


def learning_rate(cfg, step, steps):
    """The learning rate of step `step` (from 0) of `steps`."""
    low = cfg.lr / 10 if cfg.min_lr < 0 else cfg.min_lr
    decay = cfg.decay if cfg.decay >= 1 else max(1, min(round(cfg.decay * steps), steps - cfg.warmup))
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / (cfg.warmup + 1)
    if cfg.lr_schedule == "cosine":
        done = (step - cfg.warmup) / max(1, steps - cfg.warmup)
        return low + 0.5 * (cfg.lr - low) * (1 + math.cos(math.pi * done))
    if cfg.lr_schedule == "wsd" and step >= steps - decay:
        done = (step - (steps - decay) + 1) / decay
        return cfg.lr * (low / cfg.lr) ** done
    return cfg.lr


def training_batches(process, blocks, eos_id, first_sample, first_step, steps, cfg, rank, world, pin):
    """Every micro-batch of this rank from `first_step` on: a pure function of its arguments."""
    micro = cfg.micro_batch or cfg.batch_size // world
    parts = cfg.batch_size // micro
    ahead = 64  # steps whose block ids are computed at once: the permutation costs numpy calls, not arithmetic
    for step in range(first_step, steps):
        first = first_sample + (step - first_step) * cfg.batch_size
        place = (step - first_step) % ahead * cfg.batch_size
        if place == 0:
            ids = blocks.ids(first + np.arange(ahead * cfg.batch_size))
        rows = diffusion.noise_levels(process, first, cfg.batch_size, step / steps)
        visible = diffusion.annealed_mask(cfg.seed, step, cfg.seq_len, (step + 1) / cfg.anneal) if step < cfg.anneal else None
        for part in range(rank, parts, world):
            which = rows.deal(part, parts)
            try:
                batch = data.read_batch(cfg, process, blocks, eos_id, ids[place + which], rows, which)
            except ValueError as problem:  # tokens outside the vocabulary, in a corpus too large to check at the start
                configurator.fail(f"step {step + 1}: {problem}", everywhere=True)
            yield transfer.to_tensors(batch._replace(visible=visible), pin)


# ------------------------------------------------------------------------------------------------------- main


class Course(NamedTuple):
    """Where a run stands in its data: after `step` steps it draws on from sample `samples`; `passed` of those before were skipped."""

    step: int = 0
    samples: int = 0
    passed: int = 0

    def at(self, step, batch_size):
        """The same, `step - self.step` steps later."""
        return self._replace(step=step, samples=self.samples + (step - self.step) * batch_size)


def main():
    cfg = configurator.load(Config, about=__doc__)
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        attention_order = contextlib.ExitStack()  # entered for as long as this variable lives
        attention_order.enter_context(kernels.preferring_cudnn(device))
    ranks = distributed.SINGLE if cfg.dry_run else distributed.init_distributed(device, cfg.timeout)  # waiting for the others, a signal ends it at once
    stop = watchdog.stop_on_signals()
    watch = watchdog.Watchdog(ranks, cfg.timeout, stop)
    with watchdog.guarded(ranks, watch):
        code = train(cfg, device, ranks, watch, stop)
        watch.close()
        if ranks.world > 1:
            distributed.shut_down(ranks, code)
    if code:
        raise SystemExit(code)


def train(cfg, device, ranks, watch, stop):
    """The whole run, from settings to loss curve, as seen by one rank; returns its exit code."""
    run, rank, world = Path(cfg.run_dir), ranks.rank, cfg.world()
    say = print if rank == 0 else lambda *_, **__: None

    def warn(warning):
        say(f"warning: {warning}", file=sys.stderr, flush=True)

    def together(work, *arguments):
        """What `work` returns; if on any rank it finds something wrong with the user's files, all end."""
        result = problem = None
        try:
            result = work(*arguments)
        except (ValueError, OSError) as error:
            problem = str(error)
        problems = distributed.all_gather(ranks, problem)
        if any(problems):
            first = next(filter(None, problems))
            configurator.fail(first if all(problems) else f"rank {problems.index(first)}: {first}")
        return result

    start = together(checks.find_initial_checkpoint, cfg, ranks, warn)
    given = together(checks.open_inputs, cfg, start)
    corpora, blocks, val_sequences, model_config, corpus_record, steps, eval_rows, bytes_per_token = given
    tokens_per_step, kept_steps = cfg.batch_size * cfg.seq_len, cfg.kept_steps()
    meta = corpora[0].meta
    micro = cfg.micro_batch or cfg.batch_size // world
    accumulation = cfg.batch_size // (micro * world)
    process = diffusion.Process(
        cfg.objective, meta["n_vocab"], meta["mask_id"], cfg.seq_len, cfg.seed, cfg.loss, cfg.estimator,
        cfg.schedule, cfg.time, cfg.time_sigma, cfg.time_correction, cfg.short_rows)
    val_process = likelihood.validation_process(process, cfg.schedule)

    on_gpu = device.type == "cuda" or cfg.device == "cuda"  # the latter for a dry run on a machine without
    bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and (on_gpu and device.type == "cpu" or kernels.has_bf16(device)))
    dtype = torch.bfloat16 if bf16 else torch.float32

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    if cfg.fp8 and not on_gpu:
        warn("fp8 is emulated on a CPU and slower than bfloat16; a GPU of compute capability 8.9 has it")
    if cfg.dry_run:
        print(dryrun.report(cfg, process, model_config, steps, blocks.n, dtype, on_gpu))
        return 0
    benchmarks = together(checks.open_benchmarks, cfg, say)
    need = None
    watch.at(0)
    if rank == 0 and on_gpu:
        try:
            need = dryrun.predict_memory(cfg, process, model_config, dtype, on_gpu)
        except Exception as problem:
            warn(f"no prediction of memory ({type(problem).__name__}: {problem})")

    # ------------------------------------------------------------------------------ the network, from nothing or from disk

    def claim():
        if rank == 0 and (cfg.resume != "yes" or run.is_dir()):
            run.mkdir(parents=True, exist_ok=True)
            checkpoint.lock_run_folder(run, min(30.0, cfg.timeout))  # what is there now stays the newest

    watch.at(0)
    together(claim)
    folder, record = together(checks.find_checkpoint, cfg, given, ranks, warn)
    tracker = together(lambda: open_tracker(cfg, run) if cfg.wandb and rank == 0 else None)
    with torch.device("meta"):
        network = Transformer(model_config)
    plain = update.Objective(network.use(cfg.recompute, cfg.fp8), posterior=cfg.loss == "paper")
    if cfg.layout() == "no":
        network.to_empty(device=device).tables()
    objective = update.compile_and_wrap(plain, cfg.compile, ranks, cfg.layout(), cfg.shard_size, dtype, device, cfg.cuda_graphs)
    optimizer = update.make_optimizer(network, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)
    saver = checkpoint.Saver(run, network, optimizer, ranks, cfg.keep, cfg.keep_every, kept_steps, alive=lambda: watch.at(step))
    peak = dryrun.peak_flops(device) if bf16 else None
    n_parts = 2 if cfg.loss == "paper" else 1
    # `pending`: losses of no line yet; `streak`: steps skipped in a row up to now, `longest`: at any time since a checkpoint was read
    course, step, pending, streak, longest = Course(), 0, [], 0, 0

    def restore(folder, record):
        nonlocal step, pending, streak, longest
        together(checkpoint.restore, folder, record, network, optimizer, ranks)
        step, streak, longest = record["step"], record["streak"], record["streak"]
        pending = [row for row in record["pending"] if len(row) == n_parts + 1]  # another loss has other parts
        return Course(step, record["samples"], record["passed"])

    if record:
        course = restore(folder, record)
    else:
        network.init_weights(torch.Generator().manual_seed(cfg.seed))
        if start:
            together(checkpoint.init_weights_from, *start, network)
            say(f"begins with the weights of {start[0]}")
    to_do = step < steps  # else nothing changes
    watch.at(step)
    seen = distributed.all_gather(ranks, distributed.wait_for_folder(run))
    if not all(seen):
        configurator.fail(f"rank {seen.index(False)} does not see {run}, which rank 0 has made: --run_dir must be on a file system that all nodes share")

    def take_folder():
        if rank == 0 and to_do:
            checkpoint.remove_leftovers(run)
            (run / "settings.json").write_text(configurator.dump(cfg) + "\n")
            if corpora[0].tokenizer_file:
                shutil.copyfile(corpora[0].tokenizer_file, run / "tokenizer.json")  # sampling needs it
            if tracker:
                (run / "wandb_id.txt").write_text(tracker.id)
        return Journal(run, tracker) if rank == 0 else None

    journal = together(take_folder)
    if journal and to_do:
        journal.back_to(step if record else -1)
    say(configurator.dump(cfg))
    within_documents = cfg.document_attention or cfg.short_rows > 0 and cfg.objective != "ar"
    backend = kernels.attention_backend(torch.empty(1, 1, cfg.seq_len, model_config.head_dim, dtype=dtype, device=device), model_config.causal, within_documents)
    if backend == "flash_attention" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        warn("attention falls back to FlashAttention-2; cuDNN's is faster here, but this torch does not find it fit")
    say(f"{network.n_params():,} parameters ({network.n_params(False):,} without embeddings), "
        f"{network.flops_per_token(dryrun.noisy_share(process)) / 1e6:.1f} MFLOP per token, {str(dtype)[6:]} on {world} × {device.type}, "
        f"attention: {backend}" + (f", shard: {cfg.shard}" if cfg.layout() != "no" else ""))
    say(f"{steps:,} steps of {tokens_per_step:,} tokens: {steps * tokens_per_step:,} tokens, "
        f"{steps * cfg.batch_size / blocks.n:.2f} epochs of {blocks.n * cfg.seq_len:,}")
    if record:
        changed = [f"{k} {v!r} → {getattr(cfg, k)!r}" for k, v in record["settings"].items() if getattr(cfg, k, v) != v and k != "resume"]
        say(f"resumed from {folder}" + (f"; changed settings: {', '.join(changed)}" if changed else ""))
    if cfg.compile != "no" and to_do:
        say("the first step compiles the model, which takes up to a minute on a CPU", flush=True)

    # ------------------------------------------------------------------------------------ what is written down and saved

    def log(step, **values):
        if journal:
            now = course.at(step, cfg.batch_size)
            journal.write(step=step, tokens=(now.samples - now.passed) * cfg.seq_len, **values)

    def decide(event, text, **values):
        """What the run does by itself is said and logged."""
        warn(text)
        log(step, event=event, **values)

    def read(process, blocks, *rest):
        watch.at(step)
        return data.read_batch(cfg, process, blocks, meta["eos_id"], *rest)

    def validate():
        def measure(p):
            return likelihood.evaluate(plain, p, val_sequences, eval_rows, micro, ranks, device, autocast, read)

        measured, extra = measure(val_process), {}
        loss, error = sum(measured.parts), likelihood.standard_error(measured, cfg.objective == "ar")[0]
        if cfg.loss == "paper":
            noisy, clean = measure(val_process._replace(loss="paper", time="uniform")).parts
            extra = dict(val_paper=noisy + clean, val_noisy=2 * noisy, val_clean=2 * clean)
        bits = loss / math.log(2) / bytes_per_token
        log(step, objective=cfg.objective, val_loss=loss, val_error=error, val_bpb=bits, **extra)
        if journal:
            journal.keep_rows(measured, step=step, text=corpus_record["val_sha256"], seq_len=cfg.seq_len, passes=1, error=error, bytes_per_token=bytes_per_token)
        say(f"step {step:>6}  validation {loss:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "") + f" nats/token  {bits:.4f} bits/byte"
            + "".join(f"  {k[4:]} {v:.4f}" for k, v in extra.items()), flush=True)

    def measure_tasks():
        """Benchmarks: every rank takes its share of the passes, the first logs the scores."""
        from sampling.generator import Generator

        harness, opened = benchmarks
        failure = scores = None
        try:
            writer = Generator(dict(settings=asdict(cfg), model=asdict(model_config)), tokenizers.load_tokenizer(meta["tokenizer"], (run, corpora[0].folder)), device, bf16, network)
            model = harness.NanoQuokka(writer=writer, objective=plain, ranks=ranks, masks=cfg.eval_tasks_masks, tokens=min(131_072, max(4096, micro * cfg.seq_len)))
            model.alive = lambda: watch.at(step)
            with torch.compiler.set_stance("force_eager"):  # their rows are of many lengths
                scores = harness.run_tasks(model, opened, cfg.eval_tasks_limit)
        except Exception as problem:  # the run is worth more than a benchmark
            failure = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        if failed := next(filter(None, distributed.all_gather(ranks, failure)), None):
            return decide("benchmarks failed", f"step {step}: the benchmarks failed ({failed}); training goes on", why=failed)
        if rank == 0:
            log(step, **{f"eval/{task}/{name}": value for task, line in scores.items() for name, value in line.items() if isinstance(value, float)})
            for task, line in scores.items():
                say(f"step {step:>6}  {task}: " + "  ".join(f"{k} {v:.4f} ± {line.get(k + '_stderr', math.nan):.4f}" for k, v in line.items()
                                                           if isinstance(v, float) and not k.endswith("_stderr")), flush=True)

    def save():
        now = course.at(step, cfg.batch_size)
        saver.save(step, dict(settings=asdict(cfg), model=asdict(model_config), corpus=corpus_record, samples=now.samples, passed=now.passed,
                              steps=steps, streak=streak, pending=pending))

    def hear_of_saving():
        if failure := saver.news():
            decide("not saved", f"no checkpoint of step {failure['of']}: {failure['why']}", **failure)

    # Losses and norms stay on the device until a line is due; then they travel while training goes on.
    recent = torch.zeros(cfg.log_every, n_parts + 1, device=device)
    arriving, speeds, laps = deque(), deque(maxlen=20), []

    def send(first, last, line):
        """Let the records of steps first+1 … last travel to the host; `line`: what is known of the line that is due, if one is."""
        values = recent[: last - first]
        if line:  # one more row holds the norm of all weights: it travels like the gradient's
            weights = distributed.full_tensor(nn.utils.get_total_norm(list(network.parameters())))
            values = torch.cat((values, nn.functional.pad(weights[None, None], (n_parts, 0))))
        if world > 1:
            values[:, -1] /= world  # the norm is the same on every rank, the parts add up
            dist.all_reduce(values)
        arriving.append((first, last, transfer.AsyncCopy(values), line))
        recent.zero_()

    def receive(wait=False):
        """Log what has arrived (with `wait`: all that was sent)."""
        nonlocal streak, longest
        while arriving and arriving[0][2].here(wait):
            first, last, arrived, line = arriving.popleft()
            rows = arrived.values.tolist()
            if line:
                line = dict(line, param_norm=rows.pop()[-1])
            for number, row in enumerate(rows, first + 1):
                if update.is_bad(row[-1], cfg.skip_norm):
                    streak += 1
                    longest = max(longest, streak)
                    warn(f"step {number}: skipped, its gradient's norm is {row[-1]:.4g} (loss {sum(row[:-1]):.4g}; {streak} in a row)")
                    log(number, event="skipped", loss_then=sum(row[:-1]), norm=row[-1], in_a_row=streak, first_sample=course.at(number - 1, cfg.batch_size).samples)
                else:
                    streak = 0
                    pending.append(row)
            if line and pending:
                show(last, transfer.seconds_between(line["start"], arrived.moment), **line)

    def show(step, duration, start, lr, tokens, param_norm):
        """One line of progress, from the means of what is pending."""
        *parts, norm = np.mean(pending, axis=0).tolist()
        pending.clear()
        speed = tokens / duration
        speeds.append(speed)
        mfu = {}
        if peak:
            rows = diffusion.noise_levels(process, course.at(step - 1, cfg.batch_size).samples, cfg.batch_size, (step - 1) / steps)
            share = float(rows.count.mean()) / cfg.seq_len if cfg.objective == "masked" else 1.0
            mfu = dict(mfu=speed * network.flops_per_token(share) / (peak * world))
        paper = dict(noisy=2 * parts[0], clean=2 * parts[1]) if n_parts == 2 else {}
        log(step, loss=sum(parts), **paper, grad_norm=norm, param_norm=param_norm, lr=lr, tokens_per_s=speed, **mfu)
        left = (steps - step) * tokens_per_step / float(np.median(speeds))
        say(f"step {step:>6}/{steps}  loss {sum(parts):.4f}  norm {norm:.2f}  lr {lr:.2e}  {speed / 1e3:.1f}K tok/s"
            + (f"  mfu {mfu['mfu']:.1%}" if mfu else "") + f"  eta {int(left // 60)}:{int(left % 60):02d}", flush=True)

    def compare_ranks():
        """Log which rank computes fastest and slowest: a straggler holds up all others. Times of a step since the last line."""
        seconds = distributed.all_gather(ranks, sum(transfer.seconds_between(*lap) for lap in laps))
        laps.clear()
        fast, slow = min(seconds), max(seconds)
        log(step, event="ranks", fastest=seconds.index(fast), fastest_s=fast, slowest=seconds.index(slow), slowest_s=slow)
        if slow > 1.5 * fast and slow - fast > 0.02:
            say(f"step {step:>6}  rank {seconds.index(slow)} is slow: {slow:.3f} s of computing, rank {seconds.index(fast)} {fast:.3f} s", flush=True)

    # ------------------------------------------------------------------------------------------------------ the loop

    gpu = device.type == "cuda"

    def stream():
        batches = training_batches(process, blocks, meta["eos_id"], course.samples, course.step, steps, cfg, rank, world, pin=gpu)
        return transfer.upload(transfer.prefetch(batches), device) if gpu else batches  # on a CPU a thread would only take time from the step's own

    returns = Counter()

    def go_back():
        """To the newest checkpoint from before the skipped steps, and past the data since: they led here. Returns the new course."""
        saver.wait()
        try:
            folder, record = load_newest(run, warn, ranks, fit=lambda record: record["streak"] == 0)
        except FileNotFoundError:
            configurator.fail(f"step {step}: the gradient was not finite or above skip_norm in {longest} steps in a row, and there is no checkpoint from before; lower --lr")
        returns[folder] += 1
        if returns[folder] > 3:
            configurator.fail(f"step {step}: went back to {folder} three times, and again the gradient is not finite or above skip_norm; lower --lr")
        now, bad = course.at(step, cfg.batch_size), longest
        old = restore(folder, record)
        saver.forget_after(folder)
        decide("back", f"{bad} steps skipped in a row by step {now.step}: back to {folder}, past samples {old.samples:,} to {now.samples - 1:,}",
               from_step=now.step, first_sample=old.samples, last_sample=now.samples - 1)
        if journal:
            journal.back_to(step)
        return Course(step, now.samples, old.passed + now.samples - old.samples)

    if world > 1 and cfg.layout() == "no" and to_do:
        with contextlib.closing(stream()) as batches:
            update.fix_bucket_order(objective.train(), next(batches), autocast)
    batches = stream()
    if step == 0:
        validate()
    objective.train()
    warm, flushed, stopping = False, step, False
    start, clock_tokens = transfer.timestamp(device), 0
    while step < steps:
        watch.at(step)
        lr = learning_rate(cfg, step, steps)
        step += 1
        for group in optimizer.param_groups:
            group["lr"] = lr
        if cfg.dropout:  # dropout masks, too, are a function of the step
            torch.manual_seed(hash((cfg.seed, step, rank)))
        lapping = world > 1 and step % cfg.log_every == 1 % cfg.log_every
        update.optimizer_step(objective, optimizer, batches, accumulation, recent[step - flushed - 1], cfg.clip, autocast, world, cfg.cuda_graphs,
                              cfg.skip_norm, laps if lapping else None)
        clock_tokens += tokens_per_step
        if not warm:  # what has been built by now stays: the garbage collector need not look at it again
            gc.collect()
            gc.freeze()
            if gpu:
                torch.cuda.reset_peak_memory_stats(device)
        elif need:  # the first step's backward pass had no moments beside it yet
            say(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB measured, {need.peak / 2**30:.2f} predicted")
            need = None
        warm = True

        if step == steps:  # nothing comes after these figures in which they could be seen
            send(flushed, step, None)
            receive(wait=True)
            flushed = step
        stopping, giving_up = distributed.any_rank(ranks, stop.is_set(), longest >= cfg.max_skips)
        if giving_up:
            if flushed < step:
                send(flushed, step, None)
            receive(wait=True)
            course = go_back()
            batches.close()
            batches, flushed = stream(), step
            laps.clear()
            start, clock_tokens = transfer.timestamp(device), 0
            continue
        logging, evaluating, saving = (step == steps or every and step % every == 0
                                       for every in (cfg.log_every, cfg.eval_every, cfg.save_every))
        saving = saving or stopping or step in kept_steps
        if logging or evaluating or saving:
            send(flushed, step, dict(start=start, lr=lr, tokens=clock_tokens) if logging else None)
            flushed = step
        if logging:
            start, clock_tokens = arriving[-1][2].moment, 0
        receive(wait=evaluating or saving)
        if logging and world > 1 and laps:
            compare_ranks()
        if evaluating:
            validate()
        if saving and (not streak or stopping or step == steps or step in kept_steps):  # amid skipped steps there is nothing good to keep
            save()
        if benchmarks and not stopping and (step == steps or cfg.eval_tasks_every and step % cfg.eval_tasks_every == 0):
            receive(wait=True)
            measure_tasks()
            evaluating = True
        if evaluating or saving:  # the next line's speed is of training alone
            start, clock_tokens = transfer.timestamp(device), 0
        hear_of_saving()
        if stopping:
            break
    watch.at(step)
    receive(wait=True)
    batches.close()
    saver.wait()
    hear_of_saving()
    if stopping and step < steps:
        log(step, event="stopped")
        say(f"stopped by a signal after step {step}; continue with --resume=auto")
    if not to_do:
        say(f"nothing to do: {folder} is at step {step} of {steps}")
    if rank == 0 and (run / f"step_{steps:08d}").is_dir():
        runs = [cfg.run_dir] + ([cfg.compare] if cfg.compare else [])
        draw_losses(runs, run / "loss.png")
        for line in filter(None, map(summary_line, runs)):
            say(line)
        say(f"loss curve: {run / 'loss.png'}    try: python sample.py --run_dir={run}")
    if tracker:
        tracker.finish()
    if saver.failure:
        configurator.fail(f"the last checkpoint could not be written; what was saved before is in {run}: make room and continue with --resume=auto")
    return distributed.STOPPED if step < steps else 0


if __name__ == "__main__":
    main()
