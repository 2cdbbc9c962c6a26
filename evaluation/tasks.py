"""Tasks of lm-evaluation-harness: find them by name, with data of the hub or of a local folder, and run them.

Needs the package lm-eval: pip install '.[eval]'.
"""

import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import io
import json
import logging
import os
import random
import re
import sys
from pathlib import Path

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.group import Group
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from corpus.files import check_file, list_folder

# Quokka's figures call them `hellaswag` and `mmlu_val`. Its 1B models reach 30 to 36 % on the latter, where
# models of that size guess when they have to name a letter: so its answers are the choices themselves, on
# MMLU's validation split. (The paper doesn't say; HellaSwag's 59 % are acc_norm's.)
PAPER = {"paper": ["hellaswag", "mmlu_val"]}

# -------------------------------------------------------------------------------------------- local data sets

SPLITS = dict(train="train", auxiliary_train="auxiliary_train", validation="validation", valid="validation",
              val="validation", dev="dev", test="test")


def read_records(path):
    """Read the records of a .jsonl, .json, .parquet or .csv file: a list of dicts.

    Raises ValueError, or as the formats' readers do. MMLU's own .csv has no header: question, A, B, C, D,
    letter.
    """
    check_file(path)
    ending = path.suffix.lower()
    if ending == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if ending == ".csv":
        return csv_records(text)
    if ending == ".jsonl":
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    else:
        records = json.loads(text)
    if not records:
        raise ValueError("it is empty")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("expected records, one a line")
    return records


def csv_records(text):
    """The records of a .csv's text, with or without a header."""
    rows = [row for row in csv.reader(io.StringIO(text, newline="")) if any(map(str.strip, row))]
    if rows and len(rows[0]) == 6 and all(row[5] in "ABCD" and row[5] for row in rows):
        return [dict(question=row[0], choices=row[1:5], answer="ABCD".index(row[5])) for row in rows]
    return [dict(zip(rows[0], row)) for row in rows[1:]]


def local_files(folder, name):
    """{split: files} of a data set in `folder`, of its part `name` if it has one.

    As on the Hugging Face hub (NAME/test-00000-of-00001.parquet, data/test.jsonl), or as its authors
    published it (hellaswag_val.jsonl, val/NAME_val.csv). What the hub calls `default` has no name.
    """
    name = None if name == "default" else name
    files = {}
    for path in list_folder(folder, "**/*"):
        is_data = path.suffix.lower() in (".jsonl", ".json", ".parquet", ".csv")
        if not is_data or path.name == "dataset_infos.json":
            continue
        *parents, stem = path.relative_to(folder).with_suffix("").parts
        words = re.split(r"[-_.]", stem)
        candidates = (words[-1], words[0], *parents[::-1])
        split = next((SPLITS[word] for word in candidates if word in SPLITS), None)
        is_named = stem.startswith(f"{name}_") and stem[len(name) + 1 :] in SPLITS if name else True
        if split and (is_named or name in parents):
            files.setdefault(split, []).append(path)
    return files


def read_dataset(files, **_):
    """A datasets.DatasetDict from local files, {split: paths}; raises ValueError."""
    import datasets

    splits = {}
    for split, paths in files.items():
        records = splits.setdefault(split, [])
        for path in paths:
            try:
                records.extend(read_records(path))
            except Exception as problem:  # json's, pyarrow's, of the encoding …
                raise ValueError(f"{path} can't be read as records: {problem}") from None
    return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})


# ---------------------------------------------------------------------------------------------- finding tasks


@functools.cache
def harness_tasks():
    """The harness's TaskManager of its own tasks: thousands of files, seconds."""
    return TaskManager()


def leaf_names(index, name):
    """The names of the tasks that a task, group or tag of the harness's index consists of: a set.

    Those that are not in the index are in it, too.
    """
    if name not in index:
        return {name}
    entry = index[name]
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if isinstance(members, str) or members is None:
        return {name}
    names = set()
    for member in members:
        if isinstance(member, str):
            names |= leaf_names(index, member)
        elif isinstance(member.get("task"), list):  # a group within the group
            for inner in member["task"]:
                names |= leaf_names(index, inner if isinstance(inner, str) else inner.get("task"))
        else:
            names |= leaf_names(index, member.get("task") or member.get("group"))
    return names


def find_tasks(names, task_path, task_data, warn):
    """A TaskManager that knows the tasks `names`, those of the folder `task_path` too; raises ValueError.

    With `task_data` their data come from that folder and nowhere else: from folders called as on the hub,
    without their owner. Parts of groups whose data are not there are left out.
    """
    import datasets

    datasets.disable_progress_bars()
    check_yaml(task_path)
    manager = copy.copy(harness_tasks())
    entries = dict(manager._index)
    if task_path:
        entries |= TaskManager(include_path=str(task_path), include_defaults=False)._index
    index = {name: dataclasses.replace(entry, tags=set(entry.tags)) for name, entry in entries.items()}
    manager._index = index
    index["mmlu_val"] = mmlu_val(index)

    for name in names:
        if name not in index and not Path(name).is_file():
            near = difflib.get_close_matches(name, list(index), n=3)
            hint = f"; there are {', '.join(near)}" if near else ""
            raise ValueError(f"tasks: none is called {name}{hint}; for tasks of your own give --task_path")
    if task_data:
        missing = set()
        for name in names:
            missing |= use_local_data(index, name, task_data, warn)
        leave_out(index, missing)
    return manager


def check_yaml(task_path):
    """Raise ValueError for a .yaml file that can't be read: the harness leaves it out without a word."""
    for path in list_folder(task_path, "**/*.yaml") if task_path else ():
        try:
            load_yaml(path, resolve_func=False, recursive=True)
        except Exception as problem:
            reason = str(problem).splitlines()[0]
            raise ValueError(f"{path}: {type(problem).__name__}: {reason}") from None


def mmlu_val(index):
    """The index's entry of a group that the harness lacks: MMLU's validation split, choices as answers."""
    parts = [name for name in index if re.fullmatch(r"mmlu_\w+_continuation", name)]
    subjects = [name for name in parts if isinstance((index[name].cfg or {}).get("task"), str)]
    config = dict(
        group="mmlu_val",
        task=[dict(task=name, test_split="validation") for name in subjects],
        aggregate_metric_list=[dict(metric=metric, weight_by_size=True) for metric in ("acc", "acc_norm")],
        metadata=dict(version=1),
    )
    return dataclasses.replace(index["mmlu"], name="mmlu_val", yaml_path=None, cfg=config)


def use_local_data(index, name, task_data, warn):
    """Let the tasks of `name` read their data from the folder task_data; returns those that are not there.

    Raises ValueError where none is.
    """
    members, missing, folders = leaf_names(index, name), set(), set()
    for leaf in sorted(members):
        entry = index.get(leaf)
        dataset = (entry.cfg or {}).get("dataset_path") if entry else None
        if not dataset or not entry.yaml_path or (entry.cfg.get("dataset_kwargs") or {}).get("data_files"):
            continue  # done already; or of a file of its own
        folder = Path(task_data) / str(dataset).rpartition("/")[2]
        folders.add(folder)
        files = local_files(folder, entry.cfg.get("dataset_name")) if folder.is_dir() else {}
        if not files:
            missing.add(leaf)
            continue
        config = load_yaml(entry.yaml_path, resolve_func=True)
        config["custom_dataset"] = functools.partial(read_dataset, files)
        for key in ("training_split", "fewshot_split"):
            if config.get(key) not in files:
                config[key] = None  # examples then come from the evaluated split
        entry.cfg, entry.yaml_path = config, None

    where = ", ".join(map(str, sorted(folders)))
    if missing and missing == members:
        hint = "" if all(folder.is_dir() for folder in folders) else ": there is no such folder"
        raise ValueError(f"tasks: the data of {name} are not in {where}{hint}")
    if missing:
        there = len(members) - len(missing)
        warn(f"note: {where} has the data of {there} of {len(members)} parts of {name}; "
             "the others are left out")
    return missing


def leave_out(index, names):
    """Remove tasks from the harness's index, and from the tags and from mmlu_val."""
    for name in names:
        index.pop(name, None)
        for entry in index.values():
            entry.tags.discard(name)
    group = index["mmlu_val"].cfg
    group["task"] = [member for member in group["task"] if member["task"] not in names]


# ---------------------------------------------------------------------------------------- opening and running

NO_OTHERS = TaskManager(include_defaults=False)  # loads only what is there already


@contextlib.contextmanager
def fixed_seed(seed=1234):
    """Seed Python's and numpy's own random numbers inside; outside nothing changes.

    Some tasks shuffle their choices with them.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def open_tasks(names, task_path="", task_data="", warn=lambda line: print(line, file=sys.stderr)):
    """Open the harness's tasks and groups of these names with their data sets: a list. Raises ValueError."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    expanded = []
    for name in names:
        expanded += PAPER.get(name, [name])
    manager = find_tasks(list(dict.fromkeys(expanded)), task_path, task_data, warn)
    loaded = load_tasks(manager, list(dict.fromkeys(expanded)), f"tasks {', '.join(names)}: ", task_data)

    groups = loaded.get("groups", {})
    inside = set()  # tasks and groups that belong to a group
    for group in groups.values():
        inside |= {task.task_name for task in group.get_all_tasks()}
        inside |= {inner.name for inner in group.get_all_groups()}
    return [task for name, task in [*groups.items(), *loaded["tasks"].items()] if name not in inside]


def load_tasks(manager, names, prefix, task_data):
    """Load tasks and their data sets; every problem is a ValueError of one line that begins with `prefix`."""
    try:
        with fixed_seed():
            loaded = manager.load(names)
    except KeyError as problem:
        where = f" in {task_data}" if task_data else ""
        raise ValueError(f"{prefix}the data{where} have no {problem}") from None
    except OSError as problem:
        hint = "where there is no network, put the data sets into a folder and name that with --task_data"
        raise ValueError(f"{prefix}{str(problem).splitlines()[0]}; {hint}") from None
    except Exception as problem:  # jinja's, datasets', of functions that come with a task: all the task's
        kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
        reason = str(problem).partition("\n")[0]
        raise ValueError(f"{prefix}{kind}{reason}") from None
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ValueError(f"{prefix}{name} runs code that a model wrote: not here")
        if getattr(task, "MULTIMODAL", False):
            raise ValueError(f"{prefix}{name} has pictures or sound in it: not here")
    return loaded


def run_tasks(model, opened, limit=0, fewshot=-1, seed=1234):
    """Run the `opened` tasks: {task or group: {metric: value, metric_stderr: …, examples, shots}}.

    None on all ranks but the first. Metrics of several filters are called metric:filter. Exceptions of the
    tasks themselves are passed on.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap forks otherwise, whatever this process holds
    with fixed_seed(seed):
        results = simple_evaluate(
            model, tasks=opened, num_fewshot=None if fewshot < 0 else fewshot, limit=limit or None,
            log_samples=False, bootstrap_iters=1000, task_manager=NO_OTHERS, random_seed=None,
            numpy_random_seed=None, torch_random_seed=None, fewshot_random_seed=seed)
    if results is None or model.scorer.ranks.rank:
        return None

    examples = count_examples(results, opened)
    our_subjects = set()
    for task in opened:
        if isinstance(task, Group) and task.name == "mmlu_val":
            our_subjects |= {subject.task_name for subject in task.get_all_tasks()}
    scores = {}
    for name, line in results["results"].items():
        metrics = metrics_of(line)
        if not metrics:  # a group may be empty
            continue
        metrics |= dict(examples=examples.get(name), shots=results.get("n-shot", {}).get(name))
        if name in our_subjects:
            name = re.sub(r"^mmlu_(\w+)_continuation$", r"mmlu_val_\1", name)
        scores[name] = metrics
    return scores


def count_examples(results, opened):
    """{task or group: how many examples its scores are means over}."""
    count = {name: line["effective"] for name, line in results.get("n-samples", {}).items()}
    for task in opened:
        for group in [task, *task.get_all_groups()] if isinstance(task, Group) else ():
            count[group.name] = sum(count.get(leaf.task_name, 0) for leaf in group.get_all_tasks())
    return count


def metrics_of(line):
    """The numbers of a line of the harness's results: acc, acc_stderr, exact_match:strict-match, …"""
    metrics = {}
    for key, value in line.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or not isinstance(value, float | int):
            continue
        name = metric.removesuffix("_stderr")
        if filter_name != "none":
            name += f":{filter_name}"
        if metric.endswith("_stderr"):
            name += "_stderr"
        metrics[name] = value
    return metrics
