"""Where every claim about speed comes from.

    python bench.py                  # what a CPU can show, about ten minutes on two cores
    python bench.py --suite=gpu      # kernels, attention, whole training steps and where their time goes

Rivals take turns in rounds on the same data, so that a machine that slows down slows all of them; a ratio is the
median of the rounds' own ratios. Writes results/<suite>.md with what is needed to repeat it.
"""

import contextlib
import datetime
import functools
import inspect
import platform
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

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
import engine
import kernels
import memory
from configurator import setting
from model import ModelConfig, Transformer, ladder, swiglu_width


@dataclass
class Config:
    suite: Literal["cpu", "gpu"] = setting("cpu", "what to measure")
    only: str = setting("", "parts to run, separated by commas (empty: all; a wrong name lists them)")
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
    start = engine.moment(device)
    for _ in range(repeats):
        run()
    end = engine.moment(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return engine.seconds(start, end) * 1e3 / repeats


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
    words = [w for text in data.python_docs() for w in re.findall(r"\w+|\s+|[^\w\s]", text)]
    rank = {w: min(i, n_vocab - 1) for i, (w, _) in enumerate(Counter(words).most_common())}
    return np.array([rank[w] for w in words])


class Step:
    """A training step as train.py takes it, on a few batches of real tokens in turn."""

    def __init__(self, config, objective, rows, device, dtype, how="whole", full_head=False, n_batches=4, cuda_graphs=False, **use):
        torch.manual_seed(0)
        process = diffusion.Process(objective, config.n_vocab, config.mask_id, config.block_len)
        blocks = data.Blocks(real_tokens(config.n_vocab), config.block_len, seed=1)
        levels = [diffusion.step_rows(process, i * rows, rows) for i in range(n_batches)]
        shares = [float(level.count.mean()) / config.block_len if objective == "masked" else 1.0 for level in levels]
        arrays = [diffusion.make_batch(process, blocks.read(blocks.ids(np.arange(rows) + i * rows)), level, level.deal(0, 1))
                  for i, level in enumerate(levels)]
        if full_head:
            arrays, shares = [at_every_position(batch) for batch in arrays], [1.0] * n_batches
        self.network = Transformer(config).init_weights().to(device).use(**use)
        self.objective = engine.compiled(engine.Objective(self.network, False), how, 1, cuda_graphs)
        self.optimizer = engine.make_optimizer(self.network, 1e-3, (0.9, 0.95), 0.1)
        self.batches = [engine.to_device(engine.to_tensors(a, False), device) for a in arrays]
        self.tokens, self.calls, self.cuda_graphs = rows * config.block_len, 0, cuda_graphs
        self.record = torch.zeros(2, device=device)
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.share, self.example, self.example_share = float(np.mean(shares)), arrays[0], shares[0]  # of the positions, those with a head

    def __call__(self):
        self.record.zero_()
        batch = self.batches[self.calls % len(self.batches)]
        self.calls += 1
        engine.optimizer_step(self.objective, self.optimizer, iter([batch]), 1, self.record, 1.0, self.autocast, cuda_graphs=self.cuda_graphs)


def at_every_position(batch):
    """A masked batch whose head and loss run at all positions, with weight 0 where nothing is masked."""
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
        batch = diffusion.Batch(*(None if t is None else fake.from_tensor(t) for t in engine.to_tensors(example, False)))
        engine.Objective(network, False)(batch)[0].backward()
    return counter.get_total_flops() / (rows * config.block_len)


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
    def __init__(self, n_layer, n_head, d, n_vocab, block_len):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_vocab, d), nn.Embedding(block_len, d)
        self.blocks = nn.Sequential(*(PlainBlock(d, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(d, bias=False)

    def forward(self, x, y):
        h = self.norm(self.blocks(self.tokens(x) + self.positions.weight))
        return F.cross_entropy(F.linear(h, self.tokens.weight).flatten(0, 1), y.flatten())


def plain_step(compile, fused, rows, block_len, n_vocab, **shape):
    """A training step in nanoGPT's style: fp32, AdamW (on a CPU not fused), clipping, a cross-entropy over all logits."""
    torch.manual_seed(0)
    network = PlainGPT(n_vocab=n_vocab, block_len=block_len, **shape)
    matrices, others = ([p for p in network.parameters() if (p.dim() >= 2) == which] for which in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=0.1), dict(params=others, weight_decay=0.0)],
                                  lr=1e-3, betas=(0.9, 0.99), fused=fused)
    forward = torch.compile(network) if compile else network
    blocks = data.Blocks(real_tokens(n_vocab), block_len, seed=1)
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


def shape_of(n_layer, n_head, d_model, n_vocab, block_len, causal, tied=True):
    return ModelConfig(n_layer, n_head, n_head, d_model // n_head, d_model, swiglu_width(d_model), n_vocab, n_vocab, block_len, causal, tied)


def cpu_shakespeare(cfg):
    """AR at nanoGPT's Shakespeare-CPU shape (4 layers, 4 heads, 128 wide, 12 rows of 64, 65 characters), fp32, against plain steps."""
    rows, shape = (2, dict(n_layer=1, n_head=4)) if cfg.smoke else (12, dict(n_layer=4, n_head=4))
    rivals = {"ours": Step(shape_of(**shape, d_model=128, n_vocab=65, block_len=64, causal=True), "ar", rows, CPU, torch.float32)}
    for compile in (False, True):
        for fused in (False, True):
            name = f"plain, {'compiled' if compile else 'eager'}, {'fused' if fused else 'ordinary'} AdamW"
            rivals[name] = plain_step(compile, fused, rows, 64, 65, d=128, **shape)
    times = take_turns(rivals, CPU, cfg.rounds, 1 if cfg.smoke else 20)
    return table(["step", "ms", "K tokens/s", "ours is faster by"], [
        [name, spread(t), f"{rows * 64 / np.median(t):.1f}", "" if name == "ours" else f"{spread(t / times['ours'])} ×"] for name, t in times.items()])


def cpu_gathered(cfg):
    """A masked step at V = 50 304 with head and loss on the masked positions only, against the same with both everywhere."""
    config = shape_of(5, 4, 128, 50_303 if not cfg.smoke else 500, 256 if not cfg.smoke else 32, False)
    rows, lines = 4 if cfg.smoke else 16, []
    for dtype in (torch.float32, torch.bfloat16) if engine.has_bf16(CPU) else (torch.float32,):
        rivals = {name: Step(config, "masked", rows, CPU, dtype, full_head=full) for name, full in (("gathered", False), ("full", True))}
        times = take_turns(rivals, CPU, max(2, cfg.rounds // 2), 1)
        for name, t in times.items():
            lines.append([str(dtype)[6:], name, spread(t, 0), f"{rivals[name].tokens / np.median(t):.2f}",
                          f"{spread(times['full'] / t)} ×" if name == "gathered" else ""])
    return f"{rivals['full'].network.n_params(False):,} parameters without the embedding\n\n" + table(
        ["type", "head", "ms", "K tokens/s", "gathered is faster by"], lines)


def cpu_bf16(cfg):
    """A masked step in bf16 (where the CPU multiplies it itself) against fp32: about 1M parameters, V = 256, 16 rows of 256."""
    if not engine.has_bf16(CPU):
        return "This CPU has no bf16.\n"
    config = shape_of(5, 4, 128, 255, 256 if not cfg.smoke else 32, False)
    rivals = {name: Step(config, "masked", 4 if cfg.smoke else 16, CPU, dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    tokens = rivals["fp32"].tokens
    rivals["fp32, all by MKL"] = with_choice(Step(config, "masked", 4 if cfg.smoke else 16, CPU, torch.float32), ONEDNN=False)
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
    for dtype in (torch.float32, torch.bfloat16) if engine.has_bf16(CPU) else (torch.float32,):
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
    blocks = data.Blocks(np.random.default_rng(0).integers(0, 50_257, 40 * rows * L).astype(np.uint16), L, seed=1)
    for objective, loss in (("ar", "elbo"), ("masked", "elbo"), ("uniform", "elbo"), ("uniform", "paper")):
        process, counter = diffusion.Process(objective, 50_257, 50_257, L, loss=loss), iter(range(10**9))

        def run(process=process, counter=counter):
            first = next(counter) % 30 * rows
            levels = diffusion.step_rows(process, first, rows)
            x = blocks.read(blocks.ids(first + np.arange(rows)))
            engine.to_tensors(diffusion.make_batch(process, x, levels, levels.deal(0, 1)), False)

        t = take_turns({"run": run}, CPU, cfg.rounds, 3)["run"]
        lines.append([objective, loss, spread(t), f"{rows * L / np.median(t) / 1e3:.1f}"])
    return table(["objective", "loss", "ms", "M tokens/s"], lines)


# -------------------------------------------------------------------------------------------------- on a GPU


class Device(NamedTuple):
    device: torch.device
    total: int  # bytes of memory


def gpu_head(cfg, gpu):
    """LM head and loss, forward and backward, bf16, on the rows that a masked step of 65 536 tokens has: ours against what
    Inductor makes of the reference, and torch's own. `full`: on all 65 536 rows."""
    lines = []
    for D, V, rows in ((64, 500, 64),) if cfg.smoke else ((768, 50_257, 33_792), (2048, 50_257, 33_792)):
        lines += head_of_width(cfg, gpu, D, V, rows)
    return table(["loss", "D", "rows", "by", "ms", "TFLOP/s of the products", "GiB"], lines)


def head_of_width(cfg, gpu, D, V, rows):
    """Lines of the head's table for one width; the inputs alone are larger than any L2."""
    g, where = torch.Generator(gpu.device).manual_seed(0), dict(device=gpu.device)
    width = -(-(V + 1) // 64) * 64
    head = (torch.randn(width, D, generator=g, **where) * 0.02).bfloat16().requires_grad_()
    hidden = torch.randn(2 * rows, D, generator=g, **where).bfloat16().requires_grad_()
    targets, noisy = (torch.randint(V, (2 * rows,), generator=g, **where) for _ in range(2))
    weights, beta = torch.rand(2 * rows, generator=g, **where) / rows, 10 ** (4 * torch.rand(2 * rows, generator=g, **where) - 1)

    def reference(hidden, head, targets, weights, noisy, beta):
        logits = kernels.head_logits(hidden, head, V)
        if noisy is None:
            return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
        return (kernels.uniform_bound(F.softmax(logits, dim=-1)[:, :V], noisy, targets, beta) * weights).sum()

    def ours(hidden, head, targets, weights, noisy, beta):
        return kernels.head_loss_of(hidden, head, targets, weights, noisy, beta, V, False)[0]

    def torchs(hidden, head, targets, weights, noisy, beta):  # it has no per-row weights and excludes no columns
        return F.linear_cross_entropy(hidden, head, targets)

    def gradients(loss, n, inputs):
        torch.autograd.grad(loss(hidden[:n], head, *inputs), (hidden, head))

    lines, losses = [], {"Inductor": torch.compile(reference, dynamic=False)}
    if gpu.device.type == "cuda":
        losses = {"ours": ours} | losses
    if hasattr(F, "linear_cross_entropy"):
        losses["torch's linear_cross_entropy"] = torchs
    for what, n, diffusing in (("cross-entropy", rows, False), ("cross-entropy, full", 2 * rows, False), ("uniform bound", rows, True)):
        inputs = (targets[:n], weights[:n], noisy[:n] if diffusing else None, beta[:n] if diffusing else None)
        rivals = {name: functools.partial(gradients, loss, n, inputs) for name, loss in losses.items() if not (diffusing and loss is torchs)}
        peaks = {name: peak_of(run, gpu) for name, run in rivals.items()}
        for name, t in take_turns(rivals, gpu.device, cfg.rounds, 1 if cfg.smoke else 3).items():
            lines.append([what, D, n, name, spread(t), f"{6 * n * D * width / np.median(t) / 1e9:.0f}", f"{peaks[name] / 2**30:.2f}"])
    return lines


def peak_of(run, gpu):
    """Most memory beyond what was there that `run` takes, in bytes."""
    if gpu.device.type != "cuda":
        return 0
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def gpu_attention(cfg, gpu):
    """Attention, forward and backward, bf16, 65 536 tokens in rows of 2048: torch's backends, and documents of about 400 tokens."""
    lines = []
    for causal in (False, True):
        for B, H, L, head_dim in ((2, 2, 64, 16),) if cfg.smoke else ((32, 14, 2048, 64), (32, 16, 2048, 128)):
            lines += attention_of_shape(cfg, gpu, B, H, L, head_dim, causal)
    return table(["heads", "head_dim", "causal", "backend", "ms", "TFLOP/s (7 products)"], lines)


def attention_of_shape(cfg, gpu, B, H, L, head_dim, causal):
    g = torch.Generator(gpu.device).manual_seed(0)
    q, k, v, dy = (torch.randn(B, H, L, head_dim, generator=g, device=gpu.device, dtype=torch.bfloat16).requires_grad_() for _ in range(4))
    ids = (torch.rand(B, L, generator=g, device=gpu.device) < 1 / 400).cumsum(1)
    dense = (ids[:, :, None] == ids[:, None, :])[:, None]
    if causal:
        dense = dense & torch.ones(L, L, dtype=torch.bool, device=gpu.device).tril()
    mask = kernels.document_mask(ids, causal, 0.0)

    def by(backend):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    forms = {backend.name.lower(): functools.partial(by, backend)
             for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)}
    forms["documents, dense mask"] = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    forms["documents, as in kernels.attention"] = lambda: kernels.attention(q, k, v, mask, causal, 0.0)
    forms["documents, varlen"] = varlen(ids, causal, q, k, v)
    chosen, lines = kernels.attention_backend(q, causal), []
    for name, form in forms.items():
        try:
            t = take_turns({"it": lambda form=form: torch.autograd.grad(form(), (q, k, v), dy)}, gpu.device, cfg.rounds, 1 if cfg.smoke else 3)["it"]
        except (RuntimeError, ImportError, AttributeError, TypeError) as problem:
            lines.append([H, head_dim, causal, name, "unavailable: " + str(problem).partition("\n")[0][:80].replace("|", "/"), ""])
            continue
        tflops = "" if "documents" in name else f"{14 * B * H * L * L * head_dim * (0.5 if causal else 1) / np.median(t) / 1e9:.0f}"
        lines.append([H, head_dim, causal, name + (" (chosen)" if name == chosen else ""), spread(t), tflops])
    return lines


def varlen(ids, causal, q, k, v):
    """Attention over the documents laid end to end, as torch.nn.attention.varlen does it."""
    starts = F.pad((ids.flatten().diff(prepend=ids.flatten()[:1] - 1) != 0), (0, 1), value=True)
    starts[:: ids.shape[1]] = True  # rows are borders, too
    borders = starts.nonzero().flatten().int()
    longest = int(borders.diff().max())

    def run():
        from torch.nn.attention.varlen import varlen_attn

        flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        backwards = dict(is_causal=True) if "is_causal" in inspect.signature(varlen_attn).parameters else dict(window_size=(-1, 0))
        more = backwards if causal else {}
        y = varlen_attn(*flat, borders, borders, longest, longest, **more)
        return y.view(ids.shape[0], ids.shape[1], *y.shape[1:]).transpose(1, 2)

    return run


def model_of(name, causal):
    """The models of the steps table: a size of the ladder, or the seeds' 1.7B example (GPT-NeoX's vocabulary, untied)."""
    if name == "tiny":
        return shape_of(2, 2, 32, 500, 64, causal)
    if name == "1.7B":
        return ModelConfig(28, 16, 16, 128, 2048, swiglu_width(2048), 50_277, 50_277, 2048, causal, tied=False)
    shape = ladder(name)
    return ModelConfig(**shape, n_kv_head=shape["n_head"], d_ff=swiglu_width(shape["d_model"]), n_vocab=50_257, mask_id=50_257, block_len=2048, causal=causal)


# model, objective, rows of 2048, settings
STEPS = [
    ("135M", "masked", 32, {}), ("135M", "ar", 32, {}), ("135M", "masked", 32, dict(full_head=True)), ("135M", "masked", 32, dict(how="blocks")),
    ("413M", "masked", 32, {}), ("413M", "ar", 32, {}), ("1002M", "masked", 24, {}), ("1002M", "ar", 24, {}),
    ("1.7B", "masked", 16, {}), ("1.7B", "ar", 16, {}), ("1.7B", "masked", 16, dict(how="blocks")), ("1.7B", "masked", 16, dict(fp8=True)),
    ("1.7B", "masked", 32, dict(recompute="elementwise")), ("1.7B", "masked", 32, dict(recompute="selective", how="blocks")),
    ("25M", "masked", 8, {}), ("25M", "masked", 8, dict(cuda_graphs=True)),
]  # fmt: skip


def gpu_steps(cfg, gpu):
    """Whole training steps in bf16 on real tokens: batches on the device, forward, backward, clipping, AdamW."""
    peak, lines = engine.peak_flops(gpu.device) or float("nan"), []
    for name, objective, rows, settings in [("tiny", o, 4, s) for o, s in (("masked", {}), ("ar", dict(how="no")))] if cfg.smoke else STEPS:
        config, label = model_of(name, objective == "ar"), ", ".join(f"{k}={v}" for k, v in settings.items()) or "—"
        try:
            run = Step(config, objective, rows, gpu.device, torch.bfloat16, **settings)
            for _ in range(cfg.warmup):
                run()
            clear_peak(gpu)
            t = np.array([milliseconds(run, gpu.device) for _ in range(cfg.steps)])
        except torch.OutOfMemoryError:
            lines.append([name, objective, f"{rows} × {config.block_len}", label, "out of memory", *[""] * 6])
            continue
        flops, palm = run.network.flops_per_token(run.share), run.network.flops_per_token(1.0, causal=False)
        counted = counted_flops(config, rows, run.example)
        speed = run.tokens / np.median(t) * 1e3
        how = {k: v for k, v in settings.items() if k in ("how", "recompute", "fp8")}
        predicted = memory.predict(config, run.example, False, torch.bfloat16, True, **how, lasting_gradients=settings.get("cuda_graphs", False)).peak
        lines.append([name, objective, f"{rows} × {config.block_len}", label, spread(t, 1), f"{speed:,.0f}", f"{speed * flops / peak:.1%}", f"{speed * palm / peak:.1%}",
                      f"{measured_peak(gpu) / 2**30:.1f} / {predicted / 2**30:.1f}", f"{run.record[0].item():.3f}",
                      f"{run.network.flops_per_token(run.example_share, causal=False) / counted:.4f}"])
        print(" | ".join(map(str, lines[-1])), flush=True)
        del run
        torch._dynamo.reset()
        if gpu.device.type == "cuda":
            torch.cuda.empty_cache()
    return table(["model", "objective", "rows", "settings", "ms", "tokens/s", "executed MFU", "PaLM's MFU", "GiB measured / predicted", "loss",
                  "FLOPs: formula / torch's counter"], lines)


def clear_peak(gpu):
    if gpu.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def measured_peak(gpu):
    return torch.cuda.max_memory_allocated() if gpu.device.type == "cuda" else 0


# The first pattern that a kernel's name contains says what it is.
KINDS = [("attention", "attention|flash|fmha|sdpa|flex"), ("head and loss rows", "cross_entropy_rows|uniform_bound_rows"),
         ("matrix products", "gemm|nvjet|cutlass|xmma|cublas|matmul|mm$|_mm|addmm|linear_pointwise|onednn"), ("optimizer and norm", "adam|multi_tensor|norm_kernel|lpnorm"),
         ("copies", "memcpy|memset|copy_")]


def gpu_profile(cfg, gpu):
    """Shares of the device's time in a masked step, by kind of kernel, and how long the device had nothing to do."""
    parts, activity = [], torch.profiler.ProfilerActivity
    for name, rows in (("tiny", 4),) if cfg.smoke else (("135M", 32), ("1.7B", 16)):
        run = Step(model_of(name, False), "masked", rows, gpu.device, torch.bfloat16, how="no" if cfg.smoke else "whole")
        for _ in range(5):
            run()
        with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * (gpu.device.type == "cuda")) as profile:
            whole = milliseconds(run, gpu.device, 5)
        own = "self_device_time_total" if gpu.device.type == "cuda" else "self_cpu_time_total"
        kernels_ = [(e.key, getattr(e, own) / 5e3) for e in profile.key_averages() if getattr(e, own) > 0
                    and (gpu.device.type != "cuda" or e.device_type == torch.autograd.DeviceType.CUDA)]
        shares = Counter()
        for key, ms in kernels_:
            shares[next((kind for kind, pattern in KINDS if re.search(pattern, key, re.I)), "everything else (elementwise)")] += ms
        rows_ = [[kind, f"{ms:.1f}", f"{ms / whole:.1%}"] for kind, ms in shares.most_common()]
        rows_ += [["nothing (gaps)", f"{max(0.0, whole - sum(shares.values())):.1f}", f"{max(0.0, 1 - sum(shares.values()) / whole):.1%}"]]
        longest = sorted(kernels_, key=lambda pair: -pair[1])[:12]
        parts.append(f"{name}: {whole:.1f} ms a step (profiled)\n\n" + table(["kind", "ms", "share"], rows_) + "\n"
                     + table(["longest kernels", "ms"], [[f"`{key[:90]}`".replace("|", "/"), f"{ms:.2f}"] for key, ms in longest]))
        del run
        torch._dynamo.reset()
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------------ main

PARTS = {
    "cpu": dict(shakespeare=cpu_shakespeare, gathered=cpu_gathered, bf16=cpu_bf16, choices=cpu_choices, host=cpu_host),
    "gpu": dict(head=gpu_head, attention=gpu_attention, steps=gpu_steps, profile=gpu_profile),
}


def machine(suite):
    """The machine and the versions, in words."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    features = [name for name, has in (("AVX2", torch.cpu._is_avx2_supported()), ("AVX-512", torch.cpu._is_avx512_supported()),
                                       ("bf16", engine.has_bf16(CPU))) if has]
    what = f"{cpu}, {torch.get_num_threads()} threads, {', '.join(features)}"
    if suite == "gpu" and torch.cuda.is_available():
        what = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}; host: {what}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {getattr(kernels.triton, '__version__', 'none')}, numpy {np.__version__}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    return what, versions, commit or "no git"


def main():
    cfg = configurator.load(Config, about=__doc__)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if cfg.suite == "gpu" and torch.cuda.is_available() else "cpu")
    gpu = Device(device, torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0)
    parts = {name: part for name, part in PARTS[cfg.suite].items() if not cfg.only or name in cfg.only.split(",")}
    what, versions, commit = machine(cfg.suite)
    text = [f"# Measured by `python {' '.join(['bench.py', *sys.argv[1:]])}`\n", f"{datetime.date.today()}, commit {commit}; {what}; {versions}. "
            "Median [range]; ratios are medians of ratios within a round.\n"]
    context = kernels.preferring_cudnn(device) if device.type == "cuda" else contextlib.nullcontext()
    for name, part in parts.items():
        print(f"{name} …", file=sys.stderr, flush=True)
        torch._dynamo.reset()
        with context:
            result = part(cfg) if cfg.suite == "cpu" else part(cfg, gpu)
        text.append(f"## {name}\n\n{' '.join(part.__doc__.split())}\n\n{result}")
        print(text[-1], flush=True)
        if cfg.out and not cfg.smoke:  # after each part: a run that is cut short leaves what it has
            folder = Path(cfg.out)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{cfg.suite}{'_' + cfg.only.replace(',', '_') if cfg.only else ''}.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
