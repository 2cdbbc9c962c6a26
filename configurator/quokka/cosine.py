# Schedule ablation: cosine.
# Hardware and time as quokka_1b.
# Expect (the paper, on C4): training loss 2.82, validation 3.23 nats per GPT-2 token.
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_cosine"
schedule = 'cosine'
