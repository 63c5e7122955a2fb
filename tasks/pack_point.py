"""Where a pack stands at one checkpoint: models, buffers, optimizer, data; and the Hessian there."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lossray.networks.layout import Layout
from lossray.networks.stack import Stack
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack
from lossray.training.datasets import Dataset, analysis_set, on_device
from lossray.training.optimizers import PackedOptimizer
from lossray.training.readings import ENTRIES, RecordedOptimizer
from tasks.context import Context, dataset_of, loss_of, stack_of
from tasks.recorded_run import converted


class CheckpointJob(Protocol):
    """A job about one checkpoint of a pack."""

    @property
    def context(self) -> Context:
        """What the task needs to know of its study."""

    @property
    def pack(self) -> Pack:
        """The pack."""

    @property
    def step(self) -> int:
        """Of the checkpoint."""


@dataclass(frozen=True)
class PackPoint:
    """Where a pack stands at one checkpoint, in the training dtype."""

    stack: Stack
    theta: Tensor  # [R, d]; diverged members at their last finite parameters
    buffers: dict[str, Tensor]  # name -> [R, *shape]
    optimizer: PackedOptimizer | RecordedOptimizer | None  # None: a recorded run's that is not known
    alive: Tensor  # [R] bool
    dataset: Dataset
    checkpoint: Checkpoint  # as it was read


def locate(job: CheckpointJob, checkpoint: Checkpoint, device: torch.device) -> PackPoint:
    """The pack at the checkpoint that the job is about, on ``device``."""
    dtype = getattr(torch, job.context.study.training.dtype)
    dataset = on_device(dataset_of(job.context, dtype), device)
    stack, _, _ = stack_of(job.pack, dataset, dtype=dtype, device=device)
    theta = stack.layout.join(checkpoint.parameters).to(dtype)  # a recorded run may have had another
    buffers = converted(checkpoint.buffers, device, dtype)
    optimizer = _optimizer(job, checkpoint, theta, stack.layout)
    return PackPoint(stack, theta, buffers, optimizer, checkpoint.alive, dataset, checkpoint)


def _optimizer(
    job: CheckpointJob, checkpoint: Checkpoint, theta: Tensor, layout: Layout
) -> PackedOptimizer | RecordedOptimizer | None:
    """As it was recorded; an older version has recorded the state of one that a study file can name."""
    if job.pack.recorded is not None and set(checkpoint.optimizer) <= set(ENTRIES):
        return RecordedOptimizer(checkpoint.optimizer) if checkpoint.optimizer else None
    if job.pack.optimizer is None:
        return None
    optimizer = PackedOptimizer(job.pack.optimizer, theta, layout)
    optimizer.load_state(checkpoint.optimizer)
    return optimizer


def objective_at(job: CheckpointJob, point: PackPoint) -> PackedObjective:
    """The losses on the analysis set; a diverged member's is NaN, which keeps it out of everything."""
    settings = job.context.study.curvature
    examples = analysis_set(point.dataset, settings.examples)
    return PackedObjective(
        point.stack,
        point.theta.masked_fill(~point.alive[:, None], float("nan")),
        point.buffers,
        loss_of(job.context),
        [(examples.inputs, examples.targets)],
        dtype=getattr(torch, settings.dtype),
    )


def hessian_at(job: CheckpointJob, point: PackPoint) -> PackedHessian:
    """The members' Hessians."""
    return PackedHessian(objective_at(job, point), mode=job.pack.product_mode)
