"""Paired sign-flip permutation tests: exact where all flips can be listed; one contrast, or many by max-T.

Under the null a paired difference is as likely as its negative, and the seeds are independent. So each of the
2^n patterns of signs is as likely as the one observed, whatever the distribution of the differences.
"""

import functools
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lossray.seeds import stream

Array = NDArray[np.float64]
Alternative = Literal["two-sided", "less", "greater"]

LISTED = 14  # pairs up to which all 2^n patterns are listed
DRAWN = 10_000  # patterns above that, the observed one among them
AT_ONCE = 20_000_000  # numbers held at a time
ROUNDING = 1e-10  # relative: patterns that tie with the observed one count as at least as extreme


@functools.lru_cache(maxsize=32)
def sign_patterns(n: int) -> Array:
    """Signs [patterns, n], the observed pattern (all 1) first: all 2^n, or that one and random others."""
    if n <= LISTED:
        bits = np.arange(2**n)[:, None] >> np.arange(n)
        return np.where(bits & 1, -1.0, 1.0)
    rng = np.random.default_rng(stream(0, "sign flips", n))
    patterns = rng.choice([-1.0, 1.0], size=(DRAWN, n))
    patterns[0] = 1.0
    return patterns


def sign_flip_test(differences: ArrayLike, *, alternative: Alternative = "two-sided") -> Array:
    """P values [...] of "the differences are symmetric about 0", by their sum.

    The observed pattern counts, so p is never 0.

    Args:
        differences: [..., n], one per pair of runs; NaN stands for a missing pair and has no influence.
        alternative: "less" asks whether the differences are below 0.
    """
    sample = _filled(differences)
    shape, n = sample.shape[:-1], sample.shape[-1]
    flat = sample.reshape(-1, n)
    patterns = sign_patterns(n)
    parts = [
        _tail(chunk, patterns, alternative) for chunk in np.array_split(flat, _pieces(len(flat), patterns))
    ]
    return np.concatenate(parts).reshape(shape)


def _tail(sample: Array, patterns: Array, alternative: Alternative) -> Array:
    """Share of the patterns whose sum is at least as extreme as the observed one; [rows]."""
    signed = -sample if alternative == "less" else sample
    sums, observed = signed @ patterns.T, signed.sum(axis=-1)
    if alternative == "two-sided":
        sums, observed = np.abs(sums), np.abs(observed)
    slack = ROUNDING * np.abs(sample).sum(axis=-1)
    share: Array = (sums >= (observed - slack)[:, None]).mean(axis=-1)
    return share


def max_t_test(differences: ArrayLike) -> Array:
    """Adjusted two-sided p values [..., m] of m contrasts by the largest t (Westfall & Young).

    The signs of a seed are flipped in all contrasts together, which keeps the contrasts' dependence. Single
    step: the family-wise error is at most alpha whatever contrasts are true.

    Args:
        differences: [..., m, n] for m contrasts of the same n seeds; NaN stands for a missing pair.
    """
    sample = _filled(differences)
    shape = sample.shape[:-1]
    flat = sample.reshape(-1, *sample.shape[-2:])
    patterns = sign_patterns(sample.shape[-1])
    pieces = _pieces(len(flat) * sample.shape[-2], patterns)
    parts = [_max_tail(chunk, patterns) for chunk in np.array_split(flat, min(pieces, max(len(flat), 1)))]
    return np.concatenate(parts).reshape(shape)


def _max_tail(sample: Array, patterns: Array) -> Array:
    """Adjusted p values [families, m]."""
    # t grows with |sum| / root of the sum of squares, and that sum is the same for all patterns.
    length = np.sqrt(np.square(sample).sum(axis=-1, keepdims=True))
    units = np.divide(sample, length, out=np.zeros_like(sample), where=length > 0)
    largest = np.abs(units @ patterns.T).max(axis=-2)
    observed = np.abs(units.sum(axis=-1))
    share: Array = (largest[:, None, :] >= (observed * (1 - ROUNDING))[:, :, None]).mean(axis=-1)
    return share


def least_sign_flip_p(n: int | NDArray[np.int64]) -> Array:
    """The smallest two-sided p value that ``n`` pairs can give: 2/2^n, or 1/DRAWN if that is larger."""
    pairs = np.asarray(n, dtype=np.float64)
    exact = np.minimum(1.0, 2.0 ** (1 - pairs))
    return np.where(pairs <= LISTED, exact, np.maximum(exact, 1 / DRAWN))


def _filled(differences: ArrayLike) -> Array:
    """Missing pairs as 0: flipping them changes nothing."""
    sample = np.asarray(differences, dtype=np.float64)
    return np.where(np.isfinite(sample), sample, 0.0)


def _pieces(rows: int, patterns: Array) -> int:
    return max(1, -(-rows * len(patterns) // AT_ONCE))
