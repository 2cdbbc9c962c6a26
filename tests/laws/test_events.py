"""The reference backend's TensorBoard logs as a CSV of runs."""

import os

import pytest
from known import read_rows, write

from laws import events
from laws.collect import find_csv

SHAPE = dict(hidden_size=128, num_layers=3, ffn_hidden_size=320, num_attention_heads=4, kv_channels=32,
             padded_vocab_size=50304, swiglu=True, untie_embeddings_and_output_weights=False,
             global_batch_size=256, seq_length=2048)  # fmt: skip


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Event files as Megatron writes them, by tensorboard's writer: arguments as texts, losses by step."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    folder = tmp_path_factory.mktemp("tensorboard")
    for name, layers in (("a", 3), ("b/c", 6)):
        with SummaryWriter(str(folder / "logs" / name)) as writer:
            for key, value in (SHAPE | dict(num_layers=layers)).items():
                writer.add_text(key, str(value), global_step=0)
            for step in range(1, 3001):
                writer.add_scalar("lm loss", 3 + 1 / step, step)
                if step % 1000 == 0 and name == "a":
                    writer.add_scalar("lm loss validation", 4 + 1 / step, step)
    for name, tag in (("bare", "lm loss"), ("other", "accuracy")):
        with SummaryWriter(str(folder / name / "x")) as writer:
            writer.add_scalar(tag, 3.0, 1)
    return folder


def test_a_run_is_its_last_point(logs, tmp_path):
    rows = read_rows(events.write_points(logs / "logs", tmp_path / "points.csv"))
    blocks = 4 * 128 * 128 + 3 * 128 * 320
    assert [int(row["params"]) for row in rows] == [50304 * 128 + 3 * blocks, 50304 * 128 + 6 * blocks]
    assert [int(row["tokens"]) for row in rows] == [3000 * 256 * 2048] * 2
    assert [float(row["loss"]) for row in rows] == pytest.approx([4 + 1 / 3000, 3 + 1 / 3000], abs=1e-4)


def test_a_run_with_unique_tokens_is_a_curve(logs, tmp_path):
    write(logs / "logs/runs.csv", [dict(run="a", unique_tokens=10_000_000)])
    assert find_csv(logs / "logs", tmp_path / "out") == tmp_path / "out/points.csv"
    rows = read_rows(tmp_path / "out/points.csv")
    epochs = [k * 1000 * 256 * 2048 / 1e7 for k in (1, 2, 3)]
    assert [float(row["epochs"]) for row in rows if row["run"] == "a"] == pytest.approx(epochs, rel=1e-5)
    (logs / "logs/runs.csv").unlink()


def test_of_a_restart_each_step_counts_once(tmp_path):
    """A run went on from step 200 after it had come to 300: one value per step, the newest."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for part, steps, loss in (("1", range(1, 301), 5.0), ("2", range(201, 401), 3.0)):
        with SummaryWriter(str(tmp_path / "logs/a"), filename_suffix=part) as writer:
            for key, value in SHAPE.items():
                writer.add_text(key, str(value), global_step=0)
            for step in steps:
                writer.add_scalar("lm loss validation", loss, step, walltime=1e9 * int(part) + step)
    write(tmp_path / "logs/runs.csv", [dict(run="a", unique_tokens=10_000_000)])
    rows = read_rows(events.write_points(tmp_path / "logs", tmp_path / "points.csv"))
    tokens = [int(row["tokens"]) / (256 * 2048) for row in rows]
    assert tokens == list(range(1, 401))
    assert [float(row["loss"]) for row in rows] == [5.0] * 200 + [3.0] * 200


@pytest.mark.parametrize("folder, known, message", [
    ("bare", None, "does not log the argument 'hidden_size'; give params and tokens_per_step in"),
    ("other", None, "has no 'lm loss' or 'lm loss validation'; it has accuracy"),
    ("bare", dict(name="x"), "runs.csv has no column run; it has name"),
    ("bare", dict(run="x", params="many"), "runs.csv: run x: could not convert"),
])  # fmt: skip
def test_logs_that_do_not_suffice(logs, tmp_path, folder, known, message):
    if known:
        write(logs / folder / "runs.csv", [known])
    with pytest.raises(ValueError, match=message):
        events.write_points(logs / folder, tmp_path / "points.csv")
    (logs / folder / "runs.csv").unlink(missing_ok=True)


def test_a_pipe_or_a_pointer_is_called_what_it_is(tmp_path):
    """A CSV is read more than once."""
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "lfs.csv").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 9\n")
    for name, what in (("pipe.csv", "a pipe, which can be read only once"), ("lfs.csv", "a Git LFS pointer")):
        with pytest.raises(ValueError, match=what):
            find_csv(tmp_path / name, tmp_path / "out")
