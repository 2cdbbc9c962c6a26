"""How likely an answer is, given its context (docs/math.md §8): log p, or its bound for diffusion models.

Only the answer is noised. Questions of many lengths share batches, and equal rows are read once. Random
numbers are a pure function of (seed, key): a score is the same in any batch and on any number of ranks.
"""

import contextlib
import hashlib
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

import diffusion
import kernels
from evaluation.likelihood import eval_mode, sum_over_ranks, validation_process
from training import distributed, transfer

# -------------------------------------------------------------------------------------------------- questions


class Question(NamedTuple):
    """A context and the answer to be scored, as lists of ids.

    Questions of one `key` share their random numbers: so do the choices of a multiple choice.
    """

    context: list
    answer: list
    key: str = ""


class Scorer(NamedTuple):
    """The network that scores, and how it does so."""

    objective: Callable
    process: diffusion.Process
    device: torch.device
    autocast: Callable = contextlib.nullcontext
    ranks: distributed.Ranks = distributed.SINGLE
    masks: int = 128  # noisy copies of an answer that has more masks than that
    pass_tokens: int = 16_384  # tokens per forward pass
    seed: int = 0

    @property
    def max_positions(self):
        """Positions per forward pass: half a gigabyte of logits, where a kernel doesn't do without them."""
        return max(1, (1 << 27) // self.process.n_vocab) if self.device.type == "cpu" else 1 << 20

    @property
    def max_length(self):
        """Tokens of context and answer together that fit: an AR network need not read the last."""
        return self.process.seq_len + (self.process.objective == "ar")


def windows(ids, first_context_token, length):
    """(context, continuation) pairs of at most `length` tokens whose continuations together are `ids`.

    As lm-evaluation-harness divides texts longer than the model: full windows with one token of context each
    (`first_context_token` before the first), and a last one that is filled up with the tokens before it.
    """
    pairs, start = [], 0
    while start < len(ids):
        end = min(start + length - 1, len(ids))
        context = ids[end - length : start] if start else [first_context_token]
        pairs.append((context, ids[start:end]))
        start = end
    return pairs


def fit_to_context(question, scorer, eos_id):
    """The question as (context, answer) pairs that fit: the context is cut on the left.

    An answer that is too long itself goes in windows; an empty one is no pair at all. Causal networks read a
    separator where there is no context.
    """
    answer, context = question.answer, question.context
    if not context and scorer.process.objective == "ar":
        context = [eos_id]
    if not answer:
        return []
    if len(answer) + bool(context) > scorer.max_length:
        return windows(answer, context[-1] if context else eos_id, scorer.max_length)
    excess = max(0, len(context) + len(answer) - scorer.max_length)
    return [(context[excess:], answer)]


# --------------------------------------------------------------------------------------- rows for the network


class ScoredRow(NamedTuple):
    """A row of T tokens for the network, and the n positions in it whose nats count."""

    tokens: np.ndarray  # (T,)
    columns: np.ndarray  # (n,)
    targets: np.ndarray  # (n,)
    weights: np.ndarray  # (n,): Σ weight·nats over an answer's rows is −log p, or its bound
    clean: np.ndarray | None = None  # (T,) of block diffusion: what later blocks read in place of tokens
    time: np.ndarray | None = None  # (M,) of uniform models, as the next two
    noisy: np.ndarray | None = None  # (n,)
    beta: np.ndarray | None = None  # (n,)

    @property
    def input(self):
        """What the network reads, as a key: rows of equal inputs are one."""
        parts = self.tokens, self.clean, self.time
        return tuple(None if part is None else part.tobytes() for part in parts)


def hash_to_seed(key):
    """64 bits from a text: the same on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def every_mask(n):
    """The ways to mask at least one of n positions, (2ⁿ − 1, n), and their weights.

    Σ over masks of weight·Σ CE is the bound.
    """
    masks = np.array(list(itertools.product((False, True), repeat=n)))[1:]
    k = masks.sum(1)
    ways = np.array([math.comb(n, int(count)) for count in k])
    return masks, 1 / (k * ways)


def sampled_masks(n, samples, key):
    """`samples` random masks of n positions, (samples, n), and their weights.

    k comes from a lattice, then a random set of k. For equal keys the masks of a shorter answer are cut from
    the same permutations at the same level.
    """
    seed, sample = hash_to_seed(key), np.arange(samples)
    offset = diffusion.unit(diffusion.random_bits(seed, diffusion.OFFSET, sample[:1], 1)[0, 0])
    level = (sample + offset) / samples
    count = np.clip(np.ceil(level * n), 1, n).astype(np.int64)
    bits = diffusion.random_bits(seed, diffusion.MASK, sample, n)
    masks = diffusion.exactly(bits, count, np.ones((samples, n), bool))
    return masks, 1 / count * n / samples


def answer_rows(scorer, context, answer, key):
    """The rows that the network reads to score `answer`: a list of ScoredRow of one length."""
    ids = np.array([*context, *answer], np.int64)
    first = len(context)
    key = f"{scorer.seed} {key}"
    if scorer.process.objective == "ar":
        columns = np.arange(first - 1, len(ids) - 1)
        return [ScoredRow(ids[:-1], columns, ids[first:], np.ones(len(answer)))]
    if scorer.process.objective == "masked":
        return masked_rows(scorer, ids, first, key)
    return uniform_rows(scorer, ids, first, key)


def masked_rows(scorer, ids, first, key):
    """Copies of `ids` with masks in the answer, which begins at column `first`.

    Of block diffusion every copy has masks in all of the answer's blocks, which do not see each other's.
    """
    parts = []  # of each block: (the columns that are masked, their weight) in one copy after the other
    for number, (start, stop) in enumerate(answer_blocks(scorer.process, first, len(ids))):
        n = stop - start
        few = n < 30 and 2**n - 1 <= scorer.masks
        block_key = f"{key} {number}" if number else key
        masks, weights = every_mask(n) if few else sampled_masks(n, scorer.masks, block_key)
        parts.append([(start + np.flatnonzero(mask), weight) for mask, weight in zip(masks, weights)])

    rows = []
    for copies in itertools.zip_longest(*parts, fillvalue=(np.zeros(0, np.int64), 0.0)):
        columns = np.concatenate([columns for columns, _ in copies])
        weights = np.concatenate([np.full(len(columns), weight) for columns, weight in copies])
        tokens = ids.copy()
        tokens[columns] = scorer.process.mask_id
        clean = ids if scorer.process.block else None
        rows.append(ScoredRow(tokens, columns, ids[columns], weights, clean))
    return rows


def answer_blocks(process, first, length):
    """(start, stop) of the answer's columns `first` … `length` in each block; without blocks one pair."""
    size = process.block or length
    borders = [first, *range((first // size + 1) * size, length, size), length]
    return list(itertools.pairwise(borders))


def uniform_rows(scorer, ids, first, key):
    """Copies of `ids` at noise levels of one lattice; the answer alone, from column `first` on, is noised."""
    n, samples = len(ids) - first, scorer.masks
    process = validation_process(scorer.process, scorer.process.schedule)
    start = 0 if process.block else first  # blocks count from the context's first token
    process = process._replace(seq_len=len(ids) - start, seed=hash_to_seed(key))
    eligible = np.tile(np.arange(start, len(ids)) >= first, (samples, 1))
    # the copies of every block are one lattice
    levels = diffusion.noise_levels(process._replace(block=0), 0, samples, n_eligible=eligible.sum(1))
    counts = diffusion.by_block(process, eligible).sum(1).reshape(samples, -1)
    levels = levels._replace(t=np.repeat(levels.t, process.n_blocks, axis=1), n_eligible=counts)
    sequence = np.concatenate((ids[:1], ids[start:]))  # make_batch wants a token before the row
    batch = diffusion.make_batch(
        process, np.tile(sequence, (samples, 1)), levels, np.arange(samples), eligible)
    columns = np.arange(first, len(ids))
    targets, weights, noisy, beta = (part.reshape(samples, -1)[:, first - start :] for part in (
        batch.targets, batch.weights.astype(np.float64) * n, batch.noisy, batch.beta))
    rows = []
    for s in range(samples):
        tokens = np.concatenate((ids[:start], batch.tokens[s]))
        rows.append(ScoredRow(tokens, columns, targets[s], weights[s], ids if process.block else None,
                              batch.time[s], noisy[s], beta[s]))
    return rows


# ---------------------------------------------------------------------------------------------------- batches


class ScoredBatch(NamedTuple):
    """A diffusion.Batch, and to which answer each of its n positions belongs."""

    batch: diffusion.Batch
    owner: np.ndarray  # (n,)
    weights: np.ndarray  # (n,)
    finished: int  # answers whose last row is in this batch


def make_batches(scorer, pieces):
    """Yield ScoredBatches until all `pieces`, (context, answer, key) in order of length, are through.

    Rows of one length stand together (AR: of any, since a causal network does not see what follows), as many
    as `pass_tokens` and the memory of the logits allow. A row that several answers need is there once.
    """
    rows, row_number, entries = [], {}, []  # entries: (row's number in the batch, answer's number, ScoredRow)
    n_positions = finished = 0
    for owner, (context, answer, key) in enumerate(pieces):
        for row in answer_rows(scorer, context, answer, key):
            if rows and not has_room(scorer, rows, n_positions, row):
                yield assemble(rows, entries, finished)
                rows, row_number, entries = [], {}, []
                n_positions = finished = 0
            number = row_number.setdefault(row.input, len(rows))
            if number == len(rows):
                rows.append(row)
            entries.append((number, owner, row))
            n_positions += len(row.columns)
        finished += 1
    if rows:
        yield assemble(rows, entries, finished)


def has_room(scorer, rows, n_positions, row):
    """Whether a batch of `rows` with so many positions can take one more `row`."""
    T = len(row.tokens)
    if scorer.process.objective != "ar" and len(rows[0].tokens) != T:
        return False
    if (len(rows) + 1) * T > scorer.pass_tokens:
        return False
    return n_positions + len(row.columns) <= scorer.max_positions


def assemble(rows, entries, finished):
    """The ScoredBatch of different `rows` and of their entries (row's number, owner, ScoredRow)."""
    width = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = row.tokens
    clean = None if rows[0].clean is None else np.stack([row.clean for row in rows])
    uniform = rows[0].time is not None
    time = np.stack([row.time for row in rows]) if uniform else None
    noisy = np.concatenate([row.noisy for _, _, row in entries]) if uniform else None
    beta = np.concatenate([row.beta for _, _, row in entries]) if uniform else None

    index = np.concatenate([number * width + row.columns for number, _, row in entries])
    targets = np.concatenate([row.targets for _, _, row in entries])
    weights = np.concatenate([row.weights for _, _, row in entries])
    owner = np.concatenate([np.full(len(row.columns), owner) for _, owner, row in entries])
    batch = diffusion.Batch(
        tokens, targets, weights[:, None], index, time, noisy=noisy, beta=beta, clean=clean)
    return ScoredBatch(batch, owner, weights, finished)


# ----------------------------------------------------------------------------------------------------- scores


@torch.no_grad()
def score(scorer, questions, eos_id, on_progress=lambda done, total: None, greedy=True):
    """log p(answer | context) of each question in nats (for diffusion models its bound), and greedy hits.

    Returns (N,) fp64 and (N,) bool: whether greedy decoding writes the answer, the surest position first, one
    at a time. Uniform models do not write so: theirs is false, as all are without `greedy`.

    The score is the sum over the answer's tokens; no end is appended, nothing else is scored. Masked models:
    the count form of the bound, over all masks where there are at most `masks` of them (a single token: one
    pass, exact), else over a sample. `on_progress` gets how many different answers are done.
    """
    kind, ranks = scorer.process.objective, scorer.ranks
    greedy = greedy and kind != "uniform"
    askers = {}  # (context, answer, key) → the numbers of the questions that need its score
    for number, question in enumerate(questions):
        for part, (context, answer) in enumerate(fit_to_context(question, scorer, eos_id)):
            key = question.key + f" {part}" * (part > 0)
            askers.setdefault((tuple(context), tuple(answer), key), []).append(number)
    pieces = sorted(askers, key=lambda piece: (len(piece[0]) + len(piece[1]), piece))

    sums, misses = np.zeros(len(pieces)), np.zeros(len(pieces))
    is_chain = kind == "ar" or scorer.process.block == 1
    one_pass = np.array([len(answer) == 1 or is_chain for _, answer, _ in pieces], bool)
    one_pass &= greedy  # one pass tells whether greedy decoding writes the answer
    count = done = 0
    with eval_mode(scorer.objective):
        for scored in make_batches(scorer, pieces):
            if count % ranks.world == ranks.rank:
                nats, wrong = score_batch(scorer, scored.batch, one_pass[scored.owner].any())
                sums += np.bincount(scored.owner, nats * scored.weights, len(pieces))
                misses += np.bincount(scored.owner, wrong, len(pieces)) * one_pass
            count += 1
            done += scored.finished
            on_progress(done, len(pieces))
        if kind == "masked" and greedy and not is_chain:
            misses += greedy_misses(scorer, pieces)

    sums = sum_over_ranks(ranks, sums)
    missed = sum_over_ranks(ranks, misses) > 0
    total, hit = np.zeros(len(questions)), np.full(len(questions), greedy)
    for i, piece in enumerate(pieces):
        for number in askers[piece]:
            total[number] -= sums[i]
            hit[number] &= not missed[i]
    return total, hit


def score_batch(scorer, batch, with_likeliest):
    """(nats, whether another token is likelier than the target) at the batch's positions, (n,) each.

    Without `with_likeliest` the second is false everywhere.
    """
    scores = forward_pass(scorer, batch, bool(with_likeliest))
    if not with_likeliest:
        return scores.double().cpu().numpy(), np.zeros(len(batch.targets), bool)
    nats, tokens, _ = scores
    return nats.double().cpu().numpy(), tokens.cpu().numpy() != batch.targets


def forward_pass(scorer, batch, likeliest):
    """The nats at the batch's positions; with `likeliest` also the likeliest tokens and their probability."""
    batch = transfer.to_device(transfer.to_tensors(batch), scorer.device)
    with scorer.autocast(), kernels.avoid_cudnn_attention(scorer.device):
        return scorer.objective.nats_at_positions(batch, likeliest=likeliest)


def greedy_misses(scorer, pieces):
    """1 for each answer of several tokens that greedy decoding does not write, else 0: (N,).

    To be summed over ranks, which take turns. The surest masked position becomes its likeliest token, one
    after the other. Most misses show in the first passes.
    """
    misses = np.zeros(len(pieces))
    for numbers in equal_lengths(scorer, pieces)[scorer.ranks.rank :: scorer.ranks.world]:
        ids = np.array([[*pieces[number][0], *pieces[number][1]] for number in numbers], np.int64)
        first = np.array([[len(pieces[number][0])] for number in numbers])
        masked = np.arange(ids.shape[1]) >= first
        active = np.arange(len(numbers))  # rows whose answer may still be written
        while len(active):
            column, right = surest_token(scorer, ids[active], masked[active])
            misses[numbers[active[~right]]] = 1
            masked[active, column] = False
            active = active[right & masked[active].any(1)]
    return misses


def equal_lengths(scorer, pieces):
    """The numbers of the answers of several tokens, in groups of one total length that fit into a pass."""
    several = [number for number, (_, answer, _) in enumerate(pieces) if len(answer) > 1]
    groups = []
    for length, members in itertools.groupby(several, lambda i: len(pieces[i][0]) + len(pieces[i][1])):
        members = np.array(list(members))
        longest = max(len(pieces[number][1]) for number in members)
        by_tokens = -(-len(members) * length // scorer.pass_tokens)
        by_positions = -(-len(members) * longest // scorer.max_positions)
        groups += [part for part in np.array_split(members, max(by_tokens, by_positions)) if len(part)]
    return groups


def surest_token(scorer, ids, masked):
    """(column of the surest masked position, whether its likeliest token is true), (B,), of rows (B, T).

    Of block diffusion, too, whose blocks do not wait for each other here: all that is written is true.
    """
    index = np.flatnonzero(masked)
    z = np.where(masked, scorer.process.mask_id, ids)
    clean = ids if scorer.process.block else None
    batch = diffusion.Batch(z, ids.reshape(-1)[index], None, index, clean=clean)
    _, likeliest, probability = forward_pass(scorer, batch, True)
    confidence, tokens = np.full(masked.size, -1.0), np.zeros(masked.size, np.int64)
    confidence[index], tokens[index] = probability.float().cpu().numpy(), likeliest.cpu().numpy()
    column = confidence.reshape(masked.shape).argmax(1)
    row = np.arange(len(ids))
    return column, tokens.reshape(masked.shape)[row, column] == ids[row, column]
