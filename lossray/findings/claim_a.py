"""Claim A, perpendicularity: its tests at the matched loss, and its verdicts (SCIENCE 5A)."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossray.findings.claim_a_extras import attribution_rows, dispersion_rows, slope_rows
from lossray.findings.claim_rows import ClaimRow
from lossray.findings.energies import (
    ALIGNMENT_COLUMNS,
    BASELINE,
    TOP,
    Cell,
    cells_of,
    observations,
)
from lossray.findings.evidence_a import LEAST_DIM, evidence_of, gauge_evidence
from lossray.findings.families import intersection_union
from lossray.findings.matching import (
    BEST,
    MATCHED,
    chosen_settings,
    described_runs,
    frame_of,
    matched_points,
)
from lossray.findings.means import bca_interval, mean_test
from lossray.findings.sign_flips import max_t_test, sign_flip_test
from lossray.findings.verdict_a import decide, overall
from lossray.study.settings import ClaimsSettings

Array = NDArray[np.float64]

JUDGED = (
    "update",
    "minibatch_gradient",
)  # the first is the claim's headline; "gradient" is the abstract's word
SHOWN_GAUGES = {"update": None, "minibatch_gradient": ("raw", "preconditioned")}  # None: all


def claim_a_rows(tables: Mapping[str, pd.DataFrame], settings: ClaimsSettings) -> list[ClaimRow]:
    """All rows of claim A, the overall verdicts first."""
    runs = described_runs(tables)
    alignment = frame_of(tables, "alignment", ALIGNMENT_COLUMNS)
    checkpoints = frame_of(tables, "checkpoints", ("run_id", "step", "train_loss"))
    checkpoints = checkpoints.merge(_comparable(alignment), on=["run_id", "step"])
    points = matched_points(runs, checkpoints, chosen_settings(runs))
    rows = observations(points, alignment)
    cells = cells_of(points, rows)
    activations = dict(zip(runs["architecture"], runs["activation"], strict=True))
    shown = [cell for cell in cells if (cell.rule, cell.moment) == (BEST, MATCHED)]
    return [
        *_verdict_rows(runs, cells, activations, settings),
        *_matching_rows(runs, points),
        *(row for cell in shown if cell.direction in JUDGED for row in _cell_rows(cell, settings)),
        *_family_rows(shown, settings),
        *dispersion_rows(points, alignment, settings),
        *slope_rows(runs, rows, settings),
        *attribution_rows(shown, settings),
    ]


def _comparable(alignment: pd.DataFrame) -> pd.DataFrame:
    """Run and step of the windows in which the parameters move: not so where a schedule has ended at zero."""
    keys = ["run_id", "step"]
    raw = alignment[(alignment["direction"] == "update") & (alignment["gauge"] == "raw")]
    still = raw.loc[raw["log_energy"].isna(), keys].drop_duplicates()
    windows = pd.concat([alignment[keys].drop_duplicates(), still])
    return windows.drop_duplicates(keep=False)


# ---- verdicts


def _verdict_rows(
    runs: pd.DataFrame,
    cells: Sequence[Cell],
    activations: Mapping[str, object],
    settings: ClaimsSettings,
) -> Iterator[ClaimRow]:
    """The verdict on each judged direction: overall, then by architecture, rule and moment."""
    details = []
    for direction in JUDGED:
        found: dict[str, str] = {}
        left_out: dict[str, str] = {}
        for cell in cells:
            if cell.direction != direction:
                continue
            activation = activations.get(cell.architecture)
            evidence = evidence_of(cell, activation if isinstance(activation, str) else None, settings)
            decision = decide(evidence, alpha=settings.alpha)
            if (cell.rule, cell.moment) == (BEST, MATCHED):
                (found if evidence.missing is None else left_out)[cell.architecture] = (
                    decision.verdict if evidence.missing is None else evidence.missing
                )
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
        for architecture in sorted(set(runs["architecture"]) - set(found) - set(left_out)):
            left_out[architecture] = "no alignment rows of compared runs"
        yield _overall_row(direction, found, left_out)
    yield from details


def _overall_row(direction: str, found: Mapping[str, str], left_out: Mapping[str, str]) -> ClaimRow:
    by_architecture = [f"{name}: {verdict}" for name, verdict in found.items()]
    by_architecture += [f"{name}: not judged ({reason})" for name, reason in left_out.items()]
    return ClaimRow(
        claim="A",
        subject=direction,
        statistic="verdict",
        n=len(found),
        verdict=overall(found),
        text="; ".join(by_architecture) or "there are no runs",
    )


def _seeds(cell: Cell) -> int:
    """Pairs of seeds behind the contrast that has fewest."""
    if "raw" not in cell.gauges or not cell.adaptive:
        return 0
    return int(np.isfinite(cell.gauges["raw"].against_baseline(cell.adaptive)).sum(axis=-1).min())


def _caveats(cell: Cell) -> str:
    """What a reader should know of the rows behind a verdict."""
    notes = [
        f"{name} gauge: {gauge.subspace} stands in for v1, which is not resolved"
        for name, gauge in cell.gauges.items()
        if gauge.subspace != TOP
    ]
    unresolved = sum(gauge.unresolved for gauge in cell.gauges.values())
    if unresolved:
        notes.append(f"{unresolved} rows left out as unresolved")
    return f" ({'; '.join(notes)})" if notes else ""


# ---- what was compared


def _matching_rows(runs: pd.DataFrame, points: pd.DataFrame) -> Iterator[ClaimRow]:
    """The reference loss of each architecture and rule, and how near the checkpoints come to it."""
    matched = points[points["moment"] == MATCHED]
    lost = runs.assign(lost=runs["status"] != "finished").groupby("architecture")["lost"].sum()
    for labels, own in matched.groupby(["architecture", "rule"], sort=False):
        architecture, rule = map(str, labels)
        worst, median = float(own["mismatch"].max()), float(own["mismatch"].median())
        reference = float(own["reference"].iloc[0])
        yield ClaimRow(
            claim="A/matching",
            subject=f"{architecture}: {rule}",
            statistic="reference loss",
            estimate=reference,
            low=float(own["train_loss"].min()),
            high=float(own["train_loss"].max()),
            n=int(own["run_id"].nunique()),
            text=f"training loss {reference:.3g}; the runs' checkpoints are off by a factor "
            f"{math.exp(median):.2f} (median), {math.exp(worst):.2f} (worst); "
            f"{int(lost[architecture])} diverged or failed runs of this architecture are left out",
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
        yield from _null_rows(cell, settings)


def _margin_rows(
    cell: Cell, gauge: str, optimizers: tuple[str, ...], settings: ClaimsSettings
) -> Iterator[ClaimRow]:
    """One-sided t tests against the margin: each optimizer, and all adaptive methods together."""
    own, alpha = cell.gauges[gauge], settings.alpha
    bound = math.log(settings.margin_energy)
    for name in optimizers:
        if not np.isfinite(own.of(name)).any():
            continue
        test = mean_test(own.of(name) - bound, 0.0, alpha=alpha)
        fails_for = name == BASELINE
        verdict = "below the margin" if test.p_less <= alpha else "not decided"
        yield ClaimRow(
            claim="A/margin",
            subject=f"{cell.architecture}: {name}, {cell.direction}, {gauge}",
            statistic="S - ln(margin)",
            estimate=float(test.mean),
            low=float(test.low),
            high=float(test.high),
            p_value=float(test.p_greater if fails_for else test.p_less),
            n=int(test.n),
            verdict="above the margin" if test.p_greater <= alpha else verdict,
            text=f"energy in {own.subspace} {math.exp(float(test.mean) + bound):.2g}, "
            f"p value of being {'above' if fails_for else 'below'} {settings.margin_energy:g}; "
            "low and high are one-sided bounds",
        )
    if cell.adaptive:
        evidence = gauge_evidence(cell, own, settings)
        p = float(intersection_union(evidence.below))
        yield ClaimRow(
            claim="A/every adaptive method",
            subject=f"{cell.architecture}: {cell.direction}, {gauge}",
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
    adjusted = gauge_evidence(cell, raw, settings).contrast
    for name, own, p, p_adjusted in zip(cell.adaptive, differences, p_values, adjusted, strict=True):
        known = own[np.isfinite(own)]
        low, high = bca_interval(own, alpha=settings.alpha)
        mean = float(known.mean()) if len(known) else math.nan
        yield ClaimRow(
            claim="A/contrast",
            subject=f"{cell.architecture}: {name} - {BASELINE}, {cell.direction}, raw",
            statistic="difference of S",
            estimate=mean,
            low=low,
            high=high,
            p_value=float(p),
            p_adjusted=float(p_adjusted),
            n=len(known),
            verdict=_direction_of(mean, float(p_adjusted), settings.alpha),
            text=f"{math.exp(mean):.2g} times the energy of {BASELINE}; sign flips, Holm over "
            f"{len(cell.adaptive)} contrasts; BCa interval, for display",
        )


def _direction_of(mean: float, p: float, alpha: float) -> str:
    if p > alpha:
        return "no significant difference"
    return f"below {BASELINE}" if mean < 0 else f"above {BASELINE}"


def _null_rows(cell: Cell, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """S beside those of the nulls, each optimizer."""
    raw = cell.gauges["raw"]
    for statistic, over in (
        ("S - ln(k/d)", raw.over_chance),
        ("S - ln(sign-flip null)", raw.over_sign_flips),
    ):
        for name, values in zip(raw.optimizers, over, strict=True):
            test = mean_test(values, 0.0, alpha=settings.alpha / 2)
            if test.n:
                yield ClaimRow(
                    claim="A/null",
                    subject=f"{cell.architecture}: {name}, {cell.direction}, raw",
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
                for other, own in zip(others, gauge.against_baseline(others), strict=True):
                    if np.isfinite(own).any():
                        labels.append((cell.direction, name, other))
                        series.append(pd.Series(own, index=gauge.seeds))
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
