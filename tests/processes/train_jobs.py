"""A group of ranks that does one job after the other: starting processes takes longer than runs this short.

    python tests/processes/train_jobs.py FOLDER WORLD

Forks WORLD ranks, so that torch is imported once. FOLDER/0.json, 1.json, … are jobs, done as they appear;
what rank 0 prints (on stderr, too) goes into 0.out, and 0.done says that it is done. A file called stop
ends the group. tests/runs.py (Group) is the other side.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/training")]

import configurator  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from training import checkpoint, distributed, memory, transfer, update, watchdog  # noqa: E402
from training.objective import Objective, compile_and_wrap  # noqa: E402

CPU = torch.device("cpu")


def disturbances(job, rank):
    """The patches under which a job runs: what goes wrong in it, on this rank.

    Loss curves are not drawn: that takes as long as the run.
    """
    yield patch.object(train, "draw_losses", lambda run_dirs, picture: None)
    if "file_bytes" in job:
        yield patch.object(checkpoint, "FILE_BYTES", job["file_bytes"])
    if "no_room_for" in job and rank == 0:
        mkdir = Path.mkdir

        def refuse(path, *arguments, **settings):
            if path.name == job["no_room_for"]:
                raise OSError(28, "No space left on device")
            return mkdir(path, *arguments, **settings)

        yield patch.object(Path, "mkdir", refuse)
    if "unsynced" in job:
        sync_path = checkpoint.sync_path

        def fail(path):
            if job["unsynced"] in str(path):
                raise OSError(5, "Input/output error")
            return sync_path(path)

        yield patch.object(checkpoint, "sync_path", fail)
    if job.get("slow_rank") == rank:
        compute = model.Block.compute

        def slowly(*arguments):
            time.sleep(0.02)
            return compute(*arguments)

        yield patch.object(model.Block, "compute", slowly)


def train_once(job, ranks, watch):
    """train.train() with the job's flags, which must end with the job's exit `code` (0)."""
    torch._dynamo.reset()
    with contextlib.ExitStack() as contexts:
        for disturbance in disturbances(job, ranks.rank):
            contexts.enter_context(disturbance)
        try:
            code = train.train(configurator.load(train.Config, job["flags"]), CPU, watch)
        except SystemExit as stop:
            code = stop.code
    assert code == job.get("code", 0), (job, code)


def measure_memory(job, ranks):
    """Print, as JSON, what a step of a sharded network allocates on rank 0, and what was predicted."""
    from steps import bare_run, step
    from test_memory import case, peak_allocated

    layout, accumulation = job["measure_memory"], job["accumulation"]
    config, arrays = case("masked", **job["shape"])
    batch = transfer.to_tensors(arrays)
    with torch.device("meta"):
        network = model.Transformer(config)
    objective = compile_and_wrap(Objective(network, False), "no", ranks, layout, 0, torch.float32, CPU)
    network.init_weights()
    optimizer = update.make_optimizer(network, 1e-3, (0.9, 0.95), 0.1)

    def work():
        step(objective, optimizer, iter([batch] * accumulation), bare_run(accumulation, ranks=ranks))

    work()
    if ranks.rank:  # only rank 0's is looked at
        return work()
    gc.collect()
    gc.disable()  # what others have left is not to be freed in between
    peak = peak_allocated(work)
    gc.enable()
    parameters = [p.to_local() for p in network.parameters()]
    moments = [value.to_local() for value in update.state_tensors(network, optimizer).values()]
    need = memory.predict(
        config, arrays, False, torch.float32, False, "no", layout=layout, shards=ranks.world,
        accumulating=accumulation > 1)
    sizes = dict(
        parameters=sum(4 * p.numel() for p in parameters), optimizer=sum(4 * m.numel() for m in moments))
    print(json.dumps(dict(sizes, beyond=peak, predicted=need._asdict())), flush=True)


def jobs(folder, watch):
    """Yield (path, job) as they appear, until the folder has a file called stop."""
    for number in range(1_000_000):
        path = folder / f"{number}.json"
        while not path.is_file():
            if (folder / "stop").exists():
                return
            watch.alive()
            time.sleep(0.02)
        yield path, json.loads(path.read_text(encoding="utf-8"))


def work(folder):
    """Do jobs as one rank."""
    ranks = distributed.init_distributed(CPU, 60)
    watch = watchdog.Watchdog(ranks, 60, threading.Event())
    with watchdog.guarded(ranks, watch):
        for path, job in jobs(folder, watch):
            with open(
                path.with_suffix(".out") if ranks.rank == 0 else "/dev/null", "w", encoding="utf-8"
            ) as out:
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                    if "measure_memory" in job:
                        measure_memory(job, ranks)
                    else:
                        train_once(job, ranks, watch)
            torch.distributed.barrier(group=ranks.control)
            if ranks.rank == 0:
                path.with_suffix(".done").touch()
        distributed.shut_down(ranks)


def die_with_parent():
    """Let this process be killed when the one that started it ends, as when pytest is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main():
    folder, world = Path(sys.argv[1]), int(sys.argv[2])
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    children = []
    for rank in range(world):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        child = os.fork()
        if not child:
            die_with_parent()
            work(folder)
        children.append(child)
    for _ in children:
        _, status = os.wait()
        if status:  # the others would wait for it
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            raise SystemExit(1)


if __name__ == "__main__":
    die_with_parent()
    main()
