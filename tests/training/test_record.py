"""Records of checkpoints: whatever is in one, it is used or refused in a line, and no code runs."""

import dataclasses
import json
import os
import shutil
import typing

import pytest
import torch
from conftest import call_main
from forgery import NESTED, forgeries, text_of
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import TINY, steps_saved
from safetensors.torch import load_file, save_file
from steps import build_run

import train
from corpus.files import check_no_pipes, sha256_of
from corpus.records import check
from evaluation import compare, measure
from interop import native
from laws import collect
from sampling.decode import DecodeConfig
from sampling.generator import Generator
from training.checkpoint import init_weights_from, newest_record, open_checkpoint, read_checkpoint
from training.checks import find_checkpoint, lock_run_folder
from training.guard import Guard
from training.objective import RankClock
from training.record import SETTINGS, record_digest
from training.state import RunState

CPU = torch.device("cpu")
SHARD = "optimizer/shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run saved after steps 2, with figures that are in no line yet, and 4. Leave it as it was."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_losses", lambda run_dirs, picture: None)
        flags = "--steps=4", "--save_at=2", "--log_every=4", "--keep=9"
        call_main(patch, *TINY, f"--corpus={corpus}", f"--run_dir={folder}", *flags)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def write_record(folder, record):
    """Write a checkpoint's record with the digest that it needs: its maker knows how to hash."""
    text = text_of(record)
    if NESTED not in json.dumps(record):
        digest = record_digest({name: value for name, value in record.items() if name != "record_sha256"})
        text = text_of(dict(record, record_sha256=digest))
    (folder / "checkpoint.json").write_text(text, encoding="utf-8")


def record_of(folder):
    return json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------- whoever uses a checkpoint


def sample(run, corpus):
    generator = Generator.from_checkpoint(run, "cpu").load_weights()
    generator.generate([[65, generator.tokenizer.mask_id]], DecodeConfig(steps=1))


def evaluate(run, corpus):
    generator = Generator.from_checkpoint(run, "cpu").load_weights()
    measure.open_validation(generator)


def convert(run, corpus):
    native.open_source(run)


def compare_with_others(run, corpus):
    compare.Run(run)


def collect_points(run, corpus):
    collect.read_points(run.parent)
    collect.read_curves(run.parent)


def resume(run, corpus):
    process = build_run(*TINY, "--steps=9", f"--corpus={corpus}", f"--run_dir={run}", "--resume=yes")
    folder, record = find_checkpoint(process)
    objective, _, optimizer = train.build(process, RankClock(CPU))
    Guard(process, RunState(), objective.network, optimizer).restore(folder, record)


def begin_from(run, corpus):
    folder, record = open_checkpoint(run)
    process = build_run(*TINY, "--steps=9", f"--corpus={corpus}", f"--run_dir={run}_new")
    objective, *_ = train.build(process, RankClock(CPU))
    init_weights_from(folder, record, objective.network)


USES = (sample, evaluate, convert, compare_with_others, collect_points, resume, begin_from)


def refusal(use, *arguments):
    """The line by which `use` refuses what it is given, "" where it does its work."""
    try:
        use(*arguments)
        return ""
    except SystemExit as stop:
        assert stop.code == 2
        return "exit 2"
    except (ValueError, OSError) as problem:
        assert str(problem) and "\n" not in str(problem) and len(str(problem)) < 6000
        return str(problem)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_forged_record_is_used_or_refused_in_a_line(trained, corpus, data):
    """48006ab: of 590 forgeries 123 ended in a traceback."""
    folder = trained / "step_00000002"
    genuine, other = (folder / "checkpoint.json").read_text(encoding="utf-8"), trained / "step_00000004"
    other.rename(trained / "away")
    try:
        write_record(folder, data.draw(forgeries(json.loads(genuine))))
        for use in data.draw(st.permutations(USES))[:3]:
            refusal(use, trained, corpus)
    finally:
        (folder / "checkpoint.json").write_text(genuine, encoding="utf-8")
        (trained / "away").rename(other)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_a_forged_record_is_used_or_refused_in_a_line_by_all(trained, corpus, data):
    folder = trained / "step_00000004"
    genuine = (folder / "checkpoint.json").read_text(encoding="utf-8")
    try:
        write_record(folder, data.draw(forgeries(json.loads(genuine))))
        for use in USES:
            refusal(use, trained, corpus)
    finally:
        (folder / "checkpoint.json").write_text(genuine, encoding="utf-8")


@pytest.mark.parametrize("use", USES)
def test_the_genuine_record_is_used(trained, corpus, use):
    use(trained, corpus)


# -------------------------------------------------------------------------------------- what is wrong with it


def set_member(record, place, value):
    *outer, name = place.split(".")
    for step in outer:
        record = record[step]
    record[name] = value


@pytest.mark.parametrize("place, value, problem", (
    ("step", "4", "step is '4', and should be a whole number"),
    ("step", True, "step is True, and should be a whole number"),
    ("updates", -1, "updates is -1"),
    ("next_sample", 10**400, "next_sample is 1"),
    ("pending", [{"loss": "1"}], "pending.0.loss is '1', and should be a number"),
    ("settings", [], "settings is [], and should be an object"),
    ("settings.seed", 0.5, "settings.seed is 0.5"),
    ("settings.objective", "nar", "settings.objective is 'nar', and should be one of masked, uniform, ar"),
    ("settings.schedule", "poly" + "9" * 400, "unknown schedule"),
    ("settings.seq_len", 64, "its model is not of its settings"),
    ("model.n_layer", 10**9, "model.n_layer is 1000000000, and should be a whole number from 1 to 4096"),
    ("model.n_kv_head", 7, "there can't be 2 heads of 16, 7 for keys and values"),
    ("model.causal", True, "its model is not of its settings"),
    ("model.experts", 8, "model.experts is not known: is it of a newer version?"),
    ("corpus.eos_id", None, "corpus.eos_id is None"),
    ("sha256.x", 1, "sha256.x is 1"),
    ("sha256", {"../../x": "0" * 64}, "(a name) is '../../x'"),
    ("sha256", {"/etc/passwd": "0" * 64}, "(a name) is '/etc/passwd'"),
    ("settings.corpus", NESTED, "RecursionError")))
def test_what_is_wrong_is_named_and_the_checkpoint_before_is_used(run, corpus, capsys, place, value, problem):
    newest = run / "step_00000004"
    record = record_of(newest)
    set_member(record, place, value)
    write_record(newest, record)
    with pytest.raises(ValueError) as caught:
        read_checkpoint(newest)
    assert str(caught.value).startswith(str(newest)) and problem in str(caught.value)
    assert Generator.from_checkpoint(run, "cpu").record["step"] == 2 == newest_record(run)["step"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {caught.value}; falling back to the checkpoint before it"


def test_a_run_goes_on_from_the_checkpoint_before_a_forged_one(run, corpus, run_main, capsys):
    newest = run / "step_00000004"
    write_record(newest, record_of(newest) | dict(passed_samples="none"))
    run_main("--steps=4", "--log_every=4", "--resume=auto")
    captured = capsys.readouterr()
    assert "passed_samples is 'none'" in captured.err and f"resumed from {run}/step_00000002" in captured.out
    assert (run / "damaged_step_00000004").is_dir() and steps_saved(run) == [4, 2]


def test_members_that_are_missing(run, corpus, refused):
    """Of a run that goes on more is needed than of one that is sampled."""
    for step in (2, 4):
        record = record_of(run / f"step_{step:08d}")
        del record["pending"], record["settings"]["wandb"], record["settings"]["seed"]
        write_record(run / f"step_{step:08d}", record)
    assert not refusal(sample, run, corpus)
    error = refused("--steps=9", "--resume=yes")
    assert error == "train.py: cannot resume a checkpoint whose record lacks pending\n"
    del record["settings"]["loss"]
    write_record(run / "step_00000004", record)
    with pytest.raises(ValueError, match="settings.loss is missing"):
        read_checkpoint(run / "step_00000004")


def test_settings_of_a_newer_version_are_let_through(run, corpus):
    record = record_of(run / "step_00000004")
    record["settings"]["of_a_newer_version"] = [1]
    write_record(run / "step_00000004", record)
    assert not refusal(sample, run, corpus) and not refusal(resume, run, corpus)
    assert open_checkpoint(run)[1]["step"] == 4


@pytest.mark.parametrize("name", ("checkpoint.json", "model.safetensors", SHARD))
def test_a_pipe_is_not_waited_for(run, name, capsys):
    path = run / "step_00000004" / name
    path.unlink()
    os.mkfifo(path)
    assert open_checkpoint(run)[1]["step"] == 2
    assert str(path) in capsys.readouterr().err


@pytest.mark.parametrize("name", (".latest", "metrics.jsonl", "validation.tmp", "settings.json"))
def test_a_pipe_where_a_run_writes_is_refused(run, corpus, name):
    """Opening one to write waits for a reader: for ever."""
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    process = build_run(*TINY, "--steps=9", f"--corpus={corpus}", f"--run_dir={run}", "--resume=yes")
    with pytest.raises(ValueError, match=f"{name}: a pipe, which can be read only once; remove it"):
        lock_run_folder(process)
    (run / name).unlink()
    (run / "link").symlink_to(run / "nowhere")  # of these nothing is to be feared
    check_no_pipes(run)
    check_no_pipes(run / "not_there_yet")


def test_a_pointer_of_git_lfs_is_named(run, corpus):
    """A clone without Git LFS has them in the place of weights."""
    for folder in run.glob("step_*"):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'7' * 64}\nsize 135000\n"
        (folder / "model.safetensors").write_text(pointer, encoding="utf-8")
    for command in (sample, resume):
        assert "model.safetensors is a Git LFS pointer" in refusal(command, run, corpus)


def test_every_setting_in_the_schema_is_one_of_train_py():
    """With a default that the schema lets through."""
    known = {field.name: field for field in dataclasses.fields(train.Config)}
    types = typing.get_type_hints(train.Config)
    for key, schema in SETTINGS.items():
        name = key.removesuffix("?")
        check(known[name].default, schema, name)
        if typing.get_origin(types[name]) is typing.Literal:
            assert schema == typing.get_args(types[name])


# ------------------------------------------------------------------------------------- weights of other types


@pytest.mark.parametrize("dtype", (torch.int8, torch.int64, torch.complex64, torch.float8_e4m3fn, torch.bool))
def test_weights_that_are_no_numbers_of_weights(run, corpus, dtype):
    """48006ab took int8 and complex weights for weights."""
    for folder in run.glob("step_*"):
        weights = load_file(folder / "model.safetensors")
        weights["norm.weight"] = weights["norm.weight"].to(dtype)
        save_file(weights, folder / "model.safetensors")
        record = record_of(folder)
        record["sha256"]["model.safetensors"] = sha256_of(folder / "model.safetensors")
        write_record(folder, record)
    for use in (sample, evaluate, convert, begin_from):
        assert "norm.weight is" in refusal(use, run, corpus)
    assert refusal(resume, run, corpus) == "exit 2"


def test_moments_of_another_type(run, corpus, refused):
    for folder in run.glob("step_*"):
        moments = load_file(folder / SHARD)
        name = next(iter(moments))
        save_file(moments | {name: moments[name].to(torch.int8)}, folder / SHARD)
        record = record_of(folder)
        record["sha256"][SHARD] = sha256_of(folder / SHARD)
        write_record(folder, record)
    assert not refusal(sample, run, corpus)
    assert f"{name} is torch.int8: weights are" in refused("--steps=9", "--resume=yes")
