"""Which files a [data] path names, and what the names say: values of columns, and the split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec

from lossray.errors import DataError

SUFFIXES = (".parquet", ".pq")
WILDCARDS = "*?["
# The words for a split in the names of files and folders, as in the data sets of Hugging Face.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_KEYS = ("split", "subset", "set", "partition")  # of hive folders: split=test
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class ParquetFile:
    """One file of a data set.

    Attributes:
        name: as the file system opens it.
        folders: hive folders between the path and the file: {"label": "3"} for label=3.
        split: the one that its name, or that of the nearest folder, says; None where neither does.
    """

    name: str
    folders: dict[str, str]
    split: str | None


def find_files(path: str, base: Path | None) -> tuple[Any, list[ParquetFile]]:
    """The file system, and the files in the order of their names (the order decides which row is which).

    Args:
        path: a file, a folder, or a pattern with wildcards; local, or an fsspec URI.
        base: the folder to which a relative path refers; the current directory if None.

    Raises:
        DataError: nothing is there, or it cannot be read; or some files belong to a split and others do not.
    """
    if path.startswith("hf://"):
        raise DataError(
            f"{path}: nothing is downloaded from a hub while a study runs; download it first "
            "(hf download NAME --repo-type dataset --local-dir FOLDER), and give the folder as path"
        )
    if "://" not in path:
        path = str((base or Path()).absolute() / Path(path).expanduser())
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        if filesystem.isfile(root):
            return filesystem, [ParquetFile(root, {}, None)]
        matches, root = _matching(filesystem, root, path)
    except (ImportError, ValueError) as error:  # a missing driver, an unknown protocol
        raise DataError(f"{path} cannot be opened: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    # Spark and others leave files such as _temporary/... and .part.crc beside their output.
    names = sorted({name for name in matches if not _hidden(name[len(root) :])})
    if not names:
        raise DataError(f"{path} holds no file that ends in .parquet or .pq")
    return filesystem, _with_one_kind_of_split([_described(name, name[len(root) :]) for name in names])


def _matching(filesystem: Any, root: str, path: str) -> tuple[list[str], str]:
    """All Parquet files in a folder or of a pattern, and what their names have in common."""
    if filesystem.isdir(root):
        return [name for name in filesystem.find(root) if name.endswith(SUFFIXES)], root
    wild = min((root.index(character) for character in WILDCARDS if character in root), default=None)
    if wild is None:
        raise DataError(f"{path} does not exist; [data] path is relative to the study file's folder")
    matches = filesystem.glob(root)
    if not matches:
        raise DataError(f"{path} matches nothing; [data] path is relative to the study file's folder")
    folders = [match for match in matches if filesystem.isdir(match)]
    names = [name for folder in folders for name in filesystem.find(folder)] + matches
    return [name for name in names if name.endswith(SUFFIXES)], root[: root.rfind("/", 0, wild) + 1]


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.strip("/").split("/"))


def _described(name: str, relative: str) -> ParquetFile:
    *folders, file = relative.strip("/").split("/")
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    values = {key: unquote(value) for key, value in pairs}
    for part in (file, *reversed(folders)):
        key, equals, value = part.rpartition("=")
        if equals and key not in SPLIT_KEYS:  # label=test is a class
            continue
        if split := _split_in(value):
            return ParquetFile(name, values, split)
    return ParquetFile(name, values, None)


def _split_in(name: str) -> str | None:
    """The split that a name says, as a word by itself; None where it says none, or several."""
    words = re.split(r"[^a-z]+", name.lower())
    said = [split for split, spellings in SPLITS.items() if any(word in spellings for word in words)]
    return said[0] if len(said) == 1 else None


def _with_one_kind_of_split(files: Sequence[ParquetFile]) -> list[ParquetFile]:
    """The files, without their splits where there is one only."""
    splits = {file.split for file in files}
    if len(splits) < 2:
        return [ParquetFile(file.name, file.folders, None) for file in files]
    if None in splits:
        stray = next(file.name for file in files if file.split is None)
        named = next(file for file in files if file.split is not None)
        raise DataError(
            f"{stray} belongs to no split, but {named.name} is '{named.split}'; name all files "
            "train..., validation... or test..., or give a pattern that leaves some out"
        )
    return list(files)


def folder_values(files: Sequence[ParquetFile], column: str) -> list[int] | list[float] | list[str] | None:
    """The value of a hive folder's column for each file: integers or floats where all are, otherwise text.

    Returns:
        None where no folder names that column.

    Raises:
        DataError: some files have no value.
    """
    texts = [file.folders.get(column) for file in files]
    if all(value is None for value in texts):
        return None
    for file, value in zip(files, texts, strict=True):
        if value is None or value == NO_VALUE:
            raise DataError(f"{file.name}: column '{column}' is the name of a folder, and has no value here")
    values = [value for value in texts if value is not None]
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values
