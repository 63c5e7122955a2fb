"""Intervals over runs and examples: their variance in closed form, their size, and their p values."""

import math
import os

import numpy as np
import pytest
from scipy import stats

from lossray.findings.bootstrap import (
    RESAMPLES,
    Interval,
    covariance_parts,
    example_resamples,
    t_interval,
)
from lossray.findings.sign_flips import sign_flip_test

DRAWS, RUNS, EXAMPLES = 2000, 10, 40


def _rng(purpose: int) -> np.random.Generator:
    return np.random.default_rng([int(os.environ.get("LOSSRAY_TEST_SEED", "0")), purpose])


def _effects(
    purpose: int,
    a: float,
    b: float,
    c: float,
    *,
    draws: int = DRAWS,
    runs: int = RUNS,
    examples: int = EXAMPLES,
) -> np.ndarray:
    """Random-effects matrices [draws, runs, examples] of mean 0; a, b, c: variances of the effects."""
    rng = _rng(purpose)
    run = math.sqrt(a) * rng.normal(size=(draws, runs, 1))
    example = math.sqrt(b) * rng.normal(size=(draws, 1, examples))
    return run + example + math.sqrt(c) * rng.normal(size=(draws, runs, examples))


def _variances(by_run: np.ndarray) -> tuple[float, float]:
    of_runs, of_examples = covariance_parts(by_run[None])
    return of_runs.item(), of_examples.item()


def test_variance_is_the_closed_form() -> None:
    """Of given scores: of row means; and of column means less the interaction's part of it."""
    (scores,) = _effects(1, 1.0, 10.0, 20.0, draws=1, runs=6, examples=30)
    n, n_examples = scores.shape
    rows, columns = scores.mean(axis=1), scores.mean(axis=0)
    interaction = scores - rows[:, None] - columns + scores.mean()
    mean_square = np.square(interaction).sum() / ((n - 1) * (n_examples - 1))
    of_runs, of_examples = _variances(example_resamples(scores, resamples=40_000))
    assert of_runs == pytest.approx(rows.var(ddof=1) / n, rel=0.01)
    assert of_examples == pytest.approx(
        columns.var(ddof=1) / n_examples - mean_square / (n * n_examples), rel=0.05
    )


@pytest.mark.parametrize(("a", "b", "c"), [(0.5, 2.0, 40.0), (0.0, 1.0, 0.0), (0.3, 0.5, 3.0)])
def test_variance_of_random_effects_is_unbiased(a: float, b: float, c: float) -> None:
    scores = _effects(2, a, b, c, draws=1000)
    parts = np.array([_variances(own) for own in example_resamples(scores, resamples=300)])
    # The examples' part cannot be negative, which adds a little where the interaction dominates.
    expected = a / RUNS + b / EXAMPLES + c / (RUNS * EXAMPLES)
    assert parts.sum(axis=1).mean() == pytest.approx(expected, rel=0.06)
    assert parts[:, 1].mean() == pytest.approx(b / EXAMPLES, rel=0.1)
    assert scores.mean(axis=(1, 2)).var() == pytest.approx(expected, rel=0.2)


def test_covariances_are_those_of_sums_and_never_negative() -> None:
    first, second = example_resamples(_effects(11, 1.0, 3.0, 2.0, draws=2), resamples=500)
    (rr, rs), (_, ss) = covariance_parts(np.stack([first, second]))[0]
    assert _variances(first + 2 * second)[0] == pytest.approx(rr + 4 * rs + 4 * ss)
    noise = example_resamples(_effects(12, 1.0, 0.0, 30.0, draws=100), resamples=100)
    for one, other in zip(noise[:50], noise[50:], strict=True):
        assert np.linalg.eigvalsh(covariance_parts(np.stack([one, other]))[1]).min() > -1e-12


def test_resamples_are_the_same_for_every_row_and_call_and_missing_rows_stay_missing() -> None:
    scores = _effects(3, 1.0, 1.0, 1.0, draws=3)
    scores[1, 4] = np.nan
    drawn = example_resamples(scores)
    assert drawn.shape == (3, RUNS, RESAMPLES)
    np.testing.assert_allclose(example_resamples(scores[2, 5]), drawn[2, 5], atol=1e-12)
    assert np.isnan(drawn).all(axis=-1).sum() == np.isnan(drawn).any(axis=-1).sum() == 1
    np.testing.assert_allclose(example_resamples(np.full((2, 7), 3.0)), 3.0)
    assert _variances(np.full((5, 20), 3.0)) == (0.0, 0.0)


def test_resamples_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = _effects(4, 1.0, 1.0, 1.0, draws=1)[0]
    whole = example_resamples(scores, resamples=101)
    monkeypatch.setattr("lossray.findings.bootstrap.AT_ONCE", 200)
    np.testing.assert_allclose(example_resamples(scores, resamples=101), whole, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.05, 0.05 / 6])
@pytest.mark.parametrize(
    ("a", "b", "c"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.05, 0.05, 1.0)]
)
def test_size(a: float, b: float, c: float, alpha: float) -> None:
    """How often the interval misses a true mean of 0; half as often on either side."""
    scores = _effects(5, a, b, c)
    by_run = example_resamples(scores, resamples=500)
    found = [
        t_interval(float(own.mean()), drawn, alpha=alpha) for own, drawn in zip(scores, by_run, strict=True)
    ]
    slack = 4 * math.sqrt(alpha * (1 - alpha) / DRAWS)
    missed = np.mean([one.low > 0 or one.high < 0 for one in found])
    assert missed <= alpha + slack + 0.1 * alpha  # the standard error of 500 resamples adds to the misses
    assert np.mean([one.low > 0 for one in found]) <= alpha / 2 + slack
    if b == 0.0:
        assert missed >= 0.7 * alpha - slack  # of runs alone, and of interaction alone, it is Student's t


def test_of_runs_alone_it_is_students_t_interval() -> None:
    values = _rng(6).normal(size=(RUNS, 1))
    found = t_interval(float(values.mean()), np.repeat(values, 40_000, axis=1), alpha=0.01)
    exact = stats.ttest_1samp(values[:, 0], 0.0).confidence_interval(0.99)
    assert found.low == pytest.approx(exact.low, abs=0.05 * found.stderr * 3)
    assert found.high == pytest.approx(exact.high, abs=0.05 * found.stderr * 3)


def test_fewer_than_two_runs_have_no_interval_and_equal_scores_one_without_width() -> None:
    for n in (0, 1):
        found = t_interval(1.5, np.ones((n, 10)), alpha=0.05)
        assert found.estimate == 1.5
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    found = t_interval(2.0, np.full((5, 10), 2.0), alpha=0.05)
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_the_test_splits_part_of_the_variance() -> None:
    scores = _effects(7, 1.0, 4.0, 9.0, draws=500)
    floors = [t_interval(0.0, own, alpha=0.05).floor for own in example_resamples(scores, resamples=300)]
    assert np.mean(floors) == pytest.approx(4.0 / EXAMPLES, rel=0.1)
    without = example_resamples(_effects(8, 1.0, 0.0, 9.0, draws=200), resamples=300)
    assert np.mean([t_interval(0.0, own, alpha=0.05).floor for own in without]) < 0.02


def test_p_values_are_those_of_the_interval() -> None:
    (scores,) = _effects(9, 1.0, 1.0, 1.0, draws=1)
    found = t_interval(float(scores.mean()), example_resamples(scores), alpha=0.02)
    assert found.freedom == RUNS - 1
    assert found.p_below(found.high) == found.p_above(found.low) == pytest.approx(0.01)
    assert found.p_differs(found.high) == found.p_differs(found.low) == pytest.approx(0.02)
    assert found.p_above(found.estimate) == pytest.approx(0.5)
    assert found.p_above(found.low) + found.p_below(found.low) == pytest.approx(1)
    for unknown in (t_interval(1.0, np.ones((1, 5)), alpha=0.1), Interval(math.nan, 0.0, 0.0, 1.0)):
        assert unknown.p_above(0.0) == unknown.p_below(0.0) == unknown.p_differs(0.0) == 1
    certain = t_interval(2.0, np.full((4, 5), 2.0), alpha=0.1)
    assert (certain.p_above(1.0), certain.p_below(1.0), certain.p_above(2.0)) == (0, 1, 1)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("runs", [5, 10, 20])
def test_a_true_null_over_splits_and_runs(runs: int, heavy: bool) -> None:
    """All runs share a split whose examples differ: the p value carries that, sign flips over runs do not."""
    rng = _rng(10 + runs)
    draws = 400
    of_examples = rng.normal(size=(draws, 1, EXAMPLES))
    if heavy:
        of_examples *= rng.lognormal(0, 1, size=of_examples.shape)
    scores = of_examples + rng.normal(size=(draws, runs, 1)) / 10 + rng.normal(size=(draws, runs, EXAMPLES))
    drawn = example_resamples(scores, resamples=300)
    p = np.array(
        [
            t_interval(float(x.mean()), own, alpha=0.05).p_differs(0.0)
            for x, own in zip(scores, drawn, strict=True)
        ]
    )
    assert (p < 0.05).mean() <= 0.06
    if runs > 5:  # which give at least 2/2^5
        assert (sign_flip_test(scores.mean(axis=2)) < 0.05).mean() > 0.4
