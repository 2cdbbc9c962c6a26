"""How likely text is under a model (SPEC §8): the bound with its standard error, the exact likelihood in a given order, answers given a context.

Everything is measured row by row, with noise that is a pure function of (seed, row): the same figure for any batch size, number of
ranks or device, and the same noise for every model, so that differences between models are far better known than the figures themselves.

Symbols as in diffusion.py; "objective" is update.Objective, of which only `nats_at_positions` is used.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import data
import diffusion
import kernels
from training import distributed, transfer

# ------------------------------------------------------------------------------------------- the bound, row by row


def validation_process(process, schedule):
    """The bound itself for a run's `process`: uniform t, whole rows, noise of its own.

    A masked network is time-agnostic and takes the linear count form, in which a row's value is the mean cross-entropy of its
    masked tokens; a uniform one knows t through its own `schedule`, and t is drawn where the bound varies most.
    """
    uniform = process.objective == "uniform"
    return process._replace(seed=data.VALIDATION_SEED, loss="elbo", estimator="count", time="cube" if uniform else "uniform",
                            schedule=schedule if uniform else "linear")


@contextlib.contextmanager
def evaluating(objective):
    """No dropout inside; afterwards the mode that was there before."""
    before = objective.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(before)
        distributed.reshard(objective)


class Measured(NamedTuple):
    """The parts of the loss of each row in each pass, in order of the noise level, and which blocks these were."""

    values: np.ndarray  # (passes, N, P) fp64, nats per token
    blocks: np.ndarray  # (passes, N)
    noise: list  # of diffusion.NoiseLevels, one for each pass

    @property
    def parts(self):
        """(P,) the parts of the loss, whose sum it is."""
        return self.values.mean((0, 1)).tolist()

    @property
    def rows(self):
        """Which blocks, in order of the first pass's noise level, and each one's loss, averaged over passes: (N,) and (N,)."""
        order = np.argsort(self.blocks, axis=1)
        mean = np.take_along_axis(self.values.sum(2), order, 1).mean(0)  # by block
        return self.blocks[0], mean[np.argsort(order[0])]


@torch.no_grad()
def evaluate(objective, process, blocks, n_rows, micro, ranks, device, autocast, read, passes=1, show=lambda done, of: None):
    """The loss of n_rows evenly spread blocks under `process`, `passes` times with fresh noise, from all ranks; `read` is data.read_batch.

    One lattice spans all rows of a pass, dealt out strided, so that a batch never masks more than its capacity. The first pass is
    what train.py logs as its validation. `show` hears how many batches of this rank are done.
    """
    parts = -(-n_rows // (micro * ranks.world)) * ranks.world
    found, noise, ids = [], [], []
    with evaluating(objective):
        for run in range(passes):
            rows = diffusion.noise_levels(process, run * n_rows, n_rows)
            noise.append(rows)
            ids.append(data.validation_ids(n_rows, blocks.available, run))
            values = None
            for part in range(ranks.rank, parts, ranks.world):
                which = rows.microbatch_rows(part, parts)
                valid = np.arange(micro) < len(which)
                filled = np.concatenate((which, np.full(micro - len(which), n_rows - 1)))
                batch = read(process, blocks, ids[-1][filled], rows, filled, valid=valid, spacing=parts / n_rows)
                with autocast():
                    nats = objective.nats_at_positions(transfer.to_device(transfer.to_tensors(batch, False), device)).double().cpu().numpy()
                row = (np.arange(micro * process.seq_len) if batch.index is None else batch.index) // process.seq_len
                if values is None:
                    values = np.zeros((n_rows, batch.weights.shape[1]))
                for p, weight in enumerate(batch.weights.T):
                    values[which, p] += n_rows * np.bincount(row, nats * weight, micro)[: len(which)]  # weights hold the mean over rows
                show((run * parts + part) // ranks.world + 1, passes * parts // ranks.world)
            found.append(summed(ranks, values))
    return Measured(np.stack(found), np.stack(ids), noise)


def summed(ranks, values):
    """The sum over ranks of an array of fp64."""
    if ranks.world == 1:
        return values
    total = torch.from_numpy(values)
    dist.all_reduce(total, group=ranks.control)
    return total.numpy()


def neighbours(values):
    """The variance of values (…, N) about a trend along N: half the mean square of differences between neighbours."""
    return float(np.mean(np.diff(values, axis=-1) ** 2) / 2)


def standard_error(measured, exact=False):
    """(SE, the noise's share of it or nan) of the mean of what `evaluate` found; `exact`: there is no noise.

    The text varies, and so does the noise. A lattice of levels has next to no error from the levels themselves, so the plain variance,
    which holds their trend, is far too large; that of neighbours in level leaves it out (von Neumann's estimator for systematic samples).
    Several passes over the same rows average the noise, not the text: what a row keeps from pass to pass stays,
    which is the covariance of its deviations from its neighbours, others in each pass.
    """
    values = measured.values.sum(2)
    passes, N = values.shape
    if N < 8:  # too few to say
        return math.nan, math.nan
    if exact:
        return float(values.mean(0).std(ddof=1) / math.sqrt(N)), 0.0
    total = neighbours(values)  # of text and noise
    if passes == 1:
        return math.sqrt(total / N), math.nan
    deviation = np.full_like(values, np.nan)
    deviation[:, 1:-1] = values[:, 1:-1] - (values[:, :-2] + values[:, 2:]) / 2
    deviation = np.take_along_axis(deviation, np.argsort(measured.blocks, axis=1), 1)  # the same row in the same column
    inside = deviation[:, ~np.isnan(deviation).any(0)]
    text = float(np.mean(inside.sum(0) ** 2 - (inside**2).sum(0)) / (passes * (passes - 1)))
    text = min(max(text, 0.0), total)
    noise = (total - text) / passes
    return math.sqrt((text + noise) / N), math.sqrt(noise / N)


def difference(one, other):
    """(mean, SE) of the difference of two runs' losses over the blocks that both measured; each is (blocks, values), see `Measured.rows`.

    Rows are the same text under the same noise, so their differences vary far less than they do. None where fewer than 8 are in common.
    """
    place = {block: i for i, block in enumerate(other[0].tolist())}
    common = [(i, place[block]) for i, block in enumerate(one[0].tolist()) if block in place]
    if len(common) < 8:
        return None
    a, b = np.array(common).T
    d = one[1][a] - other[1][b]
    return float(d.mean()), math.sqrt(neighbours(d) / len(d))


def noise_curve(measured, process, bins):
    """The loss against the noise ratio r, in `bins` equal bins of r: {bin: (mean r, nats per token, SE, rows)}; bins without rows are left out.

    For masked models it is the mean cross-entropy of masked tokens, for uniform ones the bound's integrand over r: its integral over r is the bound.
    """
    values = measured.values.sum(2).flatten()
    if process.objective == "masked":
        return binned(np.concatenate([rows.count / process.seq_len for rows in measured.noise]), values, bins)
    r = np.concatenate([diffusion.schedule(process.schedule).r(rows.t) for rows in measured.noise])
    # r was drawn with a density: what a bin adds to the bound is known, the integrand itself, close to 0, from few rows badly
    found = binned(r, values, bins)
    return {k: ((k + 0.5) / bins, nats * n * bins / len(r), error * n * bins / len(r), n) for k, (_, nats, error, n) in found.items()}


def entropy_curves(measured, process, bins):
    """The cross-entropy at noisy and at clean tokens against the noise ratio, from the parts of the `paper` loss: two like `noise_curve`'s."""
    L, curves = process.seq_len, []
    count = np.stack([rows.count for rows in measured.noise])  # (passes, N)
    inverse = diffusion.schedule(process.schedule).inverse
    noisy = 2 * measured.values[..., 0] * L * (inverse(count / L) - inverse((count - 1) / L))  # the weight, 1/(count·P(count)), undone
    with np.errstate(divide="ignore", invalid="ignore"):
        clean = 2 * measured.values[..., 1] * (L - count).mean(1, keepdims=True) / (L - count)
    for values in (noisy, clean):
        some = np.isfinite(values)
        curves.append(binned(count[some] / L, values[some], bins))
    return curves


def binned(r, values, bins):
    place, found = np.clip(np.ceil(r * bins - 1e-9) - 1, 0, bins - 1), {}
    for k in range(bins):
        here = values[place == k]
        if len(here):
            found[k] = float(r[place == k].mean()), float(here.mean()), float(here.std(ddof=1) / math.sqrt(len(here))) if len(here) > 1 else math.nan, len(here)
    return found


# ------------------------------------------------------------------------------------ the exact likelihood in an order


@torch.no_grad()
def chain(objective, rows, order, mask_id, device, autocast, seed=0, numbers=None, documents=None, positions=None, show=lambda done, of: None):
    """−log p of each token of the rows (B, L) in the chain rule's order, by L passes of a masked network: (B, L) nats, by position.

    order: left_to_right; confidence (next is where the network is surest before it sees the token, to 12 bits so that rounding decides
    next to nothing, the first of equals: the order depends only on what has been read, so this, too, is a likelihood); random (its mean over orders
    is the bound). Each is the exact likelihood of the sampler that writes in that order. numbers (B,): what a row's random order depends on;
    documents, positions (B, L): as in the batches of such models.
    """
    x = torch.as_tensor(rows, dtype=torch.int64, device=device)
    B, L = x.shape
    z, nats = torch.full_like(x, mask_id), torch.zeros(B, L, dtype=torch.float64, device=device)
    left, first = torch.arange(L, device=device).expand(B, L), torch.arange(B, device=device)[:, None] * L
    if order == "random":
        keys = diffusion.random_bits(seed, diffusion.ORDER, np.arange(B) if numbers is None else numbers, L)
        turns = torch.from_numpy(np.argsort(keys, axis=1)).to(device)
    borders = [None if a is None else torch.as_tensor(a, device=device) for a in (documents, positions)]
    with evaluating(objective):
        for step in range(L):
            if order == "confidence":
                said, sure = asked(objective, z, x, left, first, autocast, *borders, sure=True)
                best = (sure * 4096).round().argmax(1, keepdim=True)
                column, said = left.gather(1, best), said.gather(1, best)
                left = left[torch.arange(L - step, device=device) != best].view(B, L - step - 1)
            else:
                column = turns[:, step : step + 1] if order == "random" else left[:, step : step + 1]
                said = asked(objective, z, x, column, first, autocast, *borders)
            nats.scatter_(1, column, said.double())
            z = z.scatter(1, column, x.gather(1, column))
            show(step + 1, L)
    return nats.cpu().numpy()


def asked(objective, z, x, columns, first, autocast, documents, positions, sure=False):
    """−log p of the tokens x at `columns` (B, n) of what z shows, (B, n); with `sure` also the probability of the likeliest token there."""
    batch = diffusion.Batch(z, x.gather(1, columns).flatten(), None, (first + columns).flatten(), documents=documents, positions=positions)
    with autocast():
        said = objective.nats_at_positions(batch, likeliest=sure)
    return tuple(part.view(columns.shape) for part in (said[0], said[2])) if sure else said.view(columns.shape)


# ------------------------------------------------------------------------------------------ answers given a context


class Question(NamedTuple):
    """A continuation to be scored. Questions of one `key` share their random numbers: so do the choices of a multiple choice."""

    context: list
    answer: list
    key: str = ""


class Scorer(NamedTuple):
    """What scores: the network, and how."""

    objective: Callable  # update.Objective
    process: diffusion.Process
    device: torch.device
    autocast: Callable = contextlib.nullcontext
    ranks: distributed.Ranks = distributed.SINGLE
    samples: int = 128  # noisy copies of an answer that is too long to try every mask
    tokens: int = 16_384  # of a forward pass
    seed: int = 0
    alive: Callable = lambda: None  # called between passes

    @property
    def most(self):
        """Positions of a pass: half a gigabyte of logits, where a kernel doesn't do without."""
        return max(1, (1 << 27) // self.process.n_vocab) if self.device.type == "cpu" else 1 << 20

    @property
    def size(self):
        """Tokens of context and answer together that fit: an AR network need not read the last."""
        return self.process.seq_len + (self.process.objective == "ar")


def windows(ids, prefix, size):
    """(context, continuation) pairs whose continuations are together `ids`, the first after the token `prefix`.

    As lm-evaluation-harness divides what is longer than the model: full windows, one token of context each, and a last one that
    is filled up with what came before.
    """
    pairs, done = [], 0
    while done < len(ids):
        end = min(done + size - 1, len(ids))
        pairs.append((ids[end - size : done] if done else [prefix], ids[done:end]))
        done = end
    return pairs


def fitted(asked, scorer, eos_id):
    """What is asked as pairs that fit: the context is cut on the left; an answer that is too long itself goes in windows. Causal networks read a separator
    where there is no context."""
    size, context = scorer.size, asked.context or [eos_id] * (scorer.process.objective == "ar")
    if not asked.answer:
        return []
    if len(asked.answer) + bool(context) > size:
        return windows(asked.answer, context[-1] if context else eos_id, size)
    return [(context[max(0, len(context) + len(asked.answer) - size) :], asked.answer)]


def number_of(key):
    """64 bits from a text: the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def every_mask(n):
    """All ways to mask of n positions at least one, (2ⁿ − 1, n), and their weights: the bound is Σ weight·Σ CE, without any chance."""
    masks = np.array(list(itertools.product((False, True), repeat=n)))[1:]
    k = masks.sum(1)
    return masks, 1 / (k * np.array([math.comb(n, int(count)) for count in k]))


def some_masks(n, samples, key):
    """`samples` masks of n positions and their weights: k on a lattice, a random set of k. For equal keys the masks of a shorter answer
    are cut from the same permutations at the same level."""
    number, sample = number_of(key), np.arange(samples)
    level = (sample + diffusion.unit(diffusion.random_bits(number, diffusion.OFFSET, sample[:1], 1)[0, 0])) / samples
    count = np.clip(np.ceil(level * n), 1, n).astype(np.int64)
    masks = diffusion.exactly(diffusion.random_bits(number, diffusion.MASK, sample, n), count, np.ones((samples, n), bool))
    return masks, 1 / count * n / samples


class Rows(NamedTuple):
    """Rows of equal length for the network, and the positions in them that are scored. S rows, n positions."""

    tokens: np.ndarray  # (S, T)
    row: np.ndarray  # (n,)
    column: np.ndarray  # (n,)
    targets: np.ndarray  # (n,)
    weights: np.ndarray  # (n,) Σ weight·nats is −log p of the answer, or its bound
    time: np.ndarray | None = None  # (S,)
    noisy: np.ndarray | None = None  # (n,)
    beta: np.ndarray | None = None  # (n,)


def rows_of(scorer, context, answer, key):
    """What the network has to read in order to score `answer`."""
    p, n, ids = scorer.process, len(answer), np.array([*context, *answer], np.int64)
    first, answer = len(ids) - n, ids[len(ids) - n :]
    key = f"{scorer.seed} {key}"
    if p.objective == "ar":
        return Rows(ids[None, :-1], np.zeros(n, np.int64), first - 1 + np.arange(n), answer, np.ones(n))
    if p.objective == "masked":
        masks, weights = every_mask(n) if n < 30 and 2**n - 1 <= scorer.samples else some_masks(n, scorer.samples, key)
        row, place = np.nonzero(masks)
        tokens = np.tile(ids, (len(masks), 1))
        tokens[row, first + place] = p.mask_id
        return Rows(tokens, row, first + place, answer[place], weights[row])
    S = scorer.samples
    p = validation_process(p, p.schedule)._replace(seq_len=n, seed=number_of(key))
    levels = diffusion.noise_levels(p, 0, S)
    # the answer alone is noised: a block of its own, of which make_batch wants the token before, too
    batch = diffusion.make_batch(p, np.tile(np.concatenate((ids[:1], answer)), (S, 1)), levels, np.arange(S))
    tokens = np.concatenate((np.tile(ids[:first], (S, 1)), batch.tokens), axis=1)
    row, place = np.divmod(np.arange(S * n), n)
    return Rows(tokens, row, first + place, batch.targets, batch.weights[:, 0].astype(np.float64) * n, batch.time, batch.noisy, batch.beta)


def batched(scorer, pieces):
    """(Batch, owner (n,), weights (n,), pieces that end with it) until all `pieces`, which are in order of length, are through.

    Rows of one length stand together (AR: of any, what follows does not matter to a causal network), as many as `tokens` and the memory of the
    logits allow; a row that several pieces need is there once.
    """
    p, rows, place, parts, positions, ended = scorer.process, [], {}, [], 0, 0

    def closed():
        width = max(len(row) for row, _ in rows)
        tokens = np.full((len(rows), width), 0, np.int64)
        for i, (row, _) in enumerate(rows):
            tokens[i, : len(row)] = row
        row, column, targets, owner, weights, noisy, beta = (None if part[0] is None else np.concatenate(part) for part in zip(*parts))
        time = None if rows[0][1] is None else np.array([t for _, t in rows], np.float32)
        return diffusion.Batch(tokens, targets, weights[:, None], row * width + column, time, noisy=noisy, beta=beta), owner, weights, ended

    for number, (context, answer, key) in enumerate(pieces):
        some = rows_of(scorer, context, answer, key)
        T = some.tokens.shape[1]
        for s, (first, last) in enumerate(zip(*(np.searchsorted(some.row, np.arange(len(some.tokens)), side) for side in ("left", "right")))):
            mine = slice(first, last)
            full = rows and (p.objective != "ar" and len(rows[0][0]) != T or (len(rows) + 1) * T > scorer.tokens or positions + last - first > scorer.most)
            if full:
                yield closed()
                rows, place, parts, positions, ended = [], {}, [], 0, 0
            tokens, time = some.tokens[s], None if some.time is None else some.time[s]
            at = place.setdefault((tokens.tobytes(), time), len(rows))
            if at == len(rows):
                rows.append((tokens, time))
            parts.append((np.full(last - first, at), some.column[mine], some.targets[mine], np.full(last - first, number), some.weights[mine],
                          *(None if part is None else part[mine] for part in (some.noisy, some.beta))))
            positions += last - first
        ended += 1
    if rows:
        yield closed()


@torch.no_grad()
def answers(scorer, questions, eos_id, show=lambda done, of: None, greedy=True):
    """log p(answer | context) of each question, in nats (for diffusion models its bound), and whether greedy decoding writes the answer.

    The sum over the answer's tokens: no end is appended, nothing else is scored. Masked models: the count form of the bound, over all masks
    where there are at most `samples` of them (a token alone: one pass, exact), else over `samples`. Greedy: the surest position first,
    one at a time; uniform models do not write so, theirs is false (as all are without `greedy`). `show` hears how much is done. Returns (N,) fp64 and (N,) bool.
    """
    pieces = {}  # what is to be scored → the questions that need it
    for number, question in enumerate(questions):
        for part, (context, answer) in enumerate(fitted(question, scorer, eos_id)):
            pieces.setdefault((tuple(context), tuple(answer), question.key + f" {part}" * (part > 0)), []).append(number)
    order = sorted(pieces, key=lambda piece: (len(piece[0]) + len(piece[1]), piece))
    sums, misses, ranks, count, done = np.zeros(len(order)), np.zeros(len(order)), scorer.ranks, 0, 0
    kind = scorer.process.objective
    greedy = greedy and kind != "uniform"
    alone = np.array([greedy and (len(answer) == 1 or kind == "ar") for _, answer, _ in order])  # one pass tells what is likeliest
    with evaluating(scorer.objective):
        for batch, owner, weights, ended in batched(scorer, order):
            if count % ranks.world == ranks.rank:
                nats, wrong = look(scorer, batch, alone[owner].any())
                sums += np.bincount(owner, nats * weights, len(order))
                misses += np.bincount(owner, wrong, len(order)) * alone
            count, done = count + 1, done + ended
            show(done, len(order))
        if ranks.rank >= count % ranks.world > 0:
            look(scorer, batch, False)  # for nothing: all ranks of a divided network take part in every pass
        if kind == "masked" and greedy:
            misses += not_written(scorer, order)
    sums, wrong = summed(ranks, sums), summed(ranks, misses) > 0
    total, right = np.zeros(len(questions)), np.full(len(questions), greedy)
    for piece, key in enumerate(order):
        for number in pieces[key]:
            total[number] -= sums[piece]
            right[number] &= not wrong[piece]
    return total, right


def look(scorer, batch, likeliest):
    """(nats, whether another token is likelier than the target) at the batch's positions, (n,) each; without `likeliest` the second is false."""
    scorer.alive()
    said = passed(scorer, batch, bool(likeliest))
    nats, tokens = (said[0], said[1].cpu().numpy()) if likeliest else (said, batch.targets)
    return nats.double().cpu().numpy(), tokens != batch.targets


def passed(scorer, batch, likeliest):
    with scorer.autocast(), kernels.avoid_cudnn_attention(scorer.device):
        return scorer.objective.nats_at_positions(transfer.to_device(transfer.to_tensors(batch, False), scorer.device), likeliest=likeliest)


def not_written(scorer, pieces):
    """Which answers of more than a token greedy decoding does not write, (N,) of 0 and 1, to be summed over ranks: the surest masked position becomes its
    likeliest token, one after the other; most wrong answers are found out in their first passes.

    Ranks take turns. Those of a divided network do all of it together, by the first one's decisions, and only the first reports it.
    """
    found, mask_id, ranks = np.zeros(len(pieces)), scorer.process.mask_id, scorer.ranks
    together = ranks.world > 1 and distributed.is_sharded(scorer.objective)
    several, groups = [number for number, (_, answer, _) in enumerate(pieces) if len(answer) > 1], []
    for length, group in itertools.groupby(several, lambda number: len(pieces[number][0]) + len(pieces[number][1])):
        group = np.array(list(group))
        longest = max(len(pieces[number][1]) for number in group)
        groups += [(length, some) for some in np.array_split(group, max(-(-len(group) * length // scorer.tokens), -(-len(group) * longest // scorer.most))) if len(some)]
    for length, some in groups if together else groups[ranks.rank :: ranks.world]:
        x = np.array([[*pieces[number][0], *pieces[number][1]] for number in some], np.int64)
        masked = np.arange(length) >= np.array([[len(pieces[number][0])] for number in some])
        active = np.arange(len(some))
        while len(active):
            scorer.alive()
            here, targets = masked[active], x[active]
            index = np.flatnonzero(here)
            _, token, prob = passed(scorer, diffusion.Batch(np.where(here, mask_id, targets), targets.reshape(-1)[index], None, index), True)
            sure, tokens = np.full(here.size, -1.0), np.zeros(here.size, np.int64)
            sure[index], tokens[index] = prob.float().cpu().numpy(), token.cpu().numpy()
            best = sure.reshape(here.shape).argmax(1)
            right = tokens.reshape(here.shape)[np.arange(len(active)), best] == targets[np.arange(len(active)), best]
            if together:
                best, right = distributed.all_gather(ranks, (best, right))[0]
            found[some[active[~right]]] = 1
            masked[active, best] = False
            active = active[right & masked[active].any(1)]
    return found * (not together or ranks.rank == 0)
