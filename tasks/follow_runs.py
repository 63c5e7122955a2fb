"""Follow the runs of a pack: the tables `trajectory` and `separations`."""

import torch

from lossray.measures.cells import Row
from lossray.measures.course import course_of, runs_at, separation_rows, trajectory_rows
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
    course = course_of(read_checkpoint(store, job.pack.pack_id, step, device) for step in job.steps)
    store.publish("trajectory", job.key, trajectory_rows(job.pack, course))
    return watch.commit(store, job)


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
