# Learning-rate ablation: half the baseline's, 1e-4.
# Hardware and time as paper.py.
# Expect (the paper, on C4): training loss 2.77, validation 3.19; with ar.py 2.41 and 2.85.
from configurator.quokka.paper import *

run_dir = "runs/quokka/paper/lr_half"
lr = lr / 2
