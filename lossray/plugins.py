"""The user's own functions, named ``package.module:function``: found and imported.

What a function is made of goes into the keys of the results that depend on it: `lossray.source_hash`.
"""

import importlib
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lossray.errors import StudyError
from lossray.names import nearest
from lossray.user_modules import OWN_PACKAGES, UserModules, is_ours, is_user_file, is_users

_imported: dict[str, UserModules] = {}  # module of the user's -> the source from which it was imported here


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
        if is_user_file(frame.filename) and not is_ours(frame.filename)
    ]
    if isinstance(error, SyntaxError):  # its text names the file and line already
        return head
    return f"{head} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else head


def imported_modules(spec: str) -> UserModules | None:
    """The user's modules as they were when this process imported a function; None of an installed package."""
    return _imported.get(split_spec(spec)[0])


def _import(spec: str, module_name: str) -> ModuleType:
    """Import a module and remember its source, with that of all that it imports."""
    if module_name in sys.modules and module_name in _imported:
        return sys.modules[module_name]
    before = _sources(module_name)
    module = _execute(spec, module_name)
    after = _sources(module_name)  # an import may extend sys.path, and then finds more than one could before
    if before is not None and after is not None:
        edited = before.closure(module_name).items() - after.closure(module_name).items()
        _imported[module_name] = before if edited else after
    return module


def _sources(module_name: str) -> UserModules | None:
    """The source of a module of the user's, read now; None of an installed package, which nobody edits."""
    modules = UserModules(module_name.partition(".")[0])
    package = modules.find(modules.top)
    if package is None or not is_users(package):
        return None
    modules.closure(module_name)  # reads, and keeps, all that any function of the module may need
    return modules


def _execute(spec: str, module_name: str) -> ModuleType:
    importlib.invalidate_caches()  # the file may be younger than the last look into its folder
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise StudyError(not_found(spec, module_name)) from None
        raise StudyError(f"{spec!r}: importing {module_name!r} raised {failure(error)}") from error
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything, or call exit()
        raise StudyError(f"{spec!r}: importing {module_name!r} raised {failure(error)}") from error


def not_found(spec: str, module_name: str) -> str:
    """The message for a module that is nowhere."""
    folders = [os.path.abspath(folder) for folder in sys.path]
    searched = dict.fromkeys(folder for folder in folders if os.path.isdir(folder) and is_user_file(folder))
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
