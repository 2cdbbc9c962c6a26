# The ablation baseline on a laptop: 0.4M parameters, masked diffusion, 1.6M bytes of the documentation inside
# CPython.
# Hardware: two CPU cores, one to two minutes. Expect about 3.11 bits/byte of validation NELBO (the
# documentation of CPython 3.11).
# Corpus: python data.py docs
#
# The network is docs_cpu.py's, found by measuring (results/quickstart.md). The rest is in the paper's
# shares: cosine, warm-up 1 % of the steps. So few steps leave the paper's weight decay of 0.1 no time to act:
# lr · weight_decay · steps would be 0.3 (there: 3.7). It is 1.2 here; the paper's product would cost a
# twentieth of a nat.
from configurator.docs_cpu import (  # noqa: F401
    batch_size,
    beta1,
    corpus,
    d_model,
    eval_rows,
    init_std,
    local_init,
    lr,
    n_head,
    n_kv_head,
    n_layer,
    rope_base,
    scaled_init,
    seq_len,
    tied,
)

run_dir = "runs/quokka/tiny/masked"
tokens = 96 * 256 * 64  # 1536 steps; a 96th is 256 blocks
lr_schedule = "cosine"
warmup = 16
weight_decay = 0.4
log_every = 16
eval_every = 192
save_every = 768
