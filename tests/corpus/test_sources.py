"""Sources of every kind: the documents in them, and what is damaged or missing."""

import contextlib
import http.server
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, prepared
from corpus_examples import quick, stories, write_jsonl
from hypothesis import example, given
from hypothesis import strategies as st
from preparations import by_split, task_size, texts_in
from source_examples import (
    FORMATS,
    TEXTS,
    as_dataset,
    as_pattern,
    compressed,
    jsonl,
    write_folder,
    write_parquet,
    write_txt,
)

from corpus import fetch, prepare, sources, tasks, workers

FORMAT_NAMES = [f"{write.__name__[3:]} {variant}".strip() for write, variant in FORMATS]


@pytest.mark.parametrize("write, variant", FORMATS, ids=FORMAT_NAMES)
def test_every_format_gives_the_same_documents(tmp_path, offline, write, variant):
    names, settings = write(tmp_path, variant, TEXTS)
    meta = prepared(tmp_path / "out", *names, val=0.3, workers=1, **settings)
    expected = TEXTS
    if write is as_pattern:  # the first pattern's files come first
        expected = [text for i, text in enumerate(TEXTS) if i % 10 < 5] + TEXTS
    assert texts_in(tmp_path / "out") == by_split(expected, 0.3)
    assert meta["left_out"] == dict(duplicates=1, empty=1, undecodable=0, malformed=0)
    assert meta["replaced"] == 0


def test_docs_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    """As in the repository itself; the folder is ./docs."""
    monkeypatch.chdir(tmp_path)
    write_folder(Path("docs"), stories(2))
    kinds = {name: [source.kind for source in sources.find_sources([name], prepare.Config())]
             for name in ("docs", "./docs", "docs/")}
    assert kinds == {"docs": ["docs"], "./docs": ["txt", "txt"], "docs/": ["txt", "txt"]}


def test_hidden_files_and_folders_are_left_out(tmp_path):
    folder = write_folder(tmp_path / ".data", stories(20))
    for name in (".git/config", "sub/.cache/x.txt", ".x.txt", "sub/.y"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_txt(folder / name, "not this")
    for kind in ("auto", "txt"):
        prepared(tmp_path / kind, folder, val=0.3, format=kind)
        assert texts_in(tmp_path / kind) == by_split(stories(20), 0.3)


def test_empty_files_and_tables(run_data, data_refuses, tmp_path):
    write_parquet(tmp_path / "x.parquet", ["a"][:0])
    write_folder(tmp_path / "in", ["", ""])
    data_refuses("x.parquet", message="x.parquet: no text for the train split")
    data_refuses("in", message="000.txt, 001.txt: no text for the train split (left out: 2 empty)")
    write_jsonl(tmp_path / "x.jsonl", ["", *stories(20), ""])
    code, printed, _ = run_data("in", "x.parquet", "x.jsonl", "--val=0.3")
    assert code == 0 and printed.endswith("left out: 4 empty\n")
    assert texts_in("corpora/in") == by_split(stories(20), 0.3)


@quick
@given(st.lists(st.text(st.sampled_from("ab\n"), max_size=6), min_size=1, max_size=9),
       st.sampled_from(["\n\n", "\n", "aba", "b"]), st.integers(1, 9))
@example(["a", "\nb", "", "\nc"], "\n\n", 4)
def test_separators_are_found_from_left_to_right(scratch, texts, separator, size):
    """Also those that can overlap, wherever the tasks end; a separator at the end opens no document."""
    text = separator.join(texts)
    cfg = prepare.Config(separator=separator, dedup=False)
    found = sources.find_sources([str(write_txt(scratch / "separated.txt", text))], cfg)
    with task_size(size):
        work = tasks.make_tasks(found, tasks.Place(), cfg)
        results = [result for result, _, _ in workers.tokenize_tasks(work, cfg, n_processes=0)]
    documents = [document for result in results for document in result.documents]
    ids = [np.frombuffer(document.tokens, np.uint16)[:-1] for document in documents]
    expected = text.split(separator)
    if not expected[-1]:
        expected = expected[:-1]
    assert [bytes(i.astype(np.uint8)).decode() for i in ids] == [text for text in expected if text]
    assert sum(result.left_out.get("empty", 0) for result in results) == expected.count("")


# ----------------------------------------------------------------------------------------- standard input


@pytest.mark.parametrize("argv, raw", [
    (["--format=jsonl"], jsonl(TEXTS)),
    ([r"--separator=\n%%\n"], "\n%%\n".join(TEXTS).encode()),
    (["--format=txt", r"--separator=\n%%\n"], "\n%%\n".join(TEXTS).encode()),
])
def test_standard_input(run_data, argv, raw):
    code, printed, err = run_data("-", "--val=0.3", *argv, stdin=raw)
    assert code == 0 and not err, err
    assert texts_in("corpora/stdin") == by_split(TEXTS, 0.3)
    assert [path.name for path in Path("corpora").iterdir()] == ["stdin"]
    assert "left out: 1 duplicates, 1 empty" in printed


def test_standard_input_of_a_process(tmp_path):
    argv = [sys.executable, ROOT / "data.py", "-", "--val=0.3", "--format=jsonl"]
    done = subprocess.run(argv, cwd=tmp_path, input=jsonl(TEXTS), capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert texts_in(tmp_path / "corpora/stdin") == by_split(TEXTS, 0.3)


def test_standard_input_beside_files(run_data, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", TEXTS[:5])
    argv = ["-", "x.jsonl", "--format=jsonl", "--val=0.3", "--name=both"]
    code, _, err = run_data(*argv, stdin=jsonl(TEXTS[5:]))
    assert code == 0, err
    assert texts_in("corpora/both") == by_split(TEXTS, 0.3)


# --------------------------------------------------------------------------------- packed files and tables


def test_zstandard_of_a_large_window(tmp_path):
    """As `zstd --long=31` writes them; so are the best known dumps of web forums."""
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    packing = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "x.jsonl.zst").write_bytes(packing.compress(jsonl(TEXTS)) + packing.flush())
    prepared(tmp_path / "out", tmp_path / "x.jsonl.zst", val=0.3)
    assert texts_in(tmp_path / "out") == by_split(TEXTS, 0.3)


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("layout", ["x.jsonl", "x.txt", "folder", "separated"])
def test_damaged_compressed_files(data_refuses, tmp_path, ending, layout):
    name = ("x.jsonl" if layout == "x.jsonl" else "x.txt") + ending
    argv = {"folder": ["other.txt"], "separated": ["--separator=id"]}.get(layout, [])
    write_txt(tmp_path / "other.txt", "some text")
    raw = jsonl([np.random.default_rng(i).bytes(100).hex() for i in range(200)])  # 40 kB that hardly shrink
    packed = compressed(ending, raw)
    variants = [packed[: len(packed) // 2], packed[:-1], raw, packed[:3], b"\0" * 9 + packed[9:]]
    if ending in (".gz", ".zst"):  # bzip2 and xz pass over what follows
        variants.append(packed + b"rubbish" * 9)
    for damaged in variants:
        (tmp_path / name).write_bytes(damaged)
        with task_size(2000):
            data_refuses(name, *argv, message=f"{name}: its compressed data are damaged or cut short (")


@pytest.mark.parametrize("rows", [1 << 20, 500])
def test_parquet_takes_little_memory(tmp_path, rows):
    """Whatever the size of the file and of its row groups."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    texts = [np.random.default_rng(i).bytes(2000).hex() for i in range(5000)]  # 20 MB that do not shrink
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=rows, use_dictionary=False)
    cfg, before, most, records = prepare.Config(), pyarrow.total_allocated_bytes(), 0, []
    for task, _, _ in tasks.make_tasks(sources.find_sources([str(path)], cfg), tasks.Place(), cfg):
        most = max(most, pyarrow.total_allocated_bytes() - before)
        records += task.content
    assert [text.decode() for text in records] == texts and most < 8e6


def test_parquet_files_that_are_none(data_refuses, tmp_path):
    raw = write_parquet(tmp_path / "x.parquet", stories(200)).read_bytes()
    data_refuses("x.parquet", "--field=body",
                 message="x.parquet: no column 'body'; there are id, text; name the text's with --field")
    variants = [b"", b"no parquet file", raw[:-20], raw[:100], raw[:4] + bytes(300) + raw[304:]]
    for i, damaged in enumerate(variants):
        (tmp_path / f"bad{i}.parquet").write_bytes(damaged)
        data_refuses(f"bad{i}.parquet", message=f"bad{i}.parquet: not a whole parquet file: ")


def test_datasets_that_are_none(data_refuses, tmp_path, offline):
    as_dataset(tmp_path, "of a dict", stories(9))
    data_refuses("saved", "--field=body",
                 message="hf:saved: no column 'body'; there are id, text; name the text's with --field")
    data_refuses("saved", "--hf_split=dev",
                 message="hf:saved: no split 'dev'; there are test, train; name one with --hf_split")
    data_refuses("hf:nobody/nothing", message="hf:nobody/nothing: ")


# ---------------------------------------------------------------------------------------------- downloads


@contextlib.contextmanager
def server(body, length):
    """The address of a local web server that promises `length` bytes and sends `body`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}/input.txt"
        listening.shutdown()
        thread.join()


def test_download_once(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with server(b"to be", 5) as url:
        path = fetch.download(url, tmp_path / "new" / "x.txt")
    assert path.read_bytes() == b"to be" and list(path.parent.iterdir()) == [path]
    assert fetch.download(url, path) == path  # the server is gone: nothing is fetched again
    with pytest.raises(OSError, match=f"cannot download {url}: .*save it as a .txt file"):
        fetch.download(url, tmp_path / "y.txt")


def test_interrupted_download_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with server(b"to be", 500) as url, pytest.raises(OSError, match="cannot download"):
        fetch.download(url, tmp_path / "x.txt")
    assert not list(tmp_path.iterdir())


def test_shakespeare(run_data, data_refuses, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    text = "To be, or not to be.\n" * 20
    with server(text.encode(), len(text)) as url:
        monkeypatch.setattr(fetch, "SHAKESPEARE", url)
        assert run_data("shakespeare")[0] == 0
    texts = texts_in("corpora/shakespeare")
    assert texts["train"][0] + texts["val"][0] == text
    shutil.rmtree("corpora/shakespeare")
    assert run_data("shakespeare")[0] == 0  # without its server
    shutil.rmtree("corpora")
    data_refuses("shakespeare", message="cannot download http://127.0.0.1")
