"""Slices of the loss through one checkpoint of a pack: the table `surfaces`."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

import ray
import torch
from torch import Tensor

from lossray.geometry import vectors
from lossray.geometry.planes import (
    EIGENVECTOR_KINDS,
    Plane,
    SurfaceRow,
    along_eigenvectors,
    along_random,
    along_trajectory,
    surface_rows,
)
from lossray.seeds import stream
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack, Study
from lossray.training.datasets import Split, analysis_set
from lossray.training.evaluation import evaluate_split
from tasks.checkpoint_spectra import HESSIAN, Row, finite
from tasks.commit_record import Attempt, Stopwatch
from tasks.context import Context, device_name, local_device, loss_of, prepare_worker
from tasks.follow_runs import read_course
from tasks.pack_point import PackPoint, locate


@dataclass(frozen=True)
class SurfaceJob:
    """Evaluate the slices through one checkpoint of a pack."""

    context: Context
    pack: Pack
    step: int
    members: tuple[int, ...]  # indices of the runs that have surfaces
    steps: tuple[int, ...]  # of all the pack's checkpoints
    curvature_key: str  # of the checkpoint's analysis, which has left the eigenvectors
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "surfaces"


def evaluate_surfaces(job: SurfaceJob, device: torch.device | None = None) -> None:
    """Evaluate, publish the rows, and commit; a diverged run has none.

    Args:
        job: which checkpoint.
        device: where; None takes this machine's GPU if it has one.

    Raises:
        StoreError: a checkpoint, or the eigenvectors of this one, are missing or damaged.
    """
    device = device or local_device()
    store, settings = Store(job.context.out), job.context.study.surfaces
    assert settings is not None
    watch = Stopwatch(job.attempt, device_name(device))
    point = locate(job, read_checkpoint(store, job.pack.pack_id, job.step, device), device)
    examples = analysis_set(point.dataset, job.context.study.curvature.examples)
    rows: list[Row] = []
    for r, plane in _planes(job, store, point, examples):
        found = surface_rows(
            plane,
            point.stack,
            point.theta[r],
            {name: tensor[r] for name, tensor in point.buffers.items()},
            loss_of(job.context),
            examples,
            points=settings.points,
            span=settings.span,
        )
        rows += [_row(job, r, plane, row) for row in found]
    store.publish("surfaces", job.key, rows)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def surfaces(job: SurfaceJob, cpus: float) -> None:
    """`evaluate_surfaces` as a Ray task; what it finds is in the store."""
    evaluate_surfaces(job, prepare_worker(cpus))


def needs_course(study: Study) -> bool:
    """Whether a slice lies in the plane of the trajectory, of which all checkpoints must then be there."""
    return study.surfaces is not None and "pca" in study.surfaces.kinds


def needs_eigenvectors(study: Study) -> bool:
    """Whether a slice lies along eigenvectors, which the analysis of the checkpoint leaves."""
    kinds = study.surfaces.kinds if study.surfaces is not None else ()
    return study.curvature.vectors and bool(set(EIGENVECTOR_KINDS) & set(kinds))


def _planes(job: SurfaceJob, store: Store, point: PackPoint, examples: Split) -> Iterator[tuple[int, Plane]]:
    """Every living member with its slices, those left out that do not exist."""
    settings = job.context.study.surfaces
    assert settings is not None
    device = point.theta.device
    pairs = _eigenpairs(job, store, device)
    loss, _ = evaluate_split(point.stack, point.theta, point.buffers, loss_of(job.context), examples)
    courses = _courses(job, store, device)
    for r, kind in itertools.product(job.members, settings.kinds):
        if not point.alive[r]:
            continue
        theta = point.theta[r]
        plane: Plane | None = None
        if kind == "pca":
            plane = along_trajectory(theta, courses[r])
        elif kind == "random":
            plane = along_random(theta, point.stack.layout, stream(job.pack.seeds[r], "surface", job.step))
        elif pairs is not None:
            plane = along_eigenvectors(
                kind, pairs.vectors[r], pairs.values[r], loss=float(loss[r]), theta=theta
            )
        if plane is not None:
            yield r, plane


def _courses(job: SurfaceJob, store: Store, device: torch.device) -> dict[int, list[Tensor]]:
    """Each member's parameters [d] at every checkpoint it was alive at; nothing where they are not needed."""
    if not needs_course(job.context.study):
        return {}
    points, alive = read_course(store, job.pack, job.steps, device)
    living = alive.tolist()
    return {
        r: [theta[r] for theta, lives in zip(points, living[r], strict=True) if lives] for r in job.members
    }


def _eigenpairs(job: SurfaceJob, store: Store, device: torch.device) -> PackedEigenPairs | None:
    """The Hessian's, as the analysis has left them; None where they are not kept, or not needed."""
    study = job.context.study
    if not needs_eigenvectors(study):
        return None
    path = store.vectors_path(job.pack.pack_id, job.step)
    name = f"{store.url}/{path}"
    spectra = vectors.loads(store.read_bytes(path), key=job.curvature_key, device=device, name=name)
    return spectra.get((*HESSIAN, "largest"))


def _row(job: SurfaceJob, r: int, plane: Plane, row: SurfaceRow) -> Row:
    run_id = job.pack.run_ids[r]
    return {
        "surface_id": f"{run_id}-{job.step}-{plane.kind}",
        "run_id": run_id,
        "step": job.step,
        "kind": plane.kind,
        **asdict(row),
        "loss": finite(row.loss),
        "accuracy": finite(row.accuracy),
    }
