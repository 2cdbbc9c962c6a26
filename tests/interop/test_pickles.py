"""Nothing in a file is run: poisoned pickles in every place where a checkpoint has one, and damaged ones."""

import os
import pickle
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import (
    assert_same_weights,
    convert_ok,
    edit_pickle,
    make_run,
    refusal,
    replace_chunk,
    write_distributed,
    write_megatron,
)
from torch.distributed.checkpoint import metadata as dcp_metadata

from interop import distcp, pickles


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """A Megatron run in `torch_dist` format, to copy."""
    folder = tmp_path_factory.mktemp("distributed")
    write_distributed(folder / "mega", make_run(folder / "ours"), "masked")
    return folder / "mega"


class Poison:
    """Pickled, it is a call that makes the file `path`."""

    def __init__(self, path, function):
        self.path = path
        self.function = function

    def __reduce__(self):
        calls = {"posix.system": (os.system, (f"touch {self.path}",)),
                 "builtins.exec": (exec, (f"open({str(self.path)!r}, 'w')",)),
                 "subprocess.call": (subprocess.call, (["touch", str(self.path)],))}
        return calls[self.function]


@pytest.mark.parametrize("module, name", (
    ("torch.distributed.checkpoint.planner", "DefaultSavePlanner"), ("torch.distributed.checkpoint", "save"),
    ("torch", "load"), ("builtins", "getattr")))
def test_metadata_names_nothing_but_what_checkpoints_need(tmp_path, module, name):
    (tmp_path / ".metadata").write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b".")
    with pytest.raises(pickles.RefusedPickle, match=name):
        distcp.read_metadata(tmp_path / ".metadata")


@pytest.mark.parametrize("function", ("posix.system", "builtins.exec", "subprocess.call"))
def test_poisoned_pickles_are_refused(distributed, tmp_path, function):
    network, made = make_run(tmp_path / "ours"), tmp_path / "made"
    poison = Poison(made, function)
    write_megatron(tmp_path / "rank_0", network, "masked", extra=dict(rng_state=poison))
    write_megatron(tmp_path / "rank_1", network, "masked", 2)
    rank_1 = tmp_path / "rank_1/iter_0000042/mp_rank_01/model_optim_rng.pt"
    edit_pickle(rank_1, lambda values: values.update(rng_state=poison))
    for name in ("common", "metadata", "chunk"):
        shutil.copytree(distributed, tmp_path / name)
    edit_pickle(tmp_path / "common/iter_0000042/common.pt", lambda values: values.update(rerun=poison))
    path = tmp_path / "metadata/iter_0000042/.metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = poison
    path.write_bytes(pickle.dumps(metadata))
    replace_chunk(tmp_path / "chunk/iter_0000042", "decoder.final_layernorm.weight", poison)
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    (tmp_path / "hf/model.safetensors").unlink()
    shutil.copytree(tmp_path / "hf", tmp_path / "old_hf")
    weights = {"model.norm.weight": poison}
    torch.save(weights, tmp_path / "hf/pytorch_model.bin")
    torch.save(weights, tmp_path / "old_hf/pytorch_model.bin", _use_new_zipfile_serialization=False)

    for name in ("rank_0", "rank_1", "common", "metadata", "chunk", "hf", "old_hf"):
        error = refusal(tmp_path, source=tmp_path / name, out=tmp_path / "out", tokenizer="bytes")
        assert f"{function.rpartition('.')[2]}', which no checkpoint needs" in error, (name, error)
    assert not made.exists()
    pickle.loads(pickle.dumps(poison))
    assert made.exists()  # it would have


def test_classes_in_use_are_out_of_a_pickles_reach(tmp_path):
    """A pickle's BUILD sets attributes, also of a class: of none that anybody but this pickle has."""
    state = b"N}X\x06\x00\x00\x00gainedX\x01\x00\x00\x00xs\x86b."  # (None, {"gained": "x"}) BUILD
    for module, name in (
            ("torch.distributed.checkpoint.metadata", "Metadata"), ("torch.serialization", "_get_layout"),
            ("torch", "device"), ("megatron.core.enums", "X")):
        (tmp_path / ".metadata").write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + state)
        with pytest.raises(ValueError, match="can't be read"):
            distcp.read_metadata(tmp_path / ".metadata")
    classes = (dcp_metadata.Metadata, torch.serialization._get_layout, torch.device, pickles.StandIn)
    assert not any(hasattr(thing, "gained") for thing in classes)


def test_old_pickles_cut_anywhere(tmp_path):
    """Before torch 1.6 files were no archives: wherever one ends too early, that is one line."""
    make_run(tmp_path / "ours", n_layer=1)
    convert_ok(tmp_path / "ours", tmp_path / "hf")
    weights, path = load_file(tmp_path / "hf/model.safetensors"), tmp_path / "hf/pytorch_model.bin"
    (tmp_path / "hf/model.safetensors").unlink()
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    for eighths in range(8):
        path.write_bytes(content[: len(content) * eighths // 8])
        error = refusal(tmp_path, source=tmp_path / "hf", out=tmp_path / "out")
        assert "pytorch_model.bin can't be read" in error
    path.write_bytes(content)
    convert_ok(tmp_path / "hf", tmp_path / "back")
    assert_same_weights(tmp_path / "back", tmp_path / "ours")
