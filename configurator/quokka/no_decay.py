# Weight-decay ablation: none. After a baseline or its _96_epochs, before or after ar.py, with a --run_dir of
# its own.
# Hardware and time as that file.
# Expect (the paper, after paper.py on C4): training loss 2.77, validation 3.19 nats per GPT-2 token; with
# ar.py 2.40 and 2.85.
weight_decay = 0.0
