"""Curvature at a finite step: exact on quadratics, and it sees kinks."""

from decimal import Decimal, getcontext

import pytest
import torch
from torch import nn

from lossray.geometry.finite_step import finite_steps, real_steps
from lossray.networks.losses import cross_entropy, mse
from lossray.networks.stack import stack_models
from lossray.operators.objectives import PackedObjective, mean_losses


class Abs(nn.Module):
    """w -> |w - 1| as a model: relu(w - 1) + relu(1 - w), linear but for one kink."""

    def __init__(self, value):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([value]))

    def forward(self, x):
        return (torch.relu(self.w - 1) + torch.relu(1 - self.w)).expand(len(x), 1)


def linear_objective(values, n=7, dtype=torch.float32):
    """Members with linear models of 3 inputs: quadratic losses."""
    models = [nn.Linear(3, 2, bias=False) for _ in values]
    for model, value in zip(models, values, strict=True):
        nn.init.constant_(model.weight, value)
    stack, theta, buffers = stack_models(models, executor="vmap", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    y = torch.randn(n, 2, generator=generator)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    return PackedObjective(stack, theta, buffers, mse, batches, dtype=dtype), x.double()


def test_on_a_quadratic_it_is_the_curvature():
    objective, x = linear_objective([0.3, -1.0])
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(2, 6, generator=generator)
    found = finite_steps(objective, {"u": steps})["u"]
    gram = torch.block_diag(*[x.T @ x / len(x)] * 2)
    for r, u in enumerate(steps.double()):
        assert float(found.curvature[r]) == pytest.approx(float(u @ gram @ u / (u @ u)), rel=1e-9)
        assert float(found.norm[r]) == pytest.approx(float(u.norm()), rel=1e-12)


def test_unequal_batches_count_by_their_examples():
    objective, _ = linear_objective([0.3])
    whole = PackedObjective(
        objective.stack,
        objective.theta.detach(),
        {},
        mse,
        [tuple(torch.cat([getattr(b, name) for b in objective.batches()]) for name in ("inputs", "targets"))],
        dtype=torch.float64,
    )
    exact = objective.to(torch.float64)
    torch.testing.assert_close(
        mean_losses(exact, exact.theta.detach()), mean_losses(whole, whole.theta.detach()), rtol=1e-14, atol=0
    )


def test_it_sees_a_kink_where_the_hessian_is_zero():
    stack, theta, buffers = stack_models([Abs(1.1), Abs(3.0)], executor="loop", dtype=torch.float64)
    target = torch.full((4, 1), -2.0)
    objective = PackedObjective(stack, theta, buffers, lambda o, t: (o - t).mean(), [(target, target)])
    found = finite_steps(objective, {"u": torch.full((2, 1), 0.5)})["u"]
    # |1.6 - 1| - 2 |1.1 - 1| + |0.6 - 1| = 0.8; far from the kink nothing
    assert float(found.curvature[0]) == pytest.approx(0.8 / 0.25)
    assert float(found.curvature[1]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-7])
def test_the_noise_covers_the_rounding_error(size):
    """Against arithmetic of 50 digits, for steps at which rounding counts."""
    getcontext().prec = 50
    objective, x = linear_objective([0.7, -0.2, 2.0])
    y = torch.cat([batch.targets for batch in objective.batches()]).double()
    generator = torch.Generator().manual_seed(2)
    step = size * torch.randn(3, 6, dtype=torch.float64, generator=generator)
    found = finite_steps(objective, {"u": step})["u"]
    theta = objective.theta.detach().double()

    def loss(w):
        total = Decimal(0)
        for inputs, targets in zip(x.tolist(), y.tolist(), strict=True):
            for i, target in enumerate(targets):
                output = sum(w[3 * i + j] * Decimal(inputs[j]) for j in range(3))
                total += (output - Decimal(target)) ** 2 / 2
        return total / len(x)

    for r in range(3):
        w = [Decimal(value) for value in theta[r].tolist()]
        s = [Decimal(value) for value in step[r].tolist()]
        ahead = loss([a + b for a, b in zip(w, s, strict=True)])
        behind = loss([a - b for a, b in zip(w, s, strict=True)])
        exact = (ahead - 2 * loss(w) + behind) / sum(b * b for b in s)
        error = abs(float(Decimal(float(found.curvature[r])) - exact))
        assert error <= float(found.noise[r]) + 1e-9 * abs(float(exact))


def test_zero_steps_and_dead_members_have_none():
    objective, _ = linear_objective([0.3, float("nan"), 1.0])
    steps = torch.ones(3, 6)
    steps[2] = 0
    steps[1] = torch.nan
    found = finite_steps(objective, {"u": steps})["u"]
    assert torch.isfinite(found.curvature).tolist() == [True, False, False]


def test_a_gradient_is_taken_times_the_learning_rate():
    times_lr = ("gradient", "minibatch_gradient", "momentum", "preconditioned_gradient")
    as_they_are = ("update", "displacement", "shadow:adam")
    steps = real_steps({name: torch.ones(1, 2) for name in (*times_lr, *as_they_are)}, 0.5)
    assert all(float(steps[name][0, 0]) == 0.5 for name in times_lr)
    assert all(float(steps[name][0, 0]) == 1.0 for name in as_they_are)


@pytest.mark.parametrize("size", [1e-3, 1e-6])
@pytest.mark.parametrize("residual", [1e-2, 1e-5, 1e-8])
def test_the_noise_covers_the_rounding_of_a_fit_that_nearly_interpolates(residual, size):
    """The outputs' rounding does not shrink with the loss."""
    getcontext().prec = 60
    generator = torch.Generator().manual_seed(3)
    best = torch.randn(2, 3, dtype=torch.float64, generator=generator)
    x = torch.randn(40, 3, dtype=torch.float64, generator=generator)
    y = x @ best.T
    models = [nn.Linear(3, 2, bias=False, dtype=torch.float64) for _ in range(3)]
    for model in models:
        draws = torch.randn(2, 3, dtype=torch.float64, generator=generator)
        model.weight.data = best + residual * draws
    stack, theta, buffers = stack_models(models, executor="vmap", dtype=torch.float64)
    objective = PackedObjective(stack, theta, buffers, mse, [(x, y)], dtype=torch.float64)
    step = size * torch.randn(3, 6, dtype=torch.float64, generator=generator)
    found = finite_steps(objective, {"u": step})["u"]
    gram = torch.block_diag(*[x.T @ x / len(x)] * 2)
    for r in range(3):
        u = [Decimal(value) for value in step[r].tolist()]
        rows = [[Decimal(value) for value in row] for row in x.tolist()]
        along = sum(
            sum(u[3 * i + j] * row[j] for j in range(3)) ** 2 for row in rows for i in range(2)
        )  # on a quadratic the second difference is u'Hu whatever the point
        exact = along / len(x) / sum(b * b for b in u)
        assert float(exact) == pytest.approx(float(step[r] @ gram @ step[r] / (step[r] @ step[r])))
        error = abs(float(Decimal(float(found.curvature[r])) - exact))
        assert error <= float(found.noise[r]) + 1e-14 * float(exact)


@pytest.mark.parametrize("margin", [1.0, 10.0, 20.0, 30.0])
def test_the_noise_covers_the_rounding_of_a_saturated_softmax(margin):
    """The sum of 1 and small terms is rounded at eps, however small the loss."""
    getcontext().prec = 60
    generator = torch.Generator().manual_seed(4)
    x = 1 + 0.1 * torch.randn(9, 1, dtype=torch.float64, generator=generator)
    targets = torch.zeros(9, dtype=torch.int64)
    model = nn.Linear(1, 2, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[margin], [0.0]], dtype=torch.float64)
    stack, theta, buffers = stack_models([model], executor="vmap", dtype=torch.float64)
    objective = PackedObjective(stack, theta, buffers, cross_entropy, [(x, targets)], dtype=torch.float64)
    for size in (1e-1, 1e-3, 1e-5):
        step = size * torch.randn(1, 2, dtype=torch.float64, generator=generator)
        found = finite_steps(objective, {"u": step})["u"]

        def loss(sign, step=step):
            w = [Decimal(a) + sign * Decimal(b) for a, b in zip([margin, 0.0], step[0].tolist(), strict=True)]
            return sum((1 + ((w[1] - w[0]) * Decimal(value)).exp()).ln() for [value] in x.tolist()) / 9

        square = sum(Decimal(b) ** 2 for b in step[0].tolist())
        exact = (loss(1) - 2 * loss(0) + loss(-1)) / square
        assert abs(float(Decimal(float(found.curvature[0])) - exact)) <= float(found.noise[0])
