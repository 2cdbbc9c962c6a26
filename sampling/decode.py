"""From masks to text: one batched loop in which WHICH positions open and WHAT they become are chosen apart (SPEC §7).

Rows of different lengths stand right-aligned on one canvas. What depends only on chance (the ancestral order, a random
order, ReMDM's capped and rescaled remasking) is planned on the host before the first pass: steps at which nothing opens
cost nothing, and the LM head sees only the positions that open. What depends on the network (surest first, above a
threshold, remasking of the unsure) is decided on the device, the head seeing only what is still masked. Neither waits for
the device between passes, and every random number is a pure function of (seed, row, step, position): a row comes out the
same in any batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import diffusion
from diffusion import CHANGE, ORDER, START, TOKEN, draws
from kernels import linear_confidence, linear_greedy
from model import KVCache
from training.transfer import AsyncCopy

PLANNED = ("ancestral", "first_hitting", "random")
CONFIDENT = ("low_confidence", "entropy", "margin", "threshold")


class DecodeConfig(NamedTuple):
    """How to decode. `steps` are the row's own, over all its blocks; 0: as many as it has new tokens."""

    order: str = "ancestral"  # of PLANNED or CONFIDENT
    steps: int = 0
    threshold: float = 0.9  # order=threshold opens every position whose likeliest token has this probability,
    beside: str = "random"  # and one more: any, as the exact sampler would; or the surest: of these, then, at least one
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    block: int = 0  # columns decoded to their end before the next ones; 0: all at once
    remask: str = "no"  # no, capped, rescaled or confidence (ReMDM)
    eta: float = 0.04
    guidance: float = 0.0  # w: un + (w + 1)·(cond − un), un with the given tokens masked
    cache: str = "no"  # no, prefix (keys and values before the block are kept), dual (those after it, too)
    refresh: int = 0  # passes after which all keys and values are written anew (0: only where a block begins)
    end: bool = False  # the text ends at its first separator after the last given token
    min_length: int = 0  # of the new text, if it may end
    banned: tuple = ()  # ids that are never written
    seed: int = 0
    compile: bool = False


class Canvas(NamedTuple):
    """Rows of one batch, right-aligned: position i of a row of n tokens is column L − n + i."""

    ids: torch.Tensor  # (B, L) the mask's id where something is to be written
    real: np.ndarray  # (B, L) where a row has a token
    hole: np.ndarray  # (B, L) what is to be written
    row: np.ndarray  # (B,) numbers that the random numbers depend on

    @property
    def uneven(self):
        return not self.real.all()


def canvas(rows, mask_id, device, first=0):
    """A Canvas of the lists of ids `rows`, the first of them number `first`."""
    L = max(map(len, rows))
    ids, real = np.full((len(rows), L), 0), np.zeros((len(rows), L), bool)
    for b, row in enumerate(rows):
        ids[b, L - len(row) :], real[b, L - len(row) :] = row, True
    return Canvas(torch.from_numpy(ids).to(device), real, (ids == mask_id) & real, first + np.arange(len(rows)))


class Result(NamedTuple):
    rows: list  # lists of ids, as long as what was given
    new: int  # tokens that were written; of a text that ended, up to its end
    passes: int  # of the network over the batch; with guidance two each
    own: float  # passes that a row would have needed by itself, on average
    gap: Callable  # () → what a cache cost: (mean KL in nats of its words from an uncached pass's, share of other likeliest tokens, positions); else None


@torch.no_grad()
def generate(model, rows, how, eos_id, schedule=None, posterior=False, first=0, watch=lambda z: None):
    """Write what is masked in the lists of ids `rows`; what is given is never altered. `watch` gets z (B, L) after each pass.

    posterior: a uniform model was trained with cross-entropy, so its logits are not leave-one-out. first: the first row's number.
    """
    c = model.config
    where = canvas(rows, c.mask_id, model.embed.weight.device, first)
    if c.causal:
        (z, passes), own, gap = write(model, where, how, eos_id, watch), where.hole.sum(1).mean(), lambda: None
    else:
        reader = Reader(model, where, how, eos_id)
        if c.timed:
            z = denoise(reader, where, how, schedule, posterior, watch)
        else:
            z = fill(reader, where, how, schedule, watch)
        passes, own, gap = reader.passes, float(reader.turns.float().mean()) * reader.copies, reader.gap
    out, new = [], 0
    tail = tails(where)
    for ids, real, hole, last in zip(z.tolist(), where.real, where.hole, tail):
        new += int(hole.sum())
        if how.end and eos_id in (rest := [i if h else -1 for i, h in zip(ids[last:], hole[last:])]):
            end = last + rest.index(eos_id) + 1
            new -= int(hole[end:].sum())
            ids[end:] = [eos_id] * len(ids[end:])
        out.append([i for i, is_real in zip(ids, real) if is_real])
    return Result(out, new, passes, float(own), gap)


def tails(where):
    """Each row's first column after its last given token. (B,)"""
    given = where.real & ~where.hole
    L = given.shape[1]
    return np.where(given.any(1), L - given[:, ::-1].argmax(1), where.real.argmax(1))


def new_before(where):
    """How many new tokens stand before each column of its row. (B, L)"""
    return np.cumsum(where.hole, 1) - where.hole


def upload(array, device):
    """An array on the device; nothing waits for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ------------------------------------------------------------------------------------- what the network says


class Reader:
    """Logits at chosen positions of a canvas: with or without guidance, with or without a memory of keys and values."""

    def __init__(self, model, where, how, eos_id):
        self.model, self.how, self.device = model, how, where.ids.device
        self.config, self.passes = model.config, 0
        self.B, self.L = where.ids.shape
        self.copies = 2 if how.guidance else 1
        self.forward = torch.compile(model, dynamic=False) if how.compile else model
        self.given = self.put(where.real & ~where.hole)
        self.real = self.documents = self.positions = None
        if where.uneven:
            self.real = self.put(where.real).repeat(self.copies, 1)
            self.documents = torch.where(self.real, 0, -1).int()  # padding is a document of its own
            self.positions = self.put((np.cumsum(where.real, 1) - 1).clip(0)).repeat(self.copies, 1)
        self.memory = None
        self.autocast = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else None
        if how.cache != "no":
            self.memory = KVCache(self.config, self.copies * self.B, self.L, self.device, self.autocast or torch.float32)
            self.read = torch.compile(model.read, dynamic=False) if how.compile else model.read
        self.longest = int(where.hole.sum(1).argmax())
        self.evidence = Evidence(self.longest)
        self.turns = torch.zeros(self.B, dtype=torch.int64, device=self.device)  # passes in which a row had something to write
        ends = where.hole & (np.arange(self.L) >= tails(where)[:, None]) & (new_before(where) >= how.min_length)
        self.no_end = self.put(~ends).flatten() if how.end else None  # where the text can't end
        self.eos_id, self.banned = eos_id, torch.tensor(how.banned, dtype=torch.int64, device=self.device)
        self.unrestricted = not how.end and not how.banned and not how.guidance  # the head alone says what is likeliest
        self.rows_at_once = max(64, (1 << 26) // self.config.n_vocab)  # a quarter of a gigabyte of logits

    def put(self, array):
        return upload(array, self.device)

    def begin(self, first, last):
        """The passes that follow are about the columns first[b] … last[b] − 1 of each row b."""
        self.age = None
        if self.memory is None:
            return
        needed = int((last - first).max()) if self.how.cache == "dual" else self.L - int(first.min())
        if self.how.compile:  # one shape for all blocks
            needed = self.how.block if self.how.cache == "dual" else self.L
        width = min(self.L, needed)
        start = np.minimum(first, self.L - width)
        columns = start[:, None] + np.arange(width)
        mine = (columns >= first[:, None]) & ((columns < last[:, None]) | (self.how.cache == "prefix"))
        self.start, self.width = self.put(start), width
        self.columns, self.mine = self.put(columns).repeat(self.copies, 1), self.put(mine).repeat(self.copies, 1)

    def hidden(self, z, index, span=slice(0), t=None):
        """The network's hidden states at the positions index (C,) of z (B, L), flattened: (C, D); with guidance (2C, D).
        Those of `span` are of the row with the most holes, `self.longest`."""
        if self.how.guidance:
            z = torch.cat((z, torch.where(self.given, self.config.mask_id, z)))
            index = torch.cat((index, index + self.B * self.L))
        self.passes += self.copies
        if self.memory is None:
            return self.at(index, self.forward, z, t, self.documents, positions=self.positions)
        if self.age is None or (self.how.refresh and self.age >= self.how.refresh):
            self.age = 1
            every = torch.arange(self.L, device=self.device).expand(len(z), -1)
            return self.at(index, self.read, z, self.memory, every, positions=self.positions, real=self.real)
        self.age += 1
        row = index // self.L
        local = row * self.width + (index % self.L - self.start[row % self.B]).clamp(0, self.width - 1)  # of what isn't masked: any
        at = None if self.positions is None else self.positions.gather(1, self.columns)
        said = self.at(local, self.read, z.gather(1, self.columns), self.memory, self.columns, self.mine, positions=at, real=self.real)
        self.evidence.note(z, index[span], said[span])
        return said

    def at(self, index, network, *given, **more):
        """The network's hidden states at `index`. Their number changes from pass to pass: a compiled network computes all positions,
        so that it has one shape, the other skips what follows the last attention elsewhere."""
        if self.how.compile:
            return network(*given, **more).flatten(0, 1).index_select(0, index)
        return network(*given, index=index, **more)

    def logits(self, hidden, index):
        """Logits in fp32 over the text tokens, with −inf at what must not be written, in pieces that fit into memory:
        (rows, logits (≤ rows_at_once, V)) for the hidden states (C or 2C, D) at index (C,)."""
        parts = hidden.chunk(self.copies)
        for start in range(0, len(index), self.rows_at_once):
            rows = slice(start, start + self.rows_at_once)
            with torch.autocast(hidden.device.type, enabled=False):  # 8 bits of bf16 leave ties among the likeliest
                logits, *without = (self.model.logits(part[rows].float()) for part in parts)
            if without:
                logits = without[0] + (self.how.guidance + 1) * (logits - without[0])
            if len(self.banned):
                logits[:, self.banned] = float("-inf")
            if self.no_end is not None:
                logits[:, self.eos_id].masked_fill_(self.no_end[index[rows]], float("-inf"))
            yield rows, logits

    def of_head(self, function, hidden):
        """A function of hidden states and the head that needs no logits, in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden.float(), self.model.head.float(), self.config.n_vocab)

    def choose(self, hidden, index, u, log_probs=False):
        """WHAT the positions index (C,) become, (C,) ids; with `log_probs` also the network's own log-probability of each:
        temperature, top-k and top-p choose tokens, they say nothing of how sure it is."""
        how, tokens, sure = self.how, [], []
        if how.temperature == 0 and self.unrestricted and not log_probs:
            return self.of_head(linear_greedy, hidden)[0]
        for rows, logits in self.logits(hidden, index):
            kept = diffusion.filter_logits(logits, how.temperature, how.top_k, how.top_p)
            tokens.append(diffusion.draw_tokens(kept, None if u is None else u[rows], how.temperature))
            if log_probs:
                sure.append(logits.gather(1, tokens[-1][:, None])[:, 0] - logits.logsumexp(-1))
        return (torch.cat(tokens), torch.cat(sure)) if log_probs else torch.cat(tokens)

    def sureness(self, hidden, index, order):
        """How sure the network is of the positions index (C,), whatever may be drawn there; larger is surer. (C,)

        low_confidence (at temperature 0) and threshold: the probability of the likeliest token; entropy: −H; margin: its lead over the next.
        """
        if self.unrestricted and order in ("low_confidence", "threshold"):
            return self.of_head(linear_confidence, hidden)
        out = []
        for _, logits in self.logits(hidden, index):
            if order == "entropy":
                log_probs = logits.log_softmax(-1)
                out.append((log_probs.exp() * log_probs.masked_fill(log_probs == float("-inf"), 0)).sum(-1))
            else:
                top = logits.softmax(-1).topk(2, dim=-1).values if order == "margin" else logits.softmax(-1).amax(-1, keepdim=True)
                out.append(top[:, 0] - (top[:, 1] if order == "margin" else 0))
        return torch.cat(out)

    @torch.no_grad()
    def gap(self):
        """What the cache cost: its words against an uncached pass's, at up to 32 passes of the row with the most holes. None without one.
        Those passes are made here, so that decoding doesn't wait for them."""
        kl = other = count = 0
        for z, index, said in self.evidence.notes:
            index = index - self.longest * self.L
            index, said = index[masked := z[0, index] == self.config.mask_id], said[masked]
            documents, positions = (None if x is None else x[self.longest :][:1] for x in (self.documents, self.positions))
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                fresh = self.model(z, None, documents, index, positions)
            p, q = (self.model.logits(hidden.float()).log_softmax(-1) for hidden in (fresh, said))
            kl += float((p.exp() * (p - q)).sum())
            other += int((p.argmax(-1) != q.argmax(-1)).sum())
            count += len(index)
        return (kl / count, other / count, count) if count else None


class Evidence:
    """What was said of one row at 16 to 32 passes, evenly spread however many there will be."""

    def __init__(self, row):
        self.row, self.notes, self.stride, self.seen = row, [], 1, 0

    def note(self, z, index, said):
        if len(index) and self.seen % self.stride == 0:
            if len(self.notes) == 32:
                self.notes, self.stride = self.notes[::2], 2 * self.stride
            self.notes.append((z[self.row :][:1].clone(), index.clone(), said.clone()))
        self.seen += len(index) > 0


# ----------------------------------------------------------------------------------------- masked: WHICH and WHAT


class Block(NamedTuple):
    """What is decoded to its end before the columns after it."""

    number: int  # in a row's own count
    first: np.ndarray  # (B,)
    last: np.ndarray  # (B,) exclusive
    hole: np.ndarray  # (B, L)
    steps: np.ndarray  # (B,) of orders with a fixed number of tokens per step at most as many as holes


def blocks(where, how):
    """The Blocks of a canvas: each row's begin at its first hole, and its steps are spread over them by their holes."""
    hole, L = where.hole, where.hole.shape[1]
    column, count = np.arange(L), hole.sum(1)
    begin = np.where(count > 0, hole.argmax(1), L)
    end = np.where(count > 0, L - hole[:, ::-1].argmax(1), L)
    width = how.block or L
    parts, before = [], np.zeros(len(hole), int)
    for number in range(-(-int((end - begin).max()) // width)):
        first = np.minimum(begin + number * width, L)
        last = np.minimum(first + width, L)
        inside = hole & (column >= first[:, None]) & (column < last[:, None])
        n = inside.sum(1)
        if not n.any():
            continue
        steps = n
        if how.steps and how.order not in ("first_hitting", "threshold"):
            share = [np.rint(how.steps * part / np.maximum(count, 1)).astype(int) for part in (before, before + n)]
            steps = np.where(n > 0, np.maximum(1, share[1] - share[0]), 0)
        parts.append(Block(number, first, last, inside, steps if how.order == "ancestral" else np.minimum(steps, n)))
        before = before + n
    return parts


def fill(reader, where, how, schedule, watch):
    """Open every hole of a masked model's canvas, block after block. Returns z (B, L)."""
    z, parts, mask_id, waiting = where.ids, blocks(where, how), reader.config.mask_id, []
    for block in parts:
        reader.begin(block.first, block.last)
        step = block.number << 20  # of the random numbers: no block has a million steps
        if how.remask == "confidence":
            z = fill_unsure(reader, z, where, how, block, schedule, step, watch)
        elif how.order in PLANNED:
            z = fill_as_planned(reader, z, where, how, *plan(where, how, block, schedule, step), step, watch)
        else:
            z = fill_surest(reader, z, where, how, block, step, watch)
        if how.end and block is not parts[-1]:  # after a separator nothing is left to write
            ended = ((z == reader.eos_id) & ~reader.no_end.view_as(z)).cumsum(1) > 0
            z = torch.where(ended & (z == mask_id), reader.eos_id, z)
            waiting.append(AsyncCopy((z == mask_id).sum()))
            if any(left.ready() and not left.values for left in waiting):
                break
    return z


def chance(how, stream, where, step):
    """Two uniform numbers for each column of the canvas, (B, L, 2): they belong to the place from the row's end."""
    return draws(how.seed, stream, where.row, step, where.hole.shape[1])[:, ::-1].copy()


def grid(block, schedule):
    """Noise ratios at the ends of every step, for each row its own number of steps: (B, S + 1), 0 after its last."""
    step = np.arange(block.steps.max() + 1)
    return schedule.r(np.clip(1 - step / np.maximum(block.steps, 1)[:, None], 0, 1))


def plan(where, how, block, schedule, step):
    """What opens at each pass, (P, B, L), and for remasking what is masked again before it (else None).

    Every row's passes follow each other without a gap, whatever the others do: the network doesn't know the time.
    """
    hole, steps = block.hole, block.steps
    u = chance(how, ORDER, where, step)[..., 0]
    if how.remask != "no":
        opens, shuts = plan_remasking(where, how, block, grid(block, schedule), step)
    else:
        if how.order == "ancestral":
            when = diffusion.opening_steps(u, hole, steps, schedule)
        else:
            counts = diffusion.shares(hole.sum(1), steps)  # (B, S)
            place = diffusion.rank_within(u, hole)
            when = np.where(hole, (place[..., None] >= counts.cumsum(1)[:, None, :-1]).sum(-1), -1)
        opens, shuts = when == np.arange(when.max() + 1)[:, None, None], None
    busy = opens.any(2)  # (S, B)
    turn = busy.cumsum(0) - 1  # (S, B): the pass of a row's step, or the one before it where nothing opens
    passes = np.zeros((turn.max() + 1, *hole.shape), bool)
    step_of, row = busy.nonzero()
    passes[turn[step_of, row], row] = opens[step_of, row]
    if shuts is None:
        return passes, None
    again = np.zeros((turn.max() + 2, *hole.shape), bool)
    for i in range(len(shuts)):  # what step i masks, the next pass sees
        again[turn[i] + 1, np.arange(len(hole))] |= shuts[i]
    return passes, again[:-1]


def plan_remasking(where, how, block, ratio, step):
    """ReMDM's chain with its σ capped or rescaled: what opens and what is masked again at each step, both (S, B, L)."""
    masked, opens, shuts = block.hole.copy(), [], []
    for i in range(ratio.shape[1] - 1):
        now, then = ratio[:, i : i + 1], ratio[:, i + 1 : i + 2]  # (B, 1)
        sigma = diffusion.remasking_chance(how.remask, how.eta, now, then)
        u = chance(how, CHANGE, where, step + i)
        opened = masked & (u[..., 0] <= diffusion.opening_chance(now, then, sigma))
        shut = block.hole & ~masked & (u[..., 1] <= sigma)
        masked = masked & ~opened | shut
        opens.append(opened)
        shuts.append(shut)
    return np.stack(opens), np.stack(shuts)


def fill_as_planned(reader, z, where, how, opens, shuts, step, watch):
    """Open what the plan opens; the head sees nothing else. z (B, L), opens (P, B, L), shuts (P, B, L) or None."""
    mask_id = reader.config.mask_id
    reader.turns += reader.put(opens.any(2).sum(0))
    flat = [np.flatnonzero(opened) for opened in opens]
    room = max(map(len, flat))
    index = np.stack([np.pad(places, (0, room - len(places)), mode="edge") for places in flat])  # the last one again: the same token
    before_it, of_it = opens[:, : reader.longest].sum((1, 2)), opens[:, reader.longest].sum(1)
    places = reader.put(index)
    for i in range(len(opens)):
        if shuts is not None and shuts[i].any():
            z = torch.where(reader.put(shuts[i]), mask_id, z)
        hidden = reader.hidden(z, places[i], slice(before_it[i], before_it[i] + of_it[i]))
        u = reader.put(chance(how, TOKEN, where, step + i).reshape(-1, 2)[index[i]])
        token = reader.choose(hidden, places[i], u)
        before = z.flatten()[places[i]]
        z = z.flatten().scatter(0, places[i], torch.where(before == mask_id, token, before)).view_as(z)
        watch(z)
    return z


def fill_surest(reader, z, where, how, block, step, watch):
    """Open at each pass the positions that the network is surest of: a fixed number, or all above the threshold."""
    B, L = z.shape
    hole, n = reader.put(block.hole), block.hole.sum(1)
    row = torch.arange(B, device=z.device)[:, None] * L
    counts = diffusion.shares(n, block.steps)  # (B, S)
    left = n[:, None] - counts.cumsum(1) + counts  # (B, S) before each step
    by_threshold = how.order == "threshold"
    draw_first = how.order == "low_confidence" and how.temperature > 0  # the published rule: it looks at the drawn token's probability
    K, waiting = int(n.max()), []
    here = reader.put(counts)
    for i in range(int(n.max()) if by_threshold else counts.shape[1]):
        if not by_threshold:
            K = int(left[:, i].max())
        while waiting and waiting[0].ready():
            K = int(waiting.pop(0).values)
        if K == 0:
            break
        masked = (z == reader.config.mask_id) & hole
        reader.turns += masked.any(1)
        columns = (~masked).to(torch.uint8).sort(dim=1, stable=True).indices[:, :K]  # (B, K) masked ones first
        live, index = masked.gather(1, columns), (row + columns).flatten()
        hidden = reader.hidden(z, index, slice(reader.longest * K, (reader.longest + 1) * K))
        u = None if how.temperature == 0 else reader.put(chance(how, TOKEN, where, step + i)).flatten(0, 1)
        if draw_first:
            token, sure = reader.choose(hidden, index, u[index], log_probs=True)
        else:
            token, sure = None, reader.sureness(hidden, index, how.order)
        sure = sure.view(B, K).masked_fill(~live, float("-inf"))
        tie = reader.put(chance(how, ORDER, where, step + i)[..., 0]).gather(1, columns)
        if by_threshold:
            if how.beside == "random":
                first = tie.masked_fill(~live, 2).argmin(1, keepdim=True)
            else:
                first = in_order(sure, tie)[:, :1]
            opened = live & ((sure > how.threshold) | (torch.arange(K, device=z.device) == first))
        else:  # only these need a token
            places = in_order(sure, tie)[:, : int(counts[:, i].max())]  # (B, C)
            opened = live.gather(1, places) & (torch.arange(places.shape[1], device=z.device) < here[:, i : i + 1])
            columns = columns.gather(1, places)
            chosen = (torch.arange(B, device=z.device)[:, None] * K + places).flatten()
            if draw_first:
                token = token[chosen]
            else:
                index, hidden = index[chosen], torch.cat([part[chosen] for part in hidden.chunk(reader.copies)])
        if token is None:
            token = reader.choose(hidden, index, None if u is None else u[index])
        z = z.scatter(1, columns, torch.where(opened, token.view_as(columns), z.gather(1, columns)))
        watch(z)
        if by_threshold or how.end:
            waiting.append(AsyncCopy(((z == reader.config.mask_id) & hole).sum(1).amax()))
    return z


def in_order(sure, tie, tolerance=3e-6):
    """The places of each row, surest first, ties in the order of the random numbers `tie`. (B, K), (B, K) → (B, K).

    On a canvas of masks alone all positions are equally sure but for rounding, which depends on the batch. So what lies
    within `tolerance` of its neighbour in the order counts as tied.
    """
    value, order = sure.sort(dim=1, descending=True, stable=True)
    group = F.pad(value[:, :-1] - value[:, 1:] > tolerance, (1, 0)).cumsum(1)  # two −inf are not apart
    return order.gather(1, (group + tie.gather(1, order).double()).argsort(dim=1, stable=True))


def fill_unsure(reader, z, where, how, block, schedule, step, watch):
    """ReMDM's confidence form: what was written with little confidence is likeliest to be masked again."""
    mask_id, hole = reader.config.mask_id, reader.put(block.hole)
    ratio = grid(block, schedule)
    places = reader.put(np.flatnonzero(block.hole))
    sure = torch.full(z.shape, float("inf"), device=z.device)
    span = slice(int(block.hole[: reader.longest].sum()), int(block.hole[: reader.longest + 1].sum()))
    reader.turns += reader.put(block.steps)
    for i in range(ratio.shape[1] - 1):
        now, then = ratio[:, i : i + 1], ratio[:, i + 1 : i + 2]  # (B, 1)
        chances = diffusion.opening_chance(now, then), diffusion.remasking_chance("rescaled", 1.0, now, then)
        opening, most = (reader.put(x.astype(np.float32)) for x in chances)
        hidden = reader.hidden(z, places, span)
        u = reader.put(chance(how, TOKEN, where, step + i).reshape(-1, 2)).index_select(0, places)
        token, log_prob = reader.choose(hidden, places, u, log_probs=True)
        token, prob = (old.flatten().scatter(0, places, new).view_as(z) for old, new in ((z, token), (sure, log_prob.exp())))
        u = reader.put(chance(how, CHANGE, where, step + i))
        masked = (z == mask_id) & hole
        opened = masked & (u[..., 0] <= opening)
        written = hole & ~masked
        weight = F.softmax(torch.where(written, -sure, float("-inf")), dim=1).nan_to_num(0)  # of a row without any: 0
        shut = written & (u[..., 1] <= weight * most)
        sure = torch.where(opened, prob, torch.where(shut, float("inf"), sure))
        z = torch.where(shut, mask_id, torch.where(opened, token, z))
        watch(z)
    return z


# -------------------------------------------------------------------------------------------- uniform diffusion


def denoise(reader, where, how, schedule, posterior, watch):
    """Denoise the holes of a uniform model's canvas, which start as uniform noise; what is given stays clean. Returns z (B, L)."""
    V, hole = reader.config.n_vocab, where.hole
    n = hole.sum(1)
    steps = np.where(n > 0, how.steps or n, 0)
    block = Block(0, None, None, hole, steps)
    reader.turns += reader.put(steps)
    ratio = grid(block, schedule)  # (B, S + 1)
    index = np.flatnonzero(hole)
    row, places = index // hole.shape[1], reader.put(index)
    noise = np.ceil(chance(how, START, where, 1 << 39)[..., 0].reshape(-1)[index] * V).astype(np.int64) - 1
    z = where.ids.flatten().scatter(0, places, reader.put(noise)).view_as(where.ids)
    for i in range(ratio.shape[1] - 1):
        time = np.clip(1 - i / np.maximum(steps, 1), 0, 1).astype(np.float32)
        now, then = (reader.put(ratio[row, j].astype(np.float32)) for j in (i, i + 1))
        u = np.concatenate([chance(how, stream, where, i) for stream in (TOKEN, CHANGE, START)], axis=2)  # (B, L, 6)
        hidden = reader.hidden(z, places, slice(0), reader.put(time).repeat(reader.copies))
        old, u = z.flatten()[places], reader.put(u.reshape(-1, 6)[index])
        new = []
        for rows, logits in reader.logits(hidden, places):
            if posterior:
                logits = diffusion.leave_one_out(logits, old[rows], now[rows].clamp_min(1e-9))
            new.append(diffusion.uniform_step(logits, old[rows], now[rows], then[rows], u[rows], how.temperature, how.top_k, how.top_p))
        new = torch.cat(new)
        z = z.flatten().scatter(0, places, torch.where(now > 0, new, old)).view_as(z)
        watch(z)
    return z


# --------------------------------------------------------------------------------------------- left to right


def write(model, where, how, eos_id, watch):
    """Fill the masked tails of an AR model's canvas, left to right. Returns z (B, L) and the number of passes.

    Documents begin after a separator, so each row is preceded by one. With a memory every pass computes one position;
    the first computes the prompt, too.
    """
    c, device = model.config, where.ids.device
    B, L = where.ids.shape

    start = where.real.argmax(1)  # the separator's column once all have moved one to the right
    real = np.concatenate((np.zeros((B, 1), bool), where.real), axis=1)
    real[np.arange(B), start] = True
    separator = upload(np.arange(L + 1) == start[:, None], device)
    z = torch.where(separator, eos_id, F.pad(where.ids, (1, 0)))
    hole, position = upload(where.hole, device), upload((np.cumsum(real, 1) - 1).clip(0), device)
    uneven = not real.all()
    exists = upload(real, device) if uneven else None
    documents = torch.where(exists, 0, -1).int() if uneven else None
    u = upload(chance(how, TOKEN, where, 0), device)  # (B, L, 2)
    early = upload(new_before(where) < how.min_length, device)
    banned = torch.tensor(how.banned, dtype=torch.int64, device=device)
    ended, waiting = torch.zeros(B, dtype=torch.bool, device=device), []
    begin, passes = int(where.hole.argmax(1).min()), 0
    cached = how.cache != "no"
    if cached:
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        memory = KVCache(c, B, L, device, dtype)
        read = torch.compile(model.read, dynamic=False) if how.compile else model.read
    for j in range(begin, L):
        if cached:
            columns = torch.arange(0 if j == begin else j, j + 1, device=device).expand(B, -1)
            at = position.gather(1, columns) if uneven else None
            upto = L if how.compile else j + 1
            last = torch.arange(1, B + 1, device=device) * columns.shape[1] - 1
            hidden = read(z.gather(1, columns), memory, columns, None, last, at, None if exists is None else exists[:, :L], upto)
        else:
            last = torch.arange(1, B + 1, device=device) * (j + 1) - 1
            hidden = model(z[:, : j + 1], None, None if documents is None else documents[:, : j + 1], last, position[:, : j + 1] if uneven else None)
        passes += 1
        with torch.autocast(device.type, enabled=False):
            logits = model.logits(hidden.float())
        if len(banned):
            logits[:, banned] = float("-inf")
        if how.end:
            logits[:, eos_id].masked_fill_(early[:, j], float("-inf"))
        token = diffusion.draw_tokens(diffusion.filter_logits(logits, how.temperature, how.top_k, how.top_p), u[:, j], how.temperature)
        if how.end:
            token = torch.where(ended, eos_id, token)
            ended = ended | (hole[:, j] & (token == eos_id))
            waiting.append(AsyncCopy(ended.all()))
        z[:, j + 1] = torch.where(hole[:, j], token, z[:, j + 1])
        watch(z[:, 1:])
        if waiting and waiting[0].ready() and waiting.pop(0).values:
            z = torch.where(z == c.mask_id, eos_id, z)
            break
    return z[:, 1:], passes
