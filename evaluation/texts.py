"""Measure texts: their NLL under a judge; whether they repeat themselves, each other, or the training text.

Rows are lists of token ids.
"""

import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sampling.generator import Generator

# -------------------------------------------------------------------------------------------------- the judge


def open_judge(run_dir, device, generator):
    """The Generator of the autoregressive run that judges the texts of another; raises ValueError or OSError.

    Its weights are read by `load_weights`.
    """
    judge = Generator.from_checkpoint(run_dir, device, "float32")
    if judge.objective != "ar":
        raise ValueError(f"judge={run_dir} is a {judge.objective} model; its NLL would not be exact, "
                         "so name an autoregressive one")
    own, other = generator.tokenizer, judge.tokenizer
    if (own.name, own.n_vocab) != (other.name, other.n_vocab):
        raise ValueError(f"the judge reads tokens of '{other.name}', the writer writes those of '{own.name}'")
    return judge


@torch.no_grad()
def judge_nll(judge, rows, skip, micro_batch=32):
    """The judge's exact NLL of each row's tokens after the first `skip`: (N,) nats per token.

    The rows are of one length.
    """
    ids = torch.tensor(rows, device=judge.device)
    inputs = F.pad(ids[:, :-1], (1, 0), value=judge.tokenizer.eos_id)  # documents begin after a separator
    nats = []
    for x, y in zip(inputs.split(micro_batch), ids.split(micro_batch)):
        logits = judge.model.logits(judge.model(x))
        by_token = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        nats.append(by_token[:, skip:].double().mean(1))
    return torch.cat(nats).cpu().numpy()


# ------------------------------------------------------------------------------------------- entropy, n-grams


def entropy(row):
    """Entropy in nats of the tokens' frequencies within a row."""
    counts = np.array(list(Counter(row).values()))
    share = counts / len(row)
    return float(-(share * np.log(share)).sum())


def ngrams(row, n):
    """The n-grams of a row, as tuples."""
    return list(zip(*(row[i:] for i in range(n))))


def distinct(rows, n):
    """distinct-n: the different n-grams of all rows together over all their n-grams; nan without any."""
    grams = [gram for row in rows for gram in ngrams(row, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(row, n):
    """The share of a row's n-grams that stood in it before; nan if it is shorter than n."""
    grams = ngrams(row, n)
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


# ----------------------------------------------------------------------------------------- copies of a stream


class Matches(NamedTuple):
    """The windows of n tokens of the rows that stand in a stream, and where."""

    n: int
    in_stream: list  # for each row a bool array: of each of its windows, whether it stands there
    places: list  # (row, column, position in the stream) of the windows that were found, up to a limit

    def of_rows(self, rows):
        """The same with the places of the rows numbered `rows` alone."""
        return self._replace(places=[place for place in self.places if place[0] in rows])


BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2⁶⁴
INVERSE = pow(BASE, -1, 1 << 64)


def powers(base, count):
    """base⁰, base¹, … modulo 2⁶⁴: (count,) uint64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.cumprod(factors)


def hashes(ids, base_powers, inverse_powers, n):
    """Σ_j (ids[i + j] + 1)·BASE^j modulo 2⁶⁴ of every window i of n tokens, from one running sum."""
    sums = np.zeros(len(ids) + 1, np.uint64)
    np.cumsum((ids.astype(np.uint64) + np.uint64(1)) * base_powers[: len(ids)], out=sums[1:])
    return (sums[n:] - sums[:-n]) * inverse_powers[: len(ids) - n + 1]


def search(stream, rows, n, chunk=1 << 21, max_places=10_000):
    """Look up every window of n tokens of the rows in the whole `stream` (tokenfiles.Stream): Matches.

    Exact: hashes only tell where to compare. `chunk`: tokens of the stream that are read at once.
    """
    longest = max([chunk + n, *map(len, rows)])
    tables = powers(BASE, longest), powers(INVERSE, longest)
    rows = [np.asarray(row, np.int64) for row in rows]
    row_hashes = [hashes(row, *tables, n) if len(row) >= n else np.empty(0, np.uint64) for row in rows]
    n_windows = [len(part) for part in row_hashes]
    keys, first, key_of = np.unique(np.concatenate(row_hashes), return_index=True, return_inverse=True)
    if not len(keys):
        return Matches(n, [np.zeros(0, bool)] * len(rows), [])
    window_row = np.repeat(np.arange(len(rows)), n_windows)
    window_column = np.concatenate([np.arange(count) for count in n_windows])
    windows = [rows[window_row[i]][window_column[i] : window_column[i] + n] for i in first]
    windows = np.stack(windows)  # of each key

    key_found, key_places = np.zeros(len(keys), bool), []
    for start in range(0, len(stream) - n + 1, chunk):
        ids = stream.read(start, min(start + chunk + n - 1, len(stream)))
        stream_hashes = hashes(ids, *tables, n)
        key = np.minimum(np.searchsorted(keys, stream_hashes), len(keys) - 1)
        at = np.flatnonzero(keys[key] == stream_hashes)
        equal = np.lib.stride_tricks.sliding_window_view(ids, n)[at] == windows[key[at]]
        at = at[equal.all(1)]
        key_found[key[at]] = True
        kept = at[: max_places - len(key_places)]
        key_places += zip(key[kept].tolist(), (start + kept).tolist())

    window_found = key_found[key_of]
    windows_of_key = {}
    for number in np.flatnonzero(window_found):
        windows_of_key.setdefault(key_of[number], []).append(number)
    places = []
    for number_of_key, position in key_places:
        for number in windows_of_key[number_of_key]:
            places.append((int(window_row[number]), int(window_column[number]), position))
    return Matches(n, np.split(window_found, np.cumsum(n_windows)[:-1]), places[:max_places])


def longest_copy(stream, rows, matches):
    """The longest passage of a row that stands in the stream, from where windows matched.

    Returns (tokens, row, column, position in the stream), zeros if there is none of n tokens.
    """
    best = (0, 0, 0, 0)
    for number, column, place in matches.places:
        row = np.asarray(rows[number])
        before = min(column, place)
        after = min(len(row) - column, len(stream) - place)
        ids = stream.read(place - before, place + after).astype(np.int64)
        same = ids == row[column - before : column + after]
        left = before - (np.flatnonzero(~same[:before]).max(initial=-1) + 1)
        differences = np.flatnonzero(~same[before:])
        right = differences[0] if len(differences) else after
        best = max(best, (int(left + right), number, int(column - left), int(place - left)))
    return best if best[0] >= matches.n else (0, 0, 0, 0)


def copies(streams, rows, held_out, lengths):
    """How much of the rows and of held-out text stands in the training text, in passages of each length.

    Returns {"texts" or "held_out": {"lengths": {n: {"windows": share of all, "rows": share with one}},
    "longest": tokens}}. After a length of which nothing was found, no longer one is looked for.
    """
    everything = rows + held_out
    parts = dict(texts=range(len(rows)), held_out=range(len(rows), len(everything)))
    report = {name: dict(lengths={}, longest=0) for name in parts}
    for n in lengths:
        if max(map(len, everything)) < n:
            break
        matches = [search(stream, everything, n) for stream in streams]
        by_row = zip(*(match.in_stream for match in matches))
        copied = [np.any(by_stream, axis=0) for by_stream in by_row]
        for name, part in parts.items():
            of_part = [copied[number] for number in part if len(copied[number])]
            if not of_part:
                continue
            with_match = [windows.any() for windows in of_part]
            shares = dict(windows=float(np.concatenate(of_part).mean()), rows=float(np.mean(with_match)))
            report[name]["lengths"][n] = shares
            for stream, match in zip(streams, matches):
                tokens, *_ = longest_copy(stream, everything, match.of_rows(part))
                report[name]["longest"] = max(report[name]["longest"], tokens)
        if not any(windows.any() for windows in copied):
            break
    return report


# --------------------------------------------------------------------------------------------- files of texts


class Text(NamedTuple):
    """A text to be measured."""

    new: list  # ids of what was written
    ids: list  # ids of all, of which a judge reads the end that fits
    start: int  # where the new ones begin in `ids`


def read_texts(path, tokenizer, max_length):
    """Read the texts of a .jsonl file that sample.py --out wrote: a list of Text; raises ValueError.

    Of prompt and text together the last max_length tokens are kept for the judge.
    """
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    lines = [line for line in lines if line.strip()]
    result = []
    for number, line in enumerate(lines, 1):
        try:
            ids, new = ids_of(json.loads(line), tokenizer)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
            raise ValueError(f"{path}, line {number}: expected what sample.py --out writes: "
                             '{"text": …, "new": …}, or the first alone') from None
        if max(ids + new, default=0) >= tokenizer.n_vocab:
            raise ValueError(f"{path}, line {number}: ids of another tokenizer")
        if ids[len(ids) - len(new) :] != new:
            new = ids  # holes stood anywhere: then the whole text is judged
        if new:
            start = max(0, min(len(ids), max_length) - len(new))
            result.append(Text(new, ids[-max_length:], start))
    if len(result) < 2:
        raise ValueError(f"{path} holds fewer than two texts")
    return result


def ids_of(record, tokenizer):
    """(ids of the text, ids of its new part) of a record; bytes that are no UTF-8 stand in its ids only."""
    text = record["text"]
    new = record.get("new", text)
    ids = record.get("ids") or tokenizer.encode(text).tolist()
    new_ids = record.get("new_ids") or tokenizer.encode(new, continues=new != text).tolist()
    return ids, new_ids
