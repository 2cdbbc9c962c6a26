"""Files on a disk: listed, mapped, hashed, and made to last."""

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from pathlib import Path

import numpy as np

# Beside names that begin with a dot (.DS_Store, AppleDouble's ._train.bin, .nfs…): what Windows, macOS's
# archiver, Synology and file systems leave in folders; some of it only root may read.
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin",
                "system volume information"}


def list_folder(folder, pattern="*"):
    """The paths in a user's folder that match a pattern, sorted, without what systems leave there.

    A pattern that begins with "**/" finds them in the folders below, too, also in linked ones. Raises OSError
    for a folder that can't be read: glob passes over it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return []
    below, pattern = pattern.startswith("**/"), pattern.removeprefix("**/")
    paths = []
    for place in walk_folders(folder):
        paths += [path for path in place.glob(pattern)
                  if not any(map(is_system_name, path.relative_to(place).parts))]
        if not below:
            break
    return sorted(paths)


def walk_folders(folder):
    """Yield a folder and those below it, linked ones too, each real folder once. Raises OSError."""
    pending, seen = [folder], set()
    while pending:
        folder = pending.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as entries:
            inner = sorted((entry.is_symlink(), entry.name) for entry in entries if leads_to_folder(entry))
        yield folder
        pending += [folder / name for _, name in inner if not is_system_name(name)]


def leads_to_folder(entry):
    """Whether an os.DirEntry is a folder, or a link to one. Raises OSError where that can't be known."""
    try:
        return entry.is_dir()
    except OSError as problem:
        if problem.errno == errno.ELOOP:  # links that lead to each other
            return False
        raise


def is_system_name(name):
    """Whether a file or folder of this name is hidden, or left by a system beside the user's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def not_a_file(path):
    """What a path is if it is no file that can be read again and again, in words; "" for such a file.

    Raises OSError where that can't be known.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as problem:
        if problem.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        is_link = os.path.islink(path)
        return f"a link to {os.readlink(path)}, which is not there" if is_link else "no such file"
    if stat.S_ISREG(mode):
        return ""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe, which can be read only once",
             stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


POINTER = b"version https://git-lfs.github.com/spec/"


def check_file(path):
    """Raise ValueError or OSError unless this is a file, and not one that stands for another.

    A clone without Git LFS has pointers in the place of large files.
    """
    what = not_a_file(path)
    if what == "no such file":
        raise FileNotFoundError(f"{path}: {what}")
    if what:
        raise ValueError(f"{path}: {what}")
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file it stands for; "
                             "`git lfs pull` in its repository fetches that")


def check_no_pipes(folder):
    """Raise ValueError if a folder to write into holds a pipe: opening one waits for a reader, for ever.

    There need be no such folder yet.
    """
    for path in sorted(Path(folder).glob("*")):
        if path.is_fifo():
            raise ValueError(f"{path}: {not_a_file(path)}; remove it")


def open_regular(path):
    """Open a regular file to read its bytes; of a pipe or a device one could wait for ever.

    Raises ValueError where it is none, and OSError.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # Windows has neither
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path}: {not_a_file(path)}")
    return open(handle, "rb")


def map_tokens(path, dtype, count, source, offset=0):
    """Memory-map the `count` tokens that a file holds from byte `offset` on.

    Raises ValueError if it does not hold exactly these; source: the name of what says that it should.
    """
    size = path.stat().st_size if os.path.isfile(path) else 0  # it bears any name that a record gives
    expected = offset + count * dtype.itemsize
    if size != expected or not count:
        raise ValueError(f"{path}: {size} bytes, but {source} says {count} tokens of {dtype.name} "
                         f"({expected} bytes): truncated, or another dtype; prepare it again")
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def sha256_of(path):
    """The SHA-256 of a file, in hex; raises OSError where it can't be read."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync_to_disk(file):
    """Wait until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path):
    """Wait until a closed file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def no_empty_parents(path):
    """Remove those folders above `path` that the block made and left empty."""
    new = [parent for parent in Path(path).parents if not parent.exists()]
    try:
        yield
    finally:
        for parent in new:
            with contextlib.suppress(OSError):
                parent.rmdir()


def stamp(path):
    """(bytes, time of the last change in ns) of a file, or of all the files in a folder."""
    paths = [file for file in list_folder(path, "**/*") if file.is_file()] if path.is_dir() else [path]
    stats = [p.stat() for p in paths]
    n_bytes = sum(stat.st_size for stat in stats)
    return n_bytes, max((stat.st_mtime_ns for stat in stats), default=0)


@contextlib.contextmanager
def all_or_none(folder):
    """Yield an empty folder to write into, whose files move to `folder` at the end; after an error none does.

    Then folders that did not exist before are gone again, too.
    """
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".building_", dir=folder) as building:
            yield Path(building)
            for path in sorted(Path(building).iterdir()):
                path.replace(folder / path.name)
    except BaseException:
        for path in created:
            with contextlib.suppress(OSError):  # another process has put something there
                path.rmdir()
        raise
