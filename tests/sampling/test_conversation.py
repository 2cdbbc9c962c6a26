"""Chats: what of them a model is asked with, where an answer ends, and what a question too long leaves."""

from types import SimpleNamespace

import numpy as np
import pytest

from corpus.tokenizers import ByteTokenizer
from sampling.conversation import Conversation
from sampling.decode import DecodeConfig

TOKENS = ByteTokenizer()
END = ord("|")  # of a turn, by this template


class Template:
    """Every message and the end of its turn."""

    def encode_prompt(self, messages):
        text = "".join(message["content"] + "|" for message in messages)
        return np.frombuffer(text.encode(), np.uint8)

    def end_of_turn(self):
        return {END, TOKENS.eos_id}


class Echo:
    """A generator that answers "ok|", and then goes on. It keeps what it is asked."""

    tokenizer, seq_len, block = TOKENS, 40, 0

    def __init__(self, **settings):
        self.asked, self.record = [], dict(settings=settings)

    def generate(self, rows, decoding, number):
        (row,) = rows
        n = row.index(TOKENS.mask_id)
        self.asked.append((bytes(row[:n]).decode(), len(row) - n, decoding, number))
        return SimpleNamespace(rows=[[*row[:n], *b"ok|junk"]])


def test_an_answer_ends_where_the_template_says():
    generator = Echo()
    conversation = Conversation(generator, Template(), DecodeConfig(), length=7)
    assert conversation.ask("q") == "ok" and conversation.ask("r") == "ok"
    assert [asked[0] for asked in generator.asked] == ["q|", "q|ok|r|"]
    _, room, decoding, number = generator.asked[1]
    assert room == 7 and number == 1 and decoding.stop
    assert set(decoding.stop_ids) == {END, TOKENS.eos_id}


def test_old_turns_are_forgotten_but_not_for_a_question_that_has_no_room():
    generator = Echo()
    conversation = Conversation(generator, Template(), DecodeConfig(), length=5, system="be")
    for question in "abcd":
        conversation.ask(question * 4)
    with pytest.raises(ValueError, match="no room for an answer of 5"):
        conversation.ask("x" * 40)
    conversation.ask("e")
    asked = [text for text, *_ in generator.asked]
    assert asked == [
        "be|aaaa|", "be|aaaa|ok|bbbb|", "be|aaaa|ok|bbbb|ok|cccc|", "be|aaaa|ok|bbbb|ok|cccc|ok|dddd|",
        "be|bbbb|ok|cccc|ok|dddd|ok|e|"]


@pytest.mark.parametrize("block, room", [(0, 38), (4, 38), (16, 38)])
def test_without_a_length_an_answer_has_the_whole_context(block, room):
    generator = Echo()
    generator.block = block
    Conversation(generator, Template(), DecodeConfig()).ask("q")
    assert generator.asked[0][1] == room


def test_blocks_are_written_whole():
    generator = Echo()
    generator.block = 16
    Conversation(generator, Template(), DecodeConfig(), length=5).ask("q")
    assert generator.asked[0][1] == 14


def test_a_model_of_filled_rows_always_has_the_whole_row():
    """Its space is otherwise its answer's length; a length cuts what it has written."""
    generator = Echo(eos_padding="row")
    conversation = Conversation(generator, Template(), DecodeConfig(), length=1)
    assert conversation.ask("q") == "o" and generator.asked[0][1] == 38


def test_old_turns_go_before_an_answer_has_less_than_a_quarter_of_the_context():
    generator = Echo()
    conversation = Conversation(generator, Template(), DecodeConfig())
    for question in ("a" * 20, "b" * 5, "c" * 30, "d" * 38):
        conversation.ask(question)
    asked = [(text, room) for text, room, *_ in generator.asked]
    assert asked == [("a" * 20 + "|", 19), ("a" * 20 + "|ok|" + "b" * 5 + "|", 10), ("c" * 30 + "|", 9),
                     ("d" * 38 + "|", 1)]
