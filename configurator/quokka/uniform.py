# Kernel ablation: uniform diffusion with the paper's loss, read as ½(noisy + clean): inferred, the paper does
# not print the factor. After paper.py, gpu.py or tiny.py, with a --run_dir of its own.
# Hardware and time as that file.
# Expect (the paper, after paper.py on C4): training 3.18 (noisy 6.34, clean 0.165), validation 3.65 (7.26 and
# 0.138); half of each sum would be 3.25 and 3.70. This is no bound; the bound itself is logged beside it as
# val_loss, and loss=elbo trains on it.
objective = "uniform"
loss = "paper"
