# What the runs of the paper's data-constrained scaling law start from (Figure 4, 48 curves); `scaling.py
# sweep` sets size, unique tokens and epochs.
# Hardware and corpus as quokka/paper.py. 6ND of 1086M parameters on 49M unique tokens, 1000 epochs: 3.2e20
# FLOPs, about a day on 8 H100/H200 (an estimate).
# Expect: the curves of results/quokka/epoch_curves.csv. The paper's batch is 512 rows above 1.5B parameters,
# 1024 above 5B; its lr 1.25e-4 above 8B: put a file that says so after this one (--base=A.py,B.py). Run:
# docs/checkpoints.md
from configurator.quokka.paper import *

run_dir = "runs/sweep_epochs_paper"
unique_tokens = 49_000_000
lr_schedule = "wsd"
decay = 1000
