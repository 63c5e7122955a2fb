"""The structural floor: null directions of the Hessian that architecture and data force (SCIENCE 2.2, 2.3).

Two kinds. A direction that leaves the function unchanged for *all* weights with the same activation pattern
is null, off the kinks, at every such point. In a chain of layers such a direction belongs to one unit: a
change of its incoming weights that no example can see. Which ones these are follows from a network whose
gates are fixed at the present activation pattern and whose earlier layers are random: what vanishes there
vanishes for all weights, and for generic weights nothing else does.

The other kind, "mixing", combines the weights of several units and turns with them: more units of one
activation pattern than the next layer tells apart, features that depend on each other, fewer examples than
weights. Its dimension is what a generic point with the same activation pattern has in addition: mixing.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossray.curvature.chains import Layer, Pattern, chain_of, pattern_of, places_of, shaped, through
from lossray.curvature.data import example_batch, read_data
from lossray.curvature.mixing import generic_nullity
from lossray.errors import DataError, ModelError
from lossray.networks.architecture import Node, graph_of
from lossray.networks.functional import call_with
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
    by_cause: Mapping[str, int]  # "first layer", "later layers", "softmax shift", "mixing", "linear network"
    complete: bool  # False: a lower bound, "mixing" or an architecture that we do not understand left out

    def excess(self, nullity: float) -> float | None:
        """What a nullity has beyond the floor; None where more might be forced."""
        found = nullity - self.dimension
        return found if self.complete or found == 0 else None


def structural_floor(model: nn.Module, data: Any, loss: Loss, *, dense_up_to: int = 2500) -> StructuralFloor:
    """Count the null directions that architecture and data force on the Hessian of a model's mean loss.

    Known are chains of layers; see chains.py. Of other models the softmax shift alone is counted. Losses are
    told by trying: one that a shift of all outputs leaves alone is a softmax loss.

    Args:
        model: evaluated in eval mode, in float64, and left as it was.
        data: as for `lossray.Hessian`.
        loss: ``loss(outputs, targets)``, the mean over examples.
        dense_up_to: largest number of parameters at which "mixing" is counted, which takes all eigenvalues of
            a matrix of that size.

    Raises:
        DataError: the data cannot be read, are empty, or their inputs are no tensors.
        ModelError: torch.fx cannot trace the model, or the model or the loss fails on the data.
        ResourceError: that matrix does not fit.
    """
    nodes = graph_of(model)
    inputs, targets = _examples(data)
    outputs = _outputs(model, inputs[:TESTED_EXAMPLES])
    shift = _ignores_shifts(loss, outputs, targets[:TESTED_EXAMPLES])
    layers = chain_of(model, inputs[:TESTED_EXAMPLES], outputs)
    if layers is None:
        return _of_unknown(nodes, shift)
    if _is_linear_network(layers):
        return _of_linear_network(layers, inputs, shift)
    pattern = pattern_of(layers, inputs)
    nullities = [_nullity(layers, i, inputs, pattern) for i in range(len(layers))]
    causes = {"first layer": nullities[0][0], "later layers": sum(total for total, _ in nullities[1:])}
    if shift:
        causes["softmax shift"] = nullities[-1][1]
    known = sum(causes.values())
    generic = None
    if sum(layer.columns * len(layer.module.weight) for layer in layers) <= dense_up_to:
        generic = generic_nullity(layers, pattern, inputs, targets, loss, at_least=known)
    if generic is None:
        return StructuralFloor(known, causes, False)
    return StructuralFloor(generic, causes | {"mixing": generic - known}, True)


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
    places = places_of(nodes)
    return node.module if all(places[id(p)] == 1 for p in node.module.parameters()) else None


# ---- special cases


def _of_unknown(nodes: Sequence[Node], shift: bool) -> StructuralFloor:
    """The softmax shift by itself: of the bias and of every feature, whether they vanish or not."""
    last = _last_linear(nodes)
    causes = {}
    if shift and last is not None and all(p.requires_grad for p in last.parameters()):
        causes["softmax shift"] = last.in_features + (last.bias is not None)
    return StructuralFloor(sum(causes.values()), causes, False)


def _is_linear_network(layers: Sequence[Layer]) -> bool:
    matrices = all(isinstance(layer.module, nn.Linear) and layer.module.bias is None for layer in layers)
    return matrices and len(layers) > 1 and not any(layer.channelwise for layer in layers)


def _of_linear_network(layers: Sequence[Layer], inputs: Tensor, shift: bool) -> StructuralFloor:
    """At generic parameters, d minus the rank 2 q M - L q^2 + q (r + k) of Singh et al., arXiv 2106.16225."""
    widths = [len(layer.module.weight) for layer in layers[:-1]]
    k = len(layers[-1].module.weight) - shift
    r = _rank(inputs.flatten(1))
    q = min([r, k, *widths])
    dim = sum(layer.module.weight.numel() for layer in layers)
    rank = min(2 * q * sum(widths) - len(layers) * q * q + q * (r + k), dim)
    return StructuralFloor(dim - rank, {"linear network": dim - rank}, True)


# ---- null directions of one layer


def _nullity(layers: Sequence[Layer], i: int, inputs: Tensor, pattern: Pattern) -> tuple[int, int]:
    """Null directions among what comes into layer i's units; the rank of what comes into the last one."""
    layer = layers[i]
    units, columns = len(layer.module.weight), layer.columns
    gated = any(node.name in pattern.gates for node in layer.channelwise)
    first = _seen(layers, i, inputs, pattern, 0)  # the same for all units
    ranks = [_unit_rank(layers, i, unit, inputs, pattern, first) for unit in range(units if gated else 1)]
    total = sum(columns - rank for rank in ranks)
    return (total if gated else units * total), ranks[-1]  # without gates all units see the same


def _unit_rank(
    layers: Sequence[Layer], i: int, unit: int, inputs: Tensor, pattern: Pattern, first: Tensor
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


def _seen(layers: Sequence[Layer], i: int, inputs: Tensor, pattern: Pattern, draw: int) -> Tensor:
    """What multiplies the weights and biases of layer i: [N, columns] or [N, columns, H, W]."""
    layer = layers[i]
    x = shaped(layer, _gated_inputs(layers, i, inputs, pattern, draw))
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


def _gated_inputs(layers: Sequence[Layer], i: int, inputs: Tensor, pattern: Pattern, draw: int) -> Tensor:
    """The inputs of layer i with the gates as they are and the weights before it random."""
    x, random = inputs, generator(draw, "structural floor", i)
    for layer in layers[:i]:
        weights = {
            name: torch.randn(p.shape, generator=random, dtype=torch.float64).to(p.device)
            for name, p in layer.module.named_parameters()
        }
        weights["weight"] /= math.sqrt(weights["weight"][0].numel())
        with torch.no_grad():
            z = call_with(layer.module, weights, shaped(layer, x))
            for node in layer.channelwise:
                gate = pattern.gates.get(node.name)
                z = node.function(z) if gate is None else gate * z
            x = through(layer.reshaping, z)
    return x


def _rows(layer: Layer, unit: int, seen: Tensor, pattern: Pattern, *, last: bool) -> tuple[Tensor, Tensor]:
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


# ---- data and loss


def _examples(data: Any) -> tuple[Tensor, Any]:
    """All inputs [N, ...] in float64, and all targets."""
    batches = [example_batch(raw) for raw in read_data(data, closure=False)]
    if not all(isinstance(b.inputs, Tensor) and isinstance(b.targets, Tensor) for b in batches):
        raise DataError("the structural floor needs inputs and targets that are tensors")
    if not sum(len(batch.inputs) for batch in batches):
        raise DataError("data: found no example; at least one is needed")
    counted = [slice(None) if batch.weights is None else batch.weights > 0 for batch in batches]
    inputs = torch.cat([batch.inputs[own] for batch, own in zip(batches, counted, strict=True)])
    targets = torch.cat([batch.targets[own] for batch, own in zip(batches, counted, strict=True)])
    return inputs.double(), targets.double() if targets.is_floating_point() else targets


@torch.no_grad()
def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs in eval mode and float64; the model stays as it was."""
    flags = [(module, module.training) for module in model.modules()]
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in _tensors(model).items()}
    try:
        model.eval()
        outputs: Tensor = call_with(model, tensors, inputs)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{type(model).__name__} raised {failure(error)}") from error
    finally:
        for module, flag in flags:
            module.training = flag
    return outputs


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def _ignores_shifts(loss: Callable[[Tensor, Any], Tensor], outputs: Tensor, targets: Any) -> bool:
    """Whether adding one number to all outputs of an example leaves its loss as it is."""
    if not callable(loss):
        raise ModelError(f"loss: found {type(loss).__name__}; allowed: a function")
    each = torch.linspace(-1.5, 2.0, len(outputs), dtype=outputs.dtype, device=outputs.device)
    shifted = outputs + each.view(-1, *[1] * (outputs.ndim - 1))
    try:
        before, after = loss(outputs, targets), loss(shifted, targets)
        return bool((after - before).abs() <= SAME_LOSS * (1 + before.abs()))
    except Exception as error:  # as above
        raise ModelError(f"the loss raised {failure(error)}") from error
