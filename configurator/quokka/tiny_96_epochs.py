# Data-constrained weight-decay ablation: 16K unique tokens, 96 epochs. With no_decay.py its other half.
# Hardware and time as tiny.py.
# Expect: results/studies_tiny/weight_decay.
from configurator.quokka.tiny import *

run_dir = "runs/quokka/tiny/96_epochs"
unique_tokens = int(tokens / 96)
lr_schedule = "wsd"
decay = 0.1
