"""The plane through a model's parameters that a surface is taken on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lossray.errors import LossrayError, StudyError
from lossray.geometry.planes import across, along_random, reach, through_points
from lossray.measures.model_point import ModelPoint
from lossray.measures.user_optimizer import read_user_optimizer
from lossray.measures.user_vectors import Vector, flat_vector
from lossray.names import unknown_name
from lossray.networks.as_found import copied
from lossray.networks.layout import layout_of, uncompiled
from lossray.operators.modules import ModuleObjective
from lossray.operators.packed import PackedHessian
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted

KINDS = ("eigenvectors", "random", "update", "gradient")
TOLERANCE = 1e-3  # of the eigenpairs
ACROSS = "the top eigenvector, as far as it is orthogonal"
Chosen = str | list[Any]  # one of KINDS, two directions, or three points


@dataclass(frozen=True)
class SurfaceAxes:
    """The axes of a plane through an origin.

    Attributes:
        vectors: [2, d] float64, the steps for which x = 1 and y = 1 stand.
        words: what they are.
        marks: coordinates of the given points by name.
    """

    vectors: Tensor
    words: tuple[str, str]
    marks: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def origin_of(model: nn.Module, axes: Chosen) -> nn.Module:
    """The model at (0, 0): itself, or the first of three points."""
    if isinstance(axes, str) or len(axes) != 3:
        return model
    first: Any = axes[0]
    if isinstance(first, nn.Module):
        return uncompiled(first)
    other = copied(model)
    theta = flat_vector(first, model, layout_of(model), name="surface, axes: the first point")
    buffers = first if isinstance(first, Mapping) else {}
    with torch.no_grad():
        for name, piece in layout_of(model).split(theta).items():
            other.get_parameter(name).copy_(piece)
        for name, buffer in other.named_buffers():
            buffer.copy_(buffers.get(name, buffer))
    return other


def axes_of(
    axes: Chosen,
    objective: ModuleObjective,
    hessian: PackedHessian | LossrayError,
    seed: int,
    update: Vector | None,
    optimizer: torch.optim.Optimizer | None,
) -> SurfaceAxes:
    """The axes of a surface.

    Args:
        axes: what was asked for.
        objective: at the origin.
        hessian: there, or why there is none.
        seed: of random directions and of the search for eigenvectors.
        update: of an optimizer, or None.
        optimizer: whose next step is the update, where none is given.

    Raises:
        StudyError: an impossible choice.
        LossrayError: one that needs a Hessian, where there is none.
    """
    theta = objective.theta.detach()[0].double()
    if not isinstance(axes, str):
        return _given(axes, objective, theta)
    if axes not in KINDS:
        raise StudyError(f"surface, axes: {unknown_name(axes, KINDS)}, two directions, or three points")
    if axes == "random":
        random = along_random(theta, objective.layout, seed)
        assert random.y_axis is not None
        words = ("a random direction, normalised filter by filter", "another")
        return SurfaceAxes(torch.stack([random.x_axis, random.y_axis]), words)
    if isinstance(hessian, LossrayError):
        raise hessian
    if objective.layout.dim < 2:
        raise StudyError("surface: found one parameter; needed: two or more, for a plane")
    (pairs,) = packed_eigenpairs(hessian, [Wanted("largest", 2)], seeds=[seed], tolerance=TOLERANCE)
    if axes == "eigenvectors":
        values = pairs.values[0].tolist()
        words = (f"eigenvector of {values[0]:.4g}, the largest", f"eigenvector of {values[1]:.4g}, the next")
        return _scaled(pairs.vectors[0], words, hessian, theta)
    if axes == "gradient":
        return _along(-hessian.gradient[0], pairs.vectors[0], "minus the gradient", hessian, theta)
    step = _update(ModelPoint(hessian, objective), update, optimizer)
    return _along(step, pairs.vectors[0], "the update", hessian, theta)


def _along(step: Tensor, leading: Tensor, name: str, hessian: PackedHessian, theta: Tensor) -> SurfaceAxes:
    """A direction [d], and across it the first of the leading eigenvectors [2, d]."""
    length = float(torch.linalg.vector_norm(step))
    second = across(step, leading) if length > 0 else None
    if second is None:
        raise StudyError(f"surface: {name} is zero, and gives no direction")
    plane = _scaled(torch.stack([step / length, second]), ("", ACROSS), hessian, theta)
    times = float(torch.linalg.vector_norm(plane.vectors[0])) / length
    return replace(plane, words=(f"{name}, {times:.3g} times", ACROSS))


def _update(point: ModelPoint, update: Vector | None, optimizer: torch.optim.Optimizer | None) -> Tensor:
    """The given one [d], or the optimizer's next at the gradient."""
    if update is not None:
        return point.vector(update, "surface, update")[0]
    if optimizer is None:
        raise StudyError("surface, axes: 'update' needs update=, the step, or optimizer=")
    step = read_user_optimizer(optimizer, point).virtual_update(point.operator.gradient)
    if isinstance(step, str):
        raise StudyError(f"surface: {step}; pass update=")
    return step[0]


def _scaled(units: Tensor, words: tuple[str, str], hessian: PackedHessian, theta: Tensor) -> SurfaceAxes:
    """Unit vectors [2, d] at the lengths at which the quadratic term has added the loss."""
    products = hessian.apply(units[None])[0]
    lengths = [
        reach(float(unit @ product), loss=float(hessian.losses[0]), theta=theta)
        for unit, product in zip(units, products, strict=True)
    ]
    return SurfaceAxes(units * units.new_tensor(lengths)[:, None], words)


def _given(axes: Sequence[Any], objective: ModuleObjective, theta: Tensor) -> SurfaceAxes:
    """Two directions, or the plane of three points of which the objective is at the first."""
    if len(axes) not in (2, 3):
        raise StudyError(
            f"surface, axes: found {len(axes)} entries; allowed: two directions, or three points"
        )
    if any(isinstance(one, nn.Module) for one in axes) and len(axes) == 2:
        raise StudyError("surface, axes: found two models; a plane has three points: axes=(model, a, b)")
    names = ("first", "second") if len(axes) == 2 else ("second", "third")
    vectors = [
        _flat(one, objective, f"surface, axes: the {name}")
        for one, name in zip(axes[-2:], names, strict=True)
    ]
    if len(axes) == 2:
        if not all(bool((vector != 0).any()) for vector in vectors):
            raise StudyError("surface, axes: a direction is zero")
        return SurfaceAxes(torch.stack(vectors), ("the first direction", "the second direction"))
    plane = through_points(theta, *vectors)
    if plane is None:
        raise StudyError("surface, axes: the three points lie on a line, and span no plane")
    x_axis = plane[0]
    x = float((vectors[1] - theta) @ x_axis / (x_axis @ x_axis))
    marks = {"origin": (0.0, 0.0), "a": (1.0, 0.0), "b": (x, 1.0)}
    return SurfaceAxes(torch.stack(plane), ("from the origin to a", "across, to b"), marks)


def _flat(given: Any, objective: ModuleObjective, name: str) -> Tensor:
    """A direction or a point [d]."""
    if isinstance(given, nn.Module):
        given = dict(uncompiled(given).named_parameters())
    return flat_vector(given, objective.model, objective.layout, name=name)
