"""Our models in lm-evaluation-harness, on data sets made here in HellaSwag's and MMLU's own formats; nothing is downloaded."""

import csv
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_train import TINY, run_main  # noqa: F401  (fixtures)

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance

from corpus.tokenizers import Bytes
from evaluation import harness, likelihood
from sampling.generator import Generator
from training.log import read_metrics

ENDINGS = ["pours the tea into two cups and sits down", "pours the", "pours the car into a tree, and so on and so on", "is a cup"]


def hellaswag(n):
    """Questions in HellaSwag's format; the right ending is number i mod 4."""
    return [dict(ind=i, activity_label="Making tea", ctx_a=f"[header] A man boils {i} cups of water.", ctx_b="he", ctx="", split="val", split_type="indomain",
                 label=i % 4, endings=ENDINGS[i % 4 :] + ENDINGS[: i % 4], source_id=f"x{i}") for i in range(n)]  # fmt: skip


def mmlu(n, first=0):
    return [(f"What is {i} + 1, \"really\"?\nSay,", [str(i + j) for j in range(4)], (i + first) % 4) for i in range(n)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """As the authors published them: hellaswag_val.jsonl; MMLU's headerless .csv by split and subject."""
    folder = tmp_path_factory.mktemp("published")
    for name, n in (("train", 8), ("val", 8)):
        (folder / "hellaswag").mkdir(exist_ok=True)
        (folder / f"hellaswag/hellaswag_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hellaswag(n)))
    for split, n in (("dev", 5), ("val", 6), ("test", 8)):
        (folder / "mmlu" / split).mkdir(parents=True)
        for k, subject in enumerate(("abstract_algebra", "anatomy")):
            with open(folder / "mmlu" / split / f"{subject}_{split}.csv", "w", newline="") as file:
                csv.writer(file).writerows([q, *choices, "ABCD"[right]] for q, choices, right in mmlu(n, k))
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """As they lie on the hub: data/validation-….parquet, and a folder of parquet files for each subject."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("hub")
    (folder / "hellaswag/data").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | dict(label=str(row["label"])) for row in hellaswag(8)]), folder / "hellaswag/data/validation-00000-of-00001.parquet")
    for split, n in (("dev", 5), ("validation", 6), ("test", 8)):
        for k, subject in enumerate(("abstract_algebra", "anatomy")):
            (folder / "mmlu" / subject).mkdir(parents=True, exist_ok=True)
            rows = [dict(question=q, subject=subject, choices=choices, answer=right) for q, choices, right in mmlu(n, k)]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"mmlu/{subject}/{split}-00000-of-00001.parquet")
    return folder


class Rigged:
    """Stands in for Objective: the nats of a byte are what `prices` says, whatever is asked, and nothing is ever likeliest but a space."""

    def __init__(self, prices, default=5.0):
        self.prices, self.batches = torch.full((257,), default), []
        for letters, price in prices.items():
            self.prices[[ord(c) for c in letters]] = price

    def look(self, batch, likeliest=False):
        self.batches.append(batch)
        nats = self.prices[batch.targets]
        return (nats, torch.full_like(batch.targets, 32), torch.full_like(nats, 0.5)) if likeliest else nats

    training = False

    def train(self, mode=True):
        return self

    eval = train

    def modules(self):
        return ()


def rigged(prices, objective="masked", seq_len=2048, **more):
    record = dict(settings=dict(objective=objective, loss="elbo", schedule="linear"), model=dict(n_vocab=257, mask_id=257, seq_len=seq_len, causal=objective == "ar"))
    writer = Generator(record, Bytes(), torch.device("cpu"), False, SimpleNamespace())
    return harness.NanoQuokka(writer=writer, objective=Rigged(prices), **more)


@pytest.mark.parametrize("objective", ["masked", "ar"])
@pytest.mark.parametrize("layout", ["published", "hub"])
def test_a_rigged_model_gets_the_score_it_must(request, layout, objective):
    data = request.getfixturevalue(layout)
    # every byte costs the same: the shortest ending has the best sum, acc; per byte all are equal, acc_norm's argmax is the first
    model = rigged({}, objective, masks=16)
    found = harness.run_tasks(model, harness.open_tasks(["hellaswag"], task_data=data))["hellaswag"]
    rows = hellaswag(8)
    shortest = [min(range(4), key=lambda i, row=row: len(" " + row["endings"][i])) for row in rows]
    assert found["acc"] == np.mean([best == row["label"] for best, row in zip(shortest, rows)]) and found["examples"] == 8 and found["shots"] == 0
    # t is cheap, all else dear: per byte the ending with most of it wins
    model = rigged({"t": 1.0}, objective, masks=400)
    found = harness.run_tasks(model, harness.open_tasks(["hellaswag"], task_data=data))["hellaswag"]
    cost = [[sum(1.0 if c == "t" else 5.0 for c in " " + e) / len(e) for e in row["endings"]] for row in rows]
    if True:  # every byte's price is fixed, so is every mean
        assert found["acc_norm"] == np.mean([int(np.argmin(c)) == row["label"] for c, row in zip(cost, rows)])
    # MMLU: C always wins; two groups of subjects, of which only two subjects are there
    found = harness.run_tasks(rigged({"C": 0.1}, objective), harness.open_tasks(["mmlu"], task_data=data))
    for k, subject in enumerate(("abstract_algebra", "anatomy")):
        assert found[f"mmlu_{subject}"]["acc"] == np.mean([right == 2 for _, _, right in mmlu(8, k)]) and found[f"mmlu_{subject}"]["examples"] == 8
    assert found["mmlu"]["examples"] == found["mmlu_stem"]["examples"] == 16
    assert found["mmlu"]["acc"] == pytest.approx((found["mmlu_abstract_algebra"]["acc"] + found["mmlu_anatomy"]["acc"]) / 2)
    # the paper's: answers are the choices, on the validation split
    found = harness.run_tasks(rigged({"0": 0.1, "1": 0.2, "2": 0.3, "3": 0.4, "4": 0.5}, objective), harness.open_tasks(["paper"], task_data=data))
    assert found["mmlu_val"]["acc"] == pytest.approx(np.mean([(i + k) % 4 == 0 for k in range(2) for i in range(6)])) and "hellaswag" in found
    assert found["mmlu_val_abstract_algebra"]["examples"] == 6


def test_sums_not_means():
    """A long right answer at 1 nat a byte, short wrong ones at 3: the sum prefers the short one, the mean the long one."""
    model = rigged({"a": 1.0, "z": 3.0}, "ar")
    a, z = (model.loglikelihood([Instance("loglikelihood", {}, ("Q:", " " + text), i)])[0][0] for i, text in enumerate(("a" * 20, "z" * 5)))
    assert (a, z) == (-25.0, -20.0)
    long = model.scored([likelihood.Question([1], [97] * n) for n in (1, 10, 100)])
    assert [value for value, _ in long] == [-1.0, -10.0, -100.0]  # no end is appended


def test_choices_share_their_masks_and_a_letter_takes_one_pass():
    model = rigged({}, masks=8)
    some = requests(*[("What follows?", " " + "x" * n) for n in (39, 39, 19)])
    model.loglikelihood(some)
    rows = [tuple(i == 257 for i in row[13:]) for batch in model.scorer.objective.batches[:2] for row in batch.tokens.tolist()]
    long, short = ([row for row in rows if len(row) == n] for n in (40, 20))
    assert len(long) == len(short) == 8  # equal answers are scored once
    for a, b in zip(long, short):  # one permutation: at the same place the answer that has more masked there has all that the other has
        assert abs(sum(a) / 40 - sum(b) / 20) <= 1 / 20
        common = a[:20]
        assert set(np.flatnonzero(common)) <= set(np.flatnonzero(b)) or set(np.flatnonzero(b)) <= set(np.flatnonzero(common))
    model.scorer.objective.batches.clear()
    model.loglikelihood(requests(("What follows?", " " + "x" * 39), ("What follows?", " " + "y" * 39)))
    masks = [[tuple(i == 257 for i in row) for row in batch.tokens.tolist() if key in row or all(i == 257 for i in row[13:])] for key in (ord("x"), ord("y")) for batch in model.scorer.objective.batches[:1]]
    assert set(masks[0]) == set(masks[1])
    model = rigged({}, masks=8)
    model.loglikelihood(requests(*[(f"{i} + 1?\nAnswer:", letter) for i in range(5) for letter in "ABCD"]))
    assert sum(len(batch.tokens) for batch in model.scorer.objective.batches) == 5 and sum(len(batch.targets) for batch in model.scorer.objective.batches) == 4 * 5


def test_few_shots_come_from_where_the_task_says(published):
    model = rigged({}, "ar")
    harness.run_tasks(model, harness.open_tasks(["mmlu_anatomy", "hellaswag"], task_data=published), limit=2, fewshot=3)
    texts = [bytes(i for i in row if i < 256).decode() for batch in model.scorer.objective.batches for row in batch.tokens.tolist()]
    assert any(text.startswith("The following are multiple choice questions (with answers) about anatomy.") and text.count("Answer:") == 4 for text in texts)
    assert any(text.count("Making tea: A man boils") == 4 for text in texts)


# the harness's own model of the same weights ------------------------------------------------------------------------------------


def bytes_for_transformers():
    """Our byte tokenizer, as transformers' users have tokenizers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes: themselves, the others from 256 on
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in printable)}
    inner = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()} | {"<eos>": 256}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


def exported(model):
    """transformers' Qwen3 with these weights, the text tokens alone: what `hf` would load of an exported checkpoint."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    reference = Qwen3ForCausalLM(Qwen3Config(vocab_size=c.n_vocab, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                                             num_key_value_heads=c.n_kv_head, head_dim=c.head_dim, max_position_embeddings=c.seq_len, rms_norm_eps=c.norm_eps,
                                             tie_word_embeddings=c.tied, rope_parameters=dict(rope_type="default", rope_theta=c.rope_base), eos_token_id=256, bos_token_id=256))
    weights = {"lm_head.weight": model.head[: c.n_vocab]}
    for name, p in model.named_parameters():
        for ours, theirs in (("blocks.", "model.layers."), ("attn_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"), (".attn.", ".self_attn."), ("embed.", "model.embed_tokens.")):
            name = name.replace(ours, theirs)
        weights["model.norm.weight" if name == "norm.weight" else name] = p[: c.n_vocab] if "embed" in name else p
    reference.load_state_dict(weights, strict=True)
    return reference.eval()


def requests(*pairs):
    return [Instance("loglikelihood", {}, pair, i, metadata=("t", i // 4, 1)) for i, pair in enumerate(pairs)]


def test_autoregressive_scores_are_those_of_the_harness_own_model(run_main, published):  # noqa: F811
    from lm_eval.models.huggingface import HFLM

    run = run_main("--objective=ar", "--steps=40", "--lr=1e-2", "--seq_len=64")
    ours = harness.NanoQuokka(run_dir=str(run), device="cpu")
    theirs = HFLM(pretrained=exported(ours.writer.model), tokenizer=bytes_for_transformers(), batch_size=3, device="cpu", dtype="float32")
    some = requests(("3 squared", " is 9"), ("3 squared ", "is 9"), ("", "7 squared is 49"), ("x" * 200, " and its double is 14."), ("é ", "→ü"), ("1", "2"), ("4 squared is", " 1" * 20), ("a", "b" * 64))
    for (a, greedy), (b, theirs_greedy) in zip(ours.loglikelihood(some), theirs.loglikelihood(some, disable_tqdm=True), strict=True):
        assert a == pytest.approx(b, abs=1e-3, rel=1e-5) and greedy == theirs_greedy
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(("4 squared is 16.", "the same again " * 30, "y"))]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling, disable_tqdm=True), rel=1e-5)
    # what is written begins, as in sample.py, after a separator of documents; for `hf` it has to be said
    asked, after = ([Instance("generate_until", {}, (f"{start}{text}", dict(until=["\n"], max_gen_toks=20, do_sample=False)), i)
                     for i, text in enumerate(("3 squared", "17 squared is 289, and"))] for start in ("", "<eos>"))
    assert ours.generate_until(asked) == theirs.generate_until(after, disable_tqdm=True)
    opened = [harness.open_tasks(["hellaswag", "mmlu_anatomy"], task_data=published) for _ in range(2)]
    mine = harness.run_tasks(ours, opened[0])
    reference = lm_eval.simple_evaluate(theirs, tasks=opened[1], bootstrap_iters=0, log_samples=False, task_manager=harness.NO_OTHERS)["results"]
    for task in ("hellaswag", "mmlu_anatomy"):
        assert mine[task]["acc"] == reference[task]["acc,none"] and mine[task].get("acc_norm") == reference[task].get("acc_norm,none")


@pytest.mark.parametrize("objective", ["masked", "uniform", "ar"])
def test_batches_and_orders_change_no_score(run_main, objective):  # noqa: F811
    run = run_main(f"--objective={objective}", "--steps=20", "--lr=1e-2")
    some = requests(*[(f"{i} squared", f" is {j}.") for i in (2, 30) for j in (4, 12, 900, 7)])
    whole = harness.NanoQuokka(run_dir=str(run), device="cpu", masks=20).loglikelihood(some)
    small = harness.NanoQuokka(run_dir=str(run), device="cpu", masks=20, tokens=40).loglikelihood(some[::-1])[::-1]
    assert [v for v, _ in small] == pytest.approx([v for v, _ in whole], abs=1e-3) and [g for _, g in small] == [g for _, g in whole]
    again = harness.NanoQuokka(run_dir=str(run), device="cpu", masks=20, seed=1).loglikelihood(some)
    assert ([v for v, _ in again] == [v for v, _ in whole]) == (objective == "ar")
    text = [Instance("loglikelihood_rolling", {}, ("17 squared is 289, and its double is 34.\n" * 3,), 0)]
    value = harness.NanoQuokka(run_dir=str(run), device="cpu", masks=20).loglikelihood_rolling(text)
    assert -1000 < value[0] < -20


def test_a_separator_in_front_and_tokens_joined_across(run_main):  # noqa: F811
    model = harness.NanoQuokka(run_dir=str(run_main("--steps=3")), device="cpu", masks=4)
    seen = []
    model.scored = lambda questions, silent=False: seen.extend(questions) or [(0.0, False)] * len(questions)
    model.loglikelihood(requests(("", "ab"), ("a  ", "b"), ("x", "y")))
    assert [(q.context, q.answer) for q in seen] == [([256], [97, 98]), ([97], [32, 32, 98]), ([120], [121])] and seen[0].key == seen[1].key == "t 0"
    model.writer.tokens.encode = lambda text: np.array([7] if text == "xy" else [1])  # a tokenizer that joins both
    model.loglikelihood([Instance("loglikelihood", {}, ("x", "y"), 0)])
    assert (seen[-1].context, seen[-1].answer, seen[-1].key) == ([1], [1], "x")


# writing ------------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("objective", ["masked", "uniform", "ar"])
def test_tasks_of_ones_own_in_which_the_model_writes(run_main, tmp_path, objective):  # noqa: F811
    (tmp_path / "tasks").mkdir()
    (tmp_path / "squares.jsonl").write_text("".join(json.dumps(dict(question=f"{i} squared is", answer=f" {i * i}, and its")) + "\n" for i in range(5)))
    (tmp_path / "tasks/squares.yaml").write_text(TASK.replace("FILE", str(tmp_path / "squares.jsonl")))
    run = run_main(f"--objective={objective}", "--steps=3")
    model = harness.NanoQuokka(run_dir=str(run), device="cpu", steps=4 if objective != "ar" else 0)
    opened = harness.open_tasks(["squares"], task_path=tmp_path / "tasks")
    assert harness.writing(opened) == ["squares"]
    assert 0 <= harness.run_tasks(model, opened)["squares"]["exact_match"] <= 1
    asked = [Instance("generate_until", {}, (f"{i} squared is", dict(until=["e"], max_gen_toks=10, do_sample=i > 2, temperature=0.7)), i) for i in range(5)]
    texts = model.generate_until(asked)
    assert all("e" not in text and len(text.encode()) <= 30 for text in texts)
    small = harness.NanoQuokka(run_dir=str(run), device="cpu", steps=4 if objective != "ar" else 0, tokens=32).generate_until(asked)
    assert small == texts
    long = model.generate_until([Instance("generate_until", {}, ("x" * 100, dict(until=["\n"], max_gen_toks=500)), 0)])  # more than the context
    assert len(long) == 1


# files and errors ---------------------------------------------------------------------------------------------------------------


def test_files_of_every_layout(tmp_path):
    for name in ("hellaswag_train.jsonl", "data/test-00000-of-00002.parquet", "anatomy/validation.json", "val/anatomy_val.csv", "dev/high_school_anatomy_dev.csv", "dataset_infos.json", "README.md", "notes.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = {split: [path.name for path in paths] for split, paths in harness.local_files(tmp_path, None).items()}
    assert names == dict(train=["hellaswag_train.jsonl"], test=["test-00000-of-00002.parquet"], validation=["validation.json", "anatomy_val.csv"], dev=["high_school_anatomy_dev.csv"])
    assert {split: [path.name for path in paths] for split, paths in harness.local_files(tmp_path, "anatomy").items()} == dict(validation=["validation.json", "anatomy_val.csv"])
    (tmp_path / "a.csv").write_text('q,"x, y"\n1,2\n')
    (tmp_path / "b.csv").write_text('"Is, ""it""?",1,2,3,4,D\n')
    assert harness.read_records(tmp_path / "a.csv") == [{"q": "1", "x, y": "2"}]
    assert harness.read_records(tmp_path / "b.csv") == [dict(question='Is, "it"?', choices=list("1234"), answer=3)]


def test_bad_tasks_end_in_one_line(tmp_path, published):
    with pytest.raises(ValueError, match="none is called hellaswagg; there are hellaswag"):
        harness.open_tasks(["hellaswagg"])
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag/train.jsonl").write_text(json.dumps(hellaswag(1)[0]) + "\n")
    with pytest.raises(ValueError, match="have no 'validation'"):
        harness.open_tasks(["hellaswag"], task_data=tmp_path)
    (tmp_path / "hellaswag/validation.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match="validation.jsonl can't be read"):
        harness.open_tasks(["hellaswag"], task_data=tmp_path)
    for content in ("", "[1]\n", "3\n", '{"a": 1}\n'):
        (tmp_path / "hellaswag/validation.jsonl").write_text(content)
        with pytest.raises(ValueError) as problem:
            harness.open_tasks(["hellaswag"], task_data=tmp_path)
        assert "--task_data" not in str(problem.value) and "\n" not in str(problem.value)
    with pytest.raises(ValueError, match="data of mmlu_virology are not in"):  # a subject that isn't there
        harness.open_tasks(["mmlu_virology"], task_data=published)
    with pytest.raises(ValueError, match="Duplicate task"):
        harness.open_tasks(["mmlu", "mmlu_anatomy"], task_data=published)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "squares.jsonl").write_text(json.dumps(dict(question="3", answer="9")) + "\n")
    for broken, message in ((TASK.replace("{{question}}", "{{question"), "TemplateSyntaxError"), (TASK + "a: [", "squares.yaml"), (TASK + "unsafe_code: true\n", "runs code that a model wrote")):
        (tmp_path / "tasks/squares.yaml").write_text(broken.replace("FILE", str(tmp_path / "squares.jsonl")))
        with pytest.raises(ValueError, match=message):
            harness.open_tasks(["squares"], task_path=tmp_path / "tasks")


def test_groups_say_what_they_lack(published, tmp_path):
    said = []
    harness.open_tasks(["mmlu"], task_data=published, say=said.append)
    assert said == [f"note: {published / 'mmlu'} has the data of 2 of 57 parts of mmlu; the others are left out"]
    said.clear()
    harness.open_tasks(["hellaswag"], task_data=published, say=said.append)
    assert said == []
    (tmp_path / "mmlu").mkdir()  # nothing in it: that is no score
    for name, message in (("mmlu", "the data of mmlu are not in"), ("mmlu_val", "the data of mmlu_val are not in"), ("arc_easy", "ai2_arc: there is no such folder")):
        with pytest.raises(ValueError, match=message):
            harness.open_tasks([name], task_data=tmp_path)


def test_lines_end_where_records_end(tmp_path):
    """Separators that Python's splitlines knows and JSON and CSV do not."""
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(a="x\u2028y\x85z"), ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text('"Is it\x85\u2028?\nSay",1,2,3,4,A\nWhat?,1,2,3,4,B\n', encoding="utf-8")
    assert harness.read_records(tmp_path / "a.jsonl") == [dict(a="x\u2028y\x85z")]
    assert [r["question"] for r in harness.read_records(tmp_path / "a.csv")] == ["Is it\x85\u2028?\nSay", "What?"]


def test_chance_in_tasks_is_the_same_each_time_and_stays_in_there():
    random.seed(7)
    with harness.by_the_same_chance(3):
        first = random.random(), np.random.rand()
    with harness.by_the_same_chance(3):
        assert (random.random(), np.random.rand()) == first
    outside = random.random()
    random.seed(7)
    assert random.random() == outside


def test_every_filter_has_its_score(tmp_path, run_main):  # noqa: F811
    filters = "filter_list: [{name: strict, filter: [{function: regex, regex_pattern: 'x(.)'}, {function: take_first}]}, {name: loose, filter: [{function: take_first}]}]\n"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "squares.jsonl").write_text(json.dumps(dict(question="3", answer="9")) + "\n")
    (tmp_path / "tasks/squares.yaml").write_text(TASK.replace("FILE", str(tmp_path / "squares.jsonl")) + filters)
    model = harness.NanoQuokka(run_dir=str(run_main("--steps=3")), device="cpu", steps=2)
    found = harness.run_tasks(model, harness.open_tasks(["squares"], task_path=tmp_path / "tasks"))["squares"]
    assert {"exact_match:strict", "exact_match:loose"} <= set(found)


def test_a_prompt_is_not_given_up_for_what_is_to_be_written(run_main):  # noqa: F811
    model = harness.NanoQuokka(run_dir=str(run_main("--steps=3")), device="cpu", steps=2)
    rows = []
    plain = model.writer.generate
    model.writer.generate = lambda some, *rest: rows.extend(some) or plain(some, *rest)
    model.generate_until([Instance("generate_until", {}, (text, dict(until=["\n"], max_gen_toks=500)), i) for i, text in enumerate(("17 squared is", "y" * 60))])
    given = [bytes(i for i in row if i < 256).decode() for row in rows]
    assert sorted(given) == ["17 squared is", "y" * 16] and all(len(row) == 32 for row in rows)


def test_without_the_package_the_extra_is_named(run_main, tmp_path):  # noqa: F811
    run = run_main("--steps=3")
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')\n")
    done = subprocess.run([sys.executable, ROOT / "eval.py", f"--run_dir={run}", "--tasks=hellaswag", "--device=cpu"], capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 2 and "pip install '.[eval]'" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = subprocess.run([sys.executable, ROOT / "train.py", *TINY, f"--corpus={read_settings(run)['corpus']}", f"--run_dir={tmp_path / 'new'}", "--steps=3", "--eval_tasks=hellaswag"],
                          capture_output=True, text=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 2 and "pip install '.[eval]'" in done.stderr and not (tmp_path / "new").exists()


def read_settings(run):
    return json.loads((run / "settings.json").read_text())


# in training --------------------------------------------------------------------------------------------------------------------


def test_benchmarks_in_training_are_those_of_the_checkpoint(run_main, published, monkeypatch):  # noqa: F811
    run = run_main("--steps=6", "--eval_tasks=hellaswag,mmlu_anatomy", "--eval_tasks_every=3", "--eval_tasks_limit=4", f"--task_data={published}", "--eval_tasks_masks=8", "--save_every=3")
    lines = {m["step"]: {k: v for k, v in m.items() if k.startswith("eval/")} for m in read_metrics(run) if any(k.startswith("eval/") for k in m)}
    assert sorted(lines) == [3, 6] and {"eval/hellaswag/acc", "eval/hellaswag/acc_norm", "eval/hellaswag/acc_stderr", "eval/mmlu_anatomy/acc"} <= set(lines[6])
    model = harness.NanoQuokka(run_dir=str(run), device="cpu", masks=8)
    found = harness.run_tasks(model, harness.open_tasks(["hellaswag", "mmlu_anatomy"], task_data=published), limit=4)
    assert {f"eval/{task}/{key}": value for task in found for key, value in found[task].items() if isinstance(value, float)} == lines[6]
    plain = run_main("--steps=6", "--save_every=3", run="plain")  # training itself goes on unchanged
    one, other = ([{k: m[k] for k in ("step", "loss", "val_loss", "grad_norm") if k in m} for m in read_metrics(r) if "loss" in m or "val_loss" in m] for r in (run, plain))
    assert one == other and len(one) >= 3


def test_a_benchmark_that_fails_costs_its_scores_not_the_run(run_main, tmp_path, capsys):  # noqa: F811
    (tmp_path / "tasks").mkdir()
    (tmp_path / "squares.jsonl").write_text(json.dumps(dict(question="3", answer="9")) + "\n")
    (tmp_path / "tasks/own.py").write_text("def score(doc, results):\n    raise RuntimeError('the scorer is broken')\n")
    (tmp_path / "tasks/squares.yaml").write_text(TASK.replace("FILE", str(tmp_path / "squares.jsonl")) + "process_results: !function own.score\n")
    run = run_main("--steps=4", "--eval_tasks=squares", "--eval_tasks_every=2", f"--task_path={tmp_path / 'tasks'}")
    events = [m for m in read_metrics(run) if m.get("event") == "benchmarks failed"]
    assert [m["step"] for m in events] == [2, 4] and "the scorer is broken" in events[0]["why"] and (run / "step_00000004/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--shard=full", "--compile=blocks"]])
def test_benchmarks_on_two_ranks(run_main, published, corpus, tmp_path, flags):  # noqa: F811
    """DDP and divided networks: the scores of one rank, to rounding."""
    shared = ["--steps=4", "--eval_tasks=hellaswag", f"--task_data={published}", "--eval_tasks_masks=8"]
    one = run_main(*shared)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", *TINY, f"--corpus={corpus}", f"--run_dir={tmp_path / 'two'}", *shared, *flags],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = [[{k: v for k, v in m.items() if k.startswith("eval/")} for m in read_metrics(run) if "eval/hellaswag/acc" in m] for run in (one, tmp_path / "two")]
    assert scores[0] == scores[1] and len(scores[0]) == 1
    if flags:
        (tmp_path / "tasks").mkdir()
        (tmp_path / "squares.jsonl").write_text(json.dumps(dict(question="3 squared is", answer="9")) + "\n")
        (tmp_path / "tasks/squares.yaml").write_text(TASK.replace("FILE", str(tmp_path / "squares.jsonl")))
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py", *TINY, f"--corpus={corpus}", f"--run_dir={tmp_path / 'three'}",
                               "--steps=4", "--eval_tasks=squares", f"--task_path={tmp_path / 'tasks'}", *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and "whole weights on each rank" in done.stderr
