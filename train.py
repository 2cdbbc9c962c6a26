"""Train an autoregressive, masked-diffusion or uniform-diffusion language model.

    python train.py configurator/quickstart.py --lr=1e-3
    torchrun --nproc_per_node=2 train.py configurator/quickstart.py
"""

import terminal  # isort: skip  # first: Ctrl-C during the imports

import contextlib
import gc
import math
import os
import shlex
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import nn

import configurator
import data
import diffusion
import kernels
from configurator import neutral, setting
from corpus import chat
from evaluation import likelihood
from model import Transformer
from training import checkpoint, checks, dryrun, transfer, update, watchdog
from training.average import WeightAverage
from training.distributed import (
    STOPPED,
    all_gather,
    any_rank,
    full_tensor,
    on_all_ranks,
    shut_down,
    sync_gradients,
    wait_for_folder,
)
from training.guard import Guard
from training.log import StepLog, draw_losses, open_tracker, print_opening, say, summary_line, warn
from training.objective import Objective, RankClock, compile_and_wrap, fix_bucket_order
from training.record import MAX_LAYERS, MAX_SIZE
from training.state import RunState

# --------------------------------------------------------------------------------------------------- settings


@dataclass
class Config:
    """A run's settings. `neutral` ones do not change its result."""

    # where
    run_dir: str = neutral("runs/default", "folder of the run: settings, metrics, checkpoints, loss curve")
    corpus: str = setting(
        "corpora/docs", "folder that data.py prepared, or token files of nanoGPT, llm.c or Megatron; "
        "several: path:weight:unique_tokens, with commas between")
    tokenizer: str = setting(
        "", "of token files that do not say: a tiktoken encoding such as gpt2, or a tokenizer.json")
    eos: str = setting(
        "", "of such token files: the token that ends a document, where it is not the tokenizer.json's own")
    eos_opens: bool = setting(
        False, "of such token files: each document begins with that token instead (llm.c's of Llama 3)")
    val_share: float = setting(
        0.0, "share of such token files kept for validation, where none of them is", low=0, high=0.5)
    resume: Literal["no", "auto", "yes"] = neutral(
        "no", "continue from the newest checkpoint: auto if there is one, yes must have one")
    seed: int = setting(1337, "of the weights, the data order and the noise", low=0, high=2**62)
    init_from: str = setting(
        "", "begin with the weights and the shape of this run or checkpoint, or of what convert.py made of "
        "Megatron's or Hugging Face's")
    init_weights: Literal["auto", "ema", "raw"] = setting(
        "auto", "of init_from: its averaged weights, those of training, or the first that it has")

    # what is learned
    objective: Literal["masked", "uniform", "ar"] = setting(
        "masked", "masked diffusion, uniform diffusion, or autoregressive")
    diffusion_block: int = setting(
        0, "masked or uniform diffusion in blocks of this many tokens, from left to right, "
        "each given the clean ones before it (0: the whole row at once)", low=0)
    loss: Literal["elbo", "maskgit", "paper"] = setting(
        "elbo", "elbo: the bound; maskgit: unweighted, masked only; "
        "paper: Quokka's as inferred, uniform only")
    estimator: Literal["count", "ratio", "time"] = setting(
        "count", "of the masked bound: exactly k masks, realized ratio, or weight w(t)")
    schedule: str = setting("linear", "noise schedule: linear, cosine or poly<n>")
    time: Literal["uniform", "iid", "moving_gaussian"] = setting(
        "uniform", "how t is drawn: one lattice per step, independently, or around a moving mean")
    time_sigma: float = setting(0.2, "standard deviation of moving_gaussian", above=0)
    time_correction: bool = setting(False, "weigh moving_gaussian's rows by the inverse density of t")
    shift: Literal["auto", "no", "yes"] = setting(
        "auto", "masked diffusion: position i is predicted from i − 1, as in an AR model "
        "(auto: if init_from is one, or shifted)")
    anneal: int = setting(
        0, "steps over which causal attention is annealed to bidirectional: "
        "each future position becomes visible with a growing probability", low=0)
    ar_input_mask: float = setting(
        0.0, "of AR: share of the tokens it reads that are masked in training, each by chance: a regulariser "
        "that diffusion has built in", low=0, high=0.99)
    document_attention: bool = setting(False, "attention stays within a document")
    reset_positions: bool = setting(False, "positions start again in each document")
    short_rows: float = setting(
        0.0, "share of rows cut to a random length (the paper's recipe: 0.01)", low=0, high=1)

    # question-answer pairs: a corpus of data.py --sft, of which the answers are learned
    packing: bool = setting(True, "several pairs in a row, each seeing itself alone (False: one in a row)")
    long_pairs: Literal["cut", "skip"] = setting(
        "cut", "those longer than a row: cut, without a separator behind the answer, or left out")
    eos_padding: Literal["none", "block", "row"] = setting(
        "none", "separators behind an answer that are learned as part of it: the one that closes it; more, "
        "to the end of its block; or of its row: from those masked diffusion learns to stop")

    # the network
    model: str = setting(
        "", "a size of the Quokka ladder such as 124M or 1086M; replaces the six shape settings below")
    n_layer: int = setting(6, "blocks", low=1, high=MAX_LAYERS)
    n_head: int = setting(6, "attention heads", low=1, high=MAX_SIZE)
    n_kv_head: int = setting(0, "key and value heads (0: n_head)", low=0, high=MAX_SIZE)
    head_dim: int = setting(0, "width of a head, even (0: d_model / n_head)", low=0, high=MAX_SIZE)
    d_model: int = setting(384, "width of the residual stream", low=1, high=MAX_SIZE)
    d_ff: int = setting(0, "width of the SwiGLU (0: 8/3 of d_model, in 64s)", low=0, high=MAX_SIZE)
    seq_len: int = setting(256, "tokens per row", low=2, high=MAX_SIZE)
    tied: bool = setting(True, "the LM head is the embedding")
    rope_base: float = setting(10_000.0, "base of the rotary wavelengths", above=1)
    dropout: float = setting(0.0, "dropout rate", low=0, high=0.99)
    init_std: float = setting(0.02, "standard deviation of the initial weights", above=0, high=100)
    scaled_init: bool = setting(True, "divide that of residual outputs by √(2·n_layer)")
    local_init: bool = setting(
        False, "heads start out looking at neighbouring positions: small diffusion models learn sooner")

    # how long, on what
    steps: int = setting(
        0, "optimizer steps; give exactly one of steps, tokens and epochs", low=0, high=1 << 53)
    tokens: float = setting(0.0, "training tokens in all, repeats included", low=0, high=1e15)
    epochs: float = setting(0.0, "passes over the (unique) training tokens", low=0, high=1e9)
    unique_tokens: int = setting(0, "train on a fixed random subset of this many tokens (0: all)", low=0)
    batch_size: int = setting(64, "rows per optimizer step, over all ranks", low=1, high=1 << 31)
    micro_batch: int = neutral(0, "rows per rank and forward pass (0: no gradient accumulation)", low=0)

    # the optimizer
    optimizer: Literal["adamw", "muon"] = setting(
        "adamw", "adamw; or muon for the matrices in blocks and adamw for the rest, at the same lr")
    lr: float = setting(1e-3, "peak learning rate", above=0)
    min_lr: float = setting(-1.0, "final learning rate (-1: a tenth of lr)", low=-1)
    lr_schedule: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "cosine, warmup-stable-decay (exponential decay) or constant")
    warmup: int = setting(100, "steps of linear warm-up", low=0)
    decay: float = setting(
        1000.0, "of wsd: steps of decay at the end (below 1: their share of all steps, to the nearest step)",
        above=0)
    beta1: float = setting(0.9, "AdamW's β₁ (Muon's momentum is 0.95)", low=0, high=0.9999)
    beta2: float = setting(0.95, "AdamW's β₂", low=0, high=0.99999)
    weight_decay: float = setting(0.1, "of matrices and embeddings; norms never decay", low=0)
    ema: float = setting(
        0.0, "keep a moving average of the weights, which forgets 1 − ema of itself with every update: "
        "sample.py, eval.py and convert.py take it (0: off)", low=0, high=0.999999)
    clip: float = setting(1.0, "largest gradient norm (0: unlimited)", low=0)
    skip_norm: float = setting(
        0.0, "skip updates whose gradient norm is above this, as those whose norm is not finite "
        "(0: only these)", low=0)
    max_skips: int = setting(
        5, "skipped updates in a row after which the run goes back to its last good checkpoint, "
        "and past those data; looked at with each line of progress", low=1)

    # along the way
    log_every: int = neutral(10, "steps between lines of progress", low=1, high=10**6)
    eval_every: int = neutral(250, "steps between validations (0: only first and last)", low=0)
    eval_rows: int = setting(256, "rows of the validation split (0: all)", low=0)
    save_every: int = neutral(1000, "steps between checkpoints (0: only the last)", low=0)
    save_at: str = neutral(
        "", "further steps to save at, with commas; these checkpoints stay whatever keep says")
    keep: int = neutral(2, "newest checkpoints to keep", low=1)
    keep_every: int = neutral(0, "keep those of every multiple of this many steps, too (0: none)", low=0)
    compare: str = neutral("", "another run, to be shown beside this one at the end")
    wandb: str = neutral("", "Weights & Biases project (empty: off)")

    # the machine
    device: Literal["auto", "cpu", "cuda"] = neutral("auto", "auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of the matrix products; weights stay float32 (auto: bfloat16 where the hardware has it)")
    compile: Literal["whole", "blocks", "no"] = neutral(
        "whole", "torch.compile the model with its loss, or block by block: compiles sooner")
    recompute: Literal["no", "elementwise", "selective", "full"] = neutral(
        "no", "what is computed again to save memory: all but matrix products and attention; "
        "the SwiGLU's gate and up, too; whole blocks")
    fp8: bool = setting(
        False, "8-bit products in the blocks (Hopper and later; pays from d_model near 1500 on)")
    cuda_graphs: bool = neutral(
        False, "replay the step as a CUDA graph (small models, one GPU, compile=whole)")

    # several ranks
    shard: Literal["no", "full", "optim", "hybrid"] = neutral(
        "no", "what ranks divide: nothing (DDP); all state (FSDP); optimizer state and master weights; "
        "all, among shard_size ranks")
    shard_size: int = neutral(
        0, "of hybrid: ranks that share one copy of the state (0: those of a node)", low=0)
    timeout: float = neutral(
        600.0, "seconds without progress after which a rank is given up and the job ends; "
        "above the time to compile", above=0, high=1e6)
    dry_run: bool = neutral(
        False, "print what the run will need: memory, time, communication, disk; and stop. "
        "--device=cuda needs no GPU then")
    gpus: int = neutral(0, "of a dry run: ranks to plan for (0: as many as started)", low=0, high=10**6)
    gpus_per_node: int = neutral(8, "of a dry run: how many of them share a node", low=1)

    # a setting, or a value of it → what it needs; the rest is in training/checks.py
    NEEDS = {
        "diffusion_block": "objective=masked|uniform",
        "loss=maskgit": "objective=masked",
        "loss=paper": "objective=uniform",
        "estimator": "objective=masked, loss=elbo",
        "schedule": "objective=masked|uniform",
        "time": "objective=masked|uniform",
        "time_sigma": "objective=masked|uniform",
        "time_correction": "time=moving_gaussian, loss=elbo",
        "shift=yes": "objective=masked",
        "anneal": "objective=masked|uniform",
        "ar_input_mask": "objective=ar",
        "init_weights": "init_from",
        "eos": "tokenizer",
        "eos_opens": "tokenizer",
        "reset_positions": "document_attention",
        "eos_padding=block": "diffusion_block",
        "fp8": "dtype=auto|bfloat16",
        "cuda_graphs": "compile=whole",
        "shard_size": "shard=hybrid",
    }

    def problems(self):
        """Other settings that do not go together, one line each."""
        return checks.setting_problems(self)

    def world(self):
        """Ranks that train, or that a dry run is for."""
        return self.dry_run and self.gpus or int(os.environ.get("WORLD_SIZE", 1))

    def ranks_per_node(self):
        """Ranks on this node, or on one of a dry run."""
        if self.dry_run:
            return min(self.world(), self.gpus_per_node)
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.world()))

    def layout(self):
        """`shard`, where there are several ranks to share."""
        return self.shard if self.world() > 1 else "no"

    def kept_steps(self):
        """save_at as a set of steps; raises ValueError."""
        return checks.parse_steps(self.save_at)

    def shape(self):
        """The network's shape as keyword arguments; raises ValueError if there is none."""
        return checks.network_shape(self)


# ----------------------------------------------------------------------------------------------------- pieces


def learning_rate(cfg, step, steps):
    """The learning rate of step `step` (from 0) of `steps`."""
    lowest = cfg.lr / 10 if cfg.min_lr < 0 else cfg.min_lr
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / (cfg.warmup + 1)
    if cfg.lr_schedule == "cosine":
        done = (step - cfg.warmup) / max(1, steps - cfg.warmup)
        return lowest + 0.5 * (cfg.lr - lowest) * (1 + math.cos(math.pi * done))
    decay = update.decay_steps(cfg.decay, steps, cfg.warmup)
    if cfg.lr_schedule == "wsd" and step >= steps - decay:
        done = (step - (steps - decay) + 1) / decay
        return cfg.lr * (lowest / cfg.lr) ** done
    return cfg.lr


def batches(run, first_step, first_sample):
    """Every micro-batch of this rank from `first_step` on, as arrays: a pure function of its arguments."""
    cfg, rank, world = run.cfg, run.ranks.rank, run.ranks.world
    parts = cfg.batch_size // run.micro_batch
    ahead = 64  # steps whose sequences are looked up at once: it costs numpy calls, not arithmetic
    for step in range(first_step, run.steps):
        sample = first_sample + (step - first_step) * cfg.batch_size + np.arange(cfg.batch_size)
        if (step - first_step) % ahead == 0:
            ids = run.sequences.ids(sample[0] + np.arange(ahead * cfg.batch_size)).reshape(ahead, -1)

        # one lattice of noise levels over all rows of the step, whichever rank or micro-batch they are in
        step_ids = ids[(step - first_step) % ahead]
        eligible = data.eligible_positions(cfg, run.sequences, step_ids, sample)
        counts = data.count_by_block(run.process, eligible)
        levels = diffusion.noise_levels(run.process, sample[0], cfg.batch_size, step / run.steps, counts)
        visible = None
        if step < cfg.anneal:
            visible = diffusion.annealed_mask(cfg.seed, step, cfg.seq_len, (step + 1) / cfg.anneal)

        for part in range(rank, parts, world):
            rows = levels.microbatch_rows(part, parts)
            inside = None if eligible is None else eligible[rows]
            try:
                batch = data.read_batch(
                    cfg, run.eos_id, run.process, run.sequences, step_ids[rows], levels, rows, inside)
            except ValueError as problem:  # foreign tokens, in a corpus too large to check before
                configurator.fail(f"step {step + 1}: {problem}", everywhere=True)
            yield batch._replace(visible=visible)


def training_step(run, objective, optimizer, feed, clock):
    """One optimizer step on this rank's next micro-batches → its figures, named device scalars.

    The weights in a batch hold the mean over the global batch, so parts of the loss add up, over
    micro-batches and over ranks. The host never waits for the device.
    """
    cfg, figures = run.cfg, {}
    for part in range(run.accumulation):
        if cfg.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with clock.data():
            batch = next(feed)
        with sync_gradients(objective, last=part == run.accumulation - 1):
            with run.autocast(), clock.forward_pass(objective):
                part_figures = objective(batch)
            (part_figures["loss"] * run.ranks.world).backward()  # DDP and FSDP divide by world
        for name, value in part_figures.items():
            figures[name] = figures.get(name, 0) + value.detach()

    parameters = update.parameters(optimizer)
    norm = full_tensor(nn.utils.get_total_norm([p.grad for p in parameters]))
    nn.utils.clip_grads_with_norm_(parameters, cfg.clip or float("inf"), norm)
    # A bad gradient changes nothing: AdamW's kernel and Muon read this flag (GradScaler's) and leave weights,
    # moments and its count of updates alone. The host learns of it when the norm arrives (StepLog.judge,
    # Guard.count).
    optimizer.found_inf = update.is_bad(norm, cfg.skip_norm).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=not cfg.cuda_graphs)
    return figures | {"grad_norm": norm}


def validate(run, objective, alive, average=None):
    """The bound (AR: the exact NLL) on the validation split → arguments of StepLog.validation.

    `objective` is not compiled: validation is rare, and would be a graph of its own. Of the averaged weights,
    too, where there is a WeightAverage. `alive` is called after every batch. Validation noise is the same for
    all runs and steps.
    """
    cfg = run.cfg
    process = likelihood.validation_process(run.process, cfg.schedule)
    read = partial(data.read_batch, cfg, run.eos_id)

    scorer = likelihood.RowScorer(
        objective, run.val_sequences, read, run.micro_batch, run.ranks, run.device, run.autocast)

    def measure(process):
        return likelihood.evaluate(scorer, process, run.eval_rows, on_progress=alive)

    measured = measure(process)
    error, _ = likelihood.standard_error(measured, exact=not process.has_noise)
    figures = {}
    if cfg.loss == "paper":
        noisy, clean = measure(process._replace(loss="paper", time="uniform")).parts
        figures = dict(val_paper=noisy + clean, val_noisy=2 * noisy, val_clean=2 * clean)
    if average:
        with average.in_use():
            figures["val_ema"] = sum(measure(process).parts)
    return measured, error, figures


# ----------------------------------------------------------------------------------------------------- a run


def main():
    cfg = configurator.load(Config, about=__doc__)
    if not cfg.dry_run:  # whose report is there to be read
        terminal.keep_going()
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as contexts:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
            contexts.enter_context(kernels.prefer_cudnn_attention(device))
        watch = contexts.enter_context(watchdog.started(device, cfg.timeout, single=cfg.dry_run))
        code = train(cfg, device, watch)
        watch.close()
        if watch.ranks.world > 1:
            shut_down(watch.ranks, code)  # all together, and without torch's destructors
    if code:
        raise SystemExit(code)


def train(cfg, device, watch):
    """One run, from settings to loss curve, as seen by one rank; returns its exit code."""
    ranks = watch.ranks
    run = checks.open_run(cfg, ranks, device)  # all that can be wrong, before anything is written
    if cfg.fp8 and not run.on_gpu:
        warn(ranks, "fp8 is emulated on a CPU, slower than bfloat16; a GPU of compute capability 8.9 has it")
    if cfg.dry_run:
        print(on_all_ranks(ranks, dryrun.report, run))
        return 0
    watch.alive()
    predicted = on_all_ranks(ranks, dryrun.check_memory, run)

    # the folder, and the checkpoint in it from which the run goes on
    watch.alive()
    on_all_ranks(ranks, checks.lock_run_folder, run)
    resumed = on_all_ranks(ranks, checks.find_checkpoint, run)
    if resumed:
        run = checks.keep_data_order(run, resumed[1])
    tracker = on_all_ranks(ranks, open_tracker, run)

    # network and optimizer; their values: of a checkpoint of this run, of another's, or random
    clock = RankClock(device)
    objective, compiled, optimizer = build(run, clock)
    network, state = objective.network, RunState()
    average = WeightAverage(objective, cfg.ema) if cfg.ema else None
    guard = Guard(run, state, network, optimizer, average)
    if resumed:
        guard.restore(*resumed)
    else:
        init_weights(run, network, average)
    to_do = state.step < run.steps

    # what is written: settings, metrics, checkpoints
    watch.at_step(state.step)
    check_shared_folder(run)
    if to_do:
        on_all_ranks(ranks, prepare_run_folder, run, tracker, resumed)
    log = on_all_ranks(ranks, StepLog, run, state, guard, network, tracker)
    if to_do and log.journal:
        log.journal.back_to(state.step if resumed else -1)
    saver = checkpoint.Saver(
        run.folder, network, optimizer, ranks, cfg.keep, cfg.keep_every, run.kept_steps, watch.alive, average)
    print_opening(run, network, resumed, to_do)

    # training
    if ranks.world > 1 and cfg.layout() == "no" and to_do:
        with contextlib.closing(open_feed(run, state)) as feed:
            fix_bucket_order(compiled.train(), next(feed), run.autocast)
    feed, stopping, steps_here = open_feed(run, state), False, 0
    if state.step == 0:
        log.validation(*validate(run, objective, watch.alive, average))
    compiled.train()
    log.restart_clock()
    while state.step < run.steps:
        watch.at_step(state.step)
        lr = learning_rate(cfg, state.step, run.steps)
        update.set_learning_rate(optimizer, lr)
        if cfg.dropout:  # dropout masks, too, are a function of the step
            torch.manual_seed(hash((cfg.seed, state.step + 1, ranks.rank)))
        first_of_a_line = state.step % cfg.log_every == 0
        clock.running = ranks.world > 1 and first_of_a_line
        figures = training_step(run, compiled, optimizer, feed, clock)
        if average:
            average.add(optimizer)
        state.advance(cfg.batch_size)
        log.add(figures)
        steps_here += 1
        if steps_here == 1:
            after_first_step(device, log)
        elif steps_here == 2 and predicted:  # the first backward pass had no moments beside it yet
            measured = torch.cuda.max_memory_allocated(device) / 2**30
            say(ranks, f"peak memory {measured:.2f} GiB measured, {predicted / 2**30:.2f} predicted")
        if state.step == run.steps:
            log.flush()  # the last gradients must be judged now: no later step could still go back

        # too many skipped updates: back to the last good checkpoint, and on with other data
        stopping, going_back = any_rank(ranks, watch.stop.is_set(), guard.must_go_back())
        if going_back:
            log.flush()
            guard.go_back(saver, log)
            feed.close()
            feed = open_feed(run, state)
            clock.reset()
            log.restart_clock()
            continue

        # figures that have arrived (the guard counts bad gradients), validation, checkpoint
        every = cfg.log_every, cfg.eval_every, cfg.save_every
        logging, validating, saving = (run.is_due(steps, state.step) for steps in every)
        saving = saving or stopping or state.step in run.kept_steps
        if logging or validating or saving:
            log.queue(lr if logging else None)
        log.poll(wait=validating or saving)
        if logging and clock.spans:
            log.compare_ranks(clock)
        if validating:
            log.validation(*validate(run, objective, watch.alive, average))
        # amid skipped updates only what can't wait is saved: a kept step can if the run goes back before it
        can_wait = state.step not in run.kept_steps or guard.must_go_back()
        can_wait = can_wait and not stopping and state.step < run.steps
        if saving and can_wait and (state.bad_in_a_row or guard.must_go_back()):
            warn(ranks, f"step {state.step}: no checkpoint amid skipped updates")
        elif saving:
            saver.save(state.step, checkpoint_record(run, state))
        if validating or saving:
            log.restart_clock()
        log.report_failed_save(saver)
        if stopping:
            break

    feed.close()
    return finish(run, state, log, saver, watch, stopping, to_do)


def build(run, clock):
    """The Objective of a run's network, the same compiled and wrapped for all ranks, and the optimizer.

    The weights have memory, but no values yet.
    """
    cfg = run.cfg
    with torch.device("meta"):
        network = Transformer(run.model_config).use(cfg.recompute, cfg.fp8)
    if cfg.layout() == "no":
        network.to_empty(device=run.device).init_tables()
    objective = Objective(network, posterior=cfg.loss == "paper")
    compiled = compile_and_wrap(objective, cfg.compile, run.ranks, cfg.layout(), cfg.shard_size, run.dtype,
                                run.device, cfg.cuda_graphs, clock)
    betas = cfg.beta1, cfg.beta2
    fuse = run.on_gpu and cfg.compile != "no"
    optimizer = update.make_optimizer(
        network, cfg.lr, betas, cfg.weight_decay, cfg.optimizer, run.dtype, fuse)
    return objective, compiled, optimizer


def init_weights(run, network, average):
    """Give a network its first weights: random ones, or those of the checkpoint that init_from names."""
    network.init_weights(torch.Generator().manual_seed(run.cfg.seed))
    if run.init_checkpoint:
        on_all_ranks(run.ranks, checkpoint.init_weights_from, *run.init_checkpoint, network)
    if average:
        average.start()


def open_feed(run, state):
    """This rank's batches on the device, from where the run stands."""
    return transfer.feed(batches(run, state.step, state.next_sample), run.device)


def finish(run, state, log, saver, watch, stopping, to_do):
    """Log and write all that is still on its way, and print what came out; returns the exit code."""
    watch.at_step(state.step)
    log.poll(wait=True)
    saver.wait()
    log.report_failed_save(saver)
    if stopping and state.step < run.steps:
        log.write(state.step, event="stopped")
        say(run.ranks, f"stopped by a signal after step {state.step}; continue with --resume=auto")
    reached, final = (checkpoint.step_folder(run.folder, step) for step in (state.step, run.steps))
    if not to_do:
        say(run.ranks, f"nothing to do: {reached} is at step {state.step} of {run.steps}")
    if run.ranks.rank == 0 and final.is_dir():
        print_results(run)
    if log.journal and log.journal.tracker:
        log.journal.tracker.finish()
    if saver.failure:
        configurator.fail("the last checkpoint could not be written; what was saved before is in "
                          f"{run.folder}: make room and continue with --resume=auto")
    return STOPPED if state.step < run.steps else 0


def after_first_step(device, log):
    """Begin to measure speed and memory, without what the first step took to compile."""
    gc.collect()
    gc.freeze()  # what has been built by now stays: the garbage collector need not look at it again
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    log.restart_clock()


def checkpoint_record(run, state):
    """What a checkpoint keeps beside weights and the optimizer's state."""
    return dict(settings=asdict(run.cfg), model=asdict(run.model_config), corpus=run.corpus_record,
                exact_up_to=run.sequences.exact_up_to, steps=run.steps, **state.record())


def check_shared_folder(run):
    """End the job if a rank does not see the folder that rank 0 has made."""
    seen = all_gather(run.ranks, wait_for_folder(run.folder))
    if not all(seen):
        configurator.fail(f"rank {seen.index(False)} does not see {run.folder}, which rank 0 has made: "
                          "--run_dir must be on a file system that all nodes share")


def prepare_run_folder(run, tracker, resumed):
    """Write what the run's folder holds beside metrics and checkpoints, on rank 0."""
    if run.ranks.rank:
        return
    checkpoint.remove_leftovers(run.folder)
    if resumed:
        checkpoint.set_aside_after(resumed[0])
    (run.folder / "settings.json").write_text(configurator.dump(run.cfg) + "\n", encoding="utf-8")
    corpus = run.corpora[0]
    if corpus.tokenizer_file:  # sampling needs it
        shutil.copyfile(corpus.tokenizer_file, run.folder / "tokenizer.json")
    if corpus.train_pairs is not None:  # and so does a chat
        chat.copy_template(corpus.folder, run.folder)
    elif run.init_checkpoint:
        chat.copy_template(checkpoint.run_of(run.init_checkpoint[0]), run.folder)
    if tracker:
        (run.folder / "wandb_id.txt").write_text(tracker.id, encoding="utf-8")


def print_results(run):
    """Draw the loss curves, and print how good this run is, and the one that it is compared with."""
    run_dirs = [run.cfg.run_dir] + ([run.cfg.compare] if run.cfg.compare else [])
    picture = run.folder / "loss.png"
    with terminal.optional(f"{picture} can't be drawn"):
        draw_losses(run_dirs, picture)
    for line in filter(None, map(summary_line, run_dirs)):
        print(line)
    command = f"python sample.py --run_dir={shlex.quote(str(run.folder))}"
    if run.sequences.has_pairs:
        command += " --chat"
    print(f"loss curve: {picture}    try: {command}")


if __name__ == "__main__":
    terminal.run(main)
