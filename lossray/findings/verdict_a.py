"""The decision rules of claim A: from elementary tests to verdicts, pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lossray.findings.families import hommel, intersection_union

Array = NDArray[np.float64]

SUPPORTED = "SUPPORTED"
NOT_SUPPORTED = "NOT SUPPORTED"
METRIC_ARTEFACT = "METRIC ARTEFACT"
DIMENSION_ARTEFACT = "DIMENSION ARTEFACT"
RANDOM_SIGNS = "RANDOM SIGNS"
UNDECIDED = "UNDECIDED"

NONE: Array = np.empty(0)


@dataclass(frozen=True)
class GaugeEvidence:
    """Tests against the margin in one gauge, by adaptive method, [m]; p = 1 where data are missing."""

    methods: tuple[str, ...]
    known: NDArray[np.bool_]  # whether there are enough runs of the method, with v1 resolved
    below: Array  # p value of "S of the method is not below ln(margin)"
    above: Array  # p value of "S of the method is not above ln(margin)"


@dataclass(frozen=True)
class Evidence:
    """All that one direction's verdict at one architecture and moment rests on; [m] is by adaptive method."""

    missing: str | None = None  # what the tables lack, if anything; then there are no tests
    methods: tuple[str, ...] = ()
    least_p: float = 1.0  # smallest adjusted p value that the contrasts' design can give
    seeds_needed: int = 0
    chance: float = 1.0  # p value of "some optimizer's S is not within a factor 3 of random windows'"
    signs: float = 1.0  # the same of its own directions with random signs
    sgd_below: float = 1.0  # p values of SGD's S against ln(margin), raw gauge
    sgd_above: float = 1.0
    sgd_above_chance: float = 1.0  # p value of "SGD's S is not more than a factor 3 above random windows'"
    contrast: Array = field(default_factory=NONE.copy)  # p value of "less than a factor 2 below SGD"
    no_contrast: Array = field(default_factory=NONE.copy)  # p value of "at least a factor 2 below SGD"
    gauges: Mapping[str, GaugeEvidence] = field(default_factory=dict)  # "raw" unless something is missing
    required: tuple[str, ...] = ()  # gauges in which perpendicularity must survive
    lost: str | None = None  # whose runs are left out

    def limited(self, alpha: float) -> str | None:
        """Why no outcome of the tests could decide; None if some could."""
        if self.missing is not None:
            return self.missing
        if self.least_p >= alpha:
            return (
                f"the smallest adjusted p value that this design can give is {self.least_p:.2g}, not below "
                f"{alpha:g}: at least {self.seeds_needed} seeds are needed"
            )
        return None


@dataclass(frozen=True)
class Decision:
    """A verdict and why, as the end of a sentence."""

    verdict: str
    reason: str
    judged: bool = True  # whether the data could have decided
    where: str = ""  # at which levels of loss, where it is a verdict on several
    lost: str | None = None  # whose runs are left out


@dataclass(frozen=True)
class Refutations:
    """What would contradict the claim: one p value for each, [tests], and what each says."""

    reasons: tuple[tuple[str, str], ...]  # what, and of whom
    p_values: Array

    def found(self, adjusted: Array, alpha: float) -> list[str]:
        """The significant ones, in words: each reason once, with all whom it concerns."""
        by_reason: dict[str, list[str]] = {}
        for (what, whom), p in zip(self.reasons, adjusted, strict=True):
            if p <= alpha:
                by_reason.setdefault(what, []).append(whom)
        return [f"{what} {', '.join(whom)}".strip() for what, whom in by_reason.items()]


def decide(evidence: Evidence, *, alpha: float) -> Decision:
    """The verdict on one direction, by itself; see `decide_together`."""
    return decide_together([evidence], alpha=alpha)[0]


def decide_together(evidence: Sequence[Evidence], *, alpha: float) -> list[Decision]:
    """The verdicts on several cells, such that any refutation among them is false with probability alpha.

    Of each cell the first rule that applies decides:

    1. Data are missing, or no outcome could make the contrasts significant: UNDECIDED, naming what it takes.
    2. All optimizers, SGD included, are within a factor 3 of random windows: DIMENSION ARTEFACT.
    3. The claim is refuted in the raw gauge: NOT SUPPORTED. That is: a method is above the margin; or SGD is
       below it, though more than a factor 3 above random windows; or SGD is above it and a method is less
       than a factor 2 below SGD.
    4. The claim is not established in the raw gauge: UNDECIDED. Established means that every method is below
       the margin, SGD is above it, and every method is at least a factor 2 below SGD.
    5. In another gauge a method is above the margin: METRIC ARTEFACT.
    6. All optimizers are within a factor 3 of their own directions with random signs: RANDOM SIGNS.
    7. Every method is below the margin in every required gauge: SUPPORTED; otherwise UNDECIDED.

    Statements on "every method" are intersection-union tests and need no adjustment; the refutations by some
    method (3, and separately 5) are adjusted over methods, reasons, gauges and cells (Hommel).
    """
    open_ones = [own for own in evidence if own.limited(alpha) is None]
    refuted = _adjusted_together([_refutations(own) for own in open_ones], alpha)
    reversed_ = _adjusted_together([_reversals(own) for own in open_ones], alpha)
    found = iter(zip(open_ones, refuted, reversed_, strict=True))
    decisions = []
    for own in evidence:
        limit = own.limited(alpha)
        if limit is not None:
            decisions.append(Decision(UNDECIDED, limit, judged=False))
        else:
            decisions.append(_with_losses(_decide(*next(found), alpha), own))
    return decisions


def _with_losses(decision: Decision, evidence: Evidence) -> Decision:
    if evidence.lost is None:
        return decision
    return Decision(
        decision.verdict, f"{decision.reason} ({evidence.lost})", decision.judged, lost=evidence.lost
    )


def _decide(evidence: Evidence, refuted: list[str], reversed_: list[str], alpha: float) -> Decision:
    """Rules 2 to 7 on one cell, given the adjusted refutations."""
    if evidence.chance <= alpha:
        return Decision(
            DIMENSION_ARTEFACT,
            "every optimizer, SGD included, is as perpendicular as a random direction, within a factor 3 "
            f"(p = {evidence.chance:.2g})",
        )
    if refuted:
        return Decision(NOT_SUPPORTED, "; ".join(refuted))
    doubts = _doubts(evidence, alpha)
    if doubts:
        return Decision(UNDECIDED, "; ".join(doubts))
    if reversed_:
        return Decision(METRIC_ARTEFACT, "; ".join(reversed_))
    if evidence.signs <= alpha:
        return Decision(
            RANDOM_SIGNS,
            "it holds in the raw gauge, and every optimizer is as aligned as its own directions with random "
            f"signs, within a factor 3 (p = {evidence.signs:.2g}): which parameters move makes the contrast",
        )
    return _across_gauges(evidence, alpha)


def _refutations(evidence: Evidence) -> Refutations:
    """What contradicts the claim in the raw gauge."""
    raw, methods = evidence.gauges["raw"], evidence.methods
    return Refutations(
        (
            *(("above the margin:", name) for name in methods),
            ("SGD is below the margin too", ""),
            *(("less than a factor 2 below SGD:", name) for name in methods),
        ),
        np.concatenate(
            [
                raw.above,
                [max(evidence.sgd_below, evidence.sgd_above_chance)],
                np.maximum(evidence.no_contrast, evidence.sgd_above),
            ]
        ),
    )


def _reversals(evidence: Evidence) -> Refutations:
    """Methods above the margin in a gauge other than the raw one."""
    others = {name: gauge for name, gauge in evidence.gauges.items() if name != "raw"}
    return Refutations(
        tuple(
            (f"the {name} gauge reverses it: above the margin:", who)
            for name in others
            for who in evidence.methods
        ),
        np.concatenate([gauge.above for gauge in others.values()]) if others else NONE,
    )


def _adjusted_together(several: Sequence[Refutations], alpha: float) -> list[list[str]]:
    """The significant refutations of each cell, adjusted over all of them."""
    if not several:
        return []
    adjusted = hommel(np.concatenate([own.p_values for own in several]))
    ends = np.cumsum([len(own.p_values) for own in several])[:-1]
    return [own.found(part, alpha) for own, part in zip(several, np.split(adjusted, ends), strict=True)]


def _doubts(evidence: Evidence, alpha: float) -> list[str]:
    """What is neither refuted nor established in the raw gauge."""
    raw, found = evidence.gauges["raw"], []
    if intersection_union(raw.below) > alpha:
        found.append(f"not shown to be below the margin: {_names(raw, raw.below > alpha)}")
    if evidence.sgd_above > alpha:
        found.append(f"SGD is not shown to be above the margin (p = {evidence.sgd_above:.2g})")
    if intersection_union(evidence.contrast) > alpha:
        found.append(f"not shown to be a factor 2 below SGD: {_names(raw, evidence.contrast > alpha)}")
    return found


def _across_gauges(evidence: Evidence, alpha: float) -> Decision:
    """Does what holds in the raw gauge survive the others?"""
    lacking = [
        name
        for name in dict.fromkeys((*evidence.required, "preconditioned"))
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
        "every adaptive method is below the margin in every required gauge "
        f"({', '.join(evidence.required)}; largest p = {max(worst.values()):.2g}), SGD is above it "
        f"(p = {evidence.sgd_above:.2g}), and every method is a factor 2 below SGD "
        f"(largest p = {evidence.contrast.max():.2g})",
    )


def across_moments(by_moment: Mapping[str, Decision]) -> Decision:
    """One verdict on an architecture from those at its levels of loss.

    The claim is on training as a whole: what refutes it at one level refutes it; it holds if it holds at
    every level that could be judged. Levels that lack data are named, and do not count.
    """
    judged = {moment: own for moment, own in by_moment.items() if own.judged}
    if not judged:
        return Decision(UNDECIDED, _reasons(by_moment) or "no rows of compared runs", judged=False)
    verdict = overall({moment: own.verdict for moment, own in judged.items()})
    parts = [
        f"{word} at {', '.join(moment for moment, own in judged.items() if own.verdict == word)}"
        for word in dict.fromkeys(own.verdict for own in judged.values())
    ]
    lacking = [moment for moment in by_moment if moment not in judged]
    if lacking:
        parts.append(f"not judged at {', '.join(lacking)}")
    deciding = {moment: own for moment, own in judged.items() if own.verdict == verdict}
    where = "; ".join([*parts, *dict.fromkeys(own.lost for own in judged.values() if own.lost)])
    return Decision(verdict, f"{where} ({_reasons(deciding)})" if deciding else where, where=where)


def _reasons(by_moment: Mapping[str, Decision]) -> str:
    """Each reason once, with the levels at which it holds."""
    return "; ".join(
        f"{reason} (at {', '.join(moment for moment, own in by_moment.items() if own.reason == reason)})"
        for reason in dict.fromkeys(own.reason for own in by_moment.values())
    )


def overall(verdicts: Mapping[str, str]) -> str:
    """One verdict from several: the claim is general, so one refutation refutes it, and one doubt is a doubt.

    The refutations are to be adjusted over all of them (`decide_together`). An artefact of dimension, or of
    signs, is one only where all agree on it.
    """
    found = set(verdicts.values())
    for verdict in (NOT_SUPPORTED, METRIC_ARTEFACT):
        if verdict in found:
            return verdict
    return found.pop() if len(found) == 1 else UNDECIDED


def _names(gauge: GaugeEvidence, which: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, chosen in zip(gauge.methods, which, strict=True) if chosen)
