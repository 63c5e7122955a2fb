"""The outermost eigenpairs of one operator, each with its true residual: `lossray.eigenpairs`."""

from dataclasses import replace

import torch
from torch import Tensor

from lossray.errors import StudyError
from lossray.spectra.certified_pairs import EigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import checked_relative_to, wanted_pairs
from lossray.spectra.operator import SingleOperator, packed_of


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
) -> EigenPairs:
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
        ModelError: the products are not finite, or not those of the model.
        ResourceError: the basis would not fit the memory.

    Example:
        A saddle: of f(x) = b a x, whose loss (b a - 4)^2 has the Hessian [[2, -4], [-4, 2]] at a = b = 1.

        >>> import lossray, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
        >>> _ = [torch.nn.init.ones_(parameter) for parameter in model.parameters()]
        >>> data = (torch.tensor([[1.0]]), torch.tensor([[4.0]]))
        >>> H = lossray.Hessian(model, torch.nn.functional.mse_loss, data)
        >>> pairs = lossray.eigenpairs(H, k=1, end="both")
        >>> [round(value, 4) for value in pairs.values.tolist()]
        [6.0, -2.0]
        >>> bool((pairs.residuals < 1e-4).all())  # an eigenvalue lies as near as that to each value
        True
    """
    packed, ends = packed_of(operator), wanted_pairs(end, k)
    results = packed_eigenpairs(
        packed,
        ends,
        seeds=[seed],
        tolerance=tol,
        block=block,
        max_matvecs=max_matvecs,
        guesses=None if start is None else _guesses(start, packed.shape[1]),
        relative_to=checked_relative_to(relative_to),
    )
    error = float(packed.derivative_error[0])
    parts = [
        replace(pairs.member(0, side.which), derivative_error=error)
        for pairs, side in zip(results, ends, strict=True)
    ]
    return parts[0] if len(parts) == 1 else _joined(*parts)


def _guesses(start: Tensor, dim: int) -> Tensor:
    """The columns [d, n] as a pack's guesses [1, n, d]."""
    if start.ndim != 2 or start.shape[0] != dim:
        raise StudyError(f"start: found shape {list(start.shape)}; allowed: columns [{dim}, n]")
    if not torch.isfinite(start).all():
        raise StudyError("start: found entries that are not finite; allowed: finite columns")
    return start.T[None]


def _joined(largest: EigenPairs, smallest: EigenPairs) -> EigenPairs:
    """Both ends as one result: the largest first; each end outermost first."""

    def both(name: str, dim: int = 0) -> Tensor:
        return torch.cat([getattr(largest, name), getattr(smallest, name)], dim=dim)

    return EigenPairs(
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
        ends=(*largest.ends, *smallest.ends),
    )
