"""Analyse one checkpoint of one pack: the spectra that [curvature] asks for, and the geometry."""

import ray
import torch

from lossray.geometry import vectors
from lossray.measures.checkpoint_measures import measure_checkpoint
from lossray.storage.store import Store
from tasks.commit_record import Stopwatch
from tasks.jobs import Context, CurvatureJob
from tasks.planned_data import dataset_of, located
from tasks.worker import device_name, local_device, prepare_worker


def analyse_checkpoint(job: CurvatureJob, device: torch.device | None = None) -> None:
    """Analyse, publish the rows and the eigenvectors, and commit.

    Args:
        job: what to analyse.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store = Store(job.context.out)
    watch = Stopwatch(job.attempt, device_name(device))
    measures = measure_checkpoint(located(job.context, job.pack, job.step, device))
    if job.context.study.curvature.vectors:
        content = vectors.dumps(measures.spectra, key=job.key)
        store.write_bytes(store.vectors_path(job.pack.pack_id, job.step), content)
    for table, rows in measures.rows.items():
        store.publish(table, job.key, rows)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def curvature(job: CurvatureJob, cpus: float) -> None:
    """`analyse_checkpoint` as a Ray task; what it finds is in the store."""
    analyse_checkpoint(job, prepare_worker(cpus))


@ray.remote(num_cpus=1, max_retries=0)
def warm_up(context: Context) -> None:
    """Make a worker ready: import what an analysis needs, and read the data."""
    prepare_worker(1)
    dataset_of(context)
