"""The command line of data.py: what it prints, what it refuses, and the corpus that needs no download."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from corpus_examples import stories, write_jsonl
from preparations import texts_in
from source_examples import jsonl, write_txt

from corpus import prepare
from corpus.tokenfiles import load_corpus


def test_no_torch_to_prepare_a_corpus():
    """It takes seconds to import, in each of the processes that tokenize."""
    check = "import data, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


@pytest.mark.parametrize("argv, message", [
    (["absent.txt"], "absent.txt: no such file"),
    (["absent/*.txt", "--name=x"], "absent/*.txt: no file matches"),
    (["absent/*.txt"], "absent/*.txt: no file matches"),
    (["here.txt", "absent/*.txt"], "absent/*.txt: no file matches"),
    (["here.txt", "absent.txt"], "absent.txt: no such file"),
    (["picture.png"],
     "picture.png: expected docs, shakespeare, debian:PACKAGE, hf:NAME, -, a .deb, or a .txt, "),
    (["pictures"], "pictures: no .txt, .jsonl, .ndjson, .parquet files in it"),
    (["h*.txt"], "h*.txt: give the corpus a name with --name="),
    (["here.txt", "--val=0"], "--val=0: must be above 0"),
    (["here.txt", "--val=1.5"], "--val=1.5: must be at most 0.999"),
    (["here.txt", "--format=csv"], "choose from auto, txt, jsonl, json, parquet"),
    (["here.txt", "--tokenizer=gtp2"], "unknown tokenizer 'gtp2'; choose bytes, one of gpt2"),
    (["here.txt", "--tokenizer=absent.json"], "absent.json: no such tokenizer file"),
    (["here.txt", "--tokenizer=here.json"], "here.json: no tokenizer.json"),
    (["here.txt", "--eos=</s>"], "eos=</s>: only a tokenizer.json leaves that open"),
    (["here.txt", "--name=taken"], "taken exists; remove it or choose another --name"),
    (["here.txt", "--name=../esc"], "--name=../esc: a folder's name holds no '/'; --out says where it is"),
    (["here.txt", "--name=/tmp/esc"], "--name=/tmp/esc: a folder's name holds no '/'"),
    (["here.txt", "--seperator=a"], "--seperator=a: unknown setting 'seperator'; did you mean 'separator'?"),
    (["inspect"], "inspect what? python data.py inspect FOLDER"),
    (["export", "here"], "export what to where?"),
    (["inspect", "nowhere"], "no corpus in 'nowhere'"),
])
def test_command_line_refuses(data_refuses, tmp_path, argv, message):
    write_txt(tmp_path / "here.txt", "some text")
    write_txt(tmp_path / "here.json", "{}")
    (tmp_path / "pictures").mkdir()
    for name in ("picture.png", "pictures/a.png", "pictures/.hidden.txt"):
        (tmp_path / name).write_bytes(b"\x89PNG")
    Path("corpora/taken").mkdir(parents=True)
    data_refuses(*argv, message=message)
    assert [path.name for path in Path("corpora").iterdir()] == ["taken"]


@pytest.mark.parametrize("name", [".", ".."])
def test_folders_without_a_name(run_data, tmp_path, monkeypatch, name):
    """`data.py .` makes a corpus inside corpora/, or asks for its name."""
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    for folder in (tmp_path / "a", tmp_path / "a/b"):
        write_jsonl(folder / "x.jsonl", stories(30))
    code, _, err = run_data(name)
    assert code == 0 or code == 2 and "--name" in err
    assert not Path("corpora/meta.json").exists()
    assert len(list(Path(".").glob("corpora/*"))) == (code == 0) and not list(Path("corpora").glob(".*"))


@pytest.mark.parametrize("source, name", [
    ("hf:org/tales-v1.5", "tales-v1.5"), ("a/b.txt", "b"), ("a/b.v2.jsonl.zst", "b.v2"), ("-", "stdin")])
def test_default_names(source, name):
    assert prepare.default_name([source, "another.txt"]) == name


def test_command_line_prints_what_came_out(run_data, tmp_path):
    packed = gzip.compress(jsonl(["", *stories(2000), *stories(3)]))
    (tmp_path / "my.v2.jsonl.gz").write_bytes(packed)
    code, printed, err = run_data("my.v2.jsonl.gz", "--shard_tokens=20000")
    assert code == 0 and not err
    meta = json.loads(Path("corpora/my.v2/meta.json").read_text(encoding="utf-8"))
    for split in ("train", "val"):
        counts, n_files = meta[split], len(meta[split]["files"])
        files = f"{split}_00000.bin and {n_files - 1} more" if n_files > 1 else f"{split}.bin"
        assert (f"corpora/my.v2/{files}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
                f"{counts['bytes']:,} bytes\n") in printed
    assert len(meta["train"]["files"]) > 1 and printed.endswith("left out: 3 duplicates, 1 empty\n")


def test_the_bar_fits_into_a_usual_line(run_data, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write_jsonl(tmp_path / "web.jsonl", stories(12_000))
    code, printed, _ = run_data("web.jsonl", "--name=web[b]")  # which is no markup
    line = printed.splitlines()[0]
    pattern = r"^web\[b\] ━+ 12,000 documents, [\d,]+ tokens [\d.]+ [kM]B/s left 0:00:00$"
    assert code == 0 and re.search(pattern, line), line


def test_docs_from_the_command_line(tmp_path):
    argv = [sys.executable, "data.py", "docs", f"--out={tmp_path}"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["docs"]
    meta, texts = load_corpus(tmp_path / "docs").meta, texts_in(tmp_path / "docs")
    assert meta["tokenizer"] == "bytes" and meta["sources"] == ["docs"]
    for split in ("train", "val"):
        counts = meta[split]
        n_documents, n_tokens, n_bytes = (counts[key] for key in ("documents", "tokens", "bytes"))
        assert n_tokens == n_bytes + n_documents + 1 and n_documents == len(texts[split])
        assert f"{n_documents:,} documents, {n_tokens:,} tokens, {n_bytes:,} bytes" in done.stdout
        assert all(texts[split]) and len(set(texts[split])) == n_documents
    assert not set(texts["train"]) & set(texts["val"])
    assert 0.02 < len(texts["val"]) / len(texts["train"]) < 0.25
    assert meta["train"]["bytes"] > 1e6
    text = "".join(texts["train"] + texts["val"])
    assert 'The "assert" statement' in text and "Compile a regular expression pattern" in text
