# Learning-rate ablation: double the baseline's, 4e-3.
# Hardware and time as tiny.py.
# Expect: results/studies_tiny/lr.
from configurator.quokka.tiny import *

run_dir = "runs/quokka/tiny/lr_double"
lr = 2 * lr
