"""Exported folders in transformers 4 and 5: load, generate, save again, convert back.

pip installs version 4 for this: slow.
"""

import json
import os
import subprocess
import sys

import pytest
import transformers
from conftest import ROOT
from tiny_checkpoints import assert_same_weights, convert_ok, make_run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

# {transformers: what pip installs beside it}; all else comes from the environment of the tests
VERSIONS = {
    "4.49": ("tokenizers>=0.21,<0.22", "huggingface_hub>=0.26,<1"),
    "4.57": ("tokenizers>=0.22,<0.23", "huggingface_hub>=0.34,<1"),
    "5": (),
}
SHAPES = {
    "masked": ("masked", {}),
    "untied": ("masked", dict(tied=False, n_kv_head=2)),
    "shifted": ("masked", dict(shift=True, qk_norm=False, qkv_bias=True)),
    "llama": ("ar", dict(qk_norm=False)),
    "qwen2": ("ar", dict(qk_norm=False, qkv_bias=True, tied=False)),
    "qwen3": ("ar", {}),  # since 4.51
}
PROGRAM = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
print(transformers.__version__)
for name in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
    inputs = tokenizer(["Ab, ", "c"], return_tensors="pt", padding_side="left", padding=True)
    assert set(inputs) == {"input_ids", "attention_mask"}, set(inputs)
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert ids.shape[0] == 2 and tokenizer.batch_decode(ids)
    model.save_pretrained(f"{name}_again")
    tokenizer.save_pretrained(f"{name}_again")
"""


@pytest.fixture(scope="module", params=VERSIONS)
def version(request, tmp_path_factory):
    """(version, environment of a process that imports it)."""
    packages = VERSIONS[request.param]
    environ = dict(os.environ, HF_HOME=str(tmp_path_factory.mktemp("home")))
    if packages:
        folder = tmp_path_factory.mktemp("packages")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*install, f"transformers=={request.param}.*", *packages], capture_output=True)
        if done.returncode:
            pytest.skip("no package registry here")
        environ["PYTHONPATH"] = str(folder)
    return request.param, environ


def test_exported_folders_come_back(tmp_path, version):
    number, environ = version
    names = [name for name in SHAPES if name != "qwen3" or number != "4.49"]
    for name in names:
        objective, shape = SHAPES[name]
        make_run(tmp_path / f"{name}_ours", objective, **shape)
        convert_ok(tmp_path / f"{name}_ours", tmp_path / name)
    command = [sys.executable, "-c", PROGRAM, *names]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(number) and "Warning" not in done.stderr
    for name in names:
        convert_ok(tmp_path / f"{name}_again", tmp_path / f"{name}_back")
        assert_same_weights(tmp_path / f"{name}_back", tmp_path / f"{name}_ours", n_text=257)
        settings = json.loads((tmp_path / f"{name}_back/settings.json").read_text(encoding="utf-8"))
        assert settings["tied"] == SHAPES[name][1].get("tied", True)


def test_verify(tmp_path, version):
    """In a process of that version; what it lacks is said in one line."""
    number, environ = version
    for name in ("llama", "masked"):
        make_run(tmp_path / name, SHAPES[name][0], **SHAPES[name][1])
        command = [sys.executable, "convert.py", f"--source={tmp_path / name}", "--verify",
                   f"--out={tmp_path / name}_hf"]
        done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
        if number == "4.49" and name != "llama":
            lines = done.stderr.strip().splitlines()
            assert done.returncode == 2 and len(lines) == 1 and "lacks: pip install" in lines[0]
        else:
            assert done.returncode == 0 and "logits differ by at most" in done.stdout, done.stderr


def test_this_environment_has_transformers_5():
    assert transformers.__version__.startswith("5.")
