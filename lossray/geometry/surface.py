"""Slices of the loss: along eigenvectors, in the plane of a trajectory, along random directions.

The points of a grid are members of one stack, evaluated in batches.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from torch import Tensor

from lossray.curvature.memory import fitting
from lossray.networks.losses import Loss
from lossray.networks.stack import Layout, Stack
from lossray.seeds import generator
from lossray.settings import Settings

Kind = Literal["v1", "eigenvectors", "pca", "random"]
POINTS_AT_ONCE = 64  # members of a stack; fewer where the memory does not hold them
COPIES = 8  # of a point's parameters and outputs that a forward pass holds


def _odd(points: int) -> int:
    if points % 2 == 0:
        raise ValueError(f"found {points}; allowed: an odd number, so that the checkpoint is on the grid")
    return points


def _seeds(value: Any) -> Any:
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"found {value!r}; allowed: a number of seeds from 1, or 'all'")


class SurfacesSettings(Settings):
    """The [surfaces] section, which switches on the table `surfaces`.

    Attributes:
        kinds: which slices.
        points: along each axis, an odd number.
        span: the axes reach from -span to span, in units of their lengths (see `Plane`).
        checkpoints: the last, the first and the last, or all.
        seeds: how many of each setting's seeds have surfaces, the first ones, or "all".
    """

    kinds: Annotated[tuple[Kind, ...], Field(strict=False, min_length=1)] = (
        "v1",
        "eigenvectors",
        "pca",
        "random",
    )
    points: Annotated[int, Field(ge=3), AfterValidator(_odd)] = 25
    span: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    checkpoints: Literal["last", "ends", "all"] = "last"
    seeds: Annotated[int | Literal["all"], BeforeValidator(_seeds)] = 1

    @field_validator("kinds")
    @classmethod
    def _distinct(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        twice = [name for name, count in Counter(kinds).items() if count > 1]
        if twice:
            raise ValueError(f"found {twice[0]!r} twice; allowed: each name once")
        return kinds


@dataclass(frozen=True)
class Plane:
    """A slice through one member's parameters; x = 1 is one length of the first axis vector."""

    kind: Kind
    x_axis: Tensor  # [d] float64, of the length that x = 1 stands for
    y_axis: Tensor | None  # [d]; None for a line


@dataclass(frozen=True)
class SurfaceRow:
    """The loss at one point of one plane."""

    i: int
    j: int
    x: float
    y: float
    x_norm: float
    y_norm: float | None
    loss: float
    accuracy: float  # NaN in regression


def along_eigenvectors(
    kind: Kind, vectors: Tensor, values: Tensor, *, loss: float, theta: Tensor
) -> Plane | None:
    """The line of the top eigenvector, or the plane of the top two.

    x = 1 is where the quadratic model has added the loss itself, or a tenth if that is small: far enough to
    see the bowl, and at most the length of theta.

    Args:
        kind: "v1" or "eigenvectors".
        vectors: [k, d] orthonormal rows.
        values: [k] eigenvalues.
        loss: at the checkpoint.
        theta: [d] the parameters.

    Returns:
        None where there are too few finite eigenvectors.
    """
    n = 1 if kind == "v1" else 2
    if len(vectors) < n or not bool(torch.isfinite(vectors[:n]).all()):
        return None
    rise, longest = max(abs(loss), 0.1), float(torch.linalg.vector_norm(theta.double()))
    axes = []
    for vector, value in zip(vectors[:n].double(), values[:n].tolist(), strict=True):
        length = math.sqrt(2 * rise / value) if value > 0 else longest
        axes.append(min(length, longest or 1.0) * vector)
    return Plane(kind, axes[0], axes[1] if n == 2 else None)


def along_trajectory(axes: Tensor, reach: Tensor) -> Plane | None:
    """The plane of a run's first two principal axes.

    Args:
        axes: [2, d] orthonormal rows; NaN where there is none.
        reach: [2] the largest distance of a checkpoint along each, from the one in the centre.
    """
    if not bool(torch.isfinite(axes).all()):
        return None
    lengths = 1.2 * torch.where(reach > 0, reach, 1.0)  # all checkpoints inside, with a margin
    x_axis, y_axis = axes.double() * lengths[:, None]
    return Plane("pca", x_axis, y_axis)


def along_random(theta: Tensor, layout: Layout, seed: int) -> Plane:
    """Two random directions, normalised filter by filter (Li et al., arXiv 1712.09913).

    Each row of a matrix and each kernel of a convolution gets the norm that it has in theta; biases and the
    parameters of norms stay as they are.

    Args:
        theta: [d].
        layout: how d divides into parameters.
        seed: of the directions.
    """
    rows = [_filter_normalised(theta, layout, generator(seed, "surface", i)) for i in range(2)]
    return Plane("random", rows[0], rows[1])


def surface_rows(
    plane: Plane,
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    examples: tuple[Tensor, Tensor],
    *,
    points: int,
    span: float,
) -> list[SurfaceRow]:
    """The loss on the grid of a plane, eval mode.

    Args:
        plane: axes [d].
        stack: the architecture.
        theta: [d] of one member.
        buffers: its buffers by name.
        loss: mean over examples.
        examples: inputs and targets.
        points: along each axis.
        span: of the axes.
    """
    grid = torch.linspace(-span, span, points, dtype=torch.float64)
    if plane.y_axis is None:
        places = [(i, 0, float(x), 0.0) for i, x in enumerate(grid)]
    else:
        places = [(i, j, float(x), float(y)) for i, x in enumerate(grid) for j, y in enumerate(grid)]
    shifts = torch.tensor([place[2:] for place in places], dtype=torch.float64, device=theta.device)
    axes = torch.stack(
        [plane.x_axis, torch.zeros_like(plane.x_axis) if plane.y_axis is None else plane.y_axis]
    )
    x_norm = float(torch.linalg.vector_norm(plane.x_axis))
    y_norm = None if plane.y_axis is None else float(torch.linalg.vector_norm(plane.y_axis))
    losses, accuracies = _evaluate(stack, theta, shifts, axes.to(theta.device), buffers, loss, examples)
    return [
        SurfaceRow(i, j, x, y, x_norm, y_norm, losses[n], accuracies[n])
        for n, (i, j, x, y) in enumerate(places)
    ]


def _evaluate(
    stack: Stack,
    theta: Tensor,
    shifts: Tensor,
    axes: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    examples: tuple[Tensor, Tensor],
) -> tuple[list[float], list[float]]:
    """Losses and accuracies at theta + shifts [P, 2] times axes [2, d], a batch of points at a time."""
    inputs, targets = examples
    size = theta.element_size() * (stack.dim + inputs.numel() // max(1, len(inputs)) * len(inputs))
    at_once = min(POINTS_AT_ONCE, fitting(COPIES * size, theta.device))
    losses: list[float] = []
    accuracies: list[float] = []
    for part in shifts.split(at_once):
        points = (theta.double() + part @ axes).to(theta.dtype)
        copies = {name: tensor.expand(len(part), *tensor.shape) for name, tensor in buffers.items()}
        with torch.no_grad():
            outputs = stack.outputs(points, copies, inputs)
            losses += [float(loss(own, targets)) for own in outputs]
        accuracies += _accuracies(outputs, targets)
    return losses, accuracies


def _accuracies(outputs: Tensor, targets: Tensor) -> list[float]:
    if targets.is_floating_point():
        return [float("nan")] * len(outputs)
    right: list[float] = (outputs.argmax(dim=-1) == targets).double().mean(dim=1).tolist()
    return right


def _filter_normalised(theta: Tensor, layout: Layout, random: torch.Generator) -> Tensor:
    parts = []
    for name, weights in layout.split(theta.double().cpu()).items():
        role = layout.roles[layout.names.index(name)]
        drawn = torch.randn(weights.shape, generator=random, dtype=torch.float64)
        if role == "other":
            parts.append(torch.zeros(weights.numel(), dtype=torch.float64))
            continue
        rows, own = drawn.flatten(1), weights.flatten(1)
        norms = torch.linalg.vector_norm(own, dim=1, keepdim=True)
        parts.append((rows * norms / torch.linalg.vector_norm(rows, dim=1, keepdim=True)).flatten())
    return torch.cat(parts).to(theta.device)
