"""Files on a disk: listed, mapped, hashed, and made to last."""

import hashlib
import os
from pathlib import Path

import numpy as np

# Beside names that begin with a dot (.DS_Store, AppleDouble's ._train.bin, .nfs…): what Windows, macOS's
# archiver and Synology leave in folders.
SYSTEM_NAMES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"}


def list_folder(folder, pattern="*"):
    """The paths in a user's folder that match a pattern, sorted, without what systems leave there."""
    folder = Path(folder)
    return sorted(path for path in folder.glob(pattern)
                  if not any(map(is_system_name, path.relative_to(folder).parts)))


def is_system_name(name):
    """Whether a file or folder of this name is hidden, or left by a system beside the user's own."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def map_tokens(path, dtype, count, source, offset=0):
    """Memory-map the `count` tokens that a file holds from byte `offset` on.

    Raises ValueError if it does not hold exactly these; source: the name of what says that it should.
    """
    size = path.stat().st_size if path.is_file() else 0
    expected = offset + count * dtype.itemsize
    if size != expected or not count:
        raise ValueError(f"{path}: {size} bytes, but {source} says {count} tokens of {dtype.name} "
                         f"({expected} bytes): truncated, or another dtype; prepare it again")
    return np.memmap(path, dtype, mode="r", offset=offset, shape=(count,))


def sha256_of(path):
    """The SHA-256 of a file, in hex; raises OSError where it can't be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
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


def stamp(path):
    """(bytes, time of the last change in ns) of a file, or of all the files in a folder."""
    paths = [file for file in list_folder(path, "**/*") if file.is_file()] if path.is_dir() else [path]
    stats = [p.stat() for p in paths]
    n_bytes = sum(stat.st_size for stat in stats)
    return n_bytes, max((stat.st_mtime_ns for stat in stats), default=0)
