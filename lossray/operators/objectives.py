"""What is differentiated: the mean loss of R members over fixed batches, as a function of theta [R, d].

An `Objective` is shared by the operators of a point. Two kinds exist: `PackedObjective` here, for the members
of a pack, and `ModuleObjective` (modules.py), for one module of the user's. Batches count by their number of
examples, or by the weights of these: a mean over examples, never a mean of batch means.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from lossray.limits import Limits
from lossray.networks.functional import call_model
from lossray.networks.holding import gradient_in_place, holding
from lossray.networks.layout import Layout
from lossray.networks.losses import Loss
from lossray.networks.recurrent import is_recurrent
from lossray.networks.stack import Stack

EXAMPLES_AT_ONCE = 4096  # in a forward pass without a graph


@dataclass(frozen=True)
class Batch:
    """Examples that are evaluated together.

    Attributes:
        inputs: tensors [B, ...]: one, or a nest of them; of a closure its whole batch.
        targets: tensors [B, ...]; None for a closure.
        share: of all examples (or of their weights) that lies in this batch.
        weights: [B], of the examples; None: all count alike.
    """

    inputs: Any
    targets: Any
    share: float
    weights: Tensor | None = None

    @property
    def size(self) -> int | None:
        """Number of examples B; None where the tensors do not share one."""
        sizes = {len(leaf) if leaf.ndim else -1 for leaf in leaves_of((self.inputs, self.targets))}
        size = sizes.pop() if len(sizes) == 1 else -1
        return size if size >= 0 else None

    def pick(self, index: Tensor | slice) -> "Batch":
        """The examples at ``index``, with their share."""
        inputs, targets = tree_map(
            lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, (self.inputs, self.targets)
        )
        if self.weights is None:
            part = replace(self, inputs=inputs, targets=targets)
            return replace(part, share=self.share * (part.size or 0) / (self.size or 1))
        weights = self.weights[index]
        share = self.share * float(weights.sum() / self.weights.sum())
        return Batch(inputs, targets, share, weights)

    def split(self, size: int | None) -> list["Batch"]:
        """Parts of ``size`` examples at most, as even as can be; the batch itself for None."""
        n = self.size
        if size is None or n is None or n <= size:
            return [self]
        parts = -(-n // size)
        edges = [n * i // parts for i in range(parts + 1)]
        pieces = [self.pick(slice(a, b)) for a, b in itertools.pairwise(edges)]
        return [piece for piece in pieces if piece.share > 0]


class Objective(Protocol):
    """The mean loss of R members over fixed batches."""

    theta: Tensor  # [R, d], a leaf in the dtype of the products; zeros for dead members
    dead: Tensor  # [R] bool: members with a parameter that is not finite; what is theirs becomes NaN
    may_diverge: bool  # whether a member's loss may be infinite, and its results then NaN
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    recurrent: bool  # whether the model has recurrent layers; see `exact_products`
    coupled: tuple[str, ...]  # layers that mix the examples of a batch, which is therefore never split
    names: Mapping[str, str]  # for messages: "model" and "loss"

    @property
    def limits(self) -> Limits:
        """How much is held at once."""

    @property
    def loss(self) -> Loss | None:
        """Of outputs and targets; None with a closure."""

    @property
    def divisible(self) -> bool:
        """Whether the loss of a batch is the mean over its parts."""

    @property
    def sizes(self) -> Sequence[int | None]:
        """Examples in each batch; None where that is not known."""

    def batches(self) -> Iterator[Batch]:
        """The batches, on the device and in the dtype, one after the other."""

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """Mean loss of every member over ``batch``, [R], differentiable in theta."""

    def outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """Outputs of every member, [R, B, ...], differentiable in theta."""

    def losses_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean losses [R] of ``outputs`` [R, B, ...]."""

    def example_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss of each example alone, [R, B]."""

    def plain_gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """Gradient [1, d] of the loss of one member, by the module with its weights changed in place.

        Another way than `losses`, which puts theta in the place of the registered parameters.
        """

    def plain_outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """Outputs [1, B, ...] of one member, in the same way; detached."""

    def to(self, dtype: torch.dtype) -> "Objective":
        """The same objective in another dtype, from the original parameters and data."""

    def member(self, r: int) -> "Objective":
        """The objective of one member alone."""


class PackedObjective:
    """The members of a pack in eval mode, all on the same examples.

    Args:
        stack: the architecture.
        theta: parameters [R, d]; copied.
        buffers: buffers by name, [R, *shape]; copied.
        loss: mean loss over the examples of a batch.
        batches: pairs (inputs, targets), of any sizes; empty ones count for nothing.
        dtype: of the products; parameters, buffers and floating data are converted to it.

    Raises:
        ValueError: there is no example.
    """

    def __init__(
        self,
        stack: Stack,
        theta: Tensor,
        buffers: Mapping[str, Tensor],
        loss: Loss,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        total = sum(len(targets) for _, targets in batches)
        if total == 0:
            raise ValueError("the curvature needs at least one example")
        self.stack, self.loss, self.layout = stack, loss, stack.layout
        self.device = theta.device
        self.coupled: tuple[str, ...] = ()
        self.recurrent = is_recurrent(stack.template)
        self.names: Mapping[str, str] = {
            "model": type(stack.template).__name__,
            "loss": getattr(loss, "__name__", "loss"),
        }
        self.dead = ~torch.isfinite(theta).all(dim=1)
        self.may_diverge = True
        self._raw = [Batch(x, y, len(y) / total) for x, y in batches if len(y)]
        self._point = theta.detach().clone()
        self._state = {name: tensor.detach().clone() for name, tensor in buffers.items()}
        self._convert(dtype)

    def _convert(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        values = self._point.to(dtype, copy=True).masked_fill_(self.dead[:, None], 0)
        self.theta = values.requires_grad_()
        self._buffers = {name: self._sound(tensor) for name, tensor in self._state.items()}

    def to(self, dtype: torch.dtype) -> "PackedObjective":
        """The same objective in another dtype, from the original parameters and data."""
        other = copy.copy(self)
        other._convert(dtype)
        return other

    def member(self, r: int) -> "PackedObjective":
        """The objective of one member alone."""
        other = copy.copy(self)
        other.dead, other._point = self.dead[r : r + 1], self._point[r : r + 1]
        other._state = {name: tensor[r : r + 1] for name, tensor in self._state.items()}
        other._convert(self.dtype)
        return other

    @property
    def divisible(self) -> bool:
        """A study's loss is a mean over examples, which is checked when it is planned."""
        return True

    @property
    def limits(self) -> Limits:
        """The stack's."""
        return self.stack.limits

    def moved(self, theta: Tensor) -> "PackedObjective":
        """The same members at other parameters [R, d]."""
        other = copy.copy(self)
        other._point = theta.detach().clone()
        other.dead = self.dead | ~torch.isfinite(theta).all(dim=1)
        other._convert(self.dtype)
        return other

    @property
    def sizes(self) -> list[int | None]:
        """Examples in each batch."""
        return [batch.size for batch in self._raw]

    def batches(self) -> Iterator[Batch]:
        """The batches, on the device and in the dtype."""
        for batch in self._raw:
            yield converted(batch, self.device, self.dtype)

    def losses(self, theta: Tensor, batch: Batch) -> Tensor:
        """Mean loss of every member over ``batch``, [R]."""
        return self.stack.losses(theta, self._buffers, batch.inputs, batch.targets, self.loss)

    def outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """Outputs of every member, [R, B, ...]."""
        return self.stack.outputs(theta, self._buffers, batch.inputs)

    def losses_of(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Mean losses [R] of ``outputs`` [R, B, ...]."""
        return self._each(self.loss, outputs, batch.targets)

    def example_losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Loss of each example alone, [R, B]."""
        return self._each(partial(example_losses, self.loss), outputs, batch.targets)

    def plain_gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        """Gradient [1, d] of the loss of one member; see `Objective`."""
        with self._held(theta) as parameters:
            value = self.loss(call_model(self.stack.template, batch.inputs), batch.targets)
            return gradient_in_place(value, parameters)[None]

    def plain_outputs(self, theta: Tensor, batch: Batch) -> Tensor:
        """Outputs [1, B, ...] of one member; see `Objective`."""
        with self._held(theta), torch.no_grad():
            outputs: Tensor = call_model(self.stack.template, batch.inputs)[None]
        return outputs

    def _held(self, theta: Tensor) -> AbstractContextManager[list[Tensor]]:
        """The template in eval mode with the weights of one member, [1, d], and its buffers."""
        self.stack.template.eval()
        buffers = {name: tensor[0] for name, tensor in self._buffers.items()}
        return holding(self.stack.template, {**self.layout.split(theta[0]), **buffers})

    def _each(self, function: Callable[..., Tensor], outputs: Tensor, targets: Any) -> Tensor:
        """``function(outputs, targets)`` of every member, by the stack's executor."""
        if self.stack.executor == "vmap" and len(outputs) > 1:
            values: Tensor = vmap(lambda member_outputs: function(member_outputs, targets))(outputs)
            return values
        return torch.stack([function(member_outputs, targets) for member_outputs in outputs])

    def _sound(self, buffer: Tensor) -> Tensor:
        """A copy of ``buffer`` [R, *shape] in the dtype of the products, with ones for dead members."""
        dtype = self.dtype if buffer.is_floating_point() else buffer.dtype
        dead = self.dead.view(-1, *[1] * (buffer.ndim - 1))
        return buffer.to(dtype, copy=True).masked_fill_(dead, 1)


def mean_losses(objective: Objective, theta: Tensor) -> Tensor:
    """Mean losses [R], float64, at any parameters [R, d], without a graph; of dead members anything."""
    total = torch.zeros(theta.shape[0], dtype=torch.float64, device=theta.device)
    with torch.no_grad():
        for batch in objective.batches():
            most = objective.limits.portion(EXAMPLES_AT_ONCE)
            large = (batch.size or 0) > most
            for part in batch.split(most if large and objective.divisible else None):
                total += part.share * objective.losses(theta, part).double()
    return total


def example_losses(loss: Loss, outputs: Tensor, targets: Any) -> Tensor:
    """The loss of each example as a batch of one, [B].

    Vectorised where the loss allows it, otherwise one after the other.
    """

    def single(output: Tensor, target: Any) -> Tensor:
        return loss(output[None], tree_map(lambda leaf: leaf[None], target))

    try:
        values: Tensor = vmap(single)(outputs, targets)
    except Exception:  # a user's loss may branch on values; vmap's errors have no common type
        rows = [
            loss(outputs[n : n + 1], tree_map(lambda leaf, n=n: leaf[n : n + 1], targets))
            for n in range(len(outputs))
        ]
        values = torch.stack(rows)
    return values


def converted(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on ``device``, its floating tensors in ``dtype``."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, MutableMapping):  # of a kind that pytree does not know, such as a UserDict
            moved = copy.copy(leaf)
            moved.update({key: tree_map(move, value) for key, value in leaf.items()})
            return moved
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(device, dtype if leaf.is_floating_point() else leaf.dtype)

    inputs, targets, weights = tree_map(move, (batch.inputs, batch.targets, batch.weights))
    return Batch(inputs, targets, batch.share, weights)


def leaves_of(tree: Any) -> list[Tensor]:
    """The tensors in a nest."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
