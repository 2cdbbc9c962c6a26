# Learning-rate ablation: double the baseline's, 4e-4.
# Hardware and time as paper.py.
# Expect (the paper, on C4): training loss 2.80, validation 3.20; with ar.py 2.40 and 2.83.
from configurator.quokka.paper import *

run_dir = "runs/quokka/paper/lr_double"
lr = 2 * lr
