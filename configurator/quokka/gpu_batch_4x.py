# Batch ablation: 4 times the rows per step (256) on the same tokens at the same learning rate.
# Hardware and time as gpu.py.
# Expect: nothing measured yet; what the paper's large models did is in paper_batch_4x.py.
from configurator.quokka.gpu import *

run_dir = "runs/quokka/gpu/batch_4x"
batch_size = 4 * batch_size
eval_every, save_every = eval_every // 4, save_every // 4
