"""The optimizer step: the device is never waited for, nothing compiles twice, every setting computes the same."""

import contextlib

import numpy as np
import pytest
import torch
from steps import bare_run, step
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import diffusion
import kernels
from model import ModelConfig, Transformer
from training import transfer, update
from training.objective import Objective, compile_and_wrap

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OBJECTIVES = [("ar", "elbo"), ("masked", "elbo"), ("masked", "maskgit"), ("uniform", "elbo"), ("uniform", "paper")]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def setting(objective, loss="elbo", n_layer=2, seq_len=16, d_model=32, n_vocab=90):
    causal, timed = objective == "ar", objective == "uniform"
    config = ModelConfig(n_layer, 2, 2, 16, d_model, 64, n_vocab, n_vocab, seq_len, causal, timed=timed, init_std=0.1)
    return config, diffusion.Process(objective, n_vocab, n_vocab, seq_len, loss=loss)


def batches(process, n, rows=8, short_rows=0.0):
    for i in range(n):
        lengths = data.short_row_lengths(0, np.arange(i * rows, (i + 1) * rows), process.seq_len, short_rows)
        levels = diffusion.noise_levels(process, i * rows, rows, eligible=lengths)
        start = np.random.default_rng(i).integers(0, process.n_vocab, (rows, 1))
        x = (start + np.arange(process.seq_len + 1)) % process.n_vocab  # there is something to learn: counting
        eligible = np.arange(process.seq_len) < lengths[:, None]
        documents = np.where(eligible, 0, -1).astype(np.int32) if short_rows else None
        mine = levels.microbatch_rows(0, 1)
        yield diffusion.make_batch(process, x, levels, mine, eligible, documents=documents)


def train(config, process, steps=4, accumulation=1, compile="no", device=DEVICE, cuda_graphs=False, lr=1e-2, **use):
    """Losses and norms of a few steps, (steps, figures), and the network."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = Transformer(config).init_weights().to(device).use(**use)
    objective = compile_and_wrap(Objective(network, process.loss == "paper"), compile, cuda_graphs=cuda_graphs)
    optimizer = update.make_optimizer(network, lr, (0.9, 0.95), 0.1)
    arrays = batches(process, steps * accumulation)
    stream = (transfer.to_device(transfer.to_tensors(batch), device) for batch in arrays)
    run = bare_run(accumulation, cuda_graphs=cuda_graphs)
    figures = [step(objective, optimizer, stream, run, device) for _ in range(steps)]
    return torch.stack([torch.stack(list(line.values())) for line in figures]).cpu(), network


# ------------------------------------------------------------------------------------------- no waiting, no recompiling


def step_without_values(objective, loss, pretend, monkeypatch, spoil=lambda figures: None, short_rows=0.0):
    """A step on tensors that have shapes but no values: whatever reads one on the host raises."""
    config, process = setting(objective, loss)
    monkeypatch.setattr(kernels, "assumes_gpu", pretend)
    batch = transfer.to_tensors(next(batches(process, 1, short_rows=short_rows)))
    with FakeTensorMode() as fake:
        network = Transformer(config).use("selective")
        optimizer = update.make_optimizer(network, 1e-3, (0.9, 0.95), 0.1)
        batch = diffusion.Batch(*(None if t is None else fake.from_tensor(t) for t in batch))
        for _ in range(2):
            spoil(step(Objective(network, loss == "paper"), optimizer, iter([batch, batch]), bare_run(2)))
    assert update.state_tensors(network, optimizer)["embed.weight.exp_avg"].shape == network.embed.weight.shape


@pytest.mark.parametrize("objective, loss", OBJECTIVES)
@pytest.mark.parametrize("pretend", [False, True])
def test_a_step_reads_no_value_on_the_host(objective, loss, pretend, monkeypatch):
    step_without_values(objective, loss, pretend, monkeypatch, short_rows=0.5 if objective == "masked" else 0.0)


def test_reading_one_would_be_seen(monkeypatch):
    for spoil in (lambda figures: figures["loss"].item(), lambda figures: float(figures["grad_norm"])):
        with pytest.raises(DataDependentOutputException):
            step_without_values("ar", "elbo", False, monkeypatch, spoil)


@on_gpu
@pytest.mark.parametrize("objective, loss", OBJECTIVES)
def test_a_step_does_not_synchronize(objective, loss):
    config, process = setting(objective, loss)
    network = Transformer(config).init_weights().to(DEVICE)
    objective, optimizer = Objective(network, loss == "paper"), update.make_optimizer(network, 1e-3, (0.9, 0.95), 0.1)
    stream = transfer.feed(batches(process, 6), DEVICE)
    for i in range(6):
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        try:
            figures = step(objective, optimizer, stream, device=DEVICE)
            arriving = transfer.AsyncCopy(torch.stack(list(figures.values())))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert arriving.ready(wait=True) and torch.isfinite(arriving.values).all()


@pytest.mark.parametrize("compile, graphs", [("whole", 1), ("blocks", 4)])
def test_nothing_compiles_after_the_first_step(compile, graphs):
    """Whole: one graph. Blocks: one for all but the last, one for the last, the norm and the loss."""
    config, process = setting("masked", n_layer=4)
    torch._dynamo.utils.counters.clear()
    stances = iter([contextlib.nullcontext()])

    @contextlib.contextmanager
    def autocast():  # entered once per forward pass: from the second on a recompilation is an error
        with next(stances, None) or torch.compiler.set_stance("fail_on_recompile"):
            yield

    torch._dynamo.reset()
    torch.manual_seed(0)
    network = Transformer(config).init_weights()
    objective = compile_and_wrap(Objective(network, False), compile)
    optimizer = update.make_optimizer(network, 1e-2, (0.9, 0.95), 0.1)
    stream = (transfer.to_tensors(batch) for batch in batches(process, 10))
    figures = [step(objective, optimizer, stream, bare_run(2, autocast=autocast)) for _ in range(5)]
    records = torch.stack([torch.stack(list(line.values())) for line in figures])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    eager, _ = train(config, process, 5, 2, device=torch.device("cpu"))
    assert torch.allclose(records, eager, rtol=1e-4)


# --------------------------------------------------------------------------------------------- settings that save


@pytest.mark.parametrize("objective, loss", OBJECTIVES)
@pytest.mark.parametrize("recompute", ["elementwise", "selective", "full"])
def test_recomputation_changes_nothing(objective, loss, recompute):
    config, process = setting(objective, loss)
    (plain, a), (saving, b) = train(config, process), train(config, process, recompute=recompute)
    assert torch.equal(plain, saving) if DEVICE.type == "cpu" else torch.allclose(plain, saving, rtol=1e-4)
    if DEVICE.type == "cpu":
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("selective", "full")]


@pytest.mark.parametrize("recompute", ["elementwise", *SLOW])
@pytest.mark.parametrize("compile", ["blocks", pytest.param("whole", marks=pytest.mark.slow)])
def test_compiled_recomputation_changes_nothing(compile, recompute):
    config, process = setting("masked")
    (plain, _), (saving, _) = train(config, process), train(config, process, compile=compile, recompute=recompute)
    assert torch.allclose(plain, saving, rtol=1e-4)


def test_kept_gradients_give_the_same_and_stay_where_they_are():
    config, process = setting("masked")
    plain, _ = train(config, process, accumulation=2)
    kept, network = train(config, process, accumulation=2, cuda_graphs=True)
    assert torch.allclose(plain, kept, rtol=1e-6)
    assert all(p.grad is not None and (p.grad == 0).all() for p in network.parameters())


@on_gpu
def test_cuda_graphs_give_the_same():
    config, process = setting("masked")
    plain, _ = train(config, process, 8, 2)
    replayed, _ = train(config, process, 8, 2, compile="whole", cuda_graphs=True)
    assert torch.allclose(plain, replayed, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------------ fp8


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("rows, k, n", [(16, 16, 16), (48, 64, 80), (64, 208, 32)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_fp8_products_are_close(rows, k, n, scale):
    """Rounding to 3 (2) bits of mantissa errs by 2⁻⁴/√3 (2⁻³/√3) of a value: 3.6 % and 7.2 %, whatever the scale."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    x, w, dy = (torch.randn(*shape, generator=g).mul(scale).to(DEVICE, dtype) for shape in ((rows, k), (n, k), (rows, n)))
    x, w = x.requires_grad_(), w.float().requires_grad_()
    y = kernels.fp8_linear(x.view(2, rows // 2, k), w)
    dx, dw = torch.autograd.grad(y, (x, w), dy.view_as(y))
    assert y.shape == (2, rows // 2, n) and y.dtype == x.dtype and dw.dtype == w.dtype
    assert relative(y.flatten(0, 1), x.double() @ w.double().T) < 0.05
    assert relative(dx, dy.double() @ w.double()) < 0.08 and relative(dw, dy.double().T @ x.double()) < 0.08
    assert torch.isfinite(kernels.fp8_linear(torch.zeros_like(x), w)).all()


def test_fp8_uses_eight_bits_in_every_block_and_trains_alike():
    config, process = setting("ar")
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        working = torch._scaled_mm
        patch.setattr(torch, "_scaled_mm", lambda a, b, **more: calls.append((a.dtype, b.dtype)) or working(a, b, **more))
        eight, _ = train(config, process, 60, fp8=True)
    assert len(calls) == 60 * 2 * 4 * 3  # steps × blocks × (qkv, o, gate+up, down) × (forward, two backward)
    assert {torch.float8_e4m3fn, torch.float8_e5m2} == {t for pair in calls for t in pair}
    full, _ = train(config, process, 60)
    assert full[-1, 0] < 0.3 * full[0, 0]  # it has learned
    assert ((eight[:, 0] - full[:, 0]).abs() < 0.03 * full[0, 0]).all(), (eight[:, 0] - full[:, 0]).abs().max()
    assert not torch.equal(eight, full)


# ---------------------------------------------------------------------------------------------- figures to the host


def test_figures_arrive_as_they_were_when_sent():
    values = torch.arange(6.0, device=DEVICE).reshape(2, 3)
    start = transfer.timestamp(DEVICE)
    arriving = transfer.AsyncCopy(values)
    values.zero_()
    assert arriving.ready(wait=True) and arriving.ready()
    assert arriving.values.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert 0 <= transfer.seconds_between(start, arriving.timestamp) < 10


@on_gpu
def test_uploads_are_what_was_sent():
    _, process = setting("masked")
    sent = [transfer.to_tensors(batch, pin=True) for batch in batches(process, 7)]
    for got, want in zip(transfer.upload((b for b in sent), DEVICE), sent, strict=True):
        for a, b in zip(got, want):
            assert a is b is None or torch.equal(a.cpu(), b)


# ------------------------------------------------------------------------------------------- the optimizer's state


def test_the_optimizer_is_asked_for_its_state():
    """Made without an update it is zero and leaves the weights alone; its size is what memory and disk count on."""
    config, process = setting("masked")
    network = Transformer(config).init_weights()
    optimizer = update.make_optimizer(network, 1e-2, (0.9, 0.95), 0.1)
    before = [p.detach().clone() for p in network.parameters()]
    update.init_state(optimizer, updates=7)
    state = update.state_tensors(network, optimizer)
    assert update.updates(optimizer) == 7 and all((value == 0).all() for value in state.values())
    assert sum(value.numel() for value in state.values()) == update.MOMENTS * network.n_params()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(network.parameters(), before))
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)
    step(Objective(network, False), optimizer, iter([transfer.to_tensors(next(batches(process, 1)))]))
    assert update.updates(optimizer) == 8 and any((value != 0).any() for value in state.values())


@pytest.mark.parametrize("norm, skip_norm, bad", [
    (1.0, 0.0, False), (1.0, 0.5, True), (0.5, 0.5, False), (float("inf"), 0.0, True), (float("nan"), 0.0, True),
    (float("nan"), 5.0, True), (3e38, 0.0, False)])
def test_which_gradients_are_refused(norm, skip_norm, bad):
    assert update.is_bad(norm, skip_norm) is bad
    assert update.is_bad(torch.tensor(norm), skip_norm).item() is bad
