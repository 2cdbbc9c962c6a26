# The last step after smollm2_blocks_16: questions about words, with a dictionary's answers.
# Hardware: one H100 or H200, about two minutes. Expect answers in a dictionary's words (sample.py --chat).
# Pairs: python data.py debian:dict-gcide --sft --tokenizer=runs/smollm2 --name=words_smollm2

from configurator.smollm2_blocks import *

run_dir = "runs/smollm2_sft"
init_from = "runs/smollm2_blocks_16"
corpus = "corpora/words_smollm2"
diffusion_block = 16
document_attention = False  # pairs see themselves alone anyway
eos_padding = "block"
seq_len = 512
batch_size = 64
micro_batch = 32
steps = 300  # about one epoch of 90,000 pairs
warmup = 30
lr = 1e-4
