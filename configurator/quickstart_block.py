# Block diffusion on the documentation inside every CPython, the quickstart's network and text in blocks of 16
# bytes. A row is read twice, noisy and clean, in one pass.
# Hardware: two CPU cores, about four minutes. Expect about 2.81 bits/byte (the quickstart 2.84, its AR twin
# 1.96), as measured once on one core.
# Corpus: python data.py docs
from configurator.quickstart import *

run_dir = "runs/quickstart_block"
diffusion_block = 16
