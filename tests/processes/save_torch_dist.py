"""Save a checkpoint from several processes, each with its part of every tensor."""

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


class PlanKeeper(dcp.DefaultSavePlanner):
    """Leaves in .metadata what each rank was to write, as Megatron's planner does."""

    def create_global_plan(self, all_plans):
        plans, metadata = super().create_global_plan(all_plans)
        metadata.all_local_plans = all_plans
        return plans, metadata


def save_rank(rank, world, folder, tensors, objects, keeps_plans, store):
    """One rank's part: tensors are sharded along dimensions that `world` divides, each along another."""
    dist.init_process_group("gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    state_dict = {}
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        dims = [dim for dim in range(tensor.dim()) if tensor.shape[dim] % world == 0]
        placement = Shard(dims[number % len(dims)]) if dims else Replicate()
        state_dict[name] = distribute_tensor(tensor, mesh, [placement])
    state_dict["decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"] = "bytes that nobody reads"
    planner = PlanKeeper(flatten_state_dict=False) if keeps_plans else None
    dcp.save(state_dict | objects, checkpoint_id=folder, planner=planner)
    dist.destroy_process_group()
