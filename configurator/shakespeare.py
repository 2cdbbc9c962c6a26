# Masked diffusion on tiny Shakespeare in bytes, with nanoGPT's Shakespeare shape: 6 layers, 384 wide.
# Hardware: one GPU, minutes; or a patient CPU. Expected loss: not measured yet.
# Corpus: python data.py shakespeare
run_dir = "runs/shakespeare"
corpus = "corpora/shakespeare"
n_layer = 6
n_head = 6
d_model = 384
block_len = 256
dropout = 0.2
batch_size = 64
steps = 5000
lr = 1e-3
beta2 = 0.99
warmup = 100
eval_every = 250
eval_rows = 0
