"""Docstrings begin with a noun phrase that has its head, or with a verb in the imperative."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cce"
HEADLESS = ("Of ", "What ", "As ", "See ", "Those ", "Whose ", "Where ", "That ")
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})


def docstrings(source: str) -> list[tuple[int, str]]:
    """Line and docstring of the module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    found = [(node.body[0].lineno, ast.get_docstring(node)) for node in nodes if node.body]
    return [(line, text) for line, text in found if text]


def headless(source: str) -> list[str]:
    """Docstrings that begin with a word that has no noun to stand on, with their lines."""
    return [f"{line}: {text.splitlines()[0]}" for line, text in docstrings(source) if text.startswith(HEADLESS)]


def test_a_headless_docstring_is_found():
    source = 'def f():\n    """What f returns."""\n\n\nclass C:\n    """A class."""\n'
    assert headless(source) == ["2: What f returns."]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_have_a_head(folder):
    found = [f"{path}:{text}" for path in sorted(folder.glob("*.py")) for text in headless(path.read_text("utf-8"))]
    assert not found, "\n".join(found)
