# Batch ablation: 16 times the rows per step (1024) on the same tokens at the same learning rate.
# Hardware and time as gpu.py.
# Expect: nothing measured yet; what the paper's large models did is in paper_batch_16x.py.
from configurator.quokka.gpu import *

run_dir = "runs/quokka/gpu/batch_16x"
batch_size = 16 * batch_size
eval_every, save_every = eval_every // 16, save_every // 16
