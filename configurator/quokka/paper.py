# The ablation baseline of the Quokka paper: 1086M parameters (its "1B"), masked diffusion, 96B tokens.
# Hardware: 8 H100/H200; 6ND = 6.3e20 FLOPs, about 44 hours at 50 % MFU (an estimate, not a measurement).
# Expect (the paper, on C4): training loss 2.78, validation 3.21 nats per GPT-2 token.
# Corpus: python data.py c4.jsonl --name=c4 --tokenizer=gpt2
# Run: torchrun --nproc_per_node=8 train.py configurator/quokka/paper.py
run_dir = "runs/quokka/paper/masked"
corpus = "corpora/c4"
model = "1086M"
seq_len = 2048
short_rows = 0.01
tokens = 96e9
batch_size = 256
micro_batch = 8
lr = 2e-4
lr_schedule = "cosine"
warmup = 2000
weight_decay = 0.1
eval_every = 2000
eval_rows = 1024
save_every = 2000
