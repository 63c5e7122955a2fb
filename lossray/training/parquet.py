"""Parquet files as examples: columns of numbers, or images in the layout of Hugging Face data sets."""

import difflib
import io
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from pydantic import BeforeValidator, Field, model_validator

from lossray.errors import DataError
from lossray.names import unknown_name
from lossray.training.sources import Array, DataSettings, Examples, as_tuple

GRAY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"}


def _size(value: object) -> object:
    return (value, value) if isinstance(value, int) else as_tuple(value)


Pixels = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class ParquetSettings(DataSettings):
    """One file, or all files of a directory in the order of their names; either ``features`` or ``image``."""

    source: Literal["parquet"] = "parquet"
    # A local path, relative to the study file, or an fsspec URI (s3://, gs://, https://, ...).
    path: str = Field(min_length=1)
    # Integers, booleans or strings are classes, floats are regression targets.
    label: str
    # Columns of numbers, or of number lists of one length, side by side in this order.
    features: Names | None = None
    # A column of struct<bytes, path>: encoded images.
    image: str | None = None
    # Height and width in pixels (one number: square) to which every image is resized.
    image_size: Annotated[tuple[Pixels, Pixels], BeforeValidator(_size)] | None = None

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> Self:
        if (self.features is None) == (self.image is None):
            found = "neither" if self.features is None else "both"
            raise ValueError(
                f"found {found}; allowed: one of 'features' (a list of columns) and 'image' (a column)"
            )
        if self.image_size is not None and self.image is None:
            raise ValueError("found 'image_size' without 'image'; allowed: with an 'image' column only")
        columns = [*(self.features or [self.image]), self.label]
        twice = [name for name, count in Counter(columns).items() if count > 1]
        if twice:
            raise ValueError(
                f"found the column '{twice[0]}' twice among features, image and label; allowed: once"
            )
        return self


def read_parquet(settings: ParquetSettings, base: Path | None) -> tuple[Examples, int | None]:
    """Read all files.

    Args:
        settings: see there.
        base: the folder to which a relative path refers; the current directory if None.

    Returns:
        Inputs [N, D] float64, or [N, C, H, W] in 0..1 with C = 1 where all images are gray and 3 otherwise;
        targets [N] int64 class ids in the sorted order of the labels, or [N] float64. And the number of
        classes, None for regression.

    Raises:
        DataError: naming the file, the column and the first row (counted from 0 in the file) that is wrong.
    """
    filesystem, files = _files(settings.path, base)
    tables = {file: _table(settings, filesystem, file) for file in files}
    tables = {file: table for file, table in tables.items() if table.num_rows}
    if not tables:
        raise DataError(f"{settings.path} has no rows")
    labels = {
        file: _labels(table.column(settings.label), f"{file}: column '{settings.label}'")
        for file, table in tables.items()
    }
    targets, n_classes = _targets(_join(labels, settings.label))
    if settings.image is None:
        features = {file: _features(settings, table, file) for file, table in tables.items()}
        return Examples(_join(features, "features"), targets), n_classes
    images = [image for file, table in tables.items() for image in _images(settings, table, file)]
    return Examples(_pixels(images), targets), n_classes


# --- files


def _files(path: str, base: Path | None) -> tuple[Any, list[str]]:
    """The file system, and the files in the order of their names (the order decides which row is which)."""
    if "://" not in path:
        path = str((base or Path()).absolute() / Path(path).expanduser())
    try:
        filesystem, root = fsspec.core.url_to_fs(path)
        if filesystem.isfile(root):
            return filesystem, [root]
        if not filesystem.isdir(root):
            raise DataError(f"{path} does not exist; [data] path is relative to the study file's folder")
        found = [file for file in filesystem.find(root) if file.endswith((".parquet", ".pq"))]
    except (ImportError, ValueError) as error:  # a missing driver, an unknown protocol
        raise DataError(f"{path} cannot be opened: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    # Spark and others leave files such as _temporary/... and .part.crc beside their output.
    files = sorted(file for file in found if not _hidden(file[len(root) :]))
    if not files:
        raise DataError(f"{path} holds no file that ends in .parquet or .pq")
    return filesystem, files


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.strip("/").split("/"))


def _table(settings: ParquetSettings, filesystem: Any, file: str) -> Any:
    columns = [*(settings.features or [settings.image]), settings.label]
    try:
        with filesystem.open(file, "rb") as handle:
            parquet = pq.ParquetFile(handle)
            present = parquet.schema_arrow.names
            for name in columns:
                if name not in present:
                    raise DataError(f"{file} has no such column: {_unknown_column(name, present)}")
                if present.count(name) > 1:
                    raise DataError(f"{file} has {present.count(name)} columns named {name!r}; allowed: one")
            return parquet.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def _unknown_column(name: str, present: list[str]) -> str:
    """The nearest names first, and only a few: a table may have a column for every pixel."""
    near = difflib.get_close_matches(name, present, n=20, cutoff=0.5)
    shown = [*near, *(column for column in present if column not in near)][:20]
    more = f" ({len(present) - len(shown)} more not shown)" if len(present) > len(shown) else ""
    return unknown_name(name, shown) + more


def _join(arrays: dict[str, Array], what: str) -> Array:
    """Join the arrays of all files, refusing those that NumPy would join by changing their type."""
    (first, expected), *others = arrays.items()
    for file, array in others:
        if array.dtype.kind != expected.dtype.kind or array.shape[1:] != expected.shape[1:]:
            raise DataError(
                f"{file}: '{what}' is {array.dtype} {list(array.shape[1:])} a row, "
                f"but {expected.dtype} {list(expected.shape[1:])} in {first}"
            )
    return np.concatenate(list(arrays.values()))


# --- columns of numbers


def _features(settings: ParquetSettings, table: Any, file: str) -> Array:
    """The feature columns of one file side by side, [n, D] float64."""
    assert settings.features is not None
    columns = [_feature(table.column(name), f"{file}: column '{name}'") for name in settings.features]
    return np.concatenate(columns, axis=1)


def _feature(column: Any, where: str) -> Array:
    """One column as [n, width] float64: width 1 for numbers, the length of the lists for lists."""
    _check_null(column, where)
    array, width = pa.concat_arrays(column.chunks), 1
    if _is_list(array.type):
        lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
        width = int(lengths[0])
        if (lengths != width).any():
            row = int(np.flatnonzero(lengths != width)[0])
            raise DataError(f"{where} has lists of {width} values, but {lengths[row]} in row {row}")
        if width == 0:
            raise DataError(f"{where} has empty lists")
        array = array.flatten()
    kind = array.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where} is {column.type}; expected numbers, or lists of numbers of one length")
    if array.null_count:
        raise DataError(f"{where} has a null in row {_first_null(array) // width}")
    values: Array = array.to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, width)
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise DataError(f"{where} is not finite in {len(bad)} of {len(values)} rows, first in row {bad[0]}")
    return values


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _first_null(array: Any) -> int:
    return int(np.flatnonzero(pc.is_null(array).to_numpy(zero_copy_only=False))[0])


def _check_null(column: Any, where: str) -> None:
    if column.null_count:
        raise DataError(f"{where} has {column.null_count} nulls, first in row {_first_null(column)}")


# --- labels


def _labels(column: Any, where: str) -> Array:
    _check_null(column, where)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=np.str_)
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        return column.to_numpy().astype(np.int64)  # type: ignore[no-any-return]
    if not pa.types.is_floating(kind):
        raise DataError(
            f"{where} has type {kind}; expected integers or strings (classes) or floats (regression)"
        )
    values = column.to_numpy().astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(f"{where} is not finite in {len(bad)} of {len(values)} rows, first in row {bad[0]}")
    return values  # type: ignore[no-any-return]


def _targets(labels: Array) -> tuple[Array, int | None]:
    if labels.dtype.kind == "f":
        return labels, None
    classes, ids = np.unique(labels, return_inverse=True)
    return ids.astype(np.int64), len(classes)


# --- images


def _images(settings: ParquetSettings, table: Any, file: str) -> list[Array]:
    """The decoded images of one file, each [H, W] or [H, W, 3] uint8."""
    where = f"{file}: column '{settings.image}'"
    column = table.column(settings.image)
    _check_null(column, where)
    kind = column.type
    if not pa.types.is_struct(kind) or "bytes" not in [field.name for field in kind]:
        raise DataError(f"{where} has type {kind}; expected struct<bytes, path>, encoded images")
    encoded = (chunk.field("bytes")[row].as_py() for chunk in column.chunks for row in range(len(chunk)))
    return [_decode(data, settings.image_size, f"{where}, row {row}") for row, data in enumerate(encoded)]


def _decode(data: bytes | None, size: tuple[int, int] | None, where: str) -> Array:
    if data is None:
        raise DataError(f"{where} has no bytes; images must be embedded in the file, not named by path")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode not in GRAY_MODES | COLOUR_MODES:
                raise DataError(f"{where} is an image of mode '{opened.mode}'; expected 8-bit gray or colour")
            image = opened.convert("L" if opened.mode in GRAY_MODES else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be decoded as an image: {error}") from error
    if size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _pixels(images: list[Array]) -> Array:
    """Images of one size as [N, C, H, W] float64 in 0..1; gray ones become colour where others are."""
    sizes = Counter(image.shape[:2] for image in images)
    if len(sizes) > 1:
        common = [f"{height}x{width} ({count} images)" for (height, width), count in sizes.most_common(3)]
        more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        height, width = sizes.most_common(1)[0][0]
        raise DataError(
            f"the images differ in size: {', '.join(common)}{more}; "
            f"set image_size = [{height}, {width}] under [data] to resize them"
        )
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.stack([image] * 3, axis=2) for image in images]
        return np.stack(images).transpose(0, 3, 1, 2).astype(np.float64) / 255
    return np.stack(images)[:, None].astype(np.float64) / 255
