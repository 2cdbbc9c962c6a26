"""`convert.py download` against a hub of our own: resumed, filtered, checked."""

import hashlib
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
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """The few answers of a Hugging Face hub that a download needs. Files above 1000 bytes are large ones."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked, self.wrong, self.lost = {}, [], set(), set()
        self.breaks = {}  # path: bytes after which the connection is cut, once
        self.broken = {}  # path: how often it is answered with an error, or, where it is named in `wrong`, with something else
        self.slow = {}  # path: an event, for which it waits in the middle
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def digest(self, path):
        content = self.files[path]
        return hashlib.sha256(content).hexdigest() if len(content) > 1000 else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", headers.get("Length", len(body)))
        self.end_headers()
        return body

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, unquote(urlparse(self.path).path)
        revision = re.fullmatch(r"/api/(models|datasets)/team/quokka/revision/([^/]+)", path)
        listing = re.fullmatch(r"/api/(models|datasets)/team/quokka/tree/([^/]+)/?(.*)", path)
        file = re.fullmatch(r"(?:/datasets)?/team/quokka/resolve/([^/]+)/(.+)", path)
        if revision and revision[2] in ("main", "v1", COMMIT):
            self.wfile.write(self.answer(200, json.dumps(dict(id="team/quokka", sha=COMMIT)).encode(), Content_Type="application/json"))
        elif listing and listing[2] == COMMIT:
            inside = [name for name in hub.files if name.startswith(listing[3] and listing[3] + "/")]
            if inside:
                self.wfile.write(self.answer(200, json.dumps([self.entry(name) for name in inside]).encode(), Content_Type="application/json"))
            else:
                self.answer(404, X_Error_Code="EntryNotFound")
        elif file and file[1] == COMMIT and file[2] in hub.files.keys() - hub.lost:
            name, content = file[2], hub.files[file[2]]
            failing = self.command == "GET" and hub.broken.get(name, 0) > 0
            if failing:
                hub.broken[name] -= 1
            if failing and name not in hub.wrong:
                return self.answer(500)
            if name in hub.wrong and (failing or name not in hub.broken):
                content = b"x" * len(content)
            start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
            hub.asked.append((self.command, name, start))
            headers = dict(ETag=f'"{hub.digest(name)}"', X_Repo_Commit=COMMIT, Accept_Ranges="bytes", Length=len(content) - start)
            if start:
                headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.answer(206 if start else 200, **headers)
            if self.command == "GET":
                if name in hub.slow:
                    self.wfile.write(content[: len(content) // 2])
                    hub.slow[name].wait(60)
                    content = content[len(content) // 2 :]
                end = hub.breaks.pop(name, len(content)) if start == 0 else len(content)
                self.wfile.write(content[start:end])
                self.close_connection = end < len(content)
        else:
            self.answer(404, X_Error_Code="RevisionNotFound" if "/team/quokka/" in path else "RepoNotFound")

    def do_POST(self):
        paths = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        assert self.path.endswith(f"/paths-info/{COMMIT}")
        self.wfile.write(self.answer(200, json.dumps([self.entry(name) for name in paths if name in self.server.files]).encode(), Content_Type="application/json"))

    def entry(self, name):
        content, digest = self.server.files[name], self.server.digest(name)
        large = dict(lfs=dict(oid=digest, size=len(content), pointerSize=130)) if len(content) > 1000 else {}
        return dict(type="file", path=name, size=len(content), oid=digest[:40], **large)


@pytest.fixture
def hub():
    server = Hub()
    block = bytes(range(256)) * 100_000  # 25 MB: huggingface_hub writes 10 at a time
    server.files = {"README.md": b"# quokkas\n", "batch_size1/a/iter_0000010/__0_0.distcp": block, "batch_size1/a/iter_0000010/.metadata": b"meta" * 500,
                    "batch_size1/a/latest_checkpointed_iteration.txt": b"10", "batch_size10/b.bin": b"other" * 1000}
    yield server
    server.shutdown()


def start(hub, tmp_path, *flags, repo="team/quokka"):
    env = {"PATH": "/usr/bin:/bin", "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5"}
    command = [sys.executable, ROOT / "convert.py", "download", repo, f"--out={tmp_path / 'got'}", *flags]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def download(hub, tmp_path, *flags, **options):
    process = start(hub, tmp_path, *flags, **options)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_one_folder_and_nothing_else(hub, tmp_path):
    """A folder's name is no prefix: batch_size1 is not batch_size10. What is there and whole is not asked for again."""
    code, out, err = download(hub, tmp_path, "--folder=batch_size1")
    assert code == 0, err
    got = {p.relative_to(tmp_path / "got").as_posix(): p.read_bytes() for p in (tmp_path / "got").rglob("*") if p.is_file() and ".cache" not in p.parts}
    assert got == {name: content for name, content in hub.files.items() if name.startswith("batch_size1/")}
    assert "3 files" in out and "checked" in out
    hub.asked.clear()
    assert download(hub, tmp_path, "--folder=/batch_size1/")[0] == 0 and not hub.asked
    assert download(hub, tmp_path, "--folder=batch_size1", "--revision=v1", repo="datasets/team/quokka")[0] == 0
    code, out, err = download(hub, tmp_path, "--folder=batch_size10/b.bin")
    assert code == 0 and "1 files" in out and (tmp_path / "got/batch_size10/b.bin").read_bytes() == b"other" * 1000, err


def test_a_broken_connection_is_resumed(hub, tmp_path):
    large = "batch_size1/a/iter_0000010/__0_0.distcp"
    hub.breaks[large] = 22_000_000
    code, _, err = download(hub, tmp_path, "--folder=batch_size1/a")
    assert code == 0, err
    assert (tmp_path / "got" / large).read_bytes() == hub.files[large]
    starts = [start for method, name, start in hub.asked if method == "GET" and name == large]
    assert starts[0] == 0 and len(starts) == 2 and 10_000_000 < starts[1] <= 22_000_000


def test_ctrl_c_ends_it_at_once(hub, tmp_path):
    """Not waiting for what is being downloaded, and leaving nothing that the next start can't use."""
    large, small = "batch_size1/a/iter_0000010/__0_0.distcp", "batch_size1/a/latest_checkpointed_iteration.txt"
    known = tmp_path / "got/.cache/huggingface/download/batch_size1"
    known.mkdir(parents=True)
    others, running, killed = (known / f"x.{digest}.{i}abcdef0.incomplete" for i, digest in enumerate(("0" * 64, hub.digest(large), hub.digest(large))))
    for path in (others, running, killed):
        path.write_bytes(b"part")
    os.utime(killed, (0, 0))
    hub.slow[large] = threading.Event()
    process, end = start(hub, tmp_path, "--folder=batch_size1"), time.monotonic() + 60
    while not ((tmp_path / "got" / small).exists() and len(list((tmp_path / "got/.cache").rglob("*.incomplete"))) == 3):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    err = process.stderr.read()
    assert "start again to go on" in err and "Traceback" not in err, err
    assert set((tmp_path / "got/.cache").rglob("*.incomplete")) == {others, running} and not (tmp_path / "got" / large).exists()  # another download's stay
    hub.slow.pop(large).set()
    hub.asked.clear()
    assert download(hub, tmp_path, "--folder=batch_size1")[0] == 0 and (tmp_path / "got" / large).read_bytes() == hub.files[large]
    assert small not in {name for _, name, _ in hub.asked}


def test_a_file_that_cant_be_had(hub, tmp_path):
    """It is named; what was on its way arrives, and nothing else is begun."""
    lost, large, others = "batch_size1/a/iter_0000010/.metadata", "batch_size1/a/iter_0000010/__0_0.distcp", "batch_size1/a/latest_checkpointed_iteration.txt"
    hub.files = {name: hub.files[name] for name in (lost, large, others)}
    hub.lost, hub.slow[large] = {lost}, threading.Event()
    threading.Timer(8, hub.slow[large].set).start()
    code, _, err = download(hub, tmp_path, "--folder=batch_size1", "--workers=1")
    assert code == 2 and lost in err and "404" in err and len(err.strip().splitlines()) == 1, err
    assert (tmp_path / "got" / large).read_bytes() == hub.files[large] and not list((tmp_path / "got/.cache").rglob("*.incomplete"))
    assert others not in {name for _, name, _ in hub.asked}


def test_what_goes_wrong_once_is_tried_again(hub, tmp_path):
    small, large = "batch_size1/a/latest_checkpointed_iteration.txt", "batch_size1/a/iter_0000010/.metadata"
    hub.broken, hub.wrong = {small: 1, large: 1}, {large}
    code, _, err = download(hub, tmp_path, "--folder=batch_size1")
    assert code == 0 and hub.broken == {small: 0, large: 0}, err
    assert all((tmp_path / "got" / name).read_bytes() == hub.files[name] for name in (small, large))


def test_another_checksum_is_refused(hub, tmp_path):
    small, large = "batch_size1/a/latest_checkpointed_iteration.txt", "batch_size1/a/iter_0000010/.metadata"
    for name in (small, large):
        hub.wrong = {name}
        shutil.rmtree(tmp_path / "got", ignore_errors=True)
        code, _, err = download(hub, tmp_path, "--folder=batch_size1", "--tries=2")
        assert code == 2 and name in err and "checksum" in err and len(err.strip().splitlines()) == 1, err
        assert not (tmp_path / "got" / name).exists()
    hub.wrong = set()
    assert download(hub, tmp_path, "--folder=batch_size1")[0] == 0
    (tmp_path / "got" / large).write_bytes(b"teta" * 500)  # damaged later: of the same length
    assert download(hub, tmp_path, "--folder=batch_size1")[0] == 0 and (tmp_path / "got" / large).read_bytes() == hub.files[large]


def test_a_name_that_leads_outside_is_refused(hub, tmp_path):
    (tmp_path / "victim.txt").write_text("mine")
    hub.files["../victim.txt"] = b"theirs"
    code, _, err = download(hub, tmp_path)
    assert code == 2 and "../victim.txt" in err and (tmp_path / "victim.txt").read_text() == "mine" and not (tmp_path / "got").exists()


def test_files_of_ones_own_are_not_overwritten(hub, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got/README.md").write_text("mine")
    code, _, err = download(hub, tmp_path)
    assert code == 2 and "nothing is overwritten" in err and [p.name for p in (tmp_path / "got").iterdir()] == ["README.md"] and (tmp_path / "got/README.md").read_text() == "mine"


def test_what_is_not_there(hub, tmp_path):
    for flags, repo, said in ((["--folder=nothing"], "team/quokka", "no files in nothing"), ([], "team/koala", "no such repository"),
                              (["--revision=v9"], "team/quokka", "no revision v9"), ([], "quokka", "OWNER/NAME")):
        code, _, err = download(hub, tmp_path, *flags, repo=repo)
        assert code == 2 and said in err and len(err.strip().splitlines()) == 1, err
    hub.shutdown()
    hub.server_close()
    code, _, err = download(hub, tmp_path)
    assert code == 2 and "can't be listed" in err and "Traceback" not in err, err
