# Learning-rate ablation: double the baseline's, 2e-3.
# Hardware and time as gpu.py.
# Expect: nothing measured yet; what the paper's large models did is in paper_lr_double.py.
from configurator.quokka.gpu import *

run_dir = "runs/quokka/gpu/lr_double"
lr = 2 * lr
