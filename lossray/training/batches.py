"""Which examples each step sees, and the loss and gradient of exactly that step.

The order is a pure function of a run's seed and the step, so any task can recompute the batch of any step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from lossray.networks.losses import Loss
from lossray.networks.nests import Inputs, mapped
from lossray.networks.stack import Stack
from lossray.seeds import generator, stream
from lossray.training.datasets import Dataset
from lossray.training.settings import TrainingSettings

BatchSize = int | Literal["full"]


@dataclass(frozen=True)
class Minibatch:
    """The examples of one step.

    Attributes:
        inputs: [R, B, ...] if ``per_member``, else [B, ...]; or a nest of such tensors.
        targets: [R, B, ...] or [B, ...].
        per_member: whether every member has examples of its own.
    """

    inputs: Inputs
    targets: Tensor
    per_member: bool


def takes_all(n: int, batch_size: BatchSize) -> bool:
    """Whether every step sees all of `n` examples."""
    return batch_size == "full" or batch_size >= n


def batch_indices(seed: int, step: int, n: int, batch_size: BatchSize) -> Tensor:
    """The examples [B] (int64) that a run sees at a step, out of `n`.

    Each epoch is a random permutation, cut into batches; what is left over at its end is dropped. Where a
    batch takes all examples, they come in their own order.
    """
    if takes_all(n, batch_size):
        return torch.arange(n, device="cpu")
    return _pack_indices((seed,), step, n, int(batch_size))[0]


def _pack_indices(seeds: tuple[int, ...], step: int, n: int, batch_size: int) -> Tensor:
    """`batch_indices` of every member, [R, B]."""
    epoch, batch = divmod(step, n // batch_size)
    return _epoch_orders(seeds, epoch, n)[:, batch * batch_size : (batch + 1) * batch_size]


@lru_cache(maxsize=2)  # the epoch in training, and one that an analysis asks for
def _epoch_orders(seeds: tuple[int, ...], epoch: int, n: int) -> Tensor:
    """The permutations of one epoch, [R, n]."""
    return torch.stack(
        [torch.randperm(n, generator=generator(seed, "order", epoch), device="cpu") for seed in seeds]
    )


def next_minibatch(
    dataset: Dataset, training: TrainingSettings, seeds: Sequence[int], step: int
) -> Minibatch:
    """The training examples of every member at `step`, on the device of the data set."""
    split = dataset.train
    n = len(split.targets)
    if takes_all(n, training.batch_size):
        return Minibatch(split.inputs, split.targets, per_member=False)
    indices = _pack_indices(tuple(seeds), step, n, int(training.batch_size)).to(split.targets.device)
    inputs = mapped(lambda tensor: _rows(tensor, indices), split.inputs)
    return Minibatch(inputs, _rows(split.targets, indices), per_member=True)


def _rows(tensor: Tensor, indices: Tensor) -> Tensor:
    """A copy of `tensor[indices]`, made several times faster."""
    rows = tensor.index_select(0, indices.flatten())
    return rows.view(*indices.shape, *tensor.shape[1:])


def step_gradient(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    dataset: Dataset,
    training: TrainingSettings,
    seeds: Sequence[int],
    step: int,
) -> tuple[Tensor, Tensor]:
    """What training computes at `step`: loss and gradient on the run's actual minibatch, in train mode.

    Nothing is changed: batch norm updates copies of `buffers`. The gradient is that of the loss alone,
    without weight decay.

    Args:
        stack: the architecture.
        theta: parameters [R, d].
        buffers: by name, [R, *shape].
        loss: `loss(outputs, targets)`, the mean over examples.
        dataset: on the device of `theta`.
        training: the batch size counts.
        seeds: the members' seeds, which name their batches and noise.
        step: from 0; the last step's successor is valid too.

    Returns:
        Losses [R] and gradient [R, d], detached.
    """
    copies = {name: tensor.clone() for name, tensor in buffers.items()}
    return gradient_in_training(
        stack, theta, copies, loss, next_minibatch(dataset, training, seeds, step), seeds, step
    )


def gradient_in_training(
    stack: Stack,
    theta: Tensor,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    batch: Minibatch,
    seeds: Sequence[int],
    step: int,
) -> tuple[Tensor, Tensor]:
    """`step_gradient` on a given batch; batch norm updates `buffers` in place."""
    return stack.gradients(
        theta,
        buffers,
        batch.inputs,
        batch.targets,
        loss,
        train=True,
        keys=[stream(seed, "noise", step) for seed in seeds],
        per_member=batch.per_member,
    )
