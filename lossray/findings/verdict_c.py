"""The decision rule of claim C: from contrasts to verdicts, pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lossray.findings.ensemble_contrasts import Contrast
from lossray.findings.verdict_a import NOT_SUPPORTED, SUPPORTED, UNDECIDED, Decision

# The two variants of the paper's ensemble that can win, and what each must beat: the same without the
# rescaling, and the same with learning rates eta D^-2 in place of the rescaling D (SCIENCE 2.5, 5C).
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
LR_EQUIVALENT = "lr_equivalent"
POWER = 0.8
MOST_RUNS = 1000  # no plan goes beyond


@dataclass(frozen=True)
class VariantEvidence:
    """All that the verdict on one variant in one setting rests on."""

    missing: tuple[str, ...]  # methods without test predictions
    contrasts: Mapping[float, tuple[Contrast, ...]]  # by budget, ascending; of the NLL, with each control
    needed: int  # base runs without which the primary family of tests cannot reach its level
    level: float  # of the contrasts' intervals, in place of alpha: Bonferroni over budgets and variants


def decide_variant(evidence: VariantEvidence, *, margin: float) -> Decision:
    """The verdict of SCIENCE 5C on one variant. The first rule that applies decides.

    1. A method has no predictions: UNDECIDED, naming it.
    2. At some budget the variant is better than both controls: the intervals of the relative improvement lie
       above 0: SUPPORTED.
    3. At every budget the interval excludes an improvement of ``margin`` or more over one of the controls:
       NOT SUPPORTED.
    4. UNDECIDED, naming the base runs that are needed, or would decide.

    Only contrasts of enough base runs count in 2 and 3.

    Args:
        evidence: of the variant.
        margin: the smallest relative improvement that would count.
    """
    if evidence.missing:
        return Decision(UNDECIDED, f"no test predictions of {', '.join(evidence.missing)}")
    needed, budgets = evidence.needed, evidence.contrasts.items()
    won = [b for b, own in budgets if len(own) > 1 and all(_better(one, needed) for one in own)]
    if won:
        small = all(any(_short_of(one, needed, margin) for one in evidence.contrasts[b]) for b in won)
        aside = f", though by less than {percent(margin)}" if small else ""
        return Decision(SUPPORTED, f"better than both controls at budget {_listed(won)}{aside}")
    if budgets and all(any(_short_of(one, needed, margin) for one in own) for _, own in budgets):
        return Decision(
            NOT_SUPPORTED,
            f"at every budget its improvement over one of the controls is below {percent(margin)}",
        )
    fewest = min((one.n for _, own in budgets for one in own), default=0)
    if fewest < needed:
        return Decision(UNDECIDED, f"at least {needed} seeds are needed, the fewest pairs are {fewest}")
    return Decision(
        UNDECIDED,
        f"neither better than both controls nor shown to fall short of {percent(margin)}; "
        f"{_what_would_decide(evidence, margin)}",
    )


def _better(own: Contrast, needed: int) -> bool:
    return own.n >= needed and own.relative.low > 0


def _short_of(own: Contrast, needed: int, margin: float) -> bool:
    return own.n >= needed and own.relative.high < margin


def _what_would_decide(evidence: VariantEvidence, margin: float) -> str:
    """The base runs with which one of the rules would probably apply, if the estimates are right."""
    support, refute = [], []
    for own in evidence.contrasts.values():
        better = [runs_needed(one, one.relative.estimate, level=evidence.level) for one in own]
        short = [runs_needed(one, margin - one.relative.estimate, level=evidence.level) for one in own]
        support.append(max(better) if len(better) > 1 else MOST_RUNS + 1)
        refute.append(min(short))
    runs = min(*support, max(refute))
    if runs > MOST_RUNS:
        return "with this test split more seeds would probably not decide it"
    return f"about {runs} seeds would decide it with probability {POWER:.0%} if the estimates are right"


def runs_needed(own: Contrast, distance: float, *, level: float) -> int:
    """Base runs with which the interval's end would lie within ``distance`` of the estimate with POWER.

    More runs reduce the variance of the relative improvement but for the part that is the test split's.

    Returns:
        MOST_RUNS + 1 where that many would not be enough.
    """
    runs = np.arange(2, MOST_RUNS + 1)
    of_runs = max(own.relative.stderr**2 - own.floor, 0.0) * own.n
    stderr = np.sqrt(of_runs / runs + own.floor)
    reach = (stats.t.ppf(1 - level / 2, runs - 1) + stats.norm.ppf(POWER)) * stderr
    enough = runs[reach < distance]
    return int(enough[0]) if len(enough) else MOST_RUNS + 1


def decide_setting(by_variant: Mapping[str, Decision]) -> Decision:
    """The verdict on one model and optimizer setting: one variant that wins is enough."""
    verdicts = {decision.verdict for decision in by_variant.values()}
    text = "; ".join(f"{named(variant)}: {decision.verdict}" for variant, decision in by_variant.items())
    if SUPPORTED in verdicts:
        return Decision(SUPPORTED, text)
    return Decision(NOT_SUPPORTED if verdicts == {NOT_SUPPORTED} else UNDECIDED, text)


def decide_overall(by_setting: Mapping[str, str], without: Sequence[str]) -> Decision:
    """One verdict if all settings agree on it, otherwise UNDECIDED.

    Args:
        by_setting: the settings' verdicts.
        without: settings without ensembles, which are named and not judged.
    """
    if not by_setting:
        return Decision(UNDECIDED, "no ensembles ([ensembles] of the study switches them on)")
    found = set(by_setting.values())
    text = "; ".join(f"{setting}: {verdict}" for setting, verdict in by_setting.items())
    if without:
        text += f"; no ensembles of {', '.join(without)}"
    return Decision(found.pop() if len(found) == 1 else UNDECIDED, text)


def in_numbers(evidence: VariantEvidence) -> str:
    """The improvements over the controls at the largest budget, as a sentence; empty where there are none."""
    if not evidence.contrasts:
        return ""
    budget, several = list(evidence.contrasts.items())[-1]
    improvements = "; ".join(f"over {own.control} {_improvement(own)}" for own in several)
    left_out = max(own.left_out for own in several)
    lost = f", {left_out} left out as diverged or missing" if left_out else ""
    fewest = min(own.n for own in several)
    return (
        f" Improvement of the test NLL at budget {budget:g}: {improvements}; intervals of level "
        f"{percent(1 - evidence.level)}, {fewest} base runs{lost}."
    )


def _improvement(own: Contrast) -> str:
    """The difference in nats and percent with its intervals, and whether it is rounding."""
    if own.same:
        text = f"{own.difference.estimate:+.2g} nats, the same to rounding"
        lesson = ": rescaling is a change of learning rates" if LR_EQUIVALENT in own.control else ""
        return f"{text} (mean |difference| {own.spread:.1g} nats){lesson}"
    nats, share = own.difference, own.relative
    if not math.isfinite(share.low):
        return f"{nats.estimate:+.3g} nats, {100 * share.estimate:+.3g}%, without an interval"
    return (
        f"{nats.estimate:+.3g} nats ({nats.low:+.3g} to {nats.high:+.3g}), "
        f"{100 * share.estimate:+.3g}% ({100 * share.low:+.3g} to {100 * share.high:+.3g})"
    )


def named(variant: str) -> str:
    """A method with the letter and number it has in SCIENCE 5C."""
    return f"{variant} ({CODES[variant]})" if variant in CODES else variant


def percent(share: float) -> str:
    """As few digits as tell it: 5%, 99.17%."""
    return f"{100 * share:.4g}%"


def _listed(budgets: Sequence[float]) -> str:
    return ", ".join(f"{budget:g}" for budget in budgets)
