"""Temperature scaling and calibration errors: against searches and loops, and in the limits."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from lossray.ensembles import calibration
from lossray.ensembles.calibration import (
    TEMPERATURES,
    adaptive_ece,
    expected_calibration_error,
    fit_temperature,
)
from lossray.ensembles.logits import Array, Logits, Targets
from lossray.ensembles.selection import aurc
from lossray.errors import DataError


def _logits(examples: int, classes: int, seed: int, scale: float = 2.0) -> tuple[Array, Targets]:
    """Logits, and targets drawn from their softmax: calibrated at T = 1."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(examples, classes))
    drawn = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return logits, drawn


def _nll(logits: Logits, targets: Targets, temperature: float) -> float:
    logs = log_softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=1)
    return -float(logs[np.arange(len(targets)), targets].mean())


def _predictions(examples: int, seed: int, levels: int | None = None) -> tuple[Array, np.ndarray]:
    """Confidences in (0, 1), rounded to so many levels, and whether predictions are right."""
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(size=examples)
    if levels is not None:
        confidence = np.ceil(confidence * levels) / levels
    return confidence, rng.uniform(size=examples) < confidence**2


@pytest.mark.parametrize(("classes", "scale"), [(2, 0.3), (3, 2.0), (10, 1.0), (10, 30.0), (100, 3.0)])
def test_the_minimum_is_that_of_a_search(classes: int, scale: float) -> None:
    logits, targets = _logits(400, classes, seed=classes)
    logits *= scale
    found = fit_temperature(logits, targets)
    searched = minimize_scalar(
        lambda u: _nll(logits, targets, math.exp(u)),
        bounds=(-8, 8),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert math.log(found) == pytest.approx(searched.x, abs=1e-5)
    assert _nll(logits, targets, found) <= searched.fun + 1e-14
    step = 1e-4  # the slope is 0 at the minimum: by central differences
    slope = _nll(logits, targets, found * (1 + step)) - _nll(logits, targets, found * (1 - step))
    assert abs(slope) < 1e-10


@pytest.mark.parametrize("scale", [1e-3, 0.2, 1.0, 7.0, 1e4])
def test_the_temperature_of_calibrated_logits_is_their_scale(scale: float) -> None:
    logits, targets = _logits(40_000, 5, seed=0)
    assert fit_temperature(scale * logits, targets) == pytest.approx(scale, rel=0.02)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 300.0, 1e4])
def test_scaled_logits_scale_the_temperature(scale: float) -> None:
    logits, targets = _logits(200, 4, seed=1)
    assert fit_temperature(scale * logits, targets) == pytest.approx(
        scale * fit_temperature(logits, targets), rel=1e-9
    )


def test_a_constant_per_example_and_the_order_of_examples_do_not_matter() -> None:
    logits, targets = _logits(300, 6, seed=2)
    plain = fit_temperature(logits, targets)
    shifts = 100 * np.random.default_rng(3).normal(size=(300, 1))
    assert fit_temperature(logits + shifts, targets) == pytest.approx(plain, rel=1e-10)
    order = np.random.default_rng(4).permutation(300)
    assert fit_temperature(logits[order], targets[order]) == pytest.approx(plain, rel=1e-10)


def test_a_split_without_an_error_leaves_the_temperature_at_1() -> None:
    logits, _ = _logits(50, 5, seed=5)
    right = logits.argmax(axis=1)
    assert fit_temperature(logits, right) == 1
    tied = np.array([[2.0, 2.0, 0.0], [0.0, 1.0, 0.0]])  # the target is one of the most probable
    assert fit_temperature(tied, np.array([1, 1])) == 1
    one_wrong = right.copy()
    one_wrong[0] = np.argsort(logits[0])[-2]
    found = fit_temperature(logits, one_wrong)
    assert 0 < found < 1
    assert _nll(logits, one_wrong, found) < _nll(logits, one_wrong, 1.0)


def test_one_class_and_equal_probabilities_leave_the_temperature_at_1() -> None:
    assert fit_temperature(np.random.default_rng(6).normal(size=(7, 1)), np.zeros(7, dtype=int)) == 1
    assert fit_temperature(np.full((7, 3), 4.0), np.arange(7) % 3) == 1


def test_targets_of_one_class_alone_are_no_special_case() -> None:
    logits, _ = _logits(100, 3, seed=7)
    logits[:, 1] += 2
    found = fit_temperature(logits, np.ones(100, dtype=int))
    assert TEMPERATURES[0] < found < TEMPERATURES[1]
    assert _nll(logits, np.ones(100, dtype=int), found) < _nll(logits, np.ones(100, dtype=int), 1.01 * found)


def test_logits_worse_than_chance_reach_the_upper_bound() -> None:
    logits, _ = _logits(50, 4, seed=8)
    targets = logits.argmin(axis=1)
    assert fit_temperature(logits, targets) == TEMPERATURES[1]
    assert _nll(logits, targets, TEMPERATURES[1]) == pytest.approx(math.log(4), abs=1e-4)


def test_logits_that_hardly_differ_reach_the_lower_bound() -> None:
    logits, targets = _logits(200, 4, seed=1)
    assert fit_temperature(1e-12 * logits, targets) == pytest.approx(TEMPERATURES[0], rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_temperature_of_what_is_not_finite_is_nan(bad: float) -> None:
    logits, targets = _logits(10, 3, seed=9)
    logits[4, 2] = bad
    assert math.isnan(fit_temperature(logits, targets))


def test_the_input_is_left_as_it_is() -> None:
    logits, targets = _logits(10, 3, seed=10)
    before = logits.copy()
    fit_temperature(logits, targets)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(("examples", "bins"), [(200, 15), (1000, 10), (7, 15), (1, 1)])
@pytest.mark.parametrize("levels", [None, 15, 30])
def test_calibration_error_is_that_of_a_loop(examples: int, bins: int, levels: int | None) -> None:
    confidence, correct = _predictions(examples, seed=11, levels=levels)
    expected = 0.0
    for b in range(bins):
        # The first bin is open below, the last above: what rounding puts outside belongs to them.
        low, high = b / bins if b else -math.inf, (b + 1) / bins if b + 1 < bins else math.inf
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert expected_calibration_error(confidence, correct, bins) == pytest.approx(expected, abs=1e-14)


def test_bins_are_closed_on_the_right() -> None:
    """1/2 shares a bin with 1/4, and not with 3/4: the gaps of the first two cancel."""
    confidence, correct = np.array([0.25, 0.5, 0.75]), np.array([False, True, True])
    expected = (abs(-0.25 + 0.5) + 0.25) / 3
    assert expected_calibration_error(confidence, correct, bins=2) == pytest.approx(expected, rel=1e-15)
    ends = np.array([0.0, 1.0])
    assert expected_calibration_error(ends, np.array([False, True])) == 0
    assert expected_calibration_error(ends, np.array([True, False])) == 1


@pytest.mark.parametrize(("examples", "bins"), [(200, 15), (1000, 10), (7, 15), (1, 15), (15, 15)])
def test_adaptive_calibration_error_is_that_of_a_loop(examples: int, bins: int) -> None:
    confidence, correct = _predictions(examples, seed=12)
    order = np.argsort(confidence)
    expected = 0.0
    for b in range(bins):
        inside = order[b * examples // bins : (b + 1) * examples // bins]
        if len(inside):
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += len(inside) / examples * gap
    assert adaptive_ece(confidence, correct, bins) == pytest.approx(expected, abs=1e-14)


def test_a_tied_group_has_its_accuracy_in_every_bin() -> None:
    """Ten examples at 0.7, seven of them right: calibrated, however they are divided and ordered."""
    confidence, correct = np.full(10, 0.7), np.arange(10) < 7
    for order in (np.arange(10), np.arange(10)[::-1]):
        assert adaptive_ece(confidence, correct[order], bins=4) == pytest.approx(0, abs=1e-15)
    assert adaptive_ece(confidence, ~correct, bins=4) == pytest.approx(0.4, rel=1e-14)


def test_predictions_that_are_calibrated_have_small_errors() -> None:
    rng = np.random.default_rng(13)
    confidence = rng.uniform(size=100_000)
    correct = rng.uniform(size=100_000) < confidence
    for error in (expected_calibration_error, adaptive_ece):
        assert error(confidence, correct) < 0.01
        assert error(confidence**2, correct) == pytest.approx(1 / 2 - 1 / 3, abs=0.01)


@pytest.mark.parametrize("examples", [1, 2, 50])
def test_aurc_is_that_of_a_loop(examples: int) -> None:
    confidence, correct = _predictions(examples, seed=14)
    order = np.argsort(-confidence)
    risks = [1 - correct[order[: n + 1]].mean() for n in range(examples)]
    assert aurc(confidence, correct) == pytest.approx(np.mean(risks), rel=1e-13)


def test_aurc_of_ties_is_the_average_over_their_orders() -> None:
    confidence, correct = _predictions(40, seed=15, levels=4)
    rng = np.random.default_rng(16)
    risks = []
    for _ in range(4000):
        order = np.lexsort((rng.uniform(size=40), -confidence))
        risks.append(np.mean(np.cumsum(~correct[order]) / np.arange(1, 41)))
    noise = np.std(risks) / math.sqrt(len(risks))
    assert noise > 0
    assert abs(aurc(confidence, correct) - np.mean(risks)) < 4 * noise
    assert aurc(np.full(40, 0.3), correct) == pytest.approx(1 - correct.mean(), rel=1e-14)


def test_aurc_by_hand() -> None:
    confidence = np.array([0.9, 0.8, 0.7])
    assert aurc(confidence, np.array([True, True, False])) == pytest.approx(1 / 9)
    assert aurc(confidence, np.array([False, True, True])) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert aurc(confidence**3, np.array([False, True, True])) == aurc(
        confidence, np.array([False, True, True])
    )


@pytest.mark.parametrize("function", [expected_calibration_error, adaptive_ece, aurc])
@pytest.mark.parametrize("levels", [None, 6])
def test_the_order_of_examples_does_not_matter(function, levels: int | None) -> None:
    confidence, correct = _predictions(100, seed=17, levels=levels)
    order = np.random.default_rng(18).permutation(100)
    shuffled = function(confidence[order], correct[order])
    assert shuffled == pytest.approx(function(confidence, correct), rel=1e-12)


@pytest.mark.parametrize("function", [expected_calibration_error, adaptive_ece, aurc])
def test_predictions_that_do_not_fit_are_refused(function) -> None:
    with pytest.raises(DataError, match=r"found shapes \[3\] and \[2\]"):
        function(np.ones(3), np.ones(2, dtype=bool))
    with pytest.raises(DataError, match=r"found shapes \[0\] and \[0\]"):
        function(np.ones(0), np.ones(0, dtype=bool))


def test_the_temperature_refuses_what_does_not_fit() -> None:
    logits, targets = _logits(6, 3, seed=19)
    with pytest.raises(DataError, match=r"found shape \[1, 6, 3\]; allowed: \[examples, classes\]"):
        fit_temperature(logits[None], targets)
    with pytest.raises(DataError, match=r"found shape \[5\]; allowed: \[6\]"):
        fit_temperature(logits, targets[:5])
    with pytest.raises(DataError, match="without examples"):
        fit_temperature(logits[:0], targets[:0])


@pytest.mark.parametrize(
    ("scale", "most"), [(1e-12, 50), (1e-5, 30), (1e-3, 20), (1, 8), (1e3, 20), (1e5, 30)]
)
def test_few_iterations_do(monkeypatch: pytest.MonkeyPatch, scale: float, most: int) -> None:
    """Newton's near the minimum; bisection alone, to a bound, halves ln T 44 times."""
    logits, targets = _logits(1000, 10, seed=20)
    points = []
    moments = calibration._moments
    monkeypatch.setattr(calibration, "_moments", lambda logs, at: points.append(at) or moments(logs, at))
    assert fit_temperature(scale * logits, targets) == pytest.approx(max(scale, TEMPERATURES[0]), rel=0.2)
    assert 1 < len(points) <= most
