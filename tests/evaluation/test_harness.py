"""Our models in lm-evaluation-harness: its requests, against its own model of the same weights."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

pytest.importorskip("lm_eval")

import lm_eval
from evaluation_fixtures import rigged
from lm_eval.api.instance import Instance

from evaluation import answers, harness, tasks
from evaluation.answers import Question


def requests(*pairs):
    """Requests for loglikelihoods; every four are choices of one question."""
    return [Instance("loglikelihood", {}, pair, i, metadata=("t", i // 4, 1)) for i, pair in enumerate(pairs)]


def writing_requests(*pairs):
    """Requests for texts: (context, settings)."""
    return [Instance("generate_until", {}, pair, i) for i, pair in enumerate(pairs)]


def rolling_requests(*texts):
    return [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]


# scores of rigged models ------------------------------------------------------------------------------------


def test_sums_not_means():
    """A long right answer at 1 nat a byte, a short wrong one at 3: the sum prefers the short one."""
    model = rigged({"a": 1.0, "z": 3.0}, "ar")
    scores = model.loglikelihood(requests(("Q:", " " + "a" * 20), ("Q:", " " + "z" * 5)))
    assert [value for value, _ in scores] == [-25.0, -20.0]
    scores = model.score([Question([1], [97] * n) for n in (1, 10, 100)])
    assert [value for value, _ in scores] == [-1.0, -10.0, -100.0]  # no end is appended


def masks_of(model, n):
    """The masks of the answers of n tokens that a rigged model has read, as a list of bool arrays."""
    rows = [row for batch in model.scorer.objective.batches for row in batch.tokens]
    return [row[13:].numpy() == 257 for row in rows if len(row) == 13 + n]


def test_choices_share_their_masks(monkeypatch):
    monkeypatch.setattr(answers, "greedy_misses", lambda scorer, pieces: np.zeros(len(pieces)))
    model = rigged({}, masks=8)
    context = "What follows?"  # 13 bytes
    model.loglikelihood(requests(*[(context, " " + "x" * n) for n in (39, 39, 19)]))
    long, short = masks_of(model, 40), masks_of(model, 20)
    assert len(long) == len(short) == 8  # equal answers are scored once
    for a, b in zip(long, short):  # one permutation: one of the two sets of masks contains the other
        assert abs(a.mean() - b.mean()) <= 1 / 20
        assert (a[:20] <= b).all() or (b <= a[:20]).all()
    model.scorer.objective.batches.clear()
    model.loglikelihood(requests((context, " " + "x" * 39), (context, " " + "y" * 39)))
    masks = [tuple(mask) for mask in masks_of(model, 40)]
    assert len(masks) == 16 and set(masks[:8]) == set(masks[8:])


def test_letters_as_answers_take_one_pass():
    model = rigged({}, masks=8)
    model.loglikelihood(requests(*[(f"{i} + 1?\nAnswer:", letter) for i in range(5) for letter in "ABCD"]))
    batches = model.scorer.objective.batches
    assert sum(len(batch.tokens) for batch in batches) == 5
    assert sum(len(batch.targets) for batch in batches) == 4 * 5


# the harness's own model of the same weights ----------------------------------------------------------------


def bytes_for_transformers():
    """Our byte tokenizer, as transformers' users have tokenizers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # GPT-2's letters for bytes: themselves where they are printable, the others from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {letter: byte for byte, letter in letters.items()} | {"<eos>": 256}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")


NAMES = {"blocks.": "model.layers.", "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
         ".attn.": ".self_attn.", "embed.": "model.embed_tokens."}


def as_qwen3(model):
    """transformers' Qwen3 with these weights, the text tokens alone: as `hf` loads an exported checkpoint."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    c = model.config
    rope = dict(rope_type="default", rope_theta=c.rope_base)
    reference = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.n_vocab, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        max_position_embeddings=c.seq_len, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        rope_parameters=rope, eos_token_id=256, bos_token_id=256))
    weights = {"lm_head.weight": model.head[: c.n_vocab]}
    for name, p in model.named_parameters():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        name = "model.norm.weight" if name == "norm.weight" else name
        weights[name] = p[: c.n_vocab] if "embed" in name else p
    reference.load_state_dict(weights, strict=True)
    return reference.eval()


def test_autoregressive_scores_are_those_of_the_harness_own_model(run_main, published):
    from lm_eval.models.huggingface import HFLM

    run = run_main("--objective=ar", "--steps=40", "--lr=1e-2", "--seq_len=64")
    ours = harness.NanoQuokka(run_dir=str(run), device="cpu")
    theirs = HFLM(pretrained=as_qwen3(ours.generator.model), tokenizer=bytes_for_transformers(), batch_size=3,
                  device="cpu", dtype="float32")

    some = requests(("3 squared", " is 9"), ("3 squared ", "is 9"), ("", "7 squared is 49"), ("é ", "→ü"),
                    ("1", "2"), ("x" * 200, " and its double is 14."), ("4 squared is", " 1" * 20),
                    ("a", "b" * 64))
    reference = theirs.loglikelihood(some, disable_tqdm=True)
    for (nats, greedy), (their_nats, their_greedy) in zip(ours.loglikelihood(some), reference, strict=True):
        assert nats == pytest.approx(their_nats, abs=1e-3, rel=1e-5) and greedy == their_greedy

    rolling = rolling_requests("4 squared is 16.", "the same again " * 30, "y")
    reference = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(reference, rel=1e-5)

    # a text begins, as in sample.py, after a separator of documents; for `hf` it has to be given
    settings = dict(until=["\n"], max_gen_toks=20, do_sample=False)
    contexts = ("3 squared", "17 squared is 289, and")
    reference = theirs.generate_until(writing_requests(*[(f"<eos>{text}", settings) for text in contexts]),
                                      disable_tqdm=True)
    assert ours.generate_until(writing_requests(*[(text, settings) for text in contexts])) == reference

    opened = [tasks.open_tasks(["hellaswag", "mmlu_anatomy"], task_data=published) for _ in range(2)]
    scores = tasks.run_tasks(ours, opened[0])
    reference = lm_eval.simple_evaluate(theirs, tasks=opened[1], bootstrap_iters=0, log_samples=False,
                                        task_manager=tasks.NO_OTHERS)["results"]
    for task in ("hellaswag", "mmlu_anatomy"):
        assert scores[task]["acc"] == reference[task]["acc,none"]
        assert scores[task].get("acc_norm") == reference[task].get("acc_norm,none")


# requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["masked", "uniform", "ar"])
def test_batches_and_orders_change_no_score(run_main, objective):
    run = str(run_main(f"--objective={objective}", "--steps=20", "--lr=1e-2"))
    some = requests(*[(f"{i} squared", f" is {j}.") for i in (2, 30) for j in (4, 12, 900, 7)])
    scores = harness.NanoQuokka(run_dir=run, device="cpu", masks=20).loglikelihood(some)
    small = harness.NanoQuokka(run_dir=run, device="cpu", masks=20, tokens=40).loglikelihood(some[::-1])[::-1]
    assert [value for value, _ in small] == pytest.approx([value for value, _ in scores], abs=1e-3)
    assert [greedy for _, greedy in small] == [greedy for _, greedy in scores]
    other_seed = harness.NanoQuokka(run_dir=run, device="cpu", masks=20, seed=1).loglikelihood(some)
    is_equal = [value for value, _ in other_seed] == [value for value, _ in scores]
    assert is_equal == (objective == "ar")
    text = rolling_requests("17 squared is 289, and its double is 34.\n" * 3)
    value = harness.NanoQuokka(run_dir=run, device="cpu", masks=20).loglikelihood_rolling(text)
    assert -1000 < value[0] < -20


def test_a_separator_in_front_and_tokens_joined_across():
    model = rigged({}, masks=4)
    questions = []

    def score(some, silent=False):
        questions.extend(some)
        return [(0.0, False)] * len(some)

    model.score = score
    model.loglikelihood(requests(("", "ab"), ("a  ", "b"), ("x", "y")))
    pairs = [(question.context, question.answer) for question in questions]
    assert pairs == [([256], [97, 98]), ([97], [32, 32, 98]), ([120], [121])]
    assert questions[0].key == questions[1].key == "t 0"
    # a tokenizer that joins both
    model.generator.tokenizer.encode = lambda text, continues=False: np.array([7] if text == "xy" else [1])
    model.loglikelihood([Instance("loglikelihood", {}, ("x", "y"), 0)])
    assert questions[-1] == Question([1], [1], "x")


# writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["masked", "uniform", "ar"])
def test_tasks_of_ones_own_in_which_the_model_writes(run_main, own_task, objective):
    run, steps = str(run_main(f"--objective={objective}", "--steps=3")), 0 if objective == "ar" else 4
    model = harness.NanoQuokka(run_dir=run, device="cpu", steps=steps)
    opened = tasks.open_tasks(["squares"], task_path=own_task(questions=5))
    assert 0 <= tasks.run_tasks(model, opened)["squares"]["exact_match"] <= 1
    settings = dict(until=["e"], max_gen_toks=10, temperature=0.7)
    some = [(f"{i} squared is", settings | dict(do_sample=i > 2)) for i in range(5)]
    texts = model.generate_until(writing_requests(*some))
    assert all("e" not in text and len(text.encode()) <= 30 for text in texts)
    small = harness.NanoQuokka(run_dir=run, device="cpu", steps=steps, tokens=32)
    assert small.generate_until(writing_requests(*some)) == texts
    more_than_the_context = writing_requests(("x" * 100, dict(until=["\n"], max_gen_toks=500)))
    assert len(model.generate_until(more_than_the_context)) == 1


def test_a_prompt_is_not_given_up_for_the_new_text(run_main):
    model = harness.NanoQuokka(run_dir=str(run_main("--steps=3")), device="cpu", steps=2)
    rows, plain = [], model.generator.generate

    def generate(some, *rest):
        rows.extend(some)
        return plain(some, *rest)

    model.generator.generate = generate
    settings = dict(until=["\n"], max_gen_toks=500)
    model.generate_until(writing_requests(("17 squared is", settings), ("y" * 60, settings)))
    prompts = [bytes(i for i in row if i < 256).decode() for row in rows]
    assert sorted(prompts) == ["17 squared is", "y" * 16] and all(len(row) == 32 for row in rows)


def test_without_the_package_the_extra_is_named(run_main, tmp_path):
    run = run_main("--steps=3")
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')\n", encoding="utf-8")
    command = [sys.executable, ROOT / "eval.py", f"--run_dir={run}", "--tasks=hellaswag", "--device=cpu"]
    environment = os.environ | dict(PYTHONPATH=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "pip install '.[eval]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
