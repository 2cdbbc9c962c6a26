"""Interrupted preparations go on where they stopped, if nothing has changed, and give the same corpus."""

import contextlib
import itertools
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
from conftest import prepared
from corpus_examples import stories, write_jsonl
from preparations import (
    by_split,
    commit_always,
    commit_never,
    contents,
    stop_after_commit,
    task_size,
    texts_in,
)
from source_examples import (
    KINDS,
    as_dataset,
    as_jsonl,
    as_parquet,
    as_separated,
    compressed,
    jsonl,
    write_bpe,
    write_kind,
    write_txt,
)

from corpus import prepare, sources, workers, writer

INTERRUPTED = "data.py: interrupted; the same command goes on from here\n"


def sources_of(*paths, **settings):
    """(sources, settings) of a preparation of these files."""
    cfg = prepare.Config(val=0.3, **settings)
    return sources.find_sources([str(path) for path in paths], cfg), cfg


@pytest.mark.parametrize("limit", [1 << 30, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_at_every_step(fast_path, few_docs, kind, limit):
    """Before and after commits, once, and again and again: what comes out is the same, byte for byte."""
    names, settings = write_kind(kind, fast_path / "in")
    found, cfg = sources_of(*names, shard_tokens=limit, **settings)
    out, whole, steps = fast_path / "out", fast_path / "whole", []

    def interrupted_prepare(step=None, commit=None):
        """Prepare, interrupted at this step or after this commit, if there is one."""
        count = itertools.count()

        def progress(*_):
            if next(count) == step:
                raise KeyboardInterrupt

        with stop_after_commit(commit):
            prepare.prepare(found, out, cfg, progress)

    with task_size(200):
        prepare.prepare(found, whole, cfg, progress=lambda *counts: steps.append(counts))
        expected, n = contents(whole), len(steps)
        assert n > 5

        for step in range(0, n, 1 + n // 8):
            for moment in (dict(step=step), dict(commit=step + 2)):  # two commits come before the first step
                with pytest.raises(KeyboardInterrupt):
                    interrupted_prepare(**moment)
                assert not out.exists()
                interrupted_prepare()
                assert contents(out) == expected
                shutil.rmtree(out)

        n_interrupted = 0
        while not out.exists():
            with contextlib.suppress(KeyboardInterrupt):
                interrupted_prepare(commit=n_interrupted % 3)
            n_interrupted += 1
            assert n_interrupted < 3 * n + 9
        assert contents(out) == expected
        assert sorted(path.name for path in fast_path.iterdir()) == ["in", "out", "whole"]


def test_what_a_commit_says_is_in_the_files(tmp_path):
    """And not in this process's memory, which kill -9 empties."""
    found, cfg = sources_of(write_jsonl(tmp_path / "x.jsonl", stories(40)), shard_tokens=700)
    commit, seen = writer.Ledger.commit, []

    def checked_commit(self, **notes):
        files = notes["state"]["files"].values() if "state" in notes else ()
        for name, n_tokens in itertools.chain(*files):
            assert (tmp_path / ".out.building/corpus" / name).stat().st_size == 2 * n_tokens
            seen.append(name)
        commit(self, **notes)

    with task_size(100), commit_always(), mock.patch.object(writer.Ledger, "commit", checked_commit):
        prepare.prepare(found, tmp_path / "out", cfg)
    assert len(set(seen)) > 3 and len(seen) > 30


@contextlib.contextmanager
def recorded_tasks(stop_at=None):
    """The first line of each task that is tokenized, as a list; interrupt at the task of this number."""
    tokenize, lines = workers.TaskTokenizer.__call__, []

    def record(self, task):
        lines.append(task.first)
        if len(lines) == stop_at:
            raise KeyboardInterrupt
        return tokenize(self, task)

    with mock.patch.object(workers.TaskTokenizer, "__call__", record):
        yield lines


def test_interrupted_preparation_goes_on_where_it_stopped(tmp_path):
    """And does not begin anew: only the tasks that are left are tokenized."""
    found, cfg = sources_of(write_jsonl(tmp_path / "x.jsonl", stories(40)))
    with task_size(100), recorded_tasks() as lines:
        with stop_after_commit(9), pytest.raises(KeyboardInterrupt):
            prepare.prepare(found, tmp_path / "out", cfg)
        assert len(lines) == 8
        prepare.prepare(found, tmp_path / "out", cfg)
    assert lines == sorted(set(lines)) and len(lines) > 15


@pytest.mark.parametrize("owner, name, commits", [
    (workers.TaskTokenizer, "__call__", commit_never),
    (writer.ShardWriter, "write", commit_never),
    (writer.Ledger, "add", commit_never),
    (writer, "sync_to_disk", commit_always),
    (writer.Ledger, "commit", commit_always),
], ids=lambda value: getattr(value, "__name__", value))
def test_an_interruption_costs_only_what_is_under_way(fast_path, owner, name, commits):
    """What is tokenized is committed before it ends; what is under way is done again."""
    found, cfg = sources_of(write_jsonl(fast_path / "x.jsonl", stories(60)), shard_tokens=700)
    out, real, calls, n_runs = fast_path / "out", getattr(owner, name), [], 0
    with task_size(100):
        prepare.prepare(found, fast_path / "whole", cfg)

    def interrupt(*arguments, **options):
        calls.append(getattr(arguments[-1], "first", None))
        if len(calls) in (5, 14):
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with task_size(100), commits(), mock.patch.object(owner, name, interrupt):
        while not out.exists():
            with contextlib.suppress(KeyboardInterrupt):
                prepare.prepare(found, out, cfg)
            n_runs += 1
    assert n_runs > 1 and contents(out) == contents(fast_path / "whole")
    if name == "__call__":
        assert calls[4] == calls[5] and calls[13] == calls[14] and len(calls) == len(set(calls)) + 2


def test_a_disk_that_is_full_at_an_interruption_costs_nothing(tmp_path):
    """Then there is no last commit, and the one before still counts."""
    found, cfg = sources_of(write_jsonl(tmp_path / "x.jsonl", stories(60)))
    commit = writer.Ledger.commit
    with task_size(100), commit_always(), recorded_tasks(stop_at=9) as lines:

        def commit_unless_full(self, **notes):
            if len(lines) == 9:
                raise OSError("No space left on device")
            commit(self, **notes)

        with mock.patch.object(writer.Ledger, "commit", commit_unless_full), pytest.raises(KeyboardInterrupt):
            prepare.prepare(found, tmp_path / "out", cfg)
        prepare.prepare(found, tmp_path / "out", cfg)
    assert lines[8] == lines[9] and len(lines) == len(set(lines)) + 1
    assert texts_in(tmp_path / "out") == by_split(stories(60), 0.3)


@pytest.mark.parametrize("write, variant, last, place", [
    (as_jsonl, ".jsonl", "\ud800", ":40:"),
    (as_jsonl, ".jsonl.xz", "\ud800", ":40:"),
    (as_parquet, "none", None, ", record 40:"),
    (as_separated, "", "wrong", "at byte {};"),
    (as_separated, ".gz", "wrong", "at byte {};"),
])
def test_places_are_right_after_an_interruption(tmp_path, write, variant, last, place):
    """What is wrong with a source is reported with the same place as without an interruption."""
    texts = [*stories(39), last]
    (path,), settings = write(tmp_path, variant, texts)
    if write is as_separated:
        raw = b"\n%%\t\n".join(text.encode() for text in texts).replace(b"wrong", b"\xff")
        path.write_bytes(compressed(variant, raw))
        place = place.format(len(raw) - 1)
    with task_size(100):
        with stop_after_commit(7), pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "out", path, **settings)
        with pytest.raises(ValueError, match=f"^{path}.*{place}"):
            prepared(tmp_path / "out", path, **settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.building").exists()


@pytest.mark.parametrize("limit", [1 << 30, 100])
@pytest.mark.parametrize("moment", [
    "train.bin has its name", "val.bin too", "meta.json is half written", "all is done"])
def test_killed_between_the_last_steps(tmp_path, moment, limit):
    source, out = write_jsonl(tmp_path / "x.jsonl", stories(30)), tmp_path / "out"
    meta = prepared(tmp_path / "whole", source, val=0.3, shard_tokens=limit)
    finish = prepare.finish

    def stop_while_finishing(sources, folder, *arguments):
        finish(sources, folder, *arguments)
        if moment != "all is done":
            (folder / "token_bytes.bin").unlink()
            (folder / "meta.json").unlink()
        if moment == "meta.json is half written":
            (folder / "meta.json").write_text("{", encoding="utf-8")
        if moment == "train.bin has its name" and limit > 100:
            (folder / "val.bin").rename(folder / "val_00000.bin")
        raise KeyboardInterrupt

    with mock.patch.object(prepare, "finish", stop_while_finishing), pytest.raises(KeyboardInterrupt):
        prepared(out, source, val=0.3, shard_tokens=limit)
    assert prepared(out, source, val=0.3, shard_tokens=limit) == meta
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_before_the_last_act(run_data, tmp_path):
    """The corpus is there, and so is what was used to make it: that is thrown away."""
    write_jsonl(tmp_path / "x.jsonl", stories(30))
    assert run_data("x.jsonl")[0] == 0
    before = contents("corpora")
    Path("corpora/.x.building").mkdir()
    write_txt(Path("corpora/.x.building/ledger.sqlite"), "")
    code, _, err = run_data("x.jsonl")
    assert (code, err) == (2, "data.py: corpora/x exists; remove it or choose another --name\n")
    assert contents("corpora") == before and not list(Path("corpora").glob(".*"))


# ------------------------------------------------------------------------------------- what has changed


@pytest.fixture
def interrupted(run_data, tmp_path):
    """A preparation of x.jsonl and y.jsonl that was interrupted."""
    write_jsonl(tmp_path / "x.jsonl", stories(30))
    write_jsonl(tmp_path / "y.jsonl", stories(30, 30))
    with task_size(100), stop_after_commit(5):
        code, _, err = run_data("x.jsonl", "y.jsonl", "--name=z", "--val=0.3")
    assert (code, err) == (130, INTERRUPTED)


def one_line(err):
    return err.startswith("data.py: ") and err.count("\n") == 1


def grow(path):
    path.write_bytes(path.read_bytes() + b"\n")


def touch(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def rewrite(path):
    """Give a file another content of the same size."""
    path.write_bytes(path.read_bytes().replace(b"Document", b"document"))


def add(path):
    write_jsonl(path, stories(1))


BOTH = ["x.jsonl", "y.jsonl"]


@pytest.mark.parametrize("names, flag, change, message", [
    (BOTH, "", (grow, "y.jsonl"), "y.jsonl changed since the preparation in corpora/.z.building began"),
    (BOTH, "", (touch, "x.jsonl"), "x.jsonl changed since"),
    (BOTH, "", (rewrite, "x.jsonl"), "x.jsonl changed since"),
    (["x.jsonl"], "", None, "y.jsonl changed since"),
    ([*BOTH, "new.jsonl"], "", (add, "new.jsonl"), "new.jsonl changed since"),
    (BOTH[::-1], "", None, "order changed since"),
    (BOTH, "--dedup=False", None, "other settings (dedup True → False)"),
    (BOTH, "--shard_tokens=1000", None, "other settings (shard_tokens 1073741824 → 1000)"),
    (BOTH, "--tokenizer=other.json", None, "other settings (tokenizer 'bytes' → 'tokenizer.json "),
], ids=["grown", "touched", "rewritten", "fewer", "more", "order", "dedup", "shards", "tokenizer"])
def test_what_changed_is_named(run_data, interrupted, names, flag, change, message):
    write_bpe(Path("other.json"))
    if change:
        function, name = change
        function(Path(name))
    argv = [*names, "--val=0.3", *filter(None, [flag])]
    before = contents("corpora")
    code, _, err = run_data(*argv, "--name=z")
    assert code == 2 and one_line(err) and message in err and "--restart" in err
    assert contents("corpora") == before  # it can still go on as it was
    assert run_data(*argv, "--name=fresh")[0] == 0
    code, _, err = run_data(*argv, "--name=z", "--restart")
    assert code == 0, err
    assert contents("corpora/z") == contents("corpora/fresh") and not list(Path("corpora").glob(".*"))


def test_dataset_that_changed(run_data, tmp_path, offline):
    as_dataset(tmp_path, "", stories(30))
    with task_size(100), stop_after_commit(5):
        assert run_data("saved", "--name=z")[0] == 130
    shutil.rmtree("saved")
    as_dataset(tmp_path, "", [text.upper() for text in stories(30)])
    code, _, err = run_data("saved", "--name=z", "--workers=1")
    message = "saved changed since the preparation in corpora/.z.building began; start again with --restart\n"
    assert code == 2 and err.endswith(message)


def test_neutral_settings_may_change(run_data, interrupted):
    """The number of processes is no setting of the result."""
    assert run_data(*BOTH, "--name=z", "--val=0.3", "--workers=1", "--val_share=0.2")[0] == 0
    assert texts_in("corpora/z") == by_split(stories(60), 0.3)


@pytest.mark.parametrize("change", [grow, touch, rewrite, Path.unlink])
def test_source_that_changes_while_it_is_read(data_refuses, tmp_path, change):
    source = write_jsonl(tmp_path / "x.jsonl", stories(30))
    check_unchanged = prepare.check_unchanged

    def change_first(found):
        change(source)
        check_unchanged(found)

    message = "x.jsonl changed while it was read; start again"
    if change is Path.unlink:
        message = "x.jsonl: No such file"
    with mock.patch.object(prepare, "check_unchanged", change_first):
        data_refuses("x.jsonl", message=message)


def test_damaged_ledger(run_data, interrupted):
    Path("corpora/.z.building/ledger.sqlite").write_bytes(b"no database" * 1000)
    argv = [*BOTH, "--name=z", "--val=0.3"]
    code, _, err = run_data(*argv)
    assert code == 2 and one_line(err) and "--restart" in err
    assert run_data(*argv, "--restart")[0] == 0
    assert texts_in("corpora/z") == by_split(stories(60), 0.3)


@pytest.mark.parametrize("n", [40, 41], ids=["same", "other"])
def test_standard_input_after_an_interruption(run_data, n):
    argv = ["-", "--format=jsonl"]
    with task_size(100), stop_after_commit(5):
        assert run_data(*argv, stdin=jsonl(stories(40)))[0] == 130
    code, _, err = run_data(*argv, stdin=jsonl(stories(n)))
    if n == 41:
        assert code == 2 and one_line(err) and "stdin.jsonl" in err and "--restart" in err
        code, _, err = run_data(*argv, "--restart", stdin=jsonl(stories(n)))
    assert code == 0 and texts_in("corpora/stdin") == by_split(stories(n), 0.1), err


def test_other_standard_input_does_not_cost_what_was_done(run_data):
    argv = ["-", "--format=jsonl"]
    with task_size(100), stop_after_commit(5):
        assert run_data(*argv, stdin=jsonl(stories(40)))[0] == 130
    assert run_data(*argv, stdin=jsonl(stories(41)))[0] == 2
    code, _, err = run_data(*argv, stdin=jsonl(stories(40)))
    assert code == 0, err


def test_two_preparations_of_one_name(tmp_path):
    cfg, refusals = prepare.Config(), []
    found = sources.find_sources([str(write_jsonl(tmp_path / "x.jsonl", stories(30)))], cfg)

    def prepare_too(*_):
        with pytest.raises(ValueError, match="another process is preparing .*/.out.building"):
            prepare.prepare(found, tmp_path / "out", cfg)
        refusals.append(1)

    prepare.prepare(found, tmp_path / "out", cfg, prepare_too)
    assert refusals and texts_in(tmp_path / "out") == by_split(stories(30), 0.1)


def test_an_older_versions_preparation_is_not_gone_on_with(tmp_path):
    """Of the same text another version makes other tokens: a line says so, and what is done stays."""
    source, out = write_jsonl(tmp_path / "x.jsonl", stories(40)), tmp_path / "out"
    with task_size(100), stop_after_commit(3), pytest.raises(KeyboardInterrupt):
        prepared(out, source, val=0.3)
    ledger = writer.Ledger(tmp_path / ".out.building/ledger.sqlite")
    plan, state = ledger.read("plan"), ledger.read("state")
    del plan["options"]["version"], state["without_separator"]
    for counts in state["counts"].values():
        del counts["token_bytes"]
    ledger.commit(plan=plan, state=state)
    ledger.close()
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"other settings \(version None → 2\); finish that one, or"):
        prepared(out, source, val=0.3)
    assert contents(tmp_path).keys() == before.keys()
    prepared(out, source, val=0.3, restart=True)
    assert texts_in(out) == by_split(stories(40), 0.3)
