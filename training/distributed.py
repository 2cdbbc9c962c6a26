"""Several processes as one trainer: groups, layouts, agreement, and who is missing when one falls silent.

torch.distributed does the work: DDP where every rank holds everything, FSDP2 (`fully_shard` on a DeviceMesh) where
parameters, gradients and optimizer state are divided.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

STOPPED = 75  # exit code of a run that a signal stopped after it was saved (sysexits' EX_TEMPFAIL): start it again


class Ranks(NamedTuple):
    """This process's place among all, and the groups that CPU tensors travel by (None where it is alone)."""

    rank: int
    world: int
    control: dist.ProcessGroup | None = None  # agreements of the training loop
    saving: dist.ProcessGroup | None = None  # checkpoints, which are written in a thread of their own
    store: tuple = ()  # address of the key-value store through which the ranks found each other
    limit: timedelta | None = None  # of a collective


SINGLE = Ranks(0, 1)


def init_distributed(device, timeout):
    """Meet the other processes that torchrun (or whatever set its environment variables) has started.

    CPU tensors go by gloo even where gradients go by NCCL: to agree on something needs no GPU sync then. A collective that
    takes longer than `timeout` seconds raises on gloo and ends the process on NCCL; `Watch` comes before that.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return SINGLE
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a rank whose launcher was killed saves and leaves
    limit = timedelta(seconds=timeout + 120)
    store = rendezvous(rank, world, limit)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=limit)
    control, saving = dist.new_group(backend="gloo", timeout=limit), dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return Ranks(rank, world, control, saving, (store.host, store.port), limit)


def rendezvous(rank, world, limit):
    """The store of this start of the ranks, which rank 0 keeps.

    torchrun has one of its own, but with the entries of starts before: after a restart ranks would call processes that are
    dead (pytorch/pytorch#135712). So it is asked only for the new one's address, and what is read there is tried.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(host, port, world, is_master=rank == 0, timeout=limit)
    board, name = dist.TCPStore(host, port, is_master=False, timeout=limit), "nanoquokka/store"
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=limit)
        board.set(name, str(store.port))
        return store
    end = time.monotonic() + limit.total_seconds()
    while True:
        port = int(board.get(name))
        try:
            socket.create_connection((host, port), timeout=10).close()
            store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
            store.set_timeout(limit)
            return store
        except (OSError, dist.DistError) as problem:  # nobody there, or somebody else
            if time.monotonic() > end:
                raise TimeoutError(f"rank 0 was not met at {host}:{port} ({problem})") from None
            time.sleep(0.2)


def shut_down(ranks, code=0):
    """End this process without the destructors of its groups: once all ranks are here, or after an error at once."""
    if ranks.world > 1 and code in (0, STOPPED):
        dist.barrier(group=ranks.control)
    # Not by the ordinary way: DDP's destructor would hold Python's lock while it waits for gloo's thread, which may
    # itself need that lock to drop its last tensor (torch 2.13; seen to hang).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def any_rank(ranks, *flags):
    """For each flag whether any rank has it set."""
    if ranks.world == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(votes, group=ranks.control)
    return tuple(vote > 0 for vote in votes.tolist())


def wait_for_folder(folder, seconds=60):
    """Whether a folder that another rank has made is there; a network file system may take its time to show it."""
    end = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


def all_gather(ranks, thing):
    """What every rank says, in order of rank; small picklable things."""
    if ranks.world == 1:
        return [thing]
    things = [None] * ranks.world
    dist.all_gather_object(things, thing, group=ranks.control)
    return things


# ---------------------------------------------------------------------------------------------------------- layouts


def shard_ranks(kind, world, local, size=0):
    """Over how many ranks one copy of the state is divided; `local` are a node's, `size` a hybrid's own choice."""
    return {"no": 1, "full": world, "optim": world, "hybrid": size or local}[kind]


def shard(objective, kind, ranks, device, size, dtype):
    """Divide parameters, gradients and optimizer state of `objective` (update.Objective) with FSDP2, each block a unit.

    full: parameters are gathered block by block, in the forward and the backward pass (ZeRO-3). optim: they stay gathered in
    between, and gradients stay whole over the micro-batches of a step (ZeRO-1). hybrid: full among `size` ranks
    (0: a node's), and copies of that. In bfloat16 parameters travel in bf16; gradients are always summed in fp32, weights kept in it.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if kind == "hybrid":
        within = shard_ranks(kind, ranks.world, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world)), size)
        grid = torch.arange(ranks.world).view(-1, within)  # groups by hand: those that a mesh makes have torch's own timeout
        groups = [dist.new_subgroups_by_enumeration(lists, timeout=ranks.limit)[0] for lists in (grid.T.tolist(), grid.tolist())]
        mesh = DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("shard",))
    low = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)  # rotary tables stay fp32
    for block in objective.network.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=kind != "optim", mp_policy=policy)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    register_fsdp_forward_method(objective, "look")
    objective.layout = kind
    return objective


def is_sharded(module):
    """Whether `shard` has been here. (FSDP's own type would have to be imported: seconds, on a CPU.)"""
    return hasattr(module, "set_requires_gradient_sync")


@contextlib.contextmanager
def microbatch(objective, last):
    """One forward and backward pass of a step's several: gradients travel in the `last`, as far as the layout's memory allows.

    DDP and optim sum them where they are until then; full passes each micro-batch's on at once (whole gradients are what it
    is there to avoid), hybrid too, but only among the ranks of a copy.
    """
    if is_sharded(objective):
        if objective.layout == "optim":
            objective.set_requires_gradient_sync(last)
            objective.set_reshard_after_backward(last)
        elif objective.layout == "hybrid":
            objective.set_requires_all_reduce(last)
        yield
    else:
        with contextlib.nullcontext() if last or not hasattr(objective, "no_sync") else objective.no_sync():
            yield


def reshard(objective):
    """Give back what a forward pass without a backward pass has left gathered."""
    for module in objective.modules():
        if is_sharded(module):
            module.reshard()


def full_tensor(tensor):
    """A DTensor's full value on every rank; other tensors as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ------------------------------------------------------------------------------------------------------------ watch


