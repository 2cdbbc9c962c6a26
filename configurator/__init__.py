"""Settings: one dataclass per script, Python override files, then --key=value flags.

    python train.py configurator/quickstart.py --lr=3e-4 --compile=no

Files and flags are applied from left to right. A file holds plain assignments, runs in a namespace
of its own and may build on another one with `from configurator.quickstart import *`. Everything
that is wrong is reported at once, before anything starts.
"""

import dataclasses
import decimal
import difflib
import json
import math
import os
import runpy
import sys
import types
import typing
from pathlib import Path

from configurator.renamed import GONE, SETTINGS


def setting(default, doc, *, low=None, high=None, above=None, changes_result=True):
    """A dataclass field with a one-line `doc`; `low`/`high` are inclusive bounds, `above` is a strict one.

    changes_result: False for a setting that cannot move a loss by more than the order of float sums does
    (where a run is written, how often, on what hardware): two parts of one run may differ in it.
    """
    metadata = dict(doc=doc, low=low, high=high, above=above, changes_result=changes_result)
    return dataclasses.field(default=default, metadata=metadata)


def neutral(default, doc, **bounds):
    """A setting that does not change the result of a run."""
    return setting(default, doc, **bounds, changes_result=False)


def neutral_settings(settings):
    """The names of a dataclass's settings that do not change the result of a run."""
    return {field.name for field in dataclasses.fields(settings) if not field.metadata["changes_result"]}


def changed(settings):
    """{name: value} of the settings that differ from their defaults."""
    values = vars(settings)
    return {field.name: values[field.name] for field in dataclasses.fields(settings)
            if values[field.name] != field.default}


def check_meaning(settings, meaningless, objective):
    """Raise ValueError if one of the `meaningless` settings is given: it does nothing for this objective."""
    for name, value in changed(settings).items():
        if name in meaningless:
            raise ValueError(f"{name}={value} has no meaning for objective={objective}")


def fail(*problems, everywhere=False):
    """Print one line per problem and exit with code 2.

    Under torchrun every rank finds the same problems, so one per machine speaks; `everywhere` is for what a
    single rank may have met.
    """
    rank = os.environ.get("RANK", "0")
    if everywhere or os.environ.get("LOCAL_RANK", rank) == "0":
        speaker = Path(sys.argv[0]).name
        if everywhere and rank != "0":
            speaker += f": rank {rank}"
        for problem in problems:
            print(f"{speaker}: {problem}", file=sys.stderr)
    raise SystemExit(2)


def load(settings, argv=None, about="", aliases=None):
    """Build `settings` (a dataclass type) from override files and flags; exit on --help or bad input.

    aliases: {another name: setting}, names that users know from elsewhere; those of configurator/renamed.py
    hold for every command.

    Unknown names, wrong types and values out of range are reported together with what does not go together:
    the dataclass's table NEEDS (see `unmet_needs`) and the lines that its method `problems()` returns. Not if
    an override file could not be read: its settings might well go together.
    """
    argv = sys.argv[1:] if argv is None else argv
    aliases = aliases or {}
    if {"-h", "--help"} & set(argv):
        show_help(settings, about, aliases)
    reading = Reading(settings, {**SETTINGS, **aliases})
    for arg in argv:
        if arg.startswith("--"):
            reading.flag(arg)
        else:
            reading.file(arg)
    result = settings(**reading.values)
    problems = list(reading.problems)
    if not reading.unread_file:
        problems += unmet_needs(result, getattr(settings, "NEEDS", {}))
        try:
            problems += result.problems() if hasattr(result, "problems") else []
        except OSError as problem:  # of a name that no file can have
            problems.append(str(problem))
    if problems:
        fail(*problems)
    return result


class Reading:
    """The values that override files and flags give to a dataclass's settings, and the problems in them."""

    def __init__(self, settings, aliases):
        self.fields = {f.name: f for f in dataclasses.fields(settings)}
        self.types = typing.get_type_hints(settings)
        self.aliases = {other: name for other, name in aliases.items() if other not in self.fields}
        self.values, self.problems, self.unread_file = {}, [], False
        self.flag_names = {}  # under which of its names a setting was given as a flag

    def flag(self, arg):
        """Apply --name=value, or --name, which switches a bool on."""
        name, equals, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        setting_name = self.aliases.get(name, name)
        if not equals and setting_name in self.fields and self.types[setting_name] is not bool:
            self.problems.append(f"{arg}: write --{name}=VALUE")
            return
        if self.flag_names.setdefault(setting_name, name) != name:
            other = self.flag_names[setting_name]
            self.problems.append(f"{arg}: '{name}' and '{other}' are one setting; give one of them")
            return
        self.assign(name, value if equals else "True", arg, arg)

    def file(self, path):
        """Apply an override file's assignments."""
        if not os.path.isfile(path):  # Path.is_file raises on names that are too long
            self.problems.append(f"{path}: no such override file (flags are written --key=value)")
            self.unread_file = True
            return
        try:
            overrides = read_file(path)
        except KeyboardInterrupt:
            raise
        except BaseException as problem:  # the user's own Python: whatever it raises is what is wrong with it
            line = f"{path}: {type(problem).__name__}: {problem}"
            for old, new in SETTINGS.items():  # imported from another override file under its old name
                line += f"; '{old}' is called '{new}' now" if f"'{old}'" in str(problem) else ""
            self.problems.append(line)
            self.unread_file = True
            return
        for name, value in overrides.items():
            self.assign(name, value, path, f"{path}: {name}={brief(value)}")

    def assign(self, name, value, source, assignment):
        """Set one value; source and assignment are for errors: where it stands, and how it reads there."""
        setting_name = self.aliases.get(name, name)
        if setting_name not in self.fields:
            self.problems.append(f"{source}: {unknown_setting(name, self.fields)}")
            return
        try:
            converted = convert(value, self.types[setting_name])
            self.values[setting_name] = within(self.fields[setting_name], converted)
        except (ValueError, OverflowError) as problem:
            self.problems.append(f"{assignment}: {problem}")


def brief(value):
    """An override file's value as text, of 100 characters at most: it may be any object."""
    try:
        text = repr(value)
    except Exception as problem:  # its own, or a whole number of too many digits
        return f"{type(value).__name__} without text ({type(problem).__name__})"
    return text if len(text) <= 100 else text[:97] + "…"


def unknown_setting(name, known):
    """What to say of a setting that does not exist."""
    if name in GONE:
        return f"there is no setting '{name}' any more; {GONE[name]}"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "see --help for all settings"
    return f"unknown setting '{name}'; {hint}"


def unmet_needs(settings, needs):
    """One line for each of `needs` that the settings break: {"loss=paper": "objective=uniform", …}.

    A key is a setting that differs from its default, or one value of it. Its needs stand with ", " between,
    the values that will do with "|" between; a name alone must differ from its default, and "a or b" needs
    either.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}

    def holds(condition):
        name, equals, values = condition.partition("=")
        value = getattr(settings, name)
        return str(value) in values.split("|") if equals else value != defaults[name]

    problems = []
    for key, wanted in needs.items():
        if not holds(key):
            continue
        name = key.partition("=")[0]
        value = getattr(settings, name)
        for need in wanted.split(", "):
            if any(map(holds, need.split(" or "))):
                continue
            named = name if value is True else f"{name}={value}"
            phrase = need.replace("|", " or ")
            problems.append(f"{named} needs {phrase} (or {name}={defaults[name]!r})")
    return problems


def show_help(settings, about, aliases):
    """Print the help on rank 0, and exit."""
    if os.environ.get("RANK", "0") == "0":
        print(usage(settings, about, aliases))
    raise SystemExit(0)


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


def override_text(values, comments=()):
    """The text of an override file: comments, a line each, then {name: value}, read back equal."""
    lines = ["# " + "".join(c if c.isprintable() else " " for c in comment) for comment in comments]
    lines += [f"{name} = {value!r}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def convert(value, kind):
    """`value`, text from a flag or an object from a file, as a bool, int, float, str or Literal `kind`."""
    if typing.get_origin(kind) is typing.Literal:
        allowed = typing.get_args(kind)
        if value in allowed:
            return value
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"choose from {', '.join(allowed)}{hint}")
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
    number = value
    if isinstance(value, str):
        number = parse_number(value)
    if kind is float:
        if not math.isfinite(number):
            raise ValueError("expected a finite number")
        return float(number)
    if not isinstance(number, int) and (not math.isfinite(number) or number != int(number)):
        raise ValueError("expected a whole number")
    if abs(number) >= 1 << 63:
        raise ValueError("must be below 2^63")
    return int(number)


UNITS = dict(K=10**3, M=10**6, B=10**9, T=10**12)
EXACT = decimal.Context(prec=400)  # digits: more than any float has


def parse_number(text):
    """A Decimal from text, also as people write parameters and tokens: 250K, 8.2M, 15T. Raises ValueError."""
    unit = UNITS.get(text[-1:], 1)
    digits = (text[:-1] if unit > 1 else text).replace("_", "")
    try:
        number = float(digits)
    except ValueError:
        raise ValueError("expected a number") from None
    return EXACT.multiply(decimal.Decimal(digits if math.isfinite(number) else number), unit)


def split(text):
    """The parts of a setting that is a list: text with commas between."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_paths(text, is_there=os.path.exists):
    """The parts of a setting that is a list of paths. A path that is there may hold commas itself."""
    parts, paths = text.split(","), []
    while parts:
        joined = [",".join(parts[:n]).strip() for n in range(len(parts), 0, -1)]
        n = next((len(parts) - i for i, path in enumerate(joined) if "," in path and is_there(path)), 1)
        paths.append(joined[-n])
        parts = parts[n:]
    return [path for path in paths if path]


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
