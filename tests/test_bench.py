"""bench.py runs every part of its suites at tiny sizes; figures are checked where they can be."""

import contextlib
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from steps import step

import bench
from benchmarks import common, gpu, sampling, training
from model import Transformer
from training import transfer

PART_NAMES = "shakespeare, gathered, bf16, blocks, optimizers, choices, host, loading, prepare"
MISSING_ON_CPU = "(cudnn|efficient)_attention|varlen"


def run_bench(*flags, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench.py", "--smoke", "--rounds=2", *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("suite, parts, rows", [
    ("cpu", "host", ""),
    pytest.param("gpu", "steps,profile", "tiny masked", marks=pytest.mark.slow),
    pytest.param("cpu", "", "", marks=pytest.mark.slow),
    pytest.param("gpu", "", "", marks=pytest.mark.slow),
])
def test_every_part_runs(suite, parts, rows, tmp_path):
    flags = [f"--suite={suite}", f"--only={parts}", f"--rows={rows}", "--warmup=3", "--steps=3"]
    flags += ["--predict=False"] if rows else []  # tests/training/test_memory.py does that
    done = run_bench(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    failed = [line for line in done.stdout.splitlines() if "failed" in line]
    assert all(re.search(MISSING_ON_CPU, line) for line in failed)
    for part in parts.split(",") if parts else bench.PARTS[suite]:
        assert f"## {part}" in done.stdout
    assert "| --- |" in done.stdout and not list(tmp_path.iterdir())
    if suite == "gpu":
        ratios = re.findall(r"^\| tiny \|.*\| ([0-9.]+) \|$", done.stdout, re.M)
        assert ratios == ["1.0000"] * (4 if rows else 8)  # the formula for FLOPs is what torch counts
        assert re.search("^\\| `.*` \\| matrix products \\|", done.stdout, re.M)


def test_a_part_that_fails_costs_only_itself(tmp_path, monkeypatch):
    """And the attention order on Hopper is a context that can be entered once: each part needs its own."""

    def works(cfg, device):
        return "fine"

    def breaks(cfg, device):
        raise RuntimeError("no such kernel | here")

    entered = []

    @contextlib.contextmanager
    def enter_once(device):
        entered.append(device)
        yield

    monkeypatch.setattr(bench.kernels, "prefer_cudnn_attention", enter_once)
    good, bad = common.Part(works, "It works."), common.Part(breaks, "It breaks.")
    monkeypatch.setitem(bench.PARTS, "gpu", dict(a=good, b=bad, c=good))
    monkeypatch.setattr(bench.Config, "problems", lambda self: [])
    monkeypatch.setattr(sys, "argv", ["bench.py", "--suite=gpu", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    report = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert stop.value.code == 2 and len(entered) == 3
    assert report.count("fine") == 2 and "failed: RuntimeError: no such kernel / here" in report


def test_a_wrong_part_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--smoke", "--only=shakespear"])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    assert stop.value.code == 2
    line = capsys.readouterr().err.strip()
    assert line == f"bench.py: only=shakespear: no such part; there are {PART_NAMES}"


def test_the_first_word_sampling_has_settings_of_its_own(tmp_path, monkeypatch, capsys):
    """And its report says that our greedy text is the published algorithm's."""
    out = tmp_path / "results" / "sampling.md"
    settings = ["--parts=masked", "--vocab=50", "--n_layer=2", "--d_model=64", "--batch=2", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["bench.py", "sampling", *settings])
    bench.main()
    report = out.read_text(encoding="utf-8")
    assert "`python bench.py sampling --parts=masked --vocab=50 --batch=2 --rounds=1`, cpu" in report
    assert "### masked: 256 tokens, 64 steps, batch 2, vocabulary 50" in report
    assert "100.00% of the tokens are equal" in report and report.count("] ×") == 4

    monkeypatch.setattr(sys, "argv", ["bench.py", "sampling", "--parts=mask"])
    with pytest.raises(SystemExit):
        bench.main()
    assert capsys.readouterr().err == "bench.py: parts: choose from masked, cache, ar, answers, not mask\n"


# ------------------------------------------------------------------------------------------------- measuring


def test_rivals_take_turns_and_are_called_before_the_clock_starts(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(transfer.time, "perf_counter", lambda: now[0])

    def rival(name, seconds):
        calls.append(name)
        now[0] += seconds
        return len(calls)

    outputs = {}
    rivals = {"a": lambda: rival("a", 0.004), "b": lambda: rival("b", 0.001)}
    times = common.take_turns(rivals, common.CPU, 4, 2, outputs=outputs)
    assert np.allclose(times["a"], 4) and np.allclose(times["b"], 1)
    assert "".join(calls) == "aaabbb" + "aabb" + "bbaa" + "aabb" + "bbaa"
    assert outputs == dict(a=22, b=20)


def test_no_warmup_where_a_call_takes_minutes():
    calls = []
    common.take_turns({"a": lambda: calls.append("a")}, common.CPU, 1, warmup=0)
    assert calls == ["a"]


# ------------------------------------------------------------------------------------------- training steps


def test_full_head_computes_the_same_loss():
    """What the gathered head is measured against is the same step: equal losses and gradient norms."""
    config = training.model_shape(2, 2, 32, 60, 32, False)
    uncompiled = dict(device=common.CPU, dtype=torch.float32, compile="no")
    steps = [
        training.TrainingStep(config, "masked", 4, full_head=full_head, **uncompiled)
        for full_head in (False, True)
    ]
    assert steps[0].example.index is not None and steps[1].example.index is None
    figures = []
    for timed in steps:
        figures.append([])
        for _ in range(6):
            timed()
            figures[-1].append((timed.loss.item(), timed.norm.item()))
    assert np.allclose(*figures, rtol=2e-4)


def test_the_timed_step_is_that_of_train():
    """Losses, norms and weights of three steps, bit for bit."""
    config = training.model_shape(2, 2, 32, 60, 32, False)
    timed = training.TrainingStep(config, "masked", 4, common.CPU, torch.float32, compile="no")
    other = training.TrainingStep(config, "masked", 4, common.CPU, torch.float32, compile="no")
    for _ in range(3):
        timed()
        figures = step(other.objective, other.optimizer, other.batches)
        assert torch.equal(timed.loss, figures["loss"]) and torch.equal(timed.norm, figures["grad_norm"])
    for p, q in zip(timed.network.parameters(), other.network.parameters()):
        assert torch.equal(p, q)


def test_plain_step_is_a_language_model_of_like_size():
    shape = dict(n_layer=4, n_head=4, d_model=128, n_vocab=65, seq_len=64)
    plain = training.PlainGPT(**shape)
    ours = Transformer(training.model_shape(**shape, causal=True))
    in_blocks = sum(p.numel() for p in plain.blocks.parameters() if p.dim() == 2)
    assert in_blocks == 4 * 12 * 128**2 and abs(ours.n_params(False) / in_blocks - 1) < 0.05
    x = torch.randint(65, (2, 64))
    loss = plain(x, torch.randint(65, (2, 64)))
    assert abs(loss.item() - np.log(65)) < 0.1
    loss.backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_real_tokens_are_text_with_a_natural_distribution():
    tokens = training.real_tokens(50_257)
    counts = np.sort(np.bincount(tokens))[::-1]
    assert len(tokens) > 2 * 10**5 and len(np.unique(tokens)) > 3000 and tokens.max() < 50_257
    assert counts[0] > 50 * counts[200]


# ------------------------------------------------------------------------------------------------ on a GPU


def test_every_model_of_the_steps_table_exists():
    configs = {name: gpu.model_of(name, False) for name, *_ in gpu.STEPS}
    with torch.device("meta"):
        n_params = {name: Transformer(config).n_params() for name, config in configs.items()}
    assert n_params["1.7B"] == 1_611_785_216 and round(n_params["1.1B"] / 1e6) == 1086
    assert configs["1.7B"].n_layer == 28 and configs["1.7B"].d_model == 2048
    labels = [str(row) for row in gpu.STEPS]
    assert len(set(labels)) == len(labels)
    all_settings = {str(settings): settings for _, _, _, settings in gpu.STEPS}
    for settings in all_settings.values():  # each step can be built, small
        config, settings = gpu.with_block(gpu.model_of("tiny", False), settings)
        training.TrainingStep(config, "masked", 4, common.CPU, torch.bfloat16, **settings)


@pytest.mark.parametrize("kind, kernel", [
    ("matrix products", "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT"),
    ("matrix products", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n"),
    ("matrix products", "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x>"),
    ("matrix products", "triton_tem_fused_mm_3"),
    ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16"),
    ("attention", "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>"),
    ("attention", "void cudnn::fusion::compute_dot_do_o_specialized<true>"),
    ("attention", "triton_tem_fused_flex_attention_0"),
    ("elementwise and reductions (compiled)",
     "triton_per_fused__scaled_dot_product_cudnn_attention_backward__to_copy_add_mul_12"),
    ("elementwise and reductions (compiled)", "triton_poi_fused__to_copy_addmm_mm_mul_silu_7"),
    ("rows of the loss", "cross_entropy_rows"),
    ("optimizer and norm",
     "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>"),
    ("copies", "Memcpy HtoD (Pinned -> Device)"),
    ("others", "void at::native::vectorized_elementwise_kernel<4, FillFunctor>"),
])
def test_kernels_by_name(kind, kernel):
    assert gpu.kind_of(kernel) == kind


def test_document_borders():
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 2, 2, 2], [2, 2, 2, 2, 2]])
    borders, longest = gpu.document_borders(documents)
    assert borders.tolist() == [0, 2, 5, 6, 7, 10, 15] and longest == 5


# --------------------------------------------------------------------------------------- the published loops


def test_the_published_algorithm_wants_whole_blocks():
    network = sampling.random_network(sampling.Config(d_model=32, n_layer=1), 20, 16, False)
    prompt = torch.zeros(1, 4, dtype=torch.int64)
    for steps, block in ((4, 5), (3, 6)):
        with pytest.raises(ValueError, match="whole blocks"):
            sampling.sample_as_published(network, prompt, steps, 12, block)
