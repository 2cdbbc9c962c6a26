# The loss ablation's length, 300/96 of paper.py: 300B tokens. With maskgit.py its other half.
# Hardware as paper.py, about 137 hours by the same estimate.
# Expect (the paper): training loss 2.73 after 300B tokens of C4; 3.71 with maskgit.py, which is another
# quantity.
from configurator.quokka.paper import *

run_dir = "runs/quokka/paper/long"
tokens = tokens * 300 / 96
