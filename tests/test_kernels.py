"""Every kernel against an fp64 reference: on the GPU where there is one, else under Triton's interpreter.

The interpreter multiplies and adds bf16 wrongly only in `tl.dot`; these kernels cast to fp32 right after
loading, which it does exactly, but its stores truncate, so that bf16 is compared at 1e-2 as on a GPU.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import kernels as k
from training.objective import Objective

pytestmark = pytest.mark.skipif(k.triton is None, reason="triton is not installed: only the references run here")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, WIDTH, D = 1003, 1024, 24


def inputs(rows, dtype=torch.float32, n_vocab=V, width=WIDTH, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, D, generator=g)
    # a logit of 5 rounded to bf16 is itself off by 1 %: moderate logits there, wide ones in fp32
    head = torch.randn(width, D, generator=g) * (0.5 if dtype == torch.float32 else 0.15)
    targets = torch.randint(0, n_vocab, (rows,), generator=g)
    weights = torch.rand(rows, generator=g) / max(1, rows)
    z = torch.where(torch.rand(rows, generator=g) < 0.5, targets, torch.randint(0, n_vocab, (rows,), generator=g))
    beta = 10 ** (6 * torch.rand(rows, generator=g) - 3)
    return [t.to(DEVICE, dtype) if t.is_floating_point() and i < 2 else t.to(DEVICE)
            for i, t in enumerate((hidden, head, targets, weights, z, beta))]


def reference(hidden, head, targets, weights, z, beta, n_vocab, posterior):
    """The same loss by autograd in fp64, over the text columns alone, from the formula of SPEC §6 as printed."""
    hidden, head = (t.detach().double().requires_grad_() for t in (hidden, head))
    logits = hidden @ head[:n_vocab].T
    if z is None:
        nats = -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    else:
        beta = beta.double()[:, None]
        if posterior:
            logits = logits.scatter_add(1, z[:, None], -torch.log1p(beta))
        u, clean = 1 + beta * logits.softmax(-1), 1 + beta * F.one_hot(targets, n_vocab)
        r, rho = (t / t.gather(1, z[:, None]) for t in (clean, u))
        nats = (r * (r / rho).log() - r + rho).sum(-1)
    loss = (nats * weights.double()).sum()
    return loss, nats, *torch.autograd.grad(loss, (hidden, head))


def error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300)).item()


def run(hidden, head, targets, weights, z, beta, n_vocab, posterior):
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss, nats = k.head_loss_of(hidden, head, targets, weights, z, beta, n_vocab, posterior)
    grads = torch.autograd.grad(loss, (hidden, head))
    assert not nats.requires_grad and loss.dtype == nats.dtype == torch.float32
    return loss, nats, *grads


LOSSES = [pytest.param("entropy", False, id="cross_entropy"), pytest.param("uniform", False, id="uniform"),
          pytest.param("uniform", True, id="uniform_posterior")]


@pytest.mark.parametrize("loss,posterior", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows,n_vocab,width", [(1, V, WIDTH), (37, V, WIDTH), (5, 1, 64), (6, 4999, 5056), (9, 64, 64), (4, 63, 64)])
def test_head_losses_and_gradients(loss, posterior, dtype, rows, n_vocab, width):
    hidden, head, targets, weights, z, beta = inputs(rows, dtype, n_vocab, width)
    if loss == "entropy":
        z = beta = None
    got = run(hidden, head, targets, weights, z, beta, n_vocab, posterior)
    want = reference(hidden, head, targets, weights, z, beta, n_vocab, posterior)
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    if n_vocab == 1:  # one token: certain, so loss and gradients are 0
        assert all(t.abs().max() < 1e-4 for t in got)
        return
    for name, a, b in zip(("loss", "nats", "hidden", "head"), got, want, strict=True):
        assert error(a, b) < bound, (name, error(a, b))
    assert (got[3][n_vocab:] == 0).all()


@pytest.mark.parametrize("loss,posterior", LOSSES)
def test_layouts_rows_and_chunks_do_not_matter(loss, posterior, monkeypatch):
    """Transposed inputs, several chunks of unequal size and a scaled loss give the same as one plain call."""
    tensors = inputs(37)
    if loss == "entropy":
        tensors[4] = tensors[5] = None
    whole = run(*tensors, V, posterior)
    strided = [t if t is None else torch.stack((t, t), -1)[..., 0] if t.dim() == 1 else t.t().contiguous().t() for t in tensors]
    assert not any(t.is_contiguous() for t in strided if t is not None)
    monkeypatch.setattr(k, "CHUNK", 10)
    for a, b in zip(run(*strided, V, posterior), whole, strict=True):
        assert error(a, b) < 2e-6
    hidden, head = (t.detach().requires_grad_() for t in tensors[:2])
    for a, b in zip(torch.autograd.grad(3 * k.head_loss_of(hidden, head, *tensors[2:], V, posterior)[0], (hidden, head)), whole[2:]):
        assert error(a, 3 * b) < 2e-6


@pytest.mark.parametrize("loss,posterior", LOSSES)
def test_no_rows_and_rows_without_weight(loss, posterior):
    def of(rows):
        tensors = inputs(rows)
        tensors[3] = torch.zeros_like(tensors[3])
        return run(*tensors[:4], *(tensors[4:] if loss == "uniform" else (None, None)), V, posterior)

    total, nats, grad_hidden, grad_head = of(0)
    assert total == 0 and nats.shape == (0,) and grad_hidden.shape == (0, D) and (grad_head == 0).all() and grad_head.shape == (WIDTH, D)
    total, nats, grad_hidden, grad_head = of(5)
    assert total == 0 and (nats > 0).all() and (grad_hidden == 0).all() and (grad_head == 0).all()


@pytest.mark.parametrize("loss,posterior", LOSSES)
def test_excluded_columns_have_no_influence(loss, posterior):
    tensors = inputs(7)
    if loss == "entropy":
        tensors[4] = tensors[5] = None
    plain = run(*tensors, V, posterior)
    tensors[1] = tensors[1].clone()
    tensors[1][V:] = 1e4
    for a, b in zip(run(*tensors, V, posterior), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("beta", [1e-3, 1e-1, 0.999, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("sharp", [0.01, 1.0, 20.0])
def test_uniform_bound_keeps_its_precision_from_clean_to_noise(beta, sharp):
    """Nats and gradients over every α that training meets (β = 1e-3 is its floor of 1e-6 at this V) and from a vague to a certain prediction."""
    hidden, head, targets, weights, z, _ = inputs(24)
    hidden = hidden * sharp * 0.2
    beta = torch.full((24,), beta, device=DEVICE)
    got, want = (f(hidden, head, targets, weights, z, beta, V, False) for f in (run, reference))
    # at `sharp` = 20 logits reach ±60 and their own rounding, 4e-6, is in every probability
    assert error(got[1], want[1]) < 1e-6 and max(error(a, b) for a, b in zip(got[2:], want[2:])) < (1e-6 if sharp <= 1 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_greedy(dtype, rows, monkeypatch):
    hidden, head, *_ = inputs(rows, dtype)
    monkeypatch.setattr(k, "CHUNK", 8)
    tokens, probs = k.head_greedy(hidden, head, V)
    want, indices = ((hidden @ head.T)[:, :V].double().softmax(-1)).max(-1) if rows else (probs, tokens)
    assert torch.equal(tokens, indices) and error(probs, want) < 1e-5 or rows == 0
    reference_tokens, reference_probs = k.linear_greedy(hidden.cpu(), head.cpu(), V)
    assert torch.equal(reference_tokens, tokens.cpu()) and error(reference_probs, probs.cpu()) < (1e-5 if dtype == torch.float32 else 1e-2) or rows == 0


@pytest.mark.parametrize("loss,posterior", LOSSES)
@pytest.mark.parametrize("backward", [False, True])
def test_head_loss_is_a_proper_operator(loss, posterior, backward):
    hidden, head, targets, weights, z, beta = inputs(6)
    if loss == "entropy":
        z = beta = None
    wants = backward
    arguments = (hidden.requires_grad_(wants), head.requires_grad_(wants), targets, weights, z, beta, V, posterior, backward)
    torch.library.opcheck(k.head_loss, arguments)
    torch.library.opcheck(k.head_greedy, (hidden.detach(), head.detach(), V))


def test_without_gradients_none_are_computed():
    hidden, head, targets, weights, *_ = inputs(6)
    _, _, *gradients = k.head_loss(hidden, head, targets, weights, None, None, V, False, False)
    assert all(g.numel() == 0 for g in gradients)
    seen = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(k, "head_loss", lambda *a: seen.append(a[-1]) or (torch.zeros(()), torch.zeros(6)))
        k.head_loss_of(hidden.requires_grad_(), head, targets, weights, None, None, V, False)
    assert seen == [False]


# ------------------------------------------------------------------------------------------ products on a CPU


@pytest.mark.parametrize("rows, K, N", [(257, 65, 67), (64, 24, 1000), (9, 1000, 240), (1, 1100, 1000)])
@pytest.mark.parametrize("strided", [False, True])
def test_products_by_onednn(rows, K, N, strided, monkeypatch):
    monkeypatch.setattr(k, "ONEDNN", True)  # it works on any CPU; it is only faster on some
    g = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(*((b, a) if strided else (a, b)), generator=g) for a, b in ((rows, K), (N, K), (rows, N)))
    if strided:
        x, w, dy = x.t(), w.t(), dy.t()
    x, w = x.requires_grad_(), w.requires_grad_()
    y = k.linear(x, w)
    got = y, *torch.autograd.grad(y, (x, w), dy)
    want = x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double()
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and error(a, b) < 1e-6
    torch.library.opcheck(k.onednn_product, (x, w))
    assert error(k.linear(x.expand(3, rows, K), w)[1], want[0]) < 1e-6
    assert k.linear(x.double(), w.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert k.linear(x, w).dtype == torch.bfloat16


def test_onednn_is_left_alone_where_it_would_not_help(monkeypatch):
    monkeypatch.setattr(k, "ONEDNN", True)
    monkeypatch.setattr(k, "onednn_product", None)
    for x in (torch.randn(4, 8), torch.randn(0, 8), torch.randn(2000, 8, dtype=torch.float64)):
        assert torch.equal(k.linear(x, torch.ones(300, 8, dtype=x.dtype)), F.linear(x, torch.ones(300, 8, dtype=x.dtype)))


# ------------------------------------------------------------------------------- inside the training step


def training_step(objective, n_vocab=500, seq_len=32, rows=16, loss="elbo", seed=0):
    """(Objective, batch) of a tiny network."""
    import numpy as np

    import diffusion as d
    from model import ModelConfig, Transformer
    from training import transfer

    torch.manual_seed(seed)
    config = ModelConfig(2, 2, 1, 8, 16, 64, n_vocab, n_vocab, seq_len, causal=objective == "ar", timed=objective == "uniform", init_std=0.3)
    process = d.Process(objective, n_vocab, n_vocab, seq_len, loss=loss)
    step = d.noise_levels(process, 0, rows)
    x = np.random.default_rng(seed).integers(0, n_vocab, (rows, seq_len + 1))
    batch = transfer.to_device(transfer.to_tensors(d.make_batch(process, x, step, step.microbatch_rows(0, 1)), False), torch.device(DEVICE))
    return Objective(Transformer(config).init_weights().to(DEVICE), posterior=loss == "paper"), batch


STEPS = [("ar", "elbo"), ("masked", "elbo"), ("uniform", "elbo"), ("uniform", "paper")]


@pytest.mark.parametrize("objective,loss,compiled", [(*step, False) for step in STEPS] + [
    pytest.param(*step, True, marks=[] if step == ("masked", "elbo") else pytest.mark.slow) for step in STEPS])
def test_training_step_with_kernels_equals_the_reference(objective, loss, compiled, monkeypatch):
    """Loss, its parts and every parameter's gradient; compiled with fullgraph=True, so no graph break either."""
    model, batch = training_step(objective, loss=loss)

    def step(kernels):
        torch._dynamo.reset()
        monkeypatch.setattr(k, "has_kernels", lambda tensor: kernels)
        forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
        total, parts = forward(batch)
        return total, parts, *torch.autograd.grad(total, list(model.parameters()))

    for a, b in zip(step(True), step(False), strict=True):
        assert error(a, b) < 3e-5  # two computations in fp32


@pytest.mark.parametrize("kernels", [False, True])
def test_masked_step_never_holds_logits_of_every_position(kernels, monkeypatch):
    """The largest tensor of a whole training step, forward and backward, is well below B×L×V."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, torch.Tensor))
            return out

    def largest(objective):
        model, batch = training_step(objective, n_vocab=2000)
        sizes.clear()
        with Watch():
            model(batch)[0].backward()
        return max(sizes) / (16 * 32 * 2048)

    monkeypatch.setattr(k, "has_kernels", lambda tensor: kernels)
    monkeypatch.setattr(k, "CHUNK", 160)
    share = largest("masked")
    assert share < (0.4 if kernels else 0.65), share  # a chunk; all masked positions
    assert (largest("ar") < 0.4) == kernels  # and the AR step shows that the measure sees the logits


# --------------------------------------------------------------------------------------- without a GPU at hand


def test_kernels_compile_for_hopper_with_wide_loads(tmp_path):
    """Triton and ptxas accept each kernel for compute capability 9.0, and rows are read and written 16 bytes at a time."""
    script = f"""
import json, re, sys
sys.path.insert(0, {str(ROOT)!r})
import kernels, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
types = dict(logits="*bf16", targets="*i64", weights="*fp32", nats="*fp32", noisy="*i64", betas="*fp32", tokens="*i64", probs="*fp32")
report = {{}}
for kernel in (kernels.cross_entropy_rows, kernels.uniform_bound_rows, kernels.greedy_rows):
    settings = kernels.launch(50304)
    warps = settings.pop("num_warps")
    constants = {{n: v for n, v in dict(width=50304, n_vocab=50257, BACKWARD=True, POSTERIOR=True, **settings).items() if n in kernel.arg_names}}
    signature = {{n: types.get(n, "constexpr") for n in kernel.arg_names}}
    aligned = {{(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n in types}}
    built = triton.compile(ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned),
                           target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    ptx = built.asm["ptx"]
    report[kernel.__name__] = dict(wide_loads=len(re.findall(r"ld\\.global\\S*\\.v4", ptx)), wide_stores=len(re.findall(r"st\\.global\\S*\\.v4", ptx)),
                                   narrow=len(re.findall(r"ld\\.global\\S*\\.b16", ptx)), cubin=len(built.asm["cubin"]))
print(json.dumps(report))
"""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    for name, passes, stores in (("cross_entropy_rows", 2, 1), ("uniform_bound_rows", 3, 1), ("greedy_rows", 1, 0)):
        seen = report[name]
        assert seen["cubin"] > 0 and seen["wide_loads"] >= 2 * passes and seen["narrow"] <= 3, (name, seen)
        assert (seen["wide_stores"] >= 2) == bool(stores), (name, seen)


# ------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("L", [1, 5, 64, 200])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_forms_agree(L, causal, documents, monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, key, v = (torch.randn(3, 2, L, 16, generator=g, dtype=torch.float64).to(DEVICE) for _ in range(3))
    scores, mask = q @ key.transpose(-1, -2) / 16**0.5, None
    if causal:
        scores = scores.masked_fill(torch.ones(L, L, dtype=torch.bool, device=DEVICE).triu(1), float("-inf"))
    if documents:
        ids = torch.randint(0, 5, (3, L), generator=g).sort()[0].to(DEVICE)
        scores = scores.masked_fill((ids[:, :, None] != ids[:, None, :])[:, None], float("-inf"))
        mask = k.document_mask(ids, causal, 0.0)
    want = scores.softmax(-1) @ v
    if not isinstance(mask, k.BlockMask):  # FlexAttention has no fp64
        for longest in (0, 10**9):
            monkeypatch.setattr(k, "PLAIN_ATTENTION_UP_TO", dict.fromkeys((torch.float64, torch.float32, torch.bfloat16), longest))
            for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6 if DEVICE == "cpu" else 2e-3), (torch.bfloat16, 1e-2)):
                assert error(k.attention(q.to(dtype), key.to(dtype), v.to(dtype), mask, causal, 0.0), want) < bound
    assert error(k.attention(q.float(), key.float(), v.float(), mask, causal, 0.0), want) < (1e-6 if DEVICE == "cpu" else 2e-3)
    if DEVICE == "cpu":
        for longest, name in ((10**9, "plain products"), (0, "flash_attention")):
            monkeypatch.setattr(k, "PLAIN_ATTENTION_UP_TO", {torch.float32: longest})
            assert k.attention_backend(q.float(), causal, documents) == name
    else:
        flex = "flex_attention" if documents else k.attention_backend(q.bfloat16(), causal)
        assert k.attention_backend(q.bfloat16(), causal, documents) == flex != "math"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_documents_by_flex_attention(compiled, causal, monkeypatch):
    """The GPU's way through a whole model (on a CPU: forward only, as FlexAttention has no gradients there), without graph breaks."""
    from model import ModelConfig, Transformer

    torch.manual_seed(0)
    network = Transformer(ModelConfig(2, 2, 2, 16, 32, 64, 50, 50, 40, causal=causal, init_std=0.2)).init_weights().to(DEVICE)
    ids, documents = torch.randint(50, (3, 40), device=DEVICE), torch.randint(0, 4, (3, 40), device=DEVICE).sort()[0]
    results = []
    for flex in (False, True):
        monkeypatch.setattr(k, "has_flex", lambda tensor, flex=flex: flex)
        monkeypatch.setattr(k, "on_cpu", lambda tensor, flex=flex: not flex and not tensor.is_cuda)
        torch._dynamo.reset()
        k.compiled_flex_attention.cache_clear()
        forward = torch.compile(network, fullgraph=True, dynamic=False) if compiled and flex else network
        with torch.no_grad():
            results.append(forward(ids, documents=documents))
    assert error(results[1], results[0]) < (1e-5 if DEVICE == "cpu" else 5e-3)


@pytest.mark.parametrize("n_vocab, rows", ((37, 5), (1000, 300)))
def test_certainty_is_the_largest_probability(n_vocab, rows):
    """Against softmax in fp64 over the text tokens alone, and what linear_greedy says."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(rows, 16, generator=g), torch.randn(n_vocab + 27, 16, generator=g)
    expected = (hidden.double() @ head[:n_vocab].double().t()).softmax(-1).amax(-1)
    certainty = k.linear_certainty(hidden, head, n_vocab)
    torch.testing.assert_close(certainty.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(certainty, k.linear_greedy(hidden, head, n_vocab)[1], rtol=1e-5, atol=1e-7)
