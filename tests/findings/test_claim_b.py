"""Claim B on tables with a planted truth: three statements, one verdict each."""

import numpy as np
import pandas as pd
import pytest

from lossray.findings.claim_b import LOW_RANK, NullityCount, _low_rank_word
from lossray.findings.claims import claims_of
from lossray.study.settings import ClaimsSettings
from tests.findings.planted import in_all_gauges, planted, planted_degeneracy

SETTINGS = ClaimsSettings()
EXACT, BEYOND, LOW = "exactly singular", "singular beyond symmetry", "effectively low rank"


@pytest.fixture(scope="module")
def runs() -> pd.DataFrame:
    return planted(in_all_gauges(0.01), seeds=6)["runs"]


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
    assert _verdict(frame, BEYOND)["n"] == 6  # seeds


def test_without_a_gap_nothing_is_singular_nor_regular(runs: pd.DataFrame) -> None:
    frame = _frame(runs, planted_degeneracy(runs, excess=12, share=0.02, gap=False))
    for statement in (EXACT, BEYOND):
        row = _verdict(frame, statement)
        assert (row["verdict"], row["estimate"], row["low"], row["high"]) == ("UNDECIDED", 0, 0, 1)
        assert f"({len(runs)} cannot be told)" in row["text"]


def test_one_run_is_undecided(runs: pd.DataFrame) -> None:
    few = runs.iloc[:1]
    frame = _frame(few, planted_degeneracy(few, excess=12, share=0.02))
    assert _verdict(frame, EXACT)["verdict"] == "UNDECIDED"
    assert "1 seeds (at least 6 are needed)" in _verdict(frame, EXACT)["text"]
    assert "at least two seeds" in _verdict(frame, LOW)["text"]


def test_first_and_last_checkpoints_are_shown_apart(runs: pd.DataFrame) -> None:
    frame = _frame(runs, planted_degeneracy(runs, excess=12, share=0.02))
    own = frame[frame["claim"] == f"B/{BEYOND}"].set_index("subject")
    assert own.loc["mlp: adam, first checkpoint", "estimate"] == 0
    assert own.loc["mlp: adam, last checkpoint", "estimate"] == 1
    assert own.loc["mlp: adam, last checkpoint", "low"] == pytest.approx(0.025 ** (1 / 6))
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
    bias = own.loc[("mlp: hessian, quadrature", "bias of the share below 0.01 |lambda|max"), "estimate"]
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
    row = _verdict(_frame(some, degeneracy), BEYOND)
    assert row["text"].startswith(f"{len(runs) - 2} of {len(runs) - 2} runs")
    assert "1 diverged or failed runs are left out" in row["text"]


def test_mse_does_not_force_anything(runs: pd.DataFrame) -> None:
    frame = _frame(runs.assign(loss="mse"), planted_degeneracy(runs, excess=12, share=0.02))
    assert "forced" not in _verdict(frame, EXACT)["text"]


# ---- the seed is the unit


def test_runs_of_one_seed_are_one_observation() -> None:
    """All of 160 runs say yes: of ten seeds they decide, of five or one they do not."""
    for seeds, verdict in ((10, "SUPPORTED"), (6, "SUPPORTED"), (5, "UNDECIDED"), (1, "UNDECIDED")):
        runs = np.full(seeds, 16)
        assert NullityCount(runs, 0 * runs, runs).verdict(0.05) == verdict
        against = "NOT SUPPORTED" if verdict == "SUPPORTED" else "UNDECIDED"
        assert NullityCount(0 * runs, 0 * runs, runs).verdict(0.05) == against
    assert NullityCount(160, 0, 160).verdict(0.05) == "UNDECIDED"  # one seed
    assert NullityCount(np.array([]), np.array([]), np.array([])).verdict(0.05) == "UNDECIDED"


def test_unknown_runs_count_against_the_word_that_is_tested() -> None:
    runs = np.full(12, 8)
    for yes, unknown, verdict in ((8, 0, "SUPPORTED"), (5, 3, "UNDECIDED"), (0, 2, "NOT SUPPORTED")):
        count = NullityCount(np.full(12, yes), np.full(12, unknown), runs)
        assert count.verdict(0.05) == verdict
        low, high = count.interval(0.05)
        assert (low > 0.5, high < 0.5) == (verdict == "SUPPORTED", verdict == "NOT SUPPORTED")
    assert NullityCount(0 * runs, runs, runs).interval(0.05) == (0, 1)


@pytest.mark.parametrize("seeds", [5, 10, 20])
@pytest.mark.parametrize("icc", [0.0, 0.3, 1.0])
def test_size_of_the_verdict_on_runs_that_share_seeds(seeds: int, icc: float) -> None:
    """Half of all runs say yes: either word in at most 5% (2.5% each), three standard errors more."""
    rng = np.random.default_rng(seeds)
    n = np.full(seeds, 9)
    words = []
    for _ in range(400):
        by_seed = np.where(
            rng.random((seeds, 9)) < icc, rng.random((seeds, 1)) < 0.5, rng.random((seeds, 9)) < 0.5
        )
        words.append(NullityCount(by_seed.sum(axis=1), 0 * n, n).verdict(0.05))
    assert np.mean(np.array(words) != "UNDECIDED") < 0.05 + 3 * np.sqrt(0.05 / 400)


def test_unequal_numbers_of_runs_count_by_seed(runs: pd.DataFrame) -> None:
    """Nine of ten runs say yes, but all of them are of one seed."""
    many = pd.concat([runs.assign(run_id=f"{copy}-" + runs["run_id"]) for copy in range(4)])
    lopsided = many[(many["seed"] == 0) | many["run_id"].str.startswith("0-(32,)-sgd")]
    degeneracy = planted_degeneracy(lopsided, excess=12, share=0.02)
    no = degeneracy["run_id"].isin(lopsided.loc[lopsided["seed"] > 0, "run_id"]) & (degeneracy["step"] > 0)
    degeneracy.loc[no, "excess"] = 0.0
    row = _verdict(_frame(lopsided, degeneracy), BEYOND)
    assert (row["n"], row["estimate"], row["verdict"]) == (6, pytest.approx(1 / 6), "UNDECIDED")
    assert row["text"].startswith("20 of 25 runs")


def test_runs_without_a_seed_are_one_seed(runs: pd.DataFrame) -> None:
    frame = _frame(runs.assign(seed=None), planted_degeneracy(runs, excess=12, share=0.02))
    assert _verdict(frame, BEYOND)["n"] == 1
    assert {_verdict(frame, name)["verdict"] for name in (EXACT, BEYOND, LOW)} == {"UNDECIDED"}


# ---- low rank over cells


def _models(runs: pd.DataFrame, widths: tuple[int, ...]) -> pd.DataFrame:
    """SGD's runs, of several models."""
    own = runs[runs["optimizer"] == "sgd"]
    return pd.concat(
        own.assign(
            run_id=f"{width}-" + own["run_id"],
            model_settings=own["model_settings"].str.replace("32", str(width)),
            n_params=75 * width + 10,
        )
        for width in widths
    )


def test_low_rank_counts_seeds_not_runs(runs: pd.DataFrame) -> None:
    """Shares that the seed decides, 28 runs of each: six values, not 168."""
    rng = np.random.default_rng(5)
    by_seed = rng.normal(0.095, 0.012, size=6)
    many = pd.concat([runs.assign(run_id=f"{copy}-" + runs["run_id"]) for copy in range(6)])
    degeneracy = planted_degeneracy(many, excess=0, share=0.02)
    seeds = degeneracy["run_id"].map(dict(zip(many["run_id"], many["seed"], strict=True))).to_numpy(int)
    high = degeneracy["tau"] == 1e-2
    degeneracy.loc[high, "nullity"] = degeneracy["dim"] * (1 - by_seed[seeds])
    frame = _frame(many, degeneracy)
    assert _verdict(frame, LOW)["verdict"] == "UNDECIDED"
    cell = frame[(frame["claim"] == f"B/{LOW}") & (frame["subject"] == "mlp: hessian")].iloc[0]
    assert (cell["n"], cell["estimate"]) == (6, pytest.approx(by_seed.mean()))


def test_the_family_word() -> None:
    above = np.array([0.02, 0.5, 0.6, 0.7])
    assert _low_rank_word(1 - above, above, 0.05) == "UNDECIDED"  # 4 x 0.02
    assert _low_rank_word(0.98, 0.02, 0.05) == "NOT SUPPORTED"
    assert _low_rank_word(1 - above, above / 4, 0.05) == "NOT SUPPORTED"
    assert _low_rank_word(np.array([0.04, 0.01]), np.array([0.96, 0.99]), 0.05) == "SUPPORTED"
    assert _low_rank_word(np.array([0.04, 0.06]), np.array([0.96, 0.94]), 0.05) == "UNDECIDED"


def test_every_model_needs_both_metrics(runs: pd.DataFrame) -> None:
    two = _models(runs, (16, 64))
    degeneracy = planted_degeneracy(two, excess=0, share=LOW_RANK / 5)
    assert _verdict(_frame(two, degeneracy), LOW)["verdict"] == "SUPPORTED"
    lacking = degeneracy["run_id"].str.startswith("64-") & (degeneracy["operator"] == "adaptive")
    row = _verdict(_frame(two, degeneracy[~lacking]), LOW)
    assert row["verdict"] == "UNDECIDED"
    assert "no counts of the operator adaptive of every model" in row["text"]
    only = _verdict(_frame(two, degeneracy[degeneracy["run_id"].str.startswith("16-")]), LOW)
    assert only["text"].endswith("no counts of mlp widths=64")


# ---- what is said


def test_medians_are_within_one_network_and_the_examples_are_named(runs: pd.DataFrame) -> None:
    two = _models(runs, (8, 40))
    degeneracy = planted_degeneracy(two, excess=4, share=0.02, floor=30)
    degeneracy.loc[degeneracy["run_id"].str.startswith("40-"), ["nullity", "structural_nullity"]] += 100
    for statement, medians in ((EXACT, ("34", "134")), (BEYOND, ("4", "4"))):
        text = _verdict(_frame(two, degeneracy), statement)["text"]
        assert f"{medians[0]} of 610 in mlp widths=8, {medians[1]} of 3010 in mlp widths=40" in text
        assert "the Hessian is that of the 512 examples of the analysis set" in text
    assert "given the trained gates" in text
    old = degeneracy.drop(columns=["n_examples", "structural_nullity"])  # tables of an older lossray
    assert "the Hessian is that of the analysis set" in _verdict(_frame(two, old), EXACT)["text"]
    some = degeneracy[degeneracy["run_id"].str.startswith("8-")]
    assert "no dense spectrum of mlp widths=40" in _verdict(_frame(two, some), EXACT)["text"]


def test_the_rise_of_the_nullity_by_optimizer(runs: pd.DataFrame) -> None:
    """Adam's rises by 9 more than the others', of which 6 are forced."""
    degeneracy = planted_degeneracy(runs, excess=0, share=0.02, floor=40)
    adam = degeneracy["run_id"].str.contains("adam") & (degeneracy["step"] > 0) & degeneracy["at_noise_floor"]
    degeneracy.loc[adam, "nullity"] += 9.0
    degeneracy.loc[adam, "structural_nullity"] += 6
    frame = _frame(runs, degeneracy)
    own = frame[frame["claim"] == "B/nullity"].set_index(["subject", "statistic"])
    rise = own.loc[("mlp: adam", "rise of nullity, first to last checkpoint")]
    assert (rise["estimate"], rise["n"]) == (9, 6)
    assert "step 0 to 1000: 40 to 49 of 2410" in rise["text"]
    assert "67% of the rise is forced" in rise["text"]
    assert own.loc[("mlp: adam", "rise of structural_nullity, first to last checkpoint"), "estimate"] == 6
    assert own.loc[("mlp: sgd", "rise of nullity, first to last checkpoint"), "estimate"] == 0
    contrast = own.loc[("mlp: adam - sgd", "difference of the rise of nullity")]
    assert (contrast["estimate"], contrast["p_value"]) == (9, 2 / 2**6)
    # Four contrasts of six seeds cannot be significant together.
    assert (contrast["p_adjusted"], contrast["verdict"]) == (8 / 2**6, "no significant difference")


def test_rates_that_were_only_tried_are_not_lost(runs: pd.DataFrame) -> None:
    own = runs[runs["optimizer"] != "rmsprop"]
    degeneracy = planted_degeneracy(own, excess=12, share=0.02)
    tried = own.assign(run_id="x" + own["run_id"], setting_id="x" + own["setting_id"], status="diverged")
    row = _verdict(_frame(pd.concat([own, tried]), degeneracy), EXACT)
    assert "diverged or failed" not in row["text"]
    hopeless = runs[runs["optimizer"] == "rmsprop"].assign(status="diverged")
    row = _verdict(_frame(pd.concat([own, tried, hopeless]), degeneracy), EXACT)
    assert f"{len(hopeless)} diverged or failed runs are left out" in row["text"]
