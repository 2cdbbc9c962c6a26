# Data-constrained ablation: 1B unique tokens, 96 epochs. With --weight_decay=0 its other half.
# Hardware and time as quokka_1b.
# Expect (the paper, on C4): training loss 2.72, validation 3.23 nats per GPT-2 token (2.80 and 3.31 without decay).
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_96_epochs"
unique_tokens = 1000000000
lr_schedule = 'wsd'
decay = 1000
