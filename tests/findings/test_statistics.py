"""The elementary tests: against scipy, by hand, their size at the boundary of the null, and their power."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lossray.findings.families import (
    holm,
    hommel,
    intersection_union,
    least_attainable_p,
    proportion_interval,
    seeds_needed,
)
from lossray.findings.means import bca_interval, equivalence, mean_test, two_sided
from lossray.findings.sign_flips import DRAWN, least_sign_flip_p, max_t_test, sign_flip_test, sign_patterns

DRAWS, MOST, ALPHA = 10_000, 569, 0.05  # 569 is more than three standard deviations above 500


def _draws(purpose: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(purpose).normal(size=(DRAWS, *shape))


# ---- against scipy and by hand


def test_mean_test_is_scipys_and_leaves_missing_runs_out() -> None:
    values = np.random.default_rng(0).normal(0.3, 1.0, size=(3, 8))
    values[1, 2:4] = np.nan
    values[2, 1:] = np.nan
    test = mean_test(values, 0.1, alpha=ALPHA)
    for row in (0, 1):
        sample = values[row][np.isfinite(values[row])]
        less = stats.ttest_1samp(sample, 0.1, alternative="less")
        assert test.p_less[row] == pytest.approx(less.pvalue)
        assert test.p_greater[row] == pytest.approx(1 - less.pvalue)
        assert two_sided(test)[row] == pytest.approx(stats.ttest_1samp(sample, 0.1).pvalue)
        assert test.high[row] == pytest.approx(less.confidence_interval(0.95).high)
        # A two-sided 90% interval is two one-sided bounds of 95%.
        both = stats.ttest_1samp(sample, 0.1).confidence_interval(0.9)
        assert (test.low[row], test.high[row]) == pytest.approx((both.low, both.high))
    assert test.n.tolist() == [8, 6, 1]
    assert (test.p_less[2], test.p_greater[2], math.isnan(test.high[2])) == (1, 1, True)
    assert test.mean[2] == values[2, 0]


def test_a_bound_of_the_mean_and_its_test_agree() -> None:
    values = np.random.default_rng(1).normal(size=9)
    high = float(mean_test(values, 0.0, alpha=ALPHA).high)
    assert mean_test(values, high, alpha=ALPHA).p_less == pytest.approx(ALPHA)


def test_nothing_is_known_of_empty_samples_and_everything_of_equal_ones() -> None:
    empty = mean_test(np.empty((2, 0)), 0.0, alpha=ALPHA)
    assert empty.p_less.tolist() == [1, 1]
    assert empty.n.tolist() == [0, 0]
    equal = mean_test(np.full(5, 2.0), 2.0, alpha=ALPHA)
    assert (equal.p_less, equal.p_greater) == (1, 1)
    assert mean_test(np.full(5, 2.0), 3.0, alpha=ALPHA).p_less == 0


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
def test_sign_flips_are_scipys_permutation_test(alternative: str) -> None:
    differences = np.random.default_rng(2).normal(0.7, 1.0, size=(4, 9))
    peer = stats.permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        n_resamples=np.inf,
        alternative=alternative,
        axis=-1,
        vectorized=True,
    )
    ours = sign_flip_test(differences, alternative=alternative)
    # scipy doubles the smaller tail of a two-sided test; the null is symmetric, so that is the same.
    np.testing.assert_allclose(ours, peer.pvalue, rtol=1e-12)


def test_sign_flips_of_a_clear_effect_reach_the_least_p_and_never_zero() -> None:
    for n in (3, 5, 10):
        assert sign_flip_test(np.arange(1.0, n + 1)) == 2 / 2**n == least_sign_flip_p(n)
        assert sign_flip_test(-np.arange(1.0, n + 1), alternative="less") == 1 / 2**n
    assert sign_flip_test(np.zeros(6)) == 1
    assert sign_flip_test(np.full(40, 1.0)) == 1 / DRAWN == least_sign_flip_p(40)


def test_a_missing_pair_has_no_influence() -> None:
    differences = np.random.default_rng(3).normal(0.5, 1.0, size=8)
    with_gap = np.insert(differences, 3, np.nan)
    assert sign_flip_test(with_gap) == sign_flip_test(differences)


def test_drawn_patterns_are_near_the_listed_ones() -> None:
    differences = np.random.default_rng(4).normal(0.4, 1.0, size=16)
    bits = np.arange(2**16)[:, None] >> np.arange(16)
    sums = (1.0 - 2.0 * (bits & 1)) @ differences
    exact = (np.abs(sums) >= abs(differences.sum()) - 1e-9).mean()
    assert sign_flip_test(differences) == pytest.approx(exact, abs=4 * math.sqrt(exact / DRAWN))
    assert (sign_patterns(16)[0] == 1).all()


def test_max_t_of_one_contrast_is_its_sign_flip_test_and_of_many_by_enumeration() -> None:
    differences = np.random.default_rng(5).normal(0.6, 1.0, size=(3, 7))
    for row in differences:
        assert max_t_test(row[None]) == sign_flip_test(row)
    observed = np.abs(differences.mean(axis=1)) / differences.std(axis=1, ddof=1)
    at_least = np.zeros(3)
    for pattern in sign_patterns(7):
        flipped = differences * pattern
        t = np.abs(flipped.mean(axis=1)) / flipped.std(axis=1, ddof=1)
        at_least += t.max() >= observed - 1e-12
    np.testing.assert_allclose(max_t_test(differences), at_least / 2**7)


def test_holm_by_hand() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.5]), [0.04, 0.09, 0.09, 0.5])
    np.testing.assert_allclose(holm([[0.5, 0.9]]), [[1.0, 1.0]])
    assert intersection_union([[0.01, 0.2], [0.01, 0.02]]).tolist() == [0.2, 0.02]


def test_what_a_design_can_reach() -> None:
    assert least_attainable_p([10] * 12) == pytest.approx(12 * 2 / 1024)
    assert least_attainable_p([5] * 12) == pytest.approx(12 * 2 / 32)
    assert least_attainable_p([10, 10, 5]) == pytest.approx(2 / 32)  # the last of Holm's steps
    assert [seeds_needed(m, 0.05) for m in (1, 4, 9, 12)] == [6, 8, 9, 9]
    for m in (1, 3, 9, 12):
        n = seeds_needed(m, ALPHA)
        assert least_attainable_p([n] * m) < ALPHA <= least_attainable_p([n - 1] * m)
        assert n >= 1 + math.log2(m / ALPHA) > n - 1


def test_exact_interval_of_a_proportion() -> None:
    assert proportion_interval(0, 10, alpha=ALPHA) == pytest.approx((0, 1 - 0.025**0.1))
    assert proportion_interval(10, 10, alpha=ALPHA) == pytest.approx((0.025**0.1, 1))
    assert proportion_interval(0, 0, alpha=ALPHA) == (0, 1)


def test_bca_is_for_display_and_does_without_spread() -> None:
    values = np.random.default_rng(6).normal(size=10)
    low, high = bca_interval(values, alpha=ALPHA)
    assert low < values.mean() < high
    assert bca_interval(values, alpha=ALPHA) == (low, high)
    assert all(math.isnan(end) for end in bca_interval([1.0, 1.0, 1.0, np.nan], alpha=ALPHA))


# ---- size at the boundary of the null: 10,000 draws, alpha = 5%


def test_size_of_the_t_tests() -> None:
    test = mean_test(math.log(0.01) + 0.5 * _draws(10, 10), math.log(0.01), alpha=ALPHA)
    assert (test.p_less <= ALPHA).sum() <= MOST
    assert (test.p_greater <= ALPHA).sum() <= MOST
    assert (test.high < math.log(0.01)).sum() <= MOST  # the one-sided bound misses as often


def test_size_of_equivalence() -> None:
    assert (equivalence(1.0 + 0.5 * _draws(11, 10), 1.0, alpha=ALPHA) <= ALPHA).sum() <= MOST


@pytest.mark.parametrize("alternative", ["two-sided", "less", "greater"])
@pytest.mark.parametrize("n", [6, 10])
def test_size_of_sign_flips_even_with_heavy_tails(n: int, alternative: str) -> None:
    heavy = np.random.default_rng(12).standard_t(2, size=(DRAWS, n))
    assert (sign_flip_test(heavy, alternative=alternative) <= ALPHA).sum() <= MOST


def test_family_wise_error_of_holm_over_contrasts_that_share_sgd() -> None:
    runs = _draws(13, 9, 10)
    p = sign_flip_test(runs[:, 1:] - runs[:, :1])
    assert (holm(p).min(axis=-1) <= ALPHA).sum() <= MOST


def test_family_wise_error_of_max_t() -> None:
    runs = _draws(14, 9, 8)
    assert (max_t_test(runs[:, 1:] - runs[:, :1]).min(axis=-1) <= ALPHA).sum() <= MOST
    # Where one contrast is real, the error is still that of the others.
    differences = runs[:, 1:] - runs[:, :1]
    differences[:, 0] -= 5
    assert (max_t_test(differences)[:, 1:].min(axis=-1) <= ALPHA).sum() <= MOST


def test_size_of_the_intersection_union_test() -> None:
    """The worst case of its null: one method at the margin, the others far below it."""
    values = 0.5 * _draws(15, 4, 10) - np.array([0.0, 50.0, 50.0, 50.0])[:, None]
    p = intersection_union(mean_test(values, 0.0, alpha=ALPHA).p_less)
    assert (p <= ALPHA).sum() <= MOST


def test_size_of_the_dispersion_test() -> None:
    """Two optimizers whose S spreads alike over five checkpoints, whatever the level of each run."""
    runs = _draws(16, 2, 10, 5) * np.exp(_draws(17, 1, 10, 1))
    spread = np.log(runs.std(axis=-1, ddof=1))
    assert (sign_flip_test(spread[:, 0] - spread[:, 1]) <= ALPHA).sum() <= MOST


# ---- power


@pytest.mark.parametrize(("effect", "power"), [(1.0, 0.27), (2.0, 0.94)])
def test_power_at_the_first_step_of_holm_with_ten_seeds(effect: float, power: float) -> None:
    p = sign_flip_test(effect + _draws(18, 10))
    assert (12 * p <= ALPHA).mean() == pytest.approx(power, abs=0.03)


def _closed_simes(p: np.ndarray) -> np.ndarray:
    """By definition: the largest Simes p value of all intersections that hold a statement."""
    adjusted = np.zeros(len(p))
    for size in range(1, len(p) + 1):
        for chosen in itertools.combinations(range(len(p)), size):
            simes = (size * np.sort(p[list(chosen)]) / np.arange(1, size + 1)).min()
            adjusted[list(chosen)] = np.maximum(adjusted[list(chosen)], simes)
    return adjusted


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_hommel_is_the_closed_test(m: int) -> None:
    p = np.random.default_rng(m).random((30, m)) ** 2
    np.testing.assert_allclose(hommel(p), [_closed_simes(own) for own in p], rtol=1e-12)
    assert (hommel(p) <= holm(p) * (1 + 1e-12)).all()
