"""Several runs of train.py one after the other in one set of ranks: starting processes costs more than such short runs.

    torchrun --nproc_per_node=4 tests/processes/train_jobs.py jobs.json        (a list of argument lists)
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import configurator  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from training import (
    checkpoint,  # noqa: E402
    distributed,  # noqa: E402
    update,  # noqa: E402
    watchdog,  # noqa: E402
)

if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device("cpu")
    ranks = distributed.init_distributed(device, 60)
    stop = threading.Event()
    watch = watchdog.Watchdog(ranks, 60, stop)
    checkpoint.FILE_BYTES = float(os.environ.get("FILE_BYTES", checkpoint.FILE_BYTES))
    if os.environ.get("NO_ROOM_FOR") and ranks.rank == 0:
        mkdir = Path.mkdir

        def refuse(path, *arguments, **more):
            if path.name == os.environ["NO_ROOM_FOR"]:
                raise OSError(28, "No space left on device")
            return mkdir(path, *arguments, **more)

        Path.mkdir = refuse
    if os.environ.get("SLOW_RANK") == str(ranks.rank):
        compute = model.Block.compute
        model.Block.compute = lambda *arguments: time.sleep(0.02) or compute(*arguments)
    if os.environ.get("GRADIENTS_TIMES"):
        step = update.optimizer_step

        def scaled(objective, *arguments):
            for p in objective.parameters():
                if not p._backward_hooks:
                    p.register_hook(lambda grad: grad * float(os.environ["GRADIENTS_TIMES"]))
            return step(objective, *arguments)

        update.optimizer_step = scaled
    with watchdog.guarded(ranks, watch):
        for job in jobs:
            try:
                code = train.train(configurator.load(train.Config, job), device, ranks, watch, stop)
            except SystemExit:
                code = 0 if os.environ.get("MAY_FAIL") else 1
            assert code == 0, job
        distributed.shut_down(ranks)
