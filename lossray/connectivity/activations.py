"""Which hidden channel of one model stands for which of another, by their activations on the same inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lossray.connectivity.weight_matching import Permutations, assignment
from lossray.errors import ModelError
from lossray.networks.architecture import Node, graph_of
from lossray.networks.copies import double_copy
from lossray.networks.observed import values_of
from lossray.networks.permutations import ChannelPosition, PermutationSymmetry

EXAMPLES_AT_ONCE = 256  # of which all activations are held
KINDS = ("linear", "conv", "norm", "homogeneous", "smooth", "add")  # what changes the channels' values


def activation_matching(
    symmetry: PermutationSymmetry, model: nn.Module, to: nn.Module, inputs: Sequence[Any]
) -> Permutations:
    """The permutation of each group whose channels correlate most with those of ``to`` (2209.04836, 3.1).

    The correlation is Pearson's over examples and pixels, and thus blind to the channels' scale. It is summed
    over all layers, norms, activations and sums that hold the group's channels, so that a unit that is never
    active is told from others by what goes into it.

    Args:
        symmetry: of both models.
        model: what is to be permuted; evaluated in eval mode and float64, as is ``to``. Both are left alone.
        to: a model of the same architecture.
        inputs: batches, as `call_model` takes them, on the model's device.

    Raises:
        ModelError: the architectures differ.
    """
    twins = [double_copy(original) for original in (model, to)]
    for twin in twins:
        twin.to(next(twins[0].parameters()).device)
    graphs = [graph_of(twin) for twin in twins]
    if [(node.name, node.kind, node.inputs) for node in graphs[0]] != [
        (node.name, node.kind, node.inputs) for node in graphs[1]
    ]:
        raise ModelError("align: the two models are not of one architecture: their operations differ")
    moments: dict[str, Moments] = {}
    with torch.no_grad():
        for batch in inputs:
            for part in _parts(batch):
                _observe(symmetry, (graphs[0], graphs[1]), part, moments)
    gains = {
        g: torch.zeros(count, count, dtype=torch.float64, device="cpu")
        for g, count in symmetry.groups.items()
    }
    for node, position in symmetry.positions.items():
        if node in moments:
            gains[position.group] += moments[node].correlation().cpu()
    return {group: assignment(gain) for group, gain in gains.items()}


@dataclass
class Moments:
    """Of the channels of two models at one node, over what has been seen.

    Attributes:
        n: examples and positions seen.
        means: of the model's channels and of the other's, [C] each.
        squares: sums of squared deviations, [C] each.
        products: sums of products of deviations, [C of the other, C of the model].
    """

    n: int
    means: tuple[Tensor, Tensor]
    squares: tuple[Tensor, Tensor]
    products: Tensor

    @staticmethod
    def of(model: Tensor, other: Tensor) -> "Moments":
        """Of values [n, C] each."""
        means = (model.mean(dim=0), other.mean(dim=0))
        model, other = model - means[0], other - means[1]
        squares = (model.square().sum(dim=0), other.square().sum(dim=0))
        return Moments(len(model), means, squares, other.T @ model)

    def merged(self, new: "Moments") -> "Moments":
        """Of both together (Chan, Golub & LeVeque 1983: without cancellation)."""
        n = self.n + new.n
        share = self.n * new.n / n
        shifts = tuple(after - before for before, after in zip(self.means, new.means, strict=True))
        means = tuple(mean + shift * (new.n / n) for mean, shift in zip(self.means, shifts, strict=True))
        squares = tuple(
            one + other + share * shift.square()
            for one, other, shift in zip(self.squares, new.squares, shifts, strict=True)
        )
        products = self.products + new.products + share * torch.outer(shifts[1], shifts[0])
        return Moments(n, (means[0], means[1]), (squares[0], squares[1]), products)

    def correlation(self) -> Tensor:
        """[C of the other, C of the model]; 0 where a channel is constant."""
        sizes = torch.outer(self.squares[1].sqrt(), self.squares[0].sqrt())
        return (self.products / sizes).nan_to_num(0, 0, 0)


def _observe(
    symmetry: PermutationSymmetry,
    graphs: tuple[tuple[Node, ...], tuple[Node, ...]],
    inputs: Any,
    moments: dict[str, Moments],
) -> None:
    """Add one batch to the moments, by name of the node."""
    for (node, value), (_, other) in zip(*(values_of(graph, inputs) for graph in graphs), strict=True):
        position = symmetry.positions.get(node.name)
        if position is None or position.axis not in ("channel", "last") or node.kind not in KINDS:
            continue
        new = Moments.of(_by_channel(value, position), _by_channel(other, position))
        moments[node.name] = moments[node.name].merged(new) if node.name in moments else new


def _parts(inputs: Any) -> Iterator[Any]:
    """The inputs of a batch, some examples at a time."""
    size = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    for start in range(0, size, EXAMPLES_AT_ONCE):
        rows = slice(start, start + EXAMPLES_AT_ONCE)
        yield tree_map(lambda leaf, rows=rows: leaf[rows] if isinstance(leaf, Tensor) else leaf, inputs)


def _by_channel(value: Tensor, position: ChannelPosition) -> Tensor:
    return (value.movedim(1, -1) if position.axis == "channel" else value).flatten(0, -2)
