"""The parts of `bench.py --suite=gpu`: head and loss, fp8, attention, whole steps and where their time goes.

Each has a text for the report and a function of bench.py's settings and the device (`PARTS`).
"""

import dataclasses
import gc
import inspect
import itertools
import re
from collections import Counter
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from benchmarks.common import Part, failure, free_memory, speedup, spread, synchronize, table, take_turns
from benchmarks.training import TrainingStep, counted_flops, model_shape
from configurator.ladder import ladder, swiglu_width
from model import ModelConfig
from training import memory, transfer
from training.flops import peak_flops

compiled = partial(torch.compile, dynamic=False, fullgraph=True)


# --------------------------------------------------------------------------------------------- head and loss


HEAD_TEXT = (
    "LM head and loss, forward and backward, bf16, on the rows that a masked step of 65 536 tokens has "
    "and on all 65 536 (`full`); uniform diffusion's bound; the greedy head that sampling needs. Ours "
    "against the reference as written, what Inductor makes of it, and torch's own (which has no weights "
    "per row and excludes no columns). The inputs alone are larger than any L2.")


def head(cfg, device):
    """Time the head and its losses."""
    lines = []
    for D, V, rows in ((64, 500, 128),) if cfg.smoke else ((768, 50_257, 65_536), (2048, 50_257, 65_536)):
        torch._dynamo.reset()
        lines += head_of_width(cfg, device, D, V, rows)
    header = ["what", "D", "rows", "by", "ms", "TFLOP/s of the products", "GiB", "ours is faster by"]
    return table(header, lines)


def head_of_width(cfg, device, D, V, rows):
    """Lines of the head's table for one width."""
    width = -(-(V + 1) // 64) * 64
    lines = []
    for what, count, n_products, rivals in head_rivals(cfg, device, D, V, rows, width):
        if device.type != "cuda":  # there are no kernels
            rivals = {name: run for name, run in rivals.items() if not name.startswith("ours")}
        peaks = {name: peak_of(run, device) for name, run in rivals.items()}
        times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 3)

        for name, t in times.items():
            n_rows = rows if name.endswith("full") else count
            tflops = 2 * n_products * n_rows * D * width / np.median(t) / 1e9
            gib = peaks[name] / 2**30
            faster = speedup(t, times["ours"]) if "ours" in times and name != "ours" else ""
            lines.append([what, D, n_rows, name, spread(t), f"{tflops:.0f}", f"{gib:.2f}", faster])
    return lines


def head_rivals(cfg, device, D, V, rows, width):
    """[(what is computed, for how many rows, by how many products, {name: function})] at one width."""
    hidden, head, targets, weights, noisy, beta = head_inputs(device, D, V, rows, width)
    half = -(-rows * 33 // 64 // 64) * 64  # what `capacity` gives for 32 rows
    few = rows // 8 if not cfg.smoke else rows  # uncompiled, the bound forms many fp32 tensors of rows × V
    for_entropy = hidden, head, targets, weights
    for_bound = *for_entropy, noisy, beta

    by_entropy = {
        "reference": partial(with_gradients, plain_entropy, V, half, *for_entropy),
        "Inductor": partial(with_gradients, compiled(plain_entropy), V, half, *for_entropy),
        "ours": partial(with_gradients, our_loss, V, half, *for_entropy),
        "ours, full": partial(with_gradients, our_loss, V, rows, *for_entropy),
    }
    if hasattr(F, "linear_cross_entropy"):
        name = "torch's linear_cross_entropy (unweighted, all columns)"
        by_entropy[name] = partial(with_gradients, torchs_entropy, V, half, *for_entropy)
    by_bound = {
        "Inductor": partial(with_gradients, compiled(plain_bound), V, half, *for_bound),
        "ours": partial(with_gradients, our_loss, V, half, *for_bound),
    }
    by_bound_of_few = {
        "reference": partial(with_gradients, plain_bound, V, few, *for_bound),
        "ours": partial(with_gradients, our_loss, V, few, *for_bound),
    }
    by_greedy = {
        "reference": partial(without_gradients, plain_greedy, V, rows // 2, hidden, head),
        "Inductor": partial(without_gradients, compiled(plain_greedy), V, rows // 2, hidden, head),
        "ours": partial(without_gradients, our_greedy, V, rows // 2, hidden, head),
    }
    return [
        ("cross-entropy", half, 3, by_entropy),
        ("uniform bound", half, 3, by_bound),
        ("uniform bound", few, 3, by_bound_of_few),
        ("greedy", rows // 2, 1, by_greedy),
    ]


def plain_entropy(V, hidden, head, targets, weights):
    logits = kernels.head_logits(hidden, head, V)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def plain_bound(V, hidden, head, targets, weights, noisy, beta):
    probs = F.softmax(kernels.head_logits(hidden, head, V), dim=-1)[:, :V]
    return (kernels.uniform_bound(probs, noisy, targets, beta) * weights).sum()


def our_loss(V, hidden, head, targets, weights, noisy=None, beta=None):
    """The cross-entropy by our kernel or, of noisy tokens, the bound."""
    return kernels.fused_head_loss(hidden, head, targets, weights, noisy, beta, V, False)[0]


def torchs_entropy(V, hidden, head, targets, weights):
    return F.linear_cross_entropy(hidden, head, targets)


def plain_greedy(V, hidden, head):
    logits = kernels.head_logits(hidden, head, V)
    top, tokens = logits.max(-1)
    return tokens, (top - logits.logsumexp(-1)).exp()


def our_greedy(V, hidden, head):
    return kernels.head_greedy(hidden, head, V)


def with_gradients(loss, V, count, hidden, head, *others):
    """Compute a loss of the first `count` rows, and its gradients."""
    total = loss(V, hidden[:count], head, *(t[:count] for t in others))
    torch.autograd.grad(total, (hidden, head))


def without_gradients(function, V, count, hidden, head):
    """Call a function of the first `count` rows without gradients."""
    with torch.no_grad():
        function(V, hidden[:count], head)


def head_inputs(device, D, V, rows, width):
    """Random hidden states, head, targets, weights, noisy tokens and beta of the losses."""
    g = torch.Generator(device).manual_seed(0)

    def random(draw, *size):
        return draw(size, generator=g, device=device)

    head = (random(torch.randn, width, D) * 0.02).bfloat16().requires_grad_()
    hidden = random(torch.randn, rows, D).bfloat16().requires_grad_()
    targets, noisy = (torch.randint(V, (rows,), generator=g, device=device) for _ in range(2))
    weights = random(torch.rand, rows) / rows
    beta = 10 ** (4 * random(torch.rand, rows) - 1)
    return hidden, head, targets, weights, noisy, beta


def peak_of(function, device):
    """The most memory that `function` takes beyond what was there, in bytes (0 on a CPU)."""
    if device.type != "cuda":
        return 0
    function()
    clear_peak(device)
    before = torch.cuda.memory_allocated()
    function()
    synchronize(device)
    return measured_peak(device) - before


def clear_peak(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def measured_peak(device):
    """The most memory that was allocated since `clear_peak`, in bytes (0 on a CPU)."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


# ------------------------------------------------------------------------------------------------------- fp8


FP8_TEXT = (
    "One product with both gradients at the 1.7B model's shapes, 32 768 rows: 8 bits against bf16 (both "
    "compiled).")


def fp8(cfg, device):
    """Time products in 8 bits and in bf16."""
    rows = 32_768
    shapes = {"q, k, v": (2048, 6144), "o": (2048, 2048), "gate, up": (2048, 10_880), "down": (5440, 2048)}
    if cfg.smoke:
        rows, shapes = 64, {"tiny": (32, 64)}

    def bf16_product(x, weight):
        return F.linear(x, weight.bfloat16())

    def gradients(product, x, weight, dy):
        torch.autograd.grad(product(x, weight), (x, weight), dy)

    lines = []
    for what, (K, N) in shapes.items():
        torch._dynamo.reset()
        g = torch.Generator(device).manual_seed(0)
        x, dy = (torch.randn(rows, n, generator=g, device=device).bfloat16() for n in (K, N))
        weight = (torch.randn(N, K, generator=g, device=device) * 0.02).requires_grad_()
        inputs = x.requires_grad_(), weight, dy
        rivals = {
            "bf16": partial(gradients, torch.compile(bf16_product, fullgraph=True), *inputs),
            "fp8": partial(gradients, torch.compile(kernels.fp8_linear, fullgraph=True), *inputs),
        }
        times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 5)

        speeds = []
        for t in times.values():
            speeds.append(f"{spread(t)} ({6 * rows * K * N / np.median(t) / 1e9:.0f} TFLOP/s)")
        lines.append([what, f"{rows} × {K} × {N}", *speeds, speedup(times["bf16"], times["fp8"])])
    return table(["product", "shape", "bf16, ms", "fp8, ms", "fp8 is faster by"], lines)


# ------------------------------------------------------------------------------------------------- attention


ATTENTION_TEXT = (
    "Attention, forward and backward, bf16, 65 536 tokens in rows of 2048, laid out as in the model: "
    "torch's backends, and documents of about 400 tokens. The second time is with the documents' mask (or "
    "borders) made anew, which a step does once for all layers.")


def attention(cfg, device):
    """Time attention by every backend, and within documents."""
    shapes = ((2, 2, 64, 16),) if cfg.smoke else ((32, 14, 2048, 64), (32, 16, 2048, 128))
    lines = []
    for is_causal in (False, True):
        for B, H, L, head_dim in shapes:
            torch._dynamo.reset()
            kernels.compiled_flex_attention.cache_clear()
            lines += attention_of_shape(cfg, device, B, H, L, head_dim, is_causal)
    header = ["heads", "head_dim", "causal", "backend", "ms", "ms with its mask", "TFLOP/s (7 products)"]
    return table(header, lines)


def attention_of_shape(cfg, device, B, H, L, head_dim, is_causal):
    """Lines of attention's table for one shape."""
    g = torch.Generator(device).manual_seed(0)

    def random_heads():
        x = torch.randn(B, L, H, head_dim, generator=g, device=device, dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    q, k, v, dy = (random_heads() for _ in range(4))
    documents = (torch.rand(B, L, generator=g, device=device) < 1 / 400).cumsum(1)
    chosen = kernels.attention_backend(q, is_causal)
    n_flops = 14 * B * H * L * L * head_dim * (0.5 if is_causal else 1)

    def gradients(attend, mask):
        torch.autograd.grad(attend(mask), (q, k, v), dy)

    def gradients_and_mask(attend, make_mask):
        gradients(attend, make_mask())

    lines = []
    for name, (attend, make_mask) in attention_rivals(q, k, v, documents, is_causal).items():
        try:
            mask = make_mask() if make_mask else None
            rivals = {"attention": partial(gradients, attend, mask)}
            if make_mask:
                rivals["with its mask"] = partial(gradients_and_mask, attend, make_mask)
            times = take_turns(rivals, device, cfg.rounds, 1 if cfg.smoke else 3)
        except Exception as problem:  # a backend that this machine has not
            lines.append([H, head_dim, is_causal, name, failure(problem), "", ""])
            continue

        t, with_mask, tflops = times["attention"], "", ""
        if make_mask:
            with_mask = spread(times["with its mask"])
        else:
            tflops = f"{n_flops / np.median(t) / 1e9:.0f}"
        label = name + (" (chosen)" if name == chosen else "")
        lines.append([H, head_dim, is_causal, label, spread(t), with_mask, tflops])
    return lines


def attention_rivals(q, k, v, documents, is_causal):
    """{name: (attention that takes a mask, what makes that mask or None)}.

    q, k, v (B, H, L, head_dim), documents (B, L).
    """
    L = q.shape[2]

    def by_backend(backend, _):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    def dense(mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def dense_mask():
        same = (documents[:, :, None] == documents[:, None, :])[:, None]
        if not is_causal:
            return same
        return same & torch.ones(L, L, dtype=torch.bool, device=q.device).tril()

    def ours(mask):
        return kernels.attention(q, k, v, mask, is_causal, 0.0)

    def our_mask():
        return kernels.document_mask(documents, is_causal, 0.0)

    def by_varlen(borders):
        return varlen(q, k, v, *borders, is_causal)

    backends = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    rivals = {backend.name.lower(): (partial(by_backend, backend), None) for backend in backends}
    rivals["documents, dense mask"] = dense, dense_mask
    rivals["documents, as in kernels.attention"] = ours, our_mask
    rivals["documents, varlen"] = by_varlen, partial(document_borders, documents)
    return rivals


def document_borders(documents):
    """Where documents start in the flattened batch, (n + 1,) int32, and the longest one's length.

    documents (B, L): ids, equal inside each document. Rows end documents, too.
    """
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).flatten()
    borders = F.pad(starts, (0, 1), value=True).nonzero().flatten().int()
    return borders, int(borders.diff().max())


def varlen(q, k, v, borders, longest, is_causal):
    """Attention over documents laid end to end, by torch.nn.attention.varlen. q, k, v (B, H, L, head_dim)."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, L, head_dim = q.shape
    options = {}
    if is_causal:  # the option's name depends on torch's version
        has_option = "is_causal" in inspect.signature(varlen_attn).parameters
        options = dict(is_causal=True) if has_option else dict(window_size=(-1, 0))
    flat = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    y = varlen_attn(*flat, borders, borders, longest, longest, **options)
    return y.view(B, L, H, head_dim).transpose(1, 2)


# ------------------------------------------------------------------------------------- whole training steps

# model, objective, rows of 2048, settings; what matters most first
STEPS = [
    ("1.7B", "masked", 16, {}),
    ("1.7B", "masked", 24, {}),
    ("413M", "masked", 32, {}),
    ("135M", "masked", 32, {}),
    ("135M", "masked", 32, dict(plain_loss=True)),
    ("1.7B", "masked", 16, dict(fp8=True)),
    ("413M", "masked", 32, dict(short_rows=0.01)),
    ("135M", "masked", 16, {}),
    ("135M", "masked", 16, dict(plain_loss=True, compile="no")),
    ("135M", "masked", 32, dict(diffusion_block=16)),
    ("1.7B", "masked", 16, dict(diffusion_block=32, compile="blocks")),
    ("1.7B", "ar", 16, {}),
    ("413M", "ar", 32, {}),
    ("135M", "ar", 32, {}),
    ("1.1B", "masked", 24, {}),
    ("1.1B", "ar", 24, {}),
    ("135M", "masked", 32, dict(compile="blocks")),
    ("135M", "masked", 32, dict(full_head=True)),
    ("135M", "masked", 32, dict(recompute="elementwise")),
    ("1.7B", "masked", 16, dict(compile="blocks")),
    ("1.7B", "masked", 16, dict(fp8=True, compile="blocks")),
    ("1.7B", "masked", 24, dict(recompute="elementwise", compile="blocks")),
    ("25M", "masked", 8, {}),
    ("25M", "masked", 8, dict(cuda_graphs=True)),
]
TINY_SETTINGS = [
    dict(compile="no"),
    dict(compile="no", fp8=True),
    dict(plain_loss=True, compile="no"),
    dict(compile="no", short_rows=0.5),
]
TINY_STEPS = [("tiny", "masked", 4, settings) for settings in TINY_SETTINGS]
TINY_STEPS += [("tiny", "ar", 4, settings) for settings in TINY_SETTINGS]


def model_of(name, is_causal):
    """The ModelConfig of a size of the ladder, or of MegaDLMs' 1.7B example (GPT-NeoX's vocabulary)."""
    if name == "tiny":
        return model_shape(2, 2, 32, 500, 64, is_causal)
    if name == "1.7B":
        return model_shape(28, 16, 2048, 50_277, 2048, is_causal, tied=False)
    shape = ladder({"1.1B": "1086M"}.get(name, name))
    return ModelConfig(**shape, n_kv_head=shape["n_head"], d_ff=swiglu_width(shape["d_model"]),
                       n_vocab=50_257, mask_id=50_257, seq_len=2048, causal=is_causal)


STEPS_TEXT = (
    "Whole training steps in bf16 on real tokens: batches on the device, forward, backward, clipping, "
    "AdamW; one after the other without waiting, as train.py does. `plain_loss`: fp32 logits everywhere "
    "instead of our kernel. Executed MFU counts what is really computed: what follows the last attention, "
    "and the head, for the masked positions only. The MFU of whole blocks counts the whole last block; "
    "PaLM's the head and attention in full. All relative to the datasheet's dense bf16 peak, fp8's included.")


def steps(cfg, device):
    """Time whole training steps."""
    lines = []
    for name, objective, rows, settings in TINY_STEPS if cfg.smoke else STEPS:
        label = f"{name} {objective} {rows} × {described(settings, 'plain settings')}"
        if cfg.rows and not any(part in label for part in cfg.rows.split(",")):
            continue
        try:
            lines.append(step_line(cfg, device, name, objective, rows, settings))
        except Exception as problem:
            lines.append([name, "", objective, rows, settings, failure(problem), *[""] * 8])
        print(" | ".join(map(str, lines[-1])), flush=True)
        free_memory(device)
    header = ["model", "parameters (in blocks)", "objective", "rows", "settings", "ms", "tokens/s",
              "executed MFU", "of whole blocks", "PaLM's", "GiB measured / predicted", "attention", "loss",
              "FLOPs: formula / torch's counter"]
    return table(header, lines)


def with_block(config, settings):
    """The ModelConfig with the block that settings ask for, and the others, which are TrainingStep's."""
    others = dict(settings)
    return dataclasses.replace(config, diffusion_block=others.pop("diffusion_block", 0)), others


def described(settings, otherwise):
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or otherwise


def step_line(cfg, device, name, objective, rows, settings):
    """A line of the steps table. Raises RuntimeError if a loss is not finite."""
    c, of_step = with_block(model_of(name, objective == "ar"), settings)

    # Time the steps
    step = TrainingStep(c, objective, rows, device, torch.bfloat16, **of_step)
    for _ in range(cfg.warmup):
        step()
    gc.collect()
    gc.freeze()
    clear_peak(device)
    with torch.compiler.set_stance("fail_on_recompile"):
        t, losses = time_in_a_row(step, device, cfg.steps)
    peak = measured_peak(device)
    gc.unfreeze()
    if not np.isfinite(losses).all():
        raise RuntimeError("the loss is not finite")

    # What was computed
    network, example = step.network, step.example
    speed = step.tokens / np.median(t) * 1e3
    peak_speed = peak_flops(device) or float("nan")
    flops = (
        network.flops_per_token(step.head_share),
        flops_of_whole_blocks(network, step.head_share),
        network.flops_per_token(1.0, causal=False),
    )
    # of block diffusion the formula counts the pairs that see each other, torch all of them
    formula = network.flops_per_token(step.example_share, causal=False)
    flops_ratio = float("nan") if c.diffusion_block else formula / counted_flops(c, rows, example)
    n_params, in_blocks = network.n_params(), network.n_params(False)
    q = torch.empty(rows, c.seq_len, c.n_head, c.head_dim, device=device, dtype=torch.bfloat16)
    backend = kernels.attention_backend(q.transpose(1, 2), c.causal,
                                        example.documents is not None or c.diffusion_block > 0)

    # Its memory, predicted when the step's own has been given back
    del step, network, q
    free_memory(device)
    predicted = ""
    if cfg.predict and not settings.get("plain_loss"):
        predicted = f" / {predicted_peak(c, example, settings) / 2**30:.1f}"

    return [
        name,
        f"{n_params / 1e6:,.0f}M ({in_blocks / 1e6:,.0f}M)",
        objective,
        f"{rows} × {c.seq_len}",
        described(settings, "—"),
        spread(t, 1),
        f"{speed:,.0f}",
        *(f"{speed * count / peak_speed:.1%}" for count in flops),
        f"{peak / 2**30:.1f}{predicted}",
        backend,
        f"{np.mean(losses[-4:]):.3f}",
        f"{flops_ratio:.4f}",
    ]


def flops_of_whole_blocks(network, head_share):
    """Training FLOPs per token of all blocks in full, with the head for `head_share` of the tokens.

    Of block diffusion, whose rows are read twice, what `flops_per_token` counts.
    """
    c = network.config
    if c.diffusion_block:
        return network.flops_per_token(1.0)
    head = head_share * c.padded_vocab * c.d_model
    attention = 12 * c.n_layer * c.n_head * c.head_dim * c.seq_len * (0.5 if c.causal else 1)
    return 6 * (network.n_params(False) + head) + attention


def predicted_peak(config, example, settings):
    """Bytes that memory.predict expects of a step on batches like `example`."""
    use = {name: value for name, value in settings.items() if name in ("compile", "recompute", "fp8")}
    use["lasting_gradients"] = settings.get("cuda_graphs", False)
    return memory.predict(config, example, False, torch.bfloat16, True, **use).peak


def time_in_a_row(step, device, count):
    """(count,) milliseconds of steps that follow each other without waiting, and their losses."""
    timestamps, losses = [transfer.timestamp(device)], torch.zeros(count, device=device)
    for i in range(count):
        step()
        losses[i] = step.loss
        timestamps.append(transfer.timestamp(device))
    losses = losses.tolist()
    seconds = [transfer.seconds_between(*pair) for pair in itertools.pairwise(timestamps)]
    return 1e3 * np.array(seconds), losses


TURNS_TEXT = (
    "Steps whose ratio is claimed, taking turns: fp8 against bf16 at 1.7B (8 rows each, so that both "
    "fit), and at 135M the masked step against the one with head and loss at all positions.")


def turns(cfg, device):
    """Time pairs of steps in turns."""
    pairs = [
        ("fp8 / bf16", "1.7B", 8, dict(fp8=True), {}),
        ("gathered / full head", "135M", 16, {}, dict(full_head=True)),
    ]
    uncompiled = {}
    if cfg.smoke:
        pairs = [(what, "tiny", 4, first, second) for what, _, _, first, second in pairs]
        uncompiled = dict(compile="no")

    lines = []
    for what, model, rows, first, second in pairs:
        config = model_of(model, False)
        rivals = {
            "first": TrainingStep(config, "masked", rows, device, torch.bfloat16, **uncompiled, **first),
            "second": TrainingStep(config, "masked", rows, device, torch.bfloat16, **uncompiled, **second),
        }
        in_a_row = 7  # the device never idles
        sevens = {name: partial(time_in_a_row, step, device, in_a_row) for name, step in rivals.items()}
        times = take_turns(sevens, device, cfg.rounds)

        milliseconds = [spread(t / in_a_row, 1) for t in times.values()]
        losses = [f"{step.loss.item():.3f}" for step in rivals.values()]
        lines.append([what, model, rows, *milliseconds, speedup(times["second"], times["first"]), *losses])
        del rivals, sevens
        free_memory(device)
    header = ["first / second", "model", "rows", "ms, first", "ms, second", "first is faster by",
              "loss, first", "loss, second"]
    return table(header, lines)


# --------------------------------------------------------------------------------------- where the time goes

# The first pattern that a kernel's name contains says what it is. Inductor's names list what it fused.
KINDS = {
    "attention": r"^triton_tem_.*flex|^(?!triton_|cpp_).*"
        r"(sdpa|flash|fmha|cudnn::fusion|scaled_dot_product)",
    "matrix products": r"^triton_tem_|^(?!triton_|cpp_).*"
        r"(gemm|nvjet|cutlass|xmma|cublas|splitk|gemv|::b?mm$|::addmm$|linear_pointwise)",
    "rows of the loss": r"^(cross_entropy|uniform_bound)_rows",
    "elementwise and reductions (compiled)": r"^(triton|cpp)_",
    "optimizer and norm": r"multi_tensor_apply|lpnorm|fused_adam",
    "copies": r"^Memcpy|^Memset|copy_kernel|CatArray",
}  # fmt: skip


def kind_of(kernel):
    """What a GPU kernel does, judged by its name."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.I)), "others")


PROFILE_TEXT = "Shares of the device's time in a masked step, by kind of kernel."


def profile(cfg, device):
    """Profile a masked step, by kind of kernel."""
    sections = []
    for name, rows in (("tiny", 4),) if cfg.smoke else (("135M", 32), ("1.7B", 16)):
        if cfg.rows and name not in cfg.rows:
            continue
        compile = "no" if cfg.smoke else "whole"
        step = TrainingStep(model_of(name, False), "masked", rows, device, torch.bfloat16, compile)
        sections.append(profile_of_step(name, step, device))
        del step
        free_memory(device)
    return "\n".join(sections)


def profile_of_step(name, step, device):
    """The profile's tables for one model."""
    step_time, kernel_times = time_kernels(step, device)
    by_kind = Counter()
    for kernel, t in kernel_times.items():
        by_kind[kind_of(kernel)] += t
    busy = sum(by_kind.values())
    rest = busy - by_kind["matrix products"] - by_kind["attention"]

    shares = [[kind, f"{t:.2f}", f"{t / busy:.1%}"] for kind, t in by_kind.most_common()]
    shares.append(["**neither a matrix product nor attention**", f"{rest:.2f}", f"{rest / busy:.1%}"])
    shares.append(["all kernels; of the step's time", f"{busy:.2f}", f"{busy / step_time:.1%}"])
    if device.type == "cuda" and not by_kind["attention"]:
        shares.append(["no attention kernel was recognized: see the names below", "", ""])

    longest = []
    for kernel, t in Counter(kernel_times).most_common(15):
        longest.append([f"`{kernel[:90]}`".replace("|", "/"), kind_of(kernel), f"{t:.2f}"])

    return "\n".join([
        f"{name}: {step_time:.1f} ms a step, profiled\n",
        table(["kind", "ms", "share"], shares),
        table(["longest kernels", "kind", "ms"], longest),
    ])


def time_kernels(step, device, count=5):
    """Milliseconds of a step, profiled, and {kernel: its milliseconds in a step}."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU, activity.CUDA] if on_gpu else [activity.CPU]
    for _ in range(5):
        step()
    with torch.profiler.profile(activities=activities) as profiler:
        step()  # the profiler starts up in this one
        synchronize(device)
        t, _ = time_in_a_row(step, device, count)

    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernel_times = {}
    for event in profiler.key_averages():
        microseconds = getattr(event, attribute)
        is_kernel = not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
        if microseconds > 0 and is_kernel and not event.is_user_annotation:
            kernel_times[event.key] = kernel_times.get(event.key, 0.0) + microseconds / 1e3 / (count + 1)
    return t.sum() / count, kernel_times


PARTS = dict(
    head=Part(head, HEAD_TEXT),
    attention=Part(attention, ATTENTION_TEXT),
    fp8=Part(fp8, FP8_TEXT),
    turns=Part(turns, TURNS_TEXT),
    steps=Part(steps, STEPS_TEXT),
    profile=Part(profile, PROFILE_TEXT),
)
