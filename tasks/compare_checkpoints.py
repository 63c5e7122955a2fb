"""Compare two neighbouring checkpoints of one pack: how its eigenspaces turn, and how far it moved."""

import torch

from lossray.geometry.vectors import Name
from lossray.measures.neighbours import (
    displacement_angles,
    displacement_from,
    displacement_rows,
    hessian_rows,
    overlaps_between,
)
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import pair_tables
from tasks.commit_record import Record, Stopwatch
from tasks.devices import device_name, local_device
from tasks.jobs import CurvatureJob, PairJob
from tasks.planned_data import dataset_of, located, stored_spectra


def compare_checkpoints(job: PairJob, device: torch.device | None = None) -> Record:
    """Compare, publish the rows, and commit.

    Args:
        job: what to compare.
        device: where; None takes this machine's GPU if it has one.

    Raises:
        StoreError: a checkpoint, or the eigenvectors of one, are missing or damaged.
    """
    device = device or local_device()
    store, study = Store(job.context.out), job.context.study
    watch = Stopwatch(job.attempt, device_name(device))
    n_outputs = dataset_of(job.context).n_outputs
    tables = pair_tables(study)
    earlier, later = job.earlier, job.later

    def spectra(side: CurvatureJob) -> dict[Name, PackedEigenPairs]:
        return stored_spectra(store, side.pack, side.step, key=side.key, device=device)

    before = spectra(earlier) if "overlaps" in tables else {}
    if "overlaps" in tables:
        steps, sides = (earlier.step, later.step), (before, spectra(later))
        store.publish("overlaps", job.key, overlaps_between(study, job.pack, steps, sides, n_outputs))
    if "directions" in tables:
        point = located(job.context, earlier.pack, earlier.step, device)
        moved = displacement_from(point, read_checkpoint(store, later.pack.pack_id, later.step, device))
        analysed = store.read_table(store.part_path("curvature", earlier.key), "curvature").to_pylist()
        for table, rows in displacement_rows(moved, hessian_rows(analysed)).items():
            store.publish(table, job.key, rows)
        if "angles" in tables:
            store.publish("angles", job.key, displacement_angles(moved, before))
    return watch.commit(store, job)
