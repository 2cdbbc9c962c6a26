# The ablation baseline on one GPU: 51M parameters of the paper's ladder, masked diffusion, 4.5B tokens (the
# paper's 89 per parameter).
# Hardware: one H100; 6ND = 6 · 50.7e6 · 4.53e9 = 1.4e18 FLOPs (--dry_run, with attention and the head where
# it is needed: 320 MFLOP per token, 1.45e18), an hour if MFU is 40 %, which is assumed, not measured; AR 1.1,
# uniform 1.3 hours. 12 GiB of memory, predicted.
# Expect: nothing measured yet; the paper's law (eq. 13) says 4.4 nats per GPT-2 token for this size and these
# tokens on its corpus.
# Corpus: python data.py c4.jsonl --name=c4 --tokenizer=gpt2 (4.6B tokens; 14.2B for the long runs)
#
# A quarter of the paper's tokens per step and five times its learning rate: a fifth of its steps, but lr ·
# steps is 35 as there (37), so that weight decay has the time it takes to leave its mark. Warm-up is 1.1 % of
# the steps, as there.
run_dir = "runs/quokka/gpu/masked"
corpus = "corpora/c4"
model = "51M"
seq_len = 2048
short_rows = 0.01
tokens = 96 * 23040 * 2048  # 34 560 steps; a 96th is a whole number of blocks
batch_size = 64
micro_batch = 32
lr = 1e-3
lr_schedule = "cosine"
warmup = 378
weight_decay = 0.1
eval_every = 720
eval_rows = 1024
save_every = 720
