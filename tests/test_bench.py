"""bench.py runs every part of both suites at tiny sizes, on any machine; its figures are checked where they can be."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import bench
from model import Transformer
from training import update


def start(*flags, cwd):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, ROOT / "bench.py", "--smoke", "--rounds=2", *flags], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("suite, parts", [("cpu", "host"), ("gpu", "steps,profile"), pytest.param("cpu", "", marks=pytest.mark.slow),
                                          pytest.param("gpu", "", marks=pytest.mark.slow)])
def test_every_part_runs(suite, parts, tmp_path):
    done = start(f"--suite={suite}", f"--only={parts}", "--warmup=3", "--steps=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stdout.splitlines() if "failed" in line and not re.search("(cudnn|efficient)_attention|varlen", line)]  # a CPU has none
    for part in parts.split(",") if parts else bench.PARTS[suite]:
        assert f"## {part}" in done.stdout
    assert "| --- |" in done.stdout and not list(tmp_path.iterdir())
    if "steps" in parts:
        ratios = re.findall(r"^\| tiny \|.*\| ([0-9.]+) \|$", done.stdout, re.M)
        assert ratios == ["1.0000"] * 8  # the formula for FLOPs is what torch counts
        assert re.search("^\\| `.*` \\| matrix products \\|", done.stdout, re.M)


def test_a_part_that_fails_costs_only_itself(tmp_path, monkeypatch, capsys):
    """And the attention order on Hopper is a context that can be entered once: each part needs its own."""
    import contextlib

    def broken(cfg, device):
        """Broken."""
        raise RuntimeError("no such kernel | here")

    def works(cfg, device):
        """Works."""
        return "fine"

    entered = []

    @contextlib.contextmanager
    def once(device):
        entered.append(device)
        yield

    monkeypatch.setattr(bench.kernels, "preferring_cudnn", once)
    monkeypatch.setitem(bench.PARTS, "gpu", dict(a=works, b=broken, c=works))
    monkeypatch.setattr(bench.Config, "problems", lambda self: [])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--suite=gpu", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    text = (tmp_path / "gpu.md").read_text()
    assert stop.value.code == 2 and len(entered) == 3
    assert text.count("fine") == 2 and "failed: RuntimeError: no such kernel / here" in text


def test_every_model_of_the_steps_table_exists():
    sizes = {name: bench.model_of(name, False) for name, *_ in bench.STEPS}
    with torch.device("meta"):
        count = {name: Transformer(c).n_params() for name, c in sizes.items()}
    assert count["1.7B"] == 1_611_785_216 and round(count["1.1B"] / 1e6) == 1086 and sizes["1.7B"].n_layer == 28 and sizes["1.7B"].d_model == 2048
    labels = [f"{n} {o} {r} {s}" for n, o, r, s in bench.STEPS]
    assert len(set(labels)) == len(labels)
    for _, _, _, settings in bench.STEPS:  # each can be built, small
        bench.Step(bench.model_of("tiny", False), "masked", 4, bench.CPU, torch.bfloat16, **settings)


@pytest.mark.parametrize("kernel, kind", [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"), ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
    ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x>", "matrix products"), ("triton_tem_fused_mm_3", "matrix products"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"), ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
    ("void cudnn::fusion::compute_dot_do_o_specialized<true>", "attention"), ("triton_tem_fused_flex_attention_0", "attention"),
    ("triton_per_fused__scaled_dot_product_cudnn_attention_backward__to_copy_add_mul_12", "elementwise and reductions (compiled)"),
    ("triton_poi_fused__to_copy_addmm_mm_mul_silu_7", "elementwise and reductions (compiled)"), ("cross_entropy_rows", "rows of the loss"),
    ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer and norm"),
    ("Memcpy HtoD (Pinned -> Device)", "copies"), ("void at::native::vectorized_elementwise_kernel<4, FillFunctor>", "others")])
def test_kernels_by_name(kernel, kind):
    assert bench.kind_of(kernel) == kind


def test_document_borders():
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2], [2, 2, 2, 2, 2]])
    borders, longest = bench.document_borders(ids)
    assert borders.tolist() == [0, 2, 5, 6, 7, 10, 15] and longest == 5


def test_a_wrong_part_is_one_line(tmp_path):
    done = start("--only=shakespear", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.strip() == ("bench.py: only=shakespear: no such part; there are shakespeare, gathered, bf16, choices, host, loading, prepare")


def test_full_head_computes_the_same_loss():
    """What the gathered head is measured against is the same step: equal losses and gradients."""
    config = bench.shape_of(2, 2, 32, 60, 32, False)
    steps = [bench.Step(config, "masked", 4, bench.CPU, torch.float32, how="no", full_head=full) for full in (False, True)]
    assert steps[0].example.index is not None and steps[1].example.index is None
    losses = []
    for run in steps:
        values = []
        for _ in range(6):
            run()
            values.append(run.record.tolist())
        losses.append(values)
    assert np.allclose(*losses, rtol=2e-4)


def test_plain_step_is_a_language_model_of_like_size():
    shape = dict(n_layer=4, n_head=4)
    plain = bench.PlainGPT(d=128, n_vocab=65, seq_len=64, **shape)
    ours = Transformer(bench.shape_of(**shape, d_model=128, n_vocab=65, seq_len=64, causal=True))
    inside = sum(p.numel() for p in plain.blocks.parameters() if p.dim() == 2)
    assert inside == 4 * 12 * 128**2 and abs(ours.n_params(False) / inside - 1) < 0.05
    x = torch.randint(65, (2, 64))
    loss = plain(x, torch.randint(65, (2, 64)))
    assert abs(loss.item() - np.log(65)) < 0.1
    loss.backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_real_tokens_are_text_with_a_natural_distribution():
    tokens = bench.real_tokens(50_257)
    counts = np.sort(np.bincount(tokens))[::-1]
    assert len(tokens) > 2 * 10**5 and len(np.unique(tokens)) > 3000 and tokens.max() < 50_257
    assert counts[0] > 50 * counts[200]


def test_rivals_take_turns_and_are_called_before_the_clock_starts(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(update.time, "perf_counter", lambda: now[0])

    def rival(name, takes):
        calls.append(name)
        now[0] += takes

    times = bench.take_turns({"a": lambda: rival("a", 0.004), "b": lambda: rival("b", 0.001)}, bench.CPU, 4, 2)
    assert np.allclose(times["a"], 4) and np.allclose(times["b"], 1)
    assert "".join(calls) == "aaabbb" + "aabb" + "bbaa" + "aabb" + "bbaa"
