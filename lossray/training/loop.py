"""The training loop of a pack: yields checkpoints, writes nothing.

A run is determined by its seed and step: data order and noise come from counters (lossray.seeds), so a pack
resumed from a checkpoint goes on bit for bit, and a member does not depend on who else is in its pack, but
for rounding: vmap's kernels add up in another order than those of a single model.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lossray.networks.losses import get_loss
from lossray.networks.stack import Stack
from lossray.storage.checkpoints import Checkpoint
from lossray.training.batches import batch_indices, next_minibatch, step_gradient, takes_all
from lossray.training.datasets import Dataset, on_device
from lossray.training.evaluation import METRICS, evaluate
from lossray.training.log import EVALUATED, LogShape, Row, masked, measured
from lossray.training.schedules import learning_rate
from lossray.training.settings import CheckpointsSettings, TrainingSettings, checkpoint_steps
from lossray.training.shadow import shadow_states
from lossray.training.steps import PackState, TrainingTask, acceptable, fresh, resumed, take_step
from lossray.training.update_rules import OptimizerSettings

__all__ = [
    "CheckpointsSettings",
    "TrainingSettings",
    "batch_indices",
    "checkpoint_steps",
    "next_minibatch",
    "step_gradient",
    "train",
]


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
    shadow: Sequence[str] = (),
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
        shadow: names of optimizers that are fed the run's gradients and do not change it in any bit; their
            state is in the checkpoints.

    Yields:
        Checkpoints on the device of `theta`; none shares memory with the loop.

    Raises:
        ValueError: `resume` belongs to another pack.
    """
    device = theta.device
    task = TrainingTask(
        stack,
        get_loss(training.loss),
        on_device(dataset, device),
        training,
        optimizer_settings,
        pack_id,
        tuple(seeds),
        tuple(shadow),
    )
    steps = checkpoint_steps(training)
    if resume is None:
        clock = time.perf_counter()
        pack = fresh(task, theta, buffers)
        evaluation = _evaluate(task, pack, step=0)
        yield _checkpoint(task, pack, 0, evaluation, {}, time.perf_counter() - clock)
    else:
        if (resume.pack_id, resume.seeds) != (pack_id, task.seeds):
            raise ValueError(
                f"cannot resume pack {pack_id} {task.seeds} from {resume.pack_id} {resume.seeds}"
            )
        pack = resumed(task, theta, resume)
        evaluation = {name: value.to(device) for name, value in resume.evaluation.items()}
        steps = (resume.step, *(step for step in steps if step > resume.step))
    for start, end in pairwise(steps):
        clock = time.perf_counter()
        rows = _segment(task, pack, start, end, evaluation)
        evaluation = _evaluate(task, pack, step=end)
        if end == training.steps:
            rows[end] = _last_row(task, pack, evaluation)
        yield _checkpoint(task, pack, end, evaluation, rows, time.perf_counter() - clock)


# ---- steps


def _segment(
    task: TrainingTask, pack: PackState, start: int, end: int, evaluation: Mapping[str, Tensor]
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


def _take_step(task: TrainingTask, pack: PackState, step: int, logged: bool) -> Row:
    """One step of the living members; the row is only filled where it is `logged`."""
    taken = take_step(task, pack, step)
    if not logged:
        return {}
    return measured(taken.losses, taken.gradient, pack.theta - taken.before, pack.alive)


def _evaluate(task: TrainingTask, pack: PackState, *, step: int) -> dict[str, Tensor]:
    """Evaluate at a checkpoint; NaN for members that have diverged, by this evaluation or before."""
    if not pack.anyone:
        return {name: torch.full_like(pack.initial_loss, torch.nan) for name in METRICS}
    evaluation = evaluate(task.stack, pack.theta, pack.buffers, task.loss, task.dataset)
    if step == 0:
        pack.initial_loss = evaluation["train_loss"].clone()
    pack.bury(acceptable(task, pack, evaluation["train_loss"]), step)
    return {name: masked(value, pack.alive) for name, value in evaluation.items()}


# ---- the log


def _last_row(task: TrainingTask, pack: PackState, evaluation: Mapping[str, Tensor]) -> Row:
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


def _log(task: TrainingTask, rows: Mapping[int, Row]) -> dict[str, Tensor]:
    """The rows by step as columns."""
    targets, batch_size = task.dataset.train.targets, task.training.batch_size
    batch = len(targets) if takes_all(len(targets), batch_size) else int(batch_size)
    nothing = torch.full((len(task.seeds),), torch.nan, dtype=torch.float64, device=targets.device)
    rates = [learning_rate(task.optimizer, step, task.training.steps) for step in rows]
    return LogShape(nothing, batch).columns(list(rows), rates, list(rows.values()))


# ---- the yield


def _checkpoint(
    task: TrainingTask,
    pack: PackState,
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
        shadow=shadow_states(pack.shadows),
        alive=pack.alive.clone(),
        diverged_at=pack.diverged_at.clone(),
        initial_loss=pack.initial_loss.clone(),
        evaluation=dict(evaluation),
        log=_log(task, rows),
        seconds=seconds,
    )
