"""Scores of an ensemble from its members' logits: of the mean of the softmax outputs, raw and calibrated."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lossray.ensembles.calibration import adaptive_ece, expected_calibration_error, fit_temperature
from lossray.ensembles.diversity import pairwise
from lossray.ensembles.logits import (
    Array,
    Logits,
    Targets,
    check_logits,
    check_targets,
    finite_members,
    log_softmax,
)
from lossray.ensembles.selection import aurc
from lossray.errors import DataError


@dataclass(frozen=True)
class Scores:
    """Scores of one ensemble on one split; all NaN where a member diverged.

    "Scaled" is after temperature scaling: pool, then calibrate, p ~ exp(log(pbar) / T). Only these are NaN
    where T is.

    Attributes:
        error: share of wrong predictions; predicted is the most probable class, the first of equals.
        nll: negative log-likelihood, nats.
        brier: sum over the classes of (p - one-hot)^2, mean over examples: 0 to 2.
        ece: expected calibration error, 15 bins of equal width.
        adaptive_ece: the same with 15 bins of equal mass.
        aurc: area under the risk-coverage curve, confidence = largest probability.
        nll_scaled: ``nll`` after temperature scaling.
        brier_scaled: ``brier`` after it.
        ece_scaled: ``ece`` after it.
        adaptive_ece_scaled: ``adaptive_ece`` after it.
        temperature: T.
        member_error: mean of the members' errors.
        member_nll: mean of the members' nll.
        disagreement: share of examples whose predicted classes differ, mean over pairs of members; NaN for
            one member.
        kl: symmetrised divergence, nats, mean over pairs; NaN for one member.
    """

    error: float
    nll: float
    brier: float
    ece: float
    adaptive_ece: float
    aurc: float
    nll_scaled: float
    brier_scaled: float
    ece_scaled: float
    adaptive_ece_scaled: float
    temperature: float
    member_error: float
    member_nll: float
    disagreement: float
    kl: float


@dataclass(frozen=True)
class ExampleScores:
    """The scores of every example; all NaN where a member diverged.

    Attributes:
        nll: [N], nats.
        nll_scaled: [N], after temperature scaling.
        error: [N], 1 where the prediction is wrong, 0 elsewhere.
    """

    nll: Array
    nll_scaled: Array
    error: Array


class PrefixScores(NamedTuple):
    """Scores of the first members of an ensemble.

    Attributes:
        members: how many of the first.
        validation: their scores on the validation split.
        test: those on the test split.
    """

    members: int
    validation: Scores
    test: Scores


def log_mean_probabilities(logits: Logits) -> Array:
    """The logarithm of the mean of the members' softmax outputs, [N, C] float64.

    Args:
        logits: [K, N, C].

    Raises:
        DataError: another number of dimensions, one of length 0, or no real numbers.
    """
    logits = check_logits(logits)
    _, pooled = deque(_running_means(logits), maxlen=1).pop()
    return pooled


def score(logits: Logits, targets: Targets, *, temperature: float) -> Scores:
    """The scores of one ensemble on one split.

    Args:
        logits: of the members, [K, N, C]; finite, otherwise every score is NaN.
        targets: classes, [N] integers.
        temperature: as `fit_temperature` gives it for the ensemble on the validation split.

    Raises:
        DataError: shapes that do not fit, no members or examples, targets that are not classes, or a
            temperature that is not positive.
    """
    logits, targets = _checked(logits, targets)
    temperature = _checked_temperature(temperature)
    whole = deque(_prefixes(logits, targets), maxlen=1).pop()
    return _scores(whole, targets, temperature)


def prefix_scores(
    validation_logits: Logits, validation_targets: Targets, logits: Logits, targets: Targets
) -> list[PrefixScores]:
    """The scores of the first 1, 2, ..., K members, the temperature of each fitted on the validation split.

    Args:
        validation_logits: of the members on the validation split, [K, Nv, C].
        validation_targets: classes, [Nv] integers.
        logits: on the test split, [K, N, C].
        targets: classes, [N] integers.

    Raises:
        DataError: as `score`, or the splits differ in members or classes.
    """
    validation_logits, validation_targets = _checked(validation_logits, validation_targets)
    logits, targets = _checked(logits, targets)
    test_shape, validation_shape = (shape[::2] for shape in (logits.shape, validation_logits.shape))
    if test_shape != validation_shape:
        raise DataError(
            f"test logits: found {_counts(*test_shape)}; allowed: {_counts(*validation_shape)}, as in "
            "validation"
        )
    both = zip(_prefixes(validation_logits, validation_targets), _prefixes(logits, targets), strict=True)
    rows = []
    for count, (validation, test) in enumerate(both, 1):
        temperature = fit_temperature(validation.pooled, validation_targets)
        on_validation = _scores(validation, validation_targets, temperature)
        rows.append(PrefixScores(count, on_validation, _scores(test, targets, temperature)))
    return rows


def example_scores(logits: Logits, targets: Targets, *, temperature: float) -> ExampleScores:
    """The scores of every example; arguments and errors as `score`."""
    logits, targets = _checked(logits, targets)
    pooled = log_mean_probabilities(logits)
    scaled = log_softmax(pooled, temperature=_checked_temperature(temperature))
    return ExampleScores(_nll(pooled, targets), _nll(scaled, targets), _wrong(pooled, targets))


class _Prefix(NamedTuple):
    """The first members of an ensemble on one split."""

    pooled: Array  # [N, C], log of the mean of their softmax outputs
    means: dict[str, float]  # the scores that are means over members or pairs


def _prefixes(logits: Logits, targets: Targets) -> Iterator[_Prefix]:
    """The first 1, 2, ..., K members."""
    disagreement, kl = (_pair_means(pairs) for pairs in pairwise(logits))
    error, nll = 0.0, 0.0
    for i, (logs, pooled) in enumerate(_running_means(logits)):
        error += float(np.mean(_wrong(logs, targets)))
        nll += float(np.mean(_nll(logs, targets)))
        members = {"member_error": error / (i + 1), "member_nll": nll / (i + 1)}
        yield _Prefix(pooled, {**members, "disagreement": float(disagreement[i]), "kl": float(kl[i])})


def _running_means(logits: Logits) -> Iterator[tuple[Array, Array]]:
    """Of each member the log-softmax, and log of the mean softmax of the members so far, [N, C] each.

    In logarithms throughout: a probability of exp(-10000) is as good as any other. From the first member
    that diverged on both are NaN.
    """
    total: Array = np.array(-np.inf)
    healthy = np.logical_and.accumulate(finite_members(logits))
    for i, member in enumerate(logits):
        logs = log_softmax(member) if healthy[i] else np.full(member.shape, np.nan)
        total = np.logaddexp(total, logs) if healthy[i] else logs
        yield logs, np.minimum(total - math.log(i + 1), 0)  # rounding may lead above


def _pair_means(pairs: Array) -> Array:
    """Mean over the pairs of the first 1, 2, ..., K members, [K]; NaN for one."""
    counts = np.arange(len(pairs)) * np.arange(1, len(pairs) + 1) / 2
    return np.append(np.nan, np.cumsum(np.triu(pairs, 1).sum(axis=0))[1:] / counts[1:])


def _scores(prefix: _Prefix, targets: Targets, temperature: float) -> Scores:
    if not np.isfinite(prefix.pooled).all():
        return Scores(**dict.fromkeys((field.name for field in fields(Scores)), math.nan))
    wrong = _wrong(prefix.pooled, targets)
    raw = _calibration(prefix.pooled, targets, wrong == 0)
    scaled = _calibration(log_softmax(prefix.pooled, temperature=temperature), targets, wrong == 0)
    return Scores(
        error=float(np.mean(wrong)),
        aurc=aurc(prefix.pooled.max(axis=1), wrong == 0),
        temperature=temperature,
        **raw,
        **{f"{name}_scaled": value for name, value in scaled.items()},
        **prefix.means,
    )


def _calibration(logs: Array, targets: Targets, right: NDArray[np.bool_]) -> dict[str, float]:
    """The scores that temperature scaling changes, of log-probabilities [N, C]."""
    probabilities = np.exp(logs)
    confidence = probabilities.max(axis=1)
    probabilities[np.arange(len(targets)), targets] -= 1  # now p - one-hot
    return {
        "nll": float(np.mean(_nll(logs, targets))),
        "brier": float(np.square(probabilities).sum() / len(targets)),
        "ece": expected_calibration_error(confidence, right),
        "adaptive_ece": adaptive_ece(confidence, right),
    }


def _nll(logs: Array, targets: Targets) -> Array:
    """Of every example, [N] nats, from log-probabilities [N, C]."""
    return np.asarray(-logs[np.arange(len(targets)), targets])


def _wrong(logs: Array, targets: Targets) -> Array:
    """1 where the most probable class is not the target, 0 elsewhere, NaN where probabilities are; [N]."""
    wrong: Array = np.where(np.isnan(logs[:, 0]), np.nan, logs.argmax(axis=1) != targets)
    return wrong


def _checked(logits: Logits, targets: Targets) -> tuple[Logits, Targets]:
    logits = check_logits(logits)
    return logits, check_targets(targets, logits.shape[1:])


def _checked_temperature(temperature: float) -> float:
    if temperature <= 0 or math.isinf(temperature):
        raise DataError(f"temperature: found {temperature}; allowed: positive numbers")
    return temperature


def _counts(members: int, classes: int) -> str:
    return f"{members} members and {classes} classes"
