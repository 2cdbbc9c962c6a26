"""GGUF, llama.cpp's format: one file with weights, often quantized, a tokenizer and a chat template.

Llama, Qwen2 and Qwen3 are read, through the gguf package; quantized weights become float32.
"""

import json
import re
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from corpus import chat
from corpus.files import check_file
from corpus.tokenizers import HuggingFaceTokenizer, load_tokenizer, split_pattern
from interop import checks
from interop.pickles import one_line
from interop.source import VOCABULARY_TENSORS, Source, fit_vocabulary, weight_shapes
from interop.tensors import LazyTensor
from interop.tokenizer_files import special_token
from model import ModelConfig
from training.weights import check_tensors

MAGIC = b"GGUF"

# What general.architecture can be, and the settings of ModelConfig that follow from it.
FAMILIES = {
    "llama": dict(qk_norm=False),
    "qwen2": dict(qk_norm=False, qkv_bias=True),
    "qwen3": dict(qk_norm=True),
}
MODULES = {
    "attn_norm": "attn_norm", "attn_q": "attn.q_proj", "attn_k": "attn.k_proj", "attn_v": "attn.v_proj",
    "attn_output": "attn.o_proj", "attn_q_norm": "attn.q_norm", "attn_k_norm": "attn.k_norm",
    "ffn_norm": "mlp_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "embed", "output_norm": "norm", "output": "lm_head"}
ROPE_FREQUENCIES = "rope_freqs.weight"  # what each wave of Llama 3.1 is divided by
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type; unused: padding
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
# tokenizer.ggml.pre → the pre-tokenizer's parts before that
SPLITS = {
    "gpt-2": [],
    "smollm": [dict(type="Digits", individual_digits=True)],
    "llama-bpe": [split_pattern("{1,3}")],
    "qwen2": [split_pattern("")],
}


def is_checkpoint(path):
    """True if a file is called, or begins, like one of GGUF."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix.lower() == ".gguf" or file.read(4) == MAGIC


# ---------------------------------------------------------------------------------------------------- reading


def open_source(cfg, path):
    """The Source in a file; cfg is convert.Config. Raises ValueError or OSError."""
    metadata, tensors = open_file(path)
    with checks.explain_bad_settings(path):
        family, shape = network_settings(metadata, set(tensors))
    rope_frequencies = tensors.pop(ROPE_FREQUENCIES, None)
    if rope_frequencies:
        shape["rope_stretch"] = find_stretch(path, rope_frequencies.read().double(), shape)
    checks.check_shape(path, shape, len(tensors))
    objective = checks.choose_objective(cfg, "ar", path)
    if cfg.tokenizer == "none":
        tokenizer = None
    else:
        open_tokenizer = named_tokenizer if cfg.tokenizer else own_tokenizer
        tokenizer = open_tokenizer(cfg, path, metadata)
    n_rows = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else 0
    n_vocab, mask_id = checks.choose_vocabulary(path, tokenizer, objective, n_rows, n_rows, None)
    shape["seq_len"] = cfg.seq_len or shape["seq_len"]
    config = ModelConfig(**shape, n_vocab=n_vocab, mask_id=mask_id)

    shapes = weight_shapes(config)
    for name in VOCABULARY_TENSORS:
        if name in shapes:
            shapes[name] = (n_rows, *shapes[name][1:])
    names = {name: gguf_name(name) for name in shapes}
    check_tensors(path, {names[name]: shapes[name] for name in shapes}, tensors)
    weights = {name: tensors[names[name]] for name in shapes}
    if family == "llama":
        for name, tensor in weights.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weights[name] = tensor._replace(read=partial(halves_from_pairs, tensor, config.head_dim))
    weights = fit_vocabulary(weights, config)
    template = checks.template_or_warning(own_template, path, metadata, tokenizer)
    return Source("gguf", path, config, objective, weights, tensors, tokenizer, 0, template)


def open_file(path):
    """({name: value} of a file's metadata, {its name: LazyTensor}); raises ValueError or OSError."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path}: GGUF files need the gguf package: pip install '.[gguf]'") from None
    check_file(path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as problem:  # of damaged files it raises whatever its arithmetic meets
        raise ValueError(f"{path} is no whole GGUF file: {one_line(problem)}") from None
    return metadata, {tensor.name: lazy_tensor(path, tensor) for tensor in reader.tensors}


def lazy_tensor(path, tensor):
    """A gguf.ReaderTensor as a LazyTensor, in float32 if it is quantized."""
    import gguf

    kinds = gguf.GGMLQuantizationType
    dtypes = {kinds.F32: torch.float32, kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
    shape = tuple(int(n) for n in reversed(tensor.shape))
    dtype = dtypes.get(tensor.tensor_type, torch.float32)

    def read():
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ValueError(f"{path}: {tensor.name} is quantized as {tensor.tensor_type.name}, which the "
                             "gguf package can't read") from None
        return torch.from_numpy(np.array(values)).reshape(shape).to(dtype)

    return LazyTensor(shape, dtype, read)


def halves_from_pairs(tensor, head_dim):
    """Rows of queries or keys as we have them: llama.cpp turns pairs (2i, 2i + 1), we (i, i + head_dim/2)."""
    rows = tensor.read()
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).reshape(rows.shape)


def gguf_name(name):
    """The name of one of our tensors in a file."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("blocks."):
        return next(theirs for theirs, own in OUTSIDE.items() if own == module) + f".{kind}"
    _, layer, module = module.split(".", 2)
    return f"blk.{layer}." + next(theirs for theirs, own in MODULES.items() if own == module) + f".{kind}"


def network_settings(metadata, names):
    """(family, the settings of ModelConfig that a file's metadata give); names: of its tensors.

    Raises ValueError where our network can't be it, and whatever values of strange types cause.
    """
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(f"architecture {family} is not supported; {', '.join(FAMILIES)} are")

    def read(name, default=None):
        value = metadata.get(f"{family}.{name}", default)
        if value is None:
            raise ValueError(f"it does not say {family}.{name}")
        return value

    scaling = read("rope.scaling.type", "none")
    unsupported = {
        f"rotary positions of type {scaling}": scaling != "none",
        "experts": read("expert_count", 0) > 0,
        "sliding windows": read("attention.sliding_window", 0) > 0,
    }
    n_head, d_model = read("attention.head_count"), read("embedding_length")
    head_dim = read("attention.key_length", d_model // n_head)
    unsupported["values of another width than keys"] = read("attention.value_length", head_dim) != head_dim
    unsupported["partly rotary positions"] = read("rope.dimension_count", head_dim) != head_dim
    for feature, is_there in unsupported.items():
        if is_there:
            raise ValueError(f"this architecture is not ours: {feature}")
    shape = dict(
        n_layer=read("block_count"), n_head=n_head, n_kv_head=read("attention.head_count_kv", n_head),
        head_dim=head_dim, d_model=d_model, d_ff=read("feed_forward_length"), seq_len=read("context_length"),
        norm_eps=float(f"{read('attention.layer_norm_rms_epsilon'):.6g}"),  # a float32, as 1e-5 was meant
        rope_base=float(read("rope.freq_base", 10_000.0)), tied="output.weight" not in names, causal=True)
    wrong = [f"{name}={value!r}" for name, value in shape.items() if type(value) not in (int, float, bool)]
    if wrong:
        raise ValueError(f"its settings can't be understood: {', '.join(wrong)}")
    return family, shape | FAMILIES[family]


def find_stretch(path, divisors, shape):
    """ModelConfig's rope_stretch that divides each wave's frequency by these (head_dim/2,).

    Llama 3.1's and 3.2's: the factor is the largest, the rest of the four numbers is the same in all. Raises
    ValueError for others.
    """
    factor, low, high, length = float(divisors.max()), 1.0, 4.0, 8192.0
    even = torch.arange(0, shape["head_dim"], 2, dtype=torch.float64)
    turns = length * shape["rope_base"] ** (-even / shape["head_dim"]) / (2 * torch.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / (kept + (1 - kept) / factor)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(f"{path}: this architecture is not ours: rotary positions that are not Llama 3.1's")
    return factor, low, high, length


# -------------------------------------------------------------------------------------------------- tokenizer


def named_tokenizer(cfg, path, metadata):
    """The tokenizer that --tokenizer names; raises ValueError if it has not as many tokens as the file's."""
    tokenizer = load_tokenizer(cfg.tokenizer, (), cfg.eos)
    types = metadata.get("tokenizer.ggml.token_type") or []
    n_used = sum(kind != UNUSED for kind in types)
    if n_used and tokenizer.n_vocab != n_used:
        raise ValueError(f"{path} has a tokenizer of {n_used:,} tokens, '{tokenizer.name}' has "
                         f"{tokenizer.n_vocab:,}: {checks.WRONG_TOKENIZER}")
    return tokenizer


def own_tokenizer(cfg, path, metadata):
    """The tokenizer in a file's metadata; raises ValueError.

    A document ends with the token that --eos names, or one that tokenizers call so, or else the file's eos.
    """
    prefix = "tokenizer.ggml."
    kind = metadata.get(prefix + "model")
    split = metadata.get(prefix + "pre", "(it does not say how it splits)")
    if kind != "gpt2" or split not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(f"{path}: its tokenizer, {kind} {split}, is not known (gpt2 with {known} is); give "
                         "its tokenizer.json with --tokenizer=")
    with checks.explain_bad_settings(path):
        layout = tokenizer_layout(metadata[prefix + "tokens"], metadata[prefix + "token_type"],
                                  metadata[prefix + "merges"], split)
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "tokenizer.json"
    file.write_text(json.dumps(layout), encoding="utf-8")
    specials = {token["content"] for token in layout["added_tokens"] if token["special"]}
    is_usual = bool(specials & set(HuggingFaceTokenizer.EOS_NAMES))
    try:
        tokenizer = HuggingFaceTokenizer(file, cfg.eos or ("" if is_usual else named_token(metadata, "eos")))
        tokenizer.check_text()
    except ValueError as problem:
        raise ValueError(str(problem).replace(str(file), f"{path}, its tokenizer")) from None
    tokenizer.folder = folder  # which lives as long as the tokenizer
    return tokenizer


def tokenizer_layout(tokens, types, merges, split):
    """The contents of a tokenizer.json of byte-level BPE; raises ValueError, KeyError or TypeError."""
    if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("its tokens and their types don't go together")
    is_added = [kind in (CONTROL, USER_DEFINED) for kind in types]
    unknown = set(types) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}
    if unknown:
        raise ValueError(f"tokens of type {min(unknown)} are not known in a byte-level BPE")
    added = [dict(id=i) | special_token(token) | dict(special=types[i] == CONTROL)
             for i, token in enumerate(tokens) if is_added[i]]
    splitter = BYTE_LEVEL | dict(use_regex=split in ("gpt-2", "smollm"))
    normalizer = dict(type="NFC") if split == "qwen2" else None
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                 end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                 ignore_merges=split == "llama-bpe",
                 vocab={token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
                 merges=[re.split(" ", merge) for merge in merges])
    return dict(
        version="1.0", truncation=None, padding=None, added_tokens=added, normalizer=normalizer,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[*SPLITS[split], splitter]), post_processor=None,
        decoder=BYTE_LEVEL, model=model)


def own_template(path, metadata, tokenizer):
    """The chat.ChatTemplate in a file's metadata, None without; raises ValueError."""
    source = metadata.get("tokenizer.chat_template")
    if tokenizer is None or source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{path}: its tokenizer.chat_template is no text")
    named = {f"{name}_token": named_token(metadata, name) for name in ("bos", "eos")}
    try:
        return chat.ChatTemplate(source, tokenizer, {name: text for name, text in named.items() if text})
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None


def named_token(metadata, name):
    """The text of a file's bos or eos token, "" if it doesn't say."""
    tokens, i = metadata.get("tokenizer.ggml.tokens"), metadata.get(f"tokenizer.ggml.{name}_token_id")
    is_there = isinstance(tokens, list) and isinstance(i, int) and 0 <= i < len(tokens)
    return tokens[i] if is_there and isinstance(tokens[i], str) else ""
