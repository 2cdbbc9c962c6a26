"""Fixtures of the tests of eval.py: it is called in this process; data sets and tasks are made here."""

import csv
import json
import sys
from types import SimpleNamespace

import pytest


def newest_report(run):
    """The folder of measurements of the run's newest checkpoint."""
    return sorted(run.glob("eval_*"))[-1]


def last_validation(run):
    from training.log import read_metrics

    return [m for m in read_metrics(run) if "val_loss" in m][-1]


@pytest.fixture
def run_eval(monkeypatch, capsys):
    """Call eval.main() in this process; returns (stdout, eval.json)."""

    import eval as evaluation

    def call(run, *flags, out=None):
        capsys.readouterr()
        flags = [*flags, f"--out={out}"] if out else flags
        monkeypatch.setattr(sys, "argv", ["eval.py", f"--run_dir={run}", "--device=cpu", *map(str, flags)])
        evaluation.main()
        return capsys.readouterr().out, json.loads(
            ((out or newest_report(run)) / "eval.json").read_text(encoding="utf-8")
        )

    return call


# tasks ------------------------------------------------------------------------------------------------------

ENDINGS = ["pours the tea into two cups and sits down", "pours the",
           "pours the car into a tree, and so on and so on", "is a cup"]
SUBJECTS = ("abstract_algebra", "anatomy")
MMLU_SIZES = dict(dev=5, validation=6, test=8)


def hellaswag(n):
    """Questions in HellaSwag's format; the right ending is number i mod 4."""
    return [dict(ind=i, activity_label="Making tea", ctx_a=f"[header] A man boils {i} cups of water.",
                 ctx_b="he", ctx="", split="val", split_type="indomain", label=i % 4, source_id=f"x{i}",
                 endings=ENDINGS[i % 4 :] + ENDINGS[: i % 4]) for i in range(n)]


def mmlu(n, subject=0):
    """(question, choices, number of the right one) of MMLU's subject number 0 or 1."""
    return [(f"What is {i} + 1, \"really\"?\nSay,", [str(i + j) for j in range(4)], (i + subject) % 4)
            for i in range(n)]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """As the authors published them: hellaswag_val.jsonl; MMLU's headerless .csv by split and subject."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "hellaswag").mkdir()
    for name in ("train", "val"):
        write_lines(folder / f"hellaswag/hellaswag_{name}.jsonl", hellaswag(8))
    for split, n in MMLU_SIZES.items():
        name = dict(validation="val").get(split, split)
        (folder / "mmlu" / name).mkdir(parents=True)
        for k, subject in enumerate(SUBJECTS):
            with open(
                folder / "mmlu" / name / f"{subject}_{name}.csv", "w", encoding="utf-8", newline=""
            ) as file:
                csv.writer(file).writerows([q, *choices, "ABCD"[right]] for q, choices, right in mmlu(n, k))
    return folder


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """As they lie on the hub: data/validation-….parquet, and a folder of parquet files for each subject."""
    import pyarrow
    import pyarrow.parquet

    def write(path, records):
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)

    folder = tmp_path_factory.mktemp("hub")
    write(folder / "hellaswag/data/validation-00000-of-00001.parquet",
          [row | dict(label=str(row["label"])) for row in hellaswag(8)])
    for split, n in MMLU_SIZES.items():
        for k, subject in enumerate(SUBJECTS):
            records = [dict(question=q, subject=subject, choices=choices, answer=right)
                       for q, choices, right in mmlu(n, k)]
            write(folder / f"mmlu/{subject}/{split}-00000-of-00001.parquet", records)
    return folder


TASK = """task: squares
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def own_task(tmp_path):
    """Write a task called `squares`, in which the model writes; returns the folder of its .yaml."""

    def write(more="", questions=1, **replaced):
        records = [dict(question=f"{i} squared is", answer=f" {i * i}, and its") for i in range(questions)]
        write_lines(tmp_path / "squares.jsonl", records)
        (tmp_path / "tasks").mkdir(exist_ok=True)
        text = TASK.replace("FILE", str(tmp_path / "squares.jsonl"))
        for old, new in replaced.items():
            text = text.replace("{{" + old + "}}", new)
        (tmp_path / "tasks/squares.yaml").write_text(text + more, encoding="utf-8")
        return tmp_path / "tasks"

    return write


class Rigged:
    """Stands in for Objective: a byte costs the nats of its price, and the likeliest is always a space."""

    training = False

    def __init__(self, prices, default=5.0):
        import torch

        self.prices, self.batches = torch.full((257,), default), []
        for letters, price in prices.items():
            self.prices[[ord(c) for c in letters]] = price

    def nats_at_positions(self, batch, likeliest=False):
        self.batches.append(batch)
        nats = self.prices[batch.targets]
        return (nats, batch.targets * 0 + 32, nats * 0 + 0.5) if likeliest else nats

    def train(self, mode=True):
        return self

    eval = train

    def modules(self):
        return ()


def rigged(prices, objective="masked", seq_len=2048, **settings):
    """A harness.NanoQuokka whose bytes cost what `prices` says."""
    import torch

    from corpus.tokenizers import ByteTokenizer
    from evaluation import harness
    from sampling.generator import Generator

    record = dict(settings=dict(objective=objective, loss="elbo", schedule="linear"),
                  model=dict(n_vocab=257, mask_id=257, seq_len=seq_len, causal=objective == "ar"))
    generator = Generator(record, ByteTokenizer(), torch.device("cpu"), False, SimpleNamespace())
    return harness.NanoQuokka(generator=generator, objective=Rigged(prices), **settings)
