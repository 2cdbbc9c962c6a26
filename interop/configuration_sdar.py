"""The configuration of an SDAR model, for servers that bring their own network. Written by nanoquokka.

    python3 -m sglang.launch_server --model-path FOLDER --trust-remote-code --dllm-algorithm LowConfidence
"""

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """Qwen3's settings, as attributes under the names that servers read, with the block and the mask."""

    model_type = "sdar"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self, vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, hidden_act="silu",
        max_position_embeddings=32768, initializer_range=0.02, rms_norm_eps=1e-6, use_cache=True,
        rope_theta=1000000.0, rope_scaling=None, attention_bias=False, use_sliding_window=False,
        sliding_window=None, attention_dropout=0.0, tie_word_embeddings=False, block_size=4,
        mask_token_id=151669, **others,
    ):
        theta = (others.pop("rope_parameters", None) or {}).get("rope_theta")  # where transformers 5 puts it
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.rope_theta = rope_theta if theta is None else theta
        self.rope_scaling = rope_scaling
        self.attention_bias = attention_bias
        self.use_sliding_window = use_sliding_window
        self.sliding_window = sliding_window
        self.attention_dropout = attention_dropout
        self.block_size = block_size
        self.mask_token_id = mask_token_id
