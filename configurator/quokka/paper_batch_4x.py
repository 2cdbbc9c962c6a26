# Batch ablation: 4 times the rows per step (1024) on the same tokens at the same learning rate.
# Hardware and time as paper.py.
# Expect (the paper, on C4): training loss 2.78, validation 3.20; with ar.py 2.42 and 2.86.
from configurator.quokka.paper import *

run_dir = "runs/quokka/paper/batch_4x"
batch_size = 4 * batch_size
eval_every, save_every = eval_every // 4, save_every // 4
