"""A training step: the device is never waited for, nothing compiles twice, all settings compute the same."""

import contextlib
import queue

import numpy as np
import pytest
import torch
from runs import until
from steps import bare_run, step
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import diffusion
import kernels
from model import ModelConfig, Transformer
from training import transfer, update
from training.objective import Objective, compile_and_wrap

CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if torch.cuda.is_available() else CPU
OBJECTIVES = [
    ("ar", "elbo"), ("masked", "elbo"), ("masked", "maskgit"), ("uniform", "elbo"), ("uniform", "paper")]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def setting(objective, loss="elbo", n_layer=2, seq_len=16, d_model=32, n_vocab=90):
    """A network's ModelConfig and the Process that it learns."""
    config = ModelConfig(
        n_layer, 2, 2, 16, d_model, 64, n_vocab, n_vocab, seq_len, causal=objective == "ar",
        timed=objective == "uniform", init_std=0.1)
    return config, diffusion.Process(objective, n_vocab, n_vocab, seq_len, loss=loss)


def batches(process, n, rows=8, short_rows=0.0):
    """n batches of arrays, in which there is something to learn: counting."""
    for i in range(n):
        lengths = data.short_row_lengths(0, np.arange(i * rows, (i + 1) * rows), process.seq_len, short_rows)
        levels = diffusion.noise_levels(process, i * rows, rows, n_eligible=lengths)
        start = np.random.default_rng(i).integers(0, process.n_vocab, (rows, 1))
        x = (start + np.arange(process.seq_len + 1)) % process.n_vocab
        eligible = np.arange(process.seq_len) < lengths[:, None]
        documents = np.where(eligible, 0, -1).astype(np.int32) if short_rows else None
        all_rows = levels.microbatch_rows(0, 1)
        yield diffusion.make_batch(process, x, levels, all_rows, eligible, documents=documents)


def as_table(figures):
    """The figures of some steps, [{name: ()}], as one tensor (steps, names)."""
    return torch.stack([torch.stack(list(line.values())) for line in figures]).cpu()


def train(config, process, steps=4, accumulation=1, compile="no", device=DEVICE, cuda_graphs=False,
          short_rows=0.0, **use):
    """Losses and norms of a few steps, (steps, figures), and the network."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    network = Transformer(config).init_weights().to(device).use(**use)
    objective = Objective(network, process.loss == "paper")
    objective = compile_and_wrap(objective, compile, cuda_graphs=cuda_graphs)
    optimizer = update.make_optimizer(network, 1e-2, (0.9, 0.95), 0.1)
    arrays = batches(process, steps * accumulation, short_rows=short_rows)
    stream = (transfer.to_device(transfer.to_tensors(batch), device) for batch in arrays)
    run = bare_run(accumulation, cuda_graphs=cuda_graphs)
    return as_table([step(objective, optimizer, stream, run, device) for _ in range(steps)]), network


# --------------------------------------------------------------------------------- no waiting, no recompiling


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
    moments = update.state_tensors(network, optimizer)
    assert moments["embed.weight.exp_avg"].shape == network.embed.weight.shape


@pytest.mark.parametrize("objective, loss", OBJECTIVES)
@pytest.mark.parametrize("pretend", [False, True])
def test_a_step_reads_no_value_on_the_host(objective, loss, pretend, monkeypatch):
    short_rows = 0.5 if objective == "masked" else 0.0
    step_without_values(objective, loss, pretend, monkeypatch, short_rows=short_rows)


def test_reading_one_would_be_seen(monkeypatch):
    for spoil in (
            lambda figures: figures["loss"].item(), lambda figures: float(figures["grad_norm"]),
            lambda figures: torch.stack(list(figures.values())).tolist()):
        with pytest.raises(DataDependentOutputException):
            step_without_values("ar", "elbo", False, monkeypatch, spoil)


@on_gpu
@pytest.mark.parametrize("objective, loss", OBJECTIVES)
def test_a_step_does_not_synchronize(objective, loss):
    config, process = setting(objective, loss)
    network = Transformer(config).init_weights().to(DEVICE)
    objective = Objective(network, loss == "paper")
    optimizer = update.make_optimizer(network, 1e-3, (0.9, 0.95), 0.1)
    stream = transfer.feed(batches(process, 6), DEVICE)
    for i in range(6):
        torch.cuda.set_sync_debug_mode("error" if i > 1 else "default")
        try:
            figures = step(objective, optimizer, stream, device=DEVICE)
            arriving = transfer.AsyncCopy(torch.stack(list(figures.values())))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert arriving.ready(wait=True) and torch.isfinite(arriving.values).all()


@pytest.mark.slow
@pytest.mark.parametrize("compile, graphs, short_rows", [("whole", 1, 0.0), ("blocks", 4, 0.5)])
def test_nothing_compiles_after_the_first_step(compile, graphs, short_rows):
    """With the compiler's own kernels, which compute what the eager step does.

    Whole: one graph. Blocks: one for all but the last, one each for the last, the norm and the loss.
    Without these kernels, half a minute of the compiler's, test_train.py does the same in seconds; and what
    they compute shows in the loss of .ci/run's quickstart.
    """
    config, process = setting("masked", n_layer=4 if compile == "blocks" else 2)
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
    stream = (transfer.to_tensors(batch) for batch in batches(process, 10, short_rows=short_rows))
    run = bare_run(2, autocast=autocast)
    compiled = as_table([step(objective, optimizer, stream, run) for _ in range(5)])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert not torch._dynamo.utils.counters["graph_break"]
    eager, _ = train(config, process, 5, 2, device=CPU, short_rows=short_rows)
    assert torch.allclose(compiled, eager, rtol=1e-4)


# ----------------------------------------------------------------------------------------- settings that save


@pytest.mark.parametrize("objective, loss", OBJECTIVES)
@pytest.mark.parametrize("recompute", ["elementwise", "selective", "full"])
def test_recomputation_changes_nothing(objective, loss, recompute):
    config, process = setting(objective, loss)
    (plain, a), (saving, b) = train(config, process), train(config, process, recompute=recompute)
    if DEVICE.type == "cpu":
        assert torch.equal(plain, saving)
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    else:
        assert torch.allclose(plain, saving, rtol=1e-4)


@pytest.mark.parametrize("compile, recompute", [
    ("whole", "elementwise"), ("blocks", "selective"), ("whole", "full"),
    *(pytest.param(*both, marks=pytest.mark.slow)
      for both in (("blocks", "elementwise"), ("whole", "selective"), ("blocks", "full")))])
def test_compiled_recomputation_changes_nothing(compile, recompute, without_codegen):
    """What is computed again is decided where forward and backward graph are cut apart, before code."""
    without_codegen("aot_eager_decomp_partition")
    config, process = setting("masked")
    plain, _ = train(config, process, device=CPU)
    saving, _ = train(config, process, compile=compile, recompute=recompute, device=CPU)
    assert torch.allclose(plain, saving, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["elementwise", "selective", "full"])
@pytest.mark.parametrize("compile", ["blocks", "whole"])
def test_compiled_recomputation_with_the_compilers_own_kernels(compile, recompute):
    config, process = setting("masked")
    plain, _ = train(config, process)
    saving, _ = train(config, process, compile=compile, recompute=recompute)
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


# -------------------------------------------------------------------------------------------------------- fp8


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("rows, k, n", [(16, 16, 16), (48, 64, 80), (64, 208, 32)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_fp8_products_are_close(rows, k, n, scale):
    """Rounding to 3 (2) bits of mantissa errs by 2⁻⁴/√3 (2⁻³/√3) of a value: by 3.6 % and 7.2 %."""
    g = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32

    def normal(*shape):
        return torch.randn(*shape, generator=g).mul(scale).to(DEVICE, dtype)

    x, w, dy = normal(rows, k), normal(n, k), normal(rows, n)
    x, w = x.requires_grad_(), w.float().requires_grad_()
    y = kernels.fp8_linear(x.view(2, rows // 2, k), w)
    dx, dw = torch.autograd.grad(y, (x, w), dy.view_as(y))
    assert y.shape == (2, rows // 2, n) and y.dtype == x.dtype and dw.dtype == w.dtype
    assert relative_error(y.flatten(0, 1), x.double() @ w.double().T) < 0.05
    assert relative_error(dx, dy.double() @ w.double()) < 0.08
    assert relative_error(dw, dy.double().T @ x.double()) < 0.08
    assert torch.isfinite(kernels.fp8_linear(torch.zeros_like(x), w)).all()


def test_fp8_uses_eight_bits_in_every_block_and_trains_alike(monkeypatch):
    config, process = setting("ar")
    types, scaled_mm = [], torch._scaled_mm

    def counted(a, b, **settings):
        types.append((a.dtype, b.dtype))
        return scaled_mm(a, b, **settings)

    monkeypatch.setattr(torch, "_scaled_mm", counted)
    eight, _ = train(config, process, 60, fp8=True)
    assert len(types) == 60 * 2 * 4 * 3  # steps × blocks × (qkv, o, gate+up, down) × (forward, two backward)
    assert {torch.float8_e4m3fn, torch.float8_e5m2} == {dtype for pair in types for dtype in pair}
    full, _ = train(config, process, 60)
    first = full[0, 0]
    assert full[-1, 0] < 0.3 * first  # it has learned
    assert (eight[:, 0] - full[:, 0]).abs().max() < 0.03 * first
    assert not torch.equal(eight, full)


# -------------------------------------------------------------------------------- batches there, figures back


def test_prefetching_ends_when_its_reader_leaves(monkeypatch):
    """Also where the queue is full and only the end is left to deliver; and errors arrive."""
    offered = []

    class Watched(queue.Queue):
        def put(self, item, **settings):
            offered.append(item)
            super().put(item, **settings)

    def numbers(fail=False):
        yield from range(5)
        if fail:
            raise ValueError("broken")

    for fail in (False, True):
        offered.clear()
        with monkeypatch.context() as patch:
            patch.setattr(queue, "Queue", Watched)
            stream = transfer.prefetch(numbers(fail), depth=4)
            assert next(stream) == 0
        until(lambda: len(offered) > 5)  # the end, too
        stream.close()  # must not hang
    assert list(transfer.prefetch(numbers())) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="broken"):
        list(transfer.prefetch(numbers(True)))


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


# -------------------------------------------------------------------------------------- the optimizer's state


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_only_matrices_decay(optimizer):
    network = Transformer(setting("masked")[0])
    optimizer = update.make_optimizer(network, 1e-3, (0.9, 0.95), 0.1, optimizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in network.named_parameters():
        assert decay.pop(id(p)) == (0.0 if "norm" in name else 0.1), name
    assert not decay


@pytest.mark.parametrize("name", ("adamw", "muon"))
def test_the_optimizer_is_asked_for_its_state(name):
    """Made without an update it is zero and leaves the weights alone; memory and disk count on its size."""
    config, process = setting("masked")
    network = Transformer(config).init_weights()
    optimizer = update.make_optimizer(network, 1e-2, (0.9, 0.95), 0.1, name)
    before = [p.detach().clone() for p in network.parameters()]
    update.init_state(optimizer, updates=7)
    state = update.state_tensors(network, optimizer)
    assert update.updates(optimizer) == 7 and all((value == 0).all() for value in state.values())
    assert sum(value.numel() for value in state.values()) == update.state_numbers(network, name)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(network.parameters(), before))
    assert all(group["lr"] == 1e-2 for group in optimizer.param_groups)
    step(Objective(network, False), optimizer, iter([transfer.to_tensors(next(batches(process, 1)))]))
    assert update.updates(optimizer) == 8 and any((value != 0).any() for value in state.values())


@pytest.mark.parametrize("norm, skip_norm, bad", [
    (1.0, 0.0, False), (1.0, 0.5, True), (0.5, 0.5, False), (3e38, 0.0, False),
    (float("inf"), 0.0, True), (float("nan"), 0.0, True), (float("nan"), 5.0, True)])
def test_which_gradients_are_refused(norm, skip_norm, bad):
    assert update.is_bad(norm, skip_norm) is bad
    assert update.is_bad(torch.tensor(norm), skip_norm).item() is bad


@pytest.mark.parametrize("clip, expected", ((0.0, 1.0), (10.0, 1.0), (0.5, 0.5)))
def test_a_gradient_is_clipped_to_its_norm(clip, expected):
    """By plain SGD, whose step is the gradient: clipped by its share of the norm, and reported unclipped."""
    config, process = setting("masked")
    batch = transfer.to_tensors(next(batches(process, 1)))
    network = Transformer(config).init_weights()
    objective = Objective(network, False)
    objective(batch)["loss"].backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()])
    network.zero_grad()
    before = [p.detach().clone() for p in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, fused=True)
    figures = step(objective, optimizer, iter([batch]), bare_run(clip=clip * norm.item()))
    moved = torch.nn.utils.get_total_norm([p.detach() - q for p, q in zip(network.parameters(), before)])
    assert figures["grad_norm"].item() == pytest.approx(norm.item())
    assert moved.item() == pytest.approx(expected * norm.item(), rel=1e-4)


# ------------------------------------------------------------------------------------------ nats at positions


def test_nats_at_positions_see_what_training_sees():
    """With an annealed mask they are those of a forward pass by hand, and others than without."""
    config, process = setting("masked", seq_len=16)
    network = Transformer(config).init_weights(torch.Generator().manual_seed(0)).eval()
    objective = Objective(network, False)
    arrays = next(batches(process, 1))
    visible = diffusion.annealed_mask(0, 3, 16, 0.5)
    assert not visible.all() and visible[~np.tri(16, dtype=bool)].any()
    causal, annealed, open_ = (transfer.to_tensors(arrays._replace(visible=mask)) for mask in (
        np.tri(16, dtype=bool), visible, None))
    with torch.no_grad():
        nats = [objective.nats_at_positions(batch) for batch in (causal, annealed, open_)]
        hidden = network(annealed.tokens, visible=annealed.visible).flatten(0, 1)[annealed.index]
        logits = kernels.head_logits(hidden, network.head, config.n_vocab)
        by_hand = torch.nn.functional.cross_entropy(logits, annealed.targets, reduction="none")
        loss = objective(annealed)["loss"]
    torch.testing.assert_close(nats[1], by_hand)
    torch.testing.assert_close(loss, (by_hand * annealed.weights[:, 0]).sum())
    assert (nats[1] - nats[0]).abs().max() > 1e-3 and (nats[1] - nats[2]).abs().max() > 1e-3
