"""Claim B on tables with a planted truth: three statements, one verdict each."""

import numpy as np
import pandas as pd
import pytest

from lossray.findings.claims import claims_of
from lossray.study.settings import ClaimsSettings
from tests.findings.planted import in_all_gauges, planted, planted_degeneracy

SETTINGS = ClaimsSettings()
EXACT, BEYOND, LOW = "exactly singular", "singular beyond symmetry", "effectively low rank"


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return planted(in_all_gauges(0.01), seeds=4)["runs"]


def _frame(runs: pd.DataFrame, degeneracy: pd.DataFrame) -> pd.DataFrame:
    return claims_of({"runs": runs, "degeneracy": degeneracy}, SETTINGS)


def _verdict(frame: pd.DataFrame, statement: str) -> pd.Series:
    rows = frame[(frame["claim"] == "B") & (frame["subject"] == statement)]
    assert len(rows) == 1
    return rows.iloc[0]


@pytest.mark.parametrize(
    ("excess", "share", "floor", "verdicts"),
    [
        (12, 0.02, 40, ("SUPPORTED", "SUPPORTED", "SUPPORTED")),
        (0, 0.02, 40, ("SUPPORTED", "NOT SUPPORTED", "SUPPORTED")),
        (0, 0.3, 0, ("NOT SUPPORTED", "NOT SUPPORTED", "NOT SUPPORTED")),
        (12, 0.3, 0, ("SUPPORTED", "SUPPORTED", "NOT SUPPORTED")),
    ],
)
def test_planted_truth(
    runs: pd.DataFrame, excess: int, share: float, floor: int, verdicts: tuple[str, ...]
) -> None:
    degeneracy = planted_degeneracy(runs, excess=excess, share=share, floor=floor)
    noise = np.random.default_rng(0).normal(0, 3, size=len(degeneracy))
    degeneracy["nullity"] += np.where(degeneracy["at_noise_floor"], 0, noise)
    frame = _frame(runs, degeneracy)
    assert tuple(_verdict(frame, name)["verdict"] for name in (EXACT, BEYOND, LOW)) == verdicts
    assert "forced under cross entropy" in _verdict(frame, EXACT)["text"]
    assert _verdict(frame, BEYOND)["n"] == len(runs)


def test_without_a_gap_nothing_is_singular_nor_regular(runs: pd.DataFrame) -> None:
    frame = _frame(runs, planted_degeneracy(runs, excess=12, share=0.02, gap=False))
    for statement in (EXACT, BEYOND):
        row = _verdict(frame, statement)
        assert (row["verdict"], row["estimate"], row["low"], row["high"]) == ("UNDECIDED", 0, 0, 1)
        assert f"({len(runs)} cannot be told)" in row["text"]


def test_few_runs_are_undecided(runs: pd.DataFrame) -> None:
    few = runs.iloc[:1]
    frame = _frame(few, planted_degeneracy(few, excess=12, share=0.02))
    assert _verdict(frame, EXACT)["verdict"] == "UNDECIDED"
    assert "at least two runs" in _verdict(frame, LOW)["text"]


def test_first_and_last_checkpoints_are_shown_apart(runs: pd.DataFrame) -> None:
    frame = _frame(runs, planted_degeneracy(runs, excess=12, share=0.02))
    own = frame[frame["claim"] == f"B/{BEYOND}"].set_index("subject")
    assert own.loc["mlp: adam, first checkpoint", "estimate"] == 0
    assert own.loc["mlp: adam, last checkpoint", "estimate"] == 1
    assert own.loc["mlp: adam, last checkpoint", "low"] == pytest.approx(0.025 ** (1 / 4))
    assert not frame.duplicated(["claim", "subject", "statistic"]).any()


def test_low_rank_needs_both_metrics_and_shows_the_bias_of_quadratures(runs: pd.DataFrame) -> None:
    frame = _frame(runs, planted_degeneracy(runs, excess=0, share=0.02, operators=("hessian",)))
    row = _verdict(frame, LOW)
    assert row["verdict"] == "UNDECIDED"
    assert "no counts of the operator adaptive" in row["text"]
    own = frame[frame["claim"] == f"B/{LOW}"].set_index(["subject", "statistic"])
    assert own.loc[("mlp: hessian", "share of |lambda| > 0.01 |lambda|max"), "estimate"] == pytest.approx(
        0.02
    )
    assert own.loc[("mlp: hessian", "share of |lambda| > 0.001 |lambda|max"), "estimate"] == pytest.approx(
        0.04
    )
    bias = own.loc[("quadrature: hessian", "bias of the share below 0.01 |lambda|max"), "estimate"]
    assert bias == pytest.approx(5 / 2410)


def test_all_eigenvalues_are_preferred_to_a_quadrature(runs: pd.DataFrame) -> None:
    dense = planted_degeneracy(runs, excess=0, share=0.02)
    coarse = planted_degeneracy(runs, excess=0, share=0.5).assign(method="quadrature", at_noise_floor=False)
    assert _verdict(_frame(runs, pd.concat([coarse, dense])), LOW)["verdict"] == "SUPPORTED"
    assert _verdict(_frame(runs, coarse), LOW)["verdict"] == "NOT SUPPORTED"


def test_null_counts_and_diverged_runs_are_left_out(runs: pd.DataFrame) -> None:
    degeneracy = planted_degeneracy(runs, excess=12, share=0.02)
    degeneracy.loc[degeneracy["run_id"] == runs["run_id"].iloc[0], ["nullity", "excess", "rank"]] = np.nan
    some = runs.assign(status=["finished"] * (len(runs) - 1) + ["diverged"])
    assert _verdict(_frame(some, degeneracy), BEYOND)["n"] == len(runs) - 2


def test_mse_does_not_force_anything(runs: pd.DataFrame) -> None:
    frame = _frame(runs.assign(loss="mse"), planted_degeneracy(runs, excess=12, share=0.02))
    assert "forced" not in _verdict(frame, EXACT)["text"]
