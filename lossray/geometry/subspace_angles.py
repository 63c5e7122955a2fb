"""Angles of directions to the leading eigenspaces, beside those of random directions: the `angles` table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossray.geometry.directions import unit_vectors
from lossray.geometry.gauges import Gauge
from lossray.geometry.nulls import LayerNull, null_p_values
from lossray.geometry.subspaces import subspaces
from lossray.networks.layout import Layout
from lossray.spectra.certified_pairs import PackedEigenPairs

RESOLVED = 0.1  # largest residual / gap, which bounds the sine of the eigenspace's own error


@dataclass(frozen=True)
class AngleRow:
    """One direction of one member against one eigenspace; NaN for a dead member or a zero direction.

    Attributes:
        member: index of the member in the pack.
        direction: its name.
        gauge: its name.
        subspace: "v1", "top5", ..., "vmin".
        cosine: of the angle between the direction and the subspace, >= 0.
        angle_degrees: the angle, 0 to 90.
        energy: chi^2: the direction's share inside the subspace.
        null_ratio: chi^2 d / k, 1 on average for random directions.
        null_p: P(Beta(k/2, (d-k)/2) >= chi^2).
        null_p_lower: P(Beta(k/2, (d-k)/2) <= chi^2).
        sign_flip_null: mean energy over random signs of the direction's components.
        layer_null: mean energy of random directions with its norm in every layer.
        k: dimension of the subspace.
        dim: d, the coordinates that the gauge keeps.
        dropped: number of the other coordinates.
        resolved: whether the subspace is known to RESOLVED; None for a dead member.
    """

    member: int
    direction: str
    gauge: str
    subspace: str
    cosine: float
    angle_degrees: float
    energy: float
    null_ratio: float
    null_p: float
    null_p_lower: float
    sign_flip_null: float
    layer_null: float
    k: int
    dim: int
    dropped: int
    resolved: bool | None


@dataclass(frozen=True)
class Eigenspace:
    """A subspace spanned by eigenvectors of R members.

    Attributes:
        name: as in `AngleRow.subspace`.
        basis: [R, k, d] orthonormal rows.
        resolved: [R] whether it is known to RESOLVED; None for a dead member.
    """

    name: str
    basis: Tensor
    resolved: list[bool | None]


def eigenspaces(
    pairs: PackedEigenPairs, smallest: PackedEigenPairs | None, *, n_outputs: int, kept: Tensor
) -> list[Eigenspace]:
    """The leading eigenspaces for which there are pairs enough, and that of the smallest eigenvalue.

    Args:
        pairs: at the large end.
        smallest: at the other.
        n_outputs: C.
        kept: coordinates that count, [R, d] bool.
    """
    return spaces_of(pairs, smallest, sizes=subspaces(n_outputs, pairs.vectors.shape[2]), kept=kept)


def spaces_of(
    pairs: PackedEigenPairs, smallest: PackedEigenPairs | None, *, sizes: Mapping[str, int], kept: Tensor
) -> list[Eigenspace]:
    """Likewise, the leading ones of given dimensions by name."""
    spaces = [
        Eigenspace(name, pairs.vectors[:, :k], subspace_resolved(pairs, k, kept))
        for name, k in sizes.items()
        if k <= len(pairs)
    ]
    if smallest is not None and smallest.vectors.shape[2] > 1:
        spaces.append(Eigenspace("vmin", smallest.vectors[:, :1], _smallest_resolved(smallest, kept)))
    return spaces


def angle_rows(
    directions: Mapping[str, Tensor],
    pairs: PackedEigenPairs,
    *,
    n_outputs: int,
    layout: Layout,
    gauge: Gauge | None = None,
    smallest: PackedEigenPairs | None = None,
) -> list[AngleRow]:
    """One row per direction, subspace and member.

    Args:
        directions: vectors [R, d] by name, in the gauge.
        pairs: leading eigenpairs of the members, in the gauge.
        n_outputs: classes or outputs C, which decides the subspaces.
        layout: how d divides into parameters, for the layer-matched null.
        gauge: whose coordinates these are; None for the parameters as they are.
        smallest: the pair of the smallest eigenvalue, in the gauge.
    """
    n_members, dim = pairs.vectors.shape[0], pairs.vectors.shape[2]
    kept = torch.ones(n_members, dim, dtype=torch.bool, device=pairs.vectors.device)
    if gauge is not None:
        kept = gauge.scale != 0
    spaces = eigenspaces(pairs, smallest, n_outputs=n_outputs, kept=kept)
    return rows_of_spaces(directions, spaces, LayerNull(layout, kept), gauge.name if gauge else "raw")


def rows_of_spaces(
    directions: Mapping[str, Tensor], spaces: Sequence[Eigenspace], nulls: LayerNull, gauge: str
) -> list[AngleRow]:
    """One row per subspace, direction and member.

    Args:
        directions: vectors [R, d] by name, in the gauge.
        spaces: in the gauge.
        nulls: of the coordinates that the gauge keeps.
        gauge: its name.
    """
    return [
        row
        for space in spaces
        for name, vectors in directions.items()
        for row in _rows(name, vectors, space, nulls, gauge)
    ]


def _rows(direction: str, vectors: Tensor, space: Eigenspace, nulls: LayerNull, gauge: str) -> list[AngleRow]:
    """The rows of one direction and one eigenspace."""
    k, dims = space.basis.shape[1], nulls.kept.sum(dim=1).cpu().numpy()
    units, _ = unit_vectors(vectors)
    chi2, rest = (share.cpu().numpy() for share in _split_energy(units, space.basis))
    upper, lower = null_p_values(chi2, rest, k, dims)
    weights = space.basis.square().sum(dim=1)
    flips = (units.square() * weights).sum(dim=1).tolist()
    layered = nulls.expected(units.square(), weights).tolist()
    return [
        AngleRow(
            member=r,
            direction=direction,
            gauge=gauge,
            subspace=space.name,
            cosine=float(np.sqrt(chi2[r])),
            angle_degrees=float(np.degrees(np.arctan2(np.sqrt(rest[r]), np.sqrt(chi2[r])))),
            energy=float(chi2[r]),
            null_ratio=float(chi2[r] * dims[r] / k),
            null_p=float(upper[r]),
            null_p_lower=float(lower[r]),
            sign_flip_null=flips[r],
            layer_null=layered[r],
            k=k,
            dim=int(dims[r]),
            dropped=nulls.kept.shape[1] - int(dims[r]),
            resolved=space.resolved[r],
        )
        for r in range(len(chi2))
    ]


def subspace_resolved(pairs: PackedEigenPairs, k: int, kept: Tensor | None = None) -> list[bool | None]:
    """For each member: are the leading k pairs converged, confirmed, and far enough from the next value?

    An eigenspace is off by an angle of sine <= residual / gap (Davis & Kahan); gaps inside it do not matter.
    None for a dead member.

    Args:
        pairs: in the gauge.
        k: dimension of the eigenspace.
        kept: coordinates that the gauge keeps, [R, d] bool; None for all of them.
    """
    outside = pairs.values[:, k] if k < len(pairs) else pairs.complement
    gap = pairs.values[:, k - 1] - outside
    residual = torch.linalg.vector_norm(pairs.residuals[:, :k], dim=1)
    resolved = pairs.converged[:, :k].all(dim=1) & pairs.confirmed & (gap > 0) & (residual <= RESOLVED * gap)
    return _flags(pairs, resolved, k, kept)


def _smallest_resolved(pairs: PackedEigenPairs, kept: Tensor) -> list[bool | None]:
    """Likewise of the smallest eigenvalue's vector; no further search confirms that nothing lies below."""
    gap = pairs.complement - pairs.values[:, 0]
    resolved = pairs.converged[:, 0] & (gap > 0) & (pairs.residuals[:, 0] <= RESOLVED * gap)
    return _flags(pairs, resolved, 1, kept)


def _flags(pairs: PackedEigenPairs, resolved: Tensor, k: int, kept: Tensor | None) -> list[bool | None]:
    """``resolved`` [R] for living members whose eigenspace lies in the coordinates that count.

    S H S has an eigenvalue 0 for each dropped coordinate, whose vector says nothing about directions.
    """
    if kept is not None:
        dropped = pairs.vectors[:, :k].square().sum(dim=1).masked_fill(kept, 0).sum(dim=1)
        resolved = resolved & (dropped <= RESOLVED**2)
    dead = torch.isnan(pairs.values[:, 0])
    return [None if gone else flag for gone, flag in zip(dead.tolist(), resolved.tolist(), strict=True)]


def _split_energy(units: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Energies of unit vectors [R, d] inside and outside the rows of ``basis`` [R, k, d].

    Each is accurate where it is small.
    """
    inside = torch.einsum("rkd,rd->rk", basis, units)
    rest = units - torch.einsum("rkd,rk->rd", basis, inside)
    chi2, outside = inside.square().sum(dim=1), rest.square().sum(dim=1)
    return chi2 / (chi2 + outside), outside / (chi2 + outside)
