"""The user's own functions, named ``package.module:function``: found, imported, and hashed by their source.

A task's key holds `source_hash` of every user function involved, so that an edited module never reuses old
numbers. Hashing reads source and follows import statements; it never executes anything.
"""

import ast
import hashlib
import importlib
import os
import reprlib
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any

from lossray.errors import StudyError
from lossray.names import nearest

OWN_PACKAGES = ("lossray", "tasks", "flows")

_imported: dict[str, str] = {}  # module of the user's -> its `source_hash` when this process imported it


def is_spec(name: str) -> bool:
    """Whether ``name`` is meant as ``package.module:function`` (it holds a colon)."""
    return ":" in name


def split_spec(spec: str) -> tuple[str, str]:
    """Divide ``package.module:function`` into module and function.

    Raises:
        StudyError: ``spec`` is not of that form.
    """
    module, _, function = spec.partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise StudyError(f"found {spec!r}; a function of your own is written 'package.module:function'")
    return module, function


def add_user_folders(folders: Sequence[str | os.PathLike[str]]) -> None:
    """Append the folders to the end of ``sys.path``, in order, where they are not on it yet.

    At the end, so that nothing in them shadows the installation.
    """
    for folder in folders:
        path = os.path.abspath(folder)
        if path not in sys.path:
            sys.path.append(path)
    importlib.invalidate_caches()


def load(spec: str) -> Callable[..., Any]:
    """Import the function (or class) that ``package.module:function`` names.

    Raises:
        StudyError: the module is not found, its import raises, or it has no such function; the message
            names the spec, what failed and where.
    """
    module_name, function_name = split_spec(spec)
    if module_name not in sys.modules or module_name not in _imported:
        _note_source(spec, module_name)
    module = _import(spec, module_name)
    try:
        function = getattr(module, function_name)
    except AttributeError:
        guess = nearest(function_name, _callables(module))
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise StudyError(
            f"{spec!r}: {_file(module)} has no function {function_name!r}{hint}{_taken(module_name)}"
        ) from None
    if not callable(function):
        raise StudyError(
            f"{spec!r}: {function_name!r} of {_file(module)} is no function but {reprlib.repr(function)}"
        )
    return function  # type: ignore[no-any-return]


def failure(error: BaseException) -> str:
    """One line on an exception of a user's code: ``ZeroDivisionError: division by zero (nets.py:12)``.

    The place is the innermost line of the user's own code, not the library line that it called.
    """
    text = " ".join(str(error).split())
    head = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if _is_user_file(frame.filename) and not _is_ours(frame.filename)
    ]
    if isinstance(error, SyntaxError):  # its text names the file and line already
        return head
    return f"{head} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else head


def source_hash(spec: str) -> str:
    """SHA-256 (hex) of the source of the function's module and of every user module that it imports.

    Followed transitively: import statements at any depth of the code, relative ones included, the
    ``__init__`` of every package on the way, and ``import_module`` of a literal. A user module is one outside
    the standard library, the installed packages and lossray itself; for a function of an installed package,
    all of that package's own modules count. The hash holds names and bytes, never a path. What it cannot see:
    module names computed at run time, and files that the code reads (give those to the study as data).

    Raises:
        StudyError: the module of ``spec`` is not found.
    """
    module_name, _ = split_spec(spec)
    top = module_name.partition(".")[0]
    finder = _SourceFinder(top)
    package = finder.find(top)
    if package is None or finder.find(module_name) is None:
        raise StudyError(_not_found(spec, module_name))
    # Nobody edits a part of an installed package, and following the imports of torch takes many seconds.
    sources = finder.closure(module_name) if _is_users(package) else _whole_package(package)
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        digest.update(f"{name}\0{len(source)}\0".encode())
        digest.update(source)
    return digest.hexdigest()


def check_imported(sources: Mapping[str, str]) -> None:
    """Refuse functions that this process imported from other source than that which a study was planned with.

    Python keeps the module that it has imported, and a worker imports when its first task arrives: either may
    be older or younger than the source that was hashed.

    Args:
        sources: `source_hash` by "package.module:function".

    Raises:
        StudyError: naming the function.
    """
    for spec, expected in sources.items():
        load(spec)
        if _imported.get(split_spec(spec)[0], expected) != expected:
            raise StudyError(
                f"{spec!r}: this Python process has imported other source than the study was planned with, "
                "since a file was edited meanwhile: restart the process (a notebook's kernel)"
            )


class _SourceFinder:
    """Finds the source of the user's modules without importing any of them."""

    def __init__(self, top: str) -> None:
        self.top = top  # the top-level name of the spec: always the user's, wherever it is installed
        self.found: dict[str, ModuleSpec | None] = {}
        importlib.invalidate_caches()

    def find(self, name: str) -> ModuleSpec | None:
        """Where a module lies; None where there is none or it is not the user's."""
        if name not in self.found:
            self.found[name] = self._find(name)
        return self.found[name]

    def _find(self, name: str) -> ModuleSpec | None:
        parent, _, own = name.rpartition(".")
        if parent:
            package = self.find(parent)
            if package is None or package.submodule_search_locations is None:
                return None
            folders = list(package.submodule_search_locations)
            try:
                return PathFinder.find_spec(name, folders)
            except KeyError:  # a namespace package below a package that is not imported
                return _namespace(name, [os.path.join(folder, own) for folder in folders])
        try:
            spec = find_spec(name)  # a top-level name: looks it up, imports nothing
        except ValueError:  # in sys.modules without a spec, as __main__ is
            return None
        return spec if spec is not None and (name == self.top or _is_users(spec)) else None

    def closure(self, start: str) -> dict[str, bytes]:
        """Source by module name of ``start`` and of all it imports (a namespace package has none)."""
        sources: dict[str, bytes] = {}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            spec = self.find(name)
            if name in sources or spec is None:
                continue
            sources[name] = _source(spec)
            parent, _, _ = name.rpartition(".")
            waiting += [parent] if parent else []
            waiting += self._imports(name, spec, sources[name])
        return sources

    def _imports(self, name: str, spec: ModuleSpec, source: bytes) -> Iterator[str]:
        """Names that may be modules, of all imports in one module's source."""
        is_package = spec.submodule_search_locations is not None
        package = name if is_package else name.rpartition(".")[0]
        try:
            nodes = list(ast.walk(ast.parse(source)))
        except (SyntaxError, ValueError):  # an extension module, or an error that `load` will report
            return
        for node in nodes:
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
        if is_package:  # `from package import *` imports the submodules in __all__
            yield from (f"{name}.{public}" for public in _public_names(nodes))


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


def _public_names(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """The string literals assigned to ``__all__``."""
    for node in nodes:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == "__all__" for t in node.targets):
            for item in ast.walk(node.value):
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.value


def _source(spec: ModuleSpec) -> bytes:
    """The bytes of a module's file, also within a zip archive; none for a namespace package."""
    if spec.origin is None or not spec.has_location:
        return b""
    get_data = getattr(spec.loader, "get_data", None)
    return get_data(spec.origin) if get_data else Path(spec.origin).read_bytes()


def _whole_package(spec: ModuleSpec) -> dict[str, bytes]:
    """Source by file name of a top-level module, or of all modules of a package."""
    sources = {"": _source(spec)}
    for folder in map(Path, spec.submodule_search_locations or ()):
        sources |= {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.py")}
    return sources


def _is_users(spec: ModuleSpec) -> bool:
    """Whether a top-level module is the user's: not the standard library's, not installed, not lossray's."""
    if spec.name in OWN_PACKAGES:
        return False
    places = [spec.origin] if spec.has_location and spec.origin else spec.submodule_search_locations
    return bool(places) and all(_is_user_file(place) for place in places or ())


def _is_user_file(path: str) -> bool:
    """Whether a file lies outside the standard library and the installed packages."""
    if path.startswith("<"):  # <frozen importlib>, <string>
        return False
    parts = Path(path).parts
    if "site-packages" in parts or "dist-packages" in parts:
        return False
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    real = os.path.realpath(path) + os.sep  # a folder may be the library itself
    return not any(real.startswith(os.path.realpath(library) + os.sep) for library in libraries)


def _is_ours(path: str) -> bool:
    """Whether a file belongs to lossray, tasks or flows, wherever they are installed."""
    relative = os.path.relpath(os.path.realpath(path), Path(__file__).resolve().parents[1])
    return relative.partition(os.sep)[0] in OWN_PACKAGES


def _note_source(spec: str, module_name: str) -> None:
    """Remember what is about to be imported; installed packages are not edited while a study runs."""
    top = module_name.partition(".")[0]
    package = _SourceFinder(top).find(top)
    if package is not None and _is_users(package):
        _imported[module_name] = source_hash(spec)


def _import(spec: str, module_name: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise StudyError(_not_found(spec, module_name)) from None
        raise StudyError(f"{spec!r}: importing {module_name!r} raised {failure(error)}") from error
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything, or call exit()
        raise StudyError(f"{spec!r}: importing {module_name!r} raised {failure(error)}") from error


def _not_found(spec: str, module_name: str) -> str:
    folders = [os.path.abspath(folder) for folder in sys.path]
    searched = dict.fromkeys(folder for folder in folders if os.path.isdir(folder) and _is_user_file(folder))
    where = ", ".join(searched) or "no folder"
    hint = _taken(module_name)
    return f"{spec!r}: module {module_name!r} not found in {where} or the installed packages{hint}"


def _taken(module_name: str) -> str:
    top = module_name.partition(".")[0]
    return (
        f" ({top!r} is lossray's own package: give your module another name)" if top in OWN_PACKAGES else ""
    )


def _file(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or f"module {module.__name__!r}"


def _callables(module: ModuleType) -> list[str]:
    return [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
