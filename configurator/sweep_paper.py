# What the runs of the paper's compute-constrained scaling law start from (Figure 2, 87 runs); `scaling.py
# sweep` sets size and length.
# Hardware and corpus as quokka/paper.py. 3e18 FLOPs are 13 minutes on 8 H100/H200 at 50 % MFU, 1e21 three
# days (estimates).
# Expect: the losses of results/quokka/isoflop_points.csv. The paper's batch is 512 rows above 1.5B
# parameters, 1024 above 5B; its lr 1.25e-4 above 8B: put a file that says so after this one
# (--base=A.py,B.py). Run: docs/checkpoints.md
from configurator.quokka.paper import *

run_dir = "runs/sweep_paper"
eval_every = 0  # at the end
