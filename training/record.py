"""The record of a checkpoint, checkpoint.json: what must be in it before anything uses it."""

import hashlib
import json
import re
from dataclasses import fields
from pathlib import Path

import diffusion
from configurator.renamed import renamed_record
from corpus.records import DIGEST, check, read_json, real, whole
from model import ModelConfig

MAX_SIZE = 1 << 24  # of a width, a length, a vocabulary
MAX_LAYERS = 1 << 12  # each takes time to lay out, even without values
SIZE = whole(1, MAX_SIZE)

# Settings of a run that others than train.py read. Runs of older versions lack some, converted ones most.
SETTINGS = {
    "objective": ("masked", "uniform", "ar"),
    "loss": ("elbo", "maskgit", "paper"),
    "schedule": str,
    "seq_len": SIZE,
    "corpus": str,
    "tokenizer?": str,
    "eos?": str,
    "eos_opens?": bool,
    "val_share?": real(0, 0.5),
    "unique_tokens?": whole(),
    "seed?": whole(),
    "estimator?": ("count", "ratio", "time"),
    "time?": ("uniform", "iid", "moving_gaussian"),
    "time_sigma?": real(0),
    "document_attention?": bool,
    "reset_positions?": bool,
    "short_rows?": real(0, 1),
    "packing?": bool,
    "long_pairs?": ("cut", "skip"),
    "eos_padding?": ("none", "block", "row"),
    "eval_rows?": whole(),
    "batch_size?": whole(1),
    "lr?": real(0),
    "optimizer?": ("adamw", "muon"),
    "ema?": real(0, 1),
    "lr_schedule?": ("cosine", "wsd", "constant"),
    "decay?": real(0),
    "wandb?": str,
}

MODEL = {
    "n_layer": whole(1, MAX_LAYERS),
    **dict.fromkeys(("n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "n_vocab", "seq_len"), SIZE),
    "mask_id": whole(0, MAX_SIZE),
    **dict.fromkeys(("causal", "tied?", "timed?", "scaled_init?", "local_init?", "qk_norm?", "qkv_bias?",
                     "shift?"), bool),
    "diffusion_block?": whole(0, MAX_SIZE),
    "dropout?": real(0, 0.99),
    "rope_base?": real(0),
    "norm_eps?": real(0, 1),
    "init_std?": real(0),
    "rope_stretch?": [real(0)],
}

RECORD = {
    "settings": SETTINGS,
    "model": MODEL,
    "corpus": {
        "tokenizer": str,
        "n_vocab": SIZE,
        "mask_id": whole(0, MAX_SIZE),
        "eos_id": whole(0, MAX_SIZE),
        "train_sha256?": str,
        "val_sha256?": str,
    },
    "step": whole(0, 1 << 53),
    "sha256": {re.compile(r"((optimizer|ema)/)?[^/\0]+"): DIGEST},
    "converted_from?": str,
    "exact_up_to": whole(0, 1 << 20),  # see data.permute
    "steps?": whole(0, 1 << 53),
    "updates?": whole(0, 1 << 53),
    "next_sample?": whole(),
    "passed_samples?": whole(),
    "bad_in_a_row?": whole(),
    "pending?": [{str: float}],
}

# members of a run's record that are not in one that convert.py wrote
RESUMABLE = ("steps", "updates", "next_sample", "passed_samples", "bad_in_a_row", "pending")


def required(schema, *names):
    """An object's schema with these of its optional members required."""
    return schema | {name: schema[f"{name}?"] for name in names}


def record_digest(record):
    """SHA-256 of a checkpoint's JSON record, independent of its layout."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_record(folder):
    """The record of a checkpoint folder, with today's names; raises ValueError or OSError.

    What is in it is of the types, within the bounds, that whoever uses it expects; its files are not checked.
    """
    path = Path(folder) / "checkpoint.json"
    record = read_json(path)
    digest = record.pop("record_sha256", None) if isinstance(record, dict) else None
    if digest != record_digest(record):
        raise ValueError(f"{path} is damaged")
    record = renamed_record(record)
    check(record, RECORD, path)
    check_consistency(record, path)
    return record


def check_consistency(record, path):
    """Raise ValueError where parts of a record contradict each other, or no network can be as it says."""
    settings, shape = record["settings"], record["model"]
    unknown = set(shape) - {field.name for field in fields(ModelConfig)}
    if unknown:
        raise ValueError(f"{path}: model.{min(unknown)[:100]} is not known: is it of a newer version?")
    width, table = shape["n_head"] * shape["head_dim"], shape["seq_len"] * shape["head_dim"]
    if width > MAX_SIZE or table > 1 << 30 or shape["n_head"] % shape["n_kv_head"] or shape["head_dim"] % 2:
        raise ValueError(f"{path}: there can't be {shape['n_head']} heads of {shape['head_dim']}, "
                         f"{shape['n_kv_head']} for keys and values, at {shape['seq_len']} positions")
    if len(shape.get("rope_stretch", ())) not in (0, 4):
        raise ValueError(f"{path}: model.rope_stretch has {len(shape['rope_stretch'])} numbers, and should "
                         "have 4, or none")
    block = shape.get("diffusion_block", 0)
    if block and (block >= shape["seq_len"] or shape["causal"] or shape.get("shift")):
        raise ValueError(f"{path}: model.diffusion_block is {block}, and should be less than the row, of a "
                         "model that is neither causal nor shifted")
    objective = settings["objective"]
    expected = dict(causal=objective == "ar", timed=objective == "uniform", seq_len=settings["seq_len"])
    if expected != dict(timed=False) | {name: shape[name] for name in expected if name in shape}:
        raise ValueError(f"{path}: its model is not of its settings' objective={objective}, "
                         f"seq_len={settings['seq_len']}")
    try:
        diffusion.schedule(settings["schedule"])
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
