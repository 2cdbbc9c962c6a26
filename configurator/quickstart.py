# Masked diffusion on the documentation inside every CPython (`python data.py docs`), bytes.
# Hardware: two CPU cores, about three minutes. Expect about TODO bits/byte.
run_dir = "runs/quickstart"
corpus = "corpora/docs"
