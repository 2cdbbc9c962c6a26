# Qwen3-0.6B goes on as masked diffusion, the way of DiffuLLaMA and Dream: shifted predictions, attention
# annealed.
# Hardware: one H100/H200 or more. Expect nothing in particular yet: not measured here.
#
#     python convert.py download Qwen/Qwen3-0.6B --out=ckpts/qwen3
#     python convert.py --source=ckpts/qwen3 --out=runs/qwen3 --verify
#     python data.py text.jsonl --name=qwen --tokenizer=runs/qwen3/tokenizer.json --eos="<|endoftext|>"
#     python train.py configurator/adapt.py
run_dir = "runs/adapt"
corpus = "corpora/qwen"
init_from = "runs/qwen3"
seq_len = 2048
anneal = 2000
tokens = 10e9
batch_size = 256
micro_batch = 8
lr = 1e-4
lr_schedule = "cosine"
warmup = 1000
weight_decay = 0.1
eval_every = 1000
save_every = 1000
