"""What saving costs: quickstart steps with a checkpoint every 50 against steps without, in turns, in one process.

    PYTHONPATH=. python results/saving.py corpora/docs

Prints for each round the time of 50 steps with one checkpoint and without, what of it `Saver.save` holds the loop up, and
at the end the extra time per step as a share of a step.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import asdict

import torch

import configurator
import diffusion
import kernels
import train
from model import Transformer
from training import checkpoint, update

cfg = configurator.load(train.Config, ["configurator/quickstart.py", f"--corpus={sys.argv[1]}", "--device=cpu", f"--run_dir={tempfile.mkdtemp()}/run"])
inputs = train.open_inputs(cfg)
meta, blocks = inputs.corpora[0].meta, inputs.blocks
process = diffusion.Process(cfg.objective, meta["n_vocab"], meta["mask_id"], cfg.seq_len, cfg.seed)
network = Transformer(inputs.model_config).init_weights(torch.Generator().manual_seed(0))
objective = update.compile_and_wrap(update.Objective(network, False), cfg.compile)
optimizer = update.make_optimizer(network, cfg.lr, (cfg.beta1, cfg.beta2), cfg.weight_decay)
run = tempfile.mkdtemp()
saver = checkpoint.Saver(run, network, optimizer, checkpoint.ALONE, keep=2)
bf16 = cfg.dtype == "bfloat16" or cfg.dtype == "auto" and kernels.has_bf16(torch.device("cpu"))
batches = train.training_batches(process, blocks, meta["eos_id"], 0, 0, 10**6, cfg, 0, 1, False)
record = torch.zeros(2)
stalls = []


def fifty(save, step=[0]):  # noqa: B006
    start = time.perf_counter()
    if save:
        begin = time.perf_counter()
        saver.save(step[0], dict(settings=asdict(cfg), model=asdict(inputs.model_config), pending=[]))
        stalls.append(time.perf_counter() - begin)
    for _ in range(50):
        step[0] += 1
        update.optimizer_step(objective, optimizer, batches, 1, record, cfg.clip, lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16))
    return time.perf_counter() - start


fifty(False)
rounds = []
for number in range(int(sys.argv[2]) if len(sys.argv) > 2 else 12):
    pair = {save: fifty(save) for save in ((True, False) if number % 2 else (False, True))}
    saver.wait()
    assert not saver.failure
    rounds.append((pair[True] - pair[False]) / pair[False])
    print(f"with a checkpoint {pair[True]:.3f} s, without {pair[False]:.3f} s; save() took {stalls[-1] * 1e3:.1f} ms", flush=True)
print(f"extra time per step, as a share of a step (median of {len(rounds)} rounds): {statistics.median(rounds):.2%}; save() itself "
      f"{statistics.median(stalls) / statistics.median([pair[False]]):.2%} of 50 steps; {pair[False] / 50 * 1e3:.1f} ms per step, {network.n_params():,} parameters")
