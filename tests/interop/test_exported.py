"""Exported folders in the programs that they are for: transformers, its tokenizers, lm-evaluation-harness."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from tiny_checkpoints import convert_ok, make_run, write_specials, write_tokenizer_file

import sample
from corpus import tokenizers
from training import checkpoint


@pytest.fixture(scope="module", autouse=True)
def remote_code(tmp_path_factory):
    """transformers copies a folder's code there, not into the user's home."""
    before = transformers.dynamic_module_utils.HF_MODULES_CACHE
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    yield
    transformers.dynamic_module_utils.HF_MODULES_CACHE = before


# ------------------------------------------------------------------------------------------- diffusion models


@pytest.mark.parametrize("shape", (
    dict(), dict(tied=False, n_kv_head=2), dict(shift=True, qk_norm=False, qkv_bias=True),
    dict(rope_stretch=(4.0, 1.0, 4.0, 16.0))), ids=("plain", "untied", "shifted", "stretched"))
@pytest.mark.parametrize("guidance", (0.0, 1.5))
def test_generates_what_sample_does(monkeypatch, tmp_path, shape, guidance):
    """generate, with the arguments of Quokka's models, against sample.py: in blocks, two tokens a step."""
    make_run(tmp_path / "ours", **shape)
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    model = load_model(tmp_path / "hf", trust_remote_code=True, dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    inputs = tokenizer(["Ab, "], return_tensors="pt", padding_side="left", padding=True)
    ids = model.eval().generate(
        **inputs, temperature=0.0, cfg=guidance, remasking="low_confidence", inference_block_size=8,
        sample_steps=8, max_new_tokens=16, verbose=True)
    flags = dict(run_dir=tmp_path / "ours", prompt="Ab, ", length=16, temperature=0, guidance=guidance,
                 order="low_confidence", block=8, steps=8, stop=False, out=tmp_path / "out.jsonl")
    monkeypatch.setattr(sys, "argv", ["sample.py", *(f"--{name}={value}" for name, value in flags.items())])
    sample.main()
    assert ids[0].tolist() == json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["ids"]
    assert tokenizer.mask_token_id == 257 and tokenizer.decode(inputs["input_ids"][0]) == "Ab, "


@pytest.mark.parametrize("guidance, steps", ((0.0, 0), (0.0, 9), (1.5, 6)))
def test_a_block_model_generates_what_sample_does(monkeypatch, tmp_path, guidance, steps):
    """In blocks of its own, from prompts of different lengths; and it comes back with its blocks."""
    network = make_run(tmp_path / "ours", diffusion_block=6, init_std=0.5)
    convert_ok(tmp_path / "ours", tmp_path / "hf", verify=True)
    convert_ok(tmp_path / "hf", tmp_path / "back", verify=True)
    _, record = checkpoint.open_checkpoint(tmp_path / "back")
    assert record["model"]["diffusion_block"] == 6
    load_model = transformers.AutoModelForCausalLM.from_pretrained
    model = load_model(tmp_path / "hf", trust_remote_code=True, dtype="auto").eval()
    x = torch.randint(257, (2, 32))
    z = torch.where(torch.arange(32) < 24, x, 257)
    with torch.no_grad():
        torch.testing.assert_close(model(z).logits[..., :257], network.logits(network(z)), atol=1e-4, rtol=0)

    prompts = ["Ab, ", "The cat"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    inputs = tokenizer(prompts, return_tensors="pt", padding_side="left", padding=True)
    ids = model.generate(
        **inputs, temperature=0.0, cfg=guidance, sample_steps=steps or None, max_new_tokens=17)
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    flags = dict(run_dir=tmp_path / "ours", prompts=tmp_path / "prompts.txt", length=17, temperature=0,
                 guidance=guidance, order="low_confidence", steps=steps, stop=False,
                 out=tmp_path / "out.jsonl")
    monkeypatch.setattr(sys, "argv", ["sample.py", *(f"--{name}={value}" for name, value in flags.items())])
    sample.main()
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    for row, mask, line in zip(ids, inputs["attention_mask"], lines, strict=True):
        assert row[int((mask == 0).sum()) :].tolist() == json.loads(line)["ids"]
    with pytest.raises(ValueError, match="blocks of its own, 6 tokens each"):
        model.generate(**inputs, inference_block_size=8, max_new_tokens=16)


def test_the_example_of_the_docs(tmp_path):
    """The program in docs/checkpoints.md, for a model with the quickstart's context; it asks nothing."""
    make_run(tmp_path / "ours", seq_len=64)
    convert_ok(tmp_path / "ours", tmp_path / "exported")
    program = re.search(
        r"```python\n(.*?)```", (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8"), re.S
    )[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=dict(os.environ, HF_HOME=str(tmp_path / "home")),
        stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("['Return the "), done.stderr
    assert "[y/N]" not in done.stdout and "Warning" not in done.stderr, done.stderr


# -------------------------------------------------------------------------------------------------- AR models


def test_an_ar_folder_is_stock(tmp_path):
    """Qwen3ForCausalLM, with no code of ours in the folder."""
    network = make_run(tmp_path / "ours", "ar", tied=False)
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.randint(257, (2, 32))
    with torch.no_grad():
        a, b = model(ids).logits, network.logits(network(ids))
    assert type(model).__name__ == "Qwen3ForCausalLM" and a.shape[-1] == 257
    assert (a - b).abs().max() < 1e-4 * b.abs().max()
    assert not list((tmp_path / "hf").glob("*.py"))


def test_an_ar_folder_in_the_harness(tmp_path):
    """lm-evaluation-harness's own `hf` model loads the folder, tokenizer and all, and scores as ours does."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from evaluation import harness

    make_run(tmp_path / "ours", "ar")
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    ours = harness.NanoQuokka(run_dir=str(tmp_path / "ours"), device="cpu")
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2)
    pairs = (("3 squared", " is 9"), ("é ", "→ü"), ("1", "2"), ("a" * 20, "b" * 20))
    questions = [Instance("loglikelihood", {}, pair, i, metadata=("t", i, 1)) for i, pair in enumerate(pairs)]
    scores, expected = ours.loglikelihood(questions), theirs.loglikelihood(questions, disable_tqdm=True)
    assert [nats for nats, _ in scores] == pytest.approx([nats for nats, _ in expected], rel=1e-5)
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]


# ------------------------------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize("name", ("bytes", "gpt2", "file"))
def test_the_tokenizer_gives_the_same_ids(tmp_path, name):
    if name == "gpt2":
        try:
            tokenizers.load_tokenizer("gpt2")
        except ValueError:
            pytest.skip("GPT-2's files are not here")
    if name == "file":
        name = write_tokenizer_file(tmp_path / "t.json", "<|other|>")
    make_run(tmp_path / "ours", tokenizer=name)
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    ours = tokenizers.load_tokenizer(str(name))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("def f(x):\n    return x ** 2  # it's 1234 — ü\t\n\n", "I'll  go   there's\r\n", "日本語 🦘",
                 " ", "a<|endoftext|b"):
        ids = ours.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids and theirs.decode(ids) == text
    assert theirs.mask_token_id == ours.mask_id and theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.mask_id + 1
    convert_ok(tmp_path / "hf", tmp_path / "back")
    assert checkpoint.read_checkpoint(tmp_path / "back/step_00000000")["corpus"]["tokenizer"] == ours.name


def test_a_mask_among_the_tokens(tmp_path):
    """A token that is called like a mask but comes before the text's end is none: ours gets a free name."""
    path = write_specials(tmp_path / "t.json", ["<|mask|>", "<|endoftext|>"])
    make_run(tmp_path / "ours", tokenizer=path)
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    recorded = json.loads((tmp_path / "hf/config.json").read_text(encoding="utf-8"))["mask_token_id"]
    assert theirs.mask_token_id == recorded == 258

    path = write_tokenizer_file(tmp_path / "u.json", "<|mask|>", ["<tool>"])
    layout = json.loads(path.read_text(encoding="utf-8"))
    layout["added_tokens"][-1]["special"] = False  # it is text, after the mask
    path.write_text(json.dumps(layout), encoding="utf-8")
    tokens = tokenizers.load_tokenizer(str(path))
    assert tokens.n_vocab == tokens.mask_id == 259 and max(tokens.encode("a<tool>b")) < tokens.n_vocab
