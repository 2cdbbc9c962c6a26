"""The documentation inside this CPython: a corpus that needs no download."""

import ast
import sysconfig
from collections import deque
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}  # folders


def documents():
    """Yield pydoc's topics, then a text for each module of the standard library."""
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # lib2to3 ships files that are wrong on purpose
            continue
        text = docstrings(tree)
        if text:
            yield text


def docstrings(tree):
    """All docstrings of a module as one text, each below the name and the arguments of what it describes."""
    texts = [ast.get_docstring(tree) or ""]
    for node in definitions(tree):
        if text := ast.get_docstring(node):
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            texts.append(f"{node.name}{arguments}\n{text}")
    return "\n\n".join(text for text in texts if text)


def definitions(tree):
    """Yield the functions and classes of a module in the order of `ast.walk`.

    Expressions hold none and are passed over: they are half of the nodes.
    """
    nodes = deque([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node
        nodes.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
