"""Analyse one checkpoint of one pack: top eigenpairs of the Hessian, directions, angles.

All members are analysed at once. One that has diverged is left out of every computation; its rows are null.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import ray
import torch
from torch import Tensor

from lossray.curvature.analysis import Analysis, packed_analysis
from lossray.curvature.operators import StackHessian
from lossray.geometry import vectors
from lossray.geometry.angles import angle_rows, subspaces
from lossray.geometry.directions import direction_rows
from lossray.networks.stack import Stack
from lossray.seeds import stream
from lossray.storage.checkpoints import Checkpoint, read_checkpoint
from lossray.storage.store import Store
from lossray.study import Pack, Study
from lossray.training.datasets import Dataset, analysis_fingerprint, analysis_set
from lossray.training.loop import step_gradient
from lossray.training.optimizers import StackOptimizer, learning_rate
from tasks.context import (
    Context,
    dataset_of,
    device_name,
    local_device,
    loss_of,
    on_device,
    prepare_worker,
    stack_of,
)
from tasks.record import Attempt, Stopwatch
from tasks.recorded import converted

HESSIAN = ("hessian", "all")  # operator and block
Row = dict[str, Any]


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
    operator = hessian_at(job, point)
    analysis = _analyse(job, operator, checkpoint, n_outputs=point.dataset.n_outputs)
    directions = _directions(job, point, analysis)
    if job.context.study.curvature.vectors:
        content = vectors.dumps({HESSIAN: analysis.pairs}, key=job.key)
        store.write_bytes(store.vectors_path(job.pack.pack_id, job.step), content)
    for name, rows in {
        "eigenvalues": _eigenvalue_rows(job, analysis),
        "curvature": _curvature_rows(job, analysis, operator, point.dataset),
        "directions": _direction_rows(job, directions, operator, analysis),
        "angles": _angle_rows(job, directions, analysis, point.dataset),
    }.items():
        store.publish(name, job.key, rows)
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


@dataclass(frozen=True)
class Point:
    """Where a pack stands at one checkpoint, in the training dtype."""

    stack: Stack
    theta: Tensor  # [R, d]; diverged members at their last finite parameters
    buffers: dict[str, Tensor]  # name -> [R, *shape]
    optimizer: StackOptimizer | None  # None: a recorded run's, which lossray does not know
    alive: Tensor  # [R] bool
    dataset: Dataset


def locate(job: CurvatureJob, checkpoint: Checkpoint, device: torch.device) -> Point:
    """The pack at the checkpoint that the job is about, on ``device``."""
    dtype = getattr(torch, job.context.study.training.dtype)
    dataset = on_device(dataset_of(job.context, dtype), device)
    stack, _, _ = stack_of(job.pack, dataset, dtype=dtype, device=device)
    theta = stack.layout.join(checkpoint.parameters).to(dtype)  # a recorded run may have had another
    buffers = converted(checkpoint.buffers, device, dtype)
    optimizer = None
    if job.pack.optimizer is not None:
        optimizer = StackOptimizer(job.pack.optimizer, theta, stack.layout)
        optimizer.load_state(checkpoint.optimizer)
    return Point(stack, theta, buffers, optimizer, checkpoint.alive, dataset)


def hessian_at(job: CurvatureJob, point: Point) -> StackHessian:
    """The Hessians on the analysis set; a diverged member's is NaN, which keeps it out of everything."""
    settings = job.context.study.curvature
    examples = analysis_set(point.dataset, settings.examples)
    return StackHessian(
        point.stack,
        point.theta.masked_fill(~point.alive[:, None], float("nan")),
        point.buffers,
        loss_of(job.context),
        [(examples.inputs, examples.targets)],
        mode=job.pack.product_mode,
        dtype=getattr(torch, settings.dtype),
    )


def _analyse(
    job: CurvatureJob, operator: StackHessian, checkpoint: Checkpoint, *, n_outputs: int
) -> Analysis:
    study, dim = job.context.study, operator.shape[1]
    settings = study.curvature
    return packed_analysis(
        operator,
        top=pairs_needed(study, n_outputs, dim),
        tolerance=settings.tolerance,
        probes=settings.probes,
        steps=settings.steps,
        seeds=[stream(seed, "lanczos", job.step) for seed in job.pack.seeds],
        alive=checkpoint.alive,
    )


def pairs_needed(study: Study, n_outputs: int, dim: int) -> int:
    """As many eigenpairs as [curvature] asks for, and as the subspaces of [angles] need; d at most."""
    needed = subspaces(n_outputs, dim).values() if study.angles.directions else ()
    return min(max(study.curvature.top, *needed, 1), dim)


def _directions(job: CurvatureJob, point: Point, analysis: Analysis) -> dict[str, Tensor]:
    """Vectors [R, d] by name; those that do not exist (momentum at step 0) are missing."""
    study = job.context.study
    known = {
        "gradient": analysis.gradient,
        **_next_step(job, point),
        "momentum": point.optimizer.momentum() if point.optimizer else None,
    }
    alive = point.alive[:, None]
    return {
        name: vector.double().masked_fill(~alive, float("nan"))
        for name, vector in known.items()
        if vector is not None and name in study.angles.directions
    }


def _next_step(job: CurvatureJob, point: Point) -> dict[str, Tensor]:
    """What the run does next; of a recorded one the next batch is not known."""
    pack, study = job.pack, job.context.study
    if pack.recorded is not None or pack.optimizer is None or point.optimizer is None:
        return {}
    args = (point.stack, point.theta, point.buffers, loss_of(job.context), point.dataset)
    _, minibatch_gradient = step_gradient(*args, study.training, pack.seeds, job.step)
    lr = learning_rate(pack.optimizer, job.step, study.training.steps)
    update = point.optimizer.virtual_update(minibatch_gradient, lr)
    return {"minibatch_gradient": minibatch_gradient, "update": update}


def _eigenvalue_rows(job: CurvatureJob, analysis: Analysis) -> list[Row]:
    pairs = analysis.pairs
    columns = {
        "eigenvalue": pairs.values,
        "residual": pairs.residuals,
        "gap": pairs.gaps,
        "ipr": analysis.ipr,
    }
    numbers = {name: column.tolist() for name, column in columns.items()}
    converged, alive = pairs.converged.tolist(), analysis.alive.tolist()
    return [
        {
            **_row_key(job, r),
            "end": "largest",
            "index": i,
            **{name: _finite(column[r][i]) for name, column in numbers.items()},
            "converged": converged[r][i] if alive[r] else None,
        }
        for r in range(len(job.pack.seeds))
        for i in range(len(pairs))
    ]


def _curvature_rows(
    job: CurvatureJob, analysis: Analysis, operator: StackHessian, dataset: Dataset
) -> list[Row]:
    settings, pairs = job.context.study.curvature, analysis.pairs
    return [
        {
            **_row_key(job, r),
            "lambda_max": float(pairs.values[r, 0]),
            "confirmed": bool(pairs.confirmed[r]) if alive else None,
            "matvecs": int(pairs.matvecs[r]) if alive else None,
            "orthogonality_loss": float(pairs.orthogonality_loss[r]),
            "dim": operator.shape[1],
            "n_examples": len(analysis_set(dataset, settings.examples).targets),
            "data_fingerprint": analysis_fingerprint(dataset, settings.examples),
            "loss": float(analysis.losses[r]),
            "gradient_norm": float(analysis.gradient_norm[r]),
            "reg_included": False,
            "product_mode": job.pack.product_mode,
            "dtype": settings.dtype,
        }
        for r, alive in enumerate(analysis.alive.tolist())
    ]


def _direction_rows(
    job: CurvatureJob, directions: Mapping[str, Tensor], operator: StackHessian, analysis: Analysis
) -> list[Row]:
    rows = direction_rows(directions, operator, analysis.gradient)
    return [table_row(job, asdict(row)) for row in rows]


def _angle_rows(
    job: CurvatureJob, directions: Mapping[str, Tensor], analysis: Analysis, dataset: Dataset
) -> list[Row]:
    rows = angle_rows(directions, analysis.pairs, n_outputs=dataset.n_outputs)
    return [table_row(job, asdict(row)) for row in rows]


def _row_key(job: CurvatureJob, member: int) -> Row:
    operator, block = HESSIAN
    return {"run_id": job.pack.run_ids[member], "step": job.step, "operator": operator, "block": block}


def table_row(job: CurvatureJob, row: Row) -> Row:
    """A row of the geometry room, its member named by its run."""
    member = row.pop("member")
    return {"run_id": job.pack.run_ids[member], "step": job.step, **row}


def _finite(number: float) -> float | None:
    """Null for what does not exist: a gap where there is no other value, anything of a diverged member."""
    return number if math.isfinite(number) else None
