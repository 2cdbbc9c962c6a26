"""`convert.py download` against a hub of our own: resumed, filtered, checked."""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import parse_qs, unquote, urlparse

import huggingface_hub
import pytest
from conftest import ROOT

import convert

COMMIT = "c" * 40
LARGE = "batch_size1/a/iter_0000010/__0_0.distcp"  # 25 MB: huggingface_hub writes 10 at a time
MEDIUM = "batch_size1/a/iter_0000010/.metadata"
SMALL = "batch_size1/a/latest_checkpointed_iteration.txt"
N_LARGE = 1000  # bytes above which the hub keeps a file by its SHA-256


class Hub(ThreadingHTTPServer):
    """The few answers of a Hugging Face hub that a download needs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}  # {path: content}
        self.requests = []  # (method, path, first byte) of files
        self.wrong = set()  # paths answered with other content
        self.lost = set()  # paths that are listed and not there
        self.breaks = {}  # {path: bytes after which the connection is cut, once}
        self.failures = {}  # {path: how often it is answered with an error, or wrong content if in `wrong`}
        self.slow = {}  # {path: an event for which it waits in the middle}
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def digest(self, path):
        content = self.files[path]
        if len(content) > N_LARGE:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path):
        """A file as the hub lists it."""
        content, digest = self.files[path], self.digest(path)
        entry = dict(type="file", path=path, size=len(content), oid=digest[:40])
        if len(content) > N_LARGE:
            entry["lfs"] = dict(oid=digest, size=len(content), pointerSize=130)
        return entry


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def head(self, code, length=0, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", length)
        self.end_headers()

    def answer_json(self, value):
        body = json.dumps(value).encode()
        self.head(200, len(body), Content_Type="application/json")
        self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        revision = re.fullmatch(r"/api/(models|datasets)/team/quokka/revision/([^/]+)", path)
        listing = re.fullmatch(r"/api/(models|datasets)/team/quokka/tree/([^/]+)/?(.*)", path)
        file = re.fullmatch(r"(?:/datasets)?/team/quokka/resolve/([^/]+)/(.+)", path)
        if revision and revision[2] in ("main", "v1", COMMIT):
            self.answer_json(dict(id="team/quokka", sha=COMMIT))
        elif listing and listing[2] == COMMIT:
            self.list_folder(listing[3])
        elif file and file[1] == COMMIT and file[2] in self.server.files.keys() - self.server.lost:
            self.send_file(file[2])
        else:
            problem = "RevisionNotFound" if "/team/quokka/" in path else "RepoNotFound"
            self.head(404, X_Error_Code=problem)

    def list_folder(self, folder):
        names = [name for name in self.server.files if name.startswith(folder and folder + "/")]
        if names:
            self.answer_json([self.server.entry(name) for name in names])
        else:
            self.head(404, X_Error_Code="EntryNotFound")

    def send_file(self, name):
        hub, content = self.server, self.server.files[name]
        is_failing = self.command == "GET" and hub.failures.get(name, 0) > 0
        if is_failing:
            hub.failures[name] -= 1
        if is_failing and name not in hub.wrong:
            return self.head(500)
        if name in hub.wrong and (is_failing or name not in hub.failures):
            content = b"x" * len(content)
        match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        hub.requests.append((self.command, name, start))
        headers = dict(ETag=f'"{hub.digest(name)}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(206 if start else 200, len(content) - start, **headers)
        if self.command == "HEAD":
            return
        if name in hub.slow:
            half = len(content) // 2
            self.wfile.write(content[:half])
            hub.slow[name].wait(60)
            content = content[half:]
        end = hub.breaks.pop(name, len(content)) if start == 0 else len(content)
        self.wfile.write(content[start:end])
        self.close_connection = end < len(content)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        assert self.path.endswith(f"/paths-info/{COMMIT}")
        names = [name for name in parse_qs(body)["paths"] if name in self.server.files]
        self.answer_json([self.server.entry(name) for name in names])


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    server.files = {
        "README.md": b"# quokkas\n", LARGE: bytes(range(256)) * 100_000, MEDIUM: b"meta" * 500, SMALL: b"10",
        "batch_size10/b.bin": b"other" * 1000}
    api = functools.partial(huggingface_hub.HfApi, endpoint=server.url)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    yield server
    server.shutdown()


def arguments(tmp_path, *flags, repo="team/quokka"):
    return ["download", repo, f"--out={tmp_path / 'got'}", *flags]


def download(tmp_path, *flags, **options):
    """The command in this process: (exit code, stdout, stderr)."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            with mock.patch.object(sys, "argv", ["convert.py", *arguments(tmp_path, *flags, **options)]):
                convert.main()
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def download_ok(tmp_path, *flags, **options):
    """A download that succeeds; returns stdout."""
    code, out, err = download(tmp_path, *flags, **options)
    assert code == 0, err
    return out


def failure(tmp_path, *flags, **options):
    """The one line with which a download fails."""
    code, _, err = download(tmp_path, *flags, **options)
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


def start(hub, tmp_path, *flags):
    """The command as a process of its own."""
    env = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"),
           "HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
    command = [sys.executable, ROOT / "convert.py", *arguments(tmp_path, *flags)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts_in(tmp_path):
    """Files that are incomplete."""
    return set((tmp_path / "got/.cache").rglob("*.incomplete"))


def test_one_folder_and_nothing_else(hub, tmp_path):
    """batch_size1 is not batch_size10, though it begins so. Complete files are not asked for again."""
    out = download_ok(tmp_path, "--folder=batch_size1")
    got = {path.relative_to(tmp_path / "got").as_posix(): path.read_bytes()
           for path in (tmp_path / "got").rglob("*") if path.is_file() and ".cache" not in path.parts}
    assert got == {name: content for name, content in hub.files.items() if name.startswith("batch_size1/")}
    assert "3 files" in out and "checked" in out
    hub.requests.clear()
    download_ok(tmp_path, "--folder=/batch_size1/")
    assert not hub.requests
    download_ok(tmp_path, "--folder=batch_size1", "--revision=v1", repo="datasets/team/quokka")
    assert "1 files" in download_ok(tmp_path, "--folder=batch_size10/b.bin")
    assert (tmp_path / "got/batch_size10/b.bin").read_bytes() == b"other" * 1000


def test_a_broken_connection_is_resumed(hub, tmp_path):
    hub.breaks[LARGE] = 22_000_000
    download_ok(tmp_path, "--folder=batch_size1/a")
    assert (tmp_path / "got" / LARGE).read_bytes() == hub.files[LARGE]
    starts = [start for method, name, start in hub.requests if method == "GET" and name == LARGE]
    assert starts[0] == 0 and len(starts) == 2 and 10_000_000 < starts[1] <= 22_000_000


def test_ctrl_c_ends_it_at_once(hub, tmp_path):
    """Not waiting for what is being downloaded, and leaving nothing that the next start can't use."""
    notes = tmp_path / "got/.cache/huggingface/download/batch_size1"
    notes.mkdir(parents=True)
    digests = ("0" * 64, hub.digest(LARGE), hub.digest(LARGE))
    parts = [notes / f"x.{digest}.{i}abcdef0.incomplete" for i, digest in enumerate(digests)]
    for path in parts:
        path.write_bytes(b"part")
    other_file, other_process, killed_process = parts
    os.utime(killed_process, (0, 0))
    hub.slow[LARGE] = threading.Event()
    process, end = start(hub, tmp_path, "--folder=batch_size1"), time.monotonic() + 60
    while not ((tmp_path / "got" / SMALL).exists() and len(parts_in(tmp_path)) == 3):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    error = process.stderr.read()
    assert "start again to go on" in error and "Traceback" not in error, error
    assert parts_in(tmp_path) == {other_file, other_process} and not (tmp_path / "got" / LARGE).exists()
    hub.slow.pop(LARGE).set()
    hub.requests.clear()
    download_ok(tmp_path, "--folder=batch_size1")
    assert (tmp_path / "got" / LARGE).read_bytes() == hub.files[LARGE]
    assert SMALL not in {name for _, name, _ in hub.requests}


def test_a_file_that_cant_be_had(hub, tmp_path):
    """It is named; what was on its way arrives, and nothing else is begun."""
    hub.files = {name: hub.files[name] for name in (MEDIUM, LARGE, SMALL)}
    hub.lost, hub.slow[LARGE] = {MEDIUM}, threading.Event()
    threading.Timer(2, hub.slow[LARGE].set).start()
    error = failure(tmp_path, "--folder=batch_size1", "--workers=1")
    assert MEDIUM in error and "404" in error
    assert (tmp_path / "got" / LARGE).read_bytes() == hub.files[LARGE] and not parts_in(tmp_path)
    assert SMALL not in {name for _, name, _ in hub.requests}


def test_what_goes_wrong_once_is_tried_again(hub, tmp_path):
    hub.failures, hub.wrong = {SMALL: 1, MEDIUM: 1}, {MEDIUM}
    download_ok(tmp_path, "--folder=batch_size1")
    assert hub.failures == {SMALL: 0, MEDIUM: 0}
    assert all((tmp_path / "got" / name).read_bytes() == hub.files[name] for name in (SMALL, MEDIUM))


def test_another_checksum_is_refused(hub, tmp_path):
    for name in (SMALL, MEDIUM):
        hub.wrong = {name}
        shutil.rmtree(tmp_path / "got", ignore_errors=True)
        error = failure(tmp_path, "--folder=batch_size1", "--tries=2")
        assert name in error and "checksum" in error
        assert not (tmp_path / "got" / name).exists()
    hub.wrong = set()
    download_ok(tmp_path, "--folder=batch_size1")
    (tmp_path / "got" / MEDIUM).write_bytes(b"teta" * 500)  # damaged later: of the same length
    download_ok(tmp_path, "--folder=batch_size1")
    assert (tmp_path / "got" / MEDIUM).read_bytes() == hub.files[MEDIUM]


def test_a_name_that_leads_outside_is_refused(hub, tmp_path):
    (tmp_path / "victim.txt").write_text("mine", encoding="utf-8")
    hub.files["../victim.txt"] = b"theirs"
    assert "../victim.txt" in failure(tmp_path)
    assert (tmp_path / "victim.txt").read_text(encoding="utf-8") == "mine" and not (tmp_path / "got").exists()


def test_files_of_ones_own_are_not_overwritten(hub, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got/README.md").write_text("mine", encoding="utf-8")
    assert "nothing is overwritten" in failure(tmp_path)
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["README.md"]
    assert (tmp_path / "got/README.md").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("flags, repo, message", (
    (["--folder=nothing"], "team/quokka", "no files in nothing"), ([], "team/koala", "no such repository"),
    (["--revision=v9"], "team/quokka", "no revision v9"), ([], "quokka", "OWNER/NAME")))
def test_what_is_not_there(hub, tmp_path, flags, repo, message):
    assert message in failure(tmp_path, *flags, repo=repo)


def test_a_hub_that_does_not_answer(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    assert "can't be listed" in failure(tmp_path)
