"""Diffusion for discrete tokens: schedules, noise, the weights of every bound, losses and reverse steps.

The forward process runs on the host, in numpy: the same masks on every device, and the number of positions
that the LM head needs is known before the step. The network receives a `Batch`: noisy tokens, the positions
that are scored, their targets and their weights. Every weight already holds the objective's factor and the
mean over the *global* batch, so a step's loss is a plain sum over all of its batches.

Symbols (docs/math.md): t time, r(t) noise ratio, α = 1 − r, L tokens of a row, M blocks of a row, k corrupted
positions of a block, V text tokens, x clean tokens, z noisy tokens.

A cell is a block of a row: what has a noise level of its own. Without block diffusion a row is one block.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from kernels import linear_cross_entropy, linear_uniform_bound

# ----------------------------------------------------------------------------------------------- schedules


@dataclass(frozen=True)
class Schedule:
    """The noise ratio r(t), increasing from 0 to 1, its derivative r′(t) and its inverse.

    All three work on floats and arrays. Raises ValueError unless r(0) = 0 and r(1) = 1: a schedule that ends
    at r(1) = 1 − ε would drop r ∈ (1 − ε, 1] from the bound.
    """

    r: Callable
    dr: Callable
    inverse: Callable

    def __post_init__(self):
        for t in (0.0, 1.0):
            if not math.isclose(self.r(t), t, abs_tol=1e-12):
                raise ValueError(f"a schedule has r(0) = 0 and r(1) = 1, not r({t:g}) = {self.r(t):g}")
            if not math.isclose(self.inverse(t), t, abs_tol=1e-12):
                raise ValueError(f"the inverse of r maps {t:g} to {t:g}, not to {self.inverse(t):g}")


@functools.lru_cache
def schedule(name):
    """The schedule called `linear`, `cosine` or `poly<n>` (docs/math.md §2); raises ValueError.

    linear r = t; cosine r = sin(πt/2), that is α = 1 − cos(π/2·(1−t)), MD4's; poly<n> r = tⁿ.
    """
    if name == "linear":
        return Schedule(lambda t: t, lambda t: t * 0 + 1.0, lambda u: u)
    if name == "cosine":
        half = math.pi / 2
        return Schedule(
            lambda t: np.sin(half * t), lambda t: half * np.cos(half * t), lambda u: np.arcsin(u) / half
        )
    power = name.removeprefix("poly")
    if power != name and power.isdecimal() and len(power) <= 3 and int(power):
        n = int(power)
        return Schedule(lambda t: t**n, lambda t: n * t ** (n - 1), lambda u: u ** (1 / n))
    if name == "loglinear":  # MDLM's and SEDD's
        raise ValueError("schedule=loglinear, α = 1 − (1 − ε)t, is linear without its ε: choose linear")
    raise ValueError(f"unknown schedule '{name}'; choose linear, cosine or poly<n> (poly2, poly3, …)")


# ----------------------------------------------------------------------------------- counter-based randomness

# Independent streams of random bits.
MASK, REPLACE, LEVEL, OFFSET, LENGTH, ORDER, TOKEN, CHANGE, START, SIGHT, PLACE, INPUT = range(12)


def mix(x):
    """SplitMix64's output function, elementwise on uint64 (wraps modulo 2**64)."""
    with np.errstate(over="ignore"):
        x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        return x ^ x >> np.uint64(31)


def random_bits(seed, stream, sample, length, first=0):
    """64 random bits per (sample, position): SplitMix64 started at a hash of (seed, stream, sample).

    A pure function: the same on any number of ranks, in any split of the batch and after any resume.
    `sample` (B,) counts the rows drawn since training began, so it fixes the epoch too; positions count from
    `first` on. → (B, length) uint64.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.uint64(seed & 0xFFFFFFFFFFFFFFFF) + golden)
        key = mix(key + np.uint64(stream + 1) * golden)
        key = mix(key + (np.asarray(sample).astype(np.uint64) + np.uint64(1)) * golden)
        position = np.arange(first, first + length, dtype=np.uint64)
        return mix(key[:, None] + (position + np.uint64(1)) * golden)


def unit(bits):
    """Uniform in (0, 1] from 64 random bits."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53


def annealed_mask(seed, step, length, share):
    """The mask of a step in which attention turns from causal to bidirectional: (length, length) bool.

    Row i sees all that is not after it, and a random `share` of what is, drawn anew for each step
    (DiffuLLaMA's annealing).
    """
    visible = np.tri(length, dtype=bool)
    for first in range(0, length, 256):  # 256 rows at a time bound the memory of the random bits
        rows = np.arange(first, min(first + 256, length))
        visible[rows] |= unit(random_bits(seed, SIGHT, step * length + rows, length)) <= share
    return visible


# ------------------------------------------------------------------------------------------- noise of a step


class Process(NamedTuple):
    """Everything that fixes the forward process and the weights of the loss."""

    objective: str  # ar, masked or uniform
    n_vocab: int
    mask_id: int
    seq_len: int
    seed: int = 0
    loss: str = "elbo"  # masked: elbo or maskgit; uniform: elbo or paper
    estimator: str = "count"  # of the masked bound: count, ratio or time
    schedule: str = "linear"
    time: str = "uniform"  # uniform (stratified), iid or moving_gaussian; cube measures the uniform bound
    time_sigma: float = 0.2
    time_correction: bool = False  # divide by the density of moving_gaussian's t
    block: int = 0  # tokens of a block, the last of a row may have fewer (docs/math.md §12); 0: the whole row
    input_mask: float = 0.0  # ar: the share of the tokens that it reads that are masked

    @property
    def block_size(self):
        return self.block or self.seq_len

    @property
    def n_blocks(self):
        return -(-self.seq_len // self.block_size)

    @property
    def has_noise(self):
        """Whether a row's loss depends on chance: not where each token is predicted from all before it."""
        is_chain = self.objective == "masked" and self.block == 1 and self.estimator == "count"
        return self.objective != "ar" and not is_chain


class NoiseLevels(NamedTuple):
    """Noise levels of all cells of one optimizer step, M blocks in each of N rows.

    Micro-batches take theirs by `microbatch_rows`.
    """

    sample: np.ndarray  # (N,) global sample index
    t: np.ndarray  # (N, M) time in (0, 1]
    n_eligible: np.ndarray  # (N, M) positions of the block that count
    count: np.ndarray  # (N, M) k = ⌈r(t)·n_eligible⌉ of them are corrupted
    mean: float  # of moving_gaussian's t at this step

    def microbatch_rows(self, part, parts):
        """Every parts-th row: a micro-batch is itself a lattice, and no rank gets only clean rows."""
        return np.arange(part, len(self.t), parts)


def noise_levels(p, first_sample, n_rows, progress=0.0, n_eligible=None):
    """Noise levels for one step of n_rows rows whose first is sample `first_sample`; progress ∈ [0, 1].

    One lattice over all cells of the step (docs/math.md §3, §12): row i's are u = (i + N·σ + offset)/(N·M),
    σ a random order of 0 … M − 1. So a level tells nothing of the block's place in its row, and every strided
    micro-batch is a lattice itself. n_eligible (N, M): how many positions of each cell count; or (N,): of
    each row, which counts from its first position on (None: all of it).
    """
    sample, M = first_sample + np.arange(n_rows, dtype=np.int64), p.n_blocks
    if p.time == "iid":
        u = unit(random_bits(p.seed, LEVEL, sample, M))
    else:
        order = np.argsort(random_bits(p.seed, PLACE, sample, M), axis=1) if M > 1 else 0
        offset = unit(random_bits(p.seed, OFFSET, sample[:1], 1)[0, 0])
        u = (np.arange(n_rows)[:, None] + n_rows * order + offset) / (n_rows * M)
    t = time_quantile(p, u, progress)
    if n_eligible is None:
        n_eligible = np.full(n_rows, p.seq_len)
    if np.ndim(n_eligible) == 1:
        n_eligible = np.clip(n_eligible[:, None] - p.block_size * np.arange(M), 0, p.block_size)
    return NoiseLevels(sample, t, n_eligible, noisy_count(p, t, n_eligible), progress)


def noisy_count(p, t, n_eligible):
    """k = ⌈r(t)·n_eligible⌉, at least 1 where anything counts."""
    count = np.maximum(np.ceil(schedule(p.schedule).r(t) * n_eligible), 1)
    return np.minimum(count, n_eligible).astype(np.int64)


def by_block(p, positions, fill=0):
    """Rows cut into blocks, a shorter last one filled up: (B, L) → (B·M, block_size)."""
    missing = p.n_blocks * p.block_size - p.seq_len
    if missing:
        positions = np.pad(positions, ((0, 0), (0, missing)), constant_values=fill)
    return positions.reshape(-1, p.block_size)


def at_positions(p, cells):
    """What each position has from its cell: (B, M) → (B, L), or (B, 1) where a row is one block."""
    return cells if p.n_blocks == 1 else np.repeat(cells, p.block_size, axis=1)[:, : p.seq_len]


def time_quantile(p, u, mean):
    """t from uniform u: u itself; a quantile of N(mean, σ²) truncated to (0, 1]; or, `cube`, r⁻¹(u³).

    Where few tokens are noisy, r → 0, the uniform bound's integrand is about log(1/r)/r with probability r:
    its variance under uniform t is infinite. Drawing r with density r^(−2/3)/3 makes it finite, and the third
    moment too: without them error bars mean nothing.
    """
    if p.time == "cube":
        return schedule(p.schedule).inverse(u**3)
    if p.time != "moving_gaussian":
        return u
    low, high = gaussian_cdf((0 - mean) / p.time_sigma), gaussian_cdf((1 - mean) / p.time_sigma)
    z = torch.special.ndtri(torch.from_numpy(np.asarray(low + u * (high - low)))).numpy()
    return np.clip(mean + p.time_sigma * z, 1e-12, 1.0)


def time_cdf(p, t, mean):
    """The distribution function of t; that of uniform t unless the sampler is to be corrected for."""
    if p.time == "cube":
        return np.cbrt(schedule(p.schedule).r(t))
    if p.time != "moving_gaussian" or not p.time_correction:
        return t
    low, high = gaussian_cdf((0 - mean) / p.time_sigma), gaussian_cdf((1 - mean) / p.time_sigma)
    return (gaussian_cdf((t - mean) / p.time_sigma) - low) / (high - low)


def time_density(p, t, mean):
    """The derivative of `time_cdf`."""
    if p.time == "cube":
        s = schedule(p.schedule)
        return s.dr(t) / (3 * np.cbrt(s.r(t)) ** 2)
    if p.time != "moving_gaussian" or not p.time_correction:
        return np.ones_like(t)
    low, high = gaussian_cdf((0 - mean) / p.time_sigma), gaussian_cdf((1 - mean) / p.time_sigma)
    z = (t - mean) / p.time_sigma
    return np.exp(-0.5 * z * z) / (math.sqrt(2 * math.pi) * p.time_sigma * (high - low))


def gaussian_cdf(z):
    """The standard normal distribution function, in fp64."""
    return torch.special.ndtr(torch.as_tensor(z, dtype=torch.float64)).numpy()


@functools.lru_cache
def capacity(p, n_rows, spacing=None):
    """Positions that any micro-batch of n_rows rows can mask: known before compiling (docs/math.md §3).

    A micro-batch's rows lie `spacing` apart (1/n_rows where it divides the step evenly), so the levels of its
    i-th are at most ((i + 1)·spacing + σ)/M, σ = 0 … M − 1; r and the quantile of t increase in u, so the
    maximum is reached there. Counts that are drawn (ratio and time form) get ten standard deviations more;
    `pack` refuses what would not fit.
    """
    top = np.minimum(1.0, (np.arange(n_rows) + 1) * (spacing or 1 / n_rows))
    top = (top[:, None] + np.arange(p.n_blocks)) / p.n_blocks
    t = time_quantile(p, np.ones_like(top) if p.time == "iid" else top, 1.0)
    most = int(noisy_count(p, t, np.full(t.shape, p.block_size)).sum())
    if p.estimator != "count":
        most += int(10 * math.sqrt(n_rows * p.seq_len / 4)) + t.size
    return min(-(-most // 64) * 64, n_rows * p.seq_len)


# --------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """One forward pass, as arrays or tensors. C = B·L, or the capacity where `index` picks positions."""

    tokens: np.ndarray  # (B, L) what the network reads
    targets: np.ndarray  # (C,)
    weights: np.ndarray  # (C, P) fp32: P parts of the loss, each Σ weight·(nats at the position)
    index: np.ndarray | None = None  # (C,) positions in the flattened batch
    time: np.ndarray | None = None  # (B, M) for networks with a time embedding
    documents: np.ndarray | None = None  # (B, L) ids; attention stays within equal ones. Padding: −1
    noisy: np.ndarray | None = None  # (C,) z, for the uniform bound only
    beta: np.ndarray | None = None  # (C,) Vα/(1−α), likewise
    positions: np.ndarray | None = None  # (B, L) for the rotary encoding, if they start again in documents
    visible: np.ndarray | None = None  # (L, L) what positions (rows) attend to, while that is annealed
    clean: np.ndarray | None = None  # (B, L) x, of which a block reads what precedes it: block diffusion


def make_batch(p, x, levels, rows, eligible=None, valid=None, spacing=None, documents=None):
    """Corrupt the step's `rows` (B,), which read x (B, L + 1): each sequence after the token before it.

    eligible (B, L) bool: the positions that count, which may be noised and are scored; of row b there are
    levels.n_eligible[rows[b]] (None: all). valid (B,) switches off rows that only fill up a batch; spacing as
    in `capacity`; documents (B, L) as in Batch. Returns a Batch of numpy arrays.
    """
    B, L = x.shape[0], p.seq_len
    if eligible is None:
        eligible = np.ones((B, L), bool)
    scored = eligible if valid is None else eligible & valid[:, None]
    total = max(1, levels.n_eligible.sum())  # tokens of the global batch that count
    if p.objective == "ar":
        weights, tokens = stack_weights(scored / total), x[:, :-1]
        if p.input_mask:
            masked = unit(random_bits(p.seed, INPUT, levels.sample[rows], L)) <= p.input_mask
            tokens = np.where(masked, p.mask_id, tokens)
        return Batch(tokens, x[:, 1:].reshape(-1).astype(np.int64), weights, documents=documents)
    x = x[:, 1:].astype(np.int64)
    bits = random_bits(p.seed, MASK, levels.sample[rows], L)
    if p.objective == "masked":
        noisy, weight = masked_weights(p, levels, rows, bits, eligible)
        weight = weight / (max(1, levels.count.sum()) if p.loss == "maskgit" else total)
        weights = scored * at_positions(p, weight)
        batch = pack(p, x, noisy, weights, documents, capacity(p, B, spacing))
    else:
        batch = uniform_batch(p, x, levels, rows, bits, eligible, scored, documents)
    return batch._replace(clean=x) if p.block else batch


def uniform_batch(p, x, levels, rows, bits, eligible, scored, documents):
    """A Batch of uniform diffusion: noisy positions hold uniform draws of text tokens (docs/math.md §6)."""
    L, t, total = p.seq_len, levels.t[rows], max(1, levels.n_eligible.sum())
    drawn = random_bits(p.seed, REPLACE, levels.sample[rows], L) >> np.uint64(32)
    drawn = (drawn * np.uint64(p.n_vocab) >> np.uint64(32)).astype(np.int64)
    targets, time = x.reshape(-1), t.astype(np.float32)
    if p.loss == "paper":  # ½(noisy + clean): inferred from the paper's figures (docs/math.md §6)
        noisy, weight = masked_weights(p, levels, rows, bits, eligible)
        clean_total = max(1, (levels.n_eligible - levels.count).sum())
        parts = scored * noisy * at_positions(p, weight) / total, scored * ~noisy / clean_total
        weights = stack_weights(*(part / 2 for part in parts))
        return Batch(np.where(noisy, drawn, x), targets, weights, time=time, documents=documents)
    s = schedule(p.schedule)
    ratio = s.r(t)
    alpha = np.maximum(1 - ratio, 1e-6)  # the integrand is O(α) there; the floors keep its factors finite
    noisy = (unit(bits) <= at_positions(p, ratio)) & eligible
    z = np.where(noisy, drawn, x)
    weight = s.dr(t) / (p.n_vocab * alpha) / (total * time_density(p, t, levels.mean))
    weights = stack_weights(scored * at_positions(p, weight))
    beta = at_positions(p, p.n_vocab * alpha / np.maximum(ratio, 1e-9))
    beta = np.broadcast_to(beta, x.shape).reshape(-1).astype(np.float32)
    return Batch(z, targets, weights, time=time, documents=documents, noisy=z.reshape(-1), beta=beta)


def masked_weights(p, levels, rows, bits, eligible):
    """Draw the corrupted positions (B, L) and give each cell's weight per corrupted position (B, M).

    Σ over a cell of weight·CE estimates n × NELBO/token, n its eligible positions (`maskgit`: all are 1):
    time form   i.i.d. positions, w(t) = r′/r;
    ratio form  the same positions, r′·n/k for the realized k, one position forced where k = 0
                (so it estimates (n·NELBO + C₁)/(n + 1), C₁ the cross-entropy of a single mask);
    count form  exactly k, 1/(k·P(k)), P(k) = F(r⁻¹(k/n)) − F(r⁻¹((k−1)/n)).
    """
    t, s = levels.t[rows], schedule(p.schedule)
    n, count = (np.maximum(cells[rows], 1) for cells in (levels.n_eligible, levels.count))  # no 0/0
    if p.estimator == "count" or p.loss != "elbo":
        noisy = draw_positions(p, bits, count, eligible)
        if p.loss == "maskgit":
            return noisy, np.ones_like(t)
        upper, lower = (time_cdf(p, s.inverse(k / n), levels.mean) for k in (count, count - 1))
        return noisy, 1 / (count * (upper - lower))
    noisy = (unit(bits) <= at_positions(p, s.r(t))) & eligible
    density = time_density(p, t, levels.mean)
    if p.estimator == "time":
        return noisy, s.dr(t) / (s.r(t) * density)
    noisy |= draw_positions(p, bits, np.ones_like(count), eligible)  # the smallest: masked unless none is
    realized = np.maximum(by_block(p, noisy).sum(1).reshape(t.shape), 1)
    return noisy, s.dr(t) * n / (realized * density)


def draw_positions(p, bits, count, eligible):
    """`exactly` count (B, M) of the eligible positions of each block. bits, eligible (B, L) → bool (B, L)."""
    drawn = exactly(by_block(p, bits), count.reshape(-1), by_block(p, eligible))
    return drawn.reshape(len(bits), -1)[:, : p.seq_len]


def exactly(bits, count, eligible):
    """A uniformly random set of count[b] of the eligible positions. bits, eligible (B, L) → bool (B, L).

    All of them where there are fewer.
    """
    L = bits.shape[1]
    low = np.uint64((1 << max(1, (L - 1).bit_length())) - 1)
    keys = (bits & ~low) | np.arange(L, dtype=np.uint64)  # the position breaks ties, so the count is exact
    keys = np.where(eligible, keys, ~np.uint64(0))
    threshold = np.take_along_axis(np.sort(keys, axis=1), count[:, None] - 1, axis=1)
    return (keys <= threshold) & eligible


def pack(p, x, noisy, weight, documents, room):
    """A masked Batch: only the masked positions, padded with weight 0 to a size known at compile time."""
    index = np.flatnonzero(noisy)
    if len(index) > room:
        raise RuntimeError(f"{len(index)} masked positions exceed a capacity of {room}: a bug in capacity()")
    padded = np.zeros(room, np.int64)
    padded[: len(index)] = index
    weights = np.zeros(room)
    weights[: len(index)] = weight.reshape(-1)[index]
    tokens, targets = np.where(noisy, p.mask_id, x), x.reshape(-1)[padded]
    return Batch(tokens, targets, stack_weights(weights), index=padded, documents=documents)


def stack_weights(*parts):
    """Weights of the loss's parts as (C, P) fp32."""
    return np.stack([part.reshape(-1) for part in parts], axis=1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- losses


def loss_and_nats(hidden, head, batch, weights, n_vocab, posterior=False):
    """The loss in nats per token, () fp32, for weights (C,), and the nats at each position, (C,).

    hidden: the network's, (C, D); head (V_padded, D). posterior: for the uniform bound of a network that was
    trained with the `paper` loss.
    """
    if batch.beta is None:
        return linear_cross_entropy(hidden, head, batch.targets, weights, n_vocab)
    z, x = batch.noisy, batch.targets
    return linear_uniform_bound(hidden, head, z, x, batch.beta, weights, n_vocab, posterior)


def figure_names(p):
    """The names of what `loss_figures` returns for a process."""
    return ["loss", "noisy", "clean"] if p.loss == "paper" else ["loss"]


def total_loss(figures):
    """The loss among figures on the host; `paper` is the mean of its parts, exactly as they are."""
    return (figures["noisy"] + figures["clean"]) / 2 if "clean" in figures else figures["loss"]


def loss_figures(hidden, head, batch, n_vocab, posterior=False):
    """The named figures of a forward pass, () fp32 each: "loss", which has gradients, and what it is made of.

    hidden: the network's, (B, L, D) or (C, D). The loss `paper`, ½(noisy + clean), shows both parts.
    """
    loss, nats = loss_and_nats(hidden.flatten(0, -2), head, batch, batch.weights.sum(1), n_vocab, posterior)
    if batch.weights.shape[1] == 1:
        return {"loss": loss}
    noisy, clean = (2 * nats[:, None] * batch.weights).sum(0).unbind()
    return {"loss": loss, "noisy": noisy, "clean": clean}


# -------------------------------------------------------------------------------------------- reverse steps
# A step is two choices: WHICH positions change and WHAT they become. Then fp32 is enough (docs/math.md §7):
# one draw over {every token times the probability of unmasking, staying masked} has to resolve probabilities
# down to 1e-9, which fp32 cannot near 1.


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits after temperature, top-k and top-p (the token that crosses p is kept). (…, V) → (…, V)."""
    if temperature > 0:
        logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs
        excluded = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(excluded, float("-inf"))
    return logits


def draw_tokens(logits, u, temperature=1.0):
    """One token per position, the likeliest at temperature 0. logits (C, V), u (C, 2) in (0, 1] → (C,).

    The distribution function is inverted in two stages, over groups of 256 tokens and then within one, so
    that of V fp32 weights only a few hundred numbers need a running sum (in fp64): a token of probability
    1e-7 at the end of the vocabulary keeps its share; one fp32 running sum over 50 257 would round it away.
    A token of probability 0 is never drawn.
    """
    if temperature == 0:
        return logits.argmax(-1)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    groups = F.pad(weights, (0, -weights.shape[-1] % 256)).unflatten(-1, (-1, 256))  # (C, V/256, 256)
    group = inverse_cdf(groups.sum(-1), u[:, 0])
    members = groups.gather(1, group[:, None, None].expand(-1, 1, 256))[:, 0]  # (C, 256)
    return 256 * group + inverse_cdf(members, u[:, 1])


def inverse_cdf(weights, u):
    """The first index whose running sum reaches u times the total: never one of weight 0.

    weights (C, n), u (C,) in (0, 1] → (C,). In fp64, which costs little for a few hundred numbers. A GPU's
    running sums need not grow monotonically, hence the explicit conditions.
    """
    positive, running = weights > 0, weights.double().cumsum(-1)
    reached = positive & (running >= u[:, None] * running[:, -1:])
    last = weights.shape[-1] - 1 - positive.flip(-1).to(torch.uint8).argmax(-1)
    return torch.where(reached.any(-1), reached.to(torch.uint8).argmax(-1), last)


def draw_uniforms(seed, stream, row, step, length, first=0):
    """Two independent uniforms in (0, 1] per position, multiples of 2⁻³² in fp64: (B, length, 2).

    A pure function of (seed, stream, row, step, position), of the positions from `first` on. row and step:
    (B,) or scalars. Rows know their own steps, so they come out the same in any batch.
    """
    sample = np.asarray(row, np.uint64) * np.uint64(1 << 40) + np.asarray(step, np.uint64)
    bits = random_bits(seed, stream, np.atleast_1d(sample), length, first)
    halves = np.stack((bits >> np.uint64(32), bits & np.uint64(0xFFFFFFFF)), axis=-1)
    return (halves.astype(np.float64) + 1) * 2.0**-32


def tokens_per_step(count, steps):
    """How many of `count` positions are unmasked at each of `steps` steps. (B,), (B,) → (B, max steps).

    Equally many at each; the remainder goes to the first steps, one each.
    """
    step = np.arange(max(1, steps.max(initial=1)))
    base, remainder = np.divmod(count, np.maximum(steps, 1))
    return np.where(step < steps[:, None], base[:, None] + (step < remainder[:, None]), 0)


def rank_within(keys, included):
    """Each included position's rank within its row, smallest key first; elsewhere L. (B, L) → (B, L)."""
    order = np.argsort(np.where(included, keys, np.inf), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(keys.shape[1])[None], axis=1)
    return np.where(included, rank, keys.shape[1])


def unmasking_steps(u, is_masked, steps, s):
    """The step at which each masked position is unmasked, of steps[b] on the grid t_i = 1 − i/S; else −1.

    u, is_masked (B, L), steps (B,), s a Schedule → (B, L). A position is masked at t exactly if its u ≤ r(t):
    the step from t to t′ unmasks it with probability (α_t′ − α_t)/(1 − α_t), independently, as it should.
    Nothing here depends on the network, so steps that unmask nothing need no pass.
    """
    t = np.clip(s.inverse(u.astype(np.float64)), 0, 1)
    step = np.clip(np.floor((1 - t) * steps[:, None]), 0, steps[:, None] - 1)
    return np.where(is_masked, step, -1).astype(np.int64)


def remasking_probability(kind, eta, ratio, next_ratio):
    """σ, with which a written position is masked again between two noise ratios (ReMDM, eq. 9).

    kind: capped or rescaled. arXiv 2503.00307. At most σ_max = min(1, (1 − α_s)/α_t): with it the marginals
    stay those of the forward process.
    """
    sigma_max = np.minimum(1, next_ratio / np.maximum(1 - ratio, 1e-12))
    return np.minimum(eta, sigma_max) if kind == "capped" else eta * sigma_max


def unmasking_probability(ratio, next_ratio, sigma=0.0):
    """The probability that a masked position is unmasked between two noise ratios.

    (α_s − (1 − σ)α_t)/(1 − α_t), written without cancellation: exactly 1 at the last step, however small its
    ratio. 0 where nothing is noisy any more.
    """
    return (ratio - next_ratio + sigma * (1 - ratio)) / np.where(ratio > 0, ratio, 1) * (ratio > 0)


def uniform_step(logits, z, ratio, next_ratio, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw tokens at noise ratio `next_ratio` (C,) from z (C,) at `ratio` (C,). → (C,).

    logits (C, V) leave-one-out, u (C, 5) in (0, 1].
    q(z_s = j | z_t) ∝ (a·1[j = z_t] + (1 − a)/V)·q_j with q_j = α_s x̂_j + (1 − α_s)/V, a = α_t/α_s:
    stay with probability a·q_z/(a·q_z + (1 − a)/V), else draw from q, which is x̂ with probability α_s
    and uniform otherwise.
    """
    V = logits.shape[-1]
    logits = filter_logits(logits, temperature, top_k, top_p)
    token = draw_tokens(logits, u[:, :2], temperature)
    probs = F.one_hot(token, V).float() if temperature == 0 else logits.softmax(-1)
    alpha_s, a = 1 - next_ratio, (1 - ratio) / (1 - next_ratio)
    q_z = alpha_s * probs.gather(-1, z[:, None])[:, 0] + (1 - alpha_s) / V
    stay = a * q_z / (a * q_z + (1 - a) / V)
    random_token = (u[:, 4] * V).ceil().long() - 1
    drawn = torch.where(u[:, 3] <= alpha_s, token, random_token)
    return torch.where(u[:, 2] <= stay, z, drawn)


def leave_one_out(logits, z, ratio):
    """Leave-one-out logits (C, V) from full-posterior ones, for z and ratio (C,) (docs/math.md §6).

    They lie log(1 + Vα/(1−α)) lower at the noisy token.
    """
    shift = torch.log1p(logits.shape[-1] * (1 - ratio) / ratio)
    return logits.scatter_add(-1, z[:, None], -shift[:, None].to(logits.dtype))
