"""Slices of the loss through one checkpoint of a pack: the table `surfaces`."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from lossray.geometry.planes import (
    Plane,
    SurfaceRow,
    along_eigenvectors,
    along_random,
    along_trajectory,
    surface_rows,
)
from lossray.measures.cells import Row, finite
from lossray.measures.course import Course
from lossray.measures.pack_point import PackPoint
from lossray.seeds import stream
from lossray.spectra.certified_pairs import PackedEigenPairs
from lossray.training.evaluation import evaluate_split


def slice_rows(
    point: PackPoint, members: Sequence[int], *, pairs: PackedEigenPairs | None, course: Course | None
) -> list[Row]:
    """Rows of `surfaces`, of the living among some runs; slices that do not exist are left out.

    Args:
        point: the pack at the checkpoint.
        members: indices of the runs.
        pairs: the Hessian's leading eigenpairs; None where no slice needs them, or they were not kept.
        course: of the pack; None where no slice lies in the plane of the trajectory.
    """
    settings = point.study.surfaces
    assert settings is not None
    rows: list[Row] = []
    for r, plane in _planes(point, members, pairs, course):
        cells = surface_rows(
            plane,
            point.stack,
            point.theta[r],
            {name: tensor[r] for name, tensor in point.buffers.items()},
            point.loss,
            point.examples,
            points=settings.points,
            span=settings.span,
        )
        rows += [_row(point, r, plane, cell) for cell in cells]
    return rows


def _planes(
    point: PackPoint, members: Sequence[int], pairs: PackedEigenPairs | None, course: Course | None
) -> Iterator[tuple[int, Plane]]:
    """Every living member with its slices."""
    settings = point.study.surfaces
    assert settings is not None
    losses, _ = evaluate_split(point.stack, point.theta, point.buffers, point.loss, point.examples)
    for r, kind in itertools.product(members, settings.kinds):
        if not point.alive[r]:
            continue
        theta = point.theta[r]
        plane: Plane | None = None
        if kind == "pca" and course is not None:
            plane = along_trajectory(theta, course.of(r))
        elif kind == "random":
            seed = stream(point.pack.seeds[r], "surface", point.step)
            plane = along_random(theta, point.stack.layout, seed)
        elif pairs is not None and kind != "pca":
            plane = along_eigenvectors(
                kind, pairs.vectors[r], pairs.values[r], loss=float(losses[r]), theta=theta
            )
        if plane is not None:
            yield r, plane


def _row(point: PackPoint, r: int, plane: Plane, cell: SurfaceRow) -> Row:
    run_id = point.pack.run_ids[r]
    return {
        "surface_id": f"{run_id}-{point.step}-{plane.kind}",
        "run_id": run_id,
        "step": point.step,
        "kind": plane.kind,
        **asdict(cell),
        "loss": finite(cell.loss),
        "accuracy": finite(cell.accuracy),
    }
