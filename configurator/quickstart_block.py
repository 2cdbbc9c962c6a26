# Block diffusion on the documentation inside every CPython, the quickstart's network and text in blocks of 16
# bytes. A row is read twice, noisy and clean, in one pass.
# Hardware: two CPU cores, about six minutes. Expect a bound between the quickstart's and its AR twin's.
# Corpus: python data.py docs
from configurator.quickstart import *

run_dir = "runs/quickstart_block"
diffusion_block = 16
