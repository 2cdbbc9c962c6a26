"""Question-answer pairs: what a record says, and where the pairs stand in token files.

A record is a conversation. Each answer in it makes a pair of its own, with everything before it as the
prompt: then every objective can learn it, also one that sees what follows. Field names of the usual data
sets are understood (PROMPTS, ANSWERS, CONVERSATIONS, ROLES).

Beside the tokens stand as many bytes: FIRST for the first token of a pair, ANSWER for those of its answer,
the separator behind it included. All others are of prompts.
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np

from corpus.cutting import SURROGATE

FIRST, ANSWER = 2, 1

PROMPTS = ("prompt", "question", "instruction", "query", "input")
CONTEXTS = ("input", "context")  # what a prompt is about: it follows the prompt
ANSWERS = ("answer", "completion", "response", "output", "chosen")
CONVERSATIONS = ("messages", "conversations", "conversation")
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant",
}  # fmt: skip
# all that are read of a table
FIELDS = tuple(dict.fromkeys(("system", *PROMPTS, *CONTEXTS, *ANSWERS, *CONVERSATIONS)))

# --------------------------------------------------------------------------------------------------- records


class Pair(NamedTuple):
    """A conversation up to an answer, and the answer."""

    messages: list  # of {"role", "content"}: an optional system message, then user and assistant in turns
    answer: str

    def digest(self):
        """SHA-256 of all its text."""
        return digest_of([*self.messages, self.answer])


def digest_of(value):
    """SHA-256 of a value that JSON can say."""
    return hashlib.sha256(json.dumps(value).encode("utf-8")).digest()


def read_conversation(record):
    """The messages of a record, [{"role", "content"}], and which of them are answers to learn, [bool].

    Raises ValueError, with what is wrong with it.
    """
    if not isinstance(record, dict):
        raise ValueError("no pair: not an object with fields")
    name = next((name for name in CONVERSATIONS if record.get(name) is not None), None)
    listed = record[name] if name else of_fields(record)
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"'{name}' is no list of messages")
    if record.get("system"):
        listed = [dict(role="system", content=record["system"]), *listed]
    messages, is_learned = [], []
    for number, message in enumerate(listed, 1):
        where = f"message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{where} is no object with a role and a content")
        role = read_role(message, where)
        text = read_text(message.get("content", message.get("value")), f"{where} ({role})")
        if not text.strip() and role == "assistant":
            raise ValueError(f"{where}: an empty answer")
        if not text.strip() and role == "user":
            raise ValueError(f"{where}: an empty prompt")
        messages.append(dict(role=role, content=text))
        is_learned.append(role == "assistant" and message.get("weight", 1) != 0)  # OpenAI's: 0 is context
    check_order([message["role"] for message in messages])
    if not any(is_learned):
        raise ValueError("no answer: each has weight 0")
    return messages, is_learned


def of_fields(record):
    """The messages of a record with a field for the prompt and one for the answer; raises ValueError."""
    prompt = next((name for name in PROMPTS if record.get(name) is not None), None)
    answer = next((name for name in ANSWERS if record.get(name) is not None), None)
    if prompt is None or answer is None:
        what = "prompt" if prompt is None else "answer"
        names = PROMPTS if prompt is None else ANSWERS
        raise ValueError(f"no {what} ('{names[0]}', also {', '.join(names[1:])}, or messages); there are "
                         f"{field_names(record)}")
    text = record[prompt]
    if isinstance(text, list):  # TRL's: messages up to the answer, and the answer's
        parts = record[answer]
        return [*text, *(parts if isinstance(parts, list) else [dict(role="assistant", content=parts)])]
    parts = [text, *(record[name] for name in CONTEXTS if name != prompt and record.get(name))]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"'{prompt}' and what it is about are not all text")
    return [dict(role="user", content="\n\n".join(parts)), dict(role="assistant", content=record[answer])]


def field_names(record):
    """The names of a record's first ten fields, as text."""
    names = list(record) if isinstance(record, dict) else []
    shown = [name if name.isprintable() else repr(name) for name in names[:10]]
    if len(names) > 10:
        shown.append("…")
    return ", ".join(shown) or "none"


def read_role(message, where):
    """system, user or assistant, by any of the names that data sets give them; raises ValueError."""
    role = message.get("role", message.get("from"))
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise ValueError(f"{where}: unknown role {role!r:.50}; there are {', '.join(ROLES)}")
    return known


def read_text(content, what):
    """The text of a message, which may come in parts of {"type": "text"}; raises ValueError."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
                 for part in content]
        content = None if None in parts else "".join(map(str, parts))
    if not isinstance(content, str):
        raise ValueError(f"{what}: its content is not text")
    if SURROGATE.search(content):
        raise ValueError(f"{what}: its content holds half a character (a lone surrogate)")
    return content


def check_order(roles):
    """Raise ValueError unless roles are user and assistant in turns, behind at most one system message."""
    turns = roles[1:] if roles[0] == "system" else roles
    for number, role in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            place = number + 1 + (roles[0] == "system")
            raise ValueError(f"message {place}: roles out of order, {role} where {expected} is due")
    if len(turns) % 2:
        raise ValueError("no answer: the last message is the user's")
    if not turns:
        raise ValueError("no answer: there is only a system message")


def pairs_of(record):
    """The Pairs in a record, and the digest of the whole conversation; raises ValueError."""
    messages, is_learned = read_conversation(record)
    pairs = [Pair(messages[:i], messages[i]["content"]) for i, learned in enumerate(is_learned) if learned]
    return pairs, digest_of(messages)


# ------------------------------------------------------------------------------------------------ token files


def mark_tokens(n_tokens, n_answer):
    """The bytes that stand beside a pair's tokens, the last n_answer of which are its answer."""
    marks = np.zeros(n_tokens, np.uint8)
    marks[0] = FIRST
    marks[n_tokens - n_answer :] += ANSWER
    return marks.tobytes()


class PairIndex(NamedTuple):
    """Where the pairs of a stream stand, (N,) int64 each."""

    start: np.ndarray  # of the prompt
    n_prompt: np.ndarray
    n_answer: np.ndarray  # with the separator behind it

    @property
    def size(self):
        return self.n_prompt + self.n_answer


def index_pairs(marks):
    """The PairIndex of a stream's marks (len(stream),) uint8; raises ValueError if they mark no pairs."""
    start = np.flatnonzero(marks & FIRST)
    if not len(start) or marks.max() > FIRST | ANSWER:
        raise ValueError("they mark no pairs")
    is_answer = marks & ANSWER
    end = np.append(start[1:], len(marks))
    n_answer = np.add.reduceat(is_answer, start, dtype=np.int64)
    n_prompt = end - start - n_answer
    n_begun = np.count_nonzero(np.diff(is_answer.astype(np.int8), prepend=0) == 1)
    # each has a prompt and an answer, and as many answers begin as there are pairs: none is in two parts
    if n_begun != len(start) or n_answer.min() < 1 or n_prompt.min() < 1 or not is_answer[end - 1].all():
        raise ValueError("they mark pairs without prompt or answer")
    return PairIndex(start, n_prompt, n_answer)
