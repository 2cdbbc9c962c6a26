"""Predictions at chosen positions of a canvas: with guidance, with a cache, and what that cache costs."""

from typing import NamedTuple

import numpy as np
import torch

import diffusion
from kernels import linear_confidence, linear_greedy
from model import KVCache
from sampling.canvas import to_tensor

LOGITS_AT_ONCE = 1 << 26  # a quarter of a gigabyte


class Predictor:
    """Predicts what the new positions of a canvas become. z (B, L) is the canvas as it is written.

    `index` (C,) are always positions in the flattened batch.
    """

    def __init__(self, model, canvas, cfg, eos_id):
        self.model, self.canvas, self.cfg, self.eos_id = model, canvas, cfg, eos_id
        self.config, self.mask_id, self.device = model.config, model.config.mask_id, canvas.ids.device
        self.B, self.L = canvas.ids.shape
        self.autocast_dtype = autocast_dtype(self.device)
        self.rows_at_once = max(64, LOGITS_AT_ONCE // self.config.n_vocab)

        # guidance: the batch once more, with its prompt masked
        self.copies = 2 if cfg.guidance else 1
        self.is_prompt = self.to_tensor(canvas.is_prompt)

        # padding: a document of its own, and positions that start after it
        self.is_token = self.documents = self.positions = None
        if canvas.has_padding:
            self.is_token = self.to_tensor(canvas.is_token).repeat(self.copies, 1)
            self.documents = torch.where(self.is_token, 0, -1).int()
            self.positions = self.to_tensor(canvas.positions()).repeat(self.copies, 1)

        # what must not be written
        self.suppressed = torch.tensor(cfg.suppress_tokens, dtype=torch.int64, device=self.device)
        self.cannot_end, self.ends = None, self.to_tensor(np.array([eos_id, *cfg.stop_ids]))
        if cfg.stop:
            self.cannot_end = self.to_tensor(~canvas.may_end(cfg.min_length)).flatten()
        self.is_unrestricted = not cfg.stop and not cfg.suppress_tokens and not cfg.guidance

        # the network, and its cache, without which a block of block diffusion would see none before it
        self.forward, self.cache = maybe_compile(model, cfg), None
        self.cache_age = None  # passes since all columns were stored; None: they never were
        self.block_size, self.block_numbers = self.config.diffusion_block, None
        if self.block_size:
            numbers = self.to_tensor(canvas.positions() // self.block_size)
            self.block_numbers = numbers.repeat(self.copies, 1)
        if cfg.cache != "no" or self.block_size:
            dtype = self.autocast_dtype or torch.float32
            self.cache = KVCache(self.config, self.copies * self.B, self.L, self.device, dtype)
            self.forward_cached = maybe_compile(model.forward_cached, cfg)

        # counts
        self.n_passes = 0
        self.row_passes = torch.zeros(self.B, dtype=torch.int64, device=self.device)  # each row's own
        self.probe = CacheProbe(row=int(canvas.is_new.sum(1).argmax()))  # the row with the most new tokens

    def to_tensor(self, array):
        return to_tensor(array, self.device)

    # ------------------------------------------------------------------------------------------ hidden states

    def start_block(self, block):
        """Let the next passes be about a Block; with a cache they compute a window of columns around it."""
        if self.block_size:
            return self.start_diffusion_block(block)
        self.cache_age = None
        if self.cache is None:
            return
        dual = self.cfg.cache == "dual"
        if self.cfg.compile:  # one shape for all blocks
            width = self.cfg.block if dual else self.L
        else:
            width = int((block.last - block.first).max()) if dual else self.L - int(block.first.min())
        self.width = min(self.L, width)
        window = self.set_window(block.first)
        is_stored = window >= block.first[:, None]
        if dual:
            is_stored &= window < block.last[:, None]
        self.is_stored = self.to_tensor(is_stored).repeat(self.copies, 1)  # their keys and values, each pass

    def set_window(self, first):
        """Let passes compute self.width columns from `first` (B,) on; returns them, (B, width)."""
        start = np.clip(first, 0, self.L - self.width)
        window = start[:, None] + np.arange(self.width)
        self.window_start = self.to_tensor(start)  # (B,)
        self.window = self.to_tensor(window).repeat(self.copies, 1)  # (B or 2B, width)
        return window

    def start_diffusion_block(self, block):
        """`start_block` of block diffusion, whose cache is exact: no token sees a later block.

        The pass that opens a block also stores the keys and values of the block before, now finished, or at
        first of the whole prompt; the block's other passes compute its own columns alone.
        """
        is_first = self.cache_age is None
        self.block, self.cache_age = block, 0
        numbers = self.canvas.positions() // self.block_size
        self.own_number = np.where(block.is_new, numbers, 0).max(1)  # (B,)
        self.n_keys = self.L if self.cfg.compile else int(block.last.max())
        self.width = self.n_keys if is_first else min(2 * self.block_size, self.L)
        self.set_window(0 * block.first if is_first else block.first - self.block_size)

    def hidden_in_block(self, z, index, t):
        """`hidden` of block diffusion."""
        if self.cfg.cache == "no":
            self.width = self.n_keys
            self.set_window(0 * self.block.first)
        elif self.cache_age == 1:
            self.width = min(self.block_size, self.L)
            self.set_window(self.block.first)
        self.cache_age += 1
        if t is not None:  # what is finished has none
            number = self.to_tensor(self.own_number[:, None]).repeat(self.copies, 1)
            t = torch.where(self.block_numbers.gather(1, self.window) == number, t, 0.0)
        positions = None if self.positions is None else self.positions.gather(1, self.window)
        return self.run(self.forward_cached, self.place_in_window(index), z.gather(1, self.window),
                        self.cache, self.window, positions=positions, is_token=self.is_token,
                        n_keys=self.n_keys, t=t, block_numbers=self.block_numbers)

    def place_in_window(self, index):
        """The places of the positions index (C,) among the window's, (C,). Nothing masked is outside."""
        row, column = index // self.L, index % self.L
        place = column - self.window_start[row % self.B]
        return row * self.width + place.clamp(0, self.width - 1)

    def hidden(self, z, index, probe_slice=slice(0), t=None):
        """The hidden states of z (B, L) at index (C,): (C, D).

        With guidance (2C, D), the second half with the prompt masked. probe_slice: the part of index that is
        of the row `self.probe.row`. t (B, 1), with guidance (2B, 1): the time of a timed network.
        """
        if self.copies == 2:
            z = torch.cat((z, torch.where(self.is_prompt, self.mask_id, z)))
            index = torch.cat((index, index + self.B * self.L))
        self.n_passes += self.copies
        if self.block_size:
            return self.hidden_in_block(z, index, t)
        if self.cache is None:
            return self.run(self.forward, index, z, t, self.documents, positions=self.positions)
        if self.cache_age is None or 0 < self.cfg.refresh <= self.cache_age:
            self.cache_age = 1
            all_columns = torch.arange(self.L, device=self.device).expand(len(z), -1)
            return self.run(self.forward_cached, index, z, self.cache, all_columns,
                            positions=self.positions, is_token=self.is_token)

        # only the window's columns
        self.cache_age += 1
        positions = None if self.positions is None else self.positions.gather(1, self.window)
        hidden = self.run(self.forward_cached, self.place_in_window(index), z.gather(1, self.window),
                          self.cache, self.window, self.is_stored, positions=positions,
                          is_token=self.is_token)
        self.probe.add(z, index[probe_slice], hidden[probe_slice])
        return hidden

    def run(self, network, index, *args, **kwargs):
        """The hidden states of one pass of the network at index.

        Their number changes from pass to pass. A compiled network computes all positions, so that it has one
        shape; otherwise what follows the last attention is computed at `index` alone.
        """
        if self.cfg.compile:
            return network(*args, **kwargs).flatten(0, 1).index_select(0, index)
        return network(*args, **kwargs, index=index)

    # ----------------------------------------------------------------------------- logits, tokens, confidence

    def logits(self, hidden, index):
        """Iterate over (rows, logits): slices of index (C,) and their logits (n, V), for they are large.

        hidden (C, D), with guidance (2C, D). In fp32 over the text tokens; −inf: must not be written.
        """
        copies = hidden.chunk(self.copies)
        for start in range(0, len(index), self.rows_at_once):
            rows = slice(start, start + self.rows_at_once)
            with torch.autocast(hidden.device.type, enabled=False):  # bf16 leaves ties among the likeliest
                logits, *unguided = (self.model.logits(copy[rows].float()) for copy in copies)
            if unguided:
                logits = unguided[0] + (self.cfg.guidance + 1) * (logits - unguided[0])
            if len(self.suppressed):
                logits[:, self.suppressed] = float("-inf")
            if self.cannot_end is not None:
                cannot_end = self.cannot_end[index[rows], None]
                logits[:, self.ends] = logits[:, self.ends].masked_fill(cannot_end, float("-inf"))
            yield rows, logits

    def fuse_head(self, kernel, hidden):
        """A kernel of hidden states and LM head that keeps no logits, in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return kernel(hidden.float(), self.model.head.float(), self.config.n_vocab)

    def sample_tokens(self, hidden, index, u):
        """WHAT the positions index (C,) become: (C,) ids. u (C, 2) uniform, None at temperature 0."""
        if self.cfg.temperature == 0 and self.is_unrestricted:
            return self.fuse_head(linear_greedy, hidden)[0]
        tokens = [self.sample(logits, u, rows) for rows, logits in self.logits(hidden, index)]
        return torch.cat(tokens)

    def sample_with_log_probs(self, hidden, index, u):
        """`sample_tokens` and the network's own log-probability of each token, (C,) and (C,).

        Temperature, top-k and top-p choose tokens; they do not change how sure the network is of them.
        """
        tokens, log_probs = [], []
        for rows, logits in self.logits(hidden, index):
            token = self.sample(logits, u, rows)
            tokens.append(token)
            log_probs.append(logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1))
        return torch.cat(tokens), torch.cat(log_probs)

    def sample(self, logits, u, rows):
        cfg = self.cfg
        filtered = diffusion.filter_logits(logits, cfg.temperature, cfg.top_k, cfg.top_p)
        return diffusion.draw_tokens(filtered, None if u is None else u[rows], cfg.temperature)

    def confidence(self, hidden, index):
        """How sure the network is of the positions index (C,), whatever is drawn there; larger is surer. (C,)

        By cfg.order. low_confidence (at temperature 0) and threshold: the probability of the likeliest token;
        margin: its lead over the second; entropy: minus the entropy.
        """
        order = self.cfg.order
        if self.is_unrestricted and order in ("low_confidence", "threshold"):
            return self.fuse_head(linear_confidence, hidden)
        confidence = []
        for _, logits in self.logits(hidden, index):
            if order == "entropy":
                log_probs = logits.log_softmax(-1)
                finite = log_probs.masked_fill(log_probs == float("-inf"), 0)
                confidence.append((log_probs.exp() * finite).sum(-1))
            elif order == "margin":
                top = logits.softmax(-1).topk(2, dim=-1).values
                confidence.append(top[:, 0] - top[:, 1])
            else:
                confidence.append(logits.softmax(-1).amax(-1))
        return torch.cat(confidence)

    # ------------------------------------------------------------------------------------- what a cache costs

    @torch.no_grad()
    def measure_cache_gap(self):
        """The CacheGap of up to 32 passes of the probed row, or None without a cache.

        Their uncached passes are made here, so that decoding doesn't wait for them.
        """
        kl = other = count = 0
        row = self.probe.row
        documents = None if self.documents is None else self.documents[row : row + 1]
        positions = None if self.positions is None else self.positions[row : row + 1]
        for z, index, cached in self.probe.records:
            index = index - row * self.L
            is_masked = z[0, index] == self.mask_id
            index, cached = index[is_masked], cached[is_masked]
            is_on = self.autocast_dtype is not None
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=is_on):
                exact = self.model(z, None, documents, index, positions)
            p, q = (self.model.logits(hidden.float()).log_softmax(-1) for hidden in (exact, cached))
            kl += float((p.exp() * (p - q)).sum())
            other += int((p.argmax(-1) != q.argmax(-1)).sum())
            count += len(index)
        return CacheGap(kl / count, other / count, count) if count else None


class CacheGap(NamedTuple):
    """How far predictions from a cache are from an uncached pass's."""

    kl: float  # mean Kullback-Leibler divergence in nats, uncached from cached
    other: float  # share of positions whose likeliest token is another one
    positions: int


class CacheProbe:
    """Cached hidden states of one row at 16 to 32 passes, evenly spread however many there will be."""

    def __init__(self, row):
        self.row, self.records, self.stride, self.n_seen = row, [], 1, 0

    def add(self, z, index, hidden):
        """Record a pass, if it is its turn and says something of the row."""
        if len(index) == 0:
            return
        if self.n_seen % self.stride == 0:
            if len(self.records) == 32:
                self.records, self.stride = self.records[::2], 2 * self.stride
            self.records.append((z[self.row : self.row + 1].clone(), index.clone(), hidden.clone()))
        self.n_seen += 1


def autocast_dtype(device):
    """The type of autocast's matrix products, None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def maybe_compile(network, cfg):
    """The network, compiled if cfg.compile."""
    return torch.compile(network, dynamic=False) if cfg.compile else network
