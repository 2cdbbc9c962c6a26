# Loss ablation: MaskGIT's, the bound without its weight, on 300B tokens.
# Hardware as quokka_1b, about 137 hours by the same estimate. Its twin: quokka_1b with --tokens=300e9.
# Expect (the paper, on C4): training loss 3.71 against the bound's 2.73; the two are different quantities.
from configurator.quokka_1b import *

run_dir = "runs/quokka_1b_maskgit"
loss = 'maskgit'
tokens = 300000000000.0
