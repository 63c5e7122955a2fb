"""The two-way bootstrap: against its closed form, its size, and what the test split leaves over."""

import math
import os

import numpy as np
import pytest
from scipy import stats

from lossray.findings.bootstrap import (
    RESAMPLES,
    example_resamples,
    example_variance,
    run_resamples,
    t_interval,
)

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


def test_variance_is_the_closed_form() -> None:
    """Of given scores: those of row means and column means over their numbers, and the interaction's."""
    (scores,) = _effects(1, 1.0, 10.0, 20.0, draws=1, runs=6, examples=30)
    n, n_examples = scores.shape
    rows, columns = scores.mean(axis=1), scores.mean(axis=0)
    interaction = scores - rows[:, None] - columns + scores.mean()
    expected = (
        rows.var(ddof=1) / n
        + columns.var(ddof=1) / n_examples
        + np.square(interaction).sum() / ((n - 1) * (n_examples - 1)) / (n * n_examples)
    )
    drawn = run_resamples(example_resamples(scores, resamples=40_000))
    assert drawn.var() == pytest.approx(expected, rel=0.05)
    assert drawn.mean() == pytest.approx(scores.mean(), abs=5 * math.sqrt(expected / 40_000))


def test_variance_of_random_effects_is_conservative_by_the_interaction_alone() -> None:
    a, b, c = 0.5, 2.0, 40.0
    scores = _effects(2, a, b, c, draws=1000)
    drawn = run_resamples(example_resamples(scores, resamples=300)).var(axis=-1).mean()
    assert drawn == pytest.approx(a / RUNS + b / EXAMPLES + 3 * c / (RUNS * EXAMPLES), rel=0.06)
    assert scores.mean(axis=(1, 2)).var() == pytest.approx(
        a / RUNS + b / EXAMPLES + c / (RUNS * EXAMPLES), rel=0.2
    )


def test_resamples_are_the_same_for_every_row_and_call_and_missing_rows_stay_missing() -> None:
    scores = _effects(3, 1.0, 1.0, 1.0, draws=3)
    scores[1, 4] = np.nan
    drawn = example_resamples(scores)
    assert drawn.shape == (3, RUNS, RESAMPLES)
    np.testing.assert_allclose(example_resamples(scores[2, 5]), drawn[2, 5], atol=1e-12)
    assert np.isnan(drawn).all(axis=-1).sum() == np.isnan(drawn).any(axis=-1).sum() == 1
    np.testing.assert_allclose(example_resamples(np.full((2, 7), 3.0)), 3.0)
    np.testing.assert_allclose(run_resamples(np.full((5, 20), 3.0)), 3.0)


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
    if a == 1.0:
        assert missed >= alpha - slack  # of runs alone it is Student's t


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
    parts = np.array([example_variance(own) for own in scores])
    assert parts.mean() == pytest.approx(4.0 / EXAMPLES, rel=0.1)
    assert np.mean([example_variance(own) for own in _effects(8, 1.0, 0.0, 9.0, draws=200)]) < 0.02
    assert example_variance(scores[0, :1]) == example_variance(scores[0, :, :1]) == 0
