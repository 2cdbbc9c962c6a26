# Schedule ablation: poly2, r(t) = t². After paper.py, gpu.py or tiny.py, with a --run_dir of its own.
# Hardware and time as that file.
# Expect (the paper, after paper.py on C4): training loss 2.80, validation 3.26 nats per GPT-2 token.
schedule = "poly2"
