"""The [data] section: the keys of every source of examples; nothing here loads torch.

A new source is one settings class and one entry of SOURCES, which names the function that reads it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lossray.errors import StudyError
from lossray.names import unknown_name
from lossray.plugins import is_spec, split_spec
from lossray.references import resolve
from lossray.settings import Settings

if TYPE_CHECKING:
    from lossray.training.sources import Parts, RawExamples


def _as_tuple(value: object) -> object:
    """TOML has lists only; strict pydantic wants a tuple for a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _size(value: object) -> object:
    return (value, value) if isinstance(value, int) else _as_tuple(value)


Pixels = Annotated[int, Field(ge=1)]
Label = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], BeforeValidator(_as_tuple)]
Columns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class DataSettings(Settings):
    """The keys of [data] that every source has; each source adds its own.

    Attributes:
        source: where the examples come from.
        split: shares of train, validation and test, which sum to 1.
        split_seed: of the stratified division.
        standardise: "feature" shifts and scales each number of an input to mean 0 and variance 1 over the
            training split, "global" all of them alike; "none" leaves them as they are.
    """

    source: str
    split: Annotated[tuple[float, float, float], BeforeValidator(_as_tuple)] = (0.7, 0.15, 0.15)
    split_seed: int = 0
    # "feature" by default: inputs of unit variance keep the scale of single pixels or columns out of the
    # Hessian's spectrum, and it is what the measurements of theory 6 were made with.
    standardise: Literal["none", "feature", "global"] = "feature"

    @field_validator("split")
    @classmethod
    def _fractions(cls, split: tuple[float, float, float]) -> tuple[float, float, float]:
        if not (all(0 < fraction < 1 for fraction in split) and math.isclose(sum(split), 1, abs_tol=1e-9)):
            raise ValueError(
                f"found {list(split)}, which sums to {sum(split):.6g}; "
                "allowed: three positive fractions (train, validation, test) that sum to 1"
            )
        return split


class DigitsSettings(DataSettings):
    """scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, ten classes."""

    source: Literal["digits"] = "digits"


class GaussiansSettings(DataSettings):
    """Standard normal inputs, labelled by a random teacher: the class is its largest output.

    Attributes:
        n: examples, of all splits.
        dim: numbers of an input.
        classes: how many, which are the teacher's outputs.
        noise: standard deviation of the Gaussian noise on the teacher's outputs, which themselves are of
            order 1.
        teacher: "linear", or "mlp" with 16 hidden units.
        seed: of the teacher, the inputs and the noise.
    """

    source: Literal["gaussians"] = "gaussians"
    n: int = Field(default=2000, ge=3, le=10**8)
    dim: int = Field(default=20, ge=1, le=10**6)
    classes: int = Field(default=2, ge=2, le=10**6)
    noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    teacher: Literal["linear", "mlp"] = "linear"
    seed: int = 0


class ParquetSettings(DataSettings):
    """One file, or several in the order of their names; either ``features`` or ``image``.

    Where names of files or folders say train, validation or test, the examples are so divided, and a
    validation or test split that is missing is taken from the training files.

    Attributes:
        path: a local path, relative to the study file, or an fsspec URI (s3://, gs://, https://, ...); a
            file, a folder, or a pattern such as "part-*.parquet".
        label: integers, booleans or strings are classes, floats are regression targets; a column of lists,
            or several columns of numbers, are targets [N, C] as they are. A column may be the name of a hive
            folder.
        features: columns of numbers, or of number lists of one length, side by side in this order; "x*" are
            all whose names match, and "x.a" is a field of a struct. One column of nested lists or tensors
            keeps its shape.
        image: a column of encoded images (struct<bytes, path> or binary), or of arrays of pixels.
        image_size: height and width in pixels (one number: square) to which every image is resized.
    """

    source: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1)
    label: Label
    features: Columns | None = None
    image: str | None = None
    image_size: Annotated[tuple[Pixels, Pixels], BeforeValidator(_size)] | None = None

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> Self:
        if (self.features is None) == (self.image is None):
            given = "neither" if self.features is None else "both"
            raise ValueError(
                f"found {given}; allowed: one of 'features' (a list of columns) and 'image' (a column)"
            )
        if self.image_size is not None and self.image is None:
            raise ValueError("found 'image_size' without 'image'; allowed: with an 'image' column only")
        columns = [*(self.features or [self.image]), *self.labels]
        twice = [name for name, count in Counter(columns).items() if count > 1]
        if twice:
            raise ValueError(
                f"found the column '{twice[0]}' twice among features, image and label; allowed: once"
            )
        return self

    @property
    def labels(self) -> tuple[str, ...]:
        """The label's columns."""
        return self.label if isinstance(self.label, tuple) else (self.label,)


class FunctionSettings(DataSettings):
    """A user's function; every key that is not one of DataSettings' is passed to it by name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]

    @field_validator("source")
    @classmethod
    def _names_a_function(cls, source: str) -> str:
        try:
            split_spec(source)
        except StudyError as error:
            raise ValueError(str(error)) from None
        return source

    @property
    def arguments(self) -> dict[str, JsonValue]:
        """The keyword arguments of the function."""
        return dict(self.__pydantic_extra__)


Read = Callable[[Any, Path | None], tuple["RawExamples | Parts", int | None]]  # settings, the study's folder


@dataclass(frozen=True)
class Source:
    """One source of examples.

    Attributes:
        settings: its keys.
        reader: "module:function" that reads it, imported when it is first read.
    """

    settings: type[DataSettings]
    reader: str

    @property
    def read(self) -> Read:
        """The function that reads it; it returns examples, and the number of classes where it is known."""
        return cast(Read, resolve(self.reader))


SOURCES = {
    "digits": Source(DigitsSettings, "lossray.training.sources:read_digits"),
    "gaussians": Source(GaussiansSettings, "lossray.training.sources:read_gaussians"),
    "parquet": Source(ParquetSettings, "lossray.training.parquet:read_parquet"),
}
FUNCTION = Source(FunctionSettings, "lossray.training.sources:read_function")


def source_of(settings: DataSettings) -> Source:
    """The source of some settings; of a name that is no entry of SOURCES the user's function."""
    return SOURCES.get(settings.source, FUNCTION)


def data_settings(table: Mapping[str, object]) -> DataSettings:
    """Validate the [data] table of a study file with the keys of its source; an empty table is the digits.

    Raises:
        pydantic.ValidationError: a ValueError; unknown sources and unknown keys name the nearest one allowed.
    """
    source = table.get("source", "digits")
    if not isinstance(source, str):
        return DataSettings.model_validate({"source": source})  # raises: not a string
    if source not in SOURCES and not is_spec(source):
        raise _refusal("source", source, unknown_name(source, [*SOURCES, "package.module:function"]))
    kind = SOURCES.get(source, FUNCTION).settings
    for key, value in table.items():
        if kind is not FunctionSettings and key not in kind.model_fields:
            raise _refusal(key, value, unknown_name(key, kind.model_fields))
    return kind.model_validate(dict(table))


def _refusal(key: str, value: object, message: str) -> ValidationError:
    error = PydanticCustomError("unknown_name", "{message}", {"message": message})
    return ValidationError.from_exception_data("data", [{"type": error, "loc": (key,), "input": value}])
