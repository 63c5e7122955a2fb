"""Parquet files as examples: columns of numbers, or images in the layout of Hugging Face data sets."""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lossray.errors import DataError
from lossray.names import unknown_name
from lossray.training.arrow_columns import labels, numbers
from lossray.training.data_settings import ParquetSettings
from lossray.training.images import images_of, pixels
from lossray.training.parquet_files import WILDCARDS, ParquetFile, find_files, folder_values
from lossray.training.sources import Array, Parts, RawExamples
from lossray.training.splits import exact_sizes, partition


@dataclass(frozen=True)
class Table:
    """The columns that were asked for, of one file; at least one row.

    Attributes:
        file: where they are from.
        columns: pyarrow.ChunkedArrays by the name in the settings.
    """

    file: ParquetFile
    columns: dict[str, Any]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values())))

    def where(self, name: str) -> str:
        """For messages."""
        return f"{self.file.name}: column '{name}'"


def read_parquet(settings: ParquetSettings, base: Path | None) -> tuple[RawExamples | Parts, int | None]:
    """Read all files.

    Args:
        settings: see there.
        base: the folder to which a relative path refers; the current directory if None.

    Returns:
        Inputs [N, D] float64 (one column of tensors: [N, *shape]), or [N, C, H, W] in 0..1 with C = 1 where
        all images are gray and 3 otherwise; targets [N] int64 class ids in the sorted order of the labels,
        [N] float64, or [N, C] of either kind. And the number of classes, None where they are no such ids.

    Raises:
        DataError: naming the file, the column and the first row (counted from 0 in the file) that is wrong.
    """
    tables = _tables(settings, base)
    targets, n_classes = _targets(
        _join({table.file.name: _labels(settings, table) for table in tables}, "/".join(settings.labels))
    )
    examples = RawExamples(_inputs(settings, tables), targets)
    if tables[0].file.split is None:
        return examples, n_classes
    return _parts(
        examples, settings, np.repeat([t.file.split for t in tables], [t.rows for t in tables])
    ), n_classes


def _parts(examples: RawExamples, settings: ParquetSettings, splits: Array) -> Parts:
    """The splits that the files' names say [N]; what is missing comes from the training files."""
    rows = {name: np.flatnonzero(splits == name) for name in ("train", "validation", "test")}
    shares = dict(zip(rows, settings.split, strict=True))
    if not len(rows["train"]):
        raise DataError(f"{settings.path}: no file is of the training split; name one train...")
    for name in ("validation", "test"):
        train = rows["train"]
        if len(rows[name]):
            _check_labelled(examples.targets[train], examples.targets[rows[name]], f"{settings.path}: {name}")
        else:
            both = np.array([shares["train"], shares[name]]) / (shares["train"] + shares[name])
            sizes = exact_sizes(len(train), both.tolist())
            if 0 in sizes:
                raise DataError(
                    f"{settings.path}: {len(train)} training examples are too few to take {name} from"
                )
            kept, taken = partition(examples.targets[train], sizes, settings.split_seed)
            rows["train"], rows[name] = train[kept], train[taken]
    return Parts(*(RawExamples(examples.inputs[index], examples.targets[index]) for index in rows.values()))


def _labels(settings: ParquetSettings, table: Table) -> Array:
    """The label of one file: one column, or several of numbers side by side."""
    columns = [labels(table.columns[name], table.where(name)) for name in settings.labels]
    if len(columns) == 1:
        return columns[0]
    for name, values in zip(settings.labels, columns, strict=True):
        if values.ndim > 1 or values.dtype.kind == "U":
            kind = table.columns[name].type
            raise DataError(
                f"{table.where(name)} is {kind}; of several label columns each holds one number a row"
            )
    return np.stack(columns, axis=1)


def _targets(values: Array) -> tuple[Array, int | None]:
    """Class ids [N] and the number of classes, or numbers as they are."""
    if values.dtype.kind == "f" or values.ndim > 1:
        return values.astype(np.float64 if values.dtype.kind == "f" else np.int64), None
    classes, ids = np.unique(values, return_inverse=True)
    return ids.astype(np.int64), len(classes)


def _inputs(settings: ParquetSettings, tables: Sequence[Table]) -> Array:
    if settings.image is not None:
        name, size = settings.image, settings.image_size
        per_table = (images_of(table.columns[name], size, table.where(name)) for table in tables)
        return pixels([image for images in per_table for image in images])
    return _join({table.file.name: _features(settings, table) for table in tables}, "features")


def _features(settings: ParquetSettings, table: Table) -> Array:
    """The feature columns of one file side by side, [n, D] float64; one column alone in its own shape."""
    names = [name for name in table.columns if name not in settings.labels]
    columns = [numbers(table.columns[name], table.where(name)) for name in names]
    if len(columns) == 1 and columns[0].ndim > 1:
        return columns[0]
    return np.concatenate([values.reshape(len(values), -1) for values in columns], axis=1)


def _join(arrays: dict[str, Array], what: str) -> Array:
    """Join the arrays of all files, refusing those that NumPy would join by changing their type."""
    arrays = _with_whole_numbers(arrays)
    (first, expected), *others = arrays.items()
    for file, array in others:
        if array.dtype.kind != expected.dtype.kind or array.shape[1:] != expected.shape[1:]:
            raise DataError(
                f"{file}: '{what}' is {array.dtype} {list(array.shape[1:])} a row, "
                f"but {expected.dtype} {list(expected.shape[1:])} in {first}"
            )
    return np.concatenate(list(arrays.values()))


def _with_whole_numbers(arrays: dict[str, Array]) -> dict[str, Array]:
    """Whole numbers that some files hold as floats, or unsigned, as the integers that they are in others."""
    kinds = {array.dtype.kind for array in arrays.values()}
    if len(kinds) < 2 or "i" not in kinds or not kinds <= set("iuf"):
        return arrays
    whole = {file: array.astype(np.int64) for file, array in arrays.items()}
    same = all((whole[file] == array).all() for file, array in arrays.items())
    return whole if same else arrays


def _check_labelled(train: Array, other: Array, what: str) -> None:
    if train.dtype.kind == "i" and not np.isin(other, train).any():
        raise DataError(
            f"{what} files hold no label that the training files have: unlabelled files need a path that "
            "leaves them out"
        )


# --- reading columns


def _tables(settings: ParquetSettings, base: Path | None) -> list[Table]:
    filesystem, files = find_files(settings.path, base)
    if settings.features is None:
        names = [settings.image or ""]
    else:
        names = _expanded(settings.features, settings.labels, filesystem, files[0].name)
    names += settings.labels
    folders = {name: folder_values(files, name) for name in names}
    tables = []
    for i, file in enumerate(files):
        from_folders = {name: values[i] for name, values in folders.items() if values is not None}
        columns = _columns(filesystem, file.name, names, from_folders)
        if len(columns[names[0]]):
            tables.append(Table(file, columns))
    if not tables:
        raise DataError(f"{settings.path} has no rows")
    return tables


@contextmanager
def _opened(filesystem: Any, file: str) -> Iterator[Any]:
    """A Parquet file; what goes wrong with it names it."""
    try:
        with filesystem.open(file, "rb") as handle:
            yield pq.ParquetFile(handle)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _expanded(names: Sequence[str], taken: Sequence[str], filesystem: Any, file: str) -> list[str]:
    """The names, patterns replaced by the columns of the first file that match, in the file's order."""
    if not any(character in name for name in names for character in WILDCARDS):
        return list(names)
    with _opened(filesystem, file) as parquet:
        schema = parquet.schema_arrow
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    present = [name for name in schema.names if name not in {*taken, *map(str, index)}]
    expanded: dict[str, None] = {}
    for name in names:
        if name in schema.names or not any(character in name for character in WILDCARDS):
            expanded[name] = None
            continue
        matches = fnmatch.filter(present, name)
        if not matches:
            raise DataError(f"{file} has no column like that: {_unknown_column(name, present)}")
        expanded |= dict.fromkeys(matches)
    return list(expanded)


def _columns(
    filesystem: Any, file: str, names: Sequence[str], folders: Mapping[str, object]
) -> dict[str, Any]:
    """The columns of one file by name; ``folders`` holds those that its folders name."""
    with _opened(filesystem, file) as parquet:
        schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
        paths = {
            name: _path(name, schema, file) for name in names if name in schema.names or name not in folders
        }
        table = parquet.read(columns=[".".join(path) for path in paths.values()])
    columns = {}
    for name in names:
        if name not in paths:
            columns[name] = pa.chunked_array([pa.repeat(pa.scalar(folders[name]), rows)])
            continue
        column = table.column(paths[name][0])
        for field in paths[name][1:]:
            column = pc.struct_field(column, field)
        columns[name] = column
    return columns


def _path(name: str, schema: Any, file: str) -> tuple[str, ...]:
    """The column of this name, or the field of a struct that it names: "x.a" as ("x", "a").

    Raises:
        DataError: there is none, or there are several.
    """
    present = schema.names
    if present.count(name) > 1:
        raise DataError(f"{file} has {present.count(name)} columns named {name!r}; allowed: one")
    if name in present:
        return (name,)
    fields = {".".join(path): path for column in schema for path in _fields(column, ())}
    if name not in fields:
        raise DataError(f"{file} has no such column: {_unknown_column(name, [*present, *fields])}")
    return fields[name]


def _fields(column: Any, above: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of all fields in a struct, and in those within."""
    if pa.types.is_struct(column.type):
        for field in column.type:
            yield (*above, column.name, field.name)
            yield from _fields(field, (*above, column.name))


def _unknown_column(name: str, present: list[str]) -> str:
    """The nearest names first, and only a few: a table may have a column for every pixel."""
    near = difflib.get_close_matches(name, present, n=20, cutoff=0.5)
    shown = [*near, *(column for column in present if column not in near)][:20]
    more = f" ({len(present) - len(shown)} more not shown)" if len(present) > len(shown) else ""
    return unknown_name(name, shown) + more
