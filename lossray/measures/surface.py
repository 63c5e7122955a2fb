"""The loss of one model on a plane through its parameters: `lossray.surface`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lossray.errors import LossrayError, ModelError, ResourceError, StudyError
from lossray.measures.surface_axes import axes_of, origin_of
from lossray.measures.user_vectors import Vector
from lossray.networks.batch_norm import has_statistics
from lossray.networks.layout import require_module, uncompiled
from lossray.networks.losses import Loss
from lossray.operators.exact_products import exact_products
from lossray.operators.model_outputs import Outputs
from lossray.operators.modules import Closure, ModuleObjective
from lossray.operators.objectives import EXAMPLES_AT_ONCE, Batch
from lossray.operators.packed import PackedHessian
from lossray.spectra.summary import Summarised

if TYPE_CHECKING:
    import pandas as pd

AROUND = 1.4  # times the extent of three points


@dataclass(frozen=True, repr=False)
class Surface(Summarised):
    """The loss on a plane; prints as a few lines.

    Attributes:
        x: [n] coordinates along the first axis, float64; 0 is the model, or the origin of three points.
        y: [n] those along the second.
        loss: [n, n] float64, ``loss[i, j]`` at ``x[i], y[j]``.
        accuracy: [n, n] share of the examples classified correctly; None where the targets are no classes.
        axes: what the two axes are, in words.
        vectors: [d, 2] float64, the steps for which x = 1 and y = 1 stand.
        slope: [2] derivatives of the loss along the axes at (0, 0); NaN where they are not known.
        curvature: [2, 2] second derivatives there, as the Hessian has them; NaN likewise.
        marks: coordinates (x, y) of the given points by name.
        notes: what is not as it seems, one line each.
    """

    x: Tensor
    y: Tensor
    loss: Tensor
    accuracy: Tensor | None
    axes: tuple[str, str]
    vectors: Tensor
    slope: Tensor
    curvature: Tensor
    marks: Mapping[str, tuple[float, float]]
    notes: tuple[str, ...] = ()

    def quadratic(self, at_origin: float) -> Tensor:
        """The loss [n, n] that slope and curvature predict from the one at (0, 0)."""
        x, y = self.x[:, None], self.y[None, :]
        linear = at_origin + self.slope[0] * x + self.slope[1] * y
        c = self.curvature
        return linear + 0.5 * (c[0, 0] * x.square() + 2 * c[0, 1] * x * y + c[1, 1] * y.square())

    def summary(self) -> str:
        """The lowest and the highest loss, and what the axes are."""
        heights = self.loss.nan_to_num(nan=torch.inf)
        lowest, highest = int(heights.argmin()), int(self.loss.nan_to_num(nan=-torch.inf).argmax())
        norms = torch.linalg.vector_norm(self.vectors, dim=0).tolist()
        bends = self.curvature.diagonal().tolist()
        lines = [
            f"loss on {len(self.x)} x {len(self.y)} points: lowest {self._place(lowest)}, highest "
            f"{self._place(highest)}",
            *(
                f"{name}: {words}; {name} = 1 is {norm:.3g} long, second derivative {bend:.3g}"
                for name, words, norm, bend in zip("xy", self.axes, norms, bends, strict=True)
            ),
            *(f"{name} at ({x:.3g}, {y:.3g})" for name, (x, y) in self.marks.items()),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_frame(self) -> "pd.DataFrame":
        """One row per point, with columns of the table `surfaces`."""
        import pandas as pd

        i, j = torch.meshgrid(
            torch.arange(len(self.x), device="cpu"), torch.arange(len(self.y), device="cpu"), indexing="ij"
        )
        x_norm, y_norm = torch.linalg.vector_norm(self.vectors, dim=0).tolist()
        accuracy = torch.full_like(self.loss, torch.nan) if self.accuracy is None else self.accuracy
        columns = {
            "i": i.flatten().tolist(),
            "j": j.flatten().tolist(),
            "x": self.x[i].flatten().tolist(),
            "y": self.y[j].flatten().tolist(),
            "x_norm": x_norm,
            "y_norm": y_norm,
            "loss": self.loss.flatten().tolist(),
            "accuracy": accuracy.flatten().tolist(),
        }
        return pd.DataFrame(columns)

    def _place(self, index: int) -> str:
        i, j = divmod(index, len(self.y))
        return f"{float(self.loss[i, j]):.4g} at ({float(self.x[i]):.3g}, {float(self.y[j]):.3g})"


def surface(
    model: nn.Module,
    loss: Loss | None = None,
    data: Any = None,
    axes: str | Sequence[Any] = "eigenvectors",
    points: int = 25,
    *,
    update: Vector | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    span: float = 1.0,
    closure: Closure | None = None,
    outputs: Outputs | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Surface:
    """The loss on a grid of points in a plane through the model's parameters, in eval mode.

    Args:
        model: any module; left as it was.
        loss: as for `lossray.Hessian`, as are ``data``, ``closure``, ``outputs`` and ``dtype``.
        data: the examples.
        axes: "eigenvectors", the Hessian's top two; "gradient", downhill, or "update", each with the top
            eigenvector across: there x = 1 is where the quadratic term has added the loss itself, or 0.1 if
            that is less. "random", two directions normalised filter by filter. Or two directions, in a form
            that `lossray.angles` takes, which x = 1 and y = 1 stand for. Or three points, modules, state
            dicts or flat parameters: the plane through them, the first at (0, 0), the second at (1, 0).
        points: along each axis; of an odd number the one in the middle is the model itself.
        update: of an optimizer, for ``axes="update"``.
        optimizer: whose next step at the gradient is the update, where none is given.
        span: the axes reach from -span to span; around three points 1 leaves a fifth of their extent on each
            side.
        closure: in place of the loss.
        outputs: which part of what the model returns the loss gets.
        dtype: in which the loss is evaluated.
        seed: of random directions and of the search for eigenvectors.

    Raises:
        StudyError: an impossible argument.
        ModelError: a model or loss that cannot be used, or, with axes that need one, without a Hessian.
        DataError: data that cannot be used.

    Example:
        A quadratic bowl, whose loss is (9 x^2 + 4 y^2) / 2 along its axes.

        >>> import lossray, torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> data = (torch.diag(torch.tensor([3.0, 2.0])), torch.zeros(2, 1))
        >>> loss = lambda outputs, targets: (outputs - targets).square().mean()
        >>> surface = lossray.surface(model, loss, data, axes=torch.eye(2), points=3)
        >>> surface.loss
        tensor([[6.5000, 4.5000, 6.5000],
                [2.0000, 0.0000, 2.0000],
                [6.5000, 4.5000, 6.5000]], dtype=torch.float64)
        >>> surface.curvature
        tensor([[9., 0.],
                [0., 4.]], dtype=torch.float64)
    """
    _check(points, span)
    require_module(model)
    given = axes if isinstance(axes, str) else list(axes)
    origin = origin_of(uncompiled(model), given)
    objective = ModuleObjective(origin, loss, data, closure=closure, outputs=outputs, dtype=dtype)
    hessian = _hessian(objective)
    plane = axes_of(given, objective, hessian, seed, update, optimizer)
    coordinates = list(plane.marks.values())
    x, y = (_ticks(points, span, [mark[i] for mark in coordinates]) for i in (0, 1))
    losses, accuracies = _evaluated(objective, torch.cartesian_prod(x, y), plane.vectors)
    slope, curvature, notes = _derivatives(hessian, plane.vectors)
    if coordinates and has_statistics(origin):
        notes.append("batch-norm statistics are those of the origin at all points")
    return Surface(
        x=x,
        y=y,
        loss=losses.view(points, points),
        accuracy=None if accuracies is None else accuracies.view(points, points),
        axes=plane.words,
        vectors=plane.vectors.T.cpu(),
        slope=slope,
        curvature=curvature,
        marks=plane.marks,
        notes=tuple(notes),
    )


def _check(points: int, span: float) -> None:
    if type(points) is not int or points < 2:
        raise StudyError(f"surface, points: found {points!r}; allowed: a whole number from 2")
    if not 0 < span < math.inf:
        raise StudyError(f"surface, span: found {span!r}; allowed: above 0")


def _ticks(points: int, span: float, marks: Sequence[float]) -> Tensor:
    """Coordinates [n] along one axis: from -span to span, or around the given points."""
    units = [(2 * i - (points - 1)) / (points - 1) for i in range(points)]  # 0 exactly in the middle
    low, high = (min(marks), max(marks)) if marks else (-1.0, 1.0)
    half = span * (high - low) / 2 * (AROUND if marks else 1.0)
    return torch.tensor([(low + high) / 2 + half * unit for unit in units], dtype=torch.float64, device="cpu")


# ---- the loss, and what its derivatives predict


def _hessian(objective: ModuleObjective) -> PackedHessian | LossrayError:
    """The Hessian, or why there is none."""
    try:
        hessian = PackedHessian(objective)
        hessian.require_derivatives()
    except (ModelError, ResourceError) as error:
        return error
    return hessian


def _derivatives(hessian: PackedHessian | LossrayError, vectors: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Slope [2] and curvature [2, 2] along the axes [2, d]."""
    if isinstance(hessian, LossrayError):
        unknown = torch.full((2, 2), torch.nan, dtype=torch.float64, device="cpu")
        return unknown[0], unknown, [f"no slope and curvature: {hessian}"]
    norms = torch.linalg.vector_norm(vectors, dim=1)
    units = vectors / norms[:, None]  # which do not overflow in float32
    products = hessian.apply(units[None])[0]
    slope, curvature = norms * (units @ hessian.gradient[0]), units @ products.T
    curvature = norms[:, None] * (curvature + curvature.T) / 2 * norms
    return slope.cpu(), curvature.cpu(), []


def _evaluated(objective: ModuleObjective, grid: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
    """Losses [P] and accuracies [P] at the places [P, 2] of a plane; the data are read once."""
    theta = objective.theta.detach()[0].double()
    losses, right = (
        torch.zeros(len(grid), dtype=torch.float64, device="cpu"),
        torch.zeros(len(grid), dtype=torch.float64, device="cpu"),
    )
    counted, classes = 0, True
    with exact_products(objective.device, recurrent=objective.recurrent), torch.no_grad():
        for part in _parts(objective):
            scored = _has_classes(objective, part)
            classes = classes and scored
            counted += int((part.targets >= 0).sum()) if scored else 0
            for p, shift in enumerate(grid.to(theta)):
                point = (theta + shift @ vectors).to(objective.dtype)[None]
                height, hits = _at(objective, point, part, scored=scored)
                losses[p] += part.share * height
                right[p] += hits
    if not classes or not counted:
        return losses, None
    return losses, (right / counted).masked_fill(~torch.isfinite(losses), torch.nan)


def _at(objective: ModuleObjective, point: Tensor, part: Batch, *, scored: bool) -> tuple[float, int]:
    """The mean loss of some examples at parameters [1, d], and how many are classified correctly."""
    if not scored:
        return float(objective.losses(point, part)[0]), 0
    outputs = objective.outputs(point, part)
    hits = outputs[0].argmax(dim=-1) == part.targets
    return float(objective.losses_of(outputs, part)[0]), int(hits.sum())


def _parts(objective: ModuleObjective) -> Iterator[Batch]:
    """The batches, large ones in pieces where their loss is a mean over these."""
    for batch in objective.batches():
        large = (batch.size or 0) > EXAMPLES_AT_ONCE
        yield from batch.split(EXAMPLES_AT_ONCE if large and objective.divisible else None)


def _has_classes(objective: ModuleObjective, part: Batch) -> bool:
    """Whether the targets [B] are classes and the outputs their scores; an id below 0 is no class."""
    targets = part.targets
    if objective.closure is not None or not isinstance(targets, Tensor):
        return False
    if targets.ndim != 1 or targets.is_floating_point():
        return False
    try:
        outputs = objective.outputs(objective.theta, part)
    except ModelError:  # no tensor of one row for each example: the loss is a matter of its own
        return False
    return outputs.ndim == 3 and outputs.shape[-1] > 1
