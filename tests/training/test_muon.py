"""Muon against torch's own, against fp64, sharded against whole; what it refuses, keeps and resumes."""

import shutil
from functools import partial

import pytest
import torch
from runs import equal_runs, equal_tensors, figures, largest_difference, weights
from safetensors.torch import load_file
from torch._dynamo import lookup_backend
from torch.optim import _muon as torchs
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, Transformer
from training import muon, update
from training.checkpoint import checkpoints

LR, DECAY = 3e-3, 0.2


def network(seed=0):
    config = ModelConfig(2, 2, 1, 16, 32, 80, 60, 60, 24, causal=False)
    return Transformer(config).init_weights(torch.Generator().manual_seed(seed))


def draw_gradients(net, seed):
    """Give every parameter a gradient whose singular values differ by up to a thousand."""
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
        if p.dim() == 2:
            p.grad *= torch.logspace(-2, 1, p.shape[1])


def steps(net, optimizer, n=4, first=0):
    for seed in range(first, first + n):
        draw_gradients(net, seed)
        optimizer.step()


def test_it_is_torchs_muon_and_adamw(monkeypatch):
    """Step for step, to rounding in fp32; torch's own bf16 is off by 10 % of the weights' way."""

    def in_fp32(grad, coefficients, n_steps, eps):
        assert (coefficients, n_steps) == (muon.COEFFICIENTS, muon.ITERATIONS)
        return muon.orthogonalize(grad[None].float())[0]

    cases = (False, torch.float32, 1e-5), (True, torch.float32, 0.1), (True, torch.bfloat16, 0.1)
    for own, dtype, tolerance in cases:
        ours, theirs = network(), network()
        optimizer = update.make_optimizer(ours, LR, (0.9, 0.95), DECAY, "muon", dtype)
        if not own:
            monkeypatch.setattr(torchs, "_zeropower_via_newtonschulz", in_fp32)
        else:
            monkeypatch.undo()
        matrices = [p for name, p in theirs.named_parameters() if update.is_muons(name, p)]
        others = {False: [], True: []}
        for name, p in theirs.named_parameters():
            if not update.is_muons(name, p):
                others[p.dim() > 1].append(p)
        rivals = [
            torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others[True], lr=LR, betas=(0.9, 0.95), weight_decay=DECAY),
            torch.optim.AdamW(others[False], lr=LR, betas=(0.9, 0.95), weight_decay=0.0)]
        for seed in range(4):
            for net in (ours, theirs):
                draw_gradients(net, seed)
            for each in (optimizer, *rivals):
                each.step()
            for (name, p), q, start in zip(
                    ours.named_parameters(), theirs.parameters(), network().parameters()):
                assert (p - q).norm() < tolerance * (q - start).norm(), name


@pytest.mark.parametrize("shape", ((3, 64, 64), (2, 48, 128), (1, 128, 48)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_singular_values_of_an_update_are_near_one(shape, dtype):
    """And its singular vectors are the matrix's own."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = torch.logspace(0, -1.3, s.shape[-1], dtype=torch.float64).expand(s.shape)
    x = u @ torch.diag_embed(s) @ v
    y = muon.orthogonalize(x.to(dtype)).double()
    values = torch.linalg.svdvals(y)
    assert 0.675 < values.min() and values.max() < 1.15, (values.min(), values.max())
    core = u.mT @ y @ v.mT  # diagonal, in the basis of x
    off = core - torch.diag_embed(core.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < (1e-4 if dtype == torch.float32 else 0.06)


def test_the_iteration_is_its_polynomial():
    """Of fp64's singular values: five times a·s + b·s³ + c·s⁵ of s over the norm."""
    torch.manual_seed(0)
    x = torch.randn(24, 40)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = muon.COEFFICIENTS
    for _ in range(muon.ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    y = muon.orthogonalize(x[None])[0]
    torch.testing.assert_close(y.double(), u @ torch.diag(s) @ v, rtol=0, atol=1e-5)


def test_the_size_of_an_update():
    """Its root mean square is about 0.2 · lr, whatever the shape."""
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = update.make_optimizer(net, LR, (0.9, 0.95), 0.0, "muon")
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        if update.is_muons(name, p):
            rms = (p - before[name]).square().mean().sqrt().item()
            assert 0.7 < rms / (0.2 * LR) < 1.2, name


def test_the_flops_of_an_update():
    """As torch counts them."""
    x = torch.randn(3, 40, 24)
    with FlopCounterMode(display=False) as counter:
        muon.orthogonalize(x)
    assert muon.flops(list(x)) == counter.get_total_flops()
    assert muon.flops(list(x), 2) * 3 == muon.flops(list(x)) * 2  # two of three matrices on one of two ranks


def test_matrices_are_divided_by_shape(monkeypatch):
    """At most AT_ONCE numbers on a rank, equally many in each list of a shape; shards allow more of them."""
    monkeypatch.setattr(muon, "AT_ONCE", 5 * 6)
    params = [torch.empty(shape) for shape in [(2, 3)] * 12 + [(3, 2)] * 7 + [(40, 2)] * 3]
    lists = [(len(same), tuple(same[0].shape)) for same in muon.divide_by_shape(params)]
    assert lists == [(4, (2, 3))] * 3 + [(1, (3, 2))] * 7 + [(1, (40, 2))] * 3
    sharded = [(len(same), tuple(same[0].shape)) for same in muon.divide_by_shape(params, 4)]
    assert sharded == [(12, (2, 3)), (7, (3, 2)), (3, (40, 2))]
    assert sum(muon.divide_by_shape(params), []) == params
    # of twelve small ones a rank works at three; of three large ones at one, whole
    assert muon.workspace(params[:12], 4) == 4 * muon.COPIES * 3 * 6
    assert muon.workspace(params[-3:], 4) == 4 * muon.COPIES * 80


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_bad_gradient_changes_nothing(bad):
    """Weights, momenta and the count of updates stay to the bit, as if the step had not been."""
    skipped, clean = network(), network()
    optimizers = [update.make_optimizer(net, LR, (0.9, 0.95), DECAY, "muon") for net in (skipped, clean)]
    for net, optimizer in zip((skipped, clean), optimizers):
        optimizer.found_inf = torch.zeros(())
        steps(net, optimizer, 2)
    draw_gradients(skipped, 99)
    for p in skipped.parameters():
        p.grad.view(-1)[0] = bad
    optimizers[0].found_inf = torch.ones(())
    optimizers[0].step()
    for net, optimizer in zip((skipped, clean), optimizers):
        optimizer.found_inf = torch.zeros(())
        steps(net, optimizer, 2, first=2)
    states = [update.state_tensors(net, optimizer) for net, optimizer in zip((skipped, clean), optimizers)]
    assert equal_tensors(dict(skipped.named_parameters()), dict(clean.named_parameters()))
    assert equal_tensors(*states) and update.updates(optimizers[0]) == update.updates(optimizers[1]) == 4


@pytest.mark.parametrize("backend", ("eager", pytest.param("inductor", marks=pytest.mark.slow)))
def test_fused_it_is_the_same(monkeypatch, backend):
    """Compiled in one piece, once for every shape, though the learning rate moves and a step is refused."""
    compile, graphs = torch.compile, []

    def backend_of_test(graph, inputs):
        graphs.append(graph)
        return lookup_backend(backend)(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(compile, backend=backend_of_test, fullgraph=True))
    torch._dynamo.reset()
    fused, plain = network(), network()
    optimizers = [update.make_optimizer(net, LR, (0.9, 0.95), DECAY, "muon", fuse=fuse)
                  for net, fuse in ((fused, True), (plain, False))]
    n_shapes = len({p.shape for name, p in fused.named_parameters() if update.is_muons(name, p)})
    for step in range(4):
        for net, optimizer in zip((fused, plain), optimizers):
            draw_gradients(net, step)
            update.set_learning_rate(optimizer, LR / (1 + step))
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
        assert len(graphs) == 3 * n_shapes
    for p, q, start in zip(fused.parameters(), plain.parameters(), network().parameters()):
        assert (p - q).norm() <= 1e-5 * (q - start).norm()
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- runs

FLAGS = ["--optimizer=muon", "--steps=12", "--log_every=1", "--save_every=6", "--keep=9", "--local_init"]


def test_a_resumed_run_is_the_uninterrupted_one(run_main, refused):
    whole = run_main(*FLAGS, run="whole")
    resumed = run_main(*FLAGS, run="resumed")
    shutil.rmtree(resumed / "step_00000012")
    assert equal_runs(run_main(*FLAGS, "--resume=yes", run="resumed"), whole)
    assert figures(run_main(*FLAGS[1:], run="adamw")) != figures(whole)
    files = [list((checkpoints(whole.parent / run)[0] / "optimizer").glob("*.safetensors"))[0].stat().st_size
             for run in ("whole", "adamw")]
    assert files[0] < 0.8 * files[1]  # a momentum where there were two moments
    error = refused(*FLAGS[1:], "--resume=yes", run="whole")
    assert "cannot resume with optimizer=adamw what muon has trained" in error and error.count("\n") == 1


def averages(run):
    """{name: tensor} of the newest checkpoint's moving average."""
    return load_file(checkpoints(run)[0] / "ema/model.safetensors")


LAYOUTS = {"ddp4": (4, "--shard=no"), "full2": (2, "--shard=full"), "optim2": (2, "--shard=optim"),
           "hybrid2x2": (4, "--shard=hybrid", "--shard_size=2")}


def test_every_layout_computes_the_same(train_on, corpus, tmp_path):
    """Losses, weights and averages, though two ranks can't halve 85 rows, and not each of four has a matrix.

    One goes on with what two saved.
    """
    flags = [*FLAGS, f"--corpus={corpus}", "--d_ff=85", "--ema=0.9"]
    one = tmp_path / "one"
    train_on(1, *flags, f"--run_dir={one}")
    for name, (world, *layout) in LAYOUTS.items():
        run = tmp_path / name
        train_on(world, *flags, f"--run_dir={run}", *layout)
        assert largest_difference(one, run, names=("loss", "val_loss", "val_ema")) < 1e-5, name
        for read in (weights, averages):
            for key, w in read(one).items():
                torch.testing.assert_close(read(run)[key], w, rtol=1e-4, atol=1e-5)
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "full2/step_00000006", resumed / "step_00000006")
    train_on(1, *flags, f"--run_dir={resumed}", "--resume=yes")
    for key, w in weights(one).items():
        torch.testing.assert_close(weights(resumed)[key], w, rtol=1e-4, atol=1e-5)
