"""Slices of the loss: along eigenvectors or other directions, in the plane of a trajectory or of points.

The points of a grid are members of one stack, evaluated in batches.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lossray.geometry.principal_axes import gram_of, principal_axes
from lossray.geometry.settings import SliceKind
from lossray.networks.layout import Layout
from lossray.networks.losses import Loss
from lossray.networks.stack import Stack
from lossray.seeds import generator
from lossray.training.datasets import Split
from lossray.training.evaluation import evaluate_split

LINES: tuple[SliceKind, ...] = ("v1",)  # the others are planes
POINTS_AT_ONCE = 64  # members of a stack
PARAMETERS_AT_ONCE = 2**24  # of all its members: 128 MB in float64
SMALL_LOSS = 0.1  # eigenvector axes reach at least this far up
MARGIN = 1.2  # of a trajectory's plane around its checkpoints
PARALLEL = 1e-6  # sine of an angle that counts as none


@dataclass(frozen=True)
class Plane:
    """A slice through one member's parameters; x = 1 is one length of the first axis vector.

    Attributes:
        kind: what its axes are.
        x_axis: [d] float64, of the length that x = 1 stands for.
        y_axis: [d] float64, likewise; None for a line.
    """

    kind: SliceKind
    x_axis: Tensor
    y_axis: Tensor | None


@dataclass(frozen=True)
class SurfaceRow:
    """The loss at one point of one plane.

    Attributes:
        i: index of the point along the first axis.
        j: index along the second.
        x: coordinate along the first axis.
        y: coordinate along the second; 0 for a line.
        x_norm: length that x = 1 stands for.
        y_norm: length that y = 1 stands for; None for a line.
        loss: mean over the examples.
        accuracy: NaN in regression.
    """

    i: int
    j: int
    x: float
    y: float
    x_norm: float
    y_norm: float | None
    loss: float
    accuracy: float


def along_eigenvectors(
    kind: SliceKind, vectors: Tensor, values: Tensor, *, loss: float, theta: Tensor
) -> Plane | None:
    """The line of the top eigenvector, or the plane of the top two.

    x = 1 is where the quadratic model has added the loss itself, or 0.1 if that is less: far enough to see
    the bowl, and no farther than theta is long.

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
    lengths = [reach(curvature, loss=loss, theta=theta) for curvature in values[:n].tolist()]
    axes = vectors[:n].double() * vectors.new_tensor(lengths, dtype=torch.float64)[:, None]
    return Plane(kind, axes[0], axes[1] if n == 2 else None)


def reach(curvature: float, *, loss: float, theta: Tensor) -> float:
    """How far along a unit vector a slice goes: see `along_eigenvectors`.

    Args:
        curvature: along it.
        loss: at theta.
        theta: [d] the parameters.
    """
    rise = max(abs(loss), SMALL_LOSS)
    longest = float(torch.linalg.vector_norm(theta.double())) or 1.0
    return min(math.sqrt(2 * rise / curvature), longest) if curvature > 0 else longest


def across(direction: Tensor, vectors: Tensor) -> Tensor | None:
    """What the first of some vectors that is not parallel to a direction has orthogonal to it, of length 1.

    Args:
        direction: [d], not zero.
        vectors: [k, d] unit vectors.
    """
    unit = direction.double() / torch.linalg.vector_norm(direction.double())
    for vector in vectors.double():
        rest: Tensor = vector - (vector @ unit) * unit
        rest = rest - (rest @ unit) * unit  # once leaves what rounding has brought back
        length = float(torch.linalg.vector_norm(rest))
        if length > PARALLEL:
            return rest / length
    return None


def through_points(origin: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """The axes [d] of the plane of three points [d]: from the origin to a, and what b has orthogonal to it.

    The points lie at (0, 0), (1, 0) and (x, 1). None where they lie on a line.
    """
    x_axis, other = a.double() - origin.double(), b.double() - origin.double()
    length = float(torch.linalg.vector_norm(other))
    if not (length > 0 and bool((x_axis != 0).any())):
        return None
    rest = across(x_axis, other[None] / length)
    return None if rest is None else (x_axis, (other @ rest) * rest)


def along_trajectory(theta: Tensor, points: Sequence[Tensor]) -> Plane | None:
    """The plane of a run's first two principal axes, wide enough for all its checkpoints.

    A checkpoint's place in it is the difference of its coordinates in `trajectory` and those of theta.

    Args:
        theta: [d] the checkpoint in the centre.
        points: [d] each, all the run's checkpoints in order.

    Returns:
        None where they span no plane.
    """
    rows = torch.stack([point.double() for point in points])
    weights = principal_axes(gram_of([row[None] for row in rows])[0].cpu().numpy()).weights[:, :2]
    if not np.isfinite(weights).all():
        return None
    axes = torch.from_numpy(weights).to(rows).T @ (rows - rows.mean(dim=0))  # [2, d] orthonormal
    reach = ((rows - theta.double()) @ axes.T).abs().amax(dim=0)
    x_axis, y_axis = MARGIN * reach[:, None] * axes
    return Plane("pca", x_axis, y_axis)


def along_random(theta: Tensor, layout: Layout, seed: int) -> Plane:
    """Two random directions, normalised filter by filter (Li et al., arXiv 1712.09913).

    Each row of a matrix (a unit's incoming weights) and each kernel of a convolution (an output channel's)
    gets the norm that it has in theta. Biases, parameters of norms and other vectors stay as they are.

    Args:
        theta: [d].
        layout: how d divides into parameters.
        seed: of the directions.
    """
    axes = [_filter_normalised(theta, layout, generator(seed, "surface", i)) for i in range(2)]
    return Plane("random", axes[0], axes[1])


def surface_rows(
    plane: Plane,
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    examples: Split,
    *,
    points: int,
    span: float,
) -> list[SurfaceRow]:
    """The loss on the grid of a plane, in eval mode; the point in its middle is theta itself.

    Args:
        plane: axes [d].
        stack: the architecture.
        theta: [d] of one member.
        buffers: its buffers by name.
        loss: mean over examples.
        examples: inputs and targets.
        points: along each axis, an odd number.
        span: the axes reach from -span to span.
    """
    ticks = [span * (2 * i - (points - 1)) / (points - 1) for i in range(points)]  # 0 exactly in the middle
    line = plane.y_axis is None
    y_axis = torch.zeros_like(plane.x_axis) if plane.y_axis is None else plane.y_axis
    columns = [(0, 0.0)] if line else list(enumerate(ticks))
    grid = [(i, j, x, y) for i, x in enumerate(ticks) for j, y in columns]
    shifts = torch.tensor([[x, y] for _, _, x, y in grid], dtype=torch.float64, device=theta.device)
    axes = torch.stack([plane.x_axis, y_axis])
    losses, accuracies = _evaluate(stack, theta, shifts, axes, buffers, loss, examples)
    x_norm, y_norm = torch.linalg.vector_norm(axes, dim=1).tolist()
    return [
        SurfaceRow(*point, x_norm, None if line else y_norm, height, accuracy)
        for point, height, accuracy in zip(grid, losses, accuracies, strict=True)
    ]


def _evaluate(
    stack: Stack,
    theta: Tensor,
    shifts: Tensor,
    axes: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    examples: Split,
) -> tuple[list[float], list[float]]:
    """Losses and accuracies at theta + shifts [P, 2] times axes [2, d], a batch of points at a time."""
    at_once = max(1, min(POINTS_AT_ONCE, PARAMETERS_AT_ONCE // stack.dim))
    losses: list[float] = []
    accuracies: list[float] = []
    for part in shifts.split(at_once):
        points = (theta.double() + part @ axes).to(theta.dtype)
        copies = {name: tensor.expand(len(part), *tensor.shape) for name, tensor in buffers.items()}
        heights, right = evaluate_split(stack, points, copies, loss, examples)
        losses += heights.tolist()
        accuracies += right.masked_fill(~torch.isfinite(heights), torch.nan).tolist()
    return losses, accuracies


def _filter_normalised(theta: Tensor, layout: Layout, random: torch.Generator) -> Tensor:
    """A direction [d], float64; drawn on the CPU, so that it is the same on every device."""
    parts = []
    pieces = layout.split(theta.double().cpu()).values()
    for weights, role in zip(pieces, layout.roles, strict=True):
        drawn = torch.randn(weights.shape, generator=random, device="cpu", dtype=torch.float64)
        if role == "other":
            parts.append(torch.zeros(weights.numel(), dtype=torch.float64, device="cpu"))
            continue
        filters = drawn.flatten(1)
        lengths = torch.linalg.vector_norm(filters, dim=1, keepdim=True)
        norms = torch.linalg.vector_norm(weights.flatten(1), dim=1, keepdim=True)
        parts.append((filters * norms / lengths).flatten())
    return torch.cat(parts).to(theta.device)
