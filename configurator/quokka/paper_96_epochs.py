# Data-constrained weight-decay ablation: 1B unique tokens, 96 epochs. With no_decay.py its other half.
# Hardware and time as paper.py.
# Expect (the paper, on C4): training loss 2.72, validation 3.23 (2.80 and 3.31 with no_decay.py); with ar.py
# 1.26 and 4.76, its best on the way 3.49 (0.92, 6.52 and 3.50 with no_decay.py).
from configurator.quokka.paper import *

run_dir = "runs/quokka/paper/96_epochs"
unique_tokens = int(tokens / 96)
lr_schedule = "wsd"
decay = 1000
