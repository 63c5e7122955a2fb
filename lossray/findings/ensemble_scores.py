"""What claim C reads: the example-wise test scores of ensembles, by model and optimizer setting."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lossray.errors import DataError
from lossray.findings.bootstrap import example_resamples
from lossray.findings.matching import described_runs, frame_of

Array = NDArray[np.float64]

METRICS = ("nll", "nll_scaled", "error")  # the first is the primary score
TEST = "test"
SETTING_COLUMNS = ("run_id", "setting_id", "optimizer", "lr", "optimizer_settings")
PREDICTION_COLUMNS = ("method", "base_run", "nominal_budget", "split", "seed", *METRICS)
Ensembles = tuple[str, float]  # a method and its nominal budget: one ensemble for each base run


@dataclass(frozen=True)
class EnsembleCell:
    """The ensembles of one model and optimizer setting.

    Attributes:
        label: "ARCHITECTURE: OPTIMIZER".
        base_runs: by id, in the order of their seeds.
        ensembles: those with a row, sorted.
        scores: by metric: [ensembles, base_runs, N]; NaN where diverged or not there.
    """

    label: str
    base_runs: tuple[str, ...]
    ensembles: tuple[Ensembles, ...]
    scores: Mapping[str, Array]

    @cached_property
    def resamples(self) -> dict[str, Array]:
        """By metric: the means over examples in each resample, [ensembles, base_runs, B]."""
        return {metric: example_resamples(scores) for metric, scores in self.scores.items()}

    @property
    def methods(self) -> tuple[str, ...]:
        """Those with a row."""
        return tuple(dict.fromkeys(method for method, _ in self.ensembles))

    def budgets(self, *methods: str) -> tuple[float, ...]:
        """Nominal budgets at which every one of these methods has rows, ascending."""
        by_method = [{budget for name, budget in self.ensembles if name == method} for method in methods]
        return tuple(sorted(set.intersection(*by_method)))

    def lost(self, method: str, budget: float) -> tuple[str, ...]:
        """Base runs whose ensemble diverged or is not there."""
        gone = ~np.isfinite(self.of(METRICS[0], method, budget)).all(axis=1)
        return tuple(self.base_runs[i] for i in np.flatnonzero(gone))

    def of(self, metric: str, method: str, budget: float) -> Array:
        """Scores [base_runs, N]."""
        scores: Array = self.scores[metric][self.ensembles.index((method, budget))]
        return scores

    def resampled(self, metric: str, method: str, budget: float) -> Array:
        """Mean scores in the resamples, [base_runs, B]."""
        means: Array = self.resamples[metric][self.ensembles.index((method, budget))]
        return means


def setting_labels(tables: Mapping[str, pd.DataFrame]) -> dict[str, str]:
    """By setting_id "ARCHITECTURE: OPTIMIZER", with what tells settings of one optimizer apart."""
    runs = described_runs(tables)[["run_id", "architecture"]]
    runs = runs.merge(frame_of(tables, "runs", SETTING_COLUMNS), on="run_id").dropna(subset=["setting_id"])
    labels: dict[str, str] = {}
    for (architecture, optimizer), setting_rows in runs.drop_duplicates("setting_id").groupby(
        ["architecture", "optimizer"], sort=False, dropna=False
    ):
        settings = [
            _plain(lr, text)
            for lr, text in zip(setting_rows["lr"], setting_rows["optimizer_settings"], strict=True)
        ]
        varying = [
            key for key in settings[0] if any(other.get(key) != settings[0][key] for other in settings)
        ]
        for setting_id, plain in zip(setting_rows["setting_id"], settings, strict=True):
            label = " ".join(
                [f"{architecture}: {optimizer}", *(f"{key}={_short(plain.get(key))}" for key in varying)]
            )
            labels[setting_id] = f"{label} {setting_id}" if label in labels.values() else label
    return labels


def _plain(lr: float, text: object) -> dict[str, Any]:
    return {"lr": lr} | (json.loads(text) if isinstance(text, str) else {})


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def ensemble_cells(tables: Mapping[str, pd.DataFrame], labels: Mapping[str, str]) -> Iterator[EnsembleCell]:
    """The settings that have test predictions, one after the other: each may hold many numbers.

    Args:
        tables: `runs` and `predictions` by name.
        labels: of `setting_labels`.

    Raises:
        DataError: the ensembles of one setting are scored on different numbers of examples.
    """
    runs = frame_of(tables, "runs", ("run_id", "setting_id"))
    rows = frame_of(tables, "predictions", PREDICTION_COLUMNS)
    rows = rows[rows["split"] == TEST].merge(runs, left_on="base_run", right_on="run_id")
    for setting, setting_rows in rows.groupby("setting_id", sort=False):
        yield _cell(labels[str(setting)], setting_rows)


def _cell(label: str, rows: pd.DataFrame) -> EnsembleCell:
    ordered = rows.sort_values(["seed", "base_run"], kind="stable")
    base_runs = tuple(ordered["base_run"].unique())
    ensembles = sorted(set(zip(rows["method"], rows["nominal_budget"], strict=True)))
    indices = [
        (ensembles.index((method, budget)), base_runs.index(run))
        for method, budget, run in zip(rows["method"], rows["nominal_budget"], rows["base_run"], strict=True)
    ]
    shape = (len(ensembles), len(base_runs))
    scores = {metric: _placed(label, rows[metric].tolist(), indices, shape) for metric in METRICS}
    return EnsembleCell(label=label, base_runs=base_runs, ensembles=tuple(ensembles), scores=scores)


def _placed(
    label: str, values: Sequence[object], indices: Sequence[tuple[int, int]], shape: tuple[int, int]
) -> Array:
    """Lists [N] at their places, [*shape, N]; NaN where there is none."""
    present = [
        (index, np.asarray(scores, dtype=np.float64))
        for index, scores in zip(indices, values, strict=True)
        if isinstance(scores, list | tuple | np.ndarray) and len(scores)
    ]
    sizes = sorted({len(scores) for _, scores in present})
    if len(sizes) > 1:
        raise DataError(
            f"table 'predictions': ensembles of {label!r} are scored on {sizes[0]} and on {sizes[-1]} test "
            "examples; all need one test split"
        )
    placed = np.full((*shape, sizes[0] if sizes else 1), np.nan)
    for index, scores in present:
        if np.isfinite(scores).all():
            placed[index] = scores
    return placed
