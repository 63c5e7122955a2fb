"""Scaled, preconditioned and restricted operators against dense matrices."""

import math

import pytest
import torch
from torch import Tensor

from lossray.errors import ModelError
from lossray.networks.losses import get_loss
from lossray.networks.models import build_model
from lossray.networks.settings import model_settings
from lossray.networks.stack import build_stack
from lossray.operators.objectives import PackedObjective
from lossray.operators.packed import PackedFisher, PackedHessian
from lossray.operators.transforms import PackedPreconditioned, PackedRestricted, PackedScaled

SETTINGS = model_settings({"name": "mlp", "widths": [4, 3], "activation": "tanh"})


def _hessian(*, dtype: torch.dtype = torch.float64, dead: int | None = None) -> PackedHessian:
    stack, theta, buffers = build_stack(
        lambda: build_model(SETTINGS, (5,), 3), [0, 1], executor="vmap", dtype=torch.float64
    )
    if dead is not None:
        theta[dead, 0] = math.nan
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(20, 5, dtype=torch.float64, generator=generator), torch.arange(20) % 3)
    return PackedHessian(
        PackedObjective(stack, theta, buffers, get_loss("cross_entropy"), [batch], dtype=dtype)
    )


def _matrix(operator: object, r: int) -> Tensor:
    n_members, dim = operator.shape  # type: ignore[attr-defined]
    block = torch.eye(dim, dtype=torch.float64).expand(n_members, dim, dim)
    return operator.apply(block)[r].T  # type: ignore[attr-defined,no-any-return]


def test_scaled() -> None:
    hessian = _hessian()
    scale = torch.randn(hessian.shape, dtype=torch.float64)
    scale[:, ::3] = 0
    scaled = PackedScaled(hessian, scale)
    for r in range(2):
        expected = scale[r][:, None] * _matrix(hessian, r) * scale[r]
        assert torch.allclose(_matrix(scaled, r), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(scaled.gradient, scale * hessian.gradient)
    assert torch.equal(scaled.losses, hessian.losses)
    assert scaled.matvecs == hessian.matvecs
    shared = PackedScaled(hessian, scale[0])  # one scale for all members
    assert torch.equal(shared.apply(scale)[0], scaled.apply(scale)[0])


def test_scaled_is_the_hessian_in_the_coordinates_of_the_scale() -> None:
    """theta = S x: the gradient of x -> L(S x) differs along x by the product."""
    hessian = _hessian()
    scale = 0.5 + torch.rand(hessian.shape, dtype=torch.float64)
    step, x = 1e-5, torch.randn(hessian.shape, dtype=torch.float64)
    objective = hessian.objective
    ends = []
    for sign in (1, -1):
        moved = (objective.theta.detach() + sign * step * scale * x).requires_grad_()
        losses = objective.losses(moved, next(iter(objective.batches())))
        ends.append(scale * torch.autograd.grad(losses.sum(), moved)[0])
    assert torch.allclose(
        (ends[0] - ends[1]) / (2 * step), PackedScaled(hessian, scale).apply(x), rtol=1e-6, atol=1e-8
    )


def test_preconditioned() -> None:
    hessian = _hessian()
    diagonal = 10 ** torch.randn(hessian.shape, dtype=torch.float64)
    preconditioned = PackedPreconditioned(hessian, diagonal)
    root = diagonal[1].rsqrt()
    assert torch.allclose(_matrix(preconditioned, 1), root[:, None] * _matrix(hessian, 1) * root, rtol=1e-12)


def test_restricted() -> None:
    hessian = _hessian()
    sizes = dict(zip(hessian.layout.names, hessian.layout.sizes, strict=True))
    block = PackedRestricted(hessian, ["output.bias", "hidden2.*"])
    assert block.layout.names == ("hidden2.weight", "hidden2.bias", "output.bias")
    assert block.shape == (2, sizes["hidden2.weight"] + sizes["hidden2.bias"] + sizes["output.bias"])
    parts = hessian.layout.split(torch.arange(hessian.shape[1]))
    index = torch.cat([parts[name].flatten() for name in block.layout.names])
    dense = _matrix(hessian, 1)
    assert torch.allclose(_matrix(block, 1), dense[index][:, index], rtol=1e-12, atol=1e-15)
    assert torch.equal(block.gradient, hessian.gradient[:, index])
    layers = [PackedRestricted(hessian, [f"{name}*"]).shape[1] for name in ("hidden1", "hidden2", "output")]
    assert sum(layers) == hessian.shape[1]


def test_transforms_of_transforms() -> None:
    hessian = _hessian()
    block = PackedRestricted(hessian, "hidden1.*")  # one name need not stand in a list
    diagonal = torch.full(block.shape, 4.0)
    both = PackedPreconditioned(block, diagonal)
    probe = torch.randn(block.shape, dtype=torch.float64)
    assert torch.allclose(both.apply(probe), block.apply(probe) / 4, rtol=1e-13)


def test_the_product_error_passes_through() -> None:
    single, double = _hessian(dtype=torch.float32), _hessian()
    scale = 10 ** torch.randn(single.shape, dtype=torch.float64)
    for make in (
        lambda operator: PackedScaled(operator, scale),
        lambda operator: PackedPreconditioned(operator, scale),
        lambda operator: PackedRestricted(operator, ["hidden1.weight"]),
    ):
        found, exact = make(single), make(double)
        probe = torch.randn(found.shape, dtype=torch.float64)
        error = torch.linalg.vector_norm(found.apply(probe) - exact.apply(probe), dim=1)
        assert torch.allclose(found.product_error(probe), error, rtol=1e-6)
        assert (error > 0).all()


def test_dead_members_need_no_scale() -> None:
    hessian = _hessian(dead=1)
    scale = torch.ones(hessian.shape, dtype=torch.float64)
    scale[1] = math.nan
    for transformed in (PackedScaled(hessian, scale), PackedPreconditioned(hessian, scale)):
        products = transformed.apply(torch.ones(hessian.shape))
        assert torch.isfinite(products[0]).all()
        assert torch.isnan(products[1]).all()
        assert torch.isnan(transformed.gradient[1]).all()


def test_the_fisher_can_be_transformed_too() -> None:
    fisher = PackedFisher(_hessian().objective)
    block = PackedRestricted(fisher, ["output.*"])
    assert torch.linalg.eigvalsh(_matrix(block, 0))[0] > -1e-14


def test_impossible_scales_and_names_are_refused() -> None:
    hessian = _hessian()
    dim = hessian.shape[1]
    with pytest.raises(ValueError, match=rf"shape \[3\]; allowed: \[2, {dim}\] or \[{dim}\]"):
        PackedScaled(hessian, torch.ones(3))
    with pytest.raises(ValueError, match="not finite"):
        PackedScaled(hessian, torch.full((dim,), math.inf))
    for value in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"found {value:g}; allowed: above zero"):
            PackedPreconditioned(hessian, torch.full((dim,), value))
    with pytest.raises(ModelError, match=r"'hiden1.weight'; there are .*; did you mean 'hidden1.weight'\?"):
        PackedRestricted(hessian, ["output.*", "hiden1.weight"])
    with pytest.raises(ModelError, match="no parameter was named"):
        PackedRestricted(hessian, [])
    with pytest.raises(ValueError, match="vectors: found"):
        PackedRestricted(hessian, ["output.*"]).apply(torch.ones(hessian.shape))
