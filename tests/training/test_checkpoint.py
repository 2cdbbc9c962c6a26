"""Checkpoints: weights come back, damage is noticed, hostile files run no code, old ones make room."""

import io
import json
import os
import pickle
import re
import shutil
import threading
import time
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from runs import steps_saved
from test_model import build, tokens

from corpus.files import sha256_of
from model import ModelConfig, Transformer
from training import checkpoint, update
from training.checkpoint import (
    Saver,
    checkpoints,
    load_model,
    load_newest,
    read_checkpoint,
    record_digest,
)
from training.distributed import SINGLE, Ranks

SHARD = "optimizer/shard-00001-model-00001-of-00001.safetensors"


def save(run, model, steps=(1, 2), keep=5):
    """Write checkpoints as training does, with one real optimizer step before each."""
    run.mkdir(exist_ok=True)
    optimizer = update.make_optimizer(model, 0.1, (0.9, 0.95), 0.1)
    for step in steps:
        time = torch.full((2, 1), 0.5) if model.config.timed else None
        model(tokens(2, 16), time).square().sum().backward()
        if model.lm_head is not None:
            model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
        optimizer.step()
        saver = Saver(run, model, optimizer, SINGLE, keep)
        saver.save(step, record_of(model.config))
        saver.wait()
        assert not saver.failure


def record_of(config):
    """As much of a record as a network's weights need."""
    objective = "uniform" if config.timed else "masked"
    settings = dict(objective="ar" if config.causal else objective, loss="elbo", schedule="linear",
                    seq_len=config.seq_len, corpus="")
    corpus = dict(tokenizer="bytes", n_vocab=config.n_vocab, mask_id=config.mask_id, eos_id=0)
    return dict(settings=settings, model=asdict(config), corpus=corpus)


def tiny():
    return Transformer(ModelConfig(1, 2, 2, 8, 16, 64, 50, 50, 8, causal=False)).init_weights()


def sign(folder, record):
    """Write a record with the digest that it needs."""
    record = {name: value for name, value in record.items() if name != "record_sha256"}
    (folder / "checkpoint.json").write_text(
        json.dumps(record | dict(record_sha256=record_digest(record))), encoding="utf-8"
    )


# ------------------------------------------------------------------------------------------ weights come back


@torch.no_grad()
def same_logits(one, other):
    time = torch.tensor([[0.2], [0.7]])
    logits = [F.linear(model(tokens(2, 16), time), model.head) for model in (one, other)]
    return torch.equal(*logits)


@pytest.mark.parametrize("shape", (
    dict(), dict(tied=False, causal=True, n_kv_head=2), dict(timed=True, rope_base=50.0)), ids=str)
def test_a_checkpoint_gives_the_network_back(tmp_path, shape):
    model = build(**shape)
    save(tmp_path / "run", model)
    folder, record = load_newest(tmp_path / "run", pytest.fail)
    assert folder.name == "step_00000002" and record["step"] == 2
    again = load_model(folder, record).eval()
    assert again.config == model.config and same_logits(again, model)
    assert not same_logits(load_model(tmp_path / "run/step_00000001", record).eval(), model)


def test_whoever_can_read_the_folder_can_read_the_weights(tmp_path):
    save(tmp_path / "run", build())
    files = [path for path in checkpoints(tmp_path / "run")[0].rglob("*") if path.is_file()]
    assert len(files) == 3 and all(path.stat().st_mode & 0o044 == 0o044 for path in files)


# ----------------------------------------------------------------------------------------------------- damage


def flip(path, where):
    """Change one bit of a file, at a fraction of its length."""
    content = bytearray(path.read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)


def cut(path, where):
    path.write_bytes(path.read_bytes()[: int(where * path.stat().st_size)])


def fill_with_zeros(path, size):
    path.write_bytes(bytes(size))  # as after a power cut


def change_a_number(path, _):
    text = path.read_text(encoding="utf-8")
    assert '"step": 2' in text
    path.write_text(text.replace('"step": 2', '"step": 3'), encoding="utf-8")


def remove(path, _):
    path.unlink()


DAMAGE = [
    (name, harm, where) for name in ("model.safetensors", SHARD)
    for harm, where in ((flip, 0.0), (flip, 0.5), (flip, 1.0), (cut, 0.0), (cut, 0.99), (remove, 0))
] + [
    ("checkpoint.json", harm, where)
    for harm, where in (
        (cut, 0.0), (cut, 0.5), (cut, 0.98), (fill_with_zeros, 500), (change_a_number, 0), (remove, 0))
]


def what_is_wrong(name, harm):
    """What a warning says of it after the folder's name, as a pattern."""
    if name != "checkpoint.json":
        return f"/{name} is missing or damaged"
    if harm is change_a_number:
        return "/checkpoint.json is damaged"
    if harm is remove:
        return r" is no complete checkpoint \(FileNotFoundError: .+\)"
    return "/checkpoint.json can't be read: JSONDecodeError: .+"


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path):
    save(tmp_path, build())
    newest = tmp_path / "step_00000002"
    for name, harm, where in DAMAGE:
        intact = (newest / name).read_bytes()
        harm(newest / name, where)
        with pytest.raises(ValueError, match="step_00000002"):
            read_checkpoint(newest)
        warnings = []
        folder, record = load_newest(tmp_path, warnings.append)
        assert (folder.name, record["step"]) == ("step_00000001", 1)
        problem = re.escape(str(newest)) + what_is_wrong(name, harm)
        assert len(warnings) == 1
        assert re.fullmatch(f"{problem}; falling back to the checkpoint before it", warnings[0])
        (newest / name).write_bytes(intact)
        assert load_newest(tmp_path, pytest.fail)[0] == newest  # it was the damage, and only that


def test_a_file_too_many_is_damage(tmp_path):
    save(tmp_path, build(), steps=(1,))
    shutil.copyfile(tmp_path / "step_00000001/model.safetensors", tmp_path / "step_00000001/more.safetensors")
    with pytest.raises(ValueError, match="more.safetensors is no part of this checkpoint"):
        read_checkpoint(tmp_path / "step_00000001")


@pytest.mark.parametrize(
    "text", ("[]", "null", '{"sha256": null}', '{"sha256": {}}', '{"record_sha256": "0"}'))
def test_a_record_of_another_form_is_damage_too(tmp_path, text):
    (tmp_path / "checkpoint.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError):
        read_checkpoint(tmp_path)


def test_no_usable_checkpoint_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_newest(tmp_path / "nowhere", pytest.fail)
    save(tmp_path, build())
    for folder in checkpoints(tmp_path):
        flip(folder / "model.safetensors", 0.5)
    warnings = []
    with pytest.raises(FileNotFoundError, match="no usable checkpoint in .*00000001/model.safetensors is"):
        load_newest(tmp_path, warnings.append)
    assert len(warnings) == 1  # there is none before the last one to fall back to


def test_only_a_record_that_fits_is_taken(tmp_path):
    save(tmp_path, build(), steps=(1, 2, 3))
    folder, record = load_newest(tmp_path, pytest.fail, fit=lambda record: record["step"] < 3)
    assert folder.name == "step_00000002" and record["step"] == 2


# ---------------------------------------------------------------------------------------------- older records


def test_an_old_record_is_checked_as_it_was_written(tmp_path):
    save(tmp_path, build(), steps=(1,))
    folder = tmp_path / "step_00000001"
    record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    record["model"]["block_len"] = record["model"].pop("seq_len")
    sign(folder, record | dict(samples=8))
    again = read_checkpoint(folder)
    assert again["next_sample"] == 8 and again["model"]["seq_len"] == 16
    assert load_model(folder, again).config.seq_len == 16


# ---------------------------------------------------------------------------------------------- hostile files


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def torch_load(file):
    return torch.load(file, weights_only=False)


PICKLES = {"pickle": (pickle.dumps, pickle.load), "torch": (torch_bytes, torch_load)}


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ("model.safetensors", SHARD, "optimizer/.metadata", "checkpoint.json"))
def test_a_pickle_in_disguise_runs_no_code(tmp_path, name, kind):
    save(tmp_path / "run", build(), steps=(1,))
    dump, load = PICKLES[kind]
    folder, bang = tmp_path / "run/step_00000001", tmp_path / "bang"
    (folder / name).write_bytes(dump(Bomb(bang)))
    if name == "checkpoint.json":
        with pytest.raises(ValueError):
            read_checkpoint(folder)
    else:
        record = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        record["sha256"][name] = sha256_of(folder / name)  # its maker knows how to hash
        sign(folder, record)
        restore_hostile(folder, name)
    assert not bang.exists()
    with open(folder / name, "rb") as file:
        load(file)
    assert bang.exists()  # the bomb is live: another loader would have set it off


def restore_hostile(folder, name):
    """Read a checkpoint with a hostile file as sampling and training do."""
    record, model = read_checkpoint(folder), build()
    optimizer = update.make_optimizer(model, 0.1, (0.9, 0.95), 0.1)
    if name == "optimizer/.metadata":  # where dcp's other format has its pickle: nobody looks at it
        checkpoint.restore(folder, record, model, optimizer)
        return
    with pytest.raises(ValueError, match="can't be read") as caught:
        checkpoint.restore(folder, record, model, optimizer)
    assert "\n" not in str(caught.value)
    if name == "model.safetensors":
        with pytest.raises(ValueError, match="model.safetensors can't be read"):
            load_model(folder, record)


# ------------------------------------------------------------------------------------------------- what stays


def test_checkpoints_are_sorted_by_number_and_unfinished_ones_ignored(tmp_path):
    for name in ("step_00000009", "step_99999999", "step_100000000"):
        (tmp_path / name).mkdir()
    for name in (".step_00000011", "step_00000012.tmp", "step_x"):
        (tmp_path / name).mkdir()
    assert steps_saved(tmp_path) == [100000000, 99999999, 9]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    save(tmp_path, build(), steps=(5, 20, 100, 101), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000100", "step_00000101"]


@pytest.mark.parametrize("leftover", ("step_00000001", ".step_00000002", ".gone_step_00000000"))
def test_what_goes_is_room(tmp_path, leftover):
    """Old checkpoints, and what a crash has left, are removed before the disk is full."""
    # one checkpoint kept, one in the making: a gigabyte too much
    size = (shutil.disk_usage(tmp_path).free + 10**9) // 2
    with pytest.raises(OSError, match="lower --keep"):
        checkpoint.check_space(tmp_path, size, 0, 1)
    (tmp_path / leftover).mkdir()
    with open(tmp_path / leftover / "x", "wb") as file:
        file.truncate(3 * 10**9)  # a hole: it takes no room
    checkpoint.check_space(tmp_path, size, 0, 1)


# ----------------------------------------------------------------------------------------------------- saving


def test_ranks_that_all_hold_all_copy_only_what_they_write(tmp_path, monkeypatch):
    """DDP: the weights on rank 0, every moment on one rank."""
    network = tiny()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    optimizer.step()
    copies = []
    monkeypatch.setattr(Saver, "work", lambda self, step, staged, record: copies.append(staged))
    for rank in range(3):
        saver = Saver(tmp_path, network, optimizer, Ranks(rank, 3), 2)
        saver.save(1, {})
        saver.wait()
    names = [name for name, _ in network.named_parameters()]
    assert [list(copy["weights"]) for copy in copies] == [names, [], []]
    moments = sorted(key for copy in copies for key in copy["moments"])
    assert moments == sorted(f"{name}.{key}" for name in names for key in ("exp_avg", "exp_avg_sq"))


def test_a_slow_write_is_no_standstill(tmp_path):
    """Whoever waits for a checkpoint hears that it grows, and nothing once it does not."""
    heard = []
    saver = Saver(tmp_path, tiny(), None, SINGLE, 2, alive=lambda: heard.append(time.monotonic()))

    def write():
        (tmp_path / ".step_00000001").mkdir()
        for i in range(3):
            (tmp_path / f".step_00000001/{i}").write_bytes(b"x")
            time.sleep(1.5)  # longer than what lies between two looks
        time.sleep(3)

    saver.thread = threading.Thread(target=write)
    begin = time.monotonic()
    saver.thread.start()
    saver.wait()
    assert 3 <= len(heard) <= 5 and heard[-1] - begin < 4.5


# ------------------------------------------------------------------------------------------ the folder's lock


def test_a_lock_neither_follows_a_link_nor_empties_a_file(tmp_path):
    """Somebody else may have put it there: a folder with only a lock in it passes for a new one."""
    precious = tmp_path / "precious"
    precious.write_text("of value", encoding="utf-8")
    for name in ("linked", "file"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked/.lock").symlink_to(precious)
    with pytest.raises(OSError, match="linked/.lock can't be opened as a lock: .*; remove it"):
        checkpoint.lock_run_folder(tmp_path / "linked", 0)
    (tmp_path / "file/.lock").write_text("of value", encoding="utf-8")
    checkpoint.lock_run_folder(tmp_path / "file", 0)
    assert precious.read_text(encoding="utf-8") == "of value"
    assert (tmp_path / "file/.lock").read_text(encoding="utf-8") == "of value"
