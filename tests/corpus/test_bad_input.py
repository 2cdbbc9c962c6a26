"""What is wrong with the text: it is named, left out or replaced. And disks that are full."""

import errno
import gzip
import itertools
import json
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, prepared
from corpus_examples import stories, write_jsonl
from preparations import ONE_OF_EACH, by_split, contents, stop_after_commit, task_size, texts_in
from source_examples import compressed, jsonl, write_parquet, write_txt

from corpus import tokenizers, writer

# -------------------------------------------------------------------------------------------- not UTF-8


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("layout", ["alone", "folder", "separated"])
def test_non_utf8_text_names_file_and_byte(data_refuses, tmp_path, ending, layout):
    (tmp_path / "in").mkdir()
    argv = [f"in/bad.txt{ending}"]
    if layout == "folder":
        write_txt(tmp_path / "in" / "good.txt", "good")
        argv = ["in"]
    if layout == "separated":
        argv.append("--separator=s\\n")
    for at in (5, 13_000):  # and beyond the first task
        raw = bytearray(b"some words\n" * 1300)
        raw[at] = 0xFF
        (tmp_path / "in" / f"bad.txt{ending}").write_bytes(compressed(ending, bytes(raw)))
        with task_size(10_000):
            data_refuses(*argv, message=f"in/bad.txt{ending}: not UTF-8 at byte {at}; see --bad_bytes")


def test_non_utf8_text_beyond_the_first_mib(data_refuses, tmp_path):
    raw = bytearray(b"some words\n" * 130_000)
    raw[1_300_000] = 0xFF
    (tmp_path / "bad.txt").write_bytes(raw)
    data_refuses("bad.txt", message="bad.txt: not UTF-8 at byte 1300000; see --bad_bytes")


def test_non_utf8_record_names_file_and_line(data_refuses, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(jsonl(stories(300)) + b'{"text": "\xe9"}\n')
    with task_size(10_000):
        data_refuses("x.jsonl", message="x.jsonl:301: not UTF-8 at byte 10 of the line; see --bad_bytes")


def test_non_utf8_in_parquet_names_file_and_record(run_data, data_refuses, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = [text.encode() for text in stories(9)] + [b"caf\xe9"]
    texts = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "x.parquet")
    data_refuses("x.parquet", message="x.parquet, record 10: not UTF-8 at byte 3; see --bad_bytes")
    for choice, last in (("skip", []), ("replace", ["caf\ufffd"])):
        code, _, err = run_data("x.parquet", f"--bad_bytes={choice}", f"--name={choice}", "--val=0.3")
        assert code == 0 and texts_in(f"corpora/{choice}") == by_split(stories(9) + last, 0.3), err


def write_bad_texts(folder, layout):
    """(texts, arguments): stories(20), of which 3 has a wrong byte, and 5 ends inside a character."""
    raw = [text.encode() for text in stories(20)]
    raw[3] = raw[3].replace(b"about", b"ab\xffut")
    raw[5] = raw[5] + "🙂".encode()[:3]
    if layout == "folder":
        (folder / "in").mkdir()
        for i, text in enumerate(raw):
            (folder / "in" / f"{i:03}.txt").write_bytes(text)
        return raw, ["in"]
    if layout == "separated":
        (folder / "x.txt").write_bytes(b"%%".join(raw))
        return raw, ["x.txt", "--separator=%%"]
    lines = [b'{"text": "' + text.replace(b"\n", b"\\n") + b'"}\n' for text in raw]
    (folder / "x.jsonl").write_bytes(b"".join(lines))
    return raw, ["x.jsonl"]


@pytest.mark.parametrize("size", [20, 1 << 20])
@pytest.mark.parametrize("layout", ["folder", "separated", "jsonl"])
def test_bad_bytes_are_skipped_or_replaced(run_data, tmp_path, layout, size):
    raw, argv = write_bad_texts(tmp_path, layout)
    with task_size(size):
        code, printed, err = run_data(*argv, "--val=0.3", "--bad_bytes=skip", "--name=skip")
        assert code == 0 and printed.endswith("left out: 2 undecodable\n") and "replaced" not in printed, err
        good = [text for i, text in enumerate(stories(20)) if i not in (3, 5)]
        assert texts_in("corpora/skip") == by_split(good, 0.3)
        code, printed, err = run_data(*argv, "--val=0.3", "--bad_bytes=replace", "--name=replace")
    assert code == 0 and "left out" not in printed, err
    assert printed.endswith("replaced: bytes that are no UTF-8, in 2 places\n")
    assert json.loads(Path("corpora/replace/meta.json").read_text(encoding="utf-8"))["replaced"] == 2
    assert texts_in("corpora/replace") == by_split([text.decode("utf-8", "replace") for text in raw], 0.3)


@pytest.mark.parametrize("layout", ["alone", "folder"])
def test_replaced_bytes_of_a_large_text_are_counted(fast_path, layout):
    """Once each, in pieces of any size and after an interruption; what was U+FFFD before does not count."""
    text, folder = "\n".join(stories(30)).encode(), fast_path / "in"
    folder.mkdir()
    raw = text + b"\n\xef\xbf\xbd and \xff\xff, \xe4\xb8\n" + text + b"\x80"
    (folder / "x.txt").write_bytes(raw)
    for i, other in enumerate(ONE_OF_EACH):
        write_txt(folder / f"{i}.txt", other)
    source = folder / "x.txt" if layout == "alone" else folder
    for size in (20, 200, 1 << 20):
        out = fast_path / str(size)
        with task_size(size):
            if size < 1000:
                with stop_after_commit(6), pytest.raises(KeyboardInterrupt):
                    prepared(out, source, val=0.5, bad_bytes="replace")
            assert prepared(out, source, val=0.5, bad_bytes="replace")["replaced"] == 4
        assert contents(out) == contents(fast_path / "20")


def test_skip_leaves_nothing_of_a_single_text(data_refuses, tmp_path):
    (tmp_path / "x.txt").write_bytes(b"abc\xff" * 9)
    data_refuses("x.txt", "--bad_bytes=skip",
                 message="x.txt: not UTF-8 at byte 3; a single text cannot be skipped: --bad_bytes=replace, "
                         "or cut it into documents with --separator=")
    data_refuses("x.txt", message="x.txt: not UTF-8 at byte 3; see --bad_bytes")


def test_skipping_records_does_not_skip_bad_bytes(run_data, data_refuses, tmp_path):
    """Nor the other way round."""
    _, argv = write_bad_texts(tmp_path, "jsonl")
    data_refuses(*argv, "--bad_records=skip", message="x.jsonl:4: not UTF-8")
    write_jsonl(tmp_path / "y.jsonl", stories(9)).open("a", encoding="utf-8").write("{\n")
    data_refuses("y.jsonl", "--bad_bytes=skip", message="y.jsonl:10: not JSON")
    _, argv = write_bad_texts(tmp_path, "folder")
    assert run_data(*argv, "--bad_bytes=skip", "--name=ok")[0] == 0
    assert (
        json.loads(Path("corpora/ok/meta.json").read_text(encoding="utf-8"))["left_out"]["undecodable"]
        == 2
    )


# ---------------------------------------------------------------------------------------------- records

MANY_FIELDS = json.dumps(dict.fromkeys(map(str, range(99)))).encode()
BAD_RECORDS = {
    "cut": (b'{"text": ', "not JSON"),
    "field": (b'{"txt": "a", "id": 1}', "no field 'text'; there are txt, id; name the text's with --field"),
    "fields": (b"{}", "no field 'text'; there are none; name the text's with --field"),
    "odd": (rb'{"a\nb": 1, "\ud800": 2}', r"no field 'text'; there are 'a\nb', '\ud800'; name"),
    "many": (MANY_FIELDS, "no field 'text'; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, …; name"),
    "list": (b'["text"]', "no field 'text'"),
    "string": (b'"text"', "no field 'text'"),
    "number": (b"7", "no field 'text'"),
    "null": (b"null", "no field 'text'"),
    "type": (b'{"text": 7}', "field 'text' is not text"),
    "none": (b'{"text": null}', "field 'text' is not text"),
    "surrogate": (rb'{"text": "\ud800"}', "field 'text' holds half a character"),  # as JSON, not UTF-8, can
    "surrogates": (rb'{"text": "a\udc00\ud83db"}', "field 'text' holds half a character"),
    "integer": (b'{"id": ' + b"9" * 5000 + b', "text": "a"}', "not JSON"),  # Python refuses such integers
    "deep": (b"[" * 100_000, "not JSON"),
    "two": (b'{"text": "a"} {"text": "b"}', "not JSON"),
    "control": (b'{"text": "a\tb"}\0', "not JSON"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_name_file_and_line_or_are_counted(run_data, data_refuses, tmp_path, name):
    line, message = BAD_RECORDS[name]
    raw = b'{"text": "one"}\n\n{"text": "two"}\n' + line + b"\n" + jsonl(stories(20))
    (tmp_path / "x.jsonl").write_bytes(raw)
    with task_size(20):
        data_refuses("x.jsonl", message="x.jsonl:4: " + message)
        code, printed, err = run_data("x.jsonl", "--val=0.3", "--bad_records=skip")
    assert code == 0 and printed.endswith("left out: 1 malformed\n"), err
    assert texts_in("corpora/x") == by_split(["one", "two", *stories(20)], 0.3)


def test_bad_records_in_another_process(tmp_path):
    """What a process that tokenizes finds is told by the first one, in one line."""
    source = write_jsonl(tmp_path / "x.jsonl", stories(9))
    source.open("a", encoding="utf-8").write("{\n")
    argv = [sys.executable, ROOT / "data.py", source, "--workers=2"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(rf"data\.py: {source}:10: not JSON: [^\n]*\n", done.stderr), done.stderr
    assert not (tmp_path / "corpora").exists()


def test_parquet_records_that_are_no_text(run_data, data_refuses, tmp_path):
    write_parquet(tmp_path / "x.parquet", [*stories(20), None])
    data_refuses("x.parquet", message="x.parquet, record 21: its text is not text; "
                                      "--bad_records=skip leaves such records out")
    code, printed, _ = run_data("x.parquet", "--bad_records=skip", "--val=0.3")
    assert code == 0 and printed.endswith("left out: 1 malformed\n")
    assert texts_in("corpora/x") == by_split(stories(20), 0.3)


@pytest.mark.parametrize("name, raw, message", [
    ("x.txt", b"", "x.txt: no text for the train split; use more text or another --val"),
    ("x.txt.gz", gzip.compress(b"", mtime=0), "x.txt.gz: no text for the train split"),
    ("x.jsonl", b"", "x.jsonl: no text for the train split"),
    ("x.jsonl", b"\n \n\n", "x.jsonl: no text for the train split"),
    ("x.jsonl", jsonl(["", "", ""]),
     "x.jsonl: no text for the train split (left out: 3 empty); use more text or another --val"),
    ("x.jsonl", jsonl(["only one"]), "x.jsonl: no text for the val split"),
    ("x.jsonl", jsonl(["only one"] * 4), "no text for the val split (left out: 3 duplicates)"),
    ("-", b"", "stdin.txt: no text for the train split"),
])
def test_too_little_text(data_refuses, tmp_path, name, raw, message):
    if name != "-":
        (tmp_path / name).write_bytes(raw)
    data_refuses(name, message=message, stdin=raw)


# -------------------------------------------------------------------------------------------- full disk


@pytest.mark.parametrize("name, limit", [
    ("x.jsonl", 0), ("x.jsonl", 1000), ("x.jsonl", 20_000), ("x.jsonl", 100_000), ("-", 1000)])
def test_full_disk(tmp_path, name, limit):
    """No file may grow beyond `limit`: whatever is written first fails, in one line, and nothing stays."""
    source = write_jsonl(tmp_path / "x.jsonl", stories(4000))
    argv = [sys.executable, ROOT / "data.py", name, "--workers=1", "--format=jsonl"]
    with open(source, encoding="utf-8") as stdin:
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, stdin=stdin,
                              env=os.environ | dict(PYTHONDONTWRITEBYTECODE="1"),
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and re.fullmatch(r"data\.py: [^\n]+\n", done.stderr), done.stderr
    assert not (tmp_path / "corpora").exists() or not list((tmp_path / "corpora").iterdir())


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
FULL_DATABASE = sqlite3.OperationalError("database or disk is full")


@pytest.mark.parametrize("owner, name, problem, n_calls", [  # n_calls: that it takes at least
    (writer, "sync_to_disk", NO_SPACE, 4),
    (writer.ShardWriter, "write", NO_SPACE, 11),
    (writer.Ledger, "commit", FULL_DATABASE, 2),
    (writer.Ledger, "add", FULL_DATABASE, 11),
    (tokenizers.ByteTokenizer, "token_bytes", NO_SPACE, 1),  # the last file that is written
], ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("after", [0, 1, 3, 10])
def test_full_disk_at_any_write(run_data, data_refuses, tmp_path, owner, name, problem, n_calls, after):
    write_jsonl(tmp_path / "x.jsonl", stories(40))
    real, count = getattr(owner, name), itertools.count()

    def fail(*arguments, **options):
        if next(count) == after:
            raise problem
        return real(*arguments, **options)

    if after < n_calls:
        message = "disk is full" if problem is FULL_DATABASE else "No space left on device"
        with task_size(100), mock.patch.object(owner, name, fail):
            data_refuses("x.jsonl", message=message)
    assert run_data("x.jsonl")[0] == 0  # and the name is free again


def test_full_disk_at_standard_input(run_data, data_refuses):
    argv, stdin = ["-", "--format=jsonl"], jsonl(stories(40))
    with mock.patch.object(shutil, "copyfileobj", mock.Mock(side_effect=NO_SPACE)):
        data_refuses(*argv, stdin=stdin, message="No space left on device")
    assert run_data(*argv, stdin=stdin)[0] == 0  # and the name is free again
