"""Forged records: a member exchanged for something hostile, left out, or one too many, at any depth."""

import copy
import json

from hypothesis import strategies as st

NESTED = "nested 10,000 deep"
HOSTILE = [
    None, True, False, 0, -1, 1, 3, 0.5, 1e308, -1e308, float("nan"), float("inf"), 2**31, 2**53 + 1, 2**63,
    10**400, "", "x", "ar", "../../x", "/dev/zero", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [None],
    [1] * 5, {"a": {}}, {"": 1}, NESTED,
]


def places(record, place=()):
    """The path of every member of a record, at any depth."""
    members = record.items() if isinstance(record, dict) else enumerate(record)
    for name, value in members:
        yield (*place, name)
        if isinstance(value, dict | list):
            yield from places(value, (*place, name))


@st.composite
def forgeries(draw, record):
    """A record of which one member is forged."""
    *outer, name = draw(st.sampled_from(list(places(record))))
    forged = part = copy.deepcopy(record)
    for step in outer:
        part = part[step]
    way = draw(st.sampled_from(["exchange", "exchange", "exchange", "remove", "add"]))
    if way == "remove":
        del part[name]
    elif way == "add" and isinstance(part, dict):
        part["of a newer version"] = draw(st.sampled_from(HOSTILE))
    else:
        part[name] = draw(st.sampled_from(HOSTILE))
    return forged


def text_of(record):
    """A record's JSON, also where it is nested more deeply than Python writes it."""
    return json.dumps(record).replace(json.dumps(NESTED), "[" * 10_000 + "]" * 10_000)
