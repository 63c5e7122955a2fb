"""A function of the user's by what it is made of: the hash in every key of a result that depends on it.

An edited function never reuses old numbers; an edited comment, or another function of the same file, does.
"""

import hashlib
from collections.abc import Mapping
from importlib.machinery import ModuleSpec

from lossray.errors import StudyError
from lossray.plugins import imported_modules, load, not_found, split_spec
from lossray.statements import Statement, statements
from lossray.user_modules import UserModules, is_users, parents, whole_package

Text = str | bytes


def source_hash(spec: str) -> str:
    """SHA-256 (hex) of what a function of the user's is made of.

    That is, of its module and of every user module that they import, the top-level statements that

    - run when the module is imported, other than to define a function, a class or a plain value (decorators
      such as ``dataclass``, ``lru_cache`` and ``torch.no_grad`` included), or
    - define a name that stands in a statement that counts, in whichever module: names are not resolved, so
      that rather too much counts than too little.

    Comments, docstrings, blank lines and what stands under ``if __name__ == "__main__"`` do not count. Where
    code computes names (``globals()``, ``eval``, ``getattr`` with a computed name on anything but self,
    torch and the like) all statements count. Of a function of an installed package, all of that package's
    own modules do. The hash holds names and text, never a path, and nothing is executed. What it cannot see:
    module names computed at run time, and files that the code reads (give those to the study as data).

    Raises:
        StudyError: the module of ``spec`` is not found.
    """
    return _hash_in(_modules_of(spec), spec)


def file_hash(spec: str) -> str:
    """The hash that lossray 0.1 took: of all bytes of the module and of all that it imports.

    Stores that were made then hold it.

    Raises:
        StudyError: the module of ``spec`` is not found.
    """
    return _file_hash_in(_modules_of(spec), spec)


def is_imported(spec: str, expected: str) -> bool:
    """Whether a function, as this process has imported it (or does so now), has the hash ``expected``.

    Args:
        spec: the function.
        expected: its `source_hash` or `file_hash`; that of an installed package is not compared.

    Raises:
        StudyError: it is not found, or its import raises.
    """
    load(spec)
    modules = imported_modules(spec)
    return modules is None or expected in (_hash_in(modules, spec), _file_hash_in(modules, spec))


def check_imported(sources: Mapping[str, str]) -> None:
    """Refuse functions that this process imported from other source than that which a study was planned with.

    Python keeps the module that it has imported, and a worker imports when its first task arrives: either may
    be older or younger than the source that was hashed.

    Args:
        sources: `source_hash` or `file_hash` by "package.module:function".

    Raises:
        StudyError: naming the function.
    """
    for spec, expected in sources.items():
        if not is_imported(spec, expected):
            for late in _found_late(spec):
                raise StudyError(
                    f"{spec!r}: module {late!r} was not found yet when {split_spec(spec)[0]!r} was imported, "
                    "and is now: extend sys.path at the top of that module, not where a function is called"
                )
            raise StudyError(
                f"{spec!r}: this Python process has imported other source than the study was planned with, "
                "since a file was edited meanwhile: restart the process (a notebook's kernel)"
            )


def _found_late(spec: str) -> list[str]:
    """User modules that a function's module imports and that came on ``sys.path`` after its own import."""
    imported, now = imported_modules(spec), _modules_of(spec)
    return [name for name in imported.missing() if now.find(name) is not None] if imported else []


def _modules_of(spec: str) -> UserModules:
    module, _ = split_spec(spec)
    modules = UserModules(module.partition(".")[0])
    if modules.find(modules.top) is None or modules.find(module) is None:
        raise StudyError(not_found(spec, module))
    return modules


def _hash_in(modules: UserModules, spec: str) -> str:
    module, function = split_spec(spec)
    if (package := _installed(modules)) is not None:
        return _digest(whole_package(package))
    return _digest(_Slice(modules, module, function).texts())


def _file_hash_in(modules: UserModules, spec: str) -> str:
    module, _ = split_spec(spec)
    package = _installed(modules)
    return _digest(modules.closure(module) if package is None else whole_package(package))


def _installed(modules: UserModules) -> ModuleSpec | None:
    """The package of the function where it is installed: nobody edits a part of it, and torch is large."""
    package = modules.find(modules.top)
    return None if package is None or is_users(package) else package


def _digest(sources: Mapping[str, Text]) -> str:
    digest = hashlib.sha256()
    for name, source in sorted(sources.items()):
        data = source.encode() if isinstance(source, str) else source
        digest.update(f"{name}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()


class _Slice:
    """The statements that count for one function: names and imports are followed until nothing is new."""

    def __init__(self, modules: UserModules, module: str, function: str) -> None:
        self.modules = modules
        self.names = {function}  # that stand in what counts
        self.open_ended = False  # then every statement counts
        self._statements: dict[str, list[Statement]] = {}
        self._unread: dict[str, bytes] = {}  # source that does not parse: all of it counts
        self._counted: dict[str, set[int]] = {}
        self._read(module)
        while any([self._count(name) for name in list(self._statements)]):  # no shortcut: a list
            pass

    def texts(self) -> dict[str, Text]:
        """The text that counts, by module; modules of which nothing does are left out."""
        by_module: dict[str, Text] = dict(self._unread)
        for name, counted in self._counted.items():
            if counted:
                by_module[name] = "\n".join(self._statements[name][i].text for i in sorted(counted))
        return by_module

    def _read(self, name: str) -> None:
        """Take up a module, the packages around it, and what its own import imports."""
        if name in self._statements or name in self._unread or self.modules.find(name) is None:
            return
        source = self.modules.source(name)
        try:
            self._statements[name] = statements(source)
        except (SyntaxError, ValueError):  # an extension module, or an error that the import will report
            self._unread[name] = source
            self.open_ended = True
            return
        self._counted[name] = set()
        for parent in parents(name):
            self._read(parent)
        for statement in self._statements[name]:
            if statement.runs:
                self._follow(name, statement)

    def _count(self, name: str) -> bool:
        """Count the statements of a module that now have to; whether there were any."""
        counted = self._counted[name]
        new = [
            i
            for i, statement in enumerate(self._statements[name])
            if i not in counted
            and (self.open_ended or not statement.defines or statement.defines & self.names)
        ]
        for i in new:
            statement = self._statements[name][i]
            counted.add(i)
            self.names |= statement.uses
            self.open_ended |= statement.open_ended
            self._follow(name, statement)
        return bool(new)

    def _follow(self, name: str, statement: Statement) -> None:
        for imported in self.modules.imports(name, [statement.node]):
            for module in (*parents(imported), imported):
                self._read(module)
