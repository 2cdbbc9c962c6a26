"""The compiler behind torch.compile: whether it works on this machine, and what a killed one has left."""

import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch


def check(device):
    """Compile a line for the device, as torch.compile will a network; raises ValueError if that fails here.

    So that it is found before a run takes its folder. What is compiled stays in the compiler's cache.
    """
    remove_unfinished_builds()
    try:
        compiled = torch.compile(lambda x: x.exp() + 1, dynamic=False, fullgraph=True)
        compiled(torch.ones(64, device=device))
    except Exception as problem:  # of torch's many layers, the compiler, or the disk
        if is_interrupted(problem):
            raise
        raise ValueError(f"torch.compile does not work here: {reason(problem)}; mend that, or add "
                         "--compile=no") from None


def reason(problem):
    """Why the compiler fails, in a line: what torch.compile is known to trip over, else its own words."""
    for name, path in (("Python", sys.prefix), ("torch", torch.__file__)):
        if any(map(str.isspace, path)):
            return f"there is a space in {path}, where {name} is"
    if any(map(str.isspace, str(cache_folder()))):
        return f"there is a space in {cache_folder()}; let TORCHINDUCTOR_CACHE_DIR name another folder"
    text = str(problem)
    if "InvalidCxxCompiler" in text or "No working C++ compiler" in text:
        return f"there is no C++ compiler ({os.environ.get('CXX', 'g++')}); install g++, or let CXX name one"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return f"{sysconfig.get_path('include')} has no Python.h; install Python's development files"
    lines = [line.strip() for line in text.splitlines() if "error" in line.lower()]
    return lines[-1] if lines else text.strip().partition("\n")[0] or type(problem).__name__


def is_interrupted(problem):
    """Whether a compilation failed because a signal ended one of its processes, as Ctrl-C ends them all."""
    while problem:
        if getattr(problem, "returncode", 0) < 0:  # subprocess.CalledProcessError
            return True
        problem = problem.__cause__ or problem.__context__
    return False


# --------------------------------------------------------------------------------------- the compiler's cache

BUILDING = "_CxxBuild"  # torch keeps a folder NAME_CxxBuild beside NAME.so as long as it is being made


def cache_folder():
    """The folder in which torch.compile keeps what it has compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def remove_unfinished_builds():
    """Remove what killed compilations have left in the cache: torch would take it for whole, for ever.

    A build that is under way holds a lock; what a machine's crash has left empty is no library, either.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    for root in {cache_folder(), Path(default_cache_dir())}:  # headers are always in the latter
        names = {path.with_name(path.name.removesuffix(BUILDING)) for path in root.glob(f"*/*{BUILDING}")}
        names |= {path.with_suffix("") for path in root.glob("*/*.so") if is_empty(path)}
        for name in names:
            with contextlib.suppress(OSError):
                remove_unfinished_build(root, name)


def is_empty(path):
    """Whether a file is there without a single byte."""
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def remove_unfinished_build(root, name):
    """Remove the library (or header) `name` if it is unfinished and nobody is making it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    own_locks = name.parent / "locks"  # precompiled headers have some of their own
    lock = (own_locks if own_locks.is_dir() else root / "locks") / f"{name.name.partition('.')[0]}.lock"
    folder = name.with_name(name.name + BUILDING)
    targets = [name.with_name(name.name + suffix) for suffix in (".so", ".o", ".gch")]
    with open(lock, "ab") as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unfinished = folder.exists()  # still, now that nobody else can be making it
        for target in targets:
            if unfinished or is_empty(target):
                target.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
