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
    """Tests against the margin in one gauge, by adaptive method, [m]; p = 1 where data are missing.

    Attributes:
        methods: the m adaptive methods.
        resolved: whether there are enough runs of the method, with v1 resolved.
        below: p value of "S of the method is not below ln(margin)".
        above: p value of "S of the method is not above ln(margin)".
    """

    methods: tuple[str, ...]
    resolved: NDArray[np.bool_]
    below: Array
    above: Array


@dataclass(frozen=True)
class Evidence:
    """All that one direction's verdict at one architecture and moment rests on; [m] is by adaptive method.

    Attributes:
        missing: what the tables lack, if anything; then there are no tests.
        methods: the m adaptive methods.
        least_p: smallest adjusted p value that the contrasts' design can give.
        seeds_needed: with fewer the contrasts cannot be significant.
        chance: p value of "some optimizer's S is not within a factor 3 of random windows'".
        signs: the same of its own directions with random signs.
        sgd_below: p value of "SGD's S is not below ln(margin)", raw gauge.
        sgd_above: p value of "SGD's S is not above ln(margin)", raw gauge.
        sgd_above_chance: p value of "SGD's S is not more than a factor 3 above random windows'".
        contrast: p values of "less than a factor 2 below SGD", [m].
        no_contrast: p values of "at least a factor 2 below SGD", [m].
        gauges: by name; "raw" is there unless something is missing.
        required: gauges in which perpendicularity must survive.
        lost: whose runs are left out.
    """

    missing: str | None = None
    methods: tuple[str, ...] = ()
    least_p: float = 1.0
    seeds_needed: int = 0
    chance: float = 1.0
    signs: float = 1.0
    sgd_below: float = 1.0
    sgd_above: float = 1.0
    sgd_above_chance: float = 1.0
    contrast: Array = field(default_factory=NONE.copy)
    no_contrast: Array = field(default_factory=NONE.copy)
    gauges: Mapping[str, GaugeEvidence] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    lost: str | None = None

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
    """A verdict and why, as the end of a sentence.

    Attributes:
        verdict: the word for it.
        reason: why.
        judged: whether the data could have decided.
        where: at which levels of loss, where it is a verdict on several.
        lost: whose runs are left out.
    """

    verdict: str
    reason: str
    judged: bool = True
    where: str = ""
    lost: str | None = None


@dataclass(frozen=True)
class Refutations:
    """What would contradict the claim: one p value for each, [tests], and what each says.

    Attributes:
        reasons: what, and of whom.
        p_values: [tests].
    """

    reasons: tuple[tuple[str, str], ...]
    p_values: Array

    def significant(self, adjusted: Array, alpha: float) -> list[str]:
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
    open_ones = [cell_evidence for cell_evidence in evidence if cell_evidence.limited(alpha) is None]
    refuted = _adjusted_together([_refutations(cell_evidence) for cell_evidence in open_ones], alpha)
    reversed_ = _adjusted_together([_reversals(cell_evidence) for cell_evidence in open_ones], alpha)
    judged_cells = iter(zip(open_ones, refuted, reversed_, strict=True))
    decisions = []
    for cell_evidence in evidence:
        limit = cell_evidence.limited(alpha)
        if limit is not None:
            decisions.append(Decision(UNDECIDED, limit, judged=False))
        else:
            decisions.append(_with_losses(_decide(*next(judged_cells), alpha), cell_evidence))
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
    adjusted = hommel(np.concatenate([refutations.p_values for refutations in several]))
    ends = np.cumsum([len(refutations.p_values) for refutations in several])[:-1]
    return [
        refutations.significant(part, alpha)
        for refutations, part in zip(several, np.split(adjusted, ends), strict=True)
    ]


def _doubts(evidence: Evidence, alpha: float) -> list[str]:
    """What is neither refuted nor established in the raw gauge."""
    raw, doubts = evidence.gauges["raw"], []
    if intersection_union(raw.below) > alpha:
        doubts.append(f"not shown to be below the margin: {_names(raw, raw.below > alpha)}")
    if evidence.sgd_above > alpha:
        doubts.append(f"SGD is not shown to be above the margin (p = {evidence.sgd_above:.2g})")
    if intersection_union(evidence.contrast) > alpha:
        doubts.append(f"not shown to be a factor 2 below SGD: {_names(raw, evidence.contrast > alpha)}")
    return doubts


def _across_gauges(evidence: Evidence, alpha: float) -> Decision:
    """Does what holds in the raw gauge survive the others?"""
    lacking = [
        name
        for name in dict.fromkeys((*evidence.required, "preconditioned"))
        if name not in evidence.gauges or not evidence.gauges[name].resolved.all()
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
    judged = {moment: decision for moment, decision in by_moment.items() if decision.judged}
    if not judged:
        return Decision(UNDECIDED, _reasons(by_moment) or "no rows of compared runs", judged=False)
    verdict = overall({moment: decision.verdict for moment, decision in judged.items()})
    parts = [
        f"{word} at {', '.join(moment for moment, decision in judged.items() if decision.verdict == word)}"
        for word in dict.fromkeys(decision.verdict for decision in judged.values())
    ]
    lacking = [moment for moment in by_moment if moment not in judged]
    if lacking:
        parts.append(f"not judged at {', '.join(lacking)}")
    deciding = {moment: decision for moment, decision in judged.items() if decision.verdict == verdict}
    where = "; ".join(
        [*parts, *dict.fromkeys(decision.lost for decision in judged.values() if decision.lost)]
    )
    return Decision(verdict, f"{where} ({_reasons(deciding)})" if deciding else where, where=where)


def _reasons(by_moment: Mapping[str, Decision]) -> str:
    """Each reason once, with the levels at which it holds."""
    return "; ".join(
        f"{reason} (at {', '.join(moment for moment, one in by_moment.items() if one.reason == reason)})"
        for reason in dict.fromkeys(decision.reason for decision in by_moment.values())
    )


def overall(verdicts: Mapping[str, str]) -> str:
    """One verdict from several: the claim is general, so one refutation refutes it, and one doubt is a doubt.

    The refutations are to be adjusted over all of them (`decide_together`). An artefact of dimension, or of
    signs, is one only where all agree on it.
    """
    distinct = set(verdicts.values())
    for verdict in (NOT_SUPPORTED, METRIC_ARTEFACT):
        if verdict in distinct:
            return verdict
    return distinct.pop() if len(distinct) == 1 else UNDECIDED


def _names(gauge: GaugeEvidence, which: NDArray[np.bool_]) -> str:
    return ", ".join(name for name, chosen in zip(gauge.methods, which, strict=True) if chosen)
