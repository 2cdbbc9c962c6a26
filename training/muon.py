"""Muon for the matrices inside the blocks: momentum with all singular values near 1 (docs/math.md §13).

It computes what torch.optim.Muon does, which takes one whole matrix after the other, always in bf16. Here the
matrices of one shape go through every product together, in the run's dtype; sharded ones are gathered for it,
and a bad gradient changes nothing, without the host's waiting for it.
"""

import math

import torch

from training.distributed import is_dtensor, local_tensor

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan's quintic: steep at 0, between 0.68 and 1.2 beyond
ITERATIONS = 5
AT_ONCE = 1 << 26  # numbers of matrices of one shape that are updated together, or one matrix
COPIES = 8  # of these that exist at a time
RMS = 0.2  # of an update, about AdamW's: so that its learning rate and weight decay carry over


def orthogonalize(x, dtype):
    """Bring the singular values of matrices (K, m, n) near 1, by Newton-Schulz in `dtype`. → as x

    They end between 0.68 and 1.2, but for those that are below a hundredth of the matrix's norm.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    y = x.mT if is_tall else x
    y = (y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if is_tall else y).to(x.dtype)


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups that say `muon`: Muon, by the same learning rate and weight decay.

    As AdamW's fused kernel does, it leaves everything as it is where `found_inf` is 1. dtype: of products.
    """

    def __init__(self, groups, dtype, **settings):
        super().__init__(groups, fused=True, **settings)
        self.dtype, self.found_inf = dtype, None

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for params in alike(group["params"]) if group["muon"] else ():
                self.update_matrices(params, group["lr"], group["weight_decay"])

    def update_matrices(self, params, lr, weight_decay):
        """Update K parameters of one shape (m, n)."""
        weights = [local_tensor(p) for p in params]  # of sharded ones this rank's rows
        gradient = torch.stack([local_tensor(p.grad) for p in params])  # (K, m, n)
        for p in params:
            if not self.state[p]:
                self.state[p] = dict(step=gradient.new_zeros(()), momentum=torch.zeros_like(p))
        momenta = [local_tensor(self.state[p]["momentum"]) for p in params]
        is_bad = gradient.new_zeros(()) if self.found_inf is None else self.found_inf
        step_size = lr * RMS * math.sqrt(max(params[0].shape))

        momentum = torch.stack(momenta)
        new_momentum = momentum.lerp(gradient, 1 - MOMENTUM)
        update = gradient.lerp(new_momentum, MOMENTUM)  # Nesterov's
        update = orthogonalize_shards(update, params[0], self.dtype)
        # selected, not multiplied by 0: what is bad may be NaN
        new_momentum = torch.where(is_bad > 0, momentum, new_momentum)
        update = torch.where(is_bad > 0, 0.0, step_size * update)
        torch._foreach_copy_(momenta, list(new_momentum.unbind()))
        torch._foreach_mul_(weights, 1 - lr * weight_decay * (1 - is_bad))
        torch._foreach_sub_(weights, list(update.unbind()))
        torch._foreach_add_([self.state[p]["step"] for p in params], 1 - is_bad)


def alike(params):
    """Lists of parameters of one shape, as many as may be updated together."""
    shapes = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    for shape, same in shapes.items():
        count = max(1, AT_ONCE // shape.numel())
        for start in range(0, len(same), count):
            yield same[start : start + count]


def workspace(params):
    """Bytes, about, that an update of these parameters takes for a while."""
    return 4 * COPIES * max(len(same) * same[0].numel() for same in alike(params))


def flops(params):
    """FLOPs of the products of an update of matrices: every rank computes all of them."""
    total = 0
    for p in params:
        short, long = sorted(p.shape)
        total += ITERATIONS * (4 * short * short * long + 2 * short**3)
    return total


def orthogonalize_shards(x, p, dtype):
    """`orthogonalize` of K matrices, (K, m, n), that are sharded as the parameter p is; this rank's rows.

    Every rank computes all of it: a share of a step that falls with the tokens per rank.
    """
    if not is_dtensor(p):
        return orthogonalize(x, dtype)
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    placements = [Shard(1) if place.is_shard() else place for place in p.placements]  # p's rows
    shape = len(x), *p.shape
    stride = shape[1] * shape[2], shape[2], 1
    whole = DTensor.from_local(x, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)
    result = orthogonalize(whole.full_tensor(), dtype)
    return distribute_tensor(result, p.device_mesh, placements, src_data_rank=None).to_local()
