"""Megatron's checkpoints: shards of all ranks from the published layout, back again, and files that lie."""

import dataclasses
import datetime
import enum
import pickle
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_checkpoints import (
    SHAPES,
    assert_same_weights,
    convert_ok,
    edit_pickle,
    make_run,
    megatron_args,
    refusal,
    replace_chunk,
    weights_of,
    write_distributed,
    write_megatron,
)

from model import ModelConfig
from training import checkpoint

RANK_0 = "iter_0000042/mp_rank_00/model_optim_rng.pt"


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """A `torch_dist` run, to copy, of the network that make_run makes by default."""
    folder = tmp_path_factory.mktemp("distributed")
    write_distributed(folder / "mega", make_run(folder / "ours"), "masked")
    return folder / "mega"


# ----------------------------------------------------------------------------------------- the `torch` format


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


# every shape with either objective: half of them in the short suite
@pytest.mark.parametrize("shape, objective", (
    ("tied_mha", "masked"), ("untied_gqa", "ar"), ("biased", "masked"), ("wide", "ar"),
    slow("tied_mha", "ar"), slow("untied_gqa", "masked"), slow("biased", "ar"), slow("wide", "masked")))
@pytest.mark.parametrize("tp, pp", ((1, 1), (2, 1), (4, 1), (1, 2), (4, 2)))
def test_shards_become_the_whole_bit_for_bit_and_shards_again(tmp_path, shape, objective, tp, pp):
    network = make_run(tmp_path / "ours", objective, n_layer=2 * pp, **SHAPES[shape])
    write_megatron(tmp_path / "mega", network, objective, tp, pp)
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes", verify=True)
    assert_same_weights(tmp_path / "back", tmp_path / "ours")
    record = checkpoint.read_checkpoint(tmp_path / "back/step_00000042")
    settings = record["settings"]
    assert settings["objective"] == objective and settings["run_dir"] == str(tmp_path / "back")
    assert ModelConfig(**record["model"]) == dataclasses.replace(network.config, init_std=0.02)

    convert_ok(tmp_path / "ours", tmp_path / "again", to="megatron", tensor_parallel=tp, pipeline_parallel=pp,
               verify=True)
    for path in tmp_path.glob("mega/iter_*/*/model_optim_rng.pt"):
        expected = torch.load(path, weights_only=False)
        written_path = tmp_path / "again/iter_0000007" / path.parent.name / path.name
        written = torch.load(written_path, weights_only=False)
        assert_same_rank(expected, written, int(path.parent.name[8:10]), network.config)
        if tp == 4:  # the vocabulary's padding is that of write_megatron
            assert written["args"].padded_vocab_size == expected["args"].padded_vocab_size


def assert_same_rank(expected, written, tensor_rank, config):
    """Two files of a rank agree in all but the rows that fill up the vocabulary."""
    expected["model"].pop("decoder.layers.0.mlp.linear_fc1._extra_state")
    assert expected["model"].keys() == written["model"].keys()
    for name, a in expected["model"].items():
        b = written["model"][name]
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            n_used = max(0, min(len(a), config.mask_id + 1 - tensor_rank * len(a)))
            a, b = a[:n_used], b[:n_used]
        assert torch.equal(a, b), name
    for name in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size",
                 "norm_epsilon", "model_running_mode", "add_qkv_bias", "qk_layernorm"):
        assert getattr(written["args"], name) == getattr(expected["args"], name), name


def test_arguments_that_are_not_set(tmp_path):
    """None means Megatron's default. A mask may be named by its text, and a window without end is none."""
    network = make_run(tmp_path / "ours", norm_eps=1e-5, rope_base=10000.0)
    write_megatron(
        tmp_path / "mega", network, "masked", norm_epsilon=None, rotary_base=None, rotary_percent=None,
        kv_channels=None, max_position_embeddings=None, window_size=(-1, -1), mask_token="<|mask|>",
        tensor_model_parallel_size="1", use_rope_scaling=None, vocab_size=None)
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes", verify=True)
    assert_same_weights(tmp_path / "back", tmp_path / "ours")
    record = checkpoint.read_checkpoint(tmp_path / "back/step_00000042")
    assert ModelConfig(**record["model"]) == dataclasses.replace(network.config, init_std=0.02)


def test_layers_without_transformer_engine(tmp_path):
    """transformer_impl=local keeps the norms in modules of their own."""
    write_megatron(tmp_path / "mega", make_run(tmp_path / "ours"), "masked", 2)
    own_names = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
                 "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight"}

    def rename(values):
        model = values["model"]
        for name in list(model):
            for fused, own in own_names.items():
                if name.endswith(fused):
                    model[name.replace(fused, own)] = model.pop(name)

    for path in tmp_path.glob("mega/*/*/model_optim_rng.pt"):
        edit_pickle(path, rename)
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes", verify=True)
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


def test_interleaved_pipelines(tmp_path):
    """With virtual stages a rank holds model0, model1, …: every second group of layers."""
    network = make_run(tmp_path / "ours", n_layer=4)
    write_megatron(tmp_path / "mega", network, "masked", 1, 4)
    folders = [tmp_path / f"mega/iter_0000042/mp_rank_00_{stage:03d}" for stage in range(4)]
    models = [torch.load(folder / "model_optim_rng.pt", weights_only=False)["model"] for folder in folders]
    for folder in folders[2:]:
        shutil.rmtree(folder)
    for rank in range(2):  # layers 0 and 2, 1 and 3
        contents = dict(args=megatron_args(network.config, "masked", 1, 2), iteration=42,
                        model0=models[rank], model1=models[rank + 2])
        torch.save(contents, folders[rank] / "model_optim_rng.pt")
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes", verify=True)
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


def test_weights_of_several_dtypes(tmp_path):
    """Matrices in bfloat16, norms in float32: as they are, or in one dtype."""
    write_megatron(tmp_path / "mega", make_run(tmp_path / "ours"), "masked")

    def round_matrices(values):
        for name, w in values["model"].items():
            if isinstance(w, torch.Tensor) and w.dim() > 1:
                values["model"][name] = w.bfloat16()

    edit_pickle(tmp_path / "mega" / RANK_0, round_matrices)
    for dtype in ("source", "bfloat16", "float32"):
        convert_ok(tmp_path / "mega", tmp_path / dtype, tokenizer="bytes", dtype=dtype, verify=True)
    assert {w.dtype for w in weights_of(tmp_path / "source").values()} == {torch.bfloat16, torch.float32}
    assert {w.dtype for w in weights_of(tmp_path / "bfloat16").values()} == {torch.bfloat16}


def test_honest_checkpoints_hold_more_than_tensors(monkeypatch, tmp_path):
    """Random states, paths, dates and activation functions are names that nobody looks up."""
    names = ("megatron", "megatron.core", "megatron.core.enums")
    modules = {name: types.ModuleType(name) for name in names}
    enums = modules["megatron.core.enums"]
    enums.Backend = enum.Enum("Backend", ["flash", "auto"], module="megatron.core.enums", qualname="Backend")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    random_states = [dict(np_rng_state=np.random.get_state(), scalar=np.float64(1.5))]
    extra = dict(
        rng_state=random_states, when=datetime.datetime(2026, 1, 1), where=Path("a"), part=slice(1, 2),
        space=types.SimpleNamespace(a=1), act=torch.nn.functional.silu)
    write_megatron(
        tmp_path / "mega", make_run(tmp_path / "ours"), "masked", extra=extra,
        activation_func=torch.nn.functional.gelu, started=datetime.datetime(2026, 1, 1),
        attention_backend=enums.Backend.auto)
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes")
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


# ------------------------------------------------------------------------------------ the `torch_dist` format


@pytest.mark.parametrize("ranks, stacked", ((2, True), (4, True), (2, False)))
def test_torch_dist_converts(tmp_path, ranks, stacked):
    network = make_run(tmp_path / "ours", n_kv_head=2, tied=False, n_layer=4)
    write_distributed(tmp_path / "mega", network, "masked", ranks, stacked)
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes", verify=True)
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


@pytest.mark.parametrize("core", ("0.12", "0.19"))
def test_torch_dist_of_later_versions_of_the_core(tmp_path, core):
    network = make_run(tmp_path / "ours", n_kv_head=2)
    write_distributed(tmp_path / "mega", network, "masked", core=core)
    folder = tmp_path / "mega/iter_0000042"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    kinds = {item.type.name for plan in metadata.all_local_plans for item in plan.items}
    assert kinds == {"SHARD", "BYTE_IO"} and (folder / "common.pt").is_file() == (core == "0.12")
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes", verify=True)
    assert_same_weights(tmp_path / "back", tmp_path / "ours")
    assert checkpoint.read_checkpoint(tmp_path / "back/step_00000042")["step"] == 42


def test_a_chunk_that_is_a_view_of_more(tmp_path):
    """Megatron's own writer saves a view with all that it is a part of."""
    network, name = make_run(tmp_path / "ours"), "decoder.final_layernorm.weight"
    write_distributed(tmp_path / "mega", network, "masked", ranks=1)
    values = network.norm.weight.detach()
    view = torch.cat((values + 1, values, values - 1))[len(values) : 2 * len(values)]
    replace_chunk(tmp_path / "mega/iter_0000042", name, view)
    convert_ok(tmp_path / "mega", tmp_path / "back", tokenizer="bytes", verify=True)
    assert_same_weights(tmp_path / "back", tmp_path / "ours")


# --------------------------------------------------------------------------------------------- files that lie


def edit_all_ranks(folder, **tensors):
    """Give every rank these tensors; `__` stands for a dot in their names."""
    for path in folder.glob("*/*/*.pt"):
        edit_pickle(path, lambda values: values["model"].update(
            {name.replace("__", "."): tensor for name, tensor in tensors.items()}))


def edit_rank_0(change):
    return lambda folder: edit_pickle(folder / RANK_0, change)


def number_names(values):
    values[0] = 1
    values["model"][1] = torch.ones(2)
    values["model"].pop("decoder.final_layernorm.weight")


LIES = {  # {name: (arguments, a change of the folder, what is said)}
    "LayerNorm": (dict(normalization="LayerNorm"), None, "normalization=LayerNorm"),
    "experts": (dict(num_experts=8), None, "num_experts=8"),
    "learned positions": (
        dict(position_embedding_type="learned_absolute"), None, "position_embedding_type=learned_absolute"),
    "partial rotary": (dict(rotary_percent=0.5), None, "rotary positions are partial"),
    "another aim": (dict(model_running_mode="test-forward"), None, "give --objective"),
    "another norm of queries": (dict(qk_l2_norm=True), None, "qk_l2_norm=True"),
    "uneven heads": (dict(group_query_attention=True, num_query_groups=3), None, "contradict each other"),
    "another softmax": (dict(softmax_type="off-by-one"), None, "softmax_type=off-by-one"),
    "a clamped activation": (
        dict(activation_func_clamp_value=7.0), None, "activation_func_clamp_value=7.0"),
    "windows": (dict(window_size=(128, 0)), None, "window_size=(128, 0)"),
    "no number of ranks": (dict(tensor_model_parallel_size="two"), None, "how many ranks"),
    "no heads": (dict(num_attention_heads=0, kv_channels=None), None, "can't be understood"),
    "block-causal attention": (dict(attention_mask_type="block_causal"), None, "give --objective"),
    "another mask": (dict(mask_token=300), None, "its mask has the id 300"),
    "another rank's file": (
        {}, lambda d: torch.save([1], d / "iter_0000042/mp_rank_01/model_optim_rng.pt"), "holds no model"),
    "numbers for names": (
        {}, edit_rank_0(number_names), "has no decoder.final_layernorm.weight, which other ranks have"),
    "an embedding without rows": (
        {}, lambda d: edit_all_ranks(d, embedding__word_embeddings__weight=torch.tensor(1.0)),
        "is no array of weights"),
    "a matrix of one dimension": (
        {}, lambda d: edit_all_ranks(d, decoder__layers__0__mlp__linear_fc2__weight=torch.ones(8)),
        "it can't be part of a whole"),
    "an iteration beyond numbers": (
        {}, lambda d: (d / "latest_checkpointed_iteration.txt").write_bytes(b"9" * 5000),
        "holds no iteration"),
    "no arguments": ({}, edit_rank_0(lambda values: values.pop("args")), "holds no arguments"),
    "a tensor is missing": (
        {}, edit_rank_0(lambda values: values["model"].pop("decoder.layers.1.mlp.linear_fc2.weight")),
        "has no decoder.layers.1.mlp.linear_fc2.weight, which other ranks have"),
    "a tensor is too much": (
        {}, lambda d: edit_all_ranks(d, decoder__layers__0__mlp__linear_fc1__bias=torch.ones(64)),
        "decoder.layers.0.mlp.linear_fc1.bias"),
    "another shape": (
        {}, lambda d: edit_all_ranks(d, decoder__final_layernorm__weight=torch.ones(31)),
        "decoder.final_layernorm.weight is (31,), and should be (32,)"),
    "norms differ": (
        {}, edit_rank_0(lambda values: values["model"]["decoder.final_layernorm.weight"].add_(1)),
        "decoder.final_layernorm.weight differs between tensor-parallel ranks"),
    "cut short": (
        {}, lambda d: (d / RANK_0).write_bytes((d / RANK_0).read_bytes()[:5000]), "can't be read"),
    "a shard is missing": (
        {}, lambda d: (d / RANK_0).unlink(), "the shard of tensor rank 0, pipeline rank 0 is not there"),
    "the iteration is missing": (
        {}, lambda d: (d / "latest_checkpointed_iteration.txt").write_bytes(b"43"), "iter_0000043"),
}


@pytest.mark.parametrize("lie", LIES)
def test_folders_that_lie(tmp_path, lie):
    args, change, message = LIES[lie]
    write_megatron(tmp_path / "mega", make_run(tmp_path / "ours"), "masked", 2, 1, **args)
    if change:
        change(tmp_path / "mega")
    error = refusal(tmp_path, source=tmp_path / "mega", out=tmp_path / "out", tokenizer="bytes")
    assert message in error, error


def test_torch_dist_folders_that_lie(distributed, tmp_path):
    shutil.copytree(distributed, tmp_path / "mega")
    folder, embedding = tmp_path / "mega/iter_0000042", "embedding.word_embeddings.weight"
    flags = dict(source=tmp_path / "mega", out=tmp_path / "out", tokenizer="bytes")
    original = {path.name: path.read_bytes() for path in folder.iterdir()}
    without_place = pickle.loads(original[".metadata"])
    places = dict(without_place.storage_data)
    del places[next(index for index in places if index.fqn == embedding)]
    without_place.storage_data = places
    without_chunk = pickle.loads(original[".metadata"])
    without_chunk.state_dict_metadata[embedding].chunks.pop()
    for name, content, message in (
            ("__1_0.distcp", original["__1_0.distcp"][:3000], "can't be read"),
            (".metadata", original[".metadata"][:2000], ".metadata can't be read"),
            (".metadata", pickle.dumps(without_place), embedding),
            (".metadata", pickle.dumps(without_chunk), f"values of {embedding} are there"),
            ("common.pt", b"", "common.pt can't be read")):
        (folder / name).write_bytes(content)
        assert message in refusal(tmp_path, **flags), name
        (folder / name).write_bytes(original[name])
    (folder / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in refusal(tmp_path, **flags)
