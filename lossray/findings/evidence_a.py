"""The elementary tests of claim A on one cell: what `verdict_a.decide` rests on."""

import math

import numpy as np
from numpy.typing import NDArray

from lossray.findings.energies import BASELINE, TOP, Cell, GaugeEnergies
from lossray.findings.families import holm, least_attainable_p, seeds_needed
from lossray.findings.means import equivalence, mean_test
from lossray.findings.sign_flips import sign_flip_test
from lossray.findings.verdict_a import Evidence, GaugeEvidence
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

LEAST_DIM = 1000  # below it chi_1^2 < margin is little more than chance (SCIENCE 5A)
NEAR_CHANCE = math.log(3)  # S within it of a null's is "as a random direction"
CONTRAST = math.log(2)  # a smaller difference of S is no contrast


def evidence_of(cell: Cell, activation: str | None, settings: ClaimsSettings) -> Evidence:
    """All elementary tests of one cell.

    Args:
        cell: S of the compared runs.
        activation: of the architecture; only relu networks have a balanced gauge that must be survived.
        settings: margin and level.
    """
    alpha = settings.alpha
    required = ("raw", "balanced", "adaptive") if activation == "relu" else ("raw", "adaptive")
    missing = what_is_missing(cell)
    if missing is not None:
        return Evidence(missing, 1.0, 0, 1.0, 1.0, 1.0, {}, required)
    raw = cell.gauges["raw"]
    pairs = np.isfinite(raw.against_baseline(cell.adaptive)).sum(axis=-1)
    sgd = mean_test(raw.of(BASELINE), math.log(settings.margin_energy), alpha=alpha)
    return Evidence(
        missing=None,
        least_p=least_attainable_p(pairs),
        seeds_needed=seeds_needed(len(pairs), alpha),
        chance=_chance(cell, raw, alpha),
        sgd_below=float(sgd.p_less),
        sgd_above=float(sgd.p_greater),
        gauges={name: gauge_evidence(cell, gauge, settings) for name, gauge in cell.gauges.items()},
        required=required,
    )


def what_is_missing(cell: Cell) -> str | None:
    """Why the claim cannot be tested on this cell at all; None if it can."""
    if not cell.adaptive:
        return "no finished run of an adaptive method"
    if "raw" not in cell.gauges:
        return "no rows in the raw gauge"
    raw = cell.gauges["raw"]
    few = [name for name in (BASELINE, *cell.adaptive) if np.isfinite(raw.of(name)).sum() < 2]
    if few:
        return f"fewer than two resolved S of {', '.join(few)}"
    if raw.dim < LEAST_DIM:
        return f"d = {raw.dim}: perpendicular is tested for d >= {LEAST_DIM} only"
    return None


def gauge_evidence(cell: Cell, gauge: GaugeEnergies, settings: ClaimsSettings) -> GaugeEvidence:
    """The tests of every adaptive method in one gauge."""
    energies = np.array([gauge.of(name) for name in cell.adaptive])
    differences = gauge.against_baseline(cell.adaptive)
    margin = mean_test(energies, math.log(settings.margin_energy), alpha=settings.alpha)
    paired = mean_test(differences, -CONTRAST, alpha=settings.alpha)
    # The energy in a wider subspace bounds that in v1 from above: it can clear a method, not convict it.
    above = margin.p_greater if gauge.subspace == TOP else np.ones(len(cell.adaptive))
    return GaugeEvidence(
        methods=cell.adaptive,
        known=(margin.n >= 2) & (paired.n >= 2),
        below=margin.p_less,
        above=above,
        difference=paired.mean,
        contrast=holm(sign_flip_test(differences)),
        no_contrast=paired.p_greater,
    )


def _chance(cell: Cell, raw: GaugeEnergies, alpha: float) -> float:
    """P value of "some optimizer is not within a factor 3 of the null", for the nearer of two nulls.

    The nulls are the random direction, and random signs of the direction's own components. Twice the smaller
    p value, since either will do; for each of them all optimizers must be near (intersection-union).
    """
    compared = [raw.optimizers.index(name) for name in (BASELINE, *cell.adaptive)]
    p_values = [
        equivalence(over[compared], NEAR_CHANCE, alpha=alpha).max()
        for over in (raw.over_chance, raw.over_sign_flips)
    ]
    return min(1.0, 2 * float(min(p_values)))
