"""Slices of the loss through one checkpoint of a pack: the table `surfaces`."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import ray
import torch

from lossray.curvature.objectives import mean_losses
from lossray.curvature.pairs import EigenPairs
from lossray.geometry import vectors
from lossray.geometry.surface import (
    Plane,
    along_eigenvectors,
    along_random,
    along_trajectory,
    surface_rows,
)
from lossray.geometry.trajectory import gram_of, principal_axes
from lossray.geometry.vectors import Name
from lossray.seeds import stream
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from lossray.training.datasets import analysis_set
from tasks.context import Context, device_name, local_device, loss_of, prepare_worker
from tasks.point import Point, locate, objective_at
from tasks.record import Attempt, Stopwatch
from tasks.spectra import HESSIAN, Row, finite


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
    """
    device = device or local_device()
    store, study = Store(job.context.out), job.context.study
    watch = Stopwatch(job.attempt, device_name(device))
    point = locate(job, read_checkpoint(store, job.pack.pack_id, job.step, device), device)
    examples = analysis_set(point.dataset, study.curvature.examples)
    assert study.surfaces is not None
    rows: list[Row] = []
    for r in job.members:
        if not point.alive[r]:
            continue
        for plane in _planes(job, store, point, r):
            found = surface_rows(
                plane,
                point.stack,
                point.theta[r],
                {name: tensor[r] for name, tensor in point.buffers.items()},
                loss_of(job.context),
                (examples.inputs, examples.targets),
                points=study.surfaces.points,
                span=study.surfaces.span,
            )
            rows += [_row(job, r, plane, asdict(row)) for row in found]
    store.publish("surfaces", job.key, rows)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def surfaces(job: SurfaceJob, cpus: float) -> None:
    """`evaluate_surfaces` as a Ray task; what it finds is in the store."""
    evaluate_surfaces(job, prepare_worker(cpus))


def _planes(job: SurfaceJob, store: Store, point: Point, r: int) -> Iterator[Plane]:
    """The slices that the study asks for, those that do not exist left out."""
    study = job.context.study
    assert study.surfaces is not None
    spectra: Mapping[Name, EigenPairs] = {}
    if study.curvature.vectors and {"v1", "eigenvectors"} & set(study.surfaces.kinds):
        path = store.vectors_path(job.pack.pack_id, job.step)
        content = store.read_bytes(path)
        spectra = vectors.loads(
            content, key=job.curvature_key, device=point.theta.device, name=f"{store.url}/{path}"
        )
    objective = objective_at(job, point)
    for kind in study.surfaces.kinds:
        plane: Plane | None = None
        if kind == "pca":
            plane = _trajectory_plane(job, store, point, r)
        elif kind == "random":
            seed = stream(job.pack.seeds[r], "surface", job.step)
            plane = along_random(point.theta[r], point.stack.layout, seed)
        elif (pairs := spectra.get((*HESSIAN, "largest"))) is not None:
            loss = float(mean_losses(objective, objective.theta)[r])
            plane = along_eigenvectors(
                kind, pairs.vectors[r], pairs.values[r], loss=loss, theta=point.theta[r]
            )
        if plane is not None:
            yield plane


def _trajectory_plane(job: SurfaceJob, store: Store, point: Point, r: int) -> Plane | None:
    """The plane of the run's first two principal axes, wide enough for all its checkpoints."""
    points = []
    for step in job.steps:
        checkpoint = read_checkpoint(store, job.pack.pack_id, step, point.theta.device)
        if checkpoint.alive[r]:
            flat = [tensor[r].double().flatten() for tensor in checkpoint.parameters.values()]
            points.append(torch.cat(flat)[None])
    if len(points) < 3:
        return None
    axes = principal_axes(gram_of(points)[0].cpu().numpy())
    stacked = torch.cat(points)
    centred = stacked - stacked.mean(dim=0)
    weights = torch.from_numpy(np.ascontiguousarray(axes.weights[:, :2].T)).to(centred)
    rows = weights @ centred  # [2, d] unit vectors
    here = (point.theta[r].double() - stacked.mean(dim=0)) @ rows.T
    reach = ((centred @ rows.T) - here).abs().amax(dim=0)
    return along_trajectory(rows, reach)


def _row(job: SurfaceJob, r: int, plane: Plane, row: Row) -> Row:
    run_id = job.pack.run_ids[r]
    name = {"surface_id": f"{run_id}-{job.step}-{plane.kind}", "run_id": run_id, "step": job.step}
    numbers = {key: finite(value) if isinstance(value, float) else value for key, value in row.items()}
    return {**name, "kind": plane.kind, **numbers}
