"""Columns of images, encoded or as arrays of pixels, as [N, C, H, W] in 0..1."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, UnidentifiedImageError

from lossray.errors import DataError
from lossray.training.arrow_columns import check_null, tensor
from lossray.training.sources import Array

GRAY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"}
DEEP_MODES = {"I;16", "I;16L", "I;16B", "I;16N", "I"}  # gray of 16 bits
EXPECTED = "expected struct<bytes, path> or binary (encoded images), or arrays [H, W], [H, W, C] or [C, H, W]"
LARGEST = {"uint8": 255, "uint16": 65535, "bool": 1}


def images_of(column: Any, size: tuple[int, int] | None, where: str) -> list[Array]:
    """The images of one column, each [H, W] or [H, W, 3]: uint8, uint16 (gray of 16 bits) or floats as given.

    Args:
        column: encoded images (binary, or a struct with ``bytes``), or arrays of pixels.
        size: height and width to which encoded images are resized; None leaves them.
        where: file and column, for messages.

    Raises:
        DataError: naming the type of the column, or the first row that is wrong.
    """
    check_null(column, where)
    column = _single(column, where)
    kind = column.type
    if pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
        column = pc.struct_field(column, "bytes")
    if any(of(column.type) for of in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        encoded = (chunk[row].as_py() for chunk in column.chunks for row in range(len(chunk)))
        return [_decode(data, size, f"{where}, row {row}") for row, data in enumerate(encoded)]
    if size is not None:
        raise DataError(f"{where} has type {kind}; image_size resizes encoded images only: take it out")
    return list(_as_pixels(tensor(column, where, EXPECTED), kind, where))


def pixels(images: list[Array]) -> Array:
    """Images of one size as [N, C, H, W] float64 in 0..1; gray ones become colour where others are.

    Raises:
        DataError: the images differ in size.
    """
    sizes = Counter(image.shape[:2] for image in images)
    if len(sizes) > 1:
        common = [f"{height}x{width} ({count} images)" for (height, width), count in sizes.most_common(3)]
        more = f" and {len(sizes) - 3} more" if len(sizes) > 3 else ""
        height, width = sizes.most_common(1)[0][0]
        raise DataError(
            f"the images differ in size: {', '.join(common)}{more}; "
            f"set image_size = [{height}, {width}] under [data] to resize them"
        )
    ((height, width),) = sizes
    channels = max(image.shape[2] if image.ndim == 3 else 1 for image in images)
    values = np.empty((len(images), channels, height, width))
    for slot, image in zip(values, images, strict=True):
        slot[:] = image if image.ndim == 2 else image.transpose(2, 0, 1)
        if image.dtype.kind != "f":
            slot /= LARGEST[image.dtype.name]
    return values


def _single(column: Any, where: str) -> Any:
    """A column of lists of one image each as a column of images."""
    kind = column.type
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not lists or not (pa.types.is_struct(kind.value_type) or pa.types.is_binary(kind.value_type)):
        return column
    lengths = pc.list_value_length(column).to_numpy()
    if (lengths != 1).any():
        row = int(np.flatnonzero(lengths != 1)[0])
        raise DataError(
            f"{where} has type {kind}, with {lengths[row]} images in row {row}; allowed: one image a row"
        )
    column = pa.chunked_array([chunk.flatten() for chunk in column.chunks])
    check_null(column, where)
    return column


def _decode(data: bytes | None, size: tuple[int, int] | None, where: str) -> Array:
    if data is None:
        raise DataError(f"{where} has no bytes; images must be embedded in the file, not named by path")
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode not in GRAY_MODES | COLOUR_MODES | DEEP_MODES:
                raise DataError(
                    f"{where} is an image of mode '{opened.mode}'; expected gray of 8 or 16 bits, or colour"
                )
            kind = "I" if opened.mode in DEEP_MODES else "L" if opened.mode in GRAY_MODES else "RGB"
            image = opened.convert(kind)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} cannot be decoded as an image: {error}") from error
    if size is not None:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    values = np.asarray(image)
    if kind != "I":
        return values
    if values.min() < 0 or values.max() > LARGEST["uint16"]:
        raise DataError(
            f"{where} is gray from {values.min()} to {values.max()}; expected 16 bits, 0 to 65535"
        )
    return values.astype(np.uint16)


def _as_pixels(values: Array, kind: Any, where: str) -> Array:
    """Arrays of pixels [n, H, W], [n, H, W, C] or [n, C, H, W] with the channels last."""
    shape = values.shape[1:]
    if values.dtype.kind != "f" and values.dtype.name not in LARGEST:
        raise DataError(
            f"{where} has type {kind}; pixels are uint8, uint16 or floats: convert them, or name the "
            "column in features, which takes numbers as they are"
        )
    if values.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            raise DataError(
                f"{where} is not finite in {len(bad)} of {len(values)} rows, first in row {bad[0]}"
            )
        values = values.astype(np.float64)
    if len(shape) == 2:
        return values
    first, last = (len(shape) == 3 and shape[axis] in (1, 3) for axis in (0, -1))
    if first == last:
        raise DataError(f"{where} has type {kind}, arrays {list(shape)}; {EXPECTED}, with C = 1 or 3")
    return values.transpose(0, 2, 3, 1) if first else values
