# Block diffusion on the documentation inside every CPython, docs_cpu.py's network and text in blocks of 16
# bytes. A row is read twice, noisy and clean, in one pass.
# Hardware: two CPU cores, about four minutes. Expect about 2.81 bits/byte (docs_cpu 2.84, its AR twin
# 1.96), as measured once on one core.
# Corpus: python data.py docs
from configurator.docs_cpu import *

run_dir = "runs/docs_block_cpu"
diffusion_block = 16
