"""Prompts as rows of token ids."""

import json
from types import SimpleNamespace

import pytest

from corpus.tokenizers import ByteTokenizer
from sampling.prompts import encode_holes, read_rows

MASK = ByteTokenizer.mask_id


def settings(**values):
    """The settings of sample.py that read_rows reads."""
    defaults = dict(prompt="", prompt_file="", prompts="", suffix="", text="", length=0, max_length=0)
    return SimpleNamespace(**defaults | values)


def rows(block=0, **values):
    """The rows as text, with * for new tokens, in a context of 12."""
    read = read_rows(settings(**values), ByteTokenizer(), 12, block)
    return ["".join("*" if i == MASK else chr(i) for i in row) for row in read]


def test_a_prompt_is_filled_up_to_a_length():
    assert rows(prompt="ab") == ["ab" + "*" * 10]
    assert rows(prompt="ab", length=3) == ["ab***"]
    assert rows(prompt="ab", suffix="yz", length=3) == ["ab***yz"]
    assert rows(prompt="ab", suffix="yz", max_length=6) == ["ab**yz"]
    assert rows() == ["*" * 12]


def test_holes_anywhere():
    ids = encode_holes("ab[MASK:4]cd[MASK]ef", ByteTokenizer())
    assert ids.count(MASK) == 5 and len(ids) == 11
    assert rows(text="[MASK:2]ab[MASK]") == ["**ab*"]
    assert rows(text="ab[MASK:2]", block=1) == ["ab**"]
    assert rows(text="abc[MASK]de[MASK]", block=6) == ["abc*de*"]


def test_files_of_prompts(tmp_path):
    """Lines, or .jsonl whose lines may override suffix and length; empty lines and a BOM are skipped."""
    lines, jsonl = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("\ufeffa\nbcd\n\nef\r\n", encoding="utf-8")
    assert rows(prompts=str(lines), length=2) == ["a**", "bcd**", "ef**"]
    prompts = [dict(prompt="ab", suffix="yz", length=3), dict(text="x[MASK:5]y"), dict(prompt="cd")]
    jsonl.write_text("\n".join(map(json.dumps, prompts)), encoding="utf-8")
    assert rows(prompts=str(jsonl), suffix="!", length=4) == ["ab***yz", "x*****y", "cd****!"]


@pytest.mark.parametrize("line, message", (
    ("[1]", "line 1: expected {"),
    ('{"prompt": 3}', "line 1: prompt, suffix and text are text"),
    ('{"prompt": "a", "length": -1}', "length is a whole number"),
    ('{"prompt": "a"\n', "line 1: "),
    ('{"prompt": "a"}\n{"promt": "a"}', "line 2: expected {"),
    ('{"text": "a"}', "line 1: nothing to write"),
    ('{"text": "", "prompt": "a"}', "text stands alone"),
    ("", "holds no prompt"),
))
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError) as raised:
        rows(prompts=str(tmp_path / "p.jsonl"))
    assert message in str(raised.value)


@pytest.mark.parametrize("values, message", (
    (dict(prompt="x" * 12), "the prompt has 12 tokens, and the model's context is 12: no room for a new one"),
    (dict(prompt="abc", length=10), "prompt and new tokens are 13 together, and the model's context is 12"),
    (dict(prompt="abcdef", max_length=5), "the prompt has 6 tokens, and max_length is 5: no room"),
    (dict(max_length=13), "max_length=13 is more than the model's context of 12"),
    (dict(text="abc"), "the text has no [MASK]"),
    (dict(text="x" * 9 + "[MASK:9]"), "the text has 18 tokens with its holes, more than the model's context"),
    (dict(text="a[MASK:x]b[MASK]"), "[MASK:x]: 'x' is not a number; write [MASK] or [MASK:12]"),
    (dict(text="a[MASK:-1]"), "[MASK:-1]: '-1' is not a number"),
    (dict(text="a[MASK:0]"), "[MASK:0]: a hole has between 1 and a million tokens"),
    (dict(text="a[MASK:99999999999]"), "a hole has between 1 and a million tokens"),
    (dict(text="a[MASK]b", block=1), "can't fill holes before other text"),
    (dict(prompt="a", suffix="b", length=2, block=1), "can't fill holes before other text"),
    (dict(text="a[MASK]bcd", block=3), "of 3 tokens and sees nothing after a block: text after token 3"),
))
def test_bad_prompts(values, message):
    with pytest.raises(ValueError) as raised:
        rows(**values)
    assert message in str(raised.value)
