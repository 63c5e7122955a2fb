"""What angles are held against: directions that know nothing of the surface (SCIENCE 2.11, 5A)."""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betainc, betaincc
from torch import Tensor

from lossray.curvature.layers import layers
from lossray.networks.layout import Layout

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]


def null_p_values(chi2: Array, rest: Array, k: int, dim: int | IntArray) -> tuple[Array, Array]:
    """P(B >= chi^2) and P(B <= chi^2), B ~ Beta(k/2, (d-k)/2): the null of random directions (SCIENCE 2.11).

    Args:
        chi2: energies inside the subspace, [n].
        rest: 1 - chi2, as accurate as chi2 itself: it decides the upper tail near 1.
        k: dimension of the subspace.
        dim: dimension of the space, one or [n]; NaN where it is not above k.
    """
    a, b = k / 2, np.where(np.asarray(dim) > k, (np.asarray(dim) - k) / 2, np.nan)
    low = chi2 <= rest
    upper = np.where(low, betaincc(a, b, chi2), betainc(b, a, rest))
    return upper, np.where(low, betainc(a, b, chi2), betaincc(b, a, rest))


class LayerNull:
    """Expected energies of random directions whose norm in every layer is given.

    Args:
        layout: how d divides into parameters; a layer is the module that owns them.
        kept: coordinates that count, [R, d] bool.
    """

    def __init__(self, layout: Layout, kept: Tensor) -> None:
        self.kept = kept
        self._index = layer_index(layout).to(kept.device)
        self._sizes = layer_sums(kept.double(), self._index)

    def expected(self, energies: Tensor, weights: Tensor) -> Tensor:
        """Sum over layers of |u_l|^2 sum_k |v_k,l|^2 / d_l, [R].

        Args:
            energies: squares of u, [R, d].
            weights: sum over k of the squares of v_k, [R, d].
        """
        shares = layer_sums(weights, self._index) / self._sizes.clamp(min=1)
        return (layer_sums(energies, self._index) * shares).sum(dim=1)


def layer_index(layout: Layout) -> Tensor:
    """Number of the layer of every coordinate, [d] int64."""
    owner = {name: i for i, names in enumerate(layers(layout).values()) for name in names}
    counts = torch.tensor(layout.sizes)
    return torch.repeat_interleave(torch.tensor([owner[name] for name in layout.names]), counts)


def layer_sums(values: Tensor, index: Tensor) -> Tensor:
    """Sums of ``values`` [R, d] over each layer, [R, layers], float64; ``index`` [d] numbers the layers."""
    index = index.to(values.device)
    total = torch.zeros(len(values), int(index.max()) + 1, dtype=torch.float64, device=values.device)
    return total.index_add_(1, index, values.double())
