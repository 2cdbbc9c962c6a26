"""Muon for the matrices inside the blocks: momentum with all singular values near 1 (docs/math.md §13).

It computes what torch.optim.Muon does, which takes one whole matrix after the other, always in bf16. Here the
matrices of one shape go through every product together, in the dtype of the run. Each of several ranks takes
some of them, also where all hold shards. A bad gradient changes nothing, and the host need not wait to know.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F

from training.distributed import is_dtensor, local_tensor

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Jordan's quintic: steep at 0, between 0.68 and 1.2 beyond
ITERATIONS = 5
AT_ONCE = 1 << 26  # numbers that a rank has of the matrices that are updated together, or of one matrix
COPIES = 6  # of these that exist at a time
RMS = 0.2  # of an update, about AdamW's: so that its learning rate and weight decay carry over


def advance(momenta, gradients, is_bad, dtype):
    """The momentum of K matrices after a gradient, and Nesterov's direction in `dtype`, both (K, m, n)."""
    momentum, gradient = torch.stack(momenta), torch.stack(gradients)
    new_momentum = momentum.lerp(gradient, 1 - MOMENTUM)
    direction = gradient.lerp(new_momentum, MOMENTUM)
    return torch.where(is_bad > 0, momentum, new_momentum), direction.to(dtype)


def orthogonalize(x):
    """Bring the singular values of matrices (K, m, n) near 1, by Newton-Schulz in their dtype.

    They end between 0.68 and 1.2, but for those that are below a hundredth of the matrix's norm.
    """
    is_tall = x.shape[-2] > x.shape[-1]
    y = x.mT if is_tall else x
    norm = y.norm(dim=(-2, -1), keepdim=True, dtype=torch.float32)
    y = (y / norm.clamp(min=1e-7)).to(x.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if is_tall else y


def apply_update(weights, momenta, momentum, direction, is_bad, step_size, decay):
    """Move K weights along their directions, and keep their momenta; scalars are on the device."""
    # selected, not multiplied by 0: what is bad may be NaN
    step = torch.where(is_bad > 0, 0.0, step_size * direction.float())
    torch._foreach_copy_(momenta, list(momentum.unbind()))
    torch._foreach_mul_(weights, 1 - decay * (1 - is_bad))
    torch._foreach_sub_(weights, list(step.unbind()))


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups that say `muon`: Muon, by the same learning rate and weight decay.

    As AdamW's fused kernel does, it leaves everything as it is where `found_inf` is 1. dtype: of products.
    fuse: compile what is around them, which is worth its time on a GPU.
    """

    def __init__(self, groups, dtype, fuse=False, **settings):
        super().__init__(groups, fused=True, **settings)
        self.dtype, self.found_inf = dtype, None
        parts = advance, orthogonalize, apply_update
        parts = [torch.compile(part, dynamic=False) for part in parts] if fuse else parts
        self.advance, self.orthogonalize, self.apply_update = parts

    @torch.no_grad()
    def step(self):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        for group in groups:
            for params in divide_by_shape(group["params"], shards_of(group)) if group["muon"] else ():
                self.update_matrices(params, group["lr"], group["weight_decay"])

    def update_matrices(self, params, lr, weight_decay):
        """Update K parameters of one shape (m, n)."""
        weights = [local_tensor(p) for p in params]  # of sharded ones this rank's rows
        scalar = weights[0].new_full
        for p in params:
            if not self.state[p]:
                self.state[p] = dict(step=scalar((), 0.0), momentum=torch.zeros_like(p))
        momenta = [local_tensor(self.state[p]["momentum"]) for p in params]
        is_bad = scalar((), 0.0) if self.found_inf is None else self.found_inf

        gradients = [local_tensor(p.grad) for p in params]
        momentum, direction = self.advance(momenta, gradients, is_bad, self.dtype)
        if is_dtensor(params[0]):
            direction = divide_shards(self.orthogonalize, direction, params[0])
        else:
            direction = divide_copies(self.orthogonalize, direction)
        # tensors: their values change with every step, which would compile anew
        step_size = scalar((), lr * RMS * math.sqrt(max(params[0].shape)))
        decay = scalar((), lr * weight_decay)
        self.apply_update(weights, momenta, momentum, direction, is_bad, step_size, decay)
        torch._foreach_add_([self.state[p]["step"] for p in params], 1 - is_bad)


def shards_of(group):
    """How many ranks share each matrix of a group."""
    p = next(iter(group["params"]), None)
    if not is_dtensor(p):
        return 1
    return math.prod(p.device_mesh.size(i) for i, place in enumerate(p.placements) if place.is_shard())


def divide_by_shape(params, shards=1):
    """Yield lists of parameters that are updated together: of one shape, equally many in each list of it.

    So that a rank holds AT_ONCE numbers of them, or one matrix: of sharded ones a rank takes its share.
    """
    shapes = {}
    for p in params:
        shapes.setdefault(p.shape, []).append(p)
    for shape, same in shapes.items():
        most = max(1, AT_ONCE // shape.numel()) * shards
        # equally many: another number of matrices would be compiled anew
        count = next(n for n in range(min(most, len(same)), 0, -1) if len(same) % n == 0)
        for start in range(0, len(same), count):
            yield same[start : start + count]


def workspace(params, shards=1):
    """Bytes, about, that an update of these parameters takes on a rank for a while: of whole matrices."""
    return 4 * COPIES * max(
        -(-len(same) // shards) * same[0].numel() for same in divide_by_shape(params, shards))


def flops(params, ranks=1, shards=1):
    """FLOPs of the products of an update of matrices, on the busiest of the ranks that divide them."""
    total = 0
    for same in divide_by_shape(params, shards):
        short, long = sorted(same[0].shape)
        total += -(-len(same) // ranks) * ITERATIONS * (4 * short * short * long + 2 * short**3)
    return total


def divide_copies(compute, x):
    """compute(x) of matrices (K, m, n) that every rank has: each computes some, and sends them to all."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return compute(x)
    count = -(-len(x) // world)
    own = x[dist.get_rank() * count :][:count]
    own = compute(own) if len(own) else own
    results = x.new_empty(world, count, *x.shape[1:])
    dist.all_gather(list(results), F.pad(own, (0, 0, 0, 0, 0, count - len(own))).contiguous())
    return results.flatten(0, 1)[: len(x)]


def divide_shards(compute, x, p):
    """compute(x) of matrices (K, m, n) of which this rank has its rows of p: each computes some, whole."""
    from torch.distributed.tensor import DTensor, Shard

    shape = len(x), *p.shape
    stride = shape[1] * shape[2], shape[2], 1

    def redistribute(part, dim_before, dim_after):
        before, after = ([Shard(dim) if place.is_shard() else place for place in p.placements]
                         for dim in (dim_before, dim_after))
        matrices = DTensor.from_local(
            part.contiguous(), p.device_mesh, before, run_check=False, shape=shape, stride=stride)
        return matrices.redistribute(placements=after).to_local()

    own = redistribute(x, 1, 0)
    return redistribute(compute(own) if len(own) else own, 0, 1)
