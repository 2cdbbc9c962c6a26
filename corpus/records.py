"""Records in JSON: read from regular files only, and checked against a schema before anything uses them.

A schema is built of

    str, bool, float         what it says; float takes NaN and infinity, too
    whole(1, 8), real(0, 1)  finite numbers within bounds
    ("a", "b")               one of these texts
    re.compile("…")          text that matches as a whole
    [schema]                 a list of any length
    {"a": …, "b?": …}        an object with these members, b if it has one; others are let through
    {str: schema}            an object with any names, or {re.compile("…"): schema} with names like that
"""

import json
import re
import reprlib
import sys
from typing import NamedTuple

from corpus.files import open_regular

MAX_BYTES = 1 << 28  # of a record; the largest that there are, tokenizers, have a tenth of it
MAX_FLOAT = sys.float_info.max
DIGEST = re.compile("[0-9a-f]{64}")  # SHA-256


class Range(NamedTuple):
    """The numbers from `low` to `high`."""

    low: float
    high: float
    is_whole: bool


def whole(low=0, high=2**62):
    return Range(low, high, True)


def real(low=-MAX_FLOAT, high=MAX_FLOAT):
    return Range(low, high, False)


def read_json(path):
    """What a file of JSON holds; raises ValueError where it is none, and OSError."""
    with open_regular(path) as file:
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} can't be read: more than {MAX_BYTES >> 20} MB of JSON")
    return parse_json(raw, path)


def parse_json(text, name):
    """What a JSON text, or its bytes, says; raises ValueError, also where it nests too deeply."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{name} can't be read: {type(problem).__name__}: {problem}") from None


def read_record(path, schema):
    """What a JSON file holds, which is as `schema` says; raises ValueError or OSError."""
    record = read_json(path)
    check(record, schema, path)
    return record


def check(value, schema, path, place=""):
    """Raise ValueError unless a value is as its schema says; path and place: the file, the member in it."""
    if isinstance(schema, dict) and isinstance(value, dict):
        for key, part in schema.items():
            if isinstance(key, str):
                check_member(value, key, part, path, place)
                continue
            for name, member in value.items():
                check(name, key, path, f"{place} (a name)".strip())
                check(member, part, path, join(place, name))
    elif isinstance(schema, list) and isinstance(value, list):
        for number, item in enumerate(value):
            check(item, schema[0], path, join(place, number))
    elif isinstance(schema, dict | list) or not is_of(value, schema):
        found = reprlib.repr(value)
        raise ValueError(f"{path}: {place or 'it'} is {found}, and should be {describe(schema)}")


def check_member(record, key, schema, path, place):
    """`check` for one member of an object."""
    name = key.removesuffix("?")
    if name in record:
        check(record[name], schema, path, join(place, name))
    elif name == key:
        raise ValueError(f"{path}: {join(place, name)} is missing")


def join(place, name):
    return f"{place}.{name}"[:200] if place else str(name)[:200]


def is_of(value, schema):
    """Whether a value is as a schema of neither an object nor a list says."""
    if isinstance(schema, Range):
        is_number = isinstance(value, int if schema.is_whole else int | float) and not isinstance(value, bool)
        return is_number and schema.low <= value <= schema.high
    if isinstance(schema, re.Pattern):
        return isinstance(value, str) and bool(schema.fullmatch(value))
    if isinstance(schema, tuple):
        return isinstance(value, str) and value in schema
    if schema is float:
        return isinstance(value, float) or is_of(value, real())
    return isinstance(value, schema)


def describe(schema):
    """What a schema asks for, in words."""
    if isinstance(schema, Range):
        kind = "a whole number" if schema.is_whole else "a number"
        return kind if schema == real() else f"{kind} from {schema.low:g} to {schema.high:g}"
    if isinstance(schema, re.Pattern):
        return f"text like {schema.pattern}"
    if isinstance(schema, tuple):
        return f"one of {', '.join(schema)}"
    if isinstance(schema, dict | list):
        return "an object" if isinstance(schema, dict) else "a list"
    return {str: "text", bool: "true or false", float: "a number"}[schema]
