# Batch ablation: 16 times the rows per step (4096) on the same tokens at the same learning rate.
# Hardware and time as paper.py.
# Expect (the paper, on C4): training loss 2.85, validation 3.27; with ar.py 2.51 and 2.96.
from configurator.quokka.paper import *

run_dir = "runs/quokka/paper/batch_16x"
batch_size = 16 * batch_size
eval_every, save_every = eval_every // 16, save_every // 16
