"""Join the last checkpoints of a setting's runs by paths: the tables `paths` and `barriers`."""

from dataclasses import replace

import torch

from lossray.limits import WHOLE, Limits
from lossray.measures.cells import Row
from lossray.measures.halving import Halving, Part, rows_of_all
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
    halving = Halving(len(job.pairs), job.attempt.halvings, noun="pairs")

    def joined(part: Part) -> dict[str, list[Row]]:
        pairs = tuple(job.pairs[i] for i in part.members)
        paths, barriers = path_rows(path_site(replace(job, pairs=pairs), device, part.limits))
        return {"paths": paths, "barriers": barriers}

    for table, rows in rows_of_all(halving.by_parts(joined)).items():
        store.publish(table, job.key, rows)
    return watch.commit(store, job, reduced=halving.reduced)


def path_site(job: ConnectivityJob, device: torch.device, limits: Limits = WHOLE) -> PathSite:
    """What a job joins: its runs, and those of earlier packs in its pairs, at their last checkpoints."""
    store, study = Store(job.context.out), job.context.study
    dataset = dataset_on(job.context, device)
    dtype = getattr(torch, study.training.dtype)
    stack = stack_of(job.pack, dataset, dtype=dtype, device=device)[0].limited(limits)
    named = {run for runs in job.pairs for run in runs}
    last = {
        pack.pack_id: (pack, read_checkpoint(store, pack.pack_id, job.step, device))
        for pack in (*job.earlier, job.pack)
        if not named.isdisjoint(pack.run_ids)
    }
    return PathSite(study, job.pack, job.pairs, job.aligned, stack, dataset, last)
