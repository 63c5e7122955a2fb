"""Follow the runs of a pack: the tables `trajectory` and `separations`."""

from itertools import chain

import torch

from lossray.measures.cells import Row
from lossray.measures.course import course_of, runs_at, separation_rows, trajectory_rows
from lossray.measures.halving import Halving, Part
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from tasks.commit_record import Record, Stopwatch
from tasks.devices import device_name, local_device
from tasks.jobs import SeparationsJob, TrajectoryJob


def follow_trajectory(job: TrajectoryJob, device: torch.device | None = None) -> Record:
    """Find the principal axes, publish the rows, and commit.

    Args:
        job: which pack.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    halving = Halving(len(job.pack.seeds), job.attempt.halvings)

    def followed(part: Part) -> list[Row]:
        checkpoints = (read_checkpoint(store, job.pack.pack_id, step, device) for step in job.steps)
        course = course_of(checkpoint.of(part.members) for checkpoint in checkpoints)
        return trajectory_rows(part.of(job.pack), course)

    store.publish("trajectory", job.key, list(chain(*halving.by_parts(followed))))
    return watch.commit(store, job, reduced=halving.reduced)


def compare_runs(job: SeparationsJob, device: torch.device | None = None) -> Record:
    """Compare, publish the rows, and commit.

    Args:
        job: which packs.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    packs = (*job.earlier, job.pack)

    def runs(step: int) -> dict[str, torch.Tensor]:
        return runs_at([(pack, read_checkpoint(store, pack.pack_id, step, device)) for pack in packs])

    first = runs(job.steps[0])
    rows: list[Row] = []
    for step in job.steps:
        rows += separation_rows(job.pack, step, runs(step), first)
    store.publish("separations", job.key, rows)
    return watch.commit(store, job)
