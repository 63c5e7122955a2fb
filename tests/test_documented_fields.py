"""Docstrings name what there is: the fields of dataclasses under `Attributes:`, parameters under `Args:`."""

import ast
import re
from pathlib import Path

import pytest

LOSSRAY = Path(__file__).resolve().parents[1] / "lossray"
ROOMS = ("connectivity", "networks", "nullity", "operators", "spectra", "training", "geometry", "study")
SOURCES = sorted(LOSSRAY.rglob("*.py"))
ENTRY = re.compile(r"^    \*{0,2}(\w+): ", re.MULTILINE)
SECTION = r"^{}:\n((?:    .*\n|\n)*)"


def name_of(path):
    return str(path.relative_to(LOSSRAY))


def documented(node, section):
    """The names in a section of a docstring, in order; None without the section."""
    found = re.search(SECTION.format(section), f"{ast.get_docstring(node) or ''}\n", re.MULTILINE)
    return None if found is None else ENTRY.findall(found[1])


def is_public_dataclass(node):
    return (
        isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)
    )


def fields(node):
    """The public fields of a dataclass, in order."""
    names = [child.target.id for child in node.body if isinstance(child, ast.AnnAssign)]
    return [name for name in names if not name.startswith("_")]


def parameters(function):
    """The names of a function's parameters, in order."""
    of = function.args
    starred = [star for star in (of.vararg,) if star]
    everything = [*of.posonlyargs, *of.args, *starred, *of.kwonlyargs, *([of.kwarg] if of.kwarg else [])]
    return [one.arg for one in everything if one.arg not in ("self", "cls")]


@pytest.mark.parametrize(
    "path", [p for room in ROOMS for p in sorted((LOSSRAY / room).glob("*.py"))], ids=name_of
)
def test_the_fields_of_dataclasses_are_documented(path):
    for node in filter(is_public_dataclass, ast.walk(ast.parse(path.read_text()))):
        assert documented(node, "Attributes") == fields(node), node.name


def documented_parameters(tree):
    """Functions, and classes with an `__init__` of their own: what parameters they document, and take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name, documented(node, "Args"), parameters(node)
        elif isinstance(node, ast.ClassDef):
            for own in node.body:
                if isinstance(own, ast.FunctionDef) and own.name == "__init__":
                    yield node.name, documented(node, "Args"), parameters(own)


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
    assert documented(function, "Args") == ["vector", "power"]
    assert parameters(function) == ["vector", "order"]
