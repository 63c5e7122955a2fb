"""What the random start vectors of a Krylov pass say about the whole spectrum."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossray.spectra.certified_pairs import PRODUCTS_AT_ONCE, row_norms
from lossray.spectra.operator import PackedOperator

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Probing:
    """The round whose start vectors are the probes of a density.

    Attributes:
        probes: start vectors of the round.
        steps: Lanczos steps that resolve the whole spectrum; the round takes the share of them that the
            complement of the locked vectors needs for the same resolution.
        traces: further probes, of one product each, for the trace alone.
    """

    probes: int
    steps: int
    traces: int = 0


@dataclass(frozen=True)
class Quadrature:
    """Gauss quadratures of one member's probes, which are uniformly random outside ``deflated``.

    Attributes:
        nodes: [m] common to the probes of a block.
        weights: [probes, m], each row sums to 1.
        deflated: [n] Rayleigh quotients of the vectors that were locked before.
        deflation_error: bound of the sum of what all eigenvalues are off by, since the locked vectors are no
            exact eigenvectors.
        traces: [probes + traces] unbiased estimates of the trace.
        squares: [probes + traces] unbiased estimates of the mean of lambda^2 outside ``deflated``, in
            ``unit``^2.
        unit: of the squares, which would overflow or vanish without.
        projected: [m, m] the Lanczos matrix.
        start: [b, probes] coefficients of the start vectors, as columns, in the first block of the basis.
    """

    nodes: Array
    weights: Array
    deflated: Array
    deflation_error: float
    traces: Array
    squares: Array
    unit: float
    projected: Array
    start: Array


@dataclass(frozen=True)
class Sketch:
    """What the basis Q of the first round says about the trace, and about the probes u of the second.

    trace H = trace Q'HQ + (d - m) v'Hv / |v|^2 in the mean, for v = u - Q Q'u (Hutch++, Meyer et al. 2021).
    As H Q = Q T + N C, with the next block N in the last columns only, v'Hv takes no product of its own.

    Attributes:
        trace: of T = Q'HQ.
        inside: [n] for n probes, what u'Hu exceeds v'Hv by.
        outside: [n] |v|^2.
        size: m, the number of vectors of Q.
    """

    trace: float
    inside: Array
    outside: Array
    size: int

    def traces(self, products: Array, dim: int) -> Array:
        """Estimates [n] of the trace from ``products`` [n], u'Hu of the unit probes."""
        samples: Array = self.trace + (dim - self.size) * (products - self.inside) / self.outside
        return samples


def start_weights(rotation: Array, start: Array) -> Array:
    """Weights [probes, m], each row of sum 1, from Ritz vectors [m, m] and the start vectors [b, probes]."""
    components = start.T @ rotation[: len(start)]
    weights: Array = np.square(components) / np.square(start).sum(axis=0)[:, None]
    return weights


def outside(draws: Tensor, space: Tensor) -> Tensor:
    """Unit vectors [n, d], uniform outside the orthonormal ``space`` [q, d], from normal ``draws`` [n, d]."""
    vectors = draws.clone()
    for _ in range(2):
        vectors -= (vectors @ space.T) @ space
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return vectors / lengths


def quadratic_forms(operator: PackedOperator, vectors: Tensor) -> Tensor:
    """The values u'Hu [R, n] of ``vectors`` [R, n, d]."""
    return forms_and_lengths(operator, vectors)[0]


def forms_and_lengths(operator: PackedOperator, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """The values u'Hu and |Hu|, both [R, n], of ``vectors`` [R, n, d]."""
    forms, lengths = [], []
    for part in vectors.split(PRODUCTS_AT_ONCE, dim=1):
        products = operator.apply(part)
        forms.append((products * part).sum(dim=2))
        lengths.append(row_norms(products.flatten(0, 1)).view(part.shape[:2]))
    return torch.cat(forms, dim=1), torch.cat(lengths, dim=1)
