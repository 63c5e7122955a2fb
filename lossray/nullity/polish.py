"""From a checkpoint on to a critical point, where one can be reached: some null directions exist only there.

At a critical point the rescaling symmetry and units with equal activation patterns add null directions that
nothing forces elsewhere (theory 2.3, 5B). Under cross entropy on separable data there is none to reach.
"""

import math

import torch
from torch import Tensor

from lossray.nullity.counts import dense_matrices
from lossray.operators.objectives import PackedObjective, mean_losses
from lossray.operators.packed import PackedHessian

TARGET = 1e-8  # |g| of a critical point, against |lambda|max times |theta| (or 1)
CLOSE = 1e-4  # largest Newton step near one, against |theta|: where the loss vanishes at infinity none is
CURVED = 1e-9  # share of |lambda|max below which a direction counts as flat in that step
MOST_STEPS = 60
MOST_TRIALS = 15  # dampings tried in one step
FACTOR = 10.0  # by which the damping grows or shrinks
FIRST, LEAST = 1e-3, 1e-12  # dampings as shares of |lambda|max


def polish(objective: PackedObjective) -> Tensor:
    """Damped Newton steps V (|Lambda| + mu)^-1 V' g, each of which must not raise the loss.

    Args:
        objective: R members, small enough that their Hessians are formed; evaluated in float64.

    Returns:
        Parameters [R, d] float64 with |g| < 1e-8 |lambda|max max(1, |theta|); NaN for a member that gets to
        no such point, or is dead.
    """
    exact = objective.to(torch.float64)
    polished = [_polished(exact.member(r)) for r in range(len(exact.theta))]
    return torch.stack(polished)


def _polished(objective: PackedObjective) -> Tensor:
    """One member [d]."""
    theta = objective.theta.detach().clone()
    nowhere = torch.full_like(theta[0], torch.nan)
    damping: float | None = None
    before = math.inf
    checked: Tensor | None = None  # at the first step, for all
    for _ in range(MOST_STEPS):
        here = objective.moved(theta)
        hessian = PackedHessian(here, derivative_error=checked)
        gradient, loss = hessian.gradient[0], float(hessian.losses[0])
        (matrix,) = dense_matrices(hessian)
        checked = hessian.derivative_error
        if not bool(torch.isfinite(matrix).all()):
            return nowhere
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        scale = float(values.abs().max())
        damping = FIRST * scale if damping is None else damping
        slopes = vectors.T @ gradient
        curved = values.abs() > CURVED * scale
        newton = torch.linalg.vector_norm(slopes[curved] / values[curved])
        size = max(1.0, float(torch.linalg.vector_norm(theta)))
        norm = float(torch.linalg.vector_norm(gradient))
        critical = float(newton) <= CLOSE * size and norm < TARGET * scale * size
        if critical and norm > before / 2:
            return theta[0]  # down to rounding: what is null only here is null as far as can be seen
        before = norm
        for _ in range(MOST_TRIALS):
            step = -vectors @ (slopes / (values.abs() + damping))
            if float(mean_losses(here, theta + step)[0]) <= loss + 4e-16 * abs(loss):
                break
            damping *= FACTOR
        else:
            return theta[0] if critical else nowhere
        theta = theta + step
        damping = max(damping / FACTOR, LEAST * scale)
    return nowhere
