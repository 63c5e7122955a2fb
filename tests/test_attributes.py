"""Every public dataclass says under `Attributes:` what each of its fields holds."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("flows", "lossray", "tasks")


def dataclasses(path: Path) -> Iterator[ast.ClassDef]:
    """The public ones of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and is_dataclass(node):
            yield node


def is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """The public fields of a class, class variables left out."""
    return [
        line
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and not ast.unparse(line.target).startswith("_")
        and "ClassVar" not in ast.unparse(line.annotation)
    ]


def documented(node: ast.ClassDef) -> list[str]:
    """The names under Attributes: of a class docstring, in their order."""
    _, _, section = (ast.get_docstring(node) or "").partition("\nAttributes:\n")
    section = re.split(r"\n(?=\S)", section)[0]  # up to the next section
    return re.findall(r"^ {4}(\w+): \S", section, flags=re.MULTILINE)


@pytest.mark.parametrize("folder", ROOMS)
def test_the_fields_of_public_dataclasses_are_documented_in_their_order(folder: str) -> None:
    classes = [node for path in sorted((ROOT / folder).rglob("*.py")) for node in dataclasses(path)]
    assert classes
    for node in classes:
        assert documented(node) == [ast.unparse(field.target) for field in fields(node)], node.name


def test_a_field_without_a_line_is_noticed() -> None:
    source = '''
@dataclass(frozen=True)
class Pair:
    """Two numbers.

    Attributes:
        first: the one.

    Example:
        second: not a field's line.
    """

    first: float
    second: float
'''
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.ClassDef)
    assert documented(node) == ["first"]
    assert [ast.unparse(field.target) for field in fields(node)] == ["first", "second"]
