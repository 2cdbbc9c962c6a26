# Two-digit additions as question-answer pairs: answers that can be known, for models of 0.8M parameters.
# Hardware: two CPU cores, a few minutes each. Expect nearly every held-out answer to be right
# (results/sft_addition.md).
# Pairs: python results/additions.py > addition.jsonl; python data.py addition.jsonl --sft
# As it is, masked diffusion. AR: --objective=ar --eos_padding=none.
# Blocks: --diffusion_block=4 --eos_padding=block.

run_dir = "runs/sft_addition"
corpus = "corpora/addition"
eos_padding = "row"
n_layer = 4
n_head = 4
d_model = 128
seq_len = 16
local_init = True
batch_size = 256
steps = 1000
optimizer = "muon"
lr = 3e-3
lr_schedule = "wsd"
warmup = 50
decay = 0.3
weight_decay = 0.1
log_every = 100
eval_every = 250
eval_rows = 0
