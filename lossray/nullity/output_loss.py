"""The loss as a function of a model's outputs, and what of them it ignores.

Nothing is assumed of a loss. Its gradient and its second derivative in the outputs are measured, at the
model's own outputs and at random ones, which are well scaled where the own ones may saturate a softmax.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossray.errors import LossrayError, ModelError
from lossray.networks.losses import Loss
from lossray.operators.objectives import example_losses
from lossray.plugins import failure
from lossray.seeds import generator

LARGE = 1e-5  # share of the largest slope below which one is not looked at
IGNORED = 1e-9  # share of a slope that is none: rounding is 1e-16 of the outputs
MOST_OUTPUTS = 1024  # for which all directions are looked at; beyond it the equal shift alone
BASES = 4  # sets of random outputs at least
STEPS = (0.37, -1.1, 2.3)  # finite shifts, in units of the outputs' scale
ALIKE = 30.0  # ratio of slope and curvature up to which outputs of size 1 are well scaled


@dataclass(frozen=True)
class OutputLoss:
    """The mean loss over fixed examples, as a function of their outputs [N, ...].

    Attributes:
        loss: ``loss(outputs, targets)``, the mean over examples.
        targets: tensors [N, ...].
        weights: [N], of the examples; None: all count alike.
    """

    loss: Loss
    targets: Any
    weights: Tensor | None = None

    def value(self, outputs: Tensor) -> Tensor:
        """The mean loss, a scalar.

        Raises:
            ModelError: the loss is no function, or failed.
        """
        if not callable(self.loss):
            raise ModelError(f"loss: found {type(self.loss).__name__}; allowed: a function")
        try:
            if self.weights is None:
                return self.loss(outputs, self.targets)
            each = example_losses(self.loss, outputs, self.targets)
            return (each * self.weights).sum() / self.weights.sum()
        except LossrayError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise ModelError(f"the loss raised {failure(error)}") from error

    def gradient(self, outputs: Tensor) -> Tensor:
        """Its gradient in the outputs, of their shape."""
        with _differentiating():
            return self._slope(outputs)[1].detach()

    def product(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Its second derivative in the outputs times ``vectors``, of their shape.

        Raises:
            ModelError: the loss cannot be differentiated twice.
        """
        with _differentiating():
            leaf, slope = self._slope(outputs)
            if not slope.requires_grad:
                return torch.zeros_like(outputs)  # it is linear
            (product,) = torch.autograd.grad((slope * vectors).sum(), leaf, materialize_grads=True)
            return product.detach()

    def blocks(self, outputs: Tensor) -> Tensor:
        """The second derivative of each example's part, [N, C, C] for outputs [N, C]."""
        columns = []
        for c in range(outputs.shape[1]):
            vector = torch.zeros_like(outputs)
            vector[:, c] = 1
            columns.append(self.product(outputs, vector))
        return torch.stack(columns, dim=2)

    def _slope(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs as a leaf, and the gradient there, with its graph."""
        leaf = outputs.detach().clone().requires_grad_()
        value = self.value(leaf.clone())
        if not value.requires_grad:
            return leaf, torch.zeros_like(outputs)
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True, materialize_grads=True)
        return leaf, slope


@contextmanager
def _differentiating() -> Iterator[None]:
    """With gradients, and a ModelError for a loss that cannot be differentiated."""
    try:
        with torch.enable_grad():
            yield
    except RuntimeError as error:  # autograd's
        raise ModelError(f"the loss cannot be differentiated twice: {failure(error)}") from error


def random_outputs(output_loss: OutputLoss, like: Tensor, *, draw: int = 0) -> Tensor:
    """Outputs of the shape of ``like`` at which slope and curvature of the loss are of one size."""
    return natural_scale(output_loss, like) * noise_like(like, draw)


def natural_scale(output_loss: OutputLoss, like: Tensor) -> float:
    """Size of outputs at which the loss is far from saturated: 1, or that of the targets of a regression."""
    zero, direction = torch.zeros_like(like), noise_like(like, 0)
    try:
        bent = norm(output_loss.product(zero, direction))
        scale = norm(output_loss.gradient(zero)) / bent if bent > 0 else 1.0
        if not (0 < scale < math.inf) or 1 / ALIKE <= scale <= ALIKE:
            return 1.0
        there = norm(output_loss.product(scale * direction, direction))
    except ModelError:  # it takes no such outputs, as one of probabilities
        return 1.0
    return scale if bent / 10 < there < 10 * bent else 1.0


# ---- what is ignored


@dataclass(frozen=True)
class Ignored:
    """Directions [n, C] in the last axis of the outputs along which a loss does not change.

    Attributes:
        each: added in any amount at any position of any example.
        common: added in one amount at all positions: those of ``each``, and more.
    """

    each: Tensor
    common: Tensor

    def equal_shift(self, directions: Tensor) -> int:
        """1 where the sum of all outputs lies in the span of ``directions``, otherwise 0."""
        ones = torch.ones(directions.shape[1], dtype=directions.dtype, device=directions.device)
        rest = ones - directions.T @ (directions @ ones)
        return int(bool(len(directions)) and norm(rest) <= 1e-6 * norm(ones))


def ignored_directions(output_loss: OutputLoss, outputs: Tensor) -> Ignored:
    """What the loss ignores of the outputs [N, ..., C], measured.

    Along such a direction every gradient vanishes, wherever it is taken: those at random outputs of several
    sizes leave a space, and finite shifts in that space must leave the gradient at the outputs as it is.
    """
    classes = outputs.shape[-1]
    nothing = torch.zeros(0, classes, dtype=torch.float64, device=outputs.device)
    if outputs.ndim < 2 or not outputs.is_floating_point():
        return Ignored(nothing, nothing)
    try:
        bases = _bases(output_loss, outputs)
        slopes = [output_loss.gradient(base) for base in bases]
    except ModelError:  # it takes no random outputs, as one of probabilities
        return Ignored(nothing, nothing)
    if not all(bool(torch.isfinite(slope).all()) for slope in slopes):
        return Ignored(nothing, nothing)
    each = _null_space([slope.reshape(-1, classes) for slope in slopes])
    sums = [slope.reshape(len(slope), -1, classes).sum(dim=1) for slope in slopes]
    common = each if outputs.ndim == 2 else _null_space(sums, [_sizes(slope) for slope in slopes])
    noise = noise_like(outputs[..., :1], 1)
    kept = each if _stays(output_loss, bases, [noise * u for u in each]) else nothing
    same = common if _stays(output_loss, bases, [torch.ones_like(noise) * u for u in common]) else nothing
    return Ignored(kept, same if len(same) >= len(kept) else kept)


def _bases(output_loss: OutputLoss, outputs: Tensor) -> list[Tensor]:
    """The model's outputs, and random ones of their size and of the loss's own."""
    size = float(outputs.abs().mean())
    rows = max(outputs.numel() // outputs.shape[-1], 1)
    classes = min(outputs.shape[-1], MOST_OUTPUTS)
    scale = natural_scale(output_loss, outputs)
    more = [scale * noise_like(outputs, i) for i in range(BASES + 2 * classes // rows)]
    wide = size * noise_like(outputs, len(more))
    return [
        *more,
        *(base for base in (outputs, wide) if bool(torch.isfinite(output_loss.gradient(base)).all())),
    ]


def _null_space(parts: Sequence[Tensor], sizes: Sequence[Tensor] | None = None) -> Tensor:
    """Orthonormal directions [n, C] to which all rows of the ``parts`` are perpendicular.

    Args:
        parts: [rows, C] each.
        sizes: [rows] each, by which the rows are weighed; by default their lengths.
    """
    sizes = [_sizes(rows) for rows in parts] if sizes is None else sizes
    used = [_scaled(rows, row_sizes) for rows, row_sizes in zip(parts, sizes, strict=True)]
    some, classes = parts[0], parts[0].shape[1]
    if classes > MOST_OUTPUTS:
        ones = torch.full((1, classes), classes**-0.5, dtype=some.dtype, device=some.device)
        return ones if all(bool(((rows @ ones.T).abs() <= IGNORED).all()) for rows in used) else ones[:0]
    count = sum(len(rows) for rows in used)
    if not count:
        return torch.eye(classes, dtype=some.dtype, device=some.device)
    joined = torch.cat([torch.linalg.qr(rows, mode="r").R if len(rows) > classes else rows for rows in used])
    _, values, vectors = torch.linalg.svd(joined)
    rank = int((values > IGNORED * count**0.5).sum())
    rest: Tensor = vectors[rank:]
    return rest


def _scaled(rows: Tensor, sizes: Tensor) -> Tensor:
    """Rows over their sizes, without those of saturated examples, which are rounding."""
    large = sizes > LARGE * sizes.max()
    return rows[large] / sizes[large, None]


def _stays(output_loss: OutputLoss, bases: Sequence[Tensor], shifts: Sequence[Tensor]) -> bool:
    """Whether the gradient is the same after finite shifts, next to what other changes of that size do."""
    if not shifts:
        return True
    weights = torch.randn(
        len(shifts), generator=generator(0, "shifts"), device="cpu", dtype=torch.float64
    ).tolist()
    shift = sum(weight * one for weight, one in zip(weights, shifts, strict=True))
    assert isinstance(shift, Tensor)
    random = noise_like(bases[0], 6)
    random *= norm(shift) / norm(random)
    for base in bases:
        before, size = output_loss.gradient(base), float(base.abs().mean()) or 1.0
        rounding = torch.finfo(torch.float64).eps * float(base.abs().max())
        for step in STEPS:
            change, other = (
                norm(output_loss.gradient(base + step * size * way) - before) for way in (shift, random)
            )
            if not change <= (IGNORED + rounding) * max(norm(before), other):
                return False
    return True


def noise_like(like: Tensor, draw: int) -> Tensor:
    """Random numbers of the shape of ``like``."""
    values = torch.randn(
        like.shape, generator=generator(draw, "random outputs"), device="cpu", dtype=torch.float64
    )
    return values.to(like.device)


def norm(tensor: Tensor) -> float:
    """Euclidean length."""
    return float(torch.linalg.vector_norm(tensor))


def _sizes(slopes: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.vector_norm(slopes.flatten(1), dim=1)
    return sizes
