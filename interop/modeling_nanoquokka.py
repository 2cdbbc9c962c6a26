"""A masked-diffusion language model for transformers.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(["The "], return_tensors="pt", padding_side="left", padding=True)
    ids = model.generate(**inputs, max_new_tokens=64, sample_steps=64)

The network is Qwen3's dense block with bidirectional attention: RMSNorm, rotary positions, SwiGLU; QK-norm,
biases of query, key and value, predictions shifted by one position, and blocks that see themselves and what
precedes them as config.json says. This file stands alone; it was written by nanoquokka's convert.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class DiffLMConfig(PretrainedConfig):
    """The architecture, under Qwen's names where it has them.

    text_tokens: ids from here on are never predicted. rope_stretch: Llama 3.1's factor, low and high
    frequency factor, and original length. diffusion_block: tokens of a block of block diffusion, 0: none.
    """

    model_type = "nanoquokka"

    def __init__(
        self, vocab_size=50304, text_tokens=None, mask_token_id=50257, hidden_size=768,
        intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=None,
        head_dim=None, max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10000.0, rope_stretch=None,
        qk_norm=True, qkv_bias=False, shift=False, attn_mask_type="bidirectional", tie_word_embeddings=True,
        initializer_range=0.02, diffusion_block=0, **others,
    ):
        self.vocab_size = vocab_size
        self.text_tokens = text_tokens or mask_token_id
        self.mask_token_id = mask_token_id
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        theta = (others.pop("rope_parameters", None) or {}).get("rope_theta")  # where transformers 5 puts it
        self.rope_theta = rope_theta if theta is None else theta
        self.rope_stretch = rope_stretch
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.shift = shift
        self.attn_mask_type = attn_mask_type
        self.diffusion_block = diffusion_block
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary positions, half rotation; x (B, H, L, head_dim)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, self.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, self.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(self.heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask):
        B, L, _ = x.shape
        q, k, v = (y.view(B, L, -1, self.head_dim) for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class DiffLM(PreTrainedModel):
    config_class = DiffLMConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = True
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        if config.attn_mask_type != "bidirectional":
            raise ValueError(f"attn_mask_type={config.attn_mask_type}: diffusion models are bidirectional")
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def angles(self, position_ids):
        """cos and sin, (B or 1, 1, L, head_dim/2) each."""
        c = self.config
        exponents = torch.arange(0, c.head_dim, 2, dtype=torch.float64, device="cpu") / c.head_dim
        frequency = c.rope_theta**-exponents
        if c.rope_stretch:
            factor, low, high, length = c.rope_stretch
            kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            frequency = kept * frequency + (1 - kept) * frequency / factor
        angle = position_ids[..., None].double().cpu() * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        return cos.to(position_ids.device)[:, None], sin.to(position_ids.device)[:, None]

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None,
        return_dict=None, **ignored,
    ):
        """Logits (B, L, vocab_size) of the token at each position; −inf for ids that are no text.

        attention_mask (B, L): 0 is padding. labels (B, L): the loss is their mean cross-entropy, without
        those that are −100; blocks see earlier ones as input_ids has them, masks and all.
        """
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None and attention_mask is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        elif position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        cos, sin = self.angles(position_ids)
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            is_text = attention_mask.bool()
            # padding sees padding: a row without any key would become NaN
            mask = (is_text[:, None, :] == is_text[:, :, None])[:, None]
        if self.config.diffusion_block:
            number = position_ids // self.config.diffusion_block
            is_past = (number[:, None, :] <= number[:, :, None])[:, None]
            mask = is_past if mask is None else mask & is_past
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        x = self.model.norm(x)
        if self.config.shift:
            x = shift_states(x, attention_mask)
        logits = self.lm_head(x).float()
        logits[..., self.config.text_tokens :] = float("-inf")
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        if return_dict is not False:
            return MaskedLMOutput(loss=loss, logits=logits)
        return (logits,) if loss is None else (loss, logits)

    @torch.no_grad()
    def generate(
        self, inputs=None, input_ids=None, attention_mask=None, generation_config=None, max_new_tokens=None,
        max_length=None, sample_steps=None, inference_block_size=None, temperature=None, top_p=None,
        top_k=None, cfg=0.0, remasking="low_confidence", verbose=False, generator=None, **others,
    ):
        """Write max_new_tokens after each prompt, in blocks from left to right, in sample_steps steps in all.

        A model of block diffusion has blocks of its own, which begin with the prompt's first token.
        remasking: low_confidence writes at each step the likeliest tokens, random writes anywhere.
        temperature: 0 takes the likeliest token of a position. cfg = w: un + (w + 1)·(cond − un), un with the
        prompt masked. attention_mask (B, L): 0 is padding, on the left. Returns ids (B, L + max_new_tokens).
        """
        ignored = {"use_cache", "pad_token_id", "eos_token_id", "do_sample", "return_dict_in_generate",
                   "tokenizer", "token_type_ids", "synced_gpus"}
        unknown = set(others) - ignored
        if unknown:
            raise TypeError(f"generate does not know {', '.join(sorted(unknown))}")
        if remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking={remasking}: choose low_confidence or random")
        defaults = generation_config or getattr(self, "generation_config", None)
        if temperature is None:
            temperature = getattr(defaults, "temperature", None)
        temperature = 1.0 if temperature is None else temperature
        prompt = input_ids if input_ids is not None else inputs
        if prompt is None:
            prompt = torch.empty(1, 0, dtype=torch.long, device=self.device)
        B, L = prompt.shape
        n_new = self.n_new_tokens(L, max_new_tokens, max_length, generation_config)
        if self.config.diffusion_block and inference_block_size is not None:
            raise ValueError(f"the model has blocks of its own, {self.config.diffusion_block} tokens each; "
                             "leave inference_block_size out")

        mask_id = self.config.mask_token_id
        x = torch.cat((prompt, prompt.new_full((B, n_new), mask_id)), dim=1)
        is_prompt = F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, n_new))
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, n_new), value=1)
            is_prompt &= attention_mask.bool()
        if self.config.diffusion_block:
            n_prompt = is_prompt[:, :L].sum(1, keepdim=True)
            steps = own_blocks(n_prompt, n_new, self.config.diffusion_block, sample_steps)
        else:
            steps = equal_blocks(n_new, inference_block_size, sample_steps)
        place = torch.arange(n_new, device=x.device)  # among the new tokens
        for first, last, counts in steps:
            is_open = (place >= first) & (place < last) & (x[:, L:] == mask_id)  # (B or 1, n_new)
            columns = is_open.any(0).nonzero()
            if not len(columns):
                continue
            window = slice(L + int(columns[0]), L + int(columns[-1]) + 1)
            is_open = is_open[:, window.start - L : window.stop - L]
            logits = self(x, attention_mask=attention_mask).logits[:, window]
            if cfg:
                without_prompt = torch.where(is_prompt, mask_id, x)
                unconditional = self(without_prompt, attention_mask=attention_mask).logits[:, window]
                guided = unconditional + (cfg + 1) * (logits - unconditional)
                logits = torch.where(logits == float("-inf"), logits, guided)
            probs = logits.double().softmax(-1)
            confidence, tokens = probs.max(-1)
            if temperature:
                tokens = draw(logits, temperature, top_p, top_k, generator)
                confidence = probs.gather(-1, tokens[..., None])[..., 0]
            if remasking == "random":
                confidence = torch.rand(confidence.shape, device=confidence.device, generator=generator)
            confidence = confidence.masked_fill(~is_open, float("-inf"))
            rank = confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            chosen = is_open & (rank < counts)
            x[:, window] = torch.where(chosen, tokens, x[:, window])
            if verbose:
                print(f"{int((x == mask_id).sum())} masks left", flush=True)
        return x

    def n_new_tokens(self, n_prompt, max_new_tokens, max_length, generation_config):
        """How many tokens `generate` writes; raises ValueError where they don't fit."""
        longest = self.config.max_position_embeddings
        if generation_config:
            max_length = max_length or getattr(generation_config, "max_length", None)
            if max_new_tokens is None:
                max_new_tokens = getattr(generation_config, "max_new_tokens", None)
        n_new = (max_length or longest) - n_prompt if max_new_tokens is None else max_new_tokens
        if n_new < 1 or n_prompt + n_new > longest:
            raise ValueError(f"{n_prompt} + {n_new} tokens do not fit into {longest}")
        return n_new


def equal_blocks(n_new, block, sample_steps):
    """Yield (first, last, tokens to write) for each step of `generate` in equal blocks; raises ValueError.

    first and last: what new tokens its block has, counted from 0.
    """
    block = n_new if block is None else block
    if block < 1 or n_new % block:
        raise ValueError(f"max_new_tokens={n_new} must be a multiple of inference_block_size={block}")
    n_blocks = n_new // block
    steps = n_new if sample_steps is None else sample_steps
    if steps < 1 or steps % n_blocks:
        raise ValueError(f"sample_steps={steps} must be a multiple of the {n_blocks} blocks")
    steps = min(steps // n_blocks, block)
    for first in range(0, n_new, block):
        for step in range(steps):
            yield first, first + block, block // steps + (step < block % steps)


def own_blocks(n_prompt, n_new, block, sample_steps):
    """`equal_blocks` of block diffusion, for prompts of n_prompt (B, 1) tokens: each row has its own borders.

    A row's steps are spread over its blocks by their new tokens.
    """
    steps = n_new if sample_steps is None else sample_steps
    if steps < 1:
        raise ValueError(f"sample_steps={steps} must be at least 1")
    first, last = torch.zeros_like(n_prompt), block - n_prompt % block  # (B, 1)
    while bool((first < n_new).any()):
        last = last.clamp(max=n_new)
        n = last - first
        before, after = ((steps * border / n_new).round().long() for border in (first, last))
        own_steps = torch.minimum((after - before).clamp(min=1), n)
        for step in range(int(own_steps.max())):
            own = own_steps.clamp(min=1)
            yield first, last, (n // own + (step < n % own)) * (step < own_steps)
        first, last = last, last + block


def shift_states(x, attention_mask):
    """The state that predicts each position: that of the position before it; the first has but its own."""
    is_first = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    is_first[:, 0] = True
    if attention_mask is not None:
        is_first[:, 1:] = attention_mask[:, 1:] != attention_mask[:, :-1]
    return torch.where(is_first[..., None], x, torch.cat((x[:, :1], x[:, :-1]), dim=1))


def draw(logits, temperature, top_p, top_k, generator):
    """Draw tokens from the softmax at a temperature, among the likeliest top_k or top_p; (B, L, V) → (B, L).

    Exact: drawn in float64 from the running sum.
    """
    probs = (logits.double() / temperature).softmax(-1)
    probs, ids = probs.sort(-1, descending=True)
    if top_k:
        probs[..., top_k:] = 0
    if top_p is not None and top_p < 1:
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0)  # the token that crosses top_p stays
    total = probs.cumsum(-1)
    u = torch.rand(total.shape[:-1], dtype=torch.float64, device=total.device, generator=generator)
    i = torch.searchsorted(total, u[..., None] * total[..., -1:], right=True).clamp(max=total.shape[-1] - 1)
    return ids.gather(-1, i)[..., 0]
