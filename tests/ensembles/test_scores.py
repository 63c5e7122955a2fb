"""Scores of ensembles: against scikit-learn, what must not matter, and members that diverged."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.metrics import log_loss, zero_one_loss

from lossray.ensembles.calibration import adaptive_ece, expected_calibration_error, fit_temperature
from lossray.ensembles.diversity import pairwise
from lossray.ensembles.scores import Scores, example_scores, log_mean_probabilities, prefix_scores, score
from lossray.ensembles.selection import aurc
from lossray.errors import DataError

PAIRS = ("disagreement", "kl")
SCALED = ("nll_scaled", "brier_scaled", "ece_scaled", "adaptive_ece_scaled")
NAMES = tuple(field.name for field in dataclasses.fields(Scores))


def _ensemble(members: int, examples: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Members that have something in common, and targets that they often but not always get right."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, classes, size=examples)
    common = rng.normal(size=(examples, classes)) + 2 * np.eye(classes)[targets]
    return 1.5 * common + rng.normal(size=(members, examples, classes)), targets


def _close(found: Scores, expected: Scores, *, rel: float = 1e-10) -> None:
    assert dataclasses.asdict(found) == pytest.approx(
        dataclasses.asdict(expected), rel=rel, abs=1e-14, nan_ok=True
    )


@pytest.mark.parametrize(("members", "classes"), [(1, 3), (4, 10), (3, 2), (2, 1)])
def test_scores_are_those_of_scikit_learn_and_of_loops(members: int, classes: int) -> None:
    logits, targets = _ensemble(members, 300, classes, seed=0)
    temperature, labels = 1.7, list(range(max(2, classes)))
    found = score(logits, targets, temperature=temperature)
    single = softmax(logits, axis=2)
    pooled = single.mean(axis=0)
    scaled = softmax(np.log(pooled) / temperature, axis=1)
    for p, suffix in ((pooled, ""), (scaled, "_scaled")):
        padded = p if classes > 1 else np.hstack([p, 1 - p])  # scikit-learn wants two classes
        confidence, right = p.max(axis=1), p.argmax(axis=1) == targets
        one_hot = np.eye(classes)[targets]
        expected = {
            "nll": log_loss(targets, padded, labels=labels),
            "brier": np.mean([((p[n] - one_hot[n]) ** 2).sum() for n in range(len(p))]),
            "ece": expected_calibration_error(confidence, right),
            "adaptive_ece": adaptive_ece(confidence, right),
        }
        assert {name: getattr(found, f"{name}{suffix}") for name in expected} == pytest.approx(
            expected, rel=1e-10, abs=1e-14
        )
    assert found.error == pytest.approx(zero_one_loss(targets, pooled.argmax(axis=1)), rel=1e-12)
    assert found.aurc == pytest.approx(aurc(pooled.max(axis=1), pooled.argmax(axis=1) == targets), rel=1e-12)
    errors = [zero_one_loss(targets, p.argmax(axis=1)) for p in single]
    losses = [-np.log(p[np.arange(300), targets]).mean() for p in single]
    assert found.member_error == pytest.approx(np.mean(errors), rel=1e-12)
    assert found.member_nll == pytest.approx(np.mean(losses), rel=1e-12, abs=1e-14)
    assert found.temperature == temperature


def test_diversity_is_the_mean_over_pairs() -> None:
    logits, targets = _ensemble(5, 100, 4, seed=1)
    found = score(logits, targets, temperature=1.0)
    pairs = [(i, j) for j in range(5) for i in range(j)]
    for name, values in pairwise(logits)._asdict().items():
        assert getattr(found, name) == pytest.approx(np.mean([values[pair] for pair in pairs]), rel=1e-12)


def test_one_member_is_its_own_ensemble_without_diversity() -> None:
    logits, targets = _ensemble(1, 200, 5, seed=2)
    found = score(logits, targets, temperature=1.3)
    assert found.error == found.member_error > 0
    assert found.nll == found.member_nll > 0
    assert math.isnan(found.disagreement)
    assert math.isnan(found.kl)
    repeated = score(np.repeat(logits, 3, axis=0), targets, temperature=1.3)
    _close(dataclasses.replace(repeated, disagreement=math.nan, kl=math.nan), found)
    assert repeated.disagreement == 0
    assert repeated.kl == pytest.approx(0, abs=1e-14)


def test_a_temperature_of_1_changes_nothing() -> None:
    found = score(*_ensemble(3, 100, 4, seed=3), temperature=1.0)
    for name in SCALED:
        assert getattr(found, name) == pytest.approx(getattr(found, name.removesuffix("_scaled")), rel=1e-12)


def test_neither_order_nor_constants_matter() -> None:
    logits, targets = _ensemble(4, 120, 5, seed=4)
    plain = score(logits, targets, temperature=0.8)
    rng = np.random.default_rng(5)
    _close(score(logits[rng.permutation(4)], targets, temperature=0.8), plain)
    order = rng.permutation(120)
    _close(score(logits[:, order], targets[order], temperature=0.8), plain)
    _close(score(logits + 50 * rng.normal(size=(4, 120, 1)), targets, temperature=0.8), plain)
    classes = rng.permutation(5)
    _close(score(logits[:, :, classes], np.argsort(classes)[targets], temperature=0.8), plain)


def test_the_mean_is_of_probabilities_and_not_of_logits() -> None:
    logits = np.array([[[4.0, 0.0]], [[-1.0, 0.0]]])
    expected = np.log(softmax(logits, axis=2).mean(axis=0))
    assert log_mean_probabilities(logits) == pytest.approx(expected, rel=1e-14)
    assert log_mean_probabilities(logits) != pytest.approx(np.log(softmax(logits.mean(axis=0), axis=1)))


def test_pooling_is_no_worse_than_its_members_on_average() -> None:
    """Jensen's inequality, for convex losses."""
    logits, targets = _ensemble(6, 200, 4, seed=6)
    found = score(logits, targets, temperature=1.0)
    briers = [score(member[None], targets, temperature=1.0).brier for member in logits]
    assert found.nll < found.member_nll
    assert found.brier < np.mean(briers)


def test_extreme_logits_do_not_overflow() -> None:
    logits = 1e4 * np.eye(3)[[[0, 1, 2], [1, 1, 2]]]  # [2, 3, 3]: the members disagree on the first
    right = score(logits[:1], np.array([0, 1, 2]), temperature=1e-2)
    assert (right.error, right.nll, right.brier, right.nll_scaled, right.ece) == (0, 0, 0, 0, 0)
    wrong = score(logits[:1], np.array([1, 1, 2]), temperature=1e-2)
    assert wrong.nll == pytest.approx(1e4 / 3, rel=1e-12)
    assert wrong.nll_scaled == pytest.approx(1e6 / 3, rel=1e-12)
    both = score(logits, np.array([0, 1, 2]), temperature=1.0)
    assert both.nll == pytest.approx(math.log(2) / 3, rel=1e-12)
    assert both.kl == pytest.approx(1e4 / 3, rel=1e-12)
    assert all(math.isfinite(value) for value in dataclasses.asdict(both).values())


def test_probabilities_that_underflow_keep_their_logarithm() -> None:
    logits = np.array([[[0.0, -2000.0]], [[0.0, -1500.0]]])
    assert log_mean_probabilities(logits)[0, 1] == pytest.approx(-1500 - math.log(2), rel=1e-12)
    assert score(logits, np.array([1]), temperature=1.0).nll == pytest.approx(1500 + math.log(2), rel=1e-12)


def test_rounding_makes_no_probability_larger_than_1() -> None:
    certain = np.array([[[1e3, 0.0], [0.0, 1e3]]])
    means = [log_mean_probabilities(np.repeat(certain, m, axis=0)) for m in range(1, 30)]
    assert all(values.max() <= 0 for values in means)
    assert np.array(means)[:, [0, 1], [0, 1]] == pytest.approx(np.zeros((29, 2)), abs=1e-14)


def test_prefixes_are_the_scores_of_the_first_members() -> None:
    validation, validation_targets = _ensemble(4, 150, 5, seed=7)
    test, targets = _ensemble(4, 80, 5, seed=8)
    rows = prefix_scores(validation, validation_targets, test, targets)
    assert [row.members for row in rows] == [1, 2, 3, 4]
    for m, on_validation, on_test in rows:
        temperature = fit_temperature(log_mean_probabilities(validation[:m]), validation_targets)
        _close(on_validation, score(validation[:m], validation_targets, temperature=temperature))
        _close(on_test, score(test[:m], targets, temperature=temperature))
        assert on_validation.nll_scaled < on_validation.nll
        assert on_validation.temperature == on_test.temperature == temperature


def test_example_scores_average_to_the_scores() -> None:
    logits, targets = _ensemble(3, 90, 4, seed=9)
    whole = score(logits, targets, temperature=1.4)
    found = example_scores(logits, targets, temperature=1.4)
    for name in ("nll", "nll_scaled", "error"):
        values = getattr(found, name)
        assert values.shape == (90,)
        assert values.mean() == pytest.approx(getattr(whole, name), rel=1e-12)
    assert set(found.error) == {0, 1}


def test_float32_tensors_and_any_integers_will_do() -> None:
    logits, targets = _ensemble(3, 60, 4, seed=10)
    logits = logits.astype(np.float32)
    plain = score(logits.astype(np.float64), targets, temperature=1.0)
    _close(score(torch.from_numpy(logits), torch.from_numpy(targets), temperature=1.0), plain)
    _close(score(logits, targets.astype(np.uint8), temperature=1.0), plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_diverged_member_leaves_the_prefixes_before_it(bad: float) -> None:
    logits, targets = _ensemble(4, 50, 3, seed=11)
    expected = prefix_scores(logits[:2], targets, logits[:2], targets)
    logits[2, 7, 1] = bad
    rows = prefix_scores(logits, targets, logits, targets)
    for row, known in zip(rows[:2], expected, strict=True):
        _close(row.validation, known.validation)
        _close(row.test, known.test)
    for row in rows[2:]:
        for scores in (row.validation, row.test):
            assert all(math.isnan(value) for value in dataclasses.asdict(scores).values())
    for values in dataclasses.asdict(example_scores(logits, targets, temperature=1.0)).values():
        assert np.isnan(values).all()


def test_without_a_temperature_only_the_scaled_scores_are_missing() -> None:
    logits, targets = _ensemble(2, 50, 3, seed=12)
    found = dataclasses.asdict(score(logits, targets, temperature=math.nan))
    assert {name for name, value in found.items() if math.isnan(value)} == {*SCALED, "temperature"}
    spoilt = logits.copy()
    spoilt[0, 0, 0] = math.nan
    (_, first), (_, second) = (
        (row.members, row.test) for row in prefix_scores(spoilt, targets, logits, targets)
    )
    assert math.isnan(first.nll_scaled)
    assert dataclasses.asdict(second) == pytest.approx(found, rel=1e-10, nan_ok=True)


def test_nothing_warns_and_nothing_changes(recwarn: pytest.WarningsRecorder) -> None:
    logits, targets = _ensemble(3, 30, 3, seed=13)
    logits[1] = math.nan
    before = logits.copy()
    prefix_scores(logits, targets, logits, targets)
    example_scores(logits, targets, temperature=1.0)
    assert not recwarn.list
    assert np.array_equal(logits, before, equal_nan=True)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.zeros(5, dtype=int), r"targets: found shape \[5\]; allowed: \[6\]"),
        (np.zeros((6, 1), dtype=int), r"targets: found shape \[6, 1\]; allowed: \[6\]"),
        (np.zeros(6), "targets: found float64; allowed: integers"),
        (np.zeros(6, dtype=bool), "targets: found bool; allowed: integers"),
        (np.array([0, 1, 2, 3, 0, 0]), "targets: found class 3; allowed: 0 to 2"),
        (np.array([0, 1, 2, -1, 0, 0]), "targets: found class -1; allowed: 0 to 2"),
    ],
)
def test_targets_that_do_not_fit_are_refused(targets: np.ndarray, message: str) -> None:
    logits = np.zeros((2, 6, 3))
    for function in (score, example_scores):
        with pytest.raises(DataError, match=message):
            function(logits, targets, temperature=1.0)
    with pytest.raises(DataError, match=message):
        prefix_scores(logits, np.zeros(6, dtype=int), logits, targets)


@pytest.mark.parametrize("shape", [(6, 3), (0, 6, 3), (2, 0, 3), (2, 6, 0), (1, 2, 6, 3)])
def test_logits_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    logits, targets = np.zeros(shape), np.zeros(6, dtype=int)
    for function in (score, example_scores):
        with pytest.raises(DataError, match="logits: found shape"):
            function(logits, targets, temperature=1.0)
    with pytest.raises(DataError, match="logits: found shape"):
        log_mean_probabilities(logits)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf])
def test_temperatures_that_are_none_are_refused(temperature: float) -> None:
    for function in (score, example_scores):
        with pytest.raises(DataError, match=f"temperature: found {temperature}; allowed: positive"):
            function(*_ensemble(2, 6, 3, seed=14), temperature=temperature)


@pytest.mark.parametrize("shape", [(3, 6, 3), (2, 6, 4)])
def test_splits_of_different_ensembles_are_refused(shape: tuple[int, int, int]) -> None:
    targets = np.zeros(6, dtype=int)
    with pytest.raises(DataError, match="test logits: found 2 members and 3 classes; allowed: "):
        prefix_scores(np.zeros(shape), targets, np.zeros((2, 6, 3)), targets)
