# Time-sampling ablation: t from a Gaussian whose mean moves from 0 to 1, not corrected for.
# After paper.py, gpu.py or tiny.py, with a --run_dir of its own. Hardware and time as that file.
# Expect (the paper, after paper.py on C4): training loss 3.20 at the end, validation 3.62 (its best on the
# way: 3.23).
time = "moving_gaussian"
