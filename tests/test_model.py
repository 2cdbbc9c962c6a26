"""The network against independent references: Qwen3, complex rotations, the paper's table, a FLOP counter."""

import csv
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from configurator.ladder import LADDER, ladder, ladder_params, swiglu_width
from model import ModelConfig, Transformer, rotate

PAPER = Path(__file__).resolve().parent.parent / "../shared/paper"
needs_paper = pytest.mark.skipif(not PAPER.is_dir(), reason="the paper's tables are not on this machine")

# (n_head, n_kv_head, head_dim): full, grouped, one shared key head; n_head·head_dim is d_model = 32, or not
HEADS = ((4, 4, 8), (4, 2, 8), (6, 1, 16), (3, 3, 6))


def config(**settings):
    shape = dict(n_layer=2, n_head=4, n_kv_head=4, head_dim=8, d_model=32, d_ff=64, n_vocab=100, mask_id=100,
                 seq_len=16, causal=False)
    return ModelConfig(**(shape | settings))


def build(seed=0, dtype=torch.float32, **settings):
    """A network far from its initialisation: every part moves the output, the norms' weights too."""
    model = Transformer(config(**settings))
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.3, 1.7, generator=generator)
        else:
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return model.to(dtype).eval()


def tokens(*shape, seed=1):
    """Random tokens, the mask's id among them."""
    return torch.randint(101, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ Qwen3


def qwen3(model):
    """transformers' Qwen3 with the weights of `model`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    reference = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.padded_vocab, hidden_size=c.d_model, intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim, max_position_embeddings=c.seq_len, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied, attn_implementation="eager",
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_base)))
    names = (("blocks.", "model.layers."), ("attn_norm", "input_layernorm"),
             ("mlp_norm", "post_attention_layernorm"), (".attn.", ".self_attn."),
             ("embed.", "model.embed_tokens."))
    weights = {"lm_head.weight": model.head}
    for name, p in model.named_parameters():
        for ours, theirs in names:
            name = name.replace(ours, theirs)
        weights["model.norm.weight" if name == "norm.weight" else name] = p
    reference.load_state_dict(weights, strict=True)
    return reference.to(model.embed.weight.dtype).eval()


def assert_near(ours, theirs):
    """Assert equality to fp32's precision: both take norms and cosines in it, whatever the dtype."""
    assert theirs.std() > 0.5 and ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 3e-6 * theirs.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tied", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_causal_logits_are_those_of_qwen3(heads, tied, dtype):
    n_head, n_kv_head, head_dim = heads
    model = build(causal=True, tied=tied, dtype=dtype, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim)
    for length in (16, 5):
        ids = tokens(3, length)
        assert_near(F.linear(model(ids), model.head), qwen3(model)(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("setting", (dict(rope_base=500.0), dict(norm_eps=0.1)))
def test_rope_base_and_epsilon_reach_every_layer(setting):
    model = build(causal=True, **setting)
    ids = tokens(2, 16)
    logits = F.linear(model(ids), model.head)
    assert_near(logits, qwen3(model)(ids).logits)
    usual = build(causal=True)
    assert (logits - F.linear(usual(ids), usual.head)).abs().max() > 0.1  # the setting matters here


@torch.no_grad()
@pytest.mark.parametrize("heads", HEADS)
def test_bidirectional_logits_are_those_of_qwen3_without_its_mask(heads):
    n_head, n_kv_head, head_dim = heads
    model = build(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim)
    ids, keep = tokens(2, 16), torch.ones(2, 16, dtype=torch.bool)
    for keep[1, 9:] in (True, False):
        mask = torch.zeros(2, 1, 16, 16).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
        ours = F.linear(model(ids, documents=(~keep).int()), model.head)
        assert_near(ours[keep], qwen3(model)(ids, attention_mask=mask).logits[keep])
    everything = torch.zeros(2, 1, 16, 16)
    assert_near(F.linear(model(ids), model.head), qwen3(model)(ids, attention_mask=everything).logits)


# ---------------------------------------------------------------------------------------------- Who sees whom


def dependence(model, ids, documents=None):
    """|∂ hidden_i / ∂ embedding_j| along a random direction, (L, L)."""
    leaf = model.embed(ids).detach().requires_grad_()
    handle = model.embed.register_forward_hook(lambda *_: leaf)
    hidden = model(ids, documents=documents)
    handle.remove()
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(2))
    gradients = (torch.autograd.grad(h @ direction, leaf, retain_graph=True)[0] for h in hidden[0])
    return torch.stack([g[0].norm(dim=-1) for g in gradients])


@pytest.mark.parametrize("n_layer", (1, 2))
def test_bidirectional_outputs_depend_on_every_token(n_layer):
    assert dependence(build(n_layer=n_layer), tokens(1, 12)).min() > 1e-4


@pytest.mark.parametrize("n_layer", (1, 2))
def test_causal_outputs_depend_on_no_later_token_and_on_every_earlier_one(n_layer):
    seen = dependence(build(causal=True, n_layer=n_layer), tokens(1, 12))
    assert (seen.triu(1) == 0).all()
    assert seen[torch.ones_like(seen).tril().bool()].min() > 1e-4


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("documents", (
    [0] * 7 + [1] * 5, [0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1], [3, 3, 3, 9, 9, 5, 5, 5, 5, 5, 0, 0]))
def test_attention_stays_within_a_document(documents, causal):
    documents = torch.tensor([documents])
    seen = dependence(build(causal=causal), tokens(1, 12), documents)
    same = documents.mT == documents
    if causal:
        same = same.tril()
    assert (seen[~same] == 0).all() and seen[same].min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("causal", (False, True))
def test_a_padded_row_equals_the_shorter_row_alone(causal):
    model = build(causal=causal)
    ids = tokens(4, 16)
    lengths = torch.tensor([16, 2, 9, 15])
    hidden = model(ids, documents=(torch.arange(16) >= lengths[:, None]).int())
    for row, n in enumerate(lengths):
        torch.testing.assert_close(hidden[row, :n], model(ids[row : row + 1, :n])[0], rtol=0, atol=1e-5)
    if not causal:  # without documents the padding would be seen
        assert (model(ids)[1, :2] - hidden[1, :2]).abs().max() > 0.1


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("n_kv_head", (4, 2))
def test_picked_positions_are_those_of_the_whole(causal, n_kv_head):
    """The last block computes only what counts: values and all gradients are those of picking afterwards."""
    model = build(causal=causal, n_kv_head=n_kv_head)
    ids, index = tokens(3, 16), torch.tensor([0, 5, 17, 33, 33, 47])
    documents = (torch.arange(16) >= torch.tensor([[16], [3], [16]])).int()
    picked = model(ids, documents=documents, index=index)
    whole = model(ids, documents=documents).flatten(0, 1)[index]
    assert_near(picked, whole)
    direction = torch.randn(whole.shape, generator=torch.Generator().manual_seed(3))

    def gradients(hidden):
        return torch.autograd.grad((hidden * direction).sum(), list(model.parameters()))

    for a, b in zip(gradients(picked), gradients(whole), strict=True):
        assert (a - b).norm() < 2e-6 * b.norm()


@torch.no_grad()
def test_dropout_acts_in_training_only():
    model, plain = build(dropout=0.5), build()
    ids = tokens(2, 16)
    assert torch.equal(model(ids), plain(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


# ------------------------------------------------------------------------------------------- Rotary positions


def rotate_as_complex(x, positions, base):
    """The rotation as complex multiplication, i and i + half being one number: x (L, head_dim) fp64."""
    half = x.shape[-1] // 2
    angle = positions[:, None] / base ** (torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


@pytest.mark.parametrize("head_dim,base", ((6, 10_000.0), (32, 10_000.0), (32, 100.0)))
def test_rotation_is_complex_multiplication_at_every_position(head_dim, base):
    # long enough that angles computed in fp32 would be off by more than the tolerance
    model = Transformer(config(head_dim=head_dim, rope_base=base, seq_len=4096))
    x = torch.randn(4096, head_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = rotate_as_complex(x, torch.arange(4096, dtype=torch.float64), base)
    assert (rotate(x, model.cos, model.sin) - truth).abs().max() < 2e-6


def test_scores_depend_on_relative_positions_only():
    model = Transformer(config(head_dim=32, seq_len=2048))
    q, k = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        query, key = rotate(q[None], model.cos[i], model.sin[i]), rotate(k[None], model.cos[j], model.sin[j])
        return (query * key).sum()

    for distance in (-40, -1, 0, 1, 7, 900):
        first = max(0, -distance)
        scores = torch.stack([score(first + shift + distance, first + shift) for shift in (0, 1, 50, 1000)])
        assert (scores - scores[0]).abs().max() < 1e-5
    # direction and distance count
    assert abs(score(0, 1) - score(1, 0)) > 0.1 and abs(score(0, 1) - score(0, 7)) > 0.1


# ------------------------------------------------------------------------------------------------- The ladder


def read_table(name):
    """The rows of a table of the paper's, as dicts."""
    with open(PAPER / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def shape_of(row):
    """A row of the ladder as the keyword arguments that `ladder` returns."""
    return dict(zip(("d_model", "head_dim", "n_head", "n_layer"), row))


@needs_paper
def test_ladder_is_table_6():
    columns = ("Parameters (million)", "d_model", "kv_size", "n_heads", "n_layers")
    assert LADDER == [tuple(int(row[c]) for c in columns) for row in read_table("table6.csv")]


def test_table_6_counts_are_12_n_layer_d_model_squared():
    for count, d_model, _, _, n_layer in LADDER:
        assert count == round(12 * n_layer * d_model**2 / 1e6)
    odd = [count for count, d_model, head_dim, n_head, _ in LADDER if n_head * head_dim != d_model]
    assert odd == [5, 14, 10682, 11976, 13343, 14653]  # docs/math.md §1


@needs_paper
def test_figure_labels_are_ladder_params():
    runs = read_table("isoflop_points.csv")
    for run in runs:
        shape = {k: int(run[k]) for k in ("d_model", "head_dim", "n_head", "n_layer")}
        assert round(ladder_params(**shape) / 1e6) == int(run["params"]) / 1e6
        assert ladder(f"{int(run['params']) // 10**6}M") == shape
    labels = {int(run["params"]) for run in runs + read_table("epoch_curves.csv")}
    assert len(labels) == 45
    for label in labels:
        ladder(f"{label // 10**6}M")  # raises ValueError if it is unknown


def test_ladder_finds_every_row_by_either_count():
    labels = [round(ladder_params(*row) / 1e6) for _, *row in LADDER]
    assert len(set(labels)) == len(labels) == 55
    for label, (count, *row) in zip(labels, LADDER):
        assert ladder(f"{label}M") == shape_of(row)
        if count not in labels:  # the figures' N comes first
            assert ladder(f"{count}M") == shape_of(row)
    for name in ("1086M", "1002M", "1.1B", " 1086m "):
        assert ladder(name) == shape_of((1792, 128, 14, 26))
    assert ladder("15B") == shape_of((5120, 128, 40, 47))
    assert ladder("14M") == shape_of((224, 32, 7, 4))  # not the row that Table 6 prints as 14


UNKNOWN = ("", "M", "B", "1086", 1086, None, "3M", "-7M", "7.0M", "1B", "2B", "99B", "gpt2", "²M")


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_or_ambiguous_names_are_refused(name):
    with pytest.raises(ValueError):
        ladder(name)


@pytest.mark.parametrize("name", ("0.3B", "1.5B"))
def test_a_name_that_fits_several_figure_labels_is_refused(name):
    """1.5B: 1509M or 1523M, but by no means the 1645M that Table 6 prints as 1529."""
    with pytest.raises(ValueError):
        ladder(name)


def count_without_norms(d_model, head_dim, n_head, n_layer):
    """Parameters of the network itself, with GPT-2's vocabulary, without allocating it."""
    shape = dict(n_layer=n_layer, n_head=n_head, n_kv_head=n_head, head_dim=head_dim, d_model=d_model)
    with torch.device("meta"):
        model = Transformer(config(**shape, d_ff=swiglu_width(d_model), n_vocab=50257, mask_id=50257))
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert norms == d_model + n_layer * (2 * d_model + 2 * head_dim)
    return model.n_params() - norms


def test_ladder_params_count_the_network():
    for _, d_model, head_dim, n_head, _ in LADDER:  # one block of each: whole ones take long to build
        shape = (d_model, head_dim, n_head, 1)
        assert count_without_norms(*shape) == ladder_params(*shape)
    for name in ("7M", "34M", "124M", "1086M"):
        assert round(count_without_norms(**ladder(name)) / 1e6) == int(name[:-1])
        assert count_without_norms(**ladder(name)) == ladder_params(**ladder(name))
    assert swiglu_width(1792) == 4736  # MegaDLMs' gpt2_1b


# -------------------------------------------------------------------------------------------- Initial weights


@pytest.mark.parametrize("scaled", (True, False))
def test_initial_weights(scaled):
    shape = dict(n_layer=8, d_model=128, head_dim=32, n_kv_head=2, d_ff=192, tied=False, timed=True)
    model = Transformer(config(**shape, scaled_init=scaled)).init_weights(torch.Generator().manual_seed(0))
    residual = 0
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all()
            continue
        std = 0.02
        if name.split(".")[-2] in ("o_proj", "down_proj"):
            residual += 1
            std = 0.02 / math.sqrt(2 * 8) if scaled else 0.02
        n = p.numel()
        assert abs(p.std() / std - 1) < 5 / math.sqrt(2 * n), name  # five standard errors
        assert abs(p.mean() / std) < 5 / math.sqrt(n), name
        assert 3 < p.abs().max() / std < 7, name  # normal, not uniform
    assert residual == 16


def test_initial_weights_are_a_function_of_the_generator():
    def model(seed):
        return Transformer(config()).init_weights(torch.Generator().manual_seed(seed))

    first, again, other = model(0), model(0), model(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert not torch.equal(first.embed.weight, other.embed.weight)
    assert not torch.equal(first.blocks[0].attn.q_proj.weight, first.blocks[1].attn.q_proj.weight)
    narrow = Transformer(config(init_std=0.005)).init_weights()
    assert 0.0045 < narrow.embed.weight.std() < 0.0055


# ------------------------------------------------------------------------------ Counting parameters and FLOPs


def test_n_params():
    tied, untied = Transformer(config()), Transformer(config(tied=False))
    timed = Transformer(config(timed=True))
    block = 4 * 32 * 32 + 3 * 32 * 64 + 2 * 32 + 2 * 8
    assert tied.n_params(embeddings=False) == untied.n_params(embeddings=False) == 2 * block + 32
    assert tied.n_params() == tied.n_params(False) + 128 * 32  # 100 tokens and the mask, in 64s
    assert untied.n_params() == tied.n_params() + 128 * 32
    assert timed.n_params(False) == tied.n_params(False) + 256 * 32 + 32 * 32


def measure_flops(model, rows, share):
    """FLOPs per token of a training step whose head sees `share` of the tokens: (all, the attention's)."""
    length = model.config.seq_len
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # two plain products, which the counter knows
        index = None if share == 1 else torch.arange(int(share * rows * length))
        hidden = model(tokens(rows, length), index=index).flatten(0, -2)
        targets = torch.zeros(len(hidden), dtype=torch.long)
        kernels.linear_cross_entropy(hidden, model.head, targets, torch.ones(len(targets)), 100)[0].backward()
    by_operation = counter.get_flop_counts()["Global"]
    return counter.get_total_flops() / (rows * length), by_operation[torch.ops.aten.bmm] / (rows * length)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("share", (1.0, 0.5))
@pytest.mark.parametrize("settings", (dict(), dict(tied=False, causal=True)))
def test_flops_are_those_of_forward_and_backward(heads, share, settings):
    n_head, n_kv_head, head_dim = heads
    model = build(n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim, **settings)
    total, attention = measure_flops(model, 2, share)
    assert model.flops_per_token(share, causal=False) == total
    assert model.flops_per_token(share, causal=True) == total - attention / 2  # what causal attention needs
    assert model.flops_per_token(share) == model.flops_per_token(share, causal=model.config.causal)


# ---------------------------------------------------------------------- The head excludes whatever is no text


@pytest.mark.parametrize("n_vocab,padded", ((100, 128), (63, 64), (64, 128), (127, 128)))
def test_the_head_spends_no_probability_on_mask_and_padding(n_vocab, padded):
    model = build(n_vocab=n_vocab, mask_id=n_vocab, tied=False)
    assert model.config.padded_vocab == model.head.shape[0] == model.embed.weight.shape[0] == padded
    with torch.no_grad():
        model.head[n_vocab:] = 50 * torch.randn(padded - n_vocab, 32)  # would win every softmax
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 2, 3, n_vocab - 1, n_vocab - 1, n_vocab // 2])
    logits = kernels.head_logits(hidden, model.head, n_vocab)
    assert logits.shape == (7, padded) and logits.dtype == torch.float32
    assert (logits[:, n_vocab:] == -math.inf).all()
    text = hidden @ model.head[:n_vocab].T
    torch.testing.assert_close(logits[:, :n_vocab], text)
    loss, nats = kernels.linear_cross_entropy(hidden, model.head, targets, torch.arange(7.0), n_vocab)
    torch.testing.assert_close(nats, F.cross_entropy(text, targets, reduction="none"))
    torch.testing.assert_close(loss, (nats * torch.arange(7.0)).sum())
    loss.backward()
    assert (model.head.grad[n_vocab:] == 0).all() and model.head.grad[:n_vocab].isfinite().all()


def test_padding_covers_a_mask_id_beyond_the_text():
    assert config(n_vocab=50_277, mask_id=50_289).padded_vocab == 50_304  # specials between text and mask
    assert config(n_vocab=50_257, mask_id=50_257).padded_vocab == 50_304
    assert config(n_vocab=50_257, mask_id=50_304).padded_vocab == 50_368


# ------------------------------------------------------------------------------------------------------- Time


@torch.no_grad()
def test_time_embedding_tells_times_apart():
    model, ids = build(timed=True), tokens(1, 16).repeat(9, 1)
    times = torch.tensor([0.0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.999, 1.0])[:, None]
    hidden = model(ids, times)
    apart = torch.cdist(hidden.flatten(1), hidden.flatten(1)) / math.sqrt(hidden[0].numel())
    assert apart[~torch.eye(9, dtype=torch.bool)].min() > 0.01
    assert torch.equal(model(ids, times), hidden)
    torch.testing.assert_close(model(ids, times.flip(0)).flip(0), hidden)  # each row has its own time
    assert (hidden - build(timed=False)(ids)).abs().amax((1, 2)).min() > 0.01  # even at 0


@torch.no_grad()
def test_time_features_are_sinusoids_with_periods_from_2_pi_thousandths():
    model = build(timed=True).time
    t = torch.tensor([0.0, 0.3, 1.0])
    frequency = torch.tensor([1000 * 10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    wave = torch.exp(1j * t.double()[:, None] * frequency)
    features = torch.cat((wave.real, wave.imag), 1).float()
    truth = F.silu(features @ model.up.weight.T) @ model.down.weight.T
    # angles reach 1000, where fp32 has steps of 6e-5
    torch.testing.assert_close(model(t[None])[0], truth, rtol=0, atol=3e-4 * truth.abs().max().item())


@torch.no_grad()
def test_an_untimed_network_ignores_time():
    model, ids = build(), tokens(2, 16)
    assert torch.equal(model(ids, torch.tensor([0.1, 0.9])), model(ids))


@torch.no_grad()
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16))
def test_a_timed_network_runs_in_any_dtype(dtype):
    assert build(timed=True, dtype=dtype)(tokens(2, 16), torch.tensor([[0.1], [0.9]])).dtype == dtype


# ------------------------------------------------------------------------------------------------- local_init


@pytest.mark.parametrize("causal, offsets", ((False, (-1, 1, -2, 2)), (True, (-1, -2, -3, -4))))
@pytest.mark.parametrize("n_kv_head", (4, 2))
def test_local_init_points_every_head_at_one_neighbour(causal, offsets, n_kv_head):
    """The attention scores of random text, by hand from the first block, peak at each head's offset."""
    c = ModelConfig(1, 4, n_kv_head, 16, 128, 64, 50, 50, 64, causal=causal, init_std=0.06, rope_base=100.0,
                    local_init=True)
    for on in (True, False):
        torch.manual_seed(0)
        net = Transformer(dataclasses.replace(c, local_init=on)).init_weights()
        attn = net.blocks[0].attn
        x = net.blocks[0].attn_norm(net.embed(torch.randint(0, 51, (8, 64))))
        q = attn.q_norm(attn.q_proj(x).view(8, 64, 4, 16)).transpose(1, 2)
        k = attn.k_norm(attn.k_proj(x).view(8, 64, n_kv_head, 16)).transpose(1, 2)
        k = k.repeat_interleave(4 // n_kv_head, 1)
        scores = rotate(q, net.cos, net.sin) @ rotate(k, net.cos, net.sin).transpose(-1, -2)  # (8, 4, 64, 64)
        best = scores.argmax(-1) - torch.arange(64)
        inner = best[:, :, 5:-5]
        for head, offset in enumerate(offsets):
            share = (inner[:, head] == offset).float().mean()
            assert share > 0.9 if on else share < 0.3
