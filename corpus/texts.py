"""The texts of a task's documents, as its source's format and the settings have them."""

import collections
import json

from corpus import pairs
from corpus.cutting import MARK, SURROGATE, decode_replacing
from corpus.tasks import separator_pattern


class TaskReader:
    """Reads the texts of one task, and counts what it leaves out."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.left_out = collections.Counter()  # {reason: documents and records}
        self.n_replaced = 0  # places where bytes became U+FFFD
        self.without_separator = []  # files in which the separator does not occur

    def texts(self, task):
        """The task's texts but for empty ones.

        Raises ValueError for bad input that the settings do not let it leave out.
        """
        texts_of = dict(lines=self.texts_of_lines, records=self.texts_of_records,
                        separated=self.texts_of_separated, files=self.texts_of_files)
        texts = list(texts_of[task.kind](task))
        self.left_out["empty"] = texts.count("")
        return [text for text in texts if text]

    # Each of these yields a text, "" for an empty one, None for a record that is left out.

    def texts_of_lines(self, task):
        """The texts in lines of JSON."""
        content = task.content
        if task.first == 1:
            content = content.removeprefix(MARK.encode())
        for number, line in enumerate(content.split(b"\n"), task.first):
            if line.strip():
                yield self.text_of_line(line, f"{task.where}:{number}")

    def text_of_line(self, line, where):
        field, record = self.cfg.field, self.parse_line(line, where)
        if record is None:
            return None
        if not isinstance(record, dict) or field not in record:
            names = pairs.field_names(record)
            return self.reject(where, f"no field '{field}'; there are {names}; name the text's with --field")
        return self.checked_text(record[field], where, f"field '{field}'")

    def parse_line(self, line, where):
        """What a line of JSON, in bytes, says; None for one that is left out."""
        line = self.decode(line, where, unit=" of the line")
        if line is None:
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as problem:  # also integers too long for Python, and deep nesting
            return self.reject(where, f"not JSON: {problem}")
        return [] if record is None else record  # no record, but none that is left out already

    def pairs(self, task):
        """Yield (pairs.Pair, digest of its conversation, where it stands) of a task of records.

        Raises ValueError as `texts` does.
        """
        if task.kind == "lines":
            lines, unit = task.content.removeprefix(MARK.encode()).split(b"\n"), ":"
        else:
            lines, unit = task.content, ", record "
        for number, line in enumerate(lines, task.first):
            where = f"{task.where}{unit}{number}"
            record = self.parse_line(line, where) if line.strip() else None
            if record is None:
                continue
            try:
                found, digest = pairs.pairs_of(record)
            except ValueError as problem:
                self.reject(where, problem)
                continue
            yield from ((pair, digest, where) for pair in found)

    def texts_of_records(self, task):
        """The texts in the rows of a table: text, or its bytes."""
        for number, text in enumerate(task.content, task.first):
            where = f"{task.where}, record {number}"
            if isinstance(text, bytes):
                yield self.decode(text, where)
            else:
                yield self.checked_text(text, where, "its text")

    def texts_of_separated(self, task):
        """The texts in a file with separators between them."""
        content, start = task.content, 0
        for separator in separator_pattern(self.cfg).finditer(content):
            yield self.text_between(task, start, separator.start())
            start = separator.end()
        if start == 0 and task.first == 0:
            self.without_separator.append(task.where)
        if start < len(content):  # one that ends the text opens no document
            yield self.text_between(task, start, len(content))

    def text_between(self, task, start, stop):
        """The text in bytes [start, stop) of a task."""
        position = task.first + start
        text = self.decode(task.content[start:stop], task.where, position)
        return text if position or text is None else text.removeprefix(MARK)

    def texts_of_files(self, task):
        """The texts in small files."""
        for path, raw in task.content:
            text = self.decode(raw, path)
            yield text and text.removeprefix(MARK)

    def decode(self, raw, where, first_byte=0, unit=""):
        """Bytes as text. What is no UTF-8 is replaced, left out (None), or a ValueError, as the settings say.

        first_byte: what the ValueError counts from, and unit: in what.
        """
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as problem:
            bad_byte = first_byte + problem.start
        if self.cfg.bad_bytes == "stop":
            raise ValueError(f"{where}: not UTF-8 at byte {bad_byte}{unit}; see --bad_bytes")
        if self.cfg.bad_bytes == "skip":
            self.left_out["undecodable"] += 1
            return None
        text, n_replaced = decode_replacing(raw)
        self.n_replaced += n_replaced
        return text

    def checked_text(self, text, where, what):
        """A record's text, if it is one that UTF-8 can say."""
        if not isinstance(text, str):
            return self.reject(where, f"{what} is not text")
        if SURROGATE.search(text):  # which JSON's escapes can say
            return self.reject(where, f"{what} holds half a character (a lone surrogate)")
        return text

    def reject(self, where, problem):
        """Leave a record out, or raise ValueError, as the settings say."""
        if self.cfg.bad_records == "skip":
            self.left_out["malformed"] += 1
            return None
        raise ValueError(f"{where}: {problem}; --bad_records=skip leaves such records out")
