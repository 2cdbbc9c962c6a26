"""What tests on corpora share: prepared corpora, tokenizers, a scratch folder, the command line (a plugin: no imports)."""

import io
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import prepared
from corpus_examples import stories, write_jsonl


@pytest.fixture(scope="session")
def gpt2():
    from corpus import tokenizers

    return tokenizers.load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory):
    """The path of a small byte-level BPE, as a tokenizer.json."""
    hf = pytest.importorskip("tokenizers")
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = byte_level, hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"],
                                     initial_alphabet=byte_level.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(stories(50), trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory):
    """A prepared corpus in one file per split. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("small")
    prepared(folder / "small", write_jsonl(folder / "x.jsonl", stories(30)), val=0.3)
    return folder / "small"


@pytest.fixture(scope="session")
def sharded_corpus(tmp_path_factory):
    """A prepared corpus of several shards per split. Do not change it: copy it."""
    folder = tmp_path_factory.mktemp("sharded")
    prepared(folder / "sharded", write_jsonl(folder / "x.jsonl", stories(120)), val=0.3, shard_tokens=700)
    return folder / "sharded"


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """A folder for tests that write a great many files: in memory, where there is such a place."""
    in_memory = os.access("/dev/shm", os.W_OK)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm")) if in_memory else tmp_path_factory.mktemp("scratch")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def fast_path(scratch):
    """As tmp_path, there."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield Path(folder)


@pytest.fixture
def run_data(monkeypatch, capsys, tmp_path):
    """Call data.py's main() in this process, in a folder of its own: (exit code, stdout, stderr)."""
    from corpus import prepare

    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)

    def call(*argv, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, argv)])
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capsys.readouterr()
        try:
            prepare.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, handler)
