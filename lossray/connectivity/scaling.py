"""The ReLU gauge of one model that is closest to another: factors alpha of the hidden units (theory 2.1).

|D theta - target|^2 depends on the weights through sums over the pairs (j, k) of units that they join: with
w = sum theta^2 and v = sum theta target it is sum_jk w (alpha_j / alpha_k)^2 - 2 v alpha_j / alpha_k + const.
"""

import torch
from torch import Tensor

from lossray.networks.symmetry import RescalingSymmetry

SWEEPS = 500  # of all layers, at most
POLISHING = 4  # Newton steps from the eigenvalues of the companion matrix
SMALL_STEP = 1e-8  # change of all log alpha in a sweep that ends the descent: its square is rounding


def nearest_factors(symmetry: RescalingSymmetry, theta: Tensor, target: Tensor) -> Tensor:
    """Factors alpha [units] > 0 that bring D theta close to ``target``: the better of two local optima.

    One descent starts from alpha = 1, one from the factors that take theta to its balanced gauge and on to
    the gauge of the target: they are the solution where the target is a rescaled copy.

    Args:
        symmetry: of the model.
        theta: its weights, [d] float64 on the CPU, finite.
        target: the other's, likewise.

    Returns:
        alpha; 1 for units without incoming or without outgoing weights. D theta is never farther from the
        target than theta, but for rounding.
    """
    squares = theta.square()
    alive = (symmetry.incoming_sums(squares) > 0) & (symmetry.outgoing_sums(squares) > 0)
    balances = symmetry.balance_factors(torch.stack([theta, target]))
    starts = (torch.ones_like(balances[0]), torch.where(alive, balances[0] / balances[1], 1.0))
    ends = [_descended(symmetry, theta, target, start) for start in starts]
    return min(
        (*starts, *ends),  # a start that is exact stays so
        key=lambda alpha: float(torch.linalg.vector_norm(symmetry.diagonal(alpha) * theta - target)),
    )


def _descended(symmetry: RescalingSymmetry, theta: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """Coordinate descent over the units; those of a layer at once, unless a weight joins two of them."""
    side = symmetry.units + 1
    edges = (symmetry.incoming + 1) * side + symmetry.outgoing + 1
    w, v = (
        torch.bincount(edges, values, minlength=side * side).view(side, side)
        for values in (theta.square(), theta * target)
    )
    for matrix in (w, v):
        matrix.fill_diagonal_(0)  # weights that alpha does not change
    alpha = torch.cat([start.new_ones(1), start])  # 0 is the outside
    blocks = _blocks(symmetry, w)
    for _ in range(SWEEPS):
        before = alpha.clone()
        for block in blocks:
            alpha[block] = _best(w, v, alpha, block)
        if float((alpha / before).log().abs().max()) <= SMALL_STEP:
            break
    return alpha[1:]


def _blocks(symmetry: RescalingSymmetry, w: Tensor) -> list[slice]:
    """Units, numbered from 1, none of which is joined to another of its block."""
    blocks: list[slice] = []
    for units in symmetry.groups.values():
        block = slice(units.start + 1, units.stop + 1)
        single = [slice(unit, unit + 1) for unit in range(block.start, block.stop)]
        blocks += single if bool(w[block, block].any()) else [block]
    return blocks


def _best(w: Tensor, v: Tensor, alpha: Tensor, block: slice) -> Tensor:
    """The alpha of some units that minimise a alpha^2 - 2 p alpha + c / alpha^2 - 2 q / alpha, exactly.

    At the minimum a x^4 - p x^3 + q x - c = 0; in units of (c / a)^(1/4) both ends have the coefficient 1.
    """
    current = alpha[block]
    a, p = w[block] @ alpha.pow(-2), v[block] @ alpha.reciprocal()
    c, q = w[:, block].T @ alpha.square(), v[:, block].T @ alpha
    free = (a > 0) & (c > 0)
    a, c = a.where(free, 1.0), c.where(free, 1.0)
    scale = (c / a).pow(0.25)
    size = (a * c).sqrt()
    p, q = p * scale / size, q / scale / size
    roots = _positive_roots(p, q)
    heights = roots**2 - 2 * p[:, None] * roots + roots**-2 - 2 * q[:, None] / roots
    best = roots.gather(1, heights.argmin(dim=1, keepdim=True))[:, 0]
    return torch.where(free, best * scale, current)


def _positive_roots(p: Tensor, q: Tensor) -> Tensor:
    """The positive roots of x^4 - p x^3 + q x - 1 [U, 4], each polished; 1 in place of the others."""
    companion = torch.zeros(len(p), 4, 4, dtype=torch.float64, device="cpu")
    companion[:, 1:, :3] = torch.eye(3, dtype=torch.float64, device="cpu")
    companion[:, 0, 3], companion[:, 1, 3], companion[:, 3, 3] = 1.0, -q, p
    x = torch.linalg.eigvals(companion).real
    x = torch.where(x > 0, x, 1.0)
    p, q = p[:, None], q[:, None]
    for _ in range(POLISHING):
        slope = 4 * x**3 - 3 * p * x**2 + q
        step = (x**4 - p * x**3 + q * x - 1) / slope
        x = torch.where((slope != 0) & (step < x), x - step, x)
    return x
