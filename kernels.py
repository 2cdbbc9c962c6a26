"""The operations where speed and memory are decided: LM head with loss, fp8 products, attention.

A kernel here is three things side by side: a short PyTorch reference, which torch.compile fuses and which
runs on CPUs and where Triton is missing; the Triton kernel; and a `torch.library.custom_op` through which
autograd, torch.compile, DDP and FSDP see it. Only what Inductor cannot do by itself is written by hand: it
would keep the logits, their fp32 copy and their gradient; here each chunk of logits exists once, and the
gradient is written over it. Noise has no kernel: diffusion.py draws it on the host, 65 536 tokens in 2 to
5 ms (bench.py's `host`) of a thread that waits otherwise, while the device computes their step for 100 ms
and more.

Columns at and above `n_vocab` (mask token, padding) are excluded from every softmax, so no probability is
ever spent on them.
"""

import contextlib
import functools
import platform
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.flop_counter import register_flop_formula

try:
    import triton
    import triton.language as tl
except ImportError:  # then the references run everywhere
    triton = None


assumes_gpu = False  # training/memory.py sets it: trace a GPU's way with tensors that have no values


def has_kernels(tensor):
    """Whether the Triton kernels run where `tensor` is."""
    return assumes_gpu or triton is not None and tensor.is_cuda


def on_cpu(tensor):
    return tensor.device.type == "cpu" and not assumes_gpu


def in_eager_inference(tensor):
    """Whether this is a CPU without gradients or torch.compile: there, chunks keep the logits in cache."""
    return on_cpu(tensor) and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def has_bf16(device):
    """Whether the hardware itself multiplies bfloat16 matrices; oneDNN also emulates that, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ------------------------------------------------------------------------------------- head and loss in one
# Both losses return (Σ weights·nats, nats): the first () fp32 and differentiable by the hidden states and
# the head, the second (C,) fp32 for statistics only.

CPU_ROWS = 128  # rows in a chunk of eager inference on a CPU


def linear_cross_entropy(hidden, head, targets, weights, n_vocab):
    """Compute −log softmax(hidden headᵀ)[target] over the text tokens, in nats, and its weighted sum.

    hidden (C, D), head (V_padded, D), targets (C,), weights (C,) → () and (C,) fp32.
    """
    if has_kernels(hidden):
        return fused_head_loss(hidden, head, targets, weights, None, None, n_vocab, False)
    if in_eager_inference(hidden):
        chunks = []
        for rows, y in zip(hidden.split(CPU_ROWS), targets.split(CPU_ROWS)):
            chunks.append(-head_log_probs(rows, head, n_vocab).gather(1, y[:, None])[:, 0])
        nats = torch.cat(chunks)
        return (nats * weights).sum(), nats
    nats = F.cross_entropy(head_logits(hidden, head, n_vocab), targets, reduction="none")
    return (nats * weights).sum(), nats.detach()


def linear_uniform_bound(hidden, head, z, x, beta, weights, n_vocab, posterior):
    """Compute the integrand of the uniform bound without its factor −α′/(Vα), in nats, and its weighted sum.

    docs/math.md §6. hidden (C, D); z, x (C,) noisy and true tokens; beta (C,) = Vα/(1−α). `posterior`: the
    network was trained with cross-entropy, so its logits are the full posterior's; the bound wants the
    leave-one-out posterior, which lies log(1+β) lower at the noisy token. Returns () and (C,) fp32.
    """
    if has_kernels(hidden):
        return fused_head_loss(hidden, head, x, weights, z, beta, n_vocab, posterior)
    if in_eager_inference(hidden) and len(hidden) > CPU_ROWS:  # it forms several tensors as large as logits
        chunks = []
        for inputs in zip(*(tensor.split(CPU_ROWS) for tensor in (hidden, z, x, beta, weights))):
            _, nats = linear_uniform_bound(inputs[0], head, *inputs[1:], n_vocab, posterior)
            chunks.append(nats)
        nats = torch.cat(chunks)
        return (nats * weights).sum(), nats
    logits = head_logits(hidden, head, n_vocab)
    if posterior:
        logits = logits.scatter_add(1, z[:, None], -torch.log1p(beta)[:, None])
    nats = uniform_bound(F.softmax(logits, dim=-1)[:, :n_vocab], z, x, beta)
    return (nats * weights).sum(), nats.detach()


def head_logits(hidden, head, n_vocab):
    """Compute logits in fp32, excluded columns at −∞. hidden (C, D), head (V_padded, D) → (C, V_padded)."""
    logits = F.linear(hidden, head).float()
    excluded = torch.arange(logits.shape[-1], device=logits.device) >= n_vocab
    return logits.masked_fill(excluded, float("-inf"))


def head_log_probs(hidden, head, n_vocab):
    """Compute log-probabilities of the text tokens in fp32, over the logits: (C, n_vocab). No gradients."""
    logits = inference_product(hidden, head[:n_vocab]).float()
    return torch.log_softmax(logits, -1, out=logits)


def inference_product(x, weight):
    """Compute x weightᵀ. (M, K), (N, K) → (M, N).

    In eager inference in fp32 on a CPU it is oneDNN's, to which torch itself leaves other types only: a chunk
    of the head takes half as long as by MKL on AMD's CPUs, as long on Intel's (results/cpu_products.md).
    """
    is_fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if is_fp32 and in_eager_inference(x) and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def uniform_bound(probs, z, x, beta):
    """Σ_j [ r_j log(r_j/ρ_j) − r_j + ρ_j ] for predictions `probs` (C, V), by docs/math.md §6. → (C,)

    With u_j = (1−α)(1 + β·x̂_j) the factor (1−α) cancels from every ratio. The bound is left over from terms
    of order V and β that cancel; they are never formed. Below β = 1 it is written in y − log(1 + y), for it
    is O(β²) there: right to rounding from α → 0 to α → 1.
    """
    V, small = probs.shape[-1], beta < 1
    b = beta[:, None] * probs
    terms = torch.where(small[:, None], x_minus_log1p(b), torch.log1p(b))
    total = terms.sum(-1)  # Σ_j log ũ_j, or β minus that
    bz, bx = (b.gather(1, token[:, None])[:, 0] for token in (z, x))  # β·x̂_z, β·x̂_x
    log_z, log_x, log_beta = torch.log1p(bz), torch.log1p(bx), torch.log1p(beta)
    excess_z, excess_beta = x_minus_log1p(bz), x_minus_log1p(beta)

    kept = torch.where(
        small,
        (beta - bz) * (beta - V * bz) / (1 + bz) + (V - 1) * excess_beta + total - V * excess_z,
        -(V - 1) * log_beta - total + V * log_z + (V + beta) * (beta - bz) / (1 + bz),
    ) / (1 + beta)
    moved = torch.where(
        small,
        beta * (beta - log_x) - (1 + beta) * excess_beta + total
        + (V + beta) * (bz * bz / (1 + bz) - excess_z),
        (1 + beta) * log_beta - total - beta * log_x + (V + beta) * (log_z - bz / (1 + bz)),
    )
    return torch.where(z == x, kept, moved)


def x_minus_log1p(x):
    """x − log(1 + x) for x ≥ 0, to fp32's rounding.

    Below 0.4 by the series of 2·atanh(x/(2 + x)), which begins with x itself.
    """
    s = x / (2 + x)
    q = s * s
    series = s * (x - 2 * q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11))))))
    return torch.where(x < 0.4, series, x - torch.log1p(x))


# ------------------------------------------------------------------------------------------- Triton kernels

# Rows whose logits exist at one time: enough for efficient products, 2.4 GB in bf16 at GPT-2's vocabulary.
GPU_ROWS = 24_576

if triton is not None:

    @triton.jit
    def text_logits(logits, column, width: tl.constexpr, n_vocab: tl.constexpr):
        """Load logits of one row in fp32, −∞ beyond the text tokens.

        The width is a multiple of 64, n_vocab odd as often as not: a load masked by the width goes by 16
        bytes, one masked by n_vocab by 2.
        """
        y = tl.load(logits + column, mask=column < width, other=-float("inf")).to(tl.float32)
        return tl.where(column < n_vocab, y, -float("inf"))

    @triton.jit
    def cross_entropy_rows(logits, targets, weights, nats, width: tl.constexpr, n_vocab: tl.constexpr,
                           BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
        """Store a row's nats, logsumexp − logit[target]; then weight·(softmax − one-hot) over its logits."""
        row = tl.program_id(0).to(tl.int64)  # row·width passes 2³¹ near row 42 700 of a GPT-2 vocabulary
        logits += row * width
        lane = tl.arange(0, BLOCK)
        top, total = -float("inf"), 0.0  # online softmax: Σ exp(logit − top)
        for start in range(0, n_vocab, BLOCK):
            y = text_logits(logits, start + lane, width, n_vocab)
            new = tl.maximum(top, tl.max(y, 0))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(y - new), 0)
            top = new
        lse = top + tl.log(total)
        target = tl.load(targets + row)
        tl.store(nats + row, lse - tl.load(logits + target).to(tl.float32))
        if BACKWARD:
            tl.debug_barrier()  # the target's logit is read before another thread overwrites it
            weight = tl.load(weights + row)
            for start in range(0, width, BLOCK):
                column = start + lane
                y = text_logits(logits, column, width, n_vocab)
                gradient = weight * (tl.exp(y - lse) - tl.where(column == target, 1.0, 0.0))
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < width)

    @triton.jit
    def tl_x_minus_log1p(x):
        """`x_minus_log1p` of one value or a block."""
        s = x / (2.0 + x)
        q = s * s
        series = s * (x - 2.0 * q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11))))))
        return tl.where(x < 0.4, series, x - tl.log(1.0 + x))

    @triton.jit
    def tl_log1p(x):
        """log(1 + x) for x ≥ 0, to rounding (the plain logarithm is coarse near 1)."""
        return tl.where(x < 0.4, x - tl_x_minus_log1p(x), tl.log(1.0 + x))

    @triton.jit
    def uniform_bound_rows(logits, targets, weights, noisy, betas, nats, width: tl.constexpr,
                           n_vocab: tl.constexpr, POSTERIOR: tl.constexpr, BACKWARD: tl.constexpr,
                           BLOCK: tl.constexpr):
        """Store a row's `uniform_bound`; then the gradient over its logits.

        The bound depends on the probabilities p through S = Σ log(1+βp_j) (or β − S), p_z and p_x. With g_j
        its derivative by p_j, that by logit j is p_j·(g_j − Σ_k p_k g_k). A constant may be left out of g: of
        S's share β/(1+βp_j), β itself where β is small, so that the difference loses no digits.
        """
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        lane = tl.arange(0, BLOCK)
        x, z, beta = tl.load(targets + row), tl.load(noisy + row), tl.load(betas + row)
        log_beta = tl_log1p(beta)
        shift = log_beta if POSTERIOR else 0.0  # what logit z loses
        top, total = -float("inf"), 0.0
        for start in range(0, n_vocab, BLOCK):
            column = start + lane
            y = text_logits(logits, column, width, n_vocab)
            y = tl.where(column == z, y - shift, y)
            new = tl.maximum(top, tl.max(y, 0))
            total = total * tl.exp(top - new) + tl.sum(tl.exp(y - new), 0)
            top = new
        norm = 1.0 / total  # log(total) added to a large top would round away digits that p needs
        S, T = 0.0, 0.0  # T = Σ_k p_k times S's share of g_k
        for start in range(0, n_vocab, BLOCK):
            column = start + lane
            y = text_logits(logits, column, width, n_vocab)
            p = tl.exp(tl.where(column == z, y - shift, y) - top) * norm
            S += tl.sum(tl.where(beta < 1.0, tl_x_minus_log1p(beta * p), tl_log1p(beta * p)), 0)
            T += tl.sum(p * beta * tl.where(beta < 1.0, -beta * p, 1.0) / (1.0 + beta * p), 0)
        pz = tl.exp(tl.load(logits + z).to(tl.float32) - shift - top) * norm
        px = tl.exp(tl.load(logits + x).to(tl.float32) - tl.where(x == z, shift, 0.0) - top) * norm
        bz, bx = beta * pz, beta * px
        log_z, log_x, V = tl_log1p(bz), tl_log1p(bx), n_vocab * 1.0
        excess_z, excess_beta = tl_x_minus_log1p(bz), tl_x_minus_log1p(beta)
        kept = tl.where(
            beta < 1.0,
            (beta - bz) * (beta - V * bz) / (1.0 + bz) + (V - 1.0) * excess_beta + S - V * excess_z,
            -(V - 1.0) * log_beta - S + V * log_z + (V + beta) * (beta - bz) / (1.0 + bz),
        ) / (1.0 + beta)
        moved = tl.where(
            beta < 1.0,
            beta * (beta - log_x) - (1.0 + beta) * excess_beta + S
            + (V + beta) * (bz * bz / (1.0 + bz) - excess_z),
            (1.0 + beta) * log_beta - S - beta * log_x + (V + beta) * (log_z - bz / (1.0 + bz)),
        )
        stays = z == x
        tl.store(nats + row, tl.where(stays, kept, moved))
        if BACKWARD:
            tl.debug_barrier()
            by_S = tl.where(stays, -1.0 / (1.0 + beta), -1.0)
            by_z = tl.where(
                stays,
                -beta * beta * (V * (1.0 - pz) + 1.0 + beta) / ((1.0 + beta) * (1.0 + bz) * (1.0 + bz)),
                (V + beta) * beta * bz / ((1.0 + bz) * (1.0 + bz)),
            )
            by_x = tl.where(stays, 0.0, -beta * beta / (1.0 + bx))
            mean = by_S * T + pz * by_z + px * by_x  # Σ_k p_k g_k
            weight = tl.load(weights + row)
            for start in range(0, width, BLOCK):
                column = start + lane
                y = text_logits(logits, column, width, n_vocab)
                p = tl.exp(tl.where(column == z, y - shift, y) - top) * norm
                by_p = beta * tl.where(beta < 1.0, -beta * p, 1.0) / (1.0 + beta * p)
                g = by_S * by_p + tl.where(column == z, by_z, 0.0) + tl.where(column == x, by_x, 0.0)
                gradient = weight * p * (g - mean)
                tl.store(logits + column, gradient.to(logits.dtype.element_ty), mask=column < width)

    @triton.jit
    def greedy_rows(logits, tokens, probs, width: tl.constexpr, n_vocab: tl.constexpr, BLOCK: tl.constexpr):
        """Store a row's likeliest token, the first of equals, and its probability."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * width
        lane = tl.arange(0, BLOCK)
        top, total, token = -float("inf"), 0.0, 0
        for start in range(0, n_vocab, BLOCK):
            y = text_logits(logits, start + lane, width, n_vocab)
            here = tl.max(y, 0)
            token = tl.where(here > top, start + tl.argmax(y, 0), token)
            new = tl.maximum(top, here)
            total = total * tl.exp(top - new) + tl.sum(tl.exp(y - new), 0)
            top = new
        tl.store(tokens + row, token)
        tl.store(probs + row, 1.0 / total)


def launch_settings(width):
    """Block size and warps for rows of `width` columns."""
    block = min(4096, triton.next_power_of_2(width))
    return dict(BLOCK=block, num_warps=max(1, min(8, block // 512)))


# ------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("nanoquokka::head_loss", mutates_args=())
def head_loss(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    noisy: torch.Tensor | None,
    beta: torch.Tensor | None,
    n_vocab: int,
    posterior: bool,
    backward: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute loss, nats and the loss's gradients by `hidden` and `head`, in chunks of rows.

    Gradients are empty without `backward`. The library multiplies; one program per row reduces its logits and
    writes their gradient over them. The weights are folded in there, before the product that sums over rows.
    noisy, beta: of the uniform bound.
    """
    rows, width = hidden.shape[0], head.shape[0]
    targets, weights = targets.contiguous(), weights.contiguous()
    noisy, beta = (None if t is None else t.contiguous() for t in (noisy, beta))
    loss, nats, grad_hidden, grad_head = empty_outputs(hidden, head, backward)
    settings = launch_settings(width)
    chunk_rows = -(-rows // max(1, -(-rows // GPU_ROWS)))  # chunks of equal size
    buffer = hidden.new_empty(chunk_rows, width)
    for start in range(0, rows, max(1, chunk_rows)):
        part = slice(start, min(start + chunk_rows, rows))
        logits = buffer[: part.stop - start]
        grid = (len(logits),)
        torch.mm(hidden[part], head.t(), out=logits)
        if noisy is None:
            cross_entropy_rows[grid](
                logits, targets[part], weights[part], nats[part], width, n_vocab, backward, **settings
            )
        else:
            uniform_bound_rows[grid](
                logits, targets[part], weights[part], noisy[part], beta[part], nats[part], width, n_vocab,
                posterior, backward, **settings
            )
        if backward:
            torch.mm(logits, head, out=grad_hidden[part])
            beta_of_sum = float(start > 0)  # 0 ignores what was there
            torch.addmm(grad_head, logits.t(), hidden[part], beta=beta_of_sum, out=grad_head)
    if backward and rows == 0:
        grad_head.zero_()
    return torch.dot(nats, weights, out=loss), nats, grad_hidden, grad_head


def empty_outputs(hidden, head, backward):
    """Memory for what `head_loss` returns."""
    loss = hidden.new_empty((), dtype=torch.float32)
    nats = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if not backward:
        return loss, nats, hidden.new_empty(0), hidden.new_empty(0)
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_head = torch.empty_like(head, memory_format=torch.contiguous_format)
    return loss, nats, grad_hidden, grad_head


@head_loss.register_fake
def _(hidden, head, targets, weights, noisy, beta, n_vocab, posterior, backward):
    return empty_outputs(hidden, head, backward)


def save_gradients(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])


def scale_gradients(ctx, grad_loss, *_):
    grad_hidden, grad_head = ctx.saved_tensors
    return grad_loss * grad_hidden, grad_loss * grad_head, *(None,) * 7


head_loss.register_autograd(scale_gradients, setup_context=save_gradients)


@register_flop_formula(torch.ops.nanoquokka.head_loss)
def _(hidden, head, targets, weights, noisy, beta, n_vocab, posterior, backward, **_):
    return 2 * hidden[0] * hidden[1] * head[0] * (3 if backward else 1)


def fused_head_loss(hidden, head, targets, weights, noisy, beta, n_vocab, posterior):
    """Compute (loss, nats) by `head_loss` in autocast's precision, with gradients if any are wanted."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head = hidden.to(dtype), head.to(dtype)
    backward = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    weights = weights.float()
    loss, nats, *_ = head_loss(hidden, head, targets, weights, noisy, beta, n_vocab, posterior, backward)
    return loss, nats.detach()


def linear_greedy(hidden, head, n_vocab):
    """Find the likeliest text token at each position and its probability. No gradients.

    hidden (C, D), head (V_padded, D) → (C,) int64 and (C,) fp32.
    """
    if has_kernels(hidden):
        return head_greedy(hidden.detach(), head.detach(), n_vocab)
    if len(hidden) > CPU_ROWS and in_eager_inference(hidden):
        tokens, probs = zip(*(linear_greedy(rows, head, n_vocab) for rows in hidden.split(CPU_ROWS)))
        return torch.cat(tokens), torch.cat(probs)
    logits = head_logits(hidden.detach(), head.detach(), n_vocab)
    top, tokens = logits.max(-1)
    return tokens, (top - logits.logsumexp(-1)).exp()


def linear_confidence(hidden, head, n_vocab):
    """Compute the probability of the likeliest text token at each position. hidden (C, D) → (C,) fp32.

    No gradients. On a CPU far cheaper than finding which token that is: product and softmax are vectorized
    (argmax isn't), and the logits of a chunk stay in the cache.
    """
    if has_kernels(hidden):
        return head_greedy(hidden.detach(), head.detach(), n_vocab)[1]
    head, chunks = head[:n_vocab].detach(), []
    for rows in hidden.detach().split(CPU_ROWS):
        probs = inference_product(rows, head).float()
        chunks.append(torch.softmax(probs, -1, out=probs).amax(-1))
    return torch.cat(chunks)


@torch.library.custom_op("nanoquokka::head_greedy", mutates_args=())
def head_greedy(hidden: torch.Tensor, head: torch.Tensor, n_vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_greedy` without ever forming probabilities, in chunks of rows."""
    rows, width = len(hidden), head.shape[0]
    tokens = hidden.new_empty(rows, dtype=torch.int64)
    probs = hidden.new_empty(rows, dtype=torch.float32)
    for start in range(0, rows, GPU_ROWS):
        logits = hidden[start : start + GPU_ROWS] @ head.t()
        grid = (len(logits),)
        greedy_rows[grid](logits, tokens[start:], probs[start:], width, n_vocab, **launch_settings(width))
    return tokens, probs


@head_greedy.register_fake
def _(hidden, head, n_vocab):
    tokens = hidden.new_empty(len(hidden), dtype=torch.int64)
    return tokens, hidden.new_empty(len(hidden), dtype=torch.float32)


# --------------------------------------------------------------------------------------------- fp8 products


def fp8_linear(x, weight):
    """x weightᵀ in 8 bits: both factors and, in the backward pass, the gradient. (…, K), (N, K) → (…, N).

    One scale per tensor. e4m3 for values, e5m2 (wider range) for gradients; products accumulate in fp32 and
    come out as x's type. K, N and the number of rows must be multiples of 16. Pays on Hopper and later, from
    widths near 1500 on.
    """
    return Fp8Linear.apply(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)


def to_fp8(x, dtype):
    """Scale x so that its largest magnitude is the type's maximum → x·scale in 8 bits, 1/scale () fp32."""
    scale = torch.finfo(dtype).max / x.abs().amax().float().clamp_min(1e-12)
    return (x.float() * scale).to(dtype), scale.reciprocal()


class Fp8Linear(torch.autograd.Function):
    """`fp8_linear` of a matrix. It saves 8 bits per value, half of bf16.

    The hardware multiplies row-major by column-major matrices only.
    """

    @staticmethod
    def forward(ctx, x, weight):
        x8, x_unit = to_fp8(x, torch.float8_e4m3fn)
        w8, w_unit = to_fp8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, w8, x_unit, w_unit)
        ctx.weight_dtype = weight.dtype
        return torch._scaled_mm(
            x8, w8.t(), scale_a=x_unit, scale_b=w_unit, out_dtype=x.dtype, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx, grad):
        x8, w8, x_unit, w_unit = ctx.saved_tensors
        g8, g_unit = to_fp8(grad, torch.float8_e5m2)
        options = dict(out_dtype=grad.dtype, use_fast_accum=False)
        by_columns = w8.t().contiguous().t()
        grad_x = torch._scaled_mm(g8, by_columns, scale_a=g_unit, scale_b=w_unit, **options)
        by_columns = x8.t().contiguous().t()
        grad_w = torch._scaled_mm(
            g8.t().contiguous(), by_columns, scale_a=g_unit, scale_b=x_unit, **options
        )
        return grad_x, grad_w.to(ctx.weight_dtype)


# ------------------------------------------------------------------------------------------------- attention

# On a CPU torch's flash attention is made for long rows: up to these lengths plain products are faster, which
# torch.compile fuses with the softmax. Those of bf16 run on oneDNN, those inside flash don't.
PLAIN_ATTENTION_UP_TO = {
    torch.float32: 64 if torch.cpu._is_avx512_supported() else 128,
    torch.bfloat16: 512,
}


def attention(q, k, v, mask, causal, dropout):
    """Softmax attention. q, k, v (B, H, L, head_dim), mask of one of the functions below or None → as q."""
    L = q.shape[-2]
    if isinstance(mask, list):
        return attention_in_chunks(q, k, v, mask, dropout)
    if isinstance(mask, BlockMask):
        # outside a compiled model it must be compiled by itself: else it forms all the scores
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # on CPUs Inductor's misreads strides (2.13)
        return flex(q, k, v, block_mask=mask)
    if not on_cpu(q) or L > PLAIN_ATTENTION_UP_TO.get(q.dtype, 0) or dropout:
        is_causal = causal and mask is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal and mask is None:
        mask = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def has_flex(tensor):
    """Whether FlexAttention works where `tensor` is: on CPUs it has no gradients."""
    return tensor.is_cuda


def document_mask(documents, causal, dropout):
    """Make the mask that lets a position attend within its own document only. documents (B, L) ids.

    On a GPU FlexAttention skips the blocks that hold no such pair (it has no dropout); elsewhere the mask is
    (B, 1, L, L) of bool.
    """
    B, L = documents.shape
    if has_flex(documents) and not dropout:

        def is_visible(b, h, i, j):
            same = documents[b, i] == documents[b, j]
            return same & (i >= j) if causal else same

        return create_block_mask(is_visible, B, None, L, L, device=documents.device)
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    if not causal:
        return same
    return same & torch.ones(L, L, dtype=torch.bool, device=documents.device).tril()


# Block diffusion (docs/math.md §12): rows are [z | x], the noisy tokens and the clean ones, of `length` each.


def sees(i, j, length, block):
    """Whether token i of [z | x] sees token j: its own block in its own half, and earlier blocks of x.

    Another rule needs other Chunks, pairs in `Transformer.flops_per_token`, `block_causal_mask`, and
    sampling's `Transformer.forward_cached`, whose cache is exact because no token sees a later block.
    """
    block_i, block_j = i % length // block, j % length // block
    half_i, half_j = i // length, j // length  # 0: z, 1: x
    return ((block_i == block_j) & (half_i == half_j)) | ((block_j < block_i) & (half_j == 1))


class Chunk(NamedTuple):
    """The tokens from `start` to `end` of both halves, and what they see.

    Those of z see x[:end] and z[start:end], those of x see x[:end], where their masks of bools are true.
    """

    start: int
    end: int
    noisy: torch.Tensor  # (B or 1, 1, n, end + n)
    clean: torch.Tensor  # (B or 1, 1, n, end)


CHUNK_ROWS = 128  # at least (results/block_cpu.md)


def block_diffusion_masks(length, block, device, documents=None, dropout=0.0, is_usual=True):
    """Make the masks of [z | x]: for all of it, and for queries of z alone.

    documents (B, length) ids: attention stays within equal ones. FlexAttention on a GPU, as in
    `document_mask`, for rows of the usual length, since it is compiled for each (elsewhere on it one mask of
    bools). On a CPU Chunks of whole blocks: of long rows half of the scores.
    """
    token = torch.arange(2 * length, device=device)
    if has_flex(token) and is_usual and not dropout:

        def is_visible(b, h, i, j):
            visible = sees(i, j, length, block)
            return visible if documents is None else visible & same_document(b, i, j)

        def same_document(b, i, j):
            return documents[b, i % length] == documents[b, j % length]

        B = None if documents is None else len(documents)
        return tuple(create_block_mask(is_visible, B, None, n, 2 * length, device=device)
                     for n in (2 * length, length))

    def mask(queries, keys):
        visible = sees(queries[:, None], keys, length, block)[None, None]
        if documents is None:
            return visible
        return visible & (documents[:, queries % length, None] == documents[:, None, keys % length])[:, None]

    if not on_cpu(token):
        return mask(token, token), mask(token[:length], token)
    z, x = token.split(length)
    chunks, rows = [], -(-CHUNK_ROWS // block) * block
    for start in range(0, length, rows):
        own, past = slice(start, start + rows), x[: start + rows]
        noisy, clean = mask(z[own], torch.cat((past, z[own]))), mask(x[own], past)
        chunks.append(Chunk(start, len(past), noisy, clean))
    return chunks, chunks


def attention_in_chunks(q, k, v, chunks, dropout):
    """`attention` by Chunks. q (B, H, 2L or L, head_dim), k and v (B, H, 2L, head_dim) → as q."""
    L, noisy, clean = k.shape[2] // 2, [], []
    for start, end, noisy_mask, clean_mask in chunks:
        past = k[:, :, L : L + end], v[:, :, L : L + end]
        seen = (torch.cat((x, own[:, :, start:end]), dim=2) for x, own in zip(past, (k, v)))
        noisy.append(attention(q[:, :, start:end], *seen, noisy_mask, False, dropout))
        if q.shape[2] > L:
            clean.append(attention(q[:, :, L + start : L + end], *past, clean_mask, False, dropout))
    return torch.cat(noisy + clean, dim=2)


def block_causal_mask(length, block, device):
    """The mask of clean rows: each token sees its own block and earlier ones. (1, 1, length, length) bool."""
    of = torch.arange(length, device=device) // block
    return (of[:, None] >= of)[None, None]


@functools.cache
def compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=False)


# torch's backends, best first; the first that can compute a case does
WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def prefer_cudnn_attention(device):
    """A context in which attention goes to cuDNN on Hopper and later: about 1.5× FlashAttention-2 there."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN], set_priority=True)


def avoid_cudnn_attention(device):
    """A context without cuDNN's attention, which plans anew for every shape.

    Where few batches have the same shape, planning takes longer than attending.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(WITHOUT_CUDNN, set_priority=True)


def attention_backend(q, causal, documents=False):
    """Name what computes attention for queries, keys and values like q (B, H, L, head_dim).

    documents: within documents, otherwise without a mask.
    """
    if documents and has_flex(q):
        return "flex_attention"
    if on_cpu(q) and q.shape[-2] <= PLAIN_ATTENTION_UP_TO.get(q.dtype, 0):
        return "plain products"
    choice = torch._fused_sdp_choice(q, q, q, is_causal=causal)  # the very function that the dispatcher asks
    names = [name for name, backend in SDPBackend.__members__.items() if int(backend) == choice]
    return names[0].lower() if names else str(choice)
