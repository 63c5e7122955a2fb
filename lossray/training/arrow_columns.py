"""Columns of Arrow tables as NumPy arrays: numbers, tensors of one shape, and labels."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lossray.errors import DataError
from lossray.training.sources import Array

NUMBERS = "expected numbers, or lists of numbers of one length"
LABELS = "expected integers or strings (classes), floats (regression), or lists of numbers of one length"


def numbers(column: Any, where: str) -> Array:
    """A column of numbers as [n] float64; of nested lists or tensors of one shape as [n, *shape].

    Args:
        column: a ChunkedArray of at least one row.
        where: file and column, for messages.

    Raises:
        DataError: naming the type of the column, or the first row that is wrong.
    """
    values = tensor(column, where, NUMBERS).astype(np.float64)
    _check_finite(values, where)
    return values


def labels(column: Any, where: str) -> Array:
    """A column of labels: strings [n], integers [n, ...] or float64 [n, ...].

    Arguments and errors as for `numbers`.
    """
    check_null(column, where)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return np.array(column.to_pylist(), dtype=np.str_)
    values = tensor(column, where, LABELS)
    if values.dtype.kind == "f":
        _check_finite(values, where)
        return values.astype(np.float64)
    return values if values.dtype == np.uint64 else values.astype(np.int64)


def tensor(column: Any, where: str, expected: str) -> Array:
    """A column as [n, *shape] in its own dtype; decimals are integers or float64.

    Raises:
        DataError: the column is no numbers (``expected`` says what is needed), has nulls, or is ragged.
    """
    check_null(column, where)
    array, shape, rows = _whole(column), [len(column)], len(column)
    if isinstance(array, pa.FixedShapeTensorArray):  # its own to_numpy_ndarray fails on some shapes
        (stored, order), array = (array.type.shape, array.type.permutation), array.storage.flatten()
        _check_elements(array, where, rows)
        laid_out = tensor(pa.chunked_array([array]), where, expected).reshape(rows, *stored)
        return laid_out if order is None else laid_out.transpose(0, *(axis + 1 for axis in order))
    while True:
        if isinstance(array, pa.ExtensionArray):
            array = array.storage
        if not _is_list(array.type):
            break
        _check_elements(array, where, rows)
        shape.append(_length(array, where, rows))
        array = array.flatten()
    kind = array.type
    if pa.types.is_decimal(kind):
        array = array.cast(pa.int64() if kind.scale == 0 and kind.precision <= 18 else pa.float64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where} is {column.type}; {expected}{_hint(kind)}")
    _check_elements(array, where, rows)
    values: Array = array.to_numpy(zero_copy_only=False)
    return values.reshape(shape)


def check_null(column: Any, where: str) -> None:
    """Refuse a column with nulls, naming the first."""
    if column.null_count:
        raise DataError(f"{where} has {column.null_count} nulls, first in row {_first_null(column)}")


def _hint(kind: Any) -> str:
    """What helps where the type is one that people have."""
    if pa.types.is_struct(kind):
        return f"; a field is named COLUMN.{kind.field(0).name}"
    if pa.types.is_temporal(kind):
        return "; write the time as a number, such as seconds"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return "; write a category as columns of 0 and 1, one for each value"
    return ""


def _whole(column: Any) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _is_list(kind: Any) -> bool:
    return any(
        of(kind)
        for of in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    )


def _length(array: Any, where: str, rows: int) -> int:
    """The length that all lists have."""
    lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
    width = int(lengths[0])
    if (lengths != width).any():
        index = int(np.flatnonzero(lengths != width)[0])
        row = index // (len(array) // rows)
        raise DataError(f"{where} has lists of {width} values, but {lengths[index]} in row {row}")
    if width == 0:
        raise DataError(f"{where} has empty lists")
    return width


def _check_elements(array: Any, where: str, rows: int) -> None:
    if array.null_count:
        raise DataError(f"{where} has a null in row {_first_null(array) // (len(array) // rows)}")


def _first_null(array: Any) -> int:
    return int(np.flatnonzero(pc.is_null(array).to_numpy(zero_copy_only=False))[0])


def _check_finite(values: Array, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if len(bad):
        raise DataError(f"{where} is not finite in {len(bad)} of {len(values)} rows, first in row {bad[0]}")
