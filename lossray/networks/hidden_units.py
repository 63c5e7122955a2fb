"""Which hidden channels of a model can be rescaled, and which weights go into and out of each (SCIENCE 5C).

A walk through the graph follows the channels of every linear, convolution and norm layer up to the layers
that use them. Channels that are added share one group. A group is *fixed*, and so no hidden unit, where its
channels reach the output, a norm, or an operation that is not positively homogeneous.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.networks.architecture import Node, graph_of
from lossray.networks.layout import uncompiled


@dataclass(frozen=True)
class WeightUse:
    """A parameter at the channels of one group: their incoming weights, or their outgoing ones."""

    parameter: Tensor
    channels: Tensor  # the channel of each element, int64, of the parameter's shape
    outgoing: bool


@dataclass(frozen=True)
class HiddenGroup:
    """Hidden channels of one layer, or of all layers whose channels are added to each other."""

    name: str  # of the first of these layers
    count: int
    uses: tuple[WeightUse, ...]


def hidden_groups(model: nn.Module) -> tuple[HiddenGroup, ...]:
    """The groups of rescalable channels, in the order of the graph.

    With a norm layer its affine parameters are the incoming weights, and the layer before it is left alone.
    Affine parameters without an activation behind them (pre-norm attention) make no hidden units.

    Raises:
        ModelError: there are none; the message names the layer that breaks the symmetry.
    """
    graph = graph_of(model)
    walk = _Walk()
    values: dict[str, _Channels | None] = {}
    for node in graph:
        values[node.name] = _step(walk, node, [values[name] for name in node.inputs])
    _fix_shared_and_frozen(walk, uncompiled(model), graph)
    groups = tuple(_free_groups(walk))
    if not groups:
        smooth = [reason for reason in walk.reasons if reason.startswith("activation")]
        causes = smooth or walk.reasons or ["it has no hidden layer to rescale"]
        raise ModelError(
            f"{type(uncompiled(model)).__name__} has no ReLU rescaling symmetry: {causes[0]}; it needs a "
            "hidden layer with nothing but relu, leaky relu, pooling, dropout or sums before the next layer"
        )
    return groups


@dataclass(frozen=True)
class _Channels:
    """Where the channels of a group are in the value of a node.

    ``axis`` is "channel" (axis 1, with ``spatial`` axes after it), "last", or a last axis that was flattened:
    "blocks" (images: the pixels of a channel lie together) or "tiles" (tokens: the channels do).
    """

    group: int
    count: int
    axis: str
    spatial: int = 0


@dataclass
class _Walk:
    """What has been found: groups joined by sums (union-find), and their weights."""

    names: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    uses: list[tuple[int, WeightUse]] = field(default_factory=list)
    units: set[int] = field(default_factory=set)  # groups behind a linear layer, convolution or activation
    fixed: set[int] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    def new(self, node: Node, count: int, *weights: tuple[Tensor | None, Tensor]) -> int:
        """A group with its incoming weights, each with its elements' channels."""
        group = len(self.names)
        self.names.append(node.name)
        self.counts.append(count)
        self.parents.append(group)
        self.uses += [(group, WeightUse(w, channels, False)) for w, channels in weights if w is not None]
        return group

    def root(self, group: int) -> int:
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.root(one), self.root(other)))
        self.parents[second] = first

    def fix(self, values: Sequence[_Channels | None], reason: str = "") -> None:
        self.fixed |= {value.group for value in values if value is not None}
        if reason:
            self.reasons.append(reason)


def _step(walk: _Walk, node: Node, inputs: list[_Channels | None]) -> _Channels | None:
    """The channels of a node's value; None where nothing in it can be rescaled."""
    if node.kind in ("linear", "conv"):
        return _layer(walk, node, inputs[0])
    if node.kind == "norm":
        return _norm(walk, node, inputs[0])
    if node.kind == "add":
        return _sum(walk, node, inputs)
    if node.kind in ("homogeneous", "dropout"):
        if node.kind == "homogeneous" and inputs[0] is not None and not isinstance(node.module, nn.Identity):
            walk.units.add(inputs[0].group)
        return inputs[0]
    if node.kind in ("pool", "maxpool") and inputs[0] is not None and inputs[0].axis == "channel":
        return inputs[0]
    if node.kind == "flatten" and inputs[0] is not None:
        flat = {"channel": "blocks", "last": "tiles"}.get(inputs[0].axis, inputs[0].axis)
        return replace(inputs[0], axis=flat, spatial=0)
    if node.kind == "smooth":
        walk.fix(inputs, f"activation {_described(node)} is not positively homogeneous")
    elif node.kind == "other":
        walk.fix(inputs, f"{_described(node)} is not known to be positively homogeneous")
    elif node.kind != "shape":
        walk.fix(inputs)
    return None


def _layer(walk: _Walk, node: Node, value: _Channels | None) -> _Channels:
    """A linear layer or a convolution: the end of one group and the beginning of another."""
    layer = node.module
    assert isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    weight = layer.weight
    shape = (-1, *(1 for _ in weight.shape[1:]))
    if value is not None:
        sources = (
            _linear_sources(layer, value) if isinstance(layer, nn.Linear) else _conv_sources(layer, value)
        )
        if sources is None:
            walk.fix([value], f"{_described(node)} takes the channels along another axis")
        else:
            walk.uses.append((value.group, WeightUse(weight, sources.expand_as(weight), True)))
    count = len(weight)
    rows = torch.arange(count)
    group = walk.new(node, count, (weight, rows.view(shape).expand_as(weight)), (layer.bias, rows))
    walk.units.add(group)
    if isinstance(layer, nn.Linear):
        return _Channels(group, count, "last")
    return _Channels(group, count, "channel", weight.ndim - 2)


def _linear_sources(layer: nn.Linear, value: _Channels) -> Tensor | None:
    """The channel that each column belongs to, [in_features]."""
    times, rest = divmod(layer.in_features, value.count)
    if value.axis == "channel" or rest or (value.axis == "last" and times != 1):
        return None
    channels = torch.arange(value.count)
    return channels.repeat(times) if value.axis == "tiles" else channels.repeat_interleave(times)


def _conv_sources(layer: nn.modules.conv._ConvNd, value: _Channels) -> Tensor | None:
    """The channel that each kernel reads, [out, in / groups, 1, ...]."""
    spatial = layer.weight.ndim - 2
    if (value.axis, value.spatial, value.count) != ("channel", spatial, layer.in_channels):
        return None
    own = layer.in_channels // layer.groups
    first = torch.arange(layer.groups).repeat_interleave(layer.out_channels // layer.groups) * own
    return (first[:, None] + torch.arange(own)).view(*layer.weight.shape[:2], *(1,) * spatial)


def _norm(walk: _Walk, node: Node, value: _Channels | None) -> _Channels | None:
    """The channels before a norm are fixed; its affine parameters begin a new group."""
    walk.fix([value])
    weight: Tensor | None = getattr(node.module, "weight", None)
    bias: Tensor | None = getattr(node.module, "bias", None)
    if weight is None:
        walk.reasons.append(f"{_described(node)} has no affine parameters")
        return None
    place = _normed_axis(node.module, value)
    if place is None:
        walk.reasons.append(f"{_described(node)} normalises along axes whose channels are not known")
        return None
    axis, spatial = place
    count = len(weight)
    channels = torch.arange(count).view(-1, *(1 for _ in weight.shape[1:])).expand_as(weight)
    group = walk.new(node, count, (weight, channels), (bias, channels))
    return _Channels(group, count, axis, spatial)


def _normed_axis(norm: nn.Module | None, value: _Channels | None) -> tuple[str, int] | None:
    """Axis of the affine parameters' channels, and the number of spatial axes; None where it is not known."""
    if isinstance(norm, nn.LayerNorm):
        if value is not None and value.axis == "channel":
            whole = len(norm.normalized_shape) == 1 + value.spatial
            return ("channel", value.spatial) if whole else None
        return ("last", 0) if len(norm.normalized_shape) == 1 else None
    if value is not None and value.axis == "channel":
        return "channel", value.spatial
    if isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d):
        return "channel", 2
    if isinstance(norm, nn.BatchNorm3d | nn.InstanceNorm3d):
        return "channel", 3
    return None if value is None else ("last", 0)


def _sum(walk: _Walk, node: Node, inputs: list[_Channels | None]) -> _Channels | None:
    """The summands' channels share one group; a sum with anything else fixes them."""
    one, other = inputs
    if one is None or other is None or replace(one, group=0) != replace(other, group=0):
        walk.fix(inputs, f"{_described(node)} adds values of different channels" if one or other else "")
        return None
    walk.join(one.group, other.group)
    return one


def _described(node: Node) -> str:
    return node.name if node.module is None else f"{node.name} ({type(node.module).__name__})"


def _fix_shared_and_frozen(walk: _Walk, model: nn.Module, graph: Sequence[Node]) -> None:
    """Groups with a weight that cannot be rescaled alone, or not at all."""
    names = list(model.named_parameters(remove_duplicate=False))
    trainable = {id(p): name for name, p in reversed(names) if p.requires_grad}
    places = Counter(id(p) for _, p in names)
    layers = Counter(id(node.module) for node in graph if node.module is not None)
    for node in graph:
        if node.module is not None and layers[id(node.module)] > 1:
            places.update(2 * [id(p) for p in node.module.parameters()])
        elif node.kind == "other" and not node.inputs and node.module is None:
            places.update([id(node.function())])  # a parameter that a function is given
    for group, use in walk.uses:
        name = trainable.get(id(use.parameter))
        value = _Channels(group, walk.counts[group], "last")
        if name is None:
            walk.fix([value], f"a weight of {walk.names[group]} or of the layer after it is not trainable")
        elif places[id(use.parameter)] > 1:
            walk.fix([value], f"{name} is used in more than one place")


def _free_groups(walk: _Walk) -> Iterator[HiddenGroup]:
    fixed = {walk.root(group) for group in walk.fixed}
    units = {walk.root(group) for group in walk.units} - fixed
    for root in sorted(units):
        uses = tuple(use for group, use in walk.uses if walk.root(group) == root)
        if any(use.outgoing for use in uses):
            yield HiddenGroup(walk.names[root], walk.counts[root], uses)
