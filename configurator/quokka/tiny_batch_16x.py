# Batch ablation: 16 times the rows per step (256) on the same tokens at the same learning rate.
# Hardware and time as tiny.py.
# Expect: results/studies_tiny/batch.
from configurator.quokka.tiny import *

run_dir = "runs/quokka/tiny/batch_16x"
batch_size = 16 * batch_size
eval_every, save_every = eval_every // 16, save_every // 16
log_every = log_every // 16
