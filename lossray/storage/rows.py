"""Rows of tables: checked on the way into a file, checked on the way out, and merged.

A number that does not exist, or could not be computed, is null: NaN is turned into null on the way in.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lossray.errors import StoreError
from lossray.names import unknown_name
from lossray.packages import installed
from lossray.storage.schema import Column, TableSchema
from lossray.storage.tables import arrow_schema, schema_of

Rows: TypeAlias = Sequence[Mapping[str, Any]] | Mapping[str, Any] | pa.Table


def to_arrow(name: str, rows: Rows) -> pa.Table:
    """Rows as an Arrow table with exactly the declared schema.

    Args:
        name: the table.
        rows: a list of dicts, one per row; or a dict of columns (sequences or arrays of one length, [n]; a
            single value stands for all rows); or an Arrow table. Columns left out are null, as are NaNs.

    Raises:
        StoreError: an unknown column, a key that is missing or null, a value of the wrong type, or columns of
            different lengths, naming the table and the column.
    """
    schema = schema_of(name)
    columns, length = _columns(name, rows)
    declared = [column.name for column in schema.columns]
    for unknown in columns:
        if unknown not in declared:
            raise StoreError(f"table {name!r} has no such column: {unknown_name(unknown, declared)}")
    arrays = [_array(name, column, columns.get(column.name), length) for column in schema.columns]
    return pa.Table.from_arrays(arrays, schema=arrow_schema(name))


def to_bytes(table: pa.Table) -> bytes:
    """A Parquet file with the table's schema and metadata; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def from_bytes(name: str, data: bytes, *, where: str, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file of a table as its declared schema, where this or an earlier version has written it.

    Columns that the file does not have yet are null; those of an earlier version of the schema that are no
    longer declared are left out.

    Args:
        name: the table that the file must belong to.
        data: the file's content.
        where: the file's name, for the error message.
        columns: read these only.

    Raises:
        StoreError: a damaged file, another table, or one that a later version of lossray has written.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if file.schema_arrow.equals(arrow_schema(name)) and _label(file) == schema_of(name).label:
            table = file.read(columns=columns, use_threads=False)
            return table if columns is None else table.select(columns)
        fields = [arrow_schema(name).field(column) for column in columns or arrow_schema(name).names]
        _check_schema(name, _label(file), file.schema_arrow, fields, where)
        return _as_declared(name, file, fields)
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{where} is damaged: {error}; delete it and run the study again") from error


def _label(file: pq.ParquetFile) -> str:
    """What a file says that it is, such as "runs/1"."""
    return str((file.schema_arrow.metadata or {}).get(b"lossray.schema", b"nothing").decode())


def _as_declared(name: str, file: pq.ParquetFile, fields: Sequence[pa.Field]) -> pa.Table:
    """The fields of a file that an earlier version has written; null where it has none."""
    present = [field.name for field in fields if field.name in file.schema_arrow.names]
    table = file.read(columns=present, use_threads=False)
    rows = file.metadata.num_rows
    arrays = [
        table[field.name].cast(field.type) if field.name in present else pa.nulls(rows, field.type)
        for field in fields
    ]
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=arrow_schema(name).metadata))


def _check_schema(
    name: str, label: str, file_schema: pa.Schema, fields: Sequence[pa.Field], where: str
) -> None:
    """Refuse the file of another table, of a later schema, or without a key.

    Columns that are added do not raise a schema's version, so an unknown one is a later version's too.
    """
    declared = schema_of(name)
    table, _, version = label.rpartition("/")
    if table != name or not version.isdigit():
        raise StoreError(
            f"{where} holds {label}, this lossray needs {declared.label}: delete it and run the study again"
        )
    declared_names = {column.name for column in declared.columns}
    unknown = [column for column in file_schema.names if column not in declared_names]
    if int(version) > declared.version or (int(version) == declared.version and unknown):
        more = f" with {', '.join(unknown)}" if unknown else ""
        raise StoreError(
            f"{where} holds {label}{more}, which a later version of lossray has written; this is lossray "
            f"{installed('lossray')}, which knows {declared.label}{' without' if unknown else ''}: use the "
            "later version"
        )
    for field in fields:
        if field.name not in file_schema.names and not field.nullable:
            raise StoreError(
                f"{where} holds {label} without the key {field.name!r} of {declared.label}: run the study "
                "again, which makes it anew"
            )
        there = file_schema.field(field.name).type if field.name in file_schema.names else field.type
        if there != field.type and int(version) == declared.version:
            raise StoreError(
                f"{where} is damaged: its column {field.name!r} is {there}, not {field.type}; delete it and "
                "run the study again"
            )


def merge(name: str, parts: Iterable[pa.Table]) -> pa.Table:
    """All rows of several parts, each key once, sorted by key: the same table for any order of the parts.

    Tasks run at least once, so a row may have been published twice. Then it must be the same row but for
    volatile columns, of which the smallest values are kept.

    Raises:
        StoreError: one key with two different rows, naming it.
    """
    schema = schema_of(name)
    expected = arrow_schema(name)
    table = pa.concat_tables([expected.empty_table(), *parts]).combine_chunks()
    rest = [column.name for column in schema.columns if not column.key]
    # Sorted by every column, not by the key alone: which duplicate stays must not depend on the parts' order.
    sortable = [column for column in rest if not pa.types.is_nested(expected.field(column).type)]
    order = pc.sort_indices(table, sort_keys=[(column, "ascending") for column in [*schema.keys, *sortable]])
    table = table.take(order).replace_schema_metadata(expected.metadata)
    repeated = _equals_row_above(table, schema.keys)
    if not repeated.any():
        return table
    stable = [column for column in rest if column not in schema.volatile]
    conflicts = np.flatnonzero(repeated & ~_equals_row_above(table, stable))
    if conflicts.size:
        raise StoreError(_conflict(schema, table, int(conflicts[0]), stable))
    return table.filter(pa.array(~repeated)).combine_chunks()


def _columns(name: str, rows: Rows) -> tuple[dict[str, Any], int]:
    """The given columns by name, and the number of rows."""
    if isinstance(rows, pa.Table):
        return {column: rows[column] for column in rows.column_names}, rows.num_rows
    if not isinstance(rows, Mapping):
        present = dict.fromkeys(column for row in rows for column in row)
        return {column: [row.get(column) for row in rows] for column in present}, len(rows)
    lengths = {column: len(values) for column, values in rows.items() if not _single(values)}
    if len(set(lengths.values())) != 1:
        raise StoreError(f"table {name!r}: the columns need one common length, found {lengths}")
    length = next(iter(lengths.values()))
    return {c: [values] * length if _single(values) else values for c, values in rows.items()}, length


def _single(values: Any) -> bool:
    return isinstance(values, str) or not hasattr(values, "__len__")


def _array(name: str, column: Column, values: Any, length: int) -> pa.Array:
    """One column as declared. What is not of the type is refused: Arrow itself would cut 1.5 down to 1."""
    if values is None:
        values = [None] * length
    if not isinstance(values, list | tuple | pa.Array | pa.ChunkedArray):
        values = np.asarray(values)
    try:
        if not isinstance(values, pa.Array | pa.ChunkedArray):
            values = pa.array(values, from_pandas=True)
        if not _fits(values.type, column.type):
            raise pa.ArrowTypeError(f"found {values.type}")
        array = values.cast(column.type)
        if pa.types.is_floating(column.type):
            array = pc.if_else(pc.is_nan(array), None, array)
    except pa.ArrowException as error:
        raise StoreError(f"table {name!r}, column {column.name!r} needs {column.type}: {error}") from error
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if column.key and array.null_count:
        raise StoreError(f"table {name!r}: the key column {column.name!r} has missing values")
    return array


def _fits(given: pa.DataType, declared: pa.DataType) -> bool:
    """Whether values of one type are meant where another is declared: integers are numbers, flags are not."""
    types = pa.types
    if types.is_null(given):
        return True
    if types.is_floating(declared):
        return bool(types.is_floating(given) or types.is_integer(given))
    if types.is_integer(declared):
        return bool(types.is_integer(given))
    if types.is_list(declared):
        return bool(types.is_list(given) and _fits(given.value_type, declared.value_type))
    if types.is_string(declared):
        return bool(types.is_string(given) or types.is_large_string(given))
    if types.is_timestamp(declared):
        return bool(types.is_timestamp(given) and given.tz is not None)
    return bool(given == declared)


def _equals_row_above(table: pa.Table, columns: list[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """[n]: whether a row has the same values in these columns as the row above it; nulls equal each other."""
    n = table.num_rows
    same = np.ones(n, dtype=bool)
    same[:1] = False
    for column in columns if n > 1 else ():
        upper, lower = table[column].slice(0, n - 1), table[column].slice(1)
        if pa.types.is_nested(table[column].type):  # which Arrow cannot compare; few rows are ever repeated
            same[1:] &= [a == b for a, b in zip(upper.to_pylist(), lower.to_pylist(), strict=True)]
            continue
        equal = pc.fill_null(pc.equal(upper, lower), False)
        both_null = pc.and_(pc.is_null(upper), pc.is_null(lower))
        same[1:] &= np.asarray(pc.or_(equal, both_null))
    return same


def _conflict(schema: TableSchema, table: pa.Table, row: int, columns: list[str]) -> str:
    """The message for two different rows of one key: the key, and the first column that differs."""
    first, second = table.slice(row - 1, 2).to_pylist()
    key = ", ".join(f"{column}={first[column]!r}" for column in schema.keys)
    differs = next(column for column in columns if first[column] != second[column])
    return (
        f"table {schema.name!r} has two different rows for {key}: {differs} is {first[differs]!r} and "
        f"{second[differs]!r}"
    )
