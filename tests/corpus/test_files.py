"""Files on a disk: what a user's folder holds, without what systems leave there."""

import shutil

from conftest import litter, prepared
from corpus_examples import all_tokens, stories, write_jsonl, write_nanogpt
from preparations import texts_in
from source_examples import write_folder

from corpus import prepare, sources
from corpus.files import list_folder, stamp
from corpus.tokenfiles import load_corpus


def test_what_systems_leave_is_not_listed(tmp_path):
    for name in ("b.bin", "a.bin", "thumbs.bin", "deep/c.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"ab")
    for name in (".Trashes", "__MACOSX", "@eaDir"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bin").write_bytes(b"ab")
    before = stamp(tmp_path / "deep")
    litter(tmp_path)
    assert [path.name for path in list_folder(tmp_path, "*.bin")] == ["a.bin", "b.bin", "thumbs.bin"]
    assert [path.name for path in list_folder(tmp_path)] == ["a.bin", "b.bin", "deep", "thumbs.bin"]
    assert list_folder(str(tmp_path), "**/c*") == [tmp_path / "deep/c.bin"]
    assert stamp(tmp_path / "deep") == before  # a look into it by a file manager is no change


def test_a_folder_whose_own_name_begins_with_a_dot(tmp_path):
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data/a.bin").touch()
    assert list_folder(tmp_path / ".data") == [tmp_path / ".data/a.bin"]


def test_token_files_beside_what_systems_leave(tmp_path):
    """48006ab trained on ._train.bin and validated on ._val.bin."""
    tokens = dict(train=[*range(50), 50256] * 20, val=[7, 8, 50256] * 30)
    for split, values in tokens.items():
        write_nanogpt(tmp_path / f"{split}.bin", values)
    litter(tmp_path)
    corpus = load_corpus(tmp_path, "gpt2")
    assert all_tokens(corpus.train)[1:] == tokens["train"] and all_tokens(corpus.val)[1:] == tokens["val"]


def test_texts_beside_what_systems_leave(tmp_path):
    write_folder(tmp_path / "in", stories(20))
    shutil.copytree(tmp_path / "in", tmp_path / "littered")
    litter(tmp_path / "littered")
    for number, name in enumerate(("in", "littered", "littered/*")):
        prepared(tmp_path / f"out{number}", tmp_path / name, val=0.3, format="txt")
    assert texts_in(tmp_path / "out0") == texts_in(tmp_path / "out1") == texts_in(tmp_path / "out2")


def test_a_hidden_file_is_read_if_it_is_named(tmp_path):
    write_jsonl(tmp_path / ".x.jsonl", stories(3))
    cfg = prepare.Config()
    assert len(sources.find_sources([str(tmp_path / ".x.jsonl")], cfg)) == 1
    assert len(sources.find_sources([str(tmp_path / ".*.jsonl")], cfg)) == 1
