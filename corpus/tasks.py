"""Tasks: the documents of all sources in portions of about 1 MiB, for the processes that tokenize.

Which tasks there are, and what is in them, depends on the sources alone. Each comes with the Place where the
next one starts: an interrupted preparation goes on from there as if nothing had happened.

There is one function per kind of source. Each yields (task, next place, bytes of the source read so far).
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corpus import cutting, debian, dictionary, python_docs
from corpus.cutting import read_pieces
from corpus.pairs import FIELDS
from corpus.records import parse_json
from corpus.sources import open_source, packing


class Task(NamedTuple):
    """Work for one process."""

    kind: str  # what `content` is: lines, separated, files, records, piece or undecodable
    where: str  # the source's path, for messages
    content: Any
    first: int = 0  # number of its first line or record, or position of its first byte


class Place(NamedTuple):
    """Where the next task starts. It is kept on the disk, as a list."""

    source: int = 0  # number of the source
    byte: int = 0  # bytes of it that came before
    count: int = 0  # lines or records of it that came before


class Piece(NamedTuple):
    """A part of a document that is too large for one task."""

    split: str
    text: str
    digest: bytes  # of the whole document; b"" if there is no other document
    is_first: bool
    is_last: bool
    n_replaced: int = 0  # places where bytes became U+FFFD


def make_tasks(sources, place, cfg, allow_cuts=True):
    """Yield (task, next place, bytes read of the source) from `place` on.

    allow_cuts: whether the tokenizer lets long documents be cut into pieces.
    """
    functions = dict(docs=documentation_tasks, txt=separated_tasks, jsonl=line_tasks, json=list_tasks,
                     parquet=parquet_tasks, deb=package_tasks, hf=dataset_tasks)
    number = place.source
    while number < len(sources):
        source = sources[number]
        start = place if number == place.source else Place(number)
        if source.kind != "txt" or cfg.separator:
            yield from functions[source.kind](source, start, cfg)
            number += 1
        elif len(sources) == 1:
            yield from only_text_tasks(source, start, cfg, allow_cuts)
            number += 1
        else:
            files = small_files(sources, number) if start.byte == 0 else []
            if files:
                number += len(files)
                yield Task("files", "", files), Place(number), 0
            else:
                yield from large_text_tasks(source, start, cfg, allow_cuts)
                number += 1


# ------------------------------------------------------------------------------------------ files of text


def small_files(sources, number):
    """[(path, bytes)] of the .txt files from `number` on that fit into one task together."""
    files, total = [], 0
    for source in sources[number:]:
        if source.kind != "txt" or total >= cutting.TASK_BYTES:
            break
        with open_source(source) as (file, _):
            content = file.read(cutting.TASK_BYTES + 1)
        if len(content) > cutting.TASK_BYTES:
            break
        files.append((source.path, content))
        total += len(content) + 100  # a file takes time of its own
    return files


def only_text_tasks(source, place, cfg, allow_cuts):
    """A .txt file that is the only source, as one document: its end is for validation."""
    size = source.size
    if packing(source.path):
        with open_source(source) as (file, _):
            size = sum(len(block) for block in iter(lambda: file.read(cutting.TASK_BYTES), b""))
    border = int(size * (1 - cfg.val))
    with open_source(source, border) as (file, _):  # never inside a character
        tail = file.read(4)
    border += next((i for i, byte in enumerate(tail) if byte & 0xC0 != 0x80), len(tail))
    yield from piece_tasks(source, place, [("train", 0, border), ("val", border, size)], b"", cfg, allow_cuts)


def large_text_tasks(source, place, cfg, allow_cuts):
    """A large .txt file as one document. It is read twice, because its digest decides its split."""
    digest, size = hashlib.sha256(), 0
    try:
        for text, position, _ in read_pieces(source, 0, None, cfg):
            digest.update(text.encode("utf-8"))
            size = position
    except ValueError:
        if cfg.bad_bytes != "skip":
            raise
        yield Task("undecodable", source.path, None), Place(place.source + 1), source.size
        return
    digest = digest.digest()
    yield from piece_tasks(source, place, [(choose_split(digest, cfg.val), 0, size)], digest, cfg, allow_cuts)


def piece_tasks(source, place, ranges, digest, cfg, allow_cuts):
    """The pieces of a text, of which [start, stop) belongs to a split: ranges = [(split, start, stop)]."""
    _, _, size = ranges[-1]
    for split, start, stop in ranges:
        if place.byte >= stop:
            continue
        is_first = place.byte <= start
        for text, position, n in read_pieces(source, max(place.byte, start), stop, cfg, allow_cuts):
            piece = Piece(split, text, digest, is_first, position == stop, n)
            bytes_read = source.size * position // size  # of the file, which may be compressed
            yield Task("piece", source.path, piece), Place(place.source, position), bytes_read
            is_first = False


def choose_split(digest, val_share):
    """A document's split, by its SHA-256: adding files never moves it, and equal documents never part."""
    return "val" if int.from_bytes(digest[:8], "big") < val_share * 2**64 else "train"


def line_tasks(source, place, cfg):
    """The lines of a .jsonl file."""
    byte, n_lines = place.byte, place.count
    with open_source(source, byte) as (file, bytes_read):
        while block := file.read(cutting.TASK_BYTES):
            if not block.endswith(b"\n"):
                block += file.readline(cfg.max_document + 1)
            if len(block) > cfg.max_document:
                check_lines(block, n_lines, source, cfg)
            task = Task("lines", source.path, block, n_lines + 1)
            byte += len(block)
            n_lines += block.count(b"\n")
            yield task, Place(place.source, byte, n_lines), bytes_read()


def check_lines(block, n_before, source, cfg):
    """Raise ValueError for a line that is too long to be held in memory; n_before: lines before the block."""
    for number, line in enumerate(block.split(b"\n"), n_before + 1):
        if len(line) > cfg.max_document:
            raise ValueError(f"{source.path}:{number}: a line of more than {cfg.max_document:,} bytes; "
                             "--max_document= takes longer ones")


def separated_tasks(source, place, cfg):
    """The documents of a .txt file with separators between them."""
    separator = separator_pattern(cfg)
    byte, held = place.byte, b""
    with open_source(source, byte) as (file, bytes_read):
        while True:
            block = file.read(max(cutting.TASK_BYTES, len(held)))  # twice as much while there is no separator
            held += block
            is_last = not block
            borders = [match.span() for match in separator.finditer(held)]  # the leftmost, where they overlap
            if len(held) > cfg.max_document:
                check_separated(borders, len(held), byte, source, cfg)
            if is_last:
                end = len(held)
            elif borders:
                end = borders[-1][1]
            else:
                continue
            if end:
                task = Task("separated", source.path, held[:end], byte)
                yield task, Place(place.source, byte + end), bytes_read()
            if is_last:
                return
            byte, held = byte + end, held[end:]


def check_separated(borders, size, byte, source, cfg):
    """Raise ValueError for a document that is too long to be held in memory.

    borders: (start, stop) of the separators in `size` bytes, which are the source's from `byte` on.
    """
    start = 0
    for stop, next_start in (*borders, (size, size)):
        if stop - start > cfg.max_document:
            raise ValueError(f"{source.path}: no separator {cfg.separator!r} within "
                             f"{cfg.max_document:,} bytes from byte {byte + start} on; "
                             "--max_document= takes longer documents")
        start = next_start


def separator_pattern(cfg):
    """What stands between documents, as a pattern of bytes. A line's end in it is \\n or \\r\\n in a text."""
    separator = cfg.separator
    for escaped, character in (("\\n", "\n"), ("\\r", "\r"), ("\\t", "\t")):
        separator = separator.replace(escaped, character)
    parts = [re.escape(part) for part in re.split("(?<!\r)\n", separator)]
    return re.compile("\r?\n".join(parts).encode("utf-8"))


# ------------------------------------------------------------------------------------------------ records


def record_tasks(records, source, place, cfg, n_records):
    """Tasks of the texts that follow behind `place`; n_records: of the whole source."""
    row = place.count
    for texts in group_records(records, row + 1, source, cfg):
        task = Task("records", source.path, texts, row + 1)
        row += len(texts)
        yield task, Place(place.source, 0, row), source.size * row // max(1, n_records)


def group_records(records, first, source, cfg):
    """Yield lists of records, of a task's size each; first: the first one's number."""
    texts, size = [], 0
    for number, text in enumerate(records, first):
        length = len(text) if isinstance(text, (str, bytes)) else 0
        if length > cfg.max_document:
            raise ValueError(f"{source.path}, record {number}: a text of more than {cfg.max_document:,} "
                             "bytes; --max_document= takes longer ones")
        texts.append(text)
        size += length
        if size >= cutting.TASK_BYTES or len(texts) >= 1 << 14:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def list_tasks(source, place, cfg):
    """The records of a .json file that is one list of them, as lines of JSON."""
    with open_source(source) as (file, _):
        content = file.read(cfg.max_document + 1)
    if len(content) > cfg.max_document:
        raise ValueError(f"{source.path}: more than {cfg.max_document:,} bytes of JSON in one list; "
                         "--max_document= takes longer ones")
    records = parse_json(content, source.path)
    if not isinstance(records, list):
        raise ValueError(f"{source.path}: no list of records; a file with a record per line is .jsonl")
    lines = [as_line(record) for record in records[place.count :]]
    yield from record_tasks(lines, source, place, cfg, len(records))


def as_line(record):
    """A record of a table as a line of JSON, for what reads lines: unknown fields may hold anything."""
    return json.dumps(record, default=str).encode("utf-8")


def columns_of(cfg, names, where):
    """The columns of a table that are read: the text's, or those that may hold pairs. Raises ValueError."""
    if not cfg.sft:
        check_field(cfg.field, names, where)
        return [cfg.field]
    columns = [name for name in names if name in FIELDS]
    if not columns:
        raise ValueError(f"{where}: no column with pairs; there are {', '.join(names)}, and prompt and "
                         "answer, or messages, are expected")
    return columns


def package_tasks(source, place, cfg):
    """The texts in a Debian package, or the questions that its dictionary's entries make."""
    texts = debian.documents(source.path)
    if cfg.sft:
        questions = filter(None, map(dictionary.question, texts))
        texts = [as_line(record) for record in questions]
        if not texts:
            raise ValueError(f"{source.path}: no dictionary with entries like GCIDE's, of which --sft makes "
                             "questions")
    yield from record_tasks(texts[place.count :], source, place, cfg, len(texts))


def parquet_tasks(source, place, cfg):
    """The rows of a .parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{source.path}: .parquet needs the pyarrow package: "
                         "pip install '.[data]'") from None
    try:
        # pre_buffer would read the whole column first.
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = columns_of(cfg, file.schema_arrow.names, source.path)
            n_groups = file.num_row_groups
            first_rows = np.cumsum([0] + [file.metadata.row_group(i).num_rows for i in range(n_groups)])
            group = int(np.searchsorted(first_rows, place.count, side="right")) - 1
            groups = list(range(group, n_groups))
            batches = file.iter_batches(batch_size=256, row_groups=groups, columns=columns)
            records = (record for batch in batches for record in records_of(batch, cfg))
            for _ in range(place.count - int(first_rows[group])):
                next(records)
            yield from record_tasks(records, source, place, cfg, int(first_rows[-1]))
    except (pyarrow.ArrowException, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno:
            raise
        reason = str(problem).splitlines()[0]
        raise ValueError(f"{source.path}: not a whole parquet file: {reason}") from None


def records_of(batch, cfg):
    """The texts, or the pairs' records as lines of JSON, in an Arrow batch."""
    if cfg.sft:
        return map(as_line, batch.to_pylist())
    return text_as_bytes(batch.column(0)).to_pylist()


def text_as_bytes(column):
    """A column of an Arrow table with its text as bytes: whether they are UTF-8 is checked later."""
    import pyarrow.types as types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    checks = (types.is_string, types.is_large_string, types.is_string_view)
    is_text = any(check(column.type) for check in checks)
    return column.cast("large_binary") if is_text else column


def dataset_tasks(source, place, cfg):
    """The rows of a Hugging Face dataset."""
    table = load_dataset(source.path, cfg)
    table = table.select_columns(columns_of(cfg, table.column_names, f"hf:{source.path}"))
    if cfg.sft:
        records = (as_line(table[row]) for row in range(place.count, len(table)))
    else:
        starts = range(place.count, len(table), 256)
        records = (text for start in starts for text in table[start : start + 256][cfg.field])
    yield from record_tasks(records, source, place, cfg, len(table))


def load_dataset(name, cfg):
    """Load a dataset: its name on the hub, a folder of its files, or what save_to_disk wrote."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name}: Hugging Face datasets need a package: pip install '.[hf]'") from None
    is_saved = any((Path(name) / mark).is_file() for mark in ("state.json", "dataset_dict.json"))
    try:
        if is_saved:
            table = datasets.load_from_disk(name)
        else:
            table = datasets.load_dataset(name, cfg.hf_config or None, split=cfg.hf_split)
    except Exception as problem:  # a hub, a network and a package of many kinds of exceptions
        reason = str(problem).splitlines()[0] if str(problem) else ""
        raise ValueError(f"hf:{name}: {type(problem).__name__}: {reason}") from None
    if isinstance(table, datasets.DatasetDict):
        if cfg.hf_split not in table:
            raise ValueError(f"hf:{name}: no split '{cfg.hf_split}'; there are {', '.join(table)}; "
                             "name one with --hf_split")
        table = table[cfg.hf_split]
    return table


def check_field(field, names, where):
    """Raise ValueError if a table has no such column."""
    if field not in names:
        raise ValueError(f"{where}: no column '{field}'; there are {', '.join(names)}; "
                         "name the text's with --field")


def documentation_tasks(source, place, cfg):
    """The documentation inside this Python."""
    records = python_docs.documents()
    for _ in range(place.count):
        next(records)
    yield from record_tasks(records, source, place, cfg, 0)
