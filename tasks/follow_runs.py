"""Where the runs of a pack went: the tables `trajectory` and `separations`."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import ray
import torch
from torch import Tensor

from lossray.geometry.principal_axes import AXES, TrajectoryPoint, gram_of, separation, trajectory_points
from lossray.storage.checkpoints import Checkpoint, read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from tasks.checkpoint_spectra import Row, finite
from tasks.commit_record import Attempt, Stopwatch
from tasks.context import Context, device_name, local_device, prepare_worker


@dataclass(frozen=True)
class TrajectoryJob:
    """Find the principal axes of the runs of a pack."""

    context: Context
    pack: Pack
    steps: tuple[int, ...]  # of all its checkpoints
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "trajectory"

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return self.steps[-1]


@dataclass(frozen=True)
class SeparationsJob:
    """Compare the runs of a pack with each other, and with those of earlier packs of their setting.

    So a pack that is added to a store adds rows and changes none.
    """

    context: Context
    pack: Pack
    earlier: tuple[Pack, ...]
    steps: tuple[int, ...]  # of all checkpoints
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "separations"

    @property
    def step(self) -> int:
        """Of the last checkpoint."""
        return self.steps[-1]


def follow_trajectory(job: TrajectoryJob, device: torch.device | None = None) -> None:
    """Find the axes, publish the rows, and commit.

    Args:
        job: which pack.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    points, alive = read_course(store, job.pack, job.steps, device)
    found = trajectory_points(job.steps, gram_of(points), alive)
    dim = points[0].shape[1]
    store.publish("trajectory", job.key, [_trajectory_row(job, one, dim) for one in found])
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


def compare_runs(job: SeparationsJob, device: torch.device | None = None) -> None:
    """Compare, publish the rows, and commit.

    Args:
        job: which packs.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    packs = (*job.earlier, job.pack)
    first = _runs_at(store, packs, job.steps[0], device)
    rows: list[Row] = []
    for step in job.steps:
        runs = _runs_at(store, packs, step, device)
        for run_a, run_b in itertools.combinations(runs, 2):
            if run_b in job.pack.run_ids:
                rows.append(_separation_row(run_a, run_b, step, runs, first))
    store.publish("separations", job.key, rows)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def trajectory(job: TrajectoryJob, cpus: float) -> None:
    """`follow_trajectory` as a Ray task; what it finds is in the store."""
    follow_trajectory(job, prepare_worker(cpus))


@ray.remote(num_cpus=1, max_retries=0)
def separations(job: SeparationsJob, cpus: float) -> None:
    """`compare_runs` as a Ray task; what it finds is in the store."""
    compare_runs(job, prepare_worker(cpus))


def read_course(
    store: Store, pack: Pack, steps: Sequence[int], device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """The parameters of a pack at every step, [R, d] each as stored, and who was alive then, [R, T] bool."""
    points, alive = [], []
    for step in steps:  # of a checkpoint only the parameters are kept
        checkpoint = read_checkpoint(store, pack.pack_id, step, device)
        points.append(_theta(checkpoint))
        alive.append(checkpoint.alive)
    return points, torch.stack(alive, dim=1)


def _theta(checkpoint: Checkpoint) -> Tensor:
    """Parameters [R, d]."""
    return torch.cat([tensor.flatten(1) for tensor in checkpoint.parameters.values()], dim=1)


def _runs_at(store: Store, packs: Sequence[Pack], step: int, device: torch.device) -> dict[str, Tensor]:
    """Parameters [d] of every run of the packs at a step, in the packs' order; NaN once it has diverged."""
    runs: dict[str, Tensor] = {}
    for pack in packs:
        (theta,), alive = read_course(store, pack, [step], device)
        runs |= zip(pack.run_ids, theta.masked_fill(~alive, float("nan")), strict=True)
    return runs


def _separation_row(
    run_a: str, run_b: str, step: int, runs: Mapping[str, Tensor], first: Mapping[str, Tensor]
) -> Row:
    found = separation(runs[run_a], runs[run_b], first[run_a], first[run_b])
    numbers = {name: finite(value) for name, value in asdict(found).items()}
    return {"run_a": run_a, "run_b": run_b, "step": step, "dim": len(runs[run_a]), **numbers}


def _trajectory_row(job: TrajectoryJob, point: TrajectoryPoint, dim: int) -> Row:
    row: Row = {"run_id": job.pack.run_ids[point.member], "step": point.step, "dim": dim}
    for a in range(AXES):
        row[f"pc{a + 1}"] = finite(point.coordinates[a])
        row[f"explained{a + 1}"] = finite(point.explained[a])
        row[f"random_walk{a + 1}"] = finite(point.random_walk[a])
    return row
