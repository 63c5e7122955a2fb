"""Sharpness as training meets it: over its minibatches, and along its next step (theory 3, 4)."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lossray.geometry.rounding import rounding_error, shaken_spread
from lossray.operators.objectives import Objective, mean_losses
from lossray.operators.packed import PackedHessian
from lossray.spectra.estimates import PackedEstimate, jackknife

LARGEST_FACTOR, SMALLEST_FACTOR = 1e6, 1e-6  # of the learning rate, between which the critical one is sought
HALVINGS = 12  # of the bracket, a factor 2 wide: a relative precision of 2e-4


def batch_sharpness(batches: Iterable[Objective], *, mode: str, full: bool) -> PackedEstimate:
    """E_B[g_B' H_B g_B] / E_B |g_B|^2, arXiv 2412.20553, with its standard error over the batches.

    Args:
        batches: the losses of R members on one minibatch each.
        mode: how products are formed.
        full: whether there is one batch, of all examples: the value is then exact.
    """
    samples: list[Tensor] = []
    checked: Tensor | None = None  # at the first batch, for all: model, loss and weights are the same
    for objective in batches:
        hessian = PackedHessian(objective, mode=mode, derivative_error=checked)
        gradient = hessian.gradient
        product = hessian.apply(torch.nan_to_num(gradient, nan=0.0))
        checked = hessian.derivative_error
        samples.append(torch.stack([(gradient * product).sum(dim=1), gradient.square().sum(dim=1)], dim=1))
    return jackknife(torch.stack(samples, dim=1), lambda means: means[..., 0] / means[..., 1], exact=full)


def critical_sharpness(objective: Objective, update: Tensor, lr: float) -> Tensor:
    """2 / lr_c, with lr_c the smallest learning rate at which the next update raises the loss (2601.16979).

    On a quadratic along delta = -g this is g'Hg / |g|^2, in general -delta'H delta / g'delta. Forward passes
    only, in float64: the rate is doubled or halved until it is bracketed, and the bracket then halved.

    Args:
        objective: losses of R members.
        update: [R, d] the optimizer's next, at ``lr``; it is scaled in proportion to the rate.
        lr: learning rate, above zero.

    Returns:
        [R] float64. 0 where no rate up to a million times ``lr`` raises the loss; NaN where even a millionth
        does (the update is no descent direction), where half of lr_c lowers the loss by no more than its
        rounding error (at a minimum), where the update is zero, and for a dead member.
    """
    exact = objective.to(torch.float64)
    theta, direction = exact.theta.detach(), torch.nan_to_num(update.double(), nan=0.0)
    here = mean_losses(exact, theta)

    def raises(factors: Tensor) -> Tensor:
        losses = mean_losses(exact, theta + factors[:, None] * direction)
        return ~(losses <= here)  # an overflow raises it too

    idle = (direction == 0).all(dim=1) | exact.dead
    factor = torch.ones_like(here)
    high = raises(factor)
    searching = ~idle
    while bool(searching.any()):
        following = torch.where(high, factor / 2, factor * 2)
        factor = torch.where(searching, following, factor)
        changed = raises(factor) != high
        outside = (factor > LARGEST_FACTOR) | (factor < SMALLEST_FACTOR)
        searching &= ~(changed | outside)
    low = torch.where(high, factor, factor / 2)  # does not raise the loss; twice of it does
    width = low.clone()
    for _ in range(HALVINGS):
        width = width / 2
        low = torch.where(raises(low + width), low, low + width)
    critical = low + width / 2
    halfway = mean_losses(exact, theta + critical[:, None] / 2 * direction)
    error = rounding_error(exact, here, here, shaken_spread(exact, theta))
    always, never = high & (factor < SMALLEST_FACTOR), ~high & (factor > LARGEST_FACTOR)
    ties = ~never & (here - halfway <= 2 * error)
    sharpness = torch.where(never, 0, 2 / (lr * critical))
    return sharpness.masked_fill(always | ties | idle, torch.nan)
