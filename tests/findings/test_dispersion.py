"""Is SGD's angle less regular than every adaptive method's: on planted tables, and by hand."""

import numpy as np
import pandas as pd
import pytest

from lossray.findings.claims import claims_of
from lossray.findings.claims_text import claims_text
from lossray.findings.dispersion import FACTOR, Spreads, log_spreads, word_of
from lossray.study.settings import ClaimsSettings
from tests.findings.planted import ADAPTIVE, in_all_gauges, planted

Tables = dict[str, pd.DataFrame]
CHECKPOINTS = (1, 10, 100, 1000, 10_000)


def _tables(spread: dict[str, float], *, seeds: int = 10, random_seed: int = 0) -> Tables:
    """Runs whose S has that standard deviation over five checkpoints, 0.2 where none is given."""
    tables = planted(in_all_gauges(0.05), seeds=seeds)
    rng = np.random.default_rng(random_seed)
    own = tables["alignment"]
    own = own[(own["direction"] == "update") & (own["gauge"] == "raw") & (own["subspace"] == "v1")]
    first = own.drop_duplicates("run_id")
    optimizer = first["run_id"].str.split("-").str[1]
    rows = []
    for step in CHECKPOINTS:
        scatter = rng.normal(size=len(first)) * optimizer.map(spread).fillna(0.2)
        rows.append(first.assign(step=step, log_energy=-3.0 + scatter))
    points = tables["checkpoints"].drop_duplicates("run_id")
    losses = [points.assign(step=step, train_loss=1 / step) for step in CHECKPOINTS]
    return tables | {"alignment": pd.concat(rows), "checkpoints": pd.concat(losses)}


def _claims(tables: Tables) -> pd.DataFrame:
    return claims_of(tables, ClaimsSettings())


def _overall(frame: pd.DataFrame) -> pd.Series:
    rows = frame[(frame["claim"] == "A") & (frame["subject"] == "dispersion")]
    assert len(rows) == 1
    return rows.iloc[0]


def _model(frame: pd.DataFrame, subject: str = "mlp") -> pd.Series:
    return frame[(frame["claim"] == "A/dispersion") & (frame["subject"] == subject)].iloc[0]


@pytest.mark.parametrize(
    ("spread", "verdict"),
    [
        ({"sgd": 1.0}, "SUPPORTED"),
        ({"sgd": 1.0, "rmsprop": 1.5}, "NOT SUPPORTED"),  # one method is as irregular
        ({"sgd": 0.15}, "NOT SUPPORTED"),
        ({"sgd": 0.2 * FACTOR}, "UNDECIDED"),  # at the boundary
    ],
    ids=["true", "but one", "reversed", "boundary"],
)
def test_planted_truth(spread: dict[str, float], verdict: str) -> None:
    frame = _claims(_tables(spread, seeds=14, random_seed=2))
    assert _overall(frame)["verdict"] == verdict
    assert f"mlp: by itself {verdict} (adagrad " in _overall(frame)["text"]
    assert _model(frame)["verdict"] == verdict
    assert ("seeds would decide" in _model(frame)["text"]) == (verdict == "UNDECIDED")
    assert f"{verdict}: SGD's angle follows no such rule" in claims_text(frame)
    assert not frame.duplicated(["claim", "subject", "statistic"]).any()


def test_the_methods_rows_name_who_is_more_regular() -> None:
    frame = _claims(_tables({"sgd": 1.0, "adagrad": 4.0}))
    own = frame[frame["claim"] == "A/dispersion"].set_index(["subject", "statistic"])
    words = {
        name: own.loc[
            (f"mlp: {name} - sgd, update, raw", "difference of ln SD of S over checkpoints"), "verdict"
        ]
        for name in ADAPTIVE
    }
    assert words == {
        "adam": "more regular than sgd",
        "rmsprop": "more regular than sgd",
        "adagrad": "not more regular than sgd",
    }


def test_a_common_course_is_scatter_over_checkpoints_but_not_about_the_course() -> None:
    """SGD's S rises by 3 in every seed; what remains is as large as the others'."""
    tables = _tables({})
    alignment = tables["alignment"]
    sgd = alignment["run_id"].str.contains("sgd")
    alignment["log_energy"] += 0.3 * np.log(alignment["step"]) * sgd
    frame = _claims(tables)
    assert _overall(frame)["verdict"] == "SUPPORTED"
    own = frame[frame["subject"] == "mlp: adam - sgd, update, raw"].set_index("statistic")["estimate"]
    assert own["difference of ln SD of S over checkpoints"] < -1
    assert abs(own["difference of ln SD of S about the course of the other seeds"]) < 0.4


def test_only_resolved_v1_of_the_raw_update_after_step_0_counts() -> None:
    tables = _tables({"sgd": 1.0})
    alignment = tables["alignment"]
    rng = np.random.default_rng(1)
    wild = alignment.assign(log_energy=rng.normal(0, 9, size=len(alignment)))
    others = [
        wild.assign(direction="minibatch_gradient"),
        wild.assign(gauge="adaptive"),
        wild.assign(subspace="top10"),
        wild.assign(step=0),
        wild.assign(step=77, resolved=None),
    ]
    plain = _model(_claims(tables))
    again = _model(_claims(tables | {"alignment": pd.concat([alignment, *others])}))
    assert (again["verdict"], again["text"]) == (plain["verdict"], plain["text"])


# ---- what is lost


def test_a_method_that_diverged_is_named_and_most_lost_is_undecided() -> None:
    for lost, verdict in ((10, "UNDECIDED"), (6, "UNDECIDED"), (3, "SUPPORTED")):
        tables = _tables({"sgd": 1.0})
        runs = tables["runs"]
        gone = (runs["optimizer"] == "rmsprop") & (runs["seed"] < lost)
        runs.loc[gone, ["status", "train_loss", "validation_loss"]] = ["diverged", np.nan, np.nan]
        row = _model(_claims(tables))
        assert row["verdict"] == verdict
        assert f"seeds lost: rmsprop {lost} of 10" in row["text"]
        assert ("too many" in row["text"]) == (verdict == "UNDECIDED")


def test_survivors_refute_nothing() -> None:
    """The four of ten runs of adam that are left scatter more than SGD's."""
    tables = _tables({"sgd": 1.0, "adam": 4.0})
    assert _overall(_claims(tables))["verdict"] == "NOT SUPPORTED"
    runs = tables["runs"]
    runs.loc[(runs["optimizer"] == "adam") & (runs["seed"] < 6), "status"] = "diverged"
    assert _overall(_claims(tables))["verdict"] == "UNDECIDED"


def test_one_seed_is_undecided() -> None:
    row = _model(_claims(_tables({"sgd": 1.0}, seeds=1)))
    assert row["verdict"] == "UNDECIDED"
    assert "more than 1000 seeds, or other runs" in row["text"]


def test_what_cannot_be_judged_is_named() -> None:
    tables = _tables({"sgd": 1.0})
    alignment, runs = tables["alignment"], tables["runs"]
    few = tables | {"alignment": alignment[alignment["step"] <= 10]}
    assert "not judged (fewer than 3 checkpoints after step 0)" in _overall(_claims(few))["text"]
    plain = tables | {"alignment": alignment[~alignment["run_id"].str.contains("sgd")]}
    assert "not judged (no resolved S of sgd)" in _overall(_claims(plain))["text"]
    other = tables | {"runs": runs.assign(adaptive=False)}
    assert "not judged (no adaptive method)" in _overall(_claims(other))["text"]
    settings = runs["model_settings"].str.replace("32", "64")
    two = runs.assign(run_id="other-" + runs["run_id"], model_settings=settings)
    row = _overall(_claims(tables | {"runs": pd.concat([runs, two])}))
    assert (row["verdict"], row["n"]) == ("SUPPORTED", 1)
    assert "mlp widths=64: not judged" in row["text"]
    assert {_overall(_claims(own))["verdict"] for own in (few, plain, other)} == {"UNDECIDED"}


def test_a_method_whose_s_does_not_scatter_is_missing() -> None:
    tables = _tables({"sgd": 1.0, "adam": 0.0})
    row = _model(_claims(tables))
    assert row["verdict"] == "UNDECIDED"
    assert "adam 10 of 10" in row["text"]


# ---- by hand


def test_spreads_are_over_the_common_checkpoints() -> None:
    nan = np.nan
    energies = np.array([[1.0, 5.0, nan, 2.0, 4.0], [1.0, nan, nan, nan, 4.0]])
    baseline = np.array([[nan, 1.0, 2.0, 3.0, 8.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    expected = np.log(np.std([5, 2, 4]) / np.std([1, 3, 8]))
    np.testing.assert_allclose(log_spreads(energies, baseline), [expected, nan])
    assert np.isnan(log_spreads(np.full((1, 4), 0.1 + 0.2), np.arange(4.0)[None])).all()


@pytest.mark.parametrize("checkpoints", [3, 12])
@pytest.mark.parametrize("skewed", [False, True])
def test_size_over_two_models_at_the_boundary(checkpoints: int, skewed: bool) -> None:
    """Four methods at SGD's spread over FACTOR: neither word in more than 5%, three standard errors more."""
    rng = np.random.default_rng(2)
    scale = np.array([1, 1, 1, 1, FACTOR])[:, None, None]
    words = []
    for _ in range(300):
        models = []
        for _ in range(2):
            normal = rng.normal(size=(5, 10, checkpoints))
            s = scale * (np.log(np.square(normal)) if skewed else normal)
            differences = log_spreads(s[:-1], s[-1])
            models.append(Spreads("mlp", tuple("abcd"), np.full(4, 10), differences, differences))
        words.append(word_of(models, 0.05))
    for word in ("SUPPORTED", "NOT SUPPORTED"):
        assert np.mean(np.array(words) == word) < 0.05 + 3 * np.sqrt(0.05 / 300)
