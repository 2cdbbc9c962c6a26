import os
import signal
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
for folder in ("corpus", "interop", "processes", "sampling", "training"):  # a few tests share what stands beside others
    sys.path.append(str(ROOT / "tests" / folder))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job that a script starts in the background ignores it, and so would what it starts
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as scaling.py does
if not os.path.exists("/dev/nvidiactl"):  # before triton is imported: without a GPU its interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
if (ROOT / "../shared/tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / "../shared/tiktoken"))

pytest_plugins = ["corpus_fixtures"]


def prepared(folder, *names, **settings):
    """Prepare a corpus in this process, as `python data.py NAMES --SETTINGS` does."""
    from corpus import prepare, sources

    cfg = prepare.Config(**settings)
    return prepare.prepare(sources.find_sources([str(name) for name in names], cfg), folder, cfg)


def call_main(monkeypatch, *argv):
    """train.main() in this process, which gets its signal handlers back."""
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        train.main()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus of regular sentences, in bytes."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "words.txt").write_text("".join(f"{i} squared is {i * i}, and its double is {2 * i}.\n" for i in range(1500)))
    prepared(folder / "words", folder / "words.txt")
    return folder / "words"


@pytest.fixture(scope="module")
def one_thread():
    """Networks this small gain nothing from threads, and lose much where the cores are shared."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
