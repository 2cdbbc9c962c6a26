# Time-sampling ablation: t from a Gaussian whose mean moves from 0 to 1, not corrected for.
# Hardware and time as quokka_1b.
# Expect (the paper, on C4): training loss 3.20 at the end, validation 3.62 (its best on the way: 3.23).
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_moving_gaussian"
time = 'moving_gaussian'
