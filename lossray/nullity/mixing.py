"""The nullity of a generic point: what every set of weights with one activation pattern has.

With its gates held at the present activation pattern a network is a polynomial in its weights, and the minors
of its Hessian are analytic: at almost all weights the nullity is the same, and it is the smallest one. Hence
the nullity at random weights, gates held, is a lower bound for that of every point with this pattern, off the
kinks, and what a point has beyond it is its own. A smooth network has no gates: the nullity at random weights
bounds that at all weights.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lossray.nullity.chains import Layer, Pattern, shaped, through
from lossray.nullity.counts import counts_of, dense_matrices, spectrum_of
from lossray.nullity.output_loss import OutputLoss
from lossray.operators.modules import ModuleObjective
from lossray.operators.packed import PackedHessian
from lossray.seeds import generator

DRAWS = 3  # of random weights, until the spectrum has a gap at the noise floor


class FrozenNetwork(nn.Module):
    """A chain with its gates held, at random weights, and well scaled whatever the inputs' scale is.

    The first layer sees ``basis``, whose columns are orthogonal and of size 1, in place of the inputs: an
    invertible change of its weights on what the inputs span. The weights of each layer are such that its
    results are of size 1 on the data, and the outputs of size ``scale``.

    Args:
        layers: the chain.
        pattern: its gates on the data.
        basis: what multiplies the weights of the first layer, [N, r] or [N, r, H, W].
        scale: size of the outputs.
        draw: number of the random weights.
    """

    def __init__(
        self, layers: Sequence[Layer], pattern: Pattern, basis: Tensor, *, scale: float, draw: int
    ) -> None:
        super().__init__()
        self.chain, self.gates = layers, pattern.gates
        units = len(layers[0].module.weight)
        self.first = nn.Parameter(
            torch.empty(units, basis.shape[1], dtype=torch.float64, device=basis.device)
        )
        self.layers = nn.ModuleList(copy.deepcopy(layer.module).double() for layer in layers[1:])
        random = generator(draw, "generic weights")
        with torch.no_grad():
            for parameter in self.parameters():
                values = torch.randn(parameter.shape, generator=random, device="cpu", dtype=torch.float64)
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.copy_(values / math.sqrt(fan_in))
            self._rescale(basis, scale)

    def forward(self, basis: Tensor, index: Tensor) -> Tensor:
        """Outputs for the examples at ``index`` [B] of the data."""
        x = basis
        for i in range(len(self.chain)):
            x = self._after(i, self._linear(i, x), index)
        return x

    def _linear(self, i: int, x: Tensor) -> Tensor:
        if i == 0:
            return torch.einsum("nr...,ur->nu...", x, self.first)
        z: Tensor = self.layers[i - 1](shaped(self.chain[i], x))
        return z

    def _after(self, i: int, z: Tensor, index: Tensor) -> Tensor:
        """What follows the weights of layer i."""
        for node in self.chain[i].channelwise:
            gate = self.gates.get(node.name)
            z = node.function(z) if gate is None else gate[index] * z
        return through(self.chain[i].reshaping, z)

    def _rescale(self, basis: Tensor, scale: float) -> None:
        """Divide the weights of each layer by the size of its results."""
        x, index = basis, torch.arange(len(basis), device=basis.device)
        for i in range(len(self.chain)):
            z = self._linear(i, x)
            size = float(z.square().mean().sqrt()) or 1.0
            target = scale if i == len(self.chain) - 1 else 1.0
            for parameter in [self.first] if i == 0 else self.layers[i - 1].parameters():
                parameter.mul_(target / size)
            x = self._after(i, z * (target / size), index)


def generic_nullity(
    layers: Sequence[Layer],
    pattern: Pattern,
    basis: Tensor,
    output_loss: OutputLoss,
    *,
    scale: float,
    at_least: int,
) -> int | None:
    """The nullity of a generic point; None where no draw has a gap that supports one.

    Args:
        layers: the chain.
        pattern: its gates on the data.
        basis: see `FrozenNetwork`; what the first layer's weights have beside it is null as well.
        output_loss: the loss, analytic in the outputs.
        scale: size of the outputs.
        at_least: what is known to be null: less is a spectrum that cannot be trusted.

    Raises:
        ResourceError: the matrix does not fit the memory.
    """
    index = torch.arange(len(basis), device=basis.device)
    batch = ({"basis": basis, "index": index}, output_loss.targets)
    data = batch if output_loss.weights is None else (*batch, output_loss.weights)
    blind = len(layers[0].module.weight) * (layers[0].columns - basis.shape[1])
    if basis.shape[1] == 0:
        return None
    for draw in range(DRAWS):
        network = FrozenNetwork(layers, pattern, basis, scale=scale, draw=draw)
        objective = ModuleObjective(network, output_loss.loss, data, dtype=torch.float64)
        (matrix,) = dense_matrices(PackedHessian(objective, mode="retained"))
        spectrum = spectrum_of(matrix, torch.float64)
        count = counts_of(spectrum)[-1] if spectrum is not None else None
        if count is not None and count.rank is not None and blind + count.nullity >= at_least:
            return blind + int(count.nullity)
    return None
