"""Convert checkpoints between Megatron, Hugging Face, GGUF (read only) and nanoquokka.

    # Megatron → a run of ours; a Hugging Face folder → a run of ours
    python convert.py --source=ckpts/1024_96b_1e_1b_ar --tokenizer=gpt2 --out=runs/imported
    python convert.py --source=Qwen3-0.6B --out=runs/qwen3
    python convert.py --source=SmolLM2-135M-Instruct.Q4_1.gguf --out=runs/smollm2      # llama.cpp's format

    # ours → a Hugging Face folder; as servers take it (docs/serving.md); ours → Megatron's torch format
    python convert.py --source=runs/quickstart --out=exported
    python convert.py --source=runs/blocks --to=sdar --out=served
    python convert.py --source=runs/quickstart --to=megatron --tensor_parallel=2 --out=mp

    # with settings of their own (--help): get a folder of a hub; the mean of several checkpoints of ours
    python convert.py download OWNER/NAME --folder=…
    python convert.py average --checkpoints=runs/a,runs/b --out=runs/mean

One process does it, without any of the programs that wrote the source. The source's files tell its format;
nothing in them is run. At most one tensor is in memory (writing Megatron's format: and one rank's file; of a
mean: three).
"""

import terminal  # isort: skip  # first: Ctrl-C during the imports

import dataclasses
import math
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

import configurator
from configurator import setting, split
from interop import download, gguf_files, huggingface, mean, megatron, native, sdar, verify
from interop.source import cast_weights, keep_layers, new_folder
from training.record import MAX_SIZE

LIMIT = 1e-4  # of --verify, which computes in float32 whatever the weights are


@dataclass
class Config:
    source: str = setting(
        "", "what to convert: a run or checkpoint of ours, a Hugging Face folder, a Megatron run (its latest "
        "iteration) or iteration, a .gguf file")
    weights: Literal["auto", "ema", "raw"] = setting(
        "auto", "of a run of ours: the averaged ones, those of training, or the first that it has")
    out: str = setting("", "folder to write, which must not exist")
    to: Literal["auto", "ours", "hf", "sdar", "megatron"] = setting(
        "auto", "format to write (auto: ours; hf if the source is ours); sdar: a block-diffusion model as "
        "SGLang and LMDeploy serve it")
    tokenizer: str = setting(
        "", "a tiktoken encoding such as gpt2, a tokenizer.json, or none (empty: the source's own)")
    eos: str = setting("", "of a tokenizer.json, or a .gguf file's tokenizer: the token that ends a document")
    objective: Literal["auto", "masked", "ar"] = setting(
        "auto", "what the source was trained for, where its files don't say")
    mask_id: int = setting(-1, "the mask's id, where neither the source nor its tokenizer knows it", low=-1)
    seq_len: int = setting(0, "longest sequence (0: as the source says)", low=0, high=MAX_SIZE)
    layers: str = setting(
        "", "keep only these layers, numbers from 0 with commas: a smaller model to try things with")
    dtype: Literal["source", "float32", "bfloat16", "float16"] = setting(
        "source", "of the weights that are written")
    tensor_parallel: int = setting(1, "of Megatron: ranks that share each layer", low=1)
    pipeline_parallel: int = setting(1, "of Megatron: ranks that share the layers", low=1)
    verify: bool = setting(
        False, "compare the logits of the result with the source's on random tokens; where they differ, "
        "nothing is written")

    NEEDS = {
        "tensor_parallel": "to=auto|megatron",
        "pipeline_parallel": "to=auto|megatron",
    }

    def problems(self):
        """Other settings that can't be, one line each."""
        wrong = [f"give --{name}" for name in ("source", "out") if not getattr(self, name)]
        layers = split(self.layers)
        if not all(n.isascii() and n.isdecimal() for n in layers) or len(set(layers)) < len(layers):
            wrong.append(f"layers={self.layers}: expected different numbers from 0, with commas between")
        source, out = Path(self.source), Path(self.out)
        if self.source and not source.is_dir() and not gguf_files.is_checkpoint(source):
            problem = "a file; name its folder" if source.exists() else "no such folder"
            wrong.append(f"source={source}: {problem}")
        if self.source and self.out and source.resolve() in out.resolve().parents:
            wrong.append(f"out={out} lies within the source")
        if self.out and out.exists():
            wrong.append(f"out={out} exists; nothing is overwritten")
        return wrong

    def n_ranks(self):
        return self.tensor_parallel * self.pipeline_parallel


def main():
    for name, other in dict(download=download, average=mean).items():
        if sys.argv[1:2] == [name]:
            return other.main(sys.argv[2:])
    cfg = configurator.load(Config, about=__doc__)
    terminal.keep_going()
    start = time.perf_counter()
    try:
        with new_folder(Path(cfg.out)) as folder:
            source = open_source(cfg, Path(cfg.source))
            to = target_format(cfg, source)
            if cfg.layers:
                source = keep_layers(source, list(map(int, split(cfg.layers))))
            print(summary(source), flush=True)
            n_bytes = write(cfg, source, to, folder)
            if cfg.verify:
                check_logits(cfg, source, folder)
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    except KeyboardInterrupt:
        print("convert.py: interrupted; nothing is written", file=sys.stderr)
        raise SystemExit(130) from None
    hint = ""
    for line in sdar.served_otherwise(source.config) if to == "sdar" else ():
        print(f"note: {line}")
    if to == "ours" and source.tokenizer:
        hint = f"    try: python sample.py --run_dir={shlex.quote(cfg.out)}"
    print(f"{cfg.out}: {n_bytes / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s{hint}")


def open_source(cfg, path):
    """The Source in a folder of any known format; raises ValueError or OSError."""
    if native.is_checkpoint(path):
        return native.open_source(path, cfg.weights)
    if cfg.weights != "auto":
        raise ValueError(f"weights={cfg.weights} is for runs of ours; {path} has weights of one kind")
    if gguf_files.is_checkpoint(path):
        return gguf_files.open_source(cfg, path)
    if huggingface.is_checkpoint(path):
        return huggingface.open_source(cfg, path)
    if megatron.is_checkpoint(path):
        return megatron.open_source(cfg, path)
    raise ValueError(f"{path} is no checkpoint that is known: it is no run of ours, and has no config.json "
                     "(Hugging Face), latest_checkpointed_iteration.txt, .metadata or mp_rank_* (Megatron)")


def target_format(cfg, source):
    """ours, hf or megatron; raises ValueError for settings that don't go with the source."""
    to = cfg.to
    if to == "auto":
        to = "hf" if source.format == "ours" else "ours"
    foreign = ("tokenizer", "eos", "objective", "mask_id", "seq_len")
    needless = [name for name in foreign if name in configurator.changed(cfg)]
    if source.format == "ours" and needless:
        flags = ", ".join(f"--{name}" for name in needless)
        raise ValueError(f"{source.folder} is ours and knows its {needless[0]}: {flags} is for others' "
                         "checkpoints")
    if source.format == to == "ours" and not cfg.layers:
        raise ValueError(f"{source.folder} is ours already")
    if to != "megatron" and cfg.n_ranks() > 1:
        raise ValueError("tensor_parallel and pipeline_parallel are for --to=megatron")
    if source.objective == "ar" and cfg.mask_id >= 0:
        raise ValueError("mask_id has no meaning for an AR model, which has never seen a mask")
    return to


def summary(source):
    """A source in one line."""
    c = source.config
    n_params = sum(math.prod(tensor.shape) for tensor in source.weights.values())
    keys = f" ({c.n_kv_head} for keys)" if c.n_kv_head < c.n_head else ""
    tokenizer = source.tokenizer.name if source.tokenizer else "none"
    return (f"{source.folder}: {source.format}, {source.objective}, {n_params:,} parameters, "
            f"{c.n_layer} layers of width {c.d_model}, {c.n_head} heads of {c.head_dim}{keys}, "
            f"{c.n_vocab:,} tokens, mask {c.mask_id}, tokenizer {tokenizer}")


def write(cfg, source, to, folder):
    """Write a source in the format `to` into `folder`; returns the bytes of its weights.

    Raises ValueError or OSError.
    """
    weights = cast_weights(source.weights, cfg.dtype)
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    n_free = shutil.disk_usage(folder).free
    if n_bytes > n_free:
        raise OSError(f"{folder.parent}: {n_bytes / 1e9:.3g} GB are needed, {n_free / 1e9:.3g} GB are free")
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        on_progress = partial(bar.advance, bar.add_task(f"{n_bytes / 1e9:.2f} GB", total=n_bytes))
        if to == "ours":
            native.write(folder, cfg.out, source, weights, on_progress)
        elif to == "hf":
            huggingface.write(folder, source, weights, on_progress)
        elif to == "sdar":
            sdar.write(folder, source, weights, on_progress)
        else:
            megatron.write(folder, source, weights, cfg.tensor_parallel, cfg.pipeline_parallel, on_progress)
    return n_bytes


def check_logits(cfg, source, folder):
    """Raise ValueError if what was written into `folder` computes other logits than the source."""
    mask_id = source.config.mask_id if source.objective == "masked" else -1
    written = open_source(dataclasses.replace(cfg, tokenizer="none", mask_id=mask_id, weights="auto"), folder)
    difference = verify.max_difference(source, written, cfg.dtype)
    print(f"logits differ by at most {difference:.2g} of the largest (limit {LIMIT:.2g})")
    if not difference <= LIMIT:  # NaN, too
        raise ValueError("what was written does not compute what the source computes; nothing is kept")


if __name__ == "__main__":
    terminal.run(main)
