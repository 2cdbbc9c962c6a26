"""How much does the trainer cost beyond the model? The same network in a bare loop, for comparison.

    python results/bare_loop.py            # prints tokens/s of a loop shaped like nanoGPT's
    python train.py configurator/shakespeare_ar_cpu.py --run_dir=runs/speed --steps=1000 --eval_every=0 \\
        --save_every=0                     # the trainer's own figure

Random crops from a memory map, AdamW, clipping, compiled; 4 layers, 4 heads, 128 wide, rows of 64, batch 12.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from model import ModelConfig, Transformer

ROWS, SEQ_LEN = 12, 64

torch.manual_seed(0)
tokens = np.memmap("corpora/shakespeare/train.bin", np.uint16, mode="r")
config = ModelConfig(n_layer=4, n_head=4, n_kv_head=4, head_dim=32, d_model=128, d_ff=320,
                     n_vocab=257, mask_id=257, seq_len=SEQ_LEN, causal=True)
network = Transformer(config).init_weights()
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=True)


@torch.compile
def loss_of(x, y):
    logits = F.linear(network(x), network.head)
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def get_batch():
    starts = torch.randint(len(tokens) - SEQ_LEN - 1, (ROWS,))
    x = torch.stack([torch.from_numpy(tokens[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
    y = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
    return x, y


for step in range(1000):
    if step % 100 == 0:
        start = time.perf_counter()
    loss = loss_of(*get_batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if step % 10 == 9:
        loss.item()
    if step % 100 == 99:
        speed = 100 * ROWS * SEQ_LEN / (time.perf_counter() - start)
        print(f"step {step + 1}: {speed / 1e3:.1f}K tok/s", flush=True)
