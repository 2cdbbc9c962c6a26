# What every run of results/sweep_epochs_cpu starts from: the same models on few unique bytes, for many
# epochs.
# Hardware: two CPU cores. Expect what results/sweep_epochs_cpu/README.md lists; by itself, this file trains
# on 10,000 bytes 200 times.

from configurator.sweep_cpu import *

run_dir = "runs/sweep_epochs_cpu"
unique_tokens = 10_000
eval_rows = 1024  # scaling.py sweep --evals validates often along the way
