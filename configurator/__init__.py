"""Settings: one dataclass per script, Python override files, then --key=value flags.

    python train.py configurator/quickstart.py --lr=3e-4 --compile=no

Files and flags are applied from left to right. A file holds plain assignments, runs in a namespace
of its own and may build on another one with `from configurator.quickstart import *`. Everything
that is wrong is reported at once, before anything starts.
"""

import dataclasses
import difflib
import json
import math
import os
import runpy
import sys
import types
import typing
from pathlib import Path


def setting(default, doc, *, low=None, high=None, above=None, changes_result=True):
    """A dataclass field with a one-line `doc`; `low`/`high` are inclusive bounds, `above` is a strict one.

    changes_result: False for a setting that cannot move a loss by more than the order of float sums does
    (where a run is written, how often, on what hardware): two parts of one run may differ in it.
    """
    metadata = dict(doc=doc, low=low, high=high, above=above, changes_result=changes_result)
    return dataclasses.field(default=default, metadata=metadata)


def neutral_settings(settings):
    """The names of a dataclass's settings that do not change the result of a run."""
    return {field.name for field in dataclasses.fields(settings) if not field.metadata["changes_result"]}


def fail(*problems, everywhere=False):
    """Print one line per problem and exit with code 2. Under torchrun every rank finds the same problems, so one
    per machine speaks; `everywhere` is for what a single rank may have met."""
    rank = os.environ.get("RANK", "0")
    if everywhere or os.environ.get("LOCAL_RANK", rank) == "0":
        for problem in problems:
            print(f"{Path(sys.argv[0]).name}: " + (f"rank {rank}: " if everywhere and rank != "0" else "") + str(problem), file=sys.stderr)
    raise SystemExit(2)


def load(settings, argv=None, about="", aliases=None):
    """Build `settings` (a dataclass type) from override files and flags; exit on --help or bad input.

    aliases: {other name: setting}, names that users know from elsewhere.

    If the dataclass has a method `problems()`, the lines it returns (incompatible settings) are
    reported together with unknown names, wrong types and values out of range. Not if an override file
    could not be read: what it would have set may well go together.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") == "0":
            try:
                print(usage(settings, about, aliases or {}), flush=True)
            except BrokenPipeError:  # as of `| head`: nothing is left for Python to say at its end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    fields, types_ = {f.name: f for f in dataclasses.fields(settings)}, typing.get_type_hints(settings)
    values, problems, unread, called = {}, [], False, {}

    def assign(name, value, where):
        said, name = name, (aliases or {}).get(name, name)
        if where.startswith("--") and called.setdefault(name, said) != said:
            return problems.append(f"{where}: '{said}' and '{called[name]}' are one setting; give one of them")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see --help for all settings"
            return problems.append(f"{where}: unknown setting '{name}'; {hint}")
        try:
            values[name] = within(fields[name], convert(value, types_[name]))
        except (ValueError, OverflowError) as problem:
            problems.append(f"{where}: {problem}" if where.startswith("--") else f"{where}: {name}={value!r}: {problem}")

    for arg in argv:
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            meant = (aliases or {}).get(name, name)
            if not equals and meant in fields and types_[meant] is not bool:
                problems.append(f"{arg}: write --{name}=VALUE")
            else:
                assign(name, value if equals else "True", arg)  # a bare --flag switches a bool on
        elif not os.path.isfile(arg):  # Path.is_file raises on names that are too long
            problems.append(f"{arg}: no such override file (flags are written --key=value)")
            unread = True
        else:
            try:
                overrides = read_file(arg)
            except Exception as problem:  # the user's own Python: whatever it raises is what is wrong with it
                problems.append(f"{arg}: {type(problem).__name__}: {problem}")
                unread = True
                continue
            for name, value in overrides.items():
                assign(name, value, arg)
    result = settings(**values)
    if hasattr(result, "problems") and not unread:
        problems += result.problems()
    if problems:
        fail(*problems)
    return result


def read_file(path):
    """The plain assignments of an override file; modules, functions, classes and _names are left out."""
    folder = str(Path(path).resolve().parent)  # a file outside configurator/ may import its neighbours
    before = set(sys.modules)
    sys.path.insert(0, folder)
    try:
        names = runpy.run_path(str(path))
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - before:  # another folder may have neighbours of the same names
            if str(getattr(sys.modules[name], "__file__", "")).startswith(folder + os.sep):
                del sys.modules[name]
    skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    return {k: v for k, v in names.items() if not k.startswith("_") and not isinstance(v, skip)}


def convert(value, kind):
    """`value` (text from a flag, or an object from a file) as a `kind`: bool, int, float, str or a Literal."""
    if typing.get_origin(kind) is typing.Literal:
        allowed = typing.get_args(kind)
        if value in allowed:
            return value
        near = difflib.get_close_matches(str(value), allowed, n=1)
        raise ValueError(f"choose from {', '.join(allowed)}" + (f"; did you mean '{near[0]}'?" if near else ""))
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "1", "false", "no", "0"):
            return str(value).lower() in ("true", "yes", "1")
        raise ValueError("expected True or False")
    if kind is str:
        if isinstance(value, (str, Path)):
            return str(value)
        raise ValueError("expected text")
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError("expected a number")
    try:
        number = value
        if isinstance(value, str):  # 250K, 1.5B, 15T: as people write parameters and tokens
            unit = dict(K=1e3, M=1e6, B=1e9, T=1e12).get(value[-1:], 1)
            value = value[:-1] if unit > 1 else value
            number = float(value.replace("_", "")) * unit
            value = value if unit == 1 else number
    except ValueError:
        raise ValueError("expected a number") from None
    if kind is float:
        if not math.isfinite(number):
            raise ValueError("expected a finite number")
        return float(number)
    if not math.isfinite(number) or number != int(number):
        raise ValueError("expected a whole number")
    try:
        return int(value)  # exact for digits; floats hold whole numbers only up to 2**53
    except ValueError:
        return int(number)  # 1e6 written as text


def split(text):
    """The parts of a setting that is a list: text with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def within(field, value):
    """`value` if it lies within the field's bounds; raises ValueError otherwise."""
    low, high, above = (field.metadata.get(k) for k in ("low", "high", "above"))
    if low is not None and not value >= low:
        raise ValueError(f"must be at least {low}")
    if above is not None and not value > above:
        raise ValueError(f"must be above {above}")
    if high is not None and not value <= high:
        raise ValueError(f"must be at most {high}")
    return value


def usage(settings, about, aliases):
    """The text of --help: every setting with its type, default and doc, and its other names."""
    hints = typing.get_type_hints(settings)
    lines = [about.strip(), "", "settings (--key=value, or key = value in a Python override file):"]
    for f in dataclasses.fields(settings):
        kind = hints[f.name]
        name = "|".join(typing.get_args(kind)) if typing.get_origin(kind) is typing.Literal else kind.__name__
        also = "".join(f", also --{other}" for other, meant in aliases.items() if meant == f.name)
        lines.append(f"  --{f.name}={f.default!r}  ({name}{also})\n      {f.metadata['doc']}")
    return "\n".join(lines)


def dump(settings):
    """The resolved settings as indented JSON."""
    return json.dumps(dataclasses.asdict(settings), indent=2)
