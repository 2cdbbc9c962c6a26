"""Stopping, dying and going on: a run that was cut off ends, bit for bit, as if it had not been."""

import json
import shutil
import signal
from pathlib import Path

import pytest
from conftest import call_main, litter, prepared
from runs import (
    TINY,
    assert_close_figures,
    equal_runs,
    event_names,
    events,
    figures,
    last_step,
    steps_saved,
    stopped,
)
from test_checkpoint import PICKLES, SHARD, Bomb

import train
from configurator.renamed import RECORD, SETTINGS
from corpus.files import sha256_of
from training import checkpoint, checks
from training.checkpoint import checkpoints, read_checkpoint, record_digest
from training.distributed import STOPPED
from training.log import read_metrics

FLAGS = ["--steps=40", "--save_every=20"]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A run of 40 steps, saved at 20 and 40. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("trained") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, *TINY, f"--corpus={corpus}", f"--run_dir={folder}", *FLAGS)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, where `run_main` trains."""
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def modification_times(folder):
    """{path: when it was changed} of all in a run's folder but its lock."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def contents(folder):
    """{path below it: bytes} of the files in a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_record(folder, edit):
    """Change a checkpoint's record, with the digest that it then needs; edit(record) → the new one."""
    path = folder / "checkpoint.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["record_sha256"]
    record = edit(record)
    path.write_text(json.dumps(record | {"record_sha256": record_digest(record)}), encoding="utf-8")


# -------------------------------------------------------------------------------------------- killed, stopped


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(run_main):
    flags = ["--steps=100", "--save_every=30", "--keep=9", "--eval_every=50", "--time=iid", "--dropout=0.1"]
    whole = run_main(*flags, run="whole")
    killed = whole.with_name("killed")  # after step 77, in the middle of writing a line and a checkpoint
    shutil.copytree(whole, killed)
    for step in (90, 100):
        shutil.rmtree(killed / f"step_{step:08d}")
    shutil.copytree(whole / "step_00000090", killed / ".step_00000090")
    lines = [json.dumps(m) for m in read_metrics(whole) if m["step"] <= 77]
    (killed / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 8', encoding="utf-8")
    run_main(*flags, "--resume=auto", run="killed")
    assert equal_runs(killed, whole) and not list(killed.glob(".step*"))


def test_killed_before_its_first_checkpoint_starts_over(trained, run_main, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copyfile(trained / "metrics.jsonl", tmp_path / "run/metrics.jsonl")  # all that was left
    assert equal_runs(run_main(*FLAGS, "--resume=auto"), trained)


def test_a_stop_signal_saves_and_the_line_in_progress_is_completed(run_main, monkeypatch, capsys):
    flags = ["--steps=60", "--log_every=7"]
    run = run_main(*flags, run="whole").with_name("run")
    code = stopped(lambda: run_main(*flags), signal.SIGTERM, monkeypatch, train, "training_step", 38)
    assert code == STOPPED == 75
    assert "stopped by a signal after step 38; continue with --resume=auto" in capsys.readouterr().out
    assert event_names(run) == ["stopped"] and steps_saved(run) == [38]
    run_main(*flags, "--resume=yes")
    assert equal_runs(run, run.with_name("whole"))


def test_a_signal_while_starting_up_is_heard(run_main, monkeypatch, capsys, tmp_path):
    """The handlers stand before anything is written."""
    call = stopped(lambda: run_main("--steps=100000"), signal.SIGINT, monkeypatch, checks, "lock_run_folder")
    assert call == STOPPED and "stopped by a signal" in capsys.readouterr().out
    assert steps_saved(tmp_path / "run") == [1]


# ---------------------------------------------------------------------------------------- damaged checkpoints


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def change_a_number(path):
    text = path.read_text(encoding="utf-8")
    assert '"next_sample": 320' in text
    path.write_text(text.replace('"next_sample": 320', '"next_sample": 330'), encoding="utf-8")


GONE = "FileNotFoundError: [Errno 2] No such file or directory: '{folder}/checkpoint.json'"


@pytest.mark.parametrize("name, harm, damage", (
    (SHARD, flip, "/{name} is missing or damaged"),
    ("model.safetensors", cut, "/{name} is missing or damaged"),
    ("checkpoint.json", change_a_number, "/{name} is damaged"),
    ("checkpoint.json", Path.unlink, f" is no complete checkpoint ({GONE})")),
    ids=("flipped", "cut", "changed", "gone"))
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
        run, trained, run_main, capsys, name, harm, damage):
    folder = run / "step_00000040"
    harm(folder / name)
    harmed = contents(folder)
    run_main(*FLAGS, "--resume=auto")
    captured = capsys.readouterr()
    problem = f"{folder}{damage.format(name=name, folder=folder)}"
    assert captured.err == (f"warning: {problem}; falling back to the checkpoint before it\n"
                            f"warning: {folder} is kept as damaged_step_00000040\n")
    assert contents(run / "damaged_step_00000040") == harmed
    assert f"resumed from {run}/step_00000020" in captured.out
    assert (run / "latest").read_text(encoding="utf-8") == "step_00000040\n"
    assert equal_runs(run, trained) and read_checkpoint(run / "step_00000040")["step"] == 40


def test_each_damaged_checkpoint_is_kept(run, run_main):
    """Also where one of the same step was kept before."""
    for damaged in ("damaged_step_00000040", "damaged_step_00000040_2"):
        cut(run / "step_00000040/model.safetensors")
        harmed = contents(run / "step_00000040")
        run_main(*FLAGS, "--resume=auto")
        assert contents(run / damaged) == harmed and steps_saved(run)[0] == 40
    cut(run / "step_00000040/model.safetensors")
    with pytest.raises(SystemExit):
        run_main("--steps=50", "--resume=auto", "--d_model=64")
    assert not (run / "damaged_step_00000040_3").exists()  # refused: nothing was touched


def test_what_systems_leave_in_a_checkpoint_is_no_damage(run, run_main, capsys):
    """48006ab took a .DS_Store for damage, and torch's reader opens every *.safetensors."""
    litter(run)
    run_main("--steps=50", "--resume=auto")
    captured = capsys.readouterr()
    assert f"resumed from {run}/step_00000040" in captured.out and not captured.err
    assert steps_saved(run)[0] == 50 and not list(run.glob("damaged*"))


def test_a_folder_with_nothing_of_ours_in_it_is_free(tmp_path, run_main):
    (tmp_path / "run").mkdir()
    litter(tmp_path / "run")
    assert steps_saved(run_main("--steps=2")) == [2]


@pytest.mark.parametrize("harm", (flip, cut, Path.unlink))
def test_nothing_depends_on_the_pointer_to_the_newest_checkpoint(run, trained, run_main, harm):
    harm(run / "latest")
    run_main(*FLAGS, "--resume=auto")
    assert equal_runs(run, trained)


def test_a_damaged_later_checkpoint_never_costs_a_good_one(run, run_main):
    (run / "step_00000040/model.safetensors").write_bytes(b"")
    run_main("--steps=30", "--resume=auto", "--keep=1")
    assert steps_saved(run) == [30]


def test_an_unfinished_checkpoint_is_no_checkpoint(run, run_main):
    shutil.copytree(run / "step_00000040", run / ".step_00000050")  # what a crash while writing leaves
    assert steps_saved(run) == [40, 20]
    run_main("--steps=50", "--resume=auto", "--keep=1")
    assert [path.name for path in run.glob("*step_*")] == ["step_00000050"]
    assert (run / "latest").read_text(encoding="utf-8") == "step_00000050\n"


def test_what_cannot_be_read_is_not_taken_for_damaged(run, refused, monkeypatch):
    """A network file system may fail for a moment: then nothing is resumed, and nothing dropped."""
    sha256_of = checkpoint.sha256_of

    def stale(path):
        if "00000040" in str(path):
            raise OSError(116, "Stale file handle")
        return sha256_of(path)

    monkeypatch.setattr(checkpoint, "sha256_of", stale)
    assert "can't be read: [Errno 116] Stale file handle" in refused("--steps=50", "--resume=auto")
    assert steps_saved(run) == [40, 20]


# ---------------------------------------------------------------------------------------- hostile checkpoints


def write_bomb(folder, name, kind, signed=True):
    """Put a pickle that would make a folder in a checkpoint's file; returns that folder."""
    dump, load = PICKLES[kind]
    bang = folder.parent / "bang"
    (folder / name).write_bytes(dump(Bomb(bang)))
    with open(folder / name, "rb") as file:
        load(file)
    bang.rmdir()  # it is live

    def sign(record):  # its maker knows how to hash
        digest = sha256_of(folder / name)
        return record | dict(sha256=record["sha256"] | {name: digest})

    if signed:
        edit_record(folder, sign)
    return bang


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", (SHARD, "model.safetensors"))
def test_a_hostile_checkpoint_is_refused_and_runs_no_code(run, refused, name, kind):
    bang = write_bomb(run / "step_00000040", name, kind)
    (line,) = refused("--steps=50", "--resume=yes").splitlines()
    assert line.startswith(f"train.py: {run}/step_00000040/{name} can't be read: ")
    assert not bang.exists() and last_step(run) == 40


@pytest.mark.parametrize("signed", (True, False))
def test_a_pickle_beside_the_moments_is_never_opened(run, run_main, capsys, signed):
    """Where torch's own distributed checkpoints have theirs."""
    bang = write_bomb(run / "step_00000040", "optimizer/.metadata", "pickle", signed)
    run_main("--steps=50", "--resume=yes")
    captured = capsys.readouterr()
    assert f"resumed from {run}/step_00000040" in captured.out and not captured.err
    assert not bang.exists() and steps_saved(run)[0] == 50


# ------------------------------------------------------------------------------------ checkpoints not written


@pytest.mark.parametrize("owner, name", (
    (checkpoint, "sha256_of"), (checkpoint, "sync_path"), (Path, "rename")))
def test_a_checkpoint_that_cannot_be_written_costs_nothing_but_itself(
        run_main, refused, monkeypatch, tmp_path, owner, name):
    flags = ["--steps=20", "--save_every=5", "--keep=1"]
    whole = run_main(*flags, run="whole")
    working = getattr(owner, name)

    def broken_for(step):
        def fails(path, *arguments):
            if f"step_{step:08d}" in str(path):
                raise OSError(28, "No space left on device")
            return working(path, *arguments)

        return fails

    with monkeypatch.context() as patch:  # training goes on
        patch.setattr(owner, name, broken_for(15))
        run = run_main(*flags, run="third")
    assert event_names(run) == ["not saved"] and equal_runs(run, whole)
    assert [path.name for path in run.glob("*step_*")] == ["step_00000020"]
    assert "No space left on device" in events(run)[0]["why"]

    last = tmp_path / "last"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken_for(20))
        assert "the last checkpoint could not be written" in refused(*flags, run="last")
    assert event_names(last) == ["not saved"] and figures(last) == figures(whole)
    assert [path.name for path in last.glob("*step_*")] == ["step_00000015"]
    run_main(*flags, "--resume=auto", run="last")
    assert equal_runs(last, whole)


def test_every_nth_checkpoint_stays(run_main):
    run = run_main("--steps=60", "--save_every=5", "--keep=2", "--keep_every=20", "--save_at=7")
    assert steps_saved(run) == [60, 55, 50, 40, 20, 7]


# --------------------------------------------------------------------------------------------- folders in use


def test_a_run_folder_in_use(run, refused):
    before = modification_times(run)
    assert "is not empty; continue it with --resume=auto" in refused("--steps=5")
    error = refused("--steps=5", "--resume=auto", "--d_model=64")
    assert "another architecture: head_dim 16 → 32, d_model 32 → 64" in error
    assert modification_times(run) == before


def test_nothing_to_do_changes_nothing(run, run_main, capsys):
    def texts():
        return {
            path.name: path.read_text(encoding="utf-8")
            for path in run.iterdir()
            if path.suffix in (".json", ".jsonl")
        }

    before = texts()
    run_main("--steps=40", "--resume=auto")
    assert "nothing to do" in capsys.readouterr().out and texts() == before


def test_resuming_on_another_corpus(run, refused, tmp_path):
    (tmp_path / "other.txt").write_text("something else entirely " * 100, encoding="utf-8")
    prepared(tmp_path / "other", tmp_path / "other.txt")
    flags = ("--steps=50", "--resume=auto", f"--corpus={tmp_path / 'other'}")
    assert "another corpus: train_sha256" in refused(*flags)


def test_resuming_with_another_seed_is_said_aloud(run, run_main, capsys):
    run_main("--steps=41", "--resume=auto", "--seed=7")
    captured = capsys.readouterr()
    assert "another seed: the data order changes here" in captured.err
    assert "seed 1337 → 7" in captured.out


# ------------------------------------------------------------------------------------------ older checkpoints


def test_a_checkpoint_of_an_older_format_is_refused_in_one_line(run, refused):
    def edit(record):
        return {name: value for name, value in record.items() if name not in ("updates", "bad_in_a_row")}

    edit_record(run / "step_00000040", edit)
    assert "an older format" in refused("--steps=50", "--resume=auto")


def test_a_record_with_older_names_is_read_and_goes_on(run_main):
    """Settings, samples and bad steps had other names, and figures that are in no line yet were lists."""
    flags = ["--steps=20", "--log_every=8", "--save_at=12", "--objective=uniform", "--loss=paper"]
    whole = run_main(*flags, run="whole")
    old = whole.with_name("old")
    shutil.copytree(whole, old)
    shutil.rmtree(old / "step_00000020")

    def edit(record):
        assert len(record["pending"]) == 4
        before = {new: name for name, new in {**RECORD, **SETTINGS}.items()}
        record = {before.get(name, name): value for name, value in record.items()}
        for part in ("settings", "model"):
            record[part] = {before.get(name, name): value for name, value in record[part].items()}
        rows = [[row["noisy"] / 2, row["clean"] / 2, row["grad_norm"]] for row in record["pending"]]
        return record | dict(pending=rows)

    edit_record(old / "step_00000012", edit)
    record = json.loads((old / "step_00000012/checkpoint.json").read_text(encoding="utf-8"))
    assert {"samples", "passed", "streak"} < record.keys() and "block_len" in record["settings"]
    run_main(*flags, "--resume=yes", run="old")
    assert_close_figures(old, whole, 1e-6)  # halves added up are not the loss's own bits
    assert read_checkpoint(checkpoints(old)[0])["next_sample"] == 160
