"""Angles of directions to the eigenspaces of one model's curvature, in several gauges: `lossray.angles`."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossray.errors import DataError, ModelError, StudyError
from lossray.geometry import gauges as known_gauges
from lossray.geometry.direction_kinds import COVECTORS
from lossray.geometry.gauges import Gauge
from lossray.geometry.nulls import LayerNull
from lossray.geometry.subspace_angles import AngleRow, rows_of_spaces, spaces_of
from lossray.measures.model_point import ModelPoint, point_of
from lossray.measures.user_optimizer import UserOptimizer, read_user_optimizer
from lossray.measures.user_vectors import Vector
from lossray.names import unknown_name
from lossray.networks.rescale import in_gauge
from lossray.networks.symmetry import rescaling_symmetry
from lossray.operators.transforms import PackedScaled
from lossray.spectra.certified_pairs import EigenPairs, PackedEigenPairs
from lossray.spectra.eigensolver import packed_eigenpairs
from lossray.spectra.ends import Wanted
from lossray.spectra.operator import SingleOperator
from lossray.spectra.summary import Summarised

if TYPE_CHECKING:
    import pandas as pd

GAUGES = ("raw", "balanced", "adaptive", "preconditioned")
MOST_LINES = 10  # of a summary


@dataclass(frozen=True, repr=False)
class Angles(Summarised):
    """Angles of directions to eigenspaces; prints as a few lines.

    Attributes:
        rows: one for each gauge, subspace and direction; see `AngleRow`.
        pairs: the leading eigenpairs in each gauge.
        notes: what is missing, and why, one line each.
    """

    rows: tuple[AngleRow, ...]
    pairs: Mapping[str, EigenPairs]
    notes: tuple[str, ...]

    def summary(self) -> str:
        """The energy of each direction in each subspace, and how many times that of a random direction."""
        cells = {(row.direction, row.gauge, row.subspace): _cell(row) for row in self.rows}
        spaces = list(dict.fromkeys(row.subspace for row in self.rows))
        lines = [
            f"{direction:<22} {gauge:<14}"
            + "".join(f"{cells.get((direction, gauge, space), '-'):>19}" for space in spaces)
            for direction, gauge in dict.fromkeys((row.direction, row.gauge) for row in self.rows)
        ]
        more = [f"{len(lines) - MOST_LINES} more in .to_frame()"] if len(lines) > MOST_LINES else []
        return "\n".join(
            [
                "energy inside eigenspaces (times that of a random direction; ? where one is not resolved)",
                f"{'direction':<22} {'gauge':<14}" + "".join(f"{space:>19}" for space in spaces),
                *lines[:MOST_LINES],
                *more,
                *(f"note: {note}" for note in self.notes),
            ]
        )

    def to_frame(self) -> "pd.DataFrame":
        """One row per gauge, subspace and direction, with columns of the table `angles`."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows]).drop(columns="member")


def angles(
    matrix: SingleOperator,
    directions: Mapping[str, Vector] | None = None,
    *,
    k: Sequence[int] = (1, 5, 10),
    gauges: Sequence[str] = ("raw", "balanced"),
    optimizer: torch.optim.Optimizer | None = None,
    scale: Tensor | None = None,
    covectors: Collection[str] = COVECTORS,
    tol: float = 1e-3,
    seed: int = 0,
) -> Angles:
    """Angles of directions to the leading eigenspaces and to the eigenvector of the smallest eigenvalue.

    Each stands beside the nulls that say what a random direction would have (theory 2.11).

    Args:
        matrix: ``lossray.Hessian(model, loss, data)``, or another matrix of a model.
        directions: vectors by name: tensors [d] in the order of ``model.parameters()``, lists such as
            ``[p.grad for p in model.parameters()]``, or dicts of tensors by name. None: the gradient of the
            matrix's own loss.
        k: dimensions of the leading eigenspaces, those below d: 1 is "v1", 5 is "top5".
        gauges: coordinates in which the angles are taken (theory 2.6): "raw"; "balanced", ReLU units
            rescaled to incoming and outgoing weights of one norm; "adaptive", |theta|; "preconditioned".
        optimizer: of the model, left as it is. It adds the directions "momentum" and "update", the step that
            it would take at "minibatch_gradient" where that is given and otherwise at the gradient, and the
            preconditioner.
        scale: diagonal [d] of the preconditioner, in place of the optimizer's.
        covectors: names of the directions that are gradients: these go the other way in a gauge than
            displacements do.
        tol: largest residual of a converged pair, as a share of |lambda|max.
        seed: of the random start vectors.

    Raises:
        StudyError: an impossible argument, a matrix that knows no model, or a model that has moved since.
        ResourceError: the basis would not fit the memory.

    Example:
        Half of a squared error whose Hessian is diag(9, 4, 1): v1 is the first axis.

        >>> import lossray, torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> loss = lambda outputs, targets: 1.5 * (outputs - targets).square().mean()
        >>> data = (torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1))
        >>> H = lossray.Hessian(model, loss, data)
        >>> angles = lossray.angles(H, {"update": torch.tensor([3.0, 4.0, 0.0])}, k=(1, 2), gauges=["raw"])
        >>> print(angles.to_frame()[["subspace", "energy", "null_ratio"]].round(4))
          subspace  energy  null_ratio
        0       v1    0.36        1.08
        1     top2    1.00        1.50
        2     vmin    0.00        0.00
    """
    point = point_of(matrix, "angles")
    sizes = _sizes(k, point.layout.dim)
    reader = None if optimizer is None else read_user_optimizer(optimizer, point)
    vectors, notes = _directions(point, directions, reader)
    asked, absent = _gauges(gauges, point, reader, scale)
    pairs: dict[str, PackedEigenPairs] = {}
    rows: list[AngleRow] = []
    raw: tuple[PackedEigenPairs, PackedEigenPairs] | None = None
    for name, gauge in asked.items():
        ends = raw if gauge.identity and raw else _solved(point, gauge, max(sizes.values()), tol, seed)
        raw = ends if gauge.identity else raw
        pairs[name], smallest = ends
        kept = gauge.scale != 0
        spaces = spaces_of(pairs[name], smallest, sizes=sizes, kept=kept)
        gauged_vectors = {
            direction: gauge.covector(vector) if direction in covectors else gauge.vector(vector)
            for direction, vector in vectors.items()
        }
        rows += rows_of_spaces(gauged_vectors, spaces, LayerNull(point.layout, kept), name)
    singles = {name: packed.member(0, "largest") for name, packed in pairs.items()}
    return Angles(tuple(rows), singles, (*(reader.notes if reader else ()), *notes, *absent))


def _sizes(k: Sequence[int], dim: int) -> dict[str, int]:
    """Dimensions of the leading eigenspaces by name, in ascending order."""
    given = [k] if isinstance(k, int) else list(k)
    if not given or any(type(one) is not int or one < 1 for one in given):
        raise StudyError(f"angles, k: found {k!r}; allowed: whole numbers from 1")
    sizes = {"v1" if one == 1 else f"top{one}": one for one in sorted(given) if one < dim}
    if not sizes:
        raise StudyError(f"angles, k: found {k!r}; allowed: numbers below that of the parameters, {dim}")
    return sizes


def _directions(
    point: ModelPoint, given: Mapping[str, Vector] | None, optimizer: UserOptimizer | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Vectors [1, d] by name, and which of the optimizer's there are not."""
    vectors = point.vectors(given, "angles")
    if optimizer is None:
        return vectors, []
    notes = []
    momentum = optimizer.state.momentum()
    update = optimizer.virtual_update(vectors.get("minibatch_gradient", point.operator.gradient))
    if momentum is not None:
        vectors.setdefault("momentum", momentum)
    elif not any("momentum" in note for note in optimizer.notes):
        notes.append("no direction 'momentum': the optimizer keeps none, or has taken no step")
    if isinstance(update, str):
        notes.append(update)
    else:
        vectors.setdefault("update", update)
    return vectors, notes


# ---- gauges


def _gauges(
    names: Sequence[str], point: ModelPoint, optimizer: UserOptimizer | None, scale: Any
) -> tuple[dict[str, Gauge], list[str]]:
    """The gauges by name, and why some do not exist."""
    gauges: dict[str, Gauge] = {}
    notes = []
    for name in [names] if isinstance(names, str) else names:
        if name not in GAUGES:
            raise StudyError(f"angles, gauges: {unknown_name(str(name), GAUGES)}")
        if name == "raw":
            gauges[name] = known_gauges.raw(point.theta)
        elif name == "adaptive":
            gauges[name] = known_gauges.adaptive(point.theta)
        else:
            gauge = _balanced(point) if name == "balanced" else _preconditioned(point, optimizer, scale)
            if isinstance(gauge, str):
                notes.append(f"no gauge {name!r}: {gauge}")
            else:
                gauges[name] = gauge
    return gauges, notes


def _balanced(point: ModelPoint) -> Gauge | str:
    """The gauge of least norm, or why no rescaling leaves the function as it is, which is measured."""
    try:
        symmetry = rescaling_symmetry(point.model, point.layout, point.objective.some_inputs())
        factors = symmetry.balance_factors(point.theta)
        in_gauge(point.model, symmetry, factors[0])
    except (DataError, ModelError) as error:
        return str(error)
    return known_gauges.balanced(symmetry.diagonal(factors))


def _preconditioned(point: ModelPoint, optimizer: UserOptimizer | None, scale: Any) -> Gauge | str:
    if scale is None and optimizer is None:
        raise StudyError(
            "angles, gauges: 'preconditioned' needs optimizer=, or scale=, the preconditioner's diagonal [d]"
        )
    if scale is None and optimizer is not None:
        optimizer_scale = optimizer.state.scale()
        absent = "the optimizer has none, or has taken no step"
        return absent if optimizer_scale is None else known_gauges.preconditioned(optimizer_scale)
    diagonal = torch.as_tensor(scale, dtype=torch.float64).to(point.theta.device)
    if diagonal.shape != (point.layout.dim,) or not bool((diagonal > 0).all()):
        raise StudyError(
            f"angles, scale: found {list(diagonal.shape)}, from {float(diagonal.min()):.3g}; allowed: "
            f"[{point.layout.dim}], above 0"
        )
    return known_gauges.preconditioned(diagonal[None])


def _solved(
    point: ModelPoint, gauge: Gauge, top: int, tol: float, seed: int
) -> tuple[PackedEigenPairs, PackedEigenPairs]:
    """The leading pairs and the smallest one of S H S."""
    operator = point.operator if gauge.identity else PackedScaled(point.operator, gauge.scale)
    largest, smallest = packed_eigenpairs(
        operator,
        [Wanted("largest", top), Wanted("smallest", 1, confirm=False)],
        seeds=[seed],
        tolerance=tol,
    )
    return largest, smallest


def _cell(row: AngleRow) -> str:
    return f"{row.energy:.2g} ({row.null_ratio:.2g}x){' ' if row.resolved else '?'}"
