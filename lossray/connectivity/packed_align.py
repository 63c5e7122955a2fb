"""The members of one pack aligned with those of another, each by its own permutation and scale."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lossray.connectivity.align import Kind, Matching, aligned
from lossray.networks.layout import tensors_of
from lossray.networks.stack import Stack


@dataclass(frozen=True)
class PackedAlignment:
    """The same functions, each close to another member; those that were not to be aligned as they were.

    Attributes:
        theta: [R, d].
        buffers: name -> [R, *shape].
        function_change: [R] float64, see `Alignment`; NaN where nothing was done.
    """

    theta: Tensor
    buffers: dict[str, Tensor]
    function_change: Tensor


def packed_align(
    stack: Stack,
    members: tuple[Tensor, Mapping[str, Tensor]],
    to: tuple[Tensor, Mapping[str, Tensor]],
    inputs: Tensor,
    *,
    alive: Tensor,
    kind: Kind = "both",
    matching: Matching = "weights",
) -> PackedAlignment:
    """Align each member with its counterpart.

    Args:
        stack: the architecture.
        members: parameters [R, d], and buffers by name, [R, *shape].
        to: those to be close to, likewise.
        inputs: [N, ...], on which it is checked that the functions stay.
        alive: [R] bool, which to align.
        kind: as in `align`.
        matching: as in `align`.

    Raises:
        ModelError: as in `align`.
    """
    rows = list(members[0])
    buffers = [{name: tensor[r] for name, tensor in members[1].items()} for r in range(len(rows))]
    changes = torch.full((len(rows),), torch.nan, dtype=torch.float64, device="cpu")
    for r in torch.nonzero(alive)[:, 0].tolist():
        member = stack.module(rows[r], buffers[r])
        other = stack.module(to[0][r], {name: tensor[r] for name, tensor in to[1].items()})
        alignment = aligned(member, other, inputs, kind=kind, matching=matching)
        parameters, buffers[r] = tensors_of(alignment.model)
        rows[r] = torch.cat([tensor.reshape(-1) for tensor in parameters.values()])
        changes[r] = torch.nan if alignment.function_change is None else alignment.function_change
    stacked = {name: torch.stack([member_buffers[name] for member_buffers in buffers]) for name in members[1]}
    return PackedAlignment(torch.stack(rows), stacked, changes.to(rows[0].device))
