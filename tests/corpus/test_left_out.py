"""No text is left out without a word: links, endings, separators, marks, what is no file or can't be read."""

import contextlib
import gzip
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT, prepared
from corpus_examples import all_tokens, one_line, quick, stories, write_jsonl
from hypothesis import example, given
from hypothesis import strategies as st
from preparations import by_split, contents, task_size, texts_in
from source_examples import PACKED, compressed, jsonl, write_folder, write_parquet, write_txt

from corpus import prepare, sources, tasks, workers
from corpus.files import list_folder
from corpus.tokenfiles import load_corpus

MARK = b"\xef\xbb\xbf"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"7" * 64 + b"\nsize 135000\n"


# -------------------------------------------------------------------------------------- byte order marks


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("layout", ["jsonl", "separated", "alone", "folder"])
def test_a_mark_at_a_files_start_is_no_text(tmp_path, ending, layout):
    """48006ab refused the first line of such a .jsonl, and trained on the mark of a text."""
    raw = jsonl(stories(9)) if layout == "jsonl" else "%%".join(stories(9)).encode()
    settings = dict(val=0.3, separator="%%" if layout == "separated" else "")
    for name, mark in (("plain", b""), ("marked", MARK)):
        (tmp_path / name).mkdir()
        kind = "jsonl" if layout == "jsonl" else "txt"
        (tmp_path / name / f"x.{kind}{ending}").write_bytes(compressed(ending, mark + raw))
        if layout == "folder":
            write_txt(tmp_path / name / "y.txt", "another text\n" * 9)
        source = tmp_path / name if layout == "folder" else tmp_path / name / f"x.{kind}{ending}"
        with task_size(100):
            prepared(tmp_path / f"out {name}", source, **settings)
    plain, marked = (texts_in(tmp_path / f"out {name}") for name in ("plain", "marked"))
    if layout == "alone":  # where it is split moves with its length
        plain, marked = ("".join(texts["train"] + texts["val"]) for texts in (plain, marked))
    assert plain == marked


def test_a_mark_inside_a_record_is_text(tmp_path):
    texts = ["\ufeffone", "two\ufeff", "\ufeff", *stories(9)]
    write_parquet(tmp_path / "x.parquet", texts)
    for name, source in (("a", write_jsonl(tmp_path / "x.jsonl", texts)), ("b", tmp_path / "x.parquet")):
        prepared(tmp_path / name, source, val=0.3)
        assert texts_in(tmp_path / name) == by_split(texts, 0.3)


def test_only_a_mark_is_an_empty_text(data_refuses, tmp_path):
    for name in ("x.txt", "x.jsonl"):
        (tmp_path / name).write_bytes(MARK)
        data_refuses(name, message=f"{name}: no text for the train split")


# ------------------------------------------------------------------------------------ links, endings, kinds


@pytest.fixture
def linked(tmp_path):
    """A folder with links to a folder, to a file, to each other, to its own top, and to nothing."""
    write_folder(tmp_path / "elsewhere", stories(5, 10))
    write_txt(tmp_path / "single.txt", stories(1, 20)[0])
    write_folder(tmp_path / "in", stories(5))
    for name, target in (("more", "../elsewhere"), ("again", "../elsewhere"), ("one.txt", "../single.txt"),
                         ("top", "."), ("loop.txt", "loop.txt"), ("gone.txt", "/nowhere/gone.txt")):
        (tmp_path / "in" / name).symlink_to(target)
    return tmp_path / "in"


def test_links_are_followed(run_data, linked):
    """48006ab left out linked folders; each real one is read once, and dead links are named."""
    code, printed, err = run_data("in", "--val=0.3")
    assert code == 0 and "left out" not in printed
    texts = texts_in("corpora/in")
    expected = by_split(stories(5) + stories(5, 10) + stories(1, 20), 0.3)
    assert {split: set(found) for split, found in texts.items()} == {s: set(t) for s, t in expected.items()}
    assert "in/gone.txt is left out: a link to /nowhere/gone.txt, which is not there" in err
    assert "in/loop.txt is left out: a link to loop.txt, which is not there" in err
    assert [path.name for path in list_folder(linked, "**/000.txt")] == ["000.txt", "000.txt"]


@pytest.mark.parametrize("ending", PACKED)
def test_endings_in_any_case(tmp_path, ending):
    (tmp_path / "in").mkdir()
    raw = [compressed(ending, jsonl(stories(9))), compressed(ending, stories(1, 9)[0].encode())]
    for name, content in zip((f"A.JsonL{ending.upper()}", f"B.TXT{ending.upper()}"), raw):
        (tmp_path / "in" / name).write_bytes(content)
    prepared(tmp_path / "out", tmp_path / "in", val=0.3)
    assert texts_in(tmp_path / "out") == by_split(stories(10), 0.3)
    assert prepare.default_name([str(tmp_path / "in" / f"A.JsonL{ending.upper()}")]) == "A"
    damaged = tmp_path / "in" / f"A.JsonL{ending.upper()}"
    if ending:
        damaged.write_bytes(raw[0][:-1])
        with pytest.raises(ValueError, match="damaged or cut short"):
            prepared(tmp_path / "out2", damaged, val=0.3)


def test_files_of_other_kinds_are_counted(run_data, tmp_path):
    write_folder(tmp_path / "in", stories(20))
    for name in ("a.md", "b.md", "c.png", "LICENSE"):
        write_txt(tmp_path / "in" / name, "not this")
    os.mkfifo(tmp_path / "in/pipe.txt")
    code, _, err = run_data("in", "--val=0.3")
    assert code == 0 and "in: 4 of 24 files are left out, of other kinds (.md, .png, LICENSE)" in err
    assert "in/pipe.txt is left out: a pipe, which can be read only once" in err
    assert err.count("\n") == 2 and texts_in("corpora/in") == by_split(stories(20), 0.3)


def test_folders_that_match_a_pattern_are_named(run_data, tmp_path):
    write_folder(tmp_path / "in", stories(20))
    write_folder(tmp_path / "in/deeper", stories(3, 50))
    code, _, err = run_data("in/*", "--val=0.3", "--name=x")
    assert code == 0 and "in/*: 1 folder matches, whose files are left out" in err
    assert texts_in("corpora/x") == by_split(stories(20), 0.3)
    code, _, err = run_data("in/**/*.txt", "--val=0.3", "--name=y")
    assert code == 0 and not err and sum(map(len, texts_in("corpora/y").values())) == 23


# ------------------------------------------------------------------------------------------- separators


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_line_ends_in_separators(tmp_path, size):
    """48006ab found no \\n\\n in what Windows writes."""
    texts = [text.replace("\n", " ") for text in stories(20)]
    for number, (end, separator) in enumerate((
            ("\n\n", r"\n\n"), ("\r\n\r\n", r"\n\n"), ("\r\n\r\n", r"\r\n\r\n"), ("\r\n%%\n", r"\n%%\n"),
            ("\r\r", r"\r\r"))):
        source = write_txt(tmp_path / f"{number}.txt", end.join(texts))
        with task_size(size):
            meta = prepared(tmp_path / f"out{number}", source, separator=separator, val=0.3)
        assert texts_in(tmp_path / f"out{number}") == by_split(texts, 0.3)
        assert meta["without_separator"] == []


@quick
@given(st.text(st.sampled_from("a\r\n"), max_size=20), st.integers(1, 9),
       st.sampled_from([r"\n\n", r"\n", r"\r\n", r"\r", r"\n\r", r"a\n"]))
@example("a\r\n\r\na", 4, r"\n\n")
def test_where_tasks_end_separates_nothing(scratch, text, size, separator):
    """A line's end may be cut in two by the block in which a file is read."""
    cfg = prepare.Config(separator=separator)
    found = sources.find_sources([str(write_txt(scratch / "cut.txt", text))], cfg)

    def documents(task_bytes):
        with task_size(task_bytes):
            work = tasks.make_tasks(found, tasks.Place(), cfg)
            results = [result for result, _, _ in workers.tokenize_tasks(work, cfg, n_processes=0)]
        return [document.digest for result in results for document in result.documents]

    assert documents(size) == documents(1 << 20)


def test_a_separator_that_occurs_nowhere_is_named(run_data, data_refuses, tmp_path):
    write_txt(tmp_path / "x.txt", "one\n\ntwo")
    data_refuses("x.txt", "--separator=%%", message="or another --val; '%%' occurs nowhere in x.txt")
    write_txt(tmp_path / "y.txt", "%%".join(stories(20)))
    code, printed, _ = run_data("x.txt", "y.txt", "--separator=%%", "--val=0.3")
    assert code == 0 and printed.endswith("the separator occurs nowhere in x.txt: each is one document\n")
    assert texts_in("corpora/x") == by_split(["one\n\ntwo", *stories(20)], 0.3)


# -------------------------------------------------------------------------------------- what can't be read


@contextlib.contextmanager
def as_nobody():
    """As a user whom permissions bind, whoever runs the tests."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("mode", [0o000, 0o444], ids=["closed", "no search"])
@pytest.mark.parametrize("name", ["in", "in/*/*.txt", "in/**/*.txt"])
def test_a_folder_without_permission_is_an_error(monkeypatch, name, mode):
    """48006ab left it out, and ended with 0."""
    cfg = prepare.Config()
    with tempfile.TemporaryDirectory() as top:  # pytest's own lets nobody else in
        os.chmod(top, 0o755)
        monkeypatch.chdir(top)
        for folder in ("in", "in/open", "in/shut"):
            write_folder(Path(folder), stories(3))
        assert len(sources.find_sources([name], cfg)) in (6, 9)
        Path("in/shut").chmod(mode)
        with as_nobody(), pytest.raises(PermissionError) as caught:
            sources.find_sources([name], cfg)
        Path("in/shut").chmod(0o755)
        assert str(caught.value.filename).startswith("in/shut")
        monkeypatch.undo()


def test_permission_is_one_line(data_refuses, tmp_path, monkeypatch):
    write_folder(tmp_path / "in", stories(5))
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("in"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    data_refuses("in", message="in: Permission denied")


# -------------------------------------------------------------------------------------- what is no file


def test_pipes_and_the_like_are_named(data_refuses, tmp_path):
    """48006ab said `no such file`."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    data_refuses("pipe.jsonl", message="pipe.jsonl: a pipe, which can be read only once; give it as standard "
                                       "input: … | python data.py -")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s.txt")
        data_refuses("s.txt", message="s.txt: a socket")
    data_refuses("/dev/null", "--format=txt", message="/dev/null: a device")
    (tmp_path / "x.txt").symlink_to("nowhere")
    data_refuses("x.txt", message="x.txt: a link to nowhere, which is not there")
    os.mkfifo(tmp_path / "t.json")
    write_txt(tmp_path / "y.txt", "text")
    data_refuses("y.txt", "--tokenizer=t.json", message="t.json: a pipe, which can be read only once")


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.parquet", "x.jsonl.gz", "t.json"])
def test_git_lfs_pointers_are_named(data_refuses, tmp_path, name):
    """Of a .txt 48006ab made a corpus."""
    (tmp_path / name).write_bytes(POINTER)
    write_txt(tmp_path / "y.txt", "text")
    argv = ["y.txt", f"--tokenizer={name}"] if name == "t.json" else [name]
    data_refuses(*argv, message=f"{name} is a Git LFS pointer, not the file it stands for; `git lfs pull`")


def test_pointers_among_token_files(tmp_path):
    """As tokens of uint16 they would be trained on."""
    (tmp_path / "train.bin").write_bytes(POINTER + b"\n" * (len(POINTER) % 2))
    with pytest.raises(ValueError, match="train.bin is a Git LFS pointer") as caught:
        load_corpus(tmp_path, "bytes", 0.3)
    one_line(caught)


# --------------------------------------------------------------------------- long lines, and what is left


@pytest.mark.parametrize("size", [50, 1 << 20])
def test_long_documents_are_refused_wherever_they_are(data_refuses, run_data, tmp_path, size):
    """48006ab took 3.7 GB of memory for 509 KB of .gz that held one line of 512 MB."""
    texts = [*stories(3), "b" * 5000, *stories(3, 9)]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(texts)))
    write_txt(tmp_path / "x.txt", "%%".join(texts))
    start = len("%%".join(texts[:3]).encode()) + 2
    with task_size(size):
        data_refuses("x.jsonl.gz", "--max_document=4K",
                     message="x.jsonl.gz:4: a line of more than 4,000 bytes; --max_document= takes longer")
        data_refuses("x.txt", "--separator=%%", "--max_document=4K",
                     message=f"x.txt: no separator '%%' within 4,000 bytes from byte {start} on; --max_docu")
        write_parquet(tmp_path / "x.parquet", texts)
        data_refuses("x.parquet", "--max_document=4K",
                     message="x.parquet, record 4: a text of more than 4,000 bytes; --max_document= takes")
        assert run_data("x.jsonl.gz", "--max_document=6K", "--val=0.5")[0] == 0


def test_memory_of_one_line_is_bounded(tmp_path):
    """Of the line no more is unpacked than the limit."""
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"text": "' + b"a" * 300_000_000 + b'"}\n', 1))
    code = ("import sys; sys.path.insert(0, sys.argv.pop(1)); from corpus import prepare\n"
            "try: prepare.main()\n"
            "finally: print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])")
    argv = [sys.executable, "-c", code, str(ROOT), "x.jsonl.gz", "--max_document=20M"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert re.fullmatch(r"-c: x.jsonl.gz:1: a line of more than 20,000,000 bytes[^\n]*\n", done.stderr), done
    assert int(done.stdout.split()[-1]) < 250_000  # KiB; the line has 300 MB


@pytest.mark.parametrize("argv", [["x.jsonl", "--out=new/corpora"], ["-", "--out=new/corpora"],
                                  ["x.jsonl", "--out=new/corpora", "--tokenizer=gtp2"]])
def test_refused_preparations_leave_no_folders(data_refuses, tmp_path, argv):
    """48006ab left an empty corpora/."""
    write_txt(tmp_path / "x.jsonl", "{")
    data_refuses(*argv, message="", stdin=b"")
    assert sorted(contents(tmp_path)) == ["x.jsonl"] and not Path("new").exists()


@pytest.mark.parametrize("name", ["a,b", "a: 1", " a"])
def test_names_that_no_command_could_read(run_data, data_refuses, tmp_path, name):
    """train.py separates corpora with commas, and weights with colons."""
    write_jsonl(tmp_path / f"{name}.jsonl", stories(20))
    data_refuses(f"{name}.jsonl", message=f"{name}: train.py could not read that name")
    data_refuses(f"{name}.jsonl", f"--name={name}", message="choose another one with --name=")
    assert run_data(f"{name}.jsonl", "--name=x", "--val=0.3")[0] == 0


def test_an_existing_path_is_no_pattern(run_data, tmp_path):
    write_folder(tmp_path / "texts [1]", stories(20))
    write_jsonl(tmp_path / "x[2].jsonl", stories(20))
    for source, name in (("texts [1]", "texts [1]"), ("x[2].jsonl", "x[2]")):
        assert run_data(source, "--val=0.3")[0] == 0
        assert len(all_tokens(load_corpus(f"corpora/{name}").train)) > 100
