# Block diffusion on tiny Shakespeare in bytes, in blocks of 4, at the settings that nanoGPT documents for a
# CPU; shakespeare_ar_cpu is the autoregressive one. Heads begin by looking at their neighbours: without that
# a small diffusion model stays at the frequencies of bytes for most of so short a run.
# Hardware: a laptop, about five minutes. Expect 2.01 nats per byte (results/block_cpu.md).
# Corpus: python data.py shakespeare
from configurator.shakespeare_ar_cpu import *

run_dir = "runs/shakespeare_block_cpu"
objective = "masked"
diffusion_block = 4
local_init = True
