"""Read torch's files without running anything in them.

torch saves pickles, and a pickle can call any function by its name. Here torch's own weights-only unpickler
reads them. The few classes that honest checkpoints hold beside tensors (arguments, enums of the framework,
random states) become inert stand-ins; a file that names anything else is refused.
"""

import argparse
import io
import pickle
import zipfile

import torch

from corpus.files import check_file, open_regular

FRAMEWORKS = ("megatron.", "transformer_engine.", "apex.")
HARMLESS_NAMES = {  # found beside the weights in honest checkpoints; each becomes a stand-in
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray",
    "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype", "_codecs.encode",
    "_io.BytesIO", "io.BytesIO", "signal.Signals", "pathlib.PosixPath", "pathlib._local.PosixPath",
    "datetime.timedelta", "datetime.datetime", "builtins.slice", "types.SimpleNamespace",
    "torch.nn.functional.silu", "torch._C._nn.gelu"}


class StandIn:
    """Takes the place of an object that nobody needs: it keeps its arguments and calls nothing."""

    def __init__(self, *values):
        self.values = values

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class RefusedPickle(ValueError):
    """The file refers to something that may run code."""


def refuse(path, name):
    raise RefusedPickle(f"{path} refers to {name!r}, which no checkpoint needs: it may run code, so the file "
                        "is refused, and nothing in it was run")


def one_line(error):
    """The type of an exception and the first sentence of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = type(error).__name__
    return f"{kind}: {lines[0].partition('. ')[0]}" if lines else kind


# ----------------------------------------------------------------------------------------- torch.save's files


def load(path, section=None, mmap=False, map_location="cpu"):
    """Read a file that torch.save wrote, or one `section` (offset, length) of a file; nothing in it is run.

    mmap=True maps a zip archive (torch ≥ 1.6) instead of reading it.
    Raises ValueError, or OSError where the file can't be opened.
    """
    check_file(path)
    try:
        with FileSection(path, *section) if section else open_regular(path) as file:
            return load_from(file, path, mmap, map_location)
    except RefusedPickle:
        raise
    except pickle.UnpicklingError as problem:
        if "GLOBAL " in str(problem):
            refuse(path, str(problem).partition("GLOBAL ")[2].split()[0])
        raise ValueError(f"{path} can't be read: it is no file of torch's, or holds more than "
                         "tensors") from None
    except OSError as problem:
        if problem.filename is not None:  # it can't be opened
            raise
        # a damaged archive makes torch seek before the file's beginning
        raise ValueError(f"{path} can't be read: it is cut short or damaged ({problem})") from None
    except Exception as problem:  # a damaged file can raise almost anything
        raise ValueError(f"{path} can't be read: {one_line(problem)}") from None


def load_from(file, path, mmap, map_location):
    """torch.load of an open file, if all names in it are harmless; raises RefusedPickle and torch's own."""
    is_zip = zipfile.is_zipfile(file)
    file.seek(0)
    # of an older file, the names are met while it is read: torch refuses others than these
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file) if is_zip else [*HARMLESS_NAMES]
    others = [name for name in names if name != "argparse.Namespace"]
    for name in others:
        if name not in HARMLESS_NAMES and not name.startswith(FRAMEWORKS):
            refuse(path, name)
    file.seek(0)
    with torch.serialization.safe_globals([argparse.Namespace, *((StandIn, name) for name in others)]):
        if is_zip and mmap:
            # torch maps no open files
            return torch.load(path, weights_only=True, mmap=True, map_location=map_location)
        return torch.load(file, weights_only=True, map_location=map_location)


class FileSection(io.RawIOBase):
    """Bytes offset … offset + length of a file, as a file."""

    def __init__(self, path, offset, length):
        self.file = open_regular(path)
        self.offset = offset
        self.length = length
        self.seek(0)

    def readable(self):
        return True

    def seekable(self):
        return True

    def tell(self):
        return self.file.tell() - self.offset

    def seek(self, position, whence=io.SEEK_SET):
        if whence == io.SEEK_CUR:
            position += self.tell()
        if whence == io.SEEK_END:
            position += self.length
        self.file.seek(self.offset + position)
        return self.tell()

    def readinto(self, buffer):
        room = max(0, self.length - self.tell())
        return self.file.readinto(memoryview(buffer)[:room])

    def close(self):
        self.file.close()
        super().close()


# ------------------------------------------------------------------- torch.distributed.checkpoint's .metadata


class MetadataUnpickler(pickle.Unpickler):
    """Reads .metadata, a plain pickle: of its classes only the values are kept, and nothing else is let in.

    A pickle may change the classes it meets (BUILD sets attributes), so it never meets one that is in use.
    """

    CLASSES = {
        "torch.distributed.checkpoint.metadata": {
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
            "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"},
        # what each rank was to write: Megatron-LM keeps that since core 0.11
        "torch.distributed.checkpoint.planner": {
            "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"}}
    OTHER_NAMES = {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "device"),
        ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib._local", "PosixPath")}
    OLD_MODULE = "torch.distributed._shard.sharded_tensor.metadata"  # of the properties, up to torch 2.2
    DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

    def __init__(self, file, path):
        super().__init__(file)
        self.path = path
        self.stand_ins = {}

    def find_class(self, module, name):
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch", "Size"):
            return torch.Size
        is_metadata = name in self.CLASSES.get(module, ())
        is_other = (module, name) in self.OTHER_NAMES or module == self.OLD_MODULE
        if is_metadata or is_other or module.startswith(FRAMEWORKS):
            return self.stand_ins.setdefault(name, type(name, (StandIn,), {}))
        return refuse(self.path, f"{module}.{name}")
