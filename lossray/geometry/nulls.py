"""What angles are held against: directions that know nothing of the surface (theory 2.11, 5A)."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.geometry.gram import finite_eigenvalues
from lossray.geometry.quadratic_forms import QuadraticForm, form_of, stacked
from lossray.networks.layout import Layout
from lossray.networks.parameter_layers import layers

Array = NDArray[np.float64]
IntArray = NDArray[np.int64]


def null_p_values(chi2: Array, rest: Array, k: int, dim: int | IntArray) -> tuple[Array, Array]:
    """P(B >= chi^2) and P(B <= chi^2), B ~ Beta(k/2, (d-k)/2): the null of random directions (theory 2.11).

    Args:
        chi2: energies inside the subspace, [n].
        rest: 1 - chi2, as accurate as chi2 itself: it decides the upper tail near 1.
        k: dimension of the subspace.
        dim: dimension of the space, one or [n]; NaN where it is not above k.
    """
    from scipy.special import betainc, betaincc  # here: half a second that training does not need

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
        self._index, self._layers = layer_index(layout).to(kept.device), len(layers(layout))
        self._sizes = self._sums(kept.double())

    def expected(self, energies: Tensor, weights: Tensor) -> Tensor:
        """Sum over layers of |u_l|^2 sum_k |v_k,l|^2 / d_l, [R].

        Args:
            energies: squares of u, [R, d].
            weights: sum over k of the squares of v_k, [R, d].
        """
        shares = self._sums(weights) / self._sizes.clamp(min=1)
        return (self._sums(energies) * shares).sum(dim=1)

    def _sums(self, values: Tensor) -> Tensor:
        return layer_sums(values, self._index, self._layers)


class IsotropicNull:
    """Mean of S for a window that is turned at random, as a whole, in the parameters' own coordinates.

    Its steps keep their inner products, and so their persistence; of the surface they know nothing. With l_j
    the eigenvalues of their Gram matrix over its trace, T the gauge's diagonal map, W = TV and mu_a the
    eigenvalues of W'W, the energy in the eigenspace is sum_a,j mu_a l_j z_aj^2 and that of the window
    sum_i,j T_i^2 l_j z_ij^2, z independent standard normal but for terms of order 1/d, which are put right.
    E S is the difference of the expected logarithms, however the two sums depend on each other.

    Args:
        scale: T, [R, d]; zero for coordinates that do not count.
        duals: rows of W', [R, k, d].
        sizes: dimensions of the eigenspaces, k at most.
    """

    def __init__(self, scale: Tensor, duals: Tensor, sizes: Iterable[int]) -> None:
        self._dim = scale.shape[1]
        self._whole = form_of(scale.double().square())
        overlaps = duals.double() @ duals.double().mT
        self._inside = {k: form_of(finite_eigenvalues(overlaps[:, :k, :k])) for k in sizes}

    def expected(self, window: QuadraticForm) -> dict[int, Tensor]:
        """Mean of S by size of the eigenspace, [R]; ``window`` has the weights l_j (`gram.gram_shares`)."""
        forms = [self._whole, *self._inside.values()]
        logs = stacked(forms).times(stacked([window] * len(forms))).expected_log()
        whole, *insides = logs.split(len(window.values))
        return {
            k: inside - whole + self._finite_size(self._inside[k], window)
            for k, inside in zip(self._inside, insides, strict=True)
        }

    def _finite_size(self, inside: QuadraticForm, window: QuadraticForm) -> Tensor:
        """What orthonormal directions add to the mean of S, instead of independent ones.

        Of first order in 1/d; none for one persistent direction, which is exact. For a turned frame E of n
        directions Var(tr(A E L E')) = 2 (tr A^2 - (tr A)^2 / d) (tr L^2 - (tr L)^2 / d) / d^2, less than for
        independent ones, and E ln Q is below ln E Q by half the relative variance.
        """
        narrower = inside.concentration - self._whole.concentration
        return narrower * (1 - window.concentration) / self._dim


def layer_index(layout: Layout) -> Tensor:
    """Number of the layer of every coordinate, [d] int64."""
    owner = {name: i for i, names in enumerate(layers(layout).values()) for name in names}
    counts = torch.tensor(layout.sizes, device="cpu")
    return torch.repeat_interleave(torch.tensor([owner[name] for name in layout.names], device="cpu"), counts)


def layer_sums(values: Tensor, index: Tensor, count: int) -> Tensor:
    """Sums of ``values`` [R, d] over each of ``count`` layers, float64; ``index`` [d] numbers the layers."""
    total = torch.zeros(len(values), count, dtype=torch.float64, device=values.device)
    return total.index_add_(1, index, values.double())
