"""Barriers of paths whose losses are prescribed."""

import math

import pytest
import torch
from torch import Tensor

from lossray.connectivity.barriers import barriers

TS = [0.0, 0.25, 0.5, 1.0]


def evaluation(**changed: list[float]) -> dict[str, Tensor]:
    values = {
        "train_loss": [1.0, 3.0, 4.0, 2.0],
        "test_loss": [2.0, 2.0, 2.0, 4.0],
        "train_accuracy": [1.0, 0.5, 0.25, 0.75],
        "test_accuracy": [0.9, 0.9, 0.8, 0.7],
    }
    return {name: torch.tensor(row, dtype=torch.float64) for name, row in {**values, **changed}.items()}


LENGTHS = torch.tensor([0.0, 1.0, 5.0, 6.0], dtype=torch.float64)


def test_every_measure_by_hand():
    found = barriers(TS, LENGTHS, evaluation())
    assert found.barrier == 2.5  # at t = 1/2: 4 - 1.5
    assert found.barrier_test == 0  # below the chord but at the ends
    assert found.barrier_frankle == pytest.approx(0.3 - 0.2)
    assert found.barrier_frankle_train == pytest.approx(0.75 - 0.125)
    assert (found.max_loss, found.max_loss_t) == (4.0, 0.5)
    assert found.mean_loss == pytest.approx((1 * 2.0 + 4 * 3.5 + 1 * 3.0) / 6)


def test_the_largest_loss_and_the_barrier_may_lie_at_different_places():
    found = barriers(TS, LENGTHS, evaluation(train_loss=[0.0, 5.0, 6.0, 10.0]))
    assert (found.barrier, found.max_loss, found.max_loss_t) == (2.5, 10.0, 1.0)


def test_a_constant_loss_has_no_barrier():
    found = barriers(TS, LENGTHS, evaluation(train_loss=[0.1] * 4))
    assert found.barrier == pytest.approx(0, abs=1e-15)
    assert found.mean_loss == pytest.approx(0.1)


def test_a_path_without_length_has_a_mean():
    assert barriers(TS, torch.zeros(4), evaluation()).mean_loss == pytest.approx(
        0.25 * 2 + 0.25 * 3.5 + 0.5 * 3
    )


def test_regression_has_no_errors_and_a_dead_member_nothing():
    nothing = [math.nan] * 4
    found = barriers(TS, LENGTHS, evaluation(test_accuracy=nothing, train_accuracy=nothing))
    assert (found.barrier, found.max_loss_t) == (2.5, 0.5)
    assert math.isnan(found.barrier_frankle)
    assert math.isnan(found.barrier_frankle_train)
    dead = barriers(TS, LENGTHS, {name: torch.tensor(nothing) for name in evaluation()})
    assert all(math.isnan(value) for value in vars(dead).values())
    hole = barriers(TS, LENGTHS, evaluation(train_loss=[1.0, math.nan, 4.0, 2.0]))
    assert all(math.isnan(value) for value in (hole.barrier, hole.max_loss, hole.max_loss_t, hole.mean_loss))


@pytest.mark.parametrize("ts", [[0.0, 0.5, 0.5, 1.0], [0.0, 0.2, 0.4, 0.6], [0.1, 0.2, 0.4, 1.0], [0.0]])
def test_places_must_increase_from_0_to_1(ts):
    with pytest.raises(ValueError, match="increase from 0 to 1"):
        barriers(ts, LENGTHS, evaluation())
