# Masked diffusion on tiny Shakespeare in bytes, with nanoGPT's Shakespeare shape: 6 layers, 384 wide.
# Hardware: a GPU (10.7M parameters, 82M tokens; not timed yet). Expect, so far, only this: on one CPU thread,
# 80 steps of 8 rows (164K tokens, five minutes) went from 5.69 to 3.34 nats per byte, which is what byte
# frequencies alone give.
# Corpus: python data.py shakespeare
run_dir = "runs/shakespeare"
corpus = "corpora/shakespeare"
n_layer = 6
n_head = 6
d_model = 384
seq_len = 256
dropout = 0.2
batch_size = 64
steps = 5000
lr = 1e-3
beta2 = 0.99
warmup = 100
eval_every = 250
eval_rows = 0
