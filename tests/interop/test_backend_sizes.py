"""MegaDLMs' folders at their real sizes, converted without options: GPT-2's tokenizer and GPT-NeoX's.

Of GPT-2's 50,269 tokens text ends at 50,257, of GPT-NeoX's 50,289 at 50,277; the mask is the first above, a
padding and ten spare tokens follow. The vocabularies are made up: letters and pairs of them.
"""

import itertools
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import prepared
from tiny_checkpoints import (
    assert_same_weights,
    convert_ok,
    edit_json,
    edit_weights,
    make_run,
    refusal,
    write_distributed,
    write_megatron,
)

import sample
from corpus import tokenizers
from interop import tokenizer_files
from training import checkpoint

MASK = dict(gpt2=50_257, neox=50_277)
MEGATRON_ROWS = 50_432  # padded to a multiple of 128 on each of two ranks
SPECIALS = ["<|mask_token|>", "<|pad_token|>", *(f"<|extra_special_token_{i}>" for i in range(10))]
EOS = "<|endoftext|>"


def write_real_tokenizer(folder, kind):
    """A folder like the backend's: tokenizer.json and special_tokens_map.json. Returns the former's path."""
    layout, _ = tokenizer_files.tokenizer_json(tokenizers.load_tokenizer("bytes"))
    letters = list(layout["model"]["vocab"])
    first, below = (0, {50_256: EOS}) if kind == "gpt2" else (2, {0: EOS, 1: "<|padding|>"})
    n_merges = (50_256 if kind == "gpt2" else 50_254) - first - len(letters)
    merges = list(itertools.islice(itertools.product(letters, repeat=2), n_merges))
    texts = [*letters, *map("".join, merges)]
    layout["model"] |= dict(vocab={text: first + i for i, text in enumerate(texts)}, merges=merges)
    specials = below | {MASK[kind] + i: text for i, text in enumerate(SPECIALS)}
    added = [dict(id=i) | tokenizer_files.special_token(text) for i, text in specials.items()]
    if kind == "neox":  # runs of spaces: added, but text
        added += [dict(id=50_254 + i) | tokenizer_files.special_token(" " * (24 - i)) | dict(special=False)
                  for i in range(23)]
    layout["added_tokens"] = sorted(added, key=lambda token: token["id"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    mask = dict(content=SPECIALS[0], lstrip=False, normalized=False, rstrip=False, single_word=False)
    specials_map = json.dumps(dict(eos_token=EOS, mask_token=mask))
    (folder / "special_tokens_map.json").write_text(specials_map, encoding="utf-8")
    return folder / "tokenizer.json"


@pytest.fixture(scope="module", params=["gpt2", "neox"])
def folders(request, tmp_path_factory):
    """Of each kind of tokenizer: its own folder, and for masked and AR models a run of ours."""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = write_real_tokenizer(root / f"{kind}_tokenizer_file", kind)
    networks = {objective: make_run(root / objective, objective, tokenizer, d_model=16, n_layer=2, d_ff=32)
                for objective in ("masked", "ar")}
    return SimpleNamespace(kind=kind, root=root, tokenizer=tokenizer, networks=networks)


def write_hf(folder, folders, objective):
    """The Hugging Face folder that the backend's tool makes of a run: a row for each of its tokens."""
    n_rows = MASK[folders.kind] + 12
    convert_ok(folders.root / objective, folder)
    ours = ("text_tokens", "tokenizer_name", "qk_norm", "qkv_bias", "shift", "rope_stretch", "model_type")
    model = dict(architectures=["DiffLM"]) if objective == "masked" else dict(architectures=["CausalLM"])
    edit_json(folder / "config.json", **dict.fromkeys(ours, ...), **model, vocab_size=n_rows, eos_token_id=0,
              mask_token_id=MASK[folders.kind])

    def resize(weights):
        for name in [name for name in weights if "embed_tokens" in name or "lm_head" in name]:
            rows = torch.full((n_rows, 16), 0.25)
            rows[: len(weights[name])] = weights[name][:n_rows]
            weights[name] = rows

    edit_weights(folder, resize)
    for name in ("modeling_nanoquokka.py", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (folder / name).write_bytes((folders.tokenizer.parent / name).read_bytes())


def megatron_names(folders, objective):
    """The arguments that name a tokenizer and a mask, as the backend's example scripts give them."""
    where = folders.tokenizer.parent
    if folders.kind == "gpt2":  # of another machine
        where = "/somewhere/megatron/training/tokenizer/gpt2_tokenizer"
    mask = MASK[folders.kind] if objective == "masked" else 151_656  # AR runs keep the parser's default
    return dict(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(where), mask_token=mask,
                vocab_size=MASK[folders.kind] + 12, padded_vocab_size=MEGATRON_ROWS)


@pytest.mark.parametrize("objective", ("masked", "ar"))
@pytest.mark.parametrize("layout", ("hf", "torch", "torch_dist"))
def test_real_sizes_convert_without_options(tmp_path, folders, objective, layout):
    source, network, mask = tmp_path / "source", folders.networks[objective], MASK[folders.kind]
    names = megatron_names(folders, objective)
    if layout == "hf":
        write_hf(source, folders, objective)
    elif layout == "torch":
        write_megatron(source, network, objective, 2, n_rows=MEGATRON_ROWS, **names)
    else:
        write_distributed(source, network, objective, ranks=1, n_rows=MEGATRON_ROWS, core="0.12", **names)
    text = convert_ok(source, tmp_path / "run", verify=True)
    assert "logits differ by at most" in text
    assert_same_weights(tmp_path / "run", folders.root / objective, n_text=mask + (objective == "masked"))
    (folder,) = (tmp_path / "run").glob("step_*")
    corpus = checkpoint.read_checkpoint(folder)["corpus"]
    assert (corpus["n_vocab"], corpus["mask_id"]) == (mask, mask)
    assert (corpus["tokenizer"] == "gpt2") == (folders.kind == "gpt2" and layout != "hf")


def test_commands_run_on_them(tmp_path, folders, monkeypatch, run_eval):
    """sample.py and eval.py, on text that data.py prepares with the folder's own tokenizer."""
    write_hf(tmp_path / "hf", folders, "masked")
    convert_ok(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "words.txt").write_text("some  words of text, and more of them\n\n" * 60, encoding="utf-8")
    prepared(tmp_path / "words", tmp_path / "words.txt", tokenizer=str(tmp_path / "hf"), val=0.3)
    text, report = run_eval(tmp_path / "run", f"--corpus={tmp_path / 'words'}", "--rows=8", "--bins=0")
    assert "NELBO" in text and report["bound"]["error"] > 0
    flags = ("--device=cpu", "--length=8", "--prompt=words", f"--out={tmp_path / 'samples.jsonl'}")
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={tmp_path / 'run'}", *flags])
    sample.main()
    ids = json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8"))["ids"]
    assert max(ids) < MASK[folders.kind]


def test_a_tokenizer_elsewhere_is_named(tmp_path, folders):
    """GPT-NeoX's is not known by its name: the line says which one is asked for."""
    if folders.kind == "gpt2":
        pytest.skip("known by its name")
    names = megatron_names(folders, "masked") | dict(tokenizer_model="/somewhere/gptneox_tokenizer")
    write_megatron(tmp_path / "mega", folders.networks["masked"], "masked", n_rows=MEGATRON_ROWS, **names)
    error = refusal(tmp_path, source=tmp_path / "mega", out=tmp_path / "run")
    assert "/somewhere/gptneox_tokenizer" in error and "--tokenizer" in error
    convert_ok(tmp_path / "mega", tmp_path / "run", tokenizer=folders.tokenizer.parent)
