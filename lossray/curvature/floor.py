"""The structural floor: null directions of the Hessian that architecture and data force (SCIENCE 2.2, 2.3).

A direction that leaves the function unchanged for all weights with the same activation pattern is null, off
the kinks, at every such point. In a chain of linear or convolutional layers such a direction belongs to one
unit: a change of its incoming weights that no example can see. Which ones these are follows from a network
whose gates are fixed at the present activation pattern and whose earlier layers are random: what vanishes
there vanishes for all weights, and for generic weights nothing else does.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lossray.curvature.data import example_batch, read_data
from lossray.errors import DataError, ModelError
from lossray.networks.architecture import Node, graph_of
from lossray.networks.losses import Loss
from lossray.plugins import failure
from lossray.seeds import generator

RANK_TOLERANCE = 1e-9  # of the largest singular value; what is forced to vanish is at rounding, 1e-16
SAME_LOSS = 1e-9  # relative change of the loss under a shift of all outputs
TESTED_EXAMPLES = 32


@dataclass(frozen=True)
class StructuralFloor:
    """How many null directions are forced."""

    dimension: int
    by_cause: Mapping[str, int]  # "first layer", "later layers", "softmax shift" or "linear network"
    complete: bool  # False: the architecture is not a chain that we understand; a lower bound then


@dataclass(frozen=True)
class _Layer:
    """A layer with weights, and what follows it up to the next one."""

    node: Node
    module: nn.Linear | nn.Conv2d
    channelwise: tuple[Node, ...]  # activations and pools, on [N, C, ...]
    reshaping: tuple[Node, ...]  # from the first flatten on

    @property
    def is_convolution(self) -> bool:
        return self.node.kind == "conv"

    @property
    def columns(self) -> int:
        """Incoming weights of a unit, and its bias."""
        return self.module.weight[0].numel() + (self.module.bias is not None)


@dataclass
class _Pattern:
    """The activation pattern of one network on the data."""

    gates: dict[str, Tensor] = field(default_factory=dict)  # node -> slope of each activation, [N, C, ...]
    needed: dict[str, Tensor] = field(default_factory=dict)  # layer -> what of its output counts, [N, C, ...]

    def pick(self, index: Tensor) -> "_Pattern":
        """That of some examples."""
        return _Pattern(
            {name: gate[index] for name, gate in self.gates.items()},
            {name: needed[index] for name, needed in self.needed.items()},
        )


def structural_floor(model: nn.Module, data: Any, loss: Loss) -> StructuralFloor:
    """Count the null directions that architecture and data force on the Hessian of a model's mean loss.

    Known are chains of linear layers, two-dimensional convolutions, activations, average pools and flattens,
    such as lossray's linear, mlp and cnn without norm. Of other models the softmax shift alone is counted.
    Losses are told by trying: one that a shift of all outputs leaves alone is a softmax loss.

    Args:
        model: evaluated in eval mode, in float64, and left as it was.
        data: as for `lossray.Hessian`.
        loss: ``loss(outputs, targets)``, the mean over examples.

    Raises:
        DataError: the data cannot be read, are empty, or their inputs are no tensors.
        ModelError: torch.fx cannot trace the model, or the model or the loss fails on the data.
    """
    nodes = graph_of(model)
    inputs, targets = _examples(data)
    shift = _ignores_shifts(model, loss, inputs[:TESTED_EXAMPLES], targets[:TESTED_EXAMPLES])
    layers = _chain(nodes)
    if layers is None:
        return _of_unknown(nodes, shift)
    if _is_linear_network(layers):
        return _of_linear_network(layers, inputs, shift)
    pattern = _pattern_of(layers, inputs)
    nullities = [_nullity(layers, i, inputs, pattern) for i in range(len(layers))]
    causes = {"first layer": nullities[0][0], "later layers": sum(total for total, _ in nullities[1:])}
    if shift:
        causes["softmax shift"] = nullities[-1][1]
    known = any(_nonlinear(layer) for layer in layers) or len(layers) == 1
    return StructuralFloor(sum(causes.values()), causes, known)


def shift_vectors(model: nn.Module) -> Tensor:
    """The softmax shifts [n, d], float64: one change of all output biases, or of all weights of a feature.

    None, n = 0, where the last layer is no linear one.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    dim = sum(p.numel() for _, p in trainable)
    last = _last_linear(graph_of(model))
    rows: list[Tensor] = []
    start = 0
    for _, parameter in trainable:
        if last is not None and parameter is last.bias:
            row = torch.zeros(dim, dtype=torch.float64)
            row[start : start + parameter.numel()] = 1
            rows.append(row)
        elif last is not None and parameter is last.weight:
            for column in range(parameter.shape[1]):
                row = torch.zeros(dim, dtype=torch.float64)
                row[start : start + parameter.numel()].view(parameter.shape)[:, column] = 1
                rows.append(row)
        start += parameter.numel()
    return torch.stack(rows) if rows else torch.zeros(0, dim, dtype=torch.float64)


# ---- the model as a chain


def _chain(nodes: Sequence[Node]) -> list[_Layer] | None:
    """The layers in order; None where the model is no chain of what is understood."""
    layers: list[list[Any]] = []
    places = _places(nodes)
    previous = None
    for node in nodes:
        if previous is not None and node.inputs != (previous,):
            return None
        previous = node.name
        if node.kind in ("linear", "conv"):
            if not _is_plain(node, places):
                return None
            layers.append([node, [], []])
        elif node.kind in ("input", "output", "dropout") or isinstance(node.module, nn.Identity):
            continue
        elif node.kind in ("flatten", "homogeneous", "smooth", "pool"):
            if layers:
                reshaped = node.kind == "flatten" or bool(layers[-1][2])
                layers[-1][2 if reshaped else 1].append(node)
            elif node.kind != "flatten":
                return None  # something on the inputs
        else:
            return None
    found = [_Layer(node, node.module, tuple(after), tuple(rest)) for node, after, rest in layers]
    ordered = all(len([n for n in layer.channelwise if n.kind != "pool"]) <= 1 for layer in found)
    plain = all(node.kind == "flatten" for layer in found for node in layer.reshaping)
    ends = bool(found) and found[-1].node.kind == "linear" and not found[-1].channelwise
    return found if ordered and plain and ends else None


def _is_plain(node: Node, places: Counter[int]) -> bool:
    """A layer whose weights act once, on zero-padded inputs, and are all trained."""
    module = node.module
    if not all(p.requires_grad and places[id(p)] == 1 for p in module.parameters()):  # type: ignore[union-attr]
        return False
    if node.kind == "linear":
        return True
    return isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"


def _places(nodes: Sequence[Node]) -> Counter[int]:
    """In how many places each parameter acts, by its id: tied weights, and layers that are called twice."""
    places: Counter[int] = Counter()
    for node in nodes:
        if node.module is not None:
            places.update(id(p) for p in node.module.parameters())
        elif node.kind == "other" and not node.inputs:
            places[id(node.function())] += 1  # a parameter that a function is given
    return places


def _nonlinear(layer: _Layer) -> bool:
    return any(node.kind in ("homogeneous", "smooth") for node in layer.channelwise)


def _last_linear(nodes: Sequence[Node]) -> nn.Linear | None:
    """The linear layer whose outputs are the model's, and whose weights act nowhere else."""
    by_name = {node.name: node for node in nodes}
    node = nodes[-1]
    while node.kind in ("output", "dropout") or isinstance(node.module, nn.Identity):
        if len(node.inputs) != 1:
            return None
        node = by_name[node.inputs[0]]
    if not isinstance(node.module, nn.Linear):
        return None
    places = _places(nodes)
    return node.module if all(places[id(p)] == 1 for p in node.module.parameters()) else None


# ---- special cases


def _of_unknown(nodes: Sequence[Node], shift: bool) -> StructuralFloor:
    """The softmax shift by itself: of the bias and of every feature, whether they vanish or not."""
    last = _last_linear(nodes)
    causes = {}
    if shift and last is not None and all(p.requires_grad for p in last.parameters()):
        causes["softmax shift"] = last.in_features + (last.bias is not None)
    return StructuralFloor(sum(causes.values()), causes, False)


def _is_linear_network(layers: Sequence[_Layer]) -> bool:
    matrices = all(isinstance(layer.module, nn.Linear) and layer.module.bias is None for layer in layers)
    return matrices and len(layers) > 1 and not any(layer.channelwise for layer in layers)


def _of_linear_network(layers: Sequence[_Layer], inputs: Tensor, shift: bool) -> StructuralFloor:
    """At generic parameters, d minus the rank 2 q M - L q^2 + q (r + k) of Singh et al., arXiv 2106.16225."""
    widths = [len(layer.module.weight) for layer in layers[:-1]]
    k = len(layers[-1].module.weight) - shift
    r = _rank(inputs.flatten(1))
    q = min([r, k, *widths])
    dim = sum(layer.module.weight.numel() for layer in layers)
    rank = min(2 * q * sum(widths) - len(layers) * q * q + q * (r + k), dim)
    return StructuralFloor(dim - rank, {"linear network": dim - rank}, True)


# ---- activation patterns


def _pattern_of(layers: Sequence[_Layer], inputs: Tensor) -> _Pattern:
    """Gates at the model's own weights, and which outputs of every layer have a way to the model's."""
    pattern = _Pattern()
    with torch.no_grad():
        x = inputs
        for layer in layers:
            weights = {name: p.detach().double() for name, p in layer.module.named_parameters()}
            z = functional_call(layer.module, weights, (_shaped(layer, x),))
            for node in layer.channelwise:
                if node.kind == "homogeneous":
                    pattern.gates[node.name] = _slope(node, z)
                z = node.function(z)
            x = _through(layer.reshaping, z)
    _find_needed(layers, inputs, pattern)
    return pattern


def _slope(node: Node, z: Tensor) -> Tensor:
    """Slope of a piecewise linear activation, [N, C, ...]; 0 at the kink of ReLU, as autograd has it."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(node.function(leaf).sum(), leaf)
    return slope.detach()


def _find_needed(layers: Sequence[_Layer], inputs: Tensor, pattern: _Pattern) -> None:
    """With all weights positive and the gates fixed, an output counts if the model's outputs depend on it."""
    with torch.enable_grad():
        x = torch.ones_like(inputs)
        ends: dict[str, Tensor] = {}
        for layer in layers:
            weights = {name: torch.ones_like(p).double() for name, p in layer.module.named_parameters()}
            weights["weight"] /= weights["weight"][0].numel()
            z = functional_call(layer.module, weights, (_shaped(layer, x),))
            for node in layer.channelwise:
                if node.kind == "homogeneous":
                    z = z * (pattern.gates[node.name] != 0)
                elif node.kind == "pool":
                    z = node.function(z)
            z = z.requires_grad_() if not z.requires_grad else z
            ends[layer.node.name] = z
            x = _through(layer.reshaping, z)
        slopes = torch.autograd.grad(x.sum(), list(ends.values()), allow_unused=True)
    for name, slope, end in zip(ends, slopes, ends.values(), strict=True):
        pattern.needed[name] = torch.zeros_like(end) if slope is None else (slope.detach() > 0).double()


# ---- null directions of one layer


def _nullity(layers: Sequence[_Layer], i: int, inputs: Tensor, pattern: _Pattern) -> tuple[int, int]:
    """Null directions among what comes into layer i's units; the rank of what comes into the last one."""
    layer = layers[i]
    units, columns = len(layer.module.weight), layer.columns
    gated = any(node.name in pattern.gates for node in layer.channelwise)
    first = _seen(layers, i, inputs, pattern, 0)  # the same for all units
    ranks = [_unit_rank(layers, i, unit, inputs, pattern, first) for unit in range(units if gated else 1)]
    total = sum(columns - rank for rank in ranks)
    return (total if gated else units * total), ranks[-1]  # without gates all units see the same


def _unit_rank(
    layers: Sequence[_Layer], i: int, unit: int, inputs: Tensor, pattern: _Pattern, first: Tensor
) -> int:
    """Independent conditions on the incoming weights of one unit: draws, until one adds nothing."""
    index = torch.arange(len(inputs), device=inputs.device)
    known, rank = torch.zeros(0, layers[i].columns, dtype=torch.float64, device=inputs.device), 0
    for draw in range(layers[i].columns + 1):
        own = pattern if draw == 0 else pattern.pick(index)
        seen = first if draw == 0 else _seen(layers, i, inputs[index], own, draw)
        rows, live = _rows(layers[i], unit, seen, own, last=i == len(layers) - 1)
        index = index[live]
        known = _triangular(torch.cat([known, rows]))
        before, rank = rank, _rank(known)
        if i == 0 or rank == before:  # the first layer's inputs are the data, which no weight changes
            break
    return rank


def _seen(layers: Sequence[_Layer], i: int, inputs: Tensor, pattern: _Pattern, draw: int) -> Tensor:
    """What multiplies the weights and biases of layer i: [N, columns] or [N, columns, H, W]."""
    layer = layers[i]
    x = _shaped(layer, _gated_inputs(layers, i, inputs, pattern, draw))
    if isinstance(layer.module, nn.Linear):
        return torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if layer.module.bias is not None else x
    conv = layer.module
    with torch.no_grad():
        height, width = conv(torch.zeros_like(x[:1]).to(conv.weight)).shape[-2:]
    patches = F.unfold(_padded(conv, x), conv.kernel_size, conv.dilation, 0, conv.stride)
    patches = patches.view(len(x), -1, height, width)
    return torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1) if conv.bias is not None else patches


def _padded(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``x`` with the zeros that the convolution adds; "same" puts the odd one at the end."""
    if conv.padding == "valid":
        return x
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(int(p), int(p)) for p in conv.padding]
    return F.pad(x, (*sides[1], *sides[0]))


def _gated_inputs(layers: Sequence[_Layer], i: int, inputs: Tensor, pattern: _Pattern, draw: int) -> Tensor:
    """The inputs of layer i with the gates as they are and the weights before it random."""
    x, random = inputs, generator(draw, "structural floor", i)
    for layer in layers[:i]:
        weights = {
            name: torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.device)
            for name, p in layer.module.named_parameters()
        }
        weights["weight"] /= math.sqrt(weights["weight"][0].numel())
        with torch.no_grad():
            z = functional_call(layer.module, weights, (_shaped(layer, x),))
            for node in layer.channelwise:
                gate = pattern.gates.get(node.name)
                z = node.function(z) if gate is None else gate * z
            x = _through(layer.reshaping, z)
    return x


def _rows(layer: _Layer, unit: int, seen: Tensor, pattern: _Pattern, *, last: bool) -> tuple[Tensor, Tensor]:
    """Linear conditions on the incoming weights of one unit [n, columns], and the examples [N] that make any.

    A pool adds up what the unit sees at several positions; a smooth activation tells all positions apart.
    """
    n, columns = seen.shape[:2]
    z = seen.reshape(n * columns, 1, *seen.shape[2:])
    smooth = False
    for node in layer.channelwise:
        if node.kind == "smooth":
            smooth = True
            break
        if node.kind == "pool":
            z = node.function(z)
        else:
            z = z * pattern.gates[node.name][:, unit : unit + 1].repeat_interleave(columns, dim=0)
    z = z.view(n, columns, -1)
    if not smooth and not last:
        z = z * pattern.needed[layer.node.name][:, unit].reshape(n, 1, -1)
    rows = z.transpose(1, 2).reshape(-1, columns)
    return rows[(rows != 0).any(dim=1)], (z != 0).flatten(1).any(dim=1)


def _triangular(rows: Tensor) -> Tensor:
    """Fewer rows that span the same space."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows


def _rank(rows: Tensor) -> int:
    """Numerical rank of ``rows`` [n, columns]."""
    if len(rows) == 0:
        return 0
    values = torch.linalg.svdvals(_triangular(rows))
    return int((values > RANK_TOLERANCE * values[0]).sum()) if values[0] > 0 else 0


def _shaped(layer: _Layer, x: Tensor) -> Tensor:
    """Inputs as the layer takes them: a linear one flattens what came before it."""
    return x if layer.is_convolution else x.flatten(1)


def _through(nodes: Sequence[Node], x: Tensor) -> Tensor:
    for node in nodes:
        x = node.function(x)
    return x


# ---- data and loss


def _examples(data: Any) -> tuple[Tensor, Any]:
    """All inputs [N, ...] in float64, and all targets."""
    batches = [example_batch(raw) for raw in read_data(data, closure=False)]
    if not all(isinstance(b.inputs, Tensor) and isinstance(b.targets, Tensor) for b in batches):
        raise DataError("the structural floor needs inputs and targets that are tensors")
    if not sum(len(batch.inputs) for batch in batches):
        raise DataError("data: found no example; at least one is needed")
    inputs = torch.cat([batch.inputs for batch in batches])
    targets = torch.cat([batch.targets for batch in batches])
    return inputs.double(), targets.double() if targets.is_floating_point() else targets


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs in eval mode and float64; the model stays as it was."""
    flags = [(module, module.training) for module in model.modules()]
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in _tensors(model).items()}
    try:
        model.eval()
        outputs: Tensor = functional_call(model, tensors, (inputs,))
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{type(model).__name__} raised {failure(error)}") from error
    finally:
        for module, flag in flags:
            module.training = flag
    return outputs


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _ignores_shifts(
    model: nn.Module, loss: Callable[[Tensor, Any], Tensor], inputs: Tensor, targets: Any
) -> bool:
    """Whether adding one number to all outputs of an example leaves its loss as it is."""
    if not callable(loss):
        raise ModelError(f"loss: found {type(loss).__name__}; allowed: a function")
    outputs = _outputs(model, inputs)
    each = torch.linspace(-1.5, 2.0, len(outputs), dtype=outputs.dtype, device=outputs.device)
    try:
        before, after = loss(outputs, targets), loss(outputs + each[:, None], targets)
        return bool((after - before).abs() <= SAME_LOSS * (1 + before.abs()))
    except Exception as error:  # as above
        raise ModelError(f"the loss raised {failure(error)}") from error
