import os
import signal
import sys
from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# a few tests share what stands beside others
for folder in ("corpus", "evaluation", "interop", "processes", "sampling", "training"):
    sys.path.append(str(ROOT / "tests" / folder))

# a job that a script starts in the background ignores it, and so would what it starts
signal.signal(signal.SIGINT, signal.default_int_handler)
# networks this small gain nothing from threads; with two in each of two workers, each waits for the other
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as scaling.py does
# Inductor's own proof that the CPU has the instructions that it lists takes ten seconds the first time
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
if not os.path.exists("/dev/nvidiactl"):  # without a GPU triton's interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
if (ROOT / "../shared/tiktoken").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / "../shared/tiktoken"))

pytest_plugins = ["corpus_fixtures", "evaluation_fixtures"]

# first the files that take longest, so that no worker is left alone with one at the end
LONGEST = ["training/test_distributed.py", "training/test_update.py", "training/test_faults.py",
           "test_kernels.py", "laws/test_fitting.py", "training/test_memory.py", "sampling/test_exactness.py",
           "test_eval.py", "laws/test_sweep.py", "laws/test_study.py"]


# folders whose files import what takes seconds (lm-eval, transformers): one worker has all of each
TOGETHER = ("tests/evaluation/", "tests/interop/")


class LoadFiles(LoadFileScheduling):
    """xdist's scheduler by files, and by folders where that saves imports."""

    def _split_scope(self, nodeid):
        return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.split("::")[0])


def pytest_xdist_make_scheduler(config, log):
    return LoadFiles(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.relative_to(ROOT / "tests").as_posix()
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


def prepared(folder, *names, **settings):
    """Prepare a corpus in this process, as `python data.py NAMES --SETTINGS` does."""
    from corpus import prepare, sources

    cfg = prepare.Config(**settings)
    return prepare.prepare(sources.find_sources([str(name) for name in names], cfg), folder, cfg)


def litter(folder):
    """Leave in a folder and in those below it what macOS and Windows leave, a ._NAME beside every file."""
    apple_double = b"\0\5\26\7\0\2\0\0Mac OS X        " + bytes(4072)  # an even size, as tokens have
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        for path in list(place.iterdir()):
            if path.is_file():
                path.with_name(f"._{path.name}").write_bytes(apple_double)
        for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
            (place / name).write_bytes(apple_double)


def call_main(monkeypatch, *argv):
    """Call train.main() in this process, which gets its signal handlers back."""
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        train.main()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def prepare_words(folder):
    """Prepare a small corpus of regular sentences, in bytes; returns its folder."""
    lines = [f"{i} squared is {i * i}, and its double is {2 * i}.\n" for i in range(1500)]
    (folder / "words.txt").write_text("".join(lines), encoding="utf-8")
    prepared(folder / "words", folder / "words.txt")
    return folder / "words"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small corpus of regular sentences, in bytes."""
    return prepare_words(tmp_path_factory.mktemp("corpora"))


@pytest.fixture
def run_main(monkeypatch, corpus, tmp_path):
    """Call train.main() in this process with the tiny settings; returns the run's folder.

    The loss curve is not drawn, unless `draw`: that takes as long as such a run.
    """
    from runs import TINY

    import train

    def call(*flags, run="run", draw=False):
        with monkeypatch.context() as patch:
            if not draw:
                patch.setattr(train, "draw_losses", lambda run_dirs, picture: None)
            call_main(patch, *TINY, f"--corpus={corpus}", f"--run_dir={tmp_path / run}", *flags)
        return tmp_path / run

    return call


@pytest.fixture
def refused(run_main, capsys):
    """Call train.main(), which must end with code 2 and no traceback; returns what it says on stderr."""

    def call(*flags, run="run"):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(*flags, run=run)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "Traceback" not in error
        return error

    return call


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A group of so many ranks, which do one job after the other: runs.Group."""
    from runs import Group

    groups = {}

    def of(world):
        if world not in groups:
            groups[world] = Group(tmp_path_factory.mktemp(f"group{world}"), world)
        return groups[world]

    yield of
    for started in groups.values():
        started.stop()


@pytest.fixture(scope="module")
def train_on(group):
    """Train on so many ranks with the tiny settings, one in this process; returns what rank 0 printed.

    Loss curves are not drawn.
    """
    from runs import TINY

    import train

    def call(world, *flags, **job):
        flags = [*TINY, *map(str, flags)]
        if world > 1:
            return group(world).do(flags=flags, **job)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "draw_losses", lambda run_dirs, picture: None)
            call_main(patch, *flags)

    return call


@pytest.fixture
def wandb_folder(monkeypatch, tmp_path):
    """Let wandb write into a folder, without a network; returns it."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it reads its environment once in a process
    for name, value in dict(WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "wandb"


@pytest.fixture
def without_codegen(monkeypatch):
    """Let torch.compile trace, guard and cut graphs apart, but leave out the C++ that takes most of its time.

    Call it with one of the compiler's backends that stop there; returns torch's counters of graphs.
    """
    import torch

    from training import compiler

    compile = torch.compile

    def choose(backend="aot_eager"):
        def compile_with(module, options=None, **settings):
            return compile(module, backend=backend, **settings)

        monkeypatch.setattr(torch, "compile", compile_with)
        monkeypatch.setattr(compiler, "check", lambda device: None)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        return torch._dynamo.utils.counters

    return choose
