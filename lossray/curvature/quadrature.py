"""What the random start vectors of a Krylov pass say about the whole spectrum."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Probing:
    """The round whose start vectors are the probes of a density.

    Attributes:
        probes: start vectors of the round.
        steps: vectors of a basis that resolves the whole spectrum; the round takes the share of them that the
            complement of the locked vectors needs for the same resolution.
    """

    probes: int
    steps: int


@dataclass(frozen=True)
class Quadrature:
    """Gauss quadratures of one member's probes, which are uniformly random outside ``deflated``."""

    nodes: Array  # [m], common to the probes of a block
    weights: Array  # [probes, m], each row sums to 1
    deflated: Array  # [n] Rayleigh quotients of the vectors that were locked before
    traces: Array  # [probes] unbiased estimates of the trace


@dataclass(frozen=True)
class Sketch:
    """What the basis Q of the first round says about the trace, and about the probes u of the second.

    trace H = trace Q'HQ + (d - m) v'Hv / |v|^2 in the mean, for v = u - Q Q'u (Hutch++, Meyer et al. 2021).
    As H Q = Q T + N C, with the next block N in the last columns only, v'Hv takes no product of its own.
    """

    trace: float  # of T = Q'HQ
    inside: Array  # [probes] what u'Hu exceeds v'Hv by
    outside: Array  # [probes] |v|^2
    size: int  # m, the vectors of Q

    def traces(self, products: Array, dim: int) -> Array:
        """Estimates [probes] of the trace from ``products`` [probes], u'Hu of the unit probes."""
        samples: Array = self.trace + (dim - self.size) * (products - self.inside) / self.outside
        return samples
