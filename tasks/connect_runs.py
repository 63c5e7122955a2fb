"""Join the last checkpoints of a setting's runs by paths: the tables `paths` and `barriers`."""

import torch

from lossray.measures.joined_paths import path_rows
from lossray.measures.pack_point import stack_of
from lossray.measures.path_ends import PathSite
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from tasks.commit_record import Record, Stopwatch
from tasks.devices import device_name, local_device
from tasks.jobs import ConnectivityJob
from tasks.planned_data import dataset_on


def connect_runs(job: ConnectivityJob, device: torch.device | None = None) -> Record:
    """Align, train, evaluate, publish the rows, and commit.

    Args:
        job: which runs.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    paths, barriers = path_rows(path_site(job, device))
    store.publish("paths", job.key, paths)
    store.publish("barriers", job.key, barriers)
    return watch.commit(store, job)


def path_site(job: ConnectivityJob, device: torch.device) -> PathSite:
    """What a job joins: its runs, and those of earlier packs in its pairs, at their last checkpoints."""
    store, study = Store(job.context.out), job.context.study
    dataset = dataset_on(job.context, device)
    dtype = getattr(torch, study.training.dtype)
    stack, _, _ = stack_of(job.pack, dataset, dtype=dtype, device=device)
    named = {run for runs in job.pairs for run in runs}
    last = {
        pack.pack_id: (pack, read_checkpoint(store, pack.pack_id, job.step, device))
        for pack in (*job.earlier, job.pack)
        if not named.isdisjoint(pack.run_ids)
    }
    return PathSite(study, job.pack, job.pairs, job.aligned, stack, dataset, last)
