"""Claim A, perpendicularity: its tests at the matched loss, and its verdicts (docs/science.md, "Claims")."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossray.findings.claim_a_extras import attribution_rows, slope_rows
from lossray.findings.claim_rows import ClaimRow
from lossray.findings.comparison import comparison_of
from lossray.findings.dispersion import dispersion_rows
from lossray.findings.energies import BASELINE, TOP, Cell, cells_of
from lossray.findings.evidence_a import LEAST_DIM, contrast_tests, evidence_of, gauge_evidence
from lossray.findings.families import holm, intersection_union
from lossray.findings.learning_rates import edge_notes
from lossray.findings.matching import (
    BEST,
    LAST,
    MATCHED,
    MOST_MISMATCH,
    moment_of,
)
from lossray.findings.means import bca_interval, mean_test
from lossray.findings.sign_flips import max_t_test, sign_flip_test
from lossray.findings.skewness import safe_mean_test
from lossray.findings.verdict_a import (
    UNDECIDED,
    Decision,
    Evidence,
    across_moments,
    decide,
    decide_together,
    overall,
)
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

JUDGED = (
    "update",
    "minibatch_gradient",
)  # the first is the claim's headline; "gradient" is the abstract's word
SHOWN_GAUGES = {"update": None, "minibatch_gradient": ("raw", "preconditioned")}  # None: all
NOBODY = Decision(
    UNDECIDED, f"no runs with a checkpoint within a factor {MOST_MISMATCH:g} of that loss", judged=False
)
NO_ROWS = Decision(UNDECIDED, "no alignment rows of compared runs", judged=False)


def claim_a_rows(tables: Mapping[str, pd.DataFrame], settings: ClaimsSettings) -> list[ClaimRow]:
    """All rows of claim A, the overall verdicts first."""
    compared = comparison_of(tables, settings)
    runs, points, lost, rows = compared.runs, compared.points, compared.lost, compared.rows
    cells = cells_of(points, rows, lost)
    activations = dict(zip(runs["architecture"], runs["activation"], strict=True))
    best = [cell for cell in cells if cell.rule == BEST]
    shown = [cell for cell in best if cell.moment == MATCHED]
    return [
        *_verdict_rows(runs, cells, activations, settings),
        *_matching_rows(points, lost),
        *(row for cell in shown if cell.direction in JUDGED for row in _cell_rows(cell, settings)),
        *(row for cell in best for row in _level_rows(cell, settings)),
        *_family_rows(shown, settings),
        *dispersion_rows(runs, points, compared.alignment, settings),
        *slope_rows(runs, rows, settings),
        *attribution_rows(shown, settings),
    ]


def moments_of(settings: ClaimsSettings) -> list[str]:
    """The levels of loss that a verdict rests on, from the start of training to its end."""
    return [*map(moment_of, settings.levels), MATCHED]


# ---- verdicts


def _verdict_rows(
    runs: pd.DataFrame,
    cells: Sequence[Cell],
    activations: Mapping[str, object],
    settings: ClaimsSettings,
) -> Iterator[ClaimRow]:
    """The verdict on each judged direction: overall, then by architecture, then by rule and moment."""
    details: list[ClaimRow] = []
    moments = moments_of(settings)
    for direction in JUDGED:
        direction_cells = [cell for cell in cells if cell.direction == direction]
        evidence = {id(cell): _evidence(cell, activations, settings) for cell in direction_cells}
        judged = [cell for cell in direction_cells if cell.rule == BEST and cell.moment in moments]
        architectures = list(dict.fromkeys([*(cell.architecture for cell in judged), *runs["architecture"]]))
        together = _by_architecture(judged, evidence, moments, settings.alpha)
        rates = edge_notes(runs)
        yield _overall_row(direction, {name: together.get(name, NO_ROWS) for name in architectures}, rates)
        for name in together:
            alone = [cell for cell in judged if cell.architecture == name]
            decision = _by_architecture(alone, evidence, moments, settings.alpha)[name]
            details.append(
                ClaimRow(
                    claim="A/levels",
                    subject=f"{name}: {direction}, {BEST}",
                    statistic="verdict",
                    n=_fewest(alone, evidence, settings.alpha),
                    verdict=decision.verdict,
                    text=f"{decision.reason}{rates.get(name, '')}",
                )
            )
        for cell in direction_cells:
            decision = decide(evidence[id(cell)], alpha=settings.alpha)
            details.append(
                ClaimRow(
                    claim="A/verdict",
                    subject=f"{cell.architecture}: {direction}, {cell.rule}, {cell.moment}",
                    statistic="verdict",
                    n=_seeds(cell),
                    verdict=decision.verdict,
                    text=f"{decision.reason}{_caveats(cell)}",
                )
            )
    yield from details


def _evidence(cell: Cell, activations: Mapping[str, object], settings: ClaimsSettings) -> Evidence:
    activation = activations.get(cell.architecture)
    return evidence_of(cell, activation if isinstance(activation, str) else None, settings)


def _by_architecture(
    cells: Sequence[Cell], evidence: Mapping[int, Evidence], moments: Sequence[str], alpha: float
) -> dict[str, Decision]:
    """The verdict on each architecture over its levels of loss, adjusted over all of these cells."""
    decisions = decide_together([evidence[id(cell)] for cell in cells], alpha=alpha)
    by_architecture: dict[str, dict[str, Decision]] = {}
    for cell, decision in zip(cells, decisions, strict=True):
        by_moment = by_architecture.setdefault(cell.architecture, dict.fromkeys(moments, NOBODY))
        by_moment[cell.moment] = decision
    return {name: across_moments(by_moment) for name, by_moment in by_architecture.items()}


def _overall_row(direction: str, decisions: Mapping[str, Decision], rates: Mapping[str, str]) -> ClaimRow:
    judged = {name: decision.verdict for name, decision in decisions.items() if decision.judged}
    parts = [
        f"{name}: {decision.verdict} ({decision.where}){rates.get(name, '')}"
        if decision.judged
        else f"{name}: not judged ({decision.reason})"
        for name, decision in sorted(decisions.items(), key=lambda item: not item[1].judged)
    ]
    return ClaimRow(
        claim="A",
        subject=direction,
        statistic="verdict",
        n=len(judged),
        verdict=overall(judged),
        text="; ".join(parts) or "there are no runs",
    )


def _seeds(cell: Cell) -> int:
    """Pairs of seeds behind the contrast that has fewest."""
    if "raw" not in cell.gauges or not cell.adaptive:
        return 0
    return int(np.isfinite(cell.gauges["raw"].against_baseline(cell.adaptive)).sum(axis=-1).min())


def _fewest(cells: Sequence[Cell], evidence: Mapping[int, Evidence], alpha: float) -> int:
    """Pairs at the level that has fewest, of those that could be judged if there are any."""
    judged = [cell for cell in cells if evidence[id(cell)].limited(alpha) is None]
    return min((_seeds(cell) for cell in judged or cells), default=0)


def _caveats(cell: Cell) -> str:
    """What a reader should know of the rows behind a verdict."""
    unknown = [name for name, gauge in cell.gauges.items() if gauge.subspace != TOP]
    notes = (
        [f"v1 is not resolved in most runs of some method in gauge {', '.join(unknown)}"] if unknown else []
    )
    unresolved = sum(gauge.unresolved for gauge in cell.gauges.values())
    if unresolved:
        notes.append(f"{unresolved} rows left out as unresolved")
    return f" ({'; '.join(notes)})" if notes else ""


# ---- what was compared


def _matching_rows(points: pd.DataFrame, lost: pd.DataFrame) -> Iterator[ClaimRow]:
    """The reference loss of each architecture, rule and level, and how near the checkpoints come to it."""
    matched = points[points["moment"] != LAST]
    everybody = points[points["moment"] == LAST].groupby(["architecture", "rule"])["run_id"].nunique()
    for labels, level_points in matched.groupby(["architecture", "rule", "moment"], sort=False):
        architecture, rule, moment = map(str, labels)
        worst, median = float(level_points["mismatch"].max()), float(level_points["mismatch"].median())
        reference, n = float(level_points["reference"].iloc[0]), int(level_points["run_id"].nunique())
        without = int(everybody[architecture, rule]) - n
        gone = lost[(lost["architecture"] == architecture) & (lost["rule"] == rule)]
        where = "" if moment == MATCHED else f", {moment.removeprefix(MATCHED).strip()}"
        yield ClaimRow(
            claim="A/matching",
            subject=f"{architecture}: {rule}{where}",
            statistic="reference loss",
            estimate=reference,
            low=float(level_points["train_loss"].min()),
            high=float(level_points["train_loss"].max()),
            n=n,
            text=f"training loss {reference:.3g}; the runs' checkpoints are off by a factor "
            f"{math.exp(median):.2f} (median), {math.exp(worst):.2f} (worst); {without} runs have none "
            f"within a factor {MOST_MISMATCH:g}; {int(gone['lost'].sum())} diverged or failed runs left out",
        )


# ---- one cell


def _cell_rows(cell: Cell, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """The tests of one direction: against the margin, every adaptive method, contrasts, nulls."""
    gauges = SHOWN_GAUGES[cell.direction]
    for name, gauge in cell.gauges.items():
        if gauges is None or name in gauges:
            optimizers = gauge.optimizers if name == "raw" else (*cell.adaptive, BASELINE)
            if gauge.dim >= LEAST_DIM:
                yield from _margin_rows(cell, name, optimizers, settings)
    if "raw" in cell.gauges:
        yield from _contrast_rows(cell, settings)
    for name in cell.gauges:
        yield from _null_rows(cell, name, settings, shown=gauges is None or name in gauges)


def _level_rows(cell: Cell, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """S against the margin in the raw gauge, at the other levels of loss."""
    raw = cell.gauges.get("raw")
    if raw is None or cell.direction not in JUDGED or cell.moment in (MATCHED, LAST):
        return
    if raw.dim >= LEAST_DIM:
        level = cell.moment.removeprefix(MATCHED).strip()
        yield from _margin_rows(cell, "raw", raw.optimizers, settings, where=f", {level}")


def _margin_rows(
    cell: Cell, gauge: str, optimizers: tuple[str, ...], settings: ClaimsSettings, *, where: str = ""
) -> Iterator[ClaimRow]:
    """One-sided tests against the margin: each optimizer, and all adaptive methods together."""
    energies, alpha = cell.gauges[gauge], settings.alpha
    bound = math.log(settings.margin_energy)
    for name in optimizers:
        if not np.isfinite(energies.of(name)).any():
            continue
        test = mean_test(energies.of(name) - bound, 0.0, alpha=alpha)
        p_less, p_greater = map(float, safe_mean_test(energies.of(name), bound))
        fails_for = name == BASELINE
        verdict = "below the margin" if p_less <= alpha else "not decided"
        yield ClaimRow(
            claim="A/margin",
            subject=f"{cell.architecture}: {name}, {cell.direction}, {gauge}{where}",
            statistic="S - ln(margin)",
            estimate=float(test.mean),
            low=float(test.low),
            high=float(test.high),
            p_value=p_greater if fails_for else p_less,
            n=int(test.n),
            verdict="above the margin" if p_greater <= alpha else verdict,
            text=f"energy in {energies.subspace} {math.exp(float(test.mean) + bound):.2g}, "
            f"p value of being {'above' if fails_for else 'below'} {settings.margin_energy:g}; "
            "low and high are one-sided bounds under normal samples",
        )
    if cell.adaptive:
        evidence = gauge_evidence(cell, energies, settings)
        p = float(intersection_union(evidence.below))
        yield ClaimRow(
            claim="A/every adaptive method",
            subject=f"{cell.architecture}: {cell.direction}, {gauge}{where}",
            statistic="largest p value against the margin",
            p_value=p,
            n=len(cell.adaptive),
            verdict="below the margin" if p <= alpha else "not shown",
            text=f"intersection-union test over {', '.join(cell.adaptive)}",
        )


def _contrast_rows(cell: Cell, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """The primary family: S of each adaptive method minus SGD's, paired by seed."""
    raw = cell.gauges["raw"]
    differences = raw.against_baseline(cell.adaptive)
    if not np.isfinite(differences).any():
        return
    p_values = sign_flip_test(differences)
    halved, _ = contrast_tests(differences)
    family = zip(cell.adaptive, differences, p_values, holm(p_values), halved, strict=True)
    for name, by_seed, p, p_adjusted, p_half in family:
        finite = by_seed[np.isfinite(by_seed)]
        low, high = bca_interval(by_seed, alpha=settings.alpha)
        mean = float(finite.mean()) if len(finite) else math.nan
        yield ClaimRow(
            claim="A/contrast",
            subject=f"{cell.architecture}: {name} - {BASELINE}, {cell.direction}, raw",
            statistic="difference of S",
            estimate=mean,
            low=low,
            high=high,
            p_value=float(p),
            p_adjusted=float(p_adjusted),
            n=len(finite),
            verdict=_direction_of(mean, float(p_adjusted), settings.alpha),
            text=f"{math.exp(mean):.2g} times the energy of {BASELINE}; sign flips, Holm over "
            f"{len(cell.adaptive)} contrasts; p of less than a factor 2 below {BASELINE}: {p_half:.2g}; "
            "BCa interval, for display",
        )


def _direction_of(mean: float, p: float, alpha: float) -> str:
    if p > alpha:
        return "no significant difference"
    return f"below {BASELINE}" if mean < 0 else f"above {BASELINE}"


def _null_rows(cell: Cell, gauge: str, settings: ClaimsSettings, *, shown: bool) -> Iterator[ClaimRow]:
    """S beside those of the nulls, each optimizer; random signs in the raw gauge only."""
    energies = cell.gauges[gauge]
    nulls = {"S - isotropic null": energies.over_chance} if shown else {}
    if gauge == "raw":
        nulls["S - ln(sign-flip null)"] = energies.over_sign_flips
    for statistic, over in nulls.items():
        for name, values in zip(energies.optimizers, over, strict=True):
            test = mean_test(values, 0.0, alpha=settings.alpha / 2)
            if test.n:
                yield ClaimRow(
                    claim="A/null",
                    subject=f"{cell.architecture}: {name}, {cell.direction}, {gauge}",
                    statistic=statistic,
                    estimate=float(test.mean),
                    low=float(test.low),
                    high=float(test.high),
                    n=int(test.n),
                    text=f"{math.exp(float(test.mean)):.3g} times the null",
                )


# ---- the larger family


def _family_rows(cells: Sequence[Cell], settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """All optimizers, directions and gauges of an architecture against SGD: max-T over joint sign flips."""
    for architecture in dict.fromkeys(cell.architecture for cell in cells):
        labels, series = [], []
        for cell in cells:
            if cell.architecture != architecture or cell.direction.startswith("shadow:"):
                continue
            for name, gauge in cell.gauges.items():
                others = tuple(other for other in gauge.optimizers if other != BASELINE)
                for other, by_seed in zip(others, gauge.against_baseline(others), strict=True):
                    if np.isfinite(by_seed).any():
                        labels.append((cell.direction, name, other))
                        series.append(pd.Series(by_seed, index=gauge.seeds))
        if not series:
            continue
        differences = pd.concat(series, axis=1).to_numpy(dtype=np.float64).T
        adjusted = max_t_test(differences)
        means = np.nanmean(differences, axis=1)
        yield from _family_summary(architecture, labels, means, adjusted, settings)


def _family_summary(
    architecture: str,
    labels: Sequence[tuple[str, str, str]],
    means: Array,
    adjusted: Array,
    settings: ClaimsSettings,
) -> Iterator[ClaimRow]:
    """One row for each direction and gauge: which optimizers lie significantly below or above SGD."""
    for direction, gauge in dict.fromkeys(label[:2] for label in labels):
        chosen = [i for i, label in enumerate(labels) if label[:2] == (direction, gauge)]
        clear = [i for i in chosen if adjusted[i] <= settings.alpha]
        below = [labels[i][2] for i in clear if means[i] < 0]
        above = [labels[i][2] for i in clear if means[i] >= 0]
        yield ClaimRow(
            claim="A/contrasts",
            subject=f"{architecture}: {direction}, {gauge}",
            statistic="median difference of S",
            estimate=float(np.median(means[chosen])),
            low=float(means[chosen].min()),
            high=float(means[chosen].max()),
            p_adjusted=float(adjusted[chosen].min()),
            n=len(chosen),
            text=f"below {BASELINE}: {', '.join(below) or 'none'}; above: {', '.join(above) or 'none'} "
            f"(max-T over {len(labels)} contrasts; low and high are the extremes over optimizers)",
        )
