"""How much memory a training step will need, found before it runs and without the memory or the GPU.

The step is compiled as it will be, down to the forward and backward graphs that the compiler would turn into
kernels, with tensors that have shapes but no values. Walking through these graphs, and counting what exists
at each operation, gives the peak.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import default_partition, min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode

import diffusion
import kernels
from model import Transformer
from training import muon
from training.objective import Objective
from training.transfer import to_tensors
from training.update import is_muons, state_numbers


class MemoryNeed(NamedTuple):
    """Bytes on one rank at the peak, and what they are."""

    parameters: int  # weights in fp32; of a sharded network this rank's
    optimizer: int  # its state and the weights' moving average, likewise
    gradients: int  # likewise
    gathered: int  # of a sharded network: weights and gradients that are whole for a while
    activations: int  # all else that forward and backward pass keep for a while
    peak: int


def predict(model_config, batch, posterior, dtype, on_gpu, compile="whole", recompute="no", fp8=False,
            layout="no", **states):
    """The `MemoryNeed` of one step on micro-batches like `batch` (arrays), in autocast to `dtype`.

    compile and recompute as in objective.compile_and_wrap and Transformer.use. Without recomputation it
    agrees with what torch allocates to 1 %; with it, it can be 7 % low, 20 % where the whole model is one
    graph (the compiler moves things). layout and `states` (lasting_gradients, shards, accumulating,
    optimizer, ema) as in `weigh`.
    """
    timeline = trace(
        model_config, batch, posterior, dtype, on_gpu, compile, recompute, fp8, sharded=layout != "no")
    return weigh(timeline, model_config, dtype, on_gpu, layout=layout, **states)


def trace(model_config, batch, posterior, dtype, on_gpu, compile="whole", recompute="no", fp8=False,
          sharded=False):
    """[(bytes beside weights and moments, those of them that are gradients of weights)] along a step."""
    graphs = []  # the forward pass's, then the backward pass's
    record = partial(record_graph, graphs)
    partition, more = default_partition, {}
    if compile != "no":
        partition, more = min_cut_rematerialization_partition, dict(decompositions=select_decomp_table())
    compiler = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=partition, **more)
    torch._dynamo.reset()
    kernels.assumes_gpu = on_gpu
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            if sharded:  # FSDP hands out copies in bf16, where autocast would make them
                torch.set_default_dtype(dtype)
            network = Transformer(model_config).use(recompute, fp8)
            torch.set_default_dtype(torch.float32)
            tensors = (None if t is None else fake.from_tensor(t) for t in to_tensors(batch))
            objective = Objective(network, posterior)
            step = torch.compile(objective, backend=compiler, dynamic=False, fullgraph=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = step(diffusion.Batch(*tensors))["loss"]
            loss.backward()
    finally:
        torch.set_default_dtype(torch.float32)
        kernels.assumes_gpu = False
        torch._dynamo.reset()
    return list(count_bytes(*graphs, fused=compile != "no"))


def record_graph(graphs, module, inputs):
    """Add a module's graph to `graphs`; returns a function that runs it as it is."""
    graphs.append(module.graph)
    return make_boxed_func(module.forward)


def weigh(timeline, model_config, dtype, on_gpu, lasting_gradients=False, layout="no", shards=1,
          accumulating=False, optimizer="adamw", ema=0.0):
    """The `MemoryNeed` of a rank from what exists along a step.

    lasting_gradients: they outlive the backward pass that adds to them (accumulation, DDP's buckets, CUDA
    graphs). layout and shards as in distributed.shard; accumulating: a step has several micro-batches.
    """
    with torch.device("meta"):
        network = Transformer(model_config)
    if layout == "no":
        weights = 4 * network.n_params()
        kept = weights if lasting_gradients else 0
        exists, arrived = max(timeline)
        state = 4 * state_numbers(network, optimizer, ema)
        peak = weights + state + kept + exists
        need = MemoryNeed(weights, state, kept + arrived, 0, exists - arrived, peak)
        return max(need, at_update(network, weights, state, optimizer), key=lambda need: need.peak)

    def share(p):
        return -(-p.shape[0] // shards) * p[0].numel()

    weights = 4 * sum(map(share, network.parameters()))
    state = 4 * state_numbers(network, optimizer, ema, share)
    size = dtype.itemsize
    block = size * sum(p.numel() for p in network.blocks[0].parameters())
    rest = size * sum(p.numel() for name, p in network.named_parameters() if not name.startswith("blocks."))

    # Whole at a time are embedding and head and three blocks' weights (in use, arriving, being copied out;
    # two on a CPU, where nothing is fetched ahead) or, in `optim`, all. In the backward pass also the
    # gradient of embedding and head and a block's, as it is and in fp32 on its way to be summed; in `optim`
    # all gradients until the last micro-batch.
    gathered_weights = rest + (3 if on_gpu else 2) * block
    if layout == "optim":
        gathered_weights = size * network.n_params()
        if accumulating:
            gathered_weights += 4 * network.n_params()
    sums = rest + block * (1 + 4 // size)
    kept = weights if accumulating and layout != "optim" else 0

    def need(exists, arrived):
        gradients = max(kept, int(arrived * 4 / size / shards))
        gathered = gathered_weights + sums * (arrived > 0)
        activations = exists - arrived
        peak = weights + state + gradients + gathered + activations
        return MemoryNeed(weights, state, gradients, gathered, activations, peak)

    needs = [need(*bytes_then) for bytes_then in timeline]
    return max(*needs, at_update(network, weights, state, optimizer, shards), key=lambda need: need.peak)


def at_update(network, weights, state, optimizer, shards=1):
    """The `MemoryNeed` while the optimizer works: AdamW's kernel needs nothing for itself."""
    params = [p for name, p in network.named_parameters() if is_muons(name, p)]
    extra = muon.workspace(params, shards) if optimizer == "muon" else 0
    return MemoryNeed(weights, state, weights, 0, extra, 2 * weights + state + extra)


def count_bytes(forward, backward, fused):
    """Yield (bytes that exist, those of them that are gradients of weights) at each operation of the graphs.

    Weights and batch are left out. What is `fused` never reaches memory: only the inputs and outputs of
    operations that are kernels of their own exist, and what a graph hands on.
    """
    saved, handed_on = keys(forward, "placeholder"), keys(forward, "output")
    steps, size, exists, gradients = [], {}, handed_on - saved, set()

    # what each operation makes and uses, by the key of the memory behind it
    for number, graph in enumerate((forward, backward)):
        inputs = keys(graph, "placeholder")
        for node in graph.nodes:
            named = name_results(node, inputs, number)
            size.update(named)
            made = {key for key, _ in named}
            used = {key for source in node.all_input_nodes for key, _ in name_results(source, inputs, number)}
            if node.op == "output" and graph is backward:
                gradients |= used
            if not fused or own_kernel(node) or node.op == "output":
                exists |= made | used
            if node.op != "placeholder":
                steps.append((made, used, workspace(node)))
    exists -= saved | keys(backward, "placeholder") - handed_on

    # until which operation each must stay
    last = dict.fromkeys(gradients, len(steps))
    for now, (made, used, _) in reversed(list(enumerate(steps))):
        # what a fused operation reads must stay until the kernel that it is part of has written its result
        until = now
        if made and not made & exists:
            until = max((last.get(key, now) for key in made), default=now)
        last.update({key: max(until, last.get(key, now)) for key in used})
        last.update({key: max(now, last.get(key, now)) for key in made})

    alive = set()
    for now, (made, _, extra) in enumerate(steps):
        alive |= made & exists
        yield sum(size[key] for key in alive) + extra, sum(size[key] for key in alive & gradients)
        alive = {key for key in alive if last[key] > now}


def name_results(node, inputs, number):
    """[((graph, storage), bytes)] of a node's results in the graph of this number.

    What is in the `inputs` is of graph 0. The backward graph has copies of operations that it computes again:
    their results are not the forward graph's.
    """
    named = []
    for storage, n_bytes in results(node):
        key = (0, storage)
        named.append((key if key in inputs else (number, storage), n_bytes))
    return named


def keys(graph, op):
    """{(0, storage)} of what the graph is given (`placeholder`) or hands on (`output`)."""
    nodes = []
    for node in graph.nodes:
        if node.op == op:
            nodes += node.all_input_nodes if op == "output" else [node]
    return {(0, storage) for node in nodes for storage, _ in results(node)}


def results(node):
    """[(storage, bytes)] of the memory behind the results of a node; views share theirs."""
    values = node.meta.get("val", ())
    values = values if isinstance(values, (tuple, list)) else (values,)
    storages = [value.untyped_storage() for value in values if isinstance(value, torch.Tensor)]
    return [(storage._cdata, int(storage.nbytes())) for storage in storages]


def own_kernel(node):
    """Whether the compiler calls an operation as it is instead of fusing it into what surrounds it."""
    name = getattr(node.target, "__name__", str(node.target))
    ours = getattr(node.target, "namespace", "aten") not in ("aten", "prims")
    products = ("mm.", "bmm.", "addmm.", "baddbmm.", "_scaled_", "index_put.")
    return node.op == "call_function" and (ours or name.startswith(products))


def workspace(node):
    """Bytes that an operation uses inside: of ours, a chunk of logits."""
    if "head_loss" not in str(node.target):
        return 0
    hidden, head = (source.meta["val"] for source in node.args[:2])
    rows = hidden.shape[0]
    chunks = max(1, -(-rows // kernels.GPU_ROWS))
    return -(-rows // chunks) * head.shape[0] * hidden.element_size()
