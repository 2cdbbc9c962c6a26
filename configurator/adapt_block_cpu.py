# An AR model goes on as block diffusion in blocks of 4: docs_cpu_ar's weights, as they are, neither shifted
# nor annealed.
# Hardware: two CPU cores, half a minute. First: python train.py configurator/docs_cpu_ar.py
# Expect about 3.00 bits/byte after these 200 steps (7.59 before the first, 3.27 after 100).
from configurator.adapt_cpu import *

run_dir = "runs/adapt_block_cpu"
diffusion_block = 4
anneal = 0
