# Kernel ablation: uniform diffusion with the paper's loss, ½(noisy + clean).
# Hardware and time as quokka_1b.
# Expect (the paper, on C4): training 3.18 (noisy 6.34, clean 0.165), validation 3.65 (7.26 and 0.138).
# This is no bound; the bound itself is logged beside it as val_loss, and loss=elbo trains on it.
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_uniform"
objective = 'uniform'
loss = 'paper'
