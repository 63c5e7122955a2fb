"""Where the runs of a pack went: the tables `trajectory` and `separations`."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lossray.geometry.principal_axes import AXES, TrajectoryPoint, gram_of, separation, trajectory_points
from lossray.measures.cells import Row, finite
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack


@dataclass(frozen=True)
class Course:
    """The runs of a pack at every checkpoint.

    Attributes:
        steps: of the T checkpoints.
        points: at each of them the parameters [R, d], as stored.
        alive: [R, T] bool, who had not diverged by then.
    """

    steps: tuple[int, ...]
    points: tuple[Tensor, ...]
    alive: Tensor

    def of(self, r: int) -> list[Tensor]:
        """The parameters [d] of member r at every checkpoint that it was alive at."""
        return [theta[r] for theta, lives in zip(self.points, self.alive[r].tolist(), strict=True) if lives]


def course_of(checkpoints: Iterator[Checkpoint]) -> Course:
    """The course of a pack through its checkpoints, of which no more than the parameters are kept."""
    steps, points, alive = [], [], []
    for checkpoint in checkpoints:
        steps.append(checkpoint.step)
        points.append(_theta(checkpoint))
        alive.append(checkpoint.alive)
    return Course(tuple(steps), tuple(points), torch.stack(alive, dim=1))


def trajectory_rows(pack: Pack, course: Course) -> list[Row]:
    """Rows of `trajectory`: the coordinates of every run on its principal axes."""
    points = trajectory_points(course.steps, gram_of(list(course.points)), course.alive)
    dim = course.points[0].shape[1]
    return [_trajectory_row(pack, point, dim) for point in points]


def separation_rows(
    pack: Pack, step: int, runs: Mapping[str, Tensor], first: Mapping[str, Tensor]
) -> list[Row]:
    """Rows of `separations` at one step, of every pair of runs whose second is of this pack.

    Args:
        pack: the runs.
        step: of the checkpoint.
        runs: parameters [d] by run, those of earlier packs first; NaN once it has diverged.
        first: the same at step 0.
    """
    return [
        _separation_row(run_a, run_b, step, runs, first)
        for run_a, run_b in itertools.combinations(runs, 2)
        if run_b in pack.run_ids
    ]


def runs_at(checkpoints: Sequence[tuple[Pack, Checkpoint]]) -> dict[str, Tensor]:
    """Parameters [d] of every run of some packs at one step, in their order; NaN once it has diverged."""
    runs: dict[str, Tensor] = {}
    for pack, checkpoint in checkpoints:
        theta = _theta(checkpoint).masked_fill(~checkpoint.alive[:, None], float("nan"))
        runs |= zip(pack.run_ids, theta, strict=True)
    return runs


def _theta(checkpoint: Checkpoint) -> Tensor:
    """Parameters [R, d]."""
    return torch.cat([tensor.flatten(1) for tensor in checkpoint.parameters.values()], dim=1)


def _separation_row(
    run_a: str, run_b: str, step: int, runs: Mapping[str, Tensor], first: Mapping[str, Tensor]
) -> Row:
    apart = separation(runs[run_a], runs[run_b], first[run_a], first[run_b])
    numbers = {name: finite(value) for name, value in asdict(apart).items()}
    return {"run_a": run_a, "run_b": run_b, "step": step, "dim": len(runs[run_a]), **numbers}


def _trajectory_row(pack: Pack, point: TrajectoryPoint, dim: int) -> Row:
    row: Row = {"run_id": pack.run_ids[point.member], "step": point.step, "dim": dim}
    for a in range(AXES):
        row[f"pc{a + 1}"] = finite(point.coordinates[a])
        row[f"explained{a + 1}"] = finite(point.explained[a])
        row[f"random_walk{a + 1}"] = finite(point.random_walk[a])
    return row
