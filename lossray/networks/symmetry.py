"""The rescaling symmetry of ReLU networks, unit by unit, in the coordinates of theta (theory 2.1).

Multiplying a hidden unit's incoming weights and bias by alpha > 0 and dividing its outgoing weights by alpha
leaves the function as it is.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lossray.networks.as_found import copied
from lossray.networks.balanced_factors import balanced_factors
from lossray.networks.hidden_units import hidden_groups
from lossray.networks.layout import Layout, layout_of, uncompiled
from lossray.networks.observed import Observed, observe
from lossray.seeds import generator


@dataclass(frozen=True)
class RescalingSymmetry:
    """The hidden units of an architecture that can be rescaled, numbered from 0.

    Attributes:
        units: how many there are.
        incoming: unit whose incoming weights, bias or affine parameters a coordinate of theta belongs to, [d]
            int64; -1 for none.
        outgoing: unit whose outgoing weights it belongs to, [d] int64; -1 for none.
        groups: the units of each hidden layer, by its name. Layers whose outputs are added share their units,
            under the name of the first; with a norm, it is the norm's name.
        seen: the model's graph at work, and the inputs on which the symmetry was tried.
    """

    units: int
    incoming: Tensor
    outgoing: Tensor
    groups: dict[str, slice]
    seen: Observed = field(repr=False)

    def diagonal(self, factors: Tensor) -> Tensor:
        """The gauge D = alpha_incoming / alpha_outgoing, [..., d], of factors alpha [..., units]."""
        padded = torch.cat([factors, factors.new_ones(*factors.shape[:-1], 1)], dim=-1)
        incoming, outgoing = self.incoming.to(factors.device), self.outgoing.to(factors.device)
        return padded[..., incoming] / padded[..., outgoing]  # -1 is the last one

    def kernel_signs(self, units: slice = slice(None)) -> Tensor:
        """The diagonals of K_j, +1 on incoming, -1 on outgoing coordinates, [units, d] int8."""
        numbers = torch.arange(self.units, device="cpu")[units, None].to(self.incoming.device)
        return (self.incoming == numbers).to(torch.int8) - (self.outgoing == numbers).to(torch.int8)

    def kernel_vectors(self, theta: Tensor, units: slice = slice(None)) -> Tensor:
        """K_j theta, [R, units, d], for theta [R, d]: null vectors of the Hessian at critical points.

        Args:
            theta: parameters.
            units: which of them; a few at a time where all do not fit into memory.
        """
        return self.kernel_signs(units).to(theta) * theta[:, None]

    def incoming_sums(self, values: Tensor) -> Tensor:
        """Sums of values [..., d] over the incoming coordinates of each unit, [..., units] float64."""
        return self._sums(self.incoming, values)

    def outgoing_sums(self, values: Tensor) -> Tensor:
        """Sums of values [..., d] over the outgoing coordinates of each unit, [..., units] float64."""
        return self._sums(self.outgoing, values)

    def imbalance(self, theta: Tensor) -> Tensor:
        """|incoming|^2 - |outgoing|^2 of each unit, [..., units] float64 (theory 2.4)."""
        squares = theta.double().square()
        return self.incoming_sums(squares) - self.outgoing_sums(squares)

    def balance_factors(self, theta: Tensor) -> Tensor:
        """Factors [R, units] float64 to the gauge of least norm, where |incoming| = |outgoing| (theory 2.6).

        A unit without incoming or without outgoing weights keeps its gauge: factor 1. NaN for a dead member.
        """
        side = self.units + 1
        edges = ((self.incoming + 1) * side + self.outgoing + 1).to(theta.device)
        squares = theta.detach().double().square()
        weights = (torch.bincount(edges, row, minlength=side * side) for row in squares)
        return torch.stack([balanced_factors(matrix.view(side, side)) for matrix in weights])

    def _sums(self, owner: Tensor, values: Tensor) -> Tensor:
        shape = (*values.shape[:-1], self.units + 1)
        zeros = torch.zeros(shape, dtype=torch.float64, device=values.device)
        return zeros.index_add_(-1, owner.to(values.device) + 1, values.double())[..., 1:]


def rescaling_symmetry(model: nn.Module, layout: Layout, data: Any = None) -> RescalingSymmetry:
    """The rescaling symmetry of ``model``, derived from its operations and tried.

    What is found is tried on a copy with other weights: the outputs must stay.

    Args:
        model: left as it is.
        layout: `layout_of(model)`, whose coordinates the symmetry is in.
        data: some of its inputs, see `sample_of`; None: inputs that fit its layers are made up.

    Raises:
        ModelError: no hidden layer can be rescaled, the message names the layer that breaks the symmetry; the
            outputs depend on more than the operations show; or no inputs are known.
        DataError: data without inputs.
    """
    seen = observe(model, data)
    hidden = hidden_groups(model, seen)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    starts = torch.tensor([0, *layout.sizes], device="cpu").cumsum(0).tolist()
    offsets = {id(parameter): start for parameter, start in zip(trainable, starts, strict=False)}
    incoming = torch.full((layout.dim,), -1, device="cpu")
    outgoing = torch.full((layout.dim,), -1, device="cpu")
    groups: dict[str, slice] = {}
    units = 0
    for group in hidden:
        for use in group.uses:
            start = offsets[id(use.tensor)]
            owners = outgoing if use.outgoing else incoming
            owners[start : start + use.tensor.numel()] = units + use.channels.reshape(-1)
        groups[group.name] = slice(units, units + group.count)
        units += group.count
    symmetry = RescalingSymmetry(units, incoming, outgoing, groups, seen)
    tried = torch.randn(
        units, generator=generator(0, "tried factors"), device="cpu", dtype=torch.float64
    ).exp()
    seen.require_kept(model, lambda module: rescaled(module, symmetry, tried))
    return symmetry


def rescaled(model: nn.Module, symmetry: RescalingSymmetry, alpha: Tensor) -> nn.Module:
    """A copy of a model whose units are rescaled by factors [units] float64; nothing is checked."""
    layout = layout_of(uncompiled(model))
    diagonals = layout.split(symmetry.diagonal(alpha))
    new = copied(uncompiled(model))
    trainable = [parameter for parameter in new.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, diagonal in zip(trainable, diagonals.values(), strict=True):
            parameter.copy_(parameter.double() * diagonal.to(parameter.device))
    return new
