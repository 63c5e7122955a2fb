"""Stability thresholds on a quadratic (SCIENCE 2.10): by companion matrix, and by running the optimizers."""

import numpy as np
import pytest
import torch

from lossray.networks.stack import Layout
from lossray.training.optimizers import OPTIMIZERS, StackOptimizer, optimizer_settings

BETA = 0.9
LAYOUT = Layout(("w",), (torch.Size([1]),), ("other",))

# x and the buffer after a step, from those before, on a quadratic of curvature c with lr = 1 and P = 1.
COMPANION = {
    "sgd": lambda c: np.array([[1 - c]]),
    "momentum": lambda c: np.array([[1 - c, -BETA], [c, BETA]]),
    "nesterov": lambda c: np.array([[1 - (1 + BETA) * c, -(BETA**2)], [c, BETA]]),
    "adam": lambda c: np.array([[1 - (1 - BETA) * c, -BETA], [(1 - BETA) * c, BETA]]),
    "nadam": lambda c: np.array([[1 - (1 - BETA) * (1 + BETA) * c, -(BETA**2)], [(1 - BETA) * c, BETA]]),
}


def threshold(name):
    settings = optimizer_settings({"name": name})
    return OPTIMIZERS[name].threshold(settings)


def radius(matrix):
    return max(abs(np.linalg.eigvals(matrix)))


@pytest.mark.parametrize("name", COMPANION)
def test_the_threshold_is_where_the_companion_matrix_leaves_the_unit_disc(name):
    found = threshold(name)
    assert radius(COMPANION[name](found * (1 - 1e-6))) < 1
    assert radius(COMPANION[name](found * (1 + 1e-6))) > 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sgd", 2),
        ("momentum", 3.8),
        ("nesterov", 3.8 / 2.8),
        ("rmsprop", 2),
        ("adagrad", 2),
        ("adadelta", 2),
        ("adam", 38),
        ("adamw", 38),
        ("amsgrad", 38),
        ("adamax", 38),
        ("radam", 38),
        ("nadam", 38 / 2.8),
    ],
)
def test_thresholds_at_the_default_settings(name, value):
    assert threshold(name) == pytest.approx(value)


def test_there_is_none_without_a_preconditioner():
    assert OPTIMIZERS["lion"].threshold is None
    assert OPTIMIZERS["muon"].threshold is None
    assert all((entry.threshold is None) == (entry.scale is None) for entry in OPTIMIZERS.values())


def growth(name, factor, steps=2500):
    """Largest and last |x| / |x0| on a quadratic whose curvature is ``factor`` times what is stable.

    P = sqrt(v) + eps with eps = 1 and x from 1e-30 on: P is frozen until x has grown by many powers of ten.
    The step counter is set far ahead, so that bias corrections and NAdam's schedule are at their limits.
    """
    frozen = {"eps": 1.0} if hasattr(optimizer_settings({"name": name}), "eps") else {}
    settings = optimizer_settings({"name": name, "weight_decay": 0.0, **frozen})
    start = 1e-30
    theta = torch.full((1, 1), start, dtype=torch.float64)
    optimizer = StackOptimizer(settings, theta, LAYOUT)
    optimizer.step(torch.zeros_like(theta), 1.0)
    late = {"step": torch.tensor(1e7), "mu_product": torch.tensor(0.0)}
    state = optimizer.state()
    optimizer.load_state(state | {key: value for key, value in late.items() if key in state})
    largest = 0.0
    for _ in range(steps):
        optimizer.step(factor * threshold(name) * theta, 1.0)
        largest = max(largest, float(theta.abs()) / start)
    return largest, float(theta.abs()) / start


@pytest.mark.parametrize(
    "name",
    ["sgd", "momentum", "nesterov", "rmsprop", "adagrad", "adam", "adamw", "amsgrad", "nadam", "radam"],
)
def test_the_optimizer_itself_is_stable_below_and_unstable_above(name):
    largest, last = growth(name, 0.97)
    assert largest < 100
    assert last < 1e-6
    largest, _ = growth(name, 1.03)
    assert largest > 1e6
