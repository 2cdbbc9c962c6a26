# Masked diffusion on tiny Shakespeare in bytes, large enough to see what samplers do: 4 layers, 128 wide, 512
# bytes of context.
# Hardware: two CPU cores, about twenty minutes (18M tokens). Expect 1.81 nats per byte of validation NELBO.
# Corpus: python data.py shakespeare
from configurator.docs_cpu import *

run_dir = "runs/shakespeare_cpu"
corpus = "corpora/shakespeare"
n_layer = 4
n_kv_head = 8
seq_len = 512
rope_base = 1000.0
batch_size = 8
steps = 4500
eval_every = 1500
eval_rows = 0
