"""The curvature of R members at one checkpoint: what [curvature] asks for, and the analysis itself."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor

from lossray.curvature.lanczos import leading_pairs
from lossray.curvature.pairs import EigenPairs, PackedOperator
from lossray.settings import Settings

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


def _examples(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"found {value!r}; allowed: a whole number from 1, or 'all'")


class CurvatureSettings(Settings):
    """The [curvature] section.

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
    examples: Annotated[int | Literal["all"], BeforeValidator(_examples)] = "all"
    dtype: Literal["float32", "float64"] = "float32"
    vectors: bool = True

    @field_validator("operators")
    @classmethod
    def _distinct(cls, operators: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name, count in Counter(operators).items() if count > 1]
        if twice:
            raise ValueError(f"found {twice[0]!r} twice; allowed: each name once")
        return operators


class CurvatureOperator(PackedOperator, Protocol):
    """A packed operator that knows its losses and gradients too; see `StackHessian`."""

    losses: Tensor  # [R] float64
    gradient: Tensor  # [R, d] float64
    matvecs: int


@dataclass(frozen=True)
class Analysis:
    """One operator at one point, for R members; NaN in the rows of dead members."""

    pairs: EigenPairs
    ipr: Tensor  # [R, k] inverse participation ratios sum v_i^4: 1/d spread out, 1 localised
    losses: Tensor  # [R] float64
    gradient: Tensor  # [R, d] float64
    gradient_norm: Tensor  # [R]
    alive: Tensor  # [R] bool: members that were analysed


def analyse(
    operator: CurvatureOperator,
    *,
    top: int,
    tolerance: float,
    seeds: Sequence[int],
    alive: Tensor | None = None,
) -> Analysis:
    """Analyse all members at once.

    Args:
        operator: R operators of size d.
        top: eigenpairs at the large end, at most d.
        tolerance: largest residual of a converged pair, as a share of |lambda|max.
        seeds: one per member; its result depends on its own seed.
        alive: [R] bool; dead members are skipped, as are those whose loss or gradient is not finite.
    """
    finite = torch.isfinite(operator.losses) & torch.isfinite(operator.gradient).all(dim=1)
    analysed = finite if alive is None else finite & alive.to(finite.device)
    pairs = leading_pairs(operator, top, seeds=seeds, tolerance=tolerance, alive=analysed)
    gradient = operator.gradient.masked_fill(~analysed[:, None], float("nan"))
    return Analysis(
        pairs=pairs,
        ipr=pairs.vectors.pow(4).sum(dim=2),
        losses=operator.losses.masked_fill(~analysed, float("nan")),
        gradient=gradient,
        gradient_norm=torch.linalg.vector_norm(gradient, dim=1),
        alive=analysed,
    )
