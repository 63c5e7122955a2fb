"""What the Hessian says about the directions at one checkpoint: the tables of geometry."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from lossray.geometry.directions import (
    Along,
    Reference,
    curvature_within_layers,
    direction_rows,
    measure,
    share_rows,
)
from lossray.geometry.finite_step import finite_steps, real_steps
from lossray.geometry.gauges import Gauge
from lossray.geometry.subspace_angles import angle_rows
from lossray.geometry.vectors import Name
from lossray.geometry.window import Frame, WindowAlignment
from lossray.measures.cells import Row
from lossray.measures.checkpoint_directions import NextStep, directions_at, directions_of, next_step
from lossray.measures.checkpoint_sharpness import sharpness_rows
from lossray.measures.gauged_pairs import GaugeEnds, eigenpairs_in, gauges_at, stored_name
from lossray.measures.pack_point import PackPoint, objective_at
from lossray.operators.transforms import PointOperator
from lossray.spectra.analysis import PackedAnalysis
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.study.demands import asks_for_angles, gauge_pairs
from lossray.training.replay import replay


@dataclass(frozen=True)
class Geometry:
    """What the Hessian says about the directions at one checkpoint.

    Attributes:
        rows: by table.
        spectra: the eigenpairs in the gauges that are not the identity.
    """

    rows: dict[str, list[Row]] = field(default_factory=dict)
    spectra: dict[Name, PackedEigenPairs] = field(default_factory=dict)


@dataclass(frozen=True)
class _Stand:
    """What all that is measured here rests on."""

    point: PackPoint
    hessian: PointOperator
    analysis: PackedAnalysis  # the Hessian's


def geometry_at(point: PackPoint, hessian: PointOperator, analysis: PackedAnalysis) -> Geometry:
    """Directions, their angles in every gauge, the window that follows, and sharpness.

    Args:
        point: the pack at the checkpoint.
        hessian: the members' Hessians.
        analysis: theirs.
    """
    stand = _Stand(point, hessian, analysis)
    following = next_step(point)
    directions = directions_at(point, analysis.gradient, following)
    gauges = gauges_at(point) if asks_for_angles(point.study) else {}
    ends = {name: _ends(stand, gauge) for name, gauge in gauges.items()}
    rows = {
        **_direction_rows(stand, directions, following),
        "angles": [
            row for name, gauge in gauges.items() for row in angles_in(point, gauge, ends[name], directions)
        ],
        "alignment": _alignment_rows(point, gauges, ends),
        "sharpness": sharpness_rows(point, hessian, analysis, following, ends),
    }
    spectra = {
        stored_name(name, end): getattr(ends[name], end)
        for name, gauge in gauges.items()
        if not gauge.identity
        for end in ("largest", "smallest")
    }
    return Geometry(rows, spectra)


def angles_in(point: PackPoint, gauge: Gauge, ends: GaugeEnds, directions: Mapping[str, Tensor]) -> list[Row]:
    """Rows of `angles` in one gauge."""
    rows = angle_rows(
        gauge.transform(directions),
        ends.largest,
        n_outputs=point.dataset.n_outputs,
        layout=point.stack.layout,
        gauge=gauge,
        smallest=ends.smallest,
    )
    return [point.row(asdict(row)) for row in rows]


def _direction_rows(
    stand: _Stand, directions: Mapping[str, Tensor], following: NextStep | None
) -> dict[str, list[Row]]:
    """Rows of `directions` and `shares`."""
    point, analysis = stand.point, stand.analysis
    measured = measure(directions, stand.hessian)
    reference = Reference(
        analysis.gradient, analysis.trace.value, analysis.trace.stderr, analysis.pairs.values[:, 0]
    )
    lr = following.lr if following is not None else float("nan")
    steps = finite_steps(objective_at(point), real_steps(directions, lr))
    return {
        "directions": [point.row(asdict(row)) for row in direction_rows(measured, reference, steps)],
        "shares": layer_shares(point, measured, stand.hessian),
    }


def layer_shares(point: PackPoint, measured: Mapping[str, Along], hessian: PointOperator) -> list[Row]:
    """Rows of `shares`, of directions along which the Hessians are known."""
    layout = point.stack.layout
    within = curvature_within_layers(measured, hessian, layout) if point.study.angles.layers else None
    return [point.row(asdict(row)) for row in share_rows(measured, layout, within)]


def _ends(stand: _Stand, gauge: Gauge) -> GaugeEnds:
    """The eigenpairs in a gauge; those of the Hessian itself are there already."""
    if gauge.identity:
        return GaugeEnds(stand.analysis.pairs, stand.analysis.smallest)
    top = gauge_pairs(stand.point.study, stand.point.dataset.n_outputs, stand.hessian.shape[1])
    return eigenpairs_in(stand.point, gauge, stand.hessian, top=top)


def _alignment_rows(
    point: PackPoint, gauges: Mapping[str, Gauge], ends: Mapping[str, GaugeEnds]
) -> list[Row]:
    """Rows of `alignment`; none for a recorded run, whose next batches are not known."""
    study, pack = point.study, point.pack
    if not study.angles.window or pack.recorded is not None or pack.optimizer is None:
        return []
    frames = [Frame(gauge, ends[name].largest) for name, gauge in gauges.items()]
    window = WindowAlignment(frames, point.stack.layout)
    steps = replay(
        point.stack,
        point.theta,
        point.checkpoint,
        pack.optimizer,
        study.training,
        point.dataset,
        steps=study.angles.window,
        shadow=study.angles.shadow,
    )
    for step in steps:
        window.add(directions_of(point, step))
    return [point.row(asdict(row)) for row in window.rows()]
