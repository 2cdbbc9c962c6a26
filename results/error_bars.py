"""Do 95 % intervals of the bound and of the exact likelihood hold the truth? By rows, passes and objective.

    PYTHONPATH=. python results/error_bars.py                   # every line of error_bars.md; minutes
    PYTHONPATH=. python results/error_bars.py 16 masked 400 8   # tokens of a row, objective, repeats, rows

Rows are drawn from a mixture of COMPONENTS texts without dependence, whose posteriors are known exactly, and
so is what the optimal network's bound is: the entropy. Each repeat has other text and other noise. Printed
is a line per number of rows: the share of intervals (± 1.96 errors) that hold the truth, for each number of
passes. The masked network is wrong on purpose; its bound is measured on 400,000 rows. Uniform rows are
measured at r = u³ whatever the schedule: that cosine gives what linear does is checked first, as is that the
many repeats, which go through the network together, are what likelihood.evaluate measures.
"""

import math
import sys
from types import SimpleNamespace

import numpy as np
import torch

import data
import diffusion
import kernels
from evaluation import likelihood
from training import transfer
from training.distributed import SINGLE
from training.objective import Objective

V, COMPONENTS, ROWS, PASSES = 4, 3, (8, 16, 64, 256), (1, 4, 200)
OBJECTIVES = ("masked", "uniform", "ar")


class World:
    """A distribution over rows of L tokens: of one of COMPONENTS texts, with its own tokens at each place."""

    def __init__(self, L):
        rng = np.random.default_rng(L)
        self.L = L
        self.share = np.array([0.5, 0.3, 0.2])
        self.p = rng.dirichlet(np.full(V, 0.3), (COMPONENTS, L)) * 0.98 + 0.02 / V  # (components, L, V)

    def draw(self, n, seed):
        """n rows: (n, L) int32."""
        rng = np.random.default_rng(seed)
        component = rng.choice(COMPONENTS, n, p=self.share)
        below = self.p.cumsum(-1)[component] < rng.random((n, self.L, 1))
        return np.minimum(below.sum(-1), V - 1).astype(np.int32)

    def nats(self, rows):
        """−log p per token of each row, (n,)."""
        log_p = np.log(self.p)[:, np.arange(self.L), rows].sum(-1) + np.log(self.share)[:, None]
        return -np.logaddexp.reduce(log_p, axis=0) / self.L


class Network(torch.nn.Module):
    """The optimal network of a World, or one that trusts what it sees too little (`trust` below 1)."""

    def __init__(self, world, kind, schedule, trust=1.0):
        super().__init__()
        self.kind, self.schedule, self.trust = kind, diffusion.schedule(schedule), trust
        self.p, self.log_share = torch.tensor(world.p).float(), torch.tensor(np.log(world.share)).float()
        with_mask = torch.cat((self.p, torch.ones(COMPONENTS, world.L, 1)), -1)
        self.p_seen = with_mask.permute(1, 2, 0).contiguous()  # (L, V + 1, components)
        self.place = torch.arange(world.L)
        self.config = SimpleNamespace(n_vocab=V, mask_id=V, causal=False, timed=kind != "masked")
        self.embed, self.head = torch.nn.Embedding(1, 1), torch.eye(V)

    def forward(self, z, t=None, documents=None, index=None, positions=None, visible=None, clean=None):
        p_seen = self.p_seen[self.place, z]  # (B, L, components)
        if self.kind == "masked":
            weight = (self.log_share + self.trust * p_seen.log().sum(1)).softmax(-1)
            p = torch.einsum("bk,klv->blv", weight, self.p)
        else:
            r = torch.tensor(self.schedule.r(t.double().numpy()))[:, None, None].float()
            log_seen = torch.log((1 - r) * p_seen + r / V)
            others = log_seen.sum(1, keepdim=True) - log_seen  # leave one out
            p = torch.einsum("blk,klv->blv", (self.log_share + others).softmax(-1), self.p)
        logits = p.log()
        return logits if index is None else logits.flatten(0, 1)[index]


class Text:
    """Rows as likelihood.evaluate reads them."""

    def __init__(self, rows):
        self.rows, self.available = rows, len(rows)

    def read(self, ids):
        return np.concatenate((np.zeros((len(ids), 1), np.int32), self.rows[ids]), axis=1)


def read(process, text, ids, levels, rows, valid=None, spacing=None):
    return diffusion.make_batch(process, text.read(ids), levels, rows, valid=valid, spacing=spacing)


class Measurement:
    """An objective's network in a world, and its process of validation."""

    def __init__(self, world, name, schedule="linear"):
        process = diffusion.Process(name, V, V, world.L)
        self.world, self.process = world, likelihood.validation_process(process, schedule)
        network = Network(world, name, schedule, trust=0.5 if name == "masked" else 1.0)
        self.objective = Objective(network, False)

    def evaluate(self, rows, passes):
        """likelihood.evaluate of rows (n, L): RowLosses."""
        scorer = likelihood.RowScorer(self.objective, Text(rows), read, min(len(rows), 8192), SINGLE,
                                      torch.device("cpu"))
        return likelihood.evaluate(scorer, self.process, len(rows), passes)

    @torch.no_grad()
    def repeats(self, rows, passes):
        """The losses of many repeats, each of its own rows (R, n, L): (R, passes, n), and ids (passes, n)."""
        R, n, L = rows.shape
        ids = np.stack([data.validation_ids(n, n, number) for number in range(passes)])
        values = np.empty((R, passes, n))
        for number in range(passes):
            parts = [diffusion.noise_levels(self.process, (number * R + r) * n, n) for r in range(R)]
            levels = diffusion.NoiseLevels(*map(np.concatenate, list(zip(*parts))[:-1]), 0.0)
            x = rows[:, ids[number]].reshape(R * n, L)
            x = np.concatenate((x[:, :1], x), axis=1)
            batch = diffusion.make_batch(self.process, x, levels, np.arange(R * n), spacing=1.0)
            tensors = transfer.to_tensors(batch)
            nats = self.objective.nats_at_positions(tensors).double().numpy()
            position = np.arange(R * n * L) if batch.index is None else batch.index
            losses = np.bincount(position // L, nats * batch.weights[:, 0], R * n)
            values[:, number] = R * n * losses.reshape(R, n)
        return values, ids


def check(world, name):
    """Repeats of one row's text are what likelihood.evaluate measures, under either schedule if uniform."""
    rows = world.draw(16, 0)
    values, ids = Measurement(world, name).repeats(rows[None], 3)
    for schedule in ("linear", "cosine") if name == "uniform" else ("linear",):
        whole = Measurement(world, name, schedule).evaluate(rows, 3)
        assert np.allclose(values[0], whole.values[..., 0], rtol=1e-3, atol=1e-5) and (ids == whole.ids).all()


def coverage(L, name, repeats, row_numbers=ROWS):
    """Print the lines of one objective."""
    world, at_once = World(L), 50
    truth = float(np.mean([world.nats(world.draw(100_000, 10**9 + i)).mean() for i in range(40)]))
    if name != "ar":
        check(world, name)
        measurement = Measurement(world, name)
    if name == "masked":
        truth = sum(measurement.evaluate(world.draw(400_000, 10**9), 1).parts)
    for n in row_numbers:
        hits = {passes: 0 for passes in PASSES}
        for first in range(0, repeats, at_once):
            rows = np.stack([world.draw(n, 1000 * n + first + r) for r in range(at_once)])
            if name == "ar":
                values, ids = np.stack([world.nats(part) for part in rows])[:, None], np.arange(n)[None]
            else:
                measurement.process = measurement.process._replace(seed=1000 * n + first)
                values, ids = measurement.repeats(rows, max(PASSES))
            for one in values:
                for passes in PASSES:
                    losses = likelihood.RowLosses(one[:passes, :, None, None], ids[:passes], [])
                    error, _ = likelihood.standard_error(losses, exact=name == "ar")
                    assert math.isfinite(error), "an error was not stated"
                    hits[passes] += abs(sum(losses.parts) - truth) < 1.96 * error
        cells = [f"{hits[passes] / repeats:.1%}" for passes in PASSES]
        print(f"| {L} | {name} | {n} | {' | '.join(cells)} |", flush=True)


def main(lengths=(16, 2), names=OBJECTIVES, repeats=400, row_numbers=ROWS):
    torch.set_num_threads(1)
    kernels.CPU_ROWS = 1 << 30  # of 4 logits: small chunks would only cost calls
    print(f"| tokens | objective | rows | {' | '.join(f'{n} passes' for n in PASSES)} |")
    print(f"|---|---|---|{'---|' * len(PASSES)}", flush=True)
    for L in lengths:
        for name in names:
            coverage(L, name, repeats, row_numbers)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        rows = tuple(map(int, sys.argv[4:])) or ROWS
        main((int(sys.argv[1]),), (sys.argv[2],), int(sys.argv[3]), rows)
    else:
        main()
