"""Angles of directions to the leading eigenspaces, beside those of random directions: the `angles` table."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator
from scipy.special import betainc, betaincc
from torch import Tensor

from lossray.curvature.pairs import EigenPairs
from lossray.geometry.directions import unit_vectors
from lossray.names import unknown_name
from lossray.settings import Settings
from lossray.training.optimizers import OPTIMIZERS

Array = NDArray[np.float64]
Direction = Literal["gradient", "minibatch_gradient", "update", "momentum", "displacement"]
Gauge = Literal["raw", "balanced", "adaptive", "preconditioned"]

RESOLVED = 0.1  # largest residual / gap, which bounds the sine of the eigenspace's own error


class AnglesSettings(Settings):
    """The [angles] section.

    Attributes:
        directions: vectors whose angles are measured.
        gauges: metrics in which they are (SCIENCE 2.6).
        shadow: optimizers fed the same gradients, whose updates become directions too.
        window: steps replayed from each checkpoint for the alignment statistic; 0 for none.
    """

    directions: Annotated[tuple[Direction, ...], Field(strict=False)] = (
        "gradient",
        "minibatch_gradient",
        "update",
        "momentum",
        "displacement",
    )
    gauges: Annotated[tuple[Gauge, ...], Field(strict=False, min_length=1)] = (
        "raw",
        "balanced",
        "adaptive",
        "preconditioned",
    )
    shadow: Annotated[tuple[str, ...], Field(strict=False)] = ()
    window: Annotated[int, Field(ge=0)] = 50

    @field_validator("directions", "gauges", "shadow")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise ValueError(f"found {twice[0]!r} twice; allowed: each name once")
        return names

    @field_validator("shadow")
    @classmethod
    def _optimizers(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in OPTIMIZERS:
                raise ValueError(unknown_name(name, OPTIMIZERS))
        return names


@dataclass(frozen=True)
class AngleRow:
    """One direction of one member against one eigenspace; NaN for a dead member or a zero direction."""

    member: int
    direction: str
    gauge: str
    subspace: str  # "v1", "top5", ...
    cosine: float  # of the angle between the direction and the subspace, >= 0
    angle_degrees: float  # 0 to 90
    energy: float  # chi^2: the direction's share inside the subspace
    null_ratio: float  # chi^2 d / k: 1 on average for random directions
    null_p: float  # P(Beta(k/2, (d-k)/2) >= chi^2)
    null_p_lower: float  # P(Beta(k/2, (d-k)/2) <= chi^2)
    k: int
    dim: int
    resolved: bool | None  # whether the subspace is known to RESOLVED; None for a dead member


def subspaces(n_outputs: int, dim: int) -> dict[str, int]:
    """Dimension k < d by name: the top eigenvector, the top 5, and the top C - 1 and C for C outputs."""
    sizes = {"v1": 1} | {f"top{k}": k for k in sorted({5, n_outputs - 1, n_outputs}) if k > 1}
    return {name: k for name, k in sizes.items() if k < dim}


def angle_rows(
    directions: Mapping[str, Tensor], pairs: EigenPairs, *, n_outputs: int, gauge: str = "raw"
) -> list[AngleRow]:
    """One row per direction, subspace and member.

    Subspaces of more dimensions than there are pairs are left out.

    Args:
        directions: vectors [R, d] by name, in the gauge of the pairs.
        pairs: leading eigenpairs of the members.
        n_outputs: classes or outputs C, which decides the subspaces.
        gauge: label of the rows.
    """
    dim = pairs.vectors.shape[2]
    rows = []
    for subspace, k in subspaces(n_outputs, dim).items():
        if k > len(pairs):
            continue
        resolved = subspace_resolved(pairs, k)
        for name, vectors in directions.items():
            chi2, rest = (share.cpu().numpy() for share in _split_energy(vectors, pairs.vectors[:, :k]))
            upper, lower = null_p_values(chi2, rest, k, dim)
            rows += [
                AngleRow(
                    member=r,
                    direction=name,
                    gauge=gauge,
                    subspace=subspace,
                    cosine=float(np.sqrt(chi2[r])),
                    angle_degrees=float(np.degrees(np.arctan2(np.sqrt(rest[r]), np.sqrt(chi2[r])))),
                    energy=float(chi2[r]),
                    null_ratio=float(chi2[r] * dim / k),
                    null_p=float(upper[r]),
                    null_p_lower=float(lower[r]),
                    k=k,
                    dim=dim,
                    resolved=resolved[r],
                )
                for r in range(len(chi2))
            ]
    return rows


def subspace_resolved(pairs: EigenPairs, k: int) -> list[bool | None]:
    """For each member: are the leading k pairs converged, confirmed, and far enough from the next value?

    An eigenspace is off by an angle of sine <= residual / gap (Davis & Kahan); gaps inside it do not matter.
    None for a dead member.
    """
    outside = pairs.values[:, k] if k < len(pairs) else pairs.complement
    gap = pairs.values[:, k - 1] - outside
    residual = torch.linalg.vector_norm(pairs.residuals[:, :k], dim=1)
    known = pairs.converged[:, :k].all(dim=1) & pairs.confirmed & (gap > 0) & (residual <= RESOLVED * gap)
    dead = torch.isnan(pairs.values[:, 0])
    return [None if gone else flag for gone, flag in zip(dead.tolist(), known.tolist(), strict=True)]


def null_p_values(chi2: Array, rest: Array, k: int, dim: int) -> tuple[Array, Array]:
    """P(B >= chi^2) and P(B <= chi^2), B ~ Beta(k/2, (d-k)/2): the null of random directions (SCIENCE 2.11).

    Args:
        chi2: energies inside the subspace, [n].
        rest: 1 - chi2, as accurate as chi2 itself: it decides the upper tail near 1.
        k: dimension of the subspace.
        dim: dimension of the space.
    """
    a, b = k / 2, (dim - k) / 2
    low = chi2 <= rest
    upper = np.where(low, betaincc(a, b, chi2), betainc(b, a, rest))
    return upper, np.where(low, betainc(a, b, chi2), betaincc(b, a, rest))


def _split_energy(vectors: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of |u|^2 inside and outside the rows of ``basis`` [R, k, d]; each accurate where it is small."""
    units, _ = unit_vectors(vectors)
    inside = torch.einsum("rkd,rd->rk", basis, units)
    rest = units - torch.einsum("rkd,rk->rd", basis, inside)
    chi2, outside = inside.square().sum(dim=1), rest.square().sum(dim=1)
    return chi2 / (chi2 + outside), outside / (chi2 + outside)
