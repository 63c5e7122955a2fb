"""What the Hessian says about the directions at one checkpoint: the tables of geometry."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor

from lossray.geometry.directions import Reference, direction_rows, measure, share_rows
from lossray.geometry.finite_step import finite_steps, real_steps
from lossray.geometry.gauges import Gauge
from lossray.geometry.subspace_angles import angle_rows, subspaces
from lossray.geometry.vectors import Name
from lossray.geometry.window import Frame, WindowAlignment
from lossray.operators.transforms import PointOperator
from lossray.spectra.analysis import PackedAnalysis
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.study import Study
from lossray.training.replay import replay
from tasks.checkpoint_directions import NextStep, directions_at, directions_of, next_step
from tasks.checkpoint_sharpness import sharpness_rows
from tasks.checkpoint_spectra import Row
from tasks.gauged_pairs import GaugeEnds, eigenpairs_in, gauges_at, stored_name
from tasks.pack_point import CheckpointJob, PackPoint, objective_at

WINDOW_PAIRS = 10  # of the largest subspace of the window statistic
V1_PAIRS = 2  # the second one's value tells how well the first is known


@dataclass
class Geometry:
    """Rows by table, and the eigenpairs in the gauges that are not the identity."""

    rows: dict[str, list[Row]] = field(default_factory=dict)
    spectra: dict[Name, PackedEigenPairs] = field(default_factory=dict)


def geometry_at(
    job: CheckpointJob, point: PackPoint, hessian: PointOperator, analysis: PackedAnalysis
) -> Geometry:
    """Directions, their angles in every gauge, the window that follows, and sharpness.

    Args:
        job: of the checkpoint.
        point: the pack at it.
        hessian: the members' Hessians.
        analysis: theirs.
    """
    found, study = Geometry(), job.context.study
    following = next_step(job, point)
    directions = directions_at(job, point, analysis.gradient, following)
    _add_directions(found, job, point, hessian, analysis, directions, following)
    known: dict[str, Gauge] = {}
    if asks_for_angles(study):
        known = gauges_at(study, job.pack, point)
    ends = _ends(job, point, hessian, analysis, known)
    found.rows["angles"] = [
        row for name, gauge in known.items() for row in angles_in(job, point, gauge, ends[name], directions)
    ]
    found.rows["alignment"] = _alignment(job, point, known, ends)
    found.rows["sharpness"] = sharpness_rows(job, point, hessian, analysis, following, ends)
    for name, gauge in known.items():
        if not gauge.identity:
            found.spectra[stored_name(name, "largest")] = ends[name].largest
            found.spectra[stored_name(name, "smallest")] = ends[name].smallest
    return found


def asks_for_angles(study: Study) -> bool:
    """Whether eigenvectors are needed in the gauges."""
    return bool(study.angles.directions or study.angles.window)


def pairs_needed(study: Study, n_outputs: int, dim: int) -> int:
    """As many eigenpairs as [curvature] asks for, and as the subspaces of [angles] need; d at most."""
    return min(max(study.curvature.top, gauge_pairs(study, n_outputs, dim)), dim)


def gauge_pairs(study: Study, n_outputs: int, dim: int) -> int:
    """As many as the subspaces of [angles] need; d at most."""
    if study.angles.subspaces == "v1":
        return min(V1_PAIRS, dim)
    needed = list(subspaces(n_outputs, dim).values()) if study.angles.directions else []
    return min(max([*needed, WINDOW_PAIRS if study.angles.window else 1]), dim)


def angles_in(
    job: CheckpointJob, point: PackPoint, gauge: Gauge, ends: GaugeEnds, directions: Mapping[str, Tensor]
) -> list[Row]:
    """Rows of `angles` in one gauge."""
    rows = angle_rows(
        gauge.transform(directions),
        ends.largest,
        n_outputs=point.dataset.n_outputs,
        layout=point.stack.layout,
        gauge=gauge,
        smallest=ends.smallest,
    )
    return [table_row(job, asdict(row)) for row in rows]


def table_row(job: CheckpointJob, row: Row) -> Row:
    """A row of the geometry room, its member named by its run."""
    member = row.pop("member")
    return {"run_id": job.pack.run_ids[member], "step": job.step, **row}


def _add_directions(
    found: Geometry,
    job: CheckpointJob,
    point: PackPoint,
    hessian: PointOperator,
    analysis: PackedAnalysis,
    directions: Mapping[str, Tensor],
    following: NextStep | None,
) -> None:
    measured = measure(directions, hessian)
    reference = Reference(
        analysis.gradient, analysis.trace.value, analysis.trace.stderr, analysis.pairs.values[:, 0]
    )
    lr = following.lr if following is not None else float("nan")
    steps = finite_steps(objective_at(job, point), real_steps(directions, lr))
    rows = direction_rows(measured, reference, steps)
    found.rows["directions"] = [table_row(job, asdict(row)) for row in rows]
    shares = share_rows(measured, point.stack.layout)
    found.rows["shares"] = [table_row(job, asdict(row)) for row in shares]


def _ends(
    job: CheckpointJob,
    point: PackPoint,
    hessian: PointOperator,
    analysis: PackedAnalysis,
    known: Mapping[str, Gauge],
) -> dict[str, GaugeEnds]:
    """The eigenpairs in every gauge; those of the Hessian itself are there already."""
    study = job.context.study
    top = gauge_pairs(study, point.dataset.n_outputs, hessian.shape[1])
    ends = {}
    for name, gauge in known.items():
        if gauge.identity:
            ends[name] = GaugeEnds(analysis.pairs, analysis.smallest)
        else:
            ends[name] = eigenpairs_in(
                gauge, hessian, study=study, pack=job.pack, step=job.step, top=top, alive=point.alive
            )
    return ends


def _alignment(
    job: CheckpointJob, point: PackPoint, known: Mapping[str, Gauge], ends: Mapping[str, GaugeEnds]
) -> list[Row]:
    """Rows of `alignment`; none for a recorded run, whose next batches are not known."""
    study, pack = job.context.study, job.pack
    if not study.angles.window or pack.recorded is not None or pack.optimizer is None:
        return []
    window = WindowAlignment(
        [Frame(gauge, ends[name].largest) for name, gauge in known.items()], point.stack.layout
    )
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
        window.add(directions_of(job, step))
    return [table_row(job, asdict(row)) for row in window.rows()]
