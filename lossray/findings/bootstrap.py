"""Intervals of a mean over runs and test examples, for scores of every run on the same examples.

All runs of a study are scored on one test split, so runs and examples are crossed. For scores mu + run +
example + interaction, whose parts have variances A, B and C, the mean over n runs and N examples has variance
A/n + B/N + C/(nN). The means of single runs spread by A + C/N, so they give the first and the last part; but
all of them share the second, which is therefore taken from resamples of the examples (a bootstrap; the same
for all runs). What resamples tell of the mean over runs is B/N + C/(nN), and of the single runs around it
C/N, so the variance is estimated without bias. Drawing runs and examples together (Owen's "pigeonhole"
bootstrap, 2007) counts C/(nN) three times.

An interval is the estimate and so many standard errors as Student's t with n - 1 degrees of freedom allows:
exact where the runs dominate, conservative where the examples do.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from lossray.seeds import stream

Array = NDArray[np.float64]

RESAMPLES = 4000  # the examples' part of a variance is then good to about 2%
AT_ONCE = 4_000_000  # weights held at a time


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval; with fewer than two runs all but the estimate is NaN.

    Attributes:
        estimate: a mean over runs and test examples.
        low: lower end.
        high: upper end.
        stderr: standard error of the estimate.
        floor: the part B/N of stderr**2, the test split's, that more runs do not reduce.
        freedom: degrees of freedom.
    """

    estimate: float
    low: float
    high: float
    stderr: float
    floor: float = 0.0
    freedom: int = 1

    def p_above(self, bound: float) -> float:
        """One-sided P value of "the truth is at most ``bound``"; 1 where there is no interval."""
        return t_tail(self.estimate - bound, self.stderr, self.freedom)

    def p_below(self, bound: float) -> float:
        """One-sided P value of "the truth is at least ``bound``"."""
        return t_tail(bound - self.estimate, self.stderr, self.freedom)

    def p_differs(self, bound: float) -> float:
        """Two-sided P value of "the truth is ``bound``"."""
        return min(1.0, 2 * min(self.p_above(bound), self.p_below(bound)))


def t_tail(distance: float, stderr: float, freedom: int) -> float:
    """Probability that Student's t exceeds so many standard errors; 1 where the error is not known."""
    if not (math.isfinite(distance) and math.isfinite(stderr)):
        return 1.0
    if stderr == 0:
        return 0.0 if distance > 0 else 1.0
    return float(special.stdtr(freedom, -distance / stderr))


def example_resamples(scores: Array, *, resamples: int = RESAMPLES) -> Array:
    """The mean score of each row in every resample of the examples.

    The resamples are the same for all rows and all calls with as many examples, so that differences of rows
    are paired.

    Args:
        scores: [..., N]; a row with a NaN gives NaN.
        resamples: B, how many.

    Returns:
        [..., B], float64.
    """
    n = scores.shape[-1]
    rng = np.random.default_rng(stream(0, "bootstrap of examples", n))
    rows = scores.reshape(-1, n).astype(np.float64, copy=False)
    pieces = max(1, -(-resamples * n // AT_ONCE))
    sizes = [len(part) for part in np.array_split(np.arange(resamples), pieces)]
    means = [rows @ _weights(rng, n, size).T for size in sizes]
    return np.concatenate(means, axis=-1).reshape(*scores.shape[:-1], resamples)


def _weights(rng: np.random.Generator, n: int, resamples: int) -> Array:
    """Weights [resamples, n] of n units, each row's sum 1: how often n - 1 draws take each."""
    drawn = rng.integers(n, size=(resamples, max(n - 1, 1)))
    flat_indices = drawn + n * np.arange(resamples)[:, None]
    counts = np.bincount(flat_indices.ravel(), minlength=n * resamples).reshape(resamples, n)
    weights: Array = counts / drawn.shape[1]
    return weights


def t_interval(estimate: float, by_run: Array, *, alpha: float) -> Interval:
    """The two-sided interval of level 1 - ``alpha`` around an estimate that is a mean over runs and examples.

    Args:
        estimate: the mean.
        by_run: [n, B], the same quantity by run in the resamples of the examples.
        alpha: the interval misses with this probability.
    """
    n = len(by_run)
    if n < 2:
        return Interval(estimate, math.nan, math.nan, math.nan)
    of_runs, of_examples = (float(part.item()) for part in covariance_parts(by_run[None]))
    stderr = math.sqrt(of_runs + of_examples)
    reach = float(special.stdtrit(n - 1, 1 - alpha / 2)) * stderr
    return Interval(estimate, estimate - reach, estimate + reach, stderr, of_examples, n - 1)


def covariance_parts(by_run: Array) -> tuple[Array, Array]:
    """Covariances of several means over runs and examples: the part A/n + C/(nN), and B/N.

    Args:
        by_run: [q, n, B], q quantities by run in the same resamples of the examples; n >= 2.

    Returns:
        Two arrays [q, q]; the second with negative eigenvalues, which are noise, set to 0.
    """
    n, resamples = by_run.shape[1:]
    single = by_run.mean(axis=2)  # [q, n]
    single = single - single.mean(axis=1, keepdims=True)
    of_runs = single @ single.T / (n * (n - 1))
    together = by_run.mean(axis=1, keepdims=True)  # [q, 1, B], of variance B/N + C/(nN)
    around = by_run - together
    around = (around - around.mean(axis=2, keepdims=True)).reshape(len(by_run), -1)
    interaction = around @ around.T / (resamples * n * (n - 1))
    together = (together - together.mean(axis=2, keepdims=True))[:, 0]
    return of_runs, _without_negative(together @ together.T / resamples - interaction)


def _without_negative(symmetric: Array) -> Array:
    values, vectors = np.linalg.eigh(symmetric)
    positive: Array = (vectors * np.maximum(values, 0.0)) @ vectors.T
    return positive
