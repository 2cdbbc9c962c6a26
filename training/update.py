"""The optimizer: which parameters decay, which gradients are refused, and the state that it keeps."""

import torch

from training.muon import Muon


def is_muons(name, p):
    """Whether the parameter of this name is one of those that Muon updates: a matrix inside a block."""
    return p.dim() == 2 and name.startswith("blocks.")


def state_numbers(network, optimizer, ema=0.0, size_of=torch.Tensor.numel):
    """How many fp32 numbers a run keeps beside the weights.

    AdamW's two moments, or Muon's one momentum, and the moving average if `ema`. size_of: how many numbers of
    a parameter this rank has.
    """
    total = 0
    for name, p in network.named_parameters():
        moments = 1 if optimizer == "muon" and is_muons(name, p) else 2
        total += size_of(p) * (moments + bool(ema))
    return total


def make_optimizer(network, lr, betas, weight_decay, optimizer="adamw", dtype=torch.float32, fuse=False):
    """AdamW, or Muon with AdamW for what is no matrix of a block; norms and biases never decay.

    dtype, fuse: as Muon takes them; weights and states are float32.
    """
    matrices = [p for p in network.parameters() if p.dim() >= 2]
    vectors = [p for p in network.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
    if optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    inside = {p for name, p in network.named_parameters() if is_muons(name, p)}
    groups[0]["params"] = [p for p in matrices if p not in inside]
    in_blocks = dict(params=[p for p in matrices if p in inside], weight_decay=weight_decay, muon=True)
    return Muon([in_blocks, *(group | dict(muon=False) for group in groups)], dtype, fuse, lr=lr, betas=betas)


def parameters(optimizer):
    """All parameters that the optimizer updates."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def set_learning_rate(optimizer, lr):
    """The learning rate of every group from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def decay_steps(decay, steps, warmup=0):
    """How many steps at the end of a wsd run of `steps` decay: `decay`, or below 1 its share of all steps.

    A share is rounded to the nearest whole number, a half to the even one; it is at least one step, and
    leaves the warm-up its steps.
    """
    if decay >= 1:
        return decay
    return max(1, min(round(decay * steps), steps - warmup))


def is_bad(norm, skip_norm):
    """Whether a gradient of this norm is refused: not finite, or above a skip_norm that is not 0.

    norm: a number, or a tensor; then a tensor of bools, without waiting for the device.
    """
    bound = skip_norm or torch.finfo(torch.float32).max
    return ~(norm <= bound) if isinstance(norm, torch.Tensor) else not norm <= bound


# -------------------------------------------------------------------------------------- the optimizer's state


@torch.no_grad()
def init_state(optimizer, updates):
    """Make the optimizer's state where there is none, and set the number of updates it has made.

    torch's optimizers make their state in their first update: so here is one, of zero gradients and learning
    rate. The values themselves are then read into `state_tensors`.
    """
    if not optimizer.state:
        rates = [group["lr"] for group in optimizer.param_groups]
        set_learning_rate(optimizer, 0.0)
        without_gradient = [p for p in parameters(optimizer) if p.grad is None]
        for p in without_gradient:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in without_gradient:
            p.grad = None
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
    for state in optimizer.state.values():
        state["step"].fill_(updates)


def update_count(optimizer):
    """How many updates the optimizer has made, as a scalar on the device."""
    return next(iter(optimizer.state.values()))["step"]


def updates(optimizer):
    """How many updates the optimizer has made."""
    return int(update_count(optimizer))


def state_tensors(network, optimizer):
    """{parameter.key: tensor} of all that the optimizer keeps for each parameter, of its shape, in place."""
    return {
        f"{name}.{key}": value
        for name, p in network.named_parameters()
        for key, value in optimizer.state[p].items() if key != "step"
    }
