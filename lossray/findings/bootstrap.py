"""The bootstrap over runs and test examples, for scores of every run on the same examples.

All runs of a study are scored on one test split, so runs and examples are crossed: both are drawn anew,
independently (the "pigeonhole" bootstrap, Owen 2007). For scores mu + run + example + interaction, whose
parts have variances A, B and C, the mean over n runs and N examples has variance A/n + B/N + C/(nN). The
bootstrap's is in expectation A/n + B/N + 3C/(nN): conservative where most of the variance is interaction.
For this n - 1 of n runs are drawn and N - 1 of N examples; drawing n would give (n - 1)/n of A/n.

Ten runs are too few for percentiles far out in the tails. An interval is the estimate and so many bootstrap
standard errors as Student's t with n - 1 degrees of freedom allows.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lossray.seeds import stream

Array = NDArray[np.float64]

RESAMPLES = 4000  # a standard error is then good to about 1%
AT_ONCE = 4_000_000  # weights held at a time


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval; with fewer than two runs all but the estimate is NaN."""

    estimate: float
    low: float
    high: float
    stderr: float


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


def run_resamples(by_run: Array) -> Array:
    """The mean over runs in every resample of the runs.

    Args:
        by_run: [..., n, B], of `example_resamples`; the runs are drawn once for each of the B.

    Returns:
        [..., B].
    """
    n, resamples = by_run.shape[-2:]
    rng = np.random.default_rng(stream(0, "bootstrap of runs", n))
    means: Array = np.einsum("...nb,bn->...b", by_run, _weights(rng, n, resamples))
    return means


def _weights(rng: np.random.Generator, n: int, resamples: int) -> Array:
    """Weights [resamples, n] of n units, each row's sum 1: how often n - 1 draws take each."""
    drawn = rng.integers(n, size=(resamples, max(n - 1, 1)))
    places = drawn + n * np.arange(resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=n * resamples).reshape(resamples, n)
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
    stderr = float(run_resamples(by_run).std())
    reach = float(stats.t.ppf(1 - alpha / 2, n - 1)) * stderr
    return Interval(estimate, estimate - reach, estimate + reach, stderr)


def example_variance(scores: Array) -> float:
    """The part B/N of the mean's variance that more runs do not reduce; 0 where the estimate is negative.

    Args:
        scores: [n, N].
    """
    n, n_examples = scores.shape
    if n < 2 or n_examples < 2:
        return 0.0
    centred = scores - scores.mean(axis=1, keepdims=True)
    columns = centred.mean(axis=0)
    interaction = float(np.square(centred - columns).sum()) / ((n - 1) * (n_examples - 1))
    between = float(columns.var(ddof=1))
    return float(max(0.0, (between - interaction / n) / n_examples))
