"""Calibration: temperature scaling (Guo et al. 2017) and expected calibration errors."""

import math

import numpy as np
from numpy.typing import NDArray

from lossray.ensembles.logits import Array, Logits, Targets, check_logits, check_predictions, check_targets
from lossray.ensembles.selection import by_confidence

BINS = 15
TEMPERATURES = (1e-6, 1e6)
TOLERANCE = 1e-10  # of ln T; Newton's last step squares what is left
MAX_ITERATIONS = 100  # the worst case is bisection alone: 45


def fit_temperature(log_probabilities: Logits, targets: Targets) -> float:
    """The temperature T at which softmax(log_probabilities / T) has the smallest NLL on these examples.

    The NLL is convex in 1/T, so its minimum is the root of one increasing function: Newton steps in ln T, and
    bisection where they leave the bracket. Multiplying all log-probabilities by s multiplies T by s.

    T = 1 where the examples do not determine T. If each target is (one of) the most probable, as in a split
    without an error, the NLL falls all the way to T = 0, where one error elsewhere costs infinitely much.
    With one class, or where all classes are equally probable throughout, the NLL is the same at every T.
    T = 1e6, the upper bound, if the targets are on average no more probable (in the geometric mean) than the
    other classes: nothing beats equal probabilities.

    Args:
        log_probabilities: [N, C], finite, up to a constant per example: logits will do.
        targets: classes, [N] integers.

    Returns:
        T, in [1e-6, 1e6]; NaN where a log-probability is not finite.

    Raises:
        DataError: shapes that do not fit, no examples, or targets that are not classes.
    """
    given = check_logits(log_probabilities, ("examples", "classes"))
    targets = check_targets(targets, (given.shape[0], given.shape[1]))
    if not np.isfinite(given).all():
        return math.nan
    logs = np.array(given, dtype=np.float64, order="F")  # classes first in memory, see log_softmax
    logs -= logs.max(axis=1, keepdims=True)
    at_targets = float(logs[np.arange(len(targets)), targets].mean())
    if at_targets == 0:
        return 1.0
    if logs.mean() >= at_targets:
        return TEMPERATURES[1]
    return 1 / _root(logs, at_targets)


def _root(logs: Array, at_targets: float) -> float:
    """The inverse temperature b at which the mean of E_b[logs] is ``at_targets``; it increases with b."""
    low, high = -math.log(TEMPERATURES[1]), -math.log(TEMPERATURES[0])
    point = 0.0  # ln b
    for _ in range(MAX_ITERATIONS):
        mean, variance = _moments(logs, math.exp(point))
        excess, slope = mean - at_targets, variance * math.exp(point)
        low, high = (point, high) if excess < 0 else (low, point)
        following = point - excess / slope if slope > 0 else math.inf
        if not low <= following <= high:
            following = (low + high) / 2
        if abs(following - point) <= TOLERANCE:
            return math.exp(following)
        point = following
    return math.exp(point)


def _moments(logs: Array, inverse: float) -> tuple[float, float]:
    """Mean over examples of the expectation and of the variance of ``logs`` under softmax(inverse logs)."""
    weights = np.exp(inverse * logs)
    weights /= weights.sum(axis=1, keepdims=True)
    means = np.einsum("nc,nc->n", weights, logs)
    squares = np.einsum("nc,nc,nc->n", weights, logs, logs)
    return float(means.mean()), float((squares - means**2).mean())


def expected_calibration_error(confidence: Array, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error with bins of equal width (Naeini et al. 2015; Guo et al. 2017).

    The sum over bins of their share of the examples times |accuracy - mean confidence|. Bin b = 1, ..., B
    holds the confidences in ((b - 1)/B, b/B]; the first holds 0 as well.

    Args:
        confidence: probability of the predicted class, [N], in [0, 1].
        correct: [N], whether each prediction is right.
        bins: B.

    Raises:
        DataError: shapes that differ, or no examples.
    """
    confidence, correct = check_predictions(confidence, correct)
    inner = np.arange(1, bins) / bins
    index = np.searchsorted(inner, confidence, side="left")
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def adaptive_ece(confidence: Array, correct: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error with bins of equal mass (Nguyen & O'Connor 2015; Nixon et al. 2019).

    The sum over bins of their share of the examples times |accuracy - mean confidence|. In the order of
    increasing confidence, bin b = 1, ..., B holds the examples of rank above floor((b - 1) N/B) up to
    floor(b N/B). Where a group of equal confidences is divided between bins, each part has the accuracy of
    the whole group, so the value does not depend on the order of the examples.

    Args:
        confidence: probability of the predicted class, [N], in [0, 1].
        correct: [N], whether each prediction is right.
        bins: B; where B exceeds N some are empty and do not count.

    Raises:
        DataError: shapes that differ, or no examples.
    """
    confidence, correct = check_predictions(confidence, correct)
    ordered, right = by_confidence(confidence, correct.astype(np.float64))
    edges = np.unique(np.arange(bins + 1) * len(ordered) // bins)
    gaps = np.add.reduceat(right - ordered, edges[:-1])
    return float(np.abs(gaps).sum() / len(ordered))
