"""The documentation inside this CPython: a corpus that needs no download."""

import ast
import sysconfig
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
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    texts = [ast.get_docstring(tree) or ""]
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node):
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            texts.append(f"{node.name}{arguments}\n{ast.get_docstring(node)}")
    return "\n\n".join(text for text in texts if text)
