# The loss ablation's length, 300/96 of tiny.py: 4.9M tokens. With maskgit.py its other half.
# Hardware as tiny.py, three to five minutes.
# Expect: results/studies_tiny/loss.
from configurator.quokka.tiny import *

run_dir = "runs/quokka/tiny/long"
tokens = tokens * 300 / 96
