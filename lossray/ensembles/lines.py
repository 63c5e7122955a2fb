"""Barriers of the training loss on straight lines between the points of a method."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from lossray.connectivity.jumps import jumps
from lossray.ensembles.bench import BaseRuns, PackedWeights
from lossray.networks.batch_norm import has_statistics, refresh_statistics
from lossray.networks.stack import Members
from lossray.training.datasets import Split
from lossray.training.evaluation import evaluate_split

PLACES = (0.25, 0.5, 0.75)  # of a line, where its barrier is looked for


def line_barrier(base_runs: BaseRuns, a: PackedWeights, b: PackedWeights, examples: Split) -> Tensor:
    """Largest rise of the loss above the chord of its ends, at PLACES and at least 0; [R] float64.

    Batch norm has statistics of the training inputs at the ends too. NaN where other buffers differ between
    the ends, and the loss would jump.
    """
    ends = [_losses(base_runs, point.theta, point, examples) for point in (a, b)]
    return _rise(base_runs, (a, b), (ends[0], ends[1]), examples)


def pair_barriers(base_runs: BaseRuns, points: Sequence[PackedWeights], examples: Split) -> Tensor:
    """`line_barrier` of every two points, in the order of `itertools.combinations`, [R, pairs]."""
    ends = [_losses(base_runs, point.theta, point, examples) for point in points]
    rises = [
        _rise(base_runs, (points[i], points[j]), (ends[i], ends[j]), examples)
        for i, j in itertools.combinations(range(len(points)), 2)
    ]
    return torch.stack(rises, dim=1)


def _rise(
    base_runs: BaseRuns,
    points: tuple[PackedWeights, PackedWeights],
    ends: tuple[Tensor, Tensor],
    examples: Split,
) -> Tensor:
    (a, b), (first, last) = points, ends
    rises = []
    for t in PLACES:
        loss = _losses(base_runs, torch.lerp(a.theta, b.theta, t), a, examples)
        rises.append(loss - ((1 - t) * first + t * last))
    return (
        torch.stack(rises).amax(dim=0).clamp(min=0).masked_fill(_jumps(base_runs, a, b, examples), torch.nan)
    )


def _jumps(base_runs: BaseRuns, a: PackedWeights, b: PackedWeights, examples: Split) -> Tensor:
    """Whether the loss would jump at b, [R]."""

    def losses(theta: Tensor, buffers: Members) -> Tensor:
        return evaluate_split(base_runs.stack, theta, buffers, base_runs.loss, examples)[0]

    return jumps(base_runs.stack, b.theta, a.buffers, b.buffers, base_runs.dataset.train.inputs, losses)


def _losses(base_runs: BaseRuns, theta: Tensor, point: PackedWeights, examples: Split) -> Tensor:
    """Losses [R] with the buffers of a point, batch norm's refreshed on the training inputs."""
    buffers = point.buffers
    if has_statistics(base_runs.stack.template):
        buffers = refresh_statistics(base_runs.stack, theta, buffers, base_runs.dataset.train.inputs)
    losses, _ = evaluate_split(base_runs.stack, theta, buffers, base_runs.loss, examples)
    return losses
