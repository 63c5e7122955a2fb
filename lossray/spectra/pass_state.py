"""Where the Krylov pass of one member stands, and the Ritz pairs of its basis."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lossray.spectra.quadrature import Quadrature, Sketch

Array = NDArray[np.float64]


@dataclass
class PassState:
    """Where the pass of one member stands, and in the end its outcome."""

    seed: int
    running: bool  # in the current round
    searching: bool  # in further rounds
    projected: Array  # [width, width]: V H V' of the current basis, filled up to its size
    complements: list[float]  # leading Ritz value outside the locked vectors, for each end; NaN: unknown
    coupling: Array = field(default_factory=lambda: np.zeros((0, 0)))  # [b, b] of the last products
    start: Array = field(default_factory=lambda: np.zeros((0, 0)))  # [b, b] of the start block to the basis
    matvecs: int = 0
    scale: float = 0.0  # largest |Ritz value| or |H v| seen: a lower bound of |lambda|max
    values: Array = field(default_factory=lambda: np.zeros(0))  # locked, in the order of their vectors
    errors: Array = field(default_factory=lambda: np.zeros(0))  # how far these may be off
    share: float = 1.0  # spread of what is not locked, relative to the whole spectrum's
    confirmed: list[bool] = field(default_factory=list)  # for each end wanted
    orthogonality_loss: float = 0.0
    sketch: Sketch | None = None
    trace_products: Array = field(default_factory=lambda: np.zeros(0))  # [traces] u'Hu of `Probing.traces`
    trace_lengths: Array = field(default_factory=lambda: np.zeros(0))  # [traces] |Hu| of the same
    quadrature: Quadrature | None = None


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs of one member's basis, ascending."""

    values: Array  # [m]
    rotation: Array  # [m, m], columns: coefficients in the basis
    residuals: Array  # [m], as the recurrence gives them

    def errors(self) -> Array:
        """Bounds of the values' errors: the residual, or its square over the gap where the gap is known."""
        distances = np.abs(self.values[:, None] - self.values)
        np.fill_diagonal(distances, np.inf)
        gaps = np.maximum(distances.min(axis=1), self.residuals)
        shares = np.divide(self.residuals, gaps, out=np.zeros_like(gaps), where=gaps > 0)
        bounds: Array = self.residuals * shares  # no square, which would overflow or vanish
        return bounds
