"""Count the small eigenvalues of a pack's Hessians at one checkpoint: the table `degeneracy`."""

from itertools import chain

import torch

from lossray.measures.cells import Row
from lossray.measures.checkpoint_degeneracy import degeneracy_rows
from lossray.measures.halving import Halving, Part
from lossray.storage.store import Store
from tasks.commit_record import Record, Stopwatch
from tasks.devices import device_name, local_device
from tasks.jobs import DegeneracyJob
from tasks.planned_data import located


def measure_degeneracy(job: DegeneracyJob, device: torch.device | None = None) -> Record:
    """Count, publish the rows, and commit.

    Args:
        job: what to measure.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    halving = Halving(len(job.pack.seeds), job.attempt.halvings)

    def measured(part: Part) -> list[Row]:
        return degeneracy_rows(located(job.context, job.pack, job.step, device, part))

    store.publish("degeneracy", job.key, list(chain(*halving.by_parts(measured))))
    return watch.commit(store, job, reduced=halving.reduced)
