"""Diversity: how much the predictions of an ensemble's members differ, pair by pair."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossray.ensembles.logits import Array, Logits, check_logits, finite_members, log_softmax

BLOCK = 2**20  # numbers that are worked on at once: 8 MiB in float64


class Diversity(NamedTuple):
    """Differences of the members' predictions: symmetric, 0 on the diagonal, NaN where a member diverged.

    Attributes:
        disagreement: [K, K], share of the examples whose predicted classes differ.
        kl: [K, K], (KL(p_i || p_j) + KL(p_j || p_i)) / 2, mean over the examples, nats.
    """

    disagreement: Array
    kl: Array


def pairwise(logits: Logits) -> Diversity:
    """Disagreement and divergence of every pair of members.

    The predicted class is the most probable one, the first of equals.

    Args:
        logits: [K, N, C]; the rows and columns of a member with a value that is not finite are NaN.

    Raises:
        DataError: another number of dimensions, one of length 0, or no real numbers.
    """
    logits = check_logits(logits)
    disagreement, kl = np.full((2, len(logits), len(logits)), np.nan)
    alive = np.flatnonzero(finite_members(logits))
    if alive.size:
        pairs = np.ix_(alive, alive)
        disagreement[pairs], kl[pairs] = _of_finite(logits, alive)
    return Diversity(disagreement, kl)


def _of_finite(logits: Logits, members: NDArray[np.intp]) -> Diversity:
    """The same of these members only, [k, k]; some examples at a time, so memory does not grow with them."""
    _, examples, classes = logits.shape
    differing, products = np.zeros((2, len(members), len(members)))
    size = max(1, BLOCK // (len(members) * classes))
    for start in range(0, examples, size):
        logs = log_softmax(logits[members, start : start + size])
        differing += _differing(logs)
        products += _products(logs)
    diagonal = products.diagonal()
    divergence = (diagonal[:, None] + diagonal - (products + products.T)) / 2
    return Diversity(differing / examples, np.maximum(divergence, 0) / examples)  # rounding may lead below


def _differing(logs: Array) -> Array:
    """How many predicted classes differ, [k, k]."""
    predicted = logs.argmax(axis=2)
    counts = np.zeros((len(logs), len(logs)))
    for i, classes in enumerate(predicted):
        counts[i, i + 1 :] = np.count_nonzero(predicted[i + 1 :] != classes, axis=1)
    return counts + counts.T


def _products(logs: Array) -> Array:
    """Sums over examples and classes of p_i log p_j, [k, k], up to what cancels from KL(i||j) + KL(j||i).

    That is the sum of (p_i - p_j) (log p_i - log p_j): what the p of all members have in common may be
    subtracted first, and then no digits are lost where they are nearly equal.
    """
    probabilities = np.exp(logs)
    probabilities -= probabilities.mean(axis=0)
    left, right = np.moveaxis(probabilities, 2, 0), np.moveaxis(logs, 2, 0)  # [C, k, n]
    return np.asarray(np.matmul(left, right.swapaxes(1, 2)).sum(axis=0))
