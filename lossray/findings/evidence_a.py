"""The elementary tests of claim A on one cell: what `verdict_a.decide` rests on."""

import math

import numpy as np
from numpy.typing import NDArray

from lossray.findings.energies import BASELINE, TOP, Cell, GaugeEnergies
from lossray.findings.families import intersection_union, least_attainable_p, seeds_needed
from lossray.findings.sign_flips import sign_flip_test
from lossray.findings.skewness import safe_mean_test
from lossray.findings.verdict_a import Evidence, GaugeEvidence
from lossray.geometry.direction_kinds import COVECTORS
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

LEAST_DIM = 1000  # below it chi_1^2 < margin is little more than chance
NEAR = math.log(3)  # S within it of a null's is "as the null"
CONTRAST = math.log(2)  # a smaller difference of S is no contrast
RESOLVED_SHARE = 0.5  # of a method's seeds: with fewer S of them the method is lost


def evidence_of(cell: Cell, activation: str | None, settings: ClaimsSettings) -> Evidence:
    """All elementary tests of one cell.

    Args:
        cell: S of the compared runs.
        activation: of the architecture; only relu networks have a balanced gauge that must be survived.
        settings: margin and level.
    """
    required = required_gauges(cell.direction, activation)
    missing = what_is_missing(cell)
    if missing is not None:
        return Evidence(missing=missing, required=required)
    raw = cell.gauges["raw"]
    bound = math.log(settings.margin_energy)
    differences = raw.against_baseline(cell.adaptive)
    pairs = np.isfinite(differences).sum(axis=-1)
    sgd_below, sgd_above = safe_mean_test(raw.of(BASELINE), bound)
    no_chance = safe_mean_test(raw.over_null(raw.over_chance, BASELINE), NEAR)[1]
    contrast, no_contrast = contrast_tests(differences)
    return Evidence(
        methods=cell.adaptive,
        least_p=least_attainable_p(pairs),
        seeds_needed=seeds_needed(len(pairs), settings.alpha),
        chance=_near(cell, raw, raw.over_chance),
        signs=_near(cell, raw, raw.over_sign_flips),
        sgd_below=float(sgd_below),
        sgd_above=float(sgd_above),
        sgd_above_chance=float(no_chance),
        contrast=contrast,
        no_contrast=no_contrast,
        gauges={name: gauge_evidence(cell, gauge, settings) for name, gauge in cell.gauges.items()},
        required=required,
        lost=_lost(cell),
    )


def required_gauges(direction: str, activation: str | None) -> tuple[str, ...]:
    """Gauges in which "almost perpendicular" must survive.

    The adaptive one is asked of gradients only: it divides displacements by |theta|, which takes the
    energy in v1 of any displacement, of random ones too, far below chance: to pass it shows nothing.
    """
    balanced = ("balanced",) if activation == "relu" else ()
    adaptive = ("adaptive",) if direction in COVECTORS else ()
    return ("raw", *balanced, *adaptive)


def what_is_missing(cell: Cell) -> str | None:
    """Why the claim cannot be tested on this cell at all; None if it can."""
    if not cell.adaptive:
        return "no finished run of an adaptive method"
    judged = (BASELINE, *cell.adaptive)
    gone = [name for name in judged if 2 * cell.lost.get(name, (0, 0))[0] > cell.lost.get(name, (0, 0))[1]]
    if gone:
        counts = [f"{name} ({cell.lost[name][0]} of {cell.lost[name][1]})" for name in gone]
        return f"most runs diverged or failed of {', '.join(counts)}"
    if "raw" not in cell.gauges:
        return "no rows in the raw gauge"
    raw = cell.gauges["raw"]
    if raw.subspace != TOP:
        return f"v1 is not resolved in most runs, and what lies in {raw.subspace} need not lie in v1"
    resolved = {name: int(np.isfinite(raw.of(name)).sum()) for name in judged}
    few = [name for name, n in resolved.items() if n < 2]
    if few:
        return f"fewer than two resolved S of {', '.join(few)}"
    # Seeds that nobody has at this level have no column in `raw`: the runs that were trained count.
    pairs = np.isfinite(raw.against_baseline(cell.adaptive)).sum(axis=-1)
    resolved |= {name: int(n) for name, n in zip(cell.adaptive, pairs, strict=True)}
    trained = {name: max(len(raw.seeds), cell.lost.get(name, (0, 0))[1]) for name in judged}
    few = [
        f"{name} ({resolved[name]} of {n})"
        for name, n in trained.items()
        if resolved[name] < RESOLVED_SHARE * n
    ]
    if few:
        return f"S is known, beside SGD's, of less than half of the seeds of {', '.join(few)}"
    if raw.dim < LEAST_DIM:
        return f"d = {raw.dim}: perpendicular is tested for d >= {LEAST_DIM} only"
    return None


def gauge_evidence(cell: Cell, gauge: GaugeEnergies, settings: ClaimsSettings) -> GaugeEvidence:
    """The tests of every adaptive method against the margin in one gauge.

    The energy in a wider subspace says nothing on v1 in either direction: not known.
    """
    energies = np.array([gauge.of(name) for name in cell.adaptive])
    below, above = safe_mean_test(energies, math.log(settings.margin_energy))
    needed = max(2.0, RESOLVED_SHARE * len(cell.gauges["raw"].seeds))
    resolved = (np.isfinite(energies).sum(axis=-1) >= needed) & (gauge.subspace == TOP)
    return GaugeEvidence(
        methods=cell.adaptive,
        resolved=resolved,
        below=np.where(resolved, below, 1.0),
        above=np.where(resolved, above, 1.0),
    )


def contrast_tests(differences: Array) -> tuple[Array, Array]:
    """P values [m] of "less than a factor 2 below SGD", and of "at least a factor 2 below SGD".

    Args:
        differences: S minus SGD's S of the same seed, [m, n].
    """
    below, above = safe_mean_test(differences, -CONTRAST, skewed="either")
    flips = sign_flip_test(differences + CONTRAST, alternative="less")
    return np.maximum(below, flips), above


def _near(cell: Cell, raw: GaugeEnergies, over: Array) -> float:
    """P value of "some optimizer's S is not within a factor 3 of the null's": two one-sided tests of each.

    Beside a null the distance is that of two energies, which may be skewed to either side.
    """
    compared = np.array([raw.over_null(over, name) for name in (BASELINE, *cell.adaptive)])
    below, _ = safe_mean_test(compared, NEAR, skewed="either")
    _, above = safe_mean_test(compared, -NEAR, skewed="either")
    return float(intersection_union(np.maximum(below, above)))


def _lost(cell: Cell) -> str | None:
    """Who lost runs, as a remark; None if nobody did."""
    counts = [f"{name} ({lost} of {total})" for name, (lost, total) in sorted(cell.lost.items()) if lost]
    return f"runs that diverged or failed are left out of {', '.join(counts)}" if counts else None
