"""Compare two neighbouring checkpoints of one pack: how its eigenspaces turn, and how far it moved."""

import torch

from lossray.geometry.vectors import Name
from lossray.measures.cells import Row
from lossray.measures.halving import Halving, Part, rows_of_all
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
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    halving = Halving(len(job.pack.seeds), job.attempt.halvings)
    compared = halving.by_parts(lambda part: _compared(job, store, device, part))
    for table, rows in rows_of_all(compared).items():
        store.publish(table, job.key, rows)
    return watch.commit(store, job, reduced=halving.reduced)


def _compared(job: PairJob, store: Store, device: torch.device, part: Part) -> dict[str, list[Row]]:
    """The rows by table of a part of the pack."""
    study, earlier, later = job.context.study, job.earlier, job.later
    tables = pair_tables(study)
    rows: dict[str, list[Row]] = {}

    def spectra(side: CurvatureJob) -> dict[Name, PackedEigenPairs]:
        return stored_spectra(store, side.pack, side.step, part, key=side.key, device=device)

    before = spectra(earlier) if "overlaps" in tables else {}
    if "overlaps" in tables:
        steps, sides = (earlier.step, later.step), (before, spectra(later))
        n_outputs = dataset_of(job.context).n_outputs
        rows["overlaps"] = overlaps_between(study, part.of(job.pack), steps, sides, n_outputs)
    if "directions" in tables:
        point = located(job.context, earlier.pack, earlier.step, device, part)
        reached = read_checkpoint(store, later.pack.pack_id, later.step, device).of(part.members)
        moved = displacement_from(point, reached)
        analysed = store.read_table(store.part_path("curvature", earlier.key), "curvature").to_pylist()
        rows |= displacement_rows(moved, hessian_rows(analysed))
        if "angles" in tables:
            rows["angles"] = displacement_angles(moved, before)
    return rows
