# Schedule ablation: cosine, r(t) = sin(πt/2). After paper.py, gpu.py or tiny.py, with a --run_dir of its own.
# Hardware and time as that file.
# Expect (the paper, after paper.py on C4): training loss 2.82, validation 3.23 nats per GPT-2 token.
schedule = "cosine"
