"""Questions about words, with a dictionary's entries as their answers: `data.py debian:dict-gcide --sft`."""

import hashlib
import re

QUESTIONS = (
    "What does “{}” mean?", "What is the meaning of “{}”?", "Define the word “{}”.", "{}: what is that?",
)  # fmt: skip
# GCIDE's entries: Aceric \A*cer"ic\, a. [L. acer maple.] and the definition on lines of their own, set in
ENTRY = re.compile(r"(?P<word>[^\W\d_][\w' -]{1,40}?) \\[^\\]*\\(?P<grammar>[^\n]*)\n(?P<body>.*)", re.S)
BRACKETS = re.compile(r"\[[^\[\]]*\]")  # etymologies, which may go on on the next line; remarks; sources
SENSE = re.compile(r"(?:^|\s)(?:\(a\)|1\.|2\.)\s")
SHORTEST, LONGEST = 20, 400  # characters of an answer


def question(entry):
    """The record of a question and its answer that an entry makes; None if it has no short definition."""
    obsolete = "[Obs" in entry
    n_removed = 1
    while n_removed:  # the innermost ones first
        entry, n_removed = BRACKETS.subn(" ", entry)
    match = ENTRY.match(entry)
    if obsolete or not match:
        return None
    answer = definition(match["body"])
    if not SHORTEST <= len(answer) <= LONGEST:
        return None
    number = int.from_bytes(hashlib.sha256(entry.encode("utf-8")).digest()[:4], "big")
    return dict(prompt=QUESTIONS[number % len(QUESTIONS)].format(match["word"].lower()), answer=answer)


def definition(body):
    """An entry's first sense in plain words, on one line; "" if there is none."""
    text = re.split(r"\n\s*(?:Syn|Note|Usage):|\n\s*\n|--", body)[0]  # what follows, and quotations
    text = re.sub(r"[{}]", "", " ".join(text.split()))
    senses = [part.strip() for part in SENSE.split(text) if part.strip()]
    answer = senses[0].strip(" ;,") if senses else ""
    answer = re.sub(r"^\([^)]*\)\s*", "", answer)  # (Bot.)
    if not answer or not answer[0].isalpha() or "?" in answer:  # letters that its makers could not spell
        return ""
    return answer[0].upper() + answer[1:].rstrip(".") + "."
