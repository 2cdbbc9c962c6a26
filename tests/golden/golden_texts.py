"""Texts, prompts, benchmarks and tables of losses that record.py makes: alike in every Python."""

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel


def numbers(seed):
    """Endless whole numbers below 2^31 from a seed: the same in every Python."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        yield seed >> 33


def word_texts(count):
    """Short texts of a few words with a simple grammar, so that tiny models soon learn something."""
    some = numbers(1)

    def pick(*words):
        return words[next(some) % len(words)]

    def sentence():
        one = f"{pick('the', 'a')} {pick('cat', 'dog', 'bird', 'fish')}"
        other = f"{pick('the', 'a')} {pick('cat', 'dog', 'bird', 'fish')}"
        return (
            one
            + pick(f" sees {other}", f" likes {other}", " runs", " sleeps")
            + pick(".", " now.", ", and so on.")
        )

    return [" ".join(sentence() for _ in range(1 + next(some) % 8)) for _ in range(count)]


def sum_texts(count):
    """Texts of sums."""
    some, texts = numbers(2), []
    for _ in range(count):
        pairs = [(next(some) % 30, next(some) % 30) for _ in range(6)]
        texts.append("\n".join(f"{a} and {b} is {a + b}." for a, b in pairs))
    return texts


def small_tokenizer():
    """A byte-level tokenizer.json of letters, a few pieces and the other bytes: it spells any text."""
    letters = [*"abcdefghijklmnopqrstuvwxyz.,0123456789", "Ġ", "Ċ"]
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "a"),
        ("e", "s"),
        ("Ġ", "s"),
        ("c", "a"),
        ("ca", "t"),
        ("Ġ", "cat"),
        ("o", "g"),
    ]
    others = sorted({*ByteLevel.alphabet()} - {*letters})
    pieces = [*letters, *("".join(pair) for pair in merges), *others]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    end = len(vocab)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    special = dict(
        id=end,
        content="<|endoftext|>",
        single_word=False,
        lstrip=False,
        rstrip=False,
        normalized=False,
        special=True,
    )
    model = dict(
        type="BPE",
        dropout=None,
        unk_token=None,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
        fuse_unk=False,
        byte_fallback=False,
        vocab=vocab,
        merges=[" ".join(pair) for pair in merges],
    )
    return dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=[special],
        normalizer=None,
        pre_tokenizer=level,
        post_processor=None,
        decoder=level,
        model=model,
    )


def questions(count):
    """Questions as in HellaSwag's own files."""
    endings = ["sees the dog", "runs", "likes the bird, and so on", "sleeps now"]
    return [
        dict(
            ind=i,
            activity_label="Cats",
            ctx_a=f"the cat {'runs. ' * i}",
            ctx_b="the cat",
            ctx="",
            split="val",
            split_type="indomain",
            label=i % 4,
            endings=endings[i % 4 :] + endings[: i % 4],
            source_id=f"x{i}",
        )
        for i in range(count)
    ]


def loss_tables():
    """Two CSVs of made-up runs: of text seen once, and again and again."""
    once, again = ["params,tokens,loss"], ["params,unique_tokens,epochs,loss"]
    for i, size in enumerate((1e5, 3e5, 1e6, 3e6, 1e7)):
        for k, flops in enumerate((1e14, 1e15, 1e16)):
            tokens = flops / 6 / size
            loss = 1.7 + 400 / size**0.35 + 900 / tokens**0.36
            once.append(f"{size:.0f},{tokens:.0f},{loss * (1 + 1e-3 * ((7 * i + 3 * k) % 5 - 2)):.6f}")
    for i, size in enumerate((1e5, 1e6, 1e7)):
        for unique in (1e6, 1e7):
            for k, epochs in enumerate((1, 2, 4, 8, 16, 32)):
                seen = unique * (1 + 12 * (1 - 2.718281828 ** (-(epochs - 1) / 12)))
                loss = 1.7 + 400 / size**0.35 + 900 / seen**0.36 + 2e-3 * epochs * (size / unique) ** 0.3
                again.append(
                    f"{size:.0f},{unique:.0f},{epochs},{loss * (1 + 1e-3 * ((5 * i + 3 * k) % 5 - 2)):.6f}"
                )
    return "\n".join(once) + "\n", "\n".join(again) + "\n"


def write_texts(folder):
    """Put everything that the commands read into the folder."""
    folder = Path(folder)
    (folder / "words.txt").write_text("\n===\n".join(word_texts(300)), encoding="utf-8")
    (folder / "sums.jsonl").write_text(
        "".join(json.dumps(dict(text=text)) + "\n" for text in sum_texts(80)), encoding="utf-8"
    )
    (folder / "tokenizer.json").write_text(
        json.dumps(small_tokenizer(), ensure_ascii=False), encoding="utf-8"
    )
    holes = [
        dict(prompt="the cat ", length=20),
        dict(text="a [MASK:4] sees [MASK:7]. the dog [MASK:6]now."),
        dict(prompt="a fish likes ", suffix=" the bird.", length=12),
    ]
    (folder / "holes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in holes), encoding="utf-8")
    prompts = [
        dict(prompt="the cat ", length=30),
        dict(prompt="a bird sees the ", length=20),
        dict(prompt="the", length=50),
    ]
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in prompts), encoding="utf-8"
    )
    (folder / "prompt.txt").write_text("a dog likes ", encoding="utf-8")
    once, again = loss_tables()
    (folder / "runs.csv").write_text(once, encoding="utf-8")
    (folder / "repeats.csv").write_text(again, encoding="utf-8")
    (folder / "tiny.py").write_text(
        'corpus = "corpora/words"\nbatch_size = 4\nwarmup = 2\neval_rows = 16\nlog_every = 5\n'
        'dtype = "float32"\ndevice = "cpu"\n'
    , encoding="utf-8")
    (folder / "tasks/hellaswag").mkdir(parents=True)
    write_tasks(folder / "tasks")


def write_tasks(folder):
    """Benchmarks of one's own (choices, likelihoods, writing), and files like HellaSwag's and MMLU's."""
    data = folder / "cats.jsonl"
    data.write_text(
        "".join(
            json.dumps(
                dict(
                    begin=f"{one} cat likes a {other}.",
                    ends=["the dog sees", "a fish runs."],
                    right=i % 2,
                    text=f"{one} cat sees the {other}. {one} {other} runs now.",
                )
            )
            + "\n"
            for i, (one, other) in enumerate(
                zip(("the", "a") * 3, ("dog", "cat", "fish", "bird", "dog", "cat"))
            )
        )
    , encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    metrics = "".join(
        f"  - {{metric: {name}, aggregation: {mean}, higher_is_better: false}}\n"
        for name, mean in (("acc", "mean"), ("brier_score", "brier_score"))
    )
    (folder / "cats.yaml").write_text(
        f"task: cats\n{common}output_type: multiple_choice\ndoc_to_text: '{{{{begin}}}}'\n"
        f"doc_to_choice: ends\ndoc_to_target: right\nmetric_list:\n{metrics}"
    , encoding="utf-8")
    (folder / "cat_texts.yaml").write_text(
        f"task: cat_texts\n{common}output_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n"
        "  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
    , encoding="utf-8")
    (folder / "cat_words.yaml").write_text(
        f"task: cat_words\n{common}output_type: generate_until\n"
        "doc_to_text: '{{begin}} the c'\ndoc_to_target: at\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 2, do_sample: false}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    , encoding="utf-8")
    for split in ("train", "val"):
        lines = "".join(json.dumps(question) + "\n" for question in questions(6))
        (folder / f"hellaswag/hellaswag_{split}.jsonl").write_text(lines, encoding="utf-8")
    for split in ("dev", "val", "test"):
        (folder / "mmlu" / split).mkdir(parents=True)
        lines = "".join(f"What is {i} and 1?,{i},{i + 1},{i + 2},{i + 3},B\n" for i in range(5))
        (folder / f"mmlu/{split}/anatomy_{split}.csv").write_text(lines, encoding="utf-8")
