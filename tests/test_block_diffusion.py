"""Block diffusion (docs/math.md §12): levels, one pass over [z | x], the bound at every size of a block."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import STATES, Denoiser, H, L, P, estimate, process
from torch.nn.attention.flex_attention import BlockMask

import diffusion as d
import kernels
from data import short_row_lengths
from evaluation import likelihood
from evaluation.answers import Question, Scorer, answer_rows, score
from model import ModelConfig, Transformer
from training import transfer
from training.objective import Objective

V = 50
MASK = V


def network(length, block, timed=False, **fields):
    """A small random network whose hidden states depend strongly on what it reads."""
    torch.manual_seed(0)
    config = ModelConfig(3, 4, 2, 8, 32, 64, V, MASK, length, causal=False, diffusion_block=block,
                         init_std=0.3, timed=timed, **fields)
    return Transformer(config).init_weights()


def rows(length, n=2, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, V, (n, length)))


def batch_of(p, x, n_rows, progress=0.5):
    """The whole step of n_rows rows x (n_rows, L) as a Batch of tensors."""
    levels = d.noise_levels(p, 0, n_rows, progress)
    before = np.concatenate((x[:, :1], x), axis=1)
    return transfer.to_tensors(d.make_batch(p, before, levels, np.arange(n_rows)))


# ----------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize("block", (1, 2, 4, 5))
def test_every_micro_batch_is_a_lattice(block):
    """Of equal steps over all its cells, whatever their place in a row."""
    p = d.Process("masked", V, MASK, 20, block=block)
    levels = d.noise_levels(p, 640, 32)
    assert levels.t.shape == (32, p.n_blocks)
    for parts in (1, 4, 32):
        for part in range(parts):
            t = np.sort(levels.t[levels.microbatch_rows(part, parts)], axis=None)
            np.testing.assert_allclose(np.diff(t), 1 / len(t))


def test_a_level_tells_nothing_of_the_block_s_place():
    """Chi-square over places × eighths of the levels; in order of place they would be apart at once."""
    p = d.Process("masked", V, MASK, 20, block=4)
    t = np.concatenate([d.noise_levels(p, 8 * step, 8).t for step in range(1500)])  # (12 000, 5)
    place = np.broadcast_to(np.arange(5), t.shape)

    def statistic(t):
        counts = np.histogram2d(place.ravel(), t.ravel(), bins=(5, 8))[0]
        return ((counts - t.size / 40) ** 2 / (t.size / 40)).sum()

    assert statistic(t) < 56.3  # 99 % of 35 degrees of freedom; those of one row are more even than chance
    assert statistic(np.sort(t, axis=1)) > 1000


def test_one_block_is_the_row_as_it_was():
    """Bit for bit the noise, the weights and the capacity of a process without blocks."""
    for objective in ("masked", "uniform"):
        plain = d.Process(objective, V, MASK, 24, schedule="cosine")
        whole = plain._replace(block=24)
        one, other = (batch_of(p, rows(24, 8).numpy(), 8) for p in (plain, whole))
        for name, a in one._asdict().items():
            b = getattr(other, name)
            assert name == "clean" or (a is None and b is None) or torch.equal(a, b)
        assert d.capacity(plain, 8) == d.capacity(whole, 8)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(("linear", "cosine", "poly3")), st.sampled_from(("count", "ratio", "time")),
       st.sampled_from(("uniform", "iid", "moving_gaussian")), st.integers(1, 8), st.integers(2, 60),
       st.integers(1, 60), st.sampled_from((0.0, 0.5)), st.integers(0, 2**40), st.floats(0, 1))
def test_masked_positions_always_fit_the_capacity(
        schedule, estimator, time, n_rows, length, block, short_rows, first, progress):
    """And exactly `count` positions are masked in each block, none in one that does not count."""
    p = d.Process("masked", V, MASK, length, schedule=schedule, estimator=estimator, time=time,
                  block=min(block, length))
    lengths = short_row_lengths(0, first + np.arange(3 * n_rows), length, short_rows)
    levels = d.noise_levels(p, first, 3 * n_rows, progress, lengths)
    assert (levels.n_eligible.sum(1) == lengths).all()
    for part in range(3):
        own = levels.microbatch_rows(part, 3)
        eligible = np.arange(length) < lengths[own][:, None]
        batch = d.make_batch(p, np.zeros((n_rows, length + 1), int), levels, own, eligible)  # raises if not
        assert batch.index.shape == (d.capacity(p, n_rows),) and np.isfinite(batch.weights).all()
        masked = d.by_block(p, batch.tokens == MASK).sum(1).reshape(n_rows, -1)
        if estimator == "count":
            np.testing.assert_array_equal(masked, levels.count[own])
        assert not masked[levels.n_eligible[own] == 0].any()


# -------------------------------------------------------------------------------------- one pass over [z | x]


CASES = [  # length, block, within documents, timed
    (24, 4, False, False), (24, 1, False, False), (24, 24, False, False), (24, 8, True, True),
    (23, 4, False, True), (23, 4, True, False),  # the last block is shorter
]


def block_by_block(net, z, x, t=None, documents=None):
    """The hidden states of z, one pass for each block over a clean prefix and the noisy block."""
    length, block, parts = z.shape[1], net.config.diffusion_block, []
    for number, start in enumerate(range(0, length, block)):
        stop = min(start + block, length)
        ids = torch.cat((x[:, :start], z[:, start:stop]), dim=1)
        time = None
        if t is not None:
            time = torch.zeros(len(z), stop)
            time[:, start:] = t[:, number : number + 1]
        parts.append(net(ids, time, None if documents is None else documents[:, :stop])[:, start:])
    return torch.cat(parts, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("length, block, within_documents, timed", CASES)
def test_one_pass_is_a_loop_over_blocks(length, block, within_documents, timed):
    net, x = network(length, block, timed).double(), rows(length)
    z = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5, MASK, x)
    t = torch.rand(2, -(-length // block)) if timed else None
    documents = torch.randint(0, 3, x.shape).sort()[0] if within_documents else None
    one = net(z, t, documents, clean=x)
    torch.testing.assert_close(one, block_by_block(net, z, x, t, documents), rtol=0, atol=1e-6)

    index = torch.tensor([0, 3, length - 1, length + 5])
    picked = net(z, t, documents, index, clean=x)
    torch.testing.assert_close(picked, one.flatten(0, 1)[index], rtol=0, atol=1e-6)
    shifted = net(z, t, documents, clean=x.roll(1, 1))
    assert block == length or (shifted - one).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("within_documents", (False, True))
def test_a_later_block_changes_nothing_before_it(within_documents):
    net, x = network(24, 4), rows(24)
    documents = torch.arange(24).expand(2, -1) // 10 if within_documents else None
    z = torch.where(torch.rand(x.shape) < 0.5, MASK, x)
    before = net(z, None, documents, clean=x)
    z[:, 12:16], x[:, 12:16] = (z[:, 12:16] + 1) % V, (x[:, 12:16] + 1) % V
    change = (net(z, None, documents, clean=x) - before).abs().amax((0, 2))
    assert not change[:12].any() and change[12:16].all()
    assert not within_documents or not change[20:].any()  # another document begins at 20
    assert within_documents or change[16:].all()


@torch.no_grad()
def test_a_block_sees_no_noisy_token_of_another():
    net, x = network(24, 4), rows(24)
    z = torch.where(torch.rand(x.shape) < 0.5, MASK, x)
    before = net(z, clean=x)
    z[:, 4:8] = (z[:, 4:8] + 1) % V
    change = (net(z, clean=x) - before).abs().amax((0, 2))
    assert change[4:8].all() and not change[:4].any() and not change[8:].any()


@pytest.mark.parametrize("rows", (4, 9, 128))
@pytest.mark.parametrize("within_documents", (False, True))
def test_attention_in_chunks_is_that_with_the_whole_mask(within_documents, rows, monkeypatch):
    """Results and gradients of all queries and of z's alone; and FlexAttention is told the same mask.

    The last block is shorter, and so is the last chunk.
    """
    torch.manual_seed(0)
    length, block = 22, 4
    documents = torch.randint(0, 3, (2, length)).sort()[0] if within_documents else None
    token, cpu = torch.arange(2 * length), torch.device("cpu")
    whole = kernels.sees(token[:, None], token, length, block)[None, None]
    if within_documents:
        whole = whole & (documents[:, token % length, None] == documents[:, None, token % length])[:, None]
    monkeypatch.setattr(kernels, "CHUNK_ROWS", rows)
    masks = kernels.block_diffusion_masks(length, block, cpu, documents)
    assert len(masks[0]) == {4: 6, 9: 2, 128: 1}[rows]
    for chunks, n in zip(masks, (2 * length, length)):
        q, k, v = (torch.randn(2, 3, m, 8, requires_grad=True) for m in (n, 2 * length, 2 * length))
        expected = F.scaled_dot_product_attention(q, k, v, whole[:, :, :n])
        results = kernels.attention(q, k, v, chunks, False, 0.0), expected
        torch.testing.assert_close(*results)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in results)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(kernels, "assumes_gpu", True)  # as where memory on a GPU is predicted: one mask
    for mask, n in zip(kernels.block_diffusion_masks(length, block, cpu, documents), (2 * length, length)):
        assert torch.equal(mask, whole[:, :, :n])
    monkeypatch.setattr(kernels, "has_flex", lambda tensor: True)
    for flex, n in zip(kernels.block_diffusion_masks(length, block, cpu, documents), (2 * length, length)):
        assert isinstance(flex, BlockMask)
        row, i, j = torch.meshgrid(*(torch.arange(m) for m in (2, n, 2 * length)), indexing="ij")
        told = flex.mask_mod(row, torch.zeros_like(row), i, j)
        assert torch.equal(told, whole[:, 0, :n].expand_as(told))


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_computes_the_same(monkeypatch):
    """As on a GPU; on a CPU FlexAttention has no gradients."""
    net, x = network(32, 4), rows(32)
    z = torch.where(torch.rand(x.shape) < 0.5, MASK, x)
    one = net(z, clean=x)
    monkeypatch.setattr(kernels, "has_flex", lambda tensor: True)
    torch.testing.assert_close(net(z, clean=x), one, rtol=0, atol=1e-5)


def test_flops_count_the_pairs_of_the_mask():
    """Attention's are of the pairs that see each other; in the last block x has keys and values only."""
    net = network(24, 4)
    c, blocks = net.config, net.blocks
    token = torch.arange(48)
    both, noisy = (kernels.sees(token[:n, None], token, 24, 4).sum().item() for n in (48, 24))
    matrices = [sum(p.numel() for p in block.parameters() if p.dim() == 2) for block in blocks]
    attn = blocks[-1].attn
    keys, queries = attn.k_proj.weight.numel() + attn.v_proj.weight.numel(), attn.q_proj.weight.numel()
    picked = matrices[-1] - keys - queries
    head = c.padded_vocab * c.d_model
    products = 2 * sum(matrices[:-1]) + 2 * keys + queries + 0.5 * (picked + head)
    attention = 12 * c.n_head * c.head_dim * ((c.n_layer - 1) * both + noisy) / 24
    assert net.flops_per_token(0.5) == pytest.approx(6 * products + attention)


# --------------------------------------------------------------------------------------------- the estimators


def loss_of(net, batch):
    with torch.no_grad():
        return Objective(net, False)(batch)["loss"].item()


def test_blocks_of_one_token_are_the_chain_rule_without_noise():
    """The exact likelihood of the network's left-to-right sampler; other seeds give the same, bit for bit."""
    net, x = network(12, 1), rows(12, 8)
    p = d.Process("masked", V, MASK, 12, block=1)
    assert not p.has_noise and p._replace(estimator="time").has_noise
    losses = {loss_of(net, batch_of(p._replace(seed=seed), x.numpy(), 8)) for seed in range(3)}
    assert len(losses) == 1
    nats = 0.0
    with torch.no_grad():
        for i in range(12):
            ids = torch.cat((x[:, :i], torch.full((8, 1), MASK)), dim=1)
            nats -= net.logits(net(ids)[:, -1]).log_softmax(-1).gather(1, x[:, i : i + 1]).sum().item()
    assert losses.pop() == pytest.approx(nats / 96, rel=1e-6)


def test_the_count_form_is_the_mean_over_all_masks():
    """Two blocks of 4 tokens: over many seeds the loss averages to Σ over masks of Σ CE/(k·(4 over k))."""
    net, x = network(8, 4), rows(8, 1)
    exact = 0.0
    for block in range(2):
        for mask in itertools.product((False, True), repeat=4):
            k = sum(mask)
            if k:
                z = x.clone()
                columns = 4 * block + np.flatnonzero(mask)
                z[:, columns] = MASK
                with torch.no_grad():
                    log_p = net.logits(net(z, clean=x)).log_softmax(-1)
                exact -= log_p[0, columns, x[0, columns]].sum().item() / (k * math.comb(4, k))
    p = d.Process("masked", V, MASK, 8, block=4)
    losses = [loss_of(net, batch_of(p._replace(seed=seed), np.tile(x.numpy(), (64, 1)), 64))
              for seed in range(40)]
    error = np.std(losses) / math.sqrt(40)
    assert error < 0.01 * exact and abs(np.mean(losses) - exact / 8) < 4 * error


@pytest.mark.parametrize("block", (1, 2, 3))
def test_the_optimal_denoiser_s_bound_is_the_entropy(block):
    """At every size of a block, masked and uniform; L = 3, so a second block of 2 is shorter."""
    for estimator in ("count", "time"):
        p = process(estimator=estimator, block=block, schedule="cosine" if block == 2 else "linear")
        mean, error = estimate(p, Denoiser("masked", block=block), groups=16)
        assert error < 0.03 * H and abs(mean - H) < 4 * error + 1e-7, (estimator, block)
    p = process("uniform", block=block, time="cube")
    mean, error = estimate(p, Denoiser("loo", block=block), groups=16)
    assert error < 0.03 * H and abs(mean - H) < 4 * error


# ------------------------------------------------------------------------- likelihoods, through what is there


class Text:
    """Rows of the small world, as data.Sequences gives them."""

    def __init__(self, n):
        numbers = np.random.default_rng(5).choice(len(P), n, p=P)
        self.available, self.numbers = n, numbers
        self.tokens = np.concatenate((STATES[numbers][:, :1], STATES[numbers]), axis=1)


def scorer_of(denoiser, text):
    def read(p, sequences, ids, levels, own, valid=None, spacing=None):
        return d.make_batch(p, sequences.tokens[ids], levels, own, valid=valid, spacing=spacing)

    return likelihood.RowScorer(Objective(denoiser, False), text, read, 50, likelihood.distributed.SINGLE,
                                torch.device("cpu"))


@pytest.mark.parametrize("block", (1, 2))
def test_validation_and_its_curve(block):
    """The optimal denoiser scores the text's own likelihood; the curve over the noise integrates to that."""
    text = Text(400)
    truth = -np.log(P[text.numbers]).mean() / L
    p = likelihood.validation_process(process(block=block), "linear")
    losses = likelihood.evaluate(scorer_of(Denoiser("masked", block=block), text), p, 400, passes=4)
    bound = sum(losses.parts)
    assert losses.cells.shape == (4, 400, p.n_blocks, 1)
    if block == 1:
        assert bound == pytest.approx(truth, rel=1e-6)
        return
    _, noise_error = likelihood.standard_error(losses)
    assert abs(bound - truth) < 4 * noise_error
    curve = likelihood.noise_curve(losses, p, 2)
    points = curve.values()
    mean = np.average([point.nats for point in points], weights=[point.rows for point in points])
    assert mean == pytest.approx(losses.cells[:, :, 0].mean() * L / 2, rel=1e-9)  # without the last token


@pytest.mark.parametrize("order", likelihood.ORDERS)
def test_ordered_likelihoods_take_as_many_passes_as_a_block_has_tokens(order):
    """Every order of the optimal denoiser is the distribution; L = 3 in blocks of 2: two passes."""
    calls = []
    objective = Objective(Denoiser("masked", block=2), False)
    nats = likelihood.chain_rule(objective, torch.tensor(STATES), order, 3, block=2,
                                 on_progress=lambda done, total: calls.append((done, total)))
    assert nats.sum(1) == pytest.approx(-np.log(P), rel=1e-5) and calls == [(1, 2), (2, 2)]


@pytest.mark.parametrize("block", (1, 2, 3))
@pytest.mark.parametrize("known", (0, 1, 2))
def test_answers_given_a_context(block, known):
    """The optimal denoiser's score is log p(answer | context), exactly where all masks are read."""
    state = STATES[P.argmax()]
    prior = sum(p for p, other in zip(P, STATES) if (other[:known] == state[:known]).all())
    truth = math.log(P.max() / prior)
    question = [Question(state[:known].tolist(), state[known:].tolist())]
    for kind, objective in dict(masked="masked", loo="uniform").items():
        p = process(objective, block=block % 3)
        scorer = Scorer(Objective(Denoiser(kind, block=block % 3), False), p, torch.device("cpu"), masks=64)
        if kind == "masked":
            scores, hits = score(scorer, question, -1)
            assert scores[0] == pytest.approx(truth, rel=1e-5)
        elif block % 3 and known % block == 0:  # elsewhere this denoiser takes a block's context for noisy
            keyed = [question[0]._replace(key=str(key)) for key in range(100)]
            scores, _ = score(scorer, keyed, -1)
            assert abs(scores.mean() - truth) < 4 * scores.std() / 10


def test_levels_of_an_answer_are_a_lattice_whatever_the_context():
    """A block model's uniform answers are scored at evenly spread levels, as those without blocks are."""
    spread = []
    for block in (0, 4):
        p = d.Process("uniform", V, MASK, 64, block=block)
        scorer = Scorer(None, p, torch.device("cpu"), masks=64)
        rows = answer_rows(scorer, list(range(13)), [1, 2, 3], "a")
        u = np.cbrt(np.array([row.time[-1] for row in rows]))  # linear schedule, r = u³
        spread.append(np.diff(np.sort(u)))
    for steps in spread:
        np.testing.assert_allclose(steps, 1 / 64, atol=1e-4)


def test_holes_before_a_later_block_of_text_are_refused():
    from sampling import decode

    with pytest.raises(ValueError, match="can't fill a hole before a block of given text"):
        decode.generate(network(24, 4), [[1, MASK, 2, 3, 4, MASK]], decode.DecodeConfig(), -1)
