"""Download a folder of a Hugging Face repository, and check every file against the hub's own checksum.

    python convert.py download OWNER/NAME --folder=batch_size1/1024_96b_1e_1b_ar --out=ckpts
    python convert.py download datasets/MDGA-1/quokka_logs --folder=batch_size1 --out=logs

A broken connection is resumed where it broke. Started again after an interruption, the command leaves alone
the files that are complete and begins the others anew (huggingface_hub 2 keeps no part of them).
HF_ENDPOINT names another hub, HF_TOKEN who you are.
"""

import contextlib
import errno
import hashlib
import os
import re
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich import progress
from rich.console import Console

import configurator
import terminal
from configurator import setting
from corpus.files import sha256_of
from interop.pickles import one_line

# errors of this machine, not of the network: no use in trying again
LOCAL_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass
class Config:
    folder: str = setting("", "only this folder of the repository, or this file (empty: everything)")
    revision: str = setting("main", "branch, tag or commit")
    out: str = setting(
        "", "folder to put it into, under the names it has in the repository (empty: downloads/OWNER/NAME)")
    workers: int = setting(8, "files at a time", low=1, high=64)
    tries: int = setting(5, "attempts for each file before it is given up", low=1)


class Snapshot(NamedTuple):
    """The files to download, at one commit of a repository."""

    api: Any  # huggingface_hub.HfApi
    repo: str  # OWNER/NAME
    repo_type: str  # model or dataset
    commit: str
    files: list  # the hub's entries: path, size, checksum


def main(argv):
    """Download from OWNER/NAME or datasets/OWNER/NAME, which is among the arguments."""
    repo = next((arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")), "")
    cfg = configurator.load(Config, [arg for arg in argv if arg != repo], about=__doc__)
    if repo.count("/") != 1 + repo.startswith("datasets/"):
        problem = f", not {repo}" if repo else ""
        configurator.fail("which repository? python convert.py download OWNER/NAME, or datasets/OWNER/NAME"
                          + problem)
    terminal.keep_going()
    cfg.out = cfg.out or f"downloads/{repo.removeprefix('datasets/')}"
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
               progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    try:
        with progress.Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task(repo, total=None)
            files = download(cfg, repo, lambda done, total: bar.update(task, completed=done, total=total))
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    except KeyboardInterrupt:
        print("convert.py: interrupted; start again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for the threads that download
    size = sum(file.size for file in files) / 1e9
    print(f"{len(files)} files, {size:.2f} GB, checked, in {Path(cfg.out) / cfg.folder.strip('/')}")


def download(cfg, repo, on_progress):
    """Download all files below cfg.folder into cfg.out; returns the hub's entries of them.

    on_progress(done, total) is called with numbers of bytes. Raises ValueError or OSError.
    """
    snapshot = list_files(cfg, repo)
    root = Path(cfg.out).resolve()
    cache = root / ".cache/huggingface/download"  # huggingface_hub's notes of its files, and incomplete ones
    check_places(snapshot, root, cache)
    root.mkdir(parents=True, exist_ok=True)

    digests = {expected_digest(file) for file in snapshot.files}
    an_hour_ago = time.time() - 3600
    remove_parts([path for path, info in parts_of(cache, digests).items() if info.st_mtime < an_hour_ago])
    others = set(parts_of(cache, digests))  # of another download that runs at the same time
    total = sum(file.size for file in snapshot.files)

    stop = threading.Event()
    pool = ThreadPoolExecutor(cfg.workers)
    jobs = {pool.submit(fetch, snapshot, file, root, cfg.tries, stop): file for file in snapshot.files}
    try:
        running = set(jobs)
        while running:
            done, running = wait(running, timeout=0.3, return_when=FIRST_EXCEPTION)
            failed = any(job.exception() for job in done if not job.cancelled())
            if failed and not stop.is_set():
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)  # those that run may end: parts are of no use
            running = {job for job in running if not job.cancelled()}
            n_bytes = sum(file.size for job, file in jobs.items() if job.done() and not job.cancelled())
            parts = parts_of(cache, digests)
            n_bytes += sum(info.st_size for path, info in parts.items() if path not in others)
            on_progress(min(total, n_bytes), total)
    except KeyboardInterrupt:
        remove_parts(parts_of(cache, digests).keys() - others)
        raise
    pool.shutdown()
    problems = [job.exception() for job in jobs if not job.cancelled() and job.exception()]
    if problems:
        raise problems[0]
    return snapshot.files


def list_files(cfg, repo):
    """The Snapshot of all files below cfg.folder, at the commit of cfg.revision; raises ValueError."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.hf_api import RepoFile
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise ValueError("downloading needs: pip install '.[hf]'") from None
    disable_progress_bars()  # we draw one for all files
    api, folder = huggingface_hub.HfApi(), cfg.folder.strip("/")
    repo_type = "dataset" if repo.startswith("datasets/") else "model"
    repo = repo.removeprefix("datasets/")
    try:
        # should the branch move, all files are still of one commit
        commit = api.repo_info(repo, revision=cfg.revision, repo_type=repo_type).sha
        try:
            entries = list(api.list_repo_tree(repo, folder or None, recursive=True, revision=commit,
                                              repo_type=repo_type))
        except EntryNotFoundError:  # it may be a file
            entries = api.get_paths_info(repo, [folder], revision=commit, repo_type=repo_type)
    except RepositoryNotFoundError:
        hint = "" if repo_type == "dataset" else "; a dataset is written datasets/OWNER/NAME"
        raise ValueError(f"{repo}: no such repository, or not for you (set HF_TOKEN){hint}") from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo} has no revision {cfg.revision}") from None
    except Exception as problem:  # the HTTP library has its own kinds, which differ from version to version
        raise ValueError(f"{repo} can't be listed: {one_line(problem)}") from None
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    if not files:
        raise ValueError(f"{repo} has no files" + (f" in {folder}" if folder else ""))
    return Snapshot(api, repo, repo_type, commit, files)


def check_places(snapshot, root, cache):
    """Raise ValueError where a file would lie outside `root`, or overwrite one that was not downloaded."""
    for file in snapshot.files:
        path = (root / file.path).resolve()
        if not path.is_relative_to(root) or path.is_relative_to(root / ".cache"):
            raise ValueError(f"{snapshot.repo} lists {file.path}, which is not within its own folder: "
                             "nothing is downloaded")
        is_ours = (cache / f"{file.path}.metadata").is_file()
        if path.exists() and not is_ours and not is_complete(path, file):
            raise ValueError(f"{path} exists and is no download of this: nothing is overwritten; choose "
                             "another --out")


def fetch(snapshot, file, root, tries, stop):
    """Download one file, again after whatever goes wrong on the way; raises ValueError.

    Once the event `stop` is set, it isn't tried again.
    """
    path, problem = root / file.path, ""
    for attempt in range(tries):
        if is_complete(path, file):
            return
        path.unlink(missing_ok=True)  # of another revision, or damaged
        seconds = min(2**attempt, 30) if attempt and problem != "checksum" else 0
        if seconds and stop.wait(seconds):  # the hub, or the way there, needs a moment
            break
        try:
            snapshot.api.hf_hub_download(snapshot.repo, file.path, repo_type=snapshot.repo_type,
                                         revision=snapshot.commit, local_dir=root)
            problem = "" if is_complete(path, file) else "checksum"
        except Exception as error:  # the HTTP library has its own kinds, which differ from version to version
            problem = one_line(error)
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403, 404) or getattr(error, "errno", None) in LOCAL_ERRORS:
                break
        if not problem:
            return
    path.unlink(missing_ok=True)
    if problem == "checksum":
        raise ValueError(f"{snapshot.repo}/{file.path} arrived with another checksum than the hub's, {tries} "
                         "times; it is removed")
    raise ValueError(f"{snapshot.repo}/{file.path}: {problem} (start again to go on)")


def is_complete(path, file):
    """True if the file at `path` is the one that the hub lists."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    digest = sha256_of(path) if file.lfs else git_digest(path)
    return digest == expected_digest(file)


def expected_digest(file):
    """The hub's checksum: SHA-256 of a large file, git's of a small one."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def git_digest(path):
    """git's SHA-1 of a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def parts_of(cache, digests):
    """{path: os.stat_result} of the incomplete files that have one of the digests in their names."""
    parts = {}
    for path in cache.rglob("*.incomplete"):
        with contextlib.suppress(OSError):  # complete by now
            if digests & set(path.name.split(".")):
                parts[path] = path.stat()
    return parts


def remove_parts(paths):
    """Remove those incomplete files whose name is of one process, so that no later one resumes them."""
    for path in paths:
        if re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):
            path.unlink(missing_ok=True)
