"""Preparations in processes of their own: signals, kill -9, two of one name."""

import contextlib
import glob
import gzip
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, prepared
from corpus_examples import needs_gpt2, stories, write_jsonl
from preparations import by_split, contents, texts_in
from source_examples import write_txt

DATA = ["data.py"]
SLOW = ["tests/processes/prepare_slowly.py", "1000", "0.01"]  # a test can meet it at work
BUSY = ["tests/processes/prepare_slowly.py", "65536", "0"]  # small tasks, many commits
INTERRUPTED = "data.py: interrupted; the same command goes on from here\n"


def start(command, *argv, **options):
    """Start a preparation in a process."""
    pipes = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    argv = [sys.executable, *command, *map(str, argv)]
    return subprocess.Popen(argv, cwd=ROOT, text=True, **(pipes | options))


def run(*argv, **options):
    """Run data.py to its end."""
    return subprocess.run([sys.executable, *DATA, *argv], cwd=ROOT, capture_output=True, text=True, **options)


def wait_for(condition, seconds=30):
    """What `condition` returns as soon as that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return value


def wait_until_at_work(out):
    wait_for(lambda: is_at_work(out))


def is_at_work(out):
    return sum(path.stat().st_size for path in out.glob(".*.building/corpus/*.bin")) > 2000


def process_table():
    """{pid: (its parent, when it started)} of all processes but zombies."""
    table = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = Path(path).read_text(encoding="utf-8").rpartition(")")[2].split()
            if fields[0] != "Z":
                table[int(path.split("/")[2])] = (int(fields[1]), fields[19])
    return table


def descendants(pid):
    """{pid: when it started} of a process's children, and theirs."""
    table, family, before = process_table(), {pid}, set()
    while family != before:
        before = family
        family = family | {child for child, (parent, _) in table.items() if parent in family}
    return {child: table[child][1] for child in family - {pid}}


def tokenizing(pid):
    """The children of a preparation that tokenize."""
    commands = {child: Path(f"/proc/{child}/cmdline").read_bytes() for child in descendants(pid)}
    return [child for child, command in commands.items() if b"spawn_main" in command]


def wait_for_end(processes, seconds=30):
    """Wait until these have ended: {pid: when it started}."""

    def have_ended():
        table = process_table()
        return not any(table.get(pid, (0, ""))[1] == since for pid, since in processes.items())

    wait_for(have_ended, seconds)


@pytest.fixture
def many(tmp_path):
    return write_jsonl(tmp_path / "many.jsonl", stories(600))


@pytest.mark.parametrize("send, workers", [(signal.SIGHUP, 1), (signal.SIGINT, 2)])
def test_signals_end_it_in_one_line(tmp_path, many, send, workers):
    out = tmp_path / "out"
    process = start(SLOW, many, f"--out={out}", f"--workers={workers}")
    wait_until_at_work(out)
    children = descendants(process.pid)
    assert workers == 1 or len(children) >= workers
    process.send_signal(send)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, INTERRUPTED)
    wait_for_end(children)
    assert not (out / "many").exists() and (out / ".many.building").is_dir()
    assert run(many, f"--out={out}").returncode == 0
    prepared(tmp_path / "whole", many)
    assert contents(out) == {f"many/{name}": raw for name, raw in contents(tmp_path / "whole").items()}


def test_interrupt_key_while_processes_start(tmp_path, many):
    """A terminal sends the signal to all of them; those that are still importing say nothing either."""
    process = start(DATA, many, f"--out={tmp_path / 'out'}", "--workers=2", start_new_session=True)
    wait_for(lambda: tokenizing(process.pid))
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, INTERRUPTED)


def test_sigterm_where_sigint_is_ignored(tmp_path, many):
    """As in a job that a script starts in the background."""
    process = start(SLOW, many, f"--out={tmp_path / 'out'}", "--workers=1",
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    wait_until_at_work(tmp_path / "out")
    process.terminate()
    try:
        assert process.wait(timeout=5) == 130
    finally:
        process.kill()
        process.communicate()


def test_a_terminal_that_goes_away_costs_nothing(tmp_path):
    """Where SIGHUP is ignored (nohup, disown): the progress bar has nowhere to go."""
    source = write_jsonl(tmp_path / "some.jsonl", stories(150))
    ours, theirs = pty.openpty()
    process = start(SLOW, source, f"--out={tmp_path / 'out'}", "--workers=1", stdout=theirs,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.close(theirs)
    wait_until_at_work(tmp_path / "out")
    os.close(ours)
    _, err = process.communicate(timeout=60)
    warning = "warning: standard output can't be written (Input/output error); the work goes on\n"
    assert (process.returncode, err) == (0, warning)
    prepared(tmp_path / "whole", source)
    assert contents(tmp_path / "out/some") == contents(tmp_path / "whole")


def test_no_process_outlives_a_killed_parent(tmp_path, many):
    process = start(SLOW, many, f"--out={tmp_path / 'out'}", "--workers=2")
    wait_until_at_work(tmp_path / "out")
    children = descendants(process.pid)
    assert len(children) >= 2
    process.kill()
    process.communicate()
    wait_for_end(children, seconds=10)


def test_killed_worker(tmp_path, many):
    out = tmp_path / "out"
    process = start(SLOW, many, f"--out={out}", "--workers=2")
    wait_until_at_work(out)
    os.kill(tokenizing(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch("data.py: a tokenizing process was ended from outside .*\n", err)
    assert run(many, f"--out={out}").returncode == 0
    prepared(tmp_path / "whole", many)
    assert contents(out / "many") == contents(tmp_path / "whole")


@pytest.mark.parametrize("name, flags", [("many.jsonl", []), ("many.jsonl", ["--restart"]), ("-", [])])
def test_second_process_of_one_name_is_refused(tmp_path, many, name, flags):
    """And harms the first in no way, with another standard input or --restart either."""
    source = many if name == "-" else tmp_path / name
    argv = ["-" if name == "-" else source, f"--out={tmp_path / 'out'}", "--name=x", "--format=jsonl",
            "--workers=1"]
    with open(source, encoding="utf-8") as stdin:
        first = start(SLOW, *argv, stdin=stdin)
        wait_until_at_work(tmp_path / "out")
        first.send_signal(signal.SIGSTOP)
    try:
        second = run(*argv, *flags, input='{"text": "a"}\n')
    finally:
        first.send_signal(signal.SIGCONT)
        first.terminate()  # the rest would only take time
        _, err = first.communicate(timeout=60)
    assert second.returncode == 2, second.stderr
    assert re.fullmatch(r"data\.py: another process is preparing [^\n]*\n", second.stderr), second.stderr
    assert (first.returncode, err) == (130, INTERRUPTED)
    with open(source, encoding="utf-8") as stdin:
        third = run(*argv, stdin=stdin)
    assert third.returncode == 0, third.stderr
    assert texts_in(tmp_path / "out/x") == by_split(stories(600), 0.1)


def random_sources(folder, seed, n=240):
    """Sources of every kind that is read in pieces, with documents of all lengths; some come twice."""
    order = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyzéß世"
    words = ["".join(order.choices(letters, k=order.randint(2, 9))) for _ in range(5000)]
    lengths = order.choices([30, 300, 3000], k=n)
    texts = [" ".join(order.choices(words, k=length)).replace(" b", "\nb") for length in lengths]
    packed = folder / "b.txt.gz"
    packed.write_bytes(gzip.compress("\n".join(texts[2 * n // 3 :]).encode(), 1))
    return [write_jsonl(folder / "a.jsonl", texts[: 2 * n // 3] + texts[: n // 20]), packed,
            write_txt(folder / "c.txt", "\n".join(texts[: n // 3]))]


@needs_gpt2
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """kill -9, and the same command again, until it ends: byte for byte what an uninterrupted one gives."""
    order = random.Random(kills)
    argv = [*random_sources(tmp_path, kills), "--tokenizer=gpt2", "--workers=2", "--name=x", "--val=0.3"]
    began = time.monotonic()
    process = start(BUSY, *argv, f"--out={tmp_path / 'whole'}")
    assert process.communicate() and process.returncode == 0
    duration, whole = time.monotonic() - began, contents(tmp_path / "whole/x")

    out, n_killed, n_resumed = tmp_path / "out", 0, 0
    while True:
        is_enough = n_killed >= kills and n_resumed > 0
        if (out / "x").exists():
            assert contents(out / "x") == whole
            if is_enough:
                break
            shutil.rmtree(out)  # complete before it was killed often enough
        n_resumed += is_at_work(out)
        process = start(BUSY, *argv, f"--out={out}")
        if n_killed % 2 == 0 and not is_enough:  # every other time when there is something to lose
            wait_for(lambda process=process: is_at_work(out) or process.poll() is not None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(None if is_enough else order.uniform(0, 1) ** 2 * duration)
        process.kill()
        process.communicate()
        assert process.returncode in (0, -signal.SIGKILL)
        n_killed += process.returncode != 0
