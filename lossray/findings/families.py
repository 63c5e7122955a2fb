"""Several tests together: Holm, Hommel, intersection-union, what a design can reach; exact proportions."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from lossray.findings.sign_flips import least_sign_flip_p

Array = NDArray[np.float64]


def holm(p_values: ArrayLike) -> Array:
    """P values [..., m] adjusted by Holm's step-down method, for "at least one is false" at level alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    m = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    stepped = np.take_along_axis(p, order, axis=-1) * np.arange(m, 0, -1)
    adjusted = np.minimum(1.0, np.maximum.accumulate(stepped, axis=-1))
    result = np.empty_like(p)
    np.put_along_axis(result, order, adjusted, axis=-1)
    return result


def hommel(p_values: ArrayLike) -> Array:
    """P values [..., m] adjusted by Hommel's method: closed testing with Simes' test of each intersection.

    At least as powerful as Holm's, much more so where many of the statements are false; valid for independent
    and for positively dependent tests, such as one-sided tests of methods that share seeds.
    Source: Hommel (1988), Biometrika 75; the algorithm is Wright's (1992), Biometrics 48.
    """
    p = np.asarray(p_values, dtype=np.float64)
    m = p.shape[-1]
    if m < 2:
        return p.copy()
    order = np.argsort(p, axis=-1, kind="stable")
    ordered = np.take_along_axis(p, order, axis=-1)
    simes = (m * ordered / np.arange(1, m + 1)).min(axis=-1, keepdims=True)
    adjusted = np.maximum(ordered, simes)
    for size in range(m - 1, 1, -1):  # intersections of so many statements
        first, rest = ordered[..., : m - size + 1], ordered[..., m - size + 1 :]
        largest = (size * rest / np.arange(2, size + 1)).min(axis=-1, keepdims=True)
        candidates = np.minimum(size * first, largest)
        adjusted = np.maximum(
            adjusted, np.concatenate([candidates, np.repeat(candidates[..., -1:], size - 1, axis=-1)], -1)
        )
    result = np.empty_like(p)
    np.put_along_axis(result, order, np.minimum(adjusted, 1.0), axis=-1)
    return result


def intersection_union(p_values: ArrayLike) -> Array:
    """P value [...] of "not all of the m statements [..., m] hold": the largest; no adjustment is needed."""
    p: Array = np.asarray(p_values, dtype=np.float64).max(axis=-1)
    return p


def least_attainable_p(pairs: ArrayLike) -> float:
    """The largest p value after Holm of a family of sign-flip tests, each as small as its pairs allow.

    All contrasts of the family can be significant together only if this is below alpha.

    Args:
        pairs: number of pairs of runs behind each of the m contrasts, [m].
    """
    return float(holm(least_sign_flip_p(np.asarray(pairs, dtype=np.int64))).max())


def seeds_needed(m: int, alpha: float) -> int:
    """Smallest n with m 2/2^n < alpha: below it a family of m sign-flip tests cannot reach alpha."""
    n = 1
    while m * 2.0 ** (1 - n) >= alpha:
        n += 1
    return n


def proportion_interval(successes: int, n: int, *, alpha: float) -> tuple[float, float]:
    """Exact (Clopper-Pearson) two-sided interval of a proportion; (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    interval = stats.binomtest(successes, n).proportion_ci(1 - alpha, method="exact")
    return float(interval.low), float(interval.high)
