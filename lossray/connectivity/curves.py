"""Curves of low loss between two models, trained and evaluated for all members of a pack at once.

Garipov et al. (arXiv 1802.10026) minimise E_{t ~ U(0, 1)} L(phi(t)) over the bends of a curve phi. The
gradient of a bend is that of the loss at phi(t) times the derivative of phi(t) by the bend, a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.connectivity.paths import CURVES, Path
from lossray.networks.batch_norm import has_statistics, refresh_statistics
from lossray.networks.losses import Loss
from lossray.networks.stack import Members, Stack
from lossray.seeds import generator
from lossray.training.batches import gradient_in_training, next_minibatch
from lossray.training.datasets import Dataset
from lossray.training.evaluation import METRICS, evaluate
from lossray.training.optimizers import PackedOptimizer
from lossray.training.steps import TrainingTask, all_finite, below_limit

MEMBERS_AT_ONCE = 64  # points of paths that are evaluated as members of one stack
PARAMETERS_AT_ONCE = 2**24  # of all of them: 64 MB in float32


@dataclass(frozen=True)
class Curves:
    """Trained curves.

    Attributes:
        path: with the same ends. The bends of a member that diverged are its last finite ones.
        alive: [R] bool, whether a member has not diverged.
    """

    path: Path
    alive: Tensor


def train_curves(task: TrainingTask, path: Path, buffers: Members, *, initial_loss: Tensor) -> Curves:
    """Train the bends of a path in `task.training.steps` steps; the ends stay as they are.

    Each step draws one t and one minibatch per member, in train mode. Weight decay acts on the bends as on
    any parameters: it is that of the optimizer, the gradient of a *squared* norm (the code of the paper adds
    up norms). Learning rates of single parameters in `task` do not apply. Members do not influence each
    other: one whose loss, gradient or bends diverge, as in training, is frozen, and the others are not
    affected in any bit.

    Args:
        task: what a training needs; `task.seeds` name the minibatches, the noise and the ts.
        path: polychain or bezier; not changed.
        buffers: of the ends by name, [R, *shape]; not changed. Batch norm uses those of the minibatch.
        initial_loss: [R], the loss that `diverged_above` multiplies: that of an untrained model, say, since
            trained ends may have almost none.

    Raises:
        ValueError: the path has no bends.
    """
    if path.kind not in CURVES:
        raise ValueError(f"found a path of kind {path.kind!r}; allowed: {', '.join(CURVES)}")
    curve = Path(path.kind, path.points.detach().clone())
    buffer_copies = {name: tensor.detach().clone() for name, tensor in buffers.items()}
    bends = curve.bends.flatten(0, 1)  # a view [bends * R, d]: optimizers treat them as members of one stack
    optimizer = PackedOptimizer(task.optimizer, bends, task.stack.layout)
    members, initial_loss = len(task.seeds), initial_loss.to(bends.device)
    alive = torch.ones(members, dtype=torch.bool, device=bends.device)
    for step in range(task.training.steps):
        losses, gradient = _gradient(task, curve, buffer_copies, step)
        bounded = below_limit(losses, initial_loss, task.training.diverged_above, losses.dtype)
        alive = alive & bounded & all_finite(gradient).view(-1, members).all(dim=0)
        if not bool(alive.any()):
            break
        before = bends.clone()
        living = None if bool(alive.all()) else alive.repeat(len(curve.bends))
        optimizer.step(gradient, task.learning_rate(step), alive=living)
        alive = alive & all_finite(bends).view(-1, members).all(dim=0)
        if not bool(alive.all()):
            frozen = ~alive.repeat(len(curve.bends))
            bends[frozen] = before[frozen]
    return Curves(curve, alive)


def _gradient(
    task: TrainingTask, curve: Path, buffers: dict[str, Tensor], step: int
) -> tuple[Tensor, Tensor]:
    """Losses [R] at this step's ts and the gradients of all bends, [bends * R, d]."""
    ts = torch.cat(
        [
            torch.rand(1, generator=generator(seed, "curve", step), device="cpu", dtype=torch.float64)
            for seed in task.seeds
        ]
    )
    batch = next_minibatch(task.dataset, task.training, task.seeds, step)
    losses, gradient = gradient_in_training(
        task.stack, curve.at(ts), buffers, task.loss, batch, task.seeds, step
    )
    factors = curve.coefficients(ts)[1:-1, :, None].to(gradient.dtype)
    return losses, (factors * gradient).flatten(0, 1)


# ---- evaluation


def evaluate_path(
    path: Path,
    stack: Stack,
    buffers_a: Members,
    buffers_b: Members,
    loss: Loss,
    dataset: Dataset,
    ts: Sequence[float],
    *,
    alike: bool = False,
) -> dict[str, Tensor]:
    """Loss and accuracy on all splits at T places of each path.

    The ends have their own buffers as they are. Batch norm statistics belong to no point between them: there
    they are those of the training inputs (`refresh_statistics`).

    Args:
        path: of R members.
        stack: the architecture.
        buffers_a: of the ends at t = 0, by name, [R, *shape]; the other buffers of all inner points.
        buffers_b: of the ends at t = 1.
        loss: mean over examples.
        dataset: on the device of the path.
        ts: places, 0 to 1.
        alike: treat the ends as what lies between them.

    Returns:
        METRICS of lossray.training.evaluation by name, [R, T] float64.
    """
    members = path.points.shape[1]
    collected: dict[str, list[Tensor]] = {name: [] for name in METRICS}
    inputs = dataset.train.inputs
    for theta, buffers in points_along(path, stack, buffers_a, buffers_b, inputs, ts, alike=alike):
        for name, values in evaluate(stack, theta, buffers, loss, dataset).items():
            collected[name].append(values.view(-1, members))
    return {name: torch.cat(values).T.contiguous() for name, values in collected.items()}


def points_along(
    path: Path,
    stack: Stack,
    buffers_a: Members,
    buffers_b: Members,
    inputs: Tensor,
    ts: Sequence[float],
    *,
    alike: bool = False,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Parameters [P * R, d] and buffers [P * R, *shape] at P places after the other, until all T are done.

    With ``alike`` batch norm has recomputed statistics at the ends too.
    """
    members, dim = path.points.shape[1:]
    at_once = max(1, min(MEMBERS_AT_ONCE // members, PARAMETERS_AT_ONCE // (members * dim)))
    for start in range(0, len(ts), at_once):
        times = ts[start : start + at_once]
        theta = torch.cat([path.at(t) for t in times])
        sides = [buffers_b if t == 1 else buffers_a for t in times]
        buffers = {name: torch.cat([side[name] for side in sides]) for name in buffers_a}
        inner = torch.tensor([alike or 0 < t < 1 for t in times], device=theta.device).repeat_interleave(
            members
        )
        if has_statistics(stack.template) and bool(inner.any()):
            refreshed = refresh_statistics(stack, theta, buffers, inputs)
            buffers = {
                name: torch.where(inner.view(-1, *[1] * (tensor.ndim - 1)), refreshed[name], tensor)
                for name, tensor in buffers.items()
            }
        yield theta, buffers
