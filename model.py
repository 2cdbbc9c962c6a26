"""One Transformer for causal and bidirectional use: Qwen3's dense block (docs/math.md §1).

Pre-norm, RMSNorm, rotary positions (half rotation), QK-norm, SwiGLU, no biases. `Transformer.forward`
returns hidden states, so that the LM head and the loss can be fused over just the positions that count.
Weights that convert.py brings from elsewhere may lack the QK-norm (Llama) and have biases instead (Qwen2.5).
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import attention, block_causal_mask, block_diffusion_masks, document_mask, fp8_linear


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: all that is needed to build the network and to read its weights back."""

    n_layer: int
    n_head: int
    n_kv_head: int  # fewer than n_head: grouped-query attention
    head_dim: int
    d_model: int
    d_ff: int
    n_vocab: int  # text tokens; every id at or above it is excluded from the softmax
    mask_id: int
    seq_len: int  # longest sequence
    causal: bool
    tied: bool = True
    timed: bool = False  # continuous-time embedding, for uniform diffusion
    dropout: float = 0.0
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    scaled_init: bool = True  # residual outputs N(0, init_std/√(2·n_layer))
    local_init: bool = False  # heads start out looking at neighbouring positions
    qk_norm: bool = True
    qkv_bias: bool = False
    rope_stretch: tuple = ()  # Llama 3.1's: factor, low and high frequency factor, original length
    shift: bool = False  # position i is predicted from i − 1, as an AR model's would be (Dream, DiffuLLaMA)
    diffusion_block: int = 0  # tokens of a block, which sees itself and what precedes it; 0: sees everything

    def __post_init__(self):
        object.__setattr__(self, "rope_stretch", tuple(self.rope_stretch))  # JSON has lists only

    @property
    def padded_vocab(self):
        """Rows of the embedding: text and mask, rounded up to a multiple of 64."""
        return -(-(max(self.n_vocab, self.mask_id + 1)) // 64) * 64


class RMSNorm(nn.Module):
    """x / RMS(x) · weight, computed in fp32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * self.weight).to(x.dtype)


def rotate(x, cos, sin):
    """Turn the pairs (i, i + head_dim/2) by position·base^(−2i/head_dim). x (B, H, L, head_dim)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def joint_linear(x, *layers, fp8=False):
    """Compute several bias-free linear layers by one larger and faster product. (…, D) → (…, Σ out_features).

    The weights stay separate parameters (names and checkpoints of Qwen3); under autocast Inductor joins
    them while it casts them to bf16, which it has to do anyway.
    """
    weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
    return fp8_linear(x, weight) if fp8 else F.linear(x, weight)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions. x (B, L, D) → as x, or (C, D) at `index` (C,).

    Of fewer queries, the first `n_queries` of L, only these have results; the others' keys and values count.
    """

    fp8 = False  # set by `Transformer.use`

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.d_model, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.d_model, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask, index, cache=None, n_queries=None):
        B, c = len(x), self.c
        Q = n_queries or x.shape[1]
        q, k, v = self.project(x, Q)
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))  # (B, H, L, head_dim)
        q, k = rotate(q, cos[..., :Q, :], sin[..., :Q, :]), rotate(k, cos, sin)
        if cache is not None:
            y = grouped_attention(q, *cache.update(k, v), mask)
        else:
            if c.n_kv_head < c.n_head:
                k, v = (t.repeat_interleave(c.n_head // c.n_kv_head, dim=1) for t in (k, v))
            y = attention(q, k, v, mask, c.causal, c.dropout if self.training else 0.0)
        return joint_linear(pick(y.transpose(1, 2).reshape(B, Q, -1), index), self.o_proj, fp8=self.fp8)

    def project(self, x, n_queries):
        """Queries of the first n_queries positions, keys and values of all: (B, ·, heads, head_dim) each."""
        c = self.c
        heads, layers = (c.n_head, c.n_kv_head, c.n_kv_head), (self.q_proj, self.k_proj, self.v_proj)

        def joint(x, part):
            y = joint_linear(x, *layers[part], fp8=self.fp8)
            if c.qkv_bias:
                y = y + torch.cat([layer.bias for layer in layers[part]]).to(y.dtype)
            return y.unflatten(-1, (-1, c.head_dim)).split(heads[part], dim=2)

        if n_queries == x.shape[1]:
            return joint(x, slice(3))
        return *joint(x[:, :n_queries], slice(1)), *joint(x, slice(1, 3))


def grouped_attention(q, k, v, mask):
    """Attention where several heads share their keys and values, without copies of these.

    The heads that share them become more rows of one product. q (B, H, W, head_dim), k and v
    (B, H_kv, K, head_dim), mask (B or 1, 1, W or 1, K) or None → (B, H, W, head_dim).
    """
    B, H, W, head_dim = q.shape
    group = H // k.shape[1]
    if mask is not None and mask.shape[2] > 1:
        mask = mask.repeat(1, 1, group, 1)
    return attention(q.reshape(B, -1, group * W, head_dim), k, v, mask, False, 0.0).view(B, H, W, head_dim)


class KVCache:
    """Keys and values of every layer at every column, so that a pass computes only some columns anew.

    A causal network loses nothing by it. In a bidirectional one all positions depend on each other: keys
    that a pass does not compute are as old as the pass that stored them, and the decoder decides when to
    compute all of them again.
    """

    def __init__(self, config, batch, length, device, dtype=torch.float32):
        c = config
        # one extra column that is never read: masked-out writes go there
        shape = c.n_layer, batch, c.n_kv_head, length + 1, c.head_dim
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = length

    def layers(self, columns, n_keys):
        """The LayerCaches of a pass that stores at `columns` (B, W) and sees the first `n_keys` columns."""
        return [LayerCache(*layer, columns, n_keys) for layer in zip(self.keys, self.values)]


class LayerCache:
    """One layer's keys and values (B, n_kv_head, length + 1, head_dim) during one pass."""

    def __init__(self, keys, values, columns, n_keys):
        self.keys, self.values, self.columns, self.n_keys = keys, values, columns, n_keys

    def update(self, k, v):
        """Store k and v (B, n_kv_head, W, head_dim); return the first n_keys keys and values, typed alike."""
        columns = self.columns[:, None, :, None].expand_as(k)
        keys = self.keys.scatter_(2, columns, k.to(self.keys.dtype))
        values = self.values.scatter_(2, columns, v.to(self.values.dtype))
        return keys[:, :, : self.n_keys].to(k.dtype), values[:, :, : self.n_keys].to(v.dtype)


def pick(x, index):
    """Pick the positions `index` (C,) of a flattened batch (None: all of it). (B, L, D) → (C, D)."""
    return x if index is None else x.flatten(0, 1).index_select(0, index)


def predecessors(index, length, documents):
    """The positions before `index` (C,) in a flattened batch of rows of `length`. → (C,)

    The first position of a row or document stays itself. documents (B, L) ids, or None.
    """
    before = torch.where(index % length == 0, index, index - 1)
    if documents is None:
        return before
    document = documents.flatten()
    return torch.where(document[before] == document[index], before, index)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x))·up(x))."""

    fp8 = False  # set by `Transformer.use`

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.up_proj = nn.Linear(c.d_model, c.d_ff, bias=False)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x):
        gate, up = joint_linear(x, self.gate_proj, self.up_proj, fp8=self.fp8).chunk(2, dim=-1)
        return joint_linear(F.silu(gate) * up, self.down_proj, fp8=self.fp8)


def save_products(gate_and_up):
    """Make the contexts for `checkpoint` that save the results of attention and matrix products.

    Those of gate and up are almost half of that, and saved only with `gate_and_up`: per byte they are no
    dearer to compute again than the others.
    """

    def policy(ctx, op, *args, **kwargs):
        name = getattr(op, "__name__", str(op))
        is_product = name.startswith(("mm.", "bmm.", "_scaled_mm."))
        is_wide = is_product and args[1].numel() > 4 * args[0].shape[-1] ** 2  # gate and up together
        if is_wide and not gate_and_up:
            return CheckpointPolicy.PREFER_RECOMPUTE
        is_saved = is_product or "_scaled_dot_product" in name or "flex_attention" in name
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


RECOMPUTE = {  # options of `checkpoint`
    "elementwise": dict(context_fn=functools.partial(save_products, gate_and_up=True)),
    "selective": dict(context_fn=functools.partial(save_products, gate_and_up=False)),
    "full": {},
}


class Block(nn.Module):
    """Attention and MLP, each after a norm, added to x (B, L, D) → as x, or (C, D) at `index` (C,).

    With n_queries of the first so many positions alone; the others are there to be seen.
    """

    recompute = "no"  # set by `Transformer.use`

    def __init__(self, c):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.d_model, c.norm_eps), Attention(c)
        self.mlp_norm, self.mlp = RMSNorm(c.d_model, c.norm_eps), MLP(c)
        self.drop = nn.Dropout(c.dropout)

    def forward(self, x, cos, sin, mask, index=None, cache=None, n_queries=None):
        arguments = x, cos, sin, mask, index, cache, n_queries
        if self.recompute == "no" or not torch.is_grad_enabled():
            return self.compute(*arguments)
        return checkpoint(self.compute, *arguments, use_reentrant=False, **RECOMPUTE[self.recompute])

    def compute(self, x, cos, sin, mask, index, cache, n_queries):
        residual = pick(x if n_queries is None else x[:, :n_queries], index)
        x = residual + self.drop(self.attn(self.attn_norm(x), cos, sin, mask, index, cache, n_queries))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


class TimeEmbedding(nn.Module):
    """Embed t ∈ [0, 1] by sinusoidal features and a two-layer MLP. (B, n) → (B, n, D)."""

    def __init__(self, d_model, features=256):
        super().__init__()
        self.features = features
        self.up, self.down = nn.Linear(features, d_model, bias=False), nn.Linear(d_model, d_model, bias=False)

    def forward(self, t):
        half = torch.arange(self.features // 2, device=t.device, dtype=torch.float32)
        angle = 1000 * t[..., None].float() * torch.exp(-math.log(10_000) * half / len(half))
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(features)))


def shard_like(values, parameter):
    """The values on the parameter's device; if that is sharded over ranks, this rank's share of them."""
    values = values.to(parameter.device)
    if not hasattr(parameter, "placements"):  # no DTensor, a type that takes seconds to import
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(values, mesh, placements, src_data_rank=None)  # None: no communication


class Transformer(nn.Module):
    """Token ids to hidden states; `head` is the LM head's weight (the embedding itself if tied)."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        # without Embedding's own initial values: on the meta device they import the compiler, two seconds
        self.embed = nn.Embedding.from_pretrained(torch.empty(c.padded_vocab, c.d_model), freeze=False)
        self.time = TimeEmbedding(c.d_model) if c.timed else None
        self.drop = nn.Dropout(c.dropout)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.lm_head = None if c.tied else nn.Linear(c.d_model, c.padded_vocab, bias=False)
        for name in ("cos", "sin"):
            table = torch.empty(c.seq_len, c.head_dim // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.init_tables()

    def init_tables(self):
        """Fill the rotary tables, (L, head_dim/2) each. Returns self.

        A network that began on the meta device has none yet.
        """
        c = self.config
        even = torch.arange(0, c.head_dim, 2, dtype=torch.float64, device="cpu")
        frequency = c.rope_base ** (-even / c.head_dim)
        if c.rope_stretch:
            # waves that turn less than `low` times in the original length become `factor` times longer, those
            # that turn more than `high` times stay
            factor, low, high, length = c.rope_stretch
            kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            frequency = kept * frequency + (1 - kept) * frequency / factor
        angle = torch.arange(c.seq_len, dtype=torch.float64, device="cpu")[:, None] * frequency
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())
        return self

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Draw weights: N(0, init_std), residual outputs smaller, norms 1, biases 0; then `local_init`.

        Returns self. Drawn on the CPU, whole parameter by whole parameter: the same on every device and
        however the network is sharded, and never more than one parameter whole on a rank that holds shards.
        """
        c = self.config
        for name, p in self.named_parameters():
            if p.dim() == 1:
                p.fill_(0 if name.endswith("bias") else 1)
            else:
                residual = c.scaled_init and name.endswith(("o_proj.weight", "down_proj.weight"))
                std = c.init_std / math.sqrt(2 * c.n_layer) if residual else c.init_std
                values = torch.empty(p.shape, device="cpu").normal_(std=std, generator=generator)
                p.copy_(shard_like(values, p))
        if c.local_init:
            self.point_heads_at_neighbours(generator)
        return self

    def point_heads_at_neighbours(self, generator=None):
        """Let head h begin by attending to one relative position: −1, +1, −2, +2, … or, causal, −1, −2, …

        A masked position learns nothing from itself; until some head finds the neighbours, a bidirectional
        model stays at unigram statistics, and from N(0, σ) small models stay there for a long time. So every
        embedding gets a common direction s, and q and k map s to vectors whose rotary score
        Σ_j cos(ω_j(p′ − p) − ω_j·offset) peaks at p′ − p = offset. Only initial values change.
        """
        c = self.config
        size = c.init_std * math.sqrt(c.d_model)
        shared = F.normalize(torch.randn(c.d_model, generator=generator), dim=0)
        self.embed.weight += shard_like((size * shared).expand(c.padded_vocab, -1), self.embed.weight)
        head = torch.arange(c.n_head)
        looks_back = c.causal or c.diffusion_block == 1
        offset = -(head + 1) if looks_back else (head // 2 + 1) * (2 * (head % 2) - 1)
        frequency = c.rope_base ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        near = (frequency > 1 / 32).float()  # slower waves can't tell neighbours apart
        angle = offset[:, None] * frequency
        q = torch.cat((near * angle.cos(), near * angle.sin()), dim=1).flatten()
        k = torch.cat((near, 0 * near)).repeat(c.n_kv_head)
        for block in self.blocks:
            block.attn.q_proj.weight += shard_like(size * torch.outer(q, shared), block.attn.q_proj.weight)
            block.attn.k_proj.weight += shard_like(size * torch.outer(k, shared), block.attn.k_proj.weight)
            if c.qk_norm:
                block.attn.q_norm.weight.fill_(1.7)  # sharper than QK-norm's plain unit scale allows
                block.attn.k_norm.weight.fill_(1.7)

    @property
    def head(self):
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(self, ids, t=None, documents=None, index=None, positions=None, visible=None, clean=None):
        """Hidden states after the last norm: (B, L, D), or (C, D) at `index` (C,) of the flattened batch.

        ids (B, L); t (B, M) where timed, a time for each block; documents (B, L) ids: attention stays within
        equal ones; positions (B, L) if not 0 … L − 1; visible (L, L) bool: what each position (row) attends
        to, if not what the network always does; clean (B, L): of block diffusion, the tokens that later
        blocks see in place of ids. With `index` only these positions are computed after the last attention.
        A shifted network's states are those that predict the positions.
        """
        L, all_positions = ids.shape[1], index is None
        if self.config.shift:
            if all_positions:
                index = torch.arange(ids.numel(), device=ids.device)
            index = predecessors(index, L, documents)
        x = self.embed_ids(ids, t)
        cos, sin = self.rotary(L, positions)
        if clean is None:
            x = self.run_blocks(x, cos, sin, self.attention_mask(documents, visible, L, ids.device), index)
        else:  # one pass over both, [z | x]
            no_noise = None if t is None else torch.zeros_like(t[:, :1])
            x = torch.cat((x, self.embed_ids(clean, no_noise)), dim=1)
            cos, sin = (torch.cat((table, table), dim=-2) for table in (cos, sin))
            dropout = self.config.dropout if self.training else 0.0
            masks = block_diffusion_masks(
                L, self.config.diffusion_block, ids.device, documents, dropout, L == self.config.seq_len)
            x = self.run_blocks(x, cos, sin, masks[0], index, last_mask=masks[1], n_queries=L)
        return x.view(*ids.shape, -1) if all_positions else x

    def forward_cached(self, ids, cache, columns, is_stored=None, index=None, positions=None, is_token=None,
                       n_keys=None, t=None, block_numbers=None):
        """Hidden states of `columns` (B, W), which hold ids (B, W), as `forward` returns them.

        Keys and values of all other columns come from the KVCache `cache`. is_stored (B, W): whose keys and
        values are stored in it (None: all). index as in `forward`; positions (B, W) if they are not the
        columns; is_token (B, L): False where a column is padding (None: nowhere). n_keys: how many columns
        are seen, from the first on (None: all); a causal network sees none after its own anyway. Of block
        diffusion, block_numbers (B, L): the block that each column is in; none sees a later one. t (B, W)
        where timed.
        """
        n_keys = n_keys or cache.length
        x = self.embed_ids(ids, t)
        cos, sin = self.rotary(n_keys, columns if positions is None else positions)
        key, query, mask = torch.arange(n_keys, device=ids.device), columns[:, None, :, None], None
        if is_token is not None:  # padding sees itself, so that no row is without a key
            mask = is_token[:, None, None, :n_keys] | (key == query)
        if self.config.causal and (columns.shape[1] > 1 or n_keys == cache.length):
            is_past = key <= query  # (B, 1, W, n_keys)
            mask = is_past if mask is None else mask & is_past
        if block_numbers is not None:
            own = block_numbers.gather(1, columns)[:, None, :, None]
            is_past = block_numbers[:, None, None, :n_keys] <= own
            mask = is_past if mask is None else mask & is_past
        stored_at = columns if is_stored is None else torch.where(is_stored, columns, cache.length)
        return self.run_blocks(x, cos, sin, mask, index, cache.layers(stored_at, n_keys))

    def embed_ids(self, ids, t=None):
        """The residual stream before the first block. ids (B, L), t (B, 1, M or L) → (B, L, D)."""
        x = self.embed(ids)
        if self.time is not None:
            time = self.time(t).to(x.dtype)
            if 1 < time.shape[1] < ids.shape[1]:
                time = time.repeat_interleave(self.config.diffusion_block, dim=1)[:, : ids.shape[1]]
            x = x + time
        if torch.is_autocast_enabled(x.device.type):  # in bf16, too: half the traffic (Megatron's way)
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self.drop(x)

    def rotary(self, length, positions):
        """The cos and sin that `rotate` takes, at positions (B, L), or for None at 0 … length − 1."""
        if positions is None:
            return self.cos[:length], self.sin[:length]
        return self.cos[positions][:, None], self.sin[positions][:, None]  # (B, 1, L, head_dim/2)

    def attention_mask(self, documents, visible, length, device):
        """The mask for `attention`; None where the network's own, causal or full, is enough."""
        c = self.config
        if c.diffusion_block and visible is None:
            visible = block_causal_mask(length, c.diffusion_block, device)[0, 0]
        if documents is None:
            return None if visible is None else visible[None, None]
        if visible is None:
            return document_mask(documents, c.causal, c.dropout if self.training else 0.0)
        return visible & (documents[:, :, None] == documents[:, None, :])[:, None]

    def run_blocks(self, x, cos, sin, mask, index, caches=None, last_mask=None, n_queries=None):
        """All blocks and the last norm; the last block computes only `index` after its attention.

        With last_mask and n_queries its attention has only so many queries.
        """
        caches = caches or [None] * len(self.blocks)
        for block, cache in zip(self.blocks[:-1], caches):
            x = block(x, cos, sin, mask, cache=cache)
        last_mask = mask if last_mask is None else last_mask
        return self.norm(self.blocks[-1](x, cos, sin, last_mask, index, caches[-1], n_queries))

    def use(self, recompute="no", fp8=False):
        """Choose how to train. Returns self.

        recompute: what the backward pass computes again to save memory: no; elementwise (all but attention
        and matrix products); selective (gate and up, too); full (the blocks). fp8: whether blocks multiply
        in 8 bits.
        """
        for block in self.blocks:
            block.recompute = recompute
            block.attn.fp8 = block.mlp.fp8 = fp8
        return self

    def logits(self, hidden):
        """Compute logits over the text tokens, in fp32. hidden (…, D) → (…, n_vocab)."""
        return F.linear(hidden, self.head[: self.config.n_vocab]).float()

    def n_params(self, embeddings=True):
        """Count parameters; without `embeddings`, neither the embedding nor an untied head."""
        total = sum(p.numel() for p in self.parameters())
        if embeddings:
            return total
        matrices = 1 if self.lm_head is None else 2
        return total - matrices * self.config.padded_vocab * self.config.d_model

    def flops_per_token(self, share=1.0, causal=None):
        """Count training FLOPs, forward and backward, per token of a full row, of what is really computed.

        6 per weight of a matrix product and attention's two L×L products, of which `causal` (default: the
        model's own) counts half; what follows the last attention, for `share` of the tokens only.
        """
        c = self.config
        causal = c.causal if causal is None else causal
        matrices = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        last = self.blocks[-1]
        picked = sum(p.numel() for p in (last.attn.o_proj.weight, *last.mlp.parameters()))
        full, pairs = matrices - picked, c.n_layer * c.seq_len * (0.5 if causal else 1)
        if c.diffusion_block:  # rows are [z | x], but for the last block's queries
            full = 2 * full - last.attn.q_proj.weight.numel()
            pairs = (c.n_layer - 0.5) * (c.seq_len + c.diffusion_block)
        attention = 12 * c.n_head * c.head_dim * pairs
        return 6 * (full + share * (picked + c.padded_vocab * c.d_model)) + attention
