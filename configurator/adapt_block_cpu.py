# An AR model goes on as block diffusion in blocks of 4: quickstart_ar's weights, as they are, neither shifted
# nor annealed.
# Hardware: two CPU cores, half a minute. First: python train.py configurator/quickstart_ar.py
# Expect about 3.00 bits/byte after these 200 steps (7.59 before the first, 3.27 after 100).
from configurator.quickstart import batch_size, beta1, corpus, eval_rows, schedule, seq_len, weight_decay  # noqa: F401

run_dir = "runs/adapt_block_cpu"
init_from = "runs/quickstart_ar"
diffusion_block = 4
steps = 200
lr = 2e-3
lr_schedule = "wsd"
warmup = 50
decay = 0.3
log_every = 50
eval_every = 100
