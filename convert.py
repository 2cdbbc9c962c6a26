"""Convert checkpoints between Megatron, Hugging Face and nanoquokka, in one process and without any of the programs that wrote them.

    python convert.py --source=ckpts/1024_96b_1e_1b_ar --tokenizer=gpt2 --out=runs/imported     # Megatron → a run of ours
    python convert.py --source=Qwen3-0.6B --out=runs/qwen3                                      # a Hugging Face folder → a run of ours
    python convert.py --source=runs/quickstart --out=exported                                   # ours → a Hugging Face folder
    python convert.py --source=runs/quickstart --to=megatron --tensor_parallel=2 --out=mp       # ours → Megatron's torch format
    python convert.py download OWNER/NAME --folder=…                                            # a folder of a hub: download --help

What the source is, its files say. Nothing in them is run, and at most one tensor is in memory (writing Megatron's format: one rank's besides).
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress

import configurator
import train
from configurator import setting
from corpus import tokenizers
from interop import huggingface, megatron, tensors
from interop.tensors import Lazy
from model import ModelConfig, Transformer
from training import checkpoint

LIMIT = 1e-4  # of --verify, which computes in float32 whatever the weights are
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Config:
    source: str = setting("", "what is converted: a run or checkpoint of ours, a Hugging Face folder, a Megatron run (its latest iteration) or iteration")
    out: str = setting("", "folder to write, which must not exist")
    to: Literal["auto", "ours", "hf", "megatron"] = setting("auto", "the format to write (auto: ours; hf of what is ours)")
    tokenizer: str = setting("", "a tiktoken encoding such as gpt2, a tokenizer.json, or none (empty: the source's own)")
    eos: str = setting("", "of a tokenizer.json: the token that ends a document")
    objective: Literal["auto", "masked", "ar"] = setting("auto", "what the source was trained for, where its files don't say")
    mask_id: int = setting(-1, "the mask's id, where neither the source nor its tokenizer knows it", low=-1)
    seq_len: int = setting(0, "longest sequence (0: as the source says)", low=0)
    dtype: Literal["source", "float32", "bfloat16", "float16"] = setting("source", "of the weights that are written")
    tensor_parallel: int = setting(1, "of Megatron: ranks that share each layer", low=1)
    pipeline_parallel: int = setting(1, "of Megatron: ranks that share the layers", low=1)
    verify: bool = setting(False, "compare the logits of what was written with the source's on random tokens; where they differ, nothing is written")

    def problems(self):
        wrong = [f"give --{name}" for name in ("source", "out") if not getattr(self, name)]
        if self.source and not Path(self.source).is_dir():
            wrong.append(f"source={self.source}: {'a file; name its folder' if Path(self.source).exists() else 'no such folder'}")
        if self.source and self.out and Path(self.source).resolve() in Path(self.out).resolve().parents:
            wrong.append(f"out={self.out} lies within the source")
        if self.out and Path(self.out).exists():
            wrong.append(f"out={self.out} exists; nothing is overwritten")
        if self.eos and not self.tokenizer:
            wrong.append("eos is of a tokenizer that you name: give --tokenizer, too")
        if self.to in ("ours", "hf") and (self.tensor_parallel, self.pipeline_parallel) != (1, 1):
            wrong.append("tensor_parallel and pipeline_parallel are for --to=megatron")
        return wrong


class Source(NamedTuple):
    """A checkpoint of any format, in our words."""

    kind: str  # ours, hf, megatron
    folder: Path
    config: ModelConfig
    objective: str  # masked, uniform, ar
    weights: dict[str, Lazy]  # under our names
    tokens: Any  # data's tokenizer, None if it has none
    step: int
    logits: Callable  # ids (B, L) → what the source itself makes of them, unshifted, (B, L, ≥ n_vocab) fp32


# ------------------------------------------------------------------------------------------------------- reading


def open_source(cfg, path=None):
    """The checkpoint at `path`, by default cfg.source; raises ValueError or OSError."""
    path = Path(path or cfg.source)
    if (path / "checkpoint.json").is_file() or checkpoint.checkpoints(path):
        return open_ours(path)
    if huggingface.is_one(path):
        return open_huggingface(cfg, path)
    if megatron.is_one(path):
        return open_megatron(cfg, path)
    raise ValueError(f"{path} is no checkpoint that is known: neither a run of ours, nor has it a config.json (Hugging Face), a latest_checkpointed_iteration.txt, "
                     ".metadata or mp_rank_* (Megatron)")


def open_ours(path):
    if (path / "checkpoint.json").is_file():
        folder, record = path, checkpoint.read_checkpoint(path)
    else:
        folder, record = checkpoint.load_newest(path, lambda warning: print(f"warning: {warning}", file=sys.stderr))
    config, objective, name, step = understood(folder, lambda r: (ModelConfig(**r["model"]), r["settings"]["objective"], r["corpus"]["tokenizer"], r["step"]), record)
    weights = {}
    for file in checkpoint.weight_files(folder):
        weights |= tensors.of_safetensors(file)
    check(folder, ours_of(config), weights)
    tokens = tokenizers.load_tokenizer(name, (folder.parent, folder)) if name else None
    return Source("ours", folder, config, objective, weights, tokens, step, lambda ids: streamed(config, weights, ids))


def open_huggingface(cfg, path):
    shape, rows, mask_id = understood(path / "config.json", huggingface.shape_of, path)
    found = {name: value for name, value in huggingface.read(path).items() if not name.endswith("inv_freq")}
    possible(path, shape, found)
    family, about = huggingface.read_config(path)
    objective = resolved(cfg, "ar" if shape["causal"] else "masked", path)
    tokens = open_tokenizer(cfg, path, about.get("tokenizer_name", ""))
    if tokens is None and cfg.tokenizer != "none":
        old = " (transformers makes one of its vocab.json: docs/checkpoints.md)" if (path / "vocab.json").is_file() else ""
        raise ValueError(f"{path} has no tokenizer.json{old}: give --tokenizer, or none (nothing can be sampled or evaluated then)")
    n_vocab, mask_id = vocabulary(path, tokens, rows, mask_id if cfg.mask_id < 0 else cfg.mask_id, rows, objective)
    shape["seq_len"] = cfg.seq_len or shape["seq_len"]
    config = ModelConfig(**shape, n_vocab=n_vocab, mask_id=mask_id)
    shapes = ours_of(config)
    theirs = {huggingface.their_name(name, family): name for name in shapes}
    drop_tied(config, found, *(huggingface.their_name(name, family) for name in ("lm_head.weight", "embed.weight")), path)
    check(path, {theirs_: with_rows(shapes[name], name, rows) for theirs_, name in theirs.items()}, found)
    weights = fitted({name: found[theirs_] for theirs_, name in theirs.items()}, config)
    return Source("hf", path, config, objective, weights, tokens, 0, lambda ids: by_transformers(config, weights, ids))


def open_megatron(cfg, path):
    args, iteration, found = megatron.read(path)
    shape, objective = understood(path, megatron.shape_of, args), megatron.objective_of(args)
    possible(path, shape, found)
    if objective is None and cfg.objective == "auto":
        raise ValueError(f"the arguments do not say what was learned (model_running_mode={args.get('model_running_mode')}, attention_mask_type={args.get('attention_mask_type')}); give --objective")
    objective = resolved(cfg, objective, path) if objective else cfg.objective
    if "embedding.word_embeddings.weight" not in found:
        raise ValueError(f"{path} has no embedding.word_embeddings.weight")
    rows = (*found["embedding.word_embeddings.weight"].shape, 0)[0]
    mask_id = args.get("mask_token") if cfg.mask_id < 0 else cfg.mask_id
    mask_id = mask_id if type(mask_id) is int and 0 <= mask_id < rows else None  # some name it by its text
    tokens = open_tokenizer(cfg, path, "")
    if tokens is None and cfg.tokenizer != "none":
        raise ValueError("Megatron's checkpoints bring no tokenizer: give --tokenizer=gpt2, a tokenizer.json, or none (nothing can be sampled or evaluated then)")
    n_vocab, mask_id = vocabulary(path, tokens, rows, mask_id, args.get("vocab_size") or rows, objective)
    shape["seq_len"] = cfg.seq_len or shape["seq_len"]
    config = ModelConfig(**shape, n_vocab=n_vocab, mask_id=mask_id, causal=objective == "ar")
    drop_tied(config, found, "output_layer.weight", "embedding.word_embeddings.weight", path)
    check(path, {name: tuple(rows if size is None else size for size in shape) for name, shape in megatron.names(config).items()}, found)
    weights = fitted(megatron.to_ours(config, found), config)
    return Source("megatron", megatron.find(path), config, objective, weights, tokens, iteration, lambda ids: megatron.logits(config, found, ids))


def understood(path, function, argument):
    """What `function` makes of settings that somebody else wrote; raises ValueError where they are of strange types."""
    try:
        return function(argument)
    except (TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError, RuntimeError) as problem:
        raise ValueError(f"the settings of {path} can't be understood ({tensors.first_line(problem)})") from None
    except ValueError as problem:
        raise problem if str(path) in str(problem) else ValueError(f"{path}: {problem}") from None


def possible(path, shape, found):
    """Raises ValueError for a shape that no network of these tensors can have."""
    if shape["n_layer"] > len(found) or shape["seq_len"] > 1 << 24:
        raise ValueError(f"{path}: {shape['n_layer']:,} layers and {shape['seq_len']:,} positions are said to be there, in {len(found)} tensors")
    for name, end in (("norm_eps", 1), ("rope_base", math.inf)):
        if not 0 < shape[name] < end:
            raise ValueError(f"{path}: {name}={shape[name]:g} can't be")
    if wrong := [f"{name}={value}" for name, value in shape.items() if name in ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff", "seq_len") and value < 1]:
        raise ValueError(f"{path}: {wrong[0]}")
    if shape["n_head"] % shape["n_kv_head"] or shape["head_dim"] % 2:
        raise ValueError(f"{path}: its settings contradict each other: {shape['n_head']} heads of {shape['head_dim']}, {shape['n_kv_head']} for keys and values")


def resolved(cfg, said, path):
    if cfg.objective not in ("auto", said):
        raise ValueError(f"{path} says that it is objective={said}, not {cfg.objective}")
    return said


def open_tokenizer(cfg, path, known):
    """The tokenizer that was asked for, or the one that lies beside the weights; None for none. Raises ValueError."""
    if cfg.tokenizer == "none":
        return None
    tokens = tokenizers.load_tokenizer(cfg.tokenizer, (), cfg.eos) if cfg.tokenizer else None
    try:
        file = path / "tokenizer.json"
        own = understood(path / "config.json", tokenizers.load_tokenizer, known) if known else tokenizers.load_tokenizer(str(file)) if file.is_file() else None
    except ValueError:
        if tokens is None:
            raise
        return tokens  # what the folder has can't be read: that may be why another is named
    if tokens and own and tokens.n_vocab != own.n_vocab:
        raise ValueError(f"{path} has a tokenizer of {own.n_vocab:,} tokens, '{tokens.name}' has {tokens.n_vocab:,}: not the tokenizer it was trained with")
    return tokens or own


def vocabulary(path, tokens, rows, mask_id, text, objective):
    """(n_vocab, mask_id) of a network whose embedding has `rows`: the tokenizer's, or what the files say; raises ValueError where they contradict.

    mask_id: the mask that the checkpoint was trained with, None if it knows none; text: ids that it takes for text without a tokenizer.
    """
    for what, value in (("mask", mask_id), ("vocabulary", text)):
        if value is not None and (type(value) is not int or not 0 <= value <= rows):
            raise ValueError(f"{path}: its {what} is said to be {value!r}, and its embedding has {rows:,} rows")
    if objective == "ar" and tokens is None:
        return text, text
    if objective == "ar" and tokens.n_vocab > text:
        raise ValueError(f"{path}: its vocabulary has {text:,} tokens, tokenizer '{tokens.name}' {tokens.n_vocab:,}: not the tokenizer it was trained with")
    if objective == "ar":
        mask_id = tokens.mask_id  # never seen
    elif mask_id is None:
        if tokens is None:
            raise ValueError(f"{path}: which id is the mask's? give --mask_id")
        mask_id = tokens.mask_id
    n_vocab = tokens.n_vocab if tokens else mask_id
    if tokens and objective != "ar" and mask_id != tokens.mask_id:
        raise ValueError(f"{path}: its mask has the id {mask_id}, tokenizer '{tokens.name}' puts it at {tokens.mask_id}: not the tokenizer it was trained with")
    if rows < n_vocab or objective != "ar" and rows <= mask_id:
        raise ValueError(f"{path}: {rows:,} rows of embeddings, and tokenizer '{tokens.name if tokens else 'none'}' has {n_vocab:,} tokens" + (" and a mask" if objective != "ar" else "")
                         + ": not the tokenizer it was trained with")
    if tokens and rows - n_vocab >= 4096:
        raise ValueError(f"{path}: {rows:,} rows of embeddings, and tokenizer '{tokens.name}' has {n_vocab:,} tokens only: not the tokenizer it was trained with")
    return n_vocab, mask_id


def skeleton(config):
    with torch.device("meta"):
        return Transformer(config)


def ours_of(config):
    """{our name: shape}."""
    one = skeleton(dataclasses.replace(config, seq_len=1))  # the tables of angles, which are no weights, are left out
    return {name: tuple(p.shape) for name, p in one.named_parameters()}


def with_rows(shape, name, rows):
    return (rows, *shape[1:]) if name in ("embed.weight", "lm_head.weight") else shape


def drop_tied(config, found, head, embedding, path):
    """A tied network's head is its embedding: a copy of it goes. Raises ValueError if it is none."""
    if config.tied and head in found and embedding in found:
        if found[head].shape != found[embedding].shape or not all(map(torch.equal, found[head].parts(), found[embedding].parts())):
            raise ValueError(f"{path}: {head} differs from {embedding}, though the head is said to be tied to it")
        del found[head]


def check(path, wanted, found):
    """Raises ValueError naming the first tensor that lacks, is too much, or has another shape."""
    others = lambda names: f" (and {len(names) - 1} more)" if len(names) > 1 else ""  # noqa: E731
    if lacking := [name for name in wanted if name not in found]:
        raise ValueError(f"{path} has no {lacking[0]}{others(lacking)}")
    if extra := [name for name in found if name not in wanted]:
        raise ValueError(f"{path} has a {extra[0]}{others(extra)}, for which this architecture has no place")
    if wrong := [name for name, shape in wanted.items() if tuple(found[name].shape) != tuple(shape)]:
        raise ValueError(f"{path}: {wrong[0]} is {tuple(found[wrong[0]].shape)}, and should be {tuple(wanted[wrong[0]])}{others(wrong)}")
    if strange := [name for name in wanted if not found[name].dtype.is_floating_point or found[name].dtype.itemsize < 2]:
        raise ValueError(f"{path}: {strange[0]} is {found[strange[0]].dtype}: only float32, bfloat16, float16 and float64 are weights")


def fitted(weights, config):
    """With as many rows of the vocabulary as our network has: what is neither text nor mask goes, or is filled up with zeros."""
    return {name: value.with_rows(config.padded_vocab) if name in ("embed.weight", "lm_head.weight") else value for name, value in weights.items()}


# ------------------------------------------------------------------------------------------------------- writing


def write_ours(out, name, source, weights, alive):
    """A run folder, to be called `name`, with one checkpoint, which sample.py, eval.py and --init_from take like any other."""
    c, tokens = source.config, source.tokens
    if hasattr(tokens, "path"):
        shutil.copyfile(tokens.path, out / "tokenizer.json")
    settings = train.Config(run_dir=name, corpus="", objective=source.objective, seq_len=c.seq_len, tied=c.tied, rope_base=c.rope_base, shift="yes" if c.shift else "auto",
                            **{name: getattr(c, name) for name in ("n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_ff")})
    vocabulary = dict(tokenizer=tokens.name if tokens else "", n_vocab=c.n_vocab, mask_id=c.mask_id, eos_id=tokens.eos_id if tokens else 0)
    record = dict(settings=asdict(settings), model=asdict(c), corpus=vocabulary | dict(train_sha256="", val_sha256=""), samples=0, passed=0, steps=source.step, streak=0,
                  pending=[], step=source.step, updates=0, converted_from=str(source.folder.resolve()))
    (out / "settings.json").write_text(configurator.dump(settings) + "\n")
    place = out / f"step_{source.step:08d}"
    place.mkdir()
    files = write_groups(place, weights, alive)
    record["sha256"] = {name: checkpoint.digest_on_disk(place / name) for name in files}
    record = json.loads(json.dumps(record))
    (place / "checkpoint.json").write_text(json.dumps(dict(record, record_sha256=checkpoint.record_digest(record)), indent=2) + "\n")
    checkpoint.point_to(place)


def write_groups(folder, weights, alive):
    """The weights as safetensors files of at most 5 GB, with an index if there are several; returns their names."""
    groups = checkpoint.file_names({name: value.nbytes for name, value in weights.items()})
    for name, inside in groups.items():
        tensors.write_safetensors(folder / name, {key: weights[key] for key in inside}, alive)
    if len(groups) == 1:
        return list(groups)
    index = dict(metadata=dict(total_size=sum(value.nbytes for value in weights.values())), weight_map={key: name for name, inside in groups.items() for key in inside})
    huggingface.put(folder / "model.safetensors.index.json", index)
    return [*groups, "model.safetensors.index.json"]


def rounded(weights, dtype):
    return weights if dtype == "source" else {name: value.to(DTYPES[dtype], name) for name, value in weights.items()}


def write(cfg, source, to, out):
    """Everything that the conversion leaves behind, in `out`; raises ValueError or OSError."""
    weights = rounded(source.weights, cfg.dtype)
    total = sum(value.nbytes for value in weights.values())
    free = shutil.disk_usage(out).free
    if total > free:
        raise OSError(f"{out.parent}: {total / 1e9:.3g} GB are needed, and {free / 1e9:.3g} GB are free")
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{total / 1e9:.2f} GB", total=total)
        alive = lambda n: bar.advance(task, n)  # noqa: E731
        if to == "ours":
            write_ours(out, cfg.out, source, weights, alive)
        elif to == "hf":
            huggingface.write_beside(out, source.config, source.objective, source.tokens, weights["embed.weight"].dtype)
            write_groups(out, huggingface.from_ours(source.config, source.objective, weights), alive)
        else:
            megatron.write(out, source.config, source.objective, weights, source.tokens.name if source.tokens else "", source.step, cfg.tensor_parallel, cfg.pipeline_parallel, alive)
    return total


# ----------------------------------------------------------------------------------------------------- verifying


@torch.no_grad()
def streamed(config, weights, ids):
    """Logits of our own network, unshifted, with one block at a time in memory. ids (B, L) → (B, L, n_vocab) fp32."""
    layers, config = config.n_layer, dataclasses.replace(config, shift=False, seq_len=ids.shape[1], n_layer=1)
    network = skeleton(config)  # its one block is each in turn
    network.cos, network.sin = (torch.empty(ids.shape[1], config.head_dim // 2) for _ in range(2))
    network.tables()

    def filled(prefix, module):
        module.to_empty(device="cpu").requires_grad_(False).eval()
        module.load_state_dict({name: weights[prefix + name].read().float() for name, _ in module.named_parameters()})
        return module

    x = weights["embed.weight"].read()[ids].float()
    if config.timed:
        x = x + filled("time.", network.time)(torch.full((len(ids),), 0.5))
    for i in range(layers):
        x = filled(f"blocks.{i}.", network.blocks[0])(x, network.cos, network.sin, None)
    head = weights["embed.weight" if config.tied else "lm_head.weight"].read()[: config.n_vocab].float()
    return filled("norm.", network.norm)(x) @ head.T


@torch.no_grad()
def by_transformers(config, weights, ids):
    """Logits of the stock architecture in transformers, unshifted, with one block at a time in memory; raises ValueError. A folder's own code is not run.

    ids (B, L) → (B, L, n_vocab) fp32.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("--verify of a Hugging Face folder needs: pip install '.[hf]'") from None
    both = config.qk_norm and config.qkv_bias  # Qwen3 has biases in all four projections, or none: the fourth is zero then
    about = huggingface.config_of(dataclasses.replace(config, causal=True, shift=False, qkv_bias=config.qkv_bias and not both), "ar", None) | dict(attention_bias=both)
    kind = about["architectures"][0]
    settings = getattr(transformers, kind.replace("ForCausalLM", "Config"))(**about | dict(vocab_size=1, num_hidden_layers=1), attn_implementation="eager")
    network = getattr(transformers, kind)(settings).float().eval().model  # its one block is each in turn; the ends are taken off
    norm, network.norm = network.norm, torch.nn.Identity()
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool)
    allowed = allowed.tril() if config.causal else allowed
    mask = torch.zeros(length, length).masked_fill(~allowed, torch.finfo(torch.float32).min).expand(len(ids), 1, -1, -1)
    x = weights["embed.weight"].read()[ids].float()
    for i in range(config.n_layer):
        named = {huggingface.their_name(name).removeprefix(f"model.layers.{i}."): value for name, value in weights.items() if name.startswith(f"blocks.{i}.")}
        zero = {"self_attn.o_proj.bias": torch.zeros(config.d_model)} if both else {}
        network.layers[0].load_state_dict({name: value.read().float() for name, value in named.items()} | zero)
        x = network(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    norm.weight.copy_(weights["norm.weight"].read())
    head = weights["embed.weight" if config.tied else "lm_head.weight"].read()[: config.n_vocab].float()
    return norm(x) @ head.T


def difference(source, written, dtype):
    """The largest difference of logits relative to their size, source against what was written, on random tokens. Where the dtype was
    changed, in two steps: the source against its weights in our network, and these, rounded, against what was written."""
    c = source.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(c.n_vocab, (2, min(64, c.seq_len)), generator=generator)
    if source.objective != "ar":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, c.mask_id, ids)

    def gap(a, b):
        a, b = a[..., : c.n_vocab], b[..., : c.n_vocab]
        return float((a - b).abs().max() / a.abs().max())

    if dtype == "source":
        return gap(source.logits(ids), written.logits(ids))
    gaps = gap(source.logits(ids), streamed(c, source.weights, ids)), gap(streamed(c, rounded(source.weights, dtype), ids), written.logits(ids))
    return float(torch.tensor(gaps).max())  # NaN, if one is


# ---------------------------------------------------------------------------------------------------------- main


def main():
    if sys.argv[1:2] == ["download"]:
        from interop import download

        return download.main(sys.argv[2:])
    cfg = configurator.load(Config, about=__doc__)
    out, begun = Path(cfg.out), time.perf_counter()
    building = out.with_name(f".{out.name}.{os.getpid()}")
    parents = [parent for parent in out.parents if not parent.exists()]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is half written goes
    try:
        source = open_source(cfg)
        to = cfg.to if cfg.to != "auto" else "hf" if source.kind == "ours" else "ours"
        if source.kind == "ours" and (idle := [name for name in ("tokenizer", "eos", "objective", "mask_id", "seq_len") if getattr(cfg, name) != getattr(Config(), name)]):
            raise ValueError(f"{source.folder} is ours and knows its {idle[0]}: {', '.join('--' + name for name in idle)} is for others' checkpoints")
        if to != "megatron" and (cfg.tensor_parallel, cfg.pipeline_parallel) != (1, 1):
            raise ValueError("tensor_parallel and pipeline_parallel are for --to=megatron")
        if source.objective == "ar" and cfg.mask_id >= 0:
            raise ValueError("mask_id has no meaning for an AR model, which has never seen a mask")
        if to == source.kind == "ours":
            raise ValueError(f"{source.folder} is ours already")
        c = source.config
        n_params = sum(math.prod(value.shape) for value in source.weights.values())
        print(f"{source.folder}: {source.kind}, {source.objective}, {n_params:,} parameters, {c.n_layer} layers of width {c.d_model}, {c.n_head} heads of {c.head_dim}"
              + (f" ({c.n_kv_head} for keys)" if c.n_kv_head < c.n_head else "") + f", {c.n_vocab:,} tokens, mask {c.mask_id}, tokenizer {source.tokens.name if source.tokens else 'none'}", flush=True)
        building.mkdir(parents=True)
        total = write(cfg, source, to, building)
        if cfg.verify:
            written = open_source(dataclasses.replace(cfg, tokenizer="none", mask_id=c.mask_id if source.objective == "masked" else -1), building)
            gap = difference(source, written, cfg.dtype)
            print(f"logits differ by at most {gap:.2g} of the largest (limit {LIMIT:.2g})")
            if not gap <= LIMIT:
                raise ValueError("what was written does not compute what the source computes; nothing is kept")
        building.rename(out)
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    except KeyboardInterrupt:
        print("convert.py: interrupted; nothing is written", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        signal.signal(signal.SIGTERM, before)
        for parent in parents if not out.exists() else ():
            with contextlib.suppress(OSError):
                parent.rmdir()
    print(f"{out}: {total / 1e9:.2f} GB in {time.perf_counter() - begun:.1f} s" + (f"    try: python sample.py --run_dir={out}" if to == "ours" and source.tokens else ""))


if __name__ == "__main__":
    main()
