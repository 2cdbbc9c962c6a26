"""Recordings of a sample that is being written."""

import torch

from corpus import tokenizers
from sampling.film import PROMPT, Recording

MASK = tokenizers.ByteTokenizer.mask_id


def test_a_character_of_several_tokens_is_drawn_whole():
    ids = list("aé→😀b".encode())
    recording = Recording([MASK] * len(ids), tokenizers.ByteTokenizer())
    half = ids[:2] + [MASK] * (len(ids) - 2)
    for row in (half, ids):
        recording.add(torch.tensor([[0, 0, *row]]))  # right-aligned
    assert recording.pieces(2) == [("a", 0), ("é", 1), ("→", 1), ("😀", 1), ("b", 1)]
    assert recording.pieces(0) == [("░", None)] * len(ids)


def test_a_token_appears_when_it_was_written_last():
    """A position that is masked again, and one that is overwritten; the prompt is none of both."""
    a, b, c = b"abc"
    recording = Recording([a, MASK, MASK], tokenizers.ByteTokenizer())
    for row in ([a, b, MASK], [a, MASK, c], [a, c, b]):
        recording.add(torch.tensor([row]))
    assert recording.passes == [
        [PROMPT, None, None],
        [PROMPT, 0, None],
        [PROMPT, None, 1],
        [PROMPT, 2, 2],
    ]
