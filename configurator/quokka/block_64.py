# Block diffusion in blocks of 64 tokens. After paper.py, gpu.py or tiny.py (whose rows these are: full
# diffusion), with a --run_dir of its own.
# Hardware as that file; a step takes about twice as long.
# Expect a bound between full diffusion's and AR's, as on tiny Shakespeare (results/block_cpu.md); nothing is
# measured at these sizes.
diffusion_block = 64
