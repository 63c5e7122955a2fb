"""Hidden channels followed through the graph of a model: where they are, and which tensors go with them.

`hidden_units` (rescaling) and `permutations` each walk the graph by rules of their own.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lossray.networks.architecture import Node
from lossray.networks.hooks import made_by
from lossray.networks.observed import Observed


@dataclass(frozen=True)
class WeightUse:
    """A parameter or buffer at the channels of one group: what goes into them, or their outgoing weights.

    Attributes:
        tensor: the parameter or buffer.
        channels: the channel of each element, int64, of the tensor's shape.
        outgoing: whether it reads the channels; otherwise it makes them.
    """

    tensor: Tensor
    channels: Tensor
    outgoing: bool


@dataclass(frozen=True)
class HiddenGroup:
    """Hidden channels of one layer, or of all layers whose channels are added to each other.

    Attributes:
        name: of the first of these layers.
        count: channels.
        uses: the tensors in which they appear.
    """

    name: str
    count: int
    uses: tuple[WeightUse, ...]


@dataclass(frozen=True)
class Channels:
    """Where the channels of a group are in the value of a node.

    Attributes:
        group: its number.
        count: channels.
        axis: "channel" (axis 1, with ``spatial`` axes after it), "last", or a last axis that was flattened:
            "blocks" (images: the pixels of a channel lie together) or "tiles" (tokens: the channels do).
        spatial: axes after the channels.
    """

    group: int
    count: int
    axis: str
    spatial: int = 0

    def along(self, size: int) -> Tensor | None:
        """The channel of each entry of a last axis of this size, [size]; None where they are not along it."""
        times, rest = divmod(size, self.count)
        if self.axis == "channel" or rest or (self.axis == "last" and times != 1):
            return None
        channels = torch.arange(self.count, device="cpu")
        return channels.repeat(times) if self.axis == "tiles" else channels.repeat_interleave(times)


@dataclass
class Walk:
    """What has been found: groups joined by sums (union-find), and their tensors.

    Attributes:
        names: of the first layer of each group.
        counts: channels of each group.
        parents: the group that each was joined to; itself where it was not.
        uses: groups and the tensors in which their channels appear.
        units: groups behind a linear layer, convolution or activation.
        fixed: groups whose channels must stay as they are.
        reasons: why these are fixed, or have no such symmetry.
    """

    names: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    uses: list[tuple[int, WeightUse]] = field(default_factory=list)
    units: set[int] = field(default_factory=set)
    fixed: set[int] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)

    def new(self, node: Node, count: int, *weights: tuple[Tensor | None, Tensor]) -> int:
        """A group with its incoming weights, each with its elements' channels."""
        group = len(self.names)
        self.names.append(node.name)
        self.counts.append(count)
        self.parents.append(group)
        self.attach(group, *weights)
        return group

    def attach(self, group: int, *weights: tuple[Tensor | None, Tensor]) -> None:
        """Further incoming tensors of a group, each with its elements' channels."""
        self.uses += [(group, WeightUse(w, channels, False)) for w, channels in weights if w is not None]

    def root(self, group: int) -> int:
        """The group that stands for all that are joined with this one."""
        while self.parents[group] != group:
            group = self.parents[group]
        return group

    def join(self, one: int, other: int) -> None:
        """Make two groups one."""
        first, second = sorted((self.root(one), self.root(other)))
        self.parents[second] = first

    def fix(self, values: Sequence[Channels | None], reason: str = "") -> None:
        """The channels of these values must stay as they are."""
        self.fixed |= {value.group for value in values if value is not None}
        if reason:
            self.reasons.append(reason)


def layer(walk: Walk, node: Node, value: Channels | None) -> Channels:
    """A linear layer or a convolution: the end of one group and the beginning of another."""
    module = node.module
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    weight = module.weight
    shape = (-1, *(1 for _ in weight.shape[1:]))
    if value is not None:
        sources = _sources(module, value)
        if sources is None:
            walk.fix([value], f"{described(node)} takes the channels along another axis")
        else:
            walk.uses.append((value.group, WeightUse(weight, sources.expand_as(weight), True)))
    count = len(weight)
    rows = torch.arange(count, device="cpu")
    group = walk.new(node, count, (weight, rows.view(shape).expand_as(weight)), (module.bias, rows))
    walk.units.add(group)
    if isinstance(module, nn.Linear):
        return Channels(group, count, "last")
    return Channels(group, count, "channel", weight.ndim - 2)


def _sources(layer: nn.Linear | nn.modules.conv._ConvNd, value: Channels) -> Tensor | None:
    """The channel that each weight reads, expandable to the weight's shape; None where it is not known."""
    return value.along(layer.in_features) if isinstance(layer, nn.Linear) else _conv_sources(layer, value)


def _conv_sources(layer: nn.modules.conv._ConvNd, value: Channels) -> Tensor | None:
    """The channel that each kernel reads, [out, in / groups, 1, ...]."""
    spatial = layer.weight.ndim - 2
    if (value.axis, value.spatial, value.count) != ("channel", spatial, layer.in_channels):
        return None
    per_group = layer.in_channels // layer.groups
    first = (
        torch.arange(layer.groups, device="cpu").repeat_interleave(layer.out_channels // layer.groups)
        * per_group
    )
    return (first[:, None] + torch.arange(per_group, device="cpu")).view(
        *layer.weight.shape[:2], *(1,) * spatial
    )


def flattened(value: Channels) -> Channels:
    """The same channels after all axes but the first have become one."""
    flat = {"channel": "blocks", "last": "tiles"}.get(value.axis, value.axis)
    return replace(value, axis=flat, spatial=0)


def summed(walk: Walk, node: Node, inputs: Sequence[Channels | None]) -> Channels | None:
    """The summands' channels share one group; a sum with anything else fixes them."""
    one, other = inputs
    if one is None or other is None or replace(one, group=0) != replace(other, group=0):
        walk.fix(inputs, f"{described(node)} adds values of different channels" if one or other else "")
        return None
    walk.join(one.group, other.group)
    return one


def described(node: Node) -> str:
    """A node in a message: its name, the class of its layer, and what makes that layer's weights."""
    if node.module is None:
        return node.name
    maker = made_by(node.module)
    return f"{node.name} ({type(node.module).__name__}{f' with {maker}' if maker else ''})"


def axes_of(seen: Observed, name: str, value: Channels | None) -> int | None:
    """Number of axes of a node's value, of which ``value`` says where the channels are; None if unknown."""
    rank = seen.rank(name)
    if rank is not None or value is None:
        return rank
    return {"channel": 2 + value.spatial, "blocks": 2, "tiles": 2}.get(value.axis)


def pooled(node: Node, value: Channels) -> bool:
    """Whether a pool leaves the channels where they are: it takes the axes after them."""
    return value.axis == "channel" and node.pooled == value.spatial


def fix_shared_and_frozen(
    walk: Walk, model: nn.Module, graph: Sequence[Node], *, buffers_change: bool = False
) -> None:
    """Fix the groups with a tensor that cannot be changed alone, or not at all.

    Args:
        walk: at the end of ``graph``.
        model: whose graph it is.
        graph: its operations.
        buffers_change: whether buffers may change, besides the trainable parameters.
    """
    buffers = list(model.named_buffers(remove_duplicate=False))
    names = [*model.named_parameters(remove_duplicate=False), *buffers]
    n_uses = Counter(id(tensor) for _, tensor in names)
    layers = Counter(id(node.module) for node in graph if node.module is not None)
    for node in graph:
        if node.module is not None and layers[id(node.module)] > 1:
            n_uses.update(2 * [id(tensor) for tensor in (*node.module.parameters(), *node.module.buffers())])
        elif node.kind == "other" and not node.inputs and node.module is None:
            n_uses.update([id(node.function())])  # a tensor that a function is given
    held = {id(buffer) for _, buffer in buffers if buffers_change}
    changeable = {id(t): name for name, t in reversed(names) if t.requires_grad or id(t) in held}
    for group, use in walk.uses:
        name = changeable.get(id(use.tensor))
        value = Channels(group, walk.counts[group], "last")
        if name is None:
            walk.fix([value], f"a weight of {walk.names[group]} or of the layer after it is not trainable")
        elif n_uses[id(use.tensor)] > 1:
            walk.fix([value], f"{name} is used in more than one place")


def free_groups(walk: Walk) -> Iterator[tuple[int, HiddenGroup]]:
    """The groups that are not fixed, each with its root, in the order of the graph."""
    fixed = {walk.root(group) for group in walk.fixed}
    units = {walk.root(group) for group in walk.units} - fixed
    for root in sorted(units):
        uses = tuple(use for group, use in walk.uses if walk.root(group) == root)
        if any(use.outgoing for use in uses):
            yield root, HiddenGroup(walk.names[root], walk.counts[root], uses)
