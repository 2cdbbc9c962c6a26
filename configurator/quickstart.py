# Masked diffusion on the documentation inside every CPython (`python data.py docs`), in bytes.
# Hardware: two CPU cores, about three minutes. Expect about 3.1 bits/byte of validation NELBO.
#
# Small and shallow on purpose: at a few million tokens, steps count for more than parameters.
# local_init and untied embeddings are what make it learn in minutes: see results/local_init.md.

run_dir = "runs/quickstart"
corpus = "corpora/docs"
n_layer = 2
n_head = 8
d_model = 128
block_len = 128
rope_base = 100.0
tied = False
init_std = 0.06
scaled_init = False
local_init = True
batch_size = 8
steps = 2600
lr = 6e-3
warmup = 50
weight_decay = 0.05
log_every = 50
eval_every = 1300
