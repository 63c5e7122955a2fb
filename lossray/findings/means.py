"""One-sided t tests and confidence bounds of a mean; the run is the unit of analysis."""

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MeanTest:
    """The mean of n runs beside a bound, for many samples at once; arrays [...].

    `low` and `high` are one-sided bounds of level alpha each. With fewer than two runs nothing can be
    rejected: p = 1 and the bounds are NaN.
    """

    mean: Array
    low: Array
    high: Array
    p_less: Array  # of "the mean is not below the bound"
    p_greater: Array  # of "the mean is not above the bound"
    n: NDArray[np.int64]


def mean_test(values: ArrayLike, bound: float, *, alpha: float) -> MeanTest:
    """Student's t test of the mean against ``bound``, both ways.

    Args:
        values: [..., n]; NaN stands for a run that is missing.
        bound: value that the mean is compared with.
        alpha: level of each one-sided test and bound.
    """
    sample = np.asarray(values, dtype=np.float64)
    present = np.isfinite(sample)
    n = present.sum(axis=-1)
    # The test's values do not matter where there are too few runs; numbers there keep scipy from warning.
    safe = np.where((n >= 2)[..., None], np.where(present, sample, np.nan), np.zeros(sample.shape[-1:]))
    if sample.shape[-1] < 2:
        safe = np.zeros((*sample.shape[:-1], 2))
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of samples without any spread
        less = stats.ttest_1samp(safe, bound, axis=-1, alternative="less", nan_policy="omit")
        high = np.asarray(less.confidence_interval(1 - alpha).high)
        p_greater = special.stdtr(less.df, -less.statistic)
        total = np.where(present, sample, 0.0).sum(axis=-1)
        mean = np.where(n > 0, total / np.maximum(n, 1), np.nan)
    known = n >= 2
    return MeanTest(
        mean=mean,
        low=np.where(known, 2 * mean - high, np.nan),
        high=np.where(known, high, np.nan),
        p_less=np.where(known & np.isfinite(less.pvalue), less.pvalue, 1.0),
        p_greater=np.where(known & np.isfinite(p_greater), p_greater, 1.0),
        n=n,
    )


def two_sided(test: MeanTest) -> Array:
    """The two-sided p value of a t test."""
    p: Array = np.minimum(1.0, 2 * np.minimum(test.p_less, test.p_greater))
    return p


def equivalence(values: ArrayLike, width: float, *, alpha: float) -> Array:
    """P value [...] of "the mean lies outside [-width, width]": two one-sided tests."""
    below = mean_test(values, width, alpha=alpha).p_less
    above = mean_test(values, -width, alpha=alpha).p_greater
    p: Array = np.maximum(below, above)
    return p


def bca_interval(values: ArrayLike, *, alpha: float, seed: int = 0) -> tuple[float, float]:
    """Two-sided BCa bootstrap interval of the mean of ``values`` [n], for display.

    Tests do not use it: at n = 10 its one-sided error is 7 to 8.5% in place of 5% (SCIENCE 5A). NaN where
    the values, NaNs left out, are fewer than three or all equal.
    """
    sample = np.asarray(values, dtype=np.float64)
    sample = sample[np.isfinite(sample)]
    if len(sample) < 3 or np.ptp(sample) == 0:
        return float("nan"), float("nan")
    result = stats.bootstrap(
        (sample,),
        np.mean,
        confidence_level=1 - alpha,
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
