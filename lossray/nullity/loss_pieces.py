"""Losses that are made of pieces: do two sets of outputs lie in one, and the quadratic in place of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lossray.errors import ModelError
from lossray.nullity.output_loss import MOST_OUTPUTS, OutputLoss, noise_like, norm

POINTS, HALVINGS = 65, 40  # on the way between two sets of outputs
ROUNDING = 1e-10  # share of the largest slope or curvature that no change is told from
JUMP = 1e-3  # share of a change that is left after the halvings; of a smooth one 1e-7 is
SMALLEST = 1e-8  # share of the largest example's slope and curvature that is told from rounding
NEAR, STEADY = 1e-6, 1e-9  # a step, and the share by which the curvature of a quadratic may change on it


def in_one_piece(output_loss: OutputLoss, start: Tensor, end: Tensor) -> bool:
    """Whether gradient and curvature of the loss are continuous on the way between two outputs.

    The largest change of each example between neighbouring points is halved again and again: a smooth one
    vanishes, a jump stays. Losses that are not (L1, Huber's, a hinge) are analytic in pieces only. The way
    shrinks the first outputs to the size of the second ones, by equal factors, and is then straight.
    """
    direction = noise_like(start, 2)
    ratio = min(1.0, norm(end) / norm(start)) if norm(start) > 0 else 1.0

    def field(which: int, times: Tensor) -> Tensor:
        times = times.view(-1, *[1] * (start.ndim - 1))
        shrunk = start * ratio ** (2 * times).clamp(max=1)
        outputs = torch.lerp(shrunk, end, (2 * times - 1).clamp(min=0))
        values = output_loss.product(outputs, direction) if which else output_loss.gradient(outputs)
        return values.flatten(1)

    try:
        return all(_is_continuous(partial(field, which), len(start), start.device) for which in (0, 1))
    except ModelError:  # it takes no random outputs, as one of probabilities
        return False


def _is_continuous(field: Callable[[Tensor], Tensor], n: int, device: torch.device) -> bool:
    """Whether ``field`` [N, m] of the times [N] has no jump in [0, 1]."""
    grid = torch.linspace(0, 1, POINTS, dtype=torch.float64, device=device)
    before = field(grid[0].expand(n))
    least, most, largest = before.clone(), before.clone(), torch.full((n,), -1.0, device="cpu").to(before)
    low, first, last = torch.zeros_like(largest), before.clone(), before.clone()
    for time in grid[1:]:
        after = field(time.expand(n))
        change = (after - before).abs().amax(dim=1)
        new = change > largest
        low = torch.where(new, time - grid[1], low)
        first = torch.where(new[:, None], before, first)
        last = torch.where(new[:, None], after, last)
        largest = torch.where(new, change, largest)
        least, most, before = torch.minimum(least, after), torch.maximum(most, after), after
    if not bool((torch.isfinite(least) & torch.isfinite(most)).all()):
        return False
    width = float(grid[1])
    for _ in range(HALVINGS):
        width /= 2
        there = field(low + width)
        left = (there - first).abs().amax(dim=1) >= (last - there).abs().amax(dim=1)
        low = torch.where(left, low, low + width)
        first = torch.where(left[:, None], first, there)
        last = torch.where(left[:, None], there, last)
    rounding = ROUNDING * torch.maximum(least.abs(), most.abs()).max()
    return not bool(((last - first).abs().amax(dim=1) > JUMP * (most - least).amax(dim=1) + rounding).any())


@dataclass(frozen=True)
class TaylorLoss:
    """The quadratic that agrees with a loss at some outputs up to second order, as a mean over examples.

    Attributes:
        targets: its own, in one tensor [N, C, 2 + C]: outputs [N, C], slopes there [N, C], curvatures
            [N, C, C].
        quadratic: whether the loss itself is that quadratic near these outputs.
    """

    targets: Tensor
    quadratic: bool

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over the examples."""
        away = outputs - targets[..., 0]
        linear = (targets[..., 1] * away).sum(dim=1)
        bent = (away * (targets[..., 2:] @ away[..., None])[..., 0]).sum(dim=1) / 2
        value: Tensor = (linear + bent).mean()
        return value

    def evened(self) -> "TaylorLoss":
        """The same with examples weighed so that all are of one size, as far as that is not rounding.

        With weights that are free the rank can only be higher: what is forced then is forced for all weights.
        """
        sizes = self.targets[..., 1:].abs().amax(dim=(1, 2), keepdim=True)
        sizes = torch.maximum(sizes, SMALLEST * sizes.max())
        scaled = self.targets[..., 1:] / torch.where(sizes > 0, sizes, 1)
        return TaylorLoss(torch.cat([self.targets[..., :1], scaled], dim=2), self.quadratic)


def taylor_loss(output_loss: OutputLoss, outputs: Tensor) -> TaylorLoss | None:
    """The quadratic of the loss at ``outputs`` [N, C]; None where it couples examples."""
    n, classes = outputs.shape
    if classes > MOST_OUTPUTS or _couples(output_loss, outputs):
        return None
    parts = [
        outputs[..., None],
        n * output_loss.gradient(outputs)[..., None],
        n * output_loss.blocks(outputs),
    ]
    return TaylorLoss(torch.cat(parts, dim=2), _is_quadratic(output_loss, outputs))


def _couples(output_loss: OutputLoss, outputs: Tensor) -> bool:
    """Whether the curvature joins the outputs of different examples."""
    half = noise_like(outputs, 3)
    half[::2] = 0
    image = output_loss.product(outputs, half)
    return norm(image[::2]) > 1e-12 * norm(image)


def _is_quadratic(output_loss: OutputLoss, outputs: Tensor) -> bool:
    """Whether the curvature stays the same on a small step, but for examples that change their piece."""
    direction = noise_like(outputs, 4)
    before = output_loss.product(outputs, direction)
    size = float(outputs.abs().mean()) or 1.0
    after = output_loss.product(outputs + NEAR * size * noise_like(outputs, 5), direction)
    change, scale = (after - before).abs(), before.abs().max()
    return not bool(((change > STEADY * scale) & (change < JUMP * scale)).any())
