"""Logits [members, examples, classes] as they are handed in: whether they fit, and their log-softmax."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossray.errors import DataError

Array = NDArray[np.float64]
Logits = NDArray[np.floating[Any]]
Targets = NDArray[np.integer[Any]]


def check_logits(logits: Logits, dimensions: tuple[str, ...] = ("members", "examples", "classes")) -> Logits:
    """The logits as an array of numbers; values that are not finite pass.

    Raises:
        DataError: another number of dimensions, one of length 0, or no real numbers.
    """
    array = np.asarray(logits)
    if array.dtype.kind not in "fiu":
        raise DataError(f"logits: found {array.dtype}; allowed: real numbers")
    if array.ndim != len(dimensions):
        raise DataError(f"logits: found shape {_shape(array)}; allowed: [{', '.join(dimensions)}]")
    if 0 in array.shape:
        raise DataError(f"logits: found shape {_shape(array)}, without {dimensions[array.shape.index(0)]}")
    return array


def check_targets(targets: Targets, shape: tuple[int, int]) -> Targets:
    """The targets as an array of classes that fits logits of shape [..., *shape].

    Raises:
        DataError: another shape, no integers, or a class that does not exist.
    """
    array = np.asarray(targets)
    examples, classes = shape
    if array.shape != (examples,):
        raise DataError(f"targets: found shape {_shape(array)}; allowed: [{examples}], as the logits have it")
    if array.dtype.kind not in "iu":
        raise DataError(f"targets: found {array.dtype}; allowed: integers, the classes")
    if array.min() < 0 or array.max() >= classes:
        wrong = array[(array < 0) | (array >= classes)][0]
        raise DataError(f"targets: found class {wrong}; allowed: 0 to {classes - 1}, as the logits have it")
    return array


def check_predictions(confidence: Array, correct: NDArray[np.bool_]) -> tuple[Array, NDArray[np.bool_]]:
    """Both as arrays, [N] each.

    Raises:
        DataError: shapes that differ, or no examples.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.bool_)
    if confidence.ndim != 1 or confidence.shape != correct.shape or not confidence.size:
        shapes = f"{_shape(confidence)} and {_shape(correct)}"
        raise DataError(f"confidence and correct: found shapes {shapes}; allowed: [examples] both")
    return confidence, correct


def finite_members(logits: Logits) -> NDArray[np.bool_]:
    """Which members have finite logits for all examples, [members]; the others have diverged."""
    return np.array([bool(np.isfinite(member).all()) for member in logits])


def log_softmax(logits: Logits, *, temperature: float = 1.0) -> Array:
    """The log-softmax of logits / temperature over the last axis, [..., classes] float64.

    In memory the classes come first: sums over a last axis of ten are several times slower than ten sums of
    long vectors.
    """
    shifted = np.array(np.moveaxis(logits, -1, 0), dtype=np.float64, order="C")
    shifted -= shifted.max(axis=0)  # before the division: nothing overflows
    shifted /= temperature
    shifted -= np.log(np.exp(shifted).sum(axis=0))
    return np.moveaxis(shifted, 0, -1)


def _shape(array: NDArray[Any]) -> str:
    return str(list(array.shape))
