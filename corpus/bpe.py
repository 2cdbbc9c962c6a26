"""A byte-level BPE tokenizer, learned from a preparation's own training text: `--tokenizer=bpe:1024`.

What comes out is a tokenizer.json as any other: a copy of it travels with the corpus and with each run.
"""

import hashlib
import os

from corpus.tasks import Place, choose_split, make_tasks
from corpus.texts import TaskReader
from corpus.tokenizers import split_pattern

PREFIX = "bpe:"
EOS = "<|endoftext|>"
FEWEST, MOST = 257, 1 << 20  # tokens: all bytes and the end of a document
LEARNED_BYTES = 100_000_000  # of the training split's first text
LONGEST = 256  # bytes of a token: or a line of dashes would become one


def vocabulary_size(name):
    """1024 of 'bpe:1024'; None of another tokenizer's name. Raises ValueError."""
    if not name.startswith(PREFIX):
        return None
    digits = name.removeprefix(PREFIX)
    size = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 9 else 0
    if not FEWEST <= size <= MOST:
        raise ValueError(f"tokenizer={name}: expected bpe:N with N from {FEWEST} to {MOST:,} tokens")
    return size


def learn(size, sources, cfg, path):
    """Learn a tokenizer of `size` tokens from the sources' training documents, and write it to `path`.

    The vocabulary is smaller if the text has too few pairs. Digits are tokens of their own, and no
    token reaches from a word into the next. Raises ValueError for bad input, as tokenizing it would.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    split = split_pattern("")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split["pattern"]["Regex"]), split["behavior"].lower()),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[EOS], show_progress=False, max_token_length=LONGEST,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(training_texts(sources, cfg), trainer)
    unfinished = path.with_name(f".{path.name}")
    tokenizer.save(str(unfinished))
    os.replace(unfinished, path)


def training_texts(sources, cfg):
    """Yield the first LEARNED_BYTES of the training split: documents, each once, and pieces of long ones."""
    seen, left = set(), LEARNED_BYTES
    for task, _, _ in make_tasks(sources, Place(), cfg):
        for text in texts_of(task, cfg):
            raw = text.encode("utf-8")
            digest = hashlib.sha256(raw).digest()
            is_new = digest not in seen or not cfg.dedup
            is_chosen = cfg.sft or task.kind == "piece"
            if is_new and (is_chosen or choose_split(digest, cfg.val) == "train"):
                seen.add(digest)
                left -= len(raw)
                yield text
            if left <= 0:
                return


def texts_of(task, cfg):
    """The texts of a task that may be for training; of pairs and pieces those that are."""
    if task.kind == "undecodable":
        return []
    if task.kind == "piece":
        return [task.content.text] if task.content.split == "train" else []
    if cfg.sft:
        pairs = TaskReader(cfg).pairs(task)
        trained = [pair for pair, conversation, _ in pairs if choose_split(conversation, cfg.val) == "train"]
        return ["\n".join([*(message["content"] for message in pair.messages), pair.answer])
                for pair in trained]
    return TaskReader(cfg).texts(task)
