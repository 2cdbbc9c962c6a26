"""Every fault a long run meets, with real processes and real signals: what is lost, and what comes out in the end.

    python tests/test_faults.py 50 20 10      kills of the whole job, kills of one rank, stop signals: the full count
"""

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call_main
from safetensors.torch import load_file
from test_distributed import TINY, TORCHRUN, environment, figures, weights

import train
from training import checkpoint, distributed
from training.checkpoint import checkpoints, load_newest, read_checkpoint
from training.log import read_metrics

FLAGS = [*TINY, "--log_every=10"]


def start(*arguments, ranks=1, restarts=0, nodes=(), log=subprocess.DEVNULL):
    launcher = [sys.executable] if ranks == 1 and not nodes else [*TORCHRUN, *(nodes or ["--standalone"]), f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
    return subprocess.Popen([*launcher, "train.py", *FLAGS, *arguments], cwd=ROOT, env=environment(**({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if nodes else {})), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def equal(run, undisturbed):
    """The same figures and, bit for bit, the same weights."""
    one, other = weights(run), weights(undisturbed)
    return figures(run) == figures(undisturbed) and one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def newest(run):
    """The step of the newest checkpoint, which must be whole (0: none yet)."""
    if not checkpoints(run):
        return 0
    folder, record = load_newest(run, pytest.fail)  # a damaged one would be a failure
    return record["step"]


def workers(parent):
    """The processes that a torchrun has started, in order of rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{parent}\n" in path.read_text():
                values = dict(pair.split("=", 1) for pair in (path.parent / "environ").read_text().split("\0") if "=" in pair)
                found.append((int(values["RANK"]), int(path.parent.name)))
        except (OSError, KeyError):
            pass
    return [pid for _, pid in sorted(found)]


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)
    return value


def last_step(run):
    return max((m["step"] for m in read_metrics(run)), default=0)


# kills and signals ----------------------------------------------------------------------------------------------


def kill_the_job(corpus, folder, times, rng, save_every=7):
    """SIGKILL `times` times at random moments after a run has begun to train; then let it finish. Kills that hit a write."""
    steps = 60 + 40 * times
    flags = [f"--steps={steps}", f"--save_every={save_every}", "--lr_schedule=constant", f"--corpus={corpus}"]
    assert start(*flags, f"--run_dir={folder / 'whole'}").wait() == 0
    run, torn, kills = folder / "killed", 0, 0
    while kills < times:
        before = newest(run)
        process = start(*flags, f"--run_dir={run}", "--resume=auto")
        until(lambda: last_step(run) > before or process.poll() is not None)  # noqa: B023
        delay = rng.expovariate(1 / 0.15)
        if rng.random() < 0.5:  # as soon as a checkpoint is being written after that
            end = time.monotonic() + delay
            while process.poll() is None and (time.monotonic() < end or not list(run.glob(".step_*/*"))):
                pass
        else:
            time.sleep(delay)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        torn += any(run.glob(".step_*")) or any(run.glob(".gone_*"))
        after, reached = newest(run), last_step(run)
        assert after >= before and after >= reached - 2 * save_every - 10, (before, after, reached)  # the one being written may be lost
    assert start(*flags, f"--run_dir={run}", "--resume=auto").wait() == 0
    assert equal(run, folder / "whole")
    return kills, torn


def kill_ranks(corpus, folder, times, rng):
    """SIGKILL one of two ranks, `times` times; torchrun starts both again, and the run takes itself up."""
    steps = 100 + 60 * times
    flags = [f"--steps={steps}", "--save_every=10", "--lr_schedule=constant", f"--corpus={corpus}"]
    assert start(*flags, f"--run_dir={folder / 'two'}", ranks=2).wait() == 0
    run = folder / "rank_killed"
    with open(folder / "ranks.log", "w") as log:
        process = start(*flags, f"--run_dir={run}", "--resume=auto", ranks=2, restarts=times, log=log)
        for _ in range(times):
            reached = last_step(run)
            until(lambda: last_step(run) > reached or process.poll() is not None)  # noqa: B023
            time.sleep(rng.random() * 0.3)
            os.kill(until(lambda: workers(process.pid))[rng.randrange(2)], signal.SIGKILL)
            until(lambda: len(workers(process.pid)) == 0 or last_step(run) < reached or process.poll() is not None)  # noqa: B023
        assert process.wait(timeout=600) == 0, (folder / "ranks.log").read_text()[-5000:]
    assert len(re.findall(r"exitcode: -9\) local_rank: [01]", (folder / "ranks.log").read_text())) == times  # torchrun names the dead one
    assert equal(run, folder / "two")


def stop_signals(corpus, folder, times, rng):
    """SIGTERM at random moments: saved at once, nothing is lost, and the exit code says that there is more to do."""
    flags = [f"--steps={60 + 40 * times}", "--save_every=0", "--lr_schedule=constant", f"--corpus={corpus}"]
    assert start(*flags, f"--run_dir={folder / 'calm'}").wait() == 0
    run, stops = folder / "stopped", 0
    while stops < times:
        process = start(*flags, f"--run_dir={run}", "--resume=auto")
        reached = newest(run)
        until(lambda: last_step(run) > reached or process.poll() is not None)  # noqa: B023
        time.sleep(rng.random() * 0.1)
        process.terminate()
        code = process.wait(timeout=60)
        if code == 0:
            break
        assert code == distributed.STOPPED
        stops += 1
        assert newest(run) >= last_step(run)
        assert [m["event"] for m in read_metrics(run) if "event" in m] == ["stopped"] * stops
    if stops == times:
        assert start(*flags, f"--run_dir={run}", "--resume=auto").wait() == 0
    assert equal(run, folder / "calm")
    return stops


def test_killing_the_job_loses_nothing_but_the_last_steps(corpus, tmp_path):
    kills, _ = kill_the_job(corpus, tmp_path, 3, random.Random(1))
    assert kills == 3


@pytest.mark.slow
def test_killing_one_rank_under_torchrun(corpus, tmp_path):
    kill_ranks(corpus, tmp_path, 1, random.Random(2))


def test_stop_signals_lose_nothing(corpus, tmp_path):
    assert stop_signals(corpus, tmp_path, 2, random.Random(3)) == 2


@pytest.mark.slow
def test_a_stop_signal_to_the_launcher_or_one_rank(corpus, tmp_path):
    """All ranks save and leave with it; a launcher that may restart goes on by itself where only a rank was told."""
    flags = ["--steps=4000", "--save_every=0", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", "--resume=auto"]
    process = start(*flags, ranks=2)
    until(lambda: last_step(tmp_path / "run") > 20)
    process.terminate()
    assert process.wait(timeout=60) != 0
    first = newest(tmp_path / "run")
    assert first >= 20 and first >= last_step(tmp_path / "run")
    process = start(*flags, ranks=2, restarts=1)
    until(lambda: last_step(tmp_path / "run") > first + 20)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    second = until(lambda: newest(tmp_path / "run") > first and newest(tmp_path / "run"))
    until(lambda: last_step(tmp_path / "run") > second + 20)  # restarted
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)


def test_a_launcher_that_is_killed_takes_its_ranks_along(corpus, tmp_path):
    """Its ranks save what they have, and none is left to write into the folder of the run's successor."""
    process = start("--steps=100000", "--save_every=0", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", ranks=2)
    until(lambda: last_step(tmp_path / "run") > 20)
    pids = workers(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() and "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text() for pid in pids), 60)
    assert newest(tmp_path / "run") >= last_step(tmp_path / "run") - 10 > 0


def test_a_terminal_that_stops_launcher_and_ranks_at_once(corpus, tmp_path):
    """Ctrl-C reaches every process, and torchrun passes it on: the ranks hear it twice, and mean to save."""
    process = start("--steps=100000", "--save_every=0", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", ranks=2)
    until(lambda: last_step(tmp_path / "run") > 20)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert newest(tmp_path / "run") >= last_step(tmp_path / "run") > 20


@pytest.mark.slow
@pytest.mark.parametrize("seconds, saved", (("1", False), ("60", True)))
def test_torchrun_waits_as_long_as_it_is_told(corpus, tmp_path, monkeypatch, seconds, saved):
    """TORCH_ELASTIC_SHUTDOWN_TIMEOUT (torch 2.13): steps of several seconds are finished and saved, or not."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    process = start("--steps=1000", "--save_every=0", "--log_every=1", "--batch_size=8192", "--micro_batch=8", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", ranks=2)
    until(lambda: last_step(tmp_path / "run") > 0)
    process.terminate()
    process.wait(timeout=120)
    assert (newest(tmp_path / "run") > 0) == saved


def test_a_signal_after_the_first_ends_the_run_at_once(corpus, tmp_path):
    process = start("--steps=2", "--batch_size=65536", "--micro_batch=8", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}")  # a step of minutes
    until(lambda: last_step(tmp_path / "run") or read_metrics(tmp_path / "run"))
    for _ in range(3):  # these are one
        process.terminate()
        time.sleep(0.2)
    time.sleep(2)
    assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=20) == -signal.SIGTERM


def test_a_signal_within_the_handler_of_another():
    """Several come at once when a launcher dies; the second must not wait for a lock that the first one's handler holds."""
    program = """
import signal, threading, time
import parallel
class Event(threading.Event):
    def set(self):
        with self._cond:
            signal.raise_signal(signal.SIGTERM)
        super().set()
threading.Event = Event
stop = watchdog.stop_on_signals()
signal.raise_signal(signal.SIGTERM)
print(stop.is_set())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("code, saved, again", ((0, "2", False), (1, "2", True), (1, "1", False), (2, "", False)))
def test_the_batch_file_goes_on_as_long_as_it_gets_further(tmp_path, code, saved, again):
    """docs/train.sbatch with stand-ins for SLURM's two commands, after a start that ended with `code` and left this as `latest`."""
    (tmp_path / "runs/paper").mkdir(parents=True)
    if saved:
        (tmp_path / "runs/paper/latest").write_text("step_00000001\n")
    for name, does in dict(srun=f"[ -z '{saved}' ] || echo step_0000000{saved} > runs/paper/latest; exit {code}", scontrol='[ $1 = show ] && echo node0 || echo "$@" >> asked').items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", ROOT / "docs/train.sbatch"], cwd=tmp_path, env=environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7"))
    assert done.returncode == code
    assert (tmp_path / "asked").exists() == again and (not again or (tmp_path / "asked").read_text() == "requeue 7\n")


def test_two_runs_never_write_into_one_folder(corpus, tmp_path):
    flags = ["--steps=100000", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", "--resume=auto", "--timeout=2"]
    first = start(*flags)
    until(lambda: last_step(tmp_path / "run") > 20)
    with open(tmp_path / "log", "w") as log:
        assert start(*flags, log=log).wait(timeout=60) == 2
    error = (tmp_path / "log").read_text()
    assert "another process is training into it" in error and "Traceback" not in error and first.poll() is None
    with open(tmp_path / "log", "w") as log:
        process = start(*flags, "--timeout=60", log=log)  # waits half a minute
        time.sleep(8)
        first.terminate()
        assert first.wait(timeout=60) == distributed.STOPPED
        saved = newest(tmp_path / "run")
        until(lambda: last_step(tmp_path / "run") > saved + 20)
    assert f"resumed from {tmp_path / 'run'}/step_{saved:08d}" in (tmp_path / "log").read_text()  # what was saved meanwhile
    process.terminate()
    assert process.wait(timeout=60) == distributed.STOPPED


def test_a_run_folder_that_cannot_be_is_one_line(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run([sys.executable, "train.py", *FLAGS, "--steps=3", f"--corpus={corpus}", f"--run_dir={tmp_path / 'file/run'}"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Not a directory" in done.stderr


def test_what_cannot_be_read_is_not_taken_for_damaged(run_main, monkeypatch, capsys):
    """A network file system may fail for a moment: then nothing is resumed, and above all no newer checkpoint dropped."""
    run = run_main("--steps=20", "--save_every=10", "--keep=9")
    real = checkpoint.file_digest
    monkeypatch.setattr(checkpoint, "file_digest", lambda path: (_ for _ in ()).throw(OSError(116, "Stale file handle")) if "00000020" in str(path) else real(path))
    with pytest.raises(SystemExit):
        run_main("--steps=30", "--resume=auto")
    assert "can't be read: [Errno 116] Stale file handle" in capsys.readouterr().err
    monkeypatch.undo()
    assert [p.name[-2:] for p in checkpoints(run)] == ["20", "10"]


@pytest.mark.parametrize("left", ("step_00000001", ".step_00000002", ".gone_step_00000000"))
def test_what_goes_is_room(tmp_path, left):
    """Old checkpoints, and what a crash has left, are removed before the disk is full."""
    n_params = (shutil.disk_usage(tmp_path).free + 10**9) // 24  # one checkpoint kept, one in the making: a gigabyte too much
    with pytest.raises(OSError, match="lower --keep"):
        checkpoint.check_space(tmp_path, n_params, False, 1)
    (tmp_path / left).mkdir()
    with open(tmp_path / left / "x", "wb") as file:
        file.truncate(3 * 10**9)  # a hole: it takes no room
    checkpoint.check_space(tmp_path, n_params, False, 1)


def test_no_good_step_at_the_end_goes_back_too(run_main, poisoned, capsys):
    """The last figures come in after the last step: they are looked at before the run is called complete."""
    poisoned(*(8 * k for k in range(36, 40)))  # steps 37 to 40
    run = run_main("--steps=40", "--save_every=10", "--keep=9", "--log_every=10", "--max_skips=4")
    log = events(run)
    assert [m["event"] for m in log] == ["skipped"] * 4 + ["back"] and log[4]["step"] == 30
    assert newest(run) == 40 and read_checkpoint(checkpoints(run)[0])["streak"] == 0


@pytest.mark.slow
def test_rank_0_that_hangs_is_named(corpus, tmp_path):
    """It keeps the store through which the others would look: they must not wait for its answer."""
    with open(tmp_path / "log", "w") as log:
        process = start("--steps=100000", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", "--timeout=8", ranks=2, log=log)
        until(lambda: last_step(tmp_path / "run") > 20)
        stopped = workers(process.pid)[0]
        os.kill(stopped, signal.SIGSTOP)
        try:
            until(lambda: "rank 0 at " in (tmp_path / "log").read_text(), 60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGKILL)
        assert process.wait(timeout=90) != 0
    assert "rank 1: rank 0 at localhost is dead or stopped: its store does not answer" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named(corpus, tmp_path):
    with open(tmp_path / "log", "w") as log:
        process = start("--steps=100000", f"--corpus={corpus}", "--batch_size=9", f"--run_dir={tmp_path / 'run'}", "--timeout=8", ranks=3, log=log)
        until(lambda: last_step(tmp_path / "run") > 20)
        stopped = workers(process.pid)[1]
        os.kill(stopped, signal.SIGSTOP)
        try:
            until(lambda: "rank 1 on " in (tmp_path / "log").read_text())  # torchrun waits half a minute for the one that is stopped
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGKILL)
        assert process.wait(timeout=90) != 0
    text = (tmp_path / "log").read_text()
    assert re.search(r"no progress for 8 s; rank 1 on \S+ is dead or stopped \(its last sign of life came at step", text), text[-3000:]
    assert "rank 0 on" not in text and "rank 2 on" not in text  # they answer


@pytest.mark.slow
def test_two_launchers_train_together_and_one_may_come_back(corpus, tmp_path):
    """Two nodes on one machine, over loopback; the one that does not keep the rendezvous is killed and started again.

    With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as the README says: else torchrun tells a launcher that comes back no address (torch 2.13).
    """
    flags = ["--steps=6000", "--save_every=20", "--lr_schedule=constant", f"--corpus={corpus}", f"--run_dir={tmp_path / 'run'}", "--resume=auto"]
    port = 20000 + os.getpid() % 20000
    nodes = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test", "--rdzv_conf=join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=3"]
    logs = [open(tmp_path / f"node{i}.log", "w") for i in range(3)]
    first = start(*flags, nodes=[*nodes, "--local_addr=localhost"], restarts=3, log=logs[0])
    time.sleep(1)
    second = start(*flags, nodes=[*nodes, "--local_addr=localhost"], restarts=3, log=logs[1])
    launchers = [first, second]
    try:
        until(lambda: newest(tmp_path / "run") >= 40)
        os.kill(second.pid, signal.SIGKILL)
        second.wait()
        reached = until(lambda: newest(tmp_path / "run"))
        time.sleep(8)  # the rendezvous must have noticed (keep_alive_interval × keep_alive_max_attempt, 15 s by default), or it counts the dead one in
        third = start(*flags, nodes=[*nodes, "--local_addr=localhost"], restarts=3, log=logs[2])
        launchers.append(third)
        until(lambda: newest(tmp_path / "run") > reached + 100)
        assert "resumed from" in (tmp_path / "node0.log").read_text() + (tmp_path / "node2.log").read_text()
    finally:
        for process in launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in launchers:
            process.wait(timeout=60)
    assert newest(tmp_path / "run") > reached + 100


# disks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("no right to mount a small file system; test_a_checkpoint_that_cannot_be_written… injects the error")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("ranks", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_a_full_disk_ends_no_run(corpus, small_disk, tmp_path, ranks):
    flags = ["--steps=300", "--save_every=50", "--keep=2", f"--corpus={corpus}", "--log_every=10"]
    assert start(*flags, f"--run_dir={tmp_path / 'whole'}", ranks=ranks).wait() == 0
    run = small_disk / "run"
    size = sum(p.stat().st_size for p in checkpoints(tmp_path / "whole")[0].rglob("*"))
    (small_disk / "ballast").write_bytes(bytes(4 * 2**20 - int(3.3 * size)))  # room for what is asked at the start, by a little
    with open(tmp_path / "log", "w") as log:
        process = start(*flags, f"--run_dir={run}", ranks=ranks, log=log)
        until(lambda: newest(run) >= 50)
        with open(small_disk / "more", "wb", buffering=0) as file:  # now someone else fills the disk
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        assert process.wait(timeout=100) != 0  # the last checkpoint is not there
    text = (tmp_path / "log").read_text()
    assert "No space left on device" in text and "the last checkpoint could not be written" in text and (ranks > 1 or "Traceback" not in text)  # torchrun prints its own
    saved = newest(run)
    assert 50 <= saved < 300
    (small_disk / "more").unlink()
    assert start(*flags, f"--run_dir={run}", "--resume=auto", ranks=ranks).wait() == 0
    one, other = weights(run), weights(tmp_path / "whole")
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_too_small_a_disk_is_refused_before_training(corpus, small_disk, tmp_path):
    (small_disk / "ballast").write_bytes(bytes(7 * 2**19))
    with open(tmp_path / "log", "w") as log:
        assert start("--steps=10", "--save_every=5", f"--corpus={corpus}", f"--run_dir={small_disk / 'run'}", log=log).wait() == 2
    assert "checkpoints of 0.000371 GB and one in the making need" in (tmp_path / "log").read_text() and not (small_disk / "run").exists()


# damaged and hostile checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def run_main(monkeypatch, corpus, tmp_path):
    def call(*flags, run="run"):
        call_main(monkeypatch, *FLAGS, f"--corpus={corpus}", f"--run_dir={tmp_path / run}", *flags)
        return tmp_path / run

    return call


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARM = {"flipped": flip, "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]), "missing": Path.unlink}


@pytest.mark.parametrize("harm", HARM)
def test_damage_to_any_file_of_the_newest_checkpoint(run_main, capsys, harm):
    whole = run_main("--steps=40", "--save_every=20")
    for file in [p.relative_to(whole) for p in checkpoints(whole)[0].rglob("*") if p.is_file()] + ["latest"]:
        run = whole.with_name("harmed")
        shutil.copytree(whole, run)
        HARM[harm](run / file)
        run_main("--steps=40", "--save_every=20", "--resume=auto", run="harmed")
        said = capsys.readouterr()
        if str(file) != "latest":
            assert "falling back to the checkpoint before it" in said.err and "resumed from" in said.out and "step_00000020" in said.out
            assert (run / "latest").read_text() == "step_00000040\n"
        assert equal(run, whole) and read_checkpoint(checkpoints(run)[0])["step"] == 40
        shutil.rmtree(run)


@pytest.mark.slow
def test_ranks_fall_back_together(run_main, corpus, tmp_path):
    """Only one of two ranks checks the damaged file."""
    flags = ["--steps=20", "--save_every=10", f"--corpus={corpus}", f"--run_dir={tmp_path / 'two'}"]
    assert start(*flags, ranks=2).wait() == 0
    shutil.copytree(tmp_path / "two", tmp_path / "whole")
    for number, file in enumerate(sorted(checkpoints(tmp_path / "two")[0].rglob("*.safetensors"))[:2]):
        flip(file)
        with open(tmp_path / f"log{number}", "w") as log:
            assert start(*flags, "--resume=auto", ranks=2, log=log).wait() == 0
        assert f"{file.name} is missing or damaged; falling back" in (tmp_path / f"log{number}").read_text()
        assert equal(tmp_path / "two", tmp_path / "whole")


class Bomb:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("dump", ("pickle", "torch"))
@pytest.mark.parametrize("where", ("model.safetensors", "optimizer/shard-00001-model-00001-of-00001.safetensors", "optimizer/.metadata", "checkpoint.json"))
def test_a_hostile_checkpoint_runs_no_code(run_main, capsys, tmp_path, where, dump):
    import pickle

    folder = checkpoints(run_main("--steps=10"))[0]
    capsys.readouterr()
    bomb = tmp_path / "bang"
    if dump == "torch":
        torch.save(Bomb(bomb), buffer := io.BytesIO())
        (folder / where).write_bytes(buffer.getvalue())
    else:
        (folder / where).write_bytes(pickle.dumps(Bomb(bomb)))
    if where != "checkpoint.json":  # its maker knows how to hash
        record = json.loads((folder / "checkpoint.json").read_text())
        del record["record_sha256"]
        record["sha256"][where] = checkpoint.file_digest(folder / where)
        (folder / "checkpoint.json").write_text(json.dumps(record | {"record_sha256": checkpoint.record_digest(record)}))
    if where == "optimizer/.metadata":  # where dcp's other format has its pickle: nobody looks at it
        run_main("--steps=12", "--resume=yes")
    else:
        with pytest.raises(SystemExit):
            run_main("--steps=12", "--resume=yes")
        said = capsys.readouterr().err
        assert "Traceback" not in said and ("can't be read" in said or "no usable checkpoint" in said) and len(said.splitlines()) <= 2
    assert not bomb.exists()
    with open(folder / where, "rb") as file:
        torch.load(file, weights_only=False) if dump == "torch" else pickle.load(file)
    assert bomb.exists()  # it is live


# gradients that are not finite ------------------------------------------------------------------------------------


@pytest.fixture
def poisoned(monkeypatch):
    """Make the weights of the batches that begin with these samples NaN."""
    working = train.training_batches

    def poison(*samples):
        def batches(process, blocks, eos_id, first_sample, first_step, steps, cfg, *rest, **more):
            for number, batch in enumerate(working(process, blocks, eos_id, first_sample, first_step, steps, cfg, *rest, **more)):
                yield batch._replace(weights=batch.weights * float("nan")) if first_sample + number * cfg.batch_size in samples else batch

        monkeypatch.setattr(train, "training_batches", batches)

    return poison


def events(run):
    return [m for m in read_metrics(run) if "event" in m]


def test_a_step_that_is_not_finite_is_skipped_and_counted(run_main, poisoned):
    poisoned(8 * 10, 8 * 20)  # steps 11 and 21
    run = run_main("--steps=40", "--save_every=10", "--keep=9", "--log_every=1")
    assert [(m["event"], m["step"], m["first_sample"], m["in_a_row"], m["norm"]) for m in events(run)] == [("skipped", 11, 80, 1, "nan"), ("skipped", 21, 160, 1, "nan")]
    assert read_checkpoint(run / "step_00000040")["updates"] == 38
    assert all(torch.isfinite(w).all() for w in weights(run).values()) and 11 not in [m["step"] for m in figures(run) if "loss" in m]
    # the skipped step changes nothing: weights and moments after it are those before it
    before = run_main("--steps=10", "--log_every=1", "--save_every=10", "--lr_schedule=constant", run="before")
    after = run_main("--steps=11", "--log_every=1", "--save_every=10", "--lr_schedule=constant", run="after")
    for file in checkpoints(before)[0].rglob("*.safetensors"):
        one, other = load_file(file), load_file(checkpoints(after)[0] / file.relative_to(checkpoints(before)[0]))
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_after_several_in_a_row_the_run_goes_back_and_past_the_data(run_main, poisoned, capsys):
    poisoned(*(8 * k for k in range(23, 30)))  # steps 24 to 30
    run = run_main("--steps=60", "--save_every=10", "--keep=9", "--log_every=1", "--max_skips=4")
    log = events(run)
    # Four in a row, a fifth while the ranks agree to go back; two more bad steps are met behind.
    assert [(m["event"], m["step"]) for m in log] == [("skipped", k) for k in range(24, 29)] + [("back", 20), ("skipped", 21), ("skipped", 22)]
    back = log[5]
    assert (back["step"], back["from_step"], back["first_sample"], back["last_sample"]) == (20, 28, 160, 8 * 28 - 1)
    assert [m["step"] for m in figures(run) if "loss" in m] == [k for k in range(1, 61) if k not in (21, 22)]
    record = read_checkpoint(run / "step_00000060")
    assert record["samples"] - record["passed"] == 60 * 8 and record["passed"] == 64
    # Exactly what a run does that is told at step 20 to begin behind that range.
    again = run.with_name("again")
    shutil.copytree(run / "step_00000020", again / "step_00000020")
    shutil.copyfile(run / "metrics.jsonl", again / "metrics.jsonl")
    record = json.loads((again / "step_00000020/checkpoint.json").read_text())
    del record["record_sha256"]
    record |= dict(samples=8 * 28, passed=64)
    (again / "step_00000020/checkpoint.json").write_text(json.dumps(record | {"record_sha256": checkpoint.record_digest(record)}))
    run_main("--steps=60", "--save_every=10", "--keep=9", "--log_every=1", "--max_skips=4", "--resume=yes", run="again")
    assert equal(again, run)


def test_bad_steps_between_two_lines_are_seen(run_main, poisoned):
    """The figures of ten steps arrive at once, good ones last: still the run goes back, and every skip is logged."""
    poisoned(*(8 * k for k in range(22, 27)))  # steps 23 to 27; the line is due at 30
    run = run_main("--steps=60", "--save_every=20", "--keep=9", "--log_every=10", "--max_skips=5")
    log = events(run)
    assert [(m["event"], m["step"]) for m in log] == [("skipped", k) for k in range(23, 28)] + [("back", 20)]
    assert (log[-1]["from_step"], log[-1]["first_sample"], log[-1]["last_sample"]) == (31, 160, 8 * 31 - 1)
    assert [m["step"] for m in figures(run) if "loss" in m] == [10, 20, 30, 40, 50, 60]
    assert read_checkpoint(run / "step_00000060")["passed"] == 88


def test_skipped_steps_cost_no_good_checkpoint(run_main, poisoned):
    """With a checkpoint every step and one to keep, the one from before the skipped steps stays."""
    poisoned(*(8 * k for k in range(22, 27)))
    run = run_main("--steps=40", "--save_every=1", "--keep=1", "--log_every=1", "--max_skips=5")
    assert [(m["event"], m["step"]) for m in events(run)] == [("skipped", k) for k in range(23, 28)] + [("back", 22)]
    assert (run / "latest").read_text() == "step_00000040\n" and [p.name for p in checkpoints(run)] == ["step_00000040"]


def test_a_run_that_goes_back_in_vain_ends(run_main, poisoned, capsys):
    poisoned(*(8 * k for k in range(23, 1000)))
    with pytest.raises(SystemExit) as exit_:
        run_main("--steps=60", "--save_every=10", "--log_every=1", "--max_skips=2")
    assert exit_.value.code == 2 and "three times" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit):
        run_main("--steps=60", "--save_every=0", "--log_every=1", "--max_skips=2", run="other")
    assert "there is no checkpoint from before" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_spikes_are_skipped_and_ranks_decide_alike(corpus, tmp_path, run_main):
    """skip_norm: what one process skips, two ranks skip, and both go back at the same step."""
    begun = run_main("--steps=20", "--log_every=1", "--save_every=10", "--lr_schedule=constant")
    norms = sorted(m["grad_norm"] for m in figures(begun) if "grad_norm" in m and m["step"] > 10)
    for limit, code in ((norms[5], 0), (1e-3, 2)):  # some steps are skipped; all are, and going back does not help
        flags = ["--steps=40", "--log_every=1", "--save_every=10", "--lr_schedule=constant", "--resume=yes", f"--skip_norm={limit}", "--max_skips=2" if code else "--max_skips=40"]
        one, two = tmp_path / f"one{code}", tmp_path / f"two{code}"
        for run in (one, two):
            shutil.copytree(begun, run)
        if code:
            with pytest.raises(SystemExit):
                run_main(*flags, run=one.name)
        else:
            run_main(*flags, run=one.name)
        assert (start(*flags, f"--corpus={corpus}", f"--run_dir={two}", ranks=2).wait() == 0) == (code == 0)
        decisions = [[(m["event"], m["step"], m.get("first_sample")) for m in events(run) if m["event"] != "ranks"] for run in (one, two)]
        assert decisions[0] == decisions[1] and len(decisions[0]) >= 3
        assert [name for name, *_ in decisions[0]].count("back") == (3 if code else 0)
        assert code or max(m["grad_norm"] for m in figures(one, 20) if "grad_norm" in m) <= limit


if __name__ == "__main__":
    import tempfile

    from conftest import prepared

    folder = Path(tempfile.mkdtemp())
    (folder / "words.txt").write_text("".join(f"{i} squared is {i * i}, and its double is {2 * i}.\n" for i in range(1500)))
    prepared(folder / "words", folder / "words.txt")
    rng, (whole, one_rank, signals) = random.Random(0), map(int, sys.argv[1:4])
    begin = time.monotonic()
    kills, torn = kill_the_job(folder / "words", folder, whole, rng)
    print(f"{kills} × SIGKILL of the whole job, {torn} of them while a checkpoint was being written or removed: final weights and losses bit for bit the undisturbed run's", flush=True)
    kill_ranks(folder / "words", folder, one_rank, rng)
    print(f"{one_rank} × SIGKILL of one of two ranks under torchrun: the same", flush=True)
    print(f"{stop_signals(folder / 'words', folder, signals, rng)} × SIGTERM: the same, no step lost", flush=True)
    print(f"{time.monotonic() - begin:.0f} s in all")
    shutil.rmtree(folder)
