"""Disagreement and divergence of pairs: against loops, and where rounding or divergence of members bites."""

import math

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from lossray.ensembles import diversity
from lossray.ensembles.diversity import pairwise
from lossray.errors import DataError


def _logits(members: int, examples: int, classes: int, seed: int) -> np.ndarray:
    return 3 * np.random.default_rng(seed).normal(size=(members, examples, classes))


@pytest.mark.parametrize("shape", [(5, 40, 7), (2, 1, 3), (3, 20, 2), (1, 4, 4)])
def test_both_are_those_of_a_loop(shape: tuple[int, int, int]) -> None:
    logits = _logits(*shape, seed=0)
    found = pairwise(logits)
    probabilities = softmax(logits, axis=2)
    for i in range(shape[0]):
        for j in range(shape[0]):
            differ = probabilities[i].argmax(axis=1) != probabilities[j].argmax(axis=1)
            there = rel_entr(probabilities[i], probabilities[j]).sum(axis=1)
            back = rel_entr(probabilities[j], probabilities[i]).sum(axis=1)
            assert found.disagreement[i, j] == differ.mean()
            assert found.kl[i, j] == pytest.approx((there + back).mean() / 2, rel=1e-12, abs=1e-15)


def test_blocks_of_examples_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(4, 50, 3, seed=1)
    whole = pairwise(logits)
    for block in (1, 4 * 3 * 7):  # one example at a time; seven, with one left over
        monkeypatch.setattr(diversity, "BLOCK", block)
        found = pairwise(logits)
        assert np.array_equal(found.disagreement, whole.disagreement)
        assert found.kl == pytest.approx(whole.kl, rel=1e-12)


def test_symmetric_with_a_diagonal_of_exact_zeros() -> None:
    for values in pairwise(_logits(6, 30, 4, seed=2)):
        assert np.array_equal(values, values.T)
        assert np.array_equal(values.diagonal(), np.zeros(6))
        assert (values[~np.eye(6, dtype=bool)] > 0).all()


def test_members_that_are_nearly_equal_lose_no_digits() -> None:
    """To leading order the divergence is half the variance of the difference of the logits."""
    base, change = _logits(1, 100, 5, seed=3)[0], _logits(1, 100, 5, seed=4)[0]
    found = pairwise(np.stack([base - 1e-6 * change / 2, base + 1e-6 * change / 2])).kl[0, 1]
    p = softmax(base, axis=1)
    variance = (p * change**2).sum(axis=1) - (p * change).sum(axis=1) ** 2
    assert found == pytest.approx(1e-12 * variance.mean() / 2, rel=1e-7, abs=0)


def test_equal_members_do_not_differ() -> None:
    logits = np.repeat(_logits(1, 20, 5, seed=5), 3, axis=0)
    shifted = logits + np.array([0.0, 10.0, -300.0])[:, None, None]
    for values in pairwise(shifted):
        assert values == pytest.approx(np.zeros((3, 3)), abs=1e-15)


def test_two_classes_in_closed_form() -> None:
    """Of Bernoulli variables with log-odds a and b: (p - q) (a - b) / 2."""
    a, b = 1.3, -0.4
    logits = np.array([[[a, 0.0]], [[b, 0.0]]])
    p, q = 1 / (1 + math.exp(-a)), 1 / (1 + math.exp(-b))
    found = pairwise(logits)
    assert found.kl[0, 1] == pytest.approx((p - q) * (a - b) / 2, rel=1e-14)
    assert found.disagreement[0, 1] == 1


def test_extreme_logits_do_not_overflow() -> None:
    """Certain of different classes: each divergence is the whole difference of the logits."""
    logits = np.array([[[1e4, -1e4]], [[-1e4, 1e4]]])
    assert pairwise(logits).kl[0, 1] == pytest.approx(2e4, rel=1e-12)
    assert pairwise(logits.astype(np.float32)).kl[0, 1] == pytest.approx(2e4, rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_member_spoils_its_own_pairs_alone(bad: float) -> None:
    logits = _logits(4, 30, 3, seed=6)
    others = pairwise(logits[[0, 1, 3]])
    logits[2, 7, 1] = bad
    for values, expected in zip(pairwise(logits), others, strict=True):
        assert np.isnan(values[2]).all()
        assert np.isnan(values[:, 2]).all()
        assert values[np.ix_([0, 1, 3], [0, 1, 3])] == pytest.approx(expected, rel=1e-12)


def test_members_that_have_all_diverged_have_no_diversity() -> None:
    for values in pairwise(np.full((2, 5, 3), math.nan)):
        assert values.shape == (2, 2)
        assert np.isnan(values).all()


def test_float32_is_computed_in_float64() -> None:
    logits = _logits(3, 50, 4, seed=7).astype(np.float32)
    logs = log_softmax(logits.astype(np.float64), axis=2)
    expected = ((np.exp(logs[0]) - np.exp(logs[1])) * (logs[0] - logs[1])).sum(axis=1).mean() / 2
    assert pairwise(logits).kl[0, 1] == pytest.approx(expected, rel=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match=r"found shape \[4, 3\]; allowed: \[members, examples, classes\]"):
        pairwise(np.zeros((4, 3)))
    for shape, missing in (((0, 4, 3), "members"), ((2, 0, 3), "examples"), ((2, 4, 0), "classes")):
        with pytest.raises(DataError, match=f"without {missing}"):
            pairwise(np.zeros(shape))
    with pytest.raises(DataError, match="found complex128; allowed: real numbers"):
        pairwise(np.zeros((2, 4, 3), dtype=complex))
