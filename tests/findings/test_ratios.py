"""Fieller's interval of a ratio over runs and examples."""

import math
import os

import numpy as np
import pytest

from lossray.findings.bootstrap import example_resamples
from lossray.findings.ratios import RatioInterval, ratio_interval


def _rng(purpose: int) -> np.random.Generator:
    return np.random.default_rng([int(os.environ.get("LOSSRAY_TEST_SEED", "0")), 77, purpose])


def _ratio(top: np.ndarray, bottom: np.ndarray, alpha: float = 0.05) -> RatioInterval:
    drawn = [example_resamples(scores, resamples=300) for scores in (top, bottom)]
    return ratio_interval(*drawn, np.array([top.mean(), bottom.mean()]), alpha=alpha)


def test_p_values_are_those_of_the_interval() -> None:
    rng = _rng(1)
    bottom = 2 + rng.normal(size=(7, 40))
    found = _ratio(0.6 + 0.5 * bottom + rng.normal(size=(7, 40)), bottom, alpha=0.02)
    assert found.low < found.estimate < found.high
    assert found.p_above(found.low) == pytest.approx(0.01)
    assert found.p_below(found.high) == pytest.approx(0.01)
    assert found.p_differs(found.high) == pytest.approx(0.02)
    assert found.p_above(found.estimate) == pytest.approx(0.5)
    assert 0 < found.floor < found.stderr**2


def test_where_the_ratio_is_well_known_it_is_that_of_the_linearised_ratio() -> None:
    rng = _rng(2)
    bottom = 10 + rng.normal(size=(8, 50))
    found = _ratio(2 + 0.1 * rng.normal(size=(8, 50)), bottom)
    assert found.high - found.low == pytest.approx(2 * 2.3646 * found.stderr, rel=0.02)
    # A ratio that is the same everywhere has no width, and its parts have.
    same = _ratio(0.3 * bottom, bottom)
    assert (same.low, same.high) == pytest.approx((0.3, 0.3), rel=1e-6)
    assert same.p_below(0.31) < 1e-9 < 1e-3 < same.p_above(0.299) + 1


@pytest.mark.parametrize("shape", [(0, 5), (1, 5)])
def test_without_two_runs_or_a_positive_denominator_there_is_no_interval(shape: tuple[int, int]) -> None:
    ones = np.ones(shape)
    for found in (
        ratio_interval(ones, ones, np.array([1.0, 2.0]), alpha=0.05),
        ratio_interval(np.ones((4, 5)), np.zeros((4, 5)), np.array([1.0, 0.0]), alpha=0.05),
        ratio_interval(np.ones((4, 5)), np.ones((4, 5)), np.array([math.nan, math.nan]), alpha=0.05),
    ):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
        assert found.p_above(0.0) == found.p_below(0.0) == found.p_differs(0.5) == 1


def test_a_denominator_that_might_be_0_bounds_nothing() -> None:
    rng = _rng(3)
    bottom = np.concatenate([np.full((3, 30), -1.0), np.full((3, 30), 1.2)]) + 0.1 * rng.normal(size=(6, 30))
    found = _ratio(1 + 0.1 * rng.normal(size=(6, 30)), bottom)
    assert found.estimate > 0
    assert math.isnan(found.low)
    assert found.p_above(0.0) < 0.05


@pytest.mark.parametrize("runs", [5, 20])
def test_few_examples_that_hold_most_of_both_means(runs: int) -> None:
    """The linearised ratio would miss the truth here in more than its share."""
    rng = _rng(4)
    missed = linear = 0
    for _ in range(400):
        difficulty = rng.lognormal(-3, 1.8, size=60)
        bottom = difficulty * rng.lognormal(0, 0.3, size=(runs, 60)) * rng.lognormal(0, 0.3, size=60)
        other = difficulty * rng.lognormal(0, 0.3, size=(runs, 60)) * rng.lognormal(0, 0.3, size=60)
        found = _ratio(bottom - other, bottom)
        missed += found.p_differs(0.0) < 0.05
        linear += abs(found.estimate) > 2.0930 * found.stderr
    assert missed / 400 <= 0.06
    assert runs < 20 or linear / 400 > 0.07
