"""convert.py as a command: what it refuses, --verify, dtypes, signals, memory, and the use of its runs."""

import dataclasses
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import ROOT, call_main
from safetensors.torch import load_file, save_file
from tiny_checkpoints import (
    assert_same_weights,
    convert_ok,
    edit_record,
    make_run,
    megatron_args,
    megatron_tensors,
    refusal,
    run_convert,
    tp_shard,
    weights_of,
    write_megatron,
    write_tokenizer_file,
)

import convert
from interop import megatron, tensors
from model import ModelConfig

RANK_0 = "iter_0000042/mp_rank_00/model_optim_rng.pt"


# ------------------------------------------------------------------------------------------- the command line


def test_as_a_command(tmp_path):
    """From a terminal: one line about the source, one about the result."""
    make_run(tmp_path / "ours")
    command = [sys.executable, "convert.py", f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'hf'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about, result = done.stdout.splitlines()
    assert about.startswith(f"{tmp_path / 'ours/step_00000007'}: ours, masked, 30,")
    assert result.startswith(f"{tmp_path / 'hf'}: 0.00 GB in")
    text = convert_ok(tmp_path / "hf", tmp_path / "back")
    assert f"try: python sample.py --run_dir={tmp_path / 'back'}" in text
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


@pytest.mark.parametrize("arguments, setting", ((["--help"], "--pipeline_parallel"),
                                                (["download", "--help"], "--revision")))
def test_help(monkeypatch, capsys, arguments, setting):
    monkeypatch.setattr(sys, "argv", ["convert.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        convert.main()
    assert stop.value.code == 0 and setting in capsys.readouterr().out


def test_some_layers_alone(tmp_path):
    """In the order that is asked for, as a run of ours or in another format; what there is not is said."""
    network = make_run(tmp_path / "ours", n_layer=3)
    convert_ok(tmp_path / "ours", tmp_path / "cut", layers="2,0", to="ours", verify=True)
    expected, weights = network.state_dict(), weights_of(tmp_path / "cut")
    assert len([name for name in weights if name.startswith("blocks.")]) * 3 == 2 * len(
        [name for name in expected if name.startswith("blocks.")])
    for name, value in weights.items():
        name = name.replace("blocks.0.", "blocks.two.").replace("blocks.1.", "blocks.0.")
        assert torch.equal(value, expected[name.replace("blocks.two.", "blocks.2.")])
    convert_ok(tmp_path / "ours", tmp_path / "hf", layers="1", verify=True)
    assert "has no layer 3: there are 0 to 2" in refusal(
        tmp_path, source=tmp_path / "ours", out=tmp_path / "no", layers="0,3")
    for layers in ("0,0", "-1", "x"):
        assert "expected different numbers" in refusal(
            tmp_path, source=tmp_path / "ours", out=tmp_path / "no", layers=layers)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder of sources that are refused for one reason or another; nothing in it is changed."""
    folder = tmp_path_factory.mktemp("sources")
    network = make_run(folder / "ours")
    make_run(folder / "uniform", "uniform")
    (folder / "empty").mkdir()
    write_megatron(folder / "mega", network, "masked")
    write_megatron(folder / "mega_ar", make_run(folder / "ar", "ar"), "ar", vocab_size=257)
    write_tokenizer_file(folder / "t.json", "<|other|>")
    make_run(folder / "larger", "ar", tokenizer=folder / "t.json")
    convert_ok(folder / "larger", folder / "hf")
    make_run(folder / "unclear")
    edit_record(folder / "unclear/step_00000007", lambda record: record["settings"].pop("objective"))
    return folder


REFUSED = (  # (source, flags, what is said)
    ("ours", dict(out="mega"), "exists; nothing is overwritten"),
    ("nowhere", {}, "no such folder"),
    ("empty", {}, "no checkpoint that is known"),
    ("mega", {}, "give --tokenizer=gpt2"),
    ("ours", dict(to="ours"), "is ours already"),
    ("uniform", {}, "use sample.py"),
    ("ours", dict(to="megatron", tensor_parallel=3), "4 is no multiple of 3"),
    ("ours", dict(out=""), "give --out"),
    ("ours", dict(tokenizer="gpt2", objective="ar"), "--tokenizer, --objective is for others'"),
    ("unclear", {}, "settings.objective is missing"),
    ("ours", dict(tensor_parallel=2), "are for --to=megatron"),
    ("ours", dict(out="ours/x"), "lies within the source"),
    ("ours/step_00000007/model.safetensors", {}, "a file; name its folder"),
    ("mega_ar", dict(tokenizer="bytes", mask_id=5), "has no meaning for an AR model"),
    ("mega_ar", dict(tokenizer="t.json"), "its vocabulary has 257 tokens"),
    ("hf", dict(tokenizer="bytes"), "has a tokenizer of 258 tokens"))


@pytest.mark.parametrize("source, flags, message", REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(sources, source, flags, message):
    flags = dict(out="x") | flags
    for name, value in flags.items():
        if value and (name == "out" or value == "t.json"):
            flags[name] = sources / value
    assert message in refusal(sources, source=sources / source, **flags)


@pytest.mark.parametrize("signum", (signal.SIGINT, signal.SIGTERM))
def test_ended_early_it_leaves_nothing(tmp_path, signum):
    """Neither what is half written, nor folders that were made for it."""
    make_run(tmp_path / "ours")
    program = """
import sys, time
sys.argv[0] = "convert.py"
import convert
from interop import tensors

honest = tensors.LazyTensor.blocks
tensors.LazyTensor.blocks = lambda tensor: time.sleep(1) or honest(tensor)
convert.main()
"""
    flags = [f"--source={tmp_path / 'ours'}", f"--out={tmp_path / 'new/folders/hf'}"]
    process = subprocess.Popen([sys.executable, "-c", program, *flags], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("new/folders/.hf.*/model.safetensors")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait(30) == 130
    error = process.stderr.read()
    assert "nothing is written" in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# --------------------------------------------------------------------------------------- --verify and --dtype


def test_verify_refuses_what_differs(monkeypatch, tmp_path):
    """A conversion that mixed up gate and up would be found out; nothing of it stays."""
    write_megatron(tmp_path / "mega", make_run(tmp_path / "ours"), "masked")
    honest = megatron.to_ours

    def swap_gate_and_up(config, original):
        weights = honest(config, original)
        gate, up = "blocks.1.mlp.gate_proj.weight", "blocks.1.mlp.up_proj.weight"
        weights[gate], weights[up] = weights[up], weights[gate]
        return weights

    monkeypatch.setattr(megatron, "to_ours", swap_gate_and_up)
    error = refusal(tmp_path, source=tmp_path / "mega", out=tmp_path / "out", tokenizer="bytes", verify=True)
    assert "does not compute what the source computes" in error


@pytest.mark.parametrize("dtype", ("source", "bfloat16"))
@pytest.mark.parametrize("factor", (1.01, float("nan")))
def test_verify_reads_what_was_written(monkeypatch, tmp_path, dtype, factor):
    """A file that holds something else than the weights is found out, too."""
    make_run(tmp_path / "ours")
    honest = tensors.write_safetensors

    def write_changed_norm(path, weights, on_progress):
        norm = weights["model.norm.weight"]
        changed = norm._replace(read=lambda: norm.read() * factor, read_blocks=None)
        honest(path, weights | {"model.norm.weight": changed}, on_progress)

    monkeypatch.setattr(tensors, "write_safetensors", write_changed_norm)
    error = refusal(tmp_path, source=tmp_path / "ours", out=tmp_path / "out", verify=True, dtype=dtype)
    assert "does not compute what the source computes" in error


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_another_dtype_is_verified_as_sharply(tmp_path, dtype):
    make_run(tmp_path / "ours")
    text = convert_ok(tmp_path / "ours", tmp_path / "hf", dtype=dtype, verify=True)
    assert "limit 0.0001" in text
    weights = load_file(tmp_path / "hf/model.safetensors")
    assert all(value.dtype == getattr(torch, dtype) for value in weights.values())
    norm = weights_of(tmp_path / "ours")["norm.weight"]
    assert torch.equal(weights["model.norm.weight"], norm.to(getattr(torch, dtype)))


def test_values_too_large_for_a_dtype(tmp_path):
    network = make_run(tmp_path / "ours")
    place, norm = tmp_path / "ours/step_00000007", torch.full((32,), 1e7)
    save_file(network.state_dict() | {"norm.weight": norm}, place / "model.safetensors")
    edit_record(place, lambda record: None)
    error = refusal(tmp_path, source=tmp_path / "ours", out=tmp_path / "hf", dtype="float16")
    assert "norm.weight: float16 can't hold values as large as 1e+07" in error
    convert_ok(tmp_path / "ours", tmp_path / "hf", dtype="bfloat16", verify=True)
    path = tmp_path / "hf/model.safetensors"
    save_file(load_file(path) | {"model.norm.weight": torch.full((32,), float("nan"))}, path)
    assert "does not compute" in run_convert(source=tmp_path / "hf", out=tmp_path / "y", verify=True)[2]


# ------------------------------------------------------------------------------ what becomes of imported runs


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run that was converted from Megatron's format, and its network."""
    folder = tmp_path_factory.mktemp("imported")
    network = make_run(folder / "ours")
    write_megatron(folder / "mega", network, "masked")
    convert_ok(folder / "mega", folder / "run", tokenizer="bytes")
    return folder / "run", network


def test_it_is_not_resumed(imported, corpus, monkeypatch, capsys):
    run, network = imported
    names = ("n_layer", "n_head", "d_model", "d_ff", "seq_len")
    shape = [f"--{name}={getattr(network.config, name)}" for name in names]
    with pytest.raises(SystemExit):
        call_main(monkeypatch, f"--run_dir={run}", f"--corpus={corpus}", "--resume=yes", "--steps=50",
                  "--batch_size=4", "--device=cpu", *shape)
    assert "no optimizer state; begin another run with --init_from" in capsys.readouterr().err


def test_it_is_sampled_evaluated_and_begun_with(imported, corpus, monkeypatch, tmp_path, capsys):
    """Its record has what sample.py, eval.py and --init_from look for."""
    import eval as eval_command
    import sample

    run, _ = imported
    flags = ["--length=8", "--steps=4", f"--out={tmp_path / 'samples.jsonl'}"]
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--run_dir={run}", *flags])
    sample.main()
    assert (tmp_path / "samples.jsonl").is_file()
    flags = [f"--corpus={corpus}", "--rows=4", "--passes=1", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", ["eval.py", f"--run_dir={run}", *flags])
    eval_command.main()
    assert "NELBO" in capsys.readouterr().out
    flags = [f"--corpus={corpus}", "--steps=1", "--batch_size=2", "--seq_len=32", "--eval_rows=2",
             "--compile=no", "--device=cpu", "--dtype=float32"]
    call_main(monkeypatch, f"--init_from={run}", f"--run_dir={tmp_path / 'next'}", *flags)
    assert f"begins with the weights of {run}" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- memory


def measure(folder, source, out, memory, *flags):
    """Seconds of a conversion, whose peak of memory must be below a GiB and `memory`."""
    program = """
import sys
sys.argv[0] = "convert.py"
import convert
convert.main()
print(*[line.split()[1] for line in open("/proc/self/status") if "VmHWM" in line])  # kB
"""
    start = time.perf_counter()
    command = [sys.executable, "-c", program, f"--source={folder / source}", f"--out={folder / out}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, peak = time.perf_counter() - start, 1024 * int(done.stdout.split()[-1])
    print(f"{source} → {out}: {seconds:.0f} s, {peak / 2**30:.2f} GiB")
    assert peak < memory + 2**30
    return seconds


@pytest.mark.slow
def test_one_large_tensor(tmp_path):
    """An embedding of a GiB, every way: no more than it and a GiB in memory (to Megatron: and its file)."""
    d_model, n_rows = 2048, 2**18 + 64  # not a multiple of what we pad to
    network = make_run(tmp_path / "small", n_layer=1, d_model=d_model, n_head=4, head_dim=128, d_ff=64)
    config = dataclasses.replace(network.config, n_vocab=n_rows - 1, mask_id=n_rows - 1)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.empty(n_rows, d_model, dtype=torch.bfloat16).normal_(generator=generator)
    whole = {name: w.bfloat16() for name, w in megatron_tensors(network).items()}
    whole["embedding.word_embeddings.weight"] = embedding
    args = megatron_args(config, "masked", padded_vocab_size=n_rows, vocab_size=n_rows)
    place = tmp_path / "mega/iter_0000042"
    place.mkdir(parents=True)
    dcp.save(whole, checkpoint_id=place, no_dist=True)
    torch.save(dict(args=args, iteration=42), place / "common.pt")
    for rank in range(2):
        place = tmp_path / f"torch/iter_0000042/mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        args.tensor_model_parallel_size = 2
        model = {name: tp_shard(name, w, rank, 2, config) for name, w in whole.items()}
        torch.save(dict(args=args, iteration=42, model=model), place / "model_optim_rng.pt")
    for folder in ("mega", "torch"):
        (tmp_path / folder / "latest_checkpointed_iteration.txt").write_text("42", encoding="utf-8")
    largest = embedding.nbytes
    del whole, model
    measure(tmp_path, "mega", "a", largest, "--tokenizer=none")
    measure(tmp_path, "torch", "b", largest, "--tokenizer=none")
    measure(tmp_path, "a", "hf", largest)
    measure(tmp_path, "hf", "c", largest, "--tokenizer=none")
    for out in "abc":
        weights = load_file(next(tmp_path.glob(f"{out}/*/model.safetensors")))
        assert torch.equal(weights["embed.weight"][:n_rows], embedding)
    measure(tmp_path, "a", "again", 2 * largest, "--to=megatron")
    model = torch.load(tmp_path / "again" / RANK_0, mmap=True, weights_only=False)["model"]
    assert torch.equal(model["embedding.word_embeddings.weight"][:n_rows], embedding)


@pytest.mark.slow
def test_a_network_of_1_7b_in_minutes_and_little_memory(tmp_path):
    """torch_dist, bfloat16 → ours within 3 minutes; from there to every format and back."""
    config = ModelConfig(
        n_layer=28, n_head=16, n_kv_head=16, head_dim=128, d_model=2048, d_ff=6144, n_vocab=50277,
        mask_id=50277, seq_len=2048, causal=False, tied=False)
    place = tmp_path / "mega/iter_0000042"
    place.mkdir(parents=True)
    generator, whole = torch.Generator().manual_seed(0), {}
    for name, shape in megatron.tensor_shapes(config, 50304).items():
        if name.startswith("decoder.layers."):  # stacked
            name, shape = "decoder.layers." + name.split(".", 3)[3], (config.n_layer, *shape)
        if name not in whole:
            whole[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
    dcp.save(whole, checkpoint_id=place, no_dist=True)
    args = megatron_args(config, "masked", padded_vocab_size=50304)
    torch.save(dict(args=args, iteration=42), place / "common.pt")
    (tmp_path / "mega/latest_checkpointed_iteration.txt").write_text("42", encoding="utf-8")
    head = whole["output_layer.weight"][:50278].clone()
    down = whole["decoder.layers.mlp.linear_fc2.weight"][27].clone()
    largest = head.nbytes
    del whole

    assert measure(tmp_path, "mega", "ours", largest, "--tokenizer=none") < 180
    weights = weights_of(tmp_path / "ours")
    for name, expected in (("blocks.27.mlp.down_proj.weight", down), ("lm_head.weight", head)):
        assert torch.equal(weights[name][: len(expected)], expected)
    del weights
    measure(tmp_path, "ours", "hf", largest)
    measure(tmp_path, "hf", "again", largest, "--tokenizer=none")
    assert_same_weights(tmp_path / "again", tmp_path / "ours")
    rank_bytes = 3.5e9 / 4  # a rank's share is held, too
    measure(tmp_path, "ours", "shards", largest + rank_bytes, "--to=megatron", "--tensor_parallel=4")
