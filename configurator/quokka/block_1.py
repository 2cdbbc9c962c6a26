# Block diffusion in blocks of 1 token. After paper.py, gpu.py or tiny.py, with a --run_dir of its own.
# Hardware as that file; a step takes about twice as long.
# Expect, after tiny.py: see results/block_cpu.md; at the other sizes nothing is measured.
diffusion_block = 1
