"""Where the Krylov pass of one member stands, and the Ritz pairs of its basis."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lossray.spectra.quadrature import Quadrature, Sketch

Array = NDArray[np.float64]


@dataclass
class PassState:
    """Where the pass of one member stands, and in the end its outcome.

    Attributes:
        seed: of the member's random vectors.
        running: whether it takes part in the current round.
        searching: whether it takes part in further rounds.
        projected: [width, width] V H V' of the current basis, filled up to its size.
        complements: leading Ritz value outside the locked vectors, for each end; NaN where it is not known.
        coupling: [b, b] of the last block of the basis to the one before.
        start: [b, b] coefficients of the start vectors, as columns, in the first block of the basis.
        matvecs: products so far.
        scale: largest |Ritz value| or |H v| seen: a lower bound of |lambda|max.
        values: [n] of the locked pairs, in the order of their vectors.
        errors: [n] how far these may be off.
        share: spread of what is not locked, relative to the whole spectrum's.
        confirmed: for each end, whether a round found nothing beyond its pairs.
        orthogonality_loss: largest |V V' - I| over the bases so far.
        sketch: what the first round says about the trace; None before, and where no probing asks for it.
        trace_products: [traces] u'Hu of `Probing.traces`.
        trace_lengths: [traces] |Hu| of the same.
        quadrature: of the probing round; None before, and where there is none.
    """

    seed: int
    running: bool
    searching: bool
    projected: Array
    complements: list[float]
    coupling: Array = field(default_factory=lambda: np.zeros((0, 0)))
    start: Array = field(default_factory=lambda: np.zeros((0, 0)))
    matvecs: int = 0
    scale: float = 0.0
    values: Array = field(default_factory=lambda: np.zeros(0))
    errors: Array = field(default_factory=lambda: np.zeros(0))
    share: float = 1.0
    confirmed: list[bool] = field(default_factory=list)
    orthogonality_loss: float = 0.0
    sketch: Sketch | None = None
    trace_products: Array = field(default_factory=lambda: np.zeros(0))
    trace_lengths: Array = field(default_factory=lambda: np.zeros(0))
    quadrature: Quadrature | None = None


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs of one member's basis, ascending.

    Attributes:
        values: [m] float64.
        rotation: [m, m] float64, columns of coefficients in the basis.
        residuals: [m] as the recurrence gives them.
    """

    values: Array
    rotation: Array
    residuals: Array

    def errors(self) -> Array:
        """Bounds of the values' errors: the residual, or its square over the gap where the gap is known."""
        distances = np.abs(self.values[:, None] - self.values)
        np.fill_diagonal(distances, np.inf)
        gaps = np.maximum(distances.min(axis=1), self.residuals)
        shares = np.divide(self.residuals, gaps, out=np.zeros_like(gaps), where=gaps > 0)
        bounds: Array = self.residuals * shares  # no square, which would overflow or vanish
        return bounds
