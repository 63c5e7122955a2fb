"""Batch and critical sharpness on losses whose answers are known."""

import pytest
import torch
from torch import nn

from lossray.geometry.step_sharpness import batch_sharpness, critical_sharpness
from lossray.networks.losses import mse
from lossray.networks.stack import stack_models
from lossray.operators.objectives import PackedObjective

N, D = 24, 3


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, dtype=torch.float64, generator=generator)
    return x, torch.randn(N, 1, dtype=torch.float64, generator=generator)


def stack_of(values):
    models = [nn.Linear(D, 1, bias=False) for _ in values]
    for model, value in zip(models, values, strict=True):
        nn.init.constant_(model.weight, value)
    return stack_models(models, executor="vmap", dtype=torch.float64)


def objective(parts, values=(0.5, -1.0)):
    stack, theta, buffers = stack_of(values)
    return PackedObjective(stack, theta, buffers, mse, parts, dtype=torch.float64)


def exact(x, y, w):
    hessian = x.T @ x / len(x)
    return hessian, hessian @ w - (x.T @ y)[:, 0] / len(x)


def test_batch_sharpness_is_the_ratio_of_the_means_over_batches():
    x, y = data()
    pieces = [(x[i : i + 6], y[i : i + 6]) for i in range(0, N, 6)]
    found = batch_sharpness([objective([piece]) for piece in pieces], mode="auto", full=False)
    for r, value in enumerate((0.5, -1.0)):
        w = torch.full((D,), value, dtype=torch.float64)
        parts = [exact(*piece, w) for piece in pieces]
        above = torch.stack([g @ h @ g for h, g in parts])
        below = torch.stack([g @ g for _, g in parts])
        assert float(found.value[r]) == pytest.approx(float(above.mean() / below.mean()), rel=1e-10)
        ratios = [float((above.sum() - a) / (below.sum() - b)) for a, b in zip(above, below, strict=True)]
        spread = torch.tensor(ratios, dtype=torch.float64)
        jackknife = (3 / 4 * (spread - spread.mean()).square().sum()).sqrt()
        assert float(found.stderr[r]) == pytest.approx(float(jackknife), rel=1e-8)


def test_of_full_batches_it_is_exact_and_below_lambda_max():
    x, y = data()
    found = batch_sharpness([objective([(x, y)])], mode="auto", full=True)
    hessian, gradient = exact(x, y, torch.full((D,), 0.5, dtype=torch.float64))
    assert float(found.value[0]) == pytest.approx(
        float(gradient @ hessian @ gradient / (gradient @ gradient))
    )
    assert found.stderr.tolist() == [0, 0]
    assert float(found.value[0]) <= float(torch.linalg.eigvalsh(hessian)[-1])


def test_a_dead_member_has_no_batch_sharpness():
    x, y = data()
    found = batch_sharpness([objective([(x, y)], (0.5, float("nan")))], mode="auto", full=True)
    assert torch.isfinite(found.value).tolist() == [True, False]


@pytest.mark.parametrize("lr", [1e-4, 0.1, 3.0])
def test_critical_sharpness_along_the_gradient_is_the_curvature_there(lr):
    """2601.16979 on a quadratic: exactly u'Hu / |u|^2 along delta = -g."""
    x, y = data(1)
    both = [exact(x, y, torch.full((D,), value, dtype=torch.float64)) for value in (0.5, -1.0)]
    update = torch.stack([-lr * gradient for _, gradient in both])
    found = critical_sharpness(objective([(x, y)]), update, lr)
    for r, (hessian, gradient) in enumerate(both):
        expected = float(gradient @ hessian @ gradient / (gradient @ gradient))
        assert float(found[r]) == pytest.approx(expected, rel=3e-4)


def test_critical_sharpness_along_any_descent_direction():
    x, y = data(2)
    lr = 0.05
    scales = torch.tensor([1.0, 0.2, 3.0], dtype=torch.float64)
    both = [exact(x, y, torch.full((D,), value, dtype=torch.float64)) for value in (0.5, -1.0)]
    update = torch.stack([-lr * scales * gradient for _, gradient in both])
    found = critical_sharpness(objective([(x, y)]), update, lr)
    for r, (hessian, gradient) in enumerate(both):
        delta = update[r] / lr
        expected = float(-(delta @ hessian @ delta) / (gradient @ delta))
        assert float(found[r]) == pytest.approx(expected, rel=3e-4)


class Slope(nn.Module):
    """A loss that falls for ever."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return self.w.expand(len(x), 1)


def test_where_nothing_raises_the_loss_it_is_zero_and_where_everything_does_it_is_none():
    x, y = data()
    stack, theta, buffers = stack_models([Slope(), Slope(), Slope()], executor="loop", dtype=torch.float64)
    falling = PackedObjective(stack, theta, buffers, lambda o, t: o.mean(), [(x, y)], dtype=torch.float64)
    update = torch.tensor([[-1.0], [1.0], [0.0]])
    found = critical_sharpness(falling, update, 0.1)
    assert float(found[0]) == 0
    assert found[1:].isnan().all()
    dead = objective([(x, y)], (float("nan"), 0.5))
    gradient = exact(x, y, torch.full((D,), 0.5, dtype=torch.float64))[1]
    found = critical_sharpness(dead, -0.1 * torch.stack([gradient, gradient]), 0.1)
    assert torch.isfinite(found).tolist() == [False, True]


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-6, 1e-8])
def test_at_a_minimum_rounding_is_not_taken_for_descent(size):
    """Every step raises the loss there, but a tiny one by less than a rounding."""
    x, y = data()
    best = torch.linalg.lstsq(x, y).solution.T
    models = [nn.Linear(D, 1, bias=False, dtype=torch.float64) for _ in range(2)]
    with torch.no_grad():
        models[0].weight.copy_(best)
        models[1].weight.copy_(best + 0.3)
    stack, theta, buffers = stack_models(models, executor="vmap", dtype=torch.float64)
    losses = PackedObjective(stack, theta, buffers, mse, [(x, y)], dtype=torch.float64)
    hessian, gradient = exact(x, y, theta[1].detach())
    update = torch.stack([torch.full((D,), size, dtype=torch.float64), -gradient])
    found = critical_sharpness(losses, update, 1.0)
    assert found[0].isnan()
    assert float(found[1]) == pytest.approx(
        float(gradient @ hessian @ gradient / (gradient @ gradient)), rel=3e-4
    )
