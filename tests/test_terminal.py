"""How commands begin, speak and are stopped: streams that can't be written, readers that are gone, Ctrl-C."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import TINY, environment, newest_step, until

import terminal

COMMANDS = ("train", "data", "eval", "sample", "convert", "scaling", "bench")


def a_stream(descriptor, encoding="utf-8", optional=False):
    """A text stream over a descriptor, as `terminal.run` makes it of standard output."""
    raw = terminal.Output(descriptor, optional)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace")


@pytest.fixture
def full():
    """A descriptor of a full disk."""
    descriptor = os.open("/dev/full", os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def pipe_without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


# ---------------------------------------------------------------------------------------------------- streams


def test_a_reader_that_is_gone_ends_a_command_quietly_and_once(pipe_without_reader, capfd):
    stream = a_stream(pipe_without_reader)
    with pytest.raises(SystemExit) as stop:
        print("one", file=stream, flush=True)
    assert stop.value.code == 141
    print("two", file=stream, flush=True)  # as Python tries once more at its end
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_ends_a_command_whose_output_is_its_result(full, capfd):
    with pytest.raises(SystemExit) as stop:
        print("one", file=a_stream(full), flush=True)
    error = capfd.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert error.endswith("standard output can't be written: No space left on device\n")


@pytest.mark.parametrize("broken", ("full", "pipe_without_reader"))
def test_optional_output_is_dropped(broken, request):
    stream = a_stream(request.getfixturevalue(broken), optional=True)
    for _ in range(3):
        print("x" * 100_000, file=stream, flush=True)


def test_what_an_encoding_lacks_is_escaped():
    reader, writer = os.pipe()
    with open(reader, "rb") as file:
        print("2 × 1 ± ü \ud800", file=a_stream(writer, "ascii"), flush=True)
        os.close(writer)
        assert file.read() == b"2 \\xd7 1 \\xb1 \\xfc \\ud800\n"


def test_a_pipe_that_does_not_block_loses_nothing():
    """Node.js and ssh leave such ones behind; Python would raise BlockingIOError when they are full."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    received = []

    def read():
        with open(reader, "rb") as file:
            time.sleep(0.1)
            received.append(file.read())

    thread = threading.Thread(target=read)
    thread.start()
    print("x" * 500_000, file=a_stream(writer), flush=True)
    os.close(writer)
    thread.join()
    assert len(received[0]) == 500_001


def test_what_is_optional_fails_with_a_warning(capsys):
    with terminal.optional("p.png can't be drawn"):
        raise OSError(28, "No space left on device")
    assert capsys.readouterr().err == (
        "warning: p.png can't be drawn (OSError: [Errno 28] No space left on device)\n")


# ----------------------------------------------------------------------------------------------- the commands


def command(*arguments, **settings):
    """Start a command as users do; what it prints comes back as text."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(), text=True,
                            **settings)


def test_readers_end_quietly_where_nobody_reads_on(pipe_without_reader, full):
    tables = command("scaling.py", "tables", stdout=pipe_without_reader, stderr=subprocess.PIPE)
    usage = command("data.py", "--help", stdout=full, stderr=subprocess.PIPE)
    assert tables.communicate() == (None, "") and tables.returncode == 141
    no_space = "data.py: standard output can't be written: No space left on device\n"
    assert usage.communicate() == (None, no_space) and usage.returncode == 1


def test_a_run_needs_nobody_who_reads_what_it_says(corpus, tmp_path, pipe_without_reader):
    run, err = tmp_path / "run", tmp_path / "err"
    with open(err, "w", encoding="utf-8") as file:
        flags = (f"--corpus={corpus}", f"--run_dir={run}", "--steps=20", "--log_every=1")
        process = command("train.py", *TINY, *flags, stdout=pipe_without_reader, stderr=file)
        assert process.wait() == 0
    assert newest_step(run) == 20 and (run / "loss.png").is_file()
    warning = "warning: standard output can't be written (Broken pipe); the work goes on\n"
    assert err.read_text(encoding="utf-8") == warning


def is_importing(process):
    """Whether a process has loaded numpy's library, or torch's: it is amid the imports."""
    try:
        maps = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8")
    except OSError:  # it has just ended
        return False
    return "_multiarray" in maps or "libtorch" in maps


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_during_the_imports_says_nothing(name):
    argument = "tables" if name == "scaling" else "--help"
    process = command(f"{name}.py", argument, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until(lambda: process.poll() is not None or is_importing(process))
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert "Traceback" not in output
    assert process.returncode in (-signal.SIGINT, 130, 0)  # 0: it was quicker


def test_a_hangup_counts_unless_it_was_ignored(monkeypatch):
    assert terminal.stop_signals() == [signal.SIGTERM, signal.SIGHUP]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        assert terminal.stop_signals() == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)
