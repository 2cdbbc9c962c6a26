"""How likely text is under a model (docs/math.md §8): the bound, its error, the likelihood in an order.

Noise is a pure function of (seed, row). So a figure is the same for any batch size, number of ranks or
device; and models are measured under the same noise, so their differences are far better known than the
figures.

Symbols as in diffusion.py. An "objective" is training.objective.Objective; its `nats_at_positions` is used.
"""

import contextlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import data
import diffusion
from training import distributed, transfer

# -------------------------------------------------------------------------------------- the bound, row by row


def validation_process(process, schedule):
    """The process that measures the bound of a run's `process`: uniform t, whole rows, noise of its own.

    A masked network has no clock and takes the linear count form, in which a row's value is the mean
    cross-entropy of its masked tokens. A uniform one knows t through its own `schedule`, and t is drawn where
    the bound varies most (docs/math.md §6).
    """
    uniform = process.objective == "uniform"
    return process._replace(
        seed=data.VALIDATION_SEED,
        loss="elbo",
        estimator="count",
        time="cube" if uniform else "uniform",
        schedule=schedule if uniform else "linear",
        input_mask=0.0,
    )


@contextlib.contextmanager
def eval_mode(objective):
    """Switch dropout off inside, and back to the mode before it afterwards."""
    was_training = objective.training
    objective.eval()
    try:
        yield
    finally:
        objective.train(was_training)
        distributed.reshard(objective)


class RowScorer(NamedTuple):
    """A network, the rows that it scores, and the ranks that share the work."""

    objective: Callable
    sequences: data.Sequences | data.PairRows | data.Mixture
    read: Callable  # data.read_batch with the run's settings and separator filled in
    micro_batch: int  # rows per rank and forward pass; does not change the figures
    ranks: distributed.Ranks
    device: torch.device
    autocast: Callable = contextlib.nullcontext

    def eligible(self, ids):
        """The positions that count of the sequences `ids`, (N, L) bool: answers of pairs; None: all."""
        has_pairs = getattr(self.sequences, "has_pairs", False)
        return self.sequences.eligible(ids) if has_pairs else None


class RowLosses(NamedTuple):
    """The loss of each of N rows in each pass, in order of the noise level, by its M blocks and P parts."""

    cells: np.ndarray  # (passes, N, M, P) fp64: what a block adds to its row's nats per token
    ids: np.ndarray  # (passes, N) the number of each row's sequence
    levels: list  # of diffusion.NoiseLevels, one per pass
    weights: np.ndarray | None = None  # (passes, N) shares of the tokens that count, times N; None: all are 1

    @property
    def values(self):
        """The loss of each row by its parts, (passes, N, P) nats per token."""
        return self.cells.sum(2)

    @property
    def parts(self):
        """The mean of each part of the loss: P floats. Their sum is the loss."""
        return self.values.mean((0, 1)).tolist()

    @property
    def by_sequence(self):
        """(ids, losses averaged over passes), (N,) each, in order of the first pass's noise level."""
        order = np.argsort(self.ids, axis=1)
        mean = np.take_along_axis(self.values.sum(2), order, 1).mean(0)  # in order of the ids
        return self.ids[0], mean[np.argsort(order[0])]


@torch.no_grad()
def evaluate(scorer, process, n_rows, passes=1, on_progress=lambda done, total: None):
    """Measure the loss of n_rows evenly spread rows under `process`, in passes with fresh noise: RowLosses.

    One lattice of noise levels spans all rows of a pass, dealt out strided, so that no batch masks more than
    its capacity. The first pass is what train.py logs as its validation. All ranks call this and get the
    same; `on_progress` gets the batches of this rank that are done.

    Of a masked network a position weighs L/k of the row's bound and 1/(n_rows·L) of the mean over rows; a
    row's loss is n_rows times that: the mean cross-entropy of its k masked tokens. Of question-answer pairs
    the answers count, so the mean is over all their tokens, and a row's loss is n_rows times its part of it.
    """
    shared = scorer.micro_batch * scorer.ranks.world
    n_batches = -(-n_rows // shared) * scorer.ranks.world
    total = passes * n_batches // scorer.ranks.world
    all_cells, all_ids, all_levels, all_weights = [], [], [], []

    with eval_mode(scorer.objective):
        for number in range(passes):
            ids = data.validation_ids(n_rows, scorer.sequences.available, number)
            eligible = scorer.eligible(ids)
            counts = data.count_by_block(process, eligible)
            levels = diffusion.noise_levels(process, number * n_rows, n_rows, n_eligible=counts)
            cells = None
            for batch in range(scorer.ranks.rank, n_batches, scorer.ranks.world):
                rows = levels.microbatch_rows(batch, n_batches)
                losses = batch_losses(scorer, process, ids, levels, rows, n_batches / n_rows, eligible)
                if cells is None:
                    cells = np.zeros((n_rows, *losses.shape[1:]))
                cells[rows] = n_rows * losses
                on_progress((number * n_batches + batch) // scorer.ranks.world + 1, total)
            all_cells.append(sum_over_ranks(scorer.ranks, cells))
            all_ids.append(ids)
            all_levels.append(levels)
            if eligible is not None:
                n_counted = eligible.sum(1)
                all_weights.append(n_counted / n_counted.mean())

    weights = np.stack(all_weights) if all_weights else None
    return RowLosses(np.stack(all_cells), np.stack(all_ids), all_levels, weights)


def batch_losses(scorer, process, ids, levels, rows, spacing, eligible=None):
    """The losses of one pass's `rows`, in a batch filled up to micro_batch: (len(rows), M, P) fp64.

    eligible (N, L) bool: the positions of all rows that count; None: all.
    """
    micro, M = scorer.micro_batch, process.n_blocks
    valid = np.arange(micro) < len(rows)
    filled = np.concatenate((rows, np.full(micro - len(rows), len(ids) - 1)))
    inside = {} if eligible is None else dict(eligible=eligible[filled])
    batch = scorer.read(process, scorer.sequences, ids[filled], levels, filled, valid=valid, spacing=spacing,
                        **inside)

    tensors = transfer.to_device(transfer.to_tensors(batch), scorer.device)
    with scorer.autocast():
        nats = scorer.objective.nats_at_positions(tensors)
    nats = nats.double().cpu().numpy()
    position = np.arange(micro * process.seq_len) if batch.index is None else batch.index
    cell = position // process.seq_len * M + position % process.seq_len // process.block_size
    losses = [np.bincount(cell, nats * weight, micro * M) for weight in batch.weights.T]
    return np.stack(losses, axis=1).reshape(micro, M, -1)[: len(rows)]


def sum_over_ranks(ranks, values):
    """Sum a float64 array over ranks."""
    if ranks.world == 1:
        return values
    total = torch.from_numpy(values)
    dist.all_reduce(total, group=ranks.control)
    return total.numpy()


# -------------------------------------------------------------------------------------------------- its error


FEWEST_ROWS = 8  # of which an error under noise is stated


def student_factor(df):
    """Student's 97.5 % quantile for df degrees of freedom over the normal one, 1.96: what widens errors.

    So ± 1.96 errors are a 95 % interval however few the rows are. Cornish and Fisher's expansion: right
    to 0.2 % from df = 3 on, to 1 % at 2, to 12 % at 1.
    """
    z = 1.959964
    terms = (
        (z**2 + 1) / 4,
        (5 * z**4 + 16 * z**2 + 3) / 96,
        (3 * z**6 + 19 * z**4 + 17 * z**2 - 15) / 384,
        (79 * z**8 + 776 * z**6 + 1482 * z**4 - 1920 * z**2 - 945) / 92160,
    )
    return 1 + sum(term / df**k for k, term in enumerate(terms, 1))


def error_of_mean(values):
    """The error of the mean of independent values, those that are finite; nan of fewer than two."""
    values = np.asarray(values)
    values = values[np.isfinite(values)]
    n = len(values)
    return float(values.std(ddof=1) / math.sqrt(n)) * student_factor(n - 1) if n > 1 else math.nan


def neighbour_variance(values):
    """The variance of values (…, N) about a trend along N: half the mean squared step to the neighbour."""
    return float(np.mean(np.diff(values, axis=-1) ** 2) / 2)


def neighbour_factor(N, independent=0.0):
    """What widens an error from `neighbour_variance` of N values: it has about 2N/3 degrees of freedom.

    `independent`: the share of the variance that is known as that of N independent values is, with N − 1.
    """
    df = 2 * (N - 1) ** 2 / (3 * N - 4)
    return student_factor(df + independent * (N - 1 - df))


def text_variance(values, ids):
    """The variance of what rows keep from pass to pass: of values (passes, N), for rows numbered `ids`.

    It is the covariance of a row's deviations from its neighbours in level, which are others in each pass,
    over all pairs of passes in which it has two. Neighbours are of the same N rows: those of one pass are
    now and then those of another, too, which adds 1/(N − 1) of it.
    """
    N = values.shape[1]
    deviation, interior = np.zeros_like(values), np.zeros(values.shape, bool)
    deviation[:, 1:-1] = values[:, 1:-1] - (values[:, :-2] + values[:, 2:]) / 2
    interior[:, 1:-1] = True
    by_id = np.argsort(ids, axis=1)  # the same row in the same column
    deviation, interior = (np.take_along_axis(part, by_id, 1) for part in (deviation, interior))
    products = deviation.sum(0) ** 2 - (deviation**2).sum(0)  # over pairs of different passes
    times = interior.sum(0)
    return float(products.sum() / (times * (times - 1)).sum()) * (N - 1) / N


def standard_error(losses, exact=False):
    """(error of the mean of RowLosses, the noise's share of it or nan). `exact`: there is no noise.

    The text varies, and so does the noise. A lattice of levels has next to no error from the levels
    themselves, so the plain variance, which holds their trend, is far too large; that of neighbours in level
    leaves it out (von Neumann's estimator for systematic samples).

    Several passes over the same rows average the noise, not the text: `text_variance` tells them apart. Both
    errors are widened for few rows (`student_factor`), and nan of fewer than FEWEST_ROWS.

    Where rows differ in how many tokens count, the mean is a ratio of two sums: its error is that of the
    residuals, values − mean·weights.
    """
    values = losses.values.sum(2)
    if losses.weights is not None:
        values = values - values.mean() * (losses.weights - 1)
    passes, N = values.shape
    if N < FEWEST_ROWS:
        return math.nan, math.nan
    if exact:
        return error_of_mean(values.mean(0)), 0.0

    text_and_noise = neighbour_variance(values)
    if passes == 1:
        return neighbour_factor(N) * math.sqrt(text_and_noise / N), math.nan
    text = min(max(text_variance(values, losses.ids), 0.0), text_and_noise)
    noise = (text_and_noise - text) / passes
    widening = neighbour_factor(N, text / (text + noise)) if text + noise > 0 else 1.0
    return widening * math.sqrt((text + noise) / N), widening * math.sqrt(noise / N)


def paired_difference(one, other):
    """(mean, error) of one run's losses minus another's, over the sequences that both measured.

    Each is (ids, losses) as of `RowLosses.by_sequence`. Rows are the same text under the same noise, so their
    differences vary far less than they do. None where fewer than FEWEST_ROWS are in common.
    """
    place = {number: i for i, number in enumerate(other[0].tolist())}
    common = [(i, place[number]) for i, number in enumerate(one[0].tolist()) if number in place]
    N = len(common)
    if N < FEWEST_ROWS:
        return None
    a, b = np.array(common).T
    difference = one[1][a] - other[1][b]
    return float(difference.mean()), neighbour_factor(N) * math.sqrt(neighbour_variance(difference) / N)


# ------------------------------------------------------------------------------------ against the noise ratio


class Bin(NamedTuple):
    """The mean of the rows whose noise ratio lies in one bin."""

    noise_ratio: float
    nats: float
    error: float  # as of `error_of_mean`, nan of a single row
    rows: int


def noise_curve(losses, process, bins):
    """The loss against the noise ratio r in `bins` equal bins: {bin: Bin} of those that have blocks of rows.

    For masked models the mean cross-entropy of masked tokens, for uniform ones the bound's integrand over r.
    Its integral over r is the bound, but for a last block that is shorter: it is left out.
    """
    full = slice(process.seq_len // process.block_size)
    size = process.block_size
    values = (losses.cells.sum(3)[:, :, full] * (process.seq_len / size)).flatten()  # nats per token
    if process.objective == "masked":
        count = np.stack([levels.count[:, full] for levels in losses.levels])
        return bin_means((count / size).flatten(), values, bins)

    t = np.stack([levels.t[:, full] for levels in losses.levels])
    r = diffusion.schedule(process.schedule).r(t).flatten()
    curve = {}
    for k, point in bin_means(r, values, bins).items():
        # r was drawn with a density. What a bin adds to the bound is known from all rows; the integrand near
        # r = 0, from the few rows there, badly.
        nats, error = (value * point.rows * bins / len(r) for value in (point.nats, point.error))
        curve[k] = Bin((k + 0.5) / bins, nats, error, point.rows)
    return curve


def cross_entropy_curves(losses, process, bins):
    """The cross-entropies at noisy and at clean tokens, from the parts of the `paper` loss.

    Returns two curves against the noise ratio, as `noise_curve` does. The parts' weights are undone:
    1/(count·P(count)) and 1/Σ clean.
    """
    count, n = (np.stack([getattr(levels, name) for levels in losses.levels])  # (passes, N, M)
                for name in ("count", "n_eligible"))
    inverse = diffusion.schedule(process.schedule).inverse
    probability = inverse(count / n) - inverse((count - 1) / n)
    noisy = 2 * losses.cells[..., 0] * process.seq_len * probability
    n_clean = (n - count).sum((1, 2), keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks without a clean token
        clean = 2 * losses.cells[..., 1] * (n_clean / count.shape[1]) / (n - count)

    curves = []
    for values in (noisy, clean):
        finite = np.isfinite(values)
        curves.append(bin_means((count / n)[finite], values[finite], bins))
    return curves


def bin_means(r, values, bins):
    """{bin: Bin} of values (N,) at noise ratios r (N,) in (0, 1]."""
    place = np.clip(np.ceil(r * bins - 1e-9) - 1, 0, bins - 1)
    curve = {}
    for k in range(bins):
        members = values[place == k]
        n = len(members)
        if n:
            curve[k] = Bin(float(r[place == k].mean()), float(members.mean()), error_of_mean(members), n)
    return curve


# --------------------------------------------------------------------------- the exact likelihood in an order

ORDERS = ("left_to_right", "confidence", "random")


@torch.no_grad()
def chain_rule(objective, x, order, mask_id, autocast=contextlib.nullcontext, seed=0, row_numbers=None,
               documents=None, positions=None, block=0, on_progress=lambda done, total: None):
    """−log p of each token of the rows x (B, L) by the chain rule in an order: L passes of a masked network.

    Returns (B, L) nats by position: the exact likelihood of the sampler that writes in that order. Of block
    diffusion the order is within blocks; all go on at once, each given the clean ones before it: as many
    passes as a `block` has tokens.

    order:
        left_to_right
        confidence: next is the position where the network is surest before it sees the token, to 12 bits, so
            that rounding decides next to nothing, and the first of equals. The order depends only on tokens
            that have been read, so this is a likelihood, too.
        random: its mean over orders is the bound.
    row_numbers: (B,), on which a row's random order depends; 0, 1, … if None.
    documents, positions: (B, L), as in the batches of models that attend within documents.
    """
    B, L = x.shape
    size = block or L
    z = torch.full_like(x, mask_id)
    nats = torch.zeros(B, L, dtype=torch.float64, device=x.device)
    turns = np.arange(-(-L // size) * size).reshape(-1, size)  # the columns of each block, in order
    turns = np.broadcast_to(turns, (B, *turns.shape))
    if order == "random":
        row_numbers = np.arange(B) if row_numbers is None else row_numbers
        keys = diffusion.random_bits(seed, diffusion.ORDER, row_numbers, L)
        missing = ((0, 0), (0, turns[0].size - L))  # the last block's, which come last
        keys = np.pad(keys, missing, constant_values=~np.uint64(0)).reshape(turns.shape)
        turns = np.take_along_axis(turns, np.argsort(keys, axis=2, kind="stable"), 2)
    masked = turns = torch.tensor(turns, device=x.device)  # (B, M, size)

    def score(columns, with_confidence=False):
        return score_columns(objective, z, x, columns, autocast, documents, positions, block, with_confidence)

    with eval_mode(objective):
        for step in range(size):
            M = -(-(L - step) // size)  # the last block may have no more columns
            if order == "confidence":
                masked = masked[:, :M]  # the columns that are still masked, (B, M, size − step)
                all_nats, confidence = (part.view_as(masked) for part in score(
                    masked.flatten(1).clamp_max(L - 1), with_confidence=True))
                confidence = (confidence * 4096).round().masked_fill(masked >= L, -1)
                surest = confidence.argmax(2, keepdim=True)
                columns, column_nats = (part.gather(2, surest)[:, :, 0] for part in (masked, all_nats))
                others = torch.arange(size - step, device=x.device) != surest
                masked = masked[others].view(B, M, size - step - 1)
            else:
                columns = turns[:, :M, step]
                column_nats = score(columns)
            nats.scatter_(1, columns, column_nats.double())
            z = z.scatter(1, columns, x.gather(1, columns))
            on_progress(step + 1, size)
    return nats.cpu().numpy()


def score_columns(objective, z, x, columns, autocast, documents, positions, block, with_confidence=False):
    """−log p of the tokens x at `columns` (B, n), given the noisy rows z (B, L): (B, n) nats.

    With `with_confidence` also the probability of the likeliest token there, (B, n).
    """
    B, L = z.shape
    first = torch.arange(B, device=z.device)[:, None] * L
    index = (first + columns).flatten()
    targets = x.gather(1, columns).flatten()
    batch = diffusion.Batch(z, targets, None, index, documents=documents, positions=positions,
                            clean=x if block else None)
    with autocast():
        scores = objective.nats_at_positions(batch, likeliest=with_confidence)
    if not with_confidence:
        return scores.view(columns.shape)
    nats, _, confidence = scores
    return nats.view(columns.shape), confidence.view(columns.shape)
