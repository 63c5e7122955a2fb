"""Analyse one checkpoint of one pack: the spectra that [curvature] asks for, and geometry from the Hessian.

All members are analysed at once. One that has diverged is left out of every computation; its rows are null.
"""

from dataclasses import dataclass
from typing import ClassVar

import ray
import torch

from lossray.geometry import vectors
from lossray.geometry.vectors import Name
from lossray.seeds import stream
from lossray.spectra.analysis import PackedAnalysis, packed_analysis
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.checkpoints import read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack
from lossray.study.keys import CURVATURE_TABLES
from lossray.training.datasets import analysis_fingerprint, analysis_set
from tasks.checkpoint_geometry import geometry_at, pairs_needed
from tasks.checkpoint_spectra import (
    HESSIAN,
    Named,
    Row,
    curvature_rows,
    density_rows,
    eigenvalue_rows,
    operators_of,
)
from tasks.commit_record import Attempt, Stopwatch
from tasks.context import Context, dataset_of, device_name, local_device, prepare_worker
from tasks.pack_point import PackPoint, locate, objective_at


@dataclass(frozen=True)
class CurvatureJob:
    """Analyse the checkpoint of a pack at one step."""

    context: Context
    pack: Pack
    step: int
    key: str
    attempt: Attempt
    kind: ClassVar[str] = "curvature"


def analyse_checkpoint(job: CurvatureJob, device: torch.device | None = None) -> None:
    """Analyse, publish the rows and the eigenvectors, and commit.

    Args:
        job: what to analyse.
        device: where; None takes this machine's GPU if it has one.
    """
    device = device or local_device()
    store = Store(job.context.out)
    watch = Stopwatch(job.attempt, device_name(device))
    checkpoint = read_checkpoint(store, job.pack.pack_id, job.step, device)
    point = locate(job, checkpoint, device)
    rows: dict[str, list[Row]] = {name: [] for name in CURVATURE_TABLES}
    spectra: dict[Name, PackedEigenPairs] = {}
    scale = point.optimizer.scale() if point.optimizer else None
    objective, mode = objective_at(job, point), job.pack.product_mode
    for named in operators_of(job.context.study, objective, mode=mode, scale=scale):
        analysis = _analyse(job, point, named)
        spectra[*named.key, "largest"] = analysis.pairs
        spectra[*named.key, "smallest"] = analysis.smallest
        _add_spectrum(rows, job, point, named, analysis)
        if named.key == HESSIAN:
            geometry = geometry_at(job, point, named.operator, analysis)
            rows |= geometry.rows
            spectra |= geometry.spectra
    if job.context.study.curvature.vectors:
        content = vectors.dumps(spectra, key=job.key)
        store.write_bytes(store.vectors_path(job.pack.pack_id, job.step), content)
    for name, table in rows.items():
        store.publish(name, job.key, table)
    store.commit(watch.record(job.key, job.kind, pack_id=job.pack.pack_id, step=job.step))


@ray.remote(num_cpus=1, max_retries=0)
def curvature(job: CurvatureJob, cpus: float) -> None:
    """`analyse_checkpoint` as a Ray task; what it finds is in the store."""
    analyse_checkpoint(job, prepare_worker(cpus))


@ray.remote(num_cpus=1, max_retries=0)
def warm_up(context: Context) -> None:
    """Make a worker ready: import what an analysis needs, and read the data."""
    prepare_worker(1)
    dataset_of(context, getattr(torch, context.study.training.dtype))


def _analyse(job: CurvatureJob, point: PackPoint, named: Named) -> PackedAnalysis:
    """Each member's from random vectors of its own; those of the angles' operator as many as they need."""
    study, dim = job.context.study, named.operator.shape[1]
    settings = study.curvature
    top = min(settings.top, dim)
    if named.key == HESSIAN:
        top = pairs_needed(study, point.dataset.n_outputs, dim)
    return packed_analysis(
        named.operator,
        top=top,
        tolerance=settings.tolerance,
        probes=settings.probes,
        steps=settings.steps,
        seeds=[stream(seed, f"{named.name}/{named.block}", job.step) for seed in job.pack.seeds],
        alive=point.alive,
    )


def _add_spectrum(
    rows: dict[str, list[Row]], job: CurvatureJob, point: PackPoint, named: Named, analysis: PackedAnalysis
) -> None:
    settings = job.context.study.curvature
    keys = [
        {"run_id": run_id, "step": job.step, "operator": named.name, "block": named.block}
        for run_id in job.pack.run_ids
    ]
    shared = {
        "n_examples": len(analysis_set(point.dataset, settings.examples).targets),
        "data_fingerprint": analysis_fingerprint(point.dataset, settings.examples),
        "dtype": settings.dtype,
    }
    rows["eigenvalues"] += eigenvalue_rows(keys, analysis)
    rows["density"] += density_rows(keys, analysis)
    rows["curvature"] += curvature_rows(keys, analysis, named.operator, shared)
