# Schedule ablation: poly2, r(t) = t².
# Hardware and time as quokka_1b.
# Expect (the paper, on C4): training loss 2.80, validation 3.26 nats per GPT-2 token.
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_poly2"
schedule = 'poly2'
