"""How far a loss in float64 may be from the exact one."""

import torch
from torch import Tensor

from lossray.networks.losses import mse
from lossray.operators.objectives import Objective, mean_losses
from lossray.seeds import generator

EPS = torch.finfo(torch.float64).eps
ROUNDINGS = 16  # of a loss, in units of eps: of its mean over examples and of its parts
SHAKES = 4  # of the parameters' last bits
DEVIATIONS = 5  # standard deviations that an error may have: four losses give theirs roughly


def shaken_spread(exact: Objective, theta: Tensor) -> Tensor:
    """Standard deviation [R] of the losses when the parameters' last bits are shaken.

    Where the loss is small (a fit that interpolates, or a saturated softmax), the rounding of the outputs
    counts, and that is not proportional to the loss.

    Args:
        exact: losses of R members, in float64.
        theta: [R, d] float64.
    """
    losses = []
    for i in range(SHAKES):
        noise = torch.randn(
            theta.shape[1], generator=generator(0, "rounding", i), device="cpu", dtype=torch.float64
        )
        losses.append(mean_losses(exact, theta * (1 + EPS * noise.to(theta))))
    return torch.stack(losses).std(dim=0)


def rounding_error(exact: Objective, losses: Tensor, here: Tensor, spread: Tensor) -> Tensor:
    """An estimate, on the safe side, of the error of losses near the point where the spread was taken.

    A rounding of the outputs changes the loss by its slope in them, which for a smooth loss that is nowhere
    negative grows at most as the root of the loss. A softmax also adds its small terms to 1, which costs eps
    whatever the loss is, and shaking does not show it; squared errors know no such sum.

    Args:
        exact: whose losses these are.
        losses: [R].
        here: those at the point, [R].
        spread: from `shaken_spread` at the point.
    """
    growth = (losses.abs() / here.abs().clamp(min=EPS)).clamp(min=1).sqrt()
    absolute = 0.0 if exact.loss is mse else EPS
    return ROUNDINGS * EPS * losses.abs() + DEVIATIONS * growth * spread + absolute
