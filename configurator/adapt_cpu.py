# An AR model goes on as masked diffusion: quickstart_ar's weights, shifted, attention annealed from causal to bidirectional.
# Hardware: two CPU cores, about a minute. First: python train.py configurator/quickstart_ar.py
# How far ahead of random weights that is, at equal tokens: results/adapt_cpu.md.
from configurator.quickstart import batch_size, beta1, block_len, corpus, eval_rows, schedule, weight_decay  # noqa: F401

run_dir = "runs/adapt_cpu"
init_from = "runs/quickstart_ar"  # its shape, too; shift=auto: an AR model's predictions stand one position before
anneal = 200
steps = 800
lr = 2e-3
lr_schedule = "wsd"
warmup = 50
decay = 0.3
log_every = 100
eval_every = 400
