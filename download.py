"""Download a folder of a Hugging Face repository, every file checked against the hub's own checksum.

    python convert.py download OWNER/NAME --folder=batch_size1/1024_96b_1e_1b_ar --out=ckpts
    python convert.py download datasets/MDGA-1/quokka_logs --folder=batch_size1 --out=logs

Interrupted, it goes on where it was; what is there already, and whole, stays. HF_ENDPOINT names another hub, HF_TOKEN who you are.
"""

import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import configurator
from checkpoint import file_digest
from configurator import setting


@dataclass
class Config:
    folder: str = setting("", "only what lies in this folder of the repository (empty: everything)")
    revision: str = setting("main", "branch, tag or commit")
    out: str = setting("downloads", "folder to put it into, under the names it has in the repository")
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


def fetch(api, repo, kind, revision, entry, out, tries):
    """One file, resumed after each broken connection; raises ValueError."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    path, problem = Path(out) / entry.path, ""
    for attempt in range(tries):
        if is_whole(path, entry):
            return entry.size
        path.unlink(missing_ok=True)  # of another revision, or damaged
        try:
            api.hf_hub_download(repo, entry.path, repo_type=kind, revision=revision, local_dir=out, force_download=bool(attempt and problem == "checksum"))
            problem = "" if is_whole(path, entry) else "checksum"
        except EntryNotFoundError as error:
            raise ValueError(f"{repo}/{entry.path}: {str(error).splitlines()[0]}") from None
        except (HfHubHTTPError, OSError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        except Exception as error:  # the HTTP library's own, which differ from version to version
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if not problem:
            return entry.size
    path.unlink(missing_ok=True)
    if problem == "checksum":
        raise ValueError(f"{repo}/{entry.path} arrived with another checksum than the hub's, {tries} times; it is removed")
    raise ValueError(f"{repo}/{entry.path}: {problem} (tried {tries} times; start again to go on)")


def download(cfg, repo, progress=lambda n: None):
    """All files below cfg.folder into cfg.out; returns their hub entries. Raises ValueError or OSError."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise ValueError("downloading needs: pip install '.[hf]'") from None
    disable_progress_bars()  # one bar for all files is ours
    kind, repo = "dataset" if repo.startswith("datasets/") else "model", repo.removeprefix("datasets/")
    api = huggingface_hub.HfApi()
    folder = cfg.folder.strip("/")
    try:
        found = [entry for entry in api.list_repo_tree(repo, recursive=True, revision=cfg.revision, repo_type=kind)
                 if isinstance(entry, huggingface_hub.hf_api.RepoFile) and (not folder or entry.path == folder or entry.path.startswith(folder + "/"))]
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = "no such repository, or not for you (set HF_TOKEN)" if isinstance(error, RepositoryNotFoundError) else f"no revision {cfg.revision}"
        raise ValueError(f"{repo}: {what}" + ("" if kind == "dataset" else "; a dataset is written datasets/OWNER/NAME")) from None
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        raise ValueError(f"{repo} can't be listed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from None
    except Exception as error:  # the HTTP library's own
        raise ValueError(f"{repo} can't be listed: {type(error).__name__}: {error}".splitlines()[0]) from None
    root = Path(cfg.out).resolve()
    if outside := [entry.path for entry in found if not (root / entry.path).resolve().is_relative_to(root)]:
        raise ValueError(f"{repo} lists {outside[0]}, which is not within its own folder: nothing is downloaded")
    known = root / ".cache/huggingface/download"  # where huggingface_hub notes what it has put here
    if foreign := [entry.path for entry in found if (root / entry.path).exists() and not (known / f"{entry.path}.metadata").is_file() and not is_whole(root / entry.path, entry)]:
        raise ValueError(f"{root / foreign[0]} exists and is no download of this: nothing is overwritten; choose another --out")
    if not found:
        raise ValueError(f"{repo} has no files" + (f" in {folder}" if folder else ""))
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(cfg.workers) as pool:
        jobs = [pool.submit(fetch, api, repo, kind, cfg.revision, entry, cfg.out, cfg.tries) for entry in found]
        try:
            for job in jobs:
                progress(job.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def main(argv):
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    repo = next((arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")), "")
    cfg = configurator.load(Config, [arg for arg in argv if arg != repo], about=__doc__)
    if repo.count("/") != 1 + repo.startswith("datasets/"):
        configurator.fail(f"which repository? python convert.py download OWNER/NAME, or datasets/OWNER/NAME{f', not {repo}' if repo else ''}")
    try:
        with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn(), transient=True, console=Console(stderr=True)) as bar:
            task = bar.add_task(repo, total=None)
            found = download(cfg, repo, lambda n: bar.advance(task, n))
    except (ValueError, OSError) as problem:
        configurator.fail(str(problem))
    except KeyboardInterrupt:
        print("convert.py: interrupted; start again to go on", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"{len(found)} files, {sum(entry.size for entry in found) / 1e9:.2f} GB, checked, in {Path(cfg.out) / cfg.folder.strip('/')}")
