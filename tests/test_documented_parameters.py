"""The parameters that docstrings name under `Args:` are there, all of them, in their order."""

import ast
import re
from pathlib import Path

import pytest

LOSSRAY = Path(__file__).resolve().parents[1] / "lossray"
SOURCES = sorted(LOSSRAY.rglob("*.py"))
ENTRY = re.compile(r"^    \*{0,2}(\w+): ", re.MULTILINE)
ARGS = re.compile(r"^Args:\n((?:    .*\n|\n)*)", re.MULTILINE)


def name_of(path):
    return str(path.relative_to(LOSSRAY))


def documented(node):
    """The names in the `Args:` section of a docstring, in order; None without the section."""
    section = ARGS.search(f"{ast.get_docstring(node) or ''}\n")
    return None if section is None else ENTRY.findall(section[1])


def parameters(function):
    """The names of a function's parameters, in order."""
    of = function.args
    starred = [star for star in (of.vararg,) if star]
    everything = [*of.posonlyargs, *of.args, *starred, *of.kwonlyargs, *([of.kwarg] if of.kwarg else [])]
    return [one.arg for one in everything if one.arg not in ("self", "cls")]


def documented_parameters(tree):
    """Functions, and classes with an `__init__` of their own: what parameters they document, and take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name, documented(node), parameters(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    yield node.name, documented(node), parameters(method)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_parameters_that_are_documented_are_there(path):
    for name, named, taken in documented_parameters(ast.parse(path.read_text())):
        assert named in (None, taken), name


def test_a_parameter_that_is_not_there_is_noticed():
    source = '''def norm(vector, *, order=2):
        """Its norm.

        Args:
            vector: [d], or
                several: [d, k].
            power: of the components.

        Returns:
            order: no name of a parameter.
        """
    '''
    (function,) = ast.parse(source).body
    assert documented(function) == ["vector", "power"]
    assert parameters(function) == ["vector", "order"]
