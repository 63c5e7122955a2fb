"""The interval of a ratio of two means over runs and test examples (Fieller 1954).

Whether a/b exceeds a bound is asked of a - bound b, a mean itself, with its own standard error. To linearise
the ratio around its estimate instead would call it certain where a few examples hold most of both means:
there the estimate follows them, and a - estimate b nearly vanishes whatever the truth.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from lossray.findings.bootstrap import Array, covariance_parts, t_tail


@dataclass(frozen=True)
class RatioInterval:
    """A ratio with its two-sided interval; NaN where the data set no bounds, as where b might be 0.

    Attributes:
        estimate: the ratio.
        low: lower end.
        high: upper end.
        stderr: of the ratio linearised around its estimate.
        floor: the part of stderr**2, the test split's, that more runs do not reduce.
        freedom: degrees of freedom.
        covariance: of the two means, in units of the second's: variance, covariance, variance.
    """

    estimate: float
    low: float
    high: float
    stderr: float
    floor: float
    freedom: int
    covariance: tuple[float, float, float]

    def p_above(self, bound: float) -> float:
        """One-sided P value of "the ratio is at most ``bound``"; 1 where nothing is known."""
        return t_tail(self.estimate - bound, self._stderr(bound), self.freedom)

    def p_below(self, bound: float) -> float:
        """One-sided P value of "the ratio is at least ``bound``"."""
        return t_tail(bound - self.estimate, self._stderr(bound), self.freedom)

    def p_differs(self, bound: float) -> float:
        """Two-sided P value of "the ratio is ``bound``"."""
        return min(1.0, 2 * min(self.p_above(bound), self.p_below(bound)))

    def _stderr(self, bound: float) -> float:
        """Of numerator - ``bound`` denominator."""
        of_numerator, both, of_denominator = self.covariance
        variance = of_numerator - 2 * bound * both + bound**2 * of_denominator
        return 0.0 if variance <= 0 else math.sqrt(variance)


def ratio_interval(numerator: Array, denominator: Array, means: Array, *, alpha: float) -> RatioInterval:
    """The two-sided interval of level 1 - ``alpha`` of a ratio of means.

    Args:
        numerator: [n, B], by run in the resamples of the examples.
        denominator: [n, B]; its mean must be above 0, otherwise everything is NaN.
        means: [2], of all runs and examples.
        alpha: the interval misses with this probability.
    """
    n = len(numerator)
    top, bottom = (float(mean) for mean in means)
    ratio = top / bottom if bottom > 0 else math.nan
    if n < 2 or not bottom > 0:
        return RatioInterval(ratio, math.nan, math.nan, math.nan, math.nan, 1, (math.nan, math.nan, math.nan))
    of_runs, of_examples = covariance_parts(np.stack([numerator, denominator]) / bottom)
    total = of_runs + of_examples
    around = np.array([1.0, -ratio])
    low, high = _ends(ratio, total, float(special.stdtrit(n - 1, 1 - alpha / 2)))
    return RatioInterval(
        estimate=ratio,
        low=low,
        high=high,
        stderr=math.sqrt(max(0.0, float(around @ total @ around))),
        floor=max(0.0, float(around @ of_examples @ around)),
        freedom=n - 1,
        covariance=(float(total[0, 0]), float(total[0, 1]), float(total[1, 1])),
    )


def _ends(ratio: float, covariance: Array, t: float) -> tuple[float, float]:
    """The bounds x at which |ratio - x| is t standard errors; NaN where there are not two."""
    leading = 1 - t**2 * float(covariance[1, 1])
    half = ratio - t**2 * float(covariance[0, 1])
    last = ratio**2 - t**2 * float(covariance[0, 0])
    if not leading > 0:
        return math.nan, math.nan
    root = math.sqrt(max(0.0, half**2 - leading * last))
    return (half - root) / leading, (half + root) / leading
