"""Everything that can be wrong with a run's settings and files, found before anything is written.

`cfg` is train.Config. Functions raise ValueError or OSError, with a line that says what is wrong, where, and
what to do about it.
"""

import math
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

import diffusion
import kernels
from configurator.ladder import ladder, swiglu_width
from corpus.files import check_no_pipes, list_folder
from corpus.tokenfiles import parse_corpora
from data import validation_ids
from model import ModelConfig, Transformer
from training import checkpoint, compiler
from training.checkpoint import checkpoints, load_newest, open_checkpoint, weights_folder
from training.corpora import (
    OF_PAIRS,
    VOCABULARY,
    check_meaning,
    mean_token_bytes,
    open_corpora,
    text_digest,
    training_sequences,
    validation_sequences,
)
from training.distributed import all_gather, on_all_ranks
from training.log import warn
from training.record import RESUMABLE
from training.state import Run

# Fields of ModelConfig that a run takes from the checkpoint whose weights it begins with.
SHAPE = ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "tied", "rope_base", "norm_eps",
         "qk_norm", "qkv_bias", "rope_stretch")

# ------------------------------------------------------------------------------------------------- settings


def setting_problems(cfg):
    """Settings that do not go together, one line each, beyond the table train.Config.NEEDS."""
    problems = [*budget_problems(cfg), *shape_problems(cfg), *block_problems(cfg), *machine_problems(cfg)]
    for parse in (lambda: check_unique_tokens(cfg), lambda: diffusion.schedule(cfg.schedule), cfg.kept_steps):
        try:
            parse()
        except ValueError as problem:
            problems.append(str(problem))
    return problems


def budget_problems(cfg):
    """What is wrong with how long a run is, its batches and its learning rates."""
    world, micro_batch = cfg.world(), cfg.micro_batch or 1
    if sum(map(bool, (cfg.steps, cfg.tokens, cfg.epochs))) != 1:
        yield "how long? give exactly one of steps, tokens and epochs"
    if cfg.batch_size % (world * micro_batch):
        yield f"batch_size={cfg.batch_size} must be a multiple of {world} ranks × micro_batch={micro_batch}"
    if cfg.min_lr > cfg.lr or -1 < cfg.min_lr < 0:
        yield f"min_lr={cfg.min_lr} must be -1 or lie between 0 and lr={cfg.lr}"
    if cfg.decay >= 1 and cfg.decay % 1:
        yield f"decay={cfg.decay:g}: whole steps from 1 on, or a share of all steps below 1"
    if cfg.lr_schedule == "wsd" and cfg.min_lr == 0:
        yield "lr_schedule=wsd decays exponentially and never reaches min_lr=0; give a positive one"


def shape_problems(cfg):
    """What is wrong with the network's shape."""
    try:
        shape = network_shape(cfg)
    except ValueError as problem:
        yield str(problem)
        return
    if shape["head_dim"] % 2:
        yield f"head_dim={shape['head_dim']} must be even"
    if shape["n_head"] % shape["n_kv_head"]:
        yield f"n_head={shape['n_head']} must be a multiple of n_kv_head={shape['n_kv_head']}"
    if cfg.fp8:
        widths = {"d_model": shape["d_model"], "d_ff": shape["d_ff"],
                  "n_kv_head × head_dim": shape["n_kv_head"] * shape["head_dim"]}
        for name, width in widths.items():
            if width % 16:
                yield f"fp8 needs widths that are multiples of 16, not {name}={width}"
    named = f"model={cfg.model}" if cfg.model else f"init_from={cfg.init_from}"
    names = []
    if cfg.model or cfg.init_from:
        names += ["n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff"]
    if cfg.init_from:
        names += ["model", "tied", "rope_base", "local_init"]
    defaults = type(cfg)()
    for name in names:
        if getattr(cfg, name) != getattr(defaults, name):
            source = f"init_from={cfg.init_from}" if name == "model" else named
            yield f"{name}={getattr(cfg, name)} contradicts {source}; give one of the two"


def block_problems(cfg):
    """What is wrong with the blocks of block diffusion."""
    if cfg.diffusion_block > cfg.seq_len:
        yield f"diffusion_block={cfg.diffusion_block} is more than a row of seq_len={cfg.seq_len}"
    for name, otherwise in dict(shift="no", anneal=0).items():
        if block_of(cfg) and getattr(cfg, name) not in ("auto", otherwise):
            yield (f"{name}={getattr(cfg, name)} is not for diffusion_block: an AR model goes on in blocks "
                   f"as it is; leave {name} out")


def machine_problems(cfg):
    """What this machine, this torch or the number of ranks does not allow."""
    world, has_gpu = cfg.world(), torch.cuda.is_available()
    if cfg.gpus and not cfg.dry_run:
        yield "gpus is for a dry run: add --dry_run, or start that many processes with torchrun"
    uses_gpu = cfg.device != "cpu" and has_gpu or cfg.device == "cuda" and cfg.dry_run
    if cfg.device == "cuda" and not has_gpu and not cfg.dry_run:
        yield "device=cuda, but this machine has no usable GPU; use --device=cpu"
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not cfg.dry_run and cfg.device != "cpu" and 0 < torch.cuda.device_count() < local_ranks:
        gpus = torch.cuda.device_count()
        yield f"{local_ranks} ranks on this machine, but {gpus} GPUs; start one rank per GPU"
    if cfg.fp8 and (cfg.micro_batch or cfg.batch_size // world) * cfg.seq_len % 16:
        yield "fp8 needs micro-batches of a multiple of 16 tokens"
    if cfg.fp8 and cfg.device != "cpu" and has_gpu and torch.cuda.get_device_capability() < (8, 9):
        yield "fp8 needs a GPU of compute capability 8.9 or later"
    if cfg.cuda_graphs and (world > 1 or not uses_gpu):
        yield "cuda_graphs needs one process on a GPU"
    if cfg.shard != "no" and cfg.compile == "whole" and world > 1:
        yield f"shard={cfg.shard} works between blocks, which compile=whole joins; add --compile=blocks"
    copy = cfg.shard_size or cfg.ranks_per_node()
    if cfg.shard == "hybrid" and world > 1 and world % copy:
        yield (f"shard=hybrid needs copies of one size: {copy} does not divide the {world} ranks; "
               "give a --shard_size that does")
    recomputes_in_part = cfg.recompute in ("elementwise", "selective")
    if world > 1 and cfg.compile == "whole" and recomputes_in_part and torch.__version__ < "2.13":
        yield (f"recompute={cfg.recompute} with compile=whole on several ranks needs torch 2.13 "
               "(before, DDP's compiler computes all again); use compile=blocks")


def check_unique_tokens(cfg):
    """Raises ValueError if `corpus` can't be read, or says in two places how many tokens are unique."""
    corpora = parse_corpora(cfg.corpus)
    if cfg.unique_tokens and (len(corpora) > 1 or corpora[0][2]):
        raise ValueError("unique_tokens is for a single corpus; "
                         "give each its own as path:weight:unique_tokens")


def parse_steps(text):
    """save_at as a set of steps; raises ValueError."""
    parts = [part.strip() for part in text.split(",")] if text else []
    for part in parts:
        if not (part.isascii() and part.isdecimal() and int(part)):
            raise ValueError(f"save_at={text}: '{part}' is no step; write whole numbers from 1 on, "
                             "with commas between")
    return set(map(int, parts))


def network_shape(cfg):
    """The network's shape as keyword arguments; raises ValueError if there is none."""
    if cfg.model:
        shape = dict(ladder(cfg.model), n_kv_head=0, d_ff=0)
    else:
        if not cfg.head_dim and cfg.d_model % cfg.n_head:
            raise ValueError(f"d_model={cfg.d_model} is no multiple of n_head={cfg.n_head}; set head_dim")
        names = ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff")
        shape = {name: getattr(cfg, name) for name in names}
        shape["head_dim"] = cfg.head_dim or cfg.d_model // cfg.n_head
    shape["n_kv_head"] = shape["n_kv_head"] or shape["n_head"]
    shape["d_ff"] = shape["d_ff"] or max(64, swiglu_width(shape["d_model"]))
    return shape


# ------------------------------------------------------------------------------------------------ checkpoints


def find_initial_checkpoint(cfg, ranks):
    """(folder of the weights, record) of the checkpoint that init_from names, None if it names none."""
    if not cfg.init_from:
        return None
    path, weights = Path(cfg.init_from), cfg.init_weights
    if not path.is_dir() and cfg.resume != "no" and checkpoints(cfg.run_dir):
        path, weights = Path(cfg.run_dir), "auto"  # which has begun, and knows its own shape
    if (path / "checkpoint.json").is_file() or checkpoints(path):
        folder, record = open_checkpoint(path, partial(warn, ranks), ranks)
        return weights_folder(folder, record, weights, "init_weights"), record
    of_others = (path / "config.json", path / "latest_checkpointed_iteration.txt")
    reason = "no run or checkpoint of ours" if path.is_dir() else "no such folder"
    if any(file.is_file() for file in of_others):
        reason = f"convert it first: python convert.py --source={path} --out=…"
    raise FileNotFoundError(f"init_from={path}: {reason}")


def find_checkpoint(run):
    """(folder, record) of the checkpoint that `resume` asks for, None if it asks for none."""
    cfg, ranks = run.cfg, run.ranks
    there = any(all_gather(ranks, bool(checkpoints(run.folder))))
    if cfg.resume == "no" or cfg.resume == "auto" and not there:
        return None
    folder, record = load_newest(run.folder, partial(warn, ranks), ranks)
    check_resumable(record, run.model_config, run.corpus_record)
    saved = record["settings"]
    optimizer = saved.get("optimizer", "adamw")
    if optimizer != cfg.optimizer:
        raise ValueError(f"cannot resume with optimizer={cfg.optimizer} what {optimizer} has trained: their "
                         "states differ; begin another run with --init_from")
    if any(name.startswith("ema/") for name in record["sha256"]) and not cfg.ema:
        warn(ranks, f"resumed without --ema={saved.get('ema', '')}: the moving average in {folder} ends here")
    defaults = OF_PAIRS | dict(seed=None, unique_tokens=None)  # of older records
    restarted = [name for name in defaults if saved.get(name, defaults[name]) != getattr(cfg, name)]
    if mixture_of(saved["corpus"]) != mixture_of(cfg.corpus):
        restarted.append("mixture")
    if restarted:
        warn(ranks, f"resumed with another {' and '.join(restarted)}: the data order changes here, "
                    "epochs are no longer exact")
    return folder, record


def keep_data_order(run, record):
    """The Run whose sequences come in the order in which its checkpoint has read them so far.

    Runs that began before data.EXACT_UP_TO have another: it must not change amid an epoch.
    """
    return run._replace(sequences=training_sequences(
        run.cfg, run.corpora, block_of(run.cfg), record["exact_up_to"]))


def mixture_of(corpus):
    """[(weight, unique tokens)] of a `corpus` setting."""
    return [rest for _, *rest in parse_corpora(corpus)]


def check_resumable(record, model_config, corpus_record):
    """Raises ValueError, naming each difference, if a checkpoint is of another architecture or corpus."""
    if "converted_from" in record:
        raise ValueError(f"cannot resume what was converted (from {record['converted_from']}): "
                         "it has no optimizer state; begin another run with --init_from")
    if "updates" not in record:
        raise ValueError("cannot resume a checkpoint of an older format, which kept the optimizer's state "
                         "otherwise; sample.py reads its weights")
    missing = [name for name in RESUMABLE if name not in record]
    if missing:
        raise ValueError(f"cannot resume a checkpoint whose record lacks {', '.join(missing)}")
    initial = ("dropout", "init_std", "scaled_init", "local_init")  # of no consequence to the weights' shapes
    before = asdict(ModelConfig(**record["model"]))  # with what older checkpoints do not mention
    of_corpora = "corpus", record["corpus"], corpus_record
    for what, old, new in (("architecture", before, asdict(model_config)), of_corpora):
        names = [name for name in new if old.get(name) != new.get(name) and name not in initial]
        if names:
            differences = ", ".join(f"{name} {old.get(name)} → {new.get(name)}" for name in names)
            raise ValueError(f"cannot resume with another {what}: {differences}; use another --run_dir")


# ---------------------------------------------------------------------------------------------------- the run


def open_run(cfg, ranks, device):
    """The Run that these settings describe, after every check; on all ranks, or none goes on."""
    initial = on_all_ranks(ranks, find_initial_checkpoint, cfg, ranks)
    return on_all_ranks(ranks, build_run, cfg, ranks, device, initial)


def build_run(cfg, ranks, device, initial=None):
    """The Run of these settings; `initial` as `find_initial_checkpoint` returns it. Writes nothing."""
    corpora = open_corpora(cfg)
    check_meaning(cfg, corpora)
    meta = corpora[0].meta
    sequences = training_sequences(cfg, corpora, block_of(cfg))
    val_sequences = validation_sequences(cfg, corpora, block_of(cfg))
    steps = cfg.steps or math.ceil(
        (cfg.tokens or cfg.epochs * sequences.n * cfg.seq_len) / (cfg.batch_size * cfg.seq_len))
    check_length(cfg, ranks, steps)

    process = diffusion.Process(
        cfg.objective, meta["n_vocab"], meta["mask_id"], cfg.seq_len, cfg.seed, cfg.loss, cfg.estimator,
        cfg.schedule, cfg.time, cfg.time_sigma, cfg.time_correction, block_of(cfg),
        cfg.ar_input_mask)
    model_config = ModelConfig(
        **shape_and_shift(cfg, initial, meta), n_vocab=meta["n_vocab"], mask_id=meta["mask_id"],
        seq_len=cfg.seq_len, causal=cfg.objective == "ar", timed=cfg.objective == "uniform",
        dropout=cfg.dropout, init_std=cfg.init_std, scaled_init=cfg.scaled_init, local_init=cfg.local_init,
        diffusion_block=block_of(cfg))

    eval_rows = min(cfg.eval_rows or val_sequences.available, val_sequences.available)
    scored = validation_ids(eval_rows, val_sequences.available)
    corpus_record = {name: meta[name] for name in VOCABULARY}
    corpus_record |= {f"{split}_sha256": text_digest(corpora, split) for split in ("train", "val")}

    on_gpu = device.type == "cuda" or cfg.device == "cuda"  # the latter for a dry run on a machine without
    planned = on_gpu and device.type == "cpu"
    bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and (planned or kernels.has_bf16(device))
    run = Run(
        cfg, ranks, device, folder=Path(cfg.run_dir), init_checkpoint=initial, corpora=corpora,
        sequences=sequences, val_sequences=val_sequences, corpus_record=corpus_record, process=process,
        model_config=model_config, dtype=torch.bfloat16 if bf16 else torch.float32, on_gpu=on_gpu,
        steps=steps, kept_steps=cfg.kept_steps(), eval_rows=eval_rows,
        bytes_per_token=mean_token_bytes(corpora, val_sequences, scored))
    check_folders(run)
    if cfg.compile != "no" and not cfg.dry_run:
        compiler.check(device)
    return run


def block_of(cfg):
    """Tokens of a block of block diffusion; 0 where the whole row is one."""
    return cfg.diffusion_block % cfg.seq_len


def check_length(cfg, ranks, steps):
    """Raises ValueError if parts of the schedule do not fit into the run; of the warm-up it warns."""
    if cfg.lr_schedule == "wsd" and cfg.decay >= 1 and cfg.warmup + cfg.decay > steps:
        raise ValueError(f"warmup={cfg.warmup} and decay={cfg.decay:g} don't fit into {steps} steps")
    if cfg.anneal > steps:
        raise ValueError(f"anneal={cfg.anneal} doesn't fit into {steps} steps: "
                         "attention would never be bidirectional")
    if cfg.warmup >= steps:
        warn(ranks, f"warmup={cfg.warmup} is not over within {steps} steps: the learning rate never reaches "
                    f"lr={cfg.lr:g}; lower --warmup")


def shape_and_shift(cfg, initial, meta):
    """ModelConfig's fields about the shape: of cfg, or of the checkpoint whose weights it begins with."""
    if not initial:
        return dict(cfg.shape(), tied=cfg.tied, rope_base=cfg.rope_base, shift=cfg.shift == "yes")
    folder, record = initial
    old, tokenizer = ModelConfig(**record["model"]), record["corpus"]["tokenizer"]
    if tokenizer != meta["tokenizer"] or old.n_vocab < meta["n_vocab"]:
        raise ValueError(f"init_from={folder} has tokenizer '{tokenizer}' of {old.n_vocab} tokens, the "
                         f"corpus '{meta['tokenizer']}' of {meta['n_vocab']}; prepare the corpus with the "
                         "checkpoint's own (convert.py puts it beside the weights)")
    was_shifted = old.causal or old.shift
    may_shift = cfg.objective == "masked" and not block_of(cfg)
    shift = may_shift and (cfg.shift == "yes" or cfg.shift == "auto" and was_shifted)
    return {name: getattr(old, name) for name in SHAPE} | dict(shift=shift)


def check_folders(run):
    """Raises OSError unless the run's folder is free, or its own, and the disk holds its checkpoints."""
    cfg = run.cfg
    if cfg.compare and not Path(cfg.compare).is_dir():
        raise FileNotFoundError(f"compare={cfg.compare}: no such run")
    if cfg.dry_run:
        return
    occupied = run.folder.exists() and bool(list_folder(run.folder))
    if occupied and cfg.resume == "no":
        raise FileExistsError(f"{run.folder} is not empty; continue it with --resume=auto "
                              "or choose another --run_dir")
    if not checkpoint.step_folder(run.folder, run.steps).is_dir():
        with torch.device("meta"):
            network = Transformer(run.model_config)
        n_bytes = checkpoint.checkpoint_bytes(network, cfg.optimizer, cfg.ema, cfg.layout() != "no")
        checkpoint.check_space(run.folder, *n_bytes, checkpoints_kept(run))


def checkpoints_kept(run):
    """How many checkpoints there are at most at a time, but for the one in the making."""
    cfg, steps = run.cfg, run.steps
    kept = cfg.keep + len(run.kept_steps)
    if cfg.keep_every:
        kept += steps // cfg.keep_every
    saved = 1 + len(run.kept_steps)
    if cfg.save_every:
        saved += steps // cfg.save_every
    return min(kept, saved)


def lock_run_folder(run):
    """Make the run's folder, on rank 0, and keep other processes from training into it."""
    if run.ranks.rank == 0 and (run.cfg.resume != "yes" or run.folder.is_dir()):
        run.folder.mkdir(parents=True, exist_ok=True)
        check_no_pipes(run.folder)
        checkpoint.lock_run_folder(run.folder, min(30.0, run.cfg.timeout))
