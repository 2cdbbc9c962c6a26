"""MegaDLMs' folders as its tools write them: the mask is an added token, with others above it."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny_checkpoints import (
    assert_same_weights,
    convert_ok,
    edit_json,
    make_run,
    refusal,
    write_distributed,
    write_megatron,
)

from corpus import tokenizers
from interop import tokenizer_files
from training import checkpoint

MASK = "<|mask_token|>"
EXTRAS = [f"<|extra_{i}|>" for i in range(11)]


def write_tokenizer(path, kind):
    """A byte-level tokenizer.json laid out as GPT-2's or GPT-NeoX's in that backend: → (text ends at, mask).

    gpt2: the eos above the vocabulary proper. neox: the eos below it, and runs of spaces as tokens that are
    added, but text.
    """
    layout, _ = tokenizer_files.tokenizer_json(tokenizers.load_tokenizer("bytes"))
    letters = layout["model"]["vocab"]
    if kind == "neox":
        layout["model"]["vocab"] = {letter: i + 2 for letter, i in letters.items()}
        texts = {0: "<|endoftext|>", 1: "<|padding|>"}
        spaces = {258 + i: " " * (i + 2) for i in range(7)}
    else:
        texts, spaces = {256: "<|endoftext|>"}, {}
    mask = 265 if kind == "neox" else 257
    texts |= {mask + i: text for i, text in enumerate([MASK, *EXTRAS[:-1]])}
    others = spaces | {mask + len(EXTRAS): EXTRAS[-1]}  # and one above the mask that is not special
    added = [dict(id=i) | tokenizer_files.special_token(text) for i, text in texts.items()]
    added += [dict(id=i) | tokenizer_files.special_token(text) | dict(special=False)
              for i, text in others.items()]
    layout["added_tokens"] = sorted(added, key=lambda token: token["id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(layout), encoding="utf-8")
    return mask


def write_hf(folder, ours, kind, **config):
    """The Hugging Face folder that the backend's tool makes of a run."""
    convert_ok(ours, folder)
    edit_json(folder / "config.json", text_tokens=..., tokenizer_name=..., qk_norm=..., qkv_bias=...,
              shift=..., rope_stretch=..., **config)
    for name in ("modeling_nanoquokka.py", "generation_config.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    write_tokenizer(folder / "tokenizer.json", kind)
    (folder / "special_tokens_map.json").write_text(json.dumps(dict(
        eos_token="<|endoftext|>", mask_token=dict(content=MASK, lstrip=False))), encoding="utf-8")


@pytest.mark.parametrize("objective", ("masked", "ar"))
@pytest.mark.parametrize("kind", ("gpt2", "neox"))
def test_folders_convert_without_options(tmp_path, kind, objective):
    mask = write_tokenizer(tmp_path / "tokenizer/tokenizer.json", kind)
    path = tmp_path / "tokenizer/tokenizer.json"
    network = make_run(tmp_path / "ours", objective, path)
    config = dict(mask_token_id=mask) if objective == "masked" else dict(architectures=["CausalLM"])
    write_hf(tmp_path / "hf", tmp_path / "ours", kind, **config)
    write_megatron(tmp_path / "torch", network, objective, 2, vocab_size=mask, mask_token=MASK)
    write_distributed(tmp_path / "dist", network, objective, core="0.12", vocab_size=mask, mask_token=mask)
    for source, flags in (("hf", {}), ("torch", dict(tokenizer=path)), ("dist", dict(tokenizer=path))):
        back = tmp_path / f"from_{source}"
        convert_ok(tmp_path / source, back, verify=True, **flags)
        assert_same_weights(back, tmp_path / "ours", n_text=mask + (objective == "masked"))
        (folder,) = back.glob("step_*")
        corpus = checkpoint.read_checkpoint(folder)["corpus"]
        assert (corpus["n_vocab"], corpus["mask_id"]) == (mask, mask)
        tokenizer = tokenizers.load_tokenizer(corpus["tokenizer"], (back,))
        text = f"two  words{EXTRAS[-1]}"  # a token above the mask is text like any other
        ids = tokenizer.encode(text).tolist()
        assert max(ids) < mask and tokenizer.decode([*ids, mask]) == text
        assert len(tokenizer.token_bytes()) == mask == tokenizer.n_vocab


def test_settings_decide_where_files_disagree(tmp_path):
    """--mask_id goes first, then config.json, then the tokenizer's own files; a mask amid text is none."""
    mask = write_tokenizer(tmp_path / "t/tokenizer.json", "gpt2")
    make_run(tmp_path / "ours", "masked", tmp_path / "t/tokenizer.json")
    write_hf(tmp_path / "hf", tmp_path / "ours", "gpt2", mask_token_id=mask + 2)
    convert_ok(tmp_path / "hf", tmp_path / "a")
    convert_ok(tmp_path / "hf", tmp_path / "b", mask_id=mask + 4)
    edit_json(tmp_path / "hf/config.json", mask_token_id=...)
    convert_ok(tmp_path / "hf", tmp_path / "c")
    for name, expected in (("a", mask + 2), ("b", mask + 4), ("c", mask)):
        corpus = checkpoint.read_checkpoint(tmp_path / name / "step_00000000")["corpus"]
        assert (corpus["mask_id"], f"mask={expected} " in corpus["tokenizer"]) == (expected, True)
    error = refusal(tmp_path, source=tmp_path / "hf", out=tmp_path / "d", mask_id=65)
    assert "its mask has the id 65" in error
    for strange in ([1], {"a": 1}, 257.0):  # a line, as for any other setting that can't be
        edit_json(tmp_path / "hf/config.json", mask_token_id=strange)
        assert "its mask can't be" in refusal(tmp_path, source=tmp_path / "hf", out=tmp_path / "d")

    # whoever prepares text with a copy beside a converted run or in a corpus gets the same mask
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    for folder in ("a", "copy"):
        assert tokenizers.load_tokenizer(str(tmp_path / folder)).mask_id == mask + 2


def test_a_mask_amid_text_stays_a_token_of_text(tmp_path):
    """As BERT's, whose file calls [MASK] the mask: a masked model gets a new id above all tokens."""
    layout, _ = tokenizer_files.tokenizer_json(tokenizers.load_tokenizer("bytes"))
    letters = {letter: i + 2 for letter, i in layout["model"]["vocab"].items()}
    layout["model"]["vocab"] = {"[SEP]": 0, "[MASK]": 1} | letters
    layout["added_tokens"] = [dict(id=i) | tokenizer_files.special_token(text)
                              for i, text in enumerate(("[SEP]", "[MASK]"))]
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"mask_token": "[MASK]"}', encoding="utf-8")
    tokenizer = tokenizers.load_tokenizer(str(tmp_path))
    assert tokenizer.mask_id == tokenizer.n_vocab == 258 and "mask=" not in tokenizer.name


def test_commands_run_on_them(tmp_path):
    """data.py with the folder's tokenizer, eval.py and sample.py with what was converted."""
    write_tokenizer(tmp_path / "t/tokenizer.json", "neox")
    make_run(tmp_path / "ours", "masked", tmp_path / "t/tokenizer.json")
    write_hf(tmp_path / "hf", tmp_path / "ours", "neox", mask_token_id=265)
    convert_ok(tmp_path / "hf", tmp_path / "run")
    (tmp_path / "words.txt").write_text("some  words of text, and more of them\n\n" * 60, encoding="utf-8")

    def call(*command):
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(ROOT / "data.py", "words.txt", "--name=words", "--tokenizer=hf", "--val=0.3")
    meta = json.loads((tmp_path / "corpora/words/meta.json").read_text(encoding="utf-8"))
    assert (meta["n_vocab"], meta["mask_id"]) == (265, 265) and "mask=265 " in meta["tokenizer"]
    text = call(ROOT / "eval.py", "--run_dir=run", "--corpus=corpora/words", "--device=cpu", "--rows=4")
    assert "NELBO" in text
    call(ROOT / "sample.py", "--run_dir=run", "--device=cpu", "--length=8", "--out=samples.jsonl")
    sample = json.loads((tmp_path / "samples.jsonl").read_text(encoding="utf-8"))
    assert len(sample["text"]) > 0 and MASK not in sample["text"]
