"""Train an autoregressive, masked-diffusion or uniform-diffusion language model.

    python train.py configurator/quickstart.py --lr=1e-3
    torchrun --nproc_per_node=2 train.py configurator/quickstart.py
"""

import contextlib
import gc
import json
import math
import os
import shutil
import signal
import sys
import threading
from collections import deque
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
import engine
import kernels
import memory
from configurator import setting
from model import ModelConfig, Transformer, checkpoints, file_digest, ladder, load_newest, record_digest, swiglu_width

VALIDATION_SEED = 2**63  # beyond every training seed: all runs are validated with the same noise


@dataclass
class Config:
    # where
    run_dir: str = setting("runs/default", "folder of the run: settings, metrics, checkpoints, loss curve")
    corpus: str = setting("corpora/docs", "folder that data.py prepared, or token files of nanoGPT, llm.c or Megatron; several: path:weight:unique_tokens, with commas between")
    tokenizer: str = setting("", "of token files that do not say: a tiktoken encoding such as gpt2, or a tokenizer.json")
    val_share: float = setting(0.0, "share of such token files kept for validation, where none of them is", low=0, high=0.5)
    resume: Literal["no", "auto", "yes"] = setting("no", "continue from the newest checkpoint: auto if there is one, yes must have one")
    seed: int = setting(1337, "of the weights, the data order and the noise", low=0, high=2**62)
    # what is learned
    objective: Literal["masked", "uniform", "ar"] = setting("masked", "masked diffusion, uniform diffusion, or autoregressive")
    loss: Literal["elbo", "maskgit", "paper"] = setting("elbo", "elbo: the bound; maskgit: unweighted, masked only; paper: Quokka's, uniform only")
    estimator: Literal["count", "ratio", "time"] = setting("count", "of the masked bound: exactly k masks, realized ratio, or weight w(t)")
    schedule: str = setting("linear", "noise schedule: linear, cosine or poly<n>")
    time: Literal["uniform", "iid", "moving_gaussian"] = setting("uniform", "how t is drawn: one lattice per step, independently, or around a moving mean")
    time_sigma: float = setting(0.2, "standard deviation of moving_gaussian", above=0)
    time_correction: bool = setting(False, "weigh moving_gaussian's rows by the inverse density of t")
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
    block_len: int = setting(256, "tokens per row", low=2)
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
    micro_batch: int = setting(0, "rows per rank and forward pass (0: no gradient accumulation)", low=0)
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
    log_every: int = setting(10, "steps between lines of progress", low=1)
    eval_every: int = setting(250, "steps between validations (0: only first and last)", low=0)
    eval_rows: int = setting(256, "validation blocks (0: all)", low=0)
    save_every: int = setting(1000, "steps between checkpoints (0: only the last)", low=0)
    save_at: str = setting("", "further steps to save at, with commas; these checkpoints stay whatever keep says")
    keep: int = setting(2, "newest checkpoints to keep", low=1)
    compare: str = setting("", "another run, to be shown beside this one at the end")
    wandb: str = setting("", "Weights & Biases project (empty: off)")
    # the machine
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = setting("auto", "of the matrix products; weights stay float32 (auto: bfloat16 where the hardware has it)")
    compile: Literal["whole", "blocks", "no"] = setting("whole", "torch.compile the model with its loss, or block by block: compiles sooner")
    recompute: Literal["no", "elementwise", "selective", "full"] = setting("no", "what is computed again to save memory: all but matrix products and attention; the SwiGLU's gate and up, too; whole blocks")
    fp8: bool = setting(False, "8-bit products in the blocks (Hopper and later; pays from d_model near 1500 on)")
    cuda_graphs: bool = setting(False, "replay the step as a CUDA graph (small models, one GPU, compile=whole)")
    estimate: bool = setting(False, "print the predicted peak memory and FLOPs of a step, and stop; --device=cuda needs no GPU then")

    def problems(self):
        """Settings that do not go together, one line each."""
        world, wrong = int(os.environ.get("WORLD_SIZE", 1)), []
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
        if self.time_correction and (self.time != "moving_gaussian" or self.loss != "elbo"):
            say("time_correction needs time=moving_gaussian and loss=elbo")
        if self.reset_positions and not self.document_attention:
            say("reset_positions needs document_attention")
        try:
            given = data.parse_corpora(self.corpus)
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
        if self.model:
            for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff"):
                if getattr(self, name) != getattr(defaults, name):
                    say(f"{name}={getattr(self, name)} contradicts model={self.model}; give one of the two")
        if self.min_lr > self.lr or -1 < self.min_lr < 0:
            say(f"min_lr={self.min_lr} must be -1 or lie between 0 and lr={self.lr}")
        try:
            self.kept_steps()
        except ValueError as problem:
            say(str(problem))
        if self.lr_schedule == "wsd" and self.min_lr == 0:
            say("lr_schedule=wsd decays exponentially and never reaches min_lr=0; give a positive one")
        if self.fp8 and (self.micro_batch or self.batch_size // world) * self.block_len % 16:
            say("fp8 needs micro-batches of a multiple of 16 tokens")
        if self.fp8 and self.dtype == "float32":
            say("fp8 goes with dtype=bfloat16 or auto")
        if self.fp8 and self.device != "cpu" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            say("fp8 needs a GPU of compute capability 8.9 or later")
        gpu = self.device != "cpu" and torch.cuda.is_available() or self.device == "cuda" and self.estimate
        if self.cuda_graphs and (self.compile != "whole" or world > 1 or not gpu):
            say("cuda_graphs needs compile=whole and one process on a GPU")
        if world > 1 and self.compile == "whole" and self.recompute in ("elementwise", "selective") and torch.__version__ < "2.13":
            say(f"recompute={self.recompute} with compile=whole on several ranks needs torch 2.13 (before, DDP's compiler computes all again); use compile=blocks")
        if self.device == "cuda" and not torch.cuda.is_available() and not self.estimate:
            say("device=cuda, but this machine has no usable GPU; use --device=cpu")
        if self.device != "cpu" and 0 < torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            say(f"{os.environ['LOCAL_WORLD_SIZE']} ranks on this machine, but {torch.cuda.device_count()} GPUs; start one rank per GPU")
        return wrong

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


# ----------------------------------------------------------------------------------------- the user's files


class Inputs(NamedTuple):
    """What a run reads before it writes anything."""

    corpora: list[data.Corpus]
    blocks: data.Blocks | data.Mixture
    val_blocks: data.Blocks | data.Mixture
    model_config: ModelConfig
    corpus_record: dict  # what a checkpoint keeps of the corpus
    steps: int
    eval_rows: int
    bytes_per_token: float  # of exactly the validation tokens that are scored
    folder: Path | None  # the checkpoint to continue from
    record: dict | None


def open_inputs(cfg, warn):
    """Check everything that can be wrong with the user's files; raises ValueError or OSError, writes nothing."""
    run = Path(cfg.run_dir)
    given = data.parse_corpora(cfg.corpus)
    corpora = [data.load_corpus(path, cfg.tokenizer, cfg.val_share) for path, *_ in given]
    meta = corpora[0].meta
    vocabulary = ("tokenizer", "n_vocab", "mask_id", "eos_id")
    for corpus in corpora[1:]:
        if differ := [f"{k} {meta[k]} and {corpus.meta[k]}" for k in vocabulary if corpus.meta[k] != meta[k]]:
            raise ValueError(f"{corpora[0].folder} and {corpus.folder} don't go together: {', '.join(differ)}")
    of = [f" ({corpus.folder})" if len(corpora) > 1 else "" for corpus in corpora]
    blocks = [data.Blocks(corpus.train, cfg.block_len, cfg.seed + i, unique or cfg.unique_tokens, meta["n_vocab"], f"training{of[i]}")
              for i, (corpus, (_, _, unique)) in enumerate(zip(corpora, given))]
    val_blocks = [data.Blocks(corpus.val, cfg.block_len, n_vocab=meta["n_vocab"], what=f"validation{of[i]}") for i, corpus in enumerate(corpora)]
    if len(corpora) == 1:
        (blocks,), (val_blocks,) = blocks, val_blocks
    else:
        blocks, val_blocks = data.Mixture(blocks, [w for _, w, _ in given] if given[0][1] else None, cfg.seed), data.Mixture(val_blocks)
    budget = cfg.tokens or cfg.epochs * blocks.n * cfg.block_len
    steps = cfg.steps or math.ceil(budget / (cfg.batch_size * cfg.block_len))
    if cfg.lr_schedule == "wsd" and cfg.decay >= 1 and cfg.warmup + cfg.decay > steps:
        raise ValueError(f"warmup={cfg.warmup} and decay={cfg.decay:g} don't fit into {steps} steps")
    model_config = ModelConfig(
        **cfg.shape(), n_vocab=meta["n_vocab"], mask_id=meta["mask_id"], block_len=cfg.block_len,
        causal=cfg.objective == "ar", tied=cfg.tied, timed=cfg.objective == "uniform", dropout=cfg.dropout,
        rope_base=cfg.rope_base, init_std=cfg.init_std, scaled_init=cfg.scaled_init, local_init=cfg.local_init)
    corpus_record = {k: meta[k] for k in vocabulary}
    eval_rows = min(cfg.eval_rows or val_blocks.available, val_blocks.available)
    bytes_per_token = float(corpora[0].token_bytes[val_blocks.read(spread(eval_rows, val_blocks.available))[:, 1:]].mean())
    corpus_record |= {f"{split}_sha256": " ".join(corpus.meta[split]["sha256"] for corpus in corpora) for split in ("train", "val")}
    folder = record = None
    if run.exists() and any(run.iterdir()) and cfg.resume == "no" and not cfg.estimate:
        raise FileExistsError(f"{run} is not empty; continue it with --resume=auto or choose another --run_dir")
    if cfg.resume == "yes" or (cfg.resume == "auto" and checkpoints(run)):
        folder, record = load_newest(run, warn)
        check_resumable(record, model_config, corpus_record)
        restarted = [k for k in ("seed", "unique_tokens") if record["settings"][k] != getattr(cfg, k)]
        if [rest for _, *rest in data.parse_corpora(record["settings"]["corpus"])] != [rest for _, *rest in given]:
            restarted.append("mixture")
        if restarted:
            warn(f"resumed with another {' and '.join(restarted)}: the data order changes here, epochs are no longer exact")
    if cfg.compare and not Path(cfg.compare).is_dir():
        raise FileNotFoundError(f"compare={cfg.compare}: no such run")
    return Inputs(corpora, blocks, val_blocks, model_config, corpus_record, steps, eval_rows, bytes_per_token, folder, record)


def open_tracker(cfg, run):
    """A Weights & Biases run, continued under the id that the run folder keeps; raises ValueError."""
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs the wandb package: pip install wandb") from None
    known = run / "wandb_id.txt"
    try:
        return wandb.init(project=cfg.wandb, name=run.name, config=asdict(cfg), resume="allow",
                          id=known.read_text() if known.is_file() else None)
    except wandb.Error as problem:
        reason = str(problem).partition("\n")[0] or type(problem).__name__
        raise ValueError(f"wandb: {reason}; log in with 'wandb login' or set WANDB_MODE=offline") from None


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


def read_batch(cfg, process, blocks, eos_id, ids, rows, which, valid=None, spacing=None):
    """The blocks `ids` as a batch of the step's rows `which`: diffusion.make_batch with what cfg says of documents."""
    x = blocks.read(ids)
    if not cfg.document_attention:
        return diffusion.make_batch(process, x, rows, which, valid, spacing)
    documents = blocks.documents(ids, x, eos_id, process.objective == "ar")
    batch = diffusion.make_batch(process, x, rows, which, valid, spacing, documents)
    return batch._replace(positions=data.positions_within(documents)) if cfg.reset_positions else batch


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
        rows = diffusion.step_rows(process, first, cfg.batch_size, step / steps)
        for part in range(rank, parts, world):
            which = rows.deal(part, parts)
            try:
                batch = read_batch(cfg, process, blocks, eos_id, ids[place + which], rows, which)
            except ValueError as problem:  # tokens outside the vocabulary, in a corpus too large to check at the start
                configurator.fail(f"step {step + 1}: {problem}", everywhere=True)
            yield engine.to_tensors(batch, pin)


def noisy_share(process):
    """The expected share of positions that a masked process masks, halfway through training; 1 for the others: all get a head."""
    if process.objective != "masked":
        return 1.0
    return float(diffusion.step_rows(process, 0, 4096, 0.5).count.mean()) / process.block_len


def predicted(cfg, process, model_config, world, dtype, on_gpu):
    """What one rank will need at its peak, as memory.Need."""
    micro = cfg.micro_batch or cfg.batch_size // world
    rows = diffusion.step_rows(process, 0, cfg.batch_size)
    parts = cfg.batch_size // micro
    documents = np.zeros((micro, cfg.block_len), np.int32) if cfg.document_attention else None
    batch = diffusion.make_batch(process, np.zeros((micro, cfg.block_len + 1), np.int32), rows, rows.deal(0, parts), documents=documents)
    batch = batch._replace(positions=documents if cfg.reset_positions else None)
    return memory.predict(model_config, batch, cfg.loss == "paper", dtype, on_gpu, cfg.compile, cfg.recompute, cfg.fp8,
                          lasting_gradients=parts > world or world > 1 or cfg.cuda_graphs)


def show_estimate(cfg, need, model_config, process, world, dtype, on_gpu):
    """Print what a step needs in memory and arithmetic."""
    with torch.device("meta"):
        network = Transformer(model_config)
    share, tokens = noisy_share(process), cfg.batch_size * cfg.block_len
    flops = network.flops_per_token(share)
    unit, size = (2**30, "GiB") if need.peak > 2**30 else (2**20, "MiB")
    print(f"{network.n_params():,} parameters; one of {world} rank{'s' * (world > 1)}, micro-batches of {cfg.micro_batch or cfg.batch_size // world} × "
          f"{cfg.block_len} tokens, {str(dtype)[6:]}, compile={cfg.compile}, recompute={cfg.recompute}, {'as on a GPU' if on_gpu else 'on a CPU'}:")
    print("peak memory " + f"{need.peak / unit:.2f} {size}: " + ", ".join(f"{what} {getattr(need, what) / unit:.2f}" for what in need._fields[:-1]))
    print(f"a step of {tokens:,} tokens takes {flops * tokens:.3g} FLOP, forward and backward ({flops / 1e6:.1f} MFLOP per token; "
          f"{share:.1%} of the positions get a head); recomputation not counted")
    if on_gpu:
        print(f"at 50 % of an H100's bf16 peak that is {world * engine.PEAK['H100'] / 2 / flops:,.0f} tokens/s on {world} GPU{'s' * (world > 1)}")


def spread(n_rows, available):
    """n_rows evenly spaced blocks of `available`, shuffled: a row's place sets its noise level, its document must not."""
    return data.permute(np.arange(n_rows), n_rows, VALIDATION_SEED, np.zeros(n_rows, np.int64)) * available // n_rows


@torch.no_grad()
def evaluate(objective, process, blocks, n_rows, micro, rank, world, device, autocast, read):
    """The parts of the loss on n_rows evenly spread validation blocks, summed over ranks: (P,) in nats per token; `read` is `read_batch`.

    The noise is a function of the row alone and one lattice spans all rows, so the figure does not
    depend on batch size, ranks or training.
    """
    parts = -(-n_rows // (micro * world)) * world
    rows, ids = diffusion.step_rows(process, 0, n_rows), spread(n_rows, blocks.available)
    total = 0.0
    objective.eval()
    for part in range(rank, parts, world):
        which = rows.deal(part, parts)
        valid = np.arange(micro) < len(which)
        which = np.concatenate((which, np.full(micro - len(which), n_rows - 1)))
        batch = read(process, blocks, ids[which], rows, which, valid, parts / n_rows)
        with autocast():
            total = total + objective(engine.to_device(engine.to_tensors(batch, False), device))[1].double()
    objective.train()
    if world > 1:
        dist.all_reduce(total)
    return total.tolist()


# ------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(run, step, network, optimizer, record, keep, kept_steps=()):
    """Write run/step_<step>/ so that it exists only when complete, then drop all but the newest `keep` and those of `kept_steps`.

    A checkpoint of a later step is a damaged one that the run fell back from: it goes too.
    """
    from safetensors.torch import save_file

    final, building = run / f"step_{step:08d}", run / f".step_{step:08d}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, building / "model.safetensors")
    save_file({f"{name}.{key}": value.contiguous() for name, p in network.named_parameters()
               for key, value in optimizer.state[p].items()}, building / "optimizer.safetensors")
    files = ("model.safetensors", "optimizer.safetensors")
    record = dict(record, step=step, sha256={name: file_digest(building / name) for name in files})
    (building / "checkpoint.json").write_text(json.dumps(dict(record, record_sha256=record_digest(record)), indent=2) + "\n")
    for path in (*building.iterdir(), building):
        flush_to_disk(path)
    if final.exists():  # an earlier, damaged one of the same step
        shutil.rmtree(final)
    building.rename(final)
    flush_to_disk(run)
    written = checkpoints(run)
    place = written.index(final)
    for old in written[:place] + [p for p in written[place:] if int(p.name[5:]) not in kept_steps][keep:]:
        shutil.rmtree(old)


def flush_to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(folder, network, optimizer):
    """Read weights and optimizer state into `network` and `optimizer`."""
    from safetensors.torch import load_file

    network.load_state_dict(load_file(folder / "model.safetensors"))
    parameters = dict(network.named_parameters())
    for name, value in load_file(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition(".")
        p = parameters[parameter]
        optimizer.state[p][key] = value.to(p.device)


def check_resumable(record, model_config, corpus_record):
    """Raises ValueError, naming each difference, if a checkpoint is of another architecture or corpus."""
    initial = ("dropout", "init_std", "scaled_init", "local_init")  # of no consequence to the weights' shapes
    for what, old, new in (("architecture", record["model"], asdict(model_config)), ("corpus", record["corpus"], corpus_record)):
        differ = [f"{k} {old.get(k)} → {new.get(k)}" for k in new if old.get(k) != new.get(k) and k not in initial]
        if differ:
            raise ValueError(f"cannot resume with another {what}: {', '.join(differ)}; use another --run_dir")


def trim_metrics(path, step):
    """Drop what an interrupted run logged after its last checkpoint: those steps are about to be repeated."""
    if path.is_file():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(m) + "\n" for m in read_metrics(path.parent) if m["step"] <= step))
        temporary.replace(path)


# ------------------------------------------------------------------------------------------------------ plots


def read_metrics(run):
    """The records of a run's metrics.jsonl; a last line that a crash cut is left out."""
    path, records = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def draw(runs, path):
    """The loss curves of one or two runs as a PNG: training loss faint, validation marked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for color, run in zip(("tab:blue", "tab:orange"), runs):
        metrics = read_metrics(run)
        train = [(m["tokens"], m["loss"]) for m in metrics if "loss" in m]
        val = [(m["tokens"], m["val_loss"]) for m in metrics if "val_loss" in m]
        if train:
            axes.plot(*zip(*train), color=color, alpha=0.35, lw=1, label=f"{Path(run).name}, training")
        if val:
            axes.plot(*zip(*val), color=color, marker="o", ms=3, label=f"{Path(run).name}, validation")
    axes.set(xlabel="training tokens", ylabel="nats per token", title="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summary(run):
    """One line on a finished run's last validation, or None."""
    last = [m for m in read_metrics(run) if "val_loss" in m]
    if not last:
        return None
    m, kind = last[-1], "exact NLL" if last[-1]["objective"] == "ar" else "NELBO, an upper bound"
    return f"{Path(run).name:>20}: {m['val_bpb']:.3f} bits/byte, {m['val_loss']:.4f} nats/token ({m['objective']}, {kind}; {m['tokens']:,} tokens)"


# ------------------------------------------------------------------------------------------------------- main


def main():
    cfg = configurator.load(Config, about=__doc__)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device("cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        attention_order = contextlib.ExitStack()  # entered for as long as this variable lives
        attention_order.enter_context(kernels.preferring_cudnn(device))
    say = print if rank == 0 else lambda *_, **__: None
    run = Path(cfg.run_dir)

    stop = threading.Event()

    def request_stop(signum, _):
        stop.set()
        signal.signal(signum, signal.SIG_DFL)  # a second one ends the process at once

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, request_stop)

    try:
        corpora, blocks, val_blocks, model_config, corpus_record, steps, eval_rows, bytes_per_token, folder, record = open_inputs(
            cfg, lambda warning: say(f"warning: {warning}", file=sys.stderr))
        tracker = None
        if cfg.wandb and rank == 0:
            tracker = open_tracker(cfg, run)
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))

    # CPU tensors travel by gloo even where gradients go by NCCL: agreeing to stop then needs no GPU sync.
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    tokens_per_step, kept_steps = cfg.batch_size * cfg.block_len, cfg.kept_steps()
    meta = corpora[0].meta
    micro = cfg.micro_batch or cfg.batch_size // world
    accumulation = cfg.batch_size // (micro * world)
    process = diffusion.Process(
        cfg.objective, meta["n_vocab"], meta["mask_id"], cfg.block_len, cfg.seed, cfg.loss, cfg.estimator,
        cfg.schedule, cfg.time, cfg.time_sigma, cfg.time_correction, cfg.short_rows)
    # Validation: the bound itself, uniform t, whole rows, noise of its own. A masked network is
    # time-agnostic and takes the count form; a uniform one knows t through its own schedule.
    val_process = process._replace(seed=VALIDATION_SEED, loss="elbo", estimator="count", time="uniform", short_rows=0.0,
                                   schedule=cfg.schedule if cfg.objective == "uniform" else "linear")

    on_gpu = device.type == "cuda" or cfg.device == "cuda"  # the latter for an estimate on a machine without
    bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and (on_gpu and device.type == "cpu" or engine.has_bf16(device)))
    dtype = torch.bfloat16 if bf16 else torch.float32

    if cfg.fp8 and not on_gpu:
        say("warning: fp8 is emulated on a CPU and slower than bfloat16; a GPU of compute capability 8.9 has it", file=sys.stderr)

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    need = None
    if rank == 0 and (cfg.estimate or on_gpu):
        try:
            need = predicted(cfg, process, model_config, world, dtype, on_gpu)
        except Exception as problem:
            if cfg.estimate:
                raise
            say(f"warning: no prediction of memory ({type(problem).__name__}: {problem})", file=sys.stderr)
    if cfg.estimate:
        if need:
            show_estimate(cfg, need, model_config, process, world, dtype, on_gpu)
        return

    torch.manual_seed(cfg.seed)
    network = Transformer(model_config).init_weights().to(device)
    optimizer = engine.make_optimizer(network, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)
    first_step, samples, pending = 0, 0, []
    n_parts = 2 if cfg.loss == "paper" else 1
    if record:
        load_checkpoint(folder, network, optimizer)
        first_step, samples = record["step"], record["samples"]
        pending = [row for row in record["pending"] if len(row) == n_parts + 1]  # another loss has other parts
    plain = engine.Objective(network.use(cfg.recompute, cfg.fp8), posterior=cfg.loss == "paper")
    objective = engine.compiled(plain, cfg.compile, world, cfg.cuda_graphs)
    if cfg.compile != "no" and first_step < steps:
        say("the first step compiles the model, which takes up to a minute on a CPU", flush=True)
    peak = engine.peak_flops(device) if bf16 else None

    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        if first_step < steps:  # else there is nothing to do, and nothing changes
            (run / "settings.json").write_text(configurator.dump(cfg) + "\n")
            if corpora[0].tokenizer_file:
                shutil.copyfile(corpora[0].tokenizer_file, run / "tokenizer.json")  # sampling needs it
            trim_metrics(run / "metrics.jsonl", first_step if record else -1)
        if tracker:
            (run / "wandb_id.txt").write_text(tracker.id)
        metrics_file = open(run / "metrics.jsonl", "a", buffering=1)
    say(configurator.dump(cfg))
    within_documents = cfg.document_attention or cfg.short_rows > 0 and cfg.objective != "ar"
    backend = kernels.attention_backend(torch.empty(1, 1, cfg.block_len, model_config.head_dim, dtype=dtype, device=device), model_config.causal, within_documents)
    if backend == "flash_attention" and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        say("warning: attention falls back to FlashAttention-2; cuDNN's is faster here, but this torch does not find it fit", file=sys.stderr)
    say(f"{network.n_params():,} parameters ({network.n_params(False):,} without embeddings), "
        f"{network.flops_per_token(noisy_share(process)) / 1e6:.1f} MFLOP per token, {str(dtype)[6:]} on {world} × {device.type}, "
        f"attention: {backend}")
    say(f"{steps:,} steps of {tokens_per_step:,} tokens: {steps * tokens_per_step:,} tokens, "
        f"{steps * cfg.batch_size / blocks.n:.2f} epochs of {blocks.n * cfg.block_len:,}")
    if record:
        changed = [f"{k} {v!r} → {getattr(cfg, k)!r}" for k, v in record["settings"].items() if getattr(cfg, k, v) != v and k != "resume"]
        say(f"resumed from {folder}" + (f"; changed settings: {', '.join(changed)}" if changed else ""))

    def log(step, **values):
        if rank == 0:
            values = dict(step=step, tokens=(samples + (step - first_step) * cfg.batch_size) * cfg.block_len, **values)
            metrics_file.write(json.dumps(values) + "\n")
            if tracker:
                tracker.log(values, step=step)

    def read(process, blocks, *rest):
        return read_batch(cfg, process, blocks, meta["eos_id"], *rest)

    def validate(step):
        def measure(p):
            return evaluate(plain, p, val_blocks, eval_rows, micro, rank, world, device, autocast, read)

        loss, extra = sum(measure(val_process)), {}
        if cfg.loss == "paper":
            noisy, clean = measure(val_process._replace(loss="paper"))
            extra = dict(val_paper=noisy + clean, val_noisy=2 * noisy, val_clean=2 * clean)
        bits = loss / math.log(2) / bytes_per_token
        log(step, objective=cfg.objective, val_loss=loss, val_bpb=bits, **extra)
        say(f"step {step:>6}  validation {loss:.4f} nats/token  {bits:.4f} bits/byte"
            + "".join(f"  {k[4:]} {v:.4f}" for k, v in extra.items()), flush=True)

    def save(step):
        if rank == 0:
            n_samples = samples + (step - first_step) * cfg.batch_size
            save_checkpoint(run, step, network, optimizer, dict(
                settings=asdict(cfg), model=asdict(model_config), corpus=corpus_record, samples=n_samples,
                steps=steps, pending=pending), cfg.keep, kept_steps)

    # Losses and norms stay on the device until a line is due; then they travel while training goes on.
    recent = torch.zeros(cfg.log_every, n_parts + 1, device=device)
    arriving, speeds = deque(), deque(maxlen=20)

    def send(first, last, line):
        """Let the records of steps first+1 … last travel to the host; `line`: what is known of the line that is due, if one is."""
        values = recent[: last - first]
        if line:  # one more row holds the norm of all weights: it travels like the gradient's
            weights = nn.utils.get_total_norm(list(network.parameters()))
            values = torch.cat((values, nn.functional.pad(weights[None, None], (n_parts, 0))))
        if world > 1:
            values[:, -1] /= world  # the norm is the same on every rank, the parts add up
            dist.all_reduce(values)
        arriving.append((first, last, engine.Arriving(values), line))
        recent.zero_()

    def receive(wait=False):
        """Log what has arrived (with `wait`: all that was sent); stop the run if a loss or norm is not finite."""
        while arriving and arriving[0][2].here(wait):
            first, last, arrived, line = arriving.popleft()
            rows = arrived.values.tolist()
            if line:
                line = dict(line, param_norm=rows.pop()[-1])
            for step, row in enumerate(rows, first + 1):
                if not all(map(math.isfinite, row)):
                    good = checkpoints(run)
                    configurator.fail(f"step {step}: the loss or its gradient is not finite ({row}); stopped. "
                                      + (f"The last good checkpoint is {good[0]}" if good else "There is no checkpoint yet"))
                pending.append(row)
            if line:
                show(last, engine.seconds(line["start"], arrived.moment), **line)

    def show(step, duration, start, lr, tokens, param_norm):
        """One line of progress, from the means of what is pending."""
        *parts, norm = np.mean(pending, axis=0).tolist()
        pending.clear()
        speed = tokens / duration
        speeds.append(speed)
        mfu = {}
        if peak:
            rows = diffusion.step_rows(process, samples + (step - 1 - first_step) * cfg.batch_size, cfg.batch_size, (step - 1) / steps)
            share = float(rows.count.mean()) / cfg.block_len if cfg.objective == "masked" else 1.0
            mfu = dict(mfu=speed * network.flops_per_token(share) / (peak * world))
        paper = dict(noisy=2 * parts[0], clean=2 * parts[1]) if n_parts == 2 else {}
        log(step, loss=sum(parts), **paper, grad_norm=norm, param_norm=param_norm, lr=lr, tokens_per_s=speed, **mfu)
        left = (steps - step) * tokens_per_step / float(np.median(speeds))
        say(f"step {step:>6}/{steps}  loss {sum(parts):.4f}  norm {norm:.2f}  lr {lr:.2e}  {speed / 1e3:.1f}K tok/s"
            + (f"  mfu {mfu['mfu']:.1%}" if mfu else "") + f"  eta {int(left // 60)}:{int(left % 60):02d}", flush=True)

    gpu = device.type == "cuda"
    batches = training_batches(process, blocks, meta["eos_id"], samples, first_step, steps, cfg, rank, world, pin=gpu)
    if gpu:  # on a CPU a thread would only take time from the step's own
        batches = engine.uploaded(engine.prefetched(batches), device)
    if first_step == 0:
        validate(0)
    objective.train()
    flushed = first_step
    start, clock_tokens = engine.moment(device), 0
    for step in range(first_step + 1, steps + 1):
        lr = learning_rate(cfg, step - 1, steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if cfg.dropout:  # dropout masks, too, are a function of the step
            torch.manual_seed(hash((cfg.seed, step, rank)))
        engine.optimizer_step(objective, optimizer, batches, accumulation, recent[step - flushed - 1], cfg.clip, autocast, world, cfg.cuda_graphs)
        clock_tokens += tokens_per_step
        if step == first_step + 1:  # what has been built by now stays: the garbage collector need not look at it again
            gc.collect()
            gc.freeze()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        if step == first_step + 2 and need:  # the first step's backward pass had no moments beside it yet
            say(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB measured, {need.peak / 2**30:.2f} predicted")

        stopping = stop.is_set()
        if world > 1:
            flag = torch.tensor(float(stopping))
            dist.all_reduce(flag)
            stopping = flag.item() > 0
        logging, evaluating, saving = (step == steps or every and step % every == 0
                                       for every in (cfg.log_every, cfg.eval_every, cfg.save_every))
        saving = saving or stopping or step in kept_steps
        if logging or evaluating or saving:
            send(flushed, step, dict(start=start, lr=lr, tokens=clock_tokens) if logging else None)
            flushed = step
        if logging:
            start, clock_tokens = arriving[-1][2].moment, 0
        receive(wait=evaluating or saving)
        if evaluating:
            validate(step)
        if saving:
            save(step)
        if evaluating or saving:  # the next line's speed is of training alone
            start, clock_tokens = engine.moment(device), 0
        if stopping and step < steps:
            say(f"stopped by a signal after step {step}; continue with --resume=auto")
            break
    receive(wait=True)
    batches.close()
    if first_step >= steps:
        say(f"nothing to do: {folder} is at step {first_step} of {steps}")

    if rank == 0 and (run / f"step_{steps:08d}").is_dir():
        runs = [cfg.run_dir] + ([cfg.compare] if cfg.compare else [])
        draw(runs, run / "loss.png")
        for line in filter(None, map(summary, runs)):
            say(line)
        say(f"loss curve: {run / 'loss.png'}    try: python sample.py --run_dir={run}")
    if tracker:
        tracker.finish()
    if world > 1:
        dist.barrier()
        # Not by the ordinary way: DDP's destructor would hold Python's lock while it waits for gloo's thread, which may
        # itself need that lock to drop its last tensor (torch 2.13; seen to hang).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
