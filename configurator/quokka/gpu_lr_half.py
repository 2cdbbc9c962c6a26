# Learning-rate ablation: half the baseline's, 5e-4.
# Hardware and time as gpu.py.
# Expect: nothing measured yet; what the paper's large models did is in paper_lr_half.py.
from configurator.quokka.gpu import *

run_dir = "runs/quokka/gpu/lr_half"
lr = lr / 2
