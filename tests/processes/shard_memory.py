"""What a step really allocates on rank 0 of a divided network: python -m torch.distributed.run --nproc_per_node=2 tests/processes/shard_memory.py LAYOUT ACCUMULATION

Prints bytes of this rank's parameters and moments, and the most that a step allocates beyond them, measured and predicted.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from training.objective import Objective, compile_and_wrap  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/training")]

from test_memory import case  # noqa: E402

from model import Transformer  # noqa: E402
from training import (
    distributed,  # noqa: E402
    memory,  # noqa: E402
    transfer,  # noqa: E402
    update,  # noqa: E402
)

if __name__ == "__main__":
    layout, accumulation, shape = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    device, ranks = torch.device("cpu"), distributed.init_distributed(torch.device("cpu"), 100)
    config, arrays = case("masked", **shape)
    batch, record = transfer.to_tensors(arrays, False), torch.zeros(2)
    with torch.device("meta"):
        network = Transformer(config)
    objective = compile_and_wrap(Objective(network, False), "no", ranks, layout, 0, torch.float32, device)
    network.init_weights()
    optimizer = update.make_optimizer(network, 1e-3, (0.9, 0.95), 0.1)

    def run():
        update.optimizer_step(objective, optimizer, iter([batch] * accumulation), accumulation, record, 1.0, contextlib.nullcontext, ranks.world)

    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    local = [p.to_local() for p in network.parameters()]
    state = [s[k].to_local() for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    need = memory.predict(config, arrays, False, torch.float32, False, "no", layout=layout, shards=ranks.world, accumulating=accumulation > 1)
    if ranks.rank == 0:
        print(json.dumps(dict(
            parameters=sum(t.numel() * 4 for t in local), optimizer=sum(t.numel() * 4 for t in state), beyond=int(max(np.cumsum([e.nbytes() for e in events]))),
            predicted=need._asdict())), flush=True)
    distributed.shut_down(ranks)
