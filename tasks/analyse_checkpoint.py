"""Analyse one checkpoint of one pack: the spectra that [curvature] asks for, and the geometry."""

import torch

from lossray.geometry import vectors
from lossray.measures.checkpoint_measures import CheckpointMeasures, joined_measures, measure_checkpoint
from lossray.measures.halving import Halving, Part
from lossray.storage.store import Store
from tasks.commit_record import Record, Stopwatch
from tasks.devices import device_name, local_device
from tasks.jobs import CurvatureJob
from tasks.planned_data import located


def analyse_checkpoint(job: CurvatureJob, device: torch.device | None = None) -> Record:
    """Analyse, publish the rows and the eigenvectors, and commit.

    Args:
        job: what to analyse.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store = Store(job.context.out)
    watch = Stopwatch(job.attempt, device_name(device))
    halving = Halving(len(job.pack.seeds), job.attempt.halvings)

    def measured(part: Part) -> CheckpointMeasures:
        return measure_checkpoint(located(job.context, job.pack, job.step, device, part))

    measures = joined_measures(halving.by_parts(measured))
    if job.context.study.curvature.vectors:
        content = vectors.dumps(measures.spectra, key=job.key)
        store.write_bytes(store.vectors_path(job.pack.pack_id, job.step), content)
    for table, rows in measures.rows.items():
        store.publish(table, job.key, rows)
    return watch.commit(store, job, reduced=halving.reduced)
