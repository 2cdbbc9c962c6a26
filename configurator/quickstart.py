# Masked diffusion on the documentation inside every CPython, with 4096 tokens learned from it.
# Hardware: two CPU cores, about two minutes. Expect about 1.99 bits/byte of validation NELBO (on a
# complete CPython 3.11.7).
# Corpus: python data.py docs --tokenizer=bpe:4096 --name=docs_bpe
#
# Small and shallow on purpose: at a few million tokens, steps count for more than parameters.
# What makes it learn in minutes was measured, one setting at a time: results/quickstart.md.

run_dir = "runs/quickstart"
corpus = "corpora/docs_bpe"
schedule = "poly2"  # the same bound, sampled more often where little is masked: there it learns most
n_layer = 2
n_head = 8
n_kv_head = 2
d_model = 128
seq_len = 64
rope_base = 100.0
init_std = 0.06
scaled_init = False
local_init = True
batch_size = 64
steps = 750
optimizer = "muon"
lr = 12e-3
lr_schedule = "wsd"
warmup = 50
decay = 0.3
beta1 = 0.8
weight_decay = 0.05
ema = 0.99
log_every = 50
eval_every = 375
eval_rows = 1024
