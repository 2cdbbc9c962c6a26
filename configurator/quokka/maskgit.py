# Loss ablation: MaskGIT's, the bound without its weight. After paper_long.py, gpu_long.py or tiny_long.py,
# with a --run_dir of its own.
# Hardware and time as that file.
# Expect (the paper, after paper_long.py on C4): training loss 3.71 against the bound's 2.73; the two are
# different quantities.
loss = "maskgit"
