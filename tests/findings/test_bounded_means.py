"""The mean of shares against a bound: the binomial test for 0 and 1, by weights drawn, its size."""

import numpy as np
import pytest
from scipy import stats

from lossray.findings.bounded_means import bounded_mean_interval, bounded_mean_test
from lossray.findings.families import proportion_interval


@pytest.mark.parametrize(("yes", "n"), [(0, 7), (3, 7), (7, 7), (9, 13), (1, 1), (10, 10)])
@pytest.mark.parametrize("bound", [0.2, 0.5])
def test_of_zeros_and_ones_it_is_the_exact_binomial_test(yes: int, n: int, bound: float) -> None:
    shares = np.arange(n) < yes
    less, greater = bounded_mean_test(shares, bound)
    assert less == pytest.approx(stats.binom.cdf(yes, n, bound))
    assert greater == pytest.approx(stats.binom.sf(yes - 1, n, bound))
    assert bounded_mean_interval(shares, alpha=0.1) == pytest.approx(proportion_interval(yes, n, alpha=0.1))


def test_equal_shares_may_be_luck() -> None:
    """Were they 0.7 or 0 with mean 0.4, all would be 0.7 that often."""
    less, greater = bounded_mean_test(np.full(8, 0.7), 0.4)
    assert greater == pytest.approx((0.4 / 0.7) ** 8)
    assert less == 1


def test_it_is_the_randomly_weighted_mean_by_draws() -> None:
    rng = np.random.default_rng(3)
    shares = rng.random(6) ** 2
    weights = rng.dirichlet(np.ones(7), size=200_000)
    for bound in (0.15, 0.3, 0.5):
        less, greater = bounded_mean_test(shares, bound)
        assert greater == pytest.approx((weights @ [*shares, 0.0] <= bound).mean(), abs=5e-3)
        assert less == pytest.approx((weights @ [*shares, 1.0] >= bound).mean(), abs=5e-3)


def test_the_interval_is_what_the_tests_do_not_reject() -> None:
    shares = np.random.default_rng(4).random(9)
    low, high = bounded_mean_interval(shares, alpha=0.1)
    assert bounded_mean_test(shares, low)[1] == pytest.approx(0.05)
    assert bounded_mean_test(shares, high)[0] == pytest.approx(0.05)
    assert low < shares.mean() < high


def test_without_shares_nothing_is_known() -> None:
    assert bounded_mean_test([], 0.5) == (1, 1)
    assert bounded_mean_interval([], alpha=0.05) == (0, 1)


@pytest.mark.parametrize("n", [5, 10, 20])
@pytest.mark.parametrize("shape", ["even", "skewed", "two-point", "narrow"])
def test_size(n: int, shape: str) -> None:
    """At the bound itself, in either direction: at most 5%, and three standard errors of 1,500 draws."""
    rng = np.random.default_rng(n)
    draws = {
        "even": lambda: rng.random(n),
        "skewed": lambda: rng.beta(3, 0.5, size=n) * 3.5 / 6,
        "two-point": lambda: 0.55 * (rng.random(n) < 0.5 / 0.55),
        "narrow": lambda: rng.binomial(16, 0.5, size=n) / 16,
    }[shape]
    p = np.array([bounded_mean_test(draws(), 0.5) for _ in range(1500)])
    assert ((p <= 0.05).mean(axis=0) < 0.05 + 3 * np.sqrt(0.05 / 1500)).all()
