"""Records in JSON: what a schema lets through, and a corpus's meta.json of any content."""

import json
import os
import re
import shutil

import pytest
from conftest import prepared
from corpus_examples import one_line, stories, write_jsonl
from forgery import forgeries, text_of
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.inspect import inspect_corpus
from corpus.records import check, read_json, read_record, real, whole
from corpus.tokenfiles import load_corpus
from corpus.tokenizers import load_tokenizer

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("schema, fit, unfit", (
    (str, ["", "x"], [None, 1, ["x"]]),
    (bool, [True, False], [0, 1, None, "True"]),
    (float, [0, -1.5, NAN, INF], [True, "1", None, 10**400]),
    (real(0, 1), [0, 0.5, 1], [-0.1, 2, NAN, True, "0"]),
    (real(), [1.7e308, -5], [INF, NAN, 10**400]),
    (whole(1, 3), [1, 3], [0, 4, 1.0, True, "1"]),
    (("a", "b"), ["a"], ["c", None, ["a"], 1]),
    (re.compile("[0-9a-f]+"), ["0f"], ["0g", "", 3, "0f\n"]),
    ([whole()], [[], [1, 2]], [1, {}, [1, "2"], [[1]]]),
    ({"a": str, "b?": whole()}, [dict(a=""), dict(a="", b=1, c=None)], [{}, dict(b=1), dict(a="", b=""), []]),
    ({re.compile("[a-z]+"): [str]}, [{}, dict(a=["x"])], [dict(a=[1]), {"A": []}, []]),
), ids=str)
def test_a_schema_lets_through_what_it_says(schema, fit, unfit):
    for value in fit:
        check(value, schema, "x.json")
    for value in unfit:
        with pytest.raises(ValueError, match="^x.json: "):
            check(value, schema, "x.json")


def test_what_is_no_json_or_no_file_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"", b"{", b"\xff\xfe\x00", b"[" * 10_000, b"1" * 5000, b"\0" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.json can't be read") as caught:
            read_json(path)
        one_line(caught)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')  # with a byte order mark
    assert read_record(path, {"a": whole()}) == dict(a=1)
    path.unlink()
    os.mkfifo(path)
    for other, kind in ((path, "a pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(ValueError, match=f"{other}: {kind}"):
            read_json(other)


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged")
    prepared(folder / "corpus", write_jsonl(folder / "x.jsonl", stories(30)), val=0.3)
    return folder / "corpus"


def test_a_name_that_no_file_can_bear(corpus_folder, tmp_path):
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    path = tmp_path / "corpus/meta.json"
    path.write_text(path.read_text(encoding="utf-8").replace("train.bin", "x" * 300), encoding="utf-8")
    with pytest.raises(ValueError, match="x: 0 bytes, but meta.json says") as caught:
        load_corpus(tmp_path / "corpus")
    one_line(caught)
    with pytest.raises(ValueError) as caught:
        load_tokenizer("x" * 300)
    one_line(caught)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_forged_meta_json_is_used_or_refused_in_a_line(corpus_folder, data):
    path = corpus_folder / "meta.json"
    genuine = path.read_text(encoding="utf-8")
    try:
        path.write_text(text_of(data.draw(forgeries(json.loads(genuine)))), encoding="utf-8")
        for use in (load_corpus, inspect_quietly):
            try:
                use(corpus_folder)
            except ValueError as problem:
                assert "\n" not in str(problem)
    finally:
        path.write_text(genuine, encoding="utf-8")


def inspect_quietly(folder):
    inspect_corpus(folder, show=lambda text: None)


def test_files_outside_of_a_corpus_are_not_its_own(corpus_folder, tmp_path):
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    shutil.move(tmp_path / "corpus/train.bin", tmp_path / "train.bin")
    path = tmp_path / "corpus/meta.json"
    path.write_bytes(path.read_bytes().replace(b'"train.bin"', b'"../train.bin"'))
    with pytest.raises(ValueError, match="train.files.0.name is '../train.bin'"):
        load_corpus(tmp_path / "corpus")


def test_pipes_among_token_files_are_not_waited_for(corpus_folder, tmp_path):
    for name in ("meta.json", "train.bin", "token_bytes.bin"):
        shutil.copytree(corpus_folder, tmp_path / name)
        (tmp_path / name / name).unlink()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(ValueError):
            load_corpus(tmp_path / name)
    (tmp_path / "foreign").mkdir()
    for name in ("train.bin", "val.bin"):
        os.mkfifo(tmp_path / "foreign" / name)
    with pytest.raises(ValueError, match="train.bin: a pipe"):
        load_corpus(tmp_path / "foreign", "bytes")
