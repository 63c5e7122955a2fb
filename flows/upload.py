"""What travels to a cluster with a study: the current directory, without what no study needs."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files

from lossray.errors import StudyError
from lossray.plugins import imported_modules, split_spec
from lossray.study import LoadedStudy
from lossray.training.parquet_files import find_files

LIMIT = 100 * 2**20  # bytes: a dashboard takes no larger request
MOST_FILES = 50_000  # a home directory, or links in a circle
OVERHEAD = 160  # bytes of a zip file for one of its files, beside twice the name
LEFT_OUT = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    "node_modules",
    ".ipynb_checkpoints",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
)
# What folders of outputs hold: a store, perhaps just begun; recorded checkpoints; a virtual environment.
OUTPUTS = ({"manifest.json", "study.toml"}, {"recorded", "checkpoints"}, {"pyvenv.cfg"})
MIB = 2**20

Ignore = Callable[[Path], bool]


@dataclass(frozen=True)
class Upload:
    """The files of a folder that are sent.

    Attributes:
        folder: the job's working directory; None: an empty one.
        files: bytes of each, by its path relative to the folder.
        excludes: patterns, as in a .gitignore, of what is not sent beside what the ignore files name.
    """

    folder: Path | None
    files: dict[Path, int]
    excludes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the package, which Ray does not compress."""
        return sum(size + OVERHEAD + 2 * len(str(path)) for path, size in self.files.items())

    def holds(self, path: str | os.PathLike[str]) -> bool:
        """Whether a file is sent."""
        if self.folder is None:
            return False
        file = Path(path).resolve()
        return file.is_relative_to(self.folder) and file.relative_to(self.folder) in self.files


def upload_of(loaded: LoadedStudy) -> Upload:
    """What the job of a study needs: the current directory; nothing for a ready-made study as it is.

    Raises:
        StudyError: the study file or its data would not be sent, or all is more than a cluster takes.
    """
    named = loaded.study.user_functions()
    if loaded.ready_made and not named and _relative_data(loaded) is None:
        return Upload(None, {})
    folder = Path.cwd().resolve()
    if not (loaded.ready_made or loaded.path.resolve().is_relative_to(folder)):
        raise StudyError(
            f"{loaded.path}: lies outside of the current directory, which is what a job gets; allowed: a "
            f"file in it or below it; remedy: cd {loaded.folder} and submit from there"
        )
    upload = _collect(folder)
    _check_complete(loaded, upload)
    _check_size(upload)
    return upload


def not_sent(loaded: LoadedStudy, upload: Upload) -> list[str]:
    """One line for each file that the study needs and that every node must have of its own."""
    lines = []
    for path in _data_of_this_machine(loaded):
        lines.append(f"data.path: {path} is not sent: every node must have it")
    for key_path, spec in loaded.study.user_functions().items():
        where = ".".join(map(str, key_path))
        for file in _module_files(spec):
            if not upload.holds(file):
                lines.append(f"{where}: {file} is not sent: every node must have this module")
    return list(dict.fromkeys(lines))


def _collect(folder: Path) -> Upload:
    """The files that Ray would pack, by its own rules, and the outputs that it is told to leave out."""
    files: dict[Path, int] = {}
    outputs: list[Path] = []
    for path, size in _walk(folder, [_get_excludes(folder, list(LEFT_OUT))]):
        if size is None:
            outputs.append(path.relative_to(folder))
        else:
            files[path.relative_to(folder)] = size
        if len(files) > MOST_FILES:
            raise StudyError(
                f"{folder}: the current directory is what a job gets, and holds more than {MOST_FILES:,} "
                "files; submit from the study's folder, or list in .rayignore what the study does not need"
            )
    return Upload(folder, files, (*LEFT_OUT, *map(_pattern, outputs)))


def _walk(folder: Path, ignored: list[Ignore]) -> Iterator[tuple[Path, int | None]]:
    """Every file that is not ignored, with its bytes; every folder of outputs, with None."""
    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    ignored = [*ignored, *get_excludes_from_ignore_files(folder, include_gitignore=with_gitignore)]
    for path in sorted(folder.iterdir()):
        if any(ignore(path) for ignore in ignored):
            continue
        if path.is_file():
            yield path, path.stat().st_size
        elif path.is_dir() and _is_output(path):
            yield path, None
        elif path.is_dir():
            yield from _walk(path, ignored)


def _is_output(folder: Path) -> bool:
    """Whether a folder is a store, recorded checkpoints, or a virtual environment of any name."""
    names = {entry.name for entry in folder.iterdir()}
    return any(marks <= names for marks in OUTPUTS)


def _pattern(path: Path) -> str:
    """A path as a pattern of a .gitignore that matches nothing else."""
    return "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", path.as_posix())


def _check_complete(loaded: LoadedStudy, upload: Upload) -> None:
    needed = [] if loaded.ready_made else [("the study file", str(loaded.path))]
    if (path := _relative_data(loaded)) is not None:
        needed += [("data.path", file.name) for file in find_files(path, loaded.folder)[1]]
    for what, name in needed:
        if upload.holds(name):
            continue
        outside = not Path(name).resolve().is_relative_to(upload.folder or Path())
        fault = "outside of the current directory" if outside else "named by a .gitignore or .rayignore"
        raise StudyError(
            f"{loaded.path}: {what}: {name} would not be sent, since it is {fault}; allowed: a file below "
            f"{upload.folder} that no ignore file names; of data also a URI, or a path that every node has"
        )


def _check_size(upload: Upload) -> None:
    if upload.size < LIMIT:
        return
    sizes: Counter[str] = Counter()
    for path, size in upload.files.items():
        sizes[path.parts[0]] += size
    largest = ", ".join(f"{name} {size / MIB:,.1f} MiB" for name, size in sizes.most_common(3))
    raise StudyError(
        f"{upload.folder}: the current directory is what a job gets, and has {upload.size / MIB:,.1f} MiB "
        f"(largest: {largest}); allowed: less than {LIMIT / MIB:g} MiB; list in .rayignore, in the form of a "
        ".gitignore, what the study does not need; large data belong on storage that all nodes see"
    )


def _relative_data(loaded: LoadedStudy) -> str | None:
    """The study's data path where it starts at the study's folder."""
    path = getattr(loaded.study.data, "path", None)
    if path is None or "://" in path or Path(path).expanduser().is_absolute():
        return None
    return str(path)


def _data_of_this_machine(loaded: LoadedStudy) -> list[str]:
    path = getattr(loaded.study.data, "path", None)
    absolute = path is not None and "://" not in path and Path(path).expanduser().is_absolute()
    return [str(path)] if absolute else []


def _module_files(spec: str) -> list[str]:
    """The files of the user's modules that a function is made of; none of an installed package."""
    modules = imported_modules(spec)
    if modules is None:
        return []
    specs = [modules.find(name) for name in modules.closure(split_spec(spec)[0])]
    return [one.origin for one in specs if one is not None and one.origin and one.has_location]
