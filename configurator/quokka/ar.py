# The autoregressive twin of quokka_1b.
# Hardware and time as quokka_1b.
# Expect (the paper, on C4): training loss 2.40, validation 2.85 nats per GPT-2 token.
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_ar"
objective = 'ar'
