"""A masked-diffusion language model for transformers: load it with AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).

    out = model.generate(**tokenizer(["The "], return_tensors="pt"), max_new_tokens=64, sample_steps=64)

The network is Qwen3's dense block with bidirectional attention: RMSNorm, rotary positions, SwiGLU; QK-norm, biases of query, key and
value, and predictions shifted by one position as config.json says. This file stands alone and was written by nanoquokka's convert.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class DiffLMConfig(PretrainedConfig):
    model_type = "nanoquokka"

    def __init__(self, vocab_size=50304, text_tokens=None, mask_token_id=50257, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
                 num_attention_heads=12, num_key_value_heads=None, head_dim=None, max_position_embeddings=2048, rms_norm_eps=1e-6,
                 rope_theta=10000.0, rope_stretch=None, qk_norm=True, qkv_bias=False, shift=False, attn_mask_type="bidirectional",
                 tie_word_embeddings=True, initializer_range=0.02, **more):
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.text_tokens = text_tokens or mask_token_id  # ids from here on are never predicted
        self.hidden_size, self.intermediate_size, self.num_hidden_layers = hidden_size, intermediate_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings, self.rms_norm_eps = max_position_embeddings, rms_norm_eps
        theta = (more.pop("rope_parameters", None) or {}).get("rope_theta")
        self.rope_theta, self.rope_stretch = rope_theta if theta is None else theta, rope_stretch  # Llama 3.1's: factor, low, high, length
        self.qk_norm, self.qkv_bias, self.shift, self.attn_mask_type = qk_norm, qkv_bias, shift, attn_mask_type
        self.initializer_range = initializer_range
        super().__init__(tie_word_embeddings=tie_word_embeddings, **more)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rotate(x, cos, sin):
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
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps), RMSNorm(c.head_dim, c.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, mask):
        B, L, _ = x.shape
        q, k, v = (part.view(B, L, -1, self.head_dim) for part in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k, v = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2), v.transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
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
        self.input_layernorm, self.self_attn = RMSNorm(c.hidden_size, c.rms_norm_eps), Attention(c)
        self.post_attention_layernorm, self.mlp = RMSNorm(c.hidden_size, c.rms_norm_eps), MLP(c)

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
            raise ValueError(f"attn_mask_type={config.attn_mask_type}: only bidirectional models are diffusion models")
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
        frequency = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64, device="cpu") / c.head_dim)
        if c.rope_stretch:
            factor, low, high, length = c.rope_stretch
            kept = ((length * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
            frequency = kept * frequency + (1 - kept) * frequency / factor
        angle = position_ids[..., None].double().cpu() * frequency
        return angle.cos().float().to(position_ids.device)[:, None], angle.sin().float().to(position_ids.device)[:, None]

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, labels=None, return_dict=None, **ignored):
        """Logits (B, L, vocab_size) of what stands at each position; ids that are no text have −inf. attention_mask (B, L): 0 is padding.
        labels (B, L): the loss is their mean cross-entropy, −100 is left out."""
        x = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, L, _ = x.shape
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(L, device=x.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        cos, sin = self.angles(position_ids)
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            real = attention_mask.bool()
            mask = (real[:, None, :] == real[:, :, None])[:, None]  # padding sees padding: no row without a key
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        x = self.model.norm(x)
        if self.config.shift:  # a position is predicted from the one before it; the first from itself
            first = torch.zeros(B, L, dtype=torch.bool, device=x.device)
            first[:, 0] = True
            if attention_mask is not None:
                first[:, 1:] = attention_mask[:, 1:] != attention_mask[:, :-1]
            x = torch.where(first[..., None], x, torch.cat((x[:, :1], x[:, :-1]), dim=1))
        logits = self.lm_head(x).float()
        logits[..., self.config.text_tokens :] = float("-inf")
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100) if labels is not None else None
        return MaskedLMOutput(loss=loss, logits=logits) if return_dict is not False else ((loss, logits) if labels is not None else (logits,))

    @torch.no_grad()
    def generate(self, inputs=None, input_ids=None, attention_mask=None, generation_config=None, max_new_tokens=None, max_length=None, sample_steps=None,
                 inference_block_size=None, temperature=None, top_p=None, top_k=None, cfg=0.0, remasking="low_confidence", verbose=False, generator=None, **more):
        """Write max_new_tokens after each prompt, in blocks from left to right, `sample_steps` denoising steps in all.

        remasking: low_confidence writes at each step what the model is surest of, random writes anywhere. temperature 0 takes the
        likeliest token. cfg = w: un + (w + 1)·(cond − un), un with the prompt masked. attention_mask (B, L): 0 is padding, on the left.
        Returns ids (B, L + max_new_tokens).
        """
        ignored = {"use_cache", "pad_token_id", "eos_token_id", "do_sample", "return_dict_in_generate", "tokenizer", "token_type_ids", "synced_gpus"}
        if wrong := set(more) - ignored:
            raise TypeError(f"generate does not know {', '.join(sorted(wrong))}")
        given = generation_config or getattr(self, "generation_config", None)
        temperature = getattr(given, "temperature", None) if temperature is None else temperature
        temperature = 1.0 if temperature is None else temperature
        prompt = input_ids if input_ids is not None else inputs
        mask_id = self.config.mask_token_id
        if prompt is None:
            prompt = torch.empty(1, 0, dtype=torch.long, device=self.device)
        B, L = prompt.shape
        limit = max_length or getattr(given, "max_length", None) if generation_config else max_length
        new = getattr(generation_config, "max_new_tokens", None) if max_new_tokens is None else max_new_tokens
        new = (limit or self.config.max_position_embeddings) - L if new is None else new
        block = new if inference_block_size is None else inference_block_size
        if new < 1 or block < 1 or L + new > self.config.max_position_embeddings:
            raise ValueError(f"{L} + {new} tokens do not fit into {self.config.max_position_embeddings}")
        if new % block:
            raise ValueError(f"max_new_tokens={new} must be a multiple of inference_block_size={block}")
        steps = new if sample_steps is None else sample_steps
        if steps < 1 or steps % (new // block):
            raise ValueError(f"sample_steps={steps} must be a multiple of the {new // block} blocks")
        if remasking not in ("low_confidence", "random"):
            raise ValueError(f"remasking={remasking}: choose low_confidence or random")
        steps = min(steps // (new // block), block)
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (0, new), value=1)
        x = torch.cat((prompt, prompt.new_full((B, new), mask_id)), dim=1)
        known = F.pad(torch.ones_like(prompt, dtype=torch.bool), (0, new))  # the prompt
        if attention_mask is not None:
            known &= attention_mask.bool()
        for start in range(L, L + new, block):
            here = slice(start, start + block)
            for step in range(steps):
                count = block // steps + (step < block % steps)
                logits = self(x, attention_mask=attention_mask).logits[:, here]
                if cfg:
                    without = self(torch.where(known, mask_id, x), attention_mask=attention_mask).logits[:, here]
                    logits = torch.where(logits == float("-inf"), logits, without + (cfg + 1) * (logits - without))
                open_ = x[:, here] == mask_id
                sure, token = logits.double().softmax(-1).max(-1)
                if temperature:
                    token = draw(logits, temperature, top_p, top_k, generator)
                    sure = logits.double().softmax(-1).gather(-1, token[..., None])[..., 0]
                if remasking == "random":
                    sure = torch.rand(sure.shape, device=sure.device, generator=generator)
                chosen = sure.masked_fill(~open_, float("-inf")).topk(count, dim=-1).indices
                part = x[:, here]
                part.scatter_(1, chosen, token.gather(1, chosen))  # a view: x itself changes
                if verbose:
                    print(f"block {(start - L) // block + 1}/{new // block}, step {step + 1}/{steps}: {int((x == mask_id).sum())} masks left", flush=True)
        return x


def draw(logits, temperature, top_p, top_k, generator):
    """Tokens from the softmax at a temperature, of the likeliest top_k or top_p only. Exact: drawn in float64 from the running sum. (B, L, V) → (B, L)."""
    probs = (logits.double() / temperature).softmax(-1)
    ordered, ids = probs.sort(-1, descending=True)
    if top_k:
        ordered[..., top_k:] = 0
    if top_p is not None and top_p < 1:
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # the token that crosses stays
    total = ordered.cumsum(-1)
    u = torch.rand(total.shape[:-1], dtype=torch.float64, device=total.device, generator=generator)[..., None] * total[..., -1:]
    at = torch.searchsorted(total, u, right=True).clamp(max=total.shape[-1] - 1)
    return ids.gather(-1, at)[..., 0]
