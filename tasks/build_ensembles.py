"""Build and score the ensembles of one method on the runs of a pack."""

from dataclasses import replace

import torch

from lossray.ensembles.bench import BaseRuns
from lossray.measures.cells import Row
from lossray.measures.halving import Halving, Part, rows_of_all, whole
from lossray.measures.pack_ensembles import base_runs, ensemble_rows
from lossray.storage.checkpoints import Checkpoint, read_checkpoint
from lossray.storage.store import Store
from tasks.commit_record import Record, Stopwatch
from tasks.devices import device_name, local_device
from tasks.jobs import EnsembleJob
from tasks.planned_data import dataset_on


def build_ensembles(job: EnsembleJob, device: torch.device | None = None) -> Record:
    """Build, score, publish the rows, and commit.

    Args:
        job: which method, on which runs.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    settings = job.context.study.ensembles
    assert settings is not None
    halving = Halving(len(job.pack.seeds), job.attempt.halvings)

    def built(part: Part) -> dict[str, list[Row]]:
        return ensemble_rows(part.of(job.pack), job.method, runs_of_job(job, device, part), settings)

    for table, rows in rows_of_all(halving.by_parts(built)).items():
        store.publish(table, job.key, rows)
    return watch.commit(store, job, reduced=halving.reduced)


def runs_of_job(job: EnsembleJob, device: torch.device, part: Part | None = None) -> BaseRuns:
    """The base runs of a job, or a part of them, whose checkpoints are read as a method asks for them."""
    part = part or whole(job.pack)
    store = Store(job.context.out)

    def checkpoint(step: int) -> Checkpoint:
        newest = max(kept for kept in job.steps if kept <= step)
        return read_checkpoint(store, job.pack.pack_id, newest, device).of(part.members)

    runs = base_runs(job.context.study, part.of(job.pack), dataset_on(job.context, device), checkpoint)
    return replace(runs, stack=runs.stack.limited(part.limits))
