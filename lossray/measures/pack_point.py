"""Where a pack stands at one checkpoint: models, buffers, optimizer, data; and the Hessian there."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lossray.limits import WHOLE, Limits
from lossray.measures.cells import Row
from lossray.networks.as_found import copied
from lossray.networks.layout import Layout
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.stack import Loss, Stack, build_stack, stack_models
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack, Study
from lossray.training.datasets import Dataset, Split, analysis_set
from lossray.training.optimizers import PackedOptimizer
from lossray.training.readings import ENTRIES, RecordedOptimizer


@dataclass(frozen=True)
class PackPoint:
    """Where a pack stands at one checkpoint, in the training dtype.

    Attributes:
        study: the settings.
        pack: the R runs.
        stack: their models as one.
        theta: [R, d]; diverged members at their last finite parameters.
        buffers: name -> [R, *shape].
        optimizer: with its state; None: a recorded run's that is not known.
        alive: [R] bool, members that have not diverged.
        dataset: the study's data, on the device of theta.
        checkpoint: as it was read.
    """

    study: Study
    pack: Pack
    stack: Stack
    theta: Tensor
    buffers: dict[str, Tensor]
    optimizer: PackedOptimizer | RecordedOptimizer | None
    alive: Tensor
    dataset: Dataset
    checkpoint: Checkpoint

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return self.checkpoint.step

    @property
    def loss(self) -> Loss:
        """The study's."""
        return loss_of(self.study)

    @property
    def examples(self) -> Split:
        """The analysis set, on which curvature is defined."""
        return analysis_set(self.dataset, self.study.curvature.examples)

    @property
    def living(self) -> Tensor:
        """Parameters [R, d] with NaN for diverged members, which keeps these out of everything."""
        return self.theta.masked_fill(~self.alive[:, None], float("nan"))

    def row(self, row: Row) -> Row:
        """A row of another room, its ``member`` named by its run."""
        member = row.pop("member")
        return {"run_id": self.pack.run_ids[member], "step": self.step, **row}


def loss_of(study: Study) -> Loss:
    """The study's loss."""
    return get_loss(study.training.loss)


def stack_of(
    pack: Pack, dataset: Dataset, *, dtype: torch.dtype, device: torch.device
) -> tuple[Stack, Tensor, dict[str, Tensor]]:
    """A freshly initialised pack: stack, theta [R, d], buffers {name: [R, *shape]}.

    A recorded run's initialisation is replaced by what was recorded: its function may seed torch as it likes.
    """
    if pack.recorded is not None:
        with torch.random.fork_rng(devices=[]):
            model = build_model(pack.model, dataset.input_shape, dataset.n_outputs)
        return stack_models([model], executor=pack.executor, dtype=dtype, device=device)
    return build_stack(
        lambda: build_model(pack.model, dataset.input_shape, dataset.n_outputs),
        pack.seeds,
        executor=pack.executor,
        dtype=dtype,
        device=device,
    )


def locate(
    study: Study, pack: Pack, checkpoint: Checkpoint, dataset: Dataset, limits: Limits = WHOLE
) -> PackPoint:
    """The pack at a checkpoint of its training.

    Args:
        study: the settings.
        pack: the runs.
        checkpoint: read on the device where the work shall be done.
        dataset: the study's data, on the same device.
        limits: how much is evaluated at once.
    """
    dtype, device = getattr(torch, study.training.dtype), dataset.train.targets.device
    stack = stack_of(pack, dataset, dtype=dtype, device=device)[0].limited(limits)
    theta = stack.layout.join(checkpoint.parameters).to(dtype)  # a recorded run may have had another
    buffers = converted(checkpoint.buffers, device, dtype)
    optimizer = _optimizer(pack, checkpoint, theta, stack.layout)
    return PackPoint(study, pack, stack, theta, buffers, optimizer, checkpoint.alive, dataset, checkpoint)


def converted(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors on a device, those of floating point in a dtype."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in tensors.items()
    }


def _optimizer(
    pack: Pack, checkpoint: Checkpoint, theta: Tensor, layout: Layout
) -> PackedOptimizer | RecordedOptimizer | None:
    """As it was recorded; an older version has recorded the state of one that a study file can name."""
    if pack.recorded is not None and set(checkpoint.optimizer) <= set(ENTRIES):
        return RecordedOptimizer(checkpoint.optimizer) if checkpoint.optimizer else None
    if pack.optimizer is None:
        return None
    optimizer = PackedOptimizer(pack.optimizer, theta, layout)
    optimizer.load_state(checkpoint.optimizer)
    return optimizer


def objective_at(point: PackPoint) -> PackedObjective:
    """The losses on the analysis set; a diverged member's is NaN."""
    examples = point.examples
    return PackedObjective(
        point.stack,
        point.living,
        point.buffers,
        point.loss,
        [(examples.inputs, examples.targets)],
        dtype=getattr(torch, point.study.curvature.dtype),
    )


def hessian_at(point: PackPoint) -> PackedHessian:
    """The members' Hessians."""
    return PackedHessian(objective_at(point), mode=point.pack.product_mode)


def model_of(point: PackPoint, r: int) -> nn.Module:
    """The module of member r, in eval mode."""
    model = copied(point.stack.template).eval().to(point.theta.dtype)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {name: views[r] for name, views in point.stack.layout.split(point.theta).items()}
    values |= {name: stacked[r] for name, stacked in point.buffers.items()}
    with torch.no_grad():
        for name, value in values.items():
            tensors[name].copy_(value)
    return model
