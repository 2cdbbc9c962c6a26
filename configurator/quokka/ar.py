# The autoregressive twin of the file before it: paper.py, gpu.py, tiny.py or one of their variants. Give it a
# --run_dir of its own.
# Hardware and time as that file.
# Expect (the paper, after paper.py on C4): training loss 2.40, validation 2.85 nats per GPT-2 token.
objective = "ar"
