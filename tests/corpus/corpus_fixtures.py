"""Fixtures for tests on corpora: tokenizers, corpora, folders, the command line. A plugin of conftest.py."""

import io
import itertools
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import prepared
from corpus_examples import needs_gpt2, stories, write_jsonl
from preparations import contents
from source_examples import LONG_TEXT

from corpus import prepare, python_docs, tokenizers

# -------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="session")
def gpt2():
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


def made_up_encoding(name):
    """A tiktoken encoding with its own pattern and specials, but merges across all a pattern may join."""
    import tiktoken
    from tiktoken_ext import openai_public

    ranks = {bytes([i]): i for i in range(256)}
    for pair in itertools.product("aZ1 .'!/\t\r\n", repeat=2):
        ranks["".join(pair).encode()] = len(ranks)
    for token in ("!\n/", "a b", "a\nb", "\n\n\n", "'S"):
        ranks.setdefault(token.encode(), len(ranks))
    with mock.patch.object(openai_public, "load_tiktoken_bpe", lambda *_, **__: ranks):
        return tiktoken.Encoding(**openai_public.ENCODING_CONSTRUCTORS[name]())


@pytest.fixture(scope="module", params=["cl100k_base", "o200k_base", pytest.param("gpt2", marks=needs_gpt2)])
def encoding(request):
    """A tiktoken encoding, which load_tokenizer finds by its name."""
    import tiktoken

    name = request.param
    encoding = tiktoken.get_encoding(name) if name == "gpt2" else made_up_encoding(name)
    with mock.patch.object(tiktoken, "get_encoding", lambda _: encoding):
        yield encoding


# ------------------------------------------------------------------------------------ corpora and sources


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


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """`datasets` without a network, its cache in the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if "datasets" in sys.modules:  # which has read them
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def few_docs(monkeypatch):
    """Let the source docs be a few texts: all that this Python documents would take long."""
    texts = [*stories(4), LONG_TEXT, LONG_TEXT, *(text.upper() for text in stories(25))]
    monkeypatch.setattr(python_docs, "documents", lambda: iter(texts))


# ------------------------------------------------------------------------------- folders, the command line


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


@pytest.fixture
def data_refuses(run_data):
    """Run what must fail: exit code 2, one line on stderr with `message` in it, corpora/ as it was before."""

    def call(*argv, message, **options):
        before, hidden = contents("corpora"), list(Path("corpora").glob(".*"))
        code, _, err = run_data(*argv, **options)
        assert code == 2 and re.fullmatch(r"data\.py: [^\n]+\n", err), err
        assert message in err
        assert contents("corpora") == before and list(Path("corpora").glob(".*")) == hidden

    return call
