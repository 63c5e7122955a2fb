"""Between two neighbouring checkpoints: how the leading eigenspaces turn, and how far the pack moved.

The displacement u = theta(later) - theta(earlier) is a direction of the *earlier* checkpoint, whose Hessian,
gradient and eigenspaces it is held against. A member that has diverged at either checkpoint has null rows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from lossray.geometry.directions import Reference, direction_rows, measure
from lossray.geometry.finite_step import finite_steps
from lossray.geometry.overlaps import overlap_rows
from lossray.geometry.vectors import Name
from lossray.measures.cells import Row
from lossray.measures.checkpoint_geometry import angles_in, layer_shares
from lossray.measures.checkpoint_spectra import HESSIAN
from lossray.measures.gauged_pairs import gauges_at, stored_ends
from lossray.measures.pack_point import PackPoint, hessian_at, objective_at
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.storage.checkpoints import Checkpoint
from lossray.study import Pack, Study

Spectra = Mapping[Name, PackedEigenPairs]  # by operator, block and end


@dataclass(frozen=True)
class Displacement:
    """The way from one checkpoint to the next.

    Attributes:
        point: the pack at the earlier checkpoint.
        direction: {"displacement": [R, d] float64}; NaN for members that have diverged at either end.
    """

    point: PackPoint
    direction: Mapping[str, Tensor]


def displacement_from(point: PackPoint, later: Checkpoint) -> Displacement:
    """The way from a checkpoint to a later one, read on the same device."""
    parameters = point.stack.layout.join(later.parameters).to(point.theta.dtype)
    moved = parameters.double() - point.theta.double()
    dead = ~(point.alive & later.alive)[:, None]
    return Displacement(point, {"displacement": moved.masked_fill(dead, float("nan"))})


def overlaps_between(
    study: Study, pack: Pack, steps: tuple[int, int], spectra: tuple[Spectra, Spectra], n_outputs: int
) -> list[Row]:
    """Rows of `overlaps`, of the eigenspaces at the large end of every operator.

    Args:
        study: the settings.
        pack: the runs.
        steps: of the earlier and the later checkpoint.
        spectra: what their analyses have left.
        n_outputs: of the network.
    """
    (previous, step), (earlier, later) = steps, spectra
    rows: list[Row] = []
    for (operator, block, end), pairs in earlier.items():
        if end != "largest" or "@" in operator:
            continue
        after = later[operator, block, end]
        for row in overlap_rows(pairs, after, n_outputs=n_outputs, top=study.curvature.top):
            values = asdict(row)
            member = values.pop("member")
            rows.append(
                {"run_id": pack.run_ids[member], "step": step, **values}
                | {"previous_step": previous, "operator": operator, "block": block}
            )
    return rows


def displacement_rows(moved: Displacement, curvature: Mapping[str, Row]) -> dict[str, list[Row]]:
    """The displacement's rows of `directions` and `shares`.

    Args:
        moved: from where, and where to.
        curvature: the row of the Hessian in the table `curvature` at the earlier checkpoint, by run.
    """
    point = moved.point
    hessian = hessian_at(point)
    measured = measure(moved.direction, hessian)
    reference = _reference(point, hessian.gradient, curvature)
    steps = finite_steps(objective_at(point), moved.direction)
    return {
        "directions": [point.row(asdict(row)) for row in direction_rows(measured, reference, steps)],
        "shares": layer_shares(point, measured, hessian),
    }


def displacement_angles(moved: Displacement, spectra: Spectra) -> list[Row]:
    """The displacement's rows of `angles`, in every gauge of the earlier checkpoint."""
    rows = []
    for gauge in gauges_at(moved.point).values():
        ends = stored_ends(spectra, gauge)
        if ends is not None:
            rows += angles_in(moved.point, gauge, ends, moved.direction)
    return rows


def hessian_rows(table: list[Row]) -> dict[str, Row]:
    """Of the rows of `curvature` those of the Hessian itself, by run."""
    return {row["run_id"]: row for row in table if (row["operator"], row["block"]) == HESSIAN}


def _reference(point: PackPoint, gradient: Tensor, curvature: Mapping[str, Row]) -> Reference:
    """What the analysis of the earlier checkpoint has found of the Hessian as a whole."""

    def column(key: str) -> Tensor:
        values = [curvature[run_id][key] for run_id in point.pack.run_ids]
        return gradient.new_tensor([float("nan") if value is None else value for value in values])

    return Reference(gradient, column("trace"), column("trace_stderr"), column("lambda_max"))
