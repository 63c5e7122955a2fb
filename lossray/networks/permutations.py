"""The permutation symmetry: which hidden channels can change places, and every tensor that must follow.

Unlike rescaling it survives any elementwise activation, and it goes through norm layers, whose affine
parameters and running statistics move with the channels (Ainsworth et al., "Git Re-Basin", arXiv 2209.04836).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lossray.errors import ModelError
from lossray.names import unknown_name
from lossray.networks.architecture import Node
from lossray.networks.as_found import copied
from lossray.networks.channels import (
    Channels,
    HiddenGroup,
    Walk,
    axes_of,
    described,
    fix_shared_and_frozen,
    flattened,
    free_groups,
    layer,
    pooled,
    summed,
)
from lossray.networks.layout import uncompiled
from lossray.networks.observed import REMEDY, Observed, observe
from lossray.seeds import generator

Permutation = Sequence[int] | Tensor


@dataclass(frozen=True)
class ChannelUse:
    """A parameter or buffer at the channels of one group.

    Attributes:
        tensor: its name in the model.
        elements: flat indices of the elements of each channel, in the same order, [count, m] int64.
        outgoing: whether it holds weights that read the channels; otherwise what makes them: weights, biases,
            statistics.
    """

    tensor: str
    elements: Tensor
    outgoing: bool


@dataclass(frozen=True)
class ChannelPosition:
    """Where the channels of a group are in the value of a node of the model's graph.

    Attributes:
        group: its name.
        axis: "channel" (axis 1), "last", or a flattened last axis: "blocks" or "tiles" (see `Channels`).
    """

    group: str
    axis: str


@dataclass(frozen=True)
class PermutationSymmetry:
    """The hidden channels of a model that can be permuted, by group, in the order of the graph.

    A group is the channels of one layer, or of all layers whose outputs are added, by the name of the first.

    Attributes:
        groups: number of channels of each.
        uses: the parameters and buffers in which its channels appear. A weight between two groups is in both.
        positions: by name of a node of the model's graph, where its value holds a group's channels.
        seen: the graph at work, and the inputs on which the symmetry was tried.
    """

    groups: dict[str, int]
    uses: dict[str, tuple[ChannelUse, ...]]
    positions: dict[str, ChannelPosition]
    seen: Observed = field(repr=False)

    def apply(self, tensors: Mapping[str, Tensor], permutations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors after the permutations: what channel p[c] was, channel c becomes.

        Args:
            tensors: parameters and buffers by name; those that are missing are passed over.
            permutations: p of each group that changes, [count] int64.
        """
        new = dict(tensors)
        for group, permutation in permutations.items():
            for use in self.uses[group]:
                if use.tensor in new:
                    new[use.tensor] = _moved(new[use.tensor], use.elements, permutation)
        return new


def permutation_symmetry(model: nn.Module, data: Any = None) -> PermutationSymmetry:
    """The permutation symmetry of ``model``, derived from its operations and tried.

    Channels stay where they are if they reach the output, a grouped convolution, a group norm of several
    groups, a reshape, attention, or any operation that is not known; so do those with a weight that is frozen
    or used in more than one place. What is found is tried on a copy with other weights: the outputs must
    stay.

    Args:
        model: left as it is.
        data: some of its inputs, see `sample_of`; None: inputs that fit its layers are made up.

    Raises:
        ModelError: nothing can be permuted, the message names what is in the way; the outputs depend on more
            than the operations show; or no inputs are known.
        DataError: data without inputs.
    """
    seen = observe(model, data)
    root = uncompiled(model)
    walk = Walk()
    values: dict[str, Channels | None] = {}
    for node in seen.graph:
        values[node.name] = _step(walk, node, [values[name] for name in node.inputs], seen)
    fix_shared_and_frozen(walk, root, seen.graph, buffers_change=True)
    free = dict(free_groups(walk))
    if not free:
        causes = walk.reasons or ["it has no hidden layer"]
        raise ModelError(
            f"{type(root).__name__} has no hidden channels that can be permuted: {causes[0]}; it needs a "
            "hidden layer with nothing but elementwise activations, norms, pooling, dropout or sums before "
            "the next layer"
        )
    names = {id(tensor): name for name, tensor in (*root.named_parameters(), *root.named_buffers())}
    symmetry = PermutationSymmetry(
        groups={group.name: group.count for group in free.values()},
        uses={group.name: _uses(group, names) for group in free.values()},
        positions={
            name: ChannelPosition(free[walk.root(value.group)].name, value.axis)
            for name, value in values.items()
            if value is not None and walk.root(value.group) in free
        },
        seen=seen,
    )
    draw = generator(0, "tried permutations")
    seen.require_kept(model, lambda module: permuted(module, symmetry, _drawn(symmetry, draw)))
    return symmetry


def permute(model: nn.Module, permutations: Mapping[str, Permutation], data: Any = None) -> nn.Module:
    """A copy of a model whose hidden channels have changed places: the same function.

    Args:
        model: left as it is.
        permutations: by name of the group, what channel becomes channel 0, 1, ... Groups without one stay.
        data: some inputs of the model, on which it is checked that the function stays; see
            `permutation_symmetry`.

    Returns:
        A new model in the same mode. The outputs change by rounding alone, as sums run in another order.

    Raises:
        ModelError: nothing can be permuted, a name or a permutation that cannot be used, or the function
            changes by more than rounding.
        DataError: data without inputs.
    """
    symmetry = permutation_symmetry(model, data)
    if not isinstance(permutations, Mapping):
        raise ModelError(
            f"permute, permutations: found {type(permutations).__name__}; allowed: a dict, group to "
            "permutation"
        )
    checked = {}
    for name, given in permutations.items():
        if name not in symmetry.groups:
            raise ModelError(f"permute, group: {unknown_name(str(name), symmetry.groups)}")
        checked[name] = _checked(name, given, symmetry.groups[name])
    symmetry.seen.require_kept(model, lambda module: permuted(module, symmetry, checked), as_it_is=True)
    return permuted(model, symmetry, checked)


def permuted(
    model: nn.Module, symmetry: PermutationSymmetry, permutations: Mapping[str, Tensor]
) -> nn.Module:
    """A copy of a model after permutations that are known to be its own; nothing is checked."""
    new = copied(uncompiled(model))
    tensors = {name: tensor.detach() for name, tensor in (*new.named_parameters(), *new.named_buffers())}
    for name, tensor in symmetry.apply(tensors, permutations).items():
        tensors[name].copy_(tensor)
    return new


def _drawn(symmetry: PermutationSymmetry, draw: torch.Generator) -> dict[str, Tensor]:
    """A random permutation of each group."""
    return {
        name: torch.randperm(count, generator=draw, device="cpu") for name, count in symmetry.groups.items()
    }


def _moved(tensor: Tensor, elements: Tensor, permutation: Tensor) -> Tensor:
    elements, permutation = elements.to(tensor.device), permutation.to(tensor.device)
    flat = tensor.reshape(-1)
    new = flat.clone()
    new[elements] = flat[elements[permutation]]
    return new.view(tensor.shape)


def _uses(group: HiddenGroup, names: Mapping[int, str]) -> tuple[ChannelUse, ...]:
    return tuple(
        ChannelUse(
            names[id(use.tensor)],
            use.channels.reshape(-1).argsort(stable=True).view(group.count, -1),
            use.outgoing,
        )
        for use in group.uses
    )


def _checked(name: str, given: Permutation, count: int) -> Tensor:
    try:
        values = torch.as_tensor(given).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0, device="cpu")
    whole = not values.is_floating_point() and not values.is_complex()
    if not whole or not torch.equal(values.long().sort().values, torch.arange(count, device="cpu")):
        raise ModelError(
            f"permute, permutation of {name!r}: found {given!r}; allowed: each of 0 to {count - 1} once"
        )
    return values.long()


def _step(walk: Walk, node: Node, inputs: list[Channels | None], seen: Observed) -> Channels | None:
    """The channels of a node's value; None where there are none that could be permuted."""
    if node.kind == "linear" or (node.kind == "conv" and getattr(node.module, "groups", 1) == 1):
        return layer(walk, node, inputs[0])
    if node.kind == "add":
        return summed(walk, node, inputs)
    if node.kind in ("smooth", "homogeneous", "dropout", "norm", "pool", "maxpool", "flatten"):
        return None if inputs[0] is None else _through(walk, node, inputs[0], seen)
    if node.kind == "conv":
        walk.fix(inputs, f"{described(node)} is a grouped convolution")
    elif node.kind == "other":
        walk.fix(inputs, f"{described(node)} is not known to treat all channels alike")
    elif node.kind != "shape":
        walk.fix(inputs)
    return None


def _through(walk: Walk, node: Node, value: Channels, seen: Observed) -> Channels | None:
    """An operation that every channel goes through in the same way, but for tensors that move with it."""
    if node.kind == "flatten" and seen.flattens(node):
        return flattened(value)
    if node.kind == "flatten":
        walk.fix([value], f"{described(node)} mixes channels with other axes")
        return None
    if node.kind in ("pool", "maxpool") and not pooled(node, value):
        walk.fix([value], f"{described(node)} pools an axis of channels")
        return None
    if _takes_axis_1(node.module) and value.axis != "channel":
        axes = axes_of(seen, node.inputs[0], value)
        if axes is None:
            walk.fix(
                [value], f"{described(node)} acts along axis 1, which may hold channels or not: {REMEDY}"
            )
            return None
        if axes > 2:
            return value  # along the tokens: all channels alike
    if node.kind == "norm" and not _treats_alike(node.module, value):
        walk.fix([value], f"{described(node)} does not normalise all channels alike")
        return None
    names = ("weight", "bias", "running_mean", "running_var")
    for tensor in [getattr(node.module, name, None) for name in names]:
        if not isinstance(tensor, Tensor) or _shared_by_all(node.module, value):
            continue
        channels = _channels_of(tensor, value)
        if channels is None:
            walk.fix([value], f"{described(node)} acts along axes whose channels are not known")
            return None
        walk.attach(value.group, (tensor, channels))
    return value


def _takes_axis_1(module: nn.Module | None) -> bool:
    """Whether a layer has parameters, statistics or groups along axis 1."""
    norm = isinstance(module, _NormBase | nn.GroupNorm)
    return norm or (isinstance(module, nn.PReLU) and module.num_parameters > 1)


def _treats_alike(norm: nn.Module | None, value: Channels) -> bool:
    """Whether the statistics of a norm are those of one channel, or of all channels together."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups in (1, norm.num_channels)
    if isinstance(norm, nn.LayerNorm) and value.axis == "channel":
        return len(norm.normalized_shape) <= 1 + value.spatial
    instance = isinstance(norm, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
    return value.axis == "channel" or not instance


def _shared_by_all(module: nn.Module | None, value: Channels) -> bool:
    """Whether the tensors of a layer are one for all channels: a scalar, or along the spatial axes alone."""
    if isinstance(module, nn.PReLU):
        return module.num_parameters == 1
    if isinstance(module, nn.LayerNorm) and value.axis == "channel":
        return len(module.normalized_shape) <= value.spatial
    return False


def _channels_of(tensor: Tensor, value: Channels) -> Tensor | None:
    """The channel of each element of a tensor that multiplies, or is added to, the value."""
    if value.axis == "channel":
        channels = torch.arange(value.count, device="cpu").view(-1, *(1 for _ in tensor.shape[1:]))
        return channels.expand_as(tensor) if len(tensor) == value.count else None
    along = value.along(tensor.shape[-1])
    return None if along is None else along.expand_as(tensor)
