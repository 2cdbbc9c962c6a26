"""tasks.py: local data sets of every layout, groups, errors, and the scores that a rigged model must get."""

import json
import random

import numpy as np
import pytest
from conftest import litter

pytest.importorskip("lm_eval")

from evaluation_fixtures import hellaswag, mmlu, rigged, write_lines

from evaluation import tasks


def open_and_run(model, names, **where):
    return tasks.run_tasks(model, tasks.open_tasks(names, **where))


# scores -----------------------------------------------------------------------------------------------------

PAIRS = ("published", "masked"), ("hub", "ar")  # where a data set lies has nothing to do with who is asked


@pytest.mark.parametrize("layout, objective", PAIRS)
def test_hellaswag_by_the_price_of_bytes(request, layout, objective):
    folder, rows = request.getfixturevalue(layout), hellaswag(8)
    # every byte costs the same: the shortest ending has the best sum, acc; per byte all are equal
    scores = open_and_run(rigged({}, objective, masks=16), ["hellaswag"], task_data=folder)["hellaswag"]
    shortest = [int(np.argmin([len(ending) for ending in row["endings"]])) for row in rows]
    assert scores["acc"] == np.mean([best == row["label"] for best, row in zip(shortest, rows)])
    assert scores["examples"] == 8 and scores["shots"] == 0
    # t is cheap, all else dear: per byte the ending with most of it wins
    model = rigged({"t": 1.0}, objective, masks=400)
    scores = open_and_run(model, ["hellaswag"], task_data=folder)["hellaswag"]
    best = []
    for row in rows:
        prices = [np.mean([1.0 if c == "t" else 5.0 for c in " " + ending]) for ending in row["endings"]]
        best.append(int(np.argmin(prices)))
    assert scores["acc_norm"] == np.mean([number == row["label"] for number, row in zip(best, rows)])


@pytest.mark.parametrize("layout, objective", PAIRS)
def test_mmlu_and_the_paper_s_variant_of_it(request, layout, objective):
    """C always wins; of the groups' subjects only two are there."""
    folder = request.getfixturevalue(layout)
    scores = open_and_run(rigged({"C": 0.1}, objective), ["mmlu"], task_data=folder)
    for k, subject in enumerate(("abstract_algebra", "anatomy")):
        line = scores[f"mmlu_{subject}"]
        assert line["acc"] == np.mean([right == 2 for _, _, right in mmlu(8, k)]) and line["examples"] == 8
    assert scores["mmlu"]["examples"] == scores["mmlu_stem"]["examples"] == 16
    subjects = scores["mmlu_abstract_algebra"]["acc"], scores["mmlu_anatomy"]["acc"]
    assert scores["mmlu"]["acc"] == pytest.approx(sum(subjects) / 2)
    # the paper's: answers are the choices themselves, on the validation split
    prices = {"0": 0.1, "1": 0.2, "2": 0.3, "3": 0.4, "4": 0.5}
    scores = open_and_run(rigged(prices, objective), ["paper"], task_data=folder)
    first_is_right = [(i + k) % 4 == 0 for k in range(2) for i in range(6)]
    assert scores["mmlu_val"]["acc"] == pytest.approx(np.mean(first_is_right)) and "hellaswag" in scores
    assert scores["mmlu_val_abstract_algebra"]["examples"] == 6


def test_a_part_called_default_has_no_name_in_files(tmp_path):
    """LAMBADA as on the hub: its only part is called `default`, and other languages lie beside it."""
    (tmp_path / "lambada_openai/data").mkdir(parents=True)
    texts = [dict(text="a b c d"), dict(text="e f g")]
    write_lines(tmp_path / "lambada_openai/data/lambada_test.jsonl", texts)
    write_lines(tmp_path / "lambada_openai/data/lambada_test_de.jsonl", [dict(text="x y")])
    (task,) = tasks.open_tasks(["lambada_openai"], task_data=tmp_path)
    assert [record["text"] for record in task.dataset["test"]] == ["a b c d", "e f g"]
    files = tasks.local_files(tmp_path / "lambada_openai", "default")
    assert files == tasks.local_files(tmp_path / "lambada_openai", None) and list(files) == ["test"]
    (tmp_path / "other/default").mkdir(parents=True)  # whoever keeps its files in a folder of that name, too
    write_lines(tmp_path / "other/default/validation-00000-of-00001.jsonl", texts)
    assert list(tasks.local_files(tmp_path / "other", "default")) == ["validation"]
    assert tasks.local_files(tmp_path / "lambada_openai", "english") == {}  # any other name is looked for


def test_few_shots_come_from_where_the_task_says(published):
    model = rigged({}, "ar")
    opened = tasks.open_tasks(["mmlu_anatomy", "hellaswag"], task_data=published)
    tasks.run_tasks(model, opened, limit=2, fewshot=3)
    rows = [row for batch in model.scorer.objective.batches for row in batch.tokens.tolist()]
    texts = [bytes(i for i in row if i < 256).decode() for row in rows]
    start = "The following are multiple choice questions (with answers) about anatomy."
    assert any(text.startswith(start) and text.count("Answer:") == 4 for text in texts)
    assert any(text.count("Making tea: A man boils") == 4 for text in texts)


def test_every_filter_has_its_score(own_task):
    strict = "{name: strict, filter: [{function: regex, regex_pattern: 'x(.)'}, {function: take_first}]}"
    loose = "{name: loose, filter: [{function: take_first}]}"
    folder = own_task(f"filter_list: [{strict}, {loose}]\n")
    model = rigged({})
    model.generate_until = lambda requests, disable_tqdm=False: ["9"] * len(requests)
    scores = open_and_run(model, ["squares"], task_path=folder)["squares"]
    assert {"exact_match:strict", "exact_match:loose"} <= set(scores)


# files ------------------------------------------------------------------------------------------------------


def test_files_of_every_layout(tmp_path):
    for name in ("hellaswag_train.jsonl", "data/test-00000-of-00002.parquet", "anatomy/validation.json",
                 "val/anatomy_val.csv", "dev/high_school_anatomy_dev.csv", "dataset_infos.json", "README.md",
                 "notes.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    litter(tmp_path)

    def names(part):
        files = tasks.local_files(tmp_path, part)
        return {split: [path.name for path in paths] for split, paths in files.items()}

    anatomy = dict(validation=["validation.json", "anatomy_val.csv"])
    assert names("anatomy") == anatomy
    assert names(None) == anatomy | dict(
        train=["hellaswag_train.jsonl"], test=["test-00000-of-00002.parquet"],
        dev=["high_school_anatomy_dev.csv"])


def test_csv_with_and_without_a_header(tmp_path):
    (tmp_path / "a.csv").write_text('q,"x, y"\n1,2\n', encoding="utf-8")
    (tmp_path / "b.csv").write_text('"Is, ""it""?",1,2,3,4,D\n', encoding="utf-8")
    assert tasks.read_records(tmp_path / "a.csv") == [{"q": "1", "x, y": "2"}]
    record = dict(question='Is, "it"?', choices=list("1234"), answer=3)
    assert tasks.read_records(tmp_path / "b.csv") == [record]


def test_lines_end_where_records_end(tmp_path):
    """Separators that Python's splitlines knows and JSON and CSV do not."""
    record = dict(a="x\u2028y\x85z")
    (tmp_path / "a.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text('"Is it\x85\u2028?\nSay",1,2,3,4,A\nWhat?,1,2,3,4,B\n', encoding="utf-8")
    assert tasks.read_records(tmp_path / "a.jsonl") == [record]
    questions = [record["question"] for record in tasks.read_records(tmp_path / "a.csv")]
    assert questions == ["Is it\x85\u2028?\nSay", "What?"]


# errors -----------------------------------------------------------------------------------------------------


def test_unknown_tasks_and_missing_data(published, tmp_path):
    (tmp_path / "mmlu").mkdir()  # nothing in it: that is no score
    for names, folder, message in (
        (["hellaswagg"], "", "none is called hellaswagg; there are hellaswag"),
        (["mmlu_virology"], published, "data of mmlu_virology are not in"),  # a subject that isn't there
        (["mmlu", "mmlu_anatomy"], published, "Duplicate task"),
        (["mmlu"], tmp_path, "the data of mmlu are not in"),
        (["mmlu_val"], tmp_path, "the data of mmlu_val are not in"),
        (["arc_easy"], tmp_path, "ai2_arc: there is no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.open_tasks(names, task_data=folder)


def test_files_that_are_no_records(tmp_path):
    (tmp_path / "hellaswag").mkdir()
    write_lines(tmp_path / "hellaswag/train.jsonl", hellaswag(1))
    with pytest.raises(ValueError, match="have no 'validation'"):
        tasks.open_tasks(["hellaswag"], task_data=tmp_path)
    validation = tmp_path / "hellaswag/validation.jsonl"
    validation.write_text("{broken\n", encoding="utf-8")
    with pytest.raises(ValueError, match="validation.jsonl can't be read"):
        tasks.open_tasks(["hellaswag"], task_data=tmp_path)
    for content in ("", "[1]\n", "3\n", '{"a": 1}\n'):
        validation.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError) as problem:
            tasks.open_tasks(["hellaswag"], task_data=tmp_path)
        assert "--task_data" not in str(problem.value) and "\n" not in str(problem.value)


def test_tasks_of_ones_own_that_are_broken(own_task):
    for folder, message in (
        (lambda: own_task(question="{{question"), "TemplateSyntaxError"),
        (lambda: own_task("a: ["), "squares.yaml"),
        (lambda: own_task("unsafe_code: true\n"), "runs code that a model wrote"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.open_tasks(["squares"], task_path=folder())


def test_groups_say_what_they_lack(published):
    lines = []
    tasks.open_tasks(["mmlu"], task_data=published, warn=lines.append)
    note = f"{published / 'mmlu'} has the data of 2 of 57 parts of mmlu; the others are left out"
    assert lines == [f"note: {note}"]
    lines.clear()
    tasks.open_tasks(["hellaswag"], task_data=published, warn=lines.append)
    assert lines == []


def test_random_numbers_of_tasks_are_the_same_each_time_and_stay_in_there():
    random.seed(7)
    with tasks.fixed_seed(3):
        first = random.random(), np.random.rand()
    with tasks.fixed_seed(3):
        assert (random.random(), np.random.rand()) == first
    outside = random.random()
    random.seed(7)
    assert random.random() == outside
