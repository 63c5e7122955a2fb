"""Selective prediction: the risk that remains where only the most confident predictions are kept."""

import numpy as np
from numpy.typing import NDArray

from lossray.ensembles.logits import Array, check_predictions


def aurc(confidence: Array, correct: NDArray[np.bool_]) -> float:
    """Area under the risk-coverage curve (Geifman & El-Yaniv 2017; Geifman et al. 2019).

    The mean over n = 1, ..., N of the error of the n most confident predictions. Where confidences are tied
    it is the average over all orders of the tied predictions, in closed form: those that are kept of a tied
    group have, on average, the group's error. So it does not depend on the order of the examples.

    Args:
        confidence: [N], larger is more confident; only the order matters.
        correct: [N], whether each prediction is right.

    Raises:
        DataError: shapes that differ, or no examples.
    """
    confidence, correct = check_predictions(confidence, correct)
    _, wrong = by_confidence(confidence, (~correct).astype(np.float64))
    kept = np.arange(1, len(wrong) + 1)
    return float(np.mean(np.cumsum(wrong[::-1]) / kept))


def by_confidence(confidence: Array, values: Array) -> tuple[Array, Array]:
    """Both in the order of increasing confidence; values of equal confidence are replaced by their mean."""
    order = np.argsort(confidence)
    confidence, values = confidence[order], values[order].astype(np.float64)
    starts = np.flatnonzero(np.append(True, confidence[1:] != confidence[:-1]))
    if len(starts) == len(values):
        return confidence, values
    sizes = np.diff(np.append(starts, len(values)))
    return confidence, np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
