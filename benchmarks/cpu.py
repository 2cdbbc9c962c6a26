"""The parts of `bench.py --suite=cpu`: training steps, attention's choice, the host's work, preparation.

Each has a text for the report and a function of bench.py's settings and the device (`PARTS`).
"""

import contextlib
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import data
import diffusion
import kernels
from benchmarks.common import ROOT, Part, speedup, spread, table, take_turns
from benchmarks.training import TrainingStep, model_shape, plain_step
from corpus import python_docs, tokenfiles, tokenizers
from training import transfer


def dtypes(device):
    """fp32, and bf16 where the hardware multiplies it itself."""
    names = {"fp32": torch.float32}
    return names | {"bf16": torch.bfloat16} if kernels.has_bf16(device) else names


# ----------------------------------------------------------------------------------------------------- steps


SHAKESPEARE_TEXT = (
    "AR at nanoGPT's Shakespeare-CPU shape (4 layers, 4 heads, 128 wide, 12 rows of 64, 65 tokens), as "
    "train.py runs it (bf16 where the CPU multiplies it itself) and in fp32, against plain steps in fp32.")


def shakespeare(cfg, device):
    """Time AR steps, ours and plain ones."""
    rows, shape = 12, dict(n_layer=4, n_head=4, d_model=128, n_vocab=65, seq_len=64)
    if cfg.smoke:
        rows, shape["n_layer"] = 2, 1

    config = model_shape(**shape, causal=True)
    rivals = {}
    for name, dtype in reversed(dtypes(device).items()):
        rivals[f"ours, {name}"] = TrainingStep(config, "ar", rows, device, dtype)
    ours = list(rivals)
    for compiled in ("eager", "compiled"):
        for adamw in ("ordinary", "fused"):
            step = plain_step(compiled == "compiled", adamw == "fused", rows, **shape)
            rivals[f"plain, {compiled}, {adamw} AdamW"] = step

    times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 20)
    lines = []
    for name, t in times.items():
        speedups = [""] * len(ours)
        if name not in ours:
            speedups = [speedup(t, times[own]) for own in ours]
        lines.append([name, spread(t), f"{rows * 64 / np.median(t):.1f}", *speedups])
    return table(["step", "ms", "K tokens/s", *(f"{name}: faster by" for name in ours)], lines)


GATHERED_TEXT = (
    "A masked step at V = 50 304 that computes what follows the last attention, head and loss for the "
    "masked positions only, against the same step at all positions.")


def gathered(cfg, device):
    """Time a masked step with the head at masked positions, and with the head at all."""
    rows, n_vocab, seq_len = 16, 50_303, 256
    if cfg.smoke:
        rows, n_vocab, seq_len = 4, 500, 32
    config = model_shape(5, 4, 128, n_vocab, seq_len, causal=False)

    lines = []
    for dtype in dtypes(device).values():
        rivals = {
            "gathered": TrainingStep(config, "masked", rows, device, dtype),
            "full": TrainingStep(config, "masked", rows, device, dtype, full_head=True),
        }
        times = take_turns(rivals, device, max(2, cfg.rounds // 2))
        for name, t in times.items():
            faster = speedup(times["full"], t) if name == "gathered" else ""
            tokens_per_ms = rivals[name].tokens / np.median(t)
            lines.append([str(dtype)[6:], name, spread(t, 0), f"{tokens_per_ms:.2f}", faster])
    n_params = rivals["full"].network.n_params(False)
    results = table(["type", "head", "ms", "K tokens/s", "gathered is faster by"], lines)
    return f"{n_params:,} parameters without the embedding\n\n{results}"


BF16_TEXT = (
    "A masked step in bf16 (where the CPU multiplies it itself) against fp32: about 1M parameters, V = "
    "256, 16 rows of 256.")


def bf16(cfg, device):
    """Time a masked step in bf16 and in fp32."""
    if not kernels.has_bf16(device):
        return "This CPU has no bf16.\n"
    rows, seq_len = (4, 32) if cfg.smoke else (16, 256)
    config = model_shape(5, 4, 128, 255, seq_len, causal=False)
    rivals = {
        name: TrainingStep(config, "masked", rows, device, dtype) for name, dtype in dtypes(device).items()
    }
    times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 3)

    lines = []
    for name, t in times.items():
        faster = "" if name == "bf16" else speedup(t, times["bf16"])
        lines.append([name, spread(t, 0), f"{rows * seq_len / np.median(t):.1f}", faster])
    return table(["type", "ms", "K tokens/s", "bf16 is faster by"], lines)


BLOCKS_TEXT = (
    "A step of block diffusion, which reads every row twice, against one of full diffusion at equal rows: "
    "nanoGPT's CPU shape (4 layers of 128, 12 rows of 64), and rows of 256.")


def blocks(cfg, device):
    """Time steps of block diffusion in blocks of several sizes."""
    lines = []
    for seq_len, rows in ((32, 4),) if cfg.smoke else ((64, 12), (256, 6)):
        config = model_shape(4, 4, 128, 256, seq_len, causal=False)
        rivals = {}
        for size in (0, 4, 16):
            own = dataclasses.replace(config, diffusion_block=size)
            rivals[size] = TrainingStep(own, "masked", rows, device, torch.float32)
        times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 10)
        for size, t in times.items():
            slower = speedup(t, times[0]) if size else ""
            speed = f"{rows * seq_len / np.median(t):.1f}"
            lines.append([f"{rows} × {seq_len}", size or "the row", spread(t, 1), speed, slower])
    return table(["rows", "block", "ms", "K tokens/s", "of full diffusion's time"], lines)


OPTIMIZERS_TEXT = (
    "A step with AdamW and with Muon, without and with a moving average of the weights, at nanoGPT's CPU "
    "shape (4 layers of 128, 12 rows of 64). Muon's own work does not grow with the tokens of a step: here "
    "there are few.")


def optimizers(cfg, device):
    """Time steps with each optimizer."""
    rows, seq_len = (4, 32) if cfg.smoke else (12, 64)
    lines = []
    for objective in ("ar", "masked", "uniform"):
        config = model_shape(4, 4, 128, 256, seq_len, causal=objective == "ar")
        config = dataclasses.replace(config, timed=objective == "uniform")
        for name, dtype in dtypes(device).items():
            torch._dynamo.reset()
            rivals = {}
            for optimizer, ema in itertools.product(("adamw", "muon"), (0.0, 0.99)):
                step = TrainingStep(config, objective, rows, device, dtype, optimizer=optimizer, ema=ema)
                rivals[optimizer + ", averaged" * bool(ema)] = step
            times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 10)
            for rival, t in times.items():
                slower = "" if rival == "adamw" else speedup(t, times["adamw"])
                lines.append([objective, name, rival, spread(t, 1), slower])
    return table(["objective", "type", "optimizer", "ms", "of AdamW's time"], lines)


CHOICES_TEXT = "The choice in kernels.py that holds on a CPU: attention by plain products for short rows."


def choices(cfg, device):
    """Time steps with each kind of attention, for rows of several lengths."""
    lines = []
    for dtype in dtypes(device).values():
        for seq_len in (32,) if cfg.smoke else (64, 128, 256, 512, 1024):
            torch._dynamo.reset()  # it compiles the same code 8 times at most
            config = model_shape(2, 4, 128, 255, seq_len, causal=False)
            rows = max(1, 4096 // seq_len)
            rivals = {}
            for name, longest in (("plain products", 10**9), ("flash", 0)):
                step = TrainingStep(config, "masked", rows, device, dtype)
                rivals[name] = with_plain_attention(step, longest)
            times = take_turns(rivals, device, cfg.rounds // 2)

            chosen = "plain products" if seq_len <= kernels.PLAIN_ATTENTION_UP_TO[dtype] else "flash"
            plain, flash = times["plain products"], times["flash"]
            what = f"{str(dtype)[6:]}, rows of {seq_len}"
            lines.append([what, chosen, spread(plain, 1), spread(flash, 1), speedup(plain, flash)])
    return table(["masked step, two layers, 4096 tokens", "chosen here", "ms (plain products)", "ms (flash)",
                  "flash is faster by"], lines)


def with_plain_attention(step, longest):
    """`step` with attention by plain products for rows of at most `longest` positions."""
    lengths = dict.fromkeys(kernels.PLAIN_ATTENTION_UP_TO, longest)

    def run():
        with mock.patch.object(kernels, "PLAIN_ATTENTION_UP_TO", lengths):
            step()

    return run


# -------------------------------------------------------------------------------------------------- the host


HOST_TEXT = (
    "What the host does per 65 536 tokens while the device computes: read rows, draw noise, find the "
    "masked positions (one thread).")


def host(cfg, device):
    """Time how the host makes batches."""
    rows, seq_len = (4, 64) if cfg.smoke else (32, 2048)
    n_batches = 30  # at hand; they are read again and again
    tokens = np.random.default_rng(0).integers(0, 50_257, 40 * rows * seq_len).astype(np.uint16)
    sequences = data.Sequences(tokens, seq_len, seed=1)

    lines = []
    for objective, loss in (("ar", "elbo"), ("masked", "elbo"), ("uniform", "elbo"), ("uniform", "paper")):
        process = diffusion.Process(objective, 50_257, 50_257, seq_len, loss=loss)
        counter = itertools.count()

        def make_batch(process=process, counter=counter):
            first = next(counter) % n_batches * rows
            levels = diffusion.noise_levels(process, first, rows)
            x = sequences.rows(first + np.arange(rows))
            transfer.to_tensors(diffusion.make_batch(process, x, levels, np.arange(rows)))

        t = take_turns({"ours": make_batch}, device, cfg.rounds, 3)["ours"]
        lines.append([objective, loss, spread(t), f"{rows * seq_len / np.median(t) / 1e3:.1f}"])
    return table(["objective", "loss", "ms", "M tokens/s"], lines)


LOADING_TEXT = (
    "Batches of (8, 2048) tokens from a file in the page cache, on one core: ours (int32, each block with "
    "the token before it, every epoch exact) beside nanoGPT's get_batch (int64, inputs and targets, "
    "positions at random), as nanoGPT documents it.")


def loading(cfg, device):
    """Time how batches are read from a file, ours and nanoGPT's."""
    seq_len, rows, n_batches = 2048, 8, 64
    n_tokens = 10**6 if cfg.smoke else 10**8
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(0, 50_257, n_tokens).astype(np.uint16).tofile(path)
        stream = tokenfiles.Stream([np.memmap(path, np.uint16, mode="r")])
        sequences = data.Sequences(stream, seq_len, seed=1, n_vocab=50_257)

        def ours():
            ids = sequences.ids(np.arange(n_batches * rows))  # as train.py: for 64 steps at once
            for batch in range(n_batches):
                sequences.read(ids[batch * rows : (batch + 1) * rows])

        def nanogpt():
            for _ in range(n_batches):
                tokens = np.memmap(path, dtype=np.uint16, mode="r")
                starts = torch.randint(len(tokens) - seq_len, (rows,))
                for shift in (0, 1):  # inputs, targets
                    rows_of = (tokens[i + shift : i + shift + seq_len] for i in starts)
                    torch.stack([torch.from_numpy(row.astype(np.int64)) for row in rows_of])

        for _ in range(20):
            ours()  # into the page cache
        times = take_turns({"ours": ours, "nanoGPT's get_batch": nanogpt}, device, cfg.rounds)
    torch.set_num_threads(threads)

    lines = []
    for name, t in times.items():
        faster = "" if name == "ours" else speedup(t, times["ours"])
        speed = rows * seq_len * n_batches / np.median(t) / 1e3
        lines.append([name, spread(t / n_batches * 1e3, 1), f"{speed:.0f}", faster])
    return table(["by", "µs per batch", "M tokens/s", "ours is faster by"], lines)


# ----------------------------------------------------------------------------------------------- preparation


PREPARE_TEXT = (
    "`python data.py` on 200 MB of JSON lines (documentation of this Python, GPT-2's BPE) on all cores, "
    "from its start to its end, against tiktoken's own encode_ordinary_batch in one thread on the same "
    "documents in memory. Memory: of all its processes, shared pages once.")


def prepare(cfg, device):
    """Time data.py and tiktoken on the same text."""
    try:
        encoding = tokenizers.load_tokenizer("gpt2").encoding
    except ValueError as problem:
        return f"{problem}\n"
    texts = documents(10**6 if cfg.smoke else 2 * 10**8)

    before = tiktoken_speed(encoding, texts[: len(texts) // 4])
    seconds, most = run_preparation(texts)
    after = tiktoken_speed(encoding, texts[-len(texts) // 4 :])

    speed = n_bytes(texts) / seconds / 1e6
    rival = [before, after]
    faster = f"{speed / np.mean(rival):.2f} [{speed / max(rival):.2f}, {speed / min(rival):.2f}] ×"
    return table(["by", "MB/s", "MiB of memory", "ours is faster by"], [
        ["ours", f"{speed:.2f}", f"{most / 2**20:.0f}", ""],
        ["tiktoken, one thread (before and after)", spread(rival), "", faster],
    ])


def documents(size):
    """Documents of at least `size` bytes together: Python's documentation, again and again, each numbered."""
    texts = []
    for number, text in enumerate(itertools.cycle(python_docs.documents())):
        texts.append(f"Document {number}.\n{text}")
        size -= len(texts[-1].encode())
        if size <= 0:
            return texts


def n_bytes(texts):
    return sum(len(text.encode()) for text in texts)


def tiktoken_speed(encoding, texts):
    """MB/s of tiktoken in one thread."""
    start = time.perf_counter()
    encoding.encode_ordinary_batch(texts, num_threads=1)
    return n_bytes(texts) / (time.perf_counter() - start) / 1e6


def run_preparation(texts):
    """Run data.py on texts as JSON lines; its seconds and the most bytes that its processes held."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(text=text)) + "\n" for text in texts)
        command = [sys.executable, str(ROOT / "data.py"), str(path), f"--out={folder}", "--name=made",
                   "--tokenizer=gpt2"]
        start, most = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"data.py ended with {process.returncode}")
    return seconds, most


def memory_of(pid):
    """Bytes that a process and its children hold, pages that they share counted once (Linux; else 0)."""
    total = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children = (thread / "children").read_text(encoding="utf-8").split()
            total += sum(memory_of(child) for child in children)
    return total


PARTS = dict(
    shakespeare=Part(shakespeare, SHAKESPEARE_TEXT),
    gathered=Part(gathered, GATHERED_TEXT),
    bf16=Part(bf16, BF16_TEXT),
    blocks=Part(blocks, BLOCKS_TEXT),
    optimizers=Part(optimizers, OPTIMIZERS_TEXT),
    choices=Part(choices, CHOICES_TEXT),
    host=Part(host, HOST_TEXT),
    loading=Part(loading, LOADING_TEXT),
    prepare=Part(prepare, PREPARE_TEXT),
)
