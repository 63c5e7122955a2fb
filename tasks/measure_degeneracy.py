"""Count the small eigenvalues of a pack's Hessians at one checkpoint: the table `degeneracy`."""

import ray
import torch

from lossray.measures.checkpoint_degeneracy import degeneracy_rows
from lossray.storage.store import Store
from tasks.commit_record import Stopwatch
from tasks.jobs import DegeneracyJob
from tasks.planned_data import located
from tasks.worker import device_name, local_device, prepare_worker


def measure_degeneracy(job: DegeneracyJob, device: torch.device | None = None) -> None:
    """Count, publish the rows, and commit.

    Args:
        job: what to measure.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    rows = degeneracy_rows(located(job.context, job.pack, job.step, device))
    store.publish("degeneracy", job.key, rows)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def degeneracy(job: DegeneracyJob, cpus: float) -> None:
    """`measure_degeneracy` as a Ray task; what it finds is in the store."""
    measure_degeneracy(job, prepare_worker(cpus))
