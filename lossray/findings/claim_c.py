"""Claim C, ensembles from scale invariance: contrasts at equal budget, and the verdicts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import pandas as pd

from lossray.findings.bootstrap import Interval
from lossray.findings.claim_rows import ClaimRow
from lossray.findings.ensemble_contrasts import Contrast, contrast
from lossray.findings.ensemble_curves import curve_rows, curve_tables
from lossray.findings.ensemble_scores import METRICS, EnsembleCell, ensemble_cells, setting_labels
from lossray.findings.families import hommel
from lossray.findings.ratios import RatioInterval
from lossray.findings.verdict_a import Decision
from lossray.findings.verdict_c import (
    CODES,
    CONTROLS,
    EQUIVALENT,
    VariantEvidence,
    decide_overall,
    decide_setting,
    decide_variant,
    identical,
    in_numbers,
    named,
    over_schedule,
    p_better,
    p_equivalent,
    p_short,
)
from lossray.study.settings import ClaimsSettings

ByBudget = Mapping[float, tuple[Contrast, ...]]

PRIMARY = METRICS[0]
# What every variant is shown beside, for information: other uses of the same budget.
REFERENCES = ("independent", "long_run", "perturbed", "swa", "deep_ensemble_equal_total")
UNALIGNED = {"align_curve": "curve_seeds"}  # C5 without its alignment


@dataclass(frozen=True)
class Judged:
    """One setting with its evidence and verdicts, by variant.

    Attributes:
        cell: the setting with its scores.
        evidence: by variant.
        by_variant: the verdict on each variant.
        decision: the verdict on the setting.
    """

    cell: EnsembleCell
    evidence: Mapping[str, VariantEvidence]
    by_variant: Mapping[str, Decision]
    decision: Decision


def claim_c_rows(tables: Mapping[str, pd.DataFrame], settings: ClaimsSettings) -> list[ClaimRow]:
    """All rows of claim C, the overall verdict first.

    Raises:
        DataError: the ensembles of one setting are scored on different test splits.
    """
    labels = setting_labels(tables)
    curves = curve_tables(tables)
    by_setting: dict[str, str] = {}
    verdicts: list[ClaimRow] = []
    numbers: list[ClaimRow] = []
    for cell in ensemble_cells(tables, labels):
        judged = _judge(cell, settings)
        by_setting[cell.label] = judged.decision.verdict
        verdicts += _verdict_rows(judged, settings)
        numbers += _effect_rows(judged, settings)
        numbers += _contrast_rows(judged, settings)
        numbers += _reference_rows(cell, settings)
        numbers += curve_rows(cell, curves, settings)
    overall = decide_overall(by_setting, [label for label in labels.values() if label not in by_setting])
    first = ClaimRow(
        "C", "overall", "verdict", n=len(by_setting), verdict=overall.verdict, text=overall.reason
    )
    return [first, *verdicts, *numbers]


# ---- verdicts


def _judge(cell: EnsembleCell, settings: ClaimsSettings) -> Judged:
    """The evidence and the verdicts of one setting."""
    contrasts = {variant: _contrasts(cell, variant, settings) for variant in CONTROLS}
    better = _better(contrasts)
    equivalent = _equivalent(contrasts, settings.margin_nll)
    evidence = {
        variant: VariantEvidence(
            variant=variant,
            missing=tuple(name for name in (variant, *controls) if name not in cell.methods),
            lost=_lost(cell, (variant, *controls)),
            base_runs=len(cell.base_runs),
            contrasts=contrasts[variant],
            better=better[variant],
            equivalent=equivalent[variant],
            short=p_short(contrasts[variant], settings.margin_nll),
            identical=identical(contrasts[variant], controls[1]),
        )
        for variant, controls in CONTROLS.items()
    }
    by_variant = {
        variant: decide_variant(variant_evidence, margin=settings.margin_nll, alpha=settings.alpha)
        for variant, variant_evidence in evidence.items()
    }
    return Judged(cell, evidence, by_variant, decide_setting(by_variant, evidence))


def _contrasts(
    cell: EnsembleCell, variant: str, settings: ClaimsSettings, metric: str = PRIMARY
) -> dict[float, tuple[Contrast, ...]]:
    """By budget, with each control that is there: every comparison that the verdict may rest on."""
    controls = [name for name in CONTROLS[variant] if {name, variant} <= set(cell.methods)]
    budgets = sorted({budget for control in controls for budget in cell.budgets(variant, control)})
    return {
        budget: tuple(
            contrast(cell, variant, control, budget, metric=metric, alpha=settings.alpha)
            for control in controls
            if budget in cell.budgets(variant, control)
        )
        for budget in budgets
    }


def _better(contrasts: Mapping[str, ByBudget]) -> dict[str, dict[float, float]]:
    """By variant and budget, the p value of "not better than both controls", adjusted over all of them."""
    keys = [(variant, budget) for variant, by_budget in contrasts.items() for budget in by_budget]
    adjusted = hommel([p_better(contrasts[variant][budget]) for variant, budget in keys])
    p_values: dict[str, dict[float, float]] = {variant: {} for variant in contrasts}
    for (variant, budget), p in zip(keys, adjusted, strict=True):
        p_values[variant][budget] = float(p)
    return p_values


def _equivalent(contrasts: Mapping[str, ByBudget], margin: float) -> dict[str, float]:
    """By variant, the p value of "not equivalent to its control of learning rates", over all variants."""
    adjusted = hommel(
        [p_equivalent(by_budget, CONTROLS[variant][1], margin) for variant, by_budget in contrasts.items()]
    )
    return {variant: float(p) for variant, p in zip(contrasts, adjusted, strict=True)}


def _lost(cell: EnsembleCell, methods: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Base runs without scores, by method and budget, where there are any."""
    lost = {
        f"{method} at budget {budget:g}": cell.lost(method, budget)
        for method, budget in cell.ensembles
        if method in methods
    }
    return {where: runs for where, runs in lost.items() if runs}


def _verdict_rows(one: Judged, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Of one setting, then of its variants."""
    yield ClaimRow(
        claim="C",
        subject=one.cell.label,
        statistic="verdict",
        n=len(one.cell.base_runs),
        verdict=one.decision.verdict,
        text=one.decision.reason,
    )
    for variant, decision in one.by_variant.items():
        evidence = one.evidence[variant]
        contrasts = [one_contrast for several in evidence.contrasts.values() for one_contrast in several]
        yield ClaimRow(
            claim="C",
            subject=f"{one.cell.label}: {named(variant)}",
            statistic="verdict",
            n=min((one_contrast.n for one_contrast in contrasts), default=0),
            verdict=decision.verdict,
            text=f"{decision.reason}.{in_numbers(evidence, alpha=settings.alpha)}",
        )


def _effect_rows(one: Judged, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Where a variant is equivalent to learning rates: what their change is worth over the schedule."""
    for variant, decision in one.by_variant.items():
        if decision.verdict != EQUIVALENT:
            continue
        contrasts = over_schedule(one.evidence[variant])
        adjusted = hommel([one_contrast.p_value for one_contrast in contrasts]).tolist()
        for one_contrast, p_adjusted in zip(contrasts, adjusted, strict=True):
            yield ClaimRow(
                claim="C/effect",
                subject=f"{one.cell.label}: {named(variant)} - {one_contrast.control}, "
                f"budget {one_contrast.budget:g}",
                statistic="nll: relative improvement by learning rates",
                estimate=one_contrast.relative.estimate,
                low=one_contrast.relative.low,
                high=one_contrast.relative.high,
                p_value=one_contrast.p_value,
                p_adjusted=p_adjusted,
                n=one_contrast.n,
                verdict=_word(one_contrast, p_adjusted, settings.alpha),
                text=f"rescaling, a change of learning rates, over {one_contrast.control}, the schedule "
                f"without it; Hommel over {len(contrasts)} budgets",
            )


# ---- contrasts


def _contrast_rows(one: Judged, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Each variant against its controls: the primary score, adjusted over all of them; then the others."""
    primary = [
        one_contrast
        for e in one.evidence.values()
        for several in e.contrasts.values()
        for one_contrast in several
    ]
    adjusted = hommel([one_contrast.p_value for one_contrast in primary]).tolist()
    note = f"Hommel over {len(primary)} contrasts"
    for one_contrast, p_adjusted in zip(primary, adjusted, strict=True):
        yield from _rows_of(
            "C/contrast", one.cell.label, one_contrast, alpha=settings.alpha, note=note, p_adjusted=p_adjusted
        )
    for metric, variant in product(METRICS[1:], CONTROLS):
        for several in _contrasts(one.cell, variant, settings, metric).values():
            for one_contrast in several:
                note = "a secondary score, not adjusted"
                yield from _rows_of(
                    "C/contrast", one.cell.label, one_contrast, alpha=settings.alpha, note=note
                )


def _reference_rows(cell: EnsembleCell, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Every variant against other uses of the same budget; they inform and decide nothing."""
    for variant in CODES:
        references = (*REFERENCES, *([UNALIGNED[variant]] if variant in UNALIGNED else []))
        for control in references:
            if not {variant, control} <= set(cell.methods):
                continue
            for budget in cell.budgets(variant, control):
                one_contrast = contrast(cell, variant, control, budget, metric=PRIMARY, alpha=settings.alpha)
                note = "for information, not adjusted"
                yield from _rows_of("C/reference", cell.label, one_contrast, alpha=settings.alpha, note=note)


def _rows_of(
    claim: str, label: str, one_contrast: Contrast, *, alpha: float, note: str, p_adjusted: float = math.nan
) -> Iterator[ClaimRow]:
    """One contrast in the score's unit, and as a share of the control's score."""
    text = f"{one_contrast.control} has {one_contrast.metric} {one_contrast.control_mean:.4g}; {note}"
    text += (
        f"; {one_contrast.left_out} base runs left out as diverged or missing"
        if one_contrast.left_out
        else ""
    )
    text += "; the same to rounding" if one_contrast.same else ""
    deciding = one_contrast.p_value if math.isnan(p_adjusted) else p_adjusted
    shown: tuple[tuple[str, Interval | RatioInterval], ...] = (
        (f"{one_contrast.metric}: control - variant", one_contrast.difference),
        (f"{one_contrast.metric}: relative improvement", one_contrast.relative),
    )
    for statistic, interval in shown:
        yield ClaimRow(
            claim=claim,
            subject=f"{label}: {named(one_contrast.variant)} - {one_contrast.control}, "
            f"budget {one_contrast.budget:g}",
            statistic=statistic,
            estimate=interval.estimate,
            low=interval.low,
            high=interval.high,
            p_value=one_contrast.p_value,
            p_adjusted=p_adjusted,
            n=one_contrast.n,
            verdict=_word(one_contrast, deciding, alpha),
            text=text,
        )


def _word(one_contrast: Contrast, p: float, alpha: float) -> str:
    if one_contrast.same:
        return "the same"
    if not p < alpha:
        return "not decided"
    return "better" if one_contrast.difference.estimate > 0 else "worse"
