# Batch ablation: 4 times the rows per step (64) on the same tokens at the same learning rate.
# Hardware and time as tiny.py.
# Expect: results/studies_tiny/batch.
from configurator.quokka.tiny import *

run_dir = "runs/quokka/tiny/batch_4x"
batch_size = 4 * batch_size
eval_every, save_every = eval_every // 4, save_every // 4
log_every = log_every // 4
