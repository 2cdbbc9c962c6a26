"""Hugging Face's model folders: Qwen3, Qwen2.5 and Llama, the seeds' DiffLM, LLaDA and Dream are read; Qwen3 and DiffLM are written.

    config.json                               the architecture
    model.safetensors, or several with model.safetensors.index.json; older: pytorch_model.bin, likewise
    tokenizer.json, tokenizer_config.json     the tokenizer

No code that such a folder brings along is run.
"""

import json
import re
import shutil
from pathlib import Path

from interop import tensors

# What `architectures` in config.json may say, and what that means for ModelConfig.
FAMILIES = {
    "Qwen3ForCausalLM": dict(causal=True),
    "Qwen2ForCausalLM": dict(causal=True, qk_norm=False, qkv_bias=True),
    "LlamaForCausalLM": dict(causal=True, qk_norm=False),
    "MistralForCausalLM": dict(causal=True, qk_norm=False),
    "DiffLM": {},  # the seeds' models, and ours: attn_mask_type says whether they are causal
    "CausalLM": dict(causal=True),  # the seeds' AR models
    "DreamModel": dict(causal=False, qk_norm=False, qkv_bias=True, shift=True),
    "LLaDAModelLM": dict(causal=False, qk_norm=False),
}
LLADA = dict(hidden_size="d_model", num_hidden_layers="n_layers", num_attention_heads="n_heads", num_key_value_heads="n_kv_heads",
             intermediate_size="mlp_hidden_size", max_position_embeddings="max_sequence_length", tie_word_embeddings="weight_tying", vocab_size="embedding_size")


def is_one(path):
    """Whether a folder looks like one of these."""
    return (Path(path) / "config.json").is_file()


def read_config(folder):
    """config.json as (family, dict), in Qwen's words whatever the family; raises ValueError."""
    path = Path(folder) / "config.json"
    try:
        a = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise ValueError(f"{path} can't be read: {tensors.first_line(problem)}") from None
    kinds = a.get("architectures") if isinstance(a, dict) else None
    if not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], str):
        raise ValueError(f"{path} does not say which architecture it is of: \"architectures\": [\"…\"]")
    family = kinds[0]
    if family not in FAMILIES:
        raise ValueError(f"{path}: architecture {family} is not supported; {', '.join(FAMILIES)} are")
    if family == "LLaDAModelLM":
        a = a | {name: a[llada] for name, llada in LLADA.items() if a.get(llada) is not None}
        wrong = [f"{name}={a[name]}" for name, right in (("block_type", "llama"), ("layer_norm_type", "rms"), ("activation_type", "silu")) if a.get(name, right) != right]
        wrong += [f"{name}={a[name]}" for name in ("alibi", "input_emb_norm", "attention_layer_norm", "include_bias", "include_qkv_bias", "scale_logits", "bias_for_layer_norm", "multi_query_attention", "clip_qkv") if a.get(name)]
        if wrong or a.get("rope") is False:
            raise ValueError(f"{path}: this LLaDA is not ours: {', '.join(wrong) or 'rope=False'}")
    return family, a


def shape_of(folder):
    """(settings of ModelConfig but the vocabulary's, rows of the embedding, the mask's id or None); raises ValueError where our network can't be it."""
    family, a = read_config(folder)
    path, means = Path(folder) / "config.json", FAMILIES[family]
    bias = a.get("attention_bias", False) or a.get("mlp_bias", False)
    windows = a.get("use_sliding_window") or (family == "MistralForCausalLM" and a.get("sliding_window")) or "sliding_attention" in (a.get("layer_types") or ())
    act = a.get("hidden_act", "silu") if family != "LLaDAModelLM" else "silu"
    for what, is_so in (("biases in attention or MLP", bias and family not in ("Qwen2ForCausalLM", "DreamModel")), ("sliding windows", windows),
                        (f"hidden_act={act}", act != "silu"), ("partly rotary positions", a.get("partial_rotary_factor") not in (None, 1.0)), ("quantized weights", a.get("quantization_config"))):
        if is_so:
            raise ValueError(f"{path}: this architecture is not ours: {what}")
    try:
        n_head, d_model = a["num_attention_heads"], a["hidden_size"]
        rows, length = a["vocab_size"], a["max_position_embeddings"]
        shape = dict(n_layer=a["num_hidden_layers"], n_head=n_head, n_kv_head=a.get("num_key_value_heads") or n_head, d_model=d_model,
                     head_dim=a.get("head_dim") or (128 if family == "Qwen3ForCausalLM" else d_model // n_head), d_ff=a["intermediate_size"])
    except KeyError as missing:
        raise ValueError(f"{path} does not say {missing}") from None
    if wrong := [f"{name}={value}" for name, value in (shape | dict(vocab_size=rows, max_position_embeddings=length)).items() if type(value) is not int or value < 1]:
        raise ValueError(f"{path} can't be understood: {', '.join(wrong)}")
    if wrong := [f"{name}={a[name]!r}" for name in ("tie_word_embeddings", "qk_norm", "qkv_bias", "shift") if not isinstance(a.get(name), bool | None)]:
        raise ValueError(f"{path}: {wrong[0]} is neither true nor false")
    rope = a.get("rope_parameters") or {}
    scaling = a.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    stretch = ()
    if kind == "llama3":
        stretch = tuple(float(scaling[key]) for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    elif kind != "default":
        raise ValueError(f"{path}: this architecture is not ours: rotary positions of type {kind}")
    causal = a.get("attn_mask_type") == "causal" if "causal" not in means else means["causal"]
    own = dict(qk_norm=a.get("qk_norm", True), qkv_bias=a.get("qkv_bias", False), shift=a.get("shift", False), rope_stretch=tuple(map(float, a.get("rope_stretch") or stretch))) if family == "DiffLM" else {}
    shape |= dict(seq_len=length, tied=bool(a.get("tie_word_embeddings", False)), rope_base=float(rope.get("rope_theta") or a.get("rope_theta") or 10000.0),
                  norm_eps=float(1e-6 if a.get("rms_norm_eps") is None else a["rms_norm_eps"]), rope_stretch=stretch) | means | own | dict(causal=causal)
    return shape, rows, None if causal else a.get("mask_token_id")


# ------------------------------------------------------------------------------------------------------- reading


def their_name(name, family=""):
    """What one of our tensors is called there."""
    if family == "LLaDAModelLM":
        ends = {"embed.weight": "wte.weight", "norm.weight": "ln_f.weight", "lm_head.weight": "ff_out.weight"}
        parts = {"attn.o_proj": "attn_out", "mlp_norm": "ff_norm", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj", "mlp.down_proj": "ff_out"}
        if name in ends:
            return "model.transformer." + ends[name]
        _, i, rest = name.split(".", 2)
        part, _, kind = rest.rpartition(".")
        return f"model.transformer.blocks.{i}.{parts.get(part, part.removeprefix('attn.'))}.{kind}"
    if name == "lm_head.weight":
        return name
    for ours, theirs in (("embed.", "embed_tokens."), ("blocks.", "layers."), (".attn_norm.", ".input_layernorm."), (".mlp_norm.", ".post_attention_layernorm."), (".attn.", ".self_attn.")):
        name = re.sub("^" + re.escape(ours) if not ours.startswith(".") else re.escape(ours), theirs, name)
    return "model." + name


def read(folder):
    """{their name: Lazy} of all weight files of a folder; raises ValueError or OSError."""
    folder, out = Path(folder), {}
    for whole, index, of in (("model.safetensors", "model.safetensors.index.json", tensors.of_safetensors), ("pytorch_model.bin", "pytorch_model.bin.index.json", tensors.of_torch)):
        if (folder / index).is_file():
            try:
                listed = json.loads((folder / index).read_text())["weight_map"]
                files = sorted(set(listed.values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as problem:
                raise ValueError(f"{folder / index} can't be read: {tensors.first_line(problem)}") from None
            for file in files:
                if not isinstance(file, str) or Path(file).name != file:
                    raise ValueError(f"{folder / index} names {file}, which is not in its folder")
                if not (folder / file).is_file():
                    raise FileNotFoundError(f"{folder / file}, which {index} lists, is not there")
                out |= of(folder / file)
            if lacking := [name for name in listed if name not in out]:
                raise ValueError(f"{folder}: {lacking[0]}, which {index} lists, is in no file")
            return out
        if (folder / whole).is_file():
            return of(folder / whole)
    raise FileNotFoundError(f"{folder} has no model.safetensors and no pytorch_model.bin")


# ------------------------------------------------------------------------------------------------------- writing


def config_of(config, objective, eos_id):
    """config.json for our weights, as a dict; raises ValueError where no such folder can hold them."""
    c = config
    if c.timed:
        raise ValueError("a uniform model needs its time, and its own sampler: transformers has neither; use sample.py")
    if objective == "ar" and c.qk_norm and c.qkv_bias:
        raise ValueError("no stock architecture has both QK-norm and biases")
    kind = "Qwen3" if c.qk_norm else "Qwen2" if c.qkv_bias else "Llama"
    out = dict(hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
               head_dim=c.head_dim, max_position_embeddings=c.seq_len, rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, hidden_act="silu",
               tie_word_embeddings=c.tied, attention_dropout=0.0, initializer_range=c.init_std, use_cache=objective == "ar", eos_token_id=eos_id, bos_token_id=None)
    if c.rope_stretch and objective == "ar":
        factor, low, high, length = c.rope_stretch
        out["rope_scaling"] = dict(rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=int(length))
    if objective == "ar":
        return dict(architectures=[f"{kind}ForCausalLM"], model_type=kind.lower(), vocab_size=c.n_vocab, attention_bias=False, use_sliding_window=False) | out
    own = dict(AutoConfig="modeling_nanoquokka.DiffLMConfig", AutoModel="modeling_nanoquokka.DiffLM", AutoModelForCausalLM="modeling_nanoquokka.DiffLM")
    return dict(architectures=["DiffLM"], model_type="nanoquokka", auto_map=own, vocab_size=c.padded_vocab, text_tokens=c.n_vocab, mask_token_id=c.mask_id,
                attn_mask_type="bidirectional", qk_norm=c.qk_norm, qkv_bias=c.qkv_bias, shift=c.shift, rope_stretch=list(c.rope_stretch) or None) | out


def from_ours(config, objective, ours):
    """{their name: Lazy}; AR models are written without the rows that are no text."""
    rows = config.n_vocab if objective == "ar" else config.padded_vocab

    return {their_name(name): value.with_rows(rows) if name in ("embed.weight", "lm_head.weight") else value for name, value in ours.items()}


def write_beside(folder, config, objective, tokens, dtype):
    """Everything but the weights: config, tokenizer, and a diffusion model's modeling file. Raises ValueError or OSError."""
    folder, about = Path(folder), config_of(config, objective, tokens.eos_id if tokens else None)
    about["torch_dtype"] = str(dtype).removeprefix("torch.")
    if tokens and not hasattr(tokens, "path"):
        about["tokenizer_name"] = tokens.name  # so that `convert.py` finds it again
    put(folder / "config.json", about)
    generation = dict(eos_token_id=tokens.eos_id) if tokens else {}
    put(folder / "generation_config.json", generation if objective == "ar" else dict(generation, mask_token_id=config.mask_id))
    if objective != "ar":
        shutil.copyfile(Path(__file__).with_name("modeling_nanoquokka.py"), folder / "modeling_nanoquokka.py")
    if tokens:
        write_tokenizer(folder, tokens, config.mask_id if objective != "ar" else None, config.seq_len)


def put(path, values):
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


MASK = "<|mask|>"


def write_tokenizer(folder, tokens, mask_id, length):
    """tokenizer.json and its settings, so that AutoTokenizer gives the ids the model was trained with. Raises ValueError."""
    if hasattr(tokens, "path"):  # a tokenizer.json already: it stays as it is, byte for byte, because it is known by its digest
        shutil.copyfile(tokens.path, folder / "tokenizer.json")
        eos = tokens.eos
    else:
        layout, eos = layout_of(tokens)
        put(folder / "tokenizer.json", layout)
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=eos, pad_token=eos, padding_side="left", model_max_length=length, clean_up_tokenization_spaces=False)
    if mask_id is not None:
        mask = next((name for name, i in tokens.specials.items() if i == mask_id), None)
        while mask is None or tokens.specials.get(mask, mask_id) != mask_id:  # a name that is still free
            mask = MASK if mask is None else f"<{mask}>"
        settings |= dict(mask_token=mask, added_tokens_decoder={str(mask_id): special(mask)})
    put(folder / "tokenizer_config.json", settings)


def special(content):
    return dict(content=content, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)


def layout_of(tokens):
    """(tokenizer.json's contents, the separator) of one of tiktoken's encodings, or of bytes. Raises ValueError."""
    try:
        import tokenizers
    except ImportError:
        raise ValueError("writing a tokenizer.json needs: pip install '.[hf]'") from None
    letters = {byte: letter for byte, letter in zip(*byte_letters())}
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if hasattr(tokens, "encoding"):
        ranks = tokens.encoding._mergeable_ranks
        pieces = {token: "".join(letters[byte] for byte in token) for token in ranks}
        model = tokenizers.models.BPE({pieces[token]: rank for token, rank in ranks.items()}, merges_of(ranks, pieces), fuse_unk=False)
        pattern = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokens.encoding._pat_str), behavior="isolated", invert=False)
        split = tokenizers.pre_tokenizers.Sequence([pattern, split])
    else:
        model = tokenizers.models.BPE({letters[byte]: byte for byte in range(256)}, [])
    specials = {name: i for name, i in tokens.specials.items() if i < tokens.n_vocab}
    eos = next(name for name, i in specials.items() if i == tokens.eos_id)
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer, inner.decoder = split, tokenizers.decoders.ByteLevel()
    layout = json.loads(inner.to_str())
    layout["added_tokens"] = [dict(id=i) | special(name) for name, i in sorted(specials.items(), key=lambda item: item[1])]
    return layout, eos


def byte_letters():
    """GPT-2's letters for the 256 bytes, in which byte-level vocabularies are spelled: (bytes, letters)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return plain + others, [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def merges_of(ranks, pieces):
    """The pairs that byte-pair encoding joins, in order: each token of several bytes is the last pair it is made of by its predecessors' merges."""
    out = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])]
            best = min(pairs)
            if best >= rank:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            out.append((pieces[parts[0]], pieces[parts[1]]))
    return out
