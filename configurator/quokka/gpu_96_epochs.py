# Data-constrained weight-decay ablation: 47M unique tokens, 96 epochs. With no_decay.py its other half.
# Hardware and time as gpu.py.
# Expect: nothing measured yet; what the paper's large models did is in paper_96_epochs.py.
from configurator.quokka.gpu import *

run_dir = "runs/quokka/gpu/96_epochs"
unique_tokens = int(tokens / 96)
lr_schedule = "wsd"
decay = 1000
