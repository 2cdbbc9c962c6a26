"""Megatron's token files as we write them."""

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

from corpus import tokenfiles, tokenizers

# ---------------------------------------------------------------------------------------------- write_megatron

@settings(max_examples=60, deadline=None)
@given(TOKENS.filter(lambda tokens: tokens != [EOS]), st.lists(st.integers(1, 39), max_size=3, unique=True).map(sorted),
       st.sampled_from([np.uint16, np.uint32]), st.integers(1, 9))
@example([EOS, 1, 2, EOS, EOS, 3, EOS], [], np.uint16, 1)
@example([EOS, 1, 2], [1], np.uint32, 1)
def test_megatron_written(scratch, tokens, cuts, dtype, size):
    """Byte for byte what the layout says, and the same again when read."""
    folder = empty(scratch / "out")
    stream = tokenfiles.Stream([np.array(part, dtype) for part in split_at(tokens, cuts)])
    with small_chunks(size):
        tokenfiles.write_megatron(stream, EOS, folder / "sub" / "web")
    write_pair(folder / "expected", [[d] for d in split_documents(tokens)], 8 if dtype is np.uint16 else 4)
    assert sorted(p.name for p in (folder / "sub").iterdir()) == ["web.bin", "web.idx"]
    for end in (".bin", ".idx"):
        assert (folder / "sub" / f"web{end}").read_bytes() == (folder / f"expected{end}").read_bytes()
    _, again, _ = tokenfiles.open_foreign([folder / "sub" / "web.bin"], tokenizers.Bytes())
    assert all_tokens(again) == with_leading_eos([t for d in split_documents(tokens) for t in d])
    assert lengths_of(again) == lengths_of(stream)


@quick
@given(pairs())
def test_megatron_written_from_megatron(scratch, contents):
    """Documents keep their borders, with or without eos."""
    folder = empty(scratch / "again")
    for number, documents in enumerate(contents):
        write_pair(folder / f"web_{number}", documents)
    files = sorted(folder.glob("*.bin"))
    _, stream, _ = tokenfiles.open_foreign(files, tokenizers.Bytes())
    tokenfiles.write_megatron(stream, EOS, folder / "sub" / "web")
    _, again, _ = tokenfiles.open_foreign([folder / "sub" / "web.bin"], tokenizers.Bytes())
    assert all_tokens(again) == all_tokens(stream) and lengths_of(again) == lengths_of(stream)


@pytest.mark.parametrize("end", [".bin", ".idx"])
def test_write_megatron_overwrites_nothing(tmp_path, end):
    (tmp_path / f"web{end}").write_text("mine")
    with pytest.raises(FileExistsError, match=f"web{end} exists; remove it or choose another prefix") as caught:
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    one_line(caught)
    assert [p.name for p in tmp_path.iterdir()] == [f"web{end}"] and (tmp_path / f"web{end}").read_text() == "mine"


def test_documents_that_an_index_cannot_measure(tmp_path):
    """Its lengths are int32; a single text may be longer."""
    with mock.patch.object(tokenfiles, "document_sizes", lambda *_: [np.array([3, 2**31])]), pytest.raises(ValueError, match="web: a document of 2147483648 tokens"):
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", [1, 2])
def test_write_megatron_leaves_nothing_behind(tmp_path, stop, where):
    """Stopped while it writes the tokens, and while it writes the index."""
    with mock.patch.object(tokenfiles, "flush", mock.Mock(side_effect=[None] * (where - 1) + [stop])), pytest.raises(stop):
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    assert not list(tmp_path.iterdir())


def test_half_a_pair_is_no_corpus(tmp_path):
    """Killed between its last two acts: a .bin alone would be read as nanoGPT's."""
    rename, done = Path.rename, []

    def once(path, target):
        if done:
            raise KeyboardInterrupt
        done.append(rename(path, target))

    with mock.patch.object(Path, "rename", once), pytest.raises(KeyboardInterrupt):
        tokenfiles.write_megatron(tokenfiles.Stream([np.array([EOS, 1, EOS], np.uint16)]), EOS, tmp_path / "web")
    with pytest.raises(FileNotFoundError, match="no corpus in"):
        tokenfiles.load_corpus(tmp_path, "bytes", 0.3)


def test_export_from_the_command_line(sharded_corpus, tmp_path, run_data):
    prefix = tmp_path / "mega" / "web"
    done = subprocess.run([sys.executable, "data.py", "export", sharded_corpus, prefix], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    read = tokenfiles.load_corpus(sharded_corpus)
    for split, stream in (("train", read.train), ("val", read.val)):
        write_pair(tmp_path / split, [[d] for d in split_documents(all_tokens(stream))])
        for end in (".bin", ".idx"):
            assert (tmp_path / f"{split}{end}").read_bytes() == Path(f"{prefix}_{split}{end}").read_bytes()
        assert f"{prefix}_{split}.bin and .idx: {len(stream):,} tokens" in done.stdout
    for path in (prefix.parent, prefix):
        again = tokenfiles.load_corpus(path, "bytes")
        assert (all_tokens(again.train), all_tokens(again.val)) == (all_tokens(read.train), all_tokens(read.val))
    assert "Megatron token files" in run_data("inspect", prefix, "--tokenizer=bytes")[1]


@pytest.mark.parametrize("taken", ["web_train.bin", "web_train.idx", "web_val.bin", "web_val.idx"])
def test_export_writes_both_splits_or_none(small_corpus, tmp_path, run_data, taken):
    (tmp_path / taken).write_text("mine")
    code, out, err = run_data("export", small_corpus, tmp_path / "web")
    assert code == 2 and not out and err == f"data.py: {tmp_path / taken} exists; remove it or choose another prefix\n"
    assert [p.name for p in tmp_path.iterdir()] == [taken]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("No space left on device")])
def test_export_that_stops_leaves_nothing_behind(small_corpus, tmp_path, run_data, stop):
    """Stopped while it writes the second split: the first goes, too."""
    with mock.patch.object(tokenfiles, "flush", mock.Mock(side_effect=[None, None, stop])):
        code, out, err = run_data("export", small_corpus, tmp_path / "web")
    assert code in (2, 130) and not out and err.count("\n") == 1 and not list(tmp_path.iterdir())
