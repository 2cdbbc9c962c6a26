"""Text that is not a file yet: standard input, and what is downloaded."""

import http.client
import shutil
import urllib.request

from corpus.files import no_empty_parents, sha256_of
from corpus.sources import BUFFER_BYTES, file_source

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def save_standard_input(stream, folder, cfg):
    """Save standard input as a file in `folder`, and return its Source: it is read more than once.

    Raises ValueError if an interrupted preparation, of which the folder is, had another one.
    """
    default = "jsonl" if cfg.sft else "txt"
    path = folder / f"stdin.{default if cfg.format == 'auto' else cfg.format}"
    partial = folder / "stdin.part"
    try:
        with open(partial, "wb") as file:
            shutil.copyfileobj(stream, file, BUFFER_BYTES)
        if path.is_file() and sha256_of(path) != sha256_of(partial):
            raise ValueError(f"{path}: standard input changed since the preparation in {folder} began; "
                             "start again with --restart")
        if not path.is_file():
            partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    return file_source(path, cfg)


def download(url, path):
    """Download `url` to `path`, unless it is there already. An interrupted download leaves nothing behind."""
    if path.is_file():
        return path
    partial = path.with_suffix(".part")
    with no_empty_parents(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fetch_whole(url, partial)
        partial.rename(path)
    return path


def fetch_whole(url, path):
    """Download `url` to `path`, or raise OSError."""
    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(path, "wb") as file:
            shutil.copyfileobj(response, file)
            n_bytes = file.tell()
            if n_bytes != int(response.headers.get("Content-Length", n_bytes)):
                raise OSError(f"the connection closed after {n_bytes} bytes")
    except (OSError, http.client.HTTPException) as problem:
        path.unlink(missing_ok=True)
        raise OSError(f"cannot download {url}: {problem}; "
                      "save it as a .txt file and give its path instead") from None
