"""Faults that a long run meets, with real processes and real signals: what is lost, and what comes out.

    PYTHONPATH=.:tests python tests/training/test_faults.py 50 20 10

does the full count: kills of the whole job, kills of one rank, stop signals.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, call_main, prepare_words
from runs import (
    TINY,
    environment,
    equal_runs,
    equal_tensors,
    event_names,
    events,
    figures,
    last_step,
    newest_step,
    start,
    stopped,
    until,
    weights,
    workers,
)

import train
from training import watchdog
from training.checkpoint import checkpoints
from training.distributed import STOPPED
from training.log import read_metrics

ENDLESS = "--steps=100000"


def run_to_end(*flags, ranks=1):
    """Train without a fault, in this process if it is one rank."""
    if ranks > 1:
        assert start(*flags, ranks=ranks).wait() == 0
        return
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, *TINY, *flags)


# ------------------------------------------------------------------------------------------ kills and signals


def kill_the_job(corpus, folder, times, rng, save_every=7):
    """SIGKILL a run `times` times at random moments after it has begun to train; then let it finish.

    Returns (kills, those of them that hit a write).
    """
    flags = [f"--steps={60 + 40 * times}", f"--save_every={save_every}", "--lr_schedule=constant",
             f"--corpus={corpus}"]
    run_to_end(*flags, f"--run_dir={folder / 'whole'}")
    run, torn, kills = folder / "killed", 0, 0
    while kills < times:
        before = newest_step(run)
        process = start(*flags, f"--run_dir={run}", "--resume=auto")
        until(lambda: last_step(run) > before or process.poll() is not None)  # noqa: B023
        wait_for_a_moment(process, run, rng)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
        torn += any(run.glob(".step_*")) or any(run.glob(".gone_*"))
        after, reached = newest_step(run), last_step(run)
        # the one being written may be lost
        assert after >= before and after >= reached - 2 * save_every - 10, (before, after, reached)
    run_to_end(*flags, f"--run_dir={run}", "--resume=auto")
    assert equal_runs(run, folder / "whole")
    return kills, torn


def wait_for_a_moment(process, run, rng):
    """Wait for a random moment or, as often, for the first after it in which a checkpoint is written."""
    delay = rng.expovariate(1 / 0.15)
    if rng.random() < 0.5:
        time.sleep(delay)
        return
    end = time.monotonic() + delay
    while process.poll() is None and (time.monotonic() < end or not list(run.glob(".step_*/*"))):
        pass


def kill_ranks(corpus, folder, times, rng):
    """SIGKILL one of two ranks, `times` times; torchrun starts both again, and the run takes itself up."""
    flags = [f"--steps={100 + 60 * times}", "--save_every=10", "--lr_schedule=constant", f"--corpus={corpus}"]
    run_to_end(*flags, f"--run_dir={folder / 'two'}", ranks=2)
    run = folder / "rank_killed"
    with open(folder / "ranks.log", "w", encoding="utf-8") as log:
        process = start(*flags, f"--run_dir={run}", "--resume=auto", ranks=2, restarts=times, log=log)
        for _ in range(times):
            reached = last_step(run)
            until(lambda: last_step(run) > reached or process.poll() is not None)  # noqa: B023
            time.sleep(rng.random() * 0.3)
            os.kill(until(lambda: workers(process.pid))[rng.randrange(2)], signal.SIGKILL)
            until(lambda: not workers(process.pid) or last_step(run) < reached  # noqa: B023
                  or process.poll() is not None)
        assert process.wait(timeout=600) == 0, (folder / "ranks.log").read_text(encoding="utf-8")[-5000:]
    dead = re.findall(r"exitcode: -9\) local_rank: [01]", (folder / "ranks.log").read_text(encoding="utf-8"))
    assert len(dead) == times  # torchrun names them
    assert equal_runs(run, folder / "two")


def stop_signals(corpus, folder, times, rng):
    """SIGTERM a run at random moments: it is saved at once, and its exit code says that there is more to do.

    Nothing is lost. Returns how often it was stopped.
    """
    flags = [f"--steps={60 + 40 * times}", "--save_every=0", "--lr_schedule=constant", f"--corpus={corpus}"]
    run_to_end(*flags, f"--run_dir={folder / 'calm'}")
    run, stops = folder / "stopped", 0
    while stops < times:
        process = start(*flags, f"--run_dir={run}", "--resume=auto", log=subprocess.PIPE)
        reached = newest_step(run)
        until(lambda: last_step(run) > reached or process.poll() is not None)  # noqa: B023
        time.sleep(rng.random() * 0.1)
        process.terminate()
        output, _ = process.communicate(timeout=60)
        if process.returncode == 0:
            break
        assert process.returncode == STOPPED
        assert "stopped by a signal" in output and "Traceback" not in output
        stops += 1
        assert newest_step(run) >= last_step(run)
        assert event_names(run) == ["stopped"] * stops
    if stops == times:
        run_to_end(*flags, f"--run_dir={run}", "--resume=auto")
    assert equal_runs(run, folder / "calm")
    return stops


def test_killing_the_job_loses_nothing_but_the_last_steps(corpus, tmp_path):
    kills, _ = kill_the_job(corpus, tmp_path, 2, random.Random(1))
    assert kills == 2


@pytest.mark.slow
def test_killing_one_rank_under_torchrun(corpus, tmp_path):
    kill_ranks(corpus, tmp_path, 1, random.Random(2))


def test_stop_signals_lose_nothing(corpus, tmp_path):
    assert stop_signals(corpus, tmp_path, 1, random.Random(3)) == 1


@pytest.mark.parametrize("ranks", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_a_terminal_that_is_gone_costs_nothing(corpus, tmp_path, ranks):
    """Nobody reads what the run says any more (as when Ctrl-C has ended tee), and then SIGHUP comes."""
    run = tmp_path / "run"
    flags = [ENDLESS, "--log_every=1", f"--corpus={corpus}", f"--run_dir={run}"]
    process = start(*flags, ranks=ranks, log=subprocess.PIPE)
    until(lambda: last_step(run) > 5)
    process.stdout.close()
    reached = last_step(run)
    until(lambda: last_step(run) > reached + 5)  # it goes on
    process.send_signal(signal.SIGHUP)
    code = process.wait(timeout=60)
    assert newest_step(run) == last_step(run) > reached
    assert code == STOPPED or ranks > 1  # torchrun has codes of its own


@pytest.mark.slow
def test_a_stop_signal_to_the_launcher_or_one_rank(corpus, tmp_path):
    """All ranks save and leave; a launcher that may restart goes on by itself where only a rank was told."""
    run = tmp_path / "run"
    flags = ["--steps=4000", f"--corpus={corpus}", f"--run_dir={run}", "--resume=auto"]
    process = start(*flags, ranks=2)
    until(lambda: last_step(run) > 20)
    process.terminate()
    assert process.wait(timeout=60) != 0
    first = newest_step(run)
    assert first >= 20 and first >= last_step(run)

    process = start(*flags, ranks=2, restarts=1)
    until(lambda: last_step(run) > first + 20)
    os.kill(workers(process.pid)[1], signal.SIGTERM)
    second = until(lambda: newest_step(run) > first and newest_step(run))
    until(lambda: last_step(run) > second + 20)  # restarted
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(timeout=60)


def is_running(pid):
    """Whether a process lives and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return False


def test_a_launcher_that_is_killed_takes_its_ranks_along(corpus, tmp_path):
    """Its ranks save what they have, and none is left to write into the folder of the run's successor."""
    run = tmp_path / "run"
    process = start(ENDLESS, f"--corpus={corpus}", f"--run_dir={run}", ranks=2)
    until(lambda: last_step(run) > 20)
    ranks = workers(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(map(is_running, ranks)), 60)
    assert len(ranks) == 2 and newest_step(run) >= last_step(run) - 10 > 0


def test_a_terminal_that_stops_launcher_and_ranks_at_once(corpus, tmp_path):
    """Ctrl-C reaches every process, and torchrun passes it on: the ranks hear it twice, and mean to save."""
    run = tmp_path / "run"
    process = start(ENDLESS, f"--corpus={corpus}", f"--run_dir={run}", ranks=2)
    until(lambda: last_step(run) > 20)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    assert newest_step(run) >= last_step(run) > 20


@pytest.mark.slow
@pytest.mark.parametrize("seconds, saved", (("1", False), ("60", True)))
def test_torchrun_waits_as_long_as_it_is_told(corpus, tmp_path, monkeypatch, seconds, saved):
    """TORCH_ELASTIC_SHUTDOWN_TIMEOUT (torch 2.13): steps of several seconds are finished, or not."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    run = tmp_path / "run"
    large = ["--batch_size=8192", "--micro_batch=8", "--log_every=1"]
    process = start("--steps=1000", *large, f"--corpus={corpus}", f"--run_dir={run}", ranks=2)
    until(lambda: last_step(run) > 0)
    process.terminate()
    process.wait(timeout=120)
    assert (newest_step(run) > 0) == saved


@pytest.fixture
def signals():
    """Give the signals their handlers back, and let nothing wait for ever."""

    def give_up(*_):
        raise TimeoutError("it hangs")

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)
    handlers = {signum: signal.getsignal(signum) for signum in numbers}
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def test_signals_within_two_seconds_are_one_and_a_later_one_ends_the_process(signals, monkeypatch):
    now, killed = [100.0], []
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.os, "kill", lambda pid, signum: killed.append((pid, signum)))
    stop = watchdog.StopSignal()
    assert not stop.is_set()
    for seconds, signum in ((0.0, signal.SIGTERM), (0.2, signal.SIGINT), (1.7, signal.SIGTERM)):
        now[0] += seconds
        signal.raise_signal(signum)
    assert stop.is_set() and not killed
    now[0] += 0.2
    signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_after_the_first_ends_the_run_at_once(corpus, tmp_path):
    """Within a step of minutes, whose end the first would wait for."""
    run = tmp_path / "run"
    flags = ["--steps=2", "--batch_size=65536", "--micro_batch=8"]
    process = start(*flags, f"--corpus={corpus}", f"--run_dir={run}")
    try:
        until(lambda: read_metrics(run))
        for _ in range(3):  # these are one
            process.terminate()
            time.sleep(0.2)
        time.sleep(2)
        assert process.poll() is None
        process.terminate()
        assert process.wait(timeout=20) == -signal.SIGTERM
    finally:
        process.kill()


def test_a_signal_within_the_handler_of_another(signals):
    """Several come when a launcher dies: one must not wait for a lock that another's handler holds."""

    class Interrupted(watchdog.StopSignal):
        def set(self):
            with self._cond:
                signal.raise_signal(signal.SIGTERM)
            super().set()

    stop = Interrupted()
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()


# docs/train.sbatch: how a start ended, the step in the `latest` that it left, whether it is to go on
STARTS = ((0, "2", False), (1, "2", True), (1, "1", False), (2, "", False))


@pytest.mark.parametrize("code, saved, requeued", STARTS)
def test_the_batch_file_goes_on_as_long_as_it_gets_further(tmp_path, code, saved, requeued):
    """With stand-ins for SLURM's two commands, after a start from step 1."""
    (tmp_path / "runs/paper").mkdir(parents=True)
    if saved:
        (tmp_path / "runs/paper/latest").write_text("step_00000001\n", encoding="utf-8")
    stand_ins = dict(
        srun=f"[ -z '{saved}' ] || echo step_0000000{saved} > runs/paper/latest; exit {code}",
        scontrol='[ $1 = show ] && echo node0 || echo "$@" >> asked')
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    variables = environment(PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_ID="7")
    done = subprocess.run(["bash", ROOT / "docs/train.sbatch"], cwd=tmp_path, env=variables)
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert asked.exists() == requeued and (not requeued or asked.read_text(encoding="utf-8") == "requeue 7\n")


def test_two_runs_never_write_into_one_folder(run_main, refused, corpus, tmp_path, monkeypatch, capsys):
    """The second waits a while, and goes on from what the first has saved meanwhile."""
    run = tmp_path / "run"
    first = start(ENDLESS, f"--corpus={corpus}", f"--run_dir={run}")
    until(lambda: last_step(run) > 20)
    assert "another process is training into it" in refused(ENDLESS, "--resume=auto", "--timeout=1")
    assert first.poll() is None

    stopping = threading.Timer(1.0, first.terminate)
    stopping.start()
    def second():
        run_main(ENDLESS, "--resume=auto")

    assert stopped(second, signal.SIGTERM, monkeypatch, train, "training_step", 25) == STOPPED
    assert first.wait(timeout=60) == STOPPED
    assert event_names(run) == ["stopped", "stopped"]
    saved, reached = (m["step"] for m in events(run))
    assert f"resumed from {run}/step_{saved:08d}" in capsys.readouterr().out
    assert reached == saved + 25 == newest_step(run) and last_step(run) == reached


# -------------------------------------------------------------------------------------------- ranks that hang


@contextlib.contextmanager
def stopped_process(pid):
    """A process that does nothing inside, as if it hung, and is killed afterwards."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("ranks, hanging, message", (
    (2, 0, r"rank 1: rank 0 at localhost is dead or stopped: its store does not answer"),
    (3, 1, r"no progress for 8 s; rank 1 on \S+ is dead or stopped \(its last sign of life came at step")))
def test_a_rank_that_hangs_is_named(corpus, tmp_path, ranks, hanging, message):
    """Rank 0 keeps the store through which the others would look: they must not wait for its answer."""
    run, log = tmp_path / "run", tmp_path / "log"
    with open(log, "w", encoding="utf-8") as file:
        flags = (ENDLESS, f"--corpus={corpus}", f"--run_dir={run}", "--batch_size=6", "--timeout=8")
        process = start(*flags, ranks=ranks, log=file)
        until(lambda: last_step(run) > 20)
        # torchrun waits half a minute for the one that is stopped
        with stopped_process(workers(process.pid)[hanging]):
            until(lambda: re.search(message, log.read_text(encoding="utf-8")))
        assert process.wait(timeout=90) != 0
    answering = [rank for rank in range(ranks) if rank != hanging]
    assert not any(f"rank {rank} on" in log.read_text(encoding="utf-8") for rank in answering)


@pytest.mark.slow
def test_two_launchers_train_together_and_one_may_come_back(corpus, tmp_path):
    """Two nodes on one machine; the one that does not keep the rendezvous is killed and comes back.

    With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as docs/scaling-out.md says: else torchrun tells a launcher
    that comes back no address (torch 2.13).
    """
    run = tmp_path / "run"
    flags = ["--steps=6000", "--save_every=20", "--lr_schedule=constant", f"--corpus={corpus}",
             f"--run_dir={run}", "--resume=auto"]
    port = 20000 + os.getpid() % 20000
    patience = "join_timeout=120,keep_alive_interval=1,keep_alive_max_attempt=3"
    nodes = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test",
             f"--rdzv_conf={patience}", "--local_addr=localhost"]
    logs = [open(tmp_path / f"node{i}.log", "w", encoding="utf-8") for i in range(3)]
    launchers = [start(*flags, nodes=nodes, restarts=3, log=logs[0])]
    time.sleep(1)
    launchers.append(start(*flags, nodes=nodes, restarts=3, log=logs[1]))
    try:
        until(lambda: newest_step(run) >= 40)
        os.kill(launchers[1].pid, signal.SIGKILL)
        launchers[1].wait()
        reached = until(lambda: newest_step(run))
        # the rendezvous must have noticed (keep_alive_interval × max_attempt), or it counts the dead one in
        time.sleep(8)
        launchers.append(start(*flags, nodes=nodes, restarts=3, log=logs[2]))
        until(lambda: newest_step(run) > reached + 100)
        assert "resumed from" in "".join(
            (tmp_path / f"node{i}.log").read_text(encoding="utf-8") for i in (0, 2)
        )
    finally:
        for process in launchers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in launchers:
            process.wait(timeout=60)
    assert newest_step(run) > reached + 100


class Beats:
    """Stands in for the ranks' key-value store: signs of life that a test writes."""

    def __init__(self, **beats):
        self.beats = beats

    def check(self, names):
        return all(name in self.beats for name in names)

    def get(self, name):
        return self.beats[name].encode()


def test_who_is_dead_and_who_is_behind(monkeypatch):
    """From two rounds of signs of life: [beats, step, host]."""
    watch = watchdog.Watchdog(watchdog.SINGLE, 100.0, threading.Event())
    watch.ranks = watchdog.SINGLE._replace(world=4)
    watch.store = Beats(**{"0": "9 30 a", "1": "9 30 a", "2": "9 28 b"})
    assert watch.last_beats() == [["9", "30", "a"], ["9", "30", "a"], ["9", "28", "b"], None]
    before = [["8", "30", "a"], ["9", "30", "a"], ["8", "28", "b"], None]
    assert watch.suspects(before, watch.last_beats()) == (
        "rank 1 on a is dead or stopped (its last sign of life came at step 30); "
        "rank 3 is dead or stopped (its last sign of life came at step 0); "
        "rank 2 on b hangs after step 28 (the furthest: 30)")
    all_alive = [["8", "30", "a"]] * 4, [["9", "30", "a"]] * 4
    assert watch.suspects(*all_alive).startswith("all ranks answer and stand at step 30: a collective hangs")


# ------------------------------------------------------------------------------------------------------ disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small file system; tests/training/test_resume.py injects its errors")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Leave no room in a file system."""
    with open(folder / "filling", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return folder / "filling"


@pytest.mark.parametrize("ranks", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_a_full_disk_ends_no_run(corpus, small_disk, tmp_path, ranks):
    flags = ["--steps=180", "--save_every=30", "--keep=2", f"--corpus={corpus}"]
    run_to_end(*flags, f"--run_dir={tmp_path / 'whole'}", ranks=ranks)
    run, log = small_disk / "run", tmp_path / "log"
    size = sum(path.stat().st_size for path in checkpoints(tmp_path / "whole")[0].rglob("*"))
    # room for what is asked at the start, by a little
    (small_disk / "ballast").write_bytes(bytes(4 * 2**20 - int(3.3 * size)))
    with open(log, "w", encoding="utf-8") as file:
        process = start(*flags, f"--run_dir={run}", ranks=ranks, log=file)
        until(lambda: newest_step(run) >= 30)
        filling = fill(small_disk)
        assert process.wait(timeout=100) != 0  # the last checkpoint is not there
    text = log.read_text(encoding="utf-8")
    assert "No space left on device" in text and "the last checkpoint could not be written" in text
    assert ranks > 1 or "Traceback" not in text  # torchrun prints its own
    assert 30 <= newest_step(run) < 180
    filling.unlink()
    run_to_end(*flags, f"--run_dir={run}", "--resume=auto", ranks=ranks)
    assert equal_tensors(weights(run), weights(tmp_path / "whole"))


def test_too_small_a_disk_is_refused_before_training(refused, small_disk):
    (small_disk / "ballast").write_bytes(bytes(7 * 2**19))
    error = refused("--steps=10", "--save_every=5", f"--run_dir={small_disk / 'run'}")
    assert "checkpoints of 0.000371 GB and one in the making need" in error
    assert not (small_disk / "run").exists()


# ---------------------------------------------------------------------------------------------- bad gradients


@pytest.mark.slow
def test_spikes_are_skipped_and_ranks_decide_alike(train_on, corpus, tmp_path):
    """skip_norm: what one process skips, two ranks skip, and both go back at the same step."""
    flags = [f"--corpus={corpus}", "--log_every=1", "--save_every=10", "--lr_schedule=constant"]
    begun = tmp_path / "begun"
    train_on(1, *flags, f"--run_dir={begun}", "--steps=20")
    norms = sorted(m["grad_norm"] for m in figures(begun, 10) if "grad_norm" in m)
    # some steps are skipped; all are, and going back does not help
    for name, limit, max_skips, returns in (("some", norms[5], 40, 0), ("all", 1e-3, 2, 3)):
        decisions = []
        for world in (1, 2):
            run = tmp_path / f"{name}{world}"
            shutil.copytree(begun, run)
            bad = ["--steps=40", "--resume=yes", f"--skip_norm={limit}", f"--max_skips={max_skips}"]
            train = [world, *flags, *bad, f"--run_dir={run}"]
            if world == 1 and returns:
                with pytest.raises(SystemExit) as stop:
                    train_on(*train)
                assert stop.value.code == 2
            else:
                train_on(*train, code=2 if returns else 0)
            log = [m for m in events(run) if m["event"] != "ranks"]
            decisions.append([(m["event"], m["step"], m.get("first_sample")) for m in log])
        assert decisions[0] == decisions[1] and len(decisions[0]) >= 3
        assert [event for event, *_ in decisions[0]].count("back") == returns
        if not returns:
            assert max(m["grad_norm"] for m in figures(run, 20) if "grad_norm" in m) <= limit


@pytest.mark.slow
def test_ranks_fall_back_together(train_on, corpus, tmp_path):
    """Only one of two ranks checks the damaged file."""
    flags = ["--steps=20", "--save_every=10", f"--corpus={corpus}"]
    whole = tmp_path / "whole"
    train_on(2, *flags, f"--run_dir={whole}")
    files = sorted(path.relative_to(whole) for path in checkpoints(whole)[0].rglob("*.safetensors"))
    for number, file in enumerate(files[:2]):
        run = tmp_path / f"damaged{number}"
        shutil.copytree(whole, run)
        (run / file).write_bytes(b"")
        output = train_on(2, *flags, f"--run_dir={run}", "--resume=auto")
        problem = f"{run / file} is missing or damaged"
        assert f"warning: {problem}; falling back to the checkpoint before it" in output
        assert f"resumed from {run}/step_00000010" in output
        assert equal_runs(run, whole)


def main():
    folder = Path(tempfile.mkdtemp())
    corpus = prepare_words(folder)
    rng, (whole, one_rank, stops) = random.Random(0), map(int, sys.argv[1:4])
    begin = time.monotonic()
    kills, torn = kill_the_job(corpus, folder, whole, rng)
    print(f"{kills} × SIGKILL of the job, {torn} of them while a checkpoint was written or removed: final "
          " weights and losses bit for bit the undisturbed run's", flush=True)
    kill_ranks(corpus, folder, one_rank, rng)
    print(f"{one_rank} × SIGKILL of one of two ranks under torchrun: the same", flush=True)
    print(f"{stop_signals(corpus, folder, stops, rng)} × SIGTERM: the same, no step lost", flush=True)
    print(f"{time.monotonic() - begin:.0f} s in all")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
