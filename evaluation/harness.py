"""Our models in lm-evaluation-harness: AR, masked and uniform checkpoints, scored by likelihood.py, writing by decode.py.

Importing this registers the model class `nanoquokka`. `python eval.py --tasks=hellaswag` uses it; so may a script of yours:

    import harness, lm_eval
    lm_eval.simple_evaluate("nanoquokka", "run_dir=runs/quickstart", tasks=["hellaswag"])

Needs the package lm-eval: pip install '.[eval]'.
"""

import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
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
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from tqdm import tqdm

from evaluation import likelihood
from evaluation.likelihood import Question, Scorer
from sampling import decode
from training import distributed
from training.objective import Objective


@register_model("nanoquokka")
class NanoQuokka(TemplateLM):
    """A run or checkpoint. masks: noisy copies of an answer that has more masks than that; tokens: of a forward pass; steps, block and order: of
    what diffusion models write (steps 0: one per token). All ranks must ask for the same: the work is divided among them here."""

    def __init__(self, run_dir="runs/quickstart", device="auto", dtype="float32", masks=128, tokens=0, seed=0, order="low_confidence", steps=0, block=0,
                 max_gen_toks=256, batch_size=None, max_batch_size=None, writer=None, objective=None, ranks=distributed.SINGLE):  # fmt: skip
        super().__init__()
        if writer is None:
            from sampling.generator import Generator

            writer = Generator.of(run_dir, device or "auto", dtype).load()
        self.writer, self.tokenizer = writer, None
        self.scorer = Scorer(objective or Objective(writer.model, writer.posterior).eval(), writer.process, writer.device, writer.autocast, ranks, int(masks),
                             int(tokens) or (131_072 if writer.device.type == "cuda" else 16_384), int(seed), lambda: self.alive())
        self.how = decode.DecodeConfig(order=order, steps=int(steps), block=int(block), seed=int(seed), end=True) if writer.objective == "masked" else \
            decode.DecodeConfig(steps=int(steps), seed=int(seed), end=True, cache="prefix" if writer.objective == "ar" else "no")
        self.max_gen_toks, self._device = int(max_gen_toks), writer.device

    alive = staticmethod(lambda: None)  # called between passes
    eot_token_id = property(lambda self: self.writer.tokens.eos_id)

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.writer.tokens.encode(string).tolist()

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **_):
        return self.scored([Question(context, answer, text) for (text, _), context, answer in requests], disable_tqdm)

    def scored(self, questions, silent=False, greedy=True):
        """[(log p, whether greedy decoding writes it)] of likelihood.Question's. Raises ValueError if ranks ask for different things."""
        digest = hashlib.sha256(repr(questions).encode()).hexdigest()
        if len(set(distributed.all_gather(self.scorer.ranks, digest))) > 1:
            raise ValueError("the ranks read different questions: the task's data or its examples are drawn by chance, and not by the same")
        with tqdm(total=len(questions), desc="answers", disable=silent or self.scorer.ranks.rank > 0) as bar:

            def show(done, of):
                bar.total = of
                bar.update(done - bar.n)

            values, wrote = likelihood.answers(self.scorer, questions, self.eot_token_id, show, greedy)
        return [(float(value), bool(is_greedy)) for value, is_greedy in zip(values, wrote)]

    def loglikelihood(self, requests, disable_tqdm=False):
        """log p(continuation | context): exact for AR, the bound for diffusion models; the choices of a question share their random numbers.

        Tokens as for every model of the harness: spaces at the context's end go with the continuation; an empty context is the separator of documents.
        """
        questions, eos = [], self.eot_token_id
        for request in requests:
            context, continuation = request.args
            # what the choices have in common is the question's number; where there is none, their context
            key = f"{request.task_name} {request.doc_id}" if request.doc_id is not None else context
            if context:
                before, after = self._encode_pair(context, continuation)
                if continuation and not after:  # a tokenizer joined it to the context's last token
                    after = self.tok_encode(continuation)
            else:
                before, after = [eos], self.tok_encode(continuation)
                if after[:1] == [eos]:
                    before, after = after[:1], after[1:]
            questions.append(Question(before, after, key))
        found = self.scored(questions, disable_tqdm)
        for request, answer in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """log p of whole texts after a separator, in windows of the model's length: exact for AR, else the bound."""
        questions, owners = [], []
        for number, request in enumerate(requests):
            for part, (context, answer) in enumerate(likelihood.windows(self.tok_encode(request.args[0]), self.eot_token_id, self.scorer.size)):
                questions.append(Question(context, answer, f"{request.args[0][:64]} {part}"))
                owners.append(number)
        found = [0.0] * len(requests)
        for number, (value, _) in zip(owners, self.scored(questions, disable_tqdm, greedy=False)):
            found[number] += value
        for request, value in zip(requests, found):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests, disable_tqdm=False):
        """What is written after each context, up to the first of its stop sequences: greedy unless the task samples."""
        if distributed.is_sharded(self.scorer.objective):
            raise ValueError("tasks in which the model writes need whole weights on each rank: shard=no")
        writer, ranks, asked = self.writer, self.scorer.ranks, []
        for number, request in enumerate(requests):
            context, settings = request.args
            settings = normalize_gen_kwargs(settings, self.max_gen_toks)
            until = handle_stop_sequences(settings.get("until"), None)
            prompt = self.tok_encode(context) or [self.eot_token_id]
            n = min(settings["max_gen_toks"], max(writer.seq_len - len(prompt), writer.seq_len // 2))  # the prompt comes first, but for half of the context
            prompt = prompt[len(prompt) + n - writer.seq_len :] if len(prompt) + n > writer.seq_len else prompt
            how = self.how._replace(temperature=float(settings.get("temperature") or 0.0), top_k=int(settings.get("top_k") or 0), top_p=float(settings.get("top_p") or 1.0))
            asked.append((how, len(prompt), number, prompt + [writer.tokens.mask_id] * n, until))
        asked.sort(key=lambda a: (str(a[0]), len(a[3]), a[2]))
        texts, batches, at_once = {}, [], max(1, self.scorer.tokens // writer.seq_len)
        for _, alike in itertools.groupby(enumerate(asked), lambda pair: pair[1][0]):
            alike = list(alike)
            batches += [alike[i : i + at_once] for i in range(0, len(alike), at_once)]
        with likelihood.evaluating(self.scorer.objective):
            for some in tqdm(batches[ranks.rank :: ranks.world], desc="writing", disable=disable_tqdm or ranks.rank > 0):
                (first, (how, *_)), rows = some[0], [row for _, (_, _, _, row, _) in some]
                for (_, (_, n_prompt, number, _, until)), row in zip(some, writer.generate(rows, how, first, lambda z: self.alive()).rows):
                    texts[number] = postprocess_generated_text(writer.tokens.decode(row[n_prompt:]), until, None)
        for part in distributed.all_gather(ranks, texts):
            texts |= part
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]


# ----------------------------------------------------------------------------------------------------------- tasks

# The paper's figures call them `hellaswag` and `mmlu_val`. Its 1B models reach 30 to 36 % on the latter, where models of that size guess when they have to name
# a letter: so its answers are the choices themselves, on MMLU's validation split. (The paper doesn't say; HellaSwag's 59 % are acc_norm's.)
PAPER = {"paper": ["hellaswag", "mmlu_val"]}


def read_records(path):
    """The records of a .jsonl, .json, .parquet or .csv file; MMLU's own .csv has no header: question, A, B, C, D, letter."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix in (".jsonl", ".json"):
        found = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
        if not found or not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
            raise ValueError("expected records, one a line" if found else "it is empty")
        return found
    rows = list(csv.reader(io.StringIO(text, newline="")))
    if rows and len(rows[0]) == 6 and all(row[5] in "ABCD" and row[5] for row in rows):
        return [dict(question=row[0], choices=row[1:5], answer="ABCD".index(row[5])) for row in rows]
    return [dict(zip(rows[0], row)) for row in rows[1:]]


SPLITS = dict(train="train", auxiliary_train="auxiliary_train", validation="validation", valid="validation", val="validation", dev="dev", test="test")


def local_files(folder, name):
    """{split: files} of a data set that lies in `folder`: as on the Hugging Face hub (NAME/test-00000-of-00001.parquet, data/test.jsonl),
    or as its authors published it (hellaswag_val.jsonl, val/NAME_val.csv)."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".jsonl", ".json", ".parquet", ".csv") or path.name == "dataset_infos.json":
            continue
        *above, stem = path.relative_to(folder).with_suffix("").parts
        words = re.split(r"[-_.]", stem)
        split = next((SPLITS[word] for word in (words[-1], words[0], *above[::-1]) if word in SPLITS), None)
        if split and (not name or name in above or stem.startswith(f"{name}_") and stem[len(name) + 1 :] in SPLITS):
            found.setdefault(split, []).append(path)
    return found


@functools.cache
def all_tasks(task_path):
    """The harness's index of its tasks and those in a folder: thousands of files, seconds."""
    return TaskManager(include_path=task_path or None)


def leaves(index, name):
    """The names of the tasks that a task, group or tag of the harness's index consists of; those that are not in the index, too."""
    if name not in index:
        return {name}
    entry = index[name]
    members = entry.tags if entry.kind.name == "TAG" else (entry.cfg or {}).get("task")
    if isinstance(members, str) or members is None:
        return {name}
    found = set()
    for member in members:
        if isinstance(member, dict) and isinstance(member.get("task"), list):  # a group within the group
            found |= {leaf for inner in member["task"] for leaf in leaves(index, inner if isinstance(inner, str) else inner.get("task"))}
        else:
            found |= leaves(index, member if isinstance(member, str) else member.get("task") or member.get("group"))
    return found


def manager(asked, task_path, task_data, say):
    """A TaskManager that knows the tasks described in the folder `task_path`, too, and, if `task_data` is given, reads the data of those `asked` for from there and nowhere
    else: from folders called as on the hub, without their owner. Of groups, what isn't there is left out. Raises ValueError."""
    import datasets

    datasets.disable_progress_bars()
    for path in sorted(Path(task_path).rglob("*.yaml")) if task_path else ():
        try:
            load_yaml(path, resolve_func=False, recursive=True)
        except Exception as problem:  # the harness leaves such files out without a word
            raise ValueError(f"{path}: {type(problem).__name__}: {str(problem).splitlines()[0]}") from None
    found = copy.copy(all_tasks(str(task_path)))
    index = found._index = {name: dataclasses.replace(entry, tags=set(entry.tags)) for name, entry in found._index.items()}
    parts = [name for name in index if re.fullmatch(r"mmlu_\w+_continuation", name) and isinstance((index[name].cfg or {}).get("task"), str)]
    config = dict(group="mmlu_val", task=[dict(task=name, test_split="validation") for name in parts],
                  aggregate_metric_list=[dict(metric=metric, weight_by_size=True) for metric in ("acc", "acc_norm")], metadata=dict(version=1))
    index["mmlu_val"] = dataclasses.replace(index["mmlu"], name="mmlu_val", yaml_path=None, cfg=config)
    for name in asked:
        if name not in index and not Path(name).is_file():
            near = difflib.get_close_matches(name, list(index), n=3)
            raise ValueError(f"tasks: none is called {name}" + (f"; there are {', '.join(near)}" if near else "") + "; for tasks of your own give --task_path")
    gone = set()
    for name in asked if task_data else ():
        members, absent, folders = leaves(index, name), set(), set()
        for leaf in sorted(members):
            entry = index.get(leaf)
            dataset = (entry.cfg or {}).get("dataset_path") if entry else None
            if not dataset or not entry.yaml_path or (entry.cfg.get("dataset_kwargs") or {}).get("data_files"):
                continue  # done already; or of a file of its own
            folder = Path(task_data) / str(dataset).rpartition("/")[2]
            folders.add(folder)
            files = local_files(folder, entry.cfg.get("dataset_name")) if folder.is_dir() else {}
            if files:
                config = load_yaml(entry.yaml_path, resolve_func=True) | dict(custom_dataset=functools.partial(read_dataset, files))
                entry.cfg = config | {key: None for key in ("training_split", "fewshot_split") if config.get(key) not in files}  # examples then come from what is evaluated
                entry.yaml_path = None
            else:
                absent.add(leaf)
        if absent and absent == members:
            raise ValueError(f"tasks: the data of {name} are not in {', '.join(map(str, sorted(folders)))}" + ("" if all(f.is_dir() for f in folders) else ": there is no such folder"))
        if absent:
            say(f"note: {', '.join(map(str, sorted(folders)))} has the data of {len(members) - len(absent)} of {len(members)} parts of {name}; the others are left out")
        gone |= absent
    for name in gone:
        index.pop(name, None)
        for entry in index.values():
            entry.tags.discard(name)
    if gone:
        index["mmlu_val"].cfg["task"] = [member for member in index["mmlu_val"].cfg["task"] if member["task"] not in gone]
    return found


def read_dataset(files, **_):
    """A data set from local files, {split: paths}; raises ValueError."""
    import datasets

    found = {}
    for split, paths in files.items():
        for path in paths:
            try:
                found.setdefault(split, []).extend(read_records(path))
            except Exception as problem:  # json's, pyarrow's, of the encoding …
                raise ValueError(f"{path} can't be read as records: {problem}") from None
    return datasets.DatasetDict({split: datasets.Dataset.from_list(records) for split, records in found.items()})


NO_OTHERS = TaskManager(include_defaults=False)  # loads only what is there already


@contextlib.contextmanager
def by_the_same_chance(seed=1234):
    """Python's and numpy's own random numbers begin alike inside, since some tasks shuffle their choices with them; outside nothing changes."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def open_tasks(names, task_path="", task_data="", say=lambda line: print(line, file=sys.stderr)):
    """The harness's tasks and groups of these names, their data sets loaded; raises ValueError."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked, said = list(dict.fromkeys(name for task in names for name in PAPER.get(task, [task]))), f"tasks {', '.join(names)}: "
    known = manager(asked, task_path, task_data, say)
    try:
        with by_the_same_chance():
            found = known.load(asked)
    except KeyError as problem:
        raise ValueError(f"{said}the data" + f" in {task_data}" * bool(task_data) + f" have no {problem}") from None
    except OSError as problem:
        raise ValueError(f"{said}{str(problem).splitlines()[0]}; where there is no network, put the data sets into a folder and name that with --task_data") from None
    except Exception as problem:  # jinja's, datasets', of functions that come with a task: all of it is the task's
        kind = "" if isinstance(problem, ValueError) else f"{type(problem).__name__}: "
        raise ValueError(f"{said}{kind}{str(problem).splitlines()[0] if str(problem) else ''}") from None
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise ValueError(f"{said}{name} " + ("runs code that a model wrote" if getattr(task, "UNSAFE_CODE", False) else "has pictures or sound in it") + ": not here")
    inside = {task for group in found.get("groups", {}).values() for task in [t.task_name for t in group.get_all_tasks()] + [g.name for g in group.get_all_groups()]}
    return [thing for name, thing in [*found.get("groups", {}).items(), *found["tasks"].items()] if name not in inside]


def writing(opened):
    """The names of those tasks among `opened` in which the model writes."""
    leaves = [leaf for thing in opened for leaf in (thing.get_all_tasks() if isinstance(thing, Group) else [thing])]
    return [leaf.task_name for leaf in leaves if leaf.OUTPUT_TYPE == "generate_until"]


def run_tasks(model, opened, limit=0, fewshot=-1, seed=1234):
    """What the harness measures of the `opened` tasks: {task or group: {metric: value, metric_stderr: …, examples, shots}}; None on ranks but the first.

    Metrics of several filters are called metric:filter. What the tasks themselves raise is passed on.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap forks otherwise, whatever this process holds
    with by_the_same_chance(seed):
        found = simple_evaluate(model, tasks=opened, num_fewshot=None if fewshot < 0 else fewshot, limit=limit or None, log_samples=False, bootstrap_iters=1000,
                                task_manager=NO_OTHERS, random_seed=None, numpy_random_seed=None, torch_random_seed=None, fewshot_random_seed=seed)
    if found is None or model.scorer.ranks.rank:
        return None
    count = {name: line["effective"] for name, line in found.get("n-samples", {}).items()}
    for thing in opened:
        for group in [thing, *thing.get_all_groups()] if isinstance(thing, Group) else ():
            count[group.name] = sum(count.get(task.task_name, 0) for task in group.get_all_tasks())
    results, ours = {}, {task.task_name for thing in opened if isinstance(thing, Group) and thing.name == "mmlu_val" for task in thing.get_all_tasks()}
    for name, line in found["results"].items():
        figures = {}
        for key, value in line.items():
            metric, comma, filtered = key.partition(",")
            if comma and isinstance(value, float | int):
                what = metric.removesuffix("_stderr")
                figures[what + f":{filtered}" * (filtered != "none") + "_stderr" * metric.endswith("_stderr")] = value
        if figures:  # a group may be empty
            called = re.sub(r"^mmlu_(\w+)_continuation$", r"mmlu_val_\1", name) if name in ours else name
            results[called] = figures | dict(examples=count.get(name), shots=found.get("n-shot", {}).get(name))
    return results
