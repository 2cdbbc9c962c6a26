"""Training steps to be timed, on real tokens: ours, as train.py takes them, and plain ones as nanoGPT's."""

import functools
import itertools
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import diffusion
import kernels
from configurator.ladder import swiglu_width
from corpus import python_docs
from model import ModelConfig, Transformer
from training import update
from training.average import WeightAverage
from training.objective import Objective, compile_and_wrap
from training.transfer import to_device, to_tensors


@functools.cache
def real_tokens(n_vocab):
    """Read the documentation inside this Python as ids: words and signs by rank of frequency.

    All that are rarer than the first n_vocab − 1 share the last id.
    """
    words = [word for text in python_docs.documents() for word in re.findall(r"\w+|\s+|[^\w\s]", text)]
    by_frequency = Counter(words).most_common()
    ids = {word: min(rank, n_vocab - 1) for rank, (word, _) in enumerate(by_frequency)}
    return np.array([ids[word] for word in words])


def model_shape(n_layer, n_head, d_model, n_vocab, seq_len, causal, tied=True):
    """The ModelConfig of a small model: each head has keys of its own, the mask's id follows the text's."""
    return ModelConfig(
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=d_model // n_head,
        d_model=d_model,
        d_ff=swiglu_width(d_model),
        n_vocab=n_vocab,
        mask_id=n_vocab,
        seq_len=seq_len,
        causal=causal,
        tied=tied,
    )


# ------------------------------------------------------------------------------------------------------ ours


class TrainingStep:
    """A training step as train.py takes it, on a few batches of real tokens in turn: call it to take one.

    full_head: the whole network, its head and loss run at every position. plain_loss: that, and the loss is
    computed from fp32 logits, without kernels. compile, cuda_graphs, short_rows, optimizer and ema as
    train.py's settings; `use` as in `Transformer.use`.
    """

    def __init__(self, config, objective, rows, device, dtype, compile="whole", full_head=False,
                 plain_loss=False, n_batches=4, cuda_graphs=False, short_rows=0.0, optimizer="adamw", ema=0.0,
                 **use):
        torch.manual_seed(0)
        process = diffusion.Process(
            objective, config.n_vocab, config.mask_id, config.seq_len, block=config.diffusion_block)
        batches, shares = make_batches(process, rows, n_batches, short_rows)
        if full_head or plain_loss:
            batches, shares = [at_every_position(batch) for batch in batches], [1.0] * n_batches

        with device:
            self.network = Transformer(config).init_weights().use(**use)
        objective = Objective(self.network, False)
        if plain_loss:
            objective.loss_figures = full_logits_loss
        self.objective = compile_and_wrap(objective, compile, cuda_graphs=cuda_graphs)
        fuse = device.type == "cuda" and compile != "no"
        self.optimizer = update.make_optimizer(
            self.network, 2e-4, (0.9, 0.95), 0.1, optimizer, dtype, fuse)
        self.average = WeightAverage(objective, ema) if ema else None
        self.cuda_graphs = cuda_graphs
        self.device, self.in_bf16 = device, dtype == torch.bfloat16

        self.batches = itertools.cycle([to_device(to_tensors(batch), device) for batch in batches])
        self.tokens = rows * config.seq_len
        self.head_share = float(np.mean(shares))  # of the positions, those for which the head is computed
        self.example, self.example_share = batches[0], shares[0]
        self.loss = self.norm = None  # the last step's, () on the device

    def __call__(self):
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        batch = next(self.batches)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16):
            loss = self.objective(batch)["loss"]
        loss.backward()

        parameters = update.parameters(self.optimizer)
        self.norm = nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, 1.0, self.norm)
        self.optimizer.found_inf = update.is_bad(self.norm, 0.0).float()
        self.optimizer.step()
        if self.average:
            self.average.add(self.optimizer)
        self.optimizer.zero_grad(set_to_none=not self.cuda_graphs)
        self.loss = loss.detach()


def make_batches(process, rows, n_batches, short_rows=0.0):
    """Make batches of real tokens, as arrays → (batches, the share of the positions of each with a head)."""
    settings = SimpleNamespace(
        document_attention=False, short_rows=short_rows, seed=process.seed, seq_len=process.seq_len)
    sequences = data.Sequences(real_tokens(process.n_vocab), process.seq_len, seed=1)
    batches, shares = [], []
    for first in range(0, n_batches * rows, rows):
        sample = first + np.arange(rows)
        ids = sequences.ids(sample)
        eligible = data.eligible_positions(settings, sequences, ids, sample)
        counts = data.count_by_block(process, eligible)
        levels = diffusion.noise_levels(process, first, rows, n_eligible=counts)
        batches.append(
            data.read_batch(settings, None, process, sequences, ids, levels, np.arange(rows), eligible))
        is_masked = process.objective == "masked"
        shares.append(float(levels.count.sum(1).mean()) / process.seq_len if is_masked else 1.0)
    return batches, shares


def full_logits_loss(hidden, head, batch, n_vocab, posterior=False):
    """Compute the loss as one would write it without kernels: fp32 logits at every position."""
    logits = kernels.head_logits(hidden.flatten(0, -2), head, n_vocab)
    nats = F.cross_entropy(logits, batch.targets, reduction="none")
    return {"loss": (nats * batch.weights[:, 0]).sum()}


def at_every_position(batch):
    """The same masked batch with all positions picked, those without a mask with weight 0."""
    if batch.index is None:
        return batch
    is_real = batch.weights[:, 0] > 0  # the others only pad the batch
    index = batch.index[is_real]
    weights, targets = np.zeros((batch.tokens.size, 1), np.float32), np.zeros(batch.tokens.size, np.int64)
    weights[index], targets[index] = batch.weights[is_real], batch.targets[is_real]
    return batch._replace(weights=weights, targets=targets, index=None)


def counted_flops(config, rows, example):
    """FLOPs per token of forward and backward pass by torch's own counter, attention in full.

    The counter sees what a batch is padded to, so `example` is cut to the positions that count. Tensors have
    no values.
    """
    if example.index is not None:
        is_real = example.weights[:, 0] > 0
        example = example._replace(
            index=example.index[is_real], targets=example.targets[is_real], weights=example.weights[is_real]
        )
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, sdpa_kernel(SDPBackend.MATH), counter:
        objective = Objective(Transformer(config), False)
        tensors = to_tensors(example)
        batch = diffusion.Batch(*(None if t is None else fake.from_tensor(t) for t in tensors))
        objective(batch)["loss"].backward()
    return counter.get_total_flops() / (rows * config.seq_len)


# ----------------------------------------------------------------------------------------------------- plain


class PlainBlock(nn.Module):
    """A block as nanoGPT's users know it: LayerNorm, GELU, learned positions elsewhere, no biases."""

    def __init__(self, d_model, n_head):
        super().__init__()
        self.n_head = n_head
        self.norms = nn.ModuleList(nn.LayerNorm(d_model, bias=False) for _ in range(2))
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x):
        B, L, D = x.shape
        qkv = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (t.view(B, L, self.n_head, -1).transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, L, D))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class PlainGPT(nn.Module):
    """A GPT in nanoGPT's style. Inputs and targets (B, L) → mean cross-entropy ()."""

    def __init__(self, n_layer, n_head, d_model, n_vocab, seq_len):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_vocab, d_model), nn.Embedding(seq_len, d_model)
        self.blocks = nn.Sequential(*(PlainBlock(d_model, n_head) for _ in range(n_layer)))
        self.norm = nn.LayerNorm(d_model, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        h = self.norm(self.blocks(self.tokens(x) + self.positions.weight))
        return F.cross_entropy(F.linear(h, self.tokens.weight).flatten(0, 1), y.flatten())


def plain_step(is_compiled, is_fused, rows, seq_len, n_vocab, **shape):
    """Make a training step in nanoGPT's style: fp32, AdamW (on a CPU not fused), clipping, all logits."""
    torch.manual_seed(0)
    network = PlainGPT(n_vocab=n_vocab, seq_len=seq_len, **shape)
    groups = [
        dict(params=[p for p in network.parameters() if p.dim() >= 2], weight_decay=0.1),
        dict(params=[p for p in network.parameters() if p.dim() < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=is_fused)
    loss_of = torch.compile(network) if is_compiled else network
    sequences = data.Sequences(real_tokens(n_vocab), seq_len, seed=1)
    tokens = [sequences.rows(np.arange(rows) + i * rows) for i in range(4)]
    batches = itertools.cycle([torch.from_numpy(x.astype(np.int64)) for x in tokens])

    def step():
        x = next(batches)
        loss_of(x[:, :-1].contiguous(), x[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
