"""Reading a study: a TOML file of one's own or a ready-made one, with the overrides of the command line."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossray import plugins
from lossray.errors import StudyError
from lossray.names import nearest
from lossray.study.overrides import Override, apply_overrides, parse_override
from lossray.study.problems import KeyPath
from lossray.study.settings import Study
from lossray.study.table import check_table, function_problems
from lossray.study.toml import toml_text


@dataclass(frozen=True)
class LoadedStudy:
    """A study and where it came from.

    Attributes:
        study: checked settings.
        path: the file that was read.
        folder: where relative data paths start and user modules are looked for: the file's folder, or the
            current directory for a ready-made study.
        text: a study file that reads as this study: the user's own text, or the effective table where values
            were overridden. What a store keeps as study.toml.
        overrides: as given, in order.
        ready_made: whether it came with lossray, and so has no folder of its own.
    """

    study: Study
    path: Path
    folder: Path
    text: str
    overrides: tuple[str, ...] = ()
    ready_made: bool = False


def ready_made_studies() -> dict[str, Path]:
    """The studies that come with lossray, by name; they lie beside the package (which is not imported)."""
    folder = Path(__file__).resolve().parents[2] / "flows" / "studies"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_study(name: str | Path, overrides: Sequence[str] = ()) -> LoadedStudy:
    """Read and check a study; import the user's functions that it names.

    The current directory and the study's folder are appended to `sys.path`, where they are not on it.

    Args:
        name: path of a TOML file, or the name of a ready-made study; a file wins.
        overrides: ``KEY=VALUE`` each, such as ``training.steps=200``; later ones win.

    Raises:
        StudyError: no such study, no TOML, or a problem in it; one line for each problem, with file and key.
    """
    path, ready_made = _find(str(name))
    text, table = _read(path)
    changes = [parse_override(override) for override in overrides]
    changed = apply_overrides(table, changes)
    study, problems = check_table(changed)
    folder = Path.cwd() if ready_made else path.resolve().parent
    if study is not None:
        plugins.add_user_folders([Path.cwd(), folder])
        problems = function_problems(study)
    if study is None or problems:
        lines = [problem.line(_origin(problem.key_path, changes, table) or str(path)) for problem in problems]
        raise StudyError("\n".join(lines))
    if changes:
        text = f"# {path.name} with {'; '.join(change.origin for change in changes)}\n\n{toml_text(changed)}"
    return LoadedStudy(study, path, folder, text, tuple(overrides), ready_made)


def _find(name: str) -> tuple[Path, bool]:
    """The file of a study, and whether it is a ready-made one."""
    path, ready_made = Path(name), ready_made_studies()
    if path.is_file():
        return path, False
    if name in ready_made:
        return ready_made[name], True
    if path.is_dir():
        raise StudyError(f"{name}: found a folder; allowed: a study file, or one of {', '.join(ready_made)}")
    guess = nearest(name, [*map(str, path.parent.glob("*.toml")), *ready_made])
    hint = f"; did you mean {guess!r}?" if guess else ""
    allowed = f"a study file, or a ready-made study: {', '.join(ready_made) or 'none installed'}"
    raise StudyError(f"{name}: no such file or ready-made study; allowed: {allowed}{hint}")


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")  # editors on Windows put a byte-order mark first
    except UnicodeDecodeError as error:
        fault = f"found a byte that is not UTF-8 at offset {error.start}"
        raise StudyError(f"{path}: {fault}; allowed: TOML, which is UTF-8") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return text, tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise StudyError(f"{path}: not TOML: {error}") from None


def _origin(key_path: KeyPath, overrides: Sequence[Override], table: Mapping[str, Any]) -> str | None:
    """The override that a problem at `key_path` comes from; None where the file itself has it."""
    for override in reversed(overrides):
        inside = key_path[: len(override.key_path)] == override.key_path
        made = key_path == override.key_path[: len(key_path)] and not _has(table, key_path)
        if inside or made:
            return override.origin
    return None


def _has(table: Any, key_path: KeyPath) -> bool:
    for key in key_path:
        is_key = isinstance(table, Mapping) and key in table
        is_index = isinstance(table, list) and isinstance(key, int) and key < len(table)
        if not (is_key or is_index):
            return False
        table = table[key]
    return True
