"""Every kernel against an fp64 reference: on the GPU where there is one, else under Triton's interpreter.

The interpreter multiplies and adds bf16 wrongly only in `tl.dot`; these kernels cast to fp32 right after
loading, which it does exactly, but its stores truncate, so that bf16 is compared at 1e-2 as on a GPU.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion
import kernels
from model import ModelConfig, Transformer
from training import transfer
from training.objective import Objective

NO_TRITON = "triton is not installed: only the references run here"
pytestmark = pytest.mark.skipif(kernels.triton is None, reason=NO_TRITON)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, WIDTH, D = 1003, 1024, 24


def random_inputs(rows, dtype=torch.float32, n_vocab=V, width=WIDTH, seed=0):
    """hidden, head, targets, weights, noisy, beta."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=g)
    # a logit of 5 rounded to bf16 is itself off by 1 %: moderate logits there, wide ones in fp32
    head = torch.randn(width, D, generator=g) * (0.5 if dtype == torch.float32 else 0.15)
    targets = torch.randint(0, n_vocab, (rows,), generator=g)
    weights = torch.rand(rows, generator=g) / max(1, rows)
    is_kept = torch.rand(rows, generator=g) < 0.5
    noisy = torch.where(is_kept, targets, torch.randint(0, n_vocab, (rows,), generator=g))
    beta = 10 ** (6 * torch.rand(rows, generator=g) - 3)
    others = (t.to(DEVICE) for t in (targets, weights, noisy, beta))
    return [hidden.to(DEVICE, dtype), head.to(DEVICE, dtype), *others]


def inputs_of(loss, rows, **options):
    """`random_inputs`; the cross-entropy has neither noisy tokens nor beta."""
    inputs = random_inputs(rows, **options)
    return inputs if loss == "uniform" else [*inputs[:4], None, None]


def reference(hidden, head, targets, weights, noisy, beta, n_vocab, posterior):
    """The same loss by autograd in fp64, over the text columns alone, from docs/math.md §6 as printed.

    Returns loss, nats, and the loss's gradients by hidden and head.
    """
    hidden, head = (t.detach().double().requires_grad_() for t in (hidden, head))
    logits = hidden @ head[:n_vocab].T
    if noisy is None:
        nats = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    else:
        beta = beta.double()[:, None]
        if posterior:
            logits = logits.scatter_add(1, noisy[:, None], -torch.log1p(beta))
        u, clean = 1 + beta * logits.softmax(-1), 1 + beta * F.one_hot(targets, n_vocab)
        r, rho = (t / t.gather(1, noisy[:, None]) for t in (clean, u))
        nats = (r * (r / rho).log() - r + rho).sum(-1)
    loss = (nats * weights.double()).sum()
    return loss, nats, *torch.autograd.grad(loss, (hidden, head))


def error(a, b):
    """The relative error of a, where b is right."""
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def run_kernel(hidden, head, targets, weights, noisy, beta, n_vocab, posterior):
    """Loss, nats, and the loss's gradients by hidden and head."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss, nats = kernels.fused_head_loss(hidden, head, targets, weights, noisy, beta, n_vocab, posterior)
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert not nats.requires_grad and loss.dtype == nats.dtype == torch.float32
    return loss, nats, *gradients


LOSSES = [
    pytest.param("entropy", False, id="cross_entropy"),
    pytest.param("uniform", False, id="uniform"),
    pytest.param("uniform", True, id="uniform_posterior"),
]
SHAPES = [(1, V, WIDTH), (37, V, WIDTH), (5, 1, 64), (6, 4999, 5056), (9, 64, 64), (4, 63, 64)]


@pytest.mark.parametrize("loss, posterior", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, n_vocab, width", SHAPES)
def test_head_losses_and_gradients(loss, posterior, dtype, rows, n_vocab, width):
    inputs = inputs_of(loss, rows, dtype=dtype, n_vocab=n_vocab, width=width)
    results = run_kernel(*inputs, n_vocab, posterior)
    expected = reference(*inputs, n_vocab, posterior)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    if n_vocab == 1:  # one token: certain, so loss and gradients are 0
        assert all(t.abs().max() < 1e-4 for t in results)
        return
    for name, a, b in zip(("loss", "nats", "hidden", "head"), results, expected, strict=True):
        assert error(a, b) < bound, (name, error(a, b))
    assert (results[3][n_vocab:] == 0).all()


def strided(t):
    """The same values, not contiguous."""
    if t is None:
        return None
    return torch.stack((t, t), -1)[..., 0] if t.dim() == 1 else t.t().contiguous().t()


@pytest.mark.parametrize("loss, posterior", LOSSES)
def test_layouts_rows_and_chunks_do_not_matter(loss, posterior, monkeypatch):
    """Strided inputs, several chunks of unequal size and a scaled loss give the same as one plain call."""
    inputs = inputs_of(loss, 37)
    expected = run_kernel(*inputs, V, posterior)
    strided_inputs = [strided(t) for t in inputs]
    assert not any(t.is_contiguous() for t in strided_inputs if t is not None)
    monkeypatch.setattr(kernels, "GPU_ROWS", 10)
    for a, b in zip(run_kernel(*strided_inputs, V, posterior), expected, strict=True):
        assert error(a, b) < 2e-6

    hidden, head = (t.detach().requires_grad_() for t in inputs[:2])
    scaled = 3 * kernels.fused_head_loss(hidden, head, *inputs[2:], V, posterior)[0]
    for a, b in zip(torch.autograd.grad(scaled, (hidden, head)), expected[2:]):
        assert error(a, 3 * b) < 2e-6


@pytest.mark.parametrize("loss, posterior", LOSSES)
def test_no_rows_and_rows_without_weight(loss, posterior):
    def run_without_weight(rows):
        inputs = inputs_of(loss, rows)
        inputs[3] = torch.zeros_like(inputs[3])
        return run_kernel(*inputs, V, posterior)

    total, nats, grad_hidden, grad_head = run_without_weight(0)
    assert total == 0 and nats.shape == (0,) and grad_hidden.shape == (0, D)
    assert (grad_head == 0).all() and grad_head.shape == (WIDTH, D)
    total, nats, grad_hidden, grad_head = run_without_weight(5)
    assert total == 0 and (nats > 0).all() and (grad_hidden == 0).all() and (grad_head == 0).all()


@pytest.mark.parametrize("loss, posterior", LOSSES)
def test_excluded_columns_have_no_influence(loss, posterior):
    inputs = inputs_of(loss, 7)
    expected = run_kernel(*inputs, V, posterior)
    inputs[1] = inputs[1].clone()
    inputs[1][V:] = 1e4
    for a, b in zip(run_kernel(*inputs, V, posterior), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("beta", [1e-3, 1e-1, 0.999, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("sharp", [0.01, 1.0, 20.0])
def test_uniform_bound_keeps_its_precision_from_clean_to_noise(beta, sharp):
    """Nats and gradients over every α that training meets, from a vague to a certain prediction.

    beta = 1e-3 is its floor of 1e-6 at this V.
    """
    hidden, head, targets, weights, noisy, _ = random_inputs(24)
    hidden = hidden * sharp * 0.2
    beta = torch.full((24,), beta, device=DEVICE)
    results, expected = (
        compute(hidden, head, targets, weights, noisy, beta, V, False) for compute in (run_kernel, reference)
    )
    # at `sharp` = 20 logits reach ±60 and their own rounding, 4e-6, is in every probability
    bound = 1e-6 if sharp <= 1 else 1e-5
    assert error(results[1], expected[1]) < 1e-6
    assert max(error(a, b) for a, b in zip(results[2:], expected[2:])) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_greedy(dtype, rows, monkeypatch):
    hidden, head, *_ = random_inputs(rows, dtype)
    monkeypatch.setattr(kernels, "GPU_ROWS", 8)
    tokens, probs = kernels.head_greedy(hidden, head, V)
    reference_tokens, reference_probs = kernels.linear_greedy(hidden.cpu(), head.cpu(), V)
    assert len(tokens) == len(reference_tokens) == rows
    if rows:
        expected_probs, expected_tokens = (hidden @ head.T)[:, :V].double().softmax(-1).max(-1)
        assert torch.equal(tokens, expected_tokens) and error(probs, expected_probs) < 1e-5
        assert torch.equal(reference_tokens, tokens.cpu())
        assert error(reference_probs, probs.cpu()) < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("loss, posterior", LOSSES)
@pytest.mark.parametrize("backward", [False, True])
def test_head_loss_is_a_proper_operator(loss, posterior, backward):
    hidden, head, *inputs = inputs_of(loss, 6)
    hidden, head = hidden.requires_grad_(backward), head.requires_grad_(backward)
    torch.library.opcheck(kernels.head_loss, (hidden, head, *inputs, V, posterior, backward))
    torch.library.opcheck(kernels.head_greedy, (hidden.detach(), head.detach(), V))


def test_without_gradients_none_are_computed():
    hidden, head, targets, weights, *_ = random_inputs(6)
    _, _, *gradients = kernels.head_loss(hidden, head, targets, weights, None, None, V, False, False)
    assert all(g.numel() == 0 for g in gradients)

    backward_flags = []

    def head_loss(*arguments):
        backward_flags.append(arguments[-1])
        return torch.zeros(()), torch.zeros(6)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "head_loss", head_loss)
        kernels.fused_head_loss(hidden.requires_grad_(), head, targets, weights, None, None, V, False)
    assert backward_flags == [False]


@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize("posterior", [False, True])
def test_eager_inference_computes_the_same_in_chunks(rows, posterior):
    """On a CPU, without gradients: the nats of both losses and the likeliest tokens, as with gradients."""
    hidden, head, targets, weights, noisy, beta = (t.cpu() for t in random_inputs(rows))

    def compute():
        return (
            *kernels.linear_cross_entropy(hidden, head, targets, weights, V),
            *kernels.linear_uniform_bound(hidden, head, noisy, targets, beta, weights, V, posterior),
            *kernels.linear_greedy(hidden, head, V),
        )

    expected = compute()
    with torch.no_grad():
        for a, b in zip(compute(), expected, strict=True):
            assert error(a, b) < 1e-5


# -------------------------------------------------------------------------------- inside the training step


def tiny_objective(objective, n_vocab=500, seq_len=32, rows=16, loss="elbo"):
    """(Objective, batch) of a tiny network."""
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=2, n_kv_head=1, head_dim=8, d_model=16, d_ff=64, n_vocab=n_vocab,
                         mask_id=n_vocab, seq_len=seq_len, causal=objective == "ar",
                         timed=objective == "uniform", init_std=0.3)
    process = diffusion.Process(objective, n_vocab, n_vocab, seq_len, loss=loss)
    levels = diffusion.noise_levels(process, 0, rows)
    x = np.random.default_rng(0).integers(0, n_vocab, (rows, seq_len + 1))
    batch = diffusion.make_batch(process, x, levels, np.arange(rows))
    batch = transfer.to_device(transfer.to_tensors(batch), torch.device(DEVICE))
    network = Transformer(config).init_weights().to(DEVICE)
    return Objective(network, posterior=loss == "paper"), batch


STEPS = [("ar", "elbo"), ("masked", "elbo"), ("uniform", "elbo"), ("uniform", "paper")]
# aot_eager traces, guards and differentiates as the compiler does, without its code
COMPILED = [(*step, backend) for step in STEPS for backend in ("aot_eager", "inductor")]
FAST = ("masked", "elbo", "aot_eager"), ("uniform", "paper", "aot_eager")
COMPILED = [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in COMPILED]


@pytest.mark.parametrize("objective, loss, backend", [*((*step, "") for step in STEPS), *COMPILED])
def test_training_step_with_kernels_equals_the_reference(objective, loss, backend, monkeypatch):
    """All figures and every parameter's gradient; compiled with fullgraph=True, so no graph break either."""
    model, batch = tiny_objective(objective, rows=6, loss=loss)

    def figures_and_gradients(forward):
        figures = forward(batch)
        return *figures.values(), *torch.autograd.grad(figures["loss"], list(model.parameters()))

    monkeypatch.setattr(kernels, "has_kernels", lambda tensor: False)
    expected = figures_and_gradients(model)
    torch._dynamo.reset()
    monkeypatch.setattr(kernels, "has_kernels", lambda tensor: True)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend=backend) if backend else model
    for a, b in zip(figures_and_gradients(forward), expected, strict=True):
        assert error(a, b) < 3e-5  # two computations in fp32


class TensorSizes(TorchDispatchMode):
    """Collects the number of values of every tensor that is made."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else [out]
        self.sizes += [t.numel() for t in outputs if isinstance(t, torch.Tensor)]
        return out


@pytest.mark.parametrize("with_kernels", [False, True])
def test_masked_step_never_holds_logits_of_every_position(with_kernels, monkeypatch):
    """The largest tensor of a whole training step, forward and backward, is well below B×L×V."""

    def largest_share(objective):
        model, batch = tiny_objective(objective, n_vocab=2000)
        with TensorSizes() as made:
            model(batch)["loss"].backward()
        return max(made.sizes) / (16 * 32 * 2048)

    monkeypatch.setattr(kernels, "has_kernels", lambda tensor: with_kernels)
    monkeypatch.setattr(kernels, "GPU_ROWS", 160)
    share = largest_share("masked")
    assert share < (0.4 if with_kernels else 0.65), share  # a chunk; all masked positions
    assert (largest_share("ar") < 0.4) == with_kernels  # the AR step shows that the measure sees the logits


# -------------------------------------------------------------------------------------- without a GPU at hand

COMPILE_FOR_HOPPER = """
import json, re, sys
sys.path.insert(0, sys.argv[1])
import kernels, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

types = dict(logits="*bf16", targets="*i64", weights="*fp32", nats="*fp32", noisy="*i64", betas="*fp32",
             tokens="*i64", probs="*fp32")
report = {}
for kernel in (kernels.cross_entropy_rows, kernels.uniform_bound_rows, kernels.greedy_rows):
    settings = kernels.launch_settings(50304)
    warps = settings.pop("num_warps")
    constants = dict(width=50304, n_vocab=50257, BACKWARD=True, POSTERIOR=True, **settings)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [i for i, name in enumerate(kernel.arg_names) if name in types]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    ptx = built.asm["ptx"]
    report[kernel.__name__] = dict(
        wide_loads=len(re.findall(r"ld\\.global\\S*\\.v4", ptx)),
        wide_stores=len(re.findall(r"st\\.global\\S*\\.v4", ptx)),
        narrow=len(re.findall(r"ld\\.global\\S*\\.b16", ptx)),
        cubin=len(built.asm["cubin"]),
    )
print(json.dumps(report))
"""


def test_kernels_compile_for_hopper_with_wide_loads(tmp_path):
    """Triton and ptxas accept each kernel for sm_90; rows are read and written 16 bytes at a time."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE_FOR_HOPPER, str(ROOT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    cases = (("cross_entropy_rows", 2, True), ("uniform_bound_rows", 3, True), ("greedy_rows", 1, False))
    for name, passes, stores in cases:
        counts = report[name]
        assert counts["cubin"] > 0 and counts["wide_loads"] >= 2 * passes, (name, counts)
        assert counts["narrow"] <= 3, (name, counts)
        assert (counts["wide_stores"] >= 2) == stores, (name, counts)


# ------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("L", [1, 5, 64, 200])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("within_documents", [False, True])
def test_attention_forms_agree(L, causal, within_documents, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, L, 16, generator=g, dtype=torch.float64).to(DEVICE) for _ in range(3))
    scores, mask = q @ k.transpose(-1, -2) / 16**0.5, None
    if causal:
        is_later = torch.ones(L, L, dtype=torch.bool, device=DEVICE).triu(1)
        scores = scores.masked_fill(is_later, float("-inf"))
    if within_documents:
        documents = torch.randint(0, 5, (3, L), generator=g).sort()[0].to(DEVICE)
        differ = (documents[:, :, None] != documents[:, None, :])[:, None]
        scores = scores.masked_fill(differ, float("-inf"))
        mask = kernels.document_mask(documents, causal, 0.0)
    expected = scores.softmax(-1) @ v

    def error_in(dtype):
        y = kernels.attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal, 0.0)
        return error(y, expected)

    bounds = {torch.float64: 1e-12, torch.float32: 1e-6 if DEVICE == "cpu" else 2e-3, torch.bfloat16: 1e-2}
    assert error_in(torch.float32) < bounds[torch.float32]
    if not isinstance(mask, kernels.BlockMask):  # FlexAttention has no fp64
        for longest in (0, 10**9):
            monkeypatch.setattr(kernels, "PLAIN_ATTENTION_UP_TO", dict.fromkeys(bounds, longest))
            for dtype, bound in bounds.items():
                assert error_in(dtype) < bound

    if DEVICE == "cpu":
        for longest, name in ((10**9, "plain products"), (0, "flash_attention")):
            monkeypatch.setattr(kernels, "PLAIN_ATTENTION_UP_TO", {torch.float32: longest})
            assert kernels.attention_backend(q.float(), causal, within_documents) == name
    else:
        backend = kernels.attention_backend(q.bfloat16(), causal)
        name = "flex_attention" if within_documents else backend
        assert kernels.attention_backend(q.bfloat16(), causal, within_documents) == name != "math"


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("compiled", [
    "nothing", *(pytest.param(what, marks=pytest.mark.slow) for what in ("attention", "model"))])
def test_documents_by_flex_attention(compiled, causal, monkeypatch):
    """The GPU's way through a whole model, without graph breaks; `nothing`: what it computes, by its masks.

    On a CPU forward only: FlexAttention has no gradients there.
    """
    torch.manual_seed(0)
    n_layer = 1 if compiled == "model" else 2
    config = ModelConfig(n_layer, 2, 2, 16, 32, 64, 50, 50, 40, causal=causal, init_std=0.2)
    network = Transformer(config).init_weights().to(DEVICE)
    ids = torch.randint(50, (3, 40), device=DEVICE)
    documents = torch.randint(0, 4, (3, 40), device=DEVICE).sort()[0]
    if compiled == "nothing":
        monkeypatch.setattr(kernels, "compiled_flex_attention", lambda: kernels.flex_attention)
    else:
        kernels.compiled_flex_attention.cache_clear()
    results = []
    for flex in (False, True):
        monkeypatch.setattr(kernels, "has_flex", lambda tensor, flex=flex: flex)
        monkeypatch.setattr(kernels, "on_cpu", lambda tensor, flex=flex: not flex and not tensor.is_cuda)
        torch._dynamo.reset()
        whole = compiled == "model" and flex
        forward = torch.compile(network, fullgraph=True, dynamic=False) if whole else network
        with torch.no_grad():
            results.append(forward(ids, documents=documents))
    assert error(results[1], results[0]) < (1e-5 if DEVICE == "cpu" else 5e-3)


@pytest.mark.parametrize("n_vocab, rows", ((37, 5), (1000, 300)))
def test_confidence_is_the_largest_probability(n_vocab, rows):
    """Against softmax in fp64 over the text tokens alone, and against linear_greedy."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(rows, 16, generator=g), torch.randn(n_vocab + 27, 16, generator=g)
    expected = (hidden.double() @ head[:n_vocab].double().t()).softmax(-1).amax(-1)
    confidence = kernels.linear_confidence(hidden, head, n_vocab)
    torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-7)
    _, probs = kernels.linear_greedy(hidden, head, n_vocab)
    torch.testing.assert_close(confidence, probs, rtol=1e-5, atol=1e-7)
