"""The gauge of least norm: damped Newton steps on a sum of exponentials (theory 2.6)."""

import math

import torch
from torch import Tensor

_STEPS = 500
_SMALL_STEP = 1e-8  # a Newton step from so near ends at rounding


def balanced_factors(weights: Tensor) -> Tensor:
    """The factors alpha that minimise sum_ij w_ij (alpha_i / alpha_j)^2, where alpha_0 = 1.

    There the weights into and out of a unit have the same sum. The problem is convex in log alpha.
    The damped step ln(1 + delta) / delta, with delta the largest change of an exponent, converges from
    everywhere (Sun & Tran-Dinh, "Generalized self-concordant functions", Math. Program. 2019).

    Args:
        weights: w_ij >= 0, what goes into unit i out of unit j, [U + 1, U + 1] float64; 0 is the outside.

    Returns:
        alpha [U] of units 1 to U; 1 for those with nothing going in or nothing coming out, NaN if a weight is
        not finite.
    """
    logs = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
    if not bool(torch.isfinite(weights).all()):
        return torch.full_like(logs[1:], torch.nan)
    weights = weights - torch.diag(weights.diagonal())  # a unit's weights to itself do not depend on alpha
    free = (weights.sum(dim=1) > 0) & (weights.sum(dim=0) > 0)
    free[0] = False
    units = free.nonzero()[:, 0]
    crossing = weights > 0
    if len(units) == 0:
        return torch.ones_like(logs[1:])
    for _ in range(_STEPS):
        step = _newton_step(weights * torch.exp(2 * (logs[:, None] - logs)), units)
        delta = float((2 * (step[:, None] - step)).masked_fill(~crossing, 0).abs().max())
        if delta <= _SMALL_STEP:
            logs = logs + step
            break
        logs = logs + step * (math.log1p(delta) / delta)
    return logs[1:].exp()


def _newton_step(weights: Tensor, units: Tensor) -> Tensor:
    """Newton step of log alpha at alpha = 1, [U + 1]; 0 but for ``units``."""
    into, out = weights.sum(dim=1), weights.sum(dim=0)
    total = into + out
    laplacian = torch.diag(total) - weights - weights.T
    scale = total[units].rsqrt()  # unit diagonal: the layers' norms may differ by orders of magnitude
    matrix = laplacian[units][:, units] * scale[:, None] * scale
    step = torch.zeros_like(total)
    step[units] = torch.linalg.solve(matrix, (out - into)[units] * scale) * scale / 2
    return step
