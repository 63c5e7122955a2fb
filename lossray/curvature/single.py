"""Spectra of one model's curvature: what `lossray.eigenpairs` and its neighbours are.

Thin: a single operator is a pack of one member.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lossray.curvature.analysis import CurvatureOperator, MemberAnalysis, packed_analysis
from lossray.curvature.density import SpectralDensity, packed_density
from lossray.curvature.eigensolver import packed_eigenpairs
from lossray.curvature.ends import checked_relative_to, wanted_pairs
from lossray.curvature.estimates import MemberEstimate
from lossray.curvature.pairs import MemberPairs
from lossray.curvature.trace import packed_trace
from lossray.errors import StudyError


class SingleOperator(Protocol):
    """What `lossray.Hessian` and the other operators of one model are."""

    @property
    def packed(self) -> CurvatureOperator:
        """The operator as a pack of one member."""


def eigenpairs(
    operator: SingleOperator,
    k: int = 10,
    *,
    end: str = "largest",
    tol: float = 1e-3,
    relative_to: str = "largest",
    seed: int = 0,
    block: int = 1,
    start: Tensor | None = None,
    max_matvecs: int | None = None,
) -> MemberPairs:
    """The k outermost eigenpairs, each with its true residual.

    Args:
        operator: such as ``lossray.Hessian(model, loss, data)``, of size d.
        k: number of pairs; min(k, d) are returned.
        end: "largest" or "smallest" (algebraic), "magnitude", or "both": the k largest, then the k smallest.
        tol: largest residual of a converged pair, as a share of |lambda|max.
        relative_to: "each" makes ``tol`` a share of each |lambda|: for an outlier that dwarfs the rest, of
            which by default only ``relative_errors`` says how well it is known. It takes more products, and
            pairs near 0 do not converge: their rounding is that of |lambda|max.
        seed: of the random start vectors.
        block: vectors of a Lanczos block. One takes the fewest products; more amortise the cost of a product
            that is computed anew for each batch, and find multiple eigenvalues in fewer rounds.
        start: [d, n] approximate eigenvectors, such as those of the checkpoint before; a random vector always
            joins them.
        max_matvecs: most products before the solve gives up and flags what has not converged.

    Raises:
        StudyError: an impossible argument.
        ResourceError: the basis would not fit the memory.
    """
    packed = _packed(operator)
    ends = packed_eigenpairs(
        packed,
        wanted_pairs(end, k),
        seeds=[seed],
        tolerance=tol,
        block=block,
        max_matvecs=max_matvecs,
        guesses=None if start is None else _guesses(start, packed.shape[1]),
        relative_to=checked_relative_to(relative_to),
    )
    error = float(packed.derivative_error[0])
    parts = [replace(pairs.member(0), derivative_error=error) for pairs in ends]
    return parts[0] if len(parts) == 1 else _joined(*parts)


def spectral_density(
    operator: SingleOperator, *, probes: int = 4, steps: int = 64, seed: int = 0
) -> SpectralDensity:
    """The eigenvalue distribution by stochastic Lanczos quadrature.

    `analyse` gives a better one for less where eigenpairs are wanted too: it is deflated by them.

    Args:
        operator: of size d. Where d <= probes * steps all eigenvalues are computed instead.
        probes: random start vectors.
        steps: Lanczos steps, and products, with each.
        seed: of the start vectors.

    Raises:
        StudyError: an impossible argument.
        ResourceError: the bases would not fit the memory.
    """
    return packed_density(_packed(operator), probes=probes, steps=steps, seeds=[seed]).member(0)


def trace(operator: SingleOperator, *, matvecs: int = 60, seed: int = 0) -> MemberEstimate:
    """The trace, with its standard error and a Student's t interval.

    Args:
        operator: of size d. Where d <= matvecs the trace is exact.
        matvecs: products to spend.
        seed: of the random vectors.

    Raises:
        StudyError: too few products.
        ResourceError: the basis would not fit the memory.
    """
    return packed_trace(_packed(operator), matvecs=matvecs, seeds=[seed]).member(0)


def analyse(
    operator: SingleOperator,
    *,
    top: int = 10,
    probes: int = 4,
    steps: int = 64,
    tol: float = 1e-3,
    seed: int = 0,
    block: int = 1,
) -> MemberAnalysis:
    """Pairs at both ends, density, trace, Frobenius norm and what follows from them, from one Krylov pass.

    Args:
        operator: of size d.
        top: eigenpairs at the large end; the smallest comes with them.
        probes: random vectors of density and trace.
        steps: vectors of a basis that resolves the whole spectrum; what the pairs leave of it is resolved as
            finely, by fewer.
        tol: largest residual of a converged pair, as a share of |lambda|max.
        seed: of the random vectors.
        block: vectors of a block in the search for the pairs; more than one pays on a GPU.

    Raises:
        StudyError: an impossible argument.
        ResourceError: the basis would not fit the memory.
    """
    return packed_analysis(
        _packed(operator), top=top, tolerance=tol, probes=probes, steps=steps, seeds=[seed], block=block
    ).member(0)


def _packed(operator: SingleOperator) -> CurvatureOperator:
    packed = getattr(operator, "packed", None)
    if packed is None:
        raise StudyError(
            f"operator: found {type(operator).__name__}; allowed: lossray.Hessian(model, loss, data), "
            "GaussNewton, EmpiricalFisher, or one of these Restricted, Scaled or Preconditioned"
        )
    return operator.packed


def _guesses(start: Tensor, dim: int) -> Tensor:
    """The columns [d, n] as a pack's guesses [1, n, d]."""
    if start.ndim != 2 or start.shape[0] != dim:
        raise StudyError(f"start: found shape {list(start.shape)}; allowed: columns [{dim}, n]")
    if not torch.isfinite(start).all():
        raise StudyError("start: found entries that are not finite; allowed: finite columns")
    return start.T[None]


def _joined(largest: MemberPairs, smallest: MemberPairs) -> MemberPairs:
    """Both ends as one result: the largest first; each end outermost first."""

    def both(name: str, dim: int = 0) -> Tensor:
        return torch.cat([getattr(largest, name), getattr(smallest, name)], dim=dim)

    return MemberPairs(
        values=both("values"),
        vectors=both("vectors", dim=1),
        residuals=both("residuals"),
        converged=both("converged"),
        confirmed=largest.confirmed and smallest.confirmed,
        gaps=both("gaps"),
        complement=float("nan"),
        scale=largest.scale,
        matvecs=largest.matvecs + len(smallest),
        orthogonality_loss=max(largest.orthogonality_loss, smallest.orthogonality_loss),
        derivative_error=largest.derivative_error,
    )
