"""Hugging Face's model folders: Qwen3, Qwen2.5, Llama, Mistral, Quokka's DiffLM, LLaDA and Dream are read.
DiffLM is written for diffusion models, Qwen3 (or Qwen2, Llama) for AR models.

    config.json                               the architecture
    model.safetensors                         the weights; or several files and model.safetensors.index.json;
                                              older folders: pytorch_model.bin, likewise
    tokenizer.json, tokenizer_config.json     the tokenizer

Code that such a folder brings along is not run.
"""

import re
import shutil
from pathlib import Path

from corpus import chat
from corpus.records import read_json, read_record
from interop import checks, native, tensors
from interop.source import VOCABULARY_TENSORS, Source, fit_vocabulary, weight_shapes, write_json
from interop.tokenizer_files import write_tokenizer
from model import ModelConfig
from training.weights import check_tensors

# What `architectures` in config.json can be, and the settings of ModelConfig that follow from it.
FAMILIES = {
    "Qwen3ForCausalLM": dict(causal=True),
    "Qwen2ForCausalLM": dict(causal=True, qk_norm=False, qkv_bias=True),
    "LlamaForCausalLM": dict(causal=True, qk_norm=False),
    "MistralForCausalLM": dict(causal=True, qk_norm=False),
    "SDARForCausalLM": dict(causal=False),  # block diffusion in Qwen3's block
    "DiffLM": {},  # Quokka's models, and ours: attn_mask_type tells whether they are causal
    "CausalLM": dict(causal=True),  # Quokka's AR models
    "DreamModel": dict(causal=False, qk_norm=False, qkv_bias=True, shift=True),
    "LLaDAModelLM": dict(causal=False, qk_norm=False),
}
SDAR_BLOCK, SDAR_MASK = 4, 151_669  # where config.json does not say: those of its authors' models
# {Qwen's name: LLaDA's} of the settings that LLaDA calls otherwise
LLADA_NAMES = dict(
    hidden_size="d_model", num_hidden_layers="n_layers", num_attention_heads="n_heads",
    num_key_value_heads="n_kv_heads", intermediate_size="mlp_hidden_size",
    max_position_embeddings="max_sequence_length", tie_word_embeddings="weight_tying",
    vocab_size="embedding_size")
LLADA_REQUIRED = dict(block_type="llama", layer_norm_type="rms", activation_type="silu")
LLADA_FORBIDDEN = ("alibi", "input_emb_norm", "attention_layer_norm", "include_bias", "include_qkv_bias",
                   "scale_logits", "bias_for_layer_norm", "multi_query_attention", "clip_qkv")


def is_checkpoint(path):
    """True if a folder looks like one of Hugging Face's."""
    return (path / "config.json").is_file()


# ---------------------------------------------------------------------------------------------------- reading


def open_source(cfg, path):
    """The Source in a folder; cfg is convert.Config. Raises ValueError or OSError."""
    with checks.explain_bad_settings(path / "config.json"):
        family, settings = read_config(path)
        shape = network_settings(family, settings)
    original = {name: tensor for name, tensor in open_weights(path).items() if not name.endswith("inv_freq")}
    checks.check_shape(path, shape, len(original))

    objective = checks.choose_objective(cfg, "ar" if shape["causal"] else "masked", path)
    mask_id = None if shape["causal"] else settings.get("mask_token_id")
    if family == "SDARForCausalLM" and mask_id is None:
        mask_id = SDAR_MASK
    mask_id = mask_id if cfg.mask_id < 0 else cfg.mask_id
    tokenizer = checks.open_tokenizer(cfg, path, mask_id, settings.get("tokenizer_name", ""))
    if tokenizer is None and cfg.tokenizer != "none":
        has_vocab = (path / "vocab.json").is_file()
        remedy = " (transformers makes one of its vocab.json: docs/checkpoints.md)" if has_vocab else ""
        raise ValueError(f"{path} has no tokenizer.json{remedy}: give --tokenizer, or none (nothing can be "
                         "sampled or evaluated then)")
    n_rows = settings["vocab_size"]
    n_vocab, mask_id = checks.choose_vocabulary(path, tokenizer, objective, n_rows, n_rows, mask_id)
    shape["seq_len"] = cfg.seq_len or shape["seq_len"]
    block = shape.get("diffusion_block", 0)
    if block and (block >= shape["seq_len"] or shape["causal"] or shape.get("shift")):
        raise ValueError(f"{path} has blocks of {block} tokens: its context must be longer, and it can be "
                         "neither causal nor shifted")
    config = ModelConfig(**shape, n_vocab=n_vocab, mask_id=mask_id)

    shapes = weight_shapes(config)
    hf_names = {name: hf_name(name, family) for name in shapes}
    embedding, head = (hf_name(name, family) for name in VOCABULARY_TENSORS)
    checks.drop_tied_head(path, config, original, head, embedding)
    for name in VOCABULARY_TENSORS:
        if name in shapes:
            shapes[name] = (n_rows, *shapes[name][1:])
    check_tensors(path, {hf_names[name]: shapes[name] for name in shapes}, original)
    weights = fit_vocabulary({name: original[hf_names[name]] for name in shapes}, config)
    template = checks.template_or_warning(chat.own_template, tokenizer, [path]) if tokenizer else None
    return Source("hf", path, config, objective, weights, original, tokenizer, 0, template)


def read_config(folder):
    """(family, settings) of config.json, under Qwen's names whatever the family; raises ValueError."""
    path = Path(folder) / "config.json"
    settings = read_json(path)
    families = settings.get("architectures") if isinstance(settings, dict) else None
    if not isinstance(families, list) or not families or not isinstance(families[0], str):
        raise ValueError(f"{path} does not say which architecture it is of: \"architectures\": [\"…\"]")
    family = families[0]
    if family not in FAMILIES:
        raise ValueError(f"{path}: architecture {family} is not supported; {', '.join(FAMILIES)} are")
    if family == "LLaDAModelLM":
        check_llada(settings)
        for name, llada_name in LLADA_NAMES.items():
            if settings.get(llada_name) is not None:
                settings[name] = settings[llada_name]
        settings["hidden_act"] = "silu"
    return family, settings


def check_llada(settings):
    """Raise ValueError for a LLaDA that our network can't be."""
    wrong = [f"{name}={settings[name]}" for name, value in LLADA_REQUIRED.items()
             if settings.get(name, value) != value]
    wrong += [f"{name}={settings[name]}" for name in LLADA_FORBIDDEN if settings.get(name)]
    if settings.get("rope") is False:
        wrong.append("rope=False")
    if wrong:
        raise ValueError(f"this LLaDA is not ours: {', '.join(wrong)}")


def network_settings(family, settings):
    """The settings of ModelConfig that config.json gives: all but the vocabulary's.

    Raises ValueError where our network can't be it, and whatever settings of strange types cause.
    """
    check_supported(family, settings)
    try:
        n_head, d_model = settings["num_attention_heads"], settings["hidden_size"]
        qwen3_default = 128 if family == "Qwen3ForCausalLM" else None
        shape = dict(
            n_layer=settings["num_hidden_layers"], n_head=n_head, d_model=d_model,
            d_ff=settings["intermediate_size"], n_kv_head=settings.get("num_key_value_heads") or n_head,
            head_dim=settings.get("head_dim") or qwen3_default or d_model // n_head,
            seq_len=settings["max_position_embeddings"])
        n_rows = settings["vocab_size"]
    except KeyError as name:
        raise ValueError(f"it does not say {name}") from None
    wrong = [f"{name}={value}" for name, value in (shape | dict(vocab_size=n_rows)).items()
             if type(value) is not int or value < 1]
    if wrong:
        raise ValueError(f"its settings can't be understood: {', '.join(wrong)}")
    for name in ("tie_word_embeddings", "qk_norm", "qkv_bias", "shift"):
        if not isinstance(settings.get(name), bool | None):
            raise ValueError(f"{name}={settings[name]!r} is neither true nor false")

    for name in ("diffusion_block", "block_size"):
        block = settings.get(name) or 0
        if type(block) is not int or block < 0:
            raise ValueError(f"{name}={block!r} is no number of tokens")

    rope = settings.get("rope_parameters") or {}
    eps = settings.get("rms_norm_eps")
    tied = settings.get("tie_word_embeddings")
    if tied is None:  # transformers 4 leaves out what is a class's default
        tied = settings.get("model_type") == "nanoquokka"
    shape |= dict(
        tied=tied, norm_eps=1e-6 if eps is None else float(eps),
        rope_base=float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0),
        rope_stretch=rope_stretch(settings))
    if family == "DiffLM":
        stretch = settings.get("rope_stretch") or shape["rope_stretch"]
        shape |= dict(
            qk_norm=settings.get("qk_norm", True), qkv_bias=settings.get("qkv_bias", False),
            shift=settings.get("shift", False), rope_stretch=tuple(map(float, stretch)),
            diffusion_block=settings.get("diffusion_block") or 0,
            causal=settings.get("attn_mask_type") == "causal")
    if family == "SDARForCausalLM":
        shape["diffusion_block"] = settings.get("block_size") or SDAR_BLOCK
    return shape | FAMILIES[family]


def check_supported(family, settings):
    """Raise ValueError for an architecture that our network can't be."""
    has_bias = settings.get("attention_bias", False) or settings.get("mlp_bias", False)
    is_mistral = family == "MistralForCausalLM"
    has_windows = (settings.get("use_sliding_window") or is_mistral and settings.get("sliding_window")
                   or "sliding_attention" in (settings.get("layer_types") or ()))
    act = settings.get("hidden_act", "silu")
    unsupported = {
        "biases in attention or MLP": has_bias and family not in ("Qwen2ForCausalLM", "DreamModel"),
        "sliding windows": has_windows,
        f"hidden_act={act}": act != "silu",
        "partly rotary positions": settings.get("partial_rotary_factor") not in (None, 1.0),
        "quantized weights": settings.get("quantization_config"),
    }
    for feature, is_there in unsupported.items():
        if is_there:
            raise ValueError(f"this architecture is not ours: {feature}")


def rope_stretch(settings):
    """ModelConfig's rope_stretch: Llama 3.1's four numbers, or (); raises ValueError for other positions."""
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return ()
    if kind != "llama3":
        raise ValueError(f"this architecture is not ours: rotary positions of type {kind}")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return tuple(float(scaling[name]) for name in names)


def hf_name(name, family=""):
    """The name of one of our tensors in a folder of a family."""
    if family == "LLaDAModelLM":
        return llada_name(name)
    if name == "lm_head.weight":
        return name
    name = re.sub(r"^embed\.", "embed_tokens.", name)
    name = re.sub(r"^blocks\.", "layers.", name)
    for own, theirs in ((".attn_norm.", ".input_layernorm."), (".mlp_norm.", ".post_attention_layernorm."),
                        (".attn.", ".self_attn.")):
        name = name.replace(own, theirs)
    return "model." + name


def llada_name(name):
    ends = {"embed.weight": "wte.weight", "norm.weight": "ln_f.weight", "lm_head.weight": "ff_out.weight"}
    modules = {
        "attn.q_proj": "q_proj", "attn.k_proj": "k_proj", "attn.v_proj": "v_proj", "attn.o_proj": "attn_out",
        "attn_norm": "attn_norm", "mlp_norm": "ff_norm", "mlp.gate_proj": "ff_proj", "mlp.up_proj": "up_proj",
        "mlp.down_proj": "ff_out"}
    if name in ends:
        return "model.transformer." + ends[name]
    _, layer, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"model.transformer.blocks.{layer}.{modules[module]}.{kind}"


def open_weights(folder):
    """{their name: LazyTensor} of a folder's weight files; raises ValueError or OSError."""
    formats = (("model.safetensors", tensors.open_safetensors), ("pytorch_model.bin", tensors.open_torch))
    for file, open_file in formats:
        index = folder / f"{file}.index.json"
        if index.is_file():
            return open_indexed(folder, index, open_file)
        if (folder / file).exists():
            return open_file(folder / file)
    raise FileNotFoundError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def open_indexed(folder, index, open_file):
    """{their name: LazyTensor} of the weight files that an index lists; raises ValueError or OSError."""
    weight_map = read_record(index, {"weight_map": {str: str}})["weight_map"]
    weights = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} names {file}, which is not in its folder")
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder / file}, which {index.name} lists, is not there")
        weights |= open_file(folder / file)
    missing = [name for name in weight_map if name not in weights]
    if missing:
        raise ValueError(f"{folder}: {missing[0]}, which {index.name} lists, is in no file")
    return weights


# ---------------------------------------------------------------------------------------------------- writing


def write(folder, source, weights, on_progress):
    """Write a model folder: a stock architecture for AR models, DiffLM and its code for diffusion models.

    weights: {our name: LazyTensor}, the source's, maybe in another dtype. Raises ValueError or OSError.
    """
    config, tokenizer, is_ar = source.config, source.tokenizer, source.objective == "ar"
    settings = config_json(config, source.objective, tokenizer.eos_id if tokenizer else None)
    settings["torch_dtype"] = str(weights["embed.weight"].dtype).removeprefix("torch.")
    if tokenizer and not hasattr(tokenizer, "path"):
        settings["tokenizer_name"] = tokenizer.name  # so that convert.py finds it again
    generation = dict(eos_token_id=tokenizer.eos_id) if tokenizer else {}
    if source.template and is_ar:
        generation["eos_token_id"] = sorted(source.template.end_of_turn())
    if not is_ar:
        generation["mask_token_id"] = config.mask_id
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", generation)
    if not is_ar:
        shutil.copyfile(Path(__file__).with_name("modeling_nanoquokka.py"), folder / "modeling_nanoquokka.py")
    if tokenizer:
        write_tokenizer(folder, tokenizer, None if is_ar else config.mask_id, config.seq_len)
    if source.template:
        chat.export_template(source.template, folder)
    n_rows = config.n_vocab if is_ar else config.padded_vocab  # stock classes would draw ids that are no text
    hf_weights = {hf_name(name): tensor.with_rows(n_rows) if name in VOCABULARY_TENSORS else tensor
                  for name, tensor in weights.items()}
    native.write_weights(folder, hf_weights, on_progress)


def config_json(config, objective, eos_id):
    """config.json of a network, as a dict; raises ValueError where transformers has no such architecture."""
    c, is_ar = config, objective == "ar"
    if c.timed:
        raise ValueError("a uniform model needs its time, and its own sampler: transformers has neither; use "
                         "sample.py")
    if is_ar and c.qk_norm and c.qkv_bias:
        raise ValueError("no stock architecture has both QK-norm and biases")
    settings = dict(
        hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        max_position_embeddings=c.seq_len, rms_norm_eps=c.norm_eps, rope_theta=c.rope_base, hidden_act="silu",
        tie_word_embeddings=c.tied, attention_dropout=0.0, initializer_range=c.init_std, use_cache=is_ar,
        eos_token_id=eos_id, bos_token_id=None)
    if not is_ar:
        classes = dict(AutoConfig="modeling_nanoquokka.DiffLMConfig", AutoModel="modeling_nanoquokka.DiffLM",
                       AutoModelForCausalLM="modeling_nanoquokka.DiffLM")
        return dict(
            architectures=["DiffLM"], model_type="nanoquokka", auto_map=classes, vocab_size=c.padded_vocab,
            text_tokens=c.n_vocab, mask_token_id=c.mask_id, attn_mask_type="bidirectional", qk_norm=c.qk_norm,
            qkv_bias=c.qkv_bias, shift=c.shift, diffusion_block=c.diffusion_block,
            rope_stretch=list(c.rope_stretch) or None) | settings
    if c.rope_stretch:
        factor, low, high, length = c.rope_stretch
        settings["rope_scaling"] = dict(
            rope_type="llama3", factor=factor, low_freq_factor=low, high_freq_factor=high,
            original_max_position_embeddings=int(length))
    if c.qk_norm:
        kind = "Qwen3"
    else:
        kind = "Qwen2" if c.qkv_bias else "Llama"
    return dict(architectures=[f"{kind}ForCausalLM"], model_type=kind.lower(), vocab_size=c.n_vocab,
                attention_bias=False, use_sliding_window=False) | settings
