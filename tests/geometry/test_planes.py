"""Slices of the loss: closed forms on quadratics, stacked evaluation against single modules, directions."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lossray.geometry import planes
from lossray.geometry.planes import (
    Plane,
    across,
    along_eigenvectors,
    along_random,
    along_trajectory,
    surface_rows,
    through_points,
)
from lossray.geometry.principal_axes import gram_of, principal_axes
from lossray.geometry.settings import SurfacesSettings
from lossray.networks.losses import get_loss
from lossray.networks.stack import EXECUTORS, Stack, build_stack
from lossray.training.datasets import Split
from lossray.training.evaluation import evaluate_split

mse = get_loss("mse")


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear() -> nn.Module:
    return nn.Linear(5, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


INPUTS = {mlp: _drawn(30, 5, seed=1), cnn: _drawn(30, 2, 5, 5, seed=1)}


def _at(
    build, executor: str = "vmap", dtype: torch.dtype = torch.float64
) -> tuple[Stack, Tensor, dict[str, Tensor]]:
    """Stack, theta [d] and buffers of one member, whose statistics are no longer those of a new model."""
    stack, theta, buffers = build_stack(build, [4], executor=executor, dtype=dtype)
    own = {name: tensor[0] for name, tensor in buffers.items()}
    for name, tensor in own.items():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return stack, theta[0], own


def _classes(build, dtype: torch.dtype = torch.float64) -> Split:
    return Split(INPUTS[build].to(dtype), torch.arange(30) % 3)


# ---- a quadratic loss


@pytest.fixture
def quadratic():
    """Least squares: stack, theta, split, gradient [d], Hessian [d, d]; a parabola everywhere."""
    stack, theta, _ = _at(linear)
    split = Split(_drawn(40, 5, seed=2), _drawn(40, 2, seed=3))

    def value(point: Tensor) -> Tensor:
        return stack.losses(point[None], {}, split.inputs, split.targets, mse)[0]

    leaf = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(leaf), leaf)
    return stack, theta, split, gradient, torch.autograd.functional.hessian(value, theta)


def _rows(
    plane: Plane, stack: Stack, theta: Tensor, split: Split, *, points: int = 5, span: float = 1.0, **more
):
    return surface_rows(
        plane, stack, theta, more.get("buffers", {}), more.get("loss", mse), split, points=points, span=span
    )


@pytest.mark.parametrize("two", [False, True])
def test_a_parabola_is_a_parabola_on_the_whole_grid(quadratic, two: bool) -> None:
    stack, theta, split, gradient, hessian = quadratic
    x_axis, y_axis = _drawn(2, 12, seed=5)
    plane = Plane("random", x_axis, y_axis if two else None)
    rows = _rows(plane, stack, theta, split, points=7, span=1.5)
    start = float(evaluate_split(stack, theta[None], {}, mse, split)[0])
    assert [(row.i, row.j) for row in rows] == [(i, j) for i in range(7) for j in range(7 if two else 1)]
    for row in rows:
        move = row.x * x_axis + row.y * y_axis
        expected = start + float(gradient @ move + move @ hessian @ move / 2)
        assert row.loss == pytest.approx(expected, rel=1e-12)
        assert row.x == pytest.approx(-1.5 + 0.5 * row.i)
        assert row.y == pytest.approx(-1.5 + 0.5 * row.j if two else 0)
        assert row.x_norm == pytest.approx(float(x_axis.norm()))
        assert row.y_norm == (pytest.approx(float(y_axis.norm())) if two else None)
        assert math.isnan(row.accuracy)  # regression


def test_at_a_minimum_the_eigenvector_axes_end_where_the_loss_has_doubled(quadratic) -> None:
    stack, theta, split, gradient, hessian = quadratic
    theta = theta - torch.linalg.solve(hessian, gradient)
    least = float(evaluate_split(stack, theta[None], {}, mse, split)[0])
    values, vectors = torch.linalg.eigh(hessian)
    values, vectors = values.flip(0), vectors.T.flip(0)
    assert least > planes.SMALL_LOSS
    assert math.sqrt(2 * least / float(values[1])) < 3
    long = theta + 100 * vectors[-1]  # the length of theta bounds that of the axes; here it does not
    line = along_eigenvectors("v1", vectors, values, loss=least, theta=long)
    plane = along_eigenvectors("eigenvectors", vectors, values, loss=least, theta=long)
    assert line is not None
    assert plane is not None
    assert [row.loss for row in _rows(line, stack, theta, split, points=3)] == pytest.approx(
        [2 * least, least, 2 * least], rel=1e-10
    )
    for row in _rows(plane, stack, theta, split):
        assert row.loss == pytest.approx(least * (1 + row.x**2 + row.y**2), rel=1e-10)


# ---- axes


def test_axes_along_eigenvectors_are_long_enough_to_see_and_no_longer_than_theta() -> None:
    vectors, theta = torch.eye(4, dtype=torch.float64)[:3], torch.tensor([3.0, 4.0, 0, 0])

    def norms(values: list[float], loss: float) -> list[float]:
        plane = along_eigenvectors("eigenvectors", vectors, torch.tensor(values), loss=loss, theta=theta)
        assert plane is not None
        assert plane.y_axis is not None
        assert (plane.x_axis[0] > 0, plane.y_axis[1] > 0) == (True, True)
        assert float(plane.x_axis @ plane.y_axis) == 0
        return [float(plane.x_axis.norm()), float(plane.y_axis.norm())]

    assert norms([4.0, 1.0, 0.5], 2.0) == pytest.approx([1, 2])
    assert norms([2.0, 0.8, 0.5], 1e-9) == pytest.approx(
        [math.sqrt(0.1), 0.5]
    )  # a tenth, where loss is nothing
    assert norms([4.0, 1e-6, 0.5], 2.0) == pytest.approx([1, 5])  # |theta|
    assert norms([4.0, -3.0, 0.5], 2.0) == pytest.approx([1, 5])


def test_eigenvectors_that_are_missing_make_no_plane() -> None:
    vectors = torch.eye(3, dtype=torch.float64)[:2]
    vectors[1] = float("nan")
    values, theta = torch.tensor([1.0, float("nan")], dtype=torch.float64), torch.ones(3)
    assert along_eigenvectors("v1", vectors, values, loss=1.0, theta=theta) is not None
    assert along_eigenvectors("eigenvectors", vectors, values, loss=1.0, theta=theta) is None
    assert along_eigenvectors("eigenvectors", vectors[:1], values[:1], loss=1.0, theta=theta) is None
    assert along_eigenvectors("v1", vectors[1:], values[1:], loss=1.0, theta=theta) is None


@pytest.mark.parametrize("centre", [0, 2, 5])
def test_the_plane_of_a_trajectory_holds_its_checkpoints_at_their_coordinates(centre: int) -> None:
    points = list(_drawn(6, 50).cumsum(0))
    plane = along_trajectory(points[centre], points)
    assert plane is not None
    assert plane.y_axis is not None
    x_axis, y_axis = plane.x_axis, plane.y_axis
    assert float(x_axis @ y_axis) == pytest.approx(0, abs=1e-10)
    pcs = principal_axes(gram_of([point[None] for point in points])[0].numpy()).coordinates[:, :2]
    lengths = np.array([float(x_axis.norm()), float(y_axis.norm())])
    for point, pc in zip(points, pcs, strict=True):
        move = point - points[centre]
        place = np.array([float(move @ x_axis / x_axis.norm()), float(move @ y_axis / y_axis.norm())])
        np.testing.assert_allclose(place, pc - pcs[centre], atol=1e-10)
        assert (np.abs(place) <= lengths / 1.2 * (1 + 1e-12)).all()


def test_three_checkpoints_lie_in_their_plane() -> None:
    stack, theta, _ = _at(mlp)
    points = [theta + 0.3 * move for move in (*_drawn(2, stack.dim), torch.zeros(stack.dim))]
    plane = along_trajectory(theta, points)
    assert plane is not None
    assert plane.y_axis is not None
    for point in points:
        x, y = ((point - theta) @ axis / (axis @ axis) for axis in (plane.x_axis, plane.y_axis))
        shifted = theta + x * plane.x_axis + y * plane.y_axis
        torch.testing.assert_close(shifted, point, rtol=0, atol=1e-12)


def test_what_spans_no_plane_has_none() -> None:
    a, b = _drawn(2, 9)
    for points in ([a], [a, b], [a, b, (a + b) / 2], [a, a, a]):
        assert along_trajectory(a, points) is None


@pytest.mark.parametrize("build", [mlp, cnn])
def test_random_directions_have_the_norm_of_every_filter_and_leave_the_rest(build) -> None:
    stack, theta, _ = _at(build, dtype=torch.float32)
    plane = along_random(theta, stack.layout, 7)
    assert plane.y_axis is not None
    weights = stack.layout.split(theta.double())
    for axis in (plane.x_axis, plane.y_axis):
        for name, piece in stack.layout.split(axis).items():
            if weights[name].ndim == 1:  # biases, and the parameters of batch norm
                assert not piece.any()
                continue
            drawn, own = piece.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1)
            assert len(drawn) == weights[name].shape[0]
            torch.testing.assert_close(drawn, own, rtol=1e-12, atol=0)
    cosine = float(plane.x_axis @ plane.y_axis / plane.x_axis.norm() / plane.y_axis.norm())
    assert abs(cosine) < 5 / math.sqrt(stack.dim)


def test_random_directions_depend_on_their_seed_alone() -> None:
    stack, theta, _ = _at(mlp)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, again, other = (along_random(theta, stack.layout, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.x_axis, again.x_axis)
    assert not torch.equal(first.x_axis, other.x_axis)


def test_a_filter_of_zeros_stays_as_it_is() -> None:
    stack, theta, _ = _at(mlp)
    dead = theta.clone()
    stack.layout.split(dead)["0.weight"][2] = 0
    plane = along_random(dead, stack.layout, 7)
    assert not stack.layout.split(plane.x_axis)["0.weight"][2].any()
    assert torch.isfinite(plane.x_axis).all()


# ---- evaluation


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("build", [mlp, cnn])
def test_stacked_points_equal_single_modules(build, executor: str) -> None:
    stack, theta, buffers = _at(build, executor)
    split = _classes(build)
    kept = {name: tensor.clone() for name, tensor in buffers.items()}
    plane = along_random(theta, stack.layout, 3)
    assert plane.y_axis is not None
    rows = _rows(plane, stack, theta, split, points=9, buffers=buffers, loss=cross_entropy)
    assert len(rows) == 81 > planes.POINTS_AT_ONCE
    model = build().double().eval()
    for row in rows[::4]:
        at = stack.layout.split(theta + row.x * plane.x_axis + row.y * plane.y_axis)
        outputs = functional_call(model, {**at, **buffers}, (split.inputs,))
        assert row.loss == pytest.approx(float(cross_entropy(outputs, split.targets)), rel=1e-12)
        assert row.accuracy == pytest.approx(float((outputs.argmax(1) == split.targets).double().mean()))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in buffers.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [mlp, cnn])
def test_the_middle_is_the_checkpoint(build, dtype: torch.dtype) -> None:
    stack, theta, buffers = _at(build, dtype=dtype)
    split = _classes(build, dtype)
    copies = {name: tensor[None] for name, tensor in buffers.items()}
    loss, accuracy = evaluate_split(stack, theta[None], copies, cross_entropy, split)
    plane = along_random(theta, stack.layout, 3)
    rows = _rows(plane, stack, theta, split, points=7, span=0.3, buffers=buffers, loss=cross_entropy)
    middle = rows[len(rows) // 2]
    assert (middle.i, middle.j, middle.x, middle.y) == (3, 3, 0.0, 0.0)
    assert middle.loss == pytest.approx(float(loss), rel=1e-6 if dtype == torch.float32 else 1e-13)
    assert middle.accuracy == float(accuracy)


def test_a_large_model_goes_in_smaller_batches_to_the_same_numbers(monkeypatch) -> None:
    stack, theta, _ = _at(mlp)
    plane, split = along_random(theta, stack.layout, 3), _classes(mlp)
    whole = _rows(plane, stack, theta, split, loss=cross_entropy)
    sizes = []

    def counted(stack, points, *others):
        sizes.append(len(points))
        return evaluate_split(stack, points, *others)

    monkeypatch.setattr(planes, "evaluate_split", counted)
    for most, expected in ((10 * stack.dim, [10, 10, 5]), (1, [1] * 25)):
        sizes.clear()
        monkeypatch.setattr(planes, "PARAMETERS_AT_ONCE", most)
        parts = _rows(plane, stack, theta, split, loss=cross_entropy)
        np.testing.assert_allclose(
            np.array([astuple(row) for row in parts]), np.array([astuple(row) for row in whole]), rtol=1e-12
        )
        assert sizes == expected


def test_a_point_beyond_what_floats_hold_is_no_number_and_spoils_no_other() -> None:
    stack, theta, _ = _at(mlp, dtype=torch.float32)
    split = _classes(mlp, torch.float32)
    far = torch.zeros(stack.dim, dtype=torch.float64)
    far[0] = 1e300
    rows = _rows(Plane("v1", far, None), stack, theta, split, points=3, loss=cross_entropy)
    near = _rows(Plane("v1", 0 * far, None), stack, theta, split, points=3, loss=cross_entropy)
    assert [math.isfinite(row.loss) for row in rows] == [False, True, False]
    assert [math.isnan(row.accuracy) for row in rows] == [True, False, True]
    assert (rows[1].loss, rows[1].accuracy) == (near[1].loss, near[1].accuracy)


# ---- settings


def test_defaults() -> None:
    settings = SurfacesSettings()
    assert settings.kinds == ("v1", "eigenvectors", "pca", "random")
    assert (settings.points, settings.span, settings.checkpoints, settings.seeds) == (25, 1.0, "last", 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"points": 24}, "an odd number"),
        ({"points": 1}, "greater than or equal to 3"),
        ({"span": 0.0}, "greater than 0"),
        ({"span": math.inf}, "finite"),
        ({"kinds": ["v2"]}, "'random'"),
        ({"kinds": []}, "at least 1"),
        ({"kinds": ["v1", "v1"]}, "found 'v1' twice"),
        ({"checkpoints": "first"}, "'last', 'ends' or 'all'"),
        ({"seeds": 0}, "a number of seeds from 1, or 'all'"),
        ({"seeds": True}, "a number of seeds from 1, or 'all'"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SurfacesSettings.model_validate(changes)


# ---- planes of a direction, and of three points


def test_across_a_direction_lies_what_a_vector_has_orthogonal_to_it() -> None:
    direction, vectors = torch.tensor([3.0, 0.0, 0.0]), torch.eye(3, dtype=torch.float64)
    found = across(direction, vectors)
    assert found is not None
    assert found.tolist() == [0, 1, 0]  # the first vector is parallel
    tilted = across(torch.tensor([1.0, 1.0, 0.0]), vectors)
    assert tilted is not None
    torch.testing.assert_close(tilted, torch.tensor([1.0, -1.0, 0.0]).double() / math.sqrt(2))
    assert across(direction, vectors[:1]) is None


def test_three_points_lie_at_corners_of_their_plane() -> None:
    origin, a, b = (_drawn(6, seed=seed) for seed in (1, 2, 3))
    found = through_points(origin, a, b)
    assert found is not None
    x_axis, y_axis = found
    assert float(x_axis @ y_axis) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(origin + x_axis, a)
    x = (b - origin) @ x_axis / (x_axis @ x_axis)
    torch.testing.assert_close(origin + x * x_axis + y_axis, b)
    for line in ((origin, origin, b), (origin, a, origin), (origin, a, origin + 2 * (a - origin))):
        assert through_points(*line) is None
