# What every run of `scaling.py study data_constrained` starts from: little text, read again and again.
# Hardware: two CPU cores; a run takes half a minute to two. Expect what results/data_constrained_cpu has; by
# itself, this file trains a masked model of width 80 on 10,000 bytes for 200 epochs.
# Corpus: python data.py debian:bible-kjv-text --name=kjv

from configurator.sweep_epochs_cpu import *

run_dir = "runs/data_constrained_cpu"
corpus = "corpora/kjv"
d_model = 80
n_head = 5
steps = 2000
lr = 2.5e-3  # that of width 128 is 2e-3; the study scales it by the width's root
lr_schedule = "constant"  # the best moment is looked for along the way
ema = 0.99
eval_every = 100
eval_rows = 256
