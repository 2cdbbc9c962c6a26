# What every run of results/sweep_epochs_cpu starts from: the same models on few unique bytes, for many epochs.
# Hardware: two CPU cores; what to expect: results/sweep_epochs_cpu/README.md.

from configurator.sweep_cpu import *

eval_rows = 1024  # sweep.py --evals validates often along the way
