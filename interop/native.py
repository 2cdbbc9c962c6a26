"""Our own checkpoints, read one tensor at a time, and written.

sample.py, eval.py and `train.py --init_from` take what is written here like any other run.
"""

import json
from dataclasses import asdict

from corpus import chat
from corpus.tokenizers import load_tokenizer
from interop import checks, tensors
from interop.source import Source, write_json
from model import ModelConfig
from training import checkpoint
from training.weights import check_weights


def is_checkpoint(path):
    """True if a folder is a run or a checkpoint of ours."""
    return (path / "checkpoint.json").is_file() or bool(checkpoint.checkpoints(path))


def open_source(path, which="auto"):
    """The Source in a checkpoint's folder, or in a run's newest checkpoint; raises ValueError or OSError.

    which: of its weights, as in `checkpoint.weights_folder`.
    """
    folder, record = checkpoint.open_checkpoint(path)
    place, config = checkpoint.weights_folder(folder, record, which), ModelConfig(**record["model"])
    files = checkpoint.weight_files(place)
    check_weights(place, config, files)
    weights = {}
    for file in files:
        weights |= tensors.open_safetensors(file)
    name = record["corpus"]["tokenizer"]
    tokenizer = load_tokenizer(name, (folder.parent, folder)) if name else None
    objective = record["settings"]["objective"]
    folders = folder.parent, folder
    template = checks.template_or_warning(chat.own_template, tokenizer, folders) if tokenizer else None
    return Source("ours", place, config, objective, weights, weights, tokenizer, record["step"], template)


def write(folder, run_dir, source, weights, on_progress):
    """Write a run of one checkpoint into `folder`, which will be called `run_dir`.

    weights: {our name: LazyTensor}, the source's, maybe in another dtype. Raises ValueError or OSError.
    """
    if hasattr(source.tokenizer, "path"):
        source.tokenizer.copy_to(folder)
    if source.template:
        chat.save_template(source.template, folder)
    record = dict(
        settings=run_settings(run_dir, source), model=asdict(source.config), corpus=corpus_record(source),
        step=source.step, converted_from=str(source.folder.resolve()))
    write_run(folder, record, weights, on_progress)


def write_run(folder, record, weights, on_progress):
    """Write a run of one checkpoint, {name: LazyTensor}, whose record lacks nothing but digests."""
    settings = json.dumps(record["settings"], indent=2) + "\n"
    (folder / "settings.json").write_text(settings, encoding="utf-8")
    place = checkpoint.step_folder(folder, record["step"])
    place.mkdir()
    files = write_weights(place, weights, on_progress)
    record = dict(record, sha256={name: checkpoint.digest_on_disk(place / name) for name in files})
    record = json.loads(json.dumps(record))  # as it will be read: the digest is of lists, not tuples
    record["record_sha256"] = checkpoint.record_digest(record)
    (place / "checkpoint.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    checkpoint.point_to(place)


def run_settings(run_dir, source):
    """The settings of train.py that follow from a source, and those that sample.py and eval.py look for.

    Batch size, learning rate and the like are not known: they are left out.
    """
    c = source.config
    return dict(
        run_dir=run_dir, corpus="", tokenizer="", val_share=0.0,
        objective=source.objective, loss="elbo", schedule="linear", shift="yes" if c.shift else "auto",
        document_attention=False, reset_positions=False,
        n_layer=c.n_layer, n_head=c.n_head, n_kv_head=c.n_kv_head, head_dim=c.head_dim, d_model=c.d_model,
        d_ff=c.d_ff, seq_len=c.seq_len, tied=c.tied, rope_base=c.rope_base)


def corpus_record(source):
    """A record's part about text: the vocabulary. Which text the source was trained on is not known."""
    tokenizer = source.tokenizer
    return dict(tokenizer=tokenizer.name if tokenizer else "", n_vocab=source.config.n_vocab,
                mask_id=source.config.mask_id, eos_id=tokenizer.eos_id if tokenizer else 0,
                train_sha256="", val_sha256="")


def write_weights(folder, weights, on_progress):
    """Write {name: LazyTensor} as .safetensors files of at most 5 GB, with an index if there are several.

    Returns the names of the files.
    """
    files = checkpoint.file_names({name: tensor.nbytes for name, tensor in weights.items()})
    for file, names in files.items():
        tensors.write_safetensors(folder / file, {name: weights[name] for name in names}, on_progress)
    if len(files) == 1:
        return list(files)
    total = sum(tensor.nbytes for tensor in weights.values())
    weight_map = {name: file for file, names in files.items() for name in names}
    index = dict(metadata=dict(total_size=total), weight_map=weight_map)
    write_json(folder / "model.safetensors.index.json", index)
    return [*files, "model.safetensors.index.json"]
