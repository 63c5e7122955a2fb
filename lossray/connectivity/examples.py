"""A user's batches as one set of examples that are named by their numbers.

Minibatches are drawn across batches, and inputs and targets may be any nest of tensors: a stack and its
training, which know tensors alone, are given the numbers, and model and loss look the examples up.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lossray.errors import DataError
from lossray.networks.functional import call_model
from lossray.networks.losses import Loss
from lossray.operators.objectives import Batch, example_losses


@dataclass(frozen=True)
class IndexedExamples:
    """All examples of a data set.

    Attributes:
        inputs: tensors [N, ...]: one, or a nest of them.
        targets: tensors [N, ...].
        weights: [N] of mean 1; None: all count alike.
        sizes: of the batches that they came in.
        device: where they are.
    """

    inputs: Any
    targets: Any
    weights: Tensor | None
    sizes: tuple[int, ...]
    device: torch.device

    @cached_property
    def indices(self) -> Tensor:
        """The numbers of all examples, [N] int64."""
        return torch.arange(sum(self.sizes), device=self.device)

    def chunks(self) -> tuple[Tensor, ...]:
        """The numbers of the examples in each of the user's batches, which fit into memory."""
        return torch.split(self.indices, list(self.sizes))

    def loss(self, loss: Loss) -> Loss:
        """The user's loss as a function of outputs and the numbers of their examples."""

        def numbered(outputs: Tensor, indices: Tensor) -> Tensor:
            targets = _rows(self.targets, indices)
            if self.weights is None:
                return loss(outputs, targets)
            return (example_losses(loss, outputs, targets) * self.weights[indices]).mean()

        return numbered


class Indexed(nn.Module):
    """A model as a function of the numbers [B] of examples."""

    def __init__(self, model: nn.Module, examples: IndexedExamples) -> None:
        super().__init__()
        self.model = model
        self.examples = examples

    def forward(self, indices: Tensor) -> Any:
        """The model's outputs for these examples."""
        return call_model(self.model, _rows(self.examples.inputs, indices))


def joined(batches: Iterable[Batch]) -> IndexedExamples:
    """The examples of all batches, in their order.

    Raises:
        DataError: batches that differ in more than their number of examples.
    """
    parts = list(batches)
    flat = [tree_flatten((part.inputs, part.targets)) for part in parts]
    if any(spec != flat[0][1] for _, spec in flat):
        raise DataError("batches of data: found different nests of tensors; all must have one structure")
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    inputs, targets = tree_unflatten([_concatenated(column) for column in columns], flat[0][1])
    sizes = tuple(part.size or 0 for part in parts)
    device = next(leaf.device for leaf in flat[0][0] if isinstance(leaf, Tensor))
    return IndexedExamples(inputs, targets, _weights(parts, device), sizes, device)


def _concatenated(column: tuple[Any, ...]) -> Any:
    """One leaf of all batches as one."""
    first = column[0]
    if not isinstance(first, Tensor):
        if any(leaf != first for leaf in column):
            raise DataError(f"batches of data: found {first!r} in one and another value in others")
        return first
    shapes = sorted({str(list(leaf.shape[1:])) for leaf in column})
    if len(shapes) > 1:
        raise DataError(
            f"batches of data: found examples of the shapes {', '.join(shapes)}; minibatches are drawn "
            "across batches, so that all need one shape: pad them alike"
        )
    return torch.cat(column)


def _weights(parts: list[Batch], device: torch.device) -> Tensor | None:
    """Weights of mean 1."""
    if all(part.weights is None for part in parts):
        return None
    weights = torch.cat(
        [
            part.weights if part.weights is not None else torch.ones(part.size or 0, device="cpu")
            for part in parts
        ]
    ).to(device)
    return weights / weights.mean()


def _rows(tree: Any, indices: Tensor) -> Any:
    return tree_map(lambda leaf: leaf[indices] if isinstance(leaf, Tensor) else leaf, tree)
