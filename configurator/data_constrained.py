# What every run of `scaling.py study data_constrained --scale=gpu` starts from: 50M to 200M unique tokens of
# the paper's corpus, read 50 to 200 times.
# Hardware: one H100; by 6ND 8e18 FLOPs for 127M parameters, five hours at 40 % MFU. Not measured yet: Expect
# what the tiny scale shows, if it carries over.
# Corpus: python data.py c4.jsonl --name=c4 --tokenizer=gpt2

run_dir = "runs/data_constrained"
corpus = "corpora/c4"
model = "127M"
seq_len = 2048
unique_tokens = 100_000_000
tokens = 1e10
batch_size = 64
micro_batch = 16
lr = 5e-4
lr_schedule = "constant"
warmup = 500
weight_decay = 0.1
ema = 0.999
eval_every = 2000
eval_rows = 1024
save_every = 2000
