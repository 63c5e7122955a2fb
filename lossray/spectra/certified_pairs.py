"""Eigenpairs with their certificates: a Rayleigh-Ritz step on orthonormal blocks, with fresh products."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lossray.spectra.ends import RelativeTo, Wanted, allowed_residuals
from lossray.spectra.operator import PackedOperator
from lossray.spectra.summary import Summarised, pairs_summary

if TYPE_CHECKING:
    import pandas as pd

PRODUCTS_AT_ONCE = 16  # in one call of the operator
SMALLEST_LENGTH, LARGEST_LENGTH = 1e-140, 1e140  # whose squares are sound in float64


@dataclass(frozen=True, repr=False)
class EigenPairs(Summarised):
    """The k outermost eigenpairs of one operator; it prints as a few lines.

    Attributes:
        values: [k] float64, outermost first.
        vectors: [d, k] float64, orthonormal columns; the largest component of each is positive.
        residuals: [k] |H v - value v| of the returned vector, from a fresh product: an eigenvalue lies within
            it of each value.
        converged: [k] bool, whether the residual met the tolerance.
        confirmed: whether a search of the complement found nothing beyond the last value.
        gaps: [k] distance to the nearest other Ritz value, inf if there is none.
        complement: leading Ritz value outside the pairs; NaN where it is not known.
        scale: |lambda|max as seen by the solve.
        matvecs: products with the operator.
        orthogonality_loss: largest |V'V - I| over the bases of the solve.
        derivative_error: of the operator; NaN where it is not known.
        ends: [k] "largest", "smallest" or "magnitude"; empty where it is not known.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    confirmed: bool
    gaps: Tensor
    complement: float
    scale: float
    matvecs: int
    orthogonality_loss: float
    derivative_error: float = math.nan
    ends: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Number of pairs k."""
        return len(self.values)

    @property
    def relative_errors(self) -> Tensor:
        """[k] residual / |value|: an eigenvalue lies within this share of each value; from 1 on, anywhere."""
        return torch.where(self.residuals == 0, 0, self.residuals / self.values.abs())

    def summary(self) -> str:
        """Values, residuals and gaps of the outermost pairs, and whether more may have been missed."""
        return pairs_summary(self)

    def to_frame(self) -> "pd.DataFrame":
        """One row per pair, with columns of the table `eigenvalues`; `end` is None where it is not known."""
        import pandas as pd

        ends = self.ends or (None,) * len(self)
        return pd.DataFrame(
            {
                "end": ends,
                "index": [ends[:i].count(end) for i, end in enumerate(ends)],
                "eigenvalue": self.values.tolist(),
                "residual": self.residuals.tolist(),
                "converged": self.converged.tolist(),
                "gap": self.gaps.masked_fill(self.gaps.isinf(), math.nan).tolist(),
                "ipr": self.vectors.pow(4).sum(dim=0).tolist(),
            }
        )


@dataclass(frozen=True)
class PackedEigenPairs:
    """The k outermost eigenpairs of R members at one end; NaN for a dead member or a missing pair.

    Theory 2.15: an eigenvalue lies within its residual of each value; that no larger one was missed is what
    ``confirmed`` makes likely, not certain.

    Attributes:
        values: [R, k] float64, outermost first.
        vectors: [R, k, d] float64, orthonormal rows; the largest component of each is positive.
        residuals: [R, k] |H v - value v| of the returned vector, from fresh products.
        converged: [R, k] bool, residual <= tolerance * scale, or * |value| where that was asked for.
        confirmed: [R] bool, whether a search of the complement found nothing beyond the k-th value.
        gaps: [R, k] distance to the nearest other Ritz value, ``complement`` included; inf if there is none.
        complement: [R] leading Ritz value outside the pairs; -inf (smallest: inf) where nothing is outside,
            NaN where it is not known.
        scale: [R] |lambda|max as seen by the solve.
        matvecs: [R] int64, products with each member.
        orthogonality_loss: [R] max |V V' - I| over the bases of the solve and the returned vectors.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    confirmed: Tensor
    gaps: Tensor
    complement: Tensor
    scale: Tensor
    matvecs: Tensor
    orthogonality_loss: Tensor

    def __len__(self) -> int:
        """Number of pairs k of each member."""
        return self.values.shape[1]

    def of(self, members: Sequence[int]) -> "PackedEigenPairs":
        """The pairs of some members, by their indices."""
        if len(members) == len(self.values):
            return self
        index = list(members)
        return PackedEigenPairs(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def member(self, r: int, end: str | None = None) -> EigenPairs:
        """The pairs of one member, from this end of its spectrum."""
        return EigenPairs(
            values=self.values[r],
            vectors=self.vectors[r].T,
            residuals=self.residuals[r],
            converged=self.converged[r],
            confirmed=bool(self.confirmed[r]),
            gaps=self.gaps[r],
            complement=float(self.complement[r]),
            scale=float(self.scale[r]),
            matvecs=int(self.matvecs[r]),
            orthogonality_loss=float(self.orthogonality_loss[r]),
            ends=() if end is None else (end,) * len(self),
        )


@dataclass(frozen=True)
class Block:
    """What a solver hands over for one member: approximate eigenvectors and what it knows about the rest.

    Attributes:
        vectors: [n, d] float64, orthonormal rows; n = 0 where nothing was found.
        complement: leading Ritz value outside the block, as in `PackedEigenPairs`.
        scale: estimate of |lambda|max.
        confirmed: whether a search of the complement found nothing beyond the block.
        matvecs: products with the member so far.
        orthogonality_loss: largest |V V' - I| over the bases of the solve.
    """

    vectors: Tensor
    complement: float
    scale: float
    confirmed: bool
    matvecs: int
    orthogonality_loss: float


def certify(
    operator: PackedOperator,
    blocks: Sequence[Block],
    end: Wanted,
    *,
    tolerance: float,
    relative_to: RelativeTo = "largest",
) -> PackedEigenPairs:
    """The outermost eigenpairs in each member's block, with true residuals.

    Args:
        operator: R operators; gets one product for each vector of the longest block.
        blocks: one per member.
        end: of the spectrum, and the number of pairs to return; missing ones are NaN.
        tolerance: largest residual of a converged pair, as a share of the scale.
        relative_to: "each" makes it a share of the pair's own |value|.
    """
    images = _images(operator, [block.vectors for block in blocks])
    members = []
    for block, image in zip(blocks, images, strict=True):
        allowed = partial(allowed_residuals, scale=block.scale, tolerance=tolerance, relative_to=relative_to)
        members.append(_solve(block, image, end, allowed))
    return PackedEigenPairs(*(torch.stack(tensors) for tensors in zip(*members, strict=True)))


def joined(parts: Sequence[PackedEigenPairs]) -> PackedEigenPairs:
    """The pairs of all members of several packs, in their order."""
    names = [field.name for field in fields(PackedEigenPairs)]
    return PackedEigenPairs(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def missing(members: int, *, like: PackedEigenPairs) -> PackedEigenPairs:
    """As many pairs as others have, of members that have none."""
    tensors = (getattr(like, field.name) for field in fields(like))
    return PackedEigenPairs(
        *(
            tensor.new_full((members, *tensor.shape[1:]), math.nan if tensor.is_floating_point() else 0)
            for tensor in tensors
        )
    )


def orthogonality_loss(vectors: Tensor) -> float:
    """Largest entry of |V V' - I| for the rows V [n, d]; 0 for n = 0."""
    if len(vectors) == 0:
        return 0.0
    gram = vectors @ vectors.T
    return float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())


def row_norms(rows: Tensor) -> Tensor:
    """Lengths [n] of the rows [n, d], also where their squares would overflow or vanish."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
    if bool(((lengths > SMALLEST_LENGTH) & (lengths < LARGEST_LENGTH)).all()):
        return lengths
    largest = rows.abs().amax(dim=1, keepdim=True)
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    scaled: Tensor = torch.linalg.vector_norm(rows / unit, dim=1) * unit[:, 0]
    return scaled


def _images(operator: PackedOperator, blocks: Sequence[Tensor]) -> list[Tensor]:
    """H x for every row x of every member's block; all members share each call of the operator."""
    n_members, dim = operator.shape
    longest = max(len(block) for block in blocks)
    rows = torch.zeros(n_members, longest, dim, dtype=torch.float64, device=operator.device)
    for row, block in zip(rows, blocks, strict=True):
        row[: len(block)] = block
    parts = [operator.apply(part) for part in rows.split(PRODUCTS_AT_ONCE, dim=1) if part.shape[1]]
    products = torch.cat(parts, dim=1) if parts else rows
    return [product[: len(block)] for product, block in zip(products, blocks, strict=True)]


def _solve(
    block: Block, image: Tensor, end: Wanted, allowed: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """One member's tensors in the order of `PackedEigenPairs`."""
    n, k = len(image), end.k
    usable = n > 0 and bool(torch.isfinite(image).all())  # eigh raises on NaN
    m = n if usable else 0
    basis, image = block.vectors[:m], image[:m]
    small = image @ basis.T
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    order = end.keys(values).argsort(descending=True, stable=True)
    values, rotation = values[order], rotation[:, order].T
    vectors = rotation @ basis
    residuals = row_norms(rotation @ image - values[:, None] * vectors)[:k]
    complement = block.complement
    if m > k and not end.keys(values[k]) <= end.keys(values.new_tensor(complement)):
        complement = float("nan") if math.isnan(complement) else float(values[k])
    loss = max(block.orthogonality_loss, orthogonality_loss(vectors))

    def padded(tensor: Tensor) -> Tensor:
        rows = tensor.new_full((k, *tensor.shape[1:]), float("nan"))
        rows[: min(k, m)] = tensor[:k]
        return rows

    def scalar(value: float) -> Tensor:
        return image.new_tensor(value if usable else float("nan"))

    return (
        padded(values),
        padded(_signed(vectors)),
        padded(residuals),
        padded(residuals) <= allowed(padded(values)),  # NaN compares as False
        torch.tensor(block.confirmed and usable, device=image.device),
        padded(_gaps(values[:k], complement, end)),
        scalar(complement),
        scalar(block.scale),
        torch.tensor(block.matvecs + n, device=image.device),
        scalar(loss),
    )


def _gaps(values: Tensor, complement: float, end: Wanted) -> Tensor:
    """Distance of each value to the nearest of the others and of what lies outside (left out where NaN).

    By magnitude the nearest value outside may lie on either side of zero: its distance is taken from below.
    """
    distances = (values[:, None] - values).abs()
    distances.fill_diagonal_(float("inf"))
    outside = (end.keys(values) - end.keys(values.new_tensor(complement))).abs()
    outside = outside.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return torch.cat([distances, outside[:, None]], dim=1).amin(1)


def _signed(vectors: Tensor) -> Tensor:
    """The rows with their largest component positive (the first of those that tie to rounding)."""
    if len(vectors) == 0:
        return vectors
    sizes = vectors.abs()
    leading = (sizes >= sizes.amax(1, keepdim=True) * (1 - 1e-6)).to(torch.int8).argmax(1, keepdim=True)
    return vectors * torch.sign(vectors.gather(1, leading))
