"""The floors of the house: imports go down, or stay within their folder; no module imports a command."""

import ast

from conftest import ROOT

FLOORS = [
    {"model", "diffusion", "kernels"},
    {"data", "corpus", "configurator"},
    {"training"},
    {"evaluation", "interop", "sampling"},
    {"train", "eval", "convert", "sample"},
    {"laws", "benchmarks"},  # laws.sweep and laws.study read train.Config: they drive train.py
    {"scaling", "bench"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
COMMANDS = {"train", "eval", "convert", "sample", "scaling", "bench"}
DRIVERS = {"laws/sweep.py", "laws/study.py"}
WITHIN_A_FLOOR = {("data", "corpus"), ("corpus", "configurator"), ("model", "kernels"),
                  ("diffusion", "kernels"), ("evaluation", "sampling")}


def imports_of(path):
    """The first components of all that a file imports, at any depth in it."""
    for node in ast.walk(ast.parse(path.read_text())):
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
