"""The operations where speed and memory are decided, as plain PyTorch for torch.compile to fuse.

Each takes the hidden states of just the positions that count, multiplies by the LM head and reduces
over the vocabulary. Columns at and above `n_vocab` (mask token, padding) are excluded from every
softmax, so no probability is ever spent on them.
"""

import torch
import torch.nn.functional as F


def head_logits(hidden, head, n_vocab):
    """Logits in fp32 with the excluded columns at -inf. hidden (C, D), head (V_padded, D) → (C, V_padded)."""
    logits = F.linear(hidden, head).float()
    excluded = torch.arange(logits.shape[-1], device=logits.device) >= n_vocab
    return logits.masked_fill(excluded, float("-inf"))


def linear_cross_entropy(hidden, head, targets, n_vocab):
    """−log softmax(hidden headᵀ)[target] over the text tokens, in nats. hidden (C, D), targets (C,) → (C,) fp32."""
    return F.cross_entropy(head_logits(hidden, head, n_vocab), targets, reduction="none")


def linear_uniform_bound(hidden, head, z, x, beta, n_vocab, posterior):
    """The integrand of the uniform-diffusion bound without its factor −α′/(Vα), in nats (SPEC §6).

    hidden (C, D); z, x (C,) noisy and true tokens; beta (C,) = Vα/(1−α). `posterior`: the network was
    trained with cross-entropy, so its logits are the full posterior's; the bound wants the
    leave-one-out posterior, which lies log(1+β) lower at the noisy token. Returns (C,) fp32.
    """
    logits = head_logits(hidden, head, n_vocab)
    if posterior:
        logits = logits.scatter_add(1, z[:, None], -torch.log1p(beta)[:, None])
    return uniform_bound(F.softmax(logits, dim=-1)[:, :n_vocab], z, x, beta)


def uniform_bound(probs, z, x, beta):
    """Σ_j [ r_j log(r_j/ρ_j) − r_j + ρ_j ] for predictions `probs` (C, V); see SPEC §6.

    With u_j = (1−α)(1 + β·x̂_j) the factor (1−α) cancels from every ratio, and what remains is written
    so that the terms of order V that cancel are never formed: exact to rounding from α → 0 to α → 1.
    """
    n_vocab = probs.shape[-1]
    log_u_sum = torch.log1p(beta[:, None] * probs).sum(-1)  # Σ_j log ũ_j
    bz = beta * probs.gather(1, z[:, None])[:, 0]  # β·x̂_z
    bx = beta * probs.gather(1, x[:, None])[:, 0]
    log_z, log_x, log_beta = torch.log1p(bz), torch.log1p(bx), torch.log1p(beta)
    kept = (-(n_vocab - 1) * log_beta - log_u_sum + n_vocab * log_z + (n_vocab + beta) * (beta - bz) / (1 + bz)) / (1 + beta)
    moved = (1 + beta) * log_beta - log_u_sum - beta * log_x + (n_vocab + beta) * (log_z - bz / (1 + bz))
    return torch.where(z == x, kept, moved)
