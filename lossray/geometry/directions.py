"""Curvature along directions: rows of the `directions` table."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.curvature.pairs import PackedOperator


@dataclass(frozen=True)
class DirectionRow:
    """One direction u of one member; NaN for a dead member, and where u = 0 leaves it undefined."""

    member: int
    direction: str
    norm: float  # |u|
    curvature: float  # u'Hu / u'u
    cosine_with_gradient: float  # cosine of the angle to the gradient of the analysis set


def direction_rows(
    directions: Mapping[str, Tensor], operator: PackedOperator, gradient: Tensor
) -> list[DirectionRow]:
    """One row per direction and member, for one product per direction.

    Args:
        directions: vectors [R, d] by name.
        operator: the members' Hessians.
        gradient: of the analysis set, [R, d].
    """
    along = unit_vectors(gradient)[0]
    rows = []
    for name, vectors in directions.items():
        units, norms = unit_vectors(vectors)
        # Unit vectors do not overflow in float32; zeros for NaN keep it from spreading.
        products = operator.apply(torch.nan_to_num(units, nan=0.0))
        curvatures = (units * products).sum(dim=1)
        cosines = (units * along).sum(dim=1).clamp(-1, 1)
        values = zip(norms.tolist(), curvatures.tolist(), cosines.tolist(), strict=True)
        rows += [DirectionRow(r, name, *numbers) for r, numbers in enumerate(values)]
    return rows


def unit_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to length 1, float64, and their lengths [R]; NaN for a row that is zero or not finite.

    Scaled by the largest entry first, so that no square overflows or vanishes.
    """
    vectors = vectors.to(torch.float64)
    largest = vectors.abs().amax(dim=1, keepdim=True)
    scaled = vectors / largest
    lengths = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    norms = torch.where(largest == 0, torch.zeros_like(largest), largest * lengths)
    return scaled / lengths, norms[:, 0]
