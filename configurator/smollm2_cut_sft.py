# smollm2_sft on a CPU, after smollm2_cut_blocks: two layers learn to answer like a dictionary.
# Hardware: two CPU cores, about ten minutes (results/smollm2_cpu.md). Expect the form of answers, no truth.
# Pairs: python data.py debian:dict-gcide --sft --tokenizer=runs/smollm2 --name=words_smollm2

from configurator.smollm2_cut_blocks import *

run_dir = "runs/smollm2_cut_sft"
init_from = "runs/smollm2_cut_blocks"
corpus = "corpora/words_smollm2"
document_attention = False
eos_padding = "block"
