"""Check that a checkout computes what 48006ab computed: the record is made anew and compared.

    python tests/golden/check.py                            # this checkout: a line per case
    python tests/golden/check.py --only='masked*' --jobs=2  # some cases, two at a time
    python tests/golden/check.py --record=new.json          # compare a record that record.py has made

It exits with 1 if something differs. On the machine of the record (its CPU and torch) every figure must be
the same to the last bit, and every text and token. Elsewhere figures may differ by a thousandth, and tokens
that differ are reported, but are no failure.
"""

import json
import math
import re
import sys
from fnmatch import fnmatch
from pathlib import Path

import record

GOLDEN = record.HERE / "48006ab.json"
# Relative differences that are allowed on another machine: of most cases, and of those that amplify rounding;
# figures with one of the words of LOOSE in their names may be LOOSER times as far off.
TOLERANCE = {
    "scaling_fit*": 0.1, "*bfloat16": 0.15, "adapt": 0.01, "eval_shifted": 0.01,
    "writer_*": 0.01, "tasks": 0.01, "eval_uniform": 0.01,  # after 120 steps of training
    "*": 1e-3}
LOOSE, LOOSER = ("error", "grad_norm", "curve", "noise_csv"), 50
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*(?:e[+-]?\d+)?")


def close(old, new, tolerance):
    """Whether two figures are the same, or differ by no more than the tolerance, if there is one."""
    if old == new or math.isnan(old) and math.isnan(new):
        return True
    return tolerance > 0 and abs(new - old) <= tolerance * max(abs(old), abs(new), 1e-3)


def differences(old, new, tolerance=0.0, place=()):
    """Yield (place, old, new) of everything that differs; a place is the keys and indices that lead there."""
    number = (int, float)
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from differences(old.get(key), new.get(key), tolerance, (*place, key))
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield (*place, "length"), len(old), len(new)
        for i, (was, now) in enumerate(zip(old, new)):
            yield from differences(was, now, tolerance, (*place, i))
    elif isinstance(old, number) and isinstance(new, number) and not isinstance(old, bool):
        if not close(old, new, tolerance):
            yield place, old, new
    elif isinstance(old, str) and isinstance(new, str) and tolerance:
        if NUMBER.sub("#", old).split() != NUMBER.sub("#", new).split() or any(
            not close(float(was.replace(",", "")), float(now.replace(",", "")), tolerance)
            for was, now in zip(NUMBER.findall(old), NUMBER.findall(new))
        ):
            yield place, old, new
    elif old != new or type(old) is not type(new):
        yield place, old, new


def named(place, figures):
    """A place in words: of a list with a figure per line of metrics.jsonl, with the step."""
    if len(place) > 1 and isinstance(place[-1], int):
        *outer, name, i = place
        for key in outer:
            figures = figures[key]
        kind = (
            "val_step"
            if str(name).startswith("val_")
            else "task_step"
            if str(name).startswith("eval/")
            else "step"
        )
        steps = figures.get(kind) if isinstance(figures, dict) else None
        if isinstance(steps, list) and i < len(steps) == len(figures[name]):
            return " ".join([*map(str, outer), f"{name} at step {steps[i]}"])
    return ".".join(map(str, place))


def off(old, new):
    """Two things that differ, in few words."""
    if isinstance(old, (int, float)) and isinstance(new, (int, float)):
        relative = (
            f", {abs(new - old) / max(abs(old), 1e-300):.1e} of it off" if math.isfinite(new - old) else ""
        )
        return f"{new!r} instead of {old!r}{relative}"
    if isinstance(old, str) and isinstance(new, str):
        same = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
        start = max(0, same - 20)
        return f"{new[start : same + 30]!r} instead of {old[start : same + 30]!r}, from character {same} on"
    return f"{str(new)[:60]} instead of {str(old)[:60]}"


def loosened(place, tolerance):
    """The tolerance of one figure."""
    return tolerance * LOOSER if any(word in str(part) for part in place for word in LOOSE) else tolerance


def written(name, place):
    """Whether a figure is of what a model wrote: one other token, and all that follows is another text."""
    return name.startswith(("sample_", "frontier")) or bool({"texts", "sample", "infill"} & set(place))


def compared(name, old, new, exact):
    """(whether a case is right, what to say of it)."""
    if "failed" in new or "not_run" in new:
        return "installed" in new.get("not_run", ""), " ".join(
            f"{key}: {value}" for key, value in new.items()
        )
    if exact:
        found = sorted(differences(old, new), key=lambda one: "loss" not in one[0])
    else:
        tolerance = next(value for pattern, value in TOLERANCE.items() if fnmatch(name, pattern))
        far = [
            (place, was, now)
            for place, was, now in differences(old, new, tolerance)
            if next(differences(was, now, loosened(place, tolerance)), None)
        ]
        found = sorted(far, key=lambda one: written(name, one[0]))
    if not found:
        return True, "equal" if old == new else "equal within tolerance"
    place, was, now = found[0]
    said = f"{named(place, old)}: {off(was, now)}" + f"; {len(found)} differences" * (len(found) > 1)
    if not exact and written(name, place):
        return True, f"other text, which is no failure on another machine: {said}"
    return False, f"differs: {said}"


def here(about):
    """This machine as a record describes it."""
    return {key: about[key] for key in ("cpu", "torch")}


def main():
    parser = record.flags(__doc__)
    parser.add_argument("--record", help="a record to compare instead of making one")
    parser.add_argument("--golden", default=str(GOLDEN), help="the record to compare with")
    asked = parser.parse_args()
    golden = json.loads(Path(asked.golden).read_text(encoding="utf-8"))
    wrong, exact = [], True

    def say(name, figures, seconds=None):
        right, words = compared(name, golden["cases"].get(name, {}), figures, exact)
        wrong.extend([] if right else [name])
        print(f"{name:36} {words}", flush=True)

    new = json.loads(Path(asked.record).read_text(encoding="utf-8")) if asked.record else None
    record.set_up()
    about = new["about"] if new else record.machine()
    exact = here(about) == here(golden["about"])
    if not exact:
        print(
            f"recorded on another machine ({', '.join(map(str, here(golden['about']).values()))}), this is "
            f"{', '.join(map(str, here(about).values()))}: compared within tolerances"
        )
    if new:
        for name, figures in new["cases"].items():
            say(name, figures)
    else:
        new = record.record(asked.checkout, asked.only, asked.jobs, asked.fresh, asked.work, say)
    wanted = [
        name for name in golden["cases"] if any(fnmatch(name, pattern) for pattern in asked.only.split(","))
    ]
    for name in wanted:
        if name not in new["cases"] and not asked.record:
            say(name, dict(failed="there is no such case any more"))
    print(
        f"{len(new['cases'])} cases: "
        + (f"{len(set(wrong))} differ: {', '.join(sorted(set(wrong)))}" if wrong else "none differs")
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
