# SmolLM2-135M, autoregressive, goes on as block diffusion in blocks of 4 on texts of Debian packages.
# Hardware: one H100 or H200, about three minutes (no GPU has run this yet; docs/smollm2.sh does it all).
# Expect a bound within some tenths of a nat of the AR model's likelihood.
# First: docs/serving.md makes runs/smollm2; then, both with --tokenizer=runs/smollm2,
#   python data.py debian:dict-gcide debian:anarchism debian:bible-kjv-text debian:r-cran-janeaustenr \
#       --name=english_smollm2
#   python data.py debian:linux-doc-6.1 debian:perl-doc debian:python3.11-doc --name=technical_smollm2

run_dir = "runs/smollm2_blocks"
init_from = "runs/smollm2"
corpus = "corpora/english_smollm2,corpora/technical_smollm2"
diffusion_block = 4
seq_len = 1024
document_attention = True
batch_size = 64
micro_batch = 16
steps = 400  # 26M tokens, about one epoch
lr = 3e-4
lr_schedule = "wsd"
warmup = 40
decay = 0.3
weight_decay = 0.1
ema = 0.99
dtype = "bfloat16"
eval_every = 200
eval_rows = 256
save_every = 0
