"""A checkpoint divided among processes, which import no more than this needs."""

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def save(rank, world, place, whole, store):
    """One rank's part: tensors that can be are divided along a dimension of their own."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    out = {}
    for number, (name, w) in enumerate(sorted(whole.items())):
        dims = [d for d in range(w.dim()) if w.shape[d] % world == 0]
        out[name] = distribute_tensor(w, mesh, [Shard(dims[number % len(dims)]) if dims else Replicate()])
    out["decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = "bytes that nobody reads"
    dcp.save(out, checkpoint_id=place)
    dist.destroy_process_group()
