# smollm2_blocks on a CPU, with the first and the last of the model's thirty layers: does the recipe work?
# Hardware: two CPU cores, about ten minutes (results/smollm2_cpu.md). Expect 200 steps to bring the bound
# below that of random weights after as many.
# First: python convert.py --source=runs/smollm2 --layers=0,29 --to=ours --out=runs/smollm2_cut

from configurator.smollm2_blocks import *

run_dir = "runs/smollm2_cut_blocks"
init_from = "runs/smollm2_cut"
corpus = "corpora/english_smollm2"
seq_len = 128
batch_size = 16
micro_batch = 0
steps = 200
warmup = 20
lr = 1e-3
ema = 0.0
dtype = "auto"
log_every = 20
eval_every = 100
eval_rows = 64
