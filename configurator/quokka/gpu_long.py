# The loss ablation's length, 300/96 of gpu.py: 14.2B tokens. With maskgit.py its other half.
# Hardware as gpu.py, about 3 hours by the same estimate.
# Expect: nothing measured yet; what the paper's large models did is in paper_long.py.
from configurator.quokka.gpu import *

run_dir = "runs/quokka/gpu/long"
tokens = tokens * 300 / 96
