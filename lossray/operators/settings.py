"""The [curvature] section: whose spectra are computed, on which examples, and how finely."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from lossray.settings import Settings, each_once

Operator = Literal[
    "hessian",
    "ggn",
    "fisher",
    "preconditioned",
    "hessian:layers",
    "ggn:layers",
    "fisher:layers",
    "preconditioned:layers",
]
ProductMode = Literal["retained", "linearized", "recompute"]  # how a Hessian times a vector is formed


def _examples(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"found {value!r}; allowed: a whole number from 1, or 'all'")


class CurvatureSettings(Settings):
    """The [curvature] section: which spectra are computed at every checkpoint, and how finely.

    Attributes:
        operators: whose spectra to compute; with ":layers" one for each layer as well.
        top: pairs at the large end.
        tolerance: largest residual of a converged pair, as a share of |lambda|max.
        probes: random vectors of the spectral density.
        steps: Lanczos steps with each.
        examples: size of the analysis set, a fixed stratified part of the training split, or "all" of it.
        dtype: of the products; the Lanczos recurrence is always float64.
        vectors: whether the eigenvectors are stored.
    """

    operators: Annotated[tuple[Operator, ...], Field(strict=False, min_length=1)] = ("hessian",)
    top: Annotated[int, Field(ge=1)] = 10
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    probes: Annotated[int, Field(ge=1)] = 4
    steps: Annotated[int, Field(ge=2)] = 64
    examples: Annotated[Annotated[int, Field(ge=1)] | Literal["all"], BeforeValidator(_examples)] = "all"
    dtype: Literal["float32", "float64"] = "float32"
    vectors: bool = True

    @field_validator("operators")
    @classmethod
    def _distinct(cls, operators: tuple[str, ...]) -> tuple[str, ...]:
        return each_once(operators)
