# An AR model goes on as masked diffusion: docs_cpu_ar's weights, shifted, attention annealed from causal to
# bidirectional.
# Hardware: two CPU cores, half a minute. First: python train.py configurator/docs_cpu_ar.py
# Expect about 3.65 bits/byte of validation NELBO after these 200 steps; random weights have 4.15, or 3.70
# with local_init. By 800 steps local_init has caught up: results/adapt_cpu.md.
from configurator.docs_cpu import (  # noqa: F401
    batch_size,
    beta1,
    corpus,
    eval_rows,
    schedule,
    seq_len,
    weight_decay,
)

run_dir = "runs/adapt_cpu"
init_from = "runs/docs_cpu_ar"  # its shape, too; shift=auto: AR predictions stand one position before
anneal = 50
steps = 200
lr = 2e-3
lr_schedule = "wsd"
warmup = 50
decay = 0.3
log_every = 50
eval_every = 100
