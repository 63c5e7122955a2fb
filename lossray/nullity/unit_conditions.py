"""Null directions of one layer of a chain: changes of a unit's incoming weights that no example can see."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossray.networks.functional import call_with
from lossray.nullity.chains import Layer, Pattern, shaped, through
from lossray.seeds import generator

RANK_TOLERANCE = 1e-11  # of the largest singular value; what is forced to vanish is at rounding, 1e-16
DOUBTFUL = 1e-6  # smallest singular value that counts below which a rank is not certain


def layer_nullity(layers: Sequence[Layer], i: int, inputs: Tensor, pattern: Pattern) -> tuple[int, int]:
    """Null directions among what comes into layer i's units; the rank of what comes into the last one."""
    layer = layers[i]
    units, columns = len(layer.module.weight), layer.columns
    gated = any(node.name in pattern.gates for node in layer.channelwise)
    first = _seen(layers, i, inputs, pattern, 0)  # the same for all units
    ranks = [_unit_rank(layers, i, unit, inputs, pattern, first) for unit in range(units if gated else 1)]
    total = sum(columns - rank for rank in ranks)
    return (total if gated else units * total), ranks[-1]  # without gates all units see the same


def first_basis(layers: Sequence[Layer], inputs: Tensor, pattern: Pattern) -> tuple[Tensor, bool]:
    """What the first layer sees, in orthogonal coordinates of size 1; whether their number is certain."""
    seen = _seen(layers, 0, inputs, pattern, 0)
    rows = _unit_columns(seen.transpose(0, 1).flatten(1).T)  # [N positions, columns]
    _, values, vectors = torch.linalg.svd(_triangular(rows), full_matrices=False)
    rank, smallest = _rank_of(values)
    turned = rows @ (vectors[:rank].T / values[:rank]) * math.sqrt(len(rows))
    shape = (len(seen), *seen.shape[2:], rank)
    return turned.view(shape).movedim(-1, 1).contiguous(), smallest > DOUBTFUL


def _unit_rank(
    layers: Sequence[Layer], i: int, unit: int, inputs: Tensor, pattern: Pattern, first: Tensor
) -> int:
    """Independent conditions on the incoming weights of one unit: draws, until one adds nothing."""
    index = torch.arange(len(inputs), device=inputs.device)
    conditions, rank = torch.zeros(0, layers[i].columns, dtype=torch.float64, device=inputs.device), 0
    for draw in range(layers[i].columns + 1):
        live_pattern = pattern if draw == 0 else pattern.pick(index)
        seen = first if draw == 0 else _seen(layers, i, inputs[index], live_pattern, draw)
        rows, live = _rows(layers[i], unit, seen, live_pattern, last=i == len(layers) - 1)
        index = index[live]
        conditions = _triangular(torch.cat([conditions, rows]))
        before, rank = rank, _rank(conditions)
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
            name: torch.randn(p.shape, generator=random, device="cpu", dtype=torch.float64).to(p.device)
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
    """Numerical rank of ``rows`` [n, columns], whatever the units of the columns."""
    return measured_rank(rows)[0]


def measured_rank(rows: Tensor) -> tuple[int, float]:
    """The rank, and the smallest singular value that counts over the largest one."""
    return _rank_of(torch.linalg.svdvals(_triangular(_unit_columns(rows)))) if len(rows) else (0, 1.0)


def _unit_columns(rows: Tensor) -> Tensor:
    """Columns of size 1, but for those that are zero."""
    sizes = rows.abs().amax(dim=0)
    return rows / torch.where(sizes > 0, sizes, 1)


def _rank_of(values: Tensor) -> tuple[int, float]:
    """From singular values, descending."""
    if not len(values) or values[0] == 0:
        return 0, 1.0
    rank = int((values > RANK_TOLERANCE * values[0]).sum())
    return rank, float(values[rank - 1] / values[0])
