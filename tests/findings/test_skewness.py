"""Tests of a mean that hold for skewed samples: their size, where Student's t fails, and their limits."""

import numpy as np
import pytest
from scipy import special

from lossray.findings.means import mean_test
from lossray.findings.skewness import safe_mean_test

DRAWS = 100_000
MEAN = special.digamma(0.5) + np.log(2)


def _share(p: np.ndarray, level: float) -> float:
    """Rejections over those allowed."""
    return float((p <= level).mean() / level)


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("level", [0.05, 0.005])
def test_the_size_is_kept_under_normal_and_skewed_samples(n: int, level: float) -> None:
    rng = np.random.default_rng(n)
    skewed = np.log(rng.chisquare(1, size=(DRAWS, n))) - MEAN
    normal = rng.normal(size=(DRAWS, n))
    slack = 1 + 4 / np.sqrt(DRAWS * level)
    for values in (skewed, normal):
        for p in safe_mean_test(values, 0.0):
            assert _share(p, level) < slack
    for values in (skewed, -skewed, normal):
        for p in safe_mean_test(values, 0.0, skewed="either"):
            assert _share(p, level) < slack
    # What it is for: Student's t rejects too often, on the side away from the tail.
    assert _share(mean_test(skewed, 0.0, alpha=0.05).p_greater, level) > 1.6
    # On the other side it is Student's t, with its power.
    assert _share(safe_mean_test(normal, 0.0)[0], level) > 0.8


def test_ends() -> None:
    values = [[1.0, np.nan, np.nan], [2.0, 2.0, 2.0], [3.0, 3.0, np.nan]]
    less, greater = safe_mean_test(values, 2.0)
    assert less.tolist() == [1, 1, 1]
    assert greater[:2].tolist() == [1, 1]
    assert greater[2] < 1e-5  # not 0: nothing is certain
    assert np.shape(safe_mean_test([0.1, 0.2, 0.4], 0.0)[0]) == ()
    assert safe_mean_test(np.empty((2, 0)), 0.0)[0].tolist() == [1, 1]
