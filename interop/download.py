"""Download a folder of a Hugging Face repository, every file checked against the hub's own checksum.

    python convert.py download OWNER/NAME --folder=batch_size1/1024_96b_1e_1b_ar --out=ckpts
    python convert.py download datasets/MDGA-1/quokka_logs --folder=batch_size1 --out=logs

A connection that breaks is taken up where it broke. Started again after an interruption, it leaves alone what is there and whole; a
file that was not begins anew (huggingface_hub 2 keeps no part of it).
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

import configurator
from configurator import setting
from training.checkpoint import file_digest

OURS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)  # the trouble is here, not on the way


@dataclass
class Config:
    folder: str = setting("", "only this folder of the repository, or this file (empty: everything)")
    revision: str = setting("main", "branch, tag or commit")
    out: str = setting("", "folder to put it into, under the names it has in the repository (empty: downloads/OWNER/NAME)")
    workers: int = setting(8, "files at a time", low=1, high=64)
    tries: int = setting(5, "attempts for each file before it is given up", low=1)


def blob_digest(path):
    """git's SHA-1 of a file, by which the hub knows small ones."""
    content = Path(path).read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_whole(path, entry):
    """Whether a file is what the hub's list says: by SHA-256 for large ones, by git's digest for others."""
    path = Path(path)
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    return file_digest(path) == entry.lfs.sha256 if entry.lfs else blob_digest(path) == entry.blob_id


def said(problem):
    """An exception in one line."""
    return f"{type(problem).__name__}: {(str(problem).strip() or '?').splitlines()[0]}"


def fetch(api, repo, kind, commit, entry, out, tries, enough):
    """One file, tried again after whatever goes wrong on the way; raises ValueError. Tries no more once the event `enough` is set."""
    path, problem = Path(out) / entry.path, ""
    for attempt in range(tries):
        if is_whole(path, entry):
            return
        path.unlink(missing_ok=True)  # of another revision, or damaged
        if attempt and problem != "checksum" and enough.wait(min(2**attempt, 30)):  # the hub, or the way there, needs a moment
            break
        try:
            api.hf_hub_download(repo, entry.path, repo_type=kind, revision=commit, local_dir=out)
            problem = "" if is_whole(path, entry) else "checksum"
        except Exception as error:  # the HTTP library has its own kinds, which differ from version to version
            problem = said(error)
            if getattr(getattr(error, "response", None), "status_code", None) in (401, 403, 404) or getattr(error, "errno", None) in OURS:
                break
        if not problem:
            return
    path.unlink(missing_ok=True)
    if problem == "checksum":
        raise ValueError(f"{repo}/{entry.path} arrived with another checksum than the hub's, {tries} times; it is removed")
    raise ValueError(f"{repo}/{entry.path}: {problem} (start again to go on)")


def listed(api, repo, kind, cfg):
    """The commit that cfg.revision means now, and the hub's entries of all files below cfg.folder; raises ValueError."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    folder = cfg.folder.strip("/")
    try:
        commit = api.repo_info(repo, revision=cfg.revision, repo_type=kind).sha  # should the branch move, all files are still of one state
        try:
            found = list(api.list_repo_tree(repo, folder or None, recursive=True, revision=commit, repo_type=kind))
        except EntryNotFoundError:
            found = api.get_paths_info(repo, [folder], revision=commit, repo_type=kind)  # the name of a file
    except RepositoryNotFoundError:
        other = "" if kind == "dataset" else "; a dataset is written datasets/OWNER/NAME"
        raise ValueError(f"{repo}: no such repository, or not for you (set HF_TOKEN){other}") from None
    except RevisionNotFoundError:
        raise ValueError(f"{repo} has no revision {cfg.revision}") from None
    except Exception as problem:
        raise ValueError(f"{repo} can't be listed: {said(problem)}") from None
    found = [entry for entry in found if isinstance(entry, RepoFile)]
    if not found:
        raise ValueError(f"{repo} has no files" + (f" in {folder}" if folder else ""))
    return commit, found


def download(cfg, repo, progress=lambda done, total: None):
    """All files below cfg.folder into cfg.out, at which `progress` is told bytes; returns their hub entries. Raises ValueError or OSError."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise ValueError("downloading needs: pip install '.[hf]'") from None
    disable_progress_bars()  # one bar for all files is ours
    kind, repo = "dataset" if repo.startswith("datasets/") else "model", repo.removeprefix("datasets/")
    api = huggingface_hub.HfApi()
    commit, found = listed(api, repo, kind, cfg)
    root = Path(cfg.out).resolve()
    known = root / ".cache/huggingface/download"  # where huggingface_hub notes what it has put here, and writes what isn't whole yet
    for entry in found:
        path = (root / entry.path).resolve()
        if not path.is_relative_to(root) or path.is_relative_to(root / ".cache"):
            raise ValueError(f"{repo} lists {entry.path}, which is not within its own folder: nothing is downloaded")
        if path.exists() and not (known / f"{entry.path}.metadata").is_file() and not is_whole(path, entry):
            raise ValueError(f"{path} exists and is no download of this: nothing is overwritten; choose another --out")
    root.mkdir(parents=True, exist_ok=True)
    total, began, enough = sum(entry.size for entry in found), time.time(), threading.Event()

    hashes = {entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in found}  # in the names of files that are not whole yet

    def parts():
        """Files that are not whole yet, of those that are wanted, with their sizes and times."""
        for path in known.rglob("*.incomplete"):
            with contextlib.suppress(OSError):  # whole in between
                if hashes & set(path.name.split(".")):
                    yield path, path.stat().st_size, path.stat().st_mtime

    def sweep(paths):
        for path in paths:
            if re.search(r"\.[0-9a-f]{8}\.incomplete$", path.name):  # a process's own name for it, which no later one takes up
                path.unlink(missing_ok=True)

    sweep([path for path, _, time_ in parts() if time_ < began - 3600])  # of one that was killed
    before = {path for path, *_ in parts()}  # of another that runs beside this
    pool = ThreadPoolExecutor(cfg.workers)
    jobs = {pool.submit(fetch, api, repo, kind, commit, entry, root, cfg.tries, enough): entry for entry in found}
    try:
        waiting = set(jobs)
        while waiting:
            done, waiting = wait(waiting, timeout=0.3, return_when=FIRST_EXCEPTION)
            if any(job.exception() for job in done if not job.cancelled()) and not enough.is_set():
                enough.set()
                pool.shutdown(wait=False, cancel_futures=True)  # what runs may end: a half file could not be kept
            waiting = {job for job in waiting if not job.cancelled()}
            whole = sum(entry.size for job, entry in jobs.items() if job.done() and not job.cancelled())
            progress(min(total, whole + sum(size for path, size, _ in parts() if path not in before)), total)
    except KeyboardInterrupt:
        sweep([path for path, *_ in parts() if path not in before])
        raise
    pool.shutdown()
    if problems := [job.exception() for job in jobs if not job.cancelled() and job.exception()]:
        raise problems[0]
    return found


def main(argv):
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    repo = next((arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")), "")
    cfg = configurator.load(Config, [arg for arg in argv if arg != repo], about=__doc__)
    if repo.count("/") != 1 + repo.startswith("datasets/"):
        configurator.fail(f"which repository? python convert.py download OWNER/NAME, or datasets/OWNER/NAME{f', not {repo}' if repo else ''}")
    cfg.out = cfg.out or f"downloads/{repo.removeprefix('datasets/')}"
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task(repo, total=None)
            found = download(cfg, repo, lambda done, total: bar.update(task, completed=done, total=total))
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    except KeyboardInterrupt:
        print("convert.py: interrupted; start again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # not waiting for the threads that download
    print(f"{len(found)} files, {sum(entry.size for entry in found) / 1e9:.2f} GB, checked, in {Path(cfg.out) / cfg.folder.strip('/')}")
