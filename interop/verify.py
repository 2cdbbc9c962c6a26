"""Compare the logits of a checkpoint and its conversion: random tokens, one layer at a time, in float32.

Each format runs in its own layout: ours in our network, Hugging Face's in transformers' stock classes (a
folder's own code is not run), Megatron's and GGUF's in networks that are written here for their tensors.
"""

import dataclasses

import torch

from interop import huggingface, megatron
from interop.source import cast_weights, meta_network
from kernels import block_causal_mask


@torch.no_grad()
def max_difference(source, written, dtype):
    """The largest difference of logits, relative to the largest logit, between a Source and its conversion.

    Where the dtype changes, in two steps: the source against its weights in our network, and these, rounded,
    against the conversion. NaN where a logit is.
    """
    c = source.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(c.n_vocab, (2, min(64, c.seq_len)), generator=generator)
    if source.objective != "ar":
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, c.mask_id, ids)
    pairs = [(logits(source, ids), logits(written, ids))]
    if dtype != "source":
        rounded = cast_weights(source.weights, dtype)
        pairs = [(logits(source, ids), native_logits(c, source.weights, ids)),
                 (native_logits(c, rounded, ids), logits(written, ids))]
    pairs = [(a[..., : c.n_vocab], b[..., : c.n_vocab]) for a, b in pairs]
    differences = [(a - b).abs().max() / a.abs().max() for a, b in pairs]
    return float(torch.stack(differences).max())


def logits(source, ids):
    """Logits of a Source, not shifted even if the model is: ids (B, L) → (B, L, n_vocab or more) fp32."""
    if source.format == "megatron":
        return megatron_logits(source.config, source.original, ids)
    if source.format == "gguf":
        return gguf_logits(source.config, source.original, ids)
    if source.format == "hf":
        return transformers_logits(source.config, source.weights, ids)
    return native_logits(source.config, source.weights, ids)


def native_logits(config, weights, ids):
    """Logits of our own network, with one block at a time in memory: ids (B, L) → (B, L, n_vocab) fp32."""
    B, L = ids.shape
    one_block = dataclasses.replace(config, shift=False, seq_len=L, n_layer=1)
    network = meta_network(one_block)
    network.cos, network.sin = (torch.empty(L, config.head_dim // 2) for _ in range(2))
    network.init_tables()
    mask = block_causal_mask(L, config.diffusion_block, ids.device) if config.diffusion_block else None
    x = weights["embed.weight"].read()[ids].float()
    if config.timed:
        x = x + load_module(network.time, weights, "time.")(torch.full((B, 1), 0.5))
    for i in range(config.n_layer):
        block = load_module(network.blocks[0], weights, f"blocks.{i}.")
        x = block(x, network.cos, network.sin, mask)
    norm = load_module(network.norm, weights, "norm.")
    return norm(x) @ head_weight(config, weights).T


def load_module(module, weights, prefix):
    """Give a module the weights whose names begin with `prefix`."""
    module.to_empty(device="cpu").requires_grad_(False).eval()
    state = {name: weights[prefix + name].read().float() for name, _ in module.named_parameters()}
    module.load_state_dict(state)
    return module


def head_weight(config, weights):
    """The LM head's rows of text, (n_vocab, D)."""
    return weights["embed.weight" if config.tied else "lm_head.weight"].read()[: config.n_vocab].float()


def transformers_logits(config, weights, ids):
    """Logits of the stock architecture in transformers, with one block at a time in memory.

    weights: under our names; ids (B, L) → (B, L, n_vocab) fp32. Raises ValueError without transformers.
    """
    try:
        import transformers
    except ImportError:
        raise ValueError("--verify of a Hugging Face folder needs: pip install '.[hf]'") from None
    # no stock class has QK-norm and biases for query, key and value only: Qwen3's fourth bias is set to zero
    has_both = config.qk_norm and config.qkv_bias
    stock = dataclasses.replace(
        config, causal=True, shift=False, diffusion_block=0, qkv_bias=config.qkv_bias and not has_both)
    settings = huggingface.config_json(stock, "ar", None)
    settings |= dict(attention_bias=has_both, vocab_size=1, num_hidden_layers=1)
    class_name = settings["architectures"][0]
    if not hasattr(transformers, class_name):
        raise ValueError(f"--verify needs {class_name}, which transformers {transformers.__version__} lacks: "
                         "pip install 'transformers>=4.51'")
    hf_config = getattr(transformers, class_name.replace("ForCausalLM", "Config"))(
        **settings, attn_implementation="eager")
    network = getattr(transformers, class_name)(hf_config).float().eval().model
    norm, network.norm = network.norm, torch.nn.Identity()  # the block becomes each in turn, without the end
    B, L = ids.shape
    may_attend = torch.ones(L, L, dtype=torch.bool)
    if config.causal:
        may_attend = may_attend.tril()
    if config.diffusion_block:
        may_attend = block_causal_mask(L, config.diffusion_block, ids.device)[0, 0]
    mask = torch.zeros(L, L).masked_fill(~may_attend, torch.finfo(torch.float32).min).expand(B, 1, -1, -1)
    x = weights["embed.weight"].read()[ids].float()
    for i in range(config.n_layer):
        state = {"self_attn.o_proj.bias": torch.zeros(config.d_model)} if has_both else {}
        for name, tensor in weights.items():
            if name.startswith(f"blocks.{i}."):
                name_in_block = huggingface.hf_name(name).removeprefix(f"model.layers.{i}.")
                state[name_in_block] = tensor.read().float()
        network.layers[0].load_state_dict(state)
        x = network(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state
    norm.weight.copy_(weights["norm.weight"].read())
    return norm(x) @ head_weight(config, weights).T


def megatron_logits(config, original, ids):
    """Logits straight from Megatron's whole tensors in their own layout, with one layer at a time in memory.

    original: {Megatron's name: LazyTensor}; ids (B, L) → (B, L, rows of the vocabulary) fp32.
    """
    c, rotation = config, rotations(config, ids.shape[1])

    def read(name):
        return original[name].read().float()

    x = read(megatron.EMBEDDING)[ids]
    for i in range(c.n_layer):
        attention, mlp = f"decoder.layers.{i}.self_attention.", f"decoder.layers.{i}.mlp."
        y = rms_norm(x, read(attention + "linear_qkv.layer_norm_weight"), c.norm_eps)
        qkv = y @ read(attention + "linear_qkv.weight").T
        if c.qkv_bias:
            qkv = qkv + read(attention + "linear_qkv.bias")
        qkv = qkv.view(*ids.shape, c.n_kv_head, -1, c.head_dim)  # each group: its queries, its key, its value
        q, k, v = qkv[..., :-2, :].flatten(2, 3), qkv[..., -2, :], qkv[..., -1, :]
        if c.qk_norm:
            q = rms_norm(q, read(attention + "q_layernorm.weight"), c.norm_eps)
            k = rms_norm(k, read(attention + "k_layernorm.weight"), c.norm_eps)
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = attend(c, q, k, v)
        x = x + y @ read(attention + "linear_proj.weight").T
        y = rms_norm(x, read(mlp + "linear_fc1.layer_norm_weight"), c.norm_eps)
        gate, up = (y @ read(mlp + "linear_fc1.weight").T).chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ read(mlp + "linear_fc2.weight").T
    head = megatron.EMBEDDING if c.tied else megatron.HEAD
    return rms_norm(x, read("decoder.final_layernorm.weight"), c.norm_eps) @ read(head).T


def gguf_logits(config, original, ids):
    """Logits straight from llama.cpp's tensors in their own layout, with one layer at a time in memory.

    original: {its name: LazyTensor}; ids (B, L) → (B, L, rows of the vocabulary) fp32. Of Llama, neighbouring
    components of queries and keys turn together.
    """
    c, rotation = config, rotations(config, ids.shape[1])
    is_llama = not (c.qk_norm or c.qkv_bias)

    def read(name):
        return original[name].read().float()

    x = read("token_embd.weight")[ids]
    for i in range(c.n_layer):
        y = rms_norm(x, read(f"blk.{i}.attn_norm.weight"), c.norm_eps)
        heads = []
        for name in ("attn_q", "attn_k", "attn_v"):
            part = y @ read(f"blk.{i}.{name}.weight").T
            if c.qkv_bias:
                part = part + read(f"blk.{i}.{name}.bias")
            part = part.unflatten(-1, (-1, c.head_dim))
            if c.qk_norm and name != "attn_v":
                part = rms_norm(part, read(f"blk.{i}.{name}_norm.weight"), c.norm_eps)
            heads.append(part)
        q, k, v = heads
        turn = rotate_neighbours if is_llama else rotate
        x = x + attend(c, turn(q, rotation), turn(k, rotation), v) @ read(f"blk.{i}.attn_output.weight").T
        y = rms_norm(x, read(f"blk.{i}.ffn_norm.weight"), c.norm_eps)
        gate, up = (y @ read(f"blk.{i}.ffn_{name}.weight").T for name in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ read(f"blk.{i}.ffn_down.weight").T
    head = "token_embd.weight" if c.tied else "output.weight"
    return rms_norm(x, read("output_norm.weight"), c.norm_eps) @ read(head).T


def rotations(config, length):
    """The complex numbers by which positions turn queries and keys: (L, 1, head_dim/2)."""
    c = config
    wavenumbers = torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
    frequencies = c.rope_base**-wavenumbers
    if c.rope_stretch:  # of Megatron's there is none
        factor, low, high, original = c.rope_stretch
        kept = ((original * frequencies / (2 * torch.pi) - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, None]


def attend(config, q, k, v):
    """Attention of q (B, L, heads, head_dim), k and v (B, L, heads for keys, head_dim) → (B, L, D)."""
    c, L = config, q.shape[1]
    is_hidden = torch.ones(L, L, dtype=torch.bool).triu(1) & c.causal
    k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / c.head_dim**0.5
    probs = scores.masked_fill(is_hidden, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probs, v).flatten(2)


def rms_norm(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def rotate(x, rotation):
    """Turn x (B, L, heads, head_dim) by complex numbers: a head's halves are real and imaginary parts."""
    z = torch.complex(*x.chunk(2, dim=-1)) * rotation
    return torch.cat((z.real, z.imag), dim=-1)


def rotate_neighbours(x, rotation):
    """As `rotate`: a head's even components are real, its odd ones imaginary parts."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotation
    return torch.view_as_real(z).flatten(-2)
