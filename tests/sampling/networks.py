"""Small networks with random weights for the tests of sampling, and the few lines that decode with them."""

import torch

import diffusion
from model import ModelConfig, Transformer
from sampling import decode

EOS, MASK, CONTEXT = 40, 41, 48
LINEAR = diffusion.schedule("linear")


def network(causal=False, timed=False, seed=0, **shape):
    """Random weights; heads that look at neighbours, and clear preferences: little is nearly tied."""
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, head_dim=16, d_model=48, d_ff=64, tied=False, init_std=0.1,
                 local_init=True) | shape
    config = ModelConfig(n_vocab=41, mask_id=MASK, seq_len=CONTEXT, causal=causal, timed=timed, **shape)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(seed)).eval().requires_grad_(False)
    model.lm_head.weight *= 3
    return model


MASKED, UNIFORM, AR = network(), network(timed=True), network(causal=True)


def written(model, rows, cfg, **kwargs):
    """The rows that `model` writes."""
    return decode.generate(model, rows, cfg, EOS, LINEAR, **kwargs).rows


def passes(rows, cfg, model=MASKED):
    """The canvas before the first pass and after each, [(B, L)]."""
    frames = [torch.tensor(rows)]
    decode.generate(model, rows, cfg, EOS, LINEAR, on_step=lambda z: frames.append(z.clone()))
    return frames


def unmasked(frames):
    """How many positions of each row every pass unmasks."""
    return [((a == MASK) & (b != MASK)).sum(1).tolist() for a, b in zip(frames, frames[1:])]
