"""One step of a pack, and all that it changes: what the training loop and a replay have in common."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lossray.networks.losses import Loss
from lossray.networks.stack import Stack
from lossray.storage.checkpoints import Checkpoint
from lossray.training.batches import gradient_in_training, next_minibatch
from lossray.training.datasets import Dataset
from lossray.training.optimizers import PackedOptimizer
from lossray.training.schedules import learning_rate
from lossray.training.settings import TrainingSettings
from lossray.training.shadow import Shadow, load_shadow_states, make_shadows
from lossray.training.update_rules import OptimizerSettings


@dataclass(frozen=True)
class LearningRates:
    """Learning rates parameter by parameter, as multiples of the step's; [R, d] each, None for 1.

    A factor on the gradient, in front of the optimizer, is one for plain, heavy-ball and Nesterov descent,
    and leaves their weight decay alone. Behind the optimizer it is one for the others, decoupled weight decay
    included.

    Attributes:
        gradient: factors in front of the optimizer.
        update: factors behind it.
    """

    gradient: Tensor | None = None
    update: Tensor | None = None


@dataclass(frozen=True)
class TrainingTask:
    """What stays as it is during training.

    Attributes:
        stack: the architecture.
        loss: ``loss(outputs, targets)``, the mean over examples.
        dataset: on the device of the training.
        training: the settings of the study's training.
        optimizer: the settings of the pack's optimizer.
        pack_id: recorded in the checkpoints.
        seeds: one per member.
        shadow: names of the shadow optimizers.
        rate: learning rate by step; None for the optimizer's schedule.
        rates: the factors of it, parameter by parameter.
    """

    stack: Stack
    loss: Loss
    dataset: Dataset
    training: TrainingSettings
    optimizer: OptimizerSettings
    pack_id: str
    seeds: tuple[int, ...]
    shadow: tuple[str, ...] = ()
    rate: Callable[[int], float] | None = None
    rates: LearningRates = LearningRates()

    def learning_rate(self, step: int) -> float:
        """The learning rate of the update from `step` to `step + 1`."""
        if self.rate is not None:
            return self.rate(step)
        return learning_rate(self.optimizer, step, self.training.steps)


@dataclass
class PackState:
    """What training changes. Members that are not alive are never changed again.

    Attributes:
        theta: [R, d] parameters.
        buffers: by name, [R, *shape].
        optimizer: with the state of all members.
        alive: [R] bool.
        diverged_at: [R] int64, the step; -1 where alive.
        initial_loss: [R] float64, NaN before the first evaluation.
        shadows: optimizers that compute the updates that they would have made.
        anyone: alive.any(), without a wait for the device.
        everyone: alive.all(), in the same way.
    """

    theta: Tensor
    buffers: dict[str, Tensor]
    optimizer: PackedOptimizer
    alive: Tensor
    diverged_at: Tensor
    initial_loss: Tensor
    shadows: list[Shadow] = field(default_factory=list)
    anyone: bool = True
    everyone: bool = True

    def bury(self, healthy: Tensor, step: int) -> bool:
        """Mark the living members that are not `healthy` [R] as diverged at `step`; tell if any."""
        dying = self.alive & ~healthy
        if not bool(dying.any()):
            return False
        self.alive = self.alive & healthy
        self.diverged_at = torch.where(dying, step, self.diverged_at)
        self.anyone, self.everyone = bool(self.alive.any()), False
        return True


def fresh(task: TrainingTask, theta: Tensor, buffers: Mapping[str, Tensor]) -> PackState:
    """A pack at step 0, with copies of ``theta`` [R, d] and ``buffers``."""
    parameters = theta.detach().clone()
    members = len(parameters)
    return PackState(
        theta=parameters,
        buffers={name: tensor.detach().clone() for name, tensor in buffers.items()},
        optimizer=PackedOptimizer(task.optimizer, parameters, task.stack.layout),
        alive=torch.ones(members, dtype=torch.bool, device=parameters.device),
        diverged_at=torch.full((members,), -1, device=parameters.device),
        initial_loss=torch.full((members,), torch.nan, dtype=torch.float64, device=parameters.device),
        shadows=make_shadows(task.shadow, parameters, task.stack.layout),
    )


def resumed(task: TrainingTask, theta: Tensor, checkpoint: Checkpoint) -> PackState:
    """A pack at a checkpoint, with copies of what is in it; ``theta`` gives dtype and device."""
    pack = fresh(task, task.stack.layout.join(checkpoint.parameters).to(theta), checkpoint.buffers)
    device = theta.device
    pack.buffers = {name: tensor.to(device) for name, tensor in pack.buffers.items()}
    pack.optimizer.load_state(checkpoint.optimizer)
    load_shadow_states(pack.shadows, checkpoint.shadow)
    pack.alive = checkpoint.alive.to(device, copy=True)
    pack.diverged_at = checkpoint.diverged_at.to(device, copy=True)
    pack.initial_loss = checkpoint.initial_loss.to(device, copy=True)
    pack.anyone, pack.everyone = bool(pack.alive.any()), bool(pack.alive.all())
    return pack


@dataclass(frozen=True)
class Step:
    """One step that a pack has taken.

    Attributes:
        before: [R, d] parameters before it.
        losses: [R] of its minibatches, in train mode.
        gradient: [R, d] of these losses, without weight decay.
        shadows: by optimizer: the update [R, d] that it would have made.
    """

    before: Tensor
    losses: Tensor
    gradient: Tensor
    shadows: dict[str, Tensor]


def take_step(task: TrainingTask, pack: PackState, step: int) -> Step:
    """Move the living members on by one step; bury those that diverge in it."""
    before = pack.theta.clone()
    buffers_before = {name: tensor.clone() for name, tensor in pack.buffers.items()}
    batch = next_minibatch(task.dataset, task.training, task.seeds, step)
    losses, gradient = gradient_in_training(
        task.stack, pack.theta, pack.buffers, task.loss, batch, task.seeds, step
    )
    pack.bury(acceptable(task, pack, losses) & all_finite(gradient), step)
    alive = None if pack.everyone else pack.alive
    scaled = gradient if task.rates.gradient is None else gradient * task.rates.gradient
    pack.optimizer.step(scaled, task.learning_rate(step), alive=alive)
    if task.rates.update is not None:
        pack.theta.copy_(before + task.rates.update * (pack.theta - before))
    shadows = {shadow.name: shadow.step(before, gradient, alive=alive) for shadow in pack.shadows}
    if pack.bury(all_finite(pack.theta), step + 1):
        pack.theta[~pack.alive] = before[~pack.alive]
    if not pack.everyone:
        for name, tensor in pack.buffers.items():
            tensor[~pack.alive] = buffers_before[name][~pack.alive]
    return Step(before, losses, gradient, shadows)


def all_finite(rows: Tensor) -> Tensor:
    """Whether all entries of each row [R, d] are finite; [R]."""
    if rows.device.type != "cpu":  # where to ask for a second look would be to wait for the device
        return torch.isfinite(rows).all(dim=1)
    finite = torch.isfinite(rows.sum(dim=1))  # one pass; a sum of finite numbers may still overflow
    return finite if bool(finite.all()) else torch.isfinite(rows).all(dim=1)


def acceptable(task: TrainingTask, pack: PackState, losses: Tensor) -> Tensor:
    """Whether losses [R] are finite and not far above the initial ones; see `below_limit`."""
    return below_limit(losses, pack.initial_loss, task.training.diverged_above, pack.theta.dtype)


def below_limit(losses: Tensor, initial_loss: Tensor, multiple: float, dtype: torch.dtype) -> Tensor:
    """Whether losses [R] are finite and at most a multiple of the initial ones [R].

    The smallest number that the parameters' dtype can tell from 1 stands in for an initial loss below it (a
    start at the solution). A loss that starts negative has no zero to be a multiple from: any finite value is
    acceptable.
    """
    limit = multiple * initial_loss.clamp(min=torch.finfo(dtype).eps)
    limit = torch.where(initial_loss < 0, torch.inf, limit)
    return torch.isfinite(losses) & (losses <= limit)
