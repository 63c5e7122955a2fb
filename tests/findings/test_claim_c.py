"""Claim C on tables with a planted truth: the verdict must be the truth."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lossray.errors import DataError
from lossray.findings.bootstrap import Interval
from lossray.findings.claims import TABLES_READ, claims_of
from lossray.findings.claims_text import claims_text
from lossray.findings.ensemble_contrasts import Contrast, contrast
from lossray.findings.ensemble_scores import ensemble_cells, setting_labels
from lossray.findings.families import hommel
from lossray.findings.verdict_c import EQUIVALENT, LEAST_RUNS, MOST_RUNS, decide_overall, runs_needed
from lossray.storage.claims_tables import CLAIMS
from lossray.storage.rows import to_arrow
from lossray.study.settings import ClaimsSettings
from tests.findings.planted import in_all_gauges, planted, planted_degeneracy
from tests.findings.planted_ensembles import METHODS, Level, planted_ensembles

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

YES, NO, SAME, OPEN = "SUPPORTED", "NOT SUPPORTED", EQUIVALENT, "UNDECIDED"
BOTH_WORSE = {"rescale_retrain": 1.2, "rescale_curve": 1.2}


@pytest.mark.parametrize(
    ("levels", "verdicts", "why"),
    [
        ({"rescale_retrain": 0.8}, (YES, YES, SAME), "better than both controls at budget 1 (p = "),
        ({"rescale_retrain": {3.0: 0.8}}, (YES, YES, SAME), "better than both controls at budget 3 (p = "),
        ({"rescale_retrain": 0.97}, (YES, YES, SAME), ", though by less than 5%"),
        ({}, (SAME, SAME, SAME), "at every budget within 5% of its learning-rate control (p = "),
        (
            {"rescale_retrain": 1.2},
            (SAME, NO, SAME),
            "improvement over one of the controls is below 5% (p = ",
        ),
        (BOTH_WORSE, (NO, NO, NO), "at every budget its improvement over one of the controls is below 5%"),
        (
            {"snapshot": 1.3, "curve_lr_equivalent": 1.3},
            (SAME, SAME, NO),
            "rescaling does what a change of learning rates does, and that change is worth +2",
        ),
        ({"rescale_curve": 0.8, "rescale_retrain": 1.2}, (YES, NO, YES), "is below 5%"),
        ({"snapshot": 1.3, "lr_equivalent": {3.0: 1.3}}, (YES, YES, SAME), "both controls at budget 3 ("),
        ({"lr_equivalent": {1.0: 1.3}}, (NO, NO, SAME), "is below 5%"),
        ({"lr_equivalent": {3.0: 0.7}}, (NO, NO, SAME), "is below 5%"),
    ],
    ids=[
        "better",
        "one budget",
        "slightly",
        "equal",
        "worse",
        "both worse",
        "one control each",
        "curve",
        "controls",
        "rates worse at one budget",
        "rates better at one budget",
    ],
)
def test_planted_truth(levels: Mapping[str, Level], verdicts: tuple[str, str, str], why: str) -> None:
    frame = _claims(planted_ensembles(levels, sd=0.01))
    best = SAME if SAME in verdicts[1:] and verdicts[0] == NO else verdicts[0]
    assert _verdicts(frame) == (best, *verdicts[1:])
    assert why in _row(frame, "C", C1)["text"]
    assert not frame.duplicated(CLAIMS.keys).any()


@pytest.mark.parametrize("seeds", [1, 3, 10])
def test_a_control_that_is_the_same_to_rounding_has_its_own_word_and_its_worth(seeds: int) -> None:
    """With any number of seeds, and beside any scatter over them."""
    levels = {"snapshot": {1.0: 1.25, 3.0: 2.0}, "curve": 0.9}
    frame = _claims(planted_ensembles(levels, sd=0.05, same=ROUNDING, seeds=seeds))
    assert _verdicts(frame) == (SAME, SAME, SAME)
    for subject in (C1, C3):
        text = _row(frame, "C", subject)["text"]
        assert ", example by example, at every budget, to rounding (mean |difference| at most " in text
        assert "rescaling is a change of learning rates, and that change is worth " in text
    overall, setting = (_row(frame, "C", subject)["text"] for subject in ("overall", "mlp: sgd"))
    assert "what the change of learning rates is worth stands in the verdict on each" in overall
    own = "mlp: sgd: rescale_retrain (C1) - lr_equivalent, budget 3"
    row = _row(frame, "C/contrast", own, "nll: relative improvement")
    assert (row["verdict"], row["p_value"]) == ("the same", 1)
    assert row["text"].endswith("the same to rounding")
    for budget, truth in ((1, 0.2), (3, 0.5)):
        row = _row(frame, "C/effect", f"mlp: sgd: rescale_retrain (C1) - snapshot, budget {budget}")
        assert row["estimate"] == pytest.approx(truth, abs=0.1)
        if seeds == 10:
            assert row["low"] < truth < row["high"]
            assert row["verdict"] == "better"
            share = f"{100 * row['estimate']:+.3g}% ({100 * row['low']:+.3g} to {100 * row['high']:+.3g})"
            assert f"{share} at budget {budget}" in _row(frame, "C", C1)["text"]
            assert f"{share} at budget {budget}" in setting
    assert "over lr_equivalent" not in _row(frame, "C", C1)["text"]  # nothing to tell
    row = _row(frame, "C/effect", "mlp: sgd: rescale_curve (C3) - curve, budget 3")
    assert row["verdict"] == ("worse" if seeds == 10 else "not decided")


def test_identity_at_some_budgets_only_is_none() -> None:
    tables = planted_ensembles({}, sd=0.2, same=ROUNDING)
    rows = tables["predictions"]
    gone = (rows["method"] == "lr_equivalent") & (rows["nominal_budget"] == 3)
    assert _verdicts(_claims(tables | {"predictions": rows[~gone]}))[1] == OPEN
    changed = rows.copy()
    changed["nll"] = [1.01 * nll if drop else nll for nll, drop in zip(rows["nll"], gone, strict=True)]
    frame = _claims(tables | {"predictions": changed})
    assert "within 5% of its learning-rate control" in _row(frame, "C", C1)["text"]


def test_what_is_the_same_to_rounding_is_never_better() -> None:
    """A part in a million that is always in one's favour, and a schedule that is much worse."""
    tables = planted_ensembles({"snapshot": 2.0}, sd=0.02, same=ROUNDING)
    rows = tables["predictions"]
    own = rows["method"] == "rescale_retrain"
    rows["nll"] = [(1 - 1e-5) * nll if one else nll for nll, one in zip(rows["nll"], own, strict=True)]
    assert _verdicts(_claims(tables))[1] == SAME


@pytest.mark.parametrize("seeds", [2, 4])
def test_few_seeds_are_undecided_and_the_number_is_named(seeds: int) -> None:
    frame = _claims(planted_ensembles({"rescale_retrain": 0.5}, seeds=seeds))
    assert _verdicts(frame) == (OPEN, OPEN, OPEN)
    row = _row(frame, "C", C1)
    assert f"at least {LEAST_RUNS} seeds are needed, the fewest pairs are {seeds}" in row["text"]
    assert row["n"] == seeds
    assert _verdicts(_claims(planted_ensembles({"rescale_retrain": 0.5}, seeds=LEAST_RUNS)))[1] == YES


def test_noise_is_undecided_and_the_seeds_that_would_do_are_estimated() -> None:
    frame = _claims(planted_ensembles({"rescale_retrain": 0.9}, sd=0.25, random_seed=1))
    assert _verdicts(frame) == (OPEN, OPEN, OPEN)
    text = _row(frame, "C", C1)["text"]
    assert "neither better than both controls nor shown to fall short of 5%; about " in text
    assert 10 < int(text.split("about ")[1].split()[0]) <= MOST_RUNS
    # A margin that nobody could miss is refuted by the same numbers.
    wide = claims_of(planted_ensembles({}, sd=0.25), ClaimsSettings(margin_nll=0.9))
    assert _verdicts(wide) == (SAME, SAME, SAME)


def test_every_setting_must_agree() -> None:
    parts = [planted_ensembles({"rescale_retrain": 0.8}), planted_ensembles({}, lr=0.5, random_seed=1)]
    tables = {name: pd.concat([part[name] for part in parts]) for name in parts[0]}
    frame = _claims(tables)
    overall = _row(frame, "C", "overall")
    assert (overall["verdict"], overall["n"]) == (OPEN, 2)
    assert overall["text"].startswith(f"mlp: sgd lr=0.1: SUPPORTED; mlp: sgd lr=0.5: {SAME}; ")
    assert not frame.duplicated(CLAIMS.keys).any()
    # A setting without ensembles is named and does not count.
    tables["predictions"] = parts[0]["predictions"]
    overall = _row(_claims(tables), "C", "overall")
    assert overall["verdict"] == YES
    assert overall["text"].endswith("; no ensembles of mlp: sgd lr=0.5")
    assert decide_overall({"a": NO, "b": NO}, []).verdict == NO
    assert decide_overall({"a": NO, "b": OPEN}, []).verdict == OPEN
    assert decide_overall({"a": SAME, "b": SAME}, []).verdict == SAME
    # What equals learning rates is not better than them; but it may be, where another is open.
    assert decide_overall({"a": SAME, "b": NO}, []).verdict == NO
    assert decide_overall({"a": SAME, "b": YES}, []).verdict == OPEN
    assert decide_overall({"a": SAME, "b": NO, "c": OPEN}, []).verdict == OPEN


# ---- the numbers behind


def test_the_text_carries_the_numbers_of_every_budget(won: pd.DataFrame) -> None:
    text = _row(won, "C", C1)["text"]
    for budget, control in product((1, 3), ("snapshot", "lr_equivalent")):
        own = f"mlp: sgd: rescale_retrain (C1) - {control}, budget {budget}"
        row = _row(won, "C/contrast", own, "nll: relative improvement")
        share = f"{100 * row['estimate']:+.3g}% ({100 * row['low']:+.3g} to {100 * row['high']:+.3g})"
        assert f"{share} over {control}" in text
        assert row["low"] < 0.2 < row["high"]
    assert ". Intervals of level 95% each, 10 base runs." in text
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
    # The linear part of the ratio spreads as the ratio itself does: here over the runs, left out in turn.
    kept = [np.delete(np.arange(10), i) for i in range(10)]
    ratios = np.array([difference[own].mean() / of["snapshot"][own].mean() for own in kept])
    of_runs = 9 / 10 * np.square(ratios - ratios.mean()).sum()
    assert own.relative.stderr**2 - own.relative.floor == pytest.approx(of_runs, rel=0.1)


def test_tests_and_families(won: pd.DataFrame) -> None:
    contrasts = won[won["claim"] == "C/contrast"]
    primary = contrasts[contrasts["p_adjusted"].notna()]
    assert len(primary) == 2 * 8  # two statistics of eight contrasts
    for statistic in ("nll: relative improvement", "nll: control - variant"):
        family = primary[primary["statistic"] == statistic]
        assert family["p_adjusted"].to_numpy() == pytest.approx(hommel(family["p_value"]))
        assert family["text"].str.contains("Hommel over 8 contrasts").all()
        assert ((family["p_value"] < 0.05) == (family["low"] * family["high"] > 0)).all()
    t = family["estimate"] / ((family["high"] - family["low"]) / 2 / stats.t.ppf(0.975, 9))
    assert family["p_value"].to_numpy() == pytest.approx(2 * stats.t.sf(t.abs(), 9))
    assert (primary["verdict"] == "better").sum() == 2 * 4
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
    own = Interval(estimate, estimate - 3 * stderr, estimate + 3 * stderr, stderr, floor, n - 1)
    return Contrast("a", "b", 1.0, "nll", n, 0, 1.0, own, own, 1.0)


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
    assert _verdicts(frame) == (OPEN, OPEN, SAME)
    assert _row(frame, "C", C1)["text"].startswith(f"no test predictions of {method}.")


def _diverged(tables: Tables, method: str, seeds: Sequence[int], budget: float) -> Tables:
    """With null scores, as ensembles that diverged have."""
    predictions = tables["predictions"].copy()
    own = (predictions["method"] == method) & predictions["seed"].isin(seeds)
    own &= predictions["nominal_budget"] == budget
    for name in ("nll", "nll_scaled", "error"):
        predictions[name] = predictions[name].where(~own, None)
    return tables | {"predictions": predictions}


def test_diverged_and_missing_ensembles_drop_the_pair_and_are_named() -> None:
    tables = planted_ensembles({"rescale_retrain": 0.8})
    for budget in (1.0, 3.0):
        tables = _diverged(tables, "rescale_retrain", [3], budget)
    predictions = tables["predictions"]
    gone = (
        (predictions["method"] == "snapshot") & (predictions["seed"] == 7) & (predictions["split"] == "test")
    )
    tables["predictions"] = predictions[~gone].sample(frac=1, random_state=0)
    frame = _claims(tables)
    assert _verdicts(frame) == (YES, YES, SAME)
    for control, n in (("snapshot", 8), ("lr_equivalent", 9)):
        own = f"mlp: sgd: rescale_retrain (C1) - {control}, budget 3"
        row = _row(frame, "C/contrast", own, "nll: control - variant")
        assert row["n"] == n
        assert f"{10 - n} base runs left out as diverged or missing" in row["text"]
    text = _row(frame, "C", C1)["text"]
    assert "each, 8 to 9 base runs. Diverged or missing, and left out: " in text
    assert "rescale_retrain at budget 3 in 1 of 10 base runs (run-0.1-3)" in text
    assert "snapshot at budget 1 in 1 of 10 base runs (run-0.1-7)" in text
    assert "left out" not in _row(frame, "C", C3)["text"]
    # Where nothing is left of a method, nothing is decided and nothing fails.
    tables["predictions"] = predictions.assign(nll=None, nll_scaled=None, error=None)
    assert _verdicts(_claims(tables)) == (OPEN, OPEN, OPEN)


@pytest.mark.parametrize("same", [None, ROUNDING])
@pytest.mark.parametrize("method", ["rescale_retrain", "snapshot", "lr_equivalent"])
def test_a_method_that_is_mostly_lost_is_undecided(method: str, same: dict[str, str] | None) -> None:
    tables = planted_ensembles({"rescale_retrain": 0.5, "rescale_curve": 1.3}, seeds=12, same=same)
    half = _claims(_diverged(tables, method, range(6), 3.0))
    assert _verdicts(half)[1] == (SAME if same else YES)
    most = _claims(_diverged(tables, method, range(7), 3.0))
    assert _verdicts(most)[:2] == (OPEN, OPEN)
    text = _row(most, "C", C1)["text"]
    assert text.startswith(f"most base runs have no {method} at budget 3.")
    assert f"{method} at budget 3 in 7 of 12 base runs (run-0.1-0, run-0.1-1, " in text
    assert "and 2 more)" in text
    assert f"(most base runs have no {method} at budget 3)" in _row(most, "C", "mlp: sgd")["text"]


def test_methods_with_different_budgets_are_compared_where_both_are() -> None:
    tables = planted_ensembles({"rescale_retrain": 0.8}, sd=0.01)
    rows = tables["predictions"]
    for gone, verdict in ((["snapshot", "lr_equivalent"], YES), (["snapshot"], YES), (METHODS, YES)):
        kept = rows[~(rows["method"].isin(gone) & (rows["nominal_budget"] == 1))]
        frame = _claims(tables | {"predictions": kept})
        assert _verdicts(frame)[1] == verdict
        assert "better than both controls at budget 3 (p = " in _row(frame, "C", C1)["text"]
    disjoint = rows[(rows["nominal_budget"] == 1) == (rows["method"].isin(["rescale_retrain"]))]
    text = _row(_claims(tables | {"predictions": disjoint}), "C", C1)["text"]
    assert text.startswith("no budget at which a control is there as well")


def test_without_any_error_nothing_is_decided() -> None:
    tables = planted_ensembles({})
    tables["predictions"]["nll"] = [np.zeros(200, dtype=np.float32)] * len(tables["predictions"])
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
