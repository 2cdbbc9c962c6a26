"""Decode: from masks to text, in one batched loop for every order (docs/math.md §7).

WHICH positions are unmasked and WHAT they become are chosen apart. Choices that depend on chance alone (the
ancestral order, a random order, ReMDM's capped and rescaled remasking) are planned on the host before the
first pass: steps that unmask nothing cost nothing, and the LM head sees only the positions that are unmasked.
Choices that depend on the network (by confidence, above a threshold, remasking by confidence) are made on the
device, and the head sees only what is still masked. Neither waits for the device between passes, and every
random number is a pure function of (seed, row, step, position): a row comes out the same in any batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import diffusion
from diffusion import CHANGE, ORDER, START, TOKEN
from model import KVCache
from sampling.canvas import make_canvas, split_into_blocks, to_tensor
from sampling.predictor import Predictor, autocast_dtype, maybe_compile
from training.transfer import AsyncCopy

PLANNED_ORDERS = ("ancestral", "first_hitting", "random")
CONFIDENCE_ORDERS = ("low_confidence", "entropy", "margin", "threshold")


class DecodeConfig(NamedTuple):
    """How to decode. `steps` are each row's own, over all its blocks; 0: as many as it has new tokens."""

    order: str = "ancestral"  # of PLANNED_ORDERS or CONFIDENCE_ORDERS
    steps: int = 0
    threshold: float = 0.9  # order=threshold unmasks where the likeliest token has a larger probability,
    fallback: str = "random"  # and one position more, as the exact sampler would; surest: that, if none has
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    block: int = 0  # columns that are finished before the next ones begin; 0: all at once
    remask: str = "no"  # no, capped, rescaled or confidence (ReMDM)
    eta: float = 0.04  # of capped and rescaled
    guidance: float = 0.0  # w: un + (w + 1)·(cond − un), un with the prompt masked
    cache: str = "no"  # no, prefix (keys and values before the block are kept) or dual (those after it, too)
    refresh: int = 0  # passes after which all keys and values are stored anew; 0: where a block begins
    stop: bool = False  # the text ends at its first separator after the last prompt token,
    stop_ids: tuple = ()  # or at the first of these
    min_length: int = 0  # new tokens before it may end
    suppress_tokens: tuple = ()  # ids that are never written
    seed: int = 0
    compile: bool = False


class Result(NamedTuple):
    rows: list  # lists of ids, as long as the prompts with their new positions
    n_new: int  # tokens that were written; of a text that ended, up to its end
    n_passes: int  # of the network over the batch; with guidance two each
    passes_per_row: float  # that a row would have needed by itself, on average
    cache_gap: Callable  # () → the CacheGap, None without a cache


@torch.no_grad()
def generate(model, rows, cfg, eos_id, schedule=None, posterior=False, first_row=0, on_step=lambda z: None):
    """Write the new positions of `rows`, lists of ids in which the mask's id marks them. Returns a Result.

    Prompt tokens are never altered. posterior: a uniform model was trained with cross-entropy, so its logits
    are not leave-one-out. first_row: the number of the first row, on which random numbers depend.
    on_step(z) is called after each pass with the canvas z (B, L).
    """
    c = model.config
    canvas = make_canvas(rows, c.mask_id, model.embed.weight.device, first_row)
    if c.diffusion_block:
        check_order(canvas, c.diffusion_block)
    if c.causal:
        z, n_passes = decode_left_to_right(model, canvas, cfg, eos_id, on_step)
        passes_per_row, cache_gap = canvas.is_new.sum(1).mean(), lambda: None
    else:
        predictor = Predictor(model, canvas, cfg, eos_id)
        if c.timed:
            z = decode_uniform(predictor, schedule, posterior, on_step)
        else:
            z = decode_masked(predictor, schedule, on_step)
        n_passes, cache_gap = predictor.n_passes, predictor.measure_cache_gap
        passes_per_row = float(predictor.row_passes.float().mean()) * predictor.copies
    written, n_new = read_canvas(z, canvas, eos_id, {eos_id, *cfg.stop_ids} if cfg.stop else ())
    return Result(written, n_new, n_passes, float(passes_per_row), cache_gap)


def check_order(canvas, block):
    """Raise ValueError where a prompt token stands in a later block than a new one, which can't see it."""
    number = canvas.positions() // block
    first_new = np.where(canvas.is_new, number, number.max() + 1).min(1, keepdims=True)
    if (canvas.is_prompt & (number > first_new)).any():
        raise ValueError(f"a model that writes in blocks of {block} tokens can't fill a hole before a block "
                         "of given text")


def read_canvas(z, canvas, eos_id, ends):
    """The rows of a finished canvas as lists, and how many new tokens they hold.

    A text ends at the first of the ids `ends` in its open end; separators fill the rest.
    """
    rows, n_new = [], int(canvas.is_new.sum())
    for ids, is_token, is_new, start in zip(z.tolist(), canvas.is_token, canvas.is_new, canvas.open_ends()):
        end = next((i + 1 for i in range(start, len(ids)) if ids[i] in ends and is_new[i]), None)
        if end:
            n_new -= int(is_new[end:].sum())
            ids[end:] = [eos_id] * len(ids[end:])
        rows.append([token for token, keep in zip(ids, is_token) if keep])
    return rows, n_new


# ------------------------------------------------------------------------------------------- masked diffusion


def decode_masked(predictor, schedule, on_step):
    """Unmask every new position of a masked model's canvas, block after block. Returns z (B, L)."""
    canvas, cfg, mask_id = predictor.canvas, predictor.cfg, predictor.mask_id
    z, n_masked = canvas.ids, []
    blocks = split_into_blocks(canvas, cfg, predictor.config.diffusion_block)
    for block in blocks:
        predictor.start_block(block)
        if cfg.remask == "confidence":
            z = remask_by_confidence(predictor, z, block, schedule, on_step)
        elif cfg.order in PLANNED_ORDERS:
            unmask, remask = plan_passes(canvas, cfg, block, schedule)
            z = follow_plan(predictor, z, block, unmask, remask, on_step)
        else:
            z = unmask_by_confidence(predictor, z, block, on_step)
        if cfg.stop and block is not blocks[-1]:
            z = fill_ended(predictor, z, z == mask_id)
            n_masked.append(AsyncCopy((z == mask_id).sum()))
            if any(copy.ready() and not copy.values for copy in n_masked):
                break
    return z


def fill_ended(predictor, z, is_left):
    """Separators at the positions that are left to write, (B, L), after what ends a text. → (B, L)"""
    ends = torch.isin(z, predictor.ends) & ~is_left & ~predictor.cannot_end.view_as(z)
    return torch.where((ends.cumsum(1) > 0) & is_left, predictor.eos_id, z)


def noise_ratios(steps, schedule):
    """Noise ratios at the ends of all steps (B,) of each row: (B, S + 1), 0 after its last one."""
    step = np.arange(steps.max() + 1)
    return schedule.r(np.clip(1 - step / np.maximum(steps, 1)[:, None], 0, 1))


# planned on the host: what depends on chance alone


def plan_passes(canvas, cfg, block, schedule):
    """The positions that each pass unmasks, (P, B, L), and those masked again before it, likewise or None.

    Every row's passes follow each other without a gap, whatever the others do: the network doesn't know the
    time.
    """
    if cfg.remask != "no":
        unmask, remask = plan_remasking(canvas, cfg, block, noise_ratios(block.steps, schedule))
    else:
        unmask, remask = plan_unmasking(canvas, cfg, block, schedule), None

    # a row's n-th step that unmasks something is its n-th pass
    is_busy = unmask.any(2)  # (S, B)
    pass_of = is_busy.cumsum(0) - 1  # (S, B); of a step that unmasks nothing, the pass before it
    n_passes = pass_of.max() + 1
    unmask_in_pass = np.zeros((n_passes, *block.is_new.shape), bool)
    step, row = is_busy.nonzero()
    unmask_in_pass[pass_of[step, row], row] = unmask[step, row]
    if remask is None:
        return unmask_in_pass, None
    remask_before_pass = np.zeros((n_passes + 1, *block.is_new.shape), bool)
    rows = np.arange(len(block.is_new))
    for i in range(len(remask)):  # the next pass sees what step i masks
        remask_before_pass[pass_of[i] + 1, rows] |= remask[i]
    return unmask_in_pass, remask_before_pass[:-1]


def plan_unmasking(canvas, cfg, block, schedule):
    """The positions that each step unmasks, once and for all. (S, B, L)"""
    u = canvas.uniforms(cfg.seed, ORDER, block.first_step)[..., 0]
    if cfg.order == "ancestral":
        step_of = diffusion.unmasking_steps(u, block.is_new, block.steps, schedule)
    else:  # in a random order, a fixed number per step
        counts = diffusion.tokens_per_step(block.is_new.sum(1), block.steps)  # (B, S)
        n_done = counts.cumsum(1)[:, None, :-1]  # (B, 1, S − 1) after each step
        rank = diffusion.rank_within(u, block.is_new)
        step_of = np.where(block.is_new, (rank[..., None] >= n_done).sum(-1), -1)
    return step_of == np.arange(step_of.max() + 1)[:, None, None]


def plan_remasking(canvas, cfg, block, ratios):
    """The positions that each step of ReMDM's capped or rescaled chain unmasks and masks again, (S, B, L)."""
    is_masked, unmask, remask = block.is_new.copy(), [], []
    for i in range(ratios.shape[1] - 1):
        ratio, next_ratio = ratios[:, i : i + 1], ratios[:, i + 1 : i + 2]  # (B, 1)
        sigma = diffusion.remasking_probability(cfg.remask, cfg.eta, ratio, next_ratio)
        u = canvas.uniforms(cfg.seed, CHANGE, block.first_step + i)
        unmask.append(is_masked & (u[..., 0] <= diffusion.unmasking_probability(ratio, next_ratio, sigma)))
        remask.append(block.is_new & ~is_masked & (u[..., 1] <= sigma))
        is_masked = is_masked & ~unmask[-1] | remask[-1]
    return np.stack(unmask), np.stack(remask)


def follow_plan(predictor, z, block, unmask, remask, on_step):
    """Unmask what the plan of `plan_passes` unmasks; the LM head sees nothing else. Returns z (B, L)."""
    canvas, cfg, probed, columns = predictor.canvas, predictor.cfg, predictor.probe.row, block.columns
    predictor.row_passes += predictor.to_tensor(unmask.any(2).sum(0))

    # positions of each pass, filled up to one length with its last one: the same token is written twice
    index = [np.flatnonzero(positions) for positions in unmask]
    longest = max(map(len, index))
    index = np.stack([np.pad(positions, (0, longest - len(positions)), mode="edge") for positions in index])
    index_on_device = predictor.to_tensor(index)
    probe_start = unmask[:, :probed].sum((1, 2))
    probe_end = probe_start + unmask[:, probed].sum(1)

    for i in range(len(unmask)):
        if remask is not None and remask[i].any():
            z = torch.where(predictor.to_tensor(remask[i]), predictor.mask_id, z)
        positions = index_on_device[i]
        hidden = predictor.hidden(z, positions, slice(probe_start[i], probe_end[i]))
        u = canvas.uniforms(cfg.seed, TOKEN, block.first_step + i, columns).reshape(-1, 2)[index[i]]
        tokens = predictor.sample_tokens(hidden, positions, predictor.to_tensor(u))
        old = z.flatten()[positions]
        new = torch.where(old == predictor.mask_id, tokens, old)
        z = z.flatten().scatter(0, positions, new).view_as(z)
        on_step(z)
    return z


# decided on the device: what depends on the network


class Candidates(NamedTuple):
    """Of each row up to K positions that a pass may unmask, the masked ones first."""

    columns: torch.Tensor  # (B, K)
    is_masked: torch.Tensor  # (B, K) False: there are fewer than K
    index: torch.Tensor  # (B·K,) in the flattened batch
    hidden: torch.Tensor  # (B·K, D), with guidance (2·B·K, D)
    u: torch.Tensor | None  # (B·L, 2) of the tokens; None at temperature 0
    tie: torch.Tensor  # (B, K) random numbers that break ties


def unmask_by_confidence(predictor, z, block, on_step):
    """Unmask what the network is surest of: a fixed number per pass, or all above a threshold. Returns z."""
    cfg, mask_id = predictor.cfg, predictor.mask_id
    is_new, n_new, block_columns = predictor.to_tensor(block.is_new), block.is_new.sum(1), block.columns
    by_threshold = cfg.order == "threshold"
    counts = diffusion.tokens_per_step(n_new, block.steps)  # (B, S)
    n_left = n_new[:, None] - counts.cumsum(1) + counts  # (B, S) before each step
    counts_on_device = predictor.to_tensor(counts)
    K, arriving = int(n_new.max()), []
    for i in range(K if by_threshold else counts.shape[1]):
        # K: the most that a row may have masked, as planned or as the last finished pass reported it
        if not by_threshold:
            K = int(n_left[:, i].max())
        while arriving and arriving[0].ready():
            K = int(arriving.pop(0).values)
        if K == 0:
            break
        is_masked = (z == mask_id) & is_new
        predictor.row_passes += is_masked.any(1)
        candidates = look_at_masked(predictor, z, is_masked, K, block.first_step + i, block_columns)
        if by_threshold:
            columns, unmask, tokens = choose_above_threshold(predictor, candidates)
        else:
            count, most = counts_on_device[:, i : i + 1], int(counts[:, i].max())
            columns, unmask, tokens = choose_most_confident(predictor, candidates, count, most)
        z = z.scatter(1, columns, torch.where(unmask, tokens, z.gather(1, columns)))
        on_step(z)
        if by_threshold or cfg.stop:
            arriving.append(AsyncCopy(((z == mask_id) & is_new).sum(1).amax()))
    return z


def look_at_masked(predictor, z, is_masked, K, step, block_columns):
    """One pass: Candidates of z (B, L), K in each row. is_masked (B, L): only in the block's columns."""
    canvas, cfg, row = predictor.canvas, predictor.cfg, predictor.probe.row
    columns = (~is_masked).to(torch.uint8).sort(dim=1, stable=True).indices[:, :K]  # (B, K) masked ones first
    start = torch.arange(len(z), device=z.device)[:, None] * z.shape[1]
    index = (start + columns).flatten()
    hidden = predictor.hidden(z, index, slice(row * K, (row + 1) * K))
    u = None
    if cfg.temperature > 0:
        u = predictor.to_tensor(canvas.uniforms(cfg.seed, TOKEN, step, block_columns)).flatten(0, 1)
    tie = predictor.to_tensor(canvas.uniforms(cfg.seed, ORDER, step, block_columns)[..., 0])
    tie = tie.gather(1, columns)
    return Candidates(columns, is_masked.gather(1, columns), index, hidden, u, tie)


def choose_above_threshold(predictor, candidates):
    """Choose all candidates above the threshold and a fallback.

    Returns columns, which of them to unmask, and their tokens, (B, K) each.
    """
    cfg, (columns, is_masked, index, hidden, u, tie) = predictor.cfg, candidates
    confidence = predictor.confidence(hidden, index).view_as(columns).masked_fill(~is_masked, float("-inf"))
    if cfg.fallback == "random":
        fallback = tie.masked_fill(~is_masked, 2).argmin(1, keepdim=True)
    else:
        fallback = rank_by_confidence(confidence, tie)[:, :1]
    place = torch.arange(columns.shape[1], device=columns.device)
    unmask = is_masked & ((confidence > cfg.threshold) | (place == fallback))
    tokens = predictor.sample_tokens(hidden, index, None if u is None else u[index])
    return columns, unmask, tokens.view_as(columns)


def choose_most_confident(predictor, candidates, count, most):
    """Choose the `count` (B, 1) candidates of each row that the network is surest of, at most `most`.

    Returns columns, which of them to unmask, and their tokens, (B, most) each.
    """
    cfg, (columns, is_masked, index, hidden, u, tie) = predictor.cfg, candidates
    B, K = columns.shape
    draw_first = cfg.order == "low_confidence" and cfg.temperature > 0
    if draw_first:  # the published rule: confidence is the drawn token's probability
        tokens, confidence = predictor.sample_with_log_probs(hidden, index, u[index])
    else:
        confidence = predictor.confidence(hidden, index)
    confidence = confidence.view(B, K).masked_fill(~is_masked, float("-inf"))
    places = rank_by_confidence(confidence, tie)[:, :most]
    unmask = is_masked.gather(1, places) & (torch.arange(places.shape[1], device=places.device) < count)
    chosen = (torch.arange(B, device=places.device)[:, None] * K + places).flatten()
    if draw_first:
        tokens = tokens[chosen]
    else:  # only these need a token
        index, hidden = index[chosen], torch.cat([copy[chosen] for copy in hidden.chunk(predictor.copies)])
        tokens = predictor.sample_tokens(hidden, index, None if u is None else u[index])
    return columns.gather(1, places), unmask, tokens.view_as(places)


def rank_by_confidence(confidence, tie, tolerance=3e-6):
    """Sort the places of each row, surest first, by random numbers `tie` if tied. (B, K), (B, K) → (B, K).

    On a canvas of masks alone all positions are equally sure but for rounding, which depends on the batch. So
    places within `tolerance` of their neighbour in the order count as tied.
    """
    value, order = confidence.sort(dim=1, descending=True, stable=True)
    group = F.pad(value[:, :-1] - value[:, 1:] > tolerance, (1, 0)).cumsum(1)  # two −inf are not apart
    return order.gather(1, (group + tie.gather(1, order).double()).argsort(dim=1, stable=True))


def remask_by_confidence(predictor, z, block, schedule, on_step):
    """Decode with ReMDM's confidence form: the less sure a written token, the likelier it is masked again.

    Its confidence is the probability that it had when it was written. Returns z (B, L).
    """
    canvas, cfg, mask_id, columns = predictor.canvas, predictor.cfg, predictor.mask_id, block.columns
    ratios = noise_ratios(block.steps, schedule)
    is_new = predictor.to_tensor(block.is_new)
    positions = predictor.to_tensor(np.flatnonzero(block.is_new))
    confidence = torch.full(z.shape, float("inf"), device=z.device)
    probed = predictor.probe.row
    probe_start = int(block.is_new[:probed].sum())
    probe_slice = slice(probe_start, probe_start + int(block.is_new[probed].sum()))
    predictor.row_passes += predictor.to_tensor(block.steps)
    for i in range(ratios.shape[1] - 1):
        ratio, next_ratio = ratios[:, i : i + 1], ratios[:, i + 1 : i + 2]  # (B, 1)
        unmask_p = diffusion.unmasking_probability(ratio, next_ratio)
        remask_p = diffusion.remasking_probability("rescaled", 1.0, ratio, next_ratio)
        unmask_p, remask_p = (predictor.to_tensor(p.astype(np.float32)) for p in (unmask_p, remask_p))

        # a token and its probability at every new position
        hidden = predictor.hidden(z, positions, probe_slice)
        u = predictor.to_tensor(canvas.uniforms(cfg.seed, TOKEN, block.first_step + i, columns))
        u = u.flatten(0, 1).index_select(0, positions)
        new, log_p = predictor.sample_with_log_probs(hidden, positions, u)
        tokens = z.flatten().scatter(0, positions, new).view_as(z)
        p = confidence.flatten().scatter(0, positions, log_p.exp()).view_as(z)

        # masked positions take it, written ones may be masked again
        u = predictor.to_tensor(canvas.uniforms(cfg.seed, CHANGE, block.first_step + i, columns))
        is_masked = (z == mask_id) & is_new
        is_written = is_new & ~is_masked
        unmask = is_masked & (u[..., 0] <= unmask_p)
        weight = F.softmax(torch.where(is_written, -confidence, float("-inf")), dim=1)
        weight = weight.nan_to_num(0)  # a row without written positions
        remask = is_written & (u[..., 1] <= weight * remask_p)
        confidence = torch.where(unmask, p, torch.where(remask, float("inf"), confidence))
        z = torch.where(remask, mask_id, torch.where(unmask, tokens, z))
        on_step(z)
    return z


# ------------------------------------------------------------------------------------------ uniform diffusion


def decode_uniform(predictor, schedule, posterior, on_step):
    """Denoise the new positions of a uniform model's canvas, at first uniform noise. Returns z (B, L)."""
    canvas, cfg, V = predictor.canvas, predictor.cfg, predictor.config.n_vocab
    noise = np.ceil(canvas.uniforms(cfg.seed, START, 1 << 39)[..., 0] * V).astype(np.int64) - 1
    is_left = predictor.to_tensor(canvas.is_new)
    z, n_left = torch.where(is_left, predictor.to_tensor(noise), canvas.ids), []
    plain = cfg._replace(order="ancestral", block=0)
    blocks = split_into_blocks(canvas, plain, predictor.config.diffusion_block)
    for block in blocks:
        predictor.start_block(block)
        z = denoise_block(predictor, z, block, schedule, posterior, on_step)
        is_left = is_left & ~predictor.to_tensor(block.is_new)
        if cfg.stop and block is not blocks[-1]:
            z, before = fill_ended(predictor, z, is_left), z
            is_left = is_left & (z == before)
            n_left.append(AsyncCopy(is_left.sum()))
            if any(copy.ready() and not copy.values for copy in n_left):
                break
    return z


def denoise_block(predictor, z, block, schedule, posterior, on_step):
    """Denoise the new positions of a Block, from ratio 1 to 0. Returns z (B, L)."""
    canvas, cfg, steps, columns = predictor.canvas, predictor.cfg, block.steps, block.columns
    predictor.row_passes += predictor.to_tensor(steps)
    ratios = noise_ratios(steps, schedule)  # (B, S + 1)
    index = np.flatnonzero(block.is_new)
    row, positions = index // canvas.is_new.shape[1], predictor.to_tensor(index)
    for i in range(ratios.shape[1] - 1):
        time = np.clip(1 - i / np.maximum(steps, 1), 0, 1).astype(np.float32)
        ratio, next_ratio = (predictor.to_tensor(ratios[row, j].astype(np.float32)) for j in (i, i + 1))
        step = block.first_step + i
        u = [canvas.uniforms(cfg.seed, stream, step, columns) for stream in (TOKEN, CHANGE, START)]
        u = np.concatenate(u, axis=2)  # (B, L, 6)
        t = predictor.to_tensor(time[:, None]).repeat(predictor.copies, 1)
        hidden = predictor.hidden(z, positions, t=t)
        old, u = z.flatten()[positions], predictor.to_tensor(u.reshape(-1, 6)[index])
        new = []
        for rows, logits in predictor.logits(hidden, positions):
            if posterior:
                logits = diffusion.leave_one_out(logits, old[rows], ratio[rows].clamp_min(1e-9))
            new.append(diffusion.uniform_step(logits, old[rows], ratio[rows], next_ratio[rows], u[rows],
                                              cfg.temperature, cfg.top_k, cfg.top_p))
        new = torch.where(ratio > 0, torch.cat(new), old)
        z = z.flatten().scatter(0, positions, new).view_as(z)
        on_step(z)
    return z


# ---------------------------------------------------------------------------------------------- left to right


def decode_left_to_right(model, canvas, cfg, eos_id, on_step):
    """Write the new tails of an AR model's canvas. Returns z (B, L) and the number of passes.

    Documents begin after a separator, so one is put before each row: column j of the canvas is column j + 1
    of z, and predicted from those before it. With a cache every pass computes one column; the first computes
    the prompt, too.
    """
    device, (B, L) = canvas.ids.device, canvas.ids.shape

    z, is_token = prepend_separators(canvas, eos_id)
    token_mask = documents = positions = None
    if not is_token.all():  # padding is a document of its own
        token_mask = to_tensor(is_token, device)
        documents = torch.where(token_mask, 0, -1).int()
        positions = to_tensor((np.cumsum(is_token, 1) - 1).clip(0), device)
    is_new = to_tensor(canvas.is_new, device)
    u = to_tensor(canvas.uniforms(cfg.seed, TOKEN, 0), device)  # (B, L, 2)
    too_early = to_tensor(canvas.n_new_before() < cfg.min_length, device)
    suppressed = torch.tensor(cfg.suppress_tokens, dtype=torch.int64, device=device)
    ends = torch.tensor([eos_id, *cfg.stop_ids], device=device)
    cache = None
    if cfg.cache != "no":
        cache = KVCache(model.config, B, L, device, autocast_dtype(device) or torch.float32)
        forward_cached = maybe_compile(model.forward_cached, cfg)

    first, n_passes = int(canvas.is_new.argmax(1).min()), 0
    has_ended, all_ended = torch.zeros(B, dtype=torch.bool, device=device), []
    for j in range(first, L):
        # the hidden state of each row's column j, (B, D)
        start = 0 if cache is None or j == first else j
        ids, index = z[:, start : j + 1].contiguous(), last_columns(B, j + 1 - start, device)
        at = None if positions is None else positions[:, start : j + 1].contiguous()
        if cache is None:
            hidden = model(ids, None, None if documents is None else documents[:, : j + 1], index, at)
        else:
            columns = torch.arange(start, j + 1, device=device).expand(B, -1)
            mask = None if token_mask is None else token_mask[:, :L]
            hidden = forward_cached(ids, cache, columns, None, index, at, mask, L if cfg.compile else j + 1)
        n_passes += 1

        # its token
        with torch.autocast(device.type, enabled=False):
            logits = model.logits(hidden.float())
        if len(suppressed):
            logits[:, suppressed] = float("-inf")
        if cfg.stop:
            logits[:, ends] = logits[:, ends].masked_fill(too_early[:, j : j + 1], float("-inf"))
        logits = diffusion.filter_logits(logits, cfg.temperature, cfg.top_k, cfg.top_p)
        token = diffusion.draw_tokens(logits, u[:, j], cfg.temperature)
        if cfg.stop:
            token = torch.where(has_ended, eos_id, token)
            has_ended = has_ended | (is_new[:, j] & torch.isin(token, ends))
            all_ended.append(AsyncCopy(has_ended.all()))
        z[:, j + 1] = torch.where(is_new[:, j], token, z[:, j + 1])
        on_step(z[:, 1:])
        if all_ended and all_ended[0].ready() and all_ended.pop(0).values:
            z = torch.where(z == model.config.mask_id, eos_id, z)
            break
    return z[:, 1:], n_passes


def prepend_separators(canvas, eos_id):
    """The ids of a canvas with a separator before each row, (B, L + 1), and where they are no padding."""
    B, L = canvas.ids.shape
    start = canvas.is_token.argmax(1)
    is_token = np.concatenate((np.zeros((B, 1), bool), canvas.is_token), axis=1)
    is_token[np.arange(B), start] = True
    is_separator = to_tensor(np.arange(L + 1) == start[:, None], canvas.ids.device)
    return torch.where(is_separator, eos_id, F.pad(canvas.ids, (1, 0))), is_token


def last_columns(B, W, device):
    """The index of each row's last column in a flattened batch (B, W). (B,)"""
    return torch.arange(1, B + 1, device=device) * W - 1
