"""Claim C, ensembles from scale invariance: contrasts at equal budget, and the verdicts (SCIENCE 5C)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lossray.findings.claim_rows import ClaimRow
from lossray.findings.ensemble_contrasts import Contrast, contrast
from lossray.findings.ensemble_curves import curve_rows, curve_tables
from lossray.findings.ensemble_scores import METRICS, EnsembleCell, ensemble_cells, setting_labels
from lossray.findings.families import holm, seeds_needed
from lossray.findings.verdict_a import Decision
from lossray.findings.verdict_c import (
    CODES,
    CONTROLS,
    VariantEvidence,
    decide_overall,
    decide_setting,
    decide_variant,
    in_numbers,
    named,
    percent,
)
from lossray.study.settings import ClaimsSettings

PRIMARY = METRICS[0]
# What every variant is shown beside, for information: other uses of the same budget.
REFERENCES = ("independent", "long_run", "perturbed", "swa", "deep_ensemble_equal_total")
UNALIGNED = {"align_curve": "curve_seeds"}  # C5 without its alignment


@dataclass(frozen=True)
class Judged:
    """One setting with its evidence and verdicts, by variant."""

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
    found: dict[str, str] = {}
    verdicts: list[ClaimRow] = []
    numbers: list[ClaimRow] = []
    for cell in ensemble_cells(tables, labels):
        judged = _judge(cell, settings)
        found[cell.label] = judged.decision.verdict
        verdicts += _verdict_rows(judged)
        numbers += _contrast_rows(judged, settings)
        numbers += _reference_rows(cell, settings)
        numbers += curve_rows(cell, curves, settings)
    overall = decide_overall(found, [label for label in labels.values() if label not in found])
    first = ClaimRow("C", "overall", "verdict", n=len(found), verdict=overall.verdict, text=overall.reason)
    return [first, *verdicts, *numbers]


# ---- verdicts


def _judge(cell: EnsembleCell, settings: ClaimsSettings) -> Judged:
    """The evidence and the verdicts of one setting."""
    pairs = _pairs(cell)
    level = _level(cell, settings)
    largest = max((budget for _, _, budget in pairs), default=math.nan)
    needed = seeds_needed(max(1, sum(budget == largest for *_, budget in pairs)), settings.alpha)
    evidence = {}
    for variant, controls in CONTROLS.items():
        by_budget = {
            budget: tuple(
                contrast(cell, variant, control, budget, metric=PRIMARY, alpha=level)
                for own, control, at in pairs
                if (own, at) == (variant, budget)
            )
            for budget in sorted({at for own, _, at in pairs if own == variant})
        }
        missing = tuple(name for name in (variant, *controls) if name not in cell.methods)
        evidence[variant] = VariantEvidence(missing, by_budget, needed, level)
    by_variant = {
        variant: decide_variant(own, margin=settings.margin_nll) for variant, own in evidence.items()
    }
    return Judged(cell, evidence, by_variant, decide_setting(by_variant))


def _pairs(cell: EnsembleCell) -> list[tuple[str, str, float]]:
    """Variant, control and budget of every comparison that the verdict may rest on."""
    return [
        (variant, control, budget)
        for variant, controls in CONTROLS.items()
        for control in controls
        if {variant, control} <= set(cell.methods)
        for budget in cell.budgets(variant, control)
    ]


def _level(cell: EnsembleCell, settings: ClaimsSettings) -> float:
    """Alpha over the verdict's chances, budgets x variants; to beat both controls costs nothing more."""
    return settings.alpha / max(1, len({(variant, budget) for variant, _, budget in _pairs(cell)}))


def _verdict_rows(one: Judged) -> Iterator[ClaimRow]:
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
        contrasts = [own for several in evidence.contrasts.values() for own in several]
        yield ClaimRow(
            claim="C",
            subject=f"{one.cell.label}: {named(variant)}",
            statistic="verdict",
            n=min((own.n for own in contrasts), default=0),
            verdict=decision.verdict,
            text=f"{decision.reason}.{in_numbers(evidence)}",
        )


# ---- contrasts


def _contrast_rows(one: Judged, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Each variant against its controls: the primary score, Holm at the largest budget; then the others."""
    cell, level = one.cell, _level(one.cell, settings)
    primary = [own for e in one.evidence.values() for several in e.contrasts.values() for own in several]
    largest = max((own.budget for own in primary), default=math.nan)
    family = [own for own in primary if own.budget == largest]
    adjusted = iter(holm([own.p_value for own in family]))
    for own in primary:
        note = f"interval of level {percent(1 - level)}; sign flips"
        if own.budget == largest:
            note += f", Holm over {len(family)} contrasts"
        p_adjusted = float(next(adjusted)) if own.budget == largest else math.nan
        yield from _rows_of("C/contrast", cell.label, own, note=note, p_adjusted=p_adjusted)
    for metric in METRICS[1:]:
        for variant, control, budget in _pairs(cell):
            own = contrast(cell, variant, control, budget, metric=metric, alpha=level)
            note = f"a secondary score; interval of level {percent(1 - level)}"
            yield from _rows_of("C/contrast", cell.label, own, note=note)


def _reference_rows(cell: EnsembleCell, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Every variant against other uses of the same budget; they inform and decide nothing."""
    for variant in CODES:
        references = (*REFERENCES, *([UNALIGNED[variant]] if variant in UNALIGNED else []))
        for control in references:
            if not {variant, control} <= set(cell.methods):
                continue
            for budget in cell.budgets(variant, control):
                own = contrast(cell, variant, control, budget, metric=PRIMARY, alpha=settings.alpha)
                note = f"for information: interval of level {percent(1 - settings.alpha)}, not adjusted"
                yield from _rows_of("C/reference", cell.label, own, note=note)


def _rows_of(
    claim: str, label: str, own: Contrast, *, note: str, p_adjusted: float = np.nan
) -> Iterator[ClaimRow]:
    """One contrast in the score's unit, and as a share of the control's score."""
    text = f"{own.control} has {own.metric} {own.control_mean:.4g}; {note}"
    text += f"; {own.left_out} base runs left out as diverged or missing" if own.left_out else ""
    text += "; the same to rounding" if own.same else ""
    for statistic, found in (
        (f"{own.metric}: control - variant", own.difference),
        (f"{own.metric}: relative improvement", own.relative),
    ):
        yield ClaimRow(
            claim=claim,
            subject=f"{label}: {named(own.variant)} - {own.control}, budget {own.budget:g}",
            statistic=statistic,
            estimate=found.estimate,
            low=found.low,
            high=found.high,
            p_value=own.p_value,
            p_adjusted=p_adjusted,
            n=own.n,
            verdict="the same" if own.same else _word(found.low, found.high),
            text=text,
        )


def _word(low: float, high: float) -> str:
    if low > 0:
        return "better"
    return "worse" if high < 0 else "not decided"
