"""The decision rule of claim C: from contrasts to verdicts, pure functions."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import special

from lossray.findings.ensemble_contrasts import Contrast
from lossray.findings.families import hommel
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED, UNDECIDED, Decision

# The two variants of the paper's ensemble that can win, and what each must beat: first the same schedule
# without the rescaling, then the same with learning rates eta D^-2 in place of the rescaling D.
CONTROLS = {
    "rescale_retrain": ("snapshot", "lr_equivalent"),
    "rescale_curve": ("curve", "curve_lr_equivalent"),
}
CODES = {
    "rescale_retrain": "C1",
    "points_geometric": "C2",
    "points_line": "C2",
    "rescale_curve": "C3",
    "rescale_retrain_curve": "C4",
    "align_curve": "C5",
}
EQUIVALENT = "EQUIVALENT TO LEARNING RATES"
LEAST_RUNS = 5  # fewer say nothing of how a difference scatters over runs
POWER = 0.8
MOST_RUNS = 1000  # no plan goes beyond
NAMED = 5  # base runs that a sentence names


@dataclass(frozen=True)
class VariantEvidence:
    """All that the verdict on one variant in one setting rests on. P values are two-sided and adjusted.

    Attributes:
        variant: its method.
        missing: methods without test predictions.
        lost: base runs without scores, by "METHOD at budget BUDGET", if any.
        base_runs: number of base runs of the setting.
        contrasts: by budget, ascending: of the NLL, with each control.
        better: by budget, of "not better than both controls"; Hommel over the setting's.
        equivalent: of "differs by the margin at some budget"; Hommel over the setting's variants.
        short: of "better than both controls by the margin at some budget".
        identical: whether it is the same as its learning-rate control to rounding at every budget.
    """

    variant: str
    missing: tuple[str, ...]
    lost: Mapping[str, tuple[str, ...]]
    base_runs: int
    contrasts: Mapping[float, tuple[Contrast, ...]]
    better: Mapping[float, float]
    equivalent: float
    short: float
    identical: bool


# ---- P values, doubled: half of alpha is the reserve for runs whose differences are skewed


def p_better(contrasts: Sequence[Contrast]) -> float:
    """Of "at this budget it is not better than both controls": the larger one counts."""
    if len(contrasts) < 2:
        return 1.0
    return max(
        1.0 if contrast.same or contrast.n < LEAST_RUNS else _doubled(contrast.relative.p_above(0))
        for contrast in contrasts
    )


def p_short(contrasts: Mapping[float, Sequence[Contrast]], margin: float) -> float:
    """Of "at some budget it is better than both controls by ``margin``".

    It is short of it where one of the controls is less than that behind (Simes' test of the two), and must be
    at every budget.
    """
    if not contrasts:
        return 1.0
    return max(
        float(hommel([_p_below(one, margin) for one in several]).min()) for several in contrasts.values()
    )


def p_equivalent(contrasts: Mapping[float, Sequence[Contrast]], control: str, margin: float) -> float:
    """Of "at some budget it differs from ``control`` by ``margin``": two one-sided tests at every budget."""
    with_control = [one for several in contrasts.values() for one in several if one.control == control]
    if not with_control or len(with_control) < len(contrasts):
        return 1.0
    return max(max(_p_below(one, margin), _p_above(one, -margin)) for one in with_control)


def _p_below(contrast: Contrast, bound: float) -> float:
    if contrast.n < LEAST_RUNS:
        return 1.0
    return 0.0 if contrast.same else _doubled(contrast.relative.p_below(bound))


def _p_above(contrast: Contrast, bound: float) -> float:
    if contrast.n < LEAST_RUNS:
        return 1.0
    return 0.0 if contrast.same else _doubled(contrast.relative.p_above(bound))


def _doubled(p: float) -> float:
    return min(1.0, 2 * p)


def identical(contrasts: Mapping[float, Sequence[Contrast]], control: str) -> bool:
    """Whether the variant is the same as the control to rounding at every budget."""
    with_control = [one for several in contrasts.values() for one in several if one.control == control]
    return len(with_control) == len(contrasts) > 0 and all(one.same for one in with_control)


# ---- verdicts


def decide_variant(evidence: VariantEvidence, *, margin: float, alpha: float) -> Decision:
    """The verdict on one variant. The first rule that applies decides.

    1. A method has no predictions, or lost most of its base runs at some budget: UNDECIDED, naming it.
    2. The variant is the same as its learning-rate control to rounding, example by example, at every budget:
       EQUIVALENT TO LEARNING RATES, by any number of base runs.
    3. At some budget it is better than both controls: SUPPORTED.
    4. At every budget it is within ``margin`` of its learning-rate control, to either side: EQUIVALENT TO
       LEARNING RATES.
    5. At every budget one of the controls is less than ``margin`` behind it: NOT SUPPORTED.
    6. UNDECIDED, naming the base runs that are needed, or would probably decide.

    Contrasts of fewer than LEAST_RUNS base runs count in rule 2 only.

    Args:
        evidence: of the variant.
        margin: the smallest relative improvement that would count.
        alpha: level of rules 3 to 5.
    """
    if evidence.missing:
        return Decision(UNDECIDED, f"no test predictions of {', '.join(evidence.missing)}")
    failed = mostly_lost(evidence)
    if failed:
        return Decision(UNDECIDED, f"most base runs have no {' and no '.join(failed)}")
    if not evidence.contrasts:
        return Decision(UNDECIDED, "no budget at which a control is there as well")
    if evidence.identical:
        return Decision(EQUIVALENT, f"{_identity(evidence)}: {worth(evidence)}")
    won = [budget for budget, p in evidence.better.items() if p < alpha]
    if won:
        return Decision(SUPPORTED, _won(evidence, won, margin=margin, alpha=alpha))
    if evidence.equivalent < alpha:
        text = f"at every budget within {percent(margin)} of its learning-rate control"
        return Decision(EQUIVALENT, f"{text} (p = {evidence.equivalent:.2g}): {worth(evidence)}")
    if evidence.short < alpha:
        text = f"at every budget its improvement over one of the controls is below {percent(margin)}"
        return Decision(NOT_SUPPORTED, f"{text} (p = {evidence.short:.2g})")
    fewest = min(one.n for several in evidence.contrasts.values() for one in several)
    if fewest < LEAST_RUNS:
        return Decision(UNDECIDED, f"at least {LEAST_RUNS} seeds are needed, the fewest pairs are {fewest}")
    return Decision(
        UNDECIDED,
        f"neither better than both controls nor shown to fall short of {percent(margin)}; "
        f"{_what_would_decide(evidence, margin=margin, alpha=alpha)}",
    )


def mostly_lost(evidence: VariantEvidence) -> list[str]:
    """The methods, with their budgets, that have scores of less than half of the base runs."""
    return [where for where, runs in evidence.lost.items() if 2 * len(runs) > evidence.base_runs]


def _identity(evidence: VariantEvidence) -> str:
    alike = [one for several in evidence.contrasts.values() for one in several if one.same]
    largest = max(one.spread for one in alike)
    how = (
        f"to rounding (mean |difference| at most {largest:.1g} nats)" if largest else "without any difference"
    )
    return f"the same as {alike[-1].control}, example by example, at every budget, {how}"


def _won(evidence: VariantEvidence, won: Sequence[float], *, margin: float, alpha: float) -> str:
    budgets = ", ".join(f"{budget:g} (p = {evidence.better[budget]:.2g})" for budget in won)
    small = p_short({budget: evidence.contrasts[budget] for budget in won}, margin) < alpha
    aside = f", though by less than {percent(margin)}" if small else ""
    return f"better than both controls at budget {budgets}{aside}"


def worth(evidence: VariantEvidence) -> str:
    """What a change of learning rates that rescaling amounts to does to the schedule, at every budget."""
    schedule = CONTROLS[evidence.variant][0]
    contrasts = over_schedule(evidence)
    rates = "rescaling " + ("is" if evidence.identical else "does what") + " a change of learning rates"
    rates += "" if evidence.identical else " does"
    if not contrasts:
        return f"{rates}; no {schedule} tells what that change is worth"
    gains = ", ".join(
        f"{'nothing' if one.same else _share(one)} at budget {one.budget:g}" for one in contrasts
    )
    return f"{rates}, and that change is worth {gains} over {schedule}, the schedule without it"


def over_schedule(evidence: VariantEvidence) -> list[Contrast]:
    """The contrasts with the schedule without rescaling, by budget."""
    schedule = CONTROLS[evidence.variant][0]
    return [one for several in evidence.contrasts.values() for one in several if one.control == schedule]


def _what_would_decide(evidence: VariantEvidence, *, margin: float, alpha: float) -> str:
    """The base runs with which one of the rules would probably apply, if the estimates are right."""
    support, refute = [], []
    level = alpha / len(evidence.contrasts)
    for several in evidence.contrasts.values():
        better = [runs_needed(one, one.relative.estimate, level=level) for one in several]
        short = [runs_needed(one, margin - one.relative.estimate, level=alpha / 2) for one in several]
        support.append(max(better) if len(better) > 1 else MOST_RUNS + 1)
        refute.append(min(short))
    runs = min(*support, max(refute))
    if runs > MOST_RUNS:
        return "with this test split more seeds would probably not decide it"
    return f"about {runs} seeds would decide it with probability {POWER:.0%} if the estimates are right"


def runs_needed(contrast: Contrast, distance: float, *, level: float) -> int:
    """Base runs with which the interval's end would lie within ``distance`` of the estimate with POWER.

    More runs reduce the variance of the relative improvement but for the part that is the test split's.

    Returns:
        MOST_RUNS + 1 where that many would not be enough.
    """
    floor = contrast.relative.floor
    of_runs = max(contrast.relative.stderr**2 - floor, 0.0) * contrast.n

    def enough(runs: int) -> bool:
        quantiles = float(special.stdtrit(runs - 1, 1 - level / 2) + special.ndtri(POWER))
        return quantiles * math.sqrt(of_runs / runs + floor) < distance

    plans = range(LEAST_RUNS, MOST_RUNS + 1)
    return LEAST_RUNS + bisect_left(plans, True, key=enough)


def decide_setting(by_variant: Mapping[str, Decision], evidence: Mapping[str, VariantEvidence]) -> Decision:
    """The verdict on one model and optimizer setting: the best that one of its variants does.

    SUPPORTED if a variant is. Otherwise, where no variant is UNDECIDED, EQUIVALENT TO LEARNING RATES if a
    variant is, with what the change of rates is worth; then NOT SUPPORTED.
    """
    verdicts = {decision.verdict for decision in by_variant.values()}
    text = "; ".join(
        f"{named(variant)}: {decision.verdict}{_aside(decision, evidence[variant])}"
        for variant, decision in by_variant.items()
    )
    for verdict in (SUPPORTED, UNDECIDED, EQUIVALENT):
        if verdict in verdicts:
            return Decision(verdict, text)
    return Decision(NOT_SUPPORTED, text)


def _aside(decision: Decision, evidence: VariantEvidence) -> str:
    """What a reader of the word alone would miss."""
    if decision.verdict == EQUIVALENT:
        return f" ({worth(evidence)})"
    failed = mostly_lost(evidence)
    return f" (most base runs have no {' and no '.join(failed)})" if failed else ""


def decide_overall(by_setting: Mapping[str, str], without: Sequence[str]) -> Decision:
    """One verdict if all settings agree on it, otherwise UNDECIDED.

    What is equivalent to learning rates is not better than them: where some settings are that and the others
    NOT SUPPORTED, they agree on NOT SUPPORTED.

    Args:
        by_setting: the settings' verdicts.
        without: settings without ensembles, which are named and not judged.
    """
    if not by_setting:
        return Decision(UNDECIDED, "no ensembles ([ensembles] of the study switches them on)")
    distinct = set(by_setting.values())
    text = "; ".join(f"{setting}: {verdict}" for setting, verdict in by_setting.items())
    if EQUIVALENT in distinct:
        text += "; what the change of learning rates is worth stands in the verdict on each"
    if without:
        text += f"; no ensembles of {', '.join(without)}"
    if distinct == {EQUIVALENT, NOT_SUPPORTED}:
        return Decision(NOT_SUPPORTED, text)
    return Decision(distinct.pop() if len(distinct) == 1 else UNDECIDED, text)


# ---- the numbers in sentences


def in_numbers(evidence: VariantEvidence, *, alpha: float) -> str:
    """The improvements over the controls at every budget, and who is missing; empty where there are none."""
    text = ""
    if evidence.contrasts:
        parts = [
            f"at budget {budget:g} "
            + " and ".join(f"{_share(contrast)} over {contrast.control}" for contrast in several)
            for budget, several in evidence.contrasts.items()
        ]
        runs = sorted({contrast.n for several in evidence.contrasts.values() for contrast in several})
        improvements = "" if evidence.identical else f" Improvement of the test NLL: {'; '.join(parts)}."
        counts = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
        text = f"{improvements} Intervals of level {percent(1 - alpha)} each, {counts} base runs."
    if evidence.lost:
        text += f" Diverged or missing, and left out: {'; '.join(_lost(evidence))}."
    return text


def _share(contrast: Contrast) -> str:
    """The improvement in percent with its interval, or that it is rounding."""
    if contrast.same:
        return "the same to rounding"
    share = contrast.relative
    if not math.isfinite(share.low):
        return f"{100 * share.estimate:+.3g}% (no interval)"
    return f"{100 * share.estimate:+.3g}% ({100 * share.low:+.3g} to {100 * share.high:+.3g})"


def _lost(evidence: VariantEvidence) -> list[str]:
    """Whose base runs have no scores, and which."""
    texts = []
    for where, runs in evidence.lost.items():
        names = ", ".join(runs[:NAMED]) + (f" and {len(runs) - NAMED} more" if len(runs) > NAMED else "")
        texts.append(f"{where} in {len(runs)} of {evidence.base_runs} base runs ({names})")
    return texts


def named(variant: str) -> str:
    """A method with its letter and number in the list of methods (docs/science.md)."""
    return f"{variant} ({CODES[variant]})" if variant in CODES else variant


def percent(share: float) -> str:
    """As few digits as tell it: 5%, 99.17%."""
    return f"{100 * share:.4g}%"
