"""How much of a leading eigenspace stays between two checkpoints: rows of the `overlaps` table."""

from dataclasses import dataclass

import torch

from lossray.geometry.subspace_angles import subspace_resolved
from lossray.spectra.certified_pairs import PackedEigenPairs


@dataclass(frozen=True)
class OverlapRow:
    """The leading k-dimensional eigenspaces of one member at two points; NaN where either does not exist.

    Attributes:
        member: index of the member in the pack.
        k: dimension of the eigenspaces.
        subspace_overlap: |V'W|_F^2 / k, the mean squared cosine of the principal angles.
        chance: k / d, its mean where the subspaces have nothing to do with each other.
        dim: d, the number of parameters.
        resolved: whether both subspaces are known to RESOLVED; None for a dead member.
    """

    member: int
    k: int
    subspace_overlap: float
    chance: float
    dim: int
    resolved: bool | None


def overlap_sizes(n_outputs: int, top: int, dim: int) -> list[int]:
    """Dimensions k < d: 1, 5, 10, C - 1, C and 2 C for C outputs, and ``top``."""
    sizes = {1, 5, 10, n_outputs - 1, n_outputs, 2 * n_outputs, top}
    return sorted(k for k in sizes if 0 < k < dim)


def overlap_rows(
    earlier: PackedEigenPairs, later: PackedEigenPairs, *, n_outputs: int, top: int
) -> list[OverlapRow]:
    """One row per size and member.

    Sizes of more dimensions than there are pairs are left out. Neither signs nor rotations inside a subspace
    matter, so crossings and ties inside it do not either.

    Args:
        earlier: leading eigenpairs of the members at one point.
        later: those at the other.
        n_outputs: classes or outputs C, which decides the sizes.
        top: one more size.
    """
    dim = earlier.vectors.shape[2]
    cosines = torch.einsum("rid,rjd->rij", earlier.vectors, later.vectors)
    rows = []
    for k in overlap_sizes(n_outputs, top, dim):
        if k > min(len(earlier), len(later)):
            continue
        # Rounding may lead above 1.
        overlaps = (cosines[:, :k, :k].square().sum(dim=(1, 2)) / k).clamp(max=1).tolist()
        resolved = zip(subspace_resolved(earlier, k), subspace_resolved(later, k), strict=True)
        rows += [
            OverlapRow(r, k, overlap, k / dim, dim, None if None in both else all(both))
            for r, (overlap, both) in enumerate(zip(overlaps, resolved, strict=True))
        ]
    return rows
