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

from lossray.curvature.chains import Layer, Pattern, shaped, through
from lossray.curvature.degeneracy import counts_of, dense_matrices, spectrum_of
from lossray.curvature.modules import ModuleObjective
from lossray.curvature.operators import PackedHessian
from lossray.networks.losses import Loss
from lossray.seeds import generator

DRAWS = 3  # of random weights, until the spectrum has a gap at the noise floor


class FrozenNetwork(nn.Module):
    """A chain with its gates held, at random weights.

    Args:
        layers: the chain.
        pattern: its gates on the data.
        draw: number of the random weights.
    """

    def __init__(self, layers: Sequence[Layer], pattern: Pattern, *, draw: int) -> None:
        super().__init__()
        self.chain, self.gates = layers, pattern.gates
        self.layers = nn.ModuleList(copy.deepcopy(layer.module).double() for layer in layers)
        random = generator(draw, "generic weights")
        with torch.no_grad():
            for parameter in self.layers.parameters():
                values = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
                parameter.copy_(values / math.sqrt(fan_in))

    def forward(self, inputs: Tensor, index: Tensor) -> Tensor:
        """Outputs for the examples at ``index`` [B] of the data."""
        x = inputs
        for layer, module in zip(self.chain, self.layers, strict=True):
            z = module(shaped(layer, x))
            for node in layer.channelwise:
                gate = self.gates.get(node.name)
                z = node.function(z) if gate is None else gate[index] * z
            x = through(layer.reshaping, z)
        return x


def generic_nullity(
    layers: Sequence[Layer], pattern: Pattern, inputs: Tensor, targets: Tensor, loss: Loss, *, at_least: int
) -> int | None:
    """The nullity of a generic point; None where no draw has a gap that supports one.

    Args:
        layers: the chain.
        pattern: its gates on the data.
        inputs: all examples, float64.
        targets: theirs.
        loss: ``loss(outputs, targets)``, the mean over examples.
        at_least: what is known to be null: less is a spectrum that cannot be trusted.

    Raises:
        ResourceError: the matrix does not fit the memory.
    """
    index = torch.arange(len(inputs), device=inputs.device)
    data = ({"inputs": inputs, "index": index}, targets)
    for draw in range(DRAWS):
        network = FrozenNetwork(layers, pattern, draw=draw)
        objective = ModuleObjective(network, loss, data, dtype=torch.float64)
        (matrix,) = dense_matrices(PackedHessian(objective, mode="retained"))
        spectrum = spectrum_of(matrix, torch.float64)
        count = counts_of(spectrum)[-1] if spectrum is not None else None
        if count is not None and count.rank is not None and count.nullity >= at_least:
            return int(count.nullity)
    return None
