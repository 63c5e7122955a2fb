"""Curvature at the size of a real step, which sees what the Hessian of a ReLU network misses (theory 4)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.geometry.direction_kinds import TIMES_RATE
from lossray.geometry.rounding import rounding_error, shaken_spread
from lossray.operators.objectives import Objective, mean_losses


@dataclass(frozen=True)
class FiniteStep:
    """[L(theta + s) - 2 L(theta) + L(theta - s)] / |s|^2 of R members.

    Attributes:
        curvature: [R] float64; NaN for a dead member, and where s = 0.
        noise: [R] an estimate of its rounding error on the safe side, see `rounding_error`.
        norm: [R] |s|.
    """

    curvature: Tensor
    noise: Tensor
    norm: Tensor


def real_steps(directions: Mapping[str, Tensor], lr: float) -> dict[str, Tensor]:
    """The steps [R, d] that directions stand for: a displacement is one, a gradient is taken times ``lr``.

    So is P^-1 g, which the optimizer takes times ``lr`` too.
    """
    return {name: (lr if name in TIMES_RATE else 1.0) * u.double() for name, u in directions.items()}


def finite_steps(objective: Objective, steps: Mapping[str, Tensor]) -> dict[str, FiniteStep]:
    """The curvature along steps [R, d] by name, from two forward passes each and a few at the point.

    Args:
        objective: the members' losses; evaluated in float64 whatever its dtype.
        steps: rows of dead members may hold anything.
    """
    if not steps:
        return {}
    exact = objective.to(torch.float64)
    theta = exact.theta.detach()
    here, spread = mean_losses(exact, theta), shaken_spread(exact, theta)
    curvatures = {}
    for name, step in steps.items():
        step = torch.nan_to_num(step.to(theta), nan=0.0, posinf=0.0, neginf=0.0)
        ahead, behind = mean_losses(exact, theta + step), mean_losses(exact, theta - step)
        error, twice, other = (rounding_error(exact, loss, here, spread) for loss in (ahead, here, behind))
        square = step.square().sum(dim=1)
        square = torch.where(square > 0, square, torch.nan).masked_fill(exact.dead, torch.nan)
        noise = (error + 2 * twice + other) / square
        curvatures[name] = FiniteStep((ahead - 2 * here + behind) / square, noise, square.sqrt())
    return curvatures
