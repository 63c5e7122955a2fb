"""Where a run went: principal axes of its checkpoints, beside a random walk's; distances between runs.

The first axes of any random walk in high dimension explain most of its variance (Antognini & Sohl-Dickstein,
arXiv 1806.08805; theory 2.12): a picture of a trajectory in their plane is evidence only against that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AXES = 3
NEGLIGIBLE = 1e-12  # share of the variance below which an axis is rounding
NEGLIGIBLE_SIZE = 1e-6  # of a coordinate, where those of all checkpoints together have length 1


@dataclass(frozen=True)
class TrajectoryPoint:
    """One checkpoint of one member on the principal axes of its checkpoints; NaN for a missing axis.

    Attributes:
        member: index of the member in the pack.
        step: of the checkpoint.
        coordinates: on the three axes.
        explained: shares of the variance along them.
        random_walk: those of a random walk with the same checkpoints.
    """

    member: int
    step: int
    coordinates: tuple[float, ...]
    explained: tuple[float, ...]
    random_walk: tuple[float, ...]


@dataclass(frozen=True)
class Axes:
    """Principal axes of the checkpoints [T] of one run.

    Attributes:
        coordinates: [T, 3] float64, NaN where there is no such axis.
        explained: [3] float64, shares of the variance.
        weights: [T, 3] float64; axis a is the sum over t of weights[t, a] (theta_t - mean).
    """

    coordinates: NDArray[np.float64]
    explained: NDArray[np.float64]
    weights: NDArray[np.float64]


def principal_axes(gram: NDArray[np.float64]) -> Axes:
    """The axes from inner products, which is all that they depend on.

    The first checkpoint has no positive coordinate (where it lies at zero, the first that does not): a run
    starts on the left. Rounding cannot turn this sign on a random walk, whose ends may tie.

    Args:
        gram: inner products of the checkpoints (from any origin), [T, T].
    """
    centred = _centred(gram)
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values[::-1][:AXES].clip(min=0), vectors[:, ::-1][:, :AXES]
    total = float(np.trace(centred))
    n_points = len(gram)
    explained = np.full(AXES, np.nan)
    coordinates, weights = np.full((n_points, AXES), np.nan), np.full((n_points, AXES), np.nan)
    for a, (value, vector) in enumerate(zip(values, vectors.T, strict=True)):
        if total <= 0 or value <= NEGLIGIBLE * total:
            break
        sign = -float(np.sign(vector[np.abs(vector) > NEGLIGIBLE_SIZE][0]))
        explained[a] = value / total
        coordinates[:, a] = sign * vector * np.sqrt(value)
        weights[:, a] = sign * vector / np.sqrt(value)
    return Axes(coordinates, explained, weights)


def random_walk_shares(steps: Sequence[int]) -> NDArray[np.float64]:
    """Shares [3] of the variance that the axes of a random walk in high dimension explain.

    Its inner products are min(t_i, t_j) up to a factor; for many uniform steps share k is 6 / (pi k)^2.

    Args:
        steps: of the checkpoints; from the first one on.
    """
    times = np.asarray(steps, dtype=np.float64)
    times = times - times[0]
    return principal_axes(np.minimum(times[:, None], times[None, :])).explained


def trajectory_points(steps: Sequence[int], gram: Tensor, alive: Tensor) -> list[TrajectoryPoint]:
    """One point per member and checkpoint; those from a divergence on are left out of the axes, and NaN.

    Args:
        steps: of the checkpoints [T].
        gram: inner products of every member's checkpoints, [R, T, T] float64.
        alive: [R, T] bool.
    """
    points = []
    missing = (math.nan,) * AXES
    for r in range(len(gram)):
        living = alive[r].nonzero().flatten().tolist()
        if living:
            axes = principal_axes(gram[r][living][:, living].cpu().numpy())
            explained = tuple(axes.explained.tolist())
            walk = tuple(random_walk_shares([steps[t] for t in living]).tolist())
        for t, step in enumerate(steps):
            if t in living:
                coordinates = tuple(axes.coordinates[living.index(t)].tolist())
                points.append(TrajectoryPoint(r, step, coordinates, explained, walk))
            else:
                points.append(TrajectoryPoint(r, step, missing, missing, missing))
    return points


def gram_of(points: Sequence[Tensor]) -> Tensor:
    """Inner products [R, T, T], float64, of points [R, d] given one after the other, from the first one on.

    Only one member's points are in float64 at a time.
    """
    return torch.stack(
        [_gram(torch.stack(member_points).double()) for member_points in zip(*points, strict=True)]
    )


def _gram(points: Tensor) -> Tensor:
    moved = points - points[0]  # a short way in a large space: its own digits, not theirs
    return moved @ moved.T


@dataclass(frozen=True)
class Separation:
    """How far two runs are from each other at one step.

    Attributes:
        distance: |theta_a - theta_b|.
        cosine: of the angle between theta_a and theta_b.
        displacement_cosine: of that between their displacements; NaN at the first checkpoint.
    """

    distance: float
    cosine: float
    displacement_cosine: float


def separation(a: Tensor, b: Tensor, a_first: Tensor, b_first: Tensor) -> Separation:
    """Compare the parameters [d] of two runs, and their displacements since their first checkpoints."""
    a, b, a_first, b_first = (vector.double() for vector in (a, b, a_first, b_first))
    return Separation(
        float(torch.linalg.vector_norm(a - b)), _cosine(a, b), _cosine(a - a_first, b - b_first)
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float((a @ b).clamp(-size, size)) / size if size > 0 else math.nan


def _centred(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    rows = gram - gram.mean(axis=0, keepdims=True)
    centred: NDArray[np.float64] = rows - rows.mean(axis=1, keepdims=True)
    return centred
