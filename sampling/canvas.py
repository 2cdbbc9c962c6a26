"""The canvas of a batch: rows of different lengths, their new positions, and the blocks of these."""

from typing import NamedTuple

import numpy as np
import torch

import diffusion


class Canvas(NamedTuple):
    """Rows of one batch, right-aligned: position i of a row of n tokens is column L − n + i."""

    ids: torch.Tensor  # (B, L) the mask's id at new positions
    is_token: np.ndarray  # (B, L) False: padding
    is_new: np.ndarray  # (B, L) positions to be written; the prompt is all others, wherever they stand
    row_numbers: np.ndarray  # (B,) which random numbers a row gets

    @property
    def is_prompt(self):
        return self.is_token & ~self.is_new

    @property
    def has_padding(self):
        return not self.is_token.all()

    def positions(self):
        """Each column's position in its own row, 0 in padding. (B, L)"""
        return (np.cumsum(self.is_token, 1) - 1).clip(0)

    def n_new_before(self):
        """How many new tokens stand before each column of its row. (B, L)"""
        return np.cumsum(self.is_new, 1) - self.is_new

    def open_ends(self):
        """Each row's first column after its last prompt token: from there on the text is open. (B,)"""
        is_prompt = self.is_prompt
        after_prompt = is_prompt.shape[1] - is_prompt[:, ::-1].argmax(1)
        return np.where(is_prompt.any(1), after_prompt, self.is_token.argmax(1))

    def may_end(self, min_length):
        """Where a separator may end the text: in an open end, after `min_length` new tokens. (B, L)"""
        column = np.arange(self.is_new.shape[1])
        is_open = self.is_new & (column >= self.open_ends()[:, None])
        return is_open & (self.n_new_before() >= min_length)

    def uniforms(self, seed, stream, step, columns=slice(None)):
        """Two uniforms in (0, 1] for each column of a slice, (B, L, 2), and 1 for the others.

        They depend on a column's place from the row's end.
        """
        L = self.is_new.shape[1]
        start, stop, _ = columns.indices(L)
        u = np.ones((len(self.is_new), L, 2))
        drawn = diffusion.draw_uniforms(seed, stream, self.row_numbers, step, stop - start, L - stop)
        u[:, start:stop] = drawn[:, ::-1]
        return u


def make_canvas(rows, mask_id, device, first_row=0):
    """A Canvas of `rows`, lists of ids in which the mask's id marks new positions.

    first_row: the number of the first one.
    """
    L = max(map(len, rows))
    ids, is_token = np.zeros((len(rows), L), np.int64), np.zeros((len(rows), L), bool)
    for b, row in enumerate(rows):
        ids[b, L - len(row) :] = row
        is_token[b, L - len(row) :] = True
    is_new = (ids == mask_id) & is_token
    return Canvas(torch.from_numpy(ids).to(device), is_token, is_new, first_row + np.arange(len(rows)))


class Block(NamedTuple):
    """A span of columns that is finished before the next one begins."""

    number: int  # within each row
    first: np.ndarray  # (B,)
    last: np.ndarray  # (B,) exclusive
    is_new: np.ndarray  # (B, L) its new positions
    steps: np.ndarray  # (B,) of the reverse process

    @property
    def first_step(self):
        """The number of its first step, for random numbers: no block has a million steps."""
        return self.number << 20

    @property
    def columns(self):
        """The slice of columns in which its new positions are: a pass needs no random numbers elsewhere."""
        found = np.flatnonzero(self.is_new.any(0))
        return slice(found[0], found[-1] + 1)


def split_into_blocks(canvas, cfg, diffusion_block=0):
    """The Blocks of a canvas, cfg.block columns wide from each row's first new position on (0: one block).

    Those of a network of block diffusion are as in training, diffusion_block wide from a row's first token
    on; the first also has its prompt's last tokens. A row's steps are spread over its blocks by their new
    tokens. Orders that unmask a fixed number of tokens per step get no more steps than tokens.
    """
    is_new, L = canvas.is_new, canvas.is_new.shape[1]
    column, n_new = np.arange(L), is_new.sum(1)
    begin = np.where(n_new > 0, is_new.argmax(1), L)
    end = np.where(n_new > 0, L - is_new[:, ::-1].argmax(1), L)
    width = diffusion_block or cfg.block or L
    if diffusion_block:
        place = np.take_along_axis(canvas.positions(), np.minimum(begin, L - 1)[:, None], 1)[:, 0]
        begin = np.where(n_new > 0, begin - place % diffusion_block, L)
    counts_tokens = cfg.order in ("first_hitting", "threshold")  # takes as many steps as it needs
    blocks, n_before = [], np.zeros(len(is_new), int)
    for number in range(-(-int((end - begin).max()) // width)):
        first = np.minimum(begin + number * width, L)
        last = np.minimum(first + width, L)
        inside = is_new & (column >= first[:, None]) & (column < last[:, None])
        n_inside = inside.sum(1)
        if not n_inside.any():
            continue
        steps = n_inside
        if cfg.steps and not counts_tokens:
            steps_before = np.rint(cfg.steps * n_before / np.maximum(n_new, 1)).astype(int)
            steps_after = np.rint(cfg.steps * (n_before + n_inside) / np.maximum(n_new, 1)).astype(int)
            steps = np.where(n_inside > 0, np.maximum(1, steps_after - steps_before), 0)
        if cfg.order != "ancestral":
            steps = np.minimum(steps, n_inside)
        blocks.append(Block(number, first, last, inside, steps))
        n_before = n_before + n_inside
    return blocks


def to_tensor(array, device):
    """An array on the device; nothing waits for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
