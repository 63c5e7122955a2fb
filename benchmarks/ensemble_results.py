"""The tables on claim C in docs/results.md, from stores of the study `ensembles`.

``python -m benchmarks.ensemble_results OUT [OUT_WIDE ...]`` puts each in its place; the text is ours.
OUT_WIDE is the study with ``--set ensembles.sigma=1.0``.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

import lossray
from benchmarks.report import fill, table
from lossray.ensembles.methods import METHODS
from lossray.findings.claims import TABLES_READ, claims_of
from lossray.findings.ensemble_contrasts import contrast
from lossray.findings.ensemble_scores import EnsembleCell, ensemble_cells, setting_labels
from lossray.findings.families import hommel
from lossray.findings.verdict_c import named
from lossray.results import StudyResults

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "results.md"
SIZES = (1, 2, 3, 5, 9)
SHOWN_SIZES = (
    "rescale_retrain",
    "rescale_curve",
    "align_curve",
    "snapshot",
    "fge",
    "swag",
    "simplex",
    "deep_ensemble_equal_total",
    "deep_ensemble",
)

OTHERS = (  # a method and what it is held against
    ("perturbed", "snapshot"),
    ("independent", "snapshot"),
    ("align_curve", "snapshot"),
    ("rescale_retrain", "perturbed"),
    ("align_curve", "curve_seeds"),
)


def main(*outs: str) -> None:
    """Write all tables into the document."""
    stores = {study.study.ensembles.sigma: study for study in map(lossray.open_study, outs)}
    claims = {sigma: _claims(study) for sigma, study in stores.items()}
    narrow = stores[min(stores)]
    parts = {
        "ensemble_verdicts": verdicts(claims),
        "ensemble_effects": effects(claims),
        "ensemble_contrasts": contrasts(claims),
        "ensemble_others": others(narrow),
        "ensemble_budgets": budgets(narrow),
        "ensemble_sizes": sizes(narrow),
        "ensemble_rescalings": rescalings(stores),
        "barriers": barriers(narrow),
    }
    fill(DOCUMENT, parts)


def _claims(study: StudyResults) -> pd.DataFrame:
    return claims_of({name: study.table(name) for name in TABLES_READ}, study.study.claims)


def verdicts(claims: Mapping[float, pd.DataFrame]) -> str:
    """Every verdict on claim C."""
    rows = [
        [f"{sigma:g}", _cell(row.subject), row.verdict, _cell(row.text)]
        for sigma, frame in claims.items()
        for row in frame[frame["claim"] == "C"].itertuples()
    ]
    return table(("sigma", "about", "verdict", "why"), rows)


def effects(claims: Mapping[float, pd.DataFrame]) -> str:
    """What the change of learning rates that a variant is equivalent to is worth over the schedule."""
    return _shares({sigma: frame[frame["claim"] == "C/effect"] for sigma, frame in claims.items()})


def contrasts(claims: Mapping[float, pd.DataFrame]) -> str:
    """The primary contrasts: relative improvement of the test NLL."""
    return _shares(
        {
            sigma: frame[
                (frame["claim"] == "C/contrast") & (frame["statistic"] == "nll: relative improvement")
            ]
            for sigma, frame in claims.items()
        }
    )


def _shares(rows: Mapping[float, pd.DataFrame]) -> str:
    body = [
        [
            f"{sigma:g}",
            _cell(row.subject),
            _percents(row),
            f"{row.p_value:.2g}",
            f"{row.p_adjusted:.2g}",
            f"{row.n}",
            row.verdict,
        ]
        for sigma, frame in rows.items()
        for row in frame.itertuples()
    ]
    return table(("sigma", "variant - control", "improvement of the NLL, %", "p", "adjusted", "n", ""), body)


def others(study: StudyResults) -> str:
    """Other uses of the same budget against the schedule without rescaling, and against one another."""
    tables = {name: study.table(name) for name in ("runs", "predictions")}
    rows = [
        row
        for cell in ensemble_cells(tables, setting_labels(tables))
        for method, control in OTHERS
        if {method, control} <= set(cell.methods)
        for row in _other_rows(cell, method, control, study.study.claims.alpha)
    ]
    head = ("setting", "method - other", "budget", "improvement of the NLL, %", "p", "adjusted", "n", "")
    return table(head, rows)


def _other_rows(cell: EnsembleCell, method: str, control: str, alpha: float) -> list[list[str]]:
    """One method against another at every budget; p values adjusted over the budgets."""
    found = [
        contrast(cell, method, control, budget, metric="nll", alpha=alpha)
        for budget in cell.budgets(method, control)
    ]
    rows = []
    for own, p_adjusted in zip(found, hommel([own.p_value for own in found]), strict=True):
        better = "better" if own.difference.estimate > 0 else "worse"
        rows.append(
            [
                cell.label,
                f"{named(method)} - {named(control)}",
                f"{own.budget:g}",
                _percents(own.relative),
                f"{own.p_value:.2g}",
                f"{p_adjusted:.2g}",
                f"{own.n}",
                better if p_adjusted < alpha else "not decided",
            ]
        )
    return rows


def budgets(study: StudyResults) -> str:
    """Test NLL by method and nominal budget, and at the largest budget what else there is to say."""
    scores = _scores(study)
    whole = scores[scores["members"] == scores["size"]]
    largest = whole["nominal_budget"].max()
    training = study.study.training
    rows = []
    for model, of_model in whole.groupby("model", sort=False):
        for method in METHODS:
            own = of_model[of_model["method"] == method]
            if own.empty:
                continue
            nll = [_spread(own, "nll", budget) for budget in sorted(whole["nominal_budget"].unique())]
            last = own[own["nominal_budget"] == largest]
            means = last.groupby("metric")["value"].mean()
            cost = last["budget"].mean() / (training.steps * training.batch_size)
            diverged = int(last[last["metric"] == "nll"]["value"].isna().sum())
            rest = [f"{100 * means['error']:.2f}", f"{means['nll_scaled']:.4f}", f"{means['ece']:.3f}"]
            differing = f"{100 * means['disagreement']:.2f}" if np.isfinite(means["disagreement"]) else "-"
            rows.append(
                [
                    model,
                    named(method),
                    *nll,
                    *rest,
                    differing,
                    str(int(last["size"].iloc[0])),
                    f"{cost:.2f}",
                    str(diverged),
                ]
            )
    head = ("model", "method", "NLL, budget 1", "2", "3", "error, %", "NLL scaled", "ECE", "disagreement, %")
    return table((*head, "members", "cost", "diverged"), rows)


def sizes(study: StudyResults) -> str:
    """Test NLL of the first members at the largest budget."""
    scores = _scores(study)
    own = scores[(scores["nominal_budget"] == scores["nominal_budget"].max()) & (scores["metric"] == "nll")]
    rows = []
    for model, of_model in own.groupby("model", sort=False):
        for method in SHOWN_SIZES:
            means = of_model[of_model["method"] == method].groupby("members")["value"].mean()
            rows.append([model, named(method), *(f"{means[m]:.4f}" if m in means else "-" for m in SIZES)])
    return table(("model", "method", *(f"{m}" for m in SIZES)), rows)


def rescalings(stores: Mapping[float, StudyResults]) -> str:
    """What D does to the base: medians over base runs of C1's first and last rescaling."""
    rows = []
    for sigma, study in stores.items():
        runs = study.table("runs")[["run_id", "model"]]
        own = study.table("rescalings").merge(runs, left_on="base_run", right_on="run_id")
        own = own[
            (own["method"] == "rescale_retrain") & (own["nominal_budget"] == own["nominal_budget"].max())
        ]
        for (model, cycle), group in own.groupby(["model", "cycle"], sort=False):
            if cycle not in (0, own["cycle"].max()):
                continue
            middle = group.median(numeric_only=True)
            rows.append(
                [
                    f"{sigma:g}",
                    model,
                    str(cycle),
                    f"{middle['sigma']:.3g}",
                    f"{middle['lambda_max_before']:.3g}",
                    f"{middle['lambda_max_after']:.3g}",
                    f"{group['function_change'].max():.1g}",
                    f"{middle['distance']:.3g}",
                    f"{middle['line_barrier']:.2g}",
                ]
            )
    head = ("sigma", "model", "cycle", "sigma used", "λmax at θ", "at D θ", "largest change of f")
    return table((*head, "distance", "line barrier"), rows)


def barriers(study: StudyResults) -> str:
    """Means over pairs, with the largest."""
    runs = study.table("runs")[["run_id", "model"]]
    own = study.table("barriers").merge(runs, left_on="run_a", right_on="run_id")
    order = {name: i for i, name in enumerate(("none", "permutation", "both", "rescaled"))}
    rows = []
    for (model, aligned, kind), group in own.groupby(["model", "aligned", "kind"], sort=False):
        means = group.mean(numeric_only=True)
        rows.append(
            [
                model,
                aligned,
                kind,
                f"{means['barrier']:.4f} ({group['barrier'].max():.4f})",
                f"{means['barrier_test']:.4f}",
                f"{100 * means['barrier_frankle']:.2f}",
                f"{means['endpoint_distance']:.1f}",
                f"{means['path_length']:.1f}",
                str(len(group)),
            ]
        )
    rows.sort(key=lambda row: (row[0], order.get(row[1], 9), row[2] != "line"))
    head = ("model", "aligned", "path", "barrier (largest)", "on test", "error above the ends' mean, points")
    return table((*head, "distance of the ends", "length", "pairs"), rows)


def _scores(study: StudyResults) -> pd.DataFrame:
    """The table `ensembles` on the test split, with the models' names."""
    runs = study.table("runs")[["run_id", "model"]]
    scores = study.table("ensembles").merge(runs, left_on="base_run", right_on="run_id")
    return scores[scores["split"] == "test"]


def _spread(own: pd.DataFrame, metric: str, budget: float) -> str:
    """Mean and standard error over base runs."""
    values = own[(own["metric"] == metric) & (own["nominal_budget"] == budget)]["value"].dropna()
    if values.empty:
        return "-"
    stderr = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{values.mean():.4f} ± {stderr:.4f}"


def _percents(row: object) -> str:
    estimate, low, high = (100 * getattr(row, name) for name in ("estimate", "low", "high"))
    return f"{estimate:+.2f} ({low:+.2f} to {high:+.2f})"


def _cell(text: object) -> str:
    return str(text).replace("|", r"\|")


if __name__ == "__main__":
    main(*sys.argv[1:])
