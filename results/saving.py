"""What saving costs: steps of docs_cpu.py with a checkpoint every 50 against steps without, in turns.

    PYTHONPATH=. python results/saving.py corpora/docs

Prints for each round the time of 50 steps with one checkpoint and without, what of it `Saver.save` holds the
loop up, and at the end the extra time per step as a share of a step. A second argument: the rounds (12).
"""

import statistics
import sys
import tempfile
import time

import torch

import configurator
import train
from model import Transformer
from training import checkpoint, checks, update
from training.distributed import SINGLE
from training.objective import Objective, RankClock, compile_and_wrap
from training.state import RunState

STEPS = 50

folder = tempfile.mkdtemp()
flags = [f"--corpus={sys.argv[1]}", "--device=cpu", f"--run_dir={folder}/run"]
cfg = configurator.load(train.Config, ["configurator/docs_cpu.py", *flags])
n_rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 12

run = checks.open_run(cfg, SINGLE, torch.device("cpu"))._replace(steps=10**6)
network = Transformer(run.model_config).init_weights(torch.Generator().manual_seed(0))
objective = compile_and_wrap(Objective(network, False), cfg.compile)
optimizer = update.make_optimizer(network, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)
saver = checkpoint.Saver(folder, network, optimizer, SINGLE, keep=2)
state, clock = RunState(), RankClock(run.device)
feed = train.open_feed(run, state)


def take_steps(saving):
    """Take some steps, after a checkpoint if `saving` → (seconds of all, seconds in `Saver.save`)."""
    start = time.perf_counter()
    if saving:
        saver.save(state.step, train.checkpoint_record(run, state))
    saved = time.perf_counter()
    for _ in range(STEPS):
        train.training_step(run, objective, optimizer, feed, clock)
        state.advance(cfg.batch_size)
    return time.perf_counter() - start, saved - start


take_steps(saving=False)
shares, stalls, without = [], [], 0.0
for number in range(n_rounds):
    seconds = {}
    for saving in (True, False) if number % 2 else (False, True):
        seconds[saving], stall = take_steps(saving)
        if saving:
            stalls.append(stall)
    saver.wait()
    assert not saver.failure
    without = seconds[False]
    shares.append((seconds[True] - without) / without)
    print(f"with a checkpoint {seconds[True]:.3f} s, without {without:.3f} s; "
          f"save() took {stalls[-1] * 1e3:.1f} ms", flush=True)

share = statistics.median(shares)
print(f"extra time per step, as a share of a step (median of {n_rounds} rounds): {share:.2%}; "
      f"save() itself {statistics.median(stalls) / without:.2%} of {STEPS} steps; "
      f"{without / STEPS * 1e3:.1f} ms per step, {network.n_params():,} parameters")
