"""The steps after a checkpoint once more, bit for bit those that training took, with all that they used.

A checkpoint holds all state, and data order and noise come from counters (lossray.seeds), so this is the
training itself. It may go on past the last step of the run, as training would have. Only the evaluations at
later checkpoints are left out: a member that training buries there lives on.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lossray.networks.losses import get_loss
from lossray.networks.stack import Stack
from lossray.storage.checkpoints import Checkpoint
from lossray.training.datasets import Dataset, on_device
from lossray.training.settings import TrainingSettings
from lossray.training.steps import TrainingTask, resumed, take_step
from lossray.training.update_rules import OptimizerSettings


@dataclass(frozen=True)
class ReplayedStep:
    """One step of R members; the rows of those that are not alive after it mean nothing.

    Attributes:
        step: steps taken before.
        theta: [R, d] parameters before it.
        losses: [R] of its minibatches, in train mode.
        gradient: [R, d] of these losses, without weight decay.
        update: [R, d] the change that it made, weight decay included.
        momentum: [R, d] the buffer that it used, with this gradient in it; None where there is none.
        scale: [R, d] diagonal of the preconditioner P that it used; None where it has none.
        shadows: by optimizer: the update [R, d] that it would have made.
        alive: [R] bool, after the step.
    """

    step: int
    theta: Tensor
    losses: Tensor
    gradient: Tensor
    update: Tensor
    momentum: Tensor | None
    scale: Tensor | None
    shadows: Mapping[str, Tensor]
    alive: Tensor


def replay(
    stack: Stack,
    theta: Tensor,
    checkpoint: Checkpoint,
    optimizer_settings: OptimizerSettings,
    training: TrainingSettings,
    dataset: Dataset,
    *,
    steps: int,
    shadow: Sequence[str] = (),
) -> Iterator[ReplayedStep]:
    """Take the steps that follow a checkpoint of a pack.

    Args:
        stack: the architecture.
        theta: [R, d]; only its dtype and device count.
        checkpoint: where to start.
        optimizer_settings: those of the training.
        training: likewise.
        dataset: likewise, in the dtype of ``theta``.
        steps: how many; fewer are taken where no member is left alive.
        shadow: the shadow optimizers that ran along.
    """
    task = TrainingTask(
        stack,
        get_loss(training.loss),
        on_device(dataset, theta.device),
        training,
        optimizer_settings,
        checkpoint.pack_id,
        checkpoint.seeds,
        tuple(shadow),
    )
    pack = resumed(task, theta, checkpoint)
    for step in range(checkpoint.step, checkpoint.step + steps):
        if not pack.anyone:
            return
        taken = take_step(task, pack, step)
        yield ReplayedStep(
            step=step,
            theta=taken.before,
            losses=taken.losses,
            gradient=taken.gradient,
            update=pack.theta - taken.before,
            momentum=pack.optimizer.momentum(),
            scale=pack.optimizer.scale(),
            shadows=taken.shadows,
            alive=pack.alive.clone(),
        )
