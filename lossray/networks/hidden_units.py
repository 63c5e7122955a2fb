"""Which hidden channels of a model can be rescaled, and which weights go into and out of each (theory 5C).

A walk through the graph follows the channels of every linear, convolution and norm layer up to the layers
that use them. Channels that are added share one group. A group is *fixed*, and so no hidden unit, where its
channels reach the output, a norm, or an operation that is not positively homogeneous.
"""

import torch
from torch import Tensor, nn

from lossray.errors import ModelError
from lossray.networks.architecture import Node
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
from lossray.networks.observed import REMEDY, Observed


def hidden_groups(model: nn.Module, seen: Observed) -> tuple[HiddenGroup, ...]:
    """The groups of rescalable channels, in the order of the graph.

    With a norm layer its affine parameters are the incoming weights, and the layer before it is left alone.
    Affine parameters without an activation behind them (pre-norm attention) make no hidden units.

    Args:
        model: any module.
        seen: its graph at work.

    Raises:
        ModelError: there are none; the message names the layer that breaks the symmetry.
    """
    walk = Walk()
    values: dict[str, Channels | None] = {}
    for node in seen.graph:
        values[node.name] = _step(walk, node, [values[name] for name in node.inputs], seen)
    fix_shared_and_frozen(walk, uncompiled(model), seen.graph)
    groups = tuple(group for _, group in free_groups(walk))
    if not groups:
        smooth = [reason for reason in walk.reasons if reason.startswith("activation")]
        causes = smooth or walk.reasons or ["it has no hidden layer to rescale"]
        raise ModelError(
            f"{type(uncompiled(model)).__name__} has no ReLU rescaling symmetry: {causes[0]}; it needs a "
            "hidden layer with nothing but relu, leaky relu, pooling, dropout or sums before the next layer"
        )
    return groups


def _step(walk: Walk, node: Node, inputs: list[Channels | None], seen: Observed) -> Channels | None:
    """The channels of a node's value; None where nothing in it can be rescaled."""
    if node.kind in ("linear", "conv"):
        return layer(walk, node, inputs[0])
    if node.kind == "norm":
        return _norm(walk, node, inputs[0], axes_of(seen, node.inputs[0], inputs[0]))
    if node.kind == "add":
        return summed(walk, node, inputs)
    if node.kind in ("homogeneous", "dropout"):
        if node.kind == "homogeneous" and inputs[0] is not None and not isinstance(node.module, nn.Identity):
            walk.units.add(inputs[0].group)
        return inputs[0]
    if node.kind in ("pool", "maxpool") and inputs[0] is not None and pooled(node, inputs[0]):
        return inputs[0]
    if node.kind == "flatten" and inputs[0] is not None and seen.flattens(node):
        return flattened(inputs[0])
    if node.kind == "smooth":
        walk.fix(inputs, f"activation {described(node)} is not positively homogeneous")
    elif node.kind == "other":
        walk.fix(inputs, f"{described(node)} is not known to be positively homogeneous")
    elif node.kind == "flatten":
        walk.fix(inputs, f"{described(node)} mixes channels with other axes" if any(inputs) else "")
    elif node.kind != "shape":
        walk.fix(inputs)
    return None


def _norm(walk: Walk, node: Node, value: Channels | None, axes: int | None) -> Channels | None:
    """The channels before a norm are fixed; its affine parameters begin a new group."""
    walk.fix([value])
    weight: Tensor | None = getattr(node.module, "weight", None)
    bias: Tensor | None = getattr(node.module, "bias", None)
    if weight is None:
        walk.reasons.append(f"{described(node)} has no affine parameters")
        return None
    normed = _normed_axis(node.module, value, axes)
    if normed is None:
        layer = isinstance(node.module, nn.LayerNorm)  # whose axes no inputs would tell
        why = "other than those of the channels alone" if layer else f"whose channels are not known: {REMEDY}"
        walk.reasons.append(f"{described(node)} normalises along axes {why}")
        return None
    axis, spatial = normed
    count = len(weight)
    channels = torch.arange(count, device="cpu").view(-1, *(1 for _ in weight.shape[1:])).expand_as(weight)
    group = walk.new(node, count, (weight, channels), (bias, channels))
    return Channels(group, count, axis, spatial)


def _normed_axis(norm: nn.Module | None, value: Channels | None, axes: int | None) -> tuple[str, int] | None:
    """Axis of the affine parameters' channels, and the number of spatial axes; None where it is not known.

    All norms but LayerNorm have them along axis 1, whether that holds channels or tokens.
    """
    if isinstance(norm, nn.LayerNorm):
        if value is not None and value.axis == "channel":
            whole = len(norm.normalized_shape) == 1 + value.spatial
            return ("channel", value.spatial) if whole else None
        return ("last", 0) if len(norm.normalized_shape) == 1 else None
    if axes is None:
        return None
    return ("last", 0) if axes == 2 else ("channel", axes - 2)
