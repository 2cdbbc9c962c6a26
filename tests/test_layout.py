"""What holds for every file: imports go down, no module imports a command, texts are UTF-8."""

import ast

from conftest import ROOT

FLOORS = [
    {"model", "diffusion", "kernels", "terminal"},
    {"data", "corpus", "configurator"},
    {"training"},
    {"evaluation", "interop", "sampling"},
    {"train", "eval", "convert", "sample"},
    {"laws", "benchmarks"},  # laws.sweep, study and optimizers read train.Config: they drive train.py
    {"scaling", "bench"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
COMMANDS = {"train", "eval", "convert", "sample", "scaling", "bench"}
DRIVERS = {"laws/sweep.py", "laws/study.py", "laws/optimizers.py", "laws/data_constrained.py"}
WITHIN_A_FLOOR = {("data", "corpus"), ("corpus", "configurator"), ("model", "kernels"),
                  ("diffusion", "kernels"), ("evaluation", "sampling")}
TEXT_CALLS = {"open": 1, "read_text": 0, "write_text": 1}  # where the mode of a file, or its encoding, stands
OTHER_OPENS = {"os", "self", "Image", "tarfile"}  # whose open() is not of text


def imports_of(path):
    """The first components of all that a file imports, at any depth in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def ours():
    """(path from the root, its first component) of every Python file of the project but tests and results."""
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if not place.parts[0].startswith(("tests", "results", ".", "build", "corpora", "runs")):
            yield place, place.parts[0].removesuffix(".py")


def test_imports_go_down():
    wrong = []
    for place, here in ours():
        for name in imports_of(ROOT / place):
            down = name == here or FLOOR.get(name, -1) < FLOOR[here] or (here, name) in WITHIN_A_FLOOR
            if not down:
                wrong.append(f"{place} imports {name}")
    assert not wrong


def test_no_module_imports_a_command():
    wrong = []
    for place, here in ours():
        commands = COMMANDS & set(imports_of(ROOT / place)) - {here}
        if str(place) in DRIVERS:
            commands -= {"train"}
        wrong += [f"{place} imports {command}" for command in commands]
    assert not wrong


def is_in_bytes(call, place):
    """True if a call of open() names a mode with a b."""
    modes = call.args[place : place + 1] + [word.value for word in call.keywords if word.arg == "mode"]
    return any("b" in mode.value for mode in modes if isinstance(mode, ast.Constant))


def opens_text_by_locale(call):
    """True if a call opens, reads or writes a text without saying in which encoding."""
    if any(word.arg == "encoding" for word in call.keywords):
        return False
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if method else getattr(call.func, "id", "")
    if name not in TEXT_CALLS:
        return False
    place = TEXT_CALLS[name] - (method and name == "open")
    if name != "open":
        return len(call.args) <= place
    owner = ast.unparse(call.func.value) if method else ""
    return owner not in OTHER_OPENS and not is_in_bytes(call, place)


def test_texts_are_utf8():
    """The locale's encoding can't write a × everywhere, and misreads files from elsewhere."""
    wrong = []
    for path in [*(ROOT / place for place, _ in ours()), *sorted((ROOT / "tests").rglob("*.py"))]:
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(node, ast.Call))
        wrong += [f'{path.relative_to(ROOT)}:{call.lineno} needs encoding="utf-8"'
                  for call in calls if opens_text_by_locale(call)]
    assert not wrong
