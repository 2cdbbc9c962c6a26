# Weight-decay ablation: none.
# Hardware and time as quokka_1b.
# Expect (the paper, on C4): training loss 2.77, validation 3.19 nats per GPT-2 token.
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_no_decay"
weight_decay = 0.0
