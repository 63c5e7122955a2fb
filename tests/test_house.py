"""The rules of the house, docs/architecture.md: an import goes down a floor, or sideways inside its room."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "lossray.errors": 1,
    "lossray.imports": 1,
    "lossray.limits": 1,
    "lossray.memory": 1,
    "lossray.names": 1,
    "lossray.packages": 1,
    "lossray.plugins": 1,
    "lossray.references": 1,
    "lossray.seeds": 1,
    "lossray.settings": 1,
    "lossray.source_hash": 1,
    "lossray.statements": 1,
    "lossray.user_modules": 1,
    "lossray.spectra": 2,
    "lossray.storage": 2,
    "lossray.networks": 3,
    "lossray.operators": 4,
    "lossray.training": 4,
    "lossray.connectivity": 5,
    "lossray.nullity": 5,
    "lossray.geometry": 5,
    "lossray.ensembles": 6,
    "lossray.study": 7,
    "lossray.measures": 8,
    "lossray.restored": 8,
    "lossray.findings": 9,
    "lossray.results": 9,
    "tasks": 10,
    "flows": 11,
}
EMPTY_NAMES = {"found", "known", "own", "place", "places", "theirs", "wanted"}
SHARED_STEMS = {"__init__", "settings"}
SOURCES = sorted(path for package in ("lossray", "tasks", "flows") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    """The room a module of ours lies in; None for anything else."""
    names = [name for name in FLOORS if module == name or module.startswith(f"{name}.")]
    return names[0] if names else None


def imported(tree: ast.AST) -> set[str]:
    """Every module imported, the facade `import lossray` apart."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def upward(importer: str, tree: ast.AST) -> list[str]:
    """The imports of ``importer`` that break the rule."""
    home = room(importer)
    others = {target: room(target) for target in imported(tree)}
    return sorted(
        target
        for target, other in others.items()
        if home and other and other != home and FLOORS[other] >= FLOORS[home] and FLOORS[home] > 1
    )


def test_every_module_has_a_floor():
    assert [name for name in map(module_name, SOURCES) if name != "lossray" and room(name) is None] == []


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_only_go_down(path):
    assert upward(module_name(path), ast.parse(path.read_text())) == []


def test_the_rule_notices_an_import_that_goes_up():
    tree = ast.parse("from lossray.training.loop import train\nimport tasks.jobs")
    assert upward("lossray.spectra.analysis", tree) == [
        "lossray.training.loop",
        "lossray.training.loop.train",
        "tasks.jobs",
    ]


def test_spectra_know_no_network_and_no_study():
    for path in (ROOT / "lossray" / "spectra").glob("*.py"):
        rooms = {room(target) for target in imported(ast.parse(path.read_text()))} - {None, "lossray.spectra"}
        assert all(FLOORS[name] == 1 for name in rooms), path


def test_tasks_are_short_and_compute_nothing():
    """They locate, measure, publish and commit: of torch they name devices and types, of numpy nothing."""
    allowed = {"Tensor", "cuda", "device", "dtype", "set_num_threads"}
    lines = 0
    for path in (ROOT / "tasks").glob("*.py"):
        text = path.read_text()
        tree = ast.parse(text)
        lines += text.count("\n")
        attributes = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
        }
        assert attributes <= allowed, path
        assert not {name.split(".")[0] for name in imported(tree)} & {"numpy", "scipy", "pandas"}, path
        assert not any(isinstance(node, ast.MatMult) for node in ast.walk(tree)), path
    assert lines < 1300


def test_file_names_are_unique_across_rooms():
    stems = Counter(path.stem for path in SOURCES)
    assert [stem for stem, times in stems.items() if times > 1 and stem not in SHARED_STEMS] == []


def test_public_class_names_are_unique_across_rooms():
    classes = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, times in classes.items() if times > 1] == []


def names_in(tree: ast.AST) -> set[str]:
    """Every variable, parameter, attribute, function and class that a module names."""
    return {
        name
        for node in ast.walk(tree)
        for kind in ("id", "arg", "attr", "name")
        if isinstance(name := getattr(node, kind, None), str)
    }


def test_names_say_what_they_hold():
    """A result that is `found`, or a member's `own`, may be anything: rows, pairs, losses are called so."""
    for path in SOURCES:
        assert not names_in(ast.parse(path.read_text())) & EMPTY_NAMES, path


def test_lossray_never_imports_ray_tasks_or_flows():
    science = [path for path in SOURCES if path.is_relative_to(ROOT / "lossray")]
    for path in science:
        names = {name.split(".")[0] for name in imported(ast.parse(path.read_text()))}
        assert not names & {"ray", "tasks", "flows"}, path


def test_importing_lossray_and_asking_for_help_loads_neither_torch_nor_ray():
    code = (
        "import sys, lossray; sys.argv = ['lossray', '--help']\n"
        "try: lossray.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'pandas'} & set(sys.modules), set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "run" in result.stdout
