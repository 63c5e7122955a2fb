"""The decision rule of claim A: from elementary tests to one verdict, a pure function."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lossray.findings.families import holm, intersection_union

Array = NDArray[np.float64]

SUPPORTED = "SUPPORTED"
NOT_SUPPORTED = "NOT SUPPORTED"
METRIC_ARTEFACT = "METRIC ARTEFACT"
DIMENSION_ARTEFACT = "DIMENSION ARTEFACT"
UNDECIDED = "UNDECIDED"


@dataclass(frozen=True)
class GaugeEvidence:
    """Elementary tests in one gauge, one entry per adaptive method, [m]; p = 1 where data are missing."""

    methods: tuple[str, ...]
    known: NDArray[np.bool_]  # whether there are enough runs of the method, and pairs with SGD, to test
    below: Array  # p value of "S of the method is not below ln(margin)"
    above: Array  # p value of "S of the method is not above ln(margin)"
    difference: Array  # mean of S minus SGD's S, paired by seed
    contrast: Array  # Holm-adjusted two-sided sign-flip p value of that difference
    no_contrast: Array  # p value of "SGD has at least twice the method's energy": difference <= -ln 2


@dataclass(frozen=True)
class Evidence:
    """All that the verdict on one direction at one architecture rests on."""

    missing: str | None  # what the tables lack, if anything
    least_p: float  # smallest adjusted p value that the contrasts' design can give
    seeds_needed: int
    chance: float  # p value of "some optimizer's S is not within a factor 3 of a null"
    sgd_below: float  # p values of SGD's S against ln(margin), raw gauge
    sgd_above: float
    gauges: Mapping[str, GaugeEvidence]  # "raw" is there unless something is missing
    required: tuple[str, ...]  # gauges in which perpendicularity must survive


@dataclass(frozen=True)
class Decision:
    """A verdict and why, as the end of a sentence."""

    verdict: str
    reason: str


def decide(evidence: Evidence, *, alpha: float) -> Decision:
    """The verdict of SCIENCE 5A on one direction. The first rule that applies decides.

    1. Data are missing: UNDECIDED, naming them.
    2. No outcome could make the contrasts significant: UNDECIDED, naming the seeds needed.
    3. All optimizers, SGD included, are within a factor 3 of chance: DIMENSION ARTEFACT.
    4. The claim is refuted in the raw gauge: NOT SUPPORTED. That is: a method is above the margin; or SGD too
       is below it; or a method is above SGD; or less than a factor 2 below it.
    5. The claim is not established in the raw gauge: UNDECIDED. Established means that every method is below
       the margin, SGD is above it, and every contrast is significant.
    6. Some gauge refutes what the raw one establishes, preconditioned first: METRIC ARTEFACT.
    7. Every method is below the margin in every required gauge: SUPPORTED; otherwise UNDECIDED.

    Statements on "every method" are intersection-union tests; refutations by some method use Holm.
    """
    if evidence.missing is not None:
        return Decision(UNDECIDED, evidence.missing)
    if evidence.least_p >= alpha:
        return Decision(
            UNDECIDED,
            f"the smallest adjusted p value that this design can give is {evidence.least_p:.2g}, not below "
            f"{alpha:g}: at least {evidence.seeds_needed} seeds are needed",
        )
    if evidence.chance <= alpha:
        return Decision(
            DIMENSION_ARTEFACT,
            "every optimizer, SGD included, is as perpendicular as a random direction, or as itself with "
            f"random signs, within a factor 3 (p = {evidence.chance:.2g})",
        )
    raw = evidence.gauges["raw"]
    refuted = _refutations(raw, alpha)
    if evidence.sgd_below <= alpha:
        refuted.append(f"SGD is below the margin too (p = {evidence.sgd_below:.2g})")
    if refuted:
        return Decision(NOT_SUPPORTED, "; ".join(refuted))
    doubts = _doubts(evidence, raw, alpha)
    if doubts:
        return Decision(UNDECIDED, "; ".join(doubts))
    return _across_gauges(evidence, alpha)


def _refutations(gauge: GaugeEvidence, alpha: float) -> list[str]:
    """What contradicts the claim in one gauge."""
    found = []
    above = holm(gauge.above) <= alpha
    if above.any():
        found.append(f"above the margin: {_names(gauge, above)}")
    reversed_ = (gauge.contrast <= alpha) & (gauge.difference > 0)
    if reversed_.any():
        found.append(f"above SGD: {_names(gauge, reversed_)}")
    near = (holm(gauge.no_contrast) <= alpha) & ~reversed_
    if near.any():
        found.append(f"less than a factor 2 below SGD: {_names(gauge, near)}")
    return found


def _doubts(evidence: Evidence, raw: GaugeEvidence, alpha: float) -> list[str]:
    """What is neither refuted nor established in the raw gauge."""
    found = []
    if intersection_union(raw.below) > alpha:
        found.append(f"not shown to be below the margin: {_names(raw, raw.below > alpha)}")
    if evidence.sgd_above > alpha:
        found.append(f"SGD is not shown to be above the margin (p = {evidence.sgd_above:.2g})")
    if intersection_union(raw.contrast) > alpha:
        found.append(f"no significant difference from SGD: {_names(raw, raw.contrast > alpha)}")
    return found


def _across_gauges(evidence: Evidence, alpha: float) -> Decision:
    """Does what holds in the raw gauge survive the others?"""
    for name in ("preconditioned", *evidence.required):
        if name in evidence.gauges and name != "raw":
            refuted = _refutations(evidence.gauges[name], alpha)
            if refuted:
                return Decision(METRIC_ARTEFACT, f"the {name} gauge reverses it: {'; '.join(refuted)}")
    lacking = [
        name
        for name in (*evidence.required, "preconditioned")
        if name not in evidence.gauges or not evidence.gauges[name].known.all()
    ]
    if lacking:
        return Decision(
            UNDECIDED,
            f"it holds in the raw gauge; no resolved S of some method in gauge {', '.join(lacking)}",
        )
    worst = {name: float(intersection_union(evidence.gauges[name].below)) for name in evidence.required}
    weak = [name for name, p in worst.items() if p > alpha]
    if weak:
        gauge = evidence.gauges[weak[0]]
        return Decision(
            UNDECIDED,
            f"it holds in the raw gauge; in the {weak[0]} gauge not shown to be below the margin: "
            f"{_names(gauge, gauge.below > alpha)}",
        )
    return Decision(
        SUPPORTED,
        "every adaptive method is below the margin in every gauge "
        f"({', '.join(evidence.required)}; largest p = {max(worst.values()):.2g}), SGD is above it "
        f"(p = {evidence.sgd_above:.2g}), and every paired difference is significant "
        f"(largest adjusted p = {evidence.gauges['raw'].contrast.max():.2g})",
    )


def overall(verdicts: Mapping[str, str]) -> str:
    """One verdict from those of the architectures: the claim is general, so one refutation refutes it."""
    found = set(verdicts.values())
    for verdict in (NOT_SUPPORTED, METRIC_ARTEFACT, DIMENSION_ARTEFACT, UNDECIDED):
        if verdict in found:
            return verdict
    return SUPPORTED if found else UNDECIDED


def _names(gauge: GaugeEvidence, which: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, chosen in zip(gauge.methods, which, strict=True) if chosen)
