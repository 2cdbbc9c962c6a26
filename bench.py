"""Where every claim about speed comes from.

    python bench.py                  # what a CPU can show, about ten minutes on two cores
    python bench.py --suite=gpu      # kernels, attention, whole training steps and where their time goes: about 40 minutes

Rivals take turns in rounds on the same data, so that a machine that slows down slows all of them; a ratio is the
median of the rounds' own ratios. Writes results/<suite>.md with what is needed to repeat it.
"""

import contextlib
import datetime
import functools
import gc
import inspect
import itertools
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import configurator
import data
import diffusion
import kernels
from configurator import setting
from configurator.ladder import ladder, swiglu_width
from corpus import sources, tokenfiles, tokenizers
from model import ModelConfig, Transformer
from training import dryrun, memory, transfer, update


@dataclass
class Config:
    suite: Literal["cpu", "gpu"] = setting("cpu", "what to measure")
    only: str = setting("", "parts to run, separated by commas (empty: all; a wrong name lists them)")
    rows: str = setting("", "rows of the steps table (and models of the profile) to run, separated by commas: what their label contains, as in 1.7B,ar (empty: all)")
    predict: bool = setting(True, "predict each row's memory, too, up to half a minute of the host")
    rounds: int = setting(20, "rounds in which rivals take turns", low=2)
    warmup: int = setting(20, "untimed steps before a whole training step is timed on a GPU", low=3)
    steps: int = setting(50, "timed steps of a whole training step on a GPU", low=3)
    out: str = setting("results", "folder for the tables (empty: only print them)")
    smoke: bool = setting(False, "tiny sizes, on any machine: whether it works, not how fast")

    def problems(self):
        wrong = [name for name in self.only.split(",") if name and name not in PARTS[self.suite]]
        unknown = [f"only={name}: no such part; there are {', '.join(PARTS[self.suite])}" for name in wrong]
        if self.suite == "gpu" and not torch.cuda.is_available() and not self.smoke:
            unknown.append("suite=gpu needs a GPU")
        return unknown


# ------------------------------------------------------------------------------------------------- measuring


def milliseconds(run, device, repeats=1):
    """Time of one call of `run`, averaged over `repeats` calls in a row."""
    start = transfer.timestamp(device)
    for _ in range(repeats):
        run()
    end = transfer.timestamp(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return transfer.seconds_between(start, end) * 1e3 / repeats


def take_turns(rivals, device, rounds, repeats):
    """{name: (rounds,) milliseconds} of functions that take turns; each has been called before the clock starts."""
    for run in rivals.values():
        for _ in range(3):
            run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    times = {name: [] for name in rivals}
    for turn in range(rounds):
        names = list(rivals)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(milliseconds(rivals[name], device, repeats))
    return {name: np.array(t) for name, t in times.items()}


def spread(values, digits=2):
    """Median and range as text."""
    return f"{np.median(values):.{digits}f} [{np.min(values):.{digits}f}, {np.max(values):.{digits}f}]"


def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------- a whole training step


@functools.cache
def real_tokens(n_vocab):
    """The documentation inside this Python as ids: words and signs by rank of frequency, what is rarer than n_vocab as its last."""
    words = [w for text in sources.python_docs() for w in re.findall(r"\w+|\s+|[^\w\s]", text)]
    rank = {w: min(i, n_vocab - 1) for i, (w, _) in enumerate(Counter(words).most_common())}
    return np.array([rank[w] for w in words])


class Step:
    """A training step as train.py takes it, on a few batches of real tokens in turn."""

    def __init__(self, config, objective, rows, device, dtype, how="whole", full_head=False, plain_loss=False, n_batches=4,
                 cuda_graphs=False, short_rows=0.0, **use):
        torch.manual_seed(0)
        process = diffusion.Process(objective, config.n_vocab, config.mask_id, config.seq_len, short_rows=short_rows)
        blocks = data.Sequences(real_tokens(config.n_vocab), config.seq_len, seed=1)
        levels = [diffusion.noise_levels(process, i * rows, rows) for i in range(n_batches)]
        shares = [float(level.count.mean()) / config.seq_len if objective == "masked" else 1.0 for level in levels]
        arrays = [diffusion.make_batch(process, blocks.read(blocks.ids(np.arange(rows) + i * rows)), level, level.deal(0, 1))
                  for i, level in enumerate(levels)]
        if full_head or plain_loss:
            arrays, shares = [at_every_position(batch) for batch in arrays], [1.0] * n_batches
        with device:
            self.network = Transformer(config).init_weights().use(**use)
        objective = update.Objective(self.network, False)
        if plain_loss:
            objective.loss_of = full_logits_loss
        self.objective = update.compile_and_wrap(objective, how, cuda_graphs=cuda_graphs)
        self.optimizer = update.make_optimizer(self.network, 2e-4, (0.9, 0.95), 0.1)
        self.batches = [transfer.to_device(transfer.to_tensors(a, False), device) for a in arrays]
        self.tokens, self.calls, self.cuda_graphs = rows * config.seq_len, 0, cuda_graphs
        self.record = torch.zeros(2, device=device)
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.share = float(np.mean(shares))  # of the positions, those with a head
        self.example, self.example_share = arrays[0], shares[0]

    def __call__(self):
        self.record.zero_()
        batch = self.batches[self.calls % len(self.batches)]
        self.calls += 1
        update.optimizer_step(self.objective, self.optimizer, iter([batch]), 1, self.record, 1.0, self.autocast, cuda_graphs=self.cuda_graphs)


def full_logits_loss(hidden, head, batch, n_vocab, posterior=False):
    """The loss as one would write it without kernels: fp32 logits at every position."""
    nats = F.cross_entropy(kernels.head_logits(hidden.flatten(0, -2), head, n_vocab), batch.targets, reduction="none")
    return (nats * batch.weights[:, 0]).sum(), (nats.detach()[:, None] * batch.weights).sum(0)


def at_every_position(batch):
    """A masked batch for which the whole network, its head and loss run at all positions, with weight 0 where nothing is masked."""
    if batch.index is None:
        return batch
    weights, targets = np.zeros((batch.tokens.size, 1), np.float32), np.zeros(batch.tokens.size, np.int64)
    real = batch.weights[:, 0] > 0
    weights[batch.index[real]], targets[batch.index[real]] = batch.weights[real], batch.targets[real]
    return batch._replace(weights=weights, targets=targets, index=None)


def counted_flops(config, rows, example):
    """FLOPs per token of forward and backward pass by torch's own counter, on tensors without values; attention counted in full.

    The counter sees what a batch is padded to, so `example` is cut to the positions that count.
    """
    if example.index is not None:
        real = example.weights[:, 0] > 0
        example = example._replace(index=example.index[real], targets=example.targets[real], weights=example.weights[real])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network = Transformer(config)
        batch = diffusion.Batch(*(None if t is None else fake.from_tensor(t) for t in transfer.to_tensors(example, False)))
        update.Objective(network, False)(batch)[0].backward()
    return counter.get_total_flops() / (rows * config.seq_len)


# -------------------------------------------------------------------------------------------------- on a CPU


class PlainBlock(nn.Module):
    """A block as nanoGPT's users know it: LayerNorm, GELU, learned positions elsewhere, no biases."""

    def __init__(self, d, n_head):
        super().__init__()
        self.n_head = n_head
        self.norms = nn.ModuleList(nn.LayerNorm(d, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.up, self.down = nn.Linear(d, 4 * d, bias=False), nn.Linear(4 * d, d, bias=False)

    def forward(self, x):
        B, L, d = x.shape
        q, k, v = (t.view(B, L, self.n_head, -1).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, L, d))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class PlainGPT(nn.Module):
    def __init__(self, n_layer, n_head, d, n_vocab, seq_len):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_vocab, d), nn.Embedding(seq_len, d)
        self.blocks = nn.Sequential(*(PlainBlock(d, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(d, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        h = self.norm(self.blocks(self.tokens(x) + self.positions.weight))
        return F.cross_entropy(F.linear(h, self.tokens.weight).flatten(0, 1), y.flatten())


def plain_step(compile, fused, rows, seq_len, n_vocab, **shape):
    """A training step in nanoGPT's style: fp32, AdamW (on a CPU not fused), clipping, a cross-entropy over all logits."""
    torch.manual_seed(0)
    network = PlainGPT(n_vocab=n_vocab, seq_len=seq_len, **shape)
    matrices, others = ([p for p in network.parameters() if (p.dim() >= 2) == which] for which in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)],
                                  lr=1e-3, betas=(0.9, 0.99), fused=fused)
    forward = torch.compile(network) if compile else network
    blocks = data.Sequences(real_tokens(n_vocab), seq_len, seed=1)
    batches = [torch.from_numpy(blocks.read(blocks.ids(np.arange(rows) + i * rows)).astype(np.int64)) for i in range(4)]
    calls = iter(range(10**9))

    def run():
        x = batches[next(calls) % 4]
        forward(x[:, :-1].contiguous(), x[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


CPU = torch.device("cpu")


def shape_of(n_layer, n_head, d_model, n_vocab, seq_len, causal, tied=True):
    return ModelConfig(n_layer, n_head, n_head, d_model // n_head, d_model, swiglu_width(d_model), n_vocab, n_vocab, seq_len, causal, tied)


def cpu_shakespeare(cfg):
    """AR at nanoGPT's Shakespeare-CPU shape (4 layers, 4 heads, 128 wide, 12 rows of 64, 65 tokens), as train.py runs it (bf16 where the
    CPU multiplies it itself) and in fp32, against plain steps in fp32."""
    rows, shape = (2, dict(n_layer=1, n_head=4)) if cfg.smoke else (12, dict(n_layer=4, n_head=4))
    config = shape_of(**shape, d_model=128, n_vocab=65, seq_len=64, causal=True)
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32} if kernels.has_bf16(CPU) else {"fp32": torch.float32}
    rivals = {f"ours, {name}": Step(config, "ar", rows, CPU, dtype) for name, dtype in dtypes.items()}
    ours = list(rivals)
    for compile in (False, True):
        for fused in (False, True):
            name = f"plain, {'compiled' if compile else 'eager'}, {'fused' if fused else 'ordinary'} AdamW"
            rivals[name] = plain_step(compile, fused, rows, 64, 65, d=128, **shape)
    times = take_turns(rivals, CPU, cfg.rounds, 1 if cfg.smoke else 20)
    return table(["step", "ms", "K tokens/s", *(f"{name}: faster by" for name in ours)], [
        [name, spread(t), f"{rows * 64 / np.median(t):.1f}", *("" if name in ours else f"{spread(t / times[o])} ×" for o in ours)]
        for name, t in times.items()])


def cpu_gathered(cfg):
    """A masked step at V = 50 304 that computes what follows the last attention, head and loss for the masked positions only, against
    the same step at all positions."""
    config = shape_of(5, 4, 128, 50_303 if not cfg.smoke else 500, 256 if not cfg.smoke else 32, False)
    rows, lines = 4 if cfg.smoke else 16, []
    for dtype in (torch.float32, torch.bfloat16) if kernels.has_bf16(CPU) else (torch.float32,):
        rivals = {name: Step(config, "masked", rows, CPU, dtype, full_head=full) for name, full in (("gathered", False), ("full", True))}
        times = take_turns(rivals, CPU, max(2, cfg.rounds // 2), 1)
        for name, t in times.items():
            lines.append([str(dtype)[6:], name, spread(t, 0), f"{rivals[name].tokens / np.median(t):.2f}",
                          f"{spread(times['full'] / t)} ×" if name == "gathered" else ""])
    return f"{rivals['full'].network.n_params(False):,} parameters without the embedding\n\n" + table(
        ["type", "head", "ms", "K tokens/s", "gathered is faster by"], lines)


def cpu_bf16(cfg):
    """A masked step in bf16 (where the CPU multiplies it itself) against fp32: about 1M parameters, V = 256, 16 rows of 256."""
    if not kernels.has_bf16(CPU):
        return "This CPU has no bf16.\n"
    config = shape_of(5, 4, 128, 255, 256 if not cfg.smoke else 32, False)
    rivals = {name: Step(config, "masked", 4 if cfg.smoke else 16, CPU, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    tokens = rivals["fp32"].tokens
    rivals[f"fp32, by {'MKL' if kernels.ONEDNN else 'oneDNN'}"] = with_choice(Step(config, "masked", 4 if cfg.smoke else 16, CPU, torch.float32), ONEDNN=not kernels.ONEDNN)
    times = take_turns(rivals, CPU, cfg.rounds, 1 if cfg.smoke else 3)
    return table(["type", "ms", "K tokens/s", "bf16 is faster by"], [
        [name, spread(t, 0), f"{tokens / np.median(t):.1f}", "" if name == "bf16" else f"{spread(t / times['bf16'])} ×"]
        for name, t in times.items()])


def with_choice(run, **choice):
    """`run` under another choice among those that kernels.py makes; what is compiled for one choice is not used for another."""

    def chosen():
        before = {name: getattr(kernels, name) for name in choice}
        try:
            for name, value in choice.items():
                setattr(kernels, name, value)
            run()
        finally:
            for name, value in before.items():
                setattr(kernels, name, value)

    return chosen


def cpu_choices(cfg):
    """The choices in kernels.py that hold on a CPU: fp32 products by oneDNN, attention by plain products for short rows."""
    lines, g = [], torch.Generator().manual_seed(0)
    for rows, K, N in ((64, 32, 64),) if cfg.smoke else ((768, 128, 384), (768, 320, 128), (4096, 128, 640), (4096, 512, 512)):
        x, w, dy = (torch.randn(shape, generator=g).requires_grad_() for shape in ((rows, K), (N, K), (rows, N)))

        def product(by, x=x, w=w, dy=dy):
            torch.autograd.grad(by(x, w), (x, w), dy)

        t = take_turns({"MKL": lambda p=product: p(F.linear), "oneDNN": lambda p=product: p(kernels.onednn_product)}, CPU, cfg.rounds, 20)
        gflops = [f"{6 * rows * K * N / np.median(v) / 1e6:.0f}" for v in t.values()]
        lines.append([f"product and its gradients, {rows} × {K} × {N}", "oneDNN" if kernels.ONEDNN else "MKL", *gflops,
                      spread(t["MKL"] / t["oneDNN"]) + " ×"])
    products = table(["fp32", "chosen here", "GFLOP/s by MKL", "by oneDNN", "oneDNN is faster by"], lines)
    lines = []
    for dtype in (torch.float32, torch.bfloat16) if kernels.has_bf16(CPU) else (torch.float32,):
        for L in (32,) if cfg.smoke else (64, 128, 256, 512, 1024):
            torch._dynamo.reset()  # it compiles the same code 8 times at most
            config = shape_of(2, 4, 128, 255, L, False)
            rivals = {name: with_choice(Step(config, "masked", max(1, 4096 // L), CPU, dtype), PLAIN_UP_TO={dtype: longest})
                      for name, longest in (("plain products", 10**9), ("flash", 0))}
            t = take_turns(rivals, CPU, cfg.rounds // 2, 1)
            lines.append([f"{str(dtype)[6:]}, rows of {L}", "plain products" if L <= kernels.PLAIN_UP_TO[dtype] else "flash",
                          spread(t["plain products"], 1), spread(t["flash"], 1), spread(t["plain products"] / t["flash"]) + " ×"])
    return products + "\n" + table(["masked step, two layers, 4096 tokens", "chosen here", "ms (plain products)", "ms (flash)", "flash is faster by"], lines)


def cpu_host(cfg):
    """What the host does per 65 536 tokens while the device computes: read rows, draw noise, find the masked positions (one thread)."""
    L, rows, lines = (64, 4, []) if cfg.smoke else (2048, 32, [])
    blocks = data.Sequences(np.random.default_rng(0).integers(0, 50_257, 40 * rows * L).astype(np.uint16), L, seed=1)
    for objective, loss in (("ar", "elbo"), ("masked", "elbo"), ("uniform", "elbo"), ("uniform", "paper")):
        process, counter = diffusion.Process(objective, 50_257, 50_257, L, loss=loss), iter(range(10**9))

        def run(process=process, counter=counter):
            first = next(counter) % 30 * rows
            levels = diffusion.noise_levels(process, first, rows)
            x = blocks.read(blocks.ids(first + np.arange(rows)))
            transfer.to_tensors(diffusion.make_batch(process, x, levels, levels.deal(0, 1)), False)

        t = take_turns({"run": run}, CPU, cfg.rounds, 3)["run"]
        lines.append([objective, loss, spread(t), f"{rows * L / np.median(t) / 1e3:.1f}"])
    return table(["objective", "loss", "ms", "M tokens/s"], lines)


def cpu_loading(cfg):
    """Batches of (8, 2048) tokens from a file in the page cache, on one core: ours (int32, each block with the token before it, every
    epoch exact) beside nanoGPT's get_batch (int64, inputs and targets, positions at random), as nanoGPT documents it."""
    L, rows, count = 2048, 8, 10**8 if not cfg.smoke else 10**6
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        np.random.default_rng(0).integers(0, 50_257, count).astype(np.uint16).tofile(path)
        blocks = data.Sequences(tokenfiles.Stream([np.memmap(path, np.uint16, mode="r")]), L, seed=1, n_vocab=50_257)

        def ours(steps=64):
            ids = blocks.ids(np.arange(steps * rows))  # as train.py: for 64 steps at once
            for step in range(steps):
                blocks.read(ids[step * rows : (step + 1) * rows])

        def nanogpt():
            for _ in range(64):
                tokens = np.memmap(path, dtype=np.uint16, mode="r")
                starts = torch.randint(len(tokens) - L, (rows,))
                torch.stack([torch.from_numpy(tokens[i : i + L].astype(np.int64)) for i in starts])
                torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + L].astype(np.int64)) for i in starts])

        for _ in range(20):
            ours()  # into the page cache
        times = take_turns({"ours": ours, "nanoGPT's get_batch": nanogpt}, CPU, cfg.rounds, 1)
    torch.set_num_threads(threads)
    return table(["by", "µs per batch", "M tokens/s", "ours is faster by"], [
        [name, spread(t / 64 * 1e3, 1), f"{rows * L * 64 / np.median(t) / 1e3:.0f}", "" if name == "ours" else f"{spread(t / times['ours'])} ×"]
        for name, t in times.items()])


def cpu_prepare(cfg):
    """`python data.py` on 200 MB of JSON lines (documentation of this Python, GPT-2's BPE) on all cores, from its start to its end, against
    tiktoken's own encode_ordinary_batch in one thread on the same documents in memory. Memory: of all its processes, shared pages once."""
    try:
        encoding = tokenizers.load_tokenizer("gpt2").encoding
    except ValueError as problem:
        return f"{problem}\n"
    texts, size, target = [], 0, 2 * 10**8 if not cfg.smoke else 10**6
    for number, text in enumerate(itertools.cycle(sources.python_docs())):
        texts.append(f"Document {number}.\n{text}")
        size += len(texts[-1].encode())
        if size >= target:
            break

    def by_tiktoken(some):
        start = time.perf_counter()
        encoding.encode_ordinary_batch(some, num_threads=1)
        return sum(len(t.encode()) for t in some) / (time.perf_counter() - start) / 1e6

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        with open(path, "w") as file:
            file.writelines(json.dumps(dict(text=text)) + "\n" for text in texts)
        before = by_tiktoken(texts[: len(texts) // 4])
        command = [sys.executable, str(Path(__file__).with_name("data.py")), str(path), f"--out={folder}", "--name=made", "--tokenizer=gpt2"]
        start, most = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None:
            most = max(most, memory_of(process.pid))
            time.sleep(0.2)
        ours = size / (time.perf_counter() - start) / 1e6
        if process.returncode:
            raise RuntimeError(f"data.py ended with {process.returncode}")
        after = by_tiktoken(texts[-len(texts) // 4 :])
    alone = [before, after]
    return table(["by", "MB/s", "MiB of memory", "ours is faster by"], [
        ["ours", f"{ours:.2f}", f"{most / 2**20:.0f}", ""],
        ["tiktoken, one thread (before and after)", spread(alone), "", f"{ours / np.mean(alone):.2f} [{ours / max(alone):.2f}, {ours / min(alone):.2f}] ×"]])


def memory_of(pid):
    """Bytes that a process and its children hold, pages that they share counted once (Linux; else 0)."""
    total = 0
    with contextlib.suppress(OSError):
        total = sum(int(line.split()[1]) for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:")) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(memory_of(child) for child in (task / "children").read_text().split())
    return total


# -------------------------------------------------------------------------------------------------- on a GPU


def gpu_head(cfg, device):
    """LM head and loss, forward and backward, bf16, on the rows that a masked step of 65 536 tokens has and on all 65 536 (`full`);
    uniform diffusion's bound; the greedy head that sampling needs. Ours against the reference as written, what Inductor makes of it,
    and torch's own (which has no weights per row and excludes no columns). The inputs alone are larger than any L2."""
    lines = []
    for D, V, rows in ((64, 500, 128),) if cfg.smoke else ((768, 50_257, 65_536), (2048, 50_257, 65_536)):
        torch._dynamo.reset()
        lines += head_of_width(cfg, device, D, V, rows)
    return table(["what", "D", "rows", "by", "ms", "TFLOP/s of the products", "GiB", "ours is faster by"], lines)


def head_of_width(cfg, device, D, V, rows):
    """Lines of the head's table for one width."""
    g, where = torch.Generator(device).manual_seed(0), dict(device=device)
    width = -(-(V + 1) // 64) * 64
    head = (torch.randn(width, D, generator=g, **where) * 0.02).bfloat16().requires_grad_()
    hidden = torch.randn(rows, D, generator=g, **where).bfloat16().requires_grad_()
    targets, noisy = (torch.randint(V, (rows,), generator=g, **where) for _ in range(2))
    weights, beta = torch.rand(rows, generator=g, **where) / rows, 10 ** (4 * torch.rand(rows, generator=g, **where) - 1)

    def entropy(hidden, head, targets, weights):
        return (F.cross_entropy(kernels.head_logits(hidden, head, V), targets, reduction="none") * weights).sum()

    def bound(hidden, head, targets, weights, noisy, beta):
        return (kernels.uniform_bound(F.softmax(kernels.head_logits(hidden, head, V), dim=-1)[:, :V], noisy, targets, beta) * weights).sum()

    def ours(hidden, head, targets, weights, noisy=None, beta=None):
        return kernels.head_loss_of(hidden, head, targets, weights, noisy, beta, V, False)[0]

    def torchs(hidden, head, targets, weights):
        return F.linear_cross_entropy(hidden, head, targets)

    def greedy(hidden, head):
        logits = kernels.head_logits(hidden, head, V)
        top, tokens = logits.max(-1)
        return tokens, (top - logits.logsumexp(-1)).exp()

    def gradients(loss, n, *inputs):
        torch.autograd.grad(loss(hidden[:n], head, *(t[:n] for t in inputs)), (hidden, head))

    def forward(function):
        with torch.no_grad():
            function(hidden[: rows // 2], head)

    fused = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    half = -(-rows * 33 // 64 // 64) * 64  # what `capacity` gives for 32 rows
    few = rows // 8 if not cfg.smoke else rows  # uncompiled, the bound forms many fp32 tensors of rows × V
    part = functools.partial
    groups = [
        ("cross-entropy", half, 3, {"reference": part(gradients, entropy, half, targets, weights), "Inductor": part(gradients, fused(entropy), half, targets, weights),
                                    "ours": part(gradients, ours, half, targets, weights), "ours, full": part(gradients, ours, rows, targets, weights)}),
        ("uniform bound", half, 3, {"Inductor": part(gradients, fused(bound), half, targets, weights, noisy, beta),
                                    "ours": part(gradients, ours, half, targets, weights, noisy, beta)}),
        ("uniform bound", few, 3, {"reference": part(gradients, bound, few, targets, weights, noisy, beta),
                                   "ours": part(gradients, ours, few, targets, weights, noisy, beta)}),
        ("greedy", rows // 2, 1, {"reference": part(forward, greedy), "Inductor": part(forward, fused(greedy)),
                                  "ours": part(forward, lambda hidden, head: kernels.head_greedy(hidden, head, V))}),
    ]  # fmt: skip
    if hasattr(F, "linear_cross_entropy"):
        groups[0][3]["torch's linear_cross_entropy (unweighted, all columns)"] = part(gradients, torchs, half, targets, weights)
    lines = []
    for what, n, products, rivals in groups:
        if device.type != "cuda":  # there are no kernels
            rivals = {name: run for name, run in rivals.items() if not name.startswith("ours")}
        peaks = {name: peak_of(run, device) for name, run in rivals.items()}
        times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 3)
        for name, t in times.items():
            count = rows if name.endswith("full") else n
            lines.append([what, D, count, name, spread(t), f"{2 * products * count * D * width / np.median(t) / 1e9:.0f}", f"{peaks[name] / 2**30:.2f}",
                          f"{spread(t / times['ours'])} ×" if "ours" in times and name != "ours" else ""])
    return lines


def peak_of(run, device):
    """Most memory beyond what was there that `run` takes, in bytes (0 on a CPU)."""
    if device.type != "cuda":
        return 0
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gpu_fp8(cfg, device):
    """One product with both gradients at the 1.7B model's shapes, 32 768 rows: 8 bits against bf16 (both compiled)."""
    lines, rows = [], 64 if cfg.smoke else 32_768
    for what, K, N in (("tiny", 32, 64),) if cfg.smoke else (("q, k, v", 2048, 6144), ("o", 2048, 2048), ("gate, up", 2048, 10_880), ("down", 5440, 2048)):
        torch._dynamo.reset()
        g = torch.Generator(device).manual_seed(0)
        x, dy = (torch.randn(rows, n, generator=g, device=device).bfloat16() for n in (K, N))
        x, weight = x.requires_grad_(), (torch.randn(N, K, generator=g, device=device) * 0.02).requires_grad_()
        forms = {"bf16": torch.compile(lambda x, w: F.linear(x, w.bfloat16()), fullgraph=True), "fp8": torch.compile(lambda x, w: kernels.fp8_linear(x, w), fullgraph=True)}
        rivals = {name: functools.partial(lambda form, x, w, dy: torch.autograd.grad(form(x, w), (x, w), dy), form, x, weight, dy) for name, form in forms.items()}
        times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 5)
        lines.append([what, f"{rows} × {K} × {N}", *(f"{spread(t)} ({6 * rows * K * N / np.median(t) / 1e9:.0f} TFLOP/s)" for t in times.values()),
                      f"{spread(times['bf16'] / times['fp8'])} ×"])
    return table(["product", "shape", "bf16, ms", "fp8, ms", "fp8 is faster by"], lines)


def gpu_attention(cfg, device):
    """Attention, forward and backward, bf16, 65 536 tokens in rows of 2048, laid out as in the model: torch's backends, and documents
    of about 400 tokens. The second time is with the documents' mask (or borders) made anew, which a step does once for all layers."""
    lines = []
    for causal in (False, True):
        for B, H, L, head_dim in ((2, 2, 64, 16),) if cfg.smoke else ((32, 14, 2048, 64), (32, 16, 2048, 128)):
            torch._dynamo.reset()
            kernels.compiled_flex_attention.cache_clear()
            lines += attention_of_shape(cfg, device, B, H, L, head_dim, causal)
    return table(["heads", "head_dim", "causal", "backend", "ms", "ms with its mask", "TFLOP/s (7 products)"], lines)


def attention_of_shape(cfg, device, B, H, L, head_dim, causal):
    g = torch.Generator(device).manual_seed(0)
    q, k, v, dy = (torch.randn(B, L, H, head_dim, generator=g, device=device, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(4))
    ids = (torch.rand(B, L, generator=g, device=device) < 1 / 400).cumsum(1)

    def by(backend, _):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def dense_mask():
        same = (ids[:, :, None] == ids[:, None, :])[:, None]
        return same & torch.ones(L, L, dtype=torch.bool, device=device).tril() if causal else same

    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    forms = {backend.name.lower(): (functools.partial(by, backend), None) for backend in backends}
    forms["documents, dense mask"] = (lambda mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), dense_mask)
    forms["documents, as in kernels.attention"] = (lambda mask: kernels.attention(q, k, v, mask, causal, 0.0), lambda: kernels.document_mask(ids, causal, 0.0))
    forms["documents, varlen"] = (lambda borders: varlen(q, k, v, *borders, causal), lambda: document_borders(ids))
    chosen, lines = kernels.attention_backend(q, causal), []
    for name, (form, make) in forms.items():
        try:
            mask = make() if make else None

            def both(form=form, mask=mask):
                torch.autograd.grad(form(mask), (q, k, v), dy)

            def anew(form=form, make=make):
                torch.autograd.grad(form(make()), (q, k, v), dy)

            times = take_turns({"both": both} | ({"anew": anew} if make else {}), device, cfg.rounds, 1 if cfg.smoke else 3)
        except Exception as problem:  # a backend that this machine has not
            lines.append([H, head_dim, causal, name, failed(problem), "", ""])
            continue
        tflops = "" if make else f"{14 * B * H * L * L * head_dim * (0.5 if causal else 1) / np.median(times['both']) / 1e9:.0f}"
        lines.append([H, head_dim, causal, name + (" (chosen)" if name == chosen else ""), spread(times["both"]), spread(times["anew"]) if make else "", tflops])
    return lines


def failed(problem):
    """An exception as a cell of a table."""
    return f"failed: {type(problem).__name__}: {str(problem).partition(chr(10))[0][:100]}".replace("|", "/")


def document_borders(ids):
    """Where documents start in the flattened batch, (n + 1,) int32, and the longest's length; rows end documents, too."""
    first = F.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True).flatten()
    borders = F.pad(first, (0, 1), value=True).nonzero().flatten().int()
    return borders, int(borders.diff().max())


def varlen(q, k, v, borders, longest, causal):
    """Attention over documents laid end to end, as torch.nn.attention.varlen does it. q, k, v (B, H, L, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, L, head_dim = q.shape
    backwards = dict(is_causal=True) if "is_causal" in inspect.signature(varlen_attn).parameters else dict(window_size=(-1, 0))
    y = varlen_attn(*(t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)), borders, borders, longest, longest, **(backwards if causal else {}))
    return y.view(B, L, H, head_dim).transpose(1, 2)


# model, objective, rows of 2048, settings; what matters most first
STEPS = [
    ("1.7B", "masked", 16, {}), ("1.7B", "masked", 24, {}), ("413M", "masked", 32, {}), ("135M", "masked", 32, {}), ("135M", "masked", 32, dict(plain_loss=True)),
    ("1.7B", "masked", 16, dict(fp8=True)), ("413M", "masked", 32, dict(short_rows=0.01)), ("135M", "masked", 16, {}),
    ("135M", "masked", 16, dict(plain_loss=True, how="no")),
    ("1.7B", "ar", 16, {}), ("413M", "ar", 32, {}), ("135M", "ar", 32, {}), ("1.1B", "masked", 24, {}), ("1.1B", "ar", 24, {}),
    ("135M", "masked", 32, dict(how="blocks")), ("135M", "masked", 32, dict(full_head=True)), ("135M", "masked", 32, dict(recompute="elementwise")),
    ("1.7B", "masked", 16, dict(how="blocks")), ("1.7B", "masked", 16, dict(fp8=True, how="blocks")), ("1.7B", "masked", 24, dict(recompute="elementwise", how="blocks")),
    ("25M", "masked", 8, {}), ("25M", "masked", 8, dict(cuda_graphs=True)),
]  # fmt: skip
TINY = [("tiny", objective, 4, settings) for objective in ("masked", "ar") for settings in (dict(how="no"), dict(how="no", fp8=True), dict(how="no", plain_loss=True), dict(how="no", short_rows=0.5))]


def model_of(name, causal):
    """The models of the steps table: a size of the ladder, or the seeds' 1.7B example (GPT-NeoX's vocabulary, untied)."""
    if name == "tiny":
        return shape_of(2, 2, 32, 500, 64, causal)
    if name == "1.7B":
        return ModelConfig(28, 16, 16, 128, 2048, swiglu_width(2048), 50_277, 50_277, 2048, causal, tied=False)
    shape = ladder({"1.1B": "1086M"}.get(name, name))
    return ModelConfig(**shape, n_kv_head=shape["n_head"], d_ff=swiglu_width(shape["d_model"]), n_vocab=50_257, mask_id=50_257, seq_len=2048, causal=causal)


def gpu_steps(cfg, device):
    """Whole training steps in bf16 on real tokens: batches on the device, forward, backward, clipping, AdamW; one after the other without
    waiting, as train.py does. `plain_loss`: fp32 logits everywhere instead of our kernel. Executed MFU counts what is really computed: what
    follows the last attention, and the head, for the masked positions only. The issue's form counts the whole last block; PaLM's the head
    and attention in full. All relative to the datasheet's dense bf16 peak, fp8's included."""
    lines = []
    for name, objective, rows, settings in TINY if cfg.smoke else STEPS:
        label = f"{name} {objective} {rows} × " + (", ".join(f"{k}={v}" for k, v in settings.items()) or "plain settings")
        if cfg.rows and not any(wanted in label for wanted in cfg.rows.split(",")):
            continue
        try:
            lines.append(step_line(cfg, device, name, objective, rows, settings))
        except Exception as problem:
            lines.append([name, "", objective, rows, settings, failed(problem), *[""] * 8])
        print(" | ".join(map(str, lines[-1])), flush=True)
        release(device)
    return table(["model", "parameters (in blocks)", "objective", "rows", "settings", "ms", "tokens/s", "executed MFU", "the issue's form", "PaLM's",
                  "GiB measured / predicted", "attention", "loss", "FLOPs: formula / torch's counter"], lines)


def step_line(cfg, device, name, objective, rows, settings):
    config, peak = model_of(name, objective == "ar"), dryrun.peak_flops(device) or float("nan")
    run = Step(config, objective, rows, device, torch.bfloat16, **settings)
    for _ in range(cfg.warmup):
        run()
    gc.collect()
    gc.freeze()
    clear_peak(device)
    with torch.compiler.set_stance("fail_on_recompile"):
        t, losses = timed_in_a_row(run, device, cfg.steps)
    taken = measured_peak(device)
    gc.unfreeze()
    n, c = run.network, config
    flops = n.flops_per_token(run.share)
    issue = 6 * (n.n_params(False) + run.share * c.padded_vocab * c.d_model) + 12 * c.n_layer * c.n_head * c.head_dim * c.seq_len * (0.5 if c.causal else 1)
    palm, ratio = n.flops_per_token(1.0, causal=False), n.flops_per_token(run.example_share, causal=False) / counted_flops(config, rows, run.example)
    example, speed = run.example, run.tokens / np.median(t) * 1e3
    sizes = f"{n.n_params() / 1e6:,.0f}M ({n.n_params(False) / 1e6:,.0f}M)"
    backend = kernels.attention_backend(torch.empty(rows, c.seq_len, c.n_head, c.head_dim, device=device, dtype=torch.bfloat16).transpose(1, 2), c.causal,
                                        example.documents is not None)
    if not np.isfinite(losses).all():
        raise RuntimeError("the loss is not finite")
    del run, n
    release(device)
    predicted = ""
    if cfg.predict and not settings.get("plain_loss"):
        how = {k: v for k, v in settings.items() if k in ("how", "recompute", "fp8")}
        predicted = f" / {memory.predict(config, example, False, torch.bfloat16, True, **how, lasting_gradients=settings.get('cuda_graphs', False)).peak / 2**30:.1f}"
    return [name, sizes, objective, f"{rows} × {c.seq_len}", ", ".join(f"{k}={v}" for k, v in settings.items()) or "—", spread(t, 1), f"{speed:,.0f}",
            *(f"{speed * count / peak:.1%}" for count in (flops, issue, palm)), f"{taken / 2**30:.1f}{predicted}", backend, f"{np.mean(losses[-4:]):.3f}", f"{ratio:.4f}"]


def timed_in_a_row(run, device, steps):
    """(steps,) milliseconds of steps that follow each other without waiting, and their losses."""
    moments, losses = [transfer.timestamp(device)], torch.zeros(steps, device=device)
    for i in range(steps):
        run()
        losses[i] = run.record[0]
        moments.append(transfer.timestamp(device))
    losses = losses.tolist()
    return np.array([1e3 * transfer.seconds_between(a, b) for a, b in zip(moments, moments[1:])]), losses


def release(device):
    """Give back what compiled steps that are no longer referenced still hold."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def clear_peak(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def measured_peak(device):
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def gpu_turns(cfg, device):
    """Steps whose ratio is claimed, taking turns: fp8 against bf16 at 1.7B (8 rows each, so that both fit), and at 135M the masked step
    against the one with head and loss at all positions."""
    lines, pairs = [], [("fp8 / bf16", "1.7B", 8, dict(fp8=True), {}), ("gathered / full head", "135M", 16, {}, dict(full_head=True))]
    for what, model, rows, first, second in [(what, "tiny", 4, *both) for what, _, _, *both in pairs] if cfg.smoke else pairs:
        how = dict(how="no") if cfg.smoke else {}
        steps = {k: Step(model_of(model, False), "masked", rows, device, torch.bfloat16, **how, **s) for k, s in (("first", first), ("second", second))}
        rivals = {k: functools.partial(timed_in_a_row, run, device, 7) for k, run in steps.items()}  # seven in a row: the device never idles
        times = take_turns(rivals, device, cfg.rounds, 1)
        lines.append([what, model, rows, *(spread(t / 7, 1) for t in times.values()), f"{spread(times['second'] / times['first'])} ×",
                      *(f"{run.record[0].item():.3f}" for run in steps.values())])
        del steps, rivals
        release(device)
    return table(["first / second", "model", "rows", "ms, first", "ms, second", "first is faster by", "loss, first", "loss, second"], lines)


# The first pattern that a kernel's name contains says what it is. Inductor's names list the operations that a kernel fuses.
KINDS = [("attention", r"^triton_tem_.*flex|^(?!triton_|cpp_).*(sdpa|flash|fmha|cudnn::fusion|scaled_dot_product)"),
         ("matrix products", r"^triton_tem_|^(?!triton_|cpp_).*(gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|::b?mm$|::addmm$|linear_pointwise)"),
         ("rows of the loss", r"^(cross_entropy|uniform_bound)_rows"),
         ("elementwise and reductions (compiled)", r"^(triton|cpp)_"),
         ("optimizer and norm", r"multi_tensor_apply|lpnorm|fused_adam"), ("copies", r"^Memcpy|^Memset|copy_kernel|CatArray")]


def kind_of(kernel):
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.I)), "others")


def gpu_profile(cfg, device):
    """Shares of the device's time in a masked step, by kind of kernel."""
    parts, activity = [], torch.profiler.ProfilerActivity
    for name, rows in (("tiny", 4),) if cfg.smoke else (("135M", 32), ("1.7B", 16)):
        if cfg.rows and name not in cfg.rows:
            continue
        run = Step(model_of(name, False), "masked", rows, device, torch.bfloat16, how="no" if cfg.smoke else "whole")
        for _ in range(5):
            run()
        with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (device.type == "cuda")) as profile:
            run()  # the profiler starts up in this one
            if device.type == "cuda":
                torch.cuda.synchronize()
            whole = float(np.sum(timed_in_a_row(run, device, 5)[0])) / 5
        gpu = device.type == "cuda"
        own = "self_device_time_total" if gpu else "self_cpu_time_total"
        spent = [(e.key, getattr(e, own) / 6e3) for e in profile.key_averages() if getattr(e, own) > 0 and not e.is_user_annotation
                 and (not gpu or e.device_type == torch.autograd.DeviceType.CUDA)]
        shares = Counter()
        for kernel, ms in spent:
            shares[kind_of(kernel)] += ms
        busy = sum(shares.values())
        rest = busy - shares["matrix products"] - shares["attention"]
        lines = [[kind, f"{ms:.2f}", f"{ms / busy:.1%}"] for kind, ms in shares.most_common()]
        lines += [["**neither a matrix product nor attention**", f"{rest:.2f}", f"{rest / busy:.1%}"], ["all kernels; of the step's time", f"{busy:.2f}", f"{busy / whole:.1%}"]]
        if gpu and not shares["attention"]:
            lines.append(["no attention kernel was recognized: see the names below", "", ""])
        longest = sorted(spent, key=lambda pair: -pair[1])[:15]
        parts.append(f"{name}: {whole:.1f} ms a step, profiled\n\n" + table(["kind", "ms", "share"], lines) + "\n"
                     + table(["longest kernels", "kind", "ms"], [[f"`{key[:90]}`".replace("|", "/"), kind_of(key), f"{ms:.2f}"] for key, ms in longest]))
        del run
        release(device)
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------------ main

PARTS = {
    "cpu": dict(shakespeare=cpu_shakespeare, gathered=cpu_gathered, bf16=cpu_bf16, choices=cpu_choices, host=cpu_host, loading=cpu_loading, prepare=cpu_prepare),
    "gpu": dict(head=gpu_head, attention=gpu_attention, fp8=gpu_fp8, turns=gpu_turns, steps=gpu_steps, profile=gpu_profile),
}


def machine(suite):
    """The machine, the versions and the commit, in words."""
    cpu, commit = platform.processor() or platform.machine(), "no git"
    with contextlib.suppress(OSError, StopIteration):
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    with contextlib.suppress(OSError):
        git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip() or commit
        if git(["git", "status", "--porcelain", "--untracked-files=no", "--", "*.py"]).stdout.strip():
            commit += " with changes"
    features = [name for name, has in (("AVX2", torch.cpu._is_avx2_supported()), ("AVX-512", torch.cpu._is_avx512_supported()),
                                       ("bf16", kernels.has_bf16(CPU))) if has]
    what = f"{cpu}, {torch.get_num_threads()} threads, {', '.join(features)}"
    if suite == "gpu" and torch.cuda.is_available():
        what = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; host: {what}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {getattr(kernels.triton, '__version__', 'none')}, numpy {np.__version__}"
    return what, versions, commit


def main():
    cfg = configurator.load(Config, about=__doc__)
    device = torch.device("cuda" if cfg.suite == "gpu" and torch.cuda.is_available() else "cpu")
    if cfg.suite == "gpu":
        torch.set_float32_matmul_precision("high")
    what, versions, commit = machine(cfg.suite)
    text = [f"# Measured by `python {' '.join(['bench.py', *sys.argv[1:]])}`\n", f"{datetime.date.today()}, commit {commit}; {what}; {versions}. "
            "Median [range]; ratios are medians of ratios within a round.\n"]
    wrong = []
    for name, part in PARTS[cfg.suite].items():
        if cfg.only and name not in cfg.only.split(","):
            continue
        print(f"{name} …", file=sys.stderr, flush=True)
        release(device)
        try:
            with kernels.preferring_cudnn(device):
                result = part(cfg) if cfg.suite == "cpu" else part(cfg, device)
        except Exception as problem:  # the other parts are worth having
            traceback.print_exc()
            result = failed(problem) + "\n"
            wrong.append(f"{name} {result}")
        text.append(f"## {name}\n\n{' '.join(part.__doc__.split())}\n\n{result}")
        print(text[-1], flush=True)
        if cfg.out and not cfg.smoke:  # after each part: a run that is cut short leaves what it has
            folder, chosen = Path(cfg.out), "_".join(re.findall(r"[\w.]+", f"{cfg.only} {cfg.rows}"))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{cfg.suite}{'_' + chosen if chosen else ''}.md").write_text("\n".join(text))
    if wrong:
        configurator.fail(*wrong)


if __name__ == "__main__":
    main()
