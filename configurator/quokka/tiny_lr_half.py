# Learning-rate ablation: half the baseline's, 1e-3.
# Hardware and time as tiny.py.
# Expect: results/studies_tiny/lr.
from configurator.quokka.tiny import *

run_dir = "runs/quokka/tiny/lr_half"
lr = lr / 2
