"""A world so small that every probability in it is known: V tokens, L positions, strongly dependent."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch

import diffusion

SCHEDULES = ("linear", "cosine", "poly2", "poly3")
V, L, M = 3, 3, 3  # text tokens, positions, the mask's id
STATES = np.array(list(itertools.product(range(V), repeat=L)))  # (27, L)
P = np.random.default_rng(0).gamma(0.4, size=len(STATES)) + 0.01  # of the states
P /= P.sum()
H = float(-(P * np.log(P)).sum()) / L  # nats per token


def process(objective="masked", **settings):
    """A Process over this world."""
    return diffusion.Process(objective, V, M, L, **settings)


def state_numbers(x):
    """The number of each row's state in STATES: (N, L) → (N,)."""
    return (x * V ** np.arange(L)[::-1]).sum(1)


class Denoiser(torch.nn.Module):
    """Stands in for the network: hidden states are the optimal log-probabilities, the head is the identity.

    kind: masked; loo (uniform, leave one out) or posterior (uniform, the position's own token seen).
    mistake: how wrong it is, in a fixed way. clean (B, L): the positions that it knows to be clean. block: of
    block diffusion, the positions of a block; of later ones it knows nothing.
    """

    def __init__(self, kind, schedule="linear", mistake=0.0, clean=None, block=0):
        super().__init__()
        self.kind, self.schedule, self.mistake = kind, diffusion.schedule(schedule), mistake
        self.clean = torch.zeros(1, L, dtype=torch.bool) if clean is None else torch.from_numpy(clean)
        self.config = SimpleNamespace(n_vocab=V, mask_id=M, causal=False, timed=kind != "masked",
                                      diffusion_block=block)
        self.embed = torch.nn.Embedding(1, 1)
        self.head = torch.eye(V, dtype=torch.float64)

    def logits(self, hidden):
        return hidden

    def likelihood(self, z, t):
        """p(z_i | x_i) for each of the states x: (B, 27, L)."""
        equal = z[:, None, :] == torch.tensor(STATES)[None]
        if self.kind == "masked":
            return torch.where(z[:, None, :] == M, 1.0, equal.double())
        ratio = torch.tensor(self.schedule.r(t.double().numpy()))  # (B, M)
        if ratio.shape[1] > 1:
            ratio = ratio.repeat_interleave(self.config.diffusion_block, 1)[:, :L]
        ratio = ratio[:, None, :] * ~self.clean[:, None, :]
        return (1 - ratio) * equal + ratio / V

    def forward(self, z, t=None, documents=None, index=None, positions=None, visible=None, clean=None):
        """log p(x_i = v | what is known), (B, L, V) or (C, V): enumeration over all states."""
        states, prior = torch.tensor(STATES), torch.tensor(P)
        likelihood, block = self.likelihood(z, t), self.config.diffusion_block
        chances = torch.zeros(len(z), L, V, dtype=torch.float64)
        for i in range(L):
            others = likelihood.clone()
            if block:  # the blocks before are known, those after are not
                start = i // block * block
                others[:, :, :start] = (clean[:, None, :] == states[None])[:, :, :start].double()
                others[:, :, start + block :] = 1.0
            if self.kind != "posterior":  # leave one out; for masked positions it makes no difference
                others[:, :, i] = 1.0
            weight = others.prod(-1) * prior  # (B, 27)
            for v in range(V):
                chances[:, i, v] = weight[:, states[:, i] == v].sum(1)
        logits = torch.log(chances / chances.sum(-1, keepdim=True) + 1e-300)
        if self.mistake:
            wrong = torch.arange(V) * (1 + z.sum(1) % 3)[:, None, None]
            logits = logits.clamp_min(-4) * (1 - self.mistake) + self.mistake * wrong
        return logits if index is None else logits.flatten(0, 1)[index]


def loss_of(network, batch, posterior=False):
    """The loss of a network on a batch of tensors."""
    hidden = network(batch.tokens, batch.time, batch.documents, batch.index, clean=batch.clean)
    return diffusion.loss_figures(hidden, network.head, batch, network.config.n_vocab, posterior)["loss"]


def to_tensors(batch):
    """A batch of arrays as tensors, weights in fp64."""
    batch = batch._replace(weights=batch.weights.astype(np.float64))
    arrays = (None if array is None else np.ascontiguousarray(array) for array in batch)
    return diffusion.Batch(*(None if array is None else torch.from_numpy(array) for array in arrays))


def estimate(p, denoiser, posterior=False, groups=40, n_rows=1500, progress=0.5, eligible=None):
    """Mean and standard error of the loss over independent steps whose rows are drawn from P.

    eligible (n_rows, L): the positions that count. The loss is taken relative to the rows' own
    log-likelihood, given the other positions, which takes the noise of drawing rows out.
    """
    differences, rng = [], np.random.default_rng(1)
    counts = None if eligible is None else eligible.sum(1)
    for group in range(groups):
        x = STATES[rng.choice(len(P), n_rows, p=P)]
        levels = diffusion.noise_levels(p, group * n_rows, n_rows, progress, counts)
        before = np.concatenate((x[:, :1], x), 1)
        batch = diffusion.make_batch(p, before, levels, levels.microbatch_rows(0, 1), eligible)
        differences.append(loss_of(denoiser, to_tensors(batch), posterior).item() - surprise(x, eligible))
    expected = H if eligible is None else conditional_entropy(eligible)
    return expected + np.mean(differences), np.std(differences, ddof=1) / math.sqrt(groups)


def surprise(x, eligible=None):
    """−log p of the eligible tokens of all rows, given the others, per token."""
    eligible = np.ones(x.shape, bool) if eligible is None else eligible
    nats = -np.log(P[state_numbers(x)])
    for pattern in np.unique(eligible, axis=0):  # given the others: log p of those is added
        rows = (eligible == pattern).all(1)
        marginal = np.bincount(state_numbers(STATES * ~pattern), weights=P)
        nats[rows] += np.log(marginal[state_numbers(x[rows] * ~pattern)])
    return nats.sum() / eligible.sum()


def conditional_entropy(eligible):
    """The expectation of `surprise`, by enumeration."""
    total = 0.0
    for pattern, n in zip(*np.unique(eligible, axis=0, return_counts=True)):
        nats = [surprise(state[None], pattern[None]) * pattern.sum() for state in STATES]
        total += n * float(P @ nats)
    return total / eligible.sum()


def curve(denoiser):
    """C_k, the mean cross-entropy of a masked token when k are masked, by enumeration: (L,)."""
    states, result = torch.tensor(STATES), []
    for k in range(1, L + 1):
        total = 0.0
        masks = list(itertools.combinations(range(L), k))
        for mask in masks:
            z = states.clone()
            z[:, list(mask)] = M
            nats = -denoiser(z).log_softmax(-1).gather(-1, states[..., None])[..., 0]
            total += (torch.tensor(P) * nats[:, list(mask)].mean(1)).sum().item() / len(masks)
        result.append(total)
    return np.array(result)


def chi_square(samples):
    """Pearson's statistic of samples (n, L) against P, and its 99.9 % bound (Wilson-Hilferty)."""
    numbers = state_numbers(samples.numpy())
    expected = P * len(numbers)
    k = len(P) - 1
    bound = k * (1 - 2 / (9 * k) + 3.09 * math.sqrt(2 / (9 * k))) ** 3
    return ((np.bincount(numbers, minlength=len(P)) - expected) ** 2 / expected).sum(), bound
