"""Block diffusion writes block after block, with an exact cache, from what it has learned."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2

import diffusion
from model import ModelConfig, Transformer
from sampling import decode
from sampling.decode import DecodeConfig

V, MASK, EOS = 50, 50, 7
LINEAR = diffusion.schedule("linear")


def network(block, length=29, n_vocab=V, timed=False):
    torch.manual_seed(0)
    config = ModelConfig(2, 4, 2, 8, 32, 64, n_vocab, n_vocab, length, causal=False, diffusion_block=block,
                         init_std=0.5, timed=timed)
    return Transformer(config).init_weights().eval()


def canvas_rows():
    """Prompts of none, a few and many tokens, which end inside blocks; new text up to different blocks."""
    rng = np.random.default_rng(1)
    return [[*map(int, rng.integers(0, V, n)), *[MASK] * k] for n, k in ((0, 29), (3, 17), (9, 6), (12, 17))]


def write(net, rows, first_row=0, **settings):
    return decode.generate(net, rows, DecodeConfig(seed=3, **settings), EOS, LINEAR, first_row=first_row)


WAYS = [
    dict(), dict(steps=7), dict(order="random"), dict(order="threshold", threshold=0.1),
    dict(order="low_confidence", steps=9, temperature=0), dict(order="entropy"), dict(order="margin"),
    dict(order="first_hitting"), dict(remask="capped", steps=60, eta=0.1),
    dict(remask="confidence", steps=40), dict(guidance=1.0), dict(stop=True)]


@pytest.mark.parametrize("timed, settings", [
    *((False, way) for way in WAYS),
    *((True, way) for way in (dict(), dict(steps=12), dict(guidance=1.0), dict(stop=True)))], ids=str)
@pytest.mark.parametrize("block", (1, 4, 5))
def test_a_cache_changes_nothing_nor_does_the_batch(block, timed, settings):
    """Token for token; prompts stay, and no mask is left."""
    net, rows = network(block, timed=timed), canvas_rows()
    cached = write(net, rows, cache="prefix", **settings)
    assert write(net, rows, cache="no", **settings).rows == cached.rows
    for number, row in enumerate(rows):
        alone = write(net, [row], first_row=number, cache="prefix", **settings).rows[0]
        assert alone == cached.rows[number] and MASK not in alone
        assert all(new == old for new, old in zip(alone, row) if old != MASK)


@pytest.mark.parametrize("block", (1, 4, 5))
def test_finished_blocks_are_never_computed_again(block, monkeypatch):
    """A pass computes its own block; the one that opens it, the block before, too; the first, the prompt."""
    widths = []
    forward_cached = Transformer.forward_cached

    def count(self, ids, *args, **kwargs):
        widths.append(ids.shape[1])
        return forward_cached(self, ids, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward_cached", count)
    write(network(block), [[1, 2, 3, 4, 5, 6, 7] + [MASK] * 22], order="random", cache="prefix")
    first = 7 // block * block
    expected = []
    for start in range(first, 29, block):
        n_new = len(range(max(7, start), min(start + block, 29)))
        opening = min(start + block, 29) if start == first else 2 * block
        expected += [opening, *[block] * (n_new - 1)]
    assert widths == expected


@torch.no_grad()
def test_greedy_text_is_the_doubled_pass_s():
    """One token at a time, at temperature 0: each is the likeliest of the pass that training makes."""
    net, row = network(4), [1, 2, 3, 4, 5] + [MASK] * 24
    text = torch.tensor(write(net, [row], order="low_confidence", temperature=0, cache="prefix").rows)
    for start in range(4, 29, 4):
        z = text.clone()
        z[:, max(5, start) : start + 4] = MASK
        while (z[:, start : start + 4] == MASK).any():
            probs = net.logits(net(z, clean=text)).softmax(-1).amax(-1).masked_fill(z != MASK, -1)
            column = start + probs[0, start : start + 4].argmax().item()
            assert net.logits(net(z, clean=text))[0, column].argmax() == text[0, column]
            z[0, column] = text[0, column]


def distribution(net, length, block, shift=0):
    """p(x) of every text if each block is written in a random order, by enumeration: (V^length,).

    Through the doubled pass; shift: the clean half is moved by so many tokens, which is wrong.
    """
    n_vocab = net.config.n_vocab
    states = torch.tensor(list(itertools.product(range(n_vocab), repeat=length)))
    total = torch.ones(len(states), dtype=torch.float64)
    for start in range(0, length, block):
        columns = range(start, min(start + block, length))
        orders = list(itertools.permutations(columns))
        chance = torch.zeros(len(states), dtype=torch.float64)
        for order in orders:
            z, p = states.clone(), torch.ones(len(states), dtype=torch.float64)
            z[:, start : start + block] = n_vocab
            for column in order:
                hidden = net(z, clean=states.roll(shift, 1))[:, column]
                p *= net.logits(hidden).double().softmax(-1).gather(1, states[:, column : column + 1])[:, 0]
                z[:, column] = states[:, column]
            chance += p / len(orders)
        total *= chance
    return total.numpy()


@torch.no_grad()
@pytest.mark.parametrize("settings", (
    dict(order="random"), dict(order="first_hitting"), dict(steps=4000)), ids=str)
@pytest.mark.parametrize("block", (1, 2, 3, 4))
def test_samples_have_the_distribution_of_training_s_pass(block, settings):
    """Chi-square over all texts of 4 tokens of 3 kinds. A shifted half fails."""
    n, net = 8000, network(block % 4, length=4, n_vocab=3)
    rows = np.array(write(net, [[3] * 4] * n, cache="prefix", **settings).rows)
    counts = np.bincount(rows @ 3 ** np.arange(4)[::-1], minlength=81)

    def statistic(p):
        return ((counts - n * p) ** 2 / (n * p)).sum()

    bound = chi2.ppf(0.999, 80)
    if block == 4:  # the whole row: the same by a network without blocks
        net.config.__dict__["diffusion_block"] = 4
    assert statistic(distribution(net, 4, block)) < bound
    assert block == 4 or statistic(distribution(net, 4, block, shift=1)) > 2 * bound


def test_a_separator_ends_a_text_and_its_passes():
    """After it nothing is written; a batch ends with its last text."""
    net = network(4)
    long, short = (write(net, canvas_rows(), cache="prefix", order="random", stop=stop)
                   for stop in (False, True))
    for row, prompt in zip(short.rows, canvas_rows()):
        new = row[len(prompt) - prompt.count(MASK) :]
        if EOS in new:
            assert set(new[new.index(EOS) :]) == {EOS}
    assert short.n_passes <= long.n_passes and short.n_new <= long.n_new
