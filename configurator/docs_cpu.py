# Masked diffusion on the documentation inside every CPython, in bytes: the quickstart of the time when the
# runs of quokka/tiny.py and shakespeare_cpu.py were made.
# Hardware: two CPU cores, about three minutes. Expect about 2.84 bits/byte of validation NELBO
# (on a complete CPython 3.11.7; another Python's documentation makes 0.1 either way).
# Corpus: python data.py docs
#
# Small and shallow on purpose: at a few million tokens, steps count for more than parameters.
# What makes it learn in minutes was measured, one setting at a time: results/quickstart.md.

run_dir = "runs/docs_cpu"
corpus = "corpora/docs"
schedule = "poly2"  # the same bound, sampled more often where little is masked: there it learns most
n_layer = 2
n_head = 8
n_kv_head = 2
d_model = 128
seq_len = 64
rope_base = 100.0
tied = False
init_std = 0.06
scaled_init = False
local_init = True
batch_size = 16
steps = 3200
lr = 2e-3
lr_schedule = "wsd"
warmup = 50
decay = 0.3
beta1 = 0.8
weight_decay = 0.05
log_every = 100
eval_every = 1600
eval_rows = 1024
