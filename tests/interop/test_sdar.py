"""Block models as servers take them: SDAR's folder, and SGLang's algorithm on it against sample.py."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_checkpoints import convert_ok, make_run, refusal

from interop import sdar
from sampling.decode import DecodeConfig
from sampling.generator import Generator
from training import checkpoint

transformers = pytest.importorskip("transformers")

BLOCK, MASK, EOS, V = 4, 257, 256, 257
# what SGLang (srt/models/sdar.py, srt/dllm/config.py) and LMDeploy (pytorch/models/sdar.py,
# pytorch/configurations/default.py, sdar.py) read of config.json
SGLANG_KEYS = ["architectures", "hidden_size", "intermediate_size", "num_attention_heads",
               "num_hidden_layers", "num_key_value_heads", "head_dim", "attention_bias", "rms_norm_eps",
               "rope_theta", "max_position_embeddings", "vocab_size", "tie_word_embeddings"]
LMDEPLOY_KEYS = ["model_type", "use_sliding_window", "sliding_window", "bos_token_id", "eos_token_id",
                 "pad_token_id", "hidden_act"]


@pytest.fixture(scope="module", params=(True, False), ids=("tied", "untied"))
def served(request, tmp_path_factory):
    """(a run's folder, the folder for servers, what convert.py said)."""
    folder = tmp_path_factory.mktemp("sdar")
    network = make_run(folder / "run", n_layer=2, n_head=4, n_kv_head=2, head_dim=8, tied=request.param,
                       diffusion_block=BLOCK, rope_base=5000.0)
    path = folder / "run/step_00000007/model.safetensors"
    scaled = {name: 5 * value if value.dim() > 1 else value for name, value in network.state_dict().items()}
    resign(folder / "run", path, lambda: save_file(scaled, path))
    said = convert_ok(folder / "run", folder / "served", to="sdar", verify=True)
    return folder / "run", folder / "served", said


def resign(run, path, change):
    """Change a checkpoint's file, and its record's digests."""
    change()
    place = path.parent
    record = json.loads((place / "checkpoint.json").read_text(encoding="utf-8"))
    record.pop("record_sha256")
    record["sha256"] = {path.name: checkpoint.digest_on_disk(path)}
    record["record_sha256"] = checkpoint.record_digest(record)
    (place / "checkpoint.json").write_text(json.dumps(record), encoding="utf-8")


def stock(folder):
    """The stock Qwen3 of transformers with a served folder's settings and tensors, all of which it has."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = transformers.Qwen3Config(**settings, attn_implementation="eager")
    model = transformers.Qwen3ForCausalLM(config).eval()
    missing = model.load_state_dict(load_file(folder / "model.safetensors"))
    assert not missing.missing_keys and not missing.unexpected_keys
    return model


def block_mask(length):
    """An additive mask for stock classes: a block sees itself and what precedes it."""
    number = torch.arange(length) // BLOCK
    return torch.zeros(1, 1, length, length).masked_fill(number[None] > number[:, None], float("-inf"))


@torch.no_grad()
def stock_logits(model, ids):
    return model(ids, attention_mask=block_mask(ids.shape[1])).logits


def generator_of(run):
    return Generator.from_checkpoint(run, "cpu", "float32").load_weights()


def test_every_key_that_servers_read_is_there(served):
    run, folder, said = served
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert not [key for key in (*SGLANG_KEYS, *LMDEPLOY_KEYS) if key not in settings]
    assert settings["architectures"] == ["SDARForCausalLM"] and settings["model_type"] == "sdar"
    assert (settings["block_size"], settings["mask_token_id"]) == (BLOCK, MASK)
    assert settings["attention_bias"] is False and settings["vocab_size"] == MASK + 1
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == dict(eos_token_id=[EOS], mask_token_id=MASK, block_length=BLOCK)
    assert "mask 257, where SGLang and LMDeploy have 151669" in said and "blocks of" not in said


def test_its_configuration_loads_with_plain_attributes(served):
    """As SGLang and LMDeploy load it: they read config.rope_theta, which transformers 5 puts elsewhere."""
    _, folder, _ = served
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in (*SGLANG_KEYS, *LMDEPLOY_KEYS, "block_size", "mask_token_id"):
        assert getattr(config, key) == settings[key], key
    assert config.rope_theta == 5000.0 and config.rope_scaling is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a").input_ids == [97] and tokenizer.mask_token_id == MASK


def test_logits_are_those_of_stock_qwen3_with_a_block_mask(served):
    run, folder, _ = served
    ids = torch.randint(0, MASK + 1, (3, 22), generator=torch.Generator().manual_seed(1))
    model = generator_of(run).model
    with torch.no_grad():
        ours = model.logits(model(ids))
    theirs = stock_logits(stock(folder), ids)
    torch.testing.assert_close(theirs[..., :V], ours, rtol=1e-4, atol=1e-4)
    # the mask's logit is that of a token that is never likely: no server writes it
    assert (theirs[..., MASK] < ours.amax(-1)).all()
    assert (theirs[..., MASK, None] == theirs[..., :V]).any(-1).all()


@torch.no_grad()
def low_confidence(model, prompt, n_new, threshold):
    """SGLang's LowConfidence (srt/dllm/algorithm/low_confidence.py), every block by whole passes.

    Of a block's masked positions those become their likeliest token whose probability exceeds the threshold;
    if there is none, the one that is surest.
    """
    ids = torch.tensor([prompt + [MASK] * n_new])
    for start in range(0, ids.shape[1], BLOCK):
        stop = min(start + BLOCK, ids.shape[1])
        while (ids[:, start:stop] == MASK).any():
            logits = stock_logits(model, ids[:, :stop])[:, start:]
            is_masked = ids[:, start:stop] == MASK
            confidence, token = F.softmax(logits, -1).max(-1)
            confidence = torch.where(is_masked, confidence, -torch.inf)
            chosen = confidence > threshold
            if not chosen.any():
                chosen = F.one_hot(confidence.argmax(-1), stop - start).bool()
            ids[:, start:stop] = torch.where(chosen, token, ids[:, start:stop])
    return ids[0].tolist()


@pytest.mark.parametrize("threshold", (0.05, 0.3, 0.95))
@pytest.mark.parametrize("n_prompt", (1, 4, 7))
def test_sglangs_algorithm_writes_what_sample_writes(served, threshold, n_prompt):
    """Token for token: --order=threshold --fallback=surest --temperature=0, with a short last block."""
    run, folder, _ = served
    generator, model = generator_of(run), stock(folder)
    prompt = torch.randint(0, 256, (n_prompt,), generator=torch.Generator().manual_seed(n_prompt)).tolist()
    config = DecodeConfig(order="threshold", fallback="surest", threshold=threshold, temperature=0.0,
                          cache="prefix")
    ours = generator.generate([prompt + [MASK] * (30 - n_prompt)], config).rows[0]
    theirs = low_confidence(model, prompt, 30 - n_prompt, threshold)
    assert ours == theirs and (n_prompt == 1 or len(set(ours[n_prompt:])) > 1)


def test_it_comes_back(served, tmp_path):
    """As a run of ours, block and mask included: the same logits, and the same folder once more."""
    run, folder, _ = served
    convert_ok(folder, tmp_path / "back", verify=True)
    back = generator_of(tmp_path / "back")
    assert (back.block, back.tokenizer.mask_id) == (BLOCK, MASK)
    ids = torch.randint(0, MASK + 1, (2, 20), generator=torch.Generator().manual_seed(2))
    model = generator_of(run).model
    with torch.no_grad():
        assert torch.equal(back.model.logits(back.model(ids)), model.logits(model(ids)))
    convert_ok(tmp_path / "back", tmp_path / "again", to="sdar")
    again, first = (load_file(place / "model.safetensors") for place in (tmp_path / "again", folder))
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_blocks_of_other_sizes_are_said(tmp_path):
    make_run(tmp_path / "run", n_layer=1, diffusion_block=16)
    said = convert_ok(tmp_path / "run", tmp_path / "served", to="sdar")
    assert "note: blocks of 16, where servers take 4 for granted: tell SGLang" in said


def test_qwens_vocabulary_needs_no_note():
    """Its first free id is the mask that servers take for granted."""
    assert sdar.served_otherwise(SimpleNamespace(diffusion_block=4, mask_id=151_669)) == []


@pytest.mark.parametrize("shape, objective, problem", [
    ({}, "masked", "without blocks"), ({}, "ar", "this is ar"),
    (dict(diffusion_block=4), "uniform", "this is uniform"),
    (dict(diffusion_block=4, qk_norm=False), "masked", "has no QK-norm"),
    (dict(diffusion_block=4, qk_norm=False, qkv_bias=True), "masked", "has biases"),
])
def test_models_that_are_not_sdars_are_refused(shape, objective, problem, tmp_path):
    make_run(tmp_path / "run", objective, n_layer=1, **shape)
    error = refusal(tmp_path, source=tmp_path / "run", out=tmp_path / "served", to="sdar")
    assert problem in error
