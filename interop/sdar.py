"""Write block-diffusion models as SDAR's: the folder that SGLang and LMDeploy serve (docs/serving.md).

The network is Qwen3's, with its tensors' names; a block sees itself and what precedes it; logits are not
shifted. config.json says the block's size and the mask, which the servers do not read (`served_otherwise`).
"""

import shutil
from pathlib import Path

import torch

from corpus import chat
from interop import native, verify
from interop.huggingface import config_json, hf_name
from interop.source import VOCABULARY_TENSORS, write_json
from interop.tensors import from_blocks
from interop.tokenizer_files import write_tokenizer

SERVED_BLOCK, SERVED_MASK = 4, 151_669  # what the servers take for granted of a SDARForCausalLM
CONFIGURATION = "configuration_sdar.py"


def write(folder, source, weights, on_progress):
    """Write a model folder. weights: {our name: LazyTensor}, the source's, maybe in another dtype.

    Raises ValueError or OSError.
    """
    config, tokenizer = source.config, source.tokenizer
    check_architecture(source)
    n_rows = max(config.n_vocab, config.mask_id + 1)
    settings = config_json(config, "ar", tokenizer.eos_id if tokenizer else None)
    settings |= dict(
        architectures=["SDARForCausalLM"], model_type="sdar", vocab_size=n_rows, tie_word_embeddings=False,
        auto_map=dict(AutoConfig="configuration_sdar.SDARConfig"), block_size=config.diffusion_block,
        mask_token_id=config.mask_id, pad_token_id=settings["eos_token_id"], sliding_window=None,
        torch_dtype=str(weights["embed.weight"].dtype).removeprefix("torch."))
    generation = dict(mask_token_id=config.mask_id, block_length=config.diffusion_block)
    if tokenizer:
        ends = source.template.end_of_turn() if source.template else {tokenizer.eos_id}
        generation["eos_token_id"] = sorted(ends)
        write_tokenizer(folder, tokenizer, config.mask_id, config.seq_len)
    if source.template:
        chat.export_template(source.template, folder)
    write_json(folder / "config.json", settings)
    write_json(folder / "generation_config.json", generation)
    shutil.copyfile(Path(__file__).with_name(CONFIGURATION), folder / CONFIGURATION)

    head = weights["embed.weight" if config.tied else "lm_head.weight"]
    hf_weights = {hf_name(name): tensor.with_rows(n_rows) if name in VOCABULARY_TENSORS else tensor
                  for name, tensor in weights.items()}
    hf_weights["lm_head.weight"] = without_mask(head, config, least_likely(source))
    native.write_weights(folder, hf_weights, on_progress)


def check_architecture(source):
    """Raise ValueError for a model that is not SDAR's."""
    c = source.config
    if not c.diffusion_block or source.objective != "masked":
        raise ValueError(f"{source.folder}: SDAR is masked block diffusion, and this is {source.objective} "
                         f"{'' if c.diffusion_block else 'without blocks'}: train it with --diffusion_block=")
    if not c.qk_norm or c.qkv_bias:
        what = "has biases of query, key and value" if c.qkv_bias else "has no QK-norm"
        raise ValueError(f"{source.folder}: SDAR is Qwen3's architecture, and this model {what}; what began "
                         "as Llama's or Qwen2.5's can't be served so (--to=hf writes it for transformers)")


def served_otherwise(config):
    """What the servers have to be told about a model, or can't be, one line each."""
    lines = []
    if config.diffusion_block != SERVED_BLOCK:
        lines.append(f"blocks of {config.diffusion_block}, where servers take {SERVED_BLOCK} for granted: "
                     "tell SGLang by --dllm-algorithm-config, LMDeploy by --dllm-block-length "
                     "(docs/serving.md)")
    if config.mask_id != SERVED_MASK:
        lines.append(f"mask {config.mask_id}, where SGLang and LMDeploy have {SERVED_MASK} (Qwen3's first "
                     "free id) in their code: change it there in one line (docs/serving.md)")
    return lines


def least_likely(source):
    """The text token whose logit is lowest at its highest, over random tokens."""
    generator, c = torch.Generator().manual_seed(0), source.config
    ids = torch.randint(c.n_vocab, (4, min(64, c.seq_len)), generator=generator)
    ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, c.mask_id, ids)
    with torch.no_grad():
        return int(verify.native_logits(c, source.weights, ids).amax((0, 1)).argmin())


def without_mask(head, config, token):
    """The LM head's rows, with those of ids that are no text, the mask's first of all, as the row of `token`.

    Servers draw from all rows, and a mask must never be written. A copy ties with a token that is all but
    impossible, and ties go to the smaller id.
    """
    n_rows = max(config.n_vocab, config.mask_id + 1)

    def read_blocks():
        rows, copied = 0, None
        for block in head.blocks():
            if rows <= token < rows + len(block):
                copied = block[token - rows].clone()
            if rows < config.n_vocab:
                yield block[: config.n_vocab - rows]
            rows += len(block)
        yield copied.expand(n_rows - config.n_vocab, -1)

    return from_blocks((n_rows, *head.shape[1:]), head.dtype, read_blocks)
