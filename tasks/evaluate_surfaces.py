"""Evaluate the slices of the loss through one checkpoint of a pack: the table `surfaces`."""

from itertools import chain

import torch

from lossray.measures.cells import Row
from lossray.measures.checkpoint_spectra import HESSIAN
from lossray.measures.course import course_of
from lossray.measures.halving import Halving, Part
from lossray.measures.slices import slice_rows
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study.demands import needs_course, needs_eigenvectors
from tasks.commit_record import Record, Stopwatch
from tasks.devices import device_name, local_device
from tasks.jobs import SurfaceJob
from tasks.planned_data import located, stored_spectra


def evaluate_surfaces(job: SurfaceJob, device: torch.device | None = None) -> Record:
    """Evaluate, publish the rows, and commit; a diverged run has none.

    Args:
        job: which checkpoint.
        device: where; None takes this machine's GPU if it has one.

    Raises:
        StoreError: a checkpoint, or the eigenvectors of this one, are missing or damaged.
    """
    device = device or local_device()
    store, watch = Store(job.context.out), Stopwatch(job.attempt, device_name(device))
    halving = Halving(len(job.pack.seeds), job.attempt.halvings)
    rows = halving.by_parts(lambda part: _slices(job, store, device, part))
    store.publish("surfaces", job.key, list(chain(*rows)))
    return watch.commit(store, job, reduced=halving.reduced)


def _slices(job: SurfaceJob, store: Store, device: torch.device, part: Part) -> list[Row]:
    """Rows of `surfaces`, of the runs of a part."""
    point = located(job.context, job.pack, job.step, device, part)
    course = None
    if needs_course(job.context.study):
        checkpoints = (read_checkpoint(store, job.pack.pack_id, step, device) for step in job.steps)
        course = course_of(checkpoint.of(part.members) for checkpoint in checkpoints)
    members = [part.members.index(r) for r in job.members if r in part.members]
    return slice_rows(point, members, pairs=_eigenpairs(job, store, device, part), course=course)


def _eigenpairs(job: SurfaceJob, store: Store, device: torch.device, part: Part) -> PackedEigenPairs | None:
    """The Hessian's, as the analysis has left them; None where they are not kept, or not needed."""
    if not needs_eigenvectors(job.context.study):
        return None
    spectra = stored_spectra(store, job.pack, job.step, part, key=job.curvature_key, device=device)
    return spectra.get((*HESSIAN, "largest"))
