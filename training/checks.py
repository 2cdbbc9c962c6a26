"""What a run reads before it writes anything: corpora, the checkpoint it goes on from or begins with, benchmarks. Everything that
can be wrong with the user's files is found here. `cfg` is train.Config.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import configurator
import data
from corpus import tokenfiles
from model import ModelConfig, Transformer
from training import checkpoint, distributed
from training.checkpoint import checkpoints, load_newest


class Inputs(NamedTuple):
    """What a run reads before it writes anything."""

    corpora: list[tokenfiles.Corpus]
    blocks: data.Sequences | data.Mixture
    val_sequences: data.Sequences | data.Mixture
    model_config: ModelConfig
    corpus_record: dict  # what a checkpoint keeps of the corpus
    steps: int
    eval_rows: int
    bytes_per_token: float  # of exactly the validation tokens that are scored


VOCABULARY = ("tokenizer", "n_vocab", "mask_id", "eos_id")


def open_corpora(cfg):
    """The corpora that cfg names, of one vocabulary; raises ValueError or OSError."""
    corpora = [tokenfiles.load_corpus(path, cfg.tokenizer, cfg.val_share) for path, *_ in tokenfiles.parse_corpora(cfg.corpus)]
    for corpus in corpora[1:]:
        if differ := [f"{k} {corpora[0].meta[k]} and {corpus.meta[k]}" for k in VOCABULARY if corpora[0].meta[k] != corpus.meta[k]]:
            raise ValueError(f"{corpora[0].folder} and {corpus.folder} don't go together: {', '.join(differ)}")
    return corpora


def validation_sequences(corpora, seq_len):
    """Blocks of all the corpora's validation splits; raises ValueError."""
    blocks = [data.Sequences(corpus.val, seq_len, n_vocab=corpus.meta["n_vocab"], what="validation" + f" ({corpus.folder})" * (len(corpora) > 1)) for corpus in corpora]
    return blocks[0] if len(blocks) == 1 else data.Mixture(blocks)


def training_text(cfg, corpora):
    """What a run with these settings reads of each corpus: its whole training split, or the blocks of its unique tokens, as data.Streams."""
    streams = []
    for i, (corpus, (_, _, unique)) in enumerate(zip(corpora, tokenfiles.parse_corpora(cfg.corpus))):
        if unique := unique or cfg.unique_tokens:
            blocks = data.Sequences(corpus.train, cfg.seq_len, cfg.seed + i, unique, corpus.meta["n_vocab"])
            chosen = np.sort(blocks.chosen(np.arange(blocks.n)))
            runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)  # neighbours stay together
            border = np.array([corpus.meta["mask_id"]], corpus.train.dtype)  # stands in no text
            parts = [corpus.train.read(1 + int(run[0]) * cfg.seq_len, 1 + (int(run[-1]) + 1) * cfg.seq_len) for run in runs]
            streams.append(tokenfiles.Stream([array for part in parts for array in (part, border)]))
        else:
            streams.append(corpus.train)
    return streams


def text_digest(corpora, split):
    return " ".join(corpus.meta[split]["sha256"] for corpus in corpora)


def find_initial_checkpoint(cfg, ranks, warn):
    """(folder, record) of the checkpoint that init_from names, None if it names none; raises ValueError or OSError."""
    if not cfg.init_from:
        return None
    where = Path(cfg.init_from)
    if not where.is_dir() and cfg.resume != "no" and checkpoints(cfg.run_dir):
        where = Path(cfg.run_dir)  # which has begun, and knows its own shape
    if (where / "checkpoint.json").is_file():
        return where, checkpoint.read_checkpoint(where, ranks.rank, ranks.world)
    if not checkpoints(where):
        foreign = (where / "config.json").is_file() or (where / "latest_checkpointed_iteration.txt").is_file()
        raise FileNotFoundError(f"init_from={where}: " + (f"convert it first: python convert.py --source={where} --out=…" if foreign else
                                                          "no run or checkpoint of ours" if where.is_dir() else "no such folder"))
    return load_newest(where, warn, ranks)


SHAPE = ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "tied", "rope_base", "norm_eps", "qk_norm", "qkv_bias", "rope_stretch")


def shape_of(cfg, start, meta):
    """The settings of ModelConfig that are about its shape: from cfg, or those of the checkpoint it begins with; raises ValueError."""
    if not start:
        return dict(cfg.shape(), tied=cfg.tied, rope_base=cfg.rope_base, shift=cfg.shift == "yes")
    folder, record = start
    old, tokenizer = ModelConfig(**record["model"]), record["corpus"]["tokenizer"]
    if tokenizer != meta["tokenizer"] or old.n_vocab < meta["n_vocab"]:
        raise ValueError(f"init_from={folder} has tokenizer '{tokenizer}' of {old.n_vocab} tokens, the corpus '{meta['tokenizer']}' of {meta['n_vocab']}; "
                         "prepare the corpus with the checkpoint's own (convert.py puts it beside the weights)")
    shift = cfg.objective == "masked" and (cfg.shift == "yes" or cfg.shift == "auto" and (old.causal or old.shift))
    return {name: getattr(old, name) for name in SHAPE} | dict(shift=shift)


def open_inputs(cfg, start=None):
    """Check everything that can be wrong with the user's files; `start` as `find_start` returns it. Raises ValueError or OSError, writes
    nothing."""
    run = Path(cfg.run_dir)
    given, corpora = tokenfiles.parse_corpora(cfg.corpus), open_corpora(cfg)
    meta = corpora[0].meta
    of = [f" ({corpus.folder})" if len(corpora) > 1 else "" for corpus in corpora]
    blocks = [data.Sequences(corpus.train, cfg.seq_len, cfg.seed + i, unique or cfg.unique_tokens, meta["n_vocab"], f"training{of[i]}")
              for i, (corpus, (_, _, unique)) in enumerate(zip(corpora, given))]
    blocks = blocks[0] if len(corpora) == 1 else data.Mixture(blocks, [w for _, w, _ in given] if given[0][1] else None, cfg.seed)
    val_sequences = validation_sequences(corpora, cfg.seq_len)
    budget = cfg.tokens or cfg.epochs * blocks.n * cfg.seq_len
    steps = cfg.steps or math.ceil(budget / (cfg.batch_size * cfg.seq_len))
    if cfg.lr_schedule == "wsd" and cfg.decay >= 1 and cfg.warmup + cfg.decay > steps:
        raise ValueError(f"warmup={cfg.warmup} and decay={cfg.decay:g} don't fit into {steps} steps")
    if cfg.anneal > steps:
        raise ValueError(f"anneal={cfg.anneal} doesn't fit into {steps} steps: attention would never be bidirectional")
    model_config = ModelConfig(
        **shape_of(cfg, start, meta), n_vocab=meta["n_vocab"], mask_id=meta["mask_id"], seq_len=cfg.seq_len,
        causal=cfg.objective == "ar", timed=cfg.objective == "uniform", dropout=cfg.dropout,
        init_std=cfg.init_std, scaled_init=cfg.scaled_init, local_init=cfg.local_init)
    corpus_record = {k: meta[k] for k in VOCABULARY}
    eval_rows = min(cfg.eval_rows or val_sequences.available, val_sequences.available)
    bytes_per_token = float(corpora[0].token_bytes[val_sequences.read(data.validation_ids(eval_rows, val_sequences.available))[:, 1:]].mean())
    corpus_record |= {f"{split}_sha256": text_digest(corpora, split) for split in ("train", "val")}
    if run.exists() and any(path.name != ".lock" for path in run.iterdir()) and cfg.resume == "no" and not cfg.dry_run:
        raise FileExistsError(f"{run} is not empty; continue it with --resume=auto or choose another --run_dir")
    if cfg.compare and not Path(cfg.compare).is_dir():
        raise FileNotFoundError(f"compare={cfg.compare}: no such run")
    if not cfg.dry_run and not (run / f"step_{steps:08d}").is_dir():
        kept = cfg.keep + len(cfg.kept_steps()) + (steps // cfg.keep_every if cfg.keep_every else 0)
        saved = steps // cfg.save_every + 1 + len(cfg.kept_steps()) if cfg.save_every else 1 + len(cfg.kept_steps())
        with torch.device("meta"):
            n_params = Transformer(model_config).n_params()
        checkpoint.check_space(run, n_params, cfg.layout() != "no", min(kept, saved))
    return Inputs(corpora, blocks, val_sequences, model_config, corpus_record, steps, eval_rows, bytes_per_token)


def open_benchmarks(cfg, say):
    """(harness.py, its tasks) that eval_tasks names, None for none; raises ValueError."""
    if not cfg.eval_tasks:
        return None
    try:
        from evaluation import harness
    except ImportError as problem:
        raise ValueError(f"eval_tasks needs lm-evaluation-harness ({problem}): pip install '.[eval]'") from None
    opened = harness.open_tasks(configurator.split(cfg.eval_tasks), cfg.task_path, cfg.task_data, say)
    if cfg.layout() != "no" and (writing := harness.writing(opened)):
        raise ValueError(f"eval_tasks={', '.join(writing)}: there the model writes, which needs whole weights on each rank: shard=no")
    return harness, opened


def find_checkpoint(cfg, inputs, ranks, warn):
    """(folder, record) of the checkpoint that `resume` asks for, (None, None) if it asks for none; raises ValueError or OSError."""
    run = Path(cfg.run_dir)
    if cfg.resume == "no" or cfg.resume == "auto" and not any(distributed.all_gather(ranks, bool(checkpoints(run)))):
        return None, None
    folder, record = load_newest(run, warn, ranks)
    check_resumable(record, inputs.model_config, inputs.corpus_record)
    restarted = [k for k in ("seed", "unique_tokens") if record["settings"][k] != getattr(cfg, k)]
    if [rest for _, *rest in tokenfiles.parse_corpora(record["settings"]["corpus"])] != [rest for _, *rest in tokenfiles.parse_corpora(cfg.corpus)]:
        restarted.append("mixture")
    if restarted:
        warn(f"resumed with another {' and '.join(restarted)}: the data order changes here, epochs are no longer exact")
    return folder, record


def check_resumable(record, model_config, corpus_record):
    """Raises ValueError, naming each difference, if a checkpoint is of another architecture or corpus."""
    if "converted_from" in record:
        raise ValueError(f"cannot resume what was converted (from {record['converted_from']}): it has no optimizer state; begin another run with --init_from")
    if "updates" not in record:
        raise ValueError("cannot resume a checkpoint of an older format, which kept the optimizer's state otherwise; sample.py reads its weights")
    initial = ("dropout", "init_std", "scaled_init", "local_init")  # of no consequence to the weights' shapes
    before = asdict(ModelConfig(**record["model"]))  # with what older checkpoints do not mention
    for what, old, new in (("architecture", before, asdict(model_config)), ("corpus", record["corpus"], corpus_record)):
        differ = [f"{k} {old.get(k)} → {new.get(k)}" for k in new if old.get(k) != new.get(k) and k not in initial]
        if differ:
            raise ValueError(f"cannot resume with another {what}: {', '.join(differ)}; use another --run_dir")
