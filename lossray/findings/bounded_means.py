"""Test and interval of the mean of shares, numbers from 0 to 1, without an assumption on how they scatter.

Shares of 0 and 1 give the exact binomial test, equal shares one that knows that their spread may be luck, and
shares with little spread something near Student's t. That the level is kept is proven for shares of 0 and 1,
otherwise a conjecture without a known counterexample, and simulated in `benchmarks.error_rates`.
Source: Gaffke (2005), Math. Methods of Statistics 14; Learned-Miller & Thomas (2019), arXiv 1905.06208.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

Array = NDArray[np.float64]


def bounded_mean_test(shares: ArrayLike, bound: float) -> tuple[float, float]:
    """P values of "the mean is not below ``bound``" and of "it is not above".

    Args:
        shares: [n], from 0 to 1; n may be 0, which rejects nothing.
        bound: between 0 and 1.
    """
    sample = np.asarray(shares, dtype=np.float64)
    return _p_greater(1 - sample, 1 - bound), _p_greater(sample, bound)


def bounded_mean_interval(shares: ArrayLike, *, alpha: float) -> tuple[float, float]:
    """The means that neither one-sided test of level alpha/2 rejects; (0, 1) without shares."""
    sample = np.asarray(shares, dtype=np.float64)
    return _lower_end(sample, alpha / 2), 1 - _lower_end(1 - sample, alpha / 2)


def _lower_end(shares: Array, level: float) -> float:
    if not shares.any():
        return 0.0
    return float(optimize.brentq(lambda bound: _p_greater(shares, bound) - level, 0.0, 1.0, rtol=1e-12))


def _p_greater(shares: Array, bound: float) -> float:
    """Probability that a randomly weighted mean of the shares and one more share, 0, is at most ``bound``.

    With weights in proportion to exponential variables E that is P(sum of E (share - bound) <= 0): one after
    the other, the terms above the bound take less time than those below. Which side's present term ends
    first is a race of two exponentials without memory, so the probability follows term by term.
    """
    apart = np.append(shares, 0.0) - bound
    above, below = apart[apart > 0], -apart[apart < 0]
    # chance[j]: that the terms above are used up first, with i and j of the terms to come.
    chance = np.zeros(len(below) + 1)
    chance[1:] = 1.0
    for up in above:
        fresh = np.zeros_like(chance)
        for j, down in enumerate(below, start=1):
            fresh[j] = (down * chance[j] + up * fresh[j - 1]) / (up + down)
        chance = fresh
    return float(chance[-1]) if len(below) else float(not len(above))
