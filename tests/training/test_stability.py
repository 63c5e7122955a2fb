"""Stability thresholds on a quadratic (theory 2.10): by companion matrix, and by running the optimizers."""

import numpy as np
import pytest
import torch

from lossray.networks.layout import Layout
from lossray.training.optimizers import PackedOptimizer
from lossray.training.update_rules import OPTIMIZERS, optimizer_settings

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


LATE = 10**7  # steps after which bias corrections are over and schedules at their limits
GROWN = 1e6


def threshold(name, step=LATE, **keys):
    return OPTIMIZERS[name].threshold(optimizer_settings({"name": name, **keys}), step)


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


def growth(name, factor, steps=1000, **keys):
    """Largest and last |x| / |x0| on a quadratic whose curvature is ``factor`` times what is stable.

    P = 1, by eps = 1 and x near 1e-30. Ends where x has grown a millionfold.
    """
    frozen = {"eps": 1.0} if hasattr(optimizer_settings({"name": name}), "eps") else {}
    settings = optimizer_settings({"name": name, "weight_decay": 0.0, **frozen, **keys})
    start = 1e-30
    theta = torch.full((1, 1), start, dtype=torch.float64)
    optimizer = PackedOptimizer(settings, theta, LAYOUT)
    optimizer.step(torch.zeros_like(theta), 1.0)
    late = {"step": torch.tensor(float(LATE)), "mu_product": torch.tensor(0.0)}
    state = optimizer.state()
    optimizer.load_state(state | {key: value for key, value in late.items() if key in state})
    curvature = factor * threshold(name, **keys)
    largest = 0.0
    for _ in range(steps):
        optimizer.step(curvature * theta, 1.0)
        largest = max(largest, float(theta.abs()) / start)
        if largest > GROWN:
            break
    torch.testing.assert_close(optimizer.scale(), torch.ones_like(theta), rtol=1e-6, atol=0)
    return largest, float(theta.abs()) / start


@pytest.mark.parametrize(
    ("name", "keys"),
    [(name, {}) for name, entry in OPTIMIZERS.items() if entry.threshold]
    + [
        ("momentum", {"momentum": 0.5}),
        ("nesterov", {"momentum": 0.99}),
        ("adam", {"betas": (0.5, 0.999)}),
        ("nadam", {"momentum_decay": 0.0}),  # its momentum stays at beta / 2
        ("nadam", {"betas": (0.6, 0.999)}),
    ],
)
def test_the_optimizer_itself_is_stable_below_and_unstable_above(name, keys):
    largest, last = growth(name, 0.95, **keys)
    assert largest < 1000
    assert last < 1e-3
    largest, _ = growth(name, 1.05, **keys)
    assert largest > GROWN


def test_nadam_follows_its_momentum_schedule():
    settings = {"betas": (0.9, 0.999), "momentum_decay": 4e-3}
    for step in (0, 1000, 10000):
        mu = 0.9 * (1 - 0.5 * 0.96 ** ((step + 1) * 4e-3))  # of torch.optim.NAdam
        curvature = threshold("nadam", step, **settings)
        # x and m after a step: m' = beta m + (1 - beta) c x; x' = x - mu m' - (1 - mu) c x
        for factor, stable in ((1 - 1e-6, True), (1 + 1e-6, False)):
            c = factor * curvature
            matrix = np.array([[1 - (1 - mu + mu * (1 - BETA)) * c, -mu * BETA], [(1 - BETA) * c, BETA]])
            assert (radius(matrix) < 1) == stable
