"""Small operators as matrices: all eigenvalues, where a Krylov basis would fill the space anyway."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.spectra.certified_pairs import PRODUCTS_AT_ONCE, Block, orthogonality_loss
from lossray.spectra.ends import Wanted
from lossray.spectra.operator import PackedOperator


@dataclass(frozen=True)
class DenseSpectra:
    """All eigenpairs of R operators, from d products with each.

    Attributes:
        values: [R, d] float64, ascending; NaN for a member that is dead or not finite.
        vectors: [R, d, d] float64, the eigenvectors as rows.
    """

    values: Tensor
    vectors: Tensor

    def blocks(self, end: Wanted) -> list[Block]:
        """The outermost pairs of every member, for `certify`."""
        return [
            self._block(values, vectors, end)
            for values, vectors in zip(self.values, self.vectors, strict=True)
        ]

    def _block(self, values: Tensor, vectors: Tensor, end: Wanted) -> Block:
        dim = len(values)
        if values.isnan().any():
            return Block(vectors[:0], float("nan"), float("nan"), False, dim, 0.0)
        order = end.keys(values).argsort(descending=True, stable=True)
        chosen = vectors[order[: end.k]]
        if end.k < dim:
            complement = float(values[order[end.k]])
        else:
            complement = {"largest": float("-inf"), "smallest": float("inf")}.get(end.which, float("nan"))
        return Block(chosen, complement, float(values.abs().max()), True, dim, orthogonality_loss(vectors))


def dense_spectra(operator: PackedOperator, alive: Sequence[bool]) -> DenseSpectra:
    """Form the matrices, symmetrise and diagonalise them in float64.

    Args:
        operator: R symmetric operators of a small size d.
        alive: members to take part.
    """
    n_members, dim = operator.shape
    identity = torch.eye(dim, dtype=torch.float64, device=operator.device)
    parts = [operator.apply(rows.expand(n_members, -1, -1)) for rows in identity.split(PRODUCTS_AT_ONCE)]
    matrices = torch.cat(parts, dim=1)
    usable = torch.isfinite(matrices).all(dim=2).all(dim=1) & torch.tensor(alive, device=matrices.device)
    matrices[~usable] = 0  # a batched eigh raises for all if one is NaN
    values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
    values[~usable] = float("nan")
    return DenseSpectra(values, vectors.mT)
