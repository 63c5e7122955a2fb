"""Claim A on tables with a planted truth: the verdict must be the truth."""

import json

import numpy as np
import pandas as pd
import pytest

from lossray.findings.claims import claims_of
from lossray.findings.claims_text import claims_text
from lossray.storage.claims_tables import CLAIMS
from lossray.storage.rows import to_arrow
from lossray.study.settings import ClaimsSettings
from tests.findings.planted import ADAPTIVE, DIM, by_group, in_all_gauges, planted

SETTINGS = ClaimsSettings()
TRUE = in_all_gauges(by_group(0.06, 0.001))  # adaptive methods perpendicular in every gauge, SGD not
Tables = dict[str, pd.DataFrame]


def _claims(tables: Tables) -> pd.DataFrame:
    return claims_of(tables, SETTINGS)


def _verdict(frame: pd.DataFrame, direction: str = "update") -> pd.Series:
    rows = frame[(frame["claim"] == "A") & (frame["subject"] == direction)]
    assert len(rows) == 1
    return rows.iloc[0]


def _row(frame: pd.DataFrame, claim: str, subject: str, statistic: str | None = None) -> pd.Series:
    rows = frame[(frame["claim"] == claim) & (frame["subject"] == subject)]
    rows = rows if statistic is None else rows[rows["statistic"] == statistic]
    assert len(rows) == 1, frame.loc[frame["claim"] == claim, ["subject", "statistic"]]
    return rows.iloc[0]


@pytest.fixture(scope="module")
def true_claims() -> pd.DataFrame:
    return _claims(planted(TRUE))


# ---- planted truths


@pytest.mark.parametrize("sd", [0.2, 0.7])
@pytest.mark.parametrize(
    ("energies", "verdict", "why"),
    [
        (TRUE, "SUPPORTED", "every adaptive method is below the margin"),
        (in_all_gauges(by_group(0.2, 0.05)), "NOT SUPPORTED", "above the margin: adagrad, adam, rmsprop"),
        (in_all_gauges(0.06), "NOT SUPPORTED", "above the margin"),  # nothing: a constant angle
        (in_all_gauges(0.003), "NOT SUPPORTED", "SGD is below the margin too"),  # nothing, a smaller one
        (in_all_gauges(by_group(0.002, 0.06)), "NOT SUPPORTED", "SGD is below the margin too"),
        (in_all_gauges(1 / DIM), "DIMENSION ARTEFACT", "as a random direction"),
        (
            in_all_gauges(by_group(0.06, 0.001), preconditioned=0.06),
            "METRIC ARTEFACT",
            "the preconditioned gauge reverses it",
        ),
        (
            in_all_gauges(by_group(0.06, 0.001), balanced=0.06),
            "METRIC ARTEFACT",
            "the balanced gauge reverses it",
        ),
    ],
    ids=["true", "aligned", "constant", "small", "reversed", "dimension", "metric", "gauge"],
)
def test_planted_truth(energies: dict[str, float], verdict: str, why: str, sd: float) -> None:
    row = _verdict(frame := _claims(planted(energies, sd=sd)))
    assert row["verdict"] == verdict, row["text"]
    assert why in _row(frame, "A/verdict", "mlp: update, best lr, matched loss")["text"]
    # The gradients are the same in all of these tables: aligned.
    assert _verdict(frame, "minibatch_gradient")["verdict"] == "NOT SUPPORTED"


def test_one_adaptive_method_that_is_not_perpendicular_refutes_every() -> None:
    energies = by_group(0.3, 0.001) | {"rmsprop": 0.05}
    row = _row(_claims(planted(in_all_gauges(energies))), "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "NOT SUPPORTED"
    assert "above the margin: rmsprop" in row["text"]


@pytest.mark.parametrize("seeds", [2, 5, 6])
def test_too_few_seeds_are_undecided_and_the_number_is_named(seeds: int) -> None:
    frame = _claims(planted(TRUE, seeds=seeds, sd=0.2))
    row = _row(frame, "A/verdict", "mlp: update, best lr, matched loss")
    assert (row["verdict"], row["n"]) == ("UNDECIDED", seeds)
    assert "at least 7 seeds are needed" in row["text"]  # 3 contrasts: 1 + log2(3/0.05) = 6.9
    assert _verdict(frame)["verdict"] == "UNDECIDED"


def test_seven_seeds_decide() -> None:
    assert _verdict(_claims(planted(TRUE, seeds=7, sd=0.3)))["verdict"] == "SUPPORTED"


def test_at_the_margin_nothing_is_decided() -> None:
    frame = _claims(planted(in_all_gauges(by_group(0.06, 0.01)), sd=0.7))
    row = _row(frame, "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "UNDECIDED"
    assert "not shown to be below the margin" in row["text"]


def test_one_refuted_architecture_refutes_the_whole() -> None:
    parts = [planted(TRUE), planted(in_all_gauges(0.06), widths=(64,), dim=5000, random_seed=1)]
    frame = _claims({name: pd.concat([part[name] for part in parts]) for name in parts[0]})
    assert _verdict(frame)["verdict"] == "NOT SUPPORTED"
    assert _row(frame, "A/verdict", "mlp widths=32: update, best lr, matched loss")["verdict"] == "SUPPORTED"
    assert "mlp widths=64: NOT SUPPORTED" in _verdict(frame)["text"]


# ---- the rows behind


def test_the_frame_is_the_table(true_claims: pd.DataFrame) -> None:
    assert list(true_claims.columns) == [column.name for column in CLAIMS.columns]
    assert not true_claims.duplicated(CLAIMS.keys).any()
    plain = true_claims.astype(object).where(true_claims.notna(), None)
    assert to_arrow("claims", plain.to_dict("records")).num_rows == len(true_claims)
    assert len(true_claims) < 200
    text = claims_text(true_claims)
    assert "SUPPORTED: the updates of adaptive methods" in text
    assert "UNDECIDED: exactly singular" in text


def test_margins_contrasts_and_nulls(true_claims: pd.DataFrame) -> None:
    adam = _row(true_claims, "A/margin", "mlp: adam, update, raw")
    assert adam["estimate"] == pytest.approx(np.log(0.1), abs=0.4)
    assert adam["low"] < adam["estimate"] < adam["high"] < 0
    assert (adam["verdict"], adam["n"]) == ("below the margin", 10)
    sgd = _row(true_claims, "A/margin", "mlp: sgd, update, raw")
    assert sgd["low"] > 0
    assert sgd["verdict"] == "above the margin"
    every = _row(true_claims, "A/every adaptive method", "mlp: update, raw")
    margins = [_row(true_claims, "A/margin", f"mlp: {name}, update, raw")["p_value"] for name in ADAPTIVE]
    assert every["p_value"] == pytest.approx(max(margins))
    contrast = _row(true_claims, "A/contrast", "mlp: adam - sgd, update, raw")
    assert contrast["estimate"] == pytest.approx(np.log(1 / 60), abs=0.5)
    assert (contrast["p_value"], contrast["p_adjusted"]) == (2 / 2**10, 3 * 2 / 2**10)
    assert contrast["low"] < contrast["estimate"] < contrast["high"]
    chance = _row(true_claims, "A/null", "mlp: adam, update, raw", "S - isotropic null")
    flips = _row(true_claims, "A/null", "mlp: adam, update, raw", "S - ln(sign-flip null)")
    assert chance["estimate"] == pytest.approx(adam["estimate"] + np.log(0.01 * DIM))
    assert flips["estimate"] == pytest.approx(chance["estimate"] - np.log(1.5))
    family = _row(true_claims, "A/contrasts", "mlp: update, raw")
    assert family["text"].startswith("below sgd: adagrad, adam, rmsprop; above: none")


def test_runs_are_compared_at_the_loss_that_all_reach() -> None:
    """SGD comes down to a loss of 0.2 only; at 0.01, where the others end, their S is another."""
    tables = planted(TRUE, sd=0.2)
    runs, checkpoints, alignment = (tables[name] for name in ("runs", "checkpoints", "alignment"))
    slow = runs.loc[runs["optimizer"] == "sgd", "run_id"]
    checkpoints.loc[checkpoints["run_id"].isin(slow) & (checkpoints["step"] == 1000), "train_loss"] = 0.2
    late = (alignment["step"] == 1000) & ~alignment["run_id"].isin(slow)
    alignment.loc[late, "log_energy"] += 4.0
    frame = _claims(tables)
    assert _row(frame, "A/matching", "mlp: best lr")["estimate"] == pytest.approx(0.2, rel=0.2)
    assert _row(frame, "A/verdict", "mlp: update, best lr, matched loss")["verdict"] == "SUPPORTED"
    assert _row(frame, "A/verdict", "mlp: update, best lr, last checkpoint")["verdict"] == "NOT SUPPORTED"


def test_learning_rate_rules() -> None:
    """Adam's larger rate has the higher validation loss, so the best is the smaller."""
    tables = planted(TRUE, sd=0.2, lr={"adam": (0.001, 0.01)})
    runs, alignment = tables["runs"], tables["alignment"]
    larger = runs.loc[runs["lr"] == 0.01, "run_id"]
    alignment.loc[alignment["run_id"].isin(larger), "log_energy"] += 4.0
    frame = _claims(tables)
    for rule, verdict in (
        ("best lr", "SUPPORTED"),
        ("smallest lr", "SUPPORTED"),
        ("largest lr", "NOT SUPPORTED"),
    ):
        assert _row(frame, "A/verdict", f"mlp: update, {rule}, matched loss")["verdict"] == verdict
    # Where half of the runs of the smaller rate diverge, it is not the best.
    smaller = runs.index[runs["lr"] == 0.001]
    runs.loc[smaller[:5], "status"] = "diverged"
    frame = _claims(tables)
    assert _row(frame, "A/verdict", "mlp: update, best lr, matched loss")["verdict"] == "NOT SUPPORTED"


def test_rates_that_were_only_tried_are_no_rule() -> None:
    tables = planted(TRUE, sd=0.2, lr={"adam": (0.001, 0.01), "sgd": (0.3, 0.1)})
    frame = _claims(tables)
    assert frame["subject"].str.contains("largest lr").any()
    tried = tables["alignment"]["run_id"].str.contains("adam-0.01-|sgd-0.1-")
    frame = _claims(tables | {"alignment": tables["alignment"][~tried]})
    assert not frame["subject"].str.contains("largest lr|smallest lr").any()
    assert _verdict(frame)["verdict"] == "SUPPORTED"


def test_a_best_rate_at_the_edge_is_said() -> None:
    tables = planted(TRUE, sd=0.2, lr={"adam": (0.01, 0.001), "momentum": (0.3, 0.1), "rmsprop": (0.003,)})
    row = _verdict(_claims(tables))
    assert row["verdict"] == "SUPPORTED"
    note = "the best learning rate is at the edge of those tried: adam (0.01, the largest of 2)"
    assert row["text"].endswith(note)
    assert _row(_claims(tables), "A/levels", "mlp: update, best lr")["text"].endswith(note)
    tables = planted(TRUE, sd=0.2, lr={"adam": (0.01, 0.001, 0.03)})
    assert "edge" not in _verdict(_claims(tables))["text"]


def test_models_of_another_depth_are_another_family() -> None:
    sizes = {(16,): 600, (64,): 6000, (32, 32): 3000, (64, 64): 9000, (16, 16): 1600}
    parts = [
        planted(in_all_gauges(0.06), widths=widths, dim=dim, seeds=6, random_seed=dim)
        for widths, dim in sizes.items()
    ]
    frame = _claims({name: pd.concat([part[name] for part in parts]) for name in parts[0]})
    slopes = frame[(frame["claim"] == "A/slope") & frame["subject"].str.contains(": adam, update")]
    assert len(slopes) == 2  # against 0 and -1, of the three networks of two layers
    assert slopes["text"].str.startswith("d = 1600 to 9000").all()


@pytest.mark.parametrize(
    ("power", "verdict"), [(0.0, "a constant angle"), (-1.0, "chance"), (-0.5, "neither constant nor chance")]
)
def test_slope_on_dimension(power: float, verdict: str) -> None:
    sizes = {(16,): 600, (64,): 6000, (256,): 60_000}
    parts = [
        planted(
            in_all_gauges(0.06 * (dim / 600) ** power),
            widths=widths,
            dim=dim,
            sd=0.1,
            seeds=6,
            random_seed=dim,
        )
        for widths, dim in sizes.items()
    ]
    frame = _claims({name: pd.concat([part[name] for part in parts]) for name in parts[0]})
    row = _row(frame, "A/slope", "mlp: adam, update, raw", "slope of S on ln d, against 0")
    assert row["estimate"] == pytest.approx(power, abs=0.15)
    assert (row["verdict"], row["n"]) == (verdict, 6)
    # Perpendicular is not tested below 1,000 parameters.
    small = _row(frame, "A/verdict", "mlp widths=16: update, best lr, matched loss")
    assert small["verdict"] == "UNDECIDED"
    assert "d = 600" in small["text"]


def test_attribution() -> None:
    """Preconditioning costs a factor e^2 on both trajectories; Adam's places are no different."""
    tables = planted(in_all_gauges(by_group(0.06, 0.06 * np.exp(-2))), sd=0.2)
    alignment = tables["alignment"]
    own = alignment[(alignment["direction"] == "update") & alignment["run_id"].str.contains("sgd")]
    shadow = own.assign(direction="shadow:adam", log_energy=own["log_energy"] - 2)
    frame = _claims(tables | {"alignment": pd.concat([alignment, shadow])})
    column = _row(frame, "A/attribution", "mlp: adam", "column effect: update instead of gradient")
    assert column["estimate"] == pytest.approx(-2)
    assert column["p_value"] == 2 / 2**10
    row = _row(frame, "A/attribution", "mlp: adam", "row effect: own trajectory instead of SGD's")
    assert abs(row["estimate"]) < 0.3


# ---- what is missing


@pytest.mark.parametrize("present", [(), ("runs",), ("runs", "checkpoints")])
def test_empty_tables_are_undecided(present: tuple[str, ...]) -> None:
    tables = planted(TRUE, seeds=3)
    empty = {name: table if name in present else table.iloc[:0] for name, table in tables.items()}
    for some in (empty, {name: tables[name] for name in present}):
        frame = _claims(some)
        assert set(frame.loc[frame["claim"].isin(["A", "B"]), "verdict"]) == {"UNDECIDED"}
        assert _verdict(frame)["text"]
        assert claims_text(frame)


@pytest.mark.parametrize("gauge", ["balanced", "preconditioned"])
def test_a_missing_gauge_is_named(gauge: str) -> None:
    tables = planted(TRUE, sd=0.2)
    alignment = tables["alignment"]
    tables["alignment"] = alignment[alignment["gauge"] != gauge]
    row = _row(_claims(tables), "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "UNDECIDED"
    assert f"gauge {gauge}" in row["text"]


def test_the_adaptive_gauge_is_asked_of_gradients_only() -> None:
    """It divides displacements by |theta|: neither to pass there nor to be above SGD shows anything."""
    tiny = by_group(3e-8, 8e-7)  # "above SGD", far below what could be called aligned
    for energies in (in_all_gauges(by_group(0.07, 0.002), adaptive=tiny), TRUE):
        tables = planted(energies, sd=0.2, gradient=0.002)
        gradients = tables["alignment"]["direction"] == "minibatch_gradient"
        sgd = tables["alignment"]["run_id"].str.contains("sgd")
        tables["alignment"].loc[gradients & sgd, "log_energy"] += np.log(40)
        adaptive = tables["alignment"]["gauge"] == "adaptive"
        assert _verdict(_claims(tables))["verdict"] == "SUPPORTED"
        assert _verdict(_claims(tables), "minibatch_gradient")["verdict"] == "SUPPORTED"
        tables["alignment"] = tables["alignment"][~adaptive]
        assert _verdict(_claims(tables))["verdict"] == "SUPPORTED"
        assert _verdict(_claims(tables), "minibatch_gradient")["verdict"] == "UNDECIDED"


def test_a_smooth_network_has_no_balanced_gauge_to_survive() -> None:
    tables = planted(TRUE, sd=0.2)
    alignment = tables["alignment"]
    tables["alignment"] = alignment[alignment["gauge"] != "balanced"]
    tables["runs"]["activation"] = "tanh"
    assert _verdict(_claims(tables))["verdict"] == "SUPPORTED"


def test_the_preconditioned_gauge_of_sgd_is_its_raw_one() -> None:
    tables = planted(TRUE, sd=0.2)
    alignment = tables["alignment"]
    identity = alignment["run_id"].str.contains("sgd|momentum") & (alignment["gauge"] == "preconditioned")
    tables["alignment"] = alignment[~identity]
    frame = _claims(tables)
    assert _verdict(frame)["verdict"] == "SUPPORTED"
    raw = _row(frame, "A/margin", "mlp: sgd, update, raw")
    assert _row(frame, "A/margin", "mlp: sgd, update, preconditioned")["estimate"] == raw["estimate"]


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_a_missing_optimizer_is_named(optimizer: str) -> None:
    tables = planted(TRUE, sd=0.2)
    gone = tables["alignment"]["run_id"].str.contains(optimizer)
    tables["alignment"] = tables["alignment"][~gone]
    frame = _claims(tables)
    if optimizer == "sgd":
        assert _verdict(frame)["verdict"] == "UNDECIDED"
        assert "fewer than two resolved S of sgd" in _verdict(frame)["text"]
    tables["runs"] = tables["runs"][tables["runs"]["adaptive"] == False]  # noqa: E712
    assert "no finished run of an adaptive method" in _verdict(_claims(tables))["text"]


def test_diverged_runs_and_nans_are_left_out() -> None:
    tables = planted(TRUE, sd=0.2)
    runs, alignment = tables["runs"], tables["alignment"]
    runs.loc[runs["run_id"].str.contains("adam-0.1-3"), ["status", "train_loss"]] = ["diverged", np.nan]
    bad = alignment["run_id"].str.contains("rmsprop-0.1-4")
    alignment.loc[bad, ["log_energy", "sign_flip_null"]] = np.nan
    checkpoints = tables["checkpoints"]
    checkpoints.loc[checkpoints["run_id"].str.contains("adam-0.1-3"), "train_loss"] = np.nan
    frame = _claims(tables)
    assert _verdict(frame)["verdict"] == "SUPPORTED"
    for name, n in (("adam", 9), ("rmsprop", 9), ("adagrad", 10)):
        assert _row(frame, "A/contrast", f"mlp: {name} - sgd, update, raw")["n"] == n
    assert "1 diverged" in _row(frame, "A/matching", "mlp: best lr")["text"]


def test_unresolved_rows_are_dropped() -> None:
    tables = planted(TRUE, sd=0.2)
    alignment = tables["alignment"]
    adam = alignment["run_id"].str.contains("adam") & (alignment["subspace"] == "v1")
    few = adam & alignment["run_id"].str.endswith(("-0", "-1"))
    tables["alignment"] = alignment.assign(resolved=alignment["resolved"].where(~few, other=None))
    frame = _claims(tables)
    assert _row(frame, "A/margin", "mlp: adam, update, raw")["n"] == 8
    row = _row(frame, "A/verdict", "mlp: update, best lr, matched loss")
    assert "8 rows left out as unresolved" in row["text"]


@pytest.mark.parametrize("energies", [by_group(0.06, 0.0005), by_group(0.05, 0.2), by_group(0.0005, 0.0005)])
@pytest.mark.parametrize("whose", ["adam", "sgd", ""])
def test_the_top_10_that_stand_in_for_v1_neither_establish_nor_refute(
    energies: dict[str, float], whose: str
) -> None:
    tables = planted(in_all_gauges(energies), sd=0.1)
    alignment = tables["alignment"]
    own = alignment["run_id"].str.contains(whose) & (alignment["subspace"] == "v1")
    tables["alignment"] = alignment.assign(resolved=alignment["resolved"] & ~own)
    frame = _claims(tables)
    row = _row(frame, "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == _verdict(frame)["verdict"] == "UNDECIDED"
    assert "v1 is not resolved in most runs" in row["text"]
    # The numbers are there, and say what they are of.
    assert "energy in top10" in _row(frame, "A/margin", "mlp: adam, update, raw")["text"]


def test_a_gauge_in_which_v1_is_not_resolved_decides_nothing() -> None:
    for other in (0.0005, 0.3):
        tables = planted(in_all_gauges(by_group(0.06, 0.0005), balanced=other), sd=0.1)
        alignment = tables["alignment"]
        own = (alignment["gauge"] == "balanced") & (alignment["subspace"] == "v1")
        tables["alignment"] = alignment.assign(resolved=alignment["resolved"] & ~own)
        row = _row(_claims(tables), "A/verdict", "mlp: update, best lr, matched loss")
        assert row["verdict"] == "UNDECIDED"
        assert "in gauge balanced" in row["text"]


def test_a_gauge_in_which_most_runs_are_unresolved_decides_nothing_without_the_top_10_either() -> None:
    tables = planted(in_all_gauges(by_group(0.06, 0.0005)), sd=0.1)
    alignment = tables["alignment"][tables["alignment"]["subspace"] == "v1"]
    most = (alignment["gauge"] == "balanced") & alignment["run_id"].str.contains("-adam-.*-[0-6]$")
    tables["alignment"] = alignment.assign(resolved=alignment["resolved"] & ~most)
    row = _row(_claims(tables), "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "UNDECIDED"
    assert "gauge balanced" in row["text"]


# ---- nulls


def test_a_contrast_below_a_factor_2_establishes_nothing() -> None:
    """SGD above the margin and the methods below it, each for certain, by a factor 1.7."""
    tables = planted(in_all_gauges(by_group(0.01 * 1.7**0.5, 0.01 / 1.7**0.5)), sd=0.02)
    row = _row(_claims(tables), "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "NOT SUPPORTED"
    assert row["text"] == "less than a factor 2 below SGD: adagrad, adam, rmsprop"
    tables = planted(in_all_gauges(by_group(0.01 * 2**0.5, 0.01 / 2**0.5)), sd=0.02)
    row = _row(_claims(tables), "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "UNDECIDED"


def test_random_windows_are_the_null_of_dimension() -> None:
    """A single random direction has S of log chi^2_1 / d, 1.27 below chance in the mean."""
    tables = planted(in_all_gauges(1 / DIM), sd=0.3, seeds=12)
    tables["alignment"]["log_energy"] -= 1.27
    row = _row(_claims(tables), "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "UNDECIDED"  # against independent steps
    tables["alignment"]["isotropic_null"] = np.log(tables["alignment"]["k"] / DIM) - 1.27
    row = _row(frame := _claims(tables), "A/verdict", "mlp: update, best lr, matched loss")
    assert row["verdict"] == "DIMENSION ARTEFACT"
    null = _row(frame, "A/null", "mlp: adam, update, raw", "S - isotropic null")
    assert null["low"] < 0 < null["high"]


def test_no_more_than_random_signs_is_another_word() -> None:
    """SGD has 60 times chance, and so it has with random signs: no artefact of dimension."""
    tables = planted(in_all_gauges(by_group(0.06, 0.001)), sd=0.2)
    assert _verdict(_claims(tables))["verdict"] == "SUPPORTED"
    tables["alignment"]["sign_flip_null"] = 1.3 * np.exp(tables["alignment"]["log_energy"])
    assert _verdict(_claims(tables))["verdict"] == "RANDOM SIGNS"
    adam = tables["alignment"]["run_id"].str.contains("adam")
    tables["alignment"].loc[adam, "sign_flip_null"] /= 6
    assert _verdict(_claims(tables))["verdict"] == "SUPPORTED"
    # Where the claim is refuted anyway it is refuted.
    tables = planted(in_all_gauges(by_group(0.2, 0.08)), sd=0.2)
    tables["alignment"]["sign_flip_null"] = np.exp(tables["alignment"]["log_energy"])
    assert _verdict(_claims(tables))["verdict"] == "NOT SUPPORTED"


# ---- levels of loss


def test_the_levels_are_judged_one_by_one_and_named() -> None:
    """Adam is perpendicular at a tenth of the start's loss, and no longer at the end."""
    tables = planted(TRUE, sd=0.2)
    alignment = tables["alignment"]
    late = (alignment["step"] == 1000) & alignment["run_id"].str.contains("adam")
    alignment.loc[late & (alignment["direction"] == "update"), "log_energy"] += 5.0
    frame = _claims(tables)
    at = {row.subject: row.verdict for row in frame[frame["claim"] == "A/verdict"].itertuples()}
    assert at["mlp: update, best lr, matched loss 0.1 of the start"] == "SUPPORTED"
    assert at["mlp: update, best lr, matched loss"] == "NOT SUPPORTED"
    levels = _row(frame, "A/levels", "mlp: update, best lr")
    assert levels["n"] == 9  # of the levels that were judged; one run has no checkpoint near one of them
    assert levels["verdict"] == _verdict(frame)["verdict"] == "NOT SUPPORTED"
    for text in (levels["text"], _verdict(frame)["text"]):
        assert "SUPPORTED at matched loss 0.1 of the start" in text
        assert "NOT SUPPORTED at matched loss" in text
        assert "not judged at matched loss 1 of the start" in text


def _references(frame: pd.DataFrame) -> dict[str, float]:
    own = frame[frame["claim"] == "A/matching"]
    return dict(zip(own["subject"], own["estimate"], strict=True))


def test_the_reference_is_that_of_the_judged_optimizers() -> None:
    """Momentum is not judged: where it gets stuck, or starts elsewhere, changes nothing."""
    tables = planted(TRUE, sd=0.2)
    before = _references(_claims(tables))
    checkpoints = tables["checkpoints"]
    stuck = checkpoints["run_id"].str.contains("momentum")
    checkpoints.loc[stuck, "train_loss"] = np.where(checkpoints.loc[stuck, "step"] > 0, 5.0, 9.0)
    assert _references(_claims(tables)) == before


def test_a_run_that_is_never_near_the_loss_is_not_compared_there() -> None:
    tables = planted(TRUE, sd=0.2)
    checkpoints = tables["checkpoints"]
    far = checkpoints["run_id"].str.contains("adam") & (checkpoints["step"] == 100)
    checkpoints.loc[far, "train_loss"] = 0.4  # a tenth of the start is 0.23
    frame = _claims(tables)
    row = _row(frame, "A/verdict", "mlp: update, best lr, matched loss 0.1 of the start")
    assert (row["verdict"], row["n"]) == ("UNDECIDED", 0)
    assert "fewer than two resolved S of adam" in row["text"]
    assert "10 runs have none within" in _row(frame, "A/matching", "mlp: best lr, 0.1 of the start")["text"]
    assert _verdict(frame)["verdict"] == "SUPPORTED"  # at the lowest loss


def test_levels_are_the_studys() -> None:
    settings = ClaimsSettings(levels=(0.45, 0.09))
    frame = claims_of(planted(TRUE, sd=0.2), settings)
    subjects = set(frame.loc[frame["claim"] == "A/verdict", "subject"])
    assert "mlp: update, best lr, matched loss 0.45 of the start" in subjects
    assert not any("0.3 of the start" in subject for subject in subjects)


# ---- lost runs


def test_lost_methods_are_named() -> None:
    tables = planted(TRUE, sd=0.2, seeds=12)
    runs = tables["runs"]

    def lose(optimizer: str, seeds: int) -> pd.DataFrame:
        gone = (runs["optimizer"] == optimizer) & (runs["seed"] < seeds)
        status = runs["status"].where(~gone, "diverged")
        return _claims(tables | {"runs": runs.assign(status=status)})

    for optimizer in ("adam", "sgd"):
        few = _row(lose(optimizer, 3), "A/verdict", "mlp: update, best lr, matched loss")
        assert few["verdict"] == "SUPPORTED"
        assert f"diverged or failed are left out of {optimizer} (3 of 12)" in few["text"]
        for seeds in (7, 12):
            frame = lose(optimizer, seeds)
            assert _verdict(frame)["verdict"] == "UNDECIDED"
            most = f"most runs diverged or failed of {optimizer} ({seeds} of 12)"
            assert most in _verdict(frame)["text"]
    # Whoever is not judged may diverge.
    assert _verdict(lose("momentum", 12))["verdict"] == "SUPPORTED"


def test_five_seeds_refute_nothing_either() -> None:
    energies = by_group(0.06, 0.0005) | {"adagrad": 0.4}
    row = _verdict(_claims(planted(in_all_gauges(energies), seeds=5, sd=0.3)))
    assert row["verdict"] == "UNDECIDED"
    assert "at least 7 seeds are needed" in row["text"]


def test_one_doubtful_refutation_of_many_is_none() -> None:
    """One method in one of four networks is 1.5 times the margin: above it alone, not among so many."""
    energies = by_group(0.3, 0.001)
    networks = {(20,): 1700, (30,): 2300, (40,): 2900, (50,): 3600}
    parts = [
        planted(in_all_gauges(energies), widths=widths, dim=dim, sd=0.35, random_seed=dim)
        for widths, dim in networks.items()
    ]
    alignment = parts[0]["alignment"]
    own = alignment["run_id"].str.contains("adam") & (alignment["direction"] == "update")
    alignment.loc[own, "log_energy"] += np.log(0.015 / 0.001)
    frame = _claims({name: pd.concat([part[name] for part in parts]) for name in parts[0]})
    alone = _row(frame, "A/margin", "mlp widths=20: adam, update, raw")
    assert alone["verdict"] == "above the margin"
    assert _verdict(frame)["verdict"] == "UNDECIDED"


def test_recorded_runs_have_no_seed_and_are_not_compared() -> None:
    tables = planted(TRUE, seeds=2)
    tables["runs"]["seed"] = None
    assert "no alignment rows of compared runs" in _verdict(_claims(tables))["text"]


def test_labels_name_what_differs() -> None:
    tables = planted(TRUE, seeds=2)
    runs = tables["runs"]
    other = runs.assign(
        run_id="b" + runs["run_id"],
        model_settings=json.dumps({"name": "mlp", "widths": [8, 8], "activation": "relu"}),
    )
    frame = _claims(tables | {"runs": pd.concat([runs, other])})
    assert "mlp widths=8x8: not judged" in _verdict(frame)["text"]


def test_a_checkpoint_at_which_the_learning_rate_has_reached_zero_is_not_compared() -> None:
    tables = planted(TRUE)
    alignment = tables["alignment"]
    still = (alignment["step"] == 1000) & (alignment["direction"] == "update")
    alignment.loc[still, "log_energy"] = np.nan
    frame = _claims(tables)
    assert _verdict(frame)["verdict"] == "SUPPORTED"
    (last,) = frame[frame["subject"] == "mlp: update, best lr, last checkpoint"]["verdict"]
    assert last == "SUPPORTED"
    assert 0.1 < _row(frame, "A/matching", "mlp: best lr")["estimate"] < 0.4  # the loss at step 100


def test_a_level_that_most_seeds_do_not_reach_is_not_judged_and_does_not_count_in_n():
    tables = planted(in_all_gauges(by_group(0.08, 0.002)), seeds=20, sd=0.3)
    checkpoints = tables["checkpoints"]
    seed = checkpoints["run_id"].str.split("-").str[-1].astype(int)
    checkpoints.loc[(seed >= 8) & (checkpoints["step"] == 100), "train_loss"] = 20.0
    rows = claims_of(tables, ClaimsSettings()).set_index(["claim", "subject"])
    assert (
        "(8 of 20)" in rows.loc[("A/verdict", "mlp: update, best lr, matched loss 0.1 of the start"), "text"]
    )
    levels = rows.loc[("A/levels", "mlp: update, best lr")]
    assert levels["verdict"] == "SUPPORTED"
    assert levels["n"] >= 10


def test_the_overall_verdict_names_who_lost_runs():
    tables = planted(in_all_gauges(by_group(0.08, 0.002)), seeds=20, sd=0.3)
    runs = tables["runs"]
    runs.loc[(runs["optimizer"] == "adam") & (runs["seed"] < 6), "status"] = "diverged"
    rows = _claims(tables).set_index(["claim", "subject"])
    assert rows.loc[("A", "update"), "verdict"] == "SUPPORTED"
    assert "adam (6 of 20)" in rows.loc[("A", "update"), "text"]
