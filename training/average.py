"""An exponential moving average of the weights: what the bounds of most papers are of (docs/math.md §13)."""

import contextlib

import torch

from training import update
from training.distributed import local_tensor, reshard


class WeightAverage:
    """w̄ ← β·w̄ + (1 − β)·w after every update that happened, in fp32, sharded as the weights are.

    The average knows nothing of the first weights for long: after n updates β is at most (1 + n)/(10 + n).
    """

    def __init__(self, objective, decay):
        self.objective, self.decay = objective, decay
        self.weights = {name: torch.zeros_like(p) for name, p in objective.network.named_parameters()}

    def pairs(self):
        """(average, weight) of every parameter, as this rank holds them."""
        for name, p in self.objective.network.named_parameters():
            yield local_tensor(self.weights[name]), local_tensor(p.detach())

    def start(self):
        """Begin with the weights as they are."""
        for average, weight in self.pairs():
            average.copy_(weight)

    @torch.no_grad()
    def add(self, optimizer):
        """Take in the weights after a step. The host does not wait to hear whether it changed them."""
        n = update.update_count(optimizer)
        beta = torch.clamp((1 + n) / (10 + n), max=self.decay)
        share = (1 - beta) * (1 - optimizer.found_inf)
        for average, weight in self.pairs():
            average.lerp_(weight, share)

    @contextlib.contextmanager
    def in_use(self):
        """A context in which the network computes with the averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        """Exchange averages and weights."""
        reshard(self.objective)  # or it would go on with what it has gathered
        for average, weight in self.pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
