# What every run of results/sweep_cpu starts from: byte-level models of Python source on a CPU (`scaling.py
# sweep` sets size, length and objective).
# Hardware: two CPU cores; a run takes seconds to minutes. Expect what results/sweep_cpu/README.md lists; by
# itself, this file trains the width that its learning rate is for, masked, on 2M bytes: about 2.1 nats per
# byte. How to prepare the corpus is there, too.
#
# The quickstart's findings, but with a tied embedding, so that the number of parameters is the paper's N, and
# as many key heads as heads. Heads are 16 wide at every width. The learning rate is that of width 128.

run_dir = "runs/sweep_cpu"
corpus = "corpora/python"
schedule = "poly2"
n_layer = 2
d_model = 128
head_dim = 16
n_head = 8
seq_len = 64
batch_size = 16
steps = 2000
rope_base = 100.0
init_std = 0.06
scaled_init = False
local_init = True
lr = 2e-3
warmup = 50
beta1 = 0.8
weight_decay = 0.05
log_every = 50
eval_every = 0
eval_rows = 2048
save_every = 0
keep = 1
compile = "no"  # for runs of this length, compiling costs more than it saves; and branches are exact
