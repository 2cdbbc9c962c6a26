"""The compiler behind torch.compile: what it lacks is found first, and what a killed one has left is removed.

    PYTHONPATH=.:tests python tests/training/test_compiler.py 20

kills so many starts that compile, each at a moment in which the compiler writes, and trains after each.
"""

import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch._inductor.exc
from conftest import ROOT, prepare_words
from runs import TINY, environment, newest_step, until

from training import compiler
from training.distributed import STOPPED


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of an empty cache of the compiler."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("ab", "locks", "precompiled_headers/locks"):
        (tmp_path / "cache" / name).mkdir(parents=True)
    return tmp_path / "cache"


def write(path, content=b"\x7fELF"):
    path.write_bytes(content)
    return path


def test_what_a_killed_compiler_has_left_is_removed(cache):
    """Torch would load it for ever; libraries that are whole, or in the making, stay."""
    headers = cache / "precompiled_headers"
    whole = write(cache / "ab/whole.main.so")
    empty = write(cache / "ab/empty.main.so", b"")  # as after a crash of the machine
    torn, torn_header = write(cache / "ab/torn.main.so"), write(headers / "torn.h.gch")
    busy, busy_header = write(cache / "ab/busy.main.so", b""), write(headers / "busy.h.gch")
    source = write(cache / "ab/torn.main.cpp")
    folders = [path.with_name(path.name + "_CxxBuild") for path in (
        cache / "ab/torn.main", cache / "ab/busy.main", headers / "torn.h", headers / "busy.h")]
    for folder in folders:
        folder.mkdir()
    with open(cache / "locks/busy.lock", "wb") as one, open(headers / "locks/busy.lock", "wb") as other:
        for file in (one, other):
            fcntl.flock(file, fcntl.LOCK_EX)
        compiler.remove_unfinished_builds()
    there = whole, source, busy, busy_header, folders[1], folders[3]
    gone = empty, torn, torn_header, folders[0], folders[2]
    assert all(path.exists() for path in there) and not any(path.exists() for path in gone)


def without_compiler(*_, **__):
    raise torch._inductor.exc.InvalidCxxCompiler()


def interrupted(*_, **__):
    try:
        subprocess.run(["sh", "-c", "kill -INT $$"], check=True)
    except subprocess.CalledProcessError as problem:
        raise RuntimeError("C++ compile error") from problem


def test_why_it_fails_is_one_line(cache, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: without_compiler)
    with pytest.raises(ValueError, match=r"there is no C\+\+ compiler .*; mend that, or add --compile=no"):
        compiler.check("cpu")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: interrupted)
    with pytest.raises(RuntimeError) as error:  # that says nothing about the compiler
        compiler.check("cpu")
    assert compiler.is_interrupted(error.value)


def compiling(folder, *flags, log=subprocess.PIPE, **variables):
    """Start train.py with a compiler whose cache is in a folder."""
    command = [sys.executable, "train.py", *TINY, f"--run_dir={folder / 'run'}", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True,
                            env=environment(TORCHINDUCTOR_CACHE_DIR=str(folder / "cache"), **variables),
                            start_new_session=True)


def test_a_machine_without_a_compiler_is_refused_before_anything_is_written(corpus, tmp_path):
    process = compiling(tmp_path, "--compile=blocks", "--steps=9", f"--corpus={corpus}", CXX="/nowhere/g++")
    output, _ = process.communicate()
    assert process.returncode == 2 and not (tmp_path / "run").exists()
    assert output == ("train.py: torch.compile does not work here: there is no C++ compiler (/nowhere/g++); "
                      "install g++, or let CXX name one; mend that, or add --compile=no\n")


def is_compiling(folder):
    """Whether a library or a header is in the making."""
    return any(folder.glob("cache/*/*_CxxBuild"))


@pytest.mark.slow
def test_ctrl_c_during_the_compilation(corpus, tmp_path):
    """It reaches the compiler, too: the run leaves at once, and can be started again."""
    flags = ["--compile=blocks", "--steps=2", f"--corpus={corpus}", "--resume=auto"]
    process = compiling(tmp_path, *flags)
    until(lambda: (tmp_path / "run/metrics.jsonl").is_file() and is_compiling(tmp_path))
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == STOPPED and "Traceback" not in output
    assert "stopped by a signal amid step 1" in output
    process = compiling(tmp_path, *flags)
    assert process.wait() == 0 and newest_step(tmp_path / "run") == 2


def kill_compilations(corpus, folder, times, rng):
    """Kill starts that compile a library anew, as it is written, and train after each.

    Returns how often a build was left unfinished, and how often with a library that is none.
    """
    flags = ["--compile=blocks", "--n_layer=1", "--steps=2", f"--corpus={corpus}"]
    assert compiling(folder, *flags).wait() == 0
    libraries = sorted(folder.glob("cache/*/*.so"))
    sizes = [path.stat().st_size for path in libraries]
    unfinished = damaged = 0
    for number in range(times):
        shutil.rmtree(folder / "run", ignore_errors=True)
        which = rng.randrange(len(libraries))
        library = libraries[which]
        library.unlink()
        building = library.with_name(library.stem + compiler.BUILDING)
        process = compiling(folder, *flags, log=subprocess.DEVNULL)
        if number % 4:  # the linker writes it in some ten milliseconds
            while not library.exists() and process.poll() is None:
                time.sleep(0.0005)
            time.sleep(0.02 * rng.random() * (number % 4 - 1))
        else:
            until(lambda: building.exists() or process.poll() is not None)  # noqa: B023
            time.sleep(rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        unfinished += building.exists()
        damaged += library.exists() and library.stat().st_size != sizes[which]
        again = compiling(folder, *flags, "--resume=auto")
        output, _ = again.communicate()
        assert again.returncode == 0 and newest_step(folder / "run") == 2, output
        assert library.stat().st_size == sizes[which]
        print(f"kill {number + 1}: {unfinished} unfinished, {damaged} damaged; trained", flush=True)
    return unfinished, damaged


def main():
    folder = Path(tempfile.mkdtemp())
    corpus, times = prepare_words(folder), int(sys.argv[1])
    unfinished, damaged = kill_compilations(corpus, folder, times, random.Random(times))
    print(f"{times} × SIGKILL amid a compilation: {unfinished} left a build unfinished, {damaged} a damaged "
          "library, and every start after them trained")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
