"""Cut long texts into pieces that have the same tokens as the whole text.

A document larger than TASK_BYTES is tokenized in pieces. They may end only where no tokenizer joins text:
behind a newline between two lines, or, in text without lines, between two words. A tokenizer that does join
text there says so (allows_cuts in corpus/tokenizers.py), and gets its texts whole.
"""

import re

from corpus.sources import open_source

TASK_BYTES = 1 << 20  # of text that make a task for one process, and a piece
MARK = "\ufeff"  # the byte order mark: at a file's very start no part of its text

SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, or a byte that is no UTF-8 (surrogateescape)
BETWEEN_WORDS = re.compile("[A-Za-z] [A-Za-z]")


def find_cut(text):
    """The last place where `text` may be cut; 0 if there is none.

    Behind a single newline between two non-blank characters, of which the second is no slash: no
    pre-tokenizer joins across it (o200k_base keeps slashes with the punctuation before the newline).
    In text without lines: between two words.
    """
    newline = len(text) - 1
    while True:
        newline = text.rfind("\n", 1, newline)
        if newline <= 0:
            break
        before, after = text[newline - 1], text[newline + 1]
        if not before.isspace() and not after.isspace() and after != "/":
            return newline + 1

    cut = 0
    for match in BETWEEN_WORDS.finditer(text, max(0, len(text) - 4096)):
        cut = match.start() + 1
    return cut


def cut_text(text):
    """Yield the pieces of a text, of about TASK_BYTES characters each."""
    start = 0
    while start < len(text):
        size = TASK_BYTES
        cut = find_cut(text[start : start + size])
        while not cut and start + size < len(text):
            size *= 2
            cut = find_cut(text[start : start + size])
        is_last = start + size >= len(text) or not cut
        stop = len(text) if is_last else start + cut
        yield text[start:stop]
        start = stop


def read_pieces(source, start, stop, cfg, allow_cuts=True):
    """Yield (piece of text, the source's byte behind it, places with replaced bytes) for bytes [start, stop).

    stop=None: to the source's end. What is no UTF-8 becomes U+FFFD with bad_bytes="replace"; else it raises
    ValueError, which a caller that may skip the text catches. The pieces are of about TASK_BYTES each; one
    that can't be cut may be as long as a document.
    """
    bad_bytes = cfg.bad_bytes
    with open_source(source, start) as (file, _):
        position, raw = start, b""  # what was read of the file and not yet yielded, and where it starts
        while True:
            size = max(TASK_BYTES, len(raw))  # twice as much whenever there was no place to cut
            if stop is not None:
                size = min(size, stop - position - len(raw))
            block = file.read(size)
            raw += block

            # As text, without the character that the next block completes; bytes that are no UTF-8 are kept.
            n_complete = len(raw) - incomplete_bytes(raw) if block else len(raw)
            text = raw[:n_complete].decode("utf-8", "surrogateescape")
            bad = SURROGATE.search(text)
            if bad and bad_bytes != "replace":
                bad_byte = position + len(text[: bad.start()].encode("utf-8"))
                raise ValueError(f"{source.path}: not UTF-8 at byte {bad_byte}; {advice(bad_bytes)}")

            if not block:
                cut = len(text)
            elif allow_cuts:
                cut = find_cut(text)
            else:
                cut = 0
            if cut:
                piece = text[:cut].encode("utf-8", "surrogateescape")
                text, n_replaced = decode_replacing(piece) if bad else (text[:cut], 0)
                text = text if position else text.removeprefix(MARK)
                position, raw = position + len(piece), raw[len(piece) :]
                yield text, position, n_replaced
            elif len(raw) > cfg.max_document:
                raise ValueError(f"{source.path}: no place to cut the text within {cfg.max_document:,} bytes "
                                 f"from byte {position} on; --separator= makes documents of it, "
                                 "--max_document= takes longer ones")
            if not block:
                return


def advice(bad_bytes):
    """What to do about a text that is not UTF-8."""
    if bad_bytes == "skip":
        return ("a single text cannot be skipped: --bad_bytes=replace, "
                "or cut it into documents with --separator=")
    return "see --bad_bytes"


def decode_replacing(raw):
    """(bytes as text with U+FFFD for what is no UTF-8, in how many places).

    The pieces of a text give the same as the whole.
    """
    text = raw.decode("utf-8", "replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def incomplete_bytes(raw):
    """How many bytes at the end of `raw` begin a UTF-8 character that is not complete."""
    for n in range(1, min(4, len(raw) + 1)):
        byte = raw[-n]
        if byte & 0xC0 != 0x80:  # not a continuation: the last character starts here
            return n if character_bytes(byte) > n else 0
    return 0


def character_bytes(first_byte):
    """How many bytes a UTF-8 character has that starts with this one."""
    if first_byte < 0x80:
        return 1
    if first_byte < 0xE0:
        return 2
    return 3 if first_byte < 0xF0 else 4
