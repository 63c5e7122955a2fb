"""The training loop of a pack: yields checkpoints, writes nothing.

A run is determined by its seed and step: data order and noise come from counters (lossray.seeds), so a pack
resumed from a checkpoint goes on bit for bit, and a member does not depend on who else is in its pack.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from lossray.networks.losses import Loss, get_loss
from lossray.networks.stack import Stack
from lossray.storage.checkpoints import Checkpoint
from lossray.training.batches import (
    batch_indices,
    gradient_in_training,
    next_minibatch,
    step_gradient,
    takes_all,
)
from lossray.training.datasets import Dataset, Split
from lossray.training.evaluation import METRICS, evaluate
from lossray.training.log import EVALUATED, LogShape, Row, masked, measured
from lossray.training.optimizers import OptimizerSettings, StackOptimizer, learning_rate
from lossray.training.plan import CheckpointsSettings, TrainingSettings, checkpoint_steps

__all__ = [
    "CheckpointsSettings",
    "TrainingSettings",
    "batch_indices",
    "checkpoint_steps",
    "next_minibatch",
    "step_gradient",
    "train",
]


@dataclass(frozen=True)
class _Task:
    """What stays as it is during training."""

    stack: Stack
    loss: Loss
    dataset: Dataset
    training: TrainingSettings
    optimizer: OptimizerSettings
    pack_id: str
    seeds: tuple[int, ...]


@dataclass
class _Pack:
    """What training changes. Members that are not alive are never changed again."""

    theta: Tensor  # [R, d]
    buffers: dict[str, Tensor]  # name -> [R, *shape]
    optimizer: StackOptimizer
    alive: Tensor  # [R] bool
    diverged_at: Tensor  # [R] int64, -1 where alive
    initial_loss: Tensor  # [R] float64, NaN before the first evaluation
    anyone: bool = True  # alive.any() and alive.all(), without a wait for the device
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


def train(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    optimizer_settings: OptimizerSettings,
    training: TrainingSettings,
    dataset: Dataset,
    *,
    pack_id: str,
    seeds: Sequence[int],
    resume: Checkpoint | None = None,
) -> Iterator[Checkpoint]:
    """Train a pack, yielding a checkpoint at each of `checkpoint_steps(training)`.

    A member diverges when its loss (of a minibatch, or of the training split at a checkpoint), its gradient
    or its parameters are not finite, or when that loss exceeds `diverged_above` times its initial training
    loss (where that is not negative). It is then frozen at its last finite parameters; the others are not
    affected in any bit. Checkpoints go on to the last step even if no member is left.

    The log of a checkpoint has rows for the steps from the previous checkpoint on: every `log_every` steps,
    and every checkpoint. The row of step t describes the minibatch loss and gradient (without decay) at the
    parameters of step t and the update from t to t + 1; `validation_loss`, `test_loss` and `test_accuracy`
    are NaN except where step t is a checkpoint. The last step has a row as well, without an update. All
    values of a diverged member are NaN.

    Args:
        stack: the architecture.
        theta: initial parameters [R, d]; not changed.
        buffers: initial buffers by name, [R, *shape]; not changed.
        optimizer_settings: of one optimizer.
        training: the [training] section.
        dataset: in the dtype of `theta`, on any device.
        pack_id: recorded in the checkpoints.
        seeds: the members' seeds, R of them.
        resume: go on from this checkpoint: the first one yielded is its successor, and `theta` and
            `buffers` count by their shape, dtype and device only.

    Yields:
        Checkpoints on the device of `theta`; none shares memory with the loop.

    Raises:
        ValueError: `resume` belongs to another pack.
    """
    device = theta.device
    task = _Task(
        stack,
        get_loss(training.loss),
        _to(dataset, device),
        training,
        optimizer_settings,
        pack_id,
        tuple(seeds),
    )
    steps = checkpoint_steps(training)
    if resume is None:
        clock = time.perf_counter()
        pack = _fresh(task, theta, buffers)
        evaluation = _evaluate(task, pack, step=0)
        yield _checkpoint(task, pack, 0, evaluation, {}, time.perf_counter() - clock)
    else:
        if (resume.pack_id, resume.seeds) != (pack_id, task.seeds):
            raise ValueError(
                f"cannot resume pack {pack_id} {task.seeds} from {resume.pack_id} {resume.seeds}"
            )
        pack = _resumed(task, theta, resume)
        evaluation = {name: value.to(device) for name, value in resume.evaluation.items()}
        steps = (resume.step, *(step for step in steps if step > resume.step))
    for start, end in pairwise(steps):
        clock = time.perf_counter()
        rows = _segment(task, pack, start, end, evaluation)
        evaluation = _evaluate(task, pack, step=end)
        if end == training.steps:
            rows[end] = _last_row(task, pack, evaluation)
        yield _checkpoint(task, pack, end, evaluation, rows, time.perf_counter() - clock)


# ---- beginning


def _fresh(task: _Task, theta: Tensor, buffers: Mapping[str, Tensor]) -> _Pack:
    own = theta.detach().clone()
    members = len(own)
    return _Pack(
        theta=own,
        buffers={name: tensor.detach().clone() for name, tensor in buffers.items()},
        optimizer=StackOptimizer(task.optimizer, own, task.stack.layout),
        alive=torch.ones(members, dtype=torch.bool, device=own.device),
        diverged_at=torch.full((members,), -1, device=own.device),
        initial_loss=torch.full((members,), torch.nan, dtype=torch.float64, device=own.device),
    )


def _resumed(task: _Task, theta: Tensor, checkpoint: Checkpoint) -> _Pack:
    pack = _fresh(task, task.stack.layout.join(checkpoint.parameters).to(theta), checkpoint.buffers)
    device = theta.device
    pack.buffers = {name: tensor.to(device) for name, tensor in pack.buffers.items()}
    pack.optimizer.load_state(checkpoint.optimizer)
    pack.alive = checkpoint.alive.to(device, copy=True)
    pack.diverged_at = checkpoint.diverged_at.to(device, copy=True)
    pack.initial_loss = checkpoint.initial_loss.to(device, copy=True)
    pack.anyone, pack.everyone = bool(pack.alive.any()), bool(pack.alive.all())
    return pack


def _to(dataset: Dataset, device: torch.device) -> Dataset:
    def moved(split: Split) -> Split:
        return Split(split.inputs.to(device), split.targets.to(device))

    return replace(
        dataset, train=moved(dataset.train), validation=moved(dataset.validation), test=moved(dataset.test)
    )


# ---- steps


def _segment(
    task: _Task, pack: _Pack, start: int, end: int, evaluation: Mapping[str, Tensor]
) -> dict[int, Row]:
    """Take the steps from `start` to `end`; the rows of those that are logged, by step."""
    rows: dict[int, Row] = {}
    for step in range(start, end):
        logged = step == start or step % task.training.log_every == 0
        row = _take_step(task, pack, step, logged) if pack.anyone else {}
        if logged:
            rows[step] = row
    rows[start] = {**rows[start], **{name: evaluation[name] for name in EVALUATED}}
    return rows


def _take_step(task: _Task, pack: _Pack, step: int, logged: bool) -> Row:
    """One step of the living members; the row is only filled where it is `logged`."""
    before = pack.theta.clone()
    buffers_before = {name: tensor.clone() for name, tensor in pack.buffers.items()}
    batch = next_minibatch(task.dataset, task.training, task.seeds, step)
    losses, gradient = gradient_in_training(
        task.stack, pack.theta, pack.buffers, task.loss, batch, task.seeds, step
    )
    pack.bury(_acceptable(task, pack, losses) & _all_finite(gradient), step)
    lr = learning_rate(task.optimizer, step, task.training.steps)
    pack.optimizer.step(gradient, lr, alive=None if pack.everyone else pack.alive)
    if pack.bury(_all_finite(pack.theta), step + 1):
        pack.theta[~pack.alive] = before[~pack.alive]
    if not pack.everyone:
        for name, tensor in pack.buffers.items():
            tensor[~pack.alive] = buffers_before[name][~pack.alive]
    return measured(losses, gradient, pack.theta - before, pack.alive) if logged else {}


def _all_finite(rows: Tensor) -> Tensor:
    """Whether all entries of each row [R, d] are finite; [R]."""
    finite = torch.isfinite(rows.sum(dim=1))  # one pass; a sum of finite numbers may still overflow
    return finite if bool(finite.all()) else torch.isfinite(rows).all(dim=1)


def _acceptable(task: _Task, pack: _Pack, losses: Tensor) -> Tensor:
    """Whether losses [R] are finite and not far above the initial ones.

    The smallest number that the dtype can tell from 1 stands in for an initial loss below it (a start at the
    solution). A loss that starts negative has no zero to be a multiple from: any finite value is acceptable.
    """
    smallest = torch.finfo(pack.theta.dtype).eps
    limit = task.training.diverged_above * pack.initial_loss.clamp(min=smallest)
    limit = torch.where(pack.initial_loss < 0, torch.inf, limit)
    return torch.isfinite(losses) & (losses <= limit)


def _evaluate(task: _Task, pack: _Pack, *, step: int) -> dict[str, Tensor]:
    """Evaluate at a checkpoint; NaN for members that have diverged, by this evaluation or before."""
    if not pack.anyone:
        return {name: torch.full_like(pack.initial_loss, torch.nan) for name in METRICS}
    evaluation = evaluate(task.stack, pack.theta, pack.buffers, task.loss, task.dataset)
    if step == 0:
        pack.initial_loss = evaluation["train_loss"].clone()
    pack.bury(_acceptable(task, pack, evaluation["train_loss"]), step)
    return {name: masked(value, pack.alive) for name, value in evaluation.items()}


# ---- the log


def _last_row(task: _Task, pack: _Pack, evaluation: Mapping[str, Tensor]) -> Row:
    """The row of the last step: what one more step would have seen, and no update."""
    row = {name: evaluation[name] for name in EVALUATED}
    if not pack.anyone:
        return row
    losses, gradient = step_gradient(
        task.stack,
        pack.theta,
        pack.buffers,
        task.loss,
        task.dataset,
        task.training,
        task.seeds,
        task.training.steps,
    )
    return {**row, **measured(losses, gradient, None, pack.alive)}


def _log(task: _Task, rows: Mapping[int, Row]) -> dict[str, Tensor]:
    """The rows by step as columns."""
    inputs, batch_size = task.dataset.train.inputs, task.training.batch_size
    batch = len(inputs) if takes_all(len(inputs), batch_size) else int(batch_size)
    nothing = torch.full((len(task.seeds),), torch.nan, dtype=torch.float64, device=inputs.device)
    rates = [learning_rate(task.optimizer, step, task.training.steps) for step in rows]
    return LogShape(nothing, batch).columns(list(rows), rates, list(rows.values()))


# ---- the yield


def _checkpoint(
    task: _Task,
    pack: _Pack,
    step: int,
    evaluation: dict[str, Tensor],
    rows: Mapping[int, Row],
    seconds: float,
) -> Checkpoint:
    """A snapshot that later steps do not change."""
    views = task.stack.layout.split(pack.theta)
    return Checkpoint(
        pack_id=task.pack_id,
        step=step,
        seeds=task.seeds,
        parameters={name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()},
        buffers={name: tensor.clone() for name, tensor in pack.buffers.items()},
        optimizer=pack.optimizer.state(),
        alive=pack.alive.clone(),
        diverged_at=pack.diverged_at.clone(),
        initial_loss=pack.initial_loss.clone(),
        evaluation=dict(evaluation),
        log=_log(task, rows),
        seconds=seconds,
    )
