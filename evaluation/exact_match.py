"""Answers to the questions of held-out question-answer pairs: how many are written token for token."""

import math

import numpy as np

from sampling.decode import DecodeConfig


def measure_answers(cfg, generator, sequences, layout):
    """Write cfg.answers answers of a validation split's pairs greedily, and count those that are right.

    sequences: data.PairRows or a Mixture; layout: how pairs stood in rows, which tells how much room an
    answer is given. It ends at its first separator, and is right if every token up to that one is. cfg is
    eval.py's. Returns a dict for eval.json.
    """
    pairs = choose_pairs(sequences, cfg.answers)
    specials = set(generator.tokenizer.specials.values())
    allowed = {token for _, answer in pairs for token in answer if token in specials}
    order = "low_confidence" if cfg.order == "auto" else cfg.order
    config = DecodeConfig(order=order, steps=cfg.steps, block=cfg.block, temperature=0.0, stop=True,
                          cache=generator.exact_cache, seed=cfg.seed)
    longest = max(len(answer) for _, answer in pairs)

    right = np.zeros(len(pairs), bool)
    for first in range(0, len(pairs), cfg.micro_batch):
        group = pairs[first : first + cfg.micro_batch]
        rows = [with_room(prompt, longest, generator, layout) for prompt, _ in group]
        written = generator.generate(rows, config, first, allowed=allowed).rows
        for i, (row, (prompt, answer)) in enumerate(zip(written, group), first):
            right[i] = row[len(prompt) : len(prompt) + len(answer)] == answer
    # the error also of none and of all that are right: with two more of each [Agresti and Coull 1998]
    n = len(pairs)
    p = (right.sum() + 2) / (n + 4)
    return dict(answers=n, exact_match=float(right.mean()), error=math.sqrt(p * (1 - p) / (n + 4)))


def choose_pairs(sequences, n):
    """[(prompt's ids, answer's ids)] of n evenly spread pairs whose answers are whole (n = 0: all)."""
    pairs = []
    for source in getattr(sequences, "sources", [sequences]):
        ends = source.start + source.size - 1
        whole = np.flatnonzero(source.stream.take(ends) == source.eos_id)  # those that are cut have no end
        pairs += [(source, number) for number in whole]
    if not pairs:
        raise ValueError("no question-answer pair of the validation split is whole within a row")
    n = min(n, len(pairs))
    chosen = []
    for source, number in (pairs[i * len(pairs) // n] for i in range(n)):
        start, border = int(source.start[number]), int(source.start[number] + source.n_prompt[number])
        end = start + int(source.size[number])
        chosen.append((source.stream.read(start, border).tolist(), source.stream.read(border, end).tolist()))
    return chosen


def with_room(prompt, longest, generator, layout):
    """A row of a prompt and as many masks as training would have shown: to the row's or the block's end.

    Where training showed nothing behind the answer: as many as the longest answer of all has tokens.
    """
    n_new = min(longest, generator.seq_len - len(prompt))
    if layout.eos_padding == "row":
        n_new = generator.seq_len - len(prompt)
    elif layout.eos_padding == "block":
        end = -(-(len(prompt) + n_new) // layout.block) * layout.block
        n_new = min(end, generator.seq_len) - len(prompt)
    return [*prompt, *[generator.tokenizer.mask_id] * n_new]
