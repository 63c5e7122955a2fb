"""Ensembles at equal budget, at equal size, and how much their members differ: rows that inform."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from lossray.findings.bootstrap import t_interval
from lossray.findings.claim_rows import ClaimRow
from lossray.findings.ensemble_scores import METRICS, TEST, EnsembleCell
from lossray.findings.matching import frame_of
from lossray.findings.means import mean_test
from lossray.study.settings import ClaimsSettings

ENSEMBLE = ("method", "base_run", "nominal_budget")
ENSEMBLE_COLUMNS = (*ENSEMBLE, "members", "split", "metric", "value", "budget", "size")
RESCALING_COLUMNS = ("sigma", "lambda_max_before", "lambda_max_after", "line_barrier")
BETWEEN_MEMBERS = ("disagreement", "kl")  # metrics of `ensembles`, by size
DISTANCES = ("weight_distance", "barrier")  # columns of `members`


@dataclass(frozen=True)
class CurveTables:
    """The columns in use of `ensembles`, on the test split; of `members`; and of `rescalings`.

    Attributes:
        scores: of `ensembles`.
        pairs: of `members`, one row for each pair of members.
        factors: of `rescalings`.
    """

    scores: pd.DataFrame
    pairs: pd.DataFrame
    factors: pd.DataFrame

    def of(self, base_runs: Sequence[str]) -> "CurveTables":
        """The rows of these base runs."""
        frames = (self.scores, self.pairs, self.factors)
        return CurveTables(*(frame[frame["base_run"].isin(base_runs)] for frame in frames))


def curve_tables(tables: Mapping[str, pd.DataFrame]) -> CurveTables:
    """What `curve_rows` reads."""
    scores = frame_of(tables, "ensembles", ENSEMBLE_COLUMNS)
    pairs = frame_of(tables, "members", (*ENSEMBLE, *DISTANCES))
    factors = frame_of(tables, "rescalings", (*ENSEMBLE, *RESCALING_COLUMNS))
    return CurveTables(scores[scores["split"] == TEST], pairs, factors)


def curve_rows(cell: EnsembleCell, tables: CurveTables, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """The curves of one setting, how much members differ, and what the rescalings were."""
    cell_tables = tables.of(cell.base_runs)
    yield from _budget_rows(cell, cell_tables.scores, settings)
    scores = _at_largest_budget(cell_tables.scores)
    yield from _by_size("C/size", METRICS[:1], cell, scores, settings)
    yield from _by_size("C/diversity", BETWEEN_MEMBERS, cell, scores, settings)
    yield from _distance_rows(cell, _at_largest_budget(cell_tables.pairs), settings)
    yield from _rescaling_rows(cell, _at_largest_budget(cell_tables.factors), settings)


def _budget_rows(cell: EnsembleCell, rows: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """Equal-budget curves: the mean test scores of every method and nominal budget."""
    whole = rows[(rows["metric"] == METRICS[0]) & (rows["members"] == rows["size"])]
    spent = {key: one[["size", "budget"]].mean() for key, one in whole.groupby(["method", "nominal_budget"])}
    for (method, budget), metric in product(cell.ensembles, METRICS):
        scores = cell.of(metric, method, budget)  # [base runs, N]
        present = np.isfinite(scores).all(axis=1)
        if not present.any():
            continue
        drawn = cell.resampled(metric, method, budget)[present]
        interval = t_interval(float(scores[present].mean()), drawn, alpha=settings.alpha)
        text = f"{int((~present).sum())} base runs left out as diverged or missing"
        if (method, budget) in spent:
            size, examples = spent[method, budget]
            text = f"{size:.3g} members, {examples:.3g} gradients of examples; {text}"
        yield ClaimRow(
            claim="C/budget",
            subject=f"{cell.label}: {method}, budget {budget:g}",
            statistic=f"test {metric}",
            estimate=interval.estimate,
            low=interval.low,
            high=interval.high,
            n=int(present.sum()),
            text=text,
        )


def _distance_rows(cell: EnsembleCell, members: pd.DataFrame, settings: ClaimsSettings) -> Iterator[ClaimRow]:
    """How far apart the members are, and the barrier between them."""
    for (method, budget), pairs in members.groupby(["method", "nominal_budget"], sort=True):
        for column in DISTANCES:
            values = pairs.groupby("base_run")[column].mean()
            text = f"budget {budget:g}, mean over pairs of members"
            yield from _mean_row("C/diversity", f"{cell.label}: {method}", column, values, settings, text)


def _rescaling_rows(
    cell: EnsembleCell, factors: pd.DataFrame, settings: ClaimsSettings
) -> Iterator[ClaimRow]:
    """What the rescalings were: spread of the factors, sharpness, barrier on the line to the copy."""
    sharpening = factors["lambda_max_after"] / factors["lambda_max_before"]
    named = {
        "standard deviation of ln(factor)": factors["sigma"],
        "lambda_max after / before": sharpening,
        "barrier on the line to the rescaled copy": factors["line_barrier"],
    }
    for statistic, values in named.items():
        for (method, budget), rescalings in factors.assign(value=values).groupby(
            ["method", "nominal_budget"]
        ):
            by_run = rescalings.groupby("base_run")["value"].mean()
            text = f"budget {budget:g}, mean over rescalings"
            yield from _mean_row("C/rescaling", f"{cell.label}: {method}", statistic, by_run, settings, text)


def _at_largest_budget(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each method the rows of its largest budget."""
    largest = rows.groupby("method")["nominal_budget"].transform("max")
    return rows[rows["nominal_budget"] == largest]


def _by_size(
    claim: str,
    metrics: tuple[str, ...],
    cell: EnsembleCell,
    scores: pd.DataFrame,
    settings: ClaimsSettings,
) -> Iterator[ClaimRow]:
    chosen = scores[scores["metric"].isin(metrics)]
    for (method, members, metric), rows in chosen.groupby(["method", "members", "metric"], sort=True):
        plural = "member" if members == 1 else "members"
        subject = f"{cell.label}: {method}, {members:g} {plural}"
        text = f"budget {rows['nominal_budget'].iloc[0]:g}, {rows['budget'].mean():.3g} gradients of examples"
        yield from _mean_row(claim, subject, f"test {metric}", rows["value"], settings, text)


def _mean_row(
    claim: str, subject: str, statistic: str, values: pd.Series, settings: ClaimsSettings, text: str
) -> Iterator[ClaimRow]:
    """The mean over base runs with its t interval; none where no run has a value."""
    test = mean_test(values.to_numpy(dtype=np.float64), 0.0, alpha=settings.alpha / 2)
    if test.n:
        yield ClaimRow(
            claim=claim,
            subject=subject,
            statistic=statistic,
            estimate=float(test.mean),
            low=float(test.low),
            high=float(test.high),
            n=int(test.n),
            text=f"{text}; t interval over base runs",
        )
