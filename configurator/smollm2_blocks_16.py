# The next step after smollm2_blocks: the same model in blocks of 16.
# Hardware: one H100 or H200, about two minutes. Expect a somewhat higher bound: more is written at once.

from configurator.smollm2_blocks import *

run_dir = "runs/smollm2_blocks_16"
init_from = "runs/smollm2_blocks"
diffusion_block = 16
steps = 200
warmup = 20
