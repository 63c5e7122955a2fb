"""Claim C on tables with a planted truth: the verdict must be the truth."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lossray.errors import DataError
from lossray.findings.bootstrap import Interval, example_resamples, run_resamples
from lossray.findings.claims import TABLES_READ, claims_of, claims_text
from lossray.findings.ensemble_contrasts import Contrast, contrast
from lossray.findings.ensemble_scores import ensemble_cells, setting_labels
from lossray.findings.verdict_c import MOST_RUNS, decide_overall, runs_needed
from lossray.storage.claims_tables import CLAIMS
from lossray.storage.rows import to_arrow
from lossray.study.settings import ClaimsSettings
from tests.findings.planted import in_all_gauges, planted, planted_degeneracy
from tests.findings.planted_ensembles import METHODS, planted_ensembles

SETTINGS = ClaimsSettings()
C1, C3 = "mlp: sgd: rescale_retrain (C1)", "mlp: sgd: rescale_curve (C3)"
ROUNDING = {"rescale_retrain": "lr_equivalent", "rescale_curve": "curve_lr_equivalent"}
Tables = dict[str, pd.DataFrame]


def _claims(tables: Tables) -> pd.DataFrame:
    return claims_of(tables, SETTINGS)


def _row(frame: pd.DataFrame, claim: str, subject: str, statistic: str | None = None) -> pd.Series:
    rows = frame[(frame["claim"] == claim) & (frame["subject"] == subject)]
    rows = rows if statistic is None else rows[rows["statistic"] == statistic]
    assert len(rows) == 1, frame.loc[frame["claim"] == claim, ["subject", "statistic"]]
    return rows.iloc[0]


def _verdicts(frame: pd.DataFrame) -> tuple[str, str, str]:
    """Of the whole, which is also that of the only setting, of C1 and of C3."""
    overall, setting = (_row(frame, "C", subject)["verdict"] for subject in ("overall", "mlp: sgd"))
    assert overall == setting
    return overall, _row(frame, "C", C1)["verdict"], _row(frame, "C", C3)["verdict"]


@pytest.fixture(scope="module")
def won() -> pd.DataFrame:
    return _claims(planted_ensembles({"rescale_retrain": 0.8, "align_curve": 0.9}))


# ---- planted truths

YES, NO, OPEN = "SUPPORTED", "NOT SUPPORTED", "UNDECIDED"


@pytest.mark.parametrize(
    ("levels", "verdicts", "why"),
    [
        ({"rescale_retrain": 0.8}, (YES, YES, NO), "better than both controls at budget 1, 3."),
        ({"rescale_retrain": {3.0: 0.8}}, (YES, YES, NO), "better than both controls at budget 3."),
        ({"rescale_retrain": 0.97}, (YES, YES, NO), "at budget 1, 3, though by less than 5%"),
        ({}, (NO, NO, NO), "at every budget its improvement over one of the controls is below 5%"),
        ({"rescale_retrain": 1.2}, (NO, NO, NO), "is below 5%"),
        ({"snapshot": 1.3, "curve_lr_equivalent": 1.3}, (NO, NO, NO), "is below 5%"),
        ({"rescale_curve": 0.8, "rescale_retrain": 1.2}, (YES, NO, YES), "is below 5%"),
        ({"snapshot": 1.3, "lr_equivalent": {3.0: 1.3}}, (YES, YES, NO), "both controls at budget 3"),
    ],
    ids=["better", "one budget", "slightly", "equal", "worse", "one control each", "curve", "controls"],
)
def test_planted_truth(levels: dict[str, float], verdicts: tuple[str, str, str], why: str) -> None:
    frame = _claims(planted_ensembles(levels, sd=0.01))
    assert _verdicts(frame) == verdicts
    assert why in _row(frame, "C", C1)["text"]
    assert not frame.duplicated(CLAIMS.keys).any()


def test_a_control_that_is_the_same_to_rounding_refutes_and_is_called_by_its_name() -> None:
    frame = _claims(planted_ensembles({"snapshot": 1.3, "curve": 1.3}, sd=0.3, same=ROUNDING))
    assert _verdicts(frame) == (NO, NO, NO)
    for subject in (C1, C3):
        text = _row(frame, "C", subject)["text"]
        assert text.count("the same to rounding") == 1
        assert "rescaling is a change of learning rates" in text
    own = "mlp: sgd: rescale_retrain (C1) - lr_equivalent, budget 3"
    row = _row(frame, "C/contrast", own, "nll: relative improvement")
    assert abs(row["estimate"]) < 1e-6
    assert max(abs(row["low"]), abs(row["high"])) < 1e-5
    assert row["text"].endswith("the same to rounding")


@pytest.mark.parametrize("seeds", [2, 7])
def test_few_seeds_are_undecided_and_the_number_is_named(seeds: int) -> None:
    frame = _claims(planted_ensembles({"rescale_retrain": 0.5}, seeds=seeds))
    assert _verdicts(frame) == (OPEN, OPEN, OPEN)
    row = _row(frame, "C", C1)
    assert (
        f"at least 8 seeds are needed, the fewest pairs are {seeds}" in row["text"]
    )  # 1 + log2(4/0.05) = 7.3
    assert row["n"] == seeds
    assert _verdicts(_claims(planted_ensembles({"rescale_retrain": 0.5}, seeds=8)))[1] == YES


def test_noise_is_undecided_and_the_seeds_that_would_do_are_estimated() -> None:
    frame = _claims(planted_ensembles({"rescale_retrain": 0.9}, sd=0.25, random_seed=1))
    assert _verdicts(frame) == (OPEN, OPEN, OPEN)
    text = _row(frame, "C", C1)["text"]
    assert "neither better than both controls nor shown to fall short of 5%; about " in text
    assert 10 < int(text.split("about ")[1].split()[0]) <= MOST_RUNS
    # A margin that nobody could miss is refuted by the same numbers.
    wide = claims_of(planted_ensembles({}, sd=0.25), ClaimsSettings(margin_nll=0.9))
    assert _verdicts(wide) == (NO, NO, NO)


def test_every_setting_must_agree() -> None:
    parts = [planted_ensembles({"rescale_retrain": 0.8}), planted_ensembles({}, lr=0.5, random_seed=1)]
    tables = {name: pd.concat([part[name] for part in parts]) for name in parts[0]}
    frame = _claims(tables)
    overall = _row(frame, "C", "overall")
    assert (overall["verdict"], overall["n"]) == (OPEN, 2)
    assert overall["text"] == "mlp: sgd lr=0.1: SUPPORTED; mlp: sgd lr=0.5: NOT SUPPORTED"
    assert not frame.duplicated(CLAIMS.keys).any()
    # A setting without ensembles is named and does not count.
    tables["predictions"] = parts[0]["predictions"]
    overall = _row(_claims(tables), "C", "overall")
    assert overall["verdict"] == YES
    assert overall["text"].endswith("; no ensembles of mlp: sgd lr=0.5")
    assert decide_overall({"a": NO, "b": NO}, []).verdict == NO
    assert decide_overall({"a": NO, "b": OPEN}, []).verdict == OPEN


# ---- the numbers behind


def test_the_text_carries_the_numbers_of_the_largest_budget(won: pd.DataFrame) -> None:
    own = "mlp: sgd: rescale_retrain (C1) - snapshot, budget 3"
    nats = _row(won, "C/contrast", own, "nll: control - variant")
    share = _row(won, "C/contrast", own, "nll: relative improvement")
    text = _row(won, "C", C1)["text"]
    assert f"over snapshot {nats['estimate']:+.3g} nats ({nats['low']:+.3g} to {nats['high']:+.3g})" in text
    assert (
        f"{100 * share['estimate']:+.3g}% ({100 * share['low']:+.3g} to {100 * share['high']:+.3g})" in text
    )
    assert "; intervals of level 98.75%, 10 base runs." in text  # two budgets x two variants
    assert share["low"] < 0.2 < share["high"]
    printed = claims_text(won)
    assert "C. Ensembles from scale invariance" in printed
    assert f"  SUPPORTED: {C1}" in printed
    assert printed.index("SUPPORTED: at equal budget") < printed.index(f"SUPPORTED: {C1}")


def test_the_frame_is_the_table(won: pd.DataFrame) -> None:
    assert not won.duplicated(CLAIMS.keys).any()
    plain = won.astype(object).where(won.notna(), None)
    assert to_arrow("claims", plain.to_dict("records")).num_rows == len(won)


def test_contrasts_by_hand() -> None:
    tables = planted_ensembles({"snapshot": 1.2}, sd=0.1)
    (cell,) = ensemble_cells(tables, setting_labels(tables))
    own = contrast(cell, "rescale_retrain", "snapshot", 3.0, metric="nll", alpha=0.05)
    test = tables["predictions"][tables["predictions"]["split"] == "test"].sort_values("seed")
    of = {
        name: np.stack(rows["nll"].to_numpy()).astype(np.float64)
        for name, rows in test[test["nominal_budget"] == 3].groupby("method")
    }
    difference = of["snapshot"] - of["rescale_retrain"]
    assert own.difference.estimate == pytest.approx(difference.mean())
    assert own.relative.estimate == pytest.approx(difference.mean() / of["snapshot"].mean())
    assert own.spread == pytest.approx(np.abs(difference).mean())
    # The linear part of the ratio spreads as the ratio itself does.
    variant, control = (
        run_resamples(example_resamples(of[name])) for name in ("rescale_retrain", "snapshot")
    )
    assert own.difference.stderr == pytest.approx((control - variant).std())
    assert own.relative.stderr == pytest.approx((1 - variant / control).std(), rel=0.1)


def test_tests_and_families(won: pd.DataFrame) -> None:
    contrasts = won[won["claim"] == "C/contrast"]
    primary = contrasts[contrasts["p_adjusted"].notna()]
    assert len(primary) == 2 * 4  # two statistics of four contrasts
    assert primary["subject"].str.endswith("budget 3").all()
    assert primary["statistic"].str.startswith("nll: ").all()
    assert primary["p_adjusted"].min() == pytest.approx(4 * 2 / 2**10)
    assert set(contrasts["statistic"].str.split(":").str[0]) == {"nll", "nll_scaled", "error"}
    pair = won[won["claim"] == "C/reference"]
    row = pair[pair["subject"] == "mlp: sgd: align_curve (C5) - curve_seeds, budget 3"].iloc[1]
    assert (row["statistic"], row["verdict"]) == ("nll: relative improvement", "better")
    assert pair["subject"].str.contains("- independent").any()
    assert pair["p_adjusted"].isna().all()


def test_curves_and_diversity(won: pd.DataFrame) -> None:
    tables = planted_ensembles({"rescale_retrain": 0.8, "align_curve": 0.9})
    test = tables["predictions"][tables["predictions"]["split"] == "test"]
    for (method, budget), rows in test.groupby(["method", "nominal_budget"]):
        row = _row(won, "C/budget", f"mlp: sgd: {method}, budget {budget:g}", "test nll")
        assert row["estimate"] == pytest.approx(np.stack(rows["nll"].to_numpy()).mean(), rel=1e-5)
        assert row["low"] < row["estimate"] < row["high"]
        assert row["text"].startswith("3 members, 300 gradients of examples")
    whole = _row(won, "C/budget", "mlp: sgd: snapshot, budget 3", "test nll")["estimate"]
    first = _row(won, "C/size", "mlp: sgd: snapshot, 1 member", "test nll")
    assert first["estimate"] == pytest.approx(1.2 * whole, rel=1e-5)
    assert first["n"] == 10
    assert first["text"].startswith("budget 3, 100 gradients")
    diverse = won[(won["claim"] == "C/diversity") & won["subject"].str.startswith("mlp: sgd: snapshot")]
    found = dict(zip(diverse["subject"] + "|" + diverse["statistic"], diverse["estimate"], strict=True))
    assert found == pytest.approx(
        {
            "mlp: sgd: snapshot, 2 members|test disagreement": 0.1,
            "mlp: sgd: snapshot, 2 members|test kl": 0.02,
            "mlp: sgd: snapshot, 3 members|test disagreement": 0.1,
            "mlp: sgd: snapshot, 3 members|test kl": 0.03,
            "mlp: sgd: snapshot|weight_distance": 5.5,
            "mlp: sgd: snapshot|barrier": 0.3,
        }
    )
    row = _row(won, "C/rescaling", "mlp: sgd: rescale_retrain", "lambda_max after / before")
    assert (row["estimate"], row["n"]) == (1.5, 10)


def _contrast(estimate: float, stderr: float, *, n: int = 10, floor: float = 0.0) -> Contrast:
    own = Interval(estimate, estimate - 3 * stderr, estimate + 3 * stderr, stderr)
    return Contrast("a", "b", 1.0, "nll", n, 0, 100, 1.0, own, own, floor, 1.0, 1.0)


def test_runs_needed_is_the_least_that_will_do() -> None:
    level = 0.05 / 6
    needed = runs_needed(_contrast(0.02, 0.02), 0.02, level=level)
    rng = np.random.default_rng(0)
    for n, enough in ((needed, True), (needed // 2, False)):
        values = 0.02 + 0.02 * np.sqrt(10) * rng.normal(size=(20_000, n))
        t = values.mean(axis=1) / (values.std(axis=1, ddof=1) / np.sqrt(n))
        power = (t > stats.t.ppf(1 - level / 2, n - 1)).mean()
        assert (power > 0.78) == enough
    # What the test split adds is not reduced by runs.
    assert runs_needed(_contrast(0.02, 0.02, floor=0.019**2), 0.02, level=level) == MOST_RUNS + 1
    assert runs_needed(_contrast(-0.02, 0.02), -0.02, level=level) == MOST_RUNS + 1


# ---- what is missing


@pytest.mark.parametrize("present", [(), ("runs",), ("runs", "ensembles")])
def test_without_predictions_it_is_undecided_and_a_and_b_are_as_before(present: tuple[str, ...]) -> None:
    tables = planted_ensembles({}, seeds=2)
    for some in (
        {name: table if name in present else table.iloc[:0] for name, table in tables.items()},
        {name: tables[name] for name in present},
    ):
        frame = _claims(some)
        rows = frame[frame["claim"] == "C"]
        assert len(rows) == 1
        assert rows["verdict"].item() == OPEN
        assert rows["text"].item() == "no ensembles ([ensembles] of the study switches them on)"
        assert "C. Ensembles" in claims_text(frame)


def test_ensembles_change_nothing_about_the_other_claims() -> None:
    tables = planted(in_all_gauges(0.06), seeds=4)
    tables["degeneracy"] = planted_degeneracy(tables["runs"], excess=12, share=0.02)
    ensembles = planted_ensembles({"rescale_retrain": 0.8})
    # Their base runs are runs of the study, so that `runs` is the same.
    names = dict(zip([f"run-0.1-{i}" for i in range(4)], tables["runs"]["run_id"][:4], strict=True))
    added = {
        name: table.assign(base_run=table["base_run"].map(names)).dropna(subset="base_run")
        for name, table in ensembles.items()
        if name != "runs"
    }
    before, after = _claims(tables), _claims(tables | added)
    others = [frame[~frame["claim"].str.startswith("C")].reset_index(drop=True) for frame in (before, after)]
    pd.testing.assert_frame_equal(*others)
    assert (after["claim"] == "C/contrast").any()
    assert set(added) <= set(TABLES_READ)


@pytest.mark.parametrize("method", ["rescale_retrain", "lr_equivalent", "snapshot"])
def test_a_missing_method_is_named(method: str) -> None:
    tables = planted_ensembles({"rescale_retrain": 0.5})
    predictions = tables["predictions"]
    tables["predictions"] = predictions[predictions["method"] != method]
    frame = _claims(tables)
    assert _verdicts(frame) == (OPEN, OPEN, NO)
    assert _row(frame, "C", C1)["text"].startswith(f"no test predictions of {method}.")


def test_diverged_and_missing_ensembles_drop_the_pair() -> None:
    tables = planted_ensembles({"rescale_retrain": 0.8})
    predictions = tables["predictions"]
    bad = (predictions["method"] == "rescale_retrain") & (predictions["seed"] == 3)
    for name in ("nll", "nll_scaled", "error"):
        predictions[name] = predictions[name].where(~bad, None)
    gone = (
        (predictions["method"] == "snapshot") & (predictions["seed"] == 7) & (predictions["split"] == "test")
    )
    tables["predictions"] = predictions[~gone].sample(frac=1, random_state=0)
    frame = _claims(tables)
    assert _verdicts(frame) == (YES, YES, NO)
    for control, n in (("snapshot", 8), ("lr_equivalent", 9)):
        own = f"mlp: sgd: rescale_retrain (C1) - {control}, budget 3"
        row = _row(frame, "C/contrast", own, "nll: control - variant")
        assert row["n"] == n
        assert f"{10 - n} base runs left out as diverged or missing" in row["text"]
    assert "8 base runs, 2 left out as diverged or missing" in _row(frame, "C", C1)["text"]
    # Where nothing is left of a method, nothing is decided and nothing fails.
    tables["predictions"] = predictions.assign(nll=None, nll_scaled=None, error=None)
    assert _verdicts(_claims(tables)) == (OPEN, OPEN, OPEN)


def test_no_errors_leave_no_share_to_improve_by() -> None:
    tables = planted_ensembles({})
    tables["predictions"]["error"] = [np.zeros(200, dtype=np.float32)] * len(tables["predictions"])
    own = "mlp: sgd: rescale_retrain (C1) - snapshot, budget 3"
    frame = _claims(tables)
    assert _row(frame, "C/contrast", own, "error: control - variant")["estimate"] == 0
    assert np.isnan(_row(frame, "C/contrast", own, "error: relative improvement")["estimate"])


def test_another_test_split_is_refused() -> None:
    tables = planted_ensembles({}, seeds=2)
    tables["predictions"].at[0, "nll"] = np.ones(7, dtype=np.float32)
    with pytest.raises(DataError, match="'mlp: sgd' are scored on 7 and on 200 test examples"):
        _claims(tables)


def test_all_planted_methods_are_in_the_curves(won: pd.DataFrame) -> None:
    subjects = won.loc[won["claim"] == "C/budget", "subject"]
    assert {subject.split(": ")[2].split(",")[0] for subject in subjects} == set(METHODS)
