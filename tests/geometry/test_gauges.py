"""Gauges: what must not change in any of them, and what is dropped."""

import pytest
import torch

from lossray.geometry import gauges
from lossray.geometry.gauges import Gauge
from lossray.networks.losses import cross_entropy
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.networks.symmetry import rescaling_symmetry
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedHessian
from lossray.operators.transforms import PackedScaled

MODELS = {
    "mlp": ({"name": "mlp", "widths": [5, 4]}, (6,)),
    "cnn": ({"name": "cnn", "channels": [2], "kernel": 3, "widths": [4]}, (1, 4, 4)),
}


class Case:
    """A small stack in float64 with its Hessian, and a vector of each kind."""

    def __init__(self, name):
        settings, shape = MODELS[name]
        model = model_settings(settings)
        self.stack, self.theta, self.buffers = build_stack(
            lambda: build_model(model, shape, 3), (0, 1), executor="vmap", dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(20, *shape, dtype=torch.float64, generator=generator)
        self.targets = torch.randint(0, 3, (20,), generator=generator)
        self.hessian = self.hessian_at(self.theta)
        self.gradient = self.hessian.gradient
        self.update = torch.randn(self.theta.shape, dtype=torch.float64, generator=generator)
        self.symmetry = rescaling_symmetry(self.stack.template, self.stack.layout)
        random = torch.rand(2, self.symmetry.units, dtype=torch.float64, generator=generator)
        self.rescaled = self.symmetry.diagonal(torch.exp(2 * random - 1))

    def hessian_at(self, theta):
        batch = [(self.inputs, self.targets)]
        return PackedHessian(
            PackedObjective(self.stack, theta, self.buffers, cross_entropy, batch, dtype=torch.float64)
        )

    def gauges(self):
        scale = 0.1 + self.gradient.abs()
        factors = self.symmetry.balance_factors(self.theta)
        return [
            gauges.raw(self.theta),
            gauges.adaptive(self.theta),
            gauges.preconditioned(scale),
            gauges.balanced(self.symmetry.diagonal(factors)),
        ]


@pytest.mark.parametrize("name", MODELS)
def test_slope_and_curvature_along_a_displacement_are_the_same_in_every_gauge(name):
    case = Case(name)
    slope = (case.gradient * case.update).sum(dim=1)
    curvature = (case.update * case.hessian.apply(case.update)).sum(dim=1)
    for gauge in case.gauges():
        moved = gauge.transform({"gradient": case.gradient, "update": case.update})
        operator = PackedScaled(case.hessian, gauge.scale)
        found = (moved["update"] * operator.apply(moved["update"])).sum(dim=1)
        torch.testing.assert_close(
            (moved["gradient"] * moved["update"]).sum(dim=1), slope, rtol=1e-10, atol=0
        )
        torch.testing.assert_close(found, curvature, rtol=1e-9, atol=0)
        torch.testing.assert_close(operator.gradient, moved["gradient"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_adaptive_gauge_is_the_same_after_any_rescaling(name):
    """Theory 2.6: spectrum of |theta| H |theta|, |theta| g and displacements are exactly invariant."""
    case = Case(name)
    other = case.rescaled * case.theta
    before, after = gauges.adaptive(case.theta), gauges.adaptive(other)
    hessian = case.hessian_at(other)
    one, two = PackedScaled(case.hessian, before.scale), PackedScaled(hessian, after.scale)
    torch.testing.assert_close(one.gradient, two.gradient, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        before.vector(case.update), after.vector(case.rescaled * case.update), rtol=1e-12, atol=0
    )
    probe = torch.randn(case.theta.shape, dtype=torch.float64)
    torch.testing.assert_close(one.apply(probe), two.apply(probe), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_the_balanced_gauge_is_that_of_the_balanced_network(name):
    """However the network is scaled: the gauge's Hessian is that of the one balanced network."""
    case = Case(name)
    balanced = case.symmetry.diagonal(case.symmetry.balance_factors(case.theta))
    other = case.rescaled * case.theta
    again = case.symmetry.diagonal(case.symmetry.balance_factors(other))
    torch.testing.assert_close(balanced * case.theta, again * other, rtol=1e-9, atol=1e-12)
    gauge = gauges.balanced(balanced)
    there = case.hessian_at(balanced * case.theta)
    torch.testing.assert_close(gauge.covector(case.gradient), there.gradient, rtol=1e-9, atol=1e-13)
    probe = torch.randn(case.theta.shape, dtype=torch.float64)
    scaled = PackedScaled(case.hessian, gauge.scale)
    torch.testing.assert_close(scaled.apply(probe), there.apply(probe), rtol=1e-8, atol=1e-12)


def test_coordinates_that_are_zero_are_dropped_and_counted():
    theta = torch.tensor([[2.0, 0.0, -3.0], [1.0, 1.0, 1.0]])
    gauge = gauges.adaptive(theta)
    assert gauge.dropped.tolist() == [1, 0]
    u = torch.tensor([[1.0, 5.0, 3.0]]).expand(2, 3)
    assert gauge.vector(u).tolist() == [[0.5, 0.0, 1.0], [1.0, 5.0, 3.0]]
    assert gauge.covector(u).tolist() == [[2.0, 0.0, 9.0], [1.0, 5.0, 3.0]]
    assert not gauge.identity
    assert gauges.raw(theta).identity
    assert gauges.raw(theta).dropped.tolist() == [0, 0]


def test_gradients_and_displacements_change_in_opposite_ways():
    gauge = Gauge("x", torch.tensor([[2.0, 4.0]], dtype=torch.float64))
    ones = torch.ones(1, 2)
    names = ("gradient", "minibatch_gradient", "momentum")
    others = ("update", "displacement", "preconditioned_gradient", "shadow:adam")
    moved = gauge.transform({name: ones for name in (*names, *others)})
    assert all(moved[name].tolist() == [[2.0, 4.0]] for name in names)
    assert all(moved[name].tolist() == [[0.5, 0.25]] for name in others)


def test_tiny_parameters_do_not_overflow_and_a_dead_member_spoils_nobody():
    theta = torch.tensor([[1e-30, 1.0], [float("nan"), 1.0]])
    gauge = gauges.adaptive(theta)
    assert torch.isfinite(gauge.vector(torch.ones(2, 2))).all()
    assert gauge.scale[1].tolist() == [1.0, 1.0]
    scale = torch.tensor([[4.0, 9.0], [float("nan"), 1.0]])
    assert gauges.preconditioned(scale).scale.tolist() == [[0.5, 1 / 3], [1.0, 1.0]]


def test_what_no_step_moves_is_dropped_from_the_preconditioned_gauge():
    gauge = gauges.preconditioned(torch.tensor([[4.0, float("inf"), 16.0]]))
    assert gauge.scale.tolist() == [[0.5, 0.0, 0.25]]
    assert gauge.dropped.tolist() == [1]
    moved = gauge.transform({"gradient": torch.ones(1, 3), "displacement": torch.ones(1, 3)})
    assert moved["gradient"].tolist() == [[0.5, 0.0, 0.25]]
    assert moved["displacement"].tolist() == [[2.0, 0.0, 4.0]]


def test_slope_and_curvature_are_the_same_with_coordinates_dropped():
    """Where parameters are exactly zero, for displacements that leave them so."""
    case = Case("mlp")
    theta = case.theta.detach().clone()
    theta[0, ::7], theta[1, 3] = 0, 0
    hessian, gauge = case.hessian_at(theta), gauges.adaptive(theta)
    assert gauge.dropped.tolist() == [len(theta[0, ::7]), 1]
    update = case.update * (theta != 0)
    moved = gauge.transform({"gradient": hessian.gradient, "update": update})
    torch.testing.assert_close(
        (moved["gradient"] * moved["update"]).sum(dim=1),
        (hessian.gradient * update).sum(dim=1),
        rtol=1e-10,
        atol=0,
    )
    operator = PackedScaled(hessian, gauge.scale)
    torch.testing.assert_close(
        (moved["update"] * operator.apply(moved["update"])).sum(dim=1),
        (update * hessian.apply(update)).sum(dim=1),
        rtol=1e-9,
        atol=0,
    )


def test_parameters_whose_inverse_would_overflow_are_dropped():
    gauge = gauges.adaptive(torch.tensor([[1e-300, 1e-45, -1.0]], dtype=torch.float64))
    assert gauge.dropped.tolist() == [1]
    moved = gauge.vector(torch.ones(1, 3))
    assert moved[0, 0] == 0
    assert torch.isfinite(moved.square()).all()
