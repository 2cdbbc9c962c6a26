"""Several processes as one trainer: how they meet, agree, and divide parameters among them.

torch.distributed does the work: DDP where every rank holds everything, FSDP2 (`fully_shard` on a DeviceMesh)
where parameters, gradients and optimizer state are sharded.
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

import configurator

# Exit code of a run that a signal stopped after it was saved (sysexits' EX_TEMPFAIL): start it again.
STOPPED = 75

LOOPBACK = "127.0.0.1"


class Ranks(NamedTuple):
    """This process's place among all, and the groups by which CPU tensors travel (None if it is single)."""

    rank: int
    world: int
    control: dist.ProcessGroup | None = None  # agreements of the training loop
    saving: dist.ProcessGroup | None = None  # checkpoints, which are written in a thread of their own
    store: tuple = ()  # address of the key-value store through which the ranks found each other
    limit: timedelta | None = None  # of a collective


SINGLE = Ranks(0, 1)


def init_distributed(device, timeout):
    """Meet the other processes that torchrun (or whatever set its environment variables) has started → Ranks.

    CPU tensors go by gloo even where gradients go by NCCL: to agree on something needs no GPU sync then. A
    collective that takes longer than `timeout` seconds raises on gloo and ends the process on NCCL; the
    watchdog comes before that.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return SINGLE
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # PR_SET_PDEATHSIG: a rank whose launcher was killed saves and leaves
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    limit = timedelta(seconds=timeout + 120)
    store = rendezvous(rank, world, limit)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    control = dist.new_group(backend="gloo", timeout=limit)
    saving = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return Ranks(rank, world, control, saving, (store.host, store.port), limit)


def rendezvous(rank, world, limit):
    """The key-value store of this start of the ranks, which rank 0 keeps.

    torchrun has one of its own, but with the entries of starts before: after a restart ranks would call
    processes that are dead (pytorch/pytorch#135712). So it is asked only for the new one's address, and that
    is tried. Where all ranks are on one machine, it is the loopback's: nobody else can reach the store.
    """
    launcher, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    host = LOOPBACK if os.environ.get("LOCAL_WORLD_SIZE") == str(world) else launcher
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        if rank == 0:
            return open_store(host, port, limit)
        return dist.TCPStore(host, port, is_master=False, timeout=limit)
    board, name = dist.TCPStore(launcher, port, is_master=False, timeout=limit), "nanoquokka/store"
    if rank == 0:
        store = open_store(host, 0, limit)
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


def open_store(host, port, limit):
    """A key-value store that this process keeps, at a free port if it is 0."""
    if host != LOOPBACK:  # by itself it listens on every interface
        return dist.TCPStore(host, port, is_master=True, timeout=limit)
    listener = socket.create_server((LOOPBACK, port))
    port = listener.getsockname()[1]
    return dist.TCPStore(host, port, is_master=True, timeout=limit, master_listen_fd=listener.detach())


def shut_down(ranks, code=0):
    """End this process without its groups' destructors: with all ranks, or after an error at once.

    Not by the ordinary way: DDP's destructor would hold Python's lock while it waits for gloo's thread, which
    may itself need that lock to drop its last tensor (torch 2.13; seen to hang).
    """
    if ranks.world > 1 and code in (0, STOPPED):
        dist.barrier(group=ranks.control)
    leave(code)


def leave(code):
    """End this process at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


# -------------------------------------------------------------------------------------------------- agreement


def any_rank(ranks, *flags):
    """For each flag whether any rank has it set."""
    if ranks.world == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(votes, group=ranks.control)
    return tuple(vote > 0 for vote in votes.tolist())


def all_gather(ranks, value):
    """Every rank's value, in order of rank; small picklable ones."""
    if ranks.world == 1:
        return [value]
    values = [None] * ranks.world
    dist.all_gather_object(values, value, group=ranks.control)
    return values


def on_all_ranks(ranks, work, *arguments):
    """Do `work` on every rank → its result; a ValueError or OSError on one of them ends all with its line."""
    result = problem = None
    try:
        result = work(*arguments)
    except (ValueError, OSError) as error:
        problem = str(error) or type(error).__name__
    problems = all_gather(ranks, problem)
    if any(problems):
        first = next(filter(None, problems))
        if not all(problems):
            first = f"rank {problems.index(first)}: {first}"
        configurator.fail(first)
    return result


def wait_for_folder(folder, seconds=60):
    """Whether a folder that another rank has made is there; a network file system may show it late."""
    end = time.monotonic() + seconds
    while not folder.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(1)
    return True


# --------------------------------------------------------------------------------------------------- sharding


def ranks_per_copy(layout, world, ranks_per_node, shard_size=0):
    """Over how many ranks one copy of the state is sharded; shard_size is a hybrid layout's own choice."""
    return {"no": 1, "full": world, "optim": world, "hybrid": shard_size or ranks_per_node}[layout]


def shard(objective, layout, ranks, device, shard_size, dtype):
    """Shard parameters, gradients and optimizer state of an Objective with FSDP2, each block a unit.

    full: parameters are gathered block by block, in the forward and the backward pass (ZeRO-3). optim: they
    stay gathered in between, and gradients stay whole over the micro-batches of a step (ZeRO-1). hybrid: full
    among `shard_size` ranks (0: a node's), and copies of that. In bfloat16 parameters travel in bf16;
    gradients are always summed in fp32, weights kept in it.
    """
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if layout == "hybrid":
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.world))
        within = ranks_per_copy(layout, ranks.world, ranks_per_node, shard_size)
        # groups by hand: those that a mesh makes have torch's own timeout
        grid = torch.arange(ranks.world).view(-1, within)
        groups = [dist.new_subgroups_by_enumeration(members, timeout=ranks.limit)[0]
                  for members in (grid.T.tolist(), grid.tolist())]
        mesh = DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(device.type, (ranks.world,), mesh_dim_names=("shard",))
    param_dtype = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(  # rotary tables stay fp32
        param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in objective.network.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=layout != "optim", mp_policy=policy)
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    register_fsdp_forward_method(objective, "nats_at_positions")
    objective.layout = layout
    return objective


def is_sharded(module):
    """Whether `shard` has been here. (FSDP's own type would have to be imported: seconds, on a CPU.)"""
    return hasattr(module, "set_requires_gradient_sync")


@contextlib.contextmanager
def sync_gradients(objective, last):
    """One forward and backward pass of a step's several: gradients travel in the `last`, if memory allows.

    DDP and optim sum them where they are until then; full passes each micro-batch's on at once (whole
    gradients are what it is there to avoid), hybrid too, but only among the ranks of a copy.
    """
    if is_sharded(objective):
        if objective.layout == "optim":
            objective.set_requires_gradient_sync(last)
            objective.set_reshard_after_backward(last)
        elif objective.layout == "hybrid":
            objective.set_requires_all_reduce(last)
        yield
    elif last or not hasattr(objective, "no_sync"):
        yield
    else:
        with objective.no_sync():
            yield


def reshard(objective):
    """Give back what a forward pass without a backward pass has left gathered."""
    for module in objective.modules():
        if is_sharded(module):
            module.reshard()


def is_dtensor(tensor):
    """Whether a tensor is sharded over ranks. (DTensor is a type that takes seconds to import.)"""
    return hasattr(tensor, "placements")


def local_tensor(tensor):
    """What this rank holds of a DTensor; other tensors as they are."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def full_tensor(tensor):
    """A DTensor's full value on every rank; other tensors as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
