"""Megatron's token files as we write them, and `data.py export`."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from conftest import ROOT
from corpus_examples import (
    EOS,
    TOKENS,
    all_tokens,
    empty,
    lengths_of,
    one_line,
    pairs,
    quick,
    small_chunks,
    split_at,
    split_documents,
    with_leading_eos,
    write_pair,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from corpus import megatron_dataset, tokenfiles, tokenizers
from corpus.megatron_dataset import write_megatron
from corpus.stream import Stream


def stream_of(*paths):
    """Token files as a stream, as load_corpus reads them."""
    return tokenfiles.open_token_files(paths, tokenizers.ByteTokenizer()).stream


def tiny_stream():
    return Stream([np.array([EOS, 1, EOS], np.uint16)])


@settings(max_examples=60, deadline=None)
@given(TOKENS.filter(lambda tokens: tokens != [EOS]),
       st.lists(st.integers(1, 39), max_size=3, unique=True).map(sorted),
       st.sampled_from([np.uint16, np.uint32]), st.integers(1, 9))
@example([EOS, 1, 2, EOS, EOS, 3, EOS], [], np.uint16, 1)
@example([EOS, 1, 2], [1], np.uint32, 1)
def test_megatron_written(scratch, tokens, cuts, dtype, size):
    """Byte for byte what the layout says, and the same again when read."""
    folder = empty(scratch / "out")
    stream = Stream([np.array(part, dtype) for part in split_at(tokens, cuts)])
    with small_chunks(size):
        write_megatron(stream, EOS, folder / "sub" / "web")
    documents = split_documents(tokens)
    write_pair(folder / "expected", [[document] for document in documents], 8 if dtype is np.uint16 else 4)
    assert sorted(path.name for path in (folder / "sub").iterdir()) == ["web.bin", "web.idx"]
    for end in (".bin", ".idx"):
        assert (folder / "sub" / f"web{end}").read_bytes() == (folder / f"expected{end}").read_bytes()
    again = stream_of(folder / "sub" / "web.bin")
    assert all_tokens(again) == with_leading_eos(sum(documents, []))
    assert lengths_of(again) == lengths_of(stream)


@quick
@given(pairs())
def test_megatron_written_from_megatron(scratch, contents):
    """Documents start where they did, with or without eos."""
    folder = empty(scratch / "again")
    for number, documents in enumerate(contents):
        write_pair(folder / f"web_{number}", documents)
    stream = stream_of(*sorted(folder.glob("*.bin")))
    write_megatron(stream, EOS, folder / "sub" / "web")
    again = stream_of(folder / "sub" / "web.bin")
    assert all_tokens(again) == all_tokens(stream) and lengths_of(again) == lengths_of(stream)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_write_megatron_overwrites_nothing(tmp_path, end):
    path = tmp_path / f"web{end}"
    path.write_text("mine", encoding="utf-8")
    message = f"web{end} exists; remove it or choose another prefix"
    with pytest.raises(FileExistsError, match=message) as caught:
        write_megatron(tiny_stream(), EOS, tmp_path / "web")
    one_line(caught)
    assert list(tmp_path.iterdir()) == [path] and path.read_text(encoding="utf-8") == "mine"


def test_documents_that_an_index_cannot_measure(tmp_path):
    """Its lengths are int32; a single text may be longer."""
    sizes = mock.patch.object(megatron_dataset, "document_sizes", lambda *_: [np.array([3, 2**31])])
    with sizes, pytest.raises(ValueError, match="web: a document of 2147483648 tokens"):
        write_megatron(tiny_stream(), EOS, tmp_path / "web")
    assert not list(tmp_path.iterdir())


def stop_at_sync(*problems):
    """Raise these, one after the other, when a file has been written; None: nothing."""
    return mock.patch.object(megatron_dataset, "sync_to_disk", mock.Mock(side_effect=problems))


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("problems", [[], [None]], ids=["tokens", "index"])
def test_write_megatron_leaves_nothing_behind(tmp_path, problem, problems):
    """Stopped while it writes the tokens, and while it writes the index."""
    with stop_at_sync(*problems, problem), pytest.raises(problem):
        write_megatron(tiny_stream(), EOS, tmp_path / "web")
    assert not list(tmp_path.iterdir())


def test_half_a_pair_is_no_corpus(tmp_path):
    """Killed between its last two acts: a .bin alone would be read as nanoGPT's."""
    rename, renamed = Path.rename, []

    def rename_once(path, target):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(rename(path, target))

    with mock.patch.object(Path, "rename", rename_once), pytest.raises(KeyboardInterrupt):
        write_megatron(tiny_stream(), EOS, tmp_path / "web")
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path, "bytes", 0.3)


# ------------------------------------------------------------------------------------------------ export


def test_export_from_the_command_line(sharded_corpus, tmp_path, run_data):
    prefix = tmp_path / "mega" / "web"
    argv = [sys.executable, "data.py", "export", sharded_corpus, prefix]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    corpus = tokenfiles.load_corpus(sharded_corpus)
    for split, stream in (("train", corpus.train), ("val", corpus.val)):
        documents = split_documents(all_tokens(stream))
        write_pair(tmp_path / split, [[document] for document in documents])
        for end in (".bin", ".idx"):
            assert (tmp_path / f"{split}{end}").read_bytes() == Path(f"{prefix}_{split}{end}").read_bytes()
        assert f"{prefix}_{split}.bin and .idx: {len(stream):,} tokens" in done.stdout
    for path in (prefix.parent, prefix):
        again = tokenfiles.load_corpus(path, "bytes")
        assert all_tokens(again.train) == all_tokens(corpus.train)
        assert all_tokens(again.val) == all_tokens(corpus.val)
    code, printed, _ = run_data("inspect", prefix, "--tokenizer=bytes")
    assert code == 0 and "Megatron token files" in printed


@pytest.mark.parametrize("name", ["web_train.bin", "web_train.idx", "web_val.bin", "web_val.idx"])
def test_export_writes_both_splits_or_none(small_corpus, tmp_path, run_data, name):
    path = tmp_path / name
    path.write_text("mine", encoding="utf-8")
    code, out, err = run_data("export", small_corpus, tmp_path / "web")
    assert code == 2 and not out
    assert err == f"data.py: {path} exists; remove it or choose another prefix\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("problem", [KeyboardInterrupt, OSError("No space left on device")])
def test_export_that_stops_leaves_nothing_behind(small_corpus, tmp_path, run_data, problem):
    """Stopped while it writes the second split: the first goes, too."""
    with stop_at_sync(None, None, problem):
        code, out, err = run_data("export", small_corpus, tmp_path / "web")
    assert code in (2, 130) and not out and err.count("\n") == 1 and not list(tmp_path.iterdir())
