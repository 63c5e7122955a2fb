"""Where the modules of the user's lie, and their source: found without importing or executing any of them."""

import ast
import importlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path

OWN_PACKAGES = ("lossray", "tasks", "flows")


class UserModules:
    """The user's modules as they are on disk; each is looked up and read once.

    A user module is one outside the standard library, the installed packages and lossray itself.

    Args:
        top: a top-level name that counts as the user's wherever it is installed.
    """

    def __init__(self, top: str) -> None:
        self.top = top
        self._found: dict[str, ModuleSpec | None] = {}
        self._sources: dict[str, bytes] = {}
        importlib.invalidate_caches()

    def find(self, name: str) -> ModuleSpec | None:
        """Where a module lies; None where there is none or it is not the user's."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    def missing(self) -> list[str]:
        """The names that were looked up and not found, or not the user's."""
        return [name for name, spec in self._found.items() if spec is None]

    def source(self, name: str) -> bytes:
        """The bytes of a module that was found; none for a namespace package."""
        if name not in self._sources:
            spec = self.find(name)
            self._sources[name] = b"" if spec is None else _source(spec)
        return self._sources[name]

    def closure(self, start: str) -> dict[str, bytes]:
        """Source by module name of ``start`` and of all that it imports, at any depth of its code."""
        sources: dict[str, bytes] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name in sources or self.find(name) is None:
                continue
            sources[name] = self.source(name)
            try:
                tree = ast.parse(sources[name])
            except (SyntaxError, ValueError):  # an extension module, or an error that the import will report
                tree = ast.Module([], [])
            waiting += [*parents(name), *self.imports(name, [tree])]
        return sources

    def imports(self, name: str, nodes: Iterable[ast.AST]) -> Iterator[str]:
        """Names that may be modules, of all import statements below some nodes of a module's code.

        Relative ones included, and ``import_module`` of a literal. `from package import *` imports the
        submodules in __all__.
        """
        spec = self.find(name)
        is_package = spec is not None and spec.submodule_search_locations is not None
        package = name if is_package else name.rpartition(".")[0]
        for node in (below for top in nodes for below in ast.walk(top)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = _resolve("." * node.level + (node.module or ""), package)
                if base is not None:
                    yield base
                    yield from (f"{base}.{alias.name}" for alias in node.names if alias.name != "*")
            elif isinstance(node, ast.Call) and (literal := _imported_literal(node)):
                target = _resolve(literal, package)
                if target is not None:
                    yield target
            elif is_package and isinstance(node, ast.Assign):
                yield from (f"{name}.{public}" for public in _public_names(node))

    def _find(self, name: str) -> ModuleSpec | None:
        parent, _, last = name.rpartition(".")
        if parent:
            package = self.find(parent)
            if package is None or package.submodule_search_locations is None:
                return None
            folders = list(package.submodule_search_locations)
            try:
                return PathFinder.find_spec(name, folders)
            except KeyError:  # a namespace package below a package that is not imported
                return _namespace(name, [os.path.join(folder, last) for folder in folders])
        try:
            spec = find_spec(name)  # a top-level name: looks it up, imports nothing
        except ValueError:  # in sys.modules without a spec, as __main__ is
            return None
        return spec if spec is not None and (name == self.top or is_users(spec)) else None


def parents(name: str) -> list[str]:
    """The packages on the way to a module, whose ``__init__`` runs when it is imported."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _namespace(name: str, folders: Sequence[str]) -> ModuleSpec:
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [folder for folder in folders if os.path.isdir(folder)]
    return spec


def _resolve(name: str, package: str) -> str | None:
    """The absolute name of a possibly relative one; None where it leaves the package."""
    try:
        return resolve_name(name, package)
    except ImportError:
        return None


def _imported_literal(call: ast.Call) -> str | None:
    """The module name in ``import_module("name")`` or ``__import__("name")``."""
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    if called not in ("import_module", "__import__") or not call.args:
        return None
    argument = call.args[0]
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else None


def _public_names(node: ast.Assign) -> Iterator[str]:
    """The string literals assigned to ``__all__``."""
    if any(getattr(target, "id", None) == "__all__" for target in node.targets):
        for item in ast.walk(node.value):
            if isinstance(item, ast.Constant) and isinstance(item.value, str):
                yield item.value


def _source(spec: ModuleSpec) -> bytes:
    """The bytes of a module's file, also within a zip archive; none for a namespace package."""
    if spec.origin is None or not spec.has_location:
        return b""
    get_data = getattr(spec.loader, "get_data", None)
    return get_data(spec.origin) if get_data else Path(spec.origin).read_bytes()


def whole_package(spec: ModuleSpec) -> dict[str, bytes]:
    """Source by file name of a top-level module, or of all modules of a package."""
    sources = {"": _source(spec)}
    for folder in map(Path, spec.submodule_search_locations or ()):
        sources |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    return sources


def is_users(spec: ModuleSpec) -> bool:
    """Whether a top-level module is the user's: not the standard library's, not installed, not lossray's."""
    if spec.name in OWN_PACKAGES:
        return False
    locations = [spec.origin] if spec.has_location and spec.origin else spec.submodule_search_locations
    return bool(locations) and all(is_user_file(location) for location in locations or ())


def is_user_file(path: str) -> bool:
    """Whether a file lies outside the standard library and the installed packages."""
    if path.startswith("<"):  # <frozen importlib>, <string>
        return False
    parts = Path(path).parts
    if "site-packages" in parts or "dist-packages" in parts:
        return False
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    real = os.path.realpath(path) + os.sep  # a folder may be the library itself
    return not any(real.startswith(os.path.realpath(library) + os.sep) for library in libraries)


def is_ours(path: str) -> bool:
    """Whether a file belongs to lossray, tasks or flows, wherever they are installed."""
    relative = os.path.relpath(os.path.realpath(path), Path(__file__).resolve().parents[1])
    return relative.partition(os.sep)[0] in OWN_PACKAGES
