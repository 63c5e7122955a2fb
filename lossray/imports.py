"""The import order: the installation's packages first, the user's folders last.

A study's folder may hold a ``tasks.py`` of the user's own. Python would import that one in place of ours:
the current directory comes first on ``sys.path`` (``ray job submit`` puts it into ``PYTHONPATH``), and an
editable installation is found by a hook that is asked after every folder. So the two generic names are
settled here, in every process that runs a study. Ray calls `worker_setup` in each worker before its first
task, but puts the driver's folder in front again when that task arrives: tasks call `worker_setup` once more.
"""

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from lossray.plugins import add_user_folders

USER_FOLDERS_VARIABLE = "LOSSRAY_USER_FOLDERS"  # os.pathsep-separated; the driver sets it for its workers
SETTLED_PACKAGES = ("tasks", "flows")


def settle_imports(user_folders: Sequence[str | os.PathLike[str]]) -> None:
    """Make ``tasks`` and ``flows`` the packages beside lossray; move the user's folders to the path's end.

    A module of the user's already imported under one of the two names is replaced, with its submodules.
    A second call changes nothing.

    Args:
        user_folders: the current directory first, then the study file's folder.

    Raises:
        ImportError: the installation lacks ``tasks`` or ``flows``.
    """
    for name in SETTLED_PACKAGES:
        _settle(name, Path(__file__).resolve().parents[1] / name)
    folders = list(dict.fromkeys(os.path.abspath(folder) for folder in user_folders))
    behind = {os.path.realpath(folder) for folder in folders}
    sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) not in behind]
    add_user_folders(folders)


def worker_started() -> None:
    """`worker_setup` where Ray has started a worker; until its first task it only imports, uncollected."""
    worker_setup()
    gc.disable()


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: nothing in it looks for garbage.

    What is imported stays, and to look through all of it again and again takes a sixth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def worker_setup() -> None:
    """`settle_imports` for a Ray worker: the folders in ``LOSSRAY_USER_FOLDERS``.

    The worker's own current directory goes before them where it was on the path: under ``ray job submit``
    that is the unpacked working directory, which may lie elsewhere than on the driver's node.
    """
    folders = [folder for folder in os.environ.get(USER_FOLDERS_VARIABLE, "").split(os.pathsep) if folder]
    here = os.getcwd()
    if os.path.realpath(here) in {os.path.realpath(entry) for entry in sys.path}:
        folders.insert(0, here)
    settle_imports(folders)


def _settle(name: str, folder: Path) -> None:
    """Put the package in ``folder`` into ``sys.modules`` unless it is there already."""
    init = folder / "__init__.py"
    if _is_from(sys.modules.get(name), init):
        return
    spec = spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None or not init.is_file():
        raise ImportError(f"the installation lacks the package {name!r}: no file {init}")
    for loaded in [key for key in sys.modules if key == name or key.startswith(f"{name}.")]:
        del sys.modules[loaded]
    module = module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _is_from(module: ModuleType | None, file: Path) -> bool:
    loaded_from = getattr(module, "__file__", None)
    return loaded_from is not None and os.path.realpath(loaded_from) == os.path.realpath(file)
